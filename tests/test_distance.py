"""data/distance.py: frames with a part made right, and the table."""

import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
import distance  # noqa: E402
import mini_mi  # noqa: E402
import world  # noqa: E402

PROMPT = "a red circle on a teal striped background"


def clip(**changes):
    """A rendered clip at rest, the pattern where `corrected` has it."""
    return world.render({**world.scene(0, prompt=PROMPT), "motion": "rest", **changes})


def differing(a, b):
    """Share of the pixels that differ by more than rounding."""
    return (np.abs(a.astype(int) - b).max(-1) > 1).mean()


def test_a_right_clip_stays_as_it_is():
    """But for the outline, whose pixels are mixtures: some 2 % of a frame."""
    for parts in ((True, False), (False, True), (True, True)):
        assert differing(distance.corrected(clip(), PROMPT, *parts), clip()) < 0.03


@pytest.mark.parametrize("changes, parts", [({"colour": "white"}, (True, False)),
                                            ({"background": "purple"}, (False, True)),
                                            ({"colour": "white", "background": "purple"}, (True, True))])
def test_what_is_wrong_is_made_right(changes, parts):
    """And nothing else: the other part alone repairs nothing."""
    wrong = clip(**changes)
    assert differing(distance.corrected(wrong, PROMPT, *parts), clip()) < 0.03 < differing(wrong, clip())
    if parts != (True, True):
        assert differing(distance.corrected(wrong, PROMPT, *parts[::-1]), wrong) < 0.03


def test_the_table(tmp_path, capsys):
    """Rendered clips, of which one variant has another background, are told apart and repaired."""
    reference = world.reference("test", 0)
    folder = tmp_path / "cells" / reference["name"]
    folder.mkdir(parents=True)
    for seed in range(2):
        for variant, ground in (("full", "purple"), ("base", None)):
            scene = world.scene(seed, ["line"], reference["prompts"][0])
            scene["background"] = ground or scene["background"]
            np.savez(folder / f"{variant}-p0-s{seed}-0123456789ab.npz", frames=world.render(scene))
    np.savez(folder / "vae-own-s0-0123456789ab.npz", frames=world.render(scene))     # is left out
    distance.main(tmp_path)
    rows = {line.split(" | ")[0][2:]: line for line in capsys.readouterr().out.splitlines() if "|" in line}
    base, full = ([float(word) for word in rows[name].strip("| ").split(" | ")[1:]] for name in ("base", "full"))
    assert full[0] > 2 * base[0] and full[2] == pytest.approx(base[2], rel=0.2)
    assert "rendered, random motions" in rows and "vae" not in rows
    with pytest.raises(mini_mi.UserError, match="no cells"):
        distance.main(tmp_path / "nowhere")
