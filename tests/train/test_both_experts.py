"""One run that trains both experts of a flavor: two runs in turns, of which neither knows of the other."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hvtrain.config import TrainConfig
from hvtrain.errors import ConfigError
from hvtrain.flow.timesteps import quantile_function, share_within
from hvtrain.lorafiles.files import LoraFile
from hvtrain.merge.evaluate import losses_of
from hvtrain.merge.inputs import Inputs
from hvtrain.models import find
from hvtrain.models.load import identify, save_dit
from hvtrain.parallel.context import start
from hvtrain.train import experts, prepare, setup
from hvtrain.train import run as train
from hvtrain.train.experts import drawn
from hvtrain.train.objective import Objective
from tests.models.any_model import random_model
from tests.parallel.ranks import run_ranks
from tests.train.shardset import config, make_shards

SPEC = find("wan")
FLAVOR = SPEC.flavors["tiny-a14b"]
BOUNDARY = 0.875


def write_pair(folder: Path) -> Path:
    """Two experts that differ, and clips."""
    folder.mkdir(exist_ok=True)
    model = random_model(SPEC, FLAVOR)
    for name in ("high", "low"):
        save_dit(model, folder / f"{name}.safetensors", spec=SPEC, flavor=FLAVOR)
        for p in model.parameters():
            p.data.mul_(0.9)
    make_shards(folder / "set", encoders={})
    return folder


def pair_config(folder: Path, output: str | Path, *items: str, which: str = "both") -> TrainConfig:
    parts = (f"model.dit={folder / 'high.safetensors'}", f"model.dit_low={folder / 'low.safetensors'}")
    own = ("model.name=wan", "model.flavor=tiny-a14b", *parts, f"model.experts={which}")
    return config(folder / "set", folder / output, *own, *items)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


def lora(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def same(a: Path, b: Path) -> bool:
    x, y = load_file(a), load_file(b)
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


def turns(monkeypatch: pytest.MonkeyPatch, letters: str) -> None:
    """Whose step each is, instead of the draw."""
    names = {"h": "high", "l": "low"}
    monkeypatch.setattr(experts, "drawn", lambda shares, *, seed, turn: names[letters[turn]])


def test_each_gets_its_share_of_every_stretch() -> None:
    shares = {"high": 0.37, "low": 0.63}
    for seed in range(3):
        whose = [drawn(shares, seed=seed, turn=turn) for turn in range(2000)]
        for begin in range(0, 2000, 50):
            assert abs(whose[begin : begin + 50].count("high") - 18.5) <= 2.5, (seed, begin)
        assert abs(whose.count("high") - 740) <= 4
    three = Counter(drawn({"a": 0.2, "b": 0.3, "c": 0.5}, seed=1, turn=turn) for turn in range(1000))
    assert all(abs(three[key] - n) <= 2 for key, n in {"a": 200, "b": 300, "c": 500}.items()), three


def test_two_files_and_the_whole_distribution(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """Sigma of all steps together is the flavor's own distribution; each expert sees its own
    range, and says so in its file."""
    seen: list[tuple[str, float]] = []
    compare = Objective.compare

    def compared(self, model, batch, *, sigma, draw):
        seen.extend((now[0].now.member.key, s) for s in sigma.tolist())
        return compare(self, model, batch, sigma=sigma, draw=draw)

    now: list[experts.Team] = []
    made = experts.Team.__init__
    monkeypatch.setattr(
        experts.Team, "__init__", lambda self, *a, **k: (made(self, *a, **k), now.append(self))[0]
    )
    monkeypatch.setattr(Objective, "compare", compared)
    items = ("run.steps=48", "flow.shift=5", "data.batch_size=5", "adapter.rank=1")
    cfg = pair_config(folder, "both", *items)
    assert train.run(cfg) == 0
    said = capfd.readouterr().out
    assert (
        "experts high and low for 37 % and 63 % of the steps" in said and "both/lora-high.safetensors" in said
    )
    assert all((s >= BOUNDARY) == (key == "high") for key, s in seen) and len(seen) == 48 * 5
    flow = setup.flow_of(cfg.flow, FLAVOR)
    quantile = quantile_function(flow.timestep_sampling, flow)
    # uniform, if it is the flavor's distribution
    below = torch.tensor(sorted(share_within(quantile, 0.0, s) for _, s in seen))
    # 0.088 is what 240 draws keep to in 95 of 100 cases
    assert (below - (torch.arange(240) + 0.5) / 240).abs().max() < 0.04
    for name, begin, end in (("high", 875, 1000), ("low", 0, 875)):
        with safe_open(folder / f"both/lora-{name}.safetensors", "pt") as file:
            about = file.metadata()
        assert (about["hvtrain.expert"], about["ss_output_name"]) == (name, f"lora-{name}")
        assert (about["ss_min_timestep"], about["ss_max_timestep"]) == (str(begin), str(end))
        assert about["ss_sd_model_name"] == f"{name}.safetensors"
        assert any(
            t.any() for n, t in lora(folder / f"both/lora-{name}.safetensors").items() if "lora_up" in n
        )
    assert json.loads((folder / "both/run.json").read_text())["model.experts"] == "both"
    with pytest.raises(ConfigError, match='model.experts is "both" there, "high" here'):
        train.run(pair_config(folder, "both", *items, which="high"))


def test_an_expert_s_steps_are_those_of_a_run_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and another's steps afterwards change nothing of it: no
    moment, decay or average goes on."""
    for name, letters in (("high", "hhhlll"), ("low", "lllhhh")):
        more = ("adapter.dropout=0.1", "run.ema_decay=0.9", "optim.weight_decay=0.1")
        assert train.run(pair_config(folder, f"alone-{name}", *more, "run.steps=3", which=name)) == 0
        with monkeypatch.context() as patch:
            turns(patch, letters)
            assert train.run(pair_config(folder, f"turns-{name}", *more)) == 0
        for ending in ("", "-ema"):
            files = [folder / f"{kind}-{name}/lora-{name}{ending}.safetensors" for kind in ("alone", "turns")]
            assert same(*files), files
            assert any(t.any() for n, t in lora(files[0]).items() if "lora_up" in n)
    assert not same(folder / "turns-high/lora-low.safetensors", folder / "alone-low/lora-low.safetensors")


