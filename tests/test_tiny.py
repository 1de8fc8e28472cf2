"""The embedded models: what their folders promise, the recipe that makes them, and the check."""

import argparse
import functools
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, relative

import check_tiny
import eval_mi
import make_tiny
import mini_mi
import world

TINY, MIB = ROOT / "data" / "tiny", 2 ** 20
FOLDERS = [folder for folder in (TINY, ROOT / "data" / "tiny16") if (folder / "unet").exists()]
each_model = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
PROMPTS = ["a red star on a teal striped background", "a white circle on a purple plain background"]


@pytest.fixture(scope="module")
def tiny():
    """The loaded data/tiny."""
    return mini_mi.load_models("tiny")


# The files

@each_model
def test_files_are_small_and_float16(folder):
    sizes = check_tiny.weight_files(folder)
    assert max(sizes.values()) <= 16 * MIB and sum(sizes.values()) <= 24 * MIB
    weights = {name for name in sizes if name.endswith((".safetensors", ".bin"))}
    assert weights == {"clip/model.safetensors", "text_encoder/model.safetensors",
                       "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
    assert check_tiny.stored_dtypes(folder) == {"float16"}


@pytest.mark.parametrize("name, side", [("tiny", 8), ("tiny16", 16)])
def test_geometry(name, side):
    """64x64 pixels, 16 frames, latents 4 x side x side; embeddings have an 8x8 grid."""
    vae, unet = make_tiny.configs(name)
    latents, _ = mini_mi.AutoencoderKL(vae).encode(torch.zeros(1, 3, 64, 64))
    assert latents.shape == (1, 4, side, side) and unet["sample_size"] == side
    assert (world.SIZE, world.FRAMES) == (64, 16)
    grids = []

    def note(_, inputs, output):
        """The grid that a temporal transformer of the way down or up sees."""
        grids.append(output.shape[-2:])

    model = mini_mi.UNet3DConditionModel(unet)
    for key, module in model.named_modules():
        if key.endswith("temp_attentions.0") and "mid_block" not in key:
            module.register_forward_hook(note)
    model(torch.zeros(1, 4, 16, side, side), 1, torch.zeros(1, 24, 128))
    assert len(grids) == 2 and set(grids) == {(8, 8)}


@each_model
def test_latents_have_unit_spread(folder):
    models = mini_mi.load_models(str(folder))
    video = mini_mi.to_model_range(world.render(world.scene(1)))
    latents = mini_mi.encode_video(models, video)
    assert 0.5 < latents.std() < 2
    assert mini_mi.decode_video(models, latents).shape == video.shape


@each_model
def test_recipe_and_files_agree(folder):
    """The committed configs are those of make_tiny.py: a rerun gives an exchangeable model."""
    vae, unet = make_tiny.configs(folder.name)
    scale = json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]
    for part, config in {"unet/config.json": unet, "model_index.json": make_tiny.PIPELINE,
                         "vae/config.json": {**vae, "scaling_factor": scale},
                         "mini_mi.json": make_tiny.SETTINGS[folder.name],
                         "scheduler/scheduler_config.json": make_tiny.scheduler_config(folder.name)}.items():
        assert json.loads((folder / part).read_text()) == config


@each_model
def test_both_models_have_one_text_tower_and_one_judge(folder):
    for name in make_tiny.SHARED:
        for file in (TINY / name).iterdir():
            assert file.read_bytes() == (folder / name / file.name).read_bytes()


def test_make_tokenizer_gives_the_committed_files(tmp_path):
    make_tiny.make_tokenizer(tmp_path)
    for file in tmp_path.iterdir():
        for folder in ("tokenizer", "clip"):
            assert file.read_text(encoding="utf-8") == (TINY / folder / file.name).read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", ["tokenizer", "clip"])
def test_tokenizer_equals_transformers(folder):
    ours = mini_mi.CLIPTokenizer.from_pretrained(TINY / folder)
    theirs = transformers.CLIPTokenizer.from_pretrained(TINY / folder)
    odd = ["", " ", "A RED  Star", "starfish", "redden the backgrounds", "e-mail: 42 stars!!!",
           "naïve café",
           "星 и звезда", "🌟🌟", "it's <|endoftext|> not", "&amp;lt;red&gt;",
           "circle " * 40, "antidisestablishmentarianism" * 4]
    texts = [*world.all_captions(), *odd]
    expected = theirs([mini_mi.CLIPTokenizer.clean(text) for text in texts], padding="max_length",
                      truncation=True, max_length=24, return_tensors="pt").input_ids
    assert torch.equal(ours(texts), expected)
    # Every word of a caption is one token, so a caption has as many tokens as words.
    assert all(len(ours.encode(caption)) == len(caption.split()) for caption in world.all_captions())


# The same model in diffusers

