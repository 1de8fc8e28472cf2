"""The tiny world: every promise that training, evaluation and the reference clips rely on."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parent.parent / "data"
sys.path.insert(0, str(DATA))
import world  # noqa: E402

SEEDS = range(40)
STILL = {"rest", "zoom_in", "zoom_out", "spin"}          # neither sprite centre nor camera moves
CLIPS = json.loads((DATA / "clips" / "clips.json").read_text())


def test_scene_is_a_function_of_its_arguments_and_survives_json():
    for seed in SEEDS:
        first, again = world.scene(seed, world.TRAIN_MOTIONS), world.scene(seed, list(world.TRAIN_MOTIONS))
        assert first == again == json.loads(json.dumps(first))
        assert np.array_equal(world.render(first), world.render(again))
    assert not np.array_equal(world.render(world.scene(0)), world.render(world.scene(1)))


def test_captions_are_288_and_read_back():
    captions = world.all_captions()
    assert len(set(captions)) == 288
    for text in captions:
        assert world.describe(*world.attributes(text)) == text
        assert world.caption(world.scene(0, prompt=text)) == text
    # The motion is never named, and no word means two things.
    words = [set(names) for names in (world.SHAPES, world.COLOURS, world.PATTERNS, world.BACKGROUNDS)]
    assert len(set.union(*words)) == sum(map(len, words)) == 17


@pytest.mark.parametrize("text, culprit", [
    ("a pink star on a teal striped background", "'pink'"),
    ("a red star on a red striped background", "'red'"),
    ("a red star on a teal striped", "its end"),
    ("a red star on a teal striped background moving left", "'moving'"),
    ("", "its end"),
])
def test_a_caption_that_cannot_be_read_names_the_word(text, culprit):
    with pytest.raises(ValueError, match=f"it has {culprit}"):
        world.scene(0, prompt=text)


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_another_prompt_keeps_the_motion(motion):
    for seed in SEEDS:
        own = world.scene(seed, [motion])
        other = world.scene(seed, [motion], "a red star on a teal striped background")
        for a, b in zip(world.trajectory(own), world.trajectory(other)):
            assert np.array_equal(a, b)
        assert own["radius"] == other["radius"] and world.caption(other).startswith("a red star")


def test_heldout_motions_are_not_trained_on():
    assert not set(world.TRAIN_MOTIONS) & set(world.HELDOUT_MOTIONS)
    assert len(world.TRAIN_MOTIONS) >= 14 and len(world.HELDOUT_MOTIONS) >= 8
    drawn = {world.scene(seed, world.TRAIN_MOTIONS)["motion"] for seed in range(400)}
    assert drawn == set(world.TRAIN_MOTIONS)
    # Only the counter-pan has a sprite that moves straight against its background.
    for motion, against in (("pan_line", False), ("pan_counter", True)):
        for seed in SEEDS:
            course = world.trajectory(world.scene(seed, [motion]))
            sprite = np.array([np.ptp(course.x) * np.sign(course.x[-1] - course.x[0]),
                               np.ptp(course.y) * np.sign(course.y[-1] - course.y[0])])
            camera = np.array([course.camera_x[-1], course.camera_y[-1]])
            cosine = sprite @ camera / np.linalg.norm(sprite) / np.linalg.norm(camera)
            assert (cosine > 0.95) == against and (against or cosine < 0.51)


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_speed_and_place(motion):
    for seed in SEEDS:
        scene = world.scene(seed, [motion])
        course = world.trajectory(scene)
        sprite = np.hypot(np.diff(course.x), np.diff(course.y))
        camera = np.hypot(np.diff(course.camera_x), np.diff(course.camera_y))
        assert max(sprite.max(), camera.max()) < 11
        assert motion in STILL or max(sprite.mean(), camera.mean()) >= 1.4
        # The sprite stays inside the picture by its radius, at its largest scale.
        margin = scene["radius"] * course.scale.max()
        for centre in (course.x, course.y):
            assert centre.min() >= margin - 0.1 and centre.max() <= world.SIZE - margin + 0.1


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_frames_and_size_sample_the_same_scene(motion):
    scene = world.scene(7, [motion])
    # 31 frames have 30 steps: every second one is a frame of 16.
    assert np.allclose(world.path(scene, 31)[::2], world.path(scene, 16))
    assert np.array_equal(world.render(scene, 31)[::2][[0, -1]], world.render(scene, 16)[[0, -1]])
    small, large = world.render(scene, 4), world.render(scene, 4, size=128)
    assert small.shape == (4, 64, 64, 3) and large.shape == (4, 128, 128, 3) and small.dtype == np.uint8
    # Averaged down by 2 the large picture is the small one, but for antialiasing.
    halved = large.reshape(4, 64, 2, 64, 2, 3).mean(axis=(2, 4))
    assert abs(halved - small).mean() < 2


@pytest.mark.parametrize("shape", world.SHAPES)
def test_the_sprite_is_where_the_path_says_and_stands_out(shape):
    for colour in world.COLOURS:
        for background in world.BACKGROUNDS:
            scene = world.scene(3, ["line"], world.describe(shape, colour, "plain", background))
            video = world.render(scene).astype(float)
            away = abs(video - np.array(world.BACKGROUNDS[background])).sum(-1)
            assert away.max() > 150
            inside = away > away.max() / 2
            # The area of the sprite is about that of a disc of its radius.
            assert 0.6 < inside.sum((1, 2)).mean() / (np.pi * scene["radius"] ** 2) < 1.1
            rows, columns = np.mgrid[:64, :64] + 0.5
            centre = np.stack([(inside * columns).sum((1, 2)), (inside * rows).sum((1, 2))], 1)
            centre /= inside.sum((1, 2))[:, None]
            assert abs(centre - world.path(scene)).max() < 1


def test_clips_are_the_first_twelve_of_the_test_split():
    drawn = [world.reference("test", i) for i in range(12)]
    assert list(CLIPS) == [about["name"] for about in drawn] and next(iter(CLIPS)) == "figure_eight"
    for about in drawn:
        clip = CLIPS[about.pop("name")]
        assert clip == about and clip["motion"] in world.HELDOUT_MOTIONS
    for name, clip in CLIPS.items():
        expected = world.render(world.scene(clip["seed"], [clip["motion"]], clip["caption"]))
        assert np.array_equal(world.read_clip(DATA / "clips" / f"{name}.webp"), expected)


def test_references_are_drawn_by_rule_and_the_splits_are_disjoint():
    """Kinds in turn; no seed twice; appearance at random, but a moving camera is always seen."""
    drawn = {split: [world.reference(split, i) for i in range(96)] for split in world.SPLITS}
    for clips in drawn.values():
        assert [clip["motion"] for clip in clips] == 12 * list(world.HELDOUT_MOTIONS)
        assert len({clip["name"] for clip in clips}) == 96
        for slot, names in enumerate((world.SHAPES, world.COLOURS, world.PATTERNS, world.BACKGROUNDS)):
            assert {world.attributes(clip["caption"])[slot] for clip in clips} == set(names)
        assert not any("plain" in clip["caption"] for clip in clips if clip["motion"] == "pan_counter")
    for key in ("seed", "name"):
        assert len({clip[key] for clips in drawn.values() for clip in clips}) == 96 * len(world.SPLITS)
    # Pools of make_tiny.py and scenes of check_tiny.py have seeds below 20 million, those of distance.py
    # begin at 60 million.
    firsts = world.SPLITS.values()
    assert min(firsts) > 20_000_000 and not any(60_000_000 <= first < 61_000_000 for first in firsts)


def test_validation_clips_can_be_written(tmp_path):
    world.write_clips(tmp_path / "clips", "validation", 2)
    made = json.loads((tmp_path / "clips" / "clips.json").read_text())
    assert list(made) == ["figure_eight_v", "spiral_v"]
    for name, clip in made.items():
        expected = world.render(world.scene(clip["seed"], [clip["motion"]], clip["caption"]))
        assert np.array_equal(world.read_clip(tmp_path / "clips" / f"{name}.webp"), expected)


def facts(scene):
    """Speed in pixels per frame, turning in radians, and extent in pixels of a sprite's path."""
    way = np.diff(world.path(scene), axis=0)
    turns = np.diff(np.arctan2(way[:, 1], way[:, 0]))
    speed, moves = np.hypot(*way.T), np.hypot(*way.T) > 0.5
    turns = abs((turns + np.pi) % (2 * np.pi) - np.pi)[moves[1:] & moves[:-1]]
    return speed.mean(), turns.sum(), np.ptp(world.path(scene), axis=0).max()


