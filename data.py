"""Images and where they come from: a simulated microscope, and manifests of real plates.

A data set is one CSV, the manifest: one row per image, paths relative to the CSV, every other
column metadata. The simulated screen is written as a manifest too, so it enters by the same door
as a real plate; because it is simulated, what biology and experiment did to each image is known.

    python data.py simulate --out runs/data      # draw the default screen
    python data.py show runs/data/manifest.csv   # check every file, summarise, draw a contact sheet
    python data.py mol2image IMAGES train.csv test.csv    # Mol2Image's data set, as a manifest
    python data.py load_data load_data.csv       # CellProfiler's tables (JUMP, LINCS), likewise
    python data.py                               # the same cells under each mechanism, as a picture
"""
import argparse
import colorsys
import csv
import gzip
import hashlib
import inspect
import json
import logging
import os
import re
import signal
import struct
import sys
import threading
import time
import weakref
import zipfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageSequence
from rdkit import Chem, RDLogger
from tqdm import tqdm

RDLogger.DisableLog("rdApp.*")  # we name the row of a bad SMILES ourselves
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # and of a damaged TIFF
# The simulated stains, each with its colour in pictures. A stain more is a line here, and one in
# draw_stains.
COLOURS = {"DNA": (.2, .4, 1), "ER": (0, .7, .3), "RNA": (.5, .5, .1), "AGP": (1, .4, .05),
           "Mito": (.8, .1, .5)}
CHANNELS = tuple(COLOURS)


def comments(settings):
    """{setting: the comment beside it} of a dataclass of settings: the help of its options."""
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(settings), re.M))


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and complains in one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)


class DataError(ValueError):
    """A fault in the user's files. One line a fault, each naming the file, row and column."""


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
    for mechanism, effect in MECHANISMS.items():
        for scaffold, factor in SCAFFOLDS.items():
            held = scaffold == HELDOUT_SCAFFOLD
            for substituent in HELDOUT_SCAFFOLD_SUBSTITUENTS if held else SUBSTITUENTS:
                smiles = scaffold.replace("{R}", substituent).replace("{M}", effect["motif"])
                kind = ("test_scaffold" if held else "test_substituent"
                        if substituent in HELDOUT_SUBSTITUENTS else "train")
                found.append(dict(compound=f"NP{len(found) + 1:04d}", smiles=canonical(smiles),
                                  mechanism=mechanism, scaffold=scaffold, kind=kind,
                                  substituent=substituent, ec50=factor * SUBSTITUENTS[substituent]))
    return found


def hill(dose, ec50):
    """The share of the full effect that a dose has, 0 to 1."""
    return round(dose ** HILL / (dose ** HILL + ec50 ** HILL), 4)


def home_batch(mechanism, batches):
    """Where a confounded screen puts a mechanism: its number modulo the number of batches."""
    return list(MECHANISMS).index(mechanism) % batches


