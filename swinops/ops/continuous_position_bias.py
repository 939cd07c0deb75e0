"""The continuous position bias of Swin V2: a small network makes the table that a window's bias is read from."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swinops.backends import resolve
from swinops.ops.arguments import check_computable, check_device, per_axis
from swinops.ops.relative_position_bias import check_backward, offsets


def continuous_position_bias(
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    window_size: int | Sequence[int],
    pretrained_window_size: int | Sequence[int] | None = None,
    *,
    log_spaced: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A bias for every pair of a window's tokens: a network of the offset between them (arXiv 2111.09883, eq. 3).

    ``bias[h, i, j] = 16 * sigmoid(w2 @ relu(w1 @ x + b1))[h]``, x the coordinates of the offset i - j, in float32.

    Args:
        w1, b1, w2: ``Linear(2, hidden)``, and ``Linear(hidden, heads)`` without bias. [hidden, 2], [hidden],
            [heads, hidden]; one float dtype of 16 bits or more
        window_size: (Mh, Mw); an int means both.
        pretrained_window_size: The window that the network was trained with, where it is another: its offsets fill
            the range of x, and those of a larger window go beyond.
        log_spaced: x = sign(y) log2(1 + abs(y)) / log2(8), where y = 8 offset / (M - 1); False: x = y.
        backend: "auto", or one of ``swinops.backends.MODULES``.

    Returns:
        [heads, N, N], the weights' dtype, contiguous

    Raises:
        ValueError, TypeError: an argument's shape, device, range or dtype is not as above.
        RuntimeError: ``backend`` cannot run here; or, in backward, a second derivative is asked for.
    """
    window = per_axis(window_size, 2, "window_size")
    pretrained = window
    if pretrained_window_size is not None:
        pretrained = per_axis(pretrained_window_size, 2, "pretrained_window_size")
    bias: Tensor = torch.ops.swinops.continuous_position_bias(w1, b1, w2, window, pretrained, log_spaced, backend)[0]
    return bias


NETWORK = "Tensor w1, Tensor b1, Tensor w2, SymInt[] window, SymInt[] pretrained, bool log_spaced, str backend"
# table [rows, heads]: 16 * sigmoid of each offset, in float32, or float64 for float64
torch.library.define("swinops::continuous_position_bias", f"({NETWORK}) -> (Tensor bias, Tensor table)")
torch.library.define(
    "swinops::continuous_position_bias_backward",
    f"(Tensor dbias, Tensor table, {NETWORK}) -> (Tensor dw1, Tensor db1, Tensor dw2)",
)


def check(w1: Tensor, b1: Tensor, w2: Tensor, window: Sequence[int], pretrained: Sequence[int]) -> None:
    for name, sizes in (("window_size", window), ("pretrained_window_size", pretrained)):
        if len(sizes) != 2 or any(m < 1 for m in sizes):
            raise ValueError(f"{name} must be at least 1 on each of the two axes, got {tuple(sizes)}")
    check_computable("w1", w1)
    if w1.dim() != 2 or w1.shape[0] < 1 or w1.shape[1] != 2:
        raise ValueError(f"w1 must be [hidden, 2] with at least one hidden unit, got {tuple(w1.shape)}")
    hidden = w1.shape[0]
    if b1.dim() != 1 or b1.shape[0] != hidden:
        raise ValueError(f"b1 must be [hidden] = ({hidden},), as w1 is [hidden, 2], got {tuple(b1.shape)}")
    if w2.dim() != 2 or w2.shape[1] != hidden:
        raise ValueError(f"w2 must be [heads, {hidden}], as w1 is [{hidden}, 2], got {tuple(w2.shape)}")
    for name, x in (("b1", b1), ("w2", w2)):
        if x.dtype != w1.dtype:
            raise TypeError(f"{name} must have the dtype of w1, {w1.dtype}, got {x.dtype}")
        check_device(name, x, "w1", w1)


def check_gradient(dbias: Tensor, table: Tensor, w2: Tensor, window: Sequence[int]) -> None:
    check_backward(dbias, window)
    heads, rows = w2.shape[0], offsets(window)
    if dbias.shape[0] != heads:
        raise ValueError(f"dbias must have a matrix for each of the {heads} heads of w2, got {dbias.shape[0]}")
    if table.dim() != 2 or table.shape[0] != rows or table.shape[1] != heads:
        raise ValueError(f"table must be [{rows}, {heads}], as forward returned it, got {tuple(table.shape)}")


@torch.library.impl("swinops::continuous_position_bias", "CompositeExplicitAutograd")
def _forward(
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    window: Sequence[int],
    pretrained: Sequence[int],
    log_spaced: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check(w1, b1, w2, window, pretrained)
    chosen = resolve(backend, w1, "continuous_position_bias", math.prod(window))
    outputs: tuple[Tensor, Tensor] = chosen.continuous_position_bias(w1, b1, w2, window, pretrained, log_spaced)
    return outputs


@torch.library.register_fake("swinops::continuous_position_bias")
def _forward_fake(
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    window: Sequence[int],
    pretrained: Sequence[int],
    log_spaced: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check(w1, b1, w2, window, pretrained)
    heads, tokens = w2.shape[0], math.prod(window)
    wide = torch.promote_types(w1.dtype, torch.float32)
    return w1.new_empty(heads, tokens, tokens), w1.new_empty(offsets(window), heads, dtype=wide)


@torch.library.impl("swinops::continuous_position_bias_backward", "CompositeExplicitAutograd")
def _backward(
    dbias: Tensor,
    table: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    window: Sequence[int],
    pretrained: Sequence[int],
    log_spaced: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check(w1, b1, w2, window, pretrained)
    check_gradient(dbias, table, w2, window)
    chosen = resolve(backend, w1, "continuous_position_bias", math.prod(window), backward=True)
    grads: tuple[Tensor, Tensor, Tensor] = chosen.continuous_position_bias_backward(
        dbias, table, w1, b1, w2, window, pretrained, log_spaced
    )
    return grads


@torch.library.register_fake("swinops::continuous_position_bias_backward")
def _backward_fake(
    dbias: Tensor,
    table: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    window: Sequence[int],
    pretrained: Sequence[int],
    log_spaced: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check(w1, b1, w2, window, pretrained)
    check_gradient(dbias, table, w2, window)
    return w1.new_empty(w1.shape), b1.new_empty(b1.shape), w2.new_empty(w2.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    w1, b1, w2, *ctx.settings = inputs
    _, table = output
    ctx.mark_non_differentiable(table)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(table, w1, b1, w2)


def _gradient(ctx: Any, dbias: Tensor | None, dtable: None) -> tuple[Tensor | None, ...]:
    if dbias is None:
        return (None,) * 7
    grads = torch.ops.swinops.continuous_position_bias_backward(dbias, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None, None


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "swinops.continuous_position_bias has no second derivative: backward through its backward was asked for"
    )


torch.library.register_autograd("swinops::continuous_position_bias", _gradient, setup_context=_context)
torch.library.register_autograd("swinops::continuous_position_bias_backward", _no_second_gradient)


def register_autocast(op: str, key: str) -> None:
    """Autocast casts nothing, neither the weights nor, below this key, what the reference multiplies."""

    @torch.library.impl(f"swinops::{op}", key)
    def leave(*arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            outputs: tuple[Tensor, ...] = getattr(torch.ops.swinops, op)(*arguments)
        return outputs


for key in ("AutocastCPU", "AutocastCUDA"):
    register_autocast("continuous_position_bias", key)
    register_autocast("continuous_position_bias_backward", key)