def test_training_motions_surround_the_references():
    """In speed, turning and extent 95 % of references lie between the ends of training; in kind none does."""
    train = np.array([facts(world.scene(seed)) for seed in range(2000)])
    low, high = np.percentile(train, [2, 98], axis=0)
    drawn = [world.reference("test", i) for i in range(400)]
    held = np.array([facts(world.scene(about["seed"], [about["motion"]])) for about in drawn])
    assert (((low <= held) & (held <= high)).mean(axis=0) >= 0.95).all()
    assert not {about["motion"] for about in drawn} & set(world.TRAIN_MOTIONS)


def test_sprite_minus_background_points_one_way_in_rgb():
    """In latents that are linear in colour, "a sprite is here" is then one direction for all colours."""
    for background in world.BACKGROUNDS.values():
        steps = [np.subtract(colour, background) for colour in world.COLOURS.values()]
        steps = np.array([step / np.linalg.norm(step) for step in steps])
        assert (steps @ steps.T).min() > 0.35


def test_colours_may_be_any_rgb():
    scene = world.scene(3, ["line"], "a red circle on a teal plain background")
    named = world.render(scene, 2)
    scene.update(colour=world.COLOURS["red"], background=world.BACKGROUNDS["teal"])
    assert np.array_equal(world.render(scene, 2), named)
    scene.update(colour=(250, 3, 7), background=(250, 250, 250))
    assert {(250, 3, 7), (250, 250, 250)} <= set(map(tuple, world.render(scene, 2).reshape(-1, 3)))


