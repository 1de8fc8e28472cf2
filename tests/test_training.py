"""Training, inversion and sampling: what they promise, against formulas written out a second time."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCHEDULER, relative

import mini_mi

ARGS = dict(lr=0.02, seed=3, progress=False)


@pytest.fixture(scope="module")
def clip():
    """Smooth latents (1,4,4,4,4), so that there is something to learn, and a text (1,5,32)."""
    torch.manual_seed(2)
    time = torch.linspace(0, 1, 4)[:, None, None]
    place = torch.linspace(0, 3, 4)[None, None, :] + torch.zeros(4, 4, 4)
    return torch.stack([torch.sin(c + place + 2 * time) for c in range(4)])[None], torch.randn(1, 5, 32)


def parameters(motion):
    return dict(motion.state_dict())


def assert_same(a, b):
    a, b = parameters(a), parameters(b)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Training

def test_training_lowers_the_loss(models, clip):
    """On noise that training never saw; every other weight stays as it is."""
    latents, text = clip
    before = {key: value.clone() for key, value in models.unet.state_dict().items()}
    generator = torch.Generator().manual_seed(99)
    noise = torch.randn(16, *latents.shape[1:], generator=generator)
    t = torch.randint(1000, (16,), generator=generator)

    @torch.no_grad()
    def loss(motion):
        x_t = models.scheduler.add_noise(latents, noise, t)
        out = mini_mi.predict(models, x_t, t, text.expand(16, -1, -1), motion)
        return (out - noise).square().mean().item()

    motion = mini_mi.train_motion(models, latents, text, steps=40, **ARGS)
    assert not motion.training and motion.losses.shape == (40, 1)
    assert loss(motion.train()) < 0.93 * loss(None)  # random weights leave little to gain
    assert all(torch.equal(value, before[key]) for key, value in models.unet.state_dict().items())
    assert all(p.grad is None for p in models.unet.parameters())


def test_the_first_losses_by_hand(models, clip):
    """Zero embeddings: the plain model's loss, for the timestep and noise of the clip's own generator."""
    latents, text = clip
    losses = mini_mi.train_motion(models, latents, text, steps=1, **ARGS).losses
    generator = torch.Generator().manual_seed(3)
    t = torch.randint(1000, (), generator=generator)
    noise = torch.randn(latents.shape[1:], generator=generator)[None]
    abar = torch.cumprod(1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2, 0)[t]
    out = models.unet(abar.sqrt() * latents + (1 - abar).sqrt() * noise, t, text)
    assert losses[0, 0].item() == pytest.approx((out - noise).square().mean().item(), rel=1e-4)


def test_the_same_seed_gives_the_same_result(models, clip):
    """Whatever the global generator does; another seed gives another result."""
    latents, text = clip
    torch.manual_seed(1)
    a = mini_mi.train_motion(models, latents, text, steps=3, **ARGS)
    state = torch.get_rng_state()
    b = mini_mi.train_motion(models, latents, text, steps=3, **ARGS)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(a, b)
    other = mini_mi.train_motion(models, latents, text, steps=3, **{**ARGS, "seed": 4})
    assert all(not torch.equal(parameters(a)[key], value) for key, value in parameters(other).items())


@pytest.mark.parametrize("clips, loss", [(1, "mse"), (2, "debiased")])
def test_resumed_equals_uninterrupted(models, clip, tmp_path, clips, loss):
    """Stopped between two states, the training goes on from the earlier one as if nothing had happened."""
    latents, text = (part.expand(clips, *part.shape[1:]) for part in clip)
    latents = latents + torch.arange(clips).view(-1, 1, 1, 1, 1)
    whole = mini_mi.train_motion(models, latents, text, steps=7, loss=loss, **ARGS)
    state = tmp_path / "state.pt"

    def stop(step, motion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mini_mi.train_motion(models, latents, text, steps=7, loss=loss, state=state, state_every=2,
                             snapshots=(5,),
                             on_snapshot=stop, **ARGS)
    assert len(torch.load(state, weights_only=True)["losses"]) == 4 and os.listdir(tmp_path) == ["state.pt"]
    seen = []
    again = mini_mi.train_motion(models, latents, text, steps=7, loss=loss, state=state, state_every=2,
                                 snapshots=(3, 5), on_snapshot=lambda step, _: seen.append(step), **ARGS)
    assert torch.equal(again.losses, whole.losses) and seen == [5]
    assert_same(again, whole)


def test_a_state_that_does_not_belong_is_refused(models, clip, tmp_path):
    """Truncated, empty, text, another kind of embeddings, code: the message names the file."""
    latents, text = clip
    path = tmp_path / "state.pt"

    def train(**settings):
        return mini_mi.train_motion(models, latents, text, steps=3, state=path, state_every=1, **ARGS,
                                    **settings)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    train()
    good = path.read_bytes()
    with pytest.raises(mini_mi.UserError, match="state.pt"):
        train(use_mv=False)
    with pytest.raises(mini_mi.UserError, match="state.pt"):
        train(mv_dims=1)
    for bad in (good[:len(good) // 2], b"", b"hello"):
        path.write_bytes(bad)
        with pytest.raises(mini_mi.UserError, match="delete it") as caught:
            train()
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    torch.save({"motion": Evil()}, path)
    with pytest.raises(mini_mi.UserError, match="state.pt"):
        train()
    assert not (tmp_path / "evil").exists()


def test_snapshots(models, clip):
    """Each asked step once, in eval mode, with the embeddings of that step; training does not notice."""
    latents, text = clip
    kept = {}

    def keep(step, motion):
        assert not motion.training
        kept[step] = {key: value.clone() for key, value in parameters(motion).items()}

    whole = mini_mi.train_motion(models, latents, text, steps=5, snapshots=(2, 4), on_snapshot=keep, **ARGS)
    assert list(kept) == [2, 4]
    assert_same(whole, mini_mi.train_motion(models, latents, text, steps=5, **ARGS))
    short = parameters(mini_mi.train_motion(models, latents, text, steps=4, **ARGS))
    assert all(torch.equal(kept[4][key], short[key]) for key in short)


@pytest.mark.parametrize("bad", ["lr", "latents"])
def test_a_loss_that_is_not_finite_stops_with_advice(models, clip, tmp_path, bad):
    """Numbers that overflow, whether the rate or the data is at fault; no state with NaN is left."""
    latents, text = clip
    lr = 1e30 if bad == "lr" else 0.02
    latents = latents * (1 if bad == "lr" else float("inf"))
    with pytest.raises(mini_mi.UserError, match="not finite at step .*--lr"):
        mini_mi.train_motion(models, latents, text, steps=9, seed=0, lr=lr, progress=False,
                             state=tmp_path / "state.pt")
    assert not list(tmp_path.iterdir())


def test_losses_by_hand():
    """A second way to write DESIGN's formulas, in numpy, clip by clip."""
    torch.manual_seed(0)
    prediction, target = torch.randn(3, 4, 5, 2, 3), torch.randn(3, 4, 5, 2, 3)
    anchors = torch.tensor([4, 0, 2])
    mse, debiased = (mini_mi.motion_loss(kind, prediction, target, anchors) for kind in ("mse", "debiased"))
    for i, r in enumerate(anchors.tolist()):
        p, e = prediction[i].numpy().astype(np.float64), target[i].numpy().astype(np.float64)
        plain = np.mean((p - e) ** 2)
        apart = np.mean([(2 ** 0.5 * (p[:, f] - e[:, f]) - (p[:, r] - e[:, r])) ** 2 for f in range(5)])
        assert mse[i].item() == pytest.approx(plain, rel=1e-5)
        assert debiased[i].item() == pytest.approx(plain + apart, rel=1e-5)
    with pytest.raises(mini_mi.UserError, match="mse or debiased"):
        mini_mi.motion_loss("hinge", prediction, target, anchors)


