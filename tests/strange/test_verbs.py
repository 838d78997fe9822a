"""The strange architecture through every verb, from clips to video: what no file but
those of its own folder knows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hvtrain.generate.conditions import read_image
from hvtrain.generate.spool import visible
from hvtrain.generate.video import read_metadata
from hvtrain.models import find
from shards import open_set
from tests.strange import discovered
from tests.strange.files import NAME, hvtrain, on_two_ranks, write_data, write_parts

SIZE = ("frames=9", "width=96", "height=32", "steps=4", "precision=fp32", "save_latents=true")
FAST = (
    "run.precision=fp32", "run.recompute=none", "zero.engine=torch", "adapter.rank=2", "adapter.alpha=2",
    "optim.lr=1e-2"
)


@pytest.fixture(scope="module", autouse=True)
def found() -> Iterator[None]:
    with discovered():
        yield


class World:
    """Files that one verb leaves to the next; each is made once, when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.parts = write_parts(root / "parts")
        self.data = write_data(root / "clips", n=6, seed=3)
        self.model = self.parts / "model.yaml"

    def dit(self, name: str) -> Path:
        return self.parts / f"{name}.safetensors"

    def shards(self, name: str = "shards", *, ranks: int = 1, columns: str = "latents,vision,text") -> Path:
        output = self.root / name
        if not (output / "manifest.json").exists():
            launch = () if ranks == 1 else ("launch", "--nproc", ranks)
            keys = (
                f"dataset={self.data}", f"output={output}", f"columns=[{columns}]", "samples_per_tar=2",
                "batch_size=2"
            )
            assert hvtrain(*launch, "encode", self.model, *keys) == 0
        return output

    def train(self, name: str, *keys: str, flavor: str = "plain", ranks: int = 1) -> Path:
        """A run of four steps, its directory; continued if there are more steps than it has."""
        dit = () if any(key.startswith("model.dit") for key in keys) else (f"model.dit={self.dit(flavor)}",)
        common = (
            f"data.shards=[{self.shards()}]", "data.batch_size=2", "run.steps=4",
            f"run.output_dir={self.root / name}", f"model.flavor={flavor}", "run.seed=5", *FAST,
        )
        command = ("train", self.model, *dit, *common, *keys)
        assert (on_two_ranks(*command) if ranks == 2 else [hvtrain(*command)]) == [0] * ranks
        return self.root / name

    def slices(self) -> Path:
        """A plan of two, and both of them trained."""
        root = self.root / "slices"
        if not (root / "plan.json").exists():
            assert hvtrain("slices", "plan", "--dit", self.dit("plain"), "--n", 2, "--output", root) == 0
            for i in (1, 2):
                self.train(
                    f"slices/0{i}", "adapter.type=loraid", f"adapter.plan={root / 'plan.json'}",
                    f"adapter.loraid={i}"
                )
        return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("strange"))


def losses(run: Path, key: str = "train/loss") -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = [p for p in run.glob("*.safetensors") if "-best" not in p.name]
    return load_file(path)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    return a.keys() == b.keys() and all((a[n] - b[n]).abs().max() <= tolerance for n in a)


def test_data_check(world: World, capsys: pytest.CaptureFixture) -> None:
    assert hvtrain("data", "check", world.data, "--model", NAME) == 0
    said = capsys.readouterr().out
    assert "9x64x64" in said and "6" in said and "16" not in re.findall(r"multiple of (\d+)", said)


def test_encoding(world: World, capsys: pytest.CaptureFixture) -> None:
    """Its columns and fields, ragged ones at their own length, some of length 0;
    two ranks write what one does."""
    both = [
        open_set(world.shards("all", ranks=2, columns="latents,image,vision,text")), open_set(world.shards())
    ]
    ours, fewer = ({s.key: s.tensors for s in map(found.get, range(len(found)))} for found in both)
    assert len(ours) == 6 and ours.keys() == fewer.keys()
    for key, tensors in ours.items():
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        assert (
            shapes["latents"] == (48, 3, 4, 4) and shapes["still"] == (48, 1, 4, 4)
            and shapes["sight"] == (4, 20)
        )
        assert shapes["words"][1] == 24 and 2 <= shapes["words"][0] <= 12 and shapes["letters"][1] == 16
        assert all(torch.equal(value, tensors[name]) for name, value in fewer[key].items())
        gap = (tensors["still"].float() - tensors["latents"][:, :1].float()).abs().max()
        assert gap < 0.2  # the same frame; the posterior's draws differ
    assert sorted({len(t["letters"]) for t in ours.values()}) == [0, 8]
    assert (
        hvtrain("shards", "verify", world.root / "all") == 0
        and hvtrain("shards", "info", world.root / "all") == 0
    )
    said = capsys.readouterr().out
    assert all(column in said for column in ("latents", "image", "vision", "text"))


