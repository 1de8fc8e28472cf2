"""A tiny world of moving sprites: 288 captions, endless motions, each clip a function of one seed.

A clip shows one sprite (shape x colour) on a background (colour x pattern). Its caption names that
appearance and never the motion, so a video model trained here cannot read the motion off the text. The
motions of HELDOUT_MOTIONS are kept out of training: reference clips use them, and a motion that the model
has not seen has to be inverted.

    picture = scene(seed=3, motions=TRAIN_MOTIONS)      # a JSON-able dict
    caption(picture)                                    # "a red star on a teal striped background"
    render(picture)                                     # (16, 64, 64, 3) uint8

All geometry is in pixels of a 64-pixel picture, x to the right and y DOWN, and scales with the size that
is rendered. Time t runs from 0 (first frame) to 1 (last frame): more frames show the same path more slowly.
`python data/world.py` writes the reference clips to data/clips/; `FOLDER --split validation` gives others of
the same motions, to choose settings by.
"""

import argparse
import json
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.interpolate
import scipy.ndimage
from PIL import Image, ImageSequence

SIZE, FRAMES, FPS = 64, 16, 10

# Sprites are light, backgrounds dark and muted: every sprite stands out against every background, and in RGB
# "sprite minus background" points the same way for all pairs of colours (tests/test_world.py). The two sets
# share no name, so that every word of a caption means one thing only.
COLOURS = {"red": (255, 105, 95), "green": (115, 238, 115), "blue": (120, 160, 255),
           "yellow": (255, 232, 90), "magenta": (252, 125, 238), "white": (250, 250, 250)}
BACKGROUNDS = {"grey": (72, 74, 78), "brown": (88, 56, 28), "purple": (64, 34, 92), "teal": (12, 74, 80)}

TAU = 2 * np.pi


# ------------------------------------------------------------------------------------------------- appearance
# A shape is a signed distance in units of its radius, negative inside. Pointed shapes reach a little beyond
# one radius, so that all four have a similar size to the eye.

def circle_distance(u, v):
    """Below 0 inside the unit circle; u, v in radii of the sprite."""
    return np.sqrt(u * u + v * v) - 1.0


def square_distance(u, v):
    """Below 0 inside a square."""
    return np.maximum(abs(u), abs(v)) - 0.88


def triangle_distance(u, v):
    """Below 0 inside a triangle: three half-planes, the left and the right one the same after folding u."""
    return np.maximum(v, abs(u) * np.sin(TAU / 6) - v * 0.5) - 0.64


def star_distance(u, v, tip=1.25, notch=0.6):
    """Below 0 inside a star. The plane is mirrored into a tenth of it, where the outline is one edge."""
    cos, sin = np.cos(TAU / 10), np.sin(TAU / 10)
    u, v = abs(u), -v
    fold = 2 * np.maximum(cos * u - sin * v, 0)
    u, v = u - fold * cos, v + fold * sin
    fold = 2 * np.maximum(-cos * u - sin * v, 0)
    u, v = abs(u + fold * cos), v + fold * sin
    edge_u, edge_v = notch * sin, notch * cos - tip
    return ((v - tip) * edge_u - u * edge_v) / np.hypot(edge_u, edge_v)


SHAPES = {"circle": circle_distance, "square": square_distance,
          "triangle": triangle_distance, "star": star_distance}


# A pattern is a soft wave in [-1, 1] over background pixels. Its smallest part is about one cell (8 pixels)
# of the latent grid, and its edges are a few pixels wide, because a factor-8 autoencoder has to code it.

def plain(x, y):
    """No pattern."""
    return np.zeros_like(x + y)


def striped(x, y):
    """Diagonal, so that pans along x and along y both show; 16 pixels from stripe to stripe."""
    return np.clip(2.5 * np.sin((x + y) * np.float32(TAU / (16 * np.sqrt(2)))), -1, 1)


