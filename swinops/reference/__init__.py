"""The specification: every op in plain PyTorch, forward and explicit backward formula, in any float dtype."""

from swinops.reference.cyclic_shift import window_merge, window_partition
from swinops.reference.relative_position_bias import relative_position_bias, relative_position_bias_backward
from swinops.reference.window_attention import window_attention, window_attention_backward

__all__ = [
    "relative_position_bias",
    "relative_position_bias_backward",
    "why_not",
    "window_attention",
    "window_attention_backward",
    "window_merge",
    "window_partition",
]


def why_not(x: object, op: str) -> str | None:
    """The reference runs every call."""
    return None