def test_training_a_lora(world: World, capsys: pytest.CaptureFixture) -> None:
    """With caption dropout, held-out loss and previews; stopped half-way, it ends with the same weights."""
    prompt = '{prompt: a red circle says "hello", frames: 9, width: 96, height: 32, steps: 2}'
    more = (
        "data.caption_dropout=0.5", f"eval.shards=[{world.shards()}]", "eval.every_steps=2",
        "eval.max_batches=1", "preview.every_steps=4", f"preview.prompts=[{prompt}]"
    )  # fmt: skip
    run = world.train("lora", *more)
    assert (
        len(losses(run)) == 4 and all(0 < x < 50 for x in losses(run)) and len(losses(run, "eval/loss")) == 2
    )
    videos = list(run.rglob("*.mp4"))
    assert len(videos) == 1
    world.train("halves", *more, "run.steps=2")
    assert same(weights(world.train("halves", *more)), weights(run))
    moved = weights(run)
    assert any(".lora_up" in name and value.any() for name, value in moved.items())


def test_training_over_ranks(world: World) -> None:
    """Sequence-parallel ranks train what one trains; ZeRO-3 the whole model of an image flavor."""
    alone = world.train("alone", "run.seed=9")
    two = world.train(
        "two", "run.seed=9", "parallel.ulysses=2", "zero.engine=deepspeed", "zero.stage=2", ranks=2
    )
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)
    ring = world.train(
        "ring", "run.seed=9", "parallel.ring=2", "zero.engine=deepspeed", "zero.stage=3", ranks=2
    )
    assert losses(ring) == pytest.approx(losses(alone), rel=1e-4)


def test_training_all_weights(world: World) -> None:
    """Of a flavor that goes on from an image, which is the clip's own where the shards
    have none; previews take one."""
    common = ("adapter.type=none", "optim.lr=1e-3")
    prompt = "{prompt: a blue square, frames: 9, width: 64, height: 64, steps: 2}"
    preview = ("preview.every_steps=4", f"preview.prompts=[{prompt}]")
    alone = world.train("full", *common, *preview, flavor="further")
    assert len(list(alone.rglob("*.mp4"))) == 1
    stage3 = ("zero.engine=deepspeed", "zero.stage=3", "parallel.ulysses=2", "run.recompute=full")
    two = world.train("full3", *common, *stage3, flavor="further", ranks=2)
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)


def test_training_each_expert(world: World) -> None:
    """Each at its own noise levels, from its own file."""
    parts = (f"model.dit={world.dit('pair-high')}", f"model.dit_low={world.dit('pair-low')}")
    runs = [
        world.train(f"pair-{name}", *parts, f"model.expert={name}", flavor="pair") for name in ("high", "low")
    ]
    assert losses(runs[0]) != losses(runs[1])


def test_training_both_experts(world: World) -> None:
    """In turns, on two ranks that share each sample as on one; held-out loss and videos are of
    both, if one is trained too."""
    parts = (f"model.dit={world.dit('pair-high')}", f"model.dit_low={world.dit('pair-low')}")
    prompt = "{prompt: a blue square, frames: 9, width: 64, height: 64, steps: 3}"
    more = (
        f"eval.shards=[{world.shards()}]", "eval.every_steps=4", "eval.max_batches=1",
        "preview.every_steps=4", f"preview.prompts=[{prompt}]"
    )  # fmt: skip
    both = world.train("pair-both", *parts, *more, "model.experts=both", flavor="pair")
    assert {p.name for p in both.glob("*.safetensors")} == {"lora-high.safetensors", "lora-low.safetensors"}
    assert len(losses(both)) == 4 and len(list(both.rglob("*.mp4"))) == 1
    two = world.train(
        "pair-two", *parts, "model.experts=both", "parallel.ulysses=2", "zero.engine=deepspeed",
        flavor="pair", ranks=2
    )
    assert losses(two) == pytest.approx(losses(both), rel=1e-4)
    one = world.train("pair-seen", *parts, *more, "model.experts=high", flavor="pair")
    assert len(list(one.rglob("*.mp4"))) == 1 and losses(one, "eval/loss") != losses(both, "eval/loss")


