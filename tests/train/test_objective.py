"""One micro-step: which noise, which sigma, which input and which loss. The model is a recorder."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hvtrain.config import FlowConfig
from hvtrain.flow.loss import Measure
from hvtrain.flow.timesteps import quantile_function, stratified
from hvtrain.models import find
from hvtrain.models.dit import ModelInput
from hvtrain.rng import generator
from hvtrain.train.objective import MicroResult, Objective, Where, drop_captions, objective_of
from hvtrain.train.setup import flow_of

SHAPE = (2, 3, 4, 2, 2)  # [B C T H W]
QUANTILE = quantile_function("shift", FlowConfig(shift=5.0))
BASE = Objective(find("hunyuan-video"), "t2v", 6.0, QUANTILE, torch.device("cpu"), False)
HERE = Where(seed=1, step=4, micro=0, n_micro=2, dp_rank=0, dp=2)


class Recorder(nn.Module):
    """A model that says zero and keeps what it was given; the velocity may be given as well."""

    def __init__(self, answer: Tensor | None = None) -> None:
        super().__init__()
        self.answer = answer
        self.seen: list[ModelInput] = []
        self.autocast: list[bool] = []

    def forward(self, inp: ModelInput) -> Tensor:
        self.seen.append(inp)
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        answer = torch.zeros(SHAPE) if self.answer is None else self.answer
        return answer.clone().requires_grad_()


def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(SHAPE, generator=g).bfloat16(),
        "text": torch.randn(2, 5, 7, generator=g).bfloat16(), "text_len": torch.tensor([5, 3]),
        "pooled": torch.randn(2, 4, generator=g).bfloat16(),
    }  # fmt: skip


def noise_at(where: Where, objective: Objective = BASE) -> Tensor:
    """The noise that a place gets: what the model sees of latents that are zero, over sigma."""
    model = Recorder()
    zero = {**batch(), "latents": torch.zeros(SHAPE)}
    result = objective(model, zero, where)
    return model.seen[0].x / result.sigma.view(-1, 1, 1, 1, 1)


def test_noise_is_a_function_of_seed_step_micro_step_and_data_rank():
    """Each of them gives other numbers; the number of ranks and of micro-steps does not;
    and the values by the formula."""
    want = torch.randn(SHAPE, generator=generator(1, step=4, micro=0, dp_rank=0, stream="noise"))
    torch.testing.assert_close(noise_at(HERE), want)
    torch.testing.assert_close(noise_at(replace(HERE, dp=4, n_micro=3)), want)
    for other in ({"seed": 2}, {"step": 5}, {"micro": 1}, {"dp_rank": 1}):
        noise = noise_at(replace(HERE, **other))
        assert (noise - want).abs().mean() > 0.5, other
        place = {"step": 4, "micro": 0, "dp_rank": 0, **{k: v for k, v in other.items() if k != "seed"}}
        expected = torch.randn(SHAPE, generator=generator(other.get("seed", 1), stream="noise", **place))
        torch.testing.assert_close(noise, expected)


def test_the_parts_of_a_step_cover_the_noise_levels_once():
    """Micro-step m of rank r is part m * dp + r of the step's strata."""
    sigmas = []
    for micro in range(2):
        for dp_rank in range(2):
            found = BASE(Recorder(), batch(), replace(HERE, micro=micro, dp_rank=dp_rank)).sigma
            u = stratified(2, seed=1, step=4, part=micro * 2 + dp_rank, n_parts=4)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, QUANTILE(u).float())
            sigmas += found.tolist()
    assert sorted(int(8 * below(s)) for s in sigmas) == list(range(8))


def below(sigma: float) -> float:
    """The share of the noise levels below sigma: the quantile's inverse."""
    t = torch.tensor(sigma, dtype=torch.float64)
    t = t / (5 - 4 * t)
    return torch.special.ndtr(torch.logit(t)).item()


