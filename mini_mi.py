"""Motion Inversion in one file: learn the motion of one clip, then make other things move that way.

Wang et al., *Motion Inversion for Video Customization* (arXiv 2403.20193), reimplemented to be read. A frozen
text-to-video diffusion model denoises a reference clip; two sets of embeddings inside its temporal attention
are trained to help it: MQK (which frames look at each other) and MV (what they pass on). The same model with
these embeddings and another prompt makes new content that moves like the reference.

    python mini_mi.py                            the whole job on the embedded model, on a CPU, too
    python mini_mi.py --no-mqk                   an ablation: the same without MQK (or --no-mv)
    python mini_mi.py --model zeroscope --video dog.mp4 --source-prompt "a dog runs" --prompt "a robot runs"

Map. Names are looked up when a function runs, so what the method uses may stand below it:

    THE PAPER         debiasing, the temporal attention of Eq. 3, the embeddings that it adds
    LEARN IT          the loss and the training loop, Eq. 4
    USE IT            DDIM, inversion of the reference, start noise, guided sampling, in and out of latents
    THE HYBRID LOSS   a helper that the authors train beside the embeddings
    THE FROZEN MODEL  UNet, autoencoder, text encoder, tokenizer, held against the published ones in tests/
    PLUMBING          embeddings at other sizes, files, checkpoints, hub, video, pictures
    COMMAND LINE      the settings in layers, and `run`: load, encode, train, invert, sample, write

Letters:  B batch   F frames   C channels   H W latent grid, or what a level of the UNet has of it
          h w pixels   L text tokens   D text width   N any batch axis, such as B*F
          t diffusion step, never a frame   T number of them   c the config of a part; the text in Eq. 4
          f what temporal attention reads, in Eq. 3
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import html
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import unicodedata
import urllib.request
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import ftfy
import numpy as np
import regex
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


class UserError(ValueError):
    """What the user can put right. The command line prints it as one line, `error: ...`, and exits with 2."""


# ============================================================================================================
#   THE PAPER: Motion Inversion (arXiv 2403.20193), sections 3.2 to 3.4
#
#   Temporal attention reads features f of shape (B, H*W, F, C): one sequence of F frames per position. The
#   motion of one clip is learned as two tensors, added to what an attention reads:
#
#       TA(f) = softmax( Wq(f + m_qk) (Wk(f + m_qk))^T / sqrt(d_k) ) . Wv(f + m_v)                     (Eq. 3)
#
#   MQK  m_qk (1,   F, C)  changes WHICH frames look at each other. It is the same at every position: it can
#                          say "frame 3 looks at frame 1", not where in the picture, so it holds no shape.
#   MV   m_v  (H*W, F, C)  changes WHAT is passed from frame to frame, at every position: local motion. For
#                          ZeroScope that is 55 million numbers, many more than the clip's latents have: it
#                          could hold the clip's looks, too.
#
#   They are trained so that the frozen model denoises the clip well (Eq. 4: `train_motion`, in LEARN IT). The
#   clip's looks help with that, too, so MV learns some of them. What does not change from frame to frame is
#   looks, not motion: at inference all frames of MV but the first keep only the change (Eq. 5: `debias`).
# ============================================================================================================

def debias(m_v, mode):
    """Motion Value embedding without static appearance, (..., F, C) -> (..., F, C).

    diff   m_v[0], then m_v[j] - m_v[j-1] for j > 0: the first frame, then changes, as in optical flow (Eq. 5)
    mean   m_v - mean over frames: the paper's alternative "normalize"
    none   m_v as trained: the paper's "vanilla"
    """
    if mode == "diff":
        return torch.cat([m_v[..., :1, :], m_v[..., 1:, :] - m_v[..., :-1, :]], dim=-2)
    if mode == "mean":
        return m_v - m_v.mean(dim=-2, keepdim=True)
    if mode == "none":
        return m_v
    raise UserError(f"debias = {mode!r} is not known; it takes diff, mean or none")


class TemporalTransformerBlock(nn.Module):
    """Two self-attentions over time and a feed-forward, x (B, H*W, F, C) -> the same; grid = (H, W).

    As in the authors' code each attention has an MV of its own, and one MQK serves both."""

    def __init__(self, width, heads, c):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = (Attention(width, heads, c.attention_head_dim) for _ in range(2))
        self.ff = FeedForward(width)
        self.name = None      # its key in the UNet, by which `motion` knows it; set by UNet3DConditionModel

    def forward(self, x, grid, motion=None):
        for norm, attention, which in (self.norm1, self.attn1, "attn1"), (self.norm2, self.attn2, "attn2"):
            f = norm(x)
            m_qk, m_v = motion.at(self.name, which, grid, f) if motion is not None else (0, 0)
            x = x + attention(f + m_qk, f + m_qk, f + m_v)   # multi-head; for queries, keys, values   (Eq. 3)
        return x + self.ff(self.norm3(x))


class MotionEmbeddings(nn.Module):
    """The motion of one clip. Passed to the UNet as `motion`; its state_dict has the authors' keys:

        BLOCK.pos_embed                             MQK of a temporal block, (1, F, C)
        BLOCK.attn1.vSpatial, BLOCK.attn2.vSpatial  MV of its two attentions, (H*W, F, C)

    For ZeroScope, 24 frames of 576x320: five blocks, down_blocks.2.temp_attentions.{0,1} and up_blocks.1.
    temp_attentions.{0,1,2}, each with an MQK of (1, 24, 1280) and two MV of (180, 24, 1280), 10x18 = 180:
    55,449,600 numbers in all.

    unet             the frozen UNet, asked for its temporal blocks; None: `read_motion` adds what it reads
    frames           F of the clip
    height, width    H, W of the clip's latents
    levels           UNet levels that get embeddings, 0 is the finest; default: the deepest one that has
                     attention, which for ZeroScope is the authors' choice (width 1280 on the way down and up)
    use_mqk, use_mv  the ablations: False here, the part is not trained; set to False later, it is not added
    mqk_dims, mv_dims  1: shape (1, F, C);  2: (H*W, F, C)
    debias           diff | mean | none. `.eval()` adds debiased MV, `.train()` raw MV, unless
                     debias_in_training
    t_min            share of T; `train_motion` and `sample` use them at t >= t_min * T; the paper: 0, all"""

    SETTINGS = ("use_mqk", "use_mv", "mqk_dims", "mv_dims", "debias", "debias_in_training", "t_min")

    def __init__(self, unet, frames, height=None, width=None, *, levels=None, use_mqk=True, use_mv=True,
                 mqk_dims=1, mv_dims=2, debias="diff", debias_in_training=False, t_min=0.0):
        super().__init__()
        self.use_mqk, self.use_mv, self.mqk_dims, self.mv_dims = use_mqk, use_mv, mqk_dims, mv_dims
        self.debias, self.debias_in_training, self.t_min = debias, debias_in_training, t_min
        self.frames = frames         # None: a file of the authors with all slots in use, see `read_motion`
        self.grids = {}              # temporal block -> (H, W) of its MV; None: the authors' file did not say
        self.source = {}             # of which clip, if known: {"video": path, "source_prompt": ...}
        self.losses = []             # of the training, one number per step
        if debias not in ("diff", "mean", "none") or {mqk_dims, mv_dims} - {1, 2} or not 0 <= t_min < 1:
            raise UserError(f"debias = {debias!r}: diff, mean or none; dims: 1 or 2; t_min {t_min}: 0 to 1")
        if unet is None:
            return
        if not (use_mqk or use_mv):
            raise UserError("neither MQK nor MV is in use: nothing is left to train; leave one of the two in")
        with_attention = {level for level, _ in unet.motion_sites.values()}
        levels = {max(with_attention)} if levels is None else set(levels)
        if not levels or not levels <= with_attention:
            raise UserError(f"levels {levels}: embeddings can only go to some of {with_attention}")
        for block, (level, channels) in unet.motion_sites.items():
            if level not in levels:
                continue
            self.grids[block] = level_grid(height, width, level)
            positions = {1: 1, 2: math.prod(self.grids[block])}
            if use_mqk:
                self.add(f"{block}.pos_embed", torch.zeros(positions[mqk_dims], frames, channels))
            if use_mv:
                self.add(f"{block}.attn1.vSpatial", torch.zeros(positions[mv_dims], frames, channels))
                self.add(f"{block}.attn2.vSpatial", torch.zeros(positions[mv_dims], frames, channels))

    def add(self, key, value):
        """A parameter of this key, in submodules by the parts of its name, as torch names parameters."""
        *folders, name = key.split(".")
        module = self
        for folder in folders:
            if not hasattr(module, folder):
                module.add_module(folder, nn.Module())
            module = module.get_submodule(folder)
        module.register_parameter(name, nn.Parameter(value))

    def at(self, block, which, grid, f):
        """m_qk, m_v for one attention of a block that reads f (B, H*W, F, C); 0 for a part that is not there.

        Each is (1 or H*W, F, C), brought to the frames, the grid (H, W) and the number format that f has."""
        if block not in self.grids:
            return 0, 0
        parts, resizing = dict(self.named_parameters()), (self.frames, self.grids[block], f.shape[2], grid)
        m_qk, m_v = parts.get(f"{block}.pos_embed"), parts.get(f"{block}.{which}.vSpatial")
        m_qk = resized(m_qk, *resizing).to(f.dtype) if self.use_mqk and m_qk is not None else 0
        if not self.use_mv or m_v is None:
            return m_qk, 0
        m_v = resized(m_v, *resizing)
        # Debias after resizing: it takes differences of the frames that are used.
        if self.debias_in_training or not self.training:
            m_v = debias(m_v, self.debias)                                                         # (Eq. 5)
        return m_qk, m_v.to(f.dtype)

    def save(self, path):
        """Writes safetensors; settings, grids and source are its metadata."""
        about = {name: getattr(self, name) for name in ("frames", "grids", "source", *self.SETTINGS)}
        save_safetensors(path, self.state_dict(), {"mini_mi": json.dumps(about)})

    @classmethod
    def load(cls, path):
        """Reads a file of `save` or the authors' motion_embed.pt. Parts that it lacks are switched off."""
        return read_motion(path)


# ============================================================================================================
#   LEARN IT: one clip's motion into the embeddings (Eq. 4)
# ============================================================================================================

def predict(models, x, t, text, motion=None, checkpointing=False):
    """The UNet's answer in float32, whatever the format of its weights."""
    return models.unet(x.to(models.dtype), t, text.to(models.dtype), motion, checkpointing).float()


def motion_loss(kind, prediction, target, anchor):
    """The training loss, 0-d, from prediction and target (B,C,F,H,W) and the number of an anchor frame.

    mse       || eps - eps_theta ||^2, averaged; v for eps if the model predicts v, as data/tiny does  (Eq. 4)
    debiased  the same, plus the same on  alpha * eps - beta * eps[anchor],  alpha = sqrt(2), beta = 1: what a
              frame has in common with the anchor counts less (MotionDirector, arXiv 2310.08465; not Eq. 5)
    hybrid    debiased, while a `SpatialLoRA` holds the looks of single frames: MotionDirector's whole loss,
              with which the paper's numbers were made"""
    mse = nnf.mse_loss(prediction, target)
    if kind == "mse":
        return mse
    if kind in ("debiased", "hybrid"):
        apart = [math.sqrt(2) * eps - eps[:, :, anchor, None] for eps in (prediction, target)]
        return mse + nnf.mse_loss(*apart)
    raise UserError(f"loss = {kind!r} is not known; it takes mse, debiased or hybrid")