def test_sampling(world: World) -> None:
    """With true guidance; two ranks sample what one does."""
    keys = (f"model.dit={world.dit('plain')}", "prompt=a ring", *SIZE, "negative_prompt=dull", "cfg_scale=3")
    one, two = world.root / "one.mp4", world.root / "two.mp4"
    assert hvtrain("generate", world.model, *keys, f"output={one}") == 0
    assert on_two_ranks("generate", world.model, *keys, "parallel.ulysses=2", f"output={two}") == [0, 0]
    a, b = (load_file(visible(path))["latents"] for path in (one, two))
    assert a.shape == (48, 3, 2, 6) and (a - b).abs().max() < 1e-3 and a.std() > 0.1
    other = world.root / "other.mp4"
    assert hvtrain("generate", world.model, *keys, "cfg_scale=1", f"output={other}") == 0
    assert (load_file(visible(other))["latents"] - a).abs().max() > 0.01


def test_sampling_by_two_experts_from_an_image(world: World) -> None:
    """The image is the first frame of what comes out; each expert has its LoRA."""
    image = next((world.root / "clips").glob("*.mp4"))
    parts = (f"model.dit={world.dit('pair-high')}", f"model.dit_low={world.dit('pair-low')}")
    loras = []
    for name in ("high", "low"):
        run = world.root / f"pair-{name}"
        if not run.exists():
            world.train(run.name, *parts, f"model.expert={name}", flavor="pair")
        (path,) = run.glob("*.safetensors")
        loras.append(f"{{path: {path}, expert: {name}}}")
    keys = ("model.flavor=pair", *parts, f"image={image}", "prompt=a ring", *SIZE)
    latents = []
    for name, more in (("base", ()), ("tuned", (f"lora=[{', '.join(loras)}]",))):
        output = world.root / f"{name}.mp4"
        assert hvtrain("generate", world.model, *keys, *more, f"output={output}") == 0
        assert read_metadata(output)["image"] == image.name
        latents.append(load_file(visible(output))["latents"])
    spec = find(NAME)
    picture = read_image(str(image), width=96, height=32)
    vae = spec.open_vae(world.parts / "vae.safetensors", dtype=torch.float32)
    assert all((x[:, :1] - vae.encode(picture[None, :, None])[0]).abs().max() < 1e-5 for x in latents)
    assert (latents[0] - latents[1])[:, 1:].abs().max() > 1e-4


def test_slices_and_their_merge(world: World, capsys: pytest.CaptureFixture) -> None:
    """Disjoint; the merged model is the base with both, and its held-out loss is told."""
    slices = world.slices()
    owned = [
        {n.rpartition(".lora_")[0] for n in weights(slices / name) if ".lora_" in n} for name in ("01", "02")
    ]
    assert owned[0] and owned[1] and not owned[0] & owned[1]
    merged = world.root / "merged.safetensors"
    command = ("merge", "--dit", world.dit("plain"), "--plan", slices / "plan.json", "--output", merged)
    assert hvtrain(*command, "--evaluate", world.shards()) == 0
    assert "held-out loss" in capsys.readouterr().out.lower()
    base, whole = load_file(world.dit("plain")), load_file(merged)
    changed = {name for name in base if not torch.equal(base[name], whole[name])}
    assert {
        f"lora_unet_{n.removesuffix('.weight').replace('.', '_')}" for n in changed
    } == owned[0] | owned[1]
    with safe_open(merged, "pt") as file:
        assert file.metadata()["hvtrain.model"] == NAME


def test_fit(world: World, capsys: pytest.CaptureFixture) -> None:
    """Without weights: nothing but the record is needed."""
    keys = (
        "model.name=strange", "model.dit=null", "model.flavor=further", "data.shards=[x]", "run.output_dir=y",
        "run.steps=1"
    )
    assert hvtrain("fit", *keys, "--gpus", "1,2") == 0
    said = capsys.readouterr().out
    assert f"{NAME} further, 96 x 32 x 9 frames: 9 image tokens and 12 + 20 of text" in said
    assert hvtrain(
        "fit", "model.name=strange", "model.dit=null", "model.flavor=plain", "--generate", "--table"
    ) == 0
    assert "96 x 32" in capsys.readouterr().out


def test_converting_a_lora(world: World) -> None:
    """To another dialect and back: the same tensors."""
    run = world.root / "lora"
    if not run.exists():
        world.train("lora")
    (path,) = run.glob("*.safetensors")
    there, back = world.root / "diffusers.safetensors", world.root / "back.safetensors"
    assert hvtrain("lora", "info", path, "--dit", world.dit("plain")) == 0
    assert hvtrain(
        "lora", "convert", path, "--to", "diffusers", "--output", there, "--dit", world.dit("plain")
    ) == 0
    assert any("attn1.to_q" in name for name in load_file(there))
    assert hvtrain(
        "lora", "convert", there, "--to", "musubi", "--output", back, "--dit", world.dit("plain")
    ) == 0
    assert same(load_file(path), load_file(back), 1e-6)
