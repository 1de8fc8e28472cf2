"""The metrics: hand-worked values, properties that must hold, and the tracker on known motions."""
import numpy as np
import pytest
import scipy.linalg
import torch

import eval_mi
from data import world


def tracks_of(*paths):
    """Paths, each a list of x,y -> tracks (n,F,2)."""
    return np.array(paths, dtype=float)


def straight(dx, dy, frames=6, start=(10, 10)):
    return [(start[0] + dx * k, start[1] + dy * k) for k in range(frames)]


# --------------------------------------------------------------------------------------------- frame features

def test_text_similarity_is_a_mean_of_cosines_whatever_the_lengths():
    frames = np.array([[3.0, 0], [0, 5], [2, 2]])
    assert eval_mi.text_similarity(frames, np.array([7.0, 0])) == pytest.approx((1 + 0 + 0.5 ** 0.5) / 3)
    assert eval_mi.text_similarity(torch.tensor(frames), torch.tensor([-7.0, 0])) == pytest.approx(
        -(1 + 0.5 ** 0.5) / 3)


def test_temporal_consistency_compares_neighbours():
    frames = np.array([[1.0, 0], [0, 2], [0, 3]])
    assert eval_mi.temporal_consistency(frames) == pytest.approx(0.5)              # not the 1/3 of all pairs
    assert eval_mi.temporal_consistency(np.ones((5, 3))) == pytest.approx(1)       # a frozen clip
    with pytest.raises(ValueError):
        eval_mi.temporal_consistency(np.ones((1, 3)))


def test_appearance_leakage_is_the_mean_over_all_pairs():
    assert eval_mi.appearance_leakage([[1.0, 0], [0, 1]], [[2.0, 0]]) == pytest.approx(0.5)


def test_best_text_takes_the_best_on_average():
    frames = [[1.0, 0.2], [0.1, 0.3], [1, 0]]
    assert eval_mi.best_text(frames, [[0.0, 1], [1, 0]]) == 1


# --------------------------------------------------------------------------------- distances of distributions

def test_frechet_distance_of_known_gaussians():
    """Diagonal covariances: |mu1-mu2|^2 + sum (sigma1 - sigma2)^2, from samples with exactly these
    moments."""
    base = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)       # covariance 1 with N-1
    x, y = base * [1, 2], base * [3, 2.5] + [1, -2]
    assert eval_mi.frechet_distance(x, y) == pytest.approx(1 + 4 + 2 ** 2 + 0.5 ** 2)


