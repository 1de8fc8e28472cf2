"""Motion Inversion in one file: learn the motion of one clip, then make other things move that way.

Wang et al., *Motion Inversion for Video Customization* (arXiv 2403.20193), reimplemented to be read. A frozen
text-to-video diffusion model denoises a reference clip; two sets of embeddings inside its temporal attention
are trained to help it: MQK (which frames look at each other) and MV (what they pass on). Added to
the same model with another prompt, they make new content move like the reference.

    python mini_mi.py                            the whole job on the embedded model, half a minute on a CPU
    python mini_mi.py --no-mqk                   an ablation: the same without MQK (or --no-mv)
    python mini_mi.py --model zeroscope --video dog.mp4 --source-prompt "a dog runs" --prompt "a robot runs"

Map. Names are looked up when a function runs, so what the method uses may stand below it:

    THE PAPER         debias, the temporal attention of Eq. 3, the embeddings that it adds
    LEARN IT          the loss and the training loop, Eq. 4
    USE IT            DDIM, inversion of the reference, start noise, guided sampling, in and out of latents
    THE FROZEN MODEL  UNet, autoencoder, text encoder, tokenizer, held against the published ones in tests/
    PLUMBING          configs, files, checkpoints, hub, video, pictures
    COMMAND LINE      the settings, and `run`: load, encode, train, invert, sample, write

Letters:  B batch   F frames   C channels   H W latent grid, or what a level of the UNet has of it
          h w pixels   L text tokens   D text width   E width of the embedded diffusion step
          t diffusion step, never a frame   T number of them   N any batch axis, such as B*F
          h alone, in THE PAPER, is what temporal attention reads, as in its Eq. 3
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import html
import http.client
import json
import math
import mmap
import os
import platform
import re
import shutil
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import unicodedata
import urllib.error
import urllib.request
import warnings
import zipfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, urljoin, urlsplit

import ftfy
import numpy as np
import regex
import torch
import torch.nn.functional as nnf
import torch.utils.checkpoint
from PIL import GifImagePlugin, Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


class UserError(ValueError):
    """What the user can put right. The command line prints it as one line, `error: ...`, and exits with 2."""


# ============================================================================================================
#   THE PAPER: Motion Inversion (arXiv 2403.20193), sections 3.2 to 3.4
#
#   Temporal attention reads features h of shape (B, H*W, F, C): one sequence of F frames per position. The
#   motion of one clip is learned as two tensors per attention, added to what it reads:
#
#       TA(h) = softmax( Wq(h + m_qk) (Wk(h + m_qk))^T / sqrt(d_k) ) . Wv(h + m_v)                     (Eq. 3)
#
#   MQK  m_qk (1,   F, C)  changes WHICH frames look at each other. It has no spatial axes: it cannot hold a
#                          shape.
#   MV   m_v  (H*W, F, C)  changes WHAT is passed from frame to frame, at every position: local motion. For
#                          ZeroScope that is 55 million numbers, many more than the clip's latents have: it
#                          could hold the clip's looks, too.
#
#   They are trained so that the frozen model denoises the clip well (Eq. 4: `train_motion`, in LEARN IT).
#   That is why MV is debiased at inference: what does not change from frame to frame is appearance and not
#   motion; all frames but the first keep only the change (Eq. 5: `debias`).
# ============================================================================================================

def debias(m_v, mode):
    """Removes static appearance from the Motion Value embedding, (..., F, C) -> (..., F, C).

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

    As in the authors' code each attention has an MV of its own, and one MQK serves both.
    """

    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = (Attention(width, heads, head_dim) for _ in range(2))
        self.ff = FeedForward(width)
        self.name = None                    # its key in the UNet, by which `motion` knows it; set by the UNet

    def forward(self, x, grid, motion=None):
        for norm, attention, which in (self.norm1, self.attn1, "attn1"), (self.norm2, self.attn2, "attn2"):
            h = h_qk = h_v = norm(x)
            if motion is not None and self.name in motion.grids:
                m_qk, m_v = motion.for_attention(self.name, which, h.shape[2], grid, h.dtype)
                h_qk = h + m_qk                                                        # MQK          (Eq. 3)
                h_v = h + m_v                                                          # MV           (Eq. 3)
            x = x + attention(h_qk, h_qk, h_v)             # queries, keys and values are made of these three
        return x + self.ff(self.norm3(x))


class MotionEmbeddings(nn.Module):
    """The motion of one clip: a mapping from the authors' keys to parameters. Passed to the UNet as `motion`.

        BLOCK.pos_embed                             MQK of a temporal block, (1, F, C)
        BLOCK.attn1.vSpatial, BLOCK.attn2.vSpatial  MV of its two attentions, (H*W, F, C)

    unet_config      dict, the UNet's config.json
    frames           F of the clip; None in a file of the authors: of its 32 slots the first F count
    height, width    the latent grid of the clip (not pixels)
    levels           UNet levels that get embeddings, 0 is the finest; default: the deepest one that has
                     attention, which for ZeroScope is the authors' choice (width 1280 on the way down and up)
    use_mqk, use_mv  the ablations: False leaves the part out, here, or later at inference
    mqk_dims         1: shape (1, F, C), the method;     2: (H*W, F, C)
    mv_dims          2: shape (H*W, F, C), the method;   1: (1, F, C)
    debias           diff | mean | none, see `debias`. `.eval()` adds debiased MV, `.train()` raw MV, unless
                     debias_in_training
    """

    SETTINGS = ("use_mqk", "use_mv", "mqk_dims", "mv_dims", "debias", "debias_in_training")
    PARTS = (".pos_embed", ".attn1.vSpatial", ".attn2.vSpatial")

    def __init__(self, unet_config, frames, height, width, *, levels=None, use_mqk=True, use_mv=True,
                 mqk_dims=1, mv_dims=2, debias="diff", debias_in_training=False):
        super().__init__()
        self.use_mqk, self.use_mv, self.mqk_dims, self.mv_dims = use_mqk, use_mv, mqk_dims, mv_dims
        self.debias, self.debias_in_training, self.frames = debias, debias_in_training, frames
        self.grids = {}              # temporal block -> (H, W) of its MV; None: the authors' file did not say
        self.source = {}             # of which clip, if known: {"video": path, "prompt": what it shows, ...}
        if unet_config is None:
            return                                                                     # `load` fills it
        if not (use_mqk or use_mv):
            raise UserError("neither MQK nor MV is in use: nothing is left to train; leave one of the two in")
        with torch.device("meta"):                   # a UNet without memory for weights, asked for its blocks
            sites = UNet3DConditionModel(unet_config).motion_sites
        levels = [max(sites)] if levels is None else sorted(levels)
        if not levels or not set(levels) <= set(sites):
            raise UserError(f"levels {levels} cannot all take embeddings: "
                            f"this model has attention at levels {sorted(sites)}")
        for level, block, channels in ((i, *site) for i in levels for site in sites[i].items()):
            # Every downsampling is a convolution of stride 2 and padding 1, which rounds odd sizes up.
            rows, columns = self.grids[block] = (-(-height // 2 ** level), -(-width // 2 ** level))
            positions = {1: 1, 2: rows * columns}
            for part in self.PARTS:
                used, dims = (use_mqk, mqk_dims) if part == ".pos_embed" else (use_mv, mv_dims)
                if used:
                    self[block + part] = torch.zeros(positions[dims], frames, channels)

    @classmethod
    def block(cls, key):
        """The temporal block in `key`: what stands before MQK's or MV's name."""
        return key[:-len(next(filter(key.endswith, cls.PARTS)))]

    def __getitem__(self, key):
        return self._parameters[key]

    def __setitem__(self, key, value):
        # torch's register_parameter refuses names with dots; the table behind it takes them.
        self._parameters[key] = nn.Parameter(value)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """nn.Module's, but for its check of names, which takes a dot for a submodule."""
        if strict and state_dict.keys() != self._parameters.keys():
            raise UserError("these are other embeddings: " +
                            ", ".join(sorted(state_dict.keys() ^ self._parameters.keys())[:2]))
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def for_attention(self, block, attention, frames, grid, dtype=torch.float32):
        """m_qk, m_v, each (1 or H*W, F, C), for one attention of a block; 0 if the part is absent or off."""
        m_qk = m_v = 0
        sizes = (self.frames is None, self.grids[block], frames, grid)
        if self.use_mqk and f"{block}.pos_embed" in self._parameters:
            m_qk = resized(self[f"{block}.pos_embed"], *sizes).to(dtype)
        if self.use_mv and f"{block}.{attention}.vSpatial" in self._parameters:
            m_v = resized(self[f"{block}.{attention}.vSpatial"], *sizes)
            # Last, since differences of neighbouring frames mean something only on the frames that are used.
            if self.debias_in_training or not self.training:
                m_v = debias(m_v, self.debias)                                                       # (Eq. 5)
            m_v = m_v.to(dtype)
        return m_qk, m_v

    def check_fits(self, unet):
        """UserError if these embeddings belong to another UNet."""
        widths = {block: c for sites in unet.motion_sites.values() for block, c in sites.items()}
        for key, value in self._parameters.items():
            block, have = self.block(key), value.shape[-1]
            if widths.get(block) != have:
                raise UserError(f"these motion embeddings do not fit the model: {block} has width {have} in "
                                f"the motion file and {widths.get(block, 'no place')} in the model; use the "
                                "model they were made with")

    def save(self, path):
        """Writes safetensors; settings, grids and source travel as metadata."""
        about = {name: getattr(self, name) for name in ("frames", "grids", "source", *self.SETTINGS)}
        save_safetensors(path, self.state_dict(), {"mini_mi": json.dumps(about)})

    @classmethod
    def load(cls, path):
        """Reads a file of `save` or the authors' motion_embed.pt. Parts that it lacks are switched off."""
        tensors, about = read_motion_file(path)
        self = cls(None, about["frames"], None, None, **about["settings"])
        self.grids, self.source = about["grids"], about["source"]
        for key, value in tensors.items():
            self[key] = value.float()
        return self.eval()


# ============================================================================================================
#   LEARN IT: one clip's motion into the embeddings (Eq. 4)
# ============================================================================================================

def motion_loss(kind, prediction, target, anchor):
    """The training loss, 0-d, from prediction and target (B,C,F,H,W) and the number of an anchor frame.

    mse       || eps - eps_theta ||^2, averaged; v for eps if the model predicts v, as data/tiny does  (Eq. 4)
    debiased  the same, plus the same on  alpha * eps - beta * eps[anchor],  alpha = sqrt(2), beta = 1: what a
              frame has in common with the anchor counts less (MotionDirector, arXiv 2310.08465; not `debias`)
    hybrid    debiased, while a LoRA holds the looks of single frames (SpatialLoRA): MotionDirector's whole
              loss, with which the paper's numbers were made
    """
    mse = nnf.mse_loss(prediction, target)
    if kind == "mse":
        return mse
    if kind in ("debiased", "hybrid"):
        apart = [math.sqrt(2) * eps - eps[:, :, anchor, None] for eps in (prediction, target)]
        return mse + nnf.mse_loss(*apart)
    raise UserError(f"loss = {kind!r} is not known; it takes mse, debiased or hybrid")


def train_motion(models, latents, text, *, steps=350, lr=0.02, batch=1, seed=0, loss="mse", state=None,
                 state_every=25, on_step=None, checkpointing=False, progress=True, **settings):
    """Learns the motion of one clip: latents (1,C,F,H,W), text (1,L,D) -> MotionEmbeddings, in eval mode.

    M* = argmin_M E_{t,eps} || eps - eps_theta(x_t, t, c, M) ||^2  with everything but M frozen        (Eq. 4)

    The defaults are the paper's, MODEL_DEFAULTS has those of data/tiny. Every step sees the clip at `batch`
    noise levels. The UNet stays in eval mode; the authors' has dropout. The result has `losses` (steps,).

    state          file that keeps the training every `state_every` steps; an interrupted call goes on from it
    on_step        called as on_step(step, motion) after every step, from 1; motion is in eval mode
    checkpointing  recompute activations in backward: slower, much less memory
    settings       of MotionEmbeddings: use_mqk, use_mv, levels, ...
    """
    _, _, frames, height, width = latents.shape
    unet, scheduler, generator = models.unet, models.scheduler, torch.Generator().manual_seed(seed)
    motion = MotionEmbeddings(unet.config, frames, height, width, **settings).to(models.device)
    # The decay is AdamW's default, which the authors leave active: a step shrinks every embedding by lr/100.
    optimizer = torch.optim.AdamW(motion.parameters(), lr=lr, weight_decay=0.01)
    # Gradients in float16 vanish below 6e-8: the scaler multiplies the loss and divides what comes out.
    scaler = torch.amp.GradScaler(models.device.type, enabled=models.dtype == torch.float16)
    x_0, text = latents.expand(batch, -1, -1, -1, -1), text.expand(batch, -1, -1)
    lora = SpatialLoRA(unet, generator) if loss == "hybrid" else None
    parts = dict(motion=motion, optimizer=optimizer, scaler=scaler)                   # what can be resumed
    parts.update(dict(lora=lora, lora_optimizer=lora.optimizer) if lora else {})
    try:
        losses = load_state(state, parts, generator, steps) if state and Path(state).exists() else []
        unet.checkpointing = checkpointing
        bar = tqdm(range(len(losses), steps), "training", steps, initial=len(losses), unit="step",
                   disable=not progress)
        for step in bar:
            t = torch.randint(scheduler.T, (batch,), generator=generator)
            noise = torch.randn((batch, *latents.shape[1:]), generator=generator).to(latents)
            # The anchor is drawn for every loss, so that all see the same steps and noise.
            anchor = torch.randint(frames, (), generator=generator).item()
            x_t, target = scheduler.add_noise(x_0, noise, t), scheduler.target(x_0, noise, t)

            motion.train()
            if lora:
                lora.step(models, x_t, t, text, target, scaler, generator)
            error = motion_loss(loss, predict(models, x_t, t, text, motion), target, anchor)
            if not error.isfinite():
                raise UserError(f"the loss is not finite at step {step + 1}: "
                                f"lower --lr (now {lr}) or use --dtype float32")
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(error).backward()
            scaler.step(optimizer)
            scaler.update()

            losses.append(error.item())
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.4f}")
            if state and ((step + 1) % state_every == 0 or step + 1 == steps):
                state = save_state(state, parts, generator, losses)
            if on_step:
                on_step(step + 1, motion.eval())
    finally:                                     # the model is lent: whatever happens, it is as it was before
        unet.checkpointing = False
        if lora:
            lora.switch(on=False)
    motion.losses = torch.tensor(losses)
    return motion.eval()


