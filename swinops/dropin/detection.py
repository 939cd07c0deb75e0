"""The Swin of Microsoft's detection and segmentation repositories, which most others of those fields have vendored.

Its blocks pad the image, and get the size and the mask from their ``BasicLayer``.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swinops.dropin.block import TableBlock
from swinops.dropin.masking import STANDARD_MASK, MaskingLayer
from swinops.dropin.microsoft import ATTENTION, RESHAPING, ResidualBlock
from swinops.dropin.swap import Swapped, warn_once
from swinops.reference.window_attention import shift_mask

BLOCK = (
    f"{RESHAPING} H W norm1 window_size F pad shift_size torch roll window_partition attn window_reverse drop_path mlp "
    "norm2 AssertionError"
)
LAYER = (
    f"{RESHAPING} int np ceil window_size torch zeros device slice shift_size window_partition masked_fill float "
    "type to dtype blocks H W use_checkpoint checkpoint downsample"
)
MODULES = (
    "mmdet.models.backbones.swin_transformer", "mask2former.modeling.backbone.swin",
    "maskrcnn_benchmark.modeling.backbone.swint",
)  # fmt: skip


class DetectionBlock(ResidualBlock, TableBlock):
    """``SwinTransformerBlock``: pads, then shifts, even a single window.

    The op has the mask that the published ``BasicLayer`` makes, and takes no other.
    """

    LIBRARY = "Microsoft detection"
    MODULES = MODULES
    NAME = "SwinTransformerBlock"
    ATTRIBUTES = (*ResidualBlock.ATTRIBUTES, "H", "W", "attn.scale", "attn.relative_position_bias_table")
    CODE = (("forward", "x mask_matrix", BLOCK), ("attn.forward", "x mask", ATTENTION))

    H: int
    W: int

    @classmethod
    def examples(cls, library: Any) -> list[Any]:
        blocks = [library(8, 4, window_size=5, shift_size=shift) for shift in (0, 2)]
        for block in blocks:
            block.H, block.W = cls.IMAGE
        return blocks

    @classmethod
    def arguments(cls, block: Any, x: Tensor) -> tuple[Any, ...]:
        return x, shift_mask(cls.IMAGE, [5, 5], [2, 2], cls.MASK_VALUE, x.device)

    def forward(self, x: Tensor, mask_matrix: Any) -> Any:
        H, W = self.H, self.W
        standard = mask_matrix is STANDARD_MASK
        # what the library refuses, it refuses in its own words
        own = x.dim() != 3 or x.shape[1] != H * W or self.own_reason() is not None
        if not own and self.shift_size > 0 and not standard:
            warn_once(self.LIBRARY, "a layer handed its block a mask, which may be any")
            own = True
        if own and standard:
            window, shift = [self.window_size] * 2, [self.shift_size] * 2
            mask_matrix = shift_mask((H, W), window, shift, self.MASK_VALUE, x.device).to(x.dtype)
        return self.library_forward(x, mask_matrix) if own else self.compute(x, (H, W))


class DetectionLayer(MaskingLayer):
    """``BasicLayer``, which tells its blocks the size of the image."""

    LIBRARY = DetectionBlock.LIBRARY
    MODULES = MODULES
    ATTRIBUTES = ("window_size", "shift_size", "use_checkpoint", "downsample", "blocks.0.H")
    CODE: ClassVar[tuple[tuple[str, str, str], ...]] = (("forward", "x H W", LAYER),)

    window_size: int
    shift_size: int
    use_checkpoint: bool

    @classmethod
    def why_left(cls, layer: Any) -> str | None:
        for name in ("window_size", "shift_size"):
            if any(getattr(block, name, 0) not in (0, getattr(layer, name)) for block in layer.blocks):
                return f"its {name} is not that of its blocks"
        return super().why_left(layer)

    @classmethod
    def example(cls, layer: Any) -> tuple[tuple[Any, ...], dict[str, Any], Sequence[Sequence[int]]]:
        x = torch.arange(140.0, device="cpu").view(1, 70, 2)
        attributes = {"window_size": 4, "shift_size": 2, "use_checkpoint": False}
        return (x, 7, 10), attributes, ((7, 10), (4, 4), (2, 2))

    def forward(self, x: Tensor, H: int, W: int) -> Any:
        blocks = [block for block in self.blocks if isinstance(block, DetectionBlock)]
        runs = any(block.why_own(block, block.swinops_backend) is None for block in blocks)
        if not runs or len(blocks) < len(self.blocks):
            return self.library_forward(x, H, W)
        if self.use_checkpoint and torch.is_grad_enabled() and not x.requires_grad:
            # whether parameters have gradients then depends on which of torch's two checkpoints the library uses
            warn_once(self.LIBRARY, "a layer checkpoints blocks whose input needs no gradient")
            return self.library_forward(x, H, W)
        return self.without_mask(x, H, W)

    def without_mask(self, x: Tensor, H: int, W: int) -> Any:
        """[B, H * W, C] -> the same and its size, and the next layer's input and its size"""
        for block in self.blocks:
            block.H, block.W = H, W
            if self.use_checkpoint:
                x = checkpoint(block, x, STANDARD_MASK, use_reentrant=False)
            else:
                x = block(x, STANDARD_MASK)
        if self.downsample is None:
            return x, H, W, x, H, W
        return x, H, W, self.downsample(x, H, W), (H + 1) // 2, (W + 1) // 2


SWAPS: tuple[type[Swapped], ...] = (DetectionBlock, DetectionLayer)
