"""Images and where they come from: a simulated microscope, and manifests of real plates.

A data set is one CSV, the manifest: one row per image, paths relative to the CSV, every other
column metadata. The simulated screen is written as a manifest too, so it enters by the same door
as a real plate; because it is simulated, what biology and experiment did to each image is known.

    python data.py simulate --out runs/data      # draw the default screen
    python data.py show runs/data/manifest.csv   # check every file, summarise, draw a contact sheet
    python data.py restain MANIFEST --by batch plate --out DIR    # images as other plates show them
    python data.py controls MANIFEST --by plate --out NEW.csv     # each row's negative controls
    python data.py mol2image IMAGES train.csv test.csv    # Mol2Image's data set, as a manifest
    python data.py load_data load_data.csv       # CellProfiler's tables (JUMP, LINCS), likewise
    python data.py                               # pictures of the mechanisms and of the layout
"""
import argparse
import colorsys
import csv
import gzip
import hashlib
import inspect
import json
import logging
import math
import os
import re
import signal
import sys
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache, lru_cache
from itertools import combinations, product, repeat
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image
from rdkit import Chem, RDLogger
from tqdm import tqdm

RDLogger.DisableLog("rdApp.*")  # we name the row of a bad SMILES ourselves
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # and of an unreadable TIFF
# The simulated stains and their colours. To add one: an entry here and one in draw_stains.
COLOURS = {"DNA": (.2, .4, 1), "ER": (0, .7, .3), "RNA": (.5, .5, .1), "AGP": (1, .4, .05),
           "Mito": (.8, .1, .5)}
CHANNELS = tuple(COLOURS)
# Random numbers have a key, (seed, purpose, row ...), of one length per purpose: numpy pads keys
# with zeros, so that [5, 3] and [5, 3, 0] give the same numbers.
VIEW, ROWS, CONTROLS, OTHER_PLATE, CHECK = 1, 2, 12, 13, 14


class UserError(ValueError):
    """A user's mistake. One line a fault, each naming the file, row and column."""


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and complains in one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)


def comments(settings):
    """{setting: the comment beside it} of a dataclass of settings: the help of its options."""
    return {name: text for base in reversed(settings.__mro__[:-1]) for name, text in re.findall(
        r"^    (\w+): .*?  # (.+)$", inspect.getsource(base), re.M)}


def keyed_rng(*key):
    return np.random.default_rng([int(k) for k in key])


def report(path, faults):
    """Raise a UserError with all faults, at most twenty by name. Without any do nothing."""
    if faults := list(faults):
        more = [f"and {len(faults) - 20} more faults"] if len(faults) > 20 else []
        raise UserError("\n".join([f"{path}, {fault}" for fault in faults[:20]] + more))


# --- 1. The simulated screen: molecules, dose, batches, plates, wells -----------------------------

# A motif sets the mechanism: the direction in which the cells change. Each effect is a difference
# of logarithms at full effect, so 0.35 on nucleus_radius means exp(0.35) = 1.4 times the radius.
MECHANISMS = {
    "dna_damage":   dict(motif="N(CCCl)CCCl", nucleus_radius=.55, dna=-.5, cell_radius=.3,
                         cell_count=-.45),
    "tubulin":      dict(motif="c5cc(OC)c(OC)c(OC)c5", binucleation=2.9, elongation=-1.,
                         mito_spread=-.4, cell_count=-.25),
    "actin":        dict(motif="C5CSC(=O)N5", membrane=-1.3, actin=-.9, ruffling=1.4,
                         cell_radius=-.25),
    "mitochondria": dict(motif="NN=C(C#N)C#N", mito=-1.6, mito_granularity=.9, mito_spread=.7),
    "er_stress":    dict(motif="B(O)O", er=.6, er_spread=-.8, rna=.3),
    "nucleolar":    dict(motif="n5cnc6c5ncnc6N", nucleoli=.6, nucleolus_radius=.6,
                         nucleolus_count=-1.1, rna=-.8),
    "golgi":        dict(motif="/C=C/C(=O)OC", golgi_spread=1.1, golgi=-.35, actin=.35),
    "apoptosis":    dict(motif="C(=O)NS(=O)(=O)C", cell_count=-1.1, nucleus_radius=-.5, dna=.8,
                         cell_radius=-.4, er=-.8, rna=-.5, mito=-.7),
}
# The substituents (at {R}) and the scaffold set the potency: the half-effect dose in micromolar.
# Two activity cliffs: the wrong enantiomer, and a charge that keeps the molecule out of the cell.
SUBSTITUENTS = {"C": 1., "CC": .7, "Cl": .8, "FC(F)(F)": .5, "N#C": 2., "CN(C)": 1.2,
                "C[C@H](O)": .5, "C[C@@H](O)": 8., "OC(=O)": 1.5, "[O-]C(=O)": 12.,
                "CO": 1.1, "F": 1.4}
SCAFFOLDS = {"{R}c1ccc({M})cc1": 1., "{R}c1ccc({M})nc1": 1.4, "{R}C1CCC({M})CC1": .8,
             "{R}c1ccc({M})s1": 1.1}
HELDOUT_SUBSTITUENTS = ("CO", "F")            # the easier kind of unseen molecule
HELDOUT_SCAFFOLD = "{R}c1ccc({M})s1"          # the harder kind, drawn with four substituents
HELDOUT_SCAFFOLD_SUBSTITUENTS = ("C", "CC", "Cl", "CN(C)")
DMSO = "CS(C)=O"
CONTROL = dict(compound="DMSO", smiles=DMSO, mechanism="none", scaffold="", substituent="",
               ec50=np.inf, kind="train")
DOSES = (.3, 1., 3., 10.)                     # micromolar
HILL = 1.5                                    # slope of the dose response


@dataclass
class Screen:
    """Settings of a simulated screen. `seed` fixes the batches and plates, `draw` the rest: a
    second screen from the same microscopes is the same seed with another draw."""
    confounding: float = 0.5    # probability that a treated well lies in its mechanism's home batch
    batches: int = 6            # experiments of different weeks: stain, background, focus
    plates_per_batch: int = 2   # 384-well plates, 16 rows by 24 columns
    controls_per_plate: int = 24  # wells with DMSO, on every plate
    replicates: int = 2         # wells per molecule and dose
    sites: int = 4              # fields of view per well
    size: int = 64              # pixels along a side
    seed: int = 0               # the microscopes: gains, blur and background of batches and plates
    draw: int = 0               # the cells


def molecules():
    """Every molecule: dicts of compound, smiles (canonical), mechanism, scaffold, substituent,
    ec50 (micromolar) and kind: train, test_substituent or test_scaffold."""
    found = []
    for mechanism, scaffold, substituent in product(MECHANISMS, SCAFFOLDS, SUBSTITUENTS):
        kind = "test_substituent" if substituent in HELDOUT_SUBSTITUENTS else "train"
        if scaffold == HELDOUT_SCAFFOLD:
            kind = "test_scaffold"
            if substituent not in HELDOUT_SCAFFOLD_SUBSTITUENTS:
                continue
        smiles = scaffold.replace("{R}", substituent).replace("{M}", MECHANISMS[mechanism]["motif"])
        found.append(dict(
            compound=f"NP{len(found) + 1:04d}", smiles=canonical(smiles), mechanism=mechanism,
            scaffold=scaffold, kind=kind, substituent=substituent,
            ec50=SCAFFOLDS[scaffold] * SUBSTITUENTS[substituent]))
    return found


def hill(dose, ec50):
    """The share of the full effect that a dose has, 0 to 1."""
    return round(dose ** HILL / (dose ** HILL + ec50 ** HILL), 4)