def test_it_goes_on_bit_for_bit(folder: Path) -> None:
    items = ("run.ema_decay=0.9", "adapter.dropout=0.1", "run.expert_turn=2")
    whole, halves = (pair_config(folder, name, *items) for name in ("whole", "halves"))
    assert train.run(whole) == 0
    assert train.run(pair_config(folder, "halves", *items, "run.steps=3")) == 0
    assert train.run(halves) == 0
    state = "checkpoints/step-00000006"
    names = [f"lora-{key}{e}.safetensors" for key in ("high", "low") for e in ("", "-ema")]
    for name in (*names, f"{state}/optimizer.safetensors", f"{state}/params.safetensors"):
        assert same(folder / "whole" / name, folder / "halves" / name), name
    lost = folder / "whole/lora-low-ema.safetensors"
    before = lost.read_bytes()
    lost.unlink()
    assert train.run(whole) == 0  # made again from the checkpoint
    assert same(lost, folder / "halves" / lost.name) and len(lost.read_bytes()) == len(before)
    with pytest.raises(ConfigError, match="run.expert_turn is 2 there, 3 here"):
        train.run(pair_config(folder, "whole", *items[:2], "run.expert_turn=3"))


def test_the_idle_one_waits_on_the_host(folder: Path, capfd) -> None:
    """The same run; only the frozen weights of the expert whose step it is are there.
    Also beside swapped blocks."""
    held = (f"eval.shards=[{folder / 'set'}]", "eval.every_steps=3", "eval.max_batches=1")
    items = ("run.recompute=full", "adapter.rank=2", *held)
    assert train.run(pair_config(folder, "device", *items)) == 0
    assert train.run(pair_config(folder, "host", *items, "run.idle_expert=host")) == 0
    assert "the idle one in host memory" in capfd.readouterr().out
    assert train.run(pair_config(folder, "swap", *items, "run.idle_expert=host", "run.blocks_to_swap=1")) == 0
    for other in ("host", "swap"):
        for name in ("lora-high.safetensors", "lora-low.safetensors"):
            assert same(folder / "device" / name, folder / other / name), (other, name)
    rows = [(folder / name / "metrics.jsonl").read_text().splitlines() for name in ("device", "swap")]
    losses = [[json.loads(row)["eval/loss"] for row in found if "eval/loss" in row] for found in rows]
    assert len(losses[0]) == 2 and losses[0] == losses[1]


def test_the_frozen_weights_leave_the_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    step = experts.Team.at_step

    def measured(self, where):
        one = step(self, where)
        sizes.append({key: sum(p.numel() for p in t.subject.model.parameters() if not p.requires_grad)
                      for key, t in self.trainees.items()} | {"now": one.member.key})
        return one

    monkeypatch.setattr(experts.Team, "at_step", measured)
    turns(monkeypatch, "hlhl")
    assert train.run(
        pair_config(folder, "sizes", "run.idle_expert=host", "run.steps=4", "adapter.rank=2")
    ) == 0
    n = sum(p.numel() for p in random_model(SPEC, FLAVOR).parameters())
    assert sizes == [{"high": n, "low": 0, "now": "high"}, {"high": 0, "low": n, "now": "low"}] * 2


