"""The memory savers through `hvtrain train`: the same adapter where it must be, and refusals
of what does not go together."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hvtrain.config import TrainConfig, ZeroConfig, load
from hvtrain.config.rules import check_train
from hvtrain.errors import ConfigError, HvtrainError
from hvtrain.parallel import products
from hvtrain.parallel.context import shutdown
from hvtrain.train import run as train
from hvtrain.train.engine import Step
from hvtrain.train.zero import ds_config
from tests.train.shardset import config, make_shards
from tests.weights.scaled import ScaledProduct


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def plain(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("plain") / "run"
    train.run(config(shards, run))
    return load_file(run / "lora.safetensors")


@pytest.mark.parametrize(
    "items",
    [
        ("run.recompute=selective",),
        ("run.recompute=offload",),
        ("run.recompute=full", "run.blocks_to_swap=2"),
        ("run.recompute=full", "run.blocks_to_swap=2", "zero.engine=deepspeed", "zero.stage=2"),
    ],
    ids=" ".join,
)
def test_the_adapter_is_the_same(shards, plain, tmp_path, items):
    try:
        train.run(config(shards, tmp_path / "run", *items))
    finally:
        shutdown()
    found = load_file(tmp_path / "run/lora.safetensors")
    exact = "zero.engine=deepspeed" not in items
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-7)


@pytest.mark.parametrize(
    "items",
    [
        ("fp8",), ("fp8_scaled",),
        ("fp8_scaled", "zero.engine=deepspeed", "run.recompute=full", "run.blocks_to_swap=2")
    ],
    ids=" ".join,
)
def test_a_lora_learns_over_float8_weights(shards, plain, tmp_path, items):
    try:
        train.run(config(shards, tmp_path / "run", f"model.quantize={items[0]}", "run.steps=12", *items[1:]))
    finally:
        shutdown()
    losses = [
        json.loads(line)["train/loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    found = load_file(tmp_path / "run/lora.safetensors")
    assert len(losses) == 12 and found.keys() == plain.keys()
    assert any(t.abs().max() > 0 for name, t in found.items() if "lora_up" in name)


def test_a_run_with_float8_products(shards, tmp_path, monkeypatch, capsys):
    """Where a device has them: sums with care in training; nothing by false, by auto what is faster."""
    monkeypatch.setattr(products, "missing", lambda device, dtype: None)
    times = iter([1.0, 2.0, 2.0, 1.0] * 100)  # float8, dequantised: faster forward, slower backward
    monkeypatch.setattr(products, "timed", lambda work, device: next(times))
    monkeypatch.setenv("HOME", str(tmp_path))
    items = ("model.quantize=fp8", "run.precision=bf16", "run.recompute=full", "run.steps=2")
    n, losses = [], []
    for setting in ("true", "false", "auto"):
        product = ScaledProduct()
        monkeypatch.setattr(torch, "_scaled_mm", product)
        train.run(config(shards, tmp_path / setting, *items, f"model.fp8_matmul={setting}"))
        assert not any(product.fast)
        n.append(len(product.shapes))
        metrics = (tmp_path / setting / "metrics.jsonl").read_text().splitlines()
        losses.append(json.loads(metrics[-1])["train/loss"])
    said = capsys.readouterr().out
    assert n[0] > 100 and n[1] == 0 and 0 < abs(losses[0] - losses[1]) < 0.05 * losses[1]
    assert "float8 products in the forward of 24 and the backward of 24 of 24 layers" in said
    assert "24 float8 layers dequantised" in said
    # the second step's loss follows from the first's backward
    assert "float8 products in the forward of 24 and the backward of 0 of 24 layers" in said
    assert losses[2] not in losses[:2] and abs(losses[2] - losses[0]) < 0.02 * losses[0]
    kept = json.loads((tmp_path / ".cache/hvtrain/products.json").read_text())
    assert set(kept.values()) == {"forward"} and len(kept) == 6


@pytest.mark.parametrize(
    "items, says",
    [
        (("run.blocks_to_swap=2",), "use run.recompute full, selective or offload"),
        (("run.blocks_to_swap=2", "adapter.type=none"), "use zero.offload_param"),
        (
            ("run.blocks_to_swap=2", "run.recompute=full", "zero.engine=deepspeed", "zero.stage=3"),
            "use zero.stage 0 to 2"
        ),
        (("run.blocks_to_swap=20", "run.recompute=full"), "blocks_to_swap: 20 of 6 blocks"),
        (("run.blocks_to_swap=-1",), "run.blocks_to_swap is -1"),
        (("model.quantize=fp8", "adapter.type=none"), "use model.quantize=none"),
        (("model.quantize=fp8", "zero.engine=deepspeed", "zero.stage=3"), "use zero.stage 0, 1 or 2"),
        (("model.quantize=fp8", "model.fp8_matmul=true"), "a CPU, has no float8 products; use auto"),
        (("run.keep_best=true",), "set eval.every_steps"),
        (("zero.deepspeed=gone.json",), "zero.deepspeed: gone.json does not exist"),
        (("zero.offload_param=cpu",), "torch engine"),
        (("run.hang_timeout_s=-1",), "run.hang_timeout_s is -1"),
    ],
)
def test_what_does_not_go_together(shards, tmp_path, items, says):
    with pytest.raises(HvtrainError, match=says) as caught:
        train.run(config(shards, tmp_path / "run", *items))
    assert "\n" not in str(caught.value)


def _engine(tmp_path, settings) -> ZeroConfig:
    path = tmp_path / "ds.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return ZeroConfig(deepspeed=str(path))


def test_deepspeed_s_own_settings_are_merged_over_ours(tmp_path):
    net = torch.nn.Linear(3, 3)
    settings = {"zero_optimization": {"round_robin_gradients": True}, "wall_clock_breakdown": True}
    made = ds_config(_engine(tmp_path, settings), net, cuda=False, step=Step())
    assert (
        made["zero_optimization"]["round_robin_gradients"] is True and made["zero_optimization"]["stage"] == 2
    )
    assert made["wall_clock_breakdown"] is True and made["communication_data_type"] == "fp32"
    small = ds_config(ZeroConfig(bucket_mb=0.00001, communication_dtype="bf16"), net, cuda=False, step=Step())
    assert (
        small["zero_optimization"]["reduce_bucket_size"] == 2 and small["communication_data_type"] == "bf16"
    )


@pytest.mark.parametrize("cuda, whole, stage, overlaps", [
    (True, True, 2, True), (True, False, 2, False), (False, True, 2, False), (True, True, 0, False),
    (True, False, 3, False),
])  # fmt: skip
def test_gradients_travel_beside_the_backward_of_a_full_fine_tune_alone(cuda, whole, stage, overlaps):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    net[0].requires_grad_(whole)
    zero = ds_config(ZeroConfig(stage=stage), net, cuda=cuda, step=Step())["zero_optimization"]
    assert zero["overlap_comm"] is overlaps


def test_zero_3_leaves_torch_s_linear_alone_and_gathers_a_block_ahead():
    zero = ds_config(ZeroConfig(stage=3), torch.nn.Linear(3, 3), cuda=True, step=Step())["zero_optimization"]
    assert zero["memory_efficient_linear"] is False and zero["stage3_prefetch_bucket_size"] == 1 << 28
    two = ds_config(ZeroConfig(stage=2), torch.nn.Linear(3, 3), cuda=True, step=Step())["zero_optimization"]
    assert "memory_efficient_linear" not in two


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"gradient_clipping": 1.0}, "sets 'gradient_clipping', which hvtrain sets from optim.max_grad_norm"),
        ({"zero_optimization": {"stage": 1}}, "sets 'zero_optimization.stage', which hvtrain sets from "
        "zero.stage"),
        ("{", "is not a JSON file"),
        ("[1]", "holds a list"),
    ],
)
def test_settings_that_are_ours_are_refused(tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says):
        ds_config(_engine(tmp_path, settings), torch.nn.Linear(3, 3), cuda=False, step=Step())


def test_the_fragment_reaches_deepspeed(shards, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"no_such_setting": 1}}))
    with pytest.raises(Exception, match="no_such_setting"):
        try:
            train.run(config(shards, tmp_path / "run", "zero.engine=deepspeed", f"zero.deepspeed={path}"))
        finally:
            shutdown()


def test_every_key_is_checked_before_the_model_is_read():
    cfg = load(TrainConfig, None, ["model.dit=gone.safetensors", "data.shards=[]"])
    with pytest.raises(ConfigError):
        check_train(cfg)