def train_motion(models, latents, text, *, steps=350, lr=0.02, lr_schedule="constant", batch=1, seed=0,
                 loss="mse", checkpointing=False, on_step=None, progress=True, motion=None, **settings):
    """Learns the motion of one clip: latents (1,C,F,H,W), text (1,L,D) -> MotionEmbeddings, in eval mode.

    M* = argmin_M E_{t,eps} || eps - eps_theta(x_t, t, c, M) ||^2  with everything but M frozen        (Eq. 4)

    The defaults are the authors'; 350 steps by their word, 400 in their configuration. Every step sees the
    clip at `batch` noise levels. The UNet stays in eval mode; the authors' has dropout. The result has
    `losses`, one number per step.

    lr_schedule    constant: the paper's; cosine: falls to zero, so that less noise of single steps remains
    checkpointing  recompute activations in backward: slower, much less memory
    on_step        called as on_step(step, motion) after every step, from 1; motion is in eval mode
    motion         the embeddings to train; default: new ones, with these `settings` of MotionEmbeddings"""
    unet, scheduler, T = models.unet, models.scheduler, models.scheduler.T
    frames, height, width = latents.shape[2:]
    generator = torch.Generator().manual_seed(seed)

    # The UNet is frozen; so are the networks that made latents and text. The embeddings alone learn.
    unet.requires_grad_(False)
    if motion and settings:
        raise TypeError(f"{', '.join(settings)}: settings of new embeddings, and `motion` has its own")
    motion = (motion or MotionEmbeddings(unet, frames, height, width, **settings)).to(models.device)
    # AdamW's default decay, which the authors leave active: a step multiplies them by 1 - lr/100.
    optimizer = torch.optim.AdamW(motion.parameters(), lr=lr, weight_decay=0.01)
    # Gradients in float16 vanish below 6e-8: the scaler multiplies the loss and divides what comes out.
    scaler = torch.amp.GradScaler(models.device.type, enabled=models.dtype == torch.float16)
    # The hybrid loss alone has a helper; it learns the looks, and holds them while the embeddings learn.
    lora = SpatialLoRA(unet, generator) if loss == "hybrid" else None
    x_0, text = latents.expand(batch, -1, -1, -1, -1), text.expand(batch, -1, -1)

    bar = tqdm(range(1, steps + 1), "training", unit="step", disable=not progress)
    for step in bar:
        t = torch.randint(math.ceil(motion.t_min * T), T, (batch,), generator=generator)
        noise = torch.randn((batch, *latents.shape[1:]), generator=generator).to(latents)
        # Drawn for every loss, so that mse and debiased see the same steps and noise.
        anchor = torch.randint(frames, (), generator=generator).item()
        x_t, target = scheduler.add_noise(x_0, noise, t), scheduler.target(x_0, noise, t)
        optimizer.zero_grad(set_to_none=True)
        with lora.help(models, x_t, t, text, target, scaler, generator) if lora else contextlib.nullcontext():
            prediction = predict(models, x_t, t, text, motion.train(), checkpointing)
            error = motion_loss(loss, prediction, target, anchor)
            scaler.scale(error).backward()
        if not error.isfinite():
            raise UserError(f"a loss is not finite at step {step}: lower --lr ({lr}) or use float32")
        if lr_schedule == "cosine":
            optimizer.param_groups[0]["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))
        scaler.step(optimizer)
        scaler.update()

        motion.losses.append(error.item())
        bar.set_postfix(loss=f"{np.mean(motion.losses[-20:]):.4f}")
        if on_step:
            on_step(step, motion.eval())
    return motion.eval()


# ============================================================================================================
#   USE IT: new clips with that motion
# ============================================================================================================

class DDIMScheduler:
    """Noise levels, x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps for t = 0 .. T-1 (arXiv 2006.11239), and
    deterministic steps between them (DDIM with eta = 0, arXiv 2010.02502).

    The config of another sampler (DPM, Euler, PNDM, ...) is taken by its noise schedule, as diffusers'
    DDIMScheduler.from_config does; what it says about its own way of sampling is ignored."""

    def __init__(self, config):
        config = dict(config)
        config.setdefault("clip_sample", True)                        # DDIMScheduler's own default
        if config.get("_class_name", "DDIMScheduler") != "DDIMScheduler":
            if "beta_start" not in config:
                raise UserError(f"scheduler config: {config['_class_name']} has no noise schedule of betas")
            config.update(clip_sample=False, thresholding=False, timestep_spacing="leading")
        c = read_config(
            "scheduler", config, num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02,
            set_alpha_to_one=True, steps_offset=0,
            only=dict(beta_schedule=("linear", "scaled_linear"), prediction_type=("epsilon", "v_prediction"),
                      clip_sample=False, trained_betas=None, thresholding=False, timestep_spacing="leading",
                      rescale_betas_zero_snr=False))
        self.T, self.offset = c.num_train_timesteps, c.steps_offset
        self.v_prediction = c.prediction_type == "v_prediction"
        power = 0.5 if c.beta_schedule == "scaled_linear" else 1                # scaled: linear in sqrt(beta)
        betas = torch.linspace(c.beta_start ** power, c.beta_end ** power, self.T) ** (1 / power)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)              # abar_t = prod_{s<=t} (1 - beta_s)
        self.final_alpha_cumprod = torch.tensor(1.0) if c.set_alpha_to_one else self.alphas_cumprod[0]

    def abar(self, t, like):
        """abar_t, shaped to multiply `like` (B,...); t int, 0-d or (B,); a step below 0 is the clean end."""
        t = torch.as_tensor(t, device="cpu").reshape(-1)
        abar = torch.where(t >= 0, self.alphas_cumprod[t.clamp(min=0)], self.final_alpha_cumprod)
        return abar.to(like.device).view(-1, *[1] * (like.dim() - 1))

    def timesteps(self, n, t_min=0.0):
        """The n steps of sampling, LongTensor (n,), descending: "leading" spacing, every T//n-th step.

        UserError: they do not fit, or none of them is at t >= t_min * T, where embeddings act."""
        first = (n - 1) * (self.T // max(n, 1)) + self.offset
        # T//n rounds down: with 600 steps of 1000 pure noise would be taken for that of t = 599, their first.
        if not 1 <= n <= self.T or n * (self.T // n) < 0.75 * self.T or first >= self.T:
            raise UserError(f"{n} DDIM steps do not fit into {self.T} timesteps; take another number")
        if first < t_min * self.T:
            raise UserError(f"embeddings that act from {t_min} T on never act in {n} DDIM steps, the first "
                            f"of them {first} of {self.T}: lower t_min, or take more sampling steps")
        return torch.arange(n).flip(0) * (self.T // n) + self.offset

    def add_noise(self, x0, noise, t):
        """x_t from x_0."""
        abar = self.abar(t, x0)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise

    def target(self, x0, noise, t):
        """What the model learns to say: eps, or v = sqrt(abar) eps - sqrt(1-abar) x_0 (arXiv 2202.00512)."""
        abar = self.abar(t, x0)
        return abar.sqrt() * noise - (1 - abar).sqrt() * x0 if self.v_prediction else noise

    def epsilon(self, model_out, t, x):
        """The noise that the model sees in x at step t."""
        abar = self.abar(t, x)
        return abar.sqrt() * model_out + (1 - abar).sqrt() * x if self.v_prediction else model_out

    def move(self, x, eps, abar_from, abar_to):
        """One DDIM move between noise levels with the same eps, either way (arXiv 2010.02502, Eq. 12)."""
        x0 = (x - (1 - abar_from).sqrt() * eps) / abar_from.sqrt()
        return abar_to.sqrt() * x0 + (1 - abar_to).sqrt() * eps

    def step(self, model_out, t, x, n):
        """x at step t - T//n, from x (B,...) at step t and what the model said there; n steps in all."""
        return self.move(x, self.epsilon(model_out, t, x), self.abar(t, x), self.abar(t - self.T // n, x))


@torch.no_grad()
def ddim_invert(models, latents, text, steps=50, progress=True):
    """The noise (B,C,F,H,W) from which sampling nearly gives `latents` back: DDIM backwards.

    From the lowest timestep up, eps is taken from x of the level below; text (B,L,D) is of the empty prompt.
    """
    scheduler, x = models.scheduler, latents
    below = 0                       # the clean latents count as noise level abar_0
    for t in tqdm(scheduler.timesteps(steps).flip(0), "inverting", unit="step", disable=not progress):
        eps = scheduler.epsilon(predict(models, x, t, text), t, x)
        x = scheduler.move(x, eps, scheduler.abar(below, x), scheduler.abar(t, x))
        below = t
    return x


def blend_noise(inverted, fresh, prior):
    """Start noise: sqrt(prior) * inverted reference + sqrt(1 - prior) * fresh noise; the authors take 0.5.

    The weights keep the variance at 1 if both have it. The inverted part brings the rough layout of the
    reference's motion along, which is why eval_mi.py compares with this noise and no embeddings, too."""
    return math.sqrt(prior) * inverted + math.sqrt(1 - prior) * fresh


@torch.no_grad()
def sample(models, noise, text, negative, steps=30, guidance=12.0, motion=None, progress=True):
    """noise (B,C,F,H,W), text, negative (B,L,D) -> latents (B,C,F,H,W): DDIM, classifier-free guidance.

    Guidance (arXiv 2207.12598) runs both texts as one batch, negative first, and the embeddings (in eval
    mode) act on both halves, at steps t >= motion.t_min * T; guidance <= 1 runs the prompt alone."""
    scheduler, x, guided = models.scheduler, noise, guidance > 1
    texts = torch.cat([negative, text]) if guided else text
    for t in tqdm(scheduler.timesteps(steps), "sampling", unit="step", disable=not progress):
        # What moves where is decided while there is much noise; below t_min the embeddings do not act.
        acting = motion if motion is not None and t >= motion.t_min * scheduler.T else None
        out = predict(models, torch.cat([x, x]) if guided else x, t, texts, acting)
        if guided:
            unconditional, conditional = out.chunk(2)
            out = unconditional + guidance * (conditional - unconditional)
        x = scheduler.step(out, t, x, steps)
    if not x.isfinite().all():
        raise UserError("sampling gave values that are not finite: use --dtype float32 or bfloat16")
    return x


@torch.no_grad()
def encode_video(models, video, generator=None):
    """video (B,3,F,h,w) in [-1,1] -> scaled latents (B,C,F,H,W): mean, or sample with a (CPU) generator."""
    frames = video.transpose(1, 2).flatten(0, 1).to(models.device, torch.float32)        # (B*F, 3, h, w)
    # 16 frames at once, here and in `decode_video`, bound the memory.
    mean, logvar = (torch.cat(part) for part in zip(*map(models.vae.encode, frames.split(16))))
    if generator is not None:
        mean = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator).to(mean.device)
    return mean.unflatten(0, (len(video), -1)).transpose(1, 2) * models.vae.scaling_factor


@torch.no_grad()
def decode_video(models, latents):
    """scaled latents (B,C,F,H,W) -> (B,3,F,h,w) in [-1,1]"""
    frames = (latents.float() / models.vae.scaling_factor).transpose(1, 2).flatten(0, 1)
    video = torch.cat([models.vae.decode(z) for z in frames.split(16)])
    return video.unflatten(0, (len(latents), -1)).transpose(1, 2).clamp(-1, 1)


# ============================================================================================================
#   THE HYBRID LOSS: a helper for the training that `--loss hybrid` asks for
# ============================================================================================================

class SpatialLoRA(nn.Module):
    """The helper of the hybrid loss: weight + up @ down for all linear layers of spatial transformers.

    With probability 0.8 a training step first teaches it one random frame, seen as a clip of one frame, and
    leaves it on while the motion embeddings learn from the whole clip: what it holds of the clip's looks they
    need not hold. It is off between steps, and thrown away at the end. For a weight (c_out, c_in), down
    (rank, c_in) starts normal with deviation 1 / rank and up (c_out, rank) at zero.
    Source: MotionDirector (arXiv 2310.08465), its rank and learning rate."""

    def __init__(self, unet, generator, rank=32, lr=5e-4):
        super().__init__()
        spatial = [module for module in unet.modules() if isinstance(module, Transformer2DModel)]
        self.layers = [layer for each in spatial for layer in each.modules() if isinstance(layer, nn.Linear)]
        self.frozen = [layer.weight for layer in self.layers]
        self.down = nn.ParameterList(torch.randn(rank, weight.shape[1], generator=generator) / rank
                                     for weight in self.frozen)
        self.up = nn.ParameterList(torch.zeros(weight.shape[0], rank) for weight in self.frozen)
        self.to(unet.conv_in.weight.device)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=0.01)

    def switch(self, on):
        """Gives every layer W + up @ down, through which gradients reach up and down, or its own W back."""
        for layer, weight, up, down in zip(self.layers, self.frozen, self.up, self.down):
            layer._parameters["weight"] = weight + (up @ down).to(weight.dtype) if on else weight

    @contextlib.contextmanager
    def help(self, models, x_t, t, text, target, scaler, generator):
        """With probability 0.8 it learns from a frame of x_t and target (B,C,F,H,W) and is on in the `with`
        block, where the embeddings learn; else it is off there. Afterwards the model is as it was."""
        on = torch.rand((), generator=generator).item() < 0.8
        frame = torch.randint(x_t.shape[2], (), generator=generator).item()
        try:
            if on:
                self.switch(on)
                seen = predict(models, x_t[:, :, frame, None], t, text)
                self.optimizer.zero_grad(set_to_none=True)
                scaler.scale(nnf.mse_loss(seen, target[:, :, frame, None])).backward()
                scaler.step(self.optimizer)
                with torch.no_grad():        # from here a constant: the block must not train it
                    self.switch(on)
            yield
        finally:
            self.switch(on=False)


# ============================================================================================================
#   THE FROZEN MODEL: UNet, autoencoder, text encoder, tokenizer. Attribute names are the keys of checkpoints
# ============================================================================================================

# ---- UNet: predicts the noise (or v) in a noisy video (Wang et al., ModelScope, arXiv 2308.06571)

# The kinds of levels, by the names that config.json has for them: with transformers, and convolutions alone.
WITH_ATTENTION, PLAIN = "CrossAttnDownBlock3D", "DownBlock3D"


class UNet3DConditionModel(nn.Module):
    """x (B,C,F,H,W), t (int, 0-d or (B,)), text (B,L,D), motion (MotionEmbeddings or None) -> (B,C,F,H,W).

    checkpointing: backward computes each part once more instead of finding its activations in memory.

    ZeroScope, as a table. `attn`: the level has spatial and temporal transformers; in `up` each layer reads
    what comes from below beside the skip that is on top of the stack. * is where the method puts its
    embeddings.

        conv_in, transformer_in   320                40x72 for 320x576 pixels; pushes a skip
        down_blocks.0   320, 320            attn     40x72   each layer pushes a skip, and so does the
        down_blocks.1   640, 640            attn     20x36   halving that ends a level
        down_blocks.2   1280, 1280          attn *   10x18
        down_blocks.3   1280, 1280                    5x9
        mid_block       1280, 1280          attn      5x9
        up_blocks.0     1280, 1280, 1280              5x9    each layer pops a skip and concatenates it
        up_blocks.1     1280, 1280, 1280    attn *   10x18
        up_blocks.2     640, 640, 640       attn     20x36
        up_blocks.3     320, 320, 320       attn     40x72

    Source: diffusers' UNet3DConditionModel, whose keys these are."""

    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        c = read_config(
            "UNet", config, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
            down_block_types=(*[WITH_ATTENTION] * 3, PLAIN), layers_per_block=2, norm_num_groups=32,
            norm_eps=1e-5, cross_attention_dim=1024, attention_head_dim=64,
            only=dict(downsample_padding=1, mid_block_scale_factor=1, act_fn="silu", num_attention_heads=None,
                      time_cond_proj_dim=None, _class_name="UNet3DConditionModel"))
        widths, downs, n = c.block_out_channels, list(c.down_block_types), len(c.block_out_channels)
        ups = [kind.replace("Down", "Up") for kind in reversed(downs)]
        if (not {WITH_ATTENTION} <= set(downs) <= {WITH_ATTENTION, PLAIN} or len(downs) != n
                or list(config.get("up_block_types", ups)) != ups):
            raise UserError(f"UNet config: down_block_types {downs} and their mirror up_block_types should "
                            f"be of {WITH_ATTENTION} and {PLAIN}, one with attention, as many as "
                            "block_out_channels")

        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0])
        # A quirk of the original: always 8 heads here, elsewhere as many as fit the width.
        self.transformer_in = TransformerTemporalModel(widths[0], 8, c)
        skips = [widths[0]]                             # widths of the skips, pushed and popped as in forward
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for level, (before, width) in enumerate(zip([widths[0], *widths], widths)):
            rows, last = level_rows(before, width, c.layers_per_block), level == n - 1
            transformers = len(rows) if downs[level] == WITH_ATTENTION else 0
            self.down_blocks.append(UNetBlock3D(rows, c, transformers, downsample=not last))
            skips += [width] * len(rows) + [width] * (not last)
        self.mid_block = UNetBlock3D(level_rows(widths[-1], widths[-1], 2), c, transformers=1)
        for level, before in zip(reversed(range(n)), [widths[-1], *reversed(widths)]):
            rows = []
            for c_in, c_out in level_rows(before, widths[level], c.layers_per_block + 1):
                rows.append((c_in + skips.pop(), c_out))            # a skip is concatenated to what comes in
            transformers = len(rows) if downs[level] == WITH_ATTENTION else 0
            self.up_blocks.append(UNetBlock3D(rows, c, transformers, upsample=level > 0))
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[0], c.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, 3, padding=1)

        # temporal block -> its level and C; the authors put nothing into the middle block and transformer_in
        self.motion_sites = {}
        for name, module in self.named_modules():
            if isinstance(module, TemporalTransformerBlock):
                module.name = name
                side, number = name.split(".")[:2]
                if side in ("down_blocks", "up_blocks"):
                    level = int(number) if side == "down_blocks" else n - 1 - int(number)
                    self.motion_sites[name] = level, module.norm1.weight.shape[0]

    def forward(self, x, t, text, motion=None, checkpointing=False):
        if motion is not None:
            check_fits(motion, self)
        batch, _, frames, _, _ = x.shape
        emb = self.time_embedding(torch.as_tensor(t, device=x.device).expand(batch))                 # (B, 4C)

        # contiguous: latents may lie in memory in another order; every layer would inherit it and be slower.
        hidden = self.conv_in(x.transpose(1, 2).flatten(0, 1).contiguous())                   # (B*F, C, H, W)
        hidden = self.transformer_in(hidden, frames)
        recompute = functools.partial(checkpoint, use_reentrant=False)
        call = recompute if checkpointing else lambda part, *args: part(*args)
        rest = emb, text, frames, motion, call
        skips = [hidden]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                hidden = block.layer(i, hidden, *rest)
                skips.append(hidden)
            for halve in block.downsamplers:
                hidden = halve(hidden)
                skips.append(hidden)
        for i in range(len(self.mid_block.resnets)):
            hidden = self.mid_block.layer(i, hidden, *rest)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                hidden = block.layer(i, torch.cat([hidden, skips.pop()], dim=1), *rest)
            for double in block.upsamplers:
                hidden = double(hidden, size=skips[-1].shape[-2:])
        out = self.conv_out(nnf.silu(self.conv_norm_out(hidden)))
        return out.unflatten(0, (batch, frames)).transpose(1, 2)


