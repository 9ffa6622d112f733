"""Every command in the README is run, in the order of the text, on a small screen and for a few
steps, so that none can rot. (Of two demonstrations only the help: they are tested in full.)"""
import contextlib
import functools
import re
import runpy
import shlex
import shutil
import sys

import numpy as np
import pytest
import tifffile

import conftest
import data
import evaluate
import sample
import train_ldm
import train_vae

SCRIPTS = {"data.py": data, "train_vae.py": train_vae, "train_ldm.py": train_ldm,
           "sample.py": sample, "evaluate.py": evaluate}
# What makes a command short: the last of an option counts, so these stand behind its own words.
# The first row whose words are all in the command is taken.
FEW = ["--images", "108", "--steps", "1"]
SHORT = [
    ("data.py", "simulate", ["--size", "16", "--replicates", "1", "--sites", "1"]),
    ("data.py", []),
    ("train_vae.py", ["--steps", "2", "--width", "16", "--blocks", "1", "--overwrite"]),
    ("train_ldm.py", "--control_column", ["--steps", "2", "--batch", "4", "--views", "1",
                                          "--overwrite"]),
    ("train_ldm.py", ["--steps", "2", "--batch", "4", "--views", "1", "--size", "tiny",
                      "--overwrite"]),
    ("sample.py", "--attribution", []),
    ("sample.py", "--edit", ["--steps", "2"]),
    ("sample.py", ["--steps", "1", "-n", "1"]),
    ("evaluate.py", "quality", "--by", ["--steps", "1", "--quick"]),
    ("evaluate.py", "quality", ["--images", "24", "--steps", "1", "--sets", "val"]),
    ("evaluate.py", "conditions", "--encoders", ["--steps", "1", "--seeds", "0", "--molecules", "3",
                                                 "--series", "1", "--train_steps", "2", "--names",
                                                 "fingerprint"]),
    ("evaluate.py", "conditions", ["--quick", "--steps", "1"]),
    ("evaluate.py", "arms", [*FEW, "--train_steps", "2", "--seeds", "0", "--arms", "balanced"]),
    ("evaluate.py", "disentangle", [*FEW, "--train_steps", "2", "--seeds", "0"]),
    ("evaluate.py", "control", ["--images", "8", "--steps", "1", "--samples", "1", "--quick"]),
    ("evaluate.py", "vae", "plates/index.csv", ["--train_steps", "1", "--images", "2", "--configs",
                                                "crop=64 width=8 blocks=1"]),
    ("evaluate.py", "vae", ["--train_steps", "2", "--ldm_steps", "2", "--images", "32", "--steps",
                            "1", "--configs", "width=16 blocks=1"]),
]
# what these show takes 25 s, and is tested in test_vae.py and test_diffusion.py
SHOWN_ELSEWHERE = {"vae.py": ["--help"], "diffusion.py": ["--help"]}
NOT_RUN = ("pip", "pytest", "torchrun")      # by every run of the tests, and in test_faults.py
# what stands for itself in the text, and how it is called here
SMALL = {"B1,B2,B3,B4,B5,B6": "B1,B2,B3", "balanced-0.9-0-1500": "balanced-0.9-0-2",
         "brightfield.npy:4000": "brightfield.npy:40"}


def readme_commands():
    """Commands of the README: indented blocks with continued lines joined, and those in backticks,
    each once, in order."""
    text = (conftest.ROOT / "README.md").read_text().replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        words = [line.strip()] if line.startswith("    ") else re.findall(r"`(python [^`]+)`", line)
        found += [part.strip() for w in words for part in w.split("&&")]
    commands = [shlex.split(c, comments=True) for c in found
                if c.split() and c.split()[0] in ("python", *NOT_RUN)]
    return [list(c) for c in dict.fromkeys(map(tuple, commands))]


def shortened(words):
    for *wanted, extra in SHORT:
        if all(w in words for w in wanted):
            return words + extra
    raise AssertionError(f"no row of SHORT for {' '.join(words)}")


def test_the_readme_is_read():
    commands = [" ".join(c) for c in readme_commands()]
    assert len(commands) > 25 and any("--by compound plate" in c for c in commands)


@pytest.fixture
def workplace(screen, tmp_path, monkeypatch):
    """A folder with a small screen and autoencoder, and studies that try one setting each."""
    shutil.copytree(screen.parent, tmp_path / "runs" / "data")
    monkeypatch.chdir(tmp_path)
    train_vae.train(train_vae.Config(steps=2, width=16, blocks=1))
    probe, classifier = evaluate.train_probe, dict(images=108, test_images=60, steps=2)
    monkeypatch.setattr(evaluate, "identity", functools.partial(
        lambda inverted, opened, steps: inverted(opened, (2,), 2), evaluate.identity))
    monkeypatch.setattr(evaluate, "study_transfer", functools.partial(
        evaluate.study_transfer, steps=2))
    monkeypatch.setattr(evaluate, "study_attribution", functools.partial(
        evaluate.study_attribution, levels=(.4,)))
    monkeypatch.setattr(evaluate, "CLASSIFIER", classifier)
    monkeypatch.setattr(evaluate, "train_probe", lambda images, answers, labels, steps, *a, **k:
                        probe(images, answers, labels, 2, *a, **k))
    monkeypatch.setattr(evaluate, "screen_of", lambda confounding: train_ldm.Config.data)
    monkeypatch.setattr(evaluate, "Truth", functools.partial(evaluate.Truth, more=1))
    for name in ("WEIGHTS_TRIED", "FORMS_TRIED", "SAMPLERS_TRIED", "LATENT_SPACES"):
        monkeypatch.setattr(evaluate, name, getattr(evaluate, name)[:1])
    monkeypatch.setattr(evaluate, "TRIED", {a: t[:1] for a, t in evaluate.TRIED.items()})
    tifffile.imwrite("field.tif", np.zeros((48, 40), np.uint8))
    names, rng = [*data.CHANNELS, "brightfield"], np.random.default_rng(0)
    for name in names:  # two fields stand for the halves of a real one
        np.save(f"{name}.npy", rng.integers(0, 255, (8, 128, 160), np.uint8))
    data.write_manifest("field.csv", [{n: f"{n}.npy" for n in names} | {
        "index": i, "split": "train" if i < 4 else "val"} for i in range(8)])
    if conftest.SHARED.is_dir():
        (tmp_path / "plates").symlink_to(conftest.SHARED / "lincs")
    return tmp_path


def test_every_command_runs(workplace, cli, monkeypatch):
    """In the order of the text: what one command writes another one may read."""
    failed = []
    for words in readme_commands():
        text = " ".join(words)
        if words[0] in NOT_RUN or "IMAGES" in words or "--mol2image" in words:
            continue  # the last two need a download, and two wells a treatment: test_benchmark.py
        of_plates = any(name in text for name in ("plates", "lincs", "negcon"))
        if of_plates and not (workplace / "plates").exists():
            continue  # nor what is made of them
        for name, small in SMALL.items():
            words = [w.replace(name, small) for w in words]
        if words[1] not in SCRIPTS:  # a file of the ground floor by itself
            shown = SHOWN_ELSEWHERE.get(words[1], [])
            monkeypatch.setattr(sys, "argv", words[1:] + shown)
            with pytest.raises(SystemExit, match="^0$") if shown else contextlib.nullcontext():
                runpy.run_path(str(conftest.ROOT / words[1]), run_name="__main__")
            continue
        words = shortened(words[1:])
        status, _, error = cli(SCRIPTS[words[0]], *words[1:])
        if status:
            failed.append(f"{' '.join(words)}\n{error}")
    assert not failed, "\n".join(failed)
