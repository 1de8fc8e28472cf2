"""Which part of Motion Inversion does what? The two ablations that the paper does not measure.

The method (mini_mi.py) learns the motion of one clip as two embeddings in temporal attention: MQK shapes the
attention map between frames, MV adds a debiased value at every position. The paper has no numbers without one
of them; an older supplement of it shows clips "QK without V", and no numbers either. Here each part is
removed in two ways, trained without it (no-mqk, no-mv) and dropped after training (drop-mqk, drop-mv), and
compared with the full method on the same clips, prompts and start noise. Two bounds say what the numbers can
mean: no embeddings at all below, the reference through the autoencoder above.

    python eval_mi.py                  the default grid on the embedded model, about 20 minutes on two cores
    python eval_mi.py --quick          a small grid, 4 minutes
    python eval_mi.py --report         the report again, from the cells that are finished
    python eval_mi.py --ballot         ballot.html, a page on which people vote; --votes FILES counts them
    torchrun --nproc_per_node=8 eval_mi.py --model zeroscope --clips my_clips --frames 24 --size 576x320

A run can be killed at any time and goes on where it stopped. It leaves, in --out:

    report.html  results.md  results.svg  results.json           the answers; the picture is fit for a README
    motions/CLIP-TRAINING-r0-DIGEST.safetensors               trained embeddings, also for mini_mi.py --motion
    cells/CLIP/VARIANT-p0-s1-DIGEST.npz                  a sampled clip: prompt 0 (or "own"), sampling seed 1
    scores/CLIP/VARIANT-p0-s1-DIGEST.npz                         what the judges said about it

A file that exists is not made again. DIGEST stands for everything else that determines it: settings, clip,
weights, version of this code. Whatever is changed, other files are made, and the old ones stay.

Order of this file: the question and its variants, metrics, statistics, the experiment (one loop over clip,
training, variant, prompt and seed), results, ballot, report, command line; last the judges, CLIP and
Inception.

Letters: B batch, F frames, h w pixels, H W latent grid, C channels, D feature width, L tokens, n m counts of
samples or tracks, K = F-1 steps of a track.

Checked against: transformers' CLIP and pytorch-fid's Inception network (to 1e-4), hand-worked cases for every
metric, simulated coverage for intervals of means, shares and the jackknife. See tests/.
"""

import argparse
import base64
import collections
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import hashlib
import html
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import string
import sys
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.stats
import torch
import torch.distributed
import torch.nn.functional as nnf
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

import mini_mi
from data import world
from mini_mi import UserError, option


# ===========================================================================================================
#   THE QUESTION: what is lost without MQK, what without MV? Each variant differs from the method in one thing
# ===========================================================================================================

# Settings of MotionEmbeddings while they are trained. Variants that train alike share one training.
TRAININGS = {"full": {}, "no-mqk": {"use_mqk": False}, "no-mv": {"use_mv": False}, "mqk-2d": {"mqk_dims": 2},
             "mv-1d": {"mv_dims": 1}, "debias-in-training": {"debias_in_training": True}}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table, what we expected of it, and in what it differs from the method."""
    name: str
    expected: str
    training: str | None = "full"   # one of TRAININGS; None: no embeddings
    use: dict = dataclasses.field(default_factory=dict)            # their settings that change after training
    prior: bool = True              # start from the blend with the inverted reference; False: plain noise
    own_prompt: bool = False        # the reference's caption in place of the target prompts
    sampled: bool = True            # False: no diffusion at all


VARIANTS = {v.name: v for v in (
    Variant("full", "the method: 1D MQK, 2D MV, debias by differences"),
    # The two ablations that the paper has no numbers for: the part is missing from the start.
    Variant("no-mqk", "without MQK the order of the motion suffers, since only MV is left to carry it",
            "no-mqk"),
    Variant("no-mv", "without MV the global course stays and local motion is lost; the text does not suffer",
            "no-mv"),
    # The same parts, taken away after training together: how much does the other one rely on its partner?
    Variant("drop-mqk", "MV was trained beside MQK: alone it should do worse than MV trained alone (no-mqk)",
            use={"use_mqk": False}),
    Variant("drop-mv", "the authors' choice for camera motion: text similarity rises, fidelity falls",
            use={"use_mv": False}),
    Variant("debias-none", "raw MV carries the reference's appearance: leakage rises, text similarity falls",
            use={"debias": "none"}),
    Variant("debias-mean", "subtracting the mean removes static appearance as well as differences do",
            use={"debias": "mean"}),
    Variant("mqk-2d", "a spatial MQK can hold the reference's shape: leakage rises", "mqk-2d"),
    Variant("mv-1d", "MV without space cannot hold local motion: fidelity falls", "mv-1d"),
    Variant("debias-in-training", "MV that is trained as it is used fits better than MV debiased afterwards",
            "debias-in-training"),
    Variant("no-inversion", "from plain noise the embeddings alone must carry the motion: fidelity falls",
            prior=False),
    # The bounds: what is there without the method, and how far any method could get.
    Variant("base", "no embeddings, the same start noise: what the inverted noise alone achieves", None),
    Variant("base-no-inversion", "no embeddings, plain noise: what the model does unasked", None,
            prior=False),
    Variant("reconstruct", "the reference's own prompt: the method without a conflict of appearance",
            own_prompt=True),
    Variant("vae", "the reference through the autoencoder and back: the upper bound", None, own_prompt=True,
            sampled=False),
)}
ABLATIONS = ("no-mqk", "no-mv")
DEFAULT_VARIANTS = ("full", *ABLATIONS, "drop-mqk", "drop-mv", "debias-none",
                    "base", "base-no-inversion", "reconstruct", "vae")
METRICS = {"text_similarity": "Text Similarity ↑", "motion_fidelity": "Motion Fidelity ↑",
           "temporal_consistency": "Temporal Consistency ↑", "leakage": "Appearance leakage ↓",
           "attributes": "Attributes shown ↑"}
PRIMARY = ("motion_fidelity", "text_similarity")    # with ABLATIONS four tests, fixed before any result
FAMILY = len(PRIMARY) * len(ABLATIONS)
STILL = 0.5                                         # pixels per frame below which a track counts as resting


# ===========================================================================================================
#   METRICS: pure functions of arrays
# ===========================================================================================================

def _unit(features):
    return nnf.normalize(torch.as_tensor(features).double(), dim=-1)


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


def best_text(frame_features, candidates):
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
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    # Unbiased: within a set only pairs of different samples count.
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return float(within - 2 * xy.mean())


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
        padded = nnf.pad(frame, (1, 1, 1, 1), mode="replicate")
        along_x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
        along_y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
        levels.append(torch.cat([frame, along_x, along_y], dim=1))
        frame = nnf.avg_pool2d(frame, 2)
    return levels


def _values_at(picture, points):
    """picture (B,c,h,w) at points (B,n,W,2), bilinear -> (B,n,W,c); outside: the nearest border pixel."""
    height, width = picture.shape[-2:]
    scaled = (2 * points + 1) / torch.tensor([width, height], device=points.device) - 1    # to [-1,1]
    out = nnf.grid_sample(picture, scaled, padding_mode="border", align_corners=False)
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
        value, along_x, along_y = _values_at(first[level], p).chunk(3, dim=-1)           # each (B,n,W,3)
        gradient = torch.stack([along_x, along_y], -1).flatten(2, 3)                       # (B,n,W*3,2)
        weighted = gradient * weight.repeat_interleave(3)[:, None]
        # G^-1 and the sum over the window as one matrix, (B,n,2,W*3).
        solve = torch.linalg.inv(weighted.mT @ gradient + stiffness) @ weighted.mT
        for _ in range(iterations):
            error = value - _values_at(second[level][:, :3], p + d[:, :, None])
            d = d + (solve @ error.flatten(2)[..., None]).squeeze(-1).clamp(-radius, radius)
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
        raise UserError(f"cannot fetch CoTracker ({mini_mi.one_line(e)}): "
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
        half = scipy.stats.t.ppf((1 + confidence) / 2, n - 1) * scipy.stats.sem(values)
    return float(mean), float(mean - half), float(mean + half)


def wilson_interval(successes, n, confidence=0.95):
    """Interval for a share, right also near 0 and 1 and at small n -> (low, high). Source: Wilson 1927."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} of {n} is no share")
    return tuple(map(float, scipy.stats.binomtest(successes, n).proportion_ci(confidence, "wilson")))


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
    # Scaled and rounded: patterns that tie with the observed one must count, whatever the order of their sums
    # rounds to. scipy takes all patterns where `n_resamples` reaches 2^k.
    scaled = means / (np.abs(means).max() or 1)
    flips = scipy.stats.permutation_test(
        (scaled,), lambda x, axis: np.abs(x.mean(axis)).round(12), permutation_type="samples",
        alternative="greater", vectorized=True, n_resamples=4096 if len(means) <= 12 else 10_000,
        rng=np.random.default_rng(seed)) if len(means) > 1 else None
    return *student_interval(means), float(flips.pvalue) if flips else 1.0


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


def variance_components(values):
    """Nested analysis of variance: values (clips, trainings, samples) -> the variance of each level.

    Each is what its level adds to the one below: E[mean square] = s + S t + S R c for S samples of each of R
    trainings. None where a level has one member only; its variance is then part of the level above.
    Source: Searle, Casella and McCulloch 1992, chapter 3 (balanced, negative estimates set to 0).
    """
    found, noise = [], 0.0                          # noise: variance of the means that the level above sees
    for level in (2, 1, 0):
        if np.shape(values)[level] > 1:
            seen = np.var(values, axis=level, ddof=1).mean()
            found.insert(0, float(max(0.0, seen - noise)))
            noise = (noise + found[0]) / np.shape(values)[level]
        else:
            found.insert(0, None)
        values = np.mean(values, axis=level)
    return tuple(found)


def detectable_with(components, clips, trainings, samples, alpha=0.05):
    """`detectable_difference` of a run with that many clips, trainings per clip and samples per training."""
    per_clip, per_training, per_sample = (c or 0.0 for c in components)
    error = math.sqrt((per_clip + (per_training + per_sample / samples) / trainings) / clips)
    return detectable_difference(scipy.stats.t.ppf(0.975, clips - 1) * error, clips, alpha=alpha)


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
    sizes = np.array([list(clusters).count(name) for name in dict.fromkeys(clusters)])
    won = group_means(wins, clusters) * sizes
    if len(sizes) == 1:                                              # nothing to draw from
        return (float(won[0] / sizes[0]),) * 2
    found = scipy.stats.bootstrap((won, sizes), lambda w, n, axis: w.sum(axis) / n.sum(axis), paired=True,
                                  vectorized=True, n_resamples=draws, method="percentile",
                                  rng=np.random.default_rng(seed))
    return tuple(map(float, found.confidence_interval))


