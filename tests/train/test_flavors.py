"""A flavor's own shift and guidance hold wherever a run meets its model, and what it
cannot do is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors import safe_open

from hvtrain.config import FlowConfig, LoraFileConfig, MergeConfig
from hvtrain.errors import CheckpointError, ConfigError, DataError
from hvtrain.fit.trace import Shape, fake_input
from hvtrain.merge import run as merge
from hvtrain.merge.evaluate import losses_of
from hvtrain.models import find
from hvtrain.models.hunyuan_video import inputs
from hvtrain.models.load import identify, save_dit
from hvtrain.parallel.context import start
from hvtrain.train import run as train
from hvtrain.train import setup
from hvtrain.train.setup import flow_of
from shards.loader import BatchLoader
from tests.models.sight import save_sight
from tests.train.shardset import config, make_shards

SPEC = find("hunyuan-video")
PARTS = ("model.vae=tiny:vae.safetensors", "model.llm=tiny:llm", "model.clip=tiny:clip")
PREVIEW = (
    "preview.every_steps=1", "preview.prompts=[{prompt: a ring, width: 32, height: 32, frames: 5, steps: 1}]"
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "set")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """name -> a file of that flavor at the tiny one's sizes."""
    folder = tmp_path_factory.mktemp("dits")

    def write(name, **changes):
        flavor = SPEC.flavors[name]
        arch = replace(SPEC.flavors["tiny"].arch, token_replace=flavor.arch.token_replace,
                       in_channels=flavor.arch.in_channels, **changes)
        model = SPEC.build(arch)
        SPEC.init_weights(model, torch.Generator().manual_seed(0))
        path = folder / f"{name}-{len(changes)}.safetensors"
        save_dit(model, path, spec=SPEC, flavor=replace(flavor, arch=arch))
        return path

    return write


@pytest.fixture
def told(monkeypatch):
    """(guidance, sigma) of every model input that is made."""
    seen, real = [], inputs.embedded_guidance
    monkeypatch.setattr(
        inputs, "embedded_guidance", lambda scale, sigma: seen.append((scale, sigma)) or real(scale, sigma)
    )
    return seen


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_run_takes_the_flavors_own(shards, small, told, tmp_path, capfd):
    """SkyReels V1 was trained with an embedded guidance of 1: training, held-out loss,
    previews, merge tell it so."""
    dit, run = small("skyreels-v1-t2v"), tmp_path / "run"
    cfg = config(
        shards, run, f"model.dit={dit}", "run.steps=1", f"eval.shards=[{shards}]", "eval.every_steps=1",
        "eval.quantiles=[0.5]", *PARTS, *PREVIEW,
    )
    assert train.run(cfg) == 0
    assert len(told) >= 3 and {scale for scale, _ in told} == {1.0}
    # 7 / 2 / (1 + 6 / 2)
    medians = [s for _, sigma in told for s in sigma.tolist() if s == pytest.approx(0.875)]
    assert medians  # the held-out loss, whose quantile is the median of the noise levels trained
    identity = json.loads((run / "run.json").read_text())
    assert (identity["flow.shift"], identity["flow.guidance"]) == (7.0, 1.0)
    written = yaml.safe_load((run / "config.yaml").read_text())["flow"]
    assert (written["shift"], written["guidance"]) == (7.0, 1.0)
    about = metadata_of(run / "lora.safetensors")
    assert (float(about["ss_discrete_flow_shift"]), float(about["ss_guidance_scale"])) == (7.0, 1.0)
    assert "shift 7, guidance 1" in capfd.readouterr().out
    told.clear()
    wanted = MergeConfig(
        dit=str(dit), lora=(LoraFileConfig(str(run / "lora.safetensors")),),
        output=str(tmp_path / "m.safetensors"), evaluate=(str(shards),),
    )
    merge.run(wanted)
    assert told and {scale for scale, _ in told} == {1.0}
    assert any(s == pytest.approx(0.875) for _, sigma in told for s in sigma.tolist())


def test_the_flavor_that_a_merge_is_told(shards, small, told, tmp_path):
    """Weights of equal shapes do not tell SkyReels from HunyuanVideo: `flavor` does."""
    dit = small("t2v")
    losses_of(identify(dit, flavor="tiny"), merge.Inputs([], None), {}, [str(shards)], start(device="cpu"))
    assert any(s == pytest.approx(0.75) for _, sigma in told for s in sigma.tolist())  # tiny's shift of 3


@pytest.mark.parametrize(
    ("name", "shift", "guidance"),
    [("t2v", 7.0, 6.0), ("i2v", 7.0, 6.0), ("i2v-dynamic", 7.0, 6.0), ("skyreels-v1-t2v", 7.0, 1.0),
     ("skyreels-v1-i2v", 7.0, 1.0), ("tiny", 3.0, 6.0)],
)
def test_values_of_the_flavors(name, shift, guidance):
    found = flow_of(FlowConfig(), SPEC.flavors[name])
    assert (found.shift, found.guidance) == (shift, guidance)
    given = flow_of(FlowConfig(shift=2.0, guidance=4.0), SPEC.flavors[name])
    assert (given.shift, given.guidance) == (2.0, 4.0)