def checkered(x, y):
    """Cells of 16 x 16 pixels."""
    return np.clip(4 * np.sin(x * np.float32(TAU / 32)) * np.sin(y * np.float32(TAU / 32)), -1, 1)


PATTERNS = {"plain": plain, "striped": striped, "checkered": checkered}
CONTRAST = 0.26                 # the two tones of a pattern are (1 +- CONTRAST) times the background colour

GRAMMAR = ("a", COLOURS, SHAPES, "on", "a", BACKGROUNDS, PATTERNS, "background")


def describe(shape, colour, pattern, background):
    """The caption for four attribute names."""
    return f"a {colour} {shape} on a {background} {pattern} background"


def attributes(prompt):
    """A caption -> (shape, colour, pattern, background). A word out of place: a ValueError that names it."""
    words = prompt.lower().split()
    for word, slot in zip_longest(words, GRAMMAR):
        # Past the end of the grammar no slot is left, and no word is expected.
        expected = [slot] if isinstance(slot, str) else list(slot or [])
        if word not in expected:
            wrong = "its end" if word is None else repr(word)
            raise ValueError(f"cannot read the caption {prompt!r}: it has {wrong} "
                             f"where {' | '.join(expected) or 'its end'} should be")
    return words[2], words[1], words[6], words[5]


def all_captions():
    """Every legal caption, in a fixed order (288 of them)."""
    return [describe(s, c, p, b) for s in SHAPES for c in COLOURS for p in PATTERNS for b in BACKGROUNDS]


# ---------------------------------------------------------------------------------------------------- motions

class Trajectory(NamedTuple):
    """What moves, each a scalar or an array over the times asked for.

    Only differences of x and y matter in a motion: `trajectory` then puts the path somewhere in the picture.
    A camera that moves one way moves the background the opposite way on the screen.
    """
    x: np.ndarray = 0.0                 # sprite centre on the screen, pixels
    y: np.ndarray = 0.0
    scale: np.ndarray = 1.0             # times the sprite's radius
    angle: np.ndarray = 0.0             # turn of the sprite, radians, clockwise on the screen
    camera_x: np.ndarray = 0.0          # pixels
    camera_y: np.ndarray = 0.0


def either(rng):
    """-1 or 1."""
    return rng.choice((-1, 1))


def turn(angle, x, y=0.0):
    """The point (x, y) turned by `angle` radians about the origin."""
    return x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)


def polyline(t, xs, ys):
    """Positions at times t on the way through the corners (xs, ys), at constant speed from t = 0 to t = 1."""
    length = np.concatenate([[0], np.cumsum(np.hypot(np.diff(xs), np.diff(ys)))])
    return np.interp(t * length[-1], length, xs), np.interp(t * length[-1], length, ys)


def triangle_wave(s):
    """Period 4: 0 at s = 0, 1 at s = 1, 0 at s = 2, -1 at s = 3."""
    return 1 - abs((s + 1) % 4 - 2)


# Each motion draws its parameters from `rng` and evaluates them at the times t. The sizes go together: no
# path spans more than 40 pixels (64 less a sprite), and 16 frames on it are mostly 1.5 to 6 pixels apart.

def rest(rng, t):
    """Nothing moves."""
    return Trajectory()


def line(rng, t):
    """Straight on, any direction."""
    x, y = turn(rng.uniform(0, TAU), rng.uniform(24, 40) * t)
    return Trajectory(x, y)


def accelerate(rng, t):
    """Speeds up, or (time reversed) slows down; the slow end still moves by one pixel a frame."""
    s = t if rng.random() < 0.5 else 1 - t
    x, y = turn(rng.uniform(0, TAU), rng.uniform(36, 40) * (0.45 * s + 0.55 * s * s))
    return Trajectory(x, y)


def there_and_back(rng, t):
    """Out along a line, and some of the way back."""
    far = rng.uniform(20, 34)
    x, y = polyline(t, [0, far, far * rng.uniform(0, 0.4)], [0, 0, 0])
    return Trajectory(*turn(rng.uniform(0, TAU), x, y))


