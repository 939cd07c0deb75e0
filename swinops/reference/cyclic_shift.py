"""Cyclic shift with window partition, and its inverse: the definition."""

from collections.abc import Sequence

import torch
from torch import Tensor


def window_partition(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """[B, *space, C] -> [B * nW, *window, C]: roll by ``-shift``, then cut into windows in row-major order."""
    axes = len(window)
    grid = [size // w for size, w in zip(x.shape[1:-1], window, strict=True)]
    x = torch.roll(x, [-s for s in shift], list(range(1, 1 + axes)))
    x = x.reshape(x.shape[0], *[n for pair in zip(grid, window, strict=True) for n in pair], x.shape[-1])
    x = x.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return x.reshape(x.shape[0] * torch.Size(grid).numel(), *window, x.shape[-1]).contiguous()


def window_merge(windows: Tensor, image_size: Sequence[int], shift: Sequence[int]) -> Tensor:
    """[B * nW, *window, C] -> [B, *image_size, C]: the inverse of ``window_partition``."""
    window = windows.shape[1:-1]
    axes = len(window)
    grid = [size // w for size, w in zip(image_size, window, strict=True)]
    x = windows.reshape(windows.shape[0] // torch.Size(grid).numel(), *grid, *window, windows.shape[-1])
    x = x.permute(
        0, *[a for pair in zip(range(1, 1 + axes), range(1 + axes, 1 + 2 * axes), strict=True) for a in pair], -1
    )
    return torch.roll(x.reshape(x.shape[0], *image_size, x.shape[-1]), list(shift), list(range(1, 1 + axes)))
