"""`hvtrain train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hvtrain.config.generate import LoraFileConfig
from hvtrain.config.model import ModelConfig, ParallelConfig
from hvtrain.config.sampling import Sampling
from hvtrain.config.sparse import SparseConfig


@dataclass(frozen=True)
class ShardsConfig:
    """A shard set among others."""

    path: str = ""
    """Directory or URL, as in data.shards"""
    weight: float | None = None
    """Its share of the samples, relative to the other sets' weights; null for all of
    them: as many as each holds"""
    buckets: tuple[str, ...] = ()
    """Patterns of the buckets to take, frames x height x width, as in 1x* (images) or *x480x832; none: all"""
    from_step: int = 0
    """The optimizer step before which it is not read"""
    until_step: int | None = None
    """The step from which on it is not read any more; null: to the end"""
    silent: bool = False
    """The adapter shall change nothing on these samples: what they are to give is
    what the model gives without it"""


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    shards: tuple[str, ...] = ()
    """Shard sets that hvtrain encode wrote: directories, or URLs that fsspec
    opens (s3://, gs://, https://)"""
    mixture: tuple[ShardsConfig, ...] = ()
    """Instead of shards: sets with weights, buckets and steps of their own, as in [{path: A,
    weight: 3}, {path: B, weight: 1}]"""
    batch_size: int = 1
    """Samples per data-parallel rank and micro-step"""
    batch_tokens: int | None = None
    """Instead of batch_size: image tokens per micro-step, so that each costs alike; of each
    bucket what fits, at least 1"""
    workers: int = 1
    """Threads or processes that read ahead; 0 reads when asked"""
    worker_type: Literal["thread", "process"] = "thread"
    """process: for URLs whose client holds Python's lock; local tars are faster with threads"""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """A damaged sample: stop and name it, or skip it (another of its bucket stands in) and count it"""
    caption_dropout: float = 0.0
    """Share of samples that are trained with the empty prompt"""
    image_share: float | None = None
    """Share of samples that are trained with their image, of a flavor that makes videos with an
    image or without; null: all"""
    calibration: int = 64
    """Samples that a finished LoRA leaves in run.output_dir/calibration, for `hvtrain
    merge --reconcile`; 0: none"""
    allow_foreign: bool = False
    """Train on shards that, by their fingerprints, other files made than those of
    this config, or several did"""

    @property
    def sets(self) -> tuple[ShardsConfig, ...]:
        """However they are given."""
        return self.mixture or tuple(map(ShardsConfig, self.shards))


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained."""

    type: str = "lora"
    """lora; dora: a LoRA and the length of each output row; loha: the product of two low-rank matrices,
    element by element; lokr: the Kronecker product of a small matrix and a large one; loraid: one of these
    that owns one slice of a plan; none: the weights of the DiT themselves (full fine-tune)"""
    rank: int = 32
    """Rank of each pair"""
    alpha: float = 32.0
    """Scale: the pair counts alpha / rank"""
    rank_stable: bool = False
    """rsLoRA: the pair counts alpha / sqrt(rank)"""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Another rank for the layers whose name a pattern matches: {pattern: rank}; the first that matches"""
    alphas: Mapping[str, float] = field(default_factory=dict)
    """Another alpha, in the same way"""
    dropout: float = 0.0
    """Share of a LoRA's rank components that are dropped between down and up, for each sample anew"""
    rank_dropout: float = 0.0
    """The same for all samples of a micro-step together; of a LoHa or LoKr, the share of its output rows"""
    module_dropout: float = 0.0
    """Share of the layers that go without their adapter in a micro-step"""
    scale_weight_norms: float = 0.0
    """Above 0: what a layer's adapter adds to the weight counts less where its norm is more than this"""
    init: str = "zero"
    """Where a LoRA starts: zero; svd: zero too, but reading the directions that the weight
    answers to most; pissa: with the weight's principal part, which is taken off the weight, so
    that the file has twice the rank"""
    factor: int = -1
    """For lokr: size of the small matrix; -1 makes both as equal as they can be"""
    include: tuple[str, ...] = ()
    """Patterns of module names to train besides the default ones"""
    exclude: tuple[str, ...] = ()
    """Patterns of module names to leave out"""
    init_from: str | None = None
    """LoRA file to start from; {expert} in its name stands for each expert's, where a run trains several"""
    init_balance: bool = False
    """Start from the singular vectors of what that file adds, at this run's rank: for one
    that merges or other ranks left"""
    base_lora: tuple[LoraFileConfig, ...] = ()
    """LoRA files to merge into the model before training"""
    lr_ratios: Mapping[str, float] = field(default_factory=dict)
    """Learning rate as a multiple of optim.lr for the parameters whose name a pattern matches:
    {pattern: ratio}; the first that matches. LoRA+ is {'.*lora_up.*': 16}; 0 is refused, for that is
    what freeze and exclude are for"""
    train: tuple[str, ...] = ()
    """For none: patterns of the parameters to train; none: all"""
    freeze: tuple[str, ...] = ()
    """For none: patterns of the parameters to leave as they are"""
    plan: str | None = None
    """For loraid: the plan.json that `hvtrain slices plan` wrote"""
    loraid: int | None = None
    """For loraid: which slice of the plan, from 1"""
    slice_type: str = "lora"
    """For loraid: lora, dora, loha, or, where slices are whole layers, lokr"""
    blocks_per_loraid: int | None = None
    """For loraid instead of a plan: LORAID 1 owns the first so many blocks, LORAID 2 the next, and so on"""


@dataclass(frozen=True)
class FlowConfig:
    """Which noise levels are trained, and what an error at them counts."""

    timestep_sampling: str = "shift"
    """Distribution of sigma: uniform, sigmoid, logit_normal, mode, shift, flux_shift, qwen_shift, logsnr,
    qinglong_flux, qinglong_qwen or sigma; `hvtrain train CONFIG --show-timesteps` draws it"""
    shift: float | None = None
    """Shift towards noise, for shift; null: the flavor's own"""
    sigmoid_scale: float = 1.0
    """Width, for sigmoid and what is a shift (also in the qinglong mixtures)"""
    logit_mean: float = 0.0
    """Mean of the logit, for logit_normal; of log SNR, for logsnr and qinglong_flux"""
    logit_std: float = 1.0
    """Width of the same"""
    mode_scale: float = 1.29
    """For mode: -1 to 1.75, above 0 favours the middle"""
    min_sigma: float = 0.0
    """Smallest sigma"""
    max_sigma: float = 1.0
    """Largest sigma"""
    range: Literal["cut", "squeeze"] = "cut"
    """How a distribution comes between them: cut keeps its shape, squeeze maps all of it into the range"""
    weighting: str = "none"
    """What an error at sigma counts: none (all the same), sigma_sqrt (1 / sigma^2), cosmap or min_snr"""
    snr_gamma: float = 5.0
    """For min_snr: where the signal-to-noise ratio is cut"""
    loss: str = "mse"
    """mse, huber or pseudo_huber: the latter two are 2 c |error| beyond c, and so bear outliers"""
    huber_c: float = 0.1
    """For huber and pseudo_huber: c"""
    huber_schedule: Literal["constant", "exponential", "snr"] = "constant"
    """How c depends on sigma: not; exponential, from 1 without noise to c in pure noise; snr, to c faster"""
    masked: bool = False
    """Weigh the error by the shards' column `mask`: 1 where it counts, 0 where not"""
    noise_offset: float = 0.0
    """Add so much noise that is equal over all cells of a channel: for very dark and very
    bright videos; 0.05 is much"""
    guidance: float | None = None
    """Embedded guidance that the model is told, as in generation; null: the flavor's own"""
    raw_guidance: bool = False
    """Tell the model flow.guidance itself instead of 1000 times it, as musubi-tuner trains;
    previews are as in generation"""


@dataclass(frozen=True)
class OptimConfig:
    """How weights are updated."""

    name: str = "adamw"
    """Optimizer: adamw, adam, adamw8bit, lion, adafactor, came, prodigy, schedulefree or muon
    (docs/optimizers.md), or a class by its path, as in torch.optim.SGD"""
    lr: float = 1e-4
    """Learning rate at its peak"""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the moments"""
    eps: float = 1e-8
    """Added to the denominator"""
    weight_decay: float = 0.01
    """Decoupled weight decay; matrices only"""
    args: Mapping[str, Any] = field(default_factory=dict)
    """More that the optimizer takes, by its own names, as in {momentum: 0.9}"""
    max_grad_norm: float = 1.0
    """Clip the gradient's norm to this; 0 does not"""
    schedule: str = "constant"
    """After the warm-up: constant, linear, cosine, polynomial, inverse_sqrt, rex or wsd"""
    warmup_steps: int = 0
    """Steps from 0 up to lr"""
    warmup_share: float = 0.0
    """The same as a share of the run's steps"""
    min_lr_ratio: float = 0.0
    """Where they end at the lowest, as a share of lr"""
    cycles: float = 1.0
    """cosine: how often it starts again from lr; 0.5 ends half way down"""
    power: float = 1.0
    """polynomial: of the share of steps that is left"""
    timescale: int | None = None
    """inverse_sqrt: after three times so many steps the rate is half; null: the warm-up's steps"""
    rex: tuple[float, float] = (0.1, 0.9)
    """rex: a and b of z / (a + b z), z the share of steps that is left"""
    decay_share: float = 0.1
    """wsd: the share of steps at the end in which it goes down"""


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed."""

    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """deepspeed, or torch: plain PyTorch, for one device"""
    stage: int = 2
    """What ranks share: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights"""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's state lives; nvme for ZeRO-3"""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO-3 keeps each rank's part of the weights"""
    nvme_path: str | None = None
    """For nvme: a directory on a local disk"""
    bucket_mb: float | None = None
    """Gradients of how many MB are reduced at a time; null: all of them, at most 1024"""
    communication_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """In what gradients travel"""
    deepspeed: str | None = None
    """A JSON file of DeepSpeed's own settings, merged over those that hvtrain makes"""


@dataclass(frozen=True)
class RunSettings:
    """The run."""

    output_dir: str = ""
    """Where everything of this run goes"""
    name: str = "lora"
    """Name of the files that are for you"""
    steps: int | None = None
    """Optimizer steps; or give epochs"""
    epochs: float | None = None
    """Passes over the shards; or give steps"""
    grad_accum: int = 1
    """Micro-steps per optimizer step"""
    seed: int = 0
    """Seed of order, noise, timesteps and initial weights"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast over float32 trainable weights"""
    recompute: Literal["none", "full", "selective", "offload"] = "full"
    """Activation checkpointing: full recomputes each block in the backward pass, selective all but its
    attention; offload is full with the blocks' inputs in host memory"""
    compile: Literal["none", "blocks"] = "none"
    """blocks: torch.compile of each block, which fuses what is between the matrix products; minutes in the
    first steps, and once more for every new size of clips"""
    blocks_to_swap: int = 0
    """Keep the frozen weights of so many blocks in host memory and bring each when it is computed"""
    expert_turn: int = 1
    """Where a run trains several experts: steps of one before the next is drawn, each by
    its share of the noise levels"""
    idle_expert: Literal["auto", "device", "host"] = "auto"
    """Where the frozen weights wait of an expert that is not computed with; auto: in host memory if the
    device has no room for all, and always the whole of them in half of it"""
    ema_decay: float = 0.0
    """Above 0: also keep an exponential moving average and save it as NAME-ema.safetensors"""
    save_every_steps: int | None = None
    """Checkpoint every so many steps; the last step is always saved. null: 250 for an adapter without
    save_every_epochs, else 0; 0: none before the last, unless asked for"""
    save_every_epochs: float = 0.0
    """Checkpoint every so many epochs"""
    keep_last: int = 2
    """Checkpoints to keep; 0 keeps all"""
    log_every: int = 1
    """Steps between entries in the log"""
    wandb: str | None = None
    """Also log to this project of Weights & Biases; needs the package wandb"""
    peak_tflops: float | None = None
    """What one device can do, for the MFU; null: of a GPU that hvtrain knows, its
    data sheet's dense bf16 figure"""
    profile_every: int = 100
    """Of several processes: steps between those whose time in collectives is measured; 0: none"""
    keep_best: bool = False
    """Also keep the weights with the lowest held-out loss, as
    NAME-best.safetensors; needs eval.every_steps"""
    hang_timeout_s: float = 1800.0
    """End the run, and say which rank stands where, if nothing moves for so long; 0 waits for ever"""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the newest complete checkpoint in output_dir"""
    max_bad_steps: int = 5
    """Stop after so many steps in a row without a finite gradient"""


@dataclass(frozen=True)
class SamplePrompt(Sampling):
    """A video to make."""

    prompt: str = ""
    """What to show"""


@dataclass(frozen=True)
class PreviewConfig(Sampling):
    """Videos made while training. What a prompt leaves out is taken from here; guidance is
    flow.guidance, where neither says."""

    every_steps: int = 0
    """Steps between previews; 0: not by steps"""
    every_epochs: float = 0.0
    """Epochs between previews; 0: not by epochs"""
    at_start: bool = False
    """Also before the first step: what the base makes"""
    ema: bool = False
    """Of the moving averages (run.ema_decay) instead of the weights as they are"""
    prompt_file: str | None = None
    """A file of prompts, besides those in prompts: text with one a line, which may end with options of its
    own, as for `hvtrain generate`; or YAML, a list with the keys of prompts"""
    prompts: tuple[SamplePrompt, ...] = ()
    """What to make, each with a prompt and keys of its own. Where an image is needed and not given, a
    sample's own is taken: of eval.shards, else of data.shards"""

    @property
    def wanted(self) -> bool:
        return self.at_start or self.every_steps > 0 or self.every_epochs > 0


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss at fixed noise levels and seeds."""

    shards: tuple[str, ...] = ()
    """Shard sets that are not trained on"""
    every_steps: int = 0
    """Steps between evaluations; 0 makes none"""
    quantiles: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Quantiles of the training distribution of sigma"""
    max_batches: int = 8
    """Micro-batches per rank that are looked at"""


@dataclass(frozen=True)
class TrainConfig:
    """`hvtrain train`: a LoRA or the whole DiT from shards."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model"""
    data: DataConfig = field(default_factory=DataConfig)
    """What to train on"""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """What is trained"""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """Which noise levels are trained"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How weights are updated"""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share one sample"""
    sparse: SparseConfig = field(default_factory=SparseConfig)
    """Attention that leaves out pairs of tokens; NOT exact"""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """How ranks share the training state"""
    run: RunSettings = field(default_factory=RunSettings)
    """Length, precision, files"""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """Videos made while training"""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Held-out loss"""
