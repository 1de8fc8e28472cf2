"""Training, inversion and sampling: what they promise, against formulas written out a second time."""

import copy
import re
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

    models.unet.requires_grad_(True)                              # whatever the caller left
    motion = mini_mi.train_motion(models, latents, text, steps=40, **ARGS)
    assert not any(p.requires_grad for p in models.unet.parameters())
    assert not motion.training and len(motion.losses) == 40
    assert loss(motion.train()) < 0.93 * loss(None)  # random weights leave little to gain
    assert all(torch.equal(value, before[key]) for key, value in models.unet.state_dict().items())
    assert all(p.grad is None for p in models.unet.parameters())


def test_settings_beside_a_motion_that_has_its_own_are_refused(models, clip):
    """An ablation that is asked for and not made would be a wrong result."""
    motion = mini_mi.MotionEmbeddings(models.unet, 4, 4, 4)
    with pytest.raises(TypeError, match="use_mv"):
        mini_mi.train_motion(models, *clip, motion=motion, use_mv=False)


def test_a_cosine_schedule_ends_at_rest(models, clip):
    """The first step is that of the constant rate, the later ones are shorter, and the last hardly moves."""
    def moves(schedule):
        seen = []
        mini_mi.train_motion(models, *clip, steps=8, lr_schedule=schedule, **ARGS,
                             on_step=lambda _, motion: seen.append(
                                 torch.cat([p.detach().flatten() for p in motion.parameters()])))
        return [float((b - a).norm()) for a, b in zip([torch.zeros_like(seen[0]), *seen], seen)]

    constant, cosine = moves("constant"), moves("cosine")
    assert cosine[0] == constant[0] and cosine[-1] < 0.1 * constant[-1] and sum(cosine) < 0.8 * sum(constant)


def test_the_first_losses_by_hand(models, clip):
    """Zero embeddings: the plain model's loss, for the timestep and noise of the clip's own generator."""
    latents, text = clip
    losses = mini_mi.train_motion(models, latents, text, steps=1, **ARGS).losses
    generator = torch.Generator().manual_seed(3)
    t = torch.randint(1000, (), generator=generator)
    noise = torch.randn(latents.shape[1:], generator=generator)[None]
    abar = torch.cumprod(1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2, 0)[t]
    out = models.unet(abar.sqrt() * latents + (1 - abar).sqrt() * noise, t, text)
    assert losses[0] == pytest.approx((out - noise).square().mean().item(), rel=1e-4)


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


def test_every_step_is_shown(models, clip):
    """Each step once, in eval mode, with the embeddings of that step; training does not notice."""
    latents, text = clip
    kept = {}

    def keep(step, motion):
        assert not motion.training
        kept[step] = {key: value.clone() for key, value in parameters(motion).items()}

    whole = mini_mi.train_motion(models, latents, text, steps=5, on_step=keep, **ARGS)
    assert list(kept) == [1, 2, 3, 4, 5]
    assert_same(whole, mini_mi.train_motion(models, latents, text, steps=5, **ARGS))
    short = parameters(mini_mi.train_motion(models, latents, text, steps=4, **ARGS))
    assert all(torch.equal(kept[4][key], short[key]) for key in short)


@pytest.mark.parametrize("bad", ["lr", "latents"])
def test_a_loss_that_is_not_finite_stops_with_advice(models, clip, bad):
    """Numbers that overflow, whether the rate or the data is at fault."""
    latents, text = clip
    lr = 1e30 if bad == "lr" else 0.02
    latents = latents * (1 if bad == "lr" else float("inf"))
    with pytest.raises(mini_mi.UserError, match="not finite at step .*--lr"):
        mini_mi.train_motion(models, latents, text, steps=9, seed=0, lr=lr, progress=False)


def test_losses_by_hand():
    """A second way to write DESIGN's formulas, in numpy, sample by sample."""
    torch.manual_seed(0)
    prediction, target = torch.randn(3, 4, 5, 2, 3), torch.randn(3, 4, 5, 2, 3)
    for r in (4, 0, 2):
        mse, debiased, hybrid = (mini_mi.motion_loss(kind, prediction, target, r)
                                 for kind in ("mse", "debiased", "hybrid"))
        d = prediction.numpy().astype(np.float64) - target.numpy().astype(np.float64)
        apart = np.mean([(2 ** 0.5 * d[i, :, f] - d[i, :, r]) ** 2 for f in range(5) for i in range(3)])
        assert mse.item() == pytest.approx(np.mean(d ** 2), rel=1e-5)
        assert debiased.item() == hybrid.item() == pytest.approx(np.mean(d ** 2) + apart, rel=1e-5)
    with pytest.raises(mini_mi.UserError, match="mse, debiased or hybrid"):
        mini_mi.motion_loss("hinge", prediction, target, 0)


