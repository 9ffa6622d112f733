"""How fast, how large and how both grow, on the CPU or GPU at hand: one table, runs/benchmark.json.

    OMP_NUM_THREADS=1 python tests/benchmark.py [--only unet vae readers growth diffusers]

Not a test. Weights are random: they cost what trained ones cost. Times are medians; what is
compared runs in turn (A B A B ...), and on one thread the processor's time counts, as machines are
shared.
`use`: the share of the matrix-product rate, measured first in the same run, that a network's
products and convolutions reach: flops_utilisation in the log of a training. `peak MB`: memory on
top of weights, gradients and optimiser. `ratio`: our time over that of diffusers' network (where it
is installed) with as many parameters within 5 %: on tensors folded as ours folds them, and as it
comes.
"""
import argparse
import ctypes
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tifffile
import torch
from PIL import Image
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

try:
    import diffusers  # not one of the requirements: compared with where it happens to be there
except ImportError:
    diffusers = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import diffusion  # noqa: E402
import sample  # noqa: E402
import train_ldm  # noqa: E402
import train_vae  # noqa: E402
from conditioning import Field, Fingerprint  # noqa: E402
from train_vae import autocast, device, matrix_rate, precision  # noqa: E402
from unet import UNet, unet_config  # noqa: E402
from vae import VAE, VAEConfig, vae_loss  # noqa: E402

GPU = torch.cuda.is_available()
# what a training step sees: latents on the CPU of the quick start, those of 512 pixels on a GPU
SIZES, LATENT = (("large", "base"), (8, 64, 64)) if GPU else (("tiny", "small"), (4, 16, 16))
AUTOENCODER = VAEConfig(width=32, latent_channels=LATENT[0])  # else as train_vae.py has it
LATENTS, IMAGES = 32, 256 if GPU else 8  # in a training step
REQUEST = {"smiles": ["CCO"] * 8, "dose": ["3"] * 8, "batch": ["B1"] * 8}
COLUMNS = ("ms", "per second", "GFLOP", "use", "peak MB", "ratio")
clock = time.perf_counter if GPU or torch.get_num_threads() > 1 else time.process_time


# --- measuring ------------------------------------------------------------------------------------

def timed(f):
    start = clock()
    f()
    if GPU:
        torch.cuda.synchronize()
    return clock() - start


def peak(f):
    """The most memory that f takes on top of what is there before it, in bytes: by the GPU's
    allocator, or on Linux by the high-water mark of the process, which may be set back."""
    gc.collect()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)     # what was freed goes back first
    Path("/proc/self/clear_refs").write_text("5")

    def status(name):
        return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024
    before = status("VmRSS")
    f()
    return status("VmHWM") - before


def measure(*entries, seconds=2., least=3):
    """Lines of the table for (what, f, items that f deals with), run in turn for `seconds` each and
    at least so many times. The others are given the ratio of the first to them."""
    lines, times = [], [[] for _ in entries]
    for what, f, _ in entries:
        flops = train_vae.count_flops(f)
        lines.append({"what": what, "peak MB": peak(f) / 1e6} | (
            {"GFLOP": flops / 1e9} if flops else {}))
    start = time.time()
    while len(times[0]) < least or time.time() - start < seconds * len(entries):
        for found, (_, f, _) in zip(times, entries):
            found.append(timed(f))
    for line, found, (_, _, items) in zip(lines, times, entries):
        median = statistics.median(found)
        line |= {"ms": 1e3 * median, "per second": items / median}
        if "GFLOP" in line:
            line["use"] = line["GFLOP"] * 1e9 / median / matrix_rate(precision())
        if line is not lines[0]:
            line["ratio"] = lines[0]["ms"] / line["ms"]
        values = ["" if name not in line else f"{line[name]:.3f}" if name in ("use", "ratio") else
                  f"{line[name]:.4g}" for name in COLUMNS]
        print(f"{line['what']:64s}" + "".join(f"{value:>12s}" for value in values), flush=True)
    return lines


# --- networks and what they do --------------------------------------------------------------------

