"""Sampling: guidance against the network's own predictions, conditioning images and windows,
editing, attribution; and the command line with its refusals."""
import argparse
import contextlib
import json
import shlex

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import data
import diffusion
import sample
import train_vae
from conftest import randomise

ONE = {"smiles": ["CC1CCC(B(O)O)CC1"], "dose": ["3"], "batch": ["B2"], "plate": ["P04"]}
TWO = {"dose": ["1", "3"], "batch": ["B1", "B2"]}
HINT = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)), {"batch": ["B1", "B3"]}


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(sample, "autocast", contextlib.nullcontext)


@pytest.fixture(scope="module")
def model(hinted_path):
    """A model with a ControlNet whose weights are all random, so that nothing is silent."""
    model = sample.Model.load(hinted_path)
    for p in randomise(model.denoiser).parameters():
        p.mul_(.5)
    model.denoiser.conditioner.gain.fill_(1.)
    return model


def v(model, columns, z, hint=None, t=500):
    """What the network predicts under a request, as in training: Denoiser.forward."""
    encode, n = model.denoiser.conditioner.encode, len(z)
    seen = hint and (hint[0], *encode(hint[1], n)[:2], torch.ones(n))
    with torch.no_grad():
        return model.denoiser(z, torch.full((n,), t), *encode(columns, n), seen)


def test_an_image_depends_on_its_hint_and_not_on_its_batch(model):
    def drawn(rows, **options):
        hint = HINT[0][rows], {"batch": [HINT[1]["batch"][k] for k in rows]}
        return model.generate({"dose": ["1"] * len(rows)}, [5] * len(rows), steps=2, hint=hint,
                              progress=False, **options)
    both = drawn([0, 1])
    assert (both[0] - both[1]).abs().max() > 1e-4
    for others in (torch.cat([drawn([0]), drawn([1])]), drawn([0, 1], batch=1)):
        assert_close(others, both, atol=1e-4, rtol=1e-4)


