"""The autoencoder: shapes, the KL against torch.distributions, the door to latent space."""
import re

import pytest
import torch
from torch.distributions import Normal, kl_divergence as torch_kl
from torch.testing import assert_close

from conftest import randomise
from train_vae import measure_latents
from vae import VAE, VAEConfig, kl_divergence, show, shrunk, vae_loss


@pytest.mark.parametrize("config, latent", [
    (VAEConfig(), (4, 16, 16)),
    (VAEConfig(downsampling=8, latent_channels=8, width=16), (8, 8, 8)),  # 512 to 64 x 64 x 8
    (VAEConfig(downsampling=4, latent_channels=1, width=16), (1, 16, 16)),  # 512 to 128 x 128 x 1
    (VAEConfig(channels=3, fold=4, downsampling=4, width=16), (4, 16, 16)),
    (VAEConfig(channels=1, fold=1, downsampling=2, width=16), (4, 32, 32))])
def test_shapes(config, latent):
    vae, x = VAE(config), torch.randn(2, config.channels, 64, 64)
    z = vae.to_latent(x)
    assert z.shape[1:] == latent and vae.to_image(z).shape == x.shape


def test_oblong_images_pass():
    vae = VAE(VAEConfig(width=16, blocks=1))
    assert vae.to_image(vae.to_latent(torch.zeros(1, 5, 32, 48))).shape == (1, 5, 32, 48)


def test_impossible_downsampling_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        VAE(VAEConfig(downsampling=6, fold=2))


def test_kl_agrees_with_torch_distributions():
    mean, logvar = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    oracle = torch_kl(Normal(mean, (logvar / 2).exp()), Normal(0., 1.)).flatten(1).sum(1)
    assert_close(kl_divergence(mean, logvar), oracle)


def test_loss_weighs_the_kl_per_pixel_value():
    x, x_hat = torch.zeros(2, 5, 8, 8), torch.full((2, 5, 8, 8), .3)
    mean, logvar = torch.full((2, 4, 2, 2), 2.), torch.zeros(2, 4, 2, 2)
    loss, l1, kl = vae_loss(x, x_hat, mean, logvar, kl_weight=.1)
    assert_close((l1.item(), kl.item()), (.3, 32.))
    assert_close(loss.item(), .3 + .1 * 32 / 320)


def test_latents_are_standardised_on_samples():
    vae = randomise(VAE(VAEConfig(width=16, blocks=1))).requires_grad_(False)
    batches = [torch.randn(16, 5, 32, 32) for _ in range(8)]
    torch.manual_seed(0)
    measure_latents(vae, batches)
    z = torch.cat([vae.to_latent(x, torch.randn(16, 4, 8, 8)) for x in batches])
    assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=.1, rtol=0)
    assert_close(z.std((0, 2, 3)), torch.ones(4), atol=.1, rtol=0)
    # the noise is part of what is standardised: posterior means alone have less spread
    assert (torch.cat([vae.to_latent(x) for x in batches]).std((0, 2, 3)) < 1).any()


def test_to_image_undoes_the_standardisation():
    vae = randomise(VAE(VAEConfig(width=16, blocks=1))).requires_grad_(False)
    vae.latent_mean += 3.
    vae.latent_std *= .2
    x = torch.rand(2, 5, 32, 32) * 2 - 1
    x_hat, _, _ = vae(x, noise=torch.zeros(2, 4, 8, 8))
    assert_close(vae.to_image(vae.to_latent(x)), x_hat.clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_every_parameter_gets_a_gradient_and_every_channel_counts():
    vae = randomise(VAE(VAEConfig(width=16, blocks=1)))
    x = torch.randn(2, 5, 32, 32)
    loss, _, _ = vae_loss(x, *vae(x), kl_weight=.1)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())
    z = vae.to_latent(x).detach()
    for channel in range(5):
        changed = x.clone()
        changed[:, channel] += 1
        assert (vae.to_latent(changed) - z).abs().max() > 1e-4


def test_small_image_baseline_keeps_as_many_numbers():
    flat = torch.full((1, 5, 64, 64), .5)
    assert_close(shrunk(flat, 1024), flat)
    noise = torch.rand(1, 5, 64, 64)
    assert_close(shrunk(noise, 5 * 64 * 64), noise)
    # shrunk to one number per channel, an image is its mean
    assert_close(shrunk(noise, 5)[0, :, 0, 0], noise.mean((0, 2, 3)))


def test_the_demo_learns_and_its_kl_weight_has_its_effect(tmp_path, capsys):
    show(steps=90, path=tmp_path / "blobs.png")
    out = capsys.readouterr().out
    baseline = float(re.search(r"made small and large again: L1 ([\d.]+)", out)[1])
    told = [[float(v) for v in row] for row in re.findall(
        r"KL weight +([\d.]+), step +(\d+): L1 ([\d.]+), KL by channel (\d+), (\d+) nats", out)]
    (_, _, first, *_), _, (weak, _, l1, *kl), *_, (strong, step, _, *less) = told
    assert (weak, strong, step) == (.01, 3., 90) and l1 < baseline < first
    assert sum(less) < sum(kl) / 2
    assert (tmp_path / "blobs.png").stat().st_size > 10_000
