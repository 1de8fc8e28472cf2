"""Trains the two embedded text-to-video models, data/tiny and data/tiny16, on the tiny world of world.py.

    python data/make_tiny.py                    all stages of data/tiny, in turn; states in out/tiny
    python data/make_tiny.py --model tiny16     the same for data/tiny16, with tiny's text tower and judge
    python data/make_tiny.py --stage vae        one stage
    python data/make_tiny.py --check            measures both models, some minutes (check_tiny.py)

Every stage writes its state twice a minute and goes on from it after an interruption, to the same weights
as without one. A stage that starts without a state begins from the model folder's weights if there are any
(`--fresh`: from random ones), so later sittings, each with a `--work` folder of its own, improve on earlier
ones. A stage ends by writing its part of the model folder and drawing the curves anew. data/README.md tells
why each is as it is.

    vae      the autoencoder                    L1 + MSE + 1e-5 KL, latents linear in colour, on single frames
    clip     tiny CLIP, whose text tower is     contrastive: which caption belongs to which frame
             the video model's text encoder
    images   the UNet on single frames          v-prediction, min-SNR weights: appearance, cheaply
    clips8   the UNet on 8 frames               the same loss: motion
    clips    the UNet on 16 frames              the same loss
"""

import argparse
import copy
import itertools
import json
import math
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import eval_mi                                                                           # noqa: E402
import mini_mi                                                                           # noqa: E402
import world                                                                             # noqa: E402

TINY = HERE / "tiny"

# Two geometries: seed, widths of the autoencoder, levels of the UNet (kind, width) from the finest on. In the
# second, embeddings lie one level further in than the latents, as they do in public models.
GEOMETRIES = {
    "tiny":   (0, (16, 32, 64, 64), (("CrossAttnDownBlock3D", 64), ("DownBlock3D", 128))),
    "tiny16": (1, (16, 32, 64), (("DownBlock3D", 32), ("CrossAttnDownBlock3D", 64), ("DownBlock3D", 128))),
}
# What noise the UNets learn to take away: kind of betas, first and last of them; the shift that draws strong
# noise more often for clips. Sampling starts from plain noise, as if nothing of a clip were left (arXiv
# 2305.08891). Where it starts, Stable Diffusion's betas leave 8 to 10 %: 5 to 7 standard deviations in the
# 4,096 numbers of a clip of tiny, 11 to 13 in tiny16's 16,384, whose sprites then jumped (data/README.md).
# Those of DDPM (arXiv 2006.11239) leave 1 %, and less needs to be shifted.
NOISE = {
    "tiny":   ("scaled_linear", 0.00085, 0.012, 3),
    "tiny16": ("linear", 0.0001, 0.02, 1.5),
}
SHARED = ("tokenizer", "text_encoder", "clip")       # tiny's own; tiny16 has copies, so both are judged alike
# mini_mi.json: what each model is best used with.
USE = dict(world=True, frames=world.FRAMES, size=f"{world.SIZE}x{world.SIZE}", fps=world.FPS, batch=1,
           loss="mse", sample_steps=25, guidance=1.5, noise_prior=0.5,
           eval=dict(sample_steps=15, invert_steps=25))
SETTINGS = {
    "tiny":   dict(USE, steps=300, lr=0.2, lr_schedule="cosine", t_min=0.4),
    "tiny16": dict(USE, steps=300, lr=0.1, lr_schedule="cosine", t_min=0.5, noise_prior=0.1),
}
TEXT = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            projection_dim=64, max_position_embeddings=24, hidden_act="quick_gelu", layer_norm_eps=1e-5,
            model_type="clip_text_model")
VISION = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
              projection_dim=64, image_size=64, patch_size=8, num_channels=3, hidden_act="quick_gelu",
              layer_norm_eps=1e-5, model_type="clip_vision_model")
