"""eval_mi.py from end to end, on a model of random weights that is small enough for seconds."""
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_mi
import mini_mi
from data import world

ROOT = Path(eval_mi.__file__).parent
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
           "pad_token": "<|endoftext|>"}
TEXT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=514,
            max_position_embeddings=48, eos_token_id=513)
VAE = dict(block_out_channels=[8, 8, 8, 8], down_block_types=["DownEncoderBlock2D"] * 4,
           up_block_types=["UpDecoderBlock2D"] * 4, norm_num_groups=4, scaling_factor=1.0)
UNET = dict(down_block_types=["CrossAttnDownBlock3D", "DownBlock3D"],
            up_block_types=["UpBlock3D", "CrossAttnUpBlock3D"], block_out_channels=[8, 16], layers_per_block=1,
            cross_attention_dim=16, attention_head_dim=8, norm_num_groups=4)
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                 set_alpha_to_one=False, clip_sample=False)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_tokenizer(folder):
    """Byte-level: no merges, so that every caption of the world becomes single letters."""
    letters = list(mini_mi.byte_alphabet().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    write_json(folder / "special_tokens_map.json", SPECIAL)
    write_json(folder / "tokenizer_config.json", {"model_max_length": 48})


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder in the layout of data/tiny, with its own CLIP."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=64,
                  patch_size=16)
    clip = dict(text_config=TEXT, vision_config=vision, projection_dim=8)
    parts = {"text_encoder": (mini_mi.CLIPTextModel, TEXT, "model"), "clip": (eval_mi.CLIPModel, clip, "model"),
             "vae": (mini_mi.AutoencoderKL, VAE, "diffusion_pytorch_model"),
             "unet": (mini_mi.UNet3DConditionModel, UNET, "diffusion_pytorch_model")}
    for name, (build, config, stem) in parts.items():
        write_json(folder / name / "config.json", config)
        mini_mi.save_safetensors(folder / name / f"{stem}.safetensors", build(config).state_dict())
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "clip")
    return folder


SMALL = ["--clip-count", "3", "--prompt-count", "1", "--seed-count", "2", "--steps", "2", "--sample-steps", "2",
         "--invert-steps", "2", "--together", "2", "--frames", "4", "--grid", "8", "--device", "cpu",
         "--clips", str(ROOT / "data" / "clips")]


def arguments(model, out, *more):
    return ["--model", str(model), "--out", str(out), *SMALL, *more]
