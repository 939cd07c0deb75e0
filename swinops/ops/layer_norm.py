"""Layer normalisation, alone and with the residual of a transformer block, before its branch or after it."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swinops.backends import resolve
from swinops.ops.arguments import check_computable, check_like, check_vector


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis, in float32 (arXiv 1607.06450).

    Args:
        x: [*, C], any float dtype of 16 bits or more, any strides.
        weight, bias: One and zero where None. [C], any float dtype of 16 bits or more
        eps: Added to the variance, which is that of the population.
        dtype: Of the result; x's where None, but float32 under autocast. A norm before a projection under autocast
            takes autocast's dtype: the projection would round to it anyway.
        backend: "auto", or one of ``swinops.backends.MODULES``.

    Returns:
        [*, C], contiguous

    Raises:
        ValueError, TypeError: an argument's shape, device, range or dtype is not as above.
        RuntimeError: ``backend`` cannot run here; or, in backward, a second derivative is asked for.
    """
    y: Tensor = torch.ops.swinops.layer_norm(x, weight, bias, eps, dtype, backend)[0]
    return y


def add_layer_norm(
    x: Tensor,
    f: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    sample_scale: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual sum ``s = x + sample_scale * f`` and its norm ``y``, which the next branch reads, in one pass.

    Args:
        x: The residual stream. [B, *, C]
        f: What a branch of the block adds to it. [B, *, C], any float dtype of 16 bits or more, as x
        sample_scale: A factor for each sample, without gradient; stochastic depth has 0 and 1 / (1 - p). [B]
        dtype: Of y; that of s where None, but float32 under autocast.

    Returns:
        s and y, of x's shape, contiguous. s has the promoted dtype of x and f, and y is the norm of the rounded s.

    The rest is as in ``layer_norm``.
    """
    s, y, _, _ = torch.ops.swinops.add_layer_norm(x, f, sample_scale, weight, bias, eps, dtype, backend)
    return s, y


def layer_norm_add(
    x: Tensor,
    f: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    sample_scale: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """``x + sample_scale * layer_norm(f)``, rounded once: the residual of Swin V2 (arXiv 2111.09883, section 3.2).

    Args:
        x, f, sample_scale: As in ``add_layer_norm``.

    Returns:
        [B, *, C], the promoted dtype of x and f, contiguous

    The rest is as in ``layer_norm``.
    """
    out: Tensor = torch.ops.swinops.layer_norm_add(x, f, sample_scale, weight, bias, eps, backend)[0]
    return out


class Norm(NamedTuple):
    """What the norms take after their tensors, in the order of ``NORM``."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    dtype: torch.dtype | None
    backend: str


class Saved(NamedTuple):
    """What their backward takes after its gradients and rows, in the order of ``SAVED``."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    weight_grad: bool
    bias_grad: bool
    backend: str


NORM = "Tensor? weight, Tensor? bias, float eps, ScalarType? dtype, str backend"
# mean and rstd [*] are those of each row, in float32, or float64 for float64. The bias is there for its dtype.
SAVED = "Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, bool weight_grad, bool bias_grad, str backend"
# Empty are, because an op cannot return None: the gradients of weight and bias where they are not wanted, and df of
# add_layer_norm where it is dx.
for schema in (
    f"layer_norm(Tensor x, {NORM}) -> (Tensor y, Tensor mean, Tensor rstd)",
    f"layer_norm_backward(Tensor dy, Tensor x, {SAVED}) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    f"add_layer_norm(Tensor x, Tensor f, Tensor? sample_scale, {NORM}) -> (Tensor s, Tensor y, Tensor mean, "
    "Tensor rstd)",
    "add_layer_norm_backward(Tensor? ds, Tensor dy, Tensor s, Tensor? sample_scale, ScalarType x_dtype, "
    f"ScalarType f_dtype, {SAVED}) -> (Tensor dx, Tensor df, Tensor dweight, Tensor dbias)",
    "layer_norm_add(Tensor x, Tensor f, Tensor? sample_scale, Tensor? weight, Tensor? bias, float eps, str backend) "
    "-> (Tensor out, Tensor mean, Tensor rstd)",
    f"layer_norm_add_backward(Tensor dout, Tensor f, Tensor? sample_scale, {SAVED}) -> (Tensor df, Tensor dweight, "
    "Tensor dbias)",
):
    torch.library.define(f"swinops::{schema.partition('(')[0]}", schema[schema.index("(") :])


def check(x: Tensor, norm: Norm, rows: torch.dtype | None = None) -> None:
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be [*, C] with at least one channel, got {tuple(x.shape)}")
    check_computable("x", x)
    check_norm(norm, "[C]", x.shape[-1], x, rows or x.dtype)


def check_norm(norm: Norm, layout: str, channels: int, x: Tensor, rows: torch.dtype) -> None:
    """``rows``: the dtype of what is normalised."""
    for name, parameter in (("weight", norm.weight), ("bias", norm.bias)):
        if parameter is not None:
            check_vector(name, parameter, layout, channels, x)
    if not 0 < norm.eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {norm.eps}")
    if norm.dtype is not None and not (norm.dtype.is_floating_point and norm.dtype.itemsize >= 2):
        raise TypeError(f"dtype must be a floating-point dtype of 16 bits or more, got {norm.dtype}")
    if norm.dtype == torch.float64 and rows != torch.float64:
        raise TypeError(f"dtype must be float32 or narrower where float32 is computed in, of {rows}, got {norm.dtype}")


def check_residual(x: Tensor, f: Tensor, sample_scale: Tensor | None, norm: Norm) -> None:
    check(x, norm, wider(x, f).dtype)
    check_like("f", f, "x", x)
    if sample_scale is not None:
        if x.dim() < 2:
            raise ValueError(f"x must be [B, *, C] where there is a sample_scale, got {tuple(x.shape)}")
        check_vector("sample_scale", sample_scale, "[B]", x.shape[0], x)


def wider(x: Tensor, f: Tensor) -> Tensor:
    """Of two tensors that are summed the one that decides which backend can run."""
    return f if f.itemsize > x.itemsize else x


def statistics(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """mean and rstd of rows of that dtype, one for each row of ``y``, uninitialised."""
    wide = torch.promote_types(dtype, torch.float32)
    return y.new_empty(y.shape[:-1], dtype=wide), y.new_empty(y.shape[:-1], dtype=wide)


def parameter_gradients(x: Tensor, saved: Saved) -> tuple[Tensor, Tensor]:
    """dweight and dbias, uninitialised."""
    dweight, dbias = (
        x.new_empty(0) if parameter is None or not wanted else parameter.new_empty(parameter.shape)
        for parameter, wanted in ((saved.weight, saved.weight_grad), (saved.bias, saved.bias_grad))
    )
    return dweight, dbias


def unless_empty(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


@torch.library.impl("swinops::layer_norm", "CompositeExplicitAutograd")
def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    norm = Norm(*arguments)
    check(x, norm)
    chosen = resolve(norm.backend, x, "layer_norm")
    outputs: tuple[Tensor, Tensor, Tensor] = chosen.layer_norm(
        x, norm.weight, norm.bias, norm.eps, norm.dtype or x.dtype
    )
    return outputs


@torch.library.register_fake("swinops::layer_norm")
def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    norm = Norm(*arguments)
    check(x, norm)
    y = x.new_empty(x.shape, dtype=norm.dtype)
    return y, *statistics(y, x.dtype)


@torch.library.register_fake("swinops::layer_norm_backward")
def _backward_fake(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_like("dy", dy, "x", x)
    return x.new_empty(x.shape), *parameter_gradients(x, Saved(*arguments))


@torch.library.impl("swinops::layer_norm_backward", "CompositeExplicitAutograd")
def _backward(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    saved = Saved(*arguments)
    dx, dweight, dbias = _backward_fake(dy, x, *saved)
    resolve(saved.backend, x, "layer_norm").layer_norm_backward(
        dy, x, saved.mean, saved.rstd, saved.weight, dx, unless_empty(dweight), unless_empty(dbias)
    )
    return dx, dweight, dbias


@torch.library.impl("swinops::add_layer_norm", "CompositeExplicitAutograd")
def _add_forward(x: Tensor, f: Tensor, sample_scale: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    norm = Norm(*arguments)
    check_residual(x, f, sample_scale, norm)
    chosen = resolve(norm.backend, wider(x, f), "add_layer_norm")
    dtype = norm.dtype or torch.promote_types(x.dtype, f.dtype)
    outputs: tuple[Tensor, ...] = chosen.add_layer_norm(x, f, sample_scale, norm.weight, norm.bias, norm.eps, dtype)
    return outputs


@torch.library.register_fake("swinops::add_layer_norm")
def _add_forward_fake(x: Tensor, f: Tensor, sample_scale: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    norm = Norm(*arguments)
    check_residual(x, f, sample_scale, norm)
    s = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, f.dtype))
    return s, s.new_empty(s.shape, dtype=norm.dtype), *statistics(s, s.dtype)


@torch.library.register_fake("swinops::add_layer_norm_backward")
def _add_backward_fake(
    ds: Tensor | None,
    dy: Tensor,
    s: Tensor,
    sample_scale: Tensor | None,
    x_dtype: torch.dtype,
    f_dtype: torch.dtype,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    if ds is not None:
        check_like("ds", ds, "s", s)
    check_like("dy", dy, "s", s)
    dx = s.new_empty(s.shape, dtype=x_dtype)
    df = s.new_empty(0 if equal_gradients(sample_scale, x_dtype, f_dtype) else s.shape, dtype=f_dtype)
    return dx, df, *parameter_gradients(s, Saved(*arguments))


@torch.library.impl("swinops::add_layer_norm_backward", "CompositeExplicitAutograd")
def _add_backward(
    ds: Tensor | None,
    dy: Tensor,
    s: Tensor,
    sample_scale: Tensor | None,
    x_dtype: torch.dtype,
    f_dtype: torch.dtype,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    saved = Saved(*arguments)
    dx, df, dweight, dbias = _add_backward_fake(ds, dy, s, sample_scale, x_dtype, f_dtype, *saved)
    resolve(saved.backend, s, "add_layer_norm").add_layer_norm_backward(
        ds, dy, s, saved.mean, saved.rstd, sample_scale, saved.weight,
        dx, None if equal_gradients(sample_scale, x_dtype, f_dtype) else df,
        unless_empty(dweight), unless_empty(dbias),
    )  # fmt: skip
    return dx, df, dweight, dbias


def equal_gradients(sample_scale: Tensor | None, x_dtype: torch.dtype, f_dtype: torch.dtype) -> bool:
    """Whether x and f, which are summed, have one gradient."""
    return sample_scale is None and x_dtype == f_dtype


@torch.library.impl("swinops::layer_norm_add", "CompositeExplicitAutograd")
def _norm_add_forward(
    x: Tensor,
    f: Tensor,
    sample_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_residual(x, f, sample_scale, Norm(weight, bias, eps, None, backend))
    chosen = resolve(backend, wider(x, f), "layer_norm_add")
    outputs: tuple[Tensor, Tensor, Tensor] = chosen.layer_norm_add(x, f, sample_scale, weight, bias, eps)
    return outputs


@torch.library.register_fake("swinops::layer_norm_add")
def _norm_add_forward_fake(
    x: Tensor,
    f: Tensor,
    sample_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_residual(x, f, sample_scale, Norm(weight, bias, eps, None, backend))
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, f.dtype))
    return out, *statistics(out, f.dtype)


@torch.library.register_fake("swinops::layer_norm_add_backward")
def _norm_add_backward_fake(
    dout: Tensor, f: Tensor, sample_scale: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_like("dout", dout, "f", f)
    return f.new_empty(f.shape), *parameter_gradients(f, Saved(*arguments))


@torch.library.impl("swinops::layer_norm_add_backward", "CompositeExplicitAutograd")
def _norm_add_backward(
    dout: Tensor, f: Tensor, sample_scale: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    saved = Saved(*arguments)
    df, dweight, dbias = _norm_add_backward_fake(dout, f, sample_scale, *saved)
    resolve(saved.backend, wider(dout, f), "layer_norm_add").layer_norm_add_backward(
        dout, f, saved.mean, saved.rstd, sample_scale, saved.weight, df, unless_empty(dweight), unless_empty(dbias)
    )
    return df, dweight, dbias


def register_gradient(op: str) -> None:
    """The gradient of ``swinops::op``, which takes ``x`` and a ``Norm``."""
    differentiate: Any = getattr(torch.ops.swinops, f"{op}_backward")

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, *norm = inputs
        save_norm(ctx, Norm(*norm), output[-2:], x)

    def gradient(ctx: Any, dy: Tensor | None, *statistics: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        x, *saved = ctx.saved_tensors
        grads = differentiate(dy, x, *saved, *ctx.needs_input_grad[1:3], ctx.backend)
        return *wanted(ctx.needs_input_grad, grads), None, None, None

    torch.library.register_autograd(f"swinops::{op}", gradient, setup_context=save)
    refuse_second_gradient(op)


def save_norm(ctx: Any, norm: Norm, statistics: Sequence[Tensor], *tensors: Tensor | None) -> None:
    """``ctx.saved_tensors`` are ``tensors``, mean, rstd, weight and bias."""
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *statistics, norm.weight, norm.bias)
    ctx.backend = norm.backend


def wanted(needs: Sequence[bool], grads: Sequence[Tensor]) -> list[Tensor | None]:
    return [grad if need else None for need, grad in zip(needs, grads, strict=False)]


def refuse_second_gradient(op: str) -> None:
    def no_second_gradient(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"swinops.{op} has no second derivative: backward through its backward was asked for")

    torch.library.register_autograd(f"swinops::{op}_backward", no_second_gradient)


def register_autocast(op: str, rows: int, key: str) -> None:
    """Under autocast the result of a norm is float32, as torch's is on CUDA; ``rows`` tensors are normalised or summed.

    No tensor is cast: the kernels read mixed dtypes.
    """

    @torch.library.impl(f"swinops::{op}", key)
    def widen(*inputs: Any) -> tuple[Tensor, ...]:
        *others, dtype, backend = inputs
        if dtype is None:
            dtype = functools.reduce(torch.promote_types, [x.dtype for x in inputs[:rows]], torch.float32)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            outputs: tuple[Tensor, ...] = getattr(torch.ops.swinops, op)(*others, dtype, backend)
        return outputs


def refuse_scale_gradient(ctx: Any) -> None:
    if ctx.needs_input_grad[2]:
        raise ValueError("sample_scale must be without gradient, for none is computed, got one that requires it")


def _add_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, f, sample_scale, *norm = inputs
    s, _, *statistics = output
    refuse_scale_gradient(ctx)
    save_norm(ctx, Norm(*norm), statistics, s, sample_scale)
    ctx.dtypes = x.dtype, f.dtype


def _add_gradient(ctx: Any, ds: Tensor | None, dy: Tensor | None, *statistics: None) -> tuple[Tensor | None, ...]:
    if ds is None and dy is None:
        return (None,) * 8
    s, sample_scale, *saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(s)
    dx, df, *grads = torch.ops.swinops.add_layer_norm_backward(
        ds, dy, s, sample_scale, *ctx.dtypes, *saved, *ctx.needs_input_grad[3:5], ctx.backend
    )
    if equal_gradients(sample_scale, *ctx.dtypes):
        df = dx
    dx, df, _, dweight, dbias = wanted(ctx.needs_input_grad, (dx, df, s, *grads))
    return dx, df, None, dweight, dbias, None, None, None


def _norm_add_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, f, sample_scale, weight, bias, eps, backend = inputs
    refuse_scale_gradient(ctx)
    save_norm(ctx, Norm(weight, bias, eps, None, backend), output[1:], f, sample_scale)
    ctx.dtype = x.dtype


def _norm_add_gradient(ctx: Any, dout: Tensor | None, *statistics: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 7
    f, sample_scale, *saved = ctx.saved_tensors
    df, *grads = torch.ops.swinops.layer_norm_add_backward(
        dout, f, sample_scale, *saved, *ctx.needs_input_grad[3:5], ctx.backend
    )
    dx, df, _, dweight, dbias = wanted(ctx.needs_input_grad, (dout.to(ctx.dtype), df, f, *grads))
    return dx, df, None, dweight, dbias, None, None


register_gradient("layer_norm")
torch.library.register_autograd("swinops::add_layer_norm", _add_gradient, setup_context=_add_save)
torch.library.register_autograd("swinops::layer_norm_add", _norm_add_gradient, setup_context=_norm_add_save)
refuse_second_gradient("add_layer_norm")
refuse_second_gradient("layer_norm_add")
for key in ("AutocastCPU", "AutocastCUDA"):
    register_autocast("layer_norm", 1, key)
    register_autocast("add_layer_norm", 2, key)
