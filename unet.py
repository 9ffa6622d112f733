"""The U-Net that predicts the diffusion target from a noisy latent, the timestep, a condition
vector and molecule tokens (Ho et al. 2020; Dhariwal & Nichol 2021, arXiv:2105.05233).

Split in `encode`, which returns the skips, and `decode`, which takes residuals to add to them:
that seam is where the ControlNet (Zhang et al. 2023, arXiv:2302.05543) enters.

    python unet.py      # sizes; shapes and parameters layer by layer; what a ControlNet adds
"""
import argparse
import copy
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class UNetConfig:
    latent_channels: int = 4          # Z
    width: int = 64                   # channels of the finest level
    multipliers: tuple = (1, 2)       # width of each level; the side halves from one to the next
    blocks: int = 2                   # residual blocks per level
    attention: tuple = (False, True)  # self- and cross-attention at this level?
    head: int = 32                    # channels per attention head
    embedding: int = 256              # E: timestep and condition vector
    token: int = 128                  # D: molecule tokens


# One dial for size (parameters with four latent channels). `small` is for 16x16 latents on a CPU,
# `base` and `large` want a GPU and latents of 32 to 64 pixels.
SIZES = {
    "tiny": UNetConfig(width=16, blocks=1, head=16, embedding=64, token=32),             # 0.2 M
    "small": UNetConfig(multipliers=(1, 2, 2), attention=(False, True, True), blocks=1),  # 5.3 M
    "base": UNetConfig(width=128, multipliers=(1, 2, 3, 4), attention=(False, False, True, True),
                       head=64, embedding=512, token=256),                               # 97 M
    "large": UNetConfig(width=192, multipliers=(1, 2, 3, 4), attention=(False, False, True, True),
                        blocks=3, head=64, embedding=768, token=384),                    # 289 M
}


def unet_config(size, latent_channels):
    return replace(SIZES[size], latent_channels=latent_channels)


