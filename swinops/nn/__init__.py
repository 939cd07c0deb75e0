"""Layers on this package's ops, for tokens in image layout: [B, H, W, C]."""

from swinops.nn.drop_path import DropPath
from swinops.nn.layer_norm import AddLayerNorm, LayerNorm
from swinops.nn.mlp import Mlp
from swinops.nn.patch import PatchEmbed, PatchMerging
from swinops.nn.swin_block import SwinBlock
from swinops.nn.window_attention import WindowAttention

__all__ = [
    "AddLayerNorm",
    "DropPath",
    "LayerNorm",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "SwinBlock",
    "WindowAttention",
]
