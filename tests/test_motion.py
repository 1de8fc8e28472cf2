"""The paper's part: motion embeddings, held against the authors' code, by hand and by promise."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import torch
from conftest import ROOT, UNET, hollow, randomise, relative

import mini_mi

GOLDEN = np.load(Path(__file__).parent / "golden" / "official_motion.npz")
META = json.loads(str(GOLDEN["meta"]))
BLOCK = "down_blocks.0.temp_attentions.0.transformer_blocks.0"
BOTH = dict(UNET, down_block_types=["CrossAttnDownBlock3D"] * 2, up_block_types=["CrossAttnUpBlock3D"] * 2)


def golden_case(det):
    """The UNet of the golden file, the embeddings as the authors' dict, x, text, t."""
    unet = mini_mi.UNet3DConditionModel(META["config"]).eval().requires_grad_(False)
    state = unet.state_dict()
    assert len(state) == META["n_keys"]
    for j, key in enumerate(sorted(state)):
        value = det(state[key].shape, j)
        if value.dim() > 1:
            value *= (3 / value[0].numel()) ** 0.5
        else:
            value = 0.1 * value + key.endswith("weight")
        state[key].copy_(value)
    embeddings = {key: det(META["embedding_shapes"][key], 5000 + j)
                  for j, key in enumerate(sorted(META["embedding_shapes"]))}
    shape = (1, 4, META["F"], META["H"], META["W"])
    text = det((1, META["text_len"], META["config"]["cross_attention_dim"]), 9002)
    return unet, embeddings, 1.7 * det(shape, 9001), text, META["timestep"]


@pytest.fixture(scope="module")
def golden(det, tmp_path_factory):
    """`golden_case` with the embeddings loaded from a motion_embed.pt as the authors write it."""
    unet, embeddings, x, text, t = golden_case(det)
    path = tmp_path_factory.mktemp("golden") / "motion_embed.pt"
    torch.save(embeddings, path)
    return unet, path, x, text, t


@pytest.mark.parametrize("mode", ["none", "train", "debias", "camera"])
def test_outputs_of_the_authors_code(golden, mode):
    """No embeddings; raw as in training; debiased; MV dropped."""
    unet, path, x, text, t = golden
    motion = mini_mi.MotionEmbeddings.load(path)
    motion.train(mode == "train")
    motion.use_mv = mode != "camera"
    out = unet(x, t, text, None if mode == "none" else motion)
    assert relative(out, torch.from_numpy(GOLDEN[mode])) < 1e-4
    if mode != "none":
        assert relative(out, torch.from_numpy(GOLDEN["none"])) > 1e-3  # the embeddings do something


def test_loss_and_gradients_of_the_authors_code(golden, det):
    """Gradients reach the embeddings and nothing else; only the first F of the 32 slots get any."""
    unet, path, x, text, t = golden
    motion = mini_mi.MotionEmbeddings.load(path).train()
    loss = (unet(x, t, text, motion) - det(x.shape, 9003)).square().mean()
    assert abs(loss.item() / META["loss"] - 1) < 1e-4
    loss.backward()
    gradients = {key: p.grad for key, p in motion.named_parameters()}
    assert gradients.keys() == META["grad_norms"].keys()
    for key, norm in META["grad_norms"].items():
        assert abs(gradients[key].norm().item() / norm - 1) < 1e-4, key
        assert (gradients[key][:, META["F"]:] == 0).all()
    assert all(p.grad is None for p in unet.parameters())


@pytest.fixture(scope="module")
def unet():
    """A small UNet with attention on its finer level only."""
    torch.manual_seed(0)
    return randomise(mini_mi.UNet3DConditionModel(UNET), 1, 0.05).eval().requires_grad_(False)


def parts_at(motion, block, which, frames, grid):
    """m_qk, m_v for an attention that reads that many frames on that grid."""
    return motion.at(block, which, grid, torch.empty(1, grid[0] * grid[1], frames, 1))


def inputs(batch=1, frames=4, height=4, width=4):
    torch.manual_seed(7)
    x, t = torch.randn(batch, 4, frames, height, width), torch.randint(0, 1000, (batch,))
    return x, t, torch.randn(batch, 5, 32)


