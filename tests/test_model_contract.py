"""What every model promises, asked of every one that is found. A new architecture is tested by being
there."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from hvtrain.adapters.attach import adapted_layers, inject, linear_shapes, merge_all
from hvtrain.config import ModelConfig
from hvtrain.errors import CheckpointError
from hvtrain.fit.run import size_table
from hvtrain.generate.requests import Request
from hvtrain.generate.sample import sample_latents
from hvtrain.lorafiles.convert import converted
from hvtrain.lorafiles.dialects import DIALECTS, key_map, pieces
from hvtrain.lorafiles.files import read_lora
from hvtrain.lorafiles.write import save_lora
from hvtrain.models import all_specs, find
from hvtrain.models.conditions import drop
from hvtrain.models.dit import DiT, ModelInput
from hvtrain.models.identify import arch_of, flavor_of
from hvtrain.models.load import identify, load_dit, save_dit
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.recompute import pick_policy
from hvtrain.rng import generator
from hvtrain.slices.plan import Cut, make_plan
from hvtrain.slices.run import target_shapes
from hvtrain.train.data import open_shards
from shards.collate import collate
from shards.schema import EMPTY_TEXT, Chunk, Made, Manifest, Stored, save_manifest
from shards.writer import write_tar
from tests.models.any_model import an_input, batch, meta, n_parameters, random_model, smallest
from tests.parallel.any_model import gradients, of_layouts
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_run import Case, relative_errors
from tests.strange import discovered

with discovered():
    ALL = all_specs()
SPECS = [pytest.param(spec, id=spec.name) for spec in ALL]
FLAVORS = [
    pytest.param(spec, flavor, id=f"{spec.name}-{name}") for spec in ALL for name,
    flavor in spec.flavors.items()
]


@pytest.fixture(autouse=True)
def found():
    with discovered():
        yield


def is_small(spec: ModelSpec, flavor: str) -> bool:
    return n_parameters(spec, spec.flavor(flavor)) < 10_000_000


def text_of(flavor: Flavor, cond: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of what a prompt gives, lengths too."""
    names = [f.name for f in flavor.cond if f.column == "text"]
    return [n for name in names for n in (name, f"{name}_len") if n in cond]


def shapes_of(model: DiT) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize(("spec", "flavor"), FLAVORS)
def test_declared_conditions_make_a_velocity(spec, flavor):
    """Also at full size, where only shapes are computed."""
    model, inp = meta(spec, flavor), an_input(spec, flavor, "meta")
    assert model(inp).shape == batch(flavor)[0].shape


@pytest.mark.parametrize(("spec", "flavor"), FLAVORS)
def test_the_loss_mask_leaves_out_what_is_given_and_nothing_else(spec, flavor):
    """A frame that is handed over clean (the same whatever the noise) is not learnt; every other
    is. No mask: none is clean."""
    for task in flavor.tasks:
        x, cond = batch(flavor)
        inputs = [
            spec.make_input(x + shift, torch.tensor([0.3, 0.9]), cond, task=task, guidance=1.0)
            for shift in (0.0, 1.0)
        ]
        c = x.shape[1]
        moved = (inputs[1].x[:, :c] - inputs[0].x[:, :c]).abs().amax((1, 3, 4)) > 0  # [B T]
        mask = inputs[0].loss_mask
        learnt = torch.ones_like(moved) if mask is None else mask[:, 0, :, 0, 0].bool()
        assert mask is None or mask.shape == (2, 1, inputs[0].x.shape[2], 1, 1)
        assert torch.equal(learnt, moved), task
        assert mask is None or mask.unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("spec", "flavor"), FLAVORS)
