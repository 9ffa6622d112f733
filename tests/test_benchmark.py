"""Mol2Image's benchmark, the study of latent spaces and the readers of published tables: figures
against known answers, commands run end to end."""
import csv
import gzip
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from torch.testing import assert_close

import data
import evaluate
import sample
import train_ldm
import train_vae
import vae
from conftest import SHARED
from evaluate import (REACH, along_directions, area_between, by_molecule, correlation_by_family,
                      correspondence_features, earth_movers_distance, histogram,
                      minimum_cross_entropy, patch_histograms, ranks, zernike_moments)


def images(n=12, side=64, seed=0):
    """Blobs on [0, 1], five channels."""
    x = torch.rand(n, 5, side, side, generator=torch.Generator().manual_seed(seed))
    return evaluate.gaussian_blur(x, 2.).sub(.4).mul(2.).clamp(.05, .8)


# --- sliced Wasserstein and earth mover's distance ------------------------------------------------

def sliced_wasserstein(a, b, batch=4):
    return evaluate.sliced_wasserstein(*(patch_histograms(lambda: x.split(batch)) for x in (a, b)))


def test_distance_of_a_set_with_itself_is_zero_and_of_another_is_not():
    a = images()
    assert sliced_wasserstein(a, a.clone()) == [0., 0., 0.]  # 64, 32 and 16 pixels
    assert all(d > 20 for d in sliced_wasserstein(a, torch.rand(a.shape)))


def test_distance_between_gaussians_is_known():
    """Points N(0, I) and N(d, I): |d . u| averaged over the sphere,
    |d| Gamma(D / 2) / (sqrt(pi) Gamma((D + 1) / 2))."""
    rng, dimension = torch.Generator().manual_seed(0), 20
    a = torch.randn(4000, dimension, generator=rng)
    shift = torch.full((dimension,), .7)
    wide = 2 * torch.randn(a.shape, generator=rng)

    def distance(a, b):
        return area_between(along_directions(a), along_directions(b), -REACH, REACH).mean().item()
    wanted = shift.norm().item() * math.gamma(dimension / 2) / (
        math.pi ** .5 * math.gamma((dimension + 1) / 2))
    assert_close(distance(a, a + shift), wanted, rtol=.05, atol=0.)
    # the same mean, twice as wide: E|N(0, 1)|
    assert_close(distance(a, wide), math.sqrt(2 / math.pi), rtol=.05, atol=0.)


def test_area_between_histograms_is_the_distance_of_sorted_values():
    """Karras et al. sort the projections; histograms give the same in memory that does not grow."""
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 500, generator=rng), torch.randn(3, 500, generator=rng) * 1.1 + .05
    found = area_between(histogram(a, -8., 8.), histogram(b, -8., 8.), -8., 8.)
    wanted = (a.sort(1).values - b.sort(1).values).abs().mean(1)
    assert_close(found, wanted.double(), rtol=.01, atol=0.)


def test_patches_are_standardised_per_channel_along_all_directions():
    """The whole of one level by definition: patches, standardised, projected, sorted."""
    a, b = images(6), images(6, seed=1) ** 2
    b *= torch.tensor([.1, .3, .5, .8, 1.])[:, None, None]
    projections = []
    rng = torch.Generator().manual_seed(0)
    u = torch.nn.functional.normalize(torch.randn(512, 245, generator=rng), dim=1)
    for x in (a, b):
        patches = evaluate.random_patches(evaluate.laplacian_pyramid(255 * x), range(6))[0]
        assert patches.shape == (6, 128, 5, 7, 7)
        channels = patches.flatten(0, 1).transpose(0, 1).flatten(1)        # (5, values)
        mean, std = (v[:, None, None] for v in (channels.mean(1), channels.std(1)))
        projections.append((u @ ((patches.flatten(0, 1) - mean) / std).flatten(1).T).sort(1).values)
    wanted = 1000 * (projections[0] - projections[1]).abs().mean().item()
    assert_close(sliced_wasserstein(a, b)[0], wanted, rtol=.01, atol=0.)


def test_distance_is_blind_to_brightness_and_says_so_beside_it():
    a = images()
    darker = a * .5 + .1
    assert max(sliced_wasserstein(a, darker)) < 1
    assert_close(earth_movers_distance(a, darker), (a - darker).abs().mean((0, 2, 3)), atol=1e-3,
                 rtol=0.)


def test_distance_does_not_depend_on_the_batch():
    a, b = images(10), images(10, seed=1)
    assert_close(sliced_wasserstein(a, b, batch=3), sliced_wasserstein(a, b, batch=10), rtol=1e-3,
                 atol=0.)


