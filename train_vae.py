"""Train the autoencoder (vae.py): pixels to latents. Also home of what every script needs:
settings from the command line, the device, checkpoints, and how a user's mistake is reported.

    python train_vae.py                                   # the simulated screen
    python train_vae.py --data plates/index.csv --binning 2 --crop 64 --out runs/plates_vae
    python train_vae.py --pixels --out runs/pixels_vae    # none: the baseline that needs no latents
"""
import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import os
import pickle
import re
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import conditioning
import data
from vae import VAE, VAEConfig, kl_divergence, vae_loss


# the poster's size: pieces of 512x512 pixels, to 64x64x8 or 128x128x1 numbers
PRESETS = {"64x64x8": dict(crop=512, downsampling=8, latent_channels=8, width=64, batch=4),
           "128x128x1": dict(crop=512, downsampling=4, latent_channels=1, width=64, batch=4)}


@dataclass
class Config:
    preset: str = ""                      # 64x64x8 or 128x128x1: settings for 512-pixel crops
    # data: what counts as an image. train_ldm.py reads these from the autoencoder's checkpoint
    data: str = "runs/data/manifest.csv"  # the manifest; the default one is drawn if it is missing
    channels: str = "DNA,ER,RNA,AGP,Mito"  # stains: the manifest's columns, or the order in a file
    intensity: str = "percentile"         # to [-1, 1]: percentile, dtype, or a range as 0:4095
    binning: int = 1                      # average this many pixels each way
    crop: int = 0                         # side of a random crop, 0 for the whole image
    flips: bool = True                    # mirror and turn at random (erases light from one side)
    split: str = "auto"                   # held out: auto, image, smiles, a column, a+b, a=value
    holdout: float = 0.1                  # share of the groups held out where the split draws them
    # model
    latent_channels: int = 4              # numbers per latent pixel
    downsampling: int = 4                 # image side / latent side
    fold: int = 2                         # pixels folded into channels by the stem
    width: int = 32                       # channels at the finest level
    blocks: int = 2                       # residual blocks per level
    pixels: bool = False                  # no autoencoder: diffusion in pixels on the latents' grid
    kl_weight: float = 1e-2               # weight of the KL, both terms per pixel value
    spectral_weight: float = 0.           # of the difference of Fourier amplitudes
    multiscale_weight: float = 0.         # of the L1 between bands of a Laplacian pyramid
    # training
    out: str = "runs/vae"                 # model.pt, reconstruction.png and log.jsonl go here
    steps: int = 4200                     # optimiser steps
    batch: int = 8                        # images per step
    lr: float = 2e-3                      # peak learning rate, after warm-up, before decay
    seed: int = 0                         # of weights, order and noise
    eval_every: int = 500                 # steps between looks at held-out images
    overwrite: bool = False               # train again where model.pt exists


# --- settings, errors, device -------------------------------------------------------------------

class UserError(ValueError):
    """A setting or a checkpoint that cannot be used."""


USER_ERRORS = (data.DataError, conditioning.FieldError, UserError)


def run(main):
    """Call main(); a user's mistake becomes one line per fault and exit status 2."""
    try:
        main()
    except USER_ERRORS as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except OSError as fault:  # no space left, a folder that is a file, no permission
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def add_settings(parser, config):
    """One option per setting of a Config; the comment beside each is its help."""
    notes = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(config), re.M))
    for setting in dataclasses.fields(config):
        text = f"{notes[setting.name]} (default: {setting.default})".replace("%", "%%")
        if setting.type is bool:
            parser.add_argument(f"--{setting.name}", default=setting.default, help=text,
                                action=argparse.BooleanOptionalAction)
        elif setting.type is tuple:
            parser.add_argument(f"--{setting.name}", nargs="*", default=setting.default, help=text)
        else:
            parser.add_argument(f"--{setting.name}", type=setting.type, default=setting.default,
                                help=text)