def heldout_pairs(batches, kind):
    """{mechanism: batch}, pairs kept out of training at any confounding. kind: "test", half of the
    batches away from home, or "val", one away. A single batch leaves no pair to hold out."""
    away = {"test": (batches + 1) // 2, "val": 1}[kind]
    return {m: (home_batch(m, batches) + away) % batches for m in MECHANISMS if batches > 1}


def layout(screen):
    """The wells of a screen, before anything is drawn.

    Returns a list of dicts, one per image. Every well's molecule, dose, batch, plate and position
    is decided here, and so is its split: train, val (wells like those of training), val_pair and
    test_pair (mechanism and batch never seen together), test_substituent, test_scaffold.
    """
    if not 0 <= screen.confounding <= 1 or min(
            screen.batches, screen.plates_per_batch, screen.controls_per_plate, screen.replicates,
            screen.sites, screen.size) < 1 or min(screen.seed, screen.draw) < 0:
        raise DataError("a screen has a confounding between 0 and 1, at least one of everything, "
                        "and seeds from 0 on")
    rng = np.random.default_rng([screen.seed, screen.draw, 1])
    pairs = {f"{kind}_pair": heldout_pairs(screen.batches, kind) for kind in ("test", "val")}
    rows = []
    for p, wells in enumerate(fill_plates(screen, rng)):
        if len(wells) > 384:
            raise DataError(f"plate {p + 1} would need {len(wells)} of its 384 wells: use more "
                            "plates per batch or fewer replicates")
        batch = p // screen.plates_per_batch
        for position, (molecule, dose) in zip(rng.permutation(384), wells):
            r, c = divmod(int(position), 24)
            well = dict(compound=molecule["compound"], smiles=molecule["smiles"], dose=dose,
                        batch=f"B{batch + 1}", plate=f"P{p + 1:02d}",
                        well=f"{'ABCDEFGHIJKLMNOP'[r]}{c + 1:02d}", row=r + 1, column=c + 1)
            after = dict(role="treated" if dose else "control",
                         split=split_of(molecule, batch, pairs, rng), pixel_um=1.2,
                         **{f"true_{k}": molecule[k] for k in (
                             "mechanism", "scaffold", "substituent", "ec50")},
                         true_effect=hill(dose, molecule["ec50"]))
            rows += [well | {"site": site + 1} | after for site in range(screen.sites)]
    return rows


def fill_plates(screen, rng):
    """Which wells go on which plate: a list of (molecule, dose) for each, controls first."""
    plates = [[(CONTROL, 0.)] * screen.controls_per_plate
              for _ in range(screen.batches * screen.plates_per_batch)]
    for molecule in molecules():
        for dose in DOSES * screen.replicates:
            at_home = rng.random() < screen.confounding
            batch = (home_batch(molecule["mechanism"], screen.batches) if at_home
                     else int(rng.integers(screen.batches)))
            first = batch * screen.plates_per_batch
            min(plates[first:first + screen.plates_per_batch], key=len).append((molecule, dose))
    return plates


def split_of(molecule, batch, pairs, rng):
    """The split of a well: of its molecule, of its pair of mechanism and batch, or by chance."""
    if molecule["kind"] != "train":
        return molecule["kind"]
    for name, pair in pairs.items():
        if pair.get(molecule["mechanism"]) == batch:
            return name
    return "val" if rng.random() < .1 else "train"


# --- 2. The simulated microscope: cells, perturbations, experiment effects ------------------------

# An untreated cell. Lengths in pixels (1.2 micrometres), intensities as a share of full scale.
UNTREATED = dict(
    cell_count=1., nucleus_radius=4.6, eccentricity=.22, binucleation=.04, cell_radius=11.5,
    elongation=.3, ruffling=.8, dna=.5, er=.42, er_spread=.75, rna=.2, nucleoli=.45,
    nucleolus_radius=1.15, nucleolus_count=3., golgi=.5, golgi_spread=1.7, membrane=.3, actin=.16,
    mito=.8, mito_granularity=2.5, mito_spread=.62)
CELLS_PER_PIXEL = 11 / 64 ** 2  # eleven nuclei in a 64x64 field of view
MARGIN = 8                      # pixels drawn around the field, so that cells are cut by its border


def treated_cell(mechanism, effect):
    """The parameters of UNTREATED after a mechanism has acted with `effect` in [0, 1]."""
    changes = MECHANISMS.get(mechanism, {})
    return {name: float(value * np.exp(effect * changes.get(name, 0.)))
            for name, value in UNTREATED.items()}


def microscope(screen):
    """Experiment effects, drawn once per seed.

    Returns {batch: dict} and {plate: gain}: batch gains (C,), background (C,) and blur (sigma in
    pixels), plate gains (C,).
    """
    rng, n = np.random.default_rng([screen.seed, 2]), len(CHANNELS)
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


def spread_out(centres, spacing, side):
    """Push (n, 2) points apart until few lie closer than `spacing` pixels."""
    for _ in range(12):
        gap = centres[:, None] - centres[None]
        distance = np.sqrt((gap ** 2).sum(-1)) + 1e-6
        push = np.where(distance < spacing, (spacing - distance) / distance / 2, 0.)
        centres = np.clip(centres + (gap * push[..., None]).sum(1), 0, side)
    return centres


def draw_cells(cell, identity, size):
    """Draw one field of view, before any optics.

    cell: parameters as in UNTREATED. identity: the random numbers that make these cells these
    cells, so that the same identity with other parameters shows the same cells, treated.
    Returns stains (C, S, S) in CHANNELS order with S = size + 2 * MARGIN, height (S, S), and
    the centres of all nuclei (n, 2) as (y, x) in the coordinates of the cropped field.
    """
    side = size + 2 * MARGIN
    alive = identity["survival"] < cell["cell_count"]
    cells = {name: v[alive] for name, v in identity.items() if name != "noise"}
    if not alive.any():
        return np.zeros((len(CHANNELS), side, side)), np.zeros((side, side)), np.zeros((0, 2))
    y, x = np.mgrid[:side, :side].astype(np.float32)
    shift_y, shift_x = cell["ruffling"] * textures(identity["noise"][:2], [2, 2])
    owner, d, second = draw_territories(cell, cells, y + shift_y, x + shift_x)
    in_nucleus, spots, beside, nuclei = draw_nuclei(cell, cells, owner, y, x)
    golgi = blob(y, x, beside[owner], cell["golgi_spread"])
    inside = soft_step(1 - d, .07)
    stains = draw_stains(cell, identity["noise"][2:], d, second, inside, in_nucleus, spots, golgi)
    stains = stains.clip(0) * np.exp(.12 * cells["normal"][:, 5:])[owner].transpose(2, 0, 1)
    height = inside * np.sqrt((1.05 - d ** 2).clip(.02)) + (.45 + .3 * spots) * in_nucleus
    return stains, height, nuclei - MARGIN


def draw_territories(cell, cells, y, x):
    """Which cell a pixel belongs to. Cells are ellipses in a grid (y, x) that ruffling displaces,
    so outlines are wobbly. A pixel belongs to the cell whose scaled distance is least (0 at the
    centre, 1 at the outline), so where cells meet they share a border, instead of adding up.

    Returns owner, its distance and that of the second nearest cell, (S, S) each.
    """
    stretch = np.exp(cell["elongation"] * abs(cells["normal"][:, 1]))
    mean_axis = cell["cell_radius"] * np.exp(.15 * cells["normal"][:, 0])
    distances = ellipse_distance(y, x, cells["centres"][:, :, None, None], *(
        v[:, None, None] for v in (cells["angle"], mean_axis * stretch, mean_axis / stretch)))
    beyond = np.full_like(distances[:1], np.inf)  # a cell alone has no neighbour
    nearest, second = np.partition(np.concatenate([distances, beyond]), 1, axis=0)[:2]
    return distances.argmin(0), nearest, second


def draw_nuclei(cell, cells, owner, y, x):
    """Nuclei are ellipses, in a binucleated cell two smaller ones side by side; nucleoli are round
    spots in them, of which nucleolus_count says how many are seen.

    v[owner] spreads one number of each cell over the pixels that it owns. Returns in_nucleus and
    spots, (S, S) from 0 to 1; the places beside the nuclei, (n, 2), and all nuclei's centres.
    """
    centres, angle, normal = (cells[name] for name in ("centres", "angle", "normal"))
    double = (cells["binucleate"] < cell["binucleation"]).astype(np.float32)
    radius = cell["nucleus_radius"] * np.exp(.1 * normal[:, 2]) * (1 - .2 * double)
    squash = np.exp(cell["eccentricity"] * abs(normal[:, 3]))
    axes = [v[owner] for v in (angle, radius * squash, radius / squash)]
    towards = np.stack([np.sin(angle), np.cos(angle)], 1)                        # (n, 2)
    apart = (1.2 * double * radius)[:, None]
    lobes = [centres + sign * apart * towards for sign in (-1, 1)]
    in_nucleus = soft_step(1 - np.minimum(*(
        ellipse_distance(y, x, lobe[owner].transpose(2, 0, 1), *axes) for lobe in lobes)), .11)
    spots = np.zeros_like(in_nucleus)
    for k in range(5):
        place = centres + cells["nucleoli"][:, k] * .55 * radius[:, None]
        seen = cells["nucleolus_rank"][:, k] < cell["nucleolus_count"] / 5
        spots = np.maximum(spots, seen[owner] * blob(y, x, place[owner], cell["nucleolus_radius"]))
    beside = centres + 1.25 * (radius * np.sign(normal[:, 4]))[:, None] * towards[:, ::-1]
    return in_nucleus, spots, beside, np.concatenate([
        centres[double == 0], *(lobe[double == 1] for lobe in lobes)])


def draw_stains(cell, noise, d, second, inside, in_nucleus, spots, golgi):
    """What each stain shows, (C, S, S) in CHANNELS order, from white noise (5, S, S) and the masks
    and distances of the cells, (S, S) each."""
    patchy, strands, chromatin, reticulum, fibres = textures(
        noise, [1.5, cell["mito_granularity"], 1.6, 2.2, 2.5])
    fluid = inside * (1 - .8 * in_nucleus)
    # a cell ends at its outline, and where the two nearest cells are equally near
    border = np.exp(-(np.minimum(abs(1 - d), .8 * (second - d)) / .11) ** 2) * inside
    filament = np.exp(-(strands / .6) ** 2)  # the zero lines of a smooth random field

    def fade(spread):  # from the nucleus outwards
        return np.exp(-(d / spread) ** 2)

    return np.stack([
        cell["dna"] * in_nucleus * (1 + .1 * chromatin),
        cell["er"] * fluid * fade(cell["er_spread"]) * (1 + .15 * reticulum),
        cell["rna"] * inside * (1 - .4 * d.clip(0, 1)) + cell["nucleoli"] * spots * in_nucleus,
        cell["golgi"] * (golgi * (1 + .25 * patchy)) * fluid + cell["membrane"] * border
        + cell["actin"] * inside * (1 + .15 * fibres),
        cell["mito"] * fluid * fade(cell["mito_spread"]) * filament])


def soft_step(x, width):
    """A logistic step from 0 (x < 0) to 1 (x > 0)."""
    return 1 / (1 + np.exp((-x / width).clip(-30, 30)))


def blob(y, x, centre, sigma):
    """A Gaussian spot of height 1 around a centre (S, S, 2) that differs from pixel to pixel."""
    return np.exp(-((y - centre[..., 0]) ** 2 + (x - centre[..., 1]) ** 2) / (2 * sigma ** 2))


def ellipse_distance(y, x, centre, angle, long_axis, short_axis):
    """Distance from ellipses' centres, scaled so that it is 1 on their outlines.

    centre: (2, S, S), or (n, 2, 1, 1) for n ellipses at once; the axes in pixels, broadcastable.
    """
    dy, dx = y - centre[..., 0, :, :], x - centre[..., 1, :, :]
    cos, sin = np.cos(angle), np.sin(angle)
    # the quadratic form of the rotated ellipse: one pass over the pixels instead of a rotation
    xx = (cos / long_axis) ** 2 + (sin / short_axis) ** 2
    yy = (sin / long_axis) ** 2 + (cos / short_axis) ** 2
    xy = 2 * cos * sin * (1 / long_axis ** 2 - 1 / short_axis ** 2)
    return np.sqrt(xx * dx * dx + xy * dx * dy + yy * dy * dy)


def identities(rng, cell_density, size):
    """The random numbers behind the cells of one field (see draw_cells)."""
    side = size + 2 * MARGIN
    n = rng.poisson(CELLS_PER_PIXEL * side ** 2 * cell_density)
    return dict(centres=spread_out(rng.uniform(0, side, (n, 2)), 13, side).astype(np.float32),
                survival=rng.random(n),
                normal=rng.standard_normal((n, 5 + len(CHANNELS)), np.float32),
                angle=rng.uniform(0, np.pi, n).astype(np.float32), binucleate=rng.random(n),
                nucleoli=rng.uniform(-1, 1, (n, 5, 2)).astype(np.float32),
                nucleolus_rank=rng.permuted(np.tile(np.arange(5) / 5, (n, 1)), axis=1),
                noise=rng.standard_normal((7, side, side), np.float32))


def expose(stains, row, optics, noise_rng):
    """What the camera records: (C, S, S) stains to uint8 (C, size, size).

    Batch: gain, background and blur. Plate: a small gain. Edge wells: brighter cell rims (the
    membrane is in AGP). Site: the light falls off away from a point that depends on the site.
    """
    batches, plates = optics
    batch, side = batches[row["batch"]], stains.shape[-1]
    y, x = np.mgrid[-1:1:side * 1j, -1:1:side * 1j]
    towards = .35 * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])[(row["site"] - 1) % 4]
    light = 1 - .12 * ((y - towards[0]) ** 2 + (x - towards[1]) ** 2).astype(np.float32)
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
    relief = .9 * (np.roll(blurred, 1, 0) - np.roll(blurred, -1, 0))
    image = .45 + .35 * relief + .55 * (smooth(blurred, 2.) - blurred)
    image = image[MARGIN:-MARGIN, MARGIN:-MARGIN]
    image = image + noise_rng.normal(0, .004, image.shape)
    return np.round(image.clip(0, 1) * 255).astype(np.uint8)[None]