def unet_inputs(config, batch, latent=LATENT):
    """z, t, vector, tokens, mask: a batch as the conditioner would give it, five tokens each."""
    given = (torch.randn(batch, *latent), torch.randint(1000, (batch,)),
             torch.randn(batch, config.embedding), torch.randn(batch, 5, config.token),
             torch.ones(batch, 5, dtype=torch.bool))
    return [x.to(device()) for x in given]


def images(n, side=64):
    return torch.rand(n, 5, side, side, device=device())


def training_step(network, loss):
    """What train_vae.py and train_ldm.py do in a step, on a fixed batch."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(.9, .99), fused=True)

    def step():
        with autocast():
            value = loss()
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.)
        optimiser.step()
    return step


def unet_step(unet, call, given):
    return training_step(unet, lambda: (call(*given) - given[0]).square().mean())


def autoencoder_step(vae, call, x):
    noise = torch.randn(len(x), LATENT[0], 16, 16, device=device())
    return training_step(vae, lambda: vae_loss(x, *call(x, noise), kl_weight=1e-2)[0])


def without_gradient(f):
    def run():
        with torch.no_grad(), autocast():
            f()
    return run


def count(network):
    return sum(p.numel() for p in network.parameters())


def new_unet(size):
    return UNet(unet_config(size, LATENT[0])).to(device())


def random_model(size):
    """All of a checkpoint, untrained: two groups, molecule and dose, batch."""
    fields = [Field("smiles", "molecule", "biology"), Field("dose", "log", "biology", .1, 10.),
              Field("batch", "category", "experiment", vocabulary=["B1", "B2"])]
    config, settings = unet_config(size, LATENT[0]), Fingerprint.fit([], {})
    denoiser = sample.Denoiser(config, fields, "fingerprint", settings)
    return sample.Model({
        "fields": [asdict(f) for f in fields], "unet": asdict(config), "pixel_um": None,
        "molecule_encoder": "fingerprint", "molecule_settings": settings, "latent_shape": LATENT,
        "schedule": {}, "ema": denoiser.state_dict(),
        "vae": {"config": asdict(AUTOENCODER), "weights": VAE(AUTOENCODER).state_dict(),
                "intensity": {}, "settings": {"channels": ",".join(data.CHANNELS)}}})


# --- the parts ------------------------------------------------------------------------------------

def unets(folder):
    """Training step of each size, and sampling with the default settings."""
    lines = []
    for size in SIZES:
        unet, model = new_unet(size), random_model(size)
        lines += measure((f"U-Net {size} ({count(unet):,}): training step, {LATENTS} latents",
                          unet_step(unet, unet, unet_inputs(unet.config, LATENTS)), LATENTS))
        lines += measure((f"U-Net {size}: 8 images in 10 steps, decoded", lambda: model.generate(
            REQUEST, range(8), steps=10, progress=False), 8))
    return lines


def autoencoder(folder):
    """Training step, encoding and decoding of the default autoencoder."""
    vae, x = VAE(AUTOENCODER).to(device()), images(IMAGES)
    z = vae.to_latent(x).detach()
    lines = measure((f"autoencoder ({count(vae):,}): training step, {IMAGES} images",
                     autoencoder_step(vae, vae, x), IMAGES))
    for what, f in (("encode", lambda: vae.to_latent(x)), ("decode", lambda: vae.to_image(z))):
        lines += measure((f"autoencoder: {what}, {IMAGES} images", without_gradient(f), IMAGES))
    return lines


def write_set(folder, ending, count=16, side=256):
    """Images of five channels of uint16 in files of one kind; only PNG has a file per channel."""
    folder.mkdir()
    scene = np.random.default_rng(0).integers(0, 4000, (5, side, side)).cumsum(2) // side
    stack = np.stack([np.roll(scene, i, 2) for i in range(count)]).astype(np.uint16)
    np.save(folder / "all.npy", stack)
    rows = [{"image": "all.npy", "index": i} for i in range(count)]
    save = {".png": lambda path, x: Image.fromarray(x).save(path), ".npz": np.savez_compressed,
            ".tif": partial(tifffile.imwrite, compression="zlib")}.get(ending)
    for i, image in enumerate(stack if save else []):
        parts = dict(zip(data.CHANNELS, image)) if ending == ".png" else {"image": image}
        rows[i] = {column: f"{i}-{column}{ending}" for column in parts}
        for column, planes in parts.items():
            save(folder / rows[i][column], planes)
    data.write_manifest(folder / "manifest.csv", rows)
    return data.Pixels(data.read_manifest(folder / "manifest.csv"))


def readers(folder):
    """Images of 5x256x256 pixels from the formats that data.py reads; the last into a cache."""
    lines = []
    for name, ending in (("PNG, a file per channel", ".png"), ("TIFF, zlib", ".tif"),
                         ("npz, compressed", ".npz"), ("npy stack", ".npy")):
        pixels = write_set(folder / ending[1:], ending)
        lines += measure((f"reading {name}", lambda: [pixels.read(i).sum() for i in range(16)], 16))
    vae, settings = VAE(AUTOENCODER).to(device()), SimpleNamespace(crop=64, flips=True, binning=1)
    scale, number = {"low": [0.] * 5, "high": [4000.] * 5}, itertools.count()
    return lines + measure(("latent cache: from stack to file, crops of 64x64", lambda: (
        train_ldm.cache_latents(vae, pixels, range(16), settings, scale, 4, folder,
                                str(next(number)))), 64))


def growth(folder):
    """Cost by pixels, by images in a batch and by rows of a manifest."""
    lines, size = [], SIZES[-1]
    vae, unet = VAE(AUTOENCODER).to(device()), new_unet(size)
    for side in (64, 128, 256, 512):
        x, given = images(1, side), unet_inputs(unet.config, 1, (LATENT[0], side // 4, side // 4))
        for what, f in (("encode", lambda: vae.to_latent(x)),
                        ("decode", lambda: vae.to_image(given[0])),
                        (f"a pass of U-Net {size}", lambda: unet(*given))):
            lines += measure((f"{side}x{side} pixels: {what}", without_gradient(f), 1), seconds=.5)
    for n in (1, 8, 64):
        given = unet_inputs(unet.config, n, (LATENT[0], 16, 16))
        lines += measure((f"batch of {n}: a pass of U-Net {size}, latents of 16x16",
                          without_gradient(lambda: unet(*given)), n))
    np.save(folder / "stack.npy", np.zeros((100, 5, 8, 8), np.uint8))
    for rows in (10 ** 3, 10 ** 4, 10 ** 5, 10 ** 6):
        path = folder / f"{rows}.csv"
        with open(path, "w") as file:
            file.write("image,index,smiles,dose,batch,plate,well\n")
            file.writelines(f"stack.npy,{i % 100},{'C' * (i % 40 + 1)}O,{i % 7},B{i % 6},"
                            f"P{i % 384},A{i % 24}\n" for i in range(rows))
        lines += measure((f"manifest of {rows:,} rows: opened",
                          lambda: data.read_manifest(path), rows), seconds=0., least=1)
    return lines


# --- beside diffusers -----------------------------------------------------------------------------

# the widths that give its networks as many parameters, folding pixels as ours does and not at all
THEIRS = {("U-Net small", "folded"): (2, (112, 120)),
          ("U-Net small", "as it comes"): (1, (112, 120)),
          ("U-Net base", "folded"): (1, (112, 208, 320, 448)),
          ("autoencoder", "folded"): (2, (28, 44)),
          ("autoencoder", "as it comes"): (1, (16, 24, 44))}


def their_unet(c, widths):
    """diffusers' U-Net, called as ours is, for latents folded as the config says."""
    kind, channels = {True: "CrossAttn%sBlock2D", False: "%sBlock2D"}, c.latent_channels * c.fold**2
    net = diffusers.UNet2DConditionModel(
        in_channels=channels, out_channels=channels, block_out_channels=widths,
        layers_per_block=c.blocks, norm_num_groups=4,
        down_block_types=[kind[a] % "Down" for a in c.attention],
        up_block_types=[kind[a] % "Up" for a in reversed(c.attention)],
        attention_head_dim=[w // c.head for w in widths],  # (the number of heads)
        cross_attention_dim=c.token, time_embedding_dim=c.embedding, class_embed_type="identity",
        resnet_time_scale_shift="scale_shift")
    return net, lambda z, t, vector, tokens, mask: pixel_shuffle(net(
        pixel_unshuffle(z, c.fold), t, tokens, class_labels=vector, encoder_attention_mask=mask
    ).sample, c.fold).float()


def their_autoencoder(c, widths):
    """diffusers' AutoencoderKL, without attention as ours, for images folded as the config says."""
    n, channels = len(widths), c.channels * c.fold ** 2
    net = diffusers.AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=c.latent_channels,
        down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n,
        block_out_channels=widths, layers_per_block=c.blocks, norm_num_groups=4,
        mid_block_add_attention=False)

    def call(x, noise):
        posterior = net.encode(pixel_unshuffle(x, c.fold)).latent_dist
        out = net.decode(posterior.mean + posterior.std * noise).sample
        return pixel_shuffle(out, c.fold).float(), posterior.mean.float(), posterior.logvar.float()
    return net, call


