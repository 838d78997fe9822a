"""`hvtrain fit`: full-size models without their weights, every row of the official table,
and what a full GPU is told."""

import re
from dataclasses import replace

import pytest
import torch

from hvtrain.config import DataConfig, GenerateConfig, ModelConfig, TrainConfig, load
from hvtrain.config.model import ParallelConfig
from hvtrain.errors import ConfigError, HvtrainError
from hvtrain.fit import run as fit
from hvtrain.fit import trace
from hvtrain.fit.estimate import Training, candidate, degrees, of_sampling, of_training, shape_of
from hvtrain.fit.run import Asked, _batch
from hvtrain.fit.search import USABLE, nearest
from hvtrain.models import all_specs, find
from hvtrain.models.dit import run_plain
from hvtrain.models.load import save_dit
from hvtrain.train import run as train
from launcher import cli
from tests.fit.measure import Setting, make
from tests.train.shardset import config, make_shards

MODEL = ModelConfig(flavor="t2v")


def test_every_size_works_on_every_number_of_gpus():
    """The real sequence-parallel code at the real sizes, rank 0 of each layout: also 5, 6 and 7 GPUs, where
    the official code has none. Work is shared evenly."""
    about = candidate(MODEL)
    for width, height in about.spec.sizes:
        shape = shape_of(about.flavor, width=width, height=height, frames=129)
        alone = of_sampling(MODEL, ParallelConfig(), about, shape, 1)
        for gpus in (5, 6, 7, 8):
            layout = degrees(24, gpus)[0]
            found = of_sampling(MODEL, ParallelConfig(*layout), about, shape, gpus)
            assert found.n_tokens == alone.n_tokens and found.budget.activations < alone.budget.activations
            assert found.flops == pytest.approx(alone.flops / gpus, rel=0.05)


def test_degrees():
    assert degrees(24, 8) == [(8, 1), (4, 2), (2, 4), (1, 8)] and degrees(24, 5) == [(1, 5)]
    assert degrees(16, 6) == [(2, 3), (1, 6)] and degrees(40, 5) == [(5, 1), (1, 5)]


def test_the_table_has_every_row():
    text = fit.size_table(MODEL, sizes=((720, 720),), gpus=(1, 5, 6))
    assert [
        line.split("│")[3].strip() for line in text.splitlines() if line.startswith("│")
    ] == ["1", "5", "6"]
    assert "66,825" in text and "6x1 3x2 2x3 1x6" in text


def test_the_table_has_the_sizes_that_a_flavor_holds():
    """Wan 2.2's 5B counts in 32 pixels, where its relatives count in 16."""
    for name, missing in (("tiny-ti2v", {"1280 x 720", "720 x 1280"}), ("tiny", set())):
        text = fit.size_table(ModelConfig("wan", flavor=name), gpus=(1,))
        shown = {line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")}
        assert {f"{w} x {h}" for w, h in find("wan").sizes} - shown == missing


def test_equal_blocks_are_extrapolated_exactly(monkeypatch):
    """A few blocks of each kind tell the same as all of them."""

    def traced() -> trace.Trace:
        with trace.simulated(world=1, ulysses=1, ring=1) as ctx:
            model, _, inp = make(Setting())
            found = trace.trace_step(model, inp, ctx=ctx, recompute="full", autocast=False)
            assert model.run_block is not run_plain
            return found

    few = traced()
    monkeypatch.setattr(trace, "FEW", 100)
    whole = traced()
    assert few.flops == whole.flops and few.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.01)


def _config(*items: str) -> Training:
    cfg = load(
        TrainConfig, None, ["model.flavor=t2v", "data.shards=x", "run.output_dir=x", "run.steps=1", *items]
    )
    return Training(cfg.model, cfg.adapter, cfg.parallel, cfg.zero, cfg.run)


def test_an_optimizer_counts_with_what_it_keeps_and_a_batch_with_its_tokens():
    about = candidate(ModelConfig("hunyuan-video", "tiny"))
    shape = shape_of(about.flavor, width=64, height=64, frames=5)
    kept = {}
    for name in ("adamw", "lion", "prodigy"):
        cfg = replace(_config("model.flavor=tiny", "zero.engine=torch", "adapter.rank=4"), optimizer=name)
        kept[name] = of_training(cfg, about, shape, 1).budget.optimizer
    assert kept["adamw"] == 2 * kept["lion"] == kept["prodigy"] / 2 > 0
    data = DataConfig(batch_tokens=100)
    assert _batch(data, about, shape).batch == 3  # of 32 tokens each
    assert _batch(replace(data, batch_tokens=1), about, shape).batch == 1
    assert _batch(DataConfig(), about, shape) == shape


def test_the_nearest_fits():
    cfg = _config("run.recompute=none")
    about = candidate(cfg.model)
    shape = shape_of(about.flavor, width=960, height=544, frames=33)
    for gib, key in ((80, "run.recompute=selective"), (24, "model.quantize=fp8_scaled")):
        found = nearest(cfg, about, shape, 1, gib << 30)
        assert key in found.changes and found.estimate.budget.total <= USABLE * (gib << 30)
        changed = _config("run.recompute=none", *found.changes)
        assert of_training(changed, about, shape, 1).budget.total == found.estimate.budget.total
    assert nearest(cfg, about, shape, 1, 4 << 30) is None


