"""Train the latent diffusion model. From an empty folder this draws a simulated screen, trains the
autoencoder, caches the latents, trains the U-Net and draws generated cells beside true ones.

    python train_ldm.py                       # everything, from nothing
    python train_ldm.py --overfit             # one batch: after any change, this loss must collapse
    python train_ldm.py --data plates/index.csv --vae runs/plates_vae/model.pt --out runs/plates \\
        --biology smiles dose --experiment plate:category
    python train_ldm.py --control_column brightfield    # a ControlNet on top: runs/brightfield
    torchrun --nproc_per_node=2 train_ldm.py  # two GPUs
"""
import copy
import functools
import hashlib
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
import diffusion
import train_vae
from conditioning import (MOLECULE_ENCODERS, Conditioner, FieldError, dose_fields, draw_keep,
                          draw_spelling, hide_molecule_of_controls, known_columns, parse_fields,
                          treatment_group)
from data import UserError
from sample import Model, hint_manifest, hint_of, read_rows
from train_vae import autocast, device, load_checkpoint, step_rng
from unet import SIZES, ControlNet, Denoiser, UNet, unet_config

VAE = "runs/vae/model.pt"
OF_BASE = ("vae", "biology", "experiment", "molecule_encoder", "fingerprint_bits", "size", "target",
           "fingerprint_radius", "molecule_table", "schedule", "zero_snr")  # also a ControlNet's


@dataclass
class Config(train_vae.Running):
    # data
    data: str = ""                        # the manifest; runs/data/manifest.csv, or the base's
    vae: str = ""                         # autoencoder, it fixes the split; runs/vae/model.pt
    biology: tuple = ("smiles", "dose")   # fields of this group, as NAME or NAME:KIND
    experiment: tuple = ("batch", "plate", "row:number", "column:number")  # fields of this group
    # model
    molecule_encoder: str = "fingerprint"  # or descriptors, graph, smiles, table, identity
    fingerprint_bits: int = 2048          # length of the fingerprint
    fingerprint_radius: int = 2           # bonds around each atom that a fingerprint sees
    molecule_table: str = ""              # .npz of vectors by SMILES, InChIKey or name, for table
    size: str = "small"                   # U-Net: tiny, small, base, large (unet.py)
    schedule: str = "cosine"              # noise: cosine, linear, scaled_linear
    target: str = "velocity"              # the U-Net predicts velocity, noise or image
    zero_snr: bool = True                 # end the schedule in pure noise
    min_snr: bool = False                 # weigh the loss by min(SNR, 5)
    uniform: float = 0.                   # share of time steps drawn uniformly, not logit-normally
    # ControlNet: the model also follows a conditioning image
    control_column: str = ""              # a column of images, columns a,b, or control_row
    base: str = "runs/ldm/model.pt"       # the model to which the ControlNet is added
    unfreeze_decoder: bool = False        # train the base's way up as well; a tenth sees no image
    # training
    out: str = ""                         # results go to this folder; runs/ldm, or runs/COLUMN
    steps: int = 10_000 if train_vae.GPU else 2000  # optimiser steps
    batch: int = 32                       # latents per step
    lr: float = 2e-3                      # peak learning rate, after warm-up, before decay
    ema: float = 0.999                    # decay of the averaged weights that sampling uses
    views: int = 2                        # random views of each image in the latent cache
    seed: int = 0                         # of weights, order, noise and dropout
    overfit: bool = False                 # one fixed batch, nothing saved: its loss must collapse