# ===========================================================================================================
#   THE EXPERIMENT: for every clip, training, variant, prompt and seed a sample, and what the judges say of it
# ===========================================================================================================

# Part of every digest. Raise it with any change of code after which a file would hold something else.
CODE_VERSION = 2
ENDS = 1 << 20                                      # bytes read at either end of a file of weights
# Files that can be a clip; beside them, pictures that move and folders.
VIDEO_SUFFIXES = set(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .wmv .flv .ogv".split())
WORLD_ATTRIBUTES = {"shape": world.SHAPES, "colour": world.COLOURS, "pattern": world.PATTERNS,
                    "background": world.BACKGROUNDS}


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A reference clip: frames (F,h,w,3) uint8, what it shows, how it moves, and what to turn it into."""
    name: str
    frames: np.ndarray
    caption: str
    movement: str
    prompts: tuple

    @functools.cached_property
    def digest(self):
        """Stands for everything that training and judging take from it."""
        return digest(hashlib.sha256(self.frames.tobytes()).hexdigest(), self.caption)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One sample of one variant: the unit of the statistics and of the files."""
    variant: Variant
    clip: Clip
    place: int                      # which of the clip's prompts; -1: its own caption
    seed: int                       # of sampling
    train_seed: int = 0

    @property
    def prompt(self):
        """The text that the sample was asked to show."""
        return self.clip.caption if self.place < 0 else self.clip.prompts[self.place]

    @property
    def key(self):
        """What is equal in two variants of one sample."""
        return self.clip.name, self.place, self.seed

    @property
    def name(self):
        """For file names."""
        place = "own" if self.place < 0 else f"p{self.place}"
        again = f"-r{self.train_seed}" if self.train_seed else ""
        return f"{self.variant.name}-{place}-s{self.seed}{again}"


def digest(*what):
    """A short name for any JSON-able settings: 12 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(*folders):
    """Stands for the files of some folders: names, sizes, and the first and last bytes of each.

    Training moves every tensor, and the header of a file of weights names them all: reading gigabytes in
    between would tell nothing more.
    """
    total = hashlib.sha256()
    for folder in folders:
        # A downloader's notes in a dot-folder are no part of the model.
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        for name in sorted(name for name in files if not any(part.startswith(".") for part in name.parts)):
            path = folder / name
            size = path.stat().st_size
            total.update(f"{name} {size} ".encode())
            with open(path, "rb") as file:
                total.update(file.read(ENDS))
                file.seek(max(file.tell(), size - ENDS))
                total.update(file.read())
    return total.hexdigest()


def save_arrays(path, about, arrays):
    """about: JSON-able dict; arrays: name -> array. A killed run leaves the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mini_mi.atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, about=json.dumps(about), **arrays)


