"""Where does a variant's Frechet distance from real clips come from? Read off the cells of a run:

    python eval_mi.py --clip-count 5 --variants full,no-mqk,no-mv,base --out out/five
    python data/distance.py out/five                   # default: out/eval, a folder with cells of one run

Every sampled frame is measured as it is, and again after a part of it was made right, pixel by pixel: the
sprite's colour, the background, both. What is left after both is due to outlines, sizes and places alone. Two
more rows say how far rendered clips are: the same prompts in the reference's own motion, and in random ones.
"""

import collections
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import eval_mi                                                                           # noqa: E402
import mini_mi                                                                           # noqa: E402
import world                                                                             # noqa: E402


def corrected(frames, prompt, sprite, ground):
    """frames (F,h,w,3) uint8 with the prompt's colour for the sprite, its background for the rest, or both.

    The background stands still, at the offset of a scene of its own.
    """
    scene = {**world.scene(0, prompt=prompt), "motion": "rest"}
    cover = world.sprite_cover(frames)[..., None]
    centres = np.arange(world.SIZE) + 0.5
    x, y = np.meshgrid(centres + scene["offset"][0], centres + scene["offset"][1])
    tone = world.PATTERNS[scene["pattern"]](x, y)[..., None]
    clean = (1 + world.CONTRAST * tone) * np.float32(world.BACKGROUNDS[scene["background"]])
    above = np.float32(world.COLOURS[scene["colour"]]) if sprite else frames
    below = clean if ground else frames
    return (cover * above + (1 - cover) * below).clip(0, 255).astype(np.uint8)


def main(folder):
    """Prints a Markdown table: a row for every variant in `folder`, then the two rendered ones."""
    model, _, preprocess = eval_mi.load_clip(HERE / "tiny" / "clip")
    references = {clip["name"]: clip for split in world.SPLITS
                  for clip in (world.reference(split, n) for n in range(200))}
    cells = collections.defaultdict(list)                          # variant -> [(reference, prompt, frames)]
    for file in sorted(Path(folder).glob("cells/*/*-p*-s*.npz")):         # not those of the own caption
        variant, prompt = re.fullmatch(r"(.+)-p(\d+)-s.*", file.stem).groups()
        reference = references[file.parent.name]
        cells[variant].append((reference, reference["prompts"][int(prompt)], np.load(file)["frames"]))

    def features(clips):
        """(n, D) of all frames of some clips."""
        return np.concatenate([np.asarray(model.image_features(preprocess(clip))) for clip in clips])

    if not cells:
        raise mini_mi.UserError(f"{folder} has no cells of eval_mi.py: give the folder of a run")
    some = next(iter(cells.values()))
    sets = [[world.render(world.scene(60_000_000 + 1000 * n + i, tuple(world.MOTIONS), prompt))
             for i, (_, prompt, _) in enumerate(some)] for n in range(2)]
    real = features(sets[0])
    print("| variant | as it is | sprite's colour right | background right | both right |")
    print("|---|---|---|---|---|")
    for variant, samples in cells.items():
        rights = [[frames for *_, frames in samples]] + [
            [corrected(frames, prompt, *parts) for _, prompt, frames in samples]
            for parts in ((True, False), (False, True), (True, True))]
        distances = [f"{eval_mi.frechet_distance(features(clips), real):.4f}" for clips in rights]
        print("| " + " | ".join([variant, *distances]) + " |")
    own = [world.render(world.scene(reference["seed"], [reference["motion"]], prompt))
           for reference, prompt, _ in some]
    for name, clips in (("rendered, the reference's motion", own), ("rendered, random motions", sets[1])):
        print(f"| {name} | {eval_mi.frechet_distance(features(clips), real):.4f} | | | |")


if __name__ == "__main__":
    sys.exit(mini_mi.guarded(lambda: main(sys.argv[1] if sys.argv[1:] else "out/eval")))