def draw_field(row, screen, optics, seed, counterpart=True):
    """Draw one row of a layout. seed: a list of integers; the same seed gives the same cells.

    Returns a dict: image (C, s, s), untreated (the same cells before treatment) and brightfield
    (1, s, s), all uint8, and the drawn truth (the `true_*` values of the row). Without
    `counterpart` the untreated cells are not drawn. Rows that share a number `cells` show the same
    cells from the same well, whatever was done to them and wherever they are photographed.
    """
    edge = row["row"] in (1, 16) or row["column"] in (1, 24)
    place = [row["cells"]] if "cells" in row else [row["row"], row["column"],
                                                   int(row["plate"][1:])]
    well = np.random.default_rng([screen.seed, screen.draw, 3, *place])
    density, well_effect = np.exp(well.normal(0, .12)) * (.75 if edge else 1.), well.normal(0, .08)
    cells = identities(np.random.default_rng(seed), density, screen.size)
    effect = min(1., row["true_effect"] * np.exp(well_effect))

    def photograph(strength):
        cell = treated_cell(row["true_mechanism"], strength)
        cell["membrane"] *= 1.5 if edge else 1.
        stains, height, nuclei = draw_cells(cell, cells, screen.size)
        camera_noise = np.random.default_rng([*seed, 1])
        image = expose(stains, row, optics, camera_noise)
        return image, phase_contrast(height, row, optics, camera_noise), cell, nuclei

    image, brightfield, cell, nuclei = photograph(effect)
    seen = ((nuclei >= 0) & (nuclei < screen.size)).all(1)
    truth = {"true_nuclei": int(seen.sum())} | {
        f"true_{k}": round(v, 4) for k, v in cell.items() if k != "cell_count"}
    return dict(image=image, untreated=photograph(0.)[0] if effect and counterpart else image,
                brightfield=brightfield, truth=truth)


def draw_numbered(i, row, screen, optics, counterpart):
    seed = [screen.seed, screen.draw, 4, row.get("cells", i)]
    return draw_field(row, screen, optics, seed, counterpart)


def draw_fields(rows, screen, counterpart=True):
    """Draw many rows on all cores, in order. Yields what draw_field returns."""
    draw = partial(draw_numbered, screen=screen, optics=microscope(screen), counterpart=counterpart)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from tqdm(pool.map(draw, range(len(rows)), rows, chunksize=64),
                        desc="drawing cells", unit="image", total=len(rows))


def simulate(out, screen=Screen()):
    """Draw a screen into folder `out`; returns the path of its manifest, which is written last."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = layout(screen)
    stacks = {name: np.lib.format.open_memmap(out / f"{name}.npy", "w+", np.uint8, (
        len(rows), channels, screen.size, screen.size)) for name, channels in (
            ("image", len(CHANNELS)), ("untreated", len(CHANNELS)), ("brightfield", 1))}
    for i, field in enumerate(draw_fields(rows, screen)):
        for name, stack in stacks.items():
            stack[i] = field[name]
        rows[i] = {"image": "image.npy", "index": i, **rows[i], "untreated": "untreated.npy",
                   "brightfield": "brightfield.npy", **field["truth"]}
    for stack in stacks.values():
        stack.flush()
    (out / "simulation.json").write_text(json.dumps(asdict(screen), indent=1))
    write_manifest(out / "manifest.csv", rows)
    return out / "manifest.csv"


def parse_smiles(text):
    """SMILES to an RDKit molecule, a ChemAxon tail (` |c:5|`) cut off; None if it is none."""
    words = text.split()
    return Chem.MolFromSmiles(words[0]) if words else None


def without_counter_ion(molecule):
    """Of a salt the largest part (of equal ones always the same): what acts on the cells."""
    parts = Chem.GetMolFrags(molecule, asMols=True)
    return max(parts, key=lambda part: (part.GetNumHeavyAtoms(), Chem.MolToSmiles(part))) \
        if len(parts) > 1 else molecule


def canonical(smiles):
    """Canonical SMILES, or None if it is no molecule."""
    molecule = parse_smiles(smiles)
    return Chem.MolToSmiles(molecule) if molecule else None


# --- 3. The manifest: one row per image -----------------------------------------------------------

@dataclass
class Manifest:
    """A data set: columns {name: list of strings}, one entry per image. Blank is unknown.

    files[i] lists the image files of row i: one per channel, or one file with all channels.
    """
    path: Path
    columns: dict
    channels: tuple
    files: list
    index: list      # place in a stack of images, or None
    sizes: dict      # {(H, W): "row 2"}, each size with the first row that has it

    def __len__(self):
        return len(self.files)

    def rows(self, chosen, column):
        """The values of a column in the chosen rows."""
        return [self.columns[column][i] for i in chosen]

    def sha1(self):
        """The hash of the file: a manifest that has changed is another data set."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha1").hexdigest()


class Files:
    """The files of each row, joined to the manifest's folder when they are asked for: a million
    rows need no second copy of their paths."""

    def __init__(self, folder, columns):
        self.folder, self.names, self.columns = folder, list(columns), list(columns.values())

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, i):
        return tuple(os.path.join(self.folder, c[i]) if c[i] else "" for c in self.columns)