def make(frames=4, height=4, width=4, config=UNET, **settings):
    """Embeddings that are not zero."""
    return randomise(mini_mi.MotionEmbeddings(hollow(config), frames, height, width, **settings), 3, 0.5).eval()


# Eq. 3

@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{}, dict(mqk_dims=2, mv_dims=1), dict(use_mv=False)])
def test_zero_embeddings_are_the_plain_unet_bit_for_bit(unet, settings, training):
    """Training starts from the model as it is."""
    x, t, text = inputs(batch=2)
    motion = mini_mi.MotionEmbeddings(hollow(UNET), 4, 4, 4, **settings).train(training)
    assert all((p == 0).all() for p in motion.parameters())
    assert torch.equal(unet(x, t, text, motion), unet(x, t, text))


def test_one_block_by_hand():
    """Eq. 3 written out for both attentions: MQK into queries and keys, MV into values, on the norm."""
    torch.manual_seed(0)
    frames, height, width, channels, heads = 5, 2, 3, 32, 4
    block = randomise(mini_mi.TemporalTransformerBlock(channels, heads, SimpleNamespace(attention_head_dim=8)))
    block.name = BLOCK
    motion = make(frames, height, width).train()
    x = torch.randn(2, height * width, frames, channels)

    def attention(layer, h, m_qk, m_v):
        split = [f(y).view(*h.shape[:3], heads, 8).transpose(2, 3)
                 for f, y in ((layer.to_q, h + m_qk), (layer.to_k, h + m_qk), (layer.to_v, h + m_v))]
        q, k, v = split
        return layer.to_out[0](((q @ k.mT / 8 ** 0.5).softmax(-1) @ v).transpose(2, 3).flatten(3))

    state = motion.state_dict()
    m_qk = state[f"{BLOCK}.pos_embed"]
    h = x
    for n in (1, 2):
        m_v = state[f"{BLOCK}.attn{n}.vSpatial"]
        norm, layer = getattr(block, f"norm{n}"), getattr(block, f"attn{n}")
        h = h + attention(layer, norm(h), m_qk, m_v)
    h = h + block.ff(block.norm3(h))
    assert relative(block(x, (height, width), motion), h) < 1e-5
    assert relative(block(x, (height, width)), h) > 0.01


def test_mqk_is_shared_and_mv_is_not(unet):
    """One MQK per block serves attn1 and attn2; each attention has its own MV."""
    motion = make()
    for part in ("attn1", "attn2"):
        m_qk, m_v = parts_at(motion, BLOCK, part, 4, (4, 4))
        assert torch.equal(m_qk, motion.state_dict()[f"{BLOCK}.pos_embed"])
        assert torch.equal(m_v, mini_mi.debias(motion.state_dict()[f"{BLOCK}.{part}.vSpatial"], "diff"))
    keys = [key.removeprefix(f"{BLOCK}.") for key in motion.state_dict() if key.startswith(BLOCK)]
    assert sorted(keys) == ["attn1.vSpatial", "attn2.vSpatial", "pos_embed"]
    # With the output of one attention silenced, MQK still acts through the other.
    x, t, text = inputs()
    motion.use_mv = False
    block = unet.get_submodule(BLOCK)
    for silent in (block.attn1, block.attn2):
        weight, bias = silent.to_out[0].weight.clone(), silent.to_out[0].bias.clone()
        try:
            silent.to_out[0].weight.zero_(), silent.to_out[0].bias.zero_()
            assert relative(unet(x, t, text, motion), unet(x, t, text)) > 1e-4
        finally:
            silent.to_out[0].weight.copy_(weight), silent.to_out[0].bias.copy_(bias)


# Eq. 5

def test_debias_by_hand():
    """Three frames, two channels."""
    m_v = torch.tensor([[[1.0, 10.0], [3.0, 7.0], [8.0, 7.0]]])
    assert mini_mi.debias(m_v, "diff").tolist() == [[[1.0, 10.0], [2.0, -3.0], [5.0, 0.0]]]
    assert mini_mi.debias(m_v, "mean").tolist() == [[[-3.0, 2.0], [-1.0, -1.0], [4.0, -1.0]]]
    assert torch.equal(mini_mi.debias(m_v, "none"), m_v)
    assert torch.equal(mini_mi.debias(m_v[:, :1], "diff"), m_v[:, :1])  # a single frame
    with pytest.raises(mini_mi.UserError, match="diff, mean or none"):
        mini_mi.debias(m_v, "median")


