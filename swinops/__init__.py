"""Kernels for shifted-window attention, as differentiable PyTorch ops and drop-in layers."""

from swinops.ops import (
    relative_position_bias,
    window_attention,
    window_attention_qkvpacked,
    window_merge,
    window_partition,
)

__version__ = "0.1.0"

__all__ = [
    "relative_position_bias",
    "window_attention",
    "window_attention_qkvpacked",
    "window_merge",
    "window_partition",
]
