"""Which part of Motion Inversion does what? The two ablations that the paper does not measure.

The method (mini_mi.py) learns the motion of one clip as two embeddings in temporal attention: MQK shapes the
attention map between frames, MV adds a debiased value at every position. The paper has no numbers without one
of them. Here each part is left out of the training (no-mqk, no-mv) or dropped after it (drop-mqk, drop-mv).
Both are compared with the full method on the same clips, prompts and start noise, between two bounds: no
embeddings at all below, the reference through the autoencoder above.

    python eval_mi.py                  the default grid on the embedded model, 32 times as long as mini_mi.py
    python eval_mi.py --quick          a small grid: 3 clips, 1 prompt, 1 seed
    python eval_mi.py --report         the report again: from finished cells, else from results.json alone
    python eval_mi.py --ballot         ballot.html, a page on which people vote
    python eval_mi.py --votes FILES    counts their votes; needs results.json and ballot.json, but no cells
    torchrun --nproc_per_node=8 eval_mi.py --model zeroscope --clips my_clips --frames 24 --size 576x320

A run can be killed at any time and goes on where it stopped. Beside the report it leaves, in --out:

    motions/NAME-TRAINING-r0-DIGEST.safetensors            embeddings, also for mini_mi.py --motion .. --video
    cells/NAME/VARIANT-p0-s1-DIGEST.npz                  a sampled clip: prompt 0 (or "own"), sampling seed 1
    scores/NAME/VARIANT-p0-s1-DIGEST.npz                         what the judges said about it

A file that exists is not made again. DIGEST stands for everything else that determines it, so whatever is
changed (settings, clip, weights, version of this code), other files are made, and the old ones stay.

Letters: B batch, F frames, h w pixels, s side of CLIP's picture, H W latent grid, C channels, L tokens,
D feature width, n m counts of samples or tracks, K = F-1 steps of a track.

Checked in tests/ against transformers' CLIP, pytorch-fid's Inception, hand-worked cases, simulated coverage.
"""

import base64
import collections
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
from PIL import Image
from torch import nn
from tqdm import tqdm

import mini_mi
from data import world
from mini_mi import UserError, option


# ======================== THE QUESTION: what is lost without MQK, what without MV? =========================

# In what a training differs from the full method's. Variants that train alike share one training.
TRAININGS = {"full": {}, "no-mqk": {"use_mqk": False}, "no-mv": {"use_mv": False}, "mqk-2d": {"mqk_dims": 2},
             "mv-1d": {"mv_dims": 1}, "debias-in-training": {"debias_in_training": True},
             "paper": {"steps": 350, "lr": 0.02, "lr_schedule": "constant", "t_min": 0.0}}


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
    against: str = "full"           # the row that it is compared with


VARIANTS = {v.name: v for v in (
    Variant("full", "the method: 1D MQK, 2D MV, debias by differences"),
    # The two ablations that the paper has no numbers for: the part is missing from the start.
    Variant("no-mqk", "the order of the motion suffers: only MV is left to carry it", "no-mqk"),
    Variant("no-mv", "the global course stays, local motion is lost; the text does not suffer", "no-mv"),
    # The same parts, taken away after training together: how much does the other one rely on its partner?
    Variant("drop-mqk", "MV, trained beside MQK, does worse alone than in no-mqk", use={"use_mqk": False}),
    Variant("drop-mv", "the authors' way for cameras: text rises, fidelity falls", use={"use_mv": False}),
    Variant("debias-none", "appearance leaks, text similarity falls", use={"debias": "none"}),
    Variant("debias-mean", "removes static appearance as well as differences do", use={"debias": "mean"}),
    Variant("mqk-2d", "a spatial MQK can hold the reference's shape: leakage rises", "mqk-2d"),
    Variant("mv-1d", "MV without space cannot hold local motion: fidelity falls", "mv-1d"),
    Variant("debias-in-training", "MV trained as it is used fits better", "debias-in-training"),
    Variant("paper-settings", "on a model like the paper's as good", "paper"),
    Variant("no-inversion", "the embeddings alone must carry the motion: fidelity falls", prior=False),
    Variant("no-mqk-plain", "all motion must come from MV", "no-mqk", prior=False, against="no-inversion"),
    Variant("no-mv-plain", "all motion must come from MQK", "no-mv", prior=False, against="no-inversion"),
    # The bounds: what is there without the method, and how far any method could get.
    Variant("base", "no embeddings, the same start noise: what the inverted noise alone achieves", None),
    Variant("base-no-inversion", "no embeddings, plain noise: the model unasked", None, prior=False),
    Variant("reconstruct", "the method without a conflict of appearance", own_prompt=True),
    Variant("vae", "the reference through the autoencoder: the bound", None, own_prompt=True, sampled=False),
)}
ABLATIONS = ("no-mqk", "no-mv")
DEFAULT_VARIANTS = ("full", *ABLATIONS, "debias-none", "base", "base-no-inversion", "reconstruct", "vae")
BALLOT_VARIANTS = ("full", *ABLATIONS, "base")
# The paper's five are the first three, the Frechet distance and User Preference.
METRICS = {"text_similarity": "Text Similarity ↑", "motion_fidelity": "Motion Fidelity ↑",
           "temporal_consistency": "Temporal Consistency ↑", "leakage": "Appearance leakage ↓",
           "attributes": "All four attributes shown ↑", "shape_frames": "Shape in frames ↑"}
PRIMARY = ("motion_fidelity", "text_similarity")    # with ABLATIONS four tests, fixed before any result
FAMILY = len(PRIMARY) * len(ABLATIONS)
STILL = 0.5                                         # pixels per frame below which a track counts as resting


# ==================================== METRICS: pure functions of arrays ====================================

def _cosines(a, b):
    """a (n,D), b (m,D), of any length -> (n,m) float64"""
    a, b = (nnf.normalize(torch.as_tensor(v).double(), dim=-1) for v in (a, b))
    return a @ b.mT


def text_similarity(frame_features, text_feature):
    """mean_f cos(E_I(frame_f), E_T(prompt)): does the clip show what the prompt says?
    frame_features (F,D), text_feature (D,), any length -> float in [-1,1]. Blind to motion and to the order
    of frames; values of different CLIPs do not compare. Source: CLIPScore (arXiv 2104.08718) without its
    factor 2.5 and its clipping at 0.
    """
    return float(_cosines(frame_features, text_feature[None]).mean())


def temporal_consistency(frame_features):
    """mean_f cos(E_I(frame_f), E_I(frame_f+1)): does the content stay the same? (F,D) -> float in [-1,1].
    A frozen clip scores 1, so it means something only beside motion fidelity.
    Source: Gen-1 (arXiv 2302.03011), "frame consistency"; LOVEU-TGVE takes all pairs of frames instead.
    """
    if len(frame_features) < 2:
        raise ValueError("temporal consistency compares neighbouring frames: it needs at least 2")
    return float(_cosines(frame_features, frame_features).diagonal(1).mean())


def appearance_leakage(frame_features, reference_features):
    """mean_{f,g} cos(E_I(result_f), E_I(reference_g)): how much does the result look like the reference?
    frame_features (F,D), reference_features (G,D) -> float in [-1,1]. High is bad where the prompt asks for
    another appearance; this is what debias is for. All clips of one world are alike, so it means something
    only beside `base`. Ours: the paper shows leakage in pictures.
    """
    return float(_cosines(frame_features, reference_features).mean())


def best_text(frame_features, candidates):
    """Which of the candidate texts fits the clip best? The index of the largest mean cosine over frames.
    frame_features (F,D), candidates (k,D) -> int. Zero-shot classification as in CLIP (arXiv 2103.00020).
    """
    return int(_cosines(frame_features, candidates).mean(0).argmax())


def _samples(x, y):
    """Two sets of features (n,d) and (m,d), checked, in float64."""
    x, y = (np.asarray(torch.as_tensor(v).cpu(), dtype=np.float64) for v in (x, y))
    known = np.isfinite(x).all() and np.isfinite(y).all()
    if not known or not x.ndim == y.ndim == 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"two sets of 2 or more finite features of one width, not {x.shape} and {y.shape}")
    return x, y


def frechet_distance(x, y):
    """FID: |mu1-mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), for Gaussians fitted to two sets of features.
    x (n,d), y (m,d) -> float. Covariances with n-1, all in float64.
    With centred X1, X2 (divided by sqrt(n-1)) the last trace is the sum of the singular values of X1 X2^T:
    exact also for n < d, where the usual matrix square root returns noise. With X = QR, Q drops out.
    Biased upward for small n: compare at equal n only, beside the distance of real from real. Blind to
    motion, and to which prompt a frame belongs to. Source: Heusel et al., arXiv 1706.08500.
    """
    x, y = _samples(x, y)
    r1, r2 = (np.linalg.qr((v - v.mean(0)) / np.sqrt(len(v) - 1), mode="r") for v in (x, y))
    cross = scipy.linalg.svdvals(r1 @ r2.T).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (r1 ** 2).sum() + (r2 ** 2).sum() - 2 * cross)


def kernel_distance(x, y):
    """KID: the squared maximum mean discrepancy for the kernel k(a,b) = (a.b/d + 1)^3, unbiased.
    x (n,d), y (m,d) -> float, of expectation 0 for equal distributions at every n, so it can be negative.
    Source: Binkowski et al., arXiv 1801.01401.
    """
    x, y = _samples(x, y)
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    # Unbiased: within a set only pairs of different samples count.
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return float(within - 2 * xy.mean())


# ----------------------------------------------------------------------------------------------------- motion

def track_points(video, grid, radius=4, iterations=4):
    """Follows a grid of points through a clip: pyramidal Lucas-Kanade, frame to frame.
    video (F,h,w,3) uint8; n = grid^2 points -> tracks (n,F,2) as x,y in pixels, visible (n,F) bool.
    At every level of an image pyramid, coarse to fine, the displacement d of a window around p minimises
        sum_window |J(p + d + o) - I(p + o)|^2   by Gauss-Newton:   d += G^-1 sum_window grad I (I - J(d)).
    A point stays visible while it is inside the picture and leads back to itself when tracked backwards. It
    is blind beyond its window: dragged along on flat ground near a moving thing, lost at a fast turn.
    Source: Lucas and Kanade 1981; Bouguet 2000 (pyramids); Kalal et al. 2010 (forward-backward check).
    """
    frames = torch.as_tensor(video).permute(0, 3, 1, 2).float() / 255                      # (F,3,h,w)
    size = torch.tensor([frames.shape[3], frames.shape[2]], device=frames.device)          # w, h, as x, y
    axis = (torch.arange(grid, device=frames.device) + 0.5) / grid
    start = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1) * size - 0.5
    tracks, visible = [start], [torch.ones_like(start[:, 0], dtype=torch.bool)]           # (n,2), (n)
    for before, after in itertools.pairwise(_pyramid(frame[None]) for frame in frames):
        there = _lucas_kanade(before, after, tracks[-1], radius, iterations)
        back = _lucas_kanade(after, before, there, radius, iterations)
        inside = ((there >= -0.5) & (there <= size - 0.5)).all(-1)
        visible.append(visible[-1] & inside & ((back - tracks[-1]).norm(dim=-1) < 1))
        tracks.append(there)
    return torch.stack(tracks, 1).cpu(), torch.stack(visible, 1).cpu()


