"""Shared by the tests: a small simulated screen, and scripts run in this process."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import train_ldm  # noqa: E402
import train_vae  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def screen_settings():
    return data.Screen(batches=3, replicates=1, sites=2, controls_per_plate=8, size=32)


@pytest.fixture(scope="session")
def screen(tmp_path_factory, screen_settings):
    """The manifest of a screen of some 2,600 images of 32x32 pixels."""
    return data.simulate(tmp_path_factory.mktemp("screen"), screen_settings)


@pytest.fixture(scope="session")
def vae_path(screen, tmp_path_factory):
    return train_vae.train(train_vae.Config(
        data=str(screen), out=str(tmp_path_factory.mktemp("vae")), steps=40, width=16, blocks=1,
        eval_every=20))


@pytest.fixture(scope="session")
def ldm_config(screen, vae_path, tmp_path_factory):
    return train_ldm.Config(data=str(screen), vae=str(vae_path), size="tiny", views=1, batch=8,
                            out=str(tmp_path_factory.mktemp("ldm")), steps=3, eval_every=3)


@pytest.fixture(scope="session")
def ldm_path(ldm_config):
    return train_ldm.train(ldm_config)


def pytest_configure(config):
    config.addinivalue_line("markers", "pictures: looks at the pictures that training draws")


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """Half the time of a three-step training are its pictures: drawn where a test looks at them."""
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr(train_ldm, "draw_samples", lambda *_, **__: None)
        monkeypatch.setattr(train_ldm, "draw_curves", lambda *_: None)


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
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return call


@pytest.fixture
def refused(cli):
    """refused(module, *arguments, says=[...]): status 2, every phrase said, no stack trace."""
    def call(module, *arguments, says):
        status, _, error = cli(module, *arguments)
        assert status == 2, error
        assert "Traceback" not in error
        lines = [line for line in error.splitlines() if line.strip() and "it/s" not in line]
        for phrase in says:
            assert phrase in error, f"{phrase!r} is not in {error!r}"
        return lines
    return call


def randomise(module, seed=0):
    """Give every parameter a random value: zero-initialised layers would hide a missing link."""
    torch.manual_seed(seed)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=.2)
    return module