def test_earth_movers_distance_in_closed_form():
    x = torch.full((2, 1, 4, 4), .2)
    y = torch.full((2, 1, 4, 4), .5)
    assert_close(earth_movers_distance(x, y), torch.tensor([.3]))
    half = torch.cat([x[:1], y[:1]])  # half of the mass moves by .3
    assert_close(earth_movers_distance(x, half), torch.tensor([.15]))
    assert earth_movers_distance(half, half.flip(0)) == 0  # wherever the intensities lie


def test_pyramid_adds_up_to_the_image():
    a = images(2)
    bands = evaluate.laplacian_pyramid(a)
    assert [b.shape[-1] for b in bands] == [64, 32, 16]
    flat = evaluate.laplacian_pyramid(torch.full((1, 5, 64, 64), .3))
    assert all(band.abs().max() < 1e-6 for band in flat[:-1]) and (flat[-1] - .3).abs().max() < 1e-6


# --- morphology -----------------------------------------------------------------------------------

def shape(side, inside, angle=0.):
    """A mask (1, side, side) of the points (x, y) about the middle, turned, that are inside."""
    y, x = torch.meshgrid(*(torch.arange(side) - side / 2 + .5,) * 2, indexing="ij")
    c, s = math.cos(angle), math.sin(angle)
    return inside(c * x + s * y, c * y - s * x).long()[None]


def test_zernike_moments_of_a_disc_and_of_a_turned_shape():
    disc = zernike_moments(shape(64, lambda x, y: x ** 2 + y ** 2 < 25 ** 2))[0, 0]
    # only the constant polynomial is left; half a pixel of 25 makes 4 %
    assert abs(disc[0] - 1) < .05 and disc[1:].max() < .05

    def drop(x, y):  # neither round nor symmetric
        return ((x / 20) ** 2 + (y / 9) ** 2 < 1) & (x > -12)
    one, turned = (zernike_moments(shape(64, drop, angle))[0, 0] for angle in (0., .9))
    assert one[1:].max() > .1
    assert (one - turned).abs().max() < .03
    cut = shape(32, lambda x, y: x ** 2 + (y - 14) ** 2 < 36)
    assert zernike_moments(cut).isnan().all()  # the border cuts it


def test_thresholds_part_levels():
    x = torch.full((1, 20, 20), .1)
    x[:, 5:15, 5:15] = .8
    assert .1 < minimum_cross_entropy(x) < .8
    x[:, :, 15:] = .4
    assert .1 < evaluate.lower_of_three(x) < .4 < evaluate.otsu(x)


def test_cross_entropy_threshold_is_the_least_of_its_definition():
    """Li & Lee 1993: the cut with the least -sum of x log(mean of its class), trying them all."""
    x = torch.cat([torch.rand(300, generator=torch.Generator().manual_seed(0)) * .3 + .1,
                   torch.rand(60, generator=torch.Generator().manual_seed(1)) * .5 + .4])
    x = (x * 127).round() / 127

    def cross_entropy(cut):
        return -sum((v.sum() * v.mean().log()).item() for v in (x[x <= cut], x[x > cut]) if len(v))
    least = min(cross_entropy(k / 127) for k in range(127))
    cut = minimum_cross_entropy(x.view(1, 18, 20)).item()
    assert abs(cross_entropy(cut) - least) < 1e-4 and 0 < (x > cut).sum() < 360


@pytest.fixture(scope="module")
def fields():
    """60 fields of the simulator at the default density, under all microscopes: (images in [-1, 1],
    nuclei)."""
    screen = data.Screen()
    optics = data.microscope(screen)
    drawn = [data.draw_field(dict(row=8, column=12, site=1, batch=f"B{i % 6 + 1}", plate="P01",
                                  true_mechanism="none", true_effect=0.), screen, optics, [11, i],
                             counterpart=False) for i in range(60)]
    return (torch.from_numpy(np.stack([d["image"] for d in drawn])).float() / 127.5 - 1,
            torch.tensor([d["truth"]["true_nuclei"] for d in drawn]))


def test_counts_agree_with_the_simulator(fields):
    """Error of the total under 5 %, with either threshold, and no bias that half counts have."""
    x, nuclei = fields
    for count in (correspondence_features(x, list(data.CHANNELS))["count"][:, 0],
                  evaluate.features(x, list(data.CHANNELS))[:, 0]):
        assert abs(count.sum() / nuclei.sum() - 1) < .03
        assert (count - nuclei).abs().mean() < .7


