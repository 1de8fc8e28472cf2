"""The command as users call it: the files it leaves, and one clear line for whatever is wrong."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, UNET, hollow
from PIL import Image

import mini_mi

SMALL = ["--frames", "4", "--size", "32x32", "--steps", "2", "--sample-steps", "2", "--device", "cpu"]
REUSE = [*SMALL[:4], "--sample-steps", "2"]  # nothing is trained, so there are no steps
SHOWS = ["--source-prompt", "a red star", "--prompt", "a green circle"]


def moving_square(count=6, size=40):
    """(F,h,w,3) uint8"""
    frames = np.full((count, size, size, 3), 200, np.uint8)
    for n in range(count):
        frames[n, 10:20, 4 * n:4 * n + 10] = 255, 0, 40
    return frames


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A GIF of 6 frames."""
    path = tmp_path_factory.mktemp("clip") / "square.gif"
    mini_mi.write_video(path, moving_square(), 8)
    return path


@pytest.fixture
def start(tiny_random, clip, tmp_path):
    """Runs `main` on the random model: start(*arguments, out=FOLDER, prior=...) -> (status, folder)."""
    def call(*arguments, out="out", prior="0", shows=SHOWS, small=SMALL, model=tiny_random, video=clip):
        given = ["--model", str(model)] * (model is not None) + ["--video", str(video)] * (video is not None)
        given += [*small, *shows, "--noise-prior", prior, "--out", str(tmp_path / out), *map(str, arguments)]
        return mini_mi.main(given), tmp_path / out
    return call


