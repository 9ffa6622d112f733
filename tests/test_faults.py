"""What goes wrong in runs of days, each caused on purpose: kills, full discs, damaged files,
changed data; and what must give the same result: resuming, several processes, parts of a batch."""
import csv
import json
import multiprocessing
import os
import resource
import shlex
import signal
import socket
import sys
import threading
import time
import tracemalloc
from dataclasses import make_dataclass, replace
from functools import partial

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch.testing import assert_close

import data
import train_ldm
import train_vae
from conditioning import FieldError, parse_fields

# Processes are forked from a server that has imported torch and computed nothing: after a backward
# pass a process cannot be forked for another
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch.distributed", "rdkit.Chem.Descriptors", "tifffile",
                                  "pytest", "matplotlib.pyplot"])


def start(function, *arguments, says=os.devnull):
    """function(*arguments) as a script of its own, what it prints in the file `says`."""
    process = PROCESSES.Process(target=script, args=(function, arguments, str(says)))
    process.start()
    return process


def script(function, arguments, says):
    sys.stdout = sys.stderr = open(says, "w", buffering=1)
    torch.set_num_threads(1)
    train_vae.has_bf16 = lambda: False
    train_ldm.draw_samples = train_ldm.draw_curves = lambda *_: None
    train_ldm.field_gaps, train_vae.draw_reconstruction = lambda *_: {}, lambda *_: None
    train_vae.run(partial(function, *arguments))


def ended(process, within=60):
    process.join(within)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


@pytest.fixture(autouse=True)
def no_gaps(monkeypatch):
    """What shuffled fields do to the loss, and a picture, take most of the time of short runs."""
    monkeypatch.setattr(train_ldm, "field_gaps", lambda *_: {})
    monkeypatch.setattr(train_vae, "draw_reconstruction", lambda *_: None)


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(train_vae, "has_bf16", lambda: False)


@pytest.fixture
def vae_config(screen, tmp_path):
    return train_vae.Config(data=str(screen), out=str(tmp_path / "vae"), steps=4, width=8, blocks=1,
                            eval_every=4, batch=8)


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(a, b):
    one, other = load(a), load(b)
    for part in {"weights", "ema"} & set(one):
        for name, weight in one[part].items():
            assert torch.equal(weight, other[part][name]), (part, name)


# --- stopping and going on ------------------------------------------------------------------------

@pytest.mark.parametrize("module, number", [(train_vae, signal.SIGINT),
                                            (train_ldm, signal.SIGTERM)])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
        module, number, vae_config, ldm_config, tmp_path, monkeypatch, cli):
    base = replace(vae_config if module is train_vae else ldm_config, steps=4, eval_every=4)
    whole, cut = (replace(base, out=str(tmp_path / name)) for name in ("whole", "cut"))
    module.train(whole)
    before = signal.getsignal(number)

    def told_at_step_1(step, *rest, rate=train_vae.learning_rate):
        if step == 1:
            os.kill(os.getpid(), number)
        return rate(step, *rest)
    with monkeypatch.context() as patch, pytest.raises(train_vae.Stopped) as stop:
        patch.setattr(module, "learning_rate", told_at_step_1)
        module.train(cut)
    assert signal.getsignal(number) is before and stop.value.args[0] == number
    assert load(tmp_path / "cut/model.pt")["step"] == 2  # the running step is not lost
    message = stop.value.args[1]
    assert f"{number.name} after step 2 of 4" in message and len(message.splitlines()) == 1
    status, _, error = cli(module, *shlex.split(message.partition(".py ")[2]))
    assert status == 0, error
    assert_same(tmp_path / "whole/model.pt", tmp_path / "cut/model.pt")
    log = [[json.loads(line) for line in open(tmp_path / name / "log.jsonl")][-1]
           for name in ("whole", "cut")]
    for name in {"train_l1", "train_loss", "heldout_loss", "l1"} & set(log[0]):
        assert log[0][name] == log[1][name], name


def test_the_exit_status_says_which_signal(cli, monkeypatch):
    def stopped(*_):
        raise train_vae.Stopped(signal.SIGTERM, "stopped by SIGTERM")
    monkeypatch.setattr(train_vae, "train", stopped)
    assert cli(train_vae) == (143, "", "stopped by SIGTERM\n")


