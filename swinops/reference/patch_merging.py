"""Swin's patch merging up to its projection (arXiv 2103.14030, section 3.1): the definition.

The four tokens of each 2 x 2 patch side by side, in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column), then
layer normalisation over the 4C channels. An image of odd size is padded with zeros at its end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from swinops.reference.layer_norm import fill, gradients, layer_norm

PLACES = ((0, 0), (1, 0), (0, 1), (1, 1))


def merge(x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 4C]"""
    _, H, W, _ = x.shape
    x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
    return torch.cat([x[:, row::2, column::2] for row, column in PLACES], -1)


def patch_merging_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, W, C] -> y [B, ceil(H / 2), ceil(W / 2), 4C] in ``dtype``, and mean and rstd of each merged token"""
    return layer_norm(merge(x), weight, bias, eps, dtype)


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
    """Fill the gradients: the norm's, each part put back to the tokens it came from, and the pads' dropped."""
    dmerged, *parameters = gradients(dy, merge(x), mean, rstd, weight, dweight is not None, dbias is not None)
    for (row, column), part in zip(PLACES, dmerged.chunk(4, -1), strict=True):
        place = dx[:, row::2, column::2]
        place.copy_(part[:, : place.shape[1], : place.shape[2]])
    for target, value in zip((dweight, dbias), parameters, strict=True):
        fill(target, value)
