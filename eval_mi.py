"""Which part of Motion Inversion does what? The two ablations that the paper does not measure.

The method (mini_mi.py) learns the motion of one clip as two embeddings in temporal attention: MQK shapes the
attention map between frames, MV adds a debiased value at every position. The paper gives no numbers without
one of them (its supplement shows two clips without MV). Here each part is removed in two ways, trained
without it (no-mqk, no-mv) and dropped after training (drop-mqk, drop-mv), and compared with the full method
on the same clips, prompts and start noise. Brackets say what the numbers can mean: no embeddings at all
below, the reference through the autoencoder above.

    python eval_mi.py                  the default grid on the embedded model, about 16 minutes on two cores
    python eval_mi.py --quick          a small grid, 5 minutes
    python eval_mi.py --report         the report again, from the cells that are finished
    torchrun --nproc_per_node=8 eval_mi.py --model zeroscope --clips my_clips --frames 24 --size 576x320

A run can be killed at any time and goes on where it stopped. It leaves results.json, results.md, report.html.

Order of this file: the judges (CLIP, Inception), metrics, statistics, variants, the grid of cells, tables,
figures, report, command line.

Letters: B batch, F frames, h w pixels, H W latent grid, C channels, D feature width, L tokens, n m counts of
samples or tracks, K = F-1 steps of a track.

Checked against: transformers' CLIP and pytorch-fid's Inception network (to 1e-4), hand-worked cases for every
metric, simulated coverage for intervals of means, shares and the jackknife. See tests/.
"""

import argparse
import base64
import contextlib
import csv
import dataclasses
import datetime
import functools
import hashlib
import html
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.stats
import torch
import torch.distributed
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import mini_mi
from data import world
from mini_mi import option


# ===========================================================================================================
#   THE JUDGES: CLIP and Inception, compact, with the keys of the published weight files
# ===========================================================================================================

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_TEXT_DEFAULTS = dict(
    hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, vocab_size=49408,
    max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5)
CLIP_VISION_DEFAULTS = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
    patch_size=32, num_channels=3, hidden_act="quick_gelu", layer_norm_eps=1e-5)


def _clip_settings(config, defaults):
    """The fields of one tower. Published configs hold dozens of others, of text generation and training."""
    return {field: (config or {}).get(field, value) for field, value in defaults.items()}


class CLIPVisionTransformer(nn.Module):
    """Patches and a class token through bidirectional layers: pixels (B,3,s,s) -> the class token (B,D)."""

    def __init__(self, config):
        super().__init__()
        c = mini_mi.read_config(
            "CLIP image tower", _clip_settings(config, CLIP_VISION_DEFAULTS), CLIP_VISION_DEFAULTS,
            implemented={"hidden_act": tuple(mini_mi.ACTIVATIONS), "num_channels": (3,)})
        tokens = (c.image_size // c.patch_size) ** 2 + 1
        self.embeddings = nn.ModuleDict({
            "patch_embedding": nn.Conv2d(3, c.hidden_size, c.patch_size, stride=c.patch_size, bias=False),
            "position_embedding": nn.Embedding(tokens, c.hidden_size)})
        self.embeddings.class_embedding = nn.Parameter(torch.randn(c.hidden_size) * 0.02)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)        # sic: the published key
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(mini_mi.CLIPEncoderLayer(c, causal=False)
                                                              for _ in range(c.num_hidden_layers))})
        self.post_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.02)

    def forward(self, pixels):
        patches = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)    # (B, patches, D)
        first = self.embeddings.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.embeddings.position_embedding.weight
        x = self.pre_layrnorm(x)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x[:, 0])


class CLIPModel(nn.Module):
    """Pictures and texts as unit vectors in one space; config and keys as in transformers' CLIPModel.

    Source: Radford et al., arXiv 2103.00020. The text tower and its layers are mini_mi's.
    """

    def __init__(self, config):
        super().__init__()
        text = _clip_settings(config.get("text_config"), CLIP_TEXT_DEFAULTS)
        vision = _clip_settings(config.get("vision_config"), CLIP_VISION_DEFAULTS)
        width = config.get("projection_dim", 512)
        self.image_size = vision["image_size"]
        self.eos_token_id = config.get("text_config", {}).get("eos_token_id", 49407)
        self.text_model = mini_mi.CLIPTextModel(text).text_model
        self.vision_model = CLIPVisionTransformer(vision)
        self.text_projection = nn.Linear(text["hidden_size"], width, bias=False)
        self.visual_projection = nn.Linear(vision["hidden_size"], width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.get("logit_scale_init_value", 2.6592)))

    def image_features(self, pixels):
        """pixels (B,3,s,s), normalised by CLIP's mean and std -> (B,D) unit vectors"""
        return F.normalize(self.visual_projection(self.vision_model(pixels)), dim=-1)

    def text_features(self, ids):
        """ids (B,L) -> (B,D) unit vectors, read at the end-of-text token"""
        states = self.text_model(ids)
        # Files of 2021 and 2022 say eos_token_id = 2, which is wrong for their vocabulary; for these,
        # transformers takes the largest id, the end-of-text token. Later files name it: its first place.
        end = ids.argmax(1) if self.eos_token_id == 2 else (ids == self.eos_token_id).int().argmax(1)
        return F.normalize(self.text_projection(states[torch.arange(len(ids)), end]), dim=-1)


