"""Scaled cosine attention within shifted windows (arXiv 2111.09883, section 3.2, eq. 2): the definition.

    out = softmax(cos(q, k) * exp(min(logit_scale, ln 100)) + bias + mask) v      within each window

Shift, pads and mask are those of ``window_attention``. Lengths are fp32: in half precision that of a pad token, whose
key is often zero, would otherwise be 0 / 0.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from swinops.reference.window_attention import Windows, fill_gradients

MAX_LOGIT_SCALE = math.log(100)
SHORTEST = 1e-12  # that a vector is divided by, as in torch.nn.functional.normalize


def normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors over their lengths, and one over these: 0 for a vector too short to have a direction, or a gradient."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    squares = wide.square().sum(-1, keepdim=True)
    short = squares < SHORTEST**2
    inverse = torch.where(short, 1, squares).rsqrt()
    return torch.where(short, wide.detach() / SHORTEST, wide * inverse).to(x.dtype), torch.where(short, 0, inverse)


def normalise_backward(dunit: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of vectors from that of their directions: what of it lies along them changes nothing."""
    wide, direction = dunit.to(inverse.dtype), unit.to(inverse.dtype)
    return ((wide - direction * (wide * direction).sum(-1, keepdim=True)) * inverse).to(dunit.dtype)


def scale_of(logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[heads, 1, 1], in fp32 at least"""
    dtype = torch.promote_types(dtype, torch.float32)
    return logit_scale.to(dtype).clamp(max=MAX_LOGIT_SCALE).exp().view(-1, 1, 1)


def cosine_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor,
    bias: Tensor | None,
    pad_kv: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    pad_order: str,
    mask_value: float,
) -> tuple[Tensor, Tensor]:
    """[B, *space, heads, head_dim] thrice -> out, of that shape, and the scores' log2-sum-exp [B, *space, heads]."""
    windows = Windows(q, window, shift, pad_order, mask_value, bias, pad_kv)
    q, k, v = windows.read(q, k, v)
    cosine = normalise(q)[0] @ normalise(k)[0].transpose(-1, -2)
    return windows.attend(windows.biased(cosine * scale_of(logit_scale, q.dtype)), v)


def cosine_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor,
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
    window: Sequence[int],
    shift: Sequence[int],
    pad_order: str,
    mask_value: float,
) -> None:
    """Fill the gradients from the explicit formula, which needs neither ``out`` nor ``lse``: they are for kernels.

    With ds, the gradient of the scores, and u, w the directions of q and k:
    du = scale * ds w,  dw = scale * ds^T u,  dq = (du - u (u . du)) / |q|,  dk = (dw - w (w . dw)) / |k|,
    dlogit_scale = scale * sum(ds * cos(q, k)) where it is not clamped,  dbias = ds summed over windows
    """
    windows = Windows(q, window, shift, pad_order, mask_value, bias, pad_kv)
    q, k, v = windows.read(q, k, v)
    (q, q_inverse), (k, k_inverse) = normalise(q), normalise(k)
    scores = (q @ k.transpose(-1, -2)) * scale_of(logit_scale, q.dtype)
    ds, dvw = windows.attend_backward(windows.read_gradient(dout), windows.biased(scores), v)
    if dbias is not None:
        dbias.copy_(ds.sum(0))
    if dlogit_scale is not None:
        total = (ds * scores).sum((0, 2, 3)).view(logit_scale.shape)
        # compared in fp32, where autograd's clamp compares a float32 parameter
        clamped = logit_scale.to(total.dtype) > torch.tensor(MAX_LOGIT_SCALE, dtype=total.dtype)
        dlogit_scale.copy_(torch.where(clamped, 0, total))
    ds = (ds * scale_of(logit_scale, q.dtype)).to(q.dtype)
    dqw = normalise_backward(ds @ k, q, q_inverse)
    dkw = normalise_backward(ds.transpose(-1, -2) @ q, k, k_inverse)
    fill_gradients(windows, (dqw, dkw, dvw), (dq, dk, dv), dpad_kv)
