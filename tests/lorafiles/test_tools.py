"""hvtrain lora: info, convert, resize, extract, ema, average, on the model that ships."""

import itertools
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvtrain.adapters.attach import linear_shapes, merge_all
from hvtrain.config import asset
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles import average, tools
from hvtrain.lorafiles.dialects import DIALECTS
from hvtrain.lorafiles.files import read_lora
from hvtrain.lorafiles.lowrank import factor, shrink, singular_values
from hvtrain.lorafiles.metadata import EXPERT_KEY, lora_metadata
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.write import write_lora
from hvtrain.models import find
from hvtrain.models.load import load_dit, save_dit
from launcher import cli

TINY = "tiny:dit.safetensors"
LAYERS = ("double_blocks.0.img_attn_qkv", "double_blocks.1.txt_mlp.fc1", "single_blocks.0.linear1")


@pytest.fixture(scope="module")
def shapes():
    return linear_shapes(load_dit(asset(TINY), dtype=torch.float32).model)


def make(path, shapes, *, layers=LAYERS, rank=4, alpha=2.0, seed=0, **metadata):
    g = torch.Generator().manual_seed(seed)
    pairs = {
        n: LoraPair(
            torch.randn(rank, shapes[n][1], generator=g), torch.randn(shapes[n][0], rank, generator=g), alpha
        )
        for n in layers
    }
    full = lora_metadata(path, metadata, architecture="hunyuan-video", rank=rank, alpha=alpha)
    write_lora(path, pairs, metadata=full)
    return path


def same(a, b):
    x, y = load_file(a), load_file(b)
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


def test_info_says_what_a_file_is(tmp_path, shapes, capsys):
    path = make(tmp_path / "a.safetensors", shapes, ss_loraid="3", ss_steps=7)
    assert cli.main(["lora", "info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "LoRA for hunyuan-video (sizes of tiny), dialect musubi" in out
    assert "3 layers, rank 4, alpha 2" in out and "double_blocks 0-1, single_blocks 0" in out
    assert "LORAID 3" in out and "ss_steps: 7" in out
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    assert cli.main(["lora", "info", str(tmp_path / "b.safetensors")]) == 2


@pytest.mark.parametrize(("a", "b"), list(itertools.permutations(DIALECTS, 2)))
def test_there_and_back_is_identical_for_every_pair_of_dialects(tmp_path, shapes, a, b):
    make(tmp_path / "0.safetensors", shapes, ss_loraid="2")
    here, there, again = (str(tmp_path / f"{n}.safetensors") for n in ("a", "b", "a2"))
    tools.convert(str(tmp_path / "0.safetensors"), here, target=a)
    tools.convert(here, there, target=b)
    tools.convert(there, again, target=a)
    assert same(here, again)
    with safe_open(there, "pt") as file:
        assert file.metadata()["ss_loraid"] == "2"
    deltas = [read_lora(p, shapes, spec=tools.open_any(p).spec).pairs for p in (here, there)]
    assert all(torch.equal(deltas[0][n].delta(), deltas[1][n].delta()) for n in LAYERS)


def test_each_expert_s_lora_goes_under_its_own_prefix(tmp_path, capsys):
    """Wan 2.2's two, as diffusers' pipeline keeps them; a file of both is read one at a time."""
    spec = find("wan")
    with torch.device("meta"):
        model = spec.build(spec.flavors["tiny-a14b"].arch)
    layer = spec.lora_targets(model)[0]
    pairs = {
        layer: LoraPair(
            torch.ones(2, linear_shapes(model)[layer][1]), torch.ones(linear_shapes(model)[layer][0], 2), 2.0
        )
    }
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in ("own", "high", "low", "both", "back")}
    write_lora(
        paths["own"], pairs, metadata=lora_metadata(tmp_path, {}, architecture="wan", rank=2, alpha=2.0)
    )
    for expert in ("high", "low"):
        arguments = [paths["own"], "--to", "diffusers", "--expert", expert, "--output", paths[expert]]
        assert cli.main(["lora", "convert", *arguments]) == 0
    high, low = load_file(paths["high"]), load_file(paths["low"])
    assert {name.partition(".")[0] for name in high} == {"transformer"}
    assert {name.partition(".")[0] for name in low} == {"transformer_2"}
    write_lora(
        paths["own"], pairs,
        metadata=lora_metadata(tmp_path, {EXPERT_KEY: "low"}, architecture="wan", rank=2, alpha=2.0)
    )
    assert cli.main(["lora", "convert", paths["own"], "--to", "diffusers", "--output", paths["back"]]) == 0
    assert load_file(paths["back"]).keys() == low.keys()  # the file itself says whose it is
    assert cli.main(["lora", "info", paths["own"]]) == 0 and "of the expert low" in capsys.readouterr().out
    save_file(high | {name: 3 * tensor for name, tensor in low.items()}, paths["both"])
    assert cli.main(["lora", "info", paths["both"]]) == 2
    assert (
        "holds LoRAs of 2 experts (transformer., transformer_2.); say which one is meant"
        in capsys.readouterr().err
    )
    assert cli.main(["lora", "info", paths["both"], "--expert", "lo"]) == 2
    assert "--expert lo: no model has such an expert; did you mean 'low'?" in capsys.readouterr().err
    assert cli.main(
        ["lora", "convert", paths["both"], "--expert", "low", "--to", "musubi", "--output", paths["back"]]
    ) == 0
    found = read_lora(paths["back"], linear_shapes(model), spec=spec).pairs[layer]
    assert torch.equal(found.delta(), 9 * pairs[layer].delta())


def test_mistakes_of_convert(tmp_path, shapes, capsys):
    path = make(tmp_path / "a.safetensors", shapes)
    assert cli.main(
        ["lora", "convert", str(path), "--to", "comfy", "--output", str(tmp_path / "b.safetensors")]
    ) == 2
    assert "did you mean 'comfyui'" in capsys.readouterr().err
    assert cli.main(["lora", "convert", str(path), "--to", "comfyui", "--output", str(path)]) == 2
    assert "is the input" in capsys.readouterr().err
    assert cli.main(
        ["lora", "convert", str(path), "--to", "diffusion-pipe", "--keep-alpha", "--output", "x.safetensors"]
    ) == 2
    assert "has no alpha" in capsys.readouterr().err


def test_the_best_low_rank_factors(shapes):
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 40, generator=g)
    u, s, vh = torch.linalg.svd(matrix)
    cut = factor(matrix, rank=5)
    assert torch.allclose(cut.pair.delta(), (u[:, :5] * s[:5]) @ vh[:5], atol=1e-4)
    assert cut.error == pytest.approx(
        (s[5:].square().sum().sqrt() / s.square().sum().sqrt()).item(), rel=1e-4
    )
    # Large ones are randomised: a matrix of that rank is found exactly.
    low = torch.randn(1500, 6, generator=g) @ torch.randn(6, 1100, generator=g)
    assert (
        torch.allclose(factor(low, rank=6).pair.delta(), low, atol=1e-2) and factor(low, rank=6).error < 1e-3
    )
    pair = LoraPair(torch.randn(6, 40, generator=g), torch.randn(60, 6, generator=g), 3.0)
    assert torch.allclose(singular_values(pair), torch.linalg.svdvals(pair.delta())[:6], atol=1e-3)
    both = shrink([(pair, 1.0), (pair, -0.5)], rank=6)
    assert torch.allclose(both.pair.delta(), 0.5 * pair.delta(), atol=1e-4) and both.error < 1e-3