def read_arrays(path):
    """What `save_arrays` wrote -> (about, arrays); a zip file, in which every array has a checksum."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(str(arrays.pop("about"))), arrays


def kept(path, read=read_arrays):
    """read(path), or None where there is no such file. A damaged one is set aside, and that is said."""
    try:
        return read(path) if path.exists() else None
    except MemoryError:
        raise
    except Exception as e:                                           # damaged files raise a dozen types
        aside = path.with_suffix(".damaged")
        with contextlib.suppress(FileNotFoundError):                 # another rank was first
            os.replace(path, aside)
        tqdm.write(f"warning: {path.name} is damaged ({mini_mi.one_line(e)}): set aside as "
                   f"{aside.name}, to be made again", file=sys.stderr)


def once(path, make):
    """The arrays in a file, name -> array; where it is not there, or damaged, make() gives them first."""
    if (found := kept(path)) is None:
        found = {}, make()
        save_arrays(path, *found)
    return found[1]


def checksum(motion):
    """SHA-256 of embeddings: safetensors has none."""
    tensors = sorted(motion.state_dict().items())
    return hashlib.sha256(b"".join(v.cpu().float().numpy().tobytes() for _, v in tensors)).hexdigest()


def read_motion(path):
    """Embeddings that `Lab.train` kept, in eval mode."""
    motion = mini_mi.MotionEmbeddings.load(path)
    if motion.source.get("checksum") != checksum(motion):
        raise ValueError("its checksum is another one")
    return motion


def find_clip(folder, name):
    """The clip of this name, or stem, in a folder: a video file, a picture that moves, or a folder."""
    found = []
    for path in sorted(p for p in folder.iterdir() if name in (p.name, p.stem)):
        moves = path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES or path.name == name
        with contextlib.suppress(OSError, ValueError), Image.open(path) as picture:
            moves |= getattr(picture, "is_animated", False)
        found += [path] if moves else []           # and no thumbnail, description or subtitles
    if not found:
        raise UserError(f"{folder / 'clips.json'} names {name}, but there is no such clip beside it")
    if len(found) > 1:
        raise UserError(f"{folder} holds {found[0].name} and {found[1].name}: which of them is the clip "
                        f"{name}? Write its full name in clips.json, or move one away")
    return found[0]


def read_clips(settings, in_world):
    """The reference clips: of `--clips`, or, for the embedded model, as many as asked for of the world."""
    s, clips, rendered = settings, [], in_world and not settings.clips
    width, height = map(int, s.size.split("x"))
    if rendered:
        if width != height:
            raise UserError(f"--size {s.size}: clips of the embedded world are square; "
                            f"take --size {width}x{width}")
        file, entries = "the embedded world", [world.reference(s.split, i) for i in range(s.clip_count)]
        entries = [(entry["name"], entry) for entry in entries]
    else:
        file = Path(s.clips or mini_mi.HERE / "data" / "clips") / "clips.json"
        entries = list(mini_mi.read_json(file).items())
    if len(entries) < s.clip_count:
        raise UserError(f"{file} names {len(entries)} clips; lower --clip-count {s.clip_count}")
    for name, entry in entries[:s.clip_count]:
        entry = entry if isinstance(entry, dict) else {}
        caption, prompts = entry.get("caption"), entry.get("prompts", [])
        listed = isinstance(prompts, (list, tuple)) and len(prompts) >= s.prompt_count
        if not isinstance(caption, str) or not listed:
            raise UserError(f"{file}: {name} needs a caption and {s.prompt_count} prompts; "
                            "add them or lower --prompt-count")
        texts = (caption, *map(str, prompts))
        if rendered:
            scene = world.scene(entry["seed"], [entry["motion"]], caption)
            frames = world.render(scene, s.frames, width)
        else:
            frames = mini_mi.read_video(find_clip(file.parent, name), s.frames, (width, height))
        for text in texts if in_world else ():
            try:
                world.attributes(text)
            except ValueError as e:
                raise UserError(f"{e}; the embedded model knows no other texts") from None
        clips.append(Clip(name, frames, caption, str(entry.get("motion", name)), texts[1:]))
    return clips


def plan(settings, clips):
    """Every cell, grouped as the work is done -> [(clip, training, train_seed, [cells])].

    It depends neither on what is finished nor on the number of ranks.
    """
    work = []
    for clip in clips:
        for training in (*TRAININGS, None):
            for train_seed in range(settings.training_seeds if training else 1):
                cells = [Cell(variant, clip, place, seed, train_seed)
                         for variant in map(VARIANTS.get, settings.variants) if variant.training == training
                         for place in ([-1] if variant.own_prompt else range(settings.prompt_count))
                         for seed in range(settings.seed_count if variant.sampled else 1)]
                if cells:
                    work.append((clip, training, train_seed, cells))
    return work


def run_experiment(lab, ranks=1, rank=0):
    """Makes and judges every cell of this rank's share that is not there yet. Every step leaves a file."""
    work = share(lab, ranks)[rank]
    # One bar over forward passes of the UNet, since a training costs as much as dozens of samples.
    with tqdm(total=sum(lab.passes(*group, missing=True) for group in work), disable=rank > 0, smoothing=0,
              bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {desc}") as bar:
        for clip, training, train_seed, cells in work:
            motion = None
            for batch in batches(cells, lab.settings.sample_batch):      # prompts and seeds of one variant
                if all(map(lab.is_finished, batch)):
                    continue
                bar.set_description_str(f"{clip.name}: {batch[0].variant.name}")
                # The whole batch again if one of it is missing: the same company gives the same last digits.
                samples = [kept(lab.sample_path(c)) for c in batch]
                if not all(samples):
                    if training and motion is None:
                        motion = lab.train(clip, training, train_seed, bar.update)
                    samples = lab.sample(batch, motion, bar.update)
                lab.judge(batch, samples)


def batches(cells, most):
    """Cuts cells into lists of one variant, at most so many in each."""
    for name in dict.fromkeys(c.variant.name for c in cells):
        same = [c for c in cells if c.variant.name == name]
        yield from (same[i:i + most] for i in range(0, len(same), most))


def share(lab, ranks):
    """Deals the work to ranks: the longest first, each to the one with the least so far -> lists per rank."""
    hands, load = [[] for _ in range(ranks)], [0] * ranks
    for group in sorted(lab.work, key=lambda g: -lab.passes(*g)) if ranks > 1 else lab.work:
        least = load.index(min(load))
        hands[least].append(group)
        load[least] += lab.passes(*group)
    return hands


class Lab:
    """Settings, clips, models, the paths of finished work, and the steps from a clip to a judged cell.

    The models load when they are first needed: a report from finished cells needs no UNet.
    """

    def __init__(self, settings):
        self.settings, s = settings, settings
        self.device = pick_device(s.device)
        self.model_folder = mini_mi.local_folder(s.model) or mini_mi.fetch_model(s.model)
        own = self.model_folder / "clip"
        self.clip_name = s.clip or str(own if own.is_dir() else "openai/clip-vit-base-patch32")
        # The model of the tiny world brings its own judge; the Inception network has never seen that world.
        self.in_world = is_small(s.model) and own.is_dir() and Path(self.clip_name).resolve() == own.resolve()
        self.clips = read_clips(s, self.in_world)
        self.work = plan(s, self.clips)
        self.cells = [cell for *_, cells in self.work for cell in cells]
        self.out = Path(s.out)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"cannot write into {s.out} ({e.strerror}): take another --out") from e
        parts = [self.model_folder / part for part in "unet vae text_encoder tokenizer scheduler".split()]
        self.base = [CODE_VERSION, fingerprint(*parts), s.frames, s.size, s.dtype, self.device.type]

    @functools.cached_property
    def models(self):
        """The text-to-video model."""
        return mini_mi.load_models(str(self.model_folder), self.device, getattr(torch, self.settings.dtype))

    @functools.cached_property
    def clip_judge(self):
        """(CLIP, its tokenizer, its preprocess)"""
        return load_clip(self.clip_name, self.device)

    @functools.cached_property
    def inception(self):
        """The network of FID, for models of the real world."""
        return InceptionV3.pretrained(self.device)

    @functools.cached_property
    def judges(self):
        """What scores depend on, beside the clip."""
        s = self.settings
        clip = fingerprint(clip_folder(self.clip_name))
        return [CODE_VERSION, clip, self.in_world, s.tracker, s.grid, STILL]

    def get_ready(self):
        """Loads, and fetches, whatever the grid needs: what is missing shows now and not after hours."""
        for steps in (self.settings.sample_steps, self.settings.invert_steps):
            self.models.scheduler.timesteps(steps)                   # raises if the schedule has not so many
        for name in ("clip_judge", "judges") if self.in_world else ("clip_judge", "judges", "inception"):
            getattr(self, name)
        if self.settings.tracker == "cotracker":
            cotracker_model()

    # ---- what is finished, and what is still to do

    def path(self, folder, name, *what, suffix=".npz"):
        """The place of something finished; what: everything that determines it, but for its name."""
        return self.out / folder / f"{name}-{digest(*what)}{suffix}"

    def noise_path(self, clip):
        """A clip's latents and inverted noise."""
        return self.path("noise", clip.name, self.base, clip.digest, self.settings.invert_steps)

    def motion_path(self, clip, training, train_seed):
        """A clip's trained embeddings."""
        return self.path("motions", f"{clip.name}-{training}-r{train_seed}", self.base, clip.digest,
                         train_seed, self.training(training), suffix=".safetensors")

    def sample_path(self, cell):
        """The frames of a cell."""
        s, v = self.settings, cell.variant
        noise = [self.noise_path(cell.clip).name, s.noise_prior] if v.prior else None
        motion = v.training and [self.motion_path(cell.clip, v.training, cell.train_seed).name, v.use]
        how = [s.sample_steps, s.guidance, noise, motion] if v.sampled else None
        return self.path("cells", f"{cell.clip.name}/{cell.name}", self.base, cell.clip.digest, cell.key,
                         cell.prompt, how)

    def score_path(self, cell):
        """What the judges said about it."""
        return self.path("scores", f"{cell.clip.name}/{cell.name}", self.sample_path(cell).name, self.judges,
                         cell.clip.digest)

    def is_finished(self, cell):
        """Nothing is to be done."""
        return self.sample_path(cell).exists() and kept(self.score_path(cell)) is not None

    def training(self, name):
        """The options of `train_motion` for one of TRAININGS."""
        s = self.settings
        return {"steps": s.steps, "lr": s.lr, "batch": s.batch, **s.training, **TRAININGS[name]}

    def passes(self, clip, training, train_seed, cells, missing=False):
        """Forward passes of the UNet for a group of the plan, roughly; missing: only of what is not there."""
        s = self.settings
        if missing:
            cells = [c for batch in batches(cells, s.sample_batch)
                     if not all(self.sample_path(c).exists() for c in batch) for c in batch]
        sampling = sum((2 if s.guidance > 1 else 1) * s.sample_steps for c in cells if c.variant.sampled)
        trained = missing and training and self.motion_path(clip, training, train_seed).exists()
        return sampling + (3 * s.steps * s.batch if training and cells and not trained else 0)

    # ---- steps

    def invert(self, clip):
        """clip -> latents (1,C,F,H,W) and inverted noise (1,C,F,H,W)."""
        def make():
            """The reference as latents, and these as the noise that leads to them."""
            latents = mini_mi.encode_video(self.models, mini_mi.to_model_range(clip.frames))
            noise = mini_mi.ddim_invert(self.models, latents, mini_mi.encode_prompt(self.models, [""]),
                                        self.settings.invert_steps, progress=False)
            return {"latents": latents.float().cpu().numpy(), "noise": noise.float().cpu().numpy()}

        arrays = once(self.noise_path(clip), make)
        return tuple(torch.from_numpy(arrays[name]).to(self.device) for name in ("latents", "noise"))

    def train(self, clip, training, train_seed, progress):
        """clip -> MotionEmbeddings in eval mode; their `source` holds what they cost.

        progress: is told the forward passes that are done; a step with its way back costs three.
        """
        s, options = self.settings, self.training(training)
        path = self.motion_path(clip, training, train_seed)
        state, on_gpu, last = path.with_suffix(".training"), self.device.type == "cuda", 0
        if (motion := kept(path, read_motion)) is not None:
            return motion.to(self.device)

        def on_step(step, _):
            """Moves the bar, also over the steps that an earlier run has made."""
            nonlocal last
            progress(3 * options["batch"] * (step - last))
            last = step

        path.parent.mkdir(parents=True, exist_ok=True)
        # A damaged state of an interrupted training is set aside here and not in its middle.
        kept(state, functools.partial(torch.load, weights_only=True, map_location="cpu"))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        began, text = time.perf_counter(), mini_mi.encode_prompt(self.models, [clip.caption])
        motion = mini_mi.train_motion(
            self.models, self.invert(clip)[0], text, **options, seed=train_seed, state=state,
            on_step=on_step, checkpointing=s.checkpointing, progress=False)
        cost = {"train_seconds": time.perf_counter() - began,        # memory in MiB; a CPU does not tell
                "memory": torch.cuda.max_memory_allocated(self.device) / 2 ** 20 if on_gpu else None,
                "parameters": sum(p.numel() for p in motion.parameters())}
        motion.source = {"model": s.model, "prompt": clip.caption, "frames": s.frames, "size": s.size,
                         "checksum": checksum(motion), "cost": cost}
        motion.save(path)
        state.unlink(missing_ok=True)
        return motion.to(self.device)

    def sample(self, cells, motion, progress):
        """Cells of one clip and variant in one batch -> [(about, {"frames": (F,h,w,3) uint8})], kept."""
        s, clip, variant = self.settings, cells[0].clip, cells[0].variant
        latents, inverted = self.invert(clip)
        cost = motion.source["cost"] if motion else {"train_seconds": 0.0, "memory": None, "parameters": 0}
        began = time.perf_counter()
        if variant.sampled:
            if motion:
                motion = copy.copy(motion)                       # shares its parameters, not its settings
                for name, value in variant.use.items():
                    setattr(motion, name, value)
            # All variants of one (clip, prompt, seed) start from the same fresh noise: they can be paired.
            seeds = [int(digest(*c.key), 16) for c in cells]
            noise = torch.cat([torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
                               for seed in seeds]).to(self.device)
            if variant.prior:
                noise = mini_mi.blend_noise(inverted, noise, s.noise_prior)
            text = mini_mi.encode_prompt(self.models, [c.prompt for c in cells])
            empty = mini_mi.encode_prompt(self.models, [""] * len(cells))
            latents = mini_mi.sample(self.models, noise, text, empty, s.sample_steps, s.guidance, motion,
                                     progress=False)
        videos = [mini_mi.to_uint8(video) for video in mini_mi.decode_video(self.models, latents)]
        seconds = (time.perf_counter() - began) / len(cells)
        samples = [({"cost": {**cost, "sample_seconds": seconds}}, {"frames": video}) for video in videos]
        for cell, sample in zip(cells, samples):
            if not self.sample_path(cell).exists():
                save_arrays(self.sample_path(cell), *sample)
        progress(self.passes(clip, None, 0, cells))
        return samples

    def measure(self, videos):
        """videos, B of (F,h,w,3) uint8 -> per clip features (F,D), fid_features (F or F/4,d), tracks (n,F,2).

        Only tracks that are visible in every frame are kept.
        """
        clip, _, preprocess = self.clip_judge
        find_tracks = track_points if self.settings.tracker == "lk" else cotracker
        pixels = torch.from_numpy(np.stack(videos)).to(self.device)
        results = []
        with torch.no_grad():
            for video, tracks, visible in zip(pixels, *find_tracks(pixels, self.settings.grid)):
                features = for_fid = clip.image_features(preprocess(video))
                if not self.in_world:                                # neighbours cost much and add little
                    for_fid = self.inception(video[::4].permute(0, 3, 1, 2).float() / 255)
                results.append({"features": features.cpu().numpy(), "fid_features": for_fid.cpu().numpy(),
                                "tracks": tracks[visible.all(1)].numpy()})
        return results

    def reference(self, clip):
        """The reference clip through the same judges, once per clip -> arrays of `measure`."""
        return once(self.path("references", clip.name, clip.digest, self.judges),
                    lambda: self.measure([clip.frames])[0])

    def judge(self, cells, samples):
        """Judges cells of one clip and variant and writes their scores."""
        reference = self.reference(cells[0].clip)
        for cell, arrays, (about, _) in zip(cells, self.measure([s[1]["frames"] for s in samples]), samples):
            features, tracks = arrays["features"], arrays["tracks"]
            moving = int(_displacements(tracks, STILL)[2].sum()) if len(tracks) else 0
            scores = {"text_similarity": text_similarity(features, self.text_features(cell.prompt)),
                      "motion_fidelity": motion_fidelity(tracks, reference["tracks"], still=STILL),
                      "temporal_consistency": temporal_consistency(features),
                      "leakage": appearance_leakage(features, reference["features"])}
            if self.in_world:
                scores.update(self.attributes(cell.prompt, features))
            save_arrays(self.score_path(cell), {
                "variant": cell.variant.name, "clip": cell.clip.name, "prompt": cell.prompt,
                "place": cell.place, "seed": cell.seed, "train_seed": cell.train_seed, "scores": scores,
                "moving_tracks": moving, "tracks": len(tracks), **about}, arrays)

    @functools.cache
    def text_features(self, text):
        """text -> (D,)"""
        clip, tokenizer, _ = self.clip_judge
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
            best = best_text(features, torch.stack([self.text_features(t) for t in texts]))
            right[f"shows_{name}"] = float(texts[best] == world.describe(*own))
        return {**right, "attributes": float(np.mean(list(right.values())))}

    @functools.cache
    def real_features(self, prompt, *which):
        """CLIP features (F,D) of a rendered clip of this prompt in random motion; which: names the draw."""
        scene = world.scene(int(digest("real", *which)[:8], 16), tuple(world.MOTIONS), prompt)
        frames = world.render(scene, self.settings.frames, self.clips[0].frames.shape[1])
        clip, _, preprocess = self.clip_judge
        with torch.no_grad():
            return clip.image_features(preprocess(frames)).cpu().numpy()


# ===========================================================================================================
#   RESULTS: from finished cells to numbers with intervals, and to sentences
# ===========================================================================================================

# A finished cell, and what `Lab.judge` wrote about it.
Sample = collections.namedtuple("Sample", "cell about arrays")


