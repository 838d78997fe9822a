"""Weights of the text encoders, from the layouts in use into transformers' LlamaModel and CLIPTextModel.

A Hugging Face directory (language model alone, full LLaVA, whole CLIP), or ComfyUI's single file, plain or
scaled float8. Prefixes differ between them and between transformers 4 and 5: the prefix is found, not listed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvtrain.errors import CheckpointError
from hvtrain.models.hunyuan_video.vae_weights import parse_config
from hvtrain.weights.containers import fingerprint, open_weights

METADATA_KEY = "hvtrain.config"  # safetensors metadata of a single file: the encoder's config.json
SKIPPED_LAYERS = 2  # the DiT reads the third hidden state from the end: two layers and the norm are dropped
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
MODEL_TYPES = ("llama", "llava", "clip", "clip_text_model")  # whose config.json may describe one of these

# What shapes cannot tell, of the official models.
LLAMA_FACTS = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
LLAMA_HEAD_DIM = 128
CLIP_FACTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
CLIP_HEAD_DIM = 64


@dataclass(frozen=True)
class Encoder:
    model: Any
    fingerprint: str


class Fp8Linear(nn.Module):
    """A linear layer stored as float8 e4m3 with a scale (per tensor or output row), dequantised when used."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        # Scaled in float32: the scales of small weights are below float16's normal numbers.
        weight = (self.weight.float() * self.scale).to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 weight, float32 scale per output row): the row's largest value maps to float8's largest."""
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return (weight.float() / scale).to(FP8), scale


def load_llm(
    path: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu", fp8: bool = False
) -> Encoder:
    """A LlamaModel without the last two layers and without its norm: its output is hidden_states[-3]."""
    from transformers import LlamaModel
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    source = _Source(path, anchor="embed_tokens.weight", what="a Llama text encoder")
    config = _llama_config(source)
    with torch.device("meta"):
        model = LlamaModel(config)
    model.norm = nn.Identity()  # type: ignore[assignment]
    source.check(model, used=lambda k: _layer_index(k) < config.num_hidden_layers)
    _assign(model, source, dtype=dtype, device=device, fp8=fp8)
    model.rotary_emb = LlamaRotaryEmbedding(config=config).to(device)  # its buffer is computed, not stored
    return Encoder(model.eval().requires_grad_(False), fingerprint(source.weights))


def load_clip(path: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Encoder:
    from transformers import CLIPTextModel

    source = _Source(path, anchor="embeddings.token_embedding.weight", what="a CLIP text encoder")
    config = _clip_config(source)
    with torch.device("meta"):
        model = CLIPTextModel(config)
    source.check(model, used=lambda k: k.startswith(("embeddings.", "encoder.", "final_layer_norm.")))
    _assign(model, source, dtype=dtype, device=device, fp8=False)
    positions = torch.arange(config.max_position_embeddings, device=device)[None]
    model.embeddings.register_buffer("position_ids", positions, persistent=False)  # computed, not stored
    return Encoder(model.eval().requires_grad_(False), fingerprint(source.weights))


class _Source:
    """One encoder's tensors under the model's own names, whatever the file's prefix; its config, if any."""

    def __init__(self, path: str | Path, *, anchor: str, what: str) -> None:
        self.path, self.what = Path(path), what
        self.weights = open_weights(path)
        found = sorted((k for k in self.weights.keys() if k == anchor or k.endswith("." + anchor)), key=len)
        if not found:
            first = ", ".join(list(self.weights.keys())[:3])
            raise CheckpointError(f"{path}: not {what}: no '{anchor}' in it (its first keys: {first})")
        prefix = found[0].removesuffix(anchor)
        self.names = {k.removeprefix(prefix): k for k in self.weights.keys() if k.startswith(prefix)}
        self.config = self._read_config()

    def _read_config(self) -> dict[str, Any]:
        """The encoder's own config: from the metadata or config.json; a composite model's text section."""
        if METADATA_KEY in self.weights.metadata:
            where = f"{self.path}, metadata '{METADATA_KEY}'"
            config = parse_config(self.weights.metadata[METADATA_KEY], where)
        else:
            beside = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
            config = parse_config(beside.read_text(), beside) if beside.is_file() else {}
            if not self.path.is_dir() and config.get("model_type") not in MODEL_TYPES:
                return {}  # a single file among others: the config.json is not its own
        return config.get("text_config", config)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.names:
            raise CheckpointError(f"{self.path}: not {self.what}: no '{name}' in it")
        return tuple(self.weights.shape(self.names[name]))

    def count(self, pattern: str) -> int:
        """1 + the largest index in names that match."""
        return 1 + max((int(m[1]) for m in map(re.compile(pattern).match, self.names) if m), default=-1)

    def check(self, model: nn.Module, *, used: Callable[[str], bool]) -> None:
        """Refuse missing keys, wrong shapes, and parameters in the used part that the architecture lacks."""
        wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        for name, shape in wanted.items():
            found = self.shape(name)
            if found != shape:
                raise CheckpointError(
                    f"{self.path}: not {self.what}: '{name}' is {list(found)}, expected {list(shape)}"
                )
        extra = [k for k in self.names if k not in wanted and used(k) and k.endswith((".weight", ".bias"))]
        if extra:
            raise CheckpointError(
                f"{self.path}: not {self.what}: unexpected '{extra[0]}' ({len(extra)} such keys)"
            )

    def scale(self, name: str) -> Tensor | None:
        """The factor of a float8 weight: ComfyUI's X.scale_weight, or X.weight_scale of other tools."""
        stem = name.removesuffix("weight")
        for key in (f"{stem}scale_weight", f"{stem}weight_scale"):
            if key in self.names:
                scale = self.weights.get(self.names[key]).to(torch.float32, copy=True)
                return scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(1)
        return None

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A copy in `dtype`; the pages of the file that it came from are given back."""
        mapped, scale = self.weights.get(self.names[name]), self.scale(name)
        value = mapped.to(dtype, copy=True) if scale is None else (mapped.float() * scale).to(dtype)
        self.weights.release(mapped)
        return value

    def fp8(self, name: str) -> tuple[Tensor, Tensor]:
        """(weight, scale): as stored where the file is float8 already, else quantised."""
        mapped, scale = self.weights.get(self.names[name]), self.scale(name)
        if mapped.dtype == FP8:
            stored = mapped.clone(), scale if scale is not None else torch.ones(1)
        else:
            stored = quantize_fp8(mapped if scale is None else mapped.float() * scale)
        self.weights.release(mapped)
        return stored


def _assign(
    model: nn.Module, source: _Source, *, dtype: torch.dtype, device: torch.device | str, fp8: bool
) -> None:
    """Fill a meta model tensor by tensor; with `fp8` its linear layers become Fp8Linear. For the meta device there is nothing to
    fill it with: then the files' headers have been checked, and that was it."""
    if torch.device(device).type == "meta":
        return
    for path, module in list(model.named_modules()):
        prefix = f"{path}." if path else ""
        if fp8 and isinstance(module, nn.Linear):
            weight, scale = source.fp8(prefix + "weight")
            bias = None if module.bias is None else source.tensor(prefix + "bias", dtype).to(device)
            model.set_submodule(path, Fp8Linear(weight.to(device), scale.to(device), bias))
            continue
        for name, _ in list(module.named_parameters(recurse=False)):
            value = source.tensor(prefix + name, dtype).to(device)
            setattr(module, name, nn.Parameter(value, requires_grad=False))


