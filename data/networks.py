"""The networks that judge: CLIP and Inception, with the keys of the published weight files.

Letters: B batch, F frames, h w pixels, s side of CLIP's picture, D feature width, L tokens. Checked against
transformers and pytorch-fid, to 1e-4 (tests/test_clip_inception.py).
"""

import collections
import functools
import re
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import nn

import mini_mi
from mini_mi import UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIPVisionTransformer(nn.Module):
    """Patches and a class token through bidirectional layers: pixels (B,3,s,s) -> the class token (B,D)."""

    def __init__(self, config):
        super().__init__()
        c = mini_mi.read_config(
            "CLIP image tower", config, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, image_size=224, patch_size=32, layer_norm_eps=1e-5,
            only={"hidden_act": tuple(mini_mi.ACTIVATIONS), "num_channels": 3})
        self.image_size, tokens = c.image_size, (c.image_size // c.patch_size) ** 2 + 1
        self.embeddings = nn.ModuleDict({
            "patch_embedding": nn.Conv2d(3, c.hidden_size, c.patch_size, stride=c.patch_size, bias=False),
            "position_embedding": nn.Embedding(tokens, c.hidden_size)})
        self.embeddings.class_embedding = nn.Parameter(torch.randn(c.hidden_size) * 0.02)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)        # sic: the published key
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(mini_mi.CLIPEncoderLayer(c, causal=False)
                                                              for _ in range(c.num_hidden_layers))})
        self.post_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.02)

    def forward(self, pixels):
        patches = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)    # (B, patches, D)
        first = self.embeddings.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.embeddings.position_embedding.weight
        x = self.pre_layrnorm(x)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x[:, 0])


class CLIPModel(nn.Module):
    """Pictures and texts as unit vectors in one space; config and keys as in transformers' CLIPModel.
    Source: Radford et al., arXiv 2103.00020. The text tower and its layers are mini_mi's.
    """

    def __init__(self, config):
        super().__init__()
        text, width = config.get("text_config", {}), config.get("projection_dim", 512)
        self.eos_token_id = text.get("eos_token_id", 49407)
        self.text_model = mini_mi.CLIPTextModel(text).text_model
        self.vision_model = CLIPVisionTransformer(config.get("vision_config", {}))
        self.text_projection, self.visual_projection = (
            nn.Linear(len(norm.weight), width, bias=False)
            for norm in (self.text_model.final_layer_norm, self.vision_model.post_layernorm))
        self.logit_scale = nn.Parameter(torch.tensor(config.get("logit_scale_init_value", 2.6592)))

    def image_features(self, pixels):
        """pixels (B,3,s,s), normalised by CLIP's mean and std -> (B,D) unit vectors"""
        return nnf.normalize(self.visual_projection(self.vision_model(pixels)), dim=-1)

    def text_features(self, ids):
        """ids (B,L) -> (B,D) unit vectors, read at the end-of-text token"""
        states = self.text_model(ids)
        # Files of 2021 and 2022 say eos_token_id = 2, which is wrong for their vocabulary; for these,
        # transformers takes the largest id, the end-of-text token. Later files name it: its first place.
        end = ids.argmax(1) if self.eos_token_id == 2 else (ids == self.eos_token_id).int().argmax(1)
        return nnf.normalize(self.text_projection(states[torch.arange(len(ids)), end]), dim=-1)


def clip_folder(name):
    """The folder of a CLIP: a path, or what the hub repository `name` (owner/name) holds, fetched once."""
    return Path(name) if Path(name).is_dir() else mini_mi.fetch(name, "")


def load_clip(name, device="cpu"):
    """A CLIP folder in HF layout, or a hub repository -> (model, tokenizer, preprocess).
    preprocess: frames (F,h,w,3) uint8 -> pixels (F,3,s,s): bicubic to s on the short side, centre crop,
    CLIP's mean and std. It rounds to 8 bits after resizing, as CLIP's own code for PIL pictures does.
    """
    folder = clip_folder(name)
    model = mini_mi.load_module(CLIPModel, folder, "model", device, torch.float32)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))

    def preprocess(frames):
        """frames (F,h,w,3) uint8 -> pixels (F,3,s,s) float32, normalised"""
        x = torch.as_tensor(frames).to(device).permute(0, 3, 1, 2).float()
        s, (height, width) = model.vision_model.image_size, x.shape[-2:]
        size = (s, int(s * width / height)) if height <= width else (int(s * height / width), s)
        if size != (height, width):
            x = nnf.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
        top, left = (size[0] - s) // 2, (size[1] - s) // 2
        return (x[..., top:top + s, left:left + s].round().clamp(0, 255) / 255 - mean) / std

    with mini_mi.built_from(folder):
        tokenizer = mini_mi.CLIPTokenizer.from_pretrained(folder)
    return model, tokenizer, preprocess


# Inception's modules in order, and their branches; the names are those of the weight file. A branch is a
# chain of layers CHANNELS:KERNEL; KERNEL/STRIDE has no padding, a KERNEL alone keeps the size, | forks one.
# A block with the branch _pool pools before it; one without halves the size, its pool is a branch of its own.
MIXED_5 = "1x1 64:1, 5x5 48:1 64:5, 3x3dbl 64:1 96:3 96:3, _pool {}:1"
MIXED_6 = ("1x1 192:1, 7x7 {0}:1 {0}:1x7 192:7x1, 7x7dbl {0}:1 {0}:7x1 {0}:1x7 {0}:7x1 192:1x7, "
           "_pool 192:1")                           # a 7x7 convolution as two of 1x7 and 7x1
