"""Makes README's picture, data/example.gif: what the embeddings do, and what the start noise does alone.

    python data/picture.py                 from the settings, clip, prompts and seed of `python mini_mi.py`

Columns: the reference; then with and without embeddings, first from start noise that is in part the inverted
reference, as `python mini_mi.py` has it, then from plain noise, as with `--noise-prior 0`. The dots are the
way of the reference's sprite, known because the reference is rendered; the ring is where that sprite is now.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import mini_mi                                                                           # noqa: E402
import world                                                                             # noqa: E402

ZOOM = 3                # of the 64 pixels, as `side_by_side` has them


def marked(video, path):
    """(F,h,w,3) uint8 enlarged, with the way (F,2), in pixels, as dots and a ring where it is now."""
    frames = []
    for frame, (x, y) in zip(video, ZOOM * path):
        image = Image.fromarray(frame)
        image = image.resize([ZOOM * side for side in image.size], Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for px, py in ZOOM * path:
            draw.ellipse((px - 2, py - 2, px + 2, py + 2), "white", "black")
        draw.ellipse((x - 7, y - 7, x + 7, y + 7), outline="black", width=4)
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), outline="white", width=2)
        frames.append(np.asarray(image))
    return np.stack(frames)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--motion", help="a motion of this clip, in place of training one")
    parser.add_argument("--to", type=Path, default=HERE / "example.gif")
    args = parser.parse_args()
    config, _ = mini_mi.settle({})
    models = mini_mi.load_models(config.model, config.device)
    pixels, grid = mini_mi.sizes(config)
    reference = mini_mi.read_video(config.video, config.frames, pixels)
    about = json.loads((HERE / "clips" / "clips.json").read_text())[Path(config.video).stem]
    path = world.path(world.scene(about["seed"], [about["motion"]], about["caption"]), config.frames)

    source, empty, *texts = (mini_mi.encode_prompt(models, [p])
                             for p in (config.source_prompt, "", *config.prompts))
    latents = mini_mi.encode_video(models, mini_mi.to_model_range(reference),
                                   torch.Generator().manual_seed(1_000_000))
    if args.motion:
        motion = mini_mi.MotionEmbeddings.load(args.motion)
    else:
        motion = mini_mi.prepared_motion(config, models.unet, grid, None)
        training = {name: getattr(config, name) for name in (*mini_mi.TRAINING, "seed")}
        mini_mi.train_motion(models, latents, source, motion=motion, **training)
    inverted = mini_mi.ddim_invert(models, latents, empty, mini_mi.INVERT_STEPS)
    fresh = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2_000_000 + config.seed))

    rows = []
    for prompt, text in zip(config.prompts, texts):
        clips, labels = [reference], [f"reference; prompt: {prompt}"]
        for share in (config.noise_prior, 0.0):
            noise = mini_mi.blend_noise(inverted, fresh, share)
            begin = f"start noise {share:.0%} inverted reference" if share else "plain start noise"
            for learned in (motion, None):
                sampled = mini_mi.sample(models, noise, text, empty, config.sample_steps, config.guidance,
                                         learned)
                clips.append(mini_mi.to_uint8(mini_mi.decode_video(models, sampled)[0]))
                labels.append(f"{'with' if learned else 'no'} embeddings, {begin}")
        rows.append(mini_mi.side_by_side([marked(clip, path) for clip in clips], labels))
    mini_mi.write_video(args.to, np.concatenate(rows, 1), config.fps)


if __name__ == "__main__":
    main()
