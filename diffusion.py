"""Diffusion: noise schedules, training targets, samplers and composed guidance. Nothing here knows
a network, a data set or a molecule; `denoise(z, t)` is any function that predicts the target.

Ho et al. 2020 (arXiv:2006.11239) DDPM; Song et al. 2021 (arXiv:2010.02502) DDIM; Salimans & Ho
2022 (arXiv:2202.00512) velocity; Lin et al. 2023 (arXiv:2305.08891) zero terminal SNR; Lu et al.
2022 (arXiv:2211.01095) DPM-Solver++.

    python diffusion.py      # samplers and guidance on exact toys; draws runs/guidance.png
"""
import argparse
import math
from itertools import pairwise, product

import torch

TARGETS = ("velocity", "noise", "image")
FORMS = ("nested", "independent")
SAMPLERS = ("sde", "dpm", "ddim", "ddpm")


# --- schedules: abar_t, the share of signal variance left at step t, t = 0 .. T-1 -----------------

def linear(steps):
    """Ho et al. 2020, section 4: betas from 1e-4 to 0.02."""
    return torch.cumprod(1 - torch.linspace(1e-4, .02, steps, dtype=torch.float64), 0)


def scaled_linear(steps):
    """The schedule of most latent diffusion models (Rombach et al. 2022): linear in sqrt(beta)."""
    betas = torch.linspace(.00085 ** .5, .012 ** .5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def cosine(steps):
    """Eq. 17 of Nichol & Dhariwal 2021 (arXiv:2102.09672), betas at most 0.999."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((u + .008) / 1.008 * math.pi / 2) ** 2
    return torch.cumprod((f[1:] / f[:-1]).clamp(min=.001), 0)


SCHEDULES = {"cosine": cosine, "linear": linear, "scaled_linear": scaled_linear}


def zero_terminal_snr(abar):
    """Algorithm 1 of Lin et al. 2023: shift and scale sqrt(abar) so that the last step is noise."""
    root = abar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


class Schedule:
    """The forward process z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps, and what is predicted.

    Every t is a LongTensor (B,) or an int in 0 .. T-1; t = -1 means clean. Latents (B, Z, h, w).
    """

    def __init__(self, name="cosine", target="velocity", steps=1000, zero_snr=True):
        abar = zero_terminal_snr(SCHEDULES[name](steps)) if zero_snr else SCHEDULES[name](steps)
        if target == "noise" and abar[-1] < 1e-6:
            raise ValueError(
                f"the noise target refuses schedules that end in noise ({name}, zero terminal SNR: "
                f"{zero_snr}): at t = T z_0 = (z - eps) / 0. Use the target velocity or image, or "
                "linear or scaled_linear without zero terminal SNR")
        self.target, self.T = target, steps
        self.abar = torch.cat([abar, torch.ones(1, dtype=torch.float64)])  # abar[-1] = 1: clean
        self.roots = torch.stack([self.abar.sqrt(), (1 - self.abar).sqrt()])  # (2, T + 1)
        # lambda_t = log(sqrt(abar_t) / sqrt(1 - abar_t)): -inf at zero terminal SNR
        self.half_log_snr = (torch.log(self.abar) - torch.log(1 - self.abar)) / 2

    def signal_noise(self, t, z):
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped and typed to multiply z."""
        self.roots = self.roots.to(z.device)  # copied once, so that a t on a GPU stays there
        return self.roots[:, t].to(z.dtype).reshape(2, -1, *[1] * (z.ndim - 1)).unbind()

    def add_noise(self, z0, eps, t):
        """Eq. 4 of Ho et al."""
        a, s = self.signal_noise(t, z0)
        return a * z0 + s * eps

    def target_of(self, z0, eps, t):
        """What the network should say. Velocity: v = a eps - s z_0 (Salimans & Ho, section 4)."""
        a, s = self.signal_noise(t, z0)
        return {"velocity": a * eps - s * z0, "noise": eps, "image": z0}[self.target]

    def split(self, z, prediction, t):
        """The (z_0, eps) that a prediction at z_t stands for: the inverse of target_of."""
        a, s = self.signal_noise(t, z)
        if self.target == "velocity":  # rotate back by the same angle
            return a * z - s * prediction, s * z + a * prediction
        if self.target == "noise":
            return (z - s * prediction) / a, prediction
        return prediction, (z - a * prediction) / s

    def min_snr_weight(self, t, gamma=5.):
        """Hang et al. 2023 (arXiv:2303.09556) for each target, t and weights (B,); finite at zero
        SNR."""
        a, s = self.roots.to(t.device)[:, t]                             # (B,) each
        snr = (a / s) ** 2
        capped = snr.clamp(max=gamma)
        weight = {"velocity": capped / (snr + 1), "noise": capped / snr.clamp(min=1e-8),
                  "image": capped}[self.target]
        # a floor, else the velocity would never be trained at t = T, where sampling starts
        return weight.clamp(min=1e-2).float()

    def timesteps(self, n, top=None):
        """n steps, descending, from `top`, then -1. From T-1 unless told otherwise: the last
        training step is the first sampling step ("trailing", Lin et al. 2023, section 3.3)."""
        top = self.T - 1 if top is None else top
        if not 1 <= n <= top + 1:
            raise ValueError(f"{n} sampling steps: between 1 and {top + 1} are possible")
        return [round((top + 1) * i / n) - 1 for i in range(n, -1, -1)]

    def last_invertible(self, snr=1e-3):
        """The last t at which something of the image is left: where `invert` stops."""
        abar = self.abar[:self.T]
        return int((abar / (1 - abar) >= snr).sum()) - 1


def diffusion_loss(schedule, denoise, z0, eps, t, min_snr=False):
    """Squared error of the target, (B,). With min_snr=False it is 1.00 for a network that says 0,
    since target and latents are standardised."""
    prediction = denoise(schedule.add_noise(z0, eps, t), t)
    loss = (prediction - schedule.target_of(z0, eps, t)).square().flatten(1).mean(1)
    return loss * schedule.min_snr_weight(t).to(loss) if min_snr else loss


# --- samplers -------------------------------------------------------------------------------------

def ddpm_step(schedule, z, prediction, t, t_next, noise):
    """One step back with the true posterior of the forward process: Eqs. 6-7 of Ho et al."""
    z0, _ = schedule.split(z, prediction, t)
    abar, abar_next = schedule.abar[t].item(), schedule.abar[t_next].item()
    alpha = abar / abar_next
    mean = (abar_next ** .5 * (1 - alpha) * z0 + alpha ** .5 * (1 - abar_next) * z) / (1 - abar)
    return mean + ((1 - abar_next) / (1 - abar) * (1 - alpha)) ** .5 * noise


def ddim_step(schedule, z, prediction, t, t_next, eta, noise):
    """Eqs. 12 and 16 of Song et al. 2021: eta = 0 is DDIM, eta = 1 is DDPM again."""
    z0, eps = schedule.split(z, prediction, t)
    abar, abar_next = schedule.abar[t].item(), schedule.abar[t_next].item()
    sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** .5
    return abar_next ** .5 * z0 + max(0., 1 - abar_next - sigma ** 2) ** .5 * eps + sigma * noise


def dpm_step(schedule, z, z0, t, t_next, before, eta, noise):
    """DPM-Solver++ 2M, Algorithm 2 of Lu et al. 2022: DDIM with z_0 carried on by half a step along
    the line through its last two predictions, over lambda = log(signal / noise). z0: predicted at
    t. before: (t, z_0) of the step before, None in the first. eta: how much of the noise is new, 0
    none; at 1 this is their SDE-DPM-Solver++ 2M."""
    a, s = schedule.signal_noise(t, z)
    a_next, s_next = schedule.signal_noise(t_next, z)
    if before is not None and t_next >= 0:  # clean is at lambda = inf: DDIM's step goes there
        earlier, now, later = schedule.half_log_snr[[before[0], t, t_next]].tolist()
        z0 = z0 + (later - now) / (2 * (now - earlier)) * (z0 - before[1])  # + 0 if SNR was 0
    old = (a / s * s_next / a_next) ** eta
    return (a_next * z0 + old * s_next / s * (z - a * z0)
            + s_next * (1 - old ** 2).clamp(min=0).sqrt() * noise)


def generators(seeds):
    """One generator per image, so that image 17 is the same whatever the batch."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def gaussian(rngs, shape, device="cpu"):
    """One draw from each generator: (len(rngs), *shape)."""
    return torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(device)


@torch.no_grad()
def sample(denoise, schedule, seeds, shape, steps=50, eta=0., sampler="ddim", device="cpu",
           each_step=lambda: None, start=None, top=None):
    """Noise to latents (len(seeds), *shape), one seed per image; `sampler` is one of SAMPLERS: sde
    is dpm with eta 1. start: latents at noise level `top` to go on from, as an inverted image."""
    rngs, before, eta = generators(seeds), None, 1. if sampler in ("sde", "ddpm") else eta
    z = gaussian(rngs, shape, device) if start is None else start
    for t, t_next in pairwise(schedule.timesteps(steps, top)):
        prediction = denoise(z, torch.full((len(z),), t, device=device))
        noisy = eta > 0 and t_next >= 0
        noise = gaussian(rngs, shape, device) if noisy else torch.zeros_like(z)
        if sampler == "ddpm":
            z = ddpm_step(schedule, z, prediction, t, t_next, noise)
        elif sampler == "ddim":
            z = ddim_step(schedule, z, prediction, t, t_next, eta, noise)
        else:
            z0, _ = schedule.split(z, prediction, t)
            z, before = dpm_step(schedule, z, z0, t, t_next, before, eta, noise), (t, z0)
        each_step()
    return z


@torch.no_grad()
def invert(denoise, schedule, z, steps, top, rounds=3, each_step=lambda: None):
    """Clean latents z (B, Z, h, w) to the latents at noise level `top` that `sample` (DDIM, eta 0,
    the same steps, start and top) turns into z again.

    DDIM's step down from t to `below` reads z_below = a_below z_0 + s_below eps(z_t). Solved for
    z_t it still holds z_t on the right, inside eps: a fixed point, found in a few rounds."""
    for below, t in pairwise(reversed(schedule.timesteps(steps, top))):
        a, s = schedule.signal_noise(t, z)
        a_below, s_below = schedule.signal_noise(below, z)
        z_below = z
        for _ in range(rounds):
            _, eps = schedule.split(z, denoise(z, torch.full((len(z),), t, device=z.device)), t)
            z = a / a_below * (z_below - s_below * eps) + s * eps
        each_step()
    return z


# --- guidance composed over groups of conditions --------------------------------------------------

def compose(form, scales):
    """Guidance as a weighted sum of predictions in which some groups of conditions are given.

    form: one of FORMS. scales: {group: guidance scale}; `nested` takes the groups in this order,
    each given those before it. Returns {branch: coefficient}. A branch says for each group, in the
    order of `scales`, whether it is given (True) or unknown (False). Coefficients sum to one;
    branches of coefficient 0 are left out. At scales 1 `nested` is the conditional model alone,
    while `independent` adds up what each group does by itself.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form of guidance {form}: one of {', '.join(FORMS)}")
    n = len(scales)
    unconditional = (False,) * n
    branches = {unconditional: 1.}
    for i, scale in enumerate(scales.values()):
        if form == "nested":  # v() + w_1 (v(1) - v()) + w_2 (v(1,2) - v(1)): Brooks 2023, Eq. 3
            given, without = ((True,) * k + (False,) * (n - k) for k in (i + 1, i))
        else:                 # v() + sum w_i (v(i) - v()): Liu et al. 2022, Eq. 11
            given, without = tuple(k == i for k in range(n)), unconditional
        branches[given] = branches.get(given, 0.) + scale
        branches[without] -= scale
    return {branch: c for branch, c in branches.items() if abs(c) > 1e-12}


def combine(predictions, coefficients):
    """sum_k c_k v_k in float32 over branches: predictions (K, B, Z, h, w), all latent channels
    alike. Not a matrix product, which autocast would round to bfloat16."""
    return sum(c * v.float() for c, v in zip(coefficients, predictions, strict=True))


# --- two toys with exact denoisers, so that samplers and guidance can be seen without a network --

def mixture_denoiser(schedule, means, shares, spread):
    """denoise(z, t) of a mixture of Gaussians N(mean_k, spread^2): means (K, D), shares (K,).
    z_0 is the mean of the components' own posteriors, each with its posterior probability."""
    def denoise(z, t):                                                   # (B, D)
        a, s = schedule.signal_noise(t, z)
        gap = z[:, None] - a[..., None] * means                          # (B, K, D)
        variance = (a * spread) ** 2 + s ** 2                            # (B, 1)
        likely = (shares.log() - gap.square().sum(2) / (2 * variance)).softmax(1)
        z0 = (likely[..., None] * (means + (a * spread ** 2 / variance)[..., None] * gap)).sum(1)
        return schedule.target_of(z0, (z - a * z0) / s.clamp(min=1e-9), t)
    return denoise


def show_samplers():
    """Samples of N(2, 0.5^2): the mean is right at once, the spread needs steps."""
    schedule = Schedule("linear", zero_snr=False)
    exact = mixture_denoiser(schedule, torch.tensor([[2.]]), torch.ones(1), .5)
    for sampler, n in product(SAMPLERS, (5, 10, 50, 200)):
        z = sample(exact, schedule, range(2000), (1,), steps=n, sampler=sampler)
        print(f"{sampler}, {n:3d} steps: mean {z.mean():.3f} (true 2), spread {z.std():.3f} (0.5)")


def show_guidance():
    """A confounded screen of two numbers: biology moves the first, the experiment the second, to
    +1 or -1, and nine of ten wells lie "at home", where both are alike. Asked for the rare
    combination: v(biology) alone points home, so independent guidance brings the batch along."""
    schedule, spread, wanted = Schedule(), .3, torch.tensor([1., -1.])
    means = torch.tensor([[1., 1.], [-1., -1.], [1., -1.], [-1., 1.]])
    shares = torch.tensor([.45, .45, .05, .05])
    print("\nasked for biology +1, experiment -1, which one well in twenty has:")
    wells = means.repeat_interleave((1000 * shares).round().long(), 0)
    noise = torch.randn(wells.shape, generator=torch.Generator().manual_seed(0))
    clouds = {"the wells": wells + spread * noise}
    for form, scale in product(FORMS, (1., 2.5)):
        composed = compose(form, {"experiment": scale, "biology": scale})
        branches = []
        for experiment, biology in composed:
            given = torch.tensor([biology, experiment])
            fits = ((means == wanted) | ~given).all(1)
            branches.append(mixture_denoiser(schedule, means[fits], shares[fits], spread))

        def denoise(z, t):
            return combine([branch(z, t) for branch in branches], composed.values())
        z = clouds[f"{form}, scales {scale}"] = sample(denoise, schedule, range(1000), (2,), 50)
        print(f"  {form:12s} scales {scale}: biology {z[:, 0].mean():+.2f}, experiment "
              f"{z[:, 1].mean():+.2f}, spread {z.std(0).mean():.2f} (of the wells: {spread})")
    print("At scales of 1 independent guidance is half way home. Scales above 1 exaggerate what\n"
          "is there and take spread away: sample.py guides between two noise levels only.")
    import data  # only to draw: the method needs no data set
    shape = dict(figsize=(12, 2.7), sharex=True, sharey=True)
    with data.figure("runs/guidance.png", 1, 5, **shape) as axes:
        for axis, (title, z) in zip(axes, clouds.items()):
            axis.plot(*z.T, ".", ms=2, alpha=.5)
            axis.plot(*wanted, "r+", ms=12)
            axis.set_title(title, fontsize=8), axis.set_xlabel("biology")
        axes[0].set_ylabel("experiment")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    show_samplers()
    show_guidance()
