"""The recipes that other trainers' documents show for the models that are here: each converts with a line for
every option, and what comes out trains, on small weights of the flavor that it names."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from hvtrain.config import EncodeConfig, TrainConfig, build, load
from hvtrain.config.parts import parts_of
from hvtrain.elsewhere.run import Imported, convert
from hvtrain.models import find
from hvtrain.models.load import save_dit
from hvtrain.train import run as train
from tests.elsewhere.test_import import from_toolkit
from tests.models.any_model import random_model
from tests.parallel.any_model import shrunk
from tests.train.shardset import make_set

# --- musubi-tuner: docs/hunyuan_video.md, hunyuan_video_1_5.md, wan.md, loha_lokr.md, advanced_config.md ----

RUN = "accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 src/musubi_tuner/"
COMMON = ("--dataset_config path/to/toml --sdpa --mixed_precision bf16 --optimizer_type adamw8bit "
          "--gradient_checkpointing --max_data_loader_n_workers 2 --persistent_data_loader_workers "
          "--network_dim 32 --max_train_epochs 16 "
          "--save_every_n_epochs 1 --seed 42 --output_dir path/to/output_dir --output_name name-of-lora")
HV = (
    f"{RUN}hv_train_network.py \n    --dit path/to/mp_rank_00_model_states.pt \n    {COMMON} --fp8_base "
    "--learning_rate 2e-4 "
)
HV_CACHE = (
    "uv run --extra cu124 src/musubi_tuner/cache_latents.py --dataset_config path/to/toml --vae "
    "path/to/pytorch_model.pt --vae_chunk_size 32 --vae_tiling",
    "python src/musubi_tuner/cache_text_encoder_outputs.py --dataset_config path/to/toml  --text_encoder1 "
    "path/to/text_encoder --text_encoder2 path/to/text_encoder_2 --batch_size 16",
)
HV15 = (
    f"{RUN}hv_1_5_train_network.py \\\n --dit path/to/dit_model --vae path/to/vae_model --text_encoder "
    "path/to/text_encoder " f"--byt5 path/to/byt5 {COMMON} --timestep_sampling shift --weighting_scheme none "
    "" "--discrete_flow_shift 2.0 \n --learning_rate 1e-4 --network_module networks.lora_hv_1_5 "
)
HV15_CACHE = (
    "python src/musubi_tuner/hv_1_5_cache_latents.py --dataset_config path/to/toml --vae path/to/vae_model",
    "python src/musubi_tuner/hv_1_5_cache_text_encoder_outputs.py --dataset_config path/to/toml "
    "--text_encoder path/to/text --byt5 path/to/byt5 --batch_size 16",
)
WAN = (
    f"{RUN}wan_train_network.py \\\n {COMMON} --fp8_base --learning_rate 2e-4 --network_module "
    "networks.lora_wan "
)
WAN_CACHE = (
    "python src/musubi_tuner/wan_cache_latents.py --dataset_config path/to/toml --vae "
    "path/to/wan_vae.safetensors",
    "python src/musubi_tuner/wan_cache_text_encoder_outputs.py --dataset_config path/to/toml "
    "--t5 path/to/models_t5_umt5-xxl-enc-bf16.pth --batch_size 16",
)
LORA = "--network_module networks.lora --timestep_sampling shift --discrete_flow_shift 7.0"
SHIFT = "--timestep_sampling shift --discrete_flow_shift"
MUSUBI: dict[str, tuple[str, ...]] = {
    "hv": (*HV_CACHE, f"uv run --extra cu124 {HV}{LORA}"),
    "hv-memory": (f"{HV}{LORA} --fp8_scaled --gradient_checkpointing_cpu_offload --blocks_to_swap 20 "
    "--vae_dtype float16",),
    "hv-loha": (f"{HV}--network_module networks.loha --network_alpha 16",),
    "hv-lokr": (f'{HV}--network_module networks.lokr --network_alpha 16 --network_args "factor=4"',),
    "hv-loraplus": (f'{HV}{LORA} --network_args "loraplus_lr_ratio=4" --lr_scheduler rex '
                    '--lr_scheduler_args "rex_alpha=0.2" "rex_beta=0.8" --lr_warmup_steps 0.1',),
    "hv-patterns": (f'{HV}{LORA} --network_args "exclude_patterns=[r\'.*\']" '
                    '"include_patterns=[r\'.*single_blocks.*linear1\']"',),
    "hv-levels": (f"{HV}--network_module networks.lora --timestep_sampling logsnr --logit_mean -6.0 "
    "--logit_std 2.0 "
                  "--min_timestep 200 --max_timestep 800 --preserve_distribution_shape "
                  "--num_timestep_buckets 5",),
    "hv-dynamo": (f"{HV}{LORA} --dynamo_backend INDUCTOR --dynamo_mode default --logging_dir logs --log_with "
    "tensorboard",),
    "hv15-t2v": (*HV15_CACHE, f"{HV15}--task t2v"),
    "hv15-i2v": (f"{HV15_CACHE[0]} --i2v --image_encoder path/to/image_encoder", HV15_CACHE[1],
                 f"{HV15}--image_encoder path/to/image_encoder --task i2v"),
    "wan-samples": (*WAN_CACHE, f"{WAN}{SHIFT} 3.0 --task t2v-1.3B --dit path/to/wan2.1_xxx_bf16.safetensors "
    "--vae path/to/vae "
                    "--t5 path/to/t5 --sample_prompts /path/to/prompt_file.txt --sample_every_n_epochs 1 "
                    "--sample_every_n_steps 1000 --sample_at_first"),
    "wan-i2v": (f"{WAN_CACHE[0]} --i2v --clip path/to/clip.pth --vae_cache_cpu", f"{WAN_CACHE[1]} --fp8_t5",
                f"{WAN}{SHIFT} 3.0 --task i2v-14B --dit path/to/wan2.1_i2v_480p_14B_bf16.safetensors --clip "
                "path/to/clip.pth"),
    "wan22-low": (f"{WAN}{SHIFT} 12 --task t2v-A14B --dit path/to/wan2.2_t2v_low_noise_14B_fp16.safetensors "
    "--min_timestep 0 "
                  "--max_timestep 875 --preserve_distribution_shape --force_v2_1_time_embedding",),
    "wan22-high": (f"{WAN}{SHIFT} 5 --task i2v-A14B --dit path/to/wan2.2_i2v_high_noise_14B_fp16.safetensors "
                   "--min_timestep 900 --max_timestep 1000 --preserve_distribution_shape",),
    "wan22-both": (f"{WAN}{SHIFT} 12 --task t2v-A14B --dit path/to/low.safetensors --dit_high_noise "
    "path/to/high.safetensors "
                   "--timestep_boundary 875 --offload_inactive_dit",),
}

# --- diffusion-pipe: examples/main_example.toml, wan_14b_min_vram.toml, docs/supported_models.md ------------

PIPE = """
output_dir = '/data/diffusion_pipe_training_runs/tmp'
dataset = 'dataset.toml'
epochs = 1000
micro_batch_size_per_gpu = 1
pipeline_stages = 1
gradient_accumulation_steps = 1
gradient_clipping = 1.0
warmup_steps = 100
eval_every_n_epochs = 1
eval_before_first_step = true
eval_micro_batch_size_per_gpu = 1
eval_gradient_accumulation_steps = 1
save_every_n_epochs = 2
checkpoint_every_n_minutes = 120
activation_checkpointing = CHECKPOINTING
partition_method = 'parameters'
save_dtype = 'bfloat16'
caching_batch_size = 1
steps_per_print = 1
video_clip_mode = 'single_beginning'
[model]
MODEL
dtype = 'bfloat16'
timestep_sample_method = 'logit_normal'
[adapter]
type = 'lora'
rank = 32
dtype = 'bfloat16'
[optimizer]
lr = 2e-5
betas = [0.9, 0.99]
weight_decay = 0.01
OPTIMIZER
[monitoring]
enable_wandb = false
wandb_api_key = ''
wandb_tracker_name = ''
wandb_run_name = ''
"""
DATA = """
resolutions = [512]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 7
frame_buckets = [1, 33]
[[directory]]
path = 'FOLDER'
mask_path = 'FOLDER/masks'
num_repeats = 1
"""
FP8 = "transformer_dtype = 'float8'"
A14B = "type = 'wan'\nckpt_path = '/data/imagegen_models/Wan2.2-T2V-A14B'\n"
PIPES = {
    "main": "type = 'hunyuan-video'\ntransformer_path = "
    "'/d/hunyuan_video_720_cfgdistill_fp8_e4m3fn.safetensors'\n"
            "vae_path = '/d/hunyuan_video_vae_bf16.safetensors'\nllm_path = '/d/llava'\nclip_path = "
            f"'/d/clip'\n{FP8}",
    "hv-official": f"type = 'hunyuan-video'\nckpt_path = '/home/anon/HunyuanVideo/ckpts'\n{FP8}",
    "hv15": "type = 'hunyuan_video_15'\ndiffusion_model = "
    "'/d/hunyuanvideo1.5_480p_t2v_fp16.safetensors'\nvae = '/d/vae'\n"
            "text_encoders = [{paths = ['/d/qwen_2.5_vl_7b.safetensors', '/d/byt5.safetensors'], type = "
            "'hunyuan_video_15'}]\ndiffusion_model_dtype = 'float8'\nshift = 3",
    "wan-min-vram": f"type = 'wan'\nckpt_path = '/data2/imagegen_models/Wan2.1-T2V-14B'\n{FP8}",
    "wan-comfyui": "type = 'wan'\nckpt_path = '/data2/imagegen_models/Wan2.1-T2V-1.3B'\nllm_path = "
    "'/d/umt5.safetensors'\n"
                   "transformer_path = '/data2/imagegen_models/wan_comfyui/wan2.1_t2v_1.3B_bf16.safetensors'",
    "wan22-low": f"{A14B}transformer_path = "
    f"'/data/imagegen_models/Wan2.2-T2V-A14B/low_noise_model'\n{FP8}\nmin_t = 0\n"
                 "max_t = 0.875",
    "wan22-high": f"{A14B}transformer_path = '/d/high_noise_model'\nmin_t = 0.875\nmax_t = 1",
    "wan22-comfyui": f"{A14B}transformer_path = '/d/wan2.2_t2v_low_noise_14B_fp16.safetensors'\nllm_path = "
    f"'/d/umt5'\n{FP8}",
}


def from_pipe(name: str, folder: Path) -> Imported:
    (folder / "masks").mkdir()
    (folder / "dataset.toml").write_text(DATA.replace("FOLDER", str(folder)))
    small = name == "wan-min-vram"
    text = PIPE.replace("MODEL", PIPES[name]).replace("CHECKPOINTING", "'unsloth'" if small else "true")
    adamw = "type = 'AdamW8bitKahan'\nstabilize = false" if small else "type = 'adamw_optimi'\neps = 1e-8"
    (folder / "main.toml").write_text("blocks_to_swap = 32\n" * small + text.replace("OPTIMIZER", adamw))
    line = f'NCCL_P2P_DISABLE="1" deepspeed --num_gpus=1 train.py --deepspeed --config {folder}/main.toml'
    return convert("diffusion-pipe", [line])


# --- they train ---------------------------------------------------------------------------------------------

FLAVORS = {
    "hv15-i2v": "i2v-720p", "wan-samples": "t2v-1.3b", "wan-i2v": "i2v-14b-480p", "wan22-low": "t2v-a14b",
    "wan22-high": "i2v-a14b", "wan22-both": "t2v-a14b", "pipe-hv15": "t2v-480p",
    "pipe-wan-min-vram": "t2v-14b",
    "pipe-wan-comfyui": "t2v-14b",  # its weights will say
    "pipe-wan22-low": "t2v-a14b", "pipe-wan22-high": "t2v-a14b", "pipe-wan22-comfyui": "t2v-a14b",
    "toolkit": "t2v-14b",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str | None], Path]:
    """A folder with the weights of a flavor, made small, and shards of what it reads."""
    root = tmp_path_factory.mktemp("small")

    def write(model: str, name: str | None) -> Path:
        spec = find(model)
        flavor = shrunk(spec, spec.flavor(name))
        folder = root / f"{model}-{flavor.name}"
        if not folder.exists():
            folder.mkdir()
            save_dit(random_model(spec, flavor), folder / "dit.safetensors", spec=spec, flavor=flavor)
            make_set(folder / "set", flavor, n=2, masked=True)
        return folder

    return write


@pytest.mark.parametrize("name", [*MUSUBI, *(f"pipe-{name}" for name in PIPES), "toolkit"])
def test_a_recipe_converts_and_trains(name: str, small: Callable, tmp_path: Path) -> None:
    pipe = name.startswith("pipe-")
    if pipe:
        made = from_pipe(name.removeprefix("pipe-"), tmp_path)
    else:
        made = from_toolkit(tmp_path) if name == "toolkit" else convert("musubi", MUSUBI[name])
    assert not made.lost, [str(line) for line in made.lost]
    assert made.encode is not None and build(EncodeConfig, yaml.safe_load(made.encode), where="encode")
    raw = yaml.safe_load(made.train)
    model, experts = (
        raw["model"]["name"], find(raw["model"]["name"]).flavor(raw["model"].get("flavor")).experts
    )
    assert find(model).flavor(raw["model"].get("flavor")).name == FLAVORS.get(
        name, find(model).flavor(None).name
    )
    folder = small(model, raw["model"].get("flavor"))
    weights = {"dit", *(e.part for e in experts)} & set(raw["model"])
    files = {
        part: folder / "dit.safetensors" if part in weights else "null"
        for part in (*parts_of(model), "dit", "vae")
    }
    own = [
        "model.flavor=null", *(f"model.{part}={file}" for part, file in files.items() if part in raw["model"])
    ]
    if "8bit" in raw["optim"]["name"] and importlib.util.find_spec("torchao") is None:
        own.append("optim.name=adamw")
    (tmp_path / "c.yaml").write_text(made.train)
    cfg = load(TrainConfig, tmp_path / "c.yaml", [
        *own, f"data.shards={folder / 'set'}", "run.epochs=null", "run.steps=1", "zero.engine=torch",
        "zero.stage=0", "preview.every_steps=0", "preview.every_epochs=0", "preview.at_start=false",
        f"run.output_dir={tmp_path / 'run'}", "optim.warmup_steps=0", "parallel.kernel=auto",
        "run.blocks_to_swap=0",
    ])  # fmt: skip
    assert train.run(cfg) == 0
    (file,) = list((tmp_path / "run").glob(f"{cfg.run.name}*.safetensors"))[:1]
    assert file.stat().st_size > 0
    assert cfg.flow.masked == pipe


def test_what_single_options_become() -> None:
    def of(name: str) -> TrainConfig:
        return build(TrainConfig, yaml.safe_load(convert("musubi", MUSUBI[name]).train), where="")

    assert of("hv-loraplus").optim.rex == (0.2, 0.8) and of("hv-loraplus").optim.schedule == "rex"
    made = convert("musubi", [f"{MUSUBI['hv-levels'][0]} --discrete_flow_shift 3.0 --sigmoid_scale 1.0"])
    lost = {line.option: line.kind for line in made.lines if "takes no" in line.why}
    assert lost == {"--discrete_flow_shift 3.0": "left out", "--sigmoid_scale 1.0": "meaningless"}
    adapter = of("hv-patterns").adapter
    assert (adapter.exclude, adapter.include) == ((".*",), ("(?:.*single_blocks.*linear1).*",))
    assert of("hv-lokr").adapter.factor == 4 and of("hv-loha").adapter.type == "loha"
    flow = of("hv-levels").flow
    assert (flow.timestep_sampling, flow.logit_mean, flow.range) == ("logsnr", -6, "cut")
    assert (flow.min_sigma, flow.max_sigma) == (0.2, 0.8)
    samples = of("wan-samples").preview
    found = (samples.prompt_file, samples.every_epochs, samples.every_steps, samples.at_start, samples.frames)
    assert found == ("/path/to/prompt_file.txt", 1, 1000, True, 1)