# ============================================================================================================
#   USE IT: new clips with that motion
# ============================================================================================================

class DDIMScheduler:
    """Noise levels, x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps for t = 0 .. T-1 (arXiv 2006.11239), and
    deterministic steps between them (DDIM with eta = 0, arXiv 2010.02502)."""

    def __init__(self, config):
        c = scheduler_settings(config)
        self.T, self.offset = c.num_train_timesteps, c.steps_offset
        self.v_prediction = c.prediction_type != "epsilon"
        power = 0.5 if c.beta_schedule == "scaled_linear" else 1                # scaled: linear in sqrt(beta)
        ramp = torch.linspace(c.beta_start ** power, c.beta_end ** power, self.T, dtype=torch.float32)
        betas = ramp ** (1 / power)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)              # abar_t = prod_{s<=t} (1 - beta_s)
        self.final_alpha_cumprod = torch.tensor(1.0) if c.set_alpha_to_one else self.alphas_cumprod[0]

    def abar(self, t, like):
        """abar_t, shaped to multiply `like` (B,...); t int, 0-d or (B,); a step below 0 is the clean end."""
        t = torch.as_tensor(t, device="cpu").reshape(-1)
        abar = torch.where(t >= 0, self.alphas_cumprod[t.clamp(min=0)], self.final_alpha_cumprod)
        return abar.to(like.device).view(-1, *[1] * (like.dim() - 1))

    def timesteps(self, n):
        """The n steps of sampling, LongTensor (n,), descending: "leading" spacing, every T//n-th step."""
        if not 1 <= n <= self.T:
            raise UserError(f"{n} sampling steps: it must be 1 to {self.T}")
        steps = torch.arange(n).flip(0) * (self.T // n) + self.offset
        if steps[0] >= self.T:
            raise UserError(f"{n} sampling steps give a timestep above {self.T - 1}; take another number")
        return steps

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
    """The noise (B,C,F,H,W) from which as many sampling steps nearly give `latents` back: DDIM backwards.

    From the lowest timestep up, eps is taken from x of the level below; text (B,L,D) is of the empty prompt.
    """
    scheduler, x = models.scheduler, latents
    below = 0                                        # the clean latents count as level 0: alphas_cumprod[0]
    for t in tqdm(scheduler.timesteps(steps).flip(0), "inverting", unit="step", disable=not progress):
        eps = scheduler.epsilon(predict(models, x, t, text), t, x)
        x = scheduler.move(x, eps, scheduler.abar(below, x), scheduler.abar(t, x))
        below = t
    return x


def blend_noise(inverted, fresh, prior):
    """Start noise: sqrt(prior) * inverted reference + sqrt(1 - prior) * fresh noise; the authors take 0.5.

    The weights keep the variance at 1 if both have it. The inverted part brings the rough layout of the
    reference's motion along, which is why eval_mi.py always compares with this noise and no embeddings.
    """
    return math.sqrt(prior) * inverted + math.sqrt(1 - prior) * fresh


@torch.no_grad()
def sample(models, noise, text, negative, steps=30, guidance=12.0, motion=None, progress=True):
    """noise (B,C,F,H,W), text, negative (B,L,D) -> latents (B,C,F,H,W): DDIM, classifier-free guidance.

    Guidance (arXiv 2207.12598) runs both texts as one batch, negative first, and the embeddings act on both
    halves; guidance <= 1 runs the prompt alone.
    """
    scheduler, x, guided = models.scheduler, noise, guidance > 1
    texts = torch.cat([negative, text]) if guided else text
    for t in tqdm(scheduler.timesteps(steps), "sampling", unit="step", disable=not progress):
        out = predict(models, torch.cat([x, x]) if guided else x, t, texts, motion)
        if guided:
            unconditional, conditional = out.chunk(2)
            out = unconditional + guidance * (conditional - unconditional)
        x = scheduler.step(out, t, x, steps)
    if not x.isfinite().all():
        raise UserError("sampling gave values that are not finite: use --dtype float32 or bfloat16")
    return x


CHUNK = 16                                      # frames that the autoencoder takes at once; bounds the memory

@torch.no_grad()
def encode_video(models, video, generator=None):
    """video (B,3,F,h,w) in [-1,1] -> scaled latents (B,C,F,H,W): mean, or sample with a (CPU) generator."""
    frames = video.transpose(1, 2).flatten(0, 1).to(models.device, torch.float32)        # (B*F, 3, h, w)
    mean, logvar = (torch.cat(part) for part in zip(*map(models.vae.encode, frames.split(CHUNK))))
    if generator is not None:
        mean = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator).to(mean.device)
    return mean.unflatten(0, (len(video), -1)).transpose(1, 2) * models.vae.scaling_factor


@torch.no_grad()
def decode_video(models, latents):
    """scaled latents (B,C,F,H,W) -> (B,3,F,h,w) in [-1,1]"""
    frames = (latents.float() / models.vae.scaling_factor).transpose(1, 2).flatten(0, 1)
    video = torch.cat([models.vae.decode(z) for z in frames.split(CHUNK)])
    return video.unflatten(0, (len(latents), -1)).transpose(1, 2).clamp(-1, 1)


# ============================================================================================================
#   THE FROZEN MODEL: UNet, autoencoder, text encoder, tokenizer. Attribute names are the keys of checkpoints
# ============================================================================================================

# ------------------------------------------------------------------------------------------------------------
# UNet: predicts the noise (or v) in a noisy video (Wang et al., ModelScope, arXiv 2308.06571)
# ------------------------------------------------------------------------------------------------------------

def unet_settings(config):
    """config.json of a UNet3DConditionModel as a checked namespace."""
    c = read_config("UNet", config, dict(
        in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
        up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3,
        block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, downsample_padding=1,
        mid_block_scale_factor=1, act_fn="silu", norm_num_groups=32, norm_eps=1e-5, cross_attention_dim=1024,
        attention_head_dim=64, num_attention_heads=None, time_cond_proj_dim=None,
    ), implemented=dict(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
        downsample_padding=(1,), mid_block_scale_factor=(1,), act_fn=("silu",), num_attention_heads=(None,),
        time_cond_proj_dim=(None,)))
    mirrored = [kind.replace("Up", "Down") for kind in reversed(c.up_block_types)]
    if mirrored != list(c.down_block_types) or len(c.block_out_channels) != len(mirrored):
        raise UserError("UNet config: up_block_types must mirror down_block_types, with one entry of "
                        "block_out_channels for each level")
    if "CrossAttnDownBlock3D" not in c.down_block_types:
        raise UserError("UNet config: no level has attention, "
                        "so there is no temporal attention to put motion into")
    return c


class UNet3DConditionModel(nn.Module):
    """x (B,C,F,H,W), t (int, 0-d or (B,)), text (B,L,D), motion (MotionEmbeddings or None) -> (B,C,F,H,W).

    ZeroScope, as a table. `attn`: the level has spatial and temporal transformers; a row of `up` begins with
    the sum of what comes from below and of the skip that is on top of the stack. * is where the method puts
    its embeddings.

        down_blocks.0   320, 320            attn     40x72 for 320x576 pixels   each layer and each halving
        down_blocks.1   640, 640            attn     20x36                      pushes its output as a skip
        down_blocks.2   1280, 1280          attn *   10x18
        down_blocks.3   1280, 1280                    5x9
        mid_block       1280, 1280          attn      5x9
        up_blocks.0     1280, 1280, 1280              5x9                       each layer pops a skip and
        up_blocks.1     1280, 1280, 1280    attn *   10x18                      concatenates it
        up_blocks.2     640, 640, 640       attn     20x36
        up_blocks.3     320, 320, 320       attn     40x72

    Source: diffusers' UNet3DConditionModel, whose keys these are.
    """

    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        c = unet_settings(config)
        widths, n = c.block_out_channels, len(c.block_out_channels)
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0])
        # A quirk of the original: always 8 heads here, elsewhere as many as fit the width.
        self.transformer_in = TransformerTemporalModel(widths[0], 8, c)

        attention = [kind == "CrossAttnDownBlock3D" for kind in c.down_block_types]
        skips = [widths[0]]                             # widths of the skips, pushed and popped as in forward
        self.down_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths)):
            rows = [(before, width)] + [(width, width)] * (c.layers_per_block - 1)
            self.down_blocks.append(UNetBlock3D(rows, c, attention[i], downsample=i < n - 1))
            skips += [width] * (c.layers_per_block + (i < n - 1))
        self.mid_block = UNetMidBlock3D(c)
        self.up_blocks = nn.ModuleList()
        before = widths[-1]
        for i in reversed(range(n)):
            rows = []
            for _ in range(c.layers_per_block + 1):
                rows.append((before + skips.pop(), widths[i]))
                before = widths[i]
            self.up_blocks.append(UNetBlock3D(rows, c, attention[i], upsample=i > 0))

        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[0], c.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, 3, padding=1)
        self.checkpointing = False                         # True: recompute layers in backward to save memory

        # level -> {temporal block: its C}, down and up; not the middle block, where the authors put nothing
        self.motion_sites = {i: {} for i in range(n) if attention[i]}
        level_of = {f"{side}_blocks.{i if side == 'down' else n - 1 - i}": i
                    for side in ("down", "up") for i in range(n)}
        for name, module in self.named_modules():
            if isinstance(module, TemporalTransformerBlock):
                module.name = name
                level = level_of.get(name.partition(".temp_attentions")[0])
                if level is not None:
                    self.motion_sites[level][name] = module.norm1.weight.shape[0]

    def _layer(self, block, i, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block.layer, i, *args, use_reentrant=False)
        return block.layer(i, *args)

    def forward(self, x, t, text, motion=None):
        if motion is not None:
            motion.check_fits(self)
        batch, _, frames, _, _ = x.shape
        emb = self.time_embedding(torch.as_tensor(t, device=x.device).expand(batch))                  # (B, E)

        # contiguous: latents may lie in memory in another order; every layer would inherit it and be slower.
        # (Channels last is faster for narrow layers on a CPU, and slower for wide ones on small grids.)
        hidden = self.conv_in(x.transpose(1, 2).flatten(0, 1).contiguous())                   # (B*F, C, H, W)
        hidden = self.transformer_in(hidden, frames)
        skips = [hidden]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                hidden = self._layer(block, i, hidden, emb, text, frames, motion)
                skips.append(hidden)
            if hasattr(block, "downsamplers"):
                hidden = block.downsamplers[0](hidden)
                skips.append(hidden)

        hidden = self.mid_block(hidden, emb, text, frames, motion)

        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                hidden = torch.cat([hidden, skips.pop()], dim=1)
                hidden = self._layer(block, i, hidden, emb, text, frames, motion)
            if hasattr(block, "upsamplers"):
                hidden = block.upsamplers[0](hidden, size=skips[-1].shape[-2:])

        out = self.conv_out(nnf.silu(self.conv_norm_out(hidden)))
        return out.unflatten(0, (batch, frames)).transpose(1, 2)


def predict(models, x, t, text, motion=None):
    """The UNet's answer in float32, whatever the format of its weights."""
    return models.unet(x.to(models.dtype), t, text.to(models.dtype), motion).float()


