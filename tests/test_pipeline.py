"""The true scripts, run for a few steps: train, resume, sample, evaluate; and every refusal."""
import csv
import json
import pickle
import shlex
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch.testing import assert_close

import data
import evaluate
import sample
import train_ldm
import train_vae
from conftest import randomise

SMILES = "CC1CCC(B(O)O)CC1"


# --- training -------------------------------------------------------------------------------------

def test_autoencoder_trains_and_reports(vae_path):
    log = [json.loads(line) for line in open(vae_path.parent / "log.jsonl")]
    assert [e["step"] for e in log] == [20, 40] and log[1]["l1"] < log[0]["l1"]
    assert {"l1_per_channel", "psnr", "kl"} <= set(log[0])
    assert all(0 < entry["flops_utilisation"] < 1.5 for entry in log)
    content = train_vae.load_checkpoint(vae_path, "vae", "")
    assert not torch.allclose(content["weights"]["latent_std"], torch.ones(1, 4, 1, 1))
    with Image.open(vae_path.parent / "reconstruction.png") as picture:
        assert min(picture.size) > 200


@pytest.mark.pictures
def test_first_loss_is_one_and_training_lowers_it(ldm_config, tmp_path):
    train_ldm.train(replace(ldm_config, out=str(tmp_path), steps=40, eval_every=20, lr=3e-3))
    log = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert_close(log[0]["heldout_loss"], 1., atol=.05, rtol=0)
    assert [e["step"] for e in log] == [0, 20, 40] and len(log[0]["by_noise"]) == 4
    assert log[2]["train_loss"] < log[1]["train_loss"]
    assert all(0 < entry["flops_utilisation"] < 1.5 for entry in log[1:])
    assert (tmp_path / "samples.png").exists() and (tmp_path / "curves.png").exists()


def test_held_out_rows_reach_nothing_that_is_learned(screen, vae_path, ldm_config, monkeypatch):
    """No pixel of a held-out row reaches intensities, weights, latent statistics or the cache of
    training latents, and no value of one a vocabulary."""
    manifest = data.read_manifest(screen)
    allowed, held = ({i for i, s in enumerate(manifest.columns["split"]) if s == side}
                     for side in ("train", "val"))
    views = train_vae.views

    def only_training(pixels, rows, config, intensity, rng=None):
        # whatever is drawn at random is for training, but for the held-out views of the report,
        # which are all held-out rows at once
        asked = set(map(int, rows))
        assert rng is None or asked <= allowed or asked == held, "a held-out row is trained on"
        return views(pixels, rows, config, intensity, rng)

    monkeypatch.setattr(train_vae, "views", only_training)
    config = train_vae.Config(data=str(screen), out=str(vae_path.parent / "leak"), steps=2,
                              width=16, blocks=1)
    fit = data.fit_intensity
    monkeypatch.setattr(data, "fit_intensity", lambda rule, pixels, rows: fit(rule, pixels, [
        i for i in rows if i in allowed or pytest.fail("intensities of held-out rows")]))
    train_vae.train(config)
    manifest.columns["row"] = [v if i in allowed else "99" for i, v in
                               enumerate(manifest.columns["row"])]
    manifest.columns["plate"] = [v if i in allowed else "P99" for i, v in
                                 enumerate(manifest.columns["plate"])]
    monkeypatch.setattr(data, "read_manifest", lambda *a: manifest)
    prepared = train_ldm.prepare(ldm_config)
    assert set(prepared.sides["training"].rows) <= allowed
    fields = {f.name: f for f in prepared.fields}
    assert fields["row"].high <= 16 and "P99" not in fields["plate"].vocabulary
    assert not prepared.sides["held-out"].known[:, 3].any()  # a plate never seen is unknown


