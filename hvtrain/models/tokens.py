"""Tokenizers of text encoders: found beside their models or where a config says, and compared with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvtrain.errors import CheckpointError, ConfigError


def open_tokenizer(folder: Path) -> Any:
    """tokenizer.json, or vocab.json + merges.txt, without padding or truncation of their own."""
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception for whatever is wrong in the file
            raise CheckpointError(f"{path}: not a tokenizer file: {e}") from e
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    else:
        raise CheckpointError(f"{folder}: no tokenizer: expected tokenizer.json or vocab.json and merges.txt")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tokenizer_folder(parts: Mapping[str, str], model: str) -> Path:
    """Of the part `model`: what the part MODEL_tokenizer says, else the part's own directory."""
    option, path = f"{model}_tokenizer", parts[model]
    if option in parts:
        folder = Path(parts[option])
        folder = folder.parent if folder.is_file() else folder
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such tokenizer directory (option {option})")
        return folder
    if not Path(path).is_dir():
        raise ConfigError(f"{path} is a file without a tokenizer: set {option} to a tokenizer's directory")
    return Path(path)


def check_vocabulary(path: str | Path, tokenizer: Any, n_embeddings: int) -> None:
    """A tokenizer of another model would index past the embedding table, on CUDA with an unreadable error."""
    n_tokens = tokenizer.get_vocab_size()
    if n_tokens > n_embeddings:
        raise CheckpointError(
            f"{path}: its embedding has {n_embeddings} rows but the tokenizer has {n_tokens} tokens: "
            "the tokenizer belongs to another model"
        )
