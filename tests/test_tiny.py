"""The embedded model: what data/tiny promises, the recipe that makes it, and the check that measures it."""

import json
import sys

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
PROMPTS = ["a red star on a teal striped background", "a white circle on a purple plain background"]


@pytest.fixture(scope="module")
def tiny():
    """The loaded data/tiny."""
    return mini_mi.load_models("tiny")


# The files

def test_files_are_small_and_float16():
    sizes = check_tiny.weight_files(TINY)
    assert max(sizes.values()) <= 16 * MIB and sum(sizes.values()) <= 24 * MIB
    weights = {name for name in sizes if name.endswith((".safetensors", ".bin"))}
    assert weights == {"clip/model.safetensors", "text_encoder/model.safetensors",
                       "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
    assert check_tiny.stored_dtypes(TINY) == {"float16"}


def test_geometry(tiny):
    """64x64 pixels, 16 frames, latents 4 x 8x8, attention at 8x8 only: later weights can replace these."""
    assert (world.SIZE, world.FRAMES, tiny.vae.factor, tiny.unet.conv_in.in_channels) == (64, 16, 8, 4)
    video = mini_mi.to_model_range(world.render(world.scene(1)))
    latents = mini_mi.encode_video(tiny, video)
    assert latents.shape == (1, 4, 16, 8, 8) and 0.5 < latents.std() < 2
    assert mini_mi.decode_video(tiny, latents).shape == video.shape
    config = tiny.unet.config
    assert config["down_block_types"] == ["CrossAttnDownBlock3D", "DownBlock3D"]
    assert config["up_block_types"] == ["UpBlock3D", "CrossAttnUpBlock3D"]
    motion = mini_mi.MotionEmbeddings(config, 16, 8, 8)
    assert {p.shape[0] for key, p in motion.named_parameters() if "vSpatial" in key} == {64}


def test_recipe_and_files_agree():
    """The committed configs are those of make_tiny.py: a rerun gives an exchangeable model."""
    scale = json.loads((TINY / "vae" / "config.json").read_text())["scaling_factor"]
    for part, config in {"unet/config.json": make_tiny.UNET, "model_index.json": make_tiny.PIPELINE,
                         "vae/config.json": {**make_tiny.VAE, "scaling_factor": scale},
                         "scheduler/scheduler_config.json": make_tiny.SCHEDULER}.items():
        assert json.loads((TINY / part).read_text()) == config


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

def test_diffusers_gives_the_same_frames(tiny):
    """Same start noise, prompts, negative prompts, steps, guidance: final latents within a relative 1e-4; of
    the frames as 8-bit numbers none is off by more than 1, and at most one number in a thousand is off."""
    pipeline = diffusers.TextToVideoSDPipeline.from_pretrained(TINY, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    negative, seen = ["", "a blue square on a grey plain background"], []
    frames = pipeline(PROMPTS, num_frames=16, num_inference_steps=8, guidance_scale=3.0,
                      negative_prompt=negative, latents=noise.clone(), output_type="np",
                      callback=lambda step, t, latents: seen.append(latents)).frames
    text, without = (mini_mi.encode_prompt(tiny, t) for t in (PROMPTS, negative))
    latents = mini_mi.sample(tiny, noise, text, without, steps=8, guidance=3.0, progress=False)
    assert len(seen) == 8 and relative(latents, seen[-1]) <= 1e-4
    ours = np.stack([mini_mi.to_uint8(video) for video in mini_mi.decode_video(tiny, latents)]).astype(int)
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

def test_latents_are_smooth_in_colour(tiny):
    rows = check_tiny.target_latents(tiny)
    assert len(rows) == 2 and all(row.met for row in rows)


def test_linear_fit_is_r2():
    """1 for latents that are an affine map of block means, 0 for ones that know nothing of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 64, 64, generator=generator) * torch.rand(8, 3, 1, 1, generator=generator)
    means = torch.nn.functional.avg_pool2d(x, 8)
    mixed = torch.einsum("cd,ndhw->nchw", torch.randn(4, 3, generator=generator), means) + 2
    assert make_tiny.linear_fit(mixed, x) > 0.98
    assert abs(make_tiny.linear_fit(torch.randn(8, 4, 8, 8, generator=generator), x)) < 0.05


# The recipe

@pytest.fixture
def small_recipe(monkeypatch, tmp_path):
    """make_tiny with few and small steps, and a default model folder that it must not touch."""
    stages = {"vae": (3, 4, 2e-3), "clip": (3, 8, 1e-3), "images": (3, 4, 1.5e-3), "clips8": (2, 2, 1e-3),
              "clips": (3, 2, 7e-4)}
    sample = mini_mi.sample
    monkeypatch.setattr(make_tiny, "STAGES", stages)
    monkeypatch.setattr(make_tiny, "TINY", tmp_path / "untouched")
    monkeypatch.setattr(mini_mi, "sample", lambda *args, **options: sample(*args, **{**options, "steps": 1}))

    def make(name, *more):
        folder = tmp_path / name
        make_tiny.main(["--to", str(folder / "tiny"), "--work", str(folder / "work"), "--pool", "8",
                        "--device", "cpu", *more])
        return folder

    yield make
    assert not (tmp_path / "untouched").exists()


def weights(folder):
    """All bytes of all files of folder/tiny."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in (folder / "tiny").rglob("*") if f.is_file()}


def test_recipe_end_to_end_and_resumed(small_recipe, monkeypatch, tmp_path):
    """All stages give a loadable model; interrupted three times, in three stages, they give the same one."""
    whole = small_recipe("whole")
    mini_mi.load_models(whole / "tiny")
    assert len(weights(whole)) == len(check_tiny.weight_files(TINY))
    assert {f.stem for f in (whole / "work").glob("*.jsonl")} == set(make_tiny.STAGES)
    assert (whole / "curves.png").stat().st_size < 150_000

    clip_gradients, calls = torch.nn.utils.clip_grad_norm_, []

    def power_cut(*args):
        calls.append(1)
        if len(calls) in (2, 7, 14):
            raise KeyboardInterrupt
        return clip_gradients(*args)

    monkeypatch.setattr(make_tiny, "SAVE_EVERY", -1)                       # a state after every step
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", power_cut)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            small_recipe("parts")
    parts = small_recipe("parts")
    assert weights(parts) == weights(whole)


def test_a_later_sitting_goes_on_from_the_model(small_recipe, tmp_path):
    """Without a state a stage begins from the weights that are there; with --fresh from random ones."""
    losses = {}
    for name, options in {"first": (), "later": (), "fresh": ("--fresh",)}.items():
        if name != "first":
            (tmp_path / name / "tiny" / "vae").mkdir(parents=True)
            for file in (tmp_path / "first" / "tiny" / "vae").iterdir():
                (tmp_path / name / "tiny" / "vae" / file.name).write_bytes(file.read_bytes())
        folder = small_recipe(name, "--stage", "vae", "--scale", "4", *options)
        losses[name] = json.loads((folder / "work" / "vae.jsonl").read_text().splitlines()[0])["loss"]
    assert losses["fresh"] == losses["first"] > losses["later"]


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


def test_check_runs_from_end_to_end(monkeypatch, capsys):
    """The five targets, each with asked and reached, on few clips and steps."""
    for name, value in dict(PROMPTS=3, REAL=6, HELD=2, CLIPS=3, BATCH=2).items():
        monkeypatch.setattr(check_tiny, name, value)
    for name, value in dict(steps=1, sample_steps=2).items():         # of one step alone t would be below t_min
        monkeypatch.setitem(check_tiny.SETTINGS, name, value)
    invert = mini_mi.ddim_invert
    monkeypatch.setattr(mini_mi, "ddim_invert",
                        lambda *args, **_: invert(*args[:3], steps=1, progress=False))
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", "--check", "--device", "cpu"])
    make_tiny.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert {line[2] for line in lines[2:]} == set("12345")
    assert any(line.startswith("| 4 way of full from base-no-inversion to vae") for line in lines)
    assert all(line.count("|") == 7 for line in lines)
