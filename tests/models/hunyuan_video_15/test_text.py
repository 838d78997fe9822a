"""The text encoders of 1.5 against transformers' own full models, padded and masked as officially."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, T5Config, T5EncoderModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.models.hunyuan_video_15.glyph import glyph_ids, load_byt5, quoted
from hvtrain.models.hunyuan_video_15.text import (
    QWEN,
    TEMPLATE,
    open_llm_tokenizer,
    open_text,
    text_fingerprints,
)
from hvtrain.models.language import config_for, load_language_model
from hvtrain.weights.float8 import DTYPE as FP8
from hvtrain.weights.float8 import Fp8Linear
from hvtrain.weights.keymap import OWN_NAMES
from hvtrain.weights.source import anchored
from tests.models.test_text import sparse_safetensors

TOKENIZER = Path(__file__).parents[2] / "data" / "qwen25_tokenizer"
PROMPTS = ["a photo of a cat", "", 'a cat that says "hello"', "a photo of a cat " * 400]
# vocabulary as officially, for the tokenizer's ids
SIZES = {
    "vocab_size": 152064, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "rms_norm_eps": 1e-6,
}
T5_SIZES = {"vocab_size": 1510, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
T5_FACTS = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def scaled_up(model: torch.nn.Module) -> torch.nn.Module:
    """Attention that is not uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()), std=0.3)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def llm() -> Qwen2_5_VLTextModel:
    return scaled_up(Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**SIZES)))


@pytest.fixture(scope="module")
def byt5() -> T5EncoderModel:
    return scaled_up(T5EncoderModel(T5Config(**T5_SIZES, **T5_FACTS)))


@pytest.fixture(scope="module")
def parts(llm, byt5, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("encoders")
    llm.save_pretrained(folder / "llm")
    byt5.save_pretrained(folder / "byt5")
    return {"llm": str(folder / "llm"), "byt5": str(folder / "byt5"), "llm_tokenizer": str(TOKENIZER)}


# --- template -----------------------------------------------------------------------------------------------


def test_template_and_crop_in_the_real_vocabulary():
    """Qwen's own ids (of a part of its vocabulary, with its merges); 108 is what
    the official code computes."""
    tokenizer = open_llm_tokenizer(TOKENIZER)
    assert tokenizer.crop == 108
    ids = tokenizer("a cat")
    assert ids[:4] == [151644, 8948, 198, 2610]  # <|im_start|> system \n You
    assert ids[105:] == [151644, 872, 198, 64, 8251, 151645, 198, 151644, 77091, 198]
    assert tokenizer("")[108:] == tokenizer(" ")[108:] == [220, 151645, 198, 151644, 77091, 198]
    assert len(tokenizer("a " * 3000)) == 108 + 1000
    # the nine spaces
    assert tokenizer.tokenizer.encode("aspects:" + " " * 9 + "1.").ids[-4:] == [260, 220, 16, 13]
    assert TEMPLATE.count(" " * 9) == 5 and "\n " not in TEMPLATE


def test_tokenizer_of_vocabulary_and_merges(tmp_path):
    whole = json.loads((TOKENIZER / "tokenizer.json").read_text())
    added = {str(a["id"]): {k: v for k, v in a.items() if k != "id"} for a in whole["added_tokens"]}
    (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *whole["model"]["merges"]]) + "\n")
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "model_max_length": 99}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for prompt in PROMPTS:
        assert open_llm_tokenizer(tmp_path)(prompt) == open_llm_tokenizer(TOKENIZER)(prompt)


# --- the language model -------------------------------------------------------------------------------------


@torch.no_grad()
def test_equals_the_official_procedure(llm, byt5, parts):
    """The whole models, padded on the right to the full length with a mask, states and mask cropped."""
    encoders = open_text(parts, dtype=torch.float32)
    ids = [open_llm_tokenizer(TOKENIZER)(prompt) for prompt in PROMPTS]
    mask = torch.zeros(len(ids), 1108, dtype=torch.long)
    padded = torch.full_like(mask, 151643)
    for i, one in enumerate(ids):
        mask[i, : len(one)], padded[i, : len(one)] = 1, torch.tensor(one)
    states = llm(input_ids=padded, attention_mask=mask, output_hidden_states=True).hidden_states[-3][:, 108:]
    found = encoders.encode(PROMPTS)
    assert [len(f["text"]) for f in found] == [10, 6, 12, 1000]
    for i, f in enumerate(found):
        assert f["text"].dtype == torch.float32
        assert relative(f["text"], states[i, : len(f["text"])]) < 1e-5
    # Neither on the prompts beside it nor on their order.
    assert torch.equal(encoders.encode(PROMPTS[::-1])[-1]["text"], found[0]["text"])

    tokenizer = ByT5Tokenizer()
    glyph = tokenizer(
        'Text "hello". ', padding="max_length", max_length=256, truncation=True, return_tensors="pt"
    )
    wanted = byt5(input_ids=glyph.input_ids, attention_mask=glyph.attention_mask.float()).last_hidden_state[0]
    n = int(glyph.attention_mask.sum())
    assert [tuple(f["glyph"].shape) for f in found] == [(0, 24), (0, 24), (n, 24), (0, 24)] and n == 15
    assert relative(found[2]["glyph"], wanted[:n]) < 1e-5


