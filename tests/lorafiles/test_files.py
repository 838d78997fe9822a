import hashlib
import io
import json
import re
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from hvtrain.adapters.attach import linear_shapes, merge_all
from hvtrain.errors import CheckpointError
from hvtrain.lorafiles.convert import converted
from hvtrain.lorafiles.dialects import DIALECTS
from hvtrain.lorafiles.files import LoraFile, read_lora
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.write import save_lora, write_lora
from tests.adapters.models import SPEC, adapted, an_input, build, lora_tensors

SHAPES = linear_shapes(build())


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "circle.safetensors"
    metadata = {"ss_learning_rate": 1e-4, "ss_datasets": [{"n": 3}], "ss_training_comment": None}
    save_lora(path, lora_tensors(adapted()), rank=4, alpha=2.0, metadata=metadata, architecture=SPEC.name)
    return path


def same(a: LoraFile, b: LoraFile) -> bool:
    if a.pairs.keys() != b.pairs.keys():
        return False
    both = [(x, b.pairs[name]) for name, x in a.pairs.items()]
    return all(
        torch.equal(x.down, y.down) and torch.equal(x.up, y.up) and x.alpha == y.alpha for x, y in both
    )


def test_names_and_metadata_of_a_saved_file(saved):
    with safe_open(saved, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        assert file.get_tensor("lora_unet_single_blocks_1_linear2.alpha").shape == ()
        assert file.get_tensor(
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
        ).dtype == torch.float32
    assert len(names) == 3 * (2 * 8 + 2 * 2)
    assert "lora_unet_double_blocks_0_img_mlp_fc1.lora_up.weight" in names
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")
    assert metadata["ss_learning_rate"] == "0.0001" and json.loads(metadata["ss_datasets"]) == [{"n": 3}]
    assert "ss_training_comment" not in metadata
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.architecture"] == "hunyuan-video/lora"
    assert metadata["modelspec.title"] == metadata["ss_output_name"] == "circle"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", metadata["modelspec.date"])


@pytest.mark.parametrize("n", [4, 600_000])  # the legacy hash looks at the file's second MiB
def test_hashes_are_those_of_sd_scripts(tmp_path, n):
    pairs = {"single_blocks.0.linear2": LoraPair(torch.randn(2, n), torch.randn(3, 2), 1.0)}
    path = tmp_path / "x.safetensors"
    write_lora(path, pairs, metadata={"ss_seed": "1", "modelspec.title": "not hashed"})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    # The definition, on the library's own serialisation of the tensors and the ss_ entries.
    plain = safetensors.torch.save(safetensors.torch.load_file(path), {"ss_seed": "1"})
    header = 8 + int.from_bytes(plain[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(plain[header:]).hexdigest()
    window = io.BytesIO(plain)
    window.seek(0x100000)
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(window.read(0x10000)).hexdigest()[:8]
    content = path.read_bytes()  # and the file itself hashes to what it says
    header = 8 + int.from_bytes(content[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(content[header:]).hexdigest()


def test_a_saved_file_applied_equals_the_trained_model(saved):
    merged = build()
    lora = read_lora(saved, SHAPES, spec=SPEC)
    merge_all(merged, [(lora, 1.0)])
    assert lora.summary() == "circle.safetensors: 20 layers, rank 4, alpha/rank 0.5"
    with torch.no_grad():
        expected, got, base = adapted()(an_input()), merged(an_input()), build()(an_input())
    assert (got - expected).norm() / expected.norm() < 1e-5
    assert (base - expected).norm() / expected.norm() > 0.1


def rewritten(source, target, rename, *, drop_alpha=False):
    tensors = safetensors.torch.load_file(source)
    kept = {rename(name): t for name, t in tensors.items() if not (drop_alpha and name.endswith(".alpha"))}
    safetensors.torch.save_file(kept, target)
    return target


OFFICIAL = {name.replace(".", "_"): name for name in SHAPES}
COMFY = {
    "img_mlp_fc1": "img_mlp_0", "img_mlp_fc2": "img_mlp_2", "txt_mlp_fc1": "txt_mlp_0",
    "txt_mlp_fc2": "txt_mlp_2"
}


def dotted(prefix):
    def rename(key):
        stem, _, rest = key.removeprefix("lora_unet_").partition(".")
        rest = rest.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        return f"{prefix}{OFFICIAL[stem]}.{rest}"

    return rename


def comfy_names(key):
    for ours, theirs in COMFY.items():
        key = key.replace(ours, theirs)
    return key


@pytest.mark.parametrize(
    "rename",
    [
        dotted("diffusion_model."),
        dotted("transformer."),
        dotted("base_model.model."),
        dotted(""),
        comfy_names,
        lambda key: key.replace("lora_unet_", "Some_trainers_prefix_"),
    ],
    ids=["diffusion_model", "transformer", "peft", "bare", "comfy", "unknown prefix"],
)
def test_other_spellings_are_read(saved, tmp_path, rename):
    other = rewritten(saved, tmp_path / "other.safetensors", rename)
    assert same(read_lora(other, SHAPES, spec=SPEC), read_lora(saved, SHAPES, spec=SPEC))


def test_without_alpha_the_scale_is_one(saved, tmp_path):
    other = rewritten(saved, tmp_path / "o.safetensors", dotted("diffusion_model."), drop_alpha=True)
    assert {pair.scale for pair in read_lora(other, SHAPES).pairs.values()} == {1.0}


@pytest.mark.parametrize("alpha", [2.0, 4.0, 1.7])
@pytest.mark.parametrize("dialect", ["comfyui", "diffusers", "diffusers, alpha kept"])
def test_round_trips_are_exact(tmp_path, dialect, alpha):
    path = tmp_path / "a.safetensors"
    save_lora(
        path, lora_tensors(adapted()), rank=4, alpha=alpha, metadata={"ss_loraid": "3"},
        architecture=SPEC.name
    )
    lora = read_lora(path, SHAPES, spec=SPEC)
    name, _, kept = dialect.partition(", ")
    made = converted(lora, SPEC, DIALECTS[name], fold=False if kept else None)
    made.save(tmp_path / "b.safetensors")
    back = read_lora(tmp_path / "b.safetensors", SHAPES, spec=SPEC)
    assert back.metadata["ss_loraid"] == "3"
    # a folded scale that is no power of two: to the last bit or so
    if dialect == "diffusers" and alpha == 1.7:
        torch.testing.assert_close(
            back.pairs["single_blocks.0.linear1"].up, lora.pairs["single_blocks.0.linear1"].up
        )
    else:
        assert same(back, lora)
    if dialect != "comfyui":
        assert "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight" in made.tensors
        assert len(made.tensors) == 2 * (2 * (3 + 3 + 6) + 2 * (4 + 1))


def test_a_diffusers_lora_with_q_and_v_only(tmp_path):
    """Trained elsewhere: q and v have a down-projection each, k has none."""
    draw, base = torch.Generator().manual_seed(0), "transformer.single_transformer_blocks.1.attn.to_"
    tensors = {}
    for part in "qv":
        tensors[f"{base}{part}.lora_A.weight"] = torch.randn(4, 48, generator=draw)
        tensors[f"{base}{part}.lora_B.weight"] = torch.randn(48, 4, generator=draw)
    path = tmp_path / "qv.safetensors"
    safetensors.torch.save_file(tensors, path)
    lora = read_lora(path, SHAPES, spec=SPEC)
    delta = lora.pairs["single_blocks.1.linear1"].delta()
    q, k, v, mlp = delta.split([48, 48, 48, 4 * 48])
    torch.testing.assert_close(q, tensors[f"{base}q.lora_B.weight"] @ tensors[f"{base}q.lora_A.weight"])
    torch.testing.assert_close(v, tensors[f"{base}v.lora_B.weight"] @ tensors[f"{base}v.lora_A.weight"])
    assert not k.any() and not mlp.any()
    write_lora(tmp_path / "ours.safetensors", lora.pairs, metadata=lora.metadata)
    again = converted(
        read_lora(tmp_path / "ours.safetensors", SHAPES, spec=SPEC), SPEC, DIALECTS["diffusers"]
    )
    assert again.tensors.keys() == tensors.keys()
    assert all(torch.equal(again.tensors[name], tensors[name]) for name in tensors)


def test_the_last_layers_halves_are_swapped(tmp_path):
    """diffusers stores (scale, shift) where the official file has (shift, scale)."""
    name = "final_layer.adaLN_modulation.1"
    pair = LoraPair(torch.randn(2, 48), torch.randn(96, 2), 2.0)
    lora = LoraFile(tmp_path / "x", {name: pair})
    made = converted(lora, SPEC, DIALECTS["diffusers"])
    up = made.tensors["transformer.norm_out.linear.lora_B.weight"]
    assert torch.equal(up, torch.cat([pair.up[48:], pair.up[:48]]))
    made.save(tmp_path / "x.safetensors")
    assert torch.equal(read_lora(tmp_path / "x.safetensors", SHAPES, spec=SPEC).pairs[name].up, pair.up)


@pytest.mark.parametrize("fold", [True, False])
def test_two_experts_in_one_file(tmp_path, saved, fold):
    """As diffusers' pipelines of two transformers save them, alphas in the metadata or folded; each is read,
    and written, under a prefix of its own."""
    lora = read_lora(saved, SHAPES, spec=SPEC)
    other = replace(
        lora, pairs={name: replace(pair, up=pair.up + 1.0, alpha=8.0) for name, pair in lora.pairs.items()}
    )
    first, second = (
        (converted(o, SPEC, DIALECTS["diffusers"], fold=fold, expert=n) for n, o in enumerate((lora, other)))
    )
    assert all(name.startswith("transformer_2.") for name in second.tensors)
    path, metadata = tmp_path / "both.safetensors", {}
    if not fold:
        tables = [json.loads(made.metadata["lora_adapter_metadata"]) for made in (first, second)]
        metadata = {"lora_adapter_metadata": json.dumps(tables[0] | tables[1])}
    safetensors.torch.save_file(
        {name: t.clone() for name, t in (first.tensors | second.tensors).items()}, path, metadata
    )
    with pytest.raises(
        CheckpointError, match=r"LoRAs of 2 experts \(transformer\., transformer_2\.\); say which"
    ):
        read_lora(path, SHAPES, spec=SPEC)
    with pytest.raises(CheckpointError, match="say which"):
        read_lora(path, SHAPES, spec=SPEC, expert=2)
    name = "double_blocks.0.img_mlp.fc1"
    deltas = [read_lora(path, SHAPES, spec=SPEC, expert=n).pairs[name].delta() for n in (0, 1)]
    torch.testing.assert_close(deltas[0], lora.pairs[name].delta())
    torch.testing.assert_close(deltas[1], other.pairs[name].delta())


WAN = ["lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_0_ffn_0", "lora_unet_blocks_7_cross_attn_o"]
HV15 = ["lora_unet_double_blocks_0_img_attn_q", "lora_unet_double_blocks_0_img_attn_proj"]


@pytest.mark.parametrize(
    ("stems", "n_strange", "first", "looks"),
    [
        (WAN, 3, "lora_unet_blocks_0_ffn_0, lora_unet_blocks_0_self_attn_q, ", "Wan"),
        ([w.replace("lora_unet_", "diffusion_model.") for w in WAN], 3, "diffusion_model.blocks_0_", "Wan"),
        (HV15, 1, "lora_unet_double_blocks_0_img_attn_q", "HunyuanVideo 1.5"),
        (
            ["lora_unet_down_blocks_0_attentions_0_proj_in"], 1, "lora_unet_down_blocks_0",
            "a Stable Diffusion UNet"
        ),
    ],
)
def test_another_architecture_is_refused_by_name(tmp_path, stems, n_strange, first, looks):
    path = tmp_path / "stranger.safetensors"
    tensors = {}
    for stem in stems:
        tensors |= {
            f"{stem}.lora_down.weight": torch.randn(2, 48), f"{stem}.lora_up.weight": torch.randn(48, 2)
        }
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError) as error:
        read_lora(path, SHAPES, spec=SPEC)
    text = str(error.value)
    assert "\n" not in text and "stranger.safetensors" in text and f"it looks like {looks}" in text
    assert (
        f"{n_strange} of its {len(stems)} layers are not in this hunyuan-video model, first {first}" in text
    )


def test_a_namesake_is_refused_by_its_metadata(saved, tmp_path):
    """Flux has blocks of the same names and, at full size, of the same shapes."""
    path = tmp_path / "flux.safetensors"
    safetensors.torch.save_file(
        safetensors.torch.load_file(saved), path, metadata={"modelspec.architecture": "flux-1-dev/lora"}
    )
    with pytest.raises(CheckpointError, match="its metadata says flux-1-dev; give a LoRA for"):
        read_lora(path, SHAPES, spec=SPEC)


def _edit(tensors, how):
    key = "lora_unet_single_blocks_0_linear2"
    if how == "half":
        del tensors[f"{key}.lora_up.weight"]
    elif how == "nan":
        tensors[f"{key}.lora_up.weight"][0, 0] = float("nan")
    elif how == "size":
        tensors[f"{key}.lora_up.weight"] = torch.randn(50, 4)
    elif how == "rank":
        tensors[f"{key}.lora_up.weight"] = torch.randn(48, 5)
    elif how == "loha":
        tensors[f"{key}.hada_w1_a"] = torch.randn(48, 5)
    elif how == "lokr":
        tensors[f"{key}.lokr_w1"] = torch.randn(4, 5)
    elif how == "mid":
        tensors[f"{key}.lora_mid.weight"] = torch.randn(4, 4, 3, 3)
    elif how == "weights":
        tensors["img_in.proj.bias"] = torch.randn(5)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("half", "'lora_unet_single_blocks_0_linear2' has no up-projection"),
        ("nan", "not finite"),
        ("size", "'single_blocks.0.linear2' adapts a layer of shape 50x240, this model's is 48x240"),
        ("rank", r"shapes \[48, 5\] and \[4, 240\]"),
        ("loha", "is a LoHa and a LoRA at once"),
        ("lokr", "is a LoKr and a LoRA at once"),
        ("mid", "holds convolution LoRA weights, which are not supported: give a LoRA file .* or one of a "
        "LoHa or LoKr or DoRA"),
        ("weights", "'img_in.proj.bias' is not a LoRA tensor"),
    ],
)
def test_damaged_files_are_refused(saved, tmp_path, how, match):
    tensors = safetensors.torch.load_file(saved)
    _edit(tensors, how)
    path = tmp_path / "bad.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=match):
        read_lora(path, SHAPES, spec=SPEC)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_lora(tmp_path / "none.safetensors", SHAPES, spec=SPEC)


def test_mixed_prefixes_are_refused(saved, tmp_path):
    """Two LoRAs in one file: the second one's layers would silently count as the first one's."""
    mixed = rewritten(
        saved, tmp_path / "m.safetensors", lambda key: key.replace("lora_unet_single", "other_single")
    )
    with pytest.raises(CheckpointError, match="mixes the prefixes lora_unet_, other_"):
        read_lora(mixed, SHAPES, spec=SPEC)
