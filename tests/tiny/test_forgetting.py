"""The table of what merges keep: what each row is made of, that nothing is made twice,
and how seeds become a line."""

import json
import re
from dataclasses import replace

import pytest
import torch

from hvtrain.config import ReconcileConfig, load
from hvtrain.errors import ConfigError
from hvtrain.lorafiles.overlap import Contribution
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.merge.policies import Dense, Options, combine
from hvtrain.slices.run import plan_for
from hvtrain.tiny import forgetting
from hvtrain.tiny.forgetting import ADDED, BEST, JOINT, SEVENTH, WAYS, Recipe
from hvtrain.tiny.rows import Row, kept, markdown
from hvtrain.tiny.score import CONFIGS
from hvtrain.tiny.words import CONCEPTS, OLD, WORDS, first

ORDINARY = "ordinary LoRA"


class Made:
    """What the recipe asks the product for, which is then there."""

    def __init__(self):
        self.encoded, self.trained, self.merged, self.scored = [], [], [], []

    def encode(self, folder, made):
        self.encoded.append((folder.parts[-3:], [clip.word for clip in made]))
        return folder / "shards"

    def train(self, cfg):
        self.trained.append(cfg)
        path = f"{cfg.run.output_dir}/{cfg.run.name}.safetensors"
        self._write(path)

    def merge(self, cfg):
        self.merged.append(cfg)
        self._write(cfg.output)

    def score(self, folder, dit, loras, words=tuple(CONCEPTS), *, old=True):
        self.scored.append((folder.name, dit, [p.name for p in loras]))
        return {**dict.fromkeys(words, 0.5), **({OLD: 0.75} if old else {})}

    @staticmethod
    def _write(name):
        path = forgetting.Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


@pytest.fixture
def made(monkeypatch):
    found = Made()
    monkeypatch.setattr(forgetting, "_encoded", found.encode)
    monkeypatch.setattr(forgetting.train, "run", found.train)
    monkeypatch.setattr(forgetting.merge, "run", found.merge)
    monkeypatch.setattr(forgetting, "score", found.score)
    return found


def table(capsys, recipe):
    forgetting.run(recipe)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]


def test_each_row_is_what_its_name_says(made, tmp_path, capsys):
    asked = replace(
        load(Recipe, CONFIGS / "forgetting.yaml"), output=str(tmp_path), ways=(ORDINARY,), seeds=(4,)
    )
    lines = table(capsys, asked)
    names = [line.split(" | ")[1] for line in lines]
    assert names == list(WAYS[-1].rows) and len(names) == 13
    assert (
        [cfg.run.seed for cfg in made.trained] == [4] * 7
        and len({cfg.data.shards for cfg in made.trained}) == 7
    )
    assert {(cfg.adapter.rank, cfg.adapter.alpha, cfg.run.steps) for cfg in made.trained} == {(8, 8, 400)}
    merges = dict(zip([n for n in names if "alone" not in n], made.merged, strict=True))
    for name, cfg in merges.items():
        how = cfg.reconcile.how
        plain = name in forgetting.POLICIES
        assert (cfg.on_overlap, how) == (
            (name, "auto") if plain else ("error", name.split(",")[0].split()[0])
        )
        assert cfg.reconcile.own_states == ("captions only" in name)
        assert cfg.target == ("lora" if name in (BEST, ADDED) else "model")
        keep = (
            () if name == ADDED or how == "auto" else (str(tmp_path / "seed-4" / "data" / "old" / "shards"),)
        )
        assert cfg.reconcile.keep == keep, (
            "what is added to a merge has its old words from what the merge left"
        )
        given = [forgetting.Path(lora.path).name for lora in cfg.lora]
        six = [f"{i:02d}.safetensors" for i in range(1, 7)]
        assert given == (["merged-fit+distill.safetensors", "07.safetensors"] if name == ADDED else six)
    scored = {folder: (forgetting.Path(dit).name, loras) for folder, dit, loras in made.scored}
    assert scored["merged-sum"] == ("merged-sum.safetensors", [])
    assert scored[f"merged-{BEST}"] == (
        forgetting.Path(forgetting.asset(forgetting.DIT)).name, [f"merged-{BEST}.safetensors"]
    )
    assert scored["alone-star"][1] == ["01.safetensors"] and scored["alone-ring"][1] == ["07.safetensors"]


