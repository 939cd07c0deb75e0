"""The ops: public functions, their registration with ``torch.library`` and their gradients, one file per op."""

from swinops.ops.continuous_position_bias import continuous_position_bias
from swinops.ops.cosine_attention import cosine_attention, cosine_attention_qkvpacked
from swinops.ops.cyclic_shift import window_merge, window_partition
from swinops.ops.layer_norm import add_layer_norm, layer_norm, layer_norm_add
from swinops.ops.patch_merging import patch_merging_norm
from swinops.ops.relative_position_bias import relative_position_bias
from swinops.ops.window_attention import window_attention, window_attention_qkvpacked

__all__ = [
    "add_layer_norm",
    "continuous_position_bias",
    "cosine_attention",
    "cosine_attention_qkvpacked",
    "layer_norm",
    "layer_norm_add",
    "patch_merging_norm",
    "relative_position_bias",
    "window_attention",
    "window_attention_qkvpacked",
    "window_merge",
    "window_partition",
]
