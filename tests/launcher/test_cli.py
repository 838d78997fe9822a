"""What a person types and gets: commands, errors, exit codes."""

from __future__ import annotations

import errno
import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvtrain import config
from hvtrain.errors import LaunchError
from launcher import cli, table
from launcher.commands import configs, run
from launcher.exits import USER_ERROR
from launcher.program import HVTRAIN

ROOT = Path(__file__).resolve().parents[2]


def hvtrain(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*HVTRAIN, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT, **options
    )


# --- commands -----------------------------------------------------------------------------------------------


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    times = []
    for _ in range(5):
        begun = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = hvtrain("--help")
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime)
    assert done.returncode == 0
    for name in ("models", "encode", "train", "generate", "merge", "launch", "demo", "config"):
        assert name in done.stdout
    assert min(times) < 0.3, f"hvtrain --help computes for {min(times):.2f} s at best"
    probe = "import sys, launcher.cli as c; c.main(['train', 'x=1']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
    assert "unknown key 'x'" in done.stderr


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*name.split(" "), "--help"])
    assert end.value.code == 0
    assert name in capsys.readouterr().out


def test_models_keys_of_the_full_size() -> None:
    begun = time.perf_counter()
    done = hvtrain("models", "keys", "hunyuan-video")
    seconds = time.perf_counter() - begun
    lines = dict(line.split("\t") for line in done.stdout.splitlines())
    assert lines["double_blocks.19.img_attn_qkv.weight"] == "9216x3072"
    assert lines["single_blocks.39.linear1.weight"] == "21504x3072"
    assert seconds < 60  # 1.2 s on a machine that does nothing else, where 3 s are allowed


def test_models_lists_flavors_and_sizes() -> None:
    text = hvtrain("models").stdout
    assert "12,821,012,544" in text and "skyreels-v1-i2v" in text and "tiny" in text


@pytest.mark.parametrize("name", list(config.ROOTS))
def test_config_prints_what_loads_as_the_defaults(name: str, tmp_path: Path) -> None:
    file = tmp_path / "reference.yaml"
    file.write_text(hvtrain("config", name).stdout)
    assert config.load(config.ROOTS[name], file) == config.ROOTS[name]()


def test_the_committed_reference_is_the_code() -> None:
    committed = (ROOT / "configs" / "reference.yaml").read_text()
    assert committed == configs.reference_text(), "run: hvtrain config > configs/reference.yaml"


