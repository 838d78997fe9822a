"""What the transformer is given for each task: values, and where the conditions go."""

from __future__ import annotations

import pytest
import torch

from hvtrain.errors import ConfigError, DataError
from hvtrain.flow.loss import squared_error
from hvtrain.models import find
from hvtrain.models.layers import RMSNorm

SPEC = find("hunyuan-video")
X = torch.arange(2 * 3 * 4 * 2 * 2, dtype=torch.float32).view(2, 3, 4, 2, 2)  # [B C T H W]
IMAGE = torch.full((2, 3, 1, 2, 2), -5.0)
SIGMA = torch.tensor([0.25, 1.0])


def make(task: str, guidance: float = 6.0, **cond: torch.Tensor):
    text = {"text": torch.ones(2, 5, 7), "text_len": torch.tensor([5, 3]), "pooled": torch.full((2, 4), 2.0)}
    return SPEC.make_input(X, SIGMA, {**text, **cond}, task=task, guidance=guidance)


def test_text_to_video_passes_the_noised_latents_on():
    inp = make("t2v")
    assert torch.equal(inp.x, X) and inp.t.tolist() == [250.0, 1000.0] and inp.t.dtype == torch.float32
    assert inp.lengths["text"] == (5, 3) and torch.equal(inp.cond["text"], torch.ones(2, 5, 7))
    assert torch.equal(inp.cond["pooled"], torch.full((2, 4), 2.0))
    assert inp.loss_mask is None and inp.token_replace is False


@pytest.mark.parametrize("scale, seen", [(6.0, 6016.0), (1.0, 1000.0), (7.5, 7488.0)])
def test_guidance_is_what_the_weights_have_seen(scale, seen):
    """Times 1000 in bfloat16, whose step there is 32: the nearest to 6000 is 6016."""
    guidance = make("t2v", scale).cond["guidance"]
    assert guidance.tolist() == [seen, seen] and guidance.dtype == torch.float32


def test_image_to_video_holds_the_first_frame_and_learns_the_others():
    # only the condition's first frame counts
    inp = make("i2v", image_latents=torch.cat([IMAGE, IMAGE + 1], 2))
    assert torch.equal(inp.x[:, :, :1], IMAGE) and torch.equal(inp.x[:, :, 1:], X[:, :, 1:])
    assert inp.token_replace is True
    assert inp.loss_mask is not None and inp.loss_mask.shape == (2, 1, 4, 1, 1)
    assert inp.loss_mask[:, 0, :, 0, 0].tolist() == [[0, 1, 1, 1]] * 2
    velocity = X.clone()
    velocity[:, :, 0] += 1e6  # what the model says of the given frame does not matter
    assert squared_error(velocity, X, inp.loss_mask).tolist() == [0.0, 0.0]
    velocity[:, :, 1] += 3.0
    assert squared_error(velocity, X, inp.loss_mask).tolist() == [3.0, 3.0]  # 9 in one of three frames


def test_channels_of_the_image_lie_behind_those_of_the_video():
    inp = make("i2v-concat", image_latents=IMAGE)
    assert torch.equal(inp.x[:, :3], X) and inp.x.shape == (2, 6, 4, 2, 2)
    assert torch.equal(inp.x[:, 3:, :1], IMAGE) and not inp.x[:, 3:, 1:].any()
    assert inp.loss_mask is None and inp.token_replace is False
    masked = make("i2v-mask", image_latents=IMAGE)
    assert (
        masked.x.shape == (2, 7, 4, 2, 2) and torch.equal(masked.x[:, :6], inp.x) and masked.loss_mask is None
    )
    assert masked.x[:, 6].flatten(2).unique(dim=2).tolist() == [[[1], [0], [0], [0]]] * 2


def test_text_that_has_seen_the_image_takes_the_texts_place():
    seen = {"seen_text": torch.full((2, 6, 7), 3.0), "seen_text_len": torch.tensor([6, 2])}
    text = {key: value for key, value in make("t2v").cond.items() if key == "pooled"}
    inp = SPEC.make_input(X, SIGMA, {**text, **seen, "image_latents": IMAGE}, task="i2v", guidance=6.0)
    assert inp.lengths["text"] == (6, 2) and torch.equal(inp.cond["text"], seen["seen_text"])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"task: no task 't2w'; did you mean 't2v'"):
        make("t2w")
    for task in ("i2v", "i2v-dynamic", "i2v-concat", "i2v-mask"):
        with pytest.raises(DataError, match="needs the condition 'image_latents', which these samples lack"):
            make(task)
        for wrong in (IMAGE[:, :2], IMAGE[..., :1], IMAGE[:, :, :, :1]):
            with pytest.raises(
                DataError, match=r"image_latents of shape .* do not fit latents of shape \(2, 3, 4, 2, 2\)"
            ):
                make(task, image_latents=wrong)


def test_rms_norm_rounds_before_it_multiplies():
    """In bfloat16, bit for bit: normalised in float32, rounded to bfloat16, then
    times the weight, rounded again."""
    draw = torch.Generator().manual_seed(0)
    x, norm = torch.randn(64, 32, generator=draw).bfloat16(), RMSNorm(32).bfloat16()
    norm.weight.data = (1 + torch.randn(32, generator=draw) / 4).bfloat16()
    rows, weight = x.double(), norm.weight.data.double()
    normalised = (rows / (rows.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    found = norm(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (normalised.double() * weight).bfloat16())
    once = (rows / (rows.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * weight).bfloat16()
    assert not torch.equal(found, once)  # the other order shows in these numbers
