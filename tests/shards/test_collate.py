"""Samples that cannot be one batch are named; padding is zeros."""

import pytest
import torch

from shards import ShardError
from shards.collate import choose_caption, collate
from shards.reader import Sample


def samples(*tensors):
    return [Sample(f"k{i}", t, {}) for i, t in enumerate(tensors)]


def test_text_is_padded_with_zeros_and_the_rest_is_stacked():
    a = {"latents": torch.ones(2, 3), "text": torch.ones(1, 4)}
    b = {"latents": torch.zeros(2, 3), "text": torch.full((3, 4), 2.0)}
    batch = collate(samples(a, b), ragged={"text"})
    assert (
        batch["latents"].tolist() == [[[1.0] * 3] * 2, [[0.0] * 3] * 2]
        and batch["text_len"].tolist() == [1, 3]
    )
    assert batch["text"].tolist() == [[[1.0] * 4, [0.0] * 4, [0.0] * 4], [[2.0] * 4] * 3]


@pytest.mark.parametrize(
    ("field", "a", "b", "says"),
    [
        ("latents", torch.ones(2, 3), torch.ones(3, 2), "has shapes"),
        ("latents", torch.ones(2), torch.ones(2).bfloat16(), "has dtypes bfloat16, float32"),
        ("text", torch.ones(2, 3), torch.ones(2, 4), "has shapes anyx3, anyx4"),
        ("text", torch.ones(2, 3), torch.ones(2), "has shapes any, anyx3"),
        ("text", torch.ones(()), torch.ones(()), "has shapes none"),
        ("text", torch.ones(2, 3), torch.ones(2, 3).half(), "has dtypes float16, float32"),
    ],
)
def test_samples_that_differ_are_named(field, a, b, says):
    with pytest.raises(ShardError, match=f"samples k0, k1: '{field}' {says}"):
        collate(samples({field: a}, {field: b}), ragged={"text"})


def test_an_absurd_number_of_captions_is_a_field_like_another():
    sample = Sample("k", {"text": torch.ones(1, 2), "text.99999999999999999999999": torch.ones(1, 2)}, {})
    assert choose_caption(sample, seed=0, epoch=0, index=0) is sample
