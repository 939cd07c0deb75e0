"""timm's Swins: the attention of a block becomes one op, and one compiled graph serves every image size.

Here what its three files have in common, and Swin V1; V2 and V2-CR are in ``timm_v2``.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from swinops.dropin.block import TableBlock, standard_mask
from swinops.dropin.swap import Swapped
from swinops.dropin.vendored import VendoredBlock

BLOCK = (
    "any attn attn_mask contiguous dynamic_mask functional get_attn_mask getattr nn pad roll shape shift_size torch "
    "view window_area window_partition window_reverse window_size"
)
ATTENTION = (
    "attn_drop contiguous expand functional fused_attn nn num_heads p permute proj proj_drop qkv reshape scale shape "
    "scaled_dot_product_attention softmax torch training transpose unbind unsqueeze view"
)


class TimmBlock(VendoredBlock):
    """A block of timm's; it rolls the image before it pads it."""

    LIBRARY = "timm"
    OVERRIDES = ("_attn",)
    KEPT = ("get_attn_mask",)
    PAD_ORDER = "roll_pad"
    SIZE: ClassVar[str] = "input_resolution"  # the attribute with the image size of attn_mask

    __constants__: ClassVar[tuple[str, ...]] = ("PAD_ORDER", "MASK_VALUE", "own_in_script")
    __jit_unused_properties__: ClassVar[tuple[str, ...]] = ("own_in_script",)

    window_size: tuple[int, int]
    shift_size: tuple[int, int]
    library_attn: Callable[[Tensor], Tensor]

    @classmethod
    def why_left(cls, block: Any) -> str | None:
        reason = super().why_left(block)
        if reason is not None or getattr(block, "dynamic_mask", False) or block.attn_mask is None:
            return reason
        standard = standard_mask(block.attn_mask, getattr(block, cls.SIZE), block.window_size, block.shift_size)
        return None if standard else "its attn_mask is not timm's"

    @classmethod
    def why_not_plain(cls, block: Any) -> str | None:
        if block.attn_mask is None and any(block.shift_size) and not getattr(block, "dynamic_mask", False):
            return "it shifts without a mask"
        return super().why_not_plain(block)

    @classmethod
    def examples(cls, library: Any) -> list[Any]:
        """One window covers the height of the last."""
        return [
            library(8, num_heads=4, window_size=(window, window), shift_size=(shift, shift), **{cls.SIZE: cls.IMAGE})
            for window, shift in ((5, 0), (5, 2), (8, 2))
        ]

    @classmethod
    def arguments(cls, block: Any, x: Tensor) -> tuple[Any, ...]:
        return (x.unflatten(1, cls.IMAGE),)

    def compute(self, x: Tensor, size: Sequence[int]) -> Any:
        return self.swinops_attn(x.unflatten(1, size), list(self.window_size), list(self.shift_size))

    @property
    def own_in_script(self) -> bool:
        """A constant of the scripted module: what TorchScript cannot look at when it runs."""
        drops = getattr(self.attn.attn_drop, "p", 0) > 0
        return self.why_own(self, "reference") is not None or drops or not self.knows_zero(self.attn)

    def _attn(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            if self.own_in_script or (self.swinops_backend == "auto" and (not x.is_cuda or x.dtype == torch.float64)):
                return self.library_attn(x)
        elif self.own_reason() is not None:
            return self.library_attn(x)
        window = [self.window_size[0], self.window_size[1]]
        shift = [self.shift_size[0], self.shift_size[1]]
        return self.swinops_attn(x, window, shift)


class SwinBlock(TimmBlock, TableBlock):
    """timm's ``SwinTransformerBlock``."""

    MODULES = ("timm.models.swin_transformer",)
    NAME = "SwinTransformerBlock"
    ATTRIBUTES = (
        "_attn", "get_attn_mask", "window_size", "shift_size", "target_shift_size", "input_resolution", "attn_mask",
        "attn.qkv", "attn.proj", "attn.proj_drop", "attn.attn_drop", "attn.softmax", "attn.scale", "attn.num_heads",
        "attn.relative_position_bias_table",
    )  # fmt: skip
    COPIED = (
        ("_attn", "x", BLOCK),
        ("attn.forward", "x mask", f"{ATTENTION} _get_rel_pos_bias"),
        (
            "attn._get_rel_pos_bias",
            "",
            "contiguous permute relative_position_bias_table relative_position_index unsqueeze view window_area",
        ),
    )


class PatchEmbed(Swapped):
    """timm's ``PatchEmbed`` whose checks do not format the sizes, which costs torch.compile a graph per image size.

    It is replaced in models that have a replaced block, and differs only where it is compiled for sizes that vary.
    """

    LIBRARY = "timm"
    MODULES = ("timm.layers.patch_embed",)
    NAME = "PatchEmbed"
    ATTRIBUTES = (
        "img_size", "patch_size", "strict_img_size", "dynamic_img_pad", "flatten", "output_fmt", "proj", "norm"
    )  # fmt: skip
    OVERRIDES = ("forward",)
    KEPT = ()
    COMPANION = True

    img_size: tuple[int, int] | None
    patch_size: tuple[int, int]
    strict_img_size: bool
    dynamic_img_pad: bool
    flatten: bool
    output_fmt: str
    proj: Any
    norm: Any
    library_forward: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.library_forward(x)
        if not torch.compiler.is_compiling() or not self.sizes_vary():
            return self.library_forward(x)
        H, W = x.shape[-2:]
        if H % self.patch_size[0] != 0 or W % self.patch_size[1] != 0:
            raise AssertionError(f"Input size ({H}, {W}) should be divisible by patch size {self.patch_size}.")
        x = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return x

    def sizes_vary(self) -> bool:
        """The case that timm's Swin reaches with ``strict_img_size=False``."""
        checked = self.img_size is not None and not self.strict_img_size and not self.dynamic_img_pad
        return checked and not self.flatten and self.output_fmt == "NHWC"


SWAPS: tuple[type[Swapped], ...] = (SwinBlock, PatchEmbed)