class UNetBlock3D(nn.Module):
    """One level of the UNet. Per layer: resnet, temporal conv, spatial transformer, temporal transformer;
    the transformers only where the level has attention; then the change of size, if any.

    It has no forward: the UNet calls it layer by layer, because each layer pushes or pops a skip.

    rows   one (c_in, c_out) per layer
    """

    def __init__(self, rows, c, attention, downsample=False, upsample=False):
        super().__init__()
        groups, emb_width = c.norm_num_groups, 4 * c.block_out_channels[0]
        widths = [c_out for _, c_out in rows]
        self.resnets = nn.ModuleList(ResnetBlock2D(c_in, c_out, groups, c.norm_eps, emb_width)
                                     for c_in, c_out in rows)
        self.temp_convs = nn.ModuleList(TemporalConvLayer(w, groups) for w in widths)
        if attention:
            self.attentions = nn.ModuleList(Transformer2DModel(w, c) for w in widths)
            self.temp_attentions = nn.ModuleList(
                TransformerTemporalModel(w, w // c.attention_head_dim, c) for w in widths)
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample2D(widths[-1], pad=(1, 1, 1, 1))])
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample2D(widths[-1])])

    def layer(self, i, x, emb, text, frames, motion):
        """Layer i of this level, (B*F, c_in, H, W) -> (B*F, c_out, H, W)."""
        x = self.temp_convs[i](self.resnets[i](x, emb), frames)
        if hasattr(self, "attentions"):
            x = self.temp_attentions[i](self.attentions[i](x, text), frames, motion)
        return x


class UNetMidBlock3D(nn.Module):
    """The deepest level: resnet and temporal conv, both transformers, resnet and temporal conv."""

    def __init__(self, c):
        super().__init__()
        width, groups, emb_width = c.block_out_channels[-1], c.norm_num_groups, 4 * c.block_out_channels[0]
        self.resnets = nn.ModuleList(ResnetBlock2D(width, width, groups, c.norm_eps, emb_width)
                                     for _ in range(2))
        self.temp_convs = nn.ModuleList(TemporalConvLayer(width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer2DModel(width, c)])
        self.temp_attentions = nn.ModuleList(
            [TransformerTemporalModel(width, width // c.attention_head_dim, c)])

    def forward(self, x, emb, text, frames, motion):
        x = self.temp_convs[0](self.resnets[0](x, emb), frames)
        x = self.temp_attentions[0](self.attentions[0](x, text), frames, motion)
        return self.temp_convs[1](self.resnets[1](x, emb), frames)


class TimestepEmbedding(nn.Module):
    """Diffusion step (B,) -> vector (B,E): sines and cosines of falling frequency, then two linear layers."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t):
        half = self.channels // 2
        index = torch.arange(half, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(10000) * index / half)
        angles = t.float()[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.linear_1.weight.dtype)
        return self.linear_2(nnf.silu(self.linear_1(waves)))


class ResnetBlock2D(nn.Module):
    """norm, SiLU, conv, (+ diffusion step), norm, SiLU, conv, plus the input. (N,C,H,W) -> (N,C_out,H,W).

    emb: the embedded diffusion step, one row per sample of the batch (B,E); in a video N = B*F and all frames
    of a clip share their row. The autoencoder, which has this block too, has none.
    """

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
            step = self.time_emb_proj(nnf.silu(emb))                                     # (B, C_out)
            hidden = hidden + step.repeat_interleave(len(x) // len(emb), 0)[:, :, None, None]
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
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(nnf.interpolate(x, size=size, mode="nearest"))


class TemporalConv(nn.Conv3d):
    """A (3,1,1) convolution: three neighbouring frames, one position. (B,C,F,H*W) -> (B,C_out,F,H*W).

    Computed as a (3,1) convolution over the plane (F, H*W): the same sums, by the kernels for pictures.
    """

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x):
        return nnf.conv2d(x, self.weight.squeeze(-1), self.bias, padding=(1, 0))


class TemporalConvLayer(nn.Module):
    """Four times norm, SiLU, temporal convolution; plus the input. (B*F,C,H,W) -> the same.

    Source: ModelScope's text-to-video UNet. The norms run over all frames of a clip together.
    """

    def __init__(self, channels, groups):
        super().__init__()
        def stage(*dropout):
            """One of the four: norm at key 0, convolution at 2 or 3."""
            return nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), *dropout,
                                 TemporalConv(channels, channels))
        # conv2 to conv4 were trained with a dropout at place 2; it has to stay, since the keys count it.
        self.conv1, self.conv2, self.conv3, self.conv4 = stage(), *(stage(nn.Dropout(0.1)) for _ in range(3))
        # A layer that starts as the identity lets a video model begin as the picture model that it was.
        nn.init.zeros_(self.conv4[-1].weight)
        nn.init.zeros_(self.conv4[-1].bias)

    def forward(self, x, frames):
        plane = to_plane(x, frames)                                                      # (B, C, F, H*W)
        plane = self.conv4(self.conv3(self.conv2(self.conv1(plane))))
        return x + plane.transpose(1, 2).reshape(x.shape)


def to_plane(x, frames):
    """(B*F,C,H,W) -> (B,C,F,H*W): the frames of a clip as rows of one picture."""
    return x.flatten(2).unflatten(0, (-1, frames)).transpose(1, 2)


class Transformer2DModel(nn.Module):
    """Transformer over the H*W positions of every frame, (B*F,C,H,W) -> the same; text (B,L,D)."""

    def __init__(self, channels, c):
        super().__init__()
        heads = channels // c.attention_head_dim
        width = heads * c.attention_head_dim
        self.norm = nn.GroupNorm(c.norm_num_groups, channels, 1e-6)
        self.proj_in, self.proj_out = nn.Linear(channels, width), nn.Linear(width, channels)
        self.transformer_blocks = nn.ModuleList(
            [SpatialTransformerBlock(width, heads, c.attention_head_dim, c.cross_attention_dim)])

    def forward(self, x, text):
        hidden = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))                   # (B*F, H*W, C)
        for block in self.transformer_blocks:
            hidden = block(hidden, text)
        return x + self.proj_out(hidden).transpose(1, 2).unflatten(2, x.shape[2:])


class SpatialTransformerBlock(nn.Module):
    """Self-attention within a frame, cross-attention to text, feed-forward; each on a norm, each added."""

    def __init__(self, width, heads, head_dim, text_width):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, heads, head_dim)
        self.attn2 = Attention(width, heads, head_dim, text_width)
        self.ff = FeedForward(width)

    def forward(self, x, text):                                                          # x (B*F, H*W, C)
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed, normed)
        # All frames of a clip read the same text: keys and values are computed once per clip, not per frame.
        normed = self.norm2(x).reshape(len(text), -1, x.shape[-1])                       # (B, F*H*W, C)
        x = x + self.attn2(normed, text, text).view_as(x)
        return x + self.ff(self.norm3(x))


class TransformerTemporalModel(nn.Module):
    """Transformer over the F frames of every position, (B*F,C,H,W) -> the same. Its block is in THE PAPER."""

    def __init__(self, channels, heads, c):
        super().__init__()
        width = heads * c.attention_head_dim
        self.norm = nn.GroupNorm(c.norm_num_groups, channels, 1e-6)
        self.proj_in, self.proj_out = nn.Linear(channels, width), nn.Linear(width, channels)
        self.transformer_blocks = nn.ModuleList(
            [TemporalTransformerBlock(width, heads, c.attention_head_dim)])

    def forward(self, x, frames, motion=None):
        hidden = self.norm(to_plane(x, frames)).permute(0, 3, 2, 1).contiguous()         # (B, H*W, F, C)
        hidden = self.proj_in(hidden)
        for block in self.transformer_blocks:
            hidden = block(hidden, x.shape[2:], motion)
        hidden = self.proj_out(hidden).transpose(1, 2).flatten(0, 1)                     # (B*F, H*W, C)
        return x + hidden.transpose(1, 2).unflatten(2, x.shape[2:])


class Attention(nn.Module):
    """Multi-head attention. q_in (..., L, C), k_in and v_in (..., L', D) -> (..., L, C).

    Queries, keys and values come from three arguments, not from one: the paper's Eq. 3 adds one embedding to
    the input of queries and keys and another to the input of values.
    """

    def __init__(self, width, heads, head_dim, context_width=None, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_dim, bias)
        self.to_k = nn.Linear(context_width or width, heads * head_dim, bias)
        self.to_v = nn.Linear(context_width or width, heads * head_dim, bias)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, width)])    # a list: the keys are to_out.0.*

    def forward(self, q_in, k_in, v_in):
        # The fused kernels take one batch axis, so (B, H*W, F, C) is B*H*W sequences to them.
        q, k, v = (f(x).flatten(0, -3).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for f, x in ((self.to_q, q_in), (self.to_k, k_in), (self.to_v, v_in)))
        # softmax(q k^T / sqrt(head_dim)) v: (N, heads, L, head_dim)
        x = nnf.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](x.transpose(1, 2).flatten(2)).unflatten(0, q_in.shape[:-2])


class FeedForward(nn.Module):
    """GEGLU and a linear layer, with keys 0 and 2: the middle place is a dropout's, which has no weights."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.net(x)


class GEGLU(nn.Module):
    """Gated linear unit: half of the projection, times GELU of the other half."""

    def __init__(self, width, inner):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        # Two products with half of the matrix each, since halves of one product are slow: they do not lie in
        # one piece, and backward would have to join them.
        value, gate = (nnf.linear(x, w, b)
                       for w, b in zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2)))
        return value * nnf.gelu(gate)


class SpatialLoRA(nn.Module):
    """The helper of `--loss hybrid`: y = W x + B A x in all linear layers of the spatial transformers.

    In 4 of 5 training steps it first learns from one random frame of the clip, seen as a clip of one frame,
    and stays on while the motion embeddings learn from the whole clip: what it holds of the clip's looks they
    need not hold. It is thrown away afterwards. A (rank, C) starts normal with deviation 1 / rank, B (C,
    rank) at zero. Source: MotionDirector (arXiv 2310.08465), whose rank and learning rate these are.
    """

    def __init__(self, unet, generator, rank=32, lr=5e-4):
        super().__init__()
        transformers = [m for m in unet.modules() if isinstance(m, Transformer2DModel)]
        self.layers = [layer for m in transformers for layer in m.modules() if isinstance(layer, nn.Linear)]
        self.frozen = [layer.weight for layer in self.layers]
        self.a = nn.ParameterList([torch.randn(rank, f.in_features, generator=generator) / rank
                                   for f in self.layers])
        self.b = nn.ParameterList([torch.zeros(f.out_features, rank) for f in self.layers])
        self.to(unet.conv_in.weight.device)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=0.01)

    def switch(self, on):
        """Lends W + B A to the layers as their weight, or gives W back: the very tensor that was there."""
        for layer, w, a, b in zip(self.layers, self.frozen, self.a, self.b):
            layer._parameters["weight"] = w + (b @ a).to(w.dtype) if on else w

    def step(self, models, x_t, t, text, target, scaler, generator):
        """With probability 0.8 learns from a frame of x_t and target (B,C,F,H,W) and is on; else is off."""
        on = torch.rand((), generator=generator).item() < 0.8
        frame = torch.randint(x_t.shape[2], (), generator=generator).item()
        self.switch(on)
        if on:
            error = nnf.mse_loss(predict(models, x_t[:, :, frame, None], t, text), target[:, :, frame, None])
            self.optimizer.zero_grad(set_to_none=True)
            scaler.scale(error).backward()
            scaler.step(self.optimizer)
            with torch.no_grad():                              # the clip's step trains the embeddings alone
                self.switch(on)


def scheduler_settings(config):
    """scheduler_config.json as a checked namespace.

    The config of another sampler (DPM, Euler, PNDM, ...) is taken by its noise schedule, as diffusers'
    DDIMScheduler.from_config does; what it says about its own way of sampling is ignored.
    """
    if config.get("_class_name", "DDIMScheduler") != "DDIMScheduler":
        if "beta_start" not in config:
            raise UserError(f"scheduler config: {config['_class_name']} has no noise schedule of betas")
        config = {**config, "clip_sample": False, "thresholding": False, "timestep_spacing": "leading"}
    return read_config("scheduler", config, dict(
        num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
        trained_betas=None, clip_sample=True, set_alpha_to_one=True, steps_offset=0,
        prediction_type="epsilon", thresholding=False, timestep_spacing="leading",
        rescale_betas_zero_snr=False,
    ), implemented=dict(
        beta_schedule=("linear", "scaled_linear"), trained_betas=(None,), clip_sample=(False,),
        prediction_type=("epsilon", "v_prediction"), thresholding=(False,), timestep_spacing=("leading",),
        rescale_betas_zero_snr=(False,)))


# ------------------------------------------------------------------------------------------------------------
# Autoencoder: pictures <-> latents (Rombach et al., arXiv 2112.10752)
# ------------------------------------------------------------------------------------------------------------

class VAEAttention(Attention):
    """One-head self-attention over all positions of a picture, (N,C,H,W) -> (N,C,H,W), plus the input."""

    def __init__(self, channels, groups):
        super().__init__(channels, heads=1, head_dim=channels, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, 1e-6)

    def forward(self, x):
        hidden = self.group_norm(x).flatten(2).transpose(1, 2)                           # (N, H*W, C)
        return x + super().forward(hidden, hidden, hidden).transpose(1, 2).view_as(x)


class VAEBlock(nn.Module):
    """A level of the encoder or decoder: its resnets, then the change of size if there is one."""

    def __init__(self, rows, groups, downsample=False, upsample=False):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(c_in, c_out, groups, 1e-6) for c_in, c_out in rows)
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample2D(rows[-1][1], pad=(0, 1, 0, 1))])
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample2D(rows[-1][1])])

    def forward(self, x):
        for layer in [*self.resnets, *getattr(self, "downsamplers", []), *getattr(self, "upsamplers", [])]:
            x = layer(x)
        return x