def test_training_may_differ_from_sampling():
    flavor = SPEC.flavors["t2v"]
    other = replace(flavor, defaults=replace(flavor.defaults, training_shift=3.0))
    assert flow_of(FlowConfig(), other).shift == 3.0
    assert flow_of(FlowConfig(shift=2.0), other).shift == 2.0


def test_a_model_without_guidance_embedding(shards, small, told, tmp_path):
    dit, run = small("t2v", guidance_embed=False), tmp_path / "run"
    with pytest.raises(
        ConfigError, match=r"flow.guidance is 6, but this 't2v' embeds no guidance: leave flow.guidance null"
    ):
        train.run(config(shards, run, f"model.dit={dit}", "flow.guidance=6"))
    assert not run.exists()
    assert train.run(config(shards, run, f"model.dit={dit}", "run.steps=1")) == 0
    assert json.loads((run / "run.json").read_text())["flow.guidance"] is None
    assert not told
    # An older version kept a number that nothing used: the run goes on.
    identity = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**identity, "flow.guidance": 6.0}))
    assert train.run(config(shards, run, f"model.dit={dit}", "run.steps=2")) == 0


def test_numbers_that_equal_the_flavors_are_the_same_run(shards, tmp_path, capfd):
    run = tmp_path / "run"
    assert train.run(config(shards, run, "run.steps=1", "flow.shift=3", "flow.guidance=6")) == 0
    capfd.readouterr()
    assert train.run(config(shards, run, "run.steps=2")) == 0
    assert "flow." not in capfd.readouterr().err
    with pytest.raises(ConfigError, match=r"flow.shift is 3.0 there, 7.0 here; choose"):
        train.run(config(shards, run, "run.steps=2", "flow.shift=7"))


@pytest.mark.parametrize(("name", "wanted"), [("t2v", set()), ("i2v", {"image_latents"})])
def test_only_what_the_model_reads_is_loaded(small, tmp_path, monkeypatch, name, wanted):
    """In training, held-out loss and merge; `control` is read by no model."""
    words = "seen_text" if SPEC.flavors[name].sees else "text"
    shards = make_shards(tmp_path / "set", more=("image", "control"), words=words)
    read, real = [], BatchLoader.read
    monkeypatch.setattr(BatchLoader, "read", lambda self, turn: read.append(real(self, turn)) or read[-1])
    dit = small(name)
    held = (
        f"eval.shards=[{shards}]", "eval.every_steps=1", "eval.quantiles=[0.5]", "eval.max_batches=1",
        "data.workers=0"
    )
    assert train.run(config(shards, tmp_path / "run", f"model.dit={dit}", "run.steps=1", *held)) == 0
    losses_of(identify(dit), merge.Inputs([], None), {}, [str(shards)], start(device="cpu"))
    assert len(read) > 3
    assert all(set(batch.tensors) == {"latents", words, f"{words}_len", "pooled"} | wanted for batch in read)


def test_shards_whose_text_has_not_seen_the_image_are_refused(shards, small, tmp_path, monkeypatch):
    """And the other way round."""
    monkeypatch.setattr(setup, "load_dit", lambda *a, **k: pytest.fail("the model was read"))
    with pytest.raises(
        DataError, match="lacks the field 'seen_text'; encode column 'text' with this model's encoders"
    ):
        train.run(config(shards, tmp_path / "run", f"model.dit={small('i2v')}"))
    seen = make_shards(tmp_path / "seen", words="seen_text")
    with pytest.raises(DataError, match="lacks the field 'text'; encode column 'text'"):
        train.run(config(seen, tmp_path / "run", f"model.dit={small('skyreels-v1-i2v')}"))
    with pytest.raises(CheckpointError, match="flavor 'skyreels-v1-i2v' has in_channels 32, the file has 16"):
        train.run(
            config(shards, tmp_path / "run", f"model.dit={small('t2v')}", "model.flavor=skyreels-v1-i2v")
        )


def test_a_fit_is_traced_with_the_flavors_own(told):
    fake_input(SPEC, SPEC.flavors["skyreels-v1-t2v"], Shape(1, 5, 32, 32))
    assert [scale for scale, _ in told] == [1.0]


@pytest.mark.parametrize("name", ["i2v", "skyreels-v1-i2v"])
def test_image_to_video_makes_previews(shards, small, tmp_path, monkeypatch, name):
    """Of a sample's own first frame; a size that no sample has is refused before the model is read."""
    dit, run, parts = small(name), tmp_path / "run", PARTS
    if SPEC.flavors[name].sees:
        shards = make_shards(tmp_path / "set", words="seen_text")
        parts = (*PARTS, f"model.llm_vision={save_sight(tmp_path / 'vision.safetensors')}")
    assert train.run(config(shards, run, f"model.dit={dit}", "run.steps=1", *parts, *PREVIEW)) == 0
    assert (run / "previews" / "step00000001_0.mp4").exists()
    monkeypatch.setattr(setup, "load_dit", lambda *a, **k: pytest.fail("the model was read"))
    with pytest.raises(
        ConfigError, match=r"preview.prompts\[0\]: no sample of this size to begin with; give image=FILE, or"
    ):
        train.run(
            config(
                shards, tmp_path / "other", f"model.dit={dit}", *parts, PREVIEW[0],
                PREVIEW[1].replace("32", "48")
            )
        )
    assert not (tmp_path / "other").exists()