def test_the_model_sees_noised_latents_and_the_loss_compares_velocities():
    sigma = torch.tensor([0.25, 1.0], dtype=torch.float64)
    draw = generator(3)
    noise = torch.randn(SHAPE, generator=generator(3))
    data = batch()
    x0 = data["latents"].float()
    answer = torch.full(SHAPE, 0.5)
    model = Recorder(answer)
    result = BASE.compare(model, data, sigma=sigma, draw=draw)
    (inp,) = model.seen
    s = sigma.float().view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(inp.x, (1 - s) * x0 + s * noise)
    assert (
        inp.x.dtype == torch.float32 and inp.t.tolist() == [250.0, 1000.0] and inp.lengths["text"] == (5, 3)
    )
    assert inp.cond["text"].dtype == torch.float32 and torch.equal(inp.cond["text"], data["text"].float())
    assert (
        torch.equal(inp.cond["pooled"], data["pooled"].float())
        and inp.cond["guidance"].tolist() == [6016.0] * 2
    )
    want = (answer - (noise - x0)).pow(2).flatten(1).mean(1)
    torch.testing.assert_close(result.per_sample, want)
    assert not result.per_sample.requires_grad and result.loss.requires_grad
    assert result.loss.item() == pytest.approx(want.mean().item())
    assert result.sigma.tolist() == [0.25, 1.0] and isinstance(result, MicroResult)


def test_the_clip_s_own_first_frame_is_its_image_unless_it_brings_one():
    objective, data = replace(BASE, task="i2v"), batch()
    model = Recorder()
    objective(model, data, HERE)
    assert torch.equal(model.seen[0].x[:, :, :1], data["latents"][:, :, :1].float())
    objective(model, {**data, "image_latents": torch.full((2, 3, 1, 2, 2), 9.0)}, HERE)
    assert (model.seen[1].x[:, :, 0] == 9).all()
    far = torch.zeros(SHAPE)
    far[:, :, 0] = 1e4  # the given frame is not learnt
    loss = objective(Recorder(far), data, HERE).per_sample
    torch.testing.assert_close(loss, objective(Recorder(), data, HERE).per_sample)


def test_autocast_is_round_the_model_alone():
    for wanted in (False, True):
        model = Recorder()
        replace(BASE, autocast=wanted)(model, batch(), HERE)
        assert model.autocast == [wanted] and not torch.is_autocast_enabled("cpu")


def test_everything_goes_to_the_device_but_text_lengths(monkeypatch):
    """They are read as numbers in every forward: on a GPU that would wait for all its work; of "meta" they
    cannot be read. What is pinned is copied while the GPU computes."""
    asked: dict[str, list] = {}

    class Watched(Tensor):
        def to(self, *args, **options):  # type: ignore[override]
            asked[self.key].append((args, options))
            return self.as_subclass(Tensor).to(*args, **options)

    data = {**batch(), "extra": torch.arange(2)}
    for name in data:
        data[name] = data[name].as_subclass(Watched)
        data[name].key, asked[name] = name, []
    meta, seen = torch.device("meta"), []

    def make_input(x, sigma, cond, *, task, guidance, x0):
        seen.extend([x, sigma, x0, {n: v.as_subclass(Tensor) for n, v in cond.items()}])
        return BASE.spec.make_input(x, sigma, cond, task=task, guidance=guidance, x0=x0)

    monkeypatch.setattr(
        "hvtrain.train.objective.autocast", lambda kind, *, enabled: nullcontext(seen.append((kind, enabled)))
    )
    objective = replace(BASE, device=meta, spec=replace(BASE.spec, make_input=make_input))
    result = objective.compare(
        Recorder(torch.zeros(SHAPE, device=meta)), data, sigma=torch.ones(2), draw=generator(1)
    )
    assert asked.pop("text_len") == [] and set(asked) == {"latents", "text", "pooled", "extra"}
    assert all(calls == [((meta,), {"non_blocking": True})] for calls in asked.values())
    x, sigma, x0, cond, cast = seen
    assert cast == ("meta", False)
    assert (
        x.is_meta and sigma.is_meta and x0.is_meta and x0.dtype == torch.float32 and result.per_sample.is_meta
    )
    found = {n: (v.device.type, v.dtype, tuple(v.shape)) for n, v in cond.items()}
    assert found == {
        "text": ("meta", torch.float32, (2, 5, 7)), "pooled": ("meta", torch.float32, (2, 4)),
        "text_len": ("cpu", torch.int64, (2,)), "extra": ("meta", torch.int64, (2,)),
    }  # fmt: skip


