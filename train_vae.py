"""Train the autoencoder (vae.py). What both training scripts share stands here too, behind the
training itself: settings, devices, processes, checkpoints.

    python train_vae.py                                   # the simulated screen
    python train_vae.py --data plates/index.csv --binning 2 --crop 64 --out runs/plates_vae
    torchrun --nproc_per_node=2 train_vae.py              # two GPUs
    python train_vae.py --pixels --out runs/pixels_vae    # none: the baseline that needs no latents
"""
import argparse
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

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from conditioning import FieldError
from data import CHANNELS, UserError
from vae import VAE, VAEConfig, kl_divergence, vae_loss


GPU = torch.cuda.is_available()


@dataclass
class Running:
    """Settings of both training scripts that change nothing of what is learned."""
    eval_every: int = 500                 # steps between evaluations and checkpoints
    resume: bool = False                  # go on from model.pt
    overwrite: bool = False               # train again where model.pt exists
    compile: bool = GPU                   # torch.compile
    threads: int = 0                      # of the CPU; 0 times one thread and all, takes the faster
    workers: int = 4                      # processes that read images; 0: the one that trains
    max_corrupt: float = 0.01             # share of images that may be unreadable and are left out


@dataclass
class Config(Running):
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
    spectral_weight: float = 0.3          # weight of the difference of Fourier amplitudes
    # training
    out: str = "runs/vae"                 # model.pt, reconstruction.png and log.jsonl go here
    steps: int = 10_000 if GPU else 4200  # optimiser steps
    batch: int = 8                        # images per step
    lr: float = 2e-3                      # peak learning rate, after warm-up, before decay
    seed: int = 0                         # of weights, order and noise


FREE = {"steps", "out", "overfit", *(f.name for f in fields(Running))}  # may change on --resume
NOISE = 3  # purpose of the random numbers of a step, beside data.VIEW and data.ROWS
ALL_THREADS = torch.get_num_threads()


# --- training -------------------------------------------------------------------------------------

def train(config=Config()):
    """Train an autoencoder and write `out`/model.pt. Returns its path."""
    path, places = Path(config.out) / "model.pt", part_of_batch(config)
    found = finished_or_resume(config, "vae")
    if found["step"] == config.steps:
        return path
    run = prepare(config, found)
    if config.pixels:  # nothing to train
        save(run, config, config.steps)
        return path
    model = for_training(run.vae, config.compile)
    optimiser = torch.optim.AdamW(run.vae.parameters(), lr=config.lr, betas=(.9, .99), fused=True)
    if found["step"]:
        optimiser.load_state_dict(found["optimiser"])
    steps = Steps(run, config, places)
    progress = Progress(steps, config, found, "training the autoencoder", config.workers,
                        pin_memory=GPU)
    for step, (x, noise, faults) in progress:
        steps.leave_out(faults)
        x, noise = (tensor.to(device(), non_blocking=True) for tensor in (x, noise))
        optimiser.param_groups[0]["lr"] = learning_rate(step, config.steps, config.lr)
        optimiser.zero_grad()
        loss, l1 = loss_of(model, x, noise, config)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(run.vae.parameters(), 1.)
        optimiser.step()

        saves, evaluates = progress.after(step, l1, norm)
        if saves:
            save(run, config, step + 1, optimiser, [] if evaluates else progress.losses)
        if evaluates:
            report(run, config, step + 1, progress)
    return path


def loss_of(model, x, noise, config):
    """(loss, L1 on [0, 1]) of the model for views x and the noise of their latents."""
    with autocast():
        x_hat, mean, logvar = model(x, noise)
    loss, l1, _ = vae_loss(x, x_hat, mean, logvar, config.kl_weight, config.spectral_weight)
    return loss, l1 / 2


