"""OpenMMLab's MMPretrain (V1 and V2), MMDetection and MMSegmentation, with or without a head."""

import re
from collections.abc import Mapping

from torch import Tensor

from swinops.checkpoints import microsoft

BLOCK = r"stages\.\d+\.blocks\.\d+\.(attn\.w_msa|ffn)\."
NAMES = {
    r"^patch_embed\.projection\.": "patch_embed.proj.",
    r"^stages\.": "layers.",
    r"\.attn\.w_msa\.": ".attn.",
    r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
    r"\.ffn\.layers\.1\.": ".mlp.fc2.",
}


def recognises(state: Mapping[str, Tensor]) -> bool:
    return any(re.match(BLOCK, name) for name in state)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """To this package's names, and the channels of patch merging to its order.

    V1's merging ends a stage, as Microsoft's does, and V2's begins one, as here.
    """
    converted = {ours(name): x for name, x in state.items()}
    if any(name.startswith("layers.0.downsample.") for name in converted):
        converted = microsoft.convert(converted)
    for name in [name for name in converted if name.endswith(".downsample.reduction.weight")]:
        width = converted[name].shape[-1:]
        for part in ("reduction.weight", "norm.weight", "norm.bias"):
            x = converted.get(part := name.replace("reduction.weight", part))
            # V2's norm comes after the reduction, and has fewer channels
            if x is not None and x.shape[-1:] == width and x.dim() and x.shape[-1] % 4 == 0:
                converted[part] = merged(x)
    return converted


def merged(x: Tensor) -> Tensor:
    """The last axis from the order of nn.Unfold (channel, row, column) to the published one (column, row, channel)."""
    by_token: Tensor = x.unflatten(-1, (-1, 2, 2)).transpose(-1, -3)
    return by_token.flatten(-3)


def ours(name: str) -> str:
    for theirs, new in NAMES.items():
        name = re.sub(theirs, new, name)
    return name