def settings(config, argv=None):
    """Command line to Config: a wrong name or type ends with a message and exit status 2."""
    module = sys.modules[config.__module__].__doc__
    parser = data.Parser(description=module, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser, config)
    values = vars(parser.parse_args(argv))
    if values.get("preset"):  # other defaults; what is stated beside it wins
        if values["preset"] not in PRESETS:
            parser.error(f"--preset {values['preset']}: one of {', '.join(PRESETS)}")
        parser.set_defaults(**PRESETS[values["preset"]])
        values = vars(parser.parse_args(argv))
    for setting in dataclasses.fields(config):
        least = min(1, setting.default) if setting.type is int else 0
        if setting.type in (int, float) and values[setting.name] < least:
            parser.error(f"--{setting.name} must be at least {least}")
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bf16():
    """bfloat16 pays where the hardware multiplies it; elsewhere it is emulated and slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def autocast():
    """bf16 for matrix products and convolutions where that pays, float32 elsewhere."""
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    return torch.autocast(device().type, torch.bfloat16) if has_bf16() else contextlib.nullcontext()


def step_rng(seed, step):
    """All randomness of one training step, from its number alone: a resumed run needs no state.
    Returns a numpy generator for the data and a torch generator for the noise."""
    rng = np.random.default_rng([seed, step])
    return rng, torch.Generator().manual_seed(int(rng.integers(2 ** 62)))


def learning_rate(step, steps, peak, warmup=100):
    """Linear warm-up, then a cosine to a hundredth."""
    decay = .505 + .495 * math.cos(math.pi * step / steps)
    return peak * min(1., (step + 1) / min(warmup, max(1, steps // 5))) * decay


# --- checkpoints --------------------------------------------------------------------------------

def save_checkpoint(path, kind, content):
    """Write {"kind": kind, ...}, under a temporary name first: interrupted, it loses nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"kind": kind, **content}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path, kind, hint):
    """Read a checkpoint; nothing in it is executed (weights_only). kind: vae or ldm."""
    if not Path(path).is_file():
        raise UserError(f"no {kind} checkpoint at {path}: {hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError,
            IndexError, AttributeError, zipfile.BadZipFile) as fault:
        reason = ("not a file of torch.save, or damaged" if not zipfile.is_zipfile(path) else
                  "it holds code, which is never run" if "nsupported" in str(fault) else "damaged")
        raise UserError(f"{path} is no nanopaint checkpoint ({reason})") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        found = content.get("kind") if isinstance(content, dict) else None
        raise UserError(f"{path} is a checkpoint of another kind ({found}), not {kind}: {hint}")
    return content


def load_vae(path):
    """A trained VAE, ready to use, and its checkpoint."""
    content = load_checkpoint(path, "vae", "run python train_vae.py")
    return build_vae(content).to(device()), content


def build_vae(content):
    vae = VAE(VAEConfig(**content["config"]))
    vae.load_state_dict(content["weights"])
    return vae.eval().requires_grad_(False)


def write_log(path, **values):
    """Append one line of JSON."""
    with open(path, "a") as file:
        file.write(json.dumps(values) + "\n")


# --- data ---------------------------------------------------------------------------------------

