"""The ops: public functions, their registration with ``torch.library`` and their gradients, one file per op."""

from swinops.ops.cyclic_shift import window_merge, window_partition
from swinops.ops.relative_position_bias import relative_position_bias
from swinops.ops.window_attention import window_attention, window_attention_qkvpacked

__all__ = [
    "relative_position_bias",
    "window_attention",
    "window_attention_qkvpacked",
    "window_merge",
    "window_partition",
]