def test_resume_is_exact(ldm_config, tmp_path, monkeypatch):
    whole = replace(ldm_config, out=str(tmp_path / "whole"), steps=6, eval_every=3)
    cut = replace(whole, out=str(tmp_path / "cut"))
    train_ldm.train(whole)

    def stop_at_step_4(average, model, decay, step, real=train_ldm.ema_update):
        if step == 4:
            raise KeyboardInterrupt
        real(average, model, decay, step)

    with monkeypatch.context() as patch:
        patch.setattr(train_ldm, "ema_update", stop_at_step_4)
        with pytest.raises(KeyboardInterrupt):
            train_ldm.train(cut)
    with pytest.raises(train_vae.UserError, match="step 3 of 6: add --resume"):
        train_ldm.train(cut)
    train_ldm.train(replace(cut, resume=True))
    a, b = (torch.load(tmp_path / d / "model.pt", weights_only=True) for d in ("whole", "cut"))
    assert a["step"] == b["step"] == 6
    for part in ("weights", "ema"):
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), (part, name)


def test_resume_refuses_other_settings(ldm_config, ldm_path, tmp_path):
    shutil.copy(ldm_path, tmp_path / "model.pt")
    with pytest.raises(train_vae.UserError, match="batch was 8"):
        train_ldm.train(replace(ldm_config, out=str(tmp_path), steps=9, batch=4, resume=True))
    with pytest.raises(train_vae.UserError, match="other settings .target was velocity"):
        train_ldm.train(replace(ldm_config, out=str(tmp_path), target="image"))


def test_resume_refuses_fewer_steps(ldm_config, ldm_path):
    before = ldm_path.read_bytes()
    with pytest.raises(train_vae.UserError, match="3 steps"):
        train_ldm.train(replace(ldm_config, steps=2, resume=True))
    assert ldm_path.read_bytes() == before


def test_resume_refuses_another_autoencoder(ldm_config, ldm_path, vae_path, tmp_path):
    shutil.copy(ldm_path, tmp_path / "model.pt")
    other = torch.load(vae_path, weights_only=True)
    other["weights"]["latent_std"] *= 2
    kept = vae_path.read_bytes()
    torch.save(other, vae_path)
    try:
        with pytest.raises(train_vae.UserError, match="autoencoder is another"):
            train_ldm.train(replace(ldm_config, out=str(tmp_path), steps=9, resume=True))
    finally:
        vae_path.write_bytes(kept)


def test_a_finished_model_is_used_and_not_trained_again(ldm_config, ldm_path, capsys):
    before = ldm_path.read_bytes()
    assert train_ldm.train(ldm_config) == ldm_path
    assert "trained already" in capsys.readouterr().out and ldm_path.read_bytes() == before


