"""The loop's own rules, without a model: bad steps, stopping, and what the line on the terminal says."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

from hvtrain import signals
from hvtrain.errors import HvtrainError
from hvtrain.parallel.context import ParallelContext
from hvtrain.train.checkpoint import Progress
from hvtrain.train.engine import StepResult
from hvtrain.train.loop import Cadence, Hooks, train
from hvtrain.train.objective import MicroResult
from hvtrain.train.progress import ProgressLine
from hvtrain.train.stop import StopFlag


def run(good: str, *, max_bad_steps: int = 2, at=lambda step: None) -> tuple[bool, list[int], list[int]]:
    """A step per letter, "+" good and "-" without a finite gradient: (finished, steps made, steps saved)."""
    steps, saved = [], []
    outcomes = iter(good)
    engine = SimpleNamespace(accumulate=lambda loss, last: StepResult(1.0, 1e-3, next(outcomes) == "-"))
    batches = iter([SimpleNamespace(cursor=i + 1, epoch=0, keys=("a",)) for i in range(len(good))])

    def log(report):
        steps.append(report.progress.step)
        at(report.progress.step)

    one = torch.ones(1)
    hooks = Hooks(
        lambda batch, where: (MicroResult(one.sum(), one, one), 1), lambda: None, log, lambda p: saved.append(p.step),
        lambda p: None, lambda step: None,
    )
    cadence = Cadence(
        steps=len(good), grad_accum=1, log=1, save=0, save_samples=0, evaluate=0, preview=0, max_bad_steps=max_bad_steps
    )
    finished = train(engine, batches, hooks, cadence=cadence, start=Progress(), seed=0, ctx=ParallelContext())
    return finished, steps, saved


def test_only_bad_steps_in_a_row_end_a_run():
    assert run("+-+-+-") == (True, [1, 2, 3, 4, 5, 6], [6])
    with pytest.raises(HvtrainError, match="step 3: 2 steps in a row had no finite gradient"):
        run("+--+")
    assert run("----", max_bad_steps=0)[0]


def test_a_signal_from_before_the_loop_is_not_forgotten():
    """Slurm may ask for a stop while the model is still being read."""
    before = {n: signal.getsignal(n) for n in signals.SIGNALS}
    try:
        signals.remember()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert run("++++") == (False, [1], [1])
        assert run("++++") == (True, [1, 2, 3, 4], [4])  # asked once
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    """`hvtrain train ... 2>&1 | tee log`: the terminal's Ctrl-C reaches tee as well, and standard error is a broken pipe."""

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
    before = [signal.getsignal(n) for n in (*signals.SIGNALS, signal.SIGINT)]
    with StopFlag():
        assert all(signal.getsignal(n) != b for n, b in zip((*signals.SIGNALS, signal.SIGINT), before, strict=True))
    assert [signal.getsignal(n) for n in (*signals.SIGNALS, signal.SIGINT)] == before


def test_the_line_shows_the_loss_of_the_step_and_an_average_without_a_bias(capsys):
    """Twelve steps after a bad first one, the average is near what there is, not near the start."""
    line = ProgressLine(12, start=0, show=True)
    losses = [3.0] + [1.0] * 11
    for step, loss in enumerate(losses, start=1):
        line.update(step, loss=loss, lr=1e-3, seconds=0.5)
    weights = [0.95 ** (12 - step) for step in range(1, 13)]
    average = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"step 12/12  loss 1.0000 (average {average:.4f})  lr 1.00e-03  0.50 s/step") and average < 1.13


def test_a_loss_that_is_not_finite_does_not_spoil_the_average(capsys):
    line = ProgressLine(2, start=0, show=True)
    line.update(1, loss=2.0, lr=1e-3, seconds=1)
    line.update(2, loss=float("nan"), lr=1e-3, seconds=1)
    assert "loss nan (average 2.0000)" in capsys.readouterr().out
