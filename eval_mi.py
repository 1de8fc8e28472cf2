"""Which part of Motion Inversion does what? The two ablations that the paper never ran, measured.

The method (mini_mi.py) learns the motion of one clip as two embeddings in temporal attention: MQK shapes the attention
map between frames, MV adds a debiased, spatially varying value. The paper never removes one of them. Here each part is
removed in two ways, trained without it (no-mqk, no-mv) and dropped after training (drop-mqk, drop-mv), and the results
are compared with the full method on the same clips, prompts and start noise. Brackets say what the numbers can mean:
no embeddings at all below, the reference through the autoencoder above.

    python eval_mi.py                  the default grid on the embedded model, about 40 minutes on two cores
    python eval_mi.py --quick          a small grid, 5 minutes
    python eval_mi.py --report         the report again, from the cells that are finished
    torchrun --nproc_per_node=8 eval_mi.py --model zeroscope --clips my_clips --frames 24 --size 576x320

A run can be killed at any time and goes on where it stopped. It leaves results.json, results.md and report.html.

Order of this file: the judges (CLIP, Inception), metrics, statistics, variants, the grid of cells, running it, the
tables, the figures, the report, the command line.

Letters: B batch, F frames, h w pixels, H W latent grid, C channels, D feature width, L tokens, n m sample counts,
K = F-1 steps of a track.

Checked against: transformers' CLIP and pytorch-fid's Inception network (to 1e-4), hand-worked cases for every metric,
simulated coverage for every interval. See tests/.
"""

import argparse
import base64
import csv
import dataclasses
import hashlib
import html
import io
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import mini_mi


# =====================================================================================================================
#   THE JUDGES: CLIP and Inception, compact, with the keys of the published weight files
# =====================================================================================================================

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_TEXT_DEFAULTS = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
                          vocab_size=49408, max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5)
CLIP_VISION_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                            image_size=224, patch_size=32, num_channels=3, hidden_act="quick_gelu",
                            layer_norm_eps=1e-5)


def _clip_settings(config, defaults):
    """The fields of one tower. Published configs hold dozens of others (text generation, training): not read here."""
    return {field: (config or {}).get(field, value) for field, value in defaults.items()}


class CLIPVisionTransformer(nn.Module):
    """Patches and one class token through bidirectional layers: pixels (B,3,s,s) -> (B,D), the class token, normed."""

    def __init__(self, config):
        super().__init__()
        c = mini_mi.read_config("CLIP image tower", _clip_settings(config, CLIP_VISION_DEFAULTS), CLIP_VISION_DEFAULTS,
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
        patches = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)            # (B, patches, D)
        first = self.embeddings.class_embedding.expand(len(pixels), 1, -1)
        x = self.pre_layrnorm(torch.cat([first, patches], dim=1) + self.embeddings.position_embedding.weight)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x[:, 0])


class CLIPModel(nn.Module):
    """Pictures and texts as unit vectors in one space. `config` and keys are those of transformers' CLIPModel.

    Source: Radford et al., arXiv 2103.00020. The text tower and its layers are mini_mi's.
    """

    def __init__(self, config):
        super().__init__()
        text = _clip_settings(config.get("text_config"), CLIP_TEXT_DEFAULTS)
        vision = _clip_settings(config.get("vision_config"), CLIP_VISION_DEFAULTS)
        width = config.get("projection_dim", 512)
        self.image_size = vision["image_size"]
        self.eos_token_id = (config.get("text_config") or {}).get("eos_token_id", 49407)
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
        # Files of 2021 and 2022 say eos_token_id = 2, which is wrong for their vocabulary; there transformers takes the
        # largest id, which is the end-of-text token. Later files name it, and the first place that holds it counts.
        end = ids.argmax(1) if self.eos_token_id == 2 else (ids == self.eos_token_id).int().argmax(1)
        return F.normalize(self.text_projection(states[torch.arange(len(ids)), end]), dim=-1)


def load_clip(name, device="cpu"):
    """A CLIP folder or hub repository -> (model, tokenizer, preprocess), in HF layout.

    preprocess: frames (F,h,w,3) uint8 -> pixels (F,3,s,s): bicubic to s on the short side, centre crop, CLIP's mean and
    std. It rounds back to 8 bits after resizing, as CLIP's own preprocessing of PIL pictures does.
    """
    files = {file: _clip_file(name, file) for file in ("config.json", "vocab.json", "merges.txt")}
    optional = ("tokenizer_config.json", "special_tokens_map.json", "model.safetensors", "pytorch_model.bin")
    files.update({file: _clip_file(name, file, required=False) for file in optional})
    weights = files["model.safetensors"] or files["pytorch_model.bin"]
    if not weights:
        raise mini_mi.UserError(f"{name} has neither model.safetensors nor pytorch_model.bin; name another --clip")
    model = CLIPModel(mini_mi.read_json(files["config.json"]))
    tensors = {k: v.float() for k, v in mini_mi.load_tensors(weights).items() if not k.endswith("position_ids")}
    _load_strict(model, tensors, weights)
    tokenizer = mini_mi.CLIPTokenizer.from_pretrained(files["vocab.json"].parent)

    def preprocess(frames):
        """frames (F,h,w,3) uint8 -> pixels (F,3,s,s) float32, normalised"""
        x = torch.as_tensor(frames).to(device).permute(0, 3, 1, 2).float()
        s, (height, width) = model.image_size, x.shape[-2:]
        size = (s, max(s, int(s * width / height))) if height <= width else (max(s, int(s * height / width)), s)
        if size != (height, width):
            x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).round().clamp(0, 255)
        top, left = (size[0] - s) // 2, (size[1] - s) // 2
        x = x[..., top:top + s, left:left + s] / 255
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        return (x - mean) / std

    return model.to(device).eval().requires_grad_(False), tokenizer, preprocess


