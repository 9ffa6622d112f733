"""How fast the networks are on the CPU or GPU at hand, as a table.

    OMP_NUM_THREADS=1 python tests/benchmark.py
    python tests/benchmark.py gpu             # the sizes of the U-Net, plain, compiled, in graphs

Not a test. Weights are random, times are medians. Where diffusers is installed, its U-Net of as
many parameters (within 5 %) runs in turn with ours, and `ratio` is our time over its.
"""
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffusion import Schedule, combine, sample  # noqa: E402
from train_vae import autocast, device, for_training  # noqa: E402
from unet import UNet, unet_config  # noqa: E402
from vae import VAE, VAEConfig, vae_loss  # noqa: E402

GPU = torch.cuda.is_available()
SIZE, LATENT = ("base", (8, 64, 64)) if GPU else ("small", (4, 16, 16))
WIDTHS = {"small": (56, 112, 112), "base": (112, 208, 320, 448)}  # of diffusers' U-Net of that size


def measure(what, items, functions):
    """Print a line for each of {network: f} that deals with so many items, run in turn."""
    times, begin = {name: [] for name in functions}, time.time()
    while len(times["ours"]) < 5 or time.time() - begin < 5. * len(functions):
        for name, f in functions.items():
            start = time.perf_counter()
            f()
            if GPU:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    times = {name: statistics.median(values) for name, values in times.items()}
    for name, t in times.items():
        print(f"{what}, {name}: {1e3 * t:.1f} ms, {items / t:.4g} a second, ratio "
              f"{times['ours'] / t:.2f}")


def training_step(network, loss):
    """What the training scripts do in a step, on a fixed batch."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step():
        with autocast():
            value = loss()
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.)
        optimiser.step()
    return step


def unets(batch, size=SIZE, latent=LATENT):
    """{name: (U-Net, how it is called)} and a batch of inputs, five tokens each."""
    c, widths = unet_config(size, latent[0]), WIDTHS.get(size)
    ours = for_training(UNet(c).to(device()))
    networks = {"ours": (ours, ours)}
    if widths and find_spec("diffusers"):  # not one of the requirements
        import diffusers
        kinds = ["CrossAttn%sBlock2D" if a else "%sBlock2D" for a in c.attention]
        net = diffusers.UNet2DConditionModel(
            in_channels=latent[0], out_channels=latent[0], block_out_channels=widths,
            layers_per_block=c.blocks, norm_num_groups=4, cross_attention_dim=c.token,
            down_block_types=[kind % "Down" for kind in kinds], class_embed_type="identity",
            up_block_types=[kind % "Up" for kind in kinds[::-1]], time_embedding_dim=c.embedding,
            attention_head_dim=[w // c.head for w in widths],  # (the number of heads)
            resnet_time_scale_shift="scale_shift").to(device())
        networks["diffusers"] = net, lambda z, t, vector, tokens, mask: net(
            z, t, tokens, class_labels=vector, encoder_attention_mask=mask).sample.float()
    with device():
        return networks, (torch.randn(batch, *latent), torch.randint(1000, (batch,)),
                          torch.randn(batch, c.embedding), torch.randn(batch, 5, c.token),
                          torch.ones(batch, 5, dtype=torch.bool))


def training(n=32):
    networks, inputs = unets(n)
    return f"U-Net {SIZE}: training step, {n} latents", n, {
        name: training_step(net, lambda call=call: (call(*inputs) - inputs[0]).square().mean())
        for name, (net, call) in networks.items()}


def sampling(n=8, steps=10, k=3):
    networks, (_, _, *condition) = unets(k * n)

    def draw(call):
        def denoise(z, t):
            with autocast():
                v = call(z.repeat(k, 1, 1, 1), t.repeat(k), *condition)
            return combine(v.unflatten(0, (k, n)), [-.5, -.5, 2.])
        sample(denoise, Schedule(), range(n), LATENT, steps, device=device())
    return f"U-Net {SIZE}: {n} latents, {steps} steps, {k} branches", n, {
        name: lambda call=call: draw(call) for name, (_, call) in networks.items()}


def autoencoder(n=256 if GPU else 8):
    vae = for_training(VAE(VAEConfig(width=32, latent_channels=LATENT[0])).to(device()))
    x = torch.rand(n, 5, 64, 64, device=device())
    return f"autoencoder: training step, {n} images of 64x64", n, {
        "ours": training_step(vae, lambda: vae_loss(x, *vae(x), 1e-2)[0])}


def seconds(f, least=2.):
    """Median of one call of f, after five; on a GPU until its work is done."""
    times, begin = [], time.perf_counter()
    while len(times) < 10 or time.perf_counter() - begin < least:
        start = time.perf_counter()
        f()
        if GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[5:])


def sizes():
    """Training steps of each size of the U-Net: what part of the machine's matrix rate they use."""
    n = 8192 if GPU else 1024
    a = torch.randn(n, n, device=device(), dtype=torch.bfloat16)
    rates = [2 * n ** 3 / seconds(lambda: a @ a) for _ in range(2)]
    print("matrix rate, measured twice:", *(f"{rate / 1e12:.4g} TFLOP/s" for rate in rates))
    for size, latent in [("small", (4, 16, 16)), ("base", (8, 64, 64)), ("large", (8, 64, 64))]:
        networks, inputs = unets(32, size, latent)
        for name, (net, call) in networks.items():
            with FlopCounterMode(display=False) as counter:
                training_step(net, lambda: call(*inputs).square().mean())()
            for mode in (None, "default", "reduce-overhead") if GPU else (None,):
                torch.compiler.reset()
                run = torch.compile(call, mode=mode) if mode else call
                net.zero_grad()
                if GPU:
                    torch.cuda.reset_peak_memory_stats()
                t = seconds(training_step(net, lambda: run(*inputs).square().mean()))
                share = counter.get_total_flops() / t / max(rates)
                print(f"{size}, {name}, {mode or 'plain'}: {1e3 * t:.1f} ms, {32 / t:.4g} latents "
                      f"a second, {share:.1%} of the matrix rate, "
                      f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB", flush=True)
        if not GPU:  # the others are not for a CPU
            break


if __name__ == "__main__":
    print(f"{device()}, {torch.get_num_threads()} threads")
    if sys.argv[1:] == ["gpu"]:
        sizes()
    else:
        for part in (training, sampling, autoencoder):
            measure(*part())
