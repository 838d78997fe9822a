"""HunyuanVideo 1.5's transformer against a second implementation and the full-size key
lists; its flavors and inputs."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hvtrain.errors import DataError
from hvtrain.generate.requests import Request
from hvtrain.generate.sample import sample_latents
from hvtrain.models.conditions import example
from hvtrain.models.hunyuan_video_15.flavors import FLAVORS
from hvtrain.models.hunyuan_video_15.inputs import make_input
from hvtrain.models.listing import keys
from hvtrain.parallel.context import ParallelContext
from tests.models.hunyuan_video_15.dit import ARCH, SPEC, STEPS, an_input, build
from tests.oracles.check import LIMIT, errors

DATA = Path(__file__).parents[1] / "data"


def in_diffusers(arch, state):
    from diffusers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel(
        in_channels=arch.in_channels, out_channels=arch.out_channels, num_attention_heads=arch.heads_num,
        attention_head_dim=arch.head_dim, num_layers=arch.double, text_embed_dim=arch.text_dim,
        text_embed_2_dim=arch.glyph_dim, image_embed_dim=arch.vision_dim, rope_axes_dim=arch.rope_dims,
        use_meanflow=arch.meanflow,
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
    masks = {
        k: (torch.arange(v.shape[1]) < torch.tensor(inp.lengths[k])[:, None]).long() for k,
        v in inp.cond.items()
    }
    out = model(replace(inp, x=x))
    other = in_diffusers(arch, model.state_dict())
    want = other(
        theirs, inp.t, inp.cond["text"], masks["text"], timestep_r=inp.until,
        encoder_hidden_states_2=inp.cond["glyph"], encoder_attention_mask_2=masks["glyph"], return_dict=False,
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
    masks = {
        k: (torch.arange(v.shape[1]) < torch.tensor(inp.lengths[k])[:, None]).long() for k,
        v in inp.cond.items()
    }
    tensors = {f"weights.{n}": t for n, t in model.state_dict().items()} | {
        "input.x": inp.x, "input.t": inp.t, "input.r": inp.until, "input.text": inp.cond["text"],
        "input.mask": masks["text"], "input.byt5": inp.cond["glyph"], "input.byt5_mask": masks["glyph"],
        "input.vision": torch.zeros(2, 5, arch.vision_dim), "output": output.detach(), "grad_x": x.grad,
        "grad.time_r_in.mlp.2.bias": model.time_r_in.mlp[2].bias.grad,
    }  # fmt: skip
    config = {"heads_num": 4, "double": 2, "rope": [4, 6, 6], "text_states_dim": 24, "vision_states_dim": 28}
    config["use_meanflow"] = True
    found = {}
    for task in ("t2v", "i2v"):
        path = tmp_path / f"{task}.safetensors"
        save_file(
            {n: t.contiguous() for n, t in tensors.items()}, path,
            {"config": json.dumps({**config, "mask_type": task})}
        )
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
        idle = {
            n.split(".")[0] for n,
            p in model.named_parameters() if not p.grad.any() and "double_blocks" not in n
        }
        assert idle == ({"byt5_in"} if any(vision) else {"byt5_in", "vision_in"})
        last = {
            n.split(".")[2] for n,
            p in model.double_blocks[-1].named_parameters(prefix="x.y") if not p.grad.any()
        }
        # what comes of the prompt is not read
        assert last == {"txt_attn_q", "txt_attn_q_norm", "txt_attn_proj", "txt_mlp"}


# --- full size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavor", "which", "n"),
    [("i2v-720p", "t2v", 1793), ("i2v-480p-step-distilled", "steps", 1797), ("sr-1080p", "sr", 1797)]
)
def test_full_size_keys_equal_the_official_ones(flavor, which, n):
    rows = [line.split("\t") for line in (DATA / "hunyuan_video_15_dit.tsv").read_text().splitlines()]
    want = {
        name.format(i): shape for mine, blocks, name,
        shape in rows if mine == which for i in range(int(blocks or 1))
    }
    ours = dict(line.split("\t") for line in keys("hunyuan-video-15", flavor))
    assert len(ours) == n and ours == want


def test_how_released_ones_are_sampled():
    told = {
        name: (d.steps, d.shift, d.cfg_scale, d.width, d.height) for name,
        f in FLAVORS.items() for d in [f.defaults]
    }
    assert told["t2v-480p"] == told["i2v-480p"] == (50, 5, 6, 848, 480)
    assert told["t2v-720p"] == (50, 9, 6, 1280, 720) and told["i2v-720p"] == (50, 7, 6, 1280, 720)
    assert (
        told["t2v-480p-distilled"] == (50, 5, 1, 848, 480)
        and told["i2v-720p-distilled"] == (50, 7, 1, 1280, 720)
    )
    assert told["i2v-480p-step-distilled"] == (12, 7, 1, 848, 480)
    assert told["sr-720p"] == (6, 2, 1, 1280, 720) and told["sr-1080p"] == (8, 2, 1, 1920, 1072)
    latent = FLAVORS["t2v-480p"].latent
    assert latent.n_tokens(latent.shape(frames=121, height=480, width=848)) == 49_290
    assert all(
        (f.defaults.frames, f.defaults.fps, f.defaults.training_shift) == (121, 24, 3)
        for f in FLAVORS.values() if "tiny" not in f.name
    )  # fmt: skip


# --- what goes in -------------------------------------------------------------------------------------------


def conds(**more):
    n = torch.tensor
    return {
        "text": torch.randn(2, 5, 24), "text_len": n([5, 3]), "glyph": torch.randn(2, 4, 20),
        "glyph_len": n([0, 4]), **more
    }


def given(x, task, sigma=(0.3, 0.9), x0=None, **more):
    return make_input(x, torch.tensor(sigma), conds(**more), task=task, guidance=None, x0=x0)


def test_text_to_video_is_beside_zeros_and_told_no_picture():
    x = torch.randn(2, 4, 3, 2, 2)
    inp = given(x, "t2v")
    assert torch.equal(inp.x[:, :4], x) and inp.x.shape[1] == 9 and not inp.x[:, 4:].any()
    assert (
        inp.lengths == {"text": (5, 3), "glyph": (0, 4)} and "vision" not in inp.cond
        and inp.loss_mask is None
    )
    assert torch.allclose(inp.t, torch.tensor([300.0, 900.0])) and inp.until is None


def test_image_to_video_has_the_image_in_the_first_frame_and_a_mask():
    """The clip's own first frame where the conditions hold none; a sample that is
    not given it is text to video."""
    x, x0, image = (torch.randn(2, 4, n, 2, 2) for n in (3, 3, 1))
    seen = {"vision": torch.randn(2, 6, 28), "vision_len": torch.tensor([6, 6])}
    told = given(x, "i2v", image_latents=image, x0=x0, **seen)
    for first, inp in ((image, told), (x0[:, :, :1], given(x, "i2v", x0=x0, **seen))):
        assert torch.equal(inp.x[:, :4], x) and torch.equal(inp.x[:, 4:8, :1], first)
        assert not inp.x[:, 4:, 1:].any() and (inp.x[:, 8, 0] == 1).all() and inp.lengths["vision"] == (6, 6)
    mixed = given(x, "i2v", image_latents=image, image_given=torch.tensor([True, False]), **seen)
    assert (
        torch.equal(mixed.x[0], given(x, "i2v", image_latents=image, **seen).x[0])
        and not mixed.x[1, 4:].any()
    )
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
