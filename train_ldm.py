"""Train the latent diffusion model. From an empty folder this draws a simulated screen, trains the
autoencoder, caches the latents, trains the U-Net and draws generated cells beside real ones.

    python train_ldm.py                       # everything, from nothing
    python train_ldm.py --overfit             # one batch: after any change, this loss must collapse
    python train_ldm.py --data plates/index.csv --vae runs/plates_vae/model.pt --out runs/plates \\
        --biology smiles dose --experiment plate:category
    python train_ldm.py --control_column brightfield    # a ControlNet on top: runs/brightfield
    torchrun --nproc_per_node=2 train_ldm.py  # two GPUs
"""
import contextlib
import copy
import fcntl
import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import data
import diffusion
import train_vae
from conditioning import (MOLECULE_ENCODERS, FieldError, check_values, dose_fields, draw_keep,
                          hide_molecule_of_controls, is_number, of_manifest, parse_fields,
                          treatment_group)
from sample import Denoiser, Model, control_pixels, metadata, to_device
from train_vae import (Loop, UserError, ahead, autocast, count_flops, device, for_training,
                       is_main, learning_rate, load_checkpoint, main_first, on_its_way, parts,
                       save_checkpoint, start_anew, step_rng, views, write_log)
from unet import SIZES, ControlNet, unet_config


@dataclass
class Config:
    # data
    data: str = train_vae.Config.data     # the manifest; the default one is drawn if it is missing
    vae: str = "runs/vae/model.pt"        # autoencoder, trained if missing; it fixes the split
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
    # ControlNet: another image of the field, or of the plate, that the model is shown
    control_column: str = ""              # a column of images, columns a,b of one channel, negcon
    control_by: str = "plate"             # negcon: a control drawn from rows with the same value
    control_dropout: float = 0.1          # share of samples without control (unfrozen decoder only)
    base: str = "runs/ldm/model.pt"       # the model to which the ControlNet is added
    unfreeze_decoder: bool = False        # train the base's way up as well
    # training
    out: str = "runs/ldm"                 # model.pt, samples.png, curves.png, log.jsonl go here
    steps: int = 2000                     # optimiser steps
    batch: int = 32                       # latents per step
    lr: float = 2e-3                      # peak learning rate, after warm-up, before decay
    ema: float = 0.999                    # decay of the averaged weights that sampling uses
    balance: float = 0.0                  # 1 draws rare pairs of conditions as often as common ones
    restain: float = 0.0                  # share of treated images seen as another plate shows them
    views: int = 2                        # random views of each image in the latent cache
    seed: int = 0                         # of weights, order, noise and dropout
    eval_every: int = 500                 # steps between held-out losses and checkpoints
    keep: int = 0                         # the last so many checkpoints stay, as step-N.pt
    resume: bool = False                  # go on from model.pt
    overwrite: bool = False               # train again where model.pt exists
    overfit: bool = False                 # one fixed batch, nothing saved: its loss must collapse
    # memory and speed: what is learned stays the same
    accumulate: int = 1                   # parts of a batch that are computed one after the other
    compile: bool = False                 # torch.compile, for a GPU
    workers: int = 4                      # processes that read image files
    max_corrupt: float = 0.01             # share of images that may be unreadable and are left out


# --- latents ------------------------------------------------------------------------------------

def batches_of_views(pixels, rows, config, intensity, views_each, first=0, state=None):
    """The random views that the cache holds, in batches of 64, always the same ones, from view
    number `first` on: (views, state of the random numbers after them)."""
    rows, rng = np.repeat(rows, views_each), np.random.default_rng(0)
    rng.bit_generator.state = state or rng.bit_generator.state

    def batch(i):
        return views(pixels, rows[i:i + 64], config, intensity, rng), rng.bit_generator.state
    return ahead(batch, range(first, len(rows), 64))


