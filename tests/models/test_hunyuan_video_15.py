"""HunyuanVideo 1.5's transformer against a second implementation and the full-size key lists; its flavors, inputs and LoRAs."""

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvtrain.adapters.attach import linear_shapes
from hvtrain.config import EncodeConfig, GenerateConfig, TrainConfig, load
from hvtrain.errors import CheckpointError, ConfigError, DataError
from hvtrain.generate.requests import Request, lacks
from hvtrain.generate.sample import sample_latents
from hvtrain.lorafiles.convert import converted
from hvtrain.lorafiles.dialects import DIALECTS
from hvtrain.lorafiles.files import read_lora, save_lora
from hvtrain.merge.policies import Contribution, Dense
from hvtrain.merge.write import plan_parts
from hvtrain.models import find
from hvtrain.models.conditions import example
from hvtrain.models.hunyuan_video_15.flavors import FLAVORS, told_by
from hvtrain.models.hunyuan_video_15.inputs import Hunyuan15Input, make_input
from hvtrain.models.hunyuan_video_15.musubi import MUSUBI, SCALING
from hvtrain.models.listing import keys
from hvtrain.models.load import identify, load_dit
from hvtrain.parallel.context import ParallelContext
from hvtrain.slices.plan import Cut, make_plan
from hvtrain.slices.run import target_shapes
from hvtrain.train.data import open_shards
from hvtrain.weights.float8 import quantize
from tests.oracles.check import LIMIT, errors

SPEC = find("hunyuan-video-15")
DATA = Path(__file__).parents[1] / "data"
ARCH = replace(
    SPEC.flavor("tiny").arch, in_channels=9, out_channels=4, hidden_size=64, heads_num=2, double=2, text_dim=24, glyph_dim=20,
    vision_dim=28,
)  # fmt: skip
STEPS = replace(ARCH, meanflow=True)


def build(arch=ARCH):
    """Unit-scale weights: with small ones attention is uniform and much that is wrong would not show."""
    draw, model = torch.Generator().manual_seed(0), SPEC.build(arch).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=(p[0].numel() if p.ndim > 1 else 1) ** -0.5, generator=draw)
    return model


def an_input(arch=ARCH, text=(7, 5), glyph=(4, 0), vision=(6, 6)):
    """Random states, garbage beyond each sample's length."""
    draw, n = torch.Generator().manual_seed(3), len(text)
    lengths = {"text": text, "glyph": glyph, "vision": vision}
    dims = {"text": arch.text_dim, "glyph": arch.glyph_dim, "vision": arch.vision_dim}
    cond = {kind: torch.randn(n, max(own) + 2, dims[kind], generator=draw) for kind, own in lengths.items()}
    x = torch.randn(n, arch.in_channels, 3, 4, 6, generator=draw)
    t, until = (torch.rand(n, generator=draw) * 1000 for _ in range(2))
    return Hunyuan15Input(x=x, t=t, cond=cond, lengths=lengths, until=until if arch.meanflow else None)


def in_diffusers(arch, state):
    from diffusers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel(
        in_channels=arch.in_channels, out_channels=arch.out_channels, num_attention_heads=arch.heads_num,
        attention_head_dim=arch.head_dim, num_layers=arch.double, text_embed_dim=arch.text_dim, text_embed_2_dim=arch.glyph_dim,
        image_embed_dim=arch.vision_dim, rope_axes_dim=arch.rope_dims, use_meanflow=arch.meanflow,
    ).eval()  # fmt: skip
    cuts = SPEC.key_maps["diffusers"].write(state)
    model.load_state_dict({name: cut.of(state) for name, cut in cuts.items()}, strict=True)
    return model


