"""The U-Net: silent at step 0, and after that every input matters."""
import math
import re

import pytest
import torch
from torch.testing import assert_close

from conftest import randomise
from unet import SIZES, UNet, show, sinusoid, unet_config

CONFIG = unet_config("tiny", 4)


def inputs(batch=2, config=CONFIG, side=16):
    torch.manual_seed(1)
    return dict(z=torch.randn(batch, config.latent_channels, side, side),
                t=torch.tensor([10, 900])[:batch], vector=torch.randn(batch, config.embedding),
                tokens=torch.randn(batch, 3, config.token),
                mask=torch.tensor([[True, True, False]] * batch))


def test_output_is_zero_before_training():
    out = UNet(CONFIG)(**inputs())
    assert out.shape == (2, 4, 16, 16) and out.abs().max() == 0


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("channels, side", [(4, 16), (8, 32), (1, 8)])
def test_any_latent_shape(size, channels, side):
    config = unet_config(size, channels)
    assert UNet(config)(**inputs(1, config, side)).shape == (1, channels, side, side)


def test_small_is_what_the_quick_start_can_afford():
    count = sum(p.numel() for p in UNet(SIZES["small"]).parameters()) / 1e6
    assert 2 <= count <= 5


@pytest.mark.parametrize("name, change", [
    ("z", lambda v: v + 1), ("t", lambda v: v + 50), ("vector", lambda v: v + 1),
    ("tokens", lambda v: v + 1), ("mask", lambda v: ~v | v[:, :1])])
def test_every_input_changes_the_output(name, change):
    unet, given = randomise(UNet(CONFIG)), inputs()
    before = unet(**given)
    after = unet(**given | {name: change(given[name])})
    assert (before - after).abs().max() > 1e-3


def test_a_masked_token_is_not_seen():
    unet, given = randomise(UNet(CONFIG)), inputs()
    tokens = given["tokens"].clone()
    tokens[:, 2] += 100
    assert_close(unet(**given), unet(**given | {"tokens": tokens}))


def test_residuals_enter_at_every_skip_and_at_the_middle():
    unet, given = randomise(UNet(CONFIG)), inputs()
    z, t, vector, tokens, mask = given.values()
    emb = unet.embed(t, vector)
    h, skips = unet.encode(z, emb, tokens, mask)
    zeros = [torch.zeros_like(s) for s in (*skips, h)]
    before = unet(**given)
    assert_close(unet(**given, residuals=zeros), before)
    for i in range(len(zeros)):
        one = [r + (i == k) for k, r in enumerate(zeros)]
        assert (unet(**given, residuals=one) - before).abs().max() > 1e-3, f"residual {i} is lost"


def test_every_parameter_is_trained():
    unet = randomise(UNet(CONFIG))
    unet(**inputs()).square().mean().backward()
    silent = [n for n, p in unet.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert not silent


def test_sinusoid_has_cosines_first():
    out = sinusoid(torch.tensor([3.]), dim=4)
    assert_close(out[0], torch.tensor([math.cos(3), math.cos(.03), math.sin(3), math.sin(.03)]))


def test_the_demo_accounts_for_every_parameter(capsys):
    show()
    out = capsys.readouterr().out
    layers, control = out.split("a ControlNet adds")
    counts = [int(n.replace(",", "")) for n in re.findall(r"^  \w+ .*\)\s+([\d,]+) ", layers, re.M)]
    assert sum(counts) == sum(p.numel() for p in UNet(SIZES["small"]).parameters())
    assert "(4, 16, 16)" in layers and layers.count("attention") == 4
    loss = float(re.search(r"says 0 everywhere.* ([\d.]+)$", layers, re.M)[1])
    assert abs(loss - 1) < .03
    assert "5 residuals are 0" in control
    assert re.findall(r"^  (\w+)", control, re.M) == ["copy", "hint", "metadata",
                                                          "levels", "zeros"]