class Recorded:
    """Instead of previews: who is asked at which noise level."""

    ema = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[float, torch.nn.Module] = {}
        # it asks for the files that make a video of a prompt
        monkeypatch.setattr(train, "check_train", lambda cfg: None)
        monkeypatch.setattr(train, "plan_previews", lambda *a, **k: ["a"])
        monkeypatch.setattr(train, "Previews", lambda *a, **k: self)

    def make(self, models, step):
        for sigma in (1.0, BOUNDARY, 0.874, 0.0):
            model = models(sigma)
            assert not model.training and model is models(sigma)
            self.asked[sigma] = model.head
        return []


@pytest.mark.parametrize("which", ["high", "low", "both"])
def test_videos_are_made_with_all_experts(folder: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """The one that is not trained as its file has it, only loaded while a video is made."""
    recorded, opened, load = Recorded(monkeypatch), [], prepare.load_dit
    monkeypatch.setattr(
        prepare, "load_dit", lambda path, **k: opened.append(Path(path).stem) or load(path, **k)
    )
    assert train.run(
        pair_config(folder, f"video-{which}", "preview.every_steps=3", "run.steps=6", which=which)
    ) == 0
    other = {"high": ["low"], "low": ["high"], "both": []}[which]
    assert opened == other * 2
    heads = {name: load_file(folder / f"{name}.safetensors")["head.head.bias"] for name in ("high", "low")}
    for sigma, head in recorded.asked.items():
        assert torch.equal(head.head.bias, heads["high" if sigma >= BOUNDARY else "low"]), sigma
    if other:
        monkeypatch.setattr(setup, "load_dit", lambda *a, **k: pytest.fail("the model was read"))
        part = "dit_low" if which == "high" else "dit"
        with pytest.raises(
            ConfigError, match=f"preview.every_steps: .*model.{part} is not set; .* or set it to 0"
        ):
            train.run(
                pair_config(folder, "no-other", "preview.every_steps=3", f"model.{part}=null", which=which)
            )


def test_the_held_out_loss_is_of_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the quantiles of the whole distribution, each by whom it belongs to."""
    seen: dict[float, object] = {}
    compare = Objective.compare

    def compared(self, model, batch, *, sigma, draw):
        if not model.training:
            seen[round(sigma[0].item(), 5)] = model.head.head.bias
        return compare(self, model, batch, sigma=sigma, draw=draw)

    monkeypatch.setattr(Objective, "compare", compared)
    items = (
        f"eval.shards=[{folder / 'set'}]", "eval.every_steps=2", "eval.max_batches=1", "run.steps=2",
        "run.keep_best=true"
    )
    cfg = pair_config(folder, "held", *items, "flow.shift=5")
    assert train.run(cfg) == 0
    flow = setup.flow_of(cfg.flow, FLAVOR)
    levels = quantile_function(flow.timestep_sampling, flow)(
        torch.tensor(cfg.eval.quantiles, dtype=torch.float64)
    )
    assert sorted(seen) == pytest.approx(sorted(levels.tolist()), abs=1e-5)
    heads = {name: load_file(folder / f"{name}.safetensors")["head.head.bias"] for name in ("high", "low")}
    whose = ["high" if torch.equal(seen[s], heads["high"]) else "low" for s in sorted(seen)]
    assert (
        whose == ["high" if s >= BOUNDARY else "low" for s in sorted(seen)] and set(whose) == {"high", "low"}
    )
    assert all((folder / f"held/lora-{name}-best.safetensors").is_file() for name in ("high", "low"))


def test_a_merge_is_evaluated_on_its_expert_s_noise_levels(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    compare = Objective.compare
    monkeypatch.setattr(
        Objective, "compare", lambda self, *a, **k: seen.extend(k["sigma"].tolist()) or compare(self, *a, **k)
    )
    found = identify(folder / "low.safetensors", model="wan", flavor="tiny-a14b")
    losses_of(found, Inputs([], None), {}, [str(folder / "set")], start(device="cpu"), "low")
    assert seen and all(0 < s < BOUNDARY for s in seen)
    seen.clear()
    trained = LoraFile(folder / "a.safetensors", {}, {"hvtrain.expert": "high"})
    losses_of(found, Inputs([(trained, 1.0)], None), {}, [str(folder / "set")], start(device="cpu"))
    assert seen and all(BOUNDARY <= s < 1 for s in seen)


def test_from_files_of_each(folder: Path) -> None:
    assert train.run(pair_config(folder, "first", "run.steps=2")) == 0
    there = folder / "first/lora-{expert}.safetensors"
    with pytest.raises(
        ConfigError, match="lora-low.safetensors was trained as the expert 'low', this is 'high'"
    ):
        train.run(
            pair_config(folder, "wrong", f"adapter.init_from={there.with_name('lora-low.safetensors')}")
        )
    assert train.run(
        pair_config(folder, "second", f"adapter.init_from='{there}'", "run.steps=1", "optim.lr=1e-12")
    ) == 0
    for name in ("high", "low"):
        a, b = (lora(folder / f"{run}/lora-{name}.safetensors") for run in ("first", "second"))
        assert (
            all(torch.allclose(a[n], b[n], atol=1e-9) for n in a)
            and any(t.any() for n, t in a.items() if "lora_up" in n)
        )


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (("flow.max_sigma=0.5",), "flow.max_sigma 0.5 are not the noise levels of the expert 'high', 0.875 "
        "to 1"),
        (("model.dit_low=null",), "model.dit_low is not set; the expert 'low' is in that file"),
        (
            ("model.flavor=tiny", "model.dit_low=null"),
            "flavor 'tiny' has no expert 'high'; it has no experts"
        ),
        (("run.expert_turn=0",), "run.expert_turn is 0, expected more than 0"),
        (("adapter.type=none", "run.idle_expert=host"), "run.idle_expert: a full fine-tune changes all "
        "weights"),
    ],
)
def test_refusals(folder: Path, monkeypatch: pytest.MonkeyPatch, items: tuple[str, ...], says: str) -> None:
    monkeypatch.setattr(setup, "load_dit", lambda *a, **k: pytest.fail("the model was read"))
    with pytest.raises(ConfigError, match=says):
        train.run(pair_config(folder, "refused", *items))
    assert not (folder / "refused").exists()


def test_a_file_that_is_by_its_name_the_other_s(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    high, low = FLAVOR.experts
    for sound in (
        "high_noise_model", "x/high_noise_model/a.safetensors", "wan2.2_t2v_high_noise_14B.safetensors",
        "high.pt", "low_noise_model/wan_high_noise.safetensors", "high_noise_or_low_noise.safetensors",
        "low_res.safetensors"
    ):
        FLAVOR.check_file(high, sound)
    with pytest.raises(
        ConfigError, match="model.dit_low: .* is by its name the expert 'high', and this is the file of 'low'"
    ):
        FLAVOR.check_file(low, "Wan2.2-T2V-A14B/high_noise_model")
    monkeypatch.setattr(setup, "load_dit", lambda *a, **k: pytest.fail("the model was read"))
    (tmp_path / "wan_low_noise.safetensors").symlink_to(folder / "high.safetensors")
    with pytest.raises(
        ConfigError, match="model.dit: .*wan_low_noise.safetensors is by its name the expert 'low'"
    ):
        train.run(pair_config(folder, "swapped", f"model.dit={tmp_path / 'wan_low_noise.safetensors'}"))


MACHINES = {
    "zero0-ulysses": ("zero.stage=0", "parallel.ulysses=2"),
    "zero1-ring": ("zero.stage=1", "parallel.ring=2"),
    "zero2-ulysses": ("zero.stage=2", "parallel.ulysses=2", "run.idle_expert=host"),
    "full3-ring": ("zero.stage=3", "parallel.ring=2", "adapter.type=none", "optim.lr=1e-4"),
}


def _config(folder: Path, name: str, *items: str) -> TrainConfig:
    return pair_config(folder, name, "zero.engine=deepspeed", "run.seed=3", *MACHINES[name], *items)


def _on_ranks(folder: Path) -> None:
    for name in MACHINES:
        cfg = _config(folder, name, "run.steps=4")
        ctx = start(cfg.parallel.ulysses, cfg.parallel.ring)
        if name in ("zero2-ulysses", "full3-ring"):  # the state of both is put together and cut again
            assert train.run(_config(folder, name, "run.steps=2"), ctx) == 0
        assert train.run(cfg, ctx) == 0


@pytest.mark.timeout(300)
def test_two_ranks_train_what_one_does(folder: Path) -> None:
    """ZeRO 0 to 3, also stopped half-way, also all weights of both. Each half has steps of both: seed 3
    draws high, low, low, high."""
    run_ranks(2, _on_ranks, folder, timeout_s=240)
    one = ("run.steps=4", "run.seed=3")
    assert train.run(pair_config(folder, "one", *one)) == 0
    assert train.run(pair_config(folder, "full", *one, "adapter.type=none", "optim.lr=1e-4")) == 0
    for name in MACHINES:
        alone = "full" if name.startswith("full") else "one"
        rows = [
            [
                json.loads(row)["train/loss"]
                for row in (folder / run / "metrics.jsonl").read_text().splitlines()
            ] for run in (name, alone)
        ]  # fmt: skip
        assert len(rows[0]) == 4 and rows[0] == pytest.approx(rows[1], rel=1e-4), name
        for key in ("high", "low"):
            a, b = (lora(folder / run / f"lora-{key}.safetensors") for run in (name, alone))
            assert a.keys() == b.keys() and all(
                (a[n].float() - b[n].float()).abs().max() < 2e-3 for n in a
            ), (name, key)