class VAEMidBlock(nn.Module):
    """resnet, attention, resnet at the smallest size."""

    def __init__(self, channels, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, groups, 1e-6) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)] if attention else [])

    def forward(self, x):
        for layer in [self.resnets[0], *self.attentions, self.resnets[1]]:
            x = layer(x)
        return x


class VAEHalf(nn.Module):
    """What encoder and decoder have in common: norm, SiLU, convolution at the end."""

    def finish(self, x):
        """(N,C,h,w) -> (N,C_out,h,w)"""
        return self.conv_out(nnf.silu(self.conv_norm_out(x)))


class Encoder(VAEHalf):
    """(B,3,h,w) -> (B,2C,H,W), each level but the last halving the size."""

    def __init__(self, c):
        super().__init__()
        widths, groups = c.block_out_channels, c.norm_num_groups
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for n, (before, width) in enumerate(zip([widths[0], *widths], widths)):
            rows = [(before, width)] + [(width, width)] * (c.layers_per_block - 1)
            self.down_blocks.append(VAEBlock(rows, groups, downsample=n < len(widths) - 1))
        self.mid_block = VAEMidBlock(widths[-1], groups, c.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.finish(self.mid_block(x))


class Decoder(VAEHalf):
    """(B,C,H,W) -> (B,3,h,w): the encoder's levels backwards, with one more resnet each."""

    def __init__(self, c):
        super().__init__()
        widths, groups = c.block_out_channels[::-1], c.norm_num_groups
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid_block = VAEMidBlock(widths[0], groups, c.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for n, (before, width) in enumerate(zip([widths[0], *widths], widths)):
            rows = [(before, width)] + [(width, width)] * c.layers_per_block
            self.up_blocks.append(VAEBlock(rows, groups, upsample=n < len(widths) - 1))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c.out_channels, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.finish(x)


class AutoencoderKL(nn.Module):
    """Pictures <-> latents, 2**(levels-1) times smaller in h and w. Source: diffusers' AutoencoderKL.

    encode: (B,3,h,w) in [-1,1] -> mean, logvar of a Gaussian, each (B,C,H,W)
    decode: z (B,C,H,W) -> (B,3,h,w)

    The latents here are unscaled; the diffusion model sees them times `scaling_factor`.
    """

    def __init__(self, config):
        super().__init__()
        c = read_config("autoencoder", config, dict(
            in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",), block_out_channels=(64,), layers_per_block=1, act_fn="silu",
            latent_channels=4, norm_num_groups=32, scaling_factor=0.18215, shift_factor=None,
            latents_mean=None, latents_std=None, use_quant_conv=True, use_post_quant_conv=True,
            mid_block_add_attention=True,
        ), implemented=dict(
            down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), act_fn=("silu",),
            shift_factor=(None,), latents_mean=(None,), latents_std=(None,), use_quant_conv=(True,),
            use_post_quant_conv=(True,)))
        if not len(c.block_out_channels) == len(c.down_block_types) == len(c.up_block_types):
            raise UserError("autoencoder config: block_out_channels and the two block type lists "
                            "differ in length")
        self.scaling_factor = c.scaling_factor
        self.factor = 2 ** (len(c.block_out_channels) - 1)                              # h / H
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1)

    def encode(self, x):
        """(B,3,h,w) -> mean (B,C,H,W), logvar (B,C,H,W) clamped to [-30, 20]"""
        # Channels last, here and in `decode`: a third less time on a CPU.
        x = x.contiguous(memory_format=torch.channels_last)
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """z (B,C,H,W), unscaled -> (B,3,h,w)"""
        return self.decoder(self.post_quant_conv(z.contiguous(memory_format=torch.channels_last)))


def to_model_range(frames):
    """(F,h,w,3) uint8 -> (1,3,F,h,w) in [-1,1]"""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def to_uint8(video):
    """(3,F,h,w) in [-1,1] -> (F,h,w,3) uint8 numpy array"""
    return ((video + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu().numpy()


# ------------------------------------------------------------------------------------------------------------
# Text encoder: the text tower of CLIP (Radford et al., arXiv 2103.00020)
# ------------------------------------------------------------------------------------------------------------

def quick_gelu(x):
    """OpenAI CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nnf.gelu, "quick_gelu": quick_gelu}


class CLIPAttention(nn.Module):
    """Multi-head self-attention with biases on (B,L,D); `causal`: a token sees itself and those before."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        x = nnf.scaled_dot_product_attention(q, k, v, is_causal=self.causal)          # (B, heads, L, D/heads)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class CLIPEncoderLayer(nn.Module):
    """Pre-norm transformer layer on (B,L,D). CLIP's towers are stacks of it; only text is causal.

    The vision tower, which judges results, is in eval_mi.py.
    """

    def __init__(self, c, causal):
        super().__init__()
        self.self_attn = CLIPAttention(c.hidden_size, c.num_attention_heads, causal)
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(c.hidden_size, c.intermediate_size),
                                  "fc2": nn.Linear(c.intermediate_size, c.hidden_size)})
        self.activation = ACTIVATIONS[c.hidden_act]

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
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

    All L states go to cross-attention and nothing masks the padding, so the pad token is part of the
    conditioning.
    Source: transformers' CLIPTextModel, whose keys these are.
    """

    def __init__(self, config):
        super().__init__()
        c = read_config("text encoder", config, dict(
            vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
            num_attention_heads=8, max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5,
        ), implemented={"hidden_act": tuple(ACTIVATIONS)})
        self.text_model = CLIPTextTransformer(c)

    def forward(self, ids):
        return self.text_model(ids)


@torch.no_grad()
def encode_prompt(models, prompts):
    """list of B strings -> (B,L,D)"""
    return models.text_encoder(models.tokenizer(prompts).to(models.device))


# ------------------------------------------------------------------------------------------------------------
# Tokenizer: byte-pair encoding as in OpenAI's CLIP
# ------------------------------------------------------------------------------------------------------------

def byte_alphabet():
    """256 printable characters, one per byte: BPE merges are text, and a raw byte may not be printable."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    shifted = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + n) for n, b in enumerate(shifted)}}


class CLIPTokenizer:
    """Text -> token ids (B, L): <|startoftext|>, BPE tokens, <|endoftext|>, padding to L = model_max_length.

    Source: OpenAI CLIP's simple_tokenizer (cleaning, word pattern, merges); the special tokens, and with them
    the pad token, are those of the configuration files, as in transformers' CLIPTokenizer.
    """

    WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")

    def __init__(self, vocab, merges, special=None, length=77):
        self.vocab, self.length = vocab, length
        self.rank = {pair: n for n, pair in enumerate(merges)}  # (left, right) -> priority, 0 is merged first
        self.alphabet = byte_alphabet()
        self.noticed = set()                                    # prompts of which a cut was already reported
        names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
                 "pad_token": "<|endoftext|>", **(special or {})}
        # an entry is either the token itself or a dict that describes it
        names = {k: v["content"] if isinstance(v, dict) else v
                 for k, v in names.items() if isinstance(v, (str, dict))}
        missing = sorted({t for t in names.values() if t not in vocab})
        if missing:
            raise UserError(f"tokenizer: special tokens {missing} are not in its vocabulary")
        self.bos, self.eos, self.unk, self.pad = (
            vocab[names[f"{k}_token"]] for k in ("bos", "eos", "unk", "pad"))
        # Special tokens are cut out of the text before BPE sees it. In SD 2 the pad token is "!", so "wow!!!"
        # ends in three tokens "!" and not in the one BPE token "!!!".
        self.special = {t: vocab[t] for t in sorted(set(names.values()), key=len, reverse=True)}
        self.special_pattern = regex.compile("(" + "|".join(map(regex.escape, self.special)) + ")")

    @classmethod
    def from_pretrained(cls, folder):
        """Reads vocab.json and merges.txt, or tokenizer.json alone as transformers 5 writes it.

        What names the special tokens, and the length, is read where it is there: tokenizer_config.json and
        special_tokens_map.json. Without a length, or with transformers' 1e30 for "none", it is CLIP's 77.
        """
        folder = Path(folder)
        if (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
            whole = read_json(folder / "tokenizer.json")
            vocab = {**whole["model"]["vocab"], **{t["content"]: t["id"] for t in whole["added_tokens"]}}
            merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in whole["model"]["merges"]]
        else:
            vocab = read_json(folder / "vocab.json")
            try:
                lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            except (OSError, UnicodeDecodeError) as e:
                raise UserError(f"{folder / 'merges.txt'} cannot be read ({e}); "
                                "get the tokenizer folder again") from None
            merges = [tuple(line.split()) for line in lines
                      if line.strip() and not line.startswith("#version")]
        config, special_map = (read_json(folder / name) if (folder / name).is_file() else {}
                               for name in ("tokenizer_config.json", "special_tokens_map.json"))
        special = {k: v for source in (config, special_map) for k, v in source.items()
                   if k in ("bos_token", "eos_token", "unk_token", "pad_token")}
        length = config.get("model_max_length") or 77
        if length < 3:
            raise UserError(f"{folder / 'tokenizer_config.json'}: model_max_length = {length} leaves no room")
        return cls(vocab, merges, special, 77 if length > 1e6 else int(length))

    @staticmethod
    def clean(text):
        """As OpenAI's CLIP: repair Unicode, resolve HTML entities twice, collapse spaces, lower case."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        return unicodedata.normalize("NFC", " ".join(text.split()).lower())

    @functools.lru_cache(maxsize=4096)
    def bpe(self, word):
        """The token ids of a word: from single bytes, join the pair of lowest rank until none is left."""
        parts = [self.alphabet[b] for b in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda p: self.rank.get(p, math.inf))
            if pair not in self.rank:
                break
            merged, i = [], 0
            while i < len(parts):
                join = i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair
                merged.append("".join(pair) if join else parts[i])
                i += 2 if join else 1
            parts = merged
        return [self.vocab.get(p, self.unk) for p in parts]

    def words(self, text):
        """[(word or special token, its ids)] of a cleaned text, in order."""
        found = []
        for piece in self.special_pattern.split(text):
            if piece in self.special:
                found.append((piece, [self.special[piece]]))
            else:
                found += [(word, self.bpe(word)) for word in self.WORDS.findall(piece)]
        return found

    def encode(self, text):
        """Token ids of one string, L - 2 at most, without start, end and padding. Says what it cuts off."""
        ids, cut = [], []
        for word, tokens in self.words(self.clean(text)):
            ids += tokens
            if len(ids) > self.length - 2:
                cut.append(word)
        if cut and text not in self.noticed:
            self.noticed.add(text)
            print(f"notice: a prompt has more than the {self.length - 2} tokens that the model reads; "
                  f"cut off: {textwrap.shorten(' '.join(cut), 300)}")
        return ids[:self.length - 2]

    def __call__(self, texts):
        """list of B strings -> LongTensor (B, L), padded and truncated to L."""
        rows = [[self.bos, *self.encode(text), self.eos] for text in texts]
        return torch.tensor([row + [self.pad] * (self.length - len(row)) for row in rows])


# ------------------------------------------------------------------------------------------------------------
# Motions at other sizes and in files; interrupted trainings
# ------------------------------------------------------------------------------------------------------------

def resized(m, first, trained_grid, frames, grid):
    """An embedding (1 or H*W, F, C) for another number of frames or grid (H, W) than it was trained on.

    first          the first frames count, as in the authors' files of 32 slots; else time is stretched
    trained_grid   (H, W), or None where the file did not say
    """
    if first and frames <= m.shape[1]:
        m = m[:, :frames]
    elif frames != m.shape[1]:
        # align_corners: first and last frame stay what they are, and a steady drift stays steady.
        m = nnf.interpolate(m.transpose(1, 2), frames, mode="linear", align_corners=True).transpose(1, 2)
    if len(m) > 1 and trained_grid is None and len(m) != math.prod(grid):
        raise UserError(f"the motion file was made for {len(m)} positions and does not say in which shape; "
                        f"this size has {grid[0]}x{grid[1]}: use the --size that it was trained with")
    if len(m) > 1 and trained_grid not in (None, tuple(grid)):
        plane = m.permute(1, 2, 0).unflatten(2, trained_grid)                            # (F, C, H, W)
        plane = nnf.interpolate(plane, tuple(grid), mode="bilinear", align_corners=False)
        m = plane.flatten(2).permute(2, 0, 1)
    return m


def read_motion_file(path):
    """A motion file's tensors, and what it says about them: dict(frames, grids, source, settings).

    Two kinds: safetensors by MotionEmbeddings.save, and motion_embed.pt by the authors, which says nothing.
    UserError: other tensors, values that are not finite, settings that cannot be.
    """
    tensors, ends = load_tensors(path), MotionEmbeddings.PARTS
    if not tensors or any(not key.endswith(ends) or m.dim() != 3 for key, m in tensors.items()):
        raise UserError(f"{path} is not a motion file: its keys must end in pos_embed or vSpatial")
    bad = [key for key, value in tensors.items() if not value.isfinite().all()]
    if bad:
        raise UserError(f"{path} has values that are not finite in {bad[0]}; train the motion again")
    metadata = read_metadata(path) if Path(path).suffix == ".safetensors" else {}
    try:
        about = json.loads(metadata.get("mini_mi", "{}"))
        # In files of the first edition "fixed_slots" marks what came from a file of the authors.
        frames = None if about.get("fixed_slots") else about.get("frames")
        if frames is not None and any(m.shape[1] != frames for m in tensors.values()):
            raise ValueError(f"not all tensors have {frames} frames")
        blocks = {MotionEmbeddings.block(key) for key in tensors}
        grids = {block: about.get("grids", {}).get(block) for block in blocks}
        grids = {block: grid and tuple(grid) for block, grid in grids.items()}
        for key, m in tensors.items():
            grid = grids[MotionEmbeddings.block(key)]
            if grid and len(m) not in (1, math.prod(grid)):
                raise ValueError(f"{key} has {len(m)} positions and the grid {grid}")
        settings = {name: about[name] for name in MotionEmbeddings.SETTINGS if name in about}
        for name, end in (("use_mqk", "pos_embed"), ("use_mv", "vSpatial")):
            settings.setdefault(name, any(key.endswith(end) for key in tensors))
        source = dict(about.get("source", {}))
        return tensors, dict(frames=frames, grids=grids, source=source, settings=settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its settings cannot be read ({error}); train the motion again") from None


def save_state(path, parts, generator, losses):
    """Writes a training's state; returns path, or None after a line that says why there is none."""
    saved = {name: part.state_dict() for name, part in parts.items()}
    try:
        with atomic_write(path) as temporary:
            torch.save(dict(saved, generator=generator.get_state(), losses=losses), temporary)
    except (UserError, RuntimeError) as error:     # RuntimeError: torch's word for a disk that became full
        tqdm.write("the training goes on, but an interruption will cost what it does from here: its state "
                   f"cannot be kept ({one_line(error)})")
        return None
    return path