def cache_latents(vae, pixels, rows, config, intensity, views_each, folder, name, restained=None):
    """Posterior means and log variances of `views_each` random views of each row, as a memory-
    mapped float16 array (rows * views, 2, Z, h, w). Caching keeps the augmentation: many views.
    The last rows may be `restained` ones.

    The file lies beside the autoencoder, where other runs find it too; its name holds what it
    depends on: number of views, autoencoder, manifest and rows.
    """
    weights = b"".join(tensor.cpu().numpy().tobytes() for tensor in vae.state_dict().values())
    moves = repr((restained.moves, restained.control_rows)).encode() if restained else b""
    key = cache_key(pixels, rows, config, intensity, weights + moves)
    path = Path(folder) / f"latents-{name}-{views_each}views-{key}.npy"

    @torch.no_grad()
    def posterior(x, first):
        if restained:
            x = restained.apply(x, np.arange(first, first + len(x)) // views_each)
        with autocast():
            return torch.stack(vae.encode(x.to(device())), 1)
    return cache(path, (pixels, rows, config, intensity, views_each), posterior,
                 f"latents of the {name} images")


def cache_key(pixels, rows, config, intensity, more=b""):
    """Twelve letters that change with anything that the views of these rows depend on."""
    manifest = pixels.manifest
    text = (f"{manifest.path.resolve()}{manifest.sha1()}{intensity}{config.crop}{config.flips}"
            f"{config.binning}")
    return hashlib.sha1(more + np.asarray(rows).tobytes() + text.encode()).hexdigest()[:12]


def cache(path, source, encode, what):
    """encode(views, number of the first) of all rows as one memory-mapped float16 array
    (rows * views, ...) in a file, which is used as it stands if it is there and whole. source: as
    batches_of_views takes it.

    Beside it lies a note: how far it is, the state of the random numbers, and the images that
    cannot be read, which `pixels.corrupt` then holds. A killed run goes on from there.
    """
    pixels, total = source[0], len(source[1]) * source[4]
    note, part = path.with_suffix(".json"), path.with_suffix(".tmp")
    if not is_whole(path, note, total):
        with open(part, "ab") as lock:  # another run that builds the same is waited for
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_whole(path, note, total):
                try:
                    fill(part, note, source, encode, total, what)
                except OSError as fault:
                    raise UserError(f"{path} cannot be written ({data.one_line(fault)}): make room "
                                    "and run again, it goes on from where it was") from None
                part.rename(path)
        part.unlink(missing_ok=True)
    pixels.corrupt |= {int(i): why for i, why in read_note(note)["corrupt"].items()}
    return np.load(path, mmap_mode="r")


NOTHING = {"done": 0, "bytes": 0, "rng": None, "corrupt": {}}


def read_note(note):
    return json.loads(note.read_text()) if note.exists() else NOTHING


def is_whole(path, note, total):
    """Whether a cache is there, of the right length and finished."""
    try:
        return len(np.load(path, mmap_mode="r")) == total == read_note(note)["done"]
    except (OSError, ValueError, EOFError):
        return False


def fill(part, note, source, encode, total, what):
    """Write a cache, or the rest of one, and every 1024 views the note of how far it is."""
    told, pixels = read_note(note), source[0]
    if part.stat().st_size < told["bytes"]:
        told = NOTHING
    done, fresh = told["done"], note.with_suffix(".json.tmp")
    pixels.corrupt |= {int(i): why for i, why in told["corrupt"].items()}
    batches = batches_of_views(*source, first=done, state=told["rng"])
    with open(part, "r+b") as file:
        file.truncate(file.seek(told["bytes"]))
        for x, state in tqdm(batches, desc=what, initial=done // 64, total=-(-total // 64)):
            y = encode(x, done).cpu().numpy().astype(np.float16)
            if not done:
                np.lib.format.write_array_header_1_0(file, {
                    "descr": y.dtype.str, "fortran_order": False, "shape": (total, *y.shape[1:])})
            file.write(y.tobytes())
            done += len(y)
            if done % 1024 == 0 or done == total:
                file.flush()
                os.fsync(file.fileno())
                fresh.write_text(json.dumps({"done": done, "bytes": file.tell(), "rng": state,
                                             "corrupt": dict(pixels.corrupt)}))
                fresh.replace(note)


class Latents:
    """One side of the split, ready for training: cached posteriors and encoded metadata."""

    def __init__(self, cache, vae, manifest, rows, conditioner, each, balance=0., controls=None,
                 corrupt=(), restained=None):
        self.cache, self.vae, self.rows, self.each = cache, vae, rows, each
        self.controls = controls
        # instead of a row whose image cannot be read, the next one that can be is drawn
        sound = np.flatnonzero(~np.isin(rows, list(corrupt)))
        self.sound = sound[np.searchsorted(sound, np.arange(len(rows))) % len(sound)]
        told = metadata(conditioner.fields, manifest, rows)
        if restained:
            restained.tell(told)
            self.share = restained.shares(conditioner.fields, manifest, rows, balance)
        else:
            self.share = pair_shares(conditioner.fields, manifest, rows, balance)
        self.codes, self.known, self.molecules = to_device(conditioner.encode(told, len(rows)))

    def draw(self, places, view, noise_rng):
        """Latents (B, Z, h, w) of these places among the rows, each a fresh posterior sample."""
        pair = torch.from_numpy(self.cache[places * self.each + view].astype(np.float32))
        mean, logvar = pair.unbind(1)
        noise = torch.randn(mean.shape, generator=noise_rng)
        mean, logvar, noise = (on_its_way(x) for x in (mean, logvar, noise))
        return self.vae.standardise(mean, logvar, noise)

    def conditions(self, places):
        return {name: code[places] for name, code in self.codes.items()}, self.known[places]


CONTROLS_NEEDED, CONTROLS_SEEN = 8, 96  # images of negative controls that tell a plate's style


class Restained:
    """Treated training rows once more, each as another plate would show it (data.restain), chosen
    at random: so a molecule is seen in other batches, however the screen was laid out.

    A plate is one combination of the category fields beside the treatment (batch B2, plate P04)
    that has CONTROLS_NEEDED negative controls or more in training. `rows`: of the manifest;
    `moves`: from which plate to which, (own, other) for each; `values`: {field: {plate: value}} of
    the fields that are told anew, those categories and every number that is one for a whole plate.
    """

    def __init__(self, p, rows, share):
        self.p, self.share, self.plain, self.control_rows = p, share, len(rows), {}
        columns, group = p.manifest.columns, treatment_group(p.fields)
        beside = [f for f in p.fields if f.group != group]
        names = [f.name for f in beside if f.kind == "category"]
        plates = {i: tuple(columns[name][i] for name in names) for i in rows}
        controls = untreated(p.manifest, p.fields, rows)
        for i in np.random.default_rng(1).permutation(controls).tolist():
            self.control_rows.setdefault(plates[i], []).append(i)
        self.control_rows = {plate: found[:CONTROLS_SEEN]
                             for plate, found in sorted(self.control_rows.items())
                             if len(found) >= CONTROLS_NEEDED and all(plate)}
        doses = [f.name for f in dose_fields(p.fields)]
        treated = rows[~np.isin(rows, controls)]
        self.rows = np.array([i for i in treated if plates[i] in self.control_rows and
                              all(columns[d][i] for d in doses)], int)
        self.left = len(treated) - len(self.rows)
        if not names or len(self.control_rows) < 2 or not len(self.rows):
            raise UserError(
                f"--restain needs treated images and {CONTROLS_NEEDED} negative controls (dose 0) "
                "or more on each of two plates; a plate is what the category fields of "
                f"--experiment say: {', '.join(names) or 'there is none'}")
        known, rng = list(self.control_rows), np.random.default_rng(0)
        place = {plate: k for k, plate in enumerate(known)}
        ahead_by = rng.integers(1, len(known), len(self.rows))
        self.moves = [(plates[i], known[(place[plates[i]] + k) % len(known)])
                      for i, k in zip(self.rows, ahead_by)]
        values = {f.name: {} for f in beside}                # {field: {plate: its values there}}
        for (name, by_plate), i in itertools.product(values.items(), rows):
            by_plate.setdefault(plates[i], set()).add(columns[name][i])
        self.values = {name: {plate: min(found) for plate, found in by_plate.items()}
                       for name, by_plate in values.items()
                       if all(len(found) == 1 for found in by_plate.values())}
        self.style = functools.cache(lambda plate: data.plate_style(
            np.stack(self.read(self.control_rows[plate]))))

    def read(self, rows):
        """Those images (C, H, W) of the rows that can be read, in [-1, 1], or their middle."""
        return [data.scale_intensity(data.take_view(image, self.p.settings.crop),
                                     self.p.constant["vae"]["intensity"])
                for image in self.p.pixels.many(rows) if image is not None]

    def restain(self, image, own, other):
        return data.restain(image, self.style(own), self.style(other))

    def report(self, count=64, fields_of_view=4):
        """Print how much the contrast of one treatment differs between plates, and how much when
        one of the two is restained: a first check whether this suits the plates."""
        group = treatment_group(self.p.fields)
        names = [f.name for f in self.p.fields if f.group == group]
        treatments, rng = {}, np.random.default_rng(0)       # {treatment: {plate: rows}}
        for i, (plate, _) in zip(self.rows, self.moves):
            treatment = tuple(self.p.manifest.columns[name][i] for name in names)
            treatments.setdefault(treatment, {}).setdefault(plate, []).append(i)
        treatments = [by_plate for by_plate in treatments.values() if len(by_plate) > 1]
        print(f"restained: by {', '.join(self.values)}; {len(self.control_rows)} plates, "
              f"{len(self.rows)} images"
              + (f"; {self.left} others stay as they are: no plate or dose is told, or fewer than "
                 f"{CONTROLS_NEEDED} negative controls are in training" if self.left else ""))
        if not treatments:
            return print("no treatment lies on two of them: nothing shows whether it suits them")

        def contrast(images):                                # (C,) log of the deviation
            return np.log(np.std(images, (0, 2, 3)) + .01)
        gaps = []                                            # as it is, restained
        for k in rng.integers(len(treatments), size=count):
            on_plates = list(treatments[k].items())
            (a, own), (b, other) = (on_plates[j] for j in rng.permutation(len(on_plates))[:2])
            own, other = (self.read(rows[:fields_of_view]) for rows in (own, other))
            if own and other:
                moved = [self.restain(image, a, b) for image in own]
                gaps.append([abs(contrast(x) - contrast(other)).mean() for x in (own, moved)])
        before, after = np.mean(gaps, 0)
        print(f"the contrast of one treatment differs between two plates by {before:.2f} (log, "
              f"mean of {len(gaps)} pairs), restained by {after:.2f}")
        if after >= before:
            print("warning: restained images are no nearer to those of the other plate: it needs "
                  "more negative controls on each, or plates that differ in optics only")

    def apply(self, x, places):
        """Images (B, C, H, W), restained where they are; places: their numbers among all rows."""
        return torch.from_numpy(np.stack([
            image if k < self.plain else self.restain(image, *self.moves[k - self.plain])
            for image, k in zip(x.numpy(), places)]))

    def tell(self, columns):
        """Metadata of all rows: the restained ones, at the end, are told the other plate."""
        for name, by_plate in self.values.items():
            columns[name][self.plain:] = [by_plate[other] for _, other in self.moves]

    def shares(self, fields, manifest, rows, balance):
        """How often each row is drawn: of those that can be restained `share` restained."""
        rows = rows[:self.plain]
        share = pair_shares(fields, manifest, rows, balance)
        share = np.full(len(rows), 1 / len(rows)) if share is None else share
        both = np.isin(rows, self.rows)
        return np.concatenate([share * np.where(both, 1 - self.share, 1), share[both] * self.share])


class Controls:
    """The control images of one side of the split, as a ControlNet is shown them: `images`
    (rows * views, C, H, W).

    Either one for each view of each row, cut and turned like it (`partners` None), or negative
    controls of which `partners` lists, for each row, those of the same plate. Their metadata are
    the row's own, or those of the control; what was done to the cells is not told: to a negative
    control it is always the same.
    """

    def __init__(self, images, manifest, rows, conditioner, each, partners=None):
        self.images, self.each, self.partners = images, each, partners
        self.fields = conditioner.fields
        told = metadata(self.fields, manifest, rows, treatment_group(self.fields))
        self.codes, self.known, _ = to_device(conditioner.encode(told, len(rows)))

    def draw(self, places, view, rng, shown=1., noise_rng=None):
        """What Denoiser.forward takes as `control`, for places among the rows of the side: images
        (B, C, H, W), codes and known of their metadata, and which are shown (B,). noise_rng: hide
        metadata by the dropout plan, as a user may know none."""
        if self.partners is not None:
            places = np.array([rng.choice(self.partners[p]) for p in places])
            view = rng.integers(self.each, size=len(places))
        images = torch.from_numpy(self.images[places * self.each + view].astype(np.float32))
        codes = {name: code[places] for name, code in self.codes.items()}
        seen = torch.from_numpy((rng.random(len(places)) < shown).astype(np.float32))
        images, seen = to_device((images, seen))
        known = self.known[places]
        if noise_rng is not None:
            known = known & draw_keep(self.fields, len(places), noise_rng).to(known.device)
        return images, codes, known, seen


def untreated(manifest, fields, rows):
    """The negative controls among the rows: every dose (dose_fields) is known and 0."""
    doses = [manifest.columns[f.name] for f in dose_fields(fields)]
    return [i for i in rows if doses and all(d[i] != "" and float(d[i]) == 0 for d in doses)]


def negative_controls(manifest, fields, rows, candidates, by):
    """(the negative controls among `candidates`, for each of `rows` the places among them of those
    with the same value of the column `by`). An image is shown no control of its own well, if
    another well of the plate has one, and never itself."""
    columns, doses = manifest.columns, dose_fields(fields)
    if not doses or by not in columns:
        lack = f"{manifest.path} has no column {by}" if doses else "the base is told no dose"
        raise UserError(f"--control_column negcon finds no negative controls: {lack}")
    blank = [i + 2 for i in rows if columns[by][i] == ""]
    if blank:
        raise UserError(f"{manifest.path}, row {blank[0]}, column {by}: blank, so it is not known "
                        "which negative controls belong to it")
    chosen = untreated(manifest, fields, candidates)
    places, well = {}, columns.get("well", range(len(manifest)))
    for k, i in enumerate(chosen):
        places.setdefault(columns[by][i], []).append(k)

    def partners_of(i):
        others = [k for k in places.get(columns[by][i], ()) if chosen[k] != i]
        return [k for k in others if well[chosen[k]] != well[i]] or others
    partners = [partners_of(i) for i in rows]
    alone = sorted({columns[by][i] for i, found in zip(rows, partners) if not found})
    if alone:
        raise UserError(f"--control_column negcon: {by} {', '.join(alone[:5])} has no (other) "
                        "negative control (dose 0) to show")
    return np.array(chosen), partners


def open_controls(p, rows, candidates, each, folder, name):
    """The Controls of one side, rows of the manifest; negcon chooses among `candidates`."""
    says, partners, conditioner = p.constant["controlnet"], None, p.denoiser.conditioner
    if says["column"] == "negcon":
        candidates = [i for i in candidates if i not in p.pixels.corrupt]
        rows, partners = negative_controls(p.manifest, conditioner.fields, rows, candidates,
                                           says["by"])
    key = cache_key(p.control_pixels, rows, p.settings, says["intensity"], says["column"].encode())
    images = cache(folder / f"controls-{name}-{each}views-{key}.npy", (
        p.control_pixels, rows, p.settings, says["intensity"], each), lambda x, first: x,
        f"control images, {name}")
    return Controls(images, p.manifest, rows, conditioner, each, partners)


def pair_shares(fields, manifest, rows, balance):
    """How often each row is drawn: in proportion to n^-balance, n the number of rows with the same
    values of the first field of each group (this molecule in this batch). None: all alike.

    A confounded screen shows most pairs rarely. Drawing them more often does not bias a model that
    is told both: it learns images *given* the pair. Negative controls keep their share: they are
    what identifies a batch.
    """
    if not balance:
        return None
    first = {f.group: f.name for f in reversed(fields)}.values()
    pairs = list(zip(*(manifest.rows(rows, name) for name in first)))
    count = Counter(pairs)
    share = np.array([count[pair] for pair in pairs]) ** -float(balance)
    treated = ~np.isin(rows, untreated(manifest, fields, rows))
    share[treated] *= treated.sum() / share[treated].sum()
    share[~treated] = 1
    return share / share.sum()


# --- training -----------------------------------------------------------------------------------

def ema_update(average, model, decay, step):
    """Exponential moving average with warm-up: decay at most (1 + n) / (10 + n)."""
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for a, p in zip(average.parameters(), model.parameters()):
            a.lerp_(p, 1 - decay)


def training_batch(latents, config, schedule, fields, step):
    """All that one step draws, from its number: latents, noise, timesteps, what is shown, and the
    control images (None without a ControlNet)."""
    rng, noise_rng = step_rng(config.seed, 0 if config.overfit else step)
    places = latents.sound[rng.choice(len(latents.rows), config.batch, p=latents.share)]
    view = rng.integers(latents.each, size=config.batch)
    z0 = latents.draw(places, view, noise_rng)
    # without control a frozen base is what it was: nothing to learn there
    shown = 1 - config.control_dropout if config.unfreeze_decoder else 1.
    eps = torch.randn(z0.shape, generator=noise_rng).to(z0)
    t = torch.randint(schedule.T, (len(z0),), generator=noise_rng).to(z0.device)
    codes, known = latents.conditions(places)
    keep = known & draw_keep(fields, len(z0), noise_rng).to(known.device)
    if config.overfit:
        keep = known
    else:
        codes = hide_molecule_of_controls(fields, codes, keep, latents.molecules, noise_rng)
    control = latents.controls and latents.controls.draw(places, view, rng, shown, noise_rng)
    return z0, eps, t, codes, keep, control


@torch.no_grad()
def heldout_predictions(denoiser, latents, schedule, count=512, shuffled=()):
    """The network on `count` held-out latents with fixed noise, under the full condition but with
    the `shuffled` fields taken from other rows: (prediction, loss (count,), quarter of the noise
    levels (count,), from little noise to pure noise)."""
    rng, noise_rng = step_rng(12345, 0)
    places = latents.sound[np.resize(rng.permutation(len(latents.rows)), count)]  # all plates
    z0 = latents.draw(places, 0, noise_rng)
    control = latents.controls and latents.controls.draw(places, 0, rng)
    eps = torch.randn(z0.shape, generator=noise_rng).to(z0)
    t = (torch.arange(count) * 7919 % count * schedule.T // count).to(z0.device)
    codes, known = latents.conditions(places)
    other = torch.randperm(count, generator=noise_rng).to(z0.device)
    if "control image" in shuffled:
        control = (control[0][other], *control[1:])
    for i, field in enumerate(denoiser.conditioner.fields):
        if field.name in shuffled:
            codes[field.name], known[:, i] = codes[field.name][other], known[other, i]
    predictions = []
    for part in torch.arange(count, device=z0.device).split(64):
        with autocast():
            predictions.append(denoiser(
                schedule.add_noise(z0[part], eps[part], t[part]), t[part], take(codes, part),
                known[part], latents.molecules, take(control, part)))
    prediction, target = torch.cat(predictions), schedule.target_of(z0, eps, t)
    return prediction, (prediction - target).square().flatten(1).mean(1), t * 4 // schedule.T


def take(tensors, part):
    """The rows `part` of every tensor in a tuple or a dict, however nested; None stays None."""
    if tensors is None:
        return None
    if torch.is_tensor(tensors):
        return tensors[part]
    if isinstance(tensors, dict):
        return {name: take(x, part) for name, x in tensors.items()}
    return tuple(take(x, part) for x in tensors)


def heldout_loss(denoiser, latents, schedule):
    """Loss under the full condition: the mean, and by noise level, because the mean hides all."""
    _, losses, quarter = heldout_predictions(denoiser, latents, schedule)
    return losses.mean().item(), [losses[quarter == q].mean().item() for q in range(4)]


def field_sets(fields):
    """Each field, and all of each group: {name: [names of fields]}."""
    return {f.name: [f.name] for f in fields} | {
        f"all of {g}": [f.name for f in fields if f.group == g]
        for g in dict.fromkeys(f.group for f in fields)}


def field_gaps(denoiser, latents, schedule, count=96):
    """How much the loss rises when a field, or a whole group, is taken from another row: {name:
    (rise, its standard error)}. About zero: the model does not use it, or another field tells as
    much (a plate lies in one batch)."""
    sets, count = field_sets(denoiser.conditioner.fields), min(count, len(latents.rows))
    sets |= {"control image": ["control image"]} if latents.controls else {}

    def losses(shuffled):
        return heldout_predictions(denoiser, latents, schedule, count, shuffled)[1]
    plain = losses(())
    rises = {name: losses(shuffled) - plain for name, shuffled in sets.items()}
    return {name: (r.mean().item(), r.std().item() / count ** .5) for name, r in rises.items()}


def warn_of_unused(gaps):
    """Name the fields whose shuffling does not raise the held-out loss."""
    for name, (rise, error) in gaps.items():
        if rise <= 2 * error:
            print(f"warning: {name} is hardly used, or told by another field as well: taken from "
                  f"other rows it raises the held-out loss by {rise:.4f} +- {error:.4f}")


def negative_control(fields, manifest, rows):
    """The commonest metadata of training rows whose log field (the dose) is 0, or None."""
    group = [f.name for f in fields if f.group in {d.group for d in dose_fields(fields)}]
    controls = Counter(tuple(manifest.columns[name][i] for name in group)
                       for i in untreated(manifest, fields, rows))
    return dict(zip(group, controls.most_common(1)[0][0])) if controls else None


def group_examples(fields, manifest, rows, count=6):
    """For each group the values of a few training rows that differ in the group's first field (six
    batches, say), highest doses first: what guidance of the form `control` averages over."""
    examples, order = {}, np.random.default_rng(0).permutation(rows)
    if doses := dose_fields(fields):
        order = sorted(order, key=lambda i: float(manifest.columns[doses[0].name][i] or 0))
    for group in dict.fromkeys(f.group for f in fields):
        names = [f.name for f in fields if f.group == group]
        distinct = {manifest.columns[names[0]][i]: i for i in order}
        examples[group] = [{n: manifest.columns[n][i] for n in names}
                           for i in list(distinct.values())[::-1][:count]]
    return examples


def draw_samples(path, model, p, count=8):
    """Held-out images, highest doses first and no molecule twice, and generated ones beneath;
    with a ControlNet the images that it is shown above. p: as from prepare."""
    manifest, rows = p.manifest, p.held
    molecule = next((f for f in model.fields if f.kind == "molecule"), None)
    order = np.random.default_rng(0).permutation(rows)
    if doses := dose_fields(model.fields):
        order = sorted(order, key=lambda i: -float(manifest.columns[doses[0].name][i] or 0))
    first = {manifest.columns[molecule.name][i] if molecule else i: i for i in reversed(order)}
    chosen = sorted(order, key=lambda i: i not in first.values())[:count]
    columns = metadata(model.fields, manifest, chosen)
    real = views(p.pixels, chosen, p.settings, model.intensity)
    control = control_of(model, manifest, p.pixels, p.settings, chosen,
                         np.concatenate([p.train, rows]))
    fake = model.generate(columns, range(len(chosen)), control=control)
    labels = ["\n".join(("" if f is molecule else f"{f.name} ") + columns[f.name][k][:18]
                        for f in model.fields[:3]) for k in range(len(chosen))]
    shown = [list(control[0].numpy() if len(control[0][0]) == len(model.channels)
                  else control[0][:, 0].numpy())] if control else []
    data.picture(path, shown + [list(real.numpy()), list(fake.numpy())], model.channels,
                 ["control"] * len(shown) + ["real", "generated"], labels, model.pixel_um)


def control_of(model, manifest, pixels, settings, chosen, candidates, seed=0, rng=None):
    """Control images and their metadata for rows of a manifest, as Model.generate takes them; None
    without a ControlNet. negcon: of the same plate, drawn from `candidates`. rng: as in `views`."""
    if not model.controlnet:
        return None
    told, rows = model.controlnet, np.asarray(chosen)
    if told["column"] == "negcon":
        found, partners = negative_controls(manifest, model.fields, rows, candidates, told["by"])
        pick = np.random.default_rng(seed)
        rows = np.array([found[pick.choice(p)] for p in partners])
    images = views(control_pixels(told["column"], manifest, pixels), rows, settings,
                   told["intensity"], rng)
    return images, metadata(model.fields, manifest, rows, treatment_group(model.fields))


def draw_curves(folder):
    """log.jsonl as a picture: training and held-out loss, and held-out loss by noise level."""
    log = train_vae.read_log(folder)
    steps = [entry["step"] for entry in log]
    with data.figure(folder / "curves.png", 1, 2, figsize=(8, 3)) as (left, right):
        left.plot(steps[1:], [entry["train_loss"] for entry in log[1:]], label="training")
        left.plot(steps, [entry["heldout_loss"] for entry in log], label="held out (EMA)")
        for q, name in enumerate(("least noise", "less", "more", "most noise")):
            right.plot(steps, [entry["by_noise"][q] for entry in log], label=name)
        for axis in (left, right):
            axis.set(xlabel="step", ylim=(0, 1.1)), axis.legend(fontsize=7)
        left.set_ylabel("squared error of the target")


def open_fields(config, manifest, train_rows):
    """The fields that a config names, checked against the manifest and fitted to training rows."""
    groups = {"biology": config.biology, "experiment": config.experiment}
    with of_manifest(manifest.path):
        fields = parse_fields(groups, manifest.columns,
                              MOLECULE_ENCODERS[config.molecule_encoder].is_molecule)
        return [f.fit(manifest.rows(train_rows, f.name)) for f in fields]


def check_manifest(model, manifest):
    """Refuse data that lack what a trained model was told, or have no sound values of it."""
    for field in model.fields:
        if field.name not in manifest.columns:
            raise UserError(f"{manifest.path} has no column {field.name}, which the model was told")
        with of_manifest(manifest.path):
            check_values(field, manifest.columns[field.name],
                         model.denoiser.conditioner.encoder_class.is_molecule)


@contextlib.contextmanager
def all_faults(config):
    """Faults of images that are found inside are reported with those of the fields, all at once."""
    try:
        yield
    except data.DataError as fault:
        lines = str(fault).splitlines()
        try:
            columns = data.read_columns(config.data)
            rows = range(len(next(iter(columns.values()))))
            open_fields(config, data.Manifest(config.data, columns, (), [], [], {}), rows)
        except (data.DataError, FieldError, OSError) as another:
            lines += [] if isinstance(another, OSError) else str(another).splitlines()
        raise data.DataError("\n".join(dict.fromkeys(lines))) from None


def fit_molecules(config, fields, manifest, train_rows):
    """What the molecule encoder learns from the training molecules: settings for a checkpoint."""
    smiles = sorted({v for f in fields if f.kind == "molecule"
                     for v in manifest.rows(train_rows, f.name)} - {""})
    options = {"bits": config.fingerprint_bits, "radius": config.fingerprint_radius,
               "table": config.molecule_table}
    return MOLECULE_ENCODERS[config.molecule_encoder].fit(smiles or ["C"], options)


def open_vae(config):
    """The autoencoder, which must have been trained on the data."""
    vae, content = train_vae.load_vae(config.vae)
    trained_on = content["settings"]["data"]
    if trained_on != config.data and config.vae == Config.vae:
        raise UserError(f"{config.vae} was trained on {trained_on}, not on {config.data}: train "
                        f"one with python train_vae.py --data {config.data} --out ..., and name it "
                        "with --vae")
    return vae, content


def train_first(config):
    """Train the default autoencoder where it is missing or unfinished; check the fields before."""
    path = Path(config.vae)
    if config.vae != Config.vae or config.control_column or path.exists() and train_vae.finished(
            load_checkpoint(path, "vae", "choose another --vae")):
        return
    first = train_vae.Config(data=config.data, workers=config.workers,
                             max_corrupt=config.max_corrupt)
    with main_first():
        with all_faults(config):
            opened = train_vae.open_data(first)
        open_fields(config, opened.manifest, opened.train)
    print("no finished autoencoder yet: training one")
    train_vae.trained(first)


def on_top_of_base(config):
    """The config of a ControlNet: data, fields and model are those of its base."""
    base = Model.load(config.base).content
    if base.get("controlnet"):
        raise UserError(f"{config.base} has a ControlNet already: --base takes a plain model")
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in base["settings"].items() if k in (
        "vae", "biology", "experiment", "molecule_encoder", "fingerprint_bits", "size",
        "fingerprint_radius", "molecule_table", "schedule", "target", "zero_snr")}
    asked = [k for k, v in own.items() if getattr(config, k) not in (v, getattr(Config, k))]
    if asked:
        raise UserError(f"--{asked[0]} is that of the base, {own[asked[0]]}: a ControlNet cannot "
                        "change it")
    if config.data == Config.data:
        own["data"] = base["settings"]["data"]
    if config.out == Config.out:
        own["out"] = f"runs/{config.control_column.replace(',', '_')}"
    return replace(config, **own)


def open_images(vae_content, config):
    """The images as the autoencoder's settings read them: a namespace that `prepare` fills."""
    return train_vae.open_data(SimpleNamespace(**vae_content["settings"] | {
        "data": config.data, "workers": config.workers, "max_corrupt": config.max_corrupt}))


def pixel_size(manifest, binning):
    """Micrometres of a pixel after binning; None where the column pixel_um is not there, or does
    not say one size for all."""
    sizes = manifest.columns.get("pixel_um", [""])
    for i, text in enumerate(sizes):
        if text and not (is_number(text) and float(text) > 0):
            raise data.DataError(f"{manifest.path}, row {i + 2}, column pixel_um: {text} is no "
                                 "size in micrometres")
    return float(sizes[0]) * binning if len(set(sizes)) == 1 and sizes[0] else None


def new_model(config):
    """A U-Net and its conditioner, to be trained from nothing."""
    vae, vae_content = open_vae(config)
    with all_faults(config):
        p = open_images(vae_content, config)
    p.vae, p.fields = vae, open_fields(config, p.manifest, p.train)
    torch.manual_seed(config.seed)
    x = views(p.pixels, p.train[:8], p.settings, vae_content["intensity"])[:1]
    z = vae.to_latent(x.to(device()))
    unet = unet_config(config.size, z.shape[1])
    step = unet.fold * 2 ** (len(unet.multipliers) - 1)
    if z.shape[2] % step or z.shape[3] % step:
        raise UserError(f"latents of {z.shape[2]}x{z.shape[3]} do not halve often enough for the "
                        f"U-Net {config.size}: train the autoencoder with a --crop that is a "
                        f"multiple of {step * p.settings.downsampling}")
    molecules = fit_molecules(config, p.fields, p.manifest, p.train)
    p.denoiser = Denoiser(unet, p.fields, config.molecule_encoder, molecules).to(device())
    p.constant = dict(
        unet=asdict(unet), molecule_encoder=config.molecule_encoder, molecule_settings=molecules,
        schedule=dict(name=config.schedule, target=config.target, zero_snr=config.zero_snr),
        fields=[asdict(f) for f in p.fields], latent_shape=list(z.shape[1:]),
        pixel_um=pixel_size(p.manifest, p.settings.binning),
        control=negative_control(p.fields, p.manifest, p.train),
        examples=group_examples(p.fields, p.manifest, p.train), settings=asdict(config),
        vae={k: vae_content[k] for k in ("config", "weights", "intensity", "settings")},
        manifest=p.manifest.sha1())
    return p


def controlled_model(config):
    """A trained model, frozen, with a ControlNet on top that knows nothing yet."""
    base = Model.load(config.base)
    p = open_images(base.content["vae"], config)
    check_manifest(base, p.manifest)
    p.vae, p.fields, p.denoiser = base.vae, base.fields, base.denoiser
    shape = views(p.pixels, p.train[:8], p.settings, base.intensity).shape
    if list(shape[2:]) != base.size:
        raise UserError(f"{config.data}: images of {shape[3]}x{shape[2]} pixels, the base draws "
                        f"{base.size[1]}x{base.size[0]}")
    p.control_pixels = control_pixels(config.control_column, p.manifest, p.pixels)
    channels = len(p.control_pixels[0])
    # one file with as many channels as there are stains: the stains themselves
    stains = channels == len(base.channels) and "," not in config.control_column
    intensity = base.intensity if stains else data.fit_intensity(
        "percentile", p.control_pixels, p.train)
    kept = ("unet", "molecule_encoder", "molecule_settings", "schedule", "fields", "latent_shape",
            "pixel_um", "control", "examples", "vae")
    p.constant = {k: base.content[k] for k in kept} | {
        "settings": asdict(config), "manifest": p.manifest.sha1(), "controlnet": {
            "column": config.control_column, "channels": channels, "by": config.control_by,
            "shrink": p.settings.downsampling, "intensity": intensity}}
    torch.manual_seed(config.seed)
    p.denoiser.controlnet = ControlNet(p.denoiser.unet, channels, p.settings.downsampling)
    for part in (p.denoiser.unet.up, p.denoiser.unet.out):
        part.requires_grad_(config.unfreeze_decoder)
    p.denoiser.to(device())
    return p


def prepare(config):
    """Everything up to the first step: data, autoencoder, fields, networks, latents."""
    p = controlled_model(config) if config.control_column else new_model(config)
    p.control_pixels = getattr(p, "control_pixels", p.pixels)
    print("fields: " + (", ".join(f"{f.name} ({f.kind}, {f.group})" for f in p.fields) or "none"))
    p.schedule = diffusion.Schedule(**p.constant["schedule"])
    p.first = train_vae.open_resume(config, "ldm", p.constant) if config.resume else {"step": 0}
    p.sides = {}
    Path(config.out).mkdir(parents=True, exist_ok=True)
    folder = Path(config.vae).parent if Path(config.vae).exists() else Path(config.out)
    # where a plate is absent from training its negative controls are held-out rows
    both = np.concatenate([p.train, p.held])
    for name, rows, each, candidates in (("training", p.train, config.views, p.train),
                                         ("held-out", p.held, 1, both)):
        restained = None
        if config.restain and name == "training":
            restained = Restained(p, rows, config.restain)
            restained.report()
            rows = np.concatenate([rows, restained.rows])
        latents = cache_latents(p.vae, p.pixels, rows, p.settings,
                                p.constant["vae"]["intensity"], each, folder, name, restained)
        controls = open_controls(p, rows, candidates, each, folder, name) \
            if config.control_column else None
        p.sides[name] = Latents(latents, p.vae, p.manifest, rows, p.denoiser.conditioner, each,
                                config.balance, controls,
                                [*p.pixels.corrupt, *p.control_pixels.corrupt], restained)
    return p


def already_trained(config):
    """Whether `out`/model.pt is what this config asks for, finished; refuses to overwrite any
    other one unasked."""
    path = Path(config.out) / "model.pt"
    if config.overfit and config.resume:
        raise UserError("--overfit saves nothing that --resume could go on from")
    if not path.exists() or config.resume or config.overwrite or config.overfit:
        return False
    content = load_checkpoint(path, "ldm", "choose another --out")
    changed = train_vae.changed_settings(config, content)
    if changed:
        raise UserError(f"{path} was trained with other settings ({'; '.join(changed)}): choose "
                        "another --out, or --overwrite")
    if content["step"] < config.steps:
        raise UserError(f"{path} stopped at step {content['step']} of {config.steps}: add --resume "
                        "to go on, or --overwrite to start again")
    print(f"{path} is trained already ({content['step']} steps; --overwrite trains it again)")
    return True


def loss_of(model, batch, schedule, molecules, config):
    """Mean loss of the model for a batch, or a part of one, as training_batch draws it."""
    z0, eps, t, codes, keep, control = batch
    with autocast():
        return diffusion.diffusion_loss(
            schedule, lambda z, t: model(z, t, codes, keep, molecules, control), z0, eps, t,
            config.min_snr).mean()


def train(config=Config()):
    """Train a latent diffusion model and write `out`/model.pt. Returns its path."""
    check(config)
    config = on_top_of_base(config) if config.control_column else config
    out, slices = Path(config.out), parts(config)
    if already_trained(config):
        return farewell(out)
    train_first(config)
    with main_first():
        p = prepare(config)
    denoiser, schedule, latents, held = p.denoiser, p.schedule, *p.sides.values()
    average = copy.deepcopy(denoiser).eval().requires_grad_(False)
    draw = functools.partial(training_batch, latents, config, schedule, p.fields)
    flops = count_flops(lambda: loss_of(denoiser, take(draw(0), slice(1)), schedule,
                                        latents.molecules, config).backward())
    model = for_training(denoiser, config.compile)
    optimiser = torch.optim.AdamW([w for w in denoiser.parameters() if w.requires_grad],
                                  lr=config.lr, betas=(.9, .99), fused=True)
    describe(p, config)
    if config.resume:
        for part, name in ((denoiser, "weights"), (average, "ema"), (optimiser, "optimiser")):
            part.load_state_dict(p.first[name])
    elif is_main():
        first_look(average, held, schedule, config)

    loop = Loop(draw, config, "training the diffusion model", p.first["step"],
                p.first.get("losses", ()), flops)
    for step, batch in loop:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, config.steps, config.lr)
        optimiser.zero_grad()
        total = 0.
        for part in slices:
            # for a molecule encoder that draws as well: random spellings of SMILES
            torch.manual_seed(part.start + step_rng(
                config.seed, 0 if config.overfit else step)[1].initial_seed())
            loss = loss_of(model, take(batch, part), schedule, latents.molecules,
                           config) / len(slices)
            loss.backward()
            total += loss.item()
        loop.agree(step, total)
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.)
        optimiser.step()
        ema_update(average, denoiser, config.ema, step)
        if loop.evaluates(step):
            look(average, held, schedule, config, step, loop)
        if loop.saves(step) and not config.overfit:
            save_checkpoint(out / "model.pt", "ldm", p.constant | {
                "weights": denoiser.state_dict(), "ema": average.state_dict(),
                "optimiser": optimiser.state_dict(), "step": step + 1, "losses": loop.losses},
                config.keep)
    if config.overfit:
        return print("this was one batch, nothing is saved: within some hundred steps its loss "
                     "should be near 0")
    if is_main():
        finish(average, held, schedule, p, config)
    return out / "model.pt"