def _pyramid(frame):
    """(1,3,h,w) -> a list, fine to coarse, of (1,9,h/2^l,w/2^l): the picture, its x and its y derivative."""
    levels = []
    while not levels or min(frame.shape[-2:]) >= 16:
        padded = nnf.pad(frame, (1, 1, 1, 1), mode="replicate")
        along_x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
        along_y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
        levels.append(torch.cat([frame, along_x, along_y], dim=1))
        frame = nnf.avg_pool2d(frame, 2)
    return levels


def _values_at(picture, points):
    """picture (1,c,h,w) at points (n,W,2), bilinear -> (n,W,c); outside: the nearest border pixel."""
    height, width = picture.shape[-2:]
    scaled = (2 * points + 1) / torch.tensor([width, height], device=points.device) - 1    # to [-1,1]
    found = nnf.grid_sample(picture, scaled[None], padding_mode="border", align_corners=False)
    return found[0].permute(1, 2, 0)


def _lucas_kanade(first, second, points, radius, iterations):
    """points (n,2) on the first picture -> (n,2) on the second; both as `_pyramid` gives them."""
    axis = torch.arange(-radius, radius + 1, device=points.device, dtype=points.dtype)
    window = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)      # (W,2)
    weight = torch.exp(-(window ** 2).sum(-1) / radius ** 2)             # the centre counts most
    # A little stiffness: where the window is flat, the point keeps the answer of the coarser level.
    stiffness = 1e-3 * weight.sum() * torch.eye(2, device=points.device)
    d = torch.zeros_like(points)
    for level in reversed(range(len(first))):
        p = ((points + 0.5) / 2 ** level - 0.5)[:, None] + window        # pixel centres, not corners, scale
        value, along_x, along_y = _values_at(first[level], p).chunk(3, dim=-1)           # each (n,W,3)
        gradient = torch.stack([along_x, along_y], -1).flatten(1, 2)                       # (n,W*3,2)
        weighted = gradient * weight.repeat_interleave(3)[:, None]
        # G^-1 and the sum over the window as one matrix, (n,2,W*3).
        solve = torch.linalg.inv(weighted.mT @ gradient + stiffness) @ weighted.mT
        for _ in range(iterations):
            error = value - _values_at(second[level][:, :3], p + d[:, None])
            d = d + (solve @ error.flatten(1)[..., None]).squeeze(-1).clamp(-radius, radius)
        d = d * 2 if level else d
    return points + d


def _steps(tracks, still):
    """tracks (n,F,2) -> of those that move: unit steps (m,K,2), and which of them rest (m,K); float64."""
    tracks = torch.as_tensor(tracks).double()
    if tracks.ndim != 3 or tracks.shape[1] < 2 or not tracks.isfinite().all():
        raise ValueError(f"tracks must be finite and (n,F,2) with F > 1, not {tuple(tracks.shape)}")
    v = tracks.diff(dim=1)
    v = v[v.norm(dim=-1).mean(1) >= still]
    length = v.norm(dim=-1, keepdim=True)
    rests = length < still
    return v / length.clamp(min=1e-12) * ~rests, rests[..., 0].double()


def motion_fidelity(tracks_a, tracks_b, mode="paper", still=0.5):
    """Do two clips move alike, wherever in the picture? T and T~ are their moving tracks:

        MF = 1/2 [ 1/|T~| sum_{a in T~} max_{b in T} corr(a,b) + 1/|T| sum_{b in T} max_{a in T~} corr(a,b) ]
        corr(a,b) = 1/K sum_k cos(v_k(a), v_k(b)),      v_k the steps from frame to frame

    tracks_a (n,F,2), tracks_b (m,F,2), in pixels, visible throughout; still: pixels per frame -> [-1,1].
    A track that moves less than `still` on average is left out: still backgrounds would match each other. A
    shorter step has no direction: still in both clips it counts 1, still in one 0. No moving track in either
    clip: 1, in one: 0. Blind to speed and to place; chance is far above 0, since the best track counts.
    mode "dmt" reproduces the code published with the formula: one direction (a against the reference b), all
    tracks, an identity subtracted from the matrix, NaN as soon as a track rests for one step; n = m.
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
    (u, rest_u), (w, rest_w) = _steps(tracks_a, still), _steps(tracks_b, still)
    if u.shape[1] != w.shape[1]:
        raise ValueError(f"both clips need as many frames, not {u.shape[1] + 1} and {w.shape[1] + 1}")
    if not len(u) or not len(w):
        return float(len(u) == len(w))
    corr = (torch.einsum("nkc,mkc->nm", u, w) + rest_u @ rest_w.T) / u.shape[1]
    # Rounded, so that errors of 1e-16 cannot make identical clips score anything but exactly 1.
    return round(float(corr.max(1).values.mean() + corr.max(0).values.mean()) / 2, 12)


@functools.cache
def cotracker_model():
    """CoTracker 3 (arXiv 2410.11831), fetched through torch.hub; non-commercial licence."""
    with mini_mi.built_from("CoTracker", "cannot be fetched", "check the network, or take --tracker lk"):
        return torch.hub.load("facebookresearch/co-tracker", "cotracker3_offline", trust_repo=True)


def cotracker(video, grid):
    """`track_points` by CoTracker, which takes (1,F,3,h,w) in 0..255 and gives (1,F,n,2) and (1,F,n)."""
    with torch.no_grad():
        found = cotracker_model().to(video.device)(video.permute(0, 3, 1, 2)[None].float(), grid_size=grid)
    return tuple(part[0].transpose(0, 1).cpu() for part in found)


# ============ STATISTICS: clips are the independent units; prompts and seeds of one clip are not ===========

def student_interval(values, confidence=0.95):
    """Mean and Student t interval of independent values (n,) -> (mean, low, high); n = 1: infinitely wide."""
    n, mean, half = len(values), np.mean(values, dtype=np.float64), math.inf
    if n > 1:
        half = scipy.stats.t.ppf((1 + confidence) / 2, n - 1) * scipy.stats.sem(values)
    return float(mean), float(mean - half), float(mean + half)


def wilson_interval(successes, n, confidence=0.95):
    """Interval for a share, right also near 0 and 1 and at small n -> (low, high). Source: Wilson 1927."""
    return tuple(map(float, scipy.stats.binomtest(successes, n).proportion_ci(confidence, "wilson")))


def group_means(values, groups):
    """Means per group, in the order of first appearance -> (k,) float64."""
    values, groups = np.asarray(values, dtype=np.float64), np.asarray(groups).tolist()
    return np.array([values[[g == name for g in groups]].mean() for name in dict.fromkeys(groups)])


Difference = collections.namedtuple("Difference", "mean low high p")


def paired_difference(a, b, groups=None, seed=0):
    """Is a larger than b, in pairs? a (n,), b (n,), groups (n,) labels -> Difference of a - b.
    Mean and 95 % Student t interval of the means per group (None: every pair is a group). If a and b were one
    method, a group's difference could as well have the other sign: p is the share of sign patterns whose mean
    is at least as far from 0; of all 2^k up to k = 13 groups, else of 10 000 drawn and the observed one.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    groups = range(len(a)) if groups is None else groups
    if not len(a) or not a.shape == b.shape == (len(groups),) or not np.isfinite(a - b).all():
        raise ValueError("paired samples must be finite, at least one pair, and have a label for each")
    means = group_means(a - b, groups)
    # Scaled and rounded: patterns that tie with the observed one must count, whatever the order of their sums
    # rounds to. scipy takes all patterns where `n_resamples` reaches 2^k.
    scaled = means / (np.abs(means).max() or 1)
    flips = scipy.stats.permutation_test(
        (scaled,), lambda x, axis: np.abs(x.mean(axis)).round(12), permutation_type="samples",
        alternative="greater", vectorized=True, n_resamples=10_000,
        rng=np.random.default_rng(seed)) if len(means) > 1 else None
    return Difference(*student_interval(means), float(flips.pvalue) if flips else 1.0)


def holm(p_values):
    """Holm's adjusted p-values for a family of tests, in the given order. Source: Holm 1979."""
    order, n = np.argsort(p_values), len(p_values)
    adjusted = np.minimum(1, np.asarray(p_values)[order] * np.arange(n, 0, -1))
    # A larger p never gets a smaller adjusted one.
    return np.maximum.accumulate(adjusted)[np.argsort(order)].tolist()


def detectable_difference(half_width, n, power=0.8, alpha=0.05):
    """The smallest true difference that a test at `alpha` on n groups would have found with the given power.
    half_width: of the 95 % t interval that was seen. (t_(1 - alpha/2) + t_power) standard errors.
    """
    t = scipy.stats.t(n - 1)
    return float(half_width * (t.ppf(1 - alpha / 2) + t.ppf(power)) / t.ppf(0.975)) if n > 1 else math.inf


def jackknife(statistic, groups):
    """Interval of a statistic that is no mean, by leaving out one group at a time -> (value, low, high).
    statistic: of a list of k groups -> float; half width = t_(k-1) sqrt((k-1)/k sum_i (theta_-i - mean)^2),
    infinite for k < 3. The bootstrap would draw duplicates, which shrink covariances and bias FID.
    Source: Efron and Tibshirani 1993, chapter 11.
    """
    k, value, half = len(groups), statistic(groups), math.inf
    if k > 2:
        left = [statistic(groups[:i] + groups[i + 1:]) for i in range(k)]
        half = scipy.stats.t.ppf(0.975, k - 1) * math.sqrt((k - 1) * np.var(left))
    return value, value - half, value + half