def heldout_combinations(batches, kind):
    """{mechanism: batch} kept out of training at any confounding. kind: "test", half of the
    batches away from home, or "val", one away. The home batch of a mechanism is its number modulo
    the number of batches. A single batch leaves nothing to hold out."""
    away = {"home": 0, "test": (batches + 1) // 2, "val": 1}[kind]
    return {m: (k + away) % batches for k, m in enumerate(MECHANISMS) if batches > 1 or not away}


def layout(screen):
    """The images of a screen before they are drawn, a list of dicts: molecule, dose, batch, plate,
    well, and split: train, val (wells like those of training), val_pair and test_pair (mechanism
    and batch never seen together), test_substituent, test_scaffold."""
    if not 0 <= screen.confounding <= 1 or min(
            screen.batches, screen.plates_per_batch, screen.controls_per_plate, screen.replicates,
            screen.sites, screen.size) < 1 or min(screen.seed, screen.draw) < 0:
        raise UserError("a screen has a confounding between 0 and 1, at least one of everything, "
                        "and seeds from 0 on")
    rng, rows = keyed_rng(screen.seed, screen.draw, 1), []
    heldout = [(k, heldout_combinations(screen.batches, k)) for k in ("test", "val")]
    for p, wells in enumerate(fill_plates(screen, rng)):
        if len(wells) > 384:
            raise UserError(f"plate {p + 1} would need {len(wells)} of its 384 wells: use more "
                            "plates per batch or fewer replicates")
        batch = p // screen.plates_per_batch
        for position, (molecule, dose) in zip(rng.permutation(384), wells):
            r, c = divmod(int(position), 24)
            well = dict(compound=molecule["compound"], smiles=molecule["smiles"], dose=dose,
                        batch=f"B{batch + 1}", plate=f"P{p + 1:02d}",
                        well=f"{chr(ord('A') + r)}{c + 1:02d}", row=r + 1, column=c + 1)
            pairs = [f"{k}_pair" for k, h in heldout if h.get(molecule["mechanism"]) == batch]
            split = (molecule["kind"] if molecule["kind"] != "train" else pairs[0] if pairs
                     else "val" if rng.random() < .1 else "train")
            after = dict(role="treated" if dose else "control", split=split, pixel_um=.8,
                         **{f"true_{k}": molecule[k] for k in (
                             "mechanism", "scaffold", "substituent", "ec50")},
                         true_effect=hill(dose, molecule["ec50"]))
            rows += [well | {"site": site + 1} | after for site in range(screen.sites)]
    return rows


def fill_plates(screen, rng):
    """Which wells go on which plate: a list of (molecule, dose) for each, negative controls first.
    A treated well goes to its home batch with probability `confounding`."""
    n, home = screen.plates_per_batch, heldout_combinations(screen.batches, "home")
    plates = [[(CONTROL, 0.)] * screen.controls_per_plate for _ in range(screen.batches * n)]
    for molecule, dose in product(molecules(), DOSES * screen.replicates):
        at_home = rng.random() < screen.confounding
        batch = home[molecule["mechanism"]] if at_home else int(rng.integers(screen.batches))
        min(plates[batch * n:(batch + 1) * n], key=len).append((molecule, dose))
    return plates


# --- 2. The simulated microscope: cells, perturbations, experiment effects ------------------------

# An untreated cell. Lengths in pixels (0.8 micrometres), intensities as a share of full scale.
UNTREATED = dict(
    cell_count=1., nucleus_radius=6.9, eccentricity=.22, binucleation=.04, cell_radius=17.2,
    elongation=.3, ruffling=1.2, dna=.5, er=.42, er_spread=.75, rna=.2, nucleoli=.45,
    nucleolus_radius=1.7, nucleolus_count=3., golgi=.5, golgi_spread=2.5, membrane=.3, actin=.16,
    mito=.8, mito_granularity=3.8, mito_spread=.62)
CELLS_PER_PIXEL = 5 / 64 ** 2   # five nuclei in a 64x64 field of view
MARGIN = 12                     # pixels drawn around the field, so that cells are cut by its border
SPACING = 19.5                  # pixels between nuclei, where there is room


def microscope(screen):
    """Experiment effects, drawn once per seed: {batch: dict} of gain (C,), background (C,) and blur
    (sigma in pixels), and {plate: gain (C,)}."""
    rng, n = keyed_rng(screen.seed, 2), len(CHANNELS)
    batches = {f"B{b + 1}": dict(gain=np.exp(rng.normal(0, .28, n)),
                                 background=rng.uniform(.01, .08, n), blur=rng.uniform(.6, 1.2))
               for b in range(screen.batches)}
    plates = {f"P{p + 1:02d}": np.exp(rng.normal(0, .05, n))
              for p in range(screen.batches * screen.plates_per_batch)}
    return batches, plates


def smooth(noise, sigma):
    """Gaussian blur of (..., H, W) with periodic borders, through the Fourier transform."""
    h, w = noise.shape[-2:]
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None]
    kernel = np.exp(-2 * (np.pi * sigma) ** 2 * (fx ** 2 + fy ** 2))
    return np.fft.irfft2(np.fft.rfft2(noise) * kernel.astype(np.float32), s=(h, w))


def textures(noise, sigmas):
    """(n, H, W) white noise, each smoothed by its own sigma and brought to unit deviation."""
    fields = smooth(noise, np.asarray(sigmas, np.float32)[:, None, None])
    return fields / fields.std((1, 2), keepdims=True)


def cell_randomness(rng, cell_density, size):
    """The random numbers that make these cells these cells: drawn with other parameters, the same
    cells are seen treated. Centres are pushed apart until few lie closer than SPACING."""
    side = size + 2 * MARGIN
    n = rng.poisson(CELLS_PER_PIXEL * side ** 2 * cell_density)
    centres = rng.uniform(0, side, (n, 2))
    for _ in range(12):
        gap = centres[:, None] - centres[None]
        distance = np.sqrt((gap ** 2).sum(-1)) + 1e-6
        push = np.where(distance < SPACING, (SPACING - distance) / distance / 2, 0.)
        centres = np.clip(centres + (gap * push[..., None]).sum(1), 0, side)
    return dict(centres=centres.astype(np.float32), survival=rng.random(n),
                normal=rng.standard_normal((n, 5 + len(CHANNELS)), np.float32),
                angle=rng.uniform(0, np.pi, n).astype(np.float32), binucleate=rng.random(n),
                nucleoli=rng.uniform(-1, 1, (n, 5, 2)).astype(np.float32),
                nucleolus_rank=rng.permuted(np.tile(np.arange(5) / 5, (n, 1)), axis=1),
                noise=rng.standard_normal((7, side, side), np.float32))


def draw_cells(cell, randomness, size):
    """One field of view before any optics, from parameters as in UNTREATED: stains (C, S, S) in
    CHANNELS order, S = size + 2 * MARGIN, height (S, S), and the centres of all nuclei, (n, 2) as
    (y, x) in the cropped field. Cells are ellipses in a grid that ruffling displaces. A pixel
    belongs to the cell whose scaled distance d is least (0 at the centre, 1 at the outline): cells
    that meet share a border and do not add up."""
    side = size + 2 * MARGIN
    alive = randomness["survival"] < cell["cell_count"]
    cells = {name: v[alive] for name, v in randomness.items() if name != "noise"}
    if not alive.any():
        return np.zeros((len(CHANNELS), side, side)), np.zeros((side, side)), np.zeros((0, 2))
    y, x = np.mgrid[:side, :side].astype(np.float32)
    shift_y, shift_x = cell["ruffling"] * textures(randomness["noise"][:2], [3, 3])
    stretch = np.exp(cell["elongation"] * abs(cells["normal"][:, 1]))
    mean_axis = cell["cell_radius"] * np.exp(.15 * cells["normal"][:, 0])
    distances = ellipse_distance(
        y + shift_y, x + shift_x, cells["centres"][:, :, None, None],
        *(v[:, None, None] for v in (cells["angle"], mean_axis * stretch, mean_axis / stretch)))
    beyond = np.full_like(distances[:1], np.inf)  # a cell alone has no neighbour
    d, next_d = np.partition(np.concatenate([distances, beyond]), 1, axis=0)[:2]
    owner = distances.argmin(0)                                                      # (S, S)
    in_nucleus, spots, golgi_centres, nuclei = draw_nuclei(cell, cells, owner, y, x)
    golgi = blob(y, x, golgi_centres[owner], cell["golgi_spread"])
    inside = soft_step(1 - d, .07)
    stains = draw_stains(cell, randomness["noise"][2:], d, next_d, inside, in_nucleus, spots, golgi)
    stains = stains.clip(0) * np.exp(.12 * cells["normal"][:, 5:])[owner].transpose(2, 0, 1)
    height = inside * np.sqrt((1.05 - d ** 2).clip(.02)) + (.45 + .3 * spots) * in_nucleus
    return stains, height, nuclei - MARGIN


def draw_nuclei(cell, cells, owner, y, x):
    """Nuclei are ellipses, in a binucleated cell two smaller ones side by side; nucleoli are round
    spots in them. Returns in_nucleus and spots, (S, S) from 0 to 1, the places of the Golgi (n, 2)
    and all nuclei's centres. v[owner] spreads a number of each cell over the pixels it owns."""
    centres, angle, normal = (cells[name] for name in ("centres", "angle", "normal"))
    double = (cells["binucleate"] < cell["binucleation"]).astype(np.float32)
    radius = cell["nucleus_radius"] * np.exp(.1 * normal[:, 2]) * (1 - .2 * double)
    squash = np.exp(cell["eccentricity"] * abs(normal[:, 3]))
    axes = [v[owner] for v in (angle, radius * squash, radius / squash)]
    major_axis = np.stack([np.sin(angle), np.cos(angle)], 1)                         # (n, 2)
    apart = (1.2 * double * radius)[:, None]
    lobes = [centres + sign * apart * major_axis for sign in (-1, 1)]
    in_nucleus = soft_step(1 - np.minimum(*(
        ellipse_distance(y, x, lobe[owner].transpose(2, 0, 1), *axes) for lobe in lobes)), .11)
    spots = np.zeros_like(in_nucleus)
    for k in range(5):
        centre = centres + cells["nucleoli"][:, k] * .55 * radius[:, None]
        seen = cells["nucleolus_rank"][:, k] < cell["nucleolus_count"] / 5
        spots = np.maximum(spots, seen[owner] * blob(y, x, centre[owner], cell["nucleolus_radius"]))
    beside = centres + 1.25 * (radius * np.sign(normal[:, 4]))[:, None] * major_axis[:, ::-1]
    return in_nucleus, spots, beside, np.concatenate([
        centres[double == 0], *(lobe[double == 1] for lobe in lobes)])


