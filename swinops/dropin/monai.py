"""MONAI's SwinUNETR, in 2-D and 3-D: the attention of a block becomes one op, and its mask is not made.

Here what Video Swin has in common with it, too.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swinops.dropin.block import TableBlock
from swinops.dropin.masking import STANDARD_MASK, MaskingLayer
from swinops.dropin.swap import Swapped, warn_once
from swinops.dropin.vendored import VendoredBlock
from swinops.reference.window_attention import shift_mask

PART = (
    "shape norm1 get_window_size window_size shift_size F pad any torch roll window_partition attn view window_reverse "
    "contiguous"
)
ATTENTION = (
    "shape qkv reshape num_heads permute scale transpose relative_position_bias_table relative_position_index "
    "contiguous unsqueeze view softmax attn_drop proj proj_drop"
)
FLASH_ATTENTION = (
    "use_flash_attention torch jit is_scripting is_grad_enabled expand nn functional scaled_dot_product_attention"
)
LAYER = (
    "shape get_window_size window_size shift_size rearrange permute int np ceil compute_mask device blocks view "
    "downsample"
)


class MaskedBlock(VendoredBlock, TableBlock):
    """A block that its layer hands the mask; it cuts its window, axis by axis, to an image that is not larger.

    Of a window that is cut, the libraries read the first rows and columns of the whole window's position bias.
    """

    IMAGE = (5, 6, 4)
    OVERRIDES = ("forward_part1",)  # half of the block: the libraries may checkpoint each
    ATTRIBUTES = (
        "window_size", "shift_size", "norm1", "attn.qkv", "attn.proj", "attn.proj_drop", "attn.attn_drop",
        "attn.softmax", "attn.scale", "attn.num_heads", "attn.window_size", "attn.relative_position_bias_table",
        "attn.relative_position_index",
    )  # fmt: skip

    window_size: Sequence[int]
    shift_size: Sequence[int]
    norm1: nn.Module
    library_forward_part1: Callable[[Tensor, Any], Tensor]

    @classmethod
    def examples(cls, library: Any) -> list[Any]:
        """One window covers some axes of the last two."""
        windows = ((2, 4, 3), (0, 0, 0)), ((2, 4, 3), (1, 2, 1)), ((6, 4, 4), (1, 2, 1)), ((3, 3, 5), (1, 2, 1))
        return [library(8, 4, window, shift) for window, shift in windows]

    @classmethod
    def arguments(cls, block: Any, x: Tensor) -> tuple[Any, ...]:
        mask = shift_mask(cls.IMAGE, *cut(cls.IMAGE, block.window_size, block.shift_size), cls.MASK_VALUE, x.device)
        return x.unflatten(1, cls.IMAGE), mask

    def compute(self, x: Tensor, size: Sequence[int]) -> Any:
        return self.swinops_attn(self.norm1(x.unflatten(1, size)), *cut(size, self.window_size, self.shift_size))

    def forward_part1(self, x: Tensor, mask_matrix: Any) -> Tensor:
        space: Sequence[int] = x.shape[1:-1]
        if torch.jit.is_tracing():  # sizes are tensors there, which an op does not take for integers
            space = [int(n) for n in space]
        if len(space) != len(self.window_size):
            return self.library_forward_part1(x, mask_matrix)
        window, shift = cut(space, self.window_size, self.shift_size)
        own = self.own_reason() is not None
        if not own and any(shift) and mask_matrix is not STANDARD_MASK:
            warn_once(self.LIBRARY, "a layer that was not replaced handed its block a mask, which may be any")
            own = True
        if not own:
            return self.swinops_attn(self.norm1(x), window, shift)
        if mask_matrix is STANDARD_MASK:
            mask_matrix = shift_mask(space, window, shift, self.MASK_VALUE, x.device)
        return self.library_forward_part1(x, mask_matrix)

    def position_bias(self, window: list[int]) -> Tensor:
        N = math.prod(window)
        return super().position_bias(list(self.attn.window_size))[:, :N, :N]


def cut(space: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[list[int], list[int]]:
    """Window and shift of an image: on an axis that is not larger than the window, the axis and 0."""
    larger = [n > w for n, w in zip(space, window, strict=True)]
    return (
        [w if yes else n for yes, n, w in zip(larger, space, window, strict=True)],
        [s if yes else 0 for yes, s in zip(larger, shift, strict=True)],
    )


class VolumeLayer(MaskingLayer):
    """A layer whose image has its channels first."""

    ATTRIBUTES = ("window_size", "shift_size", "downsample", "blocks.0.forward_part1")
    BLOCK: ClassVar[type[MaskedBlock]]

    window_size: Sequence[int]
    shift_size: Sequence[int]

    @classmethod
    def example(cls, layer: Any) -> tuple[tuple[Any, ...], dict[str, Any], Sequence[Sequence[int]]]:
        axes = len(layer.window_size)
        space, window, shift = (3, 5, 4)[-axes:], (2, 3, 4)[-axes:], (1, 1, 2)[-axes:]
        x = torch.arange(2.0 * math.prod(space), device="cpu").view(1, 2, *space)
        return (x,), {"window_size": window, "shift_size": shift}, (space, *cut(space, window, shift))

    def makes_mask(self, x: Tensor) -> bool:
        """A block may need it."""
        if x.dim() - 2 != len(self.window_size):
            return True
        runs_op = False
        for block in self.blocks:
            if not isinstance(block, self.BLOCK) or not self.fits(block):
                return True
            runs_op = runs_op or block.why_own(block, block.swinops_backend) is None
        return not runs_op

    def fits(self, block: MaskedBlock) -> bool:
        """The mask of this layer's windows is that of the block's."""
        shifts = block.shift_size if any(block.shift_size) else self.shift_size
        return tuple(block.window_size) == tuple(self.window_size) and tuple(shifts) == tuple(self.shift_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.library_forward(x) if self.makes_mask(x) else self.without_mask(x)

    def without_mask(self, x: Tensor) -> Tensor:
        """[B, C, *space] -> [B, C, *space]"""
        x = run_blocks(self.blocks, x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x.movedim(-1, 1)


def run_blocks(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """[B, C, *space] -> [B, *space, C]"""
    x = x.movedim(1, -1)
    for block in blocks:
        x = block(x, STANDARD_MASK)
    return x


class MonaiBlock(MaskedBlock):
    """MONAI's ``SwinTransformerBlock``, with or without its flash attention."""

    LIBRARY = "MONAI"
    MODULES = ("monai.networks.nets.swin_unetr",)
    NAME = "SwinTransformerBlock"
    CODE = (
        ("forward_part1", "x mask_matrix", f"{PART} size len"),
        ("attn.forward", "x mask", f"{ATTENTION} clone to dtype {FLASH_ATTENTION}"),
    )


class MonaiLayer(VolumeLayer):
    """MONAI's ``BasicLayer``. A stage of Hyena operators has no mask, and is left to the library."""

    LIBRARY = "MONAI"
    MODULES = MonaiBlock.MODULES
    CODE = (("forward", "x", f"{LAYER} size len use_hyena"),)
    BLOCK = MonaiBlock


SWAPS: tuple[type[Swapped], ...] = (MonaiBlock, MonaiLayer)