# The hybrid loss

def test_lora_by_hand(models, clip):
    """Every linear layer of the spatial transformers, and no other, gives W x + b + up down x while it is on."""
    latents, text = clip
    unet = copy.deepcopy(models.unet)
    lora = mini_mi.SpatialLoRA(unet, torch.Generator().manual_seed(0))
    names = [name for name, module in unet.named_modules()
             if isinstance(module, torch.nn.Linear) and re.search(r"\battentions\.", name)]
    assert len(names) == len(lora.down) == len(lora.up) == 12 * 4      # 12 a transformer
    with torch.no_grad():
        plain = unet(latents, 7, text)
        lora.switch(on=True)
        assert torch.equal(unet(latents, 7, text), plain)                                   # up starts at zero
        for a, b in zip(lora.down, lora.up):
            assert a.shape[0] == b.shape[1] == 32 and a.std().item() == pytest.approx(1 / 32, rel=0.2)
            b += 0.3 * torch.randn(b.shape, generator=torch.Generator().manual_seed(1))
        lora.switch(on=True)
        changed = unet(latents, 7, text)
        lora.switch(on=False)
        assert torch.equal(unet(latents, 7, text), plain)
        hooks = [unet.get_submodule(name).register_forward_hook(
            lambda layer, inputs, out, a=a, b=b: out + inputs[0] @ a.T @ b.T)
            for name, a, b in zip(names, lora.down, lora.up) if not name.endswith("net.0.proj")]
        for name, a, b in zip(names, lora.down, lora.up):           # the first of GEGLU's two is never called
            if name.endswith("net.0.proj"):
                unet.get_submodule(name).weight.copy_(unet.get_submodule(name).weight + b @ a)
        assert len(hooks) == 11 * 4
        assert relative(changed, unet(latents, 7, text)) < 1e-5 < 1e-2 < relative(changed, plain)


def test_the_hybrid_loss_leaves_the_unet_as_it_was(models, clip):
    """After training, after an error, after an interruption: the very parameters in their order, switches."""
    latents, text = clip
    before = {key: value.clone() for key, value in models.unet.state_dict().items()}
    parameters_before = list(models.unet.named_parameters())

    def untouched():
        for (name, p), (key, q) in zip(models.unet.named_parameters(), parameters_before, strict=True):
            assert name == key and p is q
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in models.unet.modules())
        assert models.unet.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in models.unet.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in models.unet.parameters())

    def stop(step, motion):
        raise KeyboardInterrupt

    arguments = dict(steps=3, loss="hybrid", checkpointing=True, **ARGS)
    plain = mini_mi.train_motion(models, latents, text, **{**arguments, "loss": "debiased"})
    motion = mini_mi.train_motion(models, latents, text, **arguments)
    untouched()
    assert all(relative(value, motion.get_parameter(key)) > 1e-3 for key, value in parameters(plain).items())
    with pytest.raises(KeyboardInterrupt):
        mini_mi.train_motion(models, latents, text, on_step=stop, **arguments)
    untouched()
    with pytest.raises(mini_mi.UserError):
        mini_mi.train_motion(models, latents * float("inf"), text, **arguments)
    untouched()


def test_the_lora_is_off_in_one_step_of_five(models, clip, monkeypatch):
    """On, it learns from one frame before the clip's step; off, it does not learn and does not act."""
    latents, text = clip
    seen, lora = [], []
    build, predict = mini_mi.SpatialLoRA.__init__, mini_mi.predict

    def remember(self, *args):
        lora.append(self)
        build(self, *args)

    def watch(models, x, t, text, motion=None, checkpointing=False):
        lent = all(f.weight is not w for f, w in zip(lora[0].layers, lora[0].frozen))
        seen.append((x.shape[2], motion is not None, lent, [p.clone() for p in lora[0].up]))
        return predict(models, x, t, text, motion, checkpointing)

    monkeypatch.setattr(mini_mi.SpatialLoRA, "__init__", remember)
    monkeypatch.setattr(mini_mi, "predict", watch)
    mini_mi.train_motion(models, latents, text, steps=30, loss="hybrid", **ARGS)
    clips = [n for n, (frames, *_) in enumerate(seen) if frames == 4]
    frames = [n for n, (frames, *_) in enumerate(seen) if frames == 1]
    assert len(clips) == 30 and len(frames) + len(clips) == len(seen) and 18 <= len(frames) <= 29
    assert all(n + 1 in clips and seen[n][2] and not seen[n][1] for n in frames)
    for n in clips:
        _, with_motion, on, b = seen[n]
        assert with_motion and on == (n > 0 and n - 1 in frames)
        if n + 1 < len(seen):                  # the clip's step never changes the LoRA, the frame's step does
            assert all(torch.equal(x, y) for x, y in zip(b, seen[n + 1][3]))
        if on:
            assert not any(torch.equal(x, y) for x, y in zip(b, seen[n - 1][3]))