def test_a_static_offset_acts_on_the_first_frame_alone():
    """What is equal in all frames is appearance, and cancels."""
    m_v = torch.randn(6, 4, 8)
    shifted = mini_mi.debias(m_v + torch.randn(6, 1, 8), "diff") - mini_mi.debias(m_v, "diff")
    assert shifted[:, 1:].abs().max() < 1e-5 < shifted[:, 0].abs().max()
    shifted = mini_mi.debias(m_v + torch.randn(6, 1, 8), "mean") - mini_mi.debias(m_v, "mean")
    assert shifted.abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["diff", "mean", "none"])
def test_debias_is_for_inference_unless_it_is_wanted_in_training(mode):
    """`.train()` adds raw MV, `.eval()` debiased MV; MQK is never debiased."""
    motion = make(debias=mode)
    raw = motion.state_dict()[f"{BLOCK}.attn1.vSpatial"]
    for training, in_training in ((True, False), (True, True), (False, False), (False, True)):
        motion.train(training)
        motion.debias_in_training = in_training
        m_qk, m_v = parts_at(motion, BLOCK, "attn1", 4, (4, 4))
        assert torch.equal(m_v, raw if training and not in_training else mini_mi.debias(raw, mode))
        assert torch.equal(m_qk, motion.state_dict()[f"{BLOCK}.pos_embed"])


# Parts, shapes, levels

@pytest.mark.parametrize("settings, shapes", [
    ({}, {"pos_embed": (1, 4, 32), "attn1.vSpatial": (20, 4, 32), "attn2.vSpatial": (20, 4, 32)}),
    (dict(mqk_dims=2, mv_dims=1),
     {"pos_embed": (20, 4, 32), "attn1.vSpatial": (1, 4, 32), "attn2.vSpatial": (1, 4, 32)}),
    (dict(mqk_dims=2), {"pos_embed": (20, 4, 32), "attn1.vSpatial": (20, 4, 32),
                        "attn2.vSpatial": (20, 4, 32)}),
    (dict(use_mqk=False), {"attn1.vSpatial": (20, 4, 32), "attn2.vSpatial": (20, 4, 32)}),
    (dict(use_mv=False), {"pos_embed": (1, 4, 32)}),
    (dict(use_mv=False, mqk_dims=2), {"pos_embed": (20, 4, 32)})])
def test_shapes_and_ablations(unet, tmp_path, settings, shapes):
    """A part that is left out has no parameters, no keys, and no effect; every shape runs and comes back."""
    motion = make(4, 4, 5, **settings)
    blocks = [BLOCK, *(f"up_blocks.1.temp_attentions.{i}.transformer_blocks.0" for i in (0, 1))]
    assert {k: tuple(v.shape) for k, v in motion.state_dict().items()} == {
        f"{block}.{part}": shape for block in blocks for part, shape in shapes.items()}
    x, t, text = inputs(width=5)
    out = unet(x, t, text, motion)
    assert relative(out, unet(x, t, text)) > 1e-3
    motion.save(tmp_path / "m.safetensors")
    again = mini_mi.MotionEmbeddings.load(tmp_path / "m.safetensors")
    assert (again.use_mqk, again.use_mv) == (settings.get("use_mqk", True), settings.get("use_mv", True))
    assert torch.equal(unet(x, t, text, again), out)


def test_nothing_to_train_is_refused():
    with pytest.raises(mini_mi.UserError, match="nothing is left"):
        mini_mi.MotionEmbeddings(hollow(UNET), 4, 4, 4, use_mqk=False, use_mv=False)


def test_a_mapping_with_the_authors_keys():
    """What torch does with parameters works with keys that have dots; other embeddings are refused."""
    motion, other = make(), mini_mi.MotionEmbeddings(hollow(UNET), 4, 4, 4)
    assert [name for name, _ in motion.named_parameters()] == list(motion.state_dict())
    other.load_state_dict(motion.state_dict())
    assert all(torch.equal(other.get_parameter(key), value) for key, value in copy.deepcopy(motion).state_dict().items())
    assert {p.dtype for p in other.to(torch.float64).parameters()} == {torch.float64}
    for config in (dict(use_mv=False), dict(mv_dims=1), dict(mqk_dims=2)):
        with pytest.raises((mini_mi.UserError, RuntimeError)):
            other.load_state_dict(make(**config).state_dict())