def draw_stains(cell, noise, d, next_d, inside, in_nucleus, spots, golgi):
    """What each stain shows, (C, S, S) in CHANNELS order, from white noise (5, S, S), the scaled
    distances of the nearest and the next cell, and the masks of the cells, (S, S) each."""
    patchy, strands, chromatin, reticulum, fibres = textures(
        noise, [2.2, cell["mito_granularity"], 2.4, 3.3, 3.8])
    fluid = inside * (1 - .8 * in_nucleus)
    # a cell ends at its outline, and where the two nearest cells are equally near
    border = np.exp(-(np.minimum(abs(1 - d), .8 * (next_d - d)) / .11) ** 2) * inside
    filament = np.exp(-(strands / .6) ** 2)  # the zero lines of a smooth random field
    er_fades, mito_fades = (np.exp(-(d / cell[k]) ** 2) for k in ("er_spread", "mito_spread"))
    return np.stack([
        cell["dna"] * in_nucleus * (1 + .1 * chromatin),
        cell["er"] * fluid * er_fades * (1 + .15 * reticulum),
        cell["rna"] * inside * (1 - .4 * d.clip(0, 1)) + cell["nucleoli"] * spots * in_nucleus,
        cell["golgi"] * (golgi * (1 + .25 * patchy)) * fluid + cell["membrane"] * border
        + cell["actin"] * inside * (1 + .15 * fibres),
        cell["mito"] * fluid * mito_fades * filament])


def soft_step(x, width):
    """A logistic step from 0 (x < 0) to 1 (x > 0)."""
    return 1 / (1 + np.exp((-x / width).clip(-30, 30)))


def blob(y, x, centre, sigma):
    """A Gaussian spot of height 1 around a centre (S, S, 2) that differs from pixel to pixel."""
    return np.exp(-((y - centre[..., 0]) ** 2 + (x - centre[..., 1]) ** 2) / (2 * sigma ** 2))


def ellipse_distance(y, x, centre, angle, long_axis, short_axis):
    """Distance from ellipses' centres, (2, S, S) or (n, 2, 1, 1) for n at once, scaled so that it
    is 1 on their outlines; angle and axes (in pixels) broadcastable."""
    dy, dx = y - centre[..., 0, :, :], x - centre[..., 1, :, :]
    cos, sin = np.cos(angle), np.sin(angle)
    # the quadratic form of the rotated ellipse: one pass over the pixels instead of a rotation
    xx = (cos / long_axis) ** 2 + (sin / short_axis) ** 2
    yy = (sin / long_axis) ** 2 + (cos / short_axis) ** 2
    xy = 2 * cos * sin * (1 / long_axis ** 2 - 1 / short_axis ** 2)
    return np.sqrt(xx * dx * dx + xy * dx * dy + yy * dy * dy)


