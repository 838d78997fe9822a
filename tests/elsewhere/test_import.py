"""Configs of other trainers: every option has a line, and what comes out is a config that trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hvtrain.config import EncodeConfig, TrainConfig, build, load
from hvtrain.elsewhere.run import Imported, convert
from hvtrain.elsewhere.source import command_line, words_of
from hvtrain.errors import ConfigError
from hvtrain.models import find
from launcher import cli

COMMON = (
    "--dataset_config data/clips.toml --sdpa --mixed_precision bf16 --optimizer_type adamw "
    "--gradient_checkpointing --max_data_loader_n_workers 2 --persistent_data_loader_workers --network_dim "
    "32 --timestep_sampling shift --max_train_epochs 16 --save_every_n_epochs 1 --seed 42 --output_dir out "
    "--output_name mine"
)
LAUNCH = "accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 src/musubi_tuner/"
MUSUBI = {  # as musubi-tuner documents each model
    "hv": f"{LAUNCH}hv_train_network.py --dit "
    "ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt "
          "--network_module networks.lora --discrete_flow_shift 7.0 --learning_rate 2e-4 --fp8_base "
          f"{COMMON}",
    "wan21": f"{LAUNCH}wan_train_network.py --task t2v-1.3B --dit wan2.1_t2v_1.3B_bf16.safetensors "
             "--network_module networks.lora_wan --discrete_flow_shift 3.0 --learning_rate 2e-4 --fp8_base "
             f"{COMMON}",
    "wan22-low": f"{LAUNCH}wan_train_network.py --task t2v-A14B --dit "
    "wan2.2_t2v_low_noise_14B_fp16.safetensors "
                 "--network_module networks.lora_wan --discrete_flow_shift 12 --min_timestep 0 "
                 "--max_timestep 875 "
                 f"--preserve_distribution_shape --learning_rate 2e-4 {COMMON}",
    "wan22-high": f"{LAUNCH}wan_train_network.py --task i2v-A14B --dit ckpts/some.safetensors "
    "--network_module networks.lora_wan "
                  "--discrete_flow_shift 5 --min_timestep 900 --max_timestep 1000 --learning_rate 2e-4 "
                  f"{COMMON}",
    "wan22-both": f"{LAUNCH}wan_train_network.py --task t2v-A14B --dit low.safetensors --dit_high_noise "
    "high.safetensors "
                  "--timestep_boundary 875 --offload_inactive_dit --network_module networks.lora_wan "
                  "--discrete_flow_shift 12 "
                  f"--learning_rate 2e-4 {COMMON}",
}

PIPE = """
output_dir = 'runs/test'
dataset = 'dataset.toml'
epochs = 1000
micro_batch_size_per_gpu = 1
pipeline_stages = 1
gradient_accumulation_steps = 1
gradient_clipping = 1.0
warmup_steps = 10
blocks_to_swap = 20
eval_every_n_epochs = 1
save_every_n_epochs = 2
checkpoint_every_n_minutes = 120
activation_checkpointing = 'unsloth'
save_dtype = 'bfloat16'
caching_batch_size = 1
video_clip_mode = 'single_beginning'
[model]
MODEL
dtype = 'bfloat16'
transformer_dtype = 'float8'
timestep_sample_method = 'logit_normal'
[adapter]
type = 'lora'
rank = 32
dtype = 'bfloat16'
[optimizer]
type = 'adamw_optimi'
lr = 2e-5
betas = [0.9, 0.99]
weight_decay = 0.01
eps = 1e-8
"""
PIPE_MODELS = {
    "hunyuan-video": "type = 'hunyuan-video'\ntransformer_path = 'dit'\nvae_path = 'v'\nllm_path = "
    "'l'\nclip_path = 'c'",
    "wan-14b": "type = 'wan'\nckpt_path = '/data/Wan2.1-T2V-14B'",
    "wan-22": "type = 'wan'\nckpt_path = '/data/Wan2.2-T2V-A14B'\ntransformer_path = "
    "'/data/Wan2.2-T2V-A14B/low_noise_model'\n"
              "min_t = 0\nmax_t = 0.875",
}
PIPE_DATA = """
resolutions = [512, [1280, 720]]
enable_ar_bucket = true
min_ar = 0.5
num_ar_buckets = 7
frame_buckets = [1, 33]
[[directory]]
path = 'FOLDER'
num_repeats = 2
mask_path = 'masks'
"""
TOOLKIT = {
    "job": "extension",
    "config": {"name": "woman", "process": [{
        "type": "sd_trainer", "training_folder": "output", "device": "cuda:0", "trigger_word": "p3r5on",
        "network": {"type": "lora", "linear": 32, "linear_alpha": 16},
        "save": {"dtype": "float16", "save_every": 250, "max_step_saves_to_keep": 4, "push_to_hub": False},
        "datasets": [
            {
                "folder_path": "FOLDER", "caption_ext": "txt", "caption_dropout_rate": 0.05,
                "shuffle_tokens": False, "resolution": [632], "num_frames": 1
            }
        ],
        "train": {
            "batch_size": 1, "steps": 2000, "gradient_checkpointing": True, "noise_scheduler": "flowmatch",
            "timestep_type": "sigmoid", "optimizer": "adamw", "lr": "1e-4",
            "optimizer_params": {"weight_decay": 1e-4}, "ema_config": {"use_ema": True, "ema_decay": 0.99},
            "dtype": "bf16", "disable_sampling": True
        },
        "model": {
            "name_or_path": "/data/Wan2.1-T2V-14B-Diffusers", "arch": "wan21", "quantize": True,
            "low_vram": True
        },
        "sample": {
            "sampler": "flowmatch", "sample_every": 250, "width": 832, "height": 480, "num_frames": 40,
            "neg": "", "prompts": ["[trigger] playing chess", "a bear"], "seed": 42, "walk_seed": True,
            "guidance_scale": 5
        },
    }]},
}  # fmt: skip


def values(made: Imported) -> TrainConfig:
    return build(TrainConfig, yaml.safe_load(made.train), where="imported")


def kinds(made: Imported) -> dict[str, str]:
    return {
        line.option.split()[0].lstrip("-"): line.kind for line in made.lines if "dataset 1" not in line.option
    }


def from_pipe(folder: Path, model: str, data: str = PIPE_DATA) -> Imported:
    (folder / "dataset.toml").write_text(data.replace("FOLDER", str(folder)))
    path = folder / "main.toml"
    path.write_text(PIPE.replace("MODEL", PIPE_MODELS[model]))
    return convert("diffusion-pipe", [str(path)])


def from_toolkit(folder: Path, **process: object) -> Imported:
    raw = yaml.safe_load(yaml.safe_dump(TOOLKIT).replace("FOLDER", str(folder)))
    raw["config"]["process"][0] |= process
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(raw))
    return convert("ai-toolkit", [str(path)])


# --- what options become ------------------------------------------------------------------------------------


def test_a_documented_command_line() -> None:
    made = convert("musubi", [MUSUBI["hv"]])
    cfg = values(made)
    dit = "ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt"
    assert (cfg.model.name, cfg.model.dit) == ("hunyuan-video", dit)
    assert (
        cfg.adapter.rank, cfg.adapter.alpha, cfg.optim.lr, cfg.optim.betas
    ) == (32, 1.0, 2e-4, (0.9, 0.999))
    assert (cfg.flow.timestep_sampling, cfg.flow.shift, cfg.flow.guidance) == ("shift", 7.0, 1.0)
    assert (cfg.model.quantize, cfg.run.recompute, cfg.parallel.kernel) == ("fp8", "full", "sdpa")
    assert (cfg.run.epochs, cfg.run.steps, cfg.run.save_every_epochs, cfg.run.seed) == (16.0, None, 1.0, 42)
    assert (cfg.run.output_dir, cfg.run.name, cfg.data.shards) == ("out/mine", "mine", ("out/shards",))
    found = kinds(made)
    assert found["persistent_data_loader_workers"] == "meaningless" and found["network_dim"] == "mapped"
    assert not [line for line in made.lines if line.kind == "unknown"]
    given = [word.lstrip("-") for word in MUSUBI["hv"].split() if word.startswith("--")]
    assert {"accelerate"} | set(found) >= {
        option for option in given if option != "num_cpu_threads_per_process"
    }
    for line in made.lines:
        assert f"# {line}" in made.train  # the file says what became of each


def test_what_a_tool_takes_where_nothing_is_said_is_written_down() -> None:
    """musubi's alpha of 1, rank of 4 and rate of 2e-6 are not ours."""
    cfg = values(convert("musubi", ["python hv_train_network.py --dit x --output_dir o"]))
    assert (cfg.adapter.rank, cfg.adapter.alpha, cfg.optim.lr, cfg.run.steps) == (4, 1.0, 2e-6, 1600)
    assert cfg.run.recompute == "none"