def _clip_file(name, file, required=True):
    """The path of one file of a CLIP folder or hub repository; None if it may be absent and is."""
    folder = Path(name)
    if not folder.is_dir():
        return mini_mi.fetch(name, file, required)
    # The embedded CLIP shares its vocabulary with the video model, whose folder it lies in.
    for path in (folder / file, folder.parent / "tokenizer" / file):
        if path.is_file():
            return path
    if required:
        raise mini_mi.UserError(f"{folder} is no CLIP folder: {file} is missing; name another --clip")


def _load_strict(model, tensors, source):
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as e:
        raise mini_mi.UserError(f"{source} does not fit: {' '.join(str(e).split())[:200]}") from None


class InceptionConv(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class InceptionBlock(nn.Module):
    """Parallel branches, concatenated. `branches`: name -> a row (c_in, c_out, kernel, stride, padding), or a list of
    them that follow each other; there the keys end in _1, _2 ... Two rows in a tuple fork the branch: _2a and _2b.

    pool: "avg" or "max", the 3x3 pool before `branch_pool` (or alone, with stride 2, if there is no such branch).
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

    Weights: pt_inception-2015-12-05 (the TensorFlow network of the FID paper, ported by pytorch-fid), whose keys these
    are. It differs from torchvision's: averages ignore padding, the last block pools by maximum, 1008 classes.
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
        self.Mixed_6a = InceptionBlock({"branch3x3": (288, 384, 3, 2),
                                        "branch3x3dbl": [(288, 64, 1), (64, 96, 3, 1, 1), (96, 96, 3, 2)]}, "max")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_mixed_6, (128, 160, 160, 192))
        self.Mixed_7a = InceptionBlock({"branch3x3": [(768, 192, 1), (192, 320, 3, 2)],
                                        "branch7x7x3": [(768, 192, 1), (192, 192, (1, 7), 1, (0, 3)),
                                                        (192, 192, (7, 1), 1, (3, 0)), (192, 192, 3, 2)]}, "max")
        self.Mixed_7b, self.Mixed_7c = _mixed_7(1280, "avg"), _mixed_7(2048, "max")
        self.fc = nn.Linear(2048, 1008)                                 # in the file, not in the features

    @classmethod
    def pretrained(cls, device="cpu"):
        """The published weights, fetched once and checked against the SHA-256 in their name."""
        tensors = torch.hub.load_state_dict_from_url(cls.URL, map_location="cpu", check_hash=True, weights_only=True)
        model = cls()
        _load_strict(model, tensors, cls.URL)
        return model.to(device).eval().requires_grad_(False)

    def forward(self, x):
        # Sizes, and no antialiasing, are part of the definition: another resize gives another FID (arXiv 2104.11222).
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        for name, module in self.named_children():
            if name != "fc":
                x = module(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, 2)
        return x.mean(dim=(2, 3))


# =====================================================================================================================
#   METRICS: pure functions of arrays
# =====================================================================================================================

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

    frame_features (F,D), reference_features (G,D) -> float in [-1,1]. High where the prompt asks for another appearance
    is bad; this is what debias is for. It also sees what should be shared (a common style), so compare it with `base`.
    """
    return float((_unit(frame_features) @ _unit(reference_features).T).mean())


def attribute_choices(frame_features, candidates):
    """Which of the candidate texts fits the clip best? The index of the largest mean cosine over frames.

    frame_features (F,D), candidates (k,D) -> int. Zero-shot classification as in the CLIP paper (arXiv 2103.00020).
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
    """FID: |mu1-mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), the distance of two Gaussians fitted to features.

    x (n,d), y (m,d) -> float. Covariances with n-1, all in float64.
    With centred X1, X2 (rows / sqrt(n-1)) the last trace is the sum of singular values of X1 X2^T. That is exact also
    for n < d, where the usual matrix square root returns noise; and X = QR allows to use the small factor R in its place.
    Biased upward for small n, by an amount that depends on the features: compare only at equal n, and print the distance
    of real from real beside it. Blind to motion and to which prompt a frame belongs to.
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
        return (a @ b.T / d + 1) ** 3

    def without_self(a):
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return float(without_self(x) + without_self(y) - 2 * kernel(x, y).mean())