MIXED_7 = "1x1 320:1, 3x3 384:1 384:1x3|384:3x1, 3x3dbl 448:1 384:3 384:1x3|384:3x1, _pool 192:1"
INCEPTION = {
    "Conv2d_1a_3x3": "32:3/2", "Conv2d_2a_3x3": "32:3/1", "Conv2d_2b_3x3": "64:3",
    "Conv2d_3b_1x1": "80:1", "Conv2d_4a_3x3": "192:3/1",
    "Mixed_5b": MIXED_5.format(32), "Mixed_5c": MIXED_5.format(64), "Mixed_5d": MIXED_5.format(64),
    "Mixed_6a": "3x3 384:3/2, 3x3dbl 64:1 96:3 96:3/2",
    **{f"Mixed_6{name}": MIXED_6.format(width) for name, width in zip("bcde", (128, 160, 160, 192))},
    "Mixed_7a": "3x3 192:1 320:3/2, 7x7x3 192:1 192:1x7 192:7x1 192:3/2",
    "Mixed_7b": MIXED_7, "Mixed_7c": MIXED_7}


def inception_branches(table):
    """A row of the table -> (branch, its layers as dicts of key -> CHANNELS:KERNEL, two where it forks)"""
    for name, *layers in (branch.split() for branch in table.split(", ")):
        ends = [f"_{n}" for n in range(1, len(layers) + 1)] if len(layers) > 1 else [""]
        yield name, [{f"branch{name}{end}{fork}": part for fork, part in zip(
            "ab" if "|" in layer else [""], layer.split("|"))} for end, layer in zip(ends, layers)]


def inception_conv(c_in, layer):
    """Convolution, BatchNorm, ReLU."""
    channels, kernel, stride = re.fullmatch(r"(\d+):(\w+)/?(\d*)", layer).groups()
    sides = [int(side) for side in kernel.split("x")] * (1 if "x" in kernel else 2)
    conv = nn.Conv2d(c_in, int(channels), sides, int(stride or 1), bias=False,
                     padding=0 if stride else [side // 2 for side in sides])
    named = {"conv": conv, "bn": nn.BatchNorm2d(int(channels), eps=0.001), "relu": nn.ReLU()}
    return nn.Sequential(collections.OrderedDict(named))


class InceptionV3(nn.Module):
    """The network of FID: x (B,3,h,w) in [0,1] -> pooled features (B,2048).

    Weights: pt_inception-2015-12-05, the FID paper's TensorFlow network ported by pytorch-fid; its keys. Not
    torchvision's: averages ignore padding, the last block pools by maximum, 1008 classes.
    """

    URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
           "pt_inception-2015-12-05-6726825d.pth")

    def __init__(self):
        super().__init__()
        width = 3
        for name, table in INCEPTION.items():
            if name.startswith("Conv2d"):
                self.add_module(name, inception_conv(width, table))
                width = self.get_submodule(name).conv.out_channels
                continue
            block, widths = nn.ModuleDict(), [] if "_pool" in table else [width]
            for _, chain in inception_branches(table):
                c = width
                for layers in chain:
                    block.update({key: inception_conv(c, layer) for key, layer in layers.items()})
                    c = sum(block[key].conv.out_channels for key in layers)
                widths.append(c)
            self.add_module(name, block)
            width = sum(widths)
        self.fc = nn.Linear(width, 1008)                                # in the file, not in the features

    @classmethod
    @functools.cache
    def pretrained(cls, device="cpu"):
        """The published weights, fetched once and checked against the SHA-256 in their name."""
        try:
            tensors = torch.hub.load_state_dict_from_url(cls.URL, map_location="cpu", check_hash=True,
                                                         weights_only=True)
        except (OSError, RuntimeError) as e:                       # no network; or another hash
            raise UserError(f"cannot fetch {cls.URL} ({e}): check the network") from None
        model = cls()
        model.load_state_dict(tensors)
        return model.to(device).eval().requires_grad_(False)

    def forward(self, x):
        # Part of the definition, no antialiasing included: another resize, another FID (arXiv 2104.11222).
        x = 2 * nnf.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        for name, table in INCEPTION.items():
            block = self.get_submodule(name)
            if name.startswith("Conv2d"):
                x = block(x)
                x = nnf.max_pool2d(x, 3, 2) if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3") else x
                continue
            # The published network does not count the padding in its averages.
            pooled = (nnf.max_pool2d(x, 3, 2) if "_pool" not in table else nnf.max_pool2d(x, 3, 1, 1)
                      if name == "Mixed_7c" else nnf.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
            out = []
            for branch, chain in inception_branches(table):
                out.append(pooled if branch == "_pool" else x)
                for layers in chain:
                    out[-1] = torch.cat([block[key](out[-1]) for key in layers], dim=1)
            x = torch.cat(out if "_pool" in table else [*out, pooled], dim=1)
        return x.mean(dim=(2, 3))
