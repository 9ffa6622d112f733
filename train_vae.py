"""Train the autoencoder (vae.py): pixels to latents. Also home of what every script needs:
settings from the command line, the device, checkpoints, and how a user's mistake is reported.

    python train_vae.py                                   # the simulated screen
    python train_vae.py --data plates/index.csv --binning 2 --crop 64 --out runs/plates_vae
    torchrun --nproc_per_node=2 train_vae.py              # two GPUs
    python train_vae.py --pixels --out runs/pixels_vae    # none: the baseline that needs no latents
"""
import argparse
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import os
import pickle
import resource
import shlex
import signal
import sys
import time
import traceback
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import conditioning
import data
from data import CHANNELS
from vae import VAE, VAEConfig, kl_divergence, shrunk, vae_loss


# the poster's size: pieces of 512x512 pixels, to 64x64x8 or 128x128x1 numbers
PRESETS = {"64x64x8": dict(crop=512, downsampling=8, latent_channels=8, width=64, batch=4),
           "128x128x1": dict(crop=512, downsampling=4, latent_channels=1, width=64, batch=4)}


@dataclass
class Config:
    preset: str = ""                      # 64x64x8 or 128x128x1: settings for 512-pixel crops
    # data: what counts as an image. train_ldm.py reads these from the autoencoder's checkpoint
    data: str = "runs/data/manifest.csv"  # the manifest; the default one is drawn if it is missing
    channels: str = ",".join(CHANNELS)    # stains: columns of the manifest, or the order in a file
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
    eval_every: int = 500                 # steps between looks at held-out images and checkpoints
    keep: int = 0                         # the last so many checkpoints stay, as step-N.pt
    resume: bool = False                  # go on from model.pt
    overwrite: bool = False               # train again where model.pt exists
    # memory and speed: what is learned stays the same
    accumulate: int = 1                   # parts of a batch that are computed one after the other
    checkpointing: bool = False           # compute activations twice: less memory, for 512 pixels
    compile: bool = False                 # torch.compile, for a GPU
    workers: int = 4                      # processes that read image files
    max_corrupt: float = 0.01             # share of images that may be unreadable and are left out


# --- settings, errors, device -------------------------------------------------------------------

class UserError(ValueError):
    """A setting or a checkpoint that cannot be used."""


class Stopped(Exception):
    """Training was told to stop by a signal, and has saved what it did."""


USER_ERRORS = (data.DataError, conditioning.FieldError, UserError)


