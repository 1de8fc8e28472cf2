"""eval_mi.py from end to end, on a model of random weights that is small enough for seconds."""
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree

import numpy as np
import pytest
import torch

import eval_mi
import mini_mi
from conftest import ROOT, train_bpe, write_model, write_tokenizer
from data import world

UNET = dict(down_block_types=["CrossAttnDownBlock3D", "DownBlock3D"],
            up_block_types=["UpBlock3D", "CrossAttnUpBlock3D"], block_out_channels=[8, 16],
            layers_per_block=1, cross_attention_dim=32, attention_head_dim=8, norm_num_groups=4)
TOWER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
# 3 clips, 1 prompt, 2 seeds: 8 variants x 6, reconstruct 6, vae 3.
CELLS = 8 * 6 + 6 + 3
SMALL = ["--clip-count", "3", "--prompt-count", "1", "--seed-count", "2", "--steps", "2",
         "--sample-steps", "2", "--invert-steps", "2", "--frames", "4", "--size", "64x64", "--guidance", "2",
         "--grid", "8", "--device", "cpu", "--lr", "0.5", "--batch", "1"]
ROWS = ("full", "no-mqk", "no-mv", "drop-mqk", "drop-mv", "debias-none", "base", "base-no-inversion",
        "reconstruct", "vae")
SMALL += ["--variants", ",".join(ROWS)]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model folder in the layout of data/tiny: with a CLIP of its own."""
    folder = write_model(tmp_path_factory.mktemp("models") / "eval", unet=UNET)
    shutil.copy(ROOT / "data" / "tiny" / "mini_mi.json", folder)
    vocab, merges = train_bpe(" ".join(world.all_captions()), 200)
    write_tokenizer(folder / "clip", vocab, merges, 16)
    text = dict(TOWER, vocab_size=len(vocab), max_position_embeddings=16, eos_token_id=vocab["<|endoftext|>"])
    config = dict(text_config=text, vision_config=dict(TOWER, image_size=64, patch_size=16), projection_dim=8)
    (folder / "clip" / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    mini_mi.save_safetensors(folder / "clip" / "model.safetensors", eval_mi.CLIPModel(config).state_dict())
    return folder


def arguments(model, out, *more):
    return ["--model", str(model), "--out", str(out), *SMALL, *more]


def command(model, out, *more, ranks=1):
    """The command line as a user types it, for a process of its own."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launch, str(ROOT / "eval_mi.py"), *arguments(model, out, *more)]


def table(out):
    """Everything in results.json that does not depend on time."""
    results = json.loads((out / "results.json").read_text())
    for row in results["rows"]:
        del row["cost"]
    for cell in results["cells"]:
        del cell["cost"]
    return {key: value for key, value in results.items() if key not in ("run", "settings")}


FOLDERS = ("motions", "cells", "scores")


def files(out, *folders):
    """Finished things: path below `out` -> when it was written."""
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for folder in folders or FOLDERS
            for p in (out / folder).rglob("*") if p.is_file()}


def frames_of(lab, cell):
    return eval_mi.read_arrays(lab.sample_path(cell))["frames"]


@pytest.fixture(scope="session")
def finished(model, tmp_path_factory):
    """The output of a complete small run; tests that change it work on a copy."""
    out = tmp_path_factory.mktemp("eval") / "out"
    assert eval_mi.main(arguments(model, out)) == 0
    return out


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


# ---------------------------------------------------------------------------------------------- the whole run

