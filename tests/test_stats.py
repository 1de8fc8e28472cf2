"""Intervals that cover at their nominal rate, tests that reject at theirs, and worked examples."""
import itertools
import math

import numpy as np
import pytest
import scipy.stats

import eval_mi


def test_student_interval_worked():
    mean, low, high = eval_mi.student_interval([1, 2, 3, 4])
    assert mean == 2.5 and high - mean == pytest.approx(3.18245 * np.std([1, 2, 3, 4], ddof=1) / 2, rel=1e-5)
    assert eval_mi.student_interval([3]) == (3, -math.inf, math.inf)


def test_student_interval_of_clip_means_covers_although_samples_of_a_clip_agree():
    """10 clips of 4 correlated samples: clip means cover at 95 %, pooled samples would not."""
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(10), 4)
    hits = pooled = 0
    for _ in range(1000):
        values = rng.normal(size=10)[groups] + 0.5 * rng.normal(size=40)
        _, low, high = eval_mi.student_interval(eval_mi.group_means(values, groups))
        hits += low <= 0 <= high
        _, low, high = eval_mi.student_interval(values)
        pooled += low <= 0 <= high
    assert 0.93 < hits / 1000 < 0.97 and pooled / 1000 < 0.85


def test_wilson_interval_published_values_and_coverage():
    # Newcombe 1998, table I, method 3
    assert eval_mi.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert eval_mi.wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert eval_mi.wilson_interval(0, 20) == (0.0, pytest.approx(0.1611, abs=5e-5))
    assert eval_mi.wilson_interval(29, 29) == (pytest.approx(0.8830, abs=5e-5), 1.0)
    n, shares = 30, np.linspace(0.02, 0.98, 97)                  # exact coverage, averaged over shares
    ends = np.array([eval_mi.wilson_interval(k, n) for k in range(n + 1)])
    inside = (ends[:, :1] <= shares) & (shares <= ends[:, 1:])
    covered = (scipy.stats.binom.pmf(np.arange(n + 1)[:, None], n, shares) * inside).sum(0)
    assert 0.94 < covered.mean() < 0.965 and covered.min() > 0.84
    for bad in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError):
            eval_mi.wilson_interval(*bad)


def test_paired_difference_worked():
    """Three pairs, all positive: only + + + and - - - are as far out, p = 2/8."""
    mean, low, high, p = eval_mi.paired_difference([2, 3, 4], [1, 1, 1])
    assert (mean, p) == (2, 0.25)
    assert (low, high) == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), rel=1e-5)


def test_paired_difference_flips_whole_groups():
    rng = np.random.default_rng(3)
    a, b, groups = (rng.normal(size=24) + 0.5, rng.normal(size=24),
                    np.repeat(["x", "y", "z", "u", "v", "w"], 4))
    mean, low, high, p = eval_mi.paired_difference(a, b, groups)
    means = [(a - b)[groups == g].mean() for g in "xyzuvw"]
    flips = [abs(np.dot(s, means)) >= abs(sum(means)) - 1e-12 for s in itertools.product([1, -1], repeat=6)]
    assert (mean, p) == (pytest.approx(np.mean(means)), pytest.approx(np.mean(flips)))
    assert (low, high) == pytest.approx(eval_mi.student_interval(means)[1:])


def test_paired_difference_edges():
    assert eval_mi.paired_difference([1, 1], [1, 1]) == (0, 0, 0, 1)
    mean, low, high, p = eval_mi.paired_difference([2, 3], [1, 1], ["one", "one"])
    assert (mean, low, high, p) == (1.5, -math.inf, math.inf, 1)
    assert eval_mi.paired_difference([1] * 8, [0] * 8)[3] == 2 / 256               # 8 clips: at least 0.008
    many = eval_mi.paired_difference([1.0] * 40, [0.0] * 40)
    assert 0 < many[3] < 0.001                                                     # drawn flips: never 0
    assert many == eval_mi.paired_difference([1.0] * 40, [0.0] * 40)               # and reproducible
    for bad in (([], []), ([1], [1, 2]), ([np.nan], [1])):
        with pytest.raises(ValueError):
            eval_mi.paired_difference(*bad)
    with pytest.raises(ValueError):
        eval_mi.paired_difference([1, 2], [1, 2], ["a"])


