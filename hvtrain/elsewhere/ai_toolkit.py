"""ai-toolkit: its job YAML (or JSON)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hvtrain.elsewhere.source import Foreign, number, read_file, tables
from hvtrain.elsewhere.table import flat
from hvtrain.errors import ConfigError

_WHOLE = ("datasets", "sample.samples", "model.model_paths")
_SAMPLE = {
    "prompt": "prompt", "width": "width", "height": "height", "seed": "seed", "neg": "negative_prompt",
    "guidance_scale": "cfg_scale", "sample_steps": "steps", "fps": "fps", "num_frames": "frames",
    "ctrl_img": "image",
}


def read(given: Sequence[str]) -> Foreign:
    if len(given) != 1:
        raise ConfigError("ai-toolkit: give its config, as in `hvtrain import ai-toolkit FILE.yaml`")
    raw = read_file(given[0])
    config = raw.get("config", {})
    processes = tables(
        config.get("process") if isinstance(config, Mapping) else None, f"{given[0]}: config.process"
    )
    if len(processes) != 1:
        raise ConfigError(
            f"{given[0]}: config.process holds {len(processes)}; a run here is one of them: leave one in it"
        )
    options = {"name": config.get("name"), **dict(flat(processes[0], whole=_WHOLE))}
    if "network.type" not in options:
        options["network.type"] = "none"
    for key in [key for key in options if key.endswith(".train_high_noise") and options[key]]:
        if options.get(key.replace("high", "low")):
            del options[key], options[key.replace("high", "low")]
            options[key.replace("high_noise", "both")] = True
    datasets = [
        {"trigger_word": options.get("trigger_word"), **one} if options.get("trigger_word") else dict(one)
        for one in tables(options.pop("datasets", None), "datasets")
    ]
    prompts = _prompts(options)
    if prompts:
        options["sample.prompts"] = prompts
    if not options.get("train.skip_first_sample"):
        options.setdefault("train.skip_first_sample", False)
    return Foreign(options, [str(options.get("model.arch", ""))], datasets=datasets)


def _prompts(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Our prompts of its two lists; the trigger word is filled in, and seeds walk where they do."""
    walk = bool(options.get("sample.walk_seed"))
    seed, texts = (
        number(options.get("sample.seed", 0), "sample.seed"), options.pop("sample.prompts", None) or []
    )
    samples = tables(options.pop("sample.samples", None), "sample.samples")
    items = [{"prompt": text} for text in (texts if isinstance(texts, list) else [texts])] + [
        {_SAMPLE[k]: v for k, v in one.items() if k in _SAMPLE} for one in samples
    ]
    word = str(options.get("trigger_word") or "")
    for i, item in enumerate(items):
        item["prompt"] = str(item.get("prompt", "")).replace("[trigger]", word)
        if walk:
            item.setdefault("seed", seed + i)
    return items
