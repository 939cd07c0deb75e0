"""Layer normalisation, alone or with the residual sum before or after it, and over the groups of patch merging.

A program keeps the weights in registers and loops over tiles of rows. Many short rows share a tile, so that a warp's
loads are full at 96 channels as at 3072. A row is read once: its mean and then its variance are taken in registers.

The backward kernel makes dx and the sums over rows in one pass. Each program writes one partial of dweight and dbias,
and the partials, whose number depends on the shape and the device alone, are added in a fixed order: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from swinops.kernels.cyclic_shift import on_device
from swinops.kernels.tuning import configure_norm
from swinops.kernels.window_attention import unit_stride


@triton.jit
def tile_rows(tile, length, ONE_LINE: tl.constexpr, BLOCK_M: tl.constexpr):
    """The first row of tile number ``tile``, 64-bit, its line and place there, and which of the tile's rows there are.

    Rows come in lines of ``length``, and a tile keeps to one.
    """
    tiles = tl.cdiv(length, BLOCK_M)
    line = tile // tiles
    start = (tile if ONE_LINE else tile % tiles) * BLOCK_M
    row = start.to(tl.int64)
    if not ONE_LINE:
        row += line.to(tl.int64) * length
    return row, line, start, tl.arange(0, BLOCK_M) < length - start


@triton.jit
def tile_mask(exists, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which elements of a tile there are: constant along the channels if it can be, for wide accesses."""
    if BLOCK_C == C:
        return exists[:, None]
    else:
        return exists[:, None] & (tl.arange(0, BLOCK_C) < C)[None, :]


