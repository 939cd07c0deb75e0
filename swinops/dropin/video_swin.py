"""Video Swin, whose file is vendored widely, and that of mmaction2: attention in 3-D windows becomes one op."""

from torch import Tensor

from swinops.dropin.monai import ATTENTION, LAYER, PART, MaskedBlock, VolumeLayer, run_blocks
from swinops.dropin.swap import Swapped


class VideoBlock(MaskedBlock):
    """``SwinTransformerBlock3D``."""

    LIBRARY = "Video Swin"
    MODULES = ("mmaction.models.backbones.swin_transformer", "mmaction.models.backbones.swin")
    NAME = "SwinTransformerBlock3D"
    FORMULA = (("attn", "WindowAttention3D"),)
    CODE = (("forward_part1", "x mask_matrix", PART), ("attn.forward", "x mask", ATTENTION))


class VideoLayer(VolumeLayer):
    """``BasicLayer`` of the paper's repository."""

    LIBRARY = "Video Swin"
    MODULES = VideoBlock.MODULES[:1]
    CODE = (("forward", "x", LAYER),)
    BLOCK = VideoBlock


class MmactionLayer(VideoLayer):
    """``BasicLayer`` of mmaction2: channels come last in what it returns, and its downsampling is an option."""

    MODULES = VideoBlock.MODULES[1:]
    CODE = (("forward", "x do_downsample", LAYER),)

    def forward(self, x: Tensor, do_downsample: bool = True) -> Tensor:
        return self.library_forward(x, do_downsample) if self.makes_mask(x) else self.without_mask(x, do_downsample)

    def without_mask(self, x: Tensor, do_downsample: bool = True) -> Tensor:
        """[B, C, *space] -> [B, *space, C]"""
        x = run_blocks(self.blocks, x)
        return self.downsample(x) if self.downsample is not None and do_downsample else x


SWAPS: tuple[type[Swapped], ...] = (VideoBlock, VideoLayer, MmactionLayer)
