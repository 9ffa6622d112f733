"""Treated images as another plate would show them: the map, and what training is told of it."""
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import data
import train_ldm


def filtered(noise, sigma, gain, level):
    """White noise (..., H, W) under a microscope: blurred, amplified, on a background."""
    return (gain * data.smooth(noise, sigma) + level).astype(np.float32)


def test_restaining_moves_gain_background_and_blur():
    noise = np.random.default_rng(0).standard_normal((40, 1, 64, 64), np.float32)
    sharp, dull = filtered(noise, .6, .2, -.3), filtered(noise, 1.1, .5, .2)
    sharp_style, dull_style = data.plate_style(sharp[:32]), data.plate_style(dull[:32])
    for own, other, image, wanted in ((sharp_style, dull_style, sharp[32], dull[32]),
                                      (dull_style, sharp_style, dull[32], sharp[32])):
        before = np.square(image - wanted).mean()
        after = np.square(data.restain(image, own, other) - wanted).mean()
        assert after < .01 * before, (before, after)
    assert_close(data.restain(sharp[33], sharp_style, sharp_style), sharp[33], atol=1e-5, rtol=0)


def test_a_flat_channel_is_no_division_by_zero():
    flat = np.zeros((4, 1, 8, 8), np.float32)
    noisy = np.random.default_rng(0).normal(0, .1, (4, 1, 8, 8)).astype(np.float32)
    assert np.isfinite(data.restain(flat[0], data.plate_style(flat), data.plate_style(noisy))).all()


def photographs(screen, rows):
    images = np.stack([f["image"] for f in data.draw_fields(rows, screen, counterpart=False)])
    return images.astype(np.float32) / 127.5 - 1


def test_a_treated_cell_is_shown_as_the_other_batch_would():
    """The same treated cells photographed on both plates; the styles are of other cells."""
    screen = data.Screen()
    layout = data.layout(screen)
    styles, shown = {}, {}
    treated = next(r for r in layout if r["true_mechanism"] == "er_stress"
                   and r["true_effect"] > .9)
    for plate, batch in (("P01", "B1"), ("P07", "B4")):
        controls = [r for r in layout if r["plate"] == plate and r["role"] == "control"]
        styles[plate] = data.plate_style(photographs(screen, controls[:48]))
        shown[plate] = photographs(screen, [treated | {"plate": plate, "batch": batch, "cells": k}
                                            for k in range(6)])
    untouched = np.square(shown["P01"] - shown["P07"]).mean()
    moved = [data.restain(x, styles["P01"], styles["P07"]) for x in shown["P01"]]
    assert np.square(moved - shown["P07"]).mean() < .1 * untouched


@pytest.fixture(scope="module")
def prepared(ldm_config, tmp_path_factory):
    return train_ldm.prepare(replace(ldm_config, restain=.75, views=2, balance=1.,
                                     out=str(tmp_path_factory.mktemp("restained"))))


def told(side, fields, name):
    """The values of a category field that a side is told, by row."""
    vocabulary = next(f for f in fields if f.name == name).vocabulary
    codes = side.codes[name].cpu().numpy().astype(int).reshape(len(side.rows), -1)[:, 0]
    return vocabulary, codes


def test_restained_rows_are_treated_told_the_other_plate_and_drawn_by_their_share(prepared):
    side, plain = prepared.sides["training"], len(prepared.train)
    columns = prepared.manifest.columns
    roles = np.array([columns["role"][i] for i in side.rows])
    assert set(roles[plain:]) == {"treated"}
    assert len(side.rows) - plain == (roles[:plain] == "treated").sum()
    batch_of = dict(zip(columns["plate"], columns["batch"]))
    plates, batches = (told(side, prepared.fields, name) for name in ("plate", "batch"))
    # a vocabulary's codes may be shifted by an entry for what is unknown: learn them from rows
    name_of = {what: {codes[k]: columns[what][side.rows[k]] for k in range(plain)}
               for what, (_, codes) in (("plate", plates), ("batch", batches))}
    for k in range(len(side.rows)):
        plate, batch = (name_of[w][codes[k]] for w, (_, codes) in (("plate", plates),
                                                                    ("batch", batches)))
        assert batch == batch_of[plate]
        assert (plate == columns["plate"][side.rows[k]]) == (k < plain)
    assert len({name_of["plate"][c] for c in plates[1][plain:]}) == 6   # every plate of the screen
    treated = (roles == "treated")
    assert_close(side.share.sum(), 1.)
    assert_close(side.share[plain:].sum() / side.share[treated].sum(), .75)
    balanced = train_ldm.pair_shares(prepared.fields, prepared.manifest, prepared.train, 1.)
    assert_close(side.share[:plain][roles[:plain] == "control"],
                 balanced[roles[:plain] == "control"])


