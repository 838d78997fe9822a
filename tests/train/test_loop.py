"""The loop's own rules, without a model: bad steps, stopping, and what the line on the terminal says."""

import math
import os
import signal
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from hvtrain import stopping
from hvtrain.errors import HvtrainError
from hvtrain.parallel.context import ParallelContext
from hvtrain.stopping import StopFlag
from hvtrain.train import loop
from hvtrain.train.checkpoint import Progress
from hvtrain.train.engine import StepResult
from hvtrain.train.loop import Cadence, Hooks, StepReport, train
from hvtrain.train.objective import MicroResult, Where
from hvtrain.train.progress import ProgressLine


def run(good: str, *, max_bad_steps: int = 2, at=lambda step: None) -> tuple[bool, list[int], list[int]]:
    """A step per letter, "+" good and "-" without a finite gradient: (finished, steps made, steps saved)."""
    steps, saved = [], []
    outcomes = iter(good)
    engine = SimpleNamespace(accumulate=lambda loss, last: StepResult(1.0, 1e-3, next(outcomes) == "-"))
    batches = iter([SimpleNamespace(cursor=i + 1, epoch=0, keys=("a",), sets=(0,)) for i in range(len(good))])

    def log(report):
        steps.append(report.progress.step)
        at(report.progress.step)

    one = torch.ones(1)
    hooks = Hooks(
        lambda batch, where: (MicroResult(one.sum(), one, one), 1), lambda: None, log,
        lambda p: saved.append(p.step), lambda p: None, lambda step: None,
    )
    cadence = Cadence(
        steps=len(good), grad_accum=1, save=0, save_samples=0, evaluate=0, preview=0,
        max_bad_steps=max_bad_steps
    )
    finished = train(engine, batches, hooks, cadence=cadence, start=Progress(), seed=0, ctx=ParallelContext())
    return finished, steps, saved


def recorded(
    monkeypatch, cadence: Cadence, *, start: Progress, outcomes: str, ctx: ParallelContext, folder=None,
    log=None
):
    """Everything that the loop says and hands on, in order, on a clock that goes on
    by one whenever it is read."""
    events: list[tuple] = []
    monkeypatch.setattr(loop.time, "monotonic", count().__next__)
    results = iter(outcomes)
    values = count(1)

    def accumulate(loss, last):
        events.append(("backward", loss.item(), last))
        return StepResult(1.0, 1e-3, next(results) == "-") if last else None

    def batches():
        for n in count(1):
            yield SimpleNamespace(
                cursor=start.cursor + 2 * n, epoch=n // 4, keys=(f"a{n}", f"b{n}"), sets=(0, n)
            )

    def micro_step(batch, where):
        events.append(("micro", batch.keys, where))
        v = float(next(values))
        return (
            MicroResult(torch.tensor(v), torch.tensor([v, v + 0.5]), torch.tensor([v / 100, 0.5])),
            10 * int(v)
        )

    def logged(report: StepReport):
        events.append(("log", report))
        if log is not None:
            log(report)

    hooks = Hooks(
        micro_step, lambda: events.append(("updated",)), logged, lambda p: events.append(("save", p)),
        lambda p: events.append(("evaluate", p)), lambda step: events.append(("preview", step)),
        lambda step, phase: events.append(("at", step, phase)),
    )
    engine = SimpleNamespace(accumulate=accumulate)
    finished = train(engine, batches(), hooks, cadence=cadence, start=start, seed=5, ctx=ctx, folder=folder)
    return finished, events


PLAIN = Cadence(steps=6, grad_accum=1, save=0, save_samples=0, evaluate=0, preview=0, max_bad_steps=0)


