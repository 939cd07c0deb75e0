"""Cyclic shift with window partition, and the index helpers that the attention kernels share.

Two dimensions are three with a first axis of size 1 and window 1: Triton specialises an argument that is 1, so that
nothing of it is left.
"""

import contextlib
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def window_origin(window, size, WINDOW: tl.constexpr):
    """Image, and the first token along each axis of the padded, shifted image, of window number ``window``."""
    nD, nH, nW = tl.cdiv(size[0], WINDOW[0]), tl.cdiv(size[1], WINDOW[1]), tl.cdiv(size[2], WINDOW[2])
    row = window // nW
    plane = row // nH
    return plane // nD, (plane % nD * WINDOW[0], row % nH * WINDOW[1], window % nW * WINDOW[2])


@triton.jit
def window_tokens(t, WINDOW: tl.constexpr):
    """Place along each axis of a window of its token number ``t``."""
    return t // (WINDOW[1] * WINDOW[2]), t // WINDOW[2] % WINDOW[1], t % WINDOW[2]


@triton.jit
def axis_index(p, size, WINDOW: tl.constexpr, SHIFT: tl.constexpr, ROLL_PAD: tl.constexpr):
    """Where position ``p`` of the padded, shifted axis lies on the image, and whether it is a token or a pad."""
    if SHIFT == 0:
        return p, p < size
    elif ROLL_PAD:
        index = p + SHIFT % size
        return tl.where(index >= size, index - size, index), p < size
    else:
        padded = tl.cdiv(size, WINDOW) * WINDOW
        index = p + SHIFT
        index = tl.where(index >= padded, index - padded, index)
        return index, index < size


@triton.jit
def image_index(origin, local, size, WINDOW: tl.constexpr, SHIFT: tl.constexpr, ROLL_PAD: tl.constexpr):
    """Where a window's tokens lie in the unshifted image along each axis, 64-bit, and whether they are no pads."""
    d, in_d = axis_index(origin[0] + local[0], size[0], WINDOW[0], SHIFT[0], ROLL_PAD)
    h, in_h = axis_index(origin[1] + local[1], size[1], WINDOW[1], SHIFT[1], ROLL_PAD)
    w, in_w = axis_index(origin[2] + local[2], size[2], WINDOW[2], SHIFT[2], ROLL_PAD)
    return (d.to(tl.int64), h.to(tl.int64), w.to(tl.int64)), in_d & in_h & in_w


@triton.jit
def offset(b, index, strides):
    """Offset in elements of image ``b``'s token at ``index``."""
    return b.to(tl.int64) * strides[0] + index[0] * strides[1] + index[1] * strides[2] + index[2] * strides[3]


@triton.jit
def _shift_kernel(
    x_ptr, windows_ptr, size, C, tokens, x_strides, windows_strides,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, MERGE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Copy BLOCK_T tokens, numbered in window order, from the image to the windows or back."""
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    window = token // N
    local = window_tokens(token % N, WINDOW)
    b, origin = window_origin(window, size, WINDOW)
    index, _ = image_index(origin, local, size, WINDOW, SHIFT, False)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (token < tokens)[:, None] & (channel < C)[None, :]
    x_ptrs = x_ptr + offset(b, index, x_strides)[:, None] + channel[None, :]
    windows_ptrs = windows_ptr + offset(window, local, windows_strides)[:, None] + channel[None, :]
    if MERGE:
        tl.store(x_ptrs, tl.load(windows_ptrs, mask), mask)
    else:
        tl.store(windows_ptrs, tl.load(x_ptrs, mask), mask)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def three(values: Sequence[int], fill: int) -> tuple[int, ...]:
    """One value per axis, for three axes."""
    return (fill,) * (3 - len(values)) + tuple(values)


def image_strides(x: Tensor, axes: int) -> tuple[int, ...]:
    """Strides of the batch and three spatial axes of a tensor that starts [B, *space]."""
    return x.stride(0), *three(x.stride()[1 : 1 + axes], 0)


def _copy(x: Tensor, windows: Tensor, window: Sequence[int], shift: Sequence[int], merge: bool) -> None:
    if not x.numel():
        return
    axes, C = len(window), x.shape[-1]
    tokens = x.numel() // C
    block_c = min(triton.next_power_of_2(C), 256)
    block_t = max(1, 4096 // block_c)
    # moved as integers, which every dtype has and which keeps NaN payloads
    x, windows = (
        y.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[y.itemsize]) for y in (x, windows)
    )
    with on_device(x):
        _shift_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(C, block_c))](
            x, windows, three(x.shape[1:-1], 1), C, tokens, image_strides(x, axes), image_strides(windows, axes),
            three(window, 1), three(shift, 0), merge, block_t, block_c, enable_fp_fusion=True,
        )  # fmt: skip


def window_partition(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    count = math.prod(size // w for size, w in zip(x.shape[1:-1], window, strict=True))
    windows = x.new_empty(x.shape[0] * count, *window, x.shape[-1])
    _copy(x, windows, window, shift, merge=False)
    return windows


def window_merge(windows: Tensor, image_size: Sequence[int], shift: Sequence[int]) -> Tensor:
    windows = windows if windows.stride(-1) == 1 else windows.contiguous()
    window = windows.shape[1:-1]
    count = math.prod(size // w for size, w in zip(image_size, window, strict=True))
    x = windows.new_empty(windows.shape[0] // count, *image_size, windows.shape[-1])
    _copy(x, windows, window, shift, merge=True)
    return x
