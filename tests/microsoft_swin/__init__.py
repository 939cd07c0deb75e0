"""Microsoft's Swin Transformer, V1, V2 and MoE, as a stand-in: what it computes, in plain PyTorch.

microsoft/Swin-Transformer is on no package registry, so its structure is written down here: names, order and shapes of
parameters and buffers (the index and the masks are saved), patch merging at the end of a stage, masks and windows that
are fixed when the model is built, for images of one size, and a window cut to a feature map that is not larger.

There is a file for each of the published ones, with the classes and the seam that copies of those have everywhere: a
block that takes [B, H * W, C], and an attention that takes windows and a mask. As there, they repeat each other.
"""

from .common import coordinates
from .swin_transformer import SwinTransformer
from .swin_transformer_moe import SwinTransformerMoE
from .swin_transformer_v2 import SwinTransformerV2

__all__ = ["SwinTransformer", "SwinTransformerMoE", "SwinTransformerV2", "coordinates"]