def beside(what, ours, items, build, prepared):
    """A training step of ours beside those of theirs. prepared(network, call): the step. Returns
    the lines and {name: (network, call)}."""
    networks, wanted = {what: (ours, ours)}, count(ours)
    for (kind, how), (fold, widths) in THEIRS.items():
        if kind == what:
            net, call = build(replace(ours.config, fold=fold), widths)
            assert abs(count(net) / wanted - 1) < .05, f"{count(net):,} parameters, not {wanted:,}"
            networks[f"diffusers {how}"] = net.to(device()), call
    return measure(*((f"{name} ({count(net):,}): training step", prepared(net, call), items)
                     for name, (net, call) in networks.items()), seconds=8.), networks


def beside_diffusers(folder):
    """Training steps and sampling, ours and theirs in turn."""
    unet, vae, x = new_unet(SIZES[-1]), VAE(AUTOENCODER).to(device()), images(IMAGES)
    given = unet_inputs(unet.config, LATENTS)
    lines, networks = beside(f"U-Net {SIZES[-1]}", unet, LATENTS, their_unet,
                             lambda net, call: unet_step(net, call, given))
    lines += beside_sampling(random_model(SIZES[-1]), networks["diffusers folded"][1])
    return lines + beside("autoencoder", vae, IMAGES, their_autoencoder,
                          lambda net, call: autoencoder_step(net, call, x))[0]