class Steps(torch.utils.data.Dataset):
    """steps[17] is what step 17 draws, by its number alone: images (b, C, h, w), the noise of their
    latents, and what is wrong with unreadable images, for which others were drawn. b: the places of
    the batch that this process computes."""

    def __init__(self, run, config, places):
        self.views, self.rows, self.config, self.places = run.views, run.train, config, places
        self.unreadable = set()

    def __getitem__(self, step):
        c, images, faults = self.config, [], []
        for place in self.places:
            rng = data.keyed_rng(c.seed, data.ROWS, step, place)
            for _ in range(20):
                x, fault = self.views[int(rng.choice(self.rows)), int(rng.integers(2 ** 31))]
                if not fault:
                    break
                faults.append(fault)
            images.append(x)
        shape = c.batch, c.latent_channels, *(n // c.downsampling for n in x.shape[1:])
        noise = torch.randn(shape, generator=step_rng(c.seed, step)[1])
        return torch.stack(images), noise[self.places.start:self.places.stop], faults

    def leave_out(self, faults):
        """Name unreadable images, each once; too many of them end the run."""
        for fault in {*faults} - self.unreadable:
            tqdm.write(f"left out: {fault}")
        self.unreadable |= {*faults}
        if len(self.unreadable) > self.config.max_corrupt * len(self.rows):
            raise UserError(f"{len(self.unreadable)} of {len(self.rows)} images are unreadable, "
                            "more than --max_corrupt")


def prepare(config, found):
    """The data with the VAE, views, held-out images and what every checkpoint holds. found: the
    checkpoint to go on from."""
    run, f = open_data(config), config.downsampling
    channels, z = len(run.manifest.channels), config.latent_channels
    shape = VAEConfig(channels, channels * f * f if config.pixels else z, f, config.fold,
                      config.width, config.blocks, config.pixels)
    torch.manual_seed(config.seed)
    try:
        run.vae = VAE(shape).to(device())
    except ValueError as fault:  # of widths that do not fit together
        raise UserError(fault) from None
    if found["step"]:
        run.vae.load_state_dict(found["weights"])
    intensity = found["intensity"] if found["step"] else data.fit_intensity(
        config.intensity, run.manifest, run.train, config.binning)
    run.views = data.Views(run.manifest, intensity, config.crop, config.flips, config.binning,
                           config.seed)
    count = max(16, min(256, 2 ** 20 // math.prod(run.views.shape[1:])))  # fewer of large images
    rows = data.keyed_rng(0, data.ROWS, 0, 0).permutation(run.held)[:count]  # from all plates
    x = torch.cat([x for x, _ in data.load(run.views, [(i, -1) for i in rows], max_corrupt=.5)])
    run.images = x[x.isfinite().flatten(1).all(1)]
    run.saved = {"config": asdict(shape), "intensity": intensity, "settings": asdict(config),
                 "manifest": run.manifest.sha1()}
    print(f"autoencoder: {sum(w.numel() for w in run.vae.parameters()):,} parameters, "
          f"{channels * f * f} pixel values to {z} numbers, {len(run.train)} images to train on")
    return run


def save(run, config, step, optimiser=None, losses=()):
    """Save a checkpoint. The last one holds the measured latents."""
    if step == config.steps:
        measure_latents(run, config)
    save_checkpoint(f"{config.out}/model.pt", "vae", run.saved | {
        "weights": run.vae.state_dict(), "optimiser": optimiser and optimiser.state_dict(),
        "step": step, "losses": losses})


@torch.no_grad()
def measure_latents(run, config):
    """Mean and standard deviation per channel of posterior *samples*, written into the VAE."""
    steps, samples = Steps(run, config, range(config.batch)), []
    rng = torch.Generator().manual_seed(0)
    for k in range(math.ceil(512 / config.batch)):
        mean, logvar = run.vae.encode(steps[config.steps + k][0].to(device()))
        noise = torch.randn(mean.shape, generator=rng).to(device())
        samples.append(mean + (logvar / 2).exp() * noise)
    samples = torch.cat(samples)
    run.vae.latent_mean.copy_(samples.mean((0, 2, 3), keepdim=True))
    run.vae.latent_std.copy_(samples.std((0, 2, 3), keepdim=True))


def report(run, config, step, progress):
    """Print and log how well held-out images come through; at the end draw three of them."""
    x_hat, kl = reconstruct(run.vae, run.images)
    progress.log(step, kl=kl.mean().item(), **reconstruction_metrics(run.images, x_hat))
    if step == config.steps and not RANK:
        triples = [(a, b, 3 * (a - b).abs() - 1) for a, b in zip(run.images[:3], x_hat)]
        data.picture(f"{config.out}/reconstruction.png", [[x, *x] for t in triples for x in t],
                     run.manifest.channels, ["original", "through the VAE", "3 x difference"] * 3,
                     ["all", *run.manifest.channels])
        print(f"{config.out} has model.pt and reconstruction.png")


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


# --- data and trained autoencoders ----------------------------------------------------------------

def open_data(config, draw=True):
    """The images as a Config says, checked and split: settings, manifest, train and held (its
    rows). draw: the default ones are simulated where they are missing."""
    if draw and not RANK and config.data == Config.data and not Path(config.data).exists():
        print("no data yet: drawing a simulated screen")
        data.simulate(Path(config.data).parent)
    average()  # the other processes wait
    manifest = data.read_manifest(config.data, tuple(config.channels.split(",")))
    crop, f, several = config.crop, config.downsampling, len(manifest.sizes) > 1
    for (h, w), where in manifest.sizes.items():
        h, w = h // config.binning, w // config.binning
        if min(h, w) < max(1, crop) or (crop or h) % f or (crop or w) % f or several and not crop:
            raise UserError(f"{manifest.path}, {where}: {w}x{h} pixels, but all views must be of "
                            f"one size, a multiple of {f}: choose a --crop")
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


class Progress:
    """for step, batch in progress: the steps of a run that are left and what `draws` draws for
    each, with a bar. On a CPU it chooses the number of threads. Ctrl-C and SIGTERM are only noted,
    so that the running step can be finished and saved; then the program ends. Reading a number from
    a GPU waits for all it has been given to do, so there losses are read every `period` steps."""
    period = 20 if GPU else 1

    def __init__(self, draws, config, found, what, workers, **loader):
        first, self.config, self.losses = found["step"], config, [*found["losses"]]
        self.entries = [e for e in read_log(config.out) if e["step"] <= first] if first else []
        self.noted, self.stop, self.writes = 0, 0, not getattr(config, "overfit", False)
        self.unread = []
        self.bar = tqdm(range(first, config.steps), what, config.steps, initial=first,
                        mininterval=1, disable=RANK > 0)
        self.batches = data.loader(draws, range(first, config.steps), workers, batch_size=None,
                                   **loader)
        self.count, self.waited, self.since = 0, 0., time.time()

    def __iter__(self):
        batches, threads = iter(self.batches), choose_threads(self.config.threads)
        next(threads)
        before = {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            for step in self.bar:
                asked = time.time()
                batch, began = next(batches), time.time()
                self.waited, self.count = self.waited + began - asked, self.count + 1
                yield step, batch
                if self.stop:
                    tqdm.write(f"stopped by {signal.Signals(self.stop).name} after step {step + 1} "
                               f"of {self.config.steps}: the same command goes on (train_vae.py "
                               "and train_ldm.py with --resume)", sys.stderr)
                    sys.exit(128 + self.stop)
                if self.since <= began:  # a step that did not evaluate
                    threads.send(time.time() - began)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def note(self, number, frame):
        self.noted = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C interrupts

    def after(self, step, loss, norm):
        """Note loss and gradient norm of a step, scalars on the device. Returns whether to save now
        (every eval_every steps, at the end, and when this process or another one was sent a signal)
        and whether to evaluate. What is not finite ends the run before anything is saved."""
        self.unread.append(torch.stack([loss.detach(), norm]))
        [noted] = average([self.noted])
        self.stop = noted and (self.noted or signal.SIGTERM)
        evaluates = (step + 1) % self.config.eval_every == 0 or step + 1 == self.config.steps
        if not evaluates and not noted and (step + 1) % self.period:
            return False, False
        losses, norms = torch.stack(self.unread, 1).tolist()
        losses = average(losses)
        for k, (loss, norm) in enumerate(zip(losses, norms), step + 1 - len(losses)):
            if not math.isfinite(loss + norm):
                raise UserError(f"step {k}: the loss is {loss}, its gradient {norm}; "
                                f"{self.config.out} stays as it was, try a smaller --lr")
        self.losses, self.unread = self.losses + losses, []
        return self.writes and bool(evaluates or noted), evaluates

    def log(self, step, **found):
        """Print what was found after `step` steps and add it to log.jsonl, with the mean loss since
        the last time, images a second, the share of time in which the next batch was not ready
        and the memory held at most (of the GPU where there is one)."""
        seconds, gpu = time.time() - self.since, torch.cuda.max_memory_allocated()
        if self.losses:
            found = {"train_loss": sum(self.losses) / len(self.losses)} | found | {
                "images_per_second": self.count * self.config.batch / seconds,
                "data_wait": self.waited / seconds, "peak_gb": gpu / 1e9 or resource.getrusage(
                    resource.RUSAGE_SELF).ru_maxrss / 1e6}
        self.count, self.waited, self.since, self.losses = 0, 0., time.time(), []
        self.entries.append({"step": step} | found)
        tqdm.write(f"step {step}: " + ", ".join(f"{name} " + " ".join(
            f"{v:.3g}" for v in np.ravel(value)) for name, value in found.items()))
        if self.writes and not RANK:
            part = Path(self.config.out) / "log.tmp"
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))
            part.replace(part.with_suffix(".jsonl"))


def choose_threads(requested):
    """Sets the number of threads of a CPU for the next step, whenever it is sent the seconds that
    one took. Eight steps take turns with one thread and with all; then the faster stays for 200
    steps, or until three in a row take twice as long: another program has begun. All threads have
    to gain a tenth, since beside another program they cost far more."""
    if requested:
        torch.set_num_threads(requested)
    chosen = yield  # the first step is slow by itself
    while requested or "OMP_NUM_THREADS" in os.environ or device().type != "cpu":
        yield
    while True:
        one, every, before, slow = [], [], chosen, 0
        while len(every) < 4 and (not every or every[-1] < 3 * one[-1]):
            torch.set_num_threads(1)
            one.append((yield))
            torch.set_num_threads(ALL_THREADS)
            every.append((yield))
        one, every = min(one), min(every)
        chosen = 1 if one < 1.1 * every else ALL_THREADS
        torch.set_num_threads(chosen)
        if chosen != before:
            tqdm.write(f"threads: {chosen}, as a step takes {one:.3f} s with one, {every:.3f} s "
                       f"with all {ALL_THREADS}")
        for _ in range(200):
            slow = slow + 1 if (yield) > 2 * min(one, every) else 0
            if slow == 3:
                break


# --- settings, errors, device ---------------------------------------------------------------------

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
        if WORLD > 1:
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
        least = 1 if field.type is int and field.default and field.name != "workers" else 0
        if field.type in (int, float) and not least <= values[field.name] < 2 ** 63:  # or nan
            parser.error(f"--{field.name} {values[field.name]} is out of range: at least {least}")
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
    """What the training loop calls instead of `model`: channels-last on a GPU, gradients averaged
    over the processes, compiled if asked, where there is a compiler."""
    if device().type == "cuda":
        model.to(memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = True  # tries the algorithms of a shape once
    if WORLD > 1:
        empty = any(not w.numel() for w in model.parameters())  # of a model that is told nothing
        model = DistributedDataParallel(model, find_unused_parameters=empty)
    if compiled:
        try:  # next to nothing first, to say in one line what this machine lacks
            torch.compile(torch.sin)(torch.zeros(1, device=device()))
        except RuntimeError as fault:
            print(f"not compiled, so slower: {str(fault).splitlines()[0]}")
            return model
        print("compiled; --no-compile trains without")
        torch.compiler.reset()  # of the models before this one, of which few are kept
        model.compile()
    return model


# --- several processes, as torchrun starts them ---------------------------------------------------
# Each computes the gradient of its part of a batch; their mean is that of the batch, whatever their
# number. The first process alone prints and writes.

RANK, WORLD = 0, 1  # the number of this process, and how many there are


def join_processes():
    """Under torchrun: meet the other processes. Started alone: nothing."""
    global RANK, WORLD
    if "LOCAL_RANK" in os.environ:  # CPU tensors go by gloo, where they wait for no GPU
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))  # of encoding, perhaps
        RANK, WORLD = dist.get_rank(), dist.get_world_size()
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        if RANK:
            sys.stdout = open(os.devnull, "w")


def average(values=(0,)):
    """A list of numbers, averaged over the processes: alike in all of them, once all are here."""
    values = torch.tensor(values, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(values)
    return (values / WORLD).tolist()


def part_of_batch(config):
    """The places of a batch that this process computes: a range."""
    if config.batch % WORLD:
        raise UserError(f"--batch {config.batch} is no multiple of the {WORLD} processes")
    return range(config.batch)[RANK * config.batch // WORLD:(RANK + 1) * config.batch // WORLD]


# --- checkpoints and logs -------------------------------------------------------------------------

def save_checkpoint(path, kind, content):
    """Write {"kind": kind, ...}, under a temporary name first: interrupted, it loses nothing. Of
    several processes the first one writes, the others wait."""
    part = Path(path).with_suffix(".tmp")
    if not RANK:
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                torch.save({"kind": kind, **content}, file)
        except (OSError, RuntimeError) as fault:  # torch's own error does not say what is wrong
            raise UserError(f"{path} stays as it was: {fault.__context__ or fault}") from None
        os.replace(part, path)
    average()


def load_checkpoint(path, kind, hint):
    """Read a checkpoint of this kind, vae or ldm; nothing in it is executed (weights_only)."""
    if not Path(path).is_file():
        raise UserError(f"no {kind} checkpoint at {path}: {hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["kind"]
    except Exception:  # whatever foreign bytes cause
        raise UserError(f"{path} is damaged, or no checkpoint of nanopaint") from None
    if found != kind:
        raise UserError(f"{path} is a checkpoint of another kind ({found}), not {kind}: {hint}")
    return content


def finished_or_resume(config, kind):
    """The checkpoint `out`/model.pt: after config.steps steps where it is finished, fewer with
    --resume, none where training starts anew. Refused are an unfinished run without --resume, other
    settings, another manifest."""
    path, table = Path(config.out) / "model.pt", Path(config.data)
    if config.overwrite or not path.exists():
        return {"step": 0, "losses": []}
    content = load_checkpoint(path, kind, "choose another --out")
    was, step = content["settings"], content["step"]
    faults = [f"{k} was {was.get(k)}" for k, v in asdict(config).items()
              if k not in FREE and was.get(k) != v]
    if table.exists() and hashlib.sha1(table.read_bytes()).hexdigest() != content["manifest"]:
        faults.append(f"{table} has changed")
    if step > config.steps or step < config.steps and not config.resume:
        faults.append(f"it has {step} steps of {config.steps}, " + (
            "--resume goes on" if step < config.steps else f"--steps {step} keeps it"))
    if faults:
        raise UserError(f"{path} exists ({'; '.join(faults)}): --overwrite trains it again, or "
                        "choose another --out")
    if step == config.steps:
        print(f"{path} is trained already ({step} steps; --overwrite trains it again)")
    return content


def train_if_missing(train, config):
    """train(config), from where `out`/model.pt is; finished, it is used as it is. Its path."""
    return train(replace(config, resume=True, overwrite=False))


def read_log(folder):
    """The lines of log.jsonl of a training run, as dicts."""
    path = Path(folder) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main():
    join_processes()
    train(settings(Config))


if __name__ == "__main__":
    run(main)
