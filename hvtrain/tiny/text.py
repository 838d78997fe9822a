"""The recipe of the tiny text encoders: `python -m hvtrain.tiny.text [FOLDER]`.

Fixed random features, not trained: a Llama and a CLIP of the real classes at width 64 with tokenizers of
their own. Each word of the synthetic captions is one token and any other string falls back to bytes, so every
prompt works. The scales below let a linear layer tell the words apart (tests/tiny/test_tiny_text.py measures
it): token states keep the word's own embedding, and the pooled vector is close to a sum over words.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from hvtrain.rng import generator
from hvtrain.tiny.parts import embedded_parts

SEED = 20240
WIDTH = 64
ASSETS = Path(__file__).parent / "assets"

WORDS = (
    # what synthetic captions are made of
    "a an the and of with on in at to is are it its this that from by for one two three four many "
    "red green blue yellow cyan magenta white black orange purple pink brown gray grey violet gold silver "
    "dark light bright pale plain striped checkered dotted background "
    "circle square triangle star cross ring diamond heart disc ball box shape line dot oval hexagon zorb "
    "moves move moving left right up down diagonal still spins grows shrinks bounces flashes zigzag "
    "rotates falls rises jumps runs walks turns stands sleeps eats flies slowly quickly fast "
    # the real clip and what else a first prompt may say
    "rabbit bunny forest grass big buck cartoon animated clip video animation scene meadow tree trees sky "
    "cloud flower flowers butterfly squirrel bird cat dog man woman person face hand water river sea fire "
    "sun moon night day morning small large tiny round soft fat furry happy angry camera close view shot pan "
    "zoom front behind under over near far center top bottom side into out across around low high quality "
    "blurry sharp aerial style film photo picture image colorful simple flat smooth old new "
    # the template's roles
    "system user assistant"
).split()


def _byte_alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def build_tokenizer(
    specials: list[str], atoms: list[str], *, before: list[str], after: list[str]
) -> Tokenizer:
    """Whole words, else bytes: a word-piece model over byte-level text, so that no string is unknown.

    `specials` and `atoms` are single tokens wherever they occur; `before` and `after` enclose every text.
    """
    pieces = [*specials, *atoms, *(f"Ġ{w}" for w in WORDS)]
    pieces += _byte_alphabet() + [f"##{b}" for b in _byte_alphabet()]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    word_piece = models.WordPiece(vocabulary, unk_token=specials[0])
    tokenizer = Tokenizer(word_piece)
    tokenizer.normalizer = normalizers.Lowercase()
    # The word-piece model calls a word of over 100 characters unknown (and is quadratic in its length).
    chunks = pre_tokenizers.Split(Regex(".{1,64}"), behavior="isolated")
    words = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, chunks])
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer.add_tokens([AddedToken(a, normalized=False) for a in atoms])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*before, "$A", *after]),
        special_tokens=[(s, tokenizer.token_to_id(s)) for s in [*before, *after]],
    )
    return tokenizer


def build_llm_tokenizer() -> Tokenizer:
    """The real template costs 11 tokens here: its instruction text is one token."""
    roles = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    instruction = embedded_parts().prompt_template().split("\n\n")[1].split("<|eot_id|>")[0]
    return build_tokenizer(
        ["<|begin_of_text|>", "<|end_of_text|>", "<pad>", *roles], [instruction, "\n\n"],
        before=["<|begin_of_text|>"], after=[],
    )


def build_clip_tokenizer() -> Tokenizer:
    return build_tokenizer(
        ["<|startoftext|>", "<|endoftext|>"], [], before=["<|startoftext|>"], after=["<|endoftext|>"]
    )


def build_llm(tokenizer: Tokenizer) -> nn.Module:
    """Four layers, of which the encoder uses the first two."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.token_to_id("<|begin_of_text|>"),
        eos_token_id=tokenizer.token_to_id("<|end_of_text|>"),
        pad_token_id=tokenizer.token_to_id("<pad>"),
    )
    # Below 1 on the way back into the residual stream: context colours a word's state but does not bury it.
    gains = {"o_proj": 0.7, "down_proj": 0.7}
    return _randomize(LlamaModel(config), gains, stream="tiny-llm")


def build_clip(tokenizer: Tokenizer) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    end = tokenizer.token_to_id("<|endoftext|>")
    config = CLIPTextConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77, projection_dim=WIDTH,
        bos_token_id=tokenizer.token_to_id("<|startoftext|>"), eos_token_id=end, pad_token_id=end,
    )
    # Flat attention (small q, k) makes the end token average the values of all words; the large output gain
    # lifts each word's share of that average back to unit scale.
    gains = {"position_embedding": 0.1, "q_proj": 0.5, "k_proj": 0.5, "out_proj": 4.0, "fc2": 0.5}
    return _randomize(CLIPTextModel(config), gains, stream="tiny-clip")


@torch.no_grad()
def _randomize(model: nn.Module, gains: dict[str, float], *, stream: str) -> nn.Module:
    """Normal weights of variance gain^2 / fan-in (embeddings: gain^2), one generator each; default gain 1."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0 if name.endswith(".weight") else 0.0)  # norms one, biases zero
            continue
        kind = name.split(".")[-2]
        scale = gains.get(kind, 1.0) * (1.0 if "embed" in kind else parameter.shape[1] ** -0.5)
        noise = torch.randn(parameter.shape, generator=generator(SEED, stream=f"{stream}/{name}"))
        parameter.copy_((noise * scale).to(torch.float16))  # what the file will hold
    return model


def write_encoder(model: Any, tokenizer: Tokenizer, folder: Path, *, special: dict[str, str]) -> None:
    """A Hugging Face directory: config.json, model.safetensors in half precision, tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_diff_dict() | {"architectures": [type(model).__name__], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_assets(folder: Path = ASSETS) -> None:
    llm_tokenizer, clip_tokenizer = build_llm_tokenizer(), build_clip_tokenizer()
    write_encoder(
        build_llm(llm_tokenizer), llm_tokenizer, folder / "llm",
        special={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<pad>"},
    )
    write_encoder(
        build_clip(clip_tokenizer), clip_tokenizer, folder / "clip",
        special={"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    )


if __name__ == "__main__":
    write_assets(Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS)
