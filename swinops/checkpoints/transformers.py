"""Transformers' Swin and Swinv2 of every kind. Since version 5 Swin has other names in memory than in its files."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from swinops.checkpoints import microsoft

BLOCK = r"((swin|swinv2)\.)?encoder\.layers\.\d+\.blocks\.\d+\.(attention|layernorm_before|layernorm_after)\."
NAMES = {
    r"^(swin|swinv2)\.": "",
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.norm\.": "patch_embed.norm.",
    r"^embeddings\.position_embeddings$": "absolute_pos_embed",
    r"^embeddings\.mask_token$": "mask_token",
    r"^encoder\.": "",
    r"^layernorm\.": "norm.",
    r"^classifier\.": "head.",
    r"\.attention\.(output\.dense|o_proj)\.": ".attn.proj.",
    r"\.attention\.(self\.)?([qkv])(uery|ey|alue|_proj)\.": r".attn.\2.",
    r"\.attention\.(self\.|relative_position_bias\.)": ".attn.",
    r"\.continuous_position_bias_mlp\.": ".cpb_mlp.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
}


def recognises(state: Mapping[str, Tensor]) -> bool:
    return any(re.match(BLOCK, name) for name in state)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """To this package's names. Queries, keys and values are one projection here; SwinV2's keys have no bias."""
    converted = {ours(name): x for name, x in state.items()}
    for name in [name for name in converted if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        found = [converted[part] for part in parts if part in converted]
        # what does not belong together stays apart, and is then reported as unexpected
        if len(found) == 3 and len({(x.shape, x.device) for x in found}) == 1 and found[0].dim():
            converted[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(found)
            for part in parts:
                del converted[part]
    return {re.sub(r"\.attn\.([qv])\.bias$", r".attn.\1_bias", name): x for name, x in converted.items()}


def ours(name: str) -> str:
    for theirs, new in NAMES.items():
        name = re.sub(theirs, new, name)
    # backbones number the norms of their maps from one
    name = re.sub(r"^hidden_states_norms\.stage(\d+)\.", lambda match: f"norm{int(match[1]) - 1}.", name)
    return microsoft.ours(name)