def load_state(path, parts, generator, steps):
    """Puts a saved training of at most `steps` into `parts`, in place; returns its losses.

    UserError: the file is damaged, of another kind of training, or further than it should be.
    """
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        if saved.keys() != {*parts, "generator", "losses"}:
            raise ValueError("it is of another kind of training")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        generator.set_state(saved["generator"])
        losses = saved["losses"]
    except Exception as error:                       # torch.load raises a dozen kinds for a damaged file
        raise UserError(f"the training state {path} cannot be used ({one_line(error)}); "
                        "delete it to start over") from None
    if len(losses) > steps:
        raise UserError(f"an earlier training got {len(losses)} steps far, more than the {steps} asked "
                        f"for: ask for as many, or delete {path} to start over")
    return losses


# =================================== PLUMBING: nothing below is about the method ==========================

# ------------------------------------------------------------------------------------------------------------
# Configuration files of published checkpoints
# ------------------------------------------------------------------------------------------------------------
def read_config(kind, config, fields, implemented=None):
    """The settings of one model as a namespace: the reference library's defaults, overridden by `config`.

    kind         what the config describes, for messages
    config       dict, as `json.load` gives it; `_*` and INERT_FIELDS are skipped
    fields       dict, field -> default of diffusers or transformers
    implemented  dict, field -> the values that this file implements; any other value is a UserError
    """
    settings = {**fields, **{k: v for k, v in config.items() if k in fields}}
    for field, allowed in (implemented or {}).items():
        value = settings[field]
        if any(v not in allowed for v in (value if isinstance(value, (list, tuple)) else [value])):
            raise UserError(f"{kind} config: {field} = {value} is not implemented; it takes {allowed}")
    return SimpleNamespace(**settings)


# ------------------------------------------------------------------------------------------------------------
# Loading a checkpoint: a folder in diffusers layout
# ------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Models:
    """The five parts of a text-to-video model. The networks are frozen and in eval mode."""
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet3DConditionModel
    scheduler: DDIMScheduler

    @property
    def device(self):
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self):
        """The number format of the UNet's weights."""
        return self.unet.conv_in.weight.dtype


def rename_keys(tensors, text_encoder=False):
    """The differences between files in circulation and the keys of this file."""
    renamed = {}
    for key, value in tensors.items():
        if key.endswith(".position_ids"):            # a constant 0, 1, 2, ... that old text encoders store
            continue
        if text_encoder and not key.startswith("text_model."):                     # written by transformers 5
            key = f"text_model.{key}"
        # The autoencoder's attention in files saved before mid-2023.
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            key = re.sub(rf"(mid_block\.attentions\.0)\.{old}\.", rf"\1.{new}.", key)
        renamed[key] = value
    return renamed


def load_module(build, folder, stem, device, dtype):
    """build(config.json of `folder`) with its weights, stem.safetensors or stem.bin. Frozen, in eval mode."""
    config = read_json(folder / "config.json")
    bin_stem = "pytorch_model" if stem == "model" else stem
    files = [folder / f"{stem}.safetensors", folder / f"{bin_stem}.bin"]
    path = next((f for f in files if f.is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds neither {files[0].name} nor {files[1].name}; "
                        "get the model folder again")
    with torch.device("meta"):                 # no memory and no random numbers for weights that get replaced
        module = build(config)
    tensors = rename_keys(load_tensors(path), text_encoder=build is CLIPTextModel)
    expected = module.state_dict()
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    wrong = sorted(k for k in expected.keys() & tensors.keys() if expected[k].shape != tensors[k].shape)
    if missing or extra or wrong:
        raise UserError(f"{path} does not fit its config.json: {len(missing)} tensors missing {missing[:2]}, "
                        f"{len(extra)} unknown {extra[:2]}, {len(wrong)} of another shape {wrong[:2]}")
    bad = next((k for k, v in tensors.items() if not v.isfinite().all()), None)
    if bad:
        raise UserError(f"{path} has values that are not finite in {bad}; get the file again")
    module.load_state_dict({k: v.to(device, dtype) for k, v in tensors.items()}, strict=True, assign=True)
    parameters = sum(v.numel() for v in tensors.values())
    print(f"loaded {len(tensors)} tensors, {parameters:,} parameters: {folder.name}")
    return module.eval().requires_grad_(False)


def local_folder(model):
    """The folder that `model` names on this machine, or None if it names a hub repository."""
    folder = HERE / "data" / "tiny" if model == "tiny" else Path(model)
    if (folder / "unet").is_dir():
        return folder
    if folder.exists() or model not in ALIASES and str(model).count("/") != 1:
        raise UserError(f"{folder} is no model folder: there is no unet/ in it; give a folder in diffusers "
                        f"layout, a hub repository (owner/name), tiny or {', '.join(ALIASES)}")
    return None


def model_config(model, part):
    """config.json of one part, such as "unet"; of a hub repository only this file is fetched, no weights."""
    folder = local_folder(model)
    return read_json(folder / part / "config.json" if folder else
                     fetch(ALIASES.get(model, model), f"{part}/config.json"))


def load_models(folder_or_repo, device="cpu", dtype=torch.float32):
    """Models from a folder in diffusers layout or from a hub repository.

    The UNet and the text encoder take `dtype`. The autoencoder stays float32: in float16 it can overflow, and
    its cost is small next to the UNet's.
    """
    folder = local_folder(folder_or_repo) or fetch_model(folder_or_repo)
    return Models(
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        load_module(CLIPTextModel, folder / "text_encoder", "model", device, dtype),
        load_module(AutoencoderKL, folder / "vae", "diffusion_pytorch_model", device, torch.float32),
        load_module(UNet3DConditionModel, folder / "unet", "diffusion_pytorch_model", device, dtype),
        DDIMScheduler(read_json(folder / "scheduler" / "scheduler_config.json")))


# ------------------------------------------------------------------------------------------------------------
# Files: written beside their place and renamed; tensors are read without trusting the file
# ------------------------------------------------------------------------------------------------------------
def one_line(error):
    """The first line of what another library says, to end a message of ours with."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; rename it to `path` when the block succeeds, else delete it.

    The folder is created. A reader of `path` meets the old file or the whole new one, never a part of it.
    UserError: the place cannot be written.
    """
    path = Path(path)
    # The suffix stays last: PIL and ffmpeg choose the format by it. Machines that share a folder can have
    # processes of one number.
    temporary = path.with_name(f".{path.stem}.{platform.node()}-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # an unwritable folder shows here, before any work is done
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"cannot write {path} ({reason}): choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_json(path):
    """The JSON object in a file, as a dict. UserError: missing, not JSON, not an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({one_line(error)}); fetch or write it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _safetensors_header(path):
    """(header, metadata, where the data begins). On disk: 8 bytes little-endian length, JSON, raw data."""
    try:
        with open(path, "rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(f"truncated: a header of {length} bytes does not fit into {size} bytes")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is not text")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({one_line(error)}); "
                        "fetch it again") from error
    return header, metadata, 8 + length


def _load_safetensors(path):
    """{name: tensor}: views of the memory-mapped file, after every offset in its header was checked."""
    header, _, start = _safetensors_header(path)
    with open(path, "rb") as file:
        # Pages load when they are used; ACCESS_COPY: whoever writes into a tensor does not change the file.
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    data = torch.frombuffer(memory, dtype=torch.uint8)[start:]
    tensors, position = {}, 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, end) = (entry[key] for key in ("dtype", "shape", "data_offsets"))
            dtype = SAFETENSORS_DTYPES.get(dtype)
            if dtype is None:
                raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
            if any(n < 0 for n in shape) or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name}: {end - begin} bytes cannot hold shape {shape} of {entry['dtype']}")
            # Each tensor begins where the one before it ended: this excludes gaps and overlaps at once.
            if begin != position or end > len(data):
                raise ValueError(f"{name}: bytes {begin} to {end} overlap, leave a gap or lie outside")
            raw = data[begin:end]
            if (start + begin) % dtype.itemsize:
                raw = raw.clone()  # old writers did not align; a wider dtype needs it
            tensors[name], position = raw.view(dtype).reshape(shape), end
        if position != len(data):
            raise ValueError(f"{len(data) - position} bytes belong to no tensor")
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{path} is damaged or truncated ({one_line(error)}); fetch it again") from error
    return tensors


def load_tensors(path):
    """{name: tensor on the CPU} from .safetensors, or from .bin / .pt / .pth without running code from it.

    UserError: missing, truncated, offsets that lie, unknown dtype, a pickle that holds more than tensors.
    A pickle is a program; `weights_only` refuses every call but the few that build tensors.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist or is not a file")
    if Path(path).suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} was refused: it is damaged, or a pickle with code or objects beside "
                        f"tensors ({type(error).__name__}); fetch it again, or as safetensors") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise UserError(f"{path} should hold a dict of tensors (a state dict)")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def read_metadata(path):
    """The {str: str} metadata of a safetensors file; {} where it has none."""
    return _safetensors_header(path)[1]


def save_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} and optional {str: str} metadata as safetensors, atomically; dtypes are kept."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    # Wide dtypes first, and a header padded to 8 bytes: every tensor lies at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header, position = {"__metadata__": metadata or {}}, 0
    for name, tensor in ordered:
        offsets = [position, position := position + tensor.numel() * tensor.dtype.itemsize]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


# ------------------------------------------------------------------------------------------------------------
# Hub: {endpoint}/{repo}/resolve/{revision}/{file}; resumed, verified, cached
# ------------------------------------------------------------------------------------------------------------
ALIASES = {"zeroscope": "cerspense/zeroscope_v2_576w"}
NETWORK_ERRORS = (
    urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError,
)


class NotOnHub(UserError):
    """The hub has no such file (404). Some files are optional."""


class _KeepRedirects(urllib.request.HTTPRedirectHandler):
    """Makes urllib hand redirects back: their headers hold the hash, and the token must stay behind."""

    def redirect_request(self, *args):
        """No request: the answer itself goes to the caller."""
        return None


