"""SwinIR and Swin2SR: Microsoft's blocks for an image of any size that the window divides.

Where the size is not the one that a block was built for, the published ones make their mask anew, on the CPU, in every
block; the op needs none.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from swinops.dropin.microsoft import ATTENTION, COSINE_ATTENTION, RESHAPING, MicrosoftBlock, SwinBlock, SwinV2Block
from swinops.dropin.swap import Swapped

BLOCK = (
    f"{RESHAPING} norm1 shift_size torch roll window_partition window_size input_resolution attn attn_mask "
    "calculate_mask to device window_reverse drop_path mlp norm2"
)
MASK = f"{RESHAPING} torch zeros slice window_size shift_size window_partition masked_fill float"


class AnySizeBlock(MicrosoftBlock):
    """A block that is told the size of its image."""

    ATTRIBUTES = (*MicrosoftBlock.ATTRIBUTES, "calculate_mask")
    KEPT = ("calculate_mask",)
    CODE: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("forward", "x x_size", BLOCK),
        ("calculate_mask", "x_size", MASK),
    )

    @classmethod
    def examples(cls, library: Any) -> list[Any]:
        return [
            library(8, size, 4, window_size=4, shift_size=shift)
            for size, shift in ((cls.IMAGE, 0), (cls.IMAGE, 2), ((8, 8), 2))
        ]

    @classmethod
    def arguments(cls, block: Any, x: Tensor) -> tuple[Any, ...]:
        return x, cls.IMAGE

    def forward(self, x: Tensor, x_size: Sequence[int]) -> Any:  # type: ignore[override]
        if self.refuses(x, x_size) or self.own_reason() is not None:
            return self.library_forward(x, x_size)
        return self.compute(x, x_size)


class SwinIRBlock(AnySizeBlock, SwinBlock):
    """``SwinTransformerBlock`` of ``network_swinir.py``, which BasicSR has as ``swinir_arch.py``."""

    LIBRARY = "SwinIR"
    MODULES = ("models.network_swinir", "basicsr.archs.swinir_arch", "spandrel.architectures.SwinIR.__arch.SwinIR")
    ATTRIBUTES = (*AnySizeBlock.ATTRIBUTES, *SwinBlock.ATTRIBUTES)
    CODE = (*AnySizeBlock.CODE, ("attn.forward", "x mask", ATTENTION))


class Swin2SRBlock(AnySizeBlock, SwinV2Block):
    """``SwinTransformerBlock`` of ``network_swin2sr.py``."""

    LIBRARY = "Swin2SR"
    MODULES = ("models.network_swin2sr", "spandrel.architectures.Swin2SR.__arch.Swin2SR")
    ATTRIBUTES = (*AnySizeBlock.ATTRIBUTES, *SwinV2Block.ATTRIBUTES)
    CODE = (*AnySizeBlock.CODE, ("attn.forward", "x mask", COSINE_ATTENTION))


SWAPS: tuple[type[Swapped], ...] = (SwinIRBlock, Swin2SRBlock)