def test_border_objects_are_discarded_but_for_the_count(fields):
    x, _ = fields
    x = x[:4].clone()
    before = correspondence_features(x, list(data.CHANNELS))
    labels = evaluate.segment_nuclei((x[:, 0] + 1) / 2, threshold=minimum_cross_entropy)
    cut = evaluate.cut_by_border(labels)
    whole = ((labels > 0) & ~cut.gather(1, labels.flatten(1)).view_as(labels)).float().mean((1, 2))
    assert_close(before["coverage"][:, 0], whole)
    assert (whole < (labels > 0).float().mean((1, 2))).all()
    assert [before[f].shape[1] for f in evaluate.FAMILIES] == [2, 1, 4, 120, 10]


def test_correlation_over_molecules_knows_its_limits():
    rng = torch.Generator().manual_seed(0)
    molecules = np.repeat(np.arange(30), 3)
    own = {f: torch.randn(30, 4, generator=rng)[molecules] for f in evaluate.FAMILIES}

    def table(a, b):
        return correlation_by_family(*(by_molecule(v, molecules) for v in (a, b)))
    assert_close(table(own, own)["size"], (1., 1.), atol=1e-9, rtol=0.)
    stretched = {f: v.exp() for f, v in own.items()}  # the order stays
    pearson, spearman = table(own, stretched)["count"]
    assert pearson < .97 and spearman > 1 - 1e-9
    other = {f: torch.randn(30, 4, generator=rng)[molecules] for f in evaluate.FAMILIES}
    assert abs(table(own, other)["count"][0]) < .4
    assert ranks(torch.tensor([3., 1., 3., 0.])).tolist() == [2.5, 1., 2.5, 0.]
    blank = {f: v.clone() for f, v in own.items()}
    blank["size"][::6] = torch.nan  # one image of every other molecule without whole nuclei
    assert_close(table(own, blank)["size"], (1., 1.), atol=1e-6, rtol=0.)


def test_nothing_measured_depends_on_the_batch(fields):
    """Nor is more than a batch read at a time, nor more kept of an image than its numbers."""
    x, _ = fields
    torch.manual_seed(0)
    network, asked = evaluate.Correspondence(5, 8).eval(), []

    def read(k):
        asked.append(len(k))
        return x[k]
    one, many = (evaluate.measure_images(read, 10, list(data.CHANNELS), network, "", batch=b)
                 for b in (3, 10))
    assert asked == [3, 3, 3, 1, 1, 3, 3, 3, 1, 3, 3, 3, 1, 10, 1, 10, 10]
    assert sum(v[0].numel() for v in (*one["features"].values(), one["codes"])) < 200
    for family in evaluate.FAMILIES:
        assert_close(one["features"][family], many["features"][family], equal_nan=True, rtol=1e-4,
                     atol=1e-4)
    assert_close(one["codes"], many["codes"], rtol=1e-4, atol=1e-4)
    assert (one["intensity"] == many["intensity"]).all()
    assert max(evaluate.sliced_wasserstein(one["patches"][64], many["patches"][64])) < .01


def test_large_images_are_compared_at_64_pixels_and_at_their_own_size():
    x = images(4, 128) * 2 - 1
    network = evaluate.Correspondence(5, 8).eval()
    one, other = (evaluate.measure_images(lambda k: v[k], 4, list(data.CHANNELS), network, "")
                  for v in (x, evaluate.halved(x)))
    assert [len(one["patches"][side]) for side in (64, 128)] == [3, 4]
    assert_close(one["patches"][64], other["patches"][64])
    assert set(other["patches"]) == {64}


def test_images_without_nuclei_are_measured():
    blank = correspondence_features(torch.full((2, 5, 64, 64), -1.), list(data.CHANNELS))
    assert blank["size"].isnan().all() and (blank["count"] == 0).all()
    assert [blank[f].shape for f in evaluate.FAMILIES] == [(2, n) for n in (2, 1, 4, 120, 10)]