def test_the_paper_comes_first():
    """A reader meets the whole method before any part of the frozen model or of the plumbing."""
    lines = (ROOT / "mini_mi.py").read_text(encoding="utf-8").split("\n")
    banner = {name: next(n for n, line in enumerate(lines, 1) if line.startswith(f"#   {name}: "))
              for name in ("THE PAPER", "LEARN IT", "USE IT", "THE HYBRID LOSS", "THE FROZEN MODEL",
                           "PLUMBING")}
    assert list(banner.values()) == sorted(banner.values())
    assert banner["LEARN IT"] < 250 and banner["THE HYBRID LOSS"] < 460
    before = [line for line in lines[:banner["THE PAPER"]] if line.startswith(("class ", "def "))]
    assert before == ["class UserError(ValueError):"]
    paper = "\n".join(lines[banner["THE PAPER"]:banner["LEARN IT"]])
    for words in ("def debias(", "class TemporalTransformerBlock(", "class MotionEmbeddings(", "f + m_qk",
                  "f + m_v", "(Eq. 3)", "(Eq. 5)"):
        assert words in paper


def test_levels():
    """Default: the deepest level with attention, on the way down and up; grids of odd sizes round up."""
    with torch.device("meta"):
        motion = mini_mi.MotionEmbeddings(hollow({}), 24, 40, 72)
    assert [name.rsplit(".transformer_blocks")[0] for name in motion.grids] == [
        "down_blocks.2.temp_attentions.0", "down_blocks.2.temp_attentions.1", "up_blocks.1.temp_attentions.0",
        "up_blocks.1.temp_attentions.1", "up_blocks.1.temp_attentions.2"]
    assert set(motion.grids.values()) == {(10, 18)}
    assert motion.state_dict()["up_blocks.1.temp_attentions.2.transformer_blocks.0.attn1.vSpatial"].shape == (
        180, 24, 1280)
    motion = mini_mi.MotionEmbeddings(hollow(BOTH), 3, 5, 7, levels=[0, 1])
    shapes = {key: tuple(value.shape) for key, value in motion.state_dict().items() if "attn1" in key}
    assert shapes == {f"{side}_blocks.{i}.temp_attentions.{j}.transformer_blocks.0.attn1.vSpatial": shape
                      for side, i, layers, shape in (("down", 0, 1, (35, 3, 32)), ("down", 1, 1, (12, 3, 64)),
                                                     ("up", 0, 2, (12, 3, 64)), ("up", 1, 2, (35, 3, 32)))
                      for j in range(layers)}
    both = randomise(mini_mi.UNet3DConditionModel(BOTH)).eval()
    x, t, text = inputs(1, 3, 5, 7)
    with torch.no_grad():
        plain = both(x, t, text)
        for levels in ([0], [1], [0, 1], None):
            assert relative(both(x, t, text, make(3, 5, 7, BOTH, levels=levels)), plain) > 1e-3
    assert make(3, 4, 4, BOTH).grids == {name: (2, 2) for name, (level, _) in both.motion_sites.items() if level == 1}
    for levels in ([2], [-1], [], [0, 5]):
        with pytest.raises(mini_mi.UserError, match="levels"):
            mini_mi.MotionEmbeddings(hollow(BOTH), 3, 4, 4, levels=levels)
    with pytest.raises(mini_mi.UserError, match="levels"):
        mini_mi.MotionEmbeddings(hollow(UNET), 3, 4, 4, levels=[1])  # this level has no attention


# Files

