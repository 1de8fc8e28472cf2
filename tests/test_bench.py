"""The memory and operations that `tests/bench.py --fits` counts."""

import pytest
import torch

import bench
import mini_mi
from conftest import UNET

KIB = 1024


def test_living_tensors_are_counted_once_and_until_they_are_gone():
    a = torch.zeros(256, device="meta")                                                   # 1 KiB of float32
    with bench.LiveMemory() as memory:
        b = a + 1
        assert memory.bytes == 2 * KIB
        c = b.view(16, 16)[:, 3]
        assert memory.bytes == 2 * KIB                                        # a view takes no memory,
        del b
        assert memory.bytes == 2 * KIB                                        # and keeps that of the whole
        del c
        assert memory.bytes == KIB
        d = a.to(torch.float16)
        d.mul_(2)                                                                         # in place
        assert memory.bytes == KIB + KIB // 2
    assert memory.peak == 2 * KIB


def test_what_backward_needs_is_counted():
    """exp keeps its result, a product both of its factors; worked by hand for x -> sum(exp(x) * w)."""
    x = torch.zeros(256, device="meta", requires_grad=True)
    w = torch.zeros(256, device="meta")
    with bench.LiveMemory() as memory:
        loss = (x.exp() * w).sum()
        assert memory.bytes == 3 * KIB + 4                                    # x, exp(x), w, the sum
        loss.backward()
        assert x.grad is not None
        del loss
        assert memory.bytes == 3 * KIB                                        # x, w, the gradient
    assert memory.peak >= 4 * KIB


def test_attention_counts_no_matrix_of_all_pairs():
    heads, length, width = 2, 4096, 16
    q = torch.zeros(1, heads, length, width, device="meta", dtype=torch.float16)
    peak, operations = bench.count(lambda: mini_mi.nnf.scaled_dot_product_attention(q, q, q))
    tensor, normaliser = q.numel() * 2, heads * length * 4
    assert 2 * tensor + normaliser <= peak < 2 * tensor + normaliser + KIB
    assert operations == 2 * 2 * heads * length * length * width              # q k^T, then its product with v


def test_the_right_functions_are_back_afterwards():
    usual = mini_mi.nnf.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError):
        bench.count(lambda: 1 / 0)
    assert mini_mi.nnf.scaled_dot_product_attention is usual


def test_steps_of_a_small_model():
    """The order of their needs is known, and so is the least that each one holds."""
    config = dict(UNET, down_block_types=["CrossAttnDownBlock3D"], up_block_types=["CrossAttnUpBlock3D"],
                  block_out_channels=[32])
    needs = bench.needs(config, 3, 4, 8)
    (less, more), (train, fewer), (guided, twice), (alone, once) = needs.values()
    weights = sum(p.numel() for p in mini_mi.UNet3DConditionModel(config).parameters()) * 2
    assert weights < alone < guided < train and weights < less < train
    assert twice == pytest.approx(2 * once, rel=0.02) and 1.5 * once < fewer < more < fewer + once


@pytest.mark.parametrize("options, config, asked", [
    ([], {}, (24, 40, 72)),
    (["--size", "384x256", "--frames", "16"], {}, (16, 32, 48)),
    (["--model", str(mini_mi.HERE / "data" / "tiny"), "--size", "64x32"], bench.TINY, (24, 4, 8)),
])
def test_the_table_is_of_what_was_asked_for(options, config, asked, monkeypatch, capsys):
    """Tiny's autoencoder makes one latent of 8 x 8 pixels, as ZeroScope's does."""
    calls = []
    monkeypatch.setattr(bench, "needs", lambda *args: calls.append(args) or {"training": (3 * 2**29, 2.5e12)})
    monkeypatch.setattr("sys.argv", ["bench.py", "--fits", *options])
    bench.main()
    assert calls == [(config, *asked)]
    assert capsys.readouterr().out.splitlines()[-1].split() == ["training", "1.5", "2.5"]
