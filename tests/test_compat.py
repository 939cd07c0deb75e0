"""``swin_window_process`` as Microsoft's models use it. It moves data, so every comparison is bitwise."""

import re
import sys

import pytest
import torch

from swinops.compat import swin_window_process
from swinops.testing import differentiate, partition_inputs, random_tensor

from .dropin_microsoft import build, image
from .microsoft_swin import SwinTransformer, swin_transformer
from .timm_swins import results

# image, window, how far it is shifted
CASES = {
    "square": ((8, 8), 4, 2),
    "wide": ((4, 12), 4, 1),
    "tall": ((21, 7), 7, 3),
    "no shift": ((6, 9), 3, 0),
    "one window": ((5, 5), 5, 4),
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
every_case = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def process(name):
    """A function of the extension and the one for its gradient, as Microsoft's models wrap them."""

    class Process(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *sizes):
            import swin_window_process as extension

            ctx.sizes = sizes
            return getattr(extension, f"{name}_forward")(x, *sizes)

        @staticmethod
        def backward(ctx, dout):
            import swin_window_process as extension

            return getattr(extension, f"{name}_backward")(dout, *ctx.sizes), *[None] * len(ctx.sizes)

    return Process


WindowProcess, WindowProcessReverse = process("roll_and_window_partition"), process("window_merge_and_roll")


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "swin_window_process", swin_window_process)


def corners(H, W, window):
    return [(y, x) for y in range(0, H, window) for x in range(0, W, window)]


def partition(x, shift, window):
    x = x.roll((shift, shift), (1, 2))
    parts = [x[:, i : i + window, j : j + window] for i, j in corners(*x.shape[1:3], window)]
    return torch.stack(parts, 1).flatten(0, 1)


def merge(windows, B, H, W, C, shift, window):
    x = windows.new_zeros(B, H, W, C)
    for n, (i, j) in enumerate(corners(H, W, window)):
        x[:, i : i + window, j : j + window] = windows.unflatten(0, (B, -1))[:, n]
    return x.roll((shift, shift), (1, 2))


def strided(x):
    yield x
    yield x.transpose(1, -1).contiguous().transpose(1, -1)
    yield x[..., :1].expand(x.shape)


@every_dtype
@every_case
def test_partition(case, dtype, device):
    space, window, shift = CASES[case]
    x, dwindows = partition_inputs(space, (window, window), channels=5, dtype=dtype, device=device)
    for tensors, dout in zip(({"x": view} for view in strided(x)), strided(dwindows), strict=True):
        actual = differentiate(lambda x: WindowProcess.apply(x, *x.shape, -shift, window), tensors, dout)
        assert_same(actual, differentiate(lambda x: partition(x, -shift, window), tensors, dout))


@every_dtype
@every_case
def test_merge(case, dtype, device):
    space, window, shift = CASES[case]
    dx, windows = partition_inputs(space, (window, window), channels=5, dtype=dtype, device=device)
    sizes = *dx.shape, shift, window
    for tensors, dout in zip(({"x": view} for view in strided(windows)), strided(dx), strict=True):
        actual = differentiate(lambda x: WindowProcessReverse.apply(x, *sizes), tensors, dout)
        assert_same(actual, differentiate(lambda x: merge(x, *sizes), tensors, dout))


@every_dtype
@every_case
def test_there_and_back(case, dtype, device):
    space, window, shift = CASES[case]
    x, windows = partition_inputs(space, (window, window), channels=5, dtype=dtype, device=device)
    there, back = (*x.shape, -shift, window), (*x.shape, shift, window)
    assert torch.equal(WindowProcessReverse.apply(WindowProcess.apply(x, *there), *back), x)
    assert torch.equal(WindowProcess.apply(WindowProcessReverse.apply(windows, *back), *there), windows)


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name, x in actual.items():
        assert x.dtype == expected[name].dtype
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("size", [(16, 16), (32, 16), (16, 48)], ids=str)
def test_model(size, monkeypatch):
    monkeypatch.setattr(swin_transformer, "WindowProcess", WindowProcess)
    monkeypatch.setattr(swin_transformer, "WindowProcessReverse", WindowProcessReverse)
    options, x = {"img_size": size, "depths": (2,), "num_heads": (2,)}, image(2, size)
    expected = results(build(SwinTransformer, **options), x)
    actual = results(build(SwinTransformer, fused_window_process=True, **options), x)
    assert_same(actual, expected)


def test_differentiable_by_itself():
    x = random_tensor((1, 4, 6, 2), 0, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: swin_window_process.roll_and_window_partition_forward(x, 1, 4, 6, 2, -1, 2), x
    )


X, WINDOWS = torch.zeros(2, 8, 4, 3), torch.zeros(4, 4, 4, 3)
BAD = {
    "shape of an image": (
        "roll_and_window_partition_forward", X, (2, 4, 8, 3, -2, 4),
        "x must be [B, H, W, C] = (2, 4, 8, 3), got (2, 8, 4, 3)",
    ),
    "shape of a gradient": (
        "window_merge_and_roll_backward", WINDOWS, (2, 8, 4, 3, 2, 4),
        "dx must be [B, H, W, C] = (2, 8, 4, 3), got (4, 4, 4, 3)",
    ),
    "number of windows": (
        "window_merge_and_roll_forward", WINDOWS, (1, 8, 4, 3, 2, 4),
        "windows must be [B * nW, window_size, window_size, C] = (2, 4, 4, 3) for images [B, H, W, C] = (1, 8, 4, 3), "
        "got (4, 4, 4, 3)",
    ),
    "channels": (
        "roll_and_window_partition_backward", WINDOWS, (2, 8, 4, 5, -2, 4),
        "dwindows must be [B * nW, window_size, window_size, C] = (4, 4, 4, 5) for images [B, H, W, C] = (2, 8, 4, 5), "
        "got (4, 4, 4, 3)",
    ),
    "sign to partition": (
        "roll_and_window_partition_forward", X, (2, 8, 4, 3, 2, 4),
        "shift_size must be from -3 to 0 with windows of 4 (negative to partition, positive to merge), got 2",
    ),
    "sign to merge": (
        "window_merge_and_roll_forward", WINDOWS, (2, 8, 4, 3, -2, 4),
        "shift_size must be from 0 to 3 with windows of 4 (negative to partition, positive to merge), got -2",
    ),
    "shift": (
        "roll_and_window_partition_backward", WINDOWS, (2, 8, 4, 3, -4, 4),
        "shift_size must be from -3 to 0 with windows of 4 (negative to partition, positive to merge), got -4",
    ),
    "window": ("roll_and_window_partition_forward", X, (2, 8, 4, 3, 0, 0), "window_size must be at least 1, got 0"),
    "windows that do not divide": (
        "roll_and_window_partition_forward", X, (2, 8, 4, 3, -1, 3),
        "x must be [B, *space, C] with every axis divisible by the window (3, 3), got (2, 8, 4, 3)",
    ),
    "dtype": (
        "window_merge_and_roll_forward", WINDOWS.int(), (2, 8, 4, 3, 2, 4),
        "windows must have a floating-point dtype, got torch.int32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_rejects_bad_arguments(case):
    name, x, sizes, message = BAD[case]
    with pytest.raises(TypeError if case == "dtype" else ValueError, match=f"^{re.escape(message)}$"):
        getattr(swin_window_process, name)(x, *sizes)
