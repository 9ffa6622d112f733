"""KL-VAE: pixels to latents and back (Kingma & Welling 2014, arXiv:1312.6114; as the first stage
of latent diffusion, Rombach et al. 2022, arXiv:2112.10752). Any number of stains.

Three spaces: the image x in [-1, 1]; the raw latent, a Gaussian posterior with mean and log
variance; the latent z, a sample of the posterior standardised per channel by statistics measured
on the training data. `to_latent` and `to_image` are the only door between pixels and diffusion.

    python vae.py      # learns blobs: L1 beside a baseline's, KL per channel
"""
import argparse
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class VAEConfig:
    channels: int = 5         # stains in, stains out
    latent_channels: int = 4  # Z
    downsampling: int = 4     # image side / latent side, a power of two
    fold: int = 2             # the stem folds fold x fold pixels into channels: cheap, no loss
    width: int = 64           # channels of the finest level; doubled at each coarser one, to 4x
    blocks: int = 2           # residual blocks per level
    pixels: bool = False      # no network: latents are the pixels, folded into channels
    # 512x512x5 images: downsampling=8, latent_channels=8 makes latents of 64x64x8

    def widths(self):
        """Channels of each level, finest first."""
        if self.width % 8:
            raise ValueError(f"width {self.width} is no multiple of 8")
        levels = (self.downsampling // self.fold).bit_length()
        if not levels or self.fold * 2 ** (levels - 1) != self.downsampling:
            raise ValueError(f"downsampling {self.downsampling} is not fold {self.fold} times a "
                             "power of two")
        return [self.width * min(2 ** i, 4) for i in range(levels)]


def norm(channels):
    return nn.GroupNorm(channels // 8, channels)  # groups of eight channels


class ResidualBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Encoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        widths = c.widths()
        self.fold = nn.PixelUnshuffle(c.fold)
        self.stem = nn.Conv2d(c.channels * c.fold ** 2, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for i, w in enumerate(widths):
            level = [ResidualBlock(w, w) for _ in range(c.blocks)]
            if i + 1 < len(widths):
                level.append(nn.Conv2d(w, widths[i + 1], 3, stride=2, padding=1))
            self.levels.append(nn.Sequential(*level))
        self.out = nn.Sequential(norm(widths[-1]), nn.SiLU(),
                                 nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1))

    def forward(self, x):                           # (B, C, H, W)           in [-1, 1]
        h = self.stem(self.fold(x))                 # (B, width, H/fold, W/fold)
        for level in self.levels:
            h = level(h)                            # (B, widths[i], ...)    half the side each
        return self.out(h)                          # (B, 2Z, H/f, W/f)      mean and log variance


class Decoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        widths = c.widths()[::-1]
        self.stem = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for i, w in enumerate(widths):
            level = [ResidualBlock(w, w) for _ in range(c.blocks)]
            if i + 1 < len(widths):
                level += [nn.Upsample(scale_factor=2), nn.Conv2d(w, widths[i + 1], 3, padding=1)]
            self.levels.append(nn.Sequential(*level))
        self.out = nn.Sequential(norm(widths[-1]), nn.SiLU(),
                                 nn.Conv2d(widths[-1], c.channels * c.fold ** 2, 3, padding=1))
        self.unfold = nn.PixelShuffle(c.fold)

    def forward(self, z):                           # (B, Z, H/f, W/f)
        h = self.stem(z)
        for level in self.levels:
            h = level(h)
        return self.unfold(self.out(h))             # (B, C, H, W)


class FoldedPixels(nn.Module):
    """The encoder that does nothing: diffusion in pixel space, on the grid of the latents."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        self.fold = nn.PixelUnshuffle(c.downsampling)

    def forward(self, x):                           # (B, C, H, W)
        z = self.fold(x)                            # (B, C f f, H/f, W/f)
        return torch.cat([z, torch.full_like(z, -20.)], 1)   # mean, and no variance


class VAE(nn.Module):
    """x (B, C, H, W) in [-1, 1], H and W multiples of `downsampling`, to latents (B, Z, h, w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        if config.pixels:
            self.encoder, self.decoder = FoldedPixels(config), nn.PixelShuffle(config.downsampling)
        else:
            self.encoder, self.decoder = Encoder(config), Decoder(config)
        # statistics of sampled raw latents over the training data: no magic 0.18215
        self.register_buffer("latent_mean", torch.zeros(1, config.latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(1, config.latent_channels, 1, 1))
        if not (torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bf16")):
            self.to(memory_format=torch.channels_last)  # as in unet.py

    def encode(self, x):
        """The posterior of the raw latent: mean and log variance, (B, Z, h, w) each."""
        (_, c, h, w), f = x.shape, self.config.downsampling
        assert c == self.config.channels and h % f == 0 and w % f == 0, tuple(x.shape)
        mean, logvar = self.encoder(x).float().chunk(2, dim=1)
        return mean, logvar.clamp(-20, 10)

    def forward(self, x, noise=None):
        """Reconstruct: (x_hat, mean, logvar). `noise`, like the mean, draws the latent."""
        mean, logvar = self.encode(x)
        noise = torch.randn_like(mean) if noise is None else noise
        return self.decoder(mean + (logvar / 2).exp() * noise).float(), mean, logvar

    def standardise(self, mean, logvar, noise):
        """A sample of the posterior as latent z, about zero mean and unit variance per channel."""
        return (mean + (logvar / 2).exp() * noise - self.latent_mean) / self.latent_std

    def to_latent(self, x, noise=None):
        """Image (B, C, H, W) to latent z (B, Z, h, w). Without `noise`: the posterior's mean."""
        return self.standardise(*self.encode(x), 0. if noise is None else noise)

    def to_image(self, z):
        """Latent z (B, Z, h, w) to image (B, C, H, W), clamped to [-1, 1]."""
        return self.decoder(z * self.latent_std + self.latent_mean).float().clamp(-1, 1)


def kl_divergence(mean, logvar):
    """KL(N(mean, exp logvar) || N(0, 1)) in nats per image, (B,): Kingma & Welling, appendix B."""
    return 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def spectral_distance(x, x_hat):
    """Mean difference of the *sizes* of the Fourier coefficients of (B, C, H, W), orthonormal: asks
    for as much texture at each frequency as there is, wherever it lies."""
    return (torch.fft.rfft2(x, norm="ortho").abs()
            - torch.fft.rfft2(x_hat, norm="ortho").abs()).abs().mean()


def vae_loss(x, x_hat, mean, logvar, kl_weight, spectral_weight=0.):
    """L1 plus the weighted KL, both per pixel value, so that a weight means the same at any size,
    plus the weighted spectral distance. Returns the scalars (loss, l1 on
    [-1, 1], kl in nats per image)."""
    l1 = (x - x_hat).abs().mean()
    kl = kl_divergence(mean, logvar).mean()
    loss = l1 + kl_weight * kl / x[0].numel() + spectral_weight * spectral_distance(x, x_hat)
    return loss, l1, kl


# --- a small autoencoder of blobs, to be seen -----------------------------------------------------

def blobs(n, side=32, cells=4):
    """Toy images (n, 5, side, side) in [-1, 1]: four round cells, in each stain of another width
    and brightness. Twenty-eight numbers say all there is in one."""
    width = torch.tensor([1.2, 3., 2., 4., 2.])[:, None, None, None]
    centre, light = torch.rand(n, 1, cells, 2) * side, .3 + .7 * torch.rand(n, 5, cells, 1, 1)
    grid = torch.cartesian_prod(*[torch.arange(float(side))] * 2).reshape(side, side, 2)
    distance2 = (grid - centre[:, :, :, None, None]).square().sum(-1)    # (n, 1, cells, side, side)
    return (light * torch.exp(-distance2 / (2 * width ** 2))).sum(2).clamp(0, 1) * 2 - 1


def shrunk(x, numbers):
    """The baseline of the same compression: area downsampling of (B, C, H, W) to the square that
    comes nearest to `numbers` values an image, then bicubic upsampling."""
    small = F.interpolate(x, round((numbers / x.shape[1]) ** .5), mode="area")
    return F.interpolate(small, x.shape[2:], mode="bicubic").clamp(-1, 1)


def train_on_blobs(kl_weight, test, steps):
    """Train a small autoencoder; print its L1 on the images `test` and each channel's KL."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latent_channels=2, width=16, blocks=1))
    optimiser = torch.optim.Adam(vae.parameters(), 2e-3)
    for step in range(steps + 1):
        if step in (0, steps // 3, steps):
            with torch.no_grad():
                x_hat, mean, logvar = vae(test, torch.zeros(len(test), 2, 8, 8))
            kl = ", ".join(f"{kl_divergence(mean[:, c], logvar[:, c]).mean():.0f}" for c in (0, 1))
            l1 = (x_hat.clamp(-1, 1) - test).abs().mean()
            print(f"KL weight {kl_weight:4g}, step {step:3d}: L1 {l1:.4f}, KL by channel {kl} nats")
        x = blobs(8)
        loss, _, _ = vae_loss(x, *vae(x), kl_weight)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def show(steps=300):
    """Blobs through the baseline and through autoencoders of two KL weights."""
    torch.manual_seed(1)
    test = blobs(32)
    print("5 x 32 x 32 pixels to 2 x 8 x 8 numbers, 40 to 1; made small and large again: L1 "
          f"{(shrunk(test, 128) - test).abs().mean():.4f}")
    for kl_weight in (.01, 3.):
        train_on_blobs(kl_weight, test, steps)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    show()
