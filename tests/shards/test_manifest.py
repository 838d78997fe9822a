"""What a set says of its columns: written, kept by every command, and sets of version 2, which say less."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shards import ShardError, edit, open_set
from shards.info import lines
from shards.loader import BatchLoader
from shards.schema import Chunk, Made, Manifest, Stored, load_manifest, save_manifest
from shards.verify import verify
from shards.writer import write_tar

OLD = Path(__file__).parents[1] / "data/shards_v2"  # written by the program of version 2
FIELDS = {
    "words": Stored((None, 2), "float32"), "letters": Stored((None, 3), "float32"),
    "one": Stored((2,), "float32")
}


def two_texts(root, fields=FIELDS, n=4):
    """Two ragged fields, one of which may be empty."""
    keys = tuple(f"k{i}" for i in range(n))
    rows = [
        (k, {"words": torch.ones(i + 1, 2), "letters": torch.ones(n - 1 - i, 3), "one": torch.ones(2)}, {})
        for i,
        k in enumerate(keys)
    ]
    tar = write_tar(root, "words/0.tar", rows)
    made = {"words": Made("f/float32", "strange", ("a", "b"), fields)}
    save_manifest(root, Manifest(("words",), (Chunk("b", keys, {"words": tar}),), made))
    return open_set(root)


def test_a_batch_pads_what_the_manifest_calls_ragged(tmp_path):
    found = two_texts(tmp_path)
    assert found.manifest == load_manifest(tmp_path) and found.manifest.ragged == {"words", "letters"}
    batch = next(iter(BatchLoader(found, batch_size=4)))
    order = [int(key[1]) for key in batch.keys]
    assert set(batch.tensors) == {"words", "words_len", "letters", "letters_len", "one"}
    assert batch.tensors["words_len"].tolist() == [i + 1 for i in order]
    assert batch.tensors["letters_len"].tolist() == [3 - i for i in order]
    assert (
        batch.tensors["words"].shape == (4, 4, 2) and batch.tensors["letters"].sum().item() == 3 * (3 + 2 + 1)
    )
    assert any("made by strange's a and b, f/float32" in line for line in lines(found))


def test_every_command_keeps_what_is_said(tmp_path):
    found = two_texts(tmp_path / "a")
    made = found.manifest.made
    edit.merge([str(tmp_path / "a")], tmp_path / "merged")
    assert open_set(tmp_path / "merged").manifest.made == made and list(verify(tmp_path / "merged")) == []
    # A set that does not say is merged with one that does, and others are not.
    old = two_texts(tmp_path / "old", fields={})
    assert old.manifest.ragged == {"text"}
    edit.merge([str(tmp_path / "old"), str(tmp_path / "a")], tmp_path / "both")
    assert open_set(tmp_path / "both").manifest.made == made
    two_texts(tmp_path / "other", fields={**FIELDS, "one": Stored((2,), "bfloat16")})
    with pytest.raises(
        ShardError, match="holds words any x 2 float32, letters any x 3 float32, one 2 bfloat16, that of"
    ):
        edit.merge([str(tmp_path / "a"), str(tmp_path / "other")], tmp_path / "no")
    faults = list(verify(tmp_path / "other"))
    assert (
        len(faults) == 4 and all("'one' is (2,) float32, the manifest says 2 bfloat16" in x for x in faults)
    )


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"dims": [None, -1], "dtype": "float32"}, "a field's size is -1"),
        ({"dims": [True], "dtype": "float32"}, "a field's size is True"),
        ({"dims": [2], "dtype": "float 32"}, "a field's dtype is 'float 32'"),
        ({"dims": 2, "dtype": "float32"}, "damaged manifest"),
        ({"dtype": "float32"}, "damaged manifest"),
    ],
)
def test_what_no_field_is_is_refused(tmp_path, row, says):
    two_texts(tmp_path)
    raw = json.loads((tmp_path / "manifest.json").read_text())
    raw["made"]["words"]["fields"]["one"] = row
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ShardError, match=says):
        open_set(tmp_path)


def test_a_set_of_version_2_opens_as_ever(tmp_path):
    found = open_set(OLD)
    assert json.loads((OLD / "manifest.json").read_text())["version"] == 2 and list(verify(OLD)) == []
    assert found.manifest.columns == ("latents", "text") and found.manifest.ragged == {"text"}
    made = found.manifest.made_by("text")
    assert (made.fingerprint[:12], made.encoder[:12], made.model, made.fields) == (
        "8b9fd0726191", "8b9fd0726191", "", {}
    )
    batch = next(iter(BatchLoader(found, batch_size=3, seed=1)))
    assert batch.tensors["text_len"].tolist() == [10, 42, 10] and batch.tensors["text"].shape == (3, 42, 64)
    digest = hashlib.sha256()
    for name in sorted(batch.tensors):
        digest.update(name.encode() + batch.tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    # of that program
    assert digest.hexdigest() == "514f6f0ac56dc77ecc42ecdf505b61283174e2fbf3b53827ec892da2ee0d3257"
    assert found.empty_text["pooled"].shape == (64,)
    # Beside a set that says more, its samples are padded all the same.
    new = shutil.copytree(OLD, tmp_path / "new")
    fields = {"text": Stored((None, 64), "bfloat16"), "pooled": Stored((64,), "bfloat16")}
    told = {
        "latents": found.manifest.made_by("latents"),
        "text": replace(made, model="hunyuan-video", fields=fields)
    }
    save_manifest(new, replace(found.manifest, made=told))
    both = next(iter(BatchLoader([found, open_set(new)], batch_size=6)))
    assert sorted(both.tensors["text_len"].tolist()) == [10] * 4 + [42] * 2
    edit.merge([str(OLD), str(new)], tmp_path / "merged")
    assert open_set(tmp_path / "merged").manifest.made == told
