"""Kernels for shifted-window attention, as differentiable PyTorch ops and drop-in layers."""

from swinops.dropin import check, explain, patch, patched, unpatch
from swinops.models import create_model, list_models
from swinops.ops import (
    relative_position_bias,
    window_attention,
    window_attention_qkvpacked,
    window_merge,
    window_partition,
)

__version__ = "0.1.0"

__all__ = [
    "check",
    "create_model",
    "explain",
    "list_models",
    "patch",
    "patched",
    "relative_position_bias",
    "unpatch",
    "window_attention",
    "window_attention_qkvpacked",
    "window_merge",
    "window_partition",
]