def _open_url(url, offset, token):
    """GET `url` from byte `offset` on; returns (answer, SHA-256 of the whole file or "", its bytes or None).

    Hash and size are the hub's word (X-Linked-Etag, X-Linked-Size), sent with the redirect to a storage host.
    """
    opener, hub = urllib.request.build_opener(_KeepRedirects), urlsplit(url)[:2]
    sha256, size = "", None
    for _ in range(10):
        if urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"{url} is no web address: HF_ENDPOINT should look like https://huggingface.co")
        at_hub = urlsplit(url)[:2] == hub  # same scheme, host and port: only there the token may go
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        if token and at_hub:
            headers["Authorization"] = f"Bearer {token}"
        try:
            answer = opener.open(urllib.request.Request(url, headers=headers), timeout=30)
        except urllib.error.HTTPError as error:  # urllib raises all but 2xx; it is an answer all the same
            answer = error
        if at_hub:
            etag = answer.headers.get("X-Linked-Etag", "").strip('"')
            if re.fullmatch("[0-9a-f]{64}", etag):  # small files carry a git SHA-1 there
                sha256 = etag
            size = int(answer.headers.get("X-Linked-Size") or 0) or size
        if answer.status not in (301, 302, 303, 307, 308):
            return answer, sha256, size
        answer.close()
        url = urljoin(url, answer.headers.get("Location", ""))
    raise UserError(f"{url}: too many redirects; check HF_ENDPOINT")


