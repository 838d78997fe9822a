"""The LLM that sees: against transformers' LLaVA and the official way to crop what it
makes, from the layouts in use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.models.hunyuan_video.sight import MEAN, STD
from hvtrain.models.hunyuan_video.text import (
    SEEING_TEMPLATE,
    SeenPrompt,
    open_llm_tokenizer,
    open_text,
    text_fingerprints,
)
from hvtrain.tiny.text import ASSETS
from tests.models.sight import SIDE, TOKENS, VISION, save_sight
from tests.models.test_text import llama3_like, relative

LLM, CLIP = ASSETS / "llm", ASSETS / "clip"
PROMPTS = ["a red circle moves left on a gray background", "", "rabbit " * 400]


def picture(width: int, height: int, seed: int = 0) -> torch.Tensor:
    """Bytes as [-1, 1], smooth enough that scaling is not all of it."""
    coarse = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed)) * 255
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].round() / 127.5 - 1


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A LLaVA directory as transformers saves it: the tiny LLM's weights, a random tower and projector."""
    folder = tmp_path_factory.mktemp("llava")
    text = json.loads((LLM / "config.json").read_text())
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**{**text, "dtype": "float32"}),
        image_token_index=5, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).float().eval()
    model.model.language_model.load_state_dict(load_file(LLM / "model.safetensors"))
    for p in (*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()):
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim > 1 else 0.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((LLM / name).read_bytes())
    return folder


@torch.no_grad()
def official(
    model: LlavaForConditionalGeneration, prompt: str, pixels: torch.Tensor, *, every: int
) -> torch.Tensor:
    """What the official encoder keeps: padded to its full length, with <image> as a token, cropped by counts,
    which its constants are of the real tokenizer."""
    tokenizer = Tokenizer.from_file(f"{LLM}/tokenizer.json")
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    image, pad, n = tokenizer.token_to_id("<image>"), tokenizer.token_to_id("<pad>"), TOKENS
    crop = len(tokenizer.encode(SEEING_TEMPLATE.split("{}")[0]).ids)
    ids = tokenizer.encode(SEEING_TEMPLATE.format(prompt)).ids[: 256 + crop]
    breaks = [i for i, token in enumerate(ids) if token == tokenizer.token_to_id("\n\n")]
    end = breaks[-1] if len(breaks) == 4 else 256 + crop  # "in case the prompt is too long"
    mask = [1] * len(ids) + [0] * (256 + crop - len(ids))
    ids += [pad] * (256 + crop - len(ids))
    at = ids.index(image)
    embeddings = model.get_input_embeddings()
    table = [embeddings(torch.tensor(part, dtype=torch.long)) for part in (ids[:at], ids[at + 1 :])]
    whole = torch.cat([table[0], model.get_image_features(pixels[None]).pooler_output[0], table[1]])[None]
    full_mask = torch.tensor([mask[:at] + [1] * n + mask[at + 1 :]])
    states = model(
        inputs_embeds=whole, attention_mask=full_mask, output_hidden_states=True
    ).hidden_states[-3][0]
    text = torch.cat([states[crop - 1 + n : end - 1 + n - 4], states[end - 1 + n :]])
    keep = torch.tensor(mask[crop : end - 4] + mask[end:], dtype=torch.bool)
    return torch.cat([states[at : at + n][::every], text[keep]])


