"""Wan's transformer against the official implementation, diffusers and the full-size key
lists; its flavors and inputs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvtrain.adapters.attach import linear_shapes
from hvtrain.config import EncodeConfig, GenerateConfig, TrainConfig, load
from hvtrain.errors import CheckpointError, DataError
from hvtrain.lorafiles.files import read_lora
from hvtrain.models import find
from hvtrain.models.identify import flavor_of
from hvtrain.models.listing import keys
from hvtrain.models.load import identify
from hvtrain.models.wan.flavors import told_by
from hvtrain.models.wan.inputs import WanInput
from tests.oracles.check import LIMIT, errors

SPEC = find("wan")
ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
ARCH = replace(
    SPEC.flavor("tiny").arch, dim=72, ffn_dim=128, n_heads=3, n_layers=2, freq_dim=32, text_dim=24,
    text_len=512
)
I2V = replace(ARCH, in_channels=36, clip_dim=40)
TI2V = replace(ARCH, in_channels=48, out_channels=48)


def build(arch=ARCH):
    """Unit-scale weights: with small ones attention is uniform and much that is wrong would not show."""
    draw, model = torch.Generator().manual_seed(0), SPEC.build(arch).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=(p[0].numel() if p.ndim > 1 and len(p) > 1 else 1) ** -0.5, generator=draw)
    return model


def an_input(arch=ARCH, lengths=(5, 3), clean=()):
    """clean: samples whose first latent frame is given."""
    draw, n = torch.Generator().manual_seed(3), len(lengths)
    text = torch.randn(n, max(lengths), arch.text_dim, generator=draw)
    for row, length in zip(text, lengths, strict=True):
        row[length:] = 0
    cond = {"text": text}
    if arch.clip_dim:
        cond["clip"] = torch.randn(n, arch.n_clip or 257, arch.clip_dim, generator=draw)
    x = torch.randn(n, arch.in_channels, 3, 4, 6, generator=draw)
    given = torch.zeros(n, 3, dtype=torch.bool)
    given[list(clean), 0] = True
    t = torch.rand(n, generator=draw) * 1000
    return WanInput(x=x, t=t, cond=cond, lengths={"text": lengths}, clean=given if clean else None)


def one_of(inp, i):
    n = inp.lengths["text"][i]
    cond = {k: v[i : i + 1, :n] if k == "text" else v[i : i + 1] for k, v in inp.cond.items()}
    clean = None if inp.clean is None else inp.clean[i : i + 1]
    return replace(
        inp, x=inp.x[i : i + 1], t=inp.t[i : i + 1], cond=cond, lengths={"text": (n,)}, clean=clean
    )


@pytest.mark.parametrize("name", ["wan_t2v_dit", "wan21_flf2v_dit", "wan22_ti2v_dit", "wan22_t2v_sample"])
def test_output_and_gradients_equal_the_official_model(name):
    found = errors(str(DATA / f"{name}.safetensors"))
    assert len(found) > 4 and max(found.values()) <= LIMIT, max(found, key=found.get)


def in_diffusers(arch, state):
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=arch.n_heads, attention_head_dim=arch.head_dim, in_channels=arch.in_channels,
        out_channels=arch.out_channels, text_dim=arch.text_dim, freq_dim=arch.freq_dim, ffn_dim=arch.ffn_dim,
        num_layers=arch.n_layers, image_dim=arch.clip_dim or None,
        added_kv_proj_dim=arch.dim if arch.clip_dim else None, pos_embed_seq_len=arch.n_clip or None,
    ).eval()
    cuts = SPEC.key_maps["diffusers"].write(state)
    model.load_state_dict({name: cut.take(state[cut.source]) for name, cut in cuts.items()}, strict=True)
    return model


@pytest.mark.parametrize(
    ("arch", "clean"), [(ARCH, ()), (I2V, ()), (replace(I2V, n_clip=514), ()), (TI2V, (1,))],
    ids=["t2v", "i2v", "flf2v", "5b"]
)
@torch.no_grad()
def test_equal_to_diffusers_with_converted_weights_at_every_length_of_text(arch, clean):
    """Padding to 512 is attended there as here: 511 and 512 tokens, and short ones, in one batch."""
    model, inp = build(arch), an_input(arch, (511, 512, 7), clean)
    t = inp.t if not clean else torch.where(inp.clean.repeat_interleave(6, 1), 0.0, inp.t[:, None])
    theirs = in_diffusers(arch, model.state_dict())(
        hidden_states=inp.x, timestep=t, encoder_hidden_states=inp.cond["text"], return_dict=False,
        encoder_hidden_states_image=inp.cond["clip"].reshape(-1, 257, arch.clip_dim)
        if arch.clip_dim else None,
    )[0]
    assert (model(inp) - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize(("arch", "clean"), [(I2V, ()), (TI2V, (0, 2))], ids=["i2v", "5b"])
@torch.no_grad()
def test_a_mixed_batch_equals_its_samples_alone(arch, clean):
    model, batch = build(arch), an_input(arch, (5, 3, 9), clean)
    whole = model(batch)
    for i in range(3):
        assert torch.allclose(model(one_of(batch, i))[0], whole[i], atol=2e-5)


@torch.no_grad()
def test_clean_tokens_are_modulated_as_at_time_zero():
    model, inp = build(TI2V), an_input(TI2V, clean=(0, 1))
    everything = replace(inp, clean=torch.ones_like(inp.clean))
    assert torch.allclose(model(everything), model(replace(inp, clean=None, t=torch.zeros(2))), atol=1e-5)
    assert not torch.allclose(model(inp), model(replace(inp, clean=None)), atol=1e-2)


def test_a_prompt_longer_than_the_model_reads_is_refused():
    with pytest.raises(DataError, match="513 tokens, at most 512"):
        build()(an_input(lengths=(513,)))


class Seen(TorchDispatchMode):
    """Every tensor that a forward makes."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


