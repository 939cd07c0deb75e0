"""timm since 0.9, whose names are this package's; older versions had Microsoft's."""

from collections.abc import Mapping

from torch import Tensor

from swinops.checkpoints import microsoft

BLOCK = microsoft.BLOCK


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Patch merging begins a stage here, and the head is a module with a projection."""
    return microsoft.names_blocks(state) and not any(name.startswith(microsoft.MARKS) for name in state)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(state)