def test_checkpointing_trains_the_same(models, clip):
    """Less memory, the same numbers; the switch is set back."""
    latents, text = clip
    a = mini_mi.train_motion(models, latents, text, steps=2, **ARGS)
    b = mini_mi.train_motion(models, latents, text, steps=2, checkpointing=True, **ARGS)
    assert not models.unet.checkpointing
    for key, value in parameters(a).items():
        assert relative(parameters(b)[key], value) < 1e-5


def test_bfloat16_runs(tiny_random, clip):
    """Weights in bfloat16; embeddings, losses and latents stay float32."""
    latents, text = clip
    half = mini_mi.load_models(tiny_random, dtype=torch.bfloat16)
    motion = mini_mi.train_motion(half, latents, text, steps=3, **ARGS)
    assert {p.dtype for p in motion.parameters()} == {torch.float32} and motion.losses.isfinite().all()
    out = mini_mi.sample(half, latents, text, 0 * text, steps=2, guidance=3, motion=motion, progress=False)
    assert out.dtype == torch.float32 and out.isfinite().all()
    full = mini_mi.sample(mini_mi.load_models(tiny_random), latents, text, 0 * text, 2, 3, motion,
                          progress=False)
    assert 0 < relative(out, full) < 0.1


# Diffusion by hand

