"""The Triton kernels' addresses and grids for sizes that no test could hold in memory."""

import itertools
import math

import pytest
import torch

from swinops.testing import attention_inputs

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("swinops.kernels.window_attention")

from swinops.kernels.cyclic_shift import image_index, offset, window_origin, window_tokens  # noqa: E402

PAD_ORDERS = ["pad_roll", "roll_pad"]


@pytest.mark.parametrize("window", [(1, 1), (8, 9)], ids=str)
def test_grid_of_many_windows(window, device, monkeypatch):
    """A grid's first axis reaches 2**31 - 1 blocks, the others 65,535: no launch for 70,000 windows exceeds that."""
    grids = []

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            grids.append((self.name, grid))
            return lambda *args, **options: None

    names = [name for name in vars(kernels) if name.startswith("_") and name.endswith("_kernel")]
    for name in names:
        monkeypatch.setattr(kernels, name, Launch(name))
    one = attention_inputs(window, window, batch=1, heads=2, head_dim=1, device=device)
    q, k, v, dout = (x.expand(70_000, *x.shape[1:]) for x in (one.q, one.k, one.v, one.dout))
    settings = window, (0, 0), 1.0, "pad_roll", -100.0
    kernels.window_attention(q, k, v, one.bias, one.pad_kv, *settings)
    grads = [torch.empty_like(x) for x in (q, k, v, one.bias, one.pad_kv)]
    lse = torch.zeros(q.shape[:-1])
    kernels.window_attention_backward(dout, q, k, v, one.bias, one.pad_kv, q, lse, *grads, *settings)
    assert len(grids) >= 2
    for name, grid in grids:
        assert grid[0] < 2**31 and all(n <= 65_535 for n in grid[1:]), f"{name} is launched on {grid}"


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
@pytest.mark.parametrize(
    "space, window, shift",
    [((1, 3000, 4001), (1, 7, 7), (0, 3, 5)), ((90, 80, 70), (2, 7, 4), (1, 6, 0)), ((1, 2, 3), (1, 7, 5), (0, 3, 4))],
    ids=str,
)
def test_addresses(space, window, shift, pad_order, device):
    """The kernels' index helper against Python's integers, for window numbers past 65,535 and offsets past 2**31."""
    counts = [math.ceil(n / w) for n, w in zip(space, window, strict=True)]
    padded, images = [n * w for n, w in zip(counts, window, strict=True)], 40_000
    per_image, tokens = math.prod(counts), math.prod(window)
    strides = [math.prod(space) * 96, space[1] * space[2] * 96, space[2] * 96, 96]
    last = images * per_image - 1
    numbers = [0, 1, per_image - 1, per_image, 65_535, 65_536, last // 2, last]
    actual = addresses(numbers, space, strides, window, shift, pad_order == "roll_pad", device)
    expected = torch.full((len(numbers), tokens), -1)
    for row, number in enumerate(numbers):
        image, cell = divmod(number, per_image)
        corner = [
            cell // (counts[1] * counts[2]) * window[0],
            cell // counts[2] % counts[1] * window[1],
            cell % counts[2] * window[2],
        ]
        for t, local in enumerate(itertools.product(*map(range, window))):
            place = [c + i for c, i in zip(corner, local, strict=True)]
            source = source_of(place, space, padded, shift, pad_order)
            if source is not None:
                expected[row, t] = sum(i * s for i, s in zip((image, *source), strides, strict=True))
    assert torch.equal(actual.cpu(), expected)


def addresses(numbers, space, strides, window, shift, roll_pad, device):
    """Offset of each token of the windows ``numbers``, -1 for a pad, as the kernels compute it. [windows, tokens]"""
    numbers = torch.tensor(numbers, device=device)
    out = torch.empty(len(numbers), math.prod(window), dtype=torch.int64, device=device)
    block = triton.next_power_of_2(out.shape[1])
    _addresses_kernel[(len(numbers),)](numbers, out, space, strides, window, shift, roll_pad, block)
    return out


@triton.jit
def _addresses_kernel(
    numbers_ptr, out_ptr, size, strides,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, ROLL_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    row = tl.program_id(0)
    t = tl.arange(0, BLOCK)
    b, origin = window_origin(tl.load(numbers_ptr + row), size, WINDOW)
    index, inside = image_index(origin, window_tokens(t, WINDOW), size, WINDOW, SHIFT, ROLL_PAD)
    tl.store(out_ptr + row * N + t, tl.where(inside, offset(b, index, strides), -1), t < N)


def source_of(place, space, padded, shift, pad_order):
    """The image's token that lands on ``place`` of the padded, shifted image; None for a pad."""
    if pad_order == "pad_roll":
        source = [(p + s) % n for p, s, n in zip(place, shift, padded, strict=True)]
        return source if all(p < n for p, n in zip(source, space, strict=True)) else None
    if any(p >= n for p, n in zip(place, space, strict=True)):
        return None
    return [(p + s) % n for p, s, n in zip(place, shift, space, strict=True)]
