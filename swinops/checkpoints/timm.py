"""timm, whose names are this package's."""

from collections.abc import Mapping

from torch import Tensor

BUFFERS = ("relative_position_index", "attn_mask")  # some versions saved them


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """To this package's names."""
    return {name: x for name, x in state.items() if not name.endswith(BUFFERS)}
