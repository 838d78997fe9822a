"""The transformer against the official implementation, diffusers and the full-size key lists."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from hvtrain.models import find
from hvtrain.models.identify import arch_of
from hvtrain.models.listing import keys
from tests.adapters.models import ARCH, SPEC, an_input, build
from tests.lorafiles.test_diffusers import in_diffusers, velocity
from tests.models.any_model import an_input as any_input
from tests.models.any_model import random_model
from tests.oracles.check import LIMIT, errors, main

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("name", ["hunyuan_video_dit", "hunyuan_video_i2v_dit", "skyreels_v1_i2v_dit"])
def test_output_and_gradients_equal_the_official_model(name):
    found = errors(str(DATA / f"{name}.safetensors"))
    assert len(found) > 3 and max(found.values()) <= LIMIT, max(found, key=found.get)


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
def test_the_check_reads_solvers(solver, tmp_path, capsys):
    """Also one that has taken a wrong step."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = DATA / "solvers" / f"{solver}.safetensors"
    found = errors(str(path))
    assert len(found) > 20 and max(found.values()) <= LIMIT
    with safe_open(path, "pt") as file:
        tensors, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()
    name = next(n for n in tensors if n.endswith(".x") and n.startswith("output."))
    tensors[name][-1] *= 1.0001
    save_file(tensors, tmp_path / "wrong.safetensors", metadata)
    assert (
        main([str(tmp_path / "wrong.safetensors")]) == 1
        and f"{name.split('.')[1]}.x" in capsys.readouterr().out
    )