def test_round_trip_with_settings(unet, tmp_path):
    """Values, settings, grids and source come back; the safetensors package reads the file."""
    path = tmp_path / "m.safetensors"
    motion = make(4, 4, 5, mqk_dims=2, mv_dims=1, debias="mean", debias_in_training=True)
    motion.use_mv, motion.source = False, {"video": "x.gif", "prompt": "a “cat”"}
    motion.save(path)
    again = mini_mi.MotionEmbeddings.load(path)
    assert not again.training and again.source == motion.source
    assert {k: getattr(again, k) for k in ("frames", "grids", *motion.SETTINGS)} == {
        k: getattr(motion, k) for k in ("frames", "grids", *motion.SETTINGS)}
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["mini_mi"])
        assert sorted(file.keys()) == sorted(motion.state_dict())
        assert all(torch.equal(file.get_tensor(k), v) for k, v in motion.state_dict().items())
    assert about["debias"] == "mean" and about["use_mv"] is False and about["frames"] == 4
    assert about["grids"][BLOCK] == [4, 5]
    again.use_mv = True  # MV was switched off, not thrown away
    motion.use_mv = True
    x, t, text = inputs(width=5)
    assert torch.equal(unet(x, t, text, again), unet(x, t, text, motion))


def authors_file(path, motion, slots=32, drop=()):
    """`motion` as the authors' code saves it: a pickled dict, 32 slots, more than F of them noise."""
    torch.manual_seed(1)
    state = {key: torch.cat([value, torch.randn(value.shape[0], slots - value.shape[1], value.shape[2])], 1)
             for key, value in motion.state_dict().items() if not any(part in key for part in drop)}
    torch.save(state, path)
    return path


def test_the_authors_file(unet, tmp_path):
    """Of its 32 slots the first F count, for every F up to 32."""
    motion = make(6)
    again = mini_mi.MotionEmbeddings.load(authors_file(tmp_path / "motion_embed.pt", motion))
    assert (again.use_mqk, again.use_mv, again.debias, again.training) == (True, True, "diff", False)
    x, t, text = inputs(frames=6)
    assert torch.equal(unet(x, t, text, again), unet(x, t, text, motion))
    for frames in (1, 3, 5):  # a shorter clip: cut, where our own files are interpolated
        raw = parts_at(again.train(), BLOCK, "attn1", frames, (4, 4))[1]
        assert torch.equal(raw, motion.state_dict()[f"{BLOCK}.attn1.vSpatial"][:, :frames])
    again.eval().save(tmp_path / "ours.safetensors")
    third = mini_mi.MotionEmbeddings.load(tmp_path / "ours.safetensors")
    assert torch.equal(unet(x, t, text, third), unet(x, t, text, motion))
    with pytest.raises(mini_mi.UserError, match="slots for 32 frames, not for 40"):    # what would they show?
        parts_at(again, BLOCK, "attn1", 40, (4, 4))


@pytest.mark.parametrize("drop, mqk, mv", [(["pos_embed"], False, True), (["vSpatial"], True, False)])
def test_missing_parts_load_as_switched_off(unet, tmp_path, drop, mqk, mv):
    """The authors' camera files have no MV."""
    motion = make()
    again = mini_mi.MotionEmbeddings.load(authors_file(tmp_path / "m.pt", motion, drop=drop))
    assert (again.use_mqk, again.use_mv) == (mqk, mv)
    motion.use_mqk, motion.use_mv = mqk, mv
    x, t, text = inputs()
    assert torch.equal(unet(x, t, text, again), unet(x, t, text, motion))


def test_the_authors_file_does_not_know_its_grid(unet, tmp_path):
    """16 positions may be 4x4 or 2x8: another grid of another size is refused, not guessed."""
    again = mini_mi.MotionEmbeddings.load(authors_file(tmp_path / "m.pt", make()))
    x, t, text = inputs(height=4, width=6)
    with pytest.raises(mini_mi.UserError, match="16 positions"):
        unet(x, t, text, again)


