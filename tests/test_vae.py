"""The autoencoder's training: what it learns from, what stops it and how it goes on, processes,
threads, checkpoints, refusals. Kills, full discs and damaged files are caused on purpose."""
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tifffile
import torch
from torch.testing import assert_close

import data
import train_vae
from train_vae import UserError

ANEW = {"step": 0, "losses": []}  # the checkpoint of a run that begins
# Processes are forked from a server that has imported torch and computed nothing: after a backward
# pass a process cannot be forked for another
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch.distributed", "rdkit.Chem.Descriptors", "tifffile",
                                  "pytest", "matplotlib.pyplot"])


def start(function, *arguments, says=os.devnull, **torchrun):
    """function(*arguments) as a script of its own, or with the variables of torchrun as one of two;
    what it prints goes to the file `says`."""
    process = PROCESSES.Process(target=script, args=(function, arguments, str(says), torchrun))
    process.start()
    return process


def script(function, arguments, says, torchrun):
    sys.stdout = sys.stderr = open(says, "w", buffering=1)
    train_vae.has_bf16 = lambda: False
    os.environ.update(torchrun)
    train_vae.join_processes()
    train_vae.run(partial(function, *arguments))


def start_two(function, *arguments, says):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [start(function, *arguments, says=f"{says}-{k}", RANK=k, LOCAL_RANK=k, WORLD_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for k in "01"]


def ended(process, within=60):
    process.join(within)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(a, b):
    """Two checkpoints with the same weights (and averaged ones, where there are), bit for bit, and
    the same losses in their logs."""
    for part in {"weights", "ema"} & set(load(a)):
        for one, other in zip(load(a)[part].items(), load(b)[part].items(), strict=True):
            assert one[0] == other[0] and torch.equal(one[1], other[1]), (part, one[0])
    for one, other in zip(*(train_vae.read_log(path.parent) for path in (a, b)), strict=True):
        assert all(one[name] == other[name] for name in one if "loss" in name or name == "l1")


def assert_alike(*paths):
    """Two runs with equal loss curves to 1e-5 and nearly equal means of the gradient."""
    for a, b in zip(*(train_vae.read_log(p.parent) for p in paths), strict=True):
        for name in {"train_loss", "heldout_loss", "l1"} & set(a):
            assert_close(a[name], b[name], atol=1e-5, rtol=1e-5)
    one, other = (torch.cat([state["exp_avg"].flatten() for state in load(p)["optimiser"][
        "state"].values()]) for p in paths)
    assert (one - other).abs().sum() < .02 * one.abs().sum()


def told(number, config, rank=0, train=train_vae.train):
    """Train, but in the second step the process of this rank is sent a signal."""
    def rate(step, *rest, real=train_vae.learning_rate):
        if step == 1 and train_vae.RANK == rank:
            os.kill(os.getpid(), number)
        return real(step, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vae, "learning_rate", rate)
        train(config)


@pytest.fixture
def config(screen, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "has_bf16", lambda: False)
    monkeypatch.setattr(data, "picture", lambda *_: None)
    return train_vae.Config(data=str(screen), out=str(tmp_path / "vae"), steps=4, width=8, blocks=1,
                            eval_every=2, batch=8, workers=0)


def folder_of_tiffs(folder, count):
    """A manifest of images that are files of their own, and the files."""
    rng, files = np.random.default_rng(0), [folder / f"{i}.tif" for i in range(count)]
    for file in files:
        tifffile.imwrite(file, rng.integers(0, 255, (5, 32, 32), np.uint8),
                         photometric="minisblack", compression="zlib")
    (folder / "m.csv").write_text("\n".join(["image", *(f.name for f in files)]) + "\n")
    return folder / "m.csv", files


# --- what is learned, from what -------------------------------------------------------------------

def test_training_lowers_the_loss_and_measures_the_latents(vae_path):
    log = train_vae.read_log(vae_path.parent)
    assert [line["step"] for line in log] == [20, 40] and log[1]["l1"] < log[0]["l1"]
    assert {"l1_per_channel", "psnr", "kl", "images_per_second", "data_wait"} < set(log[0])
    vae, _ = train_vae.load_vae(vae_path)
    assert not torch.allclose(vae.latent_std, torch.ones(1, 4, 1, 1)) and not vae.training
    assert (vae_path.parent / "reconstruction.png").stat().st_size > 20_000


def test_held_out_rows_reach_nothing_that_is_learned(config, monkeypatch):
    train, held = data.split_rows(data.read_manifest(config.data))
    asked, real = [], data.Views.__getitem__

    def fit(rule, manifest, rows, *more, real=data.fit_intensity):
        found, asked[:] = real(rule, manifest, rows, *more), [(row, 0) for row in rows]
        return found
    monkeypatch.setattr(data, "fit_intensity", fit)
    monkeypatch.setattr(data.Views, "__getitem__",
                        lambda views, key: asked.append(key) or real(views, key))
    train_vae.train(config)
    assert {int(row) for row, view in asked if view >= 0} == set(train.tolist())
    assert {int(row) for row, view in asked if view < 0} <= set(held.tolist())


def test_a_step_is_drawn_from_its_number_whatever_the_parts(config):
    run = train_vae.prepare(config, ANEW)
    whole, *halves = (train_vae.Steps(run, config, places)
                      for places in (range(8), range(4), range(4, 8)))
    for i in (0, 1):  # images, noise
        assert torch.equal(whole[5][i], torch.cat([half[5][i] for half in halves]))
        assert not torch.equal(whole[5][i], whole[6][i])
    batches = data.loader(whole, range(5, 7), 2, batch_size=None)  # as in a resumed run
    assert all(torch.equal(batch[0], whole[5 + k][0]) for k, batch in enumerate(batches))


def test_unreadable_images_are_left_out_until_they_are_too_many(config, tmp_path, monkeypatch,
                                                                capsys):
    path, files = folder_of_tiffs(tmp_path, 40)
    # as in large sets, which are not read before training
    monkeypatch.setattr(data, "read_manifest", partial(data.read_manifest, check=0))
    config = replace(config, data=str(path), batch=16, max_corrupt=.05, intensity="0:255")
    train, _ = data.split_rows(data.read_manifest(path))
    for row in train[1:3]:
        files[row].write_bytes(files[row].read_bytes()[:-1500])
        if row == train[1]:
            train_vae.train(config)
    assert capsys.readouterr().out.count(f"left out: {path}, row {train[1] + 2},") == 1
    with pytest.raises(UserError, match="2 of 36 images are unreadable, more than"):
        train_vae.train(replace(config, overwrite=True))
    steps = train_vae.Steps(train_vae.prepare(config, ANEW), config, range(16))
    found = [steps[k] for k in range(9)]
    assert all(x.isfinite().all() for x, _, _ in found)
    assert len(set().union(*(faults for _, _, faults in found))) == 2


# --- stopping and going on ------------------------------------------------------------------------

def test_a_stopped_run_goes_on_as_if_nothing_had_happened(config, tmp_path, monkeypatch, capsys):
    whole, cut = (replace(config, eval_every=3, out=str(tmp_path / k)) for k in ("whole", "cut"))
    train_vae.train(whole)
    before, path = signal.getsignal(signal.SIGINT), tmp_path / "cut/model.pt"
    with pytest.raises(SystemExit) as stop:
        told(signal.SIGINT, cut)
    assert stop.value.code == 130 and signal.getsignal(signal.SIGINT) is before
    assert "SIGINT after step 2 of 4: the same command goes on" in capsys.readouterr().err
    assert load(path)["step"] == 2  # the running step is finished and saved
    with pytest.raises(UserError, match="not trained to its end: python train_vae.py --resume"):
        train_vae.load_vae(path)
    monkeypatch.setattr(data, "fit_intensity", lambda *_: pytest.fail("measured again"))
    train_vae.train(replace(cut, resume=True))
    assert_same(tmp_path / "whole/model.pt", path)
    with pytest.raises(KeyboardInterrupt):  # a second Ctrl-C interrupts at once
        for _ in train_vae.Progress([0, 0], replace(config, steps=2), ANEW, "", 0):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)