def test_overfit_collapses_and_saves_nothing(ldm_config, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("kept")
    train_ldm.train(replace(ldm_config, out=str(tmp_path), overfit=True, steps=60, eval_every=30,
                            lr=5e-3))
    out = capsys.readouterr().out
    assert "nothing is saved" in out
    lines = [line for line in out.splitlines() if "training loss" in line]
    first, last = (float(line.split("training loss ")[1].split(",")[0]) for line in lines)
    assert last < .8 * first and not (tmp_path / "model.pt").exists()
    assert (tmp_path / "log.jsonl").read_text() == "kept"
    again = replace(ldm_config, overfit=True)
    assert "--resume" not in train_vae.command(again)  # nothing is there to go on from
    with pytest.raises(train_vae.UserError, match="saves nothing"):
        train_ldm.train(replace(again, resume=True))


def test_ema_warms_up():
    a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for p, value in ((a.weight, 0.), (b.weight, 1.)):
        torch.nn.init.constant_(p, value)
    train_ldm.ema_update(a, b, .999, 0)
    assert_close(a.weight.item(), .9)  # decay (1 + 0) / (10 + 0)
    train_ldm.ema_update(a, b, .5, 10_000)
    assert_close(a.weight.item(), .95)


def test_a_loss_that_is_not_finite_stops_with_a_message(ldm_config, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ldm.diffusion, "diffusion_loss",
                        lambda *a, **k: torch.full((8,), torch.nan, requires_grad=True))
    monkeypatch.setattr(train_ldm, "heldout_loss", lambda *a: (1., [1.] * 4))
    with pytest.raises(train_vae.UserError, match="nan at step 0"):
        train_ldm.train(replace(ldm_config, out=str(tmp_path)))
    assert not (tmp_path / "model.pt").exists()


def test_only_one_group_can_be_told(ldm_config, tmp_path):
    path = train_ldm.train(replace(ldm_config, out=str(tmp_path), experiment=(), steps=1,
                                   eval_every=1))
    model = sample.Model.load(path)
    assert model.groups == ["biology"]
    assert model.generate({"smiles": [SMILES]}, [0], steps=2, progress=False).shape[0] == 1


def test_a_model_can_be_told_nothing(ldm_config, tmp_path):
    path = train_ldm.train(replace(ldm_config, out=str(tmp_path), experiment=(), biology=(),
                                   steps=1, eval_every=1))
    assert sample.Model.load(path).generate({}, [0], steps=2, progress=False).shape[0] == 1


def test_cached_latents_are_the_views_encoded(ldm_config):
    prepared = train_ldm.prepare(replace(ldm_config, views=2))
    latents = prepared.sides["training"]
    content = train_vae.load_checkpoint(ldm_config.vae, "vae", "")
    x, _ = next(train_ldm.batches_of_views(prepared.pixels, latents.rows, prepared.settings,
                                           content["intensity"], 2))
    mean, _ = train_vae.build_vae(content).encode(x)
    cached = torch.from_numpy(np.array(latents.cache[:64, 0], np.float32))
    assert_close(cached, mean, atol=.1, rtol=.1)  # float16, encoded under bf16
    assert (x[0] - x[1]).abs().max() > .1  # two views of one image differ
    z = latents.draw(np.arange(200), 0, torch.Generator().manual_seed(0))
    assert_close(z.std().item(), 1., atol=.25, rtol=0)


# --- sampling -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model(ldm_path):
    """A model whose every weight is random, so that nothing is silent."""
    found = sample.Model.load(ldm_path)
    randomise(found.denoiser)
    with torch.no_grad():
        for p in found.denoiser.parameters():
            p.mul_(.5)
    return found


REQUEST = {"smiles": [SMILES] * 8, "dose": ["3"] * 8, "batch": ["B2"] * 8}


def test_an_image_is_the_same_in_a_batch_of_one_and_of_eight(model):
    together = model.generate(REQUEST, range(8), steps=4, progress=False)
    alone = model.generate({k: v[:1] for k, v in REQUEST.items()}, [5], steps=4, progress=False)
    parts = model.generate(REQUEST, range(8), steps=4, batch=3, progress=False)
    assert_close(together[5:6], alone, atol=1e-4, rtol=0)  # float32
    assert_close(together, parts, atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > .01


@pytest.mark.parametrize("name, other", [("smiles", "CCO"), ("dose", "0.3"), ("batch", "B1"),
                                         ("plate", "P01"), ("row", "1"), ("column", "24")])
def test_every_field_changes_the_image(model, name, other):
    one = {"smiles": [SMILES], "dose": ["3"], "batch": ["B2"], "plate": ["P04"], "row": ["8"],
           "column": ["8"]}
    images = [model.generate(r, [0], steps=3, progress=False) for r in (
        one, one | {name: [other]}, {k: v for k, v in one.items() if k != name})]
    assert (images[0] - images[1]).abs().max() > 1e-4
    assert (images[0] - images[2]).abs().max() > 1e-4  # unknown is another thing than known


@pytest.mark.parametrize("form", ["nested", "independent", "contrast", "control"])
def test_guidance_forms_as_the_network_sees_them(model, form):
    z, t = torch.randn(1, *model.latent_shape), torch.tensor([500])
    one = {k: v[:1] for k, v in REQUEST.items()}

    def v(columns):
        codes, known, molecules = model.denoiser.conditioner.encode(columns, 1)
        with torch.no_grad():
            return model.denoiser(z, t, codes, known, molecules)

    full, none = v(one), v({})
    b, e = v({k: one[k] for k in ("smiles", "dose")}), v({"batch": ["B2"]})
    control = v(one | {"smiles": ["CS(C)=O"], "dose": ["0.0"]})
    examples = model.content["examples"]["experiment"]
    average = sum(v(one | {k: [x] for k, x in ex.items()}) for ex in examples) / len(examples)
    wb, we = 2.5, 1.5
    expected = {"nested": none + we * (e - none) + wb * (full - e),
                "independent": none + we * (e - none) + wb * (b - none),
                "contrast": full + (wb - 1) * (full - e) + (we - 1) * (full - b),
                "control": full + (wb - 1) * (full - control) + (we - 1) * (full - average)}[form]
    out = model.guided(one, 1, {"biology": wb, "experiment": we}, form)(z, t)
    assert_close(out, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", ["nested", "independent"])
def test_outside_the_interval_weights_above_one_count_as_one(model, form):
    z, one = torch.randn(1, *model.latent_shape), {k: v[:1] for k, v in REQUEST.items()}

    def v(t, columns=one, **options):
        return model.guided(columns, 1, form=form, **options)(z, torch.tensor([t]))
    strong, interval = dict(biology=3., experiment=3.), dict(interval=(.2, .8))
    for t, inside in ((100, False), (500, True), (900, False)):
        everywhere = v(t, guidance=strong, interval=(0., 1.))
        plain = model.plain(one, 1)(z, torch.tensor([t]))
        assert_close(v(t, guidance=strong, **interval), everywhere if inside else plain,
                     atol=1e-4, rtol=1e-4)
        ignored = v(t, guidance=dict(biology=0., experiment=3.), **interval)
        changed = v(t, one | {"smiles": ["CCO"]}, guidance=dict(biology=0., experiment=3.),
                    **interval)
        assert_close(ignored, changed, atol=1e-5, rtol=1e-5)  # weight 0 ignores a group everywhere


@pytest.mark.parametrize("form", ["independent", "contrast"])
def test_a_form_stays_itself_outside_the_interval(model, form):
    """Below weight 1 the forms differ: what stands for guidance outside is the form's own. (Where
    all weights count as 1 it is the conditional model, in every form.)"""
    z, t = torch.randn(1, *model.latent_shape), torch.tensor([900])
    one, weights = {k: v[:1] for k, v in REQUEST.items()}, dict(biology=1., experiment=.5)
    assert_close(model.guided(one, 1, weights, form)(z, t),
                 model.guided(one, 1, weights, form, interval=(0., 1.))(z, t), atol=1e-5, rtol=1e-5)


def test_conditions_are_encoded_once_and_branches_run_together(model, monkeypatch):
    """However many steps: the conditioner is asked as often, and a step is one pass through the
    U-Net with a row for each branch that counts."""
    def passes(steps, b, e, **options):
        rows, encoded = [], []
        unet, conditioner = model.denoiser.unet, model.denoiser.conditioner
        with monkeypatch.context() as patch:
            patch.setattr(unet, "forward", lambda z, *rest, real=unet.forward:
                          rows.append(len(z)) or real(z, *rest))
            patch.setattr(conditioner, "forward", lambda *given, real=conditioner.forward:
                          encoded.append(given) or real(*given))
            model.generate({k: v[:2] for k, v in REQUEST.items()}, [0, 1], steps=steps,
                           guidance=dict(biology=b, experiment=e), progress=False, **options)
        return rows, len(encoded)
    assert passes(10, 2., 1.5)[0] == [2] * 2 + [6] * 6 + [2] * 2   # three branches in the interval
    assert passes(3, 2., 1.5)[1] == passes(10, 2., 1.5)[1]
    assert passes(3, 2., 1.5, interval=(0., 1.))[0] == [6] * 3
    assert passes(3, 2., 2., interval=(0., 1.))[0] == [4] * 3      # v(e) has coefficient 0
    assert passes(3, 1., 1., interval=(0., 1.))[0] == [2] * 3


def test_command_line_writes_picture_hyperstack_and_record(ldm_path, tmp_path, cli):
    status, out, error = cli(
        sample, f"smiles={SMILES}", "dose=3", "batch=B2", "-n", 3, "--guidance", "biology=2",
        "experiment=1.5", "--checkpoint", ldm_path, "--steps", 2, "--seed", 7, "--out", tmp_path)
    assert status == 0, error
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["seeds"] == [7, 8, 9]
    assert record["requests"] == [{"smiles": SMILES, "dose": "3", "batch": "B2"}] * 3
    assert record["guidance"] == {"biology": 2.0, "experiment": 1.5} and len(record["sha1"]) == 40
    before = (tmp_path / "samples.tif").read_bytes()
    (tmp_path / "samples.tif").unlink()
    python, script, *words = shlex.split(record["command"])
    assert (python, script) == ("python", "sample.py") and cli(sample, *words)[0] == 0
    assert (tmp_path / "samples.tif").read_bytes() == before  # the record's command repeats it
    with tifffile.TiffFile(tmp_path / "samples.tif") as tif:
        assert tif.is_imagej and tif.series[0].axes == "TCYX"
        assert tif.asarray().shape == (3, 5, 32, 32)
        assert tif.imagej_metadata["Labels"][:5] == list(data.CHANNELS)
    with Image.open(tmp_path / "samples.png") as picture:
        assert min(picture.size) > 100


def test_the_record_repeats_the_images(ldm_path, tmp_path, cli):
    for name in ("a", "b"):
        cli(sample, "batch=B2", "-n", 2, "--steps", 2, "--checkpoint", ldm_path, "--out",
            tmp_path / name)
    a, b = (tifffile.imread(tmp_path / n / "samples.tif") for n in "ab")
    assert np.array_equal(a, b)


@pytest.mark.parametrize("order", [0, 1])
def test_a_sweep_shares_its_noise_and_words_come_in_any_order(ldm_path, tmp_path, cli, order):
    words = [["--grid", "dose=0,3", "batch=B1,B2,B3", f"smiles={SMILES}"],
             [f"smiles={SMILES}", "--grid", "dose=0,3", "batch=B1,B2,B3"]][order]
    status, _, error = cli(sample, *words, "--checkpoint", ldm_path, "--steps", 2, "--out",
                           tmp_path)
    assert status == 0, error
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["seeds"] == [0] * 6
    assert [(r["dose"], r["batch"]) for r in record["requests"]] == [
        (d, b) for b in ("B1", "B2", "B3") for d in ("0", "3")]
    assert {r["smiles"] for r in record["requests"]} == {SMILES}


def test_a_number_outside_its_range_is_warned_of(ldm_path, tmp_path, cli):
    status, out, _ = cli(sample, "dose=900", "-n", 1, "--checkpoint", ldm_path, "--steps", 1,
                         "--out", tmp_path)
    assert status == 0 and "outside the training range 0 to 10" in out
    record = json.loads((tmp_path / "samples.json").read_text())  # as asked, and as it was read
    assert record["requests"][0]["dose"] == "900" and record["used"][0]["dose"] == "10"
    assert record["used"][0]["batch"] == "" and "not given, so unknown: smiles, batch" in out


def test_a_training_that_was_not_finished_is_told(ldm_path, tmp_path, cli):
    content = torch.load(ldm_path, weights_only=True)
    content["settings"]["steps"] = content["step"] + 7
    torch.save(content, tmp_path / "half.pt")
    for path, told in ((tmp_path / "half.pt", True), (ldm_path, False)):
        status, out, _ = cli(sample, "dose=1", "-n", 1, "--steps", 1, "--checkpoint", path,
                             "--out", tmp_path)
        assert status == 0 and (f"{path}: step 3 of a training of 10" in out) == told


# --- evaluation -----------------------------------------------------------------------------------

def test_quality_prints_a_table_and_writes_json_and_figure(ldm_path, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = evaluate.train_probe
    monkeypatch.setattr(evaluate, "train_probe", lambda *a: train(*a[:3], steps=3))
    status, out, error = cli(evaluate, "quality", "--checkpoint", ldm_path, "--quick", "--steps", 2,
                             "--out", tmp_path)
    assert status == 0, error
    table = json.loads((tmp_path / "quality.json").read_text())["table"]
    assert set(table) == {"val", "test_pair", "test_substituent", "test_scaffold"}
    entry = table["test_pair"]
    assert entry["real"]["distance"] < entry["real"]["ceiling"]
    # forty steps of training make no cells: the generated images must look worse than real ones
    assert entry["generated"]["distance"] > 2 * entry["real"]["distance"]
    assert "through the autoencoder" in out and (tmp_path / "quality.png").exists()


def test_quality_by_cell_covers_unseen_combinations(ldm_path, tmp_path, cli):
    status, out, error = cli(evaluate, "quality", "--checkpoint", ldm_path, "--quick", "--steps", 1,
                             "--by", "role", "batch", "--out", tmp_path)
    assert status == 0, error
    table = json.loads((tmp_path / "quality.json").read_text())["table"]
    assert len(table) == 6 and {"generated", "real"} <= set(table[0])
    assert "nearest_training_view" in table[0]["generated"]


# --- refusals: one line that names the fault, status 2, nothing written over ----------------------

def manifest_with(folder, **columns):
    """A manifest of two good images with other columns."""
    np.save(folder / "good.npy", np.random.default_rng(0).integers(0, 255, (5, 32, 32), np.uint8))
    n = max([2] + [len(v) for v in columns.values()])
    rows = [{"image": "good.npy", **{k: v[i] for k, v in columns.items()}} for i in range(n)]
    with open(folder / "m.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "m.csv"


def test_vae_refusals(tmp_path, refused, vae_path):
    before = vae_path.read_bytes()
    refused(train_vae, "--data", tmp_path / "none.csv", "--out", tmp_path / "o",
            says=["no manifest at"])
    refused(train_vae, "--learning_rate", "1", says=["unrecognized", "--learning_rate"])
    refused(train_vae, "--steps", "many", says=["--steps", "many"])
    refused(train_vae, "--out", vae_path.parent, says=["exists", "--overwrite"])
    np.save(tmp_path / "other.npy", np.zeros((5, 24, 24), np.uint8))
    sizes = manifest_with(tmp_path, image=["good.npy", "other.npy"])
    lines = refused(train_vae, "--data", sizes, "--out", tmp_path / "o",
                    says=["different sizes", "row 2", "row 3", "--crop"])
    assert len(lines) == 1
    refused(train_vae, "--data", sizes, "--crop", 28, "--out", tmp_path / "o",
            says=["row 3", "24x24"])
    odd = manifest_with(tmp_path)
    refused(train_vae, "--data", odd, "--crop", 30, "--out", tmp_path / "o", says=["multiple of 4"])
    refused(train_vae, "--data", odd, "--channels", "DNA,ER", "--out", tmp_path / "o",
            says=["row 2", "5 channels, 2 expected"])
    refused(train_vae, "--data", odd, "--split", "plate", "--out", tmp_path / "o",
            says=["no column plate"])
    refused(train_vae, "--data", odd, "--intensity", "9:1", "--out", tmp_path / "o",
            says=["--intensity 9:1", "0:4095"])
    assert not (tmp_path / "o").exists() and vae_path.read_bytes() == before


@pytest.mark.parametrize("columns, fields, says", [
    ({"smiles": ["CCO", "C1CC"]}, ["smiles"], ["row 3", "C1CC"]),
    ({"dose": ["1", "much"]}, ["dose"], ["row 3", "dose", "much"]),
    ({"plate": ["1", "2"]}, ["plate"], ["plate:category or plate:number"]),
    ({"plate": ["1", "2"]}, ["plaet"], ["no column plaet"]),
    ({"true_x": ["1", "2"]}, ["true_x:number"], ["outcome"])])
def test_field_refusals(tmp_path, refused, vae_path, columns, fields, says):
    path = manifest_with(tmp_path, **columns)
    lines = refused(train_ldm, "--data", path, "--vae", vae_path, "--out", tmp_path / "o",
                    "--biology", *fields, "--experiment", says=says)
    assert len(lines) == 1 and not (tmp_path / "o").exists()


def test_all_faults_are_reported_and_name_the_manifest(tmp_path, refused, vae_path):
    """A missing file and bad values of fields, in one go."""
    path = manifest_with(tmp_path, image=["good.npy", "gone.npy"], smiles=["C1CC", "CCO"],
                         dose=["1", "x"])
    lines = refused(train_ldm, "--data", path, "--vae", vae_path, "--out", tmp_path / "o",
                    "--biology", "smiles", "dose", "--experiment",
                    says=["row 3, column image", "row 2, column smiles"])
    assert all(str(path) in line for line in lines)


@pytest.mark.parametrize("size", ["0.5 um", "-1", "nan"])
def test_a_size_of_a_pixel_is_checked(tmp_path, refused, vae_path, size):
    path = manifest_with(tmp_path, pixel_um=["1", size], smiles=["CCO", "CCN"])
    refused(train_ldm, "--data", path, "--vae", vae_path, "--out", tmp_path / "o", "--biology",
            "smiles", "--experiment", says=["row 3, column pixel_um", size])


def test_studies_want_an_autoencoder_before_any_work(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for study in ("arms", "shortcut"):
        refused(evaluate, "disentangle", "--study", study, says=["no vae", "train_vae.py"])
    refused(evaluate, "vae", "--configs", "width=16", "batch=0", says=["--batch", "at least 1"])
    refused(evaluate, "vae", "--configs", "width=16", "foo=3", says=["foo=3"])
    assert not (tmp_path / "runs" / "data").exists()


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_checkpoint_refusals(tmp_path, refused, vae_path, ldm_path):
    refused(sample, "--checkpoint", tmp_path / "none.pt",
            says=["no ldm checkpoint", "train_ldm.py"])
    refused(sample, "--checkpoint", vae_path, says=["another kind (vae)"])
    refused(train_ldm, "--vae", ldm_path, "--out", tmp_path / "o", says=["another kind (ldm)"])
    refused(train_ldm, "--vae", tmp_path / "none.pt", "--out", tmp_path / "o",
            says=["no vae checkpoint", "train_vae.py"])
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "cut.pt").write_bytes(ldm_path.read_bytes()[:5000])
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"kind": "ldm", "inside": Bomb()}, tmp_path / "inside.pt")
    for name in ("noise.pt", "cut.pt", "pickle.pt", "inside.pt"):
        lines = refused(sample, "--checkpoint", tmp_path / name,
                        says=[name, "no nanopaint checkpoint"])
        assert len(lines) == 1
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("x", "y")
    refused(sample, "--checkpoint", tmp_path / "zip.pt", says=["zip.pt"])


def test_setting_refusals(tmp_path, refused, ldm_config, screen):
    for words, says in (
            (["--size", "huge"], ["--size huge", "tiny, small"]),
            (["--schedule", "steep"], ["--schedule steep"]),
            (["--molecule_encoder", "guess"], ["--molecule_encoder guess", "fingerprint"]),
            (["--target", "noise"], ["--target noise"]),
            (["--target", "noise", "--no-zero_snr"], ["linear or scaled_linear"]),
            (["--steps", "0"], ["--steps must be at least 1"]),
            (["--lr", "nan"], ["--lr nan"]), (["--ema", "nan"], ["--ema nan"]),
            (["--seed", "99999999999999999999"], ["--seed", "out of range"]),
            (["--step", "3"], ["unrecognized"]),
            (["--experiment", "dose"], ["dose", "twice"])):
        assert len(refused(train_ldm, *words, "--out", tmp_path / "o", says=says)) == 1
    refused(train_vae, "--width", 12, "--data", screen, "--out", tmp_path / "o",
            says=["multiple of 8"])
    refused(train_vae, "--fold", 4, "--downsampling", 2, "--data", screen, "--out", tmp_path / "o",
            says=["power of two"])
    assert not (tmp_path / "o").exists()


def test_evaluate_refusals(tmp_path, refused, ldm_path):
    def no(*words, says):
        assert len(refused(evaluate, "quality", "--checkpoint", ldm_path, *words, says=says)) == 1
    no("--steps", 0, says=["--steps must be at least 1"])
    no("--images", 0, says=["--images must be at least 1"])
    no("--nucleus_radius", "nan", says=["--nucleus_radius must be above 0"])
    no("--guidance", "chemistry=2", says=["no group chemistry"])
    no("--guidance", "biology=much", says=["not a number"])
    no("--by", "colour", says=["no column colour"])
    no("--sets", "test_moon", says=["test_moon", "test_pair"])
    no("--data", manifest_with(tmp_path), says=["has no column smiles"])


def test_request_refusals(ldm_path, tmp_path, refused):
    def no(*words, says):
        lines = refused(sample, *words, "--checkpoint", ldm_path, "--out", tmp_path / "o",
                        says=says)
        assert len(lines) == 1
    no("batch=B9", says=["unknown batch B9", "B1, B2, B3"])
    no("bath=B1", says=["unknown field bath", "smiles, dose, batch"])
    no("smiles=C1CC", says=["C1CC", "no valid SMILES"])
    no("dose=much", says=["dose=much", "not a number"])
    no("dose=-1", says=["negative"])
    no("batch", says=["NAME=VALUE"])
    no("batch=B1", "--guidance", "chemistry=2", says=["no group chemistry", "biology, experiment"])
    no("--grid", "dose=0,1", "batch=B1,B2", "row=1,2", says=["at most two"])
    no("-n", 0, says=["at least one"])
    no("--seed", 2 ** 70, says=["--seed"])
    no("--attribution", "m.csv:2", "-n", 2, "--guidance", "biology=2", "--grid", "dose=0,1",
       says=["--attribution has no use for -n, --grid, --guidance"])
    no("--edit", "m.csv:2", "-n", 2, says=["--edit has no use for -n"])
    no("--eta", 3, says=["--eta 3"])
    no("--eta", .5, "--sampler", "dpm", says=["--eta 0.5", "ddim"])
    no("batch=B1", "dose=1", "batch=B2", says=["batch=B2: batch is given twice"])
    no("batch=B1", "--grid", "batch=B1,B2", says=["batch is given twice"])
    refused(sample, "--temperature", 3, says=["unrecognized"])
    refused(sample, "--form", "sideways", says=["invalid choice"])
    assert not (tmp_path / "o").exists()
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        refused(sample, "--checkpoint", ldm_path, "--out", out, says=["stands in the way"])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_bad_request_is_refused_before_any_work(ldm_path, monkeypatch):
    model = sample.Model.load(ldm_path)
    monkeypatch.setattr(sample.Model, "guided", lambda *_: pytest.fail("sampling was begun"))
    for request in (dict(smiles=["no molecule"]), dict(batch=["B9"]), dict(dose=["-1"])):
        with pytest.raises(sample.FieldError):
            model.generate(request, [0])


@pytest.mark.parametrize("module", [data, train_vae, train_ldm, sample, evaluate])
def test_help_says_every_setting_with_its_default(module, cli):
    commands = {data: ["simulate"], evaluate: ["quality"]}.get(module, [])
    status, out, _ = cli(module, *commands, "--help")
    assert status == 0
    if hasattr(module, "Config"):
        for name, value in vars(module.Config()).items():
            assert f"--{name}" in out
        assert out.count("(default:") == len(vars(module.Config()))
    else:
        assert out.count("default: ") >= 6
