"""Questions put to a trained model, one sub-command each; every answer stands beside its floor and
its ceiling, and is written as JSON and as a figure.

    python evaluate.py quality                   # are held-out conditions drawn as they look?
    python evaluate.py quality --checkpoint runs/plates/model.pt --by compound plate
    python evaluate.py disentangle               # how much is biology, how much experiment?
    python evaluate.py conditions                # is every field used?
    python evaluate.py control --checkpoint runs/brightfield/model.pt   # these very cells?
    python evaluate.py vae                       # which latent space?
"""
import argparse
import copy
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from rdkit import DataStructs
from rdkit.Chem import rdFingerprintGenerator
from tqdm import tqdm

import data
import sample
import train_ldm
import train_vae
from conditioning import (MOLECULE_ENCODERS, blank_unseen, check_values, parse_number,
                          parse_smiles)
from diffusion import FORMS, SAMPLERS
from sample import INTERVAL, STEPS, Model
from train_ldm import cached_views
from train_vae import (UserError, at_once, autocast, device, learning_rate, load_checkpoint,
                       open_data, reconstruct, run, save_checkpoint, step_rng, views, write_log)
from unet import UNet, UNetConfig

NUCLEUS_RADIUS = 4.5  # pixels; what the segmentation looks for
HELD_OUT = ["val", "test_pair", "test_substituent", "test_scaffold"]


# ------------------------------------------------------------------------------------------------
# 1. Morphological features, in torch, in batches
# ------------------------------------------------------------------------------------------------

def gaussian_blur(x, sigma, radius=None):
    """Separable Gaussian blur of (B, C, H, W), mirrored borders."""
    radius = radius or max(1, round(3 * sigma))
    tap = torch.exp(-torch.arange(-radius, radius + 1, device=x.device) ** 2 / (2 * sigma ** 2))
    tap = (tap / tap.sum()).to(x)
    c = x.shape[1]
    x = F.pad(x, (radius,) * 4, mode="reflect")
    x = F.conv2d(x, tap.view(1, 1, 1, -1).expand(c, 1, 1, -1), groups=c)
    return F.conv2d(x, tap.view(1, 1, -1, 1).expand(c, 1, -1, 1), groups=c)


def otsu(x, bins=128):
    """Threshold (B,) of (B, H, W) in [0, 1] that separates best into two classes (Otsu 1979):
    the largest variance between classes, w0 w1 (m0 - m1)^2."""
    place = (x.flatten(1).clamp(0, 1) * (bins - 1)).round().long()
    share = torch.zeros(len(x), bins, device=x.device).scatter_add_(
        1, place, torch.ones_like(place, dtype=torch.float)) / place.shape[1]
    value = torch.arange(bins, device=x.device) / (bins - 1)
    w0, m0 = share.cumsum(1), (share * value).cumsum(1)                  # (B, bins)
    between = (m0[:, -1:] * w0 - m0) ** 2 / (w0 * (1 - w0)).clamp(min=1e-9)
    # between two distant classes every cut is as good: the middle of the plateau
    best = between >= between.max(1, keepdim=True).values * (1 - 1e-6)
    return (best * value).sum(1) / best.sum(1)