def corner(rng, t):
    """One leg, a sharp turn to either side, another leg."""
    side = either(rng) * rng.uniform(TAU / 6, TAU / 3)
    first, second = rng.uniform(14, 24, size=2)
    x, y = polyline(t, [0, first, first + second * np.cos(side)], [0, 0, second * np.sin(side)])
    return Trajectory(*turn(rng.uniform(0, TAU), x, y))


def zigzag(rng, t):
    """Along a line, with straight strokes to both sides."""
    x, y = rng.uniform(24, 32) * t, rng.uniform(5, 8) * triangle_wave(4 * rng.choice((1.5, 2, 2.5)) * t)
    return Trajectory(*turn(rng.uniform(0, TAU), x, y))


def bounce(rng, t):
    """Straight on inside an invisible box, reflected at its walls."""
    half = rng.uniform(10, 20, size=2)
    start, way = rng.uniform(-1, 1, size=2), rng.uniform(0, TAU)
    x, y = turn(way, rng.uniform(36, 60) * t)
    return Trajectory(half[0] * triangle_wave(start[0] + x / half[0]),
                      half[1] * triangle_wave(start[1] + y / half[1]))


def hop(rng, t):
    """One high jump or two lower ones, sideways, under a constant gravity."""
    jumps = rng.choice((1, 2))
    phase = jumps * t % 1
    x, height = either(rng) * rng.uniform(20, 36) * t, rng.uniform(14, 20) / jumps
    return Trajectory(x, -height * 4 * phase * (1 - phase))


def arc(rng, t):
    """A quarter to half a circle, either way."""
    x, y = turn(rng.uniform(0, TAU) + either(rng) * rng.uniform(TAU / 4, TAU / 2) * t, rng.uniform(14, 20))
    return Trajectory(x, y)


def circle(rng, t):
    """Most of a circle or all of it, either way."""
    x, y = turn(rng.uniform(0, TAU) + either(rng) * rng.uniform(0.7, 1) * TAU * t, rng.uniform(8, 18))
    return Trajectory(x, y)


def ellipse(rng, t):
    """Most of a flat ellipse, at any angle."""
    phase = rng.uniform(0, TAU) + either(rng) * rng.uniform(0.7, 1) * TAU * t
    x, y = rng.uniform(14, 18) * np.cos(phase), rng.uniform(5, 9) * np.sin(phase)
    return Trajectory(*turn(rng.uniform(0, TAU), x, y))


def zoom_in(rng, t):
    """The sprite grows."""
    return Trajectory(scale=rng.uniform(0.65, 0.8) + rng.uniform(0.9, 1) * t)


def zoom_out(rng, t):
    """The sprite shrinks."""
    return zoom_in(rng, 1 - t)


def spin(rng, t):
    """At most 24 degrees a frame, or a star's five points would seem to turn the other way."""
    return Trajectory(angle=either(rng) * rng.uniform(0.4, 1) * TAU * t)


def roll(rng, t):
    """Turns in the sense in which it would roll on the ground, sideways."""
    way = either(rng)
    return Trajectory(way * rng.uniform(26, 40) * t, angle=way * rng.uniform(0.4, 0.8) * TAU * t)


def pan(rng, t):
    """The camera moves, the sprite stays on the screen."""
    camera_x, camera_y = turn(rng.uniform(0, TAU), rng.uniform(24, 48) * t)
    return Trajectory(camera_x=camera_x, camera_y=camera_y)


def pan_line(rng, t, between=(0, TAU / 3)):
    """`between` bounds the angle between the sprite's way on the screen and the background's: here up to 120
    degrees, which leaves out the sprite that moves against the background."""
    way = rng.uniform(0, TAU)
    camera_x, camera_y = turn(way, rng.uniform(24, 44) * t)
    x, y = turn(way + TAU / 2 + either(rng) * rng.uniform(*between), rng.uniform(22, 36) * t)
    return Trajectory(x, y, camera_x=camera_x, camera_y=camera_y)