def test_a_log_drops_what_is_written_again(config, tmp_path):
    path = train_vae.train(replace(config, steps=3))
    os.replace(path, tmp_path / "before.pt")
    train_vae.train(replace(config, eval_every=1))
    assert [line["step"] for line in train_vae.read_log(path.parent)] == [1, 2, 3, 4]
    os.replace(tmp_path / "before.pt", path)  # as if step 4 had not been saved
    train_vae.train(replace(config, steps=5, resume=True))
    assert [line["step"] for line in train_vae.read_log(path.parent)] == [1, 2, 3, 4, 5]


@pytest.mark.filterwarnings("error")  # of one held-out image
def test_a_finished_model_is_used_and_another_one_refused(config, tmp_path, capsys):
    manifest, _ = folder_of_tiffs(tmp_path, 6)
    config = replace(config, data=str(manifest), steps=2)
    model = train_vae.train(config)
    assert np.isfinite(train_vae.read_log(model.parent)[0]["l1_per_channel"]).all()
    before = model.read_bytes()
    assert train_vae.train_if_missing(train_vae.train, config) == model
    assert "trained already" in capsys.readouterr().out
    manifest.write_text(manifest.read_text() + "0.tif\n")
    for change, says in ((dict(lr=1.), "lr was 0.002"), (dict(steps=1), "it has 2 steps of 1"),
                         (dict(steps=3), "it has 2 steps of 3, --resume"),
                         (dict(steps=9, batch=4, resume=True), "batch was 8"),
                         (dict(steps=3, resume=True), "exists .*/m.csv has changed.: --overwrite")):
        with pytest.raises(UserError, match=says):
            train_vae.train(replace(config, **change))
    assert model.read_bytes() == before


