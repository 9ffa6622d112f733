"""The ControlNet: silent at first, then heard; images cut like their targets; tiles that join."""

import itertools
import json

import numpy as np
import pytest
import tifffile
import torch
from torch.testing import assert_close

import data
import diffusion
import evaluate
import sample
import train_ldm
import train_vae
from conftest import randomise
from test_unet import CONFIG, inputs
from unet import ControlNet, UNet, levels_of


# --- the network ----------------------------------------------------------------------------------

def controlled(unet, net, control, told, vector, **given):
    given["vector"] = vector + net.style(control)
    return unet(**given, residuals=net(**given, control=control, control_vector=told))


@pytest.fixture
def pair():
    unet = randomise(UNet(CONFIG))
    return unet, ControlNet(unet, 3, 4), torch.randn(2, 3, 64, 64), torch.randn(2, CONFIG.embedding)


def test_at_step_0_the_output_is_that_of_the_base_to_the_bit(pair):
    unet, net, control, told = pair
    assert torch.equal(controlled(unet, net, control, told, **inputs()), unet(**inputs()))


def test_which_parameters_learn_in_the_first_and_in_the_second_step(pair):
    """First only the zero convolutions (and not the hint's, behind them) and the last layer of the
    style, which the U-Net hears directly; then everything."""
    unet, net, control, told = pair
    unet.requires_grad_(False)
    learning = []
    optimiser = torch.optim.SGD(net.parameters(), lr=.1)
    for _ in range(3):
        optimiser.zero_grad()
        controlled(unet, net, control, told, **inputs()).square().mean().backward()
        learning.append({name for name, p in net.named_parameters()
                         if p.grad is not None and p.grad.abs().sum() > 0})
        optimiser.step()
    assert learning[0] == {n for n, _ in net.named_parameters()
                           if n.startswith(("zeros.", "levels.2."))}
    assert {"hint.out.weight", "metadata.weight", "copy.stem.1.weight",
            "levels.0.weight"} <= learning[1]
    assert "hint.layers.0.weight" not in learning[1]  # behind the hint's own zero convolution
    assert learning[2] == {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize("name", ["control", "told"])
def test_control_and_its_metadata_change_the_output(pair, name):
    unet, net, control, told = pair
    randomise(net, seed=1)
    changed = dict(control=control, told=told)
    changed[name] = changed[name].flip(0)  # of the other image
    before = controlled(unet, net, control, told, **inputs())
    assert (controlled(unet, net, **changed, **inputs()) - before).abs().max() > 1e-3


def test_the_style_of_a_control_is_heard_without_its_residuals(pair):
    """Brightness, contrast and sharpness of the control reach the U-Net, its places do not."""
    unet, net, control, told = pair
    assert_close(levels_of(control), levels_of(control.flip(2)))
    assert_close(levels_of(control * .5 - .5)[:, :3] - levels_of(control)[:, :3],
                 torch.full((2, 3), np.log(.5)), atol=.03, rtol=0)  # half as bright
    smooth = torch.nn.functional.avg_pool2d(control, 3, 1, 1, count_include_pad=False)
    assert (levels_of(smooth) - levels_of(control))[:, 6:].max() < -.5
    before = controlled(unet, net, control, told, **inputs())
    randomise(net.levels, seed=1)
    heard = controlled(unet, net, control, told, **inputs())
    assert (heard - before).abs().max() > 1e-3
    assert_close(controlled(unet, net, control.flip(3), told, **inputs()), heard)


def test_every_residual_is_used(pair):
    unet, net, control, told = pair
    before = unet(**inputs())
    for k, layer in enumerate(net.zeros):
        torch.nn.init.ones_(layer.weight)
        assert (controlled(unet, net, control, told, **inputs()) - before).abs().max() > 1e-3, k
        torch.nn.init.zeros_(layer.weight)


# --- training -------------------------------------------------------------------------------------

def config_of(ldm_path, out, column, **changes):
    return train_ldm.Config(base=str(ldm_path), control_column=column, out=str(out), steps=3,
                            eval_every=3, batch=8, views=2, **changes)


@pytest.fixture(scope="module", params=["brightfield", "untreated", "negcon"])
def control_path(request, ldm_path, tmp_path_factory):
    return train_ldm.train(config_of(ldm_path, tmp_path_factory.mktemp("control"), request.param))


@pytest.fixture(scope="module")
def prepared(ldm_path, tmp_path_factory):
    """A ControlNet ready to train, for each kind of control."""
    return {column: train_ldm.prepare(train_ldm.on_top_of_base(config_of(
        ldm_path, tmp_path_factory.mktemp(column), column))) for column in ("untreated", "negcon")}


def test_control_images_are_cut_and_turned_like_their_targets(prepared):
    """Of a negative control the untreated cells are the image itself: every view must agree."""
    p, rng = prepared["untreated"], np.random.default_rng(0)
    side, dose = p.sides["training"], p.manifest.columns["dose"]
    rows = np.array([k for k, i in enumerate(side.rows) if float(dose[i]) == 0][:20])
    targets = torch.cat([x for x, _ in train_ldm.batches_of_views(
        p.pixels, side.rows, p.settings, p.constant["vae"]["intensity"], 2)])
    for view in (0, 1):
        shown, *_ = side.controls.draw(rows, np.full(len(rows), view), rng)
        assert_close(shown, targets[rows * 2 + view], atol=2e-3, rtol=0)
    assert (targets[rows * 2] - targets[rows * 2 + 1]).abs().max() > .1


def test_a_negative_control_comes_from_another_well_of_the_plate(screen, ldm_path):
    manifest = data.read_manifest(screen)
    model = sample.Model.load(ldm_path)
    rows = np.arange(len(manifest))
    chosen, partners = train_ldm.negative_controls(manifest, model.fields, rows, rows, "plate")
    plate, well = (manifest.columns[name] for name in ("plate", "well"))
    assert {float(manifest.columns["dose"][i]) for i in chosen} == {0.}
    for i in rows[::37]:
        assert partners[i] and all(plate[chosen[k]] == plate[i] and well[chosen[k]] != well[i]
                                   for k in partners[i])


def test_negative_controls_are_drawn_with_their_own_metadata(prepared):
    p, rng = prepared["negcon"], np.random.default_rng(0)
    side = p.sides["training"]
    places = np.arange(0, len(side.rows), 97)
    images, codes, known, shown = side.controls.draw(places, np.zeros(len(places), int), rng)
    told = {f.name: known[:, i].all().item() for i, f in enumerate(p.fields)}
    assert told == {"smiles": False, "dose": False, "batch": True, "plate": True, "row": True,
                    "column": True}  # what was done to a negative control is always the same
    assert torch.equal(codes["plate"], side.codes["plate"][places])
    assert not torch.equal(codes["row"], side.codes["row"][places])
    every = torch.from_numpy(side.controls.images[:].astype(np.float32))
    assert all((every == image).flatten(1).all(1).any() for image in images)
    again, *_ = side.controls.draw(places, np.zeros(len(places), int), rng)
    assert not torch.equal(images, again)


def test_the_metadata_of_a_control_are_sometimes_hidden(prepared):
    side, rng = prepared["negcon"].sides["training"], np.random.default_rng(0)
    places = np.resize(np.arange(len(side.rows)), 400)
    _, _, known, shown = side.controls.draw(places, 0 * places, rng, .75,
                                            torch.Generator().manual_seed(0))
    share = known[:, 2:].float().mean().item()
    assert .6 < share < .95 and .65 < shown.mean() < .85


@pytest.mark.pictures
def test_samples_of_a_plate_that_was_held_out(screen, tmp_path):
    """The plate field has no value that the model knows; the picture must be drawn all the same."""
    vae = train_vae.train(train_vae.Config(data=str(screen), split="plate=P03", steps=2, width=16,
                                           blocks=1, out=str(tmp_path / "vae")))
    options = dict(vae=str(vae), steps=1, batch=4, size="tiny", views=1)
    base = train_ldm.train(train_ldm.Config(data=str(screen), out=str(tmp_path / "base"),
                                            **options))
    path = train_ldm.train(train_ldm.Config(control_column="negcon", base=str(base), steps=1,
                                            batch=4, views=1, out=str(tmp_path / "control")))
    assert (path.parent / "samples.png").exists()


def test_a_controlnet_resumes_exactly(ldm_path, tmp_path, monkeypatch):
    options = dict(unfreeze_decoder=True)
    whole = train_ldm.train(config_of(ldm_path, tmp_path / "whole", "brightfield", **options))
    config = config_of(ldm_path, tmp_path / "parts", "brightfield", **options)

    def stop(average, model, decay, step, real=train_ldm.ema_update):
        if step == 2:
            raise KeyboardInterrupt
        real(average, model, decay, step)
    config.eval_every = 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_ldm, "ema_update", stop)
        train_ldm.train(config)
    config.resume = True
    parts = train_ldm.train(config)
    one, other, base = (train_ldm.load_checkpoint(path, "ldm", "") for path in (whole, parts,
                                                                               ldm_path))
    assert all(torch.equal(v, other["weights"][k]) for k, v in one["weights"].items())
    moved = {k for k, v in base["ema"].items() if not torch.equal(v, one["weights"][k])}
    assert moved and all(k.startswith(("unet.up.", "unet.out.")) for k in moved)


