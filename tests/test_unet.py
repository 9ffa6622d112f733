"""U-Net, ControlNet, Denoiser: silent at step 0, and after that every input matters."""
import pytest
import torch
from torch.testing import assert_close

from conditioning import Conditioner, Field
from conftest import randomise
from unet import ControlNet, Denoiser, UNet, show, unet_config

CONFIG = unet_config("tiny", 4)


def inputs(config=CONFIG, side=16):
    torch.manual_seed(1)
    return dict(z=torch.randn(2, config.latent_channels, side, side), t=torch.tensor([10, 900]),
                vector=torch.randn(2, config.embedding), tokens=torch.randn(2, 3, config.token),
                mask=torch.tensor([[True, True, False]] * 2))


def test_output_has_the_shape_of_the_latent_and_is_zero_before_training():
    for size, channels, side in (("tiny", 8, 32), ("small", 1, 8)):
        unet = UNet(unet_config(size, channels))
        out = unet(**inputs(unet.config, side))
        assert out.shape == (2, channels, side, side) and not out.any()


def test_every_input_changes_the_output_but_for_masked_tokens():
    unet, given = randomise(UNet(CONFIG)), inputs()
    before = unet(**given)
    for name, change in dict(z=1, t=50, vector=1, tokens=1).items():
        assert (before - unet(**given | {name: given[name] + change})).abs().max() > 1e-3, name
    given["tokens"][:, 2] += 100  # masked
    assert_close(unet(**given), before)
    assert (before - unet(**given | {"mask": ~given["mask"]})).abs().max() > 1e-3


@pytest.fixture
def denoiser():
    batch = Field("batch", "category", "experiment", vocabulary=["B1", "B2"])
    conditioner = randomise(Conditioner([Field("smiles", "molecule", "biology"), batch],
                                        CONFIG.embedding, CONFIG.token))
    return Denoiser(unet := randomise(UNet(CONFIG)), conditioner, ControlNet(unet, 3, 4))


def predict(denoiser, images=None, batch="B1", shown=1.):
    own = denoiser.conditioner.encode({"smiles": ["CCO", "CCN"], "batch": ["B2"] * 2}, 2)
    codes, known, _ = denoiser.conditioner.encode({"batch": [batch] * 2}, 2)
    hint = None if images is None else (images, codes, known, torch.full((2,), shown))
    return denoiser(inputs()["z"], inputs()["t"], *own, hint)


def test_a_controlnet_is_silent_at_step_0_and_where_the_hint_is_not_shown(denoiser):
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(predict(denoiser, images), predict(denoiser))
    randomise(denoiser.controlnet, 1)
    assert torch.equal(predict(denoiser, images, shown=0.), predict(denoiser))
    before = predict(denoiser, images)
    for other in predict(denoiser, images.flip(3)), predict(denoiser, images, "B2"):
        assert (other - before).abs().max() > 1e-3


def test_each_residual_and_the_style_reach_the_output(denoiser):
    net, images = denoiser.controlnet, torch.rand(2, 3, 64, 64) * 2 - 1
    for layer in (*net.zero_convolutions, net.style_mlp[2]):
        torch.nn.init.normal_(layer.weight)
        assert (predict(denoiser, images) - predict(denoiser)).abs().max() > 1e-3
        torch.nn.init.zeros_(layer.weight)
    torch.nn.init.normal_(net.style_mlp[2].weight)
    style = net.style(images)
    assert_close(net.style(images.flip(2, 3)), style)
    for other in (images * .5, images * .5 + .2, images.sort(3).values):
        assert (net.style(other) - style).abs().max() > 1e-2           # gain, background, focus


def test_what_a_controlnet_learns_in_each_of_the_first_three_steps(denoiser):
    net, learning = denoiser.controlnet, []
    for _ in range(3):
        denoiser.zero_grad()
        predict(denoiser, torch.rand(2, 3, 64, 64) * 2 - 1).square().mean().backward()
        learning.append({n for n, p in net.named_parameters() if p.grad.any()})
        torch.optim.SGD(net.parameters(), .1).step()
    assert {n.split(".")[0] for n in learning[0]} == {"zero_convolutions", "style_mlp"}
    assert {"stem.out.weight", "metadata.weight", "encoder_copy.stem.weight"} <= learning[1]
    assert "stem.layers.0.weight" not in learning[1]
    assert len(learning[2]) == len([*net.parameters()])


def test_the_demo_shows_the_predicted_first_loss(capsys):
    show()
    assert abs(float(capsys.readouterr().out.split("variance is ")[1][:4]) - 1) < .03