def share_interval(wins, clusters, draws=10_000, seed=0):
    """95 % interval of a share -> (low, high). wins (n,) 0 or 1, clusters (n,) labels: votes of one person
    or samples of one clip are not independent. It spans two: Wilson's, which takes all for independent, and a
    percentile bootstrap over whole clusters, which does not, but has no width where all agree.
    """
    sizes = np.array(list(collections.Counter(clusters).values()))
    won = group_means(wins, clusters) * sizes
    low, high = wilson_interval(round(won.sum()), len(wins))
    if len(sizes) > 1:                                               # else there is nothing to draw from
        drawn = scipy.stats.bootstrap((won, sizes), lambda w, n, axis: w.sum(axis) / n.sum(axis), paired=True,
                                      vectorized=True, n_resamples=draws, method="percentile",
                                      rng=np.random.default_rng(seed)).confidence_interval
        low, high = min(low, float(drawn.low)), max(high, float(drawn.high))
    return low, high


# ========= THE EXPERIMENT: clips, trainings, variants, prompts and seeds -> samples and their scores ========

# Part of every digest. Raise it with any change of code after which a file would hold something else.
CODE_VERSION = 3
JUDGE_VERSION = 1                                   # the same for what only scores depend on
ENDS = 1 << 20                                      # bytes read at either end of a file of weights
CLIP_SUFFIXES = ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .wmv .flv .ogv .gif .webp .apng".split()
WORLD_ATTRIBUTES = {"shape": world.SHAPES, "colour": world.COLOURS, "pattern": world.PATTERNS,
                    "background": world.BACKGROUNDS}


@dataclasses.dataclass(eq=False)
class Clip:
    """A reference clip: frames (F,h,w,3) uint8, what it shows, how it moves, and what to turn it into."""
    name: str
    frames: np.ndarray
    caption: str
    movement: str                   # clips of one movement are alike in what is asked of the method
    prompts: tuple

    def __post_init__(self):
        self.stem = re.sub(r"[^\w.-]+", "_", self.name)              # for files: a name may be a path
        # All that training and judging take from a clip.
        self.digest = digest(hashlib.sha256(self.frames.tobytes()).hexdigest(), self.caption)


@dataclasses.dataclass(eq=False)
class Cell:
    """One sample of one variant: the unit of the statistics and of the files."""
    variant: Variant
    clip: Clip
    prompt_index: int               # among the clip's prompts; -1: its own caption
    seed: int                       # of sampling
    train_seed: int = 0

    def __post_init__(self):
        own, again = self.prompt_index < 0, f"-r{self.train_seed}" if self.train_seed else ""
        self.prompt = self.clip.caption if own else self.clip.prompts[self.prompt_index]
        self.key = self.clip.name, self.prompt_index, self.seed      # what the variants of a sample share
        self.name = f"{self.variant.name}-{'own' if own else f'p{self.prompt_index}'}-s{self.seed}{again}"


class Lab:
    """All that a run works with, and where its files lie. The digest in a name stands for everything else
    that determines the content. Models load when they are first needed: a report takes no UNet.
    """

    def __init__(self, s):
        model = mini_mi.model_folder(s.model)
        own = model / "clip"
        name = s.clip_model or (own if own.is_dir() else "openai/clip-vit-base-patch32")
        judge = Path(name) if Path(name).is_dir() else mini_mi.fetch(name, "")
        # The model of the tiny world brings its own judge; the Inception network has never seen that world.
        in_world = s.world and judge.resolve() == own.resolve()
        self.settings, self.out, self.clips = s, Path(s.out), read_clips(s, in_world)
        self.cells = [cell for batch in plan(s, self.clips) for cell in batch]
        told = {name: getattr(s, name) for name in "steps lr lr_schedule batch loss t_min".split()}
        self.trainings = {name: {**told, **other} for name, other in TRAININGS.items()}     # for train_motion
        self.pipeline, self.judges = Pipeline(self, model), Judges(s, str(name), judge, in_world)
        weights = fingerprint(*(model / part for part in "unet vae text_encoder tokenizer scheduler".split()))
        self.made_with = [CODE_VERSION, weights, s.frames, s.size, s.dtype, torch.device(s.device).type]
        self.judged_by = [JUDGE_VERSION, fingerprint(judge), in_world, s.tracker, s.grid, STILL]

    def path(self, folder, name, *what, suffix=".npz"):
        """what: everything that determines the content, but for the name."""
        return self.out / folder / f"{name}-{digest(*what)}{suffix}"

    def motion_path(self, clip, training, train_seed):
        return self.path("motions", f"{clip.stem}-{training}-r{train_seed}", self.made_with, clip.digest,
                         train_seed, self.trainings[training], suffix=".safetensors")

    def sample_path(self, cell):
        s, v, clip = self.settings, cell.variant, cell.clip
        inverted = self.path("noise", clip.stem, self.made_with, clip.digest, s.invert_steps)
        noise = [inverted.name, s.noise_prior] if v.prior else None        # a name alone: it stays in memory
        motion = v.training and [self.motion_path(clip, v.training, cell.train_seed).name, v.use]
        how = [s.sample_steps, s.guidance, noise, motion] if v.sampled else None
        return self.path("cells", f"{clip.stem}/{cell.name}", self.made_with, clip.digest, cell.key,
                         cell.prompt, how)

    def score_path(self, cell):
        return self.path("scores", f"{cell.clip.stem}/{cell.name}", self.sample_path(cell).name,
                         self.judged_by, cell.clip.digest)

    def is_finished(self, cell):
        return self.sample_path(cell).exists() and once(self.score_path(cell)) is not None


def run_experiment(s):
    """Makes and judges, with all ranks, the cells that are missing -> (lab, how many they were, minutes)."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    began, wait = time.perf_counter(), lambda: None
    if ranks > 1:
        # Nothing is sent but the word that a rank is done, after hours perhaps.
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        wait = torch.distributed.barrier
    # The first rank goes ahead: it downloads what is not there, and counts before any other can begin.
    for my_turn in (rank == 0, rank > 0):
        if my_turn:
            lab = Lab(s)
            missing = sum(not lab.is_finished(cell) for cell in lab.cells)
            # What cannot work shows now and not after hours: schedules too short, judges not there.
            lab.pipeline.models.scheduler.timesteps(s.sample_steps, s.t_min)
            lab.pipeline.models.scheduler.timesteps(s.invert_steps)
            lab.judges.reference(lab.clips[0])
        wait()
    todo = [batch for batch in plan(s, lab.clips[rank::ranks]) if not all(map(lab.is_finished, batch))]
    for batch in tqdm(todo, unit="batch", disable=rank > 0, smoothing=0):
        # The whole batch again if one of it is missing: the same company gives the same last digits.
        samples = [once(lab.sample_path(cell)) for cell in batch]
        if not all(samples):
            samples = lab.pipeline.sample(batch)
        for cell, sample in zip(batch, samples):
            once(lab.sample_path(cell), lambda: sample)
            once(lab.score_path(cell), lambda: lab.judges.judge(cell, sample))
    wait()
    if ranks > 1:
        torch.distributed.destroy_process_group()
    return lab, missing, (time.perf_counter() - began) / 60


def plan(s, clips):
    """Every cell, clip by clip, finished or not -> list of batches: cells of one variant, sampled at once."""
    batches = []
    for clip, training in itertools.product(clips, (*TRAININGS, None)):
        variants = [VARIANTS[name] for name in s.variants if VARIANTS[name].training == training]
        train_seeds = range(s.training_seeds if training else 1)
        for train_seed, variant in itertools.product(train_seeds, variants):
            cells = [Cell(variant, clip, prompt_index, seed, train_seed)
                     for prompt_index in ([-1] if variant.own_prompt else range(s.prompt_count))
                     for seed in range(s.seed_count if variant.sampled else 1)]
            batches += [cells[i:i + s.sample_batch] for i in range(0, len(cells), s.sample_batch)]
    return batches


# -------------------------------------------------------------------------------------------- reference clips

def read_clips(s, in_world):
    """The reference clips: of `--clips`, or, for the embedded model, as many as asked for of the world."""
    width, height = mini_mi.sizes(s)[0]
    rendered, file = in_world and not s.clips, Path(s.clips or mini_mi.HERE / "data" / "clips") / "clips.json"
    if rendered and width != height:
        raise UserError(f"--size {s.size}: the embedded world is square; take --size {width}x{width}")
    drawn = (world.reference(s.split, i) for i in range(s.clip_count))
    entries = {entry["name"]: entry for entry in drawn} if rendered else mini_mi.read_json(file)
    if len(entries) < s.clip_count:
        raise UserError(f"{file} names {len(entries)} clips; lower --clip-count {s.clip_count}")
    clips = []
    for name, entry in itertools.islice(entries.items(), s.clip_count):
        match entry:
            case {"caption": str(caption), "prompts": [*prompts]} if len(prompts) >= s.prompt_count:
                texts = caption, *map(str, prompts)
            case _:
                raise UserError(f"{file}: {name} needs a caption and --prompt-count {s.prompt_count} prompts")
        if rendered:
            frames = world.render(world.scene(entry["seed"], [entry["motion"]], caption), s.frames, width)
        else:
            frames = mini_mi.read_video(find_clip(file.parent, name), s.frames, (width, height))
        with mini_mi.built_from(file, "has a text that the embedded model does not know", "change it"):
            [world.attributes(text) for text in texts if in_world]
        clips.append(Clip(name, frames, caption, str(entry.get("motion", name)), texts[1:]))
    return clips


def find_clip(folder, name):
    """The clip of this path below a folder, with or without its suffix; thumbnails can have its name, too."""
    wanted = folder / name
    beside = wanted.parent.iterdir() if wanted.parent.is_dir() else ()
    found = sorted(path for path in beside if path.name == wanted.name
                   or path.stem == wanted.name and path.suffix.lower() in CLIP_SUFFIXES)
    if len(found) != 1:
        there = " and ".join(path.name for path in found) or "no such clip"
        raise UserError(f"{folder / 'clips.json'} names {name}; beside it is {there}: write its full name")
    return found[0]


# --------------------------------------------------------------------------------------------- files of cells

def digest(*what):
    """A short name for any JSON-able settings: 12 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(*folders):
    """Stands for files: names, sizes, and both ends of each, since training moves every tensor in between."""
    total = hashlib.sha256()
    for folder, path in ((folder, path) for folder in folders for path in sorted(folder.rglob("*"))):
        name = path.relative_to(folder)
        # A downloader's notes in a dot-folder are no part of the model.
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            size = path.stat().st_size
            total.update(f"{name} {size} ".encode())
            with open(path, "rb") as file:
                total.update(file.read(ENDS))
                file.seek(max(file.tell(), size - ENDS))
                total.update(file.read())
    return total.hexdigest()


def read_arrays(path):
    """A .npz file -> dict of arrays, and of a JSON-able dict `about`; every array in it has a checksum."""
    with np.load(path, allow_pickle=False) as file:
        return {**file, "about": json.loads(str(file["about"]))}


