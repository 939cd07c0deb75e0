"""Patch merging's gather and layer normalisation in one pass: the groups of tokens are in the norm's addresses."""

import torch
from torch import Tensor

from swinops.kernels.layer_norm import matrix, norm, norm_backward
from swinops.kernels.window_attention import unit_stride


def patch_merging_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, C = x.shape
    y = x.new_empty(B, -(-H // 2), -(-W // 2), 4 * C, dtype=dtype)
    return y, *norm(unit_stride(x), None, None, None, weight, bias, None, y, eps, (H, W))


def patch_merging_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    _, H, W, _ = x.shape
    norm_backward(None, matrix(dy), unit_stride(x), mean, rstd, None, weight, dx, None, dweight, dbias, size=(H, W))
