"""Checks that the ops share. Each raises one sentence: the argument, what was expected, what came."""

from collections.abc import Sequence

import torch
from torch import Tensor


def per_axis(value: int | Sequence[int], axes: int, name: str) -> list[int]:
    """``value`` for each spatial axis: an int stands for every axis."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return [value] * axes
    if isinstance(value, (tuple, list, torch.Size)) and all(
        isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in value
    ):
        # a tensor of another rank is the error to report, and the op's check reports it
        if len(value) == axes or axes not in (2, 3):
            return list(value)
        raise ValueError(f"{name} must be an int or one int for each of the {axes} spatial axes, got {tuple(value)}")
    raise TypeError(f"{name} must be an int or one int for each of the {axes} spatial axes, got {value!r}")


def check_float(name: str, x: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating-point dtype, got {x.dtype}")


def check_computable(name: str, x: Tensor) -> None:
    """``x`` is of a floating-point dtype that PyTorch adds and multiplies: the 8-bit ones are for storage."""
    check_float(name, x)
    if x.itemsize < 2:
        raise TypeError(f"{name} must have a floating-point dtype of 16 bits or more, got {x.dtype}")


def check_window(window: Sequence[int], shift: Sequence[int], axes: int) -> None:
    if len(window) != axes or any(w < 1 for w in window):
        raise ValueError(f"window_size must be at least 1 on each of the {axes} spatial axes, got {tuple(window)}")
    if len(shift) != axes or any(s < 0 or s >= w for s, w in zip(shift, window, strict=True)):
        raise ValueError(
            f"shift_size must be at least 0 and less than the window {tuple(window)} on every axis, got {tuple(shift)}"
        )


def check_same(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """``x`` has the shape, dtype and device of ``like``."""
    check_shape(name, x, like_name, like)
    if x.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name}, {like.dtype}, got {x.dtype}")
    check_device(name, x, like_name, like)


def check_like(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """``x`` has the shape and device of ``like``, and a dtype to compute with."""
    check_shape(name, x, like_name, like)
    check_computable(name, x)
    check_device(name, x, like_name, like)


def check_vector(name: str, vector: Tensor, layout: str, size: int, x: Tensor) -> None:
    """``vector`` is [size], has a dtype to compute with and is on the device of ``x``."""
    if vector.dim() != 1 or vector.shape[0] != size:
        raise ValueError(f"{name} must be {layout} = ({size},), got {tuple(vector.shape)}")
    check_computable(name, vector)
    check_device(name, vector, "x", x)


def check_shape(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {like_name} {tuple(like.shape)}, got {tuple(x.shape)}")


def check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {x.device}")
