"""Shared by the tests: a small simulated screen, tiny models trained on it, and scripts run in this
process."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: trainings then time no threads
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import train_ldm  # noqa: E402
import train_vae  # noqa: E402

# half the time of a training of three steps are its pictures
PICTURES = {name: getattr(train_ldm, name) for name in ("draw_samples", "draw_curves")}
for name in PICTURES:
    setattr(train_ldm, name, lambda *_, **__: None)


@pytest.fixture(scope="session")
def screen(tmp_path_factory):
    """The manifest of a screen of some 2,600 images of 32x32 pixels."""
    return data.simulate(tmp_path_factory.mktemp("screen"), data.Screen(
        batches=3, replicates=1, sites=2, controls_per_plate=8, size=32))


@pytest.fixture(scope="session")
def vae_path(screen, tmp_path_factory):
    return train_vae.train(train_vae.Config(
        data=str(screen), out=str(tmp_path_factory.mktemp("vae")), steps=40, width=16, blocks=1,
        eval_every=20, workers=0, compile=False))


@pytest.fixture(scope="session")
def ldm_config(screen, vae_path, tmp_path_factory):
    return train_ldm.Config(
        data=str(screen), vae=str(vae_path), out=str(tmp_path_factory.mktemp("ldm")), size="tiny",
        views=1, batch=8, steps=3, eval_every=3, workers=0,
        compile=False)


@pytest.fixture(scope="session")
def ldm_path(ldm_config):
    return train_ldm.train(ldm_config)


@pytest.fixture(scope="session")
def hinted_path(ldm_config, ldm_path, tmp_path_factory):
    """A ControlNet that follows the screen's brightfield images."""
    return train_ldm.train(train_ldm.Config(
        control_column="brightfield", base=str(ldm_path), batch=8, views=1, steps=3, eval_every=3,
        workers=0, compile=False, out=str(tmp_path_factory.mktemp("hinted"))))


@pytest.fixture
def pictures(monkeypatch):
    """The pictures that training draws, for tests that look at them."""
    for name, draw in PICTURES.items():
        monkeypatch.setattr(train_ldm, name, draw)


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli(module, *arguments) runs a script's command line: (exit status, stdout, stderr)."""
    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            train_vae.run(module.main)
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def refused(cli):
    """refused(module, *arguments, says=[...]): status 2, every phrase said, no stack trace; returns
    the lines that are said."""
    def call(module, *arguments, says):
        status, _, error = cli(module, *arguments)
        assert status == 2 and "Traceback" not in error, error
        assert not [phrase for phrase in says if phrase not in error], error
        return [line for line in error.splitlines() if line.strip() and "it/s" not in line]
    return call


def randomise(module, seed=0):
    """Give every parameter a random value: zero-initialised layers would hide a missing link."""
    torch.manual_seed(seed)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=.2)
    return module