def clip_folder(name):
    """The folder of a CLIP: a path, or what the hub repository `name` (owner/name) holds, fetched once."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    texts = "config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"
    for file in texts:
        folder = mini_mi.fetch(str(name), file).parent
    try:
        mini_mi.fetch(str(name), "pytorch_model.bin")
    except mini_mi.NotOnHub:
        mini_mi.fetch(str(name), "model.safetensors")
    return folder


def load_clip(name, device="cpu"):
    """A CLIP folder in HF layout, or a hub repository -> (model, tokenizer, preprocess).

    preprocess: frames (F,h,w,3) uint8 -> pixels (F,3,s,s): bicubic to s on the short side, centre crop,
    CLIP's mean and std. It rounds to 8 bits after resizing, as CLIP's own code for PIL pictures does.
    """
    folder = clip_folder(name)
    model = mini_mi.load_module(CLIPModel, folder, "model", device, torch.float32)
    tokenizer = mini_mi.CLIPTokenizer.from_pretrained(folder)

    def preprocess(frames):
        """frames (F,h,w,3) uint8 -> pixels (F,3,s,s) float32, normalised"""
        x = torch.as_tensor(frames).to(device).permute(0, 3, 1, 2).float()
        s, (height, width) = model.image_size, x.shape[-2:]
        size = (s, int(s * width / height)) if height <= width else (int(s * height / width), s)
        if size != (height, width):
            x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
            x = x.round().clamp(0, 255)
        top, left = (size[0] - s) // 2, (size[1] - s) // 2
        x = x[..., top:top + s, left:left + s] / 255
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        return (x - mean) / std

    return model, tokenizer, preprocess


class InceptionConv(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class InceptionBlock(nn.Module):
    """Parallel branches, concatenated.

    branches   name -> a row (c_in, c_out, kernel, stride, padding), or a list of rows that follow each other,
               where the keys end in _1, _2 ...; a tuple of two rows forks the branch: _2a and _2b
    pool       "avg" or "max": the 3x3 pool before `branch_pool`; where there is no such branch, the block
               halves the size and the pool is a branch of its own
    """

    def __init__(self, branches, pool):
        super().__init__()
        self.pool, self.plan = pool, []
        for name, rows in branches.items():
            chain = []
            for n, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
                forked = isinstance(row[0], tuple)
                base = f"{name}_{n}" if isinstance(rows, list) else name
                chain.append([base + letter for letter in ("ab" if forked else ("",))])
                for key, settings in zip(chain[-1], row if forked else [row]):
                    self.add_module(key, InceptionConv(*settings))
            self.plan.append(chain)

    def forward(self, x):
        out = []
        for chain in self.plan:
            y = x
            if chain == [["branch_pool"]]:
                # The published network does not count the padding in its averages.
                y = (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if self.pool == "avg"
                     else F.max_pool2d(x, 3, 1, 1))
            for keys in chain:
                y = torch.cat([getattr(self, key)(y) for key in keys], dim=1)
            out.append(y)
        if not hasattr(self, "branch_pool"):
            out.append(F.max_pool2d(x, 3, 2))
        return torch.cat(out, dim=1)


def _mixed_5(c, pool):
    return InceptionBlock({"branch1x1": (c, 64, 1), "branch5x5": [(c, 48, 1), (48, 64, 5, 1, 2)],
                           "branch3x3dbl": [(c, 64, 1), (64, 96, 3, 1, 1), (96, 96, 3, 1, 1)],
                           "branch_pool": (c, pool, 1)}, "avg")


def _mixed_6(c):
    row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))          # a 7x7 convolution as two of 1x7 and 7x1
    return InceptionBlock({"branch1x1": (768, 192, 1),
                           "branch7x7": [(768, c, 1), (c, c, *row), (c, 192, *column)],
                           "branch7x7dbl": [(768, c, 1), (c, c, *column), (c, c, *row), (c, c, *column),
                                            (c, 192, *row)],
                           "branch_pool": (768, 192, 1)}, "avg")


def _mixed_7(c, pool):
    fork = ((384, 384, (1, 3), 1, (0, 1)), (384, 384, (3, 1), 1, (1, 0)))
    return InceptionBlock({"branch1x1": (c, 320, 1), "branch3x3": [(c, 384, 1), fork],
                           "branch3x3dbl": [(c, 448, 1), (448, 384, 3, 1, 1), fork],
                           "branch_pool": (c, 192, 1)}, pool)


class InceptionV3(nn.Module):
    """The network of FID: x (B,3,h,w) in [0,1] -> pooled features (B,2048).

    Weights: pt_inception-2015-12-05, the FID paper's TensorFlow network ported by pytorch-fid; its keys. Not
    torchvision's: averages ignore padding, the last block pools by maximum, 1008 classes.
    """

    URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
           "pt_inception-2015-12-05-6726825d.pth")

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = InceptionConv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = InceptionConv(32, 32, 3)
        self.Conv2d_2b_3x3 = InceptionConv(32, 64, 3, 1, 1)             # then a 3x3 max pool
        self.Conv2d_3b_1x1 = InceptionConv(64, 80, 1)
        self.Conv2d_4a_3x3 = InceptionConv(80, 192, 3)                  # then a 3x3 max pool
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_5(192, 32), _mixed_5(256, 64), _mixed_5(288, 64)
        self.Mixed_6a = InceptionBlock({
            "branch3x3": (288, 384, 3, 2),
            "branch3x3dbl": [(288, 64, 1), (64, 96, 3, 1, 1), (96, 96, 3, 2)]}, "max")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_mixed_6, (128, 160, 160, 192))
        self.Mixed_7a = InceptionBlock({
            "branch3x3": [(768, 192, 1), (192, 320, 3, 2)],
            "branch7x7x3": [(768, 192, 1), (192, 192, (1, 7), 1, (0, 3)), (192, 192, (7, 1), 1, (3, 0)),
                            (192, 192, 3, 2)]}, "max")
        self.Mixed_7b, self.Mixed_7c = _mixed_7(1280, "avg"), _mixed_7(2048, "max")
        self.fc = nn.Linear(2048, 1008)                                 # in the file, not in the features

    @classmethod
    def pretrained(cls, device="cpu"):
        """The published weights, fetched once and checked against the SHA-256 in their name."""
        try:
            tensors = torch.hub.load_state_dict_from_url(cls.URL, map_location="cpu", check_hash=True,
                                                         weights_only=True)
        except (OSError, RuntimeError) as e:                       # no network; or another hash
            raise mini_mi.UserError(f"cannot fetch {cls.URL} ({e}): check the network") from None
        model = cls()
        model.load_state_dict(tensors)
        return model.to(device).eval().requires_grad_(False)

    def forward(self, x):
        # Part of the definition, no antialiasing included: another resize, another FID (arXiv 2104.11222).
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        for name, module in self.named_children():
            if name != "fc":
                x = module(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, 2)
        return x.mean(dim=(2, 3))


# ===========================================================================================================
#   METRICS: pure functions of arrays
# ===========================================================================================================

def _unit(features):
    return F.normalize(torch.as_tensor(features).double(), dim=-1)


def text_similarity(frame_features, text_feature):
    """mean_f cos(E_I(frame_f), E_T(prompt)): does the clip show what the prompt says?

    frame_features (F,D), text_feature (D,), any length -> float in [-1,1]; plain cosine, not times 100.
    Blind to motion and to the order of frames; values of different CLIPs do not compare.
    Source: CLIPScore (arXiv 2104.08718) without its factor 2.5 and its clipping at 0.
    """
    return float((_unit(frame_features) @ _unit(text_feature)).mean())


def temporal_consistency(frame_features):
    """mean_f cos(E_I(frame_f), E_I(frame_f+1)): does the content stay the same from frame to frame?

    frame_features (F,D) -> float in [-1,1].
    A frozen clip scores 1, so it means something only beside motion fidelity.
    Source: Gen-1 (arXiv 2302.03011), "frame consistency"; LOVEU-TGVE takes all pairs of frames instead.
    """
    f = _unit(frame_features)
    if len(f) < 2:
        raise ValueError("temporal consistency compares neighbouring frames: it needs at least 2")
    return float((f[:-1] * f[1:]).sum(-1).mean())


def appearance_leakage(frame_features, reference_features):
    """mean_{f,g} cos(E_I(result_f), E_I(reference_g)): how much does the result look like the reference?

    frame_features (F,D), reference_features (G,D) -> float in [-1,1]. High is bad where the prompt asks for
    another appearance; this is what debias is for. All clips of one world are alike to some degree, so it
    means something only beside `base`, which has no embeddings. Ours: the paper shows leakage in pictures.
    """
    return float((_unit(frame_features) @ _unit(reference_features).T).mean())


def attribute_choices(frame_features, candidates):
    """Which of the candidate texts fits the clip best? The index of the largest mean cosine over frames.

    frame_features (F,D), candidates (k,D) -> int. Zero-shot classification as in CLIP (arXiv 2103.00020).
    """
    return int((_unit(frame_features) @ _unit(candidates).T).mean(0).argmax())


def _samples(x, y):
    x, y = (np.asarray(torch.as_tensor(v).cpu(), dtype=np.float64) for v in (x, y))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"two sets of feature vectors of one width are needed, not {x.shape} and {y.shape}")
    if min(len(x), len(y)) < 2:
        raise ValueError("a distance of distributions needs at least 2 samples on each side")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("the features are not finite")
    return x, y


def frechet_distance(x, y):
    """FID: |mu1-mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), for Gaussians fitted to two sets of features.

    x (n,d), y (m,d) -> float. Covariances with n-1, all in float64.
    With centred X1, X2 (divided by sqrt(n-1)) the last trace is the sum of the singular values of X1 X2^T:
    exact also for n < d, where the usual matrix square root returns noise. With X = QR, Q drops out.
    Biased upward for small n, by an amount that depends on the features: compare at equal n only, beside the
    distance of real from real. Blind to motion, and to which prompt a frame belongs to.
    Source: Heusel et al., arXiv 1706.08500.
    """
    x, y = _samples(x, y)
    r1, r2 = (np.linalg.qr((v - v.mean(0)) / np.sqrt(len(v) - 1), mode="r") for v in (x, y))
    cross = scipy.linalg.svdvals(r1 @ r2.T).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (r1 ** 2).sum() + (r2 ** 2).sum() - 2 * cross)


def kernel_distance(x, y):
    """KID: the squared maximum mean discrepancy for the kernel k(a,b) = (a.b/d + 1)^3, unbiased.

    x (n,d), y (m,d) -> float, which can be negative: its expectation is 0 for equal distributions at every n.
    Source: Binkowski et al., arXiv 1801.01401.
    """
    x, y = _samples(x, y)
    d = x.shape[1]

    def kernel(a, b):
        """The cubic kernel of all pairs."""
        return (a @ b.T / d + 1) ** 3

    def without_self(a):
        """Its mean over pairs of different samples."""
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return float(without_self(x) + without_self(y) - 2 * kernel(x, y).mean())


# ---------------------------------------------------------------------------------------------------- motion

def track_points(video, grid, radius=4, iterations=4):
    """Follows a grid of points through a clip: pyramidal Lucas-Kanade, frame to frame.

    video (F,h,w,3) uint8; grid: points per side -> tracks (n,F,2) as x,y in pixels, visible (n,F) bool,
    n = grid^2. Several clips (B,F,h,w,3) at once give (B,n,F,2) and (B,n,F).

    At every level of an image pyramid, coarse to fine, the displacement d of a window around p minimises
        sum_window |J(p + d + o) - I(p + o)|^2   by Gauss-Newton:   d += G^-1 sum_window grad I (I - J(d)).
    A point stays visible while it is inside the picture and leads back to itself when tracked backwards.
    It sees no more than its window: on flat ground near a moving thing it is dragged along, on a straight
    edge it follows only the edge's normal, and a fast turn or a sudden change loses it.
    Source: Lucas and Kanade 1981; Bouguet 2000 (pyramids); Kalal et al. 2010 (forward-backward check).
    """
    video = torch.as_tensor(video)
    if video.ndim == 4:
        tracks, visible = track_points(video[None], grid, radius, iterations)
        return tracks[0], visible[0]
    frames = video.permute(1, 0, 4, 2, 3).float() / 255                                    # (F,B,3,h,w)
    size = torch.tensor([frames.shape[4], frames.shape[3]], device=frames.device)          # w, h, as x, y
    axis = (torch.arange(grid, device=frames.device) + 0.5) / grid
    start = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1) * size - 0.5
    tracks = [start.expand(len(video), -1, -1)]                                            # (B,n,2)
    visible = [torch.ones_like(tracks[0][..., 0], dtype=torch.bool)]
    pyramids = [_pyramid(frame) for frame in frames]
    for before, after in zip(pyramids, pyramids[1:]):
        there = _lucas_kanade(before, after, tracks[-1], radius, iterations)
        back = _lucas_kanade(after, before, there, radius, iterations)
        inside = ((there >= -0.5) & (there <= size - 0.5)).all(-1)
        visible.append(visible[-1] & inside & ((back - tracks[-1]).norm(dim=-1) < 1))
        tracks.append(there)
    return torch.stack(tracks, 2).cpu(), torch.stack(visible, 2).cpu()


def _pyramid(frame):
    """(B,3,h,w) -> a list, fine to coarse, of (B,9,h/2^l,w/2^l): the picture, its x and its y derivative."""
    levels = []
    while not levels or min(frame.shape[-2:]) >= 16:
        padded = F.pad(frame, (1, 1, 1, 1), mode="replicate")
        along_x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
        along_y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
        levels.append(torch.cat([frame, along_x, along_y], dim=1))
        frame = F.avg_pool2d(frame, 2)
    return levels


def _look(picture, points):
    """picture (B,c,h,w) at points (B,n,W,2), bilinear -> (B,n,W,c); outside: the nearest border pixel."""
    height, width = picture.shape[-2:]
    scaled = (2 * points + 1) / torch.tensor([width, height], device=points.device) - 1    # to [-1,1]
    out = F.grid_sample(picture, scaled, padding_mode="border", align_corners=False)
    return out.permute(0, 2, 3, 1)


def _lucas_kanade(first, second, points, radius, iterations):
    """points (B,n,2) on the first picture -> (B,n,2) on the second; both as `_pyramid` gives them."""
    axis = torch.arange(-radius, radius + 1, device=points.device, dtype=points.dtype)
    window = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)      # (W,2)
    weight = torch.exp(-(window ** 2).sum(-1) / radius ** 2)             # the centre counts most
    # A little stiffness: where the window is flat, the point keeps the answer of the coarser level.
    stiffness = 1e-3 * weight.sum() * torch.eye(2, device=points.device)
    d = torch.zeros_like(points)
    for level in reversed(range(len(first))):
        p = ((points + 0.5) / 2 ** level - 0.5)[:, :, None] + window     # pixel centres, not corners, scale
        value, along_x, along_y = _look(first[level], p).chunk(3, dim=-1)                  # each (B,n,W,3)
        gradient = torch.stack([along_x, along_y], -1).flatten(2, 3)                       # (B,n,W*3,2)
        weighted = gradient * weight.repeat_interleave(3)[:, None]
        inverse = torch.linalg.inv(weighted.mT @ gradient + stiffness)                     # G^-1 (B,n,2,2)
        for _ in range(iterations):
            error = value - _look(second[level][:, :3], p + d[:, :, None])
            move = inverse @ weighted.mT @ error.flatten(2)[..., None]
            d = d + move.squeeze(-1).clamp(-radius, radius)
        d = d * 2 if level else d
    return points + d


def _displacements(tracks, still):
    """tracks (n,F,2) -> unit steps (n,K,2), which steps are still (n,K), which tracks move (n,); float64."""
    tracks = torch.as_tensor(tracks).double()
    if tracks.ndim != 3 or tracks.shape[1] < 2 or not tracks.isfinite().all():
        raise ValueError(f"tracks must be finite and (n,F,2) with F > 1, not {tuple(tracks.shape)}")
    v = tracks.diff(dim=1)
    length = v.norm(dim=-1)
    resting = length < still
    unit = v / length.clamp(min=1e-12)[..., None] * ~resting[..., None]
    return unit, resting.double(), length.mean(1) >= still


def motion_fidelity(tracks_a, tracks_b, mode="paper", still=0.5):
    """Do two clips move alike, wherever in the picture? T and T~ are their moving tracks:

        MF = 1/2 [ 1/|T~| sum_{a in T~} max_{b in T} corr(a,b) + 1/|T| sum_{b in T} max_{a in T~} corr(a,b) ]
        corr(a,b) = 1/K sum_k cos(v_k(a), v_k(b)),      v_k the steps from frame to frame

    tracks_a (n,F,2), tracks_b (m,F,2), in pixels, visible throughout; still: pixels per frame -> [-1,1].
    A track that moves less than `still` on average is left out: still backgrounds would match each other.
    A shorter step has no direction: still in both clips it counts 1, still in one 0. No moving track in
    either clip: 1, in one of them: 0. Identical clips score exactly 1.
    Blind to speed and to place; chance is far above 0, since the best of many tracks is taken: report it.
    mode "dmt" reproduces the code published with the formula, to compare with its values: one direction (each
    track of the result a against the reference b), all tracks, an identity subtracted from the matrix, NaN as
    soon as a track rests for one step. It needs n = m.
    Source: Yatim et al., arXiv 2311.17009, Eq. 8; code: diffusion-motion-transfer, motion_fidelity_score.py.
    """
    if mode == "dmt":
        v, w = (torch.as_tensor(t).double().diff(dim=1) for t in (tracks_a, tracks_b))
        if len(v) != len(w):
            raise ValueError(f"dmt mode needs equally many tracks in both clips, not {len(v)} and {len(w)}")
        v, w = v / v.norm(dim=-1, keepdim=True), w / w.norm(dim=-1, keepdim=True)
        matrix = torch.einsum("nkc,mkc->nm", v, w) / v.shape[1] - torch.eye(len(v), dtype=v.dtype)
        return float(matrix.max(dim=1).values.mean())
    if mode != "paper":
        raise ValueError(f"mode {mode!r} is not known; it takes paper or dmt")
    (u, rest_u, move_u), (w, rest_w, move_w) = (_displacements(t, still) for t in (tracks_a, tracks_b))
    if u.shape[1] != w.shape[1]:
        raise ValueError(f"both clips need as many frames, not {u.shape[1] + 1} and {w.shape[1] + 1}")
    if not move_u.any() or not move_w.any():
        return 0.0 if move_u.any() or move_w.any() else 1.0
    u, rest_u, w, rest_w = u[move_u], rest_u[move_u], w[move_w], rest_w[move_w]
    corr = (torch.einsum("nkc,mkc->nm", u, w) + rest_u @ rest_w.T) / u.shape[1]
    # Rounded, so that errors of 1e-16 cannot make identical clips score anything but exactly 1.
    return round(float(corr.max(1).values.mean() + corr.max(0).values.mean()) / 2, 12)


@functools.cache
def cotracker_model():
    """CoTracker 3 (arXiv 2410.11831), fetched through torch.hub; non-commercial licence."""
    try:
        return torch.hub.load("facebookresearch/co-tracker", "cotracker3_offline", trust_repo=True)
    except (OSError, RuntimeError, ImportError) as e:              # RuntimeError: torch.hub without a network
        raise mini_mi.UserError(f"cannot fetch CoTracker ({mini_mi.one_line(e)}): "
                                "check the network, or take --tracker lk") from None


def cotracker(video, grid):
    """`track_points` by CoTracker: video (B,F,h,w,3) uint8 -> tracks (B,n,F,2), visible (B,n,F)"""
    model = cotracker_model().to(video.device)
    with torch.no_grad():
        # One clip at a time: it takes (1,F,3,h,w) in 0..255 and gives (1,F,n,2), (1,F,n).
        found = [model(v.permute(0, 3, 1, 2)[None].float(), grid_size=grid) for v in video]
    return tuple(torch.cat(parts).transpose(1, 2).cpu() for parts in zip(*found))


# ===========================================================================================================
#   STATISTICS: clips are the independent units; prompts and seeds of one clip are not
# ===========================================================================================================

def student_interval(values, confidence=0.95):
    """Mean and Student t interval of independent values (n,) -> (mean, low, high); n = 1: infinitely wide."""
    values = np.asarray(values, dtype=np.float64)
    n, mean, half = len(values), values.mean(), math.inf
    if n > 1:
        half = scipy.stats.t.ppf((1 + confidence) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)
    return float(mean), float(mean - half), float(mean + half)


def wilson_interval(successes, n, confidence=0.95):
    """Interval for a share, right also near 0 and 1 and at small n -> (low, high). Source: Wilson 1927.

        (p + z^2/2n +- z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n),   p = successes / n
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} of {n} is no share")
    p, z = successes / n, scipy.stats.norm.ppf((1 + confidence) / 2)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # Exact ends: rounding must not leave 1e-17 where the formula says 0.
    return (0.0 if successes == 0 else float(middle - half), 1.0 if successes == n else float(middle + half))