@pytest.mark.parametrize(
    ("arch", "vision"),
    [(ARCH, (0, 0)), (ARCH, (6, 6)), (STEPS, (6, 6)), (replace(STEPS, in_channels=14), (0, 0))],
    ids=["t2v", "i2v", "distilled in steps", "super-resolution"],
)
def test_output_and_gradients_equal_diffusers_with_converted_weights(arch, vision):
    """A sample without letters; pictures of zeros, which are masked out there and are none here."""
    arch = replace(arch, glyph_hidden=2048)  # fixed there
    model, inp = build(arch), an_input(arch, vision=vision)
    x, theirs = inp.x.clone().requires_grad_(), inp.x.clone().requires_grad_()
    masks = {k: (torch.arange(v.shape[1]) < torch.tensor(inp.lengths[k])[:, None]).long() for k, v in inp.cond.items()}
    out = model(replace(inp, x=x))
    other = in_diffusers(arch, model.state_dict())
    want = other(
        theirs, inp.t, inp.cond["text"], masks["text"], timestep_r=inp.until, encoder_hidden_states_2=inp.cond["glyph"],
        encoder_attention_mask_2=masks["glyph"], return_dict=False,
        image_embeds=inp.cond["vision"][:, :6] * masks["vision"][:, :6, None],
    )[0]  # fmt: skip
    out.pow(2).mean().backward()
    want.pow(2).mean().backward()
    assert out.std() > 0.1 and (out - want).norm() / want.norm() < 1e-5
    assert (x.grad - theirs.grad).norm() / theirs.grad.norm() < 1e-5
    for name, there in {"double_blocks.0.txt_attn_k": "transformer_blocks.0.attn.add_k_proj",
                        "byt5_in.fc2": "context_embedder_2.linear_2"}.items():  # fmt: skip
        a, b = model.get_submodule(name).weight.grad, other.get_submodule(there).weight.grad
        assert b.norm() > 0 and (a - b).norm() / b.norm() < 2e-5, name


def test_a_reference_file_is_read_as_the_official_model_reads_it(tmp_path):
    """Zeros for a picture are masked out in text to video only, and only where the whole batch has none."""
    arch = replace(STEPS, glyph_hidden=48, heads_num=4, rope_dims=(4, 6, 6))
    model, inp = build(arch), an_input(arch, vision=(0, 0))
    x = inp.x.clone().requires_grad_()
    output = model(replace(inp, x=x))
    output.pow(2).mean().backward()
    masks = {k: (torch.arange(v.shape[1]) < torch.tensor(inp.lengths[k])[:, None]).long() for k, v in inp.cond.items()}
    tensors = {f"weights.{n}": t for n, t in model.state_dict().items()} | {
        "input.x": inp.x, "input.t": inp.t, "input.r": inp.until, "input.text": inp.cond["text"], "input.mask": masks["text"],
        "input.byt5": inp.cond["glyph"], "input.byt5_mask": masks["glyph"], "input.vision": torch.zeros(2, 5, arch.vision_dim),
        "output": output.detach(), "grad_x": x.grad, "grad.time_r_in.mlp.2.bias": model.time_r_in.mlp[2].bias.grad,
    }  # fmt: skip
    config = {"heads_num": 4, "double": 2, "rope": [4, 6, 6], "text_states_dim": 24, "vision_states_dim": 28}
    config["use_meanflow"] = True
    found = {}
    for task in ("t2v", "i2v"):
        path = tmp_path / f"{task}.safetensors"
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, {"config": json.dumps({**config, "mask_type": task})})
        found[task] = errors(str(path))
    assert len(found["t2v"]) == 3 and max(found["t2v"].values()) <= LIMIT and found["i2v"]["output"] > 1e-3