SCHEDULER = dict(_class_name="DDIMScheduler", num_train_timesteps=1000, steps_offset=1, clip_sample=False,
                 set_alpha_to_one=False, prediction_type="v_prediction", timestep_spacing="leading",
                 rescale_betas_zero_snr=False)
PIPELINE = dict(_class_name="TextToVideoSDPipeline", scheduler=["diffusers", "DDIMScheduler"],
                text_encoder=["transformers", "CLIPTextModel"], tokenizer=["transformers", "CLIPTokenizer"],
                unet=["diffusers", "UNet3DConditionModel"], vae=["diffusers", "AutoencoderKL"])
SPECIAL = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>",
               pad_token="<|endoftext|>")

# stage      steps  batch  peak learning rate; the batch counts frames for vae, clip and images, else clips.
STAGES = {
    "vae":    (4500, 32, 2e-3),
    "clip":   (900, 64, 1e-3),
    "images": (800, 64, 1.5e-3),
    "clips8": (800, 16, 1e-3),
    "clips":  (10000, 8, 7e-4),
}
POOLS = 10             # each model's pools of clips have ten seeds of their own
LINEAR = 0.05          # weight of 1 - R2 in the autoencoder's loss, see linear_fit
INK, GREY, PALE, BLUE, SKY = "#20242c", "#858c97", "#e6e8ec", "#1f5fbf", "#b9d0f0"     # of the curves
SAVE_EVERY = 30        # seconds between two states of a stage
EMPTY = 0.1            # share of empty captions: guidance and the empty-prompt inversion need them