def test_samples_become_an_input(spec, flavor, tmp_path):
    """From shards, by collating and caption dropout: each sample at its own lengths, a dropped
    one with the empty caption's."""
    x, cond = batch(flavor)
    stored = {f.name: cond[f.name].to(f.dtype) for f in flavor.cond}
    lengths = {name: cond[f"{name}_len"].tolist() for name in stored if f"{name}_len" in cond}
    empty = {
        f.name: stored[f.name][0, :1] if f.ragged else stored[f.name][0]
        for f in flavor.cond if f.column == "text"
    }

    def sample(column: str, i: int) -> dict[str, torch.Tensor]:
        own = (
            {"latents": x[i]}
            if column == "latents" else {f.name: stored[f.name][i] for f in flavor.cond if f.column == column}
        )
        return {
            name: t[: lengths[name][i]].clone() if name in lengths else t.clone() for name, t in own.items()
        }

    tars = {
        c: write_tar(tmp_path, f"{c}/0.tar", [(k, sample(c, i), {}) for i, k in enumerate("ab")])
        for c in flavor.columns
    }
    made = {
        c: Made(
            fields={
                f.name: Stored(f.dims, str(f.dtype).removeprefix("torch."))
                for f in flavor.cond if f.column == c
            }
        )
        for c in flavor.columns
    }
    save_manifest(tmp_path, Manifest(tuple(tars), (Chunk("9x64x96", ("a", "b"), tars),), made))
    save_file({name: t.clone() for name, t in empty.items()}, tmp_path / EMPTY_TEXT)
    (found,) = open_shards([str(tmp_path)], flavor, key="data.shards")
    got = collate([found.get(i, flavor.columns) for i in range(2)], ragged=found.manifest.ragged)
    dropped = drop(got, found.empty_text, torch.tensor([False, True]), flavor.cond)
    for name, value in empty.items():  # what the second sample should have instead
        stored[name][1] = 0
        stored[name][1, : len(value)] = value
        if name in lengths:
            lengths[name][1] = 1

    def inputs(cond) -> ModelInput:
        wide = {n: v if n.endswith("_len") else v.float() for n, v in cond.items() if n != "latents"}
        return spec.make_input(
            2 * x, torch.tensor([0.3, 0.9]), wide, task=flavor.tasks[0], guidance=1.0, x0=x
        )

    theirs = inputs(dropped)
    ours = inputs({**stored, **{f"{name}_len": torch.tensor(n) for name, n in lengths.items()}})
    assert (
        torch.equal(dropped["latents"], x) and torch.equal(theirs.x, ours.x)
        and theirs.lengths == ours.lengths
    )
    assert theirs.cond.keys() == ours.cond.keys() and theirs.cond
    for name, value in ours.cond.items():
        assert torch.equal(theirs.cond[name], value), name


@pytest.mark.parametrize(("spec", "flavor"), FLAVORS)
def test_a_file_tells_its_flavor(spec, flavor):
    shapes = shapes_of(meta(spec, flavor))
    assert spec.signature(shapes)
    stated = arch_of(spec, shapes, {"hvtrain.arch": json.dumps(asdict(flavor.arch))})
    assert flavor_of(spec, stated, None, hint=flavor.name) == flavor
    assert flavor_of(spec, arch_of(spec, shapes, {}), flavor.name) == flavor  # sizes from shapes alone
    others = [other for other in all_specs() if other is not spec]
    assert not any(other.signature(shapes) for other in others)
    sizes = asdict(flavor.arch)
    for name in sizes:
        with pytest.raises(CheckpointError, match=f"metadata 'hvtrain.arch': {name}"):
            arch_of(spec, shapes, {"hvtrain.arch": json.dumps({**sizes, name: {"x": None}})})
    with pytest.raises(CheckpointError, match="metadata 'hvtrain.arch' is not JSON"):
        arch_of(spec, shapes, {"hvtrain.arch": "[" * 100_000})


@pytest.mark.parametrize("spec", SPECS)
def test_forward_and_backward(spec):
    model, flavor = random_model(spec), smallest(spec)
    velocity = model(an_input(spec, flavor))
    velocity.square().mean().backward()
    assert velocity.isfinite().all() and velocity.std() > 0.01
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent
    first = next(model.blocks[0].parameters()).grad
    assert first is not None and first.abs().max() > 0