def collect(lab):
    """All results of the finished cells of the plan, as a JSON-able dict, ready for the report."""
    finished = [(cell, kept(lab.score_path(cell))) for cell in lab.cells]
    samples = [Sample(cell, *found) for cell, found in finished if found]
    by_name = {name: [s for s in samples if s.cell.variant.name == name] for name in lab.settings.variants}
    by_name = {name: members for name, members in by_name.items() if members}
    if "full" not in by_name:
        raise UserError(f"{lab.out} has no finished cell of this grid: leave --report out")
    distances = {name: distance_to_real(lab, members) for name, members in by_name.items()}
    comparisons = [compare(name, members, by_name["full"], distances[name], distances["full"])
                   for name, members in by_name.items() if name != "full" and not VARIANTS[name].own_prompt
                   and {s.cell.key for s in members} & {s.cell.key for s in by_name["full"]}]
    family = [c["metrics"][m] for c in comparisons if c["name"] in ABLATIONS for m in PRIMARY]
    # A test of the family that was not made counts as one without a finding.
    for test, adjusted in zip(family, holm([test["p"] for test in family] + [1.0] * (FAMILY - len(family)))):
        test["p_holm"] = adjusted
    preferred, votes = {}, {"tests": {}, "notes": []}
    if lab.settings.votes:
        questions, variant_of, run_id = ballot_questions(lab)
        found, votes["notes"] = read_votes(lab.settings.votes, run_id, questions)
        preferred, votes["tests"] = preference(found, variant_of), preference_tests(found, variant_of)
    return {
        "settings": dataclasses.asdict(lab.settings), "finished": len(samples), "planned": len(lab.cells),
        "judges": {"clip": "the tiny CLIP" if lab.in_world else lab.clip_name,
                   "frechet": "tiny-CLIP" if lab.in_world else "Inception",
                   "tracker": f"{lab.settings.tracker}, {lab.settings.grid} x {lab.settings.grid} points",
                   "real": "rendered clips of the same prompts" if lab.in_world else
                           "the reference clips, whose content is not what the prompts ask for"},
        "rows": [row(name, members, distances[name], preferred.get(name))
                 for name, members in by_name.items()],
        "comparisons": comparisons, "sentences": [sentence(c) for c in comparisons],
        "components": components(by_name, comparisons), "preference": votes,
        "chance": chance(lab, by_name["full"]),
        "cells": [s.about for s in samples]}


def row(name, members, distance, vote):
    """One line of the table: mean and interval of every metric, Frechet distance, votes, tracks, cost."""
    clips, about = [s.cell.clip.name for s in members], [s.about for s in members]
    costs = {key: [a["cost"][key] for a in about] for key in about[0]["cost"]}
    return {"name": name, "expected": VARIANTS[name].expected, "n": len(members), "clips": len(set(clips)),
            "metrics": {m: student_interval(group_means([a["scores"][m] for a in about], clips))
                        for m in METRICS if m in about[0]["scores"]},
            **distance["row"], "preference": vote,
            "moving_tracks": float(np.mean([a["moving_tracks"] for a in about])),
            "moving_share": float(np.mean([a["moving_tracks"] / max(1, a["tracks"]) for a in about])),
            "still": sum(a["moving_tracks"] == 0 for a in about),
            "cost": {key: None if None in v else float(np.mean(v)) for key, v in costs.items()}}


def distance_to_real(lab, members):
    """The Frechet distance of one variant's samples from a real set -> its part of the row, and `of`, the
    distance as a function of clips' names.

    In the tiny world the real set matches the content: for every sample a rendered clip of the same prompt
    with a random motion; a second such set gives the floor, real from real at equal n. Elsewhere the real set
    is the reference clips, and the floor their one half from the other.
    """
    clips = tuple(dict.fromkeys(s.cell.clip for s in members))

    def per_clip(features):
        """features(sample) of all samples, put together for each clip -> name -> (n,d)"""
        return {c.name: np.concatenate([features(s) for s in members if s.cell.clip is c]) for c in clips}

    def together(side, names):
        """The features of some clips (n,d)."""
        return np.concatenate([side[name] for name in names])

    fake, names = per_clip(lambda s: s.arrays["fid_features"]), tuple(c.name for c in clips)
    if lab.in_world:
        real, again = (per_clip(lambda s: lab.real_features(s.cell.prompt, *s.cell.key, s.cell.train_seed, n))
                       for n in (0, 1))
        floor = frechet_distance(together(real, names), together(again, names))
    else:
        real = {c.name: lab.reference(c)["fid_features"] for c in clips}
        halves = [together(real, half) for half in (names[::2], names[1::2]) if half]
        floor = frechet_distance(*halves) if len(halves) == 2 and min(map(len, halves)) > 1 else None
    of = functools.cache(lambda some: frechet_distance(together(fake, some), together(real, some)))
    return {"of": of, "row": {"frechet": jackknife(of, names), "frechet_floor": floor,
                              "kid": kernel_distance(together(fake, names), together(real, names)),
                              "frames": len(together(fake, names))}}


def mean_scores(members, metric):
    """(clip, prompt, seed) -> the metric, mean over trainings."""
    found = {}
    for s in members:
        found.setdefault(s.cell.key, []).append(s.about["scores"][metric])
    return {key: float(np.mean(values)) for key, values in found.items()}


def compare(name, members, full, distance, full_distance):
    """A variant against the full method: the same clip, prompt and seed, clips as independent units."""
    metrics = {}
    for m in [m for m in METRICS if m in members[0].about["scores"]]:
        a, b = mean_scores(members, m), mean_scores(full, m)
        keys = [key for key in a if key in b]
        clips = [clip for clip, *_ in keys]
        mean, low, high, p = paired_difference([a[k] for k in keys], [b[k] for k in keys], clips)
        alpha = 0.05 / FAMILY if name in ABLATIONS and m in PRIMARY else 0.05
        metrics[m] = {"mean": mean, "low": low, "high": high, "p": p,
                      "detectable": detectable_difference(high - mean, len(set(clips)), alpha=alpha)}
    same = len(keys) == len(members) == len(full)                    # else the two distances differ in n
    frechet = jackknife(lambda some: distance["of"](some) - full_distance["of"](some),
                        tuple(dict.fromkeys(clips))) if same else None
    return {"name": name, "pairs": len(keys), "clips": len(set(clips)), "metrics": metrics,
            "frechet": frechet}


def components(by_name, comparisons):
    """Where the spread of the primary differences comes from, and what other such runs would detect."""
    found = []
    for name, m in itertools.product([c["name"] for c in comparisons if c["name"] in ABLATIONS], PRIMARY):
        ours, full = ({(s.cell.train_seed, *s.cell.key): s.about["scores"][m] for s in by_name[n]}
                      for n in (name, "full"))
        clips = {}                                  # name of a clip -> (training, prompt, seed) -> difference
        for key in (key for key in ours if key in full):
            training, clip, *which = key
            clips.setdefault(clip, {})[training, *which] = ours[key] - full[key]
        # A run that is not finished has clips with fewer pairs: those with most of them are compared.
        keys = max(map(sorted, clips.values()), key=len, default=[])
        trainings = len({training for training, *_ in keys})
        cube = np.array([[pairs[k] for k in keys] for pairs in clips.values() if sorted(pairs) == keys])
        if len(cube) > 1 and len(keys) % trainings == 0:
            cube = cube.reshape(len(cube), trainings, -1)
            parts, shape = variance_components(cube), cube.shape
            found.append({"name": name, "metric": m, "shape": shape,
                          "deviations": [None if v is None else math.sqrt(v) for v in parts],
                          "detectable": [[*run, detectable_with(parts, *run, alpha=0.05 / FAMILY)]
                                         for run in (shape, (24, 1, 8), (48, 1, 8), (60, 1, 8))]})
    return found


def chance(lab, full):
    """Motion fidelity of results against reference clips of other motions: what no likeness at all scores."""
    means = []
    for s in [s for s in full if (s.cell.place, s.cell.seed, s.cell.train_seed) == (0, 0, 0)]:
        others = [lab.reference(c)["tracks"] for c in lab.clips if c.movement != s.cell.clip.movement]
        if others:
            means.append(np.mean([motion_fidelity(s.arrays["tracks"], t, still=STILL) for t in others]))
    return student_interval(means) if means else None


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


# ===========================================================================================================
#   BALLOT: User Preference, from a page that people vote on to shares with intervals
# ===========================================================================================================

VOTE_FIELDS = ["run", "participant", "place", "question", "shown", "choice"]
BALLOT_PAGE = mini_mi.HERE / "data" / "ballot.html"   # style, texts and script of the page
FEW = 5                                              # participants below which shares are no result yet


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """Which candidate moves most like the reference and shows the prompt? Frames are (F,h,w,3) uint8.

    id and the keys of candidates are opaque hexadecimal numbers; every question has a candidate of every
    variant of the ballot. caption, what the reference shows, is the prompt of an attention check.
    """
    id: str
    prompt: str
    reference: np.ndarray
    candidates: dict
    caption: str = ""


# A participant's choice: the id of a candidate of that question.
Vote = collections.namedtuple("Vote", "participant question choice")


def ballot_questions(lab, most=20):
    """Questions of the ballot, from finished cells -> (list of Question, candidate id -> variant, run id).

    A candidate's id is a hash of its file: only who holds the cells can tell what it is. What a ballot asks
    is kept in ballot.json, so that votes go on counting when there are more cells; delete it to ask anew.
    """
    s, file, names = lab.settings, lab.out / "ballot.json", lab.settings.ballot_variants
    clips = {c.name: c for c in lab.clips}

    def paths(name, place, names):
        """The candidates' files."""
        return {n: lab.sample_path(Cell(VARIANTS[n], clips[name], place, 0)) for n in names}

    asked = mini_mi.read_json(file) if file.exists() else {}
    if not asked or s.ballot and asked["variants"] != names:
        ready = [(name, place) for name in clips for place in range(s.prompt_count)
                 if all(path.exists() for path in paths(name, place, names).values())]
        if not s.ballot or not ready:
            raise UserError("no prompt has a finished cell of each variant of the ballot, " + ", ".join(names)
                            if s.ballot else f"{file} is missing: votes need the --ballot they were given on")
        chosen = np.linspace(0, len(ready) - 1, min(most, len(ready))).astype(int)
        asked = {"variants": names, "questions": [ready[i] for i in chosen]}
        with mini_mi.atomic_write(file) as temporary:
            Path(temporary).write_text(json.dumps(asked), encoding="utf-8")
    questions, variant_of = [], {}
    for name, place in (question for question in asked["questions"] if question[0] in clips):
        candidates, clip = {}, clips[name]
        for variant, path in paths(name, place, asked["variants"]).items():
            if (found := kept(path)) is None:
                raise UserError(f"the ballot shows {path.name}, which is missing: take the settings of that "
                                f"run, or delete {file} for a new ballot")
            with open(path, "rb") as opened:
                key = hashlib.file_digest(opened, "sha256").hexdigest()[:12]
            candidates[key], variant_of[key] = found[1]["frames"], variant
        questions.append(Question(digest("question", name, place), clip.prompts[place], clip.frames,
                                  candidates, clip.caption))
    return questions, variant_of, digest(sorted(variant_of))


