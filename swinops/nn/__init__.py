"""Layers on this package's ops, for tokens in image layout: [B, H, W, C]."""

from swinops.nn.cosine_attention import CosineWindowAttention
from swinops.nn.drop_path import DropPath
from swinops.nn.layer_norm import AddLayerNorm, LayerNorm, LayerNormAdd
from swinops.nn.mlp import Mlp
from swinops.nn.patch import PatchEmbed, PatchMerging, PatchMergingV2
from swinops.nn.swin_block import SwinBlock
from swinops.nn.swin_v2_block import SwinV2Block
from swinops.nn.window_attention import WindowAttention

__all__ = [
    "AddLayerNorm",
    "CosineWindowAttention",
    "DropPath",
    "LayerNorm",
    "LayerNormAdd",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "PatchMergingV2",
    "SwinBlock",
    "SwinV2Block",
    "WindowAttention",
]