def level_grid(height, width, level):
    """(H, W) of a UNet level, 0 is the finest: every halving is a convolution that rounds odd sizes up."""
    return math.ceil(height / 2 ** level), math.ceil(width / 2 ** level)


def level_rows(before, width, n):
    """(c_in, c_out) of a level's n resnets: the first one brings the width from `before` to `width`."""
    return [(before, width)] + [(width, width)] * (n - 1)


class UNetBlock3D(nn.Module):
    """One level of the UNet. Per layer: resnet, temporal conv, spatial transformer, temporal transformer;
    then the change of size, if any. rows: one (c_in, c_out) per layer; transformers: the number of layers
    that have both of them, from the first on.

    It has no forward: the UNet calls it layer by layer, because each layer pushes or pops a skip."""

    def __init__(self, rows, c, transformers, downsample=False, upsample=False):
        super().__init__()
        groups, width, emb_width = c.norm_num_groups, rows[0][1], 4 * c.block_out_channels[0]
        self.resnets = nn.ModuleList(ResnetBlock2D(*row, groups, c.norm_eps, emb_width) for row in rows)
        self.temp_convs = nn.ModuleList(TemporalConvLayer(width, groups) for _ in rows)
        self.attentions, self.temp_attentions = (
            nn.ModuleList(kind(width, width // c.attention_head_dim, c) for _ in range(transformers))
            for kind in (Transformer2DModel, TransformerTemporalModel))
        self.downsamplers = nn.ModuleList([Downsample2D(width, (1, 1, 1, 1))] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample2D(width)] if upsample else [])

    def layer(self, i, x, emb, text, frames, motion, call):
        """Layer i of this level, (B*F, c_in, H, W) -> (B*F, c_out, H, W); call(part, *inputs) calls a part.

        Checkpointing recomputes one part at a time: the activations of a whole layer would be the peak."""
        x = call(lambda x: self.temp_convs[i](self.resnets[i](x, emb), frames), x)
        if i < len(self.attentions):
            x = call(self.attentions[i], x, text)
            x = call(self.temp_attentions[i], x, frames, motion)
        return x


class TimestepEmbedding(nn.Module):
    """Diffusion step (B,) -> (B, 4C): sines and cosines of falling frequency, then two linear layers."""

    def __init__(self, channels):
        super().__init__()
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t):
        half, weight = self.linear_1.in_features // 2, self.linear_1.weight
        index = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * index / half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(weight.dtype)
        return self.linear_2(nnf.silu(self.linear_1(waves)))


class ResnetBlock2D(nn.Module):
    """norm, SiLU, conv, (+ diffusion step), norm, SiLU, conv, plus the input. (N,C,H,W) -> (N,C_out,H,W).

    emb: the embedded diffusion step, one row per sample of the batch (B, emb_width); in a video N = B*F and
    all frames of a clip share their row. The autoencoder, which has this block too, has none."""

    def __init__(self, c_in, c_out, groups, eps, emb_width=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if emb_width:
            self.time_emb_proj = nn.Linear(emb_width, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb=None):
        hidden = self.conv1(nnf.silu(self.norm1(x)))
        if emb is not None:
            shift = self.time_emb_proj(nnf.silu(emb))                                    # (B, C_out)
            hidden = hidden + shift.repeat_interleave(len(x) // len(emb), 0)[:, :, None, None]
        hidden = self.conv2(nnf.silu(self.norm2(hidden)))
        return hidden + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Downsample2D(nn.Module):
    """Halves H and W by a strided convolution. The autoencoder pads right and below, the UNet all round."""

    def __init__(self, channels, pad):
        super().__init__()
        self.pad = pad                                                              # left, right, top, bottom
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(nnf.pad(x, self.pad))


class Upsample2D(nn.Module):
    """Nearest neighbour to twice the size, or to `size` (H,W) where a skip asks for an odd one; then conv."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        return self.conv(nnf.interpolate(x, size or [2 * side for side in x.shape[-2:]], mode="nearest"))


class TemporalConvLayer(nn.Module):
    """Four times norm, SiLU, temporal convolution; plus the input. (B*F,C,H,W) -> the same.

    Source: ModelScope's text-to-video UNet. The norms run over all frames of a clip together."""

    def __init__(self, channels, groups):
        super().__init__()
        # conv2 to conv4 were trained with a dropout at place 2; something has to stay, the keys count it.
        for n in range(1, 5):
            self.add_module(f"conv{n}", nn.Sequential(
                nn.GroupNorm(groups, channels), nn.SiLU(), *([nn.Identity()] if n > 1 else []),
                nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))))

    def forward(self, x, frames):
        plane = to_plane(x, frames)
        for norm, silu, *_, conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            # Three neighbouring frames of one position: in the plane (F, H*W) a convolution for pictures.
            plane = nnf.conv2d(silu(norm(plane)), conv.weight.squeeze(-1), conv.bias, padding=(1, 0))
        return x + plane.transpose(1, 2).reshape(x.shape)


def to_plane(x, frames):
    """(B*F,C,H,W) -> (B,C,F,H*W): the frames of a clip as rows of one picture."""
    return x.flatten(2).unflatten(0, (-1, frames)).transpose(1, 2)


class SpatialTransformerBlock(nn.Module):
    """Self-attention within a frame, cross-attention to text, feed-forward; each on a norm, each added."""

    def __init__(self, width, heads, c):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, heads, c.attention_head_dim)
        self.attn2 = Attention(width, heads, c.attention_head_dim, c.cross_attention_dim)
        self.ff = FeedForward(width)

    def forward(self, x, text):                                                          # x (B*F, H*W, C)
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed, normed)
        # All frames of a clip read the same text: keys and values are computed once per clip, not per frame.
        normed = self.norm2(x).reshape(len(text), -1, x.shape[-1])                       # (B, F*H*W, C)
        x = x + self.attn2(normed, text, text).view_as(x)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """What both kinds share: norm, a linear layer in, one block of the kind, a linear layer out."""

    def __init__(self, channels, heads, c):
        super().__init__()
        width = heads * c.attention_head_dim
        self.norm = nn.GroupNorm(c.norm_num_groups, channels, 1e-6)
        self.proj_in, self.proj_out = nn.Linear(channels, width), nn.Linear(width, channels)
        self.transformer_blocks = nn.ModuleList([self.kind(width, heads, c)])


class Transformer2DModel(Transformer):
    """Transformer over the H*W positions of every frame, (B*F,C,H,W) -> the same; text (B,L,D)."""

    kind = SpatialTransformerBlock

    def forward(self, x, text):
        hidden = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))                   # (B*F, H*W, C)
        hidden = self.proj_out(self.transformer_blocks[0](hidden, text))
        return x + hidden.transpose(1, 2).unflatten(2, x.shape[2:])


class TransformerTemporalModel(Transformer):
    """Transformer over the F frames of every position, (B*F,C,H,W) -> the same."""

    kind = TemporalTransformerBlock

    def forward(self, x, frames, motion=None):
        hidden = self.norm(to_plane(x, frames)).permute(0, 3, 2, 1).contiguous()         # (B, H*W, F, C)
        hidden = self.proj_out(self.transformer_blocks[0](self.proj_in(hidden), x.shape[2:], motion))
        hidden = hidden.transpose(1, 2).flatten(0, 1)                                    # (B*F, H*W, C)
        return x + hidden.transpose(1, 2).unflatten(2, x.shape[2:])


class Attention(nn.Module):
    """Multi-head attention: three inputs, for Eq. 3, to one output of the first one's shape.

    q_in (..., queries, C); k_in and v_in (..., keys, C), or of the text's width D in place of C."""

    def __init__(self, width, heads, head_dim, context_width=None, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_dim, bias)
        self.to_k, self.to_v = (nn.Linear(context_width or width, heads * head_dim, bias) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, width)])    # a list: the keys are to_out.0.*

    def forward(self, q_in, k_in, v_in):
        # The fused kernels take one batch axis, so (B, H*W, F, C) is B*H*W sequences to them.
        q, k, v = (linear(x).flatten(0, -3).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for linear, x in ((self.to_q, q_in), (self.to_k, k_in), (self.to_v, v_in)))
        # softmax(q k^T / sqrt(head_dim)) v: (N, heads, queries, head_dim)
        x = nnf.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](x.transpose(1, 2).flatten(2)).unflatten(0, q_in.shape[:-2])


