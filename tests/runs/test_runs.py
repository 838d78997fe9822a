"""`hvtrain runs`: what it finds, what it says of each, and the pictures that it draws."""

from __future__ import annotations

import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from hvtrain.errors import HvtrainError
from hvtrain.runs import chart
from hvtrain.runs.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, charts, colour
from hvtrain.runs.listing import HEAD, lines, row
from hvtrain.runs.read import Run, find_runs
from launcher import cli


def make(
    root: Path, name: str, *, state: str | None = "finished", n: int = 30, error: str = "",
    held: float | None = None
) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "checkpoints").mkdir()
    if state is not None:
        told = {"state": state, "steps": 40, "error": error, "time": time.time()}
        (folder / "status.json").write_text(json.dumps(told))
    entries = [
        {
            "step": i, "time": 1.0 * i, "train/loss": 1 / i, "train/lr": 1e-3, "speed/step_s": 0.5,
            "speed/tokens_per_s": 1200.0
        }
        for i in range(1, n + 1)
    ]
    entries += [] if held is None else [{"step": n, "time": 1.0, "eval/loss": held}]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(e) + "\n" for e in entries) + '{"step": 31, "tra'
    )
    return folder


@pytest.fixture
def root(tmp_path):
    make(tmp_path, "done", held=0.25)
    make(
        tmp_path, "deep/er/failed", state="failed", error="step 3: 5 steps in a row had no finite gradient",
        n=3
    )
    make(tmp_path, "killed", state="running")
    (make(tmp_path, "running", state="running") / ".lock").touch()
    make(tmp_path, "old", state=None, n=1)
    make(tmp_path, "done/checkpoints/inside")  # not a run of its own
    return tmp_path


def test_runs_are_found_at_any_depth_and_their_state_told(root):
    found = {run.name: run for run in find_runs([str(root)])}
    assert {name: run.state for name, run in found.items()} == {
        "deep/er/failed": "failed", "done": "finished", "killed": "killed", "old": "?", "running": "running"}
    average = sum(1 / i for i in range(11, 31)) / 20
    assert row(found["done"]) == (
        "done", "finished", "30/40", f"{average:.4f}", "0.2500", "0.50", "1,200", "", ""
    )
    assert (
        row(found["deep/er/failed"])[-1] == "step 3: 5 steps in a row had no finite gradient"
        and row(found["old"])[2] == "1/?"
    )
    os.utime(root / "running/.lock", (0, time.time() - 60))
    assert {run.state for run in find_runs([str(root / "running")])} == {"killed"}
    assert [run.name for run in find_runs([str(root / "done")])] == ["done"]
    text = list(lines(list(found.values())))
    assert len(text) == 6 and text[0].split() == " ".join(HEAD).split()
    at = text[0].index("status")
    assert [line[at:].split()[0] for line in text[1:]] == [run.state for run in found.values()]


def test_a_row_that_was_written_again_counts_once(root):
    with (root / "old/metrics.jsonl").open("a") as file:
        file.write('\n{"step": 1, "train/loss": 7.0}\n{"step": 2, "train/loss": null}\nnonsense\n[]\n')
    assert find_runs([str(root / "old")])[0].curves["train/loss"] == [(1, 7.0)]


def test_places_in_pixels():
    """A line from (0, 0) to (10, 4) fills the axes; ticks are round numbers."""
    drawn = charts([Run(Path(), "a", "", curves={"eval/loss": [(0, 0.0), (5, 1.0), (10, 4.0)]})])
    (found,) = drawn
    high, wide = HEIGHT - TOP - BOTTOM, WIDTH - LEFT - RIGHT
    assert found.title == "held-out loss" and found.lines[0].points == (
        (LEFT, TOP + high), (LEFT + wide / 2, TOP + 0.75 * high), (LEFT + wide, TOP))
    assert [t.label for t in found.x] == ["0", "2", "4", "6", "8", "10"] and found.x[-1].at == LEFT + wide
    assert (
        [t.label for t in found.y] == ["0", "1", "2", "3", "4"]
        and [found.y[0].at, found.y[-1].at] == [TOP + high, TOP]
    )


