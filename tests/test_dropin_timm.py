"""timm's Swin on the kernels: the same outputs and gradients with every option, at sizes that pad and that do not."""

import numpy as np
import pytest
import torch

import swinops
from swinops.testing import assert_accurate

from . import timm_swins
from .timm_swins import FAMILIES, assert_same, count_calls, randomise, results

swin = pytest.importorskip("timm.models.swin_transformer")

# model options, and the images to run; a map is half the size of its image, and a window is 4 x 4
CASES = {
    "no pads": ({}, 16),
    "pads": ({}, (14, 10)),
    "pads on one axis": ({}, (16, 10)),
    "window of 7": ({"window_size": 7}, (28, 18)),
    "non-square window": ({"window_size": (4, 3)}, (12, 14)),
    "a window per stage": ({"window_size": ((2, 5), (4, 3)), "depths": (2, 2), "num_heads": (1, 2)}, (8, 14)),
    "shift on one axis": ({}, (8, 14)),
    "window clamped to the map": ({}, (6, 10)),
    "always_partition": ({"always_partition": True}, (6, 10)),
    "always_partition, pads": ({"always_partition": True, "window_size": (4, 7)}, (18, 10)),
    "no qkv bias": ({"qkv_bias": False}, (14, 10)),
    "head_dim": ({"head_dim": 10}, (14, 10)),
    "ragged channels": ({"embed_dim": 30}, (14, 10)),
    "any size": ({"img_size": 24, "strict_img_size": False}, (14, 18)),
    "any size, no pads": ({"img_size": 24, "strict_img_size": False}, (8, 16)),
}


def build(**options):
    """A small Swin of one stage."""
    if np.ndim(options.get("window_size", 4)) == 2 and not hasattr(swin, "resolve_stage_window_sizes"):
        pytest.skip("this version of timm has one window for all stages")
    return timm_swins.build(FAMILIES["v1"], **{"img_size": 16, "depths": (2,), "num_heads": (2,), **options})


def image(size, batch=1):
    return timm_swins.image(batch, size)


@pytest.fixture
def launches(monkeypatch):
    """Calls of the Triton backend's forward and backward."""
    import swinops.kernels

    return count_calls(monkeypatch, swinops.kernels, ("window_attention", "window_attention_backward"))


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_timm(case, launches, device):
    options, size = CASES[case]
    model, x = build(**{"img_size": size, **options}).to(device), image(size).to(device)
    with swinops.patched(model, "triton"):
        actual = results(model, x)
    blocks = sum(options.get("depths", (2,)))
    assert launches == {"window_attention": blocks, "window_attention_backward": blocks}
    assert_same(actual, model, x)


@pytest.mark.parametrize("case", CASES)
def test_reference_equals_timm(case):
    options, size = CASES[case]
    model, x = build(**{"img_size": size, **options}), image(size, batch=3)
    with swinops.patched(model, "reference"):
        actual = results(model, x)
    assert_same(actual, model, x)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_set_input_size_after_the_patch(backend, device):
    """timm replaces the table, the window, the shift and the mask."""
    model = swinops.patch(build(img_size=(14, 10)).to(device), backend)
    table = model.layers[0].blocks[1].attn.relative_position_bias_table
    model.set_input_size(img_size=(10, 22), window_size=(3, 4))
    assert model.layers[0].blocks[1].attn.relative_position_bias_table is not table
    x = image((10, 22)).to(device)
    assert_same(results(model, x), swinops.unpatch(model), x)


@pytest.mark.parametrize("always_partition", [False, True])
def test_set_input_size_scales_the_windows(always_partition):
    model = swinops.patch(build(img_size=16, depths=(2, 2), num_heads=(2, 4)), "reference")
    model.set_input_size(img_size=(24, 40), always_partition=always_partition)
    x = image((24, 40))
    assert_same(results(model, x), swinops.unpatch(model), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, launches, device):
    model, x = build(img_size=(14, 10)).to(device, dtype), image((14, 10)).to(device)
    report = swinops.check(model, x, "triton")
    assert report.ok, report
    assert launches == {"window_attention": 2, "window_attention_backward": 2}


@torch.no_grad()
def test_swin_tiny():
    """The published architecture at its own size, against timm's fused attention too."""
    timm = pytest.importorskip("timm")
    model, x = randomise(timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.0)), image(224)
    assert [row.action for row in swinops.explain(model)] == ["replace"] * 13
    with swinops.patched(model, "reference"):
        actual = model(x)
    plain = [model(x)]
    for module in model.modules():
        if isinstance(module, swin.WindowAttention):
            module.fused_attn = not module.fused_attn
    plain.append(model(x))
    exact = model.double()(x.double())
    for out in plain:
        assert_accurate(actual, out, exact, "logits")


@pytest.mark.parametrize("change", ["pad_roll", "no pad_kv", "no mask", "window transposed"])
def test_these_tests_can_fail(change, monkeypatch):
    import swinops.reference

    attention = swinops.reference.window_attention

    def wrong(q, k, v, bias, pad_kv, window, shift, scale, pad_order, mask_value):
        pad_order = "pad_roll" if change == "pad_roll" else pad_order
        pad_kv = None if change == "no pad_kv" else pad_kv
        mask_value = 0.0 if change == "no mask" else mask_value
        window, shift = (window[::-1], shift[::-1]) if change == "window transposed" else (window, shift)
        return attention(q, k, v, bias, pad_kv, window, shift, scale, pad_order, mask_value)

    monkeypatch.setattr(swinops.reference, "window_attention", wrong)
    model, x = build(img_size=(14, 10), window_size=(4, 3)), image((14, 10))
    with swinops.patched(model, "reference"), torch.no_grad():
        actual = {"out": model(x)}
    with torch.no_grad():
        expected = model(x)
    assert (actual["out"] - expected).abs().max() > 1e-3 * expected.abs().max()