ABAR = np.cumprod(1 - np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2)  # float64


def toy(answer, prediction="epsilon"):
    """Models whose UNet is answer(x, t, text, motion)."""
    return SimpleNamespace(unet=answer, dtype=torch.float32,
                           scheduler=mini_mi.DDIMScheduler({**SCHEDULER, "prediction_type": prediction}))


def ideal(prediction, spread=0.7):
    """The best answer for pictures of independent normal pixels: eps, or the same thing said as v."""
    def answer(x, t, text, motion):
        abar = torch.tensor(ABAR[int(t)], dtype=x.dtype)
        eps = (1 - abar).sqrt() * x / (abar * spread ** 2 + 1 - abar)
        x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
        return eps if prediction == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * x0
    return answer


def curved(x, t, text, motion):
    """An answer that is linear in nothing."""
    return torch.sin(1.3 * x + float(t) / 300)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_inversion_by_hand(prediction):
    """DESIGN section 5, in numpy: eps at t_i from x of the level below."""
    x0 = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    out = mini_mi.ddim_invert(toy(curved, prediction), x0, torch.zeros(2, 1, 1), 10, progress=False)
    x, below = x0.numpy().astype(np.float64), ABAR[0]
    for t in range(1, 1000, 100):
        said = np.sin(1.3 * x + t / 300)
        eps = said if prediction == "epsilon" else ABAR[t] ** 0.5 * said + (1 - ABAR[t]) ** 0.5 * x
        clean = (x - (1 - below) ** 0.5 * eps) / below ** 0.5
        x, below = ABAR[t] ** 0.5 * clean + (1 - ABAR[t]) ** 0.5 * eps, ABAR[t]
    assert relative(out, torch.from_numpy(x)) < 1e-4


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sampling_by_hand(prediction):
    """Guidance and DDIM, in numpy; the answer depends on the text, and v is guided like eps."""
    def answer(x, t, text, motion):
        return curved(x, t, text, motion) + text.mean((1, 2)).view(-1, 1, 1, 1, 1)

    noise = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    text, negative = torch.tensor([0.3, -0.2]).view(2, 1, 1), torch.tensor([0.1, 0.5]).view(2, 1, 1)
    out = mini_mi.sample(toy(answer, prediction), noise, text, negative, 10, 4.0, progress=False)
    x = noise.numpy().astype(np.float64)
    yes, no = (v.numpy().astype(np.float64)[..., None, None] for v in (text, negative))
    for t in range(901, 0, -100):
        plain = np.sin(1.3 * x + t / 300)
        said = (plain + no) + 4.0 * ((plain + yes) - (plain + no))
        eps = said if prediction == "epsilon" else ABAR[t] ** 0.5 * said + (1 - ABAR[t]) ** 0.5 * x
        clean = (x - (1 - ABAR[t]) ** 0.5 * eps) / ABAR[t] ** 0.5
        target = ABAR[max(t - 100, 0)]
        x = target ** 0.5 * clean + (1 - target) ** 0.5 * eps
    assert relative(out, torch.from_numpy(x)) < 1e-4


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_inversion_comes_back(prediction):
    """Sampling without guidance from the inverted noise: the more steps, the closer to the latents."""
    models = toy(ideal(prediction), prediction)
    x0 = 0.7 * torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    empty, errors = torch.zeros(1, 1, 1), []
    for steps in (25, 100, 400):
        noise = mini_mi.ddim_invert(models, x0, empty, steps, progress=False)
        assert noise.std().item() == pytest.approx(1, abs=0.15)
        errors.append(relative(mini_mi.sample(models, noise, empty, empty, steps, 1.0, progress=False), x0))
    assert errors[2] < 0.02 and errors[2] < errors[1] / 2 < errors[0] / 4, errors


