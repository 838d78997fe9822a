"""Models and LoRA pairs of a few numbers."""

import torch
from safetensors.torch import save_file

from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.merge.write import Target
from hvtrain.weights.containers import open_weights


def target(output, **given):
    return Target(
        **{
            "output": output, "dtype": None, "max_shard_bytes": None, "device": "cpu", "signature": "s",
            **given
        }
    )


def pair(column, row, alpha=1.0):
    return LoraPair(
        torch.tensor([row], dtype=torch.float32), torch.tensor(column, dtype=torch.float32)[:, None], alpha
    )


def model(path, metadata=None, **tensors):
    save_file(tensors, path, metadata=metadata)
    return open_weights(path)