def describe(p, config):
    """Print what is trained, on what, and what it will be shown: the dropout plan as it comes out,
    over 100,000 draws."""
    name, part = ("ControlNet", p.denoiser.controlnet) if config.control_column else (
        "U-Net", p.denoiser.unet)
    latents, held = p.sides.values()
    count = sum(w.numel() for w in part.parameters()) / 1e6
    print(f"{name} {config.size}: {count:.2f} M parameters, latents "
          f"{tuple(latents.cache.shape[2:])}, {len(p.train)} images"
          f"{f' and {len(latents.rows) - len(p.train)} restained' if config.restain else ''} x "
          f"{config.views} views, {len(held.rows)} held out")
    if p.fields:
        keep = draw_keep(p.fields, 100_000, torch.Generator().manual_seed(0)).float()
        print(f"shown in training: every field {keep.prod(1).mean():.2f}, none "
              f"{(1 - keep).prod(1).mean():.2f}; " + ", ".join(
                  f"{f.name} {share:.2f}" for f, share in zip(p.fields, keep.mean(0))))


def first_look(average, held, schedule, config):
    """Begin the log with the held-out loss before training.

    1.00 by construction: the output starts at zero, target and latents are standardised. With a
    ControlNet it is the loss of the base: the ControlNet starts silent as well.
    """
    mean, by_noise = heldout_loss(average, held, schedule)
    print(f"held-out loss at step 0: {mean:.2f}")
    if not config.overfit:
        start_anew(Path(config.out))
        write_log(Path(config.out) / "log.jsonl", step=0, heldout_loss=mean, by_noise=by_noise)


