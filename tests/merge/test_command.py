"""How a merge is asked for and refused, word for word; what a merged file says of itself; one LoRA of
many."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hvtrain.config import LoraFileConfig, MergeConfig, dump
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.files import read_lora
from hvtrain.lorafiles.overlap import Contribution, by_layer
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.write import write_lora
from hvtrain.merge import evaluate
from hvtrain.merge import run as merge
from hvtrain.merge.policies import POLICIES, Options
from hvtrain.merge.write import Target, signature
from hvtrain.models.load import save_dit
from hvtrain.weights.containers import fingerprint, open_weights
from launcher import cli
from launcher.commands.configs import reference_text
from tests.adapters.models import SPEC, build


def refusal(error, function, *arguments, **given):
    with pytest.raises(error) as refused:
        function(*arguments, **given)
    return str(refused.value)


# --- what a command may say ---------------------------------------------------------------------------------


def valid(**given):
    return MergeConfig(
        **{
            "dit": "d.safetensors", "lora": (LoraFileConfig("a.safetensors"),), "output": "m.safetensors",
            **given
        }
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"on_overlap": "summ"}, "on_overlap: no policy 'summ'; did you mean 'sum'?"),
        ({"dtype": "bf16"}, "dtype: no dtype 'bf16'; did you mean 'bfloat16'?"),
        ({"target": "both"}, "target (--as): 'both', expected model or lora"),
        ({"evaluate": ("/nowhere",)}, "evaluate: /nowhere: no such shard set"),
        ({"dit": ""}, "dit: the model to merge into; or give target=lora for one LoRA of all"),
        ({"rank": 4}, "rank is for target lora; a model takes the whole change"),
        ({"target": "lora", "dtype": "float16"}, "dtype and max_shard_gb are for target model"),
        ({"target": "lora", "max_shard_gb": 1.0}, "dtype and max_shard_gb are for target model"),
        ({"target": "lora", "rank": 0}, "rank is 0, expected 1 or more"),
        ({"density": 0.0}, "density is 0.0, expected a share, more than 0 and at most 1"),
        ({"density": 1.1}, "density is 1.1, expected a share, more than 0 and at most 1"),
        ({"density": float("nan")}, "density is nan, expected a share, more than 0 and at most 1"),
        ({"max_shard_gb": 0.0}, "max_shard_gb is 0.0, expected more than 0"),
        ({"max_shard_gb": float("nan")}, "max_shard_gb is nan, expected more than 0"),
        ({"lora": (LoraFileConfig("a", float("nan")),)}, "lora[0].multiplier is nan, expected a finite "
        "number"),
        ({"max_shard_gb": float("inf")}, "max_shard_gb is inf, expected more than 0"),
        (
            {"lora": (LoraFileConfig("a"), LoraFileConfig("b", float("-inf")))},
            "lora[1].multiplier is -inf, expected a finite number",
        ),
        ({"device": "cuda"}, "device: there is no CUDA device here; use cpu"),
        ({"device": "tpu"}, "device: 'tpu', expected auto, cpu or cuda"),
        ({"output": ""}, "output is required: the file to write"),
        ({"lora": ()}, "lora: nothing to merge; give at least one LoRA file (--lora), or a plan (--plan)"),
        ({"output": "m.bin"}, "output: m.bin must end in .safetensors (or name a directory, for a sharded "
        "model)"),
        (
            {"output": ".", "target": "lora", "dit": ""},
            "output: . must end in .safetensors (or name a directory, for a sharded model)",
        ),
        ({"output": "m", "target": "lora"}, "output: m must end in .safetensors (or name a directory, for a "
        "sharded model)"),
    ],
)
def test_refusals_word_for_word(given, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal(ConfigError, merge._check, valid(**given)) == message


def test_what_is_allowed(monkeypatch, tmp_path):
    for given in (
        {}, {"dtype": "float16"}, {"dtype": "bfloat16"}, {"dtype": "float32"}, {"density": 1.0},
        {"density": 1e-9}, {"max_shard_gb": 0.001}, {"output": "folder"}, {"lora": (), "plan": "p.json"},
        {"target": "lora", "rank": 1}, {"target": "lora", "dit": ""},
    ):  # fmt: skip
        merge._check(valid(**given))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    merge._check(valid(device="cuda"))
    here = tmp_path / "x.safetensors"
    here.write_text("")
    other = tmp_path / "y.safetensors"
    other.write_text("")
    merge._check(valid(output=str(here), dit=str(other), lora=(LoraFileConfig(str(other)),)))
    for given in ({"dit": str(here)}, {"lora": (LoraFileConfig(str(other)), LoraFileConfig(str(here)))}):
        assert refusal(ConfigError, merge._check, valid(output=str(here), **given)) == (
            f"output: {here} is one of the inputs; choose another name"
        )


# --- what is made -------------------------------------------------------------------------------------------


def contribution(value, *, multiplier=1.0, alpha=2.0, rank=1):
    return Contribution(
        "x", LoraPair(torch.full((rank, 2), 1.0), torch.full((3, rank), value), alpha), multiplier
    )


def test_a_sum_as_one_pair():
    alone = contribution(3.0)
    assert merge.joined([alone]) is alone.pair
    half = merge.joined([contribution(3.0, multiplier=0.5)])
    assert half.delta().tolist() == [[3, 3]] * 3 and half.alpha == 1.0 and half.up.tolist() == [[3]] * 3
    two = merge.joined([contribution(3.0, multiplier=-1.0), contribution(5.0, rank=2)])
    assert two.rank == 3 and two.alpha == 3.0 and two.delta().tolist() == [[-6 + 10, 4]] * 3
    short = contribution(1.0)
    short = replace(short, pair=LoraPair(short.pair.down.half(), short.pair.up.half(), 2.0), multiplier=1 / 3)
    made = merge.joined([short])
    assert made.up.dtype == made.down.dtype == torch.float32
    assert made.up[0].item() == torch.tensor(2 / 3).item()  # not rounded to float16


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    save_dit(
        build(), folder / "dit.safetensors", spec=SPEC, flavor=SPEC.flavors["tiny"],
        extra={"sshs_x": "1", "note": "kept"}
    )
    layer, (out, width) = (
        "single_blocks.0.linear2", build().get_submodule("single_blocks.0.linear2").weight.shape
    )
    g = torch.Generator().manual_seed(0)
    base = fingerprint(open_weights(folder / "dit.safetensors"))
    for i, name in enumerate("ab"):
        made = LoraPair(torch.randn(2, width, generator=g), torch.randn(out, 2, generator=g), 1.0)
        extra = {
            "ss_loraid": str(i + 4), "hvtrain.plan": "p", "ss_sd_model_name": f"model {name}", "ss_other": "x"
        }
        write_lora(folder / f"{name}.safetensors", {layer: made}, metadata={"hvtrain.base": base, **extra})
    return folder


def entries(folder, *multipliers):
    return tuple(
        LoraFileConfig(str(folder / f"{n}.safetensors"), m) for n, m in zip("ab", multipliers, strict=False)
    )


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_merged_model_says_what_is_in_it(small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "one.safetensors"
    merge.run(MergeConfig(dit=str(small / "dit.safetensors"), lora=entries(small, 0.5), output=str(out)))
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "a.safetensors: 1 layers, rank 2, alpha/rank 0.5, times 0.5; single_blocks 0",
        f"{out}: 1 of {len(build().state_dict())} tensors changed",
        f"report: {tmp_path / 'one-merge.json'}", f"report: {tmp_path / 'one-merge.html'}",
    ]  # fmt: skip
    found = metadata_of(out)
    first = {"file": "a.safetensors", "multiplier": 0.5, "ss_loraid": "4"}
    first["sshs_model_hash"] = metadata_of(small / "a.safetensors")["sshs_model_hash"]
    assert json.loads(found.pop("hvtrain.merged")) == [first]
    assert found == {k: v for k, v in metadata_of(small / "dit.safetensors").items() if k != "sshs_x"}
    again = tmp_path / "two.safetensors"  # onto the merged one: the history goes on
    sets = (str(tmp_path),)
    cfg = MergeConfig(
        dit=str(out), lora=entries(small, 0.0, 2.0)[1:], output=str(again), any_base=True, evaluate=sets
    )
    monkeypatch.setattr(evaluate, "losses_of", lambda *given: {"base": 1.5, "merged": 0.25})
    merge.run(cfg)
    history = json.loads(metadata_of(again)["hvtrain.merged"])
    assert history[0] == first and [h["file"] for h in history] == ["a.safetensors", "b.safetensors"]
    assert history[1]["multiplier"] == 2.0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == ["held-out loss 1.50000  base", "held-out loss 0.25000  merged"]
    assert json.loads((tmp_path / "two-merge.json").read_text())["losses"] == {"base": 1.5, "merged": 0.25}


@pytest.mark.parametrize("said", ["{", "{}", "[1]"])
def test_a_history_that_is_damaged_is_refused_before_anything_is_computed(small, tmp_path, monkeypatch, said):
    dit = tmp_path / "dit.safetensors"
    save_dit(build(), dit, spec=SPEC, flavor=SPEC.flavors["tiny"], extra={"hvtrain.merged": said})
    cfg = MergeConfig(
        dit=str(dit), lora=entries(small, 1.0), output=str(tmp_path / "x.safetensors"), any_base=True
    )
    merge.run(replace(cfg, target="lora"))  # which has no such history
    monkeypatch.setattr(merge, "combine", lambda *given: pytest.fail("too late"))
    wrong = refusal(CheckpointError, merge.run, cfg)
    assert wrong.startswith(f"{dit}: damaged: its metadata 'hvtrain.merged' is no JSON list of tables: ")


def test_what_the_writer_is_told(small, tmp_path, monkeypatch, capsys):
    """Gigabytes are 10^9 bytes, and what is half-written counts only for the same command on the same
    files."""
    told, files = [], [Path("a"), Path("b")]
    monkeypatch.setattr(
        merge, "write_model", lambda weights, parts, target, metadata: told.append(target) or files
    )
    dit, out = small / "dit.safetensors", tmp_path / "x"
    cfg = MergeConfig(
        dit=str(dit), lora=entries(small, 2.0), output=str(out), max_shard_gb=5.0, dtype="float16"
    )
    merge.run(cfg)
    same = signature([dit, small / "a.safetensors"], repr(replace(cfg, device="cpu")))  # as `auto` turned out
    assert told == [Target(out, torch.float16, 5_000_000_000, "cpu", same)]
    assert f"{out}: 1 of {len(build().state_dict())} tensors changed in 2 files" in capsys.readouterr().out
    assert "'wann'" in refusal(ConfigError, merge.run, replace(cfg, model="wann"))


def test_the_evaluation_sees_what_was_combined_by_seed_and_density(small, tmp_path, monkeypatch):
    seen = []
    cfg = MergeConfig(
        dit=str(small / "dit.safetensors"), lora=entries(small, 1.0, 1.0),
        output=str(tmp_path / "x.safetensors"), on_overlap="dare", density=0.25, seed=5,
        evaluate=(str(tmp_path),),
    )
    monkeypatch.setattr(evaluate, "losses_of", lambda *given: seen.append(given) or {})
    merge.run(cfg)
    ((_, inputs, combined, sets, _, expert),) = seen
    assert sets == (str(tmp_path),) and expert is None
    assert [m for _, m in inputs.loras] == [1.0, 1.0]
    ((layer, found),) = by_layer(inputs.loras).items()
    assert list(combined) == [layer]
    assert torch.equal(combined[layer].delta(), POLICIES["dare"](found, layer, Options(0.25, 5)).delta())


def test_shards_are_counted_in_gigabytes(small, tmp_path, capsys):
    size = sum(t.nbytes for t in build().state_dict().values())
    keys = {"dit": str(small / "dit.safetensors"), "lora": entries(small, 0.0)}
    merge.run(MergeConfig(**keys, output=str(tmp_path / "x"), max_shard_gb=size / 1e9 + 1e-9))
    assert len(list((tmp_path / "x").glob("*.safetensors"))) == 1
    said = capsys.readouterr().out
    assert (
        "times 0 (off); single_blocks 0" in said and f"{tmp_path / 'x'}: 0 of " in said
        and "files" not in said
    )
    merge.run(MergeConfig(**keys, output=str(tmp_path / "y"), max_shard_gb=size / 2.5e9, dtype="float32"))
    n = len(list((tmp_path / "y").glob("*.safetensors")))
    assert n >= 3 and f"tensors changed in {n} files" in capsys.readouterr().out


def test_one_lora_of_all(small, tmp_path, capsys):
    layer = "single_blocks.0.linear2"
    shapes = {layer: tuple(build().get_submodule(layer).weight.shape)}
    keys = {
        "dit": str(small / "dit.safetensors"), "target": "lora", "on_overlap": "sum",
        "lora": entries(small, 1.0, -0.5)
    }
    alone = [read_lora(small / f"{n}.safetensors", shapes).pairs[layer].delta() for n in "ab"]
    wanted = alone[0] - 0.5 * alone[1]
    out = tmp_path / "one.safetensors"
    merge.run(MergeConfig(**keys, output=str(out)))
    assert f"{out}: LoRA of 1 layers, rank up to 4, exact" in capsys.readouterr().out
    one = read_lora(out, shapes)
    torch.testing.assert_close(one.pairs[layer].delta(), wanted)
    about = metadata_of(out)
    first = metadata_of(small / "a.safetensors")
    assert {k: about[k] for k in ("hvtrain.base", "hvtrain.plan", "ss_sd_model_name")} == {
        k: first[k] for k in ("hvtrain.base", "hvtrain.plan", "ss_sd_model_name")
    }
    assert (
        about["ss_loraid"] == "4,5" and about["ss_training_comment"] == "merged: a.safetensors, b.safetensors"
    )
    assert (about["ss_network_dim"], about["ss_network_alpha"]) == ("4", "4") and "ss_other" not in about
    assert about["modelspec.title"] == "one" and about["modelspec.architecture"] == f"{SPEC.name}/lora"
    for policy in ("sum", "ties"):  # cut by SVD, factors or the dense delta
        low = tmp_path / f"{policy}.safetensors"
        density = 1.0 if policy == "ties" else None
        merge.run(MergeConfig(**{**keys, "on_overlap": policy}, output=str(low), rank=1, density=density))
        got = read_lora(low, shapes).pairs[layer]
        whole = wanted if policy == "sum" else _ties(alone[0], -0.5 * alone[1])
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        torch.testing.assert_close(got.delta(), s[0] * u[:, :1] @ vh[:1], atol=1e-4, rtol=1e-4)
        error = (s[1:].square().sum() / s.square().sum()).sqrt().item()
        assert f"rank up to 1, largest error of a layer {100 * error:.3g} %" in capsys.readouterr().out
        report = json.loads((tmp_path / f"{policy}-merge.json").read_text())
        assert report["errors"] == {layer: pytest.approx(error, rel=1e-3)}
    ties = MergeConfig(**{**keys, "on_overlap": "ties"}, output=str(out))
    assert refusal(ConfigError, merge.run, ties) == (
        "on_overlap ties makes full matrices: give rank for the LoRA, or target=model"
    )


def _ties(a, b):
    sign = (a + b).sign()
    kept = [torch.where(d.sign() == sign, d, 0.0) for d in (a, b)]
    return sum(kept) / sum(d.ne(0) for d in kept).clamp_min(1)


def test_without_a_model(tmp_path, capsys):
    """One LoRA of published sizes needs no model; a plan's slices do."""
    shapes = {"single_blocks.0.linear2": (3072, 15360)}
    path = tmp_path / "a.safetensors"
    write_lora(
        path, {n: LoraPair(torch.ones(1, s[1]), torch.ones(s[0], 1), 1.0) for n, s in shapes.items()},
        metadata={}
    )
    out = tmp_path / "o.safetensors"
    merge.run(MergeConfig(lora=(LoraFileConfig(str(path), 2.0),), target="lora", output=str(out)))
    assert metadata_of(out)["modelspec.architecture"] == f"{SPEC.name}/lora"
    assert read_lora(out, shapes).pairs["single_blocks.0.linear2"].up[0].item() == 2.0
    asked = MergeConfig(plan="p.json", target="lora", output=str(out))
    assert refusal(ConfigError, merge.run, asked) == (
        "dit: the model that the plan's slices were trained on is needed to read them"
    )