def test_what_is_there_is_not_made_again_and_can_be_shown_alone(made, tmp_path, capsys):
    recipe = Recipe(str(tmp_path), seeds=(1, 2), ways=(ORDINARY,), rows=("alone", "sum"))
    before = table(capsys, recipe)
    assert (
        len(before) == 2 and before[1].startswith("| ordinary LoRA | sum | 2 | 50 | 50 | 100 | 100 | 75 | ")
    )
    assert [cfg.run.output_dir.split("/")[-3] for cfg in made.trained] == ["seed-1"] * 6 + ["seed-2"] * 6
    n = len(made.trained), len(made.merged), len(made.scored)
    assert table(capsys, recipe) == before and (len(made.trained), len(made.merged), len(made.scored)) == n
    assert table(capsys, replace(recipe, rows=("alone", "sum", "average"), only_show=True)) == before
    assert (len(made.trained), len(made.merged)) == n[:2]
    table(capsys, replace(recipe, rows=("average",), seeds=(2,)))
    assert (len(made.trained), len(made.merged)) == (n[0], n[1] + 1), "trained for another row"
    # killed before they were written
    for left in ("rows/ordinary-lora-sum.json", "ordinary-lora/merged-sum.seconds.json"):
        (tmp_path / "seed-1" / left).unlink()
    assert table(capsys, recipe)[1] == before[1]
    assert (len(made.merged), len(made.scored)) == (n[1] + 1, n[2] + 2), (
        "its merge is there, only its row is not"
    )


def test_one_lora_for_all_sets_has_as_many_parameters(made, tmp_path, capsys):
    (line,) = table(capsys, Recipe(str(tmp_path), seeds=(3,), ways=(JOINT,), joint=(7,)))
    assert line.startswith("| one LoRA of all sets | 7 steps | 1 | ")
    (cfg,) = made.trained
    assert (cfg.adapter.rank, cfg.run.steps, len(cfg.data.shards)) == (8 * len(CONCEPTS), 7, len(CONCEPTS))
    assert [words for _, words in made.encoded] == [[word] * 36 + [""] * 36 for word in CONCEPTS]


def test_more_words_share_their_trainings(made, tmp_path, capsys):
    recipe = replace(load(Recipe, CONFIGS / "words.yaml"), output=str(tmp_path), words=12, seeds=(2,))
    lines = table(capsys, recipe)
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| base model", ""], *(["| 12 ordinary LoRAs", how] for how in ("alone", "sum", BEST))
    ]
    assert lines[1].split(" | ")[7] == "" and lines[3].split(" | ")[7] == "75", (
        "alone, only the words are asked for"
    )
    assert [cfg.run.output_dir for cfg in made.trained] == [
        str(tmp_path / "seed-2" / "words" / f"{i:02d}") for i in range(1, 13)
    ]
    assert {(cfg.adapter.rank, cfg.run.steps) for cfg in made.trained} == {(8, 200)}
    assert [place[-1] for place, _ in made.encoded][:12] == list(first(12))
    assert len(table(capsys, replace(recipe, words=14))) == 4 and len(made.trained) == 14
    assert [(len(cfg.lora), forgetting.Path(cfg.output).name) for cfg in made.merged] == [
        (n, f"merged-{how}-{n}.safetensors") for n in (12, 14) for how in ("sum", BEST)
    ]
    given = replace(recipe, seeds=(5,), reconcile=("states=144", "steps=200"))
    table(capsys, given)
    assert [
        (cfg.reconcile.states, cfg.reconcile.steps) for cfg in made.merged if cfg.reconcile.how == BEST
    ] == [(ReconcileConfig.states, ReconcileConfig.steps)] * 2 + [(144, 200)]
    for n in (1, 41):
        with pytest.raises(ConfigError, match=f"words: {n}: expected 2 to 40"):
            forgetting.run(replace(recipe, words=n))