def test_files_arguments_and_lists(tmp_path: Path) -> None:
    text = 'dit = "d"\nnetwork_module = "networks.lora"\n[optimizer]\nlearning_rate = 1e-4\n[x]\nseed = 3\n'
    (tmp_path / "c.toml").write_text(text)
    cfg = values(convert("musubi", [str(tmp_path / "c.toml")]))
    assert (cfg.model.dit, cfg.optim.lr, cfg.run.seed) == ("d", 1e-4, 3)
    given = "--seed=7 \\\n --optimizer_args weight_decay=0.1 betas=0.9,0.95"
    line = f"python hv_train_network.py --config_file {tmp_path / 'c'} {given}"
    cfg = values(convert("musubi", [line]))
    assert (cfg.run.seed, cfg.optim.weight_decay, cfg.optim.betas) == (7, 0.1, (0.9, 0.95))
    (tmp_path / "run.sh").write_text(f"# my run\n{line}\n")
    assert values(convert("musubi", [str(tmp_path / "run.sh")])) == cfg


def test_adapters_base_loras_and_schedules() -> None:
    more = ("--network_args loraplus_lr_ratio=4 rank_dropout=0.1 --base_weights a.safetensors b.safetensors "
            "--base_weights_multiplier 0.5 --lr_scheduler cosine_with_restarts --lr_scheduler_num_cycles 3 "
            "--lr_warmup_steps 5% --network_module networks.lokr --min_timestep 200 --weighting_scheme "
            "sigma_sqrt --compile --max_grad_norm 0.5")
    line = MUSUBI["hv"].replace("--network_module networks.lora ", "") + " " + more
    made = convert("musubi", [line])
    cfg = values(made)
    assert (dict(cfg.adapter.lr_ratios), cfg.adapter.rank_dropout, cfg.adapter.type) == (
        {".*lora_up.*": 4.0}, 0.1, "lokr"
    )
    assert [(b.path, b.multiplier) for b in cfg.adapter.base_lora] == [
        ("a.safetensors", 0.5), ("b.safetensors", 1.0)
    ]
    assert (
        cfg.optim.schedule, cfg.optim.cycles, cfg.optim.warmup_share, cfg.optim.max_grad_norm
    ) == ("cosine", 3.0, 0.05, 0.5)
    assert (cfg.flow.min_sigma, cfg.flow.range, cfg.flow.weighting, cfg.flow.raw_guidance) == (
        0.2, "squeeze", "sigma_sqrt", True
    )
    assert cfg.run.compile == "blocks" and not made.lost


