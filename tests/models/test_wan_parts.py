"""Wan's VAEs, UMT5 and CLIP against the official implementations and the libraries,
from every layout they come in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hvtrain.errors import CheckpointError, ConfigError, DataError
from hvtrain.models import find
from hvtrain.models.identify import count
from hvtrain.models.listing import keys
from hvtrain.models.wan.clip import ANCHORS as CLIP_ANCHORS
from hvtrain.models.wan.clip import open_clip
from hvtrain.models.wan.flavors import NEGATIVE_PROMPT
from hvtrain.models.wan.images import image_conditions
from hvtrain.models.wan.text import cleaned, load_umt5, open_text, text_fingerprints
from hvtrain.models.wan.vae import build_vae, config_of, official_name, open_vae
from hvtrain.weights.float8 import Fp8Linear
from hvtrain.weights.source import anchored
from tests.oracles.check import LIMIT, errors

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize(
    "name",
    [
        "wan21_vae", "wan22_vae", "wan_umt5", "wan21_clip_visual", "wan21_i2v_condition",
        "wan21_flf2v_condition"
    ],
)
def test_equal_to_the_official_implementation(name):
    found = errors(str(DATA / f"{name}.safetensors"))
    assert found and max(found.values()) <= LIMIT, max(found, key=found.get)


def shapes_in(name):
    rows = (line.split("\t") for line in (DATA / f"{name}.tsv").read_text().splitlines())
    return {key: tuple(int(n) for n in shape.split("x") if n) for key, shape in rows}


def weights_of(name):
    tensors = load_file(DATA / f"{name}.safetensors")
    return {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}


def draw(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- VAE ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "n", "stride"), [("wan21_vae", 194, 8), ("wan22_vae", 196, 16)])
def test_full_size_vae_keys_equal_the_official_ones(name, n, stride):
    shapes = shapes_in(name)
    config = config_of(shapes, "a.pth")
    with torch.device("meta"):
        state = build_vae(config).state_dict()
    ours = {official_name(k, 2, by_stage=config["is_residual"]): tuple(t.shape) for k, t in state.items()}
    assert config["num_res_blocks"] == 2 and len(ours) == len(state) == n and ours == shapes
    assert config["scale_factor_spatial"] == stride


@pytest.mark.parametrize("name", ["wan21_vae", "wan22_vae"])
def test_a_vae_is_read_from_pth_and_from_the_librarys_files(name, tmp_path):
    state = weights_of(name)
    torch.save(state, tmp_path / "vae.pth")
    vae = open_vae(tmp_path / "vae.pth")
    library = tmp_path / "vae"
    library.mkdir()
    save_file({n: t.contiguous() for n, t in vae.model.state_dict().items()}, library / "model.safetensors")
    video, again = draw(1, 3, 5, 32, 32), open_vae(library)
    latents = vae.encode(video)
    assert torch.equal(again.encode(video), latents) and again.fingerprint != vae.fingerprint
    assert latents.shape == (1, vae.channels, 2, 32 // vae.stride[1], 32 // vae.stride[2])
    seeds = torch.Generator().manual_seed(0)
    assert torch.equal(vae.encode(video, generator=seeds), latents)  # the mode, always
    state.pop("conv2.bias")
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match="1 missing: post_quant_conv.bias"):
        open_vae(tmp_path / "less.pth")


def test_a_vae_encodes_in_fp32_whatever_it_decodes_in(tmp_path):
    save_file(weights_of("wan21_vae"), tmp_path / "a.safetensors")
    wide, half = (open_vae(tmp_path / "a.safetensors", dtype=d) for d in (torch.float32, torch.bfloat16))
    video = draw(1, 3, 5, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half.encode(video), wide.encode(video))
    a, b = wide.decode(draw(1, 16, 2, 4, 4)), half.decode(draw(1, 16, 2, 4, 4))
    assert b.dtype == torch.float32 and 1e-5 < (a - b).norm() / a.norm() < 0.05
    assert a.abs().max() <= 1 < wide.decode(3 * draw(1, 16, 2, 4, 4), clamp=False).abs().max()


@torch.no_grad()
def test_a_clip_is_a_prefix_of_a_longer_one(tmp_path):
    """Causal: the first frame's latents are those of the image alone, which is how the 5B takes it."""
    save_file(weights_of("wan22_vae"), tmp_path / "a.safetensors")
    vae, video = open_vae(tmp_path / "a.safetensors"), draw(1, 3, 9, 32, 32)
    whole = vae.encode(video)
    assert torch.allclose(vae.encode(video[:, :, :1]), whole[:, :, :1], atol=1e-5)
    assert torch.allclose(vae.encode(video[:, :, :5]), whole[:, :, :2], atol=1e-5)
    with pytest.raises(DataError, match="4n\\+1"):
        vae.encode(video[:, :, :8])
    with pytest.raises(DataError, match="multiples of 16"):
        vae.encode(video[..., :24])


def test_what_is_no_vae_is_named(tmp_path):
    save_file(
        {"blocks.0.self_attn.q.weight": torch.ones(2), "patch_embedding.weight": torch.ones(2)},
        tmp_path / "a.safetensors"
    )
    with pytest.raises(CheckpointError, match="no 'encoder.conv1.weight'; it looks like Wan"):
        open_vae(tmp_path / "a.safetensors")