def test_inversion_of_a_network_comes_back(models):
    """A real UNet with random weights; its answers are made small, for it was never taught to be smooth."""
    quiet = SimpleNamespace(scheduler=models.scheduler, dtype=models.dtype,
                            unet=lambda *args: 0.1 * models.unet(*args))
    torch.manual_seed(0)
    x0, text = torch.randn(1, 4, 2, 2, 2), torch.randn(1, 5, 32)
    noise = mini_mi.ddim_invert(quiet, x0, text, 50, progress=False)
    back = mini_mi.sample(quiet, noise, text, text, 50, 1, progress=False)
    assert relative(back, x0) < 0.05 < relative(noise, x0)


@pytest.mark.parametrize("guidance, branches", [(3.0, 2), (1.0001, 2), (1.0, 1), (0.0, 1)])
def test_what_the_unet_is_asked(guidance, branches):
    """Negative first, then the prompt, in one batch; at guidance 1 and below the prompt alone."""
    calls = []

    def answer(x, t, text, motion):
        calls.append((x.clone(), int(t), text.clone(), motion))
        return torch.zeros_like(x)

    noise, text = torch.randn(2, 4, 3, 2, 2), torch.ones(2, 5, 6)
    negative = -text
    marker = object()
    mini_mi.sample(toy(answer), noise, text, negative, 4, guidance, marker, progress=False)
    assert [t for _, t, _, _ in calls] == [751, 501, 251, 1]
    for x, _, asked, motion in calls:
        assert motion is marker and len(x) == len(asked) == 2 * branches
        assert torch.equal(asked, torch.cat([negative, text])[-2 * branches:])
        assert torch.equal(x[:2], x[-2:])
    calls.clear()
    mini_mi.ddim_invert(toy(answer), noise, text, 4, progress=False)
    assert [(t, motion) for _, t, _, motion in calls] == [(t, None) for t in (1, 251, 501, 751)]
    assert all(torch.equal(asked, text) for _, _, asked, _ in calls)


def test_blended_noise_keeps_its_variance():
    """0: fresh noise alone; 1: the inverted reference alone; between: weights whose squares add up to 1."""
    torch.manual_seed(0)
    a, b = torch.randn(100_000), torch.randn(100_000)
    assert torch.equal(mini_mi.blend_noise(a, b, 0.0), b) and torch.equal(mini_mi.blend_noise(a, b, 1.0), a)
    for prior in (0.2, 0.5, 0.9):
        blend = mini_mi.blend_noise(a, b, prior)
        assert blend.std().item() == pytest.approx(1, abs=0.01)
        assert (blend * a).mean().item() == pytest.approx(prior ** 0.5, abs=0.01)


# In and out of the latent space

def test_videos_to_latents_and_back(models):
    """Frame by frame what the autoencoder gives, scaled, also for clips longer than a chunk."""
    torch.manual_seed(0)
    video = torch.rand(2, 3, mini_mi.CHUNK + 3, 16, 24) * 2 - 1
    latents = mini_mi.encode_video(models, video)
    assert latents.shape == (2, 4, mini_mi.CHUNK + 3, 2, 3)
    decoded = mini_mi.decode_video(models, latents)
    assert decoded.shape == video.shape and decoded.abs().max() <= 1
    with torch.no_grad():
        for b, f in ((0, 0), (1, mini_mi.CHUNK + 2)):
            mean, logvar = models.vae.encode(video[b:b + 1, :, f])
            assert relative(latents[b, :, f], 0.18215 * mean[0]) < 1e-5
            one = models.vae.decode(latents[b:b + 1, :, f] / 0.18215).clamp(-1, 1)
            assert relative(decoded[b, :, f], one[0]) < 1e-4

    def draw(seed):
        return mini_mi.encode_video(models, video[1:, :, -1:], torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    spread = torch.stack([draw(seed)[0, :, 0] for seed in range(200)]).std(0)
    assert relative(spread, 0.18215 * (0.5 * logvar[0]).exp()) < 0.15


def test_pixels_to_model_range_and_back():
    """Every value of a byte survives."""
    frames = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1).repeat(3, axis=3)
    video = mini_mi.to_model_range(frames)
    assert video.shape == (1, 3, 4, 8, 8) and video.min() == -1 and video.max() == 1
    assert np.array_equal(mini_mi.to_uint8(video[0]), frames)
    assert mini_mi.to_uint8(torch.full((3, 1, 1, 1), 7.0)).max() == 255
