"""README.md says what was measured: its table and sentences are those of the two published runs."""

import json
import re

import pytest
from conftest import ROOT

import eval_mi
import mini_mi

README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = " ".join(README.split())
FOLDERS = {"tiny": ROOT / "data" / "ablation", "tiny16": ROOT / "data" / "ablation" / "tiny16"}
RUNS = {model: json.loads((folder / "results.json").read_text(encoding="utf-8"))
        for model, folder in FOLDERS.items()}
ROWS = {model: {row["name"]: row for row in run["rows"]} for model, run in RUNS.items()}
PUBLISHED = {model: " ".join((folder / "results.md").read_text(encoding="utf-8").split())
             for model, folder in FOLDERS.items()}
LABELS = {"full": "`full`", "no-mqk": "`no-mqk`", "no-mv": "`no-mv`", "base": "`base`: neither",
          "no-inversion": "plain noise, both parts", "no-mv-plain": "plain noise, `no-mv`: MQK alone",
          "no-mqk-plain": "plain noise, `no-mqk`: MV alone", "base-no-inversion": "plain noise, neither part"}


@pytest.mark.parametrize("name", LABELS)
def test_a_row_of_the_table(name):
    """Two models side by side: mean and half of the 95 % interval of three metrics."""
    line = next(line for line in README.splitlines() if line.startswith(f"| {LABELS[name]} |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
    expected = []
    for metric, digits in (("motion_fidelity", 3), ("text_similarity", 3), ("frechet", 4)):
        for rows in ROWS.values():
            mean, low, high = {**rows[name]["metrics"], "frechet": rows[name]["frechet"]}[metric]
            expected.append(f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}")
    assert cells == expected


@pytest.mark.parametrize("model", RUNS)
@pytest.mark.parametrize("name", ["no-mqk", "no-mv"])
def test_the_two_ablations(model, name):
    """Both losses stand in README as in the run's own sentences, each with its p value."""
    said = re.search(rf"- {name} against full, \d+ clips: Motion Fidelity fell by (\S+) "
                     r"\(95 % interval (\S+) to (\S+); p < 0.001, after Holm\)", PUBLISHED[model])
    assert "by {} (95 % interval {} to {})".format(*said.groups()) in WORDS
    assert "All four: p < 0.001, after Holm." in WORDS
    text = next(c for c in RUNS[model]["comparisons"] if c["name"] == name)["metrics"]["text_similarity"]
    assert text["mean"] > 0 and "Text Similarity rises a little without a part, in both models" in WORDS


@pytest.mark.parametrize("model", RUNS)
def test_what_else_the_run_says(model):
    """The interaction, and the price of the method."""
    published = PUBLISHED[model]
    interaction = re.search(r"\+ base, exploratory\): (\S+ \(\S+ to \S+\));", published).group(1)
    text = re.search(r"full against base, exploratory: Text Similarity ([^;]*);", published).group(1)
    distance = re.search(r"Appearance leakage [^;]*;.*? Fréchet distance ([^;]*?)\. - ", published).group(1)
    for words in (interaction, text, distance, f"{ROWS[model]['debias-none']['frechet'][0]:.4f}",
                  f"{ROWS[model]['full']['frechet_floor']:.4f}", f"{RUNS[model]['chance'][0]:.3f}"):
        assert words in WORDS, words


def test_a_part_alone():
    """Beats base in tiny, and neither in tiny16 nor, in any model, from plain noise; both parts always do."""
    def difference(model, name, base):
        """Of the means over a clip."""
        means = {}
        for cell in RUNS[model]["cells"]:
            means.setdefault(cell["variant"], {}).setdefault(cell["clip"], []).append(
                cell["scores"]["motion_fidelity"])
        pair = ([sum(values) / len(values) for values in means[variant].values()] for variant in (name, base))
        return eval_mi.paired_difference(*pair)

    for model, name, base in (*(("tiny16", name, "base") for name in ("no-mqk", "no-mv")), *(
            (model, f"{name}-plain", "base-no-inversion") for model in RUNS for name in ("no-mqk", "no-mv"))):
        assert difference(model, name, base).low < 0 < difference(model, name, base).high
    assert all(difference(model, "no-inversion", "base-no-inversion").low > 0 for model in RUNS)
    alone = [difference("tiny", name, "base") for name in ("no-mqk", "no-mv")]
    assert min(a.low for a in alone) > 0
    assert "in `tiny` (MV by {:.3f}, MQK by {:.3f})".format(*(a.mean for a in alone)) in WORDS


def test_figures_that_are_computed_from_the_runs():
    ways = []
    for model, rows in ROWS.items():
        of = {name: row["metrics"]["motion_fidelity"][0] for name, row in rows.items()}
        floor, base, bound = of["base-no-inversion"], of["base"], of["vae"]
        ways.append(((base - floor) / (bound - floor), (of["full"] - base) / (bound - base)))
    (base, full), (base16, full16) = ways
    assert f"`base` alone closes {base:.2f} (`tiny16`: {base16:.2f})" in WORDS
    assert f"`full` {full:.2f} ({full16:.2f}) of what is left" in WORDS
    of = {name: row["metrics"]["text_similarity"][0] for name, row in ROWS["tiny16"].items()}
    assert f"{100 * (1 - of['full'] / of['base']):.1f} % where its settings had kept to 2 %" in WORDS
    more = [rows["full"]["frechet"][0] / rows["base"]["frechet"][0] for rows in ROWS.values()]
    assert "{:.2f} and {:.2f} times that of `base`".format(*more) in WORDS


def test_the_paper_settings_of_the_second_model():
    paper, full = (ROWS["tiny16"][name]["metrics"] for name in ("paper-settings", "full"))
    assert ("`tiny16` has {:.3f} and {:.3f} in Motion Fidelity and Text Similarity there (`paper-settings`; "
            "`full`: {:.3f} and {:.3f})").format(*(of[metric][0] for of in (paper, full) for metric in (
                "motion_fidelity", "text_similarity"))) in WORDS


def test_clips_that_no_earlier_run_saw():
    means = {}
    for cell in RUNS["tiny"]["cells"]:
        means.setdefault(cell["variant"], {}).setdefault(cell["clip"], []).append(
            cell["scores"]["motion_fidelity"])
    means = {variant: [sum(values) / len(values) for values in clips.values()]
             for variant, clips in means.items()}
    late = [sum(a - b for a, b in zip(means[name][16:], means["full"][16:])) / 32
            for name in ("no-mqk", "no-mv")]
    assert "give {:.3f} and {:.3f}".format(*late) in WORDS


def test_the_default_clip_is_taken_by_the_rule():
    """Of the clips in data/clips the one that the start noise alone follows least."""
    base = {}
    for cell in RUNS["tiny"]["cells"]:
        if cell["variant"] == "base" and (ROOT / "data" / "clips" / f"{cell['clip']}.webp").exists():
            base.setdefault(cell["clip"], []).append(cell["scores"]["motion_fidelity"])
    assert len(base) == 12 and min(base, key=lambda clip: sum(base[clip])) == mini_mi.DEFAULT_CLIP
    assert f"`{mini_mi.DEFAULT_CLIP}`" in README


@pytest.mark.parametrize("model", RUNS)
def test_a_whole_run_by_its_command(model):
    """Every cell, on the date that README gives; the settings are those of the model's own file."""
    run = RUNS[model]
    assert run["run"]["date"] in README and run["finished"] == run["planned"]
    own = mini_mi.read_json(ROOT / "data" / model / "mini_mi.json")
    assert all(run["settings"][name] == own[name] for name in ("steps", "lr", "t_min", "noise_prior"))


@pytest.mark.parametrize("model", RUNS)
def test_no_machine_path_is_published(model):
    assert not re.search(r'"/(root|home|tmp|work|mnt)/', json.dumps(RUNS[model]))
