"""Continuous position bias of Swin V2 (arXiv 2111.09883, section 3.3): the definition.

A small network gives the bias of each offset x between two tokens of a window:

    h = relu(w1 x + b1),   z = w2 h,   t = 16 sigmoid(z),   bias[head, i, j] = t[row(i - j), head]

and backward, with dt the sum of dbias over the pairs of an offset:

    dz = dt t (16 - t) / 16,   dw2 = dz^T h,   dh = (dz w2) [h > 0],   dw1 = dh^T x,   db1 = sum dh

All in float32 at least, whatever the weights' dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from swinops.reference.relative_position_bias import relative_position_bias, relative_position_bias_backward


def coordinates(window: Sequence[int], pretrained: Sequence[int], log_spaced: bool, like: Tensor) -> Tensor:
    """The network's input for each offset: 8 at the far end of the pretrained window, or 1.06 log-spaced (eq. 4).

    A window of 1 has the offset 0 alone. [(2Mh-1)(2Mw-1), 2]
    """
    axes = [
        torch.arange(1 - m, m, dtype=like.dtype, device=like.device) / max(p - 1, 1) * 8
        for m, p in zip(window, pretrained, strict=True)
    ]
    x = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    return x.sign() * torch.log2(1 + x.abs()) / 3 if log_spaced else x  # 3 = log2 8


def hidden_units(x: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    """[rows, hidden]"""
    return torch.relu(torch.addmm(b1, x, w1.t()))


def wide(*weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in weights)


def continuous_position_bias(
    w1: Tensor, b1: Tensor, w2: Tensor, window: Sequence[int], pretrained: Sequence[int], log_spaced: bool
) -> tuple[Tensor, Tensor]:
    """w1 [hidden, 2], b1 [hidden], w2 [heads, hidden] -> bias [heads, N, N] in their dtype, t [rows, heads]"""
    dtype = w1.dtype
    w1, b1, w2 = wide(w1, b1, w2)
    x = coordinates(window, pretrained, log_spaced, w1)
    table = 16 * torch.sigmoid(hidden_units(x, w1, b1) @ w2.t())
    return relative_position_bias(table.to(dtype), window), table


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
    """dbias [heads, N, N], t [rows, heads] -> dw1 [hidden, 2], db1 [hidden], dw2 [heads, hidden] in their dtype"""
    dtype = w1.dtype
    w1, b1, w2 = wide(w1, b1, w2)
    dtable = relative_position_bias_backward(dbias.to(table.dtype), window)
    dz = dtable * table * (16 - table) / 16
    x = coordinates(window, pretrained, log_spaced, w1)
    h = hidden_units(x, w1, b1)
    dh = torch.where(h <= 0, 0, dz @ w2)
    return (dh.t() @ x).to(dtype), dh.sum(0).to(dtype), (dz.t() @ h).to(dtype)
