"""Shifted-window attention on image-layout tensors: padding, shift, partition, bias, mask and merge in one kernel."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swinops.backends import resolve
from swinops.ops.arguments import check_computable, check_device, check_same, check_window, per_axis


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
    """What the four ops take after their tensors, in the order of ``SCHEMA``."""

    bias: Tensor | None
    pad_kv: Tensor | None
    window: Sequence[int]
    shift: Sequence[int]
    scale: float | None
    pad_order: str
    mask_value: float
    backend: str


SCHEMA = (
    "Tensor? bias, Tensor? pad_kv, SymInt[] window, SymInt[] shift, "
    "float? scale, str pad_order, float mask_value, str backend"
)
# lse [B, *space, heads] is log2(sum(exp(scores))) of each token, from which backward recomputes the probabilities.
# The gradients of bias and pad_kv are empty where they are not wanted: an op cannot return None.
SAVED = "Tensor dout, Tensor out, Tensor lse, bool bias_grad, bool pad_grad"
for schema in (
    f"window_attention(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor out, Tensor lse)",
    f"window_attention_qkvpacked(Tensor qkv, {SCHEMA}) -> (Tensor out, Tensor lse)",
    f"window_attention_backward({SAVED}, Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor dq, Tensor dk, Tensor dv, "
    "Tensor dbias, Tensor dpad_kv)",
    f"window_attention_qkvpacked_backward({SAVED}, Tensor qkv, {SCHEMA}) -> (Tensor dqkv, Tensor dbias, "
    "Tensor dpad_kv)",
):
    torch.library.define(f"swinops::{schema.partition('(')[0]}", schema[schema.index("(") :])


def check(q: Tensor, k: Tensor, v: Tensor, call: Arguments) -> None:
    if q.dim() not in (5, 6):
        raise ValueError(f"q must be [B, H, W, heads, head_dim] or [B, D, H, W, heads, head_dim], got {tuple(q.shape)}")
    check_computable("q", q)
    check_same("k", k, "q", q)
    check_same("v", v, "q", q)
    if any(size < 1 for size in q.shape[1:]):
        raise ValueError(f"q must have at least one token, head and channel, got {tuple(q.shape)}")
    check_window(call.window, call.shift, q.dim() - 3)
    heads, head_dim = q.shape[-2:]
    tokens = math.prod(call.window)
    if call.bias is not None:
        check_optional("bias", call.bias, "[heads, N, N]", (heads, tokens, tokens), q)
    if call.pad_kv is not None:
        check_optional("pad_kv", call.pad_kv, "[2, heads, head_dim]", (2, heads, head_dim), q)
    if call.pad_order not in ("pad_roll", "roll_pad"):
        raise ValueError(f"pad_order must be 'pad_roll' or 'roll_pad', got {call.pad_order!r}")


def check_optional(name: str, x: Tensor, layout: str, shape: tuple[int, int, int], q: Tensor) -> None:
    if x.dim() != 3 or any(n != expected for n, expected in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name} must be {layout} = {shape}, got {tuple(x.shape)}")
    check_computable(name, x)
    check_device(name, x, "q", q)


def unpack(qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k and v, views of the packed tensor."""
    if qkv.dim() not in (6, 7) or qkv.shape[-3] != 3:
        raise ValueError(
            f"qkv must be [B, H, W, 3, heads, head_dim] or [B, D, H, W, 3, heads, head_dim], got {tuple(qkv.shape)}"
        )
    return qkv.unbind(-3)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Arguments) -> tuple[Tensor, Tensor]:
    check(q, k, v, call)
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    chosen = resolve(call.backend, q, "window_attention")
    outputs: tuple[Tensor, Tensor] = chosen.window_attention(
        q, k, v, call.bias, call.pad_kv, call.window, call.shift, scale, call.pad_order, call.mask_value
    )
    return outputs


