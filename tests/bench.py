"""How long the UNet takes next to diffusers', with the same weights, in one run.

    python tests/bench.py              the embedded geometry, then ZeroScope's widths on a small clip (10 GB)
    python tests/bench.py --tiny       the embedded geometry alone
    python tests/bench.py --full       ZeroScope at 24 x 576 x 320, for a CUDA device

Two jobs: a forward pass, and a training step of the motion embeddings (forward, and backward to the first
layer that has some). diffusers has no motion embeddings; there a parameter is added to the same norms by
hooks, so that its gradients have the same way to go. Both sides take turns; a ratio below 1: mini_mi
is faster. On CUDA it also prints milliseconds, TFLOP/s and peak memory.
"""

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mini_mi  # noqa: E402

warnings.filterwarnings("ignore")
from diffusers import UNet3DConditionModel  # noqa: E402

TINY = mini_mi.read_json(mini_mi.HERE / "data" / "tiny" / "unet" / "config.json")
CASES = {   # name -> UNet config, (frames, latent height, width)
    "tiny": (TINY, (16, 8, 8)),
    "ZeroScope widths, small clip": ({}, (8, 16, 16)),
    "ZeroScope": ({}, (24, 40, 72)),
}


def build(config, device, dtype):
    """The two UNets, sharing their (random) weights."""
    with torch.device("meta"):
        ours = mini_mi.UNet3DConditionModel(config)
        theirs = UNet3DConditionModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for key, value in ours.state_dict().items():
        scale = value[0].numel() ** -0.5 if value.dim() > 1 else 0.1
        random = torch.randn(value.shape, generator=generator, device=device) * scale
        weights[key] = (random + (value.dim() == 1 and key.endswith("weight"))).to(dtype)
    for model in (ours, theirs):
        model.load_state_dict(weights, assign=True)
        model.eval().requires_grad_(False)
    return ours, theirs


def add_by_hooks(unet, motion):
    """One parameter per temporal norm that has an embedding in `motion`, added to the norm's output."""
    parameters = []
    for name in motion.grids:
        block = unet.get_submodule(name)
        for norm in (block.norm1, block.norm2):
            m = torch.zeros_like(norm.weight).repeat(motion.frames, 1).requires_grad_(True)
            norm.register_forward_hook(lambda _, __, out, m=m: out + m.to(out.dtype))
            parameters.append(m)
    return parameters


def measure(jobs, device, rounds):
    """Seconds (median) and peak bytes of every job; they take turns, so a slow minute hits all."""
    seconds, peak = {name: [] for name in jobs}, {}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize()
                peak[name] = torch.cuda.max_memory_allocated()
            if turn:                                         # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}, peak


def bench(name, device, dtype, rounds):
    """Prints one line per job for one case."""
    config, (frames, height, width) = CASES[name]
    ours, theirs = build(config, device, dtype)
    text_width = config.get("cross_attention_dim", 1024)
    x = torch.randn(1, 4, frames, height, width, device=device, dtype=dtype)
    text = torch.randn(1, 77, text_width, device=device, dtype=dtype)
    motion = mini_mi.MotionEmbeddings(ours, frames, height, width).to(device).train()
    add_by_hooks(theirs, motion)

    def forward(unet):
        with torch.no_grad():
            unet(x, 500, text)

    def backward(out):
        out.float().square().mean().backward()

    jobs = {"forward, mini_mi": lambda: forward(ours),
            "forward, diffusers": lambda: forward(theirs),
            "training step, mini_mi": lambda: backward(ours(x, 500, text, motion)),
            "training step, diffusers": lambda: backward(theirs(x, 500, text).sample)}
    with FlopCounterMode(display=False) as counter:
        forward(ours)
    seconds, peak = measure(jobs, device, rounds)
    for job in ("forward", "training step"):
        a, b = (seconds[f"{job}, {side}"] for side in ("mini_mi", "diffusers"))
        line = f"{name}: {job} takes {a / b:.2f} of diffusers' time (median of {rounds})"
        if device.type == "cuda":
            rate = f", {counter.get_total_flops() / a / 1e12:.0f} TFLOP/s" if job == "forward" else ""
            memory = [peak[f"{job}, {side}"] / 2**30 for side in ("mini_mi", "diffusers")]
            line += (f"; {1e3 * a:.1f} ms against {1e3 * b:.1f} ms{rate}; peak {memory[0]:.1f} GiB against "
                     f"{memory[1]:.1f} GiB")
        print(line, flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--full", action="store_true")
    p.add_argument("--rounds", type=int, default=15)
    args = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    names = ["tiny"] if args.tiny else ["ZeroScope"] if args.full else list(CASES)[:2]
    print(f"torch {torch.__version__}, {device}, {dtype}, {torch.get_num_threads()} threads")
    for name in names:
        bench(name, device, dtype, args.rounds)


if __name__ == "__main__":
    main()