def group_means(values, groups):
    """Means per group, in the order of first appearance -> (k,) float64."""
    values, groups = np.asarray(values, dtype=np.float64), np.asarray(groups).tolist()
    return np.array([values[[g == name for g in groups]].mean() for name in dict.fromkeys(groups)])


def paired_difference(a, b, groups=None, seed=0):
    """Is a larger than b, in pairs? a (n,), b (n,), groups (n,) labels -> (mean, low, high, p) of a - b.

    Mean and 95 % Student t interval of the means per group (None: every pair is a group). p, two-sided: if a
    and b were one method, every group's difference could as well have the other sign; p is the share of sign
    patterns whose mean is at least as far from 0. All 2^k patterns up to k = 12 groups, else 10 000 drawn
    ones beside the observed one, so that p is never 0.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a) or not np.isfinite(a - b).all():
        raise ValueError("paired samples must be finite and come in pairs, at least one")
    if groups is not None and len(groups) != len(a):
        raise ValueError(f"{len(a)} pairs, but {len(groups)} group labels")
    means = group_means(a - b, range(len(a)) if groups is None else groups)
    k = len(means)
    if k <= 12:
        signs = 1 - 2 * (np.arange(2 ** k)[:, None] >> np.arange(k) & 1)
        extra = 0
    else:
        signs = np.random.default_rng(seed).choice([-1, 1], size=(10_000, k))
        extra = 1
    # Patterns that tie with the observed one must count, whatever the order of their sums rounds to.
    far = np.abs(signs @ means) >= np.abs(means.sum()) - 1e-9 * np.abs(means).sum()
    return *student_interval(means), float((far.sum() + extra) / (len(signs) + extra))


def holm(p_values):
    """Holm's adjusted p-values for a family of tests, in the given order. Source: Holm 1979."""
    order, adjusted, worst = np.argsort(p_values), np.empty(len(p_values)), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted.tolist()


def detectable_difference(half_width, n, power=0.8, alpha=0.05):
    """The smallest true difference that a test at `alpha` on n groups would have found with the given power.

    half_width: of the 95 % t interval that was seen. (t_(1 - alpha/2) + t_power) standard errors.
    """
    t = scipy.stats.t(n - 1)
    return float(half_width * (t.ppf(1 - alpha / 2) + t.ppf(power)) / t.ppf(0.975)) if n > 1 else math.inf


def jackknife(statistic, groups):
    """Interval of a statistic that is no mean, by leaving out one group at a time -> (value, low, high).

    statistic: a function of a list of k groups -> float. value = statistic of all,
    half width = t_(k-1) sqrt((k-1)/k sum_i (theta_-i - mean)^2); k < 3: infinite.
    The bootstrap would draw duplicates, which shrink covariances and bias FID.
    Source: Efron and Tibshirani 1993, chapter 11.
    """
    k, value = len(groups), statistic(groups)
    if k < 3:
        return value, -math.inf, math.inf
    left = np.array([statistic(groups[:i] + groups[i + 1:]) for i in range(k)])
    half = scipy.stats.t.ppf(0.975, k - 1) * math.sqrt((k - 1) / k * ((left - left.mean()) ** 2).sum())
    return value, value - half, value + half


def clustered_share(wins, clusters, draws=10_000, seed=0):
    """95 % interval of a share, percentile bootstrap over whole clusters of votes -> (low, high).

    wins (n,) 0 or 1, clusters (n,) labels: the votes of one person are not independent.
    """
    names = list(dict.fromkeys(clusters))
    won, cast = (np.array([sum(v for v, c in zip(values, clusters) if c == name) for name in names])
                 for values in (wins, [1] * len(clusters)))
    pick = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    return tuple(float(q) for q in np.percentile(won[pick].sum(1) / cast[pick].sum(1), [2.5, 97.5]))


# ===========================================================================================================
#   VARIANTS: each differs from the method in one thing
# ===========================================================================================================

@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table.

    train, use   settings of MotionEmbeddings in training, and changed after it; train None: no embeddings
    """
    name: str
    hypothesis: str
    train: dict | None = dataclasses.field(default_factory=dict)
    use: dict = dataclasses.field(default_factory=dict)
    prior: bool = True              # start from the blend with the inverted reference; False: plain noise
    own_prompt: bool = False        # the reference's caption in place of the target prompts
    sampled: bool = True            # False: no diffusion at all


VARIANTS = {v.name: v for v in (
    Variant("full", "the method: 1D MQK, 2D MV, debias by differences"),
    # The two ablations that the paper never ran: the part is missing from the start.
    Variant("no-mqk", "without MQK the order of the motion suffers, since only MV is left to carry it",
            train={"use_mqk": False}),
    Variant("no-mv", "without MV the global course stays and local motion is lost; the text does not suffer",
            train={"use_mv": False}),
    # The same parts, taken away after training together: how much does the other one rely on its partner?
    Variant("drop-mqk", "MV was trained beside MQK: alone it should do worse than MV trained alone (no-mqk)",
            use={"use_mqk": False}),
    Variant("drop-mv", "the authors' choice for camera motion: text similarity rises, fidelity falls",
            use={"use_mv": False}),
    Variant("debias-none", "raw MV carries the reference's appearance: leakage rises, text similarity falls",
            use={"debias": "none"}),
    Variant("debias-mean", "subtracting the mean removes static appearance as well as differences do",
            use={"debias": "mean"}),
    Variant("mqk-2d", "a spatial MQK can hold the reference's shape: leakage rises", train={"mqk_dims": 2}),
    Variant("mv-1d", "MV without space cannot hold local motion: fidelity falls", train={"mv_dims": 1}),
    Variant("debias-in-training", "MV that is trained as it is used fits better than MV debiased afterwards",
            train={"debias_in_training": True}),
    Variant("no-inversion", "from plain noise the embeddings alone must carry the motion: fidelity falls",
            prior=False),
    # Brackets: what is there without the method, and how far any method could get.
    Variant("base", "no embeddings, the same start noise: what the inverted noise alone achieves",
            train=None),
    Variant("base-no-inversion", "no embeddings, plain noise: what the model does unasked",
            train=None, prior=False),
    Variant("reconstruct", "the reference's own prompt: the method without a conflict of appearance",
            own_prompt=True),
    Variant("vae", "the reference through the autoencoder and back: the bound", train=None, own_prompt=True,
            sampled=False),
)}
ABLATIONS = ("no-mqk", "no-mv")
DEFAULT_VARIANTS = ("full", *ABLATIONS, "drop-mqk", "drop-mv", "debias-none",
                    "base", "base-no-inversion", "reconstruct", "vae")


# ===========================================================================================================
#   THE GRID: clips x prompts x seeds x variants, one file per finished cell
# ===========================================================================================================

STILL = 0.5                                          # pixels per frame below which a track counts as resting
WORLD_ATTRIBUTES = {"shape": world.SHAPES, "colour": world.COLOURS, "pattern": world.PATTERNS,
                    "background": world.BACKGROUNDS}
# Part of every key. Raise it with any change of code after which a cell would hold something else.
CELL_VERSION = 1

# As the main job does it, but that latents are the autoencoder's mean, and that two numbers of steps are
# smaller for the embedded model: 40 minutes on two cores is the budget.
BUDGET = {"tiny": {**mini_mi.MODEL_DEFAULTS["tiny"], "sample_steps": 15, "invert_steps": 25, "together": 5},
          "other": {**mini_mi.MODEL_DEFAULTS["other"], "invert_steps": mini_mi.INVERT_STEPS, "together": 1}}


@dataclasses.dataclass
class Settings:
    """Everything that a user can set; the command line is made from it."""
    model: str = option("tiny", "the embedded model (tiny), zeroscope, a hub repository or a model folder")
    clip: str = option(None, "CLIP folder or repository (default: MODEL/clip, "
                             "else openai/clip-vit-base-patch32)")
    clips: str = option(None, "folder of clips with clips.json: NAME -> caption, motion, prompts "
                              "(default: data/clips)")
    out: str = option("out/eval", "folder for the cells and the report; a second run goes on there")
    variants: str = option(",".join(DEFAULT_VARIANTS), f"what to compare with full: {', '.join(VARIANTS)}")
    clip_count: int = option(12, "clips, from the top of clips.json")
    prompt_count: int = option(2, "target prompts per clip")
    seed_count: int = option(2, "sampling seeds per prompt")
    steps: int = option(None, "training steps per clip and trained variant")
    lr: float = option(None, "learning rate of the training")
    batch: int = option(None, "noise levels in every training step")
    sample_steps: int = option(None, "sampling steps")
    invert_steps: int = option(None, "steps of the inversion that gives the start noise")
    guidance: float = option(None, "strength of the prompt while sampling")
    noise_prior: float = option(0.5, "share of the inverted reference in the start noise, 0 to 1")
    frames: int = option(None, "frames per clip")
    size: str = option(None, "WIDTHxHEIGHT in pixels")
    together: int = option(None, "clips that share a training batch")
    checkpointing: bool = option(False, "recompute activations in training: slower, much less memory")
    sample_batch: int = option(4, "clips that are sampled at once: 4 suits a CPU, a GPU likes more")
    tracker: str = option("lk", "lk: built-in Lucas-Kanade; cotracker: CoTracker 3, fetched by torch.hub",
                          choices=("lk", "cotracker"))
    grid: int = option(16, "tracked points per side; the paper's CoTracker takes 55")
    votes: str = option(None, "CSV file of User Preference votes")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option(None, "number format of the UNet (default: float16 for large models on CUDA, else "
                              "float32)", choices=("float32", "bfloat16", "float16"))
    quick: bool = option(False, "a small grid, to see it work: 3 clips, 1 prompt, 1 seed")
    report: bool = option(False, "only rebuild the report, from the cells that are finished")


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A reference clip: frames (F,h,w,3) uint8, what it shows, how it moves, and what to turn it into."""
    name: str
    frames: np.ndarray
    caption: str
    motion: str
    prompts: tuple


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One sample of one variant: the unit of work, of the statistics and of the files."""
    variant: Variant
    clip: Clip
    place: int                      # which of the clip's prompts; -1: its own caption
    seed: int
    train_seed: int = 0

    @property
    def prompt(self):
        """The text that the sample was asked to show."""
        return self.clip.caption if self.place < 0 else self.clip.prompts[self.place]


def digest(*what):
    """A short name for any JSON-able settings: 24 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def fingerprint(*folders):
    """The SHA-256 of the names and contents of all files in some folders."""
    total = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in folder.rglob("[!.]*") if p.is_file()):
            total.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    total.update(block)
    return total.hexdigest()


