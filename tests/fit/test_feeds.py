"""Which layers are solved together is told without values as it is with them, for every model that is
found."""

import pytest
import torch

from hvtrain.fit.merges.feeds import stages_without_values
from hvtrain.merge.fit import STUDENT, stages
from hvtrain.merge.stream import Streamed
from hvtrain.models.load import identify, save_dit
from hvtrain.parallel.context import start
from tests.strange import discovered
from tests.test_model_contract import SPECS, an_input, random_model, smallest


@pytest.mark.parametrize("spec", SPECS)
def test_stages(spec, tmp_path):
    model, flavor = random_model(spec), smallest(spec)
    save_dit(model, tmp_path / "dit.safetensors", spec=spec, flavor=flavor)
    with discovered():
        found = identify(tmp_path / "dit.safetensors", flavor=flavor.name)
    streamed = Streamed(found, start(device="cpu"), torch.float32)
    tokens, targets = streamed.enter(an_input(spec, flavor)), set(spec.lora_targets(model))
    for number, names in enumerate(streamed.layers):
        layers = [name for name in names if name in targets]
        with streamed.block(number) as block:
            wanted, n_calls = stages(streamed, block, layers, tokens), dict(streamed.n_calls)
            streamed.n_calls.clear()
            assert stages_without_values(streamed, block, layers, tokens, STUDENT) == wanted
            assert streamed.n_calls == {name: n for name, n in n_calls.items() if name in layers}
            tokens = streamed.step(block, tokens, STUDENT)
    assert len(wanted) > 1
