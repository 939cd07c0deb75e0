"""The layers by themselves, against torch's own and against the ops they call."""

import re

import pytest
import torch
from torch import nn

import swinops
from swinops.benchmarks.models import randomise
from swinops.nn import AddLayerNorm, LayerNorm, PatchEmbed, PatchMerging, PatchMergingV2, SwinBlock, WindowAttention
from swinops.testing import assert_op_accurate, random_tensor


def test_layer_norm_is_torchs():
    ours, torchs = LayerNorm(24, eps=1e-3), nn.LayerNorm(24, eps=1e-3)
    torchs.load_state_dict(randomise(ours).state_dict())
    x = random_tensor((3, 5, 24), 0)
    assert_op_accurate(ours, lambda x: torchs.to(x.dtype)(x), {"x": x}, random_tensor(x.shape, 1))
    assert repr(ours) == repr(torchs)


@pytest.mark.parametrize("scaled", [False, True])
def test_add_layer_norm_is_a_sum_and_torchs(scaled):
    ours, torchs = randomise(AddLayerNorm(24)), nn.LayerNorm(24)
    torchs.load_state_dict(ours.state_dict())
    x, f = random_tensor((2, 3, 4, 24), 0), random_tensor((2, 3, 4, 24), 1)
    scale = torch.tensor([0.0, 1.25]) if scaled else None
    s, y = ours(x, f, scale)
    expected = x + f if scale is None else x + scale.view(-1, 1, 1, 1) * f
    torch.testing.assert_close(s, expected)
    torch.testing.assert_close(y, torchs(s))


def test_window_attention_of_a_volume():
    """Three axes, shifted where the window is smaller than the volume, as in Video Swin."""
    layer = randomise(WindowAttention(8, 2, (2, 4, 4), (1, 2, 2)))
    x = random_tensor((2, 2, 6, 9, 8), 0)
    qkv = layer.qkv(x).unflatten(-1, (3, 2, 4))
    bias = swinops.relative_position_bias(layer.relative_position_bias_table, (2, 4, 4))
    out = swinops.window_attention_qkvpacked(
        qkv, bias, window_size=(2, 4, 4), shift_size=(0, 2, 2), pad_kv=layer.qkv.bias.view(3, 2, 4)[1:]
    )
    assert torch.equal(layer(x), layer.proj(out.flatten(-2)))


def test_window_attention_without_bias():
    """Pads are keys of zeros then."""
    layer = WindowAttention(8, 2, 4, qkv_bias=False)
    x = random_tensor((1, 3, 5, 8), 0)
    padded = nn.functional.pad(x, (0, 0, 0, 3, 0, 1))
    torch.testing.assert_close(layer(x), layer(padded)[:, :3, :5])


def test_patch_embed_pads():
    layer = randomise(PatchEmbed(4, 3, 8))
    x = random_tensor((2, 3, 10, 7), 0)
    padded = nn.functional.pad(x, (0, 1, 0, 2))
    expected = layer.norm(layer.proj(padded).permute(0, 2, 3, 1))
    assert torch.equal(layer(x), expected)
    assert expected.shape == (2, 3, 2, 8)


def test_patch_embed_channels_last():
    layer = randomise(PatchEmbed(4, 3, 8))
    x = random_tensor((2, 3, 8, 8), 0)
    torch.testing.assert_close(
        layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), layer(x)
    )


@pytest.mark.parametrize("merging", [PatchMerging, PatchMergingV2])
def test_patch_merging_order(merging):
    """A merged token holds its upper left token, the one below, the one to the right, and the last; odd sizes pad.

    Projected by the identity, it does not tell whether the norm or the projection comes first: test_models does.
    """
    layer = merging(2, 8)
    with torch.no_grad():
        layer.reduction.weight.copy_(torch.eye(8))
    x = random_tensor((1, 3, 4, 2), 0)
    padded = nn.functional.pad(x, (0, 0, 0, 0, 0, 1))
    y = layer(x)
    assert y.shape == (1, 2, 2, 8)
    for h, w in ((0, 0), (0, 1), (1, 0), (1, 1)):
        tokens = [padded[0, 2 * h + i, 2 * w + j] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
        torch.testing.assert_close(y[0, h, w], nn.functional.layer_norm(torch.cat(tokens), (8,)))


@pytest.mark.parametrize(
    "window, error, sentence",
    [
        ((7,), ValueError, "window_size must be an int or two or three ints, got (7,)"),
        (7.5, TypeError, "window_size must be an int or one int for each of the 2 spatial axes, got 7.5"),
        ((4, 0), ValueError, "window_size must be at least 1 on each of the 2 spatial axes, got (4, 0)"),
    ],
)
def test_rejects_bad_windows(window, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        WindowAttention(8, 2, window)


def test_rejects_tokens_without_an_image():
    with pytest.raises(ValueError, match=re.escape("x must be [B, *2 spatial axes, C], got (2, 16, 8)")):
        SwinBlock(8, 2, 4)(torch.ones(2, 16, 8))
