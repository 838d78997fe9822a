"""The text encoders against transformers' own full models, from every layout that their weights come in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextModel, LlamaModel

from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.models.hunyuan_video.text import (
    TEMPLATE,
    open_clip_tokenizer,
    open_llm_tokenizer,
    open_text,
)
from hvtrain.models.hunyuan_video.text_weights import LLAMA, load_clip
from hvtrain.models.language import config_for, load_language_model
from hvtrain.tiny.text import ASSETS
from hvtrain.weights.float8 import DTYPE as FP8
from hvtrain.weights.float8 import Fp8Linear
from hvtrain.weights.keymap import OWN_NAMES
from hvtrain.weights.source import anchored

LLM, CLIP = ASSETS / "llm", ASSETS / "clip"
PROMPTS = ["a red circle moves left on a gray background", "", "rabbit " * 400]
IDS = torch.arange(3, 40)[None]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def full_llm():
    return LlamaModel.from_pretrained(LLM, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def full_clip():
    return CLIPTextModel.from_pretrained(CLIP, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def wanted(full_llm) -> torch.Tensor:
    """Third hidden state from the end of the whole model."""
    with torch.no_grad():
        return full_llm(input_ids=IDS, output_hidden_states=True).hidden_states[-3]


def run(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).last_hidden_state


def llm_parts() -> tuple[dict, dict]:
    return load_file(LLM / "model.safetensors"), json.loads((LLM / "config.json").read_text())


def clip_parts() -> tuple[dict, dict]:
    return load_file(CLIP / "model.safetensors"), json.loads((CLIP / "config.json").read_text())


def write_directory(folder: Path, state: dict, config: dict) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def test_equals_the_official_procedure(full_llm, full_clip):
    """The whole models, padded on the right to the full length with a mask, states and mask cropped."""
    encoders = open_text({"llm": LLM, "clip": CLIP}, dtype=torch.float32)
    llm_tokenizer = Tokenizer.from_file(f"{LLM}/tokenizer.json")
    clip_tokenizer = Tokenizer.from_file(f"{CLIP}/tokenizer.json")
    crop = len(llm_tokenizer.encode(TEMPLATE.split("{}")[0]).ids)
    llm_tokenizer.enable_padding(length=256 + crop, pad_id=llm_tokenizer.token_to_id("<pad>"))
    llm_tokenizer.enable_truncation(256 + crop)
    clip_tokenizer.enable_padding(length=77, pad_id=clip_tokenizer.token_to_id("<|endoftext|>"))
    clip_tokenizer.enable_truncation(77)
    batch = llm_tokenizer.encode_batch([TEMPLATE.format(p) for p in PROMPTS])
    mask = torch.tensor([b.attention_mask for b in batch])
    states = full_llm(
        input_ids=torch.tensor([b.ids for b in batch]), attention_mask=mask, output_hidden_states=True
    ).hidden_states[-3]
    pooled = full_clip(
        input_ids=torch.tensor([b.ids for b in clip_tokenizer.encode_batch(PROMPTS)])
    ).pooler_output
    found = encoders.encode(PROMPTS)
    assert [len(f["text"]) for f in found] == mask[:, crop:].sum(1).tolist()
    assert len(found[0]["text"]) == 10 and len(found[1]["text"]) == 1 and len(found[2]["text"]) == 256
    for i, f in enumerate(found):
        assert relative(f["text"], states[i, crop : crop + len(f["text"])]) < 1e-5
        assert relative(f["pooled"], pooled[i]) < 1e-5
        assert f["text"].dtype == f["pooled"].dtype == torch.float32
    # A prompt's states do not depend on the company it is in.
    assert torch.equal(encoders.encode(PROMPTS[:1])[0]["text"], found[0]["text"])


def test_the_left_out_layers_and_norm_are_not_read(tmp_path, full_llm, wanted):
    state, config = llm_parts()
    kept = {k: v for k, v in state.items() if not k.startswith(("layers.2.", "layers.3.", "norm."))}
    encoder = load_language_model(write_directory(tmp_path, kept, config), LLAMA, dtype=torch.float32)
    assert len(encoder.model.layers) == 2
    assert relative(run(encoder.model), wanted) < 1e-6
    with torch.no_grad():
        normed = full_llm.norm(wanted)
    assert relative(run(encoder.model), normed) > 0.01


# How the tensors of the language model are called in the layouts that are in circulation.
PREFIXES = {
    "transformers 5, model alone": "",
    "ComfyUI, causal language model": "model.",
    "LLaVA of transformers 4": "language_model.model.",
    "LLaVA of transformers 5": "model.language_model.",
}


@pytest.mark.parametrize("layout", PREFIXES)
def test_llm_directories(layout, tmp_path, wanted):
    state, config = llm_parts()
    state = {PREFIXES[layout] + k: v for k, v in state.items()}
    if "LLaVA" in layout:
        # Its text section leaves out what equals the library's defaults, and it has more than language.
        state["multi_modal_projector.linear_1.weight"] = torch.zeros(2, 2)
        state["vision_tower.vision_model.embeddings.patch_embedding.weight"] = torch.zeros(2, 2)
        dropped = "hidden_size intermediate_size vocab_size num_hidden_layers num_key_value_heads".split()
        text = {k: v for k, v in config.items() if k not in dropped}
        config = {"model_type": "llava", "text_config": text, "vision_config": {"hidden_size": 3}}
    if layout != "transformers 5, model alone":
        state["lm_head.weight"] = torch.zeros(704, 64)
    encoder = load_language_model(write_directory(tmp_path, state, config), LLAMA, dtype=torch.float32)
    assert relative(run(encoder.model), wanted) < 1e-6


def comfy_file(path: Path, *, scaled: bool = False) -> Path:
    """One file with the tokenizer inside as bytes; scaled: float8 linear weights and a factor each."""
    state, config = llm_parts()
    state = {f"model.{k}": v for k, v in state.items()}
    if scaled:
        for key in [k for k in state if k.endswith("proj.weight")]:
            factor = state[key].float().abs().max() / 448
            state[key.replace("weight", "scale_weight")] = factor
            state[key] = (state[key].float() / factor).to(FP8)
        state["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    state["tokenizer"] = torch.zeros(100, dtype=torch.uint8)
    state["lm_head.weight"] = torch.zeros(704, 64)
    save_file(state, path, metadata={"hvtrain.config": json.dumps(config)})
    return path


def test_comfy_single_file(tmp_path, wanted):
    encoder = load_language_model(
        comfy_file(tmp_path / "llava_llama3_fp16.safetensors"), LLAMA, dtype=torch.float32
    )
    assert relative(run(encoder.model), wanted) < 1e-6


def test_comfy_scaled_fp8(tmp_path, wanted):
    path = comfy_file(tmp_path / "llava_llama3_fp8_scaled.safetensors", scaled=True)
    dequantised = load_language_model(path, LLAMA, dtype=torch.float32).model
    kept = load_language_model(path, LLAMA, dtype=torch.float32, fp8=True).model
    assert relative(run(dequantised), wanted) < 0.1  # the file's own rounding
    assert relative(run(kept), run(dequantised)) < 1e-5  # stored as it is, with its factor
    assert kept.layers[0].mlp.up_proj.weight.dtype == FP8


def test_fp8_option(wanted):
    model = load_language_model(LLM, LLAMA, dtype=torch.float32, fp8=True).model
    linear = [m for m in model.modules() if isinstance(m, Fp8Linear)]
    assert len(linear) == 2 * 7 and all(m.weight.dtype == FP8 for m in linear)
    assert not any(type(m) is torch.nn.Linear for m in model.modules())
    assert model.embed_tokens.weight.dtype == model.layers[0].input_layernorm.weight.dtype == torch.float32
    error = relative(run(model), wanted)
    assert 1e-4 < error < 0.05
    encoders = open_text({"llm": LLM, "clip": CLIP}, dtype=torch.bfloat16, fp8=True)
    plain = open_text({"llm": LLM, "clip": CLIP}, dtype=torch.bfloat16)
    assert encoders.fingerprint != plain.fingerprint
    assert relative(encoders.encode(PROMPTS[:1])[0]["text"], plain.encode(PROMPTS[:1])[0]["text"]) < 0.06


@pytest.mark.parametrize("layout", ["transformers 5", "transformers 4", "whole CLIP", "ComfyUI"])
def test_clip_layouts(layout, tmp_path, full_clip):
    state, config = clip_parts()
    if layout != "transformers 5":
        state = {f"text_model.{k}": v for k, v in state.items()}
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    path = tmp_path
    if layout == "whole CLIP":
        state |= {"vision_model.embeddings.class_embedding": torch.zeros(2), "logit_scale": torch.zeros(1)}
        state["text_projection.weight"] = torch.zeros(64, 64)
        config = {"model_type": "clip", "text_config": config, "vision_config": {}}
    if layout == "ComfyUI":
        path = tmp_path / "clip_l.safetensors"
        save_file(state, path, metadata={"hvtrain.config": json.dumps(config)})
    else:
        write_directory(tmp_path, state, config)
    model = load_clip(path, dtype=torch.float32).model
    with torch.no_grad():
        assert relative(model(IDS).last_hidden_state, full_clip(IDS).last_hidden_state) < 1e-6


def sparse_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A file of the full size in which nothing is written but the header (the disk holds no data)."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
    return path


def test_official_sizes_from_a_bare_file(tmp_path):
    """LLaVA-Llama-3-8B as one file without any config."""
    layer = {
        "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336), "input_layernorm": (4096,), "post_attention_layernorm": (4096,),
    }
    shapes = {f"model.layers.{i}.{k}.weight": v for i in range(32) for k, v in layer.items()}
    shapes |= {"model.embed_tokens.weight": (128320, 4096), "model.norm.weight": (4096,)}
    shapes |= {"lm_head.weight": (128320, 4096), "tokenizer": (9,)}
    path = sparse_safetensors(tmp_path / "llm.safetensors", shapes)
    source = anchored(path, {"embed_tokens.weight": OWN_NAMES}, what="")
    config = config_for(source, LLAMA)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 4096, 128320)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    assert config.rope_parameters["rope_theta"] == 500000.0 and config.rms_norm_eps == 1e-5
    with torch.device("meta"):
        model = LlamaModel(config)
    model.norm = torch.nn.Identity()
    source.load(model, what="", dtype=torch.float32, device="meta")


def test_official_clip_from_a_bare_file(tmp_path):
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        vocab_size=99, hidden_size=768, intermediate_size=96, num_hidden_layers=1, num_attention_heads=12,
        max_position_embeddings=77, hidden_act="quick_gelu",
    )
    torch.manual_seed(0)
    reference = CLIPTextModel(config).eval()
    state = {f"text_model.{k}": v.clone() for k, v in reference.state_dict().items()}
    save_file(state, tmp_path / "clip_l.safetensors")
    model = load_clip(tmp_path / "clip_l.safetensors", dtype=torch.float32).model
    with torch.no_grad():
        assert relative(model(IDS).last_hidden_state, reference(IDS).last_hidden_state) < 1e-6


def llama3_like(folder: Path, *, begin_rule: bool, begin: int = 128000) -> Path:
    """A word tokenizer with Llama 3's special tokens at its ids."""
    words = ["<|begin_of_text|>", "<|eot_id|>", "<unk>", "a", "b"]
    model = models.WordLevel({w: begin + i for i, w in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(words[:2])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begin_rule:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{words[0]} $A", special_tokens=[(words[0], begin)]
        )
    folder.mkdir(exist_ok=True)
    tokenizer.enable_padding(length=500)  # files may carry settings of their own
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_crop(tmp_path):
    official = open_llm_tokenizer(llama3_like(tmp_path / "official", begin_rule=True))
    assert official.crop == 95
    assert len(official("a " * 1000)) == 95 + 256
    other = open_llm_tokenizer(llama3_like(tmp_path / "other", begin_rule=True, begin=10))
    bare = open_llm_tokenizer(llama3_like(tmp_path / "bare", begin_rule=False, begin=10))
    assert bare("a b") == other("a b") and bare("a b")[0] == 10  # added where the rule is missing
    assert bare.crop == other.crop > 50
    assert other("a b")[other.crop :] == [13, 14, 11]


def test_clip_tokenizer_from_vocabulary_and_merges(tmp_path):
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    words = [*letters, "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    tokenizer = open_clip_tokenizer(tmp_path)
    pieces = tokenizer.encode("RED cat").tokens
    assert pieces == ["<|startoftext|>", "red</w>", "c", "a", "t</w>", "<|endoftext|>"]
    long = tokenizer.encode("red " * 100)
    assert len(long.ids) == 77 and long.tokens[-2:] == ["red</w>", "<|endoftext|>"]


def broken_llm(folder: Path, what: str) -> Path:
    state, config = llm_parts()
    if what == "missing":
        del state["layers.1.mlp.up_proj.weight"]
    elif what == "shape":
        state["layers.1.mlp.up_proj.weight"] = torch.zeros(3, 64)
    elif what == "bias":
        state["layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    elif what == "heads":
        config = {}
    elif what == "layers":
        config["num_hidden_layers"] = 2
    elif what == "a DiT":
        state = {"double_blocks.0.img_attn_qkv.weight": torch.zeros(2)}
    return write_directory(folder, state, config)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "not a Llama text encoder: 1 missing: layers.1.mlp.up_proj.weight$"),
        ("shape", "1 of another shape: layers.1.mlp.up_proj.weight is 3x64, expected 128x64$"),
        ("bias", "1 unexpected: layers.0.self_attn.q_proj.bias$"),
        ("heads", "number of heads of width 64"),
        ("layers", "2 layers"),
        ("a DiT", "not a Llama text encoder.*double_blocks"),
    ],
)
def test_wrong_llm_files(what, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as e:
        load_language_model(broken_llm(tmp_path, what), LLAMA, dtype=torch.float32)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_wrong_options(tmp_path):
    file = comfy_file(tmp_path / "llm.safetensors")
    with pytest.raises(ConfigError, match="llm.safetensors.*llm_tokenizer"):
        open_text({"llm": file, "clip": CLIP})
    with pytest.raises(CheckpointError, match="no such tokenizer directory"):
        open_text({"llm": file, "llm_tokenizer": tmp_path / "nowhere", "clip": CLIP})
    with pytest.raises(CheckpointError, match="no tokenizer: expected tokenizer.json"):
        open_text({"llm": file, "llm_tokenizer": tmp_path, "clip": CLIP})
    with pytest.raises(CheckpointError, match="not a Llama 3 tokenizer"):
        open_text({"llm": file, "llm_tokenizer": CLIP, "clip": CLIP})
    with pytest.raises(CheckpointError, match="not a CLIP tokenizer"):
        open_text({"llm": file, "llm_tokenizer": LLM, "clip": CLIP, "clip_tokenizer": LLM})
    with pytest.raises(CheckpointError, match="not a CLIP text encoder"):
        open_text({"llm": LLM, "clip": LLM, "clip_tokenizer": CLIP})
    with pytest.raises(CheckpointError, match="not a Llama text encoder"):
        open_text({"llm": CLIP, "llm_tokenizer": LLM, "clip": CLIP})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer file"):
        open_text({"llm": file, "llm_tokenizer": tmp_path, "clip": CLIP})


def test_tokenizer_of_another_model(tmp_path):
    state, config = llm_parts()
    state["embed_tokens.weight"] = state["embed_tokens.weight"][:700].clone()
    folder = write_directory(tmp_path, state, config)
    with pytest.raises(CheckpointError, match="700 rows.*tokens: the tokenizer belongs to another model"):
        open_text({"llm": folder, "llm_tokenizer": LLM, "clip": CLIP})
