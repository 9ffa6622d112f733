"""Metrics against shapes and sums whose answer is known."""
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import data
import evaluate
from evaluate import (Standardise, cell_distance, feature_names, features, kernel_distance,
                      object_shapes, otsu, segment_nuclei, variance_ratio,
                      wrong_cell_distance)


def disc(y, x, a, b=None, side=64):
    """An ellipse with half axes a (vertical) and b, antialiased a little."""
    yy, xx = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    d = (((yy - y) / a) ** 2 + ((xx - x) / (b or a)) ** 2).sqrt()
    return ((1.1 - d) / .2).clamp(0, 1) * .8 + .05


def test_otsu_of_two_levels_lies_in_the_middle():
    x = torch.cat([torch.full((1, 8, 8), .2), torch.full((1, 8, 24), .8)], 2)
    assert_close(otsu(x).item(), .5, atol=.02, rtol=0)


def test_nuclei_are_counted_and_touching_ones_are_parted():
    centres = [(10, 10), (10, 19), (30, 40), (50, 12), (52, 50)]
    dna = torch.stack([disc(y, x, 4.5) for y, x in centres]).amax(0)
    labels = segment_nuclei(dna[None])
    assert len(labels.unique()) == 1 + len(centres)
    assert len({int(labels[0, y, x]) for y, x in centres}) == len(centres)


def test_a_saturated_nucleus_is_one():
    assert segment_nuclei(disc(32, 32, 10)[None].clamp(max=.6), radius=8.).max() == 1


def test_an_empty_field_has_no_nuclei():
    noise = .05 + .006 * torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    assert segment_nuclei(noise).max() == 0


def test_area_and_eccentricity_of_an_ellipse():
    dna = disc(32, 32, 8, 5)[None]
    area, eccentricity = object_shapes((dna > .45).long())
    assert_close(area[0, 0].item(), np.pi * 8 * 5, atol=15, rtol=0)
    assert_close(eccentricity[0, 0].item(), (1 - (5 / 8) ** 2) ** .5, atol=.03, rtol=0)


def test_counts_on_simulated_fields_agree_with_the_truth():
    screen = data.Screen()
    optics = data.microscope(screen)
    row = dict(row=5, column=5, site=1, batch="B1", plate="P01", true_mechanism="none",
               true_effect=0.)
    drawn = [data.draw_field(row, screen, optics, [7, i], counterpart=False) for i in range(60)]
    images = torch.from_numpy(np.stack([d["image"] for d in drawn])).float() / 127.5 - 1
    counted = features(images, list(data.CHANNELS))[:, 0].numpy()
    true = np.array([d["truth"]["true_nuclei"] for d in drawn])
    assert abs(counted.sum() / true.sum() - 1) < .1  # touching nuclei are sometimes seen as one
    assert np.corrcoef(counted, true)[0, 1] > .9