def test_the_base_stays_as_it_was(control_path, ldm_path):
    before, after = (sample.Model.load(path) for path in (ldm_path, control_path))
    for name, weight in before.denoiser.state_dict().items():
        assert torch.equal(weight, after.denoiser.state_dict()[name]), name
    assert any(p.abs().sum() > 0 for p in after.denoiser.controlnet.zeros.parameters())


def test_the_network_sees_the_control_unless_it_is_hidden(ldm_path, tmp_path):
    config = config_of(ldm_path, tmp_path, "brightfield")
    p = train_ldm.prepare(train_ldm.on_top_of_base(config))
    schedule, latents = p.schedule, p.sides["training"]
    z0, eps, t, codes, keep, control = train_ldm.training_batch(latents, config, schedule, p.fields,
                                                                0)
    randomise(p.denoiser, seed=3)

    def out(control):
        return p.denoiser(schedule.add_noise(z0, eps, t), t, codes, keep, latents.molecules,
                          control)
    images, *rest, shown = control
    assert (out(control) - out((images + 1, *rest, shown))).abs().max() > 1e-3
    assert torch.equal(out((images, *rest, 0 * shown)), out(None))


# --- sampling -------------------------------------------------------------------------------------

@pytest.fixture
def model(control_path):
    model = sample.Model.load(control_path)
    randomise(model.denoiser, seed=2)
    return model


