"""Where the spread of an ablation comes from, and what other runs would detect."""
import math
import re

import numpy as np
import pytest

import eval_mi
from data import power


def test_variance_components_are_found_again_and_worked_by_hand():
    # Two clips of two trainings of two samples, by hand. Effects of trainings, samples and rest of the first
    # clip: -1.5 1.5, -0.25 0.25, all +-0.25; of the second: -1 1, -1 1, none.
    parts = power.variance_components([[[0, 1], [3.5, 3.5]], [[4, 6], [6, 8]]])
    rest = (4 * 0.25 ** 2 + 0) / 2                                       # one degree of freedom a clip
    trainings = (2 * 1.5 ** 2 + 2 * 1) / 2 - rest / 2
    samples = (2 * 0.25 ** 2 + 2 * 1) / 2 - rest / 2
    clips = (6 - 2) ** 2 / 2 - trainings / 2 - samples / 2 - rest / 4
    assert parts == pytest.approx((clips, trainings, samples, rest))
    rng = np.random.default_rng(5)
    shapes = (400, 1, 1), (400, 3, 1), (400, 1, 4), (400, 3, 4)
    sizes = (0.3, 0.2, 0.4, 0.1)
    values = sum(size * rng.normal(size=shape) for size, shape in zip(sizes, shapes))
    assert np.sqrt(power.variance_components(values)) == pytest.approx(sizes, abs=0.03)
    # Of one training each its spread is part of the clips', and the rest of the samples'.
    per_clip, none, per_sample, rest = power.variance_components(values[:, :1])
    assert none is None and rest is None
    assert math.sqrt(per_clip) == pytest.approx(math.hypot(0.3, 0.2), abs=0.03)
    assert math.sqrt(per_sample) == pytest.approx(math.hypot(0.4, 0.1), abs=0.03)
    assert power.variance_components(values[:, :1, :1])[1:] == (None, None, None)


def test_detectable_with_is_that_of_the_interval_seen_and_what_other_runs_would_find():
    rng = np.random.default_rng(6)
    values = 0.2 * rng.normal(size=(12, 1, 1)) + 0.3 * rng.normal(size=(12, 1, 4))
    mean, low, high = eval_mi.student_interval(values.mean((1, 2)))
    parts = power.variance_components(values)
    assert power.detectable_with(parts, 12, 1, 4) == pytest.approx(
        eval_mi.detectable_difference(high - mean, 12))
    hits, effect = 0, power.detectable_with((0.04, 0.01, 0.06, 0.03), 20, 2, 3, alpha=0.05 / 4)
    for _ in range(1000):
        d = (0.2 * rng.normal(size=(20, 1, 1)) + 0.1 * rng.normal(size=(20, 2, 1))
             + 0.06 ** 0.5 * rng.normal(size=(20, 1, 3)) + 0.03 ** 0.5 * rng.normal(size=(20, 2, 3)))
        hits += eval_mi.student_interval(d.mean((1, 2)) + effect, 1 - 0.05 / 4)[1] > 0
    assert 0.75 < hits / 1000 < 0.86


def test_the_published_runs(capsys):
    """data/README.md's tables, whose rows are the lines of this program; cells that are missing are told."""
    text = (power.HERE / "README.md").read_text(encoding="utf-8")
    for run in ("ablation", "ablation/tiny16"):
        power.main(power.HERE / run / "results.json")
        for line in capsys.readouterr().out.splitlines():
            name, metric = line.partition(":")[0].split(", ")
            numbers = re.findall(r"\d\.\d{3}", line)
            assert len(numbers) == 6
            assert " | ".join([f"| {name}, {metric.replace('_', ' ').title()}", *numbers]) + " |" in text
    cell = {"clip": "a", "train_seed": 0, "prompt_index": 0, "seed": 0, "scores": {"leakage": 1.0}}
    cells = [{**cell, "variant": name, "clip": clip} for name in ("full", "no-mv") for clip in "ab"]
    assert power.differences(cells, "no-mv", "leakage").tolist() == [[[0]], [[0]]]
    assert power.differences(cells[:-1], "no-mv", "leakage") is None
