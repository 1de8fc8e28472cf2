"""data/picture.py: the way of the reference, drawn where it is."""

import sys

import numpy as np
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
import picture  # noqa: E402
import world  # noqa: E402


def test_the_ring_is_around_the_sprite_that_was_rendered():
    """White and black marks lie on the way alone, the ring's middle shows the sprite, in every frame."""
    scene = world.scene(3, ["pendulum"], "a red circle on a teal plain background")
    video, path = world.render(scene), world.path(scene)
    shown = picture.marked(video, path)
    assert shown.shape == (16, 192, 192, 3)
    for frame, (x, y) in zip(shown, 3 * path):
        marks = np.argwhere((frame.min(-1) > 250) | (frame.max(-1) < 5))[:, ::-1]
        assert np.linalg.norm(marks[:, None] - 3 * path, axis=-1).min(1).max() < 10
        ring = marks[np.linalg.norm(marks - (x, y), axis=1) < 10]
        assert len(ring) > 60 and np.abs(ring.mean(0) - (x, y)).max() < 4
