"""Questions put to a trained model, one command each. Every answer stands beside the best possible
one and beside chance, and is written as JSON, some with a picture too.

    python evaluate.py quality                   # are unseen conditions drawn as they look?
    python evaluate.py disentangle               # how much is biology, how much experiment?
    python evaluate.py conditions                # is every field used?
    python evaluate.py control --checkpoint runs/brightfield/model.pt   # these very cells?
    python evaluate.py vae                       # which latent space?
    python evaluate.py mol2image                 # Mol2Image's own measures

Sections 1 to 5 are shared, then comes one for each command. To add a question, write a function of
its options and name both in QUESTIONS.
"""
import contextlib
import functools
import hashlib
import json
import math
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations, cycle, pairwise, product
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
from conditioning import MOLECULE_ENCODERS, check_columns, dose_fields, known_columns
from data import UserError, Views
from diffusion import FORMS, SAMPLERS
from sample import EDIT_STEPS, INTERVAL, STEPS, Model, hint_of
from train_vae import autocast, device, reconstruct
from unet import UNet, UNetConfig
from vae import shrunk

NUCLEUS_RADIUS = 6.9  # pixels, what the segmentation looks for


# --- 1. Features of images: morphology, in torch, in batches --------------------------------------

def blur(x, taps):
    """Each channel of (B, C, H, W) convolved with taps (K,) along both axes, mirrored borders."""
    c, taps = x.shape[1], taps.to(x)
    x = F.pad(x, (len(taps) // 2,) * 4, mode="reflect")
    x = F.conv2d(x, taps.view(1, 1, 1, -1).expand(c, 1, 1, -1), groups=c)
    return F.conv2d(x, taps.view(1, 1, -1, 1).expand(c, 1, -1, 1), groups=c)


def gaussian_blur(x, sigma, radius=None):
    radius = radius or max(1, round(3 * sigma))
    taps = torch.exp(-torch.arange(-radius, radius + 1, device=x.device) ** 2 / (2 * sigma ** 2))
    return blur(x, taps / taps.sum())


def otsu(x, bins=128):
    """Threshold (B,) of (B, H, W) in [0, 1] with the largest variance between classes, w0 w1 (m0 -
    m1)^2 (Otsu 1979), in the middle where many are as good."""
    level = (x.flatten(1).clamp(0, 1) * (bins - 1)).round().long()
    count = torch.zeros(len(x), bins, device=x.device).scatter_add_(
        1, level, torch.ones_like(level, dtype=torch.float))
    value, share = torch.arange(bins, device=x.device) / (bins - 1), count / x[0].numel()
    w0, m0 = share.cumsum(1), (share * value).cumsum(1)                  # (B, bins)
    score = (m0[:, -1:] * w0 - m0) ** 2 / (w0 * (1 - w0)).clamp(min=1e-9)
    best = score >= score.amax(1, keepdim=True) * (1 - 1e-6)
    return (best * value).sum(1) / best.sum(1)


def segment_nuclei(dna, radius=NUCLEUS_RADIUS, contrast=.06):
    """Nuclei of (B, H, W) in [0, 1]: labels (B, H, W), 0 for background, 1 .. n in each image. Mask
    by Otsu's threshold (empty where the classes differ by less than `contrast`), seeds at maxima of
    the blurred stain, labels grown from them, specks below a sixth of a nucleus removed."""
    smoothed = gaussian_blur(dna[:, None], 1.)[:, 0]
    mask = smoothed > otsu(smoothed)[:, None, None]
    high, low = ((smoothed * m).sum((1, 2)) / m.sum((1, 2)).clamp(min=1) for m in (mask, ~mask))
    mask &= (high - low > contrast)[:, None, None]
    ramp = torch.linspace(0, 1e-5, dna[0].numel(), device=dna.device).view_as(dna[0])
    # the ramp leaves one seed, not many, where a saturated nucleus is flat
    peaks, window = gaussian_blur(dna[:, None], .36 * radius) + ramp, 2 * round(.5 * radius) + 1
    seeds = (F.max_pool2d(peaks, window, 1, window // 2) == peaks)[:, 0] & mask
    labels = (seeds.flatten(1).cumsum(1).view_as(seeds) * seeds).float()
    for _ in range(round(3 * radius)):                                   # a pixel at a step
        grown = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0]
        labels = torch.where((labels == 0) & mask, grown, labels)
    labels = labels.long()
    area, cut = areas(labels)
    small = (area < 3.14 * radius ** 2 / 6) & ~cut
    return labels * ~small.gather(1, labels.flatten(1)).view_as(labels)


def per_object(labels, values):
    """Sum of values (B, H, W) over each label: (B, L), column 0 the background."""
    total = torch.zeros(len(labels), int(labels.max()) + 1, device=labels.device)
    return total.scatter_add_(1, labels.flatten(1), values.flatten(1).float())


def areas(labels):
    """Pixels of each label, and whether it reaches the border of the field: (B, L) each."""
    frame = torch.ones_like(labels)
    frame[:, 1:-1, 1:-1] = 0
    return per_object(labels, torch.ones_like(labels)), per_object(labels, frame) > 0


def objects(labels):
    """Number per image (B,), and of each whole object area in pixels and eccentricity from second
    moments, (B, L - 1) each, NaN where there is none. An object that the border cuts counts if at
    least half the mean area of the image's whole ones is inside, as a half where none is whole."""
    y, x = (v.expand_as(labels).float() for v in torch.meshgrid(
        *(torch.arange(n, device=labels.device) for n in labels.shape[1:]), indexing="ij"))
    area, cut = areas(labels)
    my, mx, yy, xx, xy = (per_object(labels, v) / area.clamp(min=1)
                          for v in (y, x, y * y, x * x, x * y))
    yy, xx = yy - my ** 2 + 1 / 12, xx - mx ** 2 + 1 / 12                # a pixel is a square
    root = ((xx - yy) ** 2 / 4 + (xy - mx * my) ** 2).clamp(min=0).sqrt()
    eccentricity = (1 - ((xx + yy) / 2 - root) / ((xx + yy) / 2 + root)).clamp(0, 1).sqrt()
    whole, eccentricity = (torch.where((area > 0) & ~cut, v, torch.nan)[:, 1:]
                           for v in (area, eccentricity))
    area, cut, mean = area[:, 1:], cut[:, 1:], whole.nanmean(1, keepdim=True)
    inside = torch.where(mean.isnan(), .5, (area >= mean / 2).float())
    return ((area > 0) * torch.where(cut, inside, 1.)).sum(1), whole, eccentricity


def feature_names(channels):
    kinds = ("mean", "spread", "bright", "in_nucleus", "near_nucleus", "fine", "medium", "coarse")
    return (["nuclei", "nuclear_area", "nuclear_area_spread", "eccentricity", "coverage"]
            + [f"{c}_{kind}" for kind in kinds for c in channels]
            + [f"{a}_{b}_correlation" for a, b in combinations(channels, 2)])


@torch.no_grad()
def features(images, channels, batch=64, radius=NUCLEUS_RADIUS):
    """Morphology of images (N, C, H, W) in [-1, 1]: (N, F) float32, named by feature_names. Number,
    size and shape of nuclei; share of the field covered; per channel mean, spread and 99th
    percentile on [0, 1], the mean in nuclei and in a ring of one radius around them, log energy of
    texture at 1, 2 and 4 pixels; correlations of channels. NaN where no nucleus is whole."""
    found, (i, j) = [], torch.triu_indices(len(channels), len(channels), 1)
    dna, r = channels.index("DNA") if "DNA" in channels else 0, round(radius)
    for x in images.split(batch):
        x = (x.to(device()).float() + 1) / 2
        labels = segment_nuclei(x[:, dna], radius)
        count, area, eccentricity = objects(labels)
        size = area.nanmean(1)
        size_spread = (area - size[:, None]).square().nanmean(1).sqrt()
        total = gaussian_blur(x.mean(1, keepdim=True), 1.)[:, 0]
        coverage = (total > otsu(total)[:, None, None]).float().mean((1, 2))
        inside = (labels > 0).float()[:, None]                           # (B, 1, H, W)
        ring = F.max_pool2d(inside, 2 * r + 1, 1, r) - inside
        scales = [x, *(gaussian_blur(x, s) for s in (1., 2., 4.))]
        flat = x.flatten(2)                                              # (B, C, HW)
        centred = flat - flat.mean(2, keepdim=True)
        unit = centred / centred.norm(dim=2, keepdim=True).clamp(min=1e-6)
        found.append(torch.cat([
            torch.stack([count, size, size_spread, eccentricity.nanmean(1), coverage], 1),
            flat.mean(2), flat.std(2), flat.quantile(.99, dim=2),
            *((x * where).sum((2, 3)) / where.sum((2, 3)) for where in (inside, ring)),
            *((fine - coarse).square().mean((2, 3)).add(1e-6).log()
              for fine, coarse in pairwise(scales)), (unit @ unit.transpose(1, 2))[:, i, j]], 1))
    return torch.cat(found).cpu()


def count_nuclei(images, channels, radius=NUCLEUS_RADIUS):
    """Nuclei (N,) in images (N, C, H, W) in [-1, 1]."""
    return features(images, channels, radius=radius)[:, 0]


# --- 2. Distances, intervals, shares of variance --------------------------------------------------

def grouped(conditions):
    """{condition: indices of its images}, sorted."""
    groups = defaultdict(list)
    for i, condition in enumerate(conditions):
        groups[condition].append(i)
    return dict(sorted(groups.items()))


def distance_shares(a, b):
    """A number for each image, (n,) and (m,), whose means add up to the kernel_distance of features
    (n, F), (m, F): how much more alike it is to its own set than to the other. Deviations from the
    mean are doubled, as an image also enters the numbers of the others (Hoeffding 1948)."""
    def kernel(x, y):
        return (x.double() @ y.double().T / x.shape[1] + 1) ** 3

    def within(x):
        k = kernel(x, x)
        return (k.sum(1) - k.diagonal()) / (len(x) - 1)
    between = kernel(a, b)
    return [2 * s - s.mean() for s in (within(a) - between.mean(1), within(b) - between.mean(0))]


def kernel_distance(a, b):
    """Unbiased squared MMD of features (n, F), (m, F) with k(x, y) = (x.y / F + 1)^3, the "kernel
    inception distance" of Binkowski et al. 2018 (arXiv:1801.01401, Eq. 4) on morphology."""
    return sum(shares.mean() for shares in distance_shares(a, b)).item()


def mean_distance(pairs):
    """Kernel distance averaged over pairs of features, NaN of none."""
    return float(np.mean([kernel_distance(a, b) for a, b in pairs] or [np.nan]))


def condition_distance(a, b, cond_a, cond_b, wrong=False):
    """Kernel distance averaged over conditions: one of all images at once would not see whether a
    condition was obeyed. wrong: to those that differ in every part, as ("golgi", "B2") and
    ("actin", "B3") do, which is chance."""
    of_a, of_b = grouped(cond_a), grouped(cond_b)
    return mean_distance((a[of_a[p]], b[of_b[q]]) for p in of_a for q in of_b if (
        all(x != y for x, y in zip(p, q)) if wrong else p == q))


def interval(statistic, units, strata):
    """{name: [5 %, 95 %]} of statistic(indices), a dict of numbers, by the jackknife (Efron & Stein
    1981): computed again without each unit (well, seed, molecule; (N,) that of each image) in turn.
    Units vary within their stratum (N,), the strata are as they are."""
    every, variance = np.arange(len(units)), Counter()
    for places in map(np.array, grouped(strata).values()):
        groups = grouped(np.array(units)[places]).values()
        n, left = len(groups), [statistic(np.setdiff1d(every, places[g])) for g in groups]
        for name in left[0] if n > 1 else ():
            variance[name] += (n - 1) * np.var([found[name] for found in left])
    return {name: [value + k * variance[name] ** .5 for k in (-1.64, 1.64)]
            for name, value in statistic(every).items()}


def distance_table(sets, b, cond_a, cond_b, copied=None):
    """{name: {"distance", "score", and "..._interval" of both}} of {name: features} to b, as
    condition_distance; b has every condition of cond_a. score: the share of the way from the set
    `copied` to the truth, 1 - distance / its distance, where that is clearly above 0."""
    of_a, of_b = grouped(cond_a), grouped(cond_b)
    shares = {name: torch.cat([torch.cat(distance_shares(a[of_a[c]], b[of_b[c]])) for c in of_a])
              for name, a in sets.items()}
    # a stratum is the images of a condition on one side
    strata = np.repeat(range(2 * len(of_a)), [len(of[c]) for c in of_a for of in (of_a, of_b)])

    def figures(i):
        weights = 1 / np.bincount(strata[i])[strata[i]] / len(of_a)
        found = {name: s.numpy()[i] @ weights for name, s in shares.items()}
        return found | {(name, "score"): 1 - found[name] / found[copied]
                        for name in sets if copied}
    every = range(len(strata))
    found, spans = figures(every), interval(figures, every, strata)
    table = {name: {"distance": found[name], "distance_interval": spans[name]} for name in sets}
    for name in sets if copied and spans[copied][0] > 0 else ():
        table[name] |= {"score": found[name, "score"], "score_interval": spans[name, "score"]}
    return table


def moments(x, conditions):
    """Mean features of each condition (conditions, F), and the variance among images of one, summed
    over features, averaged over conditions: below the truth's they are too alike."""
    groups = [x[i] for i in grouped(conditions).values()]
    variances = [group.var(0).sum() for group in groups if len(group) > 1]
    return torch.stack([group.mean(0) for group in groups]), torch.stack(variances).mean().item()


def correlations(p, q):
    """Pearson correlation (F,) of the columns of two (M, F), rows with NaN in either left out. NaN
    where fewer than three are left or a column does not vary."""
    kept = p.isfinite() & q.isfinite()
    p, q = (torch.where(kept, v.double(), torch.nan) for v in (p, q))
    p, q = ((v - v.nanmean(0)).nan_to_num(0.) for v in (p, q))
    size = p.norm(dim=0) * q.norm(dim=0)
    return torch.where((kept.sum(0) > 2) & (size > 1e-12), (p * q).sum(0) / size, torch.nan)


def structural_similarity(x, y):
    """SSIM (C,) of images on [0, 1] (Wang et al. 2004, Eq. 13), Gaussian windows of 11 pixels,
    constants 0.01^2 and 0.03^2. Windows that the border cuts are left out."""
    def local(v):
        return gaussian_blur(v, 1.5, 5)[..., 5:-5, 5:-5]
    x, y = x.double(), y.double()  # variances are differences of nearly equal numbers
    mx, my = local(x), local(y)
    xx, yy, xy = local(x * x) - mx ** 2, local(y * y) - my ** 2, local(x * y) - mx * my
    return ((2 * mx * my + 1e-4) * (2 * xy + 9e-4) / (
        (mx ** 2 + my ** 2 + 1e-4) * (xx + yy + 9e-4))).mean((0, 2, 3)).float()


def power_spectrum(x):
    """Mean log power of images (N, C, H, W) in rings one spatial frequency wide, (C, F) from the
    coarsest to the finest."""
    h, w = x.shape[2:]
    power = torch.fft.rfft2(x - x.mean((2, 3), keepdim=True)).abs().square().mean(0) / (h * w)
    fy, fx = torch.fft.fftfreq(h)[:, None] * h, torch.fft.rfftfreq(w)[None] * w
    ring, rings = (fy ** 2 + fx ** 2).sqrt().round().long(), range(1, min(h, w) // 2)
    return torch.stack([power[:, ring == k].mean(1) for k in rings], 1).add(1e-8).log()


def compare(x, y):
    """How near images (N, C, H, W) on [0, 1] come to others of the same cells, (C,) each: L1, SSIM,
    PSNR in dB, Pearson correlation of pixels, and the mean difference of log power over spatial
    frequencies ("spectrum", which sees lost texture)."""
    pixels = (v.flatten(2).flatten(0, 1).T for v in (x, y))              # (HW, N C) each
    return {"l1": (x - y).abs().mean((0, 2, 3)), "ssim": structural_similarity(x, y),
            "psnr": -10 * (x - y).square().mean((0, 2, 3)).clamp(min=1e-9).log10(),
            "pearson": correlations(*pixels).view(len(x), -1).nanmean(0),
            "spectrum": (power_spectrum(x) - power_spectrum(y)).abs().mean(1)}


def omega_squared(y):
    """Share of variance explained in a balanced factorial, without the upward bias of eta squared:
    {"biology", "experiment", "interaction": (F,)} of y (biology, experiment, seeds, F), omega^2 =
    (SS_effect - df_effect MS_error) / (SS_total + MS_block) of Olejnik & Algina 2003 (Psychol.
    Methods 8). A seed is a block: the same cells (or noise) everywhere."""
    b, e, n, _ = y.shape
    y = y.double() - y.double().mean((0, 1, 2))
    biology, experiment, seeds = y.mean((1, 2)), y.mean((0, 2)), y.mean((0, 1))    # (levels, F)
    both = y.mean(2) - biology[:, None] - experiment                               # (b, e, F)
    squares = {"biology": (e * n * biology.square().sum(0), b - 1),
               "experiment": (b * n * experiment.square().sum(0), e - 1),
               "interaction": (n * both.square().sum((0, 1)), (b - 1) * (e - 1))}
    total, blocks = y.square().sum((0, 1, 2)), b * e * seeds.square().sum(0)
    error = (total - blocks - sum(square for square, _ in squares.values())) / (
        (b * e - 1) * (n - 1))
    scale = (total + blocks / (n - 1)).clamp(min=1e-12)
    return {name: ((square - df * error) / scale).float() for name, (square, df) in squares.items()}


def leaks(found, truth, least=.05):
    """Batch leakage: the share of variance that the experiment explains beyond its share in the
    truth (both as from omega_squared), averaged over biological features. Perturbation leakage: the
    other way round. A feature is of the side that explains more of it in the truth, and `least`."""
    biology, experiment = truth["biology"], truth["experiment"]
    counts = torch.maximum(biology, experiment) >= least
    ours, theirs = counts & (biology > experiment), counts & (biology <= experiment)
    return {"leak_e_to_b": (found["experiment"] - experiment)[ours].mean().item(),
            "leak_b_to_e": (found["biology"] - biology)[theirs].mean().item()}


def effect_size(y, one, other):
    """Effects in y (each level's mean from the mean of all) projected on the true ones; 1 is right.
    All are (levels, ..., F); two samples of the truth, as the square of one would hold its noise.
    """
    y, one, other = (x.flatten(1, -2).mean(1) for x in (y, one, other))              # (levels, F)
    y, one, other = (x - x.mean(0) for x in (y, one, other))
    return ((y * one).sum() / (other * one).sum()).item()


# --- 3. A model, its data, and what it is asked for -----------------------------------------------

@dataclass
class Options:
    out: str = ""               # folder for JSON and figures (none: the checkpoint's)
    quick: bool = False         # fewer images, shorter training
    nucleus_radius: float = NUCLEUS_RADIUS  # pixels, what the segmentation looks for


@dataclass
class Asked(Options):
    checkpoint: str = "runs/ldm/model.pt"  # from train_ldm.py
    data: str = ""              # another manifest than the one it was trained on
    guidance: tuple = ()        # GROUP=SCALE for each group
    form: str = "nested"        # of guidance: nested, independent
    interval: tuple = INTERVAL  # noise levels between which guidance acts
    steps: int = STEPS          # of the sampler
    sampler: str = "sde"        # SDE-DPM-Solver++ 2M; or dpm without new noise, ddim, ddpm


def open_run(asked, kind="ldm"):
    """A trained model and its images. asked: the path of a checkpoint of this kind ("vae": an
    autoencoder alone), or Asked options, which are checked against the model. Returns a namespace:
    model (sample.Model, or of an autoencoder its vae, channels, intensity and pixel_um), settings,
    manifest, train and held (rows), views (data.Views), sha1 of the checkpoint, and images(rows),
    (N, C, H, W) in [-1, 1]: a row that is asked for again is another view, an image that cannot be
    read a UserError."""
    args = asked if isinstance(asked, Asked) else Asked(checkpoint=asked)
    path = args.checkpoint
    if kind == "ldm":
        model = Model.load(path)
        settings, content = vars(model.settings), model.content
    else:
        vae, content = train_vae.load_vae(path)
        settings = content["settings"]
        model = SimpleNamespace(vae=vae, channels=tuple(settings["channels"].split(",")),
                                intensity=content["intensity"], pixel_um=None)
    s = SimpleNamespace(**settings | {"data": args.data or content["settings"]["data"]})
    opened = train_vae.open_data(s, draw=False)
    if kind == "ldm":
        encoder = MOLECULE_ENCODERS[content["molecule_encoder"]]
        check_columns(model.fields, opened.manifest.columns, encoder.is_molecule, s.data)
        model.scales(args.guidance)  # refuses groups that it does not have
        if not 1 <= args.steps <= model.schedule.T:
            raise UserError(f"--steps {args.steps}: between 1 and {model.schedule.T}")
    if opened.manifest.sha1() != content["manifest"]:
        print(f"warning: {s.data} is not as it was when {path} was trained: rows that count as "
              "held out may have been trained on")
    views = Views(opened.manifest, model.intensity, s.crop, s.flips, s.binning)

    def images(rows):
        rows = [int(row) for row in rows]  # view -1 is the middle, the others are random crops
        keys = [(row, rows[:k].count(row) - 1) for k, row in enumerate(rows)]
        return torch.cat([x for x, _ in data.load(views, keys)])
    return SimpleNamespace(model=model, settings=s, manifest=opened.manifest, train=opened.train,
                           held=opened.held, views=views, sha1=file_hash(path), images=images)


def morphology(run, radius=NUCLEUS_RADIUS, count=1000):
    """measure(images): their features (N, F) in deviations of at most `count` true training images,
    or exactly so many crops. NaN is 0, and three deviations the most: the kernel takes cubes."""
    measured = functools.partial(features, channels=run.model.channels, radius=radius)
    some = np.random.default_rng(0).permutation(run.train)[:count]
    true = measured(run.images(np.resize(some, count) if run.settings.crop else some))
    mean = true.nanmean(0)
    std = (true - mean).square().nanmean(0).sqrt().clamp(min=1e-6)
    return lambda images: ((measured(images) - mean) / std).nan_to_num(0.).clamp(-3, 3)


def records(manifest, rows):
    """Rows of a manifest as dicts."""
    return [{name: values[i] for name, values in manifest.columns.items()} for i in rows]


def told(model, rows):
    """Rows, dicts, as a request {field: [strings]} to a model: what a row does not say and what
    training never saw is unknown."""
    columns = {f.name: [str(row.get(f.name, "")) for row in rows] for f in model.fields}
    return known_columns(model.fields, columns, range(len(rows)))


def wells_of(manifest):
    """One name for each row's well (plate and well), or for its image where wells are not named."""
    columns, n = manifest.columns, len(manifest)
    names = zip(columns.get("plate", [""] * n), columns["well"]) if "well" in columns else range(n)
    return np.array([str(name) for name in names])


def conditions_of(manifest, by):
    """The condition of each row, (N,) of tuples: its values in the columns `by`."""
    if missing := [name for name in by if name not in manifest.columns]:
        raise UserError(f"{manifest.path} has no column {', '.join(missing)}: say with --by which "
                        "columns make a condition, such as --by compound plate")
    conditions = np.empty(len(manifest), object)
    conditions[:] = list(zip(*(manifest.columns[name] for name in by)))
    return conditions


def ask(run, columns, seeds, args, hint=None, **changes):
    """Images (n, C, H, W) in [-1, 1] for a request {field: [n strings]}, one seed each, drawn as
    the options `args` say, with the changes of a study; groups that the model was not told have no
    scale. hint: see Model.guided."""
    words = {k: getattr(args, k) for k in ("guidance", "form", "interval", "steps", "sampler")}
    words, dials = words | changes, [*run.model.groups, *["image"] * bool(hint)]
    words["guidance"] = {g: scale for g, scale in words["guidance"].items() if g in dials}
    return run.model.generate(columns, seeds, **words, hint=hint)


def split_wells(manifest, rows, conditions, limit, seed=0, crop=0):
    """Two sets of rows from different wells, one site a well as sites are not independent, as many
    of each condition in both: (a, b), about `limit` in each. conditions: (N,) of all rows. Those
    with fewer than four wells are left out. If these are all, the units are images, which is said:
    four a condition, or two that are cropped, each again as other crops."""
    rng, rows = np.random.default_rng(seed), np.array(rows, int)
    asked, least, a, b = grouped(conditions[rows]), 4, [], []

    def groups_of(units):
        one_each = [[*{units[i]: i for i in rng.permutation(rows[places])}.values()]
                    for places in asked.values()]
        return [rng.permutation(group) for group in one_each if len(group) >= least]
    groups = groups_of(wells_of(manifest))
    if not groups:
        print("too few wells of a condition: the units are images, so intervals are too narrow")
        least = 2 if crop else 4
        groups = groups_of(range(len(manifest)))
    for group in groups:
        half, each = len(group) // 2, max(2, limit // len(groups))
        n = each if least == 2 else min(each, half)
        a, b = [*a, *np.resize(group[:half], n)], [*b, *np.resize(group[half:], n)]
    return np.array(a, int), np.array(b, int)


# --- 4. The reference classifier: which mechanism, which batch is this? ---------------------------

class Backbone(nn.Module):
    """A small residual network from images (B, C, H, W) to `outputs` numbers each."""

    def __init__(self, channels, outputs):
        super().__init__()
        widths = (32, 64, 128)
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, 32, 3, padding=1))
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.GroupNorm(w // 8, w), nn.SiLU(), nn.Conv2d(w, w, 3, padding=1),
            nn.GroupNorm(w // 8, w), nn.SiLU(), nn.Conv2d(w, w, 3, padding=1)) for w in widths)
        self.down = nn.ModuleList(nn.Conv2d(w, 2 * w, 3, stride=2, padding=1) for w in widths[:-1])
        self.head = nn.Linear(2 * widths[-1], outputs)

    def forward(self, x):                                                # (B, C, H, W)
        h = self.stem(x)
        for i, block in enumerate(self.blocks):
            h = h + block(h)
            h = self.down[i](h) if i < len(self.down) else h
        return self.head(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1))


class Classifier(Backbone):
    """A Backbone that answers several questions, {question: list of possible answers}."""

    def __init__(self, channels, answers):
        super().__init__(channels, sum(map(len, answers.values())))
        self.answers = answers

    def forward(self, x):                                                # {question: (B, answers)}
        sizes = map(len, self.answers.values())
        return dict(zip(self.answers, super().forward(x).split([*sizes], 1)))

    @torch.no_grad()
    def choose(self, images, batch=64):
        """{question: (N,) of chosen answers} for images (N, C, H, W)."""
        out = [self(x.to(device())) for x in images.split(batch)]
        return {q: np.array(options)[torch.cat([o[q] for o in out]).argmax(1).cpu().numpy()]
                for q, options in self.answers.items()}


def fit(network, loss_of, steps, lr, seed, what):
    """Train a network in place and return it, ready to use. loss_of(rng): the loss of one step,
    which draws from this numpy generator alone."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=.02)
    for step in tqdm(range(steps), desc=f"training the {what}", mininterval=1):
        optimiser.param_groups[0]["lr"] = train_vae.learning_rate(step, steps, lr)
        loss = loss_of(train_vae.step_rng(seed, step)[0])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval()


def train_classifier(images, rows, answers, steps, seed=0, batch=32):
    """A Classifier trained on images (N, C, H, W) and the answers that their rows, dicts, hold."""
    labels = {q: torch.tensor([a.index(r[q]) for r in rows]) for q, a in answers.items()}
    torch.manual_seed(seed)
    network = Classifier(images.shape[1], answers).to(device())

    def loss_of(rng):
        chosen = torch.from_numpy(rng.choice(len(images), batch))
        with autocast():
            out = network(turned(images[chosen], rng).to(device()))
        return sum(F.cross_entropy(out[q].float(), labels[q][chosen].to(device())) for q in labels)
    return fit(network, loss_of, steps, 2e-3, seed, "classifier")


def fresh_screen(run, draw, **changes):
    """The settings of a simulated screen, for fresh cells (`draw`) under the same microscopes."""
    note = run.manifest.path.parent / "simulation.json"
    if not note.exists():
        raise UserError(f"{run.manifest.path} is not simulated: the truth is not known")
    if run.settings.binning != 1 or run.settings.crop:
        raise UserError("the model sees binned or cropped images, the simulator draws whole fields")
    return replace(data.Screen(**json.loads(note.read_text())), draw=draw, **changes)


def rendered(rows, screen, intensity):
    """Fresh fields of view for rows as in data.layout: (N, C, H, W) in [-1, 1]."""
    images = np.stack([f["image"] for f in data.draw_fields(rows, screen, counterpart=False)])
    return torch.from_numpy(data.scale_intensity(images, intensity))


def reference_classifier(run, steps=1500):
    """The Classifier of mechanism and batch of a simulated screen: trained on fresh cells under the
    same microscopes without confounding, on negative controls and on doses above half effect. Kept
    in runs/classifier. None where there is no such screen."""
    try:
        screen = fresh_screen(run, 1000, confounding=0.)
    except UserError as why:
        return print(f"no reference classifier: {why}")
    answers = {"true_mechanism": ["none", *data.MECHANISMS],
               "batch": [f"B{b + 1}" for b in range(screen.batches)]}
    path = Path("runs/classifier") / text_hash(asdict(screen), run.model.intensity, steps, CODE)
    if not path.exists():
        print("drawing an unconfounded screen to train the reference classifier on")
        rows = [r for r in data.layout(screen) if r["role"] == "control" or r["true_effect"] >= .5]
        images = rendered(rows, screen, run.model.intensity)
        network = train_classifier(images, rows, answers, steps)
        train_vae.save_checkpoint(path, "classifier", {"weights": network.state_dict()})
    network = Classifier(len(run.model.channels), answers).to(device())
    network.load_state_dict(train_vae.load_checkpoint(path, "classifier", "remove it")["weights"])
    return network.eval()


def told_apart(fake, real, steps, seeds=3, batch=32):
    """How well networks learn to tell images `fake` (N, C, H, W) from `real` ones, both under the
    same conditions: the area under the ROC curve, .5 at best, 1 at worst, on a quarter of both that
    they did not train on (Lopez-Paz & Oquab 2017, arXiv:1610.06545). Mean of `seeds` networks. They
    see (of large images a corner of 128 pixels) an image, its detail below 1 pixel and from 1 to 2,
    all in deviations of the real ones: else texture is too faint to be learned from."""
    def detail(x):
        x = x[..., :128, :128]
        fine, coarse = gaussian_blur(x, 1.), gaussian_blur(x, 2.)
        return torch.cat([x, x - fine, fine - coarse], 1)
    fake, real = detail(fake), detail(real)
    std, mean = torch.std_mean(real, (0, 2, 3), keepdim=True)
    images = torch.stack([(fake - mean), (real - mean)], 1) / std.clamp(min=1e-6)
    areas = []
    for seed in range(seeds):                                            # (N, 2, 3 C, H, W)
        torch.manual_seed(seed)
        network = Backbone(images.shape[2], 1).to(device())
        order = np.random.default_rng(seed).permutation(len(images))
        tested, taught = np.split(order, [len(order) // 4])

        def loss_of(rng):
            x = turned(images[rng.choice(taught, batch // 2)].flatten(0, 1), rng)
            with autocast():
                fake, real = network(x.to(device())).float().unflatten(0, (-1, 2)).unbind(1)
            return (F.softplus(-fake) + F.softplus(real)).mean()
        fit(network, loss_of, steps, 2e-3, seed, "two-sample test")
        with torch.no_grad(), autocast():
            one, other = (torch.cat([network(x.to(device())).float() for x in images[
                tested, k].split(64)]) for k in (0, 1))
        areas.append((one > other.T).float().mean().item())  # a pair in the right order
    return float(np.mean(areas))


def turned(x, rng):
    """Images (N, C, H, W) turned by a multiple of 90 degrees and mirrored, at random, all alike."""
    x = torch.rot90(x, int(rng.integers(4)), (2, 3))
    return x.flip(3) if rng.random() < .5 else x


def recognised(classifier, images, rows):
    """Which images the classifier takes for what their rows, dicts, say: {"mechanism", "batch":
    (N,)}, 1 or 0. The mechanism of treated images above half effect only, else NaN. {} of None."""
    if classifier is None:
        return {}
    chosen = classifier.choose(images)
    mechanism, batch = (torch.tensor(chosen[q] == [r[q] for r in rows]).float()
                        for q in ("true_mechanism", "batch"))
    mechanism[[float(row["true_effect"]) < .5 for row in rows]] = torch.nan
    return {"mechanism": mechanism, "batch": batch}


# --- 5. Studies, tables, pictures -----------------------------------------------------------------

def plain(value):
    """A value as JSON can hold it: arrays as lists, what is not finite as None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_hash(path):
    return hashlib.sha1(Path(path).read_bytes()).hexdigest()


def text_hash(*values):
    return hashlib.sha1(json.dumps(plain(values), sort_keys=True).encode()).hexdigest()[:16]


CODE = [file_hash(module) for module in (__file__, data.__file__)]  # what measures, what simulates


def digest(args, *runs):
    """What every figure of a study depends on beside its setting and the code: the options, and of
    each run the checkpoint and the manifest as they are."""
    options = {k: v for k, v in asdict(args).items() if k not in ("out", "quick", "study")}
    return options, [(run.sha1, run.manifest.sha1()) for run in runs]


def study(path, settings, measure, digest):
    """One line of figures, measure(**setting), for each of {label: setting}. Lines are kept in the
    JSON-lines file `path` under the hash of the setting, the digest and the code. So a study goes
    on where it was interrupted, and measures again what has changed."""
    path, done, lines = Path(path), {}, []
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # cut off by a kill, or the blank before the first
            done[json.loads(text)["key"]] = json.loads(text)
    for label, setting in settings.items():
        key = text_hash(measure.__qualname__, setting, digest, CODE)
        if key not in done:
            done[key] = plain({"key": key, "label": label, "setting": setting} | measure(**setting))
            with open(path, "a") as file:  # on a line of its own, whatever was cut off before
                file.write("\n" + json.dumps(done[key]))
        lines.append(done[key] | {"label": label})
    return lines


def folder_of(args):
    """--out, or the checkpoint's folder."""
    return Path(args.out or Path(args.checkpoint).parent)


def write_report(path, args, report, *beside):
    """Write what was asked for and the report as JSON. beside: names of files written with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain({"asked": asdict(args)} | report), indent=1) + "\n")
    print(" and ".join([f"wrote {path}", *beside]))


def print_table(title, columns, rows):
    """A table: columns {heading: format of its numbers}, rows [(label, *values)]. A value may be
    None (blank), or (estimate, [low, high] or None), written "estimate (low to high)"."""
    def text(value, form):
        value, span = value if isinstance(value, tuple) else (value, None)
        between = f" ({span[0]:{form}} to {span[1]:{form}})" if span else ""
        return "" if value is None else f"{value:{form}}{between}"
    lines = [[title, *columns]] + [[label, *map(text, values, columns.values())]
                                   for label, *values in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print()
    for label, *values in lines:
        print(label.ljust(widths[0]), *(v.rjust(w) for v, w in zip(values, widths[1:])), sep="  ")


def draw_sets(path, pictures, model, count=8):
    """A row of at most `count` images for each of {name: {kind: images (N, C, H, W)}}."""
    kinds = {f"{name}\n{kind}": x for name, sets in pictures.items() for kind, x in sets.items()}
    data.picture(path, [list(x[::max(1, len(x) // count)][:count].numpy()) for x in kinds.values()],
                 model.channels, list(kinds), pixel_um=model.pixel_um)


# --- 6. quality: are unseen conditions drawn as they look? ----------------------------------------

HELD_OUT = {"val": "unseen wells", "test_pair": "unseen combinations",
            "test_substituent": "unseen substituents", "test_scaffold": "unseen scaffolds"}
BEST, CHANCE = "best possible: other wells", "wrong condition: chance"
COPIED, REBUILT = "negative control of the batch, copied", "through the autoencoder"
TRAINED = "all images, most of them trained on"  # where too few are held out


@dataclass
class Quality(Asked):
    images: int = 192           # generated for each held-out set
    by: tuple = ()              # of real plates: columns that make a condition, biology first


def heldout_halves(run, conditions, limit):
    """{set: two sets of rows as from split_wells} of what the training never saw: each value of the
    column `split`, or the rows held out where the autoencoder was trained with a split of its own;
    of all images, most of them trained on, where that is too little."""
    columns, sets, halves = run.manifest.columns, {"held out": run.held}, {}
    if run.settings.split == "auto" and "split" in columns:
        label = np.array(columns["split"])
        names = [*HELD_OUT, *sorted({*label} - {*HELD_OUT, "train", "val_pair"})]
        sets = {HELD_OUT.get(n, n): np.flatnonzero(label == n) for n in names if n in label}
    untreated = data.negative_controls(columns)  # a copy of one is right
    for name, rows in (sets | {TRAINED: np.arange(len(untreated))}).items():
        if name != TRAINED or not halves:
            a, b = split_wells(run.manifest, rows[~untreated[rows]], conditions, limit,
                               crop=run.settings.crop)
            halves |= {name: (a, b)} if len(a) else {}
    return halves


def copied_controls(run, conditions, asked):
    """For each condition in `asked` a training row with a negative control of the same experiment
    (all parts of the condition but the first), of another well as far as there are; None where an
    experiment has none. conditions: of all rows of the manifest."""
    pools, wells = defaultdict(dict), wells_of(run.manifest)
    untreated = data.negative_controls(run.manifest.columns)[run.train]
    for i in np.random.default_rng(0).permutation(run.train[untreated]):
        pools[conditions[i][1:]][wells[i]] = i
    turns = {experiment: cycle(pool.values()) for experiment, pool in pools.items()}
    return [next(turns[c[1:]]) for c in asked] if {c[1:] for c in asked} <= set(turns) else None


def quality_line(run, rows_a, rows_b, conditions, measure, classifier, args, requests, first=0):
    """The rows of the table for one held-out set, {row: figures}, and the images behind them. The
    true rows_b (as from split_wells) are compared with the true rows_a, negative controls of their
    experiments, rows_a through the autoencoder, and what each of `requests`, {row: changes of
    args}, draws for them with seeds from `first` on. correlation: over conditions, of their mean
    features."""
    cond_a, cond_b, true = conditions[rows_a], conditions[rows_b], run.images(rows_a)
    copied, asked = copied_controls(run, conditions, cond_a), records(run.manifest, rows_a)
    sets = {BEST: true} | ({COPIED: run.images(copied)} if copied else {}) | {
        REBUILT: reconstruct(run.model.vae, true)[0]} | {
        name: ask(run, told(run.model, asked), range(first, first + len(asked)), args, **changes)
        for name, changes in requests.items()}
    found, b = {name: measure(x) for name, x in sets.items()}, measure(run.images(rows_b))
    table = distance_table(found, b, cond_a, cond_b, COPIED if copied else None)
    true_means, true_spread = moments(b, cond_b)
    for name, images in sets.items():
        means, spread = moments(found[name], cond_a)
        table[name] |= {"spread": spread / true_spread,
                        "correlation": correlations(means, true_means).nanmean().item()} | {
            k: hits.nanmean().item() for k, hits in recognised(classifier, images, asked).items()}
    table[CHANCE] = {"distance": condition_distance(found[BEST], b, cond_a, cond_b, wrong=True)}
    return table, sets


def quality(args):
    """The table of `evaluate.py quality`."""
    run, out, limit = open_run(args), folder_of(args), 96 if args.quick else args.images
    conditions = conditions_of(run.manifest, args.by or ("true_mechanism", "batch"))
    requests = {f"generated, {words_of(scales)}": {"guidance": scales} for scales in (
        dict.fromkeys(run.model.groups, 1.), run.model.scales(args.guidance))}
    measure, classifier = morphology(run, args.nucleus_radius), reference_classifier(run)
    table, pictures = {}, {}
    halves = heldout_halves(run, conditions, limit)
    for name, (a, b) in halves.items():
        print(f"{name}: {len(a)} images of {len(set(conditions[a]))} conditions")
        table[name], pictures[name] = quality_line(run, a, b, conditions, measure, classifier,
                                                   args, requests, 10 ** 6 * len(table))
    if not table:
        raise UserError("nothing to compare: no condition has four wells or images")
    apart = all_together(run, [halves[name][1] for name in table], pictures, requests,
                         20 if args.quick else 300)
    figures = {"spread": ".2f", "mechanism": ".2f", "batch": ".2f"}
    print_table("held-out set", {"distance (5-95 %)": ".2f", "score": ".2f"} | figures, [
        (f"{name}, {kind}", *((e.get(k), e.get(f"{k}_interval")) for k in ("distance", "score")),
         *map(e.get, figures)) for name, kinds in plain(table).items()
        for kind, e in kinds.items()])
    print_table("all sets", dict.fromkeys(next(iter(apart.values())), ".2f"), [
        (kind, *line.values()) for kind, line in apart.items()])
    draw_sets(out / "quality.png", pictures, run.model)
    write_report(out / "quality.json", args, {"sha1": run.sha1, "table": table, "all": apart},
                 "quality.png")


def all_together(run, others, pictures, requests, steps):
    """What needs many images, of all sets together, beside images through the autoencoder: can they
    be told apart, at full and at half resolution, and the difference of log10 power in five bands
    of spatial frequency, coarse to fine. others: rows of other wells under the same conditions."""
    sets = {name: torch.cat([kinds[name] for kinds in pictures.values()])
            for name in (REBUILT, *requests)}
    rebuilt = sets.pop(REBUILT)
    sets = {BEST: reconstruct(run.model.vae, run.images(np.concatenate(others)))[0]} | sets

    def bands(x):
        return (power_spectrum((x + 1) / 2).mean(0) / math.log(10)).tensor_split(5)
    return {name: {f"told apart, 1/{k}": told_apart(
        *(F.avg_pool2d(v, k) for v in (x, rebuilt)), steps) for k in (1, 2)} | {
            f"power {k + 1}": (one - other).mean().item()
            for k, (one, other) in enumerate(zip(bands(x), bands(rebuilt)))}
            for name, x in sets.items()}


def words_of(scales):
    """Guidance scales in words: "biology 2, experiment 1"."""
    return ", ".join(f"{group} {scale:g}" for group, scale in sorted(scales.items()))


# --- 7. disentangle: how much of the image is biology, how much is experiment? --------------------

# conditioned on the perturbation, the experiment, or both (joint). balanced: rare combinations of
# molecule and batch drawn as often as common ones. restained: and three of four treated images as
# another plate shows them
MODELS = {"perturbations": dict(experiment=()), "experiment": dict(biology=()), "joint": {},
          "balanced": {}, "restained": {}}
SCALES = [dict(biology=b, experiment=e) for b, e in (
    (1, 1), (1.5, 1.5), (2, 1.5), (2.5, 2), (3, 3))]
TABLE = ("leak_e_to_b", "leak_b_to_e", "effect_biology", "effect_experiment", "mechanism",
         "mechanism_seen", "mechanism_heldout", "batch", "distance_seen", "distance_heldout")


@dataclass
class Disentangle(Asked):
    out: str = "runs/disentangle"  # results.jsonl, figures and the models of a study go here
    study: str = "model"        # one checkpoint as it is, or a list of settings
    images: int = 756           # of all combinations together
    vae: str = "runs/vae/model.pt"  # of the models: one autoencoder for all
    models: tuple = tuple(MODELS)   # which of them; the shortcut takes the last
    confounding: tuple = (.9, .5, 0.)  # of the screens of the models; the shortcut takes the first
    seeds: tuple = (0, 1, 2)    # of the models at the first confounding, else one; of classifiers
    train_steps: int = 1500     # of each model


def crossed_rows(screen, seeds, cells=0, requests=0):
    """Rows as of data.layout of every mechanism (and none) in every batch, in the order (biology,
    experiment, seed). A seed is the same cells everywhere, a position, a dose above half effect and
    a molecule of each mechanism from training. Other first numbers: other cells, other requests."""
    usable, rows = [x for x in data.molecules()
                    if x["kind"] == "train" and x["ec50"] < max(data.DOSES)], []
    for m, b, s in product(["none", *data.MECHANISMS], range(screen.batches), range(seeds)):
        rng = np.random.default_rng([screen.seed, 5, requests + s])
        (row, column), plate = rng.integers((2, 2), (16, 24)), rng.integers(screen.plates_per_batch)
        site, (one, other) = rng.integers(1, 5), rng.random(2)
        of_m = [x for x in usable if x["mechanism"] == m] or [dict(smiles=data.DMSO, ec50=np.inf)]
        molecule = of_m[int(one * len(of_m))]
        doses = [d for d in data.DOSES if d >= molecule["ec50"]] or [0.]
        dose = doses[int(other * len(doses))]
        rows.append(dict(
            smiles=molecule["smiles"], dose=dose, batch=f"B{b + 1}", row=int(row), site=int(site),
            column=int(column), plate=f"P{plate + b * screen.plates_per_batch + 1:02d}",
            cells=cells + s, true_mechanism=m, true_effect=data.hill(dose, molecule["ec50"])))
    return rows


class Truth:
    """Every mechanism in every batch of a simulated screen as it truly looks. rows: what models are
    asked for; places (b, e, n): the row of each combination and seed. parts, val: (b, e) bool, the
    combinations by name, and those for validation. images: true ones of the rows. sample, reference
    (b, e, n, F): features of these, and of more images of other cells."""

    def __init__(self, run, args):
        screen, biology = fresh_screen(run, 2000), ["none", *data.MECHANISMS]
        n = max(4, args.images // (len(biology) * screen.batches))
        self.rows = crossed_rows(screen, n)
        self.places = np.arange(len(self.rows)).reshape(len(biology), screen.batches, n)
        pairs = [data.heldout_combinations(screen.batches, kind) for kind in ("val", "test")]
        self.val, test = (torch.tensor([[batch_of.get(m) == b for b in range(screen.batches)]
                                        for m in biology]) for batch_of in pairs)
        self.parts = {"": test | True, "_heldout": test, "_seen": ~(self.val | test)}
        self.measure = morphology(run, args.nucleus_radius)
        self.classifier = reference_classifier(run)
        self.images, *others = (rendered(crossed_rows(screen, n, 10_000 * k), screen,
                                         run.model.intensity) for k in (1, 2, 4, 6, 8))
        self.sample, self.hits = self.see(self.images, self.places)
        self.reference = torch.cat([self.measure(x).unflatten(0, self.places.shape)
                                    for x in others], 2)
        self.omega = omega_squared(self.sample)

    def draw(self, model, args, places, **changes):
        """What a model draws for these rows. A seed is the same noise in each combination."""
        asked = told(model, [self.rows[i] for i in places.ravel()])
        seeds = (places.ravel() % self.places.shape[2]).tolist()
        return ask(SimpleNamespace(model=model), asked, seeds, args, **changes)

    def see(self, images, places):
        """Features (..., F) of images of these rows, and what is recognised, {"mechanism", "batch":
        (...)}, in the shape of places."""
        hits = recognised(self.classifier, images, [self.rows[i] for i in places.ravel()])
        return self.measure(images).unflatten(0, places.shape), {
            name: hit.view(places.shape) for name, hit in hits.items()}

    def agreement(self, y, hits):
        """Distance to the truth and share recognised, by part, of what `see` finds."""
        found = {}
        for part, where in self.parts.items():
            found[f"distance{part}"] = mean_distance(zip(y[where], self.reference[where]))
            found |= {name + part: hit[where].nanmean().item() for name, hit in hits.items()}
        return found

    def chance(self, where):
        """The sample of one combination against the truth of others that differ in both."""
        b, e, n = self.places.shape
        return mean_distance((self.sample[k, m], self.reference[i, j, :2 * n])
                             for i, j in where.nonzero().tolist()
                             for k, m in product(range(b), range(e)) if k != i and m != j)


def disentangle_line(truth, model, args, only="", **changes):
    """The figures of one model under one request. only: of the combinations for validation, and
    their distance and share recognised alone."""
    places = truth.places[truth.val] if only else truth.places           # (..., n)
    y, hits = truth.see(truth.draw(model, args, places, **changes), places)
    if only:
        return {"distance": mean_distance(zip(y, truth.reference[truth.val])),
                "recognised": np.mean([hit.nanmean() for hit in hits.values()])}

    def figures(s):  # of these seeds
        return truth.agreement(y[:, :, s], {name: hit[:, :, s] for name, hit in hits.items()}) | (
            leaks(omega_squared(y[:, :, s]), omega_squared(truth.sample[:, :, s])))
    seeds, effects = np.arange(places.shape[2]), (y, truth.sample, truth.reference)
    beside = {"interval": interval(figures, seeds, 0 * seeds),
              "best": truth.agreement(truth.sample, truth.hits),
              "chance": {f"distance{p}": truth.chance(where) for p, where in truth.parts.items()}}
    return figures(seeds) | {
        f"{name}_{kind}": value for kind in beside for name, value in beside[kind].items()} | {
        "effect_biology": effect_size(*effects), "omega": omega_squared(y),
        "effect_experiment": effect_size(*(x.transpose(0, 1) for x in effects)),
        "omega_truth": truth.omega, "images": places.size}


def show_lines(lines):
    """A table of several measurements, below them the truth itself and chance. The intervals are
    in results.jsonl."""
    best, chance = ({name: lines[0].get(f"{name}_{kind}") for name in TABLE}
                    for kind in ("best", "chance"))
    best |= dict(leak_e_to_b=0., leak_b_to_e=0., effect_biology=1., effect_experiment=1.)
    rows = [(line["label"], line) for line in lines] + [(BEST, best), (CHANCE, chance)]
    print_table("", dict.fromkeys(TABLE, ".2f"), [
        (label, *map(line.get, TABLE)) for label, line in rows])


def disentangle(args):
    """The tables of `evaluate.py disentangle`."""
    if args.quick:
        args = replace(args, images=min(args.images, 216), train_steps=min(args.train_steps, 400),
                       seeds=args.seeds[:1], confounding=args.confounding[:1])
    run = open_run(args.vae, "vae") if args.study in ("models", "shortcut") else open_run(args)
    truth, out = functools.cache(lambda: Truth(run, args)), Path(args.out)

    def measure(path, sha1, only="", **changes):
        return disentangle_line(truth(), Model.load(path), args, only, **changes)

    def measured(settings, measure=measure):
        return study(out / "results.jsonl", settings, measure, digest(args, run))
    if args.study in ("shortcut", "transfer"):
        return {"shortcut": shortcut, "transfer": transfer}[args.study](args, run, truth, measured)
    if args.study == "models":
        return show_lines(study_models(args, run, truth, measured))
    changes = {  # of the request to one checkpoint
        "model": {words_of(run.model.scales(args.guidance)): {}},
        "scales": {words_of(s): dict(guidance=s) for s in SCALES},
        "forms": {f"{form}, t/T {low:g} to {high:g}": dict(form=form, interval=(low, high))
                  for low, high in ((0., 1.), INTERVAL) for form in FORMS},
        "samplers": {f"{n} steps, {sampler}": dict(sampler=sampler, steps=n)
                     for n in (5, 10, 15, 30, 60) for sampler in SAMPLERS}}[args.study]
    show_lines(measured({label: dict(path=args.checkpoint, sha1=run.sha1) | change
                         for label, change in changes.items()}))


def train_model(args, base, name, confounding, seed):
    """One of MODELS, {"path", "sha1"}, trained if it is missing on the shared autoencoder `base`,
    which never saw a held-out combination: these are the same at any confounding."""
    screen, folder = fresh_screen(base, 0), f"{args.out}/data-{confounding:g}"
    manifest = base.manifest.path
    if confounding != screen.confounding:
        manifest = Path(folder, "manifest.csv")
        if not manifest.exists():
            data.simulate(folder, replace(screen, confounding=confounding))
    if name in ("balanced", "restained"):
        source, manifest = manifest, Path(f"{folder}-{name}", "manifest.csv")
        if not manifest.exists():
            data.write_restained(source, ("batch", "plate"), .75 * (name == "restained"),
                                 ("smiles", "batch"), manifest.parent)
    path = train_vae.train_if_missing(train_ldm.train, train_ldm.Config(
        data=str(manifest), vae=args.vae, seed=seed, steps=args.train_steps, **MODELS[name],
        out=f"{args.out}/{name}-{confounding:g}-{seed}-{args.train_steps}"))
    return dict(path=str(path), sha1=file_hash(path))


def best_scales(settings, tried):
    """The one of `settings` for all seeds of a model: of those whose mean distance is within a
    tenth of the least, the one that is recognised best. tried: (seeds, settings) of lines."""
    distance, read = (np.mean([[line[k] for line in lines] for lines in tried], 0)
                      for k in ("distance", "recognised"))               # (settings,) each
    near = np.flatnonzero(distance <= 1.1 * distance.min())
    return settings[max(near, key=lambda k: (read[k], -distance[k]))]


def study_models(args, base, truth, measured):
    """MODELS at several confoundings, each at its own best form and scales, chosen on validation
    combinations alone. Where rare ones are not balanced v(biology) holds the home batch as well,
    so only balanced models may do without nesting. Draws the held-out combinations."""
    lines, shown = [], {}
    for confounding, name in product(args.confounding, args.models):
        seeds = args.seeds if confounding == args.confounding[0] else args.seeds[:1]
        runs = {f"{name}, {confounding:g}, {s}": train_model(args, base, name, confounding, s)
                for s in seeds}
        group = {"perturbations": "biology", "experiment": "experiment"}.get(name)
        scales = [{group: s} for s in (1, 1.5, 2, 3)] if group else SCALES
        forms = FORMS if name in ("balanced", "restained") else ["nested"]
        settings = [dict(form=form, guidance=s) for form, s in product(forms, scales)]
        best = best_scales(settings, [measured({
            f"{label} tried, {s['form']} {words_of(s['guidance'])}": run | s | {"only": "val"}
            for s in settings}) for label, run in runs.items()])
        lines += measured({f"{label} ({best['form']}, {words_of(best['guidance'])})": run | best
                           for label, run in runs.items()})
        shown[f"{name}, {confounding:g}"] = next(iter(runs.values()))["path"], best
    t = truth()
    one = t.places[t.parts["_heldout"]][:, 1]                            # a seed of each
    images = {"simulated": t.images[one]} | {
        name: t.draw(Model.load(path), args, one, **best) for name, (path, best) in shown.items()}
    data.picture(Path(args.out) / "heldout_combinations.png", [list(x.numpy()) for x in
                 images.values()], base.model.channels, list(images), [
        f"{t.rows[i]['true_mechanism']}\nin {t.rows[i]['batch']}" for i in one])
    return lines


def shortcut(args, base, truth, measured):
    """Does a classifier of mechanisms, tested on an unconfounded screen, profit from images drawn
    without confounding? One is trained on each of several sets. accuracy: mean over mechanisms of
    the share recognised. closed: how much of the gap between the two screens."""
    best = train_model(args, base, args.models[-1], args.confounding[0], 0)
    answers, (n, steps) = ["none", *data.MECHANISMS], (540, 200) if args.quick else (1512, 600)

    def wells_drawn(confounding, draw, n, seed=0, left_out=("test_substituent", "test_scaffold")):
        screen = fresh_screen(base, draw, confounding=confounding)
        rows = [r for r in data.layout(screen) if r["split"] not in left_out and (
            r["role"] == "control" or r["true_effect"] >= .5)]
        rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:n]]
        return rendered(rows, replace(screen, draw=draw + 10 * seed), base.model.intensity), rows
    test = functools.cache(lambda: wells_drawn(0., 4000, 1200))

    def standardised(images, rows):  # controls have one mean and deviation in all batches
        control, out = torch.tensor([r["true_mechanism"] == "none" for r in rows]), images.clone()
        for i in map(torch.tensor, grouped(r["batch"] for r in rows).values()):
            own, every = (torch.std_mean(x, (0, 2, 3), keepdim=True)
                          for x in (images[i[control[i]]], images[control]))
            out[i] = (images[i] - own[1]) * (every[0] / own[0].clamp(min=1e-3)) + every[1]
        return out, rows

    def measure(seed, sha1):
        run, rng = SimpleNamespace(model=Model.load(best["path"])), np.random.default_rng(seed)
        images, rows = wells_drawn(args.confounding[0], 0, n, seed, ("val", "val_pair", *HELD_OUT))
        plates = {batch: sorted({rows[i]["plate"] for i in of_batch})
                  for batch, of_batch in grouped(r["batch"] for r in rows).items()}
        goals = [row | dict(batch=batch, plate=str(rng.choice(plates[batch]))) for row, batch in
                 zip(rows, rng.choice(list(plates), len(rows)).tolist())]
        edited = run.model.edit(images, told(run.model, rows), told(run.model, goals),
                                {"experiment": 1.5}, steps=10, rounds=1, interval=(0., 1.))
        screen = fresh_screen(base, 2000)
        asked = crossed_rows(screen, n // len(answers) // screen.batches, 0, 1000 * (seed + 1))
        free = ask(run, told(run.model, asked), [10_000 * seed + i for i in range(len(asked))],
                   args)
        found = {}
        for name, train in {
                "confounded": (images, rows), "generated": (free, asked),
                "edited to other batches": (edited, goals),
                "standardised on controls": standardised(images, rows),
                "unconfounded": wells_drawn(0., 5000, n, seed)}.items():
            network = train_classifier(*train, {"true_mechanism": answers}, steps, seed)
            shown, true = standardised(*test()) if "standardised" in name else test()
            true = np.array([row["true_mechanism"] for row in true])
            right = network.choose(shown)["true_mechanism"] == true
            found[name] = np.mean([right[i].mean() for i in grouped(true).values()])
        least, gap = found["confounded"], found["unconfounded"] - found["confounded"] or math.nan
        return {"accuracy": found, "closed": {k: (v - least) / gap for k, v in found.items()}}
    lines = measured({f"shortcut, {s}": dict(seed=s, sha1=best["sha1"]) for s in args.seeds},
                     measure)
    print_table("mechanism classifier trained on", {"accuracy": ".3f", "gap closed": ".2f"}, [
        (name, *(np.mean([line[k][name] or 0. for line in lines]) for k in ("accuracy", "closed")))
        for name in lines[0]["accuracy"]])


def transfer(args, run, truth, measured):
    """True images edited to another batch, and negative controls to each mechanism, beside the same
    cells there, all behind the autoencoder. before, after: L1 to these. moved: features of the
    changed side along their true change (1 is right). drift: the others."""
    def measure(task, sha1):
        t = truth()
        start, goal = t.places, np.roll(t.places, -1, 1)
        side = t.omega["biology"] <= t.omega["experiment"]               # (F,), to be changed
        if task == "treated":
            start, goal, side = np.repeat(start[:1], len(start) - 1, 0), start[1:], ~side
        source, target = (told(run.model, [t.rows[i] for i in p.ravel()]) for p in (start, goal))
        edited = run.model.edit(t.images[start.ravel()], source, target, args.guidance, args.form,
                                5 if args.quick else EDIT_STEPS, interval=args.interval)
        before, true = (reconstruct(run.model.vae, t.images[p.ravel()])[0] for p in (start, goal))
        y, y_edited, y_true = map(t.measure, (before, edited, true))
        change, wanted, seeds = y_edited - y, y_true - y, goal.ravel() % goal.shape[2]

        def figures(i=...):
            c, w = change[i], wanted[i]
            return {"before": (before - true)[i].abs().mean().item() / 2,
                    "after": (edited - true)[i].abs().mean().item() / 2,
                    "moved": ((c * w)[:, side].sum() / w[:, side].square().sum()).item(),
                    "drift": c[:, ~side].square().mean().sqrt().item()}
        return figures() | {"images": len(y), "intervals": interval(figures, seeds, 0 * seeds)}
    lines = measured({f"edited: {task}": dict(task=task, sha1=run.sha1)
                      for task in ("another batch", "treated")}, measure)
    print_table("L1 to the truth", dict.fromkeys(lines[0]["intervals"], ".3g"), [
        (e["label"], *((e[k], span) for k, span in e["intervals"].items())) for e in lines])


# --- 8. conditions: is every field used? which molecule encoder generalises? ----------------------

@dataclass
class Conditions(Asked):
    images: int = 1024          # held-out images; with --encoders, for each kind of molecules
    encoders: bool = False      # compare molecule encoders instead (trains a model with each)
    names: tuple = ("fingerprint", "descriptors", "graph", "smiles", "identity")  # of encoders
    seeds: tuple = (0, 1)       # of the training runs
    train_steps: int = 2000     # of each encoder's model


def conditions(args):
    """The table of `evaluate.py conditions`: each field, and each whole group, taken from another
    row. How much the held-out loss rises, and how far the features of generated images move on the
    same noise, all scales 1: root mean square, in deviations of the training images."""
    if args.encoders:
        return encoders(args)
    run, table = open_run(args), {}
    model, rows = run.model, np.random.default_rng(0).permutation(run.held)
    rows, few = rows[:256 if args.quick else args.images], rows[:32 if args.quick else 96]
    with torch.no_grad():
        cache = torch.cat([torch.stack(model.vae.encode(x.to(device())), 1).cpu()
                           for x in run.images(rows).split(64)]).numpy()
    latents = train_ldm.Latents(cache, model.vae, run, rows, model.denoiser.conditioner)
    own, other = (told(model, records(run.manifest, order)) for order in (
        few, np.random.default_rng(1).permutation(few)))
    measure, ones = morphology(run, args.nucleus_radius), dict.fromkeys(model.groups, 1.)

    def losses_and_features(names):  # these fields are another row's
        _, loss, quarter = train_ldm.predictions(model.denoiser, latents, model.schedule, len(rows),
                                                 names)
        request = own | {name: other[name] for name in names}
        return loss, quarter, measure(ask(run, request, range(len(few)), args, guidance=ones))
    loss, quarter, features_before = losses_and_features(())
    sets = {f.name: [f.name] for f in model.fields} | {
        f"all of {g}": [f.name for f in model.fields if f.group == g] for g in model.groups}
    for name, names in sets.items():
        loss_after, _, features_after = losses_and_features(names)
        rise = loss_after - loss
        e = table[name] = plain({
            "rise": rise.mean(), "error": rise.std() / len(rise) ** .5,
            "by_noise": [rise[quarter == q].mean() for q in range(4)],
            "features": (features_after - features_before).square().mean().sqrt()})
        if e["rise"] <= 2 * e["error"]:
            print(f"warning: {name} is hardly used, or another field tells as much")
    print_table("taken from another row", {
        "loss rises by": ".4f", "+-": ".4f", "at little noise": ".4f", "less": ".4f",
        "more": ".4f", "most": ".4f", "features move": ".2f"}, [
        (name, e["rise"], e["error"], *e["by_noise"], e["features"]) for name, e in table.items()])
    write_report(folder_of(args) / "conditions.json", args, {
        "sha1": run.sha1, "loss": loss.mean(), "table": table})


def encoders(args):
    """The same small model with each molecule encoder, on seen molecules, unseen substituents and
    unseen scaffolds at doses above half effect: the share of mechanisms that is recognised, and the
    correlation across molecules of mean features with those of true images of other wells."""
    out, settings, figures = Path(args.out or "runs/encoders"), {}, ("mechanism", "correlation")
    kinds = {"seen molecules": "train"} | {HELD_OUT[k]: k for k in (
        "test_substituent", "test_scaffold")}
    if args.quick:
        args = replace(args, train_steps=300, seeds=args.seeds[:1], images=96)

    def measure(path, sha1):
        run, line = open_run(path), {}
        body, classifier = morphology(run, args.nucleus_radius), reference_classifier(run)
        columns, molecule = run.manifest.columns, conditions_of(run.manifest, ("smiles",))
        strong = np.array(columns["true_effect"], float) >= .5
        for kind, split in kinds.items():
            rows = np.flatnonzero(strong & (np.array(columns["split"]) == split))
            a, b = split_wells(run.manifest, rows, molecule, args.images)
            table, _ = quality_line(run, a, b, molecule, body, classifier, args, {"generated": {}})
            for k in figures:
                line[f"{kind}: {k}"] = table["generated"].get(k)
                line[f"{kind}: {k}, best"] = table[BEST].get(k)
        return line
    for name, seed in product(args.names, args.seeds):
        path = train_vae.train_if_missing(train_ldm.train, train_ldm.Config(
            out=str(out / f"{name}-{seed}-{args.train_steps}"), seed=seed, steps=args.train_steps,
            molecule_encoder=name))
        settings[f"{name}, {seed}"] = dict(path=str(path), sha1=file_hash(path))
    lines = study(out / "encoders.jsonl", settings, measure, digest(args))
    names = [f"{kind}: {figure}" for figure in figures for kind in kinds]
    print_table("", dict.fromkeys(names, ".2f"), [
        (line["label"], *map(line.get, names)) for line in lines] + [
        (BEST, *(lines[0].get(f"{name}, best") for name in names))])


# --- 9. control: does a ControlNet draw these very cells? -----------------------------------------

@dataclass
class Control(Asked):
    images: int = 128           # held-out images to draw
    samples: int = 8            # of each image: their mean is shown as well
    by: tuple = ()              # columns that make a condition (plate, for control_row)
    regression_steps: int = 1200  # of the baseline, a regression in pixels


def regression(x, y, shown, steps, batch=16):
    """Images for conditioning images `shown` from a plain U-Net in pixels, without noise, trained
    by L1 on pairs of conditioning images and images x, y (N, C, H, W)."""
    torch.manual_seed(0)
    channels = max(x.shape[1], y.shape[1])
    unet = UNet(UNetConfig(4 * channels, 48, (1, 2, 2), 1, (False,) * 3, embedding=64, token=16))
    unet.to(device())

    def predict(x):
        x, n = F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1])).to(device()), len(x)
        nothing = x.new_zeros(n, 64), x.new_zeros(n, 1, 16), x.new_ones(n, 1, dtype=torch.bool)
        with autocast():
            y_hat = unet(F.pixel_unshuffle(x, 2), x.new_zeros(n), *nothing)
            return F.pixel_shuffle(y_hat, 2)[:, :y.shape[1]]

    def loss_of(rng):
        chosen, turns = rng.integers(len(x), size=batch), int(rng.integers(4))
        a, b = (torch.rot90(v[chosen], turns, (2, 3)) for v in (x, y))
        return (predict(a) - b.to(device())).abs().mean()
    fit(unet, loss_of, steps, 2e-3, 0, "regression")
    with torch.no_grad():
        return torch.cat([predict(part).clamp(-1, 1).cpu() for part in shown.split(64)])


def drawn_sets(run, args, rows, training, same_cells):
    """({name: images} of every way to draw these rows, the conditioning images). training: rows for
    the regression. same_cells: the conditioning images show the cells themselves."""
    model, n, asked = run.model, len(rows), told(run.model, records(run.manifest, rows))
    true, others, hint = run.images(rows), run.images(training), hint_of(model, run, rows)
    draws = torch.stack([ask(run, asked, range(k * n, (k + 1) * n), args, hint)
                         for k in range(args.samples)])
    sets = {"true": true, "through the autoencoder": reconstruct(model.vae, true)[0],
            "ControlNet": draws[0], f"ControlNet, mean of {args.samples}": draws.mean(0),
            "without the conditioning image": ask(run, asked, range(n), args),
            "mean image": others.mean(0, keepdim=True).expand_as(true)}
    if same_cells:
        sets["regression"] = regression(hint_of(model, run, training)[0], others, hint[0],
                                        args.regression_steps)
    if same_cells and model.controlnet["stains"]:  # they are untreated
        own = asked | {f.name: ["0"] * n for f in dose_fields(model.fields)}
        sets["edited"] = model.edit(hint[0], own, asked, args.guidance, args.form,
                                    interval=args.interval)
    if hint[0].shape[1] in (1, len(model.channels)):
        sets["conditioning image itself"] = hint[0].expand_as(true)
    return sets, hint[0]


def intensity_error(x, y, conditions):
    """{condition: error of the log of the mean intensity of images x beside y}, both (N, C, H, W)
    in [-1, 1], averaged over channels: how far off the style of a plate is."""
    def levels(v, i):
        return ((v[i] + 1) / 2).mean((0, 2, 3)).clamp(min=1e-6).log()
    return {c: (levels(x, i) - levels(y, i)).abs().mean() for c, i in grouped(conditions).items()}


def control(args):
    """The table of `evaluate.py control`: a line for every way to draw held-out images."""
    if args.quick:
        args = replace(args, images=min(args.images, 32), samples=min(args.samples, 2),
                       regression_steps=min(args.regression_steps, 120))
    run, out = open_run(args), folder_of(args)
    model, m, rows, hinted = run.model, run.manifest, run.held, run.model.controlnet
    if not hinted:
        raise UserError(f"{args.checkpoint} has no ControlNet: train one with python train_ldm.py "
                        "--control_column NAME")
    style = hinted["column"] == "control_row"
    if style and "control_row" not in m.columns:
        raise UserError(f"{m.path} has no column control_row: python data.py controls writes it")
    conditions = conditions_of(m, args.by or (("plate",) if style else ("true_mechanism", "batch")))
    if hinted["stains"] and not style:  # the cells are shown untreated: rows whose treatment shows
        effect, untreated = m.columns.get("true_effect"), data.negative_controls(m.columns)
        rows = [i for i in rows if not untreated[i] and (not effect or float(effect[i]) >= .5)]
    apart, others = split_wells(m, rows, conditions, args.images, crop=run.settings.crop)
    if not len(apart):
        raise UserError("too few held-out images of each condition: hold out more (--split of "
                        "train_vae.py), or name other columns with --by")
    rng, most = np.random.default_rng(0), 2 ** 23 // math.prod(model.size)
    training = np.resize(rng.permutation(run.train), most if run.settings.crop else len(run.train))
    # distances need wells apart; to compare with its own cells any image will do
    rows = np.r_[apart, rng.permutation(np.setdiff1d(rows, apart))][:max(args.images, len(apart))]
    sets, hint = drawn_sets(run, args, rows, training[:most], not style)
    measure, classifier = morphology(run, args.nucleus_radius), reference_classifier(run)
    table = distance_table({name: measure(x[:len(apart)]) for name, x in sets.items()},
                           measure(run.images(others)), conditions[apart], conditions[others])
    true, count = sets["true"], count_nuclei(sets["true"], model.channels, args.nucleus_radius)
    for name, x in sets.items():
        nuclei = count_nuclei(x, model.channels, args.nucleus_radius)
        table[name] |= compare((x + 1) / 2, (true + 1) / 2) | {
            "nuclei_error": (nuclei - count).abs().mean() / count.mean(),
            "nuclei_bias": nuclei.mean() / count.mean() - 1,
            "log_intensity": intensity_error(x, true, conditions[rows])} | {
            k: hits.nanmean() for k, hits in recognised(classifier, x, records(m, rows)).items()}
    table = plain(table)
    columns = ("l1", "psnr", "ssim", "pearson", "spectrum", "nuclei_error", "nuclei_bias")
    print_table(f"{len(rows)} images, distance of {len(apart)}", dict.fromkeys(
        (*columns, "log intensity", "distance (5-95 %)", "mechanism"), ".3g"), [
        (name, *(np.mean(e[k]) for k in columns), np.mean([*e["log_intensity"].values()]),
         (e["distance"], e["distance_interval"]), e.get("mechanism"))
        for name, e in table.items()])
    shown = {"conditioning image": hint if hint.shape[1] == len(model.channels) else hint[:, 0]} | {
        name: x for name, x in sets.items() if not {"mean", "itself", "through"} & {*name.split()}}
    data.picture(out / "control.png", [list(x[::len(x) // 8 or 1][:8].numpy()) for x in
                 shown.values()], model.channels, list(shown), pixel_um=model.pixel_um)
    write_report(out / "control.json", args, {"sha1": run.sha1, "column": hinted["column"],
                                              "table": table}, "control.png")


# --- 10. vae: which latent space? -----------------------------------------------------------------

SPACES = ("", "latent_channels=2", "latent_channels=8", "downsampling=2 latent_channels=1",
          "downsampling=8 latent_channels=16", "kl_weight=1e-4", "kl_weight=1e-1", "width=16",
          "spectral_weight=0.3")
FIXED = {"data", "out", "steps", "resume", "overwrite", "help"}  # what no autoencoder may set


@dataclass
class LatentSpaces(Options):
    data: str = train_vae.Config.data  # the manifest
    out: str = "runs/latent_spaces"  # trained models and lines of figures go here
    configs: tuple = SPACES     # changes to the settings of train_vae.py, an autoencoder each
    train_steps: int = 1500     # of each autoencoder
    images: int = 384           # held-out images


def measure_latents(path, sha1, images, nucleus_radius):
    """How well an autoencoder keeps held-out images (fewer of large ones), beside the L1 of images
    made small and large again that hold as many numbers. features: their mean correlation."""
    run = open_run(path, "vae")
    vae, most = run.model.vae, max(8, 2 ** 21 // math.prod(run.views.shape[1:]))
    held = np.random.default_rng(0).permutation(run.held)
    rows = np.resize(held, min(images, most if run.settings.crop else len(held)))[:most]
    x = run.images(rows)
    (x_hat, kl), numbers = reconstruct(vae, x), vae.to_latent(x[:1].to(device())).numel()
    a, b = (features(v, run.model.channels, max(1, 2 ** 18 // x[0, 0].numel()), nucleus_radius)
            for v in (x, x_hat))
    found = compare((x_hat + 1) / 2, (x + 1) / 2) | recognised(
        reference_classifier(run), x_hat, records(run.manifest, rows)) | {
        "l1, made small": (x - shrunk(x, numbers)).abs() / 2,
        # of those that vary among the originals; 0 where they do no longer
        "features": correlations(a, b).nan_to_num(0.)[~correlations(a, a).isnan()]}
    return {"numbers": numbers, "kl": kl.mean(), "images": len(x)} | {
        name: values.nanmean() for name, values in found.items()}


def latent_spaces(args):
    """The table of `evaluate.py vae`: autoencoders of several shapes, weights and losses, each
    trained for the same number of steps."""
    if args.quick:
        args = replace(args, train_steps=150, images=96)
    out, configs, lines = Path(args.out), {}, []
    for words in map(str.split, args.configs):
        if taken := {word.partition("=")[0] for word in words} & FIXED:
            raise UserError(f"--configs {min(taken)}: no setting of an autoencoder")
        label = ",".join(words) or "default"
        configs[label] = train_vae.settings(train_vae.Config, [
            f"--steps={args.train_steps}", f"--data={args.data}",
            f"--out={out}/{label}-{args.train_steps}", *(f"--{word}" for word in words)])
    for label, config in configs.items():
        path = str(train_vae.train_if_missing(train_vae.train, config))
        setting = dict(path=path, sha1=file_hash(path), images=args.images,
                       nucleus_radius=args.nucleus_radius)
        lines += study(out / "vae.jsonl", {label: setting}, measure_latents, args.data)
    columns = [k for k in lines[0] if k not in ("key", "label", "setting", "images")]
    print_table("", dict.fromkeys(columns, ".4g"), [
        (line["label"], *map(line.get, columns)) for line in lines])
    print(f"wrote {out}/vae.jsonl")


# --- 11. mol2image: the benchmark of Yang et al. 2021, whose code was not released ----------------

BINOMIAL = torch.tensor([1., 4., 6., 4., 1.]) / 16
FAMILIES = {"coverage": ("coverage",), "count": ("nuclei",), "size": ("area", "area_spread"),
            "intensity": ("_mean", "_bright", "_in_nucleus", "_near_nucleus")}  # endings of names


@dataclass
class Mol2Image(Asked):
    images: int = 192           # of each set
    train_steps: int = 1000     # of the network that tells whether molecule and image match


def laplacian_pyramid(x, smallest=16):
    """Bands of images (N, C, H, W), finest first, the last the low-pass rest at `smallest` pixels:
    5x5 binomial kernel, mirrored borders (Burt & Adelson 1983)."""
    if min(x.shape[2:]) < 2 * smallest:
        return [x]
    small, apart = blur(x, BINOMIAL)[:, :, ::2, ::2], torch.zeros_like(x)
    apart[:, :, ::2, ::2] = small
    return [x - 4 * blur(apart, BINOMIAL), *laplacian_pyramid(small, smallest)]


def wasserstein(a, b):
    """Wasserstein-1 distance (...) of samples (..., n): the mean distance of sorted values."""
    return (a.sort(-1).values - b.sort(-1).values).abs().mean(-1)


def sliced_wasserstein(a, b, count=128, side=7, directions=4 * 128):
    """Sliced Wasserstein distance x 1000 by level, finest first, of equally many images on [0, 1]
    (Karras et al. 2018, arXiv:1710.10196, section 5): of random patches, along random directions.
    Each set is standardised by itself, per channel, which makes it blind to brightness."""
    found, image = [], torch.arange(len(a))[:, None]
    for level, bands in enumerate(zip(*(laplacian_pyramid(255 * x) for x in (a, b)))):
        h, w = (n - side + 1 for n in bands[0].shape[2:])
        y, x = (torch.from_numpy(v) for v in np.divmod(np.stack([np.random.default_rng(
            (k, level)).integers(h * w, size=count) for k in range(len(a))]), w))  # (N, count)
        samples, rng = [], torch.Generator().manual_seed(0)
        for band in bands:
            windows = band.unfold(2, side, 1).unfold(3, side, 1)         # (N, C, h, w, side, side)
            patches = windows[image, :, y, x].flatten(0, 1)              # (N count, C, side, side)
            std, mean = torch.std_mean(patches, (0, 2, 3), correction=0, keepdim=True)
            samples.append(((patches - mean) / std.clamp(min=1e-8)).flatten(1).T)
        u = F.normalize(torch.randn(directions, len(samples[0]), generator=rng), dim=1)
        found.append(1000 * wasserstein(*(u @ points for points in samples)).mean().item())
    return found


def zernike_moments(labels):
    """Sizes of the 30 Zernike moments up to order 9 of each object, (B, L - 1, 30): sums of the
    polynomials (Zernike 1934) over it, on the disc about its centre of mass that encloses it, over
    the disc's area: turning changes nothing. NaN for missing objects and those the border cuts."""
    (area, cut), own = areas(labels), labels.flatten(1)
    y, x = (v.expand_as(labels).float() for v in torch.meshgrid(
        *(torch.arange(n, device=labels.device) for n in labels.shape[1:]), indexing="ij"))

    def of_pixel(value):                                                 # (B, L) to (B, H, W)
        return value.gather(1, own).view_as(labels)
    dy, dx = (v - of_pixel(per_object(labels, v) / area.clamp(min=1)) for v in (y, x))
    r, theta, moments = torch.hypot(dy, dx), torch.atan2(dy, dx), []
    radius = torch.zeros_like(area).scatter_reduce(1, own, r.flatten(1), "amax") + .5
    rho = r / of_pixel(radius)
    for n, m in ((n, m) for n in range(10) for m in range(n % 2, n + 1, 2)):
        radial = sum((-1) ** k * math.comb(n - k, k) * math.comb(n - 2 * k, (n - m) // 2 - k)
                     * rho ** (n - 2 * k) for k in range((n - m) // 2 + 1))
        parts = (per_object(labels, radial * f(m * theta)) for f in (torch.cos, torch.sin))
        moments.append(torch.hypot(*parts) / (math.pi * radius ** 2))
    whole = ((area > 0) & ~cut)[:, :, None]
    return torch.where(whole, torch.stack(moments, 2), torch.nan)[:, 1:]


def families(images, channels, radius):
    """{family: (N, features)} of images (N, C, H, W) in [-1, 1], grouped as Mol2Image groups
    CellProfiler's: features of section 1, and mean Zernike moments of an image's nuclei."""
    found, names = features(images, channels, radius=radius), feature_names(channels)
    dna = (images[:, channels.index("DNA") if "DNA" in channels else 0] + 1) / 2
    return {family: found[:, [k for k, name in enumerate(names) if name.endswith(endings)]]
            for family, endings in FAMILIES.items()} | {"Zernike shape": torch.cat([
                zernike_moments(segment_nuclei(x, radius)).nanmean(1) for x in dna.split(64)])}


def family_correlations(a, b, of_a, of_b, images=...):
    """{family: Pearson correlation} of families of two sets, of these images: averaged over those
    of a molecule, of_a and of_b (N,), correlated over molecules, averaged over the features."""
    def means(found, molecule):
        return torch.stack([found[images][i].nanmean(0)
                            for i in grouped(molecule[images]).values()])
    return {family: correlations(means(a[family], of_a), means(b[family], of_b)).nanmean().item()
            for family in a}


def train_correspondence(read, graphs, molecule, steps, batch=32, width=512):
    """scores(images (N, C, H, W), graphs (M, ...)), (N, M), of whether they belong together: the
    product of a residual network of the image and message passing of the molecule. Trained by
    cross-entropy on all pairs of a batch, half of the weight on matched ones. read(places): images;
    molecule (N,): of each place, its index in graphs."""
    torch.manual_seed(0)
    parts = nn.ModuleList([Backbone(read([0]).shape[1], width),
                           MOLECULE_ENCODERS["graph"]({}, width, 16)]).to(device())

    def scores(x, graphs):
        with autocast():
            a, b = parts[0](x.to(device())), parts[1](graphs.to(device()))[0]
        return a.float() @ b.float().T / width ** .5

    def loss_of(rng):
        chosen, turns = rng.integers(len(molecule), size=batch), int(rng.integers(4))
        out = scores(torch.rot90(read(chosen), turns, (2, 3)), graphs[molecule[chosen]])
        matched = torch.from_numpy(molecule[chosen][:, None] == molecule[chosen]).to(out)
        weight = matched / matched.sum() + (1 - matched) / (1 - matched).sum().clamp(min=1)
        return F.binary_cross_entropy_with_logits(out, matched, weight / 2, reduction="sum")
    fit(parts, loss_of, steps, 1e-3, 0, "correspondence")
    return torch.no_grad()(scores)


def hits(scores, molecule):
    """Of scores (N, M) of images with molecules, molecule (N,) the true ones: {"pairs": (N,) share
    that is told right, above 0 for the true one, and with equal weight not above 0 for the others;
    "top-1", "top-5", "top-10": (N,) whether the true one is among the first, alone}."""
    true = scores.gather(1, torch.from_numpy(molecule)[:, None])         # (N, 1)
    wrong = ((scores > 0).sum(1) - (true[:, 0] > 0).int()) / (scores.shape[1] - 1)
    place = (scores >= true).sum(1)
    return {"pairs": ((true[:, 0] > 0) + 1 - wrong) / 2} | {
        f"top-{k}": (place <= k).float() for k in (1, 5, 10)}


def benchmark_sets(label):
    """{name: rows} of what is not trained on, from the column split: Mol2Image's sets whose names
    say easy (unseen images of training molecules) or hard (unseen molecules), or a screen's."""
    sets = {name: [name] for name in sorted({*label}) if "easy" in name or "hard" in name} or {
        "easy": ["val"], "hard": ["test_substituent", "test_scaffold"]}
    return {name: np.flatnonzero(np.isin(label, values)) for name, values in sets.items()}


def two_wells(rows, treatments, wells, limit):
    """(a, b), about `limit` each: of one treatment of each molecule those of the rows that lie in
    one well, and as many of any from others. treatments: (molecule, dose) of all rows there are."""
    rng, everywhere, a, b = np.random.default_rng(0), grouped(treatments), [], []
    of_molecule = list(grouped([treatments[i][0] for i in rows]).values())
    for k in rng.permutation(len(of_molecule)):
        own = rng.permutation(rows[of_molecule[k]])
        own, first = own[wells[own] == wells[own[0]]], own[0]
        others = [j for j in everywhere[treatments[first]] if wells[j] != wells[first]]
        n = min(len(own), len(others), limit - len(a))
        a, b = [*a, *own[:n]], [*b, *rng.permutation(others)[:n]]
    return np.array(a, int), np.array(b, int)


def mol2image(args):
    """The tables of `evaluate.py mol2image`, each set beside true images of the same treatments."""
    if args.quick:
        args = replace(args, images=min(args.images, 96), train_steps=min(args.train_steps, 300))
    run, out, report, pictures = open_run(args), folder_of(args), {}, {}
    model, m, ones = run.model, run.manifest, dict.fromkeys(run.model.groups, 1.)
    names = [f.name for f in model.fields if f.kind == "molecule"][:1]
    if not names:
        raise UserError(f"{args.checkpoint} was told no molecule")
    treatments = conditions_of(m, names + [f.name for f in dose_fields(model.fields)][:1])
    smiles, number = np.unique([t[0] for t in treatments], return_inverse=True)
    dose = np.array([float(t[1] or 0) if t[1:] else 1. for t in treatments])
    usable = np.flatnonzero((4 * dose >= dose.max()) & (smiles[number] != ""))
    graphs = MOLECULE_ENCODERS["graph"]({}, 8, 8).featurise([text or "C" for text in smiles])
    seen = np.intersect1d(run.train, usable)
    if not len(seen):
        raise UserError(f"{m.path}: no training row has a molecule at a dose above 0")
    scores = train_correspondence(lambda k: run.images(seen[k]), graphs, number[seen],
                                  args.train_steps)
    measure = functools.partial(families, channels=model.channels, radius=args.nucleus_radius)
    for name, rows in benchmark_sets(m.columns.get("split", [""] * len(m))).items():
        a, b = two_wells(np.intersect1d(rows, usable), treatments, wells_of(m), args.images)
        molecules, own = np.unique(number[a], return_inverse=True)
        if len(molecules) < 3:
            raise UserError(f"{m.path}: no three {name} molecules, held out and in two wells")
        true, asked = run.images(a), told(model, records(m, a))
        sets = {"another well": run.images(b),
                "generated, scale 1": ask(run, asked, range(len(a)), args, guidance=ones),
                "generated": ask(run, asked, range(len(a)), args)}
        pictures[name], of_true, table = {"true": true} | sets, measure(true), {}
        sets["another well, molecules exchanged"] = sets["another well"]
        for kind, x in sets.items():  # chance: those of each molecule pass for another's
            given = (own + len(molecules) // 2) % len(molecules) if "exchanged" in kind else own
            correlate = functools.partial(family_correlations, measure(x), of_true, given, own)
            told_right = hits(scores(x, graphs[molecules]), given)
            table[kind] = {"swd": sliced_wasserstein((x + 1) / 2, (true + 1) / 2)} | correlate() | {
                k: v.mean() for k, v in told_right.items()} | {
                "intervals": interval(correlate, given, 0 * given)}
        report[name] = table = plain(table)
        columns = [k for k in table["generated"] if k != "intervals"]
        print_table(f"{name}: {len(a)} images, {len(molecules)} molecules",
                    dict.fromkeys(columns, ".3g"), [
            (kind, *(np.array(e[k], float).mean() for k in columns)) for kind, e in table.items()])
    draw_sets(out / "mol2image.png", pictures, model)
    write_report(out / "mol2image.json", args, {"sha1": run.sha1, "table": report}, "mol2image.png")


# --- The command line -----------------------------------------------------------------------------

STUDIES = ("model", "scales", "forms", "samplers", "models", "shortcut", "transfer")
QUESTIONS = {"quality": (quality, Quality), "disentangle": (disentangle, Disentangle),
             "conditions": (conditions, Conditions),
             "control": (control, Control), "vae": (latent_spaces, LatentSpaces),
             "mol2image": (mol2image, Mol2Image)}


def main():
    name, *words = sys.argv[1:] or [""]
    if name not in QUESTIONS:
        print(__doc__)
        sys.exit(0 if name in ("-h", "--help") else 2)
    question, config = QUESTIONS[name]
    args = train_vae.settings(config, words, {"form": FORMS, "sampler": SAMPLERS, "study": STUDIES})
    trains = getattr(args, "study", "") in ("models", "shortcut") or getattr(args, "encoders", 0)
    if trains and (args.checkpoint, args.data) != (config.checkpoint, config.data):
        raise UserError("models are trained for this: it has no use for --checkpoint and --data")
    for f in fields(args):
        value = getattr(args, f.name)
        try:
            if f.name == "guidance":
                args.guidance = {g: float(s) for g, _, s in (word.partition("=") for word in value)}
            elif f.type is tuple and f.default and not isinstance(f.default[0], str):
                setattr(args, f.name, tuple(map(type(f.default[0]), value)))
        except ValueError:
            raise UserError(f"--{f.name} {' '.join(value)}: write numbers") from None
    levels = getattr(args, "interval", INTERVAL)
    if len(levels) != 2 or not 0 <= levels[0] <= levels[1] <= 1:
        raise UserError("--interval takes two noise levels from 0 to 1, the smaller first")
    question(args)


if __name__ == "__main__":
    train_vae.run(main)