def control_for(model, n=2):
    size = [side * model.vae.config.downsampling for side in model.latent_shape[1:]]
    torch.manual_seed(0)
    return torch.rand(n, model.controlnet["channels"], *size) * 2 - 1, {"batch": ["B1"] * n}


def test_the_control_group_has_a_weight_of_its_own(model):
    control, columns = control_for(model), {"dose": ["1", "3"], "batch": ["B1", "B2"]}
    z, t = torch.randn(2, *model.latent_shape), torch.tensor([500, 500])

    def v(given, with_control):
        return model.plain(given, 2, control if with_control else None)(z, t)
    experiment = {"batch": columns["batch"]}
    weights = dict(biology=2., control=3., experiment=1.5)
    expected = (v({}, False) + 1.5 * (v(experiment, False) - v({}, False))
                + 3 * (v(experiment, True) - v(experiment, False))
                + 2 * (v(columns, True) - v(experiment, True)))
    guided = model.guided(columns, 2, weights, control=control)
    assert_close(guided(z, t), expected, atol=1e-3, rtol=1e-3)
    ignored = model.guided(columns, 2, weights | {"control": 0., "biology": 0.}, control=control)
    plain = model.guided(columns, 2, dict(experiment=1.5, biology=0.))
    assert_close(ignored(z, t), plain(z, t), atol=1e-4, rtol=1e-4)