def contents(folder):
    """Relative path -> bytes of all files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def gifs(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".gif")}


# What a run leaves

def test_files_of_a_run(start, capsys):
    """Embeddings, a clip and a comparison per prompt, sheet, curve, record; no state, no part files."""
    status, out = start("--prompt", "a blue/white Square!?", "--seed", 7, "--fps", 5, "--snapshots", "1,2",
                        prior="0.5")
    assert status == 0
    assert sorted(os.listdir(out)) == sorted([
        "motion.safetensors", "motion-step1.safetensors", "motion-step2.safetensors", "sheet.png",
        "run.json", "1-a-green-circle.gif", "1-a-green-circle-compare.gif", "2-a-blue-white-square.gif",
        "2-a-blue-white-square-compare.gif"])
    record = json.loads((out / "run.json").read_text())
    config = record["config"]
    assert config.keys() == {f.name for f in mini_mi.dataclasses.fields(mini_mi.Config)}
    assert (config["seed"], config["steps"], config["sample_steps"], config["fps"]) == (7, 2, 2, 5)
    assert config["prompts"] == ["a green circle", "a blue/white Square!?"] and config["snapshots"] == [1, 2]
    assert len(record["losses"]) == 2 and all(loss > 0 for loss in record["losses"])
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["python"]
    assert record["seconds"] > 0 and record["invert_steps"] == 50
    tensors = safetensors.torch.load_file(out / "motion.safetensors")
    assert record["embedding_parameters"] == sum(v.numel() for v in tensors.values())
    assert mini_mi.MotionEmbeddings.load(out / "motion.safetensors").source["source_prompt"] == "a red star"
    last = safetensors.torch.load_file(out / "motion-step2.safetensors")
    first = safetensors.torch.load_file(out / "motion-step1.safetensors")
    assert all(torch.equal(last[k], tensors[k]) and not torch.equal(first[k], tensors[k]) for k in tensors)
    for n, words in ((1, "a-green-circle"), (2, "a-blue-white-square")):
        video = mini_mi.read_video(out / f"{n}-{words}.gif", 4, (32, 32))
        assert video.std() > 1
        with Image.open(out / f"{n}-{words}.gif") as image:
            assert image.size == (32, 32) and image.n_frames == 4 and image.info["duration"] == 200
        with Image.open(out / f"{n}-{words}-compare.gif") as image:
            assert image.n_frames == 4 and image.width > 3 * 32
    with Image.open(out / "sheet.png") as image:
        assert image.convert("L").getextrema()[0] < 128
    captured = capsys.readouterr()
    assert "embeddings" in captured.out and "error" not in captured.err


def test_reused_motion_gives_the_same_frames(start, capsys):
    """One seed path: training and sampling, or loading and sampling; the clip is remembered by the file."""
    _, first = start("--seed", 3, prior="0.5")
    motion = first / "motion.safetensors"
    small, shows = REUSE, SHOWS[2:]
    status, second = start("--motion", motion, "--seed", 3, out="second", prior="0.5", small=small,
                           shows=shows, video=None)
    assert status == 0 and gifs(first).keys() == {"1-a-green-circle.gif", "1-a-green-circle-compare.gif"}
    assert gifs(second) == gifs(first)
    assert not (second / "motion.safetensors").exists()
    # The record says how the motion was trained, not how this model's motions usually are.
    trained, reused = (json.loads((out / "run.json").read_text())["config"] for out in (first, second))
    assert all(trained[name] == reused[name] for name in mini_mi.TRAINING) and reused["steps"] == 2
    # Beside another prompt the frames are the same; with another seed or without MV they are not.
    _, third = start("--motion", motion, "--seed", 3, "--prompt", "a red star", out="third", prior="0.5",
                     small=small, shows=shows)
    assert gifs(third)["1-a-green-circle.gif"] == gifs(first)["1-a-green-circle.gif"]
    for n, change in enumerate((["--seed", 4], ["--seed", 3, "--motion-type", "camera"])):
        status, other = start("--motion", motion, *change, out=f"other{n}", prior="0.5", small=small,
                              shows=shows)
        assert status == 0 and gifs(other)["1-a-green-circle.gif"] != gifs(first)["1-a-green-circle.gif"]
    assert "error" not in capsys.readouterr().err


def test_a_motion_file_remembers_how_its_clip_was_read(start, clip, tmp_path, capsys):
    """Model, frames, size and part are those of the training, unless they are given; so is the prompt."""
    _, first = start("--start", 0.125, "--duration", 0.5,
                     small=[*SMALL[:3], "40x32", *SMALL[4:]], prior="0.5")
    motion = first / "motion.safetensors"
    status, again = start("--motion", motion, small=SMALL[6:], shows=SHOWS[2:], video=None, model=None,
                          prior="0.5", out="again")
    assert status == 0 and gifs(again) == gifs(first)
    config = json.loads((again / "run.json").read_text())["config"]
    remembered = dict(frames=4, size="40x32", start=0.125, duration=0.5, source_prompt="a red star")
    assert {name: config[name] for name in remembered} == remembered
    status, _ = start("--motion", motion, small=SMALL[6:], shows=SHOWS[2:], out="same")
    assert status == 0 and json.loads((tmp_path / "same" / "run.json").read_text())["config"]["start"] == 0.125
    status, other = start("--motion", motion, "--frames", 3, "--size", "16x16", small=SMALL[6:],
                          shows=SHOWS[2:], video=None, out="other")
    assert status == 0 and json.loads((other / "run.json").read_text())["config"]["size"] == "16x16"


def test_a_motion_file_whose_clip_is_gone(start, clip, tmp_path, capsys):
    """It needs the clip for the start noise alone."""
    gone = tmp_path / "gone.gif"
    gone.write_bytes(clip.read_bytes())
    motion = start(video=gone)[1] / "motion.safetensors"
    gone.unlink()
    reuse = dict(small=REUSE, shows=SHOWS[2:], video=None, out="again")
    capsys.readouterr()
    refused(capsys, start("--motion", motion, prior="0.5", **reuse)[0], tmp_path / "nothing", {}, "gone.gif")
    assert start("--motion", motion, prior="0", **reuse)[0] == 0
    capsys.readouterr()
    reuse["video"] = tmp_path / "typo.gif"                        # a clip that was asked for has to be there
    refused(capsys, start("--motion", motion, prior="0", **reuse)[0], tmp_path / "nothing", {}, "typo.gif")


def test_a_clip_in_the_home_folder_is_found_with_its_entry(start, clip, tmp_path, monkeypatch):
    """~ holds for clips.json, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(clip, tmp_path / "square.gif")
    (tmp_path / "clips.json").write_text('{"square": {"caption": "a red star", "prompts": ["a cat"]}}')
    status, out = start(video="~/square.gif", shows=[])
    config = json.loads((out / "run.json").read_text())["config"]
    assert status == 0 and (config["source_prompt"], config["prompts"]) == ("a red star", ["a cat"])


def test_an_empty_source_prompt_is_one(start):
    """It is not replaced by the caption, nor asked for."""
    status, out = start(shows=["--source-prompt", "", "--prompt", "a green circle"])
    assert status == 0 and json.loads((out / "run.json").read_text())["config"]["source_prompt"] == ""


def test_samples_that_are_not_finite_are_refused(start, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mini_mi.DDIMScheduler, "step", lambda self, out, t, x, n: x * float("nan"))
    status, out = start()
    assert status == 2 and "--dtype float32" in capsys.readouterr().err and not gifs(out)


@pytest.mark.parametrize("flag, gone, left", [("--no-mqk", "pos_embed", "vSpatial"),
                                              ("--no-mv", "vSpatial", "pos_embed")])
