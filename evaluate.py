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
from conditioning import blank_unseen, check_values, parse_number
from diffusion import FORMS
from sample import STEPS, Model
from train_ldm import cached_views
from train_vae import (UserError, autocast, device, learning_rate, load_checkpoint, open_data,
                       reconstruct, run, save_checkpoint, step_rng, views)

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


def interval(statistic, wells, strata, repeats=40, share=.7, seed=0):
    """5 to 95 % of a statistic(mask) over subsets of wells without replacement: in each stratum
    (condition cell and half) `share` of its wells, rounded up, so that no cell falls out."""
    rng, values = np.random.default_rng(seed), []
    inside = {s: np.unique(wells[strata == s]) for s in np.unique(strata)}
    for _ in range(repeats):
        kept = [rng.permutation(w)[:int(np.ceil(share * len(w)))] for w in inside.values()]
        values.append(statistic(np.isin(wells, np.concatenate(kept))))
    return [float(v) for v in np.percentile(values, (5, 95))]


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


def train_probe(images, answers, labels, steps, seed=0, batch=32):
    """Train a Probe on images (N, C, H, W) with labels {question: (N,) long}."""
    torch.manual_seed(seed)
    probe = Probe(images.shape[1], answers).to(device())
    optimiser = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=.02)
    for step in tqdm(range(steps), desc="training the probe", mininterval=1):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3)
        rng, _ = step_rng(seed, step)
        chosen = torch.from_numpy(rng.integers(len(images), size=batch))
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


def parse_guidance(words):
    return {name: parse_number(name, value) for name, _, value in (w.partition("=") for w in words)}


def main():
    parser = data.Parser(description=__doc__,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    q = commands.add_parser("quality", help="are held-out conditions drawn as they look?",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    q.add_argument("--checkpoint", default="runs/ldm/model.pt", help="a model from train_ldm.py")
    q.add_argument("--data", default=None, help="another manifest than the model was trained on")
    q.add_argument("--out", default=None, help="folder for JSON and figure (the checkpoint's)")
    q.add_argument("--by", nargs="+", default=None, help="for real plates: columns whose "
                   "combinations make the rows of the table, such as compound plate")
    q.add_argument("--also", default=None, help="with --by: real images apart by this "
                   "column, such as well")
    q.add_argument("--nucleus_radius", type=float, default=NUCLEUS_RADIUS,
                   help="pixels, with --by: what the segmentation looks for")
    q.add_argument("--images", type=int, default=192, help="generated for each held-out set")
    q.add_argument("--sets", nargs="+", help="values of the column split",
                   default=["val", "test_pair", "test_substituent", "test_scaffold"])
    q.add_argument("--guidance", nargs="+", default=[], help="GROUP=WEIGHT for each group")
    q.add_argument("--form", default="nested", choices=FORMS, help="of guidance, see diffusion.py")
    q.add_argument("--steps", type=int, default=STEPS, help="DDIM steps")
    q.add_argument("--quick", action="store_true", help="fewer images")
    parser.epilog = q.format_help()
    args = parser.parse_args()
    args.guidance = parse_guidance(args.guidance)
    {"quality": quality}[args.command](args)


if __name__ == "__main__":
    run(main)
