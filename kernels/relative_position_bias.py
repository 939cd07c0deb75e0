"""Relative position bias: the table expanded to every pair of tokens, and its gradient summed back."""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from swinops.kernels.cyclic_shift import on_device, three, window_tokens


@triton.jit
def _expand_kernel(
    table_ptr, bias_ptr, row_stride, head_stride, WINDOW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    head = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    di, hi, wi = window_tokens(pair // N, WINDOW)
    dj, hj, wj = window_tokens(pair % N, WINDOW)
    row = (
        ((di - dj + WINDOW[0] - 1) * (2 * WINDOW[1] - 1) + hi - hj + WINDOW[1] - 1) * (2 * WINDOW[2] - 1)
        + wi
        - wj
        + WINDOW[2]
        - 1
    )
    mask = pair < N * N
    value = tl.load(table_ptr + row.to(tl.int64) * row_stride + head * head_stride, mask)
    tl.store(bias_ptr + head * (N * N) + pair, value, mask)


@triton.jit
def _reduce_kernel(
    dbias_ptr, dtable_ptr, heads, head_stride, query_stride, key_stride,
    WINDOW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Sum over the queries i of the pairs (i, i - offset), for BLOCK_R offsets: in a fixed order, fp32, no atomics."""
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    ROWS: tl.constexpr = (2 * WINDOW[0] - 1) * (2 * WINDOW[1] - 1) * (2 * WINDOW[2] - 1)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    od, oh, ow = window_tokens(row, (2 * WINDOW[0] - 1, 2 * WINDOW[1] - 1, 2 * WINDOW[2] - 1))
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, N, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        di, hi, wi = window_tokens(i, WINDOW)
        dj = di[None, :] - (od - (WINDOW[0] - 1))[:, None]
        hj = hi[None, :] - (oh - (WINDOW[1] - 1))[:, None]
        wj = wi[None, :] - (ow - (WINDOW[2] - 1))[:, None]
        j = (dj * WINDOW[1] + hj) * WINDOW[2] + wj
        mask = (
            (i < N)[None, :]
            & (dj >= 0)
            & (dj < WINDOW[0])
            & (hj >= 0)
            & (hj < WINDOW[1])
            & (wj >= 0)
            & (wj < WINDOW[2])
        )
        pairs = i[None, :].to(tl.int64) * query_stride + j.to(tl.int64) * key_stride
        total += tl.sum(tl.load(dbias_ptr + head * head_stride + pairs, mask, other=0.0).to(tl.float32), 1)
    tl.store(dtable_ptr + row.to(tl.int64) * heads + head, total, row < ROWS)


def relative_position_bias(table: Tensor, window: Sequence[int]) -> Tensor:
    heads, tokens = table.shape[1], math.prod(window)
    bias = table.new_empty(heads, tokens, tokens)
    block = min(1024, triton.next_power_of_2(tokens * tokens))
    if heads:
        with on_device(table):
            _expand_kernel[(triton.cdiv(tokens * tokens, block), heads)](
                table, bias, *table.stride(), three(window, 1), block, enable_fp_fusion=True
            )
    return bias


def relative_position_bias_backward(dbias: Tensor, window: Sequence[int]) -> Tensor:
    dtable = dbias.new_empty(math.prod(2 * w - 1 for w in window), dbias.shape[0])
    reduce(dbias, dtable, window)
    return dtable


def reduce(dbias: Tensor, dtable: Tensor, window: Sequence[int]) -> None:
    """[heads, N, N] -> ``dtable`` [rows, heads]"""
    rows, heads = dtable.shape
    block_r = 16
    block_i = min(64, triton.next_power_of_2(math.prod(window)))
    if heads:
        with on_device(dbias):
            _reduce_kernel[(triton.cdiv(rows, block_r), heads)](
                dbias, dtable, heads, *dbias.stride(), three(window, 1), block_r, block_i, enable_fp_fusion=True
            )
