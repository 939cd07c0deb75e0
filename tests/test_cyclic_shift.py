"""window_partition and window_merge: data movement, so every comparison is bitwise."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swinops import reference, window_merge, window_partition
from swinops.testing import differentiate, partition_inputs, random_tensor

OP = "window_partition"

# image, window, shift
CASES = {
    "square": ((8, 8), (4, 4), (0, 0)),
    "wide": ((4, 12), (4, 4), (2, 2)),
    "tall": ((12, 3), (3, 3), (1, 1)),
    "unequal windows": ((6, 8), (3, 2), (1, 1)),
    "one window": ((7, 7), (7, 7), (3, 3)),
    "largest shift": ((8, 12), (4, 4), (3, 3)),
    "shift on one axis": ((8, 8), (4, 4), (0, 2)),
    "shift on the other": ((8, 8), (4, 4), (2, 0)),
    "windows of one token": ((3, 5), (1, 1), (0, 0)),
    "volume": ((4, 6, 8), (2, 3, 4), (1, 1, 2)),
    "one 7x7x7 window": ((7, 7, 7), (7, 7, 7), (3, 3, 3)),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def strided_views(x):
    """``x``; in float32 also under other strides: channels first, every second channel, an expanded batch, packed."""
    yield x
    if x.dtype != torch.float32:
        return
    yield x.transpose(1, -1).contiguous().transpose(1, -1)
    yield x.repeat_interleave(2, -1)[..., ::2]
    yield x[:1].expand(x.shape)
    yield torch.stack([x, x + 1], -2)[..., 0, :]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_matches_reference(case, dtype, backend, device):
    image, window, shift = CASES[case]
    x, windows = partition_inputs(image, window, channels=5, dtype=dtype, device=device)
    for view in strided_views(x):
        assert_same(
            window_partition(view, window, shift, backend=backend), reference.window_partition(view, window, shift)
        )
    for view in strided_views(windows):
        assert_same(window_merge(view, image, shift, backend=backend), reference.window_merge(view, image, shift))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_backward_matches_reference(case, dtype, backend, device):
    image, window, shift = CASES[case]
    x, windows = partition_inputs(image, window, channels=5, dtype=dtype, device=device)
    for dwindows in strided_views(windows):
        actual = differentiate(lambda x: window_partition(x, window, shift, backend=backend), {"x": x}, dwindows)["dx"]
        assert_same(
            actual, differentiate(lambda x: reference.window_partition(x, window, shift), {"x": x}, dwindows)["dx"]
        )
    for dx in strided_views(x):
        actual = differentiate(lambda x: window_merge(x, image, shift, backend=backend), {"x": windows}, dx)["dx"]
        assert_same(actual, differentiate(lambda x: reference.window_merge(x, image, shift), {"x": windows}, dx)["dx"])


@pytest.mark.parametrize("case", CASES)
def test_reference_matches_its_definition(case):
    """Token by token: place p of the shifted image holds the token at p + shift; windows are cut in row-major order."""
    image, window, shift = CASES[case]
    x, _ = partition_inputs(image, window, channels=2)
    windows = reference.window_partition(x, window, shift)
    grid = [size // w for size, w in zip(image, window, strict=True)]
    for place in np.ndindex(*image):
        cell = [p // w for p, w in zip(place, window, strict=True)]
        token = [p % w for p, w in zip(place, window, strict=True)]
        source = [(p + s) % size for p, s, size in zip(place, shift, image, strict=True)]
        number = int(np.ravel_multi_index(cell, grid))
        assert torch.equal(windows[(slice(number, None, int(np.prod(grid))), *token)], x[(slice(None), *source)])


@pytest.mark.parametrize("case", CASES)
def test_inverse(case, backend, device):
    image, window, shift = CASES[case]
    x, windows = partition_inputs(image, window, device=device)
    there = window_partition(x, window, shift, backend=backend)
    assert_same(window_merge(there, image, shift, backend=backend), x)
    back = window_merge(windows, image, shift, backend=backend)
    assert_same(window_partition(back, window, shift, backend=backend), windows)


@pytest.mark.parametrize("op", ["window_partition", "window_merge"])
def test_second_order(op, backend, device):
    f, x, *arguments = {
        "window_partition": (window_partition, random_tensor((1, 4, 6, 2), 0, torch.float64, device), (2, 3), (1, 2)),
        "window_merge": (window_merge, random_tensor((4, 2, 3, 2), 0, torch.float64, device), (4, 6), (1, 2)),
    }[op]
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: f(x, *arguments, backend=backend), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: f(x, *arguments, backend=backend), x, fast_mode=True)


def test_deterministic(backend, device):
    x, _ = partition_inputs((8, 12), (4, 4), device=device)
    assert_same(*(window_partition(x, 4, 2, backend=backend) for _ in range(2)))


@pytest.mark.parametrize("channels", [1, 3, 64, 300])
def test_channels(channels, backend, device):
    x, windows = partition_inputs((4, 8), (4, 4), channels=channels, dtype=torch.float16, device=device)
    assert_same(window_partition(x, 4, 1, backend=backend), reference.window_partition(x, (4, 4), (1, 1)))
    assert_same(window_merge(windows, (4, 8), 1, backend=backend), reference.window_merge(windows, (4, 8), (1, 1)))


@pytest.mark.parametrize("shape", [(0, 8, 8, 4), (2, 8, 8, 0), (0, 4, 8, 8, 4)], ids=str)
def test_empty(shape, backend, device):
    x = torch.empty(shape, device=device, requires_grad=True)
    windows = window_partition(x, 4, 2, backend=backend)
    assert windows.shape == reference.window_partition(x, (4,) * (len(shape) - 2), (2,) * (len(shape) - 2)).shape
    back = window_merge(windows, shape[1:-1], 2, backend=backend)
    assert back.shape == shape
    back.sum().backward()
    assert x.grad.shape == shape


def test_moves_every_bit(backend, device):
    """NaN payloads, infinities, subnormals and negative zeros arrive as they left."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16)
    x = bits.view(1, 256, 256, 1).view(torch.float16)
    windows = window_partition(x, 64, 3, backend=backend)
    expected = reference.window_partition(x.view(torch.int16), (64, 64), (3, 3))
    assert torch.equal(windows.view(torch.int16), expected)