def configs(name):
    """config.json of a model's autoencoder and of its UNet, whose way up mirrors the way down."""
    _, widths, levels = GEOMETRIES[name]
    vae = dict(_class_name="AutoencoderKL", in_channels=3, out_channels=3, latent_channels=4,
               block_out_channels=list(widths), down_block_types=["DownEncoderBlock2D"] * len(widths),
               up_block_types=["UpDecoderBlock2D"] * len(widths), layers_per_block=1, norm_num_groups=8,
               sample_size=world.SIZE, act_fn="silu", scaling_factor=1.0)
    kinds, channels = map(list, zip(*levels))
    unet = dict(_class_name="UNet3DConditionModel", sample_size=world.SIZE // 2 ** (len(widths) - 1),
                in_channels=4, out_channels=4, down_block_types=kinds,
                up_block_types=[kind.replace("Down", "Up") for kind in reversed(kinds)],
                block_out_channels=channels, layers_per_block=1, cross_attention_dim=128,
                attention_head_dim=channels[0] // 4, norm_num_groups=32)
    return vae, unet


def scheduler_config(name):
    """scheduler_config.json of a model."""
    kind, start, end, _ = NOISE[name]
    return dict(SCHEDULER, beta_schedule=kind, beta_start=start, beta_end=end)


def pool(count, seed, motions=world.TRAIN_MOTIONS):
    """`count` clips of the training motions: uint8 tensor (count, 16, 64, 64, 3) and their captions."""
    scenes = [world.scene(seed * 1_000_000 + i, motions) for i in range(count)]
    clips = np.stack([world.render(s) for s in tqdm(scenes, desc="rendering", unit="clip", leave=False)])
    return torch.from_numpy(clips), [world.caption(s) for s in scenes]


def pixels(frames, device):
    """uint8 (N,64,64,3) -> float (N,3,64,64) in [-1,1]"""
    return frames.to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def autocast(device):
    """bfloat16 where it is fast: a CPU without instructions for it takes ten times as long as in float32."""
    fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pictures in [-1,1], peak 2."""
    return 10 * math.log10(4 / (a - b).square().mean().item())


def train(stage, model, loss_of, args, watch=None, parts=1):
    """The loop of all stages: AdamW, warm-up and cosine, EMA, log, resumable state. Returns the EMA model.

    loss_of(model, step, generator, part) -> (loss, {name: number}) on every `parts`-th clip of a batch from
    the `part`-th on. It draws from the generator alone, and draws the whole batch, so that a stage that goes
    on from its state ends where it would have ended. watch(ema, path) draws a sheet of samples now and then.
    """
    steps, _, peak = STAGES[stage]
    steps, peak = max(1, int(steps * args.scale)), args.lr or peak
    state_file, log_file = args.work / f"{stage}.pt", args.work / f"{stage}.jsonl"
    ema = copy.deepcopy(model).requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01,
                                  fused=True)
    first = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    def save(step):
        """Writes the state, never half of it."""
        state = dict(step=step, model=model.state_dict(), ema=ema.state_dict(),
                     optimizer=optimizer.state_dict())
        torch.save(state, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").replace(state_file)

    def gradients(part):
        """One part's loss, its numbers, and its share of the batch's gradients."""
        generator = torch.Generator().manual_seed(args.seed * 1_000_000 + step)
        loss, numbers = loss_of(model, step, generator, part)
        return loss.item(), numbers, torch.autograd.grad(loss / parts, learned)

    threads = ThreadPoolExecutor(parts)
    saved, bar = time.time(), tqdm(range(first, steps), initial=first, total=steps, desc=stage, mininterval=5)
    for step in bar:
        # From a shrinking rate of change to none: 3 % warm-up, then half a cosine down to 2 % of the peak.
        warm, rest = min(1, (step + 1) / (0.03 * steps)), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = peak * warm * (0.02 + 0.98 * rest)
        losses, logged, shares = zip(*threads.map(gradients, range(parts)))
        for parameter, *share in zip(learned, *shares):
            parameter.grad = sum(share)
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        if step % 50 == 0:
            numbers = {name: float(np.mean([part[name] for part in logged])) for name in logged[0]}
            numbers = dict(loss=float(np.mean(losses)), **numbers)
            bar.set_postfix({name: f"{number:.4g}" for name, number in numbers.items()})
            with open(log_file, "a") as f:
                print(json.dumps(dict(step=step, **numbers, time=time.time())), file=f)
        if time.time() - saved > SAVE_EVERY or step + 1 == steps:
            save(step + 1)
            saved = time.time()
        if watch and ((step + 1) % 1000 == 0 or step + 1 == steps):
            watch(ema, args.work / f"{stage}-{step + 1:06d}.png")
    return ema


def coloured_pool(count, seed, share=0.5):
    """uint8 (4*count,64,64,3): four frames of each scene. `share` of the scenes have colours of any kind."""
    rng, frames = np.random.default_rng(seed), []
    for i in tqdm(range(count), desc="rendering", unit="scene", leave=False):
        scene = world.scene(seed * 1_000_000 + i)
        if rng.random() < share:
            scene.update(colour=tuple(rng.uniform(0, 255, 3)), background=tuple(rng.uniform(0, 255, 3)))
        frames.append(world.render(scene, frames=4))
    return torch.from_numpy(np.concatenate(frames))


def linear_fit(z, x):
    """R2 of the best affine map from latents z (N,4,H,W) to the mean RGB of their blocks of x (N,3,64,64).

    One minus it is a term of the loss: latents of real models are nearly linear in colour, since these have
    seen all colours. An autoencoder that has seen few places each wherever it likes.
    """
    y = F.avg_pool2d(x, x.shape[-1] // z.shape[-1]).permute(0, 2, 3, 1).flatten(0, 2)
    z = z.float().permute(0, 2, 3, 1).flatten(0, 2)
    z, y = z - z.mean(0), y - y.mean(0)
    slope = torch.linalg.solve(z.T @ z + 1e-4 * len(z) * torch.eye(z.shape[1], device=z.device), z.T @ y)
    return 1 - (y - z @ slope).square().sum() / y.square().sum()


def train_vae(args):
    """Pictures to latents and back, on single frames of the training motions in colours of all kinds."""
    frames = coloured_pool(4 * args.pool, seed=POOLS * args.seed + 1)
    held, _ = pool(16, seed=POOLS * args.seed + 2, motions=world.HELDOUT_MOTIONS)
    held = pixels(held[:, ::5].flatten(0, 1), args.device)
    batch, (config, _) = args.batch or STAGES["vae"][1], configs(args.model)
    model = load_part(args, mini_mi.AutoencoderKL(config), "vae").to(args.device)

    def loss_of(model, step, generator, part):
        """One batch: its loss, and what goes to the log."""
        x = pixels(frames[torch.randint(len(frames), (batch,), generator=generator)], args.device)
        with autocast(args.device):
            mean, logvar = model.encode(x)
            z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator).to(mean)
            y = model.decode(z).float()
        mean, logvar = mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        fit = linear_fit(mean, x)
        loss = (y - x).abs().mean() + (y - x).square().mean() + 1e-5 * kl + LINEAR * (1 - fit)
        return loss, dict(psnr=psnr(y.detach(), x), r2=fit.item(), kl=kl.item())

    @torch.no_grad()
    def watch(model, path):
        """Says what held-out clips give."""
        y = model.decode(model.encode(held)[0])
        rows = torch.stack([held, y], 1).clamp(-1, 1)[:12].flatten(0, 1)         # real, decoded, real, ...
        sheet = rows.unflatten(0, (-1, 8)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        Image.fromarray(((sheet + 1) * 127.5).round().byte().cpu().numpy()).save(path)
        print(f"\n{path.name}: PSNR on held-out motions {psnr(y, held):.2f} dB, "
              f"R2 {linear_fit(model.encode(held)[0], held):.3f}", flush=True)

    model = train("vae", model, loss_of, args, watch)
    with torch.no_grad():                        # the diffusion model wants latents of standard deviation 1
        some = pixels(frames[::97], args.device).split(64)
        spread = torch.cat([model.encode(x)[0] for x in some]).std().item()
    write_part(args, "vae", model, {**config, "scaling_factor": round(1 / spread, 5)})


def make_tokenizer(folder):
    """Byte-pair merges, trained on the world's captions until each of their words is one token.

    Other words fall into pieces. Writes vocab.json, merges.txt and the two config files into `folder`;
    returns the tokenizer and its vocabulary.
    """
    alphabet = list(mini_mi.byte_alphabet().values())
    words = {}
    for caption in world.all_captions():
        for word in caption.split():
            pieces = " ".join(word) + "</w>"
            words[pieces] = words.get(pieces, 0) + 1
    merges = []
    while any(" " in pieces for pieces in words):
        pairs = {}
        for pieces, count in words.items():
            for pair in itertools.pairwise(pieces.split()):
                pairs[pair] = pairs.get(pair, 0) + count
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        whole = re.compile(rf"(?<!\S){re.escape(' '.join(best))}(?!\S)")       # not ends of other pieces
        words = {whole.sub("".join(best), pieces): count for pieces, count in words.items()}
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges), *SPECIAL.values()]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    write_json(folder / "special_tokens_map.json", SPECIAL)
    write_json(folder / "tokenizer_config.json",
               dict(SPECIAL, model_max_length=TEXT["max_position_embeddings"],
                    tokenizer_class="CLIPTokenizer"))
    return mini_mi.CLIPTokenizer.from_pretrained(folder), vocab


def write_json(path, value):
    """A config file, the folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_part(args, name, module, config, stem="diffusion_pytorch_model"):
    """NAME/ of the model folder: config.json and the weights in float16."""
    write_json(args.to / name / "config.json", config)
    weights = {k: v.half() for k, v in module.state_dict().items()}
    mini_mi.save_safetensors(args.to / name / f"{stem}.safetensors", weights)


def load_part(args, model, name, stem="diffusion_pytorch_model"):
    """Weights of the checkpoint that is there into `model`, if there are any."""
    path = args.to / name / f"{stem}.safetensors"
    if path.exists() and not args.fresh:
        model.load_state_dict({k: v.float() for k, v in mini_mi.load_tensors(path).items()})
        print(f"{name}: goes on from {path}")
    return model


def train_clip(args):
    """Frame against all captions at once: a contrastive loss whose negatives are every other appearance."""
    tokenizer, vocab = make_tokenizer(args.to / "clip")
    make_tokenizer(args.to / "tokenizer")
    ends = dict(vocab_size=len(vocab), bos_token_id=vocab[SPECIAL["bos_token"]], eos_token_id=tokenizer.eos,
                pad_token_id=tokenizer.pad)
    config = dict(model_type="clip", projection_dim=64, text_config={**TEXT, **ends}, vision_config=VISION,
                  logit_scale_init_value=2.6592)
    model = load_part(args, eval_mi.CLIPModel(config), "clip", "model").to(args.device)
    if (args.to / "unet").exists() and not args.fresh:
        model.text_model.requires_grad_(False)           # the UNet has learned to read it as it is
    captions = world.all_captions()
    ids = tokenizer(captions).to(args.device)
    clips, labels = pool(args.pool, seed=3)
    labels = torch.tensor([captions.index(c) for c in labels])
    held, held_labels = pool(40, seed=4, motions=world.HELDOUT_MOTIONS)
    held_labels = torch.tensor([captions.index(c) for c in held_labels])
    batch = args.batch or STAGES["clip"][1]
    mean, std = (torch.tensor(v, device=args.device).view(3, 1, 1)
                 for v in (eval_mi.CLIP_MEAN, eval_mi.CLIP_STD))

    def logits(model, x):
        """Cosine of every picture with every caption."""
        x = model.image_features(((x + 1) / 2 - mean) / std)
        return x @ model.text_features(ids).T

    def loss_of(model, step, generator, part):
        """One batch: its loss, and what goes to the log."""
        pick = torch.randint(len(clips), (batch,), generator=generator)
        frame = torch.randint(world.FRAMES, (batch,), generator=generator)
        x = pixels(clips[pick, frame], args.device)
        # Decoded and sampled frames are softer and noisier than rendered ones: half of the batch is blurred,
        # all of it gets some noise.
        soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        x = torch.where(torch.rand(batch, 1, 1, 1, generator=generator).to(x.device) < 0.5, soft, x)
        strength = 0.1 * torch.rand(batch, 1, 1, 1, generator=generator)
        x = x + (strength * torch.randn(x.shape, generator=generator)).to(x.device)
        with autocast(args.device):
            scores = model.logit_scale.exp().clamp(max=20) * logits(model, x)
        target = labels[pick].to(args.device)
        right = (scores.argmax(1) == target).float().mean().item()
        return F.cross_entropy(scores.float(), target), dict(accuracy=right)

    @torch.no_grad()
    def watch(model, path):
        """Says what held-out clips give."""
        right = [logits(model, pixels(clip[::5], args.device)).argmax(1).cpu() == label
                 for clip, label in zip(held, held_labels)]
        print(f"\n{path.stem}: caption of {len(right)} clips of held-out motions, right on "
              f"{100 * torch.cat(right).float().mean():.1f} % of frames", flush=True)

    model = train("clip", model, loss_of, args, watch)
    model.logit_scale.clamp_(max=math.log(20))
    write_part(args, "clip", model, config, "model")
    text = mini_mi.CLIPTextModel({**TEXT, **ends})
    text.text_model.load_state_dict(model.text_model.state_dict())
    write_part(args, "text_encoder", text, {**TEXT, **ends, "architectures": ["CLIPTextModel"]}, "model")


def latent_pool(args, seed):
    """Models; latents (N,4,16,H,W) in float16 and captions of `args.pool` clips.

    The latents are kept in a file, since encoding takes minutes; an autoencoder written since then replaces
    them.
    """
    path = args.work / f"latents-{seed}-{args.pool}.pt"
    vae = args.to / "vae" / "diffusion_pytorch_model.safetensors"
    models = mini_mi.load_models(args.to, args.device)
    if not path.exists() or path.stat().st_mtime < vae.stat().st_mtime:
        clips, captions = pool(args.pool, seed)
        latents = [mini_mi.encode_video(models, mini_mi.to_model_range(clip.numpy())).half().cpu()
                   for clip in tqdm(clips, desc="encoding", unit="clip", leave=False)]
        torch.save((torch.cat(latents), captions), path)
    latents, captions = torch.load(path, weights_only=True)
    return models, latents, captions


def train_unet(stage, args):
    """v-prediction with min-SNR weights (arXiv 2303.09556) on 1, 8 or 16 frames of the latent clips.

    The error of v is (snr + 1) times that of x0. Its weight caps this factor at 5, and unlike min(snr, 5) it
    does not vanish where noise is strongest: sixteen alike frames show the sprite through much noise.
    """
    frames, (_, config) = {"images": 1, "clips8": 8, "clips": 16}[stage], configs(args.model)
    if stage == "images" and (args.fresh or not (args.to / "unet").exists()):
        unet = mini_mi.UNet3DConditionModel(config)
        # A layer that starts as the identity lets a video model begin as the picture model that it was.
        for name, parameter in unet.named_parameters():
            if ".conv4.3." in name:                       # the last convolution of a TemporalConvLayer
                torch.nn.init.zeros_(parameter)
        write_part(args, "unet", unet, config)
    models, latents, captions = latent_pool(args, seed=POOLS * args.seed + 5)
    every = world.all_captions()
    texts = mini_mi.encode_prompt(models, [*every, ""])
    labels = torch.tensor([every.index(c) for c in captions])
    scheduler, batch, device = models.scheduler, args.batch or STAGES[stage][1], args.device
    *_, shift = NOISE[args.model]
    # eval(): the temporal convolutions' dropout is left out, as it is at inversion.
    unet = models.unet.requires_grad_(True).eval()
    # In bfloat16 the CPU's fused attention is slow backwards: without it a step takes two thirds of the time.
    cuda = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    backends = [SDPBackend.MATH] if device.type == "cpu" else cuda
    # Layers this small gain little from a second core; parts of the batch at the same time gain more.
    cores = torch.get_num_threads()
    parts = math.gcd(batch, cores) if device.type == "cpu" else 1

    def loss_of(unet, step, generator, part):
        """A part of one batch: its loss, and what goes to the log."""
        pick = torch.randint(len(latents), (batch,), generator=generator)
        first = int(torch.randint(world.FRAMES - frames + 1, (), generator=generator))
        x0 = latents[pick, :, first:first + frames].float()
        # A clip played backwards is a clip of another motion.
        x0 = torch.where(torch.rand(batch, 1, 1, 1, 1, generator=generator) < 0.5, x0, x0.flip(2)).to(device)
        label = torch.where(torch.rand(batch, generator=generator) < EMPTY, len(every), labels[pick])
        noise = torch.randn(x0.shape, generator=generator).to(device)
        # One noise level from each of `batch` parts of the schedule: steadier gradients. In clips the parts
        # where noise is strong are narrower (the shift of arXiv 2403.03206): there it is decided what goes
        # where, and frames that disagree about it make a sprite jump.
        u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        u = u if frames == 1 else shift * u / (1 + (shift - 1) * u)
        t = (u * scheduler.T).long().clamp(max=scheduler.T - 1)
        x0, noise, t, label = (whole[part::parts] for whole in (x0, noise, t, label))
        weight = (5 * (1 - scheduler.abar(t, x0))).clamp(max=1)          # min(snr + 1, 5) / (snr + 1)
        with autocast(device):
            out = unet(scheduler.add_noise(x0, noise, t), t.to(device), texts[label].to(device))
        error = (out.float() - scheduler.target(x0, noise, t)).square()
        return (weight * error).mean(), dict(mse=error.mean().item())

    @torch.no_grad()
    def watch(unet, path):
        """Draws what some captions give."""
        models.unet, prompts = unet, every[7::53]
        shape = (len(prompts), 4, frames, *latents.shape[-2:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        text, negative = (mini_mi.encode_prompt(models, p) for p in (prompts, [""] * len(prompts)))
        x = mini_mi.sample(models, noise.to(device), text, negative, steps=20,
                           guidance=SETTINGS[args.model]["guidance"], progress=False)
        rows = [(p, mini_mi.to_uint8(v)) for p, v in zip(prompts, mini_mi.decode_video(models, x))]
        mini_mi.contact_sheet(rows).save(path)

    torch.set_num_threads(cores // parts)
    try:
        with sdpa_kernel(backends):
            write_part(args, "unet", train(stage, unet, loss_of, args, watch, parts), config)
    finally:
        torch.set_num_threads(cores)


# -------------------------------------------------------------------------------------------- training curves

def read_log(file):
    """A stage's log -> its entries by rising step, and the minutes of training.

    After an interruption a stage repeats the steps since its last state: their later entries count. The time
    between two sittings does not: no gap counts for more than ten times the usual one.
    """
    entries = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    gaps = np.diff([e["time"] for e in entries])
    minutes = float(np.minimum(gaps, 10 * np.median(gaps)).sum()) / 60 if len(gaps) else 0.0
    last = {e["step"]: e for e in entries}
    return [last[step] for step in sorted(last)], minutes


def draw_curves(work, file=HERE / "curves.png"):
    """Small multiples of all logs in `work`: a column per stage, its loss above, its second number below."""
    files = {stage: work / f"{stage}.jsonl" for stage in STAGES}
    logs = {stage: read_log(file) for stage, file in files.items() if file.exists()}
    zoom, width, height = 2, 300, 210       # drawn at twice the size, then reduced: PIL does not antialias
    image = Image.new("RGB", (width * max(1, len(logs)) * zoom, (2 * height + 28) * zoom), "white")
    draw, font, bold = ImageDraw.Draw(image), *(ImageFont.load_default(size * zoom) for size in (12, 14))
    for column, (stage, (entries, minutes)) in enumerate(logs.items()):
        title = f"{stage}: {minutes:.0f} min"
        draw.text(((width * column + 56) * zoom, 8 * zoom), title, INK, bold)
        for row, name in enumerate([key for key in entries[0] if key not in ("step", "time")][:2]):
            corner = ((width * column + 56) * zoom, (28 + height * row + 26) * zoom)
            curve(draw, font, zoom, corner, (width - 76, height - 58), entries, name)
    image = image.resize([side // zoom for side in image.size], Image.Resampling.LANCZOS)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(64).save(file, optimize=True)


def ticks_within(low, high):
    """About five round numbers within [low, high]: 1, 2 or 5 times a power of ten apart."""
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * 6 >= high - low)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def curve(draw, font, zoom, corner, size, entries, name):
    """One panel: pale dots, their moving average as a line. Losses have a logarithmic axis."""
    (left, top), (width, height) = corner, (side * zoom for side in size)
    steps, values = (np.array([e[key] for e in entries], dtype=float) for key in ("step", name))
    log = name in ("loss", "mse", "kl")
    scale = np.log10 if log else np.asarray
    heights = scale(values)
    window = np.ones(5 if len(values) >= 10 else 1)         # the log holds single batches, which scatter
    mean = np.convolve(heights, window) / np.convolve(np.ones_like(heights), window)
    mean = mean[len(window) // 2:][:len(heights)]
    margin = 0.04 * np.ptp(heights) + 1e-3
    low, high = (0, 1) if name == "accuracy" else (heights.min() - margin, heights.max() + margin)

    def place(step, value):
        """Its pixel in the picture."""
        return left + width * step / max(1, steps[-1]), top + height * (1 - (value - low) / (high - low))

    ticks = ticks_within(low, high)
    if log:
        digits = (1, 2, 5) if high - low > 0.6 else range(1, 10)
        ticks = [n * 10.0 ** power for power in range(-6, 3) for n in digits]
        ticks = [tick for tick in ticks if low <= np.log10(tick) <= high]
    for tick in ticks:
        y = place(0, scale(tick))[1]
        draw.line((left, y, left + width, y), PALE, zoom)
        draw.text((left - 6 * zoom, y), f"{tick:.3g}", GREY, font, anchor="rm")
    for tick in (0, steps[-1]):
        x = place(tick, low)[0]
        draw.text((x, top + height + 5 * zoom), f"{tick:,.0f}", GREY, font, anchor="mt")
    draw.line((left, top + height, left + width, top + height), GREY, zoom)
    for x, y in map(place, steps, heights):
        draw.ellipse((x - 2 * zoom, y - 2 * zoom, x + 2 * zoom, y + 2 * zoom), SKY)
    draw.line(list(map(place, steps, mean)), BLUE, 2 * zoom, joint="curve")
    units = {"psnr": "PSNR, dB", "mse": "error without weights"}
    draw.text((left, top - 18 * zoom), units.get(name, name), INK, font)


def main(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=GEOMETRIES, help="default: tiny; --check: both")
    p.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    p.add_argument("--work", type=Path, help="folder for states, logs and sheets; default: out/MODEL")
    p.add_argument("--to", type=Path,
                   help="the model folder; the curves are drawn beside it; default: data/MODEL")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    p.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of every stage")
    p.add_argument("--lr", type=float, help="peak learning rate, in place of the stage's own")
    p.add_argument("--batch", type=int, help="batch size, in place of the stage's own")
    p.add_argument("--pool", type=int, default=5000, help="clips rendered to draw from")
    p.add_argument("--fresh", action="store_true", help="begin from random weights (not clips8, clips)")
    p.add_argument("--check", action="store_true", help="train nothing: measure the model folder")
    args = p.parse_args(argv)
    args.device = torch.device(mini_mi.pick_device(args.device))
    if args.check:
        import check_tiny                               # here, since training needs none of it
        both = [HERE / name for name in GEOMETRIES if args.model in (None, name)]
        there = [folder for folder in ([args.to] if args.to else both) if (folder / "unet").exists()]
        if not there:
            p.error(f"{args.to or HERE} has no model with a UNet: train one first")
        check_tiny.check(there, args.device)
        return
    args.model = args.model or "tiny"
    if args.stage == "clip" and args.model != "tiny":
        p.error(f"{args.model} has copies of tiny's text tower and judge: no stage clip")
    args.seed, args.to = GEOMETRIES[args.model][0], args.to or HERE / args.model
    args.work = args.work or HERE.parent / "out" / args.model
    args.work.mkdir(parents=True, exist_ok=True)
    stages = list(STAGES) if args.stage == "all" else [args.stage]
    write_json(args.to / "model_index.json", PIPELINE)
    write_json(args.to / "mini_mi.json", SETTINGS[args.model])
    write_json(args.to / "scheduler" / "scheduler_config.json", scheduler_config(args.model))
    if args.model != "tiny":
        for name in SHARED:
            shutil.copytree(TINY / name, args.to / name, dirs_exist_ok=True)
        stages = [stage for stage in stages if stage != "clip"]
    for stage in stages:
        torch.manual_seed(args.seed)                    # a stage's first weights, whatever ran before it
        if stage == "vae":
            train_vae(args)
        elif stage == "clip":
            train_clip(args)
        else:
            train_unet(stage, args)
        draw_curves(args.work, args.to.parent / f"{args.model.replace('tiny', 'curves')}.png")


if __name__ == "__main__":
    sys.exit(mini_mi.guarded(main))