@torch.no_grad()
def test_a_mixed_batch_equals_its_samples_alone():
    """With letters and without, with a picture and without, and whatever lies beyond the lengths."""
    model, batch = build(), an_input(text=(7, 5, 2), glyph=(4, 0, 3), vision=(0, 6, 2))
    whole = model(batch)
    for i in range(3):
        lengths = {k: v[i : i + 1] for k, v in batch.lengths.items()}
        cond = {k: v[i : i + 1, : lengths[k][0]] for k, v in batch.cond.items()}
        one = replace(batch, x=batch.x[i : i + 1], t=batch.t[i : i + 1], cond=cond, lengths=lengths)
        assert torch.allclose(model(one)[0], whole[i], atol=2e-5)
        without = {"text": cond["text"], "glyph": cond["glyph"]}
        bare = replace(one, cond=without, lengths={k: lengths[k] for k in without})
        assert torch.allclose(model(bare)[0], whole[i], atol=2e-5) == (i == 0)
        unlettered = replace(one, lengths={**lengths, "glyph": (0,)})
        assert torch.allclose(model(unlettered)[0], whole[i], atol=2e-5) == (i == 1)


def test_every_parameter_has_a_gradient_whoever_is_told_nothing():
    """Of zero, for what a batch does not use: engines wait for each."""
    for arch, vision in ((ARCH, (0, 0)), (STEPS, (6, 0))):
        model = build(arch)
        model(an_input(arch, glyph=(0, 0), vision=vision)).square().mean().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None]
        idle = {n.split(".")[0] for n, p in model.named_parameters() if not p.grad.any() and "double_blocks" not in n}
        assert idle == ({"byt5_in"} if any(vision) else {"byt5_in", "vision_in"})
        last = {n.split(".")[2] for n, p in model.double_blocks[-1].named_parameters(prefix="x.y") if not p.grad.any()}
        assert last == {"txt_attn_q", "txt_attn_q_norm", "txt_attn_proj", "txt_mlp"}  # what comes of the prompt is not read


# --- full size --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavor", "which", "n"), [("i2v-720p", "t2v", 1793), ("i2v-480p-step-distilled", "steps", 1797), ("sr-1080p", "sr", 1797)]
)
def test_full_size_keys_equal_the_official_ones(flavor, which, n):
    rows = [line.split("\t") for line in (DATA / "hunyuan_video_15_dit.tsv").read_text().splitlines()]
    want = {name.format(i): shape for mine, blocks, name, shape in rows if mine == which for i in range(int(blocks or 1))}
    ours = dict(line.split("\t") for line in keys("hunyuan-video-15", flavor))
    assert len(ours) == n and ours == want


def test_a_lora_adapts_what_musubi_s_does_and_a_slice_is_a_block():
    with torch.device("meta"):
        model = SPEC.build(SPEC.flavor("t2v-480p").arch)
    names = SPEC.lora_targets(model)
    assert len(names) == 14 * 54 and {n.split(".", 2)[2] for n in names} == {
        f"{s}_{part}" for s in ("img", "txt")
        for part in ("mod.linear", "attn_q", "attn_k", "attn_v", "attn_proj", "mlp.fc1", "mlp.fc2")
    }  # fmt: skip
    cut = Cut(blocks_per_loraid=1, granularity="block")
    plan = make_plan(target_shapes(model, SPEC), cut, model=SPEC.name, flavor="t2v-480p")
    assert [len(one.slots) for one in plan.slices] == [14] * 54


def test_how_released_ones_are_sampled():
    told = {name: (d.steps, d.shift, d.cfg_scale, d.width, d.height) for name, f in FLAVORS.items() for d in [f.defaults]}
    assert told["t2v-480p"] == told["i2v-480p"] == (50, 5, 6, 848, 480)
    assert told["t2v-720p"] == (50, 9, 6, 1280, 720) and told["i2v-720p"] == (50, 7, 6, 1280, 720)
    assert told["t2v-480p-distilled"] == (50, 5, 1, 848, 480) and told["i2v-720p-distilled"] == (50, 7, 1, 1280, 720)
    assert told["i2v-480p-step-distilled"] == (12, 7, 1, 848, 480)
    assert told["sr-720p"] == (6, 2, 1, 1280, 720) and told["sr-1080p"] == (8, 2, 1, 1920, 1072)
    latent = FLAVORS["t2v-480p"].latent
    assert latent.n_tokens(latent.shape(frames=121, height=480, width=848)) == 49_290
    assert all((f.defaults.frames, f.defaults.fps, f.defaults.training_shift) == (121, 24, 3) for f in FLAVORS.values()
               if "tiny" not in f.name)  # fmt: skip


