"""Text encoder, autoencoder, UNet and DDIM against diffusers and transformers, on random weights."""

import json
import shutil

import diffusers
import pytest
import torch
import transformers
from conftest import SCHEDULER, SPECIAL, TEXT, UNET, VAE, randomise, relative

import mini_mi

CLOSE = 1e-4  # relative error of whole tensors, float32


def ours_like(build, reference, config):
    """Our module with the weights of `reference`, strictly loaded."""
    ours = build(config).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours


# Text encoder

@pytest.mark.parametrize("act, width, heads, layers, length", [
    ("quick_gelu", 32, 4, 3, 12), ("gelu", 48, 3, 1, 77), ("gelu", 64, 8, 2, 5)])
def test_text_encoder_equals_transformers(act, width, heads, layers, length):
    """Both activations, several sizes, batch 3, texts of full length and shorter, the complete config."""
    config = transformers.CLIPTextConfig(vocab_size=99, hidden_size=width, intermediate_size=3 * width,
                                         num_hidden_layers=layers, num_attention_heads=heads, hidden_act=act,
                                         max_position_embeddings=length, layer_norm_eps=1e-4)
    reference = randomise(transformers.CLIPTextModel(config).eval())
    weights = {f"text_model.{key.removeprefix('text_model.')}": value
               for key, value in reference.state_dict().items()}
    ours = mini_mi.CLIPTextModel(config.to_dict()).eval()
    ours.load_state_dict(weights, strict=True)
    for tokens in (length, length - 2):
        ids = torch.randint(1, 90, (3, tokens), generator=torch.Generator().manual_seed(tokens))
        ids[1, 2:], ids[2, 1:] = 98, 0  # padded early, by either pad token
        with torch.no_grad():
            assert relative(ours(ids), reference(ids).last_hidden_state) < CLOSE


def test_text_encoder_is_causal():
    """A token that changes changes nothing before it."""
    torch.manual_seed(0)
    model = randomise(mini_mi.CLIPTextModel(dict(TEXT, vocab_size=99)).eval())
    ids = torch.randint(0, 99, (1, 10))
    other = ids.clone()
    other[0, 6] = (other[0, 6] + 1) % 99
    a, b = model(ids)[0], model(other)[0]
    assert torch.allclose(a[:6], b[:6], atol=1e-6) and not torch.allclose(a[6:], b[6:], atol=1e-3)


# Autoencoder

@pytest.mark.parametrize("widths, layers, latents, attention, size", [
    ((16,), 1, 4, True, (7, 5)), ((16, 32), 2, 3, True, (14, 10)), ((8, 16, 16, 32), 1, 4, True, (56, 40)),
    ((8, 8, 16, 16), 2, 4, False, (72, 96))])