class FeedForward(nn.Module):
    """GEGLU: half of a projection times GELU of its other half; then a linear layer. (..., C) -> the same."""

    def __init__(self, width):
        super().__init__()
        # The keys are net.0.proj and net.2: the middle place was a dropout's, which has no weights.
        self.net = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(width, 8 * width)}), nn.Identity(),
                                  nn.Linear(4 * width, width)])

    def forward(self, x):
        # Two products with half of the matrix each, since halves of one product are slow: they do not lie in
        # one piece, and backward would have to join them.
        proj = self.net[0].proj
        value, gate = (nnf.linear(x, *half) for half in zip(proj.weight.chunk(2), proj.bias.chunk(2)))
        return self.net[2](value * nnf.gelu(gate))


# ---- Autoencoder: pictures <-> latents (Rombach et al., arXiv 2112.10752)

class VAEAttention(Attention):
    """One-head self-attention over all positions of a picture, (N,C,H,W) -> (N,C,H,W), plus the input."""

    def __init__(self, channels, groups):
        super().__init__(channels, heads=1, head_dim=channels, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, 1e-6)

    def forward(self, x):
        hidden = self.group_norm(x).flatten(2).transpose(1, 2)                           # (N, H*W, C)
        return x + super().forward(hidden, hidden, hidden).transpose(1, 2).view_as(x)