def train(config=Config()):
    """Train a diffusion model, or a ControlNet on its base, and write `out`/model.pt: its path."""
    config = settle(config)
    path, found = Path(config.out) / "model.pt", train_vae.finished_or_resume(config, "ldm")
    if found["step"] == config.steps:
        return path
    run = prepare(config, found)
    denoiser, model = run.denoiser, train_vae.for_training(run.denoiser, config.compile)
    average = copy.deepcopy(denoiser).requires_grad_(False)
    both = zip(average.parameters(), denoiser.parameters())
    averaged, weights = zip(*(pair for pair in both if pair[1].requires_grad))  # a base is frozen
    optimiser = torch.optim.AdamW(weights, lr=config.lr, betas=(.9, .99), fused=True)
    workers = config.workers if device().type == "cuda" else 0  # a CPU does not wait for a batch
    gpu = dict(multiprocessing_context="fork", pin_memory=True) if workers else {}  # not pickled
    progress = train_vae.Progress(Steps(run, config), config, found, "training the diffusion model",
                                  workers, **gpu)
    if found["step"]:
        optimiser.load_state_dict(found["optimiser"])
        average.load_state_dict(found["ema"])
    else:
        report(average, run, 0, progress)
    del found  # a checkpoint, which would stay in memory
    for step, batch in progress:
        batch = to_device(batch)
        optimiser.param_groups[0]["lr"] = train_vae.learning_rate(step, config.steps, config.lr)
        optimiser.zero_grad()
        loss = loss_of(model, batch, run, config)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.)
        optimiser.step()
        decay = min(config.ema, (1 + step) / (10 + step))  # of the averaged weights: warms up
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1 - decay)

        saves, evaluates = progress.after(step, loss, norm)
        if saves:
            train_vae.save_checkpoint(path, "ldm", run.saved | {
                "weights": denoiser.state_dict(), "ema": average.state_dict(),
                "optimiser": optimiser.state_dict(), "step": step + 1,
                "losses": [] if evaluates else progress.losses})
        if evaluates:
            report(average, run, step + 1, progress)
    if progress.writes and not train_vae.RANK:
        run.denoiser = average
        draw_curves(path.with_name("curves.png"), progress.entries)
        draw_samples(path.with_name("samples.png"), run)
        print(f"{path.parent} has model.pt, samples.png, curves.png; try sample.py, evaluate.py")
    return path


class Steps(torch.utils.data.Dataset):
    """steps[17] is what step 17 draws, from seed and number alone, so that a resumed run needs no
    stored state: a dict of CPU tensors, the part of the batch that this process computes."""

    def __init__(self, run, config):
        self.run, self.config, rows = run, config, run.training.rows
        weight = run.data.manifest.columns.get("weight", {i: 1 for i in rows})
        self.cumulative = np.cumsum(run.training.usable * [float(weight[i] or 0) for i in rows])
        if not self.cumulative[-1]:
            raise UserError(f"{config.data}: no image of weight above 0 can be read and shown")

    def __getitem__(self, step):
        c, n, run, fields = self.config, self.config.batch, self.run, self.run.fields
        encoder = run.denoiser.conditioner.encoder_class
        rng, noise_rng = step_rng(c.seed, 0 if c.overfit else step)
        positions = np.searchsorted(self.cumulative, rng.random(n) * self.cumulative[-1], "right")
        batch = run.training.batch(positions, rng, noise_rng)
        # logit-normal (Esser et al. 2024, arXiv:2403.03206): mostly where structure is made
        t = torch.randn(n, generator=noise_rng).sigmoid()
        if c.uniform:  # brightness and crowding are decided near t = T, which that seldom draws
            every = torch.rand(n, generator=noise_rng)
            t = torch.where(torch.rand(n, generator=noise_rng) < c.uniform, every, t)
        batch["t"] = (t * run.schedule.T).long()
        if not c.overfit:
            batch["keep"] &= draw_keep(fields, n, noise_rng)
            batch["codes"] = hide_molecule_of_controls(
                fields, batch["codes"], batch["keep"], run.training.molecules, noise_rng)
        batch["codes"] = draw_spelling(fields, batch["codes"], encoder, noise_rng)
        if batch["hint"]:
            _, _, known, shown = batch["hint"]
            known &= draw_keep(fields, n, noise_rng)  # a user may know none of its own conditions
            # on a frozen base a sample without the image would teach nothing
            shown[torch.rand(n, generator=noise_rng) < .1 * c.unfreeze_decoder] = 0.
        places = train_vae.part_of_batch(c)
        return each(lambda x: x[places.start:places.stop], batch)


def loss_of(model, batch, run, config):
    """The mean loss of the model for a batch as Steps draws it, a scalar."""
    def denoise(z, t):
        return model(z, t, batch["codes"], batch["keep"], run.molecules, batch["hint"])
    with autocast():
        return diffusion.diffusion_loss(run.schedule, denoise, batch["z0"], batch["eps"],
                                        batch["t"], config.min_snr).mean()


def each(function, x):
    """function(tensor) of every tensor in nested dicts and lists; None stays None."""
    if isinstance(x, dict):
        return {name: each(function, value) for name, value in x.items()}
    return x if x is None else function(x) if torch.is_tensor(x) else [each(function, v) for v in x]