def test_correspondence_learns_what_belongs_together():
    """Four molecules, each with its own brightness: matched pairs are told apart, and retrieved."""
    graphs = evaluate.MOLECULE_ENCODERS["graph"]({}, 8, 8).featurise(
        ["C", "CCO", "c1ccccc1", "N#N"])
    molecule = np.arange(64) % 4
    x = torch.from_numpy(molecule)[:, None, None, None] / 2 - .75 + .1 * torch.randn(
        64, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    network = evaluate.train_correspondence(lambda rows: x[rows], np.arange(64), graphs, molecule,
                                            100, lr=2e-3)
    codes = network.image(x)["code"].detach()
    found = evaluate.correspondence_hits(network, codes, graphs, molecule)
    assert found["accuracy"].mean() > .9 and found["top_1"].mean() > .85
    wrong = evaluate.correspondence_hits(network, codes, graphs, (molecule + 1) % 4)
    assert wrong["accuracy"].mean() < .6 and wrong["top_1"].mean() < .2


# --- latent spaces --------------------------------------------------------------------------------

def test_patch_pca_is_exact_with_all_components_and_best_with_few():
    x = images(8, 16) * 2 - 1
    assert_close(evaluate.PatchPCA(x, 4, 80)(x), x, atol=1e-4, rtol=0.)
    errors = [(evaluate.PatchPCA(x, 4, k)(x) - x).square().mean().item() for k in (2, 8, 40)]
    assert errors[0] > errors[1] > errors[2]
    patches = torch.nn.functional.pixel_unshuffle(x, 4).movedim(1, 3).flatten(0, 2)
    spread = torch.linalg.svdvals(patches - patches.mean(0)) ** 2  # Eckart and Young
    assert_close(errors[1], (spread[8:].sum() / x.numel()).item(), rtol=1e-3, atol=0.)


def test_feature_agreement_of_an_image_with_itself_and_with_noise():
    x = images(24) * 2 - 1
    same = evaluate.feature_agreement(x, x, list(data.CHANNELS))
    assert all(abs(r - 1) < 1e-6 and bias == 0 for r, bias in same.values())
    darker = evaluate.feature_agreement(x, x * .9 - .1, list(data.CHANNELS))
    assert darker["ER"][1] > .3


def test_losses_for_fine_structure():
    x = images(2, 32) * 2 - 1
    blurred = evaluate.gaussian_blur(x, 1.)
    assert vae.spectral_distance(x, x) == 0 and vae.multiscale_distance(x, x) == 0
    moved = torch.roll(x, 3, 3)  # texture elsewhere: the amplitudes are the same, the bands not
    assert vae.spectral_distance(x, moved) < 1e-4 < vae.spectral_distance(x, blurred)
    assert vae.multiscale_distance(x, moved) > vae.multiscale_distance(x, blurred) > 1e-3
    coarse = torch.rand(2, 5, 16, 16).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert vae.multiscale_distance(x, x + coarse) > .01  # not in the finest band, in the next
    mean = torch.zeros(2, 4, 8, 8)
    plain = vae.vae_loss(x, blurred, mean, mean, 0.)[0]
    both = vae.vae_loss(x, blurred, mean, mean, 0., .5, 2.)[0]
    assert_close(both - plain, .5 * vae.spectral_distance(x, blurred)
                 + 2 * vae.multiscale_distance(x, blurred))


def test_latent_spaces_command(screen, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "screen_probe", lambda *_: None)
    monkeypatch.setattr(evaluate, "generation_on", lambda *_: {})
    words = ("vae", "--data", screen, "--configs", "width=8 blocks=1", "width=8 latent_channels=2",
             "--train_steps", 4, "--images", 24, "--out", tmp_path / "o")
    status, out, error = cli(evaluate, *words)
    assert status == 0, error
    report = json.loads((tmp_path / "o" / "vae.json").read_text())
    assert report["asked"]["configs"] == list(words[4:6])
    first, second = report["table"]
    assert first["numbers"] == 2 * second["numbers"] == 256
    assert first["numbers_per_pixel"] == .25  # 256 of 32x32 pixels
    assert first["originals"]["l1"] == 0 and first["baselines"]["patch PCA"]["l1"] > 0
    assert "small image" in out and (tmp_path / "o" / "rate_distortion.png").exists()
    before = (tmp_path / "o" / "vae.jsonl").read_text()
    assert cli(evaluate, *words)[0] == 0
    assert (tmp_path / "o" / "vae.jsonl").read_text() == before  # nothing was measured again


def test_latent_spaces_refuse_unknown_settings(refused, screen, tmp_path):
    for word, says in (("depth=3", "unrecognized"), ("width=wide", "invalid int value"),
                       ("out=here", "no setting"), ("data=m.csv", "no setting"),
                       ("overwrite", "no setting"),
                       ("preset=64x64", "one of 64x64x8, 128x128x1")):
        lines = refused(evaluate, "vae", "--data", screen, "--configs", "width=8", word, "--out",
                        tmp_path / "o", says=[word.partition("=")[0], says])
        assert len(lines) == 1 and not (tmp_path / "o").exists()  # before the first is trained


def test_a_preset_brings_its_settings():
    found = train_vae.settings(train_vae.Config, ["--preset=128x128x1", "--width=8"])
    assert (found.crop, found.latent_channels, found.width) == (512, 1, 8)


# --- the benchmark's command ----------------------------------------------------------------------

@pytest.fixture(scope="session")
def pixel_path(screen, ldm_config, tmp_path_factory):
    """The tiny model in pixel space, through the real scripts."""
    folded = train_vae.train(train_vae.Config(data=str(screen), pixels=True,
                                              out=str(tmp_path_factory.mktemp("pixels_vae"))))
    return train_ldm.train(replace(ldm_config, vae=str(folded),
                                   out=str(tmp_path_factory.mktemp("pixels"))))


def test_pixels_are_folded_and_nothing_is_lost(pixel_path):
    model = sample.Model.load(pixel_path)
    assert model.latent_shape == (80, 8, 8) and model.denoiser.unet.config.latent_channels == 80
    x = torch.rand(2, 5, 32, 32) * 2 - 1
    z = model.vae.to_latent(x, torch.randn(2, 80, 8, 8))
    assert_close(model.vae.to_image(z), x, atol=1e-3, rtol=0.)  # no noise is added
    assert not list(model.vae.parameters())


@pytest.fixture
def benchmark_words(ldm_path, tmp_path, monkeypatch):
    # this small screen has one well of each treatment: its sites stand in for wells
    monkeypatch.setattr(evaluate, "wells_of", lambda m: np.arange(len(m)).astype(str))
    return ("quality", "--mol2image", "--checkpoint", ldm_path, "--steps", 1, "--images", 12,
            "--train_steps", 2, "--sets", "test_substituent", "--out", tmp_path)


def test_benchmark_command_with_other_systems(benchmark_words, pixel_path, screen, cli, tmp_path,
                                              monkeypatch):
    status, out, error = cli(evaluate, *benchmark_words, "--pixel_model", pixel_path,
                             "--generated", screen)  # the real images, as another system's own
    assert status == 0, error
    table = json.loads((tmp_path / "mol2image.json").read_text())["table"]["test_substituent"]
    other, real = table["the other system"], table["real, another well"]
    assert other["swd"] == [0., 0.] and max(other["intensity_w1"]) == 0  # it is the real set itself
    assert_close(other["correlation"]["size"], [1., 1.])
    assert min(real["swd"]) > 0 and real["correlation"]["size"][0] < 1
    assert table["same U-Net in pixels"]["swd"] != table["generated"]["swd"]
    assert real["interval"]["size"][0] <= real["correlation"]["size"][0]
    assert "top-1" in out and (tmp_path / "mol2image.png").exists()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("generated-*.npy")}
    monkeypatch.setattr(evaluate, "generate", None)  # a second run finds both sets
    assert len(made) == 2 and cli(evaluate, *benchmark_words)[0] == 0