def write_arrays(things, path):
    """The way back; `things` need no `about`."""
    np.savez_compressed(path, **{**things, "about": json.dumps(things.get("about", {}))})


def once(path, make=None, read=read_arrays, write=write_arrays):
    """The finished thing in a file. Where it is missing or damaged: what make() gives, now kept; or None."""
    try:
        with mini_mi.built_from(path):
            if path.exists():
                return read(path)
    except UserError as e:
        if isinstance(e.__cause__, OSError):                         # a disk, a permission: the file is whole
            raise
        tqdm.write(f"warning: {path.name} is damaged: deleted, to be made again ({e})", file=sys.stderr)
        path.unlink()
    if make:
        thing = make()
        with mini_mi.atomic_write(path) as temporary:
            write(thing, temporary)
        return thing


# --------------------------------------------------------------------------------- from a clip to its samples

class Pipeline:
    """The steps from a clip to samples, by the text-to-video model. What they make is kept in files."""

    def __init__(self, lab, folder):
        self.lab, self.settings, self.folder = lab, lab.settings, folder
        self.device = torch.device(self.settings.device)

    @functools.cached_property
    def models(self):
        return mini_mi.load_models(str(self.folder), self.device, getattr(torch, self.settings.dtype))

    @functools.lru_cache(maxsize=1)                                  # the cells of a clip follow each other
    def invert(self, clip):
        """clip -> latents (1,C,F,H,W), and the noise that leads to them (1,C,F,H,W)."""
        # The mean of the autoencoder's answer, so that no draw sets the clips apart; mini_mi.py draws.
        latents = mini_mi.encode_video(self.models, mini_mi.to_model_range(clip.frames))
        noise = mini_mi.ddim_invert(self.models, latents, mini_mi.encode_prompt(self.models, [""]),
                                    self.settings.invert_steps, progress=False)
        return latents.float(), noise.float()

    def train(self, clip, training, train_seed):
        """clip -> MotionEmbeddings in eval mode; their `source` holds what they cost."""
        s = self.settings

        def make():
            latents = self.invert(clip)[0]          # before the clock: a clip's later trainings find it made
            began, text = time.perf_counter(), mini_mi.encode_prompt(self.models, [clip.caption])
            motion = mini_mi.train_motion(
                self.models, latents, text, **self.lab.trainings[training], seed=train_seed,
                checkpointing=s.checkpointing, progress=False)
            learned = {"model": s.model, "frames": s.frames, "size": s.size, **self.lab.trainings[training]}
            motion.source = {**learned, "cost": {"train_seconds": time.perf_counter() - began,
                                                 "parameters": sum(p.numel() for p in motion.parameters())}}
            return motion

        path = self.lab.motion_path(clip, training, train_seed)
        return once(path, make, mini_mi.MotionEmbeddings.load, mini_mi.MotionEmbeddings.save).to(self.device)

    def sample(self, cells):
        """Cells of one clip and variant, in one batch -> their frames (F,h,w,3) uint8, and what they cost."""
        s, clip, variant = self.settings, cells[0].clip, cells[0].variant
        motion, cost = None, {"train_seconds": 0.0, "parameters": 0}
        if variant.training:
            motion = self.train(clip, variant.training, cells[0].train_seed)
            cost = motion.source["cost"]
            for name, value in variant.use.items():
                setattr(motion, name, value)
        latents, inverted = self.invert(clip)
        began = time.perf_counter()
        if variant.sampled:
            # All variants of one (clip, prompt, seed) start from the same fresh noise: they can be paired.
            dice = [torch.Generator().manual_seed(int(digest(*cell.key), 16)) for cell in cells]
            noise = torch.cat([torch.randn(latents.shape, generator=die) for die in dice]).to(self.device)
            if variant.prior:
                noise = mini_mi.blend_noise(inverted, noise, s.noise_prior)
            text, empty = (mini_mi.encode_prompt(self.models, prompts)
                           for prompts in ([cell.prompt for cell in cells], [""] * len(cells)))
            latents = mini_mi.sample(self.models, noise, text, empty, s.sample_steps, s.guidance, motion,
                                     progress=False)
        videos = [mini_mi.to_uint8(video) for video in mini_mi.decode_video(self.models, latents)]
        cost = {**cost, "sample_seconds": (time.perf_counter() - began) / len(cells)}
        return [{"about": {"cost": cost}, "frames": video} for video in videos]


# ------------------------------------------------------------------------------------- from samples to scores

