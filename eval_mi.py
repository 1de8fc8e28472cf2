"""Which part of Motion Inversion does what? The two ablations that the paper does not measure.

The method (mini_mi.py) learns the motion of one clip as two embeddings in temporal attention: MQK shapes the
attention map between frames, MV adds a debiased value at every position. The paper has no numbers without one
of them; an older supplement shows clips "QK without V". Here each part is removed in two ways, trained
without it (no-mqk, no-mv) and dropped after training (drop-mqk, drop-mv), and compared with the full method
on the same clips, prompts and start noise, between two bounds: no embeddings at all below, the reference
through the autoencoder above.

    python eval_mi.py                  the default grid on the embedded model, half an hour on 2 CPU cores
    python eval_mi.py --quick          a small grid, up to 10 minutes
    python eval_mi.py --report         the report again, from the cells that are finished
    python eval_mi.py --ballot         ballot.html, a page on which people vote; --votes FILES counts them
    torchrun --nproc_per_node=8 eval_mi.py --model zeroscope --clips my_clips --frames 24 --size 576x320

A run can be killed at any time and goes on where it stopped. It leaves, in --out:

    report.html  results.md  results.svg  results.json           the answers; the picture is fit for a README
    motions/NAME-TRAINING-r0-DIGEST.safetensors            embeddings, also for mini_mi.py --motion .. --video
    cells/NAME/VARIANT-p0-s1-DIGEST.npz                  a sampled clip: prompt 0 (or "own"), sampling seed 1
    scores/NAME/VARIANT-p0-s1-DIGEST.npz                         what the judges said about it

A file that exists is not made again. DIGEST stands for everything else that determines it, so whatever is
changed (settings, clip, weights, version of this code), other files are made, and the old ones stay.

Order of this file: the question, metrics, statistics, the experiment, results, ballot, report, command line;
last the judges, CLIP and Inception. Letters: B batch, F frames, h w pixels, H W latent grid, C channels,
D feature width, L tokens, n m counts of samples or tracks, K = F-1 steps of a track.

Checked against: transformers' CLIP and pytorch-fid's Inception network (to 1e-4), hand-worked cases for every
metric, simulated coverage for the intervals of means and shares. See tests/.
"""

import base64
import collections
import contextlib
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


# ======================== THE QUESTION: what is lost without MQK, what without MV? =========================

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
    against: str = "full"           # the row that it is compared with


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
    Variant("no-mqk-plain", "no-mqk where no start noise helps: all motion must come from MV",
            "no-mqk", prior=False, against="no-inversion"),
    Variant("no-mv-plain", "no-mv where no start noise helps: all motion must come from MQK",
            "no-mv", prior=False, against="no-inversion"),
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
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"two sets of 2 or more features of one width, not {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("the features are not finite")
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


# ---------------------------------------------------------------------------------------------------- motion

def track_points(video, grid, radius=4, iterations=4):
    """Follows a grid of points through a clip: pyramidal Lucas-Kanade, frame to frame.

    video (F,h,w,3) uint8; grid: points per side -> tracks (n,F,2) as x,y in pixels, visible (n,F) bool,
    n = grid^2. Several clips (B,F,h,w,3) at once give (B,n,F,2) and (B,n,F).
    At every level of an image pyramid, coarse to fine, the displacement d of a window around p minimises
        sum_window |J(p + d + o) - I(p + o)|^2   by Gauss-Newton:   d += G^-1 sum_window grad I (I - J(d)).
    A point stays visible while it is inside the picture and leads back to itself when tracked backwards. It
    is blind beyond its window: dragged along on flat ground near a moving thing, lost at a fast turn.
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
    for before, after in itertools.pairwise(_pyramid(frame) for frame in frames):
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
    return nnf.grid_sample(picture, scaled, padding_mode="border", align_corners=False).permute(0, 2, 3, 1)


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


def paired_difference(a, b, groups=None, seed=0):
    """Is a larger than b, in pairs? a (n,), b (n,), groups (n,) labels -> (mean, low, high, p) of a - b.
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
    return *student_interval(means), float(flips.pvalue) if flips else 1.0


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


def variance_components(values):
    """Values (clips, trainings, samples) -> variances between clips, between trainings of a clip, between its
    samples, and of the rest, each what it adds to the ones after it.
    Within a clip trainings and samples are crossed, since all trainings see the same prompts and start noise:
    value = clip + training + sample + rest. None where a level has one member only: with one training the
    rest is part of the samples', and the training's part of the clips'.
    Source: Searle, Casella and McCulloch 1992, chapter 4 (balanced, negative estimates set to 0).
    """
    values = np.asarray(values, dtype=np.float64)
    trainings, samples = values.shape[1:]
    by_training, by_sample, by_clip = values.mean(2), values.mean(1), values.mean((1, 2))
    crossed, rest = trainings > 1 and samples > 1, 0.0
    if crossed:
        left = values - by_training[:, :, None] - by_sample[:, None] + by_clip[:, None, None]
        rest = float((left ** 2).sum((1, 2)).mean() / ((trainings - 1) * (samples - 1)))

    def part(means, noise):
        """The variance of one level, from its means, which hold some noise of the levels below."""
        if means.shape[-1] < 2:
            return None
        return max(0.0, float(np.var(means, axis=-1, ddof=1).mean()) - noise)

    training, sample = part(by_training, rest / samples), part(by_sample, rest / trainings)
    below = (training or 0) / trainings + (sample or 0) / samples + rest / (trainings * samples)
    return part(by_clip, below), training, sample, rest if crossed else None


def detectable_with(components, clips, trainings, samples, alpha=0.05):
    """`detectable_difference` of a run with that many clips, trainings per clip and samples per training."""
    clip, training, sample, rest = (c or 0.0 for c in components)
    error = (clip + training / trainings + sample / samples + rest / (trainings * samples)) / clips
    half = scipy.stats.t.ppf(0.975, clips - 1) * math.sqrt(error)
    return detectable_difference(half, clips, alpha=alpha)


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


def clustered_share(wins, clusters, draws=10_000, seed=0):
    """95 % interval of a share, percentile bootstrap over whole clusters of votes -> (low, high).
    wins (n,) 0 or 1, clusters (n,) labels: the votes of one person are not independent.
    """
    sizes = np.array(list(collections.Counter(clusters).values()))
    won = group_means(wins, clusters) * sizes
    if len(sizes) == 1:                                              # nothing to draw from
        return (float(np.mean(wins)),) * 2
    found = scipy.stats.bootstrap((won, sizes), lambda w, n, axis: w.sum(axis) / n.sum(axis), paired=True,
                                  vectorized=True, n_resamples=draws, method="percentile",
                                  rng=np.random.default_rng(seed))
    return tuple(map(float, found.confidence_interval))


# ========= THE EXPERIMENT: clips, trainings, variants, prompts and seeds -> samples and their scores ========

