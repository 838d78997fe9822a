"""What a user types with files of full size that hold no byte of data: wrong combinations end by name before
anything loads, and every config says what `hvtrain fit` finds."""

import re
from pathlib import Path

import pytest
from PIL import Image

from launcher import cli
from tests.models.hunyuan_video_15.test_files import full_size

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs" / "hunyuan_video_15"
PARTS = [f"model.{part}=tiny:hunyuan_video_15/{file}" for part, file in
         {"vae": "vae.safetensors", "llm": "llm", "byt5": "byt5", "siglip": "siglip"}.items()]
OLDER = ROOT / "tests" / "data" / "shards_v2"
STEPS = "i2v-480p-step-distilled"
IS_I2V = "says 'i2v-480p', which does another task than flavor 't2v-480p'"
IS_T2V = "says 't2v-480p', which does another task than flavor 'i2v-480p'"


def typed(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Folders named as the released ones, and no way to load them."""
    for name, flavor in {"480p_t2v": "t2v-480p", "480p_i2v": "i2v-480p", "steps": STEPS}.items():
        full_size(tmp_path / name / "model.safetensors", flavor)
    Image.new("RGB", (64, 64)).save(tmp_path / "first.png")

    def loaded(*_, **__):
        raise AssertionError("something was loaded")

    monkeypatch.setattr("hvtrain.weights.source.Source.fill", loaded)
    monkeypatch.setattr("hvtrain.generate.run.encode_requests", loaded)
    return tmp_path


@pytest.mark.parametrize(
    ("dit", "keys", "said"),
    [
        ("480p_i2v", ["model.flavor=i2v-480p"], "image: 'i2v-480p' is told by an image; give image=FILE"),
        ("480p_i2v", [], IS_I2V),
        ("480p_t2v", ["model.flavor=i2v-480p", "image=first.png"], IS_T2V),
        ("480p_t2v", ["image=first.png"], "but 't2v-480p' takes none: leave it out, or take a flavor of "
        "image to video"),
        ("480p_t2v", ["guidance=6"], "guidance is 6, but this 't2v-480p' embeds no guidance"),
        ("steps", [f"model.flavor={STEPS}", "image=first.png", "cfg_scale=6"], "cfg_scale is 6, but "
        f"'{STEPS}'"),
        ("steps", ["model.flavor=i2v-480p", "image=first.png"], f"it looks like '{STEPS}'"),
    ],
)
def test_generate_refuses_by_name(dit, keys, said, files, capsys):
    output = files / "made" / "a.mp4"
    keys = [key.replace("first.png", str(files / "first.png")) for key in keys]
    own = ["prompt=a cat", f"output={output}", f"model.dit={files / dit}", *PARTS]
    code = typed("generate", CONFIGS / "generate.yaml", *own, *keys)
    assert code == 2 and said in capsys.readouterr().err and not output.parent.exists()


@pytest.mark.parametrize(
    ("dit", "keys", "said"),
    [
        ("480p_i2v", [], IS_I2V),
        ("480p_t2v", ["model.flavor=i2v-480p"], IS_T2V),
        ("480p_t2v", ["flow.guidance=6"], "flow.guidance is 6, but this 't2v-480p' embeds no guidance"),
        ("480p_t2v", [], "holds latents of 16 channels, flavor 't2v-480p' takes 32"),
    ],
)
def test_train_refuses_by_name(dit, keys, said, files, capsys):
    output = files / "run"
    nothing = [f"model.{part}=null" for part in ("vae", "llm", "byt5", "siglip")]
    own = [f"data.shards={OLDER}", f"run.output_dir={output}", f"model.dit={files / dit}", *nothing]
    code = typed("train", CONFIGS / "lora.yaml", *own, "zero.engine=torch", "zero.stage=0", *keys)
    assert code == 2 and said in capsys.readouterr().err and not list(output.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("config", "keys", "asked", "gib"),
    [
        ("lora", [], ("848x480x61", 8, 80), None),
        ("lora", ["model.flavor=t2v-720p", "parallel.ulysses=2"], ("1280x720x61", 8, 80), None),
        ("lora_one_gpu", [], ("848x480x61", 1, 24), 1),
        ("loraid", [], ("848x480x61", 8, 80), None),
        ("full", [], ("848x480x61", 8, 80), None),
        ("slurm_720p", [], ("1280x720x121", 16, 80), None),
        ("muon", [], ("848x480x121", 8, 141), 0),
        ("muon", ["adapter.type=lora", "adapter.rank=8", "adapter.alpha=16"], ("848x480x121", 8, 80), 1),
    ],
)
def test_every_config_fits_where_it_says(config, keys, asked, gib, capsys):
    """`gib`: of the figures in the config's head, which one this is."""
    size, gpus, memory = asked
    where = ["--size", size, "--gpus", gpus, "--memory", memory]
    code = typed("fit", CONFIGS / f"{config}.yaml", "model.dit=null", *keys, *where)
    found = re.search(r"^fits: ([\d.]+) GiB of", capsys.readouterr().out, re.MULTILINE)
    assert code == 0 and found
    if gib is not None:
        told = [float(n) for n in re.findall(r"([\d.]+) GiB", (CONFIGS / f"{config}.yaml").read_text())]
        assert abs(told[gib] - float(found[1])) < 0.6


def test_it_fits_while_it_generates(capsys):
    assert typed(
        "fit", "--generate", CONFIGS / "generate.yaml", "model.dit=null", "--gpus", 1, "--memory", 24
    ) == 0
    assert capsys.readouterr().out.rstrip().endswith("fits")


def test_the_slurm_config_becomes_a_script(files, capsys, monkeypatch):
    """As its head says, without a cluster."""
    head = (CONFIGS / "slurm_720p.yaml").read_text().splitlines()[0]
    words = head.removeprefix("# hvtrain ").split()
    assert words[:2] == ["launch", "--slurm"] and "configs/hunyuan_video_15/slurm_720p.yaml" in words
    (files / "720p_t2v").mkdir()
    full_size(files / "720p_t2v" / "model.safetensors", "t2v-720p")
    (files / "site.yaml").write_text("partition: gpu\n")
    monkeypatch.setenv("HVTRAIN_SITE", str(files / "site.yaml"))
    keys = {"data.shards": files, "run.output_dir": files / "run"}
    words = [f"{word.split('=')[0]}={keys[word.split('=')[0]]}" if "=" in word else word for word in words]
    words = [str(CONFIGS / "slurm_720p.yaml") if word.endswith("slurm_720p.yaml") else word for word in words]
    own = [
        f"model.dit={files / '720p_t2v'}",
        *(f"model.{part}=null" for part in ("vae", "llm", "byt5", "siglip"))
    ]
    assert typed(words[0], words[1], "--dry-run", *words[2:], *own) == 0
    script = capsys.readouterr().out
    for line in (
        "#SBATCH --nodes=2", "#SBATCH --time=24:00:00", "#SBATCH --partition=gpu", "--nproc 8 --in-job train"
    ):
        assert line in script