@pytest.mark.parametrize(("given", "says"), [
    ({"output": ""}, "output is not set"),
    ({"clips": 30}, "clips: 30: expected a multiple of 12"),
    ({"clips": 0}, "clips: 0: expected a multiple of 12"),
    ({"rows": ("alone", "fitt")}, "rows: there is no 'fitt'; did you mean 'fit'?"),
    ({"ways": ("ordinary",)}, "ways: there is no 'ordinary'; "),
    ({"words": 12, "rows": ("fit",)}, "rows: there is no 'fit'; "),
])  # fmt: skip
def test_what_would_be_left_out_without_a_word_is_refused(made, tmp_path, given, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        forgetting.run(replace(Recipe(str(tmp_path)), **given))
    assert not made.trained and not made.scored


def test_the_seventh_word_is_none_of_the_six():
    made = forgetting.drawings(SEVENTH, 24, seed=1)
    assert (
        [clip.word for clip in made] == [SEVENTH] * 24 + [""] * 24
        and {clip.color for clip in made[:24]} == {"orange"}
    )
    assert SEVENTH not in WORDS and "orange" not in {concept.color for concept in WORDS.values()}
    assert (
        made[0].caption == "a ring moves left on a gray background"
        and len({clip.caption for clip in made[:24]}) == 12
    )
    old = {repr(c) for word in CONCEPTS for c in forgetting.drawings(word, 24, seed=1)[24:]}
    assert not old & {repr(c) for c in made[24:]}
    assert forgetting.drawings("star", 12, seed=1) == forgetting.clips_of("star", 12, seed=1)


@pytest.mark.parametrize("way", [way for way in WAYS if way.cut], ids=lambda way: way.name)
def test_of_slices_every_policy_is_the_sum(way):
    """So the table has the sum only."""
    plan = plan_for(way.cut, dit=forgetting.DIT, model=None, flavor=None)
    layers: dict[str, list[Contribution]] = {}
    for number, owned in enumerate(plan.slices):
        for slot in owned.slots:
            up = torch.zeros(4096, 1)  # rows as many as any layer has
            up[slot.begin : slot.end] = number + 1
            layers.setdefault(slot.module, []).append(
                Contribution(str(number), LoraPair(torch.ones(1, 5), up, 1.0), 1.0)
            )
    summed = combine(layers, "sum", Options())
    for policy in forgetting.POLICIES[1:]:
        for module, result in combine(layers, policy, Options()).items():
            assert not isinstance(result, Dense) and result == summed[module] and result == layers[module]


def row(how, *shares, old=1.0, seconds=10.0, alone=False):
    return Row("way", how, {**dict(zip(("star", "cross"), shares)), OLD: old}, seconds, alone)


def test_a_line_is_the_mean_of_its_seeds_and_their_range():
    first = [row("alone", 1.0, 0.5, alone=True), row("sum", 0.5, 0.5, old=0.75, seconds=3)]
    second = [row("alone", 1.0, 1.0, alone=True), row("sum", 0.25, 0.75, seconds=5)]
    lines = markdown([first, second, [row("sum", 0.25, 0.0)]]).splitlines()
    assert (
        lines[0] == "|  |  | seeds | mean | worst word | mean of alone | worst of alone | old words | CPU s |"
    )
    assert lines[2] == "| way | alone | 2 | 88 [75-100] | 75 [50-100] |  |  | 100 | 10 |"
    # alone's figures of the same seed; cross, which has all it has alone, does not make up for
    # star. The third seed has no alone
    assert markdown(
        [[row("sum", 0.5, seconds=None)]]
    ).splitlines()[2] == "| way | sum | 1 | 50 | 50 |  |  | 100 |  |"
    assert (
        lines[3] == "| way | sum | 3 | 38 [12-50] | 25 [0-50] | 62 [50-75] | 38 [25-50] | 92 [75-100] | 6 |"
    )
    assert len(lines) == 4


def test_more_than_alone_makes_up_for_nothing():
    assert kept(row("sum", 0.9, 0.5), {"star": 0.6, "cross": 1.0}) == [1.0, 0.5]
    assert kept(row("sum", 0.9, 0.5), {"star": 0.0, "cross": 0.5}) == [1.0, 1.0]


def test_a_row_is_read_as_it_was_written(tmp_path):
    made = row("alone", 0.3, 0.7, alone=True)
    made.save(tmp_path / "deep" / "row.json")
    assert (
        forgetting.read_row(tmp_path / "deep" / "row.json") == made
        and forgetting.read_row(tmp_path / "none.json") is None
    )
    assert json.loads((tmp_path / "deep" / "row.json").read_text())["scores"][OLD] == 1.0