def read_columns(path):
    """A CSV as {column: list of strings}, a million rows in seconds. A value that repeats is held
    once."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header, lines, seen = next(reader, []), without_blank_end(path, reader), {}
            twice = sorted({name for name in header if name and header.count(name) > 1})
            if twice:
                raise DataError(f"{path} has more than one column {', '.join(twice)}")
            columns = [[] for _ in header]
            while rows := list(islice(lines, 200)):  # few enough for the cache
                if set(map(len, rows)) != {len(header)}:
                    i, row = next((i, r) for i, r in enumerate(rows) if len(r) != len(header))
                    raise DataError(f"{path}, row {i + 2 + (len(columns[0]) if columns else 0)}: "
                                    f"{len(row)} values for {len(header)} columns")
                for column, values in zip(columns, zip(*rows)):
                    column.extend(values if len(set(values)) == len(values) else
                                  map(seen.setdefault, values, values))
    except (UnicodeDecodeError, csv.Error) as fault:
        raise DataError(f"{path} is no CSV file: {fault}") from None
    if not columns or not columns[0]:
        raise DataError(f"{path} has no rows")
    return dict(zip(header, columns))


def without_blank_end(path, lines):
    """The lines of a table. Empty ones may stand at its end, not in between, where the numbers of
    the rows after them would no longer be those of a spreadsheet."""
    blank = 0
    for number, line in enumerate(lines, 2):
        if line and blank:
            raise DataError(f"{path}, row {blank} is empty: remove the line")
        if line:
            yield line
        else:
            blank = blank or number


def read_manifest(path, channels=CHANNELS, column="image", check=10_000):
    """Read a manifest and check it; every fault is reported, each with its row and column.

    channels: the names of the stains, in file order. They are also the columns to look for; where
    they are absent, `column` names one file with all channels (("any",): as many as there are).
    check: up to this many distinct images are opened (header and length; pixels are decoded at
    first use), of more only that of the first row.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no manifest at {path}")
    columns = read_columns(path)
    missing = [c for c in channels if c not in columns]
    if column == "image" and (not missing or len(missing) < len(channels)
                              and "image" not in columns):
        if missing:
            raise DataError(f"{path} has no column {', '.join(missing)} (its channels are said by "
                            f"--channels; its columns are {', '.join(columns)})")
        names = {c: columns[c] for c in channels}
    elif column in columns:
        names = {column: columns[column]}
    else:
        raise DataError(f"{path} has no column {column}, nor the channels {', '.join(channels)}: "
                        f"its columns are {', '.join(columns)}")
    faults = [f"channel {c} is named twice" for c in sorted(set(channels)) if channels.count(c) > 1]
    index = columns.get("index", [""] * len(next(iter(names.values()))))
    faults += [f"row {i + 2}, column index: {value} is no place in a stack (0, 1, ...)"
               for i, value in enumerate(index) if value and not value.isdecimal()]
    if faults:
        raise DataError("\n".join(f"{path}, {fault}" for fault in faults[:20]))
    index = [int(v) if v else None for v in index]
    manifest = Manifest(path, columns, tuple(channels), Files(path.parent, names), index, {})
    distinct, many = set(), check * len(names)
    for name in chain(*names.values()):
        distinct.add(name)
        if len(distinct) > many:
            break
    check_files(manifest, range(len(manifest)) if len(distinct) <= many else [0])
    return manifest


def check_files(manifest, rows):
    """Open the files of these rows; DataError lists all that fail, at most twenty by name."""
    faults, headers = [], {}
    for i in tqdm(rows, desc="checking files", delay=3):
        files, shapes = manifest.files[i], set()
        for column, file in zip(manifest.files.names, files):
            try:
                if file not in headers:
                    headers[file] = None  # a damaged file is named once
                    headers[file] = read_header(file)
                if headers[file]:
                    shapes.add(image_shape(headers[file], file, manifest.index[i], manifest))
            except DataError as fault:
                faults.append(f"{manifest.path}, row {i + 2}, column {column}: {fault}")
        for shape in shapes:
            manifest.sizes.setdefault(shape, f"row {i + 2}")
        if len(shapes) > 1:
            faults.append(f"{manifest.path}, row {i + 2}: channels of different sizes, "
                          + ", ".join(f"{w}x{h}" for h, w in sorted(shapes)))
    if faults:
        more = [f"and {len(faults) - 20} more faults"] if len(faults) > 20 else []
        raise DataError("\n".join(faults[:20] + more))


def check_dtype(dtype, file):
    if dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise DataError(f"{file} holds {dtype}: uint8 and uint16 images can be read")


def image_shape(header, file, index, manifest):
    """(H, W) of one row, from a file's (shape, dtype)."""
    shape, dtype = header
    check_dtype(dtype, file)
    if index is not None:
        if not shape or index >= shape[0]:
            raise DataError(f"{file} has shape {shape}: index {index} is beyond it")
        shape = shape[1:]
    axis = channel_axis(shape, file, manifest)
    return tuple(n for i, n in enumerate(shape) if i != axis)


def channel_axis(shape, file, manifest):
    """Which axis holds the channels (None for a plain image); one channel per file, or all."""
    if len(shape) not in (2, 3) or 0 in shape:
        raise DataError(f"{file} has shape {shape}: an image has two axes, or three with channels")
    wanted = 1 if len(manifest.files[0]) > 1 else len(manifest.channels)
    axis = None if len(shape) == 2 else next(
        (a for a in (0, 2) if shape[a] == wanted), 0 if shape[0] < shape[2] else 2)
    found = 1 if axis is None else shape[axis]
    if found != wanted and manifest.channels != ("any",):
        raise DataError(f"{file} has {found} channels, {wanted} expected"
                        + (": name those of a file with --channels" if wanted > 1 else ""))
    return axis


# --- 4. Reading images ----------------------------------------------------------------------------

READ_FAULTS = (OSError, ValueError, EOFError, KeyError, IndexError, TypeError, SyntaxError,
               struct.error, zlib.error, zipfile.BadZipFile, tifffile.TiffFileError)


def read_header(file):
    """(shape, dtype) of an image file without decoding it. A missing, truncated or foreign file
    is a DataError that names it."""
    path = Path(file)
    if not path.is_file():
        raise DataError(f"no image file {file}" if file else "the image file is blank")
    with open(path, "rb") as opened:
        start = opened.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{file} is a Git LFS pointer, not an image: run git lfs pull")
    suffix = path.suffix.lower()
    if suffix not in HEADERS:
        raise DataError(f"{file}: a {suffix or 'nameless'} file is no image format read here "
                        f"({', '.join(HEADERS)})")
    try:
        return HEADERS[suffix](path)
    except READ_FAULTS as fault:
        raise DataError(f"{file} is damaged or no {suffix[1:]} file: {one_line(fault)}") from None


def one_line(fault):
    return " ".join(str(fault).split())[:120] or type(fault).__name__


def tiff_header(path):
    with tifffile.TiffFile(path) as tif:
        series = tif.series[0]  # pages one after the other are told of by the first of them alone
        ends = [o + n for page in tif.pages for o, n in zip(page.dataoffsets, page.databytecounts)]
        ends += [series.dataoffset + series.nbytes] if series.dataoffset is not None else []
        if max(ends) > path.stat().st_size:
            raise ValueError("the file ends before its pixels do")
        if tif.pages[0].compression != 1:
            read_tiff(path)  # some compressions cannot be read here: find out now
        return series.shape, series.dtype


def read_tiff(path):
    """Pixels of a TIFF; tifffile leaves LZW to a package of its own, Pillow brings it along."""
    with tifffile.TiffFile(path) as tif:
        if tif.pages[0].compression == 1:
            return tif.asarray()
        shape = tif.series[0].shape
    with Image.open(path) as image:
        return np.stack([np.array(frame) for frame in ImageSequence.Iterator(image)]).reshape(shape)


def open_png(path):
    """A PNG whose pixels are intensities, not places in a palette."""
    image = Image.open(path)
    if image.mode not in ("L", "I", "I;16", "RGB", "RGBA"):
        raise ValueError(f"mode {image.mode}, not grey or RGB")
    return image


def png_header(path):
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 12))
        if b"IEND" not in file.read():
            raise ValueError("the file ends before its pixels do")
    with open_png(path) as image:
        dtype = np.uint16 if image.mode.startswith("I") else np.uint8
        bands = len(image.getbands())
        return (image.height, image.width) + ((bands,) if bands > 1 else ()), np.dtype(dtype)


def npy_header(path):
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array.shape, array.dtype