def test_a_run_counts_every_cell_once(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["finished"] == results["planned"] == results["run"]["computed"] == CELLS
    keys = [(c["variant"], c["clip"], c["prompt_index"], c["seed"], c["train_seed"])
            for c in results["cells"]]
    assert len(set(keys)) == CELLS
    rows = {r["name"]: r for r in results["rows"]}
    assert list(rows) == list(ROWS)
    assert (rows["full"]["n"], rows["reconstruct"]["n"], rows["vae"]["n"]) == (6, 6, 3)
    assert all(r["clips"] == 3 and set(r["metrics"]) == set(eval_mi.METRICS) for r in rows.values())
    assert rows["full"]["cost"]["parameters"] == rows["no-mqk"]["cost"]["parameters"] + rows["no-mv"]["cost"][
        "parameters"] and rows["base"]["cost"]["parameters"] == 0
    holm = [(c["name"], m) for c in results["comparisons"] for m, t in c["metrics"].items() if "p_holm" in t]
    assert holm == [(v, m) for v in ("no-mqk", "no-mv") for m in ("text_similarity", "motion_fidelity")]
    assert results["settings"]["steps"] == 2 and results["run"]["versions"]["torch"] == torch.__version__


def test_the_judges_of_public_models(model, tmp_path, monkeypatch):
    """Clips of one's own and another CLIP: features for the Frechet distance are Inception's, on every fourth
    frame but on two at least; there are no attributes; the floor is one reference from the other. (Random
    weights: the published ones are compared in test_clip_inception.py.)
    """
    torch.manual_seed(0)
    network, judge = eval_mi.InceptionV3().eval(), tmp_path / "clip"
    monkeypatch.setattr(eval_mi.InceptionV3, "pretrained", lambda device: network)
    shutil.copytree(model / "clip", judge)
    listing = {}
    for i in range(2):
        entry = world.reference("test", i)
        listing[entry["name"]] = {"caption": entry["caption"], "prompts": ["a photo of a cat"]}
        frames = world.render(world.scene(entry["seed"], [entry["motion"]], entry["caption"]), 4, 64)
        mini_mi.write_video(tmp_path / f"{entry['name']}.webp", frames, 10)
    (tmp_path / "clips.json").write_text(json.dumps(listing))
    out = tmp_path / "out"
    assert eval_mi.main(arguments(model, out, "--clips", str(tmp_path), "--clip-model", str(judge),
                                  "--clip-count", "2", "--seed-count", "1", "--variants", "full,base")) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["judges"]["frechet"] == "Inception" and results["judges"]["clip"] == str(judge)
    assert results["finished"] == 2 * 2
    assert all("attributes" not in row["metrics"] and row["frames"] == 2 * 2 for row in results["rows"])
    videos = [mini_mi.read_video(tmp_path / f"{name}.webp", 4, (64, 64)) for name in listing]
    with torch.no_grad():                                       # frames 0 and 2 of both references
        real = torch.cat([network(torch.from_numpy(video[::2]).permute(0, 3, 1, 2) / 255) for video in videos])
    full = [eval_mi.read_arrays(path)["fid_features"] for path in sorted((out / "scores").rglob("full-*.npz"))]
    assert results["rows"][0]["frechet"][0] == pytest.approx(
        eval_mi.frechet_distance(np.concatenate(full), real), rel=1e-4)
    floor = eval_mi.frechet_distance(real[:2], real[2:])                       # one reference from the other
    assert all(row["frechet_floor"] == pytest.approx(floor, rel=1e-4) for row in results["rows"])
    kept = next((out / "scores").rglob("full-*.npz"))
    assert eval_mi.read_arrays(kept)["fid_features"].shape == (2, 2048)


def test_the_variants_do_what_they_say(finished, model):
    """Videos of paired cells start alike and differ where the variant says; reconstruct asks for the
    caption."""
    lab = eval_mi.Lab(eval_mi.parse(arguments(model, finished)))
    video = {(c.variant.name, c.clip.name, c.seed): frames_of(lab, c) for c in lab.cells}
    name = lab.clips[0].name
    for other in ("no-mqk", "no-mv", "drop-mqk", "drop-mv", "debias-none", "base", "base-no-inversion"):
        assert not np.array_equal(video["full", name, 0], video[other, name, 0]), other
    assert not np.array_equal(video["full", name, 0], video["full", name, 1])
    assert video["full", name, 0].shape == (4, 64, 64, 3)
    assert {c.prompt for c in lab.cells if c.variant.own_prompt} == {c.caption for c in lab.clips}


def test_a_variant_equals_mini_mi_by_hand(finished, model):
    """The embeddings of a cell are what train_motion gives, and its frames what sample gives."""
    lab = eval_mi.Lab(eval_mi.parse(arguments(model, finished)))
    clip, variant = lab.clips[2], eval_mi.VARIANTS["no-mv"]
    latents = mini_mi.encode_video(lab.pipeline.models, mini_mi.to_model_range(clip.frames))
    text = mini_mi.encode_prompt(lab.pipeline.models, [clip.caption])
    motion = mini_mi.train_motion(lab.pipeline.models, latents, text, steps=2, lr=0.5, lr_schedule="cosine",
                                  t_min=0.4, progress=False, use_mv=False)
    kept = mini_mi.MotionEmbeddings.load(lab.motion_path(clip, "no-mv", 0)).state_dict()
    assert set(kept) == set(motion.state_dict()) and all(key.endswith("pos_embed") for key in kept)
    assert all(np.allclose(kept[k], v, atol=1e-5) for k, v in motion.state_dict().items())
    cell = next(c for c in lab.cells if c.variant is variant and c.clip is clip and c.seed == 1)
    seed = int(eval_mi.digest(clip.name, 0, 1), 16)
    fresh = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    noise = mini_mi.blend_noise(lab.pipeline.invert(clip)[1], fresh, 0.5)
    prompt, empty = (mini_mi.encode_prompt(lab.pipeline.models, [words]) for words in (cell.prompt, ""))
    again = mini_mi.sample(lab.pipeline.models, noise, prompt, empty, 2, 2.0, motion, progress=False)
    frames = mini_mi.to_uint8(mini_mi.decode_video(lab.pipeline.models, again)[0])
    assert np.abs(frames_of(lab, cell).astype(int) - frames).max() <= 1


def test_outlines_are_judged_by_the_shape_that_was_asked_for(finished, model):
    """The autoencoder's clip shows what its frames show, and every cell has this score."""
    lab = eval_mi.Lab(eval_mi.parse(arguments(model, finished)))
    cell = lab.cells[-1]
    frames = {shape: world.render(world.scene(3, ["zigzag"], f"a yellow {shape} on a teal plain background"),
                                  4, 64) for shape in world.SHAPES}
    right = lab.judges.judge(cell, {"frames": cell.clip.frames, "about": {}})["about"]["scores"]
    assert right["shape_frames"] == 1.0
    for shape, clip in frames.items():
        scores = lab.judges.judge(cell, {"frames": clip, "about": {}})["about"]["scores"]
        assert scores["shape_frames"] == float(shape == world.attributes(cell.prompt)[0])
    assert all(0 <= eval_mi.read_arrays(lab.score_path(c))["about"]["scores"]["shape_frames"] <= 1
               for c in lab.cells)


def test_names_of_files_say_what_they_hold(finished):
    names = {re.sub("-[0-9a-f]{12}(?=[.])", "", name) for name in files(finished)}
    assert {"motions/spiral-full-r0.safetensors", "cells/spiral/drop-mv-p0-s1.npz",
            "scores/spiral/vae-own-s0.npz"} <= names


def test_the_report_is_rebuilt_from_cells_alone(copy, finished, model, monkeypatch, capsys):
    """No UNet is loaded, and of a file of weights no more than both ends are read."""
    before, there = table(copy), files(copy)
    monkeypatch.setattr(mini_mi, "load_models", None)
    assert eval_mi.main(arguments(model, copy, "--report")) == 0
    assert table(copy) == before and files(copy) == there
    run = [json.loads((folder / "results.json").read_text())["run"] for folder in (copy, finished)]
    assert run[0] == run[1]                                      # still the numbers of the run that made them
    assert "full" in capsys.readouterr().out


def test_a_fingerprint_is_cheap_and_sees_other_weights(tmp_path):
    big = tmp_path / "unet" / "big.safetensors"
    big.parent.mkdir()
    with open(big, "wb") as file:
        file.truncate(1 << 36)                                  # 64 GiB of nothing: a walk would take minutes
    first = eval_mi.fingerprint(big.parent)
    with open(big, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    second = eval_mi.fingerprint(big.parent)
    assert len({first, second}) == 2 and second == eval_mi.fingerprint(big.parent)
    big.rename(big.with_name("other.safetensors"))
    assert eval_mi.fingerprint(big.parent) not in (first, second)


def test_a_report_of_a_part_does_not_replace_that_of_the_whole_run(copy, model, capsys):
    """Who leaves out the options of the run would lose its clips, its note and its votes."""
    whole = (copy / "results.json").read_text()
    assert eval_mi.main(arguments(model, copy, "--report", "--clip-count", "2")) == 2
    assert f"holds {CELLS} cells, not" in capsys.readouterr().err
    assert (copy / "results.json").read_text() == whole


def test_a_results_file_that_lacks_something_is_named(tmp_path, capsys):
    results = json.loads((ROOT / "data" / "ablation" / "results.json").read_text(encoding="utf-8"))
    for lost in ("run", "judges"):
        (tmp_path / "results.json").write_text(json.dumps({k: v for k, v in results.items() if k != lost}))
        assert eval_mi.main(["--report", "--out", str(tmp_path)]) == 2
        assert "results.json cannot be used" in capsys.readouterr().err


def test_a_variant_brings_what_it_is_held_against():
    names = eval_mi.parse(["--variants", "no-mqk-plain,no-mv"]).variants
    assert names == ["full", "no-mqk-plain", "no-mv", "no-inversion"]


def test_quick_is_a_smaller_grid_of_which_more_can_be_asked():
    s = eval_mi.parse(["--quick", "--seed-count", "2"])
    assert (s.clip_count, s.prompt_count, s.seed_count) == (3, 1, 2)


def test_a_report_while_variants_have_no_sample_in_common(copy, model):
    """As after a killed run on several ranks: `full` has one clip, `no-mqk` the others."""
    lab = eval_mi.Lab(eval_mi.parse(arguments(model, copy)))
    first = lab.clips[0].name
    for cell in lab.cells:
        if cell.variant.name == "full" and cell.clip.name != first or (
                cell.variant.name == "no-mqk" and cell.clip.name == first):
            lab.score_path(cell).unlink()
    assert eval_mi.main(arguments(model, copy, "--report")) == 0
    names = [c["name"] for c in json.loads((copy / "results.json").read_text())["comparisons"]]
    assert "no-mqk" not in names and "no-mv" in names


@pytest.mark.parametrize("more, said", [
    (["--sample-steps", "1000"], "1000 DDIM steps")])
def test_what_cannot_work_shows_before_the_first_training(model, tmp_path, capsys, monkeypatch, more, said):
    monkeypatch.setattr(mini_mi, "train_motion", None)
    assert eval_mi.main(arguments(model, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err


def test_cotracker_is_fetched_once(monkeypatch):
    """The network's call is (1,F,3,h,w) in 0..255 with grid_size -> (1,F,n,2), (1,F,n)."""
    calls, fetched = [], []

    class Network(torch.nn.Module):
        def forward(self, video, grid_size):
            calls.append((tuple(video.shape), float(video.max())))
            points = torch.arange(grid_size ** 2 * 2.0).view(1, 1, -1, 2) + torch.arange(5.0).view(1, 5, 1, 1)
            return points, points[..., 0] > 0

    monkeypatch.setattr(torch.hub, "load", lambda *args, **options: fetched.append(args) or Network())
    eval_mi.cotracker_model.cache_clear()
    video = torch.full((5, 16, 24, 3), 255, dtype=torch.uint8)
    for _ in range(2):
        tracks, visible = eval_mi.cotracker(video, 3)
    assert calls == [((1, 5, 3, 16, 24), 255.0)] * 2 and len(fetched) == 1
    assert tracks.shape == (9, 5, 2) and visible.shape == (9, 5)
    assert (tracks.diff(dim=1) == 1).all() and visible.sum() == 9 * 5 - 1 and not visible[0, 0]

    def offline(*args, **options):
        raise RuntimeError("It looks like there is no internet connection")

    monkeypatch.setattr(torch.hub, "load", offline)
    eval_mi.cotracker_model.cache_clear()
    with pytest.raises(mini_mi.UserError, match="CoTracker .*lk"):
        eval_mi.cotracker(video, 3)


def test_report_html_is_one_self_contained_page(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page
    assert page.count('<div class="clip reference"') == 2 * 3
    assert page.count("<svg") == 1                               # the forest plot
    for name in ROWS:
        assert f'aria-label="{name}"' in page and f">{name}<" in page
    # The answers come first, then the picture, then the table.
    places = [page.index(what)
              for what in ("no-mqk against full, 3 clips", "Differences from full", "<table")]
    assert places == sorted(places)


def test_results_md_answers_first(finished):
    text = (finished / "results.md").read_text(encoding="utf-8")
    assert text.startswith("- no-mqk against full, 3 clips: ")
    places = [text.index(what)
              for what in ("no-mv against full", "](results.svg)", "| full |", "drop-mv against")]
    assert places == sorted(places)
    assert text.count("| full |") == 2                           # the table and the details
    line = next(x for x in text.splitlines() if x.startswith("| full |"))
    assert line.count(" ± ") == 5 and "no votes yet" in line
    head = next(x for x in text.splitlines() if x.startswith("| variant |"))
    assert re.findall(r"[|] ([^|]+?) ?[↑↓]", head)[:5] == [
        "Text Similarity", "Motion Fidelity", "Temporal Consistency", "Fréchet distance (tiny-CLIP features)",
        "User Preference"]
    assert "| real from real | – | – | – | 0." in text


def test_the_forest_plot_is_a_file_of_its_own(finished):
    """One panel a metric, a mark per variant with the same start noise, both themes, nothing from outside."""
    text = (finished / "results.svg").read_text(encoding="utf-8")
    root = xml.etree.ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and text.count('class="title"') == 6
    assert text.count("<circle") == 6 * 6 and text.count('class="mark ablation"') == 6 * 2
    assert "prefers-color-scheme: dark" in text and "http" not in text.replace("http://www.w3.org", "")
    assert "nan" not in text and "inf" not in text


def test_a_console_without_arrows_gets_its_table(copy, model, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert eval_mi.main(arguments(model, copy, "--report")) == 0
    out.flush()
    assert b"Motion Fidelity ?" in out.buffer.getvalue()


def test_trainings_of_a_clip_are_averaged(model, tmp_path):
    more = ("--variants", "no-mqk,base", "--training-seeds", "2", "--clip-count", "2")
    assert eval_mi.main(arguments(model, tmp_path, *more)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {r["name"]: r["n"] for r in results["rows"]} == {"full": 8, "no-mqk": 8, "base": 4}
    assert [c["pairs"] for c in results["comparisons"]] == [4, 4]       # trainings of a sample: their mean
    assert len(files(tmp_path, "motions")) == 2 * 2 * 2


# ---------------------------------------------------------------------- interrupted, damaged, shared, changed

FEW = "--variants", "no-mqk,vae", "--clip-count", "2"             # 4 + 4 + 2 cells


def test_an_interrupted_run_goes_on_and_equals_one_that_was_not(copy, model, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen(command(model, out, *FEW), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(files(out, "scores")) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {name: when for name, when in files(out).items() if name.endswith((".npz", ".safetensors"))}
    scores = sum(name.startswith("scores") for name in kept)
    assert 3 <= scores < 10 and not (out / "results.json").exists()
    assert eval_mi.main(arguments(model, out, *FEW)) == 0
    assert json.loads((out / "results.json").read_text())["run"]["computed"] == 10 - scores
    after = files(out)
    assert all(after[name] == when for name, when in kept.items())                # nothing was computed again
    assert eval_mi.main(arguments(model, copy, *FEW)) == 0
    assert_same(table(out), table(copy))


def test_a_sample_that_is_missing_is_made_again_in_the_same_company(copy, model):
    """With one of two seeds gone, both are sampled, and every byte of the missing one is what it was."""
    lab = eval_mi.Lab(eval_mi.parse(arguments(model, copy)))
    cell = next(c for c in lab.cells if c.variant.name == "full" and c.seed == 1)
    before, scores = frames_of(lab, cell), files(copy, "scores")
    lab.sample_path(cell).unlink()
    assert eval_mi.main(arguments(model, copy)) == 0
    assert np.array_equal(frames_of(lab, cell), before)
    assert sum(scores[name] != when for name, when in files(copy, "scores").items()) <= 2


def test_two_ranks_give_the_table_of_one(copy, model, tmp_path):
    out = tmp_path / "two"
    done = subprocess.run(command(model, out, *FEW, ranks=2), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(files(out, "scores")) == len(files(out, "cells")) == 4 + 4 + 2
    assert eval_mi.main(arguments(model, copy, *FEW)) == 0
    assert_same(table(out), table(copy))


def assert_same(a, b):
    """Equal, but for the last digits: a process with other threads adds in another order."""
    if isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in b:
            assert_same(a[key], b[key])
    elif isinstance(b, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(b, float):
        assert a == pytest.approx(b, abs=2e-3)
    elif not isinstance(b, str) or "against " not in b:
        assert a == b


def test_damaged_files_are_reported_and_made_again(copy, model, capsys):
    before = table(copy)
    lab = eval_mi.Lab(eval_mi.parse(arguments(model, copy)))
    one, two, three = [c for c in lab.cells if c.variant.name == "no-mqk" and c.seed == 0]
    victims = [lab.score_path(one), lab.score_path(two), lab.motion_path(three.clip, "no-mqk", 0)]
    data = bytearray(victims[0].read_bytes())
    data[len(data) // 2] ^= 255                                                    # one byte
    victims[0].write_bytes(data)
    for path in victims[1:]:
        path.write_bytes(path.read_bytes()[:100])                                  # cut off
    lab.sample_path(three).unlink()                                                # asks to train that again
    assert eval_mi.main(arguments(model, copy)) == 0
    said = capsys.readouterr().err
    assert said.count("deleted, to be made again") == 3 and "Traceback" not in said
    assert json.loads((copy / "results.json").read_text())["run"]["computed"] == 3
    assert_same(table(copy), before)


def test_damaged_frames_are_no_end(copy, model, capsys):
    lab = eval_mi.Lab(eval_mi.parse(arguments(model, copy)))
    cell = next(c for c in lab.cells if c.variant.name == "no-mv" and c.seed == 0)
    lab.sample_path(cell).write_bytes(b"")
    assert eval_mi.main(arguments(model, copy, "--report")) == 0                   # the page does without it
    assert eval_mi.main(arguments(model, copy)) == 0
    assert frames_of(lab, cell).any() and capsys.readouterr().err.count("is damaged") == 1


def test_a_lack_of_memory_damages_no_file(copy):
    """What cannot be read for that reason alone stays where it is."""
    def fails(path):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    (copy / "kept.npz").write_bytes(b"whole")
    with pytest.raises(RuntimeError, match="allocate memory"):
        eval_mi.once(copy / "kept.npz", read=fails)
    assert (copy / "kept.npz").read_bytes() == b"whole"


def test_embeddings_that_would_never_act_are_refused(model, tmp_path, capsys):
    assert eval_mi.main(arguments(model, tmp_path, "--sample-steps", "2", "--t-min", "0.6")) == 2
    assert "act from 0.6 T on never" in capsys.readouterr().err and not list(tmp_path.rglob("*.safetensors"))


def test_a_judge_without_a_usable_tokenizer_is_one_line(model, tmp_path, capsys):
    """As it happens with a folder that was copied in part."""
    clip = shutil.copytree(model / "clip", tmp_path / "clip")
    (clip / "vocab.json").unlink()
    (clip / "tokenizer.json").write_text('{"model": {}}')
    assert eval_mi.main(arguments(model, tmp_path / "out", "--clip-model", str(clip))) == 2
    said = capsys.readouterr().err
    assert f"error: {clip}" in said and "Traceback" not in said


def test_a_changed_setting_makes_new_cells_and_keeps_the_old(copy, model):
    old = files(copy)
    assert eval_mi.main(arguments(model, copy, "--guidance", "3", "--variants", "no-mqk,vae")) == 0
    results = json.loads((copy / "results.json").read_text())
    assert results["run"]["computed"] == 6 + 6                                     # full, no-mqk; vae is kept
    assert [r["name"] for r in results["rows"]] == ["full", "no-mqk", "vae"]
    new = files(copy)
    assert all(new[name] == when for name, when in old.items())
    assert len(files(copy, "motions")) == sum(name.startswith("motions") for name in old)
    assert eval_mi.main(arguments(model, copy, "--grid", "9", "--variants", "no-mqk")) == 0
    assert len(files(copy, "cells")) == sum(name.startswith("cells") for name in new)     # another judge only


def test_other_weights_and_other_code_make_new_cells(model, finished, tmp_path, monkeypatch):
    settings = eval_mi.parse(arguments(model, finished))
    cell = eval_mi.Lab(settings).cells[0]
    paths = [eval_mi.Lab(settings).sample_path(cell)]
    other = shutil.copytree(model, tmp_path / "model")
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    paths.append(eval_mi.Lab(eval_mi.parse(arguments(other, finished))).sample_path(cell))
    monkeypatch.setattr(eval_mi, "CODE_VERSION", 0)
    paths.append(eval_mi.Lab(settings).sample_path(cell))
    assert len({p.name for p in paths}) == 3 and paths[0].exists()


def test_every_variant_runs(model, tmp_path, monkeypatch):
    monkeypatch.setitem(eval_mi.TRAININGS, "paper", {"steps": 3, "lr_schedule": "constant"})
    more = ("--clip-count", "1", "--seed-count", "1", "--variants", ",".join(eval_mi.VARIANTS))
    assert eval_mi.main(arguments(model, tmp_path, *more)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["name"] for r in results["rows"]] == list(eval_mi.VARIANTS)
    assert "so few clips say nothing about chance" in (tmp_path / "results.md").read_text("utf-8")
    against = {c["name"]: c["against"] for c in results["comparisons"]}
    assert against.pop("no-mqk-plain") == against.pop("no-mv-plain") == "no-inversion"
    assert {"no-mqk", "base", "no-inversion"} < against.keys() and set(against.values()) == {"full"}
    assert results["comparisons"][0]["metrics"]["motion_fidelity"]["low"] is None  # JSON knows no infinity


# -------------------------------------------------------------------------------------------- User Preference

def write_votes(path, ballot, picks):
    """A file as the page saves it; picks: participant -> the variant chosen everywhere, or None for a
    careless one."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(eval_mi.VOTE_FIELDS)
        for person, pick in picks.items():
            for n, (question, candidates) in enumerate(ballot["questions"].items()):
                choice = next(key for key, variant in candidates.items() if variant == (pick or "base"))
                writer.writerow([ballot["run"], person, n, question, "|".join(candidates), choice])
            for n, (question, check) in enumerate(ballot["checks"].items()):
                wrong = next(key for key in check["candidates"] if key != check["right"])
                writer.writerow([ballot["run"], person, n, question, "|".join(check["candidates"]),
                                 check["right"] if pick else wrong])


def test_a_ballot_from_finished_cells_and_its_votes_without_any(copy, model, tmp_path, monkeypatch, capsys):
    """A page from cells; then votes beside results.json and ballot.json alone, as in a clone."""
    monkeypatch.setattr(mini_mi, "load_models", None)            # finished cells are all it needs
    monkeypatch.setattr(eval_mi, "load_clip", None)
    assert eval_mi.main(arguments(model, copy, "--votes", str(copy / "results.md"))) == 2
    assert "ballot.json cannot be read (No such file" in capsys.readouterr().err
    assert eval_mi.main(arguments(model, copy, "--ballot")) == 0
    assert "6 questions and 2 checks" in capsys.readouterr().out
    page = (copy / "ballot.html").read_text(encoding="utf-8")
    assert not [name for name in ("no-mqk", "no-mv", "drop-") if name in page]
    ballot = json.loads((copy / "ballot.json").read_text())
    ids = [ballot["run"], *ballot["questions"], *ballot["checks"],
           *(key for candidates in ballot["questions"].values() for key in candidates)]
    assert all(re.fullmatch("[rqc][0-9a-f]{12}", key) and key in page for key in ids)
    assert [*ballot["questions"].values()][0].keys().isdisjoint([*ballot["questions"].values()][1])
    assert eval_mi.main(arguments(model, copy, "--ballot")) == 0             # the same again
    assert (copy / "ballot.html").read_text(encoding="utf-8") == page

    picks, clone = {f"p{i}": "full" if i < 4 else "no-mqk" for i in range(6)}, tmp_path / "clone"
    (clone / "votes").mkdir(parents=True)
    for name in ("results.json", "ballot.json"):
        shutil.copy(copy / name, clone)
    write_votes(clone / "votes" / "one.csv", ballot, picks)
    write_votes(clone / "two.csv", ballot, {"careless": None})
    (clone / "other.csv").write_text("a,b\n1,2\n")
    before = json.loads((clone / "results.json").read_text())
    given = [str(clone / name) for name in ("votes", "two.csv", "other.csv")]
    monkeypatch.setattr(eval_mi, "Lab", None)                    # neither clips nor cells
    assert eval_mi.main(["--out", str(clone), "--votes", *given]) == 0
    results = json.loads((clone / "results.json").read_text())
    assert all(results[key] == before[key] for key in before if key not in ("rows", "preference"))
    votes = {r["name"]: r["preference"] for r in results["rows"]}
    assert [votes[n]["share"] for n in ("full", "no-mqk", "no-mv", "base")] == pytest.approx(
        [4 / 6, 2 / 6, 0, 0])
    assert (votes["full"]["n"], votes["full"]["participants"], votes["full"]["chance"]) == (36, 6, 0.25)
    assert votes["drop-mv"] is None
    mean, _, _, p = results["preference"]["tests"]["no-mv"]
    assert (mean, p) == (pytest.approx(4 / 6), 2 * 4 / 2 ** 6)    # four of six people, all of one sign
    text, printed = (clone / "results.md").read_text(encoding="utf-8"), capsys.readouterr().out
    for said in ("1 of 7 participants left out", "other.csv left out", "0.667 (",
                 "User Preference: 36 votes of 6 people, chance 0.250."):
        assert said in text and said in printed
    # The report again, of that file alone: the votes stay.
    assert eval_mi.main(["--out", str(clone), "--report"]) == 0
    assert json.loads((clone / "results.json").read_text()) == results


def test_votes_do_not_take_the_clips_from_a_report(copy, model):
    assert eval_mi.main(arguments(model, copy, "--ballot")) == 0
    before = (copy / "report.html").read_text(encoding="utf-8")
    write_votes(copy / "one.csv", json.loads((copy / "ballot.json").read_text()), {"p1": "full"})
    assert eval_mi.main(["--out", str(copy), "--votes", str(copy / "one.csv")]) == 0
    after = (copy / "report.html").read_text(encoding="utf-8")
    assert "fewer than 5 participants" in after and "fewer than 5" not in before
    assert after.count("data:image") == before.count("data:image") > 20


def test_a_ballot_that_differs_is_refused_and_says_what_it_lacks(copy, model, capsys):
    fewer = arguments(model, copy, "--ballot", "--clip-count", "2")
    assert eval_mi.main(fewer) == 0
    first = (copy / "ballot.html").read_text(encoding="utf-8")
    assert eval_mi.main(arguments(model, copy, "--ballot")) == 2              # other questions: another ballot
    assert "delete it to ask anew" in capsys.readouterr().err
    assert (copy / "ballot.html").read_text(encoding="utf-8") == first
    (copy / "ballot.json").unlink()
    assert eval_mi.main(arguments(model, copy, "--ballot")) == 0
    assert (copy / "ballot.html").read_text(encoding="utf-8") != first
    assert eval_mi.main(arguments(model, copy, "--ballot", "--guidance", "3")) == 2
    assert "finished cell of each of full, no-mqk, no-mv, base" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("more, said", [
    (["--variants", "full,no-such"], "no-such"), (["--clip-count", "0"], "--clip-count"),
    (["--clips", str(ROOT / "data" / "clips"), "--clip-count", "99"], "--clip-count"),
    (["--clips", str(ROOT / "data" / "clips"), "--frames", "40"], "has 16 frames"),
    (["--training-seeds", "0"], "--training-seeds"),
    (["--prompt-count", "9"], "--prompt-count"), (["--size", "64"], "WIDTHxHEIGHT"),
    (["--size", "60x64"], "multiples of 8"), (["--frames", "1"], "--frames"), (["--steps", "0"], "--steps"),
    (["--split", "train"], "--split"), (["--size", "64x32"], "square"), (["--dtype", "int8"], "--dtype"),
    (["--clips", "nowhere"], "nowhere"), (["--model", "nowhere"], "nowhere"),
    (["--clip-model", "nowhere"], "nowhere"), (["--votes", "nowhere"], "no such file"),
    (["--ballot", "--votes", str(ROOT / "README.md")], "one after the other"),
    (["--noise-prior", "2"], "--noise-prior"), (["--no-such-option"], "--no-such-option"),
    (["--tracker", "magic"], "--tracker"), (["--device", "cuda:77"], "cuda"),
    (["--device", "gpu"], "--device"), (["--guidance", "nan"], "--guidance"),
    (["--out", str(ROOT / "README.md")], "--out")])
def test_bad_input_is_one_line_and_status_2(finished, model, capsys, more, said):
    job = [] if "--ballot" in more or "--votes" in more else ["--report"]
    assert eval_mi.main(arguments(model, finished, *job, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and said in error


@pytest.mark.parametrize("index, said", [
    ({"a": {"caption": "a red star", "prompts": []}}, "prompts"), ({"a": {"prompts": ["x"]}}, "caption"),
    ({"a": {"caption": "x", "prompts": "y"}}, "prompts"),
    ({"a": {"caption": "x", "prompts": ["y"]}}, "no such clip"), ({"a": 3}, "caption")])
def test_bad_clips_json(model, tmp_path, capsys, index, said):
    (tmp_path / "clips.json").write_text(json.dumps(index))
    more = ("--clips", str(tmp_path), "--clip-count", "1")
    assert eval_mi.main(arguments(model, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err


def test_the_embedded_world_has_any_number_of_clips(model, tmp_path):
    """The committed clips are the first of the split; the other splits have others."""
    lab = eval_mi.Lab(eval_mi.parse(arguments(model, tmp_path, "--clip-count", "15", "--frames", "16")))
    assert len({c.name for c in lab.clips}) == len({c.digest for c in lab.clips}) == 15
    assert lab.clips[9].caption == world.reference("test", 9)["caption"]
    folder = eval_mi.Lab(eval_mi.parse(arguments(
        model, tmp_path, "--clip-count", "2", "--frames", "16", "--clips", str(ROOT / "data" / "clips"))))
    assert [(c.name, c.digest, c.prompts) for c in folder.clips] == [
        (c.name, c.digest, c.prompts) for c in lab.clips[:2]]
    for split in ("validation", "test2"):
        more = ("--clip-count", "15", "--split", split, "--frames", "16")
        other = eval_mi.Lab(eval_mi.parse(arguments(model, tmp_path, *more)))
        assert not {c.digest for c in other.clips} & {c.digest for c in lab.clips}


def test_thumbnails_and_descriptions_are_no_clips(tmp_path):
    for name in ("dog.webp", "dog.jpg", "dog.png", "dog.description", "dog.srt", "cat.v2.MP4"):
        (tmp_path / name).write_text("what it holds does not matter")
    assert eval_mi.find_clip(tmp_path, "dog").name == eval_mi.find_clip(tmp_path, "dog.webp").name == "dog.webp"
    assert eval_mi.find_clip(tmp_path, "dog.png").name == "dog.png"           # asked for by its full name
    assert eval_mi.find_clip(tmp_path, "cat.v2").name == "cat.v2.MP4"
    (tmp_path / "dog").mkdir()
    with pytest.raises(mini_mi.UserError, match="dog and dog.webp"):
        eval_mi.find_clip(tmp_path, "dog")
    with pytest.raises(mini_mi.UserError, match="no such clip"):
        eval_mi.find_clip(tmp_path, "bird")


def test_clips_in_sub_folders_and_a_byte_order_mark(model, tmp_path):
    """A clip can be named by its path; files of cells lie in one folder a clip all the same."""
    (tmp_path / "dogs" / "young").mkdir(parents=True)
    shutil.copy(ROOT / "data" / "clips" / "spiral.webp", tmp_path / "dogs" / "young" / "rex.webp")
    entry = {"caption": "a red star on a teal plain background",
             "prompts": ["a red circle on a teal plain background"]}
    (tmp_path / "clips.json").write_text(json.dumps({"dogs/young/rex": entry}), encoding="utf-8-sig")
    out = tmp_path / "out"
    more = ("--clips", str(tmp_path), "--clip-count", "1", "--variants", "full", "--seed-count", "1")
    assert eval_mi.main(arguments(model, out, *more)) == 0
    assert json.loads((out / "results.json").read_text())["cells"][0]["clip"] == "dogs/young/rex"
    assert [p.parent.name for p in (out / "cells").rglob("*.npz")] == ["dogs_young_rex"]
    with pytest.raises(mini_mi.UserError, match="no such clip"):
        eval_mi.find_clip(tmp_path, "cats/young/rex")


def test_another_package_called_data_does_not_matter(tmp_path):
    """As a badly packed wheel leaves one in site-packages."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("")
    done = subprocess.run([sys.executable, str(ROOT / "eval_mi.py"), "--help"], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=120)
    assert done.returncode == 0 and "--clip-count" in done.stdout, done.stderr


@pytest.mark.parametrize("cards, local, device", [
    (1, "3", "cuda:0"), (4, "3", "cuda:3"), (4, None, "cuda:0")])
def test_every_process_takes_its_own_card_or_the_only_one(monkeypatch, cards, local, device):
    """SLURM can show each task one card, whatever its LOCAL_RANK is."""
    monkeypatch.setattr(mini_mi, "pick_device", lambda name: "cuda" if name == "auto" else name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert eval_mi.parse([]).device == device


def test_texts_that_the_tiny_world_cannot_show(model, tmp_path, capsys):
    shutil.copy(ROOT / "data" / "clips" / "spiral.webp", tmp_path)
    entry = {"caption": "a dog on a sofa", "prompts": ["a red star on a teal plain background"]}
    (tmp_path / "clips.json").write_text(json.dumps({"spiral": entry}))
    assert eval_mi.main(arguments(
        model, tmp_path / "out", "--clips", str(tmp_path), "--clip-count", "1")) == 2
    assert "a dog on a sofa" in capsys.readouterr().err


def test_report_of_nothing_says_so(model, tmp_path, capsys):
    assert eval_mi.main(arguments(model, tmp_path, "--report")) == 2
    assert "no finished cell" in capsys.readouterr().err


def cells_of(values):
    """Cells as the judges write them; values: variant -> that of clips a and b of one motion, and of c."""
    return [{"variant": name, "clip": clip, "movement": "turn" if clip in "ab" else "fall", "prompt_index": 0,
             "seed": 0, "train_seed": 0, "moving_tracks": 5, "tracks": 9, "cost": {"train_seconds": 1.0},
             "scores": {"motion_fidelity": value, "text_similarity": value, "leakage": -value,
                        "attributes": float(clip != "a")}}
            for name, some in values.items() for clip, value in zip("abc", some)]


def test_the_analysis_by_hand():
    """Three clips of two motions: motions as units, interaction, full against base, the way to the bound."""
    values = {"full": [0.8, 0.6, 0.7], "no-mqk": [0.5, 0.4, 0.4], "no-mv": [0.5, 0.3, 0.5],
              "base": [0.4, 0.2, 0.3], "base-no-inversion": [0.1] * 3, "vae": [1.0, 0.9, 0.8]}
    distance = {"frechet": [0.2, 0.1, 0.3], "frechet_floor": 0.1, "kid": 0.0, "frames": 3,
                "difference": [-0.5, -0.75, -0.25]}
    found = eval_mi.analyse({"cells": cells_of(values), "settings": {"variants": list(values)},
                             "distances": dict.fromkeys(values, distance)})
    compared = {c["name"]: c for c in found["comparisons"]}
    test = found["comparisons"][0]["metrics"]["motion_fidelity"]
    assert test["mean"] == pytest.approx(-(0.3 + 0.2 + 0.3) / 3)
    assert test["by_motion"]["mean"] == pytest.approx(-(0.25 + 0.3) / 2)    # the two of one motion count once
    assert (test["by_motion"]["motions"], test["by_motion"]["same_sign"]) == (2, 2)
    assert "2 motions as units, which the clips repeat: -0.275 (" in eval_mi.sentence(
        {**compared["no-mqk"], "clips": 48})
    (together,), (against,) = eval_mi.interaction(found["cells"]), eval_mi.price(found["comparisons"])
    (way,) = eval_mi.way_to_the_bound(found["rows"])
    # 0.8 - 0.5 - 0.5 + 0.4, 0.6 - 0.4 - 0.3 + 0.2, 0.7 - 0.4 - 0.5 + 0.3
    assert "full - no-mqk - no-mv + base, exploratory): +0.133 (" in together and "parts add up" in together
    assert "Appearance leakage -0.4000" in against and "Motion Fidelity +0.4000" in against
    assert "Fréchet distance +0.5000 (+0.2500 to +0.7500)" in against
    # From 0.1 to 0.9: base at 0.3, full at 0.7, so 0.4 of the 0.6 that base leaves.
    assert way.endswith("base alone closes 0.25 and full 0.75: full closes 0.67 of what base leaves.")
    share = found["rows"][0]["metrics"]["attributes"]
    assert share[0] == pytest.approx(2 / 3) and 0 <= share[1] < 2 / 3 < share[2] <= 1
    assert [found["rows"][0][key] for key in ("moving_tracks", "tracks", "fewest_moving")] == [5, 9, 5]


@pytest.mark.parametrize("folder, shown, outlines, sentences", [
    ("ablation", (183, 192), "–", [                     # "–": its judges did not look at outlines yet
        "motions as units, which the clips repeat: -0.130 (-0.177 to -0.082), 8 of 8 of this sign",
        "motions as units, which the clips repeat: -0.099 (-0.141 to -0.058), 8 of 8 of this sign",
        "+0.079 (+0.040 to +0.118)", "Temporal Consistency -0.0032 (-0.0052 to -0.0012)",
        "base alone closes 0.63 and full 0.82: full closes 0.51 of what base leaves"]),
    ("ablation/tiny16", (88, 96), "0.956 ± 0.022", [
        "motions as units, which the clips repeat: -0.373 (-0.522 to -0.225), 8 of 8 of this sign",
        "motions as units, which the clips repeat: -0.365 (-0.510 to -0.219), 8 of 8 of this sign",
        "+0.362 (+0.272 to +0.453)", "Temporal Consistency -0.0142 (-0.0209 to -0.0076)",
        "base alone closes 0.20 and full 0.72: full closes 0.64 of what base leaves"])])
def test_a_published_run_is_analysed_again_from_its_file(tmp_path, folder, shown, outlines, sentences):
    """Every number and sentence of data/ablation comes from its cells, without pixels."""
    published = ROOT / "data" / folder
    shutil.copy(published / "results.json", tmp_path)
    assert eval_mi.main(["--report", "--out", str(tmp_path)]) == 0
    for name in ("results.json", "results.md", "results.svg"):
        assert (tmp_path / name).read_text("utf-8") == (published / name).read_text("utf-8"), name
    text = (tmp_path / "results.md").read_text("utf-8")
    assert all(said in text for said in sentences)
    full = [c["scores"] for c in json.loads((published / "results.json").read_text())["cells"]
            if c["variant"] == "full"]
    assert (sum(scores["attributes"] for scores in full), len(full)) == shown
    details = [line.split(" | ") for line in text.splitlines()
               if " training s " in line or f"| full | {16 * len(full)}" in line]
    assert dict(zip(*details))["Shape in frames ↑"] == outlines


def test_sentences_say_what_the_numbers_say():
    def test(mean, half, p, **more):
        return {"mean": mean, "low": mean - half, "high": mean + half, "p": p, "detectable": 0.05, **more}

    def said(a, b):
        return eval_mi.sentence({"name": "no-mv", "against": "full", "clips": 10, "metrics": {
            "motion_fidelity": a, "text_similarity": b}})

    text = said(test(-0.2, 0.1, 0.004, p_holm=0.016), test(0.01, 0.02, 0.4, p_holm=0.8))
    assert "Motion Fidelity fell by 0.200 (95 % interval -0.300 to -0.100; p = 0.016, after Holm)" in text
    assert "No change of Text Similarity was detected" in text and "0.050 would have shown" in text
    # The test decides and not the interval: eleven clips a little up and one far up, or the other way round.
    assert "Motion Fidelity fell by 0.200" in said(test(-0.2, 0.3, 0.001, p_holm=0.002), test(0, 0.1, 1))
    text = said(test(-0.2, 0.19, 0.03, p_holm=0.12), test(0, 0.1, 1))
    assert "No change of Motion Fidelity was detected: it fell by 0.200" in text
    # Six clips of one sign: p = 0.031, times four.
    assert eval_mi.sentence({
        "name": "no-mv", "against": "full", "clips": 6,
        "metrics": dict.fromkeys(eval_mi.PRIMARY, test(0.1, 0.2, 0.03, p_holm=0.12))}) == (
        "no-mv against full, 6 clips: Motion Fidelity rose by 0.100, but so few clips say nothing about chance. "
        "Text Similarity rose by 0.100, but so few clips say nothing about chance.")