@pytest.mark.parametrize("n, m, d", [(40, 50, 6), (5, 9, 20), (30, 8, 12)])
def test_frechet_distance_equals_the_matrix_square_root(n, m, d):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) + 1
    s1, s2 = np.cov(x.T), np.cov(y.T)
    # tr (S1 S2)^(1/2) by the eigenvalues of S1^(1/2) S2 S1^(1/2), which stays symmetric
    values, vectors = scipy.linalg.eigh(s1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(scipy.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross
    assert eval_mi.frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)


def test_distance_of_a_set_from_itself_is_zero():
    x = torch.randn(30, 64)
    assert eval_mi.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert eval_mi.frechet_distance(x, x[torch.randperm(30)]) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_by_hand_and_unbiased():
    x, y = np.array([[0.0, 0], [2, 0]]), np.array([[0.0, 0], [0, 2]])
    # k(a,b) = (a.b/2 + 1)^3: within x 1, within y 1, between: all 1
    assert eval_mi.kernel_distance(x, y) == pytest.approx(1 + 1 - 2 * 1)
    rng = np.random.default_rng(1)
    values = [eval_mi.kernel_distance(*rng.normal(size=(2, 12, 4))) for _ in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20 and min(values) < 0


@pytest.mark.parametrize("bad", [np.full((3, 2), np.nan), np.ones((1, 2)), np.ones((3, 5)), np.ones(3)])
def test_distances_refuse_what_has_no_answer(bad):
    for distance in (eval_mi.frechet_distance, eval_mi.kernel_distance):
        with pytest.raises(ValueError):
            distance(np.ones((4, 2)), bad)


# -------------------------------------------------------------------------------------------- motion fidelity

def test_motion_fidelity_of_identical_and_opposite_motion():
    a = np.cumsum(np.random.default_rng(0).normal(size=(7, 9, 2)) * 3, axis=1)
    assert eval_mi.motion_fidelity(a, a) == 1
    right = tracks_of(straight(2, 0))
    assert eval_mi.motion_fidelity(right, tracks_of(straight(-5, 0))) == -1
    assert eval_mi.motion_fidelity(right, tracks_of(straight(0, 3))) == pytest.approx(0)
    # Not speed, not place.
    assert eval_mi.motion_fidelity(right, tracks_of(straight(9, 0, start=(50, 3)))) == 1


def test_motion_fidelity_by_hand_with_two_directions_and_a_rest():
    a = tracks_of(straight(2, 0), straight(0, 2))
    b = tracks_of(straight(2, 0))
    assert eval_mi.motion_fidelity(a, b) == pytest.approx(((1 + 0) / 2 + 1) / 2)
    assert eval_mi.motion_fidelity(b, a) == pytest.approx(((1 + 0) / 2 + 1) / 2)             # symmetric
    # steps: still, right, right, right against right, right, still, still
    late, early = tracks_of([(0, 0), (0, 0), (2, 0), (4, 0), (6, 0)]), tracks_of(
        [(0, 0), (2, 0), (4, 0), (4, 0), (4, 0)])
    assert eval_mi.motion_fidelity(late, early) == pytest.approx(1 / 4)
    both = tracks_of([(0, 0), (2, 0), (2, 0), (4, 0)])
    assert eval_mi.motion_fidelity(both, both) == 1                                         # still in both: 1


def test_static_tracks_do_not_mask_opposite_motion_and_give_no_nan():
    still = [straight(0, 0, start=(k, k)) for k in range(30)]
    a, b = tracks_of(*still, straight(2, 0)), tracks_of(*still, straight(-2, 0))
    assert eval_mi.motion_fidelity(a, b) == -1
    rest, none = tracks_of(*still), np.zeros((0, 6, 2))
    assert eval_mi.motion_fidelity(rest, rest) == eval_mi.motion_fidelity(none, rest) == 1
    assert eval_mi.motion_fidelity(rest, a) == eval_mi.motion_fidelity(a, none) == 0


def test_motion_fidelity_refuses_what_has_no_answer():
    a = tracks_of(straight(1, 0))
    for bad in (a[:, :3], a[:, :1], np.full_like(a, np.nan), a[0]):
        with pytest.raises(ValueError):
            eval_mi.motion_fidelity(a, bad)
    with pytest.raises(ValueError):
        eval_mi.motion_fidelity(a, a, mode="median")


def test_dmt_mode_reproduces_the_published_code():
    """Line by line what motion_fidelity_score.py does, its flaws included."""
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(12, 9, 2, generator=rng).cumsum(1) for _ in range(2))
    da, db = a[:, 1:] - a[:, :-1], b[:, 1:] - b[:, :-1]
    da, db = da / da.norm(dim=-1, keepdim=True), db / db.norm(dim=-1, keepdim=True)
    matrix = torch.einsum("ntc, mtc -> nmt", da, db).mean(dim=-1) - torch.eye(12)
    expected = matrix.max(dim=1)[0].mean().item()
    assert eval_mi.motion_fidelity(a, b, mode="dmt") == pytest.approx(expected, abs=1e-6)
    assert eval_mi.motion_fidelity(a, a, mode="dmt") < 0.9                                   # identical clips
    a[0] = a[0, :1]
    assert np.isnan(eval_mi.motion_fidelity(a, b, mode="dmt"))                               # a static track
    with pytest.raises(ValueError):
        eval_mi.motion_fidelity(a, b[:5], mode="dmt")


# ---------------------------------------------------------------------------------------------------- tracker

def texture(size, seed=0):
    """A smooth random picture (size,size,3), larger than the window that is cut from it."""
    rng = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, size // 4, size // 4, generator=rng)
    return torch.nn.functional.interpolate(small, (size, size), mode="bicubic", align_corners=False)[0]


@pytest.mark.parametrize("step", [(1, 0), (-2.5, 1), (0.25, -0.5), (4, 4)])
def test_tracker_follows_known_translations_to_half_a_pixel(step):
    picture = texture(160)[None]
    ys, xs = torch.meshgrid(torch.arange(64.0) + 48, torch.arange(64.0) + 48, indexing="ij")
    frames = []
    for k in range(6):                                           # the content moves by +step: look at -step
        grid = torch.stack([(xs - k * step[0]) / 159 * 2 - 1, (ys - k * step[1]) / 159 * 2 - 1], -1)[None]
        frames.append(torch.nn.functional.grid_sample(picture, grid, align_corners=True)[0])
    video = (torch.stack(frames).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    tracks, visible = eval_mi.track_points(video, 10)
    assert tracks.shape == (100, 6, 2) and visible.shape == (100, 6) and visible.dtype == torch.bool
    assert tracks[0, 0].tolist() == pytest.approx([2.7, 2.7])    # cell centres, x then y
    kept = visible.all(1)
    truth = tracks[:, :1] + torch.arange(6.0)[None, :, None] * torch.tensor(step, dtype=torch.float)
    inside = ((truth > 4) & (truth < 59)).all(-1).all(-1)
    error = (tracks - truth).norm(dim=-1)
    assert kept[inside].float().mean() > 0.9
    assert error[kept & inside].quantile(0.95) < 0.5
    gone = ((truth < -3) | (truth > 66)).any(-1).any(-1)
    assert not kept[gone].any()


def test_tracker_follows_a_sprite_over_a_still_background():
    scene = world.scene(36, ["figure_eight"], "a red star on a teal checkered background")
    tracks, visible = eval_mi.track_points(world.render(scene), 16)
    centre = torch.tensor(world.path(scene)) - 0.5
    on = (tracks[:, 0] - centre[0]).norm(dim=-1) < 0.7 * scene["radius"]
    kept = on & visible.all(1)
    assert kept.sum() >= 0.6 * on.sum()
    error = (tracks.diff(dim=1) - centre.diff(dim=0)).norm(dim=-1)
    assert error[kept].mean() < 0.5


def clip(seed, motion, prompt):
    return torch.from_numpy(world.render(world.scene(seed, [motion], prompt)))


def moving_tracks(video):
    tracks, visible = eval_mi.track_points(video, 16)
    return tracks[visible.all(1)]


def test_fidelity_of_tracked_clips_ranks_as_it_must():
    """The same motion of something else is near 1; shuffled, frozen, reversed and other motion are far
    below."""
    reference = moving_tracks(clip(36, "figure_eight", "a red star on a teal checkered background"))
    same = clip(36, "figure_eight", "a green circle on a grey plain background")

    def score(video):
        return eval_mi.motion_fidelity(moving_tracks(video), reference)

    shuffled = same[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    frozen = same[:1].expand(16, -1, -1, -1)
    backwards = same.flip(0)
    other = clip(5, "staircase", "a green circle on a grey plain background")
    assert score(same) > 0.9
    assert max(score(shuffled), score(frozen), score(backwards), score(other)) < score(same) - 0.4
    assert score(frozen) == 0
