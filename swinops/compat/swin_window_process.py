"""``swin_window_process``, the extension that Microsoft's Swin compiles for ``--fused_window_process``, on any device.

Before the models are imported::

    import sys
    from swinops.compat import swin_window_process

    sys.modules["swin_window_process"] = swin_window_process

``swinops.patch`` makes these copies superfluous; this is for code that calls them. ``shift_size`` is how far the image
moves: negative or zero where it is partitioned, positive or zero where it is merged, and each backward function takes
what its forward function took. Unlike the extension, these functions take bfloat16, float64, CPU tensors, any strides
and images that are not square; and they are differentiable by themselves.

Microsoft's models import the extension through their own folder ``kernels``, and go on without it where that fails, as
it does where a package of that name is installed, such as Hugging Face's: ``pip uninstall kernels``.
"""

from torch import Tensor

from swinops.ops.cyclic_shift import window_merge, window_partition

__all__ = [
    "roll_and_window_partition_backward",
    "roll_and_window_partition_forward",
    "window_merge_and_roll_backward",
    "window_merge_and_roll_forward",
]


def roll_and_window_partition_forward(
    x: Tensor, B: int, H: int, W: int, C: int, shift_size: int, window_size: int
) -> Tensor:
    """Shift the image by ``shift_size``, from ``1 - window_size`` to 0, and cut it into windows.

    Args:
        x: Any float dtype; H and W divisible by the window. [B, H, W, C]

    Returns:
        Windows in row-major order. [B * nW, window_size, window_size, C]

    Raises:
        ValueError: ``x`` is not of that shape, or the shift is out of range.
        TypeError: ``x`` is not floating point.
    """
    return partition("x", x, (B, H, W, C), distance(shift_size, -1, window_size), window_size)


def roll_and_window_partition_backward(
    dwindows: Tensor, B: int, H: int, W: int, C: int, shift_size: int, window_size: int
) -> Tensor:
    """The gradient of ``roll_and_window_partition_forward``. [B * nW, window_size, window_size, C] -> [B, H, W, C]"""
    return merge("dwindows", dwindows, (B, H, W, C), distance(shift_size, -1, window_size), window_size)


def window_merge_and_roll_forward(
    windows: Tensor, B: int, H: int, W: int, C: int, shift_size: int, window_size: int
) -> Tensor:
    """Put windows back into the image, and shift it by ``shift_size``, from 0 to ``window_size - 1``.

    Args:
        windows: In row-major order, any float dtype. [B * nW, window_size, window_size, C]

    Returns:
        [B, H, W, C]

    Raises:
        ValueError: ``windows`` are not of that shape, or the shift is out of range.
        TypeError: ``windows`` are not floating point.
    """
    return merge("windows", windows, (B, H, W, C), distance(shift_size, 1, window_size), window_size)


def window_merge_and_roll_backward(
    dx: Tensor, B: int, H: int, W: int, C: int, shift_size: int, window_size: int
) -> Tensor:
    """The gradient of ``window_merge_and_roll_forward``. [B, H, W, C] -> [B * nW, window_size, window_size, C]"""
    return partition("dx", dx, (B, H, W, C), distance(shift_size, 1, window_size), window_size)


def distance(shift_size: int, sign: int, window_size: int) -> int:
    """The shift without its sign."""
    if window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}")
    if not 0 <= sign * shift_size < window_size:
        low, high = sorted((0, sign * (window_size - 1)))
        raise ValueError(
            f"shift_size must be from {low} to {high} with windows of {window_size} "
            f"(negative to partition, positive to merge), got {shift_size}"
        )
    return sign * shift_size


def partition(name: str, x: Tensor, shape: tuple[int, int, int, int], shift: int, window: int) -> Tensor:
    if x.shape != shape:
        raise ValueError(f"{name} must be [B, H, W, C] = {shape}, got {tuple(x.shape)}")
    return window_partition(x, window, shift)


def merge(name: str, windows: Tensor, shape: tuple[int, int, int, int], shift: int, window: int) -> Tensor:
    B, H, W, C = shape
    expected = B * (H // window) * (W // window), window, window, C
    if windows.shape != expected:
        raise ValueError(
            f"{name} must be [B * nW, window_size, window_size, C] = {expected} for images [B, H, W, C] = {shape}, "
            f"got {tuple(windows.shape)}"
        )
    return window_merge(windows, (H, W), shift)