FIELDS = BASE.spec.flavor(None).cond
EMPTY = {"text": torch.full((7, 7), 9.0), "pooled": torch.full((4,), 8.0)}


def test_captions_are_dropped_by_each_sample_s_own_share():
    data = batch()
    same = drop_captions(data, {}, shares=[0.0, 0.0], draw=generator(1), fields=FIELDS)
    assert same.keys() == data.keys() and all(same[k] is data[k] for k in data) and same is not data
    found = drop_captions(data, EMPTY, shares=[0.0, 1.0], draw=generator(1), fields=FIELDS)
    assert found["text_len"].tolist() == [5, 7] and found["text"].shape == (2, 7, 7)
    assert torch.equal(found["text"][0, :5], data["text"][0]) and not found["text"][0, 5:].any()
    assert (found["text"][1] == 9).all() and found["text"].dtype == torch.bfloat16
    assert torch.equal(found["pooled"][0], data["pooled"][0]) and (found["pooled"][1] == 8).all()
    assert found["pooled"].dtype == torch.bfloat16 and data["text_len"].tolist() == [5, 3]
    brief = {k: v[:2] if k == "text" else v for k, v in EMPTY.items()}
    short = drop_captions(data, brief, shares=[1.0, 0.0], draw=generator(1), fields=FIELDS)
    assert short["text"].shape == (2, 5, 7)
    assert (
        short["text_len"].tolist() == [2, 3] and (short["text"][0, :2] == 9).all()
        and not short["text"][0, 2:].any()
    )


def test_a_share_of_zero_never_drops(monkeypatch):
    """The draw is from [0, 1): it may be 0."""
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.tensor([0.0, 0.5]))
    data = batch()
    same = drop_captions(data, {}, shares=[0.0, 0.5], draw=generator(1), fields=FIELDS)
    assert all(same[k] is data[k] for k in data)


def test_how_often_captions_are_dropped():
    many = {
        "text": torch.zeros(4000, 1, 1), "text_len": torch.ones(4000, dtype=torch.long),
        "pooled": torch.zeros(4000, 1)
    }
    blank = {"text": torch.ones(1, 1), "pooled": torch.ones(1)}
    shares = [0.1] * 2000 + [0.6] * 2000
    gone = drop_captions(many, blank, shares=shares, draw=generator(1), fields=FIELDS)["pooled"].flatten()
    assert gone[:2000].mean().item() == pytest.approx(0.1, abs=0.03)
    assert gone[2000:].mean().item() == pytest.approx(0.6, abs=0.05)
    draw = torch.rand(4000, generator=generator(1))
    assert torch.equal(gone.bool(), draw < torch.tensor(shares))


# --- options of the loss ------------------------------------------------------------------------------------


