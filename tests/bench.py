"""Two questions about the UNet: will it fit the card, and how long does it take next to diffusers'?

    python tests/bench.py --fits       memory and operations of ZeroScope; needs no GPU and no weights
    python tests/bench.py --fits --size 384x384 --frames 16 --model FOLDER
    python tests/bench.py              speed: the embedded geometry, then ZeroScope's widths on a small clip
                                       (10 GB)
    python tests/bench.py --tiny       speed: the embedded geometry alone
    python tests/bench.py --full       speed: ZeroScope at 24 x 576 x 320, for a CUDA device

--fits runs whole steps on torch's meta device, which knows the shape of every tensor and holds no numbers,
and counts the tensors that are alive. It leaves out the text encoder and the autoencoder (1 GiB for
ZeroScope, which lie beside the UNet), what kernels need for themselves, and what torch's allocator keeps in
reserve. Fused attention computes its scores a second time in backward, and they count as operations twice.

The speed has two jobs: a forward pass, and a training step of the motion embeddings (forward, and backward to
the first layer that has some). diffusers has no motion embeddings; there a parameter is added to the same
norms by hooks, so that its gradients have the same way to go. Both sides take turns; a ratio below 1: mini_mi
is faster. On CUDA it also prints milliseconds, TFLOP/s and peak memory.
"""

import argparse
import statistics
import sys
import time
import warnings
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mini_mi  # noqa: E402

TINY = mini_mi.read_json(mini_mi.HERE / "data" / "tiny" / "unet" / "config.json")
CASES = {   # name -> UNet config, (frames, latent height, width)
    "tiny": (TINY, (16, 8, 8)),
    "ZeroScope widths, small clip": ({}, (8, 16, 16)),     # ZeroScope has the default in every field
    "ZeroScope": ({}, (24, 40, 72)),
}


# ---- Will it fit?

class LiveMemory(TorchDispatchMode):
    """While active: the `bytes` of all living tensors that some operation has read or made, and their `peak`.

    Tensors that are views of each other share a storage: it counts once, until the last of them is gone.
    """

    def __init__(self):
        super().__init__()
        self.storages = {}                                     # address -> weak reference
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return out

    def add(self, storage):
        """Counts a storage until it is freed."""
        address, size = storage._cdata, storage.nbytes()

        def forget(_):
            del self.storages[address]
            self.bytes -= size

        if address not in self.storages:
            self.storages[address] = weakref.ref(storage, forget)
            self.bytes += size


def fused_attention(q, k, v):
    """Stands for itself on the meta device, where torch would take the formula and its L x L matrix."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def count(job):
    """(peak bytes, floating-point operations) of job(), on the meta device."""
    usual, mini_mi.nnf.scaled_dot_product_attention = (mini_mi.nnf.scaled_dot_product_attention,
                                                       fused_attention)
    try:
        with LiveMemory() as memory:
            job()
            job()         # now with what the first call leaves, such as Adam's averages; all weights are seen
        with FlopCounterMode(display=False) as operations:
            job()
    finally:
        mini_mi.nnf.scaled_dot_product_attention = usual
    return memory.peak, operations.get_total_flops()


def needs(config, frames, height, width, dtype=torch.float16):
    """{job: (peak bytes, floating-point operations)} of one step of each job; height and width of latents."""
    with torch.device("meta"):
        unet = mini_mi.UNet3DConditionModel(config).to(dtype).eval().requires_grad_(False)
        motion = mini_mi.MotionEmbeddings(unet, frames, height, width)
        x = torch.zeros(1, unet.conv_in.in_channels, frames, height, width)
        text = torch.zeros(1, 77, config.get("cross_attention_dim", 1024))
    models = mini_mi.Models(None, None, None, unet, None)
    optimizer = torch.optim.AdamW(motion.parameters())

    def train(checkpointing):
        """As in `train_motion`."""
        prediction = mini_mi.predict(models, x, 500, text, motion.train(), checkpointing)
        error = mini_mi.motion_loss("mse", prediction, x, 0)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()

    @torch.no_grad()
    def sample(batch):
        """As in `sample`, where guidance makes a batch of two."""
        texts = text.expand(batch, -1, -1)
        mini_mi.predict(models, x.expand(batch, -1, -1, -1, -1), 500, texts, motion.eval())

    jobs = {"training with --checkpointing": lambda: train(True), "training": lambda: train(False),
            "sampling": lambda: sample(2), "sampling without guidance": lambda: sample(1)}
    return {name: count(job) for name, job in jobs.items()}


def fits(model, size, frames):
    """Prints one table: what a step of each job needs."""
    config, factor = {}, 8
    if model != "zeroscope":
        folder = mini_mi.model_folder(model, weights=False)
        config, vae = (mini_mi.read_json(folder / part / "config.json") for part in ("unet", "vae"))
        factor = 2 ** (len(vae.get("block_out_channels", (64,))) - 1)
    width, height = (int(side) // factor for side in size.split("x"))
    print(f"{model}, {frames} frames of {size}, float16: one step of\n\n"
          f"{'':31}GiB at the peak   TFLOP")
    for name, (peak, operations) in needs(config, frames, height, width).items():
        print(f"{name:31}{peak / 2**30:15.1f}{operations / 1e12:8.1f}", flush=True)


# ---- How fast is it?

def build(config, device, dtype):
    """The two UNets, sharing their (random) weights."""
    warnings.filterwarnings("ignore")
    from diffusers import UNet3DConditionModel  # here, since --fits needs no diffusers
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
    p.add_argument("--rounds", type=int, default=15, help="of the speed (15)")
    p.add_argument("--fits", action="store_true")
    p.add_argument("--model", default="zeroscope", help="for --fits: a folder (default: zeroscope)")
    p.add_argument("--size", default="576x320", help="for --fits: WIDTHxHEIGHT (576x320)")
    p.add_argument("--frames", type=int, default=24, help="for --fits (24)")
    args = p.parse_args()
    if args.fits:
        return fits(args.model, args.size, args.frames)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    names = ["tiny"] if args.tiny else ["ZeroScope"] if args.full else list(CASES)[:2]
    print(f"torch {torch.__version__}, {device}, {dtype}, {torch.get_num_threads()} threads")
    for name in names:
        bench(name, device, dtype, args.rounds)


if __name__ == "__main__":
    main()