def _download(url, target, token):
    """Bring `url` to `target` by way of a part file that a later call continues.

    The part is named by the SHA-256 of the whole, so that parts of two versions are never joined. Raises one
    of NETWORK_ERRORS where another attempt may help, UserError where it will not.
    """
    part = next(target.parent.glob(f".{target.name}.{'?' * 64}.part"), None)
    offset = part.stat().st_size if part else 0
    answer, sha256, size = _open_url(url, offset, token)
    with answer:
        if answer.status == 404:
            raise NotOnHub(f"{url} does not exist (404): check the name of the folder or repository")
        if answer.status in (401, 403):
            raise UserError(f"{url} was refused ({answer.status}): no such repository, or a gated one: "
                            "accept its terms on its page and set HF_TOKEN")
        if part and (answer.status == 416 or not sha256 or sha256 not in part.name):
            part.unlink()  # the part is no beginning of this file: start again
            raise ConnectionError("the file on the hub has changed")
        if answer.status not in (200, 206):
            raise ConnectionError(f"the server answered {answer.status}")
        resumed = answer.status == 206  # 200: the server ignores Range and sends everything
        offset = offset if resumed else 0
        size = size or offset + int(answer.headers.get("Content-Length") or 0)
        needed, free = size - offset, shutil.disk_usage(target.parent).free
        if needed > free:
            raise UserError(f"the disk is too full for {target.name}: {needed / 1e6:.0f} MB to come, "
                            f"{free / 1e6:.0f} MB free in {target.parent}; make room or set HF_HOME")
        part = target.with_name(f".{target.name}.{sha256}.part")
        bar = tqdm(total=size, initial=offset, unit="B", unit_scale=True, desc=target.name,
                   disable=not sha256)  # small files come without a hash, and need no bar
        with bar, open(part, "ab" if resumed else "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if part.stat().st_size < size:
        raise ConnectionError(f"the connection ended at byte {part.stat().st_size} of {size}")
    if size and part.stat().st_size > size:
        part.unlink()
        raise ConnectionError(f"more than the announced {size} bytes arrived")
    digest = hashlib.sha256()
    with open(part, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if sha256 and digest.hexdigest() != sha256:
        part.unlink()
        raise UserError(f"{target.name} arrived damaged (SHA-256 {digest.hexdigest()[:12]}..., the hub says "
                        f"{sha256[:12]}...) and was deleted: run it again, or check HF_ENDPOINT")
    os.replace(part, target)


def fetch(repo, filename, revision="main"):
    """Path in the cache of `filename` of hub repository `repo` ("owner/name"); downloaded if it is not there.

    Environment: HF_ENDPOINT (hub), HF_TOKEN (gated models), HF_HOME (cache; default ~/.cache/huggingface).
    UserError: no network, refused, damaged, disk full; NotOnHub: 404.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise UserError(f"{repo} is neither a model folder nor a hub repository (owner/name)")
    cache = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "mini_mi"
    target = cache / repo.replace("/", "--") / quote(revision, safe="") / filename
    if target.is_file():
        return target
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{repo}/resolve/{quote(revision, safe='')}/{quote(filename)}"
    for pause in (0.5, 1, 2, 4, 8):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _download(url, target, os.environ.get("HF_TOKEN", "").strip())
            return target
        except NETWORK_ERRORS as error:
            problem = one_line(getattr(error, "reason", error))
            if pause == 0.5 and isinstance(error, urllib.error.URLError):
                break  # there is no way to the hub at all: waiting would only delay the message
            time.sleep(pause)
        except OSError as error:
            raise UserError(f"cannot write {target} ({error.strerror}): make room or set HF_HOME") from error
    raise UserError(f"cannot fetch {url} ({problem}): check the network, run it again; what came is kept")


def fetch_model(repo):
    """Folder with the files of a text-to-video repository (or alias) in diffusers layout; see fetch."""
    repo = ALIASES.get(repo, repo)
    folder = fetch(repo, "model_index.json").parent
    complete = folder / ".complete"  # offline, nobody can say again which optional files there are
    if complete.exists():
        return folder
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json",
                 "text_encoder/config.json", "vae/config.json", "unet/config.json"):
        fetch(repo, name)
    for name in ("tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json"):
        with contextlib.suppress(NotOnHub):
            fetch(repo, name)
    for name, pickled in (("text_encoder/model", "text_encoder/pytorch_model"),
                          ("vae/diffusion_pytorch_model", "vae/diffusion_pytorch_model"),
                          ("unet/diffusion_pytorch_model", "unet/diffusion_pytorch_model")):
        try:
            fetch(repo, f"{name}.safetensors")
        except NotOnHub:
            fetch(repo, f"{pickled}.bin")
    complete.touch()
    return folder


# ------------------------------------------------------------------------------------------------------------
# Video files: PIL for GIF, WebP, APNG and folders of images; the program ffmpeg for everything else
# ------------------------------------------------------------------------------------------------------------
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SMALLEST = 8  # pixels; a smaller frame has no motion worth learning


def _picture_frames(path):
    """Yield the frames of a picture file as RGB PIL images, white where nothing was painted."""
    try:
        with warnings.catch_warnings():  # a size that PIL only warns of is refused, too
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # A closed list of formats: others may start programs (EPS), whatever the suffix says.
            image = Image.open(path, formats=("GIF", "WEBP", "PNG", "JPEG", "BMP", "TIFF"))
        with image:
            # An APNG may begin with a still for old viewers that is no part of the clip.
            for index in range(bool(image.info.get("default_image")), getattr(image, "n_frames", 1)):
                image.seek(index)
                frame = ImageOps.exif_transpose(image).convert("RGBA")
                yield Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame).convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"{path} has too many pixels to be decoded safely: scale it down first") from error
    except Exception as error:  # decoders raise anything on damaged files
        raise UserError(f"{path} is damaged or no picture file ({one_line(error)})") from error


def _folder_frames(folder):
    """Yield the images of a folder as RGB PIL images in natural order (2.png before 10.png)."""
    def natural(path):
        """A file name, its numbers as numbers."""
        return [int(s) if s.isdecimal() else s.lower() for s in re.split("([0-9]+)", path.name)]

    paths = [path for path in folder.glob("[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES]
    for path in sorted(paths, key=natural):
        yield next(_picture_frames(path))


def _ffmpeg(path):
    program = shutil.which("ffmpeg")
    if program is None:
        raise UserError(f"{path}: this format needs the program ffmpeg, which is not on PATH: install it, or "
                        "use .gif or .webp")
    return program


def _ffmpeg_frames(path):
    """Yield the frames of a video file as RGB PIL images, upright and with square pixels."""
    # The frames are renumbered, so that exactly the stored ones arrive also where the rate varies. As PPM
    # pictures they tell their own size (with a phone's rotation mark the size in the header is wrong).
    command = [_ffmpeg(path), "-v", "error", "-xerror", "-nostdin", "-i", f"file:{path}", "-map", "0:v:0",
               "-vf", "settb=1/25,setpts=N,scale=iw*sar:ih", "-r", "25",
               "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    # Errors go to a file: a second pipe that nobody empties would stop ffmpeg when it is full.
    with (tempfile.TemporaryFile() as log,
          subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process):
        pipe = process.stdout
        try:
            while pipe.readline():  # "P6", then "width height", then "255", then the bytes
                size = tuple(map(int, pipe.readline().split()))
                pipe.readline()
                yield Image.frombytes("RGB", size, pipe.read(3 * size[0] * size[1]))
            if process.wait():
                log.seek(0)
                reason = re.sub(r"\[.*?\] ", "", one_line(log.read().decode(errors="replace")))
                raise UserError(f"{path} is damaged, truncated or no video ({reason}): export it again")
        finally:
            process.kill()  # a reader that has enough leaves early


def _frames(path):
    """Yield the frames of any supported clip as RGB PIL images of one size; UserError if that cannot be."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give a video file, a GIF or a folder of images")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    picture = path.suffix.lower() in (".gif", ".webp", ".png", ".apng")
    reader = _folder_frames if path.is_dir() else _picture_frames if picture else _ffmpeg_frames
    size = None
    with contextlib.closing(reader(path)) as frames:
        for frame in frames:
            size = size or frame.size
            if frame.size != size:
                raise UserError(f"{path} mixes frames of {size} and {frame.size} pixels: make them one size")
            if min(size) < SMALLEST:
                raise UserError(f"{path} has frames of {size} pixels: {SMALLEST} x {SMALLEST} are the least")
            yield frame


def read_video(path, frames, size, stride=None):
    """Read a clip as (F,h,w,3) uint8, where F = `frames` and `size` = (width, height) in pixels.

    The frames are spaced evenly from first to last, or are every `stride`-th from the first. Each is scaled
    (bicubic, antialiased) until it covers `size`, then cropped to the centre. Frames are never repeated: a
    clip with too few of them is a UserError, and so is everything that cannot be decoded.
    """
    if frames < 1 or (stride is not None and stride < 1):
        raise UserError(f"frames ({frames}) and stride ({stride}) must be at least 1")
    # Decoded twice, at first only to count: so a long film needs memory for the chosen frames alone.
    total = sum(1 for _ in _frames(path))
    needed = frames if stride is None else (frames - 1) * stride + 1
    if total < needed:
        raise UserError(f"{path} has {total} frame{'s' * (total != 1)}, but {needed} are needed: "
                        "take a longer clip, fewer frames or a smaller stride")
    wanted = np.linspace(0, total - 1, frames).round() if stride is None else np.arange(needed)[::stride]
    chosen = [frame for index, frame in enumerate(_frames(path)) if index in wanted]
    return np.stack([np.asarray(ImageOps.fit(frame, size, Image.Resampling.BICUBIC)) for frame in chosen])


def _gif(frames, fps):
    """GIF bytes with one palette for all frames and no dithering: what stands still does not flicker.

    PIL's animation writer merges equal neighbours into one longer frame, and the clip would come back shorter
    than it was; so the bytes around the frames are written here (GIF89a specification).
    """
    _, height, width, _ = frames.shape
    some = frames.reshape(-1, 1, 3)[:: frames.size // 2**18 | 1]  # a hundred thousand pixels will do
    palette = Image.fromarray(np.ascontiguousarray(some)).quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
    data = struct.pack("<6sHHBBB", b"GIF89a", width, height, 0xF7, 0, 0)  # 0xF7: 256 colours for all frames
    data += bytes(palette.getpalette()).ljust(768, b"\0")
    data += b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"  # loop for ever
    for index, frame in enumerate(frames):
        # Hundredths of a second that add up to the right length; viewers do not respect fewer than 2.
        duration = max(2, round((index + 1) * 100 / fps) - round(index * 100 / fps))
        image = Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        data += b"".join(GifImagePlugin.getdata(image, duration=10 * duration))
    return data + b";"


def _webp(frames, fps):
    """Lossless animated WebP bytes.

    libwebp merges equal neighbours, too, so the chunks are written here: VP8X, ANIM, and an ANMF around each
    still (WebP container specification).
    """
    def chunk(name, data):
        """A RIFF chunk, padded to even length."""
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    def bits24(*numbers):
        """Little-endian, three bytes each."""
        return b"".join(struct.pack("<I", number)[:3] for number in numbers)

    size = bits24(frames.shape[2] - 1, frames.shape[1] - 1)
    chunks = chunk(b"VP8X", b"\2\0\0\0" + size) + chunk(b"ANIM", bytes(6))  # 2: animated; loop for ever
    for index, frame in enumerate(frames):
        still = BytesIO()
        Image.fromarray(frame).save(still, "WEBP", lossless=True, quality=50)  # lossless: quality is effort
        duration = round((index + 1) * 1000 / fps) - round(index * 1000 / fps)  # milliseconds
        # Offset, size, duration, 2: paint over all; then the still without the 12 bytes of its RIFF header.
        chunks += chunk(b"ANMF", bits24(0, 0) + size + bits24(duration) + b"\2" + still.getvalue()[12:])
    return chunk(b"RIFF", b"WEBP" + chunks)


def write_video(path, frames, fps):
    """Write (F,h,w,3) uint8 `frames` at `fps` frames per second as .gif, .webp (lossless) or .mp4.

    Read again, it has F frames, equal neighbours included. An mp4 of odd size repeats its last row or column,
    since yuv420p keeps colour for pairs of pixels. UserError: another suffix, no ffmpeg, unwritable.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".gif", ".webp", ".mp4"):
        raise UserError(f"cannot write {path}: its name should end in .gif, .webp or .mp4")
    with atomic_write(path) as temporary:
        if suffix == ".mp4":
            _, height, width, _ = frames.shape
            frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
            command = [_ffmpeg(path), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24",
                       "-s", f"{width + width % 2}x{height + height % 2}", "-r", str(fps), "-i", "-",
                       "-pix_fmt", "yuv420p", "-b:v", "8M", "-movflags", "+faststart", f"file:{temporary}"]
            result = subprocess.run(command, input=frames.tobytes(), capture_output=True)
            if result.returncode:
                raise UserError(f"ffmpeg cannot write {path}: {one_line(result.stderr.decode())}")
        else:
            temporary.write_bytes(_gif(frames, fps) if suffix == ".gif" else _webp(frames, fps))


# ------------------------------------------------------------------------------------------------------------
# Pictures: labelled frames and the loss curve, drawn with PIL alone
# ------------------------------------------------------------------------------------------------------------
INK, GREY, PALE, BLUE, SKY = "#20242c", "#858c97", "#e6e8ec", "#1f5fbf", "#b9d0f0"


def _caption(text, width, lines):
    """(18*lines+6, width, 3) uint8: `text` on white, wrapped, ending in "..." where it needs more lines."""
    font, strip = ImageFont.load_default(14), Image.new("RGB", (width, 18 * lines + 6), "white")
    rows = textwrap.wrap(text, int(width / font.getlength("n")), max_lines=lines, placeholder="...")
    ImageDraw.Draw(strip).multiline_text((4, 2), "\n".join(rows), INK, font, spacing=4)
    return np.asarray(strip)


def _rescale(video, width):
    """(F,h,w,3) uint8 enlarged by a whole number to about `width` pixels, or reduced to that width."""
    scale = round(width / video.shape[2]) or width / video.shape[2]
    size = (round(scale * video.shape[2]), round(scale * video.shape[1]))
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in video])


def side_by_side(videos, labels):
    """(F,H,W,3) uint8: clips (F,h,w,3) of one size in a row under their labels, enlarged when tiny."""
    columns = []
    for video, label in zip(videos, labels, strict=True):
        video = _rescale(video, max(192, video.shape[2]))  # a label can be read above 192 pixels
        video = np.pad(video, ((0, 0), (0, 0), (0, 6), (0, 0)), constant_values=255)
        strip = _caption(label, video.shape[2], 3)
        columns.append(np.stack([np.concatenate([strip, frame]) for frame in video]))
    return np.concatenate(columns, axis=2)


def contact_sheet(rows):
    """PIL image with a row per (label, video (F,h,w,3) uint8): up to 8 frames, evenly from first to last."""
    strips = []
    for label, video in rows:
        chosen = np.linspace(0, len(video) - 1, min(8, len(video))).round().astype(int)
        tiles = np.pad(_rescale(video[chosen], 192), ((0, 0), (0, 6), (0, 6), (0, 0)), constant_values=255)
        strip = np.concatenate(list(tiles), axis=1)
        strips += [_caption(label, strip.shape[1], 1), strip]
    width = max(strip.shape[1] for strip in strips)
    strips = [np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips]
    return Image.fromarray(np.concatenate(strips))


def _ticks(low, high):
    """About five round numbers within [low, high]: 1, 2 or 5 times a power of ten apart."""
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * 6 >= high - low)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def loss_curve(losses):
    """PIL image, 900x480: the loss of each training step as a pale dot, its moving average as a line."""
    losses = np.asarray(losses, dtype=float)
    window = np.ones(max(1, len(losses) // 12))
    # Centred average; the division makes averages of the shorter windows at both ends, too.
    mean = np.convolve(losses, window) / np.convolve(np.ones_like(losses), window)
    mean = mean[len(window) // 2:][:len(losses)]
    last, highest = max(2, len(losses)), max(1.05 * losses.max(), 1e-9)

    zoom = 2  # drawn at twice the size, then reduced: PIL does not antialias lines
    left, top, right, bottom, dot = 80 * zoom, 44 * zoom, 876 * zoom, 420 * zoom, 2.5 * zoom
    image = Image.new("RGB", (900 * zoom, 480 * zoom), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14 * zoom)

    def place(step, loss):
        """Its pixel in the picture."""
        return left + (right - left) * (step - 1) / (last - 1), bottom - (bottom - top) * loss / highest

    for tick in _ticks(0, highest):
        y = place(1, tick)[1]
        draw.line((left, y, right, y), PALE, zoom)
        draw.text((left - 8 * zoom, y), f"{tick:.4g}", GREY, font, anchor="rm")
    for tick in _ticks(1, last):
        if tick == round(tick):  # there is no half step
            x = place(tick, 0)[0]
            draw.line((x, bottom, x, bottom + 5 * zoom), GREY, zoom)
            draw.text((x, bottom + 10 * zoom), f"{tick:.0f}", GREY, font, anchor="mt")
    draw.line((left, bottom, right, bottom), GREY, zoom)
    for x, y in map(place, range(1, len(losses) + 1), losses):
        draw.ellipse((x - dot, y - dot, x + dot, y + dot), SKY)
    draw.line(list(map(place, range(1, len(losses) + 1), mean)), BLUE, 3 * zoom, joint="curve")
    draw.text(((left + right) / 2, bottom + 34 * zoom), "training step", INK, font, anchor="mt")
    draw.text((left, 14 * zoom), f"loss   (line: mean of {len(window)} steps)", INK, font)
    return image.resize((900, 480), Image.Resampling.LANCZOS)


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------

# What a model was trained for; options that are not given take these.
MODEL_DEFAULTS = {
    "tiny": dict(frames=16, size="64x64", fps=10, steps=150, lr=0.1, batch=2, sample_steps=25, guidance=3.0),
    "other": dict(frames=24, size="576x320", fps=8, steps=350, lr=0.02, batch=1, sample_steps=30,
                  guidance=12.0),                            # the paper's
}


def option(default, about, **extra):
    """A field of Config with its default and its --help text."""
    return dataclasses.field(default=default, metadata={"about": about, **extra})


@dataclasses.dataclass
class Config:
    """All settings of a run. The command line is made from this class, and run.json records it."""
    model: str = option("tiny", "the embedded model (tiny), zeroscope, a hub repository (owner/name) "
                                "or a model folder")
    video: str = option(None, "reference clip: GIF, WebP, APNG, a folder of pictures, or a file that ffmpeg "
                              "reads (default: the first of data/clips)")
    source_prompt: str = option(None, "what the reference shows (clips of data/clips bring theirs)")
    prompts: tuple = option((), "what to show instead; repeat for more clips", flag="--prompt")
    negative_prompt: str = option("", "what to keep away from")
    motion: str = option(None, "reuse this motion file; nothing is trained")
    out: str = option("out", "folder for the results")

    use_mqk: bool = option(True, "ablation: without the Motion Query-Key embedding", flag="--no-mqk")
    use_mv: bool = option(True, "ablation: without the Motion Value embedding", flag="--no-mv")
    debias: str = option("diff", "how MV is cleared of static appearance at inference",
                         choices=("diff", "mean", "none"))
    debias_in_training: bool = option(False, "debias MV in training, too (not in the paper)")
    mqk_dims: int = option(1, "MQK per frame (1) or per frame and position (2)", choices=(1, 2))
    mv_dims: int = option(2, "MV per frame (1) or per frame and position (2)", choices=(1, 2))
    levels: tuple = option((), "UNet levels that get embeddings, such as 1,2; 0 is the finest "
                               "(default: the deepest level that has attention)")
    motion_type: str = option("object", "camera: MV is dropped at inference, "
                                        "as the authors do for camera motion", choices=("object", "camera"))

    steps: int = option(None, "training steps")
    lr: float = option(None, "learning rate")
    batch: int = option(None, "noise levels in every training step")
    loss: str = option("mse", "training loss; debiased: MotionDirector's, unrelated to --debias",
                       choices=("mse", "debiased", "hybrid"))
    snapshots: tuple = option((), "also keep the embeddings of these steps, such as 50,100: "
                                  "early ones often leak less of the reference's looks")
    checkpointing: bool = option(False, "recompute activations in training: slower, much less memory")

    sample_steps: int = option(None, "DDIM steps")
    guidance: float = option(None, "classifier-free guidance; 1 or less switches it off")
    noise_prior: float = option(0.5, "share of the inverted reference in the start noise, 0 to 1")

    frames: int = option(None, "frames of the clips")
    size: str = option(None, "WIDTHxHEIGHT in pixels")
    stride: int = option(None, "take every n-th frame of the reference "
                               "(default: spread evenly over all of it)")
    fps: int = option(None, "frames per second of what is written")
    seed: int = option(0, "random seed of training and sampling")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "number format of the UNet; auto: float16 on cuda, float32 elsewhere",
                        choices=("auto", "float32", "bfloat16", "float16"))
    dry_run: bool = option(False, "say what would happen, and stop")

    @property
    def width_height(self):
        """(width, height) in pixels"""
        return tuple(map(int, self.size.split("x")))


def model_defaults(model):
    """The defaults of a model; folders that data/make_tiny.py wrote have its small UNet, and take tiny's."""
    folder = local_folder(model)
    if folder is None:
        return MODEL_DEFAULTS["other"]
    widths = unet_settings(read_json(folder / "unet" / "config.json")).block_out_channels
    return MODEL_DEFAULTS["tiny" if widths[0] <= 64 else "other"]


def numbers(text):
    """'1,2' -> (1, 2)"""
    return tuple(int(part) for part in text.split(","))


class Parser(argparse.ArgumentParser):
    """argparse, with errors in this program's one-line form."""

    def error(self, message):
        """Replaces usage plus message by the one line."""
        raise UserError(f"{message}; see --help")


def parse(argv=None):
    """Command line -> checked Config, with the model's defaults for what was not given."""
    parser = Parser("mini_mi.py", description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        about, flag = f.metadata["about"], f.metadata.get("flag", "--" + f.name.replace("_", "-"))
        if f.type is bool:
            parser.add_argument(flag, dest=f.name, help=about,
                                action="store_false" if f.default else "store_true")
            continue
        default = f.default
        if f.name in MODEL_DEFAULTS["tiny"]:
            default = f"{MODEL_DEFAULTS['tiny'][f.name]} for tiny, else {MODEL_DEFAULTS['other'][f.name]}"
        about += f" (default: {default})" if default not in (None, (), "") else ""
        shape = dict(type=numbers if f.type is tuple else f.type, metavar=f.name.upper())
        if f.name == "prompts":
            shape = dict(action="append", metavar="PROMPT")
        elif "choices" in f.metadata:
            shape = dict(type=f.type, choices=f.metadata["choices"])
        parser.add_argument(flag, dest=f.name, help=about, **shape)
    given = vars(parser.parse_args(argv))
    config = Config(**given)
    if config.motion:  # what is not given is as it was in training; that the file is there `run` will see
        trained = MotionEmbeddings.load(config.motion).source if Path(config.motion).exists() else {}
        for name, kind in dict(model=str, frames=int, size=str, stride=int).items():
            if name not in given and isinstance(trained.get(name), kind):
                setattr(config, name, trained[name])
        if "debias" not in given:
            config.debias = None  # `run` takes it from the file
    for name, value in model_defaults(config.model).items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    check(config, set(given))
    return config


# Options that say how the embeddings are trained: they mean nothing for embeddings that come from a file.
TRAINING = {"steps", "lr", "batch", "loss", "snapshots", "checkpointing", "levels", "mqk_dims", "mv_dims",
            "debias_in_training"}
INVERT_STEPS = 50                 # of the DDIM inversion, whatever --sample-steps is: the authors'


def check(config, given):
    """UserError for values and combinations that make no sense; given: the names on the command line."""
    def refuse(condition, message):
        """UserError if the condition holds."""
        if condition:
            raise UserError(message)

    refuse(not (config.use_mqk or config.use_mv),
           "--no-mqk and --no-mv together leave nothing to train; drop one")
    clash = sorted(given & TRAINING) if config.motion else []
    refuse(clash, f"--motion reuses what was trained, so --{', --'.join(c.replace('_', '-') for c in clash)} "
                  "can have no effect; leave one of the two out")
    refuse("mqk_dims" in given and not config.use_mqk, "--no-mqk leaves nothing for --mqk-dims; drop one")
    refuse(given & {"mv_dims", "debias", "debias_in_training"} and not config.use_mv,
           "--no-mv leaves nothing for --mv-dims and --debias; drop one")
    refuse(config.motion_type == "camera" and not config.use_mqk,
           "--motion-type camera drops MV, and --no-mqk drops the rest; leave one of the two out")
    refuse("debias" in given and config.motion_type == "camera",
           "--motion-type camera drops MV at inference, so --debias can have no effect; drop one")
    refuse(not re.fullmatch(r"[1-9]\d*x[1-9]\d*", config.size),
           f"--size {config.size}: give it as WIDTHxHEIGHT, 576x320")
    for name, least in dict(frames=2, steps=1, batch=1, sample_steps=1, fps=1, stride=1, seed=0).items():
        value = getattr(config, name)
        refuse(value is not None and value < least,
               f"--{name.replace('_', '-')} {value}: it must be at least {least}")
    refuse(not 0 <= config.noise_prior <= 1, f"--noise-prior {config.noise_prior}: it must be within 0 and 1")
    refuse(not 0 < config.lr < math.inf, f"--lr {config.lr}: it must be above 0")
    refuse(not math.isfinite(config.guidance), f"--guidance {config.guidance}: it must be a number")
    beyond = [s for s in config.snapshots if not 1 <= s <= config.steps]
    refuse(beyond, f"--snapshots {beyond[:1]}: training has steps 1 to {config.steps}")
    refuse(not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device),
           f"--device {config.device}: it takes auto, cpu or cuda")
    refuse(config.seed >= 2 ** 62, f"--seed {config.seed}: it must be below 2 ** 62")
    refuse(config.device.startswith("cuda") and not torch.cuda.is_available(),
           "--device cuda: no CUDA device is found here; use --device cpu")
    refuse(config.device.startswith("cuda:") and int(config.device[5:]) >= torch.cuda.device_count(),
           f"--device {config.device}: there are only {torch.cuda.device_count()}, counted from 0")
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.dtype == "auto":
        config.dtype = "float16" if config.device.startswith("cuda") else "float32"


def choose_clip(config):
    """Fills in video, source prompt and prompts: clips that have a clips.json beside them bring theirs."""
    recorded = {}
    if config.motion and not config.video:           # a motion file remembers the clip that it was trained on
        recorded = MotionEmbeddings.load(config.motion).source
        config.video = recorded.get("video")
        if config.source_prompt is None:
            config.source_prompt = recorded.get("prompt")
        if config.video and not Path(config.video).exists():
            if config.noise_prior > 0:
                raise UserError(f"{config.motion} was trained on {config.video}, which is not there "
                                "any more: give --video, or --noise-prior 0")
            config.video = None
    if not config.video and not config.motion:
        first = next(iter(read_json(HERE / "data" / "clips" / "clips.json")))
        config.video = str(HERE / "data" / "clips" / f"{first}.webp")
    if config.video:
        listing = Path(config.video).parent / "clips.json"
        about = read_json(listing).get(Path(config.video).stem, {}) if listing.is_file() else {}
        if not isinstance(about, dict):
            raise UserError(f"{listing}: the entry of {Path(config.video).stem} must be an object with "
                            "caption and prompts")
        if config.source_prompt is None:
            config.source_prompt = about.get("caption")
        config.prompts = tuple(config.prompts) or tuple(about.get("prompts", ())[:2])
    if not config.prompts:
        raise UserError('nothing to generate: say what the new clip shows, --prompt "..."')
    if config.source_prompt is None and not config.motion:
        raise UserError('say what the reference shows, --source-prompt "...": what the text explains, '
                        "the motion embeddings need not learn")
    if not config.video and config.noise_prior > 0:
        raise UserError("this motion file does not say which clip it was trained on: "
                        "give --video, or --noise-prior 0")


def describe(config, motion):
    """What a run will do, as lines."""
    width, height = config.width_height
    how = f"reuse {config.motion}" if config.motion else (
        f"train {config.steps} steps of {config.batch}, lr {config.lr}, loss {config.loss}")
    parts = " and ".join(name for name, used in (("MQK", motion.use_mqk), ("MV", motion.use_mv)) if used)
    count = sum(p.numel() for p in motion.parameters())
    reference = f"{config.video}: {config.source_prompt or 'no caption'}" if config.video else "none"
    return (f"model      {config.model} on {config.device}, {config.dtype}\n"
            f"reference  {reference}\n"
            f"clips      {config.frames} frames of {width}x{height}, {config.fps} per second\n"
            f"motion     {how}; {parts}, {count:,} embedding parameters, debias {config.debias}, "
            f"motion type {config.motion_type}\n"
            f"sampling   {config.sample_steps} DDIM steps, guidance {config.guidance}, noise prior "
            f"{config.noise_prior}, seed {config.seed}\n"
            + "".join(f"prompt     {p}\n" for p in config.prompts) + f"results    {config.out}/")


def latent_grid(config, vae_config):
    """Latent (height, width) of the configured size."""
    factor = 2 ** (len(vae_config.get("block_out_channels", (64,))) - 1)
    width, height = config.width_height
    if width % factor or height % factor:
        near = "x".join(str(max(1, round(n / factor)) * factor) for n in (width, height))
        raise UserError(f"--size {config.size}: both numbers must be multiples of {factor} for this model; "
                        f"{near} is near")
    return height // factor, width // factor


def learn(config, models, latents, out, settings):
    """Trains the motion of `latents` (1,C,F,H,W), saves it and its losses; returns it and its state file."""
    # The state's name holds what determines the steps that were made, so no run continues another one's. The
    # number of steps is not in it: an interrupted training can be continued to another end.
    text = encode_prompt(models, [config.source_prompt])
    digest = hashlib.sha256(repr([settings, config.lr, config.batch, config.loss, config.seed,
                                  config.dtype]).encode())
    # One number of each of its tensors tells a model from a retrained one.
    weights = torch.stack([p.flatten()[0] for p in models.unet.parameters()])
    for part in (weights, text, latents):
        digest.update(part.float().cpu().numpy().tobytes())
    state = out / f"training-{digest.hexdigest()[:12]}.pt"
    source = dict(video=os.path.abspath(config.video), prompt=config.source_prompt, model=config.model,
                  frames=config.frames, size=config.size, stride=config.stride)

    def keep(step, motion):
        """A snapshot, as a motion file of its own."""
        if step in config.snapshots:
            motion.source = source
            motion.save(out / f"motion-step{step}.safetensors")

    motion = train_motion(models, latents, text, steps=config.steps, lr=config.lr, batch=config.batch,
                          seed=config.seed, loss=config.loss, state=state, on_step=keep,
                          checkpointing=config.checkpointing, **settings)
    motion.source = source
    motion.save(out / "motion.safetensors")
    with atomic_write(out / "loss.png") as temporary:
        loss_curve(motion.losses.tolist()).save(temporary)
    return motion, state


def write_results(config, out, reference, with_motion, without):
    """A GIF and a side-by-side GIF per prompt, and the contact sheet; clips are (F,h,w,3) uint8."""
    shown = [] if reference is None else [("reference", reference)]
    rows = list(shown)
    for n, (prompt, clip, plain) in enumerate(zip(config.prompts, with_motion, without), 1):
        name = f"{n}-" + re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        write_video(out / f"{name}.gif", clip, config.fps)
        pair = [(prompt, clip), ("same seed, no embeddings", plain)]
        labels, videos = zip(*shown, *pair)
        write_video(out / f"{name}-compare.gif", side_by_side(videos, labels), config.fps)
        rows += pair
    with atomic_write(out / "sheet.png") as temporary:
        contact_sheet(rows).save(temporary)


def run(config):
    """The main job: train (or load) the reference's motion, sample every prompt, write all to config.out."""
    choose_clip(config)
    out, grid = Path(config.out), latent_grid(config, model_config(config.model, "vae"))
    settings = dict(levels=config.levels or None, use_mqk=config.use_mqk, use_mv=config.use_mv,
                    debias=config.debias, mqk_dims=config.mqk_dims, mv_dims=config.mv_dims,
                    debias_in_training=config.debias_in_training)
    if config.motion:
        motion = MotionEmbeddings.load(config.motion)
        motion.use_mqk, motion.use_mv = motion.use_mqk and config.use_mqk, motion.use_mv and config.use_mv
        config.debias = motion.debias = config.debias or motion.debias       # --debias wins over the file
        if not (motion.use_mqk or motion.use_mv and config.motion_type == "object"):
            raise UserError(f"of {config.motion} these flags leave nothing: drop --no-mqk, --no-mv or camera")
    else:        # these say what will be trained, and refuse what does not fit; train_motion makes its own
        motion = MotionEmbeddings(model_config(config.model, "unet"), config.frames, *grid, **settings)
    reference = None
    if config.video:
        reference = read_video(config.video, config.frames, config.width_height, config.stride)
    print(describe(config, motion))
    if config.dry_run:
        return
    clock, seconds = time.perf_counter(), {}

    def lap(name):
        """Ends a part of the run and notes its seconds."""
        nonlocal clock
        seconds[name] = round(time.perf_counter() - clock, 2)
        clock = time.perf_counter()

    # Everything random comes from the seed alone, so a later run with --motion and the same settings repeats
    # these frames exactly. Training draws from `seed` itself; the two streams here have seeds of their own.
    def generator(stream):
        """Random numbers for one purpose."""
        return torch.Generator().manual_seed(config.seed + stream)

    try:  # If out is no place to write to, or anything else cannot be, say so now and not after the training.
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"cannot write into {out} ({error.strerror}): choose another place") from error
    models = load_models(config.model, config.device, getattr(torch, config.dtype))
    models.scheduler.timesteps(config.sample_steps)          # raises if the schedule has not so many steps
    motion.check_fits(models.unet)
    lap("load")

    if reference is not None:
        latents = encode_video(models, to_model_range(reference), generator(stream=1_000_000))
    losses = state = None
    if config.motion:
        motion = motion.to(models.device)
    else:
        motion, state = learn(config, models, latents, out, settings)
        losses = motion.losses.tolist()
        lap("train")
    motion.use_mv &= config.motion_type == "object"

    shape = (1, models.unet.conv_in.in_channels, config.frames, *grid)
    noise = torch.randn(shape, generator=generator(stream=2_000_000)).to(models.device)
    if config.noise_prior > 0:
        inverted = ddim_invert(models, latents, encode_prompt(models, [""]), INVERT_STEPS)
        noise = blend_noise(inverted, noise, config.noise_prior)
        lap("invert")
    negative = encode_prompt(models, [config.negative_prompt])

    def generate(embeddings):
        """One clip per prompt, uint8. All start from the same noise; one after the other, to save memory."""
        texts = [encode_prompt(models, [prompt]) for prompt in config.prompts]
        results = [sample(models, noise, text, negative, config.sample_steps, config.guidance, embeddings)
                   for text in texts]
        return [to_uint8(decode_video(models, result)[0]) for result in results]

    with_motion, without = generate(motion), generate(None)
    lap("sample")
    write_results(config, out, reference, with_motion, without)
    lap("write")
    peak = torch.cuda.max_memory_allocated(models.device) if models.device.type == "cuda" else None
    used = {name: getattr(motion, name) for name in MotionEmbeddings.SETTINGS}
    untrained = dict.fromkeys(TRAINING) if config.motion else {}
    with atomic_write(out / "run.json") as temporary:
        temporary.write_text(json.dumps(dict(
            config={**dataclasses.asdict(config), **untrained, **used}, invert_steps=INVERT_STEPS,
            seconds=seconds, losses=losses, peak_cuda_bytes=peak,
            embedding_parameters=sum(p.numel() for p in motion.parameters()),
            versions=dict(python=platform.python_version(), torch=torch.__version__,
                          numpy=np.__version__)), indent=1))
    if state:
        state.unlink(missing_ok=True)                        # only now: an interrupted sampling needs it, too
    print(f"done in {sum(seconds.values()):.0f} s: look at {out}/*-compare.gif and {out}/sheet.png")


OUT_OF_MEMORY = ("out of memory: take fewer --frames or a smaller --size, "
                 "and if it was in training, --checkpointing")


def guarded(job):
    """Runs job(); returns the exit status: 0, or 2 after one line that says what is wrong and what to do."""
    try:
        job()
        return 0
    except UserError as error:
        message = one_line(error)
    except KeyboardInterrupt:
        message = ("interrupted; a training is kept, but for its last few steps: "
                   "run the same command again and it goes on from there")
    except (MemoryError, torch.OutOfMemoryError):
        message = OUT_OF_MEMORY
    except RuntimeError as error:           # what the CPU's allocator and CUDA's libraries say out of memory
        if "allocate memory" not in str(error) and "ALLOC_FAILED" not in str(error):
            raise
        message = OUT_OF_MEMORY
    print(f"\nerror: {message}", file=sys.stderr)
    return 2


def main(argv=None):
    """Entry point of the command line; returns the exit status."""
    return guarded(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
