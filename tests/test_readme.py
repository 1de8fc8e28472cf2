"""README.md says what was measured: its table and sentences are those of data/ablation/results.json."""

import json
import re

import pytest
from conftest import ROOT

import mini_mi

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "data" / "ablation" / "results.json").read_text(encoding="utf-8"))
COLUMNS = ("text_similarity", "motion_fidelity", "temporal_consistency")
ROWS = {row["name"]: row for row in RESULTS["rows"]}
WORDS = " ".join(README.split())


@pytest.mark.parametrize("name", ["full", "no-mqk", "no-mv", "base", "base-no-inversion", "vae"])
def test_a_row_of_the_table(name):
    """The paper's five metrics: mean and half of the 95 % interval; no votes yet."""
    line = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
    cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
    for metric, cell in zip(COLUMNS, cells[:3], strict=True):
        mean, low, high = ROWS[name]["metrics"][metric]
        assert cell == f"{mean:.3f} ± {(high - low) / 2:.3f}"
    published = (ROOT / "data" / "ablation" / "results.md").read_text(encoding="utf-8")
    row = next(line for line in published.splitlines() if line.startswith(f"| {name} |"))
    assert cells == [cell.strip() for cell in row.strip("|").split("|")][1:6]


def test_sentences_are_those_of_the_run():
    """The two ablations, the motions as units, the interaction, the price."""
    published = " ".join((ROOT / "data" / "ablation" / "results.md").read_text(encoding="utf-8").split())
    for words in re.findall(r"Motion Fidelity fell by [^;]*; p < 0.001, after Holm\)", WORDS):
        assert words in published
    for number in ("+0.079", "-0.130 (-0.177 to -0.082)", "-0.099 (-0.141 to -0.058)",
                   "Text Similarity -0.0106 (-0.0174 to -0.0038)", "+0.0055 (+0.0027 to +0.0082)",
                   "Temporal Consistency -0.0032 (-0.0052 to -0.0012)",
                   "Appearance leakage +0.0140 (+0.0074 to +0.0205)"):
        assert number in published and number in WORDS, number
    assert "(0.040 to 0.118)" in published.replace("+", "") and "+0.079, 0.040 to 0.118" in WORDS


def test_figures_that_are_computed_from_the_run():
    fidelity = {name: row["metrics"]["motion_fidelity"][0] for name, row in ROWS.items()}
    floor, bound = fidelity["base-no-inversion"], fidelity["vae"]
    assert f"closes {(fidelity['base'] - floor) / (bound - floor):.2f} of the way" in WORDS
    rest = (fidelity["full"] - fidelity["base"]) / (bound - fidelity["base"])
    assert f"`full` closes {rest:.2f} of what is left" in WORDS
    assert ("two together reach {:.3f}, MQK alone {:.3f}, MV alone {:.3f}, neither {:.3f}; chance is {:.3f}"
            .format(*(fidelity[name] for name in ("no-inversion", "no-mv-plain", "no-mqk-plain",
                                                  "base-no-inversion")), RESULTS["chance"][0])) in WORDS
    means = {}
    for cell in RESULTS["cells"]:
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
    for cell in RESULTS["cells"]:
        if cell["variant"] == "base" and (ROOT / "data" / "clips" / f"{cell['clip']}.webp").exists():
            base.setdefault(cell["clip"], []).append(cell["scores"]["motion_fidelity"])
    assert len(base) == 12 and min(base, key=lambda clip: sum(base[clip])) == mini_mi.DEFAULT_CLIP
    assert f"`{mini_mi.DEFAULT_CLIP}`" in README


def test_command_and_date_of_the_run():
    assert RESULTS["run"]["date"] in README and RESULTS["finished"] == RESULTS["planned"]


def test_no_machine_path_is_published():
    assert not re.search(r'"/(root|home|tmp|work|mnt)/', json.dumps(RESULTS))