@pytest.mark.parametrize("spec", SPECS)
def test_recomputed_gradients_are_equal(spec):
    """A block is a function of its tokens: run again in the backward pass, it does the same."""
    model, inp = random_model(spec), an_input(spec, smallest(spec))
    grads = []
    for policy in ("none", "full"):
        model.run_block = pick_policy(policy)
        grads.append(torch.autograd.grad(model(inp).square().mean(), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (
            2,
            [
                Case(ulysses=2, stage=3), Case(ring=2, stage=2, recompute="selective"),
                Case(stage=3, recompute="full")
            ]
        ),
        (4, [Case(ulysses=2, ring=2, stage=2)]),
    ],
    ids=["2 ranks", "4 ranks"],
)
def test_gradients_over_ranks_are_those_of_one_process(world, cases):
    """Of every parameter by itself, over sequence-parallel ranks and ZeRO's;
    nothing divides the token count."""
    small = {spec.name: [flavor for flavor in spec.flavors if is_small(spec, flavor)] for spec in ALL}
    which = sorted(
        {(name, flavor) for name, flavors in small.items() for flavor in (flavors[0], flavors[-1])}
    )
    results = run_ranks(world, of_layouts, which, cases)[0]
    wrong = []
    for name, flavor in which:
        spec = find(name)
        want = gradients(spec, spec.flavor(flavor), Case(engine="torch", stage=0), ParallelContext())
        blind = [n for n, g in want.items() if g.abs().max() < 1e-6]
        assert len(blind) < len(want) / 4 and without_a_say(spec, spec.flavor(flavor), blind), (
            f"a gradient vanishes, the comparison is blind to it: {blind}"
        )
        for case in cases:
            errors = relative_errors(results[f"{name}-{flavor}", case], want)
            wrong += [
                f"{name}-{flavor} {case}: {n} differs by {e:.1e}" for n, e in errors.items() if not e < 1e-4
            ]
    assert not wrong, "\n".join(wrong[:20])


@torch.no_grad()
def without_a_say(spec: ModelSpec, flavor: Flavor, names: Collection[str]) -> bool:
    """Whether a model gives the same velocity whatever the values of these parameters are:
    their gradient has to be zero."""
    model, inp = random_model(spec, flavor), an_input(spec, flavor)
    before = model(inp)
    for name, p in model.named_parameters():
        if name in names:
            p.add_(torch.randn(p.shape, generator=generator(3)))
    return torch.equal(model(inp), before)


@pytest.mark.parametrize("spec", SPECS)
def test_first_weights_are_a_function_of_the_generator(spec):
    arch, states = smallest(spec).arch, []
    for seed in (0, 0, 1):
        model = meta(spec, smallest(spec)).to_empty(device="cpu")
        for p in model.parameters():
            p.data.fill_(float("nan"))  # what init_weights forgets stays visible
        spec.init_weights(model, generator(seed))
        states.append(model.state_dict())
    assert model.arch == arch and all(t.isfinite().all() for t in states[0].values())
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    assert any(not torch.equal(t, states[2][n]) for n, t in states[0].items())