def test_resize_to_a_rank_or_an_energy(tmp_path, shapes, capsys):
    path = make(tmp_path / "a.safetensors", shapes)
    out = tmp_path / "b.safetensors"
    assert cli.main(["lora", "resize", str(path), "--rank", "4", "--output", str(out)]) == 0
    before, after = (read_lora(p, shapes).pairs for p in (path, out))
    assert all(torch.allclose(before[n].delta(), after[n].delta(), atol=1e-4) for n in LAYERS)
    assert cli.main(["lora", "resize", str(path), "--rank", "2", "--output", str(out)]) == 0
    lost = float(
        re.search(r"lost: ([\d.]+) %", capsys.readouterr().out.rpartition("alpha = rank")[2])[1]
    ) / 100
    after = read_lora(out, shapes).pairs
    missing = sum((before[n].delta() - after[n].delta()).square().sum() for n in LAYERS)
    assert lost == pytest.approx(
        (missing / sum(before[n].delta().square().sum() for n in LAYERS)).sqrt().item(), rel=0.01
    )
    assert cli.main(["lora", "resize", str(path), "--energy", "0.6", "--output", str(out)]) == 0
    assert all(p.rank < 4 for p in read_lora(out, shapes).pairs.values())
    assert cli.main(["lora", "resize", str(path), "--output", str(out)]) == 2


def test_extract_finds_the_lora_that_was_merged(tmp_path, shapes, capsys):
    lora = read_lora(make(tmp_path / "a.safetensors", shapes, rank=3), shapes)
    base = load_dit(asset(TINY), dtype=torch.float32)
    merge_all(base.model, [(lora, 0.1)])
    with torch.no_grad():
        base.model.get_parameter("img_in.proj.weight").add_(1.0)
    save_dit(base.model, tmp_path / "tuned.safetensors", spec=base.spec, flavor=base.flavor)
    original = load_dit(asset(TINY), dtype=torch.float32)
    save_dit(original.model, tmp_path / "base.safetensors", spec=base.spec, flavor=base.flavor)
    arguments = [str(tmp_path / n) for n in ("tuned.safetensors", "base.safetensors")]
    out = tmp_path / "x.safetensors"
    assert cli.main(["lora", "extract", *arguments, "--rank", "3", "--output", str(out)]) == 0
    found = read_lora(out, shapes).pairs
    assert set(found) == set(LAYERS)
    with safe_open(out, "pt") as file:
        assert file.metadata()["modelspec.resolution"] == "64x64"  # what the tiny flavor is sampled at
    for name in LAYERS:
        assert torch.allclose(found[name].delta(), 0.1 * lora.pairs[name].delta(), atol=1e-4)
    assert "1 changed tensors are not layers that a LoRA adapts" in capsys.readouterr().out
    assert cli.main(["lora", "extract", arguments[0], arguments[0], "--output", str(out)]) == 2
    assert "equal weights" in capsys.readouterr().err