RECIPES = ("clips", "forgetting", "vae", "words")  # of hvtrain.tiny's own programs
SHIPPED = [path for path in sorted((ROOT / "configs").glob("*/**/*.yaml")) if path.stem not in RECIPES]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_shipped_configs_load(path: Path) -> None:
    root = config.ROOTS[
        next((verb for verb in ("encode", "generate") if path.stem.startswith(verb)), "train")
    ]
    assert config.load(root, path) != root()


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "optim.lrr=1"], "did you mean 'optim.lr'"),
        (["train", "nowhere.yaml"], "nowhere.yaml: no such config file"),
        (["train", "a.yaml", "b.yaml"], "one config file expected"),
        (["merge", "--dit", "x", "--output", "y"], "--lora"),
        (
            [
                "merge", "--dit", "x", "--lora", "a", "--lora", "b", "--multiplier", "1", "--multiplier", "1",
                "--multiplier", "0", "--output", "y"
            ],
            "2 --lora but 3"
        ),
        (["launch", "--nproc", "2", "demo"], "choose one of: encode, generate, merge, train"),
        (["launch", "--nproc", "2"], "cannot start nothing"),
        (["launch", "--nproc", "0", "train", "run.steps=x"], "run.steps"),
        (["models", "keys", "hunyuan-vidio"], "did you mean 'hunyuan-video'"),
        (["data", "check", "pyproject.toml", "--workers", "0"], "--workers 0: expected 1 or more"),
        (["data", "preview", "pyproject.toml", "--max", "0"], "--max 0: expected 1 or more"),
        (["demo", "--output", "pyproject.toml"], "pyproject.toml is a file; give a directory"),
        (["demo", "--model", "hunyuan"], "did you mean 'hunyuan-video'"),
        (["demo", "--output", "tests"], "tests holds files that no demo wrote"),
        (["demo", "--output", "/proc/no/demo"], "/proc/no/demo cannot be made"),
        (["doctor", "--dir", "nowhere"], "--dir nowhere: no such directory"),
        (["fit", "model.dit=null", "--memory", "nan"], "--memory is nan, expected a GPU's memory in GiB"),
        (["config", "trainn"], "did you mean 'train'"),
        (
            ["generate", "configs/tiny/generate.yaml", "prompt=a cat", "output=x.mp4", "frames=12"],
            "expected 4n + 1"
        ),
        (
            ["generate", "configs/tiny/generate.yaml", "prompt=a cat", "output=x.mp4", "width=100"],
            "multiple of 16"
        ),
        (["generate", "lora=a.sft", "configs/tiny/generate.yaml"],
            "error: command line: lora[0] is 'a.sft', expected a section with keys of its own, as in {path: "
            "'a.sft'}"),
        (["train", "configs/tiny/lora.yaml", "optim.lrr=1"], "error: command line: unknown key 'optim.lrr'"),
        (
            ["generate", "--lora", "a", "--lora", "b", "--lora_multiplier", "1", "2", "3"],
            "2 --lora but 3 --lora_multiplier"
        ),
        (["generate", "--lora", "a", "lora=[]"], "give all of them in one way"),
        (
            ["generate", "--lora", "a", "--lora", "b", "--lora_expert", "x", "y", "z"],
            "2 --lora but 3 --lora_expert; give one"
        ),
        (["generate", "--lora_expert", "low", "prompt=x"], "--lora_expert says whose a --lora is"),
        (["generate", "--lora", "a", "--loraid", "1", "--lora_multiplier", "1"], "--lora_multiplier: of "
        "--lora or of --loraid?"),
        (["train", "run.steps=1", "--bogus", "run.name=a"], "unknown option --bogus; see 'hvtrain train "
        "--help'"),
        (["encode", "a.yaml", "--strikt", "output=b"], "unknown option --strikt, did you mean '--strict'?; "
        "see 'hvtrain encode"),
        (["shards", "info", "a", "b"], "unexpected argument 'b'; see 'hvtrain shards info --help'"),
        (["slices", "run", "--plan"], "see 'hvtrain slices run --help'"),
        (["fit", "configs/hunyuan_video_15/generate.yaml"], "for a config of `hvtrain generate` add "
        "--generate"),
        (["fit", "configs/hunyuan_video_15/encode.yaml"], "unknown key 'batch_size'"),
        (["fit", "configs/hunyuan_video/lora.yaml"], "without weights: add model.dit=null model.flavor=t2v"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(arguments) == USER_ERROR
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err, err


def test_options_stand_anywhere_between_the_other_arguments() -> None:
    parsed = table.parse(["encode", "a.yaml", "--strict", "dataset=b", "output=c"])
    assert (parsed.command, parsed.strict, parsed.items) == (
        "encode", True, ["a.yaml", "dataset=b", "output=c"]
    )
    parsed = table.parse(
        ["fit", "--gpus", "8", "a.yaml", "--size", "64x64x9", "data.batch_size=2", "--generate"]
    )
    assert (parsed.items, parsed.size, parsed.gpus) == (["a.yaml", "data.batch_size=2"], "64x64x9", "8")
    parsed = table.parse(
        ["slices", "run", "a.yaml", "--plan", "P", "--data", "D", "run.steps=4", "--output", "O"]
    )
    assert (parsed.command, parsed.items, parsed.output) == ("slices run", ["a.yaml", "run.steps=4"], "O")
    parsed = table.parse(["shards", "merge", "A", "--output", "O", "B"])
    assert parsed.sets == ["A", "B"]
    # What follows the launched command is that command's.
    parsed = table.parse(["launch", "--nproc", "2", "encode", "a.yaml", "--strict", "output=c"])
    assert (parsed.nproc, parsed.arguments) == (2, ["encode", "a.yaml", "--strict", "output=c"])


def test_generate_takes_lora_files_as_merge_does() -> None:
    def lora(*arguments: str):
        parsed = table.parse(["generate", *arguments])
        run._generate_items(parsed)
        run._generate_items(parsed)  # the launcher looks at the same arguments before
        return table.load_config("generate", parsed)

    files = "--lora", "a b.safetensors", "prompt=x", "--lora", "ü😀: [1].safetensors"
    found = lora(*files, "--lora_multiplier", "0.8", "-0.5", "steps=3")
    assert [(f.path, f.multiplier) for f in found.lora] == [
        ("a b.safetensors", 0.8), ("ü😀: [1].safetensors", -0.5)
    ]
    assert (found.prompt, found.steps) == ("x", 3)
    assert [
        f.multiplier for f in lora("--lora", "a", "--lora", "b", "--lora-multiplier", "0.5").lora
    ] == [0.5, 0.5]
    assert [f.multiplier for f in lora("--lora", "a", "--lora", "b").lora] == [1.0, 1.0]
    found = lora(*files, "--lora_expert", "high", "low", "steps=3")
    assert (
        [(one.expert, one.multiplier) for one in found.lora] == [("high", 1.0), ("low", 1.0)]
        and found.steps == 3
    )
    assert {one.expert for one in lora(*files, "--lora_expert", "low").lora} == {"low"}
    assert lora("slices=runs", "--LORAID", "1", "--LORAID", "2", "prompt=x").loraid == (1, 2)
    found = lora("slices=runs", "--LORAID", "1", "2", "3", "--lora_multiplier", "1.0", "0.7", "1", "prompt=x")
    assert (found.loraid, found.lora_multiplier) == ((1, 2, 3), (1.0, 0.7, 1.0))
    found = lora("slices=runs", "--loraid", "1", "2", "prompt=x", "--lora_multiplier", "1.0", "0")
    assert (found.loraid, found.lora_multiplier, found.lora, found.prompt) == ((1, 2), (1.0, 0.0), (), "x")


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def broken(args: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "doctor", table.Command("doctor", "", lambda parser: None, broken))
    assert cli.main(["doctor"]) == 1
    assert "Traceback" in (err := capsys.readouterr().err) and "ZeroDivisionError: a bug" in err


def test_the_demo_needs_no_gpu_for_each_of_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher import demo

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    seen = []
    monkeypatch.setattr(demo, "run", lambda *of: seen.append((*of, os.environ["CUDA_VISIBLE_DEVICES"])))
    assert cli.main(["demo", "--output", "there", "--model", "wan"]) == 0
    assert seen == [("there", "wan", "")]


def test_an_error_of_several_lines_is_printed_as_one(capsys: pytest.CaptureFixture) -> None:
    from launcher.exits import guarded

    def fail() -> None:
        raise LaunchError("first\n  second\n")

    assert guarded(fail) == USER_ERROR
    assert capsys.readouterr().err == "error: first; second\n"


def test_shard_errors_are_mistakes_too(capsys: pytest.CaptureFixture) -> None:
    from launcher.exits import guarded
    from shards.errors import ShardError

    def fail() -> None:
        raise ShardError("x.tar: truncated")

    assert guarded(fail) == USER_ERROR


@pytest.mark.parametrize(
    ("to", "code", "said"),
    [
        ("| head -1", 0, ""),
        ("> /dev/full", 2, "error: standard output: No space left on device; what was printed is not "
        "complete\n"),
        (">&-", 2, "error: standard output: closed; what was printed is not complete\n"),
        (">&- 2>&-", 2, ""),
    ],
)
def test_a_command_that_prints_ends_when_nobody_can_read_it(to: str, code: int, said: str) -> None:
    command = f"set -o pipefail; {shlex.join(HVTRAIN)} config train {to}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("| true", ""),
        ("2>&1 | true", ""),
        (">&-", ""),
        ("> /dev/full", "warning: standard output: No space left on device; going on without it\n"),
    ],
)
def test_a_command_that_makes_files_finishes_in_silence(tmp_path: Path, to: str, said: str) -> None:
    """`hvtrain train | head -1` must not leave with success and nothing saved."""
    script = tmp_path / "work.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "from launcher import cli, table\n"
        "def work(args):\n"
        "    for i in range(40):\n"
        "        print('step', i, flush=True)\n"
        "        print('note', i, file=sys.stderr if 'both' in sys.argv else sys.stdout)\n"
        "        time.sleep(0.005)\n"
        "    pathlib.Path('result').touch()\n"
        "    return 7\n"
        "cli.COMMANDS['demo'] = table.Command('demo', '', lambda parser: None, work)\n"
        "sys.argv = [sys.argv[0], 'demo']\n"
        "sys.exit(cli.main())\n"
    )
    command = f"set -o pipefail; {shlex.join([sys.executable, str(script)])} {to}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stderr) == (7, said)
    assert (tmp_path / "result").exists()