class VAEBlock(nn.Module):
    """A level of encoder or decoder: resnets, in the middle level attention after the first, then the change
    of size, if any. (N,C,H,W) -> (N,C_out,H',W')."""

    def __init__(self, rows, groups, attention=False, downsample=False, upsample=False):
        super().__init__()
        width = rows[0][1]
        self.resnets = nn.ModuleList(ResnetBlock2D(*row, groups, 1e-6) for row in rows)
        self.attentions = nn.ModuleList([VAEAttention(width, groups)] if attention else [])
        self.downsamplers = nn.ModuleList([Downsample2D(width, (0, 1, 0, 1))] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample2D(width)] if upsample else [])

    def forward(self, x):
        first, *others = self.resnets
        for layer in [first, *self.attentions, *others, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x


class VAEHalf(nn.Module):
    """Encoder, (N,3,h,w) -> (N,2C,H,W), or decoder, (N,C,H,W) -> (N,3,h,w): the encoder's levels backwards
    with one more resnet each. Every level but the last changes the size; the middle has the smallest."""

    def __init__(self, c, c_in, c_out, encoder):
        super().__init__()
        widths, groups = list(c.block_out_channels)[::1 if encoder else -1], c.norm_num_groups
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        levels, resize = nn.ModuleList(), "downsample" if encoder else "upsample"
        for before, width in zip([widths[0], *widths], widths):
            rows = level_rows(before, width, c.layers_per_block + (not encoder))
            levels.append(VAEBlock(rows, groups, **{resize: len(levels) < len(widths) - 1}))
        self.down_blocks, self.up_blocks = (levels, []) if encoder else ([], levels)
        middle = c.block_out_channels[-1]
        self.mid_block = VAEBlock(level_rows(middle, middle, 2), groups, c.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in [*self.down_blocks, self.mid_block, *self.up_blocks]:
            x = level(x)
        return self.conv_out(nnf.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Pictures <-> latents, 2**(levels-1) times smaller in h and w. Source: diffusers' AutoencoderKL.

    The latents here are unscaled; the diffusion model sees them times `scaling_factor`."""

    def __init__(self, config):
        super().__init__()
        c = read_config(
            "autoencoder", config, in_channels=3, out_channels=3, block_out_channels=(64,),
            layers_per_block=1, latent_channels=4, norm_num_groups=32, scaling_factor=0.18215,
            mid_block_add_attention=True,
            only=dict(act_fn="silu", shift_factor=None, latents_mean=None, latents_std=None,
                      use_quant_conv=True, use_post_quant_conv=True, _class_name="AutoencoderKL"))
        for field, kind in ("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D"):
            if set(config.get(field, [kind])) != {kind}:
                raise UserError(f"autoencoder config: {field} {config[field]}: only {kind} is implemented")
        self.scaling_factor, z = c.scaling_factor, c.latent_channels
        self.factor = 2 ** (len(c.block_out_channels) - 1)      # h / H
        self.encoder = VAEHalf(c, c.in_channels, 2 * z, encoder=True)
        self.decoder = VAEHalf(c, z, c.out_channels, encoder=False)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)

    def encode(self, x):
        """(N,3,h,w) in [-1,1] -> mean, logvar of a Gaussian, each (N,C,H,W); logvar clamped to [-30, 20]."""
        # Channels last, here and in `decode`: a third less time on a CPU.
        x = x.contiguous(memory_format=torch.channels_last)
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """z (N,C,H,W), unscaled -> (N,3,h,w)"""
        return self.decoder(self.post_quant_conv(z.contiguous(memory_format=torch.channels_last)))


def to_model_range(frames):
    """(F,h,w,3) uint8 -> (1,3,F,h,w) in [-1,1]"""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def to_uint8(video):
    """(3,F,h,w) in [-1,1] -> (F,h,w,3) uint8 numpy array"""
    return ((video + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu().numpy()


# ---- Text encoder: the text tower of CLIP (Radford et al., arXiv 2103.00020)

# OpenAI's CLIP approximates GELU; later ones have the exact one.
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": nnf.gelu}


class CLIPEncoderLayer(nn.Module):
    """Pre-norm transformer layer on (B,L,D). CLIP's towers are stacks of it; only text is causal: a token
    sees itself and those before. The vision tower, which judges results, is in eval_mi.py."""

    def __init__(self, c, causal):
        super().__init__()
        self.heads, self.causal, self.activation = c.num_attention_heads, causal, ACTIVATIONS[c.hidden_act]
        self.self_attn = nn.ModuleDict({name: nn.Linear(c.hidden_size, c.hidden_size)
                                        for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(c.hidden_size, c.layer_norm_eps) for _ in range(2))
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(c.hidden_size, c.intermediate_size),
                                  "fc2": nn.Linear(c.intermediate_size, c.hidden_size)})

    def forward(self, x):
        normed, attention = self.layer_norm1(x), self.self_attn
        q, k, v = (linear(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
        seen = nnf.scaled_dot_product_attention(q, k, v, is_causal=self.causal)       # (B, heads, L, D/heads)
        x = x + attention.out_proj(seen.transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(x))))


class CLIPTextTransformer(nn.Module):
    """Token and position embeddings, causal layers, final norm: ids (B,L) -> (B,L,D)."""

    def __init__(self, c):
        super().__init__()
        self.embeddings = nn.ModuleDict({
            "token_embedding": nn.Embedding(c.vocab_size, c.hidden_size),
            "position_embedding": nn.Embedding(c.max_position_embeddings, c.hidden_size)})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(CLIPEncoderLayer(c, causal=True)
                                                              for _ in range(c.num_hidden_layers))})
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, ids):
        x = self.embeddings.token_embedding(ids) + self.embeddings.position_embedding.weight[:ids.shape[1]]
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)


class CLIPTextModel(nn.Module):
    """The text encoder of Stable Diffusion and ZeroScope: ids (B,L) -> final, normed states (B,L,D).

    All L states go to cross-attention and nothing masks the padding: the pad token is part of the
    conditioning. Source: transformers' CLIPTextModel, whose keys these are."""

    def __init__(self, config):
        super().__init__()
        self.text_model = CLIPTextTransformer(read_config(
            "text encoder", config, vocab_size=49408, hidden_size=512, intermediate_size=2048,
            num_hidden_layers=12, num_attention_heads=8, max_position_embeddings=77, layer_norm_eps=1e-5,
            only=dict(hidden_act=tuple(ACTIVATIONS), architectures=(["CLIPTextModel"], None))))

    def forward(self, ids):
        return self.text_model(ids)


@torch.no_grad()
def encode_prompt(models, prompts):
    """list of B strings -> (B,L,D)"""
    return models.text_encoder(models.tokenizer(prompts).to(models.device))


# ---- Tokenizer: byte-pair encoding as in OpenAI's CLIP

def byte_alphabet():
    """256 printable characters, one per byte: BPE merges are text, and a raw byte may not be printable."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    shifted = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + n) for n, b in enumerate(shifted)}}


class CLIPTokenizer:
    """Text -> token ids (B, L): <|startoftext|>, BPE tokens, <|endoftext|>, padding to L = model_max_length.

    Source: OpenAI CLIP's simple_tokenizer (cleaning, word pattern, merges); the special tokens, and with them
    the pad token, are those of the configuration files, as in transformers' CLIPTokenizer."""

    WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")

    def __init__(self, vocab, merges, special=None, length=77, added=None):
        self.vocab, self.length = {**vocab, **(added or {})}, length
        self.rank = {pair: n for n, pair in enumerate(merges)}  # (left, right) -> priority, 0 is merged first
        self.alphabet = byte_alphabet()
        for token, number in self.vocab.items():
            if not isinstance(number, int) or number < 0:
                raise UserError(f"tokenizer: {number} cannot be the number of a token, as it is of {token!r}")
        start, end = "<|startoftext|>", "<|endoftext|>"
        names = [(special or {}).get(f"{use}_token") or (start if use == "bos" else end)
                 for use in ("bos", "eos", "unk", "pad")]
        # an entry is either the token itself or a dict that describes it
        names = [name["content"] if isinstance(name, dict) else name for name in names]
        self.bos, self.eos, self.unk, self.pad = (self.vocab[name] for name in names)
        # Special and added tokens are cut out of the prompt before BPE sees it, longer ones first. In SD 2
        # the pad token is "!", so "wow!!!" ends in three tokens "!" and not in the one BPE token "!!!".
        whole = {self.clean(name): self.vocab[name] for name in (*names, *(added or {}))}
        self.special = {name: whole[name] for name in sorted(filter(None, whole), key=len, reverse=True)}
        self.special_pattern = regex.compile("(" + "|".join(map(regex.escape, self.special)) + ")")

    @classmethod
    def from_pretrained(cls, folder):
        """Reads tokenizer.json, as transformers 5 writes it, or else vocab.json and merges.txt; where they
        are there, added_tokens.json, tokens of textual inversion, and two files with special tokens and the
        length. Without a length, or with transformers' 1e30 for "none", it is CLIP's 77."""
        def optional(name):
            return read_json(folder / name) if (folder / name).is_file() else {}

        folder = Path(folder)
        whole, added = optional("tokenizer.json"), optional("added_tokens.json")
        if whole:
            vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]  # "left right" or [left, right]
            added |= {entry["content"]: entry["id"] for entry in whole["added_tokens"]}
        else:
            vocab = read_json(folder / "vocab.json")
            with built_from(folder / "merges.txt"):
                lines = (folder / "merges.txt").read_text(encoding="utf-8-sig").split("\n")
            merges = [line for line in lines if line.strip() and not line.startswith("#version")]
        told = {**optional("tokenizer_config.json"), **optional("special_tokens_map.json")}
        length = told.get("model_max_length") or 77
        merges = [tuple(m.split() if isinstance(m, str) else m) for m in merges]
        return cls(vocab, merges, told, 77 if length > 1e6 else int(length), added)

    @staticmethod
    def clean(prompt):
        """As OpenAI's CLIP: repair Unicode, resolve HTML entities twice, collapse spaces, lower case."""
        prompt = html.unescape(html.unescape(ftfy.fix_text(prompt)))
        return unicodedata.normalize("NFC", " ".join(prompt.split()).lower())

    @functools.lru_cache(maxsize=4096)
    def bpe(self, word):
        """The token ids of a word: from single bytes, join the pair of lowest rank until none is left."""
        parts = [self.alphabet[b] for b in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda p: self.rank.get(p, math.inf))
            if pair not in self.rank:
                break
            for i in range(len(parts)):          # left to right; the list becomes shorter with every join
                if tuple(parts[i:i + 2]) == pair:
                    parts[i:i + 2] = ["".join(pair)]
        return [self.vocab.get(p, self.unk) for p in parts]

    @functools.lru_cache(maxsize=4096)                           # so that its note comes once, too
    def encode(self, prompt):
        """Token ids of one string, at most L - 2, without start, end and padding. Says if it cuts any."""
        ids, most = [], self.length - 2
        for piece in self.special_pattern.split(self.clean(prompt)):
            if piece in self.special:
                ids.append(self.special[piece])
            else:
                ids += itertools.chain.from_iterable(map(self.bpe, self.WORDS.findall(piece)))
        if len(ids) > most:
            print(f"note: the model reads {most} of the {len(ids)} tokens of {prompt[:60]!r}")
        return ids[:most]

    def __call__(self, prompts):
        """list of B strings -> LongTensor (B, L), padded and truncated to L."""
        rows = [[self.bos, *self.encode(prompt), self.eos] for prompt in prompts]
        return torch.tensor([row + [self.pad] * (self.length - len(row)) for row in rows])


# ============================================================================================================
#   PLUMBING: embeddings at other sizes, files, checkpoints, hub, video, pictures
# ============================================================================================================

# ---- Motions at other sizes and in files

def resized(m, trained_frames, trained_grid, frames, grid):
    """An embedding (1 or H*W, F, C) for another number of frames or grid (H, W) than it was trained on.

    trained_frames, trained_grid: F and (H, W); None where a file of the authors did not say."""
    if trained_frames is None:                                   # their code takes the first slots of a file
        if frames > m.shape[1]:
            raise UserError(f"the motion file has slots for {m.shape[1]} frames, not for {frames}")
        m = m[:, :frames]
    elif frames != trained_frames:
        # align_corners: first and last frame stay what they are, and a steady drift stays steady.
        m = nnf.interpolate(m.transpose(1, 2), frames, mode="linear", align_corners=True).transpose(1, 2)
    if len(m) == 1 or trained_grid == tuple(grid):
        return m
    if trained_grid is None and len(m) != math.prod(grid):
        raise UserError(f"the motion file was made for {len(m)} positions and does not say in which shape; "
                        f"this size has {grid[0]}x{grid[1]}: use the --size that it was trained with")
    plane = m.permute(1, 2, 0).unflatten(2, trained_grid or tuple(grid))                 # (F, C, H, W)
    plane = nnf.interpolate(plane, tuple(grid), mode="bilinear", align_corners=False)
    return plane.flatten(2).permute(2, 0, 1)


def check_fits(motion, unet, frames=None, height=None, width=None):
    """UserError if embeddings are of another UNet or, if given, cannot be brought to F and latents (H, W)."""
    for block in motion.grids:
        level, channels = unet.motion_sites.get(block, (0, "no place"))
        for m in motion.get_submodule(block).parameters():
            if m.shape[-1] != channels:
                raise UserError("these embeddings do not fit the model, use the one they were made with: "
                                f"{block} has width {m.shape[-1]} in the file, {channels} in the model")
        for which in ("attn1", "attn2") if frames else ():
            motion.at(block, which, level_grid(height, width, level), torch.empty(1, 1, frames, 1))


def read_motion(path):
    """A motion file -> MotionEmbeddings in eval mode: safetensors by `save`, or the authors' motion_embed.pt.

    In the authors' files the slots beyond the trained frames are zero, so the last one in use tells F.
    UserError: other tensors, values that are not finite, settings that cannot be."""
    ours = Path(path).suffix == ".safetensors"
    tensors, metadata = read_safetensors(path) if ours else (load_tensors(path), {})
    with built_from(path, "has settings or tensors that cannot be read"):
        about = json.loads(metadata.get("mini_mi", "{}"))                            # the authors say nothing
        frames, grids = about.get("frames"), about.get("grids", {})
        if not about:
            used = torch.cat([m.float().abs().amax((0, 2)).nonzero().flatten() for m in tensors.values()])
            slots = max(m.shape[1] for m in tensors.values())
            frames = int(used.max()) + 1 if len(used) and used.max() + 1 < slots else None
            tensors = {key: m[:, :frames] for key, m in tensors.items()}
        settings = dict(use_mqk=any(key.endswith("pos_embed") for key in tensors),
                        use_mv=any(key.endswith("vSpatial") for key in tensors))
        settings |= {name: about[name] for name in MotionEmbeddings.SETTINGS if name in about}
        motion = MotionEmbeddings(None, frames, **settings)
        motion.source = dict(about.get("source", {}))
        for key, m in tensors.items():
            found = re.fullmatch(r"(.+)\.(pos_embed|attn[12]\.vSpatial)", key)
            if not found:
                raise UserError("not a motion file: its keys must end in pos_embed or vSpatial")
            grid = grids.get(found[1])
            motion.grids[found[1]] = tuple(grid) if grid else None
            positions = (1, math.prod(grid)) if grid else (len(m),)
            if m.dim() != 3 or len(m) not in positions or frames not in (None, m.shape[1]):
                raise UserError(f"{key} has the shape {tuple(m.shape)}, which does not fit "
                                f"{frames or 'any number of'} frames on the grid {grid}")
            if not m.isfinite().all():
                raise UserError(f"{key} has values that are not finite; train the motion again")
            motion.add(key, m.float())
        return motion.eval()


# ---- Files: written beside their place and renamed; configs and tensors are read without trusting the file

def one_line(error):
    """The first line of what the system or another library says, to end a message of ours with."""
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]


def is_lack_of_memory(error):
    """Python has a class for it; torch, drivers and CUDA's libraries are recognised by their message."""
    said = re.search("out of memory|allocate memory|ALLOC_FAILED", str(error))
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(said)


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path of the same name, moved to `path` when the block succeeds, else deleted: nobody
    meets a part of a file. The folder is created. UserError: no room, or the place cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:     # on the same disk
            yield Path(folder) / path.name
            os.replace(Path(folder) / path.name, path)
    except OSError as error:
        why = one_line(error)
        raise UserError(f"cannot write {path} ({why}): make room or choose another place") from error


@contextlib.contextmanager
def built_from(path, problem="cannot be used", advice="get it again"):
    """Wraps whatever is built from a file: any failure becomes one UserError that names the file, but for a
    lack of memory and a broken pipe, which pass through."""
    try:
        if os.path.isfile(path) and os.path.getsize(path) < 500 and b"//git-lfs" in Path(path).read_bytes():
            raise UserError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull` there")
        yield
    except Exception as error:
        if is_lack_of_memory(error) or isinstance(error, BrokenPipeError):
            raise
        if isinstance(error, UserError) and str(path) in str(error):     # a file in it is named already
            raise
        if isinstance(error, UserError):
            raise UserError(f"{path}: {error}") from error
        if getattr(error, "strerror", None):                             # the file system's own errors
            raise UserError(f"{path} cannot be read ({error.strerror}); {advice}") from error
        said = textwrap.shorten(f"{type(error).__name__}: {error}", 300)  # torch names bad keys on many lines
        raise UserError(f"{path} {problem} ({said}); {advice}") from error


def read_json(path):
    """The JSON object in a file, as a dict. UserError: missing, not JSON, not an object."""
    with built_from(path, "is not a valid JSON object"):
        return {**json.loads(Path(path).read_text(encoding="utf-8-sig"))}  # some editors begin with a mark


def read_config(kind, config, only, **fields):
    """The settings of a model as a namespace: field=default as in the reference library, unless in `config`.

    only: {field: what is implemented, a value or a tuple of them, the default first}. Fields that are not
    named here are ignored: the strict load finds what adds weights."""
    settings = {}
    for field, known in only.items():
        known = known if isinstance(known, tuple) else (known,)
        settings[field] = config.get(field, known[0])
        if settings[field] not in known:
            raise UserError(f"{kind} config: {field} = {settings[field]} is not implemented, only {known}")
    for field, default in fields.items():
        value = config.get(field, default)
        # Numbers are converted here; other wrong types fail where the part is built.
        settings[field] = type(default)(value) if type(default) in (int, float) else value
    return SimpleNamespace(**settings)


SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """({name: tensor}, metadata). On disk: 8 bytes little-endian header length, JSON header, raw data."""
    with built_from(path, "is damaged, truncated or no safetensors file"):
        try:
            whole = np.memmap(path, np.uint8, "c")                      # pages load when they are used
        except OSError:
            whole = np.fromfile(path, np.uint8)                         # some file systems cannot map files
        start = 8 + int.from_bytes(whole[:8].tobytes(), "little")
        header, data, tensors = json.loads(whole[8:start].tobytes()), torch.from_numpy(whole)[start:], {}
        metadata = header.pop("__metadata__", {})
        begins, ends = zip(*sorted(entry["data_offsets"] for entry in header.values()))
        if (0, *ends) != (*begins, len(data)):
            raise ValueError(f"its tensors leave gaps or overlap, or do not end at byte {len(data)}")
        for name, entry in header.items():
            raw, dtype = data[slice(*entry["data_offsets"])], SAFETENSORS_DTYPES[entry["dtype"]]
            if raw.storage_offset() % dtype.itemsize:
                raw = raw.clone()                                       # not every writer aligns
            tensors[name] = raw.view(dtype).reshape(entry["shape"])
    return tensors, metadata


def load_tensors(path):
    """{name: tensor on the CPU} from .safetensors, or from a pickle (.bin, .pt, .pth), which is a program:
    torch refuses every call in it but the few that build tensors. UserError: damaged, or of another form."""
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path)[0]
    with built_from(path, "was refused: it is damaged, or holds code or objects beside a dict of tensors"):
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.detach() for name, tensor in tensors.items()}


def save_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} and optional {str: str} metadata as safetensors, atomically; dtypes are kept."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": metadata or {}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[begin, end])
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)                    # programs that map the file need the data aligned
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


# ---- Checkpoints: folders in diffusers layout

ALIASES = {"zeroscope": "cerspense/zeroscope_v2_576w"}
PARTS = {"text_encoder": CLIPTextModel, "vae": AutoencoderKL, "unet": UNet3DConditionModel}    # with weights
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before mid-2023


@dataclasses.dataclass
class Models:
    """The five parts of a text-to-video model. The networks are frozen and in eval mode."""
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet3DConditionModel
    scheduler: DDIMScheduler
    device = property(lambda self: self.unet.conv_in.weight.device, doc="Where the networks are.")
    dtype = property(lambda self: self.unet.conv_in.weight.dtype, doc="Number format of the UNet's weights.")


def weight_files(names, part=""):
    """Those of the files `names` with the weights of a part, PART/ or "": one, or all N of NAME-n-of-N.EXT;
    safetensors before pickles, full precision before ".fp16". UserError: there are none, or not all N."""
    for form in (r"(diffusion_pytorch_)?model\.safetensors", r"(diffusion_pytorch_)?model\.fp16\.safetensors",
                 r"(diffusion_)?pytorch_model\.bin", r"(diffusion_)?pytorch_model\.fp16\.bin"):
        found = sorted(name for name in names if re.fullmatch(part + form, re.sub(r"-\d+-of-\d+", "", name)))
        whole = [name for name in found if "-of-" not in name]
        if whole or found and f"-of-{len(found):05}" in found[0]:     # a piece's name says how many there are
            return whole or found
    raise UserError(f"no weights, such as {part}model.safetensors, or not all pieces: this is no whole model")


def load_module(build, folder, device, dtype):
    """build(config.json of `folder`) with its weights, see weight_files. Frozen, in eval mode."""
    tensors = {}
    with built_from(folder, "is damaged, or does not fit its config.json"):
        with torch.device("meta"):                                        # no memory for what gets replaced
            module = build(read_json(folder / "config.json"))
        expected = module.state_dict()
        for name in weight_files(os.listdir(folder)):
            for key, value in load_tensors(folder / name).items():
                # Every tool that writes 8-bit weights keeps their scales in a way of its own.
                if value.itemsize == 1 or not value.isfinite().all():
                    raise UserError(f"{name} holds {value.dtype} numbers in {key}, or some that are not "
                                    "finite: get its float16 or float32 weights")
                for old, new in OLD_ATTENTION.items():
                    key = key.replace(f".{old}.", f".{new}.")
                if f"text_model.{key}" in expected:                        # transformers 5 leaves it out
                    key = f"text_model.{key}"
                if not key.endswith(".position_ids"):      # 0, 1, 2, ..., which old text encoders store
                    tensors[key] = value
        module.load_state_dict(tensors, strict=True, assign=True)
    parameters = sum(value.numel() for value in tensors.values())
    print(f"loaded {len(tensors)} tensors, {parameters:,} parameters: {folder.name}")
    return module.to(device, dtype).eval().requires_grad_(False)


def model_folder(model, weights=True):
    """The folder of a model: one of data/, any other with unet/ in it, or what `fetch` gets from the hub."""
    for folder in (HERE / "data" / model, Path(model)):
        if (folder / "unet").is_dir():
            return folder
    return fetch(model, *PARTS, "tokenizer", "scheduler", weights=weights)


def load_models(folder_or_repo, device="cpu", dtype=torch.float32):
    """Models from a folder in diffusers layout or from a hub repository; `dtype` is not the autoencoder's:
    in float16 it can overflow, and it costs little next to the UNet, so it stays float32."""
    folder = model_folder(folder_or_repo)
    networks = [load_module(build, folder / part, device, torch.float32 if part == "vae" else dtype)
                for part, build in PARTS.items()]
    with built_from(folder, "is damaged, or its text encoder does not fit the tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        scheduler = DDIMScheduler(read_json(folder / "scheduler" / "scheduler_config.json"))
        models = Models(tokenizer, *networks, scheduler)
        # The last token, in every CLIP a special one, is tried: that the encoder lacks it would show late.
        text = encode_prompt(models, [max(tokenizer.vocab, key=tokenizer.vocab.get)])
        if text.shape[-1] != models.unet.config.get("cross_attention_dim", 1024):
            raise UserError("its text encoder and its UNet do not fit: take both from one model")
    return models


# ---- Hub: files of a repository, fetched into the cache of huggingface_hub, which can use them as well

HUB_HOME = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface")     # expanded at use: some have no home


def needed_files(names, parts, weights):
    """Those of the files `names` that these parts of a model need. Weights come last: an interrupted download
    does not look whole. UserError: a part is missing."""
    needed = [name for name in names
              if name.endswith((".json", ".txt")) and os.path.dirname(name) in ("", *parts)]
    for part in parts:
        if part not in map(os.path.dirname, needed):
            raise UserError(f"no files in {part}/: this is no whole model in diffusers layout")
        if weights and part in ("", *PARTS):
            needed += weight_files(names, part and f"{part}/")
    return needed


def hub_open(path, **headers):
    """The hub's open answer to a GET. Other hosts, to which it sends on for large files, see no token."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    stored = HUB_HOME.expanduser() / "token"                            # by `hf auth login`
    token = os.environ.get("HF_TOKEN") or (stored.read_text() if stored.is_file() else "")
    request = urllib.request.Request(f"{endpoint}/{path}", headers=headers)
    if token.strip():                         # quoted: what is no token goes to the hub and not into an error
        request.add_unredirected_header("Authorization", f"Bearer {quote(token.strip(), safe='+/=')}")
    return urllib.request.urlopen(request, timeout=30)


def download(path, target, listed):
    """Bring `path` of the hub to `target` by way of a .part, which a later call continues; check the whole.
    Processes may do this at once: they write the same bytes to the same places; none ever truncates it."""
    size, sha256 = listed["size"], listed.get("lfs", {}).get("sha256")       # large files alone have a hash
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    with open(part, "r+b") as file:
        begin, end = -1, file.seek(0, os.SEEK_END)
        while begin < end < size:                              # ask again as long as an answer brings more
            begin = end
            with (hub_open(path, Range=f"bytes={begin}-") as answer, tqdm.wrapattr(
                      file, "write", size, initial=begin, desc=part.stem, disable=not sha256) as watched,
                  contextlib.suppress(ConnectionError, TimeoutError)):
                shutil.copyfileobj(answer, watched, 1 << 20)
            end = file.tell()
        if end < size:
            raise ConnectionError(f"the connection ended at byte {end} of {size}")
        digest = hashlib.sha256()
        file.seek(0)
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    if end > size or sha256 not in (None, digest.hexdigest()):
        part.unlink(missing_ok=True)
        raise UserError(f"{path} arrived damaged and was deleted: run it again, or check HF_ENDPOINT")
    if not target.is_file():                                   # else another process was faster
        os.replace(part, target)


def fetch(repo, *parts, weights=True):
    """The folder of a hub repository (owner/name[@revision]) with the files that these parts of a model need,
    such as "unet"; "" is the root, for a CLIP. A snapshot that has them is taken without asking the hub.
    Environment: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE. UserError: they cannot be had."""
    repo, _, revision = str(repo).partition("@")
    repo, revision = ALIASES.get(repo, repo), revision or "main"
    valid = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*@\w[\w./-]*", f"{repo}@{revision}")
    if not valid or ".." in revision or os.path.exists(repo):
        raise UserError(f"{repo} is no model folder, with unet/ in it, and no hub repository (owner/name)")
    with built_from(repo, "cannot be fetched", "check the network, its name, HF_ENDPOINT, the room in "
                    "HF_HOME and, if it is gated, HF_TOKEN; the next run goes on with what came"):
        store = HUB_HOME.expanduser() / "hub" / f"models--{repo.replace('/', '--')}"
        ref = store / "refs" / revision                          # holds the commit that it was
        commit = ref.read_text("utf-8").strip() if ref.is_file() else revision
        folder = store / "snapshots" / commit
        with contextlib.suppress(UserError):
            here = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            needed_files(here, parts, weights)
            return folder
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise UserError(f"{folder} is not whole, and HF_HUB_OFFLINE forbids to fetch it: unset it")
        with hub_open(f"api/models/{repo}/revision/{quote(commit, safe='')}?blobs=true") as answer:
            listed = json.load(answer)
        folder = store / "snapshots" / re.fullmatch(r"\w+", listed["sha"])[0]
        files = {file["rfilename"]: file for file in listed["siblings"]}
        for name in needed_files(files, parts, weights):
            if not (folder / name).is_file():
                download(f"{repo}/resolve/{folder.name}/{quote(name)}", folder / name, files[name])
        with atomic_write(ref) as temporary:
            temporary.write_text(folder.name)
        return folder


# ---- Video: PIL for GIF, WebP, APNG and folders of pictures; the program ffmpeg for everything else

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
IMAGE_STARTS = (b"GIF8", b"\x89PNG", b"\xff\xd8", b"BM", b"II*\0", b"MM\0*")  # content, not suffix
# HDR to SDR: light is made linear with SDR's white (203 cd/m2, ITU-R BT.2408) at 1; brighter is compressed.
SDR = ("zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:param=0.9:desat=0,"
       "zscale=t=bt709:m=bt709:r=tv,format=yuv420p")


@contextlib.contextmanager
def open_picture(path):
    """A picture file, opened by PIL: these formats alone, since for EPS it runs Ghostscript."""
    with built_from(path, "is damaged, truncated or no picture"):
        with Image.open(path, formats=("GIF", "WEBP", "PNG", "JPEG", "BMP", "TIFF")) as image:
            yield image


def fit(image, size):
    """PIL image -> (h,w,3) uint8, upright, on white, scaled (bicubic) to cover `size`, cropped to the centre.

    16-bit grey: 65535 is white; floats: 1.0 is white; other ranges are refused."""
    image, white = ImageOps.exif_transpose(image), 1 if image.mode == "F" else 65535
    check_crop(image.size, size)
    if image.mode[0] in "IF":                              # I;16, I;16B, I (16-bit PNG in older PIL), F
        values = np.asarray(image, dtype=np.float64)
        if not (values.min() >= 0 and values.max() <= white):
            raise UserError(f"grey values from {values.min():g} to {values.max():g}: "
                            f"0 to {white} can be read in this format; save it with 8 bits")
        image = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC))


@functools.cache                                                          # so that the note comes once
def check_crop(stored, size):
    """UserError if pictures of `stored` = (width, height) pixels are too small to show motion; a note if the
    crop to `size` takes away more than a fifth of a side."""
    if min(stored) < 8:
        raise UserError(f"frames of {stored} pixels: 8 x 8 are the least")
    across, down = np.divide(size, stored)                             # the larger one is the scale in `fit`
    lost = 1 - min(across, down) / max(across, down)
    if lost > 0.2:
        # The same shape in about as many pixels; autoencoders take multiples of 8.
        width, height = (max(8, 8 * round(pixels * math.sqrt(across * down) / 8)) for pixels in stored)
        print(f"note: the crop takes away {lost:.0%} of the {'width' if across < down else 'height'}: "
              f"--size {width}x{height} keeps it")


def evenly(times, frames, start, duration):
    """Indices of `frames` stored frames: number i is shown at start + (i + 1/2) * duration / frames seconds.

    The stored frames begin at `times`, of which the last entry is the end."""
    end, begin = times[-1], max(start, times[0])
    stop = end if duration is None else start + duration
    slack = (end - times[0]) / (10 * (len(times) - 1))          # a tenth of a frame: files round their times
    if start >= end or stop > end + 0.1:                                         # lengths are told rounded
        raise UserError(f"it is {end:.2f} s long: --start {start:g} and --duration go beyond")
    stop = min(stop, end)
    moments = begin + (stop - begin) * np.array([0, *np.arange(frames) + 0.5]) / frames
    first, *shown = np.clip(np.searchsorted(times, moments + slack, "right") - 1, 0, len(times) - 2)
    stored = int(np.searchsorted(times[:-1], stop - slack) - first)
    if stored < frames:
        raise UserError(f"it has {stored} frame{'s' * (stored != 1)}, but {frames} are needed: "
                        "take a longer clip, a longer part of it or fewer frames")
    return shown


def read_animation(path, size, *part):
    """Frames of a GIF, WebP or APNG. One that is held for k times the shortest duration counts as k: writers
    merge equal neighbours into one longer frame, which is undone here."""
    with open_picture(path) as image:
        # An APNG may begin with a still for old viewers that is no part of the clip.
        first, lasts = 1 if image.info.get("default_image") else 0, []
        stored = range(first, getattr(image, "n_frames", 1))
        for index in stored:
            image.seek(index)
            image.load()                                                 # WebP has no durations before that
            lasts.append(float(image.info.get("duration") or 100) / 1000)                # 0 means "as usual"
        ticks = np.rint(np.array(lasts) / min(lasts)).astype(int)
        times = np.cumsum([0, *np.repeat(lasts / ticks, ticks)])
        chosen = np.repeat(stored, ticks)[evenly(times, *part)]
        return [fit(ImageSequence.Iterator(image)[index], size) for index in chosen]


def read_folder(path, size, *part):
    """Frames of a folder of pictures in the order of the numbers in their names: 0.25, 0.5, 2, 10."""
    pictures = [p for p in path.glob("[!.]*") if p.suffix.lower() in IMAGE_SUFFIXES]
    if not pictures:
        raise UserError(f"no picture lies directly in it: {', '.join(IMAGE_SUFFIXES)} can be read")
    if len({p.stem for p in pictures}) < len(pictures):                  # 00000.jpg and its mask 00000.png
        raise UserError("it has two pictures of one number: put masks into a folder of their own")
    stored = set()
    for picture in pictures:
        with open_picture(picture) as image:
            stored.add(image.size)
    if len(stored) > 1:
        raise UserError(f"it mixes frames of {' and '.join(map(str, sorted(stored)))}: make them one size")
    # The parts between the numbers come at even places, the numbers at odd ones.
    order = sorted(sorted(pictures), key=lambda picture: [
        Decimal(part) if n % 2 else part.lower()
        for n, part in enumerate(re.split(r"([0-9]+(?:\.[0-9]+)?)", picture.stem))])
    frames = []
    for index in evenly(np.arange(len(order) + 1), *part):
        with open_picture(order[index]) as image:                        # the first of its pages, if several
            frames.append(fit(image, size))
    return frames


def call_ffmpeg(*arguments, data=b""):
    """Runs ffmpeg: (did it succeed, its first complaint, all it printed). UserError: it does not work."""
    try:
        done = subprocess.run(["ffmpeg", "-nostats", "-v", "level+info", *arguments], input=data,
                              capture_output=True)
    except OSError as error:
        raise UserError(f"this needs the program ffmpeg, which cannot be started ({one_line(error)}): "
                        "install it, or use .gif or .webp") from error
    printed = done.stderr.decode(errors="replace")
    # What its muxers of raw frames say does not count: equal time stamps are no fault here.
    complaints = re.findall(r"^(?:\[(?!null|rawvideo)[^]]*\] )?\[(?:error|fatal)\] (.*)", printed, re.M)
    if done.returncode and not complaints:
        last = (printed.strip() or "no message").splitlines()[-1]
        raise UserError(f"the program ffmpeg does not work (exit status {done.returncode}, {last}): "
                        "install it again, or use .gif or .webp")
    return done.returncode == 0, (complaints or [""])[0], printed


def read_film(path, size, frames, start, duration):
    """Frames of a video file, upright, with square pixels, in SDR.

    ffmpeg writes all frames of the part, scaled, into a temporary file, and says when each of them is shown.
    """
    (width, height), film = size, ["-i", f"file:{path}", "-map", "0:V:0"]
    first_look = call_ffmpeg(*film, "-frames:v", "1", "-f", "null", "-")[2]
    hdr = re.search("smpte2084|arib-std-b67", first_look)
    if hdr and "--enable-libzimg" not in first_look:
        raise UserError(f"{path} is HDR video, and this ffmpeg lacks zscale to convert it: with another "
                        f"one, ffmpeg -i {path} -vf {SDR} sdr.mp4")
    # ffmpeg's own decoders of VP8 and VP9 drop transparency.
    alpha = re.search(r"Video: (vp[89])[^#]* alpha_mode +: 1", first_look, re.IGNORECASE)
    decoder = ["-c:v", {"vp8": "libvpx", "vp9": "libvpx-vp9"}[alpha[1]]] if alpha else []
    # Each stored frame comes once. The option's name is another one since ffmpeg 5.1.
    rate_option = "-vsync" if re.search(r"ffmpeg version n?([1-4]|5\.0)\b", first_look) else "-fps_mode"
    # A second more than the part on either side: what is shown when it begins, and whether it ends within.
    trim = f"trim=start={start - 1}" + (f":end={start + duration + 1}" if duration else "")
    filters = (f"{trim},{SDR + ',' if hdr else ''}scale=iw*sar:ih,setsar=1,showinfo=checksum=0,"
               f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=bicubic+accurate_rnd,"
               f"format=rgba,crop={width}:{height}")
    with tempfile.TemporaryDirectory() as folder:
        raw = f"{folder}/frames.rgb"                                    # by its name raw pixels to ffmpeg
        fine, said, log = call_ffmpeg(*decoder, *film, "-vf", filters, rate_option, "passthrough", raw)
        shown = re.findall(r"pts_time:(\S+) .* s:(\d+)x(\d+) ", log)
        said = said.removeprefix(f"file:{path}: ") or (not shown) * f"no frames after second {start:g}"
        if re.search("partial file|prematurely|Invalid NAL unit size", said):
            raise UserError(f"ffmpeg says: {said}; it is damaged or cut off, get it again")
        if not fine or not shown:
            raise UserError(f"ffmpeg says: {said}; give a video file, a GIF or a folder of images")
        if said:
            print(f"note: ffmpeg says of {path}: {said}")
        check_crop(tuple(map(int, shown[0][1:])), size)
        # Frames with the same time stamp share the time until the next one. The last frame stays as long as
        # the one before it: containers tell its length badly or not at all.
        stamps, first = np.unique(np.maximum.accumulate([float(s) for s, *_ in shown]), return_index=True)
        end = stamps[-1] + (stamps[-1] - stamps[-2] if len(stamps) > 1 else 0.04)
        times = np.interp(np.arange(len(shown) + 1), [*first, len(shown)], [*stamps, end])
        length = 4 * width * height
        pixels = (np.fromfile(raw, np.uint8, length, offset=n * length).reshape(height, width, 4)
                  for n in evenly(times, frames, start, duration))
        return [fit(Image.fromarray(frame), size) for frame in pixels]


def read_video(path, frames, size, start=0.0, duration=None):
    """Read a clip as (F,h,w,3) uint8, where F = `frames` and `size` = (width, height) in pixels.

    Frame i is the one shown at start + (i + 1/2) * duration / F seconds; without `duration`, all that follow.
    Each is scaled until it covers `size`, then cropped to the centre; transparent is white.
    UserError: fewer stored frames than that, and everything that cannot be decoded."""
    if re.search("https?:/", str(path)):
        raise UserError(f"{path} is a web address: download the video first, and give the file")
    with built_from(path, "cannot be read", "give a video file, a GIF or a folder of images"):
        path, reader = Path(path).expanduser(), read_folder
        if not path.is_dir():
            begin = path.open("rb").read(12)
            if not begin:
                raise UserError("the file is empty")
            picture = begin.startswith(IMAGE_STARTS) or begin[:4] + begin[8:] == b"RIFFWEBP"
            reader = read_animation if picture else read_film
        elif start or duration:
            raise UserError("it holds pictures, which have no times: take a folder of those wanted")
        return np.stack(reader(path, size, frames, start, duration))


def write_video(path, frames, fps):
    """Write (F,h,w,3) uint8 `frames` at `fps` frames per second as .gif, .webp (lossless) or .mp4.

    PIL merges equal neighbours into one longer frame. An mp4 of odd size repeats its last row or column.
    UserError: another suffix, no ffmpeg, unwritable."""
    suffix, (height, width) = Path(path).suffix.lower(), frames.shape[1:3]
    if suffix not in (".gif", ".webp", ".mp4"):
        raise UserError(f"cannot write {path}: its name should end in .gif, .webp or .mp4")
    with atomic_write(path) as temporary:
        if suffix == ".mp4":
            # yuv420p keeps colour for pairs of pixels. Without tags, players guess the colour space.
            frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
            fine, said, _ = call_ffmpeg(
                "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-r", str(fps), "-s",
                f"{frames.shape[2]}x{frames.shape[1]}", "-i", "-", "-vf",
                "scale=out_color_matrix=bt709:out_range=tv", "-pix_fmt", "yuv420p", "-colorspace", "bt709",
                "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv", "-b:v", "8M",
                "-movflags", "+faststart", f"file:{temporary}", data=frames.tobytes())
            if not fine:
                raise UserError(f"cannot write {path}, ffmpeg says: {said}")
            return
        images, unit = [Image.fromarray(frame) for frame in frames], 1
        if suffix == ".gif":
            # One palette for all frames and no dithering: what stands still does not flicker.
            unit, some = 10, frames.reshape(-1, 1, 3)[:: frames.size // 2**18 | 1]  # a sample is enough
            palette = Image.fromarray(np.ascontiguousarray(some)).quantize(255, kmeans=1)
            images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
        # Durations are whole hundredths of a second (GIF) or milliseconds, and add up to the right length.
        ends = np.rint(1000 / fps / unit * np.arange(len(frames) + 1)).astype(int) * unit
        lasts = np.maximum(np.diff(ends), 2 * unit).tolist()
        images[0].save(temporary, save_all=True, append_images=images[1:], loop=0, duration=lasts,
                       optimize=False, lossless=True, quality=50)        # quality: WebP's effort


# ---- Pictures: frames under their labels

def caption(label, width, lines):
    """(18*lines+6, width, 3) uint8: `label` on white, wrapped, ending in "..." where it needs more lines."""
    font, strip = ImageFont.load_default(14), Image.new("RGB", (width, 18 * lines + 6), "white")
    wrapped = textwrap.fill(label, int(width / font.getlength("n")), max_lines=lines, placeholder="...")
    ImageDraw.Draw(strip).multiline_text((4, 2), wrapped, "black", font, spacing=4)
    return np.asarray(strip)


def framed(video, width):
    """(F,h,w,3) uint8 enlarged by a whole number to about `width` pixels or reduced to it, with a margin."""
    scale = round(width / video.shape[2]) or width / video.shape[2]
    size = [max(1, round(side * scale)) for side in (video.shape[2], video.shape[1])]
    frames = np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in video])
    return np.pad(frames, ((0, 0), (0, 0), (0, 6), (0, 0)), constant_values=255)


def side_by_side(videos, labels):
    """(F,height,width,3) uint8: clips (F,h,w,3) of one size in a row under labels, enlarged when tiny."""
    videos = [framed(video, max(192, video.shape[2])) for video in videos]  # 192 pixels: a label can be read
    strip = np.hstack([caption(label, clip.shape[2], 3) for label, clip in zip(labels, videos, strict=True)])
    return np.stack([np.vstack([strip, np.hstack(row)]) for row in zip(*videos, strict=True)])


def contact_sheet(rows):
    """PIL image with a row per (label, video (F,h,w,3) uint8), of one size: up to 8 frames, first to last."""
    strips = []
    for label, video in rows:
        chosen = np.linspace(0, len(video) - 1, min(8, len(video))).round().astype(int)
        tiles = np.pad(framed(video[chosen], 192), ((0, 8 - len(chosen)), (0, 6), (0, 0), (0, 0)),
                       constant_values=255)
        strips += [caption(label, 8 * tiles.shape[2], 1), np.hstack(tiles)]
    return Image.fromarray(np.vstack(strips))


# ============================================================================================================
#   COMMAND LINE: the settings in their layers, and `run`, the main job
# ============================================================================================================

HERE = Path(__file__).resolve().parent
DEFAULT_CLIP = "pendulum_2"         # of data/clips, the one that inverted noise alone (`base`) follows least
INVERT_STEPS = 50                   # of the DDIM inversion, whatever --sample-steps is: the authors'


def option(group, default, about, least=-math.inf, most=math.inf, flag=None, **more):
    """A setting: its group in --help, default, what --help says, range, flag if it is not --NAME; more: of
    argparse, such as choices."""
    return dataclasses.field(default=default, metadata=dict(
        group=group, about=about, least=least, most=most, flag=flag, more=more))


@dataclasses.dataclass
class SharedConfig:
    """The settings that eval_mi.py has, too. The defaults are the paper's, for ZeroScope."""
    model: str = option("reference", "tiny", "tiny (embedded), zeroscope, owner/name[@revision] or a folder")
    frames: int = option("reference", 24, "frames of the clips", 2, 1e4)
    size: str = option("reference", "576x320", "WIDTHxHEIGHT in pixels")
    t_min: float = option("method", 0.0, "share of diffusion steps, the least noisy, left out", 0, 0.99)
    steps: int = option("training", 350, "training steps", 1, 1e6)
    lr: float = option("training", 0.02, "learning rate", 1e-9, 1e3)
    lr_schedule: str = option("training", "constant", "or falling to zero", choices=("constant", "cosine"))
    batch: int = option("training", 1, "noise levels in every training step", 1, 1e4)
    loss: str = option("training", "mse", "mse: Eq. 4; debiased: MotionDirector's; hybrid: with its LoRA",
                       choices=("mse", "debiased", "hybrid"))
    checkpointing: bool = option("training", False, "recompute activations: slower, much less memory")
    sample_steps: int = option("sampling", 30, "DDIM steps", 2, 1e5)
    guidance: float = option("sampling", 12.0, "classifier-free guidance; up to 1: none", -1e3, 1e3)
    noise_prior: float = option("sampling", 0.5, "share of the inverted reference in the start noise", 0, 1)
    device: str = option("output", "auto", "auto (cuda or cpu) or any device of torch: cpu, cuda:1, mps, xpu")


@dataclasses.dataclass
class Config(SharedConfig):
    """All settings of a run. The command line is made from this class, and run.json records it."""
    video: str = option("reference", None, "GIF, WebP, APNG, film, folder of pictures; default: one of ours")
    start: float = option("reference", 0.0, "second of the reference to begin at", 0, 1e6)
    duration: float = option("reference", None, "seconds of it; default: all that follow", 1e-3, 1e6)
    source_prompt: str = option("reference", None, "what the reference shows; clips.json may say it")
    use_mqk: bool = option("method", True, "ablation: no Motion Query-Key embedding", flag="--no-mqk")
    use_mv: bool = option("method", True, "ablation: no Motion Value embedding", flag="--no-mv")
    debias: str = option("method", "diff", "how MV is debiased", choices=("diff", "mean", "none"))
    debias_in_training: bool = option("method", False, "debias MV in training, too (not in the paper)")
    mqk_dims: int = option("method", 1, "MQK per frame (1) or per frame and position (2)", choices=(1, 2))
    mv_dims: int = option("method", 2, "MV per frame (1) or per frame and position (2)", choices=(1, 2))
    levels: tuple = option("method", (), "UNet levels with embeddings, as in 1,2; default: the deepest")
    motion_type: str = option("method", "object", "camera: sample without MV", choices=("object", "camera"))
    motion_file: str = option("training", None, "reuse this motion file, train nothing", flag="--motion")
    snapshots: tuple = option("training", (), "also keep the embeddings of these steps, as in 50,100")
    prompts: tuple = option("sampling", (), "what to show instead; again for more clips", flag="--prompt",
                            type=str, action="append", metavar="PROMPT")
    negative_prompt: str = option("sampling", "", "what to keep away from")
    seed: int = option("sampling", 0, "random seed of training and sampling", 0, 2 ** 62)
    seeds: int = option("sampling", 1, "clips per prompt, of as many seeds in a row", 1, 1e4)
    compare: bool = option("sampling", True, "skip the clips without embeddings", flag="--no-compare")
    out: str = option("output", "out", "folder for the results; if it holds files: out-2, out-3, ...")
    fps: float = option("output", 8, "frames per second of what is written", 1, 50)
    format: str = option("output", "gif", "kind of file for the clips", choices=("gif", "webp", "mp4"))
    dtype: str = option("output", "auto", "of the UNet; auto: float16 on cuda, float32 elsewhere",
                        choices=("auto", "float32", "bfloat16", "float16"))
    dry_run: bool = option("output", False, "load all, say what would happen, stop")


# Settings that say how to learn: the first go to train_motion, and none goes with --motion.
TRAINING = ("steps", "lr", "lr_schedule", "batch", "loss", "checkpointing")
LEARNING = (*TRAINING, "debias_in_training", "mqk_dims", "mv_dims", "levels", "snapshots")
# What a motion remembers of its training.
OF_TRAINING = ("model", "frames", "size", *TRAINING)
OF_CLIP = ("video", "start", "duration", "source_prompt")


def flag_of(field):
    """The command line's name of a field that is an `option`."""
    return field.metadata.get("flag") or "--" + field.name.replace("_", "-")


def numbers(words):
    """'1,2' -> (1, 2)"""
    return tuple(map(int, words.split(",")))


def parse_given(cls, argv, prog, description):
    """Command line -> dict of the options that were given, by field of `cls`, a dataclass of `option`s.

    description: --help says its first paragraph above the options, and its commands below them."""
    def refuse(message):
        """In place of argparse's usage and message: this program's one line."""
        hint = 'write --option="-value" if a value begins with a dash; ' * ("expected" in message)
        raise UserError(f"{message}; {hint}see --help")

    paragraphs = description.split("\n\n")
    commands = next(p for p in paragraphs if p.startswith("    python"))
    defaults = "\n(In brackets: the paper's settings. Those of the small model: data/tiny/mini_mi.json.)"
    parser = argparse.ArgumentParser(prog, f"python {prog} [options]", paragraphs[0] + defaults, commands,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, groups = refuse, {}
    for field in filter(lambda field: field.metadata, dataclasses.fields(cls)):   # others: a model's alone
        how = {bool: {"action": "store_false" if field.default else "store_true"}, tuple: {"type": numbers},
               list: {"nargs": "+", "metavar": "FILE"}}.get(field.type) or {"type": field.type}
        told = "" if field.type is bool or field.default in (None, (), "") else f" ({field.default})"
        name = field.metadata["group"]
        groups[name] = groups.get(name) or parser.add_argument_group(name)
        groups[name].add_argument(flag_of(field), dest=field.name, help=field.metadata["about"] + told,
                                  **{**how, **field.metadata["more"]})
    return vars(parser.parse_args(argv))


def merged(cls, *layers):
    """A `cls`, a dataclass of `option`s: its defaults, then what each layer, a dict, says; the last one wins.

    None says nothing, and names that cls lacks are ignored. UserError: a value of the wrong kind or range."""
    settings = cls()
    for field in dataclasses.fields(cls):
        least, most = field.metadata.get("least", -math.inf), field.metadata.get("most", math.inf)
        kinds = {float: (int, float), tuple: (tuple, list)}.get(field.type, field.type)
        choices = field.metadata.get("more", {}).get("choices")
        for value in (layer[field.name] for layer in layers if layer.get(field.name) is not None):
            if not isinstance(value, kinds) or value not in (choices or [value]):
                raise UserError(f"{flag_of(field)} cannot be {value!r}: see --help")
            if isinstance(value, (int, float)) and not least <= value <= most:            # nan is not, either
                raise UserError(f"{flag_of(field)} {value}: it must be within {least:g} and {most:g}")
            setattr(settings, field.name, value)
    return settings


def model_settings(model):
    """What a model's folder says that it is best used with: mini_mi.json as a dict, {} if it has none."""
    file = model_folder(model, weights=False) / "mini_mi.json"
    return read_json(file) if file.is_file() else {}


def clip_settings(video):
    """What clips.json beside a clip says of it: caption and two prompts; {} where it is not named there."""
    file = Path(video).parent / "clips.json"
    with built_from(file, advice="rename it if it is not of this program"):
        entry = read_json(file).get(Path(video).stem, {}) if file.is_file() else {}
        if not all(isinstance(prompt, str) for prompt in entry.get("prompts", [])):
            raise UserError(f"the prompts of {Path(video).stem} are no texts")
        return dict(source_prompt=entry.get("caption"), prompts=entry.get("prompts", [])[:2])


def absolute(path):
    """A path that means the same from any folder; ~ is the user's."""
    return os.path.abspath(os.path.expanduser(path))


def pick_device(name):
    """The device that `name` means, after a trial; auto is cuda where there is one. UserError: it fails."""
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    # It fails for an unknown name, a card that is not there, a build without it.
    with built_from(f"--device {name}", "fails here", "use --device cpu"):
        torch.ones(1, device=name).add(1).item()
    return name


def settle(given):
    """dict of the options that were given -> Config with all settings, and the motion of --motion or None."""
    motion = MotionEmbeddings.load(given["motion_file"]) if given.get("motion_file") else None
    for name in LEARNING if motion else ():
        if name in given:
            raise UserError(f"--{name.replace('_', '-')} says how to learn, and --motion reuses what was "
                            "learned: leave one of them out")
    motion_says = {}
    if motion:                                 # how it was trained and, unless another clip is given, on what
        same = "video" not in given or absolute(given["video"]) == motion.source.get("video")
        motion_says = {name: motion.source.get(name) for name in (*OF_TRAINING, *(OF_CLIP if same else ()))}
        motion_says |= {name: getattr(motion, name) for name in MotionEmbeddings.SETTINGS}
    said = merged(Config, motion_says, given)         # here only for model and clip, which say more
    model = absolute(model_folder(said.model)) if Path(said.model, "unet").is_dir() else said.model
    model_says, video = model_settings(model), said.video and absolute(said.video)
    if not video and not motion and model_says.get("world"):
        video = str(HERE / "data" / "clips" / f"{DEFAULT_CLIP}.webp")
    if video and model_says.get("world") and Path(video).resolve().parent != HERE / "data" / "clips":
        print("note: the small model knows nothing but four shapes on three patterns: for other clips and "
              "prompts take --model zeroscope")
    config = merged(                               # each layer overrides those above it:
        Config,                                    # the paper's defaults,
        model_says,                                # what the model's folder says of itself,
        clip_settings(video) if video else {},     # the clip's entry in clips.json,
        motion_says,                               # how the motion file was made,
        {**given, "model": model, "video": video})   # and what was given
    check(config, motion)
    return config, motion


def check(config, motion):
    """Fills in device and dtype, drops a clip that is not needed, refuses what would spoil the run: early,
    before it costs an hour."""
    # A saved motion needs its clip for the start noise, and to show it; without that noise it may be gone.
    may_be_gone = motion and config.video in (None, motion.source.get("video"))
    if may_be_gone and config.noise_prior == 0 and not os.path.exists(config.video or ""):
        config.video = None
    elif not config.video:
        raise UserError("say which clip to take the motion from, --video FILE: " + (
            "the motion file does not; or give --noise-prior 0" if motion else
            "those that come with this program are for its own small models"))
    if not config.prompts:
        raise UserError('nothing to generate: say what the new clip shows, --prompt "..."')
    if config.source_prompt is None and not motion:
        raise UserError('say what the reference shows, --source-prompt "...": what the text explains, '
                        "the motion embeddings need not learn")
    if not all(1 <= step <= config.steps for step in config.snapshots):
        raise UserError(f"--snapshots {config.snapshots}: the training has steps 1 to {config.steps}")
    if not (config.use_mqk or config.use_mv and config.motion_type == "object"):
        raise UserError("neither MQK nor MV is in use: nothing is left; drop --no-mqk, --no-mv or camera")
    if config.format == "mp4":
        call_ffmpeg("-version")                                       # now, not after the training
    config.device = pick_device(config.device)
    if config.dtype == "auto":
        config.dtype = "float16" if config.device.startswith("cuda") else "float32"


def sizes(config):
    """((width, height) in pixels, (H, W) in latents) of the configured size. UserError: it cannot be."""
    file = model_folder(config.model, weights=False) / "vae" / "config.json"
    with built_from(file):
        factor = 2 ** (len(read_json(file).get("block_out_channels", (64,))) - 1)
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", config.size)
    pixels = tuple(map(int, found.groups())) if found else (576, 320)
    near = tuple(max(1, round(n / factor)) * factor for n in pixels)
    if not found or near != pixels:
        raise UserError(f"--size {config.size}: give it as WIDTHxHEIGHT, both multiples of {factor} for this "
                        f"model, such as {near[0]}x{near[1]}")
    return pixels, (pixels[1] // factor, pixels[0] // factor)


def new_folder(out):
    """The folder `out`, or out-2, out-3, ... if it holds files: these are left as they are."""
    folder, number = Path(absolute(out)), 1
    while folder.is_dir() and os.listdir(folder):
        number += 1
        folder = Path(f"{absolute(out)}-{number}")
    if number > 1:
        print(f"{out} is not empty: this run goes to {folder.name}")
    return folder


def write_record(folder, config, **facts):
    """run.json: settings and versions when a run begins, the rest when it ends."""
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    with atomic_write(folder / "run.json") as temporary:
        temporary.write_text(json.dumps(dict(facts, config=dataclasses.asdict(config), versions=versions),
                                        indent=1))


def prepared_motion(config, unet, grid, motion):
    """What `run` trains, or the motion of --motion as it is to be used, on the latent grid (H, W)."""
    if motion is None:
        settings = {name: getattr(config, name) for name in MotionEmbeddings.SETTINGS}
        motion = MotionEmbeddings(unet, config.frames, *grid, levels=config.levels or None, **settings)
        motion.source = {name: getattr(config, name) for name in (*OF_TRAINING, *OF_CLIP)}
        return motion
    motion.use_mqk, motion.debias, motion.t_min = config.use_mqk, config.debias, config.t_min
    motion.use_mv = config.use_mv and config.motion_type == "object"    # camera drops it: any grid will do
    check_fits(motion, unet, config.frames, *grid)
    return motion


def learn(config, models, latents, text, motion, folder):
    """Trains `motion` on `latents` (1,C,F,H,W) and saves it and its snapshots.

    Ctrl-C and SIGTERM, which `guarded` makes alike, end the training with what it has learned so far."""
    def keep(step, motion):
        """Saves a snapshot where one was asked for."""
        if step in config.snapshots:
            motion.save(folder / f"motion-step{step}.safetensors")

    try:
        train_motion(models, latents, text, motion=motion, on_step=keep,
                     **{name: getattr(config, name) for name in (*TRAINING, "seed")})
    except KeyboardInterrupt:
        step = len(motion.losses)
        if not step:
            raise
        file = folder / f"motion-step{step}.safetensors"
        motion.save(file)
        raise UserError(f"stopped after step {step} of {config.steps}: what was learned is in {file}; "
                        f"use it with --motion {file}") from None
    motion.save(folder / "motion.safetensors")


def run(config, motion=None):
    """The main job: train the reference's motion, or take `motion`; sample every prompt; write to --out."""
    # ---- load, and find out what does not fit: better now than after hours
    began, training = time.perf_counter(), motion is None
    pixels, grid = sizes(config)
    models = load_models(config.model, config.device, getattr(torch, config.dtype))
    models.scheduler.timesteps(config.sample_steps, config.t_min)
    if config.noise_prior > 0:
        models.scheduler.timesteps(INVERT_STEPS)
    motion = prepared_motion(config, models.unet, grid, motion).to(models.device)
    if config.video:
        reference = read_video(config.video, config.frames, pixels, config.start, config.duration)
    count = sum(parameter.numel() for parameter in motion.parameters())
    print(textwrap.fill(str(config), 110), f"{count:,} parameters in the embeddings", sep="\n")
    if config.dry_run:
        return
    folder = new_folder(config.out)
    write_record(folder, config)                              # a place that cannot be written shows now

    # ---- encode. All randomness comes from seeds, so equal settings repeat the same frames.
    source_text, empty, negative, *texts = (encode_prompt(models, [prompt]) for prompt in (
        config.source_prompt or "", "", config.negative_prompt, *config.prompts))
    if training or config.noise_prior > 0:             # one draw, whatever --seed is
        latents = encode_video(models, to_model_range(reference), torch.Generator().manual_seed(1_000_000))

    # ---- train
    if training:
        learn(config, models, latents, source_text, motion, folder)
        motion.use_mv &= config.motion_type == "object"

    # ---- invert
    inverted = ddim_invert(models, latents, empty, INVERT_STEPS) if config.noise_prior > 0 else 0

    # ---- sample and write
    shown = [("reference", reference)] if config.video else []
    rows, shape = list(shown), (1, models.unet.conv_in.in_channels, config.frames, *grid)
    for seed in range(config.seed, config.seed + config.seeds):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(2_000_000 + seed))
        noise = blend_noise(inverted, noise.to(models.device), config.noise_prior)
        for number, (prompt, text) in enumerate(zip(config.prompts, texts), 1):
            clips, title = [], prompt if config.seeds == 1 else f"{prompt} (seed {seed})"
            # One after the other, to save memory.
            for label, learned in [(title, motion), ("same seed, no embeddings", None)][:1 + config.compare]:
                latent = sample(models, noise, text, negative, config.sample_steps, config.guidance, learned)
                clips.append((label, to_uint8(decode_video(models, latent)[0])))
            name = re.sub(r"[^a-z0-9]+", "-", f"{number} {prompt}".lower())[:62].strip("-")
            name += f"-seed{seed}" * (config.seeds > 1)
            labels, videos = zip(*shown, *clips)
            for end, video in ("", clips[0][1]), ("-compare", side_by_side(videos, labels)):
                write_video(folder / f"{name}{end}.{config.format}", video, config.fps)
            rows += clips
    with atomic_write(folder / "sheet.png") as temporary:
        contact_sheet(rows).save(temporary)
    peak = torch.cuda.max_memory_allocated(models.device) if models.device.type == "cuda" else None
    seconds = round(time.perf_counter() - began, 2)
    write_record(folder, config, seconds=seconds, peak_cuda_bytes=peak, losses=motion.losses,
                 invert_steps=INVERT_STEPS if config.noise_prior > 0 else None, embedding_parameters=count)
    print(f"done in {seconds:.0f} s: look at {folder}/*-compare.{config.format}, {folder}/sheet.png")


def guarded(job):
    """Runs job(); returns the exit status: 0, or 2 after one line that says what is wrong and what to do."""
    # A stream can be missing (`2>&-`), and a console may lack a character: it shows a substitute.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)             # as Ctrl-C
    try:
        job()
        return 0
    except UserError as error:
        message = one_line(error)
    except KeyboardInterrupt:
        message = "interrupted: run the same command again, or with --motion the motion that it saved"
    except BrokenPipeError:                                               # such as `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # for Python's own last words
        message = "nobody reads the output any more: let it run to its end, or write it to a file"
    except OSError as error:                                  # a folder without rights, a name too long
        message = f"{error}: choose another place, or get the right to it"
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        message = ("out of memory: take fewer --frames or a smaller --size, "
                   "and if it was in training, --checkpointing")
    print(f"\nerror: {message}", file=sys.stderr)
    return 2


def main(argv=None):
    """Entry point of the command line; returns the exit status."""
    return guarded(lambda: run(*settle(parse_given(Config, argv, "mini_mi.py", __doc__))))


if __name__ == "__main__":
    sys.exit(main())
