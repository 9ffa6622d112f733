"""Measures against shapes and sums whose answer is known; what is compared with what; and the
commands quality, disentangle and conditions on a tiny model."""
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import data
import evaluate
import train_ldm
from evaluate import (Asked, condition_distance, conditions_of, distance_table, interval,
                      kernel_distance, omega_squared, wells_of)

CHANNELS = list(data.CHANNELS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def disc(y, x, a, b=None, side=64):
    """An ellipse with half axes a (vertical) and b, antialiased a little."""
    yy, xx = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    d = (((yy - y) / a) ** 2 + ((xx - x) / (b or a)) ** 2).sqrt()
    return (((1.1 - d) / .2).clamp(0, 1) * .8 + .05)[None]


def test_nuclei_are_counted_parted_and_left_out_of_noise():
    centres = [(10, 10), (10, 19), (30, 40), (50, 12), (52, 50)]
    labels = evaluate.segment_nuclei(torch.stack([disc(*c, 4.5) for c in centres]).amax(0))
    assert len({int(labels[0, y, x]) for y, x in centres}) == labels.max() == len(centres)
    assert evaluate.segment_nuclei(disc(32, 32, 10).clamp(max=.6), radius=8.).max() == 1  # flat
    assert evaluate.segment_nuclei(.05 + .006 * normal(2, 64, 64).float()).max() == 0
    _, area, eccentricity = evaluate.objects((disc(32, 32, 8, 5) > .45).long())
    assert_close(area[0, 0].item(), np.pi * 8 * 5, atol=15, rtol=0)
    assert_close(eccentricity[0, 0].item(), (1 - (5 / 8) ** 2) ** .5, atol=.03, rtol=0)


def test_counts_on_simulated_fields_agree_with_the_truth_in_any_batch():
    row = dict(row=5, column=5, site=1, batch="B1", plate="P01", true_mechanism="none",
               true_effect=0.)
    drawn = list(data.draw_fields([row] * 40, data.Screen(), counterpart=False))
    images = torch.from_numpy(np.stack([d["image"] for d in drawn])).float() / 127.5 - 1
    true = np.array([d["truth"]["true_nuclei"] for d in drawn])
    found = evaluate.features(images, CHANNELS)
    assert_close(found, evaluate.features(images, CHANNELS, batch=3), equal_nan=True, atol=1e-4,
                 rtol=1e-4)
    assert abs(found[:, 0].sum() / true.sum() - 1) < .1  # touching nuclei are seen as one at times
    assert np.corrcoef(found[:, 0], true)[0, 1] > .9


def test_kernel_distance_is_the_sum_over_pairs_and_unbiased():
    a, b = [*normal(6, 4)], [*normal(5, 4, seed=1) + 1]

    def k(x, y):
        return np.mean([((p @ q).item() / 4 + 1) ** 3 for p in x for q in y if p is not q])
    assert_close(kernel_distance(torch.stack(a), torch.stack(b)), k(a, a) + k(b, b) - 2 * k(a, b))
    same = [kernel_distance(normal(20, 8, seed=s), normal(20, 8, seed=s + 999)) for s in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 200 ** .5


def test_distance_per_condition_sees_what_a_pooled_distance_cannot():
    cond = [("golgi", "B1")] * 40 + [("actin", "B2")] * 40
    a, b = (normal(80, 6, seed=s) * .3 + torch.tensor([[1.]] * 40 + [[-1.]] * 40) for s in (0, 1))
    shuffled = torch.cat([a[40:], a[:40]])  # the same images under the wrong condition
    assert_close(kernel_distance(shuffled, b), kernel_distance(a, b), atol=1e-5, rtol=0)
    wrong = condition_distance(shuffled, b, cond, cond)
    assert wrong > 20 * abs(condition_distance(a, b, cond, cond))
    assert_close(condition_distance(a, b, cond, cond, wrong=True), wrong)


def test_intervals_of_distances_are_of_the_right_width_for_odd_numbers_of_wells():
    """20 conditions with three wells a side, drawn again and again."""
    cond, found, widths = [c for c in range(20) for _ in range(3)], [], []
    mean = normal(20, 30).repeat_interleave(3, 0)
    for s in range(60):
        a, b = (mean + shift + normal(60, 5, seed=s + k) @ normal(5, 30) * .35
                for k, shift in ((1000, .5), (2000, 0.)))
        line = distance_table({"x": a}, b, cond, cond)["x"]
        assert_close(line["distance"], condition_distance(a, b, cond, cond))
        found.append(line["distance"])
        widths.append(np.ptp(line["distance_interval"]))
    assert .75 < np.mean(widths) / (2 * 1.64 * np.std(found)) < 1.35


def test_the_score_is_the_share_of_the_way_from_the_copied_control():
    cond, effect = [("x",)] * 40 + [("y",)] * 40, torch.tensor([[2.]] * 40 + [[-2.]] * 40)
    b, truth, copy = (normal(80, 12, seed=s) * .2 + k * effect for s, k in enumerate((1, 1, 0)))
    table = distance_table({"truth": truth, "copy": copy, "half": (truth + copy) / 2}, b, cond,
                           cond, "copy")
    assert abs(table["truth"]["score"] - 1) < .02 and table["copy"]["score"] == 0
    low, high = table["half"]["score_interval"]
    assert 0 < low < table["half"]["score"] < high < 1
    # where a copy is as good as the truth there is no way to go
    assert "score" not in distance_table({"copy": truth}, b, cond, cond, "copy")["copy"]


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x, wells = normal(5).numpy().repeat(2), np.arange(5).repeat(2)   # two sites of each well
    error = x[::2].std(ddof=1) / 5 ** .5
    assert_close(interval(lambda i: {"m": x[i].mean()}, wells, np.zeros(10))["m"],
                 [x.mean() - 1.64 * error, x.mean() + 1.64 * error])
    assert np.ptp(interval(lambda i: {"m": x[i].mean()}, wells, wells)["m"]) == 0


def test_spread_sees_mode_collapse_within_conditions():
    x, cond = normal(400, 6), np.repeat(np.arange(100), 4)
    means, spread = evaluate.moments(x, cond)
    assert_close(evaluate.moments(x / 2 + 3, cond)[1] / spread, .25)
    assert evaluate.moments(means.repeat_interleave(4, 0), cond)[1] < 1e-6 * spread


def factorial(biology, experiment, interaction=0., block=0., noise=1., n=40, seed=0):
    """y (6, 5, n, 1) with effects of these standard deviations."""
    def effect(size, *shape):
        x = normal(*shape, seed=seed + sum(shape))
        for side in range(3):
            x = x - x.mean(side, keepdim=True) if shape[side] > 1 else x
        return size * x / x.std(correction=0)
    return (effect(biology, 6, 1, 1) + effect(experiment, 1, 5, 1) + effect(interaction, 6, 5, 1)
            + effect(block, 1, 1, n) + noise * normal(6, 5, n, seed=seed))[..., None]


def test_omega_squared_recovers_known_shares():
    found, total = omega_squared(factorial(2., 1., .5, n=2000)), 4 + 1 + .25 + 1
    for name, share in ("biology", 4), ("experiment", 1), ("interaction", .25):
        assert_close(found[name].item(), share / total, atol=.01, rtol=0)
    none = [omega_squared(factorial(0., 0., n=4, seed=s))["interaction"].item() for s in range(200)]
    assert abs(np.mean(none)) < 3 * np.std(none) / 200 ** .5 + .002  # eta squared would be 0.17
    blocked = omega_squared(factorial(1., 0., block=3., noise=.1))["experiment"].item()
    assert abs(blocked) < 1e-3  # the block of a seed is no error


def test_leaks_count_each_side_on_the_others_features_and_subtract_the_truth():
    truth = {"biology": torch.tensor([.6, .1, .02]), "experiment": torch.tensor([.2, .7, .01])}
    found = {"biology": torch.tensor([.5, .4, .9]), "experiment": torch.tensor([.3, .5, .9])}
    # feature 0 is biology's, 1 is the experiment's, 2 is nobody's
    assert_close(evaluate.leaks(found, truth), {"leak_e_to_b": .1, "leak_b_to_e": .3})


def test_effect_size_is_the_projection_on_the_true_effect():
    true = normal(6, 1, 1, 400)
    assert_close(evaluate.effect_size(1.5 * true + 7, true, true), 1.5)  # an offset is no effect
    one, other, y = (true + normal(6, 1, 1, 400, seed=s) for s in (1, 2, 3))
    assert abs(evaluate.effect_size(y, one, other) - 1) < .1  # against one alone it would be 1/2


@pytest.fixture(scope="module")
def run(ldm_path):
    return evaluate.open_run(str(ldm_path))


def table_of(well, **columns):
    """A manifest of these columns."""
    return data.Manifest("m.csv", {"well": well} | columns, None, (), well, {})


@pytest.mark.parametrize("wells, images, crop, count", [
    (4, 8, 64, 2), (1, 8, 0, 4), (1, 3, 64, 6), (1, 3, 0, 0)])
def test_where_wells_are_too_few_images_are_the_unit(wells, images, crop, count, capsys):
    table = table_of([f"A{i % wells}" for i in range(images)], c=["x"] * images)
    a, b = evaluate.split_wells(table, range(images), conditions_of(table, ["c"]), 6, crop=crop)
    assert not set(a) & set(b) and len(a) == len(b) == count
    assert ("the units are images" in capsys.readouterr().out) == (wells == 1)
    assert wells == 1 or len(set(wells_of(table)[np.r_[a, b]])) == 4  # one image a well


def test_weak_doses_and_controls_count_for_no_mechanism():
    classifier = SimpleNamespace(choose=lambda images: {
        "true_mechanism": np.array(["golgi"] * 3), "batch": np.array(["B1"] * 3)})
    rows = [dict(true_mechanism=m, true_effect=e, batch="B1") for m, e in (
        ("golgi", "0.9"), ("actin", "0.6"), ("golgi", "0.2"))]
    hits = evaluate.recognised(classifier, torch.zeros(3, 1, 4, 4), rows)
    assert hits["mechanism"].nanmean() == .5 and hits["batch"].tolist() == [1, 1, 1]


def test_groups_that_a_model_was_not_told_have_no_scale():
    run = SimpleNamespace(model=SimpleNamespace(
        groups=["biology"], generate=lambda *_, guidance, **__: guidance))
    asked = Asked(guidance=dict(biology=2., experiment=3.))
    assert evaluate.ask(run, {}, [0], asked) == {"biology": 2.}


def test_a_control_of_the_same_batch_is_copied_from_another_well(run):
    m, conditions = run.manifest, conditions_of(run.manifest, ("true_mechanism", "batch"))
    asked = [("golgi", "B1")] * 5 + [("actin", "B2")] * 5
    rows = evaluate.copied_controls(run, conditions, asked)
    assert m.rows(rows, "batch") == ["B1"] * 5 + ["B2"] * 5 and set(rows) <= set(run.train)
    assert set(m.rows(rows, "role")) == {"control"} and len(set(wells_of(m)[rows])) == 10
    assert evaluate.copied_controls(run, conditions, [("golgi", "B9")]) is None


def test_crossed_rows_show_the_same_cells_everywhere_and_only_seen_molecules():
    screen = data.Screen(batches=3, size=32)
    rows, seen = evaluate.crossed_rows(screen, 4), {data.DMSO}
    seen |= {m["smiles"] for m in data.molecules() if m["kind"] == "train"}
    assert len(rows) == 9 * 3 * 4 and {r["smiles"] for r in rows} <= seen
    assert all(r["true_effect"] >= .5 for r in rows if r["true_mechanism"] != "none")
    same = [data.draw_field(r, screen, data.microscope(screen), [1, r["cells"]], False)["truth"]
            for r in rows if r["true_mechanism"] == "none" and r["cells"] == 0]
    assert len(same) == 3 and len({t["true_nuclei"] for t in same}) == 1


@pytest.fixture(scope="module")
def truth(run):
    with pytest.MonkeyPatch.context() as patch:
        blind = SimpleNamespace(choose=lambda x: {
            "true_mechanism": np.array(["none"] * len(x)), "batch": np.array(["B1"] * len(x))})
        patch.setattr(evaluate, "reference_classifier", lambda run: blind)
        return evaluate.Truth(run, evaluate.Disentangle(images=108))


def test_combinations_are_drawn_on_the_same_noise(run, truth, monkeypatch):
    monkeypatch.setattr(evaluate, "ask", lambda _, columns, seeds, args: (columns["batch"], seeds))
    assert truth.draw(run.model, Asked(), truth.places[3:5, 1]) == (["B2"] * 8, [0, 1, 2, 3] * 2)


def test_seen_and_heldout_combinations_are_told_apart(run, truth, monkeypatch):
    """A model that draws what it should on seen combinations only."""
    columns, seen = run.manifest.columns, truth.parts["_seen"]
    trained = {(columns["true_mechanism"][i], columns["batch"][i]) for i in run.train}
    held = {(truth.rows[i]["true_mechanism"], truth.rows[i]["batch"])
            for i in truth.places[~seen][:, 0]}
    assert len(held) == 16 and not held & trained
    right = seen[:, :, None].expand(truth.places.shape).float()
    monkeypatch.setattr(truth, "see", lambda *_: (truth.sample, {"mechanism": right}))
    monkeypatch.setattr(truth, "draw", lambda *_, **__: truth.images)
    monkeypatch.setattr(truth, "hits", {"mechanism": torch.ones_like(right)})
    line = evaluate.disentangle_line(truth, run.model, Asked())
    assert (line["mechanism_seen"], line["mechanism_heldout"]) == (1., 0.)
    assert line["mechanism_heldout_best"] == 1. and 0 < line["mechanism"] < 1


def test_a_model_has_one_scale_for_all_its_seeds():
    """Near the least mean distance the best recognised; what one seed alone likes counts little."""
    one, other = ([dict(distance=d, recognised=r) for d, r in zip(distances, (.5, .7, read))]
                  for distances, read in (((4., 4.1, 4.2), .8), ((4., 4.2, 5.8), .9)))
    assert evaluate.best_scales(["1", "2", "3"], [one]) == "3"
    assert evaluate.best_scales(["1", "2", "3"], [one, other]) == "2"


def test_a_study_goes_on_and_measures_again_what_has_changed(tmp_path, run, monkeypatch):
    path, asked = tmp_path / "d" / "lines.jsonl", []

    def measure(x):
        return asked.append(x) or {"y": x / 2, "none": float("nan")}

    def study(args=Asked(), run=run, **settings):
        return evaluate.study(path, {k: dict(x=x) for k, x in settings.items()}, measure,
                              evaluate.digest(args, run))
    lines = study(one=1, two=2)
    path.write_text(path.read_text()[:-5])                           # a kill while it was written
    assert study(one=1, two=2, three=3)[:2] == lines and lines[0]["none"] is None
    study(Asked(out="elsewhere"), one=1)
    assert asked == [1, 2, 2, 3]
    study(Asked(nucleus_radius=6.), one=1)
    study(run=SimpleNamespace(sha1="0", manifest=run.manifest), one=1)  # another checkpoint
    monkeypatch.setattr(evaluate, "CODE", ["other code"])
    study(one=1)
    assert asked[4:] == [1, 1, 1]


@pytest.mark.parametrize("words, says", [
    (["disentangle", "--study", "models", "--checkpoint", "x.pt"], "--checkpoint"),
    (["conditions", "--encoders", "--data", "x.csv"], "--data"),
    (["quality", "--interval", "1", "0"], "interval"), (["quality", "--interval", "1"], "interval"),
    (["quality", "--guidance", "a"], "numbers"), (["disentangle", "--study", "pairs"], "pairs")])
def test_options_without_use_are_refused(words, says, refused):
    refused(evaluate, *words, says=[says])


@pytest.fixture
def call(cli, monkeypatch, tmp_path, tmp_path_factory, ldm_path, truth):
    """call(*words) of evaluate.py, with a reference classifier after three steps, that is kept, and
    one truth for all, what is written in tmp_path: (what is printed)."""
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    monkeypatch.setattr(evaluate, "reference_classifier", functools.partial(
        evaluate.reference_classifier, steps=3))
    monkeypatch.setattr(evaluate.Truth, "__init__", lambda self, *_: vars(self).update(vars(truth)))
    monkeypatch.setattr(evaluate, "SCALES", evaluate.SCALES[:2])
    monkeypatch.setattr(evaluate, "train_model", lambda args, base, name, *_: dict(
        path=str(ldm_path), sha1=name))

    def called(*words):
        status, out, error = cli(evaluate, *words, "--out", tmp_path)
        assert status == 0, error
        return out
    return called


def test_quality_command(ldm_path, call, refused, tmp_path):
    words = ["quality", "--checkpoint", ldm_path, "--quick", "--steps", 1]
    call(*words)
    report = json.loads((tmp_path / "quality.json").read_text())
    table, everything = report["table"], report["all"]["generated, biology 1, experiment 1"]
    assert {"told apart, 1/2", "power 5"} <= set(everything)
    assert list(table) == list(evaluate.HELD_OUT.values()) and len(table["unseen wells"]) == 6
    line = table["unseen scaffolds"]["generated, biology 1, experiment 1"]
    assert {"distance", "distance_interval", "spread", "mechanism", "batch"} <= set(line)
    refused(evaluate, *words, "--guidance", "image=2", says=["image"])
    refused(evaluate, *words, "--by", "compund", says=["compund"])


def test_held_out_rows_are_compared_and_all_images_where_these_are_too_few():
    table = table_of([*map(str, range(24))], c=list("xy") * 12, dose=["0"] * 4 + ["1"] * 20)
    for held, name in (range(16), "held out"), (range(6), evaluate.TRAINED):
        run = SimpleNamespace(manifest=table, held=np.array(held),
                              settings=SimpleNamespace(split="auto", crop=0))
        halves = evaluate.heldout_halves(run, conditions_of(table, ["c"]), 100)
        rows = np.concatenate(halves[name])
        assert list(halves) == [name] and min(rows) > 3  # no negative control
        assert set(rows) <= set(held) or name == evaluate.TRAINED


def test_disentangle_command_measures_once(ldm_path, call, tmp_path, truth):
    for study, count in ("model", 1), ("scales", 3), ("transfer", 5), ("scales", 5):
        call("disentangle", "--checkpoint", ldm_path, "--quick", "--study", study, "--steps", 1)
        lines = (tmp_path / "results.jsonl").read_text().splitlines()
        assert len(lines) == count + 1
    last = json.loads(lines[-1])  # every seed is edited, and the interval is over them
    assert last["images"] == 8 * truth.places[0].size and np.ptp(last["intervals"]["moved"]) > 0


def test_models_are_compared_at_their_own_best_scale(vae_path, call, tmp_path):
    out = call("disentangle", "--study", "models", "--vae", vae_path, "--models", "joint",
               "balanced", "--confounding", .9, "--seeds", 0, "--steps", 1)
    assert (tmp_path / "heldout_combinations.png").exists() and "balanced, 0.9, 0 (" in out
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert sum("tried" in line for line in lines) == 2 + 4  # balanced without nesting as well


def test_the_shortcut_has_one_classifier_for_every_training_set(vae_path, call, monkeypatch):
    asked, levels, shown = [], [], []  # a level of brightness for each batch

    def grey(values):
        return torch.tensor(values)[:, None, None, None].expand(-1, 5, 32, 32)
    monkeypatch.setattr(evaluate, "rendered", lambda rows, *_: grey(
        [float(r["batch"][1]) for r in rows]))
    monkeypatch.setattr(evaluate, "ask", lambda _, c, seeds, __: grey([7.] * len(seeds)))
    monkeypatch.setattr(evaluate.Model, "edit", lambda _, images, *told, **__: asked.extend(
        told) or grey([8.] * len(images)))

    def train(images, rows, *_):
        levels.append((len(images), len(rows), images.unique().tolist()))
        return SimpleNamespace(choose=lambda x: shown.append(len(x.unique())) or {
            "true_mechanism": np.array(["none"] * len(x))})
    monkeypatch.setattr(evaluate, "train_classifier", train)
    call("disentangle", "--study", "shortcut", "--vae", vae_path, "--quick")
    source, target, _ = asked
    assert source["smiles"] == target["smiles"] and source["batch"] != target["batch"]
    every, standardised = [1., 2., 3.], levels[3][2]
    assert levels == [(540, 540, x) for x in (every, [7.], [8.], standardised, every)]
    assert len(standardised) == 1 and shown == [3, 3, 3, 1, 3]  # it is tested alike


def test_conditions_command_names_what_is_not_used(ldm_path, call, tmp_path):
    out = call("conditions", "--checkpoint", ldm_path, "--quick", "--steps", 1)
    table = json.loads((tmp_path / "conditions.json").read_text())["table"]
    assert list(table) == ["smiles", "dose", "batch", "plate", "row", "column", "all of biology",
                           "all of experiment"]
    assert out.count("hardly used") > 2


def test_encoders_command(ldm_path, call, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train_ldm, "train", lambda config: asked.append(config) or ldm_path)
    call("conditions", "--encoders", "--names", "graph", "--seeds", 0, "--images", 16, "--steps", 1)
    assert [c.molecule_encoder for c in asked] == ["graph"]
    line = json.loads((tmp_path / "encoders.jsonl").read_text().splitlines()[-1])
    assert line["unseen scaffolds: correlation, best"] > .3
