"""Generate Cell Painting images from a trained checkpoint, asked for in a biologist's terms.

    python sample.py smiles="CC1CCC(B(O)O)CC1" dose=3 batch=B2 -n 8 --guidance biology=2
    python sample.py --grid dose=0,0.3,1,3,10 batch=B1,B2,B3 smiles="CC1CCC(B(O)O)CC1"

A field that is not given is unknown, not zero. The same seed gives the same cells, whatever else
is asked for in the same run. Writes a picture, an ImageJ hyperstack and a record to repeat it.
"""
import argparse
import hashlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tifffile
import torch
import torch.nn as nn
from tqdm import tqdm

import data
import diffusion
from conditioning import Conditioner, Field, FieldError, parse_number
from train_vae import UserError, build_vae, device, load_checkpoint, run
from unet import UNet, UNetConfig

STEPS = 30                                   # DDIM steps
WEIGHTS = {"biology": 2., "experiment": 1.5}  # guidance unless asked otherwise; others 1.5


class Denoiser(nn.Module):
    """The U-Net and its conditioner: what is trained, averaged (EMA) and saved together."""

    def __init__(self, config: UNetConfig, fields, molecule_encoder):
        super().__init__()
        self.unet = UNet(config)
        self.conditioner = Conditioner(fields, config.embedding, config.token, molecule_encoder)

    def forward(self, z, t, codes, keep, molecules):
        return self.unet(z, t, *self.conditioner(codes, keep, molecules))


class Model:
    """All that sampling needs, built from one checkpoint (a dict, see train_ldm.checkpoint)."""

    def __init__(self, content, weights="ema"):
        missing = {"fields", "unet", "vae", "schedule", "latent_shape", weights} - set(content)
        if missing:
            raise UserError(f"the checkpoint lacks {', '.join(sorted(missing))}: train it again")
        self.fields = [Field(**f) for f in content["fields"]]
        self.denoiser = Denoiser(UNetConfig(**content["unet"]), self.fields,
                                 content["molecule_encoder"])
        self.denoiser.load_state_dict(content[weights])
        self.denoiser.to(device()).eval().requires_grad_(False)
        self.vae = build_vae(content["vae"]).to(device())
        self.schedule = diffusion.Schedule(**content["schedule"])
        self.channels = tuple(content["vae"]["settings"]["channels"].split(","))
        self.intensity, self.pixel_um = content["vae"]["intensity"], content["pixel_um"]
        self.latent_shape, self.content = tuple(content["latent_shape"]), content
        self.groups = list(dict.fromkeys(f.group for f in self.fields))

    @classmethod
    def load(cls, path, weights="ema"):
        return cls(load_checkpoint(path, "ldm", "run python train_ldm.py"), weights)

    def weights(self, guidance=None):
        """{group: weight} in nested order: the experiment first, biology given the experiment."""
        guidance = guidance or {}
        unknown = [g for g in guidance if g not in self.groups]
        if unknown:
            raise FieldError(f"no group {', '.join(unknown)} to guide: this model has "
                             + ", ".join(self.groups))
        return {g: guidance.get(g, WEIGHTS.get(g, 1.5)) for g in reversed(self.groups)}

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
            raise FieldError("guidance form control: no training row has dose 0, so the model "
                             "knows no negative control; use nested or contrast")
        first = next(f.group for f in self.fields if f.kind == "log")
        return {g: "control" if g == first else "average" for g in self.groups}

    @torch.no_grad()
    def guided(self, columns, n, guidance=None, form="nested"):
        """denoise(z, t) for n images under a request {name: [n strings]}.

        Everything is encoded once; all branches then run as one batch at every step.
        """
        weights = self.weights(guidance)
        vectors, coefficients = [], []
        for branch, c in diffusion.compose(form, weights, self.references(form)).items():
            variants = self.branch_columns(columns, n, dict(zip(weights, branch)))
            for variant in variants:
                codes, known, molecules = self.denoiser.conditioner.encode(variant, n)
                vectors.append(self.denoiser.conditioner(*to_device((codes, known, molecules))))
                coefficients.append(c / len(variants))
        k = len(coefficients)
        # (K B, E), (K B, L, D), (K B, L): branch by branch
        condition = [torch.cat(parts) for parts in zip(*vectors)]

        def denoise(z, t):
            v = self.denoiser.unet(z.repeat(k, 1, 1, 1), t.repeat(k), *condition)
            return diffusion.combine(v.unflatten(0, (k, len(z))), coefficients)

        return denoise

    def generate(self, columns, seeds, guidance=None, form="nested", steps=STEPS, eta=0.,
                 sampler="ddim", batch=64, progress=True):
        """Images (n, C, H, W) in [-1, 1] on the CPU, one per seed.

        columns: {field: list of n strings}, "" for unknown. guidance: {group: weight}.
        """
        check_request(self, columns)
        images = []
        with tqdm(total=len(range(0, len(seeds), batch)) * steps, desc="generating",
                  disable=not progress, leave=False) as bar:
            for i in range(0, len(seeds), batch):
                part = {name: values[i:i + batch] for name, values in columns.items()}
                chosen = seeds[i:i + batch]
                denoise = self.guided(part, len(chosen), guidance, form)
                z = diffusion.sample(denoise, self.schedule, chosen, self.latent_shape, steps, eta,
                                     sampler, device(), bar.update)
                with torch.no_grad():
                    images.append(self.vae.to_image(z).cpu())
        return torch.cat(images)