def attention_checks(questions, run_id):
    """Two questions whose answer is beyond doubt -> [(Question, id of the right candidate)].

    One candidate is the reference itself, under its own caption; the others stand still. The references that
    move most are taken; one that never moves would make everybody fail. Ids are hashes of run and content, in
    the form of all other ids: nothing in the page marks a check, and `read_votes` finds it again.
    """
    def opaque(like, n, frames):
        """A hexadecimal id as long as the id `like`."""
        return hashlib.sha256(f"{run_id} {n} ".encode() + frames.tobytes()).hexdigest()[:len(like)]

    clips = {q.reference.tobytes(): q for q in questions}            # a clip once, though it has many prompts
    moves = {c: np.abs(np.diff(q.reference.astype(int), axis=0)).mean() for c, q in clips.items()}
    moving = sorted((c for c in clips if moves[c] > 0), key=moves.get, reverse=True)
    checks = []
    for n, q in enumerate([clips[c] for c in moving + moving][:2]):
        stills = np.linspace(0, len(q.reference) - 1, len(q.candidates) - 1).astype(int)
        shown = [q.reference, *(np.repeat(q.reference[i:i + 1], len(q.reference), axis=0) for i in stills)]
        ids = [opaque(next(iter(q.candidates)), f"{n}.{i}", frames) for i, frames in enumerate(shown)]
        check = Question(opaque(q.id, n, q.reference), q.caption or "the same as in the reference",
                         q.reference, dict(zip(ids, shown)))
        checks.append((check, ids[0]))
    return checks