def segment_nuclei(dna, radius=NUCLEUS_RADIUS, contrast=.06, threshold=otsu):
    """Nuclei of (B, H, W) in [0, 1]: labels (B, H, W), 0 for background, 1 .. n in each image.

    Mask by `threshold` (empty where the two classes differ by less than `contrast`), seeds at the
    local maxima of the blurred stain, labels spread from the seeds by repeated 3x3 max-pooling, and
    whole objects smaller than a sixth of a nucleus removed.
    """
    smoothed = gaussian_blur(dna[:, None], 1.)[:, 0]
    cut = threshold(smoothed)[:, None, None]
    mask = smoothed > cut
    high = (smoothed * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)
    low = (smoothed * ~mask).sum((1, 2)) / (~mask).sum((1, 2)).clamp(min=1)
    mask &= (high - low > contrast)[:, None, None]
    peaks = gaussian_blur(dna[:, None], .36 * radius)
    ramp = torch.linspace(0, 1e-5, dna[0].numel(), device=dna.device).view_as(dna[0])
    peaks = peaks + ramp  # one seed, not many, where a saturated nucleus is flat
    window = 2 * round(.5 * radius) + 1
    seeds = (F.max_pool2d(peaks, window, 1, window // 2) == peaks)[:, 0] & mask
    labels = (seeds.flatten(1).cumsum(1).view_as(seeds) * seeds).float()  # numbered along rows
    for _ in range(round(3 * radius)):
        spread = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0]
        labels = torch.where((labels == 0) & mask, spread, labels)
    labels = labels.long()
    area = per_object(labels, torch.ones_like(dna))
    small = (area < 3.14 * radius ** 2 / 6) & ~touches(labels, "top", "bottom", "left", "right")
    small[:, 0] = False
    return torch.where(small.gather(1, labels.flatten(1)).view_as(labels), 0, labels)


def per_object(labels, values):
    """Sum of values (B, H, W) over each label: (B, L), column 0 the background."""
    count = int(labels.max()) + 1
    return torch.zeros(len(labels), count, device=labels.device).scatter_add_(
        1, labels.flatten(1), values.flatten(1).float())


def touches(labels, *sides):
    """Which objects reach the named sides of the field (top, bottom, left, right): (B, L)."""
    frame = torch.zeros_like(labels)
    for side in sides:
        {"top": frame[:, 0], "bottom": frame[:, -1], "left": frame[:, :, 0],
         "right": frame[:, :, -1]}[side].fill_(1)
    return per_object(labels, frame) > 0


def count_objects(labels):
    """Objects per image (B,). One that the border cuts counts if it shows at least half the mean
    area of the image's whole ones, so that its centre lies inside (half where none is whole)."""
    area = per_object(labels, torch.ones_like(labels))[:, 1:]
    cut = touches(labels, "top", "bottom", "left", "right")[:, 1:]
    mean = torch.where((area > 0) & ~cut, area, torch.nan).nanmean(1, keepdim=True)
    inside = torch.where(mean.isnan(), .5, (area >= mean / 2).float())
    return ((area > 0) * torch.where(cut, inside, 1.)).sum(1)


def object_shapes(labels):
    """Area in pixels and eccentricity of each object from second moments: (B, L - 1) each, NaN
    where an image has fewer objects and where the border cuts one."""
    h, w = labels.shape[1:]
    y, x = torch.meshgrid(torch.arange(h, device=labels.device),
                          torch.arange(w, device=labels.device), indexing="ij")
    y, x = y.expand_as(labels).float(), x.expand_as(labels).float()
    area = per_object(labels, torch.ones_like(y))
    n = area.clamp(min=1)
    my, mx = per_object(labels, y) / n, per_object(labels, x) / n
    yy = per_object(labels, y * y) / n - my ** 2 + 1 / 12               # a pixel is a square
    xx = per_object(labels, x * x) / n - mx ** 2 + 1 / 12
    xy = per_object(labels, x * y) / n - mx * my
    root = ((xx - yy) ** 2 / 4 + xy ** 2).clamp(min=0).sqrt()
    large, small = (xx + yy) / 2 + root, (xx + yy) / 2 - root
    eccentricity = (1 - small / large).clamp(0, 1).sqrt()
    cut = touches(labels, "top", "bottom", "left", "right")
    nothing = torch.where((area > 0) & ~cut, 1., torch.nan)
    return (area * nothing)[:, 1:], (eccentricity * nothing)[:, 1:]


def feature_names(channels):
    pairs = itertools.combinations(channels, 2)
    return (["nuclei", "nuclear_area", "nuclear_area_spread", "eccentricity", "coverage"]
            + [f"{c}_{kind}" for kind in ("mean", "spread", "bright", "in_nucleus", "near_nucleus",
                                          "fine", "medium", "coarse") for c in channels]
            + [f"{a}_{b}_correlation" for a, b in pairs])


def features(images, channels, batch=64, radius=NUCLEUS_RADIUS):
    """Morphology of images (N, C, H, W) in [-1, 1]: (N, F) float32, named by feature_names.

    Counts, sizes and shapes of nuclei; share of the field covered; and per channel the mean,
    spread and 99th percentile of intensity on [0, 1], the mean in nuclei and in a ring of one
    nuclear radius around them, and log energies of texture at 1, 2 and 4 pixels; correlations of
    channels. NaN where an image has no whole nucleus. Any batch size gives the same numbers.
    """
    nucleus = channels.index("DNA") if "DNA" in channels else 0
    found = []
    for x in images.split(batch):
        x = (x.to(device()).float() + 1) / 2
        labels = segment_nuclei(x[:, nucleus], radius)
        area, eccentricity = object_shapes(labels)
        count = count_objects(labels)
        size = area.nanmean(1)
        spread = (area - size[:, None]).square().nanmean(1).sqrt()
        total = gaussian_blur(x.mean(1, keepdim=True), 1.)[:, 0]
        coverage = (total > otsu(total)[:, None, None]).float().mean((1, 2))
        parts = [count, size, spread, eccentricity.nanmean(1), coverage]

        flat = x.flatten(2)                                              # (B, C, HW)
        inside = (labels > 0).float()[:, None]                           # (B, 1, H, W)
        r = round(radius)
        ring = F.max_pool2d(inside, 2 * r + 1, 1, r) - inside
        scales = [x, *(gaussian_blur(x, s) for s in (1., 2., 4.))]
        per_channel = [flat.mean(2), flat.std(2), flat.quantile(.99, dim=2),
                       (x * inside).sum((2, 3)) / inside.sum((2, 3)),
                       (x * ring).sum((2, 3)) / ring.sum((2, 3))]
        per_channel += [(fine - coarse).square().mean((2, 3)).add(1e-6).log()
                        for fine, coarse in itertools.pairwise(scales)]
        centred = flat - flat.mean(2, keepdim=True)
        unit = centred / centred.norm(dim=2, keepdim=True).clamp(min=1e-6)
        correlation = unit @ unit.transpose(1, 2)                        # (B, C, C)
        i, j = torch.triu_indices(len(channels), len(channels), 1)
        found.append(torch.cat([torch.stack(parts, 1), *per_channel, correlation[:, i, j]], 1))
    return torch.cat(found).cpu()


class Standardise:
    """Features to zero mean and unit variance over the real training images; NaN becomes 0, and
    three deviations are the most that counts, as the kernel takes third powers."""

    def __init__(self, real):
        self.mean = real.nanmean(0)
        self.std = (real - self.mean).square().nanmean(0).sqrt().clamp(min=1e-6)

    def __call__(self, found):
        return ((found - self.mean) / self.std).nan_to_num(0.).clamp(-3, 3)


def feature_scale(opened, radius=NUCLEUS_RADIUS, count=1000):
    """Standardise by the real training images of an open model, at most `count` of them."""
    some = np.random.default_rng(0).permutation(opened.train)[:count]
    return Standardise(features(real_images(opened, some), opened.model.channels, radius=radius))


# ------------------------------------------------------------------------------------------------
# 2. Distances
# ------------------------------------------------------------------------------------------------

def kernel_distance(a, b):
    """Unbiased squared MMD of features (n, F), (m, F) with k(x, y) = (x.y / F + 1)^3, the "kernel
    inception distance" of Binkowski et al. 2018 (arXiv:1801.01401, Eq. 4) on morphology."""
    a, b = a.double(), b.double()

    def k(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    n, m = len(a), len(b)
    aa, bb = k(a, a), k(b, b)
    return ((aa.sum() - aa.trace()) / (n * (n - 1)) + (bb.sum() - bb.trace()) / (m * (m - 1))
            - 2 * k(a, b).mean()).item()


def cell_distance(a, b, cells_a, cells_b):
    """Kernel distance per condition cell, averaged over cells."""
    return float(np.mean([kernel_distance(a[cells_a == name], b[cells_b == name])
                          for name in sorted(set(cells_a) & set(cells_b))]))


def wrong_cell_distance(a, b, cells_a, cells_b):
    """The ceiling: kernel distance of each cell to the cells that differ from it in every part of
    their name ("golgi x B2" and "actin x B3"), what images that obey the wrong condition get."""
    names = sorted(set(cells_a) & set(cells_b))
    parts = {name: name.split(" x ") for name in names}
    return float(np.mean([kernel_distance(a[cells_a == one], b[cells_b == other])
                          for one in names for other in names
                          if all(x != y for x, y in zip(parts[one], parts[other]))] or [np.nan]))


def interval(statistic, wells, strata, repeats=100, share=.5, seed=0):
    """5 to 95 % of a statistic(mask) over subsets of wells without replacement: in each stratum
    (condition cell and half) `share` of its wells, rounded up, so that no cell falls out. A half
    of the sample varies about the whole as the whole varies about the population."""
    rng, values = np.random.default_rng(seed), []
    inside = {s: np.unique(wells[strata == s]) for s in np.unique(strata)}
    for _ in range(repeats):
        kept = [rng.permutation(w)[:int(np.ceil(share * len(w)))] for w in inside.values()]
        values.append(statistic(np.isin(wells, np.concatenate(kept))))
    return around(statistic(np.ones(len(wells), bool)), values)


def around(estimate, values):
    """5 to 95 % of the values of half samples, about the estimate from the whole: with few wells
    the halves themselves lie off it."""
    low, high = np.nanpercentile(values, (5, 95)) - np.nanmean(values)
    return [float(estimate + low), float(estimate + high)]


def variance_ratio(a, b, conditions_a, conditions_b):
    """Variance of features among images of one condition, a over b, summed over features and
    averaged over conditions: below 1 the images of a condition are too alike (mode collapse)."""
    def within(x, conditions):
        groups = [x[conditions == name] for name in np.unique(conditions)]
        return torch.tensor([g.var(0).sum() for g in groups if len(g) > 1]).mean()
    return (within(a, conditions_a) / within(b, conditions_b)).item()


# ------------------------------------------------------------------------------------------------
# 3. A probe: which mechanism, which batch is this?
# ------------------------------------------------------------------------------------------------

class Probe(nn.Module):
    """A small residual network with one output per question."""

    def __init__(self, channels, answers):
        super().__init__()
        widths = (32, 64, 128)
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, 32, 3, padding=1))
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.GroupNorm(w // 8, w), nn.SiLU(), nn.Conv2d(w, w, 3, padding=1),
            nn.GroupNorm(w // 8, w), nn.SiLU(), nn.Conv2d(w, w, 3, padding=1)) for w in widths)
        self.down = nn.ModuleList(nn.Conv2d(w, 2 * w, 3, stride=2, padding=1) for w in widths[:-1])
        self.heads = nn.ModuleDict({q: nn.Linear(2 * widths[-1], len(a)) for q, a in
                                    answers.items()})

    def forward(self, x):                                                # (B, C, H, W)
        h = self.stem(x)
        for i, block in enumerate(self.blocks):
            h = h + block(h)
            h = self.down[i](h) if i < len(self.down) else h
        h = torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)
        return {q: head(h) for q, head in self.heads.items()}


def train_probe(images, answers, labels, steps, seed=0, batch=32, weights=None):
    """Train a Probe on images (N, C, H, W) with labels {question: (N,) long}, drawn with equal
    probability or by `weights` (N,)."""
    torch.manual_seed(seed)
    probe = Probe(images.shape[1], answers).to(device())
    optimiser = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=.02)
    for step in tqdm(range(steps), desc="training the probe", mininterval=1):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3)
        rng, _ = step_rng(seed, step)
        chosen = torch.from_numpy(rng.choice(len(images), batch, p=weights))
        x = torch.rot90(images[chosen], int(rng.integers(4)), (2, 3))
        x = x.flip(3) if rng.random() < .5 else x
        with autocast():
            out = probe(x.to(device()))
        loss = sum(F.cross_entropy(out[q].float(), labels[q][chosen].to(device())) for q in labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return probe.eval()


@torch.no_grad()
def answer(probe, images, batch=64):
    """{question: (N,) the probe's choice} for images (N, C, H, W)."""
    out = [{q: o.argmax(1).cpu() for q, o in probe(x.to(device())).items()}
           for x in images.split(batch)]
    return {q: torch.cat([o[q] for o in out]) for q in out[0]}


def screen_probe(folder, model, steps=1500):
    """The probe of a simulated screen: trained on fresh cells under the same microscopes without
    confounding, on controls and on doses above half effect. Kept in runs/probe.

    Returns (probe, {question: answers}), or None where the data set was not simulated.
    """
    note = Path(folder) / "simulation.json"
    if not note.exists():
        return None
    screen = replace(data.Screen(**json.loads(note.read_text())), confounding=0., draw=1000)
    rows = [r for r in data.layout(screen) if r["role"] == "control" or r["true_effect"] >= .5]
    answers = {"true_mechanism": ["none", *data.MECHANISMS],
               "batch": [f"B{b + 1}" for b in range(screen.batches)]}
    code = Path(data.__file__).read_bytes().split(b"# 3. The manifest")[0]  # the simulator's source
    code += (inspect.getsource(Probe) + inspect.getsource(train_probe)).encode()
    key = hashlib.sha1(f"{screen}{model.intensity}{steps}".encode() + code).hexdigest()[:12]
    path = Path("runs/probe") / f"probe-{key}.pt"
    settings = model.content["vae"]["settings"]
    if settings["binning"] != 1 or settings["crop"]:
        print("the model sees binned or cropped images: no probe, it is trained on whole ones")
        return None
    if not path.exists():
        print("drawing an unconfounded screen to train the probe on")
        images = photographs(rows, screen, model.intensity)
        labels = {q: torch.tensor([a.index(r[q]) for r in rows]) for q, a in answers.items()}
        probe = train_probe(images, answers, labels, steps)
        save_checkpoint(path, "probe", {"weights": probe.state_dict()})
    probe = Probe(len(model.channels), answers).to(device())
    probe.load_state_dict(load_checkpoint(path, "probe", "remove it")["weights"])
    return probe.eval(), answers


# ------------------------------------------------------------------------------------------------
# 4. quality: are held-out conditions drawn as they look?
# ------------------------------------------------------------------------------------------------

def open_model(args):
    """The model and the data its autoencoder was trained on (or --data)."""
    model = Model.load(args.checkpoint)
    settings = SimpleNamespace(**model.content["vae"]["settings"])
    settings.data = args.data or model.content["settings"]["data"]
    if not 1 <= args.steps <= model.schedule.T:
        raise UserError(f"--steps {args.steps}: between 1 and {model.schedule.T}")
    model.weights(args.guidance)
    manifest, pixels, train, held = open_data(settings, draw=False)
    for field in model.fields:
        if field.name not in manifest.columns:
            raise UserError(f"{manifest.path} has no column {field.name}, which the model was told")
        check_values(field, manifest.columns[field.name],
                     model.denoiser.conditioner.encoder_class.is_molecule)
    return SimpleNamespace(model=model, settings=settings, manifest=manifest, pixels=pixels,
                           train=train, held=held)


def real_images(opened, rows, rng=None):
    return views(opened.pixels, rows, opened.settings, opened.model.intensity, rng)


def heldout_sets(opened, wanted):
    """{name: rows} of what the training never saw: the `wanted` values of the column `split`, or
    the held-out rows where the autoencoder was trained with a split of its own."""
    if opened.settings.split != "auto" or "split" not in opened.manifest.columns:
        return {"held out": opened.held}
    label = np.array(opened.manifest.columns["split"])
    missing = [name for name in wanted if name not in label or name == "train"]
    if missing:
        raise data.DataError(f"--sets {' '.join(missing)}: the column split has "
                             + ", ".join(sorted(set(label) - {"train"})))
    return {name: np.flatnonzero(label == name) for name in wanted}


def halves(manifest, rows, cells, limit, seed=0):
    """Two sets of rows from disjoint wells, of equal size in each condition cell: (a, b).

    Two sites of each chosen well, so that the spread within a condition can be seen. Cells with
    fewer than four wells are left out. About `limit` rows in each half, more with many cells.
    """
    rng, wells = np.random.default_rng(seed), wells_of(manifest)
    names = [name for name in np.unique(cells[rows])
             if len(np.unique(wells[rows][cells[rows] == name])) >= 4]
    each = max(4, limit // (2 * max(1, len(names))))  # wells per cell and half, where there are
    a, b = [], []
    for name in names:
        inside = rows[cells[rows] == name]
        pairs = [rng.permutation(inside[wells[inside] == w])[:2]
                 for w in rng.permutation(np.unique(wells[inside]))]
        n = min(each, len(pairs) // 2)
        a += [i for pair in pairs[:n] for i in pair]
        b += [i for pair in pairs[n:2 * n] for i in pair]
    return np.array(a, int), np.array(b, int)


def wells_of(manifest):
    """One name for each well (plate and well), or for each image where wells are not named."""
    c = manifest.columns
    if "well" not in c:
        return np.arange(len(manifest)).astype(str)
    return np.array([f"{p}/{w}" for p, w in zip(c.get("plate", [""] * len(manifest)), c["well"])])


def cells_of(manifest, by):
    """The condition cell of each row: its values in the columns `by`, joined."""
    missing = [name for name in by if name not in manifest.columns]
    if missing:
        raise data.DataError(f"--by: {manifest.path} has no column {', '.join(missing)}")
    return np.array([" x ".join(v) for v in zip(*(manifest.columns[name] for name in by))])


def quality_of(opened, rows_a, rows_b, cells, standardise, probe, request):
    """One line of the table: generated images under the conditions of rows_a, and the same rows
    themselves through the autoencoder, each against the real rows_b."""
    model, manifest = opened.model, opened.manifest
    real_a, real_b = real_images(opened, rows_a), real_images(opened, rows_b)
    columns = {f.name: manifest.rows(rows_a, f.name) for f in model.fields}
    columns = blank_unseen(model.fields, columns)
    sets = {"real": real_a, "autoencoder": reconstruct(model.vae, real_a)[0],
            "generated": generate(model, columns, list(range(len(rows_a))), request)}
    b = standardise(features(real_b, model.channels))
    cells_a, cells_b, wells = cells[rows_a], cells[rows_b], wells_of(manifest)
    strata = np.array([f"a {c}" for c in cells_a] + [f"b {c}" for c in cells_b])
    result = {"images": len(rows_a), "cells": len(set(cells_a))}
    for name, images in sets.items():
        a = standardise(features(images, model.channels))
        entry = {"distance": cell_distance(a, b, cells_a, cells_b),
                 "interval": interval(lambda m: cell_distance(
                     a[m[:len(a)]], b[m[len(a):]], cells_a[m[:len(a)]], cells_b[m[len(a):]]),
                     np.concatenate([wells[rows_a], wells[rows_b]]), strata),
                 "variance_ratio": variance_ratio(a, b, wells[rows_a], wells[rows_b])}
        if name == "real":
            entry["ceiling"] = wrong_cell_distance(a, b, cells_a, cells_b)
        if probe:
            entry |= probe_scores(probe, images, manifest, rows_a)
        result[name] = entry
    return result, sets


def named_right(probe, images, rows):
    """{"mechanism", "batch": (N,) bool}: which images the probe names as their rows say."""
    network, answers = probe
    said = answer(network, images)
    return {q.removeprefix("true_"): torch.tensor([options[k] == r[q] for k, r in
                                                   zip(said[q], rows, strict=True)])
            for q, options in answers.items()}


def probe_scores(probe, images, manifest, rows):
    """Share of images that the probe names right; the mechanism at doses above half effect."""
    names = ("true_mechanism", "batch", "true_effect")
    truth = [{k: manifest.columns[k][i] for k in names} for i in rows]
    hits = named_right(probe, images, truth)
    strong = torch.tensor([float(r["true_effect"]) >= .5 for r in truth])
    return {"true_mechanism": hits["mechanism"][strong].float().mean().item(),
            "batch": hits["batch"].float().mean().item()}


def quality(args):
    """The table of `evaluate.py quality`."""
    opened = open_model(args)
    model, manifest = opened.model, opened.manifest
    out = Path(args.out or Path(args.checkpoint).parent)
    out.mkdir(parents=True, exist_ok=True)
    if args.mol2image:
        return benchmark(opened, args, out)
    if args.by:
        return quality_by_cell(opened, args, out)
    if "true_mechanism" not in manifest.columns:
        raise data.DataError(f"{manifest.path} is not simulated: say with --by which columns make "
                             "a condition, such as --by compound plate")
    limit, sets = 96 if args.quick else args.images, heldout_sets(opened, args.sets or HELD_OUT)
    probe = screen_probe(manifest.path.parent, model)
    cells = cells_of(manifest, ["true_mechanism", "batch"])
    standardise = feature_scale(opened)
    request = Request(model.weights(args.guidance), args.form, args.interval, steps=args.steps)
    table, pictures = {}, {}
    for name, rows in sets.items():
        rows_a, rows_b = halves(manifest, rows, cells, limit)
        if not len(rows_a):
            print(f"{name}: no condition cell has four wells, left out")
            continue
        left_out = len(set(cells[rows])) - len(set(cells[rows_a]))
        print(f"{name}: {len(set(cells[rows_a]))} condition cells, {left_out} with fewer than four "
              "wells left out")
        table[name], images = quality_of(opened, rows_a, rows_b, cells, standardise, probe,
                                         request)
        pictures[name] = {k: v[::max(1, len(v) // 8)][:8] for k, v in images.items()}
    if not table:
        raise UserError("nothing to compare: no condition cell has four wells")
    print_quality(table, probe is not None)
    report = {"checkpoint": args.checkpoint, "guidance": model.weights(args.guidance),
              "form": args.form, "interval": args.interval, "steps": args.steps, "table": table}
    (out / "quality.json").write_text(json.dumps(report, indent=1))
    labels = [f"{name}\n{kind}" for name, kinds in pictures.items() for kind in kinds]
    rows = [list(images.numpy()) for kinds in pictures.values() for images in kinds.values()]
    data.picture(out / "quality.png", rows, model.channels, labels, pixel_um=model.pixel_um)
    print(f"wrote {out}/quality.json and quality.png")


def print_quality(table, probed):
    """Kernel distance x 1000 with its interval, variance ratio, probe scores."""
    columns = ["kernel distance x 1000 (5-95 %)", "ceiling", "variance"]
    print(f"\n{'held-out set':18s}{'images':24s}{columns[0]:34s}{columns[1]:>9s}{columns[2]:>10s}"
          + ("  mechanism   batch" if probed else ""))
    for name, entry in table.items():
        for kind in ("real", "autoencoder", "generated"):
            e = entry[kind]
            label = {"real": "other real wells (floor)", "autoencoder": "through the autoencoder",
                     "generated": f"generated ({entry['images']})"}[kind]
            text = f"{1000 * e['distance']:8.1f}  ({1000 * e['interval'][0]:.1f} to " \
                   f"{1000 * e['interval'][1]:.1f})"
            ceiling = f"{1000 * entry['real']['ceiling']:9.1f}" if kind == "real" else " " * 9
            print(f"{name if kind == 'real' else '':18s}{label:24s}{text:34s}{ceiling}"
                  f"{e['variance_ratio']:10.2f}"
                  + (f"{e['true_mechanism']:11.2f}{e['batch']:8.2f}" if probed else ""))


# --- real plates: a table by condition cell -------------------------------------------------------

def crossed_requests(opened, by):
    """Every combination of the columns `by`, also those without a single image.

    Returns {cell: {field: value}}. A field takes its value from the first of the columns that
    fixes it (SMILES and dose from the compound); a field that none fixes is unknown.
    """
    columns, fixed = opened.manifest.columns, {}
    for field in opened.model.fields:
        for name in by:
            pairs = set(zip(columns[name], columns[field.name]))
            if len(pairs) == len(set(columns[name])):
                fixed[field.name] = (name, dict(pairs))
                break
    values = [sorted(set(columns[name])) for name in by]
    return {" x ".join(combination): {
        f: table[combination[by.index(name)]] for f, (name, table) in fixed.items()}
        for combination in itertools.product(*values)}


def nearest_distance(images, training, batch=64):
    """Root mean square difference of each image (N, C, H, W) to its nearest in `training`."""
    a, b = images.flatten(1), training.flatten(1)
    return torch.cat([torch.cdist(x, b).min(1).values for x in a.split(batch)]) / a.shape[1] ** .5


def summarise(images, channels, radius):
    """Nuclei per image and mean intensity of each channel on [0, 1]."""
    found, names = features(images, channels, radius=radius), feature_names(channels)
    keep = ["nuclei", *(f"{c}_mean" for c in channels)]
    return {k: float(found[:, names.index(k)].mean()) for k in keep}


def beside(opened, args, cell, request, inside, n, real):
    """{"generated": n images, "real ...": `real` each} of a condition cell, real ones (rows
    `inside`) apart by the column --also."""
    model, rng = opened.model, np.random.default_rng(1)
    sets = {"generated": model.generate({name: [value] * n for name, value in request.items()},
                                        range(n), args.guidance, args.form, args.steps,
                                        interval=args.interval)}
    label = np.array([opened.manifest.columns[args.also][i] if args.also else "" for i in inside])
    return sets | {f"real {value}".strip(): real_images(opened, rng.choice(
        inside[label == value], real), rng) for value in np.unique(label)}


def one_cell(opened, args, cell, request, inside, training, n):
    """One condition cell: (entry of the table, real images, generated images)."""
    sets = beside(opened, args, cell, request, inside, n, 4 * n)
    entry = {"cell": cell, "in_training": bool(np.isin(inside, opened.train).any())} | {
        name: summarise(x, opened.model.channels, args.nucleus_radius) for name, x in sets.items()}
    fake = sets.pop("generated")
    entry["nearest_training_view"] = float(nearest_distance(fake, training).median())
    real = [image for x in sets.values() for image in x[:6].numpy()]
    return entry, real[::max(1, len(real) // 6)][:6], list(fake[:6].numpy())


def quality_by_cell(opened, args, out):
    """For each combination of `--by`: nuclei and intensities, real and generated, and how near the
    nearest training view is: a model that memorised has generated images nearer to one than
    held-out real images are, after the autoencoder has blurred them as it blurs generated ones."""
    if args.also and args.also not in opened.manifest.columns:
        raise data.DataError(f"--also: {opened.manifest.path} has no column {args.also}")
    model, n = opened.model, 24 if args.quick else 64
    cells = cells_of(opened.manifest, args.by)
    training = torch.cat(list(cached_views(opened.pixels, opened.train, opened.settings,
                                           model.intensity, model.content["settings"]["views"])))
    rng = np.random.default_rng(1)
    held = real_images(opened, rng.choice(opened.held, 64), rng)
    blurred, _ = reconstruct(model.vae, held)
    report = {"checkpoint": args.checkpoint, "guidance": model.weights(args.guidance),
              "form": args.form, "steps": args.steps, "by": args.by, "table": [],
              "held_out_nearest": float(nearest_distance(held, training).median()),
              "held_out_nearest_autoencoder": float(nearest_distance(blurred, training).median())}
    rows, labels = [], []
    for cell, request in crossed_requests(opened, args.by).items():
        entry, real, fake = one_cell(opened, args, cell, request, np.flatnonzero(cells == cell),
                                     training, n)
        report["table"].append(entry)
        rows.append((real or [None] * 6) + fake)
        labels.append(cell.replace(" x ", "\n") + ("" if entry["in_training"] else "\n(unseen)"))
    print_cells(report, model.channels)
    (out / "quality.json").write_text(json.dumps(report, indent=1))
    data.picture(out / "quality.png", rows, model.channels, labels,
                 ["real"] * 6 + ["generated"] * 6, model.pixel_um)
    print(f"wrote {out}/quality.json and quality.png")


def print_cells(report, channels):
    """The table of quality_by_cell."""
    names = ["nuclei", *(f"{c}_mean" for c in channels)]
    print(f"\n{'':48s}" + "".join(f"{k.replace('_mean', ''):>9s}" for k in names)
          + "  nearest training view")
    for entry in report["table"]:
        for kind in [k for k in entry if k.startswith(("real", "generated"))]:
            label = entry["cell"] + ("" if entry["in_training"] else " (unseen)")
            print(f"{label if kind == 'generated' else '':34s}{kind:14s}"
                  + "".join(f"{entry[kind][k]:9.3f}" for k in names)
                  + (f"{entry['nearest_training_view']:9.3f}" if kind == "generated" else ""))
    print(f"nearest training view of held-out real images {report['held_out_nearest']:.3f}, after "
          f"the autoencoder {report['held_out_nearest_autoencoder']:.3f}")


# ------------------------------------------------------------------------------------------------
# 5. disentangle: how much of the image is biology, how much is experiment?
# ------------------------------------------------------------------------------------------------

def omega_squared(y, blocked=True, scale=None):
    """Share of variance explained in a balanced factorial, without the upward bias of eta squared.

    y: (biology, experiment, seeds, F). blocked: seed s stands for the same cells (or the same
    noise) in every place of the factorial, so that its own variance is no error. Returns
    {"biology", "experiment", "interaction", "scale": (F,)}, after Olejnik & Algina 2003 (Psychol.
    Methods 8):

        omega^2 = (SS_effect - df_effect MS_error) / (SS_total + MS_block)

    with MS_error for MS_block without blocks. `scale` (F,) replaces the denominator: the same
    figure in the units of another factorial of this size.
    """
    b, e, n, _ = y.shape
    y = y.double()
    mean = y.mean((0, 1, 2))
    biology, experiment = y.mean((1, 2)) - mean, y.mean((0, 2)) - mean   # (b, F), (e, F)
    both = y.mean(2) - mean - biology[:, None] - experiment[None]        # (b, e, F)
    squares = {"biology": (e * n * biology.square().sum(0), b - 1),
               "experiment": (b * n * experiment.square().sum(0), e - 1),
               "interaction": (n * both.square().sum((0, 1)), (b - 1) * (e - 1))}
    total = (y - mean).square().sum((0, 1, 2))
    blocks = b * e * (y.mean((0, 1)) - mean).square().sum(0) * blocked
    freedom = (b * e - 1) * (n - 1) if blocked else b * e * (n - 1)
    error = (total - blocks - sum(square for square, _ in squares.values())) / freedom
    if scale is None:
        scale = (total + (blocks / (n - 1) if blocked else error)).clamp(min=1e-12)
    return {name: ((square - df * error) / scale).float()
            for name, (square, df) in squares.items()} | {"scale": scale}


def leaks(found, truth, least=.05):
    """What of one side shows where only the other should, beyond what it does in the truth.

    found, truth: as from omega_squared. A feature belongs to the side that explains more of it in
    the truth (at least `least`). L(e->b): share of the biological features that the experiment
    explains, minus the same in the truth, averaged over them; L(b->e): the other way round.
    """
    biology, experiment = truth["biology"], truth["experiment"]
    counts = torch.maximum(biology, experiment) >= least
    ours = counts & (biology > experiment)
    theirs = counts & ~ours
    return {"leak_e_to_b": (found["experiment"] - experiment)[ours].mean().item(),
            "leak_b_to_e": (found["biology"] - biology)[theirs].mean().item()}


def all_leaks(y, true, blocked):
    """Leaks of factorials (b, e, n, F): as shares of the generated images' own variance, and, as
    a model that draws no biology makes the share of the experiment larger, in the truth's units."""
    truth = omega_squared(true, blocked)
    own, units = omega_squared(y), omega_squared(y, scale=truth["scale"])
    return leaks(own, truth) | {f"{k}_units": v for k, v in leaks(units, truth).items()}


def effect_size(y, one, other):
    """How large effects are, as a share of the true ones: each level's mean, from the mean of all,
    projected on the true one. y and two halves of the truth: (levels, ..., F). 1 is right, more
    is exaggeration. Two halves, as the square of one would hold its noise."""
    y, one, other = (x.flatten(1, -2).mean(1) for x in (y, one, other))              # (levels, F)
    y, one, other = (x - x.mean(0) for x in (y, one, other))
    return ((y * one).sum() / (other * one).sum()).item()


def simulated_screen(opened, draw):
    """The settings of a simulated screen, for fresh cells (`draw`) under the same microscopes."""
    note = opened.manifest.path.parent / "simulation.json"
    if not note.exists():
        raise data.DataError(f"{opened.manifest.path} is not simulated: the truth is not known "
                             "(for real plates: --by)")
    if opened.settings.binning != 1 or opened.settings.crop:
        raise UserError("the model sees binned or cropped images, the simulator draws whole fields")
    return replace(data.Screen(**json.loads(note.read_text())), draw=draw)


def photographs(rows, screen, intensity):
    """Fresh fields of view for rows as in data.layout: (N, C, H, W) in [-1, 1]."""
    images = np.stack([f["image"] for f in data.draw_fields(rows, screen, counterpart=False)])
    return torch.from_numpy(data.scale_intensity(images, intensity))


class SimulatedFactorial:
    """Every mechanism (and the untreated cells) in every batch, the same cells in each: what the
    simulator would photograph, and what a model is asked for.

    Seed s stands for a position on a plate, one molecule of each mechanism and one dose above half
    effect. The molecules are seen ones, so that only the *pair* may be new.
    """
    blocked = True

    def __init__(self, opened, images):
        self.opened, self.screen = opened, simulated_screen(opened, 2000)
        batches = self.screen.batches
        self.biology = ["none", *data.MECHANISMS]
        self.experiment = [f"B{b + 1}" for b in range(batches)]
        self.seeds = max(4, images // (len(self.biology) * batches))
        self.unseen = {kind: {(m, f"B{b + 1}") for m, b in data.heldout_pairs(batches, kind)
                              .items()} for kind in ("val", "test")}

    def rows(self, cells=0, requests=0):
        """Rows as data.layout writes them, in the order (biology, experiment, seed). Another first
        number of `cells`: other cells; of `requests`: other molecules, doses and positions."""
        molecules = {m: [x for x in data.molecules() if x["mechanism"] == m and x["kind"] == "train"
                         and x["ec50"] < max(data.DOSES)] for m in self.biology}
        rows = []
        for m, batch, s in itertools.product(self.biology, self.experiment, range(self.seeds)):
            rng = np.random.default_rng([self.screen.seed, 5, requests + s])
            well, plate = rng.integers((2, 2), (16, 24)), rng.integers(self.screen.plates_per_batch)
            site, picks = rng.integers(1, 5), rng.random(2)
            molecule = (molecules[m][int(picks[0] * len(molecules[m]))] if molecules[m] else
                        dict(smiles=data.DMSO, ec50=np.inf))
            doses = [d for d in data.DOSES if d >= molecule["ec50"]] or [0.]
            dose = doses[int(picks[1] * len(doses))]
            plate += self.experiment.index(batch) * self.screen.plates_per_batch + 1
            rows.append(dict(
                smiles=molecule["smiles"], dose=dose, batch=batch, plate=f"P{plate:02d}",
                row=int(well[0]), column=int(well[1]), site=int(site), cells=cells + s,
                true_mechanism=m, true_effect=data.hill(dose, molecule["ec50"])))
        return rows

    def truth(self, half):
        return photographs(self.rows(10_000 * (half + 1)), self.screen, self.opened.model.intensity)

    def requests(self, fields):
        """What a model with these fields is asked for, {field: [biology * experiment * seeds]}."""
        return {f.name: [str(r.get(f.name, "")) for r in self.rows()] for f in fields}

    def held(self, kind):
        """Which places (biology, experiment) of the factorial are held-out pairs of this kind."""
        return torch.tensor([[(m, b) in self.unseen[kind] for b in self.experiment]
                             for m in self.biology])


class RealFactorial:
    """Two columns of a manifest, crossed: complete cells only, real images for the truth, in two
    halves that share no image."""
    blocked = False

    def __init__(self, opened, by, images):
        cells = cells_of(opened.manifest, by)
        self.opened, self.rows_of = opened, {n: np.flatnonzero(cells == n) for n in set(cells)}
        first, second = (sorted(set(opened.manifest.columns[name])) for name in by)
        self.experiment = [e for e in second
                           if sum(f"{b} x {e}" in self.rows_of for b in first) > 1]
        self.biology = [b for b in first
                        if all(f"{b} x {e}" in self.rows_of for e in self.experiment)]
        if len(self.biology) < 2 or len(self.experiment) < 2:
            raise UserError(f"--by {' '.join(by)}: no two values of the one were both imaged with "
                            "two of the other")
        # the negative control first: the level that most images have
        self.biology.sort(key=lambda b: -sum(len(self.rows_of[f"{b} x {e}"])
                                             for e in self.experiment))
        self.names = [f"{b} x {e}" for b in self.biology for e in self.experiment]
        self.seeds, self.asked = max(4, images // len(self.names)), crossed_requests(opened, by)

    def truth(self, half):
        rng, chosen = np.random.default_rng(half), []
        for rows in (self.rows_of[name] for name in self.names):
            ours = rows[half % 2::2] if len(rows) > 1 else rows  # halves share no image
            chosen.append(rng.choice(ours, self.seeds))
        return real_images(self.opened, np.concatenate(chosen), rng)

    def requests(self, fields):
        names = [f.name for f in fields if f.name in self.asked[self.names[0]]]
        return {name: [self.asked[cell][name] for cell in self.names for _ in range(self.seeds)]
                for name in names}

    def held(self, kind):
        trained = set(self.opened.train)
        return torch.tensor([[kind == "test" and not trained & set(self.rows_of[f"{b} x {e}"])
                              for e in self.experiment] for b in self.biology])


@dataclass
class Request:
    """How images are asked for."""
    guidance: dict
    form: str = "nested"
    interval: tuple = INTERVAL
    rescale: float = 0.
    steps: int = 15
    sampler: str = "ddim"


def request_of(args, model, **changes):
    """A request from the command line; weights only for groups that the model has."""
    words = dict(guidance=args.guidance, form=args.form, interval=tuple(args.interval),
                 rescale=args.rescale, steps=args.steps) | changes
    kept = {g: w for g, w in words["guidance"].items() if g in model.groups}
    return Request(**words | {"guidance": model.weights(kept)})


def generate(model, columns, seeds, request):
    """Images of a request, in bf16 where that pays. What is asked for twice (of a model that is
    told no batch, the same in every batch) is drawn once."""
    keys = list(zip(seeds, *columns.values()))
    place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    first = [keys.index(key) for key in place]
    with autocast():
        images = model.generate({k: [v[i] for i in first] for k, v in columns.items()},
                                [seeds[i] for i in first], request.guidance, request.form,
                                request.steps, sampler=request.sampler,
                                interval=request.interval, rescale=request.rescale)
    return images[[place[key] for key in keys]]


def generate_places(model, factorial, request, where=None):
    """Images (places * seeds, C, H, W) of the places of a factorial (b, e) that `where` says, all
    by default. Seed s is the same noise in each."""
    n = factorial.seeds
    if where is None:
        where = torch.ones(len(factorial.biology), len(factorial.experiment), dtype=torch.bool)
    kept = where.flatten().repeat_interleave(n).nonzero()[:, 0].tolist()
    columns = blank_unseen(model.fields, {
        k: [v[i] for i in kept] for k, v in factorial.requests(model.fields).items()})
    return generate(model, columns, [i % n for i in kept], request)


class Truth:
    """What a factorial really looks like: two sets of features on disjoint cells, and what follows
    from them. Drawn once, and compared with many models."""

    def __init__(self, factorial, probe=None, radius=NUCLEUS_RADIUS, more=4):
        self.factorial, self.probe, self.radius = factorial, probe, radius
        self.standardise = feature_scale(factorial.opened, radius)
        self.images = factorial.truth(0)
        self.a = self.measure(self.images)
        # several times as many on the other side: the distance to them is less noisy
        self.b = torch.cat([self.measure(factorial.truth(2 * k + 1)) for k in range(more)], 2)
        self.omega = omega_squared(self.a, factorial.blocked)
        self.scores = self.named_right(self.images)

    def features(self, images):
        found = features(images, self.factorial.opened.model.channels, radius=self.radius)
        return self.standardise(found)

    def measure(self, images):
        """Images of all places to standardised features (biology, experiment, seeds, F)."""
        f = self.factorial
        return self.features(images).view(len(f.biology), len(f.experiment), f.seeds, -1)

    def distance(self, y, where):
        """Kernel distance of y (b, e, n, F) to the truth, per place, averaged over `where`."""
        return float(np.mean([kernel_distance(y[i, j], self.b[i, j])
                              for i, j in where.nonzero().tolist()] or [np.nan]))

    def ceiling(self, where):
        """The true images of one place against those of places that differ in both."""
        b, e, n, _ = self.a.shape
        return float(np.mean([kernel_distance(self.a[k, m], self.b[i, j, :2 * n])
                              for i, j in where.nonzero().tolist() for k in range(b)
                              for m in range(e) if k != i and m != j] or [np.nan]))

    def named_right(self, images):
        """{"mechanism", "batch": (b, e, n)}, 1 where the probe names it; {} without a probe."""
        if self.probe is None:
            return {}
        hits = named_right(self.probe, images, self.factorial.rows())
        return {k: hit.float().view(self.a.shape[:3]) for k, hit in hits.items()}


def over_seeds(statistic, seeds, repeats=100):
    """5 to 95 % of statistic(indices), a dict of numbers, over random halves of the seeds: a half
    drawn without replacement varies about the whole as the whole about the population."""
    rng, whole = np.random.default_rng(0), statistic(torch.arange(seeds))
    values = [statistic(torch.from_numpy(np.sort(rng.permutation(seeds)[:max(2, seeds // 2)])))
              for _ in range(repeats)]
    return {k: around(whole[k], [v[k] for v in values]) for k in whole}


def named_run(model, factorial):
    """Which model this is: {"arm", "confounding" (None on real plates), "seed"}."""
    told, settings = set(model.groups), model.content["settings"]
    arm = ("perturbations" if told == {"biology"} else "experiment" if told == {"experiment"}
           else "balanced" if settings["balance"] else "both")
    screen = getattr(factorial, "screen", None)
    return {"arm": arm, "confounding": screen and screen.confounding, "seed": settings["seed"]}


def disentangle_one(model, truth, request):
    """The figures of one model under one request, as one line of results.jsonl."""
    f = truth.factorial
    images = generate_places(model, f, request)
    y, hits = truth.measure(images), truth.named_right(images)
    held = {k: f.held(k) for k in ("val", "test")}
    seen = ~(held["val"] | held["test"])
    target = held["test"] if held["test"].any() else seen

    def figures(s):
        found = all_leaks(y[:, :, s], truth.a[:, :, s], f.blocked)
        found |= {f"probe_{k}": hit[:, :, s].mean().item() for k, hit in hits.items()}
        return found | {"distance_heldout": truth.distance(y[:, :, s], target)}
    entry = named_run(model, f) | {
        "form": request.form, "w_biology": request.guidance.get("biology", 0.),
        "w_experiment": request.guidance.get("experiment", 0.), "step": model.content["step"],
        "interval": list(request.interval), "rescale": request.rescale, "images": len(images)}
    entry |= figures(torch.arange(f.seeds))
    entry |= {f"{k}_interval": v for k, v in over_seeds(figures, f.seeds).items()}
    entry["effect_biology"] = effect_size(y, truth.a, truth.b)
    entry["effect_experiment"] = effect_size(*(x.transpose(0, 1) for x in (y, truth.a, truth.b)))
    entry |= {f"probe_{k}_heldout": hit[target].mean().item() for k, hit in hits.items()}
    entry |= {f"probe_{k}_real": hit.mean().item() for k, hit in truth.scores.items()}
    entry |= {"distance_seen": truth.distance(y, seen),
              "distance_val": truth.distance(y, held["val"]),
              "floor": truth.distance(truth.a, target), "ceiling": truth.ceiling(target)}
    omega = omega_squared(y)
    return entry | {"omega": {k: omega[k].tolist() for k in ("biology", "experiment",
                                                             "interaction")}}


# --- studies: many such lines, kept in results.jsonl so that a restart skips what is done ---------

WEIGHTS_TRIED = [(1, 1), (1.5, 1.5), (2, 1), (2, 1.5), (2, 2), (2.5, 2.5), (3, 2), (3, 3), (4, 2)]
FORMS_TRIED = [dict(form=form, interval=interval) for interval in ((0., 1.), INTERVAL)
               for form in FORMS] + [dict(form="nested", interval=(0., 1.), rescale=.7)]
SAMPLERS_TRIED = [dict(sampler=s, steps=n) for n in (5, 10, 15, 30, 60) for s in SAMPLERS]
TABLE = ("leak_e_to_b", "leak_b_to_e", "effect_biology", "effect_experiment", "probe_mechanism",
         "probe_batch", "distance_seen", "distance_heldout")


class Results:
    """results.jsonl: one line per finished measurement, named by what it is a measurement of."""

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done = {json.dumps(e["key"], sort_keys=True): e for e in map(json.loads, lines)}

    def get(self, key, measure):
        """The line of this key (a dict), measured if it is not there yet."""
        name = json.dumps(key, sort_keys=True)
        if name not in self.done:
            self.done[name] = {"key": json.loads(name)} | measure()
            write_log(self.path, **self.done[name])
        return self.done[name]


def finger(path):
    """The first letters of a file's hash: another file of the same name is another result."""
    return hashlib.sha1(Path(path).read_bytes()).hexdigest()[:12]


def trained(config):
    """Train a diffusion model unless it is there, going on from where it was interrupted."""
    path = Path(config.out) / "model.pt"
    config.resume = path.exists() and load_checkpoint(path, "ldm", "")["step"] < config.steps
    return train_ldm.train(config)


def print_lines(lines):
    """A table: one line per measurement, leaks and probes as they are, distances x 1000."""
    print(f"\n{'':34s}" + "".join(f"{name.replace('probe_', '').replace('distance_', 'd. '):>19s}"
                                  for name in TABLE))

    def row(label, values):
        print(f"{label:34s}" + "".join(f"{1000 * v:19.0f}" if "distance" in name else f"{v:19.3f}"
                                       for name, v in zip(TABLE, values)))
    for line in lines:
        row(line["label"], [line.get(name, np.nan) for name in TABLE])
    line = lines[0]
    row("the truth itself (floor)", [0, 0, 1, 1, line.get("probe_mechanism_real", np.nan),
                                     line.get("probe_batch_real", np.nan), np.nan, line["floor"]])
    row("wrong places (ceiling)", [np.nan] * 7 + [line["ceiling"]])


def planned(args, model):
    """What a study of one checkpoint measures: [(label, checkpoint, changes of the request)]."""
    def label(c):
        return c["form"] + (f", t/T {c['interval'][0]:g} to {c['interval'][1]:g}"
                            if "interval" in c else "") + (", rescaled" if "rescale" in c else "")
    if args.study == "weights":
        return [(f"weights {b:g}, {e:g}", args.checkpoint,
                 {"guidance": dict(biology=b, experiment=e)}) for b, e in WEIGHTS_TRIED]
    if args.study == "forms":
        return [(label(changes), args.checkpoint, changes) for changes in FORMS_TRIED]
    if args.study == "samplers":
        return [(f"{c['steps']} steps, {c['sampler']}", args.checkpoint, c) for c in SAMPLERS_TRIED]
    if args.study == "training":
        files = sorted(Path(args.checkpoint).parent.glob("step-*.pt"),
                       key=lambda p: int(p.stem.split("-")[1]))
        if not files:
            raise UserError(f"no step-*.pt beside {args.checkpoint}: train with --keep 1000")
        return [(f"step {file.stem.split('-')[1]}", str(file), {}) for file in files]
    weights = ", ".join(f"{g} {w:g}" for g, w in model.weights(args.guidance).items())
    return [(weights, args.checkpoint, {})]


def study_checkpoint(opened, truth, results, args):
    """One checkpoint as it is, at several weights, under the forms of guidance, with each sampler
    in few steps and in many, or along its training (are new combinations found early, as Scimeca
    et al. report?)."""
    lines = []
    for label, path, changes in planned(args, opened.model):
        request = request_of(args, opened.model, **changes)
        key = {"checkpoint": finger(path), "images": args.images, "by": args.by} | vars(request)
        if request.sampler == "ddim":  # as these lines were named when it was the only one
            del key["sampler"]
        lines.append(results.get(key, lambda: {"label": label} | disentangle_one(
            Model.load(path), truth, request)))
    if args.study == "model":
        parts = ("biology", "experiment", "interaction")
        print(f"\n{'share of variance (omega^2)':28s}" + "".join(f"{p:>20s}" for p in parts)
              + f"\n{'':28s}" + f"{'truth':>10s}{'generated':>10s}" * 3)
        for k, name in enumerate(feature_names(opened.model.channels)):
            print(f"{name:28s}" + "".join(
                f"{truth.omega[p][k]:10.2f}{lines[0]['omega'][p][k]:10.2f}" for p in parts))
    draw_shares(Path(args.out) / f"{args.study}-features.png", truth, lines[-1])
    return lines


# --- the comparison: told the perturbation, the experiment, or both -------------------------------

# balanced: told both, rare pairs of molecule and batch drawn as often as common ones
ARMS = {"perturbations": dict(experiment=()), "experiment": dict(biology=()), "both": {},
        "balanced": dict(balance=1.)}
RUNS = [(0., 0), (.5, 0), (.9, 0), (.9, 1), (.9, 2)]     # confounding and seed
WEIGHTS_BOTH = [(1, 1), (1.5, 1.5), (2, 2), (2.5, 2.5), (3, 2), (3, 3)]
# forms and weights that are tried for each arm. Where rare pairs are not balanced v(biology) holds
# the home batch as well, so only the balanced arm may do without nesting
TRIED = {"both": [("nested", b, e) for b, e in WEIGHTS_BOTH],
         "balanced": [(form, b, e) for form in ("nested", "independent") for b, e in WEIGHTS_BOTH],
         "perturbations": [("nested", b, 0) for b in (1, 1.5, 2, 3)],
         "experiment": [("nested", 0, e) for e in (1, 1.5, 2, 3)]}


def screen_of(confounding):
    """The manifest of the default screen at another confounding, drawn if it is missing."""
    path = Path(train_ldm.Config.data if confounding == data.Screen.confounding
                else f"runs/data-{confounding:g}/manifest.csv")
    if not path.exists():
        print(f"drawing a screen with confounding {confounding:g}")
        data.simulate(path.parent, data.Screen(confounding=confounding))
    return path


def train_arm(args, arm, confounding, seed):
    """The checkpoint of one arm, trained if it is missing, on the one shared autoencoder (which
    never saw a held-out pair: these are the same at any confounding). Checkpoints along the way
    are kept for --study training."""
    return trained(train_ldm.Config(
        data=str(screen_of(confounding)), vae=str(Path(args.vae).resolve()), seed=seed,
        steps=args.train_steps, **ARMS[arm], keep=True, eval_every=max(1, args.train_steps // 6),
        out=f"{args.out}/{arm}-{confounding:g}-{seed}-{args.train_steps}"))


def open_trained(args, path):
    """As open_model, for a checkpoint that a study has trained."""
    return open_model(SimpleNamespace(checkpoint=str(path), data=None, steps=args.steps,
                                      guidance={}))


def try_guidance(model, truth, args, form, b, e):
    """A form and weights tried on the validation pairs: (kernel distance to the truth, share of
    mechanisms and batches that the probe reads)."""
    where, n = truth.factorial.held("val"), truth.factorial.seeds
    places, kept = where.nonzero().tolist(), where.flatten().repeat_interleave(n)
    rows = [r for r, k in zip(truth.factorial.rows(), kept) if k]
    request = request_of(args, model, form=form, guidance=dict(biology=b, experiment=e))
    images = generate_places(model, truth.factorial, request, where)
    y = truth.features(images).unflatten(0, (len(places), n))
    distance = np.mean([kernel_distance(y[k], truth.b[i, j]) for k, (i, j) in enumerate(places)])
    read = named_right(truth.probe, images, rows) if truth.probe else {}
    return float(distance), float(np.mean([hit.float().mean() for hit in read.values()] or [0.]))


def best_guidance(settings, found):
    """One of `settings` for an arm, from what try_guidance found with each of them for each of its
    seeds, found (seeds, settings, 2): of those whose mean distance is within a tenth of the least,
    the one that the probe reads best."""
    distance, read = np.mean(np.array(found), 0).T                       # (settings,) each
    near = np.flatnonzero(distance <= 1.1 * distance.min())
    return settings[max(near, key=lambda k: (read[k], -distance[k]))]


def study_arms(args, results):
    """The arms at several confoundings, each at its own best guidance."""
    lines, truth = [], None
    runs = RUNS if args.confounding is None else itertools.product(args.confounding, args.seeds)
    seeds = {}
    for confounding, seed in runs:
        seeds.setdefault(confounding, []).append(seed)
    same = {"vae": finger(args.vae)} | {k: getattr(args, k) for k in (
        "train_steps", "images", "steps", "interval", "rescale")}

    @functools.lru_cache(1)  # the weights of an arm are tried on one model after another
    def opened(arm, confounding, seed):
        nonlocal truth
        found = open_trained(args, train_arm(args, arm, confounding, seed))
        # cells and intensities are the same at any confounding: one truth for all
        truth = truth or simulated_truth(found, args)
        return found.model

    for confounding, arm in itertools.product(seeds, args.arms):
        keys = [{"arm": arm, "confounding": confounding, "seed": seed} | same
                for seed in seeds[confounding]]
        found = [[results.get(key | {"tried": tried}, lambda: {"found": try_guidance(
            opened(arm, confounding, key["seed"]), truth, args, *tried)})["found"]
            for tried in TRIED[arm]] for key in keys]
        form, b, e = best_guidance(TRIED[arm], found)
        for key in keys:
            def measured():
                model = opened(arm, confounding, key["seed"])
                request = request_of(args, model, form=form,
                                     guidance=dict(biology=b, experiment=e))
                label = f"{arm}, {confounding:g}, {key['seed']} ({form} {b:g}, {e:g})"
                return {"label": label} | disentangle_one(model, truth, request) | {
                    "confounding": confounding}  # the truth may be that of another screen
            lines.append(results.get(
                key | {"form": form, "w_biology": b, "w_experiment": e}, measured))
            print_lines(lines[-1:])
    return lines


def simulated_truth(opened, args):
    return Truth(SimulatedFactorial(opened, args.images),
                 screen_probe(opened.manifest.path.parent, opened.model))


# --- the shortcut: does a classifier profit from images drawn without confounding? ----------------

CLASSIFIER = dict(images=1512, test_images=1200, steps=600)


def standardise_on_controls(images, batch, control):
    """Each channel of each batch to the mean and deviation that negative controls have over all
    batches: images (N, C, H, W), batch (N,) of names, control (N,) bool."""
    out, mean, std = images.clone(), *(getattr(images[control], name)((0, 2, 3), keepdim=True)
                                       for name in ("mean", "std"))
    for name in np.unique(batch):
        inside = torch.from_numpy(batch == name)
        ours = images[inside & control]
        out[inside] = (images[inside] - ours.mean((0, 2, 3), keepdim=True)) * (
            std / ours.std((0, 2, 3), keepdim=True).clamp(min=1e-3)) + mean
    return out


def balancing(mechanism, batch):
    """Weights (N,) under which mechanism and batch are independent: p(m) p(b) / p(m, b)."""
    def share(values):
        names, place, count = np.unique(values, return_inverse=True, return_counts=True)
        return count[place] / len(values)
    pairs = np.array([f"{m}/{b}" for m, b in zip(mechanism, batch)])
    weight = share(mechanism) * share(batch) / share(pairs)
    return weight / weight.sum()


class Labelled:
    """Images (N, C, H, W) with the mechanism and batch of each."""

    def __init__(self, images, rows):
        self.images = images
        self.mechanism, self.batch = (np.array([r[k] for r in rows])
                                      for k in ("true_mechanism", "batch"))

    def standardised(self):
        control = torch.from_numpy(self.mechanism == "none")
        return standardise_on_controls(self.images, self.batch, control)


def balanced_accuracy(said, true):
    """Mean over classes of the share named right: a class counts once, however common it is."""
    return float(np.mean([np.mean(said[true == name] == name) for name in np.unique(true)]))


def study_shortcut(args, results):
    """A mechanism classifier trained on a confounded screen, on generated images in which
    mechanism and batch are independent, on both, with plain remedies, and on an unconfounded
    screen; all with the same number of images and steps, tested on unconfounded images."""
    confounding, n = .9, CLASSIFIER["images"]
    checkpoint = train_arm(args, "balanced", confounding, 0)
    opened = open_trained(args, checkpoint)
    screen, train = simulated_screen(opened, 0), set(opened.train)
    answers, request = ["none", *data.MECHANISMS], request_of(args, opened.model)

    def photographed(confounding, draw, count, seed, within=None):
        """`count` images of seen molecules, controls and doses above half effect."""
        here = replace(screen, confounding=confounding, draw=draw)
        rows = [r for i, r in enumerate(data.layout(here)) if (within is None or i in within)
                and r["split"] not in ("test_substituent", "test_scaffold")
                and (r["role"] == "control" or r["true_effect"] >= .5)]
        rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:count]]
        return Labelled(photographs(rows, here, opened.model.intensity), rows)

    def made(seed):
        factorial = SimulatedFactorial(opened, n)
        rows = factorial.rows(requests=1000 * (seed + 1))
        columns = {f.name: [str(r.get(f.name, "")) for r in rows] for f in opened.model.fields}
        seeds = list(range(10_000 * seed, 10_000 * seed + len(rows)))
        return Labelled(generate(opened.model, columns, seeds, request), rows)

    def measured(seed):
        short, free = photographed(confounding, 0, n, seed, train), made(seed)
        best, both = photographed(0., 5000 + seed, n, seed), copy.copy(short)
        half = np.random.default_rng(seed).permutation(len(free.images))[:n // 2]
        both.images = torch.cat([short.images[:n - n // 2], free.images[torch.from_numpy(half)]])
        both.mechanism = np.concatenate([short.mechanism[:n - n // 2], free.mechanism[half]])

        def score(training, images, test_images, weights=None):
            labels = {"mechanism": torch.tensor([answers.index(m) for m in training.mechanism])}
            probe = train_probe(images, {"mechanism": answers}, labels, CLASSIFIER["steps"], seed,
                                weights=weights)
            said = np.array(answers)[answer(probe, test_images)["mechanism"].numpy()]
            return balanced_accuracy(said, test.mechanism)
        scores = {name: score(x, x.images, test.images) for name, x in (
            ("confounded", short), ("generated", free), ("both together", both),
            ("unconfounded", best))}
        scores["standardised on controls"] = score(short, short.standardised(), test.standardised())
        scores["reweighted"] = score(short, short.images, test.images,
                                     balancing(short.mechanism, short.batch))
        gap = scores["unconfounded"] - scores["confounded"] or math.nan
        return {"seed": seed, "confounding": confounding, "scores": scores,
                "closed": {k: (v - scores["confounded"]) / gap for k, v in scores.items()}}

    test = photographed(0., 4000, CLASSIFIER["test_images"], 0)
    lines = [results.get({"shortcut": seed, "checkpoint": finger(checkpoint), "classifier":
                          CLASSIFIER} | vars(request), lambda: measured(seed))
             for seed in args.seeds]
    print(f"\n{'mechanism classifier trained on':34s}{'accuracy':>12s}{'gap closed':>24s}")
    for name in lines[0]["scores"]:
        accuracy, closed = ([line[k][name] for line in lines] for k in ("scores", "closed"))
        print(f"{name:34s}{np.mean(accuracy):12.3f}{np.mean(closed):12.2f} "
              f"({min(closed):.2f} to {max(closed):.2f})")


# --- transfer: the same cells in another batch, or treated ----------------------------------------

def study_transfer(opened, truth, results, args, steps=50):
    """Real images edited (sample.py --edit) to another batch, and controls to each mechanism,
    against the true image of the same cells there. Everything is compared after the autoencoder.

    moved: how far the features of the side that was changed moved along their true change (1 is
    right); drift: how far the features of the other side moved, in deviations of the training set.
    """
    f, model = truth.factorial, opened.model
    if not f.blocked:
        raise UserError("--study transfer needs the simulator: the same cells elsewhere")
    b, e, n = len(f.biology), len(f.experiment), f.seeds
    rows, place = f.rows(), np.arange(b * e * n).reshape(b, e, n)[:, :, 0]
    tasks = {"another batch": (place.ravel(), np.roll(place, -1, 1).ravel()),
             "treated": (np.repeat(place[:1], b - 1, 0).ravel(), place[1:].ravel())}
    biological = truth.omega["biology"] > truth.omega["experiment"]
    print(f"\n{'edited to':16s}{'L1 to the truth: before':>26s}{'after':>8s}{'moved':>8s}"
          f"{'drift':>8s}{'(true)':>8s}")
    for name, (start, goal) in tasks.items():
        side = biological if name == "treated" else ~biological

        def measured():
            columns = [{field.name: [str(rows[i].get(field.name, "")) for i in where]
                        for field in model.fields} for where in (start, goal)]
            edited = model.edit(truth.images[start], *columns, args.guidance, args.form, steps,
                                interval=args.interval)
            before, true = (reconstruct(model.vae, truth.images[i])[0] for i in (start, goal))
            y = [truth.features(x) for x in (before, edited, true)]
            change, wanted = y[1] - y[0], y[2] - y[0]
            return {"task": name, "images": len(start),
                    "l1_before": (before - true).abs().mean().item() / 2,
                    "l1_after": (edited - true).abs().mean().item() / 2,
                    "moved": ((change * wanted)[:, side].sum()
                              / wanted[:, side].square().sum()).item(),
                    "drift": change[:, ~side].square().mean().sqrt().item(),
                    "true_drift": wanted[:, ~side].square().mean().sqrt().item()}
        line = results.get({"transfer": name, "checkpoint": finger(args.checkpoint), "steps": steps,
                            "images": args.images, "guidance": args.guidance, "form": args.form,
                            "interval": args.interval},
                           measured)
        print(f"{name:16s}{line['l1_before']:26.4f}{line['l1_after']:8.4f}{line['moved']:8.2f}"
              f"{line['drift']:8.2f}{line['true_drift']:8.2f}")


# --- real plates: pairs left out in turn ----------------------------------------------------------

def write_split(opened, path, held, cells):
    """The manifest with a column split: cells in `held` are test, a tenth of the rest val."""
    m, rng = opened.manifest, np.random.default_rng(0)
    rows = []
    for i in range(len(m)):
        files = [str(Path(f).resolve()) for f in m.files[i]]
        names = m.channels if len(files) == len(m.channels) else ["image"]
        split = "test" if cells[i] in held else "val" if rng.random() < .1 else "train"
        rows.append({k: v[i] for k, v in m.columns.items()} | dict(zip(names, files))
                    | {"split": split})
    path.unlink(missing_ok=True)  # of an interrupted run
    data.write_manifest(path, rows)
    return str(path)


def study_pairs(opened, args, results):
    """One (treatment, plate) pair left out of training in turn, all else as --checkpoint was
    trained, on one autoencoder that saw none of these pairs: nuclei, intensities, and what a
    treatment probe trained on the other plates reads, generated beside the left-out real images.
    """
    out, n = Path(args.out), max(16, args.images // 8)
    cells, plates = cells_of(opened.manifest, args.by), opened.manifest.columns[args.by[1]]
    factorial = RealFactorial(opened, args.by, 4)
    treatments = factorial.biology
    pairs = [(treatments[1 + k % (len(treatments) - 1)], plate)
             for k, plate in enumerate(factorial.experiment)]
    left_out = {f"{t} x {plate}" for t, plate in pairs}
    if not (out / "split-vae.csv").exists():
        write_split(opened, out / "split-vae.csv", left_out, cells)
    vae = train_vae.trained(train_vae.Config(**opened.model.content["vae"]["settings"] | {
        "data": str(out / "split-vae.csv"), "split": "auto", "out": str(out / "pairs-vae")}))

    def measured(treatment, plate):
        manifest = out / f"split-{plate}.csv"
        if not manifest.exists():
            write_split(opened, manifest, {f"{treatment} x {plate}"}, cells)
        config = train_ldm.Config(**opened.model.content["settings"] | {
            "data": str(manifest), "vae": str(vae), "out": str(out / f"pairs-{plate}")})
        here = SimpleNamespace(**vars(opened) | {"model": Model.load(trained(config))})
        rng = np.random.default_rng(0)
        known = np.array([i for i, (cell, p) in enumerate(zip(cells, plates))
                          if p != plate and cell in factorial.names])
        labels = torch.tensor([treatments.index(cells[i].split(" x ")[0]) for i in known])
        probe = train_probe(torch.cat([real_images(here, known, rng) for _ in range(12)]),
                            {"treatment": treatments}, {"treatment": labels.repeat(12)}, 400)
        entry = {"left_out": f"{treatment} x {plate}"}
        for t in (treatments[0], treatment):
            cell = f"{t} x {plate}"
            for name, x in beside(here, args, cell, factorial.asked[cell],
                                  np.flatnonzero(cells == cell), n, n).items():
                right = answer(probe, x)["treatment"] == treatments.index(t)
                entry[f"{t}: {name}"] = summarise(x, here.model.channels, args.nucleus_radius) | {
                    "named right": right.float().mean().item()}
        return entry

    for treatment, plate in pairs:
        line = results.get({"pair": f"{treatment} x {plate}", "vae": finger(vae), "images": n,
                            "guidance": args.guidance, "form": args.form, "also": args.also,
                            "interval": args.interval},
                           lambda: measured(treatment, plate))
        print(f"\nleft out: {line['left_out']}")
        for name, values in list(line.items())[2:]:
            print(f"  {name:28s}" + "  ".join(f"{k.replace('_mean', '')} {v:.3f}"
                                              for k, v in values.items()))


# --- the sub-command ------------------------------------------------------------------------------

def draw_shares(path, truth, line):
    """Each feature's share of variance by biology and by experiment: truth and generated, joined
    by a line. What is disentangled lies on the axes; what leaks moves off them."""
    import matplotlib.pyplot as plt
    fig, axis = plt.subplots(figsize=(5, 4.6))
    true = np.array([truth.omega[k].tolist() for k in ("experiment", "biology")])
    found = np.array([line["omega"][k] for k in ("experiment", "biology")])
    axis.plot(*np.stack([true, found], 1), color=".8", lw=.6)  # x and y (2, F): one line a feature
    axis.scatter(*true, s=14, color="k", label="truth")
    axis.scatter(*found, s=14, color="tab:red", label=f"generated: {line['label']}")
    axis.set(xlabel="share of variance by experiment (omega^2)", ylabel="by biology (omega^2)")
    axis.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_rows(path, labels, panels):
    """Dots in rows: panels [(title, {name: [(value, interval or None) for each label]}, mark)]."""
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, len(panels), figsize=(3.8 * len(panels), 1.6 + .28 * len(labels)),
                             sharey=True)
    for axis, (title, series, mark) in zip(axes, panels):
        for k, (name, values) in enumerate(series.items()):
            y = np.arange(len(labels))[::-1] + .12 * (1 - k)
            axis.plot([v for v, _ in values], y, "so^"[k % 3], ms=5, color=f"C{k}",
                      label=name.replace("_", " "))
            for (_, interval), place in zip(values, y):
                axis.plot(interval or [], [place] * len(interval or []), color=f"C{k}", lw=1)
        if mark is not None:
            axis.axvline(mark, color="k", lw=.6)
        axis.set_title(title, fontsize=9), axis.grid(alpha=.3)
        axis.legend(fontsize=7, ncols=2, loc="upper center", frameon=False,
                    bbox_to_anchor=(.5, -.45 / (1.6 + .28 * len(labels))))     # below the axis
    axes[0].set_yticks(range(len(labels)), labels[::-1], fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_lines(path, lines):
    """Effects, leaks, probes and distances of several measurements, with their marks."""
    def column(name):
        return [(line.get(name, np.nan), line.get(f"{name}_interval")) for line in lines]
    draw_rows(path, [line["label"] for line in lines], [
        (title, {name: column(name) for name in names}, mark) for title, names, mark in (
            ("effect, as a share of the true one", ("effect_biology", "effect_experiment"), 1.),
            ("leak", ("leak_e_to_b", "leak_b_to_e"), 0.),
            ("share named right", ("probe_mechanism", "probe_batch"), 1.),
            ("kernel distance", ("distance_seen", "distance_heldout"), lines[0]["floor"]))])


def disentangle(args):
    """The tables of `evaluate.py disentangle`."""
    if args.quick:
        args.images, args.train_steps, args.seeds = 216, 600, args.seeds[:1]
        args.confounding = args.confounding or [.9]
        CLASSIFIER.update(images=540, steps=200)
    out = Path(args.out)
    results = Results(out / "results.jsonl")
    if args.study == "shortcut":
        study_shortcut(args, results)
    elif args.study == "pairs":
        if not args.by:
            raise UserError("--study pairs needs --by, such as --by compound plate")
        study_pairs(open_model(args), args, results)
    elif args.study == "arms":
        lines = study_arms(args, results)
    else:
        opened = open_model(args)
        truth = Truth(RealFactorial(opened, args.by, args.images), radius=args.nucleus_radius) \
            if args.by else simulated_truth(opened, args)
        if args.study == "transfer":
            study_transfer(opened, truth, results, args)
        else:
            lines = study_checkpoint(opened, truth, results, args)
    if args.study not in ("shortcut", "pairs", "transfer"):
        print_lines(lines)
        draw_lines(out / f"{args.study}.png", lines)
        print(f"wrote {out}/{args.study}.png")
    print(f"every line is in {out}/results.jsonl")


# ------------------------------------------------------------------------------------------------
# 6. conditions: is every field used? which molecule encoder generalises?
# ------------------------------------------------------------------------------------------------

def conditions(args):
    """The tables of `evaluate.py conditions`."""
    if args.encoders:
        return compare_encoders(args)
    opened, out = open_model(args), Path(args.out or Path(args.checkpoint).parent)
    rows = np.random.default_rng(0).permutation(opened.held)[:256 if args.quick else 1024]
    model, count = opened.model, len(rows)
    images = real_images(opened, rows)
    posterior = torch.cat([torch.stack(model.vae.encode(x.to(device())), 1).cpu()
                           for x in images.split(64)]).numpy()
    latents = train_ldm.Latents(posterior, model.vae, opened.manifest, rows,
                                model.denoiser.conditioner, 1)
    sets = train_ldm.field_sets(model.fields)

    def predict(shuffled):
        prediction, target, t = train_ldm.heldout_predictions(
            model.denoiser, latents, model.schedule, count, shuffled)
        loss = (prediction - target).square().flatten(1).mean(1)
        return prediction.flatten(1), loss, t * 4 // model.schedule.T
    plain, loss, quarter = predict(())
    sizes = group_sizes(model, latents)
    changes = feature_changes(opened, rows[:32 if args.quick else 96], sets, args)
    table = {}
    for name, shuffled in sets.items():
        prediction, worse, _ = predict(shuffled)
        rise = (worse - loss).cpu()
        table[name] = {
            "rise": rise.mean().item(), "error": rise.std().item() / count ** .5,
            "rise_by_noise": [rise[quarter.cpu() == q].mean().item() for q in range(4)],
            "cosine": F.cosine_similarity(plain, prediction).mean().item(),
            "rms": sizes.get(name), "features": changes[name]}
    print(f"\n{'taken from another row':24s}{'loss rises by':>22s}{'by noise, little to much':>34s}"
          f"{'cosine':>9s}{'RMS':>7s}{'features move':>15s}")
    for name, e in table.items():
        print(f"{name:24s}{e['rise']:12.4f} +- {e['error']:.4f}  "
              + "".join(f"{v:8.4f}" for v in e["rise_by_noise"])
              + f"{e['cosine']:9.3f}" + (f"{e['rms']:7.2f}" if e["rms"] else " " * 7)
              + f"{e['features']:15.2f}")
    train_ldm.warn_of_unused({k: (e["rise"], e["error"]) for k, e in table.items()})
    out.mkdir(parents=True, exist_ok=True)
    (out / "conditions.json").write_text(json.dumps(
        {"checkpoint": args.checkpoint, "held_out_loss": loss.mean().item(), "table": table},
        indent=1))
    print(f"wrote {out}/conditions.json")


def group_sizes(model, latents):
    """Root mean square of each group's part of the condition vector: {"all of biology": ...}."""
    codes, known = latents.conditions(np.arange(min(256, len(latents.rows))))
    with torch.no_grad():
        parts, _, _ = model.denoiser.conditioner.parts(codes, known, latents.molecules)
    return {f"all of {g}": p.square().mean().sqrt().item() for g, p in parts.items()}


def feature_changes(opened, rows, sets, args):
    """How far the features of a generated image move when one field alone is another row's, on the
    same noise, weights 1: root mean square in deviations of the training images."""
    model, other = opened.model, np.random.default_rng(1).permutation(rows)
    standardise = feature_scale(opened, count=400)
    request = Request({g: 1. for g in model.groups}, steps=args.steps)

    def drawn(shuffled):
        columns = {f.name: opened.manifest.rows(other if f.name in shuffled else rows, f.name)
                   for f in model.fields}
        images = generate(model, blank_unseen(model.fields, columns), list(range(len(rows))),
                          request)
        return standardise(features(images, model.channels))
    plain = drawn(())
    return {name: (drawn(shuffled) - plain).square().mean().sqrt().item()
            for name, shuffled in sets.items()}


# --- the molecule encoders, compared --------------------------------------------------------------

MOLECULE_SETS = {"train": "seen molecule", "test_substituent": "unseen substituent",
                 "test_scaffold": "unseen scaffold"}


class DoseSeries:
    """Molecules of one kind at doses from 0 up, the same cells at each: (M, doses, seeds)."""

    def __init__(self, opened, kind, molecules, seeds):
        self.screen, self.opened, self.seeds = simulated_screen(opened, 3000), opened, seeds
        usable = [m for m in data.molecules() if m["kind"] == kind and m["ec50"] <= 3]
        self.molecules = [usable[i] for i in np.random.default_rng(0).permutation(
            len(usable))[:molecules]]
        self.doses = (0., *data.DOSES)

    def rows(self, cells=0):
        rows = []
        for molecule, dose, s in itertools.product(self.molecules, self.doses, range(self.seeds)):
            batch = s % self.screen.batches
            rows.append(dict(
                smiles=molecule["smiles"], dose=dose, batch=f"B{batch + 1}",
                plate=f"P{batch * self.screen.plates_per_batch + 1:02d}", row=8, column=12,
                site=1 + s % 4, cells=cells + s, true_mechanism=molecule["mechanism"],
                true_effect=data.hill(dose, molecule["ec50"])))
        return rows

    def truth(self, cells):
        return photographs(self.rows(cells), self.screen, self.opened.model.intensity)

    def shape(self, found):
        return found.view(len(self.molecules), len(self.doses), self.seeds, -1)


def dose_fidelity(y, truth, doses, ec50):
    """How the effect follows the dose: (Spearman's rank correlation of effect and dose, median
    error of the half-effect dose in decades), over molecules. y, truth: (M, doses, seeds, F).

    The effect is the change from dose 0 projected on the true change at the highest dose; the
    half-effect dose is that of the Hill curve that fits it best, over a grid.
    """
    found, true = y.mean(2) - y.mean(2)[:, :1], truth.mean(2) - truth.mean(2)[:, :1]  # (M, D, F)
    way = true[:, -1:] / true[:, -1:].square().sum(2, keepdim=True)
    effect = (found * way).sum(2).double()                                            # (M, D)
    rank = effect.argsort(1).argsort(1).double()
    order = torch.arange(len(doses), dtype=torch.double).expand_as(rank)
    spearman = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(rank, order)])
    grid = torch.logspace(-1.5, 2, 141, dtype=torch.double)
    dose = torch.tensor(doses, dtype=torch.double)[:, None] ** data.HILL
    curve = dose / (dose + grid ** data.HILL)                                         # (D, grid)
    height = (effect @ curve) / curve.square().sum(0)                                 # (M, grid)
    error = (effect[:, :, None] - height[:, None] * curve).square().sum(1)
    fitted = grid[error.argmin(1)]
    decades = (fitted.log10() - torch.tensor(ec50, dtype=torch.double).log10()).abs()
    return spearman.mean().item(), decades.median().item()


def across_molecules(y, truth):
    """Pearson correlation across molecules of mean features at the highest dose, generated against
    true, averaged over the features in which molecules truly differ. (M, doses, seeds, F)."""
    a, b = y[:, -1].mean(1), truth[:, -1].mean(1)                                     # (M, F)
    differ = b.std(0) > .5
    a, b = (x[:, differ] - x[:, differ].mean(0) for x in (a, b))
    return ((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-6)).mean().item()


def score_molecules(series, standardise, probe, images, truth):
    """The figures of images (M * doses * seeds) against the truth (M, doses, seeds, F)."""
    y = series.shape(standardise(features(images, series.opened.model.channels)))
    rows = series.rows()
    strong = torch.tensor([r["true_effect"] >= .5 for r in rows])
    right = named_right(probe, images, rows)["mechanism"]
    spearman, decades = dose_fidelity(y, truth, series.doses, [m["ec50"] for m in series.molecules])
    return {"probe": right[strong].float().mean().item(), "correlation": across_molecules(y, truth),
            "dose_rank": spearman, "ec50_error": decades}


def compare_encoders(args):
    """The same small model with each molecule encoder: molecules that training saw, held-out
    substituents, held-out scaffolds; real images above (ceiling), molecules permuted below."""
    if args.quick:
        args.train_steps, args.seeds, args.molecules = 300, args.seeds[:1], 8
    out, lines = Path(args.out or "runs/encoders"), []
    results = Results(out / "encoders.jsonl")
    size = {k: getattr(args, k) for k in ("molecules", "series", "steps", "guidance", "form",
                                          "interval")}
    for encoder, seed in itertools.product(args.names, args.seeds):
        def measured():
            start = train_ldm.Config(
                out=str(out / f"{encoder}-{seed}-{args.train_steps}"), seed=seed,
                molecule_encoder=encoder, steps=args.train_steps,
                molecule_table=args.molecule_table if encoder == "table" else "")
            opened = open_trained(args, trained(start))
            encoders = [e for e, f in zip(opened.model.denoiser.conditioner.encoders,
                                          opened.model.fields) if f.kind == "molecule"]
            last = json.loads((Path(start.out) / "log.jsonl").read_text().splitlines()[-1])
            entry = {"label": encoder, "seed": seed, "parameters": sum(
                p.numel() for e in encoders for p in e.parameters()),
                "seconds_per_step": last["seconds"] / last["step"]}
            return entry | score_encoder(opened, args)
        lines.append(results.get({"encoder": encoder, "seed": seed, "train_steps": args.train_steps,
                                  "table": args.molecule_table} | size, measured))
    some = out / f"{args.names[0]}-{args.seeds[0]}-{args.train_steps}" / "model.pt"
    for label in ("real images", "molecules permuted"):
        lines.append(results.get({"limit": label} | size, lambda: {"label": label, "seed": 0}
                                 | score_encoder(open_trained(args, some), args, label)))
    print_encoders(lines, out)


def score_encoder(opened, args, limit=None):
    """{kind: figures} of a model, or of real images (the ceiling), or of these with the molecules
    permuted (the floor)."""
    model, scores, standardise = opened.model, {}, feature_scale(opened)
    probe = screen_probe(opened.manifest.path.parent, model)
    for kind, name in MOLECULE_SETS.items():
        series = DoseSeries(opened, kind, args.molecules, args.series)
        truth = series.shape(standardise(features(series.truth(10_000), model.channels)))
        rows, m = series.rows(), len(series.molecules)
        if limit is None:
            columns = {f.name: [str(r.get(f.name, "")) for r in rows] for f in model.fields}
            images = generate(model, columns, [r["cells"] for r in rows],
                              Request(model.weights(args.guidance), args.form, args.interval,
                                      steps=args.steps))
        else:
            images = series.truth(20_000)
        if limit == "molecules permuted":
            images = images.unflatten(0, (m, -1))[np.random.default_rng(1).permutation(m)].flatten(
                0, 1)
        scores[name] = score_molecules(series, standardise, probe, images, truth)
    return scores


def print_encoders(lines, out):
    """The table of compare_encoders, means over seeds, and its figure."""
    names, kinds = ("probe", "correlation", "dose_rank", "ec50_error"), MOLECULE_SETS.values()
    print(f"\n{'':22s}" + "".join(f"{kind:^44s}" for kind in kinds) + f"\n{'':22s}" + "".join(
        f"{name.replace('_', ' '):>11s}" for name in names) * 3)
    labels = list(dict.fromkeys(line["label"] for line in lines))
    for label in labels:
        ours = [line for line in lines if line["label"] == label]
        print(f"{label:22s}" + "".join(f"{np.mean([e[kind][name] for e in ours]):11.2f}"
                                       for kind in kinds for name in names)
              + (f"   {ours[0]['parameters'] / 1e6:.2f} M parameters, "
                 f"{np.mean([e['seconds_per_step'] for e in ours]):.2f} s a training step"
                 if "parameters" in ours[0] else ""))
    draw_rows(out / "encoders.png", [f"{line['label']}, {line['seed']}" for line in lines], [
        (name.replace("_", " "), {kind: [(line[kind][name], None) for line in lines]
                                  for kind in kinds}, None) for name in names])
    print(f"wrote {out}/encoders.jsonl and encoders.png")


# ------------------------------------------------------------------------------------------------
# 7. control: does a ControlNet draw *these* cells?
# ------------------------------------------------------------------------------------------------

def pearson(x, y):
    """Correlation of the pixels of each image and channel: (N, C) of two (N, C, H, W)."""
    x, y = (v.flatten(2) - v.flatten(2).mean(2, keepdim=True) for v in (x, y))
    return (x * y).sum(2) / (x.norm(dim=2) * y.norm(dim=2)).clamp(min=1e-6)


def structural_similarity(x, y, sigma=1.5):
    """SSIM (N, C) of images on [0, 1] (Wang et al. 2004, Eq. 13), Gaussian windows of 11 pixels,
    constants 0.01^2 and 0.03^2; windows that the border cuts are left out."""
    def local(v):
        return gaussian_blur(v, sigma, 5)[..., 5:-5, 5:-5]
    x, y = x.double(), y.double()  # variances are differences of nearly equal numbers
    mx, my = local(x), local(y)
    xx, yy, xy = local(x * x) - mx ** 2, local(y * y) - my ** 2, local(x * y) - mx * my
    similar = ((2 * mx * my + 1e-4) * (2 * xy + 9e-4)
               / ((mx ** 2 + my ** 2 + 1e-4) * (xx + yy + 9e-4)))
    return similar.mean((2, 3)).float()


def power_spectrum(x):
    """Mean log power by spatial frequency, (C, F) from the coarsest to the finest, of images
    (N, C, H, W): the squared Fourier transform, averaged over rings one frequency wide."""
    h, w = x.shape[2:]
    power = torch.fft.rfft2(x - x.mean((2, 3), keepdim=True)).abs().square().mean(0) / (h * w)
    fy, fx = torch.fft.fftfreq(h)[:, None] * h, torch.fft.rfftfreq(w)[None] * w
    ring = (fy ** 2 + fx ** 2).sqrt().round().long()
    rings = range(1, min(h, w) // 2)
    return torch.stack([power[:, ring == k].mean(1) for k in rings], 1).add(1e-8).log()


def paired_scores(images, real, channels, standardise, others, radius=NUCLEUS_RADIUS):
    """How near images (N, C, H, W) in [-1, 1] come to the true ones of the same cells: per channel
    L1, PSNR, SSIM, Pearson correlation, and the mean difference of log power (signed: below 0 is
    too smooth); nuclei count error, as a share of the mean count; kernel distance to `others`."""
    x, y = (images + 1) / 2, (real + 1) / 2
    nucleus = channels.index("DNA") if "DNA" in channels else 0
    counts = [count_objects(segment_nuclei(v[:, nucleus], radius)) for v in (x, y)]
    spectrum = power_spectrum(x) - power_spectrum(y)
    found = standardise(features(images, channels, radius=radius))
    return {"l1": (x - y).abs().mean((0, 2, 3)).tolist(),
            "psnr": (-10 * (x - y).square().mean((0, 2, 3)).clamp(min=1e-9).log10()).tolist(),
            "ssim": structural_similarity(x, y).mean(0).tolist(),
            "pearson": pearson(x, y).mean(0).tolist(),
            "spectrum": spectrum.mean(1).tolist(),
            "spectrum_error": spectrum.abs().mean(1).tolist(),
            "nuclei_error": ((counts[0] - counts[1]).abs().mean() / counts[1].mean()).item(),
            "nuclei_bias": (counts[0].mean() / counts[1].mean() - 1).item(),
            "distance": kernel_distance(found, others)}


class Regression(nn.Module):
    """The baseline: a plain U-Net in pixels from the control image to the stains, L1, no noise."""

    def __init__(self, channels, out):
        super().__init__()
        self.out, self.width = out, max(channels, out)
        config = UNetConfig(self.width, fold=2, width=48, multipliers=(1, 2, 2), blocks=1,
                            attention=(False, False, False), embedding=64, token=16)
        self.unet = UNet(config)

    def forward(self, x):                                                # (B, channels, H, W)
        n, c = len(x), self.unet.config
        x = F.pad(x, (0, 0, 0, 0, 0, self.width - x.shape[1]))
        nothing = torch.zeros(n, c.embedding).to(x), torch.zeros(n, 1, c.token).to(x), \
            torch.ones(n, 1, dtype=torch.bool, device=x.device)
        return self.unet(x, torch.zeros(n, device=x.device), *nothing)[:, :self.out]


def train_regression(draw, seconds, batch=16, seed=0, lr=2e-3):
    """Train the baseline for as long as the ControlNet was trained. draw(rng, n): a batch of
    (controls, images)."""
    torch.manual_seed(seed)
    rng, start, done, step = np.random.default_rng(seed), time.time(), 0., 0
    network = Regression(*(x.shape[1] for x in draw(rng, 1))).to(device())
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr)
    with tqdm(total=round(seconds), desc="training the regression", unit="s") as bar:
        while done < 1:  # warm-up and a cosine over the time that there is
            optimiser.param_groups[0]["lr"] = lr * min(1., (step + 1) / 50) * math.cos(
                math.pi / 2 * done)
            control, image = (x.to(device()) for x in draw(rng, batch))
            with autocast():
                loss = (network(control) - image).abs().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            done, step = (time.time() - start) / seconds, step + 1
            bar.update(min(round(seconds), round(done * seconds)) - bar.n)
    return network.eval().requires_grad_(False)


def control_rows(opened, count, strong):
    """Held-out rows, at random, and others; `strong`: treated at a visible dose only. Of few large
    images every row is taken many times, for random pieces of it."""
    m, held = opened.manifest, np.random.default_rng(0).permutation(opened.held)
    if strong:
        effect = m.columns.get("true_effect")
        dose = next((f.name for f in opened.model.fields if f.kind == "log"), None)
        keep = [i for i in held if (float(effect[i] or 0) >= .5 if effect else
                                    dose is None or float(m.columns[dose][i] or 0) > 0)]
        held = np.array(keep, int)
    cut = bool(opened.settings.crop)
    if len(held) < (1 if cut else 8):
        raise UserError(f"only {len(held)} held-out rows to draw: hold out more with --split")
    one, other = (held[:len(held) // 2], held[len(held) // 2:]) if len(held) > 1 else (held, held)
    if len(held) == 1:
        print("one held-out image only: the pieces that are drawn and those that they are compared "
              "with come from it both")
    return (np.resize(x, n) if cut else x[:n] for x, n in ((one, count), (other, 4 * count)))


def seen_with_control(opened, rows, seed=0):
    """(images, (control images, their metadata)) of manifest rows, cut alike."""
    def rng():  # the same pieces of both, where pieces are cut
        return np.random.default_rng(seed) if opened.settings.crop else None
    return real_images(opened, rows, rng()), train_ldm.control_of(
        opened.model, opened.manifest, opened.pixels, opened.settings, rows,
        np.concatenate([opened.train, opened.held]), rng=rng())


def control(args):
    """The tables of `evaluate.py control`."""
    opened = open_model(args)
    model, column = opened.model, (opened.model.controlnet or {}).get("column")
    if not column:
        raise UserError(f"{args.checkpoint} has no ControlNet: train one with python train_ldm.py "
                        "--control_column NAME")
    if args.quick:
        args.images, args.samples = min(args.images, 32), min(args.samples, 2)
    if column == "negcon":
        cells_of(opened.manifest, [opened.model.controlnet["by"], *(args.by or [])])
    out = Path(args.out or Path(args.checkpoint).parent)
    out.mkdir(parents=True, exist_ok=True)
    report = {"checkpoint": args.checkpoint, "column": column, "steps": args.steps,
              "guidance": args.guidance, "learning": draw_learning(out, args.checkpoint)}
    report["identity"] = identity(opened, (10, 25, 50) if args.quick else (10, 25, 50, 100, 200))
    if column == "negcon":
        report["plates"] = control_by_plate(opened, args, out)
    else:
        report["paired"] = control_paired(opened, args, out)
        if opened.model.controlnet["channels"] == len(opened.model.channels):
            report["counterfactual"] = counterfactual(opened, args, out)
    (out / "control.json").write_text(json.dumps(report, indent=1))
    print(f"wrote {out}/control.json and control.png")


def ask(opened, rows, args, control, seeds=None):
    """Images for the conditions of manifest rows, with control images or without (None)."""
    model = opened.model
    columns = blank_unseen(model.fields, {f.name: opened.manifest.rows(rows, f.name)
                                          for f in model.fields})
    with autocast():
        return model.generate(columns, range(len(rows)) if seeds is None else seeds,
                              args.guidance, args.form, args.steps, control=control,
                              interval=args.interval)


def control_paired(opened, args, out):
    """Every way of drawing held-out images from their control images, and some that do not look."""
    model, channels = opened.model, opened.model.channels
    same = model.controlnet["channels"] == len(channels)  # the cells before treatment
    rows, others = control_rows(opened, args.images, same)
    n, (real, hint) = len(rows), seen_with_control(opened, rows)
    shown, standardise = hint[0], feature_scale(opened, args.nucleus_radius)
    reference = standardise(features(seen_with_control(opened, others, 1)[0], channels,
                                     radius=args.nucleus_radius))
    seconds = report_seconds(args.checkpoint) * (.1 if args.quick else 1.)
    pixels = sample.control_pixels(model.controlnet["column"], opened.manifest, opened.pixels)

    def draw(rng, count):  # the same cut of both
        chosen, seed = rng.choice(opened.train, count), int(rng.integers(2 ** 31))
        return [views(p, chosen, opened.settings, scale, np.random.default_rng(seed))
                for p, scale in ((pixels, model.controlnet["intensity"]),
                                 (opened.pixels, model.intensity))]
    network = train_regression(draw, seconds)
    regressed = torch.cat([network(x.to(device())).clamp(-1, 1).cpu() for x in shown.split(64)])
    some = np.random.default_rng(0).permutation(opened.train)[:512]
    average = real_images(opened, some).mean(0, keepdim=True)
    many = {name: torch.stack([ask(opened, rows, args, control, range(k * n, (k + 1) * n))
                               for k in range(args.samples)])
            for name, control in (("ControlNet", hint), ("without control", None))}
    sets = {"through the autoencoder": reconstruct(model.vae, real)[0]}
    for name, x in many.items():
        sets |= {name: x[0], f"{name}, mean of {len(x)}": x.mean(0)}
    sets |= {"regression": regressed, "control itself": shown.expand(-1, len(channels), -1, -1)
             if shown.shape[1] == 1 else shown, "mean image": average.expand_as(real)}
    table = {name: paired_scores(x, real, channels, standardise, reference, args.nucleus_radius)
             for name, x in sets.items() if x.shape == real.shape}
    table["real"] = paired_scores(real, real, channels, standardise, reference,
                                  args.nucleus_radius)
    print_paired(table, channels)
    look = [list(x[:6].numpy()) for x in (real, *(sets[k] for k in (
        "ControlNet", "without control", "regression")))]
    data.picture(out / "control.png", [list(shown[:6].numpy() if shown.shape == real.shape
                                            else shown[:6, 0].numpy()), *look], channels,
                 ["control", "real", "ControlNet", "without control", "regression"],
                 pixel_um=model.pixel_um)
    rows_by_channel = [[shown[0, 0].numpy(), *x[0].numpy()] for x in
                       (sets["ControlNet"], real, regressed)]
    data.picture(out / "control_channels.png", rows_by_channel, channels,
                 ["ControlNet", "real", "regression"], ["control", *channels], model.pixel_um)
    return table


def print_paired(table, channels):
    """The table of control_paired: means over channels, and Pearson correlation by channel."""
    print(f"\n{'':28s}{'L1':>8s}{'PSNR':>7s}{'SSIM':>7s}{'spectrum':>10s}{'nuclei error':>14s}"
          f"{'(bias)':>9s}{'distance':>10s}  Pearson: " + " ".join(f"{c:>5s}" for c in channels))
    for name, e in table.items():
        print(f"{name:28s}{np.mean(e['l1']):8.4f}{np.mean(e['psnr']):7.1f}{np.mean(e['ssim']):7.3f}"
              f"{np.mean(e['spectrum_error']):10.2f}{e['nuclei_error']:14.3f}"
              f"{e['nuclei_bias']:+9.3f}"
              f"{1000 * e['distance']:10.0f}           "
              + " ".join(f"{v:5.2f}" for v in e["pearson"]))


def report_seconds(checkpoint):
    """How long a model was trained, from the log beside it."""
    log = Path(checkpoint).parent / "log.jsonl"
    if not log.exists():
        raise UserError(f"no {log}: the regression is trained for as long as the ControlNet was")
    seconds = [json.loads(line).get("seconds", 0.) for line in open(log)]
    # a resumed run counts from 0 again
    ends = [a for a, b in zip(seconds, [*seconds[1:], 0.]) if b < a]
    return max(1., sum(ends))


def draw_learning(out, checkpoint):
    """The held-out loss along the training, and the step at which half of its fall was done."""
    import matplotlib.pyplot as plt
    log = [json.loads(line) for line in open(Path(checkpoint).parent / "log.jsonl")]
    steps, losses = [e["step"] for e in log], [e["heldout_loss"] for e in log]
    half = (losses[0] + min(losses)) / 2
    click = next((s for s, v in zip(steps, losses) if v <= half), None)
    fig, axis = plt.subplots(figsize=(4.5, 3))
    axis.plot(steps, losses, "o-", ms=3)
    axis.axvline(click, color=".7", lw=1)
    axis.set(xlabel="step", ylabel="held-out loss with control",
             title=f"half of the fall by step {click}")
    fig.tight_layout()
    fig.savefig(out / "learning.png", dpi=110)
    plt.close(fig)
    return {"steps": steps, "heldout_loss": losses, "half_of_the_fall": click}


def identity(opened, steps, count=8):
    """Inverted and drawn again under their own conditions, all weights 1, images should come back:
    {steps: PSNR in dB against the autoencoder's own reconstruction}, by rounds of the fixed point
    (1 is the inversion of Song et al. 2021, 3 the default)."""
    model, rows = opened.model, opened.held[:count]
    images = real_images(opened, rows)
    own = blank_unseen(model.fields, {f.name: opened.manifest.rows(rows, f.name)
                                      for f in model.fields})
    rebuilt, table = model.vae.to_image(model.vae.to_latent(images.to(device()))).cpu(), {}
    print(f"\nthe same image again, PSNR in dB{'rounds 1':>12s}{'3':>8s}")
    for n in steps:
        back = [model.edit(images, own, own, steps=n, rounds=rounds) for rounds in (1, 3)]
        table[n] = [-10 * math.log10(max(1e-9, ((x - rebuilt) / 2).square().mean())) for x in back]
        print(f"{n:5d} steps{table[n][0]:34.1f}{table[n][1]:8.1f}")
    return table


def overlap(one, other, radius):
    """Intersection over union of the nuclei in two sets of DNA images (N, H, W) on [0, 1]."""
    a, b = (segment_nuclei(x, radius) > 0 for x in (one, other))
    return ((a & b).sum() / (a | b).sum().clamp(min=1)).item()


def counterfactual(opened, args, out):
    """The same cells, treated: the ControlNet, and editing by inversion without it, against the
    true image of these cells after treatment. All after the autoencoder."""
    model, m = opened.model, opened.manifest
    rows, others = control_rows(opened, args.images, True)
    n, (real, hint) = len(rows), seen_with_control(opened, rows)
    before = hint[0]
    target = blank_unseen(model.fields, {f.name: m.rows(rows, f.name) for f in model.fields})
    controls = model.content["control"] or {}
    source = target | {name: [value] * n for name, value in controls.items()}
    weights = {k: v for k, v in args.guidance.items() if k != "control"}
    edited = torch.cat([model.edit(
        before[i:i + 64], {k: v[i:i + 64] for k, v in source.items()},
        {k: v[i:i + 64] for k, v in target.items()}, weights, args.form, interval=args.interval)
        for i in range(0, n, 64)])
    start, truth = (reconstruct(model.vae, x)[0] for x in (before, real))
    standardise = feature_scale(opened, args.nucleus_radius)
    reference = standardise(features(seen_with_control(opened, others, 1)[0], model.channels,
                                     radius=args.nucleus_radius))
    probe = screen_probe(m.path.parent, model) if "true_mechanism" in m.columns else None
    nucleus = model.channels.index("DNA") if "DNA" in model.channels else 0
    table = {}
    print(f"\n{'the same cells, treated':28s}{'L1 to the truth':>17s}{'nuclei overlap':>16s}"
          f"{'mechanism':>11s}{'distance':>10s}")
    drawn = ask(opened, rows, args, hint)
    for name, x in {"untreated": start, "ControlNet": drawn, "edited": edited,
                    "without control": ask(opened, rows, args, None), "the truth": truth}.items():
        found = standardise(features(x, model.channels, radius=args.nucleus_radius))
        table[name] = e = {
            "l1": (x - truth).abs().mean((0, 2, 3)).div(2).tolist(),
            "nuclei_overlap": overlap((x[:, nucleus] + 1) / 2, (start[:, nucleus] + 1) / 2,
                                      args.nucleus_radius),
            "distance": kernel_distance(found, reference)} | (
                probe_scores(probe, x, m, rows) if probe else {})
        print(f"{name:28s}{np.mean(e['l1']):17.4f}{e['nuclei_overlap']:16.2f}"
              f"{e.get('true_mechanism', np.nan):11.2f}{1000 * e['distance']:10.0f}")
    data.picture(out / "counterfactual.png", [list(x[:8].numpy()) for x in (
        before, drawn, edited, real)], model.channels,
        ["untreated", "ControlNet", "edited", "truth"], ["\n".join(
            m.columns[f.name][i][:16] for f in model.fields[:2]) for i in rows[:8]],
        model.pixel_um)
    return table


def control_by_plate(opened, args, out):
    """Negative controls as a plate's style: nuclei per image and mean intensity of each channel of
    held-out images, by plate (and by the columns --by), real and generated with and without a
    control of that plate. Plates that training never saw are told as unknown: there the control
    is all that the model knows of them."""
    model, m, by = opened.model, opened.manifest, opened.model.controlnet["by"]
    cells, seen = cells_of(m, [by, *(args.by or [])]), set(m.rows(opened.train, by))
    table, pictures, labels = {}, [], []
    for cell in sorted(set(cells[opened.held])):
        inside = np.random.default_rng(0).permutation(opened.held[cells[opened.held] == cell])
        rows = np.resize(inside, args.images)
        real, hint = seen_with_control(opened, rows)
        sets = {"real": real, "with control": ask(opened, rows, args, hint),
                "without control": ask(opened, rows, args, None)}
        table[cell] = {"in_training": m.columns[by][inside[0]] in seen, "images": len(inside)} | {
            name: summarise(x, model.channels, args.nucleus_radius) for name, x in sets.items()}
        pictures += [list(x[:6].numpy()) for x in sets.values()]
        labels += [f"{cell}\n{name}" for name in sets]
    names = ["nuclei", *(f"{c}_mean" for c in model.channels)]
    print(f"\n{'':50s}" + "".join(f"{k.replace('_mean', ''):>9s}" for k in names)
          + "   mean error of log intensity")
    for cell, e in table.items():
        for name in ("real", "with control", "without control"):
            ratio = [e[name][k] / e["real"][k] for k in names[1:]]
            e[name]["log_error"] = float(np.abs(np.log(ratio)).mean())
            label = cell + ("" if e["in_training"] else " (unseen)")
            print(f"{label if name == 'real' else '':34s}{name:16s}" + "".join(
                f"{e[name][k]:9.4f}" for k in names) + f"{e[name]['log_error']:12.3f}")
    for name in ("with control", "without control"):
        print(f"{name}: mean error of log intensity over plates "
              f"{np.mean([e[name]['log_error'] for e in table.values()]):.3f}")
    data.picture(out / "control.png", pictures[:18], model.channels, labels[:18],
                 pixel_um=model.pixel_um)
    return table


# ------------------------------------------------------------------------------------------------
# 8. vae: which latent space?
# ------------------------------------------------------------------------------------------------

# Each changes the default autoencoder in one way: a setting of train_vae.py and its value
LATENT_SPACES = ["", "latent_channels=2", "latent_channels=8", "downsampling=2 latent_channels=1",
                 "downsampling=8 latent_channels=16", "kl_weight=1e-4", "kl_weight=1e-1",
                 "width=16", "spectral_weight=0.3", "multiscale_weight=1"]


def earth_movers_distance(x, y):
    """1-D earth mover's distance between the intensities of two sets (N, C, H, W) on [0, 1], per
    channel (C,): the mean distance between sorted values."""
    x, y = (v.transpose(0, 1).flatten(1).sort(1).values for v in (x, y))
    return (x - y).abs().mean(1)


class PatchPCA:
    """The linear autoencoder: each patch of f x f pixels and all channels to its first `numbers`
    principal components, the best that any linear map can do at this compression."""

    def __init__(self, images, f, numbers):
        patches = F.pixel_unshuffle(images, f).movedim(1, 3).flatten(0, 2).double()
        self.f, self.mean = f, patches.mean(0)
        _, vectors = torch.linalg.eigh(torch.cov((patches - self.mean).T))
        self.components = vectors[:, -numbers:]                          # (C f f, numbers)

    def __call__(self, images):
        patches = F.pixel_unshuffle(images, self.f).movedim(1, 3).double() - self.mean
        back = patches @ self.components @ self.components.T + self.mean
        return F.pixel_shuffle(back.movedim(3, 1), self.f).float().clamp(-1, 1)


def feature_agreement(x, y, channels):
    """How well features of reconstructions y agree with those of the originals x, by channel and
    for the nuclei: {name: (correlation over images, bias in deviations)}, means over features."""
    a, b = (features(v, channels, at_once(v)) for v in (x, y))
    kept = a.isfinite() & b.isfinite()
    table = {}
    for name in ["nuclei", *channels]:
        found = []
        for k, feature in enumerate(feature_names(channels)):
            own = feature.startswith(f"{name}_") and not feature.endswith("_correlation")
            if (own or (name == "nuclei" and k < 5)) and kept[:, k].sum() > 2:
                p, q = (v[:, k][kept[:, k]].double() for v in (a, b))
                spread = p.std().clamp(min=1e-9)
                found.append((torch.corrcoef(torch.stack([p, q]))[0, 1].nan_to_num(0.).item(),
                              ((q.mean() - p.mean()).abs() / spread).item()))
        table[name] = tuple(float(v) for v in np.mean(found or [[np.nan] * 2], 0))
    return table


def score_reconstruction(x, x_hat, channels, probe, rows):
    """All that compares reconstructions with the originals (N, C, H, W) in [-1, 1]."""
    p, q = (x + 1) / 2, (x_hat + 1) / 2
    found = train_vae.reconstruction_metrics(x, x_hat)
    power = power_spectrum(q) - power_spectrum(p)                        # (C, frequencies)
    found |= {"ssim": torch.cat([structural_similarity(a, b) for a, b in zip(
                  p.split(at_once(p)), q.split(at_once(q)))]).mean(0).tolist(),
              "psnr_per_channel": (-10 * (p - q).square().mean((0, 2, 3)).clamp(min=1e-9)
                                   .log10()).tolist(),
              "emd": earth_movers_distance(p, q).tolist(),
              "fine_power": power[:, power.shape[1] // 2:].mean(1).tolist(),
              "features": feature_agreement(x, x_hat, channels)}
    if probe:
        hits = named_right(probe, x_hat, rows)
        strong = torch.tensor([float(r["true_effect"]) >= .5 for r in rows])
        found |= {"probe_mechanism": hits["mechanism"][strong].float().mean().item(),
                  "probe_batch": hits["batch"].float().mean().item()}
    return found


def rates(vae, images):
    """Images encoded and decoded per second."""
    x = images[:at_once(images)].to(device())
    found = []
    with torch.no_grad(), autocast():
        z = vae.to_latent(x)
        for work in (lambda: vae.to_latent(x), lambda: vae.to_image(z)):
            work()
            start = time.time()
            for _ in range(3):
                work()
            if x.is_cuda:
                torch.cuda.synchronize()
            found.append(3 * len(x) / (time.time() - start))
    return found


def compare_latent_spaces(args):
    """The tables of `evaluate.py vae`: autoencoders of several shapes, weights and losses, each
    trained for the same number of steps, beside baselines of the same compression; and what each
    is worth to a diffusion model of one budget."""
    if args.quick:
        args.train_steps, args.ldm_steps, args.images = 150, min(args.ldm_steps, 100), 96
    out = Path(args.out)
    results, lines, reconstructions = Results(out / "vae.jsonl"), [], {}
    for change in args.configs or LATENT_SPACES:
        name = change.replace(" ", ",") or "default"
        config = replace(train_vae.Config(), **{
            "data": args.data or train_vae.Config.data, "steps": args.train_steps,
            "out": str(out / f"{name}-{args.train_steps}"), **parse_settings(change)})
        path = train_vae.trained(config)
        opened = open_autoencoder(path)
        if opened.settings.data != config.data:
            raise UserError(f"{path} was trained on {opened.settings.data}: use another --out")
        x, rows = held_out(opened, args.images)
        x_hat, kl = reconstruct(opened.vae, x)
        line = results.get({"vae": change, "autoencoder": finger(path), "images": len(x)},
                           lambda: {"label": name} | measure_autoencoder(opened, x, x_hat, kl,
                                                                         rows))
        if args.ldm_steps:
            line = line | results.get(
                {"ldm_on": change, "autoencoder": finger(path), "ldm_steps": args.ldm_steps,
                 "images": args.images, "guidance": args.guidance, "form": args.form,
                 "interval": args.interval, "steps": args.steps},
                lambda: generation_on(args, path, out / f"ldm-{name}-{args.train_steps}"))
        lines.append(line)
        reconstructions.setdefault("original", x[0].numpy())
        reconstructions[name] = x_hat[0].numpy()
    lines[0]["originals"] = score_reconstruction(x, x, opened.channels, probe_of(opened), rows)
    print_latent_spaces(lines, opened.channels)
    draw_latent_spaces(out, lines, reconstructions, opened.channels)
    (out / "vae.json").write_text(json.dumps(lines, indent=1))
    print(f"wrote {out}/vae.json, vae.png and rate_distortion.png")


def measure_autoencoder(opened, x, x_hat, kl, rows):
    """One line of the table: size, rates, reconstruction, and the baselines beside it."""
    probe, (encode, decode) = probe_of(opened), rates(opened.vae, x)
    numbers = opened.vae.to_latent(x[:1].to(device())).numel()
    return {"numbers": numbers, "numbers_per_pixel": numbers / x[0, 0].numel(),
            "kl": kl.mean().item(), "encoded_per_s": encode, "decoded_per_s": decode,
            "parameters": sum(p.numel() for p in opened.vae.parameters()),
            **score_reconstruction(x, x_hat, opened.channels, probe, rows),
            "baselines": baselines(opened, x, numbers, probe, rows)}


def parse_settings(change):
    """"latent_channels=8 kl_weight=1e-3" to settings of train_vae.Config."""
    kinds, settings = {f.name: f.type for f in dataclasses.fields(train_vae.Config)}, {}
    for name in ("data", "out"):  # options of their own
        del kinds[name]
    for word in change.split():
        name, _, value = word.partition("=")
        if name not in kinds or kinds[name] is bool:
            raise UserError(f"--configs {word}: no setting of train_vae.py")
        try:
            settings[name] = kinds[name](value)
        except ValueError:
            raise UserError(f"--configs {word}: not a value for {name}") from None
    preset = settings.get("preset", "")
    if preset not in ("", *train_vae.PRESETS):
        raise UserError(f"--configs preset={preset}: one of {', '.join(train_vae.PRESETS)}")
    return train_vae.PRESETS.get(preset, {}) | settings


def open_autoencoder(path):
    """An autoencoder, and the data it was trained on."""
    vae, content = train_vae.load_vae(path)
    settings = SimpleNamespace(**content["settings"])
    manifest, pixels, train, held = open_data(settings, draw=False)
    return SimpleNamespace(vae=vae, settings=settings, manifest=manifest, pixels=pixels,
                           train=train, held=held, intensity=content["intensity"],
                           channels=tuple(settings.channels.split(",")), content={"vae": content})


def held_out(opened, count):
    """(held-out images, their rows of the manifest), at random."""
    some = np.random.default_rng(0).permutation(opened.held)[:count]
    rng = np.random.default_rng(0) if opened.settings.crop else None
    return views(opened.pixels, some, opened.settings, opened.intensity, rng), [
        {name: values[i] for name, values in opened.manifest.columns.items()} for i in some]


def probe_of(opened):
    return screen_probe(opened.manifest.path.parent, opened)


def baselines(opened, x, numbers, probe, rows):
    """What needs no network, at the same compression: a small image (area downsampling, bicubic
    upsampling) and patches in principal components."""
    some = np.random.default_rng(1).permutation(opened.train)[:15 * at_once(x)]
    f = opened.settings.downsampling
    training = views(opened.pixels, some, opened.settings, opened.intensity)
    pca = PatchPCA(training, f, numbers // (x[0, 0].numel() // f ** 2))
    return {"small image": score_reconstruction(
        x, train_vae.through_small_image(x, numbers), opened.channels, probe, rows),
        "patch PCA": score_reconstruction(x, pca(x), opened.channels, probe, rows)}


def generation_on(args, vae, out):
    """What an autoencoder is worth: probes and kernel distance of a diffusion model trained on its
    latents for `--ldm_steps`, on held-out wells of seen conditions."""
    path = trained(train_ldm.Config(data=args.data or train_ldm.Config.data, vae=str(vae),
                                    out=str(out), steps=args.ldm_steps))
    opened = open_trained(args, path)
    m = opened.manifest
    if "true_mechanism" not in m.columns:
        return {}
    cells = cells_of(m, ["true_mechanism", "batch"])
    held, = heldout_sets(opened, ["val"]).values()
    a, b = halves(m, held, cells, args.images)
    request = Request(opened.model.weights(args.guidance), args.form, args.interval,
                      steps=args.steps)
    entry, _ = quality_of(opened, a, b, cells, feature_scale(opened),
                          screen_probe(m.path.parent, opened.model), request)
    return {"generated": {k: entry["generated"][k] for k in (
        "distance", "variance_ratio", "true_mechanism", "batch")},
        "generated_floor": entry["real"]["distance"], "generated_ceiling": entry["real"]["ceiling"]}


def print_latent_spaces(lines, channels):
    """One line per autoencoder and baseline: reconstruction; then by channel; then generation."""
    every = [(e["label"], e) for e in lines]
    beside = [(label, e) for e in lines for label, e in (
        (e["label"], e), *((f"    {name}", b) for name, b in e["baselines"].items()))]
    beside.append(("the originals", lines[0]["originals"]))
    wide = max([28, *(len(label) + 1 for label, _ in beside)])
    print(f"\n{'':{wide}s}{'numbers':>8s}{'a pixel':>9s}{'KL':>7s}{'L1':>8s}{'PSNR':>6s}"
          f"{'SSIM':>7s}{'EMD':>8s}{'mechanism':>11s}{'batch':>7s}")
    for label, e in beside:
        size = (f"{e['numbers']:8d}{e['numbers_per_pixel']:9.3f}{e['kl']:7.0f}" if "kl" in e
                else " " * 24)
        print(f"{label:{wide}s}{size}{e['l1']:8.4f}{e['psnr']:6.1f}{np.mean(e['ssim']):7.3f}"
              f"{np.mean(e['emd']):8.4f}{e.get('probe_mechanism', np.nan):11.2f}"
              f"{e.get('probe_batch', np.nan):7.2f}")
    for title, key, form in (("L1", "l1_per_channel", "8.4f"), ("PSNR", "psnr_per_channel", "8.1f"),
                             ("structural similarity", "ssim", "8.3f"),
                             ("earth mover's distance", "emd", "8.4f"),
                             ("fine power, log (-: lost)", "fine_power", "8.2f")):
        print(f"\n{title:{wide}s}" + "".join(f"{c:>8s}" for c in channels))
        for label, e in beside[:-1]:
            print(f"{label:{wide}s}" + "".join(f"{v:{form}}" for v in e[key]))
    names = ["nuclei", *channels]
    print(f"\n{'features: correlation (bias)':{wide}s}" + "".join(f"{n:>13s}" for n in names))
    for label, e in beside[:-1]:
        print(f"{label:{wide}s}" + "".join("{:6.2f} ({:4.2f})".format(*e["features"][n])
                                       for n in names))
    print(f"\n{'':{wide}s}{'M parameters':>14s}{'encoded/s':>11s}{'decoded/s':>11s}")
    for label, e in every:
        print(f"{label:{wide}s}{e['parameters'] / 1e6:14.2f}{e['encoded_per_s']:11.0f}"
              f"{e['decoded_per_s']:11.0f}")
    print_generation([(label, e) for label, e in every if "generated" in e])


def print_generation(made):
    """What each autoencoder does to generation."""
    wide = max([28, *(len(label) + 1 for label, _ in made)])
    if made:
        print(f"\n{'generated on held-out wells':{wide}s}{'mechanism':>10s}{'batch':>8s}"
              f"{'distance':>10s}{'(floor, ceiling)':>20s}{'variance':>10s}")
    for label, e in made:
        g, limits = e["generated"], (e["generated_floor"], e["generated_ceiling"])
        print(f"{label:{wide}s}{g['true_mechanism']:10.2f}{g['batch']:8.2f}"
              f"{1000 * g['distance']:10.0f}"
              f"{'({:.0f}, {:.0f})'.format(*(1000 * v for v in limits)):>20s}"
              f"{g['variance_ratio']:10.2f}")


def draw_latent_spaces(out, lines, images, channels):
    """By channel, the same image {name: (C, H, W)} through each autoencoder; and distortion against
    rate."""
    import matplotlib.pyplot as plt
    data.picture(out / "vae.png", [[image, *image] for image in images.values()], channels,
                 list(images), ["all", *channels])
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for k, e in enumerate(lines):
        for axis, rate in zip(axes, (e["numbers"], e["kl"])):
            axis.plot(rate, e["l1"], "o", color=f"C{k % 10}", label=e["label"])
    for name, mark in (("small image", "^"), ("patch PCA", "s")):
        points = sorted({(e["numbers"], e["baselines"][name]["l1"]) for e in lines})
        axes[0].plot(*zip(*points), mark, mfc="none", color="k", label=name)
    axes[0].set(xscale="log", yscale="log", xlabel="numbers per image", ylabel="L1 on [0, 1]")
    axes[1].set(xscale="log", xlabel="KL, nats per image")
    axes[0].legend(fontsize=6), axes[0].grid(alpha=.3), axes[1].grid(alpha=.3)
    fig.tight_layout()
    fig.savefig(out / "rate_distortion.png", dpi=110)
    plt.close(fig)


# ------------------------------------------------------------------------------------------------
# 9. Mol2Image's benchmark, reimplemented (Yang et al. 2021; its metric code was not released)
# ------------------------------------------------------------------------------------------------

BINOMIAL = torch.tensor([1., 4., 6., 4., 1.]) / 16
REACH = 16.  # of the histograms of projections, in deviations


def laplacian_pyramid(x, smallest=16):
    """Bands of images (N, C, H, W), finest first, the last the low-pass rest at `smallest` pixels:
    5x5 binomial kernel, mirrored borders (Burt & Adelson 1983)."""
    c, bands = x.shape[1], []

    def blur(v):
        v = F.pad(v, (2, 2, 2, 2), mode="reflect")
        taps = BINOMIAL.to(v)
        v = F.conv2d(v, taps.view(1, 1, 5, 1).expand(c, 1, 5, 1), groups=c)
        return F.conv2d(v, taps.view(1, 1, 1, 5).expand(c, 1, 1, 5), groups=c)
    while min(x.shape[2:]) >= 2 * smallest:
        small = blur(x)[:, :, ::2, ::2]
        spread = torch.zeros_like(x)
        spread[:, :, ::2, ::2] = small
        bands.append(x - 4 * blur(spread))
        x = small
    return [*bands, x]


def random_patches(bands, seeds, patches=128, side=7):
    """From each image its own random patches: [(N, patches, C, side, side)] by level. The places
    depend on the image's seed alone, so that any batch size gives the same."""
    found = []
    for level, band in enumerate(bands):
        c, h, w = band.shape[1:]
        windows = band.unfold(2, side, 1).unfold(3, side, 1)         # (N, C, h', w', side, side)
        places = np.stack([np.random.default_rng((seed, level)).integers(
            (h - side + 1) * (w - side + 1), size=patches) for seed in seeds])
        y, x = (torch.from_numpy(v) for v in np.divmod(places, w - side + 1))
        rows = torch.arange(len(band))[:, None]
        found.append(windows[rows, :, y, x])
    return found


def histogram(values, low, high, bins=4096):
    """Counts (R, bins) of each row of values (R, n); what lies outside counts at the ends."""
    place = ((values - low) * (bins / (high - low))).clamp(0, bins - 1).long()
    counts = torch.zeros(len(values), bins, dtype=torch.long, device=values.device)
    return counts.scatter_add_(1, place, torch.ones_like(place))


def area_between(one, other, low, high):
    """Wasserstein-1 distance (R,) of two histograms, row by row: the area between the distribution
    functions is the mean distance of sorted values, and memory does not grow with their number."""
    one, other = (h.double().cumsum(1) / h.sum(1, keepdim=True) for h in (one, other))
    return (one - other).abs().mean(1) * (high - low)


def along_directions(points, count=4 * 128, seed=0):
    """Histograms of points (n, D) projected on random unit vectors, always the same ones."""
    rng = torch.Generator().manual_seed(seed)
    u = F.normalize(torch.randn(count, points.shape[1], generator=rng), dim=1).to(points)
    return histogram(u @ points.T, -REACH, REACH)


def wasserstein_along(a, b):
    """Sliced Wasserstein distance of two histograms from `along_directions`. For Gaussians of one
    covariance s^2 I whose means differ by d, |d . u| averaged over directions u."""
    return area_between(a, b, -REACH, REACH).mean().item()


def patches_of(stream):
    """[(128 B, C, 7, 7) by level] of each batch of images on [0, 1] that stream() yields."""
    first = 0
    for x in stream():
        bands = laplacian_pyramid(255 * x.to(device()))
        yield [p.flatten(0, 1) for p in random_patches(bands, range(first, first + len(x)))]
        first += len(x)


def patch_histograms(stream):
    """What sliced Wasserstein distance needs of a set of images (Karras et al. 2018,
    arXiv:1710.10196, section 5), by level, finest first: 128 patches of 7x7 pixels per image and
    level, standardised per channel by the set itself, along random directions. stream() yields the
    images twice, the same batches (B, C, H, W) on [0, 1]."""
    sums, counts = 0, 0
    for levels in patches_of(stream):
        sums = sums + torch.stack([torch.stack([p.double().pow(k).sum((0, 2, 3)) for k in range(3)])
                                   for p in levels])                     # (levels, 3, C)
    n, mean, square = sums[:, 0], sums[:, 1] / sums[:, 0], sums[:, 2] / sums[:, 0]
    std = (square - mean ** 2).clamp(min=0).sqrt().clamp(min=1e-8)
    for levels in patches_of(stream):
        counts = counts + torch.stack([
            along_directions(((p - m[:, None, None]) / s[:, None, None]).flatten(1).float())
            for p, m, s in zip(levels, mean, std)])                      # (levels, 512, bins)
    return counts


def sliced_wasserstein(a, b):
    """Sliced Wasserstein distance x 1000 by level, finest first, of two sets of images from
    `patch_histograms`. As each set was standardised by itself, it is blind to brightness and
    contrast."""
    return [1000 * wasserstein_along(p, q) for p, q in zip(a, b)]


def minimum_cross_entropy(x, bins=128):
    """Threshold (B,) of (B, H, W) on [0, 1] (Li & Lee 1993): the cut whose two class means tell
    most, the largest m0 log(mean0) + m1 log(mean1) with m the summed intensities."""
    place = (x.flatten(1).clamp(0, 1) * (bins - 1)).round().long()
    count = torch.zeros(len(x), bins, device=x.device).scatter_add_(
        1, place, torch.ones_like(place, dtype=torch.float))
    value = torch.arange(bins, device=x.device) / (bins - 1)
    n0, m0 = count.cumsum(1), (count * value).cumsum(1)
    n1, m1 = n0[:, -1:] - n0, m0[:, -1:] - m0
    told = (m0 * (m0 / n0.clamp(min=1)).clamp(min=1e-9).log()
            + m1 * (m1 / n1.clamp(min=1)).clamp(min=1e-9).log())
    # between two distant classes every cut is as good: the middle of the plateau
    best = told >= told.max(1, keepdim=True).values * (1 + 1e-6)         # told is negative
    return ((best * value).sum(1) / best.sum(1).clamp(min=1)).add(.5 / (bins - 1))


ZERNIKE = [(n, m) for n in range(10) for m in range(n + 1) if (n - m) % 2 == 0]   # 30 moments


def radial_polynomial(rho, n, m):
    """R_n^m of Zernike (1934) at radii in [0, 1]."""
    return sum((-1) ** k * math.factorial(n - k) / (
        math.factorial(k) * math.factorial((n + m) // 2 - k) * math.factorial((n - m) // 2 - k))
        * rho ** (n - 2 * k) for k in range((n - m) // 2 + 1))


def zernike_moments(labels):
    """Sizes of the Zernike moments of each object up to order 9, (B, L - 1, 30): sums of the
    polynomials over the object, on the disc about its centre of mass that encloses it, over the
    area of the disc; a disc is (1, 0, 0, ...), and turning an object changes nothing.
    NaN where there is no object or the border cuts it."""
    count = int(labels.max()) + 1
    b, y, x = labels.nonzero(as_tuple=True)                              # the objects' pixels
    own = b * count + labels[b, y, x]                                    # the object of each

    def total(values):                                                   # (pixels,) to (B L,)
        zeros = torch.zeros(len(labels) * count, device=labels.device)
        return zeros.index_add_(0, own, values.float())
    area = total(torch.ones_like(y))
    dy, dx = (v - (total(v) / area.clamp(min=1))[own] for v in (y, x))
    r, theta = (dy ** 2 + dx ** 2).sqrt(), torch.atan2(dy, dx)
    radius = torch.zeros_like(area).scatter_reduce(0, own, r, "amax") + .5
    rho, moments = r / radius[own], []
    for n, m in ZERNIKE:
        radial = radial_polynomial(rho, n, m)
        real, imaginary = (total(radial * f(m * theta)) for f in (torch.cos, torch.sin))
        moments.append((real ** 2 + imaginary ** 2).sqrt() / (math.pi * radius ** 2))
    moments = torch.stack(moments, 1).view(len(labels), count, len(ZERNIKE))
    there = per_object(labels, torch.ones_like(labels)) > 0
    there &= ~touches(labels, "top", "bottom", "left", "right")
    return torch.where(there[..., None], moments, torch.nan)[:, 1:]


def lower_of_three(x, bins=64):
    """The lower threshold (B,) of Otsu's method with three classes: background apart from the two
    brighter ones, the largest sum of w mean^2 over classes."""
    place = (x.flatten(1).clamp(0, 1) * (bins - 1)).round().long()
    share = torch.zeros(len(x), bins, device=x.device).scatter_add_(
        1, place, torch.ones_like(place, dtype=torch.float)) / place.shape[1]
    w = share.cumsum(1)
    m = (share * torch.arange(bins, device=x.device) / (bins - 1)).cumsum(1)
    end_w, end_m = w[:, -1:, None], m[:, -1:, None]
    between = sum(b ** 2 / a.clamp(min=1e-9) for a, b in (                # (B, lower, upper)
        (w[:, :, None], m[:, :, None]), (w[:, None] - w[:, :, None], m[:, None] - m[:, :, None]),
        (end_w - w[:, None], end_m - m[:, None])))
    upper = torch.ones(bins, bins, dtype=torch.bool, device=x.device).triu(1)
    best = between.masked_fill(~upper, -1.).flatten(1).argmax(1) // bins
    return (best + .5) / (bins - 1)


def grow_cells(labels, rna, steps):
    """Cells: the nuclei's labels spread, a pixel at a time, over the stained area of the RNA
    channel (B, H, W)."""
    blurred = gaussian_blur(rna[:, None], 1.)[:, 0]
    stained = blurred > lower_of_three(blurred)[:, None, None]
    cells = labels.float()
    for _ in range(steps):
        spread = F.max_pool2d(cells[:, None], 3, 1, 1)[:, 0]
        cells = torch.where((cells == 0) & stained, spread, cells)
    return cells.long()


def middle(x):
    """Median of (B, L, ...) over L without NaN; NaN where there is nothing."""
    nothing = x.new_full((len(x), 1, *x.shape[2:]), torch.nan)
    return torch.cat([x, nothing], 1).nanmedian(1).values


FAMILIES = ("coverage", "count", "size", "Zernike shape", "intensity")


def correspondence_features(images, channels, radius=NUCLEUS_RADIUS):
    """{family: (N, features)} of images (N, C, H, W) in [-1, 1], as CellProfiler's are grouped in
    Mol2Image's benchmark: share of the field covered by nuclei and by cells; number of nuclei; mean
    and median over nuclei and over cells of area and of 30 Zernike moments; mean and median
    intensity of each channel in cells. Nuclei that the border cuts are discarded with their cells,
    but for the count, which `count_objects` keeps without bias."""
    nucleus, rna = (channels.index(c) if c in channels else 0 for c in ("DNA", "RNA"))
    x = (images.to(device()).float() + 1) / 2
    nuclei = segment_nuclei(x[:, nucleus], radius, threshold=minimum_cross_entropy)
    cells = grow_cells(nuclei, x[:, rna], round(3 * radius))
    count = count_objects(nuclei)[:, None]
    cut = touches(nuclei, "top", "bottom", "left", "right")
    nuclei, cells = (v * ~cut.gather(1, v.flatten(1)).view_as(v) for v in (nuclei, cells))
    sizes = [object_shapes(v)[0] for v in (nuclei, cells)]                # (N, L) each
    shapes = [zernike_moments(v) for v in (nuclei, cells)]               # (N, L, 30)
    inside = torch.where(cells[:, None] > 0, x, torch.nan).flatten(2)    # (N, C, H W)
    found = {"coverage": torch.stack([(v > 0).float().mean((1, 2)) for v in (nuclei, cells)], 1),
             "count": count,
             "size": torch.stack([f(v) for v in sizes for f in (mean_of, middle)], 1),
             "Zernike shape": torch.cat([f(v) for v in shapes for f in (mean_of, middle)], 1),
             "intensity": torch.cat([inside.nanmean(2), inside.nanmedian(2).values], 1)}
    return {name: values.cpu() for name, values in found.items()}


def mean_of(x):
    """Mean of (B, L, ...) over L without NaN."""
    return x.nanmean(1)


def ranks(x):
    """Ranks of (n,), from 0, ties sharing their mean rank."""
    ordered = x.sort().values
    first, after = (torch.searchsorted(ordered, x, right=right) for right in (False, True))
    return (first + after - 1).double() / 2


def by_molecule(found, place):
    """Features {family: (N, F)} averaged over the images of each molecule, {family: (M, F)}, NaN
    left out. place (N,): the number of each image's molecule."""
    place = torch.as_tensor(place)
    count = int(place.max()) + 1

    def total(values):
        return torch.zeros(count, values.shape[1]).index_add_(0, place, values)
    return {family: total(v.nan_to_num(0.)) / total(v.isfinite().float())
            for family, v in found.items()}


def correlations(p, q):
    """Pearson correlation (F,) of the columns of two (M, F), rows with NaN in either left out; NaN
    where a column does not vary."""
    kept = p.isfinite() & q.isfinite()
    p, q = (torch.where(kept, v.double(), torch.nan) for v in (p, q))
    p, q = ((v - v.nanmean(0)).nan_to_num(0.) for v in (p, q))
    size = p.norm(dim=0) * q.norm(dim=0)
    return torch.where((kept.sum(0) > 2) & (size > 1e-12), (p * q).sum(0) / size, torch.nan)


def correlation_by_family(a, b):
    """{family: (Pearson, Spearman)} over molecules: features {family: (M, F)} of two sets
    correlated, averaged over the family's features that vary."""
    table = {}
    for family in FAMILIES:
        p, q = a[family], b[family]
        ranked = [torch.full_like(v, torch.nan, dtype=torch.double) for v in (p, q)]
        for k, kept in enumerate((p.isfinite() & q.isfinite()).T):
            for v, into in zip((p, q), ranked):
                into[kept, k] = ranks(v[kept, k])
        table[family] = tuple(correlations(*pair).nanmean().item() for pair in ((p, q), ranked))
    return table


class Correspondence(nn.Module):
    """Do this image and this molecule belong together? A residual network over the image, message
    passing over the molecule, 512 numbers of each, and one number from both."""

    def __init__(self, channels, width=512):
        super().__init__()
        self.image = Probe(channels, {"code": range(width)})
        self.molecule = MOLECULE_ENCODERS["graph"]({}, width, 16)
        self.head = nn.Sequential(nn.Linear(2 * width, 256), nn.SiLU(), nn.Linear(256, 1))

    def forward(self, images, graphs):                           # (B, C, H, W), (B, A, 6 + A)
        """Scores (B, B) of every image with every molecule."""
        a, b, n = self.image(images)["code"], self.molecule(graphs)[0], len(images)
        return self.score(a[:, None].expand(-1, n, -1), b[None].expand(n, -1, -1))

    def score(self, a, b):                                       # (..., 512) each
        return self.head(torch.cat([a, b], -1))[..., 0]


def train_correspondence(read, rows, graphs, molecule, steps, seed=0, batch=32, lr=1e-3):
    """Binary cross-entropy on matched and mismatched pairs, half of the weight on each: all pairs
    of a batch, since on one pair per image nothing was learnt in 500 steps. read(rows): images
    (B, C, H, W); graphs (M, A, 6 + A); molecule (N,) the place of each row's own."""
    torch.manual_seed(seed)
    network = Correspondence(read(rows[:1]).shape[1]).to(device())
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=.02)
    for step in tqdm(range(steps), desc="training the correspondence", mininterval=1):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        rng, _ = step_rng(seed, step)
        chosen = rng.integers(len(rows), size=batch)
        x, own = torch.rot90(read(rows[chosen]), int(rng.integers(4)), (2, 3)), molecule[chosen]
        with autocast():
            out = network(x.to(device()), graphs[own].to(device())).float()        # (B, B)
        matched = torch.from_numpy(own[:, None] == own).to(out)
        weight = matched / matched.sum() + (1 - matched) / (1 - matched).sum().clamp(min=1)
        loss = F.binary_cross_entropy_with_logits(out, matched, weight / 2, reduction="sum")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval()


@torch.no_grad()
def correspondence_hits(network, codes, graphs, molecule, candidates=100, seed=0):
    """Of each image, by its code (N, 512): {"accuracy": (N,) the share of one matched and one
    mismatched pair that is told (zero is the cut), "top_1", "top_5", "top_10": (N,) whether the
    true molecule is among the first of `candidates`}."""
    b = torch.cat([network.molecule(g.to(device()))[0] for g in graphs.split(256)])
    rng, right, places = np.random.default_rng(seed), [], []
    for code, own in zip(codes.to(b), molecule):
        others = rng.permutation(np.delete(np.arange(len(b)), own))[:candidates - 1]
        scores = network.score(code.expand(1 + len(others), -1), b[[own, *others]]).float()
        right.append(((scores[0] > 0).float() + (scores[1] <= 0).float()).item() / 2)
        places.append((scores[1:] > scores[0]).sum().item()
                      + .5 * (scores[1:] == scores[0]).sum().item())
    return {"accuracy": np.array(right)} | {f"top_{k}": np.array(places) < k for k in (1, 5, 10)}


# --- the sets that are compared -------------------------------------------------------------------

def benchmark_sets(manifest, wanted):
    """{name: rows} of what is not trained on: each set of Mol2Image's whose name says easy (unseen
    images of training molecules) or hard (unseen molecules); of a simulated screen, the same."""
    label = np.array(manifest.columns.get("split", []))
    names = sorted(set(label) - {"train", ""})
    sets = {n: [n] for n in names if "easy" in n or "hard" in n} or {
        "easy": ["val"], "hard": ["test_substituent", "test_scaffold"]}
    sets = sets if wanted is None else {name: sets.get(name, [name]) for name in wanted}
    for name, parts in sets.items():
        if not set(parts) & set(names):
            raise data.DataError(f"{manifest.path}, column split: no {name} rows; there are "
                                 + ", ".join(names))
    return {name: np.flatnonzero(np.isin(label, parts)) for name, parts in sets.items()}


def twins(manifest, rows, treatment, per_molecule, limit, seed=0):
    """Two sets of rows of the same molecules and doses from different wells: (a from `rows`, b from
    anywhere in the manifest), `per_molecule` each at most. Treatments in one well only fall
    out."""
    rng, wells = np.random.default_rng(seed), wells_of(manifest)
    everywhere, mine_of = rows_by(treatment, range(len(manifest))), rows_by(treatment, rows)
    a, b = [], []
    for name in rng.permutation(sorted(mine_of)):
        mine = rng.permutation(mine_of[name])
        mine = mine[wells[mine] == wells[mine[0]]][:per_molecule]
        others = np.array(everywhere[name])
        others = rng.permutation(others[wells[others] != wells[mine[0]]])[:len(mine)]
        a += list(mine[:len(others)])
        b += list(others)
        if len(a) >= limit:
            break
    return np.array(a[:limit], int), np.array(b[:limit], int)


def rows_by(names, rows):
    """{name: its rows} among these rows."""
    found = defaultdict(list)
    for i in rows:
        found[names[i]].append(i)
    return found


def nearest_molecules(smiles, training):
    """{SMILES: the training molecule of the greatest Tanimoto similarity} (Morgan fingerprints,
    radius 2)."""
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048,
                                                          includeChirality=True)
    known = [generator.GetFingerprint(parse_smiles(s)) for s in training]
    return {s: training[int(np.argmax(DataStructs.BulkTanimotoSimilarity(
        generator.GetFingerprint(parse_smiles(s)), known)))] for s in sorted(set(smiles))}


def nearest_images(opened, rows, smiles, treatment):
    """For each row a real training row of the nearest training molecule, at the same dose where it
    has it and, where there is one, in the same batch. smiles, treatment: columns."""
    m, rng = opened.manifest, np.random.default_rng(2)
    batch = batches_of(m)
    trained = [i for i in opened.train if smiles[i]]
    nearest = nearest_molecules([smiles[i] for i in rows], sorted({smiles[i] for i in trained}))
    by_molecule, by_treatment = rows_by(smiles, trained), rows_by(treatment, trained)
    found = []
    for i in rows:
        near = nearest[smiles[i]]
        same_dose = near + treatment[i].removeprefix(smiles[i])  # "CCO x 10" to "CCN x 10"
        candidates = by_treatment.get(same_dose) or by_molecule[near]
        found.append(int(rng.choice([j for j in candidates if batch[j] == batch[i]] or candidates)))
    return np.array(found)


def batches_of(manifest):
    """The experiment of each row: its batch, or plate, or none."""
    name = next((n for n in ("batch", "plate") if n in manifest.columns), None)
    return np.array(manifest.columns[name] if name else [""] * len(manifest))


def class_means(opened, rows, treatment):
    """read(places): the mean of (at most 50) training images of each row's class, its treatment
    where that was trained on, else its batch."""
    batch = batches_of(opened.manifest)
    by_treatment, by_batch = rows_by(treatment, opened.train), rows_by(batch, opened.train)

    @functools.lru_cache(64)  # rows of one treatment follow each other
    def mean(name, place):
        inside = by_treatment.get(name) or by_batch.get(place) or opened.train
        return real_images(opened, np.random.default_rng(0).permutation(inside)[:50]).mean(0)
    return lambda k: torch.stack([mean(treatment[i], batch[i]) for i in rows[k]])


def other_system(opened, path, rows):
    """read(places): images that another system made for these rows, from a manifest with the same
    columns plate, well and site (or compound, where those are not given). Images of the model's
    size or of 64 pixels are taken as they are, others binned and cropped as the real ones are."""
    made = data.read_manifest(path, opened.model.channels)
    by = [n for n in ("plate", "well", "site") if n in made.columns] or ["compound"]
    for manifest in (made, opened.manifest):
        if not set(by) <= set(manifest.columns):
            raise data.DataError(f"--generated: {manifest.path} has no column {', '.join(by)}")
    place = {name: i for i, name in enumerate(cells_of(made, by))}
    wanted = cells_of(opened.manifest, by)
    missing = sorted(set(wanted[rows]) - set(place))
    if missing:
        raise data.DataError(f"{path} has no image for {len(missing)} of the rows to compare, such "
                             f"as {' x '.join(by)} = {missing[0]}")
    settings, side = opened.settings, real_images(opened, rows[:1]).shape[-1]
    if set(made.sizes) <= {(side, side), (64, 64)}:
        settings = SimpleNamespace(binning=1, crop=0, flips=False)
    pixels = data.Pixels(made, settings.binning)
    return lambda k: views(pixels, [place[wanted[i]] for i in rows[k]], settings,
                           opened.model.intensity)


def generated_images(opened, model, checkpoint, rows, args, folder):
    """read(places): images of a model under the conditions of these rows, one seed each. They lie
    in a file, float16, so that memory does not grow with their number and a second run finds them.
    """
    columns = blank_unseen(model.fields, {f.name: opened.manifest.rows(rows, f.name)
                                          for f in model.fields})
    request = Request(model.weights(args.guidance), args.form, args.interval, steps=args.steps)
    key = f"{finger(checkpoint)}{opened.manifest.path.resolve()}{list(rows)}{request}"
    path = Path(folder) / f"generated-{hashlib.sha1(key.encode()).hexdigest()[:12]}.npy"

    if not path.exists():
        shape = (len(rows), len(model.channels),
                 *(side * model.vae.config.downsampling for side in model.latent_shape[1:]))
        made = np.lib.format.open_memmap(path.with_suffix(".tmp"), "w+", np.float16, shape)
        for i in tqdm(range(0, len(rows), 64), desc="generated images"):
            part = slice(i, i + 64)
            made[part] = generate(model, {name: values[part] for name, values in columns.items()},
                                  range(len(rows))[part], request).numpy()
        made.flush()
        path.with_suffix(".tmp").rename(path)
    made = np.load(path, mmap_mode="r")
    return lambda k: torch.from_numpy(made[k].astype(np.float32))


# --- the benchmark --------------------------------------------------------------------------------

def halved(images, size=64):
    """Images averaged over 2x2 pixels until they are `size` pixels wide."""
    while images.shape[-1] >= 2 * size:
        images = F.avg_pool2d(images, 2)
    return images


@torch.no_grad()
def measured(read, n, channels, network, what, batch=64):
    """What the benchmark compares, of the images read(places), places 0 to n - 1, in [-1, 1]. They
    are read in batches, once for features and twice for patches: no image is kept."""
    def stream(size=64):
        for i in tqdm(range(0, n, batch), desc=what, leave=False):
            yield (halved(read(np.arange(i, min(i + batch, n))), size) + 1) / 2
    features, codes, intensity = [], [], 0
    for x in stream():
        features.append(correspondence_features(2 * x - 1, channels))
        codes.append(network.image((2 * x - 1).to(device()))["code"].float().cpu())
        intensity = intensity + histogram(x.transpose(0, 1).flatten(1), 0., 1.)
    side = read(np.arange(1)).shape[-1]
    patches = {s: patch_histograms(functools.partial(stream, s)) for s in {x.shape[-1], side}}
    return {"features": {f: torch.cat([v[f] for v in features]) for f in FAMILIES},
            "codes": torch.cat(codes), "intensity": intensity, "patches": patches}


def score_benchmark(made, real, network, graphs, place):
    """The benchmark's figures of images beside real ones of the same conditions, both `measured`:
    at 64 pixels, and sliced Wasserstein distance at their own size where both are larger. 5 to
    95 % over half samples of the molecules. place (N,): each image's molecule among graphs."""
    levels = {side: sliced_wasserstein(made["patches"][side], real["patches"][side])
              for side in sorted(set(made["patches"]) & set(real["patches"]))}
    found = {"swd": levels.pop(min(levels)), "intensity_w1": area_between(
        made["intensity"], real["intensity"], 0., 1.).tolist()}
    if levels:
        found["swd_native"] = levels.popitem()[1]
    a, b = (by_molecule(v["features"], place) for v in (made, real))
    hits = correspondence_hits(network, made["codes"], graphs, place)
    found["correlation"] = correlation_by_family(a, b)
    found |= {name: float(v.mean()) for name, v in hits.items()}
    rng, spread = np.random.default_rng(0), defaultdict(list)
    for _ in range(100):
        half = rng.permutation(len(graphs))[:max(3, len(graphs) // 2)]
        for family in FAMILIES:
            spread[family].append(correlations(a[family][half], b[family][half]).nanmean().item())
        spread["accuracy"].append(hits["accuracy"][np.isin(place, half)].mean())
    estimates = {f: found["correlation"][f][0] for f in FAMILIES} | {"accuracy": found["accuracy"]}
    return found | {"candidates": min(100, len(graphs)), "interval": {
        name: around(estimate, spread[name]) if np.isfinite(spread[name]).any() else [np.nan] * 2
        for name, estimate in estimates.items()}}


def treatments(opened, checkpoint):
    """What the benchmark compares over: (SMILES of each row, its treatment as molecule and dose,
    rows with a molecule at a quarter of the highest dose or more)."""
    m, fields = opened.manifest, opened.model.fields
    molecule = next((f.name for f in fields if f.kind == "molecule"), None)
    dose = next((f.name for f in fields if f.kind == "log"), None)
    if not molecule:
        raise UserError(f"{checkpoint} was told no molecule")
    smiles = np.array(m.columns[molecule])
    if not dose:
        return smiles, smiles, np.flatnonzero(smiles != "")
    doses = np.array([float(d) if d else 0. for d in m.columns[dose]])
    strong = (4 * doses >= doses.max()) & (doses > 0)
    return smiles, cells_of(m, [molecule, dose]), np.flatnonzero(strong & (smiles != ""))


def benchmark(opened, args, out):
    """The tables of `evaluate.py quality --mol2image`."""
    model, m = opened.model, opened.manifest
    if args.quick:
        args.images, args.train_steps = min(args.images, 96), 300
    smiles, treatment, usable = treatments(opened, args.checkpoint)
    pixel = args.pixel_model and pixel_model(opened, args)
    distinct = sorted(set(smiles) - {""})
    graphs = MOLECULE_ENCODERS["graph"]({}, 8, 8).featurise(distinct)
    number = {s: k for k, s in enumerate(distinct)}
    own = np.array([number.get(s, -1) for s in smiles])
    seen = np.intersect1d(opened.train, usable)
    if not len(seen):
        raise data.DataError(f"{m.path}: no training row has a molecule at a dose above 0")
    known, place = np.unique(own[seen], return_inverse=True)
    network = train_correspondence(lambda rows: halved(real_images(opened, rows)), seen,
                                   graphs[known], place, args.train_steps)
    table, pictures = {}, {}
    for name, rows in benchmark_sets(m, args.sets).items():
        a, b = twins(m, np.intersect1d(rows, usable), treatment, args.per_molecule, args.images)
        inside, place = np.unique(own[a], return_inverse=True)
        if len(inside) < 3:
            print(f"{name}: fewer than three molecules have two wells, left out")
            continue
        mixed = np.random.default_rng(3).permutation(b)
        near = nearest_images(opened, a, smiles, treatment)
        sets = {"real": rows_reader(opened, a), "real, another well": rows_reader(opened, b),
                "real, molecules permuted": rows_reader(opened, mixed),
                "generated": generated_images(opened, model, args.checkpoint, a, args, out),
                "nearest training molecule": rows_reader(opened, near),
                "class mean": class_means(opened, a, treatment)}
        if pixel:
            sets["same U-Net in pixels"] = generated_images(opened, pixel, args.pixel_model, a,
                                                            args, out)
        if args.generated:
            sets["the other system"] = other_system(opened, args.generated, a)
        pictures[name] = {kind: read(np.arange(min(8, len(a)))) for kind, read in sets.items()}
        real, table[name] = None, {"images": len(a), "molecules": len(inside)}
        for kind, read in sets.items():
            found = measured(read, len(a), model.channels, network, f"{name}, {kind}")
            real = real or found
            if kind != "real":
                table[name][kind] = score_benchmark(found, real, network, graphs[inside], place)
    if not table:
        raise UserError("nothing to compare")
    write_benchmark(table, pictures, args, model, out)


def rows_reader(opened, rows):
    return lambda k: real_images(opened, rows[k])


def pixel_model(opened, args):
    """The diffusion model of `--pixel_model`, which must see images as the other one does."""
    pixel = Model.load(args.pixel_model)
    for name, one, other in (("channels", pixel.channels, opened.model.channels),
                             ("intensities", pixel.intensity, opened.model.intensity)):
        if one != other:
            raise UserError(f"{args.pixel_model} has other {name} than {args.checkpoint}: train "
                            "both on the same data with the same settings")
    return pixel


def write_benchmark(table, pictures, args, model, out):
    """The tables printed, mol2image.json and mol2image.png."""
    print_benchmark(table, model.channels)
    (out / "mol2image.json").write_text(json.dumps({
        "checkpoint": args.checkpoint, "guidance": model.weights(args.guidance),
        "steps": args.steps, "train_steps": args.train_steps, "table": table}, indent=1))
    data.picture(out / "mol2image.png", [list(v.numpy()) for kinds in pictures.values()
                                         for v in kinds.values()], model.channels,
                 [f"{name}\n{kind}" for name, kinds in pictures.items() for kind in kinds],
                 pixel_um=model.pixel_um)
    print(f"wrote {out}/mol2image.json and mol2image.png")


def print_benchmark(table, channels):
    """By set: distances; correlations and accuracies; their intervals."""
    for name, entry in table.items():
        print(f"\n{name}: {entry['images']} images of {entry['molecules']} molecules")
        kinds = {k: v for k, v in entry.items() if isinstance(v, dict)}
        first = next(iter(kinds.values()))
        print(f"{'':28s}{'sliced Wasserstein x 1000, mean':>{8 * len(first['swd']) + 8}s}   "
              f"{'intensity W1 x 1000':>{6 * len(channels) + 2}s}   "
              + " ".join(f"{f:>13s}" for f in FAMILIES)
              + f"   pairs  top-1     5    10 of {first['candidates']}")
        for kind, e in kinds.items():
            print(f"{kind:28s}" + "".join(f"{v:8.0f}" for v in (*e["swd"], np.mean(e["swd"])))
                  + "     " + "".join(f"{1000 * v:6.0f}" for v in e["intensity_w1"]) + "   "
                  + " ".join(f"{p:6.2f} {s:6.2f}" for p, s in (e["correlation"][f]
                                                              for f in FAMILIES))
                  + f"{e['accuracy']:8.2f}" + "".join(f"{e[f'top_{k}']:6.2f}" for k in (1, 5, 10)))
            if "swd_native" in e:
                print(f"{'   at native size':28s}" + "".join(
                    f"{v:8.0f}" for v in (*e["swd_native"], np.mean(e["swd_native"]))))
        print("5 to 95 % over molecules    " + " ".join(f"{f:>15s}" for f in (*FAMILIES, "pairs")))
        for kind, e in kinds.items():
            print(f"{kind:28s}" + " ".join("{:6.2f} to {:5.2f}".format(*e["interval"][f])
                                           for f in (*FAMILIES, "accuracy")))
    print("(correlations over molecules: Pearson, Spearman; intervals: Pearson)")


# --- command line ---------------------------------------------------------------------------------

def parse_guidance(words):
    return {name: parse_number(name, value) for name, _, value in (w.partition("=") for w in words)}


def command(commands, name, text):
    return commands.add_parser(name, help=text,
                               formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def common_options(parser):
    """What every sub-command takes."""
    parser.add_argument("--checkpoint", default="runs/ldm/model.pt", help="from train_ldm.py")
    parser.add_argument("--data", default=None, help="another manifest than the model's own")
    parser.add_argument("--guidance", nargs="+", default=[], help="GROUP=WEIGHT for each group")
    parser.add_argument("--form", default="nested", choices=FORMS, help="of guidance")
    parser.add_argument("--interval", type=float, nargs=2, default=INTERVAL,
                        help="noise levels between which guidance acts")
    parser.add_argument("--quick", action="store_true", help="fewer images, shorter training")


def real_plate_options(parser, by):
    parser.add_argument("--by", nargs=by, default=None, help="for real plates: columns to cross, "
                        "biology first, such as compound plate")
    parser.add_argument("--also", default=None, help="with --by: real images apart by this column, "
                        "such as well")
    parser.add_argument("--nucleus_radius", type=float, default=NUCLEUS_RADIUS,
                        help="pixels, with --by: what the segmentation looks for")


def disentangle_options(parser):
    parser.add_argument("--study", default="model", help="one checkpoint as it is; at several "
                        "guidance weights; under the forms of guidance; with each sampler in few "
                        "steps and in many; along its training; the three arms (trains them); the "
                        "shortcut of a classifier (trains it); real images edited; real plates "
                        "with one pair left out in turn (trains them)",
                        choices=("model", "weights", "forms", "samplers", "training", "arms",
                                 "shortcut", "transfer", "pairs"))
    parser.add_argument("--out", default="runs/disentangle", help="results.jsonl and figures")
    parser.add_argument("--images", type=int, default=756, help="of the whole factorial")
    parser.add_argument("--steps", type=int, default=15, help="DDIM steps")
    parser.add_argument("--rescale", type=float, default=0., help="share of guidance's extra "
                        "spread taken back")
    parser.add_argument("--vae", default="runs/vae/model.pt", help="of the arms: one for all")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="which arms")
    parser.add_argument("--confounding", type=float, nargs="+", default=None,
                        help="of the arms' screens (0 and 0.5 with one seed, 0.9 with three)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2],
                        help="with --confounding, and of the shortcut's classifiers")
    parser.add_argument("--train_steps", type=int, default=1500, help="of each arm")


def conditions_options(parser):
    parser.add_argument("--out", default=None, help="folder for JSON and figure (the checkpoint's, "
                        "or runs/encoders)")
    parser.add_argument("--steps", type=int, default=15, help="DDIM steps")
    parser.add_argument("--encoders", action="store_true", help="compare the molecule encoders")
    parser.add_argument("--names", nargs="+", choices=MOLECULE_ENCODERS, help="which encoders",
                        default=["fingerprint", "descriptors", "graph", "smiles", "identity"])
    parser.add_argument("--molecule_table", default="", help="of the encoder table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the training runs")
    parser.add_argument("--train_steps", type=int, default=2000, help="of each encoder's model")
    parser.add_argument("--molecules", type=int, default=24, help="of each kind")
    parser.add_argument("--series", type=int, default=6, help="images for each molecule and dose")


def vae_options(parser):
    parser.add_argument("--configs", nargs="+", default=None, help='changes to the default '
                        'autoencoder, such as "latent_channels=8 kl_weight=1e-3" (ten by default)')
    parser.add_argument("--train_steps", type=int, default=1500, help="of each autoencoder")
    parser.add_argument("--ldm_steps", type=int, default=1000, help="of the diffusion model on "
                        "each (0: none)")
    parser.add_argument("--images", type=int, default=384, help="held-out images")
    parser.add_argument("--steps", type=int, default=15, help="DDIM steps")
    parser.add_argument("--out", default="runs/latent_spaces", help="folder for all of it")


def main():
    parser = data.Parser(description=__doc__,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    q = command(commands, "quality", "are held-out conditions drawn as they look?")
    d = command(commands, "disentangle", "how much of the image is biology, how much experiment, "
                "beside the truth?")
    c = command(commands, "conditions", "is every field used? with --encoders: which molecule "
                "encoder generalises? (trains them)")
    n = command(commands, "control", "does a ControlNet draw these very cells?")
    v = command(commands, "vae", "which latent space? trains autoencoders of several shapes, "
                "weights and losses, and a diffusion model on each")
    for sub in (q, d, c, n, v):
        common_options(sub)
    real_plate_options(q, "+"), real_plate_options(d, 2)
    n.add_argument("--by", nargs="+", default=None, help="negcon: tables by these columns as well "
                   "as by plate, such as compound")
    n.add_argument("--out", default=None, help="folder for JSON and figures (the checkpoint's)")
    n.add_argument("--images", type=int, default=128, help="held-out images, or for each plate")
    n.add_argument("--samples", type=int, default=8, help="of which the mean is shown as well")
    n.add_argument("--steps", type=int, default=STEPS, help="DDIM steps")
    n.add_argument("--nucleus_radius", type=float, default=NUCLEUS_RADIUS, help="pixels")
    q.add_argument("--out", default=None, help="folder for JSON and figure (the checkpoint's)")
    q.add_argument("--images", type=int, default=192, help="generated for each held-out set")
    q.add_argument("--sets", nargs="+", default=None, help="values of the column split (val, "
                   "test_pair, test_substituent, test_scaffold; with --mol2image easy and hard)")
    q.add_argument("--mol2image", action="store_true", help="Mol2Image's benchmark")
    q.add_argument("--generated", default=None, help="with --mol2image: a manifest of images that "
                   "another system made for the same plates, wells and sites")
    q.add_argument("--pixel_model", default=None, help="with --mol2image: the same U-Net "
                   "trained on pixels, for a row of its own")
    q.add_argument("--per_molecule", type=int, default=4, help="with --mol2image: images, at most")
    q.add_argument("--train_steps", type=int, default=1000, help="with --mol2image: of the network "
                   "that tells whether molecule and image match")
    q.add_argument("--steps", type=int, default=STEPS, help="DDIM steps")
    disentangle_options(d), conditions_options(c), vae_options(v)
    parser.epilog = "".join(sub.format_help() for sub in (q, d, c, n, v))
    args = parser.parse_args()
    for name in ("images", "steps", "samples", "molecules", "series", "train_steps"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name} must be at least 1")
    args.guidance = parse_guidance(args.guidance)
    low, high = getattr(args, "interval", (0, 1))
    if not 0 <= low <= high <= 1 or not 0 <= getattr(args, "rescale", 0) <= 1:
        raise UserError("--interval takes two noise levels from 0 to 1, the smaller first, "
                        "--rescale a share from 0 to 1")
    {"quality": quality, "disentangle": disentangle, "conditions": conditions,
     "control": control, "vae": compare_latent_spaces}[args.command](args)


if __name__ == "__main__":
    run(main)