def open_data(config, draw=True):
    """The manifest and its pixels as a config (or a checkpoint's settings) says.

    Returns (manifest, pixels, training rows, held-out rows).
    """
    if draw and config.data == Config.data and not Path(config.data).exists():
        print("no data yet: drawing a simulated screen")
        data.simulate(Path(config.data).parent)
    manifest = data.read_manifest(config.data, tuple(config.channels.split(",")))
    if not config.crop and len(manifest.sizes) > 1:
        (a, where_a), (b, where_b) = list(manifest.sizes.items())[:2]
        raise data.DataError(f"{manifest.path} has images of different sizes ({where_a} is "
                             f"{a[1]}x{a[0]}, {where_b} is {b[1]}x{b[0]}): cut equal pieces with "
                             "--crop")
    for (h, w), where in manifest.sizes.items():
        side = config.crop or min(h, w) // config.binning
        if side > min(h, w) // config.binning or side < 1:
            raise data.DataError(f"{manifest.path}, {where}: {w}x{h} pixels binned "
                                 f"{config.binning}x are smaller than --crop {config.crop}")
        for length in (config.crop,) if config.crop else (h // config.binning, w // config.binning):
            if length % config.downsampling:
                raise data.DataError(f"{manifest.path}, {where}: a side of {length} pixels is no "
                                     f"multiple of {config.downsampling}: use --crop")
    train, held = data.split_rows(manifest, config.split, config.holdout)
    if not len(held):
        raise data.DataError(f"{manifest.path}: --split {config.split} holds out no row")
    return manifest, data.Pixels(manifest, config.binning), train, held


def views(pixels, rows, config, intensity, rng=None):
    """Rows as a batch (B, C, H, W) in [-1, 1]: random views, or the middle ones without rng."""
    return torch.from_numpy(np.stack([data.scale_intensity(
        data.take_view(pixels[i], config.crop, rng, config.flips), intensity) for i in rows]))


# --- training -----------------------------------------------------------------------------------

def measure_latents(vae, batches):
    """Mean and standard deviation per channel of posterior *samples*, written into the VAE."""
    samples = []
    for x in batches:
        mean, logvar = vae.encode(x.to(device()))
        samples.append((mean + (logvar / 2).exp() * torch.randn_like(mean)).cpu())
    samples = torch.cat(samples)
    vae.latent_mean.copy_(samples.mean((0, 2, 3), keepdim=True))
    vae.latent_std.copy_(samples.std((0, 2, 3), keepdim=True))


def at_once(images):
    """How many images (N, C, H, W) a network sees at a time: 64 of 64 pixels, one of 512."""
    return min(64, max(1, 2 ** 18 // (images.shape[2] * images.shape[3])))


@torch.no_grad()
def reconstruct(vae, images):
    """Images through the autoencoder by the posterior's mean: (x_hat, kl in nats per image)."""
    out, kl = [], []
    for x in images.split(at_once(images)):
        mean, logvar = vae.encode(x.to(device()))
        out.append(vae.decoder(mean).float().clamp(-1, 1).cpu())
        kl.append(kl_divergence(mean, logvar).cpu())
    return torch.cat(out), torch.cat(kl)


def through_small_image(images, numbers):
    """The baseline of the same compression: area downsampling to the square that comes nearest to
    `numbers` values per image (980 for 1024 in five channels), then bicubic upsampling."""
    side = round((numbers / images.shape[1]) ** .5)
    small = F.interpolate(images, (side, side), mode="area")
    return F.interpolate(small, images.shape[2:], mode="bicubic").clamp(-1, 1)


def reconstruction_metrics(x, x_hat):
    """L1 per channel and PSNR in dB, on [0, 1]."""
    difference = (x - x_hat) / 2
    return {"l1": difference.abs().mean().item(),
            "l1_per_channel": difference.abs().mean((0, 2, 3)).tolist(),
            "psnr": -10 * math.log10(max(1e-9, difference.square().mean().item()))}


def evaluate(vae, images, channels):
    """Held-out metrics as a dict, and as one printed line."""
    x_hat, kl = reconstruct(vae, images)
    found = reconstruction_metrics(images, x_hat) | {"kl": kl.mean().item()}
    each = " ".join(f"{c} {v:.4f}" for c, v in zip(channels, found["l1_per_channel"]))
    line = f"L1 {found['l1']:.4f} ({each}), PSNR {found['psnr']:.1f} dB, KL {found['kl']:.0f} nats"
    return found, line, x_hat


def draw_reconstruction(path, images, x_hat, channels):
    """Original, reconstruction and three times the difference, by channel."""
    rows, labels = [], []
    for k in range(min(3, len(images))):
        for name, image in (("original", images[k]), ("through the VAE", x_hat[k]),
                            ("3 x difference", 3 * (images[k] - x_hat[k]).abs() - 1)):
            rows.append([image] * (image.min() >= -1) + list(image)
                        if name != "3 x difference" else [None, *image])
            labels.append(name)
    data.picture(path, rows, channels, labels, ["all", *channels])


def peak_memory():
    """The most memory that this process has held, in GB: of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return math.nan
    import resource
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9


def shape_of(config):
    """The VAEConfig of a Config, checked."""
    channels = len(config.channels.split(","))
    numbers = channels * config.downsampling ** 2 if config.pixels else config.latent_channels
    shape = VAEConfig(channels, numbers, config.downsampling, config.fold, config.width,
                      config.blocks, config.pixels)
    try:
        shape.widths()
    except ValueError as fault:
        raise UserError(str(fault)) from None
    return shape


def held_out_views(pixels, rows, config, intensity):
    """Held-out images to look at, from all plates; of few images several random pieces of each."""
    rows = np.random.default_rng(0).permutation(rows)
    side = views(pixels, rows[:1], config, intensity).shape[-1]
    looks = max(16, min(256, 2 ** 20 // side ** 2))  # a million pixels of large images
    held = views(pixels, rows[:looks], config, intensity)
    if len(held) < min(looks, 64):
        held = torch.cat([views(pixels, rows, config, intensity, np.random.default_rng(k))
                          for k in range(math.ceil(min(looks, 64) / len(rows)))])
    return held


def optimise(vae, draw, held, channels, config):
    """The training loop. draw(rng): a batch of training views; held: images to look at."""
    optimiser = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(.9, .99), fused=True)
    out, start, recent = Path(config.out), time.time(), []
    (out / "log.jsonl").unlink(missing_ok=True)
    for step in tqdm(range(config.steps), desc="training the autoencoder", mininterval=1):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, config.steps, config.lr)
        rng, noise_rng = step_rng(config.seed, step)
        x = draw(rng).to(device())
        h, w = (n // config.downsampling for n in x.shape[2:])
        noise = torch.randn(len(x), config.latent_channels, h, w, generator=noise_rng).to(device())
        with autocast():
            x_hat, mean, logvar = vae(x, noise)
        loss, l1, kl = vae_loss(x, x_hat, mean, logvar, config.kl_weight,
                                config.spectral_weight, config.multiscale_weight)
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()} at step {step}: training stopped, nothing "
                            "saved; try a smaller --lr")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.)
        optimiser.step()
        recent.append(l1.item() / 2)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            found, line, _ = evaluate(vae.eval(), held, channels)
            vae.train()
            tqdm.write(f"step {step + 1:5d}: train L1 {np.mean(recent):.4f}, held-out {line}")
            write_log(out / "log.jsonl", step=step + 1, seconds=round(time.time() - start, 1),
                      train_l1=float(np.mean(recent)), **found)
            recent = []


def train(config=Config()):
    """Train a VAE and write `out`/model.pt. Returns its path."""
    out = Path(config.out)
    if (out / "model.pt").exists() and not config.overwrite:
        raise UserError(f"{out}/model.pt exists: use --overwrite to train again, or another --out")
    shape = shape_of(config)
    manifest, pixels, train_rows, held_rows = open_data(config)
    intensity = data.fit_intensity(config.intensity, pixels, train_rows)
    held = held_out_views(pixels, held_rows, config, intensity)

    def draw(rng, count=config.batch):
        return views(pixels, rng.choice(train_rows, count), config, intensity, rng)
    torch.manual_seed(config.seed)
    vae = VAE(shape).to(device())
    count = sum(p.numel() for p in vae.parameters()) / 1e6
    values, numbers = held[0].numel(), vae.to_latent(held[:1].to(device())).numel()
    print(f"autoencoder: {count:.2f} M parameters, {values} pixel values to {numbers} numbers, "
          f"{len(train_rows)} images to train on, {len(held)} views held out")
    out.mkdir(parents=True, exist_ok=True)
    if not config.pixels:
        optimise(vae, draw, held, manifest.channels, config)

    vae.eval().requires_grad_(False)
    rng = np.random.default_rng(config.seed)
    measure_latents(vae, [draw(rng, max(4, at_once(held))) for _ in range(8)])
    found, line, x_hat = evaluate(vae, held, manifest.channels)
    baseline = reconstruction_metrics(held, through_small_image(held, numbers))
    print(f"held-out {line}\nan image shrunk to as many numbers and enlarged again: "
          f"L1 {baseline['l1']:.4f}, PSNR {baseline['psnr']:.1f} dB; peak memory "
          f"{peak_memory():.1f} GB")
    draw_reconstruction(out / "reconstruction.png", held, x_hat, manifest.channels)
    (out / "result.json").write_text(json.dumps(
        {"held_out": found, "small_image": baseline, "peak_memory_gb": peak_memory(),
         "settings": asdict(config)}, indent=1))
    save_checkpoint(out / "model.pt", "vae", {
        "config": asdict(shape), "weights": vae.state_dict(), "intensity": intensity,
        "settings": asdict(config), "result": found})
    print(f"wrote {out}/model.pt and {out}/reconstruction.png")
    return out / "model.pt"


def main():
    train(settings(Config))


if __name__ == "__main__":
    run(main)
