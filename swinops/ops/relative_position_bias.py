"""The relative position bias of Swin: a table row for each offset between two tokens of a window."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swinops.backends import resolve
from swinops.ops.arguments import check_computable, per_axis


def relative_position_bias(table: Tensor, window_size: int | Sequence[int], *, backend: str = "auto") -> Tensor:
    """Expand the table of relative offsets to a bias for every pair of a window's tokens (arXiv 2103.14030, eq. 4).

    Args:
        table: A row for each offset, in row-major order from the most negative. [(2Mh-1)(2Mw-1), heads], or
            [(2Md-1)(2Mh-1)(2Mw-1), heads]; any float dtype.
        window_size: (Mh, Mw) or (Md, Mh, Mw); an int means two axes.
        backend: "auto", or one of ``swinops.backends.MODULES``.

    Returns:
        ``bias[h, i, j] = table[row(i - j), h]``. [heads, N, N], the table's dtype, contiguous

    Raises:
        ValueError: ``table`` has not one row for each offset.
        TypeError: ``table`` is not floating point.
        RuntimeError: ``backend`` cannot run here.
    """
    axes = len(window_size) if isinstance(window_size, (tuple, list)) else 2
    window = per_axis(window_size, axes, "window_size")
    bias: Tensor = torch.ops.swinops.relative_position_bias(table, window, backend)
    return bias


def check(table: Tensor, window: Sequence[int]) -> None:
    if len(window) not in (2, 3) or any(w < 1 for w in window):
        raise ValueError(f"window_size must be at least 1 on each of two or three axes, got {tuple(window)}")
    check_computable("table", table)
    if table.dim() != 2 or table.shape[0] != offsets(window):
        raise ValueError(
            f"table must be [{offsets(window)}, heads] for the window {tuple(window)}, got {tuple(table.shape)}"
        )


def check_backward(dbias: Tensor, window: Sequence[int]) -> None:
    tokens = math.prod(window)
    if dbias.dim() != 3 or dbias.shape[1] != tokens or dbias.shape[2] != tokens:
        raise ValueError(
            f"dbias must be [heads, {tokens}, {tokens}] for the window {tuple(window)}, got {tuple(dbias.shape)}"
        )
    check_computable("dbias", dbias)


def offsets(window: Sequence[int]) -> int:
    return math.prod(2 * w - 1 for w in window)


torch.library.define("swinops::relative_position_bias", "(Tensor table, SymInt[] window, str backend) -> Tensor")
torch.library.define(
    "swinops::relative_position_bias_backward", "(Tensor dbias, SymInt[] window, str backend) -> Tensor"
)


@torch.library.impl("swinops::relative_position_bias", "CompositeExplicitAutograd")
def _forward(table: Tensor, window: Sequence[int], backend: str) -> Tensor:
    check(table, window)
    chosen = resolve(backend, table, "relative_position_bias", math.prod(window))
    bias: Tensor = chosen.relative_position_bias(table, window)
    return bias


@torch.library.register_fake("swinops::relative_position_bias")
def _forward_fake(table: Tensor, window: Sequence[int], backend: str) -> Tensor:
    check(table, window)
    return table.new_empty(table.shape[1], math.prod(window), math.prod(window))


@torch.library.impl("swinops::relative_position_bias_backward", "CompositeExplicitAutograd")
def _backward(dbias: Tensor, window: Sequence[int], backend: str) -> Tensor:
    check_backward(dbias, window)
    chosen = resolve(backend, dbias, "relative_position_bias", math.prod(window), backward=True)
    dtable: Tensor = chosen.relative_position_bias_backward(dbias, window)
    return dtable


@torch.library.register_fake("swinops::relative_position_bias_backward")
def _backward_fake(dbias: Tensor, window: Sequence[int], backend: str) -> Tensor:
    check_backward(dbias, window)
    return dbias.new_empty(offsets(window), dbias.shape[0])


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.window, ctx.backend = inputs


# the op is linear, so each direction is the other's gradient and second order comes free
def _table_gradient(ctx: Any, dbias: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.swinops.relative_position_bias_backward(dbias, ctx.window, ctx.backend), None, None


def _bias_gradient(ctx: Any, dtable: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.swinops.relative_position_bias(dtable, ctx.window, ctx.backend), None, None


torch.library.register_autograd("swinops::relative_position_bias", _table_gradient, setup_context=_context)
torch.library.register_autograd("swinops::relative_position_bias_backward", _bias_gradient, setup_context=_context)
