"""The disentanglement figures against factorials whose answer is known."""
import json
from dataclasses import make_dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import data
import evaluate
import sample
import train_ldm
import train_vae
from evaluate import balancing, effect_size, leaks, omega_squared, standardise_on_controls


def factorial(biology, experiment, interaction=0., block=0., noise=1., b=6, e=5, n=40, seed=0):
    """y (b, e, n, 1) with effects of these standard deviations."""
    rng = torch.Generator().manual_seed(seed)

    def effect(size, *shape):
        x = torch.randn(shape, generator=rng, dtype=torch.float64)
        return size * (x - x.mean()) / x.std(correction=0)
    both = torch.randn(b, e, generator=rng, dtype=torch.float64)
    both = both - both.mean(0) - both.mean(1, keepdim=True) + both.mean()
    y = (effect(biology, b)[:, None, None] + effect(experiment, e)[None, :, None]
         + (interaction * both / both.std(correction=0))[:, :, None]
         + effect(block, n) + noise * torch.randn(b, e, n, generator=rng, dtype=torch.float64))
    return y[..., None]


def test_omega_squared_recovers_known_shares():
    found = omega_squared(factorial(2., 1., .5, block=0., noise=1., n=2000))
    total = 4 + 1 + .25 + 1
    for name, share in (("biology", 4 / total), ("experiment", 1 / total),
                        ("interaction", .25 / total)):
        assert_close(found[name].item(), share, atol=.01, rtol=0)


def test_omega_squared_by_hand():
    # 2 x 2 x 2 without blocks: SS_A = 8 * 1 = 8, SS_B = 0, SS_AB = 0, error SS = 8 * .25 = 2, df 4
    y = torch.tensor([[[.5, -.5], [.5, -.5]], [[2.5, 1.5], [2.5, 1.5]]])[..., None]
    found = omega_squared(y, blocked=False)
    assert_close(found["biology"].item(), (8 - .5) / (10 + .5))
    assert_close(found["experiment"].item(), (0 - .5) / (10 + .5))


def test_omega_squared_of_nothing_is_nothing():
    found = [omega_squared(factorial(0., 0., n=4, seed=s))["interaction"].item()
             for s in range(300)]
    # eta squared would be df / (n - 1) = 20 / 119 = 0.17 here
    assert abs(np.mean(found)) < 3 * np.std(found) / 300 ** .5 + .002


def test_the_block_of_a_seed_is_no_error():
    y = factorial(1., 0., block=3., noise=.1)
    blocked, plain = omega_squared(y)["experiment"], omega_squared(y, blocked=False)["experiment"]
    assert abs(blocked.item()) < 1e-3 and plain.item() < -.002


def test_leaks_count_each_side_on_the_others_features_and_subtract_the_truth():
    truth = {"biology": torch.tensor([.6, .1, .02]), "experiment": torch.tensor([.2, .7, .01])}
    found = {"biology": torch.tensor([.5, .4, .9]), "experiment": torch.tensor([.3, .5, .9])}
    # feature 0 is biology's, 1 is the experiment's, 2 is nobody's
    assert_close(leaks(found, truth), {"leak_e_to_b": .3 - .2, "leak_b_to_e": .4 - .1})
    assert_close(leaks(truth, truth), {"leak_e_to_b": 0., "leak_b_to_e": 0.})


def test_effect_size_is_the_projection_on_the_true_effect():
    truth = torch.zeros(3, 2, 4, 5)
    truth[1, ..., 0], truth[2, ..., 1] = 2., -1.
    # an offset of all levels is no effect
    assert_close(effect_size(1.5 * truth + 7, truth, truth), 1.5)
    assert_close(effect_size(truth.roll(2, -1), truth, truth), 0.)


