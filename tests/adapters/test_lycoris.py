"""Files of each kind in the LyCORIS package itself: it finds every tensor, and computes what
the adapted layer computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from tests.adapters.test_kinds import changed_weight, linear, save, trained


# of LoKr, one with its second matrix decomposed and one with it whole
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha"])
def test_lycoris_computes_the_same(kind, rank, tmp_path):
    from lycoris import create_lycoris_from_weights

    model = trained(linear(), kind, rank=rank, alpha=1.5)
    ours = load_file(save(tmp_path, model, rank=rank, alpha=1.5))
    theirs = {name.replace("lora_unet_", "lycoris_"): tensor for name, tensor in ours.items()}
    n_out, n_in = model[0].weight.shape
    base = nn.Sequential(nn.Linear(n_in, n_out, bias=False))
    base[0].weight.data = model[0].weight.detach().clone()
    network, _ = create_lycoris_from_weights(1.0, None, base, weights_sd=theirs)
    network.apply_to()
    network.load_state_dict(theirs)
    x = torch.randn(5, n_in, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = F.linear(x, changed_weight(model[0]).float())
        torch.testing.assert_close(base(x), want, rtol=1e-5, atol=5e-6)
        assert (want - F.linear(x, model[0].weight)).abs().max() > 0.3
