"""CLIP and Inception against the published networks, on weights that no one trained."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import eval_mi


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("eos, act", [(2, "quick_gelu"), (98, "gelu")])
def test_clip_equals_transformers(eos, act):
    """Both towers, both activations, both rules for where the text ends, with the library's complete
    config."""
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                 hidden_act=act)
    config = transformers.CLIPConfig(
        text_config=dict(**tower, vocab_size=99, max_position_embeddings=12, eos_token_id=eos,
                         bos_token_id=97),
        vision_config=dict(**tower, image_size=32, patch_size=8), projection_dim=24)
    torch.manual_seed(0)
    reference = transformers.CLIPModel(config).eval()
    for p in reference.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    ours = eval_mi.CLIPModel(config.to_dict()).eval()
    ours.load_state_dict({k: v for k, v in reference.state_dict().items() if not k.endswith("position_ids")})
    pixels = torch.randn(3, 3, 32, 32)
    ids = torch.randint(1, 97, (4, 12))
    ids[0, 5:] = 98                                    # padded by the end token itself
    ids[1, 3], ids[1, 4:] = 98, 0                      # padded by another token
    ids[2:, -1] = 98
    with torch.no_grad():
        out = reference(input_ids=ids, pixel_values=pixels)
        assert relative(ours.image_features(pixels), out.image_embeds) < 1e-4
        assert relative(ours.text_features(ids), out.text_embeds) < 1e-4


def det(shape, j):
    """The pseudo-random numbers of the golden files: a hash of the position, in [-1,1]."""
    x = (np.arange(np.prod(shape), dtype=np.int64) + (j + 1) * 1000003) * 2654435761 % 2 ** 32
    x = (x ^ x >> 16) * 73244475 % 2 ** 32
    x ^= x >> 16
    return torch.from_numpy(((x / 2 ** 32 - 0.5) * 2).astype(np.float32)).reshape(shape)


def test_inception_equals_pytorch_fid():
    """golden/inception.npz holds the features that pytorch-fid's network gave for the same weights
    and pictures."""
    golden = np.load(Path(__file__).parent / "golden" / "inception.npz")
    keys = json.loads(str(golden["meta"]))["keys"]
    model = eval_mi.InceptionV3().eval()
    ours = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert sorted(ours) == sorted(keys)
    weights = {}
    for j, key in enumerate(sorted(ours)):
        v = det(tuple(ours[key].shape), j)
        if v.ndim > 1:
            v *= (6 / np.prod(v.shape[1:])) ** 0.5
        elif key.endswith("running_var"):
            v = 1 + 0.3 * v
        elif key.endswith("weight"):
            v = 1 + 0.1 * v
        else:
            v = 0.1 * v
        weights[key] = v
    model.load_state_dict(weights)            # a file without num_batches_tracked loads, as the real one does
    with torch.no_grad():
        features = model((det((3, 3, 64, 96), 7001) + 1) / 2)
    assert relative(features, torch.from_numpy(golden["features"])) < 1e-4
