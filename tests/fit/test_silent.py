"""What samples cost on which an adapter shall change nothing: a second forward pass, while the
first one's activations wait."""

from dataclasses import replace

import pytest
import torch

from hvtrain.adapters.attach import inject
from hvtrain.config import DataConfig, FlowConfig, ShardsConfig, TrainConfig, load
from hvtrain.fit.estimate import candidate, of_training, shape_of
from hvtrain.fit.run import Asked, sections, training
from hvtrain.fit.samples import silent_share
from hvtrain.fit.trace import Ledger, fake_input, simulated, trace_step
from hvtrain.models import find
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import start
from hvtrain.train.objective import objective_of
from hvtrain.train.setup import flow_of
from tests.fit.measure import SIZED
from tests.train.shardset import make_shards

SPEC = find("hunyuan-video")
FLAVOR = SPEC.fitted(SPEC.flavor("tiny"), SIZED)
SHAPE = shape_of(FLAVOR, width=320, height=256, frames=17)


def adapted():
    model = SPEC.build(SIZED)
    layers = [
        n for n,
        m in model.named_modules() if type(m) is torch.nn.Linear and "_blocks." in n and "mod" not in n
    ]
    inject(model, layers, rank=8)
    return model.train()


def measured(recompute: str, silent: bool) -> Ledger:
    """A real micro-step of the real objective, every tensor of it followed."""
    model, flow = adapted(), flow_of(FlowConfig(), FLAVOR)
    parallelize(model, start(device="cpu"), recompute=recompute)
    objective = objective_of(flow, SPEC, FLAVOR, device=torch.device("cpu"), autocast=False)
    size = FLAVOR.latent.shape(frames=SHAPE.frames, height=SHAPE.height, width=SHAPE.width)
    text = SIZED.text_dim
    batch = {
        "latents": torch.randn(1, *size), "text": torch.zeros(1, 33, text), "text_len": torch.tensor([33]),
        "pooled": torch.zeros(1, SIZED.pooled_dim), "silent": torch.tensor([silent])
    }
    with Ledger(model) as meter:
        objective.compare(model, batch, sigma=torch.tensor([0.5]), draw=torch.Generator()).loss.backward()
    return meter


def traced(model, **how):
    with simulated(world=1, ulysses=1, ring=1) as ctx:
        inp = fake_input(SPEC, FLAVOR, SHAPE)
        inp = replace(
            inp, cond={**inp.cond, "text": torch.zeros(1, 33, SIZED.text_dim)}, lengths={"text": (33,)}
        )
        return trace_step(model(), inp, ctx=ctx, autocast=False, **how)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_second_pass_is_in_the_prediction(recompute):
    """The worst moment to a tenth of what a step really takes, and the operations
    of a plain forward pass more."""
    usual, silent = (traced(adapted, recompute=recompute, silent=s) for s in (False, True))
    for found, real in (
        (usual, measured(recompute, silent=False)), (silent, measured(recompute, silent=True))
    ):
        assert found.peak_bytes == pytest.approx(real.peak, rel=0.1)
    if recompute == "none":  # all that the backward pass needs is there, and what a block takes comes on top
        assert silent.peak_bytes > 1.01 * usual.peak_bytes
    forward = traced(lambda: SPEC.build(SIZED), training=False)
    assert silent.flops - usual.flops == pytest.approx(forward.flops, rel=1e-3)


def silent_config(*more: str) -> TrainConfig:
    return load(TrainConfig, None, [
        "model.flavor=tiny", "run.output_dir=x", "run.steps=1", "zero.engine=torch", "adapter.rank=4", *more,
    ])


def test_it_counts_by_how_often_it_comes():
    """Each of a batch is silent or not: with two of them every other is rarely so in both."""
    sets = "data.mixture=[{path: a, weight: 3}, {path: b, weight: 1, silent: true}]"
    plain, some, two = (
        sections(silent_config(*m)) for m in ((), (sets,), (sets, "data.batch_size=2"))
    )
    assert (plain.silent, some.silent, two.silent) == (0, 0.25, 0.25)
    about = candidate(plain.model)
    shape = shape_of(about.flavor, width=64, height=64, frames=5)
    flops = {s: of_training(replace(plain, silent=s), about, shape, 1).flops for s in (0.0, 0.25, 1.0)}
    assert flops[0.25] - flops[0.0] == pytest.approx((flops[1.0] - flops[0.0]) / 4, rel=1e-6)
    # forward, forward again, backward: and one more forward
    assert 1.2 * flops[0.0] < flops[1.0] < 1.5 * flops[0.0]
    one = of_training(some, about, shape, 1)
    assert one.budget.total >= of_training(plain, about, shape, 1).budget.total
    said = training(silent_config(sets, "data.batch_size=2"), Asked(width=64, height=64, frames=5))
    assert "with a second forward pass in 44% of the micro-steps (silent samples)" in said
    assert "second forward" not in training(silent_config(), Asked(width=64, height=64, frames=5))


def test_the_share_is_that_of_the_steps_where_it_is_largest(tmp_path):
    def share(*entries):
        return silent_share(DataConfig(mixture=tuple(ShardsConfig(**e) for e in entries)))

    assert share({"path": "a"}) == 0
    # neither is there: nothing is known of their sizes
    assert share({"path": "a"}, {"path": "b", "silent": True}) == 0.5
    make_shards(tmp_path / "a", n=6)
    make_shards(tmp_path / "b", n=2)
    assert share({"path": str(tmp_path / "a")}, {"path": str(tmp_path / "b"), "silent": True}) == 0.25
    early = ({"path": "a", "weight": 4.0}, {"path": "b", "weight": 1.0, "silent": True, "until_step": 5},
             {"path": "c", "weight": 4.0, "silent": True, "from_step": 9})
    assert share(*early) == 0.5
