"""A GPU's stand-in: the whole path in float16 on torch's meta device, where a tensor left on the CPU raises.

The meta device computes shapes, number formats and devices, and no values. What asks for a value (`if loss is
finite`, `.item()`) is answered here for it, and the gradient scaler, which exists for real devices alone, is
replaced by one that does nothing.
"""

import copy

import pytest
import torch

import mini_mi


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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss", ["mse", "debiased", "hybrid"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_whole_path(far, loss, checkpointing, prediction):
    """Encode, train, invert, sample, decode; every step of it where the model is, in its number format."""
    far.scheduler = copy.copy(far.scheduler)
    far.scheduler.v_prediction = prediction == "v_prediction"
    seen = []
    hook = far.unet.register_forward_hook(
        lambda module, inputs, out: seen.append((out.device.type, out.dtype)))
    video = torch.zeros(1, 3, 4, 32, 32)
    latents = mini_mi.encode_video(far, video, torch.Generator().manual_seed(0))
    assert (latents.device.type == "meta" and latents.dtype == torch.float32
            and latents.shape == (1, 4, 4, 4, 4))
    text = mini_mi.encode_prompt(far, ["a red star"])
    assert text.device.type == "meta" and text.dtype == torch.float16
    shown = []
    motion = mini_mi.train_motion(far, latents, text, steps=8, batch=2, loss=loss,
                                  checkpointing=checkpointing,
                                  on_step=lambda step, motion: shown.append(step), progress=False)
    assert shown == list(range(1, 9)) and motion.losses.shape == (8,)
    assert {p.device.type for p in motion.parameters()} == {"meta"}
    assert {p.dtype for p in motion.parameters()} == {torch.float32}
    inverted = mini_mi.ddim_invert(far, latents, text, 3, progress=False)
    fresh = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(far.device)
    noise = mini_mi.blend_noise(inverted, fresh, 0.5)
    for guidance in (1.0, 7.0):
        out = mini_mi.sample(far, noise, text, text, 3, guidance, motion, progress=False)
        assert out.device.type == "meta" and out.dtype == torch.float32 and out.shape == latents.shape
    decoded = mini_mi.decode_video(far, out)
    assert decoded.device.type == "meta" and decoded.shape == video.shape
    assert set(seen) == {("meta", torch.float16)}
    hook.remove()


def test_embeddings_of_another_size(far):
    """Interpolated along time and over the grid, cut from the authors' slots, on the device."""
    motion = mini_mi.MotionEmbeddings(far.unet, 6, 2, 8).to("meta").eval()
    x, text = torch.zeros(1, 4, 4, 4, 4, device="meta"), torch.zeros(1, 5, 32, device="meta")
    assert mini_mi.predict(far, x, 7, text, motion).shape == x.shape
    motion.frames = None
    assert mini_mi.predict(far, x, 7, text, motion).shape == x.shape
