"""The specification: every op in plain PyTorch, forward and explicit backward formula, in any float dtype."""

from swinops.reference.continuous_position_bias import continuous_position_bias, continuous_position_bias_backward
from swinops.reference.cosine_attention import cosine_attention, cosine_attention_backward
from swinops.reference.cyclic_shift import window_merge, window_partition
from swinops.reference.layer_norm import (
    add_layer_norm,
    add_layer_norm_backward,
    layer_norm,
    layer_norm_add,
    layer_norm_add_backward,
    layer_norm_backward,
)
from swinops.reference.patch_merging import patch_merging_norm, patch_merging_norm_backward
from swinops.reference.relative_position_bias import relative_position_bias, relative_position_bias_backward
from swinops.reference.window_attention import window_attention, window_attention_backward

__all__ = [
    "add_layer_norm",
    "add_layer_norm_backward",
    "continuous_position_bias",
    "continuous_position_bias_backward",
    "cosine_attention",
    "cosine_attention_backward",
    "layer_norm",
    "layer_norm_add",
    "layer_norm_add_backward",
    "layer_norm_backward",
    "patch_merging_norm",
    "patch_merging_norm_backward",
    "relative_position_bias",
    "relative_position_bias_backward",
    "why_not",
    "window_attention",
    "window_attention_backward",
    "window_merge",
    "window_partition",
]


def why_not(x: object, op: str, tokens: int = 0) -> str | None:
    """The reference runs every call."""
    return None