def _layer_index(name: str) -> int:
    """The layer of a key; outside the layers a number past them all."""
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else 10**6


def _llama_config(source: _Source) -> Any:
    """Sizes from shapes (a LLaVA config leaves some out), the rest from the config or the official model."""
    from transformers import LlamaConfig

    vocabulary, hidden = source.shape("embed_tokens.weight")
    given = {k: v for k, v in source.config.items() if k not in ("dtype", "torch_dtype", "architectures")}
    n_layers = given.get("num_hidden_layers") or source.count(r"layers\.(\d+)\.")
    if n_layers <= SKIPPED_LAYERS:
        raise CheckpointError(f"{source.path}: {n_layers} layers: need more than {SKIPPED_LAYERS}")
    heads = given.get("num_attention_heads") or _heads(source, hidden, LLAMA_HEAD_DIM)
    head_dim = source.shape("layers.0.self_attn.q_proj.weight")[0] // heads
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": n_layers - SKIPPED_LAYERS,
        "intermediate_size": source.shape("layers.0.mlp.gate_proj.weight")[0],
        "num_attention_heads": heads,
        "num_key_value_heads": source.shape("layers.0.self_attn.k_proj.weight")[0] // head_dim,
        "head_dim": head_dim,
    }
    facts = {k: v for k, v in LLAMA_FACTS.items() if not (k == "rope_theta" and "rope_parameters" in given)}
    # Without a padding id: it only zeroes an embedding row's gradient, and may lie past a trimmed vocabulary.
    return LlamaConfig(**{**facts, **given, **sizes, "pad_token_id": None})


def _clip_config(source: _Source) -> Any:
    from transformers import CLIPTextConfig

    vocabulary, hidden = source.shape("embeddings.token_embedding.weight")
    given = {k: v for k, v in source.config.items() if k not in ("dtype", "torch_dtype", "architectures")}
    sizes = {
        "vocab_size": vocabulary, "hidden_size": hidden,
        "max_position_embeddings": source.shape("embeddings.position_embedding.weight")[0],
        "num_hidden_layers": source.count(r"encoder\.layers\.(\d+)\."),
        "intermediate_size": source.shape("encoder.layers.0.mlp.fc1.weight")[0],
        "num_attention_heads": given.get("num_attention_heads") or _heads(source, hidden, CLIP_HEAD_DIM),
    }
    return CLIPTextConfig(**{**CLIP_FACTS, **given, **sizes})


def _heads(source: _Source, hidden: int, head_dim: int) -> int:
    """The number of heads leaves no trace in shapes: the official head size, for large widths only."""
    if hidden % head_dim or hidden < 6 * head_dim:
        raise CheckpointError(
            f"{source.path}: cannot tell the number of heads of width {hidden}: "
            f"put the config.json beside the file or into its metadata ('{METADATA_KEY}')"
        )
    return hidden // head_dim
