"""Shifted-window attention on image-layout tensors: padding, shift, partition, bias, mask and merge in one kernel."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swinops.ops.arguments import per_axis
from swinops.ops.attention import check_arguments, register


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    scale: float | None = None,
    pad_kv: Tensor | None = None,
    pad_order: str = "pad_roll",
    mask_value: float = -100.0,
    backend: str = "auto",
) -> Tensor:
    """Multi-head attention within the shifted windows of an image or volume (arXiv 2103.14030, section 3.2 and eq. 4).

        out = softmax(scale * q k^T + bias + mask) v

    Tensors stay in image layout: shift, windows and padding are in the addresses. Softmax and sums are fp32.

    Args:
        q, k, v: [B, H, W, heads, head_dim] or [B, D, H, W, heads, head_dim]; head_dim from 1 to 256 in the kernels. Any
            strides; a tensor whose last stride is not 1 is copied.
        bias: Added to the scores, with gradient. [heads, N, N], N the tokens of a window; any float dtype
        window_size, shift_size: One int for every axis, or one per axis; the shift less than the window.
        scale: ``head_dim ** -0.5`` when None.
        pad_kv: Key and value of the pad tokens, with gradient; zeros when None. [2, heads, head_dim], any float dtype.
            The sizes need not divide by the window: the image is padded at its end, and pads are keys that nobody masks
            and never queries, as in every published Swin. A zero token projects to the bias of the QKV projection.
        pad_order: "pad_roll" pads, then shifts (torchvision, Transformers, MONAI); "roll_pad" shifts first (timm).
        mask_value: Added to the score of two tokens that were not neighbours before the shift.
        backend: "auto", or one of ``swinops.backends.MODULES``.

    Returns:
        [B, *space, heads, head_dim], contiguous

    Raises:
        ValueError, TypeError: an argument's shape, device, range or dtype is not as above.
        RuntimeError: ``backend`` cannot run here; or, in backward, a second derivative is asked for.
    """
    axes = q.dim() - 3
    window, shift = per_axis(window_size, axes, "window_size"), per_axis(shift_size, axes, "shift_size")
    out: Tensor = torch.ops.swinops.window_attention(
        q, k, v, bias, pad_kv, window, shift, scale, pad_order, mask_value, backend
    )[0]
    return out


def window_attention_qkvpacked(
    qkv: Tensor,
    bias: Tensor | None = None,
    *,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    scale: float | None = None,
    pad_kv: Tensor | None = None,
    pad_order: str = "pad_roll",
    mask_value: float = -100.0,
    backend: str = "auto",
) -> Tensor:
    """``window_attention`` on the output of one QKV projection; the gradient is one packed buffer too.

    Args:
        qkv: [B, H, W, 3, heads, head_dim] or [B, D, H, W, 3, heads, head_dim]

    The rest is as in ``window_attention``.
    """
    axes = qkv.dim() - 4
    window, shift = per_axis(window_size, axes, "window_size"), per_axis(shift_size, axes, "shift_size")
    out: Tensor = torch.ops.swinops.window_attention_qkvpacked(
        qkv, bias, pad_kv, window, shift, scale, pad_order, mask_value, backend
    )[0]
    return out


class Arguments(NamedTuple):
    """What the ops take after q, k and v: first the tensors with a gradient, last the backend."""

    bias: Tensor | None
    pad_kv: Tensor | None
    window: Sequence[int]
    shift: Sequence[int]
    scale: float | None
    pad_order: str
    mask_value: float
    backend: str

    def check(self, q: Tensor) -> None:
        check_arguments(q, self.bias, self.pad_kv, self.window, self.shift, self.pad_order)

    def settings(self, q: Tensor) -> tuple[Any, ...]:
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return self.window, self.shift, scale, self.pad_order, self.mask_value


SCHEMA = (
    "Tensor? bias, Tensor? pad_kv, SymInt[] window, SymInt[] shift, "
    "float? scale, str pad_order, float mask_value, str backend"
)
register("window_attention", SCHEMA, Arguments, tensors=2)
