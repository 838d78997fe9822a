"""A flavor of two experts: each predicts at its own noise levels, with its own guidance and
LoRAs, one in memory at a time."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hvtrain import config
from hvtrain.config import GenerateConfig, parts
from hvtrain.config.parts import Part, PartsList
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.generate import run as generate
from hvtrain.generate import sample
from hvtrain.generate.conditions import encode_requests
from hvtrain.generate.plan import last_step, phases
from hvtrain.generate.requests import Request
from hvtrain.generate.sample import sample_latents
from hvtrain.generate.spool import find, hidden, visible
from hvtrain.generate.stop import Stop, Stopped
from hvtrain.generate.video import read_metadata
from hvtrain.models.load import save_dit
from hvtrain.models.spec import Expert, Flavor
from hvtrain.parallel.context import ParallelContext
from tests.generate.models import SIZE, random_cond, random_dit, spec_and_flavor, write_dit
from tests.generate.test_run import write_lora
from tests.parallel.ranks import run_ranks

SPEC, TINY = spec_and_flavor()
TWO = replace(
    TINY, experts=(Expert("low", "dit_low", (0.0, 0.6)), Expert("high", "dit", (0.6, 1.0), cfg_scale=2.0))
)


@pytest.fixture(autouse=True)
def two(monkeypatch: pytest.MonkeyPatch) -> Flavor:
    """The tiny flavor with a second expert. Of 4 steps at shift 3 (levels 1, 0.9,
    0.75, 0.5) the last is its."""
    own = parts.list_of(SPEC.name)
    more = PartsList({**own.parts, "dit_low": Part("the expert for little noise")}, own.renamed)
    monkeypatch.setattr(parts, "_lists", lambda where: {SPEC.name: more})
    monkeypatch.setitem(SPEC.flavors, "tiny", TWO)
    return TWO


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_dit(folder / "high.safetensors", seed=0)
    write_dit(folder / "low.safetensors", seed=1)
    (folder / "prompts.txt").write_text("a red circle moves left\na blue square\n")
    return folder


def make(folder: Path, output: Path, **changes: object) -> list[Path]:
    values = {
        "model.dit": folder / "high.safetensors", "model.dit_low": folder / "low.safetensors",
        "model.vae": "tiny:vae.safetensors", "model.llm": "tiny:llm", "model.clip": "tiny:clip",
        "model.dtype": "float32", "model.vae_dtype": "float32", "precision": "fp32",
        "prompt_file": folder / "prompts.txt", "output": output, "steps": 4, "solver": "unipc",
        "save_latents": True, **SIZE, **changes,
    }
    return generate.run(
        config.load(GenerateConfig, None, [f"{k}={v}" for k, v in values.items() if v is not None])
    )


def latents(files: list[Path]) -> list[torch.Tensor]:
    return [load_file(str(visible(path)))["latents"] for path in files]


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[torch.Tensor]:
    """The two videos' latents with both models at hand, chosen by noise level."""
    models = {"high": random_dit(seed=0), "low": random_dit(seed=1)}
    requests = [
        Request.of(TWO, prompt=text, seed=i, steps=4, solver="unipc", **SIZE)
        for i, text in enumerate((folder / "prompts.txt").read_text().splitlines())
    ]
    cfg = config.load(
        GenerateConfig, None, ["model.llm=tiny:llm", "model.clip=tiny:clip", "model.dtype=float32"]
    )
    conds = encode_requests(requests, SPEC, TWO, cfg.model, ParallelContext())
    return [
        sample_latents(
            lambda sigma: models["high" if sigma >= 0.6 else "low"], SPEC, TWO, conds.of(r), request=r,
            ctx=ParallelContext(), uncond=conds.negative(r),
        )[0]
        for r in requests
    ]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all((a - b).abs().max() < 1e-4 for a, b in zip(found, wanted, strict=True))


def test_who_predicts_which_steps() -> None:
    high, low = TWO.experts[1], TWO.experts[0]
    assert phases(TWO) == [high, low] and phases(TINY) == [None]
    request = Request.of(TWO, prompt="", steps=4)
    assert [last_step(request, e) for e in (high, low, None)] == [3, 4, 4]
    assert last_step(Request.of(TWO, prompt="", steps=4, shift=1.0), high) == 2  # 1, 0.75; then 0.5, 0.25
    # a level on the boundary is the upper one's
    assert last_step(request, replace(high, sigmas=(0.75, 1.0))) == 3
    assert TWO.expert(1.0) == high and TWO.expert(0.6) == high and TWO.expert(0.5999) == low


def test_each_expert_is_asked_at_its_levels_with_its_guidance() -> None:
    asked: list[tuple[str, float]] = []

    def models(sigma: float):
        name = TWO.expert(sigma).name
        return lambda inp: asked.append((name, round(inp.t[0].item()))) or inp.x

    def sample_with(**given: object) -> list[tuple[str, float]]:
        asked.clear()
        request = Request.of(TWO, prompt="", steps=4, **SIZE, **given)
        options = {"request": request, "ctx": ParallelContext(), "uncond": random_cond(2)}
        sample_latents(models, SPEC, TWO, random_cond(3), **options)
        return list(asked)

    twice = [("high", 1000)] * 2 + [("high", 900)] * 2 + [("high", 750)] * 2
    assert sample_with() == [*twice, ("low", 500)]  # guided by 2, and by the flavor's own 1
    assert sample_with(cfg_scale=3.0) == [*twice, ("low", 500), ("low", 500)]  # given: of both
    assert sample_with(cfg_scale=1.0) == [("high", 1000), ("high", 900), ("high", 750), ("low", 500)]
    assert sample_with(cfg_scale=1.0, expert_cfg_scale={"low": 2.0})[-2:] == [("low", 500)] * 2
    with pytest.raises(ConfigError, match=r"expert_cfg_scale: 'tiny' has no expert 'lo'; did you mean 'low'"):
        sample_with(expert_cfg_scale={"lo": 2.0})
    with pytest.raises(
        ConfigError, match=r"has no expert 'low'; it has one model for all noise levels: give cfg_scale"
    ):
        Request.of(TINY, prompt="", expert_cfg_scale={"low": 2.0})