def forward_fake(q: Tensor, k: Tensor, v: Tensor, call: Arguments) -> tuple[Tensor, Tensor]:
    check(q, k, v, call)
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def backward_outputs(dqkv: Tensor, call: Arguments, bias_grad: bool, pad_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``dqkv`` beside the gradients of bias and pad_kv, uninitialised and contiguous."""
    dbias, dpad_kv = (
        dqkv.new_empty(0) if x is None or not wanted else x.new_empty(x.shape)
        for x, wanted in ((call.bias, bias_grad), (call.pad_kv, pad_grad))
    )
    return dqkv, dbias, dpad_kv


def backward(
    dout: Tensor, out: Tensor, lse: Tensor, qkv: Sequence[Tensor], grads: Sequence[Tensor], call: Arguments
) -> None:
    """Fill ``grads``: dq, dk, dv, dbias, dpad_kv, of which the last two are skipped where they are empty."""
    q, k, v = qkv
    dq, dk, dv, dbias, dpad_kv = grads
    check(q, k, v, call)
    check_same("dout", dout, "q", q)
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    resolve(call.backend, q, "window_attention").window_attention_backward(
        dout, q, k, v, call.bias, call.pad_kv, out, lse,
        dq, dk, dv, dbias if dbias.numel() else None, dpad_kv if dpad_kv.numel() else None,
        call.window, call.shift, scale, call.pad_order, call.mask_value,
    )  # fmt: skip


@torch.library.impl("swinops::window_attention", "CompositeExplicitAutograd")
def _forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, Arguments(*arguments))


@torch.library.register_fake("swinops::window_attention")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return forward_fake(q, k, v, Arguments(*arguments))


@torch.library.impl("swinops::window_attention_qkvpacked", "CompositeExplicitAutograd")
def _packed_forward(qkv: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, v = unpack(qkv)
    return forward(q, k, v, Arguments(*arguments))


@torch.library.register_fake("swinops::window_attention_qkvpacked")
def _packed_forward_fake(qkv: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, v = unpack(qkv)
    return forward_fake(q, k, v, Arguments(*arguments))


@torch.library.register_fake("swinops::window_attention_backward")
def _backward_fake(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    pad_grad: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    _, dbias, dpad_kv = backward_outputs(q, Arguments(*arguments), bias_grad, pad_grad)
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), dbias, dpad_kv


@torch.library.impl("swinops::window_attention_backward", "CompositeExplicitAutograd")
def _backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    pad_grad: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = _backward_fake(dout, out, lse, bias_grad, pad_grad, q, k, v, *arguments)
    backward(dout, out, lse, (q, k, v), grads, Arguments(*arguments))
    return grads


@torch.library.register_fake("swinops::window_attention_qkvpacked_backward")
def _packed_backward_fake(
    dout: Tensor, out: Tensor, lse: Tensor, bias_grad: bool, pad_grad: bool, qkv: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return backward_outputs(qkv.new_empty(qkv.shape), Arguments(*arguments), bias_grad, pad_grad)


@torch.library.impl("swinops::window_attention_qkvpacked_backward", "CompositeExplicitAutograd")
def _packed_backward(
    dout: Tensor, out: Tensor, lse: Tensor, bias_grad: bool, pad_grad: bool, qkv: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dqkv, dbias, dpad_kv = _packed_backward_fake(dout, out, lse, bias_grad, pad_grad, qkv, *arguments)
    backward(dout, out, lse, unpack(qkv), (*unpack(dqkv), dbias, dpad_kv), Arguments(*arguments))
    return dqkv, dbias, dpad_kv


def register_gradient(op: str, tensors: int) -> None:
    """The gradient of ``swinops::op``, whose first ``tensors`` arguments are q, k, v or qkv; and no second one."""
    differentiate: Any = getattr(torch.ops.swinops, f"{op}_backward")

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        out, lse = output
        call = Arguments(*inputs[tensors:])
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *inputs[:tensors], call.bias, call.pad_kv)
        ctx.settings = call[2:]

    def gradient(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (tensors + len(Arguments._fields))
        if dout is None:
            return nothing
        out, lse, *inputs = ctx.saved_tensors
        bias_grad, pad_grad = ctx.needs_input_grad[tensors : tensors + 2]
        grads = differentiate(dout, out, lse, bias_grad, pad_grad, *inputs, *ctx.settings)
        dbias, dpad_kv = grads[tensors:]
        return *grads[:tensors], dbias if bias_grad else None, dpad_kv if pad_grad else None, *nothing[tensors + 2 :]

    def no_second_gradient(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"swinops.{op} has no second derivative: backward through its backward was asked for")

    torch.library.register_autograd(f"swinops::{op}", gradient, setup_context=save)
    torch.library.register_autograd(f"swinops::{op}_backward", no_second_gradient)


def register_autocast(op: str, tensors: int, device_type: str, key: str) -> None:
    """Under autocast q, k and v take its dtype; bias and pad_kv keep theirs, for the kernels add them in fp32."""

    @torch.library.impl(f"swinops::{op}", key)
    def cast(*inputs: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device_type)
        # autocast leaves float64 alone everywhere
        qkv = [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in inputs[:tensors]]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            outputs: tuple[Tensor, Tensor] = getattr(torch.ops.swinops, op)(*qkv, *inputs[tensors:])
        return outputs


for op, tensors in (("window_attention", 3), ("window_attention_qkvpacked", 1)):
    register_gradient(op, tensors)
    register_autocast(op, tensors, "cpu", "AutocastCPU")
    register_autocast(op, tensors, "cuda", "AutocastCUDA")
