"""Any command line near a right one: one line and exit code 2, or what was asked
for; never success for nothing."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvtrain import config
from launcher.table import COMMANDS, Parser
from tests.fuzz.world import World, fuzz, world  # noqa: F401 (a fixture)

# Every one of these is right. @NAME@: a file that the user has; old: an unfinished `slices
# run` in the working directory.
LINES = (
    "data check @clips.toml@ --workers 1",
    "data check @jsonl.toml@ --model hunyuan-video --flavor tiny",
    "data preview @clips.toml@ --output page.html --max 2 --workers 1",
    "encode @encode.yaml@ batch_size=1 --strict",
    "train @train.yaml@ run.steps=1 optim.lr=1e-3",
    "train @train.yaml@ adapter.rank=2 parallel.ulysses=1 flow.shift=3",
    "generate @generate.yaml@ seed=1 output=b.mp4",
    "generate @generate.yaml@ prompt=null prompt_file=@prompts.txt@ output=many",
    'generate @generate.yaml@ lora=[{"path":"@lora.safetensors@","multiplier":0.5}]',
    "launch --nproc 1 train @train.yaml@ run.steps=1",
    "launch --nproc 2 encode @encode.yaml@ output=new",
    "launch --nproc 2 --max-restarts 1 generate @generate.yaml@",
    "launch --nproc 2 --nnodes 2 --node-rank 1 --master-addr host --master-port 20000 train @train.yaml@",
    "launch --nproc 2 --nnodes 2 --slurm --dry-run --site @site.yaml@ --time 1:00:00 --name a --log a-%j.log "
    "train @train.yaml@",
    "shards info @set@",
    "shards verify @set@ --fast",
    "shards merge @parts/01@ @parts/02@ --output merged",
    "shards split @set@ --n 2 --output parts",
    "shards export @set@ --output files",
    "shards import-musubi @clips@ --output set --samples-per-tar 2",
    "slices plan --dit tiny:dit.safetensors --n 3 --granularity module --order interleaved --output plan",
    "slices plan --model hunyuan-video --flavor tiny --blocks-per-loraid 1 --include .*double.* --output "
    "plan",
    "slices run @train.yaml@ --plan @plan/plan.json@ --data @parts@ --output run --backend slurm --dry-run "
    "--site @site.yaml@",
    "slices run @train.yaml@ --plan @plan/plan.json@ --data @parts@ --output run --at-once 2 --nproc 1 "
    "--merge-as none",
    "slices status old",
    "slices retry old",
    "slices cancel old",
    "merge --dit tiny:dit.safetensors --lora @lora.safetensors@ --multiplier 0.5 --output merged.safetensors",
    "merge --lora @lora.safetensors@ --lora @lora.safetensors@ --as lora --on-overlap ties --density 0.3 "
    "--output l.safetensors",
    "lora info @lora.safetensors@ --dit tiny:dit.safetensors",
    "lora convert @lora.safetensors@ --dit tiny:dit.safetensors --to comfyui --output c.safetensors",
    "lora resize @lora.safetensors@ --dit tiny:dit.safetensors --rank 2 --output r.safetensors",
    "lora extract tiny:dit.safetensors tiny:dit.safetensors --rank 1 --output e.safetensors",
    "lora average @lora.safetensors@ @lora.safetensors@ --weight 1 --weight 2 --output v.safetensors",
    "lora ema @lora.safetensors@ @lora.safetensors@ --beta 0.9 --output v.safetensors",
    "fit @train.yaml@ --gpus 1,2 --memory 80 --size 64x64x5",
    "models keys hunyuan-video --flavor tiny",
    "config train",
    "config show train @train.yaml@ optim.lr=1",
    "config schema generate",
    "import musubi @musubi.sh@ --out mine.yaml",
    "import diffusion-pipe @pipe.toml@ --shards s",
    "init --model hunyuan-video --flavor tiny --memory 8 --size 32x32x5 --out mine.yaml adapter.rank=4",
)
ODD = (
    "", " ", "-", "--", "nan", "inf", "-1", "0", "1", "3", "1e99", "9"*30, "0.5", "é😀", "a\nb",
    "$(touch PWN)", "'", '"', "%j", "/dev/null", "/", ".", "missing.yaml", "a,b", "[1]", "{}", "true", "null",
    "x=1", "=", "a=b=c", "--help", "--nope", "1x1x1", "\udcff",
)
VALUES = (
    "[", "{", "{a: 1}", "[1, x]", "*a", "&a 1", "!!python/object:os.system", "~", "yes", "0x10", "1_000",
    ": :", "1:30", "2026-01-01", "[[1]]", "-0.0", "1e400", "-inf", ".nan", ".inf", "1e-320", "[nan]",
    "[1e99]", "'", "|", "> x", "- a", "a: b: c", "[{}]", "[null]",
)


def words(line: str, world: World) -> list[str]:  # noqa: F811
    return [re.sub(r"@(.+?)@", lambda m: str(world.given / m[1]), word) for word in line.split()]


def keys(root: type) -> list[str]:
    """Every key of a command's config, dotted."""
    found = []
    for key, value in config.to_dict(root()).items():
        found += [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
    return found


def options() -> list[str]:
    """Every option of every command."""
    found: set[str] = set()
    for command in COMMANDS.values():
        parser = Parser()
        command.options(parser)
        found.update(*(a.option_strings for a in parser._actions if not isinstance(a, argparse._HelpAction)))
    return sorted(found)


KEYS = sorted(
    {key for root in config.ROOTS.values() for key in keys(root) if "output" not in key}
    | {"run", "x.y", "model.dti"}
)
OPTIONS = options()
WRITES = ("output", "--output", "--out", "--log", "--name")  # where a user lets it write is the user's to say


@st.composite
def mistaken(draw: st.DrawFn, right: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The line with up to three slips."""
    line = list(right)
    odd = st.one_of(st.sampled_from(ODD), st.sampled_from(paths))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(1, len(line)))
        slip = draw(st.sampled_from(("replace", "key", "option", "drop", "move", "twice", "value")))
        if slip == "key":
            line.append(f"{draw(st.sampled_from(KEYS))}={draw(st.one_of(st.sampled_from(VALUES), odd))}")
        elif slip == "option":
            line[place:place] = [draw(st.sampled_from(OPTIONS)), *draw(st.lists(odd, max_size=1))]
        elif place >= len(line) or line[place - 1] in WRITES or line[place].startswith(("output=", *WRITES)):
            continue
        elif slip == "replace":
            line[place] = draw(odd)
        elif slip == "value" and "=" in line[place]:
            line[place] = line[place].partition("=")[0] + "=" + draw(st.one_of(st.sampled_from(VALUES), odd))
        elif slip == "drop":
            del line[place]
        elif slip == "twice":
            line.insert(place, line[place])
        elif slip == "move":
            line.insert(draw(st.integers(1, len(line) - 1)), line.pop(place))
    return line


@pytest.mark.parametrize("line", LINES)
def test_a_right_line_is_taken(world: World, line: str) -> None:  # noqa: F811
    """Else the slips below would prove nothing."""
    world.fresh_output()
    outcome = world.try_line(words(line, world))
    refusals = {"shards import-musubi": "latent caches", "slices retry": "", "lora extract": "equal"}
    known = next((text for start, text in refusals.items() if line.startswith(start)), None)
    assert outcome.code != 2 or (known is not None and known in outcome.err), f"{line}\n{outcome.err}"


@fuzz(examples=700)
@given(data=st.data())
def test_any_command_line(world: World, data: st.DataObject) -> None:  # noqa: F811
    right = words(data.draw(st.sampled_from(LINES)), world)
    paths = [str(p) for p in sorted(world.given.iterdir())]
    line = data.draw(mistaken(right, paths), label="command line")
    world.fresh_output()
    world.try_line(line)