def beside_sampling(model, call, n=8, steps=10):
    """Latents under two groups of guidance against three of their passes a step, in one batch."""
    _, _, *condition = unet_inputs(model.denoiser.unet.config, 3 * n)
    lines, uneven = [], dict(biology=2., experiment=1.5)  # equal weights need two branches only

    def three_passes(z, t):
        v = call(z.repeat(3, 1, 1, 1), t.repeat(3), *condition)
        return diffusion.combine(v.unflatten(0, (3, n)), [-.5, -.5, 2.])

    def drawn(denoise):
        return without_gradient(lambda: diffusion.sample(
            denoise, model.schedule, range(n), LATENT, steps, device=device()))
    for what, options in (("three branches", dict(guidance=uneven, interval=(0., 1.))),
                          ("three branches in the default interval", dict(guidance=uneven)),
                          ("default weights and interval", {})):
        denoise = model.guided(REQUEST, n, **options)
        lines += measure((f"{n} latents in {steps} steps, {what}", drawn(denoise), n),
                         ("diffusers folded: three passes a step", drawn(three_passes), n),
                         seconds=8.)
    return lines


PARTS = {"unet": unets, "vae": autoencoder, "readers": readers, "growth": growth} | (
    {"diffusers": beside_diffusers} if diffusers else {})


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    parser.add_argument("--out", default="runs/benchmark.json", help="default: %(default)s")
    args = parser.parse_args()
    machine = torch.cuda.get_device_name() if GPU else (
        f"{torch.cpu.get_capabilities()['cpu_name']}, {torch.get_num_threads()} threads")
    rate, lines = matrix_rate(precision()), []
    print(f"{machine}, {precision()}, torch {torch.__version__}, matrix products "
          f"{rate / 1e9:.4g} GFLOP/s; latents {LATENT}, images {tuple(images(1).shape[1:])}\n"
          f"{'(parameters)':64s}" + "".join(f"{name:>12s}" for name in COLUMNS))
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            lines += PARTS[part](Path(folder))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "precision": str(precision()),
                               "torch": torch.__version__, "flops_per_second": rate,
                               "lines": lines}, indent=1))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
