"""Training the diffusion model and the ControlNet: what a step draws, what reaches what is learned,
and what goes wrong in runs of days, each caused on purpose."""
import contextlib
import csv
import functools
import os
import re
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import sample
import train_ldm
import train_vae
from conftest import randomise
from data import UserError
from test_vae import ANEW, assert_alike, assert_same, ended, load, start, start_two, told
from train_vae import read_log


def prepared(config):
    """Everything up to the first step of a run: (run, its Steps)."""
    config = train_ldm.settle(config)
    run = train_ldm.prepare(config, ANEW)
    return run, train_ldm.Steps(run, config)


def hinted_config(ldm_path, out, column, **changes):
    return train_ldm.Config(base=str(ldm_path), control_column=column, out=str(out), **{
        "steps": 4, "eval_every": 4, "batch": 8, "workers": 0} | changes)


def rows_of(screen):
    """Every fourth row of the screen's manifest, for the quickness of it."""
    with open(screen, newline="") as file:
        rows = list(csv.DictReader(file))[::4]
    files = "image", "brightfield", "untreated"
    return [row | {name: screen.parent / row[name] for name in files} for row in rows]


def table_of(folder, rows, **columns):
    """A manifest of these rows with columns {name: function(row number)}."""
    folder.mkdir(exist_ok=True)
    rows = [row | {name: f(i) for name, f in columns.items()} for i, row in enumerate(rows)]
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "manifest.csv"


def two_images(folder, **columns):
    np.save(folder / "good.npy", np.random.default_rng(0).integers(0, 255, (5, 32, 32), np.uint8))
    columns = {"image": ["good.npy"] * 2} | columns
    return table_of(folder, [dict(zip(columns, row)) for row in zip(*columns.values())])


def test_first_loss_is_one_training_lowers_it_and_pictures_are_drawn(ldm_config, tmp_path, capsys,
                                                                     pictures):
    path = train_ldm.train(replace(ldm_config, out=str(tmp_path), steps=40, eval_every=20, lr=3e-3))
    log, said = read_log(path.parent), capsys.readouterr().out
    assert_close(log[0]["heldout_loss"], 1., atol=.05, rtol=0)
    assert "step 0: heldout_loss 1.0" in said and "smiles (molecule, biology)" in said
    assert [e["step"] for e in log] == [0, 20, 40] and len(log[0]["by_noise"]) == 4
    assert_close(np.mean(log[2]["by_noise"]), log[2]["heldout_loss"])
    assert log[2]["train_loss"] < log[1]["train_loss"] < log[0]["heldout_loss"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("samples.png", "curves.png"))