# --- what goes in -----------------------------------------------------------------------------------------------------


def conds(**more):
    n = torch.tensor
    return {"text": torch.randn(2, 5, 24), "text_len": n([5, 3]), "glyph": torch.randn(2, 4, 20), "glyph_len": n([0, 4]), **more}


def given(x, task, sigma=(0.3, 0.9), x0=None, **more):
    return make_input(x, torch.tensor(sigma), conds(**more), task=task, guidance=None, x0=x0)


def test_text_to_video_is_beside_zeros_and_told_no_picture():
    x = torch.randn(2, 4, 3, 2, 2)
    inp = given(x, "t2v")
    assert torch.equal(inp.x[:, :4], x) and inp.x.shape[1] == 9 and not inp.x[:, 4:].any()
    assert inp.lengths == {"text": (5, 3), "glyph": (0, 4)} and "vision" not in inp.cond and inp.loss_mask is None
    assert torch.allclose(inp.t, torch.tensor([300.0, 900.0])) and inp.until is None


def test_image_to_video_has_the_image_in_the_first_frame_and_a_mask():
    """The clip's own first frame where the conditions hold none; a sample that is not given it is text to video."""
    x, x0, image = (torch.randn(2, 4, n, 2, 2) for n in (3, 3, 1))
    seen = {"vision": torch.randn(2, 6, 28), "vision_len": torch.tensor([6, 6])}
    told = given(x, "i2v", image_latents=image, x0=x0, **seen)
    for first, inp in ((image, told), (x0[:, :, :1], given(x, "i2v", x0=x0, **seen))):
        assert torch.equal(inp.x[:, :4], x) and torch.equal(inp.x[:, 4:8, :1], first)
        assert not inp.x[:, 4:, 1:].any() and (inp.x[:, 8, 0] == 1).all() and inp.lengths["vision"] == (6, 6)
    mixed = given(x, "i2v", image_latents=image, image_given=torch.tensor([True, False]), **seen)
    assert torch.equal(mixed.x[0], given(x, "i2v", image_latents=image, **seen).x[0]) and not mixed.x[1, 4:].any()
    assert mixed.lengths["vision"] == (6, 0)
    with pytest.raises(DataError, match="'vision'"):
        given(x, "i2v", image_latents=image)
    with pytest.raises(DataError, match="do not fit"):
        given(x, "i2v", image_latents=image[..., :1], **seen)


def test_super_resolution_looks_at_the_low_latents_while_there_is_more_noise():
    x, low, image = (torch.randn(2, 4, n, 2, 2) for n in (3, 3, 1))
    inp = given(x, "sr", sigma=(0.69, 0.71), low_latents=low)
    assert inp.x.shape[1] == 14 and not inp.x[:, 4:9].any() and not inp.x[0, 9:].any()
    assert torch.equal(inp.x[1, 9:13], low[1]) and (inp.x[1, 13] == 1).all() and "vision" not in inp.cond
    seen = {"vision": torch.randn(2, 6, 28), "vision_len": torch.tensor([6, 6])}
    pictured = given(x, "sr", low_latents=low, image_latents=image, **seen)
    assert torch.equal(pictured.x[:, 4:8, :1], image) and (pictured.x[:, 8, 0] == 1).all()
    assert pictured.lengths["vision"] == (6, 6)
    with pytest.raises(DataError, match="do not fit"):
        given(x, "sr", low_latents=low[:, :, :2])


