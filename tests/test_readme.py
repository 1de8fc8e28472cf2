"""README.md says what was measured: its table and sentences are those of data/ablation/results.json."""

import json
import re

import pytest
from conftest import ROOT

import mini_mi

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "data" / "ablation" / "results.json").read_text(encoding="utf-8"))
COLUMNS = ("motion_fidelity", "text_similarity", "attributes", "temporal_consistency")
ROWS = {row["name"]: row for row in RESULTS["rows"]}


@pytest.mark.parametrize("name", [
    "full", "no-mqk", "no-mv", "drop-mqk", "drop-mv", "debias-none", "base", "no-inversion", "no-mqk-plain",
    "no-mv-plain", "base-no-inversion", "vae"])
def test_a_row_of_the_table(name):
    """Mean and half of the 95 % interval, in three digits, and n."""
    line = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    *cells, count = [cell.strip() for cell in line.strip("|").split("|")][1:]
    for metric, cell in zip(COLUMNS, cells, strict=True):
        mean, low, high = ROWS[name]["metrics"][metric]
        assert cell == (f"{mean:.3f} ({low:.3f} to {high:.3f})" if metric == "attributes"
                        else f"{mean:.3f} ± {(high - low) / 2:.3f}")
    assert count == f"{ROWS[name]['n']} ({ROWS[name]['clips']})"


def test_the_sentences_on_the_two_ablations():
    text = " ".join(README.split())
    asked = ("no-mqk against", "no-mv against", "no-mqk-plain against", "no-mv-plain against")
    sentences = [s for s in RESULTS["sentences"] if s.startswith(asked)]
    assert len(sentences) == 4 and all(" ".join(s.split()) in text for s in sentences)


def test_the_way_from_plain_noise_to_the_bound():
    """And the other figures that README.md computes from that file."""
    fidelity, text = ({name: row["metrics"][metric][0] for name, row in ROWS.items()}
                      for metric in ("motion_fidelity", "text_similarity"))
    way = ((fidelity["full"] - fidelity["base-no-inversion"])
           / (fidelity["vae"] - fidelity["base-no-inversion"]))
    assert f"closes {way:.2f} of the way" in README
    assert f"{100 * (1 - text['full'] / text['base']):.1f} % of `base`" in README
    left = [fidelity[name] - fidelity["base"] for name in ("full", "no-mqk", "no-mv")]
    words = " ".join(README.split())
    assert (f"of the {left[0]:.3f} in Motion Fidelity" in words
            and f"{left[1]:.3f} is left without MQK and {left[2]:.3f} without MV" in words)
    dropped = [fidelity[name] - fidelity["base"] for name in ("drop-mqk", "drop-mv")]
    assert "dropped after training ({:.3f} and {:.3f})".format(*dropped) in words
    tests = {comparison["name"]: comparison["metrics"] for comparison in RESULTS["comparisons"]}
    gain, leak = tests["base"]["motion_fidelity"], tests["debias-none"]["text_similarity"]
    assert f"(95 % interval {-gain['high']:.3f} to {-gain['low']:.3f}, exploratory)" in words
    assert (f"Text Similarity falls by {-leak['mean']:.3f} ({-leak['high']:.3f} to {-leak['low']:.3f}, "
            "exploratory)") in words
    of_full = {}
    for cell in RESULTS["cells"]:
        if cell["variant"] == "full":
            of_full.setdefault(cell["clip"], []).append(cell["scores"]["motion_fidelity"])
    lowest = min(sum(values) / len(values) for values in of_full.values())
    assert f"the Motion Fidelity of no clip lies below {lowest:.2f}" in words
    alone = fidelity["no-mv-plain"], fidelity["no-mqk-plain"], fidelity["base-no-inversion"]
    assert (f"two together reach {fidelity['no-inversion']:.3f}; "
            "MQK alone reaches {:.3f} and MV alone {:.3f}, like the model without embeddings ({:.3f})"
            .format(*alone)) in words
    assert f"is {RESULTS['chance'][0]:.3f}" in README
    assert all(name.startswith("pan_counter") for name in sorted(of_full, key=lambda n: sum(of_full[n]))[:4])
    texts = {}
    for cell in RESULTS["cells"]:
        if cell["variant"] in ("full", "base"):
            texts.setdefault(cell["clip"], dict(full=0, base=0))[cell["variant"]] += (
                cell["scores"]["text_similarity"])
    lost = [1 - of["full"] / of["base"] for of in texts.values()]
    assert "half of the clips less than 0.6 %, four more than 5 %" in words
    assert sum(share < 0.006 for share in lost) >= len(lost) / 2 and sum(share > 0.05 for share in lost) == 4


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