def run(main):
    """Call main(); a user's mistake becomes one line per fault and exit status 2."""
    try:
        main()
    except (*USER_ERRORS, OSError) as fault:  # OSError: no space left, no permission
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        number, message = stop.args
        print(message, file=sys.stderr)
        sys.exit(128 + number)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def settings(config, argv=None):
    """Command line to Config: one option per setting, the comment beside each is its help. A wrong
    name or type ends with a message and exit status 2."""
    module, notes = sys.modules[config.__module__].__doc__, data.comments(config)
    parser = data.Parser(description=module, formatter_class=argparse.RawDescriptionHelpFormatter)
    for setting in dataclasses.fields(config):
        text = f"{notes[setting.name]} (default: {setting.default})".replace("%", "%%")
        kind = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(nargs="*")}.get(
            setting.type, dict(type=setting.type))
        parser.add_argument(f"--{setting.name}", default=setting.default, help=text, **kind)
    values = vars(parser.parse_args(argv))
    if values.get("preset"):  # other defaults; what is stated beside it wins
        if values["preset"] not in PRESETS:
            parser.error(f"--preset {values['preset']}: one of {', '.join(PRESETS)}")
        parser.set_defaults(**PRESETS[values["preset"]])
        values = vars(parser.parse_args(argv))
    for setting in dataclasses.fields(config):
        value = values[setting.name]
        least = min(1, setting.default) if setting.type is int else 0
        if setting.type in (int, float) and not least <= value < 2 ** 63:  # nan is neither
            fault = f"must be at least {least}" if value < least else f"{value} is out of range"
            parser.error(f"--{setting.name} {fault}")
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def command(config):
    """How to go on with this run: its command line (--overfit saves nothing, and starts again), or
    words where the script that was started trains other networks as well and goes on by itself."""
    script, started = Path(inspect.getfile(type(config))).name, Path(sys.argv[0]).name
    if started != script and started in ("train_ldm.py", "evaluate.py"):
        return "the same command again"
    resume = "" if getattr(config, "overfit", False) else " --resume"
    words = [f"python {script}{resume}"]
    for setting in dataclasses.fields(config):
        name, value = setting.name, getattr(config, setting.name)
        if value == setting.default or name in ("resume", "overwrite"):
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name}")
        else:
            values = value if isinstance(value, tuple) else [value]
            words.append(shlex.join([f"--{name}", *map(str, values)]))
    return " ".join(words)


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bf16():
    """bfloat16 pays where the hardware multiplies it; elsewhere it is emulated and slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def precision():
    """Of the matrix products and convolutions in training."""
    return torch.bfloat16 if has_bf16() else torch.float32


def autocast():
    """bf16 for matrix products and convolutions where that pays, float32 elsewhere."""
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    return torch.autocast(device().type, torch.bfloat16, enabled=has_bf16())


def try_compiler():
    """Compile next to nothing: what this machine lacks for --compile is said before any work."""
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device()))
    except RuntimeError as fault:
        why = data.one_line(fault.__context__ or fault)
        raise UserError(f"--compile cannot be used on this machine: {why}") from None


def step_rng(seed, step):
    """All randomness of one training step, from its number alone: a resumed run needs no state.
    Returns a numpy generator for the data and a torch generator for the noise."""
    rng = np.random.default_rng([seed, step])
    return rng, torch.Generator().manual_seed(int(rng.integers(2 ** 62)))


def learning_rate(step, steps, peak, warmup=100):
    """Linear warm-up, then a cosine to a hundredth."""
    decay = .505 + .495 * math.cos(math.pi * step / steps)
    return peak * min(1., (step + 1) / min(warmup, max(1, steps // 5))) * decay


# --- several processes, as torchrun starts them -------------------------------------------------
#
# Each process draws the whole batch of a step and computes the gradient of its part of it, and
# DistributedDataParallel averages the gradients: one batch gives one result, whatever the number.
# (So each reads all images of an autoencoder's batch; latents come from the cache and cost little.)
# The first process alone prints, evaluates and writes.

def join_processes():
    """Under torchrun: meet the other processes. Started alone: nothing."""
    if "LOCAL_RANK" not in os.environ:
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # the others wait for the first, which may encode latents for hours
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=7))
    if not is_main():
        sys.excepthook = functools.partial(traceback.print_exception, file=sys.stderr)
        sys.stdout = sys.stderr = open(os.devnull, "w")


def rank_and_world():
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    return rank_and_world()[0] == 0


def average(*values):
    """Numbers averaged over the processes, alike in all of them."""
    _, world = rank_and_world()
    if world == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(values)
    return (values / world).tolist()


@contextlib.contextmanager
def main_first():
    """The first process goes through the block, then the others, which find what it has written;
    where it fails, none of them waits for it."""
    done = torch.zeros(1, device=device())
    try:
        if is_main():
            yield
            done += 1
    finally:
        if dist.is_initialized():
            dist.broadcast(done, 0)
    if not is_main():
        if not done:
            sys.exit(2)
        yield


def parts(config):
    """The slices of a batch that this process computes, one after the other."""
    rank, world = rank_and_world()
    count = world * config.accumulate
    if config.batch % count:
        raise UserError(f"--batch {config.batch} is no multiple of --accumulate {config.accumulate}"
                        + (f" times {world} processes" if world > 1 else ""))
    size = config.batch // count
    return [slice(k * size, (k + 1) * size) for k in range(rank, count, world)]


def for_training(model, compiled=False):
    """What the training loop calls instead of `model`, with the same weights: channels-last on a
    GPU, compiled if asked, its gradients averaged over the processes."""
    if device().type == "cuda":
        model.to(memory_format=torch.channels_last)
    if compiled:
        model.compile()
    if not dist.is_initialized():
        return model
    empty = any(not w.numel() for w in model.parameters())  # of a model that is told nothing
    return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=empty)


# --- model FLOPs utilisation (MFU): what a model computes of what the machine could ---------------

def count_flops(f):
    """FLOPs of the matrix products and convolutions in f(), backward passes with them."""
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


@functools.cache
def matrix_rate(dtype):
    """FLOP/s of square matrix products, the best of twenty at least and of those that fit into a
    fifth of a second: what else runs on the machine slows down the others only."""
    side = 4096 if device().type == "cuda" else 512
    rng = torch.Generator(device()).manual_seed(0)
    a, b = torch.randn(2, side, side, dtype=dtype, device=device(), generator=rng)
    times, end = [], time.time() + .2
    with torch.no_grad(), autocast():
        while len(times) < 20 or time.time() < end:
            began = time.perf_counter()
            a @ b
            if device().type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return 2 * side ** 3 / min(times)


# --- the steps of a training run ----------------------------------------------------------------

def ahead(function, items):
    """function(item) for each of the items, by a thread that is one ahead of the loop."""
    with ThreadPoolExecutor(1) as thread:
        coming = []
        for item in items:
            coming.append(thread.submit(function, item))
            if len(coming) == 2:
                yield coming.pop(0).result()
        for last in coming:
            yield last.result()


class Loop:
    """for step, batch in loop: batch is draw(step), made while the step before it runs. The loop
    keeps the losses and the time, and ends after the running step on SIGTERM and SIGINT.
    flops: of the model for one image, there and back."""

    def __init__(self, draw, config, name, first=0, losses=(), flops=0):
        self.draw, self.config, self.name, self.first = draw, config, name, first
        self.use = flops / matrix_rate(precision()) / rank_and_world()[1]  # for one image a second
        self.losses, self.signal, self.stopping = list(losses), 0, False
        self.start, self.count = time.time(), 0

    def note(self, number, frame):
        self.signal = number

    def __iter__(self):
        steps = range(self.first, self.config.steps)
        handlers = {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT)}
        batches = ahead(self.draw, steps)
        try:
            for step in tqdm(steps, desc=self.name, initial=self.first, total=self.config.steps,
                             mininterval=1):
                began = time.time()
                if not self.count:
                    self.since, self.waited = began, 0.
                batch = next(batches)
                self.waited, self.count = self.waited + time.time() - began, self.count + 1
                yield step, batch
                if self.stopping:
                    number = self.signal or signal.SIGTERM  # or another process was told
                    raise Stopped(number, f"stopped by {signal.Signals(number).name} after step "
                                  f"{step + 1} of {self.config.steps}, to go on: "
                                  + command(self.config))
        finally:
            batches.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def agree(self, step, loss, shown=None):
        """Average the loss over the processes; all of them stop where it is not finite, and after
        this step where one was told to. `shown` is kept in `losses` instead of it."""
        loss, shown, told = average(loss, loss if shown is None else shown, bool(self.signal))
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step}: training stopped, what "
                            f"{self.config.out} holds is as it was; try a smaller --lr")
        self.losses.append(float(shown))
        self.stopping = told > 0

    def evaluates(self, step):
        """Whether it is this process and this step that looks at held-out data."""
        return is_main() and ((step + 1) % self.config.eval_every == 0
                              or step + 1 == self.config.steps)

    def saves(self, step):
        return self.evaluates(step) or (self.stopping and is_main())

    def report(self):
        """Of the steps since it was last asked: the mean loss, and the speed for the log and as one
        printed line. To be asked before an evaluation, whose time is not a step's."""
        seconds = time.time() - self.since
        speed = self.count * self.config.batch / seconds
        found = {"seconds": round(time.time() - self.start, 1),
                 "images_per_second": round(speed, 2),
                 "flops_utilisation": float(f"{self.use * speed:.3g}"),
                 "data_wait": round(self.waited / seconds, 4), "peak_gb": round(peak_memory(), 3)}
        loss, self.losses, self.count = float(np.mean(self.losses)), [], 0
        return loss, found, (
            f"{speed:.0f} images/s, {self.use * speed:.0%} MFU, {found['data_wait']:.0%} waiting "
            f"for data, {found['peak_gb']:.1f} GB")