def test_a_mask_column_weighs_the_cells_and_is_no_condition():
    mask = torch.zeros(2, 1, 4, 2, 2)
    mask[:, :, :, :, 0] = 0.5
    data, far = {**batch(), "mask": mask}, torch.zeros(SHAPE)
    far[..., 1] = 1e3
    masked = replace(BASE, masked=True)
    found = masked(Recorder(far), data, HERE)
    torch.testing.assert_close(found.per_sample, masked(Recorder(), data, HERE).per_sample)
    model = Recorder()
    plain = BASE(model, data, HERE)
    assert "mask" not in model.seen[0].cond and "mask" not in model.seen[0].lengths
    error = (noise_at(HERE) - data["latents"].float())[..., 0]
    torch.testing.assert_close(found.per_sample, error.pow(2).flatten(1).mean(1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.per_sample, plain.per_sample)
    # with the frame that is given: neither it nor what is masked is learnt
    both = replace(masked, task="i2v")
    far[:, :, 0] = 1e3
    torch.testing.assert_close(
        both(Recorder(far), data, HERE).per_sample, both(Recorder(), data, HERE).per_sample
    )


def test_a_mask_never_reaches_what_makes_the_input():
    """A model's own condition may have that name."""
    seen = []

    def make_input(x, sigma, cond, **options):
        seen.extend(cond)
        return BASE.spec.make_input(x, sigma, cond, **options)

    data = {**batch(), "mask": torch.ones(2, 1, 4, 2, 2)}
    replace(BASE, spec=replace(BASE.spec, make_input=make_input))(Recorder(), data, HERE)
    assert seen == ["text", "text_len", "pooled"]


def test_the_noise_levels_may_depend_on_the_latents_shape():
    asked = []

    def quantile(u, shape):
        asked.append((tuple(u.shape), tuple(shape)))
        return u

    replace(BASE, quantile=quantile)(Recorder(), batch(), HERE)
    assert asked == [((2,), SHAPE)]


def test_noise_offset_is_one_number_for_a_channel_and_leaves_the_noise_as_it_was():
    draw = generator(1, step=4, micro=0, dp_rank=0, stream="noise")  # after the noise, from the same numbers
    want = torch.randn(SHAPE, generator=draw) + 0.5 * torch.randn(2, 3, 1, 1, 1, generator=draw)
    torch.testing.assert_close(noise_at(HERE, replace(BASE, noise_offset=0.5)), want)
    offset = noise_at(HERE, replace(BASE, noise_offset=0.5)) - noise_at(HERE)
    assert (offset - offset[:, :, :1, :1, :1]).abs().max() < 1e-5
    many = replace(BASE, noise_offset=0.5)
    found = []
    for step in range(400):
        found.append(
            (noise_at(replace(HERE, step=step), many) - noise_at(replace(HERE, step=step)))[:, :, 0, 0, 0]
        )
    values = torch.stack(found)
    assert values.std().item() == pytest.approx(0.5, abs=0.04) and abs(values.mean().item()) < 0.05


def test_a_config_s_objective():
    spec = BASE.spec
    flavor = spec.flavor(None)
    flow = flow_of(
        FlowConfig(loss="huber", huber_c=0.2, weighting="cosmap", guidance=1.0, raw_guidance=True), flavor
    )
    objective = objective_of(flow, spec, flavor, device=torch.device("cpu"), autocast=False)
    model = Recorder()
    found = objective(model, batch(), HERE)
    assert model.seen[0].cond["guidance"].tolist() == [1.0, 1.0]  # musubi's: not times 1000
    error = (noise_at(HERE) - batch()["latents"].float()).abs()
    want = torch.where(error < 0.2, error**2, 0.4 * error - 0.04).flatten(1).mean(1)
    s = found.sigma
    torch.testing.assert_close(
        found.per_sample, want * 2 / (torch.pi * (1 - 2 * s + 2 * s * s)), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(s, quantile_function("shift", FlowConfig(shift=7.0))(
        stratified(2, seed=1, step=4, part=0, n_parts=4)).float())


def test_an_objective_has_every_setting_of_its_config():
    spec = BASE.spec
    flavor = spec.flavor(None)

    def of(**settings) -> Objective:
        return objective_of(
            FlowConfig(shift=7.0, **settings), spec, flavor, device=torch.device("meta"), autocast=True
        )

    found = of(
        loss="pseudo_huber", huber_c=0.2, huber_schedule="snr", weighting="min_snr", snr_gamma=2.0,
        noise_offset=0.25, masked=True, guidance=6.0, raw_guidance=True,
    )
    assert found.measure == Measure("pseudo_huber", 0.2, "snr", "min_snr", 2.0)
    assert (found.noise_offset, found.masked, found.task) == (0.25, True, flavor.tasks[0])
    assert (found.spec, found.device.type, found.autocast) == (spec, "meta", True)
    assert found.guidance == 6.0 / 1000  # what multiplies it by 1000 sees 6
    plain = of(guidance=6.0)
    assert (plain.guidance, plain.noise_offset, plain.masked) == (6.0, 0.0, False)
    assert of().guidance is None and of(raw_guidance=True).guidance is None
    u = torch.tensor([0.5], dtype=torch.float64)
    assert plain.quantile(u).item() == pytest.approx(7 / 8)
    # the flavor says that these are 256 tokens
    by_size = of(timestep_sampling="flux_shift").quantile(u, (1, 16, 1, 32, 32))
    assert by_size.item() == pytest.approx(torch.sigmoid(torch.tensor(0.5)).item())
