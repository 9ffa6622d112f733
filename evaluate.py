"""Questions put to a trained model, one sub-command each; every answer stands beside its floor and
its ceiling, and is written as JSON and as a figure.

    python evaluate.py quality                   # are held-out conditions drawn as they look?
    python evaluate.py quality --checkpoint runs/plates/model.pt --by compound plate
"""
import argparse
import hashlib
import inspect
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import train_ldm
import train_vae
from conditioning import MOLECULE_ENCODERS, blank_unseen, check_values, parse_number
from diffusion import FORMS
from sample import STEPS, Model
from train_ldm import cached_views
from train_vae import (UserError, autocast, device, learning_rate, load_checkpoint, open_data,
                       reconstruct, run, save_checkpoint, step_rng, views, write_log)

NUCLEUS_RADIUS = 4.5  # pixels; what the segmentation looks for


# ------------------------------------------------------------------------------------------------
# 1. Morphological features, in torch, in batches
# ------------------------------------------------------------------------------------------------

def gaussian_blur(x, sigma):
    """Separable Gaussian blur of (B, C, H, W), mirrored borders."""
    radius = max(1, round(3 * sigma))
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


def segment_nuclei(dna, radius=NUCLEUS_RADIUS, contrast=.06):
    """Nuclei of (B, H, W) in [0, 1]: labels (B, H, W), 0 for background, 1 .. n in each image.

    Mask by Otsu (empty where the two classes differ by less than `contrast`), seeds at the local
    maxima of the blurred stain, labels spread from the seeds by repeated 3x3 max-pooling, and
    whole objects smaller than a sixth of a nucleus removed.
    """
    smoothed = gaussian_blur(dna[:, None], 1.)[:, 0]
    cut = otsu(smoothed)[:, None, None]
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
    """Objects per image (B,). One that the border cuts counts half: as often as not its centre
    lies outside."""
    area = per_object(labels, torch.ones_like(labels))
    cut = touches(labels, "top", "bottom", "left", "right")
    return ((area > 0) * (1 - .5 * cut))[:, 1:].sum(1)


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
        images = np.stack([f["image"] for f in data.draw_fields(rows, screen, counterpart=False)])
        images = torch.from_numpy(data.scale_intensity(images, model.intensity))
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
        check_values(field, manifest.columns[field.name])
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
            "generated": model.generate(columns, range(len(rows_a)), request.guidance,
                                        request.form, request.steps)}
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


def probe_scores(probe, images, manifest, rows):
    """Share of images that the probe names right; the mechanism at doses above half effect."""
    network, answers = probe
    said = answer(network, images)
    effect = np.array([float(v) for v in manifest.rows(rows, "true_effect")])
    scores = {}
    for question, options in answers.items():
        right = np.array([options[k] for k in said[question]]) == manifest.rows(rows, question)
        scores[question] = float(right[effect >= .5].mean() if question == "true_mechanism"
                                 else right.mean())
    return scores


def quality(args):
    """The table of `evaluate.py quality`."""
    opened = open_model(args)
    model, manifest = opened.model, opened.manifest
    out = Path(args.out or Path(args.checkpoint).parent)
    out.mkdir(parents=True, exist_ok=True)
    if args.by:
        return quality_by_cell(opened, args, out)
    if "true_mechanism" not in manifest.columns:
        raise data.DataError(f"{manifest.path} is not simulated: say with --by which columns make "
                             "a condition, such as --by compound plate")
    limit, sets = 96 if args.quick else args.images, heldout_sets(opened, args.sets)
    probe = screen_probe(manifest.path.parent, model)
    cells = cells_of(manifest, ["true_mechanism", "batch"])
    some = np.random.default_rng(0).permutation(opened.train)[:1000]
    standardise = Standardise(features(real_images(opened, some), model.channels))
    request = SimpleNamespace(guidance=args.guidance, form=args.form, steps=args.steps)
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
              "form": args.form, "steps": args.steps, "table": table}
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


def one_cell(opened, args, cell, request, inside, training, n):
    """One condition cell: (entry of the table, real images, generated images)."""
    model, rng = opened.model, np.random.default_rng(1)
    fake = model.generate({name: [value] * n for name, value in request.items()}, range(n),
                          args.guidance, args.form, args.steps)
    entry = {"cell": cell, "in_training": bool(np.isin(inside, opened.train).any()),
             "generated": summarise(fake, model.channels, args.nucleus_radius),
             "nearest_training_view": float(nearest_distance(fake, training).median())}
    label = np.array([opened.manifest.columns[args.also][i] if args.also else "" for i in inside])
    real = []
    for value in np.unique(label):
        images = real_images(opened, rng.choice(inside[label == value], 4 * n), rng)
        entry[f"real {value}".strip()] = summarise(images, model.channels, args.nucleus_radius)
        real += list(images[:6].numpy())
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

