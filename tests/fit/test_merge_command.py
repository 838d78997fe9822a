"""`hvtrain fit --merge`: of LoRAs that there are, and of those that there will be."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from hvtrain.config import MergeConfig, ReconcileConfig, load
from hvtrain.fit.merges.needs import of_merge
from hvtrain.fit.merges.run import Loras, job_of
from hvtrain.fit.merges.streaming import PairSize
from hvtrain.fit.trace import Shape
from hvtrain.models import find
from hvtrain.models.load import save_dit
from hvtrain.slices.plan import Cut
from hvtrain.slices.run import run as plan_slices
from launcher import cli
from tests.merge.test_reconcile import SHAPES, TARGETS, TEXT, config, place  # noqa: F401 - a fixture

TINY = ["model=hunyuan-video", "flavor=tiny"]
CLIP = Shape(1, 5, 32, 32)


def said(capsys, *arguments):
    code = cli.main(["fit", "--merge", *arguments])
    found = capsys.readouterr()
    return code, found.out + found.err


def test_what_will_be_is_said_for_each_number_of_gpus(capsys):
    sizes = ["--loras", "3", "--lora-rank", "4", "--size", "32x32x5", "--gpus", "1,2"]
    code, text = said(capsys, *TINY, *sizes, "reconcile.host_gb=0.001")
    assert code == 0
    first = (
        "hunyuan-video tiny: fit+distill of 3 LoRAs of rank 4 in 24 layers, from 180 noisy clips of 32 x 32 "
        "x 5, 48 held out"
    )
    assert text.splitlines()[0] == first and "1 GPU(s) of" in text and "2 GPU(s) of" in text
    assert text.count("host memory of a process:") == 2 and "GiB on the disk beside the output" in text
    assert (
        "fit " in text and "distill" in text and "fits: " in text
        and " of them in float32; as training each LoRA on " in text
    )
    code, text = (
        said(capsys, *TINY, "--loras", "3", "--size", "32x32x5", "--memory", "0.001", "reconcile.how=distill")
    )
    assert (
        code == 0 and "does not fit: " in text and "--rank with fit+distill" in text and "noisy clips" in text
    )
    code, text = (
        said(
            capsys, *TINY, "--loras", "3", "--size", "32x32x5", "--memory", "0.001", "reconcile.how=fit",
            "target=lora"
        )
    )
    assert code == 0 and "usable; fewer LoRAs at a time" in text and "distill" not in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (TINY, "the config names no LoRAs; say how many there will be with --loras"),
        ([*TINY, "--loras", "0"], "--loras 0: expected 1 or more"),
        ([*TINY, "--loras", "2", "reconcile.how=none"], "reconcile: this merge adds weights up"),
        ([*TINY, "--loras", "2", "--generate"], "--merge goes without --generate and --table"),
        ([*TINY, "--loras", "2", "--gpus", "3", "parallel.ulysses=2"], "2 GPUs that share a clip do not "
        "divide 3"),
        (["lora=[{path: a}]"], "dit: the model that the LoRAs change is needed"),
        (["lora=[{path: a}]", "--lora-rank", "4"], "are for LoRAs that are not there yet"),
        ([*TINY, "--loras", "2", "reconcile.batch_size=0"], "reconcile.batch_size is 0, expected more"),
        ([*TINY, "--loras", "2", "rank=0", "target=lora"], "rank is 0, expected 1 or more"),
        ([*TINY, "--loras", "2", "reconcile.how=fit", "on_overlap=sum"], "leave --on-overlap and --density"),
        ([*TINY, "--loras", "2", "on_overlap=sum"], "reconcile: this merge adds weights up"),
        ([*TINY, "--loras", "1"], "reconcile: this merge adds weights up"),
    ],
)
def test_what_cannot_be_told_is_refused(capsys, arguments, says):
    code, text = said(capsys, *arguments)
    assert code == 2 and says in text


@pytest.mark.parametrize("option", ["--loras", "--lora-rank"])
def test_the_loras_are_of_merges_only(capsys, option):
    assert (
        cli.main(["fit", option, "2", "model.flavor=tiny"]) == 2
        and f"{option} is for --merge" in capsys.readouterr().err
    )


def test_the_model_s_file_says_which_it_is(tmp_path, capsys):
    """As it does to `hvtrain merge`."""
    spec = find("wan")
    flavor = spec.flavors["tiny"]
    save_dit(spec.build(flavor.arch), tmp_path / "dit.safetensors", spec=spec, flavor=flavor)
    code, text = said(capsys, f"dit={tmp_path}/dit.safetensors", "--loras", "2", "--size", "32x32x5")
    assert code == 0 and text.startswith("wan tiny: fit+distill of 2 LoRAs of rank 32"), text


def test_loras_that_are_there_are_looked_at(place, tmp_path):  # noqa: F811
    """Their layers, ranks and rows, their samples, and what the merge would do by itself."""
    cfg = config(
        place, tmp_path / "m.safetensors", 1, 2, how="auto", target="lora", keep=(str(place / "old"),)
    )
    job = job_of(cfg, Loras())
    assert (job.reconcile.how, job.n_loras, job.n_sets, job.keep) == ("fit+distill", 2, 2, True)
    assert not job.whole and job.dtype == torch.bfloat16
    assert {name: list(own) for name, own in job.parts.items()} == {
        name: [PairSize(4, 0, *SHAPES[name])] * 2 for name in TARGETS if name in TEXT
    }
    assert job.trained == {name: [PairSize(8, 0, *SHAPES[name])] for name in TEXT}
    assert job.file_bytes == 2 * 4 * sum(4 * sum(SHAPES[name]) for name in TEXT)
    assert replace(job, rank=3).trained == {name: [PairSize(3, 0, *SHAPES[name])] for name in TEXT}
    assert not job_of(replace(cfg, reconcile=replace(cfg.reconcile, keep=())), Loras()).keep


def test_slices_of_a_plan_keep_their_rows(tmp_path, capsys):
    cut = Cut(n=3, granularity="rows", order="interleaved")
    list(plan_slices(cut, str(tmp_path), dit=None, model="hunyuan-video", flavor="tiny"))
    cfg = load(MergeConfig, None, [*TINY, f"plan={tmp_path}/plan.json", "reconcile.how=distill"])
    code, text = said(capsys, *TINY, f"plan={tmp_path}/plan.json", "on_overlap=sum")
    assert code == 2 and "reconcile: this merge adds weights up" in text
    code, text = said(capsys, *TINY, f"plan={tmp_path}/plan.json", "--size", "32x32x5")
    assert code == 0 and "fit+distill of 3 LoRAs" in text  # though they share no row
    code, text = said(capsys, *TINY, f"plan={tmp_path}/plan.json", "--loras", "2")
    assert code == 2 and "--loras 2: the plan has 3 slices" in text
    code, text = said(capsys, "model=wan", "flavor=tiny", f"plan={tmp_path}/plan.json")
    assert code == 2 and "plan.json: made for hunyuan-video, this is wan" in text
    job = job_of(cfg, Loras(rank=2))
    assert job.n_loras == 3 and job.trained == {name: list(own) for name, own in job.parts.items()}
    for own in job.parts.values():
        rows = sorted((p.begin, p.end) for p in own)
        assert rows[0][0] == 0 and all(a[1] <= b[0] for a, b in pairwise(rows))


def test_what_costs_more_is_said_to(tmp_path):
    """More LoRAs, states, GPUs and less of the host each move what they should, and nothing else."""
    cfg = MergeConfig(
        model="hunyuan-video", flavor="tiny", target="lora", reconcile=ReconcileConfig(states=8, held_out=2)
    )
    job = job_of(cfg, Loras(2, 4))
    base, more = of_merge(job, CLIP), of_merge(job_of(cfg, Loras(4, 4)), CLIP)
    assert (
        more.passes["fit"][0] == 2 * base.passes["fit"][0]
        and more.passes["distill"][0] == 2 * base.passes["distill"][0]
    )
    assert (
        more.passes["who fires on whose clips"][0] == 4 * 2 * 5
        and base.passes["who fires on whose clips"][0] == 2 * 2 * 3
    )
    assert more.host > 1.8 * base.host and base.fit <= more.fit < 1.1 * base.fit
    states = of_merge(replace(job, reconcile=replace(job.reconcile, states=16)), CLIP)
    assert states.sums == 2 * base.sums > 0 and states.passes["distill"] == base.passes["distill"]
    told, forwards = base.passes["what each LoRA does"]
    (n, all_of_it), forward = base.passes["distill"], forwards // told
    asked = n * forward  # each step asks the LoRAs again, but not what they sampled
    for change in ({"new_noise": False}, {"own_states": True}):
        less = of_merge(replace(job, reconcile=replace(job.reconcile, **change)), CLIP)
        assert less.passes["distill"] == (n, all_of_it - asked)
    share = of_merge(replace(job, reconcile=replace(job.reconcile, host_gb=1e-3)), CLIP)
    assert base.disk == 0 < share.disk and share.host < base.host and share.fit == base.fit
    two = of_merge(job, CLIP, gpus=2)
    assert two.host < base.host and two.passes == base.passes and two.fit == base.fit
    fit = of_merge(replace(job, reconcile=replace(job.reconcile, how="fit"), whole=True), CLIP)
    assert fit.distill is None and fit.device == fit.fit and "distill" not in fit.passes and fit.disk > 0