class Judges:
    """CLIP for frames and texts, Inception for the Frechet distance, a tracker for motion."""

    def __init__(self, s, name, folder, in_world):
        self.settings, self.folder, self.in_world = s, folder, in_world
        self.device = torch.device(s.device)
        self.names = {"clip": "the tiny CLIP" if in_world else name,
                      "frechet": "tiny-CLIP" if in_world else "Inception",
                      "tracker": f"{s.tracker}, {s.grid} x {s.grid} points",
                      "real": "rendered clips of the same prompts" if in_world else
                              "the reference clips, whose content is not what the prompts ask for"}

    @functools.cached_property
    def clip(self):
        """(CLIP, its tokenizer, its preprocess)"""
        return load_clip(self.folder, self.device)

    @torch.no_grad()
    def image_features(self, frames):
        """CLIP's view of frames (F,h,w,3) uint8 -> (F,D)"""
        model, _, preprocess = self.clip
        return model.image_features(preprocess(frames)).cpu().numpy()

    @functools.cache
    @torch.no_grad()
    def text_features(self, text):
        """CLIP's view of a text -> (D,)"""
        model, tokenizer, _ = self.clip
        return model.text_features(tokenizer([text]).to(self.device))[0].cpu()

    @torch.no_grad()
    def measure(self, frames):
        """frames (F,h,w,3) uint8 -> features (F,D), fid_features (F or F/4,d), tracks (n,F,2) never hidden"""
        features = for_fid = self.image_features(frames)
        pixels = torch.from_numpy(frames).to(self.device)
        if not self.in_world:                                        # neighbours cost much and add little
            network = InceptionV3.pretrained(self.device)
            some = pixels[::min(4, len(pixels) // 2)]                # two at least: one has no covariance
            for_fid = network(some.permute(0, 3, 1, 2).float() / 255).cpu().numpy()
        find_tracks = track_points if self.settings.tracker == "lk" else cotracker
        tracks, visible = find_tracks(pixels, self.settings.grid)
        return {"features": features, "fid_features": for_fid, "tracks": tracks[visible.all(1)].numpy()}

    @functools.cache
    def reference(self, clip):
        """The reference clip through the same judges, once per clip -> what `measure` gives."""
        return self.measure(clip.frames)

    def judge(self, cell, sample):
        """What the judges say about a sample: its scores, and what they were computed from."""
        seen, reference = self.measure(sample["frames"]), self.reference(cell.clip)
        features, tracks = seen["features"], seen["tracks"]
        scores = {"text_similarity": text_similarity(features, self.text_features(cell.prompt)),
                  "motion_fidelity": motion_fidelity(tracks, reference["tracks"], still=STILL),
                  "temporal_consistency": temporal_consistency(features),
                  "leakage": appearance_leakage(features, reference["features"]),
                  **(self.shown(cell.prompt, sample["frames"], features) if self.in_world else {})}
        about = {"variant": cell.variant.name, "clip": cell.clip.name, "movement": cell.clip.movement,
                 "prompt": cell.prompt, "prompt_index": cell.prompt_index, "seed": cell.seed,
                 "train_seed": cell.train_seed, "scores": scores,
                 "moving_tracks": len(_steps(tracks, STILL)[0]), "tracks": len(tracks), **sample["about"]}
        return {"about": about, **seen}

    def shown(self, prompt, frames, features):
        """Does the clip show the prompt's shape, colour, pattern and background? Each 0 or 1, and all four:
        the prompt competes with those in which one attribute is another. shape_frames: the share of frames
        with the right outline, since CLIP still sees a circle that has grown corners.
        """
        own, right = world.attributes(prompt), {}
        for slot, (name, choices) in enumerate(WORLD_ATTRIBUTES.items()):
            texts = [world.describe(*own[:slot], choice, *own[slot + 1:]) for choice in choices]
            best = best_text(features, torch.stack([self.text_features(t) for t in texts]))
            right[f"shows_{name}"] = float(texts[best] == world.describe(*own))
        return {**right, "attributes": min(right.values()),
                "shape_frames": world.shape_share(frames, own[0])}

    @functools.cache
    def real_features(self, prompt, *which):
        """CLIP features (F,D) of a rendered clip of this prompt in random motion; which: names the draw."""
        scene = world.scene(int(digest("real", *which)[:8], 16), tuple(world.MOTIONS), prompt)
        width = mini_mi.sizes(self.settings)[0][0]
        return self.image_features(world.render(scene, self.settings.frames, width))


# ================= RESULTS: from finished cells to numbers with intervals, and to sentences =================

Sample = collections.namedtuple("Sample", "cell arrays")      # a finished cell, and what `Judges.judge` wrote


def grouped(things, key):
    """key(thing) -> list of the things that have it, both in the order of appearance."""
    groups = collections.defaultdict(list)
    for thing in things:
        groups[key(thing)].append(thing)
    return groups


def collect(lab):
    """What `analyse` needs of the finished cells, JSON-able: their scores, and what takes their features."""
    samples = [Sample(cell, once(lab.score_path(cell))) for cell in lab.cells]
    finished = [s for s in samples if s.arrays]
    by_name = grouped(finished, lambda s: s.cell.variant.name)
    if "full" not in by_name:
        raise UserError(f"{lab.out}: no finished cell of this grid; give its run's options, or drop --report")
    to_real = {name: distance_to_real(lab, some) for name, some in by_name.items()}
    drawn = {name: {(s.cell.key, s.cell.train_seed) for s in some} for name, some in by_name.items()}
    for name, (distance, clips, facts) in to_real.items():
        against, facts["difference"] = VARIANTS[name].against, None
        if name != against and drawn[name] == drawn.get(against):             # else the two differ in n
            other = to_real[against][0]
            facts["difference"] = jackknife(lambda some: distance(some) - other(some), clips)
    # What no likeness at all scores: Motion Fidelity against reference clips of other motions.
    chance = []
    for s in [s for s in by_name["full"] if s.cell.key[1:] == (0, 0) and s.cell.train_seed == 0]:
        others = [lab.judges.reference(c)["tracks"] for c in lab.clips if c.movement != s.cell.clip.movement]
        found = [motion_fidelity(s.arrays["tracks"], tracks, still=STILL) for tracks in others]
        chance += [np.mean(found)] if found else []
    return {"settings": dataclasses.asdict(lab.settings), "judges": lab.judges.names,
            "finished": len(finished), "planned": len(samples),
            "distances": {name: facts for name, (_, _, facts) in to_real.items()},
            "chance": student_interval(chance) if chance else None,
            "cells": [s.arrays["about"] for s in finished]}


def distance_to_real(lab, samples):
    """A variant's samples against real clips -> (the Frechet distance, a function of clip names; all these
    names; facts). In the tiny world the real set has a rendered clip of the same prompt in random motion for
    every sample; a second such set gives the floor, real from real. Elsewhere: references, half from half.
    """
    by_clip, judges, floor = grouped(samples, lambda s: s.cell.clip.name), lab.judges, None
    names = tuple(by_clip)

    def features(of):
        """of(sample) -> (n,d), of all samples of each clip: clip name -> (n,d)."""
        return {name: np.concatenate([of(s) for s in some]) for name, some in by_clip.items()}

    def pooled(side, some=names):
        """The features of some clips, (n,d)."""
        return np.concatenate([side[name] for name in some])

    fake = features(lambda s: s.arrays["fid_features"])
    if judges.in_world:
        real, again = (features(lambda s: judges.real_features(
            s.cell.prompt, *s.cell.key, s.cell.train_seed, n)) for n in (0, 1))
        floor = frechet_distance(pooled(real), pooled(again))
    else:
        real = {s.cell.clip.name: judges.reference(s.cell.clip)["fid_features"] for s in samples}
        floor = frechet_distance(pooled(real, names[::2]), pooled(real, names[1::2])) if names[1:] else None
    distance = functools.cache(lambda some: frechet_distance(pooled(fake, some), pooled(real, some)))
    return distance, names, {"frechet": jackknife(distance, names), "frechet_floor": floor,
                             "kid": kernel_distance(pooled(fake), pooled(real)), "frames": len(pooled(fake))}


# -------------------------------------------------------------------------------- the analysis, of JSON alone

def analyse(measured):
    """What `collect` gave, or a results.json, with any votes in it -> the same with rows and comparisons."""
    by_name = grouped(measured["cells"], lambda cell: cell["variant"])
    names = [name for name in measured["settings"]["variants"] if name in by_name]
    votes = measured.get("preference") or {"shares": {}, "tests": {}, "notes": []}
    rows = [row(name, by_name[name], measured["distances"][name], votes["shares"]) for name in names]
    comparisons = []
    for name in names:
        ours, theirs = by_name[name], by_name.get(VARIANTS[name].against, [])
        if ours is not theirs and paired(ours, theirs, PRIMARY[0]):  # none where prompts are the captions
            comparisons.append(compare(name, ours, theirs, measured["distances"][name]["difference"]))
    family = [c["metrics"][m] for c in comparisons if c["name"] in ABLATIONS for m in PRIMARY]
    # A test of the family that was not made counts as one without a finding.
    for test, p in zip(family, holm([test["p"] for test in family] + [1.0] * (FAMILY - len(family)))):
        test["p_holm"] = p
    results = {**measured, "rows": rows, "comparisons": comparisons, "preference": votes}
    results["cells"] = results.pop("cells")                          # last: they are long
    # JSON has no infinity: what is not finite, as the interval of one clip, becomes None.
    return json.loads(json.dumps(results), parse_constant=lambda name: None)


def row(name, cells, distance, shares):
    """One line of the table: mean and interval of every metric, Frechet distance, votes, tracks, cost."""
    clips, metrics = [c["clip"] for c in cells], {}
    for m in [m for m in METRICS if m in cells[0]["scores"]]:
        values = [c["scores"][m] for c in cells]
        metrics[m] = ([float(np.mean(values)), *share_interval(values, clips)] if m == "attributes" else
                      student_interval(group_means(values, clips)))
    moving, costs = np.array([c["moving_tracks"] for c in cells]), [c["cost"] for c in cells]
    return {"name": name, "expected": VARIANTS[name].expected, "n": len(cells), "clips": len(set(clips)),
            "metrics": metrics, **{key: value for key, value in distance.items() if key != "difference"},
            "preference": shares.get(name),
            "moving_tracks": float(moving.mean()), "fewest_moving": int(moving.min()),
            "tracks": float(np.mean([c["tracks"] for c in cells])), "still": int((moving == 0).sum()),
            "cost": {key: float(np.mean([cost[key] for cost in costs]))
                     for key, value in costs[0].items() if value is not None}}   # older runs have a None


def per_pair(cells, metric):
    """(clip, prompt, seed), which cells of a pair share -> the metric, its mean over trainings."""
    groups = grouped(cells, lambda c: (c["clip"], c["prompt_index"], c["seed"]))
    return {key: float(np.mean([c["scores"][metric] for c in some])) for key, some in groups.items()}


def paired(ours, theirs, metric):
    """The difference of each pair of cells: (clip, prompt, seed) -> ours minus theirs."""
    a, b = per_pair(ours, metric), per_pair(theirs, metric)
    return {key: a[key] - b[key] for key in a if key in b}


def compare(name, ours, theirs, frechet):
    """A variant and the one it is held against, in pairs. Units are clips, then motions if they repeat."""
    metrics, movement = {}, {c["clip"]: c["movement"] for c in ours}
    for m in [m for m in METRICS if m in ours[0]["scores"]]:
        pairs = paired(ours, theirs, m)
        values, none, clips = [*pairs.values()], np.zeros(len(pairs)), [key[0] for key in pairs]
        motions, n = [movement[clip] for clip in clips], len(set(clips))
        test = metrics[m] = paired_difference(values, none, clips)._asdict()
        alpha = 0.05 / FAMILY if name in ABLATIONS and m in PRIMARY else 0.05
        test["detectable"] = detectable_difference(test["high"] - test["mean"], n, alpha=alpha)
        if m in PRIMARY and 1 < len(set(motions)) < n:
            by_motion, signs = paired_difference(values, none, motions), np.sign(group_means(values, motions))
            test["by_motion"] = {**by_motion._asdict(), "motions": len(signs),
                                 "same_sign": int((signs == np.sign(by_motion.mean)).sum())}
    return {"name": name, "against": VARIANTS[name].against, "pairs": len(pairs), "clips": n,
            "metrics": metrics, "frechet": frechet}


def p_text(p):
    """0.0123 -> "p = 0.012"; never 0, which no sample of sign patterns can show."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def sentence(comparison):
    """What an ablation changed, in plain words: how much, how sure; or what effect would have shown."""
    parts, clips = [], comparison["clips"]
    for m in PRIMARY:
        test, title = comparison["metrics"][m], METRICS[m][:-2]
        p, rule, tests = ((test["p_holm"], "after Holm", FAMILY) if "p_holm" in test
                          else (test["p"], "exploratory", 1))
        moved = f"{'rose' if test['mean'] > 0 else 'fell'} by {abs(test['mean']):.3f}"
        # All k clips of one sign give p = 2 / 2^k, times the number of tests after Holm: never less.
        if tests * 2 / 2 ** clips >= 0.05:
            parts.append(f"{title} {moved}, but so few clips say nothing about chance")
            continue
        moved += f" (95 % interval {test['low']:+.3f} to {test['high']:+.3f}; {p_text(p)}, {rule})"
        # The test decides, and not the t interval, which one clip far out can widen.
        parts.append(f"{title} {moved}" if p < 0.05 else
                     f"No change of {title} was detected: it {moved}; a change of {test['detectable']:.3f} "
                     "would have shown in four of five such experiments")
        if comparison["name"] in ABLATIONS and "by_motion" in test:
            unit = test["by_motion"]
            parts.append(f"With the {unit['motions']} motions as units, which the clips repeat: "
                         f"{interval_text(unit['mean'], unit['low'], unit['high'])}, "
                         f"{unit['same_sign']} of {unit['motions']} of this sign")
    return f"{comparison['name']} against {comparison['against']}, {clips} clips: {'. '.join(parts)}."


def interaction(cells):
    """Do the two parts need each other? full - no-mqk - no-mv + base, paired; 0 where they simply add up."""
    by_name = grouped(cells, lambda cell: cell["variant"])
    beside_mv = paired(by_name["full"], by_name["no-mqk"], "motion_fidelity")     # what MQK brings
    alone = paired(by_name["no-mv"], by_name["base"], "motion_fidelity")
    values = [beside_mv[key] - alone[key] for key in beside_mv if key in alone]
    clips = [key[0] for key in beside_mv if key in alone]
    if len(set(clips)) < 2:
        return []
    mean, low, high, p = paired_difference(values, np.zeros(len(values)), clips)
    said = (f"together the parts bring {'more' if low > 0 else 'less'} than the sum of what each brings alone"
            if low * high > 0 else "the parts add up, as far as these clips show")
    return [f"Interaction of MQK and MV in Motion Fidelity (full - no-mqk - no-mv + base, exploratory): "
            f"{interval_text(mean, low, high)}; {p_text(p)}: {said}."]


def price(comparisons):
    """What the method gains and costs with the same start noise: base - full turned round, in each metric."""
    parts = []
    for c in [c for c in comparisons if c["name"] == "base"]:
        tests = {METRICS[m][:-2]: (t["mean"], t["low"], t["high"]) for m, t in c["metrics"].items()}
        tests["Fréchet distance"] = c["frechet"] or (None, None, None)
        parts += [f"{title} {interval_text(0.0 - mean, 0.0 - high, 0.0 - low, '+.4f')}"
                  for title, (mean, low, high) in tests.items() if low is not None]
    return [f"full against base, exploratory: {'; '.join(parts)}."] if parts else []


def way_to_the_bound(rows):
    """How much of the way in Motion Fidelity from the model unasked to the autoencoder's bound is closed."""
    fidelity = {r["name"]: r["metrics"]["motion_fidelity"][0] for r in rows}
    start, base, bound = (fidelity.get(name, math.nan) for name in ("base-no-inversion", "base", "vae"))
    if not start < base < bound:                                     # nor where one of them is missing
        return []
    alone, full = ((value - start) / (bound - start) for value in (base, fidelity["full"]))
    return [f"Of the way in Motion Fidelity from base-no-inversion ({start:.3f}) to vae ({bound:.3f}) base "
            f"alone closes {alone:.2f} and full {full:.2f}: "
            f"full closes {(full - alone) / (1 - alone):.2f} of what base leaves."]


# ============= BALLOT: User Preference, from a page that people vote on to shares with intervals ============

VOTE_FIELDS = ["run", "participant", "place", "question", "shown", "choice"]
FEW = 5                                              # participants below which shares are no result yet
# Which candidate moves most like the reference and shows the prompt? Frames are (F,h,w,3) uint8; candidates:
# id -> frames, one of every variant; caption, what the reference shows, is the prompt of an attention check.
# Ids are digests, which tell nothing; with a letter first, or a spreadsheet takes 728957227716 for a number.
Question = collections.namedtuple("Question", "id prompt reference candidates caption")


def make_ballot(lab, most=20):
    """Writes, from finished cells, ballot.html, on which people vote, and ballot.json, all that counting
    takes: it names the variants and the right answers of the checks, which the page does not.
    """
    s, questions, variant_of = lab.settings, [], {}
    grid = itertools.product(lab.clips, range(s.prompt_count), range(s.seed_count))
    asked = [[Cell(VARIANTS[name], *place) for name in BALLOT_VARIANTS] for place in grid]
    ready = [cells for cells in asked if all(lab.sample_path(cell).exists() for cell in cells)]
    if not ready:
        raise UserError(f"no sample has a finished cell of each of {', '.join(BALLOT_VARIANTS)}")
    for n in np.linspace(0, len(ready) - 1, min(most, len(ready))).astype(int):
        first, candidates = ready[n][0], {}
        for cell in ready[n]:
            file = lab.sample_path(cell)
            key = "c" + digest(hashlib.sha256(file.read_bytes()).hexdigest())   # tells nothing without cells
            with mini_mi.built_from(file, "is damaged"):
                candidates[key], variant_of[key] = read_arrays(file)["frames"], cell.variant.name
        questions.append(Question("q" + digest(*first.key), first.prompt, first.clip.frames, candidates,
                                  first.clip.caption))
    run_id = "r" + digest(sorted(variant_of))
    checks = attention_checks(questions, run_id)
    ballot = {"run": run_id, "variants": [*BALLOT_VARIANTS],
              "questions": {q.id: {key: variant_of[key] for key in q.candidates} for q in questions},
              "checks": {q.id: {"right": right, "candidates": [*q.candidates]} for q, right in checks}}
    file, page = lab.out / "ballot.json", lab.out / "ballot.html"
    if file.exists() and mini_mi.read_json(file) != ballot:
        raise UserError(f"{file} is of another ballot, whose votes need it; delete it to ask anew")
    # A worked example, which data/ballot.html explains. No motion that is tested is in it.
    right, wrong = "a yellow star on a teal plain background", "a red circle on a brown striped background"
    shown = {"still": ("rest", right), "same": ("zigzag", wrong), "right": ("zigzag", right),
             "other": ("zoom_in", right)}
    clips = {key: world.render(world.scene(3, [motion], text)) for key, (motion, text) in shown.items()}
    example = Question("example", right, clips["same"], clips, wrong)
    write_text(page, ballot_page([example, *questions, *(q for q, _ in checks)], run_id, s.fps))
    write_text(file, json.dumps(ballot, indent=1))
    print(f"{page}: {len(questions)} questions and {len(checks)} checks; keep {file.name} to yourself")


def attention_checks(questions, run_id):
    """Two questions beyond doubt -> [(Question, id of the right candidate)], of the references that change
    most: one candidate is the reference itself, under its own caption, and the others stand still.
    """
    clips = {q.reference.tobytes(): q for q in questions}.values()   # a clip once, though it has many prompts
    change = [np.abs(np.diff(q.reference.astype(int), axis=0)).mean() for q in clips]
    ranked = sorted(zip(change, clips), key=lambda pair: pair[0], reverse=True)
    moving, checks = [q for much, q in ranked if much > 0], []
    for n, q in enumerate([*moving, *moving][:2]):
        stills = np.linspace(0, len(q.reference) - 1, len(q.candidates) - 1).astype(int)
        shown = [q.reference, *(np.repeat(q.reference[i:i + 1], len(q.reference), axis=0) for i in stills)]
        ids = ["c" + digest(run_id, n, i) for i in range(len(shown))]
        check = Question("q" + digest(run_id, n), q.caption, q.reference, dict(zip(ids, shown)), q.caption)
        checks.append((check, ids[0]))
    return checks


def ballot_page(questions, run_id, fps):
    """The page on which people vote -> its text: one file that needs no server and no network.
    questions: the worked example, which ballot.html explains, then the questions and attention checks, which
    every participant sees in an order of their own. At the end they save votes-ID.csv.
    """
    # Sorted by their opaque ids: the order in the page says nothing about variants or checks.
    example, *questions = questions
    # Strips of small clips are lossless: enlarged on the page, they would show every trace of compression.
    data = json.dumps({"run": run_id, "fps": fps, "fields": VOTE_FIELDS, "questions": [
        {"id": q.id, "prompt": q.prompt, "reference": film_strip(q.reference),
         "candidates": {key: film_strip(q.candidates[key]) for key in sorted(q.candidates)}}
        for q in [example, *sorted(questions, key=lambda q: q.id)]]})
    data = data.replace("<", "\\u003c")                          # no text can end a script or begin a tag
    page = (mini_mi.HERE / "data" / "ballot.html").read_text(encoding="utf-8")
    return page.replace("QUESTIONS", data, 1)


def film_strip(frames, most=320, lossless=128):
    """A clip (F,h,w,3) uint8 as one picture, its frames side by side: {"frames": F, "src": data URI}.
    Frames wider than `most` pixels are reduced, and wider than `lossless` are compressed with losses.
    """
    count, height, width = frames.shape[:3]
    strip = Image.fromarray(np.concatenate(list(frames), axis=1))
    side = min(width, most, 16383 // count)                      # WebP pictures are at most 16383 pixels wide
    if side < width:
        strip = strip.resize((side * count, side * height // width), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    strip.save(file, "WEBP", quality=82, lossless=side <= lossless)
    return {"frames": count, "src": f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"}


def read_votes(paths, ballot):
    """Files, and folders of them, that participants saved -> (list of (participant, variant chosen), notes on
    what was left out). A question counts once for a participant, as the last file has it: a browser saves a
    second time as "votes-ID (1).csv", so the longer name is the later one.
    """
    answers, checks = {}, ballot["checks"]
    files = [file for path in map(Path, paths) for file in (path.glob("*.csv") if path.is_dir() else [path])]
    notes = [] if files else ["no .csv file was found"]
    for file in sorted(files, key=lambda f: (len(f.name), f.name)):
        try:
            answers |= read_ballot(file, ballot)
        except (OSError, ValueError, csv.Error) as e:                # text that is not UTF-8 is a ValueError
            notes.append(f"{file} left out: {mini_mi.one_line(e)}")
    people = {person for person, _ in answers}
    careful = {person for person in people
               if all(answers.get((person, check)) == checks[check]["right"] for check in checks)}
    if careful != people:
        notes.append(f"{len(people - careful)} of {len(people)} participants left out: not all of the "
                     f"{len(checks)} attention checks passed")
    return [(person, ballot["questions"][question][choice]) for (person, question), choice
            in answers.items() if person in careful and question not in checks], notes


def read_ballot(file, ballot):
    """A saved file -> (participant, question id) -> choice; ValueError says which cell is not of this run."""
    candidates = {**ballot["questions"],
                  **{key: check["candidates"] for key, check in ballot["checks"].items()}}
    found, text = {}, file.read_text(encoding="utf-8-sig")
    # Some spreadsheets write semicolons.
    reader = csv.DictReader(io.StringIO(text), delimiter=";" if ";" in text else ",")
    for row in reader:
        if list(row) != VOTE_FIELDS or None in row.values():
            raise ValueError(f"its columns are not {','.join(VOTE_FIELDS)}")
        shown = candidates.get(row["question"], ())
        fits = {"run": row["run"] == ballot["run"], "participant": row["participant"] != "",
                "question": bool(shown), "shown": sorted(row["shown"].split("|")) == sorted(shown),
                "choice": row["choice"] in shown}
        for field in [field for field, right in fits.items() if not right]:
            raise ValueError(f"line {reader.line_num}, {field}: the page of run {ballot['run']} did not "
                             f"write {row[field][:40]!r}; a vote on another run, or a program changed it")
        found[row["participant"], row["question"]] = row["choice"]
    if not found:
        raise ValueError("there is no vote in it")
    return found


def preference(votes, notes, variants):
    """User Preference of what `read_votes` gave, as results.json has it. tests: is `full` chosen more often
    than an ablation? The difference of shares averages over participants, whose signs flip as a whole.
    """
    people, shares = [person for person, _ in votes], {}
    chosen = {name: [int(choice == name) for _, choice in votes] for name in variants if votes}
    for name, wins in chosen.items():
        low, high = share_interval(wins, people)
        shares[name] = {"share": sum(wins) / len(wins), "low": low, "high": high, "n": len(wins),
                        "participants": len(set(people)), "chance": 1 / len(variants)}
    tests = {name: paired_difference(chosen["full"], chosen[name], people) for name in ABLATIONS if votes}
    few = [f"a trial with fewer than {FEW} participants, not a result"] if 0 < len(set(people)) < FEW else []
    return {"shares": shares, "tests": tests, "notes": notes + few}


# ========================= REPORT: results.json, results.md, results.svg, report.html =======================

def write_text(path, text):
    """Writes a text file, or leaves the old one."""
    with mini_mi.atomic_write(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8", newline="\n")


def plus_minus(triple, form=".3f"):
    """(mean, low, high) around the mean -> "0.123 ± 0.022"; without an interval that is a dash."""
    if triple is None:
        return "–"
    mean, _, high = triple
    return f"{mean:{form}} ± {'–' if high is None else format(high - mean, form.lstrip('+'))}"


def interval_text(mean, low, high, form="+.3f"):
    """Both ends of the interval -> "-0.130 (-0.177 to -0.082)"; that of a share is not symmetric."""
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def document(results):
    """What results.md and report.html both say: name -> sentences, or a table as a list of (head -> text)."""
    rows, judges, parts = results["rows"], results["judges"], collections.defaultdict(list)
    distance, voted = f"Fréchet distance ({judges['frechet']} features) ↓", results["preference"]["shares"]
    for r in rows:
        floor = "–" if r["frechet_floor"] is None else f"{r['frechet_floor']:.4f}"
        vote, waits = r["preference"], not voted and r["name"] in BALLOT_VARIANTS
        metrics = [(METRICS[m], interval_text(*triple, ".3f") if m == "attributes" else plus_minus(triple))
                   for m, triple in r["metrics"].items() if m != "shape_frames"]
        parts["main"].append({
            "variant": r["name"], **dict(metrics[:3]), distance: plus_minus(r["frechet"], ".4f"),
            "User Preference ↑": interval_text(vote["share"], vote["low"], vote["high"], ".3f") if vote
                                 else "no votes yet" if waits else "–",
            **dict(metrics[3:]), "n (clips)": f"{r['n']} ({r['clips']})"})
        parts["details"].append({
            "variant": r["name"], "frames": str(r["frames"]), "Fréchet, real from real": floor,
            "KID x 1000": f"{1000 * r['kid']:.3f}",
            METRICS["shape_frames"]: plus_minus(r["metrics"].get("shape_frames")),     # older runs lack it
            "tracks that Motion Fidelity rests on": f"{r['moving_tracks']:.0f} of {r['tracks']:.0f} "
                                                    f"(fewest {r['fewest_moving']})",
            "samples without any": str(r["still"]), "training s": f"{r['cost']['train_seconds']:.1f}",
            "sampling s": f"{r['cost']['sample_seconds']:.2f}",
            "embedding parameters": f"{r['cost']['parameters']:,.0f}"})
    parts["main"].append({**dict.fromkeys(parts["main"][0], "–"), "variant": "real from real",
                          distance: parts["details"][0]["Fréchet, real from real"]})
    for c in results["comparisons"]:
        parts["answers" if c["name"] in ABLATIONS else "others"].append(sentence(c))
        parts["differences"].append({"difference": f"{c['name']} (from {c['against']})", **{
            METRICS[m]: plus_minus((t["mean"], t["low"], t["high"]), "+.3f")
            + (f" ({p_text(t['p_holm'])}, Holm)" if "p_holm" in t else f" ({p_text(t['p'])})")
            for m, t in c["metrics"].items()}, distance: plus_minus(c["frechet"], "+.4f")})
    parts["answers"] += interaction(results["cells"]) + price(results["comparisons"]) + way_to_the_bound(rows)
    parts["expected"] = [f"{r['name']}: {r['expected']}" for r in rows]
    parts["votes"] = [
        "User Preference: " + (
            "{n} votes of {participants} people, chance {chance:.3f}.".format_map(voted["full"]) if voted
            else "no votes yet; --ballot writes the page, --votes counts."),
        *(f"User Preference, full against {name}: {plus_minus(test, '+.3f')} of the votes, {p_text(p)} "
          "by sign flips over participants." for name, (*test, p) in results["preference"]["tests"].items()),
        *results["preference"]["notes"]]
    parts["notes"] = [
        f"Model: {Path(results['settings']['model']).name}. Judges: {judges['clip']}; tracker "
        f"{judges['tracker']}. Fréchet: {judges['frechet']} features, against those of {judges['real']}.",
        f"Chance level of Motion Fidelity, against clips of other motions: {plus_minus(results['chance'])}.",
        *parts["votes"]]
    parts["run"] = ["{command}, {date}, {machine}, {ranks} at a time: {computed} cells in {minutes:.1f} min; "
                    "finished: {finished} of {planned}.".format_map({**results, **results["run"]})]
    return parts


def as_markdown(part):
    """A part of the `document` in Markdown."""
    if part and isinstance(part[0], dict):
        lines = [part[0].keys(), ["---"] * len(part[0]), *(line.values() for line in part)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join(f"- {text}" for text in part)


def as_html(part):
    """A part of the `document` in HTML; what is in parentheses in a table's cell goes to a smaller line."""
    def cells(tag, texts):
        small = (re.sub(r" (\(.*)", r"<small>\1</small>", html.escape(text)) for text in texts)
        return f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in small)}</tr>"

    if part and isinstance(part[0], dict):
        return (f'<div class="scroll"><table><thead>{cells("th", part[0])}</thead><tbody>'
                f"{''.join(cells('td', line.values()) for line in part)}</tbody></table></div>")
    return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in part)}</ul>"


def forest_plot(results):
    """Every metric's difference from full, a panel each, as SVG: the mean is a point, its interval a line."""
    # Variants from plain noise answer another question, and lie so far off that all others would be squeezed.
    comparisons = [c for c in results["comparisons"] if VARIANTS[c["name"]].prior]
    panels = {METRICS[m]: {c["name"]: [c["metrics"][m][end] for end in ("mean", "low", "high")]
                           for c in comparisons}
              for m in results["rows"][0]["metrics"] if m != "shape_frames"}
    panels[f"Fréchet distance ({results['judges']['frechet']}) ↓"] = {
        c["name"]: c["frechet"] for c in comparisons}
    out, names_width, width, height = [], 132, 236, 19 * len(comparisons) + 58
    for n, (title, marks) in enumerate(panels.items()):
        left, top = names_width + n % 3 * width, 22 + n // 3 * height
        ends = sorted([0.0, *(v for triple in marks.values() for v in triple or () if v is not None)])
        unit, bottom = 180 / max(ends[-1] - ends[0], 1e-9), top + 19 * len(marks)
        x = {v: round(left + 12 + unit * (v - ends[0]), 1) for v in ends}
        out += [f'<text class="title" x="{left}" y="{top - 6}">{html.escape(title)}</text>',
                f'<path d="M{x[0.0]} {top}V{bottom}"/>']
        for y, (name, triple) in zip(range(top + 10, bottom, 19), marks.items()):
            if n % 3 == 0:
                out.append(f'<text x="{left - 4}" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>')
            if triple:
                mean, low, high = triple
                line = "" if low is None else f'<path d="M{x[low]} {y}H{x[high]}"/>'
                out.append(f'<g class="mark {"ablation" if name in ABLATIONS else ""}">'
                           f'<circle cx="{x[mean]}" cy="{y}" r="3.5"/>{line}</g>')
        # Numbers under the axis: zero, and the outermost ends where they have room.
        ticks = {0.0: "0", **{v: f"{v:+.2g}" for v in (ends[0], ends[-1]) if abs(x[v] - x[0.0]) > 34}}
        out += [f'<text x="{x[v]}" y="{bottom + 14}" text-anchor="middle">{text}</text>'
                for v, text in ticks.items()]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {names_width + 3 * width} '
            f'{height * math.ceil(len(panels) / 3)}" role="img" aria-label="Differences from full">'
            f'{"".join(out)}</svg>')


def moving_clip(frames, label):
    """A clip as a figure that the style sheet moves: all clips of the page keep step."""
    count, height, width, _ = frames.shape
    return (f'<figure><div class="clip {label}" role="img" aria-label="{label}" '
            f'style="--frames: {count}; aspect-ratio: {width} / {height}; '
            f'background-image: url({film_strip(frames, most=192, lossless=0)["src"]})"></div>'
            f"<figcaption>{label}</figcaption></figure>")


def clip_rows(lab, most=12):
    """For the first clips and each prompt the reference and the first seed of every variant, as HTML."""
    parts = []
    for clip, prompt_index in itertools.product(lab.clips[:most], (*range(lab.settings.prompt_count), -1)):
        cells = [Cell(VARIANTS[name], clip, prompt_index, seed=0) for name in lab.settings.variants]
        found = [(cell.variant.name, once(lab.sample_path(cell))) for cell in cells]
        figures = [moving_clip(sample["frames"], name) for name, sample in found if sample]
        text = html.escape(f"{'prompt' if prompt_index >= 0 else 'its own caption'}: {cells[0].prompt}")
        parts += [f"<h3>{html.escape(clip.name)}</h3>"] if prompt_index == 0 else []
        parts += [f'<p class="soft">{text}</p><div class="clips">{moving_clip(clip.frames, "reference")}'
                  f'{"".join(figures)}</div>'] if figures else []
    return "".join(parts)


def write_report(out, results, lab=None):
    """Writes the four files of the report and prints most of it. Without a lab the page keeps its clips."""
    parts, forest, path = document(results), forest_plot(results), out / "report.html"
    write_text(out / "results.json", json.dumps(results, indent=1))
    order = "main", "others", "differences", "details", "notes", "run"
    write_text(out / "results.md", "\n\n".join([
        as_markdown(parts["answers"]), "![Differences from the full method, 95 % intervals](results.svg)",
        *(as_markdown(parts[name]) for name in order)]) + "\n")
    template = (mini_mi.HERE / "data" / "report.html").read_text(encoding="utf-8")
    style = re.search("<style>.*?</style>", template, re.DOTALL)[0]
    write_text(out / "results.svg", forest.replace(">", f">{style}", 1))
    clips = clip_rows(lab) if lab else ""
    if path.exists() and lab is None:
        clips = path.read_text("utf-8").partition("<!-- clips -->")[2].partition("<!-- /clips -->")[0]
    write_text(path, string.Template(template).substitute(
        {name: as_html(parts[name]) for name in ("answers", "expected", *order)}, forest=forest, clips=clips))
    shown = (as_markdown(parts[name]) for name in ("main", "answers", "others", "votes"))
    print("", *shown, path, sep="\n\n")


# =============================================== COMMAND LINE ===============================================

@dataclasses.dataclass
class Settings(mini_mi.SharedConfig):
    """Everything that a user can set; the command line is made from it."""
    clip_model: str = option("judges", None, "CLIP, folder or repository; default: MODEL/clip or ViT-B/32")
    tracker: str = option("judges", "lk", "Lucas-Kanade, or CoTracker 3", choices=("lk", "cotracker"))
    grid: int = option("judges", 16, "tracked points per side; the paper's CoTracker takes 55", 1, 1e6)
    clips: str = option("grid", None, "folder with clips.json: NAME -> caption, motion, prompts (data/clips)")
    split: str = option("grid", "test", "which clips of the embedded world", choices=tuple(world.SPLITS))
    variants: str = option("grid", ",".join(DEFAULT_VARIANTS), f"to compare, of {', '.join(VARIANTS)}")
    clip_count: int = option("grid", 10, "clips; the embedded world has any number", 1, 1e6)
    prompt_count: int = option("grid", 2, "target prompts per clip", 1, 1e6)
    seed_count: int = option("grid", 2, "sampling seeds per prompt", 1, 1e6)
    training_seeds: int = option("grid", 1, "trainings of each kind per clip", 1, 1e6)
    quick: bool = option("grid", False, "a small grid, to see it work: 3 clips, 1 prompt, 1 seed")
    invert_steps: int = option("sampling", mini_mi.INVERT_STEPS, "steps of the DDIM inversion", 2, 1e6)
    sample_batch: int = option("sampling", 4, "samples made at once: 4 suits a CPU, a GPU likes more", 1, 1e6)
    out: str = option("output", "out/eval", "folder for cells and report; a second run goes on there")
    dtype: str = option("output", None, "of the UNet (default: float32, on CUDA float16 for large models)",
                        choices=("float32", "bfloat16", "float16"))
    report: bool = option("output", False, "only the report again, of finished cells or else of results.json")
    ballot: bool = option("output", False, "only write ballot.html, on which people vote, of finished cells")
    votes: list = option("output", None, "only count the files, in folders too, that voters saved")
    # What only the model's folder says: the ballot's frames per second; that it knows data/world.py alone.
    fps: float = 8
    world: bool = False


def parse(argv=None):
    """Command line -> Settings: the paper's defaults, what the model's folder says, what was given."""
    given = mini_mi.parse_given(Settings, argv, "eval_mi.py", __doc__)
    model_says = mini_mi.model_settings(given.get("model", Settings.model))
    quick = {"clip_count": 3, "prompt_count": 1, "seed_count": 1} if "quick" in given else {}
    s = mini_mi.merged(Settings, model_says, model_says.get("eval", {}), quick, given)
    s.device = mini_mi.pick_device(s.device)
    if s.device == "cuda":            # each process of a machine takes its own card, or the only one it sees
        card = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        s.device = mini_mi.pick_device(f"cuda:{card}")
    s.dtype = s.dtype or ("float16" if s.device.startswith("cuda") and not s.world else "float32")
    names = s.variants.replace(",", " ").split()
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"--variants: {unknown[0]} is none of {', '.join(VARIANTS)}")
    # `full`, and what some of them are held against, come along.
    s.variants = list(dict.fromkeys(["full", *names, *(VARIANTS[name].against for name in names)]))
    if lost := [path for path in s.votes or () if not Path(path).exists()]:
        raise UserError(f"--votes {lost[0]}: there is no such file or folder")
    if s.report + s.ballot + bool(s.votes) > 1:
        raise UserError("--report, --ballot and --votes are three jobs: one after the other")
    return s


def run(s):
    """The ballot, the votes or the report; else this rank's part of the grid, then the first one's report."""
    if s.ballot:
        return make_ballot(Lab(s))
    out = Path(s.out)
    older = mini_mi.read_json(out / "results.json") if (out / "results.json").exists() else {}
    if s.votes or s.report and not (out / "cells").is_dir():
        if not older:
            raise UserError(f"{out} has no finished cell of this grid, and no results.json: change --out")
        if s.votes:
            ballot = mini_mi.read_json(out / "ballot.json")
            with mini_mi.built_from(out / "ballot.json"):
                older["preference"] = preference(*read_votes(s.votes, ballot), ballot["variants"])
        with mini_mi.built_from(out / "results.json"):
            results = analyse(older)
            document(results)                                   # what it lacks shows here, under its name
        return write_report(out, results)
    lab, computed, minutes = (Lab(s), 0, 0.0) if s.report else run_experiment(s)
    if os.environ.get("RANK", "0") != "0":
        return
    if s.report and len(lab.cells) < older.get("planned", 0):
        raise UserError(f"{out} holds {older['planned']} cells, not {len(lab.cells)}: give its run's options")
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    if s.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(s.device) / 2 ** 30
        machine = f"{torch.cuda.get_device_name(s.device)}, {peak:.1f} GiB at the peak"
    made = {"command": f"python eval_mi.py {shlex.join(sys.argv[1:])}", "date": time.strftime("%Y-%m-%d"),
            "machine": machine, "ranks": int(os.environ.get("WORLD_SIZE", 1)), "computed": computed,
            "minutes": minutes, "versions": {"python": platform.python_version(), **{
                module.__name__: module.__version__ for module in (torch, np, scipy)}}}
    results = {"run": made, **collect(lab)}
    if not computed and results["cells"] == older.get("cells"):     # the note on the run that made them stays
        results |= {"run": older["run"], "preference": older.get("preference")}
    write_report(out, analyse(results), lab)


def main(argv=None):
    """Entry point of the command line; returns the exit status."""
    return mini_mi.guarded(lambda: run(parse(argv)))


# ====================== THE JUDGE NETWORKS, with the keys of the published weight files ====================

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


def load_clip(folder, device="cpu"):
    """A CLIP folder in HF layout -> (model, tokenizer, preprocess)."""
    model = mini_mi.load_module(CLIPModel, folder, device, torch.float32)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))

    def preprocess(frames):
        """frames (F,h,w,3) uint8 -> pixels (F,3,s,s): bicubic to s on the short side, centre crop, mean and
        std. It rounds to 8 bits after resizing, as CLIP's own code for PIL pictures does.
        """
        x = torch.as_tensor(frames).to(device).permute(0, 3, 1, 2).float()
        s, (height, width) = model.vision_model.image_size, x.shape[-2:]
        size = (s, int(s * width / height)) if height <= width else (int(s * height / width), s)
        x = nnf.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
        top, left = (size[0] - s) // 2, (size[1] - s) // 2
        return (x[..., top:top + s, left:left + s].round().clamp(0, 255) / 255 - mean) / std

    with mini_mi.built_from(folder):
        tokenizer = mini_mi.CLIPTokenizer.from_pretrained(folder)
    return model, tokenizer, preprocess


