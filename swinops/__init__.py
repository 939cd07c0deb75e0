"""Kernels for shifted-window attention, as differentiable PyTorch ops and drop-in layers."""

from swinops import compat, torchvision
from swinops.checkpoints import load_checkpoint, save_checkpoint
from swinops.dropin import check, explain, patch, patched, unpatch
from swinops.models import create_model, list_models
from swinops.ops import (
    add_layer_norm,
    continuous_position_bias,
    cosine_attention,
    cosine_attention_qkvpacked,
    layer_norm,
    layer_norm_add,
    patch_merging_norm,
    relative_position_bias,
    window_attention,
    window_attention_qkvpacked,
    window_merge,
    window_partition,
)

__version__ = "0.1.0"

__all__ = [
    "add_layer_norm",
    "check",
    "compat",
    "continuous_position_bias",
    "cosine_attention",
    "cosine_attention_qkvpacked",
    "create_model",
    "explain",
    "layer_norm",
    "layer_norm_add",
    "list_models",
    "load_checkpoint",
    "patch",
    "patch_merging_norm",
    "patched",
    "relative_position_bias",
    "save_checkpoint",
    "torchvision",
    "unpatch",
    "window_attention",
    "window_attention_qkvpacked",
    "window_merge",
    "window_partition",
]