PREFIXES = {"ComfyUI and old transformers": "model.", "transformers 5": "model.language_model.", "bare": ""}


@pytest.mark.parametrize("layout", PREFIXES)
def test_llm_layouts(layout, llm, tmp_path):
    """Whole Qwen2.5-VL checkpoints; the layers, norm and head that are not read may be missing."""
    state = {
        PREFIXES[layout] + k: v for k,
        v in llm.state_dict().items() if not k.startswith(("layers.2", "layers.3", "norm"))
    }
    state |= {"visual.patch_embed.proj.weight": torch.zeros(2, 2), "lm_head.weight": torch.zeros(2, 2)}
    save_file(state, tmp_path / "model.safetensors")
    text = {**SIZES, "layer_types": ["full_attention"] * 4}
    config = (
        {"model_type": "qwen2_5_vl", "text_config": text}
        if "5" in layout else {"model_type": "qwen2_5_vl", **text}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_language_model(tmp_path, QWEN, dtype=torch.float32).model
    assert len(model.layers) == 2
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        wanted = llm(input_ids=ids, output_hidden_states=True).hidden_states[-3]
        assert relative(model(input_ids=ids, use_cache=False).last_hidden_state, wanted) < 1e-6
        assert relative(llm.norm(wanted), wanted) > 0.01


def test_fp8(llm, parts, tmp_path):
    """Quantised here, and ComfyUI's scaled file, whose values are kept."""
    plain, eight = open_text(parts, dtype=torch.float32), open_text(parts, dtype=torch.float32, fp8=True)
    assert sum(isinstance(m, Fp8Linear) for m in eight.llm.modules()) == 2 * 7
    assert not any(isinstance(m, Fp8Linear) for m in eight.glyph.model.modules())
    error = relative(eight.encode(PROMPTS[:1])[0]["text"], plain.encode(PROMPTS[:1])[0]["text"])
    assert 1e-4 < error < 0.1
    assert (
        text_fingerprints(parts) == (plain.fingerprint, eight.fingerprint)
        and plain.fingerprint != eight.fingerprint
    )
    state = {f"model.{k}": v for k, v in load_file(f"{parts['llm']}/model.safetensors").items()}
    for name in [n for n in state if n.endswith("proj.weight")]:
        factor = state[name].abs().max() / 448
        state[name.replace("weight", "scale_weight")], state[name] = factor, (state[name] / factor).to(FP8)
        state[name.replace("weight", "scale_input")] = torch.tensor(1.0)
    state["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    save_file(
        state, tmp_path / "qwen_2.5_vl_7b_fp8_scaled.safetensors",
        metadata={"hvtrain.config": json.dumps(SIZES)}
    )
    files = {**parts, "llm": str(tmp_path / "qwen_2.5_vl_7b_fp8_scaled.safetensors")}
    kept, dequantised = open_text(files, dtype=torch.float32, fp8=True), open_text(files, dtype=torch.float32)
    assert kept.llm.layers[0].mlp.up_proj.weight.dtype == FP8
    assert relative(kept.encode_llm("a cat"), dequantised.encode_llm("a cat")) < 1e-5
    assert relative(kept.encode_llm("a cat"), plain.encode_llm("a cat")) < 0.2


def test_official_sizes_from_a_bare_file(tmp_path):
    """Qwen2.5-VL-7B as one file without any config."""
    layer = {
        "self_attn.q_proj.weight": (3584, 3584), "self_attn.k_proj.weight": (512, 3584),
        "self_attn.v_proj.weight": (512, 3584), "self_attn.q_proj.bias": (3584,),
        "self_attn.k_proj.bias": (512,), "self_attn.v_proj.bias": (512,),
        "self_attn.o_proj.weight": (3584, 3584), "mlp.gate_proj.weight": (18944, 3584),
        "mlp.up_proj.weight": (18944, 3584), "mlp.down_proj.weight": (3584, 18944),
        "input_layernorm.weight": (3584,), "post_attention_layernorm.weight": (3584,),
    }
    shapes = {f"model.layers.{i}.{k}": v for i in range(28) for k, v in layer.items()}
    shapes |= {
        "model.embed_tokens.weight": (152064, 3584), "model.norm.weight": (3584,),
        "lm_head.weight": (152064, 3584)
    }
    path = sparse_safetensors(tmp_path / "qwen_2.5_vl_7b.safetensors", shapes)
    config = config_for(anchored(path, {"embed_tokens.weight": OWN_NAMES}, what=""), QWEN)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (26, 3584, 152064)
    assert (
        config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    ) == (28, 4, 18944)
    assert config.rope_parameters["rope_theta"] == 1000000.0 and config.rms_norm_eps == 1e-6
    assert load_language_model(path, QWEN, dtype=torch.float16, device="meta").model.dtype == torch.float16


# --- what is quoted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("a cat", []),
        ('a sign "OPEN" by the door', ["OPEN"]),
        ('"a" and "b" and "a"', ["a", "b"]),  # each once
        ("\u201c\u4f60\u597d\u201d on a wall", ["\u4f60\u597d"]),
        ('\u201cfirst\u201d, then "second"', ["first", "second"]),  # in order, not by kind
        ("it's 'single'", []),
        ("\u300c\u770b\u677f\u300d and \u2018x\u2019", []),  # corner brackets and single ones are no quotes
        ('half "open', []),
        ('"one\nline"', []),  # within a line
        ('""', [""]),
        ('"" and "x"', ["", "x"]),
        ('"\u201cinner\u201d"', ["\u201cinner\u201d"]),
        ("\u201ca", []),
    ],
)
def test_quoted_spans(prompt, spans):
    assert quoted(prompt) == spans
    text = "".join(f'Text "{span}". ' for span in spans)
    wanted = ByT5Tokenizer()(text, truncation=True, max_length=256).input_ids if spans else []
    assert glyph_ids(prompt) == wanted