# Inception as tables, with the names of the weight file. A row is a block: branches side by side, each a
# chain of layers NAME=CHANNELS:KERNEL and of POOLS. KERNEL/STRIDE has no padding, a KERNEL alone keeps the
# size; | forks the last layer in two.
POOLS = {"max/2": nn.MaxPool2d(3, 2), "max": nn.MaxPool2d(3, 1, 1),
         "mean": nn.AvgPool2d(3, 1, 1, count_include_pad=False)}
STEM = ("Conv2d_1a_3x3=32:3x3/2 Conv2d_2a_3x3=32:3x3/1 Conv2d_2b_3x3=64:3x3 max/2 "
        "Conv2d_3b_1x1=80:1x1 Conv2d_4a_3x3=192:3x3/1 max/2")
MIXED_5 = ("1x1=64:1x1, 5x5_1=48:1x1 5x5_2=64:5x5, 3x3dbl_1=64:1x1 3x3dbl_2=96:3x3 3x3dbl_3=96:3x3, "
           "mean _pool={}:1x1")
MIXED_6 = ("1x1=192:1x1, 7x7_1={0}:1x1 7x7_2={0}:1x7 7x7_3=192:7x1, 7x7dbl_1={0}:1x1 7x7dbl_2={0}:7x1 "
           "7x7dbl_3={0}:1x7 7x7dbl_4={0}:7x1 7x7dbl_5=192:1x7, mean _pool=192:1x1")