def test_one_expert_at_a_time_and_each_once(folder: Path, whole: list, tmp_path: Path, monkeypatch) -> None:
    opened, alive, real = [], weakref.WeakSet(), sample.open_dit

    def open_dit(plan, expert, ctx):
        opened.append((expert.name, len(alive)))
        model = real(plan, expert, ctx)
        alive.add(model)
        return model

    monkeypatch.setattr(sample, "open_dit", open_dit)
    files = make(folder, tmp_path / "out")
    assert opened == [("high", 0), ("low", 0)]
    assert same(latents(files), whole) and (whole[0] - whole[1]).abs().max() > 0.1
    about = read_metadata(files[0])
    assert about["dit"] == {"dit": "high.safetensors", "dit_low": "low.safetensors"}
    assert about["expert_cfg_scale"] == {"low": 1.0, "high": 2.0}
    swapped = make(folder, tmp_path / "swapped", blocks_to_swap=2)
    assert same(latents(swapped), whole)


def make_on_a_rank(folder: Path, output: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        two.__wrapped__(patch)
        make(folder, output, prompt_file=None, prompt="a red circle moves left", **{"parallel.ulysses": 2})


def test_two_ranks_hand_a_video_from_expert_to_expert(folder: Path, whole: list, tmp_path: Path) -> None:
    run_ranks(2, make_on_a_rank, folder, tmp_path / "shared.mp4")
    assert same(latents([tmp_path / "shared.mp4"]), whole[:1])


@pytest.mark.parametrize("after", [2, 3, 5, 7])
def test_a_stopped_run_goes_on_at_any_step(
    folder: Path, whole: list, after: int, tmp_path: Path, monkeypatch
) -> None:
    """Steps of both videos in their order: 3 and 3 of the one expert, 1 and 1 of the
    other. UniPC's memory goes along."""
    seen = []

    def agreed(self: Stop) -> bool:
        return len(seen) >= after

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "agreed", agreed)
        refuse = sample._refuse_broken
        patch.setattr(sample, "_refuse_broken", lambda lot, n, x: (refuse(lot, n, x), seen.append(n)))
        with pytest.raises(Stopped):
            make(folder, tmp_path / "out")
    assert len(seen) == after
    assert hidden(tmp_path / "out" / "0000.mp4").exists() or (tmp_path / "out" / "0000.mp4").exists()
    assert same(latents(make(folder, tmp_path / "out")), whole)


def test_a_lora_on_one_expert(folder: Path, whole: list, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "lora.safetensors"
    write_lora(path, "double_blocks.0.img_attn_qkv")
    between: dict[str, torch.Tensor] = {}
    keep = sample.keep

    def look(output: Path, state, **about: object) -> None:
        if state.step == 3:
            between[output.name] = state.x
        keep(output, state, **about)

    monkeypatch.setattr(sample, "keep", look)
    states = []
    for expert in (None, "high", "low"):
        which = f", expert: {expert}" if expert else ""
        files = make(folder, tmp_path / "out", lora=f"[{{path: {path}{which}}}]")
        states.append((between["0000.mp4"], latents(files)[0]))
        assert read_metadata(files[0])["lora"][0].get("expert") == expert
    plain = make(folder, tmp_path / "out")
    states.append((between["0000.mp4"], latents(plain)[0]))
    (both3, both), (high3, high), (low3, low), (none3, none) = states
    assert torch.equal(low3, none3) and torch.equal(both3, high3) and (high3 - none3).abs().max() > 0.01
    assert (
        (low - none).abs().max() > 0.01 and (both - high).abs().max() > 0.01
        and (both - low).abs().max() > 0.01
    )
    assert same([none], whole[:1])
    with pytest.raises(ConfigError, match=r"'tiny' has no expert 'hihg'; did you mean 'high'"):
        make(folder, tmp_path / "out", lora=f"[{{path: {path}, expert: hihg}}]")


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model.dit_low is not set; .tiny. samples with it too \(the expert for"
    ):
        make(folder, tmp_path / "out", **{"model.dit_low": None})
    arch = replace(TINY.arch, double=1)
    save_dit(random_dit(arch), tmp_path / "small.safetensors", spec=SPEC, flavor=SPEC.fitted(TINY, arch))
    with pytest.raises(
        CheckpointError, match=r"model.dit_low: .*small.safetensors has other sizes than model.dit"
    ):
        make(folder, tmp_path / "out", **{"model.dit_low": tmp_path / "small.safetensors"})


def test_another_expert_is_another_video(folder: Path, tmp_path: Path) -> None:
    (first, _) = make(folder, tmp_path / "out")
    before = read_metadata(first)["identity"]
    other = write_dit(tmp_path / "other.safetensors", seed=2)
    (again, _) = make(folder, tmp_path / "out", **{"model.dit_low": other})
    assert read_metadata(again)["identity"] != before
    assert find(tmp_path / "out" / "0000.mp4", before) is None
