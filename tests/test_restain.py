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
import train_vae


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


def test_a_channel_that_is_dark_in_the_controls_is_not_blown_up():
    dark = np.full((8, 1, 16, 16), -1, np.float32)
    noisy = np.random.default_rng(0).normal(0, .1, (8, 1, 16, 16)).astype(np.float32)
    spot = dark[0].copy()
    spot[0, 8, 8] = -.99                                  # one grey level
    moved = data.restain(spot, data.plate_style(dark), data.plate_style(noisy))
    assert_close(moved, np.full_like(moved, noisy.mean()), atol=.081, rtol=0)


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
    return np.array(vocabulary)[side.codes[name].cpu().numpy().astype(int)]


def test_restained_rows_are_treated_told_the_other_plate_and_drawn_by_their_share(prepared):
    side, columns = prepared.sides["training"], prepared.manifest.columns
    plain = len(prepared.train)
    roles = np.array([columns["role"][i] for i in side.rows])
    treated = roles == "treated"
    assert treated[plain:].all() and len(side.rows) - plain == treated[:plain].sum()
    own = [np.array([columns[name][i] for i in side.rows]) for name in ("batch", "plate")]
    said = [told(side, prepared.fields, name) for name in ("batch", "plate")]
    for a, b in zip(own, said):
        assert (a[:plain] == b[:plain]).all()             # plain rows are told their own
    restained = train_ldm.Restained(prepared, prepared.train, .75)
    assert list(zip(own[0][plain:], own[1][plain:])) == [own for own, _ in restained.moves]
    assert list(zip(said[0][plain:], said[1][plain:])) == [other for _, other in restained.moves]
    assert (own[1][plain:] != said[1][plain:]).all() and len(set(said[1][plain:])) == 6
    batch_of = dict(zip(columns["plate"], columns["batch"]))
    assert [batch_of[plate] for plate in said[1]] == list(said[0])
    assert (side.codes["row"][plain:] == side.codes["row"][:plain][treated[:plain]]).all()
    assert_close(side.share.sum(), 1.)
    assert_close(side.share[plain:].sum() / side.share[treated].sum(), .75)
    balanced = train_ldm.pair_shares(prepared.fields, prepared.manifest, prepared.train, 1.)
    assert_close(side.share[:plain][~treated[:plain]], balanced[~treated[:plain]])


def test_restained_latents_are_restained_images_encoded(prepared):
    side, plain = prepared.sides["training"], len(prepared.train)
    intensity = prepared.constant["vae"]["intensity"]
    views = torch.cat([x for x, _ in train_ldm.batches_of_views(
        prepared.pixels, side.rows, prepared.settings, intensity, 2)])
    restained = train_ldm.Restained(prepared, prepared.train, .75)
    for k in (0, 5, len(restained.rows) - 1):
        for v in (0, 1):
            image = views[2 * (plain + k) + v]
            moved = torch.from_numpy(restained.restain(image.numpy(), *restained.moves[k]))
            unmoved, wanted = prepared.vae.encode(torch.stack([image, moved]))[0]
            cached = torch.from_numpy(np.array(side.cache[2 * (plain + k) + v, 0], np.float32))
            # float16, encoded under bf16
            assert (cached - wanted).norm() < .1 * (cached - unmoved).norm()


def test_a_model_is_trained_with_restained_images(ldm_config, tmp_path, cli):
    status, out, error = cli(train_ldm, "--data", ldm_config.data, "--vae", ldm_config.vae,
                             "--size", "tiny", "--views", 1, "--batch", 8, "--steps", 2,
                             "--restain", .5, "--out", tmp_path)
    assert status == 0, error
    assert "restained: by batch, plate; 6 plates" in out
    assert re.search(r" and \d+ restained x 1", out)
    assert "no treatment lies on two" in out  # of this screen: every well has its own
    # later, without: other settings than the finished model's
    status, _, error = cli(train_ldm, "--data", ldm_config.data, "--vae", ldm_config.vae,
                           "--size", "tiny", "--views", 1, "--batch", 8, "--steps", 2,
                           "--out", tmp_path)
    assert status == 2 and "restain was 0.5" in error