def test_ablations_save_embeddings_without_the_part(start, flag, gone, left):
    status, out = start(flag)
    keys = list(safetensors.torch.load_file(out / "motion.safetensors"))
    assert status == 0 and keys and all(left in key and gone not in key for key in keys)
    config = json.loads((out / "run.json").read_text())["config"]
    assert (config["use_mqk"], config["use_mv"]) == (flag != "--no-mqk", flag != "--no-mv")


@pytest.mark.parametrize("flags", [
    ["--mqk-dims", 2, "--mv-dims", 1, "--debias", "mean", "--levels", "0"],
    ["--debias-in-training", "--guidance", 1, "--t-min", 0.5],
    ["--loss", "debiased", "--checkpointing", "--dtype", "bfloat16"],
    ["--loss", "hybrid", "--lr-schedule", "cosine"],
    ["--start", 0.25, "--duration", 0.5, "--negative-prompt", "blurry"]])
def test_other_settings_run(start, flags):
    """Every switch reaches the run, and the record."""
    status, out = start(*flags)
    config = json.loads((out / "run.json").read_text())["config"]
    assert status == 0 and (out / "1-a-green-circle.gif").exists()
    for flag, value in zip(flags, flags[1:]):  # what follows a flag is its value or the next flag
        name = str(flag).removeprefix("--").replace("-", "_")
        if name in config and not str(value).startswith("--"):
            assert config[name] == ([0] if name == "levels" else value)
    shape = next(iter(safetensors.torch.load_file(out / "motion.safetensors").values())).shape
    assert shape[1:] == (4, 32)


def test_reused_motion_is_debiased_as_its_file_says(start, tmp_path):
    """Unless the command line says otherwise."""
    motion = mini_mi.MotionEmbeddings(hollow(UNET), 4, 4, 4, debias="mean")
    motion.save(tmp_path / "m.safetensors")
    for flags, debias in (([], "mean"), (["--debias", "none"], "none")):
        status, out = start("--motion", tmp_path / "m.safetensors", *flags, small=REUSE, shows=SHOWS[2:],
                            out=debias)
        assert status == 0 and json.loads((out / "run.json").read_text())["config"]["debias"] == debias


def test_reused_motion_acts_where_it_learned(start, tmp_path):
    """Unless the command line says otherwise; what a file of before does not say, is everywhere."""
    motion = mini_mi.MotionEmbeddings(hollow(UNET), 4, 4, 4, t_min=0.4)
    motion.save(tmp_path / "m.safetensors")
    tensors, metadata = mini_mi.read_safetensors(tmp_path / "m.safetensors")
    about = json.loads(metadata["mini_mi"])
    about.pop("t_min")
    mini_mi.save_safetensors(tmp_path / "old.safetensors", tensors, {"mini_mi": json.dumps(about)})
    for name, flags, t_min in (("m", [], 0.4), ("m", ["--t-min", "0.1"], 0.1), ("old", [], 0)):
        file = tmp_path / f"{name}.safetensors"
        status, out = start("--motion", file, *flags, small=REUSE, shows=SHOWS[2:], out=f"out{t_min}")
        assert status == 0 and json.loads((out / "run.json").read_text())["config"]["t_min"] == t_min


@pytest.mark.parametrize("flags, match", [
    (["--size", "64x32"], "made for 16 positions .* this size has 4x8"),
    (["--frames", 33], "32 frames, not for 33")])
def test_a_size_that_a_file_of_the_authors_does_not_have_shows_at_once(start, capsys, tmp_path, flags, match):
    """And not after loading and inverting."""
    motion = mini_mi.MotionEmbeddings(hollow(UNET), 32, 4, 4)
    torch.save(motion.state_dict(), tmp_path / "motion_embed.pt")
    reuse = [*SMALL[:4], *SMALL[6:], "--dry-run"]
    assert start("--motion", tmp_path / "motion_embed.pt", small=reuse, shows=SHOWS[2:])[0] == 0
    capsys.readouterr()
    status, out = start("--motion", tmp_path / "motion_embed.pt", *flags, small=reuse, shows=SHOWS[2:])
    refused(capsys, status, out, {}, match)


def test_no_clip_of_the_small_model_for_another_one(start, capsys):
    """A public model with only a prompt: which clip?"""
    status, out = start(video=None, shows=SHOWS[2:])
    refused(capsys, status, out, {}, "--video FILE")


def test_the_small_model_says_what_it_knows(start, clip, capsys):
    """Where it is asked for something else than its own clips."""
    dry = ["--dry-run"]
    assert start(model="tiny", small=dry, video=ROOT / "data" / "clips" / "loop.webp", shows=[])[0] == 0
    assert "note" not in capsys.readouterr().out
    assert start(model="tiny", small=[*dry, "--frames", "4"])[0] == 0
    assert "--model zeroscope" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--steps", 5], ["--lr-schedule", "constant"], ["--mqk-dims", 2],
                                   ["--levels", "0"], ["--snapshots", "1"], ["--checkpointing"]])