def test_checkpointing_trains_the_same(models, clip):
    """Less memory, the same numbers."""
    latents, text = clip
    a = mini_mi.train_motion(models, latents, text, steps=2, **ARGS)
    b = mini_mi.train_motion(models, latents, text, steps=2, checkpointing=True, **ARGS)
    for key, value in parameters(a).items():
        assert relative(parameters(b)[key], value) < 1e-5


def test_bfloat16_runs(tiny_random, clip):
    """Weights in bfloat16; embeddings, losses and latents stay float32."""
    latents, text = clip
    half = mini_mi.load_models(tiny_random, dtype=torch.bfloat16)
    motion = mini_mi.train_motion(half, latents, text, steps=3, **ARGS)
    assert {p.dtype for p in motion.parameters()} == {torch.float32} and np.isfinite(motion.losses).all()
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
    def answer(x, t, text, motion, checkpointing=False):
        abar = torch.tensor(ABAR[int(t)], dtype=x.dtype)
        eps = (1 - abar).sqrt() * x / (abar * spread ** 2 + 1 - abar)
        x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
        return eps if prediction == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * x0
    return answer


def curved(x, t, text, motion, checkpointing=False):
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
    def answer(x, t, text, motion, checkpointing=False):
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

    def answer(x, t, text, motion, checkpointing=False):
        calls.append((x.clone(), int(t), text.clone(), motion))
        return torch.zeros_like(x)

    noise, text = torch.randn(2, 4, 3, 2, 2), torch.ones(2, 5, 6)
    negative = -text
    marker = SimpleNamespace(t_min=0)
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


@pytest.mark.parametrize("t_min, asked", [
    (0, [751, 501, 251, 1]), (0.251, [751, 501, 251]), (0.252, [751, 501]), (0.99, [])])
def test_below_t_min_the_embeddings_rest(t_min, asked):
    """In sampling: at steps t >= t_min * T, of T = 1000, the UNet gets them, at the others it gets None."""
    calls, motion = [], SimpleNamespace(t_min=t_min)

    def answer(x, t, text, given, checkpointing=False):
        calls.append((int(t), given))
        return torch.zeros_like(x)

    noise, text = torch.randn(1, 4, 3, 2, 2), torch.ones(1, 5, 6)
    mini_mi.sample(toy(answer), noise, text, text, 4, 3.0, motion, progress=False)
    assert calls == [(t, motion if t in asked else None) for t in (751, 501, 251, 1)]


@pytest.mark.parametrize("t_min", [0.0, 0.6])
def test_below_t_min_nothing_is_learned(models, clip, monkeypatch, t_min):
    """In training: all noise levels from t_min on are drawn, and no other; the result says so."""
    seen, real = [], mini_mi.DDIMScheduler.add_noise
    monkeypatch.setattr(mini_mi.DDIMScheduler, "add_noise", lambda self, x, noise, t: (
        seen.extend(t.tolist()), real(self, x, noise, t))[1])
    motion = mini_mi.train_motion(models, *clip, steps=2, batch=200, t_min=t_min, **ARGS)
    assert motion.t_min == t_min and len(seen) == 400
    assert 1000 * t_min <= min(seen) < 1000 * t_min + 20 and 980 < max(seen) < 1000


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
    video = torch.rand(2, 3, 16 + 3, 16, 24) * 2 - 1
    latents = mini_mi.encode_video(models, video)
    assert latents.shape == (2, 4, 16 + 3, 2, 3)
    decoded = mini_mi.decode_video(models, latents)
    assert decoded.shape == video.shape and decoded.abs().max() <= 1
    with torch.no_grad():
        for b, f in ((0, 0), (1, 16 + 2)):
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