def test_overfit_collapses_and_saves_nothing(ldm_config, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("kept")
    train_ldm.train(replace(ldm_config, out=str(tmp_path), overfit=True, steps=60, eval_every=30,
                            lr=5e-3))
    first, last = map(float, re.findall(r"train_loss ([\d.]+)", capsys.readouterr().out))
    assert last < .8 * first and not (tmp_path / "model.pt").exists()
    assert (tmp_path / "log.jsonl").read_text() == "kept"


def test_a_model_may_be_told_nothing(ldm_config, tmp_path):
    path = train_ldm.train(replace(ldm_config, out=str(tmp_path), steps=1, eval_every=1, biology=(),
                                   experiment=()))
    assert sample.Model.load(path).generate({}, [0], steps=2, progress=False).shape[0] == 1


@pytest.mark.parametrize("ema, decays", [(.999, (.1, 2 / 11)), (.05, (.05, .05))])
def test_the_average_warms_up(ema, decays, ldm_config, tmp_path):
    """Decay at most (1 + n) / (10 + n)."""
    config = replace(ldm_config, out=str(tmp_path), eval_every=1, ema=ema)
    average = {k: v.clone() for k, v in prepared(config)[0].denoiser.state_dict().items()}
    for step, decay in enumerate(decays, 1):
        content = load(train_ldm.train(replace(config, steps=step, resume=True)))
        for name, weight in content["weights"].items():
            average[name] = decay * average[name] + (1 - decay) * weight
            assert_close(content["ema"][name], average[name])


def test_a_step_follows_from_its_number_whatever_the_processes(ldm_config, monkeypatch, tmp_path):
    run, steps = prepared(replace(ldm_config, molecule_encoder="smiles", out=str(tmp_path)))
    whole, halves = steps[7], []
    assert torch.equal(whole["z0"], steps[7]["z0"]) and not torch.equal(whole["z0"], steps[8]["z0"])
    monkeypatch.setattr(train_vae, "WORLD", 2)
    for rank in range(2):
        monkeypatch.setattr(train_vae, "RANK", rank)
        halves.append(steps[7])
    for name in ("z0", "eps", "t", "keep"):
        assert torch.equal(torch.cat([half[name] for half in halves]), whole[name]), name
    spelling = torch.cat([steps[k]["codes"]["smiles"] % 8 for k in range(20)])
    assert set(spelling.tolist()) == set(range(8))  # in training at random, held out canonical
    assert not (run.held.codes["smiles"] % 8).any()


def test_time_steps_are_logit_normal_but_for_a_share_that_is_uniform(ldm_config, tmp_path):
    run, steps = prepared(replace(ldm_config, out=str(tmp_path), batch=4000))
    logit = ((steps[0]["t"] + .5) / run.schedule.T).logit()
    assert abs(logit.mean()) < .1 and abs(logit.std() - 1) < .1
    steps.config = replace(steps.config, uniform=.5)
    last = (steps[0]["t"] >= .98 * run.schedule.T).float().mean()  # of a logit-normal 5e-5
    assert .005 < last < .015


def test_latents_are_the_views_encoded_and_sampled(ldm_config, tmp_path):
    run, _ = prepared(replace(ldm_config, views=2, out=str(tmp_path)))
    x = torch.stack([run.views[int(run.training.rows[k]), v][0] for k in (0, 5) for v in (0, 1)])
    cached = torch.from_numpy(run.training.cache[[0, 1, 10, 11], 0].astype(np.float32))
    assert_close(cached, run.vae.encode(x)[0], atol=.1, rtol=.1)  # float16, encoded in bfloat16
    assert (x[::2] - x[1::2]).abs().max() > .1                    # two views of one image
    noise_rng = torch.Generator().manual_seed(0)
    one, other = (run.training.take(np.arange(200), 0, noise_rng) for _ in range(2))
    assert not torch.equal(one, other)
    assert_close(one.std().item(), 1., atol=.25, rtol=0)


def test_rows_are_drawn_by_the_column_weight(ldm_config, screen, tmp_path, capsys):
    table = table_of(tmp_path / "a", rows_of(screen), weight=lambda i: ["0", "1", "3"][i % 3])
    run, steps = prepared(replace(ldm_config, data=str(table), out=str(tmp_path), batch=4000))
    assert "column weight" in capsys.readouterr().out
    run.training.take = lambda positions, view, rng: torch.from_numpy(positions)
    counts = np.bincount(run.training.rows[steps[0]["z0"]] % 3, minlength=3)
    assert counts[0] == 0 and 2.5 < counts[2] / counts[1] < 3.6


def test_held_out_rows_reach_nothing_that_is_learned(ldm_config, screen, tmp_path):
    """No value of a held-out row enters a range or a vocabulary, and no image the training side."""
    split = [row["split"] for row in rows_of(screen)]
    run, _ = prepared(replace(ldm_config, out=str(tmp_path), data=str(table_of(
        tmp_path, rows_of(screen), row=lambda i: "3" if split[i] == "train" else "99",
        plate=lambda i: "P01" if split[i] == "train" else "P99"))))
    assert {split[i] for i in run.training.rows} == {"train"}
    assert {split[i] for i in run.held.rows} == {"val"}
    fields = {f.name: f for f in run.fields}
    assert fields["row"].high == 3 and fields["plate"].vocabulary == ["P01"]
    assert not run.held.known[:, 3].any() and run.held.known[:, 2].all()  # an unseen plate: unknown


@pytest.mark.parametrize("hinted", [False, True])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(hinted, ldm_config, ldm_path, tmp_path,
                                                          capsys, monkeypatch):
    monkeypatch.setattr(train_vae.Progress, "period", 3 if hinted else 1)  # and between readings
    base = hinted_config(ldm_path, "", "brightfield", views=1, unfreeze_decoder=True) if hinted \
        else replace(ldm_config, steps=4, eval_every=4)
    whole, cut = (replace(base, out=str(tmp_path / name)) for name in ("whole", "cut"))
    one, other = train_ldm.train(whole), tmp_path / "cut/model.pt"
    with pytest.raises(SystemExit) as stop:
        told(signal.SIGTERM, cut, train=train_ldm.train)
    assert stop.value.code == 143 and "SIGTERM after step 2 of 4" in capsys.readouterr().err
    assert load(other)["step"] == 2  # the running step is not lost
    with pytest.raises(UserError, match="2 steps of 4"):
        train_ldm.train(cut)
    train_ldm.train(replace(cut, resume=True))
    assert_same(one, other)
    if hinted:  # the decoder has moved, the rest of the base has not
        before, after = load(ldm_path)["ema"], load(one)["weights"]
        moved = {k for k in before if not torch.equal(before[k], after[k])}
        assert moved and all(k.startswith(("unet.up.", "unet.out.")) for k in moved)


def test_a_run_that_goes_on_keeps_its_own_autoencoder(ldm_config, ldm_path, vae_path, tmp_path):
    assert train_ldm.train(ldm_config) == ldm_path  # finished already
    config, vae = replace(ldm_config, out=str(tmp_path), eval_every=1), vae_path.read_bytes()
    before = load(train_ldm.train(replace(config, steps=1)))["vae"]["weights"]
    other = load(vae_path)
    other["weights"]["latent_std"] *= 2
    torch.save(other, vae_path)
    after = load(train_ldm.train(replace(config, steps=2, resume=True)))["vae"]["weights"]
    vae_path.write_bytes(vae)
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    with pytest.raises(UserError, match="target was velocity"):
        train_ldm.train(replace(config, steps=3, resume=True, target="image"))


def test_losses_that_are_read_seldom_are_the_same(ldm_config, tmp_path, monkeypatch):
    for period in (1, 3):
        monkeypatch.setattr(train_vae.Progress, "period", period)
        train_ldm.train(replace(ldm_config, out=str(tmp_path / str(period)), steps=4, eval_every=4))
    one, three = (read_log(tmp_path / name)[1]["train_loss"] for name in "13")
    assert_close(one, three)


def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(ldm_config, tmp_path, monkeypatch):
    """Though it is read after the step, and the loss itself is finite."""
    def loss(*given, real=train_ldm.loss_of):
        found = real(*given)
        if (tmp_path / "model.pt").exists():
            found.register_hook(lambda gradient: gradient * torch.nan)
        return found
    monkeypatch.setattr(train_ldm, "loss_of", loss)
    monkeypatch.setattr(train_vae.Progress, "period", 20)
    with pytest.raises(UserError, match="step 2: .* nan; "):
        train_ldm.train(replace(ldm_config, out=str(tmp_path), eval_every=2, steps=4))
    content = load(tmp_path / "model.pt")
    assert content["step"] == 2 and all(v.isfinite().all() for v in content["weights"].values())


def test_without_a_compiler_training_goes_on(monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no compiler\nand more")
    monkeypatch.setattr(torch, "compile", fails)
    assert train_vae.for_training(torch.nn.Linear(1, 1), True)._compiled_call_impl is None
    assert capsys.readouterr().out == "not compiled, so slower: no compiler\n"


class Waits(TorchDispatchMode):
    """Names the operations that wait for a GPU: with some tensors here, some on the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        places = {x.device for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x)}
        self.found += [str(function)] * (len(places) > 1)
        return out


@pytest.mark.parametrize("hinted", [False, True])
def test_the_loss_and_its_gradient_need_nothing_from_the_host(hinted, ldm_config, ldm_path,
                                                              tmp_path, monkeypatch):
    """On torch's device "meta", which has no values to read: .item() and nonzero() fail there."""
    config = hinted_config(ldm_path, tmp_path, "brightfield") if hinted else replace(
        ldm_config, out=str(tmp_path), min_snr=True)
    run, steps = prepared(config)
    monkeypatch.setattr(train_ldm, "autocast", contextlib.nullcontext)
    model, to_meta = run.denoiser.to("meta"), lambda x: x.to("meta")
    batch, run.molecules = train_ldm.each(to_meta, [steps[0], run.molecules])
    train_ldm.loss_of(model, batch, run, config)  # the schedule's table is copied once
    with Waits() as waits:
        train_ldm.loss_of(model, batch, run, config).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
    assert waits.found == []


def test_a_step_is_saved_before_it_is_evaluated(ldm_config, ldm_path, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ldm, "report", lambda *_: pytest.fail("evaluation fails"))
    shutil.copy(ldm_path, tmp_path / "model.pt")
    with pytest.raises(pytest.fail.Exception):
        train_ldm.train(replace(ldm_config, out=str(tmp_path), steps=5, resume=True))
    assert load(tmp_path / "model.pt")["step"] == 5


def build(screen, folder, kill_at=None, count=500):
    """A cache of views as they are, for the quickness of it, and how many batches were encoded."""
    calls = []

    def encode(x):
        calls.append(len(x))
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return x
    config, vae = train_ldm.Config(vae=str(folder / "model.pt"), workers=0), torch.nn.Identity()
    views = data.Views(data.read_manifest(screen), dict(rule="", low=[0.] * 5, high=[255.] * 5))
    cache = train_ldm.cached(SimpleNamespace(vae=vae), config, "views", views, range(count), 1,
                             views.shape, encode)
    return np.array(cache), len(calls)


def test_killed_and_simultaneous_runs_leave_whole_caches(screen, tmp_path):
    (tmp_path / "whole").mkdir(), (tmp_path / "both").mkdir()
    whole, calls = build(screen, tmp_path / "whole")
    assert ended(start(build, screen, tmp_path, 5)) == -signal.SIGKILL
    assert not list(tmp_path.glob("*.f16")) and calls == 8
    found, calls = build(screen, tmp_path)
    assert np.array_equal(found, whole) and calls == 8 and build(screen, tmp_path)[1] == 0
    processes = [start(build, screen, tmp_path / "both") for _ in range(2)]
    assert [ended(process) for process in processes] == [0, 0]
    assert np.array_equal(build(screen, tmp_path / "both")[0], whole)
    build(screen, tmp_path / "both", count=400)  # other rows, another file
    assert len(list((tmp_path / "both").iterdir())) == 2


@pytest.mark.parametrize("name, i", [("image", 3), ("hint", 5)])
def test_an_unreadable_image_is_left_out_and_hints_stay_with_their_targets(
        name, i, tmp_path, capsys, monkeypatch):
    """Many images are not read before training. Each hint here is its target with another gain:
    every pair must be cropped, flipped and turned alike."""
    rng = np.random.default_rng(0)
    for k in range(40):
        image = rng.integers(0, 200, (1, 40, 40), np.uint8)
        np.savez_compressed(tmp_path / f"image{k}.npz", image)
        np.savez_compressed(tmp_path / f"hint{k}.npz", image // 2)
    table = table_of(tmp_path, [{"dose": k % 3} for k in range(40)], image="image{}.npz".format,
                     hint="hint{}.npz".format)
    file = tmp_path / f"{name}{i}.npz"
    file.write_bytes(file.read_bytes()[:-500])
    monkeypatch.setattr(data, "read_manifest", functools.partial(data.read_manifest, check=1))
    common = dict(data=str(table), max_corrupt=.05, steps=1, eval_every=1, workers=0, batch=4)
    vae = train_vae.train(train_vae.Config(channels="DNA", crop=16, pixels=True,
                                           out=str(tmp_path / "vae"), **common))
    base = train_ldm.train(train_ldm.Config(vae=str(vae), biology=("dose",), experiment=(),
                                            size="tiny", out=str(tmp_path / "ldm"), **common))
    run, steps = prepared(hinted_config(base, tmp_path / "hinted", "hint", **common | {"batch": 8}))
    assert file.name in capsys.readouterr().out
    left_out = [*run.training.rows[~run.training.usable], *run.held.rows[~run.held.usable]]
    low, high = (np.array(run.controlnet["intensity"][k])[0] for k in ("low", "high"))
    for step in range(20):
        batch = steps[step]
        pair = run.vae.to_image(batch["z0"]), low + (batch["hint"][0] + 1) / 2 * (high - low)
        assert left_out == [i] and np.corrcoef(*(x.flatten() for x in pair))[0, 1] > .98


def test_two_processes_train_like_one(ldm_config, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "has_bf16", lambda: False)
    both = start_two(train_ldm.train, replace(ldm_config, out=str(tmp_path / "two")),
                     says=tmp_path / "says")
    one = train_ldm.train(replace(ldm_config, out=str(tmp_path / "one")))
    assert [ended(p) for p in both] == [0, 0], (tmp_path / "says-0").read_text()
    assert_alike(one, tmp_path / "two/model.pt")


def test_a_controlnet_starts_as_its_base_and_leaves_it_as_it_was(ldm_path, hinted_path):
    first, last = read_log(hinted_path.parent)[0], read_log(ldm_path.parent)[-1]
    assert_close(first["heldout_loss"], last["heldout_loss"], atol=1e-5, rtol=0)
    before, after = (load(path) for path in (ldm_path, hinted_path))
    assert all(torch.equal(v, after["weights"][k]) for k, v in before["ema"].items())
    assert any(v.abs().sum() > 0 for k, v in after["weights"].items() if "zero_conv" in k)
    assert set(after["controlnet"]) == {"column", "channels", "downsampling", "intensity", "stains"}


def test_the_network_sees_the_image_unless_it_is_hidden(ldm_path, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "has_bf16", lambda: False)
    run, steps = prepared(hinted_config(ldm_path, tmp_path, "untreated"))
    randomise(run.denoiser, seed=3)
    batch = steps[0]
    images, codes, known, shown = batch["hint"]
    assert run.controlnet["stains"] and shown.eq(1).all()

    def loss(*hint):
        return train_ldm.loss_of(run.denoiser, batch | {"hint": hint or None}, run, steps.config)
    with torch.no_grad():
        seen = loss(images, codes, known, shown)
        assert (loss(images.roll(1, 0), codes, known, shown) - seen).abs() > 1e-4
        assert_close(loss(images, codes, known, 0 * shown), loss())
    assert not known[:, :2].any() and known[:, 2:].any() and not known[:, 2:].all()
    steps.config = replace(steps.config, unfreeze_decoder=True, batch=400)
    assert .8 < steps[0]["hint"][3].mean() < .96


def test_negative_controls_are_drawn_from_those_listed(ldm_path, screen, tmp_path, refused):
    """One of them each step, with its own conditions but for the treatment, of the training side
    only; a listed row that is treated is refused."""
    rows, controls = rows_of(screen), {}
    for i, row in enumerate(rows):
        if float(row["dose"]) == 0:
            controls.setdefault(row["plate"], []).append(i)
    held = {first for first, *_ in controls.values()}

    def listed(i):
        return " ".join(str(k + 2) for k in controls[rows[i]["plate"]][:4] if k != i)
    table = table_of(tmp_path, rows, control_row=listed,
                     split=lambda i: "val" if i in held else rows[i]["split"])
    run, steps = prepared(hinted_config(ldm_path, tmp_path, "control_row", data=str(table)))
    side, drawn = run.training, set()
    side.take = lambda positions, view, rng: torch.from_numpy(positions)
    images = {x.tobytes(): side.hints.rows[k // 2] for k, x in enumerate(side.hints.cache)}
    for step in range(10):
        batch = steps[step]
        for k, x in enumerate(batch["hint"][0]):
            shown = images[x.numpy().astype(np.float16).tobytes()]
            assert str(shown + 2) in listed(side.rows[batch["z0"][k]]).split()
            drawn.add(shown)
        assert not batch["hint"][2][:, :2].any()
    assert len(drawn) > 6 and not drawn & held and held & set(run.held.hints.rows)
    table = table_of(tmp_path / "b", rows, control_row=lambda i: "3" if i else "300 x")
    refused(train_ldm, "--base", ldm_path, "--control_column", "control_row", "--data", table,
            "--out", tmp_path / "o", says=["row 2, column control_row: row 300", "row x"])


def test_all_faults_are_reported_before_anything_is_trained(tmp_path, refused, monkeypatch):
    """Of files, fields and weights in one go, where the autoencoder would be trained first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_vae, "train", lambda config: pytest.fail("training has begun"))
    path = two_images(tmp_path, image=["good.npy", "gone.npy"], smiles=["C1CC", "CCO"],
                      dose=["1", "x"], split=["train", "val"], weight=["-1", "2"])
    lines = refused(train_ldm, "--data", path, "--experiment", says=[
        "row 3, column image", "row 2, column smiles", "row 3, column dose", "column weight: -1"])
    assert len(lines) == 4 and all(str(path) in line for line in lines)


def test_the_default_autoencoder(ldm_config, vae_path, tmp_path, refused, monkeypatch):
    """Unfinished it is gone on with; trained on other data it is used only if it is named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/vae").mkdir(parents=True)
    content, resumed = load(vae_path), []
    torch.save(content, train_ldm.VAE)
    path = two_images(tmp_path, dose=["1", "2"], split=["train", "val"])
    refused(train_ldm, "--data", path, says=[f"was trained on {ldm_config.data}", "--vae"])
    common = dict(steps=1, biology=("dose",), experiment=())
    train_ldm.train(replace(ldm_config, data=str(path), vae=train_ldm.VAE, out="a", **common))
    torch.save(content | {"step": content["step"] - 1}, train_ldm.VAE)
    monkeypatch.setattr(train_vae, "train", lambda config: resumed.append(config.resume) or
                        shutil.copy(vae_path, train_ldm.VAE))
    train_ldm.train(replace(ldm_config, vae="", out="b", **common))
    assert resumed == [True]


def test_settings_that_cannot_be_used(tmp_path, refused, screen, vae_path, ldm_path, hinted_path):
    base = ["--base", ldm_path, "--control_column", "brightfield"]
    for words, says in (
            (["--size", "huge"], ["--size", "huge", "tiny"]),
            (["--target", "noise"], ["--target noise"]),
            (["--target", "noise", "--no-zero_snr"], ["linear or scaled_linear"]),
            (["--uniform", "20"], ["--uniform 20"]), (["--vae", ldm_path], ["another kind (ldm)"]),
            (["--vae", tmp_path / "none.pt"], ["no vae checkpoint", "train_vae.py"]),
            (["--unfreeze_decoder"], ["--control_column"]),
            ([*base, "--size", "small"], ["--size", "of the base"]),
            ([*base[:3], "phase"], ["no column phase"]),
            ([*base, "--base", hinted_path], ["has a ControlNet already"])):
        assert len(refused(train_ldm, *words, "--out", tmp_path / "o", says=says)) == 1
    assert not (tmp_path / "o/model.pt").exists()
    path = two_images(tmp_path, smiles=["CCO", "CCC"], dose=["1", "2"], pixel_um=["1", "0.5 um"])
    refused(train_ldm, "--data", path, "--vae", vae_path, "--experiment", "--out", tmp_path / "o",
            says=["row 3, column pixel_um"])
    refused(train_ldm, *base[:3], "image", "--data", path, says=["no column batch", "column plate"])
    # data named as the default is are not those of the base
    for given, taken in (("", str(screen)), (train_vae.Config.data, train_vae.Config.data)):
        config = train_ldm.settle(hinted_config(ldm_path, "", "a,b", data=given))
        assert config.data == taken and config.out == "runs/a_b"