# --- checkpoints --------------------------------------------------------------------------------

def save_checkpoint(path, kind, content, keep=0):
    """Write {"kind": kind, ...}, under a temporary name first: interrupted, it loses nothing.
    keep: the last so many of a run stay beside it, as step-N.pt."""
    path, part = Path(path), Path(path).with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            torch.save({"kind": kind, **content}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as fault:  # torch's own error hides that no space was left
        part.unlink(missing_ok=True)
        why = data.one_line(fault.__context__ or fault)
        raise UserError(f"{path} cannot be written ({why}): what was there is as it was") from None
    os.replace(part, path)
    if keep:  # a second name for the same file, which the next checkpoint takes only one away from
        named = path.with_name(f"step-{content['step']}.pt")
        named.unlink(missing_ok=True)
        os.link(path, named)
        for old in step_files(path.parent)[:-keep]:
            old.unlink()


def step_files(folder):
    """The earlier checkpoints of a run, oldest first."""
    return sorted(Path(folder).glob("step-*.pt"), key=lambda path: int(path.stem.split("-")[1]))


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
    found = content.get("kind") if isinstance(content, dict) else None
    if found != kind:
        raise UserError(f"{path} is a checkpoint of another kind ({found}), not {kind}: {hint}")
    return content


# what may change when a run goes on
FREE = {"steps", "resume", "overwrite", "overfit", "eval_every", "out", "keep", "accumulate",
        "checkpointing", "compile", "workers", "max_corrupt"}


def changed_settings(config, content):
    """Settings that differ from those of a checkpoint, but for what may change on the way."""
    was = {f.name: f.default for f in dataclasses.fields(config)} | content["settings"]
    return [f"{k} was {was[k]}" for k, v in asdict(config).items() if k not in FREE and was[k] != v]


CHANGES = {"manifest": "the manifest has changed", "intensity": "the intensities have changed",
           "fields": "the fields' ranges and categories have changed",
           "controlnet": "the control images have changed"}


def same_weights(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[k].cpu(), other[k].cpu()) for k in one)


