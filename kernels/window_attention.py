"""Shifted-window attention: gather, attention and scatter in one kernel; shift and padding are in the addresses.

With a ``logit_scale`` the kernels do cosine attention: q and k are divided by their lengths where they are loaded, and
their gradients taken through that where they are stored. The scale rides in the multiply-add of the bias.

Forward and backward each come in two forms. Up to 64 tokens a window is one tile: a program keeps one head, loads that
head's bias once and loops over windows. Above, scores are made in tiles: queries against a loop over keys. Exponentials
are base 2, so ``scale``, bias and mask are multiplied by log2(e) before they are added.

The bias gradient needs no atomics: each program sums its windows in registers and writes one partial, and the partials,
whose number depends on the shape and the device alone, are added in a fixed order. So does the gradient of ``pad_kv``.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from swinops.kernels.cyclic_shift import (
    image_index,
    image_strides,
    offset,
    on_device,
    three,
    window_origin,
    window_tokens,
)
from swinops.kernels.tuning import configure
from swinops.precision import tf32_allowed

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
MAX_LOGIT_SCALE: tl.constexpr = tl.constexpr(math.log(100))
SHORTEST: tl.constexpr = tl.constexpr(1e-12)  # length that a vector is divided by, as in torch's normalize


@triton.jit
def head_mask(valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of a [tokens, BLOCK_D] tile exist: constant along the channels if it can be, for wide accesses."""
    if BLOCK_D == HEAD_DIM:
        return valid[:, None]
    else:
        return valid[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]


@triton.jit
def load_tokens(ptr, strides, head, b, index, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head's vectors of some tokens of image ``b``, zero where not valid. [tokens, BLOCK_D]"""
    ptrs = ptr + head * strides[4] + offset(b, index, strides)[:, None] + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(ptrs, head_mask(valid, HEAD_DIM, BLOCK_D), other=0.0)


@triton.jit
def store_tokens(ptr, strides, head, b, index, valid, value, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    ptrs = ptr + head * strides[4] + offset(b, index, strides)[:, None] + tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), head_mask(valid, HEAD_DIM, BLOCK_D))


@triton.jit
def load_scale(logit_scale_ptr, head, scale):
    """``scale``; of cosine attention the head's exp(min(logit_scale, ln 100)), to all of float32's digits."""
    if logit_scale_ptr is None:
        return scale
    else:
        logit_scale = tl.load(logit_scale_ptr + head).to(tl.float32)
        logit_scale = tl.where(logit_scale > MAX_LOGIT_SCALE, MAX_LOGIT_SCALE, logit_scale)  # NaN stays NaN
        return tl.exp(logit_scale.to(tl.float64)).to(tl.float32)


@triton.jit
def normalise(x, logit_scale_ptr):
    """For cosine attention vectors over their lengths, and one over these; 0 for those too short for a direction."""
    if logit_scale_ptr is None:
        return x, 1.0
    else:
        wide = x.to(tl.float32)
        squares = tl.sum(wide * wide, 1)
        inverse = tl.rsqrt(tl.maximum(squares, SHORTEST * SHORTEST))
        return (wide * inverse[:, None]).to(x.dtype), tl.where(squares < SHORTEST * SHORTEST, 0.0, inverse)


@triton.jit
def normalise_backward(dunit, unit, inverse, logit_scale_ptr):
    """The gradient of vectors from that of their directions, and how much of the latter lay along each and is lost."""
    if logit_scale_ptr is None:
        return dunit, 0.0
    else:
        along = tl.sum(dunit * unit, 1)
        return (dunit - along[:, None] * unit) * inverse[:, None], along