def test_many_letters_are_cut():
    many = "\u4f60" * 300
    ids = glyph_ids(f'"{many}"')
    assert len(ids) == 256 and ids[-1] == 1
    assert ids == ByT5Tokenizer()(f'Text "{many}". ', truncation=True, max_length=256).input_ids


def write_byt5(layout: str, folder: Path, model: T5EncoderModel) -> Path:
    state = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    if layout == "transformers directory":
        model.save_pretrained(folder)
        return folder
    if layout == "official":
        path = folder / "byt5_model.pt"
        inside = {f"module.text_tower.encoder.{k}": v for k, v in state.items()}
        torch.save({"state_dict": inside | {"module.visual.x": torch.zeros(2)}}, path)
        return path
    path = folder / "byt5.safetensors"
    shared = state.pop("embed_tokens.weight")
    save_file({f"encoder.{k}": v for k, v in state.items()} | {"shared.weight": shared}, path)
    return path


@pytest.mark.parametrize("layout", ["transformers directory", "official", "ComfyUI"])
def test_byt5_layouts(layout, byt5, tmp_path):
    found = load_byt5(write_byt5(layout, tmp_path, byt5))
    ids = torch.tensor([glyph_ids('"hello"')])
    with torch.no_grad():
        wanted = byt5(input_ids=ids).last_hidden_state[0]
    assert relative(found.encode('"hello"'), wanted) < 1e-6 and found.fingerprint


# --- bad input ----------------------------------------------------------------------------------------------


def test_bad_input(parts, tmp_path):
    with pytest.raises(ConfigError, match="a file without a tokenizer: set llm_tokenizer"):
        open_text(
            {
                **{k: v for k, v in parts.items() if k != "llm_tokenizer"},
                "llm": f"{parts['llm']}/model.safetensors"
            }
        )
    (tmp_path / "tokenizer.json").write_text(
        (TOKENIZER / "tokenizer.json").read_text().replace("<|im_", "<|it_")
    )
    with pytest.raises(CheckpointError, match="not a Qwen tokenizer: it has no"):
        open_text({**parts, "llm_tokenizer": str(tmp_path)})
    with pytest.raises(
        CheckpointError, match="not a ByT5 text encoder: no 'encoder.final_layer_norm.weight' in it"
    ):
        load_byt5(parts["llm"])
    with pytest.raises(
        CheckpointError, match="not a Qwen2.5-VL text encoder: no 'embed_tokens.weight' in it"
    ):
        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
        load_language_model(tmp_path / "a.safetensors", QWEN, dtype=torch.float32)
    small = T5EncoderModel(T5Config(**{**T5_SIZES, "vocab_size": 100}, **T5_FACTS))
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match="its vocabulary has 100 tokens"):
        load_byt5(tmp_path / "small")