def test_an_unfinished_autoencoder_is_not_used_but_gone_on_with(
        vae_config, ldm_config, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    small = {k: getattr(vae_config, k) for k in ("width", "blocks", "batch")} | dict(
        steps=2, eval_every=1)
    monkeypatch.setattr(train_vae, "Config", make_dataclass("Small", [
        (k, int, v) for k, v in small.items()], bases=(train_vae.Config,)))
    with monkeypatch.context() as patch:
        patch.setattr(train_vae, "finish", lambda *_: None)
        train_vae.train(train_vae.Config(data=vae_config.data))
    refused(train_ldm, "--data", vae_config.data, "--vae", tmp_path / "runs/vae/model.pt",
            says=["stopped at step 2 of 2", "python train_vae.py --resume"])
    train_ldm.train_first(replace(ldm_config, vae=train_ldm.Config.vae))
    assert "result" in load("runs/vae/model.pt")


def test_the_last_checkpoints_are_kept(vae_config, tmp_path):
    path = train_vae.train(replace(vae_config, out=str(tmp_path), eval_every=1, keep=2))
    assert [p.name for p in train_vae.step_files(tmp_path)] == ["step-3.pt", "step-4.pt"]
    assert_same(path, tmp_path / "step-4.pt")
    assert load(tmp_path / "step-3.pt")["step"] == 3 and "optimiser" in load(path)


def killed_while_writing(path):
    def half(content, file):
        file.write(b"PK half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = half
    train_vae.save_checkpoint(path, "ldm", {"step": 2})


def test_a_kill_during_a_checkpoint_leaves_the_one_before(tmp_path):
    path = tmp_path / "model.pt"
    train_vae.save_checkpoint(path, "ldm", {"step": 1})
    assert ended(start(killed_while_writing, path)) == -signal.SIGKILL
    assert (tmp_path / "model.tmp").exists()
    assert train_vae.load_checkpoint(path, "ldm", "")["step"] == 1
    train_vae.save_checkpoint(path, "ldm", {"step": 3})
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def with_little_room(function, *arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    function(*arguments)


def test_no_space_for_a_checkpoint(tmp_path):
    path, says = tmp_path / "model.pt", tmp_path / "says"
    train_vae.save_checkpoint(path, "ldm", {"step": 1})
    assert ended(start(with_little_room, train_vae.save_checkpoint, path, "ldm",
                       {"weights": torch.zeros(100_000)}, says=says)) == 2
    lines = says.read_text().splitlines()
    assert len(lines) == 1 and f"{path} cannot be written" in lines[0] and "too large" in lines[0]
    assert load(path)["step"] == 1 and not (tmp_path / "model.tmp").exists()


# --- the cache of latents -------------------------------------------------------------------------

def open_screen(path, **options):
    manifest = data.read_manifest(path)
    settings = train_vae.Config(data=str(path))
    return (data.Pixels(manifest, **options), np.arange(1300), settings,
            {"low": [0.] * 5, "high": [255.] * 5}, 1)


def build(path, screen, kill_at=None, calls=None):
    """A cache of views as they are, for the quickness of it."""
    calls = [] if calls is None else calls

    def encode(x, first):
        calls.append(first)
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return x
    return train_ldm.cache(path, open_screen(screen), encode, "views")


@pytest.fixture(scope="module")
def whole_cache(screen, tmp_path_factory):
    return np.array(build(tmp_path_factory.mktemp("cache") / "whole.npy", screen))


def test_a_kill_during_caching_loses_little(screen, whole_cache, tmp_path):
    assert ended(start(build, tmp_path / "c.npy", screen, 19)) == -signal.SIGKILL
    assert not (tmp_path / "c.npy").exists()
    calls = []
    found = build(tmp_path / "c.npy", screen, calls=calls)
    assert np.array_equal(found, whole_cache)  # the same views, not others of the same images
    assert calls == [1024 + 64 * k for k in range(21 - 16)]  # 1024 views were kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "c.npy"]
    build(tmp_path / "c.npy", screen, calls=calls)
    assert len(calls) == 21 - 16  # used as it stands


def test_no_space_for_the_cache(screen, whole_cache, tmp_path):
    says = tmp_path / "says"
    assert ended(start(with_little_room, build, tmp_path / "c.npy", screen, says=says)) == 2
    lines = [line for line in says.read_text().splitlines() if "error" in line]
    assert len(lines) == 1 and "c.npy cannot be written" in lines[0] and "run again" in lines[0]
    assert np.array_equal(build(tmp_path / "c.npy", screen), whole_cache)


def test_a_cache_of_the_wrong_length_is_built_again(screen, whole_cache, tmp_path):
    path = tmp_path / "c.npy"
    build(path, screen)
    for damage in (path.read_bytes()[:-1000], b"", b"noise" * 100):
        path.write_bytes(damage)
        assert np.array_equal(build(path, screen), whole_cache)
    np.save(path, whole_cache[:-64])
    assert np.array_equal(build(path, screen), whole_cache)


def test_two_runs_can_ask_for_one_cache(screen, whole_cache, tmp_path):
    both = [start(build, tmp_path / "c.npy", screen) for _ in range(2)]
    assert [ended(p) for p in both] == [0, 0]
    assert np.array_equal(np.load(tmp_path / "c.npy"), whole_cache)


def test_a_changed_manifest_is_other_data(screen, vae_path, ldm_config, tmp_path):
    text = screen.read_text()
    for name in ("image", "untreated", "brightfield"):
        os.link(screen.parent / f"{name}.npy", tmp_path / f"{name}.npy")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(text)
    config = replace(ldm_config, data=str(manifest), out=str(tmp_path / "o"), steps=1, eval_every=1)
    train_ldm.train(config)
    keys = {train_ldm.cache_key(*open_screen(manifest)[:4])}
    first, *rest = text.splitlines()
    manifest.write_text("\n".join([first, rest[1], rest[0], *rest[2:]]) + "\n")  # same length
    assert train_ldm.cache_key(*open_screen(manifest)[:4]) not in keys
    with pytest.raises(train_vae.UserError, match="the manifest has changed"):
        train_ldm.train(replace(config, steps=2, resume=True))
    manifest.write_text(text)
    assert train_ldm.cache_key(*open_screen(manifest)[:4]) in keys
    train_ldm.train(replace(config, steps=2, resume=True))


# --- damaged files --------------------------------------------------------------------------------

def write_image(path, image):
    if path.suffix == ".npz":
        np.savez_compressed(path, sample=image)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, image, photometric="minisblack")
    else:
        Image.fromarray(image[0]).save(path)


def folder_of(path, suffix, count=40, **columns):
    """A manifest of images, each a file of its own, and the files."""
    rng = np.random.default_rng(0)
    files = [path / f"{i}{suffix}" for i in range(count)]
    for file in files:
        write_image(file, rng.integers(0, 255, (5, 32, 32), np.uint8))
    with open(path / "m.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["image", *columns], *zip([f.name for f in files], *columns.values())])
    return path / "m.csv", files


def truncate(file):
    file.write_bytes(file.read_bytes()[:-len(file.read_bytes()) // 3])


@pytest.mark.parametrize("suffix", [".npz", ".tif", ".png"])
def test_a_damaged_image_is_left_out_counted_and_reported(suffix, tmp_path, capsys):
    path, files = folder_of(tmp_path, suffix)
    channels = ("DNA",) if suffix == ".png" else data.CHANNELS
    manifest = data.read_manifest(path, channels)
    config = train_vae.Config()
    scale = {"low": [0.] * len(channels), "high": [255.] * len(channels)}
    sound = train_vae.views(data.Pixels(manifest), [2, 3, 4], config, scale)
    truncate(files[3])
    with pytest.raises(data.DataError, match=f"row 5.*3{suffix}"):
        data.read_manifest(path, channels)  # up to 10,000 files all are opened before training
    pixels = data.Pixels(manifest, max_corrupt=.05)
    x = train_vae.views(pixels, [2, 3, 4], config, scale)
    assert torch.equal(x, sound[[0, 2, 2]])  # the next of the batch takes the place
    assert torch.equal(train_vae.views(pixels, [2, 3], config, scale)[1], sound[0])
    pixels.report()
    said = capsys.readouterr().out
    assert "1 of 40 images cannot be read" in said
    assert f"row 5, column {manifest.files.names[0]}: {files[3]}" in said
    truncate(files[7]), truncate(files[11])
    with pytest.raises(data.DataError, match="3 of 40 images cannot be read: more than 5.0%"):
        list(pixels.many(range(40)))
    with pytest.raises(data.DataError, match="1 of 40 .* more than 0.0%"):
        list(data.Pixels(manifest).many([3]))


def test_views_are_the_same_whatever_the_number_of_workers(tmp_path):
    path, files = folder_of(tmp_path, ".npz")
    manifest = data.read_manifest(path)
    truncate(files[5])
    scale = {"low": [0.] * 5, "high": [255.] * 5}
    found = [[x for x, _ in train_ldm.batches_of_views(
        data.Pixels(manifest, workers=n, max_corrupt=.1), range(40), train_vae.Config(), scale, 2)]
        for n in (1, 3)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    pixels = data.Pixels(manifest, workers=2, max_corrupt=.1)
    list(pixels.many([0, 1]))
    for reader in pixels.readers._processes.values():
        os.kill(reader.pid, signal.SIGKILL)
    assert sum(x is None for x in pixels.many(range(40))) == 1  # read by this process instead


def test_readers_end_with_their_images(tmp_path):
    pixels = data.Pixels(data.read_manifest(folder_of(tmp_path, ".npz", 4)[0]), workers=2)
    list(pixels.many(range(4)))
    readers = list(pixels.readers._processes.values())
    del pixels
    assert not any(reader.is_alive() for reader in readers)


def killed_with_readers(path, pids):
    pixels = data.Pixels(data.read_manifest(path), workers=2)
    list(pixels.many(range(4)))
    pids.write_text(" ".join(str(p) for p in pixels.readers._processes))
    os.kill(os.getpid(), signal.SIGKILL)


def test_readers_end_with_the_run(tmp_path):
    path, _ = folder_of(tmp_path, ".npz", 4)
    ended(start(killed_with_readers, path, tmp_path / "pids"))
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        until = time.time() + 20
        while os.path.exists(f"/proc/{pid}") and time.time() < until:
            time.sleep(.1)
        assert not os.path.exists(f"/proc/{pid}")


def test_training_goes_on_past_a_damaged_image(tmp_path, monkeypatch, capsys):
    """As beyond 10,000 images, which are not opened before training."""
    path, files = folder_of(tmp_path, ".npz", dose=[i % 3 for i in range(40)])
    monkeypatch.setattr(data, "read_manifest", partial(data.read_manifest, check=0))
    truncate(files[3])
    config = train_vae.Config(data=str(path), out=str(tmp_path / "vae"), steps=8, width=8, blocks=1,
                              batch=8, eval_every=8, max_corrupt=.05)
    vae = train_vae.train(config)
    assert "1 of 40 images cannot be read" in capsys.readouterr().out
    ldm = train_ldm.Config(data=str(path), vae=str(vae), biology=("dose",), experiment=(), steps=1,
                           batch=4, size="tiny", views=2, out=str(tmp_path / "ldm"),
                           max_corrupt=.05)
    for _ in range(2):  # cached, and from the cache
        train_ldm.train(ldm)
        assert "1 of 40 images cannot be read" in capsys.readouterr().out
        ldm.overwrite = True
    latents = train_ldm.prepare(ldm).sides["training"]
    place = list(latents.rows).index(3)
    drawn = latents.sound[np.arange(len(latents.rows))]
    assert place not in drawn and set(drawn) == set(range(len(latents.rows))) - {place}
    ldm.max_corrupt = 0.
    for old in tmp_path.glob("vae/latents-*"):
        old.unlink()
    with pytest.raises(data.DataError, match="row 5.*more than 0.0%"):
        train_ldm.train(ldm)


def test_an_image_of_zeros_is_legal_and_warned_of(tmp_path, cli):
    path, files = folder_of(tmp_path, ".npz")
    write_image(files[6], np.zeros((5, 32, 32), np.uint8))
    status, out, error = cli(data, "show", path, "--out", tmp_path / "sheet.png")
    assert status == 0 and "1 of 40 images are zero everywhere: row 8" in out, error
    assert train_vae.views(data.Pixels(data.read_manifest(path)), [6], train_vae.Config(), {
        "low": [0.] * 5, "high": [255.] * 5}).eq(-1).all()
    body = bytearray(files[9].read_bytes())
    body[len(body) // 2] ^= 255  # the header is sound, the pixels are not
    files[9].write_bytes(body)
    status, _, error = cli(data, "show", path)
    assert status == 2 and "row 11" in error and "Traceback" not in error


@pytest.mark.parametrize("kind", ["number", "log", "category", "molecule"])
def test_nan_is_refused_by_row(kind):
    with pytest.raises(FieldError, match="row 4, column x: NaN"):
        parse_fields({"biology": [f"x:{kind}"]}, {"x": ["1" if kind != "molecule" else "C", "",
                                                        "NaN", "2"]})


def test_a_large_manifest_opens_quickly_and_in_little_memory(tmp_path):
    """A million rows: under 15 s and 2 GB. A tenth of the time here, a fiftieth of the memory."""
    def write(rows):
        lines = (f"{i}_1.tif,{i}_2.tif,{i}_3.tif,{i}_4.tif,{i}_5.tif,CC(=O)N{i % 40 * 'C'},{i % 7},"
                 f"P{i // 3456},{'val' if i % 10 else 'train'}" for i in range(rows))
        (tmp_path / "m.csv").write_text("DNA,ER,RNA,AGP,Mito,smiles,dose,plate,split\n"
                                        + "\n".join(lines))
    write(20_000)
    for k in range(1, 6):
        write_image(tmp_path / f"0_{k}.tif", np.zeros((1, 8, 8), np.uint8))
    tracemalloc.start()
    manifest = data.read_manifest(tmp_path / "m.csv")
    assert tracemalloc.get_traced_memory()[1] < 2e9 / 50
    tracemalloc.stop()
    write(100_000)
    fields = {"biology": ["smiles", "dose"], "experiment": ["plate"]}
    began = time.process_time()
    manifest = data.read_manifest(tmp_path / "m.csv")
    data.split_rows(manifest), parse_fields(fields, manifest.columns)
    assert time.process_time() - began < 15 / 10
    assert manifest.files[99_999][4] == str(tmp_path / "99999_5.tif")


# --- the same result by other ways ----------------------------------------------------------------

def test_parts_of_a_batch_give_the_gradient_of_the_batch(vae_config, ldm_config, tmp_path,
                                                         in_float32):
    for module, config in ((train_vae, vae_config), (train_ldm, ldm_config)):
        assert_alike(module, [module.train(replace(
            config, steps=3, eval_every=3, accumulate=n, out=str(tmp_path / f"{module}{n}")))
            for n in (1, 4)])
        with pytest.raises(train_vae.UserError, match="--batch 8 is no multiple of --accumulate 3"):
            module.train(replace(config, accumulate=3, out=str(tmp_path / "3")))


def assert_alike(module, paths):
    """Equal loss curves to 1e-5, and weights that differ by less than 2 % of what they moved."""
    logs = [[json.loads(line) for line in open(p.parent / "log.jsonl")] for p in paths]
    for a, b in zip(*logs, strict=True):
        for name in {"train_l1", "train_loss", "heldout_loss", "l1"} & set(a):
            assert_close(a[name], b[name], atol=1e-5, rtol=1e-5)
    one, other = (load(p) for p in paths)
    moved = sum(s["exp_avg"].abs().sum() for s in one["optimiser"]["state"].values())
    apart = sum((s["exp_avg"] - other["optimiser"]["state"][k]["exp_avg"]).abs().sum()
                for k, s in one["optimiser"]["state"].items())
    assert moved > 0 and apart < .02 * moved
    assert one["step"] == other["step"]


def test_gradient_checkpointing_changes_no_gradient(in_float32):
    x, gradients = torch.rand(2, 5, 16, 16), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        vae = train_vae.VAE(train_vae.VAEConfig(width=8, blocks=1))
        calls = []
        vae.decoder.levels[0][0].conv1.register_forward_hook(lambda *_: calls.append(1))
        if checkpointing:
            train_vae.save_activations(vae)
        vae(x, torch.zeros(2, 4, 4, 4))[0].square().sum().backward()
        gradients.append([p.grad for p in vae.parameters() if p.grad is not None])
        assert len(calls) == 1 + checkpointing  # computed again on the way back
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiling_changes_no_loss_and_no_name(vae_config, ldm_config, tmp_path, monkeypatch,
                                               in_float32):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for module, config in ((train_vae, vae_config), (train_ldm, ldm_config)):
        paths = [module.train(replace(config, steps=1, eval_every=1, compile=compiled,
                                      out=str(tmp_path / f"{module.__name__}{compiled}")))
                 for compiled in (False, True)]
        assert sum(len(graph.graph.nodes) for graph in graphs) > 100  # it was truly compiled
        assert_alike(module, paths)
        plain, other = (load(path)["weights"] for path in paths)
        assert list(plain) == list(other)
        graphs.clear()


def test_what_compiling_lacks_is_said_before_any_work(refused, monkeypatch, tmp_path):
    def backend(graph, inputs):
        raise RuntimeError("No working C++ compiler found")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for module in (train_vae, train_ldm):
        assert len(refused(module, "--compile", "--data", tmp_path / "none.csv", says=[
            "--compile cannot be used on this machine: No working C++ compiler found"])) == 1


# --- model FLOPs utilisation ----------------------------------------------------------------------

def test_the_flops_of_a_layer_are_counted_there_and_back():
    layer, x = torch.nn.Linear(30, 40), torch.randn(7, 30)
    product = 2 * 7 * 30 * 40  # a multiplication and an addition each
    assert train_vae.count_flops(lambda: layer(x)) == product
    assert train_vae.count_flops(lambda: layer(x).sum().backward()) == 2 * product  # to the weights
    x.requires_grad_()
    assert train_vae.count_flops(lambda: layer(x).sum().backward()) == 3 * product


def test_utilisation_is_flops_by_speed_over_the_rate_of_all_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "matrix_rate", lambda dtype: 5e5)
    config, found = train_vae.Config(steps=2, batch=4, out=str(tmp_path)), []
    for world in (1, 2):
        monkeypatch.setattr(train_vae, "rank_and_world", lambda: (0, world))
        loop = train_vae.Loop(lambda step: time.sleep(.02), config, "", flops=1000)
        monkeypatch.setattr(train_vae, "rank_and_world", lambda: (0, 1))
        for step, _ in loop:
            loop.agree(step, 1.)
        _, speed, said = loop.report()
        assert_close(speed["flops_utilisation"], 1000 * speed["images_per_second"] / 5e5 / world,
                     rtol=.01, atol=0)
        assert "% MFU" in said


def test_the_matrix_rate_is_that_of_products():
    a, times = torch.randn(512, 512), []
    for _ in range(40):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    assert .6 < train_vae.matrix_rate(torch.float32) * min(times) / (2 * 512 ** 3) < 1.6


def test_the_model_costs_the_same_however_a_step_is_computed(vae_config, monkeypatch):
    """Of one image: not of activations computed twice, nor of a part of a batch. About three times
    a forward pass; and the random numbers of the run stay as they were."""
    found = []

    def count(f, real=train_vae.count_flops):
        before = torch.get_rng_state()
        found.append(real(f))
        assert torch.equal(before, torch.get_rng_state())
        return found[-1]

    def begin(*given):
        raise KeyboardInterrupt
    monkeypatch.setattr(train_vae, "count_flops", count)
    monkeypatch.setattr(train_vae, "Loop", begin)
    for more in ({}, {"accumulate": 4}, {"checkpointing": True}):
        with pytest.raises(KeyboardInterrupt):
            train_vae.train(replace(vae_config, **more))
    vae = train_vae.VAE(train_vae.shape_of(vae_config))
    monkeypatch.undo()
    there = train_vae.count_flops(lambda: vae(torch.zeros(1, 5, 32, 32)))
    assert len(set(found)) == 1 and 2.8 * there < found[0] <= 3 * there


def as_rank(rank, port, function, *arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train_vae.join_processes()
    function(*arguments)


def start_two(function, *arguments, says):
    """Two processes as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(as_rank, rank, port, function, *arguments, says=f"{says}-{rank}")
            for rank in range(2)]


@pytest.mark.parametrize("module", [train_vae, train_ldm])
def test_two_processes_train_like_one(module, vae_config, ldm_config, tmp_path, in_float32):
    config = replace(vae_config if module is train_vae else ldm_config, steps=3, eval_every=3)
    both = start_two(module.train, replace(config, out=str(tmp_path / "two")),
                     says=tmp_path / "says")
    one = module.train(replace(config, out=str(tmp_path / "one")))
    assert [ended(p) for p in both] == [0, 0], (tmp_path / "says-0").read_text()
    assert_alike(module, [one, tmp_path / "two/model.pt"])
    assert "step     3" in (tmp_path / "says-0").read_text()
    assert (tmp_path / "says-1").read_text() == ""


def test_no_process_waits_for_one_that_failed(tmp_path):
    config = train_vae.Config(data=str(tmp_path / "none.csv"), out=str(tmp_path / "o"))
    both = start_two(train_vae.train, config, says=tmp_path / "says")
    assert [ended(p, 30) for p in both] == [2, 2]
    lines = [(tmp_path / f"says-{k}").read_text().splitlines() for k in range(2)]
    assert len(lines[0]) == 1 and "no manifest at" in lines[0][0] and lines[1] == []


def told_at_step_1(config):
    def rate(step, *rest, real=train_vae.learning_rate):
        if step == 1 and not train_vae.is_main():
            os.kill(os.getpid(), signal.SIGTERM)
        return real(step, *rest)
    train_vae.learning_rate = rate
    train_vae.train(config)


def test_processes_stop_together(vae_config, tmp_path):
    both = start_two(told_at_step_1, vae_config, says=tmp_path / "says")
    assert [ended(p, 60) for p in both] == [143, 143]
    assert load(tmp_path / "vae/model.pt")["step"] == 2
    assert "after step 2 of 4" in (tmp_path / "says-0").read_text()


def test_the_next_batch_is_drawn_during_the_step(tmp_path):
    drawn = [threading.Event() for _ in range(4)]

    def draw(step):
        drawn[step].set()
        return step * 10
    config = train_vae.Config(steps=4, eval_every=2, out=str(tmp_path))
    loop = train_vae.Loop(draw, config, "")
    for step, batch in loop:
        assert batch == step * 10 and (step == 3 or drawn[step + 1].wait(10))
        loop.agree(step, 1.)
        assert loop.evaluates(step) == (step in (1, 3))
    loss, speed, said = loop.report()
    assert loss == 1. and speed["images_per_second"] > 0 and speed["peak_gb"] > .01
    slow = train_vae.Loop(lambda step: time.sleep(.05), config, "")
    for step, _ in slow:
        slow.agree(step, 1.)
    assert slow.report()[1]["data_wait"] > .5


def test_the_command_to_go_on_with(monkeypatch):
    config = train_ldm.Config(out="my runs/a", biology=("smiles", "dose"), zero_snr=False,
                              target="noise", keep=2, resume=False)
    words = shlex.split(train_vae.command(config))
    assert words[:3] == ["python", "train_ldm.py", "--resume"]
    assert train_vae.settings(train_ldm.Config, words[2:]) == replace(config, resume=True)
    assert "--no-zero_snr" in words and "--steps" not in words
    # a script that trains several networks is started again, and goes on where it was
    monkeypatch.setattr(sys, "argv", ["some/train_ldm.py", "--steps", "9"])
    assert train_vae.command(config).startswith("python train_ldm.py --resume")
    assert train_vae.command(train_vae.Config()) == "the same command again"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "disentangle", "--study", "arms"])
    assert train_vae.command(config) == "the same command again"