def npz_header(path):
    with np.load(path, allow_pickle=False) as archive, \
            archive.zip.open(npz_key(archive) + ".npy") as file:
        read = {(1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0}[np.lib.format.read_magic(file)]
        shape, _, dtype = read(file)
        return shape, dtype


def npz_key(archive):
    """The array of an archive that is the image: `sample` (Hofmarcher et al. 2019) or the only one.
    Other entries may be pickles and are not touched."""
    names = archive.files
    if "sample" in names or len(names) == 1:
        return "sample" if "sample" in names else names[0]
    raise ValueError(f"which of the arrays {', '.join(names)} is the image? name it sample")


HEADERS = {".tif": tiff_header, ".tiff": tiff_header, ".png": png_header, ".npy": npy_header,
           ".npz": npz_header}


def read_file(file, index=None):
    """Decode one file: the array as stored, or image `index` of a stack."""
    suffix = Path(file).suffix.lower()
    try:
        if suffix in (".tif", ".tiff"):
            array = read_tiff(file)
        elif suffix == ".png":
            with open_png(file) as image:
                array = np.array(image)
            array = array.astype(np.uint16) if array.dtype == np.int32 else array
        elif suffix == ".npy":
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        else:
            with np.load(file, allow_pickle=False) as archive:
                array = archive[npz_key(archive)]
        return np.asarray(array if index is None else array[index])
    except READ_FAULTS as fault:
        raise DataError(f"{file} cannot be read: {one_line(fault)}") from None


class Pixels:
    """The images of a manifest, decoded at first use and kept in memory while they fit.

    pixels[i] is (C, H, W) float32 in the file's own units, after `binning` x `binning` averaging.
    pixels.many(rows) reads files by `workers` processes and goes on past those that are corrupt, up
    to the share `max_corrupt` of all images.
    """

    def __init__(self, manifest, binning=1, memory_gb=4., workers=1, max_corrupt=0.):
        self.manifest, self.binning, self.workers = manifest, binning, workers
        self.room, self.kept = memory_gb * 1e9, {}
        self.max_corrupt, self.corrupt = max_corrupt, {}  # {row: what is wrong with it}

    def __len__(self):
        return len(self.manifest)

    def __getitem__(self, i):
        return self.keep(i, self.kept[i] if i in self.kept else self.read(i))

    def keep(self, i, image):
        # a stack is mapped: the system keeps its pages
        if i not in self.kept and self.manifest.index[i] is None and image.nbytes <= self.room:
            self.room -= image.nbytes
            self.kept[i] = image
        return image.astype(np.float32)

    def many(self, rows):
        """Yields pixels[i] for each of the rows; None for an image that cannot be read, which is
        noted in `corrupt`. The same whatever the number of workers."""
        rows = [int(i) for i in rows]
        for start in range(0, len(rows), 4 * self.workers):
            part = rows[start:start + 4 * self.workers]
            found = {i: self.kept[i] for i in part if i in self.kept}
            new = [i for i in dict.fromkeys(part) if i not in found and i not in self.corrupt]
            found |= self.read_new(new)
            for i in part:
                yield None if i in self.corrupt else self.keep(i, found[i])

    def read_new(self, rows):
        """{row: image}; a fault goes to `corrupt`, too many of them are a DataError."""
        files = rows and self.manifest.index[rows[0]] is None
        try:
            if files and self.workers > 1:
                found = dict(zip(rows, self.readers.map(read_or_fault, rows)))
            else:
                found = {i: self.read_or_fault(i) for i in rows}
        except BrokenProcessPool:  # one was killed, for its memory or along with its group
            self.workers = 1
            return self.read_new(rows)
        self.corrupt |= {i: fault for i, fault in found.items() if isinstance(fault, str)}
        if len(self.corrupt) > self.max_corrupt * len(self):
            raise DataError(f"{next(iter(self.corrupt.values()))} ({len(self.corrupt)} of "
                            f"{len(self)} images cannot be read: more than {self.max_corrupt:.1%})")
        return found

    def read_or_fault(self, i):
        try:
            return self.read(i)
        except DataError as fault:
            return str(fault)

    @cached_property
    def readers(self):
        """The processes that read, started when they are needed first."""
        pool = ProcessPoolExecutor(self.workers, initializer=start_reader, initargs=(
            Pixels(self.manifest, self.binning), os.getpid()))
        weakref.finalize(self, pool.shutdown)  # or Python, at its own end, may trip over the pool
        return pool

    def report(self):
        """Say which images were left out because they cannot be read."""
        faults = list(self.corrupt.values())
        if faults:
            print(f"{len(faults)} of {len(self)} images cannot be read and were left out:\n  "
                  + "\n  ".join(faults[:5]) + ("\n  ..." if len(faults) > 5 else ""))

    def read(self, i):
        m = self.manifest
        planes = []
        for column, file in zip(m.files.names, m.files[i]):
            try:
                array = read_file(file, m.index[i])
                check_dtype(array.dtype, file)
                axis = channel_axis(array.shape, file, m)
            except DataError as fault:
                raise DataError(f"{m.path}, row {i + 2}, column {column}: {fault}") from None
            planes.append(array[None] if axis is None else np.moveaxis(array, axis, 0))
        if len({p.shape[1:] for p in planes}) > 1:
            raise DataError(f"{m.path}, row {i + 2}: channels of different sizes")
        return bin_pixels(np.concatenate(planes), self.binning)

    def dtype_range(self, i):
        """The largest value of the file's number type: 255 or 65535."""
        m = self.manifest
        return float(np.iinfo(read_file(m.files[i][0], m.index[i]).dtype).max)


def start_reader(pixels, parent):
    """In a process that reads: Ctrl-C is for the parent, and the end of the parent is its own."""
    global _reader
    _reader = pixels
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end_with_parent():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def read_or_fault(i):
    return _reader.read_or_fault(i)


def bin_pixels(image, n):
    """Average n x n pixels of (C, H, W); a rest at the right and lower border is cut off."""
    if n == 1:
        return image
    c, h, w = image.shape
    cut = image[:, :h // n * n, :w // n * n].astype(np.float32)
    return cut.reshape(c, h // n, n, w // n, n).mean((2, 4))


# --- 5. Intensities, crops and splits -------------------------------------------------------------

def fit_intensity(rule, pixels, rows, seed=0):
    """How intensities become [-1, 1]: {"rule", "low": [C], "high": [C]}, kept in checkpoints.

    rule: "percentile" (0.1 and 99.9 % of each channel over at most 400 training images), "dtype"
    (0 to 255 or 65535), or a stated range such as "0:4095".
    """
    n = len(pixels.manifest.channels)
    if rule == "percentile":
        some = np.random.default_rng(seed).permutation(rows)[:400]
        # every 7th pixel is plenty for a percentile, and plates fit in memory
        images = [image.reshape(n, -1)[:, ::7] for image in tqdm(
            pixels.many(some), desc="measuring intensities", total=len(some), delay=3)
            if image is not None]
        if not images:
            raise DataError(f"{pixels.manifest.path}: none of {len(some)} images can be read")
        values = np.concatenate(images, 1)
        low, high = np.percentile(values, (.1, 99.9), axis=1)
    elif rule == "dtype":
        low, high = np.zeros(n), np.full(n, pixels.dtype_range(rows[0]))
    else:
        try:
            low, high = (np.full(n, float(v)) for v in rule.split(":"))
            assert (low < high).all()
        except (ValueError, AssertionError):
            raise DataError(f"--intensity {rule}: percentile, dtype, or a range such as 0:4095"
                            ) from None
    if (high <= low).any():
        empty = [c for c, a, b in zip(pixels.manifest.channels, low, high) if b <= a]
        raise DataError(f"channel {', '.join(empty)} has no contrast: every pixel is the same")
    return dict(rule=rule, low=[float(v) for v in low], high=[float(v) for v in high])


def scale_intensity(image, intensity):
    """(..., C, H, W) in file units to [-1, 1], clipped."""
    low, high = (np.array(intensity[k], np.float32)[:, None, None] for k in ("low", "high"))
    return ((image - low) / (high - low)).clip(0, 1) * 2 - 1


def take_view(image, crop, rng=None, flips=True):
    """A view of (C, H, W): a crop x crop piece (0: the whole) at random, flipped and turned by
    quarters; without `rng` the piece in the middle, as it stands."""
    h, w = image.shape[1:]
    size_h, size_w = crop or h, crop or w
    if min(h, w) < crop:
        raise DataError(f"an image is {w}x{h}, smaller than the crop of {crop}")
    y, x = (h - size_h) // 2, (w - size_w) // 2
    if rng is not None:
        y, x = rng.integers(h - size_h + 1), rng.integers(w - size_w + 1)
    view = image[:, y:y + size_h, x:x + size_w]
    if rng is None or not flips:
        return view
    view = np.rot90(view, rng.integers(4) if size_h == size_w else 2 * rng.integers(2), (1, 2))
    return view[:, :, ::-1] if rng.random() < .5 else view


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
    """A photograph (C, H, W) in [-1, 1] from the plate of style `own` as that of style `other`
    would show it (styles: from plate_style).

    Every frequency is scaled by sqrt(P_other / P_own), 1/8 to 8. For stationary Gaussian textures
    this is the map that carries one to the other at the least cost (Xia et al. 2014, SIAM J.
    Imaging Sciences 7). It moves what is linear and alike everywhere: gain, background and blur.
    Shading, and batches whose cells themselves differ, it does not move.
    """
    (own_mean, own_power), (other_mean, other_power) = own, other
    scale = np.sqrt((other_power + 1e-6) / (own_power + 1e-6)).clip(1 / 8, 8)
    moved = np.fft.irfft2(np.fft.rfft2(image - own_mean) * scale, s=image.shape[1:])
    return (moved + other_mean).clip(-1, 1).astype(np.float32)


def split_rows(manifest, how="auto", fraction=.1, seed=0):
    """Rows for training and rows held out: two arrays of row numbers.

    how: "auto" (the column `split` where there is one: train and val; else by image), "image",
    "smiles" (by molecule: SMILES that name one molecule stay together), any column ("plate"), two
    joined ("compound+plate"), or stated values ("plate=SQ00015233", "compound+plate=DMSO+P01").
    """
    columns = manifest.columns
    if how == "auto" and "split" in columns:
        label = np.array(columns["split"])
        if not {"train", "val"} <= set(label):
            raise DataError(f"{manifest.path}, column split: it must name rows train and val "
                            "(others are left for tests), or choose another --split")
        return np.flatnonzero(label == "train"), np.flatnonzero(label == "val")
    name, _, wanted = how.partition("=")
    if how in ("auto", "image"):
        keys = np.arange(len(manifest)).astype(str)
    else:
        keys = np.array(joined_keys(manifest, name.split("+"), how))
    distinct = np.unique(keys)
    if wanted:
        names = name.split("+")
        parts = wanted.rsplit("+", len(names) - 1)  # a molecule, which may hold a +, comes first
        chosen = ["+".join(molecule_key(part) if column.lower() == "smiles" else part
                           for column, part in zip(names, parts))]
        if chosen[0] not in distinct:
            raise DataError(f"--split {how}: no row has it; there are {', '.join(distinct[:20])}")
    else:
        order = sorted(distinct, key=lambda v: hashlib.sha1(f"{seed}/{v}".encode()).hexdigest())
        chosen = order[:max(1, round(fraction * len(distinct)))]
    held = np.isin(keys, chosen)
    if held.all():
        raise DataError(f"--split {how}: nothing is left to train on")
    return np.flatnonzero(~held), np.flatnonzero(held)


def joined_keys(manifest, names, how):
    """The values of these columns in each row, joined by +; molecules by what they are."""
    missing = [name for name in names if name not in manifest.columns]
    if missing:
        raise DataError(f"--split {how}: {manifest.path} has no column {', '.join(missing)}")
    columns = [map(molecule_key, manifest.columns[name]) if name.lower() == "smiles"
               else manifest.columns[name] for name in names]
    return ["+".join(values) for values in zip(*columns)]


@cache
def molecule_key(smiles):
    """One string for one molecule, however it is written and whatever its counter-ion: its
    InChIKey but for the last letter, which tells of protons; or the text itself."""
    molecule = parse_smiles(smiles)
    return Chem.MolToInchiKey(without_counter_ion(molecule))[:-2] if molecule else smiles


# --- 6. Published data sets, as manifests ---------------------------------------------------------

def read_table(path, needed=()):
    """A published table (.csv, or .txt with tabs; .gz of either) as a list of {column: text}."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no table at {path}")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", newline="", encoding="utf-8-sig") as file:
            tabs = ".txt" in path.suffixes or ".tsv" in path.suffixes
            reader = csv.DictReader(file, delimiter="\t" if tabs else ",")
            rows = [{k: (v or "").strip() for k, v in row.items() if k} for row in reader]
    except (UnicodeDecodeError, csv.Error, OSError, EOFError, zlib.error) as fault:
        raise DataError(f"{path} is no table: {one_line(fault)}") from None
    missing = [name for name in needed if name not in (reader.fieldnames or [])]
    if missing or not rows:
        raise DataError(f"{path} has no " + (f"column {', '.join(missing)}" if missing else "rows"))
    return rows


def write_manifest(out, rows):
    """Rows {column: text} as a manifest, under a temporary name first; a file that is there is not
    written over."""
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists: choose another --out or remove it")
    if not rows:
        raise DataError(f"no image of these tables was found: {out} is not written")
    names = list(dict.fromkeys(name for row in rows for name in row))
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".tmp"), "w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(out.with_suffix(".tmp"), out)


def place(well):
    """{row, column} of a well, counted from 1: C05 is row 3, column 5."""
    found = re.fullmatch(r"([A-P]|A[A-F])(\d\d?)", well.upper())
    if not found:
        return {"row": "", "column": ""}
    row = 26 * (len(found[1]) - 1) + ord(found[1][-1]) - ord("A") + 1
    return {"row": str(row), "column": str(int(found[2]))}


def plate_maps(folder):
    """Bray's plate maps, {(plate, well): {dose, role}}: mmoles_per_liter of the *stock*, and
    DMSO wells (no compound) as controls at dose 0."""
    folder = Path(folder)
    found, maps = {}, {}
    for entry in read_table(folder / "barcode_platemap.csv",
                            ["Plate_Map_Name", "Assay_Plate_Barcode"]):
        name = entry["Plate_Map_Name"]
        if name not in maps:
            maps[name] = read_table(folder / "platemap" / f"{name}.txt", [
                "well_position", "broad_sample", "mmoles_per_liter"])
        for well in maps[name]:
            control = well["broad_sample"] in ("", "DMSO")
            found[entry["Assay_Plate_Barcode"], well["well_position"].upper()] = {
                "dose": "0" if control else well["mmoles_per_liter"],
                "role": "control" if control else "treated"}
    return found


MOL2IMAGE = ("SAMPLE_KEY", "BROAD_ID", "PLATE_ID", "WELL_POSITION", "SITE", "SMILES", "INCHIKEY")


def mol2image(images, splits, out, platemaps=None, val=.02):
    """The download of Hofmarcher et al. 2019 under Mol2Image's split tables, as a manifest.

    images: its folder, searched for {PLATE}-{WELL}-{SITE}.npz; listed files that are missing are
    counted and left out. The column `split` is each table's name (train, test_easy, test_hard ...);
    a share `val` of the training images is named val. Cell counts, an outcome, are not taken over.
    """
    files = {path.stem.upper(): path for path in Path(images).rglob("*.npz")}
    wells = plate_maps(platemaps) if platemaps else {}
    rows, missing, parts = {}, [], defaultdict(set)
    for table in splits:
        split = Path(table).name.partition(".")[0].removeprefix("datasplit_gen_")
        for entry in read_table(table, MOL2IMAGE):
            key, well = entry["SAMPLE_KEY"].upper(), entry["WELL_POSITION"]
            parts[split].add(entry["INCHIKEY"])
            if key not in files:
                missing.append(entry["SAMPLE_KEY"])
                continue
            share = int(hashlib.sha1(key.encode()).hexdigest()[:8], 16) / 16 ** 8
            name = "val" if split == "train" and share < val else split
            rows.setdefault((key, name), {
                "image": os.path.relpath(files[key], Path(out).parent),
                "compound": entry["BROAD_ID"], "smiles": entry["SMILES"],
                "inchikey": entry["INCHIKEY"], "plate": entry["PLATE_ID"], "well": well,
                "site": entry["SITE"], **place(well), "split": name,
                **wells.get((entry["PLATE_ID"], well.upper()), {})})
    write_manifest(out, list(rows.values()))
    print(f"wrote {out}: {len(rows)} images, " + ", ".join(
        f"{name} {count}" for name, count in Counter(name for _, name in rows).items()))
    if missing:
        print(f"{len(missing)} listed images are not in {images}: {', '.join(missing[:5])}"
              + (" ..." if len(missing) > 5 else ""))
    for hard in [name for name in parts if "hard" in name]:
        both = parts[hard] & parts.get("train", set())
        if both:
            print(f"warning: {len(both)} molecules of {hard} are in train as well (by InChIKey), "
                  f"such as {min(both)}")
    print("its channels, for every command: --channels Mito,ER,RNA,AGP,DNA")


def plain_name(column):
    return column.removeprefix("Metadata_").lower()


def load_data(tables, out, joins=(), root=None):
    """CellProfiler's LoadData tables (the form of JUMP, LINCS and Bray) as a manifest.

    FileName_OrigX and PathName_OrigX become channel X; Metadata_Y becomes y. joins: "TABLE:a,b",
    tables of wells, plates or compounds joined on the named columns; what does not match stays
    blank. root: "PUBLISHED=MINE", the start of the published paths and what it is here.
    """
    published, _, mine = (root or "").partition("=")
    rows = []
    for table in tables:
        entries = read_table(table)
        stains = {c: re.sub("^FileName_(Orig)?", "", c) for c in entries[0]
                  if c.startswith("FileName_") and "Illum" not in c}
        if not stains:
            raise DataError(f"{table} has no column FileName_...: is it a LoadData table?")
        for entry in entries:
            row = {}
            for column, stain in stains.items():
                folder = entry.get(column.replace("FileName_", "PathName_"), "")
                if published and folder.startswith(published):
                    folder = mine + folder[len(published):]
                folder = Path(table).parent / folder  # an absolute path stays as it is
                row[stain] = os.path.relpath(folder / entry[column], Path(out).parent)
            row |= {plain_name(k): v for k, v in entry.items() if k.startswith("Metadata_")}
            rows.append(row | (place(row["well"]) if "well" in row else {}))
    for join in joins:
        join_table(rows, join)
    write_manifest(out, rows)
    print(f"wrote {out}: {len(rows)} images, channels {', '.join(stains.values())}, columns "
          + ", ".join(c for c in rows[0] if c not in stains.values()))


def join_table(rows, join):
    """Fill rows with the columns of one --join, where its named columns agree."""
    path, _, names = join.rpartition(":")
    if not path:
        raise DataError(f"--join {join}: write TABLE:COLUMN or TABLE:COLUMN,COLUMN")
    on = names.lower().split(",")
    entries = [{plain_name(k): v for k, v in entry.items()} for entry in read_table(path)]
    absent = [n for n in on if n not in rows[0] or n not in entries[0]]
    if absent:
        raise DataError(f"--join {join}: no column {', '.join(absent)} in both tables; there are "
                        f"{', '.join(rows[0])} and {', '.join(entries[0])}")
    key = itemgetter(*on)
    needed, found, missed = set(map(key, rows)), {}, 0
    for entry in entries:
        if key(entry) in needed and found.setdefault(key(entry), entry) != entry:
            raise DataError(f"{path} has two different rows for "
                            + ", ".join(f"{n} {entry[n]}" for n in on))
    for row in rows:
        entry = found.get(key(row))
        missed += entry is None
        row.update({n: entry[n] if entry else "" for n in entries[0]
                    if n not in on and not row.get(n)})
    print(f"{path}: {len(rows) - missed} of {len(rows)} images matched on {', '.join(on)}")


# --- 7. Pictures ----------------------------------------------------------------------------------

def colours_of(channels):
    """A colour (R, G, B) for each stain; those that are not the simulator's lie round the circle of
    hues, by their place."""
    return np.array([COLOURS.get(c, colorsys.hsv_to_rgb(i / len(channels), .9, 1))
                     for i, c in enumerate(channels)])


def composite(image, channels):
    """(C, H, W) in [-1, 1] to RGB (H, W, 3) in [0, 1]: each stain in its colour, added up."""
    unit = (np.asarray(image, np.float32) + 1) / 2
    return np.einsum("chw,ck->hwk", unit, colours_of(channels)).clip(0, 1)


@contextmanager
def figure(path, *shape, layout=None, **options):
    """with figure(path, ...) as axes: as plt.subplots, written to the file at the end."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(*shape, **options)
    yield axes
    fig.tight_layout(**layout or {})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110, bbox_inches="tight", pad_inches=.05)  # no label is cut
    plt.close(fig)


def picture(path, rows, channels, row_labels=(), column_labels=(), pixel_um=None, title=""):
    """Draw a grid as PNG. rows: list of lists of images, (C, H, W) in [-1, 1] shown in composite
    colour with a legend, or (H, W) in [-1, 1] shown in grey; None leaves a place empty."""
    n, side = max(len(r) for r in rows), 1.15
    layout = dict(pad=.3, rect=(0, .03, 1, .96 if title else 1))
    with figure(path, len(rows), n, figsize=(side * n + 1.1, side * len(rows) + .8),
                squeeze=False, layout=layout) as axes:
        fig = axes[0, 0].figure
        for i, row in enumerate(rows):
            for j, axis in enumerate(axes[i]):
                axis.set_xticks([]), axis.set_yticks([])
                axis.spines[:].set_visible(False)
                if j < len(row) and row[j] is not None:
                    image = np.asarray(row[j])
                    axis.imshow(composite(image, channels) if image.ndim == 3 else (image + 1) / 2,
                                cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                if i == 0 and j < len(column_labels):
                    axis.set_title(column_labels[j], fontsize=7)
            if i < len(row_labels):
                axes[i, 0].set_ylabel(row_labels[i], fontsize=7, rotation=0, ha="right",
                                      va="center")
        if pixel_um:  # a bar of a round number of micrometres, about a third of the width
            height, width = np.asarray(next(im for im in rows[0] if im is not None)).shape[-2:]
            length = max((v for v in (1, 2, 5, 10, 20, 50, 100, 200) if v < .5 * width * pixel_um),
                         default=round(.3 * width * pixel_um, 3))
            y, first = .94 * height, next((a for a in axes[-1] if a.images), axes[-1, 0])
            first.plot([3, 3 + length / pixel_um], [y, y], "w", lw=2)
            first.text(3, y - 3, f"{length} µm", color="w", fontsize=6, va="bottom")
        if any(np.asarray(im).ndim == 3 for row in rows for im in row if im is not None):
            for k, (name, colour) in enumerate(zip(channels, colours_of(channels))):
                fig.text((.1 + .6 * k) / fig.get_figwidth(), .005, name, color=colour, fontsize=8,
                         weight="bold", bbox=dict(facecolor="black", pad=1.5, lw=0))   # in inches
        fig.suptitle(title, fontsize=8)


# --- 8. Commands ----------------------------------------------------------------------------------

def by_value(text):
    """The key that sorts numbers by size, before other words."""
    try:
        return 0, float(text), ""
    except ValueError:
        return 1, 0., text


def is_dose(text):
    kind, number, _ = by_value(text)
    return kind == 0 and 0 <= number < np.inf


def show(manifest_path, channels=CHANNELS, out=None):
    """Check every file and value, print a summary of each column and of the images' sizes and
    values, and draw a contact sheet.

    Faults are listed after the summary (DataError).
    """
    if out and Path(out).suffix.lower() not in (".png", ".jpg", ".jpeg", ".tif", ".pdf", ".svg"):
        raise DataError(f"--out {out}: name a picture, such as sheet.png")
    manifest = read_manifest(manifest_path, channels, check=0)
    print(f"{manifest.path}: {len(manifest)} images, channels {', '.join(channels)}")
    for name, values in manifest.columns.items():
        print(f"  {name:26s} {values.count(''):6d} blank   {summary(values)}")
    faults = [f"{manifest.path}, row {i + 2}, column smiles: {v} is no valid SMILES"
              for i, v in enumerate(manifest.columns.get("smiles", [])) if v and not canonical(v)]
    faults += [f"{manifest.path}, row {i + 2}, column {name}: {v} is not a number of at least 0"
               for name, values in manifest.columns.items()
               if name.lower().startswith(("dose", "conc")) and any(is_dose(v) for v in values)
               for i, v in enumerate(values) if v and not is_dose(v)]
    try:
        check_files(manifest, range(len(manifest)))
    except DataError as fault:
        faults += str(fault).splitlines()
    pixels = Pixels(manifest, memory_gb=0., workers=os.cpu_count(), max_corrupt=1.)
    faults = faults or read_all(pixels)  # headers are sound: decode every image
    if faults:
        raise DataError("\n".join(faults))
    some = np.sort(np.random.default_rng(0).permutation(len(manifest))[:24])
    crop = min(256, *(min(pixels[i].shape[1:]) for i in some))
    intensity = fit_intensity("percentile", pixels, some)
    views = [scale_intensity(take_view(pixels[i], crop), intensity) for i in some]
    out = out or Path("runs") / f"{manifest.path.parent.name}_contact_sheet.png"
    picture(out, [views[k:k + 8] for k in range(0, len(views), 8)], channels,
            [f"rows {part[0] + 2}\nto {part[-1] + 2}" for part in np.split(
                some, range(8, len(some), 8))],
            title=f"{manifest.path}: {len(some)} of {len(manifest)} images")
    print(f"no faults; contact sheet: {out}")


def summary(values):
    """The values of a column in one line: each with its count, or the first and the last."""
    count = Counter(v for v in values if v != "")
    ordered = sorted(count, key=by_value)
    if len(count) <= 8:
        return ", ".join(f"{v} ({count[v]})" for v in ordered)
    return f"{len(count)} distinct, {ordered[0][:30]} to {ordered[-1][:30]}"


def read_all(pixels):
    """Decode every image, say how large they are and which values each channel takes, and warn of
    those that are zero everywhere. Returns at most 20 faults."""
    n, sizes, blank = len(pixels), Counter(), []
    low, high = np.inf, 0
    for i, image in enumerate(tqdm(pixels.many(range(n)), desc="reading images", total=n, delay=3)):
        if image is not None:
            sizes[f"{image.shape[2]} x {image.shape[1]}"] += 1
            low, high = np.minimum(low, image.min((1, 2))), np.maximum(high, image.max((1, 2)))
            if not image.any():
                blank.append(i + 2)
    for size, count in sizes.most_common(8):
        print(f"  {count} images of {size} pixels")
    if len(sizes) > 8:
        print(f"  {len(sizes) - 8} more sizes")
    if sizes:
        print("  values " + ", ".join(f"{name} {a:g} to {b:g}" for name, a, b in zip(
            pixels.manifest.channels, low, high)))
    if blank:
        print(f"warning: {len(blank)} of {n} images are zero everywhere: row "
              + ", ".join(map(str, blank[:10])) + (" ..." if len(blank) > 10 else ""))
    return list(pixels.corrupt.values())[:20]


def draw_mechanisms(path="runs/mechanisms.png", effect=.9):
    """The same cells untreated and under each mechanism: composite, channels, brightfield."""
    screen = Screen()
    rows, names = [], ["none", *MECHANISMS]
    for mechanism in names:
        row = dict(row=5, column=5, site=1, batch="B1", plate="P01", true_mechanism=mechanism,
                   true_effect=effect if mechanism != "none" else 0.)
        field = draw_field(row, screen, microscope(screen), [3], counterpart=False)
        image = ((field["image"] / 127.5 - 1) * 1.4 + .4).clip(-1, 1)  # brighter, for the eye
        rows.append([image, *image, field["brightfield"][0] / 127.5 - 1])
    picture(path, rows, CHANNELS, names, ["all", *CHANNELS, "brightfield"], 1.2)
    print(f"wrote {path}")


def main():
    defaults = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    draw = commands.add_parser("simulate", help="draw a data set with its manifest", **defaults)
    draw.add_argument("--out", default="runs/data", help="folder for images and manifest.csv")
    notes = comments(Screen)
    for name, value in asdict(Screen()).items():
        draw.add_argument(f"--{name}", type=type(value), default=value, help=notes[name])
    sheet = commands.add_parser("show", help="check a manifest, summarise it, draw a contact sheet",
                                **defaults)
    sheet.add_argument("manifest", help="the CSV")
    sheet.add_argument("--channels", default=",".join(CHANNELS), help="stains, in file order")
    sheet.add_argument("--out", default=None, help="the picture")
    bray = commands.add_parser("mol2image", help="the manifest of Mol2Image's data set and splits",
                               **defaults)
    bray.add_argument("images", help="folder with {PLATE}-{WELL}-{SITE}.npz, searched through")
    bray.add_argument("splits", nargs="+", help="its tables, datasplit_gen_*.csv")
    bray.add_argument("--platemaps", default=None, help="Bray's plate maps, for dose and role: a "
                      "folder with barcode_platemap.csv and platemap/")
    bray.add_argument("--val", type=float, default=.02, help="share of train that is named val")
    tables = commands.add_parser("load_data", help="a manifest from CellProfiler's LoadData tables",
                                 **defaults)
    tables.add_argument("tables", nargs="+", help="load_data.csv of each plate")
    tables.add_argument("--join", nargs="+", default=[], metavar="TABLE:COLUMNS", help="tables of "
                        "wells, plates, compounds, such as well.csv.gz:plate,well")
    tables.add_argument("--root", default=None, metavar="PUBLISHED=MINE", help="the start of the "
                        "published paths, and what it is here")
    for made in (bray, tables):
        made.add_argument("--out", default="manifest.csv", help="the manifest")
    parser.epilog = "\n".join(p.format_help() for p in (draw, sheet, bray, tables))
    args = vars(parser.parse_args())
    command = args.pop("command")
    try:
        if command is None:
            draw_mechanisms()
        elif command == "simulate":
            out = args.pop("out")
            if (Path(out) / "manifest.csv").exists():
                raise DataError(f"{out}/manifest.csv exists: choose another --out or remove it")
            print(simulate(out, Screen(**args)))
        elif command == "mol2image":
            mol2image(args["images"], args["splits"], args["out"], args["platemaps"], args["val"])
        elif command == "load_data":
            load_data(args["tables"], args["out"], args["join"], args["root"])
        else:
            show(args["manifest"], tuple(args["channels"].split(",")), args["out"])
    except (DataError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
