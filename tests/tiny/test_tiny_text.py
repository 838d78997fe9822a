"""The tiny text encoders: any prompt can be encoded, and their features tell the captions' words apart."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from hvtrain.models import find
from hvtrain.models.hunyuan_video.text import TEMPLATE, open_text
from hvtrain.models.wan.text import open_text as open_umt5
from hvtrain.tiny import clips
from hvtrain.tiny import text as recipe

PROMPTED = (
    "a an the red green blue yellow cyan magenta white black orange purple pink brown gray dark light circle "
    "square triangle star cross ring diamond heart moves move moving left right up down on background spins "
    "grows shrinks bounces flashes zigzag diagonal still rabbit forest grass big buck bunny cartoon animated "
    "clip of with and is striped checkered dotted plain"
).split()


@pytest.fixture(scope="module")
def encoders():
    return open_text({name: str(recipe.ASSETS / name) for name in ("llm", "clip")}, dtype=torch.float32)


@pytest.fixture(scope="module")
def umt5():
    return open_umt5({"t5": str(recipe.ASSETS / "wan/t5")}, dtype=torch.float32)


@pytest.mark.parametrize("model", ["hunyuan-video", "wan"])
def test_the_recipe_makes_the_shipped_files(model, tmp_path):
    recipe.write_assets(model, tmp_path)
    tiny = find(model).tiny()
    for text in tiny.text:
        made, shipped = tmp_path / text.part, recipe.ASSETS / tiny.folder / text.part
        assert (made / "tokenizer.json").read_text() == (shipped / "tokenizer.json").read_text()
        new, old = load_file(made / "model.safetensors"), load_file(shipped / "model.safetensors")
        assert new.keys() == old.keys()
        for key in new:  # to the last bit of half precision: a normal draw's logarithm differs between CPUs
            torch.testing.assert_close(new[key], old[key], rtol=2e-3, atol=1e-6)
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.*") if f.is_file()) < 1_500_000


def test_words_are_single_tokens(encoders, umt5):
    llm, clip = encoders.llm_tokenizer.tokenizer, encoders.clip_tokenizer
    made = clips.training_clips(80, seed=0) + clips.concept_clips(12, seed=0)
    words = {w for c in made for w in c.caption.split()}
    for word in {*PROMPTED, *words}:
        assert llm.encode(word).tokens == ["<|begin_of_text|>", f"Ġ{word}"]
        assert clip.encode(word).tokens == ["<|startoftext|>", f"Ġ{word}", "<|endoftext|>"]
    assert llm.encode(TEMPLATE.format("a Red circle")).tokens[encoders.llm_tokenizer.crop :] == [
        "Ġa", "Ġred", "Ġcircle", "<|eot_id|>",
    ]
    assert encoders.llm_tokenizer.crop == 11
    for word in words:
        assert umt5.tokenizer.encode(word).tokens == [f"Ġ{word}", "</s>"]


@pytest.mark.parametrize(
    "prompt", ["", "Zürich, 日本! {} 🐇\n\nx", "q" * 3000, "<|eot_id|> \x00", "reddish circles"]
)
def test_every_string_can_be_encoded(encoders, prompt):
    llm, clip = encoders.llm_tokenizer.tokenizer, encoders.clip_tokenizer
    plain = prompt.lower().replace("<|eot_id|>", "")
    ids = llm.encode(plain).ids[1:]
    assert llm.token_to_id("<|begin_of_text|>") not in ids  # the unknown token
    # Nothing is lost: the bytes come back from the pieces.
    pieces = "".join(t.removeprefix("##") for t in llm.encode(plain.replace("\n\n", "")).tokens[1:])
    assert recipe_decode(pieces).strip(" ") == plain.replace("\n\n", "").strip(" ")
    out = encoders.encode([prompt])[0]
    assert out["text"].shape[1] == 64 and 1 <= len(out["text"]) <= 256
    assert out["pooled"].shape == (64,) and out["text"].isfinite().all() and out["pooled"].isfinite().all()
    assert len(clip.encode(prompt).ids) <= 77


def recipe_decode(pieces: str) -> str:
    from tokenizers import decoders

    return decoders.ByteLevel().decode([pieces])


@pytest.mark.parametrize("name", ["encoders", "umt5"])
def test_a_linear_layer_tells_the_words_apart(name, request):
    made = clips.training_clips(160, seed=1) + clips.concept_clips(24, seed=0)
    captions = [c.caption for c in made][::-1]
    words = sorted({w for c in captions for w in c.split()})
    out = request.getfixturevalue(name).encode(captions)
    # Tokens: what a word's state has in common over all captions outweighs what its context adds.
    states = torch.cat([o["text"][:-1] for o in out])
    labels = torch.tensor([words.index(w) for c in captions for w in c.split()])
    means = torch.stack([states[labels == i].mean(0) for i in range(len(words))])
    assert (torch.cdist(states, means).argmin(1) == labels).all()
    assert (states - means[labels]).std() < 0.3 * means.std()
    if "pooled" not in out[0]:
        return
    # Pooled: the presence of each word can be read off linearly, on captions not used for the fit.
    pooled = torch.stack([o["pooled"] for o in out])
    present = torch.tensor([[float(w in c.split()) for w in words] for c in captions])
    design = torch.cat([pooled, torch.ones(len(pooled), 1)], 1)
    weights = torch.linalg.lstsq(design[::2], present[::2]).solution
    assert ((design[1::2] @ weights - present[1::2]).abs() < 0.5).all()