def test_an_image_is_resized_and_only_the_5b_gets_one_frame(tmp_path):
    for name, shape, frames in (("wan21_vae", (16, 3, 4, 6), 3), ("wan22_vae", (48, 3, 2, 4), 1)):
        save_file(weights_of(name), tmp_path / f"{name}.safetensors")
        vae = open_vae(tmp_path / f"{name}.safetensors")
        found = image_conditions(vae, {}, draw(3, 50, 70), shape)
        assert (
            set(found) == {"image_latents"} and found["image_latents"].shape == (shape[0], frames, *shape[2:])
        )
    with pytest.raises(DataError, match="48 channels, the model takes 16"):
        image_conditions(vae, {}, draw(3, 50, 70), (16, 3, 4, 6))


# --- UMT5 ---------------------------------------------------------------------------------------------------


def in_the_library(folder):
    """transformers' own encoder with the reference's weights, saved by it."""
    from transformers import UMT5Config, UMT5EncoderModel

    state = weights_of("wan_umt5")
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=96, d_model=64, d_kv=16, d_ff=112, num_layers=3, num_heads=4,
            feed_forward_proj="gated-gelu"
        )
    ).eval()
    from hvtrain.models.wan.text import ANCHORS

    cuts = ANCHORS["shared.weight"].write(state)
    theirs = {name: cut.take(state[cut.source]) for name, cut in cuts.items()}
    missing, unexpected = model.load_state_dict(theirs, strict=False)
    assert not unexpected and set(missing) <= {"encoder.embed_tokens.weight"}
    model.save_pretrained(folder)
    return model, theirs


@torch.no_grad()
def test_umt5_is_read_from_the_librarys_directory_and_comfys_file(tmp_path):
    library, theirs = in_the_library(tmp_path / "hf")
    ids = torch.arange(2, 90)[None]
    want = library(input_ids=ids).last_hidden_state
    ours, _ = load_umt5(tmp_path / "hf", dtype=torch.float32)
    assert (ours(ids) - want).norm() / want.norm() < 1e-5
    comfy = {n: t.clone() for n, t in theirs.items()} | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}
    for name in [n for n in comfy if n.endswith(("wi_0.weight", ".q.weight"))]:
        scale = comfy[name].abs().max() / 448
        comfy[name] = (comfy[name] / scale).to(torch.float8_e4m3fn)
        comfy[name.removesuffix("weight") + "scale_weight"] = scale
    save_file(
        {**comfy, "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "comfy.safetensors"
    )
    coarse, _ = load_umt5(tmp_path / "comfy.safetensors", dtype=torch.float32)
    assert 1e-4 < (coarse(ids) - want).norm() / want.norm() < 0.1


@torch.no_grad()
def test_umt5_in_float8(tmp_path):
    torch.save(weights_of("wan_umt5"), tmp_path / "a.pth")
    ids = torch.arange(2, 90)[None]
    plain, _ = load_umt5(tmp_path / "a.pth", dtype=torch.float32)
    small, _ = load_umt5(tmp_path / "a.pth", dtype=torch.float32, fp8=True)
    assert sum(isinstance(m, Fp8Linear) for m in small.modules()) == 3 * 7
    assert 1e-4 < (small(ids) - plain(ids)).norm() / plain(ids).norm() < 0.1


@pytest.mark.parametrize(
    ("flavor", "part", "name"),
    [
        ("t2v-1.3b", "vae", "wan21_vae"), ("i2v-a14b", "vae", "wan21_vae"), ("ti2v-5b", "vae", "wan22_vae"),
        ("ti2v-5b", "t5", "wan_umt5"),
    ],
)
def test_the_keys_of_a_part_are_listed_as_in_its_official_file(flavor, part, name):
    listed = [line.split("\t") for line in keys("wan", flavor, part)]
    assert {key: tuple(map(int, shape.split("x"))) for key, shape in listed} == shapes_in(name)
    assert len(listed) == len(shapes_in(name))


def test_of_which_parts_keys_are_listed():
    assert list(keys("wan", "t2v-a14b", "dit_low")) == list(
        keys("wan", "t2v-a14b", "dit")
    ) == list(keys("wan", "t2v-a14b"))
    with pytest.raises(
        ConfigError, match="--part clip: of wan the keys of dit, dit_low, vae, t5 can be listed"
    ):
        next(keys("wan", "t2v-a14b", "clip"))
    with pytest.raises(ConfigError, match="--part dit_low: of wan the keys of dit, vae, t5 can"):
        next(keys("wan", "ti2v-5b", "dit_low"))


def tokenizer(folder, *, end="</s>"):
    """One token a word, and the end."""
    words = ["<pad>", "</s>", "<unk>", "a", "cat", "red", "&", "dog"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, words.index(end))]
    )
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_prompts_are_encoded_alone_at_their_own_length(tmp_path):
    torch.save(weights_of("wan_umt5"), tmp_path / "t5.pth")
    tokenizer(tmp_path / "google" / "umt5-xxl")  # found beside the file
    text = open_text({"t5": str(tmp_path / "t5.pth")}, dtype=torch.float32)
    prompts = ["a cat", "", "a red  cat\n", "dog " * 600]
    together, alone = text.encode(prompts), [text.encode([p])[0] for p in prompts]
    assert [len(x["text"]) for x in together] == [3, 1, 4, 512]
    assert all(torch.equal(a["text"], b["text"]) for a, b in zip(together, alone, strict=True))
    assert torch.equal(text.encode(["a red cat"])[0]["text"], together[2]["text"])
    prints = text_fingerprints({"t5": str(tmp_path / "t5.pth")})
    assert prints[0] == text.fingerprint != prints[1]


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    parts = {"t5": str(tmp_path / "t5.pth")}
    torch.save(weights_of("wan_umt5"), parts["t5"])
    with pytest.raises(ConfigError, match="set t5_tokenizer"):
        open_text(parts)
    other = tokenizer(tmp_path / "other", end="<unk>")
    with pytest.raises(CheckpointError, match="does not end a text with </s>"):
        open_text({**parts, "t5_tokenizer": str(other)})
    with pytest.raises(CheckpointError, match="not a UMT5 text encoder"):
        save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
        load_umt5(tmp_path / "x.safetensors", dtype=torch.float32)


