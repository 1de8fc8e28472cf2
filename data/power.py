"""What could a run of eval_mi.py have found? From the spread between clips, trainings and samples.

    python data/power.py [results.json]       one line a primary test: deviations, and what other runs detect

The published run is the default. A line holds the standard deviation of the paired difference at each level,
each level's own part, and the smallest true difference that the test finds in four of five runs of that many
clips x trainings x samples, at the level of Holm's first step.
"""

import math
import sys
from pathlib import Path

import numpy as np
import scipy.stats

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import eval_mi  # noqa: E402
import mini_mi  # noqa: E402

RUNS = (24, 1, 8), (48, 1, 8), (60, 1, 8)           # clips, trainings, samples


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
    return eval_mi.detectable_difference(half, clips, alpha=alpha)


def differences(cells, name, metric):
    """Cells of a results.json -> the variant's differences from full, (clips, trainings, samples); samples
    are prompts x seeds. None for one clip, and while cells are missing.
    """
    ours, theirs = ({(c["clip"], c["train_seed"], (c["prompt_index"], c["seed"])): c["scores"][metric]
                     for c in cells if c["variant"] == variant} for variant in (name, "full"))
    keys = sorted(ours.keys() & theirs.keys())
    shape = [len({key[level] for key in keys}) for level in range(3)]
    if shape[0] < 2 or not len(keys) == len(ours) == len(theirs) == math.prod(shape):
        return None
    return np.reshape([ours[key] - theirs[key] for key in keys], shape)


def main(path=HERE / "ablation" / "results.json"):
    """Prints the lines."""
    cells = mini_mi.read_json(path)["cells"]
    for name in eval_mi.ABLATIONS:
        for metric in eval_mi.PRIMARY:
            values = differences(cells, name, metric)
            if values is None:
                print(f"{name}, {metric}: cells are missing")
                continue
            parts = variance_components(values)
            spread = ", ".join(f"{level} {math.sqrt(part):.3f}" for level, part in zip(
                ("clips", "trainings", "samples", "rest"), parts) if part is not None)
            least = ", ".join(f"{' x '.join(map(str, run))}: "
                              f"{detectable_with(parts, *run, alpha=0.05 / eval_mi.FAMILY):.3f}"
                              for run in (values.shape, *RUNS))
            print(f"{name}, {metric}: deviation between {spread}; detectable with {least}")


if __name__ == "__main__":
    sys.exit(mini_mi.guarded(lambda: main(*sys.argv[1:])))