def look(average, held, schedule, config, step, loop):
    """Print and log the losses, what each field is worth, and how fast it goes."""
    loss, speed, said = loop.report()
    mean, by_noise = heldout_loss(average, held, schedule)
    gaps = field_gaps(average, held, schedule)
    tqdm.write(f"step {step + 1:5d}: training loss {loss:.3f}, held out {mean:.3f} (by noise "
               f"{' '.join(f'{v:.3f}' for v in by_noise)}); shuffled, "
               + ", ".join(f"{n} {r:+.4f}" for n, (r, _) in gaps.items()) + f"; {said}")
    if not config.overfit:
        write_log(Path(config.out) / "log.jsonl", step=step + 1, train_loss=loss, **speed,
                  heldout_loss=mean, by_noise=by_noise,
                  shuffled={n: r for n, (r, _) in gaps.items()})


def finish(average, held, schedule, p, config):
    """Say what is hardly used and what was left out, draw, and say what can be done now."""
    out = Path(config.out)
    if config.steps > 100:  # after the warm-up
        warn_of_unused(field_gaps(average, held, schedule, 256))
    draw_curves(out)
    draw_samples(out / "samples.png", Model.load(out / "model.pt"), p)
    for pixels in {p.pixels, p.control_pixels}:
        pixels.report()
    farewell(out)