def test_sampling_hears_the_control_as_training_does(model):
    """Residuals and style: Model.plain is Denoiser.forward; both hear the style alone."""
    (images, told), columns = control_for(model), {"dose": ["1", "3"], "batch": ["B1", "B2"]}
    z, t = torch.randn(2, *model.latent_shape), torch.tensor([500, 500])

    def both():
        encode = model.denoiser.conditioner.encode
        codes, known, molecules = encode(columns, 2)
        with torch.no_grad():
            trained = model.denoiser(z, t, codes, known, molecules, (
                images, *encode(told, 2)[:2], torch.ones(2)))
        return model.plain(columns, 2, (images, told))(z, t), trained
    sampled, trained = both()
    assert_close(sampled, trained, atol=1e-4, rtol=1e-4)
    for layer in model.denoiser.controlnet.zeros:
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    sampled, trained = both()
    assert_close(sampled, trained, atol=1e-4, rtol=1e-4)
    assert (sampled - model.plain(columns, 2)(z, t)).abs().max() > 1e-3


def test_a_controlnet_without_style_is_refused(control_path):
    content = train_ldm.load_checkpoint(control_path, "ldm", "")
    content["ema"] = {k: v for k, v in content["ema"].items() if ".levels." not in k}
    with pytest.raises(train_vae.UserError, match="older kind: train it again"):
        sample.Model(content)


def test_images_follow_their_own_control_in_any_batch(model):
    control = control_for(model, 3)
    options = dict(steps=2, progress=False)
    many = model.generate({"dose": ["1"] * 3}, [5, 5, 5], control=control, **options)
    assert (many[0] - many[1]).abs().max() > 5e-5
    one = model.generate({"dose": ["1"]}, [5], control=sample.take_control(control, [2]),
                         **options)
    assert_close(one[0], many[2], atol=1e-4, rtol=1e-4)


def test_the_control_image_passes_its_stem_once_whatever_the_steps(model, monkeypatch):
    control, seen = control_for(model), []
    monkeypatch.setattr(model.denoiser.controlnet.hint, "forward", lambda image, real=(
        model.denoiser.controlnet.hint.forward): seen.append(len(image)) or real(image))
    model.generate({"dose": ["1"] * 2}, [0, 1], steps=4, control=control, progress=False,
                   interval=(0., 1.))
    assert seen == [2]


@pytest.mark.parametrize("length, window, overlap", [(8, 8, .5), (20, 8, .5), (33, 8, .25),
                                                     (270, 16, .5)])
def test_windows_cover_and_overlap(length, window, overlap):
    starts = sample.windows(length, window, overlap)
    assert starts[0] == 0 and starts[-1] == length - window and starts == sorted(set(starts))
    steps = np.diff(starts)
    assert len(starts) == 1 or steps.max() <= window * (1 - overlap) + .5


def test_a_large_image_of_one_window_is_the_small_image(model):
    control = control_for(model, 1)
    columns = {"dose": ["1"], "batch": ["B1"]}
    small = model.generate(columns, [4], steps=3, control=control, progress=False)
    large = model.generate_large(columns, 4, control, steps=3)
    assert_close(small, large, atol=1e-4, rtol=1e-4)


