"""microsoft/Swin-Transformer, and older versions of timm, which had its names."""

import re
from collections.abc import Mapping

from torch import Tensor


def recognises(state: Mapping[str, Tensor]) -> bool:
    return "head.weight" in state or any(name.startswith("layers.0.downsample.") for name in state)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """To this package's names. Here patch merging begins a stage, there it ends the one before."""
    return {ours(name): x for name, x in state.items()}


def ours(name: str) -> str:
    name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) + 1}.downsample.", name)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)