@each_model
def test_diffusers_gives_the_same_frames(folder):
    """Same start noise, prompts, negative prompts, steps, guidance: final latents within a relative 1e-4; of
    the frames as 8-bit numbers none is off by more than 1, and at most one number in a thousand is off."""
    models = mini_mi.load_models(str(folder))
    pipeline = diffusers.TextToVideoSDPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise = check_tiny.fresh_noise(models, 2, seed=0)
    negative, seen = ["", "a blue square on a grey plain background"], []
    frames = pipeline(PROMPTS, num_frames=16, num_inference_steps=8, guidance_scale=3.0,
                      negative_prompt=negative, latents=noise.clone(), output_type="np",
                      callback=lambda step, t, latents: seen.append(latents)).frames
    text, without = (mini_mi.encode_prompt(models, t) for t in (PROMPTS, negative))
    latents = mini_mi.sample(models, noise, text, without, steps=8, guidance=3.0, progress=False)
    assert len(seen) == 8 and relative(latents, seen[-1]) <= 1e-4
    ours = np.stack([mini_mi.to_uint8(video) for video in mini_mi.decode_video(models, latents)]).astype(int)
    off = abs(ours - (frames * 255).round().astype(int))
    assert ours.shape == (2, 16, 64, 64, 3) and off.max() <= 1 and (off > 0).mean() <= 1e-3


# The tiny CLIP

def test_clip_tells_captions_of_real_clips_apart():
    """The right one of all 288 captions for at least 95 % of 40 clips, whose motions it never trained on."""
    judge = check_tiny.Judge(TINY, torch.device("cpu"))
    clips, captions = check_tiny.scenes(40, world.HELDOUT_MOTIONS)
    right = [judge.attributes(judge.features(clip)) == world.attributes(caption)
             for clip, caption in zip(clips, captions)]
    assert np.mean(right) >= 0.95


def test_text_encoder_is_the_clip_text_tower(tiny):
    clip, _, _ = eval_mi.load_clip(TINY / "clip")
    ours, theirs = tiny.text_encoder.text_model.state_dict(), clip.text_model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# The autoencoder: what its latents were asked for before it was trained

@each_model
def test_latents_are_smooth_in_colour(folder):
    rows = check_tiny.target_latents(mini_mi.load_models(str(folder)))
    assert len(rows) == 2 and all(row.met for row in rows)


@pytest.mark.parametrize("shape", world.SHAPES)
@each_model
def test_the_autoencoder_keeps_outlines(folder, shape):
    """In 97 % of frames of all held-out motions: other outlines of samples are not the decoder's doing."""
    models, shares = mini_mi.load_models(str(folder)), []
    for i, motion in enumerate(world.HELDOUT_MOTIONS):
        looks = [list(names)[i % len(names)] for names in (world.COLOURS, world.PATTERNS, world.BACKGROUNDS)]
        video = world.render(world.scene(i, [motion], world.describe(shape, *looks)), frames=6)
        latents = mini_mi.encode_video(models, mini_mi.to_model_range(video))
        decoded = mini_mi.to_uint8(mini_mi.decode_video(models, latents)[0])
        shares.append(world.shape_share(decoded, shape))
    assert np.mean(shares) >= 0.97


def test_linear_fit_is_r2():
    """1 for latents that are an affine map of block means, 0 for ones that know nothing of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 64, 64, generator=generator) * torch.rand(8, 3, 1, 1, generator=generator)
    means = torch.nn.functional.avg_pool2d(x, 8)
    mixed = torch.einsum("cd,ndhw->nchw", torch.randn(4, 3, generator=generator), means) + 2
    assert make_tiny.linear_fit(mixed, x) > 0.98
    assert abs(make_tiny.linear_fit(torch.randn(8, 4, 8, 8, generator=generator), x)) < 0.05


# The recipe

@pytest.fixture(scope="module")
def small_recipe(tmp_path_factory):
    """make(name, ...) runs make_tiny into a folder of its own: few steps, small pools, rendered once."""
    root = tmp_path_factory.mktemp("recipe")
    stages = {"vae": (2, 4, 2e-3), "clip": (2, 8, 1e-3), "images": (1, 4, 1.5e-3), "clips8": (1, 2, 1e-3),
              "clips": (2, 1, 7e-4)}
    pool, sample = make_tiny.pool, mini_mi.sample

    @functools.cache
    def small_pool(count, seed, motions):
        """At most four clips, whatever is asked for."""
        return pool(min(count, 4), seed, motions)

    def quick_sample(models, noise, text, negative, **options):
        """Sheets of samples take most of the time: one clip, one step."""
        return sample(models, noise[:1], text[:1], negative[:1], **{**options, "steps": 1})

    coloured_pool = functools.cache(make_tiny.coloured_pool)

    def make(name, *more):
        """The folder that holds model and work folder."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(make_tiny, "STAGES", stages)
            patch.setattr(make_tiny, "TINY", root / "whole" / "tiny")      # tiny16 takes its copies from here
            patch.setattr(make_tiny, "pool", lambda count, seed, motions=world.TRAIN_MOTIONS:
                          small_pool(count, seed, tuple(motions)))
            patch.setattr(make_tiny, "coloured_pool", coloured_pool)
            patch.setattr(mini_mi, "sample", quick_sample)
            make_tiny.main(["--to", str(root / name / "tiny"), "--work", str(root / name / "work"),
                            "--pool", "4", "--device", "cpu", *more])
        return root / name

    return make