def test_noise_in_the_truth_does_not_shrink_the_effect():
    rng = torch.Generator().manual_seed(0)
    true = torch.randn(6, 1, 1, 400, generator=rng)
    one, other, y = (true + torch.randn(6, 1, 1, 400, generator=rng) for _ in range(3))
    assert abs(effect_size(y, one, other) - 1) < .1  # against one half alone it would be 1/2


def test_half_of_the_seeds_varies_as_the_whole_does():
    rng, widths, means = np.random.default_rng(0), [], []
    for _ in range(200):
        x = torch.from_numpy(rng.normal(size=30))
        low, high = evaluate.over_seeds(lambda s: {"m": x[s].mean().item()}, 30)["m"]
        widths.append(high - low)
        means.append(x.mean().item())
    expected = 2 * 1.645 * np.std(means)
    assert abs(np.mean(widths) / expected - 1) < .1


def test_balancing_makes_mechanism_and_batch_independent():
    rng = np.random.default_rng(0)
    mechanism = rng.integers(3, size=4000)
    batch = np.where(rng.random(4000) < .6, mechanism, rng.integers(3, size=4000))
    weight = balancing(mechanism, batch)
    joint = np.array([[weight[(mechanism == m) & (batch == b)].sum() for b in range(3)]
                      for m in range(3)])
    assert_close(joint, np.outer(joint.sum(1), joint.sum(0)), atol=1e-12, rtol=0)


def test_standardising_on_controls_removes_a_batch_but_not_a_treatment():
    rng = torch.Generator().manual_seed(0)
    clean = torch.randn(80, 2, 8, 8, generator=rng)
    control = torch.arange(80) % 2 == 0
    clean[~control] += 1.
    batch = np.where(np.arange(80) < 40, "B1", "B2")
    gain = torch.where(torch.arange(80) < 40, 1., 3.)[:, None, None, None]
    out = standardise_on_controls(clean * gain + gain, batch, control)
    means = [[out[torch.from_numpy(batch == b) & (control == c)].mean().item()
              for c in (True, False)] for b in ("B1", "B2")]
    assert_close(means[0], means[1], atol=.3, rtol=0)
    assert means[0][1] - means[0][0] > 1


@pytest.fixture(scope="module")
def opened(ldm_path):
    return evaluate.open_model(SimpleNamespace(checkpoint=str(ldm_path), data=None, steps=2,
                                               guidance={}))


def test_the_factorial_shows_the_same_cells_everywhere_and_only_seen_molecules(opened):
    factorial = evaluate.SimulatedFactorial(opened, 9 * 3 * 4)
    rows = factorial.rows()
    assert len(rows) == 9 * 3 * 4 and len({r["cells"] for r in rows}) == 4
    seen = {m["smiles"] for m in data.molecules() if m["kind"] == "train"} | {data.DMSO}
    assert {r["smiles"] for r in rows} <= seen
    assert all(r["true_effect"] >= .5 for r in rows if r["true_mechanism"] != "none")
    optics = data.microscope(factorial.screen)
    same = [data.draw_field(r, factorial.screen, optics, [1, r["cells"]], False)["truth"]
            for r in rows if r["true_mechanism"] == "none" and r["cells"] == 0]
    assert len(same) == 3 and len({t["true_nuclei"] for t in same}) == 1
    held = factorial.held("test")
    assert held.sum() == 8 and not held[0].any()


def test_no_heldout_pair_is_in_training(opened):
    factorial, columns = evaluate.SimulatedFactorial(opened, 9 * 3 * 4), opened.manifest.columns
    trained = {(columns["true_mechanism"][i], columns["batch"][i]) for i in opened.train}
    assert not trained & (factorial.unseen["test"] | factorial.unseen["val"])


def test_generated_places_share_their_noise_and_follow_the_request(opened):
    factorial = evaluate.SimulatedFactorial(opened, 9 * 3 * 4)
    request = dict(guidance={}, steps=2, sampler="ddim")
    images = evaluate.generate_places(opened.model, factorial, request)
    assert len(images) == 9 * 3 * 4
    where = torch.zeros(9, 3, dtype=torch.bool)
    where[4, 1] = True
    some = evaluate.generate_places(opened.model, factorial, request, where)
    assert_close(some, images.view(9, 3, 4, *images.shape[1:])[4, 1], atol=2e-2, rtol=0)


