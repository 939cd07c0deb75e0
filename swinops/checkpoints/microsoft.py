"""microsoft/Swin-Transformer, its SimMIM and detection code, and older versions of timm, which had its names."""

import re
from collections.abc import Mapping

from torch import Tensor

BLOCK = r"layers\.\d+\.blocks\.\d+\.(norm1|attn|norm2|mlp)\."
MARKS = ("layers.0.downsample.", "head.weight", "head.bias")  # what timm has elsewhere


def names_blocks(state: Mapping[str, Tensor]) -> bool:
    return any(re.match(BLOCK, name) for name in state)


def recognises(state: Mapping[str, Tensor]) -> bool:
    if any(name.startswith(MARKS) for name in state):
        return names_blocks(state)
    # a single stage without a head has the same names here and in timm
    return names_blocks(state) and not any(name.startswith("head.") or ".downsample." in name for name in state)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """To this package's names. Here patch merging begins a stage, there it ends the one before."""
    return {ours(name): x for name, x in state.items()}


def ours(name: str) -> str:
    name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) + 1}.downsample.", name)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)