def test_target_prompts_share_nothing_with_their_clip():
    for clip in CLIPS.values():
        own = world.attributes(clip["caption"])
        assert len(set(clip["prompts"])) == 3
        assert clip["prompts"] == world.target_prompts(clip["caption"], clip["seed"], clip["motion"])
        for text in clip["prompts"]:
            assert all(a != b for a, b in zip(world.attributes(text), own))
            # A camera motion needs a background that shows it.
            assert clip["motion"] != "pan_counter" or "plain" not in text


# The outline

def drawn(shape, radius=10.0, angle=0.0, x=32.0, y=32.0):
    """A blue sprite on brown, 64x64; shape: a name, or a signed distance."""
    distance = world.SHAPES.get(shape, shape)
    columns, rows = np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5)
    u, v = world.turn(-angle, (columns - x) / radius, (rows - y) / radius)
    cover = np.clip(0.5 - distance(u, v) * radius, 0, 1)[..., None]
    colours = np.array(world.BACKGROUNDS["brown"]), np.array(world.COLOURS["blue"])
    return ((1 - cover) * colours[0] + cover * colours[1]).astype(np.uint8)


def morph(share):
    """The signed distance of a figure between circle (0) and star (1)."""
    return lambda u, v: (1 - share) * world.circle_distance(u, v) + share * world.star_distance(u, v)


@pytest.mark.parametrize("shape", world.SHAPES)
def test_the_outline_names_the_shape_of_real_clips(shape):
    """Of every motion, in colours, patterns and backgrounds of all kinds: no frame of 432 is read wrongly."""
    for i, motion in enumerate(world.MOTIONS):
        looks = [list(names)[i % len(names)] for names in (world.COLOURS, world.PATTERNS, world.BACKGROUNDS)]
        scene = world.scene(i, [motion], world.describe(shape, *looks))
        frames = world.render(scene)
        assert [world.outline_shape(frame) for frame in frames] == [shape] * 16
        assert world.shape_share(frames, shape) == 1


@pytest.mark.parametrize("shape", world.SHAPES)
def test_the_outline_names_any_size_and_turn(shape):
    for radius in (6, 9, 14, 22):
        for angle in np.linspace(0, 2 * np.pi, 15):
            frame = drawn(shape, radius, angle, 31.7, 32.4)
            assert world.outline_shape(frame) == shape
            if radius == 22:                 # the values that the docstring names, where pixels hardly count
                strengths = world.corner_strengths(world.sprite_cover(frame))
                named = dict(circle=(0, 0, 0), square=(0, .142, 0), triangle=(.281, 0, 0), star=(0, 0, .292))
                assert np.allclose(list(strengths.values()), named[shape], atol=0.015)


def test_corners_of_a_circle_that_turns_into_a_star():
    """The strength rises with every step; circle before and star after."""
    frames = [drawn(morph(share), 14, 0.3) for share in np.linspace(0, 1, 11)]
    strengths = [world.corner_strengths(world.sprite_cover(frame))[5] for frame in frames]
    assert (np.diff(strengths) > 0).all()
    shapes = [world.outline_shape(frame) for frame in frames]
    assert shapes == ["circle"] * 4 + ["star"] * 7
    assert world.shape_share(np.stack(frames), "circle") == 4 / 11


def test_a_sprite_that_is_not_whole_has_no_outline():
    small, cut, tangent = drawn("circle", 4), drawn("square", 10, x=3), drawn("circle", 10, x=10)
    empty = np.zeros((64, 64, 3), np.uint8)
    assert [world.outline_shape(f) for f in (small, cut, empty, tangent)] == [None, None, None, "circle"]
    # Frames without a sprite do not count, and a clip without any shows nothing.
    assert world.shape_share(np.stack([small, cut, tangent, drawn("star")]), "circle") == 1 / 2
    assert world.shape_share(np.stack([small, cut, empty]), "circle") == 0


def test_the_outline_is_that_of_the_largest_bright_region():
    """A bright speck beside the sprite changes nothing."""
    frame = drawn("triangle")
    frame[2:5, 2:5] = 255
    assert world.outline_shape(frame) == "triangle"