def test_one_distilled_in_steps_is_told_where_each_step_ends():
    flavor, told = FLAVORS["tiny-steps"], []
    cond = example(flavor, (1, 32, 3, 4, 4), lengths=(5,), optional=True, draw=torch.Generator())
    request = Request.of(flavor, steps=4, shift=7.0)

    def still(inp):
        told.append((inp.t.item(), inp.until.item()))
        return torch.zeros_like(inp.x[:, :32])

    sample_latents(lambda sigma: still, SPEC, flavor, cond, request=request, ctx=ParallelContext())
    levels = [7 * s / (1 + 6 * s) * 1000 for s in (1, 0.75, 0.5, 0.25, 0)]
    assert torch.allclose(torch.tensor(told), torch.tensor(list(pairwise(levels))), atol=1e-3)
    model = build(STEPS)
    inp = replace(an_input(STEPS), until=None)
    assert torch.equal(model(inp), model(replace(inp, until=inp.t)))  # without a sampler: the velocity at t
    assert not torch.allclose(model(inp), model(replace(inp, until=torch.zeros(2))), atol=1e-2)


# --- whose file is it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "flavor"),
    [
        ("transformer/480p_t2v/diffusion_pytorch_model.safetensors", "t2v-480p"),
        ("transformer/720p_i2v", "i2v-720p"),
        ("transformer/480p_i2v_step_distilled/model.safetensors", "i2v-480p-step-distilled"),
        ("hunyuanvideo1.5_480p_t2v_cfg_distilled_fp16.safetensors", "t2v-480p-distilled"),
        ("hunyuanvideo1.5_720p_sr_distilled_fp16.safetensors", "sr-720p"),
        ("1080p_sr_distilled", "sr-1080p"),
        ("720p_t2v/my.safetensors", "t2v-720p"),
        ("hunyuanvideo1.5_fp16.safetensors", None),
    ],
)
def test_names_of_files_tell_what_shapes_do_not(path, flavor):
    assert told_by(Path("ckpts") / path) == flavor


def test_a_sparse_one_is_computed_densely_and_it_is_said(caplog):
    assert told_by(Path("ckpts/720p_i2v_distilled_sparse")) == "i2v-720p-distilled"
    assert "computed densely" in caplog.text


def full_size(path, flavor):
    """A file of the right names and shapes, without a byte of data."""
    with torch.device("meta"):
        state = SPEC.build(SPEC.flavor(flavor).arch).state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    head, end = {}, 0
    for name, t in state.items():
        head[name] = {"dtype": "F16", "shape": list(t.shape), "data_offsets": [end, end + 2 * t.numel()]}
        end += 2 * t.numel()
    text = json.dumps(head).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # a hole
    return path


def test_files_are_known_and_wrong_ones_refused_before_anything_loads(tmp_path):
    plain = full_size(tmp_path / "dit.safetensors", "t2v-480p")
    assert identify(plain).flavor.name == "t2v-480p" and identify(plain, flavor="i2v-720p").flavor == FLAVORS["i2v-720p"]
    (tmp_path / "config.json").write_text(json.dumps({"ideal_task": "i2v", "ideal_resolution": "720p"}))
    assert identify(plain).flavor.name == "i2v-720p"
    with pytest.raises(CheckpointError, match="'i2v-720p', which does another task than flavor 't2v-480p'"):
        identify(plain, flavor="t2v-480p")
    named = full_size(tmp_path / "480p_t2v" / "model.safetensors", "t2v-480p")
    with pytest.raises(CheckpointError, match="'t2v-480p', which does another task than flavor 'i2v-480p'"):
        identify(named, flavor="i2v-480p")
    steps = full_size(tmp_path / "steps" / "model.safetensors", "i2v-480p-step-distilled")
    assert identify(steps).flavor.name == "i2v-480p-step-distilled"
    with pytest.raises(CheckpointError, match="meanflow False, the file has True.*'i2v-480p-step-distilled'"):
        identify(steps, flavor="i2v-480p")
    with pytest.raises(CheckpointError, match="in_channels 65, the file has 98"):
        identify(full_size(tmp_path / "sr" / "x.safetensors", "sr-720p"), flavor="t2v-480p")
    with pytest.raises(CheckpointError, match=r"not a DiT of hunyuan-video; it looks like HunyuanVideo 1\.5"):
        identify(plain, model="hunyuan-video")