def pan_counter(rng, t):
    """The sprite moves against the background: the camera pans the way the sprite goes."""
    return pan_line(rng, t, between=(0.47 * TAU, 0.5 * TAU))


def wander(rng, t):
    """A smooth curve through random points, slow or fast, that may turn the sprite with it.

    It belongs to no kind; speed, turning and extent reach those of the held-out motions.
    """
    corners = rng.uniform(-1, 1, size=(rng.integers(5, 12), 2))
    curve = scipy.interpolate.CubicSpline(np.linspace(0, 1, len(corners)), corners)
    tilt = rng.choice((0, 1)) * rng.uniform(-1.2, 1.2) * np.sin(TAU * t)
    # Passed through at even speed; the spline's own would be fast in the middle and slow at its bends.
    x, y = polyline(t, *curve(np.linspace(0, 1, 121)).T)
    return fitted(rng, x, y, curve(np.linspace(0, 1, 121)), tilt)


def dart(rng, t):
    """Straight from one random point to the next, at constant speed."""
    corners = rng.uniform(-1, 1, size=(rng.integers(4, 8), 2))
    return fitted(rng, *polyline(t, *corners.T), corners)


def fitted(rng, x, y, outline, angle=0.0):
    """The path (x, y) at a random size: up to 40 pixels wide, from 24 to 140 long.

    outline (n, 2): the points that tell its length and its extent.
    """
    length, extent = np.hypot(*np.diff(outline, axis=0).T).sum(), np.ptp(outline, axis=0).max()
    size = np.clip(rng.uniform(0.45, 1) * 40 / extent, 24 / length, 140 / length)
    return Trajectory(size * x, size * y, angle=angle)


def figure_eight(rng, t):
    """A figure eight, at any angle."""
    phase = rng.uniform(0, TAU) + either(rng) * TAU * t
    x, y = rng.uniform(14, 18) * np.sin(phase), rng.uniform(7, 9) * np.sin(2 * phase)
    return Trajectory(*turn(rng.uniform(0, TAU), x, y))


def spiral(rng, t):
    """Inwards or outwards; the square root makes the speed even."""
    s = np.sqrt(t if rng.random() < 0.5 else 1 - t)
    x, y = turn(rng.uniform(0, TAU) + either(rng) * rng.uniform(1.3, 1.6) * TAU * s, rng.uniform(14, 18) * s)
    return Trajectory(x, y)


def s_curve(rng, t):
    """One wave across the picture."""
    x, y = rng.uniform(30, 38) * t, either(rng) * rng.uniform(9, 12) * np.sin(TAU * t)
    return Trajectory(*turn(rng.uniform(0, TAU), x, y))


def pendulum(rng, t):
    """Hangs from a point above and tilts with its rod."""
    swing = rng.uniform(0.6, 0.8) * np.sin(rng.uniform(0, TAU) + rng.uniform(0.8, 1.1) * TAU * t)
    x, y = turn(swing, 0.0, rng.uniform(20, 26))
    return Trajectory(x, y, angle=swing)


