"""Merged, split, indexed, exported: the samples stay what they were."""

import json
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from shards import ShardError, edit, info, open_set, ways
from shards.loader import BatchLoader
from shards.schema import Chunk, Made, Manifest, save_manifest
from shards.verify import verify
from shards.writer import write_tar
from tests import typed
from tests.shards.sets import make_set


def contents(*sets):
    return {
        s.key: {n: t.clone() for n, t in s.tensors.items()}
        for found in sets for s in map(found.get, range(len(found)))
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k][n], b[k][n]) for k in a for n in a[k])


def test_split_by_number_is_even_complete_and_disjoint_and_merges_back(tmp_path):
    whole = make_set(tmp_path / "whole", sizes=((7, 3), (4, 5), (1, 2)))
    parts = edit.split(str(tmp_path / "whole"), tmp_path / "parts", ways.by_number(3))
    assert [p.name for p in parts] == ["01", "02", "03"] and {p.samples for p in parts} == {4}
    sets = [open_set(tmp_path / "parts" / p.name) for p in parts]
    assert sum(len(s) for s in sets) == 12 and same(contents(*sets), contents(whole))
    for p in parts:
        assert list(verify(tmp_path / "parts" / p.name)) == []
    merged = edit.merge([str(tmp_path / "parts" / p.name) for p in parts], tmp_path / "merged")
    assert same(contents(merged), contents(whole)) and list(verify(tmp_path / "merged")) == []


def test_split_by_caption_and_rest(tmp_path):
    make_set(tmp_path / "whole")  # captions are the keys: clip0_0 ... clip1_1
    parts = edit.split(str(tmp_path / "whole"), tmp_path / "parts", ways.by_caption(["CLIP0", "clip1_1"]))
    assert [(p.name, p.samples) for p in parts] == [("01", 3), ("02", 1), ("rest", 1)]
    assert json.loads(
        (tmp_path / "parts/split.json").read_text()
    )["parts"][1]["rule"] == "caption matches 'clip1_1'"
    # A whole tar is shared, not copied.
    origin, shared = (
        tmp_path / "whole/latents/000000.tar", next((tmp_path / "parts/01/latents").glob("*.tar"))
    )
    assert origin.stat().st_ino == shared.stat().st_ino
    with pytest.raises(ShardError, match="would be empty"):
        edit.split(str(tmp_path / "whole"), tmp_path / "none", ways.by_caption(["nothing like it"]))
    with pytest.raises(ShardError, match="not a regular expression"):
        ways.by_caption(["("])
    with pytest.raises(ShardError, match="cannot make 9 parts"):
        edit.split(str(tmp_path / "whole"), tmp_path / "nine", ways.by_number(9))


def test_some_of_the_rest_are_kept_aside(tmp_path):
    """For `merge --reconcile`: of what no pattern matches, spread over it, and in no other part."""
    make_set(tmp_path / "whole", sizes=((3, 5), (6, 4)))
    parts = edit.split(str(tmp_path / "whole"), tmp_path / "parts", ways.by_caption(["clip0"]), keep=2)
    assert [(p.name, p.samples) for p in parts] == [("01", 3), ("rest", 4), ("keep", 2)]
    assert open_set(tmp_path / "parts/keep").keys == ["clip1_1", "clip1_4"]
    assert open_set(tmp_path / "parts/rest").keys == ["clip1_0", "clip1_2", "clip1_3", "clip1_5"]
    with pytest.raises(
        ShardError, match=r"--keep 6: takes samples that no --caption pattern matches, .* there are 6"
    ):
        edit.split(str(tmp_path / "whole"), tmp_path / "six", ways.by_caption(["clip0"]), keep=6)
    with pytest.raises(ShardError, match="there are 0"):
        edit.split(str(tmp_path / "whole"), tmp_path / "none", ways.by_number(2), keep=1)


