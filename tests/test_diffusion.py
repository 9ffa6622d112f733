"""Schedules, targets, samplers and guidance against closed forms."""
import math
import re
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

import diffusion
from diffusion import (SAMPLERS, Schedule, combine, compose, ddim_step, ddpm_step, dpm_step,
                       sample, show_guidance, show_samplers)


def exact(schedule, mean=2., std=.5):
    """The exact denoiser of N(mean, std^2) pixels, in whatever the schedule predicts."""
    def denoise(z, t):
        a, s = schedule.signal_noise(t, z)
        z0 = mean + a * std ** 2 / (a ** 2 * std ** 2 + s ** 2) * (z - a * mean)
        return schedule.target_of(z0, (z - a * z0) / s, t)
    return denoise


def test_linear_schedule_is_the_product_of_one_minus_beta():
    abar = diffusion.linear(1000)
    beta = [1e-4 + (.02 - 1e-4) * i / 999 for i in range(1000)]
    assert_close(abar[499].item(), math.prod(1 - b for b in beta[:500]))


def test_cosine_schedule_follows_its_formula():
    f = [math.cos((i / 1000 + .008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    assert_close(diffusion.cosine(1000)[499].item(), f[500] / f[0])


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_zero_terminal_snr_ends_in_noise_and_keeps_the_start(name):
    plain, zero = (Schedule(name, zero_snr=z).abar for z in (False, True))
    assert zero[999] == 0 and plain[999] > 0
    assert_close(zero[0], plain[0])
    assert (zero[1:1000] <= zero[:999]).all()


def test_zero_snr_refuses_the_noise_target():
    with pytest.raises(ValueError, match="velocity"):
        Schedule(target="noise", zero_snr=True)
    with pytest.raises(ValueError, match="ends in noise"):
        Schedule("cosine", target="noise", zero_snr=False)


@pytest.mark.parametrize("target", diffusion.TARGETS)
def test_split_inverts_target(target):
    schedule = Schedule("linear", target, zero_snr=False)
    z0, eps, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 200, 500, 800])
    z = schedule.add_noise(z0, eps, t)
    back = schedule.split(z, schedule.target_of(z0, eps, t), t)
    assert_close(back, (z0, eps), atol=2e-3, rtol=2e-3)


def test_velocity_is_the_derivative_by_angle():
    # z = cos(phi) z0 + sin(phi) eps, so dz / dphi = cos(phi) eps - sin(phi) z0 (Salimans & Ho)
    schedule, z0, eps = Schedule(), torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    phi = torch.acos(schedule.abar[400].sqrt()).item()
    step = 1e-3
    numeric = ((math.cos(phi + step) - math.cos(phi - step)) * z0
               + (math.sin(phi + step) - math.sin(phi - step)) * eps) / (2 * step)
    assert_close(schedule.target_of(z0, eps, 400), numeric, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("target", diffusion.TARGETS)
def test_loss_of_a_silent_network_is_one(target):
    torch.manual_seed(0)
    schedule = Schedule("linear", target, zero_snr=False)
    z0, eps = torch.randn(256, 4, 8, 8), torch.randn(256, 4, 8, 8)
    t = torch.randint(1000, (256,))
    loss = diffusion.diffusion_loss(schedule, lambda z, t: torch.zeros_like(z), z0, eps, t).mean()
    assert_close(loss.item(), 1., atol=.03, rtol=0)


@pytest.mark.parametrize("target, formula", [
    ("noise", lambda snr: min(snr, 5.) / snr), ("image", lambda snr: min(snr, 5.)),
    ("velocity", lambda snr: min(snr, 5.) / (snr + 1))])
def test_min_snr_weights(target, formula):
    schedule = Schedule("linear", target, zero_snr=False)
    for t in (50, 300, 600):
        snr = (schedule.abar[t] / (1 - schedule.abar[t])).item()
        assert_close(schedule.min_snr_weight(t).item(), formula(snr))


def test_min_snr_is_finite_and_positive_at_zero_snr():
    weight = Schedule(zero_snr=True).min_snr_weight(torch.tensor([999, 0]))
    assert torch.isfinite(weight).all() and (weight > 0).all()


def test_the_last_training_step_is_the_first_sampling_step():
    for n in (1, 7, 30, 1000):
        times = Schedule().timesteps(n)
        assert times[0] == 999 and times[-1] == -1 and len(set(times)) == n + 1
    with pytest.raises(ValueError, match="1001"):
        Schedule().timesteps(1001)


@pytest.mark.parametrize("target", ["velocity", "image"])
@pytest.mark.parametrize("t, t_next", [(999, 899), (500, 499), (300, 40), (19, -1)])
def test_ddim_with_eta_one_is_ddpm(target, t, t_next):
    schedule = Schedule(target=target)
    z, v, noise = torch.randn(3, 2, 4, 4).unbind(0)
    assert_close(ddim_step(schedule, z[None], v[None], t, t_next, 1., noise[None]),
                 ddpm_step(schedule, z[None], v[None], t, t_next, noise[None]),
                 atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.), ("ddim", 1.), ("ddpm", 0.),
                                          ("dpm", 0.)])