def test_another_system_must_have_made_every_image(benchmark_words, screen, refused, tmp_path):
    short = tmp_path / "short.csv"
    lines = screen.read_text().splitlines()
    short.write_text("\n".join(lines[:5]) + "\n")
    (tmp_path / "image.npy").symlink_to(screen.parent / "image.npy")
    refused(evaluate, *benchmark_words, "--generated", short, says=["has no image for"])


def test_images_of_another_system_need_no_crop(tmp_path):
    """Its 64-pixel images are taken as they are beside crops of 128."""
    rng = np.random.default_rng(0)
    for name, side in (("real", 140), ("made", 64)):
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 255, (2, 1, side, side), np.uint8))
        (tmp_path / f"{name}.csv").write_text("image,index,compound\n" + "".join(
            f"{name}.npy,{i},{'ab'[i]}\n" for i in range(2)))
    m = data.read_manifest(tmp_path / "real.csv", ("DNA",))
    model = SimpleNamespace(channels=("DNA",), intensity={"low": [0.], "high": [255.]})
    opened = SimpleNamespace(manifest=m, pixels=data.Pixels(m), model=model,
                             settings=SimpleNamespace(crop=128, binning=1, flips=True))
    read = evaluate.other_system(opened, tmp_path / "made.csv", np.array([1, 0]))
    assert read(np.arange(2)).shape == (2, 1, 64, 64)
    made = np.load(tmp_path / "made.npy")[::-1] / 127.5 - 1  # in the order of the rows
    assert_close(read(np.arange(2)).numpy(), made.astype(np.float32), atol=1e-5, rtol=0.)