def test_prompts_are_cleaned_as_the_official_pipeline_does():
    """Expected values are ftfy 6.3.1's, html.unescape twice and the official white space."""
    for prompt, wanted in {
        "A “curly” quote’s test — dash…": "A \"curly\" quote's test — dash…",
        "&lt;b&gt; &amp;amp; x": "<b> & x",
        "Ｆｕｌｌ　ｗｉｄｔｈ！？": "Full width!?",
        "ﬁne ﬂow ﬀ Ǆ ĳ ŉ": "fine flow ff DŽ ij 'n",
        " tab\tand\r\nline\u2028 ": "tab and line",
        "e\u0301clair \x1b[31mred\x07": "éclair red",
        "日本語、テスト。 ½ ™": "日本語、テスト。 ½ ™",
    }.items():
        assert cleaned(prompt) == wanted
    assert cleaned(NEGATIVE_PROMPT).startswith("色调艳丽,过曝,静态,") and "，" not in cleaned(NEGATIVE_PROMPT)


# --- CLIP ---------------------------------------------------------------------------------------------------


def test_full_size_clip_keys_are_read_from_the_official_file(tmp_path):
    """From the file with both towers; what is not needed is not asked for."""
    tiny = {n: torch.zeros(1) for n in shapes_in("wan21_clip_visual")}
    save_file(
        {**tiny, "textual.model.embeddings.word_embeddings.weight": torch.zeros(1)},
        tmp_path / "a.safetensors"
    )
    source = anchored(tmp_path / "a.safetensors", CLIP_ANCHORS, what="a tower")
    assert source.sources["cls_embedding"].parts == ("visual.cls_embedding",)
    assert count(source.sources, r"transformer\.(\d+)\.") == 32
    from hvtrain.models.wan.clip import Vit

    with torch.device("meta"):
        model = Vit(dim=1280, mlp=5120, n_heads=16, n_layers=31, n_tokens=257, patch=14)
    wanted = {n.removeprefix("visual."): shape for n, shape in shapes_in("wan21_clip_visual").items()}
    unused = [n for n in wanted if n.startswith(("transformer.31.", "post_norm", "head"))]
    assert model.side == 224 and len(unused) == 15
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == {
        n: s for n, s in wanted.items() if n not in unused
    }


@torch.no_grad()
def test_clip_is_read_from_the_librarys_directory(tmp_path):
    """hidden_states[-2] of transformers' model: all blocks but the last."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    library = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=80, intermediate_size=96, num_hidden_layers=3, num_attention_heads=1, image_size=28,
            patch_size=14, hidden_act="gelu",
        )
    ).eval()
    library.save_pretrained(tmp_path)
    eye, pictures = open_clip({"clip": str(tmp_path)}), draw(2, 3, 40, 56)
    seen = eye.encode(pictures)
    want = library(eye.prepared(pictures), output_hidden_states=True).hidden_states[-2]
    assert seen[0]["clip"].shape == (5, 80) and (seen[1]["clip"] - want[1]).norm() / want[1].norm() < 1e-5
    save_file(weights_of("wan21_clip_visual"), tmp_path / "narrow.safetensors")
    with pytest.raises(CheckpointError, match="of width 64, expected ViT-H's 1280"):
        open_clip({"clip": str(tmp_path / "narrow.safetensors")})


def test_the_record_names_these_parts():
    spec = find("wan")
    assert set(spec.parts) == {"dit", "dit_low", "vae", "t5", "t5_tokenizer", "clip"}
    assert spec.column("clip").parts == ("clip",) and spec.flavor("flf2v-14b").given == (0, -1)
    assert spec.flavor("i2v-14b-480p").beyond_text == ["image_latents", "clip"]
    assert spec.flavor("i2v-a14b").beyond_text == ["image_latents"]
