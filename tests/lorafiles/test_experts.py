"""Which expert a LoRA is for, told by everything but its layers; and where it is given, by every verb."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvtrain.adapters.attach import linear_shapes
from hvtrain.config import LoraFileConfig, SampledLora
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.generate.loras import of_slices, open_loras
from hvtrain.lorafiles import tools
from hvtrain.lorafiles.experts import check_range, number_of, whose
from hvtrain.lorafiles.files import LoraFile, read_lora
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.runs import finished, lora_in
from hvtrain.lorafiles.write import write_lora
from hvtrain.merge.inputs import open_inputs
from hvtrain.models import find
from hvtrain.models.load import save_dit

SPEC = find("wan")
FLAVOR = SPEC.flavors["tiny-a14b"]
HIGH, LOW = FLAVOR.experts
with torch.device("meta"):
    SHAPES = linear_shapes(SPEC.build(FLAVOR.arch))
LAYER = "blocks.1.ffn.0"


def pair(value: float = 1.0) -> LoraPair:
    out, width = SHAPES[LAYER]
    return LoraPair(torch.ones(2, width), torch.full((out, 2), value), 2.0)


def lora(path: Path, value: float = 1.0, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lora(
        path, {LAYER: pair(value)}, metadata={key.replace("__", "."): text for key, text in metadata.items()}
    )
    return path


def opened(*wanted: SampledLora, bases: dict[str, str] | None = None) -> list[tuple[str | None, float]]:
    found = open_loras(wanted, SHAPES, SPEC, FLAVOR, quiet=True, bases=bases)
    return [(one.expert, one.lora.pairs[LAYER].up[0, 0].item()) for one in found]


@pytest.mark.parametrize(
    ("name", "metadata", "says"),
    [
        ("a_low_noise", {"hvtrain__expert": "high"}, ("high", True)),
        ("a", {"hvtrain__base": "beef"}, ("low", True)),
        ("a", {"hvtrain__base": "cafe"}, (None, False)),
        ("a_high", {"ss_min_timestep": "0", "ss_max_timestep": "875"}, ("low", True)),
        ("a", {"ss_min_timestep": "875"}, ("high", True)),
        ("a", {"modelspec__timestep_range": "876,1000"}, ("high", True)),
        ("a", {"modelspec__timestep_range": "0,1000"}, (None, False)),
        ("a", {"modelspec__timestep_range": "400,1000"}, (None, False)),
        ("Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16", {}, ("high", False)),
        ("wan2.2_t2v_low_noise_lora_rank64", {}, ("low", False)),
        ("high_and_low", {}, (None, False)),
        ("highlands", {}, (None, False)),
    ],
)
def test_what_tells(
    tmp_path: Path, name: str, metadata: dict[str, str], says: tuple[str | None, bool]
) -> None:
    path = lora(tmp_path / f"{name}.safetensors", **metadata)
    found = read_lora(path, SHAPES, spec=SPEC)
    assert whose(found, FLAVOR.experts, {"high": "dead", "low": "beef"}) == says


def test_sampling_with_it(tmp_path: Path) -> None:
    """The one it says, also by its tensors' names; a file of both is both; what is given
    against what it says is refused."""
    own = lora(tmp_path / "own.safetensors", hvtrain__expert="low")
    assert opened(SampledLora(str(own))) == [("low", 1.0)] == opened(SampledLora(str(own), expert="low"))
    with pytest.raises(
        ConfigError, match="lora.expert of .*own.safetensors is 'high', but it was trained as 'low'; leave"
    ):
        opened(SampledLora(str(own), expert="high"))
    ranged = lora(tmp_path / "musubi.safetensors", ss_min_timestep="0", ss_max_timestep="500")
    with pytest.raises(ConfigError, match="is 'high', but it was trained as 'low', on sigma 0 to 0.5"):
        opened(SampledLora(str(ranged), expert="high"))
    plain = lora(tmp_path / "plain.safetensors")
    assert (
        opened(SampledLora(str(plain))) == [(None, 1.0)]
        and opened(SampledLora(str(plain), expert="high")) == [("high", 1.0)]
    )
    dit = str(tmp_path / "dit.safetensors")
    save_dit(SPEC.build(FLAVOR.arch), dit, spec=SPEC, flavor=FLAVOR)
    halves = {name: str(tmp_path / f"half-{name}.safetensors") for name in ("high", "low")}
    for name, path in halves.items():
        source = lora(tmp_path / "p.safetensors", {"high": 1.0, "low": 3.0}[name])
        tools.convert(str(source), path, target="diffusers", dit=dit, expert=name)
    with safe_open(halves["low"], "pt") as file:
        assert file.metadata()["hvtrain.expert"] == "low"
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(halves["low"]), bare)  # what diffusers writes: only the prefix tells
    assert opened(SampledLora(str(bare))) == [("low", 3.0)]
    both = tmp_path / "both.safetensors"
    save_file(load_file(halves["high"]) | load_file(halves["low"]), both)
    assert opened(SampledLora(str(both), 0.5)) == [("high", 1.0), ("low", 3.0)]
    assert opened(SampledLora(str(both), expert="low")) == [("low", 3.0)]
    with pytest.raises(ConfigError, match="--expert high: .* was trained as 'low'; leave the option out"):
        tools.convert(str(own), str(tmp_path / "x.safetensors"), target="comfyui", dit=dit, expert="high")


def test_other_noise_levels(tmp_path: Path) -> None:
    """Those of another model's boundary overlap; those of none of an expert's are refused, also
    where it is not told whose."""
    found = LoraFile(Path("a"), {}, {"ss_min_timestep": "900", "ss_max_timestep": "1000"})
    check_range(found, HIGH)
    with pytest.raises(
        ConfigError, match="a: trained on sigma 0.9 to 1, the expert 'low' predicts from 0 to 0.875"
    ):
        check_range(found, LOW)
    check_range(LoraFile(Path("a"), {}, {}), LOW)
    assert number_of(SPEC, "low", key="k") == 1 and number_of(SPEC, None, key="k") is None
    with pytest.raises(ConfigError, match="k: wan has no expert 'lo'; did you mean 'low'"):
        number_of(SPEC, "lo", key="k")


def a_run(folder: Path) -> Path:
    """What a run of both leaves, and its config."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {name: wan, experts: both}\nrun: {name: cat}\n")
    for name, value in (("high", 1.0), ("low", 3.0)):
        lora(folder / f"cat-{name}.safetensors", value, hvtrain__expert=name)
    return folder