def test_what_happens_in_a_step_and_what_is_said_of_it(monkeypatch):
    cadence = replace(PLAIN, steps=8, grad_accum=2, save=4, evaluate=2, preview=4)
    ctx = ParallelContext(dp=4, dp_rank=3)
    begun = Progress(6, cursor=40, epoch=0, bad_steps=1)
    finished, events = recorded(monkeypatch, cadence, start=begun, outcomes="-+", ctx=ctx)
    reports = [e[1] for e in events if e[0] == "log"]
    first, second = Progress(7, cursor=44, epoch=0, bad_steps=2), Progress(8, cursor=48, epoch=1, bad_steps=2)
    assert finished and [r.progress for r in reports] == [first, second]
    assert [e if e[0] != "log" else ("log",) for e in events] == [
        ("at", 7, "reading data"), ("at", 7, "in the forward pass"),
        ("micro", ("a1", "b1"), Where(5, 6, 0, 2, 3, 4)), ("at", 7, "in the backward pass"),
        ("backward", 1.0, False), ("at", 7, "reading data"), ("at", 7, "in the forward pass"),
        ("micro", ("a2", "b2"), Where(5, 6, 1, 2, 3, 4)), ("at", 7, "in the backward pass"),
        ("backward", 2.0, True), ("at", 7, "averaging the loss"), ("updated",), ("log",),
        ("at", 8, "reading data"), ("at", 8, "in the forward pass"),
        ("micro", ("a3", "b3"), Where(5, 7, 0, 2, 3, 4)), ("at", 8, "in the backward pass"),
        ("backward", 3.0, False), ("at", 8, "reading data"), ("at", 8, "in the forward pass"),
        ("micro", ("a4", "b4"), Where(5, 7, 1, 2, 3, 4)), ("at", 8, "in the backward pass"),
        ("backward", 4.0, True), ("at", 8, "averaging the loss"), ("updated",), ("log",),
        ("evaluate", second), ("preview", 8), ("save", second),
    ]  # fmt: skip
    r = reports[1]
    assert (r.result, r.loss, r.n_tokens, r.keys) == (
        StepResult(1.0, 1e-3, False), 3.5, 70, ("a3", "b3", "a4", "b4")
    )
    assert (
        r.sample_loss.tolist() == [3.0, 3.5, 4.0, 4.5]
        and r.sigma.tolist() == pytest.approx([0.03, 0.5, 0.04, 0.5])
    )
    assert (r.seconds, r.waited) == (5, 2)  # of six looks at the clock


@pytest.mark.parametrize(
    "changes, saved",
    [
        ({}, [6]), ({"save": 1}, [1, 2, 3, 4, 5, 6]), ({"save": 4}, [4, 6]), ({"save": 3}, [3, 6]),
        ({"save_samples": 1}, [1, 2, 3, 4, 5, 6]), ({"save_samples": 5}, [3, 5, 6]),
        ({"save_samples": 8}, [4, 6]),
    ],
)  # fmt: skip
def test_when_it_is_saved(monkeypatch, changes, saved):
    """Every so many steps, or when so many samples (two a step) have passed; and at the end, once."""
    _, events = (
        recorded(
            monkeypatch, replace(PLAIN, **changes), start=Progress(), outcomes="+" * 6, ctx=ParallelContext()
        )
    )
    assert [e[1].step for e in events if e[0] == "save"] == saved
    assert not [e for e in events if e[0] in ("evaluate", "preview")]


def test_files_in_the_run_s_folder_save_and_stop(monkeypatch, tmp_path):
    def touch(report):
        name = {2: "save", 4: "quit"}.get(report.progress.step)
        if name:
            (tmp_path / name).touch()

    finished, events = recorded(
        monkeypatch, PLAIN, start=Progress(), outcomes="+" * 6, ctx=ParallelContext(), folder=tmp_path,
        log=touch
    )
    assert (
        not finished and [e[1].step for e in events if e[0] == "save"] == [2, 4]
        and not list(tmp_path.iterdir())
    )
    (tmp_path / "save").touch()
    (tmp_path / "quit").touch()
    other = StopFlag(tmp_path, show=False)
    assert not other._taken("quit", ParallelContext(rank=1)) and not other._taken("other", ParallelContext())
    assert other.agreed(ParallelContext()) and not other.agreed(ParallelContext())
    assert other.asked_to_save(ParallelContext()) and not other.asked_to_save(ParallelContext())


def test_a_stop_in_the_last_step_is_the_end(monkeypatch, tmp_path):
    def touch(report):
        if report.progress.step == 6:
            (tmp_path / "quit").touch()

    finished, events = recorded(
        monkeypatch, PLAIN, start=Progress(), outcomes="+" * 6, ctx=ParallelContext(), folder=tmp_path,
        log=touch
    )
    assert finished and [e[1].step for e in events if e[0] == "save"] == [6]


