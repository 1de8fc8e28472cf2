"""eval_mi.py from end to end, on a model of random weights that is small enough for seconds."""
import csv
import json
import math
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import eval_mi
import mini_mi
from conftest import ROOT, train_bpe, write_model, write_tokenizer
from data import world

UNET = dict(down_block_types=["CrossAttnDownBlock3D", "DownBlock3D"],
            up_block_types=["UpBlock3D", "CrossAttnUpBlock3D"], block_out_channels=[8, 16], layers_per_block=1,
            cross_attention_dim=32, attention_head_dim=8, norm_num_groups=4)
TOWER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
# 3 clips, 1 prompt, 2 seeds: 8 variants x 6, reconstruct 6, vae 3, and full once more on 2 clips x 2 seeds.
CELLS = 8 * 6 + 6 + 3 + 4
SMALL = ["--clip-count", "3", "--prompt-count", "1", "--seed-count", "2", "--steps", "2", "--sample-steps", "2",
         "--invert-steps", "2", "--together", "2", "--frames", "4", "--size", "64x64", "--guidance", "2",
         "--grid", "8", "--device", "cpu", "--lr", "0.5", "--batch", "1"]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model folder in the layout of data/tiny: with a CLIP of its own."""
    folder = write_model(tmp_path_factory.mktemp("models") / "eval", unet=UNET)
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


def cells(out):
    return {p.name: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}


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


# ------------------------------------------------------------------------------------------------- the whole run

def test_a_run_counts_every_cell_once(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["finished"] == results["planned"] == results["run"]["computed"] == CELLS
    keys = [(c["variant"], c["clip"], c["place"], c["seed"], c["train_seed"]) for c in results["cells"]]
    assert len(set(keys)) == CELLS
    rows = {r["name"]: r for r in results["rows"]}
    assert list(rows) == list(eval_mi.DEFAULT_VARIANTS)
    assert (rows["full"]["n"], rows["reconstruct"]["n"], rows["vae"]["n"]) == (6, 6, 3)
    assert all(r["clips"] == 3 and set(r["metrics"]) == set(eval_mi.METRICS) for r in rows.values())
    assert rows["full"]["cost"]["parameters"] == rows["no-mqk"]["cost"]["parameters"] + rows["no-mv"]["cost"][
        "parameters"] and rows["base"]["cost"]["parameters"] == 0
    holm = [(c["name"], m) for c in results["comparisons"] for m, t in c["metrics"].items() if "p_holm" in t]
    assert holm == [(v, m) for v in ("no-mqk", "no-mv") for m in ("text_similarity", "motion_fidelity")]
    assert results["settings"]["steps"] == 2 and results["run"]["versions"]["torch"] == torch.__version__


def test_the_variants_do_what_they_say(finished, model):
    """Videos of paired cells start alike and differ where the variant says; reconstruct asks for the caption."""
    settings = eval_mi.parse(arguments(model, finished))
    lab = eval_mi.Lab(settings)
    video = {(c.variant.name, c.clip.name, c.seed): lab.store.read("video", lab.video_key(c))[1]["frames"]
             for c in lab.cells if c.train_seed == 0}
    name = lab.clips[0].name
    for other in ("no-mqk", "no-mv", "drop-mqk", "drop-mv", "debias-none", "base", "base-no-inversion"):
        assert not np.array_equal(video["full", name, 0], video[other, name, 0]), other
    assert not np.array_equal(video["full", name, 0], video["full", name, 1])
    assert video["full", name, 0].shape == (4, 64, 64, 3)
    assert {c.prompt for c in lab.cells if c.variant.own_prompt} == {c.caption for c in lab.clips}


def test_a_variant_equals_mini_mi_by_hand(finished, model):
    """The embeddings of a cell are what train_motion gives, and its frames what sample gives."""
    lab = eval_mi.Lab(eval_mi.parse(arguments(model, finished)))
    clip, variant = lab.clips[2], eval_mi.VARIANTS["no-mv"]      # the last clip trains alone, `--together 2`
    latents = mini_mi.encode_video(lab.models, mini_mi.to_model_range(clip.frames))
    text = mini_mi.encode_prompt(lab.models, [clip.caption])
    motion = mini_mi.train_motion(lab.models, latents, text, steps=2, lr=0.5, progress=False, use_mv=False)
    kept = lab.store.read("motion", lab.motion_key(clip, variant, 0))[1]
    assert set(kept) == set(motion.state_dict()) and all(key.endswith("pos_embed") for key in kept)
    assert all(np.allclose(kept[k], v, atol=1e-5) for k, v in motion.state_dict().items())
    cell = next(c for c in lab.cells if c.variant is variant and c.clip is clip and c.seed == 1)
    (again,), _ = lab.generate([cell], motion, latents[0], lab.prepare([clip])[1][0])
    frames = lab.store.read("video", lab.video_key(cell))[1]["frames"]
    assert np.abs(again.astype(int) - frames).max() <= 1


def test_the_report_is_rebuilt_from_cells_alone(copy, finished, model, monkeypatch, capsys):
    before, files = table(copy), cells(copy)
    monkeypatch.setattr(mini_mi, "load_models", None)            # no UNet is needed
    assert eval_mi.main(arguments(model, copy, "--report")) == 0
    assert table(copy) == before and cells(copy) == files
    run = [json.loads((folder / "results.json").read_text())["run"] for folder in (copy, finished)]
    assert run[0] == run[1]                                      # still the numbers of the run that made them
    assert "full" in capsys.readouterr().out


def test_a_report_while_variants_have_no_sample_in_common(copy, model):
    """As after a killed run on several ranks: `full` has one clip, `no-mqk` the others."""
    lab = eval_mi.Lab(eval_mi.parse(arguments(model, copy)))
    first = lab.clips[0].name
    for cell in lab.cells:
        if cell.variant.name == "full" and cell.clip.name != first or (
                cell.variant.name == "no-mqk" and cell.clip.name == first):
            lab.store.path("score", lab.score_key(cell)).unlink()
    assert eval_mi.main(arguments(model, copy, "--report")) == 0
    names = [c["name"] for c in json.loads((copy / "results.json").read_text())["comparisons"]]
    assert "no-mqk" not in names and "no-mv" in names


@pytest.mark.parametrize("more, said", [
    (["--sample-steps", "1000"], "sampling steps"), (["--votes", "nowhere"], "nowhere")])
def test_what_cannot_work_shows_before_the_first_training(model, tmp_path, capsys, monkeypatch, more, said):
    monkeypatch.setattr(mini_mi, "train_motion", None)
    assert eval_mi.main(arguments(model, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err


def test_cotracker_is_fetched_once_and_asked_clip_by_clip(monkeypatch):
    """The network's call is (1,F,3,h,w) in 0..255 with grid_size -> (1,F,n,2), (1,F,n)."""
    calls, fetched = [], []

    class Network(torch.nn.Module):
        def forward(self, video, grid_size):
            calls.append((tuple(video.shape), float(video.max())))
            points = torch.arange(grid_size ** 2 * 2.0).view(1, 1, -1, 2) + torch.arange(5.0).view(1, 5, 1, 1)
            return points, points[..., 0] > 0

    monkeypatch.setattr(torch.hub, "load", lambda *args, **options: fetched.append(args) or Network())
    eval_mi.cotracker_model.cache_clear()
    video = torch.full((2, 5, 16, 24, 3), 255, dtype=torch.uint8)
    for _ in range(2):
        tracks, visible = eval_mi.cotracker(video, 3)
    assert calls == [((1, 5, 3, 16, 24), 255.0)] * 4 and len(fetched) == 1
    assert tracks.shape == (2, 9, 5, 2) and visible.shape == (2, 9, 5)
    assert (tracks[:, :, 1:] - tracks[:, :, :-1] == 1).all() and visible[:, 0, 0].logical_not().all()

    def offline(*args, **options):
        raise RuntimeError("It looks like there is no internet connection")

    monkeypatch.setattr(torch.hub, "load", offline)
    eval_mi.cotracker_model.cache_clear()
    with pytest.raises(mini_mi.UserError, match="CoTracker .*lk"):
        eval_mi.cotracker(video, 3)


