"""Is every field used, and do encoders generalise: the figures against known answers."""
import json
from dataclasses import make_dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import data
import evaluate
import sample
import train_ldm
from conftest import randomise
from evaluate import across_molecules, dose_fidelity

DOSES = (0., *data.DOSES)


def series(ec50, direction, amplitude=1., noise=0., seeds=3):
    """Features (M, doses, seeds, F) of molecules that act along a direction by a Hill curve."""
    dose = torch.tensor(DOSES)
    rng = torch.Generator().manual_seed(0)
    effect = torch.stack([dose ** data.HILL / (dose ** data.HILL + e ** data.HILL) for e in ec50])
    y = amplitude * effect[:, :, None, None] * direction[:, None, None]
    return y.expand(-1, -1, seeds, -1) + noise * torch.randn(
        len(ec50), len(dose), seeds, direction.shape[1], generator=rng)


def test_dose_fidelity_recovers_half_effect_doses():
    ec50, direction = [.4, 1., 2.5], torch.randn(3, 8)
    truth = series(ec50, direction)
    rank, error = dose_fidelity(series(ec50, direction, amplitude=2.), truth, DOSES, ec50)
    assert_close(rank, 1.)
    assert error < .02
    shifted = series([10 * e for e in ec50], direction)
    assert abs(dose_fidelity(shifted, truth, DOSES, ec50)[1] - 1) < .05  # ten times off: a decade
    flat = torch.randn(3, len(DOSES), 3, 8, generator=torch.Generator().manual_seed(1))
    backwards = series(ec50, direction).flip(1)
    assert dose_fidelity(backwards, truth, DOSES, ec50)[0] < -.9
    assert dose_fidelity(flat, truth, DOSES, ec50)[0] < .9


def test_correlation_across_molecules_is_one_for_the_truth_and_none_for_permuted_ones():
    truth = series([.5] * 40, 3 * torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))
    assert_close(across_molecules(5 * truth + 3, truth), 1.)
    permuted = truth[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    assert abs(across_molecules(permuted, truth)) < .3


@pytest.fixture
def opened(ldm_path):
    return evaluate.open_model(SimpleNamespace(checkpoint=str(ldm_path), data=None, steps=2,
                                               guidance={}))


@pytest.fixture
def latents(opened):
    cache = torch.stack(opened.model.vae.encode(evaluate.real_images(opened, opened.held[:64])), 1)
    return train_ldm.Latents(cache.numpy(), opened.model.vae, opened.manifest, opened.held[:64],
                             opened.model.denoiser.conditioner, 1)


def test_a_field_cut_off_is_found_and_named(opened, latents, capsys):
    denoiser = randomise(opened.model.denoiser)
    used = train_ldm.field_gaps(denoiser, latents, opened.model.schedule, 64)
    assert all(abs(rise) > 0 for rise, _ in used.values())
    place = [f.name for f in opened.model.fields].index("dose")
    for p in denoiser.conditioner.encoders[place].parameters():
        p.zero_()  # the dose no longer reaches the vector
    gaps = train_ldm.field_gaps(denoiser, latents, opened.model.schedule, 64)
    assert gaps["dose"][0] == 0 and gaps["smiles"][0] != 0
    train_ldm.warn_of_unused({"dose": gaps["dose"], "smiles": (.1, .01)})
    said = capsys.readouterr().out
    assert "dose is hardly used" in said and "smiles" not in said


def test_conditions_command(ldm_path, cli, tmp_path):
    status, out, error = cli(evaluate, "conditions", "--checkpoint", ldm_path, "--quick", "--steps",
                             1, "--out", tmp_path)
    assert status == 0, error
    table = json.loads((tmp_path / "conditions.json").read_text())["table"]
    assert list(table) == ["smiles", "dose", "batch", "plate", "row", "column", "all of biology",
                           "all of experiment"]
    assert {"rise", "error", "rise_by_noise", "cosine", "rms", "features"} == set(table["dose"])


def test_series_of_doses_show_the_same_cells(opened):
    doses = evaluate.DoseSeries(opened, "test_substituent", 2, 3)
    rows = doses.rows()
    assert len(rows) == 2 * 5 * 3 and [r["cells"] for r in rows[:3]] == [0, 1, 2]
    assert {r["dose"] for r in rows} == set(DOSES)
    held = {opened.manifest.columns["smiles"][i] for i in opened.train}
    assert not held & {r["smiles"] for r in rows}


@pytest.mark.parametrize("encoder", ["descriptors", "graph", "smiles", "identity", "table"])
def test_every_encoder_trains_resumes_and_samples(encoder, screen, vae_path, tmp_path):
    smiles = sorted(set(data.read_manifest(screen).columns["smiles"]))
    np.savez(tmp_path / "t.npz", **{s: np.random.default_rng(i).normal(size=8)
                                    for i, s in enumerate(smiles)})

    def config(out, **changes):
        return train_ldm.Config(**dict(
            data=str(screen), vae=str(vae_path), size="tiny", views=1, batch=4, steps=2,
            eval_every=1, molecule_encoder=encoder, molecule_table=str(tmp_path / "t.npz"),
            out=str(tmp_path / out)) | changes)
    path = train_ldm.train(config("whole"))
    train_ldm.train(config("parts", steps=1))
    parts = train_ldm.train(config("parts", resume=True))
    whole, again = (torch.load(p, weights_only=True) for p in (path, parts))
    if encoder != "smiles":  # the schedule of the first part knew another end
        assert whole["molecule_settings"] == again["molecule_settings"]
    model = sample.Model.load(path)
    images = model.generate({"smiles": smiles[:2]}, range(2), steps=1, progress=False)
    assert images.shape[0] == 2 and torch.isfinite(images).all()


def test_encoders_command_compares_and_resumes(screen, vae_path, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_ldm, "Config", make_dataclass("Config", [
        ("size", str, "tiny"), ("data", str, str(screen)), ("vae", str, str(vae_path))],
        bases=(train_ldm.Config,)))
    real = evaluate.screen_probe
    monkeypatch.setattr(evaluate, "screen_probe", lambda opened: real(opened, 2))
    arguments = ["conditions", "--encoders", "--names", "graph", "identity", "--seeds", 0,
                 "--train_steps", 2, "--molecules", 3, "--series", 1, "--steps", 1, "--out",
                 tmp_path / "e"]
    status, out, error = cli(evaluate, *arguments)
    assert status == 0, error
    assert all(word in out for word in ("graph", "identity", "real images", "molecules permuted"))
    lines = (tmp_path / "e" / "encoders.jsonl").read_text().splitlines()
    assert len(lines) == 4  # two encoders, the ceiling and the floor
    monkeypatch.setattr(train_ldm, "train", None)  # nothing is trained again
    assert cli(evaluate, *arguments)[0] == 0
    assert (tmp_path / "e" / "encoders.jsonl").read_text().splitlines() == lines
