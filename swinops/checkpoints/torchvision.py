"""torchvision's swin_* and swin_v2_*."""

import re
from collections.abc import Mapping

from torch import Tensor

BLOCK = r"features\.\d+\.\d+\.(norm1|attn|norm2|mlp)\."
NAMES = {
    r"^features\.0\.0\.": "patch_embed.proj.",
    r"^features\.0\.2\.": "patch_embed.norm.",
    r"\.mlp\.0\.": ".mlp.fc1.",
    r"\.mlp\.3\.": ".mlp.fc2.",
    r"^head\.": "head.fc.",
}


def recognises(state: Mapping[str, Tensor]) -> bool:
    return any(re.match(BLOCK, name) for name in state)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """To this package's names. A key's bias, which SwinV2 sets to zero when it runs, is left out."""
    converted = {}
    for name, x in state.items():
        if name.endswith(".qkv.bias") and x.dim() == 1 and name.replace("qkv.bias", "logit_scale") in state:
            attn = ours(name).removesuffix("qkv.bias")
            converted[f"{attn}q_bias"], _, converted[f"{attn}v_bias"] = x.tensor_split(3)
        else:
            converted[ours(name)] = x
    return converted


def ours(name: str) -> str:
    for theirs, new in NAMES.items():
        name = re.sub(theirs, new, name)
    # blocks and patch mergings alternate there
    name = re.sub(r"^features\.(\d*[13579])\.", lambda match: f"layers.{int(match[1]) // 2}.blocks.", name)
    return re.sub(r"^features\.(\d+)\.", lambda match: f"layers.{int(match[1]) // 2}.downsample.", name)