@pytest.fixture
def shared_truth(monkeypatch):
    """One truth for the studies of one checkpoint, drawn by the first of them."""
    def truth(opened, args, probe=True, real=evaluate.simulated_truth):
        if (args.images, probe) not in TRUTHS:
            TRUTHS[args.images, probe] = real(opened, args, probe)
        return TRUTHS[args.images, probe]
    monkeypatch.setattr(evaluate, "simulated_truth", truth)


TRUTHS = {}


def test_disentangle_writes_its_keys_and_skips_what_is_done(ldm_path, cli, tmp_path, monkeypatch,
                                                            shared_truth):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "screen_probe", lambda *_: None)
    arguments = ["disentangle", "--checkpoint", ldm_path, "--images", 108, "--steps", 1,
                 "--study", "weights", "--out", tmp_path / "d"]
    monkeypatch.setattr(evaluate, "WEIGHTS_TRIED", [(1, 1), (2, 1)])
    status, out, error = cli(evaluate, *arguments)
    assert status == 0, error
    lines = [json.loads(line) for line in (tmp_path / "d" / "results.jsonl").open()]
    wanted = {"form", "w_biology", "w_experiment", "step", "leak_e_to_b", "leak_b_to_e",
              "distance_seen", "distance_heldout", "floor", "ceiling"}
    assert len(lines) == 2 and wanted <= set(lines[0])
    assert (tmp_path / "d" / "weights.png").exists()
    monkeypatch.setattr(evaluate, "disentangle_one", None)  # a second run measures nothing
    assert cli(evaluate, *arguments)[0] == 0
    assert len((tmp_path / "d" / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("study", ["model", "forms", "samplers", "training", "transfer",
                                   "attribution"])
def test_studies_of_one_checkpoint(study, ldm_path, cli, tmp_path, monkeypatch, shared_truth):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "screen_probe", lambda *_: None if study not in (
        "transfer", "attribution") else pytest.fail("these ask no probe"))
    if study == "training":
        (tmp_path / "step-3.pt").write_bytes(ldm_path.read_bytes())
        (tmp_path / "model.pt").write_bytes(ldm_path.read_bytes())
        ldm_path = tmp_path / "model.pt"
    monkeypatch.setattr(evaluate, "study_transfer", partial(evaluate.study_transfer, steps=4))
    monkeypatch.setattr(evaluate, "FORMS_TRIED", [dict(form="control"), dict(
        form="nested", interval=(.2, .8), rescale=.7)])
    monkeypatch.setattr(evaluate, "SAMPLERS_TRIED", [
        dict(sampler=s, steps=3) for s in evaluate.SAMPLERS])
    status, out, error = cli(evaluate, "disentangle", "--checkpoint", ldm_path, "--images", 108,
                             "--steps", 1, "--study", study, "--out",
                             tmp_path / "d")
    assert status == 0, error
    lines = [json.loads(line) for line in (tmp_path / "d" / "results.jsonl").open()]
    assert len(lines) == {"model": 1, "forms": len(evaluate.FORMS_TRIED), "samplers": 3,
                          "training": 1, "transfer": 2, "attribution": 8}[study]
    if study == "samplers":  # each is drawn with its own
        assert [line["label"] for line in lines] == ["3 steps, ddim", "3 steps, ddpm",
                                                     "3 steps, dpm"]
        assert len({line["distance_seen"] for line in lines}) == 3
    if study == "attribution":
        assert {line["mechanism"] for line in lines} == set(data.MECHANISMS)
        assert np.shape(lines[0]["biology"]) == (4, 12)  # levels, batches x seeds


@pytest.mark.parametrize("study", ["transfer", "attribution"])
def test_studies_of_the_same_cells_want_the_simulator(study, ldm_path, tmp_path, refused):
    refused(evaluate, "disentangle", "--checkpoint", ldm_path, "--study", study, "--by", "smiles",
            "batch", "--out", tmp_path, says=["needs the simulator"])


def test_probes_are_told_apart_by_seen_and_heldout_pairs(opened, monkeypatch):
    """A model that draws what it should on seen pairs only; real images are read everywhere."""
    truth = evaluate.Truth(evaluate.SimulatedFactorial(opened, 108), more=1)
    seen = ~(truth.factorial.held("val") | truth.factorial.held("test"))
    hits = seen[:, :, None].float().expand(*seen.shape, truth.factorial.seeds)
    truth.named_right = lambda images: {"mechanism": hits}
    truth.scores = {"mechanism": torch.ones_like(hits)}
    monkeypatch.setattr(evaluate, "generate_places", lambda *_: truth.images)
    line = evaluate.disentangle_one(opened.model, truth, dict(
        form="nested", guidance={}, interval=(0, 1), rescale=0.))
    assert (line["probe_mechanism_seen"], line["probe_mechanism_heldout"]) == (1., 0.)
    assert line["probe_mechanism_seen_real"] == line["probe_mechanism_heldout_real"] == 1.
    assert 0 < line["probe_mechanism"] < 1


def test_attribution_is_read_pixel_by_pixel(monkeypatch, tmp_path, capsys):
    """A map that is the true difference correlates by 1, whatever its scale; its opposite by -1."""
    images = torch.rand(3, 3, 2, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    true = {m: (images[b] - images[0]).abs().mean(2).flatten(0, 1)       # (6, 8, 8)
            for b, m in ((1, "first"), (2, "second"))}
    biology = ["none", "first", "second"]

    def attribution(x, columns, levels):
        name, *others = set(columns["mechanism"])
        assert x.equal(images[biology.index(name)].flatten(0, 1)) and not others
        assert levels == (.2, .4) and columns["batch"] == ["B1", "B1", "B2", "B2", "B3", "B3"]
        return {"biology": torch.stack([true[name], 3 * true[name]]),
                "experiment": torch.stack([-true[name], true[name].flip(0)])}
    model = SimpleNamespace(fields=[SimpleNamespace(name="mechanism"), SimpleNamespace(
        name="batch")], groups=["biology", "experiment"], attribution=attribution)
    rows = [dict(mechanism=m, batch=f"B{e}") for m in biology for e in (1, 2, 3) for _ in range(2)]
    factorial = SimpleNamespace(biology=biology, experiment=["B1", "B2", "B3"], seeds=2,
                                rows=lambda: rows, truth=lambda half: images.flatten(0, 2))
    monkeypatch.setattr(evaluate, "finger", lambda _: "0")
    results = evaluate.Results(tmp_path / "results.jsonl")
    evaluate.study_attribution(SimpleNamespace(model=model), factorial, results, SimpleNamespace(
        checkpoint="", images=18), levels=(.2, .4))
    lines = list(results.done.values())
    assert [line["mechanism"] for line in lines] == ["first", "second"]
    for line in lines:
        assert_close(torch.tensor(line["biology"]), torch.ones(2, 6))
        assert_close(torch.tensor(line["experiment"][0]), -torch.ones(6))
        maps = true[line["mechanism"]].flatten(1)
        wanted = [np.corrcoef(x, y)[0, 1] for x, y in zip(maps.flip(0), maps)]
        assert_close(torch.tensor(line["experiment"][1]).double(), torch.tensor(wanted),
                     atol=1e-5, rtol=0)
    assert "1.00 (1.00 to 1.00)" in capsys.readouterr().out


def test_pair_shares_draw_every_pair_alike():
    fields = [SimpleNamespace(name=n, group=g, kind="category") for n, g in (
        ("smiles", "biology"), ("dose", "biology"), ("batch", "experiment"))]
    fields[1].kind = "log"
    columns = {"smiles": list("aaabbcx"), "batch": list("1121221"), "dose": list("1111110")}
    manifest = SimpleNamespace(rows=lambda rows, name: [columns[name][i] for i in rows],
                               columns=columns)
    share = train_ldm.pair_shares(fields, manifest, range(7), 1.)
    pairs = {}
    for s, pair in zip(share, zip(columns["smiles"], columns["batch"])):
        pairs[pair] = pairs.get(pair, 0) + s
    control = pairs.pop(("x", "1"))
    assert_close(control, 1 / 7)                       # the negative control keeps its share
    assert_close(list(pairs.values()), [6 / 7 / 5] * 5)
    assert train_ldm.pair_shares(fields, manifest, range(7), 0.) is None
    # serum at 0 is no dose at 0: that well is treated, and shares alike
    fields.append(SimpleNamespace(name="serum", group="experiment", kind="log"))
    columns["serum"] = list("0111101")
    assert_close(train_ldm.pair_shares(fields, manifest, range(7), 1.), share)


def test_arms_differ_in_what_they_are_told(screen, vae_path, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "screen_probe", lambda *_: None)
    monkeypatch.setattr(evaluate, "screen_of", lambda confounding: screen)
    assert evaluate.TRIED.keys() == evaluate.ARMS.keys()
    pictures, picture = [], data.picture
    monkeypatch.setattr(data, "picture", lambda path, rows, channels, *labels: (
        pictures.append((path, rows, *labels[:2])) if "heldout" in str(path) else None,
        picture(path, rows, channels, *labels)))
    monkeypatch.setattr(evaluate, "TRIED", {a: [("nested", 1, 1)] for a in evaluate.ARMS})
    monkeypatch.setattr(train_ldm, "Config", make_dataclass("Config", [("size", str, "tiny")],
                                                            bases=(train_ldm.Config,)))
    status, out, error = cli(evaluate, "disentangle", "--study", "arms", "--vae", vae_path,
                             "--confounding", "0.9", "--seeds", 0, "--train_steps", 2, "--images",
                             216, "--steps", 1, "--arms", "perturbations", "experiment", "--out",
                             tmp_path / "d")
    assert status == 0, error
    lines = [json.loads(line) for line in (tmp_path / "d" / "results.jsonl").open()]
    assert all("found" in line for line in lines[::2])  # first the choice of weights
    lines = lines[1::2]
    assert [line["arm"] for line in lines] == ["perturbations", "experiment"]
    # told nothing of the batch, the same noise gives the same image in every batch
    assert_close(np.array(lines[0]["omega"]["experiment"]), np.zeros(55), atol=.03, rtol=0)
    assert_close(np.array(lines[1]["omega"]["biology"]), np.zeros(55), atol=.03, rtol=0)
    assert [f.name for f in train_vae.step_files(tmp_path / "d" / "experiment-0.9-0-2")] == [
        "step-1.pt", "step-2.pt"]  # all are kept, for --study training
    [(picture, images, labels, columns)] = pictures    # the truth and two arms, a column a pair
    assert picture == tmp_path / "d" / "heldout_pairs.png" and picture.exists()
    assert labels == ["the truth", "perturbations, 0.9", "experiment, 0.9"]
    batches = evaluate.read_screen(SimpleNamespace(path=screen)).batches
    pairs = [(m, f"B{b + 1}") for m, b in data.heldout_pairs(batches, "test").items()]
    assert sorted(columns) == sorted(f"{m}\nin {b}" for m, b in pairs)
    assert np.shape(images)[:2] == (3, len(pairs)) and np.std(images[0], 0).max() > .1
    # told the batch only, the same noise in the same well gives the same image in each column
    drawn = dict(zip((c.split()[-1] for c in columns), images[2]))
    assert all((drawn[c.split()[-1]] == x).all() for c, x in zip(columns, images[2]))
    assert len({x.tobytes() for x in images[1]}) == len(pairs) > len(drawn) > 1
    fields = [[f["name"] for f in train_ldm.load_checkpoint(
        tmp_path / "d" / f"{arm}-0.9-0-2" / "model.pt", "ldm", "")["fields"]]
        for arm in ("perturbations", "experiment")]
    assert fields == [["smiles", "dose"], ["batch", "plate", "row", "column"]]


def test_a_line_says_which_arm_it_is_of():
    for arm, settings in evaluate.ARMS.items():
        groups = [g for g in ("biology", "experiment") if settings.get(g, True)]
        model = SimpleNamespace(groups=groups, content={"settings": {"seed": 0} | vars(
            train_ldm.Config(**settings))})
        assert evaluate.named_run(model, None)["arm"] == arm


def test_the_shortcut_is_closed_by_images_without_it(screen, vae_path, cli, tmp_path, monkeypatch):
    """The command end to end, with a classifier that reads the label off the images: each kind of
    training set must reach it with its own images, numbers and weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "screen_probe", lambda *_: None)
    monkeypatch.setattr(evaluate, "screen_of", lambda confounding: screen)
    monkeypatch.setattr(evaluate, "CLASSIFIER", dict(
        images=108, test_images=90, steps=2))
    monkeypatch.setattr(train_ldm, "Config", make_dataclass("Config", [("size", str, "tiny")],
                                                            bases=(train_ldm.Config,)))
    trained = []

    def record(images, answers, labels, steps, seed=0, batch=32, weights=None, real=None):
        trained.append((images, labels["mechanism"], weights))
        return SimpleNamespace()
    monkeypatch.setattr(evaluate, "train_probe", record)
    monkeypatch.setattr(evaluate, "answer", lambda probe, images: {
        "mechanism": torch.arange(len(images)) % 9})
    moves, edit = [], sample.Model.edit
    monkeypatch.setattr(sample.Model, "edit", lambda self, images, source, target, *a, **k: (
        moves.append((source, target)) or edit(self, images, source, target, *a, **k)))
    status, out, error = cli(evaluate, "disentangle", "--study", "shortcut", "--vae", vae_path,
                             "--seeds", 0, "--train_steps", 2, "--steps", 1, "--arms",
                             "balanced", "both", "--out", tmp_path / "d")
    assert status == 0, error
    confounded, generated, both, edited, unconfounded, standardised, reweighted = trained
    assert {len(images) for images, _, _ in trained} == {108}
    counts = torch.bincount(generated[1], minlength=9)
    assert counts.min() == counts.max()          # generated: every mechanism alike
    assert torch.equal(both[0][:54], confounded[0][:54])
    assert torch.equal(edited[1], confounded[1]) and not torch.equal(edited[0], confounded[0])
    for source, target in moves:
        moved = [a != b for a, b in zip(source["batch"], target["batch"])]
        assert any(moved) and source["smiles"] == target["smiles"]
        assert moved == [a != b for a, b in zip(source["plate"], target["plate"])]
    assert not torch.equal(standardised[0], confounded[0])
    assert reweighted[2] is not None and all(w is None for _, _, w in trained[:6])
    line = json.loads((tmp_path / "d" / "results.jsonl").read_text())
    assert line["arm"] == "both"  # the last that was named, and no other was trained
    assert [path.parent.name for path in tmp_path.glob("d/*/model.pt")] == ["both-0.9-0-2"]
    assert set(line["scores"]) == set(line["closed"]) and len(line["scores"]) == 7


def test_pairs_are_left_out_in_turn(screen, vae_path, cli, tmp_path, monkeypatch):
    """Real plates: the pair left out reaches neither autoencoder nor model, the rest do."""
    monkeypatch.chdir(tmp_path)
    rows, files = [], screen.parent / "image.npy"
    for i in range(72):
        compound, plate = ("DMSO", "x", "y")[i % 3], f"P{1 + i % 2}"
        rows.append(dict(image=files, index=i, compound=compound, plate=plate, dose=i % 3,
                         smiles=("CS(C)=O", "CCO", "c1ccccc1")[i % 3], well=f"A{i % 12}"))
    data.write_manifest(tmp_path / "m.csv", rows)
    vae = train_vae.train(train_vae.Config(
        data=str(tmp_path / "m.csv"), out=str(tmp_path / "vae"), steps=2, width=16, blocks=1))
    ldm = train_ldm.train(train_ldm.Config(
        data=str(tmp_path / "m.csv"), vae=str(vae), out=str(tmp_path / "ldm"), steps=2, batch=4,
        size="tiny", biology=("smiles", "dose"), experiment=("plate",)))
    monkeypatch.setattr(evaluate, "train_probe", lambda *_, **__: None)
    monkeypatch.setattr(evaluate, "answer", lambda probe, images: {
        "treatment": torch.zeros(len(images), dtype=torch.long)})
    status, out, error = cli(evaluate, "disentangle", "--study", "pairs", "--checkpoint", ldm,
                             "--by", "compound", "plate", "--steps", 1, "--images", 128, "--out",
                             tmp_path / "d")
    assert status == 0, error
    lines = [json.loads(line) for line in (tmp_path / "d" / "results.jsonl").open()]
    assert [line["left_out"] for line in lines] == ["x x P1", "y x P2"]
    assert lines[0]["x: generated"]["named right"] == 0 < lines[0]["DMSO: real"]["named right"]
    trained = {}
    for name in ("split-vae", "split-P1", "split-P2"):
        m = data.read_manifest(tmp_path / "d" / f"{name}.csv")
        trained[name] = {(c, p) for c, p, s in zip(m.columns["compound"], m.columns["plate"],
                                                   m.columns["split"]) if s != "test"}
    assert len(trained["split-vae"]) == 4 and len(trained["split-P1"]) == 5
    assert ("x", "P1") not in trained["split-P1"] and ("y", "P2") in trained["split-P1"]


def test_an_arm_has_one_guidance_for_all_its_seeds():
    """Near the least mean distance the best read; what one seed alone likes does not count."""
    settings = [("nested", 1, 1), ("nested", 2, 2), ("independent", 2, 2)]
    one = [[4.0, .5], [4.1, .7], [4.2, .8]]
    other = [[4.0, .5], [4.2, .7], [5.8, .9]]
    assert evaluate.best_guidance(settings, [one]) == ("independent", 2, 2)
    assert evaluate.best_guidance(settings, [one, other]) == ("nested", 2, 2)


def test_each_arm_is_asked_what_it_was_told(opened):
    """One truth serves models with other fields than the one it was made with."""
    narrow = SimpleNamespace(**vars(opened) | {"model": SimpleNamespace(fields=[])})
    factorial = evaluate.SimulatedFactorial(narrow, 9 * 3 * 4)
    told = {f.name: f for f in opened.model.fields}
    for names in (["smiles", "dose"], ["batch", "plate"]):
        asked = factorial.requests([told[n] for n in names])
        assert list(asked) == names and len(asked[names[0]]) == len(factorial.rows())
    assert set(factorial.requests([told["batch"]])["batch"]) == {"B1", "B2", "B3"}


def test_real_factorial_takes_complete_cells_only():
    columns = {"compound": ["DMSO", "DMSO", "x", "x", "DMSO", "DMSO"],
               "plate": ["P1", "P2", "P1", "P2", "P3", "P1"]}
    manifest = SimpleNamespace(columns=columns, path="m.csv")
    opened = SimpleNamespace(manifest=manifest, model=SimpleNamespace(fields=[]), train=[0])
    factorial = evaluate.RealFactorial(opened, ["compound", "plate"], 8)
    assert factorial.biology == ["DMSO", "x"] and factorial.experiment == ["P1", "P2"]


def test_the_halves_of_a_real_factorial_share_no_image(monkeypatch):
    columns = {"compound": ["DMSO", "x"] * 20, "plate": ["P1"] * 20 + ["P2"] * 20}
    opened = SimpleNamespace(manifest=SimpleNamespace(columns=columns, path="m.csv"), train=[0],
                             model=SimpleNamespace(fields=[]))
    monkeypatch.setattr(evaluate, "real_images", lambda opened, rows, rng: set(rows.tolist()))
    factorial = evaluate.RealFactorial(opened, ["compound", "plate"], 80)
    assert not factorial.truth(0) & (factorial.truth(1) | factorial.truth(3))


def test_edit_returns_the_image_under_its_own_conditions(opened):
    model, rows = opened.model, opened.held[:2]
    images = evaluate.real_images(opened, rows)
    own = {f.name: opened.manifest.rows(rows, f.name) for f in model.fields}
    rebuilt = model.vae.to_image(model.vae.to_latent(images))
    error = [(model.edit(images, own, own, steps=n, rounds=4) - rebuilt).abs().max().item()
             for n in (5, 40)]
    assert error[1] < .02, error


def test_edits_are_the_same_in_any_batch(opened):
    model, rows = opened.model, opened.held[:3]
    images = evaluate.real_images(opened, rows)
    own, other = ({f.name: opened.manifest.rows(r, f.name) for f in model.fields}
                  for r in (rows, opened.train[:3]))
    for strength in (None, .5):
        one, many = (model.edit(images, own, other, steps=3, rounds=1, strength=strength,
                                seeds=[7, 8, 9], batch=n) for n in (2, 3))
        assert_close(one, many, atol=1e-3, rtol=0)


def test_edit_command(ldm_path, screen, cli, refused, tmp_path):
    status, out, error = cli(sample, "--checkpoint", ldm_path, "--edit", f"{screen}:9", "batch=B2",
                             "--grid", "dose=1,3", "--steps", 2, "--out", tmp_path)
    assert status == 0, error
    assert out.count("told as unknown") == 1  # a plate lies in one batch; said once, not per image
    assert len(json.loads((tmp_path / "samples.json").read_text())["requests"]) == 2
    for words in (["--eta", .5], ["--sampler", "dpm"]):
        refused(sample, "--checkpoint", ldm_path, "--edit", f"{screen}:9", *words, says=["DDIM"])
    refused(sample, "--checkpoint", ldm_path, "--edit", f"{screen}:1", says=["MANIFEST:ROW"])
    refused(sample, "--checkpoint", ldm_path, "--edit", f"{screen}:9", "batch=B9", says=["B9"])


def test_attribution_compares_with_the_untreated_cells(ldm_path, screen, cli, tmp_path):
    row = next(i for i, v in enumerate(data.read_manifest(screen).columns["true_effect"])
               if float(v) > .9) + 2
    status, out, error = cli(sample, "--checkpoint", ldm_path, "--attribution", f"{screen}:{row}",
                             "--out", tmp_path)
    assert status == 0, error
    report = json.loads((tmp_path / "attribution.json").read_text())
    assert len(report["biology"]) == len(report["levels"])
    assert report["seed"] == 0 and report["checkpoint"] == str(ldm_path)  # enough to repeat it
    assert "--attribution" in report["command"] and len(report["sha1"]) == 40
    assert (tmp_path / "attribution.png").exists()


def test_standard_interval_is_of_the_right_width():
    """The half of the wells in over_wells, as in over_seeds."""
    rng, widths = np.random.default_rng(0), []
    for _ in range(100):
        x = rng.normal(size=40)
        low, high = evaluate.over_wells(lambda m: {"m": x[m].mean()}, np.arange(40),
                                        np.zeros(40))["m"]
        widths.append(high - low)
    assert abs(np.mean(widths) / (2 * 1.645 / 40 ** .5) - 1) < .12