def test_class_means_are_of_training_images_alone():
    x = torch.arange(6.)[:, None, None, None].expand(6, 1, 4, 4)
    columns = {"batch": ["A", "A", "A", "B", "B", "B"]}
    m = SimpleNamespace(columns=columns)
    pixels = SimpleNamespace(many=lambda rows: iter(x.numpy()[rows]))
    opened = SimpleNamespace(manifest=m, train=np.array([0, 1, 3, 4]), pixels=pixels,
                             settings=SimpleNamespace(crop=0, flips=False),
                             model=SimpleNamespace(intensity={"low": [0.], "high": [2.]}))
    treatment = np.array(["p", "p", "q", "p", "r", "new"])
    read = evaluate.class_means(opened, np.array([0, 5]), treatment)
    scaled = torch.tensor([-1., 0., 1., 1., 1., 1.])  # values 0 to 2 as [-1, 1], clipped
    assert_close(read(np.array([0]))[0, 0, 0, 0], scaled[[0, 1, 3]].mean())  # its treatment
    assert_close(read(np.array([1]))[0, 0, 0, 0], scaled[[3, 4]].mean())     # its batch


def test_nearest_images_share_dose_and_batch():
    smiles = np.array(["CCO", "CCO", "CCO", "CCCCCCCC", "CCCO"])
    dose, batch = ["1", "10", "10", "10", "10"], ["A", "B", "A", "A", "A"]
    m = SimpleNamespace(columns={"batch": batch})
    opened = SimpleNamespace(manifest=m, train=np.arange(4))
    treatment = np.array([" x ".join(v) for v in zip(smiles, dose)])
    found = evaluate.nearest_images(opened, np.array([4] * 8), smiles, treatment)
    assert found.tolist() == [2] * 8


def test_sets_of_the_benchmark_by_name():
    def sets(names, wanted=None):
        m = SimpleNamespace(columns={"split": names}, path="m.csv")
        return {k: v.tolist() for k, v in evaluate.benchmark_sets(m, wanted).items()}
    assert sets(["train", "val", "test_scaffold", "test_substituent", "test_pair"]) == {
        "easy": [1], "hard": [2, 3]}
    published = ["train", "test_easy", "test_hard", "test_hard_ext10_unique"]
    assert sets(published) == {"test_easy": [1], "test_hard": [2], "test_hard_ext10_unique": [3]}
    assert sets(published, ["test_hard"]) == {"test_hard": [2]}
    with pytest.raises(data.DataError, match="no hard2 rows"):
        sets(published, ["hard2"])


def test_twins_come_from_other_wells():
    columns = {"plate": list("ppppqqqq"), "well": list("aabbccdd")}
    manifest = type("M", (), {"columns": columns, "__len__": lambda self: 8})()
    treatment = np.array(list("xxxxyyzz"))  # y and z have one well each
    a, b = evaluate.twins(manifest, np.arange(8), treatment, 4, 100)
    assert set(treatment[a]) == {"x"} and list(treatment[a]) == list(treatment[b])
    wells = evaluate.wells_of(manifest)
    assert not set(wells[a]) & set(wells[b])


def test_nearest_molecule_is_the_most_similar_one():
    training = ["CCO", "c1ccccc1C", "CCCCCCCC"]
    found = evaluate.nearest_molecules(["c1ccccc1CC", "CCCO"], training)
    assert found == {"c1ccccc1CC": "c1ccccc1C", "CCCO": "CCO"}


# --- published tables -----------------------------------------------------------------------------

def archive(path, seed=0, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(seed).integers(0, 255, (520, 696, 5), np.uint8)
    np.savez(path, sample=x, **more)
    return x


def split_table(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*data.MOL2IMAGE, "IMG_CNT_CELLS"])
        writer.writeheader()
        for key, smiles, inchikey in rows:
            plate, well, site = key.split("-")
            writer.writerow(dict(SAMPLE_KEY=key, BROAD_ID="B" + inchikey, PLATE_ID=plate,
                                 WELL_POSITION=well, SITE=site, SMILES=smiles, INCHIKEY=inchikey,
                                 IMG_CNT_CELLS=7))
    return path