def test_a_few_are_picked_from_several_sets(tmp_path):
    make_set(tmp_path / "a", sizes=((7, 5), (4, 4)))
    assert edit.pick([str(tmp_path / "a")], tmp_path / "few", 3) == 3
    few, whole = open_set(tmp_path / "few"), open_set(tmp_path / "a")
    assert few.keys == ["clip0_1", "clip0_5", "clip1_2"]
    got, had = few.get(2), whole.get(whole.keys.index("clip1_2"))
    assert all(torch.equal(got.tensors[n], t) for n, t in had.tensors.items()) and got.meta == had.meta
    assert edit.pick([str(tmp_path / "a")], tmp_path / "few", 3) == 3  # there already
    assert edit.pick([str(tmp_path / "a")], tmp_path / "all", 99) == 11


def test_a_folder_is_one_part_by_whatever_name(tmp_path):
    names = [
        "/data/ds/jl/a.mp4", "ds/jl/b.mp4", "./ds/jl/c.mp4", "/data/ds/../ds/jl/d.mp4", "jl/e.mp4",
        "/data/other/f.mp4", "g.mp4",
    ]
    keys = [name[-5] for name in names]
    rows = [(k, {"latents": torch.ones(1, 1, 2, 2)}, {"source": name}) for k, name in zip(keys, names)]
    tar = write_tar(tmp_path / "whole", "latents/0.tar", rows)
    save_manifest(tmp_path / "whole", Manifest(("latents",), (Chunk("b", tuple(keys), {"latents": tar}),)))
    parts = edit.split(str(tmp_path / "whole"), tmp_path / "parts", ways.by_folder())
    assert [(p.name, p.rule, p.samples) for p in parts] == [
        ("01", "clips of .", 1), ("02", "clips of /data/ds/jl", 5), ("03", "clips of /data/other", 1)]
    assert open_set(tmp_path / "parts/02").keys == ["a", "b", "c", "d", "e"]
    # Two folders that end alike are not taken for one another.
    assert ways.one_name(["/x/ds", "/y/ds", "ds", "s"]) == {
        "/x/ds": "/x/ds", "/y/ds": "/y/ds", "ds": "ds", "s": "s"
    }