@pytest.mark.parametrize("spec", SPECS)
def test_it_is_sampled(spec):
    """Each small flavor by its own defaults, its image and its experts too: a seed's video,
    and with another seed another."""
    for flavor in (spec.flavor(name) for name in spec.flavors if is_small(spec, name)):
        model, asked = random_model(spec, flavor), []
        unit, latent = flavor.latent.unit, flavor.latent
        size = {"frames": 2 * latent.stride_t + 1, "height": 2 * unit[0], "width": 3 * unit[1]}
        image = "any" if flavor.beyond_text and not flavor.image_optional else None
        request = Request.of(flavor, prompt="", steps=3, seed=4, image=image, **size)
        cond, other = batch(flavor, seed=1)[1], batch(flavor, seed=2)[1]

        def models(sigma: float, model: DiT = model, asked: list = asked) -> DiT:
            asked.append(sigma)
            return model

        def sampled(
            *seeds: int, flavor=flavor, models=models, request=request, cond=cond, other=other
        ) -> torch.Tensor:
            ctx, uncond = ParallelContext(), {**cond, **{f: other[f] for f in text_of(flavor, other)}}
            return sample_latents(
                models, spec, flavor, cond, request=request, ctx=ctx,
                uncond=uncond if request.guided else None, seeds=seeds
            )

        first = sampled(4, 5)
        assert first.shape == (2, *latent.shape(**size)) and first.isfinite().all() and first.std() > 0.05
        assert 0.99 < asked[0] <= 1 and all(a >= b for a, b in pairwise(asked))
        assert torch.equal(first, sampled(4, 5)) and not torch.equal(first[0], sampled(6, 5)[0])


@pytest.mark.parametrize("spec", SPECS)
def test_key_maps_invert(spec):
    state = random_model(spec).state_dict()
    for dialect, keys in spec.key_maps.items():
        cuts = keys.write(state)
        theirs = {name: cut.of(state) for name, cut in cuts.items()}
        assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in state.values()), dialect
        read = keys.read(theirs)
        assert read.keys() == state.keys(), dialect
        shapes = {name: tuple(t.shape) for name, t in theirs.items()}
        for name, source in read.items():
            assert source.shape(shapes) == tuple(state[name].shape), (dialect, name)
            assert torch.equal(source.build(theirs.__getitem__), state[name]), (dialect, name)


@pytest.mark.parametrize("spec", SPECS)
def test_lora_targets_have_a_name_in_every_dialect(spec):
    model = meta(spec, smallest(spec))
    targets, shapes = spec.lora_targets(model), linear_shapes(model)
    assert targets and len(targets) == len(set(targets)) and shapes.keys() >= set(targets)
    for dialect in spec.key_maps:
        key = key_map(spec, dialect)
        shares = {t: rule.share for t in targets if (rule := key.rule_of_official(t))}
        names = [(n, shares.get(t)) for t in targets for n in pieces(key, t, shapes[t][0])]
        assert len(names) == len(set(names)) >= len(targets), dialect


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_lora_injected_or_merged_is_the_same(spec, tmp_path):
    model, inp = random_model(spec), an_input(spec, smallest(spec))
    before = model(inp)
    inject(model, spec.lora_targets(model), rank=2, alpha=1.0, seed=0)
    assert torch.allclose(model(inp), before, atol=1e-6)  # a fresh adapter changes nothing
    for layer in adapted_layers(model):
        layer.lora_up.weight.normal_(generator=generator(2))
    adapted = model(inp)
    tensors = {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n}
    save_lora(tmp_path / "a.safetensors", tensors, rank=2, alpha=1.0, metadata={}, architecture=spec.name)
    merged = random_model(spec)
    merge_all(merged, [(read_lora(tmp_path / "a.safetensors", linear_shapes(merged), spec=spec), 1.0)])
    change = (adapted - before).norm()
    assert change > 0.1 * before.norm() and (merged(inp) - adapted).norm() < 1e-4 * change


