"""Compare our models with reference files: `python -m tests.oracles.check FILE...`

A reference file is a tiny official model run on fixed inputs: `weights.*`, `input.*`, `output*`,
`grad_x` = d(mean(output squared)) / d(input.x) and `grad.NAME` the same for parameters; the metadata
key `config` holds the construction arguments. Prints relative errors ||a - b|| / ||b||; exit code 1
above 1e-5, 2 for a file that is none.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hvtrain.errors import CheckpointError, HvtrainError
from hvtrain.flow.solvers import SOLVERS, State
from hvtrain.models import find
from hvtrain.models.dit import DiT
from hvtrain.models.hunyuan_video.arch import HunyuanVideoArch
from hvtrain.models.hunyuan_video.inputs import HunyuanInput

LIMIT = 1e-5


@dataclass(frozen=True)
class Reference:
    path: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}


def read(path: str) -> Reference:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from None
    if "config" not in metadata or not any(n.startswith("output") for n in tensors):
        raise CheckpointError(f"{path}: not a reference file: needs metadata 'config' and tensors 'output*'")
    return Reference(path, json.loads(metadata["config"]), tensors)


def errors(path: str) -> dict[str, float]:
    """Relative error of every output and gradient in the file."""
    reference = read(path)
    from tests.oracles import hunyuan15, hunyuan15_vae, wan

    for fits, compare in (*hunyuan15_vae.KINDS, *KINDS, *wan.KINDS, *hunyuan15.KINDS):
        if fits(reference):
            return dict(compare(reference))
    known = "HunyuanVideo's DiT and VAE, HunyuanVideo-I2V, SkyReels V1, solvers; HunyuanVideo 1.5; Wan"
    raise CheckpointError(f"{path}: its weights are of no architecture checked here ({known})")


def relative(found: Tensor, wanted: Tensor) -> float:
    """NaN never passes: it compares false."""
    size = wanted.double().norm().item()
    difference = (found.double() - wanted.double()).norm().item()
    return difference / size if size else difference


# --- DiT ----------------------------------------------------------------------------------------------------


def _is_dit(reference: Reference) -> bool:
    return find("hunyuan-video").signature({n: tuple(t.shape) for n, t in reference.part("weights.").items()})


def dit_of(reference: Reference) -> DiT:
    """The model of a reference file, in float32. Only what no shape tells comes from the config."""
    c, weights = reference.config, reference.part("weights.")
    proj = weights["img_in.proj.weight"]
    hidden, patch = proj.shape[0], (proj.shape[2], proj.shape[3], proj.shape[4])
    blocks = [n for n in weights if n.endswith(("img_attn_q_norm.weight", ".q_norm.weight"))]
    head = weights[blocks[0]].shape[0]
    rope = c.get("rope", c.get("rope_dim_list"))
    if rope is None:
        raise CheckpointError(f"{reference.path}: its config lacks 'rope', the widths of the rotary axes")
    arch = HunyuanVideoArch(
        in_channels=proj.shape[1],
        out_channels=weights["final_layer.linear.weight"].shape[0] // math.prod(patch),
        hidden_size=hidden,
        heads_num=hidden // head,
        double=_count(weights, "double_blocks."),
        single=_count(weights, "single_blocks."),
        rope_dims=tuple(rope),
        text_dim=weights["txt_in.input_embedder.weight"].shape[1],
        pooled_dim=weights["vector_in.in_layer.weight"].shape[1],
        guidance_embed="guidance_in.mlp.0.weight" in weights,
        patch=patch,
        mlp_ratio=_mlp_width(weights, hidden) / hidden,
        rope_theta=float(c.get("rope_theta", 256.0)),
        refiner_depth=_count(weights, "txt_in.individual_token_refiner.blocks."),
        token_replace=c.get("i2v_condition_type") == "token_replace",
    )
    model = find("hunyuan-video").build(arch).float()
    model.load_state_dict(weights, strict=True)
    return model


def model_input(reference: Reference, x: Tensor) -> HunyuanInput:
    i = reference.part("input.")
    cond = {"pooled": i["pooled"], **({"guidance": i["guidance"]} if "guidance" in i else {})}
    token_replace = reference.config.get("i2v_condition_type") == "token_replace"
    lengths = {"text": tuple(i["mask"].sum(1).tolist())}
    return HunyuanInput(
        x=x, t=i["t"], cond={"text": i["text"], **cond}, lengths=lengths, token_replace=token_replace
    )


def _check_dit(reference: Reference) -> Iterator[tuple[str, float]]:
    model = dit_of(reference)
    x = reference.tensors["input.x"].clone().requires_grad_()
    output = model(model_input(reference, x))
    yield "output", relative(output.detach(), reference.tensors["output"])
    yield from gradients(reference, model, x, output)


def gradients(reference: Reference, model: DiT, x: Tensor, output: Tensor) -> Iterator[tuple[str, float]]:
    """Of the output's mean square, by the input and by each parameter; one that gets
    none has a gradient of zero."""
    output.pow(2).mean().backward()
    assert x.grad is not None
    yield "grad_x", relative(x.grad, reference.tensors["grad_x"])
    parameters = dict(model.named_parameters())
    for name, wanted in reference.part("grad.").items():
        found = parameters[name].grad
        yield f"grad.{name}", relative(torch.zeros_like(wanted) if found is None else found, wanted)


def _mlp_width(weights: Mapping[str, Tensor], hidden: int) -> int:
    double = weights.get("double_blocks.0.img_mlp.fc1.weight")
    return (
        double.shape[0]
        if double is not None else weights["single_blocks.0.linear1.weight"].shape[0] - 3 * hidden
    )


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    numbers = {int(n.removeprefix(prefix).split(".")[0]) for n in weights if n.startswith(prefix)}
    return max(numbers, default=-1) + 1


# --- VAE ----------------------------------------------------------------------------------------------------


def _is_vae(reference: Reference) -> bool:
    return {"weights.quant_conv.weight", "weights.encoder.conv_in.conv.weight"} <= reference.tensors.keys()


@torch.no_grad()
def _check_vae(reference: Reference) -> Iterator[tuple[str, float]]:
    from hvtrain.models.hunyuan_video.vae import OFF, apply_tiling, build_vae

    model = build_vae(reference.config).float().eval()
    model.load_state_dict(reference.part("weights."), strict=True)
    apply_tiling(model, OFF)  # the references were made without
    if "input.video" in reference.tensors:
        posterior = model.encode(reference.tensors["input.video"]).latent_dist
        for name, found in (("latents_mean", posterior.mean), ("latents_std", posterior.std)):
            if (key := f"output.{name}") in reference.tensors:
                yield key, relative(found, reference.tensors[key])
    if "input.latents" in reference.tensors:
        yield "output.video", relative(
            model.decode(reference.tensors["input.latents"]).sample, reference.tensors["output.video"]
        )


# --- solvers ------------------------------------------------------------------------------------------------


def _is_solver(reference: Reference) -> bool:
    return "cases" in reference.config and "input.A" in reference.tensors


def _check_solver(reference: Reference) -> Iterator[tuple[str, float]]:
    """No network: v = x A^T + b t / 1000. Where nothing is learnt the timestep told is
    compared, not the schedule alone."""
    config, i = reference.config, reference.part("input.")
    name = {"dpmpp": "dpm++"}.get(config["solver"], config["solver"])
    solver, scale = SOLVERS.find(name, key=reference.path), config["num_train_timesteps"]
    for case in [*config["cases"], *config.get("grids_only", [])]:
        key, told, state = case["key"], [], State(i["x"])
        wanted = reference.part(f"output.{key}.")
        schedule = solver.schedule(case["steps"], shift=case["shift"])
        yield f"{key}.sigmas", relative(schedule.float(), wanted["sigmas"])

        def velocity(x: Tensor, sigma: Tensor, told: list = told) -> Tensor:
            told.append((scale * sigma.double().item(), x @ i["A"].T + i["b"] * sigma[:, None]))
            return told[-1][1]

        while state.step < case["steps"]:
            state = solver.step(velocity, state, schedule)
            if "x" in wanted:
                yield f"{key}.x {state.step}", relative(state.x[0], wanted["x"][state.step - 1])
                yield f"{key}.v {state.step}", relative(told[-1][1][0], wanted["v"][state.step - 1])
        yield f"{key}.timesteps", relative(torch.tensor([t for t, _ in told]), wanted["timesteps"])


KINDS: tuple[tuple[Callable[[Reference], bool], Callable[[Reference], Iterator[tuple[str, float]]]], ...] = (
    (_is_dit, _check_dit),
    (_is_vae, _check_vae),
    (_is_solver, _check_solver),
)


def main(paths: list[str]) -> int:
    if not paths:
        print("usage: python -m tests.oracles.check FILE...", file=sys.stderr)
        return 2
    worst_of_all = 0.0
    for path in paths:
        try:
            found = errors(path)
        except HvtrainError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(path)
        for name, value in found.items():
            print(f"  {value:.2e}  {name}{'' if value <= LIMIT else '   TOO LARGE'}")
        # `not <=` so that NaN counts as too large
        worst_of_all = max([worst_of_all, *(float("inf") if not v <= LIMIT else v for v in found.values())])
    print(f"largest relative error {worst_of_all:.2e}, limit {LIMIT:.0e}")
    return 0 if worst_of_all <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
