"""`hvtrain merge`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hvtrain.config.generate import LoraFileConfig
from hvtrain.config.model import DType, ModelConfig, ParallelConfig

Reconciling = Literal["auto", "none", "fit", "distill", "fit+distill"]


@dataclass(frozen=True)
class ReconcileConfig:
    """A merger that looks at what each LoRA does to samples of its own data, instead of adding weights up."""

    how: Reconciling = "auto"
    """auto: fit+distill of several LoRAs that each have their samples, where on_overlap is not given, else
    none. fit: least squares, layer by layer; distill: the LoRAs are trained further, in their own rows,
    towards what each does alone; fit+distill: one after the other"""
    samples: tuple[str, ...] = ()
    """A shard set for each LoRA, in order; none: what its training left beside it (calibration/)"""
    keep: tuple[str, ...] = ()
    """What the base knows and the merge must not change ("old words"): shard sets, or text files with a
    caption a line, whose clips the base then samples; none: what earlier merges among the LoRAs left"""
    text: ModelConfig = field(default_factory=ModelConfig)
    """For captions in keep: where the text encoders are"""
    keep_weight: float = 0.5
    """How much keep counts, against all LoRAs together"""
    states: int = 48
    """Noisy clips of each set that the merge is made from, at most: those are left out
    where its LoRA changes nothing"""
    held_out: int = 12
    """Noisy clips of each set that only measure it"""
    own_states: bool = False
    """Use the sets' captions only: clips and noise come from what each LoRA itself samples"""
    ridge: float = 1e-3
    """For fit: pull towards the plain sum, as a share of the inputs' mean square"""
    steps: int = 600
    """For distill: optimizer steps"""
    new_noise: bool = True
    """For distill: noise the clips anew in every step and ask the LoRAs again, a forward pass more; false:
    the noisy clips that fit has. Clips that the LoRAs themselves have sampled are never noised"""
    lr: float | None = None
    """For distill: learning rate; null: that of the LoRAs' own training"""
    batch_size: int = 1
    """Noisy clips of equal shape that are computed together"""
    host_gb: float = 64.0
    """Host memory of a process for states between blocks; what it does not hold lies on the disk beside the
    output, or is computed in rounds"""
    lost: float = 0.7
    """A LoRA is lost where the merge is so far from it, as a share of the base's distance (0:
    as it alone; 1: as the base)"""
    allow_lost: bool = False
    """Write the merge though a LoRA is lost in it"""


@dataclass(frozen=True)
class MergeConfig:
    """`hvtrain merge`: LoRAs into a DiT file, or into one LoRA."""

    dit: str = ""
    """The model: a file, a sharded index or a directory; for target lora it may be left out"""
    lora: tuple[LoraFileConfig, ...] = ()
    """LoRA files, or directories of finished runs"""
    plan: str | None = None
    """plan.json: all slices of it are merged"""
    slices: str | None = None
    """Directory with the slices' runs, 01, 02, ...; null: the plan's own"""
    allow_missing: bool = False
    """Merge the finished slices of a plan, though some are not there"""
    expert: str | None = None
    """Of a model of several: whose LoRAs are meant, where a file or a run holds one for each; all
    of a merge are one expert's"""
    any_base: bool = False
    """Accept LoRAs that were trained on other weights"""
    output: str = ""
    """The safetensors file to write; a directory for a sharded model"""
    target: Literal["model", "lora"] = "model"
    """model: into the weights; lora: one LoRA of all"""
    rank: int | None = None
    """For target lora: cut every layer to this rank; null: ranks add up"""
    on_overlap: str = "error"
    """Where LoRAs change the same rows: error, sum, average, ties, dare, orthogonal or
    priority (the first given wins)"""
    reconcile: ReconcileConfig = field(default_factory=ReconcileConfig)
    """By what each LoRA does to samples of its own data, instead of on_overlap;
    needs the model, and computes"""
    density: float | None = None
    """For ties and dare: the share of elements that is kept; null: 0.2 and 0.5"""
    seed: int = 0
    """For dare"""
    dtype: DType | None = None
    """Dtype of the merged tensors; null: each keeps its own"""
    max_shard_gb: float | None = None
    """Cut the merged model into files of at most so many GB (output is then a
    directory); null: as the input"""
    device: str = "auto"
    """Where it computes: cpu or cuda; auto: what runs the model (reconcile,
    evaluate) on a GPU if there is one"""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """For reconcile on several processes (hvtrain launch --nproc N merge ...): how many share one clip in
    distill; in fit, and otherwise, each has clips of its own"""
    evaluate: tuple[str, ...] = ()
    """Shard sets: report the held-out loss of the base, of each LoRA alone and of the merge"""
    model: str | None = None
    """Architecture; null reads it from the file"""
    flavor: str | None = None
    """Flavor of the architecture, for evaluate; null reads it from the file"""
