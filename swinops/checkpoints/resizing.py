"""Bias tables for another window, and position embeddings for another image size: bicubic, as published."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TABLE = "relative_position_bias_table"  # [(2Mh - 1)(2Mw - 1), heads]
POSITIONS = "absolute_pos_embed"  # [1, h * w, C]


def resize(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` with the tables and embeddings whose sizes differ from the model's resized; and in words, which.

    What was for a square is resized; where the rows are no square, the sizes cannot be told and nothing is done. A
    window of (13, 1) has as many rows as one of (3, 3), and is taken for that.
    """
    own, resized = model.state_dict(), dict(state)
    counts: Counter[str] = Counter()
    for name, x in state.items():
        if name.endswith(POSITIONS) and x.dim() == 4:
            x = resized[name] = x.flatten(2).transpose(1, 2)  # detection models keep an image [1, C, h, w]
        side = square_side(name, x)
        # what has the model's shape is for its window, square or not
        if side is None or name not in own or x.shape == own[name].shape:
            continue
        if x.shape[-1] != own[name].shape[-1] or not x.is_floating_point():
            continue
        module: Any = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(TABLE):
            M = (side + 1) // 2
            resized[name] = resize_rows(x, (side, side), [2 * w - 1 for w in module.window_size])
            counts[f"bias tables resized from the window {(M, M)} to {tuple(module.window_size)}"] += 1
        else:
            resized[name] = resize_rows(x[0], (side, side), module.grid_size)[None]
            counts[f"position embeddings resized from {(side, side)} patches to {tuple(module.grid_size)}"] += 1
    return resized, [f"{what}: {count}" for what, count in counts.items()]


def resize_rows(rows: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """An image with one row per pixel, to another size. [h * w, C] -> [h' * w', C], float32 at least"""
    image = rows.to(torch.promote_types(rows.dtype, torch.float32)).t().unflatten(1, tuple(old))
    image = F.interpolate(image[None], tuple(new), mode="bicubic", align_corners=False)[0]
    return image.flatten(1).t()


def square_side(name: str, x: Tensor) -> int | None:
    """Rows along each axis of a table or an embedding that was for a square; None for anything else."""
    if name.endswith(TABLE) and x.dim() == 2:
        side = math.isqrt(x.shape[0])
        return side if side**2 == x.shape[0] and side % 2 == 1 else None
    if name.endswith(POSITIONS) and x.dim() == 3 and x.shape[0] == 1:
        side = math.isqrt(x.shape[1])
        return side if side**2 == x.shape[1] and side else None
    return None


def why_not_resized(name: str, x: Tensor) -> str:
    if not name.endswith((TABLE, POSITIONS)) or square_side(name, x) is not None:
        return ""
    return " (no square, so its sizes cannot be told)"