def open_resume(config, kind, constant):
    """`out`/model.pt, to go on from; refused under other settings or where what is to be saved in
    it, `constant`, says that the data or the autoencoder have changed."""
    path = Path(config.out) / "model.pt"
    content = load_checkpoint(path, kind, "start without --resume")
    changed = changed_settings(config, content) + [
        says for key, says in CHANGES.items()
        if content.get(key, constant.get(key)) != constant.get(key)]
    if kind == "ldm" and not same_weights(*(c["vae"]["weights"] for c in (content, constant))):
        changed.append("the autoencoder is another one")
    if changed:
        raise UserError(f"--resume of {path}: {'; '.join(changed)}")
    if content["step"] > config.steps:
        raise UserError(f"--resume of {path}, which has {content['step']} steps: --steps must be "
                        "at least that")
    return content


def load_vae(path):
    """A trained VAE, ready to use, and its checkpoint."""
    content = load_checkpoint(path, "vae", "run python train_vae.py")
    if not finished(content):
        raise UserError(f"{path} stopped at step {content['step']} of "
                        f"{content['settings']['steps']}: go on with python train_vae.py --resume")
    return build_vae(content).to(device()), content


def finished(content):
    """Whether an autoencoder was trained to its end, when its latents are measured."""
    return "result" in content


def build_vae(content):
    vae = VAE(VAEConfig(**content["config"]))
    vae.load_state_dict(content["weights"])
    return vae.eval().requires_grad_(False)


def write_log(path, **values):
    """Append one line of JSON."""
    with open(path, "a") as file:
        file.write(json.dumps(values) + "\n")


def read_log(folder):
    """The lines of log.jsonl of a training run."""
    return [json.loads(line) for line in open(Path(folder) / "log.jsonl")]


# --- data ---------------------------------------------------------------------------------------

def open_data(config, draw=True):
    """The images as a config (or a checkpoint's settings) says: a namespace of settings, manifest,
    pixels, train and held (rows of the manifest)."""
    if draw and config.data == Config.data and not Path(config.data).exists():
        print("no data yet: drawing a simulated screen")
        data.simulate(Path(config.data).parent)
    manifest = data.read_manifest(config.data, tuple(config.channels.split(",")))
    check_sizes(manifest, config)
    train, held = data.split_rows(manifest, config.split, config.holdout)
    if not len(held):
        raise data.DataError(f"{manifest.path}: --split {config.split} holds out no row")
    workers, share = (getattr(config, k, getattr(Config, k)) for k in ("workers", "max_corrupt"))
    pixels = data.Pixels(manifest, config.binning, workers=workers, max_corrupt=share)
    return SimpleNamespace(settings=config, manifest=manifest, pixels=pixels, train=train,
                           held=held)


def check_sizes(manifest, config):
    """Refuse images of which no equal pieces can be cut that halve as often as the model asks."""
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
                                     f"multiple of {config.downsampling}: choose a --crop that is")


