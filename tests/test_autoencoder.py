"""The autoencoder: shapes, the KL against torch.distributions, the door to latent space, a toy."""
import re

import pytest
import torch
from torch.distributions import Normal, kl_divergence as torch_kl
from torch.testing import assert_close

from conftest import randomise
from vae import VAE, VAEConfig, kl_divergence, show, shrunk, vae_loss


@pytest.mark.parametrize("config, latent", [
    (VAEConfig(), (4, 16, 24)), (VAEConfig(downsampling=8, latent_channels=1), (1, 8, 12)),
    (VAEConfig(channels=3, fold=4, width=16), (4, 16, 24)),
    (VAEConfig(channels=1, fold=1, downsampling=2, width=16), (4, 32, 48)),
    (VAEConfig(pixels=True, latent_channels=80), (80, 16, 24))])
def test_shapes(config, latent):
    vae, x = VAE(config), torch.rand(2, config.channels, 64, 96) * 2 - 1
    z = vae.to_latent(x)
    assert z.shape[1:] == latent and vae.to_image(z).shape == x.shape
    assert not config.pixels or torch.equal(vae.to_image(z), x)
    with pytest.raises(ValueError, match="power of two"):
        VAE(VAEConfig(downsampling=6))


def test_kl_agrees_with_torch_distributions():
    mean, logvar = torch.randn(2, 3, 4, 5, 5)
    oracle = torch_kl(Normal(mean, (logvar / 2).exp()), Normal(0., 1.)).flatten(1).sum(1)
    assert_close(kl_divergence(mean, logvar), oracle)


def test_loss_is_l1_the_kl_per_pixel_value_and_the_size_of_fourier_coefficients():
    x, x_hat = torch.zeros(2, 5, 8, 8), torch.full((2, 5, 8, 8), .3)
    mean, logvar = torch.full((2, 4, 2, 2), 2.), torch.zeros(2, 4, 2, 2)
    loss, l1, kl = vae_loss(x, x_hat, mean, logvar, kl_weight=.1)
    assert_close((l1.item(), kl.item(), loss.item()), (.3, 32., .3 + .1 * 32 / 320))
    noise = torch.randn(2, 5, 8, 8)
    moved = noise.roll(3, 3)  # as much texture, wherever it lies
    assert_close(vae_loss(noise, moved, mean, logvar, 0., 1.)[0], (noise - moved).abs().mean())
    assert vae_loss(noise, 2 * noise, mean, logvar, 0., 1.)[0] > noise.abs().mean() + .3


def test_latents_are_posterior_samples_standardised_and_come_back():
    vae = randomise(VAE(VAEConfig(width=16, blocks=1))).requires_grad_(False)
    x = torch.rand(2, 5, 32, 32) * 2 - 1
    vae.latent_mean += 3.
    vae.latent_std *= .2
    noise, (mean, logvar) = torch.randn(2, 4, 8, 8), vae.encode(x)
    raw = Normal(mean, (logvar / 2).exp()).icdf(Normal(0., 1.).cdf(noise))
    z = vae.to_latent(x, noise)
    assert_close(z, (raw - 3) / .2, atol=1e-2, rtol=1e-3)
    assert_close(vae.to_latent(x), (mean - 3) / .2)
    assert_close(vae.to_image(z), vae(x, noise)[0].clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_every_parameter_learns_and_every_stain_counts():
    vae, x = randomise(VAE(VAEConfig(width=16, blocks=1))), torch.randn(2, 5, 32, 32)
    vae_loss(x, *vae(x), kl_weight=.1)[0].backward()
    assert all(p.grad.any() for p in vae.parameters())
    for channel in range(5):
        changed = x.clone()
        changed[:, channel] += 1
        assert (vae.to_latent(changed) - vae.to_latent(x)).abs().max() > 1e-4


def test_the_demo_learns_and_its_kl_weight_has_its_effect(capsys):
    show(steps=90)
    out = capsys.readouterr().out
    (_, first, *_), _, (weak, l1, *kl), *_, (strong, _, *less) = [
        [float(v) for v in row] for row in re.findall(
            r"weight +([\d.]+), step +\d+: L1 ([\d.]+), KL by channel (\d+), (\d+) nats", out)]
    assert l1 < float(re.search(r"large again: L1 ([\d.]+)", out)[1]) < first
    noise = torch.rand(1, 5, 64, 64)
    assert_close(shrunk(noise, 5)[0, :, 0, 0], noise.mean((0, 2, 3)))  # one number per channel
    assert weak < strong and sum(less) < sum(kl) / 2
