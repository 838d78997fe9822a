"""Where LoRA files and merged models go, what a disk refuses, and how a damaged file is noticed."""

import errno
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvtrain.lorafiles.write import save_lora
from hvtrain.merge import write
from hvtrain.models.load import save_dit
from hvtrain.weights.outputs import check_place, disk_bytes, size_text
from launcher import cli
from tests.adapters.models import SPEC, adapted, build, lora_tensors


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two models and two LoRAs for the first."""
    folder = tmp_path_factory.mktemp("files")
    for seed in (0, 1):
        save_dit(build(seed), folder / f"dit{seed}.safetensors", spec=SPEC, flavor=SPEC.flavors["tiny"])
        tensors = lora_tensors(adapted(lora_seed=seed))
        save_lora(
            folder / f"lora{seed}.safetensors", tensors, rank=4, alpha=2.0, metadata={},
            architecture=SPEC.name
        )
    return folder


COMMANDS = {
    "convert": ["lora", "convert", "lora0.safetensors", "--dit", "dit0.safetensors", "--to", "comfyui"],
    "resize": ["lora", "resize", "lora0.safetensors", "--dit", "dit0.safetensors", "--rank", "2"],
    "extract": ["lora", "extract", "dit1.safetensors", "dit0.safetensors", "--rank", "2"],
    "ema": ["lora", "ema", "lora0.safetensors", "lora1.safetensors"],
    "average": ["lora", "average", "lora0.safetensors", "lora1.safetensors"],
    "one LoRA": ["merge", "--dit", "dit0.safetensors", "--lora", "lora0.safetensors", "--as", "lora"],
    "model": ["merge", "--dit", "dit0.safetensors", "--lora", "lora0.safetensors"],
}


def call(files, command, output, *options):
    arguments = [str(files / a) if a.endswith(".safetensors") else a for a in COMMANDS[command]]
    return cli.main([*arguments, "--output", str(output), *options])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_makes_its_folder_and_says_in_one_line_what_a_disk_refuses(
    files, tmp_path, command, monkeypatch, capsys
):
    output = tmp_path / "new" / "deep" / "x.safetensors"
    if command == "extract":  # it must not compute first: the mode of a folder says nothing to root
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert call(files, command, output) == 2
        assert "is read-only, or not yours to write in" in capsys.readouterr().err
        monkeypatch.undo()
        assert not list(tmp_path.iterdir())
    for code, said in (
        (errno.ENOSPC, "no room for it"), (errno.EROFS, "cannot be written (Read-only file system)")
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                os, "pwrite", lambda *a, code=code: (_ for _ in ()).throw(OSError(code, os.strerror(code)))
            )
            patch.setattr(os, "copy_file_range", os.pwrite)
            assert call(files, command, output) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"error: {output}: {said}"), lines
        assert list(output.parent.iterdir()) == []
    assert call(files, command, output) == 0
    assert load_file(output)
    (tmp_path / "file").write_text("")
    assert call(files, command, tmp_path / "file" / "x.safetensors") == 2
    assert "is a file, not a directory" in capsys.readouterr().err


def flip(path):
    """One bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_noticed(files, tmp_path, capsys):
    lora, dit = tmp_path / "lora0.safetensors", str(files / "dit0.safetensors")
    shutil.copy(files / "lora0.safetensors", lora)
    flip(lora)
    out = tmp_path / "m.safetensors"
    for command in (
        ["merge", "--dit", dit, "--lora", str(lora)],
        [
            "merge", "--dit", dit, "--lora", str(files / "lora1.safetensors"), "--lora", str(lora),
            "--on-overlap", "sum"
        ],
        ["lora", "convert", str(lora), "--dit", dit, "--to", "diffusers"],
        ["lora", "average", str(lora), str(files / "lora1.safetensors")],
    ):
        assert cli.main([*command, "--output", str(out)]) == 2
        assert f"error: {lora}: damaged: its tensors are not those" in capsys.readouterr().err
        assert not out.exists()
    assert cli.main(
        ["lora", "convert", str(lora), "--edited", "--dit", dit, "--to", "musubi", "--output", str(out)]
    ) == 0
    assert cli.main(["lora", "info", str(out), "--dit", dit]) == 0


def test_every_way_of_writing_a_lora_leaves_a_file_that_reads(files, tmp_path, capsys):
    for number, command in enumerate(COMMANDS):
        if command == "model":
            continue
        out = tmp_path / f"{number}.safetensors"
        assert call(files, command, out) == 0
        assert cli.main(["lora", "info", str(out), "--dit", str(files / "dit0.safetensors")]) == 0
        flip(out)
        assert cli.main(["lora", "info", str(out), "--dit", str(files / "dit0.safetensors")]) == 2, command