def killed_while_writing(path):
    torch.save = lambda content, file: (file.write(b"PK half a checkpoint"), file.flush(),
                                        os.kill(os.getpid(), signal.SIGKILL))
    train_vae.save_checkpoint(path, "ldm", {"step": 2})


def without_space(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    train_vae.save_checkpoint(path, "ldm", {"weights": torch.zeros(100_000)})


def test_a_kill_or_a_full_disc_leaves_the_checkpoint_before(tmp_path):
    path, says = tmp_path / "model.pt", tmp_path / "says"
    train_vae.save_checkpoint(path, "ldm", {"step": 1})
    assert ended(start(killed_while_writing, path)) == -signal.SIGKILL
    assert (tmp_path / "model.tmp").exists() and load(path)["step"] == 1
    assert ended(start(without_space, path, says=says)) == 2
    line, = says.read_text().splitlines()
    assert f"{path} stays as it was" in line and "too large" in line
    assert load(path)["step"] == 1


# --- processes, threads, devices ------------------------------------------------------------------

def test_two_processes_stop_together_and_train_like_one(config, tmp_path):
    two = replace(config, out=str(tmp_path / "two"), resume=True)
    for run, status, says in (((told, signal.SIGTERM, two, 1), 143, "SIGTERM after step 2 of 4"),
                              ((train_vae.train, two), 0, "step 4: ")):
        both = start_two(*run, says=tmp_path / "says")
        assert [ended(process) for process in both] == [status] * 2
        assert says in (tmp_path / "says-0").read_text()
    assert (tmp_path / "says-1").read_text() == ""
    assert_alike(train_vae.train(config), tmp_path / "two/model.pt")


def test_no_process_waits_for_one_that_failed(config, tmp_path):
    config = replace(config, out=f"{config.data}/no/folder")  # the first process alone writes
    both = start_two(train_vae.train, config, says=tmp_path / "says")
    assert ended(both[0]) == 2 and ended(both[1])


def test_the_faster_number_of_threads_is_taken_until_another_program_begins(config, monkeypatch,
                                                                            capsys):
    threads, clock = [2], [0.]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(train_vae, "ALL_THREADS", 2)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(train_vae.time, "time", lambda: clock[0])

    def run(seconds, **changes):
        """Steps that take seconds(step)[threads - 1]: the threads of each, and what was said."""
        settings, used = replace(config, steps=400, **changes), []
        for step, _ in (progress := train_vae.Progress([0] * 400, settings, ANEW, "", 0)):
            used.append(threads[-1])
            clock[0] += seconds(step)[threads[-1] - 1]
            if step == 5:  # an evaluation is not part of the step
                progress.log(step)
                clock[0] += 99
        return used, capsys.readouterr().out.count("threads: 1"), used.count(2)
    for one, two, best in ((.1, .05, 2), (.05, .1, 1), (.105, .1, 1)):
        used, said, _ = run(lambda step: (one, two))
        assert used[1:10] == [1, 2, 1, 2, 1, 1, 2, 1, 2] and said == 2 - best
        assert used[10:200] == [best] * 190 and used[212:216] == [1, 2, 1, 2]  # anew
    assert run(lambda step: (.05, 2.))[0][1:200] == [1, 2] + [1] * 197  # once is enough
    used, said, _ = run(lambda step: (.1, 2. if step >= 30 else .05))
    assert used[29:33] == [2] * 4 and used[33:200].count(2) == 1 and said == 1
    assert run(lambda step: (.1, .3 if step < 100 else .05))[0][250] == 2
    for given, variable, used in ((1, "2", {1}), (0, "2", {2}), (2, "1", {2})):
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
        threads[-1] = 2
        assert set(run(lambda step: (.1, .01), threads=given)[0]) == used


def test_a_gpu_is_named_by_its_number_and_not_asked_to_emulate(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True:
                        including_emulation)  # as on a V100
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train_vae.device() == torch.device("cuda", 1) and not train_vae.has_bf16()


# --- refusals: one line that names the fault, status 2, nothing written over ----------------------

def test_settings_are_refused(tmp_path, refused, cli):
    manifest, _ = folder_of_tiffs(tmp_path, 3)
    for words, says in (
            ("--learning_rate 1", "unrecognized arguments: --learning_rate"),
            ("--step 3", "unrecognized"), ("--steps many", "invalid int value: 'many'"),
            ("--steps 0", "--steps 0 is out of range: at least 1"), ("--lr nan", "--lr nan"),
            (f"--seed {2 ** 70}", "out of range"), ("--width 12", "no multiple of 8"),
            ("--fold 4 --downsampling 2", "power of two"),
            ("--crop 40", "row 2: 32x32 pixels, but all views must"),
            ("--crop 30", "a multiple of 4: choose"), ("--split plate", "no column plate"),
            (f"--data {tmp_path}/none.csv", "none.csv")):
        assert len(refused(train_vae, "--data", manifest, "--out", tmp_path / "o", *words.split(),
                           says=[says])) == 1
    assert not (tmp_path / "o").exists()
    assert train_vae.settings(train_vae.Config, ["--no-flips", "--workers", "0"]) == replace(
        train_vae.Config(), flips=False, workers=0)
    status, out, _ = cli(train_vae, "--help")
    assert status == 0 and out.count("(default:") == len(vars(train_vae.Config()))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_checkpoints_are_refused(tmp_path, vae_path):
    for name, content in (("noise.pt", bytes(range(256)) * 20), ("empty.pt", b""),
                          ("cut.pt", vae_path.read_bytes()[:5000]),
                          ("pickle.pt", pickle.dumps(Bomb(), protocol=2))):
        (tmp_path / name).write_bytes(content)
    torch.save({"kind": "vae", "inside": Bomb()}, tmp_path / "inside.pt")
    torch.save([1], tmp_path / "list.pt")
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match="is damaged, or no checkpoint of nanopaint") as fault:
            train_vae.load_vae(path)
        assert len(str(fault.value).splitlines()) == 1
    with pytest.raises(UserError, match="no vae checkpoint at .*none.pt: run python train_vae.py"):
        train_vae.load_vae(tmp_path / "none.pt")
    with pytest.raises(UserError, match=r"another kind \(vae\), not ldm: the hint"):
        train_vae.load_checkpoint(vae_path, "ldm", "the hint")