def test_features_do_not_depend_on_the_batch():
    images = torch.rand(10, 5, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together, apart = (features(images, list(data.CHANNELS), batch=b) for b in (10, 3))
    assert together.shape == (10, len(feature_names(data.CHANNELS)))
    assert_close(together, apart, equal_nan=True, atol=1e-4, rtol=1e-4)


def test_features_see_every_channel():
    images = torch.rand(1, 5, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    names, before = feature_names(data.CHANNELS), features(images, list(data.CHANNELS))[0]
    for k, channel in enumerate(data.CHANNELS):
        brighter = images.clone()
        brighter[:, k] += .2
        change = (features(brighter, list(data.CHANNELS))[0] - before).nan_to_num(0)
        means = {c: change[names.index(f"{c}_mean")].abs().item() for c in data.CHANNELS}
        assert max(means, key=means.get) == channel and means[channel] > .05


def test_kernel_distance_is_the_sum_over_pairs():
    a, b = torch.randn(6, 4), torch.randn(5, 4) + 1
    def k(x, y):
        return ((x @ y).item() / 4 + 1) ** 3
    aa = np.mean([k(a[i], a[j]) for i, j in itertools.permutations(range(6), 2)])
    bb = np.mean([k(b[i], b[j]) for i, j in itertools.permutations(range(5), 2)])
    ab = np.mean([k(x, y) for x in a for y in b])
    assert_close(kernel_distance(a, b), aa + bb - 2 * ab, atol=1e-4, rtol=1e-4)


def test_kernel_distance_is_unbiased():
    rng = torch.Generator().manual_seed(0)
    same = [kernel_distance(torch.randn(20, 8, generator=rng), torch.randn(20, 8, generator=rng))
            for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 200 ** .5
    assert kernel_distance(torch.randn(50, 8), torch.randn(50, 8) + 1) > 5 * np.std(same)


def test_distance_per_cell_sees_what_a_pooled_distance_cannot():
    rng = torch.Generator().manual_seed(0)
    cells = np.repeat(["golgi x B1", "actin x B2"], 40)
    centre = torch.tensor([[1.]] * 40 + [[-1.]] * 40)
    a, b = (torch.randn(80, 6, generator=rng) * .3 + centre for _ in range(2))
    shuffled = torch.cat([a[40:], a[:40]])  # the same images under the wrong condition
    assert_close(kernel_distance(shuffled, b), kernel_distance(a, b), atol=1e-5, rtol=0)
    assert cell_distance(shuffled, b, cells, cells) > 20 * abs(cell_distance(a, b, cells, cells))
    assert_close(cell_distance(shuffled, b, cells, cells),
                 wrong_cell_distance(a, b, cells, cells))


def test_ceiling_takes_cells_that_differ_in_every_part():
    x = torch.arange(6.)[:, None] * 10 + torch.randn(6, 8)
    cells = np.repeat(["golgi x B1", "golgi x B2", "actin x B2"], 2)
    far = [kernel_distance(x[:2], x[4:]), kernel_distance(x[4:], x[:2])]
    assert_close(wrong_cell_distance(x, x, cells, cells), float(np.mean(far)))


def test_variance_ratio_sees_mode_collapse_within_conditions():
    x, conditions = torch.randn(400, 6), np.repeat(np.arange(100), 4)
    assert_close(variance_ratio(x / 2 + 3, x, conditions, conditions), .25)
    means = x.view(100, 4, 6).mean(1, keepdim=True).expand(-1, 4, -1).reshape(400, 6)
    assert variance_ratio(means, x, conditions, conditions) < 1e-6


def test_standardise_fills_what_is_missing_with_the_mean():
    real = torch.tensor([[1., 2.], [3., torch.nan], [5., 6.]])
    out = Standardise(real)(real)
    assert_close(out.mean(0), torch.zeros(2))
    assert out[1, 1] == 0 and Standardise(real)(real * 1e6).max() == 3


def test_halves_share_no_well(screen):
    manifest = data.read_manifest(screen)
    cells = evaluate.cells_of(manifest, ["true_mechanism"])
    a, b = evaluate.halves(manifest, np.arange(len(manifest)), cells, 200)
    wells = evaluate.wells_of(manifest)
    assert len(a) == len(b) > 50 and not set(wells[a]) & set(wells[b])
    few, _ = evaluate.halves(manifest, np.arange(len(manifest)), cells, 40)
    assert len(set(wells[few])) > 15  # from many wells, not all sites of a few
    assert sorted(cells[a]) == sorted(cells[b])


def test_a_probe_learns_to_tell_bright_from_dark():
    rng = torch.Generator().manual_seed(0)
    truth = torch.randint(2, (200,), generator=rng)
    images = torch.randn(200, 2, 16, 16, generator=rng) * .3 + truth[:, None, None, None]
    probe = evaluate.train_probe(images[:150], {"light": ["dark", "bright"]},
                                 {"light": truth[:150]}, steps=30)
    said = evaluate.answer(probe, images[150:])["light"]
    assert (said == truth[150:]).float().mean() > .9


def test_a_probe_is_named_by_the_simulator_and_not_by_the_rest_of_data_py():
    code = evaluate.probe_source()
    assert "def draw_stains" in code and "def expose" in code and "def train_probe" in code
    assert "def read_manifest" not in code and "def picture" not in code


def test_interval_brackets_and_is_drawn_by_well():
    values, wells = np.arange(100.), np.repeat(np.arange(10), 10)
    one = np.zeros(100)

    def mean_over(wells, strata, values):
        return evaluate.over_wells(lambda m: {"mean": values[m].mean()}, wells, strata)["mean"]
    low, high = mean_over(wells, one, values)
    assert low < values.mean() < high
    assert mean_over(one, one, values) == [49.5, 49.5]
    # a stratum of one well stays in every subset
    first = evaluate.over_wells(lambda m: {"first": m[:10].mean()}, wells, (wells > 0) + 0.)
    assert first == {"first": [1., 1.]}


@pytest.mark.parametrize("n", [1, 5])
def test_nearest_distance_of_a_copy_is_zero(n):
    training = torch.randn(20, 2, 8, 8)
    assert_close(evaluate.nearest_distance(training[:n], training), torch.zeros(n), atol=1e-3,
                 rtol=0)
    assert_close(evaluate.nearest_distance(training[:n] + .1, training), torch.full((n,), .1),
                 atol=1e-3, rtol=0)


def test_a_plate_that_training_never_saw_is_asked_for_as_unknown():
    asked, plate = [], SimpleNamespace(name="plate", kind="category", vocabulary=["P1"])
    opened = SimpleNamespace(model=SimpleNamespace(
        fields=[plate], generate=lambda columns, *_, **__: asked.append(columns)))
    args = SimpleNamespace(also=None, guidance={}, form="nested", steps=1, sampler="dpm",
                           interval=(0., 1.))
    for value in ("P1", "P2"):
        evaluate.drawn_and_real(opened, args, {"plate": value}, np.array([], int), 2, 2)
    assert asked == [{"plate": ["P1", "P1"]}, {"plate": ["", ""]}]


def test_a_table_lines_up_and_says_what_is_missing_with_a_blank(capsys):
    evaluate.print_table("set", {"distance": ".1f", "batch": ".2f"}, [
        ("real", (1.25, (.5, 2.)), None), ("generated", 10., .5)])
    assert capsys.readouterr().out.splitlines() == [
        "", "set                distance  batch", "real       1.2 (0.5 to 2.0)       ",
        "generated              10.0   0.50"]