MIXED_7 = ("1x1=320:1x1, 3x3_1=384:1x1 3x3_2a=384:1x3|3x3_2b=384:3x1, 3x3dbl_1=448:1x1 3x3dbl_2=384:3x3 "
           "3x3dbl_3a=384:1x3|3x3dbl_3b=384:3x1, {} _pool=192:1x1")
MIXED = {
    **{f"Mixed_5{block}": MIXED_5.format(width) for block, width in zip("bcd", (32, 64, 64))},
    "Mixed_6a": "3x3=384:3x3/2, 3x3dbl_1=64:1x1 3x3dbl_2=96:3x3 3x3dbl_3=96:3x3/2, max/2",
    **{f"Mixed_6{block}": MIXED_6.format(width) for block, width in zip("bcde", (128, 160, 160, 192))},
    "Mixed_7a": "3x3_1=192:1x1 3x3_2=320:3x3/2, "
                "7x7x3_1=192:1x1 7x7x3_2=192:1x7 7x7x3_3=192:7x1 7x7x3_4=192:3x3/2, max/2",
    "Mixed_7b": MIXED_7.format("mean"), "Mixed_7c": MIXED_7.format("max")}


class InceptionBlock(nn.ModuleDict):
    """A row of the tables: x (B,c_in,h,w) -> the channels of all its branches (B,width,h',w')."""

    def __init__(self, c_in, row, prefix="branch"):
        super().__init__()
        self.branches, self.width = [], 0
        for branch in row.split(", "):
            c, chain = c_in, []
            for step in branch.split():
                # One layer, or the two of a fork; a pool keeps the channels.
                layers = [POOLS.get(text) or self.add_layer(c, prefix + text) for text in step.split("|")]
                c = c if step in POOLS else sum(layer.conv.out_channels for layer in layers)
                chain.append(layers)
            self.branches.append(chain)
            self.width += c

    def add_layer(self, c_in, text):
        """NAME=CHANNELS:KERNEL -> convolution, BatchNorm, ReLU."""
        name, shape = text.split("=")
        channels, height, width, *stride = map(int, re.split("[:x/]", shape))
        padding = 0 if stride else (height // 2, width // 2)
        conv = nn.Conv2d(c_in, channels, (height, width), *stride, padding=padding, bias=False)
        self[name] = nn.Sequential(collections.OrderedDict(
            conv=conv, bn=nn.BatchNorm2d(channels, eps=0.001), relu=nn.ReLU()))
        return self[name]

    def forward(self, x):
        out = []
        for chain in self.branches:
            out.append(x)
            for layers in chain:
                out[-1] = torch.cat([layer(out[-1]) for layer in layers], dim=1)
        return torch.cat(out, dim=1)


class InceptionV3(InceptionBlock):
    """The network of FID: x (B,3,h,w) in [0,1] -> pooled features (B,2048).
    Weights: pt_inception-2015-12-05, the FID paper's TensorFlow network ported by pytorch-fid; its keys. Not
    torchvision's: averages ignore padding, the last block pools by maximum, 1008 classes.
    """
    URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
           "pt_inception-2015-12-05-6726825d.pth")

    def __init__(self):
        super().__init__(3, STEM, prefix="")
        for name, row in MIXED.items():
            self[name] = InceptionBlock(self.width, row)
            self.width = self[name].width
        self["fc"] = nn.Linear(self.width, 1008)                        # in the file, not in the features

    @classmethod
    @functools.cache
    def pretrained(cls, device="cpu"):
        """The published weights, fetched once and checked against the SHA-256 in their name."""
        with mini_mi.built_from(cls.URL, "cannot be fetched", "check the network"):
            tensors = torch.hub.load_state_dict_from_url(cls.URL, map_location="cpu", check_hash=True,
                                                         weights_only=True)
        model = cls()
        model.load_state_dict(tensors)
        return model.to(device).eval().requires_grad_(False)

    def forward(self, x):
        # Part of the definition, no antialiasing included: another resize, another FID (arXiv 2104.11222).
        x = super().forward(2 * nnf.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1)
        for name in MIXED:
            x = self[name](x)
        return x.mean(dim=(2, 3))


if __name__ == "__main__":
    sys.exit(main())