def test_the_check_fails_on_a_wrong_model(tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(DATA / "hunyuan_video_dit.safetensors", "pt") as file:
        tensors, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()
    tensors["weights.double_blocks.0.img_attn_q_norm.weight"] *= 1.01
    save_file(tensors, tmp_path / "wrong.safetensors", metadata)
    assert main([str(tmp_path / "wrong.safetensors")]) == 1
    assert "TOO LARGE" in capsys.readouterr().out
    (tmp_path / "no.safetensors").write_bytes(b"x")
    assert main([str(tmp_path / "no.safetensors")]) == 2


def test_equal_to_diffusers_with_converted_weights():
    ours = build()(an_input()).detach()
    theirs = velocity(in_diffusers())
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("name", ["t2v", "i2v", "i2v-concat", "skyreels-v1-i2v"])
def test_every_kind_equals_diffusers(name, tmp_path):
    """Of what make_input makes of a clip and its image; and the check reads such a file, of
    sizes that no reference has."""
    from diffusers import HunyuanVideoTransformer3DModel
    from safetensors.torch import save_file

    own = SPEC.flavors[name]
    kind = {key: getattr(own.arch, key) for key in ("in_channels", "token_replace", "guidance_embed")}
    flavor = SPEC.fitted(own, replace(ARCH, **kind))
    model, inp = random_model(SPEC, flavor), any_input(SPEC, flavor)
    arch, weights = flavor.arch, model.state_dict()
    theirs = HunyuanVideoTransformer3DModel(
        in_channels=arch.in_channels, out_channels=16, num_attention_heads=arch.heads_num,
        attention_head_dim=arch.head_dim, num_layers=arch.double, num_single_layers=arch.single,
        num_refiner_layers=arch.refiner_depth, text_embed_dim=arch.text_dim,
        pooled_projection_dim=arch.pooled_dim, rope_axes_dim=arch.rope_dims,
        guidance_embeds=arch.guidance_embed,
        image_condition_type="token_replace" if arch.token_replace else None,
    ).eval()
    theirs.load_state_dict(
        {n: cut.take(weights[cut.source]) for n, cut in SPEC.key_maps["diffusers"].write(weights).items()}
    )
    theirs = theirs.double()  # so that no rounding but ours is measured
    text, x = inp.cond["text"], inp.x.double().requires_grad_()
    mask = torch.arange(text.shape[1])[None] < torch.tensor(inp.lengths["text"])[:, None]
    wanted = theirs(
        hidden_states=x, timestep=inp.t, encoder_hidden_states=text.double(),
        pooled_projections=inp.cond["pooled"].double(), encoder_attention_mask=mask,
        guidance=inp.cond.get("guidance"), return_dict=False,
    )[0].float()
    wanted.square().mean().backward()
    with torch.no_grad():
        found = model(inp)
    assert found.std() > 0.1 and (found - wanted).norm() / wanted.norm() < 1e-5
    given = {
        "x": inp.x, "t": inp.t, "text": text, "mask": mask.long(),
        **{n: inp.cond[n] for n in inp.cond if n != "text"}
    }
    state = {f"weights.{n}": t for n, t in weights.items()} | {
        f"input.{n}": t.contiguous() for n, t in given.items()
    }
    kind = {"i2v": "token_replace", "i2v-concat": "latent_concat"}.get(name)
    about = {"config": json.dumps({"rope": arch.rope_dims, "i2v_condition_type": kind})}
    save_file(
        {**state, "output": wanted.detach(), "grad_x": x.grad.float()}, tmp_path / "seen.safetensors", about
    )
    errs = errors(str(tmp_path / "seen.safetensors"))
    assert errs.keys() == {"output", "grad_x"} and max(errs.values()) <= LIMIT


def test_a_mixed_batch_equals_its_samples_alone():
    model, both = build(), an_input()
    whole = model(both)
    for i, n in enumerate(both.lengths["text"]):
        one = replace(
            both, x=both.x[i : i + 1], t=both.t[i : i + 1], lengths={"text": (n,)},
            cond={k: v[i : i + 1, :n] if k == "text" else v[i : i + 1] for k, v in both.cond.items()},
        )
        assert torch.allclose(model(one)[0], whole[i], atol=1e-5)


def test_text_beyond_its_length_has_no_influence():
    model, inp = build(), an_input()
    text = inp.cond["text"].clone()
    text[1, inp.lengths["text"][1] :] = 1e3
    assert torch.equal(model(replace(inp, cond={**inp.cond, "text": text})), model(inp))


def test_no_square_mask_is_built():
    """Peak of the largest tensor in a forward pass: far below tokens x tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)
            )
            return out

    model, inp = build(), an_input()
    inp = replace(inp, x=torch.randn(2, ARCH.in_channels, 5, 40, 40))
    tokens = 5 * 20 * 20
    with Watch(), torch.no_grad():
        model(inp)
    assert max(sizes) < tokens * tokens / 2


@pytest.mark.parametrize(
    ("flavor", "file"), [(None, "hunyuan_video_t2v_dit"), ("skyreels-v1-i2v", "skyreels_v1_i2v_dit")]
)
def test_full_size_keys_and_shapes(flavor, file):
    assert list(keys("hunyuan-video", flavor)) == (DATA / f"{file}.tsv").read_text().splitlines()


def test_guidance_is_optional():
    arch = replace(ARCH, guidance_embed=False)
    shapes = {n: tuple(p.shape) for n, p in SPEC.build(arch).state_dict().items()}
    assert not any(n.startswith("guidance_in") for n in shapes)
    assert arch_of(SPEC, shapes, {"hvtrain.arch": json.dumps(asdict(arch))}).guidance_embed is False


def test_240_lora_targets_at_full_size():
    with torch.device("meta"):
        model = SPEC.build(SPEC.flavors["t2v"].arch)
    targets = SPEC.lora_targets(model)
    assert len(targets) == len(set(targets)) == 240 and not any("mod" in t for t in targets)


def test_listing_imports_nothing_heavy():
    code = (
        "import sys; from hvtrain.models.listing import keys; n = len(list(keys('hunyuan-video', None)));"
        "print(n, [m for m in ('diffusers', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split(maxsplit=1) == ["856", "[]\n"]


def test_unknown_model_is_refused():
    with pytest.raises(Exception, match="did you mean 'hunyuan-video'"):
        find("hunyuan-vidoe")