def test_autoencoder_equals_diffusers(widths, layers, latents, attention, size):
    """1, 2 and 4 levels, 1 and 2 layers, with and without attention, batch 2, latent grids 7x5 and 9x12."""
    reference = diffusers.AutoencoderKL(
        block_out_channels=widths, down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths), layers_per_block=layers, latent_channels=latents,
        norm_num_groups=8, mid_block_add_attention=attention, scaling_factor=0.3)
    randomise(reference.eval())
    ours = ours_like(mini_mi.AutoencoderKL, reference, dict(reference.config))
    assert ours.scaling_factor == 0.3 and ours.factor == 2 ** (len(widths) - 1)
    torch.manual_seed(1)
    x = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        there = reference.encode(x).latent_dist
        mean, logvar = ours.encode(x)
        assert mean.shape == (2, latents, size[0] // ours.factor, size[1] // ours.factor)
        assert relative(mean, there.mean) < CLOSE and relative(logvar, there.logvar) < CLOSE
        z = torch.randn_like(mean)
        assert relative(ours.decode(z), reference.decode(z).sample) < CLOSE


def test_logvar_is_clamped():
    """A wild encoder cannot give a variance that overflows."""
    torch.manual_seed(0)
    model = mini_mi.AutoencoderKL(VAE)
    with torch.no_grad():
        model.quant_conv.bias[4:6], model.quant_conv.bias[6:] = 1e4, -1e4
        logvar = model.encode(torch.zeros(1, 3, 16, 16))[1]
    assert (logvar[:, :2] == 20).all() and (logvar[:, 2:] == -30).all()


# UNet

TWO = dict(down_block_types=["CrossAttnDownBlock3D", "DownBlock3D"],
           up_block_types=["UpBlock3D", "CrossAttnUpBlock3D"], block_out_channels=[32, 64])
FOUR = dict(down_block_types=["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
            up_block_types=["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3, block_out_channels=[16, 32, 32, 64])
INNER = dict(down_block_types=["DownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D"],
             up_block_types=["CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"],
             block_out_channels=[16, 32, 48])


@pytest.mark.parametrize("levels, layers, head_dim, groups, batch, frames, grid", [
    (TWO, 1, 8, 8, 2, 5, (7, 5)), (TWO, 2, 16, 32, 1, 1, (9, 12)), (FOUR, 1, 8, 8, 3, 3, (9, 12)),
    (FOUR, 2, 16, 16, 2, 4, (8, 16)), (FOUR, 1, 16, 4, 1, 1, (7, 5)), (INNER, 2, 8, 8, 2, 6, (7, 5)),
    (TWO, 1, 16, 16, 1, 24, (3, 1))])
def test_unet_equals_diffusers(levels, layers, head_dim, groups, batch, frames, grid):
    """2 to 4 levels, grids that are no multiples of 8, one frame and many, a timestep for each sample."""
    torch.manual_seed(0)
    reference = diffusers.UNet3DConditionModel(**levels, layers_per_block=layers, cross_attention_dim=24,
                                               attention_head_dim=head_dim, norm_num_groups=groups)
    randomise(reference.eval())  # conv4 of the temporal convolutions, too, which begins at zero
    assert all(m.conv4[-1].weight.std() > 0.05 for m in reference.modules() if hasattr(m, "conv4"))
    ours = ours_like(mini_mi.UNet3DConditionModel, reference, dict(reference.config))
    x, text = torch.randn(batch, 4, frames, *grid), torch.randn(batch, 7, 24)
    each = torch.tensor([3, 777, 500])[:batch]
    with torch.no_grad():
        there = reference(x, each, text).sample
        assert relative(ours(x, each, text), there) < CLOSE
        # A batch is nothing but its samples, and a timestep may also be a plain number.
        assert relative(ours(x[-1:], int(each[-1]), text[-1:]), there[-1:]) < CLOSE


def test_unet_takes_latents_in_any_order_in_memory(models):
    """Those of encode_video lie channels last: the same answer, in the same order."""
    x = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    text = mini_mi.encode_prompt(models, ["a red star"])
    other = x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    assert other.stride() != x.stride()
    with torch.no_grad():
        a, b = (models.unet(latents, 7, text) for latents in (x, other))
    assert a.stride() == b.stride() and torch.equal(a, b)


def test_unet_gradients_equal_diffusers():
    """With respect to the input and to a weight of the temporal attention."""
    torch.manual_seed(0)
    reference = randomise(diffusers.UNet3DConditionModel(**UNET).eval())
    ours = ours_like(mini_mi.UNet3DConditionModel, reference, dict(reference.config))
    x, text, grads = torch.randn(1, 4, 3, 3, 2), torch.randn(1, 7, 32), []
    for model in (ours, reference):
        y = x.clone().requires_grad_()
        out = model(y, 40, text)
        (out if torch.is_tensor(out) else out.sample).square().mean().backward()
        weight = model.get_parameter("down_blocks.0.temp_attentions.0.transformer_blocks.0.attn2.to_q.weight")
        grads.append((y.grad, weight.grad))
    for a, b in zip(*grads):
        assert relative(a, b) < CLOSE


def test_zeroscope_geometry():
    """Full size, without memory for it: the defaults are ZeroScope's."""
    with torch.device("meta"):
        ours, reference = mini_mi.UNet3DConditionModel({}), diffusers.UNet3DConditionModel()
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in reference.state_dict().items()}
    assert len(shapes) == 1480 and sum(p.numel() for p in ours.parameters()) == 1_411_233_860


def test_checkpointing_gives_the_same_gradients():
    """Recomputing parts of layers in backward changes memory and time, not numbers."""
    torch.manual_seed(0)
    unet = randomise(mini_mi.UNet3DConditionModel(UNET)).eval().requires_grad_(False)
    x, text, grads = torch.randn(1, 4, 3, 2, 2), torch.randn(1, 7, 32), []
    motion = randomise(mini_mi.MotionEmbeddings(unet, 3, 2, 2)).train()
    calls = []
    # One part of each kind, after the first embeddings: what comes before them needs no backward.
    for part in (unet.down_blocks[0].temp_attentions[0], unet.down_blocks[1].resnets[0],
                 unet.up_blocks[1].attentions[0]):
        part.register_forward_pre_hook(lambda part, _: calls.append(part))
    for checkpointing in (False, True):
        calls.clear()
        motion.zero_grad()
        unet(x, 500, text, motion, checkpointing).square().mean().backward()
        grads.append([p.grad.clone() for p in motion.parameters()])
        assert len(calls) == len(set(calls)) * (2 if checkpointing else 1) and len(set(calls)) == 3
    for a, b in zip(*grads):
        assert b.norm() > 0 and relative(a, b) < 1e-6


# DDIM

@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("schedule, offset, T", [("linear", 0, 1000), ("scaled_linear", 1, 1000),
                                                 ("scaled_linear", 0, 300)])
def test_ddim_trajectory_equals_diffusers(prediction, to_one, schedule, offset, T):
    """Whole trajectories of 1, 7 and 50 steps, with an answer of the model that depends on x and t."""
    reference = diffusers.DDIMScheduler(
        num_train_timesteps=T, beta_start=0.00085, beta_end=0.012, beta_schedule=schedule, clip_sample=False,
        set_alpha_to_one=to_one, steps_offset=offset, prediction_type=prediction)
    ours = mini_mi.DDIMScheduler(dict(reference.config))
    assert relative(ours.alphas_cumprod, reference.alphas_cumprod) < 1e-6

    def model(x, t):
        return torch.tanh(x * 0.9 + float(t) / T)

    for n in (1, 7, 50):
        reference.set_timesteps(n)
        assert ours.timesteps(n).tolist() == reference.timesteps.tolist()
        a = b = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(n))
        for t in ours.timesteps(n):
            a = ours.step(model(a, t), int(t) if n == 7 else t, a, n)
            b = reference.step(model(b, t), t, b).prev_sample
            assert relative(a, b) < CLOSE


@pytest.mark.parametrize("kind, fields", [
    ("PNDMScheduler", dict(steps_offset=1, skip_prk_steps=True)), ("DDPMScheduler", dict(clip_sample=False)),
    ("DPMSolverMultistepScheduler", dict(prediction_type="v_prediction", thresholding=False)),
    ("EulerDiscreteScheduler", dict(steps_offset=1, num_train_timesteps=500)), ("LMSDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", dict(timestep_spacing="trailing")),
    ("UniPCMultistepScheduler", dict(steps_offset=1)), ("DEISMultistepScheduler", {}),
    ("HeunDiscreteScheduler", {})])
def test_schedulers_of_other_classes_are_taken_by_their_noise_schedule(kind, fields):
    """As diffusers' from_config does, and then sampled by DDIM as ever: leading spacing, no clipping."""
    other = getattr(diffusers, kind)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                     **fields)
    config = json.loads(other.to_json_string())  # as it lies in a model folder
    reference = diffusers.DDIMScheduler.from_config(dict(config), clip_sample=False, thresholding=False,
                                                    timestep_spacing="leading")
    assert config["_class_name"] == kind
    ours = mini_mi.DDIMScheduler(config)
    assert relative(ours.alphas_cumprod, reference.alphas_cumprod) < 1e-6
    assert ours.v_prediction == (reference.config.prediction_type == "v_prediction")
    reference.set_timesteps(20)
    assert ours.timesteps(20).tolist() == reference.timesteps.tolist()
    a = b = torch.randn(1, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    for t in ours.timesteps(20):
        a, b = ours.step(a.tanh(), t, a, 20), reference.step(b.tanh(), t, b).prev_sample
        assert relative(a, b) < CLOSE


def test_schedulers_without_betas_are_refused():
    """Flow matching has another noise schedule altogether."""
    config = json.loads(diffusers.FlowMatchEulerDiscreteScheduler().to_json_string())
    with pytest.raises(mini_mi.UserError, match="FlowMatchEulerDiscreteScheduler"):
        mini_mi.DDIMScheduler(config)
    config = json.loads(diffusers.PNDMScheduler(beta_schedule="squaredcos_cap_v2").to_json_string())
    with pytest.raises(mini_mi.UserError, match="beta_schedule"):
        mini_mi.DDIMScheduler(config)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noising_and_targets_equal_diffusers(prediction):
    """A noise level for each sample."""
    reference = diffusers.DDIMScheduler(**{**SCHEDULER, "prediction_type": prediction})
    ours = mini_mi.DDIMScheduler(dict(reference.config))
    torch.manual_seed(0)
    x, noise, t = torch.randn(3, 4, 2, 5, 5), torch.randn(3, 4, 2, 5, 5), torch.tensor([0, 500, 999])
    assert relative(ours.add_noise(x, noise, t), reference.add_noise(x, noise, t)) < 1e-6
    target = noise if prediction == "epsilon" else reference.get_velocity(x, noise, t)
    assert relative(ours.target(x, noise, t), target) < 1e-6
    assert relative(ours.epsilon(target, t, ours.add_noise(x, noise, t)), noise) < 1e-5


def test_steps_that_leave_the_schedule_are_refused():
    """offset 1 and 1000 steps ask for timestep 1000 of 0 to 999."""
    scheduler = mini_mi.DDIMScheduler(SCHEDULER)
    assert scheduler.timesteps(999)[0] == 999
    for n in (1000, 1001, 0, -3, 501, 600, 334):         # of the last three the first would be 501 to 667
        with pytest.raises(mini_mi.UserError):
            scheduler.timesteps(n)
    assert [scheduler.timesteps(n)[0] for n in (250, 333, 400, 500, 750)] == [997, 997, 799, 999, 750]
    scheduler = mini_mi.DDIMScheduler(dict(SCHEDULER, steps_offset=0))
    assert scheduler.timesteps(1000).tolist() == list(range(999, -1, -1))


# Configs and files

KINDS = {"text": (mini_mi.CLIPTextModel, TEXT), "vae": (mini_mi.AutoencoderKL, VAE),
         "unet": (mini_mi.UNet3DConditionModel, UNET), "scheduler": (mini_mi.DDIMScheduler, SCHEDULER)}


@pytest.mark.parametrize("kind, field, value", [
    ("text", "hidden_act", "relu"), ("vae", "act_fn", "gelu"), ("vae", "shift_factor", 0.1),
    ("vae", "latents_mean", [0.0] * 4), ("vae", "use_quant_conv", False),
    ("vae", "down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
    ("unet", "act_fn", "gelu"), ("unet", "time_cond_proj_dim", 32), ("unet", "num_attention_heads", 4),
    ("unet", "down_block_types", ["CrossAttnDownBlock2D", "DownBlock3D"]),
    ("unet", "up_block_types", ["CrossAttnUpBlock3D", "UpBlock3D"]), ("unet", "block_out_channels", [32]),
    ("scheduler", "beta_schedule", "squaredcos_cap_v2"), ("scheduler", "prediction_type", "sample"),
    ("scheduler", "clip_sample", True), ("scheduler", "timestep_spacing", "trailing"),
    ("scheduler", "thresholding", True), ("scheduler", "rescale_betas_zero_snr", True)])
def test_values_that_are_not_implemented_are_refused(kind, field, value):
    """The message names the field."""
    build, config = KINDS[kind]
    with torch.device("meta"):
        build(config)
        with pytest.raises(mini_mi.UserError, match=field):
            build({**config, field: value})


@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_nobody_knows_are_ignored(kind):
    """What adds weights is caught by the strict load."""
    build, config = KINDS[kind]
    with torch.device("meta"):
        build({**config, "_anything": 1, "transformers_version": "4.30", "sample_size": 64,
               "use_magic": True})


def test_a_pipeline_saved_by_diffusers_loads(tmp_path, tiny_random):
    """Every file is written by the reference libraries; all parts give what they give."""
    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny_random / "tokenizer")
    config = transformers.CLIPTextConfig(**TEXT, vocab_size=len(tokenizer))
    text = randomise(transformers.CLIPTextModel(config))
    vae, unet = diffusers.AutoencoderKL(**VAE), diffusers.UNet3DConditionModel(**UNET)
    pipe = diffusers.TextToVideoSDPipeline(randomise(vae), text.eval(), tokenizer, randomise(unet).eval(),
                                           diffusers.DDIMScheduler(**SCHEDULER))
    pipe.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "tokenizer")  # transformers 5 writes another form
    shutil.copytree(tiny_random / "tokenizer", tmp_path / "saved" / "tokenizer")
    models = mini_mi.load_models(tmp_path / "saved")
    assert not any(p.requires_grad for p in models.unet.parameters()) and not models.unet.training
    prompts, x = ["a red star", ""], torch.randn(2, 4, 3, 4, 4)
    ids = tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        states = text(ids).last_hidden_state
        assert relative(mini_mi.encode_prompt(models, prompts), states) < CLOSE
        assert relative(mini_mi.predict(models, x, 9, states), pipe.unet(x, 9, states).sample) < CLOSE
        z = torch.randn(1, 4, 3, 4, 4)
        frames = pipe.vae.decode(z[0].transpose(0, 1) / 0.18215).sample.clamp(-1, 1)
        assert relative(mini_mi.decode_video(models, z)[0].transpose(0, 1), frames) < CLOSE


@pytest.fixture
def copy(tmp_path, tiny_random):
    """A copy of the model folder that a test may spoil."""
    return shutil.copytree(tiny_random, tmp_path / "model")


def test_old_keys_of_the_autoencoder_load(copy, models):
    """Files from before mid-2023 name its attention query, key, value and proj_attn."""
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in mini_mi.load_tensors(path).items():
        for new, before in names.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[key] = value.clone()
    assert sum("proj_attn" in key for key in old) == 4
    path.unlink()
    torch.save(old, path.with_suffix(".bin"))
    again = mini_mi.load_models(copy).vae.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in models.vae.state_dict().items())


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_keys_of_the_text_encoder_load_with_and_without_prefix(copy, models, prefix):
    """transformers 5 drops the prefix; before 4.31 a buffer position_ids was stored."""
    path = copy / "text_encoder" / "model.safetensors"
    tensors = {key.replace("text_model.", prefix): v.clone() for key, v in mini_mi.load_tensors(path).items()}
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(16)[None]
    path.unlink()
    torch.save(tensors, path.with_name("pytorch_model.bin"))
    again = mini_mi.load_models(copy).text_encoder.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in models.text_encoder.state_dict().items())


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("conv_in.bias"), "Missing key.*conv_in.bias"),
    (lambda t: t.update({"extra.weight": torch.zeros(1)}), "Unexpected key.*extra.weight"),
    (lambda t: t.update({"conv_in.bias": torch.zeros(7)}), "size mismatch for conv_in.bias.*7.*32")])
def test_weights_that_do_not_fit_are_refused(copy, change, words):
    """The message names the first bad keys."""
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {key: value.clone() for key, value in mini_mi.load_tensors(path).items()}
    change(tensors)
    mini_mi.save_safetensors(path, tensors)
    with pytest.raises(mini_mi.UserError, match=f"unet is .*does not fit its config.json .*{words}") as caught:
        mini_mi.load_models(copy)
    assert "\n" not in str(caught.value)


def test_half_precision_weights_load_as_asked(copy, models):
    """The shipped weights are float16; the networks compute in the dtype that was asked for."""
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    mini_mi.save_safetensors(path, {key: value.half() for key, value in mini_mi.load_tensors(path).items()})
    for dtype in (torch.float32, torch.bfloat16):
        again = mini_mi.load_models(copy, dtype=dtype)
        assert again.dtype == dtype and again.vae.decoder.conv_in.weight.dtype == torch.float32
    config = json.loads((copy / "unet" / "config.json").read_text())
    assert again.unet.config == config and SPECIAL["pad_token"] == "<|endoftext|>"