to_device = functools.partial(each, lambda x: x.to(device(), non_blocking=True))


@torch.no_grad()
def predictions(denoiser, latents, schedule, count=512, shuffled=()):
    """The network on `count` latents with fixed noise, told all but the `shuffled` fields, which
    are those of other rows: (prediction (count, Z, h, w), loss (count,), quarter of the noise
    levels (count,), 0 with the least noise)."""
    rng, noise_rng = step_rng(12345, 0)
    positions = np.resize(rng.permutation(np.flatnonzero(latents.usable)), count)
    batch, other = latents.batch(positions, rng, noise_rng), rng.permutation(count)
    batch["t"] = torch.arange(count) * 7919 % count * schedule.T // count
    for i, field in enumerate(denoiser.conditioner.fields):
        if field.name in shuffled:
            batch["codes"][field.name] = batch["codes"][field.name][other]
            batch["keep"][:, i] = batch["keep"][other, i]
    molecules, found = to_device(latents.molecules), []
    for part in torch.arange(count).split(64):
        z0, eps, codes, keep, hint, t = to_device(each(lambda x: x[part], batch)).values()
        with autocast():
            prediction = denoiser(schedule.add_noise(z0, eps, t), t, codes, keep, molecules, hint)
        loss = (prediction - schedule.target_of(z0, eps, t)).square().flatten(1).mean(1)
        found.append(each(torch.Tensor.cpu, [prediction, loss, t * 4 // schedule.T]))
    return tuple(map(torch.cat, zip(*found)))


def report(average, run, step, progress):
    """Print and log the losses. At step 0 the held-out loss is 1.00 by construction, since the
    output starts at zero; with a ControlNet it is the base's."""
    _, loss, quarter = predictions(average, run.held, run.schedule)
    progress.log(step, heldout_loss=loss.mean().item(),
                 by_noise=[loss[quarter == q].mean().item() for q in range(4)])


class Latents:
    """One side of the split, on the CPU: cached posteriors (rows * views, 2, Z, h, w), nan where an
    image cannot be read, and encoded conditions. hints: the same of a ControlNet's images (rows *
    views, C, H, W), without the treatment; choices: the rows of hints of which each row is shown
    one at random, in the view of the same number, which is cropped and flipped alike."""

    def __init__(self, cache, vae, data, rows, conditioner, views=1, hints=None, choices=()):
        self.cache, self.rows, self.views, self.hints = cache, np.asarray(rows), views, hints
        self.statistics = vae and (vae.latent_mean.cpu(), vae.latent_std.cpu())
        hidden = None if vae else treatment_group(conditioner.fields)
        self.codes, self.known, self.molecules = conditioner.encode(
            known_columns(conditioner.fields, data.manifest.columns, rows, hidden), len(rows))
        self.usable = ~np.isnan(cache.reshape(len(cache), -1)[:, 0]).reshape(-1, views).any(1)
        if hints:
            place = {hints.rows[k]: k for k in np.flatnonzero(hints.usable)}
            self.choices = [[place[i] for i in listed if i in place] for listed in choices]
            self.usable &= [len(listed) > 0 for listed in self.choices]

    def read(self, positions, view):
        return torch.from_numpy(self.cache[positions * self.views + view].astype(np.float32))

    def take(self, positions, view, noise_rng):
        """Latents z_0 (B, Z, h, w), each a fresh sample of its posterior."""
        (mean, logvar), (shift, scale) = self.read(positions, view).unbind(1), self.statistics
        noise = torch.randn(mean.shape, generator=noise_rng)
        return (mean + (logvar / 2).exp() * noise - shift) / scale       # as VAE.standardise

    def batch(self, positions, rng, noise_rng):
        """What the loss needs of these positions but for timesteps, under all known conditions."""
        view, hint = rng.integers(self.views, size=len(positions)), None
        z0 = self.take(positions, view, noise_rng)
        codes, keep = each(lambda x: x[positions], [self.codes, self.known])
        if self.hints:
            shown = np.array([rng.choice(self.choices[k]) for k in positions])
            hint = [self.hints.read(shown, view), *each(
                lambda x: x[shown], [self.hints.codes, self.hints.known]), torch.ones(len(shown))]
        return {"z0": z0, "eps": torch.randn(z0.shape, generator=noise_rng), "codes": codes,
                "keep": keep, "hint": hint}


def cached(run, config, name, views, rows, count, shape, encode):
    """encode(x) of `count` random views x of each row, as a memory-mapped float16 array
    (rows * count, *shape), in a file beside the autoencoder whose name holds what it depends on. A
    run writes to a .part file of its own and renames it: killed, it begins anew; two that make the
    same file at the same time both do the work, and one replaces what the other has made."""
    m, keys = views.manifest, [(i, view) for i in rows for view in range(count)]
    weights = [w.cpu().numpy().tobytes() for w in run.vae.state_dict().values()]
    depends = [str(m.path.resolve()), m.sha1(), m.file_columns, views.intensity, views.crop,
               views.flips, views.binning, keys]
    key = hashlib.sha1(b"".join(weights) + repr(depends).encode()).hexdigest()[:12]
    beside = Path(config.vae).parent
    path = (beside if beside.exists() else Path(config.out)) / f"{name}-{key}.f16"
    if not path.exists() and not train_vae.RANK:
        part = path.with_suffix(f".{os.getpid()}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file, autocast():
            for x, _ in data.load(views, keys, workers=config.workers, what=name,
                                  max_corrupt=config.max_corrupt):
                file.write(encode(x).to("cpu", torch.float16).numpy().tobytes())
        part.replace(path)
    train_vae.average()  # the other processes wait
    return np.memmap(path, np.float16, "r", shape=(len(keys), *shape))


def open_side(run, config, name, rows, count, allowed):
    """The Latents of one side of the split; allowed: the rows that control_row may show there."""
    manifest, rows, shown, hints = run.data.manifest, rows.tolist(), run.controlnet, None
    conditioner, choices = run.denoiser.conditioner, [[i] for i in rows]
    latents = cached(run, config, f"latents-{name}", run.views, rows, count, (2, *run.latent_shape),
                     lambda x: torch.stack(run.vae.encode(x.to(device())), 1))
    if shown and shown["column"] == "control_row":
        untreated = np.flatnonzero(data.negative_controls(manifest.columns)).tolist()
        controls, allowed = {str(i + 2): i for i in untreated}, set(allowed)
        words = [manifest.columns["control_row"][i].split() for i in rows]
        data.report(manifest.path, [
            f"row {i + 2}, column control_row: row {n} is no negative control (all doses 0)"
            for i, listed in zip(rows, words) for n in listed if n not in controls])
        choices = [[controls[n] for n in listed if controls[n] in allowed] for listed in words]
    if shown:
        shown_rows = sorted({i for listed in choices for i in listed})
        images = cached(run, config, f"hints-{name}", run.hint_views, shown_rows, count,
                        run.hint_views.shape, lambda x: x)
        hints = Latents(images, None, run.data, shown_rows, conditioner, count)
    return Latents(latents, run.vae, run.data, rows, conditioner, count, hints, choices)


def settle(config):
    """The config with what it leaves open: paths, and for a ControlNet all that is its base's."""
    config = replace(config, overwrite=config.overwrite or config.overfit)
    if config.control_column:
        base = load_checkpoint(config.base, "ldm", "run python train_ldm.py")
        own, out = base["settings"], f"runs/{config.control_column.replace(',', '_')}"
        if base.get("controlnet"):
            raise UserError(f"{config.base} has a ControlNet already: --base takes a plain model")
        if base["step"] < own["steps"]:
            print(f"{config.base}: step {base['step']} of a training of {own['steps']}")
        return replace(config, data=config.data or own["data"], out=config.out or out,
                       **{name: own[name] for name in OF_BASE})
    if config.base != Config.base or config.unfreeze_decoder:
        raise UserError("--base and --unfreeze_decoder are for a run with --control_column")
    if config.uniform > 1:
        raise UserError(f"--uniform {config.uniform} is a share, 0 to 1")
    try:
        diffusion.Schedule(config.schedule, config.target, zero_snr=config.zero_snr)
    except ValueError as fault:
        raise UserError(f"--target {config.target}: {fault}") from None
    table = config.data or train_vae.Config.data
    if not config.vae and Path(VAE).exists():
        own = load_checkpoint(VAE, "vae", "")["settings"]["data"]
        if own != table:
            raise UserError(f"{VAE} was trained on {own}: train another with python train_vae.py "
                            f"--data {table} --out DIR, and name it by --vae")
    return replace(config, data=table, vae=config.vae or VAE, out=config.out or "runs/ldm")


def prepare(config, found):
    """Everything up to the first step: the Model, with its data, the Latents training and held, and
    saved, which is what every checkpoint holds. found: the checkpoint to go on from."""
    opened, content = open_all(config, found)
    run, s = Model(content, "weights" if found["step"] else "ema"), opened.settings
    run.denoiser.requires_grad_(not config.control_column)
    run.denoiser.conditioner.empty.requires_grad_(False)  # stays zero
    run.data = opened
    run.views = data.Views(opened.manifest, run.intensity, s.crop, s.flips, s.binning)
    if config.control_column:
        add_hints(run, config)
    run.saved = run.content | {
        "vae": content["vae"], "controlnet": run.controlnet, "settings": asdict(config),
        "manifest": opened.manifest.sha1()}
    run.training = open_side(run, config, "training", opened.train, config.views, opened.train)
    # where a plate is not trained on, its negative controls are held out
    run.held = open_side(run, config, "held-out", opened.held, 1, range(len(opened.manifest)))
    run.molecules = to_device(run.training.molecules)
    part = run.denoiser.controlnet or run.denoiser.unet
    print(f"{type(part).__name__} {config.size}: {sum(w.numel() for w in part.parameters()):,} "
          f"parameters, {run.training.usable.sum()} of {len(opened.train)} images to train on"
          + ", drawn by the column weight" * ("weight" in opened.manifest.columns) + "; told:",
          *(f"{f.name} ({f.kind}, {f.group})" for f in run.fields))
    return run


def open_all(config, found):
    """(the data, what fixes network and conditions): as in the checkpoint to go on from, that of
    the base, or of a new model. What is missing is made, once the columns are known to be sound."""
    first = train_vae.Config(data=config.data, workers=config.workers, threads=config.threads,
                             max_corrupt=config.max_corrupt, compile=config.compile)
    known, vae = found if found["step"] else {}, {"settings": asdict(first), "step": 0}
    if config.control_column and not known:
        known = load_checkpoint(config.base, "ldm", "")
    if known:
        vae = known["vae"]
    elif config.vae != VAE or Path(VAE).exists():
        vae = load_checkpoint(config.vae, "vae", "run python train_vae.py")
    faults, is_molecule = [], MOLECULE_ENCODERS[config.molecule_encoder].is_molecule
    try:
        opened = train_vae.open_data(SimpleNamespace(**vae["settings"] | {"data": config.data}))
    except UserError as fault:
        faults += str(fault).splitlines()
    try:  # the faults of the columns are reported beside those of the files
        columns = data.read_table(config.data)
        groups = {"biology": config.biology, "experiment": config.experiment}
        if known:
            groups = {"base": [f"{f['name']}:{f['kind']}" for f in known["fields"]]}
        groups["weight"] = ["weight:log"] * ("weight" in columns)  # a number of at least 0
        fields = parse_fields(groups, columns, is_molecule, config.data)
    except (UserError, FieldError) as fault:
        faults += str(fault).splitlines()
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    if known:
        return opened, known
    if config.vae == VAE and vae["step"] < vae["settings"]["steps"]:
        print("no finished autoencoder yet: training one")
        train_vae.train_if_missing(train_vae.train, first)
    return opened, new_content(config, opened, [f for f in fields if f.group != "weight"])


def new_content(config, opened, fields):
    """What the checkpoint of a new model holds at step 0."""
    vae, content = train_vae.load_vae(config.vae)
    manifest, s, f = opened.manifest, opened.settings, vae.config.downsampling
    fields = [field.fit(manifest.rows(opened.train, field.name)) for field in fields]
    _, h, w = data.Views(manifest, content["intensity"], s.crop, s.flips, s.binning).shape
    unet = unet_config(config.size, vae.config.latent_channels)
    step = f * 2 ** (len(unet.multipliers) - 1)
    if h % step or w % step:
        raise UserError(f"images of {w}x{h} pixels: the U-Net {config.size} wants an autoencoder "
                        f"with a --crop that is a multiple of {step}")
    smiles = {v for field in fields if field.kind == "molecule"
              for v in manifest.rows(opened.train, field.name)} - {""}
    encoder, molecules = config.molecule_encoder, MOLECULE_ENCODERS[config.molecule_encoder].fit(
        sorted(smiles) or ["C"], {"bits": config.fingerprint_bits, "table": config.molecule_table,
                                  "radius": config.fingerprint_radius})
    torch.manual_seed(config.seed)
    conditioner = Conditioner(fields, unet.embedding, unet.token, encoder, molecules)
    return dict(
        unet=asdict(unet), molecule_encoder=encoder, molecule_settings=molecules,
        schedule=dict(name=config.schedule, target=config.target, zero_snr=config.zero_snr),
        fields=[asdict(field) for field in fields], pixel_um=data.pixel_size(manifest, s.binning),
        latent_shape=[vae.config.latent_channels, h // f, w // f],
        vae={k: content[k] for k in ("config", "weights", "intensity", "settings")},
        ema=Denoiser(UNet(unet), conditioner).state_dict())


def add_hints(run, config):
    """Views of the conditioning images, and for a new run the ControlNet that looks at them."""
    images, s, column = run.data.manifest, run.data.settings, config.control_column
    hints, net = hint_manifest(column, images), run.denoiser
    if images.sizes != hints.sizes or list(run.views.shape[1:]) != run.size:
        raise UserError(f"{config.data}: images of {[*images.sizes]} pixels, in column {column} of "
                        f"{[*hints.sizes]}, and the base draws {run.size}: they have to agree")
    if not run.controlnet:
        channels = data.Views(hints, run.intensity).shape[0]
        # one file with as many channels as there are stains: the stains themselves
        stains = channels == len(images.channels) and "," not in column
        intensity = run.intensity if stains else data.fit_intensity(
            "percentile", hints, run.data.train, s.binning)
        run.controlnet = dict(column=column, channels=channels, downsampling=s.downsampling,
                              stains=stains, intensity=intensity)
        torch.manual_seed(config.seed)
        net.controlnet = ControlNet(net.unet, channels, s.downsampling).to(device())
    net.controlnet.requires_grad_(True)
    net.unet.up.requires_grad_(config.unfreeze_decoder)
    net.unet.out.requires_grad_(config.unfreeze_decoder)
    run.hint_views = data.Views(hints, run.controlnet["intensity"], s.crop, s.flips, s.binning)


def draw_samples(path, run, count=8):
    """Held-out images above generated ones, of each mechanism (or what is told first) one at its
    highest dose; with a ControlNet what it saw."""
    manifest, columns = run.data.manifest, run.data.manifest.columns
    names = [field.name for field in run.fields] or [*columns]
    if "true_mechanism" in columns:
        names = ["true_mechanism", "dose", "batch"]
    doses = [columns[field.name] for field in dose_fields(run.fields)]
    rows = sorted(run.held.rows[run.held.usable], key=lambda i: [float(d[i] or 0) for d in doses])
    rows = [*{columns[names[0]][i]: int(i) for i in rows}.values()][-count:]
    hint = hint_of(run, run.data, rows)
    true, known = read_rows(run, manifest, rows, run.settings.crop)
    pictures = {"held out": true, "generated": run.generate(known, range(len(rows)), hint=hint)}
    if hint:
        pictures = {"shown": hint[0] if run.controlnet["stains"] else hint[0][:, 0]} | pictures
    labels = ["\n".join(columns[name][i][:12] for name in names[:3]) for i in rows]
    data.picture(path, [*map(list, pictures.values())], run.channels, [*pictures], labels,
                 run.pixel_um)


def draw_curves(path, log):
    """The lines of log.jsonl as a picture: losses, and the held-out one by noise level."""
    steps, held = [entry["step"] for entry in log], [entry["heldout_loss"] for entry in log]
    with data.figure(path, figsize=(5, 3)) as axis:
        axis.plot(steps[1:], [entry["train_loss"] for entry in log[1:]], label="training")
        axis.plot(steps, held, label="held out (EMA)")
        axis.plot(steps, [entry["by_noise"] for entry in log], ":", label=[
            "least noise", "less", "more", "most noise"])
        axis.set(xlabel="step", ylabel="squared error", ylim=(0, 1.1)), axis.legend(fontsize=7)


def main():
    train_vae.join_processes()
    config = train_vae.settings(Config, choices=dict(
        size=SIZES, schedule=diffusion.SCHEDULES, target=diffusion.TARGETS,
        molecule_encoder=MOLECULE_ENCODERS))
    for word in sys.argv if config.control_column else ():
        if word.partition("=")[0].replace("--no-", "--") in [f"--{name}" for name in OF_BASE]:
            raise UserError(f"{word} is that of the base: a ControlNet cannot change it")
    train(config)


if __name__ == "__main__":
    train_vae.run(main)