def test_mol2image_download_becomes_a_manifest(tmp_path, cli):
    x = archive(tmp_path / "tar1" / "24277-A03-1.npz", label=np.array([{"a": 1}], object))
    archive(tmp_path / "tar2" / "deep" / "24277-B07-2.npz", 1)
    train = split_table(tmp_path / "datasplit_gen_train.csv", [
        ("24277-A03-1", "CCO", "K1"), ("24277-A05-1", "CCN", "K2")])
    hard = split_table(tmp_path / "datasplit_gen_test_hard.csv", [("24277-B07-2", "OCC", "K1")])
    maps = tmp_path / "maps"
    (maps / "platemap").mkdir(parents=True)
    (maps / "barcode_platemap.csv").write_text("Plate_Map_Name,Assay_Plate_Barcode\nM1,24277\n")
    (maps / "platemap" / "M1.txt").write_text(
        "well_position\tbroad_sample\tmmoles_per_liter\tsolvent\nA03\tBRD\t5.0\tDMSO\n"
        "B07\t\t\tDMSO\n")
    out = tmp_path / "made" / "manifest.csv"
    status, said, error = cli(data, "mol2image", tmp_path, train, hard, "--platemaps", maps,
                              "--val", 0, "--out", out)
    assert status == 0, error
    assert "1 listed images are not in" in said and "24277-A05-1" in said
    assert "1 molecules of test_hard are in train as well" in said  # one InChIKey, two SMILES
    order = "Mito,ER,RNA,AGP,DNA"
    assert order in said
    manifest = data.read_manifest(out, tuple(order.split(",")))
    assert manifest.columns["split"] == ["train", "test_hard"]
    assert manifest.columns["dose"] == ["5.0", "0"]
    assert manifest.columns["role"] == ["treated", "control"]
    assert (manifest.columns["row"], manifest.columns["column"]) == (["1", "2"], ["3", "7"])
    assert not any("CELLS" in name for name in manifest.columns)
    assert_close(data.Pixels(manifest)[0][3], x[:, :, 3].astype(np.float32))  # pickles untouched
    status, _, error = cli(data, "mol2image", tmp_path, train, "--out", out)
    assert status == 2 and "exists" in error


def test_wells_have_places():
    assert data.place("C05") == {"row": "3", "column": "5"}
    assert data.place("AF48") == {"row": "32", "column": "48"}
    assert data.place("somewhere") == {"row": "", "column": ""}


def load_data_table(path, plates):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["FileName_OrigDNA", "PathName_OrigDNA", "FileName_OrigER",
                         "PathName_OrigER", "FileName_IllumDNA", "Metadata_Plate", "Metadata_Well",
                         "Metadata_Site"])
        for plate, well in plates:
            name = f"{plate}_{well}"
            writer.writerow([f"{name}_d.tif", "/cloud/images", f"{name}_e.tif", "/cloud/images",
                             "illum.npy", plate, well, 1])
    return path


def test_load_data_tables_become_a_manifest(tmp_path, cli, refused):
    table = load_data_table(tmp_path / "csv" / "load_data.csv", [("P1", "A01"), ("P1", "B02")])
    (tmp_path / "images").mkdir()
    for well in ("A01", "B02"):
        for stain in "de":
            tifffile.imwrite(tmp_path / "images" / f"P1_{well}_{stain}.tif",
                             np.full((8, 8), ord(stain), np.uint16))
    wells, compounds = tmp_path / "well.csv.gz", tmp_path / "compound.csv"
    with gzip.open(wells, "wt") as file:
        file.write("Metadata_Plate,Metadata_Well,Metadata_JCP2022\nP1,A01,J1\nP1,B02,J2\n")
    compounds.write_text("Metadata_JCP2022,Metadata_SMILES\nJ1,CCO\n")
    out = tmp_path / "manifest.csv"
    words = ("load_data", table, "--root", f"/cloud={tmp_path}", "--join", f"{wells}:plate,well",
             f"{compounds}:jcp2022", "--out", out)
    status, said, error = cli(data, *words)
    assert status == 0, error
    assert "2 of 2 images matched on plate, well" in said and "1 of 2" in said
    manifest = data.read_manifest(out, ("DNA", "ER"))
    assert manifest.columns["smiles"] == ["CCO", ""] and manifest.columns["row"] == ["1", "2"]
    assert data.Pixels(manifest)[1][:, 0, 0].tolist() == [ord("d"), ord("e")]
    out.unlink()
    refused(data, *words[:-3], f"{compounds}:plate", "--out", out, says=["no column plate"])
    compounds.write_text("Metadata_JCP2022,Metadata_SMILES\nJ1,CCO\nJ1,CCN\n")
    refused(data, *words, says=["two different rows for jcp2022 J1"])
    refused(data, "load_data", compounds, "--out", out, says=["no column FileName_"])
    assert not out.exists()


real = pytest.mark.skipif(not SHARED.exists(), reason="no real plates beside this checkout")