@pytest.mark.parametrize("target, zero_snr", [("velocity", True), ("image", False),
                                              ("noise", False)])
def test_samplers_recover_a_gaussian(sampler, eta, target, zero_snr):
    schedule = Schedule("linear", target, zero_snr=zero_snr)
    z = sample(exact(schedule), schedule, range(1500), (1,), steps=200, eta=eta, sampler=sampler)
    assert_close(z.mean().item(), 2., atol=.05, rtol=0)
    assert_close(z.std().item(), .5, atol=.05, rtol=0)


def test_few_ddim_steps_keep_the_mean_and_lose_spread():
    schedule = Schedule("linear", zero_snr=False)
    z = sample(exact(schedule), schedule, range(1500), (1,), steps=10)
    assert_close(z.mean().item(), 2., atol=.05, rtol=0)
    assert z.std() < .42


def exact_path(schedule, x, t, mean=2., std=.5):
    """Where the probability flow of N(mean, std^2) has carried the standard deviate x at t."""
    a, s = schedule.signal_noise(t, x)
    return a * mean + (a ** 2 * std ** 2 + s ** 2).sqrt() * x


def test_dpm_is_of_second_order_and_ddim_of_first():
    schedule, x = Schedule(), torch.linspace(-2, 2, 9, dtype=torch.float64)

    def error(sampler, n, top=899, bottom=99):
        z, before = exact_path(schedule, x, top), None
        for t, t_next in pairwise(round(top + (bottom - top) * i / n) for i in range(n + 1)):
            prediction = exact(schedule)(z, t)
            z0, _ = schedule.split(z, prediction, t)
            if sampler == "ddim":
                z = ddim_step(schedule, z, prediction, t, t_next, 0., 0.)
            else:
                z, before = dpm_step(schedule, z, z0, t, t_next, before), (t, z0)
        return (z - exact_path(schedule, x, bottom)).abs().max().item()
    for sampler, order in (("ddim", 1.), ("dpm", 2.)):
        assert_close(math.log2(error(sampler, 40) / error(sampler, 160)) / 2, order, atol=.05,
                     rtol=0)


@pytest.mark.parametrize("name, target, zero_snr", [
    ("cosine", "velocity", True), ("linear", "image", True), ("cosine", "velocity", False)])
def test_few_dpm_steps_are_nearer_the_truth_than_twice_as_many_of_ddim(name, target, zero_snr):
    schedule = Schedule(name, target, zero_snr=zero_snr)

    def error(sampler, n):
        z = sample(exact(schedule), schedule, range(200), (1,), steps=n, sampler=sampler)
        noise = diffusion.gaussian(diffusion.generators(range(200)), (1,))
        return (z - exact_path(schedule, noise, -1)).square().mean().sqrt()
    for n in (20, 30):
        assert error("dpm", n) < error("ddim", 2 * n)


def test_dpm_begins_and_ends_with_a_step_of_ddim():
    """The first step has nothing to go by, the last ends at clean: both are DDIM's. Three steps
    from below zero SNR have one between; from zero SNR that one is DDIM's as well."""
    schedule = Schedule()
    z = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def apart(n, top):
        one, other = (sample(exact(schedule), schedule, range(4), (1, 2, 2), n, sampler=sampler,
                             start=z, top=top) for sampler in ("ddim", "dpm"))
        return (one - other).abs().max().item()
    assert max(apart(1, 999), apart(2, 999), apart(3, 999), apart(1, 700), apart(2, 700)) < 1e-5
    assert min(apart(4, 999), apart(3, 700)) > 1e-3


@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_an_image_depends_on_its_seed_and_not_on_its_batch(sampler):
    schedule = Schedule()
    seeds = [3, 40, 8, 21, 5, 2, 11, 17]
    together = sample(exact(schedule), schedule, seeds, (2, 4, 4), steps=9, sampler=sampler)
    alone = sample(exact(schedule), schedule, [17], (2, 4, 4), steps=9, sampler=sampler)
    assert_close(alone[0], together[7])
    assert (together[6] - together[7]).abs().max() > .1


# --- guidance: every branch predicts its own random number, so sums can be compared --------------

V = {b: torch.randn(()).double() for b in
     [(x, y) for x in ("given", "unknown", "average") for y in ("given", "unknown", "control")]}
NONE, E, B, FULL = (V[k] for k in (("unknown", "unknown"), ("given", "unknown"),
                                   ("unknown", "given"), ("given", "given")))