def test_networks_run_in_bfloat16_where_it_pays(model, monkeypatch):
    seen = set()
    for part in model.denoiser.unet, model.vae.decoder, model.denoiser.conditioner:
        monkeypatch.setattr(part, "forward", lambda *given, real=part.forward: (
            seen.add((real, torch.is_autocast_enabled("cpu"))), real(*given))[1])
    monkeypatch.setattr(sample, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    model.generate(ONE, [0], steps=1, progress=False)
    assert len(seen) == 3 and all(inside for _, inside in seen)


def test_guidance_is_the_sum_that_its_form_says_and_the_image_has_a_scale_of_its_own(model):
    z, t, batch, dose = torch.randn(2, *model.latent_shape), torch.tensor([500, 500]), *(
        {name: TWO[name]} for name in ("batch", "dose"))
    (none, e, b, both), (alone, image, full) = (v(model, columns, z) for columns in (
        {}, batch, dose, TWO)), (v(model, columns, z, HINT) for columns in ({}, batch, TWO))
    base, scales = none + 1.5 * (e - none), dict(biology=2., image=3., experiment=1.5)

    def guided(form="nested", hint=HINT, **changes):
        dials = {k: scale for k, scale in (scales | changes).items() if hint or k != "image"}
        return model.guided(TWO, 2, dials, form, hint=hint)(z, t)
    for found, wanted in ((guided(hint=None), base + 2 * (both - e)),
                          (guided("independent", None), base + 2 * (b - none)),
                          (guided(), base + 3 * (image - e) + 2 * (full - image)),
                          (guided("independent"), base + 3 * (alone - none) + 2 * (b - none)),
                          (guided(image=0., biology=0.), base)):
        assert_close(found, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", diffusion.FORMS)
def test_outside_the_interval_scales_above_one_count_as_one(model, form):
    z = torch.randn(1, *model.latent_shape)

    def guided(t, columns=ONE, **scales):
        return [model.guided(columns, 1, scales, form, interval)(z, torch.tensor([t]))
                for interval in ((.2, .8), (0., 1.))]
    for t, inside in ((100, False), (500, True), (900, False)):
        one, everywhere = guided(t, biology=3., experiment=3.)
        assert_close(one, everywhere if inside else v(model, ONE, z, t=t), atol=1e-4, rtol=1e-4)
    assert_close(guided(900, biology=0., experiment=3.)[0], guided(
        900, ONE | {"smiles": ["CCO"]}, biology=0., experiment=3.)[0])  # 0 ignores it everywhere
    assert_close(*guided(900, biology=1., experiment=.5), atol=1e-5, rtol=1e-5)  # the form's own


def test_conditions_are_encoded_once_and_branches_run_together(model, monkeypatch):
    """However many steps: one pass through the U-Net with a row for each branch that counts."""
    def passes(steps, b, e, **options):
        net, (unet, conditioner, stem) = model.denoiser, ([], [], [])
        with monkeypatch.context() as patch:
            for part, seen in ((net.unet, unet), (net.conditioner, conditioner),
                               (net.controlnet.stem, stem)):
                patch.setattr(part, "forward", lambda x, *rest, seen=seen, real=part.forward: (
                    seen.append(len(x)), real(x, *rest))[1])
            model.generate(TWO, [0, 1], steps=steps, guidance=dict(biology=b, experiment=e),
                           progress=False, **options)
        return unet, len(conditioner), stem
    assert passes(10, 2., 1.5) == ([2] * 2 + [6] * 6 + [2] * 2, 2, [])  # inside, outside
    assert passes(3, 2., 2., interval=(0., 1.)) == ([4] * 3, 1, [])     # v(e) has coefficient 0
    assert passes(5, 1., 1., hint=HINT) == ([2] * 5, 4, [2, 2])
    assert passes(9, 2., 2., hint=HINT, interval=(0., 1.)) == ([8] * 9, 2, [2])


def test_windows_give_what_the_whole_field_gives_to_a_network_of_single_pixels(model, monkeypatch):
    """No seams, every pixel covered, the right piece of the hint in each window; and one batch of
    windows at a time, so that memory does not grow with the field."""
    net, at_once = model.denoiser, []
    monkeypatch.setattr(net.controlnet.stem, "forward", lambda x: F.avg_pool2d(x, 4))
    monkeypatch.setattr(net.controlnet, "residuals", lambda z, t, *rest: [rest[3]])
    monkeypatch.setattr(net.unet, "forward", lambda z, *rest: (
        at_once.append(len(z)), .3 * z + rest[-1][0])[1])
    monkeypatch.setattr(model.vae, "to_image", lambda z: F.interpolate(
        z[:, :1].expand(-1, len(model.channels), -1, -1), scale_factor=4))
    wide, scales = torch.rand(1, 1, 48, 72) * 2 - 1, dict.fromkeys(model.groups, 1.)
    drawn = model.generate({"dose": ["1"]}, [3], scales, steps=4, batch=3, progress=False,
                           hint=(wide, {}))
    whole = F.avg_pool2d(F.pad(wide, (0, 8, 0, 0), mode="reflect"), 4)
    z = diffusion.sample(lambda z, t: .3 * z + whole, model.schedule, [3], (4, 12, 20), 4,
                         sampler="sde")
    assert_close(drawn, model.vae.to_image(z)[..., :72], atol=1e-4, rtol=1e-4)
    assert at_once == [3, 3, 2] * 4


def test_windows_that_disagree_fade_into_each_other():
    joined = sample.look(torch.zeros(1, 1, 8, 20), (8, 8), 1, lambda crops, first: torch.full(
        (1, 1, 16, 16), float(first)))
    assert joined.shape == (1, 1, 16, 40) and joined[0, 0, 0, [0, -1]].tolist() == [0., 3.]
    assert 0 < joined.diff(dim=3).max() < .5  # a seam would be a step of 1


def test_hints_of_rows_and_of_negative_controls_that_are_listed(model, screen):
    manifest = data.read_manifest(screen)
    opened = argparse.Namespace(manifest=manifest, settings=model.settings)
    images, told = sample.hint_of(model, opened, [4, 9, 4, 4])
    stack = np.load(screen.parent / "brightfield.npy")[[4, 9]].astype(np.float32)
    assert_close(images[:2].numpy(), data.scale_intensity(stack, model.controlnet["intensity"]))
    assert (images[2] - images[3]).abs().max() > .1  # other views
    assert "dose" not in told and told["plate"] == manifest.rows([4, 9, 4, 4], "plate")

    follows = argparse.Namespace(**vars(model) | {"controlnet": dict(
        column="control_row", channels=5, intensity=model.intensity)})
    controls = [i for i, dose in enumerate(manifest.columns["dose"]) if float(dose) == 0][:3]
    manifest.columns["control_row"] = [" ".join(str(i + 2) for i in controls)] * len(manifest)
    every, drawn = sample.read_rows(model, manifest, controls)[0], set()
    for i in range(20):
        image, told = sample.hint_of(follows, opened, [i])
        [k] = [k for k in range(3) if torch.equal(every[k], image[0])]
        assert told["column"] == manifest.rows([controls[k]], "column") and "smiles" not in told
        drawn.add(k)
    assert drawn == {0, 1, 2}


@pytest.fixture(scope="module")
def cells(model, screen):
    """Two images of the screen and their own conditions."""
    return sample.read_rows(model, data.read_manifest(screen), [5, 706])


def test_an_edit_to_the_own_conditions_returns_the_image_and_to_others_does_not(model, cells):
    (images, own), options = cells, dict(steps=10, rounds=10)
    rebuilt, untreated = train_vae.reconstruct(model.vae, images)[0], own | {"dose": ["0"] * 2}
    same, other = (model.edit(images, own, target, **options) for target in (own, untreated))
    assert (same - rebuilt).abs().max() < .25 * (other - rebuilt).abs().max()
    assert_close(model.edit(images, own, untreated, batch=1, **options), other, atol=1e-3, rtol=0)


def test_a_difference_is_that_of_two_predictions_on_the_same_noise(model, cells):
    images, own = cells
    other, t = own | {"dose": ["0"] * 2}, torch.tensor([500, 500])
    [found] = model.difference(images, own, other, levels=(.5,), seed=4)
    z = model.schedule.add_noise(model.vae.to_latent(images), diffusion.gaussian(
        diffusion.generators([4, 5]), model.latent_shape), t)
    x, y = (model.vae.to_image(model.schedule.split(z, v(model, request, z), t)[0])
            for request in (own, other))
    assert_close(found, (x - y).abs().mean(1) / 2, atol=1e-5, rtol=1e-4)
    assert found.max() > 1e-4 and not model.difference(images, own, own).any()


@pytest.fixture
def run(cli, monkeypatch, tmp_path):
    """run(words) -> (the rows of images that data.picture is given, the record)."""
    drawn = []
    monkeypatch.setattr(data, "picture", lambda *given, real=data.picture: (
        drawn.append(given[1]), real(*given)))

    def call(*words, name="samples"):
        status, _, error = cli(sample, *words, "--out", tmp_path)
        assert status == 0, error
        return drawn[-1], json.loads((tmp_path / f"{name}.json").read_text())
    return call


def test_a_film_ends_in_the_image_and_begins_in_its_noise(model):
    levels, noisy, predicted = model.film(ONE, 7, frames=3, steps=5)
    assert [round(1000 * level) for level in levels] == [999, 599, 199] and len(noisy) == 3
    image = model.generate(ONE, [7], steps=5, progress=False)[0]
    assert_close(predicted[-1], image)
    noise = diffusion.gaussian(diffusion.generators([7]), model.latent_shape)
    with torch.no_grad():
        assert_close(noisy[0], model.vae.to_image(noise)[0])


def test_a_sweep_shares_its_noise_and_a_record_repeats_its_hyperstack(ldm_path, tmp_path, cli, run):
    rows, record = run("--guidance", "biology=2", "smiles=CCO", "-n", 2, "--steps", 1, "--seed", 7,
                       "--checkpoint", ldm_path, "--grid", "dose=0,3", "batch=B1,B2,B3")
    assert record["seeds"] == [7] * 6 + [8] * 6 and list(map(len, rows)) == [2] * 6
    assert record["requests"] == 2 * [{"smiles": "CCO", "batch": batch, "dose": dose}
                                      for batch in ("B1", "B2", "B3") for dose in "03"]
    assert record["guidance"] == {"biology": 2.0, "experiment": sample.GUIDANCE[1]}
    before = (tmp_path / "samples.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "samples.tif") as tif:
        metadata, pixels = tif.imagej_metadata, tif.asarray()
        assert tif.series[0].axes == "TCYX" and pixels.shape == (12, 5, 32, 32)
        assert metadata["Labels"][:5] == list(data.CHANNELS) and metadata["unit"] == "um"
        assert 1 < pixels.max() <= 255  # in the units of the files
    (tmp_path / "samples.tif").unlink()
    assert cli(sample, *shlex.split(record["command"])[2:])[0] == 0
    assert (tmp_path / "samples.tif").read_bytes() == before


def test_editing_and_attribution_from_the_command_line(ldm_path, screen, run):
    edit = "--checkpoint", ldm_path, "--steps", 2, "--edit", f"{screen}:9", "batch=B2"
    [row], record = run(*edit, "--grid", "dose=1,3")
    own, batch = record["own"], {"batch": "B2", "plate": ""}  # no such plate in the new batch
    assert own["plate"] and record["requests"] == [own | batch | {"dose": d} for d in "13"]
    assert record["guidance"] == {"biology": 1., "experiment": 1.} and len(row) == 4
    assert run(*edit, "plate=P03")[1]["requests"] == [own | {"batch": "B2", "plate": "P03"}]
    [row], record = run("--checkpoint", ldm_path, "--attribution", f"{screen}:706", "dose=0",
                        name="attribution")
    assert len(row) == 6 and row[1].shape == (32, 32) and row[1].std() > .01
    assert record["requests"][0] == record["own"] | {"dose": "0"}


def test_conditioning_images_from_the_command_line(hinted_path, screen, run, tmp_path, cli):
    tifffile.imwrite(tmp_path / "field.tif", np.random.randint(0, 255, (48, 72), np.uint8))
    tifffile.imwrite(tmp_path / "deep.tif", np.full((32, 32), 9999, np.uint16))  # trained on 8 bits
    words = "--checkpoint", hinted_path, "--steps", 1, "--out", tmp_path, "--control"
    assert "100% of" in cli(sample, *words, tmp_path / "deep.tif")[1]
    assert "warning" not in cli(sample, *words, f"{screen}:9")[1]
    stack, shown, drawn = screen.parent / "brightfield.npy", [], []
    for control in (f"{screen}:9", f"{stack}:7", f"{stack}:107", tmp_path / "field.tif"):
        rows, record = run("--checkpoint", hinted_path, "--control", control, "-n", 2, "dose=1",
                           "--steps", 1)
        shown.append(rows[0][0])
        drawn.append(tifffile.imread(tmp_path / "samples.tif"))
        assert drawn[-1].shape == (2, 5, *shown[-1].shape) and record["control"] == str(control)
    assert np.array_equal(shown[0], shown[1]) and shown[3].shape == (48, 72)
    assert abs(shown[1] - shown[2]).max() > .1 and record["guidance"]["image"] == 1


def test_refusals(ldm_path, hinted_path, screen, tmp_path, refused):
    np.save(tmp_path / "two.npy", np.zeros((2, 32, 32), np.uint8))
    np.save(tmp_path / "small.npy", np.zeros((16, 16), np.uint8))
    (tmp_path / "file").write_text("mine")
    row, follow = f"{screen}:9", ("--checkpoint", hinted_path, "dose=1", "--control")
    for words, says in (
            (["batch=B9"], ["unknown batch B9", "B1, B2, B3"]), (["dose=nan"], ["dose=nan"]),
            (["bath=B1"], ["unknown field bath", "smiles, dose, batch"]), (["batch"], ["=VALUE"]),
            (["--grid", "dose=1,900"], ["training saw", "to 10"]), (["-n", 0], ["at least one"]),
            (["batch=B1", "dose=1", "--grid", "batch=B1,B2"], ["batch=B1,B2", "each name once"]),
            (["--guidance", "chemistry=2"], ["no group chemistry", "biology, experiment"]),
            (["--guidance", "biology=much"], ["biology=much"]), (["--seed", 2 ** 70], ["--seed"]),
            (["--grid", "dose=0,1", "batch=B1,B2", "row=1,2"], ["at most two"]),
            (["--steps", 1001], ["--steps", "1000"]), (["--attribution", row], ["a change"]),
            (["--edit", row, "dose=0", "--steps", 1000], ["inverted in 1 to"]),
            (["--interval", "nan", 1], ["--interval"]), (["--edit", f"{screen}:1"], ["from 2"]),
            (["--out", tmp_path / "file/in"], ["Not a dir"]), (["--control", row], ["ControlNet"]),
            ([*follow, tmp_path / "two.npy"], ["2 channels", "1 expected"]),
            ([*follow, tmp_path / "small.npy"], ["16x16", "32x32"])):
        said = refused(sample, "--checkpoint", ldm_path, "--out", tmp_path / "o", *words, says=says)
        assert len(said) == 1, said
    assert not any((tmp_path / "o").iterdir()) and (tmp_path / "file").read_text() == "mine"
