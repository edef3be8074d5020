"""The demo model's autoencoder: 3 x H x W pictures to 4 x H/8 x W/8 latents and back.

A linear path carries the picture's coarse colours (its weights start as the principal components of 8 x 8 patches),
a convolutional path beside it adds what is finer. Nothing is normalised inside, since normalising a flat picture
would throw its colour away. It has no random part: the latent is what a KL autoencoder would call the mean.
"""

import torch
from torch import nn
from torch.nn import functional as F

FACTOR = 8
LATENT_SCALE = 0.18215  # the host multiplies SD1 latents by this before the UNet, so that their deviation is near 1


class _Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Autoencoder(nn.Module):
    """Pictures are (B, 3, H, W) in -1..1 with H and W multiples of 8; latents are (B, 4, H/8, W/8)."""

    def __init__(self, channels=4, width=128, fine=64):
        super().__init__()
        self.linear_in = nn.Conv2d(3 * FACTOR**2, channels, 1)
        self.linear_out = nn.Conv2d(channels, 3 * FACTOR**2, 1)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), nn.Conv2d(48, fine, 3, padding=1), _Residual(fine),
            nn.Conv2d(fine, width, 2, stride=2), _Residual(width), _Residual(width), nn.SiLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), _Residual(width), _Residual(width), _Residual(width),
            nn.Conv2d(width, 4 * fine, 1), nn.PixelShuffle(2), _Residual(fine), _Residual(fine), nn.SiLU(),
            nn.Conv2d(fine, 48, 3, padding=1), nn.PixelShuffle(4),
        )  # fmt: skip
        nn.init.zeros_(self.encoder[-1].weight)
        nn.init.zeros_(self.decoder[-2].weight)
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def start_from_patches(self, pictures):
        """Sets the linear path to the whitened principal components of (B, 3, H, W) pictures."""
        patches = F.pixel_unshuffle(pictures, FACTOR).movedim(1, -1).flatten(0, -2).double()
        mean = patches.mean(0)
        variance, basis = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        channels = self.linear_in.out_channels
        basis, deviation = basis[:, -channels:].flip(1), variance[-channels:].flip(0).sqrt()
        with torch.no_grad():
            self.linear_in.weight.copy_((basis / deviation).T[..., None, None])
            self.linear_in.bias.copy_(-(mean @ (basis / deviation)))
            self.linear_out.weight.copy_((basis * deviation)[..., None, None])
            self.linear_out.bias.copy_(mean)

    def set_statistics(self, latents):
        """Fixes the shift and scale so that latents come out with mean 0 and deviation 1/LATENT_SCALE a channel."""
        self.mean.copy_(latents.mean((0, 2, 3), keepdim=True))
        self.std.copy_(latents.std((0, 2, 3), keepdim=True))

    def encode_plain(self, x):
        return self.linear_in(F.pixel_unshuffle(x, FACTOR)) + self.encoder(x)

    def decode_plain(self, z):
        return F.pixel_shuffle(self.linear_out(z), FACTOR) + self.decoder(z)

    def encode(self, x):
        return (self.encode_plain(x) - self.mean) / (self.std * LATENT_SCALE)

    def decode(self, z, **_):
        return self.decode_plain(z * (self.std * LATENT_SCALE) + self.mean)