def to_device(tensors):
    """Tensors, and dicts of tensors, moved to the device."""
    return [{k: v.to(device()) for k, v in x.items()} if isinstance(x, dict) else x.to(device())
            for x in tensors]


def check_request(model, columns):
    """Refuse unknown fields; warn of numbers that training never saw. Categories and molecules
    are checked where they are encoded."""
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


def main():
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
                        help="1 is the plain model, 0 ignores the group (default: " + " ".join(
                            f"{g}={w}" for g, w in WEIGHTS.items()) + ")")
    parser.add_argument("--form", choices=diffusion.FORMS, default="nested",
                        help="how the guidance of groups is composed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--sampler", choices=("ddim", "ddpm"), default="ddim",
                        help="default: %(default)s")
    parser.add_argument("--eta", type=float, default=0.,
                        help="noise added by DDIM: 0 none, 1 as DDPM (default: %(default)s)")
    parser.add_argument("--grid", nargs="+", default=[], metavar="NAME=V1,V2,...",
                        help="sweep one or two fields on the same noise")
    parser.add_argument("--out", default="runs/samples",
                        help="samples.png, .tif and .json go here (default: %(default)s)")
    args = parser.parse_intermixed_args()
    model = Model.load(args.checkpoint)
    fixed, swept, weights = parse_request(model, args.conditions, args.grid, args.guidance)
    n = args.n if args.n is not None else 1 if swept else 8
    if n < 1 or not 1 <= args.steps <= model.schedule.T:
        raise UserError(f"-n {n} --steps {args.steps}: at least one image, and 1 to "
                        f"{model.schedule.T} steps")

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
    columns = {name: [r[name] for r in requests] for name in requests[0]}
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda m, *_: tqdm.write(f"warning: {m}")
        images = model.generate(columns, seeds, weights, args.form, args.steps, args.eta,
                                args.sampler)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [list(images[i:i + width].numpy()) for i in range(0, len(images), width)]
    data.picture(out / "samples.png", rows, model.channels,
                 [f"{down[0]}={d}" for _ in range(n) for d in down[1]] if down[0] else [],
                 [f"{across[0]}={a}" for a in across[1]] if swept else
                 [f"seed {s}" for s in seeds] if n == width else [], model.pixel_um,
                 "  ".join(f"{k}={v}" for k, v in fixed.items()))
    write_hyperstack(out / "samples.tif", images, model)
    checkpoint = Path(args.checkpoint).read_bytes()
    (out / "samples.json").write_text(json.dumps({
        "requests": requests, "seeds": seeds, "guidance": model.weights(weights),
        "form": args.form, "steps": args.steps, "sampler": args.sampler, "eta": args.eta,
        "checkpoint": args.checkpoint, "sha1": hashlib.sha1(checkpoint).hexdigest(),
        "fields": [asdict(f) for f in model.fields]}, indent=1))
    print(f"wrote {out}/samples.png, samples.tif and samples.json")


if __name__ == "__main__":
    run(main)
