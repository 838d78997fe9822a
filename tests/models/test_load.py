"""Every container and dialect of the same weights loads equal; a wrong file is
refused in one line that helps."""

import json
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hvtrain.errors import CheckpointError
from hvtrain.models.load import identify, load_dit, save_dit
from tests.adapters.models import ARCH, SPEC, build

FLAVOR = replace(SPEC.flavors["tiny"], arch=ARCH)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def ours(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("dit") / "dit.safetensors"
    save_dit(model, path, spec=SPEC, flavor=FLAVOR)
    return path


def metadata():
    return {"hvtrain.arch": json.dumps(asdict(ARCH))}


def same(path, model, **options):
    loaded = load_dit(path, dtype=torch.float32, **options)
    state = loaded.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    return loaded


def test_own_file_round_trip(ours, model):
    loaded = same(ours, model)
    assert loaded.arch == ARCH and loaded.spec is SPEC and len(loaded.fingerprint) == 64


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model.model.", "module."])
def test_prefixes(prefix, model, tmp_path):
    tensors = {prefix + n: t for n, t in model.state_dict().items()}
    if prefix == "model.diffusion_model.":
        tensors["vae.encoder.conv_in.weight"] = torch.zeros(1)  # an all-in-one file
    save_file(tensors, tmp_path / "x.safetensors", metadata())
    same(tmp_path / "x.safetensors", model)


@pytest.mark.parametrize("dialect", ["comfy", "diffusers"])
def test_dialects(dialect, model, tmp_path):
    state = model.state_dict()
    cuts = SPEC.key_maps[dialect].write(state)
    tensors = {n: c.take(state[c.source]).contiguous().clone() for n, c in cuts.items()}
    assert tensors.keys() != state.keys()
    save_file(tensors, tmp_path / "x.safetensors", metadata())
    same(tmp_path / "x.safetensors", model)


def test_sharded_index(model, tmp_path):
    names = list(model.state_dict())
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({n: model.state_dict()[n] for n in members}, tmp_path / file, metadata())
    index = {"metadata": {}, "weight_map": {n: f for f, members in parts.items() for n in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    same(tmp_path / "model.safetensors.index.json", model)
    same(tmp_path, model)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        load_dit(tmp_path)


def official_sizes():
    """A model whose sizes are all in its shapes: heads of 128."""
    return replace(ARCH, hidden_size=128, heads_num=1, rope_dims=(16, 56, 56), double=1, single=1)


@pytest.mark.parametrize("wrapper", ["module", None])
@pytest.mark.parametrize("guidance", [True, False])
def test_official_pickle(wrapper, guidance, tmp_path):
    arch = replace(official_sizes(), guidance_embed=guidance)
    state = SPEC.build(arch).state_dict()
    torch.save({wrapper: state} if wrapper else state, tmp_path / "mp_rank_00_model_states.pt")
    loaded = load_dit(tmp_path / "mp_rank_00_model_states.pt", dtype=torch.float32)
    assert loaded.arch == arch
    assert all(torch.equal(loaded.model.state_dict()[n], t) for n, t in state.items())


def test_scaled_float8(model, tmp_path):
    state = dict(model.state_dict())
    name = "double_blocks.0.img_mlp.fc1.weight"
    scale = state[name].abs().max() / 448
    tensors = {**state, name: (state[name] / scale).to(torch.float8_e4m3fn), "scaled_fp8": torch.zeros(2)}
    tensors[name.replace(".weight", ".scale_weight")] = scale
    save_file(tensors, tmp_path / "x.safetensors", metadata())
    found = load_dit(tmp_path / "x.safetensors", dtype=torch.float32).model.state_dict()[name]
    assert (found - state[name]).norm() / state[name].norm() < 0.05


def test_official_float8_takes_its_scales_from_the_map(tmp_path):
    """X.pt with float8 weights and X_map.pt with module name -> factor; without the map it would be noise."""
    state = SPEC.build(official_sizes()).state_dict()
    scales, tensors = {}, dict(state)
    for name in ("double_blocks.0.img_attn_qkv.weight", "single_blocks.0.linear1.weight"):
        factor = state[name].abs().amax().reshape(1) / 448
        scales[name.removesuffix(".weight")] = factor
        tensors[name] = (state[name] / factor).to(torch.float8_e4m3fn)
    torch.save({"module": tensors}, tmp_path / "x_fp8.pt")
    with pytest.raises(CheckpointError, match="put x_fp8_map.pt beside it"):
        load_dit(tmp_path / "x_fp8.pt")
    torch.save(scales, tmp_path / "x_fp8_map.pt")
    found = load_dit(tmp_path / "x_fp8.pt", dtype=torch.float32).model.state_dict()
    for name in state:
        close = 0.05 if name.removesuffix(".weight") in scales else 0
        assert (found[name] - state[name]).norm() <= close * state[name].norm()


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("single_blocks.3.", r"8 missing: single_blocks.3.linear1.weight, \S+, \S+, \.\.\."),
        ("double_blocks.0.", "missing: double_blocks.0.img_mod.linear.weight"),
        ("guidance_in.mlp.0.", "2 missing: guidance_in.mlp.0.weight, guidance_in.mlp.0.bias"),
    ],
)
def test_a_released_model_without_metadata_must_be_whole(lost, says, tmp_path):
    """Sizes must not be counted off an incomplete file: it would load as a smaller model."""
    state = SPEC.build(SPEC.flavors["tiny"].arch).state_dict()
    save_file({n: t for n, t in state.items() if not n.startswith(lost)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=says):
        load_dit(tmp_path / "x.safetensors")
    save_file(state, tmp_path / "whole.safetensors")
    assert load_dit(tmp_path / "whole.safetensors").flavor == SPEC.flavors["tiny"]


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/hvtrain_was_here",)


def wrong_files(folder, ours):
    state = load_file(ours)
    missing = dict(state)
    del missing["final_layer.linear.bias"]
    save_file(missing, folder / "missing.safetensors", metadata())
    save_file({**state, "extra.weight": torch.zeros(2)}, folder / "extra.safetensors", metadata())
    bent = {**state, "double_blocks.0.img_mlp.fc1.bias": torch.zeros(3)}
    save_file(bent, folder / "bent.safetensors", metadata())
    (folder / "cut.safetensors").write_bytes(ours.read_bytes()[:-1000])
    (folder / "evil.pt").write_bytes(pickle.dumps({"module": Evil()}))
    torch.save({"module": {**state, "x": Evil()}}, folder / "zipped_evil.pt")
    torch.save({"module": state}, folder / "cut.pt")
    (folder / "cut.pt").write_bytes((folder / "cut.pt").read_bytes()[:-5000])
    save_file(state, folder / "dit-00001-of-00003.safetensors", metadata())
    save_file(state, folder / "notes.safetensors", {"hvtrain.arch": "{oops"})
    save_file(state, folder / "stranger.safetensors", {**metadata(), "hvtrain.model": "other"})
    integers = {
        **state, "double_blocks.0.img_mlp.fc1.bias": state["double_blocks.0.img_mlp.fc1.bias"].to(torch.int8)
    }
    save_file(integers, folder / "integers.safetensors", metadata())
    damaged = ours.read_bytes().replace(b'"data_offsets"', b'"data_offsetz"', 1)
    (folder / "damaged.safetensors").write_bytes(damaged)
    save_file({n: t for n, t in state.items() if "single" not in n}, folder / "half.safetensors")
    (folder / "text.safetensors").write_text("hello")
    other = {"blocks.0.self_attn.q.weight": torch.zeros(2, 2), "patch_embedding.weight": torch.zeros(2)}
    save_file(other, folder / "wan.safetensors")
    save_file(
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(2, 2)},
        folder / "lora.safetensors"
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing.safetensors", "1 missing: final_layer.linear.bias"),
        ("extra.safetensors", "1 unexpected: extra.weight"),
        ("bent.safetensors", "fc1.bias is 3, expected 192"),
        ("cut.safetensors", "cut"),
        ("evil.pt", "refused, a bare pickle may run code"),
        ("zipped_evil.pt", "wants to run or build '(posix|nt).system'"),
        ("cut.pt", "cut short"),
        ("dit-00001-of-00003.safetensors", "one of 3 shards"),
        ("notes.safetensors", "not JSON"),
        ("stranger.safetensors", "says that it is 'other'"),
        ("integers.safetensors", "fc1.bias' is int8"),
        ("damaged.safetensors", "damaged"),
        ("half.safetensors", r"missing keys 'single_blocks\.\*'"),
        ("text.safetensors", "text.safetensors"),
        ("wan.safetensors", "looks like Wan"),
        ("lora.safetensors", "looks like a LoRA"),
        ("absent.safetensors", "no such file"),
    ],
)
def test_wrong_files_are_refused(name, says, ours, tmp_path):
    wrong_files(tmp_path, ours)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_dit(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    from pathlib import Path

    assert not Path("/tmp/hvtrain_was_here").exists()


def test_flavor_must_fit(ours):
    with pytest.raises(CheckpointError, match="flavor 't2v' has"):
        identify(ours, flavor="t2v")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("container", ["official .pt", "diffusers float32"])
def test_peak_memory_is_one_copy(container, tmp_path):
    """About 200 MB of bf16 after loading: far less than two copies beyond what the imports take."""
    arch = replace(official_sizes(), hidden_size=1024, heads_num=8, double=3, single=3)
    state = SPEC.build(arch).to(torch.bfloat16).state_dict()
    size = sum(t.numel() * 2 for t in state.values())
    if container == "official .pt":
        path = tmp_path / "x.pt"
        torch.save({"module": state}, path)
    else:  # every page read is twice the size of what is kept, and qkv is put together of three
        path = tmp_path / "x.safetensors"
        cuts = SPEC.key_maps["diffusers"].write(state)
        save_file({n: c.take(state[c.source]).float().contiguous() for n, c in cuts.items()}, path)
    del state
    # Not getrusage: its peak also counts the parent's memory at the time of the fork.
    code = (
        "import re, torch\n"
        "from hvtrain.models.load import load_dit\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "before = peak()\n"
        f"load_dit({str(path)!r}, dtype=torch.bfloat16)\n"
        "print(peak() - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    path.unlink()
    assert size > 150e6 and 0.9 * size < int(out) < 1.5 * size, f"{int(out) / size:.2f} copies"


@pytest.mark.parametrize(
    ("path", "flavor"),
    [
        ("ckpts/hunyuan-video-i2v-720p/transformers/mp_rank_00_model_states.pt", "i2v"),
        ("hunyuan_video_v2_replace_image_to_video_720p_bf16.safetensors", "i2v"),
        ("hunyuan_video_t2v_720p_bf16.safetensors", "t2v"),
        ("skyreels_hunyuan_i2v_bf16.safetensors", "skyreels-v1-i2v"),
        ("SkyReels-V1-Hunyuan-T2V/diffusion_pytorch_model.safetensors", "skyreels-v1-t2v"),
        ("my_model.safetensors", None),
    ],
)
def test_a_path_speaks_of_a_flavor(path, flavor):
    assert SPEC.told_by(Path(path)) == flavor
