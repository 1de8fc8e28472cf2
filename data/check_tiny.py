"""Measures the embedded models against what was asked of them: `python data/make_tiny.py --check`.

Every number comes with its n and a 95 % interval: Student t over clips for means, Wilson for shares, a
delete-one-clip jackknife for ratios. A clip is one sample, its frames are not. "met" goes by the value, not
by the interval. No clip here was trained on: all have seeds that training never drew, and those of targets 1,
2 and 4 show held-out motions.
"""

import contextlib
import io
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import eval_mi  # noqa: E402
import mini_mi  # noqa: E402
import world  # noqa: E402

PROMPTS = 48             # prompts to sample, for targets 2 and 3
REAL = 288               # real clips for targets 2 and 3: every caption once
HELD = 48                # real clips for target 1
CLIPS = 12               # reference clips for target 4
BATCH = 8                # clips sampled as one batch
GRID = 16                # tracked points per side
STILL = eval_mi.STILL    # pixels per frame below which something rests
SEEDS = 9_000_000        # where the seeds of this file's scenes begin; no pool of make_tiny.py reaches them
ATTRIBUTES = ("shape", "sprite colour", "background pattern", "background colour")
TRAINING = ("steps", "lr", "lr_schedule", "batch", "loss", "t_min")    # those of train_motion


class Row(NamedTuple):
    """One line of the report. met is None where nothing was asked."""
    what: str
    asked: str
    reached: str
    interval: str
    n: str
    met: bool | None = None


def mean_row(what, values, asked="", met=None, digits=3, unit=""):
    """A row for the mean of independent values; met: a function of the mean."""
    mean, low, high = eval_mi.student_interval(values)
    return Row(what, asked, f"{mean:.{digits}f}{unit}", f"{low:.{digits}f} to {high:.{digits}f}",
               str(len(values)), met and met(mean))


def share_row(what, hits, asked="", met=None):
    """A row for the share of true values; met: a function of the share."""
    low, high = eval_mi.wilson_interval(int(sum(hits)), len(hits))
    share = float(np.mean(hits))
    return Row(what, asked, f"{100 * share:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}", str(len(hits)),
               met and met(share))


class Judge:
    """The tiny CLIP: which of all captions does a clip, or a frame, show?"""

    def __init__(self, folder, device):
        self.clip, tokenizer, self.preprocess = eval_mi.load_clip(folder / "clip", device)
        self.captions = world.all_captions()
        with torch.no_grad():
            self.texts = self.clip.text_features(tokenizer(self.captions).to(device)).cpu()

    @torch.no_grad()
    def features(self, frames):
        """frames (F,h,w,3) uint8 -> (F,D)"""
        return self.clip.image_features(self.preprocess(frames)).cpu()

    def attributes(self, features):
        """features (F,D) of one clip -> the attributes (shape, colour, pattern, background) that it shows"""
        return world.attributes(self.captions[eval_mi.best_text(features, self.texts)])

    def constancy(self, features):
        """features (F,D) -> share of frames that, judged alone, show the whole clip's shape and colour"""
        own = self.attributes(features)[:2]
        return float(np.mean([self.attributes(frame[None])[:2] == own for frame in features]))


def scenes(count, motions, captions=None):
    """`count` real clips (F,h,w,3) uint8 and their captions; given captions are taken in turn."""
    made = [world.scene(SEEDS + i, motions, captions and captions[i % len(captions)]) for i in range(count)]
    return [world.render(s) for s in made], [world.caption(s) for s in made]


def generate(models, settings, noise, prompts, motion=None):
    """noise (B,C,F,H,W) and B prompts -> B clips (F,h,w,3) uint8; settings: the model's mini_mi.json"""
    text, negative = (mini_mi.encode_prompt(models, p) for p in (prompts, [""] * len(prompts)))
    latents = mini_mi.sample(models, noise, text, negative, settings["sample_steps"], settings["guidance"],
                             motion, progress=False)
    return [mini_mi.to_uint8(video) for video in mini_mi.decode_video(models, latents)]


