"""The order of samples, by value: it must be the same for ever, or no run could be continued."""

import hashlib
from itertools import islice

import numpy as np
import pytest

from shards.order import MicroBatch, Mixture, count, epoch_order, mix, mixture, pick, salt, stream

MASK = (1 << 64) - 1


def splitmix(state):
    """One step of splitmix64 with Python's own numbers, as its authors print it."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_hash_is_splitmix64():
    # The published first numbers of the generator that starts at 0; and at 1234567.
    gamma = 0x9E3779B97F4A7C15
    assert mix(np.array([0]), 0).tolist() == [0xE220A8397B1DCDAF]
    assert mix(np.array([gamma, 2 * gamma & MASK], dtype=np.uint64), 0).tolist() == [
        0x6E789E6AA1B965F4, 0x06C45D188009454F
    ]
    assert mix(np.array([0]), 1234567).tolist() == [6457827717110365317]
    values = [0, 1, 2, 1 << 40, MASK]
    assert mix(np.array(values, dtype=np.uint64), MASK).tolist() == [
        splitmix((v + MASK) & MASK) for v in values
    ]
    assert mix(np.arange(3), 5).dtype == np.uint64


def test_a_salt_is_the_first_eight_bytes_of_a_sha256():
    assert salt(7, 3, "samples") == int.from_bytes(hashlib.sha256(b"7/3/samples").digest()[:8], "little")
    assert (
        salt(7, 3, "samples") == SALT
        and salt("73", "samples") != salt(7, 3, "samples") != salt(7, 3, "batches")
    )


SALT = 572876071946327394


def test_a_caption_is_picked_by_the_hash():
    for n in (1, 2, 3, 7):
        wanted = [splitmix((i + salt(4, 2, "caption")) & MASK) % n for i in range(20)]
        assert [pick(4, 2, i, n) for i in range(20)] == wanted and set(wanted) == set(range(n))
    assert [pick(4, e, 0, 1000) for e in range(3)] == PICKS and type(pick(4, 0, 0, 2)) is int


PICKS = [753, 323, 877]


def by_hand(groups, batch_size, seed, epoch):
    batches = []
    for bucket in sorted(groups):
        members = sorted(
            groups[bucket].tolist(), key=lambda i: splitmix((i + salt(seed, epoch, "samples")) & MASK)
        )
        batches += [tuple(members[i : i + batch_size]) for i in range(0, len(members), batch_size)]
    places = sorted(range(len(batches)), key=lambda i: splitmix((i + salt(seed, epoch, "batches")) & MASK))
    return [batches[i] for i in places]


GROUPS = {"b": np.array([3, 4, 5, 9, 10]), "a": np.array([0, 1, 2, 6, 7, 8]), "c": np.array([11, 12])}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 20])
def test_an_epoch_is_shuffled_in_its_buckets_cut_and_shuffled_again(batch_size):
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (123456789, 77)):
        order = epoch_order(GROUPS, batch_size=batch_size, seed=seed, epoch=epoch)
        got = [order.batch(i) for i in range(len(order.starts))]
        assert got == by_hand(GROUPS, batch_size, seed, epoch)
        assert (
            order.lengths.tolist() == [len(batch) for batch in got]
            and all(type(i) is int for b in got for i in b)
        )


def test_the_order_written_down():
    order = epoch_order(GROUPS, batch_size=2, seed=1, epoch=0)
    assert [order.batch(i) for i in range(7)] == WRITTEN


WRITTEN = [(11, 12), (10, 9), (1, 7), (4, 5), (8, 2), (6, 0), (3,)]


def test_the_stream_is_epoch_after_epoch():
    wanted, begin = [], 0
    for epoch in range(3):
        for samples in by_hand(GROUPS, 2, 5, epoch):
            wanted.append(MicroBatch(epoch, samples, begin))
            begin += len(samples)
    assert begin == 3 * 13 == 3 * count(GROUPS)
    assert list(islice(stream(GROUPS, batch_size=2, seed=5), len(wanted))) == wanted


def test_a_cursor_anywhere_is_the_rest_of_the_stream():
    whole = list(islice(stream(GROUPS, batch_size=3, seed=5), 20))
    flat = [(batch.epoch, sample) for batch in whole for sample in batch.samples]
    for cursor in range(33):
        (first, second) = islice(stream(GROUPS, batch_size=3, seed=5, cursor=cursor), 2)
        inside = next(b for b in whole if b.begin <= cursor < b.begin + len(b.samples))
        assert first == MicroBatch(inside.epoch, inside.samples[cursor - inside.begin :], cursor)
        assert second == whole[whole.index(inside) + 1]
        assert flat[cursor : cursor + len(first.samples)] == [(first.epoch, s) for s in first.samples]


def test_nothing_has_no_order():
    assert count({}) == count({"a": np.array([], dtype=np.int64)}) == 0
    with pytest.raises(ValueError, match="^no samples$"):
        next(stream({}, batch_size=2, seed=0))


# --- mixtures and batches by bucket -------------------------------------------------------------------------


def drawn(mix_, *, seed, epochs):
    """The samples of each epoch, in the order of the stream."""
    found = [[] for _ in range(epochs)]
    for batch in mix_.stream(seed=seed):
        if batch.epoch == epochs:
            return found
        found[batch.epoch] += batch.samples


A, B = {"x": np.arange(0, 6), "y": np.arange(6, 10)}, {"x": np.arange(10, 12), "z": np.arange(12, 20)}


def test_sets_without_weights_are_one_set():
    both = {"x": np.concatenate([A["x"], B["x"]]), "y": A["y"], "z": B["z"]}
    mixed = mixture([A, B], batch_size=3)
    assert mixed.counts == (10, 10) and mixed.n == 20
    assert list(islice(mixed.stream(seed=3), 20)) == list(islice(stream(both, batch_size=3, seed=3), 20))


def test_weights_are_shares_and_each_set_is_gone_through_evenly():
    mixed = mixture([A, B], batch_size=2, weights=[3, 1])
    assert mixed.counts == (15, 5)
    epochs = drawn(mixed, seed=4, epochs=8)
    for epoch in epochs:
        assert len(epoch) == 20 and sum(i < 10 for i in epoch) == 15 and max(map(epoch.count, epoch)) == 2
    assert [sum(e.count(i) for e in epochs) for i in range(20)] == [12] * 10 + [4] * 10
    for two in zip(epochs[::2], epochs[1::2], strict=True):  # 5 and 5 of B: every sample once
        assert sorted(i for epoch in two for i in epoch if i >= 10) == list(range(10, 20))
    assert epochs != drawn(mixed, seed=5, epochs=8) and epochs == drawn(mixed, seed=4, epochs=8)


def mixed_by_hand(mix_, seed, epoch):
    """A set is passed through in an order of its own each time; the epoch's part of that, with each pass's
    number above its samples, is shuffled as one set."""
    groups = {}
    for number, (buckets, n) in enumerate(zip(mix_.sets, mix_.counts, strict=True)):
        home = {i: bucket for bucket, members in buckets.items() for i in members.tolist()}
        for place in range(epoch * n, epoch * n + n):
            turn, at = divmod(place, len(home))
            one = sorted(home, key=lambda i: splitmix((i + salt(seed, turn, "passes", number)) & MASK))[at]
            copy = turn - epoch * n // len(home)
            groups.setdefault(home[one], []).append(one + (copy << 40))
    batches = by_hand(
        {bucket: np.array(members) for bucket, members in groups.items()}, mix_.batch_size, seed, epoch
    )
    return [tuple(i % (1 << 40) for i in batch) for batch in batches]


@pytest.mark.parametrize("weights", [[3, 1], [1, 3], [1, 9], [1, 1]])
def test_the_order_of_a_mixture(weights):
    mixed = mixture([A, B], batch_size=3, weights=weights)
    for seed, epoch in ((0, 0), (0, 1), (1, 1), (9, 5)):
        order = mixed.order(seed=seed, epoch=epoch)
        assert [order.batch(i) for i in range(len(order.starts))] == mixed_by_hand(mixed, seed, epoch)


def test_a_set_of_which_nothing_is_drawn():
    order = Mixture((A, B), (0, 10), 20).order(seed=0, epoch=0)
    assert sorted(i for n in range(len(order.starts)) for i in order.batch(n)) == list(range(10, 20))


def test_copies_in_an_epoch_are_shuffled_apart():
    mixed = mixture([{"x": np.arange(40)}, {"x": np.array([40])}], batch_size=4, weights=[1, 1])
    assert mixed.counts == (21, 20)  # 20.5 each, rounded down, and one more for the first
    order = mixed.order(seed=0, epoch=0)
    batches = [order.batch(i) for i in range(len(order.starts))]
    assert sum(batch.count(40) for batch in batches) == 20 and sum(40 in batch for batch in batches) > 6


def test_a_cursor_anywhere_in_a_mixture_is_the_rest_of_its_stream():
    mixed = mixture([A, B], batch_size=3, weights=[1, 5])
    flat = [(b.epoch, i) for b in islice(mixed.stream(seed=5), 40) for i in b.samples]
    for cursor in range(50):
        first = next(mixed.stream(seed=5, cursor=cursor))
        assert (
            first.begin == cursor
            and flat[cursor : cursor + len(first.samples)] == [(first.epoch, i) for i in first.samples]
        )


def test_no_weight_is_so_small_that_a_set_is_never_seen():
    assert mixture([A, B], batch_size=1, weights=[1, 1e-6]).counts == (19, 1)
    assert mixture([A, B], batch_size=1, weights=[1, 2]).counts == (7, 13)


def test_what_rounding_leaves_over_goes_to_those_that_lost_most():
    assert mixture([A, B], batch_size=1, weights=[2, 1]).counts == (13, 7)  # of 13.33 and 6.67
    assert mixture([A, B], batch_size=1, weights=[1, 2.2]).counts == (6, 14)  # of 6.25 and 13.75
    assert mixture([A, B, A], batch_size=1, weights=[10.4, 9.9, 9.7]).counts == (10, 10, 10)


def test_every_bucket_has_batches_of_its_own_size():
    order = epoch_order(GROUPS, batch_size={"a": 4, "b": 1, "c": 2}, seed=1, epoch=0)
    sizes = {"a": [], "b": [], "c": []}
    for i in range(len(order.starts)):
        batch = order.batch(i)
        sizes[next(b for b in GROUPS if batch[0] in GROUPS[b])].append(len(batch))
    assert {b: sorted(n) for b, n in sizes.items()} == {"a": [2, 4], "b": [1] * 5, "c": [2]}