# Part of every digest. Raise it with any change of code after which a file would hold something else.
CODE_VERSION = 2
ENDS = 1 << 20                                      # bytes read at either end of a file of weights
# Files that can be a clip; beside them, pictures that move and folders.
VIDEO_SUFFIXES = set(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .wmv .flv .ogv".split())
WORLD_ATTRIBUTES = {"shape": world.SHAPES, "colour": world.COLOURS, "pattern": world.PATTERNS,
                    "background": world.BACKGROUNDS}


@dataclasses.dataclass(eq=False)
class Clip:
    """A reference clip: frames (F,h,w,3) uint8, what it shows, how it moves, and what to turn it into."""
    name: str
    frames: np.ndarray
    caption: str
    movement: str
    prompts: tuple

    def __post_init__(self):                        # stands for all that training and judging take from it
        self.digest = digest(hashlib.sha256(self.frames.tobytes()).hexdigest(), self.caption)


@dataclasses.dataclass(eq=False)
class Cell:
    """One sample of one variant: the unit of the statistics and of the files."""
    variant: Variant
    clip: Clip
    place: int                      # which of the clip's prompts; -1: its own caption
    seed: int                       # of sampling
    train_seed: int = 0

    def __post_init__(self):
        own, again = self.place < 0, f"-r{self.train_seed}" if self.train_seed else ""
        self.prompt = self.clip.caption if own else self.clip.prompts[self.place]
        self.key = self.clip.name, self.place, self.seed             # what the variants of a sample share
        self.name = f"{self.variant.name}-{'own' if own else f'p{self.place}'}-s{self.seed}{again}"


def digest(*what):
    """A short name for any JSON-able settings: 12 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(*folders):
    """Stands for the files of some folders: names, sizes, and the first and last bytes of each.
    Training moves every tensor, so that gigabytes in between would tell nothing more.
    """
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
    with open(path, "wb") as file:
        np.savez_compressed(file, **{**things, "about": json.dumps(things.get("about", {}))})


def once(path, make=None, read=read_arrays, write=write_arrays):
    """The finished thing in a file; where there is none, make() gives it and it is written, or it is None.
    A damaged file is set aside, and that is said; a killed run leaves the whole file or none.
    """
    try:
        if path.exists():
            return read(path)
    except Exception as e:                                           # damaged files raise a dozen types
        cause = e.__cause__ or e
        if isinstance(cause, PermissionError) or mini_mi.is_lack_of_memory(cause):
            raise
        aside = path.with_suffix(".damaged")
        with contextlib.suppress(FileNotFoundError):                 # another rank was first
            os.replace(path, aside)
        tqdm.write(f"warning: {path.name} is damaged ({mini_mi.one_line(e)}): set aside as "
                   f"{aside.name}, to be made again", file=sys.stderr)
    if make is None:
        return None
    thing = make()
    with mini_mi.atomic_write(path) as temporary:
        write(thing, temporary)
    return thing


def checksum(motion):
    """SHA-256 of embeddings: safetensors has none."""
    tensors = sorted(motion.state_dict().items())
    return hashlib.sha256(b"".join(v.cpu().float().numpy().tobytes() for _, v in tensors)).hexdigest()


def read_kept_motion(path):
    """Embeddings that `Lab.train` kept, in eval mode."""
    motion = mini_mi.MotionEmbeddings.load(path)
    if motion.source.get("checksum") != checksum(motion):
        raise ValueError("its checksum is another one")
    return motion


def find_clip(folder, name):
    """The clip of this name, or stem, in a folder: a video file, a picture that moves, or a folder."""
    def is_clip(path):
        """Does it move? A thumbnail, a description or subtitles do not."""
        with contextlib.suppress(OSError, ValueError), Image.open(path) as picture:
            if getattr(picture, "is_animated", False):
                return True
        return path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES or path.name == name

    found = sorted(p for p in folder.iterdir() if name in (p.name, p.stem) and is_clip(p))
    if not found:
        raise UserError(f"{folder / 'clips.json'} names {name}, but there is no such clip beside it")
    if len(found) > 1:
        raise UserError(f"{folder} holds {found[0].name} and {found[1].name}: which of them is the clip "
                        f"{name}? Write its full name in clips.json, or move one away")
    return found[0]


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
                raise UserError(f"{file}: {name} needs a caption and {s.prompt_count} prompts; "
                                "add them or lower --prompt-count")
        if rendered:
            frames = world.render(world.scene(entry["seed"], [entry["motion"]], caption), s.frames, width)
        else:
            frames = mini_mi.read_video(find_clip(file.parent, name), s.frames, (width, height))
        try:
            [world.attributes(text) for text in texts if in_world]
        except ValueError as e:
            raise UserError(f"{e}; the embedded model knows no other texts") from None
        clips.append(Clip(name, frames, caption, str(entry.get("motion", name)), texts[1:]))
    return clips


def plan(s, clips):
    """Every cell -> a list of groups, each of one clip and training; a group is a list of batches, each the
    cells of one variant that are sampled at once. It depends neither on what is finished nor on ranks.
    """
    work = []
    for clip, training in itertools.product(clips, (*TRAININGS, None)):
        for train_seed in range(s.training_seeds if training else 1):
            batches = []
            for variant in (VARIANTS[name] for name in s.variants if VARIANTS[name].training == training):
                cells = [Cell(variant, clip, place, seed, train_seed)
                         for place in ([-1] if variant.own_prompt else range(s.prompt_count))
                         for seed in range(s.seed_count if variant.sampled else 1)]
                batches += [cells[i:i + s.sample_batch] for i in range(0, len(cells), s.sample_batch)]
            work += [batches] if batches else []
    return work


def deal(lab, ranks):
    """Deals the work to ranks: the longest first, each to the one with the least so far -> lists per rank."""
    hands = [[] for _ in range(ranks)]
    for group in sorted(lab.work, key=lab.passes, reverse=True) if ranks > 1 else lab.work:
        min(hands, key=lambda hand: sum(map(lab.passes, hand))).append(group)
    return hands


def run_experiment(lab, ranks=1, rank=0):
    """Makes and judges every cell of this rank's share that is not there yet. Every step leaves a file."""
    work = deal(lab, ranks)[rank]
    # One bar over forward passes of the UNet, since a training costs as much as dozens of samples.
    with tqdm(total=sum(lab.passes(group, missing=True) for group in work), disable=rank > 0, smoothing=0,
              bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {desc}") as bar:
        for batch in itertools.chain(*work):
            if all(map(lab.is_finished, batch)):
                continue
            bar.set_description_str(f"{batch[0].clip.name}: {batch[0].variant.name}")
            # The whole batch again if one of it is missing: the same company gives the same last digits.
            samples = [once(lab.sample_path(cell)) for cell in batch]
            if not all(samples):
                samples = lab.sample(batch, bar.update)
            for cell, sample in zip(batch, samples):
                once(lab.sample_path(cell), lambda: sample)
                once(lab.score_path(cell), lambda: lab.judge(cell, sample))


class Lab:
    """Settings, clips, models, the paths of finished work, and the steps from a clip to a judged cell.
    The models load when they are first needed: a report from finished cells needs no UNet.
    """

    def __init__(self, s):
        self.settings, self.device, self.out = s, torch.device(s.device), Path(s.out)
        self.model_folder = mini_mi.model_folder(s.model)
        own = self.model_folder / "clip"
        self.clip_name = s.clip or str(own if own.is_dir() else "openai/clip-vit-base-patch32")
        # The model of the tiny world brings its own judge; the Inception network has never seen that world.
        self.in_world = s.small and Path(self.clip_name).resolve() == own.resolve()
        self.clips = read_clips(s, self.in_world)
        self.work = plan(s, self.clips)
        self.cells = [cell for group in self.work for batch in group for cell in batch]
        self.sample_passes = s.sample_steps * (2 if s.guidance > 1 else 1)      # of the UNet, for one sample
        self.training = {name: getattr(s, name)
                         for name in ("steps", "lr", "lr_schedule", "batch", "loss", "t_min")}
        parts = [self.model_folder / part for part in "unet vae text_encoder tokenizer scheduler".split()]
        self.made_with = [CODE_VERSION, fingerprint(*parts), s.frames, s.size, s.dtype, self.device.type]

    @functools.cached_property
    def models(self):
        """The text-to-video model."""
        return mini_mi.load_models(str(self.model_folder), self.device, getattr(torch, self.settings.dtype))

    @functools.cached_property
    def clip_judge(self):
        """(CLIP, its tokenizer, its preprocess)"""
        return load_clip(self.clip_name, self.device)

    @functools.cached_property
    def judged_by(self):
        """What scores depend on, beside the clip."""
        s, clip = self.settings, fingerprint(clip_folder(self.clip_name))
        return [CODE_VERSION, clip, self.in_world, s.tracker, s.grid, STILL]

    # ---- what is finished, and what is still to do

    def path(self, folder, name, *what, suffix=".npz"):
        """The place of something finished; what: everything that determines it, but for its name."""
        return self.out / folder / f"{name}-{digest(*what)}{suffix}"

    def noise_path(self, clip):
        """A clip's latents and inverted noise."""
        return self.path("noise", clip.name, self.made_with, clip.digest, self.settings.invert_steps)

    def motion_path(self, clip, training, train_seed):
        """A clip's trained embeddings."""
        return self.path("motions", f"{clip.name}-{training}-r{train_seed}", self.made_with, clip.digest,
                         train_seed, {**self.training, **TRAININGS[training]}, suffix=".safetensors")

    def sample_path(self, cell):
        """The frames of a cell."""
        s, v = self.settings, cell.variant
        noise = [self.noise_path(cell.clip).name, s.noise_prior] if v.prior else None
        motion = v.training and [self.motion_path(cell.clip, v.training, cell.train_seed).name, v.use]
        how = [s.sample_steps, s.guidance, noise, motion] if v.sampled else None
        return self.path("cells", f"{cell.clip.name}/{cell.name}", self.made_with, cell.clip.digest, cell.key,
                         cell.prompt, how)

    def score_path(self, cell):
        """What the judges said about it."""
        return self.path("scores", f"{cell.clip.name}/{cell.name}", self.sample_path(cell).name,
                         self.judged_by, cell.clip.digest)

    def is_finished(self, cell):
        """Nothing is to be done."""
        return self.sample_path(cell).exists() and once(self.score_path(cell)) is not None

    def passes(self, batches, missing=False):
        """Forward passes of the UNet for batches of one training, roughly; missing: of what is not there."""
        s, first = self.settings, batches[0][0]
        training = first.variant.training
        motion = training and self.motion_path(first.clip, training, first.train_seed)
        if missing:
            batches = [b for b in batches if not all(self.sample_path(cell).exists() for cell in b)]
        trains = batches and motion and not (missing and motion.exists())
        sampled = sum(cell.variant.sampled for batch in batches for cell in batch)
        return self.sample_passes * sampled + (3 * s.steps * s.batch if trains else 0)  # a way back counts 2

    # ---- steps

    def invert(self, clip):
        """clip -> latents (1,C,F,H,W), and the noise that leads to them (1,C,F,H,W)."""
        def make():
            """The reference as latents, and the noise that leads to them."""
            # The mean of the autoencoder's answer, so that no draw sets the clips apart; mini_mi.py draws.
            latents = mini_mi.encode_video(self.models, mini_mi.to_model_range(clip.frames))
            noise = mini_mi.ddim_invert(self.models, latents, mini_mi.encode_prompt(self.models, [""]),
                                        self.settings.invert_steps, progress=False)
            return {"latents": latents.float().cpu().numpy(), "noise": noise.float().cpu().numpy()}

        kept = once(self.noise_path(clip), make)
        return tuple(torch.from_numpy(kept[name]).to(self.device) for name in ("latents", "noise"))

    def train(self, clip, training, train_seed, progress):
        """clip -> MotionEmbeddings in eval mode; their `source` holds what they cost.
        progress: is told the forward passes that are done, after every step.
        """
        s, path = self.settings, self.motion_path(clip, training, train_seed)
        on_gpu, state = self.device.type == "cuda", path.with_suffix(".training")

        def make():
            """Trains; a clip's later trainings find its inversion made."""
            # A damaged state of an interrupted training is set aside here and not in its middle.
            once(state, read=functools.partial(torch.load, weights_only=True, map_location="cpu"))
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(self.device)
            latents = self.invert(clip)[0]          # before the clock: a clip's later trainings find it made
            began, text = time.perf_counter(), mini_mi.encode_prompt(self.models, [clip.caption])
            motion = mini_mi.train_motion(
                self.models, latents, text, **self.training, **TRAININGS[training],
                seed=train_seed, state=state, on_step=lambda *_: progress(3 * s.batch),
                checkpointing=s.checkpointing, progress=False)
            cost = {"train_seconds": time.perf_counter() - began,    # memory in MiB; a CPU does not tell
                    "memory": torch.cuda.max_memory_allocated(self.device) / 2 ** 20 if on_gpu else None,
                    "parameters": sum(p.numel() for p in motion.parameters())}
            motion.source = {"model": s.model, "prompt": clip.caption, "frames": s.frames, "size": s.size,
                             "checksum": checksum(motion), "cost": cost}
            return motion

        motion = once(path, make, read_kept_motion, mini_mi.MotionEmbeddings.save)
        state.unlink(missing_ok=True)
        return motion.to(self.device)

    def sample(self, cells, progress):
        """Cells of one clip and variant, in one batch -> their frames (F,h,w,3) uint8, and what they cost."""
        s, clip, variant = self.settings, cells[0].clip, cells[0].variant
        motion, cost = None, {"train_seconds": 0.0, "memory": None, "parameters": 0}
        if variant.training:
            motion = self.train(clip, variant.training, cells[0].train_seed, progress)
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
            progress(self.sample_passes * len(cells))
        videos = [mini_mi.to_uint8(video) for video in mini_mi.decode_video(self.models, latents)]
        cost = {**cost, "sample_seconds": (time.perf_counter() - began) / len(cells)}
        return [{"about": {"cost": cost}, "frames": video} for video in videos]

    @torch.no_grad()
    def image_features(self, frames):
        """CLIP's view of frames (F,h,w,3) uint8 -> (F,D)"""
        clip, _, preprocess = self.clip_judge
        return clip.image_features(preprocess(frames)).cpu().numpy()

    @functools.cache
    @torch.no_grad()
    def text_features(self, text):
        """CLIP's view of a text -> (D,)"""
        clip, tokenizer, _ = self.clip_judge
        return clip.text_features(tokenizer([text]).to(self.device))[0].cpu()

    @torch.no_grad()
    def measure(self, frames):
        """frames (F,h,w,3) uint8 -> features (F,D), fid_features (F or about F/4,d), tracks (n,F,2) never
        hidden"""
        features = for_fid = self.image_features(frames)
        pixels = torch.from_numpy(frames).to(self.device)
        if not self.in_world:                                        # neighbours cost much and add little
            network = InceptionV3.pretrained(self.device)
            some = pixels[::min(4, len(pixels) // 2)]                # two at least: one has no covariance
            for_fid = network(some.permute(0, 3, 1, 2).float() / 255).cpu().numpy()
        find_tracks = track_points if self.settings.tracker == "lk" else cotracker
        (tracks,), (visible,) = find_tracks(pixels[None], self.settings.grid)
        return {"features": features, "fid_features": for_fid, "tracks": tracks[visible.all(1)].numpy()}

    def reference(self, clip):
        """The reference clip through the same judges, once per clip -> what `measure` gives."""
        path = self.path("references", clip.name, clip.digest, self.judged_by)
        return once(path, lambda: self.measure(clip.frames))

    def judge(self, cell, sample):
        """What the judges say about a sample: its scores, and what they were computed from."""
        seen, reference = self.measure(sample["frames"]), self.reference(cell.clip)
        features, tracks = seen["features"], seen["tracks"]
        scores = {"text_similarity": text_similarity(features, self.text_features(cell.prompt)),
                  "motion_fidelity": motion_fidelity(tracks, reference["tracks"], still=STILL),
                  "temporal_consistency": temporal_consistency(features),
                  "leakage": appearance_leakage(features, reference["features"]),
                  **(self.attributes(cell.prompt, features) if self.in_world else {})}
        about = {"variant": cell.variant.name, "clip": cell.clip.name, "prompt": cell.prompt,
                 "place": cell.place, "seed": cell.seed, "train_seed": cell.train_seed, "scores": scores,
                 "moving_tracks": len(_steps(tracks, STILL)[0]), "tracks": len(tracks), **sample["about"]}
        return {"about": about, **seen}

    def attributes(self, prompt, features):
        """Does the clip show the prompt's shape, colour, pattern and background? Each 0 or 1, and their mean.
        For every attribute the prompt competes with the prompts in which only that attribute is another one.
        """
        own, right = world.attributes(prompt), {}
        for slot, (name, choices) in enumerate(WORLD_ATTRIBUTES.items()):
            texts = [world.describe(*own[:slot], choice, *own[slot + 1:]) for choice in choices]
            best = best_text(features, torch.stack([self.text_features(t) for t in texts]))
            right[f"shows_{name}"] = float(texts[best] == world.describe(*own))
        return {**right, "attributes": float(np.mean(list(right.values())))}

    @functools.cache
    def real_features(self, prompt, *which):
        """CLIP features (F,D) of a rendered clip of this prompt in random motion; which: names the draw."""
        scene = world.scene(int(digest("real", *which)[:8], 16), tuple(world.MOTIONS), prompt)
        return self.image_features(world.render(scene, self.settings.frames, self.clips[0].frames.shape[1]))


# ================= RESULTS: from finished cells to numbers with intervals, and to sentences =================

# A finished cell, what `Lab.judge` wrote about it, and the arrays beside that.
Sample = collections.namedtuple("Sample", "cell about arrays")


def collect(lab):
    """All results of the finished cells of the plan, as a JSON-able dict, ready for the report."""
    s, kept = lab.settings, [(cell, once(lab.score_path(cell))) for cell in lab.cells]
    samples = [Sample(cell, found["about"], found) for cell, found in kept if found]
    by_name = {name: [x for x in samples if x.cell.variant.name == name] for name in s.variants}
    by_name = {name: members for name, members in by_name.items() if members}
    if "full" not in by_name:
        raise UserError(f"{s.out} has no finished cell of this grid: leave --report out, or change --out")
    full, distances = by_name["full"], {name: distance_to_real(lab, by_name[name]) for name in by_name}
    pairs = [(name, VARIANTS[name].against) for name in by_name
             if name != "full" and not VARIANTS[name].own_prompt]
    comparisons = [compare(pair, *(by_name[name] for name in pair), *(distances[name]["of"] for name in pair))
                   for pair in pairs if pair[1] in by_name
                   and set.intersection(*({x.cell.key for x in by_name[name]} for name in pair))]
    ablations = [(c, m) for c in comparisons if c["name"] in ABLATIONS for m in PRIMARY]
    # A test of the family that was not made counts as one without a finding.
    adjusted = holm([c["metrics"][m]["p"] for c, m in ablations] + [1.0] * (FAMILY - len(ablations)))
    for (c, m), p in zip(ablations, adjusted):
        c["metrics"][m]["p_holm"] = p
    spreads = [spread(c["name"], m, by_name[c["name"]], full) for c, m in ablations]
    preferred, votes = {}, {"tests": {}, "notes": []}
    if s.votes:
        questions, variant_of, run_id = ballot_questions(lab)
        found, votes["notes"] = read_votes(s.votes, run_id, questions)
        preferred, votes["tests"] = preference(found, variant_of), preference_tests(found, variant_of)
    return {
        "settings": dataclasses.asdict(s), "finished": len(samples), "planned": len(lab.cells),
        "judges": {"clip": "the tiny CLIP" if lab.in_world else lab.clip_name,
                   "frechet": "tiny-CLIP" if lab.in_world else "Inception",
                   "tracker": f"{s.tracker}, {s.grid} x {s.grid} points",
                   "real": "rendered clips of the same prompts" if lab.in_world else
                           "the reference clips, whose content is not what the prompts ask for"},
        "rows": [row(name, by_name[name], distances[name]["row"], preferred.get(name)) for name in by_name],
        "comparisons": comparisons, "sentences": [sentence(c) for c in comparisons],
        "components": [found for found in spreads if found], "preference": votes, "chance": chance(lab, full),
        "cells": [x.about for x in samples]}


def row(name, members, distance, vote):
    """One line of the table: mean and interval of every metric, Frechet distance, votes, tracks, cost."""
    clips, about = [s.cell.clip.name for s in members], [s.about for s in members]
    moving, costs = np.array([a["moving_tracks"] for a in about]), [a["cost"] for a in about]
    return {"name": name, "expected": VARIANTS[name].expected, "n": len(members), "clips": len(set(clips)),
            "metrics": {m: student_interval(group_means([a["scores"][m] for a in about], clips))
                        for m in METRICS if m in about[0]["scores"]},
            **distance, "preference": vote, "moving_tracks": float(moving.mean()),
            "moving_share": float(np.mean(moving / [max(1, a["tracks"]) for a in about])),
            "still": int((moving == 0).sum()),
            "cost": {key: None if costs[0][key] is None else float(np.mean([cost[key] for cost in costs]))
                     for key in costs[0]}}


def distance_to_real(lab, members):
    """The Frechet distance of a variant's samples from a real set: its part of the row, and `of` some clips.
    In the tiny world the real set matches the content: for every sample a rendered clip of the same prompt
    with a random motion; a second such set gives the floor, real from real at equal n. Elsewhere the real set
    is the reference clips, and the floor their one half from the other.
    """
    clips = {s.cell.clip.name: s.cell.clip for s in members}
    names = tuple(clips)

    def per_clip(features):
        """features(sample) of all samples of each clip: name -> (n,d)."""
        return {name: np.concatenate([features(s) for s in members if s.cell.clip.name == name])
                for name in clips}

    def between(a, b, some=names, others=None):
        """The Frechet distance of two such dicts, of some clips."""
        return frechet_distance(*(np.concatenate([side[name] for name in which])
                                  for side, which in ((a, some), (b, others or some))))

    fake, floor = per_clip(lambda s: s.arrays["fid_features"]), None
    if lab.in_world:
        real, again = (per_clip(lambda s: lab.real_features(s.cell.prompt, *s.cell.key, s.cell.train_seed, n))
                       for n in (0, 1))
        floor = between(real, again)
    else:
        real = {name: lab.reference(clip)["fid_features"] for name, clip in clips.items()}
        halves = names[::2], names[1::2]
        if min(sum(len(real[name]) for name in half) for half in halves) > 1:
            floor = between(real, real, *halves)
    of = functools.cache(functools.partial(between, fake, real))
    kid = kernel_distance(*(np.concatenate([*side.values()]) for side in (fake, real)))
    return {"of": of, "row": {"frechet": jackknife(of, names), "frechet_floor": floor, "kid": kid,
                              "frames": sum(map(len, fake.values()))}}


def compare(names, ours, theirs, our_distance, their_distance):
    """Two variants: samples of the same clip, prompt and seed in pairs, clips as independent units."""
    keys = [key for key in dict.fromkeys(s.cell.key for s in ours) if key in {s.cell.key for s in theirs}]
    (name, against), clips, metrics = names, [clip for clip, *_ in keys], {}

    def scores(side, metric):
        """For every key the metric, mean over trainings."""
        return [np.mean([s.about["scores"][metric] for s in side if s.cell.key == key]) for key in keys]

    for m in [m for m in METRICS if m in ours[0].about["scores"]]:
        mean, low, high, p = paired_difference(scores(ours, m), scores(theirs, m), clips)
        alpha = 0.05 / FAMILY if name in ABLATIONS and m in PRIMARY else 0.05
        metrics[m] = {"mean": mean, "low": low, "high": high, "p": p,
                      "detectable": detectable_difference(high - mean, len(set(clips)), alpha=alpha)}
    frechet, same = None, [sorted((s.cell.key, s.cell.train_seed) for s in side) for side in (ours, theirs)]
    if same[0] == same[1]:                          # else the two distances differ in n
        frechet = jackknife(lambda some: our_distance(some) - their_distance(some), (*dict.fromkeys(clips),))
    return {"name": name, "against": against, "pairs": len(keys), "clips": len(set(clips)),
            "metrics": metrics, "frechet": frechet}


def spread(name, metric, members, full):
    """Where the spread of an ablation's differences comes from, and what other such runs would detect.
    Prompts and seeds are one level, samples. None for one clip, and while cells are missing.
    """
    ours, theirs = ({(s.cell.clip.name, s.cell.train_seed, s.cell.key[1:]): s.about["scores"][metric]
                     for s in side} for side in (members, full))
    keys = sorted(ours.keys() & theirs.keys())
    shape = [len({key[level] for key in keys}) for level in range(3)]            # clips, trainings, samples
    if shape[0] < 2 or not len(keys) == len(ours) == len(theirs) == math.prod(shape):
        return None
    parts = variance_components(np.reshape([ours[key] - theirs[key] for key in keys], shape))
    return {"name": name, "metric": metric, "shape": shape,
            "deviations": [None if part is None else math.sqrt(part) for part in parts],
            "detectable": [[*run, detectable_with(parts, *run, alpha=0.05 / FAMILY)]
                           for run in (shape, (24, 1, 8), (48, 1, 8), (60, 1, 8))]}


def chance(lab, full):
    """Motion fidelity of results against reference clips of other motions: what no likeness at all scores."""
    means = []
    for s in [s for s in full if s.cell.key[1:] == (0, 0) and s.cell.train_seed == 0]:
        others = [lab.reference(c)["tracks"] for c in lab.clips if c.movement != s.cell.clip.movement]
        found = [motion_fidelity(s.arrays["tracks"], tracks, still=STILL) for tracks in others]
        means += [np.mean(found)] if found else []
    return student_interval(means) if means else None


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
        size, verb = f"{abs(test['mean']):.3f}", "rose" if test["mean"] > 0 else "fell"
        said = f"{size} (95 % interval {test['low']:+.3f} to {test['high']:+.3f}; {p_text(p)}, {rule})"
        if not math.isfinite(test["low"]):
            parts.append(f"{title} {verb} by {size}, but one clip says nothing about chance")
        elif p < 0.05:
            # Decided by the test: a clip far out, on the side of the others, widens the interval alone.
            apart = ("" if test["low"] * test["high"] > 0 else
                     ": the test by sign flips finds it, the t interval, which single clips widen, holds 0")
            parts.append(f"{title} {verb} by {said}{apart}")
        elif test["low"] * test["high"] > 0:
            parts.append(f"{title} {verb} by {said}: a hint, not a finding")
        else:
            # All k clips of one sign give p = 2 / 2^k, times the number of tests after Holm: never less.
            power = (f"a change of {test['detectable']:.3f} would have shown in four of five such experiments"
                     if tests * 2 / 2 ** clips < 0.05 else "so few clips could not have shown any")
            parts.append(f"No change of {title} was detected: it {verb} by {said}; {power}")
    return f"{comparison['name']} against {comparison['against']}, {clips} clips: {'. '.join(parts)}."


# ============= BALLOT: User Preference, from a page that people vote on to shares with intervals ============

VOTE_FIELDS = ["run", "participant", "place", "question", "shown", "choice"]
FEW = 5                                              # participants below which shares are no result yet

# A participant's choice: the id of a candidate of that question.
Vote = collections.namedtuple("Vote", "participant question choice")
# Which candidate moves most like the reference and shows the prompt? Frames are (F,h,w,3) uint8. id and the
# keys of candidates are opaque hexadecimal numbers; every question has a candidate of every variant of the
# ballot. caption, what the reference shows, is the prompt of an attention check.
Question = collections.namedtuple("Question", "id prompt reference candidates caption", defaults=[""])


def ballot_questions(lab, most=20):
    """Questions of the ballot, from finished cells -> (list of Question, candidate id -> variant, run id).
    A candidate's id is a hash of its file: only who holds the cells can tell what it is. What a ballot asks
    is kept in ballot.json, so that votes go on counting when there are more cells; delete it to ask anew.
    """
    s, file, clips = lab.settings, lab.out / "ballot.json", {clip.name: clip for clip in lab.clips}

    def path(variant, name, place):
        """The file of a candidate."""
        return lab.sample_path(Cell(VARIANTS[variant], clips[name], place, 0))

    asked = mini_mi.read_json(file) if file.exists() else {}
    if not asked and not s.ballot:
        raise UserError(f"{file} is missing: votes need the --ballot they were given on")
    if s.ballot and asked and asked["variants"] != s.ballot_variants:
        raise UserError(f"{file} asks about {', '.join(asked['variants'])}: delete it for another ballot; "
                        "votes that were given on it will not count any more")
    if not asked:
        ready = [(name, place) for name in clips for place in range(s.prompt_count)
                 if all(path(variant, name, place).exists() for variant in s.ballot_variants)]
        if not ready:
            raise UserError(f"no prompt has a finished cell of each of {', '.join(s.ballot_variants)}")
        chosen = np.linspace(0, len(ready) - 1, min(most, len(ready))).astype(int)
        asked = {"variants": s.ballot_variants, "questions": [ready[i] for i in chosen]}
        write_text(file, json.dumps(asked))
    questions, variant_of = [], {}
    for name, place in asked["questions"]:
        if name not in clips:
            raise UserError(f"the ballot asks about {name}, which is none of these clips: take the settings "
                            f"of that run, or delete {file} for a new ballot")
        clip, candidates = clips[name], {}
        for variant in asked["variants"]:
            cell_path = path(variant, name, place)
            if (found := once(cell_path)) is None:
                raise UserError(f"the ballot shows {cell_path.name}, which is missing: take the settings of "
                                f"that run, or delete {file} for a new ballot")
            key = hashlib.sha256(cell_path.read_bytes()).hexdigest()[:12]
            candidates[key], variant_of[key] = found["frames"], variant
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
        """A hexadecimal id as long as `like`: nothing in the page marks a check."""
        return hashlib.sha256(f"{run_id} {n} ".encode() + frames.tobytes()).hexdigest()[:len(like)]

    def movement(q):
        """How much a question's reference changes from frame to frame."""
        return np.abs(np.diff(q.reference.astype(int), axis=0)).mean()

    clips = {q.reference.tobytes(): q for q in questions}            # a clip once, though it has many prompts
    moving, checks = sorted(filter(movement, clips.values()), key=movement, reverse=True), []
    for n, q in enumerate([*moving, *moving][:2]):
        stills = np.linspace(0, len(q.reference) - 1, len(q.candidates) - 1).astype(int)
        shown = [q.reference, *(np.repeat(q.reference[i:i + 1], len(q.reference), axis=0) for i in stills)]
        ids = [opaque(next(iter(q.candidates)), f"{n}.{i}", frames) for i, frames in enumerate(shown)]
        check = Question(opaque(q.id, n, q.reference), q.caption or "the same as in the reference",
                         q.reference, dict(zip(ids, shown)))
        checks.append((check, ids[0]))
    return checks


def write_ballot(path, questions, run_id, fps):
    """Writes the page on which people vote: one file that needs no server and no network.
    Participants see the questions and two attention checks, in an order of their own, and save votes-ID.csv.
    Texts reach the page as JSON with no character that could end a script, and are put in as text; the policy
    in its head lets nothing load but this style, this script and the pictures inside the page.
    """
    if len({len(q.candidates) for q in questions}) != 1 or len(questions[0].candidates) < 2:
        raise UserError("a ballot needs finished cells of at least two variants of the same prompts")
    # A worked example, which data/ballot.html explains. No motion that is tested is in it.
    right, wrong = "a yellow star on a teal plain background", "a red circle on a brown striped background"
    example = {"still": ("rest", right), "same": ("zigzag", wrong), "right": ("zigzag", right),
               "other": ("zoom_in", right)}
    clips = {key: world.render(world.scene(3, [motion], text)) for key, (motion, text) in example.items()}
    # Sorted by their opaque ids: the order in the page says nothing about variants or checks.
    shown = sorted([*questions, *(q for q, _ in attention_checks(questions, run_id))], key=lambda q: q.id)
    # Strips of small clips are lossless: enlarged on the page, they would show every trace of compression.
    data = json.dumps({"run": run_id, "fps": fps, "fields": VOTE_FIELDS, "questions": [
        {"id": q.id, "prompt": q.prompt, "reference": film_strip(q.reference),
         "candidates": {key: film_strip(q.candidates[key]) for key in sorted(q.candidates)}}
        for q in [Question("example", right, clips["same"], clips), *shown]]})
    for character in "<>&":                                      # json.dumps itself escapes all but ASCII
        data = data.replace(character, f"\\u{ord(character):04x}")
    page = (mini_mi.HERE / "data" / "ballot.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
    for kind in ("style", "script"):                             # the hash of the very text between the tags
        text = re.search(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)[1]
        policy += f"; {kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    write_text(path, page.replace("POLICY", policy, 1).replace("QUESTIONS", data, 1))


def read_votes(paths, run_id, questions):
    """Votes from files, and folders of files, that participants saved -> (list of Vote, notes).
    Each question of each participant counts once: its last answer, files taken in the order given. Whoever
    did not give the right answer to both attention checks is left out; a file that is not of this run, too.
    notes tell it, a line each. Raises UserError where a file does not exist.
    """
    checks, answers, notes, changed = attention_checks(questions, run_id), {}, [], 0
    candidates = {q.id: set(q.candidates) for q in [*questions, *(q for q, _ in checks)]}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"--votes {path}: there is no such file or folder")
        # A browser saves a second time as "votes-ID (1).csv": the longer name is the later one.
        files = sorted(path.glob("*.csv"), key=lambda f: (len(f.name), f.name)) if path.is_dir() else [path]
        notes += [] if files else [f"{path}: no .csv file in it"]
        for file in files:
            try:
                found = read_ballot(file, run_id, candidates)
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
    real = {q.id for q in questions}
    return [Vote(person, asked, choice) for (person, asked), choice in answers.items()
            if person in careful and asked in real], notes


def read_ballot(file, run_id, candidates):
    """A saved file -> (participant, question id) -> choice; ValueError says why it is none of this run.
    candidates: question id -> the ids of all that the page shows there.
    """
    found, text = {}, Path(file).read_text(encoding="utf-8-sig")
    # Spreadsheets begin a file with a mark, and some write semicolons.
    for row in csv.DictReader(io.StringIO(text), delimiter=";" if ";" in text else ","):
        if list(row) != VOTE_FIELDS or None in row.values():
            raise ValueError(f"its columns are not {','.join(VOTE_FIELDS)}")
        if row["run"] != run_id:
            raise ValueError("these votes are of another run")
        shown = candidates.get(row["question"], set())
        if not row["participant"] or row["choice"] not in shown or {*row["shown"].split("|")} != shown:
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
    names, people, found = list(dict.fromkeys(variant_of.values())), [v.participant for v in votes], {}
    note = f"a trial with fewer than {FEW} participants, not a result" if len(set(people)) < FEW else ""
    for name in names if votes else ():
        wins = [int(variant_of[v.choice] == name) for v in votes]
        low, high = zip(wilson_interval(sum(wins), len(wins)), clustered_share(wins, people))
        found[name] = {"share": sum(wins) / len(wins), "low": min(low), "high": max(high), "n": len(wins),
                       "participants": len(set(people)), "chance": 1 / len(names), "note": note}
    return found


def preference_tests(votes, variant_of):
    """Is `full` chosen more often than an ablation? -> name -> (mean, low, high, p); see `paired_difference`.
    mean: the difference of their shares, averaged over participants, whose signs are flipped as a whole.
    """
    picked, people = [variant_of[v.choice] for v in votes], [v.participant for v in votes]
    return {name: paired_difference(*([int(p == one) for p in picked] for one in ("full", name)), people)
            for name in ABLATIONS if votes and {"full", name} <= {*variant_of.values()}}


# ========================= REPORT: results.json, results.md, results.svg, report.html =======================

def write_text(path, text):
    """Writes a text file, or leaves the old one."""
    with mini_mi.atomic_write(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8", newline="\n")


def number(value, form=".3f"):
    """0.1234 -> "0.123"; what is missing or not finite is a dash."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def plus_minus(triple, form=".3f"):
    """(mean, low, high) around the mean -> "0.123 ± 0.022"."""
    return f"{number(triple[0], form)} ± {number(triple[2] - triple[0])}" if triple else "–"


def document(results):
    """What results.md and report.html both say: name -> sentences, or a table as a list of (head -> text)."""
    rows, judges, preference = results["rows"], results["judges"], results["preference"]
    parts, distance = collections.defaultdict(list), f"Fréchet distance ({judges['frechet']} features) ↓"
    for r in rows:
        vote, cost, metrics = r["preference"], r["cost"], [
            (METRICS[m], plus_minus(interval)) for m, interval in r["metrics"].items()]
        voted = f"{vote['share']:.2f} ({vote['low']:.2f} to {vote['high']:.2f})" if vote else "–"
        # The first three metrics, the distance and the votes are the paper's five.
        parts["main"].append({
            "variant": r["name"], **dict(metrics[:3]), distance: plus_minus(r["frechet"]),
            "User Preference ↑": voted, **dict(metrics[3:]), "n (clips)": f"{r['n']} ({r['clips']})"})
        parts["details"].append({
            "variant": r["name"], "frames": str(r["frames"]),
            "Fréchet, real from real": number(r["frechet_floor"]), "KID x 1000": number(1000 * r["kid"]),
            "moving tracks": f"{r['moving_tracks']:.0f} ({100 * r['moving_share']:.0f} %)",
            "samples without any": str(r["still"]), "training s": number(cost["train_seconds"], ".1f"),
            "sampling s": number(cost["sample_seconds"], ".2f"),
            "training memory, MiB of GPU": number(cost["memory"], ".0f"),
            "embedding parameters": number(cost["parameters"], ",.0f")})
    for c, said in zip(results["comparisons"], results["sentences"]):
        parts["answers" if c["name"] in ABLATIONS else "others"].append(said)
        parts["differences"].append({"difference": f"{c['name']} (from {c['against']})", **{
            METRICS[m]: plus_minus((t["mean"], t["low"], t["high"]), "+.3f")
            + (f" ({p_text(t['p_holm'])}, Holm)" if "p_holm" in t else f" ({p_text(t['p'])})")
            for m, t in c["metrics"].items()}, distance: plus_minus(c["frechet"], "+.3f")})
    for c in results["components"]:
        levels = zip(("deviation between clips", "between trainings", "between samples", "rest"),
                     c["deviations"])
        runs = ((f"detectable with {clips} x {trainings} x {samples}", least)
                for clips, trainings, samples, least in c["detectable"])
        parts["spread"].append({"difference from full": f"{c['name']}, {METRICS[c['metric']][:-2]}",
                                **{head: number(value) for head, value in (*levels, *runs)}})
    people = {r["name"]: r["preference"] for r in rows if r["preference"]}
    parts["expected"] = [f"{r['name']}: {r['expected']}" for r in rows]
    parts["notes"] = [
        f"Judges: {judges['clip']} for texts and frames; tracker {judges['tracker']}. The Fréchet distance "
        f"compares {judges['frechet']} features with those of {judges['real']}.",
        "Chance level of Motion Fidelity, against reference clips of other motions: "
        f"{plus_minus(results['chance'])}.",
        *(f"User Preference, full against {name}: {plus_minus(test, '+.3f')} of the votes, {p_text(p)} "
          "by sign flips over participants." for name, (*test, p) in preference["tests"].items()),
        *(f"User Preference of {name}: {v['n']} votes of {v['participants']} people, chance {v['chance']:.3f}"
          f"{v['note'] and ': ' + v['note']}." for name, v in people.items()), *preference["notes"]]
    if not people:
        parts["notes"].append("User Preference: no votes yet. eval_mi.py --ballot writes the page on which "
                              "people vote, and eval_mi.py --votes FILE... counts them.")
    if results["finished"] < results["planned"]:
        parts["notes"].append(f"Unfinished: {results['finished']} of {results['planned']} cells.")
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
        """The cells of a line of the table; what is in parentheses goes to a smaller line."""
        small = (re.sub(r" (\(.*)", r"<small>\1</small>", html.escape(text)) for text in texts)
        return f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in small)}</tr>"

    if part and isinstance(part[0], dict):
        return (f'<div class="scroll"><table><thead>{cells("th", part[0])}</thead><tbody>'
                f"{''.join(cells('td', line.values()) for line in part)}</tbody></table></div>")
    return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in part)}</ul>"


def panel(title, marks, left, top, names=True, bars=False, level=None):
    """One metric of some variants in SVG: each mean as a point or a bar, its interval as a line across it.
    marks: variant -> (mean, low, high), or None; left, top: corner of the plot, which has the title above it
    and, if asked for, the names on its left; level: (value, name) of a line to compare with.
    """
    level_at, level_name = level or (0.0, "")
    shown = (v for triple in marks.values() for v in triple or () if math.isfinite(v))
    ends = sorted([0.0, level_at, *shown])
    unit, bottom = 180 / max(ends[-1] - ends[0], 1e-9), top + 19 * len(marks)
    x = {v: round(left + 12 + unit * (v - ends[0]), 1) for v in ends}
    out = [f'<text class="title" x="{left}" y="{top - 6}">{html.escape(title)}</text>',
           f'<path d="M{x[0.0]} {top}V{bottom}"/>']
    for y, (name, triple) in zip(range(top + 10, bottom, 19), marks.items()):
        if names:
            out.append(f'<text x="{left - 4}" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>')
        if not triple:
            continue
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
    ticks = {v: number(v, "+.2f") for v in (ends[0], ends[-1]) if not bars and abs(x[v] - x[0.0]) > 34}
    ticks[0.0] = "0"
    if level:
        ticks = {level_at: f"{level_name} {number(level_at)}"}
        out.append(f'<path d="M{x[level_at]} {top}V{bottom}" stroke-dasharray="3 3"/>')
    return "".join([*out, *(f'<text x="{x[v]}" y="{bottom + 14}" text-anchor="middle">{text}</text>'
                            for v, text in ticks.items())])


def pictures(results):
    """In SVG: the forest plot, every metric's difference from full, a panel each; and the metrics as bars."""
    def svg(label, width, height, *panels):
        """A picture of `panel`s."""
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
                f'aria-label="{html.escape(label)}">{"".join(panels)}</svg>')

    rows, left = results["rows"], 132                                                # names are on the left
    # Variants from plain noise answer another question, and lie so far off that all others would be squeezed.
    comparisons = [c for c in results["comparisons"] if VARIANTS[c["name"]].prior]
    floor, chance_level = rows[0]["frechet_floor"], results["chance"] and (results["chance"][0], "chance")
    levels = {"motion_fidelity": chance_level, "frechet": None if floor is None else (floor, "real")}
    titles = {**METRICS, "frechet": f"Fréchet distance ({results['judges']['frechet']}) ↓"}
    points, bars, width, height = [], [], 236, 19 * len(comparisons) + 58
    for n, m in enumerate([*rows[0]["metrics"], "frechet"]):
        tests = {c["name"]: c["metrics"].get(m) or c["frechet"] for c in comparisons}
        marks = {name: [t["mean"], t["low"], t["high"]] if m != "frechet" else t for name, t in tests.items()}
        points.append(panel(titles[m], marks, left + n % 3 * width, n // 3 * height + 22, names=n % 3 == 0))
        marks = {r["name"]: r["metrics"].get(m, r["frechet"]) for r in rows}
        bars.append(svg(titles[m], 380, 19 * len(rows) + 42,
                        panel(titles[m], marks, left, 22, bars=True, level=levels.get(m))))
    return svg("Differences from full", left + 3 * width, height * -(-len(points) // 3), *points), bars


def data_uri(picture, kind="PNG", **options):
    """A PIL picture as the text that an <img> can hold."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


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


def clip_rows(lab, most=12):
    """For the first clips and each prompt the reference and the first seed of every variant, as HTML."""
    def moving(frames, label):
        """A clip as a figure that the style sheet moves: all clips of the page keep step."""
        count, height, width, _ = frames.shape
        return (f'<figure><div class="clip {label}" role="img" aria-label="{label}" '
                f'style="--frames: {count}; aspect-ratio: {width} / {height}; '
                f'background-image: url({film_strip(frames, most=192, lossless=0)["src"]})"></div>'
                f"<figcaption>{label}</figcaption></figure>")

    parts, s = [], lab.settings
    for clip, place in itertools.product(lab.clips[:most], (*range(s.prompt_count), -1)):
        cells = {c.variant.name: c for c in lab.cells if c.key == (clip.name, place, 0) and not c.train_seed}
        shown = [moving(found["frames"], name) for name in s.variants
                 if name in cells and (found := once(lab.sample_path(cells[name])))]
        text = f"its own caption: {clip.caption}" if place < 0 else f"prompt: {clip.prompts[place]}"
        parts += [f"<h3>{html.escape(clip.name)}</h3>"] if place == 0 else []
        parts += [f'<p class="soft">{html.escape(text)}</p><div class="clips">'
                  f'{moving(clip.frames, "reference")}{"".join(shown)}</div>'] if shown else []
    return "".join(parts)


@torch.no_grad()
def look_inside(lab):
    """The first injected layer with the first clip's embeddings -> arrays, kept in a file; None before that.
    without_mqk, with_mqk   attention maps (F,F), query frame by key frame, mean over heads and positions
    mv_raw, mv_debiased     norm of MV over channels (F,H,W)
    """
    clip, models = lab.clips[0], None if lab.settings.report else lab.models        # a report loads no UNet
    trained = lab.motion_path(clip, "full", 0)
    motion = models and once(trained, read=read_kept_motion)

    def make():
        """Attention maps and norms of MV, from one pass of the UNet without MQK and one with it."""
        latents, seen, arrays = lab.invert(clip)[0], [], {}
        block = min(motion.to(lab.device).grids)                     # a file has them in no certain order
        grid, t = motion.grids[block], math.ceil(max(0.5, motion.t_min) * models.scheduler.T)
        attention = models.unet.get_submodule(block).attn1
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
        noisy = models.scheduler.add_noise(latents, noise, t)
        for motion.use_mqk, name in ((False, "without_mqk"), (True, "with_mqk")):
            with attention.register_forward_pre_hook(lambda _, reads: seen.append(reads[0])):
                mini_mi.predict(models, noisy, t, mini_mi.encode_prompt(models, [clip.caption]), motion)
            q, k = (part(seen[-1]).float().flatten(0, -3).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
                    for part in (attention.to_q, attention.to_k))                # (H*W, heads, F, d_k)
            arrays[name] = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).mean((0, 1)).cpu().numpy()
        for name in ("mv_raw", "mv_debiased"):
            motion.train(name == "mv_raw")                           # in training MV is added as it is
            _, m_v = motion.for_attention(block, "attn1", latents.shape[2], grid)    # (H*W, F, C)
            arrays[name] = m_v.norm(dim=-1).T.unflatten(1, grid).cpu().numpy()
        return {"about": {"block": block, "clip": clip.name}, **arrays}

    return once(lab.out / "figures" / f"{trained.stem}.npz", make if motion else None)


def figures(arrays):
    """The tutorial figures as HTML: what MQK does to the attention map, what debias does to MV."""
    def picture(values, low, high, name):
        """An array (h,w) as an <img>: pale yellow (low) over red to dark violet (high)."""
        grey = np.clip((values - low) / max(high - low, 1e-9), 0, 1) * 255
        image = ImageOps.colorize(Image.fromarray(grey.astype(np.uint8)), "#fdf4dc", "#3c0f4b", mid="#df7346")
        return f'<img class="pixels" alt="{name}" src="{data_uri(image)}">'

    # Both pictures of a pair share one scale; its ends leave out the extremes, which would pale all the rest.
    ends = np.quantile([arrays["without_mqk"], arrays["with_mqk"]], [0.02, 0.98])
    high = np.quantile([arrays["mv_raw"], arrays["mv_debiased"]], 0.95)
    rows = [("attention without MQK", arrays["without_mqk"][None], *ends),
            ("attention with MQK", arrays["with_mqk"][None], *ends),
            ("MV as trained", arrays["mv_raw"], 0, high),
            ("MV debiased, as used", arrays["mv_debiased"], 0, high)]
    return "".join(f'<figure><h3>{title}</h3><div class="frames">'
                   f"{''.join(picture(one, *scale, title) for one in shown)}</div></figure>"
                   for title, shown, *scale in rows)


def write_report(lab, run):
    """Writes the four files of the report from the finished cells; prints the table and the sentences."""
    results, page = {"run": run, **collect(lab)}, mini_mi.HERE / "data" / "report.html"
    parts, (forest, bars), inside = document(results), pictures(results), look_inside(lab)
    # JSON has no infinity: what is not finite becomes null.
    known = json.loads(json.dumps(results), parse_constant=lambda name: None)
    write_text(lab.out / "results.json", json.dumps(known, indent=1))
    page, cells = page.read_text(encoding="utf-8"), f"{results['finished']} of {results['planned']} cells"
    style = re.search("<style>.*?</style>", page, re.DOTALL)[0]
    write_text(lab.out / "results.svg", forest.replace(">", f">{style}", 1))
    order = "main", "others", "differences", "spread", "details", "notes"
    write_text(lab.out / "results.md", "\n\n".join([
        as_markdown(parts["answers"]), "![Differences from the full method, 95 % intervals](results.svg)",
        *(as_markdown(parts[name]) for name in order),
        f"`{run['command']}`, {run['date']}, {run['machine']}, {run['minutes']:.1f} minutes "
        f"for {run['computed']} of {results['planned']} cells"]) + "\n")
    write_text(lab.out / "report.html", string.Template(page).substitute(
        {name: as_html(parts[name]) for name in ("answers", "expected", *order)}, forest=forest,
        bars="".join(bars), clips=clip_rows(lab), figures=figures(inside) if inside else "",
        run=html.escape(" · ".join([run["command"], run["date"], run["machine"], cells]))))
    table = [parts["main"][0], *(line.values() for line in parts["main"])]
    print("\n" + "\n".join("".join(f"{text:27}" for text in list(line)[:5]).rstrip() for line in table))
    print("\n" + "\n".join(results["sentences"]) + f"\n\n{lab.out / 'report.html'}")


# =============================================== COMMAND LINE ===============================================

# As mini_mi.py does it, but that two numbers of steps are smaller for the embedded model, to save time.
DEFAULTS = {"tiny": {**mini_mi.MODEL_DEFAULTS["tiny"], "sample_steps": 15, "invert_steps": 25},
            "other": {**mini_mi.MODEL_DEFAULTS["other"], "invert_steps": mini_mi.INVERT_STEPS}}
COUNT = 1, 1e6
AFTERWARDS = "out", "report", "ballot", "ballot_variants", "votes"        # settings that no cell depends on


@dataclasses.dataclass
class Settings(mini_mi.SharedConfig):
    """Everything that a user can set; the command line is made from it."""
    model: str = option("tiny", "the embedded model (tiny), zeroscope, a hub repository or a model folder")
    clip: str = option(None, "CLIP folder or repository (default: MODEL/clip, else OpenAI's ViT-B/32)")
    clips: str = option(None, "folder with clips.json: NAME -> caption, motion, prompts (default: rendered "
                              "for the embedded model, else data/clips, of 16 frames)")
    split: str = option("test", "which clips of the embedded world", choices=("test", "validation"))
    out: str = option("out/eval", "folder for the cells and the report; a second run goes on there")
    variants: str = option(",".join(DEFAULT_VARIANTS),
                           f"what to compare, most with full: {', '.join(VARIANTS)}")
    clip_count: int = option(12, "clips; the embedded world has any number", within=COUNT)
    prompt_count: int = option(2, "target prompts per clip", within=COUNT)
    seed_count: int = option(2, "sampling seeds per prompt", within=COUNT)
    training_seeds: int = option(1, "trainings of each kind per clip; 2 tell the spread", within=COUNT)
    invert_steps: int = option(None, "steps of the inversion that gives the start noise", within=COUNT)
    sample_batch: int = option(4, "samples made at once: 4 suits a CPU, a GPU likes more", within=COUNT)
    tracker: str = option("lk", "built-in Lucas-Kanade, or CoTracker 3, fetched", choices=("lk", "cotracker"))
    grid: int = option(16, "tracked points per side; the paper's CoTracker takes 55", within=COUNT)
    dtype: str = option(None, "of the UNet (default: float16 for large models on CUDA, else float32)",
                        choices=("float32", "bfloat16", "float16"))
    quick: bool = option(False, "a small grid, to see it work: 3 clips, 1 prompt, 1 seed")
    report: bool = option(False, "only rebuild the report, from the cells that are finished")
    ballot: bool = option(False, "only write ballot.html, on which people vote, from finished cells")
    ballot_variants: str = option("full,no-mqk,no-mv,base", "what people choose from")
    votes: list = option(None, "count these files, and folders of files, that voters saved, in a new report")
    fps: int = None                 # of the ballot; no option
    small: bool = False             # a model of the embedded world: data/make_tiny.py's UNets are narrow


def parse(argv=None):
    """Command line -> checked Settings, with the model's defaults for what was not given."""
    s = mini_mi.parse_options(Settings, argv, "eval_mi.py", __doc__, DEFAULTS)
    s.small = mini_mi.model_defaults(s.model) is mini_mi.MODEL_DEFAULTS["tiny"]
    for name, value in DEFAULTS["tiny" if s.small else "other"].items():
        if getattr(s, name) is None:
            setattr(s, name, value)
    mini_mi.check_ranges(s)
    s.device = mini_mi.pick_device(s.device)
    if s.device == "cuda":                         # under torchrun every process of a machine takes its own
        s.device = mini_mi.pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    s.dtype = s.dtype or ("float16" if s.device.startswith("cuda") and not s.small else "float32")
    for name, first in (("variants", ["full"]), ("ballot_variants", [])):
        names = list(dict.fromkeys(first + getattr(s, name).replace(",", " ").split()))
        if unknown := [n for n in names if n not in VARIANTS]:
            raise UserError(f"--{name.replace('_', '-')}: {unknown[0]} is none of {', '.join(VARIANTS)}")
        if first:                                                # and what some of them are held against
            names = list(dict.fromkeys(names + [VARIANTS[n].against for n in names]))
        setattr(s, name, names)
    if any(VARIANTS[n].own_prompt for n in s.ballot_variants) or len(s.ballot_variants) < 2:
        raise UserError("--ballot-variants takes two or more variants that show the target prompts")
    if s.ballot and s.votes:
        raise UserError("--ballot writes a page and --votes counts what came back: one after the other")
    s.report |= s.ballot or bool(s.votes)                              # both need no more than finished cells
    if s.quick:
        s.clip_count, s.prompt_count, s.seed_count = min(3, s.clip_count), 1, 1
    return s


def run(s):
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
            lab = Lab(s)
            missing = sum(not lab.is_finished(cell) for cell in lab.cells)
            if not s.report:
                # What cannot work shows now and not after hours: schedules too short, judges not there.
                lab.models.scheduler.timesteps(s.sample_steps, s.t_min)
                lab.models.scheduler.timesteps(s.invert_steps)
                lab.measure(lab.clips[0].frames)
        wait()
    if not s.report:
        run_experiment(lab, ranks, rank)
        wait()
    if rank == 0 and s.ballot:
        path, (questions, _, run_id) = lab.out / "ballot.html", ballot_questions(lab)
        write_ballot(path, questions, run_id, s.fps)
        print(f"{path}: {len(questions)} questions and two attention checks; give it to people as it is, and "
              "count what they save with --votes")
    elif rank == 0:
        machine = (torch.cuda.get_device_name(lab.device) if lab.device.type == "cuda"
                   else f"{os.cpu_count()} CPU cores ({platform.machine()})")
        about = {"command": " ".join(["python eval_mi.py", *map(shlex.quote, sys.argv[1:])]),
                 "date": time.strftime("%Y-%m-%d"), "machine": machine, "ranks": ranks,
                 "computed": 0 if s.report else missing, "minutes": (time.perf_counter() - began) / 60,
                 "versions": {"python": platform.python_version(), "torch": torch.__version__,
                              "numpy": np.__version__, "scipy": scipy.__version__}}
        if s.report and (lab.out / "results.json").exists():           # rebuilt: of that run, if of its grid
            older = mini_mi.read_json(lab.out / "results.json")
            grid = {key: value for key, value in dataclasses.asdict(s).items() if key not in AFTERWARDS}
            if grid.items() <= older.get("settings", {}).items():
                about = older.get("run", about)
        write_report(lab, about)
    if ranks > 1:
        torch.distributed.destroy_process_group()


def main(argv=None):
    """Entry point of the command line; returns the exit status."""
    return mini_mi.guarded(lambda: run(parse(argv)))


# =========== APPENDIX, THE JUDGES: CLIP and Inception, with the keys of the published weight files ==========

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
    return Path(name) if Path(name).is_dir() else mini_mi.fetch(name, "")


def load_clip(name, device="cpu"):
    """A CLIP folder in HF layout, or a hub repository -> (model, tokenizer, preprocess).
    preprocess: frames (F,h,w,3) uint8 -> pixels (F,3,s,s): bicubic to s on the short side, centre crop,
    CLIP's mean and std. It rounds to 8 bits after resizing, as CLIP's own code for PIL pictures does.
    """
    folder = clip_folder(name)
    model = mini_mi.load_module(CLIPModel, folder, "model", device, torch.float32)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))

    def preprocess(frames):
        """frames (F,h,w,3) uint8 -> pixels (F,3,s,s) float32, normalised"""
        x = torch.as_tensor(frames).to(device).permute(0, 3, 1, 2).float()
        s, (height, width) = model.vision_model.image_size, x.shape[-2:]
        size = (s, int(s * width / height)) if height <= width else (int(s * height / width), s)
        if size != (height, width):
            x = nnf.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
        top, left = (size[0] - s) // 2, (size[1] - s) // 2
        return (x[..., top:top + s, left:left + s].round().clamp(0, 255) / 255 - mean) / std

    with mini_mi.built_from(folder):
        tokenizer = mini_mi.CLIPTokenizer.from_pretrained(folder)
    return model, tokenizer, preprocess


# Inception's modules in order, and their branches; the names are those of the weight file. A branch is a
# chain of layers CHANNELS:KERNEL; KERNEL/STRIDE has no padding, a KERNEL alone keeps the size, | forks one.
# A block with the branch _pool pools before it; one without halves the size, its pool is a branch of its own.
MIXED_5 = "1x1 64:1, 5x5 48:1 64:5, 3x3dbl 64:1 96:3 96:3, _pool {}:1"
MIXED_6 = ("1x1 192:1, 7x7 {0}:1 {0}:1x7 192:7x1, 7x7dbl {0}:1 {0}:7x1 {0}:1x7 {0}:7x1 192:1x7, "
           "_pool 192:1")                           # a 7x7 convolution as two of 1x7 and 7x1
MIXED_7 = "1x1 320:1, 3x3 384:1 384:1x3|384:3x1, 3x3dbl 448:1 384:3 384:1x3|384:3x1, _pool 192:1"
INCEPTION = {
    "Conv2d_1a_3x3": "32:3/2", "Conv2d_2a_3x3": "32:3/1", "Conv2d_2b_3x3": "64:3",
    "Conv2d_3b_1x1": "80:1", "Conv2d_4a_3x3": "192:3/1",
    "Mixed_5b": MIXED_5.format(32), "Mixed_5c": MIXED_5.format(64), "Mixed_5d": MIXED_5.format(64),
    "Mixed_6a": "3x3 384:3/2, 3x3dbl 64:1 96:3 96:3/2",
    **{f"Mixed_6{name}": MIXED_6.format(width) for name, width in zip("bcde", (128, 160, 160, 192))},
    "Mixed_7a": "3x3 192:1 320:3/2, 7x7x3 192:1 192:1x7 192:7x1 192:3/2",
    "Mixed_7b": MIXED_7, "Mixed_7c": MIXED_7}


def inception_branches(table):
    """A row of the table -> (branch, its layers as dicts of key -> CHANNELS:KERNEL, two where it forks)"""
    for name, *layers in (branch.split() for branch in table.split(", ")):
        ends = [f"_{n}" for n in range(1, len(layers) + 1)] if len(layers) > 1 else [""]
        yield name, [{f"branch{name}{end}{fork}": part for fork, part in zip(
            "ab" if "|" in layer else [""], layer.split("|"))} for end, layer in zip(ends, layers)]


def inception_conv(c_in, layer):
    """Convolution, BatchNorm, ReLU."""
    channels, kernel, stride = re.fullmatch(r"(\d+):(\w+)/?(\d*)", layer).groups()
    sides = [int(side) for side in kernel.split("x")] * (1 if "x" in kernel else 2)
    conv = nn.Conv2d(c_in, int(channels), sides, int(stride or 1), bias=False,
                     padding=0 if stride else [side // 2 for side in sides])
    named = {"conv": conv, "bn": nn.BatchNorm2d(int(channels), eps=0.001), "relu": nn.ReLU()}
    return nn.Sequential(collections.OrderedDict(named))


class InceptionV3(nn.Module):
    """The network of FID: x (B,3,h,w) in [0,1] -> pooled features (B,2048).

    Weights: pt_inception-2015-12-05, the FID paper's TensorFlow network ported by pytorch-fid; its keys. Not
    torchvision's: averages ignore padding, the last block pools by maximum, 1008 classes.
    """

    URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
           "pt_inception-2015-12-05-6726825d.pth")

    def __init__(self):
        super().__init__()
        width = 3
        for name, table in INCEPTION.items():
            if name.startswith("Conv2d"):
                self.add_module(name, inception_conv(width, table))
                width = self.get_submodule(name).conv.out_channels
                continue
            block, widths = nn.ModuleDict(), [] if "_pool" in table else [width]
            for _, chain in inception_branches(table):
                c = width
                for layers in chain:
                    block.update({key: inception_conv(c, layer) for key, layer in layers.items()})
                    c = sum(block[key].conv.out_channels for key in layers)
                widths.append(c)
            self.add_module(name, block)
            width = sum(widths)
        self.fc = nn.Linear(width, 1008)                                # in the file, not in the features

    @classmethod
    @functools.cache
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
        for name, table in INCEPTION.items():
            block = self.get_submodule(name)
            if name.startswith("Conv2d"):
                x = block(x)
                x = nnf.max_pool2d(x, 3, 2) if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3") else x
                continue
            # The published network does not count the padding in its averages.
            pooled = (nnf.max_pool2d(x, 3, 2) if "_pool" not in table else nnf.max_pool2d(x, 3, 1, 1)
                      if name == "Mixed_7c" else nnf.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
            out = []
            for branch, chain in inception_branches(table):
                out.append(pooled if branch == "_pool" else x)
                for layers in chain:
                    out[-1] = torch.cat([block[key](out[-1]) for key in layers], dim=1)
            x = torch.cat(out if "_pool" in table else [*out, pooled], dim=1)
        return x.mean(dim=(2, 3))


if __name__ == "__main__":
    sys.exit(main())