def views(pixels, rows, config, intensity, rng=None):
    """Rows as a batch (B, C, H, W) in [-1, 1]: random views, or the middle ones without rng. The
    place of an image that cannot be read goes to the next of the batch that can."""
    found = [None if image is None else data.scale_intensity(
        data.take_view(image, config.crop, rng, config.flips), intensity)
        for image in pixels.many(rows)]
    sound = [x for x in found if x is not None]
    if not sound:
        raise data.DataError(f"{pixels.manifest.path}: no image of a whole batch can be read, row "
                             f"{int(rows[0]) + 2} for one")
    if len({x.shape for x in sound}) > 1:
        raise data.DataError(f"{pixels.manifest.path}: images of different sizes, near row "
                             f"{int(rows[0]) + 2}: cut equal pieces with --crop")
    for k in reversed(range(len(found))):
        if found[k] is None:
            found[k] = sound[0] if k + 1 == len(found) else found[k + 1]
    return torch.from_numpy(np.stack(found))


def on_its_way(x):
    """A tensor bound for the device: the copy to a GPU does not hold up the loop."""
    return x.pin_memory().to(device(), non_blocking=True) if device().type == "cuda" else x


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
    for x, y in zip(images[:3], x_hat):
        rows += [x, *x], [y, *y], [None, *(3 * (x - y).abs() - 1)]
        labels += "original", "through the VAE", "3 x difference"
    data.picture(path, rows, channels, labels, ["all", *channels])


def peak_memory():
    """The most memory that this process has held, in GB: of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
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


def prepare(config):
    """What is known before the first step: shape, data, intensities, held-out views."""
    shape, p = shape_of(config), open_data(config)
    p.intensity = data.fit_intensity(config.intensity, p.pixels, p.train)
    rows = np.random.default_rng(0).permutation(p.held)  # from all plates
    side = views(p.pixels, rows[:8], config, p.intensity).shape[-1]
    p.looks = looks = max(16, min(256, 2 ** 20 // side ** 2))  # a million pixels of large images
    p.views = views(p.pixels, rows[:looks], config, p.intensity)
    if len(p.views) < min(looks, 64):  # few images: several random pieces of each
        p.views = torch.cat([views(p.pixels, rows, config, p.intensity, np.random.default_rng(k))
                            for k in range(math.ceil(min(looks, 64) / len(rows)))])
    p.constant = {"config": asdict(shape), "intensity": p.intensity, "manifest": p.manifest.sha1(),
                  "settings": asdict(config) | {"resume": False}}
    p.shape = shape
    return p


def training_batch(p, config, step):
    """All that one step draws, from its number: views (B, C, H, W) and noise (B, Z, h, w)."""
    rng, noise_rng = step_rng(config.seed, step)
    x = views(p.pixels, rng.choice(p.train, config.batch), config, p.intensity, rng)
    h, w = (n // config.downsampling for n in x.shape[2:])
    noise = torch.randn(len(x), config.latent_channels, h, w, generator=noise_rng)
    return on_its_way(x), on_its_way(noise)


def save_activations(vae):
    """Gradient checkpointing: keep the input of each level, compute what is inside it again."""
    for level in (*vae.encoder.levels, *vae.decoder.levels):
        level.forward = functools.partial(checkpoint, level.forward, use_reentrant=False)


def loss_of(model, x, noise, config):
    """(loss, L1 on [0, 1]) of the model for views x and the noise of their latents."""
    with autocast():
        x_hat, mean, logvar = model(x, noise)
    loss, l1, _ = vae_loss(x, x_hat, mean, logvar, config.kl_weight, config.spectral_weight,
                           config.multiscale_weight)
    return loss, l1 / 2


def check(config):
    """Refuse settings that cannot be used, before anything is read or written."""
    path = Path(config.out) / "model.pt"
    if path.exists() and not (config.overwrite or config.resume):
        raise UserError(f"{path} exists: use --overwrite to train again, --resume to go on with "
                        "it, or another --out")
    if config.compile:
        try_compiler()


def train(config=Config()):
    """Train a VAE and write `out`/model.pt. Returns its path."""
    check(config)
    slices = parts(config)
    with main_first():
        p = prepare(config)
        first = open_resume(config, "vae", p.constant) if config.resume else {"step": 0}
    torch.manual_seed(config.seed)
    vae = VAE(p.shape).to(device())
    if is_main() and not config.resume:
        start_anew(Path(config.out))
    state = {} if config.pixels else fit(vae, p, config, first, slices)  # pixels: nothing to train
    if is_main():
        finish(vae, p, config, state)
    return Path(config.out) / "model.pt"


def fit(vae, p, config, first, slices):
    """Train from the checkpoint `first` on; returns what belongs into the next beside weights."""
    x = p.views[:1].to(device())
    noise = torch.zeros_like(vae.encode(x)[0])
    print(f"autoencoder: {sum(w.numel() for w in vae.parameters()) / 1e6:.2f} M parameters, "
          f"{x.numel()} pixel values to {noise.numel()} numbers, {len(p.train)} images to "
          f"train on, {len(p.views)} views held out")
    flops = count_flops(lambda: loss_of(vae, x, noise, config)[0].backward())
    if config.checkpointing:
        save_activations(vae)
    model = for_training(vae, config.compile)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(.9, .99), fused=True)
    if config.resume:
        vae.load_state_dict(first["weights"])
        optimiser.load_state_dict(first["optimiser"])

    loop = Loop(functools.partial(training_batch, p, config), config, "training the autoencoder",
                first["step"], first.get("losses", ()), flops)
    for step, (x, noise) in loop:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, config.steps, config.lr)
        optimiser.zero_grad()
        total = np.zeros(2)
        for part in slices:
            loss, l1 = loss_of(model, x[part], noise[part], config)
            (loss / len(slices)).backward()
            total += loss.item() / len(slices), l1.item() / len(slices)
        loop.agree(step, *total)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.)
        optimiser.step()
        if loop.evaluates(step):
            look(vae, p, config, step, loop)
        if loop.saves(step):
            save(vae, p, config, step + 1, optimiser=optimiser.state_dict(), losses=loop.losses)
    return {"optimiser": optimiser.state_dict()}


def look(vae, p, config, step, loop):
    """Print and log the losses and how fast it goes."""
    train_l1, speed, said = loop.report()
    found, line, _ = evaluate(vae.eval(), p.views, p.pixels.manifest.channels)
    vae.train()
    tqdm.write(f"step {step + 1:5d}: train L1 {train_l1:.4f}, held-out {line}; {said}")
    write_log(Path(config.out) / "log.jsonl", step=step + 1, train_l1=train_l1, **speed, **found)


def save(vae, p, config, step, **state):
    save_checkpoint(Path(config.out) / "model.pt", "vae", p.constant | {
        "weights": vae.state_dict(), "step": step} | state, config.keep)


def trained(config):
    """The path of this autoencoder: trained unless it is there, gone on with where unfinished."""
    path = Path(config.out) / "model.pt"
    there = path.exists()
    content = load_checkpoint(path, "vae", "choose another --out") if there else {"step": 0}
    if finished(content):
        return path
    return train(dataclasses.replace(config, resume=there, overwrite=False,
                                     steps=max(config.steps, content["step"])))


def start_anew(out):
    """Clear away the log and the kept checkpoints of an earlier run."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (out / "log.jsonl", *step_files(out)):
        old.unlink(missing_ok=True)


