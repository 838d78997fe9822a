"""Every model that is found can be streamed and fitted, without a word of it outside its folder."""

import pytest
import torch

from hvtrain.adapters.attach import linear_shapes
from hvtrain.lorafiles.overlap import Contribution
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.merge.changes import low_rank
from hvtrain.merge.fit import STUDENT, fit_block, push, streams, targets_of
from hvtrain.merge.stream import Streamed
from hvtrain.models.load import identify, save_dit
from hvtrain.parallel.context import start
from tests.strange import discovered
from tests.test_model_contract import SPECS, an_input, random_model, smallest


@pytest.mark.parametrize("spec", SPECS)
def test_one_lora_comes_back_from_a_streamed_fit(spec, tmp_path):
    """In its layers and in the velocity, which a plain forward pass gives too."""
    model, flavor = random_model(spec), smallest(spec)
    save_dit(model, tmp_path / "dit.safetensors", spec=spec, flavor=flavor)
    with discovered():
        found = identify(tmp_path / "dit.safetensors", flavor=flavor.name)
    inp = an_input(spec, flavor)
    streamed = Streamed(found, start(device="cpu"), torch.float32)
    g, shapes = torch.Generator().manual_seed(0), linear_shapes(model)
    pairs = {}
    for name in spec.lora_targets(model):
        out, width = shapes[name]
        pairs[name] = LoraPair(
            torch.randn(2, width, generator=g), torch.randn(out, 2, generator=g) * 0.03, 2.0
        )
    lora = {name: [low_rank(Contribution("a", pair, 1.0))] for name, pair in pairs.items()}
    streamed.changes.put("a", lora)
    running = streams(streamed, [(inp, "a", torch.tensor([0.5, 0.5]))], tmp_path)
    for number, names in enumerate(streamed.layers):
        targets = {n: targets_of(lora[n], lambda n: None) for n in names if n in lora}
        with streamed.block(number) as block:
            solved = fit_block(streamed, block, targets, running, 1e-3)
            assert solved.keys() == targets.keys()
            push(streamed, block, running)
    ((plain, alone, fitted),) = streamed.velocities([(inp, (None, "a", STUDENT))])
    with torch.no_grad():
        torch.testing.assert_close(model(inp), plain, rtol=0, atol=1e-6)
        for name, pair in pairs.items():
            model.get_parameter(f"{name}.weight").add_(pair.delta())
        torch.testing.assert_close(model(inp), alone, rtol=1e-3, atol=1e-4)
    change = (alone - plain).norm() / alone.norm()
    assert change > 0.1 and (fitted - alone).norm() < 1e-5 * (alone - plain).norm()
