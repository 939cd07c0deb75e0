"""Continuous position bias: a small network of the offset between two tokens, written to every pair that has it.

Forward is one kernel. A program evaluates the network at BLOCK_R offsets for BLOCK_H heads, from the numbers of the
offsets alone, and stores each result to all its pairs: the network costs less than the bytes of the bias.

Backward sums the bias's gradient back to the offsets, as that of the relative position bias does. A program of the
second kernel then owns BLOCK_K hidden units, at all offsets and for all heads, so that no sum crosses programs.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from swinops.kernels.cyclic_shift import on_device
from swinops.kernels.relative_position_bias import reduce


@triton.jit
def row_offsets(row, WINDOW: tl.constexpr):
    """The offset along each axis that a row of the table stands for."""
    return row // (2 * WINDOW[1] - 1) - (WINDOW[0] - 1), row % (2 * WINDOW[1] - 1) - (WINDOW[1] - 1)


@triton.jit
def coordinate(offset, SPAN: tl.constexpr, LOG_SPACED: tl.constexpr):
    """The network's input along an axis: 8 at the offset SPAN, or log2(9) / 3."""
    x = offset.to(tl.float32) * (8 / SPAN)
    if LOG_SPACED:
        x = tl.where(x < 0, -1.0, 1.0) * tl.log2(1 + tl.abs(x)) * (1 / 3)
    return x


@triton.jit
def load_units(w1_ptr, b1_ptr, k, hidden):
    """What the hidden units ``k`` multiply the two coordinates with, and add; zero past the last."""
    mask = k < hidden
    h = tl.load(w1_ptr + 2 * k, mask, other=0.0).to(tl.float32)
    w = tl.load(w1_ptr + 2 * k + 1, mask, other=0.0).to(tl.float32)
    return h, w, tl.load(b1_ptr + k, mask, other=0.0).to(tl.float32)


@triton.jit
def activations(x, units):
    """[BLOCK_K, BLOCK_R]; NaN stays NaN."""
    h = units[0][:, None] * x[0][None, :] + units[1][:, None] * x[1][None, :] + units[2][:, None]
    return tl.where(h <= 0, 0.0, h)


