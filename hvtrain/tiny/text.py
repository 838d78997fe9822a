"""The recipe of the tiny text encoders: `python -m hvtrain.tiny.text [MODEL [FOLDER]]`.

Fixed random features, not trained: the real classes at small widths with tokenizers of their own; the
model's record says which. Each word of the synthetic captions is one token and any other string falls
back to bytes, so every prompt works. The record's scales let a linear layer tell the words apart
(tests/tiny/test_tiny_text.py measures it): token states keep the word's own embedding, and a pooled
vector is close to a sum over words.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from hvtrain.models.spec import TinyText
from hvtrain.rng import generator
from hvtrain.tiny.parts import ASSETS, DEFAULT, embedded_parts

SEED = 20240

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


def build_tokenizer(text: TinyText) -> Tokenizer:
    """Whole words, else bytes: a word-piece model over byte-level text, so that no string is unknown."""
    specials, atoms = list(dict.fromkeys([*text.specials.values(), *text.more_specials])), list(text.atoms)
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
        single=" ".join([*text.before, "$A", *text.after]),
        special_tokens=[(s, tokenizer.token_to_id(s)) for s in [*text.before, *text.after]],
    )
    return tokenizer


@torch.no_grad()
def _randomize(model: nn.Module, gains: Mapping[str, float], *, stream: str) -> None:
    """Normal weights of variance gain^2 / fan-in (embeddings: gain^2), one generator each; default gain 1."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0 if name.endswith(".weight") else 0.0)  # norms one, biases zero
            continue
        kind = name.split(".")[-2]
        scale = gains.get(kind, 1.0) * (1.0 if "embed" in kind else parameter.shape[1] ** -0.5)
        noise = torch.randn(parameter.shape, generator=generator(SEED, stream=f"{stream}/{name}"))
        parameter.copy_((noise * scale).to(torch.float16))  # what the file will hold


def write_encoder(text: TinyText, folder: Path) -> None:
    """A directory as transformers has them: model.safetensors in half precision, config.json
    and tokenizer if it has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(text) if text.specials else None
    model = text.build(tokenizer)
    _randomize(model, text.gains, stream=f"tiny-{text.part}")
    if hasattr(model, "config"):
        config = model.config.to_diff_dict() | {"architectures": [type(model).__name__], "dtype": "float16"}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is None:
        return
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **text.specials}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_assets(model: str = DEFAULT, folder: Path | None = None) -> None:
    parts = embedded_parts(model)
    for text in parts.text:
        write_encoder(text, (folder or ASSETS / parts.folder) / text.part)


if __name__ == "__main__":
    write_assets(sys.argv[1] if sys.argv[1:] else DEFAULT, Path(sys.argv[2]) if sys.argv[2:] else None)
