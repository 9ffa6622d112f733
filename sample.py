"""Generate Cell Painting images from a trained checkpoint, asked for in a biologist's terms.

    python sample.py smiles="CC1CCC(B(O)O)CC1" dose=3 batch=B2 -n 8 --guidance biology=2
    python sample.py --grid dose=0,0.3,1,3,10 batch=B1,B2,B3 smiles="CC1CCC(B(O)O)CC1"
    python sample.py --edit runs/data/manifest.csv:2 batch=B3          # the same cells, elsewhere
    python sample.py --attribution runs/data/manifest.csv:706          # where biology acts
    python sample.py --checkpoint runs/brightfield/model.pt --control field.tif batch=B3

A field that is not given is unknown, not zero. The same seed gives the same cells, whatever else
is asked for in the same run. Writes a picture, an ImageJ hyperstack and a record to repeat it.
"""
import argparse
import hashlib
import itertools
import json
import math
import shlex
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tifffile
import torch
import torch.nn as nn
from tqdm import tqdm

import data
import diffusion
from conditioning import (Conditioner, Field, FieldError, blank_unseen, dose_fields,
                          parse_number, treatment_group)
from train_vae import UserError, build_vae, device, load_checkpoint, run, views
from unet import ControlNet, UNet, UNetConfig

STEPS = 15       # of DPM-Solver++, which more steps do not improve (README, Samplers)
EDIT_STEPS = 50  # of DDIM, there and back
GUIDANCE = 2.5   # weight of every group unless asked otherwise
INTERVAL = (.2, .8)  # noise levels t / T between which it acts


class Denoiser(nn.Module):
    """The U-Net, its conditioner and, where there is one, the ControlNet: what is trained, averaged
    (EMA) and saved together. control: {"channels", "shrink"} of a ControlNet."""

    def __init__(self, config: UNetConfig, fields, molecule_encoder, molecule_settings=None,
                 control=None):
        super().__init__()
        self.unet = UNet(config)
        self.conditioner = Conditioner(fields, config.embedding, config.token, molecule_encoder,
                                       molecule_settings)
        self.controlnet = ControlNet(self.unet, **control) if control else None

    def forward(self, z, t, codes, keep, molecules, control=None):
        """control: (images (B, C, H, W), codes and known of their own metadata, shown (B,))."""
        vector, tokens, mask = self.conditioner(codes, keep, molecules)
        residuals = None
        if control is not None:
            images, *metadata, shown = control
            told, _, _ = self.conditioner(*metadata, molecules)
            vector = vector + self.controlnet.style(images) * shown[:, None]
            residuals = self.controlnet(z, t, vector, tokens, mask, images, told)
            residuals = [r * shown[:, None, None, None] for r in residuals]
        return self.unet(z, t, vector, tokens, mask, residuals)


