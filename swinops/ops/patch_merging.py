"""Swin's patch merging up to its projection: the gather of each 2 x 2 patch and its norm, in one pass."""

from typing import Any

import torch
from torch import Tensor

from swinops.backends import resolve
from swinops.ops.arguments import check_computable, check_device
from swinops.ops.layer_norm import (
    NORM,
    SAVED,
    Norm,
    Saved,
    check_norm,
    parameter_gradients,
    register_autocast,
    register_gradient,
    statistics,
    unless_empty,
)


def patch_merging_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Merge each 2 x 2 patch into one token of 4C channels and normalise those (arXiv 2103.14030, section 3.1).

    The four tokens follow each other in the order ``x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2],
    x[:, 1::2, 1::2]``, as in every published Swin; an image of odd size is padded with zeros at its end.

    Args:
        x: [B, H, W, C], any float dtype of 16 bits or more, any strides.
        weight, bias: One and zero where None. [4C], any float dtype of 16 bits or more

    Returns:
        [B, ceil(H / 2), ceil(W / 2), 4C], contiguous

    The rest is as in ``layer_norm``.
    """
    y: Tensor = torch.ops.swinops.patch_merging_norm(x, weight, bias, eps, dtype, backend)[0]
    return y


torch.library.define("swinops::patch_merging_norm", f"(Tensor x, {NORM}) -> (Tensor y, Tensor mean, Tensor rstd)")
torch.library.define(
    "swinops::patch_merging_norm_backward",
    f"(Tensor dy, Tensor x, {SAVED}) -> (Tensor dx, Tensor dweight, Tensor dbias)",
)


def check(x: Tensor, norm: Norm) -> None:
    if x.dim() != 4 or any(size < 1 for size in x.shape[1:]):
        raise ValueError(f"x must be [B, H, W, C] with at least one token and channel, got {tuple(x.shape)}")
    check_computable("x", x)
    check_norm(norm, "[4C]", 4 * x.shape[-1], x, x.dtype)


def check_gradient(dy: Tensor, x: Tensor) -> None:
    merged = merged_shape(x)
    if dy.shape != merged:
        raise ValueError(f"dy must be [B, ceil(H / 2), ceil(W / 2), 4C] = {tuple(merged)}, got {tuple(dy.shape)}")
    check_computable("dy", dy)
    check_device("dy", dy, "x", x)


def merged_shape(x: Tensor) -> torch.Size:
    B, H, W, C = x.shape
    return torch.Size([B, (H + 1) // 2, (W + 1) // 2, 4 * C])


@torch.library.impl("swinops::patch_merging_norm", "CompositeExplicitAutograd")
def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    norm = Norm(*arguments)
    check(x, norm)
    chosen = resolve(norm.backend, x, "patch_merging_norm")
    outputs: tuple[Tensor, Tensor, Tensor] = chosen.patch_merging_norm(
        x, norm.weight, norm.bias, norm.eps, norm.dtype or x.dtype
    )
    return outputs


@torch.library.register_fake("swinops::patch_merging_norm")
def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    norm = Norm(*arguments)
    check(x, norm)
    y = x.new_empty(merged_shape(x), dtype=norm.dtype)
    return y, *statistics(y, x.dtype)


@torch.library.register_fake("swinops::patch_merging_norm_backward")
def _backward_fake(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_gradient(dy, x)
    return x.new_empty(x.shape), *parameter_gradients(x, Saved(*arguments))


@torch.library.impl("swinops::patch_merging_norm_backward", "CompositeExplicitAutograd")
def _backward(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    saved = Saved(*arguments)
    dx, dweight, dbias = _backward_fake(dy, x, *saved)
    resolve(saved.backend, x, "patch_merging_norm").patch_merging_norm_backward(
        dy, x, saved.mean, saved.rstd, saved.weight, dx, unless_empty(dweight), unless_empty(dbias)
    )
    return dx, dweight, dbias


register_gradient("patch_merging_norm")
for key in ("AutocastCPU", "AutocastCUDA"):
    register_autocast("patch_merging_norm", 1, key)