def test_other_programs_checksums_only_warn(files, tmp_path, capsys):
    """Kohya's and other tools rewrite tensors and keep the metadata."""
    with safe_open(files / "lora0.safetensors", "pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != "hvtrain.sha256"}
    tensors = load_file(files / "lora0.safetensors")
    dit = str(files / "dit0.safetensors")
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_file(tensors, good, metadata=metadata)
    assert cli.main(["lora", "info", str(good), "--dit", dit]) == 0 and not capsys.readouterr().err
    save_file({n: t.half() for n, t in tensors.items()}, bad, metadata=metadata)
    assert cli.main(["lora", "info", str(bad), "--dit", dit]) == 0
    assert f"warning: {bad}: its tensors do not fit its sshs_model_hash" in capsys.readouterr().err
    metadata["hvtrain.sha256"] = "0" * 64  # a tool that made the hash anew and knows nothing of ours
    save_file(tensors, good, metadata=metadata)
    assert cli.main(["lora", "info", str(good), "--dit", dit]) == 0


def test_metadata_of_others_that_are_damaged_are_one_line(files, tmp_path, capsys):
    tensors = load_file(files / "lora0.safetensors")
    path = tmp_path / "x.safetensors"
    for key, value, said in [
        ("hvtrain.parts", "{", "'hvtrain.parts' is no JSON table"),
        ("hvtrain.parts", "[1]", "'hvtrain.parts' is no JSON table"),
        ("hvtrain.folded_alpha", '{"a": "b"}', "gives 'a' the alpha 'b'"),
        ("hvtrain.folded_alpha", '{"a": 0}', "gives 'a' the alpha 0"),
        ("lora_adapter_metadata", "null", "is no JSON table"),
        ("lora_adapter_metadata", '{"lora_alpha": NaN}', "alphas that are not numbers"),
        ("lora_adapter_metadata", '{"alpha_pattern": [1]}', "alphas that are not numbers"),
        ("lora_adapter_metadata", '{"alpha_pattern": {"(": 1}}', "holds no pattern: '('"),
    ]:
        save_file(tensors, path, metadata={key: value})
        assert cli.main(["lora", "info", str(path), "--dit", str(files / "dit0.safetensors")]) == 2
        err = capsys.readouterr().err
        assert said in err and len(err.strip().splitlines()) == 1
    # Parts that do not fit the tensors do no harm: the tensors decide.
    module = "double_blocks.0.img_attn_qkv"
    for parts in (f'{{"{module}": [4, 4, 4]}}', f'{{"{module}": "x"}}', f'{{"{module}": [4, 0, 0]}}'):
        save_file(tensors, path, metadata={"hvtrain.parts": parts})
        other = tmp_path / "d.safetensors"
        options = [
            "--dit", str(files / "dit0.safetensors"), "--to", "diffusers", "--keep-alpha", "--output",
            str(other)
        ]
        assert cli.main(["lora", "convert", str(path), *options]) == 0
        up = load_file(other)["transformer.transformer_blocks.0.attn.to_v.lora_B.weight"]
        assert torch.equal(up, tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"][96:])


# --- room ---------------------------------------------------------------------------------------------------


def test_room_is_counted_as_the_disk_will_see_it(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "m.safetensors"
    assert call(files, "model", out) == 0
    size = out.stat().st_size
    spare = write._SPARE

    def free(n):
        monkeypatch.setattr(write, "free_bytes", lambda folder: n)

    free(size + spare)
    assert call(files, "model", out) == 0
    capsys.readouterr()
    free(size + spare - 1)  # what is there stays until the new one is complete: its bytes are no room
    before = out.read_bytes()
    assert call(files, "model", out) == 2
    err = capsys.readouterr().err
    needed = f"1 bytes too little for the merged model of {size_text(size)}"
    assert err == (
        f"error: output: {tmp_path} has {size_text(size + spare - 1)} free, {needed}; in the way: {out} "
        f"({size_text(disk_bytes(out))}) (an existing output is kept until the new one is complete)\n"
    )
    assert out.read_bytes() == before
    out.unlink()
    # What an interrupted merge of this name left is used again; another's is named.
    partial = tmp_path / ".m.safetensors.partial"
    partial.write_bytes(bytes(4096 * 4))
    free(size + spare - 4096 * 4)
    assert call(files, "model", out) == 0
    partial.rename(tmp_path / ".other.safetensors.partial") if partial.exists() else None
    (tmp_path / ".other.safetensors.partial").write_bytes(bytes(4096 * 4))
    out.unlink()
    free(size // 2)
    assert call(files, "model", out) == 2
    assert capsys.readouterr().err.endswith(
        f"; in the way: {tmp_path / '.other.safetensors.partial'} (16.4 kB)\n"
    )
    for number in range(5):
        (tmp_path / f".{number}.safetensors.partial").write_bytes(bytes(4096))
    assert call(files, "model", out) == 2
    few = ", ".join(f"{tmp_path / f'.{number}.safetensors.partial'} (4.1 kB)" for number in range(4))
    assert capsys.readouterr().err.endswith(f"; in the way: {few}\n")
    for path in tmp_path.glob(".*.partial"):
        path.unlink()
    assert call(files, "model", out) == 2
    assert capsys.readouterr().err.endswith(f"too little for the merged model of {size_text(size)}\n")


def test_room_for_shards_that_replace_shards(files, tmp_path, monkeypatch):
    """One after the other: each new one needs room beside the old of its name only."""
    out = tmp_path / "m"
    assert call(files, "model", out, "--max-shard-gb", "0.0002") == 0
    sizes = [p.stat().st_size for p in sorted(out.glob("*.safetensors"))]
    assert len(sizes) > 3
    monkeypatch.setattr(write, "_SPARE", 0)
    monkeypatch.setattr(write, "disk_bytes", lambda path: path.stat().st_size if path.exists() else 0)
    monkeypatch.setattr(write, "free_bytes", lambda folder: max(sizes))
    assert call(files, "model", out, "--max-shard-gb", "0.0002") == 0
    monkeypatch.setattr(write, "free_bytes", lambda folder: max(sizes) - 1)
    assert call(files, "model", out, "--max-shard-gb", "0.0002") == 2
    # nothing there gives its room
    assert call(files, "model", tmp_path / "new", "--max-shard-gb", "0.0002") == 2


def test_sizes_are_shown_in_a_unit_that_shows_something():
    assert [size_text(n) for n in (12, 4_500, 8_960_000, 26e9)] == ["12 bytes", "4.5 kB", "9.0 MB", "26.0 GB"]


def test_a_place_is_checked_without_making_it(tmp_path, monkeypatch):
    check_place(tmp_path / "a" / "b" / "c.safetensors")
    monkeypatch.chdir(tmp_path)
    check_place("c.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_output_is_never_an_input(files, tmp_path, capsys):
    for name in ("lora0.safetensors", "lora1.safetensors"):
        shutil.copy(files / name, tmp_path / name)
    one = str(tmp_path / "lora0.safetensors")
    assert cli.main(["lora", "average", one, str(tmp_path / "lora1.safetensors"), "--output", one]) == 2
    assert "is the input; choose another name" in capsys.readouterr().err
    # An average in the run's own folder is not averaged again.
    for _ in range(2):
        assert cli.main(["lora", "ema", str(tmp_path), "--output", str(tmp_path / "ema.safetensors")]) == 0
        assert "average of 2 files" in capsys.readouterr().out
    assert cli.main(["lora", "resize", one, "--rank", "2", "--output", str(tmp_path)]) == 2
    assert cli.main(["lora", "resize", one, "--rank", "2", "--output", str(tmp_path / "x.bin")]) == 2


def test_the_directory_of_a_finished_run_stands_for_its_lora(files, tmp_path, capsys):
    run, dit = tmp_path / "run", ["--dit", str(files / "dit0.safetensors")]
    run.mkdir()
    (run / "config.yaml").write_text("run: {name: cat}\n")
    for name in ("cat.safetensors", "cat-step00000010.safetensors"):
        shutil.copy(files / "lora0.safetensors", run / name)
    assert cli.main(["lora", "info", str(run), *dit]) == 0
    assert f"{run / 'cat.safetensors'}: LoRA for" in capsys.readouterr().out
    out = tmp_path / "comfyui.safetensors"
    assert cli.main(["lora", "convert", str(run), *dit, "--to", "comfyui", "--output", str(out)]) == 0
    assert cli.main(
        ["lora", "resize", str(run), *dit, "--rank", "2", "--output", str(run / "cat.safetensors")]
    ) == 2
    assert "is the input" in capsys.readouterr().err
    (run / "cat.safetensors").unlink()
    assert cli.main(["lora", "info", str(run), *dit]) == 2
    assert "is not finished (no cat.safetensors yet)" in capsys.readouterr().err
    (run / "config.yaml").write_text("- a\n: {")
    assert cli.main(["lora", "info", str(run), *dit]) == 2
    assert "config.yaml is damaged" in capsys.readouterr().err


def test_weights_of_an_average_are_numbers(files, tmp_path, capsys):
    for weight in ("nan", "inf", "-1"):
        out = tmp_path / "x.safetensors"
        assert call(files, "average", out, "--weight", "1", "--weight", weight) == 2
        assert (
            "expected finite numbers, 0 or more, and not all 0" in capsys.readouterr().err
            and not out.exists()
        )
