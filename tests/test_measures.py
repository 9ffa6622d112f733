"""Image to image, latent spaces and Mol2Image's benchmark: measures against known answers, then the
three commands on tiny models."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import data
import evaluate
import train_ldm
from evaluate import family_correlations, hits, sliced_wasserstein, zernike_moments


def images(n, seed=0):
    """Blobs on [0, 1], five channels."""
    x = torch.rand(n, 5, 64, 64, generator=torch.Generator().manual_seed(seed))
    return evaluate.gaussian_blur(x, 2.).sub(.4).mul(2.).clamp(.05, .8)


def test_sliced_distance_by_its_definition():
    """The finest level, in numpy: each image's own random patches, standardised per channel by the
    set, along 512 directions, sorted."""
    a, b = images(3), images(3, seed=1) ** 2
    b *= torch.tensor([.1, .3, .5, .8, 1.])[:, None, None]
    u = torch.nn.functional.normalize(torch.randn(
        512, 245, generator=torch.Generator().manual_seed(0)), dim=1).numpy()
    sides = []
    for x in (a, b):
        band = evaluate.laplacian_pyramid(255 * x)[0].numpy()
        patches = np.stack([band[k, :, n // 58:n // 58 + 7, n % 58:n % 58 + 7] for k in range(3)
                            for n in np.random.default_rng((k, 0)).integers(58 * 58, size=128)])
        patches = patches - patches.mean((0, 2, 3), keepdims=True)
        patches /= patches.std((0, 2, 3), keepdims=True)
        sides.append(np.sort(patches.reshape(-1, 245) @ u.T, 0))
    found = sliced_wasserstein(a, b)
    assert_close(found[0], float(1000 * np.abs(sides[0] - sides[1]).mean()), rtol=1e-3, atol=0.)
    assert len(found) == 3  # 64, 32, 16 pixels


def test_images_without_fine_texture_are_told_apart_and_others_of_their_kind_are_not():
    x = torch.randn(128, 1, 16, 16, generator=torch.Generator().manual_seed(0)) / 100
    scene = images(128)[:, :1, :16, :16]
    assert evaluate.told_apart(scene, scene + x, steps=60, seeds=1) > .9
    assert .25 < evaluate.told_apart(scene + x, scene - x.flip(3), steps=60, seeds=1) < .75


def shape(side, inside, angle=0.):
    """A mask (1, side, side) of the points (x, y) about the middle, turned, that are inside."""
    y, x = torch.meshgrid(*(torch.arange(side) - side / 2 + .5,) * 2, indexing="ij")
    c, s = math.cos(angle), math.sin(angle)
    return inside(c * x + s * y, c * y - s * x).long()[None]


def test_zernike_moments_of_a_disc_and_of_a_turned_shape():
    disc = zernike_moments(shape(64, lambda x, y: x ** 2 + y ** 2 < 25 ** 2))[0, 0]
    # only the constant polynomial is left; half a pixel of 25 makes 4 %
    assert disc.shape == (30,) and abs(disc[0] - 1) < .05 and disc[1:].max() < .05

    def drop(x, y):  # neither round nor symmetric
        return ((x / 20) ** 2 + (y / 9) ** 2 < 1) & (x > -12)
    one, turned = (zernike_moments(shape(64, drop, angle))[0, 0] for angle in (0., .9))
    assert one[1:].max() > .1 and (one - turned).abs().max() < .03
    assert zernike_moments(shape(32, lambda x, y: x ** 2 + (y - 14) ** 2 < 36)).isnan().all()


def test_correlation_over_molecules_knows_its_limits():
    rng, molecule = torch.Generator().manual_seed(0), np.repeat(np.arange(30), 3)
    own, other = ({"size": torch.randn(30, 4, generator=rng)[molecule]} for _ in range(2))

    def size(a, b, given=molecule):
        return family_correlations(a, b, given, molecule)["size"]
    assert abs(size(own, other)) < .4
    assert abs(size(own, own, (molecule + 1) % 30)) < .4  # whole molecules exchanged
    own["size"][::3] = torch.nan  # one image of every molecule without whole nuclei
    assert_close(size(own, own), 1., atol=1e-6, rtol=0.)


def test_correspondence_learns_what_belongs_together():
    """Four molecules, each with its own brightness."""
    scores = torch.tensor([[3., 1., -1., -2.], [1., 2., 5., -1.], [-1., -1., -1., -1.]])
    found = hits(scores, np.array([0, 0, 2]))
    assert_close(found["pairs"], torch.tensor([(1 + 2 / 3) / 2, (1 + 1 / 3) / 2, .5]))
    assert found["top-1"].tolist() == [1, 0, 0] and found["top-5"].tolist() == [1, 1, 1]
    graphs = evaluate.MOLECULE_ENCODERS["graph"]({}, 8, 8).featurise(
        ["C", "CCO", "c1ccccc1", "N#N"])
    molecule = np.arange(64) % 4
    x = torch.from_numpy(molecule)[:, None, None, None] / 2 - .75 + .1 * torch.randn(
        64, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    scores = evaluate.train_correspondence(lambda k: x[k], graphs, molecule, 100)(x, graphs)
    found = hits(scores, molecule)
    assert found["pairs"].mean() > .9 and found["top-1"].mean() > .85


def test_rows_of_the_benchmark():
    treatments = [(m, 1.) for m in "xxxxyyzz"]  # y and z have one well each
    wells = np.array(list("aabbccdd"))
    a, b = evaluate.two_wells(np.arange(8), treatments, wells, 100)
    assert [treatments[i] for i in a] == [treatments[i] for i in b] == [("x", 1.)] * 2
    assert len(set(wells[a])) == 1 and not set(wells[a]) & set(wells[b])
    assert_close(evaluate.benchmark_sets(["train", "val", "test_scaffold", "test_pair"]), {
        "easy": np.array([1]), "hard": np.array([2])})
    assert_close(evaluate.benchmark_sets(["train", "test_easy", "test_hard_unique"]), {
        "test_easy": np.array([1]), "test_hard_unique": np.array([2])})


def test_regression_learns_in_steps_and_not_by_the_clock():
    x = torch.rand(64, 1, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 1, 8, 8)
    x, y = 2 * x - 1, torch.cat([2 * x - 1, 1 - 2 * x], 1)
    one, again = (evaluate.regression(x, y, x, 30) for _ in range(2))
    assert torch.equal(one, again) and (one - y).abs().mean() < .5 * y.abs().mean()


def test_intensity_error_is_by_condition():
    y = images(4) * 2 - 1
    x = torch.cat([y[:, :1] / 2 - .5, y[:, 1:]], 1)  # one of five channels half as bright
    found = evaluate.intensity_error(torch.cat([x[:2], y[2:]]), y, ["P1", "P1", "P2", "P2"])
    assert_close({k: v.item() for k, v in found.items()}, {"P1": math.log(2) / 5, "P2": 0.})


@pytest.fixture
def radii(monkeypatch, tmp_path):
    """The nuclear radii that features are measured with. In an empty folder, with no classifier to
    train and no inversion, which would take most of the time."""
    found, real = set(), evaluate.features
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "reference_classifier", lambda *_: None)
    monkeypatch.setattr(evaluate.Model, "edit", lambda self, images, *_, **__: images / 2)
    monkeypatch.setattr(evaluate, "features", lambda images, channels, batch=64, radius=4.5: (
        found.add(radius), real(images, channels, batch, radius))[1])
    return found


def control(cli, path, *words):
    status, _, error = cli(
        evaluate, "control", "--checkpoint", path, "--images", 8, "--steps", 1, "--samples", 2,
        "--regression_steps", 1, "--out", "o", *words)
    assert status == 0 and Path("o/control.png").exists(), error
    return json.loads(Path("o/control.json").read_text())["table"]


def train_hinted(base, column, out, table=""):
    return train_ldm.train(train_ldm.Config(control_column=column, base=str(base), data=str(table),
                                            batch=8, views=1, steps=1, workers=0, out=str(out)))


def test_control_of_cells_in_brightfield(hinted_path, ldm_path, cli, refused, radii):
    table = control(cli, hinted_path, "--nucleus_radius", 3, "--quick")
    assert {"through the autoencoder", "regression", "ControlNet, mean of 2"} <= set(table)
    assert max(table["true"]["l1"]) == 0 and table["true"]["nuclei_error"] == 0
    assert table["ControlNet"]["l1"] != table["without the conditioning image"]["l1"]
    assert radii == {3.} and "edited" not in table
    refused(evaluate, "control", "--checkpoint", ldm_path, says=["has no ControlNet"])


def test_images_of_untreated_cells_are_edited(ldm_path, cli, tmp_path, radii):
    assert "edited" in control(cli, train_hinted(ldm_path, "untreated", tmp_path / "untreated"))


def test_control_by_the_style_of_a_plate(ldm_path, screen, cli, refused, tmp_path, radii):
    table = screen.with_name("controls.csv")
    assert cli(data, "controls", screen, "--by", "plate", "--out", table)[0] == 0
    report = control(cli, path := train_hinted(ldm_path, "control_row", tmp_path / "s", table))
    assert len(report["ControlNet"]["log_intensity"]) > 1
    assert not {"regression", "edited"} & set(report) and "conditioning image itself" in report
    refused(evaluate, "control", "--checkpoint", path, "--data", screen, says=["control_row"])


def test_latent_spaces(screen, cli, refused, radii):
    words = ("vae", "--data", screen, "--out", "o", "--images", 24, "--nucleus_radius", 3,
             "--configs")
    refused(evaluate, *words, "width=8", "out=here", says=["out: no setting"])
    assert not Path("o").exists()  # refused before any training
    for _ in range(2):  # nothing is measured again
        cli(evaluate, *words, "width=8 blocks=1 workers=0", "width=8 workers=0 latent_channels=2",
            "--train_steps", 1)
        one, other = map(json.loads, Path("o/vae.jsonl").read_text().strip().splitlines())
    assert one["numbers"] == 2 * other["numbers"] == 256 and radii == {3.}
    assert 0 < one["l1, made small"] < one["l1"] and one["kl"] > 0


def test_mol2image(ldm_path, cli, refused, radii, monkeypatch):
    words = ("mol2image", "--checkpoint", ldm_path, "--steps", 3, "--images", 12, "--train_steps",
             2, "--nucleus_radius", 3, "--out", "o")
    refused(evaluate, *words, says=["no three easy molecules"])  # one well of each treatment
    monkeypatch.setattr(evaluate, "wells_of", lambda m: np.arange(len(m)))  # sites stand in
    status, _, error = cli(evaluate, *words)
    assert status == 0, error
    sets = json.loads(Path("o/mol2image.json").read_text())["table"]
    assert set(sets) == {"easy", "hard"} and radii == {3.} and Path("o/mol2image.png").exists()
    real, chance = (sets["hard"][k] for k in ("another well", "another well, molecules exchanged"))
    assert real["swd"] == chance["swd"] and real["count"] != chance["count"]
    assert sets["hard"]["generated"]["swd"] != sets["hard"]["generated, scale 1"]["swd"]