# --- averages -----------------------------------------------------------------------------------------------


def test_profiles_weigh_the_first_file_too():
    assert average.weights_of(average.constant(0.5), 3) == [0.25, 0.25, 0.5]
    assert average.weights_of(average.linear(0.5, 0.0), 3) == [0.0, 0.0, 1.0]
    for sigma in (0.05, 0.15, 0.25):
        shares = np.array(average.weights_of(average.power(sigma), 400))
        assert shares.sum() == pytest.approx(1.0) and (np.diff(shares) > 0).all() and shares[0] > 0
        # sigma_rel is the width of the profile, relative to the run's length (Karras et al., equation 3).
        t = np.arange(1, 401) / 400
        mean = (shares * t).sum()
        assert np.sqrt((shares * (t - mean) ** 2).sum()) == pytest.approx(sigma, rel=0.05)
    with pytest.raises(ConfigError, match="sigma-rel 0.5"):
        average.power(0.5)


def test_ema_over_the_checkpoints_of_a_run(tmp_path, shapes, capsys):
    for i, name in enumerate(("a-step00000010", "a-step00000020", "a-step00000100", "a")):
        make(tmp_path / f"{name}.safetensors", shapes, seed=i, ss_loraid="4")
    make(tmp_path / "b-step00000010.safetensors", shapes)
    out = tmp_path / "out" / "ema.safetensors"
    out.parent.mkdir()
    assert cli.main(
        ["lora", "ema", str(tmp_path / "a-step00000010.safetensors"), "--beta", "0.5", "--output", str(out)]
    ) == 0
    order = re.findall(r"/(a[-\w]*)\.safetensors", capsys.readouterr().out)
    assert order == ["a-step00000010", "a-step00000020", "a-step00000100", "a"]
    files = [load_file(tmp_path / f"{n}.safetensors") for n in order]
    made = load_file(out)
    for name, tensor in made.items():
        if not name.endswith("alpha"):
            expected = sum(w * f[name] for w, f in zip((0.125, 0.125, 0.25, 0.5), files))
            assert torch.allclose(tensor, expected, atol=1e-6)
    with safe_open(out, "pt") as file:
        assert file.metadata()["ss_loraid"] == "4"


def test_ema_finds_epoch_folders(tmp_path, shapes):
    for epoch in (2, 10, 1):
        (tmp_path / f"epoch_{epoch}").mkdir()
        make(tmp_path / f"epoch_{epoch}" / "adapter.safetensors", shapes, seed=epoch)
    assert [p.parent.name for p in average.checkpoints([str(tmp_path)])] == ["epoch_1", "epoch_2", "epoch_10"]
    with pytest.raises(ConfigError, match="1 LoRA file"):
        average.checkpoints([str(tmp_path / "epoch_1")])


def test_average_and_democratic_sharing_of_two_slices(tmp_path, shapes):
    one = make(tmp_path / "1.safetensors", shapes, layers=LAYERS[:2], ss_loraid="1")
    two = make(tmp_path / "2.safetensors", shapes, layers=LAYERS[1:], seed=1, ss_loraid="2")
    out = tmp_path / "12.safetensors"
    with pytest.raises(CheckpointError, match="hvtrain merge"):
        average.average([one, two], [0.5, 0.5], out)
    assert cli.main(["lora", "average", str(one), str(two), "--democratic", "--output", str(out)]) == 0
    a, b, made = (read_lora(p, shapes) for p in (one, two, out))
    assert torch.equal(made.pairs[LAYERS[0]].up, a.pairs[LAYERS[0]].up)
    assert torch.equal(made.pairs[LAYERS[2]].up, b.pairs[LAYERS[2]].up)
    assert torch.allclose(made.pairs[LAYERS[1]].up, (a.pairs[LAYERS[1]].up + b.pairs[LAYERS[1]].up) / 2)
    assert made.metadata["ss_loraid"] == "1,2"
    other = make(tmp_path / "3.safetensors", shapes, alpha=4.0)
    with pytest.raises(CheckpointError, match="alpha"):
        average.average([make(tmp_path / "4.safetensors", shapes), other], [0.5, 0.5], out)
