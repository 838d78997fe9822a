"""Offloaded activations on a device that copies beside its work: what is on it at a time, and how
much host memory they take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hvtrain.parallel import hostcopy, pinned
from hvtrain.parallel.hostcopy import HostCopies
from hvtrain.parallel.pinned import Rooms

MB = 2**20


class Queue:
    """A stand-in that notes in which order the GPU is told what; a copy is made when the
    computation first waits for it."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.due: dict[int, tuple[Tensor, Tensor]] = {}
        self.n = 0

    def copy(self, to: Tensor, of: Tensor) -> int:
        self.n += 1
        self.due[self.n] = (to, of)
        self.told.append(("copy", self.n))
        return self.n

    def wait(self, event: int) -> None:
        for n in sorted(n for n in self.due if n <= event):  # one stream: those before it too
            to, of = self.due.pop(n)
            to.copy_(of)
        self.told.append(("wait", event))


@pytest.fixture
def unlocked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of memory that was given back; nothing is locked here."""
    gone: list[int] = []
    monkeypatch.setattr(pinned, "page_locked", lambda n: torch.empty(n, dtype=torch.uint8))
    monkeypatch.setattr(pinned, "unlock", lambda memory: gone.append(memory.numel()))
    return gone


def copies_on(queue: Queue, ahead: int = 2) -> HostCopies:
    copies = HostCopies(ahead)
    copies.queue = lambda device: queue  # type: ignore[method-assign, assignment, return-value]
    return copies


def on_device(kept: list) -> list[int]:
    return [
        i for i,
        copy in enumerate(kept) if copy is not None and (copy.still is not None or copy.back is not None)
    ]


@pytest.mark.usefixtures("unlocked")
def test_no_more_than_said_is_on_the_device() -> None:
    """Forward: what leaves is let go of only behind its copy. Backward: a copy back is told when the one
    `ahead` places later is asked for, and the last ones, which never left, are not copied back."""
    queue = Queue()
    copies, kept = copies_on(queue), []
    for i in range(6):
        kept.append(copies.pack(torch.full((4, 5), float(i))))
        assert on_device(kept) == list(range(max(0, i - 1), i + 1))
    waits = [n for what, n in queue.told if what == "wait"]
    assert waits == [1, 2, 3, 4] and queue.told.index(("wait", 1)) > queue.told.index(("copy", 3))
    seen = []
    for i in (5, 4, 3, 2, 1, 0):
        told = len(queue.told)
        assert torch.equal(copies.unpack(kept[i]), torch.full((4, 5), float(i)))
        seen.append((on_device(kept), [what for what, _ in queue.told[told:]]))
        kept[i] = None  # as autograd does behind a block
    assert seen == [
        ([3, 4], ["wait", "copy"]), ([2, 3], ["wait", "copy"]), ([1, 2], ["wait", "copy"]),
        ([0, 1], ["wait", "copy"]), ([0], ["wait"]), ([], ["wait"]),
    ]  # fmt: skip
    assert sum(what == "copy" for what, _ in queue.told) == 6 + 4 and not copies.rooms.used and not copies.out


@pytest.mark.usefixtures("unlocked")
def test_a_backward_that_ends_early_leaves_nothing_behind() -> None:
    queue = Queue()
    copies = copies_on(queue)
    kept = [copies.pack(torch.full((4, 5), float(i))) for i in range(5)]
    copies.unpack(kept[4])
    assert on_device(kept) == [2, 3]
    kept.clear()
    assert not queue.due and not copies.rooms.used  # no copy is under way in memory that is free
    assert [one() for one in copies.out] == [None] * 4
    again = copies.pack(torch.ones(2))  # and the next step begins as if nothing had been
    assert copies.unpack(again).tolist() == [1, 1] and copies.out == []


@pytest.mark.usefixtures("unlocked")
def test_a_graph_that_is_kept_may_ask_twice() -> None:
    copies = copies_on(Queue())
    kept = [copies.pack(torch.full((3,), float(i))) for i in range(4)]
    for _ in range(2):
        for i in (3, 2, 1, 0):
            assert copies.unpack(kept[i]).tolist() == [i] * 3


def test_host_memory_is_what_is_used_at_a_time_and_not_rounded_up(unlocked: list[int]) -> None:
    """Steps of clips of several sizes: never more than the largest step needs and a quarter."""
    copies = copies_on(Queue())
    sizes = {"large": 9 * MB, "small": 5 * MB + 1, "other": 3 * MB}
    for name in ("small", "large", "large", "small", "other", "large"):
        kept = []
        for _ in range(4):
            kept += [copies.pack(torch.zeros(sizes[name] // 4)), copies.pack(torch.zeros(300))]
        assert 4 * sizes[name] < sum(
            room.numel() for room in copies.rooms.used.values()
        ) <= 4 * (sizes[name] + 4 * MB)
        assert copies.rooms.n_bytes <= 1.25 * copies.rooms.most
        for copy in reversed(kept):
            copies.unpack(copy)
        del copy
        kept.clear()
    assert copies.rooms.most == 4 * (10 * MB + 2 * MB) and not copies.rooms.used and unlocked
    before = list(copies.rooms.free)
    for _ in range(3):  # steps of one size lock nothing more
        kept = [copies.pack(torch.zeros(9 * MB // 4)) for _ in range(4)]
        kept.clear()
    assert {id(room) for room in copies.rooms.free} == {id(room) for room in before}


def test_a_room_is_hardly_larger_than_what_lies_in_it(unlocked: list[int]) -> None:
    rooms = Rooms()
    large, text = rooms.take(40 * MB), rooms.take(10)
    assert large.numel() == 40 * MB and text.numel() == 10 and rooms.n_bytes == 42 * MB
    rooms.give(large)
    assert rooms.take(2 * MB).data_ptr() != large.data_ptr()
    assert rooms.take(33 * MB).data_ptr() == large.data_ptr() and not unlocked


def test_only_what_was_locked_is_unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only when the GPU has done its copies."""
    asked: list[object] = []
    failing = [0, 712]
    runtime = SimpleNamespace(cudaHostRegister=lambda *a: failing.pop(0), cudaHostUnregister=asked.append)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("done"))
    made = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **o: made(*size, **o))
    locked, other = pinned.page_locked(100), pinned.page_locked(100)
    pinned.unlock(locked)
    pinned.unlock(other)
    assert asked == ["done", locked.data_ptr(), "done"]


def test_the_real_queue_copies_behind_the_computation_and_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            told.append((self.name, "waits for", other.name))

        def wait_event(self, event: object) -> None:
            told.append((self.name, "waits for", event))

        def record_event(self) -> str:
            return "the copy"

        def __enter__(self) -> None:
            told.append(("on", self.name))

        def __exit__(self, *error: object) -> None:
            told.append("off")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    queue, to = hostcopy.CopyQueue(torch.device("cuda", 0)), torch.zeros(2)
    event = queue.copy(to, torch.ones(2))
    assert told == [("side", "waits for", "main"), ("on", "side"), "off"] and to.tolist() == [1, 1]
    queue.wait(event)
    assert told[-1] == ("main", "waits for", "the copy")
    assert HostCopies().queue(torch.device("cpu")) is None
    assert isinstance(HostCopies().queue(torch.device("cuda", 0)), hostcopy.CopyQueue)