def read_clips(settings):
    """The reference clips of `--clips`, as many as asked for, at the size and length asked for."""
    file = Path(settings.clips or mini_mi.HERE / "data" / "clips") / "clips.json"
    index = mini_mi.read_json(file)
    size = re.fullmatch(r"(\d+)x(\d+)", settings.size)
    if not size or any(int(side) % 8 or side == "0" for side in size.groups()):
        raise mini_mi.UserError(f"--size {settings.size} is not WIDTHxHEIGHT in multiples of 8, as in 64x64")
    if len(index) < settings.clip_count:
        raise mini_mi.UserError(f"{file} names {len(index)} clips; lower --clip-count {settings.clip_count}")
    clips = []
    for name, entry in list(index.items())[:settings.clip_count]:
        entry = entry if isinstance(entry, dict) else {}
        caption, prompts = entry.get("caption"), entry.get("prompts", [])
        listed = isinstance(prompts, list) and len(prompts) >= settings.prompt_count
        if not isinstance(caption, str) or not listed:
            raise mini_mi.UserError(f"{file}: {name} needs a caption and {settings.prompt_count} prompts; "
                                    "add them or lower --prompt-count")
        paths = sorted(p for p in file.parent.iterdir() if name in (p.name, p.stem) and p != file)
        if not paths:
            raise mini_mi.UserError(f"{file} names {name}, but there is no such clip beside it")
        frames = mini_mi.read_video(paths[0], settings.frames, tuple(map(int, size.groups())))
        clips.append(Clip(name, frames, caption, str(entry.get("motion", name)), tuple(map(str, prompts))))
    return clips


def plan(settings, clips):
    """Every cell of the grid, in a fixed order. The same settings give the same plan on every rank."""
    names = list(dict.fromkeys(["full", *settings.variants.replace(",", " ").split()]))
    unknown = [n for n in names if n not in VARIANTS]
    if unknown:
        raise mini_mi.UserError(f"--variants: {unknown[0]} is none of {', '.join(VARIANTS)}")
    cells = []
    for variant in map(VARIANTS.get, names):
        places = [-1] if variant.own_prompt else range(settings.prompt_count)
        seeds = range(settings.seed_count if variant.sampled else 1)
        cells += [Cell(variant, c, place, seed) for c in clips for place in places for seed in seeds]
    # Trained again with another seed, on two clips: how much of the spread is the training's?
    cells += [dataclasses.replace(cell, train_seed=1) for cell in cells
              if cell.variant.name == "full" and cell.clip in clips[:2]]
    return cells


class Store:
    """Finished work as files KIND-KEY.npz: JSON `about` and arrays, written whole or not at all."""

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise mini_mi.UserError(f"cannot write into {folder} ({e.strerror}): take another --out") from e

    def path(self, kind, key):
        """Where the file of this key is or would be."""
        return self.folder / f"{kind}-{key}.npz"

    def write(self, kind, key, about, arrays):
        """about: JSON-able dict; arrays: name -> array. A killed run leaves the whole file or none."""
        with mini_mi.atomic_write(self.path(kind, key)) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, about=json.dumps({"key": key, **about}), **arrays)

    def read(self, kind, key):
        """(about, arrays), or None where there is no such file. A damaged one is set aside and reported."""
        path = self.path(kind, key)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:          # a zip file: each array has a checksum
                arrays = {name: file[name] for name in file.files}
            about = json.loads(str(arrays.pop("about")))
            if about.pop("key") != key:
                raise ValueError("it belongs to another key")
            return about, arrays
        except MemoryError:
            raise
        except Exception as e:                                       # a damaged zip file raises a dozen types
            aside = path.with_suffix(".corrupt")
            with contextlib.suppress(FileNotFoundError):             # another rank was first
                os.replace(path, aside)
            tqdm.write(f"warning: {path.name} is damaged ({e}): set aside as {aside.name}", file=sys.stderr)