def test_equals_the_official_procedure(llava):
    model = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).eval()
    encoders = open_text({"llm": str(llava), "clip": str(CLIP)}, dtype=torch.float32, sees=4)
    plain = open_text({"llm": str(LLM), "clip": str(CLIP)}, dtype=torch.float32)
    images = [picture(56, 40), picture(32, 72, 1), None]
    found = encoders.encode(PROMPTS, images)
    n_seen = -(-TOKENS // 4)
    # The prompt's own tokens and the last line break; of the long one 252.
    assert [len(f["seen_text"]) - n_seen for f in found] == [9 + 1, 1, 252]
    for prompt, image, f in zip(PROMPTS, images, found, strict=True):
        black = torch.full((3, SIDE, SIDE), -1.0)
        wanted = official(model, prompt, encoders.sight.prepared(black if image is None else image), every=4)
        assert f["seen_text"].shape == wanted.shape and relative(f["seen_text"], wanted) < 1e-5
        assert torch.equal(f["pooled"], plain.encode([prompt])[0]["pooled"])
    other = encoders.encode(PROMPTS[:1], [picture(56, 40, 2)])[0]["seen_text"]
    assert relative(other[n_seen:], found[0]["seen_text"][n_seen:]) > 1e-3  # the words know the image
    assert torch.equal(encoders.encode([""])[0]["seen_text"], encoders.encode([""], [None])[0]["seen_text"])
    every_second = open_text({"llm": str(llava), "clip": str(CLIP)}, dtype=torch.float32, sees=2)
    assert len(every_second.encode(PROMPTS[:1], images[:1])[0]["seen_text"]) == -(-TOKENS // 2) + 10
    for one, sees in ((encoders, 4), (every_second, 2)):
        assert one.fingerprint in text_fingerprints({"llm": str(llava), "clip": str(CLIP)}, sees=sees)
    assert len({encoders.fingerprint, every_second.fingerprint, plain.fingerprint}) == 3


@pytest.mark.parametrize(("width", "height"), [(80, 48), (40, 96), (100, 100)])
def test_pixels_are_those_of_the_librarys_processor(llava, width, height):
    from transformers import CLIPImageProcessorPil

    encoders = open_text({"llm": str(llava), "clip": str(CLIP)}, dtype=torch.float32, sees=4)
    image = picture(width, height)
    pil = Image.fromarray(((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    wanted = torch.from_numpy(np.asarray(processor(pil, return_tensors="np")["pixel_values"][0]))
    found = encoders.sight.prepared(image)
    step = 1 / 255 / min(STD)
    assert found.shape == wanted.shape == (3, SIDE, SIDE)
    # PIL rounds twice
    assert (found - wanted).abs().max() < 1.01 * step and (found - wanted).abs().mean() < 0.25 * step
    assert processor.image_mean == pytest.approx(MEAN) and processor.image_std == pytest.approx(STD)


def test_comfy_files_give_the_same(llava, tmp_path):
    """Language model, and tower with projector, each a file of its own."""
    state = load_file(llava / "model.safetensors")
    parts = {"language_model.": {}, "vision_tower.": {}, "multi_modal_projector.": {}}
    for name, tensor in state.items():
        part = next(part for part in parts if part in name)
        parts[part][name.split(part)[1].removeprefix("model.").removeprefix("vision_model.")] = tensor
    config = json.loads((llava / "config.json").read_text())
    words = {f"model.{n}": t for n, t in parts["language_model."].items() if not n.startswith("lm_head")}
    save_file(words, tmp_path / "llm.safetensors", metadata={"hvtrain.config": json.dumps(config)})
    vision = {f"vision_model.{n}": t for n, t in parts["vision_tower."].items()}
    vision |= {f"multi_modal_projector.{n}": t for n, t in parts["multi_modal_projector."].items()}
    save_file(vision, tmp_path / "vision.safetensors", metadata={"hvtrain.config": json.dumps(config)})
    files = {"llm": str(tmp_path / "llm.safetensors"), "llm_tokenizer": str(LLM), "clip": str(CLIP)}
    split = open_text(
        {**files, "llm_vision": str(tmp_path / "vision.safetensors")}, dtype=torch.float32, sees=4
    )
    whole = open_text({"llm": str(llava), "clip": str(CLIP)}, dtype=torch.float32, sees=4)
    for image in (picture(56, 40), None):
        a, b = (one.encode(PROMPTS[:1], [image])[0]["seen_text"] for one in (split, whole))
        assert relative(a, b) < 1e-6
    with pytest.raises(
        ConfigError,
        match=r"model.llm_vision is not set, and .*llm.safetensors holds no vision tower: image to"
    ):
        open_text(files, sees=4)


def test_wrong_files_are_named(tmp_path):
    files = {"llm": str(LLM), "clip": str(CLIP)}
    with pytest.raises(CheckpointError, match="not a LLaVA vision tower"):
        open_text({**files, "llm_vision": str(LLM)}, sees=4)
    other = save_sight(tmp_path / "other.safetensors", width=48)
    with pytest.raises(
        CheckpointError, match="its projector makes embeddings of width 48, the LLM's are 64: of another LLM"
    ):
        open_text({**files, "llm_vision": str(other)}, device="meta", sees=4)


def test_the_official_crop(tmp_path):
    tokens = open_llm_tokenizer(llama3_like(tmp_path, begin_rule=True))
    ids = SeenPrompt.of("a " * 1000, tokens)
    assert ids.cut and len(ids.before) + 1 + ids.crop == 103 and len(ids.behind) == ids.crop + 256