@pytest.mark.parametrize("spec", all_specs(), ids=lambda spec: spec.name)
def test_every_flavor_is_predicted(spec):
    """Trained and sampled at a small size: a flavor is what it declares, whatever that is. One
    for each set of conditions."""
    for flavor in {(*(c.name for c in f.cond), f.tasks): f for f in spec.flavors.values()}.values():
        model = ModelConfig(spec.name, flavor.name)
        about, (width, height) = candidate(model), (8 * unit for unit in reversed(flavor.latent.unit))
        shape = shape_of(about.flavor, width=width, height=height, frames=2 * flavor.latent.stride_t + 1)
        n_gpus = degrees(flavor.n_heads, 2)[0][0]
        sampled = of_sampling(model, ParallelConfig(n_gpus), about, shape, n_gpus)
        trained = of_training(replace(_config("zero.engine=torch"), model=model), about, shape, 1)
        assert sampled.n_tokens == trained.n_tokens == 64 * 3 // flavor.latent.patch[0]
        # forward, forward again and backward, and on all of the tokens
        assert trained.flops > 2 * sampled.flops
        assert trained.budget.optimizer > 0 == sampled.budget.optimizer
        assert 0 < sampled.budget.total < trained.budget.total


def test_weights_cut_over_the_ranks_of_a_video():
    """Half of the blocks, and room for two of the largest."""
    about = candidate(ModelConfig("hunyuan-video", flavor="tiny"))
    shape, layout = shape_of(about.flavor, width=64, height=64, frames=9), ParallelConfig(ulysses=2)
    whole, cut = (
        of_sampling(
            ModelConfig("hunyuan-video", flavor="tiny"), layout, about, shape, 2, shard_weights=cut
        ).budget.weights
        for cut in (False, True)
    )
    with torch.device("meta"):
        sizes = [
            sum(2 * p.numel() for p in block.parameters())
            for block in about.spec.build(about.flavor.arch).blocks
        ]
    assert whole - cut == sum(sizes) // 2 - 2 * max(sizes)


def test_of_several_experts_the_largest_counts(tmp_path):
    spec = find("wan")
    flavor, paths = spec.flavors["tiny-a14b"], {}
    for part, depth in (("dit", 1), ("dit_low", 3)):
        paths[part] = str(tmp_path / f"{part}.safetensors")
        save_dit(spec.build(replace(flavor.arch, n_layers=depth)), paths[part], spec=spec, flavor=flavor)
    dit, low = paths["dit"], {"dit_low": paths["dit_low"]}
    assert candidate(ModelConfig("wan", dit=dit)).flavor.arch.n_layers == 1
    assert candidate(ModelConfig("wan", dit=dit, parts=low)).flavor.arch.n_layers == 3
    # it is trained
    assert candidate(ModelConfig("wan", dit=dit, parts=low, experts="high")).flavor.arch.n_layers == 1
    with pytest.raises(ConfigError, match="did you mean 'high'"):
        candidate(ModelConfig("wan", dit=dit, experts="hihg"))


def test_the_command(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("model: {flavor: t2v}\ndata: {shards: [x]}\nrun: {output_dir: x, steps: 1}\n")
    assert cli.main(
        ["fit", str(path), "parallel.ulysses=2", "--size", "544x544x17", "--gpus", "2", "--memory", "40"]
    ) == 0
    out = capsys.readouterr().out
    assert (
        "image tokens and 256 of text" in out and "2: 2x1 1x2" in out and "fits:" in out
        and "optimizer" in out
    )
    assert cli.main(["fit", "--generate", "model.flavor=t2v", "--size", "544x544x17", "--gpus", "1,3"]) == 0
    assert "U3 x R1" in capsys.readouterr().out
    assert load(GenerateConfig, None, []).blocks_to_swap == 0


@pytest.mark.parametrize(
    "args, says",
    [
        (["--gpus", "0"], "--gpus '0': expected numbers"),
        (["--size", "big"], "expected width x height x frames"),
        (["--size", "100x96x5"], "--size: width is 100, expected a multiple of 16"),
        (["--memory", "-1"], "--memory is -1"),
        (["parallel.ulysses=2", "--gpus", "3"], "give --gpus a multiple of 2"),
        (["model.flavor=t3v"], "t3v"),
    ],
)
def test_mistakes(args, says, capsys):
    assert cli.main(["fit", "model.flavor=t2v", *args]) == 2
    assert says in capsys.readouterr().err


def test_a_run_out_of_memory_says_what_would_fit(tmp_path, monkeypatch):
    from hvtrain.train import objective

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr(objective.Objective, "compare", full)
    with pytest.raises(HvtrainError) as caught:
        train.run(config(make_shards(tmp_path / "shards"), tmp_path / "run"))
    said = str(caught.value)
    assert re.search(
        r"out of memory on this machine with clips of 32x32x5; `hvtrain fit` says that \d", said
    ), said
    assert "Tried to allocate 20 GiB" in said


def test_other_errors_are_left_alone(tmp_path, monkeypatch):
    from hvtrain.train import objective

    def broken(*args, **options):
        raise RuntimeError("something else")

    monkeypatch.setattr(objective.Objective, "compare", broken)
    with pytest.raises(RuntimeError, match="something else"):
        train.run(config(make_shards(tmp_path / "shards"), tmp_path / "run"))


def test_asked_defaults():
    assert fit.memory_bytes(Asked(memory_gib=24)) == 24 << 30
