import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvtrain.errors import CheckpointError
from hvtrain.models.stream import Slot, lay_out, open_writer, read_header, tensor_bytes


def sample() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "z.norm": torch.randn(5, generator=draw),
        "a.weight": torch.randn(3, 4, generator=draw).bfloat16(),
        "b.fp8": torch.randn(3, 3, generator=draw).to(torch.float8_e4m3fn),
        "c.half": torch.randn(2, 2, generator=draw).half(),
        "d.alpha": torch.tensor(4.0),
        "e.empty": torch.zeros(0, 4),
        "f.index": torch.arange(3),
        "g.flag": torch.tensor([True, False]),
    }


def slots(tensors: dict[str, torch.Tensor]) -> list[Slot]:
    return [Slot(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def test_the_library_reads_what_was_streamed(tmp_path):
    tensors, path = sample(), tmp_path / "x.safetensors"
    with open_writer(path, slots(tensors), metadata={"who": "é \"quoted\""}) as writer:
        for name in reversed(list(tensors)):  # any order
            writer.write(name, tensors[name])
        assert not path.exists()
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else True
    assert loaded["d.alpha"].item() == 4.0
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"who": "é \"quoted\""}


def test_a_file_equals_the_librarys_byte_for_byte(tmp_path):
    tensors = {k: v for k, v in sample().items() if v.dtype != torch.float8_e4m3fn}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    save_file(tensors, theirs, metadata={"one": "entry"})
    header = read_header(theirs)
    assert header.metadata == {"one": "entry"}
    data = memoryview(theirs.read_bytes())
    with open_writer(ours, header.slots.values(), metadata=header.metadata) as writer:
        for slot in header.slots.values():
            writer.write_bytes(slot.name, data[slot.start : slot.stop])
    assert read_header(ours).slots == header.slots
    assert ours.read_bytes() == theirs.read_bytes()


def test_slots_read_back(tmp_path):
    tensors, path = sample(), tmp_path / "x.safetensors"
    with open_writer(path, slots(tensors)) as writer:
        for name in writer.waiting:
            writer.write(name, tensors[name])
    data = path.read_bytes()
    for name, slot in read_header(path).slots.items():
        assert slot.start % slot.dtype.itemsize == 0 and slot.dtype == tensors[name].dtype
        assert data[slot.start : slot.stop] == bytes(tensor_bytes(tensors[name]))


def test_an_incomplete_file_never_appears(tmp_path):
    tensors, path = sample(), tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="not written"), open_writer(path, slots(tensors)) as writer:
        writer.write("d.alpha", tensors["d.alpha"])
    with pytest.raises(ValueError, match="declared"), open_writer(path, slots(tensors)) as writer:
        writer.write("d.alpha", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(sample(), path)
    whole = path.read_bytes()
    for content, match in [
        (whole[:-1], "cut short"),
        (whole[:200], "not a safetensors file"),
        (b"PK\x03\x04" + bytes(60), "not a safetensors file"),
        (b"", "not a safetensors file"),
    ]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            read_header(path)


def test_lay_out_aligns():
    head, placed = lay_out([Slot("b", torch.uint8, (3,)), Slot("a", torch.float32, (2,))])
    assert len(head) % 8 == 0 and [slot.name for slot in placed] == ["a", "b"]
    assert placed[1].stop == len(head) + 11