def test_paired_difference_covers_and_rejects_at_the_nominal_rate():
    rng, groups = np.random.default_rng(1), np.repeat(np.arange(10), 4)
    covered = rejected = found = 0
    for _ in range(600):
        shared = rng.normal(size=10)[groups]                                       # what pairing removes
        effect = 0.3 * rng.normal(size=10)[groups]                                 # differs from clip to clip
        a, b = shared + effect + 0.2 * rng.normal(size=40), shared + 0.2 * rng.normal(size=40)
        _, low, high, p = eval_mi.paired_difference(a, b, groups)
        covered += low <= 0 <= high
        rejected += p <= 0.05
        found += eval_mi.paired_difference(a + 0.5, b, groups)[3] <= 0.05
    assert 0.92 < covered / 600 < 0.98 and 0.02 < rejected / 600 < 0.08 and found / 600 > 0.9


def test_detectable_difference_is_found_with_the_power_it_promises():
    rng, n, hits = np.random.default_rng(2), 10, 0
    half = scipy.stats.t.ppf(0.975, n - 1) / math.sqrt(n)                          # for standard deviation 1
    effect = eval_mi.detectable_difference(half, n)
    for _ in range(2000):
        _, low, _ = eval_mi.student_interval(rng.normal(size=n) + effect)
        hits += low > 0
    assert 0.76 < hits / 2000 < 0.86
    assert eval_mi.detectable_difference(half, 1) == math.inf
    # One of four tests: p below 0.05 / 4 is asked.
    effect, hits = eval_mi.detectable_difference(half, n, alpha=0.05 / 4), 0
    for _ in range(2000):
        hits += eval_mi.student_interval(rng.normal(size=n) + effect, 1 - 0.05 / 4)[1] > 0
    assert 0.76 < hits / 2000 < 0.86


def test_holm_worked_example():
    # Sorted p times 4, 3, 2, 1, then never falling: 0.04, 0.06, 0.06, 0.06
    # (from 0.02 * 3, 0.03 * 2, 0.04 * 1)
    assert eval_mi.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert eval_mi.holm([0.5, 0.9]) == [1.0, 1.0] and eval_mi.holm([]) == []


def test_jackknife_of_a_mean_is_the_student_interval():
    values = [0.3, 1.2, -0.4, 2.2, 0.9]
    assert eval_mi.jackknife(lambda chosen: float(np.mean(chosen)), values) == pytest.approx(
        eval_mi.student_interval(values))
    assert eval_mi.jackknife(sum, [1, 2]) == (3, -math.inf, math.inf)


def test_jackknife_covers_for_a_difference_of_frechet_distances():
    """Clips with 8 samples each; both variants come from one distribution, so the true difference is 0."""
    rng, covered = np.random.default_rng(4), 0
    for _ in range(150):
        real, a, b = (0.5 * rng.normal(size=(10, 1, 3)) + rng.normal(size=(10, 8, 3)) for _ in range(3))

        def difference(clips):
            x, y, r = (part[clips].reshape(-1, 3) for part in (a, b, real))
            return eval_mi.frechet_distance(x, r) - eval_mi.frechet_distance(y, r)

        _, low, high = eval_mi.jackknife(difference, list(range(10)))
        covered += low <= 0 <= high
    assert 0.88 < covered / 150 <= 1


def test_share_interval_is_wider_than_wilson_when_people_are_of_one_mind():
    people = np.repeat(np.arange(20), 10)
    wins = (people % 2 == 0).astype(int)                                          # each always votes the same
    low, high = eval_mi.share_interval(wins, people)
    narrow = eval_mi.wilson_interval(100, 200)
    assert low < narrow[0] < 0.5 < narrow[1] < high
    independent = eval_mi.share_interval(wins, np.arange(200))
    assert independent == pytest.approx(narrow, abs=0.02)


def test_share_interval_stays_within_0_and_1_and_has_a_width_where_all_agree():
    clips = np.repeat(np.arange(48), 4)
    wins = np.ones(192)
    assert eval_mi.share_interval(wins, clips) == eval_mi.wilson_interval(192, 192)
    wins[:9] = 0                                     # 183 of 192: t on the clips' means would end above 1
    assert eval_mi.student_interval(eval_mi.group_means([1.0] * 47 + [0.6], range(48)))[2] > 1
    low, high = eval_mi.share_interval(wins, clips)
    assert 0.85 < low < 183 / 192 < high <= 1