def test_more_than_65535_windows(backend, device):
    x, windows = partition_inputs((257, 258), (1, 2), batch=2, channels=1, dtype=torch.float16, device=device)
    assert len(windows) > 65535
    assert_same(window_partition(x, (1, 2), (0, 1), backend=backend), reference.window_partition(x, (1, 2), (0, 1)))
    assert_same(
        window_merge(windows, x.shape[1:-1], backend=backend), reference.window_merge(windows, x.shape[1:-1], (0, 0))
    )


def test_beyond_31_bits(backend, device, beyond_31_bits):
    """Addresses past 2**31 elements: an image and windows whose batch lies that far apart."""
    x, windows = partition_inputs((4, 6), (2, 3), channels=3, dtype=torch.float16, device=device)
    assert_same(
        window_partition(beyond_31_bits(x), (2, 3), (1, 1), backend=backend),
        reference.window_partition(x, (2, 3), (1, 1)),
    )
    pair = windows[::4]  # one window each of two images
    assert_same(
        window_merge(beyond_31_bits(pair), (2, 3), backend=backend), reference.window_merge(pair, (2, 3), (0, 0))
    )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_beyond_31_bits_in_memory(backend):
    x = torch.arange(2**31 + 2**20, device="cuda").to(torch.int16).view(torch.float16).view(-1, 64, 64, 256)
    back = window_merge(window_partition(x, 8, 3, backend=backend), (64, 64), 3, backend=backend)
    assert torch.equal(back.view(torch.int16), x.view(torch.int16))


@given(st.data())
def test_any_arguments(backend, device, data):
    axes = data.draw(st.integers(2, 3), "axes")
    window = tuple(data.draw(st.integers(1, 5 if axes == 2 else 3), "window") for _ in range(axes))
    shift = tuple(data.draw(st.integers(0, w - 1), "shift") for w in window)
    image = tuple(w * data.draw(st.integers(1, 3), "windows on an axis") for w in window)
    sizes = {"batch": data.draw(st.integers(0, 3), "batch"), "channels": data.draw(st.integers(1, 40), "channels")}
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    x, windows = partition_inputs(image, window, dtype=dtype, device=device, **sizes)
    assert_same(window_partition(x, window, shift, backend=backend), reference.window_partition(x, window, shift))
    assert_same(window_merge(windows, image, shift, backend=backend), reference.window_merge(windows, image, shift))


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.is_contiguous()
    assert torch.equal(actual, expected)