def farewell(out):
    """Say what can be done now; returns the checkpoint's path."""
    content = load_checkpoint(out / "model.pt", "ldm", "train again")
    control = content.get("controlnet")
    manifest = Path(content["settings"]["data"])
    asked = f"--control {manifest}:2 " if control else ""
    # after a control image a whole field of view is drawn, in tiles where training saw crops
    count = 1 if control and content["vae"]["settings"]["crop"] else 8
    # biology first; a number has too many values to cross
    fields = sorted(content["fields"], key=lambda f: (f["group"], f["kind"] == "number"))
    by = "" if control or (manifest.parent / "simulation.json").exists() else " --by " + " ".join(
        list({f["group"]: f["name"] for f in reversed(fields)}.values())[::-1])
    example = " ".join(f"'{f['name']}={content['examples'][f['group']][0][f['name']]}'"
                       for f in content["fields"][:3])
    print(f"{out} has model.pt, samples.png (real above generated) and curves.png. Now try\n"
          f"  python sample.py --checkpoint {out}/model.pt {asked}{example} -n {count}\n"
          f"  python evaluate.py {'control' if control else 'quality'} --checkpoint {out}/model.pt"
          + by)
    return out / "model.pt"


def check(config):
    """Refuse settings that cannot be used, before anything is read or written."""
    for name, options in (("size", SIZES), ("schedule", diffusion.SCHEDULES),
                          ("target", diffusion.TARGETS), ("molecule_encoder", MOLECULE_ENCODERS)):
        if getattr(config, name) not in options:
            raise UserError(f"--{name} {getattr(config, name)}: one of {', '.join(options)}")
    if config.compile:
        train_vae.try_compiler()
    try:
        diffusion.Schedule(config.schedule, config.target, zero_snr=config.zero_snr)
    except ValueError as fault:
        raise UserError(f"--target {config.target}: {fault}") from None
    if not config.control_column:
        for name in ("base", "control_by", "control_dropout", "unfreeze_decoder"):
            if getattr(config, name) != getattr(Config, name):
                raise UserError(f"--{name} is for a ControlNet: add --control_column")
    for name in ("control_dropout", "restain"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"--{name} {getattr(config, name)}: a share from 0 to 1")
    if config.restain and config.control_column:
        raise UserError("--restain moves images to other plates, their control images stay: train "
                        "the base with it, not the ControlNet")
    both = {f.partition(":")[0] for f in config.biology} & {f.partition(":")[0]
                                                            for f in config.experiment}
    if both:
        raise UserError(f"field {', '.join(both)} is given twice, as biology and as experiment")


def main():
    train_vae.join_processes()
    train(train_vae.settings(Config))


if __name__ == "__main__":
    train_vae.run(main)
