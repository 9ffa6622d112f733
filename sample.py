"""Generate Cell Painting images from a trained checkpoint, asked for in a biologist's terms.

    python sample.py smiles="CC1CCC(B(O)O)CC1" dose=3 batch=B2 -n 8 --guidance biology=2
    python sample.py --grid dose=0,0.3,1,3,10 batch=B1,B2,B3 smiles="CC1CCC(B(O)O)CC1"
    python sample.py --edit runs/data/manifest.csv:2 batch=B3          # the same cells, elsewhere
    python sample.py --attribution runs/data/manifest.csv:706 dose=0   # where the dose acts
    python sample.py --film dose=10 batch=B3                           # on its way out of noise
    python sample.py --checkpoint runs/brightfield/model.pt --control field.tif batch=B3

A field that is not given is unknown, not zero. The same seed gives the same cells, whatever else is
asked for. Writes a picture, an ImageJ hyperstack and a record to repeat it.
"""
import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import diffusion
from conditioning import Conditioner, Field, FieldError, is_number, known_columns, treatment_group
from data import UserError
from train_vae import autocast, build_vae, device, load_checkpoint, reconstruct, run
from unet import ControlNet, Denoiser, UNet, UNetConfig

STEPS = 25           # of SDE-DPM-Solver++
EDIT_STEPS = 50      # of DDIM, there and back
GUIDANCE = 2.5, 2.   # scales of the first group (biology) and of every other
INTERVAL = (.2, .8)  # noise levels t / T between which guidance acts


@contextlib.contextmanager
def sampling():
    """No gradients, and networks in bfloat16 where the hardware has it: decided here for all of
    sampling, so that what is drawn and what is measured agree."""
    with torch.no_grad(), autocast():
        yield