def guided(form, e, b):
    branches = compose(form, {"experiment": e, "biology": b},
                       {"experiment": "average", "biology": "control"})
    assert_close(sum(branches.values()), 1.)
    return sum(c * V[branch] for branch, c in branches.items())


@pytest.mark.parametrize("e, b", [(1.5, 2.), (0., 3.), (2., 2.), (1., 1.)])
def test_each_form_is_its_formula(e, b):
    control, average = V["given", "control"], V["average", "given"]
    assert_close(guided("nested", e, b), NONE + e * (E - NONE) + b * (FULL - E))
    assert_close(guided("independent", e, b), NONE + e * (E - NONE) + b * (B - NONE))
    assert_close(guided("contrast", e, b),
                 FULL + (b - 1) * (FULL - E) + (e - 1) * (FULL - B))
    assert_close(guided("control", e, b),
                 FULL + (b - 1) * (FULL - control) + (e - 1) * (FULL - average))


@pytest.mark.parametrize("form", ["nested", "contrast", "control"])
def test_weights_of_one_are_the_conditional_model_in_one_branch(form):
    assert compose(form, {"experiment": 1., "biology": 1.}) == {("given", "given"): 1.}


@pytest.mark.parametrize("form", ["nested", "independent"])
def test_weights_of_zero_are_the_unconditional_model(form):
    assert compose(form, {"experiment": 0., "biology": 0.}) == {("unknown", "unknown"): 1.}


def test_equal_weights_nested_are_classifier_free_guidance():
    assert_close(guided("nested", 3., 3.), NONE + 3 * (FULL - NONE))


def test_nested_takes_any_number_of_groups_in_order():
    branches = compose("nested", {"a": 2., "b": 3., "c": 4.})
    u, g = "unknown", "given"
    assert branches == {(u, u, u): -1., (g, u, u): -1., (g, g, u): -1., (g, g, g): 4.}


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="nested"):
        compose("sideways", {"biology": 1.})


def test_every_latent_channel_is_guided():
    predictions = torch.randn(3, 2, 8, 4, 4)
    out = combine(predictions, [-1., .5, 1.5])
    for channel in range(8):
        p = predictions[:, :, channel]
        assert_close(out[:, channel], -p[0] + .5 * p[1] + 1.5 * p[2])


@pytest.mark.parametrize("name,target", [("cosine", "velocity"), ("linear", "noise")])
def test_inversion_is_undone_by_sampling(name, target):
    schedule = Schedule(name, target, zero_snr=target != "noise")
    z, top = .5 * torch.randn(6, 1, 2, 2) + 2, schedule.last_invertible()
    errors = []
    for rounds in (1, 6):
        noise = diffusion.invert(exact(schedule), schedule, z, 25, top, rounds)
        back = sample(exact(schedule), schedule, range(6), (1, 2, 2), steps=25, start=noise,
                      top=top)
        errors.append((back - z).abs().max().item())
    assert errors[1] < 1e-2 and errors[1] < errors[0]


def test_inversion_gives_standard_noise():
    schedule = Schedule()
    z = .5 * torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0)) + 2
    top = schedule.last_invertible()
    assert schedule.abar[top] / (1 - schedule.abar[top]) >= 1e-3 > (
        schedule.abar[top + 1] / (1 - schedule.abar[top + 1]))
    noise = diffusion.invert(exact(schedule), schedule, z, 100, top)
    assert_close(noise.mean().item(), 2 * schedule.abar[top].sqrt().item(), atol=.05, rtol=0)
    assert_close(noise.std().item(), 1., atol=.05, rtol=0)


def test_rescale_takes_back_the_spread_that_guidance_added():
    given = torch.randn(3, 4, 8, 8)
    guided = 3 * given
    assert_close(diffusion.rescale(guided, given, 1.), given)
    assert_close(diffusion.rescale(guided, given, .5), 2 * given)


def test_the_demo_shows_what_steps_and_guidance_do(capsys):
    show_samplers()
    out = capsys.readouterr().out
    spread = {(name, int(n)): float(s) for name, n, s in re.findall(
        r"(\w+), +(\d+) steps: mean .* spread ([\d.]+)", out)}
    for name in SAMPLERS:
        assert abs(spread[name, 200] - .5) < .02  # few steps make it too narrow
        assert spread[name, 5] < spread[name, 200] - .01
    show_guidance()
    experiment = {(form, weight): float(mean) for form, weight, mean in re.findall(
        r"(\w+) +weights ([\d.]+): .* experiment (\S+),", capsys.readouterr().out)}
    assert len(experiment) == 6
    assert experiment["nested", "1.0"] < -.95                # the rare pair, as asked
    assert -.8 < experiment["independent", "1.0"] < -.4      # drawn home
