"""Scaled cosine attention within shifted windows: ``window_attention`` on normalised queries and keys."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swinops.ops.arguments import check_computable, check_device, per_axis
from swinops.ops.attention import check_arguments, register


def cosine_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor,
    bias: Tensor | None = None,
    *,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    pad_kv: Tensor | None = None,
    pad_order: str = "pad_roll",
    mask_value: float = -100.0,
    backend: str = "auto",
) -> Tensor:
    """Scaled cosine attention within the shifted windows of an image or volume (arXiv 2111.09883, section 3.2, eq. 2).

        out = softmax(cos(q, k) * exp(min(logit_scale, ln 100)) + bias + mask) v

    Norms, softmax and sums are fp32, in the kernels cosines too. A vector shorter than 1e-12 is divided by 1e-12, as
    ``normalize`` does, so that one of zeros has cosine 0 with everything; its gradient is 0, where that of
    ``normalize`` is 1e12 times too long.

    Args:
        logit_scale: Logarithm of each head's scale (1 / tau in the paper), clamped at ln 100, with gradient: 0 where it
            is clamped, and else summed from the gradients of scores rounded to q's dtype. [heads] or [heads, 1, 1], any
            float dtype

    The rest, what is returned and what is raised are as in ``window_attention``.
    """
    axes = q.dim() - 3
    window, shift = per_axis(window_size, axes, "window_size"), per_axis(shift_size, axes, "shift_size")
    out: Tensor = torch.ops.swinops.cosine_attention(
        q, k, v, logit_scale, bias, pad_kv, window, shift, pad_order, mask_value, backend
    )[0]
    return out


def cosine_attention_qkvpacked(
    qkv: Tensor,
    logit_scale: Tensor,
    bias: Tensor | None = None,
    *,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    pad_kv: Tensor | None = None,
    pad_order: str = "pad_roll",
    mask_value: float = -100.0,
    backend: str = "auto",
) -> Tensor:
    """``cosine_attention`` on the output of one QKV projection; the gradient is one packed buffer too.

    Args:
        qkv: [B, H, W, 3, heads, head_dim] or [B, D, H, W, 3, heads, head_dim]

    The rest is as in ``cosine_attention``.
    """
    axes = qkv.dim() - 4
    window, shift = per_axis(window_size, axes, "window_size"), per_axis(shift_size, axes, "shift_size")
    out: Tensor = torch.ops.swinops.cosine_attention_qkvpacked(
        qkv, logit_scale, bias, pad_kv, window, shift, pad_order, mask_value, backend
    )[0]
    return out


class Arguments(NamedTuple):
    """What the ops take after q, k and v: first the tensors with a gradient, last the backend."""

    logit_scale: Tensor
    bias: Tensor | None
    pad_kv: Tensor | None
    window: Sequence[int]
    shift: Sequence[int]
    pad_order: str
    mask_value: float
    backend: str

    def check(self, q: Tensor) -> None:
        heads, x = q.shape[-2], self.logit_scale
        if x.dim() not in (1, 3) or x.shape[0] != heads or any(n != 1 for n in x.shape[1:]):
            raise ValueError(f"logit_scale must be [heads] = ({heads},) or ({heads}, 1, 1), got {tuple(x.shape)}")
        check_computable("logit_scale", x)
        check_device("logit_scale", x, "q", q)
        check_arguments(q, self.bias, self.pad_kv, self.window, self.shift, self.pad_order)

    def settings(self, q: Tensor) -> tuple[Any, ...]:
        return self.window, self.shift, self.pad_order, self.mask_value


SCHEMA = (
    "Tensor logit_scale, Tensor? bias, Tensor? pad_kv, SymInt[] window, SymInt[] shift, "
    "str pad_order, float mask_value, str backend"
)
register("cosine_attention", SCHEMA, Arguments, tensors=3)