def pick_device(name):
    """The torch.device of `--device`; under torchrun every process of a machine takes a GPU of its own."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise mini_mi.UserError(f"--device {name}: it takes auto, cpu or cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise mini_mi.UserError("--device cuda: no CUDA device is found here; use --device cpu")
    device = torch.device(name)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise mini_mi.UserError(f"{device} is not there: start no more processes than there are GPUs, "
                                f"{torch.cuda.device_count()}")
    return device


def check_captions(clips):
    """UserError for texts that the tiny world cannot show."""
    for text in (text for clip in clips for text in (clip.caption, *clip.prompts)):
        try:
            world.attributes(text)
        except ValueError as e:
            raise mini_mi.UserError(f"{e}; the embedded model knows no other texts") from None


class Lab:
    """Settings, clips, models and finished work in one place, and the steps from a clip to a judged cell.

    The models load when they are first needed: a report from finished cells needs no UNet.
    """

    def __init__(self, settings):
        self.settings = settings
        self.device = pick_device(settings.device)
        self.clips = read_clips(settings)
        self.cells = plan(settings, self.clips)
        self.model_folder = mini_mi.local_folder(settings.model) or mini_mi.fetch_model(settings.model)
        own = self.model_folder / "clip"
        self.clip_name = settings.clip or str(own if own.is_dir() else "openai/clip-vit-base-patch32")
        # The model of the tiny world brings its own judge; the Inception network has never seen that world.
        small = mini_mi.model_defaults(str(self.model_folder)) is mini_mi.MODEL_DEFAULTS["tiny"]
        self.in_world = small and own.is_dir() and Path(self.clip_name).resolve() == own.resolve()
        if self.in_world:
            check_captions(self.clips)
        self.store = Store(Path(settings.out) / "cells")
        s = settings
        parts = [self.model_folder / part for part in "unet vae text_encoder tokenizer scheduler".split()]
        self.base_key = [CELL_VERSION, fingerprint(*parts), s.frames, s.size, s.dtype, self.device.type]

    @functools.cached_property
    def models(self):
        """The text-to-video model."""
        return mini_mi.load_models(str(self.model_folder), self.device, getattr(torch, self.settings.dtype))

    @functools.cached_property
    def judge(self):
        """(CLIP, its tokenizer, its preprocess)"""
        return load_clip(self.clip_name, self.device)

    @functools.cached_property
    def inception(self):
        """The network of FID, for models of the real world."""
        return InceptionV3.pretrained(self.device)

    def ready(self):
        """Loads, and fetches, whatever the grid needs: what is missing shows now and not after hours."""
        if self.settings.votes:
            read_votes(self.settings.votes)
        for steps in (self.settings.sample_steps, self.settings.invert_steps):
            self.models.scheduler.timesteps(steps)               # raises if the schedule has not so many
        needed = ["judge", "judge_key"] if self.in_world else ["judge", "judge_key", "inception"]
        for name in needed:
            getattr(self, name)
        if self.settings.tracker == "cotracker":
            cotracker_model()

    @functools.cached_property
    def judge_key(self):
        """What the scores of a clip depend on, beside the clip."""
        s = self.settings
        clip = fingerprint(clip_folder(self.clip_name))
        return [CELL_VERSION, clip, self.in_world, s.tracker, s.grid, STILL]

    # ---- keys: everything that determines a file, and nothing else

    def clip_key(self, clip):
        """Key of a reference clip."""
        return digest(hashlib.sha256(clip.frames.tobytes()).hexdigest(), clip.caption)

    def noise_key(self, clip):
        """Key of a clip's latents and inverted noise."""
        return digest(self.base_key, self.clip_key(clip), self.settings.invert_steps)

    def motion_key(self, clip, variant, train_seed):
        """Key of a clip's trained embeddings."""
        s = self.settings
        return digest(self.base_key, self.clip_key(clip), variant.train, train_seed, s.steps, s.lr, s.batch)

    def video_key(self, cell):
        """Key of a sampled video."""
        s, v = self.settings, cell.variant
        if not v.sampled:
            return digest(self.base_key, self.clip_key(cell.clip), v.name)
        noise = [self.noise_key(cell.clip), s.noise_prior] if v.prior else None
        motion = None if v.train is None else [self.motion_key(cell.clip, v, cell.train_seed), v.use]
        return digest(self.base_key, cell.prompt, cell.clip.name, cell.place, cell.seed, noise, motion,
                      s.sample_steps, s.guidance)

    def score_key(self, cell):
        """Key of the scores of a cell."""
        return digest(self.video_key(cell), self.judge_key, cell.prompt, self.clip_key(cell.clip))

    # ---- steps

    def prepare(self, clips):
        """clips -> latents (M,C,F,H,W) and inverted noise (M,C,F,H,W); inverted together, kept per clip."""
        kept = [self.store.read("noise", self.noise_key(c)) for c in clips]
        if not all(kept):
            video = torch.cat([mini_mi.to_model_range(c.frames) for c in clips])
            latents = mini_mi.encode_video(self.models, video)
            empty = mini_mi.encode_prompt(self.models, [""] * len(clips))
            steps = self.settings.invert_steps
            noise = mini_mi.ddim_invert(self.models, latents, empty, steps, progress=False)
            for clip, z, n in zip(clips, latents, noise):
                self.store.write("noise", self.noise_key(clip), {"clip": clip.name},
                                 {"latents": z.float().cpu().numpy(), "noise": n.float().cpu().numpy()})
            return latents, noise
        return tuple(torch.from_numpy(np.stack([arrays[name] for _, arrays in kept])).to(self.device)
                     for name in ("latents", "noise"))

    def train(self, clips, variant, train_seed):
        """clips -> per clip MotionEmbeddings and their cost; all share a batch through the frozen UNet."""
        s, keys = self.settings, [self.motion_key(c, variant, train_seed) for c in clips]
        kept = [self.store.read("motion", key) for key in keys]
        latents, _ = self.prepare(clips)
        if not all(kept):
            text = mini_mi.encode_prompt(self.models, [c.caption for c in clips])
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            began = time.perf_counter()
            state = self.store.folder / f"training-{digest(keys)}.pt"
            motion = mini_mi.train_motion(self.models, latents, text, steps=s.steps, lr=s.lr, batch=s.batch,
                                          seed=train_seed, state=state, checkpointing=s.checkpointing,
                                          progress=False, **variant.train)
            cost = {"train_seconds": (time.perf_counter() - began) / len(clips), "memory": self.peak_memory(),
                    "parameters": sum(p.numel() for p in motion.parameters()) // len(clips)}
            for i, (clip, key) in enumerate(zip(clips, keys)):
                arrays = {k: v.cpu().numpy() for k, v in motion.clip(i).state_dict().items()}
                self.store.write("motion", key, {"clip": clip.name, "cost": cost}, arrays)
            state.unlink(missing_ok=True)
            kept = [self.store.read("motion", key) for key in keys]
        return [(self.motion(arrays, variant, latents.shape), about["cost"]) for about, arrays in kept]

    def motion(self, state, variant, shape):
        """MotionEmbeddings from a stored state; shape: of latents (..., F, H, W)."""
        motion = mini_mi.MotionEmbeddings(self.models.unet.config, *shape[-3:], **variant.train)
        motion.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
        for name, value in variant.use.items():
            setattr(motion, name, value)
        return motion.to(self.device).eval()

    def generate(self, cells, motion, latents, inverted):
        """cells of one clip and variant, motion or None -> list of videos (F,h,w,3) uint8, seconds each."""
        s, variant = self.settings, cells[0].variant
        began = time.perf_counter()
        if variant.sampled:
            # All variants of one (clip, prompt, seed) start from the same fresh noise: they can be paired.
            seeds = [int(digest(c.clip.name, c.place, c.seed)[:12], 16) for c in cells]
            noise = torch.stack([torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
                                 for seed in seeds]).to(self.device)
            if variant.prior:
                noise = mini_mi.blend_noise(inverted, noise, s.noise_prior)
            text = mini_mi.encode_prompt(self.models, [c.prompt for c in cells])
            empty = mini_mi.encode_prompt(self.models, [""] * len(cells))
            latents = mini_mi.sample(self.models, noise, text, empty, s.sample_steps, s.guidance, motion,
                                     progress=False)
        else:
            latents = latents[None]
        if not latents.isfinite().all():
            raise mini_mi.UserError("a sampled clip is not finite: use --dtype float32 or lower --guidance")
        videos = [mini_mi.to_uint8(video) for video in mini_mi.decode_video(self.models, latents)]
        return videos, (time.perf_counter() - began) / len(cells)

    def look(self, videos):
        """videos, B of (F,h,w,3) uint8 -> per clip features (F,D), fid_features (F or F/4,d), tracks (n,F,2).

        Only tracks that are visible in every frame are kept.
        """
        clip, _, preprocess = self.judge
        find_tracks = track_points if self.settings.tracker == "lk" else cotracker
        pixels = torch.from_numpy(np.stack(videos)).to(self.device)
        results = []
        with torch.no_grad():
            for video, tracks, visible in zip(pixels, *find_tracks(pixels, self.settings.grid)):
                features = for_fid = clip.image_features(preprocess(video))
                if not self.in_world:                        # neighbours cost much and add little
                    for_fid = self.inception(video[::4].permute(0, 3, 1, 2).float() / 255)
                results.append({"features": features.cpu().numpy(), "fid_features": for_fid.cpu().numpy(),
                                "tracks": tracks[visible.all(1)].numpy()})
        return results

    def reference(self, clip):
        """The reference clip through the same judges, once per clip -> arrays of `look`."""
        key = digest("reference", self.clip_key(clip), self.judge_key)
        kept = self.store.read("reference", key)
        if kept is None:
            arrays, = self.look([clip.frames])
            self.store.write("reference", key, {"clip": clip.name}, arrays)
            return arrays
        return kept[1]

    def score(self, cells, videos, costs):
        """Judges the videos of cells of one clip and writes their scores."""
        reference = self.reference(cells[0].clip)
        for cell, arrays, cost in zip(cells, self.look(videos), costs):
            features, tracks = arrays["features"], arrays["tracks"]
            moving = int(_displacements(tracks, STILL)[2].sum()) if len(tracks) else 0
            scores = {"text_similarity": text_similarity(features, self.text_features(cell.prompt)),
                      "motion_fidelity": motion_fidelity(tracks, reference["tracks"], still=STILL),
                      "temporal_consistency": temporal_consistency(features),
                      "leakage": appearance_leakage(features, reference["features"])}
            if self.in_world:
                scores.update(self.attributes(cell.prompt, features))
            about = {"variant": cell.variant.name, "clip": cell.clip.name, "prompt": cell.prompt,
                     "place": cell.place, "seed": cell.seed, "train_seed": cell.train_seed, "scores": scores,
                     "moving_tracks": moving, "tracks": len(tracks), "cost": cost}
            self.store.write("score", self.score_key(cell), about, arrays)

    @functools.cache
    def real_features(self, prompt, *which):
        """CLIP features (F,D) of a rendered clip of this prompt in random motion; which: names the draw."""
        scene = world.scene(int(digest("real", *which)[:8], 16), tuple(world.MOTIONS), prompt)
        frames = world.render(scene, self.settings.frames, self.clips[0].frames.shape[1])
        clip, _, preprocess = self.judge
        with torch.no_grad():
            return clip.image_features(preprocess(frames)).cpu().numpy()

    @functools.cache
    def text_features(self, text):
        """text -> (D,)"""
        clip, tokenizer, _ = self.judge
        with torch.no_grad():
            return clip.text_features(tokenizer([text]).to(self.device))[0].cpu()

    def attributes(self, prompt, features):
        """Does the clip show the prompt's shape, colour, pattern and background? Each 0 or 1, and their mean.

        For every attribute the prompt competes with the prompts in which only that attribute is another one.
        """
        own = world.attributes(prompt)
        right = {}
        for slot, (name, choices) in enumerate(WORLD_ATTRIBUTES.items()):
            texts = [world.describe(*own[:slot], choice, *own[slot + 1:]) for choice in choices]
            best = attribute_choices(features, torch.stack([self.text_features(t) for t in texts]))
            right[f"shows_{name}"] = float(texts[best] == world.describe(*own))
        return {**right, "attributes": float(np.mean(list(right.values())))}

    def peak_memory(self):
        """MiB: the most that was allocated on the GPU since the reset; None on a CPU, which does not tell."""
        return torch.cuda.max_memory_allocated(self.device) / 2 ** 20 if self.device.type == "cuda" else None


@dataclasses.dataclass
class Unit:
    """What one rank does in one go: a training that some clips share, and everything sampled from it.

    Costs are forward passes of the UNet, roughly; a training step counts three.
    """
    trained: bool
    train_seed: int
    clips: list
    cells: list

    def training_cost(self, settings):
        """Of the training that all cells wait for."""
        return 3 * settings.steps * settings.batch * len(self.clips) if self.trained else 0

    def cost(self, settings):
        """Of the whole unit."""
        return self.training_cost(settings) + sum(cell_cost(c, settings) for c in self.cells)


def cell_cost(cell, settings):
    """Of sampling one cell."""
    return 2 * settings.sample_steps if cell.variant.sampled else 1


def units(settings, cells):
    """Cuts the plan into units, which depend neither on what is finished nor on the number of ranks: a clip
    always trains with the same companions, so that interrupted and shared runs give the same numbers."""
    names = list(dict.fromkeys(c.clip.name for c in cells))
    chunk = {name: i // settings.together for i, name in enumerate(names)}
    found = {}
    for cell in cells:
        training = json.dumps(cell.variant.train)                # variants that are trained alike share one
        found.setdefault((training, cell.train_seed, chunk[cell.clip.name]), []).append(cell)
    return [Unit(cells[0].variant.train is not None, seed, list(dict.fromkeys(c.clip for c in cells)), cells)
            for (_, seed, _), cells in found.items()]


def share(work, settings, ranks):
    """Deals units to ranks: the longest first, each to the rank with the least so far -> a list per rank."""
    hands, load = [[] for _ in range(ranks)], [0] * ranks
    for unit in sorted(work, key=lambda u: -u.cost(settings)):
        least = load.index(min(load))
        hands[least].append(unit)
        load[least] += unit.cost(settings)
    return hands


def run_units(lab, work, show):
    """Computes what is missing in these units; every step leaves a file."""
    s, store = lab.settings, lab.store
    missing = [[c for c in unit.cells if store.read("score", lab.score_key(c)) is None] for unit in work]
    total = sum(unit.training_cost(s) * bool(cells) + sum(cell_cost(c, s) for c in cells)
                for unit, cells in zip(work, missing))
    # The bar counts forward passes, since cells differ in cost by a factor of ten.
    bar = tqdm(total=total, disable=not show, smoothing=0,
               bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")
    done = 0
    for unit, cells in zip(work, missing):
        same = {}                                               # cells of one variant and clip share batches
        for cell in cells:
            same.setdefault((cell.variant.name, cell.clip.name), []).append(cell)
        for n, members in enumerate(same.values()):
            run_cells(lab, unit, members)
            done += len(members)
            bar.update(sum(cell_cost(c, s) for c in members) + (unit.training_cost(s) if n == 0 else 0))
            bar.set_postfix_str(f"cells {done}/{sum(map(len, missing))}")
    bar.close()


def run_cells(lab, unit, cells):
    """Samples and scores cells of one variant and one clip; trains the unit's embeddings if nobody has."""
    variant, clip = cells[0].variant, cells[0].clip
    for start in range(0, len(cells), lab.settings.sample_batch):
        batch = cells[start:start + lab.settings.sample_batch]
        kept = [lab.store.read("video", lab.video_key(c)) for c in batch]
        if not all(kept):
            latents, inverted = lab.prepare(unit.clips)
            motion, cost = None, {"train_seconds": 0.0, "memory": None, "parameters": 0}
            i = unit.clips.index(clip)
            if unit.trained:
                motion, cost = lab.train(unit.clips, variant, unit.train_seed)[i]
            videos, seconds = lab.generate(batch, motion, latents[i], inverted[i])
            kept = [({**cost, "sample_seconds": seconds}, {"frames": video}) for video in videos]
            for cell, (about, arrays) in zip(batch, kept):
                lab.store.write("video", lab.video_key(cell), about, arrays)
        lab.score(batch, [arrays["frames"] for _, arrays in kept], [about for about, _ in kept])


# ===========================================================================================================
#   RESULTS: from finished cells to numbers with intervals, and to sentences
# ===========================================================================================================

METRICS = {"text_similarity": "Text Similarity ↑", "motion_fidelity": "Motion Fidelity ↑",
           "temporal_consistency": "Temporal Consistency ↑", "leakage": "Appearance leakage ↓",
           "attributes": "Attributes shown ↑"}
PRIMARY = ("motion_fidelity", "text_similarity")        # with ABLATIONS four tests, fixed before any result
FAMILY = len(PRIMARY) * len(ABLATIONS)


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A finished cell: what `Lab.score` wrote about it."""
    cell: Cell
    about: dict
    arrays: dict

    @property
    def key(self):
        """What is equal in two variants of one sample."""
        return self.cell.clip.name, self.cell.place, self.cell.seed


def collect(lab):
    """All results of the finished cells of the plan, as a JSON-able dict, ready for the report."""
    finished = [(cell, lab.store.read("score", lab.score_key(cell))) for cell in lab.cells]
    samples = [Sample(cell, *kept) for cell, kept in finished if kept]
    by_name = {}
    for s in samples:
        if s.cell.train_seed == 0:
            by_name.setdefault(s.cell.variant.name, []).append(s)
    full = by_name.get("full")
    if not full:
        raise mini_mi.UserError(f"{lab.store.folder} has no finished cell of this grid: leave --report out")
    votes = preference(read_votes(lab.settings.votes), by_name) if lab.settings.votes else {}
    distances = {name: FrechetToReal(lab, members) for name, members in by_name.items()}
    comparisons = [compare(name, members, full, distances[name], distances["full"])
                   for name, members in by_name.items() if name != "full" and not VARIANTS[name].own_prompt
                   and {s.key for s in members} & {s.key for s in full}]
    family = [c["metrics"][m] for c in comparisons if c["name"] in ABLATIONS for m in PRIMARY]
    # A test of the family that was not made counts as one without a finding.
    for test, adjusted in zip(family, holm([test["p"] for test in family] + [1.0] * (FAMILY - len(family)))):
        test["p_holm"] = adjusted
    return {
        "settings": dataclasses.asdict(lab.settings), "finished": len(samples), "planned": len(lab.cells),
        "judges": {"clip": "the tiny CLIP" if lab.in_world else lab.clip_name,
                   "frechet": "tiny-CLIP" if lab.in_world else "Inception",
                   "tracker": f"{lab.settings.tracker}, {lab.settings.grid} x {lab.settings.grid} points",
                   "real": "rendered clips of the same prompts" if lab.in_world else
                           "the reference clips, whose content is not what the prompts ask for"},
        "rows": [row(name, members, distances[name], votes.get(name)) for name, members in by_name.items()],
        "comparisons": comparisons, "sentences": [sentence(c) for c in comparisons],
        "chance": chance(lab, full), "training_spread": training_spread(samples),
        "cells": [s.about for s in samples]}


def row(name, members, distance, vote):
    """One line of the table: mean and interval of every metric, Frechet distance, votes, tracks, cost."""
    clips = [s.cell.clip.name for s in members]
    about = [s.about for s in members]
    return {"name": name, "hypothesis": VARIANTS[name].hypothesis,
            "n": len(members), "clips": len(set(clips)),
            "metrics": {m: student_interval(group_means([a["scores"][m] for a in about], clips))
                        for m in METRICS if m in about[0]["scores"]},
            "frechet": jackknife(distance, distance.groups), "frechet_floor": distance.floor(),
            "kid": kernel_distance(*distance.pooled(distance.groups)), "frames": distance.frames,
            "preference": vote, "moving_tracks": float(np.mean([a["moving_tracks"] for a in about])),
            "moving_share": float(np.mean([a["moving_tracks"] / max(1, a["tracks"]) for a in about])),
            "still": sum(a["moving_tracks"] == 0 for a in about),
            "cost": {key: None if None in [a["cost"][key] for a in about]
                     else float(np.mean([a["cost"][key] for a in about])) for key in about[0]["cost"]}}


class FrechetToReal:
    """The Frechet distance of one variant's samples, or of those of some clips, from a real set.

    In the tiny world the real set matches the content: for every sample a rendered clip of the same prompt
    with a random motion; a second such set gives the floor, real from real at equal n. Elsewhere the real set
    is the reference clips, and the floor their one half from the other.
    """

    def __init__(self, lab, members):
        self.lab, self.members = lab, members
        self.groups = tuple(dict.fromkeys(s.cell.clip.name for s in members))
        self.fake = {g: np.concatenate([s.arrays["fid_features"] for s in self.of(g)]) for g in self.groups}
        self.real = self._real_set(0)
        self.frames = sum(map(len, self.fake.values()))

    def of(self, group):
        """The samples of one clip."""
        return [s for s in self.members if s.cell.clip.name == group]

    def _real_set(self, which):
        lab = self.lab
        if not lab.in_world:
            return {c.name: lab.reference(c)["fid_features"] for c in lab.clips if c.name in self.groups}
        return {g: np.concatenate([lab.real_features(s.cell.prompt, *s.key, which) for s in self.of(g)])
                for g in self.groups}

    def pooled(self, groups):
        """Features of these clips: fake (n,d), real (m,d)."""
        return tuple(np.concatenate([side[g] for g in groups]) for side in (self.fake, self.real))

    @functools.cache
    def __call__(self, groups):
        return frechet_distance(*self.pooled(groups))

    def floor(self):
        """Real from real, or None where there are too few clips to say."""
        if self.lab.in_world:
            other = self._real_set(1)
            return frechet_distance(*(np.concatenate(list(side.values())) for side in (self.real, other)))
        halves = [self.pooled(half)[1] for half in (self.groups[::2], self.groups[1::2]) if half]
        return frechet_distance(*halves) if len(halves) == 2 and min(map(len, halves)) > 1 else None


def compare(name, members, full, distance, full_distance):
    """A variant against the full method: the same clip, prompt and seed, clips as independent units."""
    partner = {s.key: s for s in full}
    pairs = [(s, partner[s.key]) for s in members if s.key in partner]
    clips = [s.cell.clip.name for s, _ in pairs]
    metrics = {}
    for m in [m for m in METRICS if m in members[0].about["scores"]]:
        a, b = zip(*[(s.about["scores"][m], f.about["scores"][m]) for s, f in pairs])
        mean, low, high, p = paired_difference(a, b, clips)
        alpha = 0.05 / FAMILY if name in ABLATIONS and m in PRIMARY else 0.05
        metrics[m] = {"mean": mean, "low": low, "high": high, "p": p,
                      "detectable": detectable_difference(high - mean, len(set(clips)), alpha=alpha)}
    same = len(pairs) == len(members) == len(full)                   # else the two distances differ in n
    frechet = jackknife(lambda g: distance(g) - full_distance(g), distance.groups) if same else None
    return {"name": name, "pairs": len(pairs), "clips": len(set(clips)), "metrics": metrics,
            "frechet": frechet}


def chance(lab, full):
    """Motion fidelity of results against reference clips of other motions: what no likeness at all scores."""
    means = []
    for s in [s for s in full if s.cell.place == 0 and s.cell.seed == 0]:
        others = [lab.reference(c)["tracks"] for c in lab.clips if c.motion != s.cell.clip.motion]
        if others:
            means.append(np.mean([motion_fidelity(s.arrays["tracks"], t, still=STILL) for t in others]))
    return student_interval(means) if means else None


def training_spread(samples):
    """Standard deviation of the primary metrics of `full` between training and between sampling seeds."""
    full = [s for s in samples if s.cell.variant.name == "full"]
    twice = {s.cell.clip.name for s in full if s.cell.train_seed}
    found = {}
    for m in PRIMARY if twice else ():
        for what in ("training", "sampling"):
            sets = {}                                                # samples that differ in that seed alone
            for s in [s for s in full if s.cell.clip.name in twice]:
                c = s.cell
                key = (c.clip.name, c.place, c.seed if what == "training" else c.train_seed)
                sets.setdefault(key, []).append(s.about["scores"][m])
            variances = [np.var(v, ddof=1) for v in sets.values() if len(v) > 1]
            found.setdefault(m, {})[what] = math.sqrt(np.mean(variances)) if variances else None
    return found


def sentence(comparison):
    """What an ablation changed, in plain words: how much, how sure; or what effect would have shown."""
    parts = []
    for m in PRIMARY:
        test, title = comparison["metrics"][m], METRICS[m][:-2]
        p, rule = (test["p_holm"], "after Holm") if "p_holm" in test else (test["p"], "exploratory")
        said = (f"{abs(test['mean']):.3f} (95 % interval {test['low']:+.3f} to {test['high']:+.3f}; "
                f"p = {p:.3f}, {rule})")
        verb = "rose" if test["mean"] > 0 else "fell"
        if not math.isfinite(test["low"]):
            parts.append(f"{title} {verb} by {abs(test['mean']):.3f}, but one clip says nothing about chance")
        elif p < 0.05:
            parts.append(f"{title} {verb} by {said}")
        elif test["low"] * test["high"] > 0:
            parts.append(f"{title} {verb} by {said}: a hint, not a finding")
        else:
            # All k clips of one sign give p = 2 / 2^k, times the number of tests after Holm: never less.
            least = 2 / 2 ** comparison["clips"] * (FAMILY if "p_holm" in test else 1)
            power = (f"a change of {test['detectable']:.3f} would have shown in four of five such experiments"
                     if least < 0.05 else "so few clips could not have shown any")
            parts.append(f"No change of {title} was detected: it {verb} by {said}; {power}")
    return f"{comparison['name']} against full, {comparison['clips']} clips: {'. '.join(parts)}."


# ------------------------------------------------------------------------------------------- User Preference

VOTE_FIELDS = ["participant", "scene", "options", "choice", "check"]


def read_votes(path):
    """Votes from a CSV file with the columns VOTE_FIELDS -> list of dicts.

    options: the variants shown, joined by |, in the order shown; choice: the one picked as best; check:
    empty, or, in an attention check, the answer that is obviously right.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:       # spreadsheets begin it with a mark
            votes = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise mini_mi.UserError(f"--votes {path} cannot be read: {e}") from None
    for line, vote in enumerate(votes, start=2):
        if list(vote) != VOTE_FIELDS or None in vote.values():
            raise mini_mi.UserError(f"--votes {path}, line {line}: columns are {','.join(VOTE_FIELDS)}")
        if vote["choice"] not in vote["options"].split("|"):
            raise mini_mi.UserError(f"--votes {path}, line {line}: {vote['choice']!r} is not an option")
        if vote["check"] not in ("", *vote["options"].split("|")):
            raise mini_mi.UserError(f"--votes {path}, line {line}: check {vote['check']!r} is not an option")
    if not votes:
        raise mini_mi.UserError(f"--votes {path} has no vote in it")
    return votes


def preference(votes, names):
    """Of the votes in which a variant was shown, the share that picked it -> name -> dict; chance is 1/k.

    Whoever fails an attention check is left out. The interval spans two: Wilson's, which takes votes for
    independent, and a bootstrap over participants, which does not, but has no width where all agree.
    """
    careless = {v["participant"] for v in votes if v["check"] and v["choice"] != v["check"]}
    votes = [v for v in votes if not v["check"] and v["participant"] not in careless]
    found = {}
    for name in names:
        shown = [v for v in votes if name in v["options"].split("|")]
        wins, people = [int(v["choice"] == name) for v in shown], [v["participant"] for v in shown]
        if shown:
            low, high = zip(wilson_interval(sum(wins), len(wins)), clustered_share(wins, people))
            found[name] = {"share": sum(wins) / len(wins), "votes": len(wins), "people": len(set(people)),
                           "low": min(low), "high": max(high),
                           "chance": float(np.mean([1 / len(v["options"].split("|")) for v in shown]))}
    return found


# ===========================================================================================================
#   TUTORIAL FIGURES: what MQK does to the attention map, what debias does to MV
# ===========================================================================================================

@torch.no_grad()
def look_inside(lab):
    """The first injected layer with the first clip's embeddings -> arrays, kept in a file; None before that.

    without_mqk, with_mqk   attention maps (F,F), query frame by key frame, mean over heads and positions
    mv_raw, mv_debiased     norm of MV over channels (F,H,W)
    """
    clip, variant = lab.clips[0], VARIANTS["full"]
    key = digest("figures", lab.motion_key(clip, variant, 0))
    trained = lab.store.read("motion", lab.motion_key(clip, variant, 0))
    if kept := lab.store.read("figures", key):
        return kept[1]
    if trained is None:
        return None
    latents, _ = lab.prepare([clip])
    motion = lab.motion(trained[1], variant, latents.shape)
    block, grid = next(iter(motion.grids.items()))
    attention = lab.models.unet.get_submodule(block).attn1
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    t = lab.models.scheduler.T // 2
    noisy = lab.models.scheduler.add_noise(latents, noise, t)
    seen, arrays = {}, {}
    hooks = [getattr(attention, part).register_forward_hook(
        lambda module, inputs, output, part=part: seen.update({part: output})) for part in ("to_q", "to_k")]
    for motion.use_mqk in (False, True):
        mini_mi.predict(lab.models, noisy, t, mini_mi.encode_prompt(lab.models, [clip.caption]), motion)
        q, k = (seen[part].float().unflatten(-1, (attention.heads, -1)).transpose(1, 2)
                for part in ("to_q", "to_k"))                                    # (H*W, heads, F, d_k)
        attention_map = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).mean((0, 1))
        arrays["with_mqk" if motion.use_mqk else "without_mqk"] = attention_map.cpu().numpy()
    for hook in hooks:
        hook.remove()
    for name, mode in (("mv_raw", motion.train()), ("mv_debiased", motion.eval())):
        m_v = mode.at(block, "attn1", latents.shape[2], grid)[1]                 # (1, H*W, F, C)
        arrays[name] = m_v[0].norm(dim=-1).T.unflatten(1, grid).cpu().numpy()
    lab.store.write("figures", key, {"block": block, "clip": clip.name}, arrays)
    return arrays


def heat(values, low, high):
    """values (h,w) -> PIL picture: pale yellow (low) over orange to dark violet (high)."""
    stops = np.array([(253, 244, 220), (246, 170, 90), (200, 60, 80), (60, 15, 75)])
    x = np.clip((values - low) / max(high - low, 1e-9), 0, 1) * (len(stops) - 1)
    channels = [np.interp(x, range(len(stops)), stops[:, c]) for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def data_uri(picture, kind="PNG", **options):
    """A PIL picture as the text that an <img> can hold."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


# ===========================================================================================================
#   REPORT: results.json, results.md, report.html
# ===========================================================================================================

def number(value, form=".3f"):
    """0.1234 -> "0.123"; what is missing or not finite is a dash."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def interval(triple, form=".3f"):
    """(mean, low, high) -> "0.123 (0.101 to 0.145)"."""
    mean, low, high = triple or (None,) * 3
    return number(mean, form) + ("" if mean is None else f" ({number(low, form)} to {number(high, form)})")


def tables(results):
    """The main table, the differences, the details: (heads, rows of texts) each."""
    rows, judge = results["rows"], results["judges"]["frechet"]
    shown = [m for m in METRICS if m in rows[0]["metrics"]]
    three, more = shown[:3], shown[3:]           # with FID and User Preference they are the paper's five
    distance = f"Fréchet distance ({judge} features) ↓"
    main, differences, details = [], [], []
    for r in rows:
        vote = r["preference"] and tuple(r["preference"][key] for key in ("share", "low", "high"))
        main.append([r["name"], *(interval(r["metrics"][m]) for m in three), interval(r["frechet"]),
                     interval(vote), *(interval(r["metrics"][m]) for m in more), f"{r['n']} ({r['clips']})"])
        cost = r["cost"]
        details.append([r["name"], str(r["frames"]), number(r["frechet_floor"]), number(1000 * r["kid"]),
                        f"{r['moving_tracks']:.0f} ({100 * r['moving_share']:.0f} %)", str(r["still"]),
                        number(cost["train_seconds"], ".1f"), number(cost["sample_seconds"], ".2f"),
                        number(cost["memory"], ".0f"), number(cost["parameters"], ",.0f")])
    for c in results["comparisons"]:
        texts = [interval((t["mean"], t["low"], t["high"]), "+.3f")
                 + (f" p {t['p_holm']:.3f} (Holm)" if "p_holm" in t else f" p {t['p']:.3f}")
                 for t in (c["metrics"][m] for m in shown)]
        differences.append([c["name"], *texts, interval(c["frechet"], "+.3f")])
    return ((["variant", *(METRICS[m] for m in three), distance, "User Preference ↑",
              *(METRICS[m] for m in more), "n (clips)"], main),
            (["against full", *(METRICS[m] for m in shown), distance], differences),
            (["variant", "frames", "Fréchet, real from real", "KID x 1000", "moving tracks",
              "samples without any", "training s", "sampling s", "training memory, MiB of GPU",
              "embedding parameters"], details))


def notes(results):
    """What a reader has to know to read the tables, as plain sentences."""
    judges = results["judges"]
    lines = [
        "Brackets: 95 % interval, Student t on the means per clip (prompts and seeds of one clip are not "
        "independent); for the Fréchet distance a jackknife over clips.",
        "Differences are paired by clip, prompt and seed. Primary tests, fixed beforehand: "
        f"{' and '.join(ABLATIONS)} on Motion Fidelity and Text Similarity, with p after Holm. Everything "
        "else is exploratory.",
        f"Judges: {judges['clip']} for texts and frames; tracker {judges['tracker']}. The Fréchet distance "
        f"compares {judges['frechet']} features with those of {judges['real']}. It is biased upward at this "
        "size: compare with real from real at equal n.",
        "Chance level of Motion Fidelity, against reference clips of other motions: "
        f"{interval(results['chance'])}."]
    if results["training_spread"]:
        lines.append("Standard deviation of full: " + "; ".join(
            f"{METRICS[m][:-2]} {number(s['training'])} between training seeds, {number(s['sampling'])} "
            "between sampling seeds" for m, s in results["training_spread"].items()) + ".")
    for r in results["rows"]:
        if vote := r["preference"]:
            lines.append(f"User Preference of {r['name']}: {vote['votes']} votes of {vote['people']} people; "
                         f"chance {vote['chance']:.3f}.")
    if not any(r["preference"] for r in results["rows"]):
        lines.append("User Preference: no votes yet. Show people a reference and the results of one prompt "
                     "and seed, names hidden, order shuffled; ask which moves most like the reference and "
                     "shows the prompt. One line per answer in a CSV file with the columns "
                     f"{','.join(VOTE_FIELDS)} (options joined by |); then --votes FILE --report.")
    if results["finished"] < results["planned"]:
        lines.append(f"Unfinished: {results['finished']} of {results['planned']} cells.")
    return lines


def markdown(results):
    """The tables and sentences, ready for a README."""
    def lines(heads, rows):
        """A table in Markdown."""
        return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *rows])

    run, (main, *others) = results["run"], map(lambda t: lines(*t), tables(results))
    head = (f"`{run['command']}`, {run['date']}, {run['machine']}, {run['minutes']:.1f} minutes "
            f"for {run['computed']} of {results['planned']} cells")
    found = "\n".join(f"- {s}" for s in results["sentences"])
    return "\n\n".join([head, main, found, *others, "\n".join(f"- {n}" for n in notes(results))]) + "\n"


STYLE = """
:root { --ink: #1d2430; --soft: #5d6675; --line: #dfe3ea; --paper: #ffffff; --wash: #f5f7fa; --full: #2a6fdb;
        --ablation: #d9622b; --other: #8fa3bd }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b5; --line: #313a48;
        --paper: #151a21; --wash: #1d242e; --full: #6ea3ff; --ablation: #f08b5b; --other: #61738c } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 24px 16px 64px; max-width: 1180px; color: var(--ink);
       background: var(--paper); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3em } h2 { margin: 2.2em 0 .5em; font-size: 1.25rem }
h3 { margin: 1.4em 0 .2em; font-size: 1rem } p, li { max-width: 80ch } li { margin: .3em 0 }
.soft { color: var(--soft); font-size: .88rem; overflow-wrap: anywhere }
.found { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)) }
.found p { margin: 0; padding: 14px 16px; background: var(--wash); border-left: 4px solid var(--ablation);
       border-radius: 6px } summary { cursor: pointer; margin: 1em 0 .4em; color: var(--soft) }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: 7px 10px; text-align: left; border-bottom: 1px solid var(--line); min-width: 84px }
th { background: var(--wash); font-weight: 600; vertical-align: bottom } tr:last-child td { border: 0 }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--wash); font-weight: 600;
       white-space: nowrap }
td small { display: block; color: var(--soft); white-space: nowrap }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 18px }
svg { width: 100%; height: auto; display: block }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 10px }
figure { margin: 0 } figcaption { font-size: .74rem; color: var(--soft); margin-top: 3px }
.clip { border-radius: 6px; background-size: calc(var(--frames) * 100%) 100%;
        animation: play calc(var(--frames) * .1s) steps(var(--frames)) infinite }
.reference { outline: 2px solid var(--full); outline-offset: 1px }
@keyframes play { to { background-position-x: calc(100% * var(--frames) / (var(--frames) - 1)) } }
@media (prefers-reduced-motion: reduce) { .clip { animation-play-state: paused } }
body:has(#still:checked) .clip { animation-play-state: paused }
.pixels { image-rendering: pixelated; width: 100%; border-radius: 4px; display: block }
.frames { display: grid; grid-template-columns: repeat(8, 1fr); gap: 4px; max-width: 640px }
"""


def bars(title, values, line=None, line_name=""):
    """A bar per variant with its 95 % interval, as inline SVG; values: name -> (mean, low, high)."""
    ends = [v for triple in values.values() for v in triple if math.isfinite(v)] + [line or 0]
    low, high, left, right, step = min(0, *ends), max(1e-9, *ends), 132, 318, 21

    def x(value):
        """Where it lies on the horizontal axis."""
        return left + (right - left) * (value - low) / (high - low)

    bottom = step * len(values) + 6
    out = [f'<svg viewBox="0 0 380 {bottom + 20}" role="img" aria-label="{html.escape(title)}">']
    for i, (name, (mean, start, end)) in enumerate(values.items()):
        y = step * i + 8
        colour = "full" if name == "full" else "ablation" if name in ABLATIONS else "other"
        first, length = min(x(0), x(mean)), abs(x(mean) - x(0))
        out.append(f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{html.escape(name)}</text>'
                   f'<text x="{right + 8}" y="{y + 11}">{number(mean)}</text>'
                   f'<rect x="{first:.1f}" y="{y}" width="{length:.1f}" height="14" rx="2" '
                   f'style="fill: var(--{colour})"/>')
        if math.isfinite(start):
            out.append(f'<path d="M{x(start):.1f} {y + 7}H{x(end):.1f}M{x(start):.1f} {y + 3}v8M{x(end):.1f} '
                       f'{y + 3}v8" style="stroke: var(--ink); stroke-width: 1.3"/>')
    if line is not None:
        out.append(f'<path d="M{x(line):.1f} 4V{bottom}" style="stroke: var(--soft); stroke-dasharray: 3 3"/>'
                   f'<text x="{x(line):.1f}" y="{bottom + 13}" text-anchor="middle">{line_name} '
                   f"{number(line)}</text>")
    return f"<figure><h3>{html.escape(title)}</h3>{''.join(out)}</svg></figure>"


def moving_picture(frames, label):
    """A clip (F,h,w,3) uint8 as a film strip that the style sheet moves: all clips of the page keep step."""
    height, width = frames.shape[1:3]
    strip = Image.fromarray(np.concatenate(list(frames), axis=1))
    side = min(width, 192, 16383 // len(frames))                 # WebP pictures are at most 16383 pixels wide
    if side < width:
        strip = strip.resize((side * len(frames), side * height // width), Image.Resampling.LANCZOS)
    return (f'<figure><div class="clip {label}" role="img" aria-label="{label}" '
            f'style="--frames: {len(frames)}; aspect-ratio: {width} / {height}; '
            f'background-image: url({data_uri(strip, "WEBP", quality=82)})"></div>'
            f"<figcaption>{label}</figcaption></figure>")


def clip_rows(lab):
    """For every clip and prompt the reference and the first seed of every variant, side by side, as HTML."""
    parts = []
    for clip in lab.clips:
        parts.append(f"<h3>{html.escape(clip.name)}</h3>")
        for place in (*range(lab.settings.prompt_count), -1):
            cells = [c for c in lab.cells if (c.clip, c.place, c.seed, c.train_seed) == (clip, place, 0, 0)]
            videos = [(c, lab.store.read("video", lab.video_key(c))) for c in cells]
            shown = [moving_picture(kept[1]["frames"], c.variant.name) for c, kept in videos if kept]
            if shown:
                text = f"its own caption: {clip.caption}" if place < 0 else f"prompt: {clip.prompts[place]}"
                parts.append(f'<p class="soft">{html.escape(text)}</p><div class="clips">'
                             f'{moving_picture(clip.frames, "reference")}{"".join(shown)}</div>')
    return "".join(parts)


def html_table(heads, rows):
    """A table of texts; what stands in brackets and after goes to a second, smaller line."""
    def cell(text):
        """One cell: the number, its interval in small type below."""
        main, bracket, rest = html.escape(text).partition(" (")
        return f"<td>{main}" + (f"<small>({rest}</small>" if bracket else "") + "</td>"

    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    body = "".join(f"<tr>{''.join(map(cell, r))}</tr>" for r in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figures_html(arrays):
    """The tutorial figures as HTML."""
    def picture(values, ends, alt):
        """An array as a picture, colours from ends[0] to ends[1]."""
        return f'<img class="pixels" alt="{alt}" src="{data_uri(heat(values, *ends))}">'

    # Both pictures of a pair share one scale; its ends leave out the extremes, which would pale all the rest.
    ends = np.quantile(np.stack([arrays["without_mqk"], arrays["with_mqk"]]), [0.02, 0.98])
    maps = "".join(f"<figure><h3>{title}</h3>{picture(arrays[key], ends, f'attention map {title}')}</figure>"
                   for key, title in (("without_mqk", "without MQK"), ("with_mqk", "with MQK")))
    ends = 0, np.quantile(np.stack([arrays["mv_raw"], arrays["mv_debiased"]]), 0.95)
    norms = "".join(f'<h3>MV {title}</h3><div class="frames">'
                    + "".join(picture(f, ends, f"frame {i}") for i, f in enumerate(arrays[key])) + "</div>"
                    for key, title in (("mv_raw", "as trained"), ("mv_debiased", "debiased, as used")))
    return f"""<p>One temporal attention layer, looking at a half-noised reference clip. Row: the frame that
asks; column: the frame that answers; dark: much attention. MQK is the same at every position of the picture,
so it can only say which frames belong together.</p><div class="panels">{maps}</div><p>The norm of MV at each
position of the latent grid, frame by frame. As trained it may also hold what the clip looks like; differences
of neighbouring frames, from the second frame on, keep what changes: the motion.</p>{norms}"""


def page(lab, results, arrays):
    """report.html: one page that needs nothing else."""
    run, rows = results["run"], results["rows"]
    panels = [bars(METRICS[m], {r["name"]: r["metrics"][m] for r in rows},
                   results["chance"][0] if m == "motion_fidelity" and results["chance"] else None, "chance")
              for m in METRICS if m in rows[0]["metrics"]]
    panels.append(bars(f"Fréchet distance ({results['judges']['frechet']} features) ↓",
                       {r["name"]: r["frechet"] for r in rows}, rows[0]["frechet_floor"], "real"))
    main, differences, details = (html_table(*t) for t in tables(results))
    answers = [s for s, c in zip(results["sentences"], results["comparisons"]) if c["name"] in ABLATIONS]
    others = [s for s in results["sentences"] if s not in answers]

    def items(texts):
        """A list's items."""
        return "".join(f"<li>{html.escape(text)}</li>" for text in texts)

    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Motion Inversion, part by part</title><style>{STYLE}</style></head><body>
<h1>Motion Inversion, part by part</h1>
<p>What the Motion Query-Key embedding (MQK) and the Motion Value embedding (MV) contribute: each removed in
turn, on the same clips, prompts and start noise.</p>
<p class="soft">{html.escape(run['command'])} · {run['date']} · {html.escape(run['machine'])} ·
{results['finished']} of {results['planned']} cells</p>
<h2>What was found</h2><div class="found">{''.join(f'<p>{html.escape(s)}</p>' for s in answers)}</div>
<details><summary>The other variants (exploratory)</summary><ul>{items(others)}</ul></details>
<h2>The table</h2>{main}
<h2>The same in pictures</h2><div class="panels">{''.join(panels)}</div>
<h2>Clips</h2><p class="soft">The first sampling seed, not selected.
<label><input type="checkbox" id="still"> stop the motion</label></p>{clip_rows(lab)}
<h2>What each part does</h2>{figures_html(arrays) if arrays else ""}
<h2>Differences from the full method</h2>{differences}
<h2>Bias, tracks, cost</h2>{details}
<h2>How to read this</h2><ul>{items(notes(results))}</ul>
<h2>What was expected</h2><ul>{items(f"{r['name']}: {r['hypothesis']}" for r in rows)}</ul>
</body></html>
"""


def finite(value):
    """JSON has no infinity: what is not finite becomes null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(lab, run):
    """Writes results.json, results.md and report.html from the finished cells; prints the table."""
    out, results = Path(lab.settings.out), {"run": run, **collect(lab)}
    texts = {"results.json": json.dumps(finite(results), indent=1), "results.md": markdown(results),
             "report.html": page(lab, results, look_inside(lab))}
    for name, text in texts.items():
        with mini_mi.atomic_write(out / name) as temporary:
            Path(temporary).write_text(text, encoding="utf-8")
    (heads, rows), *_ = tables(results)
    print("\n" + "\n".join("".join(f"{text:27}" for text in line[:5]).rstrip() for line in [heads, *rows]))
    print("\n" + "\n".join(results["sentences"]) + f"\n\n{out / 'report.html'}")


# ===========================================================================================================
#   COMMAND LINE
# ===========================================================================================================

def parse(argv=None):
    """Command line -> checked Settings, with the model's defaults for what was not given."""
    parser = mini_mi.Parser("eval_mi.py", description=__doc__, argument_default=argparse.SUPPRESS,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Settings):
        flag, about, default = "--" + f.name.replace("_", "-"), f.metadata["about"], f.default
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=about)
            continue
        if f.name in BUDGET["tiny"]:
            default = f"{BUDGET['tiny'][f.name]} for tiny, else {BUDGET['other'][f.name]}"
        parser.add_argument(flag, type=f.type, choices=f.metadata.get("choices"),
                            metavar=None if "choices" in f.metadata else f.name.upper(),
                            help=about if default is None else f"{about} (default: {default})")
    settings = Settings(**vars(parser.parse_args(argv)))
    small = mini_mi.model_defaults(settings.model) is mini_mi.MODEL_DEFAULTS["tiny"]
    for name, value in BUDGET["tiny" if small else "other"].items():
        if name != "fps" and getattr(settings, name) is None:
            setattr(settings, name, value)
    if settings.dtype is None:
        settings.dtype = "float32" if small or pick_device(settings.device).type == "cpu" else "float16"
    # One frame has no motion; everything else that is counted can be one.
    least = dict(clip_count=1, prompt_count=1, seed_count=1, steps=1, sample_steps=1, invert_steps=1,
                 frames=2, together=1, batch=1, sample_batch=1, grid=1)
    for name, low in least.items():
        if getattr(settings, name) < low:
            raise mini_mi.UserError(f"--{name.replace('_', '-')} must be at least {low}")
    if not 0 <= settings.noise_prior <= 1 or not 0 < settings.lr < math.inf:
        raise mini_mi.UserError("--noise-prior must be within 0 and 1, and --lr above 0")
    if not math.isfinite(settings.guidance):
        raise mini_mi.UserError("--guidance must be a number")
    if settings.dtype == "float16" and settings.together > 1:
        raise mini_mi.UserError("in float16 clips that are trained together share one loss scale, and would "
                                "depend on each other: add --together 1")
    if settings.quick:
        grid = dict(clip_count=3, prompt_count=1, seed_count=1)
        grid = {name: min(value, getattr(settings, name)) for name, value in grid.items()}
        settings = dataclasses.replace(settings, **grid)
    return settings


def run(settings):
    """Computes this rank's share of the grid; the first rank writes the report when all are done."""
    began = time.perf_counter()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        # Nothing is sent but the word that a rank is done, after hours perhaps.
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    # Ranks that share a cache must not download into it at once: the first one goes ahead, then the first of
    # every machine, then the rest.
    turn = 0 if rank == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for now in range(3):
        if now == turn:
            lab = Lab(settings)
            # The first rank counts before any other can begin.
            missing = sum(lab.store.read("score", lab.score_key(c)) is None for c in lab.cells)
            if not settings.report:
                lab.ready()
        if ranks > 1:
            torch.distributed.barrier()
    if not settings.report:
        run_units(lab, share(units(settings, lab.cells), settings, ranks)[rank], rank == 0)
        if ranks > 1:
            torch.distributed.barrier()
    if rank == 0:
        machine = (torch.cuda.get_device_name(lab.device) if lab.device.type == "cuda"
                   else f"{os.cpu_count()} CPU cores ({platform.machine()})")
        about = {"command": " ".join(["python eval_mi.py", *map(shlex.quote, sys.argv[1:])]),
                 "date": time.strftime("%Y-%m-%d"), "machine": machine, "ranks": ranks,
                 "computed": 0 if settings.report else missing, "minutes": (time.perf_counter() - began) / 60,
                 "versions": {"python": platform.python_version(), "torch": torch.__version__,
                              "numpy": np.__version__, "scipy": scipy.__version__}}
        earlier = Path(settings.out) / "results.json"
        if settings.report and earlier.exists():                 # rebuilt: the numbers are of that run still
            about = mini_mi.read_json(earlier).get("run", about)
        write_report(lab, about)
    if ranks > 1:
        torch.distributed.destroy_process_group()


def main(argv=None):
    """Entry point of the command line; returns the exit status."""
    return mini_mi.guarded(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