def test_how_to_learn_means_nothing_to_a_learned_motion(start, capsys, tmp_path, flags):
    """And is refused: silence would let people believe that it was obeyed."""
    mini_mi.MotionEmbeddings(hollow(UNET), 4, 4, 4).save(tmp_path / "m.safetensors")
    status, _ = start("--motion", tmp_path / "m.safetensors", *flags, small=REUSE, shows=SHOWS[2:])
    assert status == 2 and f"error: {flags[0]} says how to learn" in capsys.readouterr().err


def test_dry_run_writes_nothing(start, capsys):
    """And says what would happen."""
    status, out = start("--dry-run")
    text = " ".join(capsys.readouterr().out.split())
    assert status == 0 and not out.exists()
    expected = 3 * (1 + 2 * 16) * 4 * 32  # three blocks: MQK (1,4,32) and two MV (4*4,4,32)
    for word in ("tiny_random", "square.gif", "frames=4", "size='32x32'", f"{expected:,} parameters",
                 "sample_steps=2", "a green circle"):
        assert word in text, word


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        mini_mi.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    options = set(re.findall(r"--[a-z][a-z-]*", text))
    for flag in ("no-mqk no-mv debias debias-in-training mqk-dims mv-dims motion-type t-min video prompt "
                 "source-prompt motion steps lr lr-schedule batch checkpointing negative-prompt loss "
                 "sample-steps guidance noise-prior frames size start duration format seeds no-compare "
                 "fps seed device dtype model out levels snapshots dry-run help").split():
        assert f"--{flag}" in options
        options.remove(f"--{flag}")
    assert not options
    assert "0.02" in text and "576x320" in text and "(diff)" in text and "python mini_mi.py --no-mqk" in text
    for group in ("reference", "method", "training", "sampling", "output"):
        assert f" {group}: " in text


# Bad input

def refused(capsys, result, folder, before, match):
    """Status 2, one line that begins with error:, and the output folder as it was."""
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert result == 2 and len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert re.search(match, lines[0]), lines[0]
    assert len(lines[0]) > 30 and "Traceback" not in captured.out + captured.err
    assert (contents(folder) if folder.exists() else {}) == before


@pytest.fixture
def bad(start, capsys, tmp_path):
    """bad(match, *arguments, ...): that run is refused, and nothing is written."""
    def call(match, *arguments, **settings):
        older = tmp_path / "older"
        older.mkdir(exist_ok=True)
        for name in ("motion.safetensors", "1-a-green-circle.gif", "sheet.png"):
            (older / name).write_text("kept")
        before = contents(older)
        result, out = start(*arguments, out="older", **settings)
        refused(capsys, result, out, before, match)
    return call


