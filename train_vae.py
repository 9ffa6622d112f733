"""Train the autoencoder (vae.py). What both training scripts share stands here too, behind the
training itself: settings, devices, processes, checkpoints.

    python train_vae.py                                   # the simulated screen
    python train_vae.py --data plates/index.csv --binning 2 --crop 64 --out runs/plates_vae
    torchrun --nproc_per_node=2 train_vae.py              # two GPUs
    python train_vae.py --pixels --out runs/pixels_vae    # none: the baseline that needs no latents
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from conditioning import FieldError
from data import CHANNELS, UserError
from vae import VAE, VAEConfig, kl_divergence, vae_loss


@dataclass
class Config:
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
    spectral_weight: float = 0.           # weight of the difference of Fourier amplitudes
    # training
    out: str = "runs/vae"                 # model.pt, reconstruction.png and log.jsonl go here
    steps: int = 4200                     # optimiser steps
    batch: int = 8                        # images per step
    lr: float = 2e-3                      # peak learning rate, after warm-up, before decay
    seed: int = 0                         # of weights, order and noise
    eval_every: int = 500                 # steps between evaluations and checkpoints
    resume: bool = False                  # go on from model.pt
    overwrite: bool = False               # train again where model.pt exists
    # memory and speed: what is learned stays the same
    compile: bool = False                 # torch.compile, for a GPU
    threads: int = 0                      # of the CPU; 0 times one thread and all, takes the faster
    workers: int = 4                      # processes that read images; 0: the one that trains
    max_corrupt: float = 0.01             # share of images that may be unreadable and are left out


FREE = {"steps", "resume", "overwrite", "overfit", "eval_every", "out", "compile", "threads",
        "workers", "max_corrupt"}  # settings that may change on --resume
NOISE = 3  # purpose of the random numbers of a step, beside data.VIEW and data.ROWS
ALL_THREADS = torch.get_num_threads()


# --- training -----------------------------------------------------------------------------------

def train(config=Config()):
    """Train an autoencoder and write `out`/model.pt. Returns its path."""
    places, path = part_of_batch(config), Path(config.out) / "model.pt"
    with main_first():
        found = finished_or_resume(config, "vae")
        if found and found["step"] == config.steps:
            return path
        run = prepare(config, found)
    if config.pixels:  # nothing to train
        if is_main():
            save_and_report(run, config, config.steps)
        return path

    model, losses, first = for_training(run.vae, config.compile), run.losses, run.first
    optimiser = torch.optim.AdamW(run.vae.parameters(), lr=config.lr, betas=(.9, .99), fused=True)
    if found:
        optimiser.load_state_dict(found["optimiser"])
    steps = Steps(run.views, run.train, config, places)
    batches = data.loader(steps, range(first, config.steps), config.workers, batch_size=None)
    progress = Progress(batches, config, first, "training the autoencoder")
    with stop_signals() as stop:
        for step, (x, noise, faults) in progress:
            steps.leave_out(faults)
            x, noise = (v.to(device(), non_blocking=True) for v in (x, noise))
            optimiser.param_groups[0]["lr"] = learning_rate(step, config.steps, config.lr)
            optimiser.zero_grad()
            loss, l1 = loss_of(model, x, noise, config)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(run.vae.parameters(), 1.)
            check_finite(loss, norm, config, step)
            optimiser.step()
            losses.append(float(l1.detach()))

            number, last = stop(), step + 1 == config.steps
            evaluates = last or (step + 1) % config.eval_every == 0
            if evaluates or number:
                losses = average(losses)
                if is_main():
                    save_and_report(run, config, step + 1, optimiser, losses,
                                    progress if evaluates else None)
                losses *= not evaluates
            if number:
                raise stopped(number, config, step + 1)
    return path


def loss_of(model, x, noise, config):
    """(loss, L1 on [0, 1]) of the model for views x and the noise of their latents."""
    with autocast():
        x_hat, mean, logvar = model(x, noise)
    loss, l1, _ = vae_loss(x, x_hat, mean, logvar, config.kl_weight, config.spectral_weight)
    return loss, l1 / 2


class Steps(torch.utils.data.Dataset):
    """steps[17] is what step 17 draws, by its number alone: images (b, C, h, w), the noise of their
    latents, and {row: fault} of unreadable images, for which others were drawn. b: the places of
    the batch that this process computes."""

    def __init__(self, views, rows, config, places):
        self.views, self.rows, self.config, self.places = views, rows, config, places
        self.unreadable, self.most = {}, config.max_corrupt * len(rows)

    def __getitem__(self, step):
        c, images, faults = self.config, [], {}
        for place in self.places:
            rng, fault = data.keyed_rng(c.seed, data.ROWS, step, place), "none seen yet"
            while fault and len(faults) <= self.most:  # more end the run
                row = int(rng.choice(self.rows))
                x, fault = self.views[row, int(rng.integers(2 ** 31))]
                faults |= {row: fault} if fault else {}
            images.append(x)
        shape = c.batch, c.latent_channels, *(n // c.downsampling for n in x.shape[1:])
        noise = torch.randn(shape, generator=step_rng(c.seed, step)[1])
        return torch.stack(images), noise[self.places.start:self.places.stop], faults

    def leave_out(self, faults):
        """Note the {row: fault} of unreadable images; too many of them end the run."""
        for row in faults.keys() - self.unreadable.keys():
            tqdm.write(f"left out: {faults[row]}")
        self.unreadable |= faults
        if len(self.unreadable) > self.most:
            raise UserError(f"{len(self.unreadable)} of {len(self.rows)} images are unreadable, "
                            f"more than --max_corrupt: {next(iter(self.unreadable.values()))}")


def prepare(config, found):
    """All that is known before the first step; `found` is the checkpoint to go on from, or None."""
    channels, square = len(config.channels.split(",")), config.downsampling ** 2
    shape = VAEConfig(channels, channels * square if config.pixels else config.latent_channels,
                      config.downsampling, config.fold, config.width, config.blocks, config.pixels)
    torch.manual_seed(config.seed)
    try:
        vae = VAE(shape).to(device())
    except ValueError as fault:  # of widths that do not fit together
        raise UserError(str(fault)) from None
    run = open_data(config)
    run.vae, run.first, run.losses, intensity = vae, 0, [], None
    if found:
        vae.load_state_dict(found["weights"])
        run.first, run.losses, intensity = found["step"], found["losses"], found["intensity"]
    intensity = intensity or data.fit_intensity(config.intensity, run.manifest, run.train,
                                                config.binning)
    run.views = data.Views(run.manifest, intensity, config.crop, config.flips, config.binning,
                           config.seed)
    count = max(16, min(256, 2 ** 20 // math.prod(run.views.shape[1:])))  # fewer of large images
    rows = data.keyed_rng(0, data.ROWS, 0, 0).permutation(run.held)[:count]  # from all plates
    passes = range(-1, math.ceil(min(count, 64) / len(rows)) - 1)  # -1: the middle of each image
    keys = [(row, view) for view in passes for row in rows]
    x = torch.cat([x for x, _ in data.load(run.views, keys, workers=config.workers, max_corrupt=.5,
                                           what="held-out images")])
    run.images = x[x.isfinite().flatten(1).all(1)]
    run.saved = {"config": asdict(shape), "intensity": intensity, "settings": asdict(config),
                 "manifest": run.manifest.sha1()}
    print(f"autoencoder: {sum(w.numel() for w in vae.parameters()) / 1e6:.2f} M parameters, "
          f"{channels * square} pixel values to {shape.latent_channels} numbers, "
          f"{len(run.train)} images to train on, {len(x)} views held out")
    if is_main():
        start_anew(config.out, run.first)
    return run


def save_and_report(run, config, step, optimiser=None, losses=(), progress=None):
    """Save a checkpoint; then, with progress or after the last step, print and log how well
    held-out images come through. The last checkpoint holds the measured latents."""
    out, channels, last = Path(config.out), config.channels.split(","), step == config.steps
    if last:
        steps = Steps(run.views, run.train, config, range(config.batch))
        batches = data.loader(steps, range(step, step + math.ceil(512 / config.batch)),
                              config.workers, batch_size=None)
        measure_latents(run.vae, (x for x, *_ in batches))
    save_checkpoint(out / "model.pt", "vae", run.saved | {
        "weights": run.vae.state_dict(), "optimiser": optimiser and optimiser.state_dict(),
        "step": step, "losses": [] if progress else list(losses)})
    if progress or last:
        speed, text = progress.report() if progress else ({}, "nothing is trained")
        x_hat, kl = reconstruct(run.vae, run.images)
        found = {"train_l1": sum(losses) / max(1, len(losses)), "kl": kl.mean().item(),
                 **reconstruction_metrics(run.images, x_hat)}
        each = ", ".join(f"{c} {l1:.4f}" for c, l1 in zip(channels, found["l1_per_channel"]))
        tqdm.write(f"step {step:5d}: train L1 {found['train_l1']:.4f}, held-out L1 "
                   f"{found['l1']:.4f} ({each}), PSNR {found['psnr']:.1f} dB, KL "
                   f"{found['kl']:.0f} nats; {text}")
        write_log(out / "log.jsonl", step=step, **found, **speed)
    if last:
        rows = [[x, *x] for pair in zip(run.images[:3], x_hat) for x in (*pair, 3 * (
            pair[0] - pair[1]).abs() - 1)]
        data.picture(out / "reconstruction.png", rows, channels,
                     ["original", "through the VAE", "3 x difference"] * 3, ["all", *channels])
        print(f"wrote {out}/model.pt and {out}/reconstruction.png")


@torch.no_grad()
def measure_latents(vae, batches):
    """Mean and standard deviation per channel of posterior *samples*, written into the VAE."""
    samples, rng = [], torch.Generator().manual_seed(0)
    for x in batches:
        mean, logvar = (v.cpu() for v in vae.encode(x.to(device())))
        samples.append(mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=rng))
    samples = torch.cat(samples)
    vae.latent_mean.copy_(samples.mean((0, 2, 3), keepdim=True))
    vae.latent_std.copy_(samples.std((0, 2, 3), keepdim=True))


@torch.no_grad()
def reconstruct(vae, images):
    """Images through the autoencoder by the posterior's mean: (x_hat, kl in nats per image)."""
    out, kl = [], []
    for x in images.split(max(1, min(64, 2 ** 18 // images[0, 0].numel()))):  # one of 512 pixels
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


# --- data and trained autoencoders --------------------------------------------------------------

def open_data(config, draw=True):
    """The images as a Config says, checked and split: settings, manifest, train and held (its
    rows). draw: the default ones are simulated where they are missing."""
    if draw and config.data == Config.data and not Path(config.data).exists():
        print("no data yet: drawing a simulated screen")
        data.simulate(Path(config.data).parent)
    manifest = data.read_manifest(config.data, tuple(config.channels.split(",")))
    for (h, w), where in manifest.sizes.items():
        h, w = h // config.binning, w // config.binning
        sides = (config.crop, config.crop) if config.crop else (h, w)
        if min(h, w) < max(1, config.crop) or any(side % config.downsampling for side in sides) or (
                not config.crop and len(manifest.sizes) > 1):
            raise UserError(f"{manifest.path}, {where}: {w}x{h} pixels, but all views must be of "
                            f"one size, a multiple of {config.downsampling}: choose a --crop")
    train, held = data.split_rows(manifest, config.split, config.holdout)
    if not len(held):
        raise UserError(f"{manifest.path}: --split {config.split} holds out no row")
    return SimpleNamespace(settings=config, manifest=manifest, train=train, held=held)


def load_vae(path):
    """A trained VAE, ready to use, and its checkpoint."""
    content = load_checkpoint(path, "vae", "run python train_vae.py")
    if content["step"] < content["settings"]["steps"]:
        raise UserError(f"{path} is not trained to its end: python train_vae.py --resume goes on")
    return build_vae(content).to(device()), content


def build_vae(content):
    vae = VAE(VAEConfig(**content["config"]))
    vae.load_state_dict(content["weights"])
    return vae.eval().requires_grad_(False)


# --- what both training scripts share: one step ---------------------------------------------------

def step_rng(seed, step):
    """All randomness of one step from its number, so that a resumed run needs no state: a numpy
    generator for the data and a torch generator for the noise."""
    rng = data.keyed_rng(seed, NOISE, step)
    return rng, torch.Generator().manual_seed(int(rng.integers(2 ** 62)))


def learning_rate(step, steps, peak, warmup=100):
    """Linear warm-up, then a cosine to a hundredth."""
    decay = .505 + .495 * math.cos(math.pi * step / steps)
    return peak * min(1., (step + 1) / min(warmup, max(1, steps // 5))) * decay


def check_finite(loss, norm, config, step):
    """Stop before a loss or a gradient that is not finite reaches the weights."""
    loss, norm = float(loss.detach()), float(norm)
    if not math.isfinite(loss + norm):
        raise UserError(f"the loss is {loss}, its gradient {norm} at step {step}: stopped, what "
                        f"{config.out} holds is as it was; try a smaller --lr")


class Progress:
    """for step, batch in progress: the batches of a run from step `first` on, with a bar."""

    def __init__(self, batches, config, first, what):
        self.batches, self.batch, self.threads = batches, config.batch, Threads(config.threads)
        self.bar = tqdm(range(first, config.steps), what, config.steps, initial=first,
                        mininterval=1, disable=not is_main())

    def __iter__(self):
        batches, self.count, self.waited, self.since = iter(self.batches), 0, 0., time.time()
        for step in self.bar:
            began, reported = time.time(), self.since
            batch = next(batches)
            self.waited, self.count = self.waited + time.time() - began, self.count + 1
            yield step, batch
            if self.since == reported:  # else this step has evaluated as well
                self.threads.took(time.time() - began)

    def report(self):
        """Since it was last asked, for the log and as text: images a second and the share of time
        spent waiting for data; and the most memory held so far (of the GPU where there is one)."""
        seconds, gb = time.time() - self.since, torch.cuda.max_memory_allocated() / 1e9
        gb = gb or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        speed, wait = self.count * self.batch / seconds, self.waited / seconds
        self.count, self.waited, self.since = 0, 0., time.time()
        return (dict(images_per_second=round(speed, 2), data_wait=round(wait, 4), peak_gb=gb),
                f"{speed:.0f} images/s, {wait:.0%} waiting for data, {gb:.1f} GB")


class Threads:
    """On a CPU steps take turns with one thread and with all of them until each has had four; then
    the faster goes on, for 200 steps or until three steps in a row take twice the time. All have to
    gain a tenth, because beside another program they cost far more. `requested` (--threads) or the
    variable OMP_NUM_THREADS decide instead."""

    def __init__(self, requested):
        if requested:
            torch.set_num_threads(requested)
        self.free = not requested and "OMP_NUM_THREADS" not in os.environ and (
            device().type == "cpu") and ALL_THREADS > 1
        self.slow, self.best, self.left = 0, None, 1  # the first step warms up and does not count
        self.times = {1: [math.inf], ALL_THREADS: [math.inf]}

    def took(self, seconds):
        """A step took so long: choose the number of threads for the next one."""
        if not self.free:
            return
        now = torch.get_num_threads()
        if self.left:
            self.slow = self.slow + 1 if seconds > 2 * min(self.times[now]) else 0
            self.left = 0 if self.slow == 3 else self.left - 1
            self.times = self.times if self.left else {1: [], ALL_THREADS: []}
            return
        self.times[now].append(seconds)
        one, every = (min(found, default=0.) for found in self.times.values())
        torch.set_num_threads(1 if now > 1 else ALL_THREADS)
        if one and (every > 3 * one or len(self.times[1]) + len(self.times[ALL_THREADS]) == 8):
            before, self.best = self.best, 1 if one < 1.1 * every else ALL_THREADS
            torch.set_num_threads(self.best)
            self.left, self.slow = 200, 0
            if self.best != before:
                tqdm.write(f"threads: {self.best}, as a step takes {one:.3f} s with one, "
                           f"{every:.3f} s with all {ALL_THREADS}")


@contextlib.contextmanager
def stop_signals():
    """Within the block SIGTERM and Ctrl-C are only noted, so that the running step can be finished
    and saved; a second Ctrl-C interrupts. Yields a function: the number of the signal that this or
    another process was sent, 0 for none."""
    seen = []

    def note(number, frame):
        if signal.SIGINT in seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: [*seen, signal.SIGTERM][0] if any(average([len(seen)])) else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped(number, config, step):
    """Say how a stopped run goes on. Returns the exception that ends it."""
    if is_main():
        tqdm.write(f"stopped by {signal.Signals(number).name} after step {step} of {config.steps}: "
                   "the same command goes on (train_vae.py and train_ldm.py with --resume)",
                   file=sys.stderr)
    return SystemExit(128 + number)


# --- settings, errors, device -------------------------------------------------------------------

def run(main):
    """Call main(); a user's mistake becomes one line per fault and exit status 2."""
    try:
        main()
    except (UserError, FieldError, OSError) as fault:  # OSError: no space left, no permission
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def settings(config, argv=None, choices={}):
    """Command line to Config: an option for each setting, whose comment is its help. A wrong name,
    type or value, or one that is not among choices[name], is one line and exit status 2."""
    module, notes = sys.modules[config.__module__].__doc__, data.comments(config)
    parser = data.Parser(description=module, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(config):
        kind = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(nargs="*")}.get(
            field.type, dict(type=field.type, choices=choices.get(field.name)))
        text = f"{notes[field.name]} (default: {field.default})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=field.default, help=text, **kind)
    values = vars(parser.parse_args(argv))
    for field in fields(config):
        counts = field.type is int and field.default and field.name != "workers"
        least, value = 1 if counts else 0, values[field.name]
        if field.type in (int, float) and not least <= value < 2 ** 63:  # nan is neither
            parser.error(f"--{field.name} {value} is out of range: at least {least}")
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def device():
    """The GPU of this process, by its number, or the CPU."""
    index = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def has_bf16():
    """bfloat16 pays where the hardware multiplies it; elsewhere it is emulated and slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def autocast():
    """bf16 for matrix products and convolutions where that pays, float32 elsewhere."""
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    return torch.autocast(device().type, torch.bfloat16, enabled=has_bf16())


def for_training(model, compiled=False):
    """What the training loop calls instead of `model`, with the same weights: channels-last on a
    GPU, its gradients averaged over the processes, compiled if asked."""
    if device().type == "cuda":
        model.to(memory_format=torch.channels_last)
    if dist.is_initialized():
        empty = any(not w.numel() for w in model.parameters())  # of a model that is told nothing
        model = DistributedDataParallel(model, find_unused_parameters=empty)
    if compiled:
        try:  # next to nothing first, to say in one line what this machine lacks
            torch.compile(torch.sin)(torch.zeros(1, device=device()))
        except RuntimeError as why:
            raise UserError(f"--compile cannot be used here: {str(why).splitlines()[0]}") from None
        model.compile()
    return model


# --- several processes, as torchrun starts them -------------------------------------------------
# Each computes the gradient of its part of a batch; their mean is that of the batch, whatever their
# number. The first process alone prints, evaluates and writes.

def join_processes():
    """Under torchrun: meet the other processes. Started alone: nothing."""
    if "LOCAL_RANK" in os.environ:  # CPU tensors go by gloo, where they wait for no GPU
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))  # of encoding, perhaps
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")


def rank_and_world():
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    return rank_and_world()[0] == 0


def average(values):
    """A list of numbers, averaged over the processes: alike in all of them."""
    values = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(values)
    return (values / rank_and_world()[1]).tolist()


@contextlib.contextmanager
def main_first():
    """The first process goes through the block, then the others, which find what it has written.
    Where it fails the others end as well."""
    done = False
    try:
        if is_main():
            yield
            done = True
    finally:
        done, = average([done])
    if not is_main():
        if not done:
            sys.exit(2)
        yield


def part_of_batch(config):
    """The places of a batch that this process computes: a range."""
    (rank, world), batch = rank_and_world(), config.batch
    if batch % world:
        raise UserError(f"--batch {batch} is no multiple of the {world} processes")
    return range(rank * batch // world, (rank + 1) * batch // world)


# --- checkpoints and logs -----------------------------------------------------------------------

def save_checkpoint(path, kind, content):
    """Write {"kind": kind, ...}, under a temporary name first: interrupted, it loses nothing."""
    path, part = Path(path), Path(path).with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            torch.save({"kind": kind, **content}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as fault:
        part.unlink(missing_ok=True)
        why = str(fault.__context__ or fault).splitlines()[0]  # torch's own error does not say
        raise UserError(f"{path} cannot be written ({why}): what was there is as it was") from None
    os.replace(part, path)


def load_checkpoint(path, kind, hint):
    """Read a checkpoint; nothing in it is executed (weights_only). kind: vae or ldm."""
    if not Path(path).is_file():
        raise UserError(f"no {kind} checkpoint at {path}: {hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # whatever foreign bytes cause
        why = "holds code, never run" if "nsupported global" in str(fault) else "is damaged"
        raise UserError(f"{path} {why}: no nanopaint checkpoint") from None
    found = content.get("kind") if isinstance(content, dict) else None
    if found != kind:
        raise UserError(f"{path} is a checkpoint of another kind ({found}), not {kind}: {hint}")
    return content


def finished_or_resume(config, kind):
    """What `out`/model.pt holds, None where training starts anew. Its step is config.steps where
    it is finished and to be used as it is, and below with --resume. Anything else is refused: an
    unfinished run without --resume, other settings, another manifest."""
    path, table = Path(config.out) / "model.pt", Path(config.data)
    if config.overwrite or not path.exists():
        return None
    content = load_checkpoint(path, kind, "choose another --out")
    was, step = content["settings"], content["step"]
    faults = [f"{k} was {was.get(k)}" for k, v in asdict(config).items()
              if k not in FREE and was.get(k) != v]
    if table.exists() and hashlib.sha1(table.read_bytes()).hexdigest() != content["manifest"]:
        faults.append(f"{table} has changed")
    if step > config.steps or step < config.steps and not config.resume:
        faults.append(f"it has {step} steps of {config.steps}, --resume goes on")
    if faults:
        raise UserError(f"{path} exists ({'; '.join(faults)}): --overwrite trains it again, or "
                        "choose another --out")
    if step == config.steps:
        print(f"{path} is trained already ({step} steps; --overwrite trains it again)")
    return content


def train_if_missing(train, config):
    """train(config), which goes on where `out`/model.pt is unfinished and ends at once where it is
    finished under the same settings. Returns its path."""
    return train(replace(config, resume=True, overwrite=False))


def start_anew(out, step=0):
    """Leave in the log what a run from `step` on will not write again."""
    Path(out).mkdir(parents=True, exist_ok=True)
    before = [line for line in read_log(out) if step and line["step"] <= step]
    (Path(out) / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before))


def write_log(path, **values):
    """Append one line of JSON."""
    with open(path, "a") as file:
        file.write(json.dumps(values) + "\n")


def read_log(folder):
    """The lines of log.jsonl of a training run, but for a last one that was cut off."""
    path = Path(folder) / "log.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def main():
    join_processes()
    with main_first():
        config = settings(Config)
    train(config)


if __name__ == "__main__":
    run(main)