def expose(stains, row, optics, noise_rng):
    """What the camera records of stains (C, S, S): uint8 (C, size, size). Batch: gain, background
    and blur. Plate: a small gain. Site: the point away from which the light falls off."""
    batches, plates = optics
    batch, side = batches[row["batch"]], stains.shape[-1]
    y, x = np.mgrid[-1:1:side * 1j, -1:1:side * 1j]
    brightest = .35 * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])[(row["site"] - 1) % 4]
    light = 1 - .12 * ((y - brightest[0]) ** 2 + (x - brightest[1]) ** 2).astype(np.float32)
    gain, background = ((v[:, None, None]).astype(np.float32) for v in (
        batch["gain"] * plates[row["plate"]], batch["background"]))
    image = smooth(stains, batch["blur"]) * gain * light + background
    image = image[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
    noise = noise_rng.standard_normal(image.shape, np.float32)  # of photons and of the camera
    image = image + noise * np.sqrt(2.5e-5 * image.clip(0) + 6e-6)
    return np.round(image.clip(0, 1) * 255).astype(np.uint8)


def phase_contrast(height, row, optics, noise_rng):
    """Brightfield of the same cells: the slope and curvature of their height. uint8 (1, s, s)."""
    blurred = smooth(height, optics[0][row["batch"]]["blur"])
    relief = 1.35 * (np.roll(blurred, 1, 0) - np.roll(blurred, -1, 0))
    image = .45 + .35 * relief + .55 * (smooth(blurred, 3.) - blurred)
    image = image[MARGIN:-MARGIN, MARGIN:-MARGIN]
    image = image + noise_rng.normal(0, .004, image.shape)
    return np.round(image.clip(0, 1) * 255).astype(np.uint8)[None]


def draw_field(row, screen, optics, seed, counterpart=True):
    """Draw one row of a layout; the same seed, a list of integers, gives the same cells. A dict:
    image (C, s, s), untreated (the same cells before treatment, drawn only with `counterpart`) and
    brightfield (1, s, s), all uint8, and the drawn truth (`true_*`). Rows that share a number
    `cells` show the same cells from the same well, whatever was done to them and wherever they are
    imaged. Wells at the edge have fewer cells with brighter membranes."""
    edge = row["row"] in (1, 16) or row["column"] in (1, 24)
    position = [row["cells"]] if "cells" in row else [row["row"], row["column"], row["plate"][1:]]
    well = keyed_rng(screen.seed, screen.draw, 3, *position)
    density, well_effect = np.exp(well.normal(0, .12)) * (.75 if edge else 1.), well.normal(0, .08)
    randomness = cell_randomness(keyed_rng(*seed), density, screen.size)
    effect = min(1., row["true_effect"] * np.exp(well_effect))
    changes = MECHANISMS.get(row["true_mechanism"], {})

    def render(strength):
        cell = {name: float(value * np.exp(strength * changes.get(name, 0.)))
                for name, value in UNTREATED.items()}
        cell["membrane"] *= 1.5 if edge else 1.
        stains, height, nuclei = draw_cells(cell, randomness, screen.size)
        camera_noise = keyed_rng(*seed, 1)
        image = expose(stains, row, optics, camera_noise)
        return image, phase_contrast(height, row, optics, camera_noise), cell, nuclei

    image, brightfield, cell, nuclei = render(effect)
    seen = ((nuclei >= 0) & (nuclei < screen.size)).all(1)
    truth = {"true_nuclei": int(seen.sum())} | {
        f"true_{k}": round(v, 4) for k, v in cell.items() if k != "cell_count"}
    return dict(image=image, untreated=render(0.)[0] if effect and counterpart else image,
                brightfield=brightfield, truth=truth)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def draw_fields(rows, screen, counterpart=True):
    """Draw many rows on all cores, in order. Yields what draw_field returns."""
    seeds = [[screen.seed, screen.draw, 4, row.get("cells", i)] for i, row in enumerate(rows)]
    with ProcessPoolExecutor(cores()) as pool:
        drawn = pool.map(draw_field, rows, repeat(screen), repeat(microscope(screen)), seeds,
                         repeat(counterpart), chunksize=64)
        yield from tqdm(drawn, desc="drawing cells", unit="image", total=len(rows))


def simulate(out="runs/data", screen=Screen()):
    """Draw a data set into a folder, its manifest at last. Returns the manifest's path."""
    out, rows, square = Path(out), layout(screen), (screen.size, screen.size, np.uint8)
    if (out / "manifest.csv").exists():
        raise UserError(f"{out}/manifest.csv exists: choose another --out or remove it")
    shapes = {"image": (len(CHANNELS), *square), "untreated": (len(CHANNELS), *square),
              "brightfield": (1, *square)}
    rows = write_stack(out, rows, shapes, draw_fields(rows, screen))
    (out / "simulation.json").write_text(json.dumps(asdict(screen), indent=1))
    return write_manifest(out / "manifest.csv", rows)


def write_stack(out, rows, shapes, fields, name="{}.npy"):
    """Write images into folder `out`, one stack (N, C, H, W) for each column of the shapes {column:
    (C, H, W, dtype)}. fields: for each row {column: (C, H, W)} and, under `truth`, what else is
    known. Returns the rows with the columns of files, `index` and the truth, for write_manifest."""
    out.mkdir(parents=True, exist_ok=True)
    files = {column: name.format(column) for column in shapes}
    stacks = {column: np.lib.format.open_memmap(out / files[column], "w+", dtype, (
        len(rows), *shape)) for column, (*shape, dtype) in shapes.items()}
    first, written = next(iter(files)), []
    for i, (row, images) in enumerate(zip(rows, fields)):
        for column, stack in stacks.items():
            stack[i] = images[column]
        written.append({first: "", "index": ""} | row | files | {"index": i}
                       | images.get("truth", {}))
    for stack in stacks.values():
        stack.flush()
    return written


def canonical(text):
    """Canonical SMILES, without a ChemAxon tail (` |c:5|`), or None if it is invalid."""
    words = text.split()
    molecule = Chem.MolFromSmiles(words[0]) if words else None
    return Chem.MolToSmiles(molecule) if molecule else None


@cache
def molecule_key(text):
    """One string for one molecule, however it is written and whatever its counter-ion: its InChIKey
    but for the last letter, which tells of protons; else canonical SMILES; else the text."""
    parts = [(Chem.MolFromSmiles(part).GetNumHeavyAtoms(), part)
             for part in (canonical(text) or "").split(".") if part]
    _, largest = max(parts, default=(0, ""))
    return largest and Chem.MolToInchiKey(Chem.MolFromSmiles(largest))[:-2] or largest or text


# --- 3. The manifest: one row per image -----------------------------------------------------------

@contextmanager
def readable(path, kinds=Exception):
    """Within the block, whatever is wrong with the bytes of a file is a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except kinds as fault:
        text = " ".join(str(fault).split())[:120] or type(fault).__name__
        raise UserError(f"{path} is unreadable: {text}") from None


def read_table(path):
    """A .csv or .csv.gz as {column: list of texts}. All rows of another length are named; empty
    lines may stand at the end alone, so that rows have the numbers of a spreadsheet."""
    opener = gzip.open if Path(path).suffix == ".gz" else open
    with readable(path, (OSError, ValueError, EOFError, csv.Error, zlib.error)), opener(
            path, "rt", newline="", encoding="utf-8-sig") as file:
        lines = [[*map(sys.intern, line)] for line in csv.reader(file)]  # equal texts: one object
    while lines and not lines[-1]:
        lines.pop()
    header, *rows = lines or [[]]
    faults = [f"row {k}: {len(row)} values for {len(header)} columns"
              for k, row in enumerate(rows, 2) if len(row) != len(header)]
    faults += [f"more than one column {c}" for c, k in Counter(header).items() if c and k > 1]
    report(path, faults or ([] if rows else ["the table has no rows"]))
    return {name: list(values) for name, values in zip(header, zip(*rows)) if name}


def write_manifest(out, rows):
    """Rows {column: text} as a manifest, under a temporary name first; a file that is there is not
    written over. Returns its path."""
    out = Path(out)
    if out.exists() or not rows:
        raise UserError(f"{out} exists: choose another --out or remove it" if rows else
                        f"no image of these tables was found: {out} is not written")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".tmp"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), "")
        writer.writeheader()
        writer.writerows(rows)
    return out.with_suffix(".tmp").replace(out)


@dataclass
class Manifest:
    """A data set: columns {name: list of strings}, one entry per image. Blank is unknown."""
    path: Path
    columns: dict
    channels: tuple      # names of the stains; None: as many as a file has
    file_columns: tuple  # the columns with image files: one per channel, or one with all of them
    index: list          # place in a .npy stack of images, or None
    sizes: dict          # {(H, W): "row 2"}, each size with the first row that has it
    depths: dict = field(default_factory=dict)  # {column: {8: "row 2"}}, bits of its numbers

    def __len__(self):
        return len(self.index)

    def rows(self, chosen, column):
        """The values of a column in the chosen rows."""
        return [self.columns[column][i] for i in chosen]

    def sha1(self):
        """The hash of the file: a manifest that has changed is another data set."""
        return hashlib.sha1(Path(self.path).read_bytes()).hexdigest()

    def plane(self, i, column):
        """What the file of row i in this column holds, (C, H, W) in its units, or a UserError."""
        name, place = self.columns[column][i], self.index[i]
        wanted = 1 if len(self.file_columns) > 1 else self.channels and len(self.channels)
        file = name and os.path.join(self.path.parent, name)
        array = open_image(file)
        if array.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
            raise UserError(f"{file} holds {array.dtype}: uint8 and uint16 images can be read")
        if place is not None and (not file.endswith(".npy") or place >= len(array)):
            raise UserError(f"{file}, shape {array.shape}, has no image {place}: the column index "
                            "names places in a stack, a .npy file")
        image = array if place is None else array[place]
        if image.ndim == 3 and (image.shape[2] == wanted != len(image) if wanted else
                                image.shape[2] < len(image)):
            image = np.moveaxis(image, 2, 0)
        image = image[None] if image.ndim == 2 else image
        if image.ndim != 3 or not image.size or wanted not in (None, len(image)):
            raise UserError(f"{file} has {len(image)} channels, {wanted or 'some'} expected (shape "
                            f"{array.shape}): --channels names those of a file, the column index a "
                            "place in a stack")
        return image

    def read(self, i, top=None):
        """Image i, (C, H, W) in the file's units; a UserError names row, column and file. top:
        bring each file from the range of its numbers to 0..top; without, all have one range."""
        planes = []
        for column in self.file_columns:
            try:
                planes.append(self.plane(i, column))
                bits = 8 * planes[-1].dtype.itemsize
                if top is None and bits not in self.depths.get(column, [bits]):
                    raise UserError(f"{bits} bits, other rows have not")
                if planes[-1].shape[1:] != planes[0].shape[1:]:
                    raise UserError("another size than other channels")
            except UserError as fault:
                raise UserError(f"{self.path}, row {i + 2}, column {column}: {fault}") from None
        return np.concatenate(planes if top is None else [
            plane * np.float32(top / np.iinfo(plane.dtype).max) for plane in planes])


def read_manifest(path, channels=CHANNELS, column="image", check=1000, faults=None):
    """Read a manifest and check it; every fault is reported, each with its row and column.

    channels: the names of the stains, in file order. They are also the columns to look for; where
    they are absent, `column` names one file with all channels (None: as many as there are).
    check: up to this many distinct images are read now, of more only that of the first row; the
    others are checked when they are read. faults: a list to gather faults in.
    """
    columns, path, channels = read_table(path), Path(path), channels and tuple(channels)
    missing = [c for c in channels or () if c not in columns]
    by_channel = channels and column in ("image", ",".join(channels)) and (
        not missing or "image" not in columns and len(missing) < len(channels))
    names = channels if by_channel else (column,)
    if not set(names) <= set(columns):
        raise UserError(f"{path} has no column {', '.join(missing if by_channel else names)}: its "
                        f"columns are {', '.join(columns)} (--channels names the stains)")
    found = [f"channel {c} is named twice" for c, k in Counter(names).items() if k > 1]
    for a, b in combinations(dict.fromkeys(names), 2):
        same = [i for i, (x, y) in enumerate(zip(columns[a], columns[b])) if x and x == y]
        found += [f"row {i + 2}: columns {a} and {b} name the same file, {columns[a][i]}"
                  for i in same[:1]]
    index = columns.get("index", [""] * len(columns[names[0]]))
    found += [f"row {i + 2}, column index: {value} is no place in a stack (0, 1, ...)"
              for i, value in enumerate(index) if value and not value.isdecimal()]
    index = [int(v) if v.isdecimal() else None for v in index]
    manifest = Manifest(path, columns, channels, names, index, {})
    few = len(set().union(*(columns[name] for name in names))) <= check * len(names)
    found += check_files(manifest, range(len(manifest)) if few else [0])
    report(path, found) if faults is None else faults.extend(found)
    return manifest


def check_files(manifest, rows):
    """Read the files of these rows, note their sizes and depths, and return their faults."""
    faults = {}
    for i in tqdm(rows, "checking files", delay=3):
        sizes = set()
        for column in manifest.file_columns:
            try:
                plane = manifest.plane(i, column)
            except UserError as fault:  # an unreadable file is named once
                faults.setdefault(str(fault), f"row {i + 2}, column {column}: {fault}")
                continue
            sizes.add(plane.shape[1:])
            depths = manifest.depths.setdefault(column, {})
            depths.setdefault(8 * plane.dtype.itemsize, f"row {i + 2}")
        if len(sizes) > 1:
            text = f"row {i + 2}: channels of different sizes, "
            faults[text] = text + ", ".join(f"{w}x{h}" for h, w in sorted(sizes))
        manifest.sizes |= {size: f"row {i + 2}" for size in sizes - manifest.sizes.keys()}
    return faults.values()


# --- 4. Image files -------------------------------------------------------------------------------

def open_image(file):
    """The numbers in an image file, in its own shape and type; a UserError says why not."""
    suffix = Path(file).suffix.lower()
    if not os.path.isfile(file):
        raise UserError(f"there is no image file {file}" if file else "the image file is blank")
    with readable(file), open(file, "rb") as opened:
        if opened.read(64).startswith(b"version https://git-lfs"):
            raise UserError(f"{file} is a Git LFS pointer, not an image: run git lfs pull")
        if suffix not in FORMATS:
            raise UserError(f"{file}: no image format read here ({', '.join(FORMATS)})")
        return FORMATS[suffix](file)


def open_tiff(path):
    """The first series of a TIFF. OME files that belong together are read one by one: tifffile
    fills those that are missing with zeros."""
    with tifffile.TiffFile(path, is_ome=False) as tif:
        page, series = tif.pages[0], tif.series[0]
        axes = [a for a, n in zip(series.axes, series.shape) if n > 1] + re.findall(
            r'Size([ZT])="(?!1")', page.description)
        deep = page.samplesperpixel > 1 and (page.planarconfig != 1 or page.dtype != np.uint8)
        if page.photometric not in (1, 2):
            raise ValueError(f"its numbers are {page.photometric.name}, not intensities")
        if {"Z", "T"} & set(axes):
            raise ValueError(f"its axes are {''.join(axes)}: one plane at one time can be read")
        if page.compression in tifffile.TIFF.DECOMPRESSORS:
            return series.asarray()
        if page.compression != 5 or deep:
            raise ValueError(f"{page.compression.name} of {page.dtype} and {page.samplesperpixel} "
                             "samples a pixel cannot be read here")
        pages = [p.index for p in series.pages]
    with Image.open(path) as image:  # tifffile leaves LZW to a package of its own
        frames = [image.seek(k) or np.array(image) for k in pages]
    return np.stack(frames).reshape(series.shape)


def open_png(path):
    """A PNG of 8 bits, grey or RGB, or of 16 bits, grey: Pillow reads 16-bit RGB as 8 bits."""
    with open(path, "rb") as file:
        bits, kind = file.read(26)[24:]
    if (bits, kind) not in ((8, 0), (16, 0), (8, 2), (8, 6)):
        raise ValueError(f"PNG of type {kind}, {bits} bits: grey and 8-bit RGB can be read")
    with Image.open(path) as image:
        return np.array(image).astype(f"uint{bits}")


def open_npy(path):
    return map_npy(path, os.stat(path).st_mtime_ns)


@lru_cache(64)
def map_npy(path, changed):
    return np.load(path, mmap_mode="r", allow_pickle=False)


def open_npz(path):
    """The array of an archive that is the image: `sample` (Hofmarcher et al. 2019) or the only one.
    Other entries may be pickles and are not touched."""
    with np.load(path, allow_pickle=False) as archive:
        name = "sample" if "sample" in archive.files else archive.files[0]
        if name != "sample" and len(archive.files) > 1:
            raise ValueError(f"which of {', '.join(archive.files)} is the image? name it sample")
        return archive[name]


FORMATS = {".tif": open_tiff, ".tiff": open_tiff, ".png": open_png, ".npy": open_npy,
           ".npz": open_npz}


# --- 5. Intensities, views and splits -------------------------------------------------------------

class Views(torch.utils.data.Dataset):
    """Views of a manifest's images, scaled to [-1, 1], as torch tensors of the shape `shape`.

    views[row, view] is (x (C, h, w) float32, ""). view >= 0 is a random crop, flip and turn that
    depends on the key alone, so that a conditioning image follows its target; -1 is the middle, as
    it stands. Of an unreadable image, or one of another size, x is NaN and the text says why.
    """

    def __init__(self, manifest, intensity, crop=0, flips=True, binning=1, seed=0):
        self.manifest, self.intensity, self.crop, self.flips = manifest, intensity, crop, flips
        self.binning, self.seed, self.kept = binning, seed, {}
        self.top = intensity["high"][0] if intensity["rule"] == "dtype" else None
        sizes, names = list(manifest.sizes), manifest.channels
        c, h, w = (len(names), *sizes[0]) if sizes and names else manifest.read(0, 1.).shape
        self.shape = (c, crop or h // binning, crop or w // binning)

    def read(self, row):
        """The binned image (C, H, W). Up to 512 MB of them are kept: reading a PNG is slow."""
        if row in self.kept:
            return self.kept[row]
        image = bin_pixels(self.manifest.read(row, self.top), self.binning)
        if len(self.kept) * image.nbytes < 2 ** 29:
            self.kept[row] = image
        return image

    def __getitem__(self, key):
        row, view = key
        try:
            image = self.read(row)
            c, h, w = image.shape
            if c != self.shape[0] or (min(h, w) < self.crop if self.crop else
                                      (h, w) != self.shape[1:]):
                raise UserError(f"{self.manifest.path}, row {row + 2}: {c} channels of {w}x{h} "
                                "pixels, where {} of {}x{} are expected".format(*self.shape))
            rng = keyed_rng(self.seed, VIEW, row, view) if view >= 0 else None
            x = scale_intensity(take_view(image, self.crop, rng, self.flips), self.intensity)
            return torch.from_numpy(np.ascontiguousarray(x)), ""
        except UserError as fault:
            return torch.full(self.shape, torch.nan), str(fault)


def start_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def loader(dataset, keys, workers=0, **words):
    """torch's DataLoader over these keys, in their order; one core is left to the caller. The
    generator of its own leaves torch's random numbers as they were; Ctrl-C is for training."""
    return torch.utils.data.DataLoader(dataset, sampler=keys, worker_init_fn=start_worker,
                                       num_workers=min(workers, max(1, cores() - 1)),
                                       generator=torch.Generator(), **words)


def load(views, keys, batch=64, workers=0, max_corrupt=0., what=""):
    """Yields (x (B, C, h, w), rows (B,)) for the keys (row, view), in their order. x is NaN where
    an image is unreadable; more of them than the share max_corrupt of the rows asked for is a
    UserError. Those left out are named at the end."""
    keys, faults, done = [(int(row), int(view)) for row, view in keys], {}, 0
    many = len({row for row, _ in keys})
    for x, texts in tqdm(loader(views, keys, workers, batch_size=batch), what, delay=3):
        rows, done = [row for row, _ in keys[done:done + len(x)]], done + len(x)
        faults |= {row: text for row, text in zip(rows, texts) if text}
        if len(faults) > max_corrupt * many:
            raise UserError(f"{next(iter(faults.values()))} ({len(faults)} of {many} images are "
                            f"unreadable: more than {max_corrupt:.1%})")
        yield x, np.array(rows)
    if faults:
        print(f"{len(faults)} of {many} images are unreadable and were left out:",
              *[*faults.values()][:5], *["..."] * (len(faults) > 5), sep="\n  ")


def bin_pixels(image, n):
    """Average n x n pixels of (C, H, W); a rest at the right and lower border is cut off."""
    c, h, w = image.shape
    cut = image[:, :h // n * n, :w // n * n].astype(np.float32)
    return cut.reshape(c, h // n, n, w // n, n).mean((2, 4)) if n > 1 else image


def mixed_depth(manifest):
    """A line that names a row of each type of numbers where a column has two, else ""."""
    return next((f"column {c}: " + ", ".join(f"{row} has {bits} bits" for bits, row in d.items())
                 for c, d in manifest.depths.items() if len(d) > 1), "")


def fit_intensity(rule, manifest, rows, binning=1):
    """How intensities become [-1, 1]: {"rule", "low": [C], "high": [C]}, kept in checkpoints.

    rule: "percentile" (0.1 and 99.9 % of each channel over at most 400 training images), "dtype"
    (each file's own 0 to 255 or 65535), or a stated range such as "0:4095".
    """
    if rule != "dtype" and mixed_depth(manifest):
        raise UserError(f"{manifest.path}, {mixed_depth(manifest)}: convert one of them, or scale "
                        "each file by its own type with --intensity dtype")
    if rule == "percentile":
        found, fault = [], ""
        for i in tqdm(keyed_rng(0).permutation(rows)[:400].tolist(), "measuring intensities",
                      delay=3):
            try:  # every 7th pixel is plenty, and plates fit in memory
                image = bin_pixels(manifest.read(i), binning)
                found.append(image.reshape(len(image), -1)[:, ::7].astype(np.float32))
            except UserError as why:
                fault = why
        if not found:
            raise UserError(f"no image can be read: {fault}")
        low, high = np.percentile(np.concatenate(found, 1), (.1, 99.9), axis=1).tolist()
    else:
        channels = len(manifest.read(int(rows[0]), 1. if rule == "dtype" else None))
        bits = max([b for found in manifest.depths.values() for b in found], default=8)
        words = rule.split(":") if rule != "dtype" else ["0", 2 ** bits - 1]
        low, high = ([number(word)] * channels for word in (words[0], words[-1]))
        if not low < high or len(words) != 2:
            raise UserError(f"--intensity {rule}: percentile, dtype, or a range such as 0:4095")
    names = manifest.channels or range(1, len(low) + 1)
    flat = [str(name) for name, a, b in zip(names, low, high) if a >= b]
    if flat:
        raise UserError(f"{manifest.path}: channel {', '.join(flat)} has no contrast: 99.8 % of "
                        "its pixels or more have one value")
    return dict(rule=rule, low=low, high=high)


def scale_intensity(image, intensity):
    """(..., C, H, W) in file units to [-1, 1], clipped, float32."""
    low, high = (np.array(intensity[k], np.float32)[:, None, None] for k in ("low", "high"))
    return ((image - low) / (high - low)).clip(0, 1) * 2 - 1


def take_view(image, crop, rng=None, flips=True):
    """A view of (C, H, W): a random crop (0: the whole), flipped and turned by multiples of 90
    degrees; without `rng` the crop in the middle, as it stands."""
    h, w = image.shape[1:]
    size_h, size_w = crop or h, crop or w
    y, x = (h - size_h) // 2, (w - size_w) // 2
    if rng is not None:
        y, x = rng.integers(h - size_h + 1), rng.integers(w - size_w + 1)
    view = image[:, y:y + size_h, x:x + size_w]
    if rng is None or not flips:
        return view
    view = np.rot90(view, rng.integers(4) if size_h == size_w else 2 * rng.integers(2), (1, 2))
    return view[:, :, ::-1] if rng.random() < .5 else view


def number(text):
    """The finite number that a text says, else NaN."""
    try:
        return float(text) if abs(float(text)) < np.inf else np.nan
    except ValueError:
        return np.nan


def pixel_size(manifest, binning):
    """Micrometres of a pixel after binning; None where the column pixel_um is not there, or does
    not say one size for all."""
    sizes = manifest.columns.get("pixel_um", [""])
    report(manifest.path, (f"row {i + 2}, column pixel_um: {text} is no size in micrometres"
                           for i, text in enumerate(sizes) if text and not number(text) > 0))
    return float(sizes[0]) * binning if len(set(sizes)) == 1 and sizes[0] else None


def doses(columns):
    """The columns dose* and conc*, {name: values}, but for those without a number, as of a unit."""
    return {name: values for name, values in columns.items()
            if re.match("dose|conc", name, re.I) and any(number(v) >= 0 for v in set(values))}


def negative_controls(columns):
    """(n,) bool: the rows whose doses are all known and 0. Without a dose there are none."""
    zero = [[number(v) == 0 for v in values] for values in doses(columns).values()]
    return np.all(zero, 0) if zero else np.zeros(len(next(iter(columns.values()))), bool)


def split_rows(manifest, how="auto", fraction=.1, seed=0):
    """Rows for training and rows held out: two arrays of row numbers.

    how: "auto" (the column `split` where there is one: train and val; else by image, those of one
    well together), "image", "smiles" (by molecule: SMILES that name one molecule stay together),
    any column ("plate"), two joined ("compound+plate"), or stated values ("plate=SQ00015233",
    "compound+plate=DMSO+P01"). Where molecules are drawn, negative controls stay in training.
    """
    columns, n, (text, _, wanted) = manifest.columns, len(manifest), how.partition("=")
    if how == "auto" and "split" in columns:
        label = np.array(columns["split"])
        if not {"train", "val"} <= set(label):
            raise UserError(f"{manifest.path}, column split: it must name rows train and val "
                            "(others are left for tests), or choose another --split")
        return np.flatnonzero(label == "train"), np.flatnonzero(label == "val")
    if how == "auto":
        text = "plate+well" if "plate" in columns and all(columns.get("well", [""])) else "image"
    names = text.split("+") if text != "image" else []
    require(manifest.path, columns, names)
    same = {name: molecule_key if name.lower() == "smiles" else str for name in names}
    keys = ["+".join(v) for v in zip(*(map(same[name], columns[name]) for name in names))]
    keys, free = np.array(keys or range(n), str), np.ones(n, bool)
    if wanted:
        parts = wanted.rsplit("+", len(names) - 1)  # a molecule, which may hold a +, comes first
        chosen = ["+".join(same[name](part) for name, part in zip(names, parts))]
        if chosen[0] not in keys:
            raise UserError(f"--split {how}: no row has it; there are "
                            + ", ".join(np.unique(keys)[:20]))
    else:
        if {"smiles", "inchikey", "compound"} & {name.lower() for name in names}:
            free = ~negative_controls(columns)
        order = sorted(set(keys[free]), key=lambda v: share_of(f"{seed}/{v}"))
        chosen = order[:max(1, round(fraction * len(order)))]
    held = np.isin(keys, chosen) & free
    if held.all():
        raise UserError(f"--split {how}: nothing is left to train on")
    return np.flatnonzero(~held), np.flatnonzero(held)


def require(path, columns, names):
    """Refuse a table without these columns."""
    report(path, [f"there is no column {name}" for name in names if name not in columns])


def share_of(text):
    """A number from 0 to 1 that is always the same for a text, whatever other texts there are."""
    return int(hashlib.sha1(text.encode()).hexdigest()[:12], 16) / 16 ** 12


# --- 6. Manifests made from manifests: restained images, lists of negative controls ---------------

def plate_style(images):
    """How a plate shows untreated cells: mean (C, 1, 1) and power spectrum (C, H, W // 2 + 1), the
    same in all directions, of images (N, C, H, W) of its negative controls."""
    h, w = images.shape[2:]
    mean = images.mean((0, 2, 3))[:, None, None]
    power = (abs(np.fft.rfft2(images - mean)) ** 2).mean(0)
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None]
    ring = np.rint(np.hypot(fy, fx) * max(h, w)).astype(int)
    count = np.bincount(ring.ravel())
    rings = np.stack([np.bincount(ring.ravel(), p.ravel()) / count for p in power])
    return mean, rings[:, ring]


def restain(image, own, other):
    """An image (C, H, W), dark at -1 and bright at 1, from the plate of style `own` as that of
    style `other` would show it (styles: from plate_style).

    Every frequency is scaled by sqrt(P_other / P_own), 1/8 to 8. For stationary Gaussian textures
    this is the map that carries one to the other at the least cost (Xia et al. 2014, SIAM J.
    Imaging Sciences 7). It moves what is linear and alike everywhere: gain, background and blur.
    Shading, and batches whose cells themselves differ, it does not move.
    """
    (own_mean, own_power), (other_mean, other_power) = own, other
    scale = np.sqrt((other_power + 1e-6) / (own_power + 1e-6)).clip(1 / 8, 8)
    moved = np.fft.irfft2(np.fft.rfft2(image - own_mean) * scale, s=image.shape[1:])
    return (moved + other_mean).astype(np.float32)


CONTROLS_NEEDED, CONTROLS_SEEN = 8, 96  # images of negative controls that tell a plate's style


def write_restained(manifest, by: list = ("plate",), share=.75, balance: list = (),
                    out="runs/restained", channels=",".join(CHANNELS)):
    """Write a manifest with treated images as other plates show them, and sampling weights.

    Each treated training row is copied as another plate, chosen at random, would show it; the copy
    is told that plate's value of all columns that have one value on a whole plate, and takes
    `share` of the row's weight. by: the columns that name a plate. share 0: no copies. balance:
    draw each combination of the values of these columns equally often. out: a folder.
    """
    manifest, out = read_manifest(manifest, channels.split(",")), Path(out)
    columns = manifest.columns
    require(manifest.path, columns, [*by, *balance])
    if "weight" in columns or not 0 <= share <= 1 or len(manifest.sizes) > 1:
        raise UserError(f"{manifest.path}: restaining takes a share between 0 and 1, images of one "
                        "size, and no column weight (there are sampling weights already)")
    train, held = (rows.tolist() for rows in split_rows(manifest))
    weights, moved = balanced(columns, train, balance), relative_columns(manifest, out)
    rows, held = table_rows(moved), set(held)
    if "split" not in columns:
        rows = [row | {"split": "val" if i in held else "train"} for i, row in enumerate(rows)]
    told, moves, images = restained_images(manifest, by, train) if share else ({}, [], ())
    copies, own = [], {name: "" for name in columns if moved[name] is not columns[name]}  # files
    for i, other in moves:
        copies.append(rows[i] | told[other] | own | {
            "split": "train", "weight": f"{weights[i] * share:.6g}"})
        weights[i] *= 1 - share
    if copies:
        each = len(manifest.read(moves[0][0])) // len(manifest.file_columns)
        shapes = {c: (each, *next(iter(manifest.sizes)), np.dtype(f"uint{bits}"))
                  for c, (bits, *_) in manifest.depths.items()}
        copies = write_stack(out, copies, shapes, (
            {c: part.round().clip(0, np.iinfo(dtype).max) for (c, (*_, dtype)), part in zip(
                shapes.items(), np.split(image, len(shapes)))} for image in images),
            "{}_restained.npy")
    for i, weight in weights.items():
        rows[i]["weight"] = f"{weight:.6g}"
    made, note = write_manifest(out / "manifest.csv", rows + copies), "simulation.json"
    if manifest.path.with_name(note).exists():  # the truth of simulated cells stays known
        made.with_name(note).write_text(manifest.path.with_name(note).read_text())
    return made


def restained_images(manifest, by, train):
    """Training images as other plates, named by the columns `by`, show them: ({plate: {column:
    value}} of the columns with one value on each whole plate, moves [(row, other plate)], and for
    each move the image in the units of its files). Plates of too few negative controls are left."""
    columns, untreated = manifest.columns, negative_controls(manifest.columns)
    fitted, controls = fit_intensity("percentile", manifest, train), defaultdict(list)
    low, high = (np.array(fitted[k])[:, None, None] for k in ("low", "high"))
    plate = {i: tuple(columns[name][i] for name in by) for i in train}
    for i in keyed_rng(0, CONTROLS).permutation(train).tolist():
        if untreated[i] and all(plate[i]):
            controls[plate[i]].append(i)
    known = sorted(p for p, rows in controls.items() if len(rows) >= CONTROLS_NEEDED)
    treated = [i for i in train if not untreated[i]]
    chosen = [i for i in treated if plate[i] in known
              and all(values[i] for values in doses(columns).values())]
    if len(known) < 2 or not chosen:
        raise UserError(f"{manifest.path}: restaining needs treated images, and two plates "
                        f"(--by {' '.join(by)}) of {CONTROLS_NEEDED} negative controls or more")
    ahead = keyed_rng(0, OTHER_PLATE).integers(1, len(known), len(chosen))
    moves = [(i, known[(known.index(plate[i]) + k) % len(known)]) for i, k in zip(chosen, ahead)]
    print(f"restained: {len(known)} plates, {len(chosen)} images; {len(treated) - len(chosen)} "
          "other treated images stay as they are")
    constant = [name for name, v in columns.items()
                if all(v[i] == v[controls[p][0]] for i, p in plate.items() if p in known)]

    def scaled(i):  # not clipped, and -1 and 1 are low and high
        return ((manifest.read(i) - low) / (high - low) * 2 - 1).astype(np.float32)

    @cache
    def style(p):
        count = max(CONTROLS_NEEDED, 2 ** 26 // low.size // math.prod(next(iter(manifest.sizes))))
        return plate_style(np.stack([scaled(i) for i in controls[p][:CONTROLS_SEEN][:count]]))

    def images():
        for i, other in tqdm(moves, "restaining"):
            image = restain(scaled(i), style(plate[i]), style(other))
            yield (image + 1) / 2 * (high - low) + low
    return {p: {c: columns[c][controls[p][0]] for c in constant} for p in known}, moves, images()


def balanced(columns, rows, names):
    """Sampling weights {row: weight} of mean 1: 1 / n, n the number of rows with the same values in
    the columns `names` (this molecule in this batch). Negative controls keep their share.

    A confounded screen shows most combinations rarely. Drawing them more often does not bias a
    model that is told both: it learns images *given* the combination.
    """
    untreated = negative_controls(columns)
    keys = {i: tuple(columns[n][i] for n in names) for i in rows if names and not untreated[i]}
    count = Counter(keys.values())
    scale = len(keys) / max(len(count), 1)
    return {i: scale / count[keys[i]] if i in keys else 1. for i in rows}


def list_controls(manifest, by: list = ("plate",), out="controls.csv",
                  channels=",".join(CHANNELS)):
    """Write a manifest with the column control_row: each row's negative controls.

    They are row numbers, as in a spreadsheet, of all negative controls (dose 0) of the same plate,
    named by the columns `by`, in other wells than the row's own.
    """
    manifest, controls = read_manifest(manifest, channels.split(",")), defaultdict(list)
    require(manifest.path, manifest.columns, by)
    plates = list(zip(*(manifest.columns[name] for name in by)))
    wells = manifest.columns.get("well") or range(len(manifest))
    for i in np.flatnonzero(negative_controls(manifest.columns)).tolist():
        controls[plates[i]].append(i)
    found = [" ".join(str(k + 2) for k in controls[p] if wells[k] != well) if all(p) else ""
             for p, well in zip(plates, wells)]
    report(manifest.path, (
        f"row {i + 2}: plate {' '.join(plates[i]) or 'blank'} has no negative control (dose 0) in "
        "another well" for i, listed in enumerate(found) if not listed))
    columns = relative_columns(manifest, Path(out).parent) | {"control_row": found}
    return write_manifest(out, table_rows(columns))


def relative_columns(manifest, folder):
    """The columns of a manifest, the paths in them as a CSV in `folder` has to write them."""
    here, columns = manifest.path.parent, dict(manifest.columns)

    @cache
    def moved(name):
        return name if not name or os.path.isabs(name) else os.path.relpath(here / name, folder)
    for name, values in columns.items():
        first = next(filter(None, values), "")
        if name in manifest.file_columns or first and os.path.isfile(here / first):
            columns[name] = list(map(moved, values))
    return columns


# --- 7. Published data sets, as manifests ---------------------------------------------------------

def table_rows(columns):
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def tidy_table(path, needed=()):
    """A published table, {column: list of texts}: the names in small letters without Metadata_,
    plate_id and well_position as plate and well; wells as A01, with row and column where untold."""
    columns = {tidy_name(name): [v.strip() for v in values]
               for name, values in read_table(path).items()}
    require(path, columns, needed)
    if "well" in columns:
        columns["well"], *places = zip(*map(well_position, columns["well"]))
        for name, place in zip(("row", "column"), places):
            columns[name] = [old or new for old, new in zip(columns.get(name, place), place)]
    return columns


def tidy_name(column):
    name = re.sub("^metadata_", "", column.lower())
    return {"plate_id": "plate", "well_position": "well", "broad_id": "compound"}.get(name, name)


@cache
def well_position(text):
    """A well, however it is written (A1, a01), as (A01, row, column), counted from 1."""
    found = re.fullmatch(r"([A-P])(\d\d?)", text.upper())
    return (f"{found[1]}{int(found[2]):02d}", str(ord(found[1]) - 64), str(int(found[2]))
            ) if found else (text, "", "")


def mol2image(images, splits: list, out="manifest.csv", val=.02):
    """Write Mol2Image's data set, the download of Hofmarcher et al. 2019, as a manifest.

    images: its folder, searched for {PLATE}-{WELL}-{SITE}.npz; listed files that are missing are
    counted and left out. splits: the tables datasplit_gen_*.csv; the column `split` is their name
    (train, test_easy, test_hard ...), val for a share `val` of the wells of train.
    """
    files, rows, missing = {p.stem.upper(): p for p in Path(images).rglob("*.npz")}, {}, []
    for table in splits:
        split = Path(table).name.partition(".")[0].removeprefix("datasplit_gen_")
        for row in table_rows(tidy_table(table, ("sample_key", "plate", "well"))):
            key = row.pop("sample_key").upper()
            if key not in files:
                missing.append(key)
                continue
            held = split == "train" and share_of(f"{row['plate']}-{row['well']}") < val
            image = {"image": os.path.relpath(files[key], Path(out).parent)}
            rows[key, split] = image | row | {"split": "val" if held else split}
    write_manifest(out, list(rows.values()))
    print(f"wrote {out}: {len(rows)} images, {summary([row['split'] for row in rows.values()])}\n"
          f"{len(missing)} listed images are not in {images}: {', '.join(missing[:5])}\n"
          "its channels, for every command: --channels Mito,ER,RNA,AGP,DNA")


def load_data(tables: list, out="manifest.csv", join: list = (), root=""):
    """Write CellProfiler's LoadData tables (the form of JUMP, LINCS and Bray) as a manifest.

    FileName_OrigX and PathName_OrigX become channel X; Metadata_Y becomes y. join: TABLE:a,b ...,
    tables of wells, plates or compounds joined on the named columns; what does not match stays
    blank. root: PUBLISHED=MINE, the start of the published paths and what it is here.
    """
    (published, _, mine), rows = root.partition("="), []
    for table in tables:
        columns, made = read_table(table), {}
        for column in [c for c in columns if re.match("FileName_(?!.*Illum)", c)]:
            folders = columns.get(column.replace("FileName_", "PathName_"), repeat(""))
            made[re.sub("^FileName_(Orig)?", "", column)] = [name and os.path.relpath(
                Path(table).parent / (mine + folder.removeprefix(published) if
                                      folder.startswith(published) else folder) / name,
                Path(out).parent) for folder, name in zip(folders, columns[column])]
        if not made:
            raise UserError(f"{table} has no column FileName_...: is it a LoadData table?")
        stains, tidy = ", ".join(made), tidy_table(table)
        told = [*(tidy_name(c) for c in columns if c.startswith("Metadata_")), "row", "column"]
        rows += table_rows(made | {name: tidy[name] for name in told if name in tidy})
    for table in join:
        join_table(rows, table)
    write_manifest(out, rows)
    print(f"wrote {out}: {len(rows)} images, channels {stains}, columns {', '.join(rows[0])}")


def join_table(rows, join):
    """Fill rows with the columns of one --join, where its named columns agree."""
    path, _, names = join.rpartition(":")
    on, columns = list(map(tidy_name, names.split(","))), tidy_table(path) if path else {}
    if not set(on) <= rows[0].keys() & columns.keys():
        raise UserError(f"--join {join}: write TABLE:COLUMN or TABLE:COLUMN,COLUMN, those of both: "
                        f"there are {', '.join(rows[0])} and {', '.join(columns)}")
    keys, found = [tuple(row[n] for n in on) for row in rows], {}
    wanted, given = set(keys), list(zip(*(columns[n] for n in on)))
    for key, entry in zip(given, zip(*columns.values())):
        if key in wanted and found.setdefault(key, entry) != entry:
            raise UserError(f"{path} has two different rows for {', '.join(on)} {', '.join(key)}")
    if not found:
        raise UserError(f"--join {join}: no image matches; the first has {', '.join(on)} "
                        f"{', '.join(keys[0])}, the table {', '.join(given[0])}")
    for key, row in zip(keys, rows):
        entry = zip(columns, found.get(key, [""] * len(columns)))
        row.update({n: value for n, value in entry if not row.get(n)})
    matched = sum(key in found for key in keys)
    print(f"{path}: {matched} of {len(rows)} images matched on {', '.join(on)}")


# --- 8. Pictures ----------------------------------------------------------------------------------

def colours_of(channels):
    """A colour (R, G, B) for each stain; those that are not the simulator's lie round the circle of
    hues, by their place."""
    return np.array([COLOURS.get(c, colorsys.hsv_to_rgb(i / len(channels), .9, 1))
                     for i, c in enumerate(channels)])


def composite(image, channels):
    """(C, H, W) in [-1, 1] to RGB (H, W, 3) in [0, 1]: each stain in its colour, added up; a plain
    (H, W) in grey."""
    unit = (np.asarray(image, np.float32) + 1) / 2
    colours = colours_of(channels) if unit.ndim == 3 else np.ones((1, 3))
    return np.einsum("chw,ck->hwk", unit.reshape(-1, *unit.shape[-2:]), colours).clip(0, 1)


@contextmanager
def figure(path, *shape, **options):
    """with figure(path, ...) as axes: as plt.subplots, written to the file at the end."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(*shape, **options)
    yield axes
    fig.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110, bbox_inches="tight", pad_inches=.05)  # no label is cut
    plt.close(fig)


def picture(path, rows, channels, row_labels=(), column_labels=(), pixel_um=None, title=""):
    """Draw a grid as PNG. rows: list of lists of images, (C, H, W) in [-1, 1] shown in composite
    colour with a legend, or (H, W) in [-1, 1] shown in grey."""
    tiles = {(i, j): np.asarray(image) for i, row in enumerate(rows) for j, image in enumerate(row)}
    h, w = (max(tile.shape[k] for tile in tiles.values()) for k in (-2, -1))
    n, gap = max(map(len, rows)), 1 + w // 32
    sheet = np.ones((len(rows) * (h + gap) - gap, n * (w + gap) - gap, 3))
    for (i, j), tile in tiles.items():
        rgb = composite(tile, channels)
        sheet[i * (h + gap):, j * (w + gap):][:rgb.shape[0], :rgb.shape[1]] = rgb
    side = 1.75 if n * len(rows) < 20 else 1.15                          # inches of a tile
    with figure(path, figsize=(side * n + 1.1, side * len(rows) * h / w + .8)) as axis:
        axis.imshow(sheet, interpolation="bicubic")  # pixels as blocks look worse than they are
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0, labelsize=7, top=True, labeltop=True, labelbottom=False)
        axis.set_xticks([w / 2 + k * (w + gap) for k in range(len(column_labels))], column_labels)
        axis.set_yticks([h / 2 + k * (h + gap) for k in range(len(row_labels))], row_labels)
        axis.set_title(title, fontsize=8)
        if pixel_um:  # a bar of a round number of micrometres, less than half of the width
            length = max((v for v in (1, 2, 5, 10, 20, 50, 100, 200) if v < .5 * w * pixel_um),
                         default=round(.3 * w * pixel_um, 3))
            x, y = .05 * w, len(sheet) - .06 * h
            axis.plot([x, x + length / pixel_um], [y, y], "w", lw=2)
            axis.text(x, y - .05 * h, f"{length} µm", color="w", fontsize=6, va="bottom")
        stained = any(tile.ndim == 3 for tile in tiles.values())
        for k, (name, colour) in enumerate(zip(channels, colours_of(channels)) if stained else ()):
            axis.annotate(name, (0, 0), (4 + 43 * k, -14), "axes fraction", "offset points",
                          color=colour, fontsize=8, weight="bold",
                          bbox=dict(facecolor="black", pad=1.5, lw=0))


# --- 9. Commands ----------------------------------------------------------------------------------

def summary(values):
    """The values of a column in one line: each with its count, or the first and the last."""
    count = Counter(v for v in values if v != "")
    ordered = sorted(count, key=lambda v: (np.isnan(number(v)), np.nan_to_num(number(v)), v))
    return ", ".join(f"{v} ({count[v]})" for v in ordered) if len(count) <= 8 else (
        f"{len(count)} distinct, {ordered[0][:30]} to {ordered[-1][:30]}")


def show(manifest, channels=",".join(CHANNELS), out=""):
    """Check every file and value of a manifest, summarise it, and draw a contact sheet.

    channels: the stains, in file order. out: the picture. Faults are listed after the summary.
    """
    if out and Path(out).suffix.lower() not in (".png", ".jpg", ".tif", ".pdf", ".svg"):
        raise UserError(f"--out {out}: name a picture, such as sheet.png")
    faults, channels, path = [], channels.split(","), manifest
    manifest = read_manifest(path, channels, check=np.inf, faults=faults)
    n, mixed, columns = len(manifest), mixed_depth(manifest), manifest.columns
    print(f"{path}: {n} images, channels {', '.join(channels)}")
    for name, values in columns.items():
        print(f"  {name:26s} {values.count(''):6d} blank   {summary(values)}")
    sound = {name: lambda v: number(v) >= 0 for name in doses(columns)} | {"smiles": canonical}
    for name in sound.keys() & columns.keys():
        wrong = {v for v in set(columns[name]) if v and not sound[name](v)}
        faults += [f"row {i + 2}, column {name}: {v} is no valid SMILES or dose"
                   for i, v in enumerate(columns[name]) if v in wrong]
    report(path, faults)
    if mixed:
        print(f"warning: {mixed}: --intensity dtype scales each by its own type")
    files = sorted({manifest.path.parent / f for c in manifest.file_columns for f in columns[c]})
    several = [f for f in files if f.suffix.lower() in (".tif", ".tiff") and len(
        tifffile.TiffFile(f, is_ome=False).series) > 1]
    for file in several[:1]:
        print(f"note: {file} (as {len(several)} files) holds series, of which the first is read")
    high = np.array([manifest.read(i, 1.).max((1, 2)) for i in tqdm(range(n), delay=3)])  # (n, C)
    for name, top in zip(channels, high.T):
        if rows := (np.flatnonzero(top == 0) + 2).tolist():
            print(f"warning: channel {name} is zero everywhere in {len(rows)} of {n} images: row "
                  + ", ".join(map(str, rows[:10])))
    some = np.sort(keyed_rng(0, CHECK).permutation(n)[:24]).tolist()
    crop = min(256, *(side for size in manifest.sizes for side in size))
    views = Views(manifest, fit_intensity("dtype" if mixed else "percentile", manifest, some), crop)
    out = out or Path("runs") / f"{manifest.path.resolve().parent.name}_contact_sheet.png"
    parts = [some[k:k + 8] for k in range(0, len(some), 8)]
    picture(out, [[views[i, -1][0] for i in part] for part in parts], channels,
            [f"rows {part[0] + 2}\nto {part[-1] + 2}" for part in parts],
            title=f"{path}: {len(some)} of {n} images")
    print(f"no faults; contact sheet: {out}")


def draw_screen(folder="runs", effect=.9):
    """mechanisms.png: the same cells untreated and under each mechanism, in composite, channels and
    brightfield. layout.png: how many wells to train on each mechanism has in each batch."""
    screen, rows, names = Screen(), [], ["none", *MECHANISMS]
    for mechanism in names:
        row = dict(row=5, column=5, site=1, batch="B1", plate="P01", true_mechanism=mechanism,
                   true_effect=effect if mechanism != "none" else 0.)
        drawn = draw_field(row, screen, microscope(screen), [3], counterpart=False)
        image = ((drawn["image"] / 127.5 - 1) * 1.4 + .4).clip(-1, 1)  # brighter, for the eye
        rows.append([image, *image, drawn["brightfield"][0] / 127.5 - 1])
    picture(f"{folder}/mechanisms.png", [*zip(*rows)], CHANNELS, ["all", *CHANNELS, "brightfield"],
            names, .8)
    batches = [f"B{b + 1}" for b in range(screen.batches)]
    wells = Counter((r["true_mechanism"] if r["dose"] else "none", r["batch"])
                    for r in layout(screen) if r["split"] == "train" and r["site"] == 1)
    counts = np.array([[wells[name, batch] for batch in batches] for name in names])
    with figure(f"{folder}/layout.png", figsize=(5, 3.6)) as axis:
        axis.imshow(counts, "Greens", vmax=2 * counts.max(), aspect="auto")
        axis.set_xticks(range(len(batches)), batches), axis.set_yticks(range(len(names)), names)
        axis.set_title("wells to train on", fontsize=8)
        kinds = {k: heldout_combinations(screen.batches, k) for k in ("home", "val", "test")}
        for (i, j), count in np.ndenumerate(counts):
            words = [kind for kind, batch_of in kinds.items() if batch_of.get(names[i]) == j]
            axis.text(j, i, " ".join([str(count), *words]), ha="center", va="center", fontsize=7)
    return f"{folder}/mechanisms.png and {folder}/layout.png"


COMMANDS = {"simulate": simulate, "show": show, "mol2image": mol2image, "load_data": load_data,
            "restain": write_restained, "controls": list_controls}


def main():
    """The arguments of a command are those of its function, and its help is the docstring."""
    layout = dict(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = Parser(description=__doc__, **layout)
    subparsers, notes = parser.add_subparsers(dest="command"), comments(Screen)
    for name, run in COMMANDS.items():
        text = inspect.cleandoc(run.__doc__)
        add = subparsers.add_parser(name, help=text.partition("\n")[0], description=text,
                                    **layout).add_argument
        for p in inspect.signature(run).parameters.values():
            many = {"nargs": "+"} if p.annotation is list else {}
            if p.name == "screen":
                for f in fields(Screen):
                    add(f"--{f.name}", type=f.type, default=f.default, help=notes[f.name])
            elif p.default is p.empty:
                add(p.name, **many)
            else:
                add(f"--{p.name}", default=p.default, **many or {"type": type(p.default)})
    args = vars(parser.parse_args())
    command = args.pop("command")
    try:
        if command == "simulate":
            args = {"out": args.pop("out"), "screen": Screen(**args)}
        if made := COMMANDS.get(command, draw_screen)(**args):
            print(f"wrote {made}")
    except (UserError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