def test_no_modulation_is_made_or_kept_for_each_token():
    """[B S 6 E] in fp32 is 9 GB of a 14B at 720p. For two kinds of tokens there are two vectors."""
    kept, model, inp = [], build(replace(TI2V, text_len=16)), an_input(TI2V, clean=(0, 1))
    model.requires_grad_(False)
    inp = replace(inp, x=inp.x.requires_grad_())
    with Seen() as seen, torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(inp)
    n, dim = 18, TI2V.dim
    assert not [
        shape for shape in seen.shapes if torch.Size(shape).numel() >= 2 * n * 6 * dim and shape[-1] == dim
    ]
    block = [x for x in kept if x.shape == (2, n, dim) and x.dtype == torch.float32]
    # Norms, their inputs and what the gates multiply; with vectors per token, 4 more a block
    assert len(block) / TI2V.n_layers < 11


def test_time_and_residual_are_fp32_whatever_the_weights_are():
    """bf16 weights under autocast: the embedding of t has all its digits, as the
    official float32 islands give."""
    model, inp = build().to(torch.bfloat16), an_input()
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: streams.append(out.img.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out, times = model(inp), model.times(inp.t)
    wide = build()
    wide.load_state_dict(model.state_dict())  # the same values in fp32
    assert out.dtype == torch.float32 and streams == [torch.float32] * 2
    assert torch.equal(times["e0"], wide.times(inp.t)["e0"])
    a, b = wide.times(torch.tensor([988.0]))["e"], wide.times(torch.tensor([988.49]))["e"]
    assert not torch.allclose(a, b, atol=1e-3)  # bf16 would round both to 988


def test_rope_is_computed_in_double_precision():
    tokens = build().embed(an_input())
    assert tokens.rope.cos.dtype == torch.float64 and ARCH.rope_dims == (8, 8, 8)
    assert SPEC.flavor("t2v-14b").arch.rope_dims == (44, 42, 42)


# --- full size ----------------------------------------------------------------------------------------------


def official(flavor):
    rows = [line.split("\t") for line in (DATA / "wan_dit.tsv").read_text().splitlines()]
    return {
        name.format(n): shape for which, blocks, name,
        shape in rows if which == flavor for n in range(int(blocks or 1))
    }


@pytest.mark.parametrize(
    ("flavor", "n"),
    [("t2v-1.3b", 825), ("t2v-14b", 1095), ("i2v-14b-480p", 1303), ("flf2v-14b", 1304), ("t2v-a14b", 1095),
     ("i2v-a14b", 1095), ("ti2v-5b", 825)],
)
def test_full_size_keys_equal_the_official_ones(flavor, n):
    ours = dict(line.split("\t") for line in keys("wan", flavor))
    assert len(ours) == n and ours == official(flavor)


@pytest.mark.parametrize(
    ("flavor", "n"),
    [("t2v-1.3b", 300), ("ti2v-5b", 300), ("t2v-a14b", 400), ("i2v-a14b", 400), ("i2v-14b-720p", 480)]
)
def test_a_lora_adapts_every_linear_of_the_blocks(flavor, n):
    with torch.device("meta"):
        model = SPEC.build(SPEC.flavor(flavor).arch)
    names = SPEC.lora_targets(model)
    assert (
        len(names) == n
        and all(re.fullmatch(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.\w+", name) for name in names)
    )
    parts = {name.split(".", 2)[2] for name in names}
    assert (
        {"self_attn.q", "cross_attn.o", "ffn.0", "ffn.2"} <= parts
        and ("cross_attn.k_img" in parts) == (n == 480)
    )


def pair(name):
    draw = torch.Generator().manual_seed(len(name))
    return torch.randn(2, 72, generator=draw), torch.randn(72, 2, generator=draw)


@pytest.mark.parametrize(
    "spelling",
    ["lora_unet_{_}.lora_down.weight lora_unet_{_}.lora_up.weight",
     "diffusion_model.{}.lora_A.weight diffusion_model.{}.lora_B.weight",
     "{}.lora_A.default.weight {}.lora_B.default.weight", "transformer.{d}.lora_A.weight "
     "transformer.{d}.lora_B.weight"],
    ids=["musubi", "comfy", "diffsynth", "diffusers"],
)
def test_loras_of_other_programs_are_read(spelling, tmp_path):
    layers = {
        "blocks.0.self_attn.q": "blocks.0.attn1.to_q", "blocks.1.cross_attn.o": "blocks.1.attn2.to_out.0",
        "blocks.1.cross_attn.k_img": "blocks.1.attn2.add_k_proj",
    }
    tensors = {}
    for name, theirs in layers.items():
        names = spelling.replace(
            "{_}", name.replace(".", "_")
        ).replace("{d}", theirs).replace("{}", name).split()
        tensors.update({key: x.clone() for key, x in zip(names, pair(name), strict=True)})
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_lora(tmp_path / "a.safetensors", linear_shapes(build(I2V)), spec=SPEC).pairs
    assert set(found) == set(layers)
    for name, got in found.items():
        assert torch.equal(got.down, pair(name)[0]) and torch.equal(got.up, pair(name)[1])


# --- whose file is it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "flavor"),
    [
        ("Wan2.2-T2V-A14B/high_noise_model", "t2v-a14b"),
        ("wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors", "t2v-a14b"),
        ("wan2.2_i2v_high_noise_14B_fp16.safetensors", "i2v-a14b"),
        ("wan2.1_i2v_480p_14B_bf16.safetensors", "i2v-14b-480p"),
        ("Wan2.1-I2V-14B-720P", "i2v-14b-720p"),
        ("Wan2.1-FLF2V-14B-720P", "flf2v-14b"),
        ("wan2.1_t2v_14B_fp16.safetensors", None),
        ("wan2.2_ti2v_5B_fp16.safetensors", None),  # its shapes tell
        ("model.safetensors", None),
    ],
)
def test_names_of_files_tell_what_shapes_do_not(path, flavor):
    assert told_by(Path("ckpts") / path) == flavor


def test_the_path_is_believed_where_it_fits():
    arch = SPEC.flavor("t2v-14b").arch
    assert flavor_of(SPEC, arch, None, likely="t2v-a14b").name == "t2v-a14b"
    assert flavor_of(SPEC, arch, None, likely="i2v-a14b").name == "t2v-14b"  # it does not fit
    assert flavor_of(SPEC, arch, "t2v-14b", likely="t2v-a14b").name == "t2v-14b"  # the user knows better
    assert flavor_of(SPEC, SPEC.flavor("i2v-a14b").arch, None).name == "i2v-a14b"
    small = replace(SPEC.flavor("i2v-14b-720p").arch, n_layers=2)
    assert flavor_of(SPEC, small, None).tasks == ("i2v",)


@pytest.mark.parametrize("dialect", ["official", "diffusers"])
def test_a_file_without_metadata_is_known_by_its_shapes(dialect, tmp_path):
    arch = SPEC.flavor("tiny").arch
    state = build(arch).state_dict()
    cuts = SPEC.key_maps[dialect].write(state)
    save_file({n: c.take(state[c.source]).clone() for n, c in cuts.items()}, tmp_path / "a.safetensors")
    found = identify(tmp_path / "a.safetensors")
    assert (found.spec.name, found.flavor.name, found.arch, found.dialect) == ("wan", "tiny", arch, dialect)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ("vace_blocks.0.before_proj.weight", "Wan VACE"),
        ("face_adapter.fuser_blocks.0.linear1_q.weight", "Wan Animate"),
        ("casual_audio_encoder.encoder.conv1_local.conv.weight", "Wan S2V"),
        ("control_adapter.conv.weight", "Wan Fun-Camera"),
        ("ref_conv.weight", "Wan Fun-C"),
    ],
)
def test_relatives_are_refused_by_name(more, name, tmp_path):
    save_file({**build().state_dict(), more: torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"looks like {name}"):
        identify(tmp_path / "a.safetensors")


def test_fun_control_is_refused_by_its_channels(tmp_path):
    save_file(build(replace(ARCH, in_channels=48)).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="48 input channels: Fun-Control"):
        identify(tmp_path / "a.safetensors")


def test_a_width_that_hides_the_heads_needs_metadata(tmp_path):
    save_file(build().state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a width of 72 .* 'hvtrain.arch'"):
        identify(tmp_path / "a.safetensors")


# --- inputs -------------------------------------------------------------------------------------------------


def made(flavor, *, x0=None, **cond):
    text = {"text": torch.ones(2, 4, 64), "text_len": torch.tensor([4, 2])}
    x = torch.randn(
        2, SPEC.flavor(flavor).latent.channels, 3, 4, 4, generator=torch.Generator().manual_seed(1)
    )
    task, sigma = cond.pop("task", SPEC.flavor(flavor).tasks[0]), torch.tensor([0.5, 0.25])
    return x, SPEC.make_input(x, sigma, {**text, **cond}, task=task, guidance=None, x0=x0)


def test_image_to_video_puts_a_mask_and_the_image_beside_the_noise():
    known = torch.full((2, 16, 3, 4, 4), 7.0)
    x, inp = made("i2v-a14b", image_latents=known)
    assert (
        torch.equal(inp.x[:, :16], x) and torch.equal(inp.x[:, 20:], known)
        and inp.t.tolist() == [500.0, 250.0]
    )
    assert inp.x[0, 16:20, :, 0, 0].tolist() == [[1, 0, 0]] * 4 and inp.loss_mask is None
    _, both = made("flf2v-14b", image_latents=known, clip=torch.zeros(2, 514, 1280))
    assert (
        both.x[1, 16:20, :, 3, 3].tolist() == [[1, 0, 0]] * 3 + [[1, 0, 1]]
        and both.cond["clip"].shape == (2, 514, 1280)
    )
    with pytest.raises(DataError, match="the whole clip"):
        made("i2v-a14b", image_latents=known[:, :, :1])
    with pytest.raises(DataError, match="needs the condition 'image_latents'"):
        made("i2v-a14b")


def test_the_5b_takes_an_image_or_none_sample_by_sample():
    image = torch.full((2, 48, 1, 4, 4), 7.0)
    x, plain = made("ti2v-5b")
    assert torch.equal(plain.x, x) and plain.clean is None and plain.loss_mask is None
    _, inp = made("ti2v-5b", image_latents=image)
    assert (inp.x[:, :, 0] == 7).all() and torch.equal(inp.x[:, :, 1:], x[:, :, 1:])
    assert (
        inp.clean.tolist() == [[True, False, False]] * 2
        and inp.loss_mask[:, 0, :, 0, 0].tolist() == [[0, 1, 1]] * 2
    )
    _, mixed = made("ti2v-5b", image_latents=image, image_given=torch.tensor([False, True]))
    assert torch.equal(mixed.x[0], x[0]) and torch.equal(mixed.x[1], inp.x[1]) and mixed.loss_mask[0].all()
    _, own = made("ti2v-5b", task="i2v-frame", x0=torch.full((2, 48, 3, 4, 4), 5.0))
    assert (own.x[:, :, 0] == 5).all()
    with pytest.raises(DataError, match="image_latents"):
        made("ti2v-5b", task="i2v-frame")


def test_experts_share_the_noise_levels():
    for name, boundary, scales in (("t2v-a14b", 0.875, (4.0, 3.0)), ("i2v-a14b", 0.9, (3.5, 3.5))):
        flavor = SPEC.flavor(name)
        high, low = flavor.experts
        assert (high.part, low.part) == ("dit", "dit_low") and (high.cfg_scale, low.cfg_scale) == scales
        assert [
            flavor.expert(s).name for s in (1.0, boundary, boundary - 1e-4, 0.0)
        ] == ["high", "high", "low", "low"]
    assert SPEC.flavor("t2v-14b").expert(0.5) is None


def test_flavors_are_sampled_as_officially():
    """steps, shift, scale, solver, frames, size and the beginning of the negative prompt, from
    the official configurations."""
    for name, *want in (
        ("t2v-1.3b", 50, 5, 6, 81, 16, "832x480", "色调"), ("t2v-14b", 50, 5, 5, 81, 16, "1280x720", "色调"),
        ("i2v-14b-480p", 40, 3, 5, 81, 16, "832x480", "镜头晃动，色调"),
        ("i2v-14b-720p", 40, 5, 5, 81, 16, "1280x720", "镜头晃动，"),
        ("flf2v-14b", 50, 16, 5, 81, 16, "1280x720", "镜头切换，镜头晃动，色调"),
        ("t2v-a14b", 40, 12, 4, 81, 16, "1280x720", "色调"),
        ("i2v-a14b", 40, 5, 3.5, 81, 16, "1280x720", "色调"),
        ("ti2v-5b", 50, 5, 5, 121, 24, "1280x704", "色调"),
    ):
        flavor = SPEC.flavor(name)
        d = flavor.defaults
        assert [d.steps, d.shift, d.cfg_scale, d.frames, d.fps, f"{d.width}x{d.height}"] == want[:-1], name
        assert d.negative_prompt.startswith(want[-1]) and d.solver == "unipc" and d.guidance is None
        shape = flavor.latent.shape(frames=d.frames, height=d.height, width=d.width)
        tokens = {"832x480": 32760, "1280x720": 75600, "1280x704": 27280}[want[-2]]
        assert flavor.latent.n_tokens(shape) == tokens


def test_its_configs_are_sound():
    for name, kind in (
        ("lora", TrainConfig), ("loraid", TrainConfig), ("encode", EncodeConfig), ("generate", GenerateConfig)
    ):
        cfg = load(kind, ROOT / "configs" / "wan" / f"{name}.yaml")
        assert cfg.model.name == "wan" and set(cfg.model.parts) <= set(SPEC.parts)
        assert SPEC.flavor(cfg.model.flavor).experts