def test_a_run_of_both(tmp_path: Path) -> None:
    run = a_run(tmp_path / "01")
    assert (
        lora_in(run, "low") == run / "cat-low.safetensors"
        and finished(run, "high") == run / "cat-high.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"holds a LoRA for each of several experts; say which \(expert\)"
    ):
        lora_in(run)
    chosen = of_slices(tmp_path, (1,), (0.7,), ["high", "low"])
    names = [(Path(one.path).name, one.multiplier) for one in chosen]
    assert names == [("cat-high.safetensors", 0.7), ("cat-low.safetensors", 0.7)]
    assert opened(*chosen) == [("high", 1.0), ("low", 3.0)]


def test_a_merge_is_into_one(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    a, b = (str(run / f"cat-{name}.safetensors") for name in ("high", "low"))

    def merged(*paths: str, expert: str | None = None) -> list[float]:
        entries = [LoraFileConfig(path) for path in paths]
        found = open_inputs(entries, None, SHAPES, SPEC, base=None, expert=expert)
        return [one.pairs[LAYER].up[0, 0].item() for one, _ in found.loras]

    assert merged(str(run), expert="low") == [3.0] and merged(a, a) == [1.0, 1.0]
    with pytest.raises(
        CheckpointError, match="cat-low.*: was trained as the expert 'low', .*cat-high.* as 'high'"
    ):
        merged(a, b)
    with pytest.raises(
        CheckpointError, match="cat-high.*: was trained as the expert 'high', --expert low; a merge"
    ):
        merged(a, expert="low")
    with pytest.raises(ConfigError, match="--expert: wan has no expert 'mid'"):
        merged(a, expert="mid")