@real
def test_the_real_split_tables_and_plate_maps_are_read(tmp_path, cli):
    """A raw field of Bray et al. in the form of the download: 8 bits per image and channel by its
    tenth-largest pixel, channels last."""
    field = [tifffile.imread(SHARED / "bray2017" / f"{n}.tif").astype(float) for n in (
        "Mito", "ERSyto", "ERSytoBleed", "Ph_golgi", "Hoechst")]
    top = [np.sort(x.ravel())[-10] for x in field]
    sample = np.stack([np.minimum(x * 256 / t, 255).astype(np.uint8)
                       for x, t in zip(field, top)], 2)
    easy = SHARED / "mol2image" / "datasplit_gen_test_easy.csv"
    keys = [row["SAMPLE_KEY"] for row in data.read_table(easy)]
    for key in keys[:3]:
        np.savez(tmp_path / f"{key}.npz", sample=sample)
    out = tmp_path / "manifest.csv"
    status, said, error = cli(data, "mol2image", tmp_path, easy, "--platemaps",
                              SHARED / "bray2017" / "platemaps" / "CDRP", "--out", out)
    assert status == 0, error
    assert f"{len(keys) - 3} listed images" in said
    manifest = data.read_manifest(out, ("Mito", "ER", "RNA", "AGP", "DNA"))
    assert set(manifest.columns["split"]) == {"test_easy"} and "" not in manifest.columns["dose"]
    pixels = data.Pixels(manifest)
    assert pixels[0].shape == (5, 520, 696) and pixels.dtype_range(0) == 255
    for k, name in enumerate(("Mito", "ERSyto", "ERSytoBleed", "Ph_golgi", "Hoechst")):
        raw = tifffile.imread(SHARED / "bray2017" / f"{name}.tif").astype(float)
        assert np.corrcoef(pixels[0][k].ravel(), raw.ravel())[0, 1] > .99  # each under its name


@real
def test_jump_tables_join_a_load_data_table(tmp_path, cli):
    jump = SHARED / "jump"
    first = data.read_table(jump / "well_2022-12-22_commit81fd6c6.csv.gz")[0]
    table = load_data_table(tmp_path / "load_data.csv", [
        (first["Metadata_Plate"], first["Metadata_Well"])])
    status, said, error = cli(
        data, "load_data", table, "--out", tmp_path / "m.csv", "--join",
        f"{jump}/well_2022-12-22_commit81fd6c6.csv.gz:plate,well",
        f"{jump}/compound_smiles_115795.csv.gz:jcp2022",
        f"{jump}/perturbation_control.csv:jcp2022")
    assert status == 0, error
    row = data.read_table(tmp_path / "m.csv")[0]
    assert row["source"] == first["Metadata_Source"] and row["smiles"]


def large_fields(folder):
    """A manifest of four fields of at least 512 pixels: real ones of LINCS where they are, else
    simulated ones side by side."""
    path = folder / "manifest.csv"
    if SHARED.exists():
        rows = data.read_table(SHARED / "lincs" / "index.csv")[:4]
        data.write_manifest(path, [{c: SHARED / "lincs" / row[c] for c in data.CHANNELS}
                                   for row in rows])
        return path
    screen = data.Screen()
    row = dict(row=8, column=12, site=1, batch="B1", plate="P01", true_mechanism="none",
               true_effect=0.)
    field = data.draw_field(row, screen, data.microscope(screen), [1], False)["image"]
    np.save(folder / "image.npy", np.tile(field, (4, 1, 9, 9)))  # (4, 5, 576, 576)
    data.write_manifest(path, [{"image": "image.npy", "index": i} for i in range(4)])
    return path


def test_presets_of_the_posters_size(tmp_path, cli, refused, monkeypatch):
    """512x512 pixels of five channels to 64x64x8 and to 128x128x1 numbers, through the real
    script: two steps."""
    monkeypatch.setattr(train_vae, "draw_reconstruction", lambda *_: None)  # drawn by other tests
    words = ("--data", large_fields(tmp_path), "--width", 8, "--blocks", 1, "--steps", 2,
             "--batch", 1, "--split", "image", "--holdout", .25)
    for preset in ("64x64x8", "128x128x1"):
        status, said, error = cli(train_vae, "--preset", preset, "--out", tmp_path / preset, *words)
        assert status == 0, error
        assert "peak memory" in said
        found, content = train_vae.load_vae(tmp_path / preset / "model.pt")
        z = found.to_latent(torch.zeros(1, 5, 512, 512))
        assert "x".join(str(z.shape[k]) for k in (2, 3, 1)) == preset
        assert found.to_image(z).shape[1:] == (5, 512, 512)
        assert content["settings"]["crop"] == 512 and found.config.width == 8  # stated: it wins
    refused(train_vae, "--preset", "32x32x32", says=["64x64x8, 128x128x1"])