@triton.jit
def _bias_kernel(
    w1_ptr, b1_ptr, w2_ptr, bias_ptr, table_ptr, hidden, heads,
    WINDOW: tl.constexpr, SPAN: tl.constexpr, LOG_SPACED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """The last axis of every tile is that of the offsets: a warp's, so that a thread has few coordinates to compute."""
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    WIDTH: tl.constexpr = 2 * WINDOW[1] - 1
    first = tl.program_id(0) * BLOCK_R
    row = first + tl.arange(0, BLOCK_R)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (head < heads)[:, None] & (row < (2 * WINDOW[0] - 1) * WIDTH)[None, :]
    dh, dw = row_offsets(row, WINDOW)
    x = coordinate(dh, SPAN[0], LOG_SPACED), coordinate(dw, SPAN[1], LOG_SPACED)
    products = tl.zeros((BLOCK_H, BLOCK_K, BLOCK_R), tl.float32)
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = activations(x, load_units(w1_ptr, b1_ptr, k, hidden))
        exists = (head < heads)[:, None] & (k < hidden)[None, :]
        w2 = tl.load(w2_ptr + head.to(tl.int64)[:, None] * hidden + k[None, :], exists, other=0.0).to(tl.float32)
        products += w2[:, :, None] * h[None, :, :]
    t = 16 / (1 + tl.exp(-tl.sum(products, 1)))
    tl.store(table_ptr + row.to(tl.int64)[None, :] * heads + head[:, None], t, mask)

    # The pair of query i and an offset is i * N + (i - offset): for one query the offsets of a width are its keys in a
    # line, backwards. Queries whose keys at these offsets are all outside the window are left out.
    t = t.to(bias_ptr.dtype.element_ty)
    ptrs = bias_ptr + head.to(tl.int64)[:, None] * (N * N) - (dh * WINDOW[1] + dw)[None, :]
    top = tl.maximum(first // WIDTH - (WINDOW[0] - 1), 0)
    bottom = tl.minimum((first + BLOCK_R - 1) // WIDTH + 1, WINDOW[0])
    for start in range(top * WINDOW[1], bottom * WINDOW[1], BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        h, w = (i // WINDOW[1])[:, None] - dh[None, :], (i % WINDOW[1])[:, None] - dw[None, :]
        inside = (i < N)[:, None] & (h >= 0) & (h < WINDOW[0]) & (w >= 0) & (w < WINDOW[1])
        pairs = ptrs[:, None, :] + (i.to(tl.int64) * (N + 1))[None, :, None]
        tl.store(pairs, t[:, None, :], mask[:, None, :] & inside[None, :, :])


@triton.jit
def _weights_kernel(
    dtable_ptr, table_ptr, w1_ptr, b1_ptr, w2_ptr, dw1_ptr, db1_ptr, dw2_ptr, hidden, heads,
    WINDOW: tl.constexpr, SPAN: tl.constexpr, LOG_SPACED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_K hidden units' weights; the table's, [rows, heads], is that of 16 * sigmoid."""
    ROWS: tl.constexpr = (2 * WINDOW[0] - 1) * (2 * WINDOW[1] - 1)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    units = load_units(w1_ptr, b1_ptr, k, hidden)
    # of every BLOCK_R-th offset, added up at the end
    dw1_h = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    dw1_w = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    db1 = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for first in range(0, heads, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        place = head.to(tl.int64)[None, :] * hidden + k[:, None]
        mask = (k < hidden)[:, None] & (head < heads)[None, :]
        w2 = tl.load(w2_ptr + place, mask, other=0.0).to(tl.float32)
        dw2 = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
        for start in range(0, ROWS, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            dh, dw = row_offsets(row, WINDOW)
            x = coordinate(dh, SPAN[0], LOG_SPACED), coordinate(dw, SPAN[1], LOG_SPACED)
            h = activations(x, units)
            entry = row.to(tl.int64)[:, None] * heads + head[None, :]
            exists = (row < ROWS)[:, None] & (head < heads)[None, :]
            t = tl.load(table_ptr + entry, exists, other=0.0)
            dz = tl.load(dtable_ptr + entry, exists, other=0.0) * t * (16 - t) / 16
            dw2 = tl.dot(h, dz, dw2, input_precision="ieee")
            dunit = tl.where(h <= 0, 0.0, tl.dot(w2, tl.trans(dz), input_precision="ieee"))
            dw1_h += dunit * x[0][None, :]
            dw1_w += dunit * x[1][None, :]
            db1 += dunit
        tl.store(dw2_ptr + place, dw2.to(dw2_ptr.dtype.element_ty), mask)
    dtype = db1_ptr.dtype.element_ty
    tl.store(dw1_ptr + 2 * k, tl.sum(dw1_h, 1).to(dtype), k < hidden)
    tl.store(dw1_ptr + 2 * k + 1, tl.sum(dw1_w, 1).to(dtype), k < hidden)
    tl.store(db1_ptr + k, tl.sum(db1, 1).to(dtype), k < hidden)


def spans(pretrained: Sequence[int]) -> tuple[int, ...]:
    """The largest offset along each axis; 1 where that is 0, which nothing is then divided by."""
    return tuple(max(m - 1, 1) for m in pretrained)


def continuous_position_bias(
    w1: Tensor, b1: Tensor, w2: Tensor, window: Sequence[int], pretrained: Sequence[int], log_spaced: bool
) -> tuple[Tensor, Tensor]:
    (heads, hidden), tokens, rows = w2.shape, math.prod(window), math.prod(2 * m - 1 for m in window)
    bias = w2.new_empty(heads, tokens, tokens)
    table = w2.new_empty(rows, heads, dtype=torch.float32)
    if heads:
        with on_device(w2):
            _bias_kernel[(triton.cdiv(rows, 32), triton.cdiv(heads, 4))](
                w1.contiguous(), b1.contiguous(), w2.contiguous(), bias, table, hidden, heads,
                tuple(window), spans(pretrained), log_spaced, 32, 4, 64, 16, enable_fp_fusion=True,
            )  # fmt: skip
    return bias, table


def continuous_position_bias_backward(
    dbias: Tensor,
    table: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    window: Sequence[int],
    pretrained: Sequence[int],
    log_spaced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, hidden = w2.shape
    dtable = torch.empty_like(table)
    dw1, db1, dw2 = (x.new_empty(x.shape) for x in (w1, b1, w2))
    reduce(dbias, dtable, window)
    with on_device(w2):
        _weights_kernel[(triton.cdiv(hidden, 16),)](
            dtable, table.contiguous(), w1.contiguous(), b1.contiguous(), w2.contiguous(), dw1, db1, dw2,
            hidden, heads, tuple(window), spans(pretrained), log_spaced, 64, 16, 16, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return dw1, db1, dw2