def test_what_a_flavor_cannot_do_is_refused_by_name():
    with pytest.raises(ConfigError, match="cfg_scale is 6, but 'i2v-480p-step-distilled'"):
        Request.of(FLAVORS["i2v-480p-step-distilled"], cfg_scale=6.0)
    with pytest.raises(ConfigError, match="cfg_scale is 6, but 'sr-720p'"):
        Request.of(FLAVORS["sr-720p"], cfg_scale=6.0)
    assert Request.of(FLAVORS["i2v-480p-distilled"], cfg_scale=2.0).guided
    assert lacks(Request.of(FLAVORS["i2v-480p"]), FLAVORS["i2v-480p"]) == ["image"]
    with pytest.raises(ConfigError, match="image is a.png, but 't2v-480p' takes none"):
        Request.of(FLAVORS["t2v-480p"], image="a.png")
    with pytest.raises(ConfigError, match="guidance is 6, but this 't2v-480p' embeds no guidance"):
        Request.of(FLAVORS["t2v-480p"], guidance=6.0)
    with pytest.raises(ConfigError, match="width is 850, expected a multiple of 16"):
        Request.of(FLAVORS["t2v-480p"], width=850)


def test_shards_of_the_older_model_are_refused():
    with pytest.raises(DataError, match="holds latents of 16 channels, flavor 't2v-480p' takes 32"):
        open_shards([str(DATA / "shards_v2")], FLAVORS["t2v-480p"], key="data.shards")


@pytest.mark.parametrize("dialect", ["comfy", "inside", "diffusers"])
@pytest.mark.parametrize("how", ["", "fp8_scaled"])
def test_every_dialect_of_the_same_weights_loads_equal(dialect, how, tmp_path):
    """ComfyUI's q, k and v are one tensor; in float8 each of ours keeps the file's values and factors."""
    arch = SPEC.flavor("tiny").arch
    state = build(arch).state_dict()
    if how:
        scaled = {n: quantize(t, how) for n, t in state.items() if "double_blocks" in n and t.ndim == 2}
        state |= {n: (v.view(*v.shape[:-1], -1, 64).float() * s).view_as(v) for n, (v, s) in scaled.items()}
    theirs = {n: c.of(state).clone() for n, c in SPEC.key_maps[dialect].write(state).items()}
    if how:
        for name in [n for n, t in theirs.items() if "blocks" in n and "refiner" not in n and t.ndim == 2]:
            theirs[name], theirs[name.removesuffix("weight") + "scale_weight"] = quantize(theirs[name], how)
    save_file(theirs, tmp_path / "a.safetensors")
    found = identify(tmp_path / "a.safetensors")
    assert (found.spec.name, found.flavor.name, found.arch, found.dialect) == (SPEC.name, "tiny", arch, dialect)
    model = load_dit(tmp_path / "a.safetensors", dtype=torch.float32).model
    assert all(torch.allclose(t, state[n], rtol=0, atol=1e-7) for n, t in model.state_dict().items())
    if how:
        eight = load_dit(tmp_path / "a.safetensors", dtype=torch.float32, quantize_to="fp8_scaled").model
        assert eight.double_blocks[0].img_attn_k.weight.dtype == torch.float8_e4m3fn
        inp = replace(an_input(arch), x=torch.randn(2, 65, 3, 4, 6))
        assert torch.allclose(eight(inp), model(inp), atol=1e-4)


# --- LoRAs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path):
    """Of every layer, rank 2, alpha 1."""
    model, draw, tensors = build(), torch.Generator().manual_seed(5), {}
    for name in SPEC.lora_targets(model):
        n_out, n_in = model.get_submodule(name).weight.shape
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, n_in, generator=draw)
        tensors[f"{name}.lora_up.weight"] = torch.randn(n_out, 2, generator=draw)
    save_lora(tmp_path / "a.safetensors", tensors, rank=2, alpha=1.0, metadata={}, architecture=SPEC.name)
    return tmp_path / "a.safetensors", tensors


