"""What the tests share: import paths, deterministic numbers, a byte-pair vocabulary, a small model folder."""

import collections
import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# pytest.ini starts two processes: a thread for each of them and for the programs that they start. torch reads
# this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import pytest  # noqa: E402
import torch  # noqa: E402

import mini_mi  # noqa: E402

SLOWEST_FIRST = ["test_tiny", "test_eval_run", "test_cli", "test_parity", "test_ballot"]


def pytest_collection_modifyitems(items):
    """Long files first: at the end no process waits for a long one that another has just begun."""
    rank = {name: n for n, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


# A four-level autoencoder (factor 8) and a two-level UNet with attention at both levels.
VAE = dict(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=[16, 16, 32, 32],
           down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
           layers_per_block=1, norm_num_groups=8)
UNET = dict(in_channels=4, out_channels=4, down_block_types=["CrossAttnDownBlock3D", "DownBlock3D"],
            up_block_types=["UpBlock3D", "CrossAttnUpBlock3D"], block_out_channels=[32, 64],
            layers_per_block=1,
            cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8, sample_size=4)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, hidden_act="quick_gelu")
SCHEDULER = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                 steps_offset=1, set_alpha_to_one=False, clip_sample=False, prediction_type="epsilon")
SPECIAL = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>",
               pad_token="<|endoftext|>")


def hashed(shape, j):
    """Numbers in [-1, 1) that depend on `j` alone; the golden files were made with them."""
    shape = tuple(shape)
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) + (j + 1) * 1000003
    x = x * 2654435761 % 2**32
    x = (x ^ (x >> 16)) * 73244475 % 2**32
    x = x ^ (x >> 16)
    return ((x.double() / 2**32 - 0.5) * 2).float().reshape(shape)


def train_bpe(text, merges):
    """(vocab, merges) as CLIP has them: bytes, bytes that end a word, merges, then the two special tokens."""
    alphabet = mini_mi.byte_alphabet()
    words = collections.Counter()
    for word in mini_mi.CLIPTokenizer.WORDS.findall(mini_mi.CLIPTokenizer.clean(text)):
        letters = [alphabet[b] for b in word.encode()]
        words[(*letters[:-1], letters[-1] + "</w>")] += 1
    found = []
    while len(found) < merges:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        found.append(best)
        for word in [w for w in words if best in zip(w, w[1:])]:
            joined, i = [], 0
            while i < len(word):
                width = 2 if word[i:i + 2] == best else 1
                joined.append("".join(word[i:i + width]))
                i += width
            words[tuple(joined)] += words.pop(word)
    letters = list(alphabet.values())
    tokens = [*letters, *(c + "</w>" for c in letters), *map("".join, found), "<|startoftext|>",
              "<|endoftext|>"]
    return {token: n for n, token in enumerate(dict.fromkeys(tokens))}, found


def write_tokenizer(folder, vocab, merges, length, special=SPECIAL):
    """The four files of a tokenizer folder."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(model_max_length=length, **special)))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def randomise(module, seed=0, scale=0.1):
    """Moves every parameter off its initial value: zero biases and unit norms would hide a missing one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=generator)
    return module


def relative(a, b):
    """||a - b|| / ||b||"""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).detach().double().norm() / b.detach().double().norm())


def hollow(config):
    """A UNet without memory for weights: embeddings ask it for its blocks alone."""
    with torch.device("meta"):
        return mini_mi.UNet3DConditionModel(config)


def write_model(folder, seed=0, unet=UNET):
    """A random-weight text-to-video model in diffusers layout, without help of diffusers."""
    torch.manual_seed(seed)
    vocab, merges = train_bpe("a red star on a blue striped background, a green circle on white " * 3, 60)
    write_tokenizer(folder / "tokenizer", vocab, merges, TEXT["max_position_embeddings"])
    text = dict(TEXT, vocab_size=len(vocab))
    for name, build, config, stem in (
            ("text_encoder", mini_mi.CLIPTextModel, text, "model"),
            ("vae", mini_mi.AutoencoderKL, VAE, "diffusion_pytorch_model"),
            ("unet", mini_mi.UNet3DConditionModel, unet, "diffusion_pytorch_model")):
        module = randomise(build(config), seed, 0.05)
        mini_mi.save_safetensors(folder / name / f"{stem}.safetensors", module.state_dict())
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "TextToVideoSDPipeline"}))
    return folder


@pytest.fixture(scope="session")
def det():
    """`det(shape, j)`: the formula of the golden files."""
    return hashed


@pytest.fixture(scope="session")
def tiny_random(tmp_path_factory):
    """Folder of a small model with random weights."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny_random")


@pytest.fixture(scope="session")
def models(tiny_random):
    """The loaded `tiny_random`."""
    return mini_mi.load_models(tiny_random)