def test_report_html_is_one_self_contained_page(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page
    assert page.count('<div class="clip reference"') == 2 * 3 and page.count("<svg") == 6
    assert page.count('class="pixels"') == 2 + 2 * 4             # attention maps; MV per frame, twice
    for name in eval_mi.DEFAULT_VARIANTS:
        assert f'aria-label="{name}"' in page and f">{name}<" in page
    text = (finished / "results.md").read_text(encoding="utf-8")
    assert text.count("| full |") == 2 and "no-mqk against full, 3 clips" in text


# ------------------------------------------------------------------------------ interrupted, damaged, shared, changed

def test_an_interrupted_run_goes_on_and_equals_one_that_was_not(finished, model, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(command(model, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "cells").exists() or len(list((out / "cells").glob("score-*"))) < 12:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {name: when for name, when in cells(out).items() if name.endswith(".npz")}
    scores = sum(name.startswith("score") for name in kept)
    assert 12 <= scores < CELLS and not (out / "results.json").exists()
    assert eval_mi.main(arguments(model, out)) == 0
    assert json.loads((out / "results.json").read_text())["run"]["computed"] == CELLS - scores
    after = cells(out)
    assert all(after[name] == when for name, when in kept.items())                 # nothing was computed again
    assert_same(table(out), table(finished))


def test_two_ranks_give_the_table_of_one(finished, model, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(command(model, out, ranks=2), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert sum(name.startswith("score") for name in cells(out)) == CELLS
    assert_same(table(out), table(finished))


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
    elif not isinstance(b, str) or "against full" not in b:
        assert a == b


def test_units_cover_the_plan_once_and_are_shared_evenly():
    clips = [eval_mi.Clip(f"clip{i}", np.zeros(1), "", "", ("a", "b")) for i in range(10)]
    settings = eval_mi.parse([])
    plan = eval_mi.plan(settings, clips)
    work = eval_mi.units(settings, plan)
    hands = eval_mi.share(work, settings, 3)
    assert sorted(map(id, plan)) == sorted(id(c) for hand in hands for unit in hand for c in unit.cells)
    assert all(len(unit.clips) <= settings.together for unit in work)
    loads = [sum(unit.cost(settings) for unit in hand) for hand in hands]
    assert max(loads) < 1.5 * min(loads)
    assert eval_mi.share(work, settings, 3)[1] == hands[1]                         # every rank sees the same


def test_a_damaged_cell_is_set_aside_reported_and_computed_again(copy, model, capsys):
    before = table(copy)
    victims = [sorted((copy / "cells").glob(f"{kind}-*.npz"))[0] for kind in ("score", "score", "motion")]
    victims[1] = sorted((copy / "cells").glob("score-*.npz"))[1]
    data = bytearray(victims[0].read_bytes())
    data[len(data) // 2] ^= 255                                                    # one byte
    victims[0].write_bytes(data)
    victims[1].write_bytes(victims[1].read_bytes()[:100])                          # cut off
    victims[2].write_bytes(b"")
    assert eval_mi.main(arguments(model, copy)) == 0
    said = capsys.readouterr().err
    assert said.count("is damaged") >= 2 and "Traceback" not in said
    assert all(v.with_suffix(".corrupt").exists() for v in victims[:2])
    assert json.loads((copy / "results.json").read_text())["run"]["computed"] == 2
    assert_same(table(copy), before)


def test_a_changed_setting_makes_new_cells_and_keeps_the_old(copy, model):
    old = cells(copy)
    assert eval_mi.main(arguments(model, copy, "--guidance", "3", "--variants", "no-mqk,vae")) == 0
    results = json.loads((copy / "results.json").read_text())
    assert results["run"]["computed"] == 6 + 6 + 4                                 # full, no-mqk, again; vae is kept
    assert [r["name"] for r in results["rows"]] == ["full", "no-mqk", "vae"]
    new = cells(copy)
    assert all(new[name] == when for name, when in old.items())
    assert sum(name.startswith("motion") for name in new) == sum(name.startswith("motion") for name in old)
    assert eval_mi.main(arguments(model, copy, "--grid", "9", "--variants", "no-mqk")) == 0
    newest = cells(copy)                                                           # another judge, the same videos
    assert sum(name.startswith("video") for name in newest) == sum(name.startswith("video") for name in new)


def test_every_variant_runs(model, tmp_path):
    more = ("--clip-count", "1", "--seed-count", "1", "--variants", ",".join(eval_mi.VARIANTS))
    assert eval_mi.main(arguments(model, tmp_path, *more)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["name"] for r in results["rows"]] == list(eval_mi.VARIANTS)
    assert "one clip says nothing about chance" in results["sentences"][0]
    assert results["comparisons"][0]["metrics"]["motion_fidelity"]["low"] is None  # JSON knows no infinity


# ------------------------------------------------------------------------------------------------ User Preference

def test_votes_round_trip(tmp_path, copy, model):
    path = tmp_path / "votes.csv"
    votes = [{"participant": f"p{i}", "scene": "spiral/0/0", "options": "base|full|no-mqk", "check": "",
              "choice": "full" if i < 6 else "no-mqk"} for i in range(9)]
    careless = [{"participant": "p9", "scene": "check", "options": "base|full", "check": "full", "choice": "base"},
                {"participant": "p9", "scene": "spiral/0/0", "options": "base|full", "check": "", "choice": "base"}]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, eval_mi.VOTE_FIELDS)
        writer.writeheader()
        writer.writerows(votes + careless)
    assert eval_mi.read_votes(path) == votes + careless
    found = eval_mi.preference(votes + careless, ["full", "base", "no-mqk", "no-mv"])
    assert (found["full"]["share"], found["full"]["votes"], found["full"]["people"]) == (pytest.approx(2 / 3), 9, 9)
    assert (found["full"]["low"], found["full"]["chance"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    # All agree: the bootstrap has no width, Wilson's interval has.
    alike = eval_mi.preference(votes[:6], ["full", "base"])
    assert (alike["full"]["low"], alike["full"]["high"]) == eval_mi.wilson_interval(6, 6) != (1, 1)
    assert found["base"]["share"] == 0 and "no-mv" not in found
    assert eval_mi.main(arguments(model, copy, "--report", "--votes", str(path))) == 0
    rows = {r["name"]: r["preference"] for r in json.loads((copy / "results.json").read_text())["rows"]}
    assert rows["full"]["share"] == pytest.approx(2 / 3) and rows["no-mv"] is None
    line = next(x for x in (copy / "results.md").read_text().splitlines() if x.startswith("| full |"))
    assert "0.667 (0.333 to 1.000)" in line
    assert "User Preference of full: 9 votes of 9 people; chance 0.333." in (copy / "results.md").read_text()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())           # as spreadsheets save it
    assert eval_mi.read_votes(path) == votes + careless


# ------------------------------------------------------------------------------------------------------ bad input

@pytest.mark.parametrize("more, said", [
    (["--variants", "full,no-such"], "no-such"), (["--clip-count", "99"], "--clip-count"),
    (["--prompt-count", "9"], "--prompt-count"), (["--size", "64"], "WIDTHxHEIGHT"),
    (["--size", "60x64"], "multiples of 8"), (["--frames", "1"], "--frames"), (["--steps", "0"], "--steps"),
    (["--frames", "40"], "has 16 frames"), (["--dtype", "int8"], "--dtype"), (["--clips", "nowhere"], "nowhere"),
    (["--model", "nowhere"], "nowhere"), (["--clip", "nowhere"], "nowhere"), (["--votes", "nowhere"], "nowhere"),
    (["--noise-prior", "2"], "--noise-prior"), (["--no-such-option"], "--no-such-option"),
    (["--tracker", "magic"], "--tracker"), (["--device", "cuda:77"], "cuda"), (["--device", "gpu"], "--device"),
    (["--guidance", "nan"], "--guidance"), (["--dtype", "float16"], "--together 1"),
    (["--out", str(ROOT / "README.md")], "--out")])
def test_bad_input_is_one_line_and_status_2(finished, model, capsys, more, said):
    assert eval_mi.main(arguments(model, finished, "--report", *more)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and said in error


@pytest.mark.parametrize("content, said", [
    (b"participant,choice\np,full\n", "columns"), (b"\xff\xfe\x00", "cannot be read"),
    (b"participant,scene,options,choice,check\np,s,full|base,vae,\n", "line 2: 'vae'"),
    (b"participant,scene,options,choice,check\np,s,full|base\n", "columns"),
    (b"participant,scene,options,choice,check\np,s,full|base,full,vae\n", "line 2: check 'vae'"),
    (b"participant,scene,options,choice,check\n", "no vote")])
def test_bad_votes(tmp_path, content, said):
    (tmp_path / "votes.csv").write_bytes(content)
    with pytest.raises(mini_mi.UserError, match=said):
        eval_mi.read_votes(tmp_path / "votes.csv")


@pytest.mark.parametrize("index, said", [
    ({"a": {"caption": "a red star", "prompts": []}}, "prompts"), ({"a": {"prompts": ["x"]}}, "caption"),
    ({"a": {"caption": "x", "prompts": "y"}}, "prompts"), ({"a": {"caption": "x", "prompts": ["y"]}}, "no such clip"), ({"a": 3}, "caption")])
def test_bad_clips_json(model, tmp_path, capsys, index, said):
    (tmp_path / "clips.json").write_text(json.dumps(index))
    more = ("--clips", str(tmp_path), "--clip-count", "1")
    assert eval_mi.main(arguments(model, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err


def test_texts_that_the_tiny_world_cannot_show(model, tmp_path, capsys):
    shutil.copy(ROOT / "data" / "clips" / "spiral.webp", tmp_path)
    entry = {"caption": "a dog on a sofa", "prompts": ["a red star on a teal plain background"]}
    (tmp_path / "clips.json").write_text(json.dumps({"spiral": entry}))
    assert eval_mi.main(arguments(model, tmp_path / "out", "--clips", str(tmp_path), "--clip-count", "1")) == 2
    assert "a dog on a sofa" in capsys.readouterr().err


def test_report_of_nothing_says_so(model, tmp_path, capsys):
    assert eval_mi.main(arguments(model, tmp_path, "--report")) == 2
    assert "no finished cell" in capsys.readouterr().err


def test_sentences_say_what_the_numbers_say():
    def test(mean, half, p, **more):
        return {"mean": mean, "low": mean - half, "high": mean + half, "p": p, "detectable": 0.05, **more}

    def said(a, b):
        return eval_mi.sentence({"name": "no-mv", "clips": 10, "metrics": {
            "motion_fidelity": a, "text_similarity": b}})

    text = said(test(-0.2, 0.1, 0.004, p_holm=0.016), test(0.01, 0.02, 0.4, p_holm=0.8))
    assert "Motion Fidelity fell by 0.200 (95 % interval -0.300 to -0.100; p = 0.016, after Holm)" in text
    assert "No change of Text Similarity was detected" in text and "0.050 would have shown" in text
    # The test decides and not the interval: eleven clips a little up and one far up.
    assert "fell by 0.200" in said(test(-0.2, 0.3, 0.001, p_holm=0.002), test(0, 0.1, 1))
    assert "so few clips" in eval_mi.sentence({"name": "no-mv", "clips": 6, "metrics": dict.fromkeys(
        eval_mi.PRIMARY, test(0.1, 0.2, 0.03, p_holm=0.12))})
    assert "hint" in said(test(-0.2, 0.19, 0.03, p_holm=0.12), test(0, 0.1, 1))
    assert "nothing about chance" in said(test(0.1, math.inf, 1), test(0.1, math.inf, 1))
