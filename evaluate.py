"""Questions put to a trained model, one sub-command each; every answer stands beside its floor and
its ceiling, and is written as JSON and as a figure.

    python evaluate.py quality                   # are held-out conditions drawn as they look?
    python evaluate.py quality --checkpoint runs/plates/model.pt --by compound plate
    python evaluate.py disentangle               # how much is biology, how much experiment?
    python evaluate.py conditions                # is every field used?
    python evaluate.py control --checkpoint runs/brightfield/model.pt   # these very cells?
    python evaluate.py vae                       # which latent space?

First the rulers (1 features, 2 distances, 3 a model and what it is asked for, 4 the probe, 5
keeping and showing answers), then a section for each sub-command (6 quality, 7 disentangle, 8
conditions, 9 control, 10 vae, 11 quality --mol2image); the options at the end. To add a question:
a function of args, and its entry in COMMANDS.
"""
import argparse
import functools
import hashlib
import inspect
import itertools
import json
import math
import time
from collections import defaultdict
from dataclasses import replace
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
from conditioning import MOLECULE_ENCODERS, blank_unseen, parse_number, parse_smiles
from data import figure
from diffusion import FORMS, SAMPLERS
from sample import INTERVAL, STEPS, Model, metadata
from train_vae import (UserError, at_once, autocast, device, learning_rate, load_checkpoint,
                       open_data, read_log, reconstruct, run, save_checkpoint, step_rng, views,
                       write_log)
from unet import UNet, UNetConfig
from vae import shrunk

NUCLEUS_RADIUS = 4.5  # pixels; what the segmentation looks for


# ------------------------------------------------------------------------------------------------
# 1. Morphological features, in torch, in batches
# ------------------------------------------------------------------------------------------------

def blur(x, taps):
    """Each channel of (B, C, H, W) convolved with taps (K,) along both axes, mirrored borders."""
    c, radius, taps = x.shape[1], len(taps) // 2, taps.to(x)
    x = F.pad(x, (radius,) * 4, mode="reflect")
    x = F.conv2d(x, taps.view(1, 1, 1, -1).expand(c, 1, 1, -1), groups=c)
    return F.conv2d(x, taps.view(1, 1, -1, 1).expand(c, 1, -1, 1), groups=c)


def gaussian_blur(x, sigma, radius=None):
    """Gaussian blur of (B, C, H, W)."""
    radius = radius or max(1, round(3 * sigma))
    taps = torch.exp(-torch.arange(-radius, radius + 1, device=x.device) ** 2 / (2 * sigma ** 2))
    return blur(x, taps / taps.sum())


def tally(place, bins):
    """How often each whole number below `bins` is in each row of place (R, n): (R, bins)."""
    nothing = torch.zeros(len(place), bins, dtype=torch.long, device=place.device)
    return nothing.scatter_add_(1, place, torch.ones_like(place))


def grey_levels(x, bins):
    """Of (B, H, W) on [0, 1]: (pixels at each grey level (B, bins), the levels (bins,))."""
    place = (x.flatten(1).clamp(0, 1) * (bins - 1)).round().long()
    return tally(place, bins), torch.arange(bins, device=x.device) / (bins - 1)


def best_level(score, value):
    """The grey level (B,) of the highest score (B, bins). Between two distant classes every cut is
    as good: the middle of the plateau."""
    highest = score.max(1, keepdim=True).values
    best = score >= highest - 1e-6 * highest.abs()
    return (best * value).sum(1) / best.sum(1)


def otsu(x, bins=128):
    """Threshold (B,) of (B, H, W) in [0, 1] that separates best into two classes (Otsu 1979):
    the largest variance between classes, w0 w1 (m0 - m1)^2."""
    count, value = grey_levels(x, bins)
    share = count / x[0].numel()
    w0, m0 = share.cumsum(1), (share * value).cumsum(1)                  # (B, bins)
    return best_level((m0[:, -1:] * w0 - m0) ** 2 / (w0 * (1 - w0)).clamp(min=1e-9), value)


