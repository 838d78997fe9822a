"""The solvers: the official ones' steps, closed forms, orders of convergence, and
stopping between any two steps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hvtrain.flow.schedule import sigmas
from hvtrain.flow.solvers import SOLVERS, State, solve

# steps of the solvers that the models' authors publish, float32
DATA = Path(__file__).parents[1] / "data" / "solvers"
# told sigma itself: mathematics only
EXACT = {name: replace(solver, whole=False) for name, solver in SOLVERS.items()}
pytestmark = pytest.mark.parametrize("name", SOLVERS)


def official(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(str(DATA / f"{name}.safetensors"), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])


def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact velocity of data distributed N(2, 0.5^2): its flow is MEAN(sigma) +
    SPREAD(sigma) z with constant z."""
    s = sigma.double()[:, None]
    spread = ((1 - s) ** 2 / 4 + s**2).sqrt()
    return -2 + (x - 2 * (1 - s)) / spread * (s - (1 - s) / 4) / spread


def flow(z: torch.Tensor, sigma: float) -> torch.Tensor:
    return 2 * (1 - sigma) + math.sqrt((1 - sigma) ** 2 / 4 + sigma**2) * z


def test_every_official_step_is_ours(name):
    """Schedules to float32, timesteps to the unit, x after each step; the velocity is told what
    the official model is told."""
    data, config = official(name)
    solver, scale = SOLVERS[name], config["num_train_timesteps"]
    for case in [*config["cases"], *config["grids_only"]]:
        schedule = solver.schedule(case["steps"], shift=case["shift"])
        told = []

        def velocity(x, sigma, told=told):
            told.append(scale * sigma.item())
            return x @ data["input.A"].T + data["input.b"] * sigma[:, None]

        torch.testing.assert_close(schedule.float(), data[f"output.{case['key']}.sigmas"], rtol=0, atol=1e-6)
        state = State(data["input.x"])
        while state.step < case["steps"]:
            state = solver.step(velocity, state, schedule)
            if case in config["cases"]:
                wanted = data[f"output.{case['key']}.x"][state.step - 1]
                assert (state.x[0] - wanted).norm() <= 2e-6 * wanted.norm(), (case, state.step)
        wanted = data[f"output.{case['key']}.timesteps"]
        assert told == pytest.approx(wanted.tolist(), abs=1e-3 if wanted.is_floating_point() else 1e-4)
        assert told == sorted(told, reverse=True) and solver.whole is not wanted.is_floating_point()


def test_one_data_point_is_met_exactly(name):
    """Its velocity is (x - x0) / sigma; every number of steps ends in x0, also from pure
    noise (lambda = -infinity)."""
    x0, noise = torch.tensor([[3.0, -1.0]]), torch.tensor([[0.5, 2.0]])
    for n in (1, 2, 7):
        end = solve(EXACT[name], lambda x, sigma: (x - x0) / sigma[:, None], noise, sigmas(n, shift=7.0))
        torch.testing.assert_close(end, x0)


def test_the_order_of_convergence(name):
    """Between two inner sigmas half the step makes an error 2, 4 and 8 times smaller:
    UniPC's corrector adds an order."""
    z, order = (
        torch.tensor([[-0.7], [0.3], [1.1]], dtype=torch.float64), {"euler": 1, "dpm++": 2, "unipc": 3}[name]
    )

    def error(n: int) -> float:
        snr = torch.linspace(math.log(0.05 / 0.95), math.log(0.95 / 0.05), n + 1, dtype=torch.float64)
        end = solve(EXACT[name], lambda x, s: gaussian(x, s), flow(z, 0.95), torch.sigmoid(-snr))
        return (end - flow(z, 0.05)).abs().max().item()

    # sigma is told in float32: below 1e-6 nothing can be seen
    coarse, fine = (16, 32) if order == 3 else (64, 128)
    assert math.log2(error(coarse) / error(fine)) == pytest.approx(order, abs=0.3)


def test_a_whole_schedule_ends_in_the_data(name):
    """From noise at the schedule's first sigma to the closed form's end, 50 steps with shift 5."""
    z = torch.tensor([[-0.7], [0.3], [1.1]])
    schedule = EXACT[name].schedule(50, shift=5.0)
    end = solve(EXACT[name], gaussian, flow(z, schedule[0].item()), schedule)
    assert (end - flow(z, 0.0)).abs().max() < {"euler": 0.05, "dpm++": 0.004, "unipc": 0.002}[name]


def test_a_sampling_stopped_between_any_two_steps_goes_on_bit_for_bit(name):
    """Its state as tensors of x's shape, a batch of videos apart from each other, and through bytes."""
    solver, x = SOLVERS[name], torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    schedule = solver.schedule(6, shift=5.0)
    states = [State(x)]
    while states[-1].step < 6:
        states.append(solver.step(gaussian, states[-1], schedule))
    whole = states[-1].x
    assert whole.dtype == torch.float32 and [s.step for s in states] == list(range(7))
    for state in states[:-1]:
        assert all(h.shape == x.shape and h.dtype == torch.float32 for h in state.history)
        for row in range(2):
            one = State(
                state.x[row : row + 1], state.step, tuple(h[row : row + 1].clone() for h in state.history)
            )
            while one.step < 6:
                one = solver.step(gaussian, one, schedule)
            assert torch.equal(one.x[0], whole[row])


def test_half_precision_of_the_velocity_stays_there(name):
    end = solve(
        SOLVERS[name], lambda x, s: x.bfloat16(), torch.ones(1, 4), SOLVERS[name].schedule(4, shift=1.0)
    )
    assert end.dtype == torch.float32