def finish(vae, p, config, state):
    """Measure the latents, compare with a small image, draw, and save what can now be used."""
    out, channels = Path(config.out), p.pixels.manifest.channels
    vae.eval().requires_grad_(False)
    rng = np.random.default_rng(config.seed)
    measure_latents(vae, [views(p.pixels, rng.choice(p.train, p.looks // 4), config,
                                p.intensity, rng) for _ in range(8)])
    found, line, x_hat = evaluate(vae, p.views, channels)
    numbers = vae.to_latent(p.views[:1].to(device())).numel()
    baseline = reconstruction_metrics(p.views, shrunk(p.views, numbers))
    print(f"held-out {line}\nan image shrunk to as many numbers and enlarged again: "
          f"L1 {baseline['l1']:.4f}, PSNR {baseline['psnr']:.1f} dB; peak memory "
          f"{peak_memory():.1f} GB")
    draw_reconstruction(out / "reconstruction.png", p.views, x_hat, channels)
    (out / "result.json").write_text(json.dumps(
        {"held_out": found, "small_image": baseline, "peak_memory_gb": peak_memory(),
         "settings": asdict(config)}, indent=1))
    save(vae, p, config, config.steps, result=found, **state)
    p.pixels.report()
    print(f"wrote {out}/model.pt and {out}/reconstruction.png")


def main():
    join_processes()
    train(settings(Config))


if __name__ == "__main__":
    run(main)