def test_ours_is_what_musubi_writes(lora):
    path, tensors = lora
    held = load_file(path)
    assert len(held) == 3 * 14 * 2
    stem = "lora_unet_double_blocks_1_txt_attn_q"
    assert torch.equal(held[f"{stem}.lora_down.weight"], tensors["double_blocks.1.txt_attn_q.lora_down.weight"])
    assert held[f"{stem}.lora_up.weight"].shape == (64, 2) and held[f"{stem}.alpha"].item() == 1
    assert "lora_unet_double_blocks_0_img_mod_linear.alpha" in held and "lora_unet_double_blocks_0_img_mlp_fc1.alpha" in held
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert said["ss_base_model_version"] == "hunyuan_video_1_5" and said["modelspec.architecture"] == "hunyuan-video-1.5/lora"
    assert said["ss_network_module"] == "networks.lora_hv_1_5" and said["ss_network_dim"] == "2"
    assert read_lora(path, linear_shapes(build()), spec=SPEC).pairs.keys() == set(SPEC.lora_targets(build()))


def test_comfyui_s_has_q_k_and_v_in_one_both_ways(lora, tmp_path):
    path, _ = lora
    own = read_lora(path, linear_shapes(build()), spec=SPEC)
    made = converted(own, SPEC, DIALECTS["comfyui"])
    stem = "diffusion_model.double_blocks.0.img_attn_qkv"
    down, up, alpha = (made.tensors[f"{stem}.{end}"] for end in ("lora_A.weight", "lora_B.weight", "alpha"))
    assert down.shape == (6, 64) and up.shape == (192, 6) and alpha.item() == 3
    q, v = own.pairs["double_blocks.0.img_attn_q"], own.pairs["double_blocks.0.img_attn_v"]
    assert torch.equal(down[:2], q.down) and torch.equal(up[:64, :2], q.up) and torch.equal(up[128:, 4:], v.up)
    assert up.count_nonzero() == 3 * 64 * 2 and not any("attn_q." in name or "attn_k." in name for name in made.tensors)
    made.save(tmp_path / "comfy.safetensors")
    again = read_lora(tmp_path / "comfy.safetensors", linear_shapes(build()), spec=SPEC)
    for name, pair in own.pairs.items():
        other = again.pairs[name]
        assert torch.equal(other.down, pair.down) and torch.equal(other.up, pair.up) and other.alpha == pair.alpha, name


def test_one_that_musubi_has_converted_for_comfyui_is_read(lora, tmp_path):
    """lora_unet_ names of ComfyUI's own modules: mlp_0, mod_lin, and stacks of q, k and v."""
    own = read_lora(lora[0], linear_shapes(build()), spec=SPEC)
    theirs = {}
    for name, pair in own.pairs.items():
        stem = "lora_unet_" + name.replace(".", "_")
        for a, b in (("mlp_fc1", "mlp_0"), ("mlp_fc2", "mlp_2"), ("mod_linear", "mod_lin")):
            stem = stem.replace(a, b)
        if not stem.endswith(("attn_q", "attn_k", "attn_v")):
            theirs |= {f"{stem}.lora_down.weight": pair.down, f"{stem}.lora_up.weight": pair.up}
            theirs[f"{stem}.alpha"] = torch.tensor(1.0)
    for block in range(2):
        for stream in ("img", "txt"):
            parts = [own.pairs[f"double_blocks.{block}.{stream}_attn_{x}"] for x in "qkv"]
            stem = f"lora_unet_double_blocks_{block}_{stream}_attn_qkv"
            theirs[f"{stem}.lora_down.weight"] = torch.cat([p.down for p in parts])
            theirs[f"{stem}.lora_up.weight"] = torch.block_diag(*(p.up for p in parts))
            theirs[f"{stem}.alpha"] = torch.tensor(3.0)
    save_file({n: t.clone() for n, t in theirs.items()}, tmp_path / "musubi.safetensors")
    again = read_lora(tmp_path / "musubi.safetensors", linear_shapes(build()), spec=SPEC)
    assert again.pairs.keys() == own.pairs.keys()
    assert all(torch.equal(again.pairs[n].up, p.up) and again.pairs[n].scale == p.scale for n, p in own.pairs.items())
    first, pair = "lora_unet_double_blocks_0_img_attn_q", own.pairs["double_blocks.0.img_attn_q"]
    twice = {f"{first}.lora_down.weight": pair.down, f"{first}.lora_up.weight": pair.up}
    save_file({n: t.clone() for n, t in {**theirs, **twice}.items()}, tmp_path / "twice.safetensors")
    with pytest.raises(CheckpointError, match="twice"):
        read_lora(tmp_path / "twice.safetensors", linear_shapes(build()), spec=SPEC)