def staircase(rng, t):
    """Three steps, up or down, either way."""
    steps, tread, rise = 3, rng.uniform(9, 12), rng.uniform(8, 11)
    corners = np.arange(2 * steps + 1)
    x, y = polyline(t, tread * ((corners + 1) // 2), rise * (corners // 2))
    return Trajectory(either(rng) * x, either(rng) * y)


def loop(rng, t):
    """A loop-the-loop: along a line, once round in its middle, and on."""
    along, radius = rng.uniform(20, 28), rng.uniform(8, 10)
    x, y = along * t + radius * np.sin(TAU * t), either(rng) * radius * np.cos(TAU * t)
    return Trajectory(*turn(rng.uniform(0, TAU), x, y))


def heart(rng, t):
    """Once around a heart."""
    phase = rng.uniform(0, TAU) + either(rng) * TAU * t
    size = rng.uniform(0.7, 0.9)
    x = 16 * np.sin(phase) ** 3
    y = -13 * np.cos(phase) + 5 * np.cos(2 * phase) + 2 * np.cos(3 * phase) + np.cos(4 * phase)
    return Trajectory(size * x, size * y)


TRAIN_MOTIONS = {f.__name__: f for f in (
    rest, line, accelerate, there_and_back, corner, zigzag, bounce, hop, arc, circle, ellipse,
    zoom_in, zoom_out, spin, roll, pan, pan_line, wander, dart)}
HELDOUT_MOTIONS = {f.__name__: f for f in (
    figure_eight, spiral, s_curve, pendulum, staircase, loop, heart, pan_counter)}
MOTIONS = {**TRAIN_MOTIONS, **HELDOUT_MOTIONS}


# ----------------------------------------------------------------------------------------------------- scenes
# Every seed feeds separate generators. The appearance's draws therefore never change the motion's: another
# prompt, or another set of words in a later version, leaves every path as it was.
APPEARANCE, MOTION, PARAMETERS, PLACE = range(4)


def generator(seed, purpose):
    """One stream of random numbers per purpose of a scene."""
    return np.random.default_rng([seed, purpose])


def scene(seed, motions=tuple(TRAIN_MOTIONS), prompt=None):
    """A scene as a JSON-able dict: everything `render` needs, a function of the arguments only.

    seed: a non-negative int. motions: names to draw the kind of motion from. prompt: a caption that sets the
    appearance in place of the seed; motion, sprite radius and pattern offset stay those of the seed.
    """
    rng = generator(seed, APPEARANCE)
    drawn = [str(rng.choice(list(names))) for names in (SHAPES, COLOURS, PATTERNS, BACKGROUNDS)]
    offset = rng.uniform(0, 64, size=2).tolist()
    shape, colour, pattern, background = attributes(prompt) if prompt is not None else drawn
    rng = generator(seed, MOTION)
    return {"seed": int(seed), "motion": str(rng.choice(list(motions))), "radius": float(rng.uniform(9, 12)),
            "shape": shape, "colour": colour, "pattern": pattern, "background": background, "offset": offset}


def caption(scene):
    """Scene -> "a red star on a teal striped background"."""
    return describe(scene["shape"], scene["colour"], scene["pattern"], scene["background"])


def trajectory(scene, frames=FRAMES):
    """Scene -> Trajectory of float64 arrays (frames,), with x and y in [0, 64] from the top left corner.

    The path is put at random where the sprite stays inside. Its bounds are read off a fixed fine time grid,
    never off the frames, so that any number of frames shows the same path.
    """
    def moved(t):
        """The trajectory at times t in [0, 1]."""
        values = MOTIONS[scene["motion"]](generator(scene["seed"], PARAMETERS), t)
        return Trajectory(*(np.broadcast_to(np.asarray(v, float), t.shape) for v in values))

    fine, shown = moved(np.linspace(0, 1, 121)), moved(np.linspace(0, 1, frames))
    margin = scene["radius"] * fine.scale.max()
    rng = generator(scene["seed"], PLACE)

    def place(values, bounds):
        """Moves a coordinate to a random place inside the picture."""
        low, high = margin - bounds.min(), SIZE - margin - bounds.max()
        # A path that is too wide for its sprite hangs over equally on both sides.
        return values + (rng.uniform(low, high) if low < high else (low + high) / 2)

    return shown._replace(x=place(shown.x, fine.x), y=place(shown.y, fine.y))


def path(scene, frames=FRAMES):
    """Scene -> (frames, 2) float64: the sprite's centre x, y on the screen, pixels of a 64-pixel picture."""
    course = trajectory(scene, frames)
    return np.stack([course.x, course.y], axis=1)


def render(scene, frames=FRAMES, size=SIZE):
    """Scene -> (frames, size, size, 3) uint8 RGB. All frames at once: arrays are (frames, size, size).

    A scene's "colour" and "background" may also be RGB triples: the autoencoder learns on any colours.
    """
    def rgb(names, colour):
        """(3,) float32 of a name or a triple."""
        return np.float32(names[colour] if isinstance(colour, str) else colour)

    # float32 halves the time; an extra (1, 1) on every path lets it broadcast against the picture.
    course = Trajectory(*(values.astype(np.float32)[:, None, None] for values in trajectory(scene, frames)))
    pixel = np.float32(SIZE / size)
    centres = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * pixel
    x, y = centres[None, None, :], centres[None, :, None]

    offset_x, offset_y = np.float32(scene["offset"])
    tone = PATTERNS[scene["pattern"]](x + course.camera_x + offset_x, y + course.camera_y + offset_y)
    ground = (1 + np.float32(CONTRAST) * tone)[..., None] * rgb(BACKGROUNDS, scene["background"])

    # Look up the shape in the sprite's own coordinates: moved back, turned back, in units of the radius.
    radius = np.float32(scene["radius"]) * course.scale
    u, v = turn(-course.angle, (x - course.x) / radius, (y - course.y) / radius)
    distance = SHAPES[scene["shape"]](u, v) * (radius / pixel)
    # One pixel of antialiasing: a pixel whose centre lies on the outline is half covered.
    cover = np.clip(np.float32(0.5) - distance, 0, 1)[..., None]
    ground += cover * (rgb(COLOURS, scene["colour"]) - ground)
    return (ground.clip(0, 255) + np.float32(0.5)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ the outline
# A judge of whole pictures still says "circle" when a circle has grown corners. The outline shows them.

CORNERS = {3: "triangle", 4: "square", 5: "star"}
ROUND = 0.07                    # half the corner strength of a square, a quarter of a star's
SMALLEST = 60                   # pixels; on the outline of a smaller sprite the pixels themselves are corners


def sprite_cover(frames):
    """(..., h, w, 3) uint8 -> (..., h, w) in [0, 1]: how much of each pixel the sprite covers.

    The brightest channel of a background stays below 132, that of a sprite is at least 220.
    """
    return np.clip((frames.max(-1) - 150.0) / 50, 0, 1)


def corner_strengths(cover):
    """cover (h, w), not all zero -> {k: strength in [0, 1]} for k = 3, 4, 5 corners.

    The strength is |sum cover e^(i k angle)| / sum cover, with angles about the centroid. It grows with the
    area that k evenly spaced corners hold, and does not depend on place, size or turn. A triangle has 0.28 at
    k = 3, a square 0.14 at 4, a star 0.29 and a regular pentagon 0.09 at 5, and all about 0 elsewhere.
    """
    rows, columns = np.mgrid[:cover.shape[0], :cover.shape[1]]
    area = cover.sum()
    angle = np.arctan2(rows - (cover * rows).sum() / area, columns - (cover * columns).sum() / area)
    return {k: float(abs((cover * np.exp(1j * k * angle)).sum()) / area) for k in CORNERS}


def outline_shape(frame):
    """frame (h, w, 3) uint8 -> "circle", "square", "triangle" or "star"; None where no whole sprite is seen.

    The largest bright region is read. The number of corners with the greatest strength names the shape; below
    ROUND it is a circle. So shapes of six corners or more count as circles, and so do ovals up to 1.7 times
    as long as wide. None: the region has less than SMALLEST pixels, or part of the sprite lies outside: the
    border of the picture holds more of its pixels than half the root of its area.
    """
    cover = sprite_cover(frame)
    regions, _ = scipy.ndimage.label(cover > 0.5)
    sprite = regions == np.bincount(regions.ravel(), minlength=2)[1:].argmax() + 1
    area, on_border = sprite.sum(), sprite.sum() - sprite[1:-1, 1:-1].sum()
    if area < SMALLEST or on_border > 0.5 * np.sqrt(area):
        return None
    # One pixel more all around: the rim that the sprite covers by less than half.
    strengths = corner_strengths(cover * scipy.ndimage.binary_dilation(sprite))
    corners = max(strengths, key=strengths.get)
    return CORNERS[corners] if strengths[corners] >= ROUND else "circle"


def shape_share(frames, shape):
    """frames (F, h, w, 3) uint8 -> share in [0, 1] of frames whose outline is `shape`.

    Frames without a whole sprite do not count. 0 where no frame has one: such a clip does not show the shape.
    """
    seen = [found for found in map(outline_shape, frames) if found]
    return seen.count(shape) / max(1, len(seen))


# -------------------------------------------------------------------------------------------- reference clips
# References are drawn, not placed: clip `index` of a split is a function of these two. No clip is chosen or
# dropped by what a model does with it; settings are chosen on "validation", and "test" is only measured.
# "test2" has clips that no run had seen before the second model was measured.
SPLITS = {"test": 40_000_000, "validation": 50_000_000, "test2": 80_000_000}    # first seeds, far from others
COMMITTED = 12                                                 # clips of "test" that lie in data/clips


def reference(split, index):
    """The index-th reference clip of a split as a dict: name, seed, motion, caption, prompts.

    Held-out motions come in turn, in the order of HELDOUT_MOTIONS; appearance and target prompts are drawn.
    Its frames are `render(scene(seed, [motion], caption))`.
    """
    seed, (turns, kind) = SPLITS[split] + index, divmod(index, len(HELDOUT_MOTIONS))
    motion = list(HELDOUT_MOTIONS)[kind]
    rng = generator(seed, APPEARANCE)
    words = describe(*(str(rng.choice(names)) for names in
                       (list(SHAPES), list(COLOURS), patterns_for(motion), list(BACKGROUNDS))))
    suffix = {"test": "", "validation": "_v", "test2": "_w"}[split]
    name = motion + (f"_{turns + 1}" if turns else "") + suffix
    return {"name": name, "seed": seed, "motion": motion, "caption": words,
            "prompts": target_prompts(words, seed, motion)}


def patterns_for(motion):
    """Names of the patterns that show a motion: on a plain background nobody sees the camera move."""
    return [name for name in PATTERNS if motion != "pan_counter" or name != "plain"]


def target_prompts(reference, seed, motion):
    """Three captions that differ from `reference` everywhere, and from each other in all but the pattern."""
    rng = np.random.default_rng(seed)
    choices = []
    for own, names in zip(attributes(reference), (SHAPES, COLOURS, patterns_for(motion), BACKGROUNDS)):
        others = rng.permutation([name for name in names if name != own])
        choices.append([str(others[i % len(others)]) for i in range(3)])
    return [describe(*words) for words in zip(*choices)]


def read_clip(file):
    """An animated WebP -> (F, h, w, 3) uint8."""
    with Image.open(file) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def write_clips(folder, split="test", count=COMMITTED):
    """Write the first `count` references of a split as lossless animated WebP, and clips.json about them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    for about in (reference(split, i) for i in range(count)):
        frames = render(scene(about["seed"], [about["motion"]], about["caption"]))
        first, *rest_of_them = [Image.fromarray(frame) for frame in frames]
        name = about.pop("name")
        file = folder / f"{name}.webp"
        first.save(file, save_all=True, append_images=rest_of_them, duration=1000 // FPS, loop=0,
                   lossless=True, quality=100, method=6)
        # The encoder merges equal neighbours, which would shorten the clip: refuse such a clip.
        if not np.array_equal(read_clip(file), frames):
            raise RuntimeError(f"{file} does not read back as it was rendered")
        index[name] = about
    (folder / "clips.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes reference clips of the tiny world.")
    parser.add_argument("folder", nargs="?", help="default, of the split test: data/clips")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--count", type=int, default=COMMITTED)
    args = parser.parse_args()
    if args.split != "test" and not args.folder:
        parser.error("data/clips holds the split test: name another folder")
    write_clips(args.folder or Path(__file__).parent / "clips", args.split, args.count)