@pytest.mark.parametrize("spec", SPECS)
def test_an_adapter_in_every_dialect_is_the_same(spec, tmp_path):
    """Of every program whose layers the model has a key map for."""
    model = random_model(spec)
    inject(model, spec.lora_targets(model), rank=2, alpha=1.0, seed=0)
    for layer in adapted_layers(model):
        layer.lora_up.weight.data.normal_(generator=generator(2))
    tensors = {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n}
    save_lora(tmp_path / "own.safetensors", tensors, rank=2, alpha=1.0, metadata={}, architecture=spec.name)
    shapes = linear_shapes(random_model(spec))
    own = read_lora(tmp_path / "own.safetensors", shapes, spec=spec)
    assert own.pairs.keys() == set(spec.lora_targets(random_model(spec)))
    known = [dialect for dialect in DIALECTS.values() if dialect.keys in spec.key_maps]
    assert len(known) > 1
    for dialect in known:
        converted(own, spec, dialect).save(tmp_path / "other.safetensors")
        other = read_lora(tmp_path / "other.safetensors", shapes, spec=spec)
        assert other.pairs.keys() == own.pairs.keys(), dialect.name
        for name, pair in own.pairs.items():
            theirs = other.pairs[name]
            assert torch.equal(
                pair.up @ pair.down * pair.scale, theirs.up @ theirs.down * theirs.scale
            ), (dialect.name, name)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "cut",
    [
        Cut(n=3, order="contiguous"), Cut(n=3, granularity="module", order="interleaved"),
        Cut(n=5, granularity="rows", order="contiguous"), Cut(blocks_per_loraid=1, granularity="block"),
    ],
    ids=["modules", "interleaved", "rows", "blocks"],
)  # fmt: skip
def test_slices_are_disjoint_and_complete(spec, cut):
    flavor = smallest(spec)
    shapes = target_shapes(meta(spec, flavor), spec)
    plan = make_plan(shapes, cut, model=spec.name, flavor=flavor.name)
    owners = {name: torch.zeros(n_out, dtype=torch.int) for name, (n_out, _) in shapes.items()}
    for one in plan.slices:
        assert one.slots
        for slot in one.slots:
            owners[slot.module][slot.begin : slot.end] += 1
    assert all((rows == 1).all() for rows in owners.values())
    assert sum(one.parameters for one in plan.slices) == sum(a * b for a, b in shapes.values())
    if cut.blocks_per_loraid:
        assert len(plan.slices) == len(meta(spec, flavor).blocks)


@pytest.mark.parametrize("spec", SPECS)
def test_what_it_needs_is_known_without_its_data(spec):
    flavor = smallest(spec)
    width, height = (
        next((w, h) for w, h in spec.sizes if w % flavor.latent.unit[1] == h % flavor.latent.unit[0] == 0)
    )
    table = size_table(ModelConfig(name=spec.name, flavor=flavor.name), sizes=[(width, height)], gpus=(1,))
    shape = flavor.latent.shape(frames=flavor.defaults.frames, height=height, width=width)
    assert f"{width} x {height}" in table and f"{flavor.latent.n_tokens(shape):,}" in table, table


@pytest.mark.parametrize("spec", SPECS)
def test_saved_and_loaded(spec, tmp_path):
    model, flavor = random_model(spec), smallest(spec)
    save_dit(model, tmp_path / "a.safetensors", spec=spec, flavor=flavor)
    loaded = load_dit(tmp_path / "a.safetensors", dtype=torch.float32)
    assert loaded.spec is find(spec.name) and loaded.flavor == flavor
    assert all(torch.equal(t, loaded.model.state_dict()[n]) for n, t in model.state_dict().items())
    save_dit(model, tmp_path / "b.safetensors", spec=spec, flavor=flavor, dtype=torch.bfloat16)
    assert identify(tmp_path / "b.safetensors").weights.dtype(
        next(iter(model.state_dict()))
    ) == torch.bfloat16
    assert load_dit(tmp_path / "b.safetensors").fingerprint != loaded.fingerprint


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_bfloat16_autocast_is_close(spec):
    model, inp = random_model(spec), an_input(spec, smallest(spec))
    exact = model(inp)
    with torch.autocast("cpu", torch.bfloat16):
        fast = model(inp).float()
    assert 0 < (fast - exact).norm() / exact.norm() < 0.1
    assert model(replace(inp, t=inp.t.double())).dtype == torch.float32