def test_caching_command_lines_tell_the_files() -> None:
    vae = (
        "python src/musubi_tuner/cache_latents.py --dataset_config d.toml --vae v.pt --vae_tiling "
        "--skip_existing"
    )
    text = (
        "python src/musubi_tuner/cache_text_encoder_outputs.py --text_encoder1 L --text_encoder2 C "
        "--batch_size 16"
    )
    made = convert(
        "musubi",
        [vae, text, "accelerate launch --num_processes 4 hv_train_network.py --dit x --output_dir o"]
    )
    assert made.encode is not None and made.gpus == 4
    cfg = build(EncodeConfig, yaml.safe_load(made.encode), where="encode")
    assert (cfg.dataset, cfg.output, cfg.batch_size, cfg.model.vae) == ("d.toml", "o/shards", 16, "v.pt")
    assert dict(cfg.model.parts) == {"llm": "L", "clip": "C"} and cfg.model.dit is None


def test_unknown_options_and_values_are_named_and_secrets_are_not() -> None:
    made = convert(
        "musubi", [MUSUBI["hv"] + " --lerning_rate 3 --huggingface_token hf_abc --lr_scheduler exotic"]
    )
    lost = {line.kind: str(line) for line in made.lost}
    assert "--lerning_rate 3" in lost["unknown"] and "did you mean 'learning_rate'" in lost["unknown"]
    assert "hf_abc" not in made.train and any("lr_scheduler exotic" in str(line) for line in made.lost)
    made = convert("musubi", [MUSUBI["hv"] + " --network_alpha many"])
    assert (
        any("expected a finite number" in line.why for line in made.lost) and values(made).adapter.alpha == 32
    )