def omega_squared(y, blocked=True):
    """Share of variance explained in a balanced factorial, without the upward bias of eta squared.

    y: (biology, experiment, seeds, F). blocked: seed s stands for the same cells (or the same
    noise) in every place of the factorial, so that its own variance is no error. Returns
    {"biology", "experiment", "interaction": (F,)}, from (Olejnik & Algina 2003, Psychol. Methods 8)

        omega^2 = (SS_effect - df_effect MS_error) / (SS_total + MS_error)
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
    error = total - sum(s for s, _ in squares.values())
    df = b * e * (n - 1)
    if blocked:
        error = error - b * e * (y.mean((0, 1)) - mean).square().sum(0)
        df -= n - 1
    error = error / df
    return {name: ((s - d * error) / (total + error).clamp(min=1e-12)).float()
            for name, (s, d) in squares.items()}


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


def effect_size(y, truth):
    """How large the effects of biology are, as a share of the true ones: the projection of each
    level's mean feature change from level 0 (the negative control) on the true change, (b, e, n, F)
    each. 1 is right, above it is exaggeration."""
    found, true = ((x.mean((1, 2)) - x.mean((1, 2))[:1])[1:] for x in (y, truth))   # (b - 1, F)
    return ((found * true).sum() / (true * true).sum()).item()


class SimulatedFactorial:
    """Every mechanism (and the untreated cells) in every batch, the same cells in each: what the
    simulator would photograph, and what a model is asked for.

    Seed s stands for one well (position, plate), one molecule of each mechanism and one dose above
    half effect. Of the seen molecules, so that only the *pair* may be new.
    """
    blocked = True

    def __init__(self, opened, seeds):
        folder = opened.manifest.path.parent
        screen = data.Screen(**json.loads((folder / "simulation.json").read_text()))
        self.screen, self.opened = replace(screen, draw=2000), opened
        self.biology = ["none", *data.MECHANISMS]
        self.experiment = [f"B{b + 1}" for b in range(screen.batches)]
        self.seeds = seeds
        self.unseen = {kind: {(m, f"B{b + 1}") for m, b in data.heldout_pairs(screen.batches, kind)
                              .items()} for kind in ("val", "test")}

    def rows(self, first=0):
        """Rows of the factorial as data.layout writes them, in the order (biology, experiment,
        seed). Another `first` seed: other cells."""
        molecules = {m: [x for x in data.molecules() if x["mechanism"] == m and x["kind"] == "train"
                         and x["ec50"] < max(data.DOSES)] for m in self.biology}
        rows = []
        for m, batch in itertools.product(self.biology, self.experiment):
            for s in range(first, first + self.seeds):
                rng = np.random.default_rng([self.screen.seed, 5, s])
                place, plate = rng.integers(2, 23), rng.integers(self.screen.plates_per_batch)
                row, picks = rng.integers(2, 15), rng.random(2)
                molecule = (molecules[m][int(picks[0] * len(molecules[m]))] if molecules[m] else
                            dict(smiles=data.DMSO, ec50=np.inf))
                doses = [d for d in data.DOSES if d >= molecule["ec50"]]
                dose = doses[int(picks[1] * len(doses))] if doses else 0.
                plate = self.experiment.index(batch) * self.screen.plates_per_batch + plate + 1
                rows.append(dict(
                    smiles=molecule["smiles"], dose=dose, batch=batch, plate=f"P{plate:02d}",
                    row=int(row), column=int(place), site=int(rng.integers(1, 5)), cells=s,
                    true_mechanism=m, true_effect=data.hill(dose, molecule["ec50"])))
        return rows

    def truth(self, first):
        """Fresh fields of view from the simulator, (biology * experiment * seeds, C, H, W)."""
        fields = data.draw_fields(self.rows(first), self.screen, counterpart=False)
        return torch.from_numpy(data.scale_intensity(np.stack([f["image"] for f in fields]),
                                                     self.opened.model.intensity))

    def requests(self):
        return {f.name: [str(r[f.name]) for r in self.rows()] for f in self.opened.model.fields}

    def held(self, kind):
        """Which places (biology, experiment) of the factorial are held-out pairs of this kind."""
        return torch.tensor([[(m, b) in self.unseen[kind] for b in self.experiment]
                             for m in self.biology])


class RealFactorial:
    """Two columns of a manifest, crossed: complete cells only, real crops for the truth."""
    blocked = False

    def __init__(self, opened, by, seeds):
        self.opened, self.seeds, cells = opened, seeds, cells_of(opened.manifest, by)
        self.rows_of = {name: np.flatnonzero(cells == name) for name in set(cells)}
        first, second = (sorted(set(opened.manifest.columns[name])) for name in by)
        self.experiment = [e for e in second
                           if sum(f"{b} x {e}" in self.rows_of for b in first) > 1]
        self.biology = [b for b in first
                        if all(f"{b} x {e}" in self.rows_of for e in self.experiment)]
        # the negative control first: the level that most images have
        self.biology.sort(key=lambda b: -sum(len(self.rows_of[f"{b} x {e}"])
                                             for e in self.experiment))
        if len(self.biology) < 2 or len(self.experiment) < 2:
            raise UserError(f"--by {' '.join(by)}: no two values of the one were both imaged with "
                            "two of the other")
        table = crossed_requests(opened, by)
        self.asked = [table[f"{b} x {e}"] for b in self.biology for e in self.experiment]

    def truth(self, first):
        rng = np.random.default_rng(first)
        return torch.cat([real_images(self.opened, rng.choice(
            self.rows_of[f"{b} x {e}"], self.seeds), rng)
            for b in self.biology for e in self.experiment])

    def requests(self):
        return {name: [r[name] for r in self.asked for _ in range(self.seeds)]
                for name in self.asked[0]}

    def held(self, kind):
        trained = set(self.opened.train)
        return torch.tensor([[kind == "test" and not trained & set(self.rows_of[f"{b} x {e}"])
                              for e in self.experiment] for b in self.biology])


def generate_places(model, factorial, request, where=None):
    """Images (places * seeds, C, H, W) of the places of a factorial (b, e) that `where` says, all
    by default. Seed s is the same noise in each. A model that is told no batch is asked the same
    in many places: each distinct pair of request and seed is drawn once."""
    b, e, n = len(factorial.biology), len(factorial.experiment), factorial.seeds
    where = torch.ones(b, e, dtype=torch.bool) if where is None else where
    kept = where.flatten().repeat_interleave(n).nonzero()[:, 0].tolist()
    names, requests = [field.name for field in model.fields], factorial.requests()
    columns = blank_unseen(model.fields, {k: [v[i] for i in kept] for k, v in requests.items()
                                          if k in names})
    seeds = [i % n for i in kept]
    keys = list(zip(seeds, *columns.values()))
    place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    first = [keys.index(key) for key in place]
    with autocast():
        images = model.generate({k: [v[i] for i in first] for k, v in columns.items()},
                                [seeds[i] for i in first], request.guidance, request.form,
                                request.steps, interval=request.interval, rescale=request.rescale)
    return images[[place[key] for key in keys]]


class Truth:
    """What a factorial really looks like: two sets of features on disjoint cells, and what follows
    from them. Drawn once, and compared with many models."""

    def __init__(self, factorial, probe, more=4):
        opened, self.factorial, self.probe = factorial.opened, factorial, probe
        some = np.random.default_rng(0).permutation(opened.train)[:1000]
        channels = opened.model.channels
        self.standardise = Standardise(features(real_images(opened, some), channels))
        self.images = factorial.truth(10_000)
        self.a = self.shape(features(self.images, channels))
        # several times as many on the other side: the distance to them is less noisy
        self.b = torch.cat([self.shape(features(factorial.truth((k + 2) * 10_000), channels))
                            for k in range(more)], 2)
        self.omega = omega_squared(self.a, factorial.blocked)
        self.scores = probe_answers(probe, self.images, factorial)

    def shape(self, found):
        """(N, F) features to the standardised (biology, experiment, seeds, F)."""
        f = self.factorial
        return self.standardise(found).view(len(f.biology), len(f.experiment), f.seeds, -1)

    def distance(self, y, where):
        """Kernel distance of y (b, e, n, F) to the truth, per place and averaged over `where`."""
        return float(np.mean([kernel_distance(y[i, j], self.b[i, j])
                              for i, j in where.nonzero().tolist()] or [np.nan]))

    def ceiling(self, where):
        """The true images of one place against those of places that differ in both."""
        b, e, n, _ = self.a.shape
        return float(np.mean([kernel_distance(self.a[k, m], self.b[i, j, :2 * n])
                              for i, j in where.nonzero().tolist()
                              for k in range(b) for m in range(e) if k != i and m != j] or [np.nan]))


def probe_answers(probe, images, factorial):
    """Share named right over the factorial: {"probe_mechanism", "probe_batch"}, (N,) hits each."""
    if probe is None:
        return {}
    network, answers = probe
    said = answer(network, images)
    rows = factorial.rows()
    return {f"probe_{short}": torch.tensor([answers[q][k] == r[q] for k, r in zip(said[q], rows)])
            .float().view(len(factorial.biology), len(factorial.experiment), -1)
            for short, q in (("mechanism", "true_mechanism"), ("batch", "batch"))}


def over_seeds(statistic, seeds, repeats=100):
    """5 to 95 % of statistic(indices) over random halves of the seeds: a half drawn without
    replacement varies about the whole as the whole varies about the population."""
    rng = np.random.default_rng(0)
    values = [statistic(torch.from_numpy(np.sort(rng.permutation(seeds)[:max(2, seeds // 2)])))
              for _ in range(repeats)]
    return around(statistic(torch.arange(seeds)), values)


def disentangle_one(model, truth, request):
    """The figures of one model under one guidance, as one line of results.jsonl; and images."""
    f = truth.factorial
    images = generate_places(model, f, request)
    y = truth.shape(features(images, model.channels))
    found, held = omega_squared(y), {k: f.held(k) for k in ("val", "test")}
    seen = ~(held["val"] | held["test"])
    weights = model.weights(request.guidance)
    entry = {"form": request.form, "w_biology": weights.get("biology", 0.),
             "w_experiment": weights.get("experiment", 0.), "step": model.content["step"],
             "interval": list(request.interval), "rescale": request.rescale,
             "images": len(images)}
    entry |= leaks(found, truth.omega)
    for name in ("leak_e_to_b", "leak_b_to_e"):
        entry[f"{name}_interval"] = over_seeds(
            lambda s: leaks(omega_squared(y[:, :, s]), truth.omega)[name], f.seeds)
    entry["effect_biology"] = effect_size(y, truth.a)
    entry["effect_experiment"] = effect_size(y.transpose(0, 1), truth.a.transpose(0, 1))
    for name, hits in probe_answers(truth.probe, images, f).items():
        entry[name] = hits.mean().item()
        entry[f"{name}_heldout"] = hits[held["test"]].mean().item()
        entry[f"{name}_interval"] = over_seeds(lambda s: hits[:, :, s].mean().item(), f.seeds)
        entry[f"{name}_real"] = truth.scores[name].mean().item()
    for name, where in (("seen", seen), ("val", held["val"]), ("heldout", held["test"])):
        entry[f"distance_{name}"] = truth.distance(y, where)
    where = held["test"] if held["test"].any() else seen
    entry["distance_heldout_interval"] = over_seeds(
        lambda s: truth.distance(y[:, :, s], where), f.seeds)
    entry["floor"], entry["ceiling"] = truth.distance(truth.a, where), truth.ceiling(where)
    entry["omega"] = {k: v.tolist() for k, v in found.items()}
    return entry, images


# --- studies: many such lines, kept in results.jsonl so that a restart skips what is done ---------

WEIGHTS_TRIED = [(1, 1), (1.5, 1), (1.5, 1.5), (2, 1), (2, 1.5), (2, 2), (3, 1.5), (3, 2), (4, 2)]
FORMS_TRIED = [dict(form=form) for form in FORMS] + [
    dict(form="nested", interval=(.2, .8)), dict(form="contrast", interval=(.2, .8)),
    dict(form="nested", rescale=.7), dict(form="contrast", rescale=.7)]
TABLE = ("leak_e_to_b", "leak_b_to_e", "effect_biology", "effect_experiment", "probe_mechanism",
         "probe_batch", "distance_seen", "distance_heldout")


class Results:
    """results.jsonl: one line per finished measurement, named by what it is a measurement of."""

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done = {json.dumps(e["key"]): e for e in map(json.loads, lines)}

    def get(self, key, measure):
        """The line of this key (a list), measured if it is not there yet."""
        name = json.dumps(key)
        if name not in self.done:
            self.done[name] = {"key": json.loads(name)} | measure()
            write_log(self.path, **self.done[name])
        return self.done[name]


def with_weights(args, biology, experiment, **changes):
    """A request (see disentangle_one) at these weights."""
    return SimpleNamespace(**dict(form=args.form, interval=tuple(args.interval),
                                  rescale=args.rescale, steps=args.steps) | changes,
                           guidance={"biology": biology, "experiment": experiment})


def limited(request, model):
    """The request without the weights of groups that a model does not have."""
    kept = {g: w for g, w in request.guidance.items() if g in model.groups}
    return SimpleNamespace(**vars(request) | {"guidance": kept})


def print_lines(lines, label):
    """A table: one line per measurement, leaks and probes as they are, distances x 1000."""
    print(f"{'':34s}" + "".join(f"{name.replace('probe_', '').replace('distance_', 'd. '):>19s}"
                                for name in TABLE))
    for line in lines:
        values = [line.get(name, np.nan) * (1000 if "distance" in name else 1) for name in TABLE]
        print(f"{label(line):34s}" + "".join(
            f"{v:19.0f}" if "distance" in name else f"{v:19.3f}" for name, v in zip(TABLE, values)))
    line = lines[0]
    print(f"{'the truth itself':34s}{0:19.3f}{0:19.3f}{1:19.3f}{1:19.3f}"
          f"{line.get('probe_mechanism_real', np.nan):19.3f}"
          f"{line.get('probe_batch_real', np.nan):19.3f}{'floor, ceiling':>19s}"
          f"{1000 * line['floor']:9.0f},{1000 * line['ceiling']:9.0f}")


def study_model(opened, truth, results, args):
    """One checkpoint at one guidance: the table by feature, and the figure."""
    model = opened.model
    weights = model.weights(args.guidance)
    request = with_weights(args, 0, 0, guidance=weights)
    entry, images = disentangle_one(model, truth, request)
    results.get(["model", args.checkpoint, model.content["step"], weights, args.form,
                 args.interval, args.rescale, len(images)], lambda: entry)
    names = feature_names(model.channels)
    print(f"\n{'share of variance (omega^2)':28s}{'biology':>20s}{'experiment':>20s}"
          f"{'interaction':>20s}\n{'':28s}" + f"{'truth':>10s}{'generated':>10s}" * 3)
    for k, name in enumerate(names):
        print(f"{name:28s}" + "".join(f"{truth.omega[part][k]:10.2f}{entry['omega'][part][k]:10.2f}"
                                      for part in truth.omega))
    return [entry], lambda e: f"weights {e['w_biology']:g}, {e['w_experiment']:g}"


def study_weights(opened, truth, results, args):
    """The same model at several guidance weights."""
    def measured(b, e):
        request = limited(with_weights(args, b, e), opened.model)
        return disentangle_one(opened.model, truth, request)[0]
    lines = [results.get(["weights", args.checkpoint, args.form, b, e, args.images],
                         lambda: measured(b, e)) for b, e in WEIGHTS_TRIED]
    return lines, lambda e: f"weights {e['w_biology']:g}, {e['w_experiment']:g}"


def study_forms(opened, truth, results, args):
    """The four forms of guidance, with an interval and with rescaling."""
    weights = opened.model.weights(args.guidance)

    def measured(changes):
        request = with_weights(args, 0, 0, guidance=weights, **changes)
        return disentangle_one(opened.model, truth, request)[0]
    lines = [results.get(["forms", args.checkpoint, changes, weights, args.images],
                         lambda: measured(changes)) for changes in FORMS_TRIED]
    return lines, lambda e: e["form"] + (f", {e['interval'][0]:g} to {e['interval'][1]:g}"
                                         if e["interval"] != [0, 1] else "") + \
        (f", rescaled {e['rescale']:g}" if e["rescale"] else "")


def study_training(opened, truth, results, args):
    """Checkpoints along the run (train_ldm.py --keep): are new combinations found early?"""
    files = sorted(Path(args.checkpoint).parent.glob("step-*.pt"),
                   key=lambda p: int(p.stem.split("-")[1]))
    if not files:
        raise UserError(f"no step-*.pt beside {args.checkpoint}: train with --keep")

    def measured(file):
        model = Model.load(file)
        return disentangle_one(model, truth, with_weights(args, 0, 0, guidance=model.weights(
            args.guidance)))[0]
    lines = [results.get(["training", str(file), opened.model.weights(args.guidance), args.images],
                         lambda: measured(file)) for file in files]
    return lines, lambda e: f"step {e['step']}"


# --- the comparison: told the perturbation, the experiment, or both -------------------------------

ARMS = {"perturbations": dict(experiment=()), "experiment": dict(biology=()), "both": {}}
RUNS = [(0., 0), (.5, 0), (.9, 0), (.9, 1), (.9, 2)]     # confounding and seed
TRIED = {"both": [(1, 1), (1.5, 1), (1.5, 1.5), (2, 1.5), (2, 2)],
         "perturbations": [(1, 0), (1.5, 0), (2, 0), (3, 0)],
         "experiment": [(0, 1), (0, 1.5), (0, 2), (0, 3)]}


def screen_of(confounding):
    """The manifest of the default screen at another confounding, drawn if it is missing."""
    path = Path(train_ldm.Config.data if confounding == data.Screen.confounding
                else f"runs/data-{confounding:g}/manifest.csv")
    if not path.exists():
        print(f"drawing a screen with confounding {confounding:g}")
        data.simulate(path.parent, data.Screen(confounding=confounding))
    return path


def train_arm(args, arm, confounding, seed):
    """The checkpoint of one arm, trained if it is missing, on the one shared autoencoder. It never
    saw a held-out pair: these are the same at any confounding."""
    out = Path(args.out) / f"{arm}-{confounding:g}-{seed}"
    config = train_ldm.Config(data=str(screen_of(confounding)), vae=str(Path(args.vae).resolve()),
                              out=str(out), seed=seed, steps=args.train_steps, **ARMS[arm])
    if (out / "model.pt").exists():
        config.resume = load_checkpoint(out / "model.pt", "ldm", "")["step"] < config.steps
    return train_ldm.train(config)


def best_guidance(model, truth, args, arm):
    """The weights whose images of the validation pairs lie nearest to the truth."""
    where, distances = truth.factorial.held("val"), {}
    for b, e in TRIED[arm]:
        images = generate_places(model, truth.factorial, limited(with_weights(args, b, e), model),
                                 where)
        y = truth.standardise(features(images, model.channels))
        y = y.view(-1, truth.factorial.seeds, y.shape[1])
        distances[b, e] = float(np.mean([kernel_distance(y[k], truth.b[i, j]) for k, (i, j) in
                                         enumerate(where.nonzero().tolist())]))
    return min(distances, key=distances.get), [[*w, d] for w, d in distances.items()]


def study_arms(args, results):
    """Three arms, each at its own best guidance, at several confoundings."""
    lines = []
    for confounding, seed in RUNS if args.confounding is None else \
            [(c, s) for c in args.confounding for s in args.seeds]:
        truth = None
        for arm in args.arms:
            key = ["arms", arm, confounding, seed, args.train_steps, args.images, args.steps]

            def measured():
                nonlocal truth
                here = SimpleNamespace(**vars(args) | {
                    "checkpoint": str(train_arm(args, arm, confounding, seed)), "guidance": {},
                    "data": None})
                opened = open_model(here)
                if truth is None:
                    truth = simulated_truth(opened, args)
                model = opened.model
                (b, e), tried = best_guidance(model, truth, args, arm)
                entry, _ = disentangle_one(model, truth, limited(with_weights(args, b, e), model))
                return {"arm": arm, "confounding": confounding, "seed": seed,
                        "tried": tried} | entry
            lines.append(results.get(key, measured))
            print_lines(lines[-1:], arm_label)
    return lines, arm_label


def arm_label(e):
    return f"{e['arm']}, {e['confounding']:g}, {e['seed']} ({e['w_biology']:g}, " \
           f"{e['w_experiment']:g})"


def simulated_truth(opened, args):
    factorial = SimulatedFactorial(opened, max(4, args.images // 54))
    return Truth(factorial, screen_probe(opened.manifest.path.parent, opened.model))


# --- the shortcut: does a classifier profit from images drawn without confounding? ----------------

def standardise_on_controls(images, batch, control):
    """Each channel of each batch to the mean and deviation that its negative controls have over
    all batches: images (N, C, H, W), batch (N,) of names, control (N,) bool."""
    out, all_controls = images.clone(), images[control]
    mean, std = all_controls.mean((0, 2, 3)), all_controls.std((0, 2, 3))
    for name in np.unique(batch):
        inside = torch.from_numpy(batch == name)
        ours = images[inside & control]
        scale = (std / ours.std((0, 2, 3)).clamp(min=1e-3))[:, None, None]
        out[inside] = ((images[inside] - ours.mean((0, 2, 3))[:, None, None]) * scale
                       + mean[:, None, None])
    return out


def balancing(mechanism, batch):
    """Weights (N,) under which mechanism and batch are independent: p(m) p(b) / p(m, b)."""
    pairs = np.array([f"{m}/{b}" for m, b in zip(mechanism, batch)])

    def share(values):
        names, place, count = np.unique(values, return_inverse=True, return_counts=True)
        return count[place] / len(values)
    weight = share(mechanism) * share(batch) / share(pairs)
    return weight / weight.sum()


def screen_images(opened, rows, screen):
    """Fresh fields of view for rows of data.layout: images, mechanism, batch, control."""
    images = np.stack([f["image"] for f in data.draw_fields(rows, screen, counterpart=False)])
    images = torch.from_numpy(data.scale_intensity(images, opened.model.intensity))
    return SimpleNamespace(images=images, mechanism=np.array([r["true_mechanism"] for r in rows]),
                           batch=np.array([r["batch"] for r in rows]))


def study_shortcut(args, results):
    """A mechanism classifier trained on a confounded screen, on generated images in which
    mechanism and batch are independent, on both, with plain remedies, and on an unconfounded
    screen; all with the same number of images and steps, tested on unconfounded images."""
    confounding, n = .9, args.classifier_images
    checkpoint = train_arm(args, "both", confounding, 0)
    opened = open_model(SimpleNamespace(**vars(args) | {"checkpoint": str(checkpoint),
                                                        "guidance": {}, "data": None}))
    screen = data.Screen(**json.loads((opened.manifest.path.parent / "simulation.json")
                                      .read_text()))
    train = set(opened.train)
    strong = [r for i, r in enumerate(data.layout(screen)) if i in train
              and (r["role"] == "control" or r["true_effect"] >= .5)]
    answers = ["none", *data.MECHANISMS]

    def fresh(draw, count):
        other = replace(screen, confounding=0., draw=draw)
        rows = [r for r in data.layout(other) if r["split"] not in ("test_substituent",
                "test_scaffold") and (r["role"] == "control" or r["true_effect"] >= .5)]
        order = np.random.default_rng(draw).permutation(len(rows))[:count]
        return screen_images(opened, [rows[i] for i in order], other)

    def measured(seed):
        rng = np.random.default_rng([7, seed])
        confounded = screen_images(opened, [strong[i] for i in rng.permutation(len(strong))[:n]],
                                   replace(screen, draw=screen.draw))
        factorial = SimulatedFactorial(opened, -(-n // 54))
        rows = factorial.rows(first=1000 * (seed + 1))
        request = with_weights(args, *args.shortcut_weights)
        columns = {f.name: [str(r[f.name]) for r in rows] for f in opened.model.fields}
        with autocast():
            images = opened.model.generate(
                columns, range(10_000 * seed, 10_000 * seed + len(rows)), request.guidance,
                request.form, request.steps)
        keep = rng.permutation(len(rows))[:n]
        made = SimpleNamespace(images=images[torch.from_numpy(keep)], batch=np.array(
            [rows[i]["batch"] for i in keep]), mechanism=np.array(
            [rows[i]["true_mechanism"] for i in keep]))
        both = SimpleNamespace(**{k: (torch.cat if k == "images" else np.concatenate)(
            [getattr(confounded, k)[:n // 2], getattr(made, k)[:n // 2]])
            for k in ("images", "mechanism", "batch")})
        test, ceiling = fresh(4000, 1200), fresh(5000 + seed, n)

        def score(training, test_images, weights=None):
            labels = {"mechanism": torch.tensor([answers.index(m) for m in training.mechanism])}
            probe = train_probe(training.images, {"mechanism": answers}, labels,
                                args.classifier_steps, seed, weights=weights)
            said = answer(probe, test_images)["mechanism"]
            return float(np.mean([answers[k] == m for k, m in zip(said, test.mechanism)]))

        flat = SimpleNamespace(**vars(confounded) | {"images": standardise_on_controls(
            confounded.images, confounded.batch, torch.from_numpy(confounded.mechanism == "none"))})
        scores = {"confounded": score(confounded, test.images),
                  "generated": score(made, test.images), "both together": score(both, test.images),
                  "standardised on controls": score(flat, standardise_on_controls(
                      test.images, test.batch, torch.from_numpy(test.mechanism == "none"))),
                  "reweighted": score(confounded, test.images, balancing(
                      confounded.mechanism, confounded.batch)),
                  "unconfounded": score(ceiling, test.images)}
        gap = scores["unconfounded"] - scores["confounded"]
        return {"seed": seed, "confounding": confounding, "scores": scores,
                "closed": {k: (v - scores["confounded"]) / gap for k, v in scores.items()}}

    lines = [results.get(["shortcut", seed, n, args.classifier_steps, args.train_steps,
                          args.shortcut_weights], lambda: measured(seed)) for seed in args.seeds]
    print(f"\n{'mechanism classifier trained on':34s}{'accuracy':>12s}{'gap closed':>24s}")
    for name in lines[0]["scores"]:
        accuracy, closed = ([line[k][name] for line in lines] for k in ("scores", "closed"))
        print(f"{name:34s}{np.mean(accuracy):12.3f}{np.mean(closed):12.2f} "
              f"({min(closed):.2f} to {max(closed):.2f})")
    return lines


# --- transfer: the same cells in another batch, or treated ----------------------------------------

def study_transfer(opened, truth, results, args):
    """Real images edited (sample.py --edit) to another batch, and controls to each mechanism,
    against the true image of the same cells there. Everything is compared after the autoencoder.

    moved: how far the features of the side that was changed moved along their true change (1 is
    right); drift: how far the features of the other side moved, in deviations of the training set.
    """
    f, model = truth.factorial, opened.model
    b, e, n = len(f.biology), len(f.experiment), f.seeds
    rows = np.array(f.rows(10_000), object).reshape(b, e, n)
    place = np.arange(b * e * n).reshape(b, e, n)
    tasks = {"another batch": (place[:, :, 0].ravel(), np.roll(place, -1, 1)[:, :, 0].ravel()),
             "treated": (np.repeat(place[:1, :, 0], b - 1, 0).ravel(), place[1:, :, 0].ravel())}
    biological = truth.omega["biology"] > truth.omega["experiment"]
    lines = []
    for name, (start, goal) in tasks.items():
        side = biological if name == "treated" else ~biological

        def measured():
            columns = [{field.name: [str(rows.flat[i][field.name]) for i in where]
                        for field in model.fields} for where in (start, goal)]
            edited = torch.cat([model.edit(
                truth.images[start[i:i + 64]], *({k: v[i:i + 64] for k, v in c.items()}
                                                 for c in columns), args.guidance, args.form,
                args.edit_steps) for i in range(0, len(start), 64)])
            before, true = (reconstruct(model.vae, truth.images[i])[0] for i in (start, goal))
            y = [truth.standardise(features(x, model.channels)) for x in (before, edited, true)]
            change, wanted = y[1] - y[0], y[2] - y[0]
            return {"task": name, "images": len(start), "l1_before": mean_l1(before, true),
                    "l1_after": mean_l1(edited, true),
                    "moved": ((change * wanted)[:, side].sum()
                              / wanted[:, side].square().sum()).item(),
                    "drift": change[:, ~side].square().mean().sqrt().item(),
                    "true_drift": wanted[:, ~side].square().mean().sqrt().item()}
        lines.append(results.get(["transfer", args.checkpoint, model.content["step"], name,
                                  args.guidance, args.form, args.edit_steps], measured))
    print(f"\n{'edited to':16s}{'L1 to the truth: before':>26s}{'after':>8s}{'moved':>8s}"
          f"{'drift':>8s}{'(true)':>8s}")
    for line in lines:
        print(f"{line['task']:16s}{line['l1_before']:26.4f}{line['l1_after']:8.4f}"
              f"{line['moved']:8.2f}{line['drift']:8.2f}{line['true_drift']:8.2f}")
    return lines


def mean_l1(a, b):
    """Mean absolute difference on [0, 1] of images in [-1, 1]."""
    return (a - b).abs().mean().item() / 2


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
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        data.write_manifest(path, rows)
    return str(path)


def study_pairs(opened, args, results):
    """One (treatment, plate) pair left out of training in turn, all else as --checkpoint was
    trained, on one autoencoder that saw none of these pairs: nuclei, intensities, and what a
    treatment probe trained on the other plates reads, generated beside the left-out real images.
    """
    model, out, n = opened.model, Path(args.out), max(16, args.images // 8)
    factorial, cells = RealFactorial(opened, args.by, 4), cells_of(opened.manifest, args.by)
    treatments = factorial.biology
    pairs = [(treatments[1 + k % (len(treatments) - 1)], plate)
             for k, plate in enumerate(factorial.experiment)]
    of_plate = np.array(opened.manifest.columns[args.by[1]])
    left_out = {f"{t} x {plate}" for t, plate in pairs}
    vae = train_vae.Config(**model.content["vae"]["settings"] | {
        "data": write_split(opened, out / "split-vae.csv", left_out, cells), "split": "auto",
        "out": str(out / "pairs-vae"), "overwrite": False})
    lines = []
    for treatment, plate in pairs:
        cell = f"{treatment} x {plate}"

        def measured():
            if not Path(vae.out, "model.pt").exists():
                train_vae.train(vae)
            config = train_ldm.Config(**model.content["settings"] | {
                "data": write_split(opened, out / f"split-{plate}.csv", {cell}, cells),
                "vae": f"{vae.out}/model.pt", "out": str(out / f"pairs-{plate}"),
                "resume": False, "overwrite": False})
            trained = Model.load(train_ldm.train(config))
            here, rng = SimpleNamespace(**vars(opened) | {"model": trained}), \
                np.random.default_rng(0)
            known = np.flatnonzero((of_plate != plate) & np.isin(
                cells, [f"{t} x {p}" for t in treatments for p in factorial.experiment]))
            labels = [treatments.index(cells[i].split(" x ")[0]) for i in known]
            images = [real_images(here, known, rng) for _ in range(12)]
            probe = train_probe(torch.cat(images), {"treatment": treatments},
                                {"treatment": torch.tensor(labels * 12)}, 400)
            request = crossed_requests(opened, args.by)
            entry = {"pair": cell}
            for t in (treatments[0], treatment):
                inside = np.flatnonzero(cells == f"{t} x {plate}")
                request_t = request[f"{t} x {plate}"]
                sets = {"generated": trained.generate(
                    {name: [value] * n for name, value in request_t.items()}, range(n),
                    args.guidance, args.form, STEPS)}
                label = np.array([opened.manifest.columns[args.also][i] if args.also else ""
                                  for i in inside])
                sets |= {f"real {v}".strip(): real_images(here, rng.choice(inside[label == v], n),
                                                          rng) for v in np.unique(label)}
                for name, x in sets.items():
                    said = answer(probe, x)["treatment"]
                    entry[f"{t}: {name}"] = summarise(x, trained.channels, args.nucleus_radius) | {
                        "named right": float((said == treatments.index(t)).float().mean())}
            return entry
        lines.append(results.get(["pairs", args.checkpoint, cell, n], measured))
    for line in lines:
        print(f"\nleft out: {line['pair']}")
        for name, values in list(line.items())[2:]:
            print(f"  {name:28s}" + "  ".join(f"{k.replace('_mean', '')} {v:.3f}"
                                              for k, v in values.items()))
    return lines


# --- the sub-command ------------------------------------------------------------------------------

def draw_shares(path, truth, entry, names, label):
    """Each feature's share of variance by biology and by experiment: truth and generated, joined
    by a line. What disentangles lies on the axes; what leaks moves off them."""
    import matplotlib.pyplot as plt
    fig, axis = plt.subplots(figsize=(5, 4.6))
    true = np.array([truth.omega[k].tolist() for k in ("experiment", "biology")])
    found = np.array([entry["omega"][k] for k in ("experiment", "biology")])
    axis.plot(*np.stack([true, found], 1), color=".8", lw=.6)  # x and y (2, F): one line a feature
    axis.scatter(*true, s=14, color="k", label="truth")
    axis.scatter(*found, s=14, color="tab:red", label=f"generated, {label}")
    axis.set(xlabel="share of variance by experiment (omega^2)", ylabel="by biology (omega^2)")
    axis.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_lines(path, lines, label):
    """Effects, leaks, probes and distances of several measurements side by side."""
    import matplotlib.pyplot as plt
    groups = [("effect, as a share of the true one", ("effect_biology", "effect_experiment")),
              ("leak", ("leak_e_to_b", "leak_b_to_e")),
              ("share named right", ("probe_mechanism", "probe_batch")),
              ("kernel distance", ("distance_seen", "distance_heldout"))]
    fig, axes = plt.subplots(1, 4, figsize=(15, 1.6 + .28 * len(lines)), sharey=True)
    y = np.arange(len(lines))[::-1]
    for axis, (title, names) in zip(axes, groups):
        for k, name in enumerate(names):
            values = [line.get(name, np.nan) for line in lines]
            axis.plot(values, y, "o" if k else "s", ms=5, label=name)
            for value, place, line in zip(values, y, lines):
                axis.plot(line.get(f"{name}_interval", [value, value]), [place, place],
                          color=f"C{k}", lw=1)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=.3)
        axis.legend(fontsize=7)
    axes[0].set_yticks(y, [label(line) for line in lines], fontsize=8)
    axes[0].axvline(1, color="k", lw=.6), axes[1].axvline(0, color="k", lw=.6)
    axes[3].axvline(lines[0]["floor"], color="k", lw=.6)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def disentangle(args):
    """The tables of `evaluate.py disentangle`."""
    if args.quick:
        args.images, args.train_steps, args.seeds = 216, 600, [0]
        args.confounding, args.classifier_steps = args.confounding or [.9], 300
    out = Path(args.out)
    results = Results(out / "results.jsonl")
    if args.study == "shortcut":
        return study_shortcut(args, results)
    if args.study == "arms":
        lines, label = study_arms(args, results)
    else:
        opened = open_model(args)
        if args.study == "pairs":
            return study_pairs(opened, args, results)
        if args.by:
            args.by = args.by[:2]
            seeds = max(4, args.images // len(set(cells_of(opened.manifest, args.by))))
            truth = Truth(RealFactorial(opened, args.by, seeds), None)
        elif (opened.manifest.path.parent / "simulation.json").exists():
            truth = simulated_truth(opened, args)
        else:
            raise data.DataError(f"{opened.manifest.path} is not simulated: say with --by which two "
                                 "columns to cross, such as --by compound plate")
        if args.study == "transfer":
            return study_transfer(opened, truth, results, args)
        lines, label = {"model": study_model, "weights": study_weights, "forms": study_forms,
                        "training": study_training}[args.study](opened, truth, results, args)
        draw_shares(out / f"{args.study}-features.png", truth, lines[0],
                    feature_names(opened.model.channels), label(lines[0]))
    print()
    print_lines(lines, label)
    draw_lines(out / f"{args.study}.png", lines, label)
    print(f"wrote {out}/results.jsonl and {out}/{args.study}.png")


# ------------------------------------------------------------------------------------------------
# 6. conditions: is every field used? which molecule encoder generalises?
# ------------------------------------------------------------------------------------------------

def conditions(args):
    """The tables of `evaluate.py conditions`."""
    if args.encoders:
        return compare_encoders(args)
    opened, out = open_model(args), Path(args.out or Path(args.checkpoint).parent)
    model, count = opened.model, 256 if args.quick else 1024
    rows = np.random.default_rng(0).permutation(opened.held)[:count]
    images = real_images(opened, rows)
    posterior = torch.cat([torch.stack(model.vae.encode(x.to(device())), 1).cpu()
                           for x in images.split(64)]).numpy()
    latents = train_ldm.Latents(posterior, model.vae, opened.manifest, rows,
                                model.denoiser.conditioner, 1)
    sets = {f.name: [f.name] for f in model.fields} | {
        f"all of {g}": [f.name for f in model.fields if f.group == g] for g in model.groups}

    def predict(shuffled):
        prediction, target, t = train_ldm.heldout_predictions(
            model.denoiser, latents, model.schedule, count, shuffled)
        loss = (prediction - target).square().flatten(1).mean(1)
        return prediction.flatten(1), loss, t * 4 // model.schedule.T
    plain, loss, quarter = predict(())
    sizes = embedding_sizes(model, latents)
    changes = feature_changes(opened, rows[:32 if args.quick else 96], sets, args)
    table = {}
    for name, shuffled in sets.items():
        prediction, worse, _ = predict(shuffled)
        rise = (worse - loss).cpu()
        table[name] = {
            "rise": rise.mean().item(), "error": rise.std().item() / count ** .5,
            "rise_by_noise": [rise[quarter.cpu() == q].mean().item() for q in range(4)],
            "cosine": F.cosine_similarity(plain, prediction).mean().item(),
            "rms": sizes[name], "features": changes[name]}
    print(f"\n{'taken from another row':24s}{'loss rises by':>22s}{'by noise, little to much':>34s}"
          f"{'cosine':>9s}{'RMS':>7s}{'features move':>15s}")
    for name, e in table.items():
        print(f"{name:24s}{e['rise']:12.4f} +- {e['error']:.4f}  "
              + "".join(f"{v:8.4f}" for v in e["rise_by_noise"])
              + f"{e['cosine']:9.3f}{e['rms']:7.2f}{e['features']:15.2f}")
    train_ldm.warn_of_unused({k: (e["rise"], e["error"]) for k, e in table.items()})
    out.mkdir(parents=True, exist_ok=True)
    (out / "conditions.json").write_text(json.dumps(
        {"checkpoint": args.checkpoint, "held_out_loss": loss.mean().item(), "table": table},
        indent=1))
    print(f"wrote {out}/conditions.json")


def embedding_sizes(model, latents):
    """Root mean square of each field's part before its norm, and of each group's part after it."""
    conditioner, places = model.denoiser.conditioner, np.arange(min(256, len(latents.rows)))
    codes, known = latents.conditions(places)
    sizes = {}
    with torch.no_grad():
        for field, encoder in zip(model.fields, conditioner.encoders):
            code = codes[field.name]
            e = (encoder(latents.molecules[field.name][code])[0] if field.kind == "molecule"
                 else encoder(code))
            sizes[field.name] = e.square().mean().sqrt().item()
        parts, _, _ = conditioner.parts(codes, known, latents.molecules)
    return sizes | {f"all of {g}": p.square().mean().sqrt().item() for g, p in parts.items()}


def feature_changes(opened, rows, sets, args):
    """How far the features of a generated image move when one field alone is another row's, on the
    same noise, weights 1: root mean square in deviations of the training images."""
    model, other = opened.model, np.random.default_rng(1).permutation(rows)
    some = np.random.default_rng(0).permutation(opened.train)[:400]
    standardise = Standardise(features(real_images(opened, some), model.channels))

    def drawn(shuffled):
        columns = {f.name: opened.manifest.rows(other if f.name in shuffled else rows, f.name)
                   for f in model.fields}
        with autocast():
            images = model.generate(blank_unseen(model.fields, columns), range(len(rows)),
                                    {g: 1. for g in model.groups}, steps=args.steps)
        return standardise(features(images, model.channels))
    plain = drawn(())
    return {name: (drawn(shuffled) - plain).square().mean().sqrt().item()
            for name, shuffled in sets.items()}


# --- the molecule encoders, compared --------------------------------------------------------------

KINDS = {"train": "seen", "test_substituent": "unseen substituent",
         "test_scaffold": "unseen scaffold"}


class DoseSeries:
    """Molecules of one kind at doses from 0 up, the same cells at each: (molecules, doses, seeds)."""

    def __init__(self, opened, kind, molecules, seeds):
        screen = data.Screen(**json.loads((opened.manifest.path.parent / "simulation.json")
                                          .read_text()))
        self.screen, self.opened, self.seeds = replace(screen, draw=3000), opened, seeds
        usable = [m for m in data.molecules() if m["kind"] == kind and m["ec50"] <= 3]
        self.molecules = [usable[i] for i in np.random.default_rng(0).permutation(
            len(usable))[:molecules]]
        self.doses = (0., *data.DOSES)

    def rows(self, first=0):
        rows = []
        for molecule, dose, s in itertools.product(self.molecules, self.doses, range(self.seeds)):
            batch = s % self.screen.batches
            rows.append(dict(
                smiles=molecule["smiles"], dose=dose, batch=f"B{batch + 1}",
                plate=f"P{batch * self.screen.plates_per_batch + 1:02d}", row=8, column=12,
                site=1 + s % 4, cells=first + s, true_mechanism=molecule["mechanism"],
                true_effect=data.hill(dose, molecule["ec50"])))
        return rows

    def truth(self, first):
        fields = data.draw_fields(self.rows(first), self.screen, counterpart=False)
        return torch.from_numpy(data.scale_intensity(np.stack([f["image"] for f in fields]),
                                                     self.opened.model.intensity))

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
    """The figures of one set of images (M * doses * seeds) against the truth (M, doses, seeds, F)."""
    y = series.shape(standardise(features(images, series.opened.model.channels)))
    network, answers = probe
    rows = series.rows()
    strong = torch.tensor([r["true_effect"] >= .5 for r in rows])
    said = answer(network, images)["true_mechanism"]
    right = torch.tensor([answers["true_mechanism"][k] == r["true_mechanism"]
                          for k, r in zip(said, rows)])
    spearman, decades = dose_fidelity(y, truth, series.doses, [m["ec50"] for m in series.molecules])
    return {"probe": right[strong].float().mean().item(), "correlation": across_molecules(y, truth),
            "dose_rank": spearman, "ec50_error": decades}


def compare_encoders(args):
    """The same small model with each molecule encoder: molecules that training saw, held-out
    substituents, held-out scaffolds; real images above (ceiling), molecules permuted below."""
    if args.quick:
        args.train_steps, args.seeds, args.molecules = 300, [0], 8
    out = Path(args.out or "runs/encoders")
    results = Results(out / "encoders.jsonl")
    size = [args.molecules, args.series, args.steps, args.guidance]
    for encoder, seed in itertools.product(args.names, args.seeds):
        def measured():
            config = train_ldm.Config(out=str(out / f"{encoder}-{seed}"), seed=seed,
                                      molecule_encoder=encoder, steps=args.train_steps,
                                      molecule_table=args.molecule_table)
            path = Path(config.out) / "model.pt"
            if path.exists():
                config.resume = load_checkpoint(path, "ldm", "")["step"] < config.steps
            train_ldm.train(config)
            opened = open_model(SimpleNamespace(**vars(args) | {"checkpoint": str(path),
                                                                "data": None}))
            log = [json.loads(line) for line in (path.parent / "log.jsonl").open()]
            entry = {"encoder": encoder, "seed": seed, "seconds_per_step":
                     log[-1]["seconds"] / log[-1]["step"], "parameters": sum(
                         p.numel() for e, f in zip(opened.model.denoiser.conditioner.encoders,
                                                   opened.model.fields) if f.kind == "molecule"
                         for p in e.parameters())}
            return entry | score_encoder(opened, args, limits=False)
        results.get(["encoder", encoder, seed, args.train_steps, *size], measured)
        if "limits" not in [k[0] for k in map(json.loads, results.done)]:
            path = out / f"{encoder}-{seed}" / "model.pt"
            opened = open_model(SimpleNamespace(**vars(args) | {"checkpoint": str(path),
                                                                "data": None}))
            results.get(["limits", *size], lambda: {"encoder": "limits"} | score_encoder(
                opened, args, limits=True))
    print_encoders(list(results.done.values()), out)


def score_encoder(opened, args, limits):
    """{kind: figures} of a model, or with `limits` of real images (ceiling, and permuted: floor)."""
    model, scores = opened.model, {}
    some = np.random.default_rng(0).permutation(opened.train)[:1000]
    standardise = Standardise(features(real_images(opened, some), model.channels))
    probe = screen_probe(opened.manifest.path.parent, model)
    for kind, name in KINDS.items():
        series = DoseSeries(opened, kind, args.molecules, args.series)
        true_images = series.truth(10_000)
        truth = series.shape(standardise(features(true_images, model.channels)))
        if limits:
            again = series.truth(20_000)
            n = len(again) // len(series.molecules)
            order = np.random.default_rng(1).permutation(len(series.molecules))
            sets = {"real images": again, "molecules permuted": again.view(
                -1, n, *again.shape[1:])[order].flatten(0, 1)}
        else:
            columns = {f.name: [str(r[f.name]) for r in series.rows()] for f in model.fields}
            with autocast():
                sets = {"": model.generate(columns, list(range(args.series)) * (
                    len(series.rows()) // args.series), args.guidance, steps=args.steps)}
        for label, images in sets.items():
            scores[f"{name} {label}".strip()] = score_molecules(series, standardise, probe, images,
                                                                truth)
    return scores


def print_encoders(lines, out):
    """The table of compare_encoders, means over seeds, and its figure."""
    import matplotlib.pyplot as plt
    names = ("probe", "correlation", "dose_rank", "ec50_error")
    table = {}
    for kind in KINDS.values():
        for line in lines:
            if line["encoder"] == "limits":
                for label in ("real images", "molecules permuted"):
                    table.setdefault((label, kind), []).append(line[f"{kind} {label}"])
            else:
                table.setdefault((line["encoder"], kind), []).append(line[kind])
    print(f"\n{'':22s}" + "".join(f"{kind:^42s}" for kind in KINDS.values()) + "\n" + " " * 22
          + "".join(f"{name.replace('_', ' '):>11s}" for name in names) * 3)
    rows = list(dict.fromkeys(row for row, _ in table))
    for row in rows:
        print(f"{row:22s}" + "".join(f"{np.mean([e[name] for e in table[row, kind]]):11.2f}"
                                     for kind in KINDS.values() for name in names))
    for line in lines:
        if line["encoder"] != "limits":
            print(f"{line['encoder']}, seed {line['seed']}: {line['parameters']} parameters, "
                  f"{line['seconds_per_step']:.3f} s per step")
    fig, axes = plt.subplots(1, 4, figsize=(13, 1.5 + .3 * len(rows)), sharey=True)
    for axis, name in zip(axes, names):
        for k, kind in enumerate(KINDS.values()):
            for y, row in enumerate(reversed(rows)):
                values = [e[name] for e in table[row, kind]]
                axis.plot(values, [y + .2 - .2 * k] * len(values), "o", ms=4, color=f"C{k}",
                          label=kind if y == 0 else None)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.grid(alpha=.3)
    axes[0].set_yticks(range(len(rows)), rows[::-1], fontsize=8)
    axes[0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(out / "encoders.png", dpi=110)
    plt.close(fig)
    print(f"wrote {out}/encoders.jsonl and encoders.png")


def parse_guidance(words):
    return {name: parse_number(name, value) for name, _, value in (w.partition("=") for w in words)}


def main():
    parser = data.Parser(description=__doc__,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    q = commands.add_parser("quality", help="are held-out conditions drawn as they look?",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    q.add_argument("--out", default=None, help="folder for JSON and figure (the checkpoint's)")
    q.add_argument("--by", nargs="+", default=None, help="for real plates: columns whose "
                   "combinations make the rows of the table, such as compound plate")
    q.add_argument("--images", type=int, default=192, help="generated for each held-out set")
    q.add_argument("--sets", nargs="+", help="values of the column split",
                   default=["val", "test_pair", "test_substituent", "test_scaffold"])
    q.add_argument("--steps", type=int, default=STEPS, help="DDIM steps")
    d = commands.add_parser("disentangle", help="how much of the image is biology, how much "
                            "experiment, beside the truth?",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    c = commands.add_parser("conditions", help="is every field used? with --encoders: which "
                            "molecule encoder generalises? (trains them)",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for command in (q, d, c):
        command.add_argument("--checkpoint", default="runs/ldm/model.pt",
                             help="a model from train_ldm.py")
        command.add_argument("--data", default=None,
                             help="another manifest than the model was trained on")
        command.add_argument("--guidance", nargs="+", default=[],
                             help="GROUP=WEIGHT for each group")
        command.add_argument("--form", default="nested", choices=FORMS,
                             help="of guidance, see diffusion.py")
        command.add_argument("--quick", action="store_true", help="fewer images, shorter training")
    for command in (q, d):
        command.add_argument("--also", default=None, help="with --by: real images apart by this "
                             "column, such as well")
        command.add_argument("--nucleus_radius", type=float, default=NUCLEUS_RADIUS,
                             help="pixels, with --by: what the segmentation looks for")
    d.add_argument("--study", default="model", help="one checkpoint; at several guidance weights; "
                   "under the forms of guidance; along its training; the three arms (trains them); "
                   "the shortcut of a classifier (trains it); "
                   "real images edited; real plates with one pair left out in turn (trains them)",
                   choices=("model", "weights", "forms", "training", "arms", "shortcut",
                            "transfer", "pairs"))
    d.add_argument("--out", default="runs/disentangle", help="results.jsonl and figures go here")
    d.add_argument("--by", nargs="+", default=None, help="for real plates: the column of biology "
                   "and the column of experiment to cross, such as compound plate")
    d.add_argument("--images", type=int, default=756, help="of the whole factorial")
    d.add_argument("--steps", type=int, default=15, help="DDIM steps")
    d.add_argument("--interval", type=float, nargs=2, default=(0., 1.), help="noise levels between "
                   "which guidance acts")
    d.add_argument("--rescale", type=float, default=0., help="share of guidance's spread taken back")
    d.add_argument("--vae", default="runs/vae/model.pt", help="of the arms: one for all")
    d.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="which arms")
    d.add_argument("--confounding", type=float, nargs="+", default=None,
                   help="of the arms' screens (0, 0.5 with one seed, 0.9 with three)")
    d.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="with --confounding, and "
                   "of the shortcut's classifiers")
    d.add_argument("--train_steps", type=int, default=1500, help="of each arm")
    d.add_argument("--edit_steps", type=int, default=50, help="DDIM steps each way")
    d.add_argument("--classifier_images", type=int, default=1512, help="for each classifier")
    d.add_argument("--classifier_steps", type=int, default=600, help="for each classifier")
    d.add_argument("--shortcut_weights", type=float, nargs=2, default=(1.5, 1.5),
                   help="guidance of the generated images: biology, experiment")
    c.add_argument("--out", default=None, help="folder for JSON and figure (the checkpoint's, or "
                   "runs/encoders)")
    c.add_argument("--steps", type=int, default=15, help="DDIM steps")
    c.add_argument("--encoders", action="store_true", help="compare the molecule encoders")
    c.add_argument("--names", nargs="+", default=["fingerprint", "descriptors", "graph", "smiles",
                                                  "identity"], choices=MOLECULE_ENCODERS,
                   help="which encoders")
    c.add_argument("--molecule_table", default="", help="of the encoder table")
    c.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the training runs")
    c.add_argument("--train_steps", type=int, default=1000, help="of each encoder's model")
    c.add_argument("--molecules", type=int, default=24, help="of each kind")
    c.add_argument("--series", type=int, default=6, help="images for each molecule and dose")
    parser.epilog = q.format_help() + d.format_help() + c.format_help()
    args = parser.parse_args()
    args.guidance = parse_guidance(args.guidance)
    {"quality": quality, "disentangle": disentangle, "conditions": conditions}[args.command](args)


if __name__ == "__main__":
    run(main)