def test_a_wild_start_does_not_press_the_rest_flat_and_long_curves_are_thinned():
    curve = [(i, 1000.0 if i < 5 else 1.0 + i / 1000) for i in range(1000)]
    (found,) = charts([Run(Path(), "a", "", curves={"eval/loss": curve})])
    assert float(found.y[-1].label) < 3 and len(found.lines[0].points) == 250 <= chart.MOST
    assert min(y for _, y in found.lines[0].points) == TOP  # cut off at the edge
    assert chart.smoothed([(1, 4.0), (2, 2.0)]) == [(1, 4.0), (2, (0.95 * 4 + 2) / 1.95)]
    constant = charts([Run(Path(), "a", "", curves={"train/lr": [(1, 1e-4)]})])[0]
    assert float(constant.y[0].label) <= 1e-4 <= float(constant.y[-1].label)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_a_picture_and_a_page(root, capsys):
    (root / "done").rename(root / "a <b>&'c\"")
    assert cli.main(["runs", str(root), "--output", str(root / "out")]) == 0
    said = capsys.readouterr().out
    assert "failed" in said and said.splitlines()[-1].startswith("curves: ")
    text = (root / "out/runs.html").read_text()
    page = Page(text)
    # it needs nothing else
    assert "a <b>&'c\"" in page.text and not re.search(r"(src|href)=|@import|url\(", text)
    drawn = [attrs for tag, attrs in page.tags if tag in ("polyline", "circle")]
    names = ["training loss (average)", "held-out loss", "learning rate", "tokens per second"]
    assert len(drawn) == 5 + 1 + 5 + 5 and [t for t in page.text if t in chart.CHARTS] == names
    assert {attrs["stroke"] for attrs in drawn} == {colour(i) for i in range(5)}
    assert [a["data-run"] for tag, a in page.tags if tag == "tr" and "data-run" in a] == list("01234")
    with Image.open(root / "out/runs.png") as image:
        assert image.size == (2 * WIDTH, 12 + 20 * 5 + 2 * HEIGHT)
        seen = {"#" + bytes(rgb).hex() for _, rgb in image.convert("RGB").getcolors(1 << 20)}
    assert {colour(i) for i in range(5)} <= seen


@pytest.mark.parametrize(
    "missing, says", [("gone", "gone is not a directory"), ("", "no run of `hvtrain train` in there")]
)
def test_where_there_is_no_run(tmp_path, missing, says, capsys):
    assert cli.main(["runs", str(tmp_path / missing)]) == 2
    assert says in capsys.readouterr().err


def test_a_run_tells_how_it_ends(tmp_path):
    """Running, then finished; failed with its error's first line; and a continued run forgets the error."""
    from hvtrain.train import run as train
    from tests.train.shardset import config, make_shards

    good = make_shards(tmp_path / "shards", n=2)
    bad = make_shards(tmp_path / "bad", n=1, poison="clip0")
    assert train.run(config(good, tmp_path / "runs/good", "run.steps=2", "data.calibration=0")) == 0
    with pytest.raises(HvtrainError):
        train.run(config(bad, tmp_path / "runs/nan", "run.max_bad_steps=2", "data.batch_size=1"))
    (tmp_path / "runs/stopped").mkdir()
    found = {run.name: run for run in find_runs([str(tmp_path / "runs")])}
    assert (
        found["good"].state, found["good"].step, found["good"].steps, found["good"].error
    ) == ("finished", 2, 2, "")
    assert (
        found["nan"].state == "failed"
        and found["nan"].error.startswith("step 2: 2 steps in a row had no finite gradient")
    )
    assert found["nan"].steps == 6 and len(found["good"].curves["train/loss"]) == 2