def sinusoid(t):
    """Position in [0, 1000] to (B, 256), cosines first (Vaswani et al. 2017, arXiv:1706.03762)."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)


def norm(channels):
    return nn.GroupNorm(channels // 8, channels)  # groups of eight channels


class ResidualBlock(nn.Module):
    """Two convolutions; the embedding scales and shifts between them."""

    def __init__(self, cin, cout, embedding):
        super().__init__()
        self.norm1, self.conv1 = norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * cout)
        self.norm2, self.conv2 = norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, h, emb):                                           # (B, cin, h, w), (B, E)
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
        r = self.conv1(F.silu(self.norm1(h)))                            # (B, cout, h, w)
        r = self.conv2(F.silu(self.norm2(r) * (1 + scale) + shift))
        return self.skip(h) + r


class Attention(nn.Module):
    """Pixels attend to each other, then to the molecule tokens (as in Rombach et al. 2022)."""

    def __init__(self, channels, head, token):
        super().__init__()
        self.heads = max(1, channels // head)
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.qkv, self.out1 = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.q = nn.Linear(channels, channels)
        self.kv, self.out2 = nn.Linear(token, 2 * channels), nn.Linear(channels, channels)

    def attend(self, q, k, v, mask=None):                                # (B, N, C)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        if q.is_cuda or not torch.is_grad_enabled():
            out = F.scaled_dot_product_attention(q, k, v, mask)
        else:  # the same in plain words, whose backward pass is faster on a CPU
            scores = q @ k.mT * q.shape[-1] ** -.5                       # (B, heads, N, L)
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            out = scores.softmax(-1).to(v.dtype) @ v
        return out.transpose(1, 2).flatten(2)

    def forward(self, h, tokens, mask):                                  # (B, C, h, w), (B, L, D)
        shape = h.shape
        x = h.flatten(2).transpose(1, 2)                                 # (B, hw, C)
        n = self.norm1(h).flatten(2).transpose(1, 2)
        x = x + self.out1(self.attend(*self.qkv(n).chunk(3, dim=2)))
        n = self.norm2(x.transpose(1, 2).reshape(shape)).flatten(2).transpose(1, 2)
        x = x + self.out2(self.attend(self.q(n), *self.kv(tokens).chunk(2, dim=2),
                                      mask[:, None, None, :]))
        return x.transpose(1, 2).reshape(shape)


class Stage(nn.Module):
    """A residual block, with attention where the level has it."""

    def __init__(self, cin, cout, attention, c: UNetConfig):
        super().__init__()
        self.block = ResidualBlock(cin, cout, c.embedding)
        self.attention = Attention(cout, c.head, c.token) if attention else None

    def forward(self, h, emb, tokens, mask):
        h = self.block(h, emb)
        return h if self.attention is None else self.attention(h, tokens, mask)


class UNet(nn.Module):
    """z (B, Z, h, w), t (B,) in 0 .. 999, vector (B, E), tokens (B, L, D), mask (B, L) true where
    a token counts (at least one in each row), to the target (B, Z, h, w). The sides h and w are
    multiples of 2^(levels - 1)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        c = self.config = config
        widths = [c.width * m for m in c.multipliers]
        self.time = nn.Sequential(nn.Linear(256, c.embedding), nn.SiLU(),
                                  nn.Linear(c.embedding, c.embedding))
        self.stem = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)

        # down: every output is kept as a skip, the stem's and the downsamplings' included
        self.down, channels = nn.ModuleList(), [widths[0]]
        for i, w in enumerate(widths):
            for _ in range(c.blocks):
                self.down.append(Stage(channels[-1], w, c.attention[i], c))
                channels.append(w)
            if i + 1 < len(widths):
                self.down.append(nn.Conv2d(w, w, 3, stride=2, padding=1))
                channels.append(w)
        w = widths[-1]
        self.skip_widths = [*channels, w]  # and of the middle: where a ControlNet adds
        self.middle = nn.ModuleList([Stage(w, w, True, c), Stage(w, w, False, c)])

        # up: one stage more per level, so that each takes one skip
        self.up = nn.ModuleList()
        for i, level in reversed(list(enumerate(widths))):
            for _ in range(c.blocks + 1):
                self.up.append(Stage(w + channels.pop(), level, c.attention[i], c))
                w = level
            if i > 0:
                # to the width of the next level before enlarging: a quarter of the work
                self.up.append(nn.Sequential(nn.Conv2d(w, widths[i - 1], 3, padding=1),
                                             nn.Upsample(scale_factor=2)))
                w = widths[i - 1]
        self.out = nn.Sequential(norm(w), nn.SiLU(), nn.Conv2d(w, c.latent_channels, 3, padding=1))
        self.initialise()
        if not (torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bf16")):
            # on CPU float32 convolutions run faster on channels-last weights, bfloat16 ones slower
            self.to(memory_format=torch.channels_last)

    def initialise(self):
        """Every residual branch starts at zero, and so does the output: the first loss is 1.00."""
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                zero(module.conv2)
            if isinstance(module, Attention):
                zero(module.out1), zero(module.out2)
        zero(self.out[2])

    def embed(self, t, vector):  # activated here, once for all blocks
        return F.silu(self.time(sinusoid(t)) + vector)                   # (B, E)

    def encode(self, z, emb, tokens, mask, hint=0.):
        """The way down: (h, skips). hint: what a ControlNet adds behind the stem."""
        assert z.shape[1] == self.config.latent_channels, tuple(z.shape)
        h = self.stem(z) + hint                                   # (B, width, h, w)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb, tokens, mask) if isinstance(layer, Stage) else layer(h)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, emb, tokens, mask)
        return h, skips

    def decode(self, h, skips, emb, tokens, mask, residuals=None):
        """The way up. residuals: one tensor to add to each skip, and one more for h."""
        if residuals is not None:
            h = h + residuals[-1]
            skips = [s + r for s, r in zip(skips, residuals[:-1], strict=True)]
        skips = iter(reversed(skips))
        for layer in self.up:
            h = (layer(torch.cat([h, next(skips)], 1), emb, tokens, mask)
                 if isinstance(layer, Stage) else layer(h))
        return self.out(h)                                               # (B, Z, h, w)

    def forward(self, z, t, vector, tokens, mask, residuals=None):
        emb = self.embed(t, vector)
        h, skips = self.encode(z, emb, tokens, mask)
        return self.decode(h, skips, emb, tokens, mask, residuals).float()


def zero(module):
    """The same layer, saying nothing until it is trained."""
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


class HintStem(nn.Module):
    """Images (B, C, H, W) to features (B, width, H/d, W/d), d the `downsampling`, a power of two:
    two convolutions at each size, twice the channels at half the side, a zero convolution last."""

    def __init__(self, channels, width, downsampling):
        super().__init__()
        w = min(32, width)
        layers = [nn.Conv2d(channels, w, 3, padding=1)]
        for _ in range(downsampling.bit_length() - 1):
            wide = min(2 * w, width)
            layers += [norm(w), nn.SiLU(), nn.Conv2d(w, wide, 3, stride=2, padding=1),
                       norm(wide), nn.SiLU(), nn.Conv2d(wide, wide, 3, padding=1)]
            w = wide
        self.layers = nn.Sequential(*layers, norm(w), nn.SiLU())
        self.out = zero(nn.Conv2d(w, width, 1))

    def forward(self, images):
        return self.out(self.layers(images))


class ControlNet(nn.Module):
    """A trainable copy of a trained U-Net's way down that looks at a conditioning image, the hint,
    of any number of channels and a side of `downsampling` times the latent's.

    Its residuals, each through a zero convolution, are added by `UNet.decode` to the skips and to
    the middle: at step 0 they are exactly 0 and the U-Net draws what it always drew. In the first
    step only these convolutions and the last layer of the style learn (their input is not 0); in
    the second the copy and the last layer of the stem; from the third on all of it. The hint's own
    metadata (which plate, which well) arrive as a second vector, through a zero layer of its own.

    Residuals say what is where. How bright, contrasty and sharp the hint is as a whole (what gain,
    background and focus of a plate change), its `style`, group norms take out of them: it is added
    to the condition vector of the U-Net.
    """

    def __init__(self, unet, channels, downsampling):
        super().__init__()
        c = unet.config
        self.encoder_copy = copy.deepcopy(unet).requires_grad_(True)
        del self.encoder_copy.up, self.encoder_copy.out
        self.stem = HintStem(channels, c.width, downsampling)
        self.metadata = zero(nn.Linear(c.embedding, c.embedding))
        self.style_mlp = nn.Sequential(nn.Linear(3 * channels, c.embedding), nn.SiLU(),
                                       zero(nn.Linear(c.embedding, c.embedding)))
        self.zero_convolutions = nn.ModuleList(zero(nn.Conv2d(w, w, 1))
                                               for w in unet.skip_widths)

    def style(self, hint_images):
        """(B, E), to be added to the condition vector, exactly 0 at step 0: from the brightness,
        contrast and sharpness of each channel of images (B, C, H, W) in [-1, 1], as logarithms."""
        x = (hint_images + 1) / 2
        levels = x.mean((2, 3)), x.std((2, 3)), x.diff(dim=3).abs().mean((2, 3))  # (B, C) each
        return self.style_mlp(torch.cat(levels, 1).add(.01).log())

    def residuals(self, z, t, vector, tokens, mask, features, hint_vector):
        """One for each skip and one for the middle. As UNet.forward, with the features
        `stem(hint_images)`, which stay the same while an image is sampled, and hint_vector (B, E),
        the condition vector of the hint's metadata."""
        emb = self.encoder_copy.embed(t, vector + self.metadata(hint_vector))
        h, skips = self.encoder_copy.encode(z, emb, tokens, mask, features)
        return [layer(x) for layer, x in zip(self.zero_convolutions, [*skips, h], strict=True)]


class Denoiser(nn.Module):
    """The U-Net, the conditioner of its fields and, where there is one, the ControlNet: what is
    trained, averaged (EMA) and saved together."""

    def __init__(self, unet, conditioner, controlnet=None):
        super().__init__()
        self.unet, self.conditioner, self.controlnet = unet, conditioner, controlnet

    def forward(self, z, t, codes, keep, molecules, hint=None):
        """z (B, Z, h, w), t (B,) and what Conditioner.forward takes to the target (B, Z, h, w).
        hint: (images (B, C, H, W) in [-1, 1], codes and known of their own metadata, shown (B,)
        float: 1, or 0 where the U-Net is to draw without it)."""
        (vector, tokens, mask), residuals = self.conditioner(codes, keep, molecules), None
        if hint is not None:
            images, hint_codes, hint_known, shown = hint
            hint_vector, _, _ = self.conditioner(hint_codes, hint_known, molecules)
            vector = vector + self.controlnet.style(images) * shown[:, None]
            residuals = self.controlnet.residuals(z, t, vector, tokens, mask,
                                                  self.controlnet.stem(images), hint_vector)
            residuals = [r * shown[:, None, None, None] for r in residuals]
        return self.unet(z, t, vector, tokens, mask, residuals)


# --- the shapes and parameters, to be seen --------------------------------------------------------

def parameters(module):
    return sum(p.numel() for p in module.parameters())


def print_layers(unet):
    """Have each layer print its output's shape and its parameters when it is run."""
    def tell(name, layer, out):
        attends = "  attention" if getattr(layer, "attention", None) else ""
        print(f"  {name:7s}{str(tuple(out.shape[1:])):15s}{parameters(layer):10,d} "
              f"{parameters(layer) / parameters(unet):6.1%}{attends}")
    for name, part in unet.named_children():
        for layer in part if isinstance(part, nn.ModuleList) else [part]:
            layer.register_forward_hook(lambda layer, _, out, name=name: tell(name, layer, out))


def show():
    """Sizes; the small network layer by layer; what it says at step 0; what a ControlNet adds."""
    for size, config in SIZES.items():
        with torch.device("meta"):  # counted without being filled
            print(f"{size:6s}{parameters(UNet(config)) / 1e6:8.2f} M parameters")
    torch.manual_seed(0)
    c = SIZES["small"]
    unet, target = UNet(c), torch.randn(32, 4, 16, 16)
    control = ControlNet(unet, channels=1, downsampling=4)
    inputs = [torch.randn(32, 4, 16, 16), torch.arange(32), torch.randn(32, c.embedding),
              torch.randn(32, 3, c.token), torch.ones(32, 3, dtype=torch.bool)]
    print("\nsmall, layer by layer: output (channels, height, width), parameters and their share")
    print_layers(unet)
    out = unet(*inputs)
    print(f"at step 0 it says {out.abs().max():.0f} everywhere: the loss against a target of unit "
          f"variance is {(out - target).square().mean():.2f}")
    residuals = control.residuals(*inputs, control.stem(torch.randn(32, 1, 64, 64)), inputs[2])
    print(f"\na ControlNet adds {parameters(control) / 1e6:.2f} M parameters; its {len(residuals)} "
          f"residuals are {max(r.abs().max() for r in residuals):.0f} at step 0: nothing changes")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    show()
