"""Layer normalisation over the last axis (arXiv 1607.06450), alone and with the residual of a block: the definition.

    mean = sum_c x / C,   rstd = 1 / sqrt(sum_c (x - mean)^2 / C + eps),   n = (x - mean) rstd,   y = n * weight + bias

and backward, with dn = dy * weight:

    dx = rstd (dn - sum_c dn / C - n sum_c dn n / C),   dweight = sum dy n,   dbias = sum dy

torch's own functions compute both, here in float32 at least, whatever the tensors' dtypes.
"""

import torch
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """[*, C] -> y [*, C] in ``dtype``, mean [*] and rstd [*]"""
    wide = at_least_float32(x.dtype)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    y, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
    return y.to(dtype), mean.squeeze(-1), rstd.squeeze(-1)


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
    """Fill the gradients; those of weight and bias may be None."""
    grads = gradients(dy, x, mean, rstd, weight, dweight is not None, dbias is not None)
    for target, value in zip((dx, dweight, dbias), grads, strict=True):
        fill(target, value)


def gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, dweight and dbias in float32 at least; of the last two those that are wanted."""
    wide = at_least_float32(x.dtype)
    # stands in for bias too, of which torch reads only the shape
    scale = x.new_ones(x.shape[-1], dtype=wide) if weight is None else weight.to(wide)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide), x.to(wide), x.shape[-1:], mean.unsqueeze(-1), rstd.unsqueeze(-1), scale, scale,
        [True, weight_grad, bias_grad],
    )  # fmt: skip
    return dx, dweight, dbias


def fill(target: Tensor | None, value: Tensor | None) -> None:
    if target is None or value is None:
        return
    if target.dtype == value.dtype:
        target.set_(value)  # type: ignore[call-overload]  # its memory, for a copy costs as much as the formula
    else:
        target.copy_(value)


def add_layer_norm(
    x: Tensor,
    f: Tensor,
    sample_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s = x + sample_scale * f, rounded once, and its norm y, mean and rstd. x, f, s, y [B, *, C]; sample_scale [B]"""
    s = add(x, f, sample_scale, torch.promote_types(x.dtype, f.dtype))
    return s, *layer_norm(s, weight, bias, eps, dtype)


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
    """dx = ds + the norm's gradient, and df = sample_scale * dx, which is None where it is dx."""
    total, *parameters = gradients(dy, s, mean, rstd, weight, dweight is not None, dbias is not None)
    if ds is not None:
        total += ds
    if df is not None:
        df.copy_(total if sample_scale is None else total * per_sample(sample_scale, total))
    for target, value in zip((dx, dweight, dbias), (total, *parameters), strict=True):
        fill(target, value)


def layer_norm_add(
    x: Tensor,
    f: Tensor,
    sample_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """out = x + sample_scale * layer_norm(f), rounded once, and mean and rstd of f. x, f, out [B, *, C]"""
    y, mean, rstd = layer_norm(f, weight, bias, eps, at_least_float32(f.dtype))
    return add(x, y, sample_scale, torch.promote_types(x.dtype, f.dtype)), mean, rstd


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
    """The norm's gradients for dy = sample_scale * dout; that of x is dout itself."""
    if sample_scale is not None:
        dout = dout.to(at_least_float32(dout.dtype))
        dout = dout * per_sample(sample_scale, dout)
    layer_norm_backward(dout, f, mean, rstd, weight, df, dweight, dbias)


def add(x: Tensor, f: Tensor, sample_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x + sample_scale * f, in float32 at least, rounded to ``dtype``."""
    if sample_scale is None:
        return (x + f).to(dtype).contiguous()
    wide = at_least_float32(torch.promote_types(x.dtype, f.dtype))
    f = f.to(wide)
    return torch.addcmul(x.to(wide), f, per_sample(sample_scale, f)).to(dtype).contiguous()


def per_sample(sample_scale: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], to multiply ``like`` with, in its dtype."""
    return sample_scale.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