def make_bad_video(kind, path, clip):
    """Writes the damaged input `kind`; returns its path."""
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(clip.read_bytes()[:len(clip.read_bytes()) * 2 // 3])
    elif kind == "text":
        path.write_text("this is a letter, and no video\n" * 50)
    elif kind == "bomb":
        data = bytearray(clip.read_bytes())
        data[6:10] = b"\xff\xff\xff\xff"  # 65535 x 65535 pixels
        path.write_bytes(data)
    elif kind == "pixel":
        mini_mi.write_video(path, np.arange(18, dtype=np.uint8).reshape(6, 1, 1, 3) * 14, 8)
    elif kind == "short":
        mini_mi.write_video(path, moving_square(3), 8)
    elif kind in ("mixed", "nothing"):
        path.mkdir()
        for n in range(6 * (kind == "mixed")):
            Image.new("RGB", (32, 32 + (n == 4))).save(path / f"{n}.png")
    return path


@pytest.mark.parametrize("name, kind, match", [
    ("x.gif", "missing", "No such file"), ("x.gif", "empty", "is empty"), ("x.mp4", "empty", "is empty"),
    ("x.gif", "truncated", "damaged|truncated"), ("x.gif", "text", "no video|ffmpeg"),
    ("x.mp4", "text", "no video|ffmpeg"),
    ("x.bin", "text", "no video|ffmpeg"), ("x.gif", "bomb", "decompression bomb"), ("x.gif", "pixel", "1, 1"),
    ("x.gif", "short", "has 3 frames, but 4"), ("x", "mixed", "mixes frames"),
    ("x", "nothing", "no picture lies directly in it")])
def test_bad_videos(bad, tmp_path, clip, name, kind, match):
    """Nothing that is no clip gets as far as training."""
    bad(match, video=make_bad_video(kind, tmp_path / name, clip))


@pytest.mark.parametrize("match, arguments", [
    ("nothing is left", ["--no-mqk", "--motion-type", "camera"]),
    ("--start", ["--start", -1]), ("--start", ["--start", 99]), ("--duration", ["--duration", 0]),
    ("--seeds", ["--seeds", 0]), ("--format", ["--format", "avi"]),
    ("WIDTHxHEIGHT", ["--size", "big"]), ("WIDTHxHEIGHT", ["--size", "0x32"]),
    ("WIDTHxHEIGHT", ["--size", "32"]),
    ("multiples of 8", ["--size", "36x32"]), ("--frames", ["--frames", 1]),
    ("--frames", ["--frames", "many"]),
    ("--steps", ["--steps", 0]), ("--lr", ["--lr", 0]), ("--lr", ["--lr", "nan"]),
    ("--noise-prior", ["--noise-prior", 2]),
    ("--guidance", ["--guidance", "nan"]), ("--seed", ["--seed", -1]), 
    ("--fps", ["--fps", 0]), ("within 1 and 50", ["--fps", 60]), ("--snapshots", ["--snapshots", "x"]),
    ("invalid numbers value", ["--levels", "a"]), ("levels", ["--levels", "1"]), ("levels", ["--levels", "7"]), ("--frobnicate", ["--frobnicate"]),
    ("--debias", ["--debias", "median"]), ("--sample-steps", ["--sample-steps", 1]),
    ("WIDTHxHEIGHT", ["--size", f"{8 * 10 ** 400}x8"]),
    ("steps", ["--sample-steps", 1000]),
    ("--device gpu fails", ["--device", "gpu"]), ("--device cuda:99", ["--device", "cuda:99"]),
    ("--snapshots .1, 3.: .* 1 to 2", ["--snapshots", "1,3"]),
    ("^error: neither MQK", ["--no-mqk", "--no-mv"]), ("^error: levels", ["--levels", "7"]),
    ("--device meta", ["--device", "meta"]), ("--dtype", ["--dtype", "float8"])])
def test_bad_flags(bad, match, arguments):
    """Wrong values, contradictions, and flags that do not exist."""
    bad(match, *arguments)


def test_missing_prompts(bad):
    bad("--source-prompt", shows=["--prompt", "a green circle"])
    bad("--prompt", shows=["--source-prompt", "a red star"])


def edit_json(**changes):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return change


def edit_bytes(cut):
    def change(path):
        path.write_bytes(cut(path.read_bytes()))
    return change


def poison(path):
    tensors = {key: value.clone() for key, value in mini_mi.load_tensors(path).items()}
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    mini_mi.save_safetensors(path, tensors)


class Evil:
    """A pickle that makes a folder when it is opened without care."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def evil(path):
    torch.save({"conv_in.weight": Evil(path.parent / "was-run")}, path.with_suffix(".bin"))
    path.unlink()


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("name, change, match", [
    ("unet/config.json", edit_json(block_out_channels=32), "unet is .*not fit its config.json .TypeError"),
    ("vae/config.json", edit_json(block_out_channels=7), "vae/config.json"),
    ("tokenizer/special_tokens_map.json", edit_json(pad_token="nosuch"), "tokenizer"),
    ("vae/config.json", edit_json(act_fn="relu"), "act_fn"),
    ("unet/config.json", edit_bytes(lambda b: b[:-9]), "JSON"),
    ("unet/config.json", edit_json(block_out_channels=[32, 32]), "does not fit its config"),
    ("vae/config.json", edit_json(layers_per_block=2), "does not fit .*Missing key"),
    ("scheduler/scheduler_config.json", edit_json(prediction_type="sample"), "prediction_type"),
    ("text_encoder/config.json", edit_json(hidden_act="relu"), "hidden_act"),
    (WEIGHTS, edit_bytes(lambda b: b[:len(b) // 2]), "truncated"),
    (WEIGHTS, edit_bytes(lambda b: b""), "safetensors"),
    (WEIGHTS, edit_bytes(lambda b: b"\xff" * 7 + b"\x7f" + b[8:]), "no safetensors file"),
    (WEIGHTS, poison, "not finite"), (WEIGHTS, evil, "refused"), (WEIGHTS, lambda path: path.unlink(), "no weights, such as"),
    ("tokenizer/vocab.json", lambda path: path.unlink(), "vocab.json"),
    ("tokenizer/merges.txt", lambda path: path.unlink(), "merges.txt")])
def test_bad_models(bad, tmp_path, tiny_random, name, change, match):
    """Config, weights and tokenizer, each damaged in its own way."""
    model = shutil.copytree(tiny_random, tmp_path / "model")
    change(model / name)
    bad(match, model=model)
    assert not list(tmp_path.rglob("was-run"))


def test_unknown_models(bad, tmp_path, monkeypatch):
    """A folder that is not there, one that is no model, and a repository that cannot be reached."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    bad("HF_HUB_OFFLINE", model="owner/nosuch")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (tmp_path / "folder").mkdir()
    bad("no model folder", model="nosuch")
    bad("no model folder", model=tmp_path / "folder")
    bad("cannot be fetched", model="owner/nosuch")


def test_bad_motion_files(bad, tmp_path):
    """Missing, damaged, code, NaN, of another model."""
    motion = mini_mi.MotionEmbeddings(hollow(dict(UNET, block_out_channels=[64, 64])), 4, 4, 4)
    motion.save(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-50])
    next(motion.parameters()).data.fill_(float("inf"))
    motion.save(tmp_path / "infinite.safetensors")
    torch.save({"a.pos_embed": Evil(tmp_path / "was-run")}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, match in (("missing.safetensors", "cannot be read .No such file"),
                        ("cut.safetensors", "damaged"),
                        ("infinite.safetensors", "not finite"), ("evil.pt", "refused"),
                        ("text.pt", "refused"),
                        ("other.safetensors", "do not fit the model")):
        bad(match, "--motion", tmp_path / name, small=REUSE, shows=SHOWS[2:])
    assert not (tmp_path / "was-run").exists()


def test_unwritable_output(start, capsys, tmp_path):
    """A path below a regular file fails before the training, not after it."""
    (tmp_path / "file").write_text("a file")
    for out in ("file", "file/below"):
        result, _ = start(out=out)
        refused(capsys, result, tmp_path / "nothing", {}, "cannot write")
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
                                   RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")])
def test_out_of_memory_is_one_line_with_advice(capsys, error):
    def job():
        raise error
    refused(capsys, mini_mi.guarded(job), ROOT / "nothing", {}, "--checkpointing")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried"),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_a_file_is_not_to_blame_for_a_lack_of_memory(capsys, error):
    def fails(*_, **__):
        raise error

    def build():
        with mini_mi.built_from("clip.mp4", "is damaged"):
            fails()
    refused(capsys, mini_mi.guarded(build), ROOT / "nothing", {}, "out of memory: take fewer --frames")


def test_faults_of_the_program_are_not_hidden():
    """Only what the user can put right becomes one line."""
    with pytest.raises(ZeroDivisionError):
        mini_mi.guarded(lambda: 1 / 0)


# What a rerun, several seeds and other formats leave

def test_a_folder_that_holds_a_run_is_never_written_into(start, capsys, tmp_path):
    """The next run goes to out-2, the one after it to out-3, and says so; an interrupted run is one, too."""
    _, out = start("--snapshots", "1")
    first = contents(out)
    status, _ = start("--motion", out / "motion-step1.safetensors", small=REUSE, shows=SHOWS[2:])
    assert status == 0 and "out-2" in capsys.readouterr().out
    (tmp_path / "out-3").mkdir()
    (tmp_path / "out-3" / "run.json").write_text("[]")
    assert start(shows=[*SHOWS[:2], "--prompt", "a cat"])[0] == 0
    assert contents(out) == first and (tmp_path / "out-3" / "run.json").read_text() == "[]"
    assert sorted(p.name for p in (tmp_path / "out-4").iterdir()) == [
        "1-a-cat-compare.gif", "1-a-cat.gif", "motion.safetensors", "run.json", "sheet.png"]
    assert not (tmp_path / "out-2" / "motion.safetensors").exists()


def test_a_disk_that_is_full_from_the_start_is_told_once(start, capsys, monkeypatch, tmp_path):
    """It is no sign of an earlier run: nothing goes on to out-2."""
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(mini_mi.os, "replace", full)
    assert start()[0] == 2 and "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out-2").exists()


def test_camera_motion_does_not_need_the_size_of_mv(start, tmp_path):
    """MV is dropped, so a file of the authors may be of another size."""
    torch.save(mini_mi.MotionEmbeddings(hollow(UNET), 32, 4, 4).state_dict(), tmp_path / "motion_embed.pt")
    reuse = ["--frames", "4", "--size", "64x32", "--dry-run"]
    for kind, status in (("object", 2), ("camera", 0)):
        assert start("--motion", tmp_path / "motion_embed.pt", "--motion-type", kind, small=reuse,
                     shows=SHOWS[2:])[0] == status


def test_embeddings_that_would_never_act_are_refused(start, capsys, tmp_path):
    """2 steps are those at 1 and 501, or at 0 and 500, of 1000: before anything is trained."""
    status, out = start("--t-min", 0.6)
    refused(capsys, status, out, {}, "act from 0.6 T on never")


def test_seeds_are_those_of_single_runs(start):
    """--seeds 2 from seed 3 on gives what --motion with seed 3 and with seed 4 gives."""
    _, out = start("--seed", 3, "--seeds", 2, "--no-compare", prior="0.5")
    many = gifs(out)
    assert set(many) == {f"1-a-green-circle-seed{n}{end}.gif" for n in (3, 4) for end in ("", "-compare")}
    for seed in (3, 4):
        _, one = start("--motion", out / "motion.safetensors", "--seed", seed, prior="0.5", small=REUSE,
                       shows=SHOWS[2:], out=f"one{seed}")
        assert gifs(one)["1-a-green-circle.gif"] == many[f"1-a-green-circle-seed{seed}.gif"]


def test_no_compare_samples_nothing_without_embeddings(start, monkeypatch):
    calls, real = [], mini_mi.sample

    def record(models, noise, text, negative, steps, guidance, motion=None, **how):
        calls.append(motion)
        return real(models, noise, text, negative, steps, guidance, motion, **how)

    monkeypatch.setattr(mini_mi, "sample", record)
    assert start("--no-compare", out="one")[0] == 0 and len(calls) == 1 and calls[0] is not None
    assert start()[0] == 0 and len(calls) == 3 and calls[2] is None


@pytest.mark.parametrize("kind", ["webp", "mp4"])
def test_other_formats(start, kind):
    if kind == "mp4" and not shutil.which("ffmpeg"):
        assert start("--format", "mp4")[0] == 2
        return
    status, out = start("--format", kind)
    assert status == 0 and not gifs(out)
    assert mini_mi.read_video(out / f"1-a-green-circle.{kind}", 4, (32, 32)).std() > 1
    assert (out / f"1-a-green-circle-compare.{kind}").exists()


def test_a_relative_model_path_is_remembered_as_an_absolute_one(start, tiny_random, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_random.parent)
    _, out = start(model=tiny_random.name)
    assert (mini_mi.MotionEmbeddings.load(out / "motion.safetensors").source["model"]
            == str(tiny_random.resolve()))
    monkeypatch.chdir(tmp_path)
    status, _ = start("--motion", out / "motion.safetensors", model=None, small=REUSE, shows=SHOWS[2:],
                     out="again")
    assert status == 0


def test_a_motion_file_is_read_once_and_settings_are_checked_before_the_training(
        start, monkeypatch, tmp_path):
    motion = start()[1] / "motion.safetensors"
    reads, real = [], mini_mi.read_safetensors
    monkeypatch.setattr(mini_mi, "read_safetensors", lambda path: reads.append(str(path)) or real(path))
    assert start("--motion", motion, small=REUSE, shows=SHOWS[2:], out="again")[0] == 0
    assert reads.count(str(motion)) == 1
    monkeypatch.setattr(mini_mi, "train_motion", lambda *a, **k: pytest.fail("trains first"))
    monkeypatch.setattr(mini_mi, "INVERT_STEPS", 1001)  # more than the schedule has
    assert start(prior="0.5")[0] == 2


def test_a_console_that_cannot_print_a_character_prints_a_substitute(start, clip, tiny_random, tmp_path):
    command = [sys.executable, str(ROOT / "mini_mi.py"), "--model", str(tiny_random), "--video", str(clip),
               "--frames", "4", "--size", "32x32", "--source-prompt", "\u661f",
               "--prompt", "caf\u00e9 \u2605", "--dry-run"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and b"caf\xe9 ?" in done.stdout and b"Traceback" not in done.stderr
    done = subprocess.run([*command, "--video", str(tmp_path / "\u2605.gif")], capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 2 and b"?.gif cannot be read" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("name", [
    "motion.safetensors", "1-a-green-circle.gif", "sheet.png", "run.json"])
def test_a_full_disk_is_one_line(start, capsys, monkeypatch, name):
    """Whatever is being written then; what was written before stays."""
    real = mini_mi.os.replace

    def full(source, target):
        if str(target).endswith(name):
            raise OSError(28, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(mini_mi.os, "replace", full)
    status, out = start()
    errors = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and re.search(
        f"error: cannot write .*{name} .No space left on device.: make room", errors)
    assert not list(out.glob(".*"))
    assert not (out / name).exists()


# Ctrl-C

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_keeps_what_it_has(start, clip, tiny_random, tmp_path, number):
    """One line names the step and the motion file, and the file can be used."""
    small = ["--frames", "2", "--size", "16x16", "--sample-steps", "2", "--device", "cpu"]
    command = [sys.executable, str(ROOT / "mini_mi.py"), "--model", str(tiny_random), "--video", str(clip),
               *small, *SHOWS, "--noise-prior", "0", "--out", str(tmp_path / "out"), "--steps", "100000",
               "--snapshots", "1"]
    # Tests that run in the background may ignore SIGINT; the program must not inherit that.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        deadline = time.time() + 120
        while not (tmp_path / "out" / "motion-step1.safetensors").exists() and time.time() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    last = errors.strip().splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in errors
    found = re.fullmatch(r"error: stopped after step (\d+) of 100000: what was learned is in (\S+); "
                         r"use it with --motion \2", last)
    assert found and found[2].endswith(f"motion-step{found[1]}.safetensors")
    assert any(p.abs().max() > 0 for p in mini_mi.MotionEmbeddings.load(found[2]).parameters())
    status, out = start("--motion", found[2], small=[*small[:6]], shows=SHOWS[2:], out="again")
    assert status == 0 and gifs(out)


# Where output goes

def test_output_that_nobody_reads(clip, tiny_random, tmp_path):
    """Without standard error the work is done all the same; `| head -1` stops it, and one line says why."""
    command = [sys.executable, str(ROOT / "mini_mi.py"), "--model", str(tiny_random), "--video", str(clip),
               *SMALL, *SHOWS, "--noise-prior", "0", "--out", str(tmp_path / "out")]
    words = " ".join(map(shlex.quote, command))
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{words} 2>&- | cat"], capture_output=True)
    assert done.returncode == 0 and b"done in" in done.stdout
    assert json.loads((tmp_path / "out" / "run.json").read_text())["losses"] and gifs(tmp_path / "out")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{words} | head -1"], capture_output=True)
    assert done.returncode == 2 and done.stdout.count(b"\n") == 1
    assert done.stderr.decode().strip().splitlines()[-1].startswith("error: nobody reads the output")
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


def test_a_prompt_that_begins_with_a_dash(start, capsys):
    """With an equals sign it is one; without it, the line says so."""
    assert start("--prompt=-dog", "--dry-run")[0] == 0 and "-dog" in capsys.readouterr().out
    assert start("--prompt", "-dog", "--dry-run")[0] == 2
    assert '--option="-value"' in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--model", "--video", "--motion"])
def test_a_name_that_the_system_refuses_is_one_line(bad, flag):
    """As a folder without rights is: not every error of the system means that there is no such file."""
    bad("File name too long", flag, "x" * 300)


@pytest.mark.parametrize("source", [{"model": 5}, {"video": 5}, {"frames": "many"}])
def test_a_motion_file_whose_source_has_other_kinds_is_one_line(start, capsys, tmp_path, source):
    motion = mini_mi.MotionEmbeddings(hollow(UNET), 4, 4, 4)
    motion.source = source
    motion.save(tmp_path / "m.safetensors")
    status, out = start("--motion", tmp_path / "m.safetensors", small=[], shows=SHOWS[2:], model=None, video=None)
    refused(capsys, status, out, {}, f"--{next(iter(source))} cannot be")


@pytest.mark.parametrize("prompts, match", [("a cat", "--prompt cannot be 'a '"), ([1], "are no texts")])
def test_prompts_of_clips_json_that_are_no_texts(start, clip, capsys, prompts, match):
    (clip.parent / "clips.json").write_text(json.dumps({clip.stem: {"caption": "a star", "prompts": prompts}}))
    status, out = start(shows=[])
    refused(capsys, status, out, {}, match)


def test_a_folder_of_the_same_name_is_not_taken_for_the_embedded_model(tmp_path, monkeypatch):
    (tmp_path / "tiny" / "unet").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config, _ = mini_mi.settle({})
    assert config.model == str(ROOT / "data" / "tiny") and config.frames == 16


def test_a_broken_pipe_blames_no_file():
    with pytest.raises(BrokenPipeError), mini_mi.built_from("clip.mp4"):
        raise BrokenPipeError


def test_a_text_encoder_of_another_model_shows_at_loading(tiny_random, tmp_path):
    model = shutil.copytree(tiny_random, tmp_path / "model")
    shutil.copytree(ROOT / "data" / "tiny" / "text_encoder", model / "text_encoder", dirs_exist_ok=True)
    shutil.copytree(ROOT / "data" / "tiny" / "tokenizer", model / "tokenizer", dirs_exist_ok=True)
    with pytest.raises(mini_mi.UserError, match="take both from one model"):
        mini_mi.load_models(model)
