"""A bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest

from hvtrain import progress
from hvtrain.progress import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_now_and_then_and_at_the_end(monkeypatch):
    now = iter([0.0, 3.0, 6.0, 8.0, 9.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    out = io.StringIO()
    with Bar("working", 4, to=out) as bar:
        for n in range(1, 5):
            bar.update(n, "for a terminal", lambda s, n=n: f"{n} of 4 after {s:.0f} s")
        bar.note("kept")
    assert out.getvalue().splitlines() == ["2 of 4 after 6 s", "4 of 4 after 9 s", "kept"]


def test_a_terminal_gets_a_bar_and_no_lines():
    out = Terminal()
    with Bar("working", 4, to=out, done=1) as bar:
        bar.update(2, "2/4 clips", lambda s: pytest.fail("a line"))
        bar.live.refresh()
        bar.note("kept")
    text = out.getvalue()
    assert "working" in text and "2/4 clips" in text and "━" in text and "kept" in text


def test_other_ranks_show_nothing():
    out = Terminal()
    with Bar("working", 4, to=out, show=False) as bar:
        bar.update(4, "4/4", lambda s: "done")
        bar.note("kept")
    assert not out.getvalue()