def fresh_noise(models, count, seed):
    """(count,C,F,H,W)"""
    size = world.SIZE // models.vae.factor
    shape = (count, models.unet.conv_in.in_channels, world.FRAMES, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(models.device)


# ----------------------------------------------------------------------------------------- 1: the autoencoder

def target_vae(models):
    """PSNR, peak 2, of real clips that went through the autoencoder, and whether it kept their outlines."""
    values, outlines = [], []
    clips = zip(*scenes(HELD, world.HELDOUT_MOTIONS))
    for frames, caption in tqdm(list(clips), desc="1 autoencoder", unit="clip"):
        video = mini_mi.to_model_range(frames)
        back = mini_mi.decode_video(models, mini_mi.encode_video(models, video)).cpu()
        values.append(10 * np.log10(4 / (back - video).square().mean().item()))
        outlines.append(world.shape_share(mini_mi.to_uint8(back[0]), world.attributes(caption)[0]))
    return [mean_row("1 VAE, PSNR of held-out clips at 64x64, mean over clips", values, ">= 32 dB",
                     lambda mean: mean >= 32, 2, " dB"),
            mean_row("1 frames whose outline is still the shape (world.outline_shape)", outlines)]


def latent_blocks(models, frames):
    """frames (N,64,64,3) uint8 -> latents (N*H*W, C) and the mean RGB of each one's pixels (N*H*W, 3)."""
    video = mini_mi.to_model_range(frames)
    latents = mini_mi.encode_video(models, video).cpu()
    pixels = torch.nn.functional.avg_pool2d(video[0].transpose(0, 1), models.vae.factor)      # (N, 3, H, W)
    return latents[0].permute(1, 2, 3, 0).flatten(0, 2).double(), pixels.permute(0, 2, 3, 1).flatten(0, 2)


def target_latents(models):
    """Is colour smooth in the latent space? Named before the autoencoder was trained.

    An autoencoder that had seen ten colours placed green opposite to all others, and motion inversion then
    failed on every clip with green: "a sprite is here" was one direction for five colours, another for green.
    """
    rng = np.random.default_rng(SEEDS)
    fits = []
    for i in range(HELD):
        scene = world.scene(SEEDS + i, world.HELDOUT_MOTIONS)
        scene.update(colour=tuple(rng.uniform(0, 255, 3)), background=tuple(rng.uniform(0, 255, 3)))
        fits.append(latent_blocks(models, world.render(scene, frames=4)))
    z, y = (torch.cat(part).numpy() for part in zip(*fits))
    half = len(z) // 2                              # the map is judged on other clips than it was fitted on
    design = np.concatenate([z, np.ones((len(z), 1))], 1)
    rest = y[half:] - design[half:] @ np.linalg.lstsq(design[:half], y[:half], rcond=None)[0]
    r2 = 1 - (rest ** 2).sum() / ((y[half:] - y[half:].mean(0)) ** 2).sum()
    alike = []
    for background in world.BACKGROUNDS:
        steps = []
        for colour in world.COLOURS:
            scene = world.scene(SEEDS, ["line"], world.describe("circle", colour, "plain", background))
            frames = world.render(scene)
            factor = models.vae.factor
            inside = (frames.max(-1) > 150).reshape(len(frames), world.SIZE // factor, factor, -1, factor)
            inside = inside.mean((2, 4)).ravel()
            latents = latent_blocks(models, frames)[0]
            steps.append(latents[inside > 0.99].mean(0) - latents[inside == 0].mean(0))
        alike += [bool(a @ b > 0) for a, b in itertools.combinations(steps, 2)]
    return [Row("1 latents: R2 of a linear map to the mean RGB of a block, colours never seen", ">= 0.9",
                f"{r2:.3f}", "", f"{len(z) - half} blocks", bool(r2 >= 0.9)),
            share_row('1 latents: pairs of colours whose "sprite minus background" points the same way',
                      alike, ">= 95 %", lambda share: share >= 0.95)]


# ------------------------------------------------------------------------------------------------ 2: the text

def target_text(judge, sampled, prompts):
    """Do sampled clips show what their prompts say, and can the judge tell?"""
    rows = []
    shown = [judge.attributes(judge.features(clip)) for clip in sampled]
    frames, captions = scenes(REAL, world.HELDOUT_MOTIONS, judge.captions)
    read = [judge.attributes(judge.features(clip)) for clip in tqdm(frames, desc="2 judge", unit="clip")]
    for about, asked, found, texts in (("sampled clips", 0.95, shown, prompts),
                                       ("real clips (the judge itself)", 0.99, read, captions)):
        for i, name in enumerate(ATTRIBUTES):
            hits = [f[i] == world.attributes(text)[i] for f, text in zip(found, texts)]
            rows.append(share_row(f"2 text, {name} of {about}", hits, f">= {100 * asked:.0f} %",
                                  lambda share, asked=asked: share >= asked))
    return rows


# ---------------------------------------------------------------------------------------- 3: the motion prior

def sprite_path(frames):
    """(F,h,w,3) uint8 -> (F,2): the sprite's centre, x and y in pixels.

    Sprites are brighter than any background, so they are found without tracking, whatever the camera does.
    """
    weight = world.sprite_cover(frames) + 1e-6                         # no sprite: the middle of the picture
    rows, columns = np.mgrid[:frames.shape[1], :frames.shape[2]] + 0.5
    centre = np.stack([(weight * columns).sum((1, 2)), (weight * rows).sum((1, 2))], 1)
    return centre / weight.sum((1, 2))[:, None]


def camera_speed(frames, lag=2, reach=8):
    """(F,h,w,3) uint8 -> pixels per frame that the background moves.

    The whole background moves alike, so every shift up to `reach` pixels is tried on frames `lag` apart: the
    best has the least squared error where neither frame shows the sprite. Along stripes no motion can be
    seen; the small price on length takes the shortest shift there.
    """
    grey, ground = frames.mean(-1), frames.max(-1) < 150
    inner = slice(reach, -reach)
    first, free = grey[:-lag, inner, inner], ground[:-lag, inner, inner]
    least, shift = np.full(len(first), np.inf), np.zeros(len(first))
    for dy, dx in itertools.product(range(2 * reach + 1), repeat=2):
        window = np.s_[lag:, dy:dy + first.shape[1], dx:dx + first.shape[2]]
        length, both = np.hypot(dy - reach, dx - reach), free & ground[window]
        error = ((grey[window] - first) ** 2 * both).sum((1, 2)) / np.maximum(both.sum((1, 2)), 1)
        error += 0.25 * length
        shift, least = np.where(error < least, length, shift), np.minimum(error, least)
    return float(shift.mean() / lag)


def motion_facts(clips, captions, judge, what):
    """What target 3 compares: a list of values per clip for each of seven properties."""
    facts = dict(speed=[], straight=[], way=[], camera=[], consistency=[], constancy=[], outline=[])
    for frames, caption in tqdm(list(zip(clips, captions)), desc=f"3 {what}", unit="clip"):
        path, features = sprite_path(frames), judge.features(frames)
        along, net = np.linalg.norm(np.diff(path, axis=0), axis=1), path[-1] - path[0]
        facts["speed"].append(along.mean())
        facts["consistency"].append(eval_mi.temporal_consistency(features))
        facts["constancy"].append(judge.constancy(features))
        facts["outline"].append(world.shape_share(frames, world.attributes(caption)[0]))
        if along.mean() >= STILL:                       # what rests has neither a direction nor a path
            facts["straight"].append(np.linalg.norm(net) / along.sum())
            if np.linalg.norm(net) > 4:                 # back where it began: no direction
                facts["way"].append(net / np.linalg.norm(net))
        if world.attributes(caption)[2] != "plain":     # on a plain ground a camera's motion cannot be seen
            facts["camera"].append(camera_speed(frames))
    return facts


def target_motion(judge, sampled, prompts):
    """Do sampled clips move as the data does, and hold together as well?"""
    real, captions = scenes(REAL, world.TRAIN_MOTIONS, judge.captions)
    facts = {"sampled": motion_facts(sampled, prompts, judge, "sampled"),
             "real": motion_facts(real, captions, judge, "real")}
    rows = []
    for key, name, digits in (("speed", "sprite speed, px per frame", 2),
                              ("straight", "straightness, net way / path", 2),
                              ("camera", "background speed, px per frame", 2)):
        both = [facts[w][key] for w in ("sampled", "real")]
        for what, values in zip(facts, both):
            if values:
                rows.append(mean_row(f"3 {name}, {what}", values, digits=digits))
        if min(map(len, both)):
            test = scipy.stats.ks_2samp(*both)
            rows.append(Row(f"3 {name}: largest gap of the two distributions (Kolmogorov-Smirnov)",
                            "no difference at 5 %", f"{test.statistic:.2f}", eval_mi.p_text(test.pvalue),
                            f"{len(both[0])}, {len(both[1])}", bool(test.pvalue > 0.05)))
    for what, values in facts.items():
        rows.append(share_row(f"3 clips whose sprite moves, {what}", [v >= STILL for v in values["speed"]]))
        if values["camera"]:
            rows.append(share_row(f"3 patterned clips whose background moves, {what}",
                                  [v >= STILL for v in values["camera"]]))
        if values["straight"]:
            rows.append(share_row(f"3 moving sprites on an exact line (straightness above 0.99), {what}",
                                  [v > 0.99 for v in values["straight"]]))
    for what, values in facts.items():
        if values["way"]:
            spread, low, high = eval_mi.jackknife(lambda ways: 1 - float(np.linalg.norm(np.mean(ways, 0))),
                                                  values["way"])
            # Rayleigh's test: the chance of directions as unequal as these if all were equally likely.
            n, asked = len(values["way"]), "none preferred at 5 %" if what == "sampled" else ""
            p = float(np.exp(-n * (1 - spread) ** 2))
            rows.append(Row(f"3 circular spread of directions (1: none preferred), {what}", asked,
                            f"{spread:.2f}, {eval_mi.p_text(p)}",
                            f"{max(low, 0):.2f} to {min(high, 1):.2f}", str(n), p > 0.05 if asked else None))
    for key, name in (("consistency", "temporal consistency"),
                      ("constancy", "frames that keep the clip's shape and colour"),
                      ("outline", "frames whose outline is the prompt's shape")):
        rows += [mean_row(f"3 {name}, {what}", values[key]) for what, values in facts.items()]
    both = [facts[what]["consistency"] for what in ("sampled", "real")]
    gap = np.mean(both[0]) - np.mean(both[1])
    ends = scipy.stats.ttest_ind(*both, equal_var=False).confidence_interval()              # Welch's interval
    rows.append(Row("3 temporal consistency, sampled minus real", ">= -0.01", f"{gap:+.4f}",
                    f"{ends.low:+.4f} to {ends.high:+.4f}", f"{len(sampled)}, {len(real)}",
                    bool(gap >= -0.01)))
    shared = set(world.TRAIN_MOTIONS) & set(world.HELDOUT_MOTIONS)
    count, kinds = len(set(judge.captions)), len(world.TRAIN_MOTIONS)
    rows += [Row("3 distinct captions in training", ">= 200", str(count), "", "", count >= 200),
             Row("3 kinds of motion in training", ">= 12", str(kinds), "", "", kinds >= 12),
             Row("3 held-out motions that training saw", "0", str(len(shared)), "",
                 str(len(world.HELDOUT_MOTIONS)), not shared)]
    return rows


# ----------------------------------------------------------------------------------------------- 4: inversion

def target_inversion(models, judge, settings):
    """The method on reference clips of held-out motions, and what bounds it; a prompt and a seed per clip."""
    index = list(mini_mi.read_json(HERE / "clips" / "clips.json").items())[:CLIPS]
    scores, seconds = [], 0.0
    empty, training = mini_mi.encode_prompt(models, [""]), {name: settings[name] for name in TRAINING}
    for number, (name, about) in enumerate(tqdm(index, desc="4 inversion", unit="clip")):
        clip, prompt = world.read_clip(HERE / "clips" / f"{name}.webp"), about["prompts"][0]
        latents = mini_mi.encode_video(models, mini_mi.to_model_range(clip))
        began = time.perf_counter()
        motion = mini_mi.train_motion(models, latents, mini_mi.encode_prompt(models, [about["caption"]]),
                                      **training, progress=False)
        seconds += time.perf_counter() - began
        inverted = mini_mi.ddim_invert(models, latents, empty, progress=False)
        noise = fresh_noise(models, 1, seed=number + 1)
        blend = mini_mi.blend_noise(inverted, noise, settings["noise_prior"])
        jobs = {"full": (blend, motion), "base": (blend, None), "base-no-inversion": (noise, None)}
        videos = {what: generate(models, settings, begin, [prompt], with_motion)[0]
                  for what, (begin, with_motion) in jobs.items()}
        videos["vae"] = mini_mi.to_uint8(mini_mi.decode_video(models, latents)[0])
        scores.append(judged(judge, clip, prompt, about["caption"], videos))
    speed = f"{seconds / len(index):.1f}"
    return inversion_rows(scores) + [
        Row("4 training of the embeddings, seconds per clip", "", speed, "", str(len(index)))]


def judged(judge, clip, prompt, caption, videos):
    """Scores of one reference clip, per variant: motion fidelity, text similarity, leakage."""
    def moving(frames):
        """The tracks that are visible throughout."""
        tracks, visible = eval_mi.track_points(frames, GRID)
        return tracks[visible.all(1)]

    own, tracks, text = judge.features(clip), moving(clip), judge.texts[judge.captions.index(prompt)]
    scores = {}
    for name, frames in videos.items():
        features = judge.features(frames)
        pairs = zip(judge.attributes(features), world.attributes(caption))
        scores[name] = dict(
            fidelity=eval_mi.motion_fidelity(moving(frames), tracks, still=STILL),
            similarity=eval_mi.text_similarity(features, text),
            leakage=eval_mi.appearance_leakage(features, own),
            leaked=[shown == leak for shown, leak in pairs])
    return scores


def inversion_rows(scores):
    """scores: per clip what `judged` gives."""
    def mean(group, name, key):
        """Mean score of a variant over clips."""
        return float(np.mean([clip[name][key] for clip in group]))

    def ratio_row(what, statistic, asked, met):
        """A row with an interval by jackknife over clips."""
        value, low, high = eval_mi.jackknife(statistic, scores)
        return Row(what, asked, f"{value:+.3f}", f"{low:+.3f} to {high:+.3f}", str(len(scores)),
                   bool(met(value)))

    def way(group):
        """0: where plain sampling stands; 1: the reference through the autoencoder."""
        floor = mean(group, "base-no-inversion", "fidelity")
        return (mean(group, "full", "fidelity") - floor) / (mean(group, "vae", "fidelity") - floor)

    def change(group):
        """Relative change of text similarity by the embeddings."""
        return mean(group, "full", "similarity") / mean(group, "base", "similarity") - 1

    rows = [mean_row(f"4 motion fidelity, {name}", [clip[name]["fidelity"] for clip in scores])
            for name in scores[0]]
    rows.append(ratio_row("4 way of full from base-no-inversion to vae", way, ">= 0.8", lambda v: v >= 0.8))
    rows += [mean_row(f"4 text similarity, {name}", [clip[name]["similarity"] for clip in scores])
             for name in ("full", "base", "base-no-inversion")]
    rows.append(ratio_row("4 text similarity, full / base - 1", change, ">= -0.05", lambda v: v >= -0.05))
    leaked = {name: [np.mean(clip[name]["leaked"]) for clip in scores] for name in ("full", "base")}
    rows += [mean_row("4 leak: share of the reference's four attributes that full shows", leaked["full"],
                      "no more than base", lambda share: bool(share <= np.mean(leaked["base"]))),
             mean_row("4 leak: the same of base", leaked["base"])]
    difference, low, high, _ = eval_mi.paired_difference(*(
        [clip[name]["leakage"] for clip in scores] for name in ("full", "base")))
    rows.append(Row("4 leak: CLIP similarity to the reference, full minus base", "", f"{difference:+.3f}",
                    f"{low:+.3f} to {high:+.3f}", str(len(scores))))
    return rows


# ---------------------------------------------------------------------------------------------------- 5: cost

def weight_files(folder):
    """Every file of a model folder -> its size in bytes."""
    return {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}


def stored_dtypes(folder):
    """The number formats in the safetensors files of a folder."""
    return {str(t.dtype).removeprefix("torch.") for f in folder.rglob("*.safetensors")
            for t in mini_mi.load_tensors(f).values()}


def target_cost(folder, device):
    """What it weighs, and how long `python mini_mi.py` takes on this machine."""
    sizes, mib = weight_files(folder), 2 ** 20
    rows = [Row(f"5 {name}, MiB", "<= 16", f"{size / mib:.2f}", "", "1", size <= 16 * mib)
            for name, size in sizes.items() if name.endswith(".safetensors")]
    total, dtypes = sum(sizes.values()), stored_dtypes(folder)
    rows += [Row(f"5 all {len(sizes)} files, MiB", "<= 24", f"{total / mib:.2f}", "", "1", total <= 24 * mib),
             Row("5 numbers on disk", "float16", ", ".join(sorted(dtypes)), "", "", dtypes == {"float16"})]
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        status = mini_mi.main(["--model", str(folder), "--device", device.type, "--out", out])
        seconds = time.perf_counter() - began
    if status:
        raise RuntimeError("the default run failed; its message stands above")
    rows.append(Row(f"5 default run, seconds ({device.type}, {torch.get_num_threads()} threads)", "<= 120",
                    f"{seconds:.0f}", "", "1", seconds <= 120))
    return rows


# ------------------------------------------------------------------------------------------------- the report

def table(reports):
    """{model: its rows} -> one Markdown table in even columns: two columns per model, reached and met."""
    asked = {row.what: row.asked for rows in reports.values() for row in rows}
    lines = [["target", "asked"], [], *map(list, asked.items())]
    for model, rows in reports.items():
        found = {row.what: row for row in rows}
        lines[0] += [f"{model} (95 % interval; n)", "met"]
        for line in lines[2:]:
            row = found.get(line[0])
            about = row and "; ".join(filter(None, (row.interval, row.n and f"n {row.n}")))
            line += [f"{row.reached} ({about})" if about else row.reached if row else "",
                     {None: "", True: "yes", False: "no"}[row and row.met]]
    widths = [max(len(line[i]) for line in lines if line) for i in range(len(lines[0]))]
    lines[1] = ["-" * width for width in widths]
    padded = [[text.ljust(width) for text, width in zip(line, widths)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def measure(folder, device):
    """All five targets on one model folder: its rows."""
    models, judge = mini_mi.load_models(str(folder), device), Judge(folder, device)
    settings = mini_mi.read_json(folder / "mini_mi.json")
    rows = target_vae(models) + target_latents(models)
    order = np.random.default_rng(0).permutation(len(judge.captions))[:PROMPTS]
    prompts = [judge.captions[i] for i in order]
    noise, sampled = fresh_noise(models, len(prompts), seed=0), []
    for start in tqdm(range(0, len(prompts), BATCH), desc="2 sampling", unit="batch"):
        part = slice(start, start + BATCH)
        sampled += generate(models, settings, noise[part], prompts[part])
    rows += target_text(judge, sampled, prompts)
    rows += target_motion(judge, sampled, prompts)
    rows += target_inversion(models, judge, settings)
    return rows + target_cost(folder, device)


def check(folders, device):
    """Measures the models in `folders` and prints one table; returns {name of the folder: rows}."""
    began = time.perf_counter()
    reports = {folder.name: measure(folder, device) for folder in folders}
    print(f"\n{table(reports)}\n")
    for model, rows in reports.items():
        print(f"{model} met: {sum(row.met is True for row in rows)} of "
              f"{sum(row.met is not None for row in rows)} that were asked")
    print(f"measured in {(time.perf_counter() - began) / 60:.1f} minutes")
    return reports
