import json
import os
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from hvtrain.adapters.attach import linear_shapes, merge_all
from hvtrain.config import LoraFileConfig, MergeConfig
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.files import read_lora
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.write import save_lora, write_lora
from hvtrain.merge import run as merge
from hvtrain.models.load import load_dit
from tests.adapters.models import ARCH, SPEC, adapted, an_input, build, lora_tensors

METADATA = {
    "hvtrain.model": SPEC.name,
    "hvtrain.arch": json.dumps(asdict(ARCH)),
    "note": "kept",
    "sshs_model_hash": "of the old bytes",
}


@pytest.fixture
def loras(tmp_path):
    """Two LoRAs over the same layers."""
    paths = []
    for seed in (7, 8):
        path = tmp_path / f"lora{seed}.safetensors"
        tensors = lora_tensors(adapted(lora_seed=seed))
        save_lora(path, tensors, rank=4, alpha=2.0, metadata={"ss_loraid": str(seed)}, architecture=SPEC.name)
        paths.append(path)
    return paths


def state(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Mixed dtypes, as in published files: norms stay in float32."""
    return {n: t if "norm" in n else t.to(dtype) for n, t in build().state_dict().items()}


def config(dit, loras, output, *, dtype=None, multipliers=(0.75, -0.5)) -> MergeConfig:
    entries = tuple(LoraFileConfig(str(p), m) for p, m in zip(loras, multipliers, strict=True))
    return MergeConfig(dit=str(dit), lora=entries, output=str(output), dtype=dtype, on_overlap="sum")


def expected(loras, tensors, multipliers=(0.75, -0.5)) -> dict[str, torch.Tensor]:
    """The in-memory merge, which generation uses."""
    model = build()
    model.load_state_dict({n: t.clone() for n, t in tensors.items()}, assign=True)
    shapes = linear_shapes(model)
    merge_all(model, [(read_lora(p, shapes, spec=SPEC), m) for p, m in zip(loras, multipliers, strict=True)])
    return model.state_dict()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_merged_file_equals_the_model_with_the_loras_applied(tmp_path, loras, prefix):
    dit, output = tmp_path / "dit.safetensors", tmp_path / "out" / "merged.safetensors"
    tensors = state()
    others = {"vae.decoder.weight": torch.randn(3)} if prefix else {}
    safetensors.torch.save_file(
        {**{prefix + n: t for n, t in tensors.items()}, **others}, dit, metadata=METADATA
    )
    merge.run(config(dit, loras, output))
    merged, want = safetensors.torch.load_file(output), expected(loras, tensors)
    assert merged.keys() == {*(prefix + n for n in tensors), *others}
    changed = 0
    for name, tensor in tensors.items():
        assert merged[prefix + name].dtype == tensor.dtype
        assert torch.equal(merged[prefix + name], want[name]), name  # bit for bit
        changed += not torch.equal(merged[prefix + name], tensor)
    assert changed == 20
    assert all(torch.equal(merged[n], t) for n, t in others.items())
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    history = json.loads(metadata.pop("hvtrain.merged"))
    assert metadata == {k: v for k, v in METADATA.items() if k != "sshs_model_hash"}
    assert [(h["file"], h["multiplier"], h["ss_loraid"]) for h in history] == [
        ("lora7.safetensors", 0.75, "7"), ("lora8.safetensors", -0.5, "8"),
    ]  # fmt: skip


def test_the_merged_file_generates_what_the_trained_model_generates(tmp_path, loras):
    dit, output = tmp_path / "dit.safetensors", tmp_path / "merged.safetensors"
    safetensors.torch.save_file(build().state_dict(), dit, metadata=METADATA)
    merge.run(config(dit, loras[:1], output, multipliers=[1.0]))
    loaded = load_dit(output, dtype=torch.float32)
    assert loaded.arch == ARCH
    with torch.no_grad():
        want, got = adapted()(an_input()), loaded.model(an_input())
    assert (got - want).norm() / want.norm() < 1e-5


def test_a_pt_file_becomes_safetensors(tmp_path, loras):
    dit, output = tmp_path / "mp_rank_00_model_states.pt", tmp_path / "merged.safetensors"
    arch = replace(ARCH, hidden_size=256, rope_dims=(16, 56, 56))  # a head of 128: no metadata needed
    torch.manual_seed(0)
    tensors = {n: t.bfloat16() for n, t in SPEC.build(arch).state_dict().items()}
    torch.save({"module": tensors}, dit)
    path = tmp_path / "one.safetensors"
    pair = LoraPair(torch.randn(2, 256), torch.randn(3 * 256, 2), 1.0)
    write_lora(path, {"double_blocks.1.txt_attn_qkv": pair}, metadata={})
    merge.run(config(dit, [path], output, multipliers=[2.0]))
    merged = safetensors.torch.load_file(output)
    name = "double_blocks.1.txt_attn_qkv.weight"
    assert torch.equal(merged.pop(name), (tensors.pop(name).float() + 2 * pair.delta()).bfloat16())
    assert merged.keys() == tensors.keys() and all(torch.equal(merged[n], t) for n, t in tensors.items())


def test_a_diffusers_layout_stays_one(tmp_path, loras):
    """q, k and v apart in the file: each takes its rows."""
    dit, output = tmp_path / "dit.safetensors", tmp_path / "merged.safetensors"
    cuts = SPEC.key_maps["diffusers"].write(state())

    def layout(tensors):
        return {name: cut.take(tensors[cut.source]).contiguous() for name, cut in cuts.items()}

    safetensors.torch.save_file(layout(state()), dit, metadata=METADATA)
    merge.run(config(dit, loras, output))
    merged, want = safetensors.torch.load_file(output), layout(expected(loras, state()))
    assert merged.keys() == want.keys()
    for name, tensor in want.items():  # the matrix product of fewer rows may round otherwise
        torch.testing.assert_close(merged[name].float(), tensor.float(), rtol=2**-7, atol=1e-6)


def test_shards_stay_shards(tmp_path, loras):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    tensors = state()
    names = sorted(tensors)
    table = {n: f"m-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(table.values()):
        part = {n: tensors[n] for n in names if table[n] == file}
        safetensors.torch.save_file(part, source / file, metadata=METADATA)
    (source / "m.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    merge.run(config(source, loras, output))
    index = json.loads((output / "m.safetensors.index.json").read_text())
    assert index["weight_map"] == table
    want = expected(loras, tensors)
    for name, file in table.items():
        with safe_open(output / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), want[name])
    merge.run(config(source, loras, tmp_path / "one.safetensors"))
    assert safetensors.torch.load_file(tmp_path / "one.safetensors").keys() == tensors.keys()


def test_another_dtype_rounds_once(tmp_path, loras):
    dit, output = tmp_path / "dit.safetensors", tmp_path / "merged.safetensors"
    safetensors.torch.save_file(state(torch.float32), dit, metadata=METADATA)
    merge.run(config(dit, loras, output, dtype="bfloat16"))
    merged, want = safetensors.torch.load_file(output), expected(loras, state(torch.float32))
    assert all(torch.equal(merged[n], t.bfloat16()) for n, t in want.items())


def test_multiplier_zero_changes_nothing(tmp_path, loras):
    dit, output = tmp_path / "dit.safetensors", tmp_path / "merged.safetensors"
    safetensors.torch.save_file(state(), dit, metadata=METADATA)
    merge.run(config(dit, loras, output, multipliers=[0.0, 0.0]))
    merged = safetensors.torch.load_file(output)
    assert all(torch.equal(merged[n], t) for n, t in state().items())


def test_refusals(tmp_path, loras):
    dit, output = tmp_path / "dit.safetensors", tmp_path / "merged.safetensors"
    tensors = state()
    safetensors.torch.save_file(tensors, dit, metadata=METADATA)
    stranger = tmp_path / "stranger.safetensors"
    pair = LoraPair(torch.randn(2, 48), torch.randn(48, 2), 1.0)
    write_lora(stranger, {"blocks.0.self_attn.q": pair}, metadata={})
    with pytest.raises(CheckpointError, match="it looks like Wan"):
        merge.run(config(dit, [stranger], output, multipliers=[1.0]))
    with pytest.raises(ConfigError, match="is one of the inputs"):
        merge.run(config(dit, loras, dit))
    with pytest.raises(ConfigError, match="must end in .safetensors"):
        merge.run(config(dit, loras, tmp_path / "merged.pt"))
    with pytest.raises(ConfigError, match="must end in .safetensors"):
        merge.run(config(dit, loras, tmp_path / "folder"))
    with pytest.raises(ConfigError, match="no dtype 'bf16'; did you mean 'bfloat16'"):
        merge.run(config(dit, loras, output, dtype="bf16"))
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge.run(config(dit, [], output, multipliers=[]))
    del tensors["single_blocks.1.linear2.weight"]
    safetensors.torch.save_file(tensors, dit, metadata=METADATA)
    with pytest.raises(CheckpointError, match="1 missing: single_blocks.1.linear2.weight"):
        merge.run(config(dit, loras, output))
    assert not output.exists()


def test_scaled_eight_bit_weights_are_refused(tmp_path, loras):
    dit = tmp_path / "dit.safetensors"
    key = "single_blocks.1.linear2"
    tensors = state()
    tensors[f"{key}.weight"] = tensors[f"{key}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{key}.scale_weight"] = torch.tensor(0.5)
    safetensors.torch.save_file(tensors, dit, metadata=METADATA)
    with pytest.raises(CheckpointError, match="'single_blocks.1.linear2.weight' is scaled 8-bit"):
        merge.run(config(dit, loras, tmp_path / "merged.safetensors"))


_MEASURE = """
    import sys, threading, time
    from hvtrain.merge import run as merge
    from hvtrain.config import LoraFileConfig, MergeConfig

    def anonymous():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

    peak, done = [0], threading.Event()
    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.001)

    dit, lora, output = sys.argv[1:]
    import hvtrain.models.hunyuan_video
    start = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    merge.run(MergeConfig(dit=dit, lora=(LoraFileConfig(lora, 1.0),), output=output))
    done.set(); thread.join()
    print(peak[0] - start)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measures memory through Linux' /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_memory_does_not_grow_with_the_model(tmp_path, suffix):
    """A 240 MB model whose largest tensor has 15 MB: the peak stays at a few such tensors."""
    arch = replace(ARCH, hidden_size=1024, heads_num=8, double=2, single=3, rope_dims=(16, 56, 56))
    with torch.device("meta"):
        empty = SPEC.build(arch).state_dict()
    tensors = {n: torch.full(t.shape, 0.5, dtype=torch.bfloat16) for n, t in empty.items()}
    size = sum(t.nbytes for t in tensors.values())
    assert size > 200e6 and max(t.nbytes for t in tensors.values()) < 16e6
    dit, lora, output = (
        tmp_path / f"dit{suffix}", tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    )
    if suffix == ".pt":
        torch.save(tensors, dit)
    else:
        safetensors.torch.save_file(tensors, dit)
    del tensors
    names = [f"single_blocks.{i}.linear1" for i in range(3)]
    write_lora(lora, {n: LoraPair(torch.ones(4, 1024), torch.ones(7168, 4), 4.0) for n in names}, metadata={})
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MEASURE), str(dit), str(lora), str(output)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert output.stat().st_size > size
    assert int(done.stdout.split()[-1]) < 120e6
    with safe_open(output, "pt") as file:
        assert file.get_tensor("single_blocks.2.linear1.weight").unique().tolist() == [4.5]