@triton.jit
def row_ptrs(ptr, row, strides, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where BLOCK_M rows of a matrix lie; one that is contiguous has no ``strides``. [BLOCK_M, BLOCK_C]"""
    m, channel = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_C)[None, :]
    if strides is None:
        return ptr + row * C + (m * C + channel)
    else:
        return ptr + row * strides[0] + (m.to(tl.int64) * strides[0] + channel)


@triton.jit
def token_ptrs(
    ptr, row, line, start, strides, size, mask,
    PADDED: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``row_ptrs`` with the mask; or, of an image of ``size`` (H, W), where the tokens lie that are merged into rows.

    A row is then 2 x 2 tokens: top left, bottom left, top right, bottom right. In an image of odd size some are not
    there. A line of rows is two of the image.
    """
    if size is None:
        return row_ptrs(ptr, row, strides, C, BLOCK_M, BLOCK_C), mask
    else:
        nH = tl.cdiv(size[0], 2)
        h, w = line % nH * 2, (start + tl.arange(0, BLOCK_M)) * 2
        channel = tl.arange(0, BLOCK_C)
        down, right = channel // (C // 4) % 2, channel // (C // 4) // 2
        if PADDED:
            mask = mask & (down < size[0] - h)[None, :] & (w[:, None] + right[None, :] < size[1])
        group = (line // nH).to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1] + w.to(tl.int64) * strides[2]
        token = down.to(tl.int64) * strides[1] + right.to(tl.int64) * strides[2] + channel % (C // 4)
        return ptr + group[:, None] + token[None, :], mask


@triton.jit
def load(ptrs, mask):
    return tl.load(ptrs, mask, other=0.0).to(tl.float32)


@triton.jit
def load_channels(ptr, default, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """A vector [1, BLOCK_C] of weights, ``default`` where there is none."""
    channel = tl.arange(0, BLOCK_C)
    if ptr is None:
        return tl.full((1, BLOCK_C), default, tl.float32)
    else:
        return load(ptr + channel, channel < C)[None, :]


# images of any size share one compiled kernel
@triton.jit(do_not_specialize=["lines", "length"])
def _norm_kernel(
    x_ptr, f_ptr, residual_ptr, sample_scale_ptr, weight_ptr, bias_ptr, s_ptr, y_ptr, mean_ptr, rstd_ptr,
    x_strides, f_strides, residual_strides, size, lines, length, eps,
    ONE_LINE: tl.constexpr, PADDED: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """s = x + sample_scale f, or x where there is no f; y = residual + sample_scale norm(s), or norm(s) with none.

    Rows come in ``lines`` of ``length``, one for each sample where there is a sample_scale.
    """
    m = tl.arange(0, BLOCK_M)
    weight = load_channels(weight_ptr, 1.0, C, BLOCK_C)
    bias = load_channels(bias_ptr, 0.0, C, BLOCK_C)
    for tile in tl.range(tl.program_id(0), lines * tl.cdiv(length, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        row, line, start, exists = tile_rows(tile, length, ONE_LINE, BLOCK_M)
        mask = tile_mask(exists, C, BLOCK_C)
        ptrs, x_mask = token_ptrs(
            x_ptr, row, line, start, x_strides, size, mask, PADDED, C, BLOCK_M, BLOCK_C
        )  # fmt: skip
        s = load(ptrs, x_mask)
        if sample_scale_ptr is not None:
            scale = tl.load(sample_scale_ptr + line).to(tl.float32)
        if f_ptr is not None:
            f = load(row_ptrs(f_ptr, row, f_strides, C, BLOCK_M, BLOCK_C), mask)
            if sample_scale_ptr is not None:
                f *= scale
            rounded = (s + f).to(s_ptr.dtype.element_ty)
            tl.store(row_ptrs(s_ptr, row, None, C, BLOCK_M, BLOCK_C), rounded, mask)
            s = rounded.to(tl.float32)
        mean = tl.sum(s, 1) * (1.0 / C)
        centred = s - mean[:, None]
        if BLOCK_C > C:
            centred = tl.where((tl.arange(0, BLOCK_C) < C)[None, :], centred, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) * (1.0 / C) + eps)
        y = centred * rstd[:, None] * weight + bias
        if residual_ptr is not None:
            if sample_scale_ptr is not None:
                y *= scale
            y += load(row_ptrs(residual_ptr, row, residual_strides, C, BLOCK_M, BLOCK_C), mask)
        ptrs = row_ptrs(y_ptr, row, None, C, BLOCK_M, BLOCK_C)
        tl.store(ptrs, y.to(y_ptr.dtype.element_ty), mask)
        tl.store(mean_ptr + row + m, mean, exists)
        tl.store(rstd_ptr + row + m, rstd, exists)


@triton.jit(do_not_specialize=["lines", "length"])
def _norm_backward_kernel(
    ds_ptr, dy_ptr, s_ptr, mean_ptr, rstd_ptr, sample_scale_ptr, weight_ptr, dx_ptr, df_ptr, dweight_ptr, dbias_ptr,
    ds_strides, dy_strides, s_strides, dx_strides, size, lines, length,
    SCALED_NORM: tl.constexpr, ONE_LINE: tl.constexpr, PADDED: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = ds + the gradient through the norm, df = sample_scale dx, and this program's sums of dweight and dbias.

    SCALED_NORM: sample_scale multiplied the norm, so it multiplies dy and not df.
    """
    # of rows half a tile apart a thread has both: it adds them first, and holds half as many sums
    PAIR: tl.constexpr = 1 if BLOCK_M == 1 else 2
    m = tl.arange(0, BLOCK_M)
    weight = load_channels(weight_ptr, 1.0, C, BLOCK_C)
    dweight = tl.zeros((BLOCK_M // PAIR, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_M // PAIR, BLOCK_C), tl.float32)
    for tile in tl.range(tl.program_id(0), lines * tl.cdiv(length, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        row, line, start, exists = tile_rows(tile, length, ONE_LINE, BLOCK_M)
        mask = tile_mask(exists, C, BLOCK_C)
        dy = load(row_ptrs(dy_ptr, row, dy_strides, C, BLOCK_M, BLOCK_C), mask)
        ptrs, s_mask = token_ptrs(
            s_ptr, row, line, start, s_strides, size, mask, PADDED, C, BLOCK_M, BLOCK_C
        )  # fmt: skip
        s = load(ptrs, s_mask)
        mean = load(mean_ptr + row + m, exists)[:, None]
        rstd = load(rstd_ptr + row + m, exists)[:, None]
        if sample_scale_ptr is not None:
            scale = tl.load(sample_scale_ptr + line).to(tl.float32)
            if SCALED_NORM:
                dy *= scale
        normed = (s - mean) * rstd
        if dweight_ptr is not None:
            dweight += tl.sum(tl.reshape(dy * normed, (PAIR, BLOCK_M // PAIR, BLOCK_C)), 0)
        if dbias_ptr is not None:
            dbias += tl.sum(tl.reshape(dy, (PAIR, BLOCK_M // PAIR, BLOCK_C)), 0)
        # past the last channel dy is zero, and with it all that is summed
        dnormed = dy * weight
        along_one = tl.sum(dnormed, 1)[:, None] * (1.0 / C)
        along_normed = tl.sum(dnormed * normed, 1)[:, None] * (1.0 / C)
        dx = (dnormed - along_one - normed * along_normed) * rstd
        if ds_ptr is not None:
            dx += load(row_ptrs(ds_ptr, row, ds_strides, C, BLOCK_M, BLOCK_C), mask)
        ptrs, dx_mask = token_ptrs(
            dx_ptr, row, line, start, dx_strides, size, mask, PADDED, C, BLOCK_M, BLOCK_C
        )  # fmt: skip
        tl.store(ptrs, dx.to(dx_ptr.dtype.element_ty), dx_mask)
        if df_ptr is not None:
            if sample_scale_ptr is not None:
                dx *= scale
            ptrs = row_ptrs(df_ptr, row, None, C, BLOCK_M, BLOCK_C)
            tl.store(ptrs, dx.to(df_ptr.dtype.element_ty), mask)
    channel = tl.arange(0, BLOCK_C)
    partial = tl.program_id(0).to(tl.int64) * C + channel
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), channel < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), channel < C)


@triton.jit
def _sum_kernel(
    partials_ptr, dweight_ptr, dbias_ptr, programs, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Add the partials [2, programs, C], or [programs, C] of one gradient alone, in a fixed order."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    first = tl.program_id(1) * programs
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < programs)[:, None] & (channel < C)[None, :]
        total += tl.load(partials_ptr + (first + p).to(tl.int64)[:, None] * C + channel[None, :], mask, other=0.0)
    value = tl.sum(total, 0)
    if dweight_ptr is not None and tl.program_id(1) == 0:
        tl.store(dweight_ptr + channel, value.to(dweight_ptr.dtype.element_ty), channel < C)
    if dbias_ptr is not None and tl.program_id(1) == tl.num_programs(1) - 1:
        tl.store(dbias_ptr + channel, value.to(dbias_ptr.dtype.element_ty), channel < C)


WORKSPACE = 10 * 2**20  # bytes that the partials of dweight and dbias may take


def matrix(x: Tensor) -> Tensor:
    """[*, C] -> [rows, C] with one stride for the rows and none for the channels: a view, or a copy where none is."""
    return unit_stride(x.reshape(-1, x.shape[-1]))


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def strides(x: Tensor | None, size: tuple[int, int] | None = None) -> tuple[int, ...] | None:
    """Of an image, where there is a ``size``, those of batch, height and width; of rows theirs, None if contiguous."""
    if x is None or (size is None and x.is_contiguous()):
        return None
    return x.stride()[: 1 if size is None else 3]


def padded(size: tuple[int, int] | None) -> bool:
    """Whether merging 2 x 2 tokens leaves some without four."""
    return size is not None and any(n % 2 for n in size)


def norm(
    x: Tensor,
    f: Tensor | None,
    residual: Tensor | None,
    sample_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    s: Tensor | None,
    y: Tensor,
    eps: float,
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill s and y, and return mean and rstd. ``x``: [rows, C], or with ``size`` an image of last stride 1."""
    mean, rstd = (y.new_empty(y.shape[:-1], dtype=torch.float32) for _ in range(2))
    if mean.numel():
        C, lines = y.shape[-1], line_count(mean, sample_scale, size)
        config = configure_norm("forward", C, x, f, residual, y)
        length = mean.numel() // lines
        with on_device(x):
            _norm_kernel[(config.programs(y, lines, length),)](
                x, f, residual, *contiguous(sample_scale, weight, bias), s, y, mean, rstd,
                strides(x, size), strides(f), strides(residual), size, lines, length, eps,
                lines == 1, padded(size), C, **config.options, enable_fp_fusion=True,
            )  # fmt: skip
    return mean, rstd


def line_count(mean: Tensor, sample_scale: Tensor | None, size: tuple[int, int] | None) -> int:
    """Lines that rows come in, which no tile crosses: samples that have a factor each, or lines of merged images."""
    if size is not None:
        return mean.shape[:2].numel()
    return 1 if sample_scale is None else sample_scale.numel()


def norm_backward(
    ds: Tensor | None,
    dy: Tensor,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sample_scale: Tensor | None,
    weight: Tensor | None,
    dx: Tensor,
    df: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    scaled_norm: bool = False,
    size: tuple[int, int] | None = None,
) -> None:
    """Fill dx and, where they are not None, df, dweight and dbias. ``s``: as x of ``norm``."""
    wanted = [x for x in (dweight, dbias) if x is not None]
    if not mean.numel():
        for gradient in wanted:
            gradient.zero_()
        return
    C, lines = dy.shape[-1], line_count(mean, sample_scale, size)
    length = mean.numel() // lines
    config = configure_norm("backward", C, dy, ds, s)
    programs = config.programs(dy, lines, length, WORKSPACE // (4 * C * max(1, len(wanted))))
    partials = dy.new_empty(len(wanted), programs, C, dtype=torch.float32)
    with on_device(dy):
        _norm_backward_kernel[(programs,)](
            ds, dy, s, *contiguous(mean, rstd, sample_scale, weight), dx, df,
            None if dweight is None else partials[0], None if dbias is None else partials[-1],
            strides(ds), strides(dy), strides(s, size), strides(dx, size), size,
            lines, length, scaled_norm, lines == 1, padded(size), C, **config.options, enable_fp_fusion=True,
        )  # fmt: skip
        if wanted:
            _sum_kernel[(triton.cdiv(C, 8), len(wanted))](
                partials, dweight, dbias, programs, C, 512, 8, num_warps=8, enable_fp_fusion=True
            )


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=dtype)
    return y, *norm(matrix(x), None, None, None, weight, bias, None, y, eps)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    norm_backward(None, matrix(dy), matrix(x), mean, rstd, None, weight, dx, None, dweight, dbias)


def add_layer_norm(
    x: Tensor,
    f: Tensor,
    sample_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, f.dtype))
    y = x.new_empty(x.shape, dtype=dtype)
    return s, y, *norm(matrix(x), matrix(f), None, sample_scale, weight, bias, s, y, eps)


def add_layer_norm_backward(
    ds: Tensor | None,
    dy: Tensor,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sample_scale: Tensor | None,
    weight: Tensor | None,
    dx: Tensor,
    df: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    ds = None if ds is None else matrix(ds)
    norm_backward(ds, matrix(dy), matrix(s), mean, rstd, sample_scale, weight, dx, df, dweight, dbias)


def layer_norm_add(
    x: Tensor, f: Tensor, sample_scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, f.dtype))
    return out, *norm(matrix(f), None, matrix(x), sample_scale, weight, bias, None, out, eps)


def layer_norm_add_backward(
    dout: Tensor,
    f: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sample_scale: Tensor | None,
    weight: Tensor | None,
    df: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    norm_backward(
        None, matrix(dout), matrix(f), mean, rstd, sample_scale, weight, df, None, dweight, dbias, scaled_norm=True
    )
