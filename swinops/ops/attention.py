"""What the attention ops have in common: checks, registration, gradient and autocast."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swinops.backends import resolve
from swinops.ops.arguments import check_computable, check_device, check_same, check_window


def check_arguments(
    q: Tensor,
    bias: Tensor | None,
    pad_kv: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    pad_order: str,
) -> None:
    check_window(window, shift, q.dim() - 3)
    heads, head_dim = q.shape[-2:]
    tokens = math.prod(window)
    if bias is not None:
        check_parameter("bias", bias, "[heads, N, N]", (heads, tokens, tokens), q)
    if pad_kv is not None:
        check_parameter("pad_kv", pad_kv, "[2, heads, head_dim]", (2, heads, head_dim), q)
    if pad_order not in ("pad_roll", "roll_pad"):
        raise ValueError(f"pad_order must be 'pad_roll' or 'roll_pad', got {pad_order!r}")


def check_parameter(name: str, x: Tensor, layout: str, shape: tuple[int, ...], q: Tensor) -> None:
    if x.dim() != len(shape) or any(n != expected for n, expected in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name} must be {layout} = {shape}, got {tuple(x.shape)}")
    check_computable(name, x)
    check_device(name, x, "q", q)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() not in (5, 6):
        raise ValueError(f"q must be [B, H, W, heads, head_dim] or [B, D, H, W, heads, head_dim], got {tuple(q.shape)}")
    check_computable("q", q)
    check_same("k", k, "q", q)
    check_same("v", v, "q", q)
    if any(size < 1 for size in q.shape[1:]):
        raise ValueError(f"q must have at least one token, head and channel, got {tuple(q.shape)}")


def unpack(qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k and v, views of the packed tensor."""
    if qkv.dim() not in (6, 7) or qkv.shape[-3] != 3:
        raise ValueError(
            f"qkv must be [B, H, W, 3, heads, head_dim] or [B, D, H, W, 3, heads, head_dim], got {tuple(qkv.shape)}"
        )
    return qkv.unbind(-3)


def register(name: str, schema: str, arguments: Any, tensors: int) -> None:
    """Define ``swinops::name`` and ``swinops::name_qkvpacked``, with their backward ops, gradients and autocast.

    Args:
        schema: Of what the ops take after q, k and v, or after qkv.
        arguments: The same as a NamedTuple, the last one ``backend``. Its ``check(q)`` raises; its ``settings(q)`` are
            what a backend's functions take after the tensors.
        tensors: How many of these, the first ones, are tensors with a gradient.
    """
    register_op(name, name, ("q", "k", "v"), schema, arguments, tensors)
    register_op(name, f"{name}_qkvpacked", ("qkv",), schema, arguments, tensors)


def register_op(name: str, op: str, inputs: tuple[str, ...], schema: str, arguments: Any, tensors: int) -> None:
    """``swinops::op``, which takes ``inputs`` and runs the backends' ``name``."""
    count = len(inputs)
    taken = f"{', '.join(f'Tensor {x}' for x in inputs)}, {schema}"
    # lse [B, *space, heads] is log2(sum(exp(scores))) of each token, from which backward recomputes the probabilities
    torch.library.define(f"swinops::{op}", f"({taken}) -> (Tensor out, Tensor lse)")
    # ``wanted``: of which of the further tensors. The other gradients are empty, for an op cannot return None.
    gradients = ", ".join(["Tensor"] * (count + tensors))
    torch.library.define(
        f"swinops::{op}_backward", f"(Tensor dout, Tensor out, Tensor lse, bool[] wanted, {taken}) -> ({gradients})"
    )

    def checked(*args: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
        q, k, v = unpack(*args[:count]) if count == 1 else args[:count]
        call = arguments(*args[count:])
        check_qkv(q, k, v)
        call.check(q)
        return q, k, v, call

    @torch.library.impl(f"swinops::{op}", "CompositeExplicitAutograd")
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        q, k, v, call = checked(*args)
        run = getattr(resolve(call.backend, q, name, math.prod(call.window)), name)
        outputs: tuple[Tensor, Tensor] = run(q, k, v, *call[:tensors], *call.settings(q))
        return outputs

    @torch.library.register_fake(f"swinops::{op}")
    def forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
        q, _, _, _ = checked(*args)
        return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))

    @torch.library.register_fake(f"swinops::{op}_backward")
    def backward_fake(dout: Tensor, out: Tensor, lse: Tensor, wanted: Sequence[bool], *args: Any) -> tuple[Tensor, ...]:
        further = zip(args[count : count + tensors], wanted, strict=True)
        return (
            *(x.new_empty(x.shape) for x in args[:count]),
            *(x.new_empty(x.shape) if yes and x is not None else dout.new_empty(0) for x, yes in further),
        )

    @torch.library.impl(f"swinops::{op}_backward", "CompositeExplicitAutograd")
    def backward(dout: Tensor, out: Tensor, lse: Tensor, wanted: Sequence[bool], *args: Any) -> tuple[Tensor, ...]:
        q, k, v, call = checked(*args)
        check_same("dout", dout, "q", q)
        grads: tuple[Tensor, ...] = backward_fake(dout, out, lse, wanted, *args)
        run = getattr(resolve(call.backend, q, name, math.prod(call.window), backward=True), f"{name}_backward")
        dqkv = unpack(*grads[:count]) if count == 1 else grads[:count]
        further = [x if x.numel() else None for x in grads[count:]]
        run(dout, q, k, v, *call[:tensors], out, lse, *dqkv, *further, *call.settings(q))
        return grads

    register_gradient(op, count, tensors)
    register_autocast(op, count, "cpu", "AutocastCPU")
    register_autocast(op, count, "cuda", "AutocastCUDA")


def register_gradient(op: str, count: int, tensors: int) -> None:
    """The gradient of ``swinops::op``; and no second one."""
    differentiate: Any = getattr(torch.ops.swinops, f"{op}_backward")
    saved = count + tensors

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *inputs[:saved])
        ctx.settings = inputs[saved:]

    def gradient(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
        rest = (None,) * len(ctx.settings)
        if dout is None:
            return *(None,) * saved, *rest
        out, lse, *inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[count:saved]
        grads = differentiate(dout, out, lse, wanted, *inputs, *ctx.settings)
        further = (d if yes else None for d, yes in zip(grads[count:], wanted, strict=True))
        return *grads[:count], *further, *rest

    def no_second_gradient(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"swinops.{op} has no second derivative: backward through its backward was asked for")

    torch.library.register_autograd(f"swinops::{op}", gradient, setup_context=save)
    torch.library.register_autograd(f"swinops::{op}_backward", no_second_gradient)


def register_autocast(op: str, count: int, device_type: str, key: str) -> None:
    """Under autocast q, k and v take its dtype; the further tensors keep theirs, for the kernels use them in fp32."""

    @torch.library.impl(f"swinops::{op}", key)
    def cast(*args: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device_type)
        # autocast leaves float64 alone everywhere
        qkv = [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in args[:count]]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            outputs: tuple[Tensor, Tensor] = getattr(torch.ops.swinops, op)(*qkv, *args[count:])
        return outputs
