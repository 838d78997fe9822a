"""Copies of activations on the host: which are made, in which order they come back, and that none stays."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from hvtrain.parallel.hostcopy import HostCopies


def packed(copies: HostCopies, n: int) -> list:
    return [copies.pack(torch.full((2, 3), float(i))) for i in range(n)]


def under_way(kept: list) -> list[int]:
    return [i for i, copy in enumerate(kept) if copy.back is not None]


def test_asking_for_one_starts_those_saved_just_before_it() -> None:
    """The backward goes from the last to the first, so those come next: never the first
    ones, and no more than said."""
    copies = HostCopies(ahead=2)
    kept = packed(copies, 6)
    assert under_way(kept) == []
    seen = []
    for i in (5, 4, 3, 2, 1, 0):
        assert torch.equal(copies.unpack(kept[i]), torch.full((2, 3), float(i)))
        seen.append(under_way(kept))
    assert seen == [[3, 4], [2, 3], [1, 2], [0, 1], [0], []]
    assert copies.out == []


def test_a_copy_on_the_device_is_the_asker_s_alone() -> None:
    """Once dropped it is gone, though autograd still holds what was packed (it may
    ask again: a retained graph)."""
    copies = HostCopies()
    kept = packed(copies, 2)
    back = copies.unpack(kept[1])
    ref = StorageWeakRef(back.untyped_storage())
    assert back.data_ptr() != kept[1].host.data_ptr() and kept[1].back is None
    del back
    assert ref.expired()
    assert torch.equal(copies.unpack(kept[1]), torch.ones(2, 3))
    assert torch.equal(copies.unpack(kept[0]), torch.zeros(2, 3))


def test_what_is_kept_is_a_copy_made_at_once() -> None:
    copies = HostCopies()
    x = torch.arange(4.0, dtype=torch.float64).view(2, 2).t()
    kept = copies.pack(x)
    x.zero_()
    back = copies.unpack(kept)
    assert back.tolist() == [[0.0, 2.0], [1.0, 3.0]] and back.dtype == torch.float64


def test_small_things_and_numbers_of_other_kinds_stay_where_they_are() -> None:
    copies = HostCopies()
    for x in (torch.tensor([1, 2, 3]), torch.tensor(1.5), torch.tensor([2.5]), torch.tensor([True, False])):
        assert copies.pack(x) is x and copies.unpack(x) is x
    assert copies.out == [] and copies.pack(torch.zeros(2)) is not None and len(copies.out) == 1