@pytest.mark.parametrize(
    ("name", "flavor", "expert", "files"),
    [
        ("wan21", "t2v-1.3b", None, {"dit": "wan2.1_t2v_1.3B_bf16.safetensors"}),
        (
            "wan22-low", "t2v-a14b", "low",
            {"dit_low": "wan2.2_t2v_low_noise_14B_fp16.safetensors", "dit": None}
        ),
        ("wan22-high", "i2v-a14b", "high", {"dit": "ckpts/some.safetensors"}),
        ("wan22-both", "t2v-a14b", "both", {"dit": "high.safetensors", "dit_low": "low.safetensors"}),
    ],
)
def test_experts_by_name_range_or_both_files(name: str, flavor: str, expert: str | None, files: dict) -> None:
    model = yaml.safe_load(convert("musubi", [MUSUBI[name]]).train)["model"]
    assert (model["name"], model["flavor"], model.get("experts")) == ("wan", flavor, expert)
    assert {key: model.get(key) for key in files} == files


def test_diffusion_pipe(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch(), (tmp_path / "b.jpg").touch()
    made = from_pipe(tmp_path, "wan-22")
    cfg = values(made)
    assert (cfg.model.flavor, cfg.flow.max_sigma, cfg.model.quantize, cfg.run.recompute) == (
        "t2v-a14b", 0.875, "fp8", "offload"
    )
    parts = yaml.safe_load(made.train)["model"]
    assert (
        parts["dit_low"].endswith("low_noise_model")
        and parts["vae"] == "/data/Wan2.2-T2V-A14B/Wan2.1_VAE.pth"
    )
    assert (cfg.adapter.rank, cfg.optim.lr, cfg.optim.warmup_steps, cfg.flow.shift) == (32, 2e-5, 10, 1.0)
    assert not made.lost and cfg.flow.masked
    assert build(
        EncodeConfig, yaml.safe_load(made.encode or ""), where=""
    ).columns == ("latents", "text", "mask")
    entries = yaml.safe_load(made.dataset or "")["datasets"]
    shapes = [
        (next(k for k in e if k.endswith("directory")), e["resolution"], e.get("target_frames"))
        for e in entries
    ]
    assert shapes == [
        ("video_directory", [512, 512], [33]), ("image_directory", [512, 512], None),
        ("video_directory", [1280, 720], [33]), ("image_directory", [1280, 720], None),
    ]  # fmt: skip
    assert all(
        e["num_repeats"] == 2 and e["enable_bucket"] and e["mask_directory"] == "masks" for e in entries
    )


def test_masks_of_one_directory_among_several_are_left_out(tmp_path: Path) -> None:
    """A clip without one would be refused when the others' are wanted."""
    made = from_pipe(tmp_path, "wan-22", data=f"{PIPE_DATA}\n[[directory]]\npath = 'b'\n")
    assert "mask_directory" not in (made.dataset or "") and not values(made).flow.masked
    assert ["masks" in str(line) for line in made.lost] == [True]


def test_ai_toolkit(tmp_path: Path) -> None:
    made = from_toolkit(tmp_path)
    cfg = values(made)
    assert (cfg.run.name, cfg.run.output_dir, cfg.run.steps, cfg.adapter.alpha) == (
        "woman", "output/woman", 2000, 16
    )
    assert (cfg.model.dit, cfg.run.ema_decay) == ("/data/Wan2.1-T2V-14B-Diffusers/transformer", 0.99)
    assert (cfg.preview.frames, cfg.preview.cfg_scale) == (37, 5.0)
    assert [(p.prompt, p.seed) for p in cfg.preview.prompts] == [("p3r5on playing chess", 42), ("a bear", 43)]
    (entry,) = yaml.safe_load(made.dataset or "")["datasets"]
    assert entry == {"image_directory": str(tmp_path), "resolution": [640, 640], "caption_prefix": "p3r5on, ",
                     "caption_extension": ".txt", "caption_dropout": 0.05, "enable_bucket": True}
    assert not made.lost


def test_the_datasets_are_what_encode_reads(tmp_path: Path) -> None:
    from hvtrain.encode.dataset import read_dataset_file

    (tmp_path / "masks").mkdir()
    flavor = find("wan").flavor("t2v-14b")
    for made in (from_pipe(tmp_path, "wan-14b"), from_toolkit(tmp_path)):
        (tmp_path / "d.yaml").write_text(made.dataset or "")
        assert read_dataset_file(tmp_path / "d.yaml", flavor)


@pytest.mark.parametrize(
    ("tool", "given", "says"),
    [
        ("musubi", "python flux_2_train_network.py --dit x", "no model of hvtrain is called "
        "'flux_2_train_network' there"),
        ("musubi", "--dit x", "nothing says which model it is; give --model NAME"),
        ("musubi", "nowhere.toml", "nowhere.toml: no such file"),
        ("musubi", "python hv_train_network.py --dit 'x", "not a command line"),
        ("musubi", "python hv_train_network.py x --dit y", "'x' belongs to no option"),
        ("musubi", "python hv_train_network.py --network_args rank_dropout", "expected KEY=VALUE"),
        (
            "musubi", "python hv_train_network.py --network_args exclude_patterns=x",
            "expected a list of patterns"
        ),
        (
            "musubi", "python wan_train_network.py --task t2v-A14B --dit x --output_dir o",
            "which of them is x"
        ),
        ("diffusion-pipe", "nowhere.toml", "cannot be read"),
        ("diffusion-pipe", "deepspeed train.py --deepspeed", "names no --config"),
        ("ai-toolkit", "nowhere.yaml", "cannot be read"),
        ("comfyui", "x", "no tool 'comfyui'"),
    ],
)
def test_what_cannot_be_read_is_one_line(tool: str, given: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(tool, [given])
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tool", "text", "says"),
    [
        ("ai-toolkit", "config: {process: 3}", "config.process: expected a list of sections"),
        ("ai-toolkit", "config: {process: [{}, {}]}", "holds 2; a run here is one of them"),
        ("ai-toolkit", "config: {process: [{model: {arch: wan21}, datasets: [x]}]}", "datasets: expected a "
        "list of sections"),
        (
            "ai-toolkit", "config: {process: [{model: {arch: wan21}, sample: {seed: many}}]}",
            "sample.seed is 'many'"
        ),
        ("ai-toolkit", "config: {process: [{model: {arch: wan21}, datasets: [{folder_path: x, resolution: "
        "big}]}]}",
         "resolution big"),
        (
            "ai-toolkit", "config: {process: [{model: {arch: wan21}, datasets: [{}]}]}",
            "an entry names no folder"
        ),
        ("diffusion-pipe", "model: {type: wan, text_encoders: [x]}", "model.text_encoders: expected a list "
        "of sections"),
        ("diffusion-pipe", "model: 3", "nothing says which model it is"),
        ("diffusion-pipe", "- 3", "expected keys and values"),
    ],
)
def test_files_of_another_shape(tool: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        convert(tool, [str(tmp_path / "odd.yaml")])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_words_of_a_shell() -> None:
    line = "uv run accelerate launch --a 1 \\\n -m musubi_tuner.hv_train_network --x 'a b' --y=2 --z -1 2.5"
    words = command_line(words_of(line))
    assert words.program == "hv_train_network" and words.launcher == {"a": 1}
    assert words.options == {"x": "a b", "y": 2, "z": [-1, 2.5]}
    words = command_line(
        words_of('A="1" uv run --extra cu124 deepspeed --num_gpus=2 train.py --config a.toml')
    )
    assert words.launcher == {"num_gpus": 2} and words.options == {"config": "a.toml"}
    assert command_line(words_of("uv run --extra cu124 cache_latents.py --vae v")).launcher == {}


def test_the_command_writes_three_files(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from_toolkit(tmp_path)
    assert cli.main(["import", "ai-toolkit", "job.yaml", "--out", "woman.yaml"]) == 0
    out = capsys.readouterr().out
    assert "hvtrain encode woman-encode.yaml && hvtrain train woman.yaml" in out and "mapped" in out
    assert load(TrainConfig, "woman.yaml").run.name == "woman"
    assert (
        load(EncodeConfig, "woman-encode.yaml").dataset == "woman-dataset.yaml"
        and Path("woman-dataset.yaml").exists()
    )
    # never over what is there
    assert cli.main(["import", "ai-toolkit", "job.yaml", "--out", "woman.yaml"]) == 2
    assert "woman.yaml exists" in capsys.readouterr().err
    # without quotes
    assert cli.main(["import", "musubi", *MUSUBI["hv"].split(), "--out=b.yaml", "--shards", "s"]) == 0
    assert (
        load(TrainConfig, "b.yaml").data.shards == ("s",)
        and load(EncodeConfig, "b-encode.yaml").output == "s"
    )
    assert "hvtrain train b.yaml" in capsys.readouterr().out
    mistakes = (
        ([], "give its command line"), (["x", "--out"], "--out: expected a value"),
        (["--out", "x", "y"], ".yaml")
    )
    for words, says in mistakes:
        assert cli.main(["import", "musubi", *words]) == 2 and says in capsys.readouterr().err
    assert cli.main(["import", "musubi", MUSUBI["hv"] + " --exotic"]) == 1
    both = capsys.readouterr()
    assert build(TrainConfig, yaml.safe_load(both.out), where="") and "unknown     --exotic" in both.err