def film_strip(frames, most=320, lossless=128):
    """A clip (F,h,w,3) uint8 as one picture, its frames side by side: {"frames": F, "src": data URI}.

    most, lossless: the widths in pixels above which a frame is reduced, and is compressed with losses.
    """
    count, height, width = frames.shape[:3]
    strip = Image.fromarray(np.concatenate(list(frames), axis=1))
    side = min(width, most, 16383 // count)                      # WebP pictures are at most 16383 pixels wide
    if side < width:
        strip = strip.resize((side * count, side * height // width), Image.Resampling.LANCZOS)
    return {"frames": count, "src": data_uri(strip, "WEBP", quality=82, lossless=side <= lossless)}


def worked_example():
    """A question of the tiny world, with what is to be said about each answer; no tested motion is in it."""
    prompt, caption = "a yellow star on a teal plain background", "a red circle on a brown striped background"
    answers = {"still": ("rest", prompt, "This clip shows what the text says, but it does not move."),
               "same": ("zigzag", caption, "This clip moves like the reference, but shows no yellow star."),
               "right": ("zigzag", prompt, "Yes: it moves like the reference and shows what the text says."),
               "other": ("zoom_in", prompt, "This clip shows what the text says, but moves in another way.")}
    clips = {key: film_strip(world.render(world.scene(3, [motion], text)))
             for key, (motion, text, _) in answers.items()}
    return {"id": "example", "prompt": prompt, "reference": clips["same"], "candidates": clips,
            "reasons": {key: reason for key, (_, _, reason) in answers.items()}}


def write_ballot(path, questions, run_id, fps):
    """Writes the page on which people vote: one file that needs no server and no network.

    Participants see the questions and two attention checks, in an order of their own, and save votes-ID.csv.
    Texts reach the page as JSON with no character that could end a script, and are put in as text; the policy
    in its head lets nothing load but this style, this script and the pictures inside the page.
    """
    if len({len(q.candidates) for q in questions}) != 1 or len(questions[0].candidates) < 2:
        raise UserError("a ballot needs finished cells of at least two variants of the same prompts")
    shown = [*questions, *(q for q, _ in attention_checks(questions, run_id))]
    # Strips of small clips are lossless: enlarged on the page, they would show every trace of compression.
    # Sorted by their opaque ids: the order in the page says nothing about variants or checks.
    data = json.dumps({"run": run_id, "fps": fps, "fields": VOTE_FIELDS, "questions": [worked_example(), *(
        {"id": q.id, "prompt": q.prompt, "reference": film_strip(q.reference),
         "candidates": {key: film_strip(q.candidates[key]) for key in sorted(q.candidates)}}
        for q in sorted(shown, key=lambda q: q.id))]})
    for character in "<>&":                                      # json.dumps itself escapes all but ASCII
        data = data.replace(character, f"\\u{ord(character):04x}")
    page = BALLOT_PAGE.read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
    for kind in ("style", "script"):                             # the hash of the very text between the tags
        text = re.search(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)[1]
        policy += f"; {kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    with mini_mi.atomic_write(path) as temporary:
        Path(temporary).write_text(page.replace("POLICY", policy, 1).replace("QUESTIONS", data, 1),
                                   encoding="utf-8", newline="\n")


def read_votes(paths, run_id, questions):
    """Votes from files, and folders of files, that participants saved -> (list of Vote, notes).

    Each question of each participant counts once: its last answer, files taken in the order given. Whoever
    did not give the right answer to both attention checks is left out; a file that is not of this run, too.
    notes tell it, a line each. Raises UserError where a file does not exist.
    """
    checks = attention_checks(questions, run_id)
    known = {q.id: q for q in [*questions, *(q for q, _ in checks)]}
    answers, notes, changed = {}, [], 0
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"--votes {path}: there is no such file or folder")
        # A browser saves a second time as "votes-ID (1).csv": the longer name is the later one.
        files = sorted(path.glob("*.csv"), key=lambda f: (len(f.name), f.name)) if path.is_dir() else [path]
        if not files:
            notes.append(f"{path}: no .csv file in it")
        for file in files:
            try:
                found = read_ballot(file, run_id, known)
            except (OSError, ValueError, csv.Error) as e:            # text that is not UTF-8 is a ValueError
                notes.append(f"{file} left out: {mini_mi.one_line(e)}")
                continue
            changed += sum(answers.get(asked, choice) != choice for asked, choice in found.items())
            answers.update(found)
    people = {person for person, _ in answers}
    careful = {p for p in people if all(answers.get((p, q.id)) == right for q, right in checks)}
    if careful != people:
        notes.append(f"{len(people - careful)} of {len(people)} participants left out: not both of the two "
                     "attention checks passed")
    if changed:
        notes.append(f"{changed} answers differ between two files of a participant: the later file counts")
    votes = [Vote(*asked, choice) for asked, choice in answers.items()]
    real = {q.id for q in questions}
    return [v for v in votes if v.participant in careful and v.question in real], notes


def read_ballot(file, run_id, known):
    """A saved file -> (participant, question id) -> choice; ValueError says why it is none of this run.

    known: id -> Question, of all that the page shows.
    """
    found, text = {}, Path(file).read_text(encoding="utf-8-sig")
    # Spreadsheets begin a file with a mark, and some write semicolons.
    for row in csv.DictReader(io.StringIO(text), delimiter=";" if ";" in text else ","):
        if list(row) != VOTE_FIELDS or None in row.values():
            raise ValueError(f"its columns are not {','.join(VOTE_FIELDS)}")
        if row["run"] != run_id:
            raise ValueError("these votes are of another run")
        shown = known[row["question"]].candidates if row["question"] in known else {}
        if not row["participant"] or row["choice"] not in shown or {*row["shown"].split("|")} != {*shown}:
            raise ValueError("it names what this run did not show")
        found[row["participant"], row["question"]] = row["choice"]
    if not found:
        raise ValueError("there is no vote in it")
    return found


def preference(votes, variant_of):
    """The share of all votes per variant -> name -> dict(share, low, high, n, participants, chance, note).

    variant_of: candidate id -> variant; every question shows all variants, so chance is one in their number.
    The 95 % interval spans two: Wilson's, which takes votes for independent, and a bootstrap over
    participants, which does not, but has no width where all agree. note: says it when few people voted.
    """
    names, people = list(dict.fromkeys(variant_of.values())), [v.participant for v in votes]
    participants, found = len(set(people)), {}
    note = "" if participants >= FEW else f"a trial with fewer than {FEW} participants, not a result"
    for name in names if votes else ():
        wins = [int(variant_of[v.choice] == name) for v in votes]
        low, high = zip(wilson_interval(sum(wins), len(wins)), clustered_share(wins, people))
        found[name] = {"share": sum(wins) / len(wins), "low": min(low), "high": max(high), "n": len(wins),
                       "participants": participants, "chance": 1 / len(names), "note": note}
    return found


def preference_tests(votes, variant_of, against=ABLATIONS):
    """Is `full` chosen more often than an ablation? -> name -> (mean, low, high, p); see `paired_difference`.

    mean: the difference of their shares, averaged over participants, whose signs are flipped as a whole.
    """
    picked, people = [variant_of[v.choice] for v in votes], [v.participant for v in votes]
    return {name: paired_difference(*([int(p == one) for p in picked] for one in ("full", name)), people)
            for name in against if votes and name in variant_of.values()}


# ===========================================================================================================
#   REPORT: results.json, results.md, results.svg, report.html
# ===========================================================================================================

REPORT_PAGE = mini_mi.HERE / "data" / "report.html"   # style and frame of the page


def number(value, form=".3f"):
    """0.1234 -> "0.123"; what is missing or not finite is a dash."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def plus_minus(triple, form=".3f"):
    """(mean, low, high) around the mean -> "0.123 ± 0.022"."""
    mean, _, high = triple or (None,) * 3
    return number(mean, form) + ("" if mean is None else f" ± {number(high - mean)}")


def document(results):
    """What results.md and report.html both say: name -> a list of sentences, or a table (heads, rows)."""
    rows, judge = results["rows"], results["judges"]["frechet"]
    shown = [m for m in METRICS if m in rows[0]["metrics"]]
    distance = f"Fréchet distance ({judge} features) ↓"
    main, details, differences = [], [], []
    for r in rows:
        vote, cost = r["preference"], r["cost"]
        # The first three metrics, the distance and the votes are the paper's five.
        main.append([r["name"], *(plus_minus(r["metrics"][m]) for m in shown[:3]), plus_minus(r["frechet"]),
                     f"{vote['share']:.2f} ({vote['low']:.2f} to {vote['high']:.2f})" if vote else "–",
                     *(plus_minus(r["metrics"][m]) for m in shown[3:]), f"{r['n']} ({r['clips']})"])
        details.append([r["name"], str(r["frames"]), number(r["frechet_floor"]), number(1000 * r["kid"]),
                        f"{r['moving_tracks']:.0f} ({100 * r['moving_share']:.0f} %)", str(r["still"]),
                        number(cost["train_seconds"], ".1f"), number(cost["sample_seconds"], ".2f"),
                        number(cost["memory"], ".0f"), number(cost["parameters"], ",.0f")])
    for c in results["comparisons"]:
        tests = [c["metrics"][m] for m in shown]
        differences.append([c["name"], *(
            plus_minus((t["mean"], t["low"], t["high"]), "+.3f")
            + (f" (p {t['p_holm']:.3f}, Holm)" if "p_holm" in t else f" (p {t['p']:.3f})") for t in tests),
            plus_minus(c["frechet"], "+.3f")])
    spread = [[f"{c['name']}, {METRICS[c['metric']][:-2]}", *map(number, c["deviations"]),
               *(number(d[-1]) for d in c["detectable"])] for c in results["components"]]
    runs = [f"detectable with {c} x {t} x {s}" for c, t, s, _ in
            (results["components"][0]["detectable"] if results["components"] else ())]
    answers, others = ([said for c, said in zip(results["comparisons"], results["sentences"])
                        if (c["name"] in ABLATIONS) == wanted] for wanted in (True, False))
    return {"answers": answers, "others": others, "notes": notes(results),
            "expected": [f"{r['name']}: {r['expected']}" for r in rows],
            "main": (["variant", *(METRICS[m] for m in shown[:3]), distance, "User Preference ↑",
                      *(METRICS[m] for m in shown[3:]), "n (clips)"], main),
            "differences": (["against full", *(METRICS[m] for m in shown), distance], differences),
            "spread": (["difference from full", "deviation between clips", "between trainings",
                        "between samples", *runs], spread),
            "details": (["variant", "frames", "Fréchet, real from real", "KID x 1000", "moving tracks",
                         "samples without any", "training s", "sampling s", "training memory, MiB of GPU",
                         "embedding parameters"], details)}


def notes(results):
    """What a reader has to know to read the tables, as plain sentences."""
    judges = results["judges"]
    lines = [
        "Mean ± half of the 95 % interval: Student t on the means per clip (prompts and seeds of one clip "
        "are not independent); for the Fréchet distance a jackknife over clips.",
        "Differences are paired by clip, prompt and seed. Primary tests, fixed beforehand: "
        f"{' and '.join(ABLATIONS)} on Motion Fidelity and Text Similarity, with p after Holm. Everything "
        "else is exploratory.",
        f"Judges: {judges['clip']} for texts and frames; tracker {judges['tracker']}. The Fréchet distance "
        f"compares {judges['frechet']} features with those of {judges['real']}. It is biased upward at this "
        "size: compare with real from real at equal n.",
        "Chance level of Motion Fidelity, against reference clips of other motions: "
        f"{plus_minus(results['chance'])}."]
    if results["components"]:
        lines.append("Spread: standard deviations of the differences from full, each level's own part "
                     "(between trainings only with --training-seeds 2 or more, else part of the clips'). "
                     "Detectable with clips x trainings x samples: the true difference that a primary "
                     "test finds in four of five such runs, at the level of Holm's first step; the first is "
                     "this run.")
    lines += [f"User Preference, full against {name}: {plus_minus(test[:3], '+.3f')} of the votes, "
              f"p = {test[3]:.3f} by sign flips over participants."
              for name, test in results["preference"]["tests"].items()]
    lines += [f"User Preference of {r['name']}: {v['n']} votes of {v['participants']} people, chance "
              f"{v['chance']:.3f}{v['note'] and ': ' + v['note']}." 
              for r in results["rows"] if (v := r["preference"])]
    lines += results["preference"]["notes"]
    if not any(r["preference"] for r in results["rows"]):
        lines.append("User Preference: no votes yet. eval_mi.py --ballot writes the page on which people "
                     "vote, and eval_mi.py --votes FILE... counts them.")
    if results["finished"] < results["planned"]:
        lines.append(f"Unfinished: {results['finished']} of {results['planned']} cells.")
    return lines


def as_markdown(part):
    """A part of the `document` in Markdown."""
    if isinstance(part, list):
        return "\n".join(f"- {text}" for text in part)
    heads, rows = part
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *rows])


def as_html(part):
    """A part of the `document` in HTML; what is in parentheses in a table's cell goes to a smaller line."""
    if isinstance(part, list):
        return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in part)}</ul>"
    heads, *rows = [[html.escape(text) for text in line] for line in (part[0], *part[1])]
    rows = [[re.sub(r" (\(.*)", r"<small>\1</small>", text) for text in line] for line in rows]
    body = "".join(f"<tr><td>{'</td><td>'.join(line)}</td></tr>" for line in rows)
    return (f'<div class="scroll"><table><thead><tr><th>{"</th><th>".join(heads)}</th></tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def markdown(results):
    """results.md: the answers, the picture, the tables, ready for a README."""
    run, parts = results["run"], {name: as_markdown(part) for name, part in document(results).items()}
    return "\n\n".join([
        parts["answers"], "![Differences from the full method, with 95 % intervals](results.svg)",
        *(parts[name] for name in ("main", "others", "differences", "spread", "details", "notes")),
        f"`{run['command']}`, {run['date']}, {run['machine']}, {run['minutes']:.1f} minutes "
        f"for {run['computed']} of {results['planned']} cells"]) + "\n"


def panel(title, marks, left, top, names=True, bars=False, level=None):
    """One metric of some variants in SVG: each mean as a point or a bar, its interval as a line across it.

    marks: variant -> (mean, low, high), or None; left, top: corner of the plot, which has the title above it
    and, if asked for, the names on its left; level: (value, name) of a line to compare with.
    """
    ends = sorted([0.0, *(v for triple in marks.values() for v in triple or () if math.isfinite(v)),
                   *(level or ())[:1]])
    unit, bottom = 180 / max(ends[-1] - ends[0], 1e-9), top + 19 * len(marks)
    x = {v: round(left + 12 + unit * (v - ends[0]), 1) for v in ends}
    out = [f'<text class="title" x="{left}" y="{top - 6}">{html.escape(title)}</text>',
           f'<path d="M{x[0.0]} {top}V{bottom}"/>']
    for y, (name, triple) in zip(range(top + 10, bottom, 19), marks.items()):
        if names:
            out.append(f'<text x="{left - 4}" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>')
        if triple:
            mean, low, high = triple
            kind = "full" if name == "full" else "ablation" if name in ABLATIONS else ""
            mark = f'<circle cx="{x[mean]}" cy="{y}" r="3.5"/>'
            if bars:
                start, end = sorted((x[0.0], x[mean]))
                mark = f'<rect x="{start}" y="{y - 7}" width="{end - start:.1f}" height="14"/>'
                out.append(f'<text x="{left + 200}" y="{y + 4}">{number(mean)}</text>')
            line = f'<path d="M{x[low]} {y}H{x[high]}"/>' if math.isfinite(low) else ""
            out.append(f'<g class="{"bar" if bars else "mark"} {kind}">{mark}{line}</g>')
    # Numbers under the axis: the level; or zero, and for points the outermost ends where they have room.
    ticks = {0.0: "0"} if bars else {v: number(v, "+.2f") for v in (ends[0], ends[-1])} | {0.0: "0"}
    if level:
        ticks = {level[0]: f"{level[1]} {number(level[0])}"}
        out.append(f'<path d="M{x[level[0]]} {top}V{bottom}" stroke-dasharray="3 3"/>')
    out += [f'<text x="{x[v]}" y="{bottom + 14}" text-anchor="middle">{text}</text>'
            for v, text in ticks.items() if level or v == 0 or abs(x[v] - x[0.0]) > 34]
    return "".join(out)


def svg(label, width, height, content):
    """A picture of `panel`s."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{html.escape(label)}">{content}</svg>')


def forest_plot(results):
    """results.svg: every metric's difference from full with its 95 % interval, one panel a metric."""
    comparisons = results["comparisons"]
    panels = {METRICS[m]: {c["name"]: [c["metrics"][m][k] for k in ("mean", "low", "high")]
                           for c in comparisons} for m in METRICS if m in results["rows"][0]["metrics"]}
    panels[f"Fréchet distance ({results['judges']['frechet']}) ↓"] = {
        c["name"]: c["frechet"] for c in comparisons}
    left, width, height = 132, 236, 19 * len(comparisons) + 58       # names only beside the first of a row
    drawn = [panel(title, marks, left + n % 3 * width, n // 3 * height + 22, names=n % 3 == 0)
             for n, (title, marks) in enumerate(panels.items())]
    return svg("Differences from full", left + 3 * width, height * -(-len(panels) // 3), "".join(drawn))


def data_uri(picture, kind="PNG", **options):
    """A PIL picture as the text that an <img> can hold."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def moving_picture(frames, label):
    """A clip (F,h,w,3) uint8 as a film strip that the style sheet moves: all clips of the page keep step."""
    count, height, width, _ = frames.shape
    return (f'<figure><div class="clip {label}" role="img" aria-label="{label}" '
            f'style="--frames: {count}; aspect-ratio: {width} / {height}; '
            f'background-image: url({film_strip(frames, most=192, lossless=0)["src"]})"></div>'
            f"<figcaption>{label}</figcaption></figure>")


def clip_rows(lab, most=12):
    """For the first clips and each prompt the reference and the first seed of every variant, as HTML."""
    parts = []
    for clip in lab.clips[:most]:
        parts.append(f"<h3>{html.escape(clip.name)}</h3>")
        for place in (*range(lab.settings.prompt_count), -1):
            cells = [c for c in lab.cells if (c.clip, c.place, c.seed, c.train_seed) == (clip, place, 0, 0)]
            cells.sort(key=lambda c: lab.settings.variants.index(c.variant.name))
            videos = [(c, kept(lab.sample_path(c))) for c in cells]
            shown = [moving_picture(found[1]["frames"], c.variant.name) for c, found in videos if found]
            if shown:
                text = f"its own caption: {clip.caption}" if place < 0 else f"prompt: {clip.prompts[place]}"
                parts.append(f'<p class="soft">{html.escape(text)}</p><div class="clips">'
                             f'{moving_picture(clip.frames, "reference")}{"".join(shown)}</div>')
    return "".join(parts)


@torch.no_grad()
def look_inside(lab):
    """The first injected layer with the first clip's embeddings -> arrays, kept in a file; None before that.

    without_mqk, with_mqk   attention maps (F,F), query frame by key frame, mean over heads and positions
    mv_raw, mv_debiased     norm of MV over channels (F,H,W)
    """
    clip = lab.clips[0]
    trained = lab.motion_path(clip, "full", 0)
    path = lab.out / "figures" / f"{trained.stem}.npz"
    if (found := kept(path)) or lab.settings.report:                 # a report loads no UNet
        return found and found[1]
    if (motion := kept(trained, read_motion)) is None:
        return None
    latents, seen, arrays = lab.invert(clip)[0], {}, {}
    block = min(motion.to(lab.device).grids)                         # a file has them in no certain order
    grid = motion.grids[block]
    attention, t = lab.models.unet.get_submodule(block).attn1, lab.models.scheduler.T // 2
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    noisy = lab.models.scheduler.add_noise(latents, noise, t)
    hooks = [getattr(attention, part).register_forward_hook(
        lambda module, inputs, output, part=part: seen.update({part: output})) for part in ("to_q", "to_k")]
    for motion.use_mqk in (False, True):
        mini_mi.predict(lab.models, noisy, t, mini_mi.encode_prompt(lab.models, [clip.caption]), motion)
        q, k = (seen[part].float().flatten(0, -3).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
                for part in ("to_q", "to_k"))                                    # (H*W, heads, F, d_k)
        attention_map = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).mean((0, 1))
        arrays["with_mqk" if motion.use_mqk else "without_mqk"] = attention_map.cpu().numpy()
    for hook in hooks:
        hook.remove()
    for name in ("mv_raw", "mv_debiased"):
        motion.train(name == "mv_raw")                               # in training MV is added as it is
        _, m_v = motion.for_attention(block, "attn1", latents.shape[2], grid)     # (H*W, F, C)
        arrays[name] = m_v.norm(dim=-1).T.unflatten(1, grid).cpu().numpy()
    save_arrays(path, {"block": block, "clip": clip.name}, arrays)
    return arrays


def figures_html(arrays):
    """The tutorial figures as HTML: what MQK does to the attention map, what debias does to MV."""
    def picture(values, low, high, name):
        """An array (h,w) as a picture: pale yellow (low) over red to dark violet (high)."""
        grey = np.clip((values - low) / max(high - low, 1e-9), 0, 1) * 255
        image = ImageOps.colorize(Image.fromarray(grey.astype(np.uint8)), "#fdf4dc", "#3c0f4b", mid="#df7346")
        return f'<img class="pixels" alt="{name}" src="{data_uri(image)}">'

    # Both pictures of a pair share one scale; its ends leave out the extremes, which would pale all the rest.
    ends = np.quantile(np.stack([arrays["without_mqk"], arrays["with_mqk"]]), [0.02, 0.98])
    high = np.quantile(np.stack([arrays["mv_raw"], arrays["mv_debiased"]]), 0.95)
    maps = "".join(f"<figure><h3>{title}</h3>{picture(arrays[key], *ends, f'attention map {title}')}</figure>"
                   for key, title in (("without_mqk", "without MQK"), ("with_mqk", "with MQK")))
    norms = "".join(f'<h3>MV {title}</h3><div class="frames">'
                    + "".join(picture(f, 0, high, f"frame {i}") for i, f in enumerate(arrays[key])) + "</div>"
                    for key, title in (("mv_raw", "as trained"), ("mv_debiased", "debiased, as used")))
    return f'<div class="panels">{maps}</div>{norms}'


def page(lab, results, arrays):
    """report.html: one page that needs nothing else; data/report.html is its frame."""
    run, rows, floor = results["run"], results["rows"], results["rows"][0]["frechet_floor"]
    chance_level = results["chance"] and (results["chance"][0], "chance")
    bars = [(METRICS[m], {r["name"]: r["metrics"][m] for r in rows},
             chance_level if m == "motion_fidelity" else None) for m in METRICS if m in rows[0]["metrics"]]
    bars.append((f"Fréchet distance ({results['judges']['frechet']}) ↓",
                 {r["name"]: r["frechet"] for r in rows}, None if floor is None else (floor, "real")))
    drawn = [svg(title, 380, 19 * len(marks) + 42, panel(title, marks, 132, 22, bars=True, level=level))
             for title, marks, level in bars]
    about = (run["command"], run["date"], run["machine"],
             f"{results['finished']} of {results['planned']} cells")
    return string.Template(REPORT_PAGE.read_text(encoding="utf-8")).substitute(
        {name: as_html(part) for name, part in document(results).items()}, forest=forest_plot(results),
        bars="".join(drawn), clips=clip_rows(lab), figures=figures_html(arrays) if arrays else "",
        run=html.escape(" · ".join(about)))


def write_report(lab, run):
    """Writes the four files of the report from the finished cells; prints the table and the sentences."""
    results = {"run": run, **collect(lab)}
    # JSON has no infinity: what is not finite becomes null.
    known = json.loads(json.dumps(results), parse_constant=lambda name: None)
    style = re.search("<style>.*?</style>", REPORT_PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    picture = forest_plot(results).replace(">", f">{style}", 1)
    texts = {"results.json": json.dumps(known, indent=1), "results.md": markdown(results),
             "results.svg": picture, "report.html": page(lab, results, look_inside(lab))}
    for name, text in texts.items():
        with mini_mi.atomic_write(lab.out / name) as temporary:
            Path(temporary).write_text(text, encoding="utf-8")
    heads, rows = document(results)["main"]
    print("\n" + "\n".join("".join(f"{text:27}" for text in line[:5]).rstrip() for line in [heads, *rows]))
    print("\n" + "\n".join(results["sentences"]) + f"\n\n{lab.out / 'report.html'}")


# ===========================================================================================================
#   COMMAND LINE
# ===========================================================================================================

# As mini_mi.py does it, but that two numbers of steps are smaller for the embedded model, to stay within 20
# minutes on two cores. What is no option here goes to `train_motion` as it is.
DEFAULTS = {"tiny": {**mini_mi.MODEL_DEFAULTS["tiny"], "sample_steps": 15, "invert_steps": 25},
            "other": {**mini_mi.MODEL_DEFAULTS["other"], "invert_steps": mini_mi.INVERT_STEPS}}


COUNT = 1, 1e6


@dataclasses.dataclass
class Settings:
    """Everything that a user can set; the command line is made from it."""
    model: str = option("tiny", "the embedded model (tiny), zeroscope, a hub repository or a model folder")
    clip: str = option(None, "CLIP folder or repository (default: MODEL/clip, "
                             "else openai/clip-vit-base-patch32)")
    clips: str = option(None, "folder of clips with clips.json: NAME -> caption, motion, prompts (default: "
                              "rendered for the embedded model, else data/clips)")
    split: str = option("test", "which clips of the embedded world", choices=("test", "validation"))
    out: str = option("out/eval", "folder for the cells and the report; a second run goes on there")
    variants: str = option(",".join(DEFAULT_VARIANTS), f"what to compare with full: {', '.join(VARIANTS)}")
    clip_count: int = option(12, "clips; the embedded world has any number", within=COUNT)
    prompt_count: int = option(2, "target prompts per clip", within=COUNT)
    seed_count: int = option(2, "sampling seeds per prompt", within=COUNT)
    training_seeds: int = option(1, "trainings per clip and trained variant; 2 tell how far trainings differ",
                                 within=COUNT)
    steps: int = option(None, "training steps per clip and trained variant", within=COUNT)
    lr: float = option(None, "learning rate of the training", within=(1e-9, 1e3))
    batch: int = option(None, "noise levels in every training step", within=COUNT)
    sample_steps: int = option(None, "sampling steps", within=COUNT)
    invert_steps: int = option(None, "steps of the inversion that gives the start noise", within=COUNT)
    guidance: float = option(None, "strength of the prompt while sampling", within=(-1e3, 1e3))
    noise_prior: float = option(0.5, "share of the inverted reference in the start noise, 0 to 1",
                                within=(0, 1))
    frames: int = option(None, "frames per clip", within=(2, 1e6))
    size: str = option(None, "WIDTHxHEIGHT in pixels")
    checkpointing: bool = option(False, "recompute activations in training: slower, much less memory")
    sample_batch: int = option(4, "samples that are made at once: 4 suits a CPU, a GPU likes more",
                               within=COUNT)
    tracker: str = option("lk", "lk: built-in Lucas-Kanade; cotracker: CoTracker 3, fetched by torch.hub",
                          choices=("lk", "cotracker"))
    grid: int = option(16, "tracked points per side; the paper's CoTracker takes 55", within=COUNT)
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option(None, "number format of the UNet (default: float16 for large models on CUDA, else "
                              "float32)", choices=("float32", "bfloat16", "float16"))
    quick: bool = option(False, "a small grid, to see it work: 3 clips, 1 prompt, 1 seed")
    report: bool = option(False, "only rebuild the report, from the cells that are finished")
    ballot: bool = option(False, "only write ballot.html, on which people vote, from finished cells")
    ballot_variants: str = option("full,no-mqk,no-mv,base", "what people choose from")
    votes: list = option(None, "count these files, and folders of files, that voters saved, in a new report")
    training: dict = dataclasses.field(default_factory=dict)             # no option: see DEFAULTS


def is_small(model):
    """A model of the embedded world: data/make_tiny.py's UNets are narrow."""
    return mini_mi.model_defaults(model) is mini_mi.MODEL_DEFAULTS["tiny"]


def pick_device(name):
    """The torch.device of `--device`; under torchrun every process of a machine takes a GPU of its own."""
    name = mini_mi.pick_device(name)
    if name == "cuda":                                               # fails if there are not so many
        name = mini_mi.pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return torch.device(name)


def parse(argv=None):
    """Command line -> checked Settings, with the model's defaults for what was not given."""
    parser = mini_mi.Parser("eval_mi.py", description=__doc__, argument_default=argparse.SUPPRESS,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in (f for f in dataclasses.fields(Settings) if f.metadata):
        flag, about, default = "--" + f.name.replace("_", "-"), f.metadata["about"], f.default
        shape = dict(type=f.type, metavar=f.name.upper())
        if f.name in DEFAULTS["tiny"]:
            default = f"{DEFAULTS['tiny'][f.name]} for tiny, else {DEFAULTS['other'][f.name]}"
        if f.type is bool:
            shape, default = dict(action="store_true"), None
        elif f.type is list:
            shape = dict(nargs="+", metavar="FILE")
        elif "choices" in f.metadata:
            shape = dict(type=f.type, choices=f.metadata["choices"])
        parser.add_argument(flag, help=about if default is None else f"{about} (default: {default})", **shape)
    settings = Settings(**vars(parser.parse_args(argv)))
    small = is_small(settings.model)
    for name, value in DEFAULTS["tiny" if small else "other"].items():
        if not hasattr(settings, name) and name != "fps":
            settings.training[name] = value
        elif getattr(settings, name, 0) is None:
            setattr(settings, name, value)
    if settings.dtype is None:
        settings.dtype = "float32" if small or pick_device(settings.device).type == "cpu" else "float16"
    for f in dataclasses.fields(settings):
        least, most = f.metadata.get("within", (None, None))
        if least is not None and not least <= getattr(settings, f.name) <= most:     # nan is not, either
            raise UserError(f"--{f.name.replace('_', '-')} must be within {least:g} and {most:g}")
    size = re.fullmatch(r"(\d+)x(\d+)", settings.size)
    if not size or any(int(side) % 8 or side == "0" for side in size.groups()):
        raise UserError(f"--size {settings.size} is not WIDTHxHEIGHT in multiples of 8, as in 64x64")
    for name, first in (("variants", ["full"]), ("ballot_variants", [])):
        names = list(dict.fromkeys(first + getattr(settings, name).replace(",", " ").split()))
        if unknown := [n for n in names if n not in VARIANTS]:
            raise UserError(f"--{name.replace('_', '-')}: {unknown[0]} is none of {', '.join(VARIANTS)}")
        setattr(settings, name, names)
    if any(VARIANTS[n].own_prompt for n in settings.ballot_variants) or len(settings.ballot_variants) < 2:
        raise UserError("--ballot-variants takes two or more variants that show the target prompts")
    settings.report |= settings.ballot or bool(settings.votes)         # both need no more than finished cells
    if settings.quick:
        settings.clip_count, settings.prompt_count, settings.seed_count = min(3, settings.clip_count), 1, 1
    return settings


def run(settings):
    """Computes this rank's share of the grid; the first rank writes the report when all are done."""
    began, lab = time.perf_counter(), None
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        # Nothing is sent but the word that a rank is done, after hours perhaps.
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    wait = torch.distributed.barrier if ranks > 1 else lambda: None
    # Ranks that share a cache must not download into it at once: the first one goes ahead, then the first of
    # every machine, then the rest. The first one counts before any other can begin.
    for my_turn in (rank == 0, os.environ.get("LOCAL_RANK") == "0", True):
        if my_turn and lab is None:
            lab = Lab(settings)
            missing = sum(not lab.is_finished(c) for c in lab.cells)
            if not settings.report:
                lab.get_ready()
        wait()
    if not settings.report:
        run_experiment(lab, ranks, rank)
        wait()
    if rank == 0:
        machine = (torch.cuda.get_device_name(lab.device) if lab.device.type == "cuda"
                   else f"{os.cpu_count()} CPU cores ({platform.machine()})")
        about = {"command": " ".join(["python eval_mi.py", *map(shlex.quote, sys.argv[1:])]),
                 "date": time.strftime("%Y-%m-%d"), "machine": machine, "ranks": ranks,
                 "computed": 0 if settings.report else missing, "minutes": (time.perf_counter() - began) / 60,
                 "versions": {"python": platform.python_version(), "torch": torch.__version__,
                              "numpy": np.__version__, "scipy": scipy.__version__}}
        if settings.report and (lab.out / "results.json").exists():    # rebuilt: of that run still
            about = mini_mi.read_json(lab.out / "results.json").get("run", about)
        if settings.ballot:
            questions, _, run_id = ballot_questions(lab)
            write_ballot(lab.out / "ballot.html", questions, run_id,
                         DEFAULTS["tiny" if lab.in_world else "other"]["fps"])
            print(f"{lab.out / 'ballot.html'}: {len(questions)} questions and two attention checks; give it "
                  "to people as it is, and count what they save with --votes")
        else:
            write_report(lab, about)
    if ranks > 1:
        torch.distributed.destroy_process_group()


def main(argv=None):
    """Entry point of the command line; returns the exit status."""
    return mini_mi.guarded(lambda: run(parse(argv)))


# ===========================================================================================================
#   APPENDIX, THE JUDGES: CLIP and Inception, compact, with the keys of the published weight files
# ===========================================================================================================

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIPVisionTransformer(nn.Module):
    """Patches and a class token through bidirectional layers: pixels (B,3,s,s) -> the class token (B,D)."""

    def __init__(self, config):
        super().__init__()
        c = mini_mi.read_config(
            "CLIP image tower", config, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, image_size=224, patch_size=32, layer_norm_eps=1e-5,
            only={"hidden_act": tuple(mini_mi.ACTIVATIONS), "num_channels": 3})
        self.image_size, tokens = c.image_size, (c.image_size // c.patch_size) ** 2 + 1
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
        text, width = config.get("text_config", {}), config.get("projection_dim", 512)
        self.eos_token_id = text.get("eos_token_id", 49407)
        self.text_model = mini_mi.CLIPTextModel(text).text_model
        self.vision_model = CLIPVisionTransformer(config.get("vision_config", {}))
        self.text_projection, self.visual_projection = (
            nn.Linear(len(norm.weight), width, bias=False)
            for norm in (self.text_model.final_layer_norm, self.vision_model.post_layernorm))
        self.logit_scale = nn.Parameter(torch.tensor(config.get("logit_scale_init_value", 2.6592)))

    def image_features(self, pixels):
        """pixels (B,3,s,s), normalised by CLIP's mean and std -> (B,D) unit vectors"""
        return nnf.normalize(self.visual_projection(self.vision_model(pixels)), dim=-1)

    def text_features(self, ids):
        """ids (B,L) -> (B,D) unit vectors, read at the end-of-text token"""
        states = self.text_model(ids)
        # Files of 2021 and 2022 say eos_token_id = 2, which is wrong for their vocabulary; for these,
        # transformers takes the largest id, the end-of-text token. Later files name it: its first place.
        end = ids.argmax(1) if self.eos_token_id == 2 else (ids == self.eos_token_id).int().argmax(1)
        return nnf.normalize(self.text_projection(states[torch.arange(len(ids)), end]), dim=-1)


def clip_folder(name):
    """The folder of a CLIP: a path, or what the hub repository `name` (owner/name) holds, fetched once."""
    if Path(name).is_dir():
        return Path(name)
    mini_mi.fetch_tokenizer(str(name), "")
    return mini_mi.fetch_weights(str(name), "", "model")


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
        s, (height, width) = model.vision_model.image_size, x.shape[-2:]
        size = (s, int(s * width / height)) if height <= width else (int(s * height / width), s)
        if size != (height, width):
            x = nnf.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
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
        return nnf.relu(self.bn(self.conv(x)))


class InceptionBlock(nn.Module):
    """Parallel branches, concatenated; the table of a block is what its keys in the weight file say.

    branches   name -> rows (c_in, c_out, kernel, stride, padding) that follow each other; the keys of more
               than one end in _1, _2 ...; a pair of rows forks the branch: _2a and _2b
    pool       "avg" or "max": the 3x3 pool before `branch_pool`; where there is no such branch, the block
               halves the size and the pool is a branch of its own
    """

    def __init__(self, pool, **branches):
        super().__init__()
        self.pool, self.plan = pool, {}
        for name, rows in branches.items():
            self.plan[name] = []
            for n, row in enumerate(rows, start=1):
                base, fork = f"{name}_{n}" if len(rows) > 1 else name, isinstance(row[0], tuple)
                self.plan[name].append([base + letter for letter in ("ab" if fork else ("",))])
                for key, settings in zip(self.plan[name][-1], row if fork else [row]):
                    self.add_module(key, InceptionConv(*settings))

    def forward(self, x):
        # The published network does not count the padding in its averages.
        pooled = (nnf.max_pool2d(x, 3, 2) if "branch_pool" not in self.plan else nnf.max_pool2d(x, 3, 1, 1)
                  if self.pool == "max" else nnf.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        out = []
        for name, chain in self.plan.items():
            y = pooled if name == "branch_pool" else x
            for keys in chain:
                y = torch.cat([getattr(self, key)(y) for key in keys], dim=1)
            out.append(y)
        return torch.cat(out if "branch_pool" in self.plan else [*out, pooled], dim=1)


def _mixed_5(c, pool):
    return InceptionBlock("avg", branch1x1=[(c, 64, 1)], branch5x5=[(c, 48, 1), (48, 64, 5, 1, 2)],
                          branch3x3dbl=[(c, 64, 1), (64, 96, 3, 1, 1), (96, 96, 3, 1, 1)],
                          branch_pool=[(c, pool, 1)])


def _mixed_6(c):
    row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))          # a 7x7 convolution as two of 1x7 and 7x1
    return InceptionBlock(
        "avg", branch1x1=[(768, 192, 1)], branch7x7=[(768, c, 1), (c, c, *row), (c, 192, *column)],
        branch7x7dbl=[(768, c, 1), (c, c, *column), (c, c, *row), (c, c, *column), (c, 192, *row)],
        branch_pool=[(768, 192, 1)])


def _mixed_7(c, pool):
    fork = ((384, 384, (1, 3), 1, (0, 1)), (384, 384, (3, 1), 1, (1, 0)))
    return InceptionBlock(pool, branch1x1=[(c, 320, 1)], branch3x3=[(c, 384, 1), fork],
                          branch3x3dbl=[(c, 448, 1), (448, 384, 3, 1, 1), fork], branch_pool=[(c, 192, 1)])


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
        self.Mixed_6a = InceptionBlock("max", branch3x3=[(288, 384, 3, 2)],
                                       branch3x3dbl=[(288, 64, 1), (64, 96, 3, 1, 1), (96, 96, 3, 2)])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_mixed_6, (128, 160, 160, 192))
        self.Mixed_7a = InceptionBlock(
            "max", branch3x3=[(768, 192, 1), (192, 320, 3, 2)],
            branch7x7x3=[(768, 192, 1), (192, 192, (1, 7), 1, (0, 3)), (192, 192, (7, 1), 1, (3, 0)),
                         (192, 192, 3, 2)])
        self.Mixed_7b, self.Mixed_7c = _mixed_7(1280, "avg"), _mixed_7(2048, "max")
        self.fc = nn.Linear(2048, 1008)                                 # in the file, not in the features

    @classmethod
    def pretrained(cls, device="cpu"):
        """The published weights, fetched once and checked against the SHA-256 in their name."""
        try:
            tensors = torch.hub.load_state_dict_from_url(cls.URL, map_location="cpu", check_hash=True,
                                                         weights_only=True)
        except (OSError, RuntimeError) as e:                       # no network; or another hash
            raise UserError(f"cannot fetch {cls.URL} ({e}): check the network") from None
        model = cls()
        model.load_state_dict(tensors)
        return model.to(device).eval().requires_grad_(False)

    def forward(self, x):
        # Part of the definition, no antialiasing included: another resize, another FID (arXiv 2104.11222).
        x = 2 * nnf.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        for name, module in self.named_children():
            if name != "fc":
                x = module(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = nnf.max_pool2d(x, 3, 2)
        return x.mean(dim=(2, 3))


if __name__ == "__main__":
    sys.exit(main())