@pytest.fixture(scope="module")
def whole(small_recipe):
    """A first run of all stages."""
    return small_recipe("whole")


def weights(folder):
    """All bytes of all files of folder/tiny."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in (folder / "tiny").rglob("*") if f.is_file()}


def first_loss(folder, stage):
    """What the log of a stage begins with."""
    return json.loads((folder / "work" / f"{stage}.jsonl").read_text().splitlines()[0])["loss"]


def test_recipe_end_to_end(whole):
    """All stages give a loadable model with all its files, a log each, and the curves."""
    mini_mi.load_models(str(whole / "tiny"))
    assert weights(whole).keys() == {f"tiny/{name}" for name in check_tiny.weight_files(TINY)}
    assert {f.stem for f in (whole / "work").glob("*.jsonl")} == set(make_tiny.STAGES)
    assert (whole / "curves.png").stat().st_size < 150_000


def test_an_interrupted_recipe_gives_the_same_model(small_recipe, whole, monkeypatch):
    """Interrupted three times, in three stages."""
    clip_gradients, calls = torch.nn.utils.clip_grad_norm_, []

    def power_cut(*args):
        calls.append(1)
        if len(calls) in (2, 5, 10):                                    # the last step of vae, clip and clips
            raise KeyboardInterrupt
        return clip_gradients(*args)

    monkeypatch.setattr(make_tiny, "SAVE_EVERY", -1)                       # a state after every step
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", power_cut)
    for stage in ("vae", "clip", "clips"):
        with pytest.raises(KeyboardInterrupt):
            small_recipe("parts")
        steps = torch.load(whole.parent / "parts" / "work" / f"{stage}.pt", weights_only=True)["step"]
        assert steps == 1
    assert weights(small_recipe("parts")) == weights(whole)


def test_the_second_model(small_recipe, whole):
    """Its own autoencoder, UNet and betas; tiny's text tower and judge, which no stage touches."""
    second = small_recipe("second", "--model", "tiny16")
    ours, theirs = weights(second), weights(whole)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] == theirs[name]} == {
        name for name in theirs if name.split("/")[1] not in ("unet", "vae", "scheduler", "mini_mi.json")}
    assert {f.stem for f in (second / "work").glob("*.jsonl")} == {"vae", "images", "clips8", "clips"}
    assert first_loss(second, "vae") != first_loss(whole, "vae") and (second / "curves16.png").exists()
    models = mini_mi.load_models(str(second / "tiny"))
    assert models.vae.factor == 4 and list(models.unet.config["block_out_channels"]) == [32, 64, 128]


def test_a_later_sitting_goes_on_from_the_model(small_recipe, whole):
    """Without a state a stage begins from the weights that are there; with --fresh from random ones."""
    root = whole.parent
    for name in ("later", "fresh"):
        shutil.copytree(whole / "tiny" / "vae", root / name / "tiny" / "vae")
        small_recipe(name, "--stage", "vae", *(["--fresh"] if name == "fresh" else []))
    assert first_loss(root / "fresh", "vae") == first_loss(whole, "vae") != first_loss(root / "later", "vae")


def test_parts_of_a_batch_give_its_gradient(tmp_path, monkeypatch):
    """One batch of six, or three parts of two side by side: the same weights and the same log."""
    monkeypatch.setattr(make_tiny, "STAGES", {"clips": (3, 6, 1e-2)})

    def trained(parts):
        def loss_of(model, step, generator, part):
            x = torch.randn(6, 4, generator=generator)[part::parts]
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            return loss, dict(mse=loss.item())

        torch.manual_seed(0)
        args = argparse.Namespace(scale=1, lr=None, work=tmp_path / str(parts), device="cpu", seed=0)
        args.work.mkdir()
        ema = make_tiny.train("clips", torch.nn.Linear(4, 1), loss_of, args, parts=parts)
        entries, _ = make_tiny.read_log(args.work / "clips.jsonl")
        return ema.weight, entries[0]["mse"]

    (one, one_mse), (three, three_mse) = trained(1), trained(3)
    torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-6)
    assert one_mse == pytest.approx(three_mse, rel=1e-5)