class Model:
    """All that sampling needs, built from one checkpoint (a dict, see train_ldm.checkpoint)."""

    def __init__(self, content, weights="ema"):
        self.controlnet = content.get("controlnet")  # column, channels, intensity ... or None
        if self.controlnet and not any(".levels." in name for name in content.get(weights, ())):
            raise UserError("the checkpoint's ControlNet is of an older kind: train it again")
        missing = {"fields", "unet", "vae", "schedule", "latent_shape", "molecule_settings",
                   weights} - set(content)
        if missing:
            raise UserError(f"the checkpoint lacks {', '.join(sorted(missing))}: train it again")
        self.fields = [Field(**f) for f in content["fields"]]
        self.denoiser = Denoiser(
            UNetConfig(**content["unet"]), self.fields, content["molecule_encoder"],
            content["molecule_settings"],
            {k: self.controlnet[k] for k in ("channels", "shrink")} if self.controlnet else None)
        self.denoiser.load_state_dict(content[weights])
        self.denoiser.to(device()).eval().requires_grad_(False)
        self.vae = build_vae(content["vae"]).to(device())
        self.schedule = diffusion.Schedule(**content["schedule"])
        self.intensity, self.pixel_um = content["vae"]["intensity"], content["pixel_um"]
        self.latent_shape, self.content = tuple(content["latent_shape"]), content
        self.settings = SimpleNamespace(**content["vae"]["settings"])  # how images were read
        self.channels = tuple(self.settings.channels.split(","))
        self.size = [n * self.vae.config.downsampling for n in self.latent_shape[1:]]  # H, W
        self.groups = list(dict.fromkeys(f.group for f in self.fields))

    @classmethod
    def load(cls, path, weights="ema"):
        return cls(load_checkpoint(path, "ldm", "run python train_ldm.py"), weights)

    @classmethod
    def load_for_use(cls, path):
        """As `load`, and says so where the training was not finished."""
        model = cls.load(path)
        step, steps = model.content["step"], model.content["settings"]["steps"]
        if step < steps:
            print(f"{path}: step {step} of a training of {steps}")
        return model

    def weights(self, guidance=None, controlled=False):
        """{group: weight} in nested order: the experiment first, then the control image where one
        is given (`controlled`; 1 unless asked otherwise), then biology given both."""
        guidance = guidance or {}
        dials = [*self.groups, "control"] if self.controlnet else self.groups
        unknown = [g for g in guidance if g not in dials]
        if unknown:
            raise FieldError(f"no group {', '.join(unknown)} to guide: this model has "
                             + ", ".join(dials))
        weights = [(g, guidance.get(g, GUIDANCE)) for g in reversed(self.groups)]
        if controlled:
            weights.insert(max(0, len(weights) - 1), ("control", guidance.get("control", 1.)))
        return dict(weights)

    def branch_columns(self, columns, n, branch):
        """The request as one branch of the guidance sees it: a list of columns, averaged over.

        branch: {group: given, unknown, control or average}, see diffusion.compose.
        """
        variants = [dict(columns)]
        for group, state in branch.items():
            names = [f.name for f in self.fields if f.group == group]
            if state == "given":
                continue
            if state == "unknown":
                changes = [{name: [""] * n for name in names}]
            elif state == "control":
                changes = [{name: [self.content["control"][name]] * n for name in names}]
            else:  # average: the experiments (or whatever the group is) of the training set
                changes = [{name: [example[name]] * n for name in names}
                           for example in self.content["examples"][group]]
            variants = [v | change for v in variants for change in changes]
        return variants

    def references(self, form):
        """What `control` guidance compares each group with; the first group has the controls."""
        if form != "control":
            return None
        if self.content["control"] is None:
            raise FieldError("no training row has dose 0, so the model knows no negative control "
                             "to compare with (guidance: use nested or contrast)")
        treated = {f.group for f in dose_fields(self.fields)}
        return {g: "control" if g in treated else "average" for g in self.groups}

    @torch.no_grad()
    def encode(self, columns, n):
        """A request {name: [n strings]} to (vector (n, E), tokens (n, L, D), mask (n, L))."""
        encoded = self.denoiser.conditioner.encode(columns, n)
        return self.denoiser.conditioner(*to_device(encoded))

    def branches(self, columns, n, branches, control=None):
        """denoise(z, t) for n images under a request {name: [n strings]}: the sum of the network's
        predictions under {branch: coefficient}, see diffusion.compose.

        control: (images (n, C, H, W) in [-1, 1], their own metadata {name: [n strings]}), or None.
        Everything is encoded once; all branches then run as one batch at every step.
        """
        encoded, coefficients, controlled = [], [], []
        for branch, c in branches.items():
            states = dict(zip(self.weights(controlled=control is not None), branch))
            given = states.pop("control", "unknown") == "given"
            variants = self.branch_columns(columns, n, states)
            for variant in variants:
                encoded.append(self.encode(variant, n))
                coefficients.append(c / len(variants))
                controlled.append(given)
        k, longest = len(coefficients), max(mask.shape[1] for _, _, mask in encoded)
        # molecules differ in their number of tokens: filled up with tokens that do not count
        encoded = [(vector, nn.functional.pad(tokens, (0, 0, 0, longest - mask.shape[1])),
                    nn.functional.pad(mask, (0, longest - mask.shape[1])))
                   for vector, tokens, mask in encoded]
        # (K B, E), (K B, L, D), (K B, L): branch by branch
        condition = [torch.cat(parts) for parts in zip(*encoded)]
        rows = torch.tensor(controlled).repeat_interleave(n).to(device())  # branches that see it
        if any(controlled):
            metadata = self.encode(control[1], n)[0].repeat(sum(controlled), 1)      # (K' B, E)
            image = control[0].to(device())
            hint = self.denoiser.controlnet.hint(image)
            hint = hint.repeat(sum(controlled), 1, 1, 1)                # (K' B, width, h, w)
            style = self.denoiser.controlnet.style(image)
            condition[0][rows] += style.repeat(sum(controlled), 1)
            seen = [c[rows] for c in condition]

        def residuals(z, t):
            found = self.denoiser.controlnet.residuals(z[rows], t[rows], *seen, hint, metadata)
            return [torch.zeros(len(z), *r.shape[1:]).to(r).index_copy(0, rows.nonzero()[:, 0], r)
                    for r in found]

        def denoise(z, t):
            z, t = z.repeat(k, 1, 1, 1), t.repeat(k)
            v = self.denoiser.unet(z, t, *condition, residuals(z, t) if any(controlled) else None)
            return diffusion.combine(v.unflatten(0, (k, n)), coefficients)

        return denoise

    def plain(self, columns, n, control=None):
        """denoise(z, t) of the conditional model alone."""
        groups = len(self.groups) + (control is not None)
        return self.branches(columns, n, {("given",) * groups: 1.}, control)

    def guided(self, columns, n, guidance=None, form="nested", interval=INTERVAL, rescale=0.,
               control=None):
        """denoise(z, t) under a request, guided.

        interval: between which noise levels t / T guidance acts; outside it weights above 1 count
        as 1 (Kynkaanniemi et al. 2024, arXiv:2404.07724), and where all of them do the conditional
        model runs alone, under `independent` as well.
        rescale: 0 to 1, how much of guidance's extra spread is taken back (diffusion.rescale).
        """
        weights = self.weights(guidance, control is not None)
        composed = diffusion.compose(form, weights, self.references(form))
        guided = self.branches(columns, n, composed, control)
        plain = self.plain(columns, n, control) if rescale else None
        outside = guided
        if tuple(interval) != (0., 1.):
            calm = {g: min(w, 1.) for g, w in weights.items()}
            plainly = all(w == 1 for w in calm.values())  # in all forms but `independent` the same
            calm = diffusion.compose("nested" if plainly else form, calm, self.references(form))
            outside = self.branches(columns, n, calm, control)

        def denoise(z, t):
            if not interval[0] <= t[0].item() / self.schedule.T <= interval[1]:
                return outside(z, t)
            v = guided(z, t)
            return diffusion.rescale(v, plain(z, t), rescale) if rescale else v

        return denoise

    def generate(self, columns, seeds, guidance=None, form="nested", steps=STEPS, eta=0.,
                 sampler=None, batch=64, progress=True, interval=INTERVAL, rescale=0.,
                 control=None):
        """Images (n, C, H, W) in [-1, 1] on the CPU, one per seed.

        columns: {field: list of n strings}, "" for unknown. guidance: {group: weight}. interval
        and rescale: see `guided`. control: (images (n, C, H, W), their metadata {field: list}).
        eta: of DDIM, which is then the sampler; else it is DPM-Solver++ unless one is named.
        """
        check_request(self, columns)
        if control is not None:
            check_control(self, control)
        images = []
        with tqdm(total=len(range(0, len(seeds), batch)) * steps, desc="generating",
                  disable=not progress, leave=False) as bar:
            for i in range(0, len(seeds), batch):
                part = {name: values[i:i + batch] for name, values in columns.items()}
                chosen = seeds[i:i + batch]
                hint = take_control(control, range(i, i + len(chosen)))
                denoise = self.guided(part, len(chosen), guidance, form, interval, rescale, hint)
                z = diffusion.sample(denoise, self.schedule, chosen, self.latent_shape, steps, eta,
                                     sampler_of(sampler, eta), device(), bar.update)
                with torch.no_grad():
                    images.append(self.vae.to_image(z).cpu())
        return torch.cat(images)

    @torch.no_grad()
    def generate_large(self, columns, seed, control, guidance=None, form="nested", steps=STEPS,
                       eta=0., sampler=None, overlap=.5, **options):
        """One field of view (1, C, H, W) of any size, after a control image (1, C', H, W).

        The U-Net knows one size only, so at every step it looks through windows of that size, and
        where windows overlap their predictions are averaged with weights that fade towards the
        border (Bar-Tal et al. 2023, arXiv:2302.08113): one noise, no seams. A batch of windows is
        on the device at a time. columns: {field: [value]}.
        """
        check_request(self, columns)
        check_control(self, control, any_size=True)
        f, channels = self.vae.config.downsampling, self.latent_shape[0]
        size = [n // f for n in control[0].shape[2:]]
        tiles = Tiles(size, self.latent_shape[1:], overlap)
        denoisers = {}
        for part in tiles.parts:
            n = len(part)
            request, metadata = ({name: values * n for name, values in c.items()}
                                 for c in (columns, control[1]))
            crops = tiles.cut(control[0], part, f)
            denoisers[part[0]] = self.guided(request, n, guidance, form,
                                             control=(crops, metadata), **options)

        def denoise(z, t):
            return tiles.blend(channels, 1, lambda part: denoisers[part[0]](
                tiles.cut(z, part).to(device()), t.expand(len(part)).to(device())))
        with tqdm(total=steps, desc=f"generating {size[1] * f}x{size[0] * f} pixels",
                  leave=False) as bar:
            z = diffusion.sample(denoise, self.schedule, [seed], (channels, *size), steps, eta,
                                 sampler_of(sampler, eta), each_step=bar.update)
        return tiles.blend(len(self.channels), f, lambda part: self.vae.to_image(
            tiles.cut(z, part).to(device())))

    @torch.no_grad()
    def edit(self, images, source, target, guidance=None, form="nested", steps=EDIT_STEPS, rounds=3,
             interval=INTERVAL, rescale=0., strength=None, seeds=None, batch=64):
        """Real images (n, C, H, W) in [-1, 1] as they would look under other conditions: the same
        cells. Inverted under their own conditions `source`, all weights 1, then generated from
        there under `target` ({name: [n strings]} each), weights 1 unless `guidance` says more.

        strength: 0 to 1, instead of inverting, add noise (one of `seeds` each) up to this share of
        the way and go on from there (Meng et al. 2022, arXiv:2108.01073): simpler, but what noise
        hides is lost.
        """
        check_request(self, target)
        n, weights = len(images), {g: 1. for g in self.groups} | (guidance or {})
        top = self.schedule.last_invertible()
        if strength is not None:
            top = min(top, max(0, round(strength * self.schedule.T) - 1))
            steps = min(steps, top + 1)
        if not 1 <= steps <= top + 1:
            raise UserError(f"--steps {steps}: an image can be inverted in 1 to {top + 1} steps")
        seeds, edited = seeds or range(n), []
        bar = tqdm(total=2 * steps * len(range(0, n, batch)), desc="editing", leave=False)
        for i in range(0, n, batch):
            z = self.vae.to_latent(images[i:i + batch].to(device()))
            own, asked = ({k: v[i:i + batch] for k, v in c.items()} for c in (source, target))
            chosen = seeds[i:i + batch]
            if strength is None:
                z = diffusion.invert(self.plain(own, len(z)), self.schedule, z, steps, top, rounds,
                                     bar.update)
            else:
                noise = diffusion.gaussian(diffusion.generators(chosen), self.latent_shape,
                                           device())
                z = self.schedule.add_noise(z, noise, torch.full((len(z),), top))
            z = diffusion.sample(self.guided(asked, len(z), weights, form, interval, rescale),
                                 self.schedule, chosen, self.latent_shape, steps, start=z, top=top,
                                 device=device(), each_step=bar.update)
            edited.append(self.vae.to_image(z).cpu())
        bar.close()
        return torch.cat(edited)

    @torch.no_grad()
    def attribution(self, images, columns, levels=(.2, .4, .6, .8), seed=0):
        """Where each group acts, at several noise levels t / T: for images (n, C, H, W) and their
        conditions, {group: (levels, n, H, W)}.

        The images are noised to a level, and z_0 is predicted once as asked and once with the
        group at its reference: biology at the negative control, the experiment averaged over
        those of the training set (`references`). The map is the difference of the two predictions
        after the decoder, mean over channels of its size, on [0, 1].
        """
        n, given = len(images), {g: "given" for g in self.weights()}
        z0 = self.vae.to_latent(images.to(device()))
        rngs = diffusion.generators(range(seed, seed + n))
        noise = diffusion.gaussian(rngs, z0.shape[1:], device())
        asked = self.plain(columns, n)
        others = {g: self.branches(columns, n, {tuple((given | {g: state}).values()): 1.})
                  for g, state in self.references("control").items()}
        maps = {g: [] for g in others}
        for level in levels:
            t = torch.full((n,), round(level * (self.schedule.T - 1)), device=device())
            z = self.schedule.add_noise(z0, noise, t)

            def predicted(denoise):
                return self.vae.to_image(self.schedule.split(z, denoise(z, t), t)[0])
            for group, other in others.items():
                difference = predicted(asked) - predicted(other)
                maps[group].append(difference.abs().mean(1).cpu() / 2)
        return {group: torch.stack(m) for group, m in maps.items()}


class Tiles:
    """Windows of latent pixels that cover a larger field, and how their contents are joined."""

    def __init__(self, size, window, overlap=.5, batch=32):
        self.size, self.window = size, window
        places = [(y, x) for y in windows(size[0], window[0], overlap)
                  for x in windows(size[1], window[1], overlap)]
        self.parts = [places[i:i + batch] for i in range(0, len(places), batch)]
        self.fade = fading(window[0])[:, None] * fading(window[1])[None]  # (h, w)

    def slices(self, place, scale):
        return (..., *(slice(scale * a, scale * (a + n)) for a, n in zip(place, self.window)))

    def cut(self, x, part, scale=1):
        """The windows `part` of x (1, C, H, W), `scale` pixels to a latent one: (n, C, h, w)."""
        return torch.cat([x[self.slices(place, scale)] for place in part])

    def blend(self, channels, scale, look):
        """Join look(part), (n, channels, h, w) for every part, into (1, channels, H, W): averaged
        where windows overlap, with weights that fade towards their borders."""
        mask = self.fade.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        total = torch.zeros(1, channels, *(scale * n for n in self.size))
        weight = torch.zeros_like(total[:, :1])
        for part in self.parts:
            for place, patch in zip(part, look(part).cpu()):
                total[self.slices(place, scale)] += mask * patch
                weight[self.slices(place, scale)] += mask
        return total / weight


def windows(length, window, overlap):
    """Where windows of this length start so that they cover `length`, overlapping by a share of at
    least `overlap`, evenly spread."""
    if length < window:
        raise UserError(f"an image of {length} latent pixels is smaller than the model's {window}")
    count = 1 + math.ceil((length - window) / max(1, round(window * (1 - overlap))))
    return [round(k * (length - window) / max(1, count - 1)) for k in range(count)]


def fading(n):
    """Weights (n,) of a window: 1 in the middle, towards 0 at the border, never 0."""
    return torch.hann_window(n + 2, periodic=False)[1:-1]


def take_control(control, places):
    """Control images (n, C, H, W) and their metadata at these places; None stays None."""
    return control and (control[0][places], {name: [values[i] for i in places]
                                             for name, values in control[1].items()})


def check_control(model, control, any_size=False):
    """Refuse a control image that the model cannot read."""
    if not model.controlnet:
        raise UserError("this model has no ControlNet: train one with python train_ldm.py "
                        "--control_column NAME")
    images, wanted = control[0], model.controlnet
    if images.shape[1] != wanted["channels"]:
        raise UserError(f"the control image has {images.shape[1]} channels, the model was trained "
                        f"with {wanted['channels']} ({wanted['column']})")
    (h, w), (least_h, least_w), f = images.shape[2:], model.size, model.vae.config.downsampling
    if any_size and (h < least_h or w < least_w or h % f or w % f):
        raise UserError(f"a control image of {w}x{h} pixels: at least {least_w}x{least_h}, in "
                        f"multiples of {f}")
    if not any_size and [h, w] != model.size:
        raise UserError(f"the control image has {w}x{h} pixels, this model draws "
                        f"{least_w}x{least_h}")


def sampler_of(named, eta):
    """The sampler that is named; else DPM-Solver++, or DDIM where its eta is given."""
    return named or ("ddim" if eta else "dpm")


def to_device(tensors):
    """Tensors, and dicts of tensors, moved to the device."""
    return [{k: v.to(device()) for k, v in x.items()} if isinstance(x, dict) else x.to(device())
            for x in tensors]


def check_request(model, columns):
    """Refuse unknown fields, categories and molecules; warn of numbers that training never saw."""
    fields = {f.name: f for f in model.fields}
    for name, values in columns.items():
        if name not in fields:
            raise FieldError(f"unknown field {name}: this model was told {', '.join(fields)}")
        field = fields[name]
        if field.kind in ("number", "log"):
            for value in sorted(set(values) - {""}):
                number = parse_number(name, value)
                if number < 0 and field.kind == "log":
                    raise FieldError(f"{name}={value}: a log field cannot be negative")
                low = 0. if field.kind == "log" else field.low
                if not low <= number <= field.high:
                    warnings.warn(f"{name}={value} is outside the training range {low:g} to "
                                  f"{field.high:g}: taken as the nearest value inside")
    if columns:
        model.denoiser.conditioner.encode(columns, len(next(iter(columns.values()))))


# --- command line -------------------------------------------------------------------------------

def parse_request(model, pairs, grid, guidance):
    """NAME=VALUE words to (fixed {name: value}, swept {name: [values]}, {group: weight}).

    The words may stand after any option, in any order: in `--grid dose=1,3 batch=B1` the batch has
    one value and is fixed, and a word after --guidance that names no group is a condition.
    """
    fixed, swept, weights = {}, {}, {}
    for word, source in [(w, "pair") for w in pairs] + [(w, "grid") for w in grid] + \
            [(w, "guidance") for w in guidance]:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise FieldError(f"{word}: write NAME=VALUE")
        if name in weights or name in swept or name in fixed:
            raise FieldError(f"{word}: {name} is given twice")
        if source == "guidance" and (name in model.groups or
                                     name not in [f.name for f in model.fields]):
            weights[name] = parse_number(name, value)
        elif source == "grid" and "," in value:
            swept[name] = value.split(",")
        else:
            fixed[name] = value
    if len(swept) > 2:
        raise FieldError(f"--grid sweeps at most two fields, not {', '.join(swept)}")
    model.weights(weights)
    return fixed, swept, weights


def write_hyperstack(path, images, model):
    """Images (n, C, H, W) in [-1, 1] as an ImageJ hyperstack, in the training files' units."""
    low, high = (np.array(model.intensity[k], np.float32)[:, None, None] for k in ("low", "high"))
    stack = low + (images.numpy() + 1) / 2 * (high - low)
    metadata = {"axes": "TCYX", "mode": "grayscale",
                "Labels": [c for _ in stack for c in model.channels]}
    if model.pixel_um:
        metadata |= {"unit": "um"}
    resolution = (1 / model.pixel_um,) * 2 if model.pixel_um else None
    tifffile.imwrite(path, stack.astype(np.float32), imagej=True, metadata=metadata,
                     resolution=resolution)


def read_place(model, place):
    """MANIFEST:ROW to the manifest and the row's number."""
    path, _, row = place.rpartition(":")
    manifest = data.read_manifest(path or place, model.channels)
    if not row.isdecimal() or not 2 <= int(row) <= len(manifest) + 1:
        raise UserError(f"{place}: write MANIFEST:ROW with a row from 2 to {len(manifest) + 1}")
    return manifest, int(row) - 2


def metadata(fields, manifest, rows, hidden=None):
    """{field: values of these rows}, without the group `hidden`; what the manifest lacks and what
    training never saw is blank."""
    return blank_unseen(fields, {f.name: manifest.rows(rows, f.name) if f.name in manifest.columns
                                 else [""] * len(rows) for f in fields if f.group != hidden})


def read_row(model, place):
    """MANIFEST:ROW to (image (1, C, H, W) in [-1, 1], its own conditions, manifest, row number).

    Rows are counted as in a spreadsheet and in every message here: the header is row 1. Fields
    that the manifest lacks and categories that training never saw are unknown ("").
    """
    manifest, i = read_place(model, place)
    own = metadata(model.fields, manifest, [i])
    try:
        check_request(model, own)
    except FieldError as fault:
        raise UserError(f"{place}: {fault}") from None
    print("this row: " + ", ".join(f"{name}={v[0] or 'unknown'}" for name, v in own.items()))
    image = views(data.Pixels(manifest, model.settings.binning), [i], model.settings,
                  model.intensity)
    (h, w), (own_h, own_w) = model.size, image.shape[2:]
    if (h, w) != (own_h, own_w):
        raise UserError(f"{place}: {own_w}x{own_h} pixels, this model draws {w}x{h}")
    return image, {name: v[0] for name, v in own.items()}, manifest, i


def read_control(model, place, given):
    """A control image and its metadata: (images (1, C, H, W) in [-1, 1], {field: [value]}).

    place: an image FILE, a place in a stack as STACK.npy:INDEX, or MANIFEST.csv:ROW, whose control
    column and metadata are taken. Else its metadata are the conditions `given`. Its biology is
    not told, as in training.
    """
    wanted, binning = model.controlnet, model.settings.binning
    path, _, number = place.rpartition(":")
    path, number = (path, int(number)) if path and number.isdecimal() else (place, None)
    if path.endswith(".csv"):
        manifest, i = read_place(model, place)
        image = control_pixels(wanted["column"], manifest, data.Pixels(manifest, binning))[i]
        columns = metadata(model.fields, manifest, [i], treatment_group(model.fields))
    else:
        image = data.bin_pixels(read_image(path, number), binning).astype(np.float32)
        columns = blank_unseen(model.fields, {
            f.name: [given.get(f.name, "")] for f in model.fields
            if f.group != treatment_group(model.fields)})
    if len(image) == len(wanted["intensity"]["low"]):  # else generate refuses it
        image = data.scale_intensity(image, wanted["intensity"])
    return torch.from_numpy(np.ascontiguousarray(image))[None], columns


def read_image(path, index=None):
    """One image file, or place `index` of a stack, as (C, H, W)."""
    shape, dtype = data.read_header(path)
    data.check_dtype(dtype, path)
    if len(shape) - (index is not None) not in (2, 3):
        raise UserError(f"{path} has shape {tuple(shape)}: an image has two axes, or three with "
                        "channels; name one of a stack as FILE:INDEX")
    array = data.read_file(path, index)
    if array.ndim == 2:
        return array[None]
    return array if array.shape[0] <= array.shape[2] else np.moveaxis(array, 2, 0)


def control_pixels(column, manifest, pixels):
    """The images that a control column names, as data.Pixels: one file with all channels, or
    columns a,b,... with one channel each; `negcon`: the data set's own images."""
    if column == "negcon":
        return pixels
    names = tuple(column.split(","))
    missing = [name for name in names if name not in manifest.columns]
    if missing:
        raise UserError(f"--control_column {column}: {manifest.path} has no column "
                        f"{', '.join(missing)}")
    found = data.read_manifest(manifest.path, names if len(names) > 1 else ("any",),
                               column="image" if len(names) > 1 else column)
    images = data.Pixels(found, pixels.binning, workers=pixels.workers,
                         max_corrupt=pixels.max_corrupt)
    alike = len(found.sizes) == 1 and found.sizes.keys() == manifest.sizes.keys()
    for i in range(0 if alike else len(found)):
        (h, w), (control_h, control_w) = pixels[i].shape[1:], images[i].shape[1:]
        if (h, w) != (control_h, control_w):
            raise UserError(f"{manifest.path}, row {i + 2}, column {column}: {control_w}x"
                            f"{control_h} pixels beside an image of {w}x{h}")
    found.channels = tuple(f"{column} {k}" for k in range(len(images[0])))
    return images


def changed(model, manifest, own, changes, said):
    """A row's own conditions with some changed. A category of the same group that occurs nowhere
    together with the new one (the plate, when the batch is changed) becomes unknown, which is
    told once (`said` is a set of lines)."""
    kinds = {f.name: (f.kind, f.group) for f in model.fields}
    target = own | changes
    for name, value in own.items():
        for other, new in changes.items():
            if (kinds[name] == kinds.get(other) == ("category", kinds[name][1]) and value
                    and name not in changes and other in manifest.columns
                    and (value, new) not in set(zip(manifest.columns[name],
                                                    manifest.columns[other]))):
                line = f"{name}={value} does not occur with {other}={new}: told as unknown"
                if line not in said:
                    print(line)
                said.add(line)
                target[name] = ""
    return target


def as_used(model, request):
    """A request as the model reads it: every field, "" for unknown, numbers inside the range of the
    training rows."""
    used = {f.name: request.get(f.name, "") for f in model.fields}
    for f in model.fields:
        if f.kind in ("number", "log") and used[f.name] != "":
            low = 0. if f.kind == "log" else f.low
            used[f.name] = f"{min(max(float(used[f.name]), low), f.high):g}"
    return used


def record(args):
    """What was run, on which checkpoint."""
    return {"command": shlex.join(["python", *sys.argv]), "checkpoint": args.checkpoint,
            "sha1": hashlib.sha1(Path(args.checkpoint).read_bytes()).hexdigest()}


def write_images(out, images, model, args, requests, picture, **more):
    """samples.png (drawn by `picture`), samples.tif and samples.json in folder `out`."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    data.picture(out / "samples.png", *picture[:1], model.channels, *picture[1:])
    write_hyperstack(out / "samples.tif", images, model)
    (out / "samples.json").write_text(json.dumps(record(args) | {
        "requests": requests, "used": [as_used(model, r) for r in requests], "form": args.form,
        "steps": args.steps, "interval": list(args.interval), "rescale": args.rescale, **more,
        "fields": [asdict(f) for f in model.fields]}, indent=1))
    print(f"wrote {out}/samples.png, samples.tif and samples.json")


def edit_row(model, args, fixed, swept, weights):
    """`--edit`: the cells of one real image under other conditions, one image per swept value."""
    image, own, manifest, _ = read_row(model, args.edit)
    values = [dict(zip(swept, v)) for v in itertools.product(*swept.values())]
    said = set()
    targets = [changed(model, manifest, own, fixed | v, said) for v in values]
    check_request(model, {k: [v] for k, v in (fixed | values[0]).items()})
    columns = {f.name: [t[f.name] for t in targets] for f in model.fields}
    source = {name: [value] * len(targets) for name, value in own.items()}
    images = model.edit(image.repeat(len(targets), 1, 1, 1), source, columns, weights, args.form,
                        args.steps, interval=args.interval, rescale=args.rescale,
                        strength=args.strength, seeds=[args.seed] * len(targets))
    rebuilt = model.vae.to_image(model.vae.to_latent(image.to(device()))).cpu()
    labels = ["real", "through the autoencoder"] + ["\n".join(
        f"{k}={v}" for k, v in place.items()) or "edited" for place in values]
    write_images(args.out, images, model, args, targets, (
        [[*image.numpy(), *rebuilt.numpy(), *images.numpy()]], [""], labels, model.pixel_um,
        "  ".join(f"{k}={v}" for k, v in fixed.items())),
        edit=args.edit, own=own, guidance={g: 1. for g in model.groups} | weights,
        seed=args.seed, strength=args.strength)


def attribute_row(model, args, fixed, levels=(.2, .35, .5, .65, .8)):
    """`--attribution`: where in a real image biology and experiment act, by noise level, beside
    the true difference from the same cells untreated where the manifest has them."""
    image, own, manifest, i = read_row(model, args.attribution)
    asked = changed(model, manifest, own, fixed, set())
    check_request(model, {k: [v] for k, v in fixed.items()})
    maps = model.attribution(image, {k: [v] for k, v in asked.items()}, levels, args.seed)
    report = record(args) | {"row": args.attribution, "conditions": asked, "seed": args.seed,
                             "levels": list(levels)}
    true = None
    if "untreated" in manifest.columns:
        before = data.read_manifest(manifest.path, model.channels, "untreated")
        before = views(data.Pixels(before, model.settings.binning), [i], model.settings,
                       model.intensity)
        true = (before - image).abs().mean(1)[0] / 2
        true = true if true.max() > 0 else None
    top, panels = max(float(m.max()) for m in maps.values()), []
    for group, m in maps.items():
        panels.append([image[0].numpy(), *(m[:, 0].numpy() / top * 2 - 1)])
        if true is not None:
            treated = group == treatment_group(model.fields)
            panels[-1].append(true.numpy() / float(true.max()) * 2 - 1 if treated else None)
            report[group] = [float(np.corrcoef(x[0].flatten(), true.flatten())[0, 1]) for x in m]
            print(f"{group}: correlation with the true difference from the untreated cells "
                  + " ".join(f"{r:.2f}" for r in report[group])
                  + ("" if treated else " (the floor: wherever there are cells)"))
    out = Path(args.out)
    data.picture(out / "attribution.png", panels, model.channels, list(maps), [
        "image", *(f"t/T = {level:g}" for level in levels), "true"], model.pixel_um)
    (out / "attribution.json").write_text(json.dumps(report, indent=1))
    print(f"wrote {out}/attribution.png and attribution.json")


def generate_images(model, args, fixed, swept, weights):
    """What the conditions ask for: n images, or a grid of the swept fields on shared noise."""
    n = args.n if args.n is not None else 1 if swept else 8
    if n < 1:
        raise UserError(f"-n {n}: at least one image")
    # rows of the picture: the second swept field (and the seed), columns: the first
    across, down = (list(swept.items()) + [("", [""])] * 2)[:2]
    if not swept:
        places = [{} for _ in range(n)]
        seeds, width = [args.seed + i for i in range(n)], min(n, 8)
    else:
        places = [{across[0]: a, down[0]: d} for _ in range(n) for d in down[1] for a in across[1]]
        per_seed = len(across[1]) * len(down[1])
        seeds, width = [args.seed + i // per_seed for i in range(len(places))], len(across[1])
    requests = [{k: v for k, v in (fixed | place).items() if k} for place in places]
    unknown = [f.name for f in model.fields if requests[0].get(f.name, "") == ""]
    if unknown:
        print(f"not given, so unknown: {', '.join(unknown)}")
    columns = {name: [r[name] for r in requests] for name in requests[0]}
    options = dict(form=args.form, steps=args.steps, interval=args.interval, rescale=args.rescale,
                   eta=args.eta, sampler=args.sampler)
    control = read_control(model, args.control, fixed) if args.control else None
    if control and list(control[0].shape[2:]) != model.size:
        images = torch.cat([model.generate_large(
            {k: [v] for k, v in request.items()}, seed, control, weights, **options)
            for request, seed in zip(requests, seeds)])
    else:
        images = model.generate(columns, seeds, weights, **options,
                                control=take_control(control, [0] * len(seeds)))
    rows = [list(images[i:i + width].numpy()) for i in range(0, len(images), width)]
    labels = [f"{down[0]}={d}" for _ in range(n) for d in down[1]] if down[0] else [""] * len(rows)
    if control:
        image = control[0][0].numpy()
        rows.insert(0, [image if len(image) == len(model.channels) else image[0]])
        labels.insert(0, "control")
    write_images(args.out, images, model, args, requests, (
        rows, labels,
        [f"{across[0]}={a}" for a in across[1]] if swept else
        [f"seed {s}" for s in seeds] if n == width else [], model.pixel_um,
        "  ".join(f"{k}={v}" for k, v in fixed.items())),
        seeds=seeds, guidance=model.weights(weights, bool(control)), sampler=args.sampler,
        eta=args.eta, control=args.control)


# what of the command line says nothing in these modes, and is refused there
OF_NO_USE = {"edit": ("n",), "attribution": ("n", "grid", "guidance", "form", "interval", "rescale",
                                             "steps", "sampler", "eta")}


def arguments():
    """The command line, as a namespace."""
    parser = data.Parser(description=__doc__,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conditions", nargs="*", metavar="NAME=VALUE",
                        help="what is known of the cells; fields not given are unknown")
    parser.add_argument("--checkpoint", default="runs/ldm/model.pt",
                        help="a model from train_ldm.py (default: %(default)s)")
    parser.add_argument("-n", type=int, default=None,
                        help="images (default: 8, or 1 for each place of a grid)")
    parser.add_argument("--seed", type=int, default=0,
                        help="of the first image; image i has seed + i (default: %(default)s)")
    parser.add_argument("--guidance", nargs="+", default=[], metavar="GROUP=WEIGHT",
                        help="1 is the plain model (but under --form independent), 0 leaves "
                             "its term out (default: "
                             f"{GUIDANCE} for each; 1 with --edit)")
    parser.add_argument("--form", choices=diffusion.FORMS, default="nested",
                        help="how the guidance of groups is composed (default: %(default)s)")
    parser.add_argument("--interval", type=float, nargs=2, default=INTERVAL,
                        metavar=("LOW", "HIGH"),
                        help="noise levels, 0 to 1, between which guidance acts: outside, weights "
                        "above 1 count as 1 (default: %(default)s)")
    parser.add_argument("--rescale", type=float, default=0.,
                        help="share of guidance's extra spread taken back (default: %(default)s)")
    parser.add_argument("--steps", type=int,
                        help=f"of the sampler (default: {STEPS}; with --edit {EDIT_STEPS})")
    parser.add_argument("--sampler", choices=diffusion.SAMPLERS,
                        help="dpm is DPM-Solver++ 2M "
                        "(default: dpm, or ddim where --eta is given)")
    parser.add_argument("--eta", type=float, default=0.,
                        help="noise added by DDIM: 0 none, 1 as DDPM (default: %(default)s)")
    parser.add_argument("--grid", nargs="+", default=[], metavar="NAME=V1,V2,...",
                        help="sweep one or two fields on the same noise")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--edit", metavar="MANIFEST:ROW", help="the cells of this real image with "
                        "the named conditions changed (rows as in a spreadsheet: the header is 1)")
    images.add_argument("--control", metavar="FILE", help="an image that a ControlNet follows: a "
                        "file of any size, STACK.npy:INDEX or MANIFEST.csv:ROW")
    images.add_argument("--attribution", metavar="MANIFEST:ROW",
                        help="where in this real image biology and experiment act")
    parser.add_argument("--strength", type=float, default=None, help="with --edit: add noise up to "
                        "this share instead of inverting, 0 to 1")
    parser.add_argument("--out", default="runs/samples",
                        help="samples.png, .tif and .json go here (default: %(default)s)")
    args = parser.parse_intermixed_args()
    for mode, options in OF_NO_USE.items():
        given = [f"{'-' if name == 'n' else '--'}{name}" for name in options
                 if getattr(args, name) != parser.get_default(name)]
        if getattr(args, mode) and given:
            parser.error(f"--{mode} has no use for {', '.join(given)}")
    if args.edit and (args.eta or args.sampler not in (None, "ddim")):
        parser.error("--edit inverts DDIM: it takes no --eta and no other --sampler")
    if args.steps is None:
        args.steps = EDIT_STEPS if args.edit else STEPS
    args.sampler = sampler_of(args.sampler, args.eta)
    return args


def check_arguments(args, model, weights):
    """Refuse options that cannot be used, or not together."""
    if not 1 <= args.steps <= model.schedule.T:
        raise UserError(f"--steps {args.steps}: between 1 and {model.schedule.T}")
    if not 0 <= args.eta <= 1:
        raise UserError(f"--eta {args.eta:g}: between 0 (DDIM) and 1 (as DDPM)")
    if args.eta and args.sampler != "ddim":
        raise UserError(f"--eta {args.eta:g} is a setting of ddim, not of --sampler {args.sampler}")
    if not 0 <= args.interval[0] <= args.interval[1] <= 1 or not 0 <= args.rescale <= 1:
        raise UserError("--interval takes two noise levels from 0 to 1, the smaller first, "
                        "--rescale a share from 0 to 1")
    if args.strength is not None and (not args.edit or not 0 < args.strength <= 1):
        raise UserError(f"--strength {args.strength:g}: a share of the noise, above 0 and at most "
                        "1, for --edit")
    if not 0 <= args.seed < 2 ** 62:
        raise UserError(f"--seed {args.seed}: a whole number from 0 on, below 2^62")
    if "control" in weights and not args.control:
        raise UserError("--guidance control needs an image to follow: --control FILE")
    if args.control and not model.controlnet:
        raise UserError(f"{args.checkpoint} has no ControlNet: train one with python train_ldm.py "
                        "--control_column NAME, and name it with --checkpoint")
    if any(place.is_file() for place in (Path(args.out), *Path(args.out).parents)):
        raise UserError(f"--out {args.out}: a file stands in the way of that folder")


def main():
    args = arguments()
    model = Model.load_for_use(args.checkpoint)
    fixed, swept, weights = parse_request(model, args.conditions, args.grid, args.guidance)
    check_arguments(args, model, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda m, *_: tqdm.write(f"warning: {m}")
        if args.attribution:
            attribute_row(model, args, fixed)
        elif args.edit:
            edit_row(model, args, fixed, swept, weights)
        else:
            generate_images(model, args, fixed, swept, weights)


if __name__ == "__main__":
    run(main)
