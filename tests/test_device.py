"""Training and sampling on torch's meta device, a GPU's stand-in: there a tensor left on the CPU raises.

The meta device computes shapes, number formats and devices, and no values. What asks for a value (`if loss is
finite`, `.item()`) is answered here for it, and the gradient scaler, which exists for real devices alone, is
replaced by one that does nothing.
"""

import copy
import math

import pytest
import torch

import mini_mi
from conftest import randomise, relative


class NoScaler:
    """The interface of torch.amp.GradScaler."""

    def __init__(self, device, enabled):
        assert device == "meta" and enabled is True  # float16 needs it

    def scale(self, loss):
        return loss

    def step(self, optimizer):
        optimizer.step()

    def update(self):
        pass

    def state_dict(self):
        return {}


@pytest.fixture
def far(models, monkeypatch):
    """The small model on the meta device, its UNet and text encoder in float16, as `load_models` would."""
    truth, item = torch.Tensor.__bool__, torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: True if self.is_meta else truth(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 1.0 if self.is_meta else item(self))
    monkeypatch.setattr(torch.amp, "GradScaler", NoScaler)
    parts = [copy.deepcopy(part).to("meta") for part in (models.text_encoder, models.vae, models.unet)]
    return mini_mi.Models(models.tokenizer, parts[0].half(), parts[1], parts[2].half(), models.scheduler)


def test_a_tensor_on_another_device_raises(far):
    """Or the other tests here would show nothing."""
    x, text = torch.zeros(1, 4, 2, 4, 4), torch.zeros(1, 5, 32)
    with pytest.raises(RuntimeError, match="device"):
        mini_mi.predict(far, x, 7, text.to("meta"))
    with pytest.raises(RuntimeError, match="device"):
        mini_mi.predict(far, x.to("meta"), 7, text)
    motion = mini_mi.MotionEmbeddings(far.unet, 2, 4, 4)
    with pytest.raises(RuntimeError, match="device"):
        mini_mi.predict(far, x.to("meta"), 7, text.to("meta"), motion)


@pytest.fixture
def calls(far):
    """(device, number format) of what the UNet answers, call by call."""
    seen = []
    hook = far.unet.register_forward_hook(lambda _, inputs, out: seen.append((out.device.type, out.dtype)))
    yield seen
    hook.remove()


@pytest.mark.parametrize("loss, checkpointing, prediction", [
    ("mse", False, "epsilon"), ("debiased", False, "v_prediction"), ("hybrid", True, "epsilon"),
])
def test_training(far, calls, loss, checkpointing, prediction):
    """Two steps, each where the model is; the UNet in its number format, the embeddings in float32."""
    far.scheduler = copy.copy(far.scheduler)
    far.scheduler.v_prediction = prediction == "v_prediction"
    latents, text = torch.zeros(1, 4, 2, 4, 4, device="meta"), torch.zeros(1, 5, 32, device="meta")
    shown = []
    motion = mini_mi.train_motion(far, latents, text, steps=2, batch=2, loss=loss,
                                  checkpointing=checkpointing, progress=False,
                                  on_step=lambda step, motion: shown.append(step))
    assert shown == [1, 2] and len(motion.losses) == 2
    assert {(p.device.type, p.dtype) for p in motion.parameters()} == {("meta", torch.float32)}
    assert set(calls) == {("meta", torch.float16)}
    assert len(calls) > 2 if loss == "hybrid" else len(calls) == 2         # its LoRA has steps of its own


def test_from_pixels_to_pixels(far, calls):
    """Encode, invert, blend, sample with and without guidance, decode: the autoencoder in float32."""
    video = torch.zeros(1, 3, 2, 32, 32)
    latents = mini_mi.encode_video(far, video, torch.Generator().manual_seed(0))
    text = mini_mi.encode_prompt(far, ["a red star"])
    assert text.device.type == "meta" and text.dtype == torch.float16
    motion = mini_mi.MotionEmbeddings(far.unet, 2, 4, 4).to("meta").eval()
    inverted = mini_mi.ddim_invert(far, latents, text, 2, progress=False)
    fresh = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(far.device)
    noise = mini_mi.blend_noise(inverted, fresh, 0.5)
    sampled = [mini_mi.sample(far, noise, text, text, 2, guidance, motion, progress=False)
               for guidance in (1.0, 7.0)]
    decoded = mini_mi.decode_video(far, sampled[1])
    for result in (latents, inverted, noise, *sampled):
        assert (result.device.type, result.dtype) == ("meta", torch.float32)
        assert result.shape == (1, 4, 2, 4, 4)
    assert decoded.device.type == "meta" and decoded.shape == video.shape
    assert set(calls) == {("meta", torch.float16)} and len(calls) == 6


def test_embeddings_of_another_size(far):
    """Interpolated along time and over the grid, cut from the authors' slots, on the device."""
    motion = mini_mi.MotionEmbeddings(far.unet, 6, 2, 8).to("meta").eval()
    x, text = torch.zeros(1, 4, 4, 4, 4, device="meta"), torch.zeros(1, 5, 32, device="meta")
    assert mini_mi.predict(far, x, 7, text, motion).shape == x.shape
    motion.frames = None
    assert mini_mi.predict(far, x, 7, text, motion).shape == x.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-2), (torch.float16, 1e-2), (torch.bfloat16, 5e-2),
])
def test_on_a_gpu(tiny_random, models, dtype, tolerance):
    """The real thing: the same numbers as on the CPU, and a training that stays finite."""
    there = mini_mi.load_models(tiny_random, "cuda", dtype)
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 3, 4, 4), (1, 5, 32)))
    motion = randomise(mini_mi.MotionEmbeddings(models.unet, 3, 4, 4)).eval()
    with torch.no_grad():
        expected = mini_mi.predict(models, x, 7, text, motion)
        got = mini_mi.predict(there, x.cuda(), 7, text.cuda(), motion.cuda())
    assert relative(got.cpu(), expected) < tolerance
    for checkpointing in (False, True):
        learned = mini_mi.train_motion(there, x.cuda(), text.cuda(), steps=3, checkpointing=checkpointing,
                                       loss="hybrid", progress=False)
        assert all(map(math.isfinite, learned.losses)) and all(p.is_cuda and p.any() for p in learned.parameters())