def test_a_pipe_that_breaks_elsewhere_is_a_bug_and_no_success(capsys: pytest.CaptureFixture) -> None:
    from launcher.exits import guarded

    def fail() -> None:
        raise BrokenPipeError("of a reader process")

    assert guarded(fail) == 1
    assert "BrokenPipeError: of a reader process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "make room"), (errno.EROFS, "can be written"), (errno.EACCES, "permission")]
)
def test_what_the_disk_refuses_is_one_line(number: int, advice: str, capsys: pytest.CaptureFixture) -> None:
    from launcher.exits import guarded

    def fail() -> None:
        raise OSError(number, os.strerror(number), "/data/out/model.safetensors")

    assert guarded(fail) == USER_ERROR
    err = capsys.readouterr().err
    assert err.startswith(f"error: /data/out/model.safetensors: {os.strerror(number)}; ") and advice in err
    assert err.count("\n") == 1


def test_so_is_what_a_library_in_rust_says_of_the_disk(capsys: pytest.CaptureFixture) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    from launcher.exits import guarded

    assert guarded(lambda: save_file({"a": np.zeros(1)}, "/sys/a.safetensors")) == USER_ERROR
    err = capsys.readouterr().err
    assert (
        err.startswith("error: ") and "os error" in err and "; choose a place" in err and err.count("\n") == 1
    )


def test_a_file_of_our_own_that_is_not_there_is_a_bug(capsys: pytest.CaptureFixture) -> None:
    from launcher.exits import guarded

    assert guarded(lambda: Path("/nowhere/state.json").read_text() and 0) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_file_name_that_is_no_text_is_printed_with_escapes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.toml")
    done = subprocess.run([*HVTRAIN, "data", "check", name], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == USER_ERROR and done.stderr.startswith("error: caf\\udce9.toml")


def test_a_model_without_the_word_keys_is_told_what_to_type(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["models", "hunyuan-video"]) == USER_ERROR
    assert "`hvtrain models keys hunyuan-video`" in capsys.readouterr().err