def test_windows_join_without_seams(model, monkeypatch):
    """With a network that sees each pixel alone, tiles must give what the whole field gives."""
    images, columns = control_for(model, 1)
    wide = torch.cat([images, images.flip(3), images], 3)[..., :-8]

    def guided(columns, n, *rest, control=None, **options):
        small = torch.nn.functional.avg_pool2d(control[0][:, :1], 4)
        return lambda z, t: .3 * z + small
    monkeypatch.setattr(model, "guided", guided)
    monkeypatch.setattr(model.vae, "to_image", lambda z: torch.nn.functional.interpolate(
        z.mean(1, keepdim=True).expand(-1, len(model.channels), -1, -1), scale_factor=4))
    tiled = model.generate_large({"dose": ["1"]}, 0, (wide, columns), steps=4,
                                 sampler="ddim")
    shape = (model.latent_shape[0], *(n // 4 for n in wide.shape[2:]))
    z = diffusion.sample(guided({}, 1, control=(wide, {})), model.schedule, [0], shape, 4)
    assert_close(tiled, model.vae.to_image(z), atol=1e-4, rtol=1e-4)


@pytest.fixture
def loud_path(control_path, tmp_path):
    """The checkpoint with random weights, so that whatever is heard is seen."""
    content = train_ldm.load_checkpoint(control_path, "ldm", "")
    model = sample.Model(content)
    content["ema"] = randomise(model.denoiser, seed=2).state_dict()
    train_ldm.save_checkpoint(tmp_path / "loud.pt", "ldm", content)
    return tmp_path / "loud.pt"


def test_blending_fades_between_windows_that_disagree():
    tiles = sample.Tiles((8, 20), (8, 8), .5, batch=2)
    values = {place: float(k) for k, place in enumerate(p for part in tiles.parts for p in part)}
    joined = tiles.blend(1, 2, lambda part: torch.stack([
        torch.full((1, 16, 16), values[place]) for place in part]))
    assert joined.shape == (1, 1, 16, 40)
    assert joined[0, 0, :, 0].unique().tolist() == [0.] and joined[0, 0, 3, -1] == max(
        values.values())
    assert joined.diff(dim=3).abs().max() < .5  # a seam would jump by 1


def test_control_on_the_command_line(loud_path, screen, cli, tmp_path):
    """A sweep beside a row's control; the same request after two files: two pictures, same noise,
    told apart only if the file reaches the network."""
    out, column = tmp_path / "out", sample.Model.load(loud_path).controlnet["column"]
    status, said, error = cli(sample, "--checkpoint", loud_path, "--control", f"{screen}:9",
                              "--grid", "dose=0,3", "batch=B1,B2", "--steps", 2, "--out", out)
    assert status == 0, error
    assert tifffile.imread(out / "samples.tif").shape[0] == 4
    file, drawn = screen.parent / ("image.npy" if column == "negcon" else f"{column}.npy"), []
    for index in (7, 107):
        status, said, error = cli(sample, "--checkpoint", loud_path, "--control",
                                  f"{file}:{index}", "dose=1", "-n", 1, "--steps", 2, "--out", out)
        assert status == 0, error
        drawn.append(tifffile.imread(out / "samples.tif").astype(float))
    assert abs(drawn[0] - drawn[1]).max() > 2e-3
    record = json.loads((out / "samples.json").read_text())
    assert record["control"].endswith(":107") and record["guidance"]["control"] == 1


def test_strength_says_how_much_of_the_image_is_kept(ldm_path, screen, cli, refused, tmp_path):
    drawn, edit = {}, ["--checkpoint", ldm_path, "--edit", f"{screen}:9", "--out", tmp_path]
    for strength in (.01, .9):
        status, _, error = cli(sample, *edit, "--strength", strength, "--steps", 4)
        assert status == 0, error
        drawn[strength] = tifffile.imread(tmp_path / "samples.tif").astype(float)
    model = sample.Model.load(ldm_path)
    image, *_ = sample.read_row(model, f"{screen}:9")
    kept = model.vae.to_image(model.vae.to_latent(image))
    low, high = (np.array(model.intensity[k])[:, None, None] for k in ("low", "high"))
    kept = low + (kept[0].numpy() + 1) / 2 * (high - low)
    error = {s: abs(x - kept).mean() for s, x in drawn.items()}
    assert error[.01] < .3 * error[.9]
    refused(sample, *edit, "--strength", 1.5, says=["--strength 1.5"])
    refused(sample, "--checkpoint", ldm_path, "dose=1", "--strength", .5, says=["--edit"])


def test_a_large_control_is_drawn_in_tiles(control_path, cli, tmp_path):
    channels = sample.Model.load(control_path).controlnet["channels"]
    field = np.random.default_rng(0).integers(0, 255, (channels, 48, 72), np.uint8)
    np.save(tmp_path / "field.npy", field)
    status, said, error = cli(sample, "--checkpoint", control_path, "--control",
                              tmp_path / "field.npy", "dose=1", "-n", 1, "--steps", 2, "--out",
                              tmp_path)
    assert status == 0, error
    assert tifffile.imread(tmp_path / "samples.tif").shape[-2:] == (48, 72)


def test_refusals(control_path, ldm_path, screen, tmp_path, refused):
    channels = sample.Model.load(control_path).controlnet["channels"]
    np.save(tmp_path / "two.npy", np.zeros((2, 32, 32), np.uint8))
    np.save(tmp_path / "small.npy", np.zeros((channels, 16, 16), np.uint8))

    def no(*words, says, checkpoint=control_path):
        assert len(refused(sample, "--checkpoint", checkpoint, *words, "--out", tmp_path / "out",
                           says=says)) == 1
    no("--control", tmp_path / "two.npy", says=["2 channels", f"trained with {channels}"])
    no("--control", tmp_path / "small.npy", says=["16x16", "at least 32x32"])
    no("--control", tmp_path / "none.npy", says=["none.npy"])
    np.save(tmp_path / "float.npy", np.zeros((channels, 32, 32)))
    np.save(tmp_path / "stack.npy", np.zeros((4, channels, 32, 32), np.uint8))
    no("--control", tmp_path / "float.npy", says=["holds float64"])
    no("--control", tmp_path / "stack.npy", says=["FILE:INDEX"])
    no("--guidance", "control=2", says=["--control FILE"])
    no("--control", f"{screen}:1", says=["MANIFEST:ROW"])
    no("--control", f"{screen}:9", checkpoint=ldm_path, says=["no ControlNet"])
    no("dose=1", "--guidance", "control=2", checkpoint=ldm_path, says=["no group control"])
    assert not (tmp_path / "out").exists()


def test_training_refusals(ldm_path, control_path, screen, tmp_path, refused):
    def no(*words, says):
        assert len(refused(train_ldm, "--out", tmp_path / "out", *words, says=says)) == 1
    no("--base", ldm_path, "--control_column", "phase", says=["no column phase"])
    no("--base", tmp_path / "none.pt", "--control_column", "brightfield", says=["none.pt"])
    no("--base", control_path, "--control_column", "brightfield", says=["has a ControlNet already"])
    no("--base", ldm_path, "--control_column", "brightfield", "--size", "base", says=["--size"])
    no("--unfreeze_decoder", says=["--control_column"])
    no("--base", ldm_path, "--control_column", "brightfield", "--control_dropout", 2,
       says=["from 0 to 1"])
    rows = [dict(zip(("image", "index", "smiles", "dose", "batch", "plate", "row", "column",
                      "split"), (screen.parent / "image.npy", i, "CCO", 1 + i % 2, "B1", "P01", 1,
                                 1, "val" if i == 5 else "train"))) for i in range(12)]
    data.write_manifest(tmp_path / "m.csv", rows)
    no("--base", ldm_path, "--control_column", "negcon", "--data", tmp_path / "m.csv",
       says=["P01 has no (other) negative control"])
    for lacks in ("batch", "smiles"):
        data.write_manifest(tmp_path / f"no_{lacks}.csv", [
            {k: v for k, v in row.items() if k != lacks} for row in rows])
        no("--base", ldm_path, "--control_column", "negcon", "--data", tmp_path / f"no_{lacks}.csv",
           says=[f"has no column {lacks}, which the model was told"])
    assert not (tmp_path / "out" / "model.pt").exists()


# --- evaluate.py control --------------------------------------------------------------------------

def some_images(n=3, seed=0):
    torch.manual_seed(seed)
    return evaluate.gaussian_blur(torch.rand(n, 2, 40, 40), 1.)


def test_pearson_is_one_for_any_gain_and_zero_for_noise():
    x = some_images()
    assert_close(evaluate.pearson(x, 3 * x + 1), torch.ones(3, 2))
    assert_close(evaluate.pearson(x, -x), -torch.ones(3, 2))
    noise = torch.randn(3, 2, 200, 200)
    assert evaluate.pearson(noise, torch.randn_like(noise)).abs().max() < .03


def test_structural_similarity_of_constant_images_is_the_luminance_term():
    x, y = torch.full((1, 1, 32, 32), .5), torch.full((1, 1, 32, 32), .7)
    expected = (2 * .5 * .7 + 1e-4) / (.25 + .49 + 1e-4)
    assert_close(evaluate.structural_similarity(x, y), torch.tensor([[expected]]))
    assert_close(evaluate.structural_similarity(x, x), torch.ones(1, 1))


def test_structural_similarity_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    x, y = some_images(seed=0), some_images(seed=1)
    expected = metrics.structural_similarity(
        x[0, 0].numpy(), y[0, 0].numpy(), data_range=1., gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False)
    assert_close(evaluate.structural_similarity(x, y)[0, 0].item(), expected, atol=1e-4, rtol=0)


def test_power_spectrum_finds_a_wave_and_sees_blur():
    place = torch.arange(64) / 64 * 2 * torch.pi
    wave = torch.sin(7 * place).expand(1, 1, 64, 64)
    assert evaluate.power_spectrum(wave)[0].argmax() == 7 - 1
    x = torch.randn(4, 1, 64, 64)
    change = evaluate.power_spectrum(evaluate.gaussian_blur(x, 1.)) - evaluate.power_spectrum(x)
    assert abs(change[0, 0]) < .2 and change[0, -1] < -3  # exp(-(2 pi sigma f)^2) at f = 1/2


def test_overlap_of_nuclei():
    y, x = torch.meshgrid(torch.arange(64.), torch.arange(64.), indexing="ij")

    def disc(cx):
        return ((y - 32) ** 2 + (x - cx) ** 2 < 36).float()[None] * .8
    assert evaluate.overlap(disc(32), disc(32), 5.) == 1
    assert evaluate.overlap(disc(16), disc(48), 5.) == 0
    assert .3 < evaluate.overlap(disc(32), disc(36), 5.) < .6


def test_the_regression_learns_what_the_control_shows(monkeypatch):
    torch.manual_seed(0)
    clock = itertools.count(step=.02)  # of a machine that takes as long for every step
    monkeypatch.setattr(evaluate.time, "time", lambda: next(clock))

    def draw(rng, n):
        x = torch.rand(n, 1, 1, 1).expand(n, 1, 16, 16) * 2 - 1
        return x, torch.cat([x, -x], 1)
    network = evaluate.train_regression(draw, 2.5)
    x, y = draw(None, 64)
    assert (network(x) - y).abs().mean() < .5 * y.abs().mean()


def test_evaluate_control(control_path, ldm_path, cli, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "screen_probe", lambda *_: None)
    monkeypatch.setattr(evaluate, "report_seconds", lambda *_: .5)
    monkeypatch.setattr(evaluate, "identity", lambda opened, steps, real=evaluate.identity:
                        real(opened, (3, 24), 2))
    out = tmp_path / "out"
    status, said, error = cli(evaluate, "control", "--checkpoint", control_path, "--images", 8,
                              "--samples", 2, "--steps", 2, "--out", out)
    assert status == 0, error
    report = json.loads((out / "control.json").read_text())
    assert (out / "control.png").exists() and (out / "learning.png").exists()
    few, many = report["identity"]["3"], report["identity"]["24"]
    assert few[0] < many[0] and few[1] < many[1] and few[0] < few[1]  # steps and rounds both help
    if report["column"] == "negcon":
        plates = report["plates"]
        assert set(plates) and all({"real", "with control", "without control"} <= set(e)
                                   for e in plates.values())
        assert any(e["with control"] != e["without control"] for e in plates.values())
    else:
        table = report["paired"]
        assert {"ControlNet", "without control", "regression", "mean image", "real",
                "control itself"} <= set(table)
        assert np.mean(table["real"]["l1"]) == 0 and table["real"]["nuclei_error"] == 0
        assert table["ControlNet"]["l1"] != table["without control"]["l1"]
    if report["column"] == "untreated":
        same = report["counterfactual"]
        assert same["untreated"]["nuclei_overlap"] == 1 and np.mean(same["the truth"]["l1"]) == 0
    refused(evaluate, "control", "--checkpoint", ldm_path, says=["has no ControlNet"])
