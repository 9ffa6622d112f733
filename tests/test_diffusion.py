"""Schedules, targets, samplers and guidance against closed forms."""
import math
import re
from itertools import pairwise, product

import pytest
import torch
from torch.testing import assert_close

import diffusion
from diffusion import (SAMPLERS, Schedule, combine, compose, ddim_step, ddpm_step, dpm_step,
                       invert, sample, show_guidance, show_samplers)


def exact(schedule, mean=2., std=.5):
    """The exact denoiser of N(mean, std^2) pixels, in whatever the schedule predicts."""
    def denoise(z, t):
        a, s = schedule.signal_noise(t, z)
        z0 = mean + a * std ** 2 / (a ** 2 * std ** 2 + s ** 2) * (z - a * mean)
        return schedule.target_of(z0, (z - a * z0) / s, t)
    return denoise


def test_schedules_are_their_formulas():
    beta = [1e-4 + (.02 - 1e-4) * i / 999 for i in range(1000)]
    assert_close(diffusion.linear(1000)[499].item(), math.prod(1 - b for b in beta[:500]))
    f = [math.cos((i / 1000 + .008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    assert_close(diffusion.cosine(1000)[499].item(), f[500] / f[0])


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_zero_terminal_snr_ends_in_noise_and_keeps_the_start(name):
    plain, zero = (Schedule(name, zero_snr=z).abar for z in (False, True))
    assert zero[999] == 0 and plain[999] > 0 and (zero[1:1000] <= zero[:999]).all()
    assert_close(zero[0], plain[0])
    snr, last = zero / (1 - zero), Schedule(name).last_invertible()
    assert snr[last] >= 1e-3 > snr[last + 1]
    with pytest.raises(ValueError, match="velocity"):  # z_0 = (z - eps) / 0
        Schedule(name, "noise")


@pytest.mark.parametrize("target", diffusion.TARGETS)
def test_split_inverts_the_target(target):
    torch.manual_seed(0)
    schedule = Schedule("linear", target, zero_snr=False)
    z0, eps = torch.randn(2, 256, 4, 8, 8)
    t = torch.randint(900, (256,))
    z = schedule.add_noise(z0, eps, t)
    back = schedule.split(z, schedule.target_of(z0, eps, t), t)
    assert_close(back, (z0, eps), atol=5e-3, rtol=5e-3)


def test_velocity_is_the_derivative_by_angle():
    # z = cos(phi) z0 + sin(phi) eps, so dz / dphi = cos(phi) eps - sin(phi) z0 (Salimans & Ho)
    schedule = Schedule()
    z0, eps = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64)
    phi = torch.acos(schedule.abar[400].sqrt()).item()
    before, after = (math.cos(p) * z0 + math.sin(p) * eps for p in (phi - 1e-4, phi + 1e-4))
    assert_close(schedule.target_of(z0, eps, 400), (after - before) / 2e-4, atol=1e-6, rtol=0)


@pytest.mark.parametrize("target, formula", [
    ("noise", lambda snr: min(snr, 5.) / snr), ("image", lambda snr: min(snr, 5.)),
    ("velocity", lambda snr: min(snr, 5.) / (snr + 1))])
def test_min_snr_weights(target, formula):
    schedule = Schedule("linear", target, zero_snr=False)
    t = torch.tensor([50, 300, 600])
    snr = schedule.abar[t] / (1 - schedule.abar[t])
    assert_close(schedule.min_snr_weight(t).tolist(), list(map(formula, snr.tolist())))
    assert Schedule().min_snr_weight(torch.tensor([999])).item() > 0  # SNR 0 is trained as well


def test_the_last_training_step_is_the_first_sampling_step():
    for n in (1, 7, 30, 1000):
        times = Schedule().timesteps(n)
        assert times[0] == 999 and times[-1] == -1 and len(set(times)) == n + 1


@pytest.mark.parametrize("t, t_next", [(999, 899), (500, 499), (300, 40), (19, -1)])
def test_ddim_and_the_first_step_of_dpm_with_eta_one_are_ddpm(t, t_next):
    schedule, (z, v, noise) = Schedule(), torch.randn(3, 2, 4, 4)
    z0, _ = schedule.split(z, v, t)
    ddpm = ddpm_step(schedule, z, v, t, t_next, noise)
    for step in (ddim_step(schedule, z, v, t, t_next, 1., noise),
                 dpm_step(schedule, z, z0, t, t_next, None, 1., noise)):
        assert_close(step, ddpm, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler, eta, target", [
    ("ddim", 0., "velocity"), ("ddim", 1., "noise"), ("ddpm", 0., "velocity"),
    ("ddpm", 0., "image"), ("dpm", 0., "velocity"), ("dpm", 0., "noise"),
    ("sde", 0., "velocity")])
def test_samplers_recover_a_gaussian(sampler, eta, target):
    schedule = Schedule("linear", target, zero_snr=target == "velocity")
    z = sample(exact(schedule), schedule, range(1200), (1,), steps=100, eta=eta, sampler=sampler)
    assert_close((z.mean().item(), z.std().item()), (2., .5), atol=.05, rtol=0)


def test_dpm_is_of_second_order_and_ddim_of_first():
    schedule, x = Schedule(), torch.linspace(-2, 2, 9, dtype=torch.float64)

    def path(t):
        """Where the probability flow of N(2, 0.5^2) has carried the standard deviates x at t."""
        a, s = schedule.signal_noise(t, x)
        return 2 * a + ((a / 2) ** 2 + s ** 2).sqrt() * x

    def error(sampler, n, top=899, bottom=99):
        z, before = path(top), None
        for t, t_next in pairwise(round(top + (bottom - top) * i / n) for i in range(n + 1)):
            prediction = exact(schedule)(z, t)
            z0, _ = schedule.split(z, prediction, t)
            if sampler == "ddim":
                z = ddim_step(schedule, z, prediction, t, t_next, 0., 0.)
            else:
                z, before = dpm_step(schedule, z, z0, t, t_next, before, 0., 0.), (t, z0)
        return (z - path(bottom)).abs().max().item()
    for sampler, order in (("ddim", 1.), ("dpm", 2.)):
        assert abs(math.log2(error(sampler, 40) / error(sampler, 160)) / 2 - order) < .05


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_depends_on_its_seed_and_not_on_its_batch(sampler):
    schedule = Schedule()
    together, alone = (sample(exact(schedule), schedule, seeds, (2, 4, 4), 9, sampler=sampler)
                       for seeds in ([3, 40, 8, 21, 5, 2, 11, 17], [17]))
    assert_close(alone[0], together[7])
    assert (together[6] - together[7]).abs().max() > .1


@pytest.mark.parametrize("name, target", [("cosine", "velocity"), ("linear", "noise")])
def test_inversion_is_undone_by_sampling_and_gives_standard_noise(name, target):
    schedule, x = Schedule(name, target, zero_snr=target != "noise"), torch.randn(100, 1)
    z, top, errors = .5 * (x - x.mean()) / x.std() + 2, schedule.last_invertible(), []
    for rounds in (1, 6):
        noise = invert(exact(schedule), schedule, z, 25, top, rounds)
        back = sample(exact(schedule), schedule, range(100), (1,), 25, start=noise, top=top)
        errors.append((back - z).abs().max().item())
    assert errors[1] < 1e-2 and errors[1] < errors[0]
    noise = invert(exact(schedule), schedule, z, 100, top)
    assert_close((noise.mean().item(), noise.std().item()),
                 (2 * schedule.abar[top].item() ** .5, 1.), atol=.05, rtol=0)


# --- guidance: every branch predicts its own random number, so sums can be compared --------------

V = {b: torch.randn(()) for b in product((True, False), repeat=2)}  # (experiment, biology)
FULL, E, B, NONE = V.values()


@pytest.mark.parametrize("e, b", [(1.5, 2.), (0., 3.), (2., 2.), (1., 1.), (0., 0.)])
def test_guidance_is_its_formula(e, b):
    for form, wanted in (("nested", NONE + e * (E - NONE) + b * (FULL - E)),
                         ("independent", NONE + e * (E - NONE) + b * (B - NONE))):
        composed = compose(form, {"experiment": e, "biology": b})
        assert_close(combine([V[branch] for branch in composed], composed.values()), wanted)


def test_every_latent_channel_is_guided_in_float32_under_autocast_too():
    p, coefficients = torch.randn(3, 2, 8, 4, 4).bfloat16(), [-.31, 1.7, -.39]
    with torch.autocast("cpu", torch.bfloat16):
        out = combine(p, coefficients).double()
    assert_close(out, sum(c * v.double() for c, v in zip(coefficients, p)), atol=1e-6, rtol=1e-6)


def test_the_demo_shows_what_steps_and_guidance_do(capsys):
    show_samplers()
    spread = {(name, int(n)): float(s) for name, n, s in re.findall(
        r"(\w+), +(\d+) steps: mean .* spread ([\d.]+)", capsys.readouterr().out)}
    for name in SAMPLERS:
        assert abs(spread[name, 200] - .5) < .02 and spread[name, 5] < spread[name, 200] - .01
    show_guidance()
    experiment = dict(re.findall(r"(\w+) +scales 1.0: .* experiment (\S+),",
                                 capsys.readouterr().out))
    assert float(experiment["nested"]) < -.95 < -.8 < float(experiment["independent"]) < -.4