def test_a_run_that_has_no_finite_gradients_names_the_samples(monkeypatch):
    ctx = ParallelContext()
    cadence = replace(PLAIN, max_bad_steps=3)
    wanted = (
        "step 4: 3 steps in a row had no finite gradient (samples of the last: {}); lower optim.lr, or check "
        "these samples; "
    )
    with pytest.raises(HvtrainError) as caught:
        recorded(monkeypatch, cadence, start=Progress(), outcomes="+---++", ctx=ctx)
    assert str(caught.value) == wanted.format(
        "a4 loss 4, b4 loss 4.5"
    ) + "the newest checkpoint is from before"
    # Of all ranks, and only the guilty ones where a loss says which.
    monkeypatch.setattr(
        ParallelContext, "gather_objects", lambda self,
        mine: [mine, {"c": math.inf, "d": 0.25}, {"e": math.nan}]
    )
    with pytest.raises(HvtrainError) as caught:
        recorded(monkeypatch, cadence, start=Progress(), outcomes="+---++", ctx=ctx)
    assert str(caught.value).startswith(wanted.format("c loss inf, e loss nan"))


def test_only_bad_steps_in_a_row_end_a_run():
    assert run("+-+-+-") == (True, [1, 2, 3, 4, 5, 6], [6])
    with pytest.raises(HvtrainError, match="step 3: 2 steps in a row had no finite gradient"):
        run("+--+")
    assert run("----", max_bad_steps=0)[0]


def test_a_signal_from_before_the_loop_is_not_forgotten():
    """Slurm may ask for a stop while the model is still being read."""
    before = {n: signal.getsignal(n) for n in stopping.signals()}
    try:
        stopping.remember()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert run("++++") == (False, [1], [1])
        assert run("++++") == (True, [1, 2, 3, 4], [4])  # asked once
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_terminal_that_closes_asks_to_stop_unless_nohup_says_otherwise():
    """A plain `hvtrain train` over ssh: the connection is lost, what was done shall not be."""
    before = signal.getsignal(signal.SIGHUP)

    def close(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGHUP)

    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert run("++++", at=close) == (False, [1, 2], [2])
        stopping.remember()  # while the model is read
        os.kill(os.getpid(), signal.SIGHUP)
        assert run("++++") == (False, [1], [1])
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stopping.remember()
        assert run("++++", at=close) == (True, [1, 2, 3, 4], [4])
        stopping.obey()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        stopping.obey()


@pytest.fixture
def interruptible():
    """As on a terminal: what is started in a shell's background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_and_stops_and_a_second_one_ends_at_once(capfd, interruptible):
    def once(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    assert run("++++", at=once) == (False, [1, 2], [2])
    assert "saving after this step; Ctrl-C again ends at once" in capfd.readouterr().err

    def twice(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run("++++", at=twice)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_saves_although_it_also_ended_who_was_reading():
    """`hvtrain train ... 2>&1 | tee log`: the terminal's Ctrl-C reaches tee as well, and
    standard error is a broken pipe."""

    def once(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    terminal, (reader, writer) = os.dup(2), os.pipe()
    os.close(reader)
    os.dup2(writer, 2)
    try:
        assert run("++++", at=once) == (False, [1, 2], [2])
    finally:
        os.dup2(terminal, 2)
        for number in (terminal, writer):
            os.close(number)


def test_a_stop_flag_gives_the_handlers_back():
    before = [signal.getsignal(n) for n in (*stopping.signals(), signal.SIGINT)]
    with StopFlag():
        assert all(
            signal.getsignal(n) != b for n,
            b in zip((*stopping.signals(), signal.SIGINT), before, strict=True)
        )
    assert [signal.getsignal(n) for n in (*stopping.signals(), signal.SIGINT)] == before


def test_the_line_shows_the_loss_of_the_step_and_an_average_without_a_bias(capsys):
    """Twelve steps after a bad first one, the average is near what there is, not near the start."""
    line = ProgressLine(12, start=0, show=True)
    losses = [3.0] + [1.0] * 11
    for step, loss in enumerate(losses, start=1):
        line.update(step, loss=loss, lr=1e-3, seconds=0.5)
    weights = [0.95 ** (12 - step) for step in range(1, 13)]
    average = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        last.startswith(f"step 12/12  loss 1.0000 (average {average:.4f})  lr 1.00e-03  0.50 s/step")
        and average < 1.13
    )


def test_a_loss_that_is_not_finite_does_not_spoil_the_average(capsys):
    line = ProgressLine(2, start=0, show=True)
    line.update(1, loss=2.0, lr=1e-3, seconds=1)
    line.update(2, loss=float("nan"), lr=1e-3, seconds=1)
    assert "loss nan (average 2.0000)" in capsys.readouterr().out