# --- how it is asked for ------------------------------------------------------------------------------------


def test_config_file_keys_and_options_say_the_same(tmp_path, monkeypatch):
    """`hvtrain config merge` prints what `hvtrain merge CONFIG.yaml` loads; keys win over
    the file, options over both."""
    seen = []
    monkeypatch.setattr(merge, "run", lambda cfg: seen.append(cfg))

    def asked(*arguments):
        assert cli.main(["merge", *map(str, arguments)]) == 0
        return seen.pop()

    every = tmp_path / "every.yaml"
    every.write_text(reference_text("merge"))
    assert asked(every) == MergeConfig() == asked()
    two = (LoraFileConfig("a", 0.5), LoraFileConfig("b", 2.0))
    wanted = MergeConfig(
        dit="d", lora=two, plan="p", slices="s", allow_missing=True, any_base=True, output="o", target="lora",
        rank=3, on_overlap="dare", density=0.25, seed=9, dtype="float16", max_shard_gb=1.5, device="cuda",
    )
    options = ["--dit", "d", "--lora", "a", "--lora", "b", "--multiplier", "0.5", "--multiplier", "2"]
    options += ["--plan", "p", "--slices", "s"]
    options += [
        "--allow-missing", "--any-base", "--output", "o", "--as", "lora", "--rank", "3", "--on-overlap",
        "dare"
    ]
    options += [
        "--density", "0.25", "--seed", "9", "--dtype", "float16", "--max-shard-gb", "1.5", "--device", "cuda"
    ]
    assert asked(*options) == wanted
    said = tmp_path / "said.yaml"
    said.write_text(dump(wanted))
    assert asked(said) == wanted
    assert asked(said, "seed=1", "rank=5") == replace(wanted, seed=1, rank=5)
    assert asked(said, "seed=1", "--seed", "0", "--dit", "") == replace(wanted, seed=0, dit="")
    assert asked(said, "--multiplier", "3") == replace(
        wanted, lora=(LoraFileConfig("a", 3.0), LoraFileConfig("b", 3.0))
    )
    assert asked(said, "--lora", "c") == replace(wanted, lora=(LoraFileConfig("c", 1.0),))
    assert asked("model=hunyuan-video") == MergeConfig(model="hunyuan-video")


def test_how_it_is_asked_for_wrongly(tmp_path, capsys):
    for arguments, said in [
        (["--lora", "a", "--multiplier", "1", "--multiplier", "2"], "1 --lora but 2 --multiplier; give one "
        "for each, in order"),
        (["onoverlap=sum"], "unknown key 'onoverlap'; did you mean 'on_overlap'?"),
        (["--dit", "d", "--lora", "a"], "output is required: the file to write"),
        ([], "the model to merge into"),
        (["none.yaml"], "none.yaml"),
    ]:
        assert cli.main(["merge", *arguments]) == 2
        err = capsys.readouterr().err
        assert said in err and len(err.splitlines()) == 1, err