class Model:
    """All that sampling needs, from the content of a checkpoint (its keys: train_ldm.py). size:
    [H, W] of its images. settings: how the training images were read. controlnet: which
    conditioning images it follows, or None. content: the checkpoint without its weights."""

    def __init__(self, content, weights="ema"):
        self.content = {k: v for k, v in content.items()
                        if k not in ("weights", "ema", "optimiser", "vae")}
        self.fields = [Field(**field) for field in content["fields"]]
        self.groups = list(dict.fromkeys(field.group for field in self.fields))
        self.controlnet, unet = content.get("controlnet"), UNet(UNetConfig(**content["unet"]))
        self.denoiser = Denoiser(unet, Conditioner(
            self.fields, unet.config.embedding, unet.config.token, content["molecule_encoder"],
            content["molecule_settings"]), self.controlnet and ControlNet(
                unet, self.controlnet["channels"], self.controlnet["downsampling"]))
        self.denoiser.load_state_dict(content[weights])
        self.denoiser.to(device()).eval().requires_grad_(False)
        self.vae = build_vae(content["vae"]).to(device())
        self.schedule = diffusion.Schedule(**content["schedule"])
        self.intensity, self.pixel_um = content["vae"]["intensity"], content["pixel_um"]
        self.settings = argparse.Namespace(**content["vae"]["settings"])
        self.channels = tuple(self.settings.channels.split(","))
        self.latent_shape = tuple(content["latent_shape"])               # (Z, h, w)
        self.size = [n * self.vae.config.downsampling for n in self.latent_shape[1:]]

    @classmethod
    def load(cls, path, weights="ema"):
        """The model of a checkpoint; it says so where the training was not finished."""
        model = cls(load_checkpoint(path, "ldm", "run python train_ldm.py"), weights)
        if model.content["step"] < (steps := model.content["settings"]["steps"]):
            print(f"{path}: step {model.content['step']} of a training of {steps}")
        return model

    def scales(self, guidance=None, hinted=False):
        """{group: guidance scale} in nested order: the experiment first, then the conditioning
        image (`image`, 1 unless asked otherwise) where one is given, then biology given both."""
        guidance, dials = guidance or {}, self.groups + ["image"] * bool(self.controlnet)
        if unknown := [group for group in guidance if group not in dials]:
            raise FieldError(f"no group {unknown[0]} to guide: this model has {', '.join(dials)}")
        scales = [(group, guidance.get(group, GUIDANCE[group != self.groups[0]]))
                  for group in reversed(self.groups)]
        image = [("image", guidance.get("image", 1.))] * hinted
        return dict(scales[:-1] + image + scales[-1:])

    def encode(self, columns, n):
        """A request {field: [n strings]}, "" for unknown, as the conditioner takes it, on the
        device: (codes, known, molecules). What it does not know is a FieldError."""
        names = [f.name for f in self.fields]
        if unknown := [name for name in columns if name not in names]:
            raise FieldError(f"unknown field {unknown[0]}: this model was told {', '.join(names)}")
        codes, known, molecules = self.denoiser.conditioner.encode(columns, n)
        codes, molecules = ({name: x.to(device()) for name, x in part.items()}
                            for part in (codes, molecules))
        return codes, known.to(device()), molecules

    def branches(self, request, rows, composed, hint=None):
        """denoise(z, t) of n images: the sum of the predictions under {branch: coefficient}
        (diffusion.compose), all of one batch. A branch is a mask over the fields, as in training:
        those of a group that is not given are hidden. rows (n,): of the request (see `encode`).
        hint: (images (n, C, H, W), a request of their own), for the branches given `image`."""
        (codes, known, molecules), k, n, net = request, len(composed), len(rows), self.denoiser
        groups = self.scales(hinted=bool(hint))
        given = [list(itertools.compress(groups, branch)) for branch in composed]
        keep = [known[rows] & known.new_tensor([f.group in g for f in self.fields]) for g in given]
        codes = {name: code[rows].repeat(k) for name, code in codes.items()}
        vector, tokens, mask = net.conditioner(codes, torch.cat(keep), molecules)  # (K n, ...) each
        if hint:
            images, (codes, known, _) = hint
            own, _, _ = net.conditioner({name: code[rows] for name, code in codes.items()},
                                        known[rows], molecules)
            own, features = own.repeat(k, 1), net.controlnet.stem(images).repeat(k, 1, 1, 1)
            shown = torch.tensor([["image" in g] for g in given]).repeat_interleave(n, 0).to(vector)
            vector = vector + shown * net.controlnet.style(images).repeat(k, 1)

        def denoise(z, t):
            z, t, residuals = z.repeat(k, 1, 1, 1), t.repeat(k), None
            if hint:
                residuals = [shown[..., None, None] * r for r in net.controlnet.residuals(
                    z, t, vector, tokens, mask, features, own)]
            v = net.unet(z, t, vector, tokens, mask, residuals)
            return diffusion.combine(v.unflatten(0, (k, n)), composed.values())
        return denoise

    def guided(self, columns, n, guidance=None, form="nested", interval=INTERVAL, hint=None,
               batch=64):
        """denoise(z, t) of n images under a request (see `encode`), guided. guidance: {group:
        scale}, see `scales`. form: one of diffusion.FORMS. interval: between which noise levels t/T
        guidance acts; outside, scales above 1 count as 1, and where all do the conditional model
        runs alone (Kynkaanniemi et al. 2024, arXiv:2404.07724). hint: (images (n, C, H, W) in
        [-1, 1], their own conditions {field: [n strings]}), seen through windows where larger than
        `size`, `batch` at a time: the conditions kept do not grow with the image."""
        scales, request, each = self.scales(guidance, bool(hint)), self.encode(columns, n), 1
        low = {group: min(scale, 1.) for group, scale in scales.items()}
        outside = "nested" if all(scale == 1 for scale in low.values()) else form
        composed = diffusion.compose(outside, low), diffusion.compose(form, scales)
        if hint:
            crops, own = windows(hint[0], self.size), self.encode(hint[1], n)
            each = len(crops) // n

        @functools.lru_cache(2 if hint else 32)  # batches, inside the interval and outside
        def predictor(first, inside):
            rows = torch.arange(first, min(first + batch, n * each)) // each
            seen = hint and (crops[first:first + batch].to(device()), own)
            return self.branches(request, rows, composed[inside], seen)

        def denoise(z, t):
            inside = interval[0] <= t[0].item() / self.schedule.T <= interval[1]
            return look(z, self.latent_shape[1:], batch, lambda z, first: predictor(first, inside)(
                z, t[:1].expand(len(z))))
        return denoise

    @sampling()
    def generate(self, columns, seeds, guidance=None, form="nested", steps=STEPS, eta=0.,
                 sampler="sde", batch=64, progress=True, interval=INTERVAL, hint=None):
        """Images (n, C, H, W) in [-1, 1] on the CPU, one per seed, the same whatever the batch, of
        the hint's size. columns, guidance, form, interval, hint: see `guided`. eta: ddim, dpm."""
        denoise = self.guided(columns, len(seeds), guidance, form, interval, hint, batch)
        size, f = hint[0].shape[2:] if hint else self.size, self.vae.config.downsampling
        z, *window = self.latent_shape
        shape = z, *((n + -(n - m) % (m // 2)) // f for n, m in zip(size, self.size))
        with tqdm(total=steps, desc="generating", disable=not progress, leave=False) as bar:
            z = diffusion.sample(denoise, self.schedule, seeds, shape, steps, eta, sampler,
                                 device(), bar.update)
        images = look(z, window, batch, lambda z, _: self.vae.to_image(z).cpu())
        return images[..., :size[0], :size[1]]

    @sampling()
    def edit(self, images, source, target, guidance=None, form="nested", steps=EDIT_STEPS, rounds=3,
             interval=INTERVAL, batch=64):
        """Real images (n, C, H, W) in [-1, 1] as they would look under other conditions: the same
        cells. Inverted under their own conditions `source` ({field: [n strings]}), all scales 1,
        then generated from there under `target`, scales 1 unless `guidance` says more."""
        n, ones, top = len(images), dict.fromkeys(self.groups, 1.), self.schedule.last_invertible()
        if not 1 <= steps <= top + 1:
            raise UserError(f"--steps {steps}: an image can be inverted in 1 to {top + 1} steps")
        own = self.guided(source, n, ones, batch=batch)
        other = self.guided(target, n, ones | (guidance or {}), form, interval, batch=batch)
        z = torch.cat([self.vae.to_latent(x.to(device())) for x in images.split(batch)])
        with tqdm(total=2 * steps, desc="editing", leave=False) as bar:
            z = diffusion.invert(own, self.schedule, z, steps, top, rounds, bar.update)
            z = diffusion.sample(other, self.schedule, range(n), self.latent_shape, steps, 0.,
                                 "ddim", device(), bar.update, z, top)
        return torch.cat([self.vae.to_image(part).cpu() for part in z.split(batch)])

    @sampling()
    def difference(self, images, one, other, levels=(.2, .4, .6, .8), seed=0):
        """Where the change of request `one` to `other` ({field: [n strings]} each) acts in images
        (n, C, H, W), by noise level t / T: (levels, n, H, W) on [0, 1], the difference behind the
        decoder of two predictions of z_0 from the same noise, mean over channels."""
        n, ones, maps = len(images), dict.fromkeys(self.groups, 1.), []
        both = [self.guided(columns, n, ones) for columns in (one, other)]
        z0, rngs = self.vae.to_latent(images.to(device())), range(seed, seed + n)
        noise = diffusion.gaussian(diffusion.generators(rngs), z0.shape[1:], device())
        for level in levels:
            t = torch.full((n,), round(level * (self.schedule.T - 1)), device=device())
            z = self.schedule.add_noise(z0, noise, t)
            x, y = (self.vae.to_image(self.schedule.split(z, denoise(z, t), t)[0])
                    for denoise in both)
            maps.append((x - y).abs().mean(1).cpu() / 2)
        return torch.stack(maps)

    @sampling()
    def film(self, columns, seed, frames=8, steps=STEPS, sampler="sde", **how):
        """How one image comes out of noise: (noise levels t / T, z_t, the z_0 predicted from it),
        both behind the decoder, (frames, C, H, W). columns, how: see `guided`."""
        denoise, seen = self.guided(columns, 1, **how), []

        def watched(z, t):
            prediction = denoise(z, t)
            z0, _ = self.schedule.split(z, prediction, t)
            seen.append((t.item() / self.schedule.T, z, z0))
            return prediction
        diffusion.sample(watched, self.schedule, [seed], self.latent_shape, steps, 0., sampler,
                         device())
        shown = [seen[round(k)] for k in np.linspace(0, len(seen) - 1, min(frames, len(seen)))]
        levels, *latents = zip(*shown)
        return levels, *(self.vae.to_image(torch.cat(z)).cpu() for z in latents)


def windows(x, size):
    """Windows of this size (h, w) of x (n, C, H, W) that overlap by half, image by image: (n L, C,
    h, w). x is continued by reflection until they cover it."""
    down, right = (-(n - m) % (m // 2) for n, m in zip(x.shape[2:], size))
    x = F.unfold(F.pad(x, (0, right, 0, down), mode="reflect"), size, stride=[m // 2 for m in size])
    return x.unflatten(1, (-1, *size)).permute(0, 4, 1, 2, 3).flatten(0, 1)


def look(z, window, batch, see):
    """see(windows, number of the first) of latents z (n, Z, H, W), `batch` at a time, joined to
    images or latents without seams: averaged where they overlap, with weights that fade towards
    their borders (Bar-Tal et al. 2023, arXiv:2302.08113)."""
    crops = windows(z, window)
    seen = torch.cat([see(crops[i:i + batch], i) for i in range(0, len(crops), batch)])
    if len(crops) == len(z):
        return seen
    (h, w), scale = seen.shape[2:], seen.shape[2] // window[0]
    y, x = (torch.hann_window(n + 2, periodic=False)[1:-1].repeat_interleave(scale) for n in window)
    fade = (y[:, None] * x).to(seen.device).expand_as(seen)

    def fold(patches):
        return F.fold(patches.flatten(1).unflatten(0, (len(z), -1)).transpose(1, 2),
                      [scale * n for n in z.shape[2:]], (h, w), stride=(h // 2, w // 2))
    return fold(fade * seen) / fold(fade)


def changed(model, columns, own, changes):
    """A row's own conditions with some changed. A category that occurs nowhere in the manifest's
    columns together with a new one of its group (the plate, of another batch) becomes unknown."""
    target, groups = own | changes, {f.name: f.group for f in model.fields if f.kind == "category"}
    for name, other in itertools.permutations(groups, 2):
        pair = own[name], changes.get(other)
        if (all(pair) and name not in changes and groups[name] == groups[other]
                and pair not in zip(columns[name], columns.get(other, ()))):
            target[name] = ""
    return target


def columns_of(requests):
    """Requests {field: value} as {field: list of values}."""
    return {name: [request[name] for request in requests] for name in requests[0]}


def read_place(model, place):
    """MANIFEST:ROW to the manifest and the row's index; the header is row 1."""
    path, _, row = place.rpartition(":")
    manifest = data.read_manifest(path or place, model.channels)
    if not row.isdecimal() or not 2 <= int(row) <= len(manifest) + 1:
        raise UserError(f"{place}: write MANIFEST:ROW with a row from 2 to {len(manifest) + 1}")
    return manifest, int(row) - 2


def read_rows(model, manifest, rows, crop=0, hint=False, seed=0, view=-1):
    """Images (n, C, H, W) in [-1, 1] of these rows, each time it is asked for the next view (see
    data.Views, -1 is the middle), and their own conditions {field: [n strings]}, "" where unknown;
    of a conditioning image (`hint`) without the treatment."""
    s, intensity = model.settings, model.controlnet["intensity"] if hint else model.intensity
    manifest = replace(manifest, channels=range(len(intensity["low"])))  # others are refused
    views = data.Views(manifest, intensity, crop, s.flips, s.binning, seed)
    (_, h, w), (least_h, least_w) = views.shape, model.size
    if h < least_h or w < least_w or not hint and [h, w] != model.size:
        raise UserError(f"{manifest.path}: {w}x{h} pixels, this model draws {least_w}x{least_h}")
    keys = [(i, view + rows[:k].count(i)) for k, i in enumerate(rows)]
    images = torch.cat([x for x, _ in data.load(views, keys)])
    hidden = treatment_group(model.fields) if hint else None
    return images, known_columns(model.fields, manifest.columns, rows, hidden)


def hint_manifest(column, manifest):
    """The manifest of the conditioning images that --control_column names: columns a,b of one
    channel each, one column of files with all channels, or, for control_row, the manifest's own."""
    return manifest if column == "control_row" else data.read_manifest(
        manifest.path, tuple(column.split(",")) if "," in column else None, column)


def read_hint(model, place, given, n):
    """A conditioning image and its own conditions, as hint_of, n times. place: MANIFEST.csv:ROW, or
    an image FILE or a place in a stack, STACK.npy:INDEX, under the conditions `given`."""
    path, _, number = place.rpartition(":")
    if (path or place).endswith(".csv"):
        manifest, i = read_place(model, place)
        manifest = hint_manifest(model.controlnet["column"], manifest)
    else:
        path, index = (Path(path), int(number)) if number.isdecimal() else (Path(place), None)
        columns = {name: [value] for name, value in given.items()} | {"image": [path.name]}
        manifest, i = data.Manifest(path, columns, None, ("image",), [index], {}), 0
    images, own = read_rows(model, manifest, [i], hint=True)
    if (clipped := (images.abs() == 1).float().mean((0, 2, 3)).max()) > .5:
        print(f"warning: {clipped:.0%} of {place} lies at or beyond the range of training")
    return images.expand(n, -1, -1, -1), {name: value * n for name, value in own.items()}


def hint_of(model, opened, rows, seed=0, view=-1):
    """Conditioning images of rows of a data set (train_vae.open_data) and their own conditions, as
    `generate` takes them; None without a ControlNet. `seed` draws one of a row's `control_row`."""
    if not model.controlnet:
        return None
    column, rows = model.controlnet["column"], [int(i) for i in rows]
    if column == "control_row":
        rows = [int(data.keyed_rng(seed, data.ROWS, i, 0).choice(listed.split())) - 2
                for i, listed in zip(rows, opened.manifest.rows(rows, column))]
    return read_rows(model, hint_manifest(column, opened.manifest), rows, model.settings.crop, True,
                     seed, view)


# --- command line ---------------------------------------------------------------------------------

def write(args, model, name, picture, title, requests, images=None, **more):
    """In folder args.out name.png of picture (rows of images, row labels, column labels), name.json
    to repeat it and, where there are images (n, C, H, W), name.tif: an ImageJ hyperstack in the
    units of the training files."""
    path, (rows, *labels) = args.out / name, picture
    data.picture(f"{path}.png", rows, model.channels, *labels, model.pixel_um, words(title))
    if images is not None:
        low, high = (np.array(model.intensity[end], np.float32)[:, None, None]
                     for end in ("low", "high"))
        metadata = {"axes": "TCYX", "mode": "grayscale", "Labels": [*model.channels] * len(images)}
        unit, per = ({"unit": "um"}, 1 / model.pixel_um) if model.pixel_um else ({}, 1)
        tifffile.imwrite(f"{path}.tif", low + (images.numpy() + 1) / 2 * (high - low), imagej=True,
                         metadata=metadata | unit, resolution=(per, per))
    sha1 = hashlib.sha1(Path(args.checkpoint).read_bytes()).hexdigest()
    record = {"command": shlex.join(["python", *sys.argv]), "sha1": sha1, "requests": requests}
    Path(f"{path}.json").write_text(json.dumps(record | vars(args) | more, indent=1, default=str))
    print(f"wrote {path}.png" + f", {path}.tif" * (images is not None) + f" and {path}.json")


def words(conditions, between="  "):
    return between.join(f"{name}={value}" for name, value in conditions.items())


def generate_images(args, model, fixed, across, down, guidance):
    """What the conditions ask for: n images, or a grid of the swept fields on shared noise."""
    places = [place | other for place in down for other in across]
    requests = [fixed | place for _ in range(args.n) for place in places]
    seeds = [args.seed + i // len(places) for i in range(len(requests))]
    if unknown := [f.name for f in model.fields if not requests[0].get(f.name)]:
        print(f"not given, so unknown: {', '.join(unknown)}")
    hint = args.control and read_hint(model, args.control, fixed, len(seeds))
    images = model.generate(columns_of(requests), seeds, guidance, args.form, args.steps,
                            sampler=args.sampler, interval=args.interval, hint=hint)
    rows = [[*part.numpy()] for part in images.split(len(across) if across[0] else 8)]
    labels = [words(place) for place in down * args.n][:len(rows)]
    if hint:  # stains in colour, other channels in grey
        shown = hint[0][:1] if hint[0].shape[1] == len(model.channels) else hint[0][0]
        rows, labels = [[*shown.numpy()], *rows], ["follows", *labels]
    write(args, model, "samples", (rows, labels, list(map(words, across))), fixed, requests, images,
          seeds=seeds, guidance=model.scales(guidance, bool(hint)))


def draw_film(args, model, fixed, across, down, guidance):
    """One image on its way out of noise: what is there, and what the network makes of it."""
    levels, *rows = model.film(columns_of([fixed]), args.seed, steps=args.steps,
                               sampler=args.sampler, guidance=guidance, form=args.form,
                               interval=args.interval)
    labels = ["z_t", "predicted z_0"], [f"t/T = {level:.2f}" for level in levels]
    write(args, model, "film", ([[*x.numpy()] for x in rows], *labels), fixed, [fixed],
          guidance=model.scales(guidance))


def change_row(args, model, fixed, across, down, guidance, levels=(.2, .35, .5, .65, .8)):
    """A real image with some of its own conditions changed. --edit: its cells under them, one image
    per swept value. --attribution: where the change acts, by noise level."""
    manifest, i = read_place(model, args.edit or args.attribution)
    image, columns = read_rows(model, manifest, [i], model.settings.crop)
    own, places = {n: v for n, [v] in columns.items()}, [p | q for p in down for q in across]
    print(f"row {i + 2}: {words(own)}")
    requests = [changed(model, manifest.columns, own, fixed | place) for place in places]
    if lost := {n for request in requests for n in own if own[n] and not request[n]}:
        print(f"told as unknown, since never seen with what is new: {', '.join(lost)}")
    if args.edit:
        images = model.edit(
            image.expand(len(places), -1, -1, -1), columns_of([own] * len(places)),
            columns_of(requests), guidance, args.form, args.steps, interval=args.interval)
        rebuilt, labels = reconstruct(model.vae, image)[0], ["as it is", "through the autoencoder"]
        labels += [words(place, "\n") or "edited" for place in places]
        row = [*torch.cat([image, rebuilt, images]).numpy()]
        write(args, model, "samples", ([row], [""], labels), fixed, requests, images, own=own,
              guidance=dict.fromkeys(model.groups, 1.) | guidance)
    else:
        maps = model.difference(image, columns, columns_of(requests[:1]), levels, args.seed)[:, 0]
        row = [image[0].numpy(), *(2 * maps / maps.max() - 1).nan_to_num().numpy()]
        labels = ["image", *(f"t/T = {t:g}" for t in levels)]
        write(args, model, "attribution", ([row], [""], labels), fixed, requests[:1], own=own)


def parse_request(model, args):
    """NAME=VALUE words to (fixed {name: value}, swept [[{name: value}, ...] of each field],
    {group: scale}). They may stand after any option: in `--grid dose=1,3 batch=B1` the batch has
    one value and is fixed, and a word after --guidance that names a field is a condition."""
    fixed, swept, scales, fields, names = {}, [], {}, {f.name: f for f in model.fields}, []
    for word in [*args.conditions, *args.grid, *args.guidance]:
        name, equals, text = word.partition("=")
        field, values = fields.get(name), text.split(",") if word in args.grid else [text]
        scale = word in args.guidance and not field
        if not equals or name in names or scale and not is_number(text):
            raise UserError(f"{word}: write NAME=VALUE or GROUP=NUMBER, and each name once")
        if field and field.kind in ("number", "log"):
            if any(field.clip(float(v)) != float(v) for v in values if is_number(v)):
                raise UserError(f"{word}: training saw {field.low:g} to {field.high:g}")
        names.append(name)
        if scale:
            scales[name] = float(text)
        elif len(values) > 1:
            swept.append([{name: value} for value in values])
        else:
            fixed[name] = text
    return fixed, swept, scales


def arguments():
    """The command line, as a namespace."""
    parser = data.Parser(description=__doc__,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    add, image = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("conditions", nargs="*", metavar="NAME=VALUE", help="what is known of the cells")
    add("--checkpoint", default="runs/ldm/model.pt", help="the model (default: %(default)s)")
    add("--out", type=Path, default="runs/samples", help="folder (default: %(default)s)")
    add("-n", type=int, help="images (default: 8, or 1 for each place of a grid)")
    add("--seed", type=int, default=0, help="of the first image, then one more (default: 0)")
    add("--guidance", nargs="+", default=[], metavar="GROUP=SCALE",
        help=f"0 leaves a group out, 1 is the plain model (default: {GUIDANCE[0]:g} for the "
        f"first group, {GUIDANCE[1]:g} for others; 1 with --edit)")
    add("--form", choices=diffusion.FORMS, default="nested", help="(default: %(default)s)")
    add("--interval", type=float, nargs=2, default=INTERVAL, metavar=("LOW", "HIGH"),
        help="noise levels outside which scales above 1 count as 1 (default: %(default)s)")
    add("--steps", type=int, help=f"of the sampler (default: {STEPS}; {EDIT_STEPS} with --edit)")
    add("--sampler", choices=diffusion.SAMPLERS, default="sde", help="(default: %(default)s)")
    add("--grid", nargs="+", default=[], metavar="NAME=V1,V2,...", help="sweep one or two fields")
    image("--edit", metavar="MANIFEST:ROW", help="its cells under these conditions (no -n, DDIM)")
    image("--control", metavar="FILE", help="a ControlNet follows it; or STACK.npy:INDEX, CSV:ROW")
    image("--attribution", metavar="MANIFEST:ROW", help="where a change acts (options: --seed)")
    image("--film", action="store_true", help="one image on its way out of noise")
    args = parser.parse_intermixed_args()
    args.n = (1 if args.grid else 8) if args.n is None else args.n
    args.steps = (EDIT_STEPS if args.edit else STEPS) if args.steps is None else args.steps
    return args


def main():
    args = arguments()
    model = Model.load(args.checkpoint)
    fixed, swept, guidance = parse_request(model, args)
    for wrong, fault in (
            (args.n < 1, f"-n {args.n}: at least one image"),
            (not 0 <= args.seed < 2 ** 62, f"--seed {args.seed}: from 0 on, below 2^62"),
            (not 1 <= args.steps <= model.schedule.T, f"--steps: from 1 to {model.schedule.T}"),
            (not 0 <= args.interval[0] <= args.interval[1] <= 1, "--interval: 0 to 1, LOW first"),
            (len(swept) > 2, "--grid sweeps at most two fields"),
            (args.control and not model.controlnet, "--control needs a ControlNet: train one with "
             "python train_ldm.py --control_column NAME, and name it with --checkpoint"),
            (args.film and swept, "--film draws one image: no --grid"),
            (args.attribution and not fixed, "--attribution needs a change, such as dose=0")):
        if wrong:
            raise UserError(fault)
    args.out.mkdir(parents=True, exist_ok=True)  # before the work, if it fails
    command = (draw_film if args.film else change_row if args.edit or args.attribution
               else generate_images)
    command(args, model, fixed, *[*swept, [{}], [{}]][:2], guidance)


if __name__ == "__main__":
    run(main)