# ------------------------------------------------------------------------------------------------------------- motion

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
    weight = torch.exp(-(window ** 2).sum(-1) / radius ** 2)                               # centre counts most
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

    tracks_a (n,F,2), tracks_b (m,F,2), in pixels, all visible throughout; still: pixels per frame -> float in [-1,1].
    A track that moves less than `still` on average is left out: a still background would match any still background.
    A step shorter than that has no direction: still in both counts 1, still in one 0. No moving track in either clip: 1,
    in one of them: 0. Identical clips score exactly 1.
    Blind to speed and to place; chance is far above 0, since the best of many tracks is taken: see the chance row.
    mode "dmt" reproduces the code published with the formula, to compare with values that it gave: one direction (each
    track of the result a against the reference b), all tracks, an identity subtracted from the matrix, NaN as soon as
    one track rests for one step. It needs n = m.
    Source: Yatim et al., arXiv 2311.17009, Eq. 8; code: diffusion-motion-transfer, motion_fidelity_score.py.
    """
    if mode == "dmt":
        v, w = (torch.as_tensor(t).double().diff(dim=1) for t in (tracks_a, tracks_b))
        if len(v) != len(w):
            raise ValueError(f"dmt mode subtracts an identity: both clips need as many tracks, not {len(v)}, {len(w)}")
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
    return float((corr.max(1).values.mean() + corr.max(0).values.mean()).div(2).clamp(-1, 1))


def cotracker(video, grid, device="cpu"):
    """`track_points` by CoTracker 3 (arXiv 2410.11831), fetched through torch.hub; its licence is non-commercial."""
    model = torch.hub.load("facebookresearch/co-tracker", "cotracker3_offline", trust_repo=True).to(device)
    pixels = torch.as_tensor(video).permute(0, 3, 1, 2)[None].float().to(device)               # (1,F,3,h,w), 0..255
    with torch.no_grad():
        tracks, visible = model(pixels, grid_size=grid)                                        # (1,F,n,2), (1,F,n)
    return tracks[0].transpose(0, 1).cpu(), visible[0].transpose(0, 1).bool().cpu()


# =====================================================================================================================
#   STATISTICS: clips are the independent units; prompts and seeds of one clip are not
# =====================================================================================================================

def student_interval(values, confidence=0.95):
    """Mean and Student t interval of independent values (n,) -> (mean, low, high); n = 1: infinitely wide."""
    values = np.asarray(values, dtype=np.float64)
    mean, half = values.mean(), math.inf
    if len(values) > 1:
        half = scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
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
    """Is a larger than b, sample by sample? a (n,), b (n,), groups (n,) labels or None -> (mean, low, high, p) of a - b.

    Mean and 95 % Student t interval of the means per group. p, two-sided: if a and b were the same method, every group's
    difference could as well have the other sign; p is the share of sign patterns whose mean is at least as far from 0.
    All 2^k patterns up to k = 12 groups, else 10 000 drawn ones (with the observed one counted, so p is never 0).
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


def detectable_difference(half_width, n, power=0.8):
    """The smallest true difference that a test at 5 % on n groups would have found with the given power.

    half_width: of the 95 % t interval that was seen. (t_.975 + t_power) standard errors.
    """
    t = scipy.stats.t(n - 1)
    return float(half_width * (t.ppf(0.975) + t.ppf(power)) / t.ppf(0.975)) if n > 1 else math.inf


def jackknife(statistic, groups):
    """Interval of a statistic that is no mean, by leaving out one group at a time -> (value, low, high).

    statistic: a function of a list of groups -> float. value = statistic of all, half width = t_(k-1) * sqrt((k-1)/k sum
    (theta_-i - mean)^2). The bootstrap would draw duplicates, which shrinks covariances and biases FID.
    Source: Efron and Tibshirani 1993, chapter 11.
    """
    k, value = len(groups), statistic(groups)
    if k < 3:
        return value, -math.inf, math.inf
    left = np.array([statistic(groups[:i] + groups[i + 1:]) for i in range(k)])
    half = scipy.stats.t.ppf(0.975, k - 1) * math.sqrt((k - 1) / k * ((left - left.mean()) ** 2).sum())
    return value, value - half, value + half


def clustered_share(wins, clusters, draws=10_000, seed=0):
    """95 % interval of a share whose votes come in clusters: percentile bootstrap over whole clusters -> (low, high).

    wins (n,) 0 or 1, clusters (n,) labels: the votes of one person are not independent.
    """
    names = list(dict.fromkeys(clusters))
    won, cast = (np.array([sum(v for v, c in zip(values, clusters) if c == name) for name in names])
                 for values in (wins, [1] * len(clusters)))
    pick = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    return tuple(float(q) for q in np.percentile(won[pick].sum(1) / cast[pick].sum(1), [2.5, 97.5]))
