"""Cyclic shift with window partition, and its inverse. Each is the other's gradient, so second order comes free."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swinops.backends import resolve
from swinops.ops.arguments import check_float, check_window, per_axis


def window_partition(
    x: Tensor, window_size: int | Sequence[int], shift_size: int | Sequence[int] = 0, *, backend: str = "auto"
) -> Tensor:
    """Shift the image cyclically by ``-shift_size`` and cut it into windows, in one pass over memory.

    Args:
        x: Image or volume tokens. [B, H, W, C] or [B, D, H, W, C], any float dtype; every axis divisible by the window.
        window_size: Tokens of a window along each axis, or one int for all.
        shift_size: Tokens to shift along each axis, from 0 to the window less one, or one int for all.
        backend: "auto", or one of ``swinops.backends.MODULES``.

    Returns:
        Windows in row-major order. [B * nW, Mh, Mw, C] or [B * nW, Md, Mh, Mw, C], contiguous

    Raises:
        ValueError: ``x`` is not of that shape, or window or shift are out of range.
        TypeError: ``x`` is not floating point.
        RuntimeError: ``backend`` cannot run here.
    """
    axes = x.dim() - 2
    window = per_axis(window_size, axes, "window_size")
    windows: Tensor = torch.ops.swinops.window_partition(x, window, per_axis(shift_size, axes, "shift_size"), backend)
    return windows


def window_merge(
    windows: Tensor, image_size: Sequence[int], shift_size: int | Sequence[int] = 0, *, backend: str = "auto"
) -> Tensor:
    """Put windows back into the image and undo the shift: the inverse of ``window_partition``.

    Args:
        windows: [B * nW, Mh, Mw, C] or [B * nW, Md, Mh, Mw, C], any float dtype.
        image_size: (H, W) or (D, H, W), divisible by the window.
        shift_size: The shift that ``window_partition`` was given.
        backend: "auto", or one of ``swinops.backends.MODULES``.

    Returns:
        [B, H, W, C] or [B, D, H, W, C], contiguous

    Raises:
        ValueError: ``windows`` are not of that shape or do not fill whole images, or the shift is out of range.
        TypeError: ``windows`` are not floating point.
        RuntimeError: ``backend`` cannot run here.
    """
    axes = windows.dim() - 2
    image = per_axis(image_size, axes, "image_size")
    x: Tensor = torch.ops.swinops.window_merge(windows, image, per_axis(shift_size, axes, "shift_size"), backend)
    return x


def check_partition(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> None:
    if x.dim() not in (4, 5):
        raise ValueError(f"x must be [B, H, W, C] or [B, D, H, W, C], got {tuple(x.shape)}")
    check_float("x", x)
    check_window(window, shift, x.dim() - 2)
    if any(size < 1 or size % w != 0 for size, w in zip(x.shape[1:-1], window, strict=True)):
        raise ValueError(
            f"x must be [B, *space, C] with every axis divisible by the window {tuple(window)}, got {tuple(x.shape)}"
        )


def check_merge(windows: Tensor, image: Sequence[int], shift: Sequence[int]) -> None:
    if windows.dim() not in (4, 5):
        raise ValueError(f"windows must be [B * nW, Mh, Mw, C] or [B * nW, Md, Mh, Mw, C], got {tuple(windows.shape)}")
    check_float("windows", windows)
    window = windows.shape[1:-1]
    check_window(window, shift, windows.dim() - 2)
    if len(image) != len(window) or any(n < 1 or n % w != 0 for n, w in zip(image, window, strict=True)):
        raise ValueError(
            f"image_size must be divisible by the window {tuple(window)} on every axis, got {tuple(image)}"
        )
    if windows.shape[0] % windows_per_image(image, window) != 0:
        raise ValueError(
            f"windows must fill whole images, {windows_per_image(image, window)} windows {tuple(window)} for each "
            f"image {tuple(image)}, got {windows.shape[0]}"
        )


def windows_per_image(image: Sequence[int], window: Sequence[int]) -> int:
    return math.prod(size // w for size, w in zip(image, window, strict=True))


torch.library.define("swinops::window_partition", "(Tensor x, SymInt[] window, SymInt[] shift, str backend) -> Tensor")
torch.library.define(
    "swinops::window_merge", "(Tensor windows, SymInt[] image_size, SymInt[] shift, str backend) -> Tensor"
)


@torch.library.impl("swinops::window_partition", "CompositeExplicitAutograd")
def _partition(x: Tensor, window: Sequence[int], shift: Sequence[int], backend: str) -> Tensor:
    check_partition(x, window, shift)
    y: Tensor = resolve(backend, x, "window_partition").window_partition(x, window, shift)
    return y


@torch.library.register_fake("swinops::window_partition")
def _partition_fake(x: Tensor, window: Sequence[int], shift: Sequence[int], backend: str) -> Tensor:
    check_partition(x, window, shift)
    return x.new_empty(x.shape[0] * windows_per_image(x.shape[1:-1], window), *window, x.shape[-1])


@torch.library.impl("swinops::window_merge", "CompositeExplicitAutograd")
def _merge(windows: Tensor, image_size: Sequence[int], shift: Sequence[int], backend: str) -> Tensor:
    check_merge(windows, image_size, shift)
    x: Tensor = resolve(backend, windows, "window_merge").window_merge(windows, image_size, shift)
    return x


@torch.library.register_fake("swinops::window_merge")
def _merge_fake(windows: Tensor, image_size: Sequence[int], shift: Sequence[int], backend: str) -> Tensor:
    check_merge(windows, image_size, shift)
    batch = windows.shape[0] // windows_per_image(image_size, windows.shape[1:-1])
    return windows.new_empty(batch, *image_size, windows.shape[-1])


def _partition_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ctx.shift, ctx.backend = inputs
    ctx.image_size = x.shape[1:-1]


def _partition_backward(ctx: Any, dwindows: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.swinops.window_merge(dwindows, ctx.image_size, ctx.shift, ctx.backend), None, None, None


def _merge_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    windows, _, ctx.shift, ctx.backend = inputs
    ctx.window = windows.shape[1:-1]


def _merge_backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.swinops.window_partition(dx, ctx.window, ctx.shift, ctx.backend), None, None, None


torch.library.register_autograd("swinops::window_partition", _partition_backward, setup_context=_partition_context)
torch.library.register_autograd("swinops::window_merge", _merge_backward, setup_context=_merge_context)