def test_a_lora_is_merged_into_comfyui_s_fused_tensors(lora, tmp_path):
    state = build(ARCH).state_dict()
    theirs = {n: c.of(state).clone() for n, c in SPEC.key_maps["comfy"].write(state).items()}
    save_file(theirs, tmp_path / "dit.safetensors", {"hvtrain.arch": json.dumps(asdict(ARCH))})
    found, shapes = identify(tmp_path / "dit.safetensors"), linear_shapes(build())
    own = read_lora(lora[0], shapes, spec=SPEC).pairs
    names = [n for n in own if "double_blocks.0.img_attn_" in n]
    layers = {n: [Contribution("a", own[n], 0.5)] for n in names}
    k = "double_blocks.0.img_attn_k"
    layers[k] = Dense(lambda: 0.5 * own[k].delta())
    parts = plan_parts(found, layers, shapes)
    assert set(parts) == {f"double_blocks.0.img_attn_{x}.weight" for x in ("qkv", "proj")}
    merged = theirs["double_blocks.0.img_attn_qkv.weight"].clone()
    parts["double_blocks.0.img_attn_qkv.weight"].add_to(merged)
    want = [state[f"{name}.weight"] + 0.5 * own[name].delta() for name in names if "proj" not in name]
    assert len(want) == 3 and torch.allclose(merged, torch.cat(want), atol=1e-5)


def test_musubi_s_caches_are_read():
    latents, image = torch.randn(32, 3, 4, 6), torch.zeros(33, 3, 4, 6)
    image[:32, 0], image[32, 0] = latents[:, 0], 1
    raw = {"latents_3x4x6_float16": latents.half(), "latents_image_3x4x6_float32": image}
    raw["siglip_float16"] = torch.randn(729, 1152).half()
    found = MUSUBI.latents(raw)
    assert torch.allclose(found["latents"].float(), latents * SCALING, rtol=0.02) and math.isclose(SCALING, 1.03682)
    assert found["image_latents"].shape == (32, 1, 4, 6) and found["vision"].shape == (729, 1152)
    assert torch.allclose(found["image_latents"][:, 0].float(), found["latents"][:, 0].float(), atol=0.03)  # the same scaling
    text = MUSUBI.text({"varlen_vl_embed_bfloat16": torch.randn(9, 3584), "varlen_byt5_embed_float16": torch.zeros(0, 1472)})
    assert text["text"].shape == (9, 3584) and text["glyph"].shape == (0, 1472)
    with pytest.raises(DataError, match="siglip"):
        MUSUBI.latents({k: v for k, v in raw.items() if "siglip" not in k})


def test_its_configs_are_sound():
    files = {"encode": EncodeConfig, "generate": GenerateConfig}
    for path in sorted((DATA.parents[1] / "configs" / "hunyuan_video_15").glob("*.yaml")):
        if path.stem != "model":
            cfg = load(files.get(path.stem, TrainConfig), path)
            assert cfg.model.name == SPEC.name and set(cfg.model.parts) <= set(SPEC.parts) and cfg.model.flavor in FLAVORS