OPTICS = {"sharp": (.6, .2, -.3), "dull": (1.1, .5, .2), "blank": (.6, .2, 0.)}


@pytest.fixture
def plates(tmp_path):
    """A manifest of plates of known optics: on each 16 negative controls and 4 wells of one
    treatment, with the day of the plate; a well without a plate; and one image that is damaged."""
    noise = np.random.default_rng(0).standard_normal((41, 1, 64, 64), np.float32)
    lines = ["image,smiles,dose,plate,day,row"]
    for i, x in enumerate(noise):
        plate = ("sharp", "dull")[i % 2] if i < 40 else ""
        image = filtered(x, *OPTICS[plate or "blank"])
        np.savez(tmp_path / f"{i}.npz", sample=((image.clip(-1, 1) + 1) * 127.5).astype(np.uint8))
        lines.append(f"{i}.npz,{'CCO' if i >= 32 else 'CS(C)=O'},{3 * (i >= 32)},{plate},"
                     f"{ {'sharp': 4, 'dull': 9}.get(plate, '')},{i}")
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    manifest = data.read_manifest(tmp_path / "m.csv", ("DNA",))
    (tmp_path / "3.npz").write_bytes(b"damaged")
    fields = [SimpleNamespace(name=n, kind=k, group=g) for n, k, g in (
        ("smiles", "molecule", "biology"), ("dose", "log", "biology"),
        ("plate", "category", "experiment"), ("day", "number", "experiment"),
        ("row", "number", "experiment"))]
    return SimpleNamespace(
        manifest=manifest, fields=fields, settings=SimpleNamespace(crop=0),
        constant={"vae": {"intensity": {"low": [0.], "high": [255.]}}},
        pixels=data.Pixels(manifest, max_corrupt=.1))


def test_plates_of_known_optics(plates, capsys, monkeypatch):
    restained = train_ldm.Restained(plates, np.arange(41), .5)
    assert list(restained.rows) == list(range(32, 40))    # 40 lies on no plate
    columns = {name: list(v) + [v[i] for i in restained.rows]
               for name, v in plates.manifest.columns.items()}
    restained.tell(columns)
    assert columns["plate"][41:] == ["dull", "sharp"] * 4
    assert columns["day"][41:] == ["9", "4"] * 4          # one for a plate: goes with it
    assert columns["row"][41:] == [str(i) for i in range(32, 40)]
    restained.report()
    out = capsys.readouterr().out
    before, after = map(float, re.search(r"two plates by (\S+) .* by (\S+)\n", out).groups())
    assert before > .2 and after < .04 and "warning" not in out
    assert "2 plates, 8 images; 1 others stay as they are" in out
    monkeypatch.setattr(data, "restain", lambda image, own, other: image)
    restained.report()
    assert "warning: restained images are no nearer" in capsys.readouterr().out
    train_ldm.Restained(plates, np.r_[0:33, 34], .5).report()  # only one of them with a treatment
    assert "nothing shows whether it suits" in capsys.readouterr().out


def test_plates_with_few_controls_are_no_place_to_go(plates):
    with pytest.raises(train_vae.UserError, match="8 negative controls"):
        train_ldm.Restained(plates, np.r_[0:15, 32:40], .5)    # eight and seven
    with pytest.raises(train_vae.UserError, match="needs treated images"):
        train_ldm.Restained(plates, np.arange(32), .5)         # controls only
    assert len(train_ldm.Restained(plates, np.r_[0:16, 32:40], .5).rows) == 8


@pytest.mark.parametrize("words, says", [
    (["--restain", 1.5], "a share from 0 to 1"),
    (["--restain", .5, "--experiment", "row:number"], "there is none"),
    (["--restain", .5, "--biology", "smiles"], "negative controls"),
    (["--restain", .5, "--control_column", "brightfield"], "control images")])
def test_what_cannot_be_restained_is_refused(refused, ldm_config, ldm_path, tmp_path, words, says):
    base = ["--base", ldm_path] if "--control_column" in words else []
    refused(train_ldm, "--data", ldm_config.data, "--vae", ldm_config.vae, "--size", "tiny",
            "--steps", 2, "--out", tmp_path, *words, *base, says=[says])
