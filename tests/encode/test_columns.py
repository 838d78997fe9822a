"""Columns of `hvtrain encode`: by themselves or together, captions, control clips, masks."""

import json

import pytest
import torch
from PIL import Image

from hvtrain.encode.encoders import Masks
from hvtrain.errors import DataError
from shards.loader import BatchLoader
from tests.encode.test_run import contents, reasons, run, same


def test_columns_one_by_one_are_the_columns_together(dataset, tmp_path, capsys):
    together = run(dataset, tmp_path / "a", "columns=[latents,image,text]")
    for column in ("text", "latents", "image"):
        last = run(dataset, tmp_path / "b", f"columns=[{column}]")
    assert (
        sorted(last.manifest.columns) == ["image", "latents", "text"]
        and same(contents(together), contents(last))
    )
    first = together.get(0).tensors
    assert first["image_latents"].shape == (16, 1, 8, 8)
    # The VAE is causal: the first frame alone is the first latent frame, but for the posterior's noise.
    own, others = (
        distance(first["image_latents"], first["latents"][:, :1]), together.get(1).tensors["latents"][:, :1]
    )
    assert own < 0.5 * distance(first["image_latents"], others)
    # A new caption, text alone: the other columns follow.
    (tmp_path / "clips/clip_00001.txt").write_text("another caption")
    capsys.readouterr()
    run(dataset, tmp_path / "b", "columns=[text]")
    assert "image: 0 encoded, 0 copied, 6 kept; text: 1 encoded" in capsys.readouterr().out
    # A new clip needs all of them.
    (tmp_path / "clips/new.mp4").write_bytes((tmp_path / "clips/clip_00001.mp4").read_bytes())
    (tmp_path / "clips/new.txt").write_text("new")
    with pytest.raises(DataError, match=r"column 'latents' lacks 1 of the samples.*columns=\[..., latents\]"):
        run(dataset, tmp_path / "b", "columns=[text]")


def test_several_captions_repeats_and_dropout_reach_the_set(dataset, tmp_path):
    for i in range(6):
        (tmp_path / f"clips/clip_0000{i}.txt").unlink()
        (tmp_path / f"clips/clip_0000{i}.json").write_text(
            json.dumps({"captions": [f"clip {i}", f"number {i}"]})
        )
    dataset.write_text(dataset.read_text().replace('".txt"', '".json"').replace(
        "[[datasets]]", "[[datasets]]\nnum_repeats = 2\ncaption_dropout = 0.5\ncaption_prefix = 'a "
        "'\ncaption_suffix = '.'"))
    found = run(dataset, tmp_path / "out")
    assert len(found) == 12 and found.manifest.n_keys == 6
    sample = found.get(0)
    assert sample.meta["captions"] == ["a clip 0.", "a number 0."] and sample.meta["caption_dropout"] == 0.5
    assert {"text", "text.1", "pooled", "pooled.1"} < set(sample.tensors)
    batch = next(iter(BatchLoader(found, batch_size=2)))
    assert set(batch.tensors) == {"latents", "text", "text_len", "pooled"}


def distance(a, b):
    return (a.float() - b.float()).abs().mean()


def test_control_clips_and_images_become_a_column(dataset, tmp_path):
    (tmp_path / "control").mkdir()
    for path in sorted((tmp_path / "clips").glob("*.mp4"))[:5]:
        (tmp_path / "control" / path.name).write_bytes(path.read_bytes())
    dataset.write_text(dataset.read_text() + f"control_directory = '{tmp_path}/control'\n")
    found = run(dataset, tmp_path / "out", "columns=[latents,control,text]")
    assert len(found) == 5 and "has no control in" in reasons(tmp_path / "out")[0]
    tensors = found.get(0).tensors
    assert tensors["control_latents"].shape == tensors["latents"].shape
    # The same clip with other noise.
    own, others = distance(tensors["control_latents"], tensors["latents"]), found.get(1).tensors["latents"]
    assert 0 < own < 0.5 * distance(tensors["control_latents"], others)


def test_masks_become_a_column_down_to_latent_cells(dataset, tmp_path):
    """A picture for all frames, or one for each; of what lies in a cell, how much is white."""
    folder = tmp_path / "masks"
    folder.mkdir()
    left = Image.new("L", (64, 64), 0)
    left.paste(255, (0, 0, 20, 64))
    left.save(folder / "clip_00000.png")
    (folder / "clip_00001").mkdir()
    for i in range(9):
        Image.new("L", (64, 64), 255 if i in (0, 5, 6, 7) else 0).save(folder / "clip_00001" / f"{i:02d}.png")
    dataset.write_text(dataset.read_text() + f"mask_directory = '{folder}'\n")
    found = run(dataset, tmp_path / "out", "columns=[latents,mask,text]")
    assert len(found) == 2 and "has no mask in" in reasons(tmp_path / "out")[0]
    masks = [found.get(i).tensors["mask"] for i in range(2)]
    still, moving = sorted(masks, key=lambda mask: -mask[0, 0].float().std())
    assert still.shape == (1, 3, 8, 8) and still.dtype == torch.bfloat16
    row = torch.tensor([1, 1, 0.5, 0, 0, 0, 0, 0])
    torch.testing.assert_close(still.float(), row.expand(1, 3, 8, 8), atol=0.05, rtol=0)
    torch.testing.assert_close(moving[0, :, 4, 4].float(), torch.tensor([1, 0, 0.75]), atol=0.05, rtol=0)
    assert next(iter(BatchLoader(found, batch_size=2))).tensors["mask"].shape == (2, 1, 3, 8, 8)
    (picture,) = Masks(4, 8, 8)(torch.full((1, 1, 16, 24, 3), 255, dtype=torch.uint8), [])
    assert picture["mask"].tolist() == [[[[1.0] * 3] * 2]]  # of an image, one frame
    plain = run(dataset, tmp_path / "out", "columns=[latents,text]")  # what is there stays
    assert "mask" in plain.get(0).tensors