def segment_nuclei(dna, radius=NUCLEUS_RADIUS, contrast=.06, threshold=otsu):
    """Nuclei of (B, H, W) in [0, 1]: labels (B, H, W), 0 for background, 1 .. n in each image.

    Mask by `threshold` (empty where the two classes differ by less than `contrast`), seeds at the
    local maxima of the blurred stain, labels spread from the seeds by repeated 3x3 max-pooling, and
    whole objects smaller than a sixth of a nucleus removed.
    """
    smoothed = gaussian_blur(dna[:, None], 1.)[:, 0]
    mask = smoothed > threshold(smoothed)[:, None, None]
    high = (smoothed * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)
    low = (smoothed * ~mask).sum((1, 2)) / (~mask).sum((1, 2)).clamp(min=1)
    mask &= (high - low > contrast)[:, None, None]
    peaks = gaussian_blur(dna[:, None], .36 * radius)
    ramp = torch.linspace(0, 1e-5, dna[0].numel(), device=dna.device).view_as(dna[0])
    peaks = peaks + ramp  # one seed, not many, where a saturated nucleus is flat
    window = 2 * round(.5 * radius) + 1
    seeds = (F.max_pool2d(peaks, window, 1, window // 2) == peaks)[:, 0] & mask
    labels = seeds.flatten(1).cumsum(1).view_as(seeds) * seeds           # numbered along rows
    labels = spread(labels, mask, round(3 * radius))
    return without(labels, (areas(labels) < 3.14 * radius ** 2 / 6) & ~cut_by_border(labels))


def spread(labels, mask, steps):
    """Labels (B, H, W) grown over the mask, a pixel at a step."""
    labels = labels.float()
    for _ in range(steps):
        grown = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0]
        labels = torch.where((labels == 0) & mask, grown, labels)
    return labels.long()


def per_object(labels, values):
    """Sum of values (B, H, W) over each label: (B, L), column 0 the background."""
    count = int(labels.max()) + 1
    return torch.zeros(len(labels), count, device=labels.device).scatter_add_(
        1, labels.flatten(1), values.flatten(1).float())


def areas(labels):
    """Pixels of each label: (B, L), column 0 the background."""
    return per_object(labels, torch.ones_like(labels))


def cut_by_border(labels):
    """Which objects reach the border of the field: (B, L)."""
    frame = torch.ones_like(labels)
    frame[:, 1:-1, 1:-1] = 0
    return per_object(labels, frame) > 0


def whole_objects(labels):
    """1 for each object that is there and not cut by the border, else NaN: (B, L)."""
    return torch.where((areas(labels) > 0) & ~cut_by_border(labels), 1., torch.nan)


def without(labels, objects):
    """Labels (B, H, W) with these objects, (B, L) bool, made background."""
    return labels * ~objects.gather(1, labels.flatten(1)).view_as(labels)


def count_objects(labels):
    """Objects per image (B,). One that the border cuts counts if it shows at least half the mean
    area of the image's whole ones, so that its centre lies inside (half where none is whole)."""
    area, cut = areas(labels)[:, 1:], cut_by_border(labels)[:, 1:]
    mean = (area * whole_objects(labels)[:, 1:]).nanmean(1, keepdim=True)
    inside = torch.where(mean.isnan(), .5, (area >= mean / 2).float())
    return ((area > 0) * torch.where(cut, inside, 1.)).sum(1)


def object_shapes(labels):
    """Area in pixels and eccentricity of each object from second moments: (B, L - 1) each, NaN
    where an image has fewer objects and where the border cuts one."""
    h, w = labels.shape[1:]
    y, x = (v.expand_as(labels).float() for v in torch.meshgrid(
        torch.arange(h, device=labels.device), torch.arange(w, device=labels.device),
        indexing="ij"))
    area = areas(labels)

    def mean(values):
        return per_object(labels, values) / area.clamp(min=1)
    my, mx = mean(y), mean(x)
    yy, xx = mean(y * y) - my ** 2 + 1 / 12, mean(x * x) - mx ** 2 + 1 / 12  # a pixel is a square
    xy = mean(x * y) - mx * my
    root = ((xx - yy) ** 2 / 4 + xy ** 2).clamp(min=0).sqrt()
    large, small = (xx + yy) / 2 + root, (xx + yy) / 2 - root
    eccentricity = (1 - small / large).clamp(0, 1).sqrt()
    whole = whole_objects(labels)
    return (area * whole)[:, 1:], (eccentricity * whole)[:, 1:]


def channel(channels, name):
    """The place of a stain among the channels; the first where it is not there."""
    return channels.index(name) if name in channels else 0


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
    found = []
    for x in images.split(batch):
        x = (x.to(device()).float() + 1) / 2
        labels = segment_nuclei(x[:, channel(channels, "DNA")], radius)
        area, eccentricity = object_shapes(labels)
        size = area.nanmean(1)
        size_spread = (area - size[:, None]).square().nanmean(1).sqrt()
        total = gaussian_blur(x.mean(1, keepdim=True), 1.)[:, 0]
        coverage = (total > otsu(total)[:, None, None]).float().mean((1, 2))
        nuclear = torch.stack([count_objects(labels), size, size_spread, eccentricity.nanmean(1),
                               coverage], 1)

        flat = x.flatten(2)                                              # (B, C, HW)
        inside = (labels > 0).float()[:, None]                           # (B, 1, H, W)
        r = round(radius)
        ring = F.max_pool2d(inside, 2 * r + 1, 1, r) - inside
        per_channel = [flat.mean(2), flat.std(2), flat.quantile(.99, dim=2)] + [
            (x * where).sum((2, 3)) / where.sum((2, 3)) for where in (inside, ring)]
        scales = [x, *(gaussian_blur(x, s) for s in (1., 2., 4.))]
        per_channel += [(fine - coarse).square().mean((2, 3)).add(1e-6).log()
                        for fine, coarse in itertools.pairwise(scales)]
        centred = flat - flat.mean(2, keepdim=True)
        unit = centred / centred.norm(dim=2, keepdim=True).clamp(min=1e-6)
        correlation = unit @ unit.transpose(1, 2)                        # (B, C, C)
        i, j = torch.triu_indices(len(channels), len(channels), 1)
        found.append(torch.cat([nuclear, *per_channel, correlation[:, i, j]], 1))
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


def mean_distance(pairs):
    """Kernel distance averaged over pairs of features; NaN of none."""
    return float(np.mean([kernel_distance(a, b) for a, b in pairs] or [np.nan]))


def cell_distance(a, b, cells_a, cells_b):
    """Kernel distance per condition cell, averaged over cells."""
    return mean_distance((a[cells_a == name], b[cells_b == name])
                         for name in sorted(set(cells_a) & set(cells_b)))


def wrong_cell_distance(a, b, cells_a, cells_b):
    """The ceiling: kernel distance of each cell to the cells that differ from it in every part of
    their name ("golgi x B2" and "actin x B3"), what images that obey the wrong condition get."""
    names = sorted(set(cells_a) & set(cells_b))
    return mean_distance((a[cells_a == one], b[cells_b == other]) for one in names
                         for other in names if all(x != y for x, y in zip(one.split(" x "),
                                                                          other.split(" x "))))


def half_samples(statistic, whole, half, repeats=100):
    """{name: 5 to 95 %} of statistic(sample), a dict of numbers, over samples half(rng) of half of
    the whole, drawn without replacement: a half varies about the whole as the whole varies about
    the population. About the estimate from the whole: with few wells the halves lie off it."""
    rng, estimates = np.random.default_rng(0), statistic(whole)
    samples, found = [statistic(half(rng)) for _ in range(repeats)], {}
    for name, estimate in estimates.items():
        values = np.array([sample[name] for sample in samples])
        values = values[~np.isnan(values)] if np.isfinite(values).any() else [np.nan]
        found[name] = (estimate + np.percentile(values, (5, 95)) - np.mean(values)).tolist()
    return found


def over_wells(statistic, wells, strata):
    """half_samples of statistic(mask): half of the wells in each stratum (condition cell and half
    of the sample), rounded up, so that no cell falls out."""
    inside = [np.unique(wells[strata == s]) for s in np.unique(strata)]

    def half(rng):
        return np.isin(wells, np.concatenate([rng.permutation(w)[:math.ceil(len(w) / 2)]
                                              for w in inside]))
    return half_samples(statistic, np.ones(len(wells), bool), half)


def over_seeds(statistic, seeds):
    """half_samples of statistic(indices): half of the seeds."""
    return half_samples(statistic, torch.arange(seeds), lambda rng: torch.from_numpy(
        np.sort(rng.permutation(seeds)[:max(2, seeds // 2)])))


def variance_ratio(a, b, conditions_a, conditions_b):
    """Variance of features among images of one condition, a over b, summed over features and
    averaged over conditions: below 1 the images of a condition are too alike (mode collapse)."""
    def within(x, conditions):
        groups = [x[conditions == name] for name in np.unique(conditions)]
        return torch.tensor([g.var(0).sum() for g in groups if len(g) > 1]).mean()
    return (within(a, conditions_a) / within(b, conditions_b)).item()


def correlations(p, q):
    """Pearson correlation (F,) of the columns of two (M, F), rows with NaN in either left out; NaN
    where fewer than three are left or a column does not vary."""
    kept = p.isfinite() & q.isfinite()
    p, q = (torch.where(kept, v.double(), torch.nan) for v in (p, q))
    p, q = ((v - v.nanmean(0)).nan_to_num(0.) for v in (p, q))
    size = p.norm(dim=0) * q.norm(dim=0)
    return torch.where((kept.sum(0) > 2) & (size > 1e-12), (p * q).sum(0) / size, torch.nan)


# ------------------------------------------------------------------------------------------------
# 3. A model, its data, and what it is asked for
# ------------------------------------------------------------------------------------------------

def open_model(args):
    """The model and the data its autoencoder was trained on (or --data)."""
    model = Model.load_for_use(args.checkpoint)
    settings = model.content["vae"]["settings"] | {
        "data": args.data or model.content["settings"]["data"]}
    if not 1 <= args.steps <= model.schedule.T:
        raise UserError(f"--steps {args.steps}: between 1 and {model.schedule.T}")
    model.weights(args.guidance)
    opened = open_data(SimpleNamespace(**settings), draw=False)
    opened.model = model
    train_ldm.check_manifest(model, opened.manifest)
    return opened


def open_trained(args, path):
    """As open_model, for a checkpoint that a study has trained."""
    return open_model(SimpleNamespace(checkpoint=str(path), data=None, steps=args.steps,
                                      guidance={}))


def trained(config):
    """Train a diffusion model unless it is there, going on from where it was interrupted."""
    path = Path(config.out) / "model.pt"
    config.resume = path.exists() and load_checkpoint(path, "ldm", "")["step"] < config.steps
    return train_ldm.train(config)


def real_images(opened, rows, rng=None):
    """Images (N, C, H, W) in [-1, 1] of rows of the manifest: as `views`."""
    return views(opened.pixels, rows, opened.settings, opened.model.intensity, rng)


def morphology(opened, radius=NUCLEUS_RADIUS, count=1000):
    """measure(images): their features, standardised by at most `count` real training images."""
    channels = opened.model.channels
    some = np.random.default_rng(0).permutation(opened.train)[:count]
    standardise = Standardise(features(real_images(opened, some), channels, radius=radius))
    return lambda images: standardise(features(images, channels, radius=radius))


def records(manifest, rows):
    """Rows of a manifest as dicts."""
    return [{name: values[i] for name, values in manifest.columns.items()} for i in rows]


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


def request_of(args, model, guidance=None, **changes):
    """How images are asked for, in the words of Model.generate: as the command line says, with the
    changes of a study, of whose `guidance` only the weights of groups that the model has count."""
    words = {k: v for k, v in vars(args).items() if k in (
        "form", "interval", "rescale", "steps", "sampler")} | changes
    asked = args.guidance if guidance is None else {
        g: w for g, w in guidance.items() if g in model.groups}
    return words | {"guidance": model.weights(asked), "interval": tuple(words["interval"])}


def columns_of(rows, fields):
    """Rows, dicts, as a request {field: [strings]}; what a row does not say is unknown."""
    return {f.name: [str(row.get(f.name, "")) for row in rows] for f in fields}


def generate(model, columns, seeds, request):
    """Images of a request, in bf16 where that pays. What is asked for twice (of a model that is
    told no batch, the same in every batch) is drawn once."""
    keys, first = list(zip(seeds, *columns.values())), {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    with autocast():
        images = model.generate({k: [v[i] for i in first.values()] for k, v in columns.items()},
                                [seeds[i] for i in first.values()], **request)
    place = {key: k for k, key in enumerate(first)}
    return images[[place[key] for key in keys]]


# ------------------------------------------------------------------------------------------------
# 4. A probe: which mechanism, which batch is this?
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


def fit(network, loss_of, steps, lr, seed, what):
    """Train a network in place. loss_of(rng): the loss of one step, which draws from rng alone."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=.02)
    for step in tqdm(range(steps), desc=f"training the {what}", mininterval=1):
        optimiser.param_groups[0]["lr"] = learning_rate(step, steps, lr)
        rng, _ = step_rng(seed, step)
        loss = loss_of(rng)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval()


def train_probe(images, answers, labels, steps, seed=0, weights=None, batch=32):
    """Train a Probe on images (N, C, H, W) with labels {question: (N,) long}, drawn with equal
    probability or by `weights` (N,)."""
    torch.manual_seed(seed)
    probe = Probe(images.shape[1], answers).to(device())

    def loss_of(rng):
        chosen = torch.from_numpy(rng.choice(len(images), batch, p=weights))
        x = torch.rot90(images[chosen], int(rng.integers(4)), (2, 3))
        x = x.flip(3) if rng.random() < .5 else x
        with autocast():
            out = probe(x.to(device()))
        return sum(F.cross_entropy(out[q].float(), labels[q][chosen].to(device())) for q in labels)
    return fit(probe, loss_of, steps, 2e-3, seed, "probe")


@torch.no_grad()
def answer(probe, images, batch=64):
    """{question: (N,) the probe's choice} for images (N, C, H, W)."""
    out = [{q: o.argmax(1).cpu() for q, o in probe(x.to(device())).items()}
           for x in images.split(batch)]
    return {q: torch.cat([o[q] for o in out]) for q in out[0]}


def read_screen(manifest):
    """The settings of the simulated screen of a manifest; None where it was not simulated."""
    note = manifest.path.parent / "simulation.json"
    return data.Screen(**json.loads(note.read_text())) if note.exists() else None


def photographs(rows, screen, intensity):
    """Fresh fields of view for rows as in data.layout: (N, C, H, W) in [-1, 1]."""
    images = np.stack([f["image"] for f in data.draw_fields(rows, screen, counterpart=False)])
    return torch.from_numpy(data.scale_intensity(images, intensity))


def probe_source():
    """The code that a probe depends on: the simulator's, and that of the training."""
    code = inspect.getsource(data)
    return code[code.index("# --- 1."):code.index("# --- 3. The manifest")] + "".join(
        inspect.getsource(f) for f in (Probe, train_probe, fit))


def screen_probe(opened, steps=1500):
    """The probe of a simulated screen: trained on fresh cells under the same microscopes without
    confounding, on controls and on doses above half effect. Kept in runs/probe.

    Returns (probe, {question: answers}), or None where the data set was not simulated.
    """
    screen, model = read_screen(opened.manifest), opened.model
    if screen is None:
        return None
    if opened.settings.binning != 1 or opened.settings.crop:
        print("the model sees binned or cropped images: no probe, it is trained on whole ones")
        return None
    screen = replace(screen, confounding=0., draw=1000)
    answers = {"true_mechanism": ["none", *data.MECHANISMS],
               "batch": [f"B{b + 1}" for b in range(screen.batches)]}
    named = f"{screen}{model.intensity}{steps}{probe_source()}"
    key = hashlib.sha1(named.encode()).hexdigest()[:12]
    path = Path("runs/probe") / f"probe-{key}.pt"
    if not path.exists():
        print("drawing an unconfounded screen to train the probe on")
        rows = [r for r in data.layout(screen) if r["role"] == "control" or r["true_effect"] >= .5]
        labels = {q: torch.tensor([a.index(r[q]) for r in rows]) for q, a in answers.items()}
        probe = train_probe(photographs(rows, screen, model.intensity), answers, labels, steps)
        save_checkpoint(path, "probe", {"weights": probe.state_dict()})
    probe = Probe(len(model.channels), answers).to(device())
    probe.load_state_dict(load_checkpoint(path, "probe", "remove it")["weights"])
    return probe.eval(), answers


def named_right(probe, images, rows):
    """{"mechanism", "batch": (N,) bool}: which images the probe names as their rows say."""
    network, answers = probe
    said = answer(network, images)
    return {q.removeprefix("true_"): torch.tensor([options[k] == r[q] for k, r in
                                                   zip(said[q], rows, strict=True)])
            for q, options in answers.items()}


def probe_scores(probe, images, rows):
    """Share of images that the probe names right: {"true_mechanism", at doses above half effect,
    "batch"}; {} without a probe."""
    if probe is None:
        return {}
    hits = named_right(probe, images, rows)
    strong = torch.tensor([float(r["true_effect"]) >= .5 for r in rows])
    return {"true_mechanism": hits["mechanism"][strong].float().mean().item(),
            "batch": hits["batch"].float().mean().item()}


# ------------------------------------------------------------------------------------------------
# 5. Keeping and showing answers
# ------------------------------------------------------------------------------------------------

class Results:
    """results.jsonl: one line per finished measurement, named by what it is a measurement of, so
    that a restart skips what is done."""

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


def folder_of(args):
    """--out, or the checkpoint's folder."""
    out = Path(args.out or Path(args.checkpoint).parent)
    out.mkdir(parents=True, exist_ok=True)
    return out


def write_report(path, args, report, *beside):
    """What was asked for and the report, as JSON; `beside`: names of files written with it."""
    path.write_text(json.dumps({"asked": vars(args), **report}, indent=1))
    print(" and ".join([f"wrote {path}", *beside]))


def print_table(title, columns, rows):
    """A table: columns {heading: format of its numbers}, rows [(label, *values)]. A value may be
    None (blank), a text, or (estimate, (low, high)), printed as "estimate (low to high)"."""
    def text(value, form):
        if isinstance(value, tuple):
            estimate, (low, high) = value
            return f"{estimate:{form}} ({low:{form}} to {high:{form}})"
        return "" if value is None else value if isinstance(value, str) else f"{value:{form}}"
    lines = [[title, *columns]] + [[label, *map(text, values, columns.values())]
                                   for label, *values in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    print()
    for label, *cells in lines:
        print(label.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:])), sep="  ")


def draw_rows(path, labels, panels):
    """Dots in rows: panels [(title, {name: [(value, interval or None) for each label]}, mark)]."""
    height = 1.6 + .28 * len(labels)
    with figure(path, 1, len(panels), figsize=(3.8 * len(panels), height), sharey=True) as axes:
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
                        bbox_to_anchor=(.5, -.45 / height))                    # below the axis
        axes[0].set_yticks(range(len(labels)), labels[::-1], fontsize=8)
        axes[0].set_ylim(-.5, len(labels) - .5)


def draw_sets(path, pictures, model):
    """A row of images for each of {name: {kind: images (N, C, H, W)}}."""
    data.picture(path, [list(x.numpy()) for kinds in pictures.values() for x in kinds.values()],
                 model.channels, [f"{name}\n{kind}" for name, kinds in pictures.items()
                                  for kind in kinds], pixel_um=model.pixel_um)


# ------------------------------------------------------------------------------------------------
# 6. quality: are held-out conditions drawn as they look?
# ------------------------------------------------------------------------------------------------

HELD_OUT = ["val", "test_pair", "test_substituent", "test_scaffold"]


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


def quality_of(opened, rows_a, rows_b, cells, measure, probe, request):
    """One line of the table: generated images under the conditions of rows_a, and the same rows
    themselves through the autoencoder, each against the real rows_b. Returns (line, images)."""
    model, manifest, wells = opened.model, opened.manifest, wells_of(opened.manifest)
    real_a, b = real_images(opened, rows_a), measure(real_images(opened, rows_b))
    sets = {"real": real_a, "autoencoder": reconstruct(model.vae, real_a)[0],
            "generated": generate(model, metadata(model.fields, manifest, rows_a),
                                  range(len(rows_a)), request)}
    cells_a, cells_b = cells[rows_a], cells[rows_b]
    strata = np.array([f"a {c}" for c in cells_a] + [f"b {c}" for c in cells_b])
    line = {"images": len(rows_a), "cells": len(set(cells_a))}
    for name, images in sets.items():
        a = measure(images)

        def distance(kept):  # (rows_a, rows_b) bool
            in_a, in_b = np.split(kept, [len(a)])
            return {"interval": cell_distance(a[in_a], b[in_b], cells_a[in_a], cells_b[in_b])}
        line[name] = {"distance": cell_distance(a, b, cells_a, cells_b),
                      **over_wells(distance, wells[np.r_[rows_a, rows_b]], strata),
                      "variance_ratio": variance_ratio(a, b, wells[rows_a], wells[rows_b])}
        line[name] |= probe_scores(probe, images, records(manifest, rows_a))
        if name == "real":
            line[name]["ceiling"] = wrong_cell_distance(a, b, cells_a, cells_b)
    return line, sets


def quality(args):
    """The table of `evaluate.py quality`."""
    opened, out = open_model(args), folder_of(args)
    model, manifest = opened.model, opened.manifest
    if args.mol2image:
        return benchmark(opened, args, out)
    if args.by:
        return quality_by_cell(opened, args, out)
    if "true_mechanism" not in manifest.columns:
        raise data.DataError(f"{manifest.path} is not simulated: say with --by which columns make "
                             "a condition, such as --by compound plate")
    limit, sets = 96 if args.quick else args.images, heldout_sets(opened, args.sets or HELD_OUT)
    cells = cells_of(manifest, ["true_mechanism", "batch"])
    probe, measure, request = screen_probe(opened), morphology(opened), request_of(args, model)
    table, pictures = {}, {}
    for name, rows in sets.items():
        rows_a, rows_b = halves(manifest, rows, cells, limit)
        if not len(rows_a):
            print(f"{name}: no condition cell has four wells, left out")
            continue
        left_out = len(set(cells[rows])) - len(set(cells[rows_a]))
        print(f"{name}: {len(set(cells[rows_a]))} condition cells, {left_out} with fewer than four "
              "wells left out")
        table[name], images = quality_of(opened, rows_a, rows_b, cells, measure, probe, request)
        pictures[name] = {k: v[::max(1, len(v) // 8)][:8] for k, v in images.items()}
    if not table:
        raise UserError("nothing to compare: no condition cell has four wells")
    print_quality(table)
    draw_sets(out / "quality.png", pictures, model)
    write_report(out / "quality.json", args, {"guidance": request["guidance"], "table": table},
                 "quality.png")


def print_quality(table):
    """Kernel distance with its interval, variance ratio, probe scores."""
    rows = []
    for name, entry in table.items():
        for kind, label in (("real", "other real wells (floor)"),
                            ("autoencoder", "through the autoencoder"),
                            ("generated", f"generated ({entry['images']})")):
            e = entry[kind]
            rows.append((f"{name}, {label}",
                         (e["distance"], e["interval"]), e.get("ceiling"), e["variance_ratio"],
                         e.get("true_mechanism"), e.get("batch")))
    print_table("held-out set", {"kernel distance (5-95 %)": ".2f", "ceiling": ".2f",
                                 "variance": ".2f", "mechanism": ".2f", "batch": ".2f"}, rows)


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
                fixed[field.name] = (by.index(name), dict(pairs))
                break
    values = [sorted(set(columns[name])) for name in by]
    return {" x ".join(combination): {f: table[combination[k]] for f, (k, table) in fixed.items()}
            for combination in itertools.product(*values)}


def nearest_distance(images, training):
    """Root mean square difference of each image (N, C, H, W) to its nearest in `training`."""
    found = torch.cdist(images.flatten(1), training.flatten(1)).min(1).values
    return found / images[0].numel() ** .5


def summarise(images, channels, radius):
    """Nuclei per image and mean intensity of each channel on [0, 1]."""
    found, names = features(images, channels, radius=radius), feature_names(channels)
    return {k: float(found[:, names.index(k)].mean())
            for k in ("nuclei", *(f"{c}_mean" for c in channels))}


def print_summaries(title, rows):
    """A table of rows {label: what `summarise` says, and more numbers}."""
    columns = dict.fromkeys(k for e in rows.values() for k in e)
    print_table(title, {k.removesuffix("_mean").replace("_", " "): ".3f" for k in columns},
                [(label, *map(e.get, columns)) for label, e in rows.items()])


def drawn_and_real(opened, args, request, rows, n, real):
    """{"generated": n images, "real ...": `real` each} of a condition cell: its request {field:
    value} and its real rows, apart by the column --also."""
    model, rng = opened.model, np.random.default_rng(1)
    columns = blank_unseen(model.fields, {name: [value] * n for name, value in request.items()})
    sets = {"generated": model.generate(columns, range(n), args.guidance, args.form, args.steps,
                                        sampler=args.sampler, interval=args.interval)}
    label = np.array([opened.manifest.columns[args.also][i] if args.also else "" for i in rows])
    return sets | {f"real {value}".strip(): real_images(opened, rng.choice(
        rows[label == value], real), rng) for value in np.unique(label)}


def quality_by_cell(opened, args, out):
    """For each combination of `--by`: nuclei and intensities, real and generated, and how near the
    nearest training view is: a model that memorised has generated images nearer to one than
    held-out real images are, after the autoencoder has blurred them as it blurs generated ones."""
    if args.also and args.also not in opened.manifest.columns:
        raise data.DataError(f"--also: {opened.manifest.path} has no column {args.also}")
    model, n = opened.model, 24 if args.quick else 64
    cells = cells_of(opened.manifest, args.by)
    training = torch.cat([x for x, _ in train_ldm.batches_of_views(
        opened.pixels, opened.train, opened.settings, model.intensity,
        model.content["settings"]["views"])])

    def nearest(images):
        return float(nearest_distance(images, training).median())
    rng = np.random.default_rng(1)
    held = real_images(opened, rng.choice(opened.held, 64), rng)
    report = {"guidance": model.weights(args.guidance), "table": [],
              "held_out_nearest": nearest(held),
              "held_out_nearest_autoencoder": nearest(reconstruct(model.vae, held)[0])}
    pictures, labels = [], []
    for cell, request in crossed_requests(opened, args.by).items():
        rows = np.flatnonzero(cells == cell)
        sets = drawn_and_real(opened, args, request, rows, n, 4 * n)
        fake = sets["generated"]
        entry = {"cell": cell, "in_training": bool(np.isin(rows, opened.train).any())} | {
            name: summarise(x, model.channels, args.nucleus_radius) for name, x in sets.items()}
        entry["generated"]["nearest_training_view"] = nearest(fake)
        real = [image for name, x in sets.items() if name != "generated" for image in x[:6].numpy()]
        pictures.append((real[::max(1, len(real) // 6)][:6] or [None] * 6) + list(fake[:6].numpy()))
        labels.append(cell.replace(" x ", "\n") + ("" if entry["in_training"] else "\n(unseen)"))
        report["table"].append(entry)
    print_summaries("condition", {
        e["cell"] + ("" if e["in_training"] else " (unseen)") + f", {kind}": e[kind]
        for e in report["table"] for kind in e if kind.startswith(("real", "generated"))})
    print(f"nearest training view of held-out real images {report['held_out_nearest']:.3f}, after "
          f"the autoencoder {report['held_out_nearest_autoencoder']:.3f}")
    data.picture(out / "quality.png", pictures, model.channels, labels,
                 ["real"] * 6 + ["generated"] * 6, model.pixel_um)
    write_report(out / "quality.json", args, report, "quality.png")


# ------------------------------------------------------------------------------------------------
# 7. disentangle: how much of the image is biology, how much is experiment?
# ------------------------------------------------------------------------------------------------

PARTS = ("biology", "experiment", "interaction")


def omega_squared(y, blocked=True):
    """Share of variance explained in a balanced factorial, without the upward bias of eta squared.

    y: (biology, experiment, seeds, F). blocked: seed s stands for the same cells (or the same
    noise) in every place of the factorial, so that its own variance is no error. Returns
    {"biology", "experiment", "interaction": (F,)}, after Olejnik & Algina 2003 (Psychol. Methods
    8):

        omega^2 = (SS_effect - df_effect MS_error) / (SS_total + MS_block)

    with MS_error for MS_block without blocks.
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
    scale = (total + (blocks / (n - 1) if blocked else error)).clamp(min=1e-12)
    return {name: ((square - df * error) / scale).float() for name, (square, df) in squares.items()}


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


def effect_size(y, one, other):
    """How large effects are, as a share of the true ones: each level's mean, from the mean of all,
    projected on the true one. y and two halves of the truth: (levels, ..., F). 1 is right, more
    is exaggeration. Two halves, as the square of one would hold its noise."""
    y, one, other = (x.flatten(1, -2).mean(1) for x in (y, one, other))              # (levels, F)
    y, one, other = (x - x.mean(0) for x in (y, one, other))
    return ((y * one).sum() / (other * one).sum()).item()


def simulated_screen(opened, draw):
    """The settings of a simulated screen, for fresh cells (`draw`) under the same microscopes."""
    screen = read_screen(opened.manifest)
    if screen is None:
        raise data.DataError(f"{opened.manifest.path} is not simulated: the truth is not known "
                             "(for real plates: --by)")
    if opened.settings.binning != 1 or opened.settings.crop:
        raise UserError("the model sees binned or cropped images, the simulator draws whole fields")
    return replace(screen, draw=draw)


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
        usable = [x for x in data.molecules()
                  if x["kind"] == "train" and x["ec50"] < max(data.DOSES)]
        molecules = {m: [x for x in usable if x["mechanism"] == m] for m in self.biology}
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
        return columns_of(self.rows(), fields)

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
        self.factorial, self.probe = factorial, probe
        self.measure = morphology(factorial.opened, radius)
        self.images = factorial.truth(0)
        self.a = self.places(self.images)
        # several times as many on the other side: the distance to them is less noisy
        self.b = torch.cat([self.places(factorial.truth(2 * k + 1)) for k in range(more)], 2)
        self.omega = omega_squared(self.a, factorial.blocked)
        self.scores = self.named_right(self.images)

    def places(self, images):
        """Images of all places to standardised features (biology, experiment, seeds, F)."""
        f = self.factorial
        return self.measure(images).view(len(f.biology), len(f.experiment), f.seeds, -1)

    def distance(self, y, where):
        """Kernel distance of y (b, e, n, F) to the truth, per place, averaged over `where`."""
        return mean_distance((y[i, j], self.b[i, j]) for i, j in where.nonzero().tolist())

    def ceiling(self, where):
        """The true images of one place against those of places that differ in both."""
        b, e, n, _ = self.a.shape
        return mean_distance((self.a[k, m], self.b[i, j, :2 * n])
                             for i, j in where.nonzero().tolist() for k in range(b)
                             for m in range(e) if k != i and m != j)

    def named_right(self, images):
        """{"mechanism", "batch": (b, e, n)}, 1 where the probe names it; {} without a probe."""
        if self.probe is None:
            return {}
        hits = named_right(self.probe, images, self.factorial.rows())
        return {k: hit.float().view(self.a.shape[:3]) for k, hit in hits.items()}


def simulated_truth(opened, args, probe=True):
    return Truth(SimulatedFactorial(opened, args.images), screen_probe(opened) if probe else None)


def named_run(model, factorial):
    """Which model this is: {"arm", "confounding" (None on real plates), "seed"}."""
    told, settings = set(model.groups), model.content["settings"]
    arm = ("perturbations" if told == {"biology"} else "experiment" if told == {"experiment"}
           else "restained" if settings.get("restain") else "balanced" if settings["balance"]
           else "both")
    screen = getattr(factorial, "screen", None)
    return {"arm": arm, "confounding": screen and screen.confounding, "seed": settings["seed"]}


def disentangle_one(model, truth, request):
    """The figures of one model under one request, as one line of results.jsonl."""
    f = truth.factorial
    images = generate_places(model, f, request)
    y, hits = truth.places(images), truth.named_right(images)
    held = {k: f.held(k) for k in ("val", "test")}
    seen = ~(held["val"] | held["test"])
    target = held["test"] if held["test"].any() else seen

    def figures(s):
        found = leaks(omega_squared(y[:, :, s]), omega_squared(truth.a[:, :, s], f.blocked))
        found |= {f"probe_{k}": hit[:, :, s].mean().item() for k, hit in hits.items()}
        return found | {"distance_heldout": truth.distance(y[:, :, s], target)}
    entry = named_run(model, f) | {
        "form": request["form"], "w_biology": request["guidance"].get("biology", 0.),
        "w_experiment": request["guidance"].get("experiment", 0.), "step": model.content["step"],
        "interval": list(request["interval"]), "rescale": request["rescale"],
        "images": len(images)}
    entry |= figures(torch.arange(f.seeds))
    entry |= {f"{k}_interval": v for k, v in over_seeds(figures, f.seeds).items()}
    entry["effect_biology"] = effect_size(y, truth.a, truth.b)
    entry["effect_experiment"] = effect_size(*(x.transpose(0, 1) for x in (y, truth.a, truth.b)))
    for name, where in (("seen", seen), ("heldout", target)):
        entry |= {f"probe_{k}_{name}": hit[where].mean().item() for k, hit in hits.items()}
        entry |= {f"probe_{k}_{name}_real": hit[where].mean().item()
                  for k, hit in truth.scores.items()}
    entry |= {f"probe_{k}_real": hit.mean().item() for k, hit in truth.scores.items()}
    entry |= {"distance_seen": truth.distance(y, seen),
              "distance_val": truth.distance(y, held["val"]),
              "floor": truth.distance(truth.a, target), "ceiling": truth.ceiling(target)}
    omega = omega_squared(y)
    return entry | {"omega": {k: omega[k].tolist() for k in PARTS}}


TABLE = ("leak_e_to_b", "leak_b_to_e", "effect_biology", "effect_experiment", "probe_mechanism",
         "probe_mechanism_seen", "probe_mechanism_heldout", "probe_batch", "distance_seen",
         "distance_heldout")


def print_lines(lines):
    """A table: one line per measurement, leaks, effects, probes and kernel distances."""
    e = lines[0]
    truth = {"leak_e_to_b": 0., "leak_b_to_e": 0., "effect_biology": 1., "effect_experiment": 1.,
             "distance_heldout": e["floor"]} | {
        name: e.get(f"{name}_real") for name in TABLE if name.startswith("probe_")}
    every = [(line["label"], line) for line in lines] + [
        ("the truth itself (floor)", truth),
        ("wrong places (ceiling)", {"distance_heldout": e["ceiling"]})]
    print_table("", {name.replace("probe_", "").replace("_", " "):
                     ".2f" if "distance" in name else ".3f" for name in TABLE},
                [(label, *map(found.get, TABLE)) for label, found in every])


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
    if args.study in ("arms", "shortcut"):
        train_vae.load_vae(args.vae)  # refused before any work
    if args.quick:
        args.images, args.train_steps, args.seeds = 216, 400, args.seeds[:1]
        args.confounding = args.confounding or [.9]
        args.arms = [arm for arm in args.arms
                     if len(args.arms) < len(ARMS) or arm not in ("both", "balanced")]
        CLASSIFIER.update(images=540, steps=200)
    out, lines = Path(args.out), None
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
        if args.by and args.study in ("transfer", "attribution"):
            raise UserError(f"--study {args.study} needs the simulator: the same cells elsewhere")
        if args.study == "transfer":
            study_transfer(opened, simulated_truth(opened, args, probe=False), results, args)
        elif args.study == "attribution":
            study_attribution(opened, SimulatedFactorial(opened, args.images), results, args)
        else:
            lines = study_checkpoint(opened, Truth(
                RealFactorial(opened, args.by, args.images), radius=args.nucleus_radius)
                if args.by else simulated_truth(opened, args), results, args)
    if lines:
        print_lines(lines)
        draw_lines(out / f"{args.study}.png", lines)
        print(f"wrote {out}/{args.study}.png")
    print(f"every line is in {out}/results.jsonl")


# --- studies of one checkpoint --------------------------------------------------------------------

WEIGHTS_TRIED = [(1, 1), (1.5, 1.5), (2, 1), (2, 1.5), (2, 2), (2.5, 2.5), (3, 2), (3, 3), (4, 2)]
FORMS_TRIED = [dict(form=form, interval=interval) for interval in ((0., 1.), INTERVAL)
               for form in FORMS] + [dict(form="nested", interval=(0., 1.), rescale=.7)]
SAMPLERS_TRIED = [dict(sampler=s, steps=n) for n in (5, 10, 15, 30, 60) for s in SAMPLERS]


def planned(args, model):
    """What a study of one checkpoint measures: [(label, checkpoint, changes of the request)]."""
    def label(c):
        return c["form"] + (f", t/T {c['interval'][0]:g} to {c['interval'][1]:g}"
                            if "interval" in c else "") + (", rescaled" if "rescale" in c else "")
    if args.study == "weights":
        return [(f"weights {b:g}, {e:g}", args.checkpoint,
                 {"guidance": dict(biology=b, experiment=e)}) for b, e in WEIGHTS_TRIED]
    if args.study == "forms":
        return [(label(c), args.checkpoint, c) for c in FORMS_TRIED]
    if args.study == "samplers":
        return [(f"{c['steps']} steps, {c['sampler']}", args.checkpoint, c) for c in SAMPLERS_TRIED]
    if args.study == "training":
        files = train_vae.step_files(Path(args.checkpoint).parent)
        if not files:
            raise UserError(f"no step-*.pt beside {args.checkpoint}: train with --keep 1000")
        return [(file.stem.replace("-", " "), str(file), {}) for file in files]
    weights = ", ".join(f"{g} {w:g}" for g, w in model.weights(args.guidance).items())
    return [(weights, args.checkpoint, {})]


def study_checkpoint(opened, truth, results, args):
    """One checkpoint as it is, at several weights, under the forms of guidance, with each sampler
    in few steps and in many, or along its training (are new combinations found early, as Scimeca
    et al. report?)."""
    lines = []
    for label, path, changes in planned(args, opened.model):
        request = request_of(args, opened.model, **changes)
        key = {"checkpoint": finger(path), "images": args.images, "by": args.by} | request
        lines.append(results.get(key, lambda: {"label": label} | disentangle_one(
            Model.load(path), truth, request)))
    if args.study == "model":
        print_table("share of variance (omega^2)", {
            f"{part}, {of}": ".2f" for part in PARTS for of in ("truth", "generated")}, [
            (name, *(v for part in PARTS for v in (truth.omega[part][k],
                                                   lines[0]["omega"][part][k])))
            for k, name in enumerate(feature_names(opened.model.channels))])
    return lines


# --- the comparison: told the perturbation, the experiment, or both -------------------------------

# told both; balanced: rare pairs of molecule and batch drawn as often as common ones; restained:
# the same, and three of four treated images seen as another plate would show them
ARMS = {"perturbations": dict(experiment=()), "experiment": dict(biology=()), "both": {},
        "balanced": dict(balance=1.), "restained": dict(balance=1., restain=.75)}
RUNS = [(0., 0), (.5, 0), (.9, 0), (.9, 1), (.9, 2)]     # confounding and seed
WEIGHTS_BOTH = [(1, 1), (1.5, 1.5), (2, 1.5), (2, 2), (2.5, 2), (2.5, 2.5), (3, 2), (3, 3)]
# forms and weights that are tried for each arm. Where rare pairs are not balanced v(biology) holds
# the home batch as well, so only the balanced arms may do without nesting
TRIED = {"both": [("nested", b, e) for b, e in WEIGHTS_BOTH],
         **{arm: [(form, b, e) for form in ("nested", "independent") for b, e in WEIGHTS_BOTH]
            for arm in ("balanced", "restained")},
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
        steps=args.train_steps, **ARMS[arm], eval_every=max(1, args.train_steps // 6),
        keep=args.train_steps,  # all of them
        out=f"{args.out}/{arm}-{confounding:g}-{seed}-{args.train_steps}"))


def try_guidance(model, truth, args, form, b, e):
    """A form and weights tried on the validation pairs: (kernel distance to the truth, share of
    mechanisms and batches that the probe reads)."""
    where, n = truth.factorial.held("val"), truth.factorial.seeds
    kept = where.flatten().repeat_interleave(n)
    request = request_of(args, model, form=form, guidance=dict(biology=b, experiment=e))
    images = generate_places(model, truth.factorial, request, where)
    y = truth.measure(images).unflatten(0, (-1, n))                       # (places, n, F)
    read = named_right(truth.probe, images, list(itertools.compress(
        truth.factorial.rows(), kept))) if truth.probe else {}
    return mean_distance(zip(y, truth.b[where])), float(np.mean(
        [hit.float().mean() for hit in read.values()] or [0.]))


def best_guidance(settings, found):
    """One of `settings` for an arm, from what try_guidance found with each of them for each of its
    seeds, found (seeds, settings, 2): of those whose mean distance is within a tenth of the least,
    the one that the probe reads best."""
    distance, read = np.mean(np.array(found), 0).T                       # (settings,) each
    near = np.flatnonzero(distance <= 1.1 * distance.min())
    return settings[max(near, key=lambda k: (read[k], -distance[k]))]


def study_arms(args, results):
    """The arms at several confoundings, each at its own best guidance."""
    lines, truths, seeds = [], [], defaultdict(list)
    for confounding, seed in (RUNS if args.confounding is None else
                              itertools.product(args.confounding, args.seeds)):
        seeds[confounding].append(seed)
    same = {"vae": finger(args.vae)} | {k: getattr(args, k) for k in (
        "train_steps", "images", "steps", "sampler", "interval", "rescale")}

    @functools.lru_cache(1)  # the weights of an arm are tried on one model after another
    def model_and_truth(arm, confounding, seed):
        opened = open_trained(args, train_arm(args, arm, confounding, seed))
        if not truths:  # cells and intensities are the same at any confounding: one truth for all
            truths.append(simulated_truth(opened, args))
        return opened.model, truths[0]

    def key_of(run):
        return dict(zip(("arm", "confounding", "seed"), run)) | same

    def tried(run, setting):
        return results.get(key_of(run) | {"tried": setting}, lambda: {"found": try_guidance(
            *model_and_truth(*run), args, *setting)})["found"]

    def measured(run, form, b, e):
        (arm, confounding, seed), (model, truth) = run, model_and_truth(*run)
        request = request_of(args, model, form=form, guidance=dict(biology=b, experiment=e))
        return {"label": f"{arm}, {confounding:g}, {seed} ({form} {b:g}, {e:g})"} | disentangle_one(
            model, truth, request) | {"confounding": confounding}  # the truth's may be another

    for confounding, arm in itertools.product(seeds, args.arms):
        runs = [(arm, confounding, seed) for seed in seeds[confounding]]
        best = best_guidance(TRIED[arm], [[tried(run, setting) for setting in TRIED[arm]]
                                          for run in runs])
        for run in runs:
            key = key_of(run) | dict(zip(("form", "w_biology", "w_experiment"), best))
            lines.append(results.get(key, lambda: measured(run, *best)))
            print_lines(lines[-1:])
    draw_heldout_pairs(Path(args.out) / "heldout_pairs.png", lines, args)
    return lines


def draw_heldout_pairs(path, lines, args, seed=1):
    """A column for each held-out pair: the simulator's field of view, and below it what each arm
    (its first run) draws for the same molecule, dose, batch and well, all on the same noise, that
    of `seed`."""
    images, names = [], []
    for line in lines:
        name = f"{line['key']['arm']}, {line['confounding']:g}"
        if name in names:
            continue
        opened = open_trained(args, train_arm(args, *(
            line["key"][k] for k in ("arm", "confounding", "seed"))))
        model, f = opened.model, SimulatedFactorial(opened, args.images)
        held = f.held("test").flatten().tolist()
        rows = list(itertools.compress(f.rows()[seed::f.seeds], held))
        if not images:
            images.append(list(photographs(rows, f.screen, model.intensity).numpy()))
        request = request_of(args, model, form=line["form"], guidance=dict(
            biology=line["w_biology"], experiment=line["w_experiment"]))
        columns = blank_unseen(model.fields, columns_of(rows, model.fields))
        images.append(list(generate(model, columns, [seed] * len(rows), request).numpy()))
        names.append(name)
    data.picture(path, images, model.channels, ["the truth", *names], [
        f"{row['true_mechanism']}\nin {row['batch']}" for row in rows], model.pixel_um)
    print(f"wrote {path}")


# --- the shortcut: does a classifier profit from images drawn without confounding? ----------------

CLASSIFIER = dict(images=1512, test_images=1200, steps=600)
# how images are edited to other batches
EDITED = dict(guidance=dict(experiment=1.5), steps=10, rounds=1, interval=(0., 1.))


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
    """Images (N, C, H, W) and their rows, with the mechanism and batch of each."""

    def __init__(self, images, rows):
        self.images, self.rows = images, rows
        self.mechanism, self.batch = (np.array([r[k] for r in rows])
                                      for k in ("true_mechanism", "batch"))

    def standardised(self):
        control = torch.from_numpy(self.mechanism == "none")
        return standardise_on_controls(self.images, self.batch, control)


def photographed(opened, confounding, draw, count, seed, within=None):
    """`count` images of a screen of this confounding: of seen molecules, controls and doses above
    half effect; of rows `within` only."""
    screen = replace(simulated_screen(opened, draw), confounding=confounding)
    rows = [r for i, r in enumerate(data.layout(screen)) if (within is None or i in within)
            and r["split"] not in ("test_substituent", "test_scaffold")
            and (r["role"] == "control" or r["true_effect"] >= .5)]
    rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:count]]
    return Labelled(photographs(rows, screen, opened.model.intensity), rows)


def made_balanced(opened, request, count, seed):
    """About `count` generated images in which mechanism and batch are independent."""
    rows = SimulatedFactorial(opened, count).rows(requests=1000 * (seed + 1))
    seeds = range(10_000 * seed, 10_000 * seed + len(rows))
    return Labelled(generate(opened.model, columns_of(rows, opened.model.fields), seeds, request),
                    rows)


def moved_elsewhere(opened, real, seed):
    """The same cells under the same treatment, each edited (sample.py --edit) to a batch drawn at
    random and a plate of it: mechanism and batch become independent, the mechanism's effect stays
    as near the real one as the edit keeps it. Images that stay in their batch take the same way,
    which leaves its marks."""
    rng, fields, plates = np.random.default_rng(seed), opened.model.fields, defaultdict(set)
    for row in real.rows:
        plates[row["batch"]].add(row["plate"])
    batches, goals = rng.choice(sorted(plates), len(real.rows)), []
    for row, batch in zip(real.rows, batches):
        plate = rng.choice(sorted(plates[batch])) if batch != row["batch"] else row["plate"]
        goals.append(row | {"batch": str(batch), "plate": str(plate)})
    columns = (columns_of(rows, fields) for rows in (real.rows, goals))
    return Labelled(opened.model.edit(real.images, *columns, **EDITED), goals)


def classify(training, images, test, test_images, seed, weights=None):
    """A mechanism classifier trained on images of `training`: the mean over classes of the share
    of test images that it names right. A class counts once, however common it is."""
    answers = ["none", *data.MECHANISMS]
    labels = {"mechanism": torch.tensor([answers.index(m) for m in training.mechanism])}
    probe = train_probe(images, {"mechanism": answers}, labels, CLASSIFIER["steps"], seed,
                        weights=weights)
    said = np.array(answers)[answer(probe, test_images)["mechanism"].numpy()]
    return float(np.mean([np.mean(said[test.mechanism == m] == m)
                          for m in np.unique(test.mechanism)]))


def study_shortcut(args, results):
    """A mechanism classifier trained on a confounded screen, on generated images in which
    mechanism and batch are independent, on both, on its own images edited to other batches, with
    plain remedies, and on an unconfounded screen; all with the same number of images and steps,
    tested on unconfounded images. The images are generated by the last of --arms."""
    confounding, n = .9, CLASSIFIER["images"]
    checkpoint = train_arm(args, args.arms[-1], confounding, 0)
    opened = open_trained(args, checkpoint)
    request, train = request_of(args, opened.model), set(opened.train)
    test = photographed(opened, 0., 4000, CLASSIFIER["test_images"], 0)

    def measured(seed):
        short = photographed(opened, confounding, 0, n, seed, train)
        free = made_balanced(opened, request, n, seed)
        half = np.random.default_rng(seed).permutation(len(free.rows))[:n // 2]
        both = Labelled(torch.cat([short.images[:n - n // 2], free.images[half]]),
                        short.rows[:n - n // 2] + [free.rows[i] for i in half])
        sets = {"confounded": short, "generated": free, "both together": both,
                "edited": moved_elsewhere(opened, short, seed),
                "unconfounded": photographed(opened, 0., 5000 + seed, n, seed)}
        scores = {name: classify(x, x.images, test, test.images, seed) for name, x in sets.items()}
        scores["standardised on controls"] = classify(short, short.standardised(), test,
                                                      test.standardised(), seed)
        scores["reweighted"] = classify(short, short.images, test, test.images, seed,
                                        balancing(short.mechanism, short.batch))
        gap = scores["unconfounded"] - scores["confounded"] or math.nan
        return {"arm": args.arms[-1], "seed": seed, "confounding": confounding, "scores": scores,
                "closed": {k: (v - scores["confounded"]) / gap for k, v in scores.items()}}

    lines = [results.get({"shortcut": seed, "checkpoint": finger(checkpoint), "classifier":
                          CLASSIFIER, "edited": EDITED} | request, lambda: measured(seed))
             for seed in args.seeds]
    closed = {name: [line["closed"][name] for line in lines] for name in lines[0]["scores"]}
    print_table("mechanism classifier trained on", {"accuracy": ".3f", "gap closed": ".2f"}, [
        (name, np.mean([line["scores"][name] for line in lines]),
         (np.mean(shares), (min(shares), max(shares)))) for name, shares in closed.items()])


# --- transfer: the same cells in another batch, or treated ----------------------------------------

def study_transfer(opened, truth, results, args, steps=50):
    """Real images edited (sample.py --edit) to another batch, and controls to each mechanism,
    against the true image of the same cells there. Everything is compared after the autoencoder.

    moved: how far the features of the side that was changed moved along their true change (1 is
    right); drift: how far the features of the other side moved, in deviations of the training set.
    """
    f, model = truth.factorial, opened.model
    b, e, n = len(f.biology), len(f.experiment), f.seeds
    rows, place = f.rows(), np.arange(b * e * n).reshape(b, e, n)[:, :, 0]
    biological = truth.omega["biology"] > truth.omega["experiment"]      # (F,)

    def measured(name, start, goal, side):
        source, target = (columns_of([rows[i] for i in places], model.fields)
                          for places in (start, goal))
        edited = model.edit(truth.images[start], source, target, args.guidance, args.form, steps,
                            interval=args.interval)
        before, true = (reconstruct(model.vae, truth.images[i])[0] for i in (start, goal))
        y, y_edited, y_true = (truth.measure(x) for x in (before, edited, true))
        change, wanted = y_edited - y, y_true - y
        return {"task": name, "images": len(start),
                "l1_before": (before - true).abs().mean().item() / 2,
                "l1_after": (edited - true).abs().mean().item() / 2,
                "moved": ((change * wanted)[:, side].sum()
                          / wanted[:, side].square().sum()).item(),
                "drift": change[:, ~side].square().mean().sqrt().item(),
                "true_drift": wanted[:, ~side].square().mean().sqrt().item()}

    lines = [results.get({"transfer": task[0], "checkpoint": finger(args.checkpoint),
                          "steps": steps, "images": args.images, "guidance": args.guidance,
                          "form": args.form, "interval": args.interval}, lambda: measured(*task))
             for task in (("another batch", place.ravel(), np.roll(place, -1, 1).ravel(),
                           ~biological),
                          ("treated", np.repeat(place[:1], b - 1, 0).ravel(), place[1:].ravel(),
                           biological))]
    print_table("edited to", {"L1 to the truth: before": ".4f", "after": ".4f", "moved": ".2f",
                              "drift": ".2f", "(true)": ".2f"}, [
        (e["task"], *(e[k] for k in ("l1_before", "l1_after", "moved", "drift", "true_drift")))
        for e in lines])


# --- attribution: do the maps lie where the difference truly is? ----------------------------------

def study_attribution(opened, factorial, results, args, levels=(.2, .4, .6, .8)):
    """Maps of where each group acts (`Model.attribution`) in treated images, against the true
    difference from the same cells untreated: correlation over the pixels of an image, by mechanism
    and noise level. The experiment's is the floor: maps are brighter wherever there are cells.
    Predictions are compared as they come: guidance and sampler have no say."""
    f, model = factorial, opened.model
    shape = (len(f.biology), len(f.experiment), f.seeds)
    images = f.truth(0).unflatten(0, shape)                              # (b, e, n, C, H, W)
    place, rows = np.arange(math.prod(shape)).reshape(*shape), f.rows()

    def measured(b):
        true = (images[b] - images[0]).abs().mean(2).flatten(0, 1)       # (e n, H, W)
        maps = model.attribution(images[b].flatten(0, 1), columns_of(
            [rows[i] for i in place[b].ravel()], model.fields), levels)
        return {"mechanism": f.biology[b]} | {
            group: [correlations(x.flatten(1).T, true.flatten(1).T).tolist() for x in by_level]
            for group, by_level in maps.items()}                         # (levels, e n)

    lines = [results.get({"attribution": f.biology[b], "checkpoint": finger(args.checkpoint),
                          "images": args.images, "levels": levels}, lambda: measured(b))
             for b in range(1, shape[0])]
    whole = {"mechanism": "all"} | {g: np.concatenate([e[g] for e in lines], 1)
                                    for g in model.groups}
    print_table("correlation with the true difference (5-95 % of images)", {
        f"{g}, t/T = {level:g}": ".2f" for g in model.groups for level in levels}, [
        (e["mechanism"], *((np.nanmean(r), np.nanpercentile(r, (5, 95)))
                           for g in model.groups for r in e[g])) for e in (*lines, whole)])


# --- real plates: pairs left out in turn ----------------------------------------------------------

def write_split(opened, path, held, cells):
    """The manifest with a column split, unless it is there: cells in `held` are test, a tenth of
    the rest val. Returns its path."""
    if path.exists():
        return str(path)
    m, rng = opened.manifest, np.random.default_rng(0)
    rows = records(m, range(len(m)))
    for i, row in enumerate(rows):
        files = [str(Path(f).resolve()) for f in m.files[i]]
        names = m.channels if len(files) == len(m.channels) else ["image"]
        row |= dict(zip(names, files)) | {
            "split": "test" if cells[i] in held else "val" if rng.random() < .1 else "train"}
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
    vae = train_vae.trained(train_vae.Config(**opened.model.content["vae"]["settings"] | {
        "data": write_split(opened, out / "split-vae.csv", left_out, cells), "split": "auto",
        "out": str(out / "pairs-vae")}))

    def measured(treatment, plate):
        config = train_ldm.Config(**opened.model.content["settings"] | {
            "data": write_split(opened, out / f"split-{plate}.csv", {f"{treatment} x {plate}"},
                                cells),
            "vae": str(vae), "out": str(out / f"pairs-{plate}")})
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
            for name, x in drawn_and_real(here, args, factorial.asked[cell],
                                          np.flatnonzero(cells == cell), n, n).items():
                right = answer(probe, x)["treatment"] == treatments.index(t)
                entry[f"{t}: {name}"] = summarise(x, here.model.channels, args.nucleus_radius) | {
                    "named right": right.float().mean().item()}
        return entry

    for treatment, plate in pairs:
        line = results.get({"pair": f"{treatment} x {plate}", "vae": finger(vae), "images": n} | {
            k: getattr(args, k) for k in ("guidance", "form", "also", "interval", "steps",
                                          "sampler", "nucleus_radius")},
            lambda: measured(treatment, plate))
        print_summaries(f"left out: {line['left_out']}", {
            name: e for name, e in line.items() if name not in ("key", "left_out")})


# ------------------------------------------------------------------------------------------------
# 8. conditions: is every field used? which molecule encoder generalises?
# ------------------------------------------------------------------------------------------------

def conditions(args):
    """The tables of `evaluate.py conditions`."""
    if args.encoders:
        return compare_encoders(args)
    opened, out = open_model(args), folder_of(args)
    rows = np.random.default_rng(0).permutation(opened.held)[:256 if args.quick else 1024]
    model, count = opened.model, len(rows)
    posterior = torch.cat([torch.stack(model.vae.encode(x.to(device())), 1).cpu()
                           for x in real_images(opened, rows).split(64)]).numpy()
    latents = train_ldm.Latents(posterior, model.vae, opened.manifest, rows,
                                model.denoiser.conditioner, 1)
    sets = train_ldm.field_sets(model.fields)

    def predict(shuffled):
        prediction, *rest = train_ldm.heldout_predictions(
            model.denoiser, latents, model.schedule, count, shuffled)
        return prediction.flatten(1), *rest
    plain, loss, quarter = predict(())
    sizes = group_sizes(model, latents)
    changes = feature_changes(opened, rows[:32 if args.quick else 96], sets, args)
    table = {}
    for name, shuffled in sets.items():
        prediction, worse, _ = predict(shuffled)
        rise = worse - loss
        table[name] = {
            "rise": rise.mean().item(), "error": rise.std().item() / count ** .5,
            "rise_by_noise": [rise[quarter == q].mean().item() for q in range(4)],
            "cosine": F.cosine_similarity(plain, prediction).mean().item(),
            "rms": sizes.get(name), "features": changes[name]}
    print_table("taken from another row", {
        "loss rises by": ".4f", "+-": ".4f", "at little noise": ".4f", "less": ".4f",
        "more": ".4f", "most": ".4f", "cosine": ".3f", "RMS": ".2f", "features move": ".2f"}, [
        (name, e["rise"], e["error"], *e["rise_by_noise"], e["cosine"], e["rms"], e["features"])
        for name, e in table.items()])
    train_ldm.warn_of_unused({k: (e["rise"], e["error"]) for k, e in table.items()})
    write_report(out / "conditions.json", args, {"held_out_loss": loss.mean().item(),
                                                 "table": table})


def group_sizes(model, latents):
    """Root mean square of each group's part of the condition vector: {"all of biology": ...}."""
    codes, known = latents.conditions(np.arange(min(256, len(latents.rows))))
    with torch.no_grad():
        parts, _, _ = model.denoiser.conditioner.parts(codes, known, latents.molecules)
    return {f"all of {g}": p.square().mean().sqrt().item() for g, p in parts.items()}


def feature_changes(opened, rows, sets, args):
    """How far the features of a generated image move when one field alone is another row's, on the
    same noise, weights 1: root mean square in deviations of the training images."""
    model, measure = opened.model, morphology(opened, count=400)
    request = dict(guidance={g: 1. for g in model.groups}, steps=args.steps, sampler=args.sampler)
    own, other = (metadata(model.fields, opened.manifest, order) for order in (
        rows, np.random.default_rng(1).permutation(rows)))

    def drawn(shuffled):
        columns = own | {name: other[name] for name in shuffled}
        return measure(generate(model, columns, range(len(rows)), request))
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
    found, true = (x.mean(2) - x.mean(2)[:, :1] for x in (y, truth))                  # (M, D, F)
    way = true[:, -1:] / true[:, -1:].square().sum(2, keepdim=True)
    effect = (found * way).sum(2).double()                                            # (M, D)
    rank = effect.argsort(1).argsort(1).double()
    spearman = correlations(rank.T, torch.arange(len(doses))[:, None].expand_as(rank.T))   # (M,)
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
    return correlations(a, b)[b.std(0) > .5].nan_to_num(0.).mean().item()


def compare_encoders(args):
    """The same small model with each molecule encoder: molecules that training saw, held-out
    substituents, held-out scaffolds; real images above (ceiling), molecules permuted below."""
    if args.quick:
        args.train_steps, args.seeds, args.molecules = 300, args.seeds[:1], 8
    out, lines = Path(args.out or "runs/encoders"), []
    results = Results(out / "encoders.jsonl")
    size = {k: getattr(args, k) for k in ("molecules", "series", "steps", "sampler", "guidance",
                                          "form", "interval")}
    for encoder, seed in itertools.product(args.names, args.seeds):
        lines.append(results.get({"encoder": encoder, "seed": seed, "train_steps": args.train_steps,
                                  "table": args.molecule_table} | size,
                                 lambda: measure_encoder(args, out, encoder, seed)))
    some = out / f"{args.names[0]}-{args.seeds[0]}-{args.train_steps}" / "model.pt"
    for label in ("real images", "molecules permuted"):
        lines.append(results.get({"limit": label} | size, lambda: {"label": label, "seed": 0}
                                 | score_encoder(open_trained(args, some), args, label)))
    print_encoders(lines, out)


def measure_encoder(args, out, encoder, seed):
    """A model with this encoder, trained if it is missing: its size, its speed and its scores."""
    config = train_ldm.Config(
        out=str(out / f"{encoder}-{seed}-{args.train_steps}"), seed=seed, molecule_encoder=encoder,
        steps=args.train_steps, molecule_table=args.molecule_table if encoder == "table" else "")
    opened = open_trained(args, trained(config))
    parameters = sum(p.numel() for e, f in zip(opened.model.denoiser.conditioner.encoders,
                                               opened.model.fields)
                     if f.kind == "molecule" for p in e.parameters())
    last = read_log(config.out)[-1]
    return {"label": encoder, "seed": seed, "parameters": parameters,
            "seconds_per_step": last["seconds"] / last["step"]} | score_encoder(opened, args)


def score_encoder(opened, args, limit=None):
    """{kind: figures} of a model, or of real images (the ceiling), or of these with the molecules
    permuted (the floor)."""
    model, scores = opened.model, {}
    measure, probe = morphology(opened), screen_probe(opened)
    for kind, name in MOLECULE_SETS.items():
        series = DoseSeries(opened, kind, args.molecules, args.series)
        truth, rows = series.shape(measure(series.truth(10_000))), series.rows()
        if limit is None:
            images = generate(model, columns_of(rows, model.fields), [r["cells"] for r in rows],
                              request_of(args, model))
        else:
            images = series.truth(20_000)
        if limit == "molecules permuted":
            order = np.random.default_rng(1).permutation(len(series.molecules))
            images = images.unflatten(0, (len(order), -1))[order].flatten(0, 1)
        y, ec50 = series.shape(measure(images)), [m["ec50"] for m in series.molecules]
        spearman, decades = dose_fidelity(y, truth, series.doses, ec50)
        scores[name] = {"probe": probe_scores(probe, images, rows)["true_mechanism"],
                        "correlation": across_molecules(y, truth), "dose_rank": spearman,
                        "ec50_error": decades}
    return scores


def print_encoders(lines, out):
    """The tables of compare_encoders, means over seeds, and its figure."""
    names, kinds = ("probe", "correlation", "dose_rank", "ec50_error"), MOLECULE_SETS.values()
    ours = {label: [line for line in lines if line["label"] == label]
            for label in dict.fromkeys(line["label"] for line in lines)}

    def mean(entries, name):
        return np.mean([e[name] for e in entries])
    for kind in kinds:
        print_table(kind, {name.replace("_", " "): ".2f" for name in names}, [
            (label, *(mean([e[kind] for e in entries], name) for name in names))
            for label, entries in ours.items()])
    print_table("", {"M parameters": ".2f", "s a training step": ".2f"}, [
        (label, mean(entries, "parameters") / 1e6, mean(entries, "seconds_per_step"))
        for label, entries in ours.items() if "parameters" in entries[0]])
    draw_rows(out / "encoders.png", [f"{line['label']}, {line['seed']}" for line in lines], [
        (name.replace("_", " "), {kind: [(line[kind][name], None) for line in lines]
                                  for kind in kinds}, None) for name in names])
    print(f"wrote {out}/encoders.jsonl and encoders.png")


# ------------------------------------------------------------------------------------------------
# 9. control: does a ControlNet draw *these* cells?
# ------------------------------------------------------------------------------------------------

def pearson(x, y):
    """Correlation of the pixels of each image and channel: (N, C) of two (N, C, H, W)."""
    x, y = (v.flatten(2) - v.flatten(2).mean(2, keepdim=True) for v in (x, y))
    return F.cosine_similarity(x, y, dim=2)


def psnr(x, y, over=None):
    """Peak signal to noise in dB of images on [0, 1], the error averaged over these dimensions or
    over all."""
    return -10 * (x - y).square().mean(over).clamp(min=1e-9).log10()


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


def paired_scores(images, p, channels, radius):
    """How near images (N, C, H, W) in [-1, 1] come to the true ones of the same cells (see
    `paired`): per channel L1, PSNR, SSIM, Pearson correlation, and the mean difference of log power
    (signed: below 0 is too smooth); nuclei count error, as a share of the mean count; kernel
    distance to other images."""
    x, y = (images + 1) / 2, (p.real + 1) / 2
    found, true = (count_objects(segment_nuclei(v[:, channel(channels, "DNA")], radius))
                   for v in (x, y))
    spectrum = power_spectrum(x) - power_spectrum(y)
    return {"l1": (x - y).abs().mean((0, 2, 3)).tolist(),
            "psnr": psnr(x, y, (0, 2, 3)).tolist(),
            "ssim": structural_similarity(x, y).mean(0).tolist(),
            "pearson": pearson(x, y).mean(0).tolist(),
            "spectrum": spectrum.mean(1).tolist(),
            "spectrum_error": spectrum.abs().mean(1).tolist(),
            "nuclei_error": ((found - true).abs().mean() / true.mean()).item(),
            "nuclei_bias": (found.mean() / true.mean() - 1).item(),
            "distance": kernel_distance(p.measure(images), p.others)}


class Regression(nn.Module):
    """The baseline: a plain U-Net in pixels from the control image to the stains, L1, no noise."""

    def __init__(self, channels, out):
        super().__init__()
        self.out, self.width = out, max(channels, out)
        self.unet = UNet(UNetConfig(
            self.width, fold=2, width=48, multipliers=(1, 2, 2), blocks=1,
            attention=(False, False, False), embedding=64, token=16))

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
        none = set(train_ldm.untreated(m, opened.model.fields, held))
        effect = m.columns.get("true_effect", ["1"] * len(m))
        held = np.array([i for i in held if i not in none and float(effect[i] or 0) >= .5], int)
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


def paired(opened, args, strong):
    """What paired images are scored with: held-out rows (`strong`: see control_rows), their images
    and control images, and the features of other held-out images."""
    rows, others = control_rows(opened, args.images, strong)
    real, hint = seen_with_control(opened, rows)
    measure = morphology(opened, args.nucleus_radius)
    return SimpleNamespace(rows=rows, real=real, hint=hint, shown=hint[0], measure=measure,
                           others=measure(seen_with_control(opened, others, 1)[0]))


def draw_controlled(opened, rows, args, control, seeds=None):
    """Images for the conditions of manifest rows, with control images or without (None)."""
    columns = metadata(opened.model.fields, opened.manifest, rows)
    with autocast():
        return opened.model.generate(columns, seeds or range(len(rows)), args.guidance, args.form,
                                     args.steps, sampler=args.sampler, control=control,
                                     interval=args.interval)


def control(args):
    """The tables of `evaluate.py control`."""
    opened = open_model(args)
    model, told = opened.model, opened.model.controlnet
    if not told:
        raise UserError(f"{args.checkpoint} has no ControlNet: train one with python train_ldm.py "
                        "--control_column NAME")
    if args.quick:
        args.images, args.samples = min(args.images, 32), min(args.samples, 2)
    if told["column"] == "negcon":
        cells_of(opened.manifest, [told["by"], *(args.by or [])])  # refused before any work
    out = folder_of(args)
    report = {"column": told["column"], "learning": draw_learning(out, args.checkpoint),
              "identity": identity(opened, (10, 25, 50) if args.quick else (10, 25, 50, 100, 200))}
    if told["column"] == "negcon":
        report["plates"] = control_by_plate(opened, args, out)
    else:
        report["paired"] = control_paired(opened, args, out)
        if told["channels"] == len(model.channels):
            report["counterfactual"] = counterfactual(opened, args, out)
    write_report(out / "control.json", args, report, "control.png")


def regress(opened, shown, seconds):
    """The control images `shown` through the regression, trained for this long on the same cuts of
    control images and images."""
    model = opened.model
    pixels = sample.control_pixels(model.controlnet["column"], opened.manifest, opened.pixels)

    def draw(rng, count):
        chosen, seed = rng.choice(opened.train, count), int(rng.integers(2 ** 31))
        return [views(p, chosen, opened.settings, scale, np.random.default_rng(seed))
                for p, scale in ((pixels, model.controlnet["intensity"]),
                                 (opened.pixels, model.intensity))]
    network = train_regression(draw, seconds)
    return torch.cat([network(x.to(device())).clamp(-1, 1).cpu() for x in shown.split(64)])


def control_paired(opened, args, out):
    """Every way of drawing held-out images from their control images, and some that do not look."""
    model, channels, column = (opened.model, opened.model.channels,
                               opened.model.controlnet["column"])
    same = model.controlnet["channels"] == len(channels)  # the cells before treatment
    p = paired(opened, args, same)
    n, seconds = len(p.rows), report_seconds(args.checkpoint) * (.1 if args.quick else 1.)
    sets = {"through the autoencoder": reconstruct(model.vae, p.real)[0]}
    for name, given in (("ControlNet", p.hint), ("without control", None)):
        many = torch.stack([draw_controlled(opened, p.rows, args, given, range(k * n, (k + 1) * n))
                            for k in range(args.samples)])
        sets |= {name: many[0], f"{name}, mean of {len(many)}": many.mean(0)}
    sets["regression"] = regress(opened, p.shown, seconds)
    if p.shown.shape[1] in (1, len(channels)):
        sets["control itself"] = p.shown.expand_as(p.real)
    some = np.random.default_rng(0).permutation(opened.train)[:512]
    sets |= {"mean image": real_images(opened, some).mean(0, keepdim=True).expand_as(p.real),
             "real": p.real}
    table = {name: paired_scores(x, p, channels, args.nucleus_radius) for name, x in sets.items()}
    print_paired(table, channels)
    kinds = ["real", "ControlNet", "without control", "regression"]
    data.picture(out / "control.png", [list(x[:6].numpy()) for x in (
        p.shown if same else p.shown[:, 0], *(sets[kind] for kind in kinds))],
        channels, [column, *kinds], pixel_um=model.pixel_um)
    kinds = ["ControlNet", "real", "regression"]
    data.picture(out / "control_channels.png", [
        [p.shown[0, 0].numpy(), *sets[kind][0].numpy()] for kind in kinds],
        channels, kinds, [column, *channels], model.pixel_um)
    return table


def print_paired(table, channels):
    """The tables of control_paired: means over channels, and Pearson correlation by channel."""
    means = {"l1": ("L1", ".4f"), "psnr": ("PSNR", ".1f"), "ssim": ("SSIM", ".3f"),
             "spectrum_error": ("spectrum", ".2f"), "nuclei_error": ("nuclei error", ".3f"),
             "nuclei_bias": ("(bias)", "+.3f")}
    print_table("", dict(means.values()) | {"distance": ".2f"}, [
        (name, *(np.mean(e[k]) for k in means), e["distance"]) for name, e in table.items()])
    print_table("Pearson", dict.fromkeys(channels, ".2f"), [
        (name, *e["pearson"]) for name, e in table.items()])


def report_seconds(checkpoint):
    """How long a model was trained, from the log beside it."""
    seconds = [entry.get("seconds", 0.) for entry in read_log(Path(checkpoint).parent)]
    # a resumed run counts from 0 again
    return max(1., sum(a for a, b in zip(seconds, [*seconds[1:], 0.]) if b < a))


def draw_learning(out, checkpoint):
    """The held-out loss along the training, and the step at which half of its fall was done."""
    log = read_log(Path(checkpoint).parent)
    steps, losses = [e["step"] for e in log], [e["heldout_loss"] for e in log]
    half = (losses[0] + min(losses)) / 2
    click = next((s for s, v in zip(steps, losses) if v <= half), None)
    with figure(out / "learning.png", figsize=(4.5, 3)) as axis:
        axis.plot(steps, losses, "o-", ms=3)
        axis.axvline(click, color=".7", lw=1)
        axis.set(xlabel="step", ylabel="held-out loss with control",
                 title=f"half of the fall by step {click}")
    return {"steps": steps, "heldout_loss": losses, "half_of_the_fall": click}


def identity(opened, steps, count=8):
    """Inverted and drawn again under their own conditions, all weights 1, images should come back:
    {steps: PSNR in dB against the autoencoder's own reconstruction}, by rounds of the fixed point
    (1 is the inversion of Song et al. 2021, 3 the default)."""
    model, rows = opened.model, opened.held[:count]
    images, own = real_images(opened, rows), metadata(model.fields, opened.manifest, rows)
    rebuilt = model.vae.to_image(model.vae.to_latent(images.to(device()))).cpu()
    table = {n: [psnr(model.edit(images, own, own, steps=n, rounds=rounds) / 2, rebuilt / 2).item()
                 for rounds in (1, 3)] for n in steps}
    print_table("the same image again, PSNR in dB", {"rounds 1": ".1f", "3": ".1f"}, [
        (f"{n} steps", *found) for n, found in table.items()])
    return table


def overlap(one, other, radius):
    """Intersection over union of the nuclei in two sets of DNA images (N, H, W) on [0, 1]."""
    a, b = (segment_nuclei(x, radius) > 0 for x in (one, other))
    return ((a & b).sum() / (a | b).sum().clamp(min=1)).item()


def counterfactual(opened, args, out):
    """The same cells, treated: the ControlNet, and editing by inversion without it, against the
    true image of these cells after treatment. All after the autoencoder."""
    model, m, p = opened.model, opened.manifest, paired(opened, args, True)
    start, truth = (reconstruct(model.vae, x)[0] for x in (p.shown, p.real))
    target = metadata(model.fields, m, p.rows)
    source = target | {name: [value] * len(p.rows)  # the untreated cells'
                       for name, value in (model.content["control"] or {}).items()}
    sets = {"untreated": start, "ControlNet": draw_controlled(opened, p.rows, args, p.hint),
            "edited": model.edit(p.shown, source, target, args.guidance, args.form,
                                 interval=args.interval),
            "without control": draw_controlled(opened, p.rows, args, None), "the truth": truth}
    probe = screen_probe(opened) if "true_mechanism" in m.columns else None
    nuclei = {name: (x[:, channel(model.channels, "DNA")] + 1) / 2 for name, x in sets.items()}
    table = {name: {
        "l1": (x - truth).abs().mean((0, 2, 3)).div(2).tolist(),
        "nuclei_overlap": overlap(nuclei[name], nuclei["untreated"], args.nucleus_radius),
        "distance": kernel_distance(p.measure(x), p.others)}
        | probe_scores(probe, x, records(m, p.rows)) for name, x in sets.items()}
    print_table("the same cells, treated", {"L1 to the truth": ".4f", "nuclei overlap": ".2f",
                                            "mechanism": ".2f", "distance": ".2f"}, [
        (name, np.mean(e["l1"]), e["nuclei_overlap"], e.get("true_mechanism"),
         e["distance"]) for name, e in table.items()])
    rows = {"untreated": p.shown, "ControlNet": sets["ControlNet"], "edited": sets["edited"],
            "truth": p.real}
    data.picture(out / "counterfactual.png", [list(x[:8].numpy()) for x in rows.values()],
                 model.channels, list(rows), ["\n".join(
                     m.columns[f.name][i][:16] for f in model.fields[:2]) for i in p.rows[:8]],
                 model.pixel_um)
    return table


def control_by_plate(opened, args, out):
    """Negative controls as a plate's style: nuclei per image and mean intensity of each channel of
    held-out images, by plate (and by the columns --by), real and generated with and without a
    control of that plate. Plates that training never saw are told as unknown: there the control
    is all that the model knows of them."""
    model, m, by = opened.model, opened.manifest, opened.model.controlnet["by"]
    cells, seen = cells_of(m, [by, *(args.by or [])]), set(m.rows(opened.train, by))
    table, pictures = {}, {}
    for cell in sorted(set(cells[opened.held])):
        inside = np.random.default_rng(0).permutation(opened.held[cells[opened.held] == cell])
        rows = np.resize(inside, args.images)
        real, hint = seen_with_control(opened, rows)
        sets = {"real": real, "with control": draw_controlled(opened, rows, args, hint),
                "without control": draw_controlled(opened, rows, args, None)}
        found = {name: summarise(x, model.channels, args.nucleus_radius)
                 for name, x in sets.items()}
        for e in found.values():
            e["log_error"] = float(np.mean([abs(np.log(e[k] / found["real"][k]))
                                            for k in found["real"] if k.endswith("_mean")]))
        table[cell] = {"in_training": m.columns[by][inside[0]] in seen, "images": len(inside)
                       } | found
        pictures[cell] = {name: x[:6] for name, x in sets.items()}
    kinds = ("real", "with control", "without control")
    print_summaries("", {cell + ("" if e["in_training"] else " (unseen)") + f", {kind}": e[kind]
                         for cell, e in table.items() for kind in kinds})
    for kind in kinds[1:]:
        print(f"{kind}: mean error of log intensity over plates "
              f"{np.mean([e[kind]['log_error'] for e in table.values()]):.3f}")
    draw_sets(out / "control.png", dict(itertools.islice(pictures.items(), 6)), model)
    return table


# ------------------------------------------------------------------------------------------------
# 10. vae: which latent space?
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
    a, b = (features(v, channels, at_once(v)).double() for v in (x, y))
    kept = a.isfinite() & b.isfinite()
    a, b = (torch.where(kept, v, torch.nan) for v in (a, b))
    correlation, count = correlations(a, b).nan_to_num(0.), kept.sum(0)
    deviation = ((a - a.nanmean(0)).square().nansum(0) / (count - 1)).sqrt()
    bias = (b - a).nanmean(0).abs() / deviation.clamp(min=1e-9)
    table, names = {}, feature_names(channels)
    for name in ["nuclei", *channels]:
        own = torch.tensor([k < 5 if name == "nuclei" else feature.startswith(f"{name}_")
                            and not feature.endswith("_correlation")
                            for k, feature in enumerate(names)]) & (count > 2)
        table[name] = correlation[own].mean().item(), bias[own].mean().item()
    return table


def score_reconstruction(x, x_hat, channels, probe, rows):
    """All that compares reconstructions with the originals (N, C, H, W) in [-1, 1]."""
    p, q = (x + 1) / 2, (x_hat + 1) / 2
    power = power_spectrum(q) - power_spectrum(p)                        # (C, frequencies)
    similar = torch.cat([structural_similarity(a, b) for a, b in zip(
        p.split(at_once(p)), q.split(at_once(q)))])
    return train_vae.reconstruction_metrics(x, x_hat) | {
        "ssim": similar.mean(0).tolist(),
        "psnr_per_channel": psnr(p, q, (0, 2, 3)).tolist(),
        "emd": earth_movers_distance(p, q).tolist(),
        "fine_power": power[:, power.shape[1] // 2:].mean(1).tolist(),
        "features": feature_agreement(x, x_hat, channels)} | probe_scores(probe, x_hat, rows)


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
    configs = {change: config_of(args, change) for change in args.configs or LATENT_SPACES}
    out = Path(args.out)
    results, lines, pictures = Results(out / "vae.jsonl"), [], {}
    for change, config in configs.items():
        name = change.replace(" ", ",") or "default"
        config = replace(config, data=args.data or config.data,
                         out=str(out / f"{name}-{args.train_steps}"))
        path = train_vae.trained(config)
        opened = open_autoencoder(path)
        if opened.settings.data != config.data:
            raise UserError(f"{path} was trained on {opened.settings.data}: use another --out")
        x, rows = held_out(opened, args.images)
        x_hat, kl = reconstruct(opened.model.vae, x)
        line = results.get({"vae": change, "autoencoder": finger(path), "images": len(x)},
                           lambda: {"label": name} | measure_autoencoder(opened, x, x_hat, kl,
                                                                         rows))
        if args.ldm_steps:
            line = line | results.get(
                {"ldm_on": change, "autoencoder": finger(path)} | {k: getattr(args, k) for k in (
                    "ldm_steps", "images", "guidance", "form", "interval", "steps", "sampler")},
                lambda: generation_on(args, path, out / f"ldm-{name}-{args.train_steps}"))
        lines.append(line)
        pictures.setdefault("original", x[0].numpy())
        pictures[name] = x_hat[0].numpy()
    channels = opened.model.channels
    lines[0]["originals"] = score_reconstruction(x, x, channels, screen_probe(opened), rows)
    print_latent_spaces(lines, channels)
    data.picture(out / "vae.png", [[image, *image] for image in pictures.values()], channels,
                 list(pictures), ["all", *channels])
    draw_rate_distortion(out / "rate_distortion.png", lines)
    write_report(out / "vae.json", args, {"table": lines}, "vae.png", "rate_distortion.png")


def config_of(args, change):
    """"latent_channels=8 kl_weight=1e-3" as settings of train_vae.py."""
    for word in change.split():
        if word.partition("=")[0] in ("data", "out", "resume", "overwrite", "help"):
            raise UserError(f"--configs {word}: no setting of an autoencoder's training")
    return train_vae.settings(train_vae.Config, [
        f"--steps={args.train_steps}", *(f"--{word}" for word in change.split())])


def measure_autoencoder(opened, x, x_hat, kl, rows):
    """One line of the table: size, rates, reconstruction, and the baselines beside it."""
    vae, channels, probe = opened.model.vae, opened.model.channels, screen_probe(opened)
    encode, decode = rates(vae, x)
    numbers = vae.to_latent(x[:1].to(device())).numel()
    small = shrunk(x, numbers)
    some = np.random.default_rng(1).permutation(opened.train)[:15 * at_once(x)]
    f = opened.settings.downsampling
    pca = PatchPCA(real_images(opened, some), f, numbers // (x[0, 0].numel() // f ** 2))
    return {"numbers": numbers, "numbers_per_pixel": numbers / x[0, 0].numel(),
            "kl": kl.mean().item(), "encoded_per_s": encode, "decoded_per_s": decode,
            "parameters": sum(p.numel() for p in vae.parameters()),
            **score_reconstruction(x, x_hat, channels, probe, rows),
            "baselines": {name: score_reconstruction(x, y, channels, probe, rows)
                          for name, y in (("small image", small), ("patch PCA", pca(x)))}}


def open_autoencoder(path):
    """As open_model, of an autoencoder."""
    vae, content = train_vae.load_vae(path)
    opened = open_data(SimpleNamespace(**content["settings"]), draw=False)
    opened.model = SimpleNamespace(vae=vae, channels=opened.manifest.channels,
                                   intensity=content["intensity"])
    return opened


def held_out(opened, count):
    """(held-out images, their rows of the manifest), at random."""
    some = np.random.default_rng(0).permutation(opened.held)[:count]
    rng = np.random.default_rng(0) if opened.settings.crop else None
    return real_images(opened, some, rng), records(opened.manifest, some)


def generation_on(args, vae, out):
    """What an autoencoder is worth: probes and kernel distance of a diffusion model trained on its
    latents for `--ldm_steps`, on held-out wells of seen conditions."""
    path = trained(train_ldm.Config(data=args.data or train_ldm.Config.data, vae=str(vae),
                                    out=str(out), steps=args.ldm_steps))
    opened = open_trained(args, path)
    if "true_mechanism" not in opened.manifest.columns:
        return {}
    cells = cells_of(opened.manifest, ["true_mechanism", "batch"])
    held, = heldout_sets(opened, ["val"]).values()
    a, b = halves(opened.manifest, held, cells, args.images)
    entry, _ = quality_of(opened, a, b, cells, morphology(opened), screen_probe(opened),
                          request_of(args, opened.model))
    return {"generated": entry["generated"], "generated_floor": entry["real"]["distance"],
            "generated_ceiling": entry["real"]["ceiling"]}


def print_latent_spaces(lines, channels):
    """One line per autoencoder and baseline: reconstruction; then by channel; then speed and
    generation."""
    rows = [row for e in lines for row in (
        (e["label"], e), *((f"    {name}", b) for name, b in e["baselines"].items()))]
    print_table("", {"numbers": "d", "a pixel": ".3f", "KL": ".0f", "L1": ".4f", "PSNR": ".1f",
                     "SSIM": ".3f", "EMD": ".4f", "mechanism": ".2f", "batch": ".2f"}, [
        (label, e.get("numbers"), e.get("numbers_per_pixel"), e.get("kl"), e["l1"], e["psnr"],
         np.mean(e["ssim"]), np.mean(e["emd"]), e.get("true_mechanism"), e.get("batch"))
        for label, e in (*rows, ("the originals", lines[0]["originals"]))])
    for title, key, form in (("L1", "l1_per_channel", ".4f"), ("PSNR", "psnr_per_channel", ".1f"),
                             ("structural similarity", "ssim", ".3f"),
                             ("earth mover's distance", "emd", ".4f"),
                             ("fine power, log (-: lost)", "fine_power", ".2f")):
        print_table(title, dict.fromkeys(channels, form), [(label, *e[key]) for label, e in rows])
    names = ["nuclei", *channels]
    print_table("features: correlation (bias)", dict.fromkeys(names, ""), [
        (label, *("{:.2f} ({:.2f})".format(*e["features"][name]) for name in names))
        for label, e in rows])
    print_table("", {"M parameters": ".2f", "encoded/s": ".0f", "decoded/s": ".0f"}, [
        (e["label"], e["parameters"] / 1e6, e["encoded_per_s"], e["decoded_per_s"])
        for e in lines])
    made = [e for e in lines if "generated" in e]
    if made:
        print_table("generated on held-out wells", {
            "mechanism": ".2f", "batch": ".2f", "distance": ".2f", "floor": ".2f",
            "ceiling": ".2f", "variance": ".2f"}, [
            (e["label"], e["generated"]["true_mechanism"], e["generated"]["batch"],
             e["generated"]["distance"], e["generated_floor"], e["generated_ceiling"],
             e["generated"]["variance_ratio"]) for e in made])


def draw_rate_distortion(path, lines):
    """L1 against the numbers kept per image and against the KL term."""
    with figure(path, 1, 2, figsize=(11, 3.6), sharey=True) as axes:
        for k, e in enumerate(lines):
            for axis, rate in zip(axes, (e["numbers"], e["kl"])):
                axis.plot(rate, e["l1"], "o", color=f"C{k % 10}", label=e["label"])
        for name, mark in (("small image", "^"), ("patch PCA", "s")):
            points = sorted({(e["numbers"], e["baselines"][name]["l1"]) for e in lines})
            axes[0].plot(*zip(*points), mark, mfc="none", color="k", label=name)
        axes[0].set(xscale="log", yscale="log", xlabel="numbers per image", ylabel="L1 on [0, 1]")
        axes[1].set(xscale="log", xlabel="KL, nats per image")
        axes[0].grid(alpha=.3), axes[1].grid(alpha=.3)
        axes[1].legend(*axes[0].get_legend_handles_labels(), fontsize=7, frameon=False,
                       loc="center left", bbox_to_anchor=(1.02, .5))         # beside the figure


# ------------------------------------------------------------------------------------------------
# 11. Mol2Image's benchmark, reimplemented (Yang et al. 2021; its metric code was not released)
# ------------------------------------------------------------------------------------------------

BINOMIAL = torch.tensor([1., 4., 6., 4., 1.]) / 16
REACH = 16.  # of the histograms of projections, in deviations


def laplacian_pyramid(x, smallest=16):
    """Bands of images (N, C, H, W), finest first, the last the low-pass rest at `smallest` pixels:
    5x5 binomial kernel, mirrored borders (Burt & Adelson 1983)."""
    bands = []
    while min(x.shape[2:]) >= 2 * smallest:
        small = blur(x, BINOMIAL)[:, :, ::2, ::2]
        apart = torch.zeros_like(x)
        apart[:, :, ::2, ::2] = small
        bands.append(x - 4 * blur(apart, BINOMIAL))
        x = small
    return [*bands, x]


def random_patches(bands, seeds, patches=128, side=7):
    """From each image its own random patches: [(N, patches, C, side, side)] by level. The places
    depend on the image's seed alone, so that any batch size gives the same."""
    found = []
    for level, band in enumerate(bands):
        h, w = (n - side + 1 for n in band.shape[2:])
        windows = band.unfold(2, side, 1).unfold(3, side, 1)         # (N, C, h, w, side, side)
        places = np.stack([np.random.default_rng((seed, level)).integers(h * w, size=patches)
                           for seed in seeds])
        y, x = (torch.from_numpy(v) for v in np.divmod(places, w))
        found.append(windows[torch.arange(len(band))[:, None], :, y, x])
    return found


def histogram(values, low, high, bins=4096):
    """Counts (R, bins) of each row of values (R, n); what lies outside counts at the ends."""
    return tally(((values - low) * (bins / (high - low))).clamp(0, bins - 1).long(), bins)


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
    sums, found = 0, 0
    for levels in patches_of(stream):
        sums = sums + torch.stack([torch.stack([p.double().pow(k).sum((0, 2, 3)) for k in range(3)])
                                   for p in levels])                     # (levels, 3, C)
    mean, square = sums[:, 1] / sums[:, 0], sums[:, 2] / sums[:, 0]
    std = (square - mean ** 2).clamp(min=0).sqrt().clamp(min=1e-8)
    for levels in patches_of(stream):
        found = found + torch.stack([
            along_directions(((p - m[:, None, None]) / s[:, None, None]).flatten(1).float())
            for p, m, s in zip(levels, mean, std)])                      # (levels, 512, bins)
    return found


def sliced_wasserstein(a, b):
    """Sliced Wasserstein distance x 1000 by level, finest first, of two sets of images from
    `patch_histograms`. As each set was standardised by itself, it is blind to brightness and
    contrast."""
    return [1000 * area_between(p, q, -REACH, REACH).mean().item() for p, q in zip(a, b)]


# --- morphology as the benchmark groups it --------------------------------------------------------

def minimum_cross_entropy(x, bins=128):
    """Threshold (B,) of (B, H, W) on [0, 1] (Li & Lee 1993): the cut whose two class means tell
    most, the largest m0 log(mean0) + m1 log(mean1) with m the summed intensities."""
    count, value = grey_levels(x, bins)
    n0, m0 = count.cumsum(1), (count * value).cumsum(1)                  # (B, bins)
    told = sum(m * (m / n.clamp(min=1)).clamp(min=1e-9).log()
               for n, m in ((n0, m0), (n0[:, -1:] - n0, m0[:, -1:] - m0)))
    return best_level(told, value) + .5 / (bins - 1)


def lower_of_three(x, bins=64):
    """The lower threshold (B,) of Otsu's method with three classes: background apart from the two
    brighter ones, the largest sum of w mean^2 over classes."""
    count, value = grey_levels(x, bins)
    share = count / x[0].numel()
    w, m = share.cumsum(1), (share * value).cumsum(1)
    between = sum(b ** 2 / a.clamp(min=1e-9) for a, b in (                # (B, lower, upper)
        (w[:, :, None], m[:, :, None]), (w[:, None] - w[:, :, None], m[:, None] - m[:, :, None]),
        (w[:, None, -1:] - w[:, None], m[:, None, -1:] - m[:, None])))
    upper = torch.ones(bins, bins, dtype=torch.bool, device=x.device).triu(1)
    best = between.masked_fill(~upper, -1.).flatten(1).argmax(1) // bins
    return (best + .5) / (bins - 1)


ZERNIKE = [(n, m) for n in range(10) for m in range(n + 1) if (n - m) % 2 == 0]   # 30 moments


def radial_polynomial(rho, n, m):
    """R_n^m of Zernike (1934) at radii in [0, 1]."""
    return sum((-1) ** k * math.comb(n - k, k) * math.comb(n - 2 * k, (n - m) // 2 - k)
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
    return (moments * whole_objects(labels)[..., None])[:, 1:]


def mean_and_median(x):
    """Of (B, L, F) over L, without NaN: (B, 2 F), NaN where there is nothing."""
    nothing = x.new_full((len(x), 1, x.shape[2]), torch.nan)
    return torch.cat([x.nanmean(1), torch.cat([x, nothing], 1).nanmedian(1).values], 1)


FAMILIES = ("coverage", "count", "size", "Zernike shape", "intensity")


def correspondence_features(images, channels, radius=NUCLEUS_RADIUS):
    """{family: (N, features)} of images (N, C, H, W) in [-1, 1], as CellProfiler's are grouped in
    Mol2Image's benchmark: share of the field covered by nuclei and by cells; number of nuclei; mean
    and median over nuclei and over cells of area and of 30 Zernike moments; mean and median
    intensity of each channel in cells. Cells are the nuclei's labels spread over the stained area
    of the RNA channel. Nuclei that the border cuts are discarded with their cells, but for the
    count, which `count_objects` keeps without bias."""
    x = (images.to(device()).float() + 1) / 2
    nuclei = segment_nuclei(x[:, channel(channels, "DNA")], radius, threshold=minimum_cross_entropy)
    rna = gaussian_blur(x[:, channel(channels, "RNA"), None], 1.)[:, 0]
    cells = spread(nuclei, rna > lower_of_three(rna)[:, None, None], round(3 * radius))
    whole = [without(v, cut_by_border(nuclei)) for v in (nuclei, cells)]
    inside = torch.where(whole[1][:, None] > 0, x, torch.nan).flatten(2)  # (N, C, H W)
    found = {"coverage": torch.stack([(v > 0).float().mean((1, 2)) for v in whole], 1),
             "count": count_objects(nuclei)[:, None],
             "size": torch.cat([mean_and_median(object_shapes(v)[0][..., None]) for v in whole], 1),
             "Zernike shape": torch.cat([mean_and_median(zernike_moments(v)) for v in whole], 1),
             "intensity": torch.cat([inside.nanmean(2), inside.nanmedian(2).values], 1)}
    return {name: values.cpu() for name, values in found.items()}


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


# --- does this image belong to this molecule? -----------------------------------------------------

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

    def loss_of(rng):
        chosen = rng.integers(len(rows), size=batch)
        x, own = torch.rot90(read(rows[chosen]), int(rng.integers(4)), (2, 3)), molecule[chosen]
        with autocast():
            out = network(x.to(device()), graphs[own].to(device())).float()        # (B, B)
        matched = torch.from_numpy(own[:, None] == own).to(out)
        weight = matched / matched.sum() + (1 - matched) / (1 - matched).sum().clamp(min=1)
        return F.binary_cross_entropy_with_logits(out, matched, weight / 2, reduction="sum")
    return fit(network, loss_of, steps, lr, seed, "correspondence")


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
        true, wrong = scores[0], scores[1:]
        right.append(((true > 0).float() + (wrong[0] <= 0).float()).item() / 2)
        places.append((wrong > true).sum().item() + .5 * (wrong == true).sum().item())
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


def treatments(opened, checkpoint):
    """What the benchmark compares over: (SMILES of each row, its treatment as molecule and dose,
    rows with a molecule at a quarter of the highest dose or more)."""
    m, fields = opened.manifest, opened.model.fields
    molecule, dose = (next((f.name for f in fields if f.kind == kind), None)
                      for kind in ("molecule", "log"))
    if not molecule:
        raise UserError(f"{checkpoint} was told no molecule")
    smiles = np.array(m.columns[molecule])
    if not dose:
        return smiles, smiles, np.flatnonzero(smiles != "")
    doses = np.array([float(d) if d else 0. for d in m.columns[dose]])
    strong = (4 * doses >= doses.max()) & (doses > 0)
    return smiles, cells_of(m, [molecule, dose]), np.flatnonzero(strong & (smiles != ""))


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
    rng, batch = np.random.default_rng(2), batches_of(opened.manifest)
    trained = [i for i in opened.train if smiles[i]]
    nearest = nearest_molecules([smiles[i] for i in rows], sorted({smiles[i] for i in trained}))
    by_smiles, by_treatment = rows_by(smiles, trained), rows_by(treatment, trained)
    found = []
    for i in rows:
        near = nearest[smiles[i]]
        same_dose = near + treatment[i].removeprefix(smiles[i])  # "CCO x 10" to "CCN x 10"
        candidates = by_treatment.get(same_dose) or by_smiles[near]
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
    columns, request = metadata(model.fields, opened.manifest, rows), request_of(args, model)
    key = f"{finger(checkpoint)}{opened.manifest.path.resolve()}{list(rows)}{request}"
    path = Path(folder) / f"generated-{hashlib.sha1(key.encode()).hexdigest()[:12]}.npy"
    if not path.exists():
        shape = (len(rows), len(model.channels), *model.size)
        made = np.lib.format.open_memmap(path.with_suffix(".tmp"), "w+", np.float16, shape)
        for i in tqdm(range(0, len(rows), 64), desc="generated images"):
            part = slice(i, i + 64)
            made[part] = generate(model, {name: values[part] for name, values in columns.items()},
                                  range(len(rows))[part], request).numpy()
        made.flush()
        path.with_suffix(".tmp").rename(path)
    made = np.load(path, mmap_mode="r")
    return lambda k: torch.from_numpy(made[k].astype(np.float32))


def readers(opened, args, a, b, smiles, treatment, out):
    """{kind: read(places)}: the sets of images that are compared with the real rows `a`, these
    first; `b` are the same treatments in other wells."""
    def rows(chosen):
        return lambda k: real_images(opened, chosen[k])
    sets = {"real": rows(a), "real, another well": rows(b),
            "real, molecules permuted": rows(np.random.default_rng(3).permutation(b)),
            "generated": generated_images(opened, opened.model, args.checkpoint, a, args, out),
            "nearest training molecule": rows(nearest_images(opened, a, smiles, treatment)),
            "class mean": class_means(opened, a, treatment)}
    if args.generated:
        sets["the other system"] = other_system(opened, args.generated, a)
    return sets


# --- the benchmark --------------------------------------------------------------------------------

def halved(images, size=64):
    """Images averaged over 2x2 pixels until they are `size` pixels wide."""
    while images.shape[-1] >= 2 * size:
        images = F.avg_pool2d(images, 2)
    return images


@torch.no_grad()
def measure_images(read, n, channels, network, what, batch=64):
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
    """The benchmark's figures of images beside real ones of the same conditions (both from
    measure_images): at 64 pixels, and sliced Wasserstein distance at their own size where both are
    larger. 5 to 95 % over half samples of the molecules. place (N,): each image's molecule among
    graphs."""
    levels = [sliced_wasserstein(made["patches"][side], real["patches"][side])
              for side in sorted(set(made["patches"]) & set(real["patches"]))]
    found = dict(zip(("swd", "swd_native"), levels)) | {"intensity_w1": area_between(
        made["intensity"], real["intensity"], 0., 1.).tolist()}
    a, b = (by_molecule(v["features"], place) for v in (made, real))
    hits = correspondence_hits(network, made["codes"], graphs, place)
    found["correlation"] = correlation_by_family(a, b)
    found |= {name: float(v.mean()) for name, v in hits.items()}

    def statistic(some):
        return {f: correlations(a[f][some], b[f][some]).nanmean().item() for f in FAMILIES} | {
            "accuracy": hits["accuracy"][np.isin(place, some)].mean()}
    n = len(graphs)
    return found | {"candidates": min(100, n), "interval": half_samples(
        statistic, np.arange(n), lambda rng: rng.permutation(n)[:max(3, n // 2)])}


def benchmark(opened, args, out):
    """The tables of `evaluate.py quality --mol2image`."""
    model, m = opened.model, opened.manifest
    if args.quick:
        args.images, args.train_steps = min(args.images, 96), 300
    smiles, treatment, usable = treatments(opened, args.checkpoint)
    pixel = args.pixel_model and Model.load(args.pixel_model)
    if pixel:
        train_ldm.check_manifest(pixel, m)
        if (pixel.channels, pixel.intensity) != (model.channels, model.intensity):
            raise UserError(f"{args.pixel_model} has other channels or intensities than "
                            f"{args.checkpoint}: train both on the same data, same settings")
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
        sets = readers(opened, args, a, b, smiles, treatment, out)
        if pixel:
            sets["same U-Net in pixels"] = generated_images(opened, pixel, args.pixel_model, a,
                                                            args, out)
        pictures[name] = {kind: read(np.arange(min(8, len(a)))) for kind, read in sets.items()}
        found = {kind: measure_images(read, len(a), model.channels, network, f"{name}, {kind}")
                 for kind, read in sets.items()}
        real = found.pop("real")
        table[name] = {"images": len(a), "molecules": len(inside)} | {
            kind: score_benchmark(one, real, network, graphs[inside], place)
            for kind, one in found.items()}
    if not table:
        raise UserError("nothing to compare")
    print_benchmark(table, model.channels)
    draw_sets(out / "mol2image.png", pictures, model)
    write_report(out / "mol2image.json", args, {"guidance": model.weights(args.guidance),
                                                "table": table}, "mol2image.png")


def print_benchmark(table, channels):
    """By set: distances; correlations over molecules, with intervals of Pearson's; accuracies."""
    for name, entry in table.items():
        print(f"\n{name}: {entry['images']} images of {entry['molecules']} molecules")
        kinds = {k: v for k, v in entry.items() if isinstance(v, dict)}
        for title, key in (("sliced Wasserstein x 1000, finest level first", "swd"),
                           ("the same at native size", "swd_native")):
            found = [(kind, *e[key], np.mean(e[key])) for kind, e in kinds.items() if key in e]
            if found:
                print_table(title, dict.fromkeys([*map(str, range(len(found[0]) - 2)), "mean"],
                                                 ".0f"), found)
        print_table("intensity W1 x 1000", dict.fromkeys(channels, ".0f"), [
            (kind, *(1000 * v for v in e["intensity_w1"])) for kind, e in kinds.items()])
        print_table("Pearson over molecules (5 to 95 %)", dict.fromkeys(FAMILIES, ".2f"), [
            (kind, *((e["correlation"][f][0], e["interval"][f]) for f in FAMILIES))
            for kind, e in kinds.items()])
        print_table("Spearman over molecules", dict.fromkeys(FAMILIES, ".2f"), [
            (kind, *(e["correlation"][f][1] for f in FAMILIES)) for kind, e in kinds.items()])
        candidates = next(iter(kinds.values()))["candidates"]
        print_table("share told right", {"pairs (5 to 95 %)": ".2f", **dict.fromkeys(
            (f"top-{k} of {candidates}" for k in (1, 5, 10)), ".2f")}, [
            (kind, (e["accuracy"], e["interval"]["accuracy"]),
             *(e[f"top_{k}"] for k in (1, 5, 10))) for kind, e in kinds.items()])


# --- command line: options {name: (default, help, further words of add_argument)} -----------------

def common(steps=15, sampler="ddim", out=None):
    """What every sub-command takes. Studies keep to the sampler of README's tables; single answers
    are drawn as sample.py draws."""
    return dict(
        checkpoint=("runs/ldm/model.pt", "from train_ldm.py"),
        data=(None, "another manifest than the model's own"),
        guidance=([], "GROUP=WEIGHT for each group", dict(nargs="+")),
        form=("nested", "of guidance", dict(choices=FORMS)),
        interval=(INTERVAL, "noise levels between which guidance acts",
                  dict(nargs=2, type=float, metavar=("LOW", "HIGH"))),
        steps=(steps, "of the sampler"),
        sampler=(sampler, "dpm is DPM-Solver++ 2M", dict(choices=SAMPLERS)),
        out=(out, "folder for JSON and figures (None: the checkpoint's)"),
        quick=(False, "fewer images, shorter training"))


def real_plates(by):
    """What the sub-commands take that can look at real plates; `by`: how many columns."""
    return dict(
        by=(None, "for real plates: columns to cross, biology first, such as compound plate",
            dict(nargs=by)),
        also=(None, "with --by: real images apart by this column, such as well"),
        nucleus_radius=(NUCLEUS_RADIUS, "pixels, with --by: what the segmentation looks for"))


COMMANDS = {
    "quality": (quality, "are held-out conditions drawn as they look?", dict(
        **common(STEPS, "dpm"), **real_plates("+"),
        images=(192, "generated for each held-out set"),
        sets=(None, "values of the column split (val, test_pair, test_substituent, test_scaffold; "
              "with --mol2image easy and hard)", dict(nargs="+")),
        mol2image=(False, "Mol2Image's benchmark"),
        generated=(None, "with --mol2image: a manifest of images that another system made for the "
                   "same plates, wells and sites"),
        pixel_model=(None, "with --mol2image: the same U-Net trained on pixels, for its own row"),
        per_molecule=(4, "with --mol2image: images, at most"),
        train_steps=(1000, "with --mol2image: of the network that tells whether molecule and image "
                     "match"))),
    "disentangle": (disentangle, "how much of the image is biology, how much experiment, beside "
                    "the truth?", dict(
        **common(out="runs/disentangle"), **real_plates(2),
        study=("model", "one checkpoint as it is; at several guidance weights; under the forms of "
               "guidance; with each sampler in few steps and in many; along its training; the "
               "arms, told one group or both (trains them); the shortcut of a classifier (trains "
               "it); real images edited; where in an image each group acts; real plates with one "
               "pair left out in turn (trains them)", dict(choices=(
                   "model", "weights", "forms", "samplers", "training", "arms", "shortcut",
                   "transfer", "attribution", "pairs"))),
        images=(756, "of the whole factorial"),
        rescale=(0., "share of guidance's extra spread taken back"),
        vae=("runs/vae/model.pt", "of the arms: one for all"),
        arms=(list(ARMS), "which arms; the shortcut takes the last of them",
              dict(nargs="+", choices=ARMS)),
        confounding=(None, "of the arms' screens (0 and 0.5 with one seed, 0.9 with three)",
                     dict(nargs="+", type=float)),
        seeds=([0, 1, 2], "with --confounding, and of the shortcut's classifiers",
               dict(nargs="+", type=int)),
        train_steps=(1500, "of each arm"))),
    "conditions": (conditions, "is every field used? with --encoders: which molecule encoder "
                   "generalises? (trains them)", dict(
        **common(),
        encoders=(False, "compare the molecule encoders (in runs/encoders without --out)"),
        names=(["fingerprint", "descriptors", "graph", "smiles", "identity"], "which encoders",
               dict(nargs="+", choices=MOLECULE_ENCODERS)),
        molecule_table=("", "of the encoder table"),
        seeds=([0, 1], "of the training runs", dict(nargs="+", type=int)),
        train_steps=(2000, "of each encoder's model"),
        molecules=(24, "of each kind"),
        series=(6, "images for each molecule and dose"))),
    "control": (control, "does a ControlNet draw these very cells?", dict(
        **common(STEPS, "dpm"),
        by=(None, "negcon: tables by these columns as well as by plate, such as compound",
            dict(nargs="+")),
        images=(128, "held-out images, or for each plate"),
        samples=(8, "of which the mean is shown as well"),
        nucleus_radius=(NUCLEUS_RADIUS, "pixels"))),
    "vae": (compare_latent_spaces, "which latent space? trains autoencoders of several shapes, "
            "weights and losses, and a diffusion model on each", dict(
        **common(out="runs/latent_spaces"),
        configs=(None, 'changes to the default autoencoder, such as "latent_channels=8 '
                 'kl_weight=1e-3" (ten by default)', dict(nargs="+")),
        train_steps=(1500, "of each autoencoder"),
        ldm_steps=(1000, "of the diffusion model on each (0: none)"),
        images=(384, "held-out images")))}


def add_options(parser, options):
    """The options of a sub-command, each of its default's type."""
    for name, (default, text, *words) in options.items():
        kind = ({"action": "store_true"} if default is False else
                {"type": type(default) if isinstance(default, (int, float)) else str})
        parser.add_argument(f"--{name}", default=default, help=text, **kind | dict(*words))


def main():
    parser = data.Parser(description=__doc__,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, parser.epilog = parser.add_subparsers(dest="command", required=True), ""
    for name, (_, text, options) in COMMANDS.items():
        sub = commands.add_parser(name, help=text,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add_options(sub, options)
        parser.epilog += sub.format_help()
    args = parser.parse_args()
    for name in ("images", "steps", "samples", "molecules", "series", "train_steps"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name} must be at least 1")
    if not 0 < getattr(args, "nucleus_radius", 1) < math.inf:
        parser.error("--nucleus_radius must be above 0")
    pairs = [word.partition("=") for word in args.guidance]
    args.guidance = {name: parse_number(name, value) for name, _, value in pairs}
    low, high = args.interval
    if not 0 <= low <= high <= 1 or not 0 <= getattr(args, "rescale", 0) <= 1:
        raise UserError("--interval takes two noise levels from 0 to 1, the smaller first, "
                        "--rescale a share from 0 to 1")
    COMMANDS[args.command][0](args)


if __name__ == "__main__":
    run(main)