def test_files_that_are_no_motion_are_refused(unet, tmp_path):
    """NaN, other tensors, damaged settings, a motion of another model."""
    motion = make()
    motion.get_parameter(f"{BLOCK}.attn2.vSpatial").data[3, 2, 1] = float("nan")
    motion.save(tmp_path / "nan.safetensors")
    mini_mi.save_safetensors(tmp_path / "other.safetensors", {"conv.weight": torch.zeros(1, 2, 3)})
    mini_mi.save_safetensors(tmp_path / "flat.safetensors", {f"{BLOCK}.pos_embed": torch.zeros(4, 32)})
    for text in ("{", "[1]", '{"grids": 3}', '{"frames": "x", "grids": {"a": 1}}'):
        mini_mi.save_safetensors(tmp_path / f"{len(text)}.safetensors", make().state_dict(),
                                 {"mini_mi": text})
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(mini_mi.UserError) as caught:
            mini_mi.MotionEmbeddings.load(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    x, t, text = inputs()
    wider = dict(UNET, block_out_channels=[64, 64])
    deeper = dict(BOTH, block_out_channels=[32, 32])
    for config in (wider, deeper):
        with pytest.raises(mini_mi.UserError, match="do not fit the model"):
            unet(x, t, text, make(config=config))


def test_switches_act_after_loading(unet, tmp_path):
    """use_mqk, use_mv and debias are plain attributes."""
    path = tmp_path / "m.safetensors"
    make().save(path)
    motion, (x, t, text) = mini_mi.MotionEmbeddings.load(path), inputs()
    outs = {}
    changes = dict(full={}, no_mv=dict(use_mv=False), no_mqk=dict(use_mqk=False), raw=dict(debias="none"),
                   nothing=dict(use_mqk=False, use_mv=False))
    for name, change in changes.items():
        for key, value in {**dict(use_mqk=True, use_mv=True, debias="diff"), **change}.items():
            setattr(motion, key, value)
        outs[name] = unet(x, t, text, motion)
    assert torch.equal(outs["nothing"], unet(x, t, text))
    values = list(outs.values())
    assert all(relative(a, b) > 1e-3 for i, a in enumerate(values) for b in values[:i])
    only = make()
    for key in [k for k in only.state_dict() if "vSpatial" in k]:
        only.get_parameter(key).data.zero_()
    assert torch.equal(outs["no_mv"], unet(x, t, text, only))


# Other numbers of frames, other grids

def test_interpolation_is_the_identity_at_its_own_size():
    """Not even rounding."""
    motion = make(4, 4, 5).train()
    for part in ("attn1", "attn2"):
        m_v = parts_at(motion, BLOCK, part, 4, (4, 5))[1]
        assert torch.equal(m_v, motion.state_dict()[f"{BLOCK}.{part}.vSpatial"])


@pytest.mark.parametrize("frames, grid", [(16, (4, 6)), (8, (8, 12)), (4, (4, 6)), (8, (2, 3)), (16, (7, 9))])
def test_linear_functions_are_interpolated_exactly(frames, grid):
    """In time frame i of n lies at i / (n - 1), on the grid sample i at (i + 1/2) / n, whose border
    is flat."""
    motion = mini_mi.MotionEmbeddings(hollow(UNET), 8, 4, 6).train()

    def ramp(frames, height, width):
        t = torch.linspace(0, 1, frames)
        y, x = ((torch.arange(n) + 0.5) / n for n in (height, width))
        values = 3 * t[None, None, :] - 2 * y[:, None, None] + x[None, :, None]
        return values.flatten(0, 1)[..., None] * torch.arange(1, 33)  # (H*W, F, C)

    motion.get_parameter(f"{BLOCK}.attn1.vSpatial").data.copy_(ramp(8, 4, 6))
    motion.get_parameter(f"{BLOCK}.pos_embed").data.copy_(ramp(8, 1, 1))
    m_qk, m_v = parts_at(motion, BLOCK, "attn1", frames, grid)
    y, x = ((c > 0.5 / n) & (c < 1 - 0.5 / n) | (n == len(c))
            for c, n in zip([(torch.arange(n) + 0.5) / n for n in grid], (4, 6)))
    inside = (y[:, None] & x[None, :]).flatten()
    assert inside.any()
    assert torch.allclose(m_v[inside], ramp(frames, *grid)[inside], rtol=1e-5, atol=1e-4)
    assert torch.allclose(m_qk, ramp(frames, 1, 1), rtol=1e-5, atol=1e-4)
    # Debias comes after, on the frames that are used.
    debiased = parts_at(motion.eval(), BLOCK, "attn1", frames, grid)[1]
    assert torch.equal(debiased, mini_mi.debias(m_v, "diff"))


@pytest.mark.parametrize("frames", [3, 5, 9, 24, 40])
def test_a_ramp_stays_a_ramp(frames):
    """Stretched or squeezed, first and last frame stay, and every change from frame to frame is the same."""
    motion = mini_mi.MotionEmbeddings(hollow(UNET), 9, 2, 2).eval()
    motion.get_parameter(f"{BLOCK}.attn1.vSpatial").data.copy_(torch.linspace(-1, 3, 9)[None, :, None].expand(4, 9, 32))
    m_v = parts_at(motion, BLOCK, "attn1", frames, (2, 2))[1]
    assert torch.allclose(m_v[:, 0], torch.tensor(-1.0)) and torch.allclose(m_v.sum(1), torch.tensor(3.0))
    assert torch.allclose(m_v[:, 1:], torch.tensor(4 / (frames - 1)), atol=1e-5)


def test_bilinear_and_linear_by_hand():
    """One channel: 2 frames to 5, ends on ends; a 1x2 grid to 1x4, neighbours mix 3:1."""
    motion = mini_mi.MotionEmbeddings(hollow(UNET), 2, 1, 2).train()
    value = torch.zeros(2, 2, 32)
    value[0, :, 0], value[1, :, 0] = torch.tensor([0.0, 8.0]), torch.tensor([16.0, 24.0])
    motion.get_parameter(f"{BLOCK}.attn1.vSpatial").data.copy_(value)
    m_v = parts_at(motion, BLOCK, "attn1", 5, (1, 4))[1][:, :, 0]
    assert m_v.tolist() == [[0, 2, 4, 6, 8], [4, 6, 8, 10, 12], [12, 14, 16, 18, 20], [16, 18, 20, 22, 24]]


@pytest.mark.parametrize("frames, height, width", [(7, 4, 4), (2, 4, 4), (4, 6, 3), (1, 5, 7)])
def test_the_unet_takes_other_sizes(unet, tmp_path, frames, height, width):
    """A loaded motion is used with more or fewer frames and on another grid."""
    make().save(tmp_path / "m.safetensors")
    motion = mini_mi.MotionEmbeddings.load(tmp_path / "m.safetensors")
    x, t, text = inputs(1, frames, height, width)
    out = unet(x, t, text, motion)
    assert out.shape == x.shape and out.isfinite().all()
    assert frames == 1 or relative(out, unet(x, t, text)) > 1e-3


# In the UNet

def test_one_clip_serves_a_whole_batch(unet):
    """Both halves of a guidance batch, and every prompt, get the same embeddings."""
    x, t, text = inputs(batch=3)
    motion = make()
    alone = torch.cat([unet(x[i:i + 1], t[i:i + 1], text[i:i + 1], motion) for i in range(3)])
    assert relative(unet(x, t, text, motion), alone) < 1e-5


def test_gradients_stop_at_the_first_injected_layer(unet):
    """Nothing is kept for backward before it, and no weight of the UNet ever gets a gradient."""
    x, t, text = inputs()
    motion = make().train()
    seen = {}
    hooks = [unet.get_submodule(name).register_forward_hook(
                 lambda module, args, out, name=name: seen.update({name: out.requires_grad}))
             for name in ("transformer_in", "down_blocks.0.attentions.0", "down_blocks.0.temp_attentions.0",
                          "mid_block.resnets.0")]
    unet(x, t, text, motion).sum().backward()
    for hook in hooks:
        hook.remove()
    assert list(seen.values()) == [False, False, True, True]
    assert all(p.grad is None for p in unet.parameters())
    assert all(p.grad is not None and p.grad.norm() > 0 for p in motion.parameters())


@pytest.mark.parametrize("name, value, match", [
    ("debias", "foo", "debias = 'foo'"), ("t_min", 1, "t_min"), ("t_min", "0", "cannot be read")])
def test_a_file_with_unknown_settings_is_refused_at_once(tmp_path, name, value, match):
    """Not at the first sample, after the model was loaded and the reference inverted."""
    motion = make()
    setattr(motion, name, value)
    motion.save(tmp_path / "motion.safetensors")
    with pytest.raises(mini_mi.UserError, match=f"motion.safetensors.*{match}"):
        mini_mi.MotionEmbeddings.load(tmp_path / "motion.safetensors")
