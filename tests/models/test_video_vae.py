"""The class around a library's VAE: what it does to latents, whatever the architecture."""

import torch

from hvtrain.models.video_vae import VideoVae


class Doubling(torch.nn.Module):
    """A VAE of two channels without compression: latents are twice the first two colours."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def encode(self, video):
        mean = video[:, :2] * self.weight
        return mean, torch.full_like(mean, 0.5)

    def decode(self, z):
        return torch.cat([z, z[:, :1]], 1) / self.weight


def test_each_channel_has_its_own_scale_and_shift():
    scale, shift = torch.tensor([2.0, 4.0]).view(2, 1, 1, 1), torch.tensor([0.5, -0.5]).view(2, 1, 1, 1)
    model = Doubling()
    vae = VideoVae(model, model.encode, model.decode, channels=2, stride=(1, 1, 1), scale=scale, shift=shift)
    video = torch.full((1, 3, 1, 2, 2), 0.25)
    latents = vae.encode(video)
    assert latents[0, :, 0, 0, 0].tolist() == [0.0, 4.0]  # (2 * 0.25 - shift) * scale
    assert torch.equal(vae.decode(latents), video)
    drawn = vae.encode(video, generator=[torch.Generator().manual_seed(3)])
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn[0], (0.5 + 0.5 * noise - shift) * scale)
    assert vae.decode(latents * 100).max() == 1 < vae.decode(latents * 100, clamp=False).max()
    always = VideoVae(
        model, lambda video: (model.encode(video)[0], None), model.decode, channels=2, stride=(1, 1, 1),
        scale=1.0
    )
    assert torch.equal(always.encode(video, generator=torch.Generator().manual_seed(3)), always.encode(video))