def test_merge_takes_doubles_once_and_refuses_what_does_not_fit(tmp_path):
    make_set(tmp_path / "a", sizes=((3, 5),))
    make_set(tmp_path / "b", sizes=((3, 5), (2, 4)))  # the first three are a's
    merged = edit.merge([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "ab")
    assert len(merged) == 5 and list(verify(tmp_path / "ab")) == []
    make_set(tmp_path / "c", sizes=((3, 5),), seed=1)
    with pytest.raises(ShardError, match="sample clip0_0 differs in 'latents'"):
        edit.merge([str(tmp_path / "a"), str(tmp_path / "c")], tmp_path / "ac")
    found = open_set(tmp_path / "a")
    save_manifest(
        tmp_path / "a", Manifest(("latents", "text"), found.manifest.chunks, {"latents": Made("other")})
    )
    with pytest.raises(ShardError, match="encoders"):
        edit.merge([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "x")
    with pytest.raises(ShardError, match="holds something already"):
        edit.merge([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "b")


def test_export_is_plain_safetensors(tmp_path):
    found = make_set(tmp_path / "whole")
    assert edit.export(str(tmp_path / "whole"), tmp_path / "plain") == 5
    with safe_open(tmp_path / "plain/clip0_2.safetensors", "pt") as file:
        assert file.metadata()["caption"] == "clip0_2" and set(file.keys()) == {"latents", "text", "pooled"}
        assert torch.equal(file.get_tensor("text"), found.get(2).tensors["text"])


def foreign(root, *samples):
    """Tars of two columns as webdataset writes them; a sample is the tensors of its text column."""
    import webdataset

    for column in ("latents", "text"):
        (root / column).mkdir(parents=True)
        with webdataset.TarWriter(str(root / column / "000.tar")) as sink:
            for i, sample in enumerate(samples):
                tensors = {"latents": torch.ones(2, 1, 2, 2)} if column == "latents" else sample
                row = {
                    "caption": f"c{i}",
                    "captions": [f"c{i}", "other"][: 1 + any("." in name for name in sample)]
                }
                sink.write({"__key__": f"k{i}", "safetensors": save(tensors), "json": row})
    return root


def test_tars_of_webdataset_become_a_set(tmp_path):
    foreign(tmp_path, {"text": torch.ones(3, 4)}, {"text": torch.ones(3, 4)})
    found = edit.index(tmp_path)
    assert (
        found.keys == ["k0", "k1"] and found.get(1).meta["caption"] == "c1" and list(verify(tmp_path)) == []
    )
    assert found.manifest.ragged == {"text"}  # of equal length by chance
    (tmp_path / "text/000.tar").unlink()
    with pytest.raises(ShardError, match="'latents' among them|different numbers"):
        edit.index(tmp_path)
        edit.index(tmp_path / "text")


def test_what_is_ragged_is_read_off_the_samples_and_the_models_record(tmp_path):
    """A field of any name: else a batch of unequal lengths could not be stacked."""
    words = [torch.ones(2, 4), torch.ones(5, 4)]
    rows = [
        {"words": w, "words.1": w.clone(), "glyph": torch.ones(3, 6), "pooled": torch.ones(7)} for w in words
    ]
    found = edit.index(foreign(tmp_path / "set", *rows))
    told = {name: (field.dims, field.dtype) for name, field in found.manifest.made_by("text").fields.items()}
    assert told == {
        name: (dims, "float32") for name,
        dims in {"words": (None, 4), "glyph": (3, 6), "pooled": (7,)}.items()
    }
    batch = next(iter(BatchLoader(found, batch_size=2))).tensors
    assert (
        batch["words"].shape == (2, 5, 4) and sorted(batch["words_len"].tolist()) == [2, 5]
        and "glyph_len" not in batch
    )
    assert list(verify(tmp_path / "set")) == []
    # whose text and glyph are ragged
    done = typed.hvtrain("shards", "index", tmp_path / "set", "--model", "hunyuan-video-15")
    assert done.returncode == 0, done.stderr
    again = open_set(tmp_path / "set").manifest
    assert again.ragged == {"words", "glyph"} and again.made_by("text").model == "hunyuan-video-15"
    done = typed.hvtrain("shards", "index", tmp_path / "set", "--model", "hunyuan")
    assert done.returncode == 2 and "--model: no model 'hunyuan'" in done.stderr
    with pytest.raises(ShardError, match=r"k1: 'words' is 2 x 4 float64, in samples before it 2 x 4 float32"):
        edit.index(foreign(tmp_path / "two", {"words": words[0]}, {"words": words[0].double()}))


def test_info_and_the_commands(tmp_path):
    found = make_set(tmp_path / "whole")
    text = "\n".join(info.lines(found))
    assert "5 samples" in text and "bucket 1x2x5 (frames x height x width): 3 samples" in text

    hvtrain = partial(typed.hvtrain, "shards")
    done = hvtrain("verify", tmp_path / "whole")
    assert done.returncode == 0 and "sound, 5 samples" in done.stdout
    done = hvtrain("split", tmp_path / "whole", "--n", 2, "--output", tmp_path / "halves")
    assert done.returncode == 0 and "halves/02: 2 samples" in done.stdout, done.stderr
    done = hvtrain("merge", tmp_path / "halves/01", "--output", tmp_path / "x")
    assert done.returncode == 2 and "two or more" in done.stderr
    done = hvtrain("split", tmp_path / "whole", "--n", 2, "--folder", "--output", tmp_path / "y")
    assert done.returncode == 2 and "not allowed with" in done.stderr
    done = hvtrain("info", tmp_path / "nothing")
    assert done.returncode == 2 and "no shard set here" in done.stderr
    (tmp_path / "whole/text/000000.tar").unlink()
    done = hvtrain("verify", tmp_path / "whole")
    assert done.returncode == 1 and "text/000000.tar" in done.stdout