def test_restained_latents_are_restained_images_encoded(prepared):
    side, plain = prepared.sides["training"], len(prepared.train)
    intensity = prepared.constant["vae"]["intensity"]
    views = [x for x, _ in train_ldm.batches_of_views(prepared.pixels, side.rows,
                                                      prepared.settings, intensity, 2)]
    views = torch.cat(views)
    restained = train_ldm.Restained(prepared, prepared.train, .75)
    for k in (0, 5, len(restained.rows) - 1):
        own, other = restained.moves[k]
        assert own != other
        image = views[2 * (plain + k) + 1].numpy()
        moved = data.restain(image, restained.styles[own], restained.styles[other])
        mean, _ = prepared.vae.encode(torch.from_numpy(moved)[None])
        cached = torch.from_numpy(np.array(side.cache[2 * (plain + k) + 1, 0], np.float32))
        assert_close(cached, mean[0], atol=.1, rtol=.1)
        assert (mean[0] - prepared.vae.encode(torch.from_numpy(image)[None])[0]).abs().max() > .1


def test_a_model_is_trained_with_restained_images(ldm_config, tmp_path, cli):
    status, out, error = cli(train_ldm, "--data", ldm_config.data, "--vae", ldm_config.vae,
                             "--size", "tiny", "--views", 1, "--batch", 8, "--steps", 2,
                             "--restain", .5, "--out", tmp_path)
    assert status == 0, error
    assert "and restained ones" in out
    assert "no treatment lies on two plates" in out  # of this screen: every well has its own
    # later, without: other settings than the finished model's
    status, _, error = cli(train_ldm, "--data", ldm_config.data, "--vae", ldm_config.vae,
                           "--size", "tiny", "--views", 1, "--batch", 8, "--steps", 2,
                           "--out", tmp_path)
    assert status == 2 and "restain was 0.5" in error


def test_whether_it_suits_the_plates_is_told(capsys, monkeypatch):
    """Two plates of known optics: 16 negative controls and 4 wells of one treatment on each."""
    optics = {"sharp": (.6, .2, -.3), "dull": (1.1, .5, .2)}
    plate, dose = ["sharp", "dull"] * 20, ["0"] * 32 + ["3"] * 8
    columns = {"plate": plate, "dose": dose}
    noise = np.random.default_rng(0).standard_normal((40, 1, 64, 64), np.float32)
    monkeypatch.setattr(train_ldm, "views", lambda pixels, rows, *_: torch.from_numpy(
        np.stack([filtered(noise[i], *optics[plate[i]]) for i in rows])))
    p = SimpleNamespace(
        pixels=None, settings=None, constant={"vae": {"intensity": None}},
        fields=[SimpleNamespace(name="dose", kind="log", group="biology"),
                SimpleNamespace(name="plate", kind="category", group="experiment")],
        manifest=SimpleNamespace(columns=columns, rows=lambda rows, c: [columns[c][i] for i in rows]))

    def told(rows):
        train_ldm.Restained(p, np.array(rows), .5).report(p)
        return capsys.readouterr().out
    before, after = map(float, re.search(r"differs between plates by (\S+) .* by (\S+)\n",
                                         told(range(40))).groups())
    wanted = np.log(np.std(filtered(noise, *optics["dull"])) + .01) - np.log(
        np.std(filtered(noise, *optics["sharp"])) + .01)
    assert abs(before - wanted) < .03 and after < .03
    assert "nothing shows whether it suits" in told([*range(32), 32, 34])  # one treated plate
    monkeypatch.setattr(data, "restain", lambda image, own, other: image)
    assert "warning: restained images are no nearer" in told(range(40))


@pytest.mark.parametrize("words, says", [
    (["--restain", 1.5], "a share from 0 to 1"),
    (["--restain", .5, "--experiment", "row:number"], "the plate, or the batch"),
    (["--restain", .5, "--biology", "smiles"], "negative controls"),
    (["--restain", .5, "--control_column", "brightfield"], "control images")])
def test_what_cannot_be_restained_is_refused(refused, ldm_config, ldm_path, tmp_path, words, says):
    base = ["--base", ldm_path] if "--control_column" in words else []
    refused(train_ldm, "--data", ldm_config.data, "--vae", ldm_config.vae, "--size", "tiny",
            "--steps", 2, "--out", tmp_path, *words, *base, says=[says])