@triton.jit
def load_queries(
    q_ptr, logit_scale_ptr, strides, head, b, index, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Queries, or their directions and one over their lengths: see ``normalise``."""
    return normalise(load_tokens(q_ptr, strides, head, b, index, valid, HEAD_DIM, BLOCK_D), logit_scale_ptr)


@triton.jit
def load_keys(
    k_ptr, v_ptr, logit_scale_ptr, pad_ptr, k_strides, v_strides, head, heads, b, index, inside, exists,
    PADDED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys, as queries are loaded, and values: outside the image those of ``pad_ptr`` [2, heads, HEAD_DIM]."""
    valid = exists
    if PADDED:
        valid = exists & inside
    k = load_tokens(k_ptr, k_strides, head, b, index, valid, HEAD_DIM, BLOCK_D)
    v = load_tokens(v_ptr, v_strides, head, b, index, valid, HEAD_DIM, BLOCK_D)
    if PADDED and pad_ptr is not None:
        pad = (exists & (inside == 0))[:, None]
        channel = tl.arange(0, BLOCK_D)
        pad_k = tl.load(pad_ptr + head * HEAD_DIM + channel, channel < HEAD_DIM, other=0.0)
        pad_v = tl.load(pad_ptr + (heads + head) * HEAD_DIM + channel, channel < HEAD_DIM, other=0.0)
        k = tl.where(pad, pad_k.to(k.dtype)[None, :], k)
        v = tl.where(pad, pad_v.to(v.dtype)[None, :], v)
    k, inverse = normalise(k, logit_scale_ptr)
    return k, inverse, v


@triton.jit
def load_bias(bias_ptr, head, query, key, N: tl.constexpr):
    """A tile of the bias [heads, N, N] in base-2 units; -inf for keys past the window's end, so never attended."""
    if bias_ptr is None:
        bias = tl.zeros((query.shape[0], key.shape[0]), tl.float32)
    else:
        if N * N >= 2**31:
            query = query.to(tl.int64)
        ptrs = bias_ptr + head * (N * N) + (query[:, None] * N + key[None, :])
        bias = tl.load(ptrs, (query < N)[:, None] & (key < N)[None, :], other=0.0).to(tl.float32) * LOG2E
    return tl.where((key < N)[None, :], bias, float("-inf"))


@triton.jit
def far_side(t, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """The axes, one bit each, along which a token lies behind the seam in a window that the seam cuts."""
    d, h, w = window_tokens(t, WINDOW)
    side = tl.zeros_like(t)
    if SHIFT[0] > 0:
        side |= tl.where(d >= WINDOW[0] - SHIFT[0], 1, 0)
    if SHIFT[1] > 0:
        side |= tl.where(h >= WINDOW[1] - SHIFT[1], 2, 0)
    if SHIFT[2] > 0:
        side |= tl.where(w >= WINDOW[2] - SHIFT[2], 4, 0)
    return side


@triton.jit
def add_mask(scores, query, key, origin, size, mask_value, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """Add the mask in the windows that the seam cuts, the last along a shifted axis: in the others it is zero."""
    if SHIFT[0] + SHIFT[1] + SHIFT[2] > 0:
        cut = tl.where(origin[0] + WINDOW[0] >= size[0], 1, 0)
        cut |= tl.where(origin[1] + WINDOW[1] >= size[1], 2, 0)
        cut |= tl.where(origin[2] + WINDOW[2] >= size[2], 4, 0)
        if cut > 0:
            q_side = far_side(query, WINDOW, SHIFT) & cut
            k_side = far_side(key, WINDOW, SHIFT) & cut
            scores += tl.where(q_side[:, None] != k_side[None, :], mask_value * LOG2E, 0.0)
    return scores


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, logit_scale_ptr, bias_ptr, pad_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, out_strides, lse_strides, size, windows, heads, scale, mask_value,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, ROLL_PAD: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A window is one tile of BLOCK_N tokens; a program loops over windows of one head."""
    if k_strides is None:
        k_strides = q_strides
    if v_strides is None:
        v_strides = q_strides
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    head = tl.program_id(1).to(tl.int64)
    scale = load_scale(logit_scale_ptr, head, scale)
    t = tl.arange(0, BLOCK_N)
    local = window_tokens(t, WINDOW)
    bias = load_bias(bias_ptr, head, t, t, N)
    for window in tl.range(tl.program_id(0), windows, tl.num_programs(0)):
        b, origin = window_origin(window, size, WINDOW)
        index, inside = image_index(origin, local, size, WINDOW, SHIFT, ROLL_PAD)
        valid = t < N
        if PADDED:
            valid = valid & inside
        q, _inverse = load_queries(q_ptr, logit_scale_ptr, q_strides, head, b, index, valid, HEAD_DIM, BLOCK_D)
        k, _k_inverse, v = load_keys(
            k_ptr, v_ptr, logit_scale_ptr, pad_ptr, k_strides, v_strides, head, heads, b, index, inside,
            t < N, PADDED, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        scores = add_mask(scores, t, t, origin, size, mask_value, WINDOW, SHIFT)
        top = tl.max(scores, 1)
        p = tl.exp2(scores - top[:, None])
        total = tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (1.0 / total)[:, None]
        store_tokens(out_ptr, out_strides, head, b, index, valid, out, HEAD_DIM, BLOCK_D)
        tl.store(lse_ptr + head + offset(b, index, lse_strides), top + tl.log2(total), valid)


@triton.jit
def _forward_tiled_kernel(
    q_ptr, k_ptr, v_ptr, logit_scale_ptr, bias_ptr, pad_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, out_strides, lse_strides, size, windows, heads, scale, mask_value,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, ROLL_PAD: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of a window against a loop over its keys, BLOCK_N at a time, with a running maximum."""
    if k_strides is None:
        k_strides = q_strides
    if v_strides is None:
        v_strides = q_strides
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    scale = load_scale(logit_scale_ptr, head, scale)
    for item in tl.range(tl.program_id(0), windows * TILES, tl.num_programs(0)):
        b, origin = window_origin(item // TILES, size, WINDOW)
        query = item % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
        q_index, q_valid = image_index(origin, window_tokens(query, WINDOW), size, WINDOW, SHIFT, ROLL_PAD)
        q_valid = q_valid & (query < N)
        q, _inverse = load_queries(q_ptr, logit_scale_ptr, q_strides, head, b, q_index, q_valid, HEAD_DIM, BLOCK_D)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, N, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            index, inside = image_index(origin, window_tokens(key, WINDOW), size, WINDOW, SHIFT, ROLL_PAD)
            k, _k_inverse, v = load_keys(
                k_ptr, v_ptr, logit_scale_ptr, pad_ptr, k_strides, v_strides, head, heads, b, index, inside,
                key < N, PADDED, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            bias = load_bias(bias_ptr, head, query, key, N)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
            scores = add_mask(scores, query, key, origin, size, mask_value, WINDOW, SHIFT)
            new_top = tl.maximum(top, tl.max(scores, 1))
            # a row whose scores are all -inf so far has nothing to rescale: -inf less -inf would be NaN
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(scores - base[:, None])
            rescale = tl.exp2(top - base)
            total = total * rescale + tl.sum(p, 1)
            out = out * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            top = new_top
        store_tokens(out_ptr, out_strides, head, b, q_index, q_valid, out * (1.0 / total)[:, None], HEAD_DIM, BLOCK_D)
        tl.store(lse_ptr + head + offset(b, q_index, lse_strides), top + tl.log2(total), q_valid)


@triton.jit
def probabilities(
    q, k, lse, bias, query, key, origin, size, scale, mask_value,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Recompute a tile of probabilities. [queries, keys]"""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
    scores = add_mask(scores, query, key, origin, size, mask_value, WINDOW, SHIFT)
    return tl.exp2(scores - lse[:, None])


@triton.jit
def load_lse(lse_ptr, strides, head, b, index, valid):
    """Log-sum-exp of some queries; +inf where there is none, so that its probabilities are zero."""
    return tl.load(lse_ptr + head + offset(b, index, strides), valid, other=float("inf"))


@triton.jit
def store_pad_gradient(dpad_ptr, program, heads, head, dpad_k, dpad_v, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program's partial. [programs, 2, heads, HEAD_DIM]"""
    channel = tl.arange(0, BLOCK_D)
    ptrs = dpad_ptr + (program.to(tl.int64) * 2 * heads + head) * HEAD_DIM + channel
    tl.store(ptrs, dpad_k, channel < HEAD_DIM)
    tl.store(ptrs + heads * HEAD_DIM, dpad_v, channel < HEAD_DIM)


@triton.jit
def store_scale_gradient(dlogit_scale_ptr, logit_scale_ptr, program, heads, head, dlogit_scale):
    """One program's partial, zero where the scale is clamped. [programs, heads]"""
    clamped = tl.load(logit_scale_ptr + head).to(tl.float32) > MAX_LOGIT_SCALE
    total = tl.where(clamped, 0.0, tl.sum(dlogit_scale, 0))
    tl.store(dlogit_scale_ptr + program.to(tl.int64) * heads + head, total)


@triton.jit
def _backward_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, logit_scale_ptr, bias_ptr, pad_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
    dlogit_scale_ptr, dbias_ptr, dpad_ptr,
    dout_strides, q_strides, k_strides, v_strides, lse_strides, grad_strides,
    size, windows, heads, scale, mask_value,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, ROLL_PAD: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A window is one tile; a program loops over windows of one head and sums their bias gradient in registers."""
    if k_strides is None:
        k_strides = q_strides
    if v_strides is None:
        v_strides = q_strides
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    head = tl.program_id(1).to(tl.int64)
    scale = load_scale(logit_scale_ptr, head, scale)
    t = tl.arange(0, BLOCK_N)
    local = window_tokens(t, WINDOW)
    bias = load_bias(bias_ptr, head, t, t, N)
    dbias = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    dlogit_scale = tl.zeros((BLOCK_N,), tl.float32)
    dpad_k = tl.zeros((BLOCK_D,), tl.float32)
    dpad_v = tl.zeros((BLOCK_D,), tl.float32)
    for window in tl.range(tl.program_id(0), windows, tl.num_programs(0), disable_licm=True):
        b, origin = window_origin(window, size, WINDOW)
        index, inside = image_index(origin, local, size, WINDOW, SHIFT, ROLL_PAD)
        valid = t < N
        if PADDED:
            valid = valid & inside
        q, q_inverse = load_queries(q_ptr, logit_scale_ptr, q_strides, head, b, index, valid, HEAD_DIM, BLOCK_D)
        k, k_inverse, v = load_keys(
            k_ptr, v_ptr, logit_scale_ptr, pad_ptr, k_strides, v_strides, head, heads, b, index, inside,
            t < N, PADDED, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        dout = load_tokens(dout_ptr, dout_strides, head, b, index, valid, HEAD_DIM, BLOCK_D)
        lse = load_lse(lse_ptr, lse_strides, head, b, index, valid)
        p = probabilities(q, k, lse, bias, t, t, origin, size, scale, mask_value, WINDOW, SHIFT, PRECISION)
        # rounding in lse leaves their sum off one, which the same way in every window would bias the gradients
        p *= (1.0 / tl.maximum(tl.sum(p, 1), 1e-30))[:, None]
        dv = tl.dot(tl.trans(p.to(v.dtype)), dout, input_precision=PRECISION)
        store_tokens(dv_ptr, grad_strides, head, b, index, valid, dv, HEAD_DIM, BLOCK_D)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if dbias_ptr is not None:
            dbias += ds
        ds = ds.to(q.dtype)
        dq = tl.dot(ds, k, input_precision=PRECISION) * scale
        dq, along = normalise_backward(dq, q, q_inverse, logit_scale_ptr)
        dlogit_scale += along
        store_tokens(dq_ptr, grad_strides, head, b, index, valid, dq, HEAD_DIM, BLOCK_D)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
        dk, along = normalise_backward(dk, k, k_inverse, logit_scale_ptr)
        store_tokens(dk_ptr, grad_strides, head, b, index, valid, dk, HEAD_DIM, BLOCK_D)
        if dpad_ptr is not None:
            pad = ((t < N) & (inside == 0))[:, None]
            dpad_k += tl.sum(tl.where(pad, dk, 0.0), 0)
            dpad_v += tl.sum(tl.where(pad, dv, 0.0), 0)
    if dbias_ptr is not None:
        ptrs = dbias_ptr + (tl.program_id(0).to(tl.int64) * heads + head) * (N * N) + t[:, None] * N + t[None, :]
        tl.store(ptrs, dbias, (t < N)[:, None] & (t < N)[None, :])
    if dlogit_scale_ptr is not None:
        store_scale_gradient(dlogit_scale_ptr, logit_scale_ptr, tl.program_id(0), heads, head, dlogit_scale)
    if dpad_ptr is not None:
        store_pad_gradient(dpad_ptr, tl.program_id(0), heads, head, dpad_k, dpad_v, HEAD_DIM, BLOCK_D)


@triton.jit
def _dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, logit_scale_ptr, bias_ptr, pad_ptr, out_ptr, lse_ptr, dq_ptr, delta_ptr, norm_ptr,
    dlogit_scale_ptr,
    dout_strides, q_strides, k_strides, v_strides, out_strides, lse_strides, grad_strides,
    size, windows, heads, scale, mask_value,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, ROLL_PAD: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries, in a loop over keys; and delta = sum_j p dp = sum_d out dout, for the other kernels.

    In fp32 a loop of its own sums delta, and norm, which makes the probabilities sum to one: out and lse were rounded,
    and what that leaves over would be the same way off in every window.
    """
    if k_strides is None:
        k_strides = q_strides
    if v_strides is None:
        v_strides = q_strides
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    scale = load_scale(logit_scale_ptr, head, scale)
    dlogit_scale = tl.zeros((BLOCK_M,), tl.float32)
    for item in tl.range(tl.program_id(0), windows * TILES, tl.num_programs(0)):
        b, origin = window_origin(item // TILES, size, WINDOW)
        query = item % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
        q_index, q_valid = image_index(origin, window_tokens(query, WINDOW), size, WINDOW, SHIFT, ROLL_PAD)
        q_valid = q_valid & (query < N)
        q, q_inverse = load_queries(q_ptr, logit_scale_ptr, q_strides, head, b, q_index, q_valid, HEAD_DIM, BLOCK_D)
        dout = load_tokens(dout_ptr, dout_strides, head, b, q_index, q_valid, HEAD_DIM, BLOCK_D)
        lse = load_lse(lse_ptr, lse_strides, head, b, q_index, q_valid)
        if q_ptr.dtype.element_ty == tl.float32:
            delta = tl.zeros((BLOCK_M,), tl.float32)
            total = tl.full((BLOCK_M,), 1e-30, tl.float32)
            for start in range(0, N, BLOCK_N):
                key = start + tl.arange(0, BLOCK_N)
                index, inside = image_index(origin, window_tokens(key, WINDOW), size, WINDOW, SHIFT, ROLL_PAD)
                k, _k_inverse, v = load_keys(
                    k_ptr, v_ptr, logit_scale_ptr, pad_ptr, k_strides, v_strides, head, heads, b, index, inside,
                    key < N, PADDED, HEAD_DIM, BLOCK_D,
                )  # fmt: skip
                bias = load_bias(bias_ptr, head, query, key, N)
                p = probabilities(
                    q, k, lse, bias, query, key, origin, size, scale, mask_value, WINDOW, SHIFT, PRECISION
                )  # fmt: skip
                total += tl.sum(p, 1)
                delta += tl.sum(p * tl.dot(dout, tl.trans(v), input_precision=PRECISION), 1)
            norm = 1.0 / total
            delta *= norm
            tl.store(norm_ptr + head + offset(b, q_index, lse_strides), norm, q_valid)
        else:
            out = load_tokens(out_ptr, out_strides, head, b, q_index, q_valid, HEAD_DIM, BLOCK_D)
            delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        tl.store(delta_ptr + head + offset(b, q_index, lse_strides), delta, q_valid)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, N, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            index, inside = image_index(origin, window_tokens(key, WINDOW), size, WINDOW, SHIFT, ROLL_PAD)
            k, _k_inverse, v = load_keys(
                k_ptr, v_ptr, logit_scale_ptr, pad_ptr, k_strides, v_strides, head, heads, b, index, inside,
                key < N, PADDED, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            bias = load_bias(bias_ptr, head, query, key, N)
            p = probabilities(q, k, lse, bias, query, key, origin, size, scale, mask_value, WINDOW, SHIFT, PRECISION)
            if q_ptr.dtype.element_ty == tl.float32:
                p *= norm[:, None]
            ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
        dq, along = normalise_backward(dq * scale, q, q_inverse, logit_scale_ptr)
        store_tokens(dq_ptr, grad_strides, head, b, q_index, q_valid, dq, HEAD_DIM, BLOCK_D)
        dlogit_scale += along
    if dlogit_scale_ptr is not None:
        store_scale_gradient(dlogit_scale_ptr, logit_scale_ptr, tl.program_id(0), heads, head, dlogit_scale)


@triton.jit
def _dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, logit_scale_ptr, bias_ptr, pad_ptr, lse_ptr, delta_ptr, norm_ptr,
    dk_ptr, dv_ptr, dpad_ptr,
    dout_strides, q_strides, k_strides, v_strides, lse_strides, grad_strides,
    size, windows, heads, scale, mask_value,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, ROLL_PAD: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys, in a loop over queries; those of pads are summed over the program's windows."""
    if k_strides is None:
        k_strides = q_strides
    if v_strides is None:
        v_strides = q_strides
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    head = tl.program_id(1).to(tl.int64)
    scale = load_scale(logit_scale_ptr, head, scale)
    dpad_k = tl.zeros((BLOCK_D,), tl.float32)
    dpad_v = tl.zeros((BLOCK_D,), tl.float32)
    for item in tl.range(tl.program_id(0), windows * TILES, tl.num_programs(0)):
        b, origin = window_origin(item // TILES, size, WINDOW)
        key = item % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        index, inside = image_index(origin, window_tokens(key, WINDOW), size, WINDOW, SHIFT, ROLL_PAD)
        k, k_inverse, v = load_keys(
            k_ptr, v_ptr, logit_scale_ptr, pad_ptr, k_strides, v_strides, head, heads, b, index, inside,
            key < N, PADDED, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for start in range(0, N, BLOCK_M):
            query = start + tl.arange(0, BLOCK_M)
            q_index, q_valid = image_index(origin, window_tokens(query, WINDOW), size, WINDOW, SHIFT, ROLL_PAD)
            q_valid = q_valid & (query < N)
            q, _inverse = load_queries(q_ptr, logit_scale_ptr, q_strides, head, b, q_index, q_valid, HEAD_DIM, BLOCK_D)
            dout = load_tokens(dout_ptr, dout_strides, head, b, q_index, q_valid, HEAD_DIM, BLOCK_D)
            lse = load_lse(lse_ptr, lse_strides, head, b, q_index, q_valid)
            delta = tl.load(delta_ptr + head + offset(b, q_index, lse_strides), q_valid, other=0.0)
            bias = load_bias(bias_ptr, head, query, key, N)
            p = probabilities(q, k, lse, bias, query, key, origin, size, scale, mask_value, WINDOW, SHIFT, PRECISION)
            if q_ptr.dtype.element_ty == tl.float32:
                p *= tl.load(norm_ptr + head + offset(b, q_index, lse_strides), q_valid, other=0.0)[:, None]
            dv += tl.dot(tl.trans(p.to(v.dtype)), dout, input_precision=PRECISION)
            ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
        dk, _along = normalise_backward(dk * scale, k, k_inverse, logit_scale_ptr)
        valid = (key < N) & inside
        store_tokens(dk_ptr, grad_strides, head, b, index, valid, dk, HEAD_DIM, BLOCK_D)
        store_tokens(dv_ptr, grad_strides, head, b, index, valid, dv, HEAD_DIM, BLOCK_D)
        if dpad_ptr is not None:
            pad = ((key < N) & (inside == 0))[:, None]
            dpad_k += tl.sum(tl.where(pad, dk, 0.0), 0)
            dpad_v += tl.sum(tl.where(pad, dv, 0.0), 0)
    if dpad_ptr is not None:
        store_pad_gradient(dpad_ptr, tl.program_id(0), heads, head, dpad_k, dpad_v, HEAD_DIM, BLOCK_D)


@triton.jit
def _dbias_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, logit_scale_ptr, bias_ptr, pad_ptr, lse_ptr, delta_ptr, norm_ptr, dbias_ptr,
    dout_strides, q_strides, k_strides, v_strides, lse_strides,
    size, windows, heads, chunks, scale, mask_value,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, ROLL_PAD: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of the bias gradient, summed over every ``chunks``-th window. Partials [chunks, heads, N, N]"""
    if k_strides is None:
        k_strides = q_strides
    if v_strides is None:
        v_strides = q_strides
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    M_TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    head = tl.program_id(1).to(tl.int64)
    scale = load_scale(logit_scale_ptr, head, scale)
    tile = tl.program_id(0) % (M_TILES * N_TILES)
    chunk = tl.program_id(0) // (M_TILES * N_TILES)
    query = tile // N_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tile % N_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    q_local = window_tokens(query, WINDOW)
    local = window_tokens(key, WINDOW)
    bias = load_bias(bias_ptr, head, query, key, N)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for window in tl.range(chunk, windows, chunks):
        b, origin = window_origin(window, size, WINDOW)
        q_index, q_valid = image_index(origin, q_local, size, WINDOW, SHIFT, ROLL_PAD)
        q_valid = q_valid & (query < N)
        index, inside = image_index(origin, local, size, WINDOW, SHIFT, ROLL_PAD)
        q, _inverse = load_queries(q_ptr, logit_scale_ptr, q_strides, head, b, q_index, q_valid, HEAD_DIM, BLOCK_D)
        dout = load_tokens(dout_ptr, dout_strides, head, b, q_index, q_valid, HEAD_DIM, BLOCK_D)
        k, _k_inverse, v = load_keys(
            k_ptr, v_ptr, logit_scale_ptr, pad_ptr, k_strides, v_strides, head, heads, b, index, inside,
            key < N, PADDED, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        lse = load_lse(lse_ptr, lse_strides, head, b, q_index, q_valid)
        delta = tl.load(delta_ptr + head + offset(b, q_index, lse_strides), q_valid, other=0.0)
        p = probabilities(q, k, lse, bias, query, key, origin, size, scale, mask_value, WINDOW, SHIFT, PRECISION)
        if q_ptr.dtype.element_ty == tl.float32:
            p *= tl.load(norm_ptr + head + offset(b, q_index, lse_strides), q_valid, other=0.0)[:, None]
        dbias += p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    ptrs = dbias_ptr + (chunk.to(tl.int64) * heads + head) * (N * N) + query[:, None].to(tl.int64) * N + key[None, :]
    tl.store(ptrs, dbias, (query < N)[:, None] & (key < N)[None, :])


class Call:
    """What every kernel of a call is launched with: geometry, and strides for three spatial axes."""

    def __init__(
        self,
        q: Tensor,
        window: Sequence[int],
        shift: Sequence[int],
        scale: float | None,
        pad_order: str,
        mask_value: float,
    ) -> None:
        space = q.shape[1:-2]
        self.axes = len(space)
        self.heads, self.head_dim = q.shape[-2:]
        self.tokens = math.prod(window)
        self.windows = q.shape[0] * math.prod(-(-n // w) for n, w in zip(space, window, strict=True))
        self.sizes = three(space, 1), self.windows, self.heads
        self.scalars = scale, mask_value
        padded = any(n % w for n, w in zip(space, window, strict=True))
        self.constants = {
            "WINDOW": three(window, 1),
            "SHIFT": three(shift, 0),
            "ROLL_PAD": padded and pad_order == "roll_pad",  # without pads the orders are one
            "PADDED": padded,
            "PRECISION": "tf32" if q.dtype == torch.float32 and tf32_allowed() else "ieee",
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(self.head_dim)),
            "enable_fp_fusion": True,
        }

    def strides(self, x: Tensor) -> tuple[int, ...]:
        """[B, *space, heads, ...] -> strides of batch, three spatial axes and heads."""
        return *image_strides(x, self.axes), x.stride(self.axes + 1)

    def qkv_strides(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[int, ...] | None, ...]:
        """Those of k and v are None where they are q's, as nearly always: then a kernel computes each offset once."""
        strides = self.strides(q)
        return strides, *(None if self.strides(x) == strides else self.strides(x) for x in (k, v))


class Partials:
    """A gradient that is summed over programs: each writes one fp32 partial, and they are added in a fixed order."""

    WORKSPACE = 10 * 2**20  # bytes that partials may take, or one partial where that is more

    def __init__(self, total: Tensor | None) -> None:
        self.total = total
        self.partials: Tensor | None = None

    def most(self) -> int:
        """How many partials the workspace holds."""
        return 1 if self.total is None else max(1, self.WORKSPACE // (4 * self.total.numel()))

    def allocate(self, programs: int) -> Tensor | None:
        if self.total is not None:
            self.partials = self.total.new_empty(programs, *self.total.shape, dtype=torch.float32)
        return self.partials

    def reduce(self) -> None:
        if self.total is not None and self.partials is not None:
            self.total.copy_(self.partials.sum(0))


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    pad_kv: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    pad_order: str,
    mask_value: float,
) -> tuple[Tensor, Tensor]:
    return attend(q, k, v, None, bias, pad_kv, Call(q, window, shift, scale, pad_order, mask_value))


def window_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    pad_kv: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    dpad_kv: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    pad_order: str,
    mask_value: float,
) -> None:
    call = Call(q, window, shift, scale, pad_order, mask_value)
    attend_backward(dout, q, k, v, None, bias, pad_kv, out, lse, dq, dk, dv, None, dbias, dpad_kv, call)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor | None,
    bias: Tensor | None,
    pad_kv: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """Allocate and launch the forward pass: of cosine attention where there is a ``logit_scale``."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    logit_scale, bias, pad_kv = (None if x is None else x.contiguous() for x in (logit_scale, bias, pad_kv))
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    if not call.windows:
        return out, lse
    config = configure("forward", q, call.tokens)
    tiles = 1 if config.whole else -(-call.tokens // config.BLOCK_M)
    kernel = _forward_kernel if config.whole else _forward_tiled_kernel
    with on_device(q):
        kernel[(config.programs(q, call.windows * tiles, call.heads), call.heads)](
            q, k, v, logit_scale, bias, pad_kv, out, lse,
            *call.qkv_strides(q, k, v), call.strides(out), call.strides(lse), *call.sizes, *call.scalars,
            **call.constants, **config.options,
        )  # fmt: skip
    return out, lse


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor | None,
    bias: Tensor | None,
    pad_kv: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dlogit_scale: Tensor | None,
    dbias: Tensor | None,
    dpad_kv: Tensor | None,
    call: Call,
) -> None:
    """Launch the backward pass, which fills the gradients."""
    dout, q, k, v = unit_stride(dout), unit_stride(q), unit_stride(k), unit_stride(v)
    lse = lse.contiguous()
    logit_scale, bias, pad_kv = (None if x is None else x.contiguous() for x in (logit_scale, bias, pad_kv))
    if not call.windows:
        for gradient in (dlogit_scale, dbias, dpad_kv):
            if gradient is not None:
                gradient.zero_()
        return
    if dpad_kv is not None and not call.constants["PADDED"]:
        dpad_kv.zero_()
        dpad_kv = None
    sums = Partials(dlogit_scale), Partials(dbias), Partials(dpad_kv)
    inputs = q, k, v, logit_scale, bias, pad_kv
    strides = *call.qkv_strides(q, k, v), call.strides(lse)
    with on_device(q):
        config = configure("backward", q, call.tokens)
        if config is not None:
            programs = config.programs(q, call.windows, call.heads)
            _backward_kernel[(programs, call.heads)](
                dout, *inputs, lse, dq, dk, dv, *[x.allocate(programs) for x in sums],
                call.strides(dout), *strides, call.strides(dq), *call.sizes, *call.scalars,
                **call.constants, **config.options,
            )  # fmt: skip
        else:
            backward_tiled(call, dout, inputs, strides, out, lse, dq, dk, dv, *sums)
    for x in sums:
        x.reduce()


def backward_tiled(
    call: Call,
    dout: Tensor,
    inputs: tuple[Tensor | None, ...],
    strides: tuple[tuple[int, ...] | None, ...],
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dlogit_scale_sum: Partials,
    dbias_sum: Partials,
    dpad_sum: Partials,
) -> None:
    delta = torch.empty_like(lse)
    norm = torch.empty_like(lse) if dq.dtype == torch.float32 else None

    config = configure("dq", dq, call.tokens)
    items = call.windows * -(-call.tokens // config.BLOCK_M)
    programs = config.programs(dq, items, call.heads)
    _dq_kernel[(programs, call.heads)](
        dout, *inputs, out, lse, dq, delta, norm, dlogit_scale_sum.allocate(programs),
        call.strides(dout), *strides[:-1], call.strides(out), strides[-1], call.strides(dq),
        *call.sizes, *call.scalars, **call.constants, **config.options,
    )  # fmt: skip

    config = configure("dkdv", dq, call.tokens)
    items = call.windows * -(-call.tokens // config.BLOCK_N)
    programs = config.programs(dq, items, call.heads)
    _dkdv_kernel[(programs, call.heads)](
        dout, *inputs, lse, delta, norm, dk, dv, dpad_sum.allocate(programs),
        call.strides(dout), *strides, call.strides(dq), *call.sizes, *call.scalars, **call.constants, **config.options,
    )  # fmt: skip

    if dbias_sum.total is not None:
        config = configure("dbias", dq, call.tokens)
        tiles = -(-call.tokens // config.BLOCK_M) * -(-call.tokens // config.BLOCK_N)
        chunks = min(config.programs(dq, call.windows, call.heads * tiles), dbias_sum.most())
        _dbias_kernel[(chunks * tiles, call.heads)](
            dout, *inputs, lse, delta, norm, dbias_sum.allocate(chunks),
            call.strides(dout), *strides, *call.sizes, chunks, *call.scalars, **call.constants, **config.options,
        )  # fmt: skip