def test_log_of_an_interrupted_stage(tmp_path):
    """The later entry of a repeated step counts, the night between two sittings does not."""
    steps, times = (0, 50, 100, 50, 100, 150), (0, 60, 120, 36_000, 36_060, 36_120)
    lines = [json.dumps(dict(step=s, loss=1 / (n + 1), accuracy=n / 6, time=t))
             for n, (s, t) in enumerate(zip(steps, times))]
    file = tmp_path / "clip.jsonl"
    file.write_text("\n".join(lines) + '\n{"step": 200, "lo')
    entries, minutes = make_tiny.read_log(file)
    assert [e["step"] for e in entries] == [0, 50, 100, 150] and entries[1]["loss"] == 1 / 4
    assert 4 <= minutes < 20
    make_tiny.draw_curves(tmp_path, tmp_path / "curves.png")
    assert mini_mi.Image.open(tmp_path / "curves.png").size[0] == 300


# The check

@pytest.mark.parametrize("motion", ["line", "circle", "zoom_in", "spin", "pan", "pan_line"])
def test_sprite_and_camera_are_found(motion):
    for seed in range(4):
        scene = world.scene(seed, [motion], "a green triangle on a grey checkered background")
        frames, course = world.render(scene), world.trajectory(scene)
        path = check_tiny.sprite_path(frames)
        assert abs(np.diff(path, axis=0) - np.diff(world.path(scene), axis=0)).max() < 1
        assert abs(path - world.path(scene)).max() < 2
        camera = np.hypot(np.diff(course.camera_x), np.diff(course.camera_y)).mean()
        assert abs(check_tiny.camera_speed(frames) - camera) < 0.5


def test_check_runs_from_end_to_end(monkeypatch, capsys, tmp_path):
    """The five targets, asked and reached, on few clips and steps; settings are the folder's own."""
    for name, value in dict(PROMPTS=3, REAL=6, HELD=2, CLIPS=3, BATCH=3).items():
        monkeypatch.setattr(check_tiny, name, value)
    shutil.copytree(TINY, tmp_path / "tiny")
    settings = dict(make_tiny.SETTINGS["tiny"], steps=1, sample_steps=2)    # t of one step is below t_min
    make_tiny.write_json(tmp_path / "tiny" / "mini_mi.json", settings)
    invert = mini_mi.ddim_invert
    monkeypatch.setattr(mini_mi, "ddim_invert",
                        lambda *args, **_: invert(*args[:3], steps=1, progress=False))
    make_tiny.main(["--check", "--device", "cpu", "--to", str(tmp_path / "tiny")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert {line[2] for line in lines[2:]} == set("12345")
    assert any(line.startswith("| 4 way of full from base-no-inversion to vae") for line in lines)
    assert all(line.count("|") == 5 for line in lines)


def test_check_measures_both_models_unless_told_otherwise(monkeypatch, tmp_path):
    """Each model folder that has a UNet; one of them with --model or --to."""
    monkeypatch.setattr(make_tiny, "HERE", tmp_path)
    checked = []
    monkeypatch.setattr(check_tiny, "check", lambda folders, _: checked.append([f.name for f in folders]))
    for name in ("tiny", "tiny16"):
        (tmp_path / name).mkdir()
    for options in ([], ["--model", "tiny16"], ["--to", str(tmp_path / "tiny16")]):
        with pytest.raises(SystemExit):                       # there is nothing to measure, and it says so
            make_tiny.main(["--check", *options])
    (tmp_path / "tiny" / "unet").mkdir()
    make_tiny.main(["--check"])
    (tmp_path / "tiny16" / "unet").mkdir()
    for options in ([], ["--model", "tiny16"], ["--to", str(tmp_path / "tiny16")]):
        make_tiny.main(["--check", *options])
    assert checked == [["tiny"], ["tiny", "tiny16"], ["tiny16"], ["tiny16"]]


def test_check_shows_the_models_side_by_side():
    def row(what, asked, reached, interval="", n="", met=None):
        return check_tiny.Row(what, asked, reached, interval, n, met)

    reports = {"tiny": [row("1 PSNR", ">= 32 dB", "35.0 dB", "34 to 36", "48", True),
                        row("5 files", "", "9")],
               "tiny16": [row("1 PSNR", ">= 32 dB", "31.0 dB", "30 to 32", "48", False)]}
    lines = check_tiny.table(reports).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    head = ["tiny (95 % interval; n)", "met", "tiny16 (95 % interval; n)", "met"]
    assert cells[0] == ["target", "asked", *head] and len(set(map(len, lines))) == 1
    assert cells[2][2:] == ["35.0 dB (34 to 36; n 48)", "yes", "31.0 dB (30 to 32; n 48)", "no"]
    assert cells[3] == ["5 files", "", "9", "", "", ""]
