"""Microsoft's Swins, whose files are vendored everywhere: the attention of a block becomes one op.

Vendored files are changed, too. So a class is replaced only if its code uses no name that the published one does not
(``CODE``), and if a small block of it computes what this module does.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swinops.dropin.block import NetworkBlock, TableBlock, standard_mask
from swinops.dropin.swap import Call, Swapped
from swinops.dropin.vendored import VendoredBlock
from swinops.nn.layer_norm import projection_dtype

RESHAPING = "shape size view reshape flatten unflatten permute transpose contiguous unsqueeze squeeze unbind"
BLOCK = (
    f"{RESHAPING} input_resolution norm1 shift_size fused_window_process torch roll window_partition window_size "
    "WindowProcess apply attn attn_mask window_reverse WindowProcessReverse drop_path norm2 mlp AssertionError"
)
ATTENTION = (
    f"{RESHAPING} qkv num_heads scale relative_position_bias_table relative_position_index window_size softmax "
    "attn_drop proj proj_drop"
)
COSINE_ATTENTION = (
    f"{ATTENTION} q_bias v_bias torch cat zeros_like requires_grad weight F linear normalize clamp logit_scale max log "
    "tensor to device cuda exp cpb_mlp relative_coords_table sigmoid math np"
)


class ResidualBlock(VendoredBlock):
    """A block with its norms, residuals and MLP, on tokens [B, H * W, C]."""

    ATTRIBUTES: ClassVar[tuple[str, ...]] = (
        "window_size", "shift_size", "norm1", "norm2", "drop_path", "mlp", "attn.qkv", "attn.proj", "attn.proj_drop",
        "attn.attn_drop", "attn.softmax", "attn.num_heads", "attn.window_size", "attn.relative_position_index",
    )  # fmt: skip

    window_size: int
    shift_size: int
    norm1: nn.Module
    norm2: nn.Module
    drop_path: nn.Module
    mlp: nn.Module
    library_forward: Callable[..., Any]

    def compute(self, x: Tensor, size: Sequence[int]) -> Any:
        """Norms come first."""
        x = x + self.drop_path(self.image_attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def image_attn(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """[B, H * W, C] -> [B, H * W, C]"""
        return self.swinops_attn(x.unflatten(1, size), [self.window_size] * 2, [self.shift_size] * 2).flatten(1, 2)


class MicrosoftBlock(ResidualBlock):
    """A block that knows the size of its image, which its windows divide, and keeps the mask for it.

    The mask is compared with the op's when the block is replaced; of one that comes later, only its shape is looked at.
    """

    LIBRARY = "Microsoft"
    ATTRIBUTES: ClassVar[tuple[str, ...]] = (*ResidualBlock.ATTRIBUTES, "input_resolution", "attn_mask")

    input_resolution: tuple[int, int]

    @classmethod
    def why_left(cls, block: Any) -> str | None:
        reason, mask = super().why_left(block), block.attn_mask
        if reason is not None or mask is None:
            return reason
        window, shift = [block.window_size] * 2, [block.shift_size] * 2
        standard = standard_mask(mask, block.input_resolution, window, shift)
        return None if standard else f"its attn_mask is not {cls.LIBRARY}'s"

    @classmethod
    def why_not_plain(cls, block: Any) -> str | None:
        mask, (H, W) = block.attn_mask, block.input_resolution
        if mask is None and block.shift_size > 0:
            return "it shifts without a mask"
        if mask is not None and mask.shape[0] * mask.shape[1] != H * W:
            return f"its attn_mask is for another image than its input_resolution {H, W}"
        return super().why_not_plain(block)

    @classmethod
    def examples(cls, library: Any) -> list[Any]:
        return [library(8, cls.IMAGE, 4, window_size=4, shift_size=shift) for shift in (0, 2)]

    @classmethod
    def arguments(cls, block: Any, x: Tensor) -> tuple[Any, ...]:
        return (x,)

    def forward(self, x: Tensor) -> Any:
        if self.refuses(x, self.input_resolution) or self.own_reason() is not None:
            return self.library_forward(x)
        return self.compute(x, self.input_resolution)

    def refuses(self, x: Tensor, size: Sequence[int]) -> bool:
        """What the library refuses, it refuses in its own words."""
        H, W = size
        return x.dim() != 3 or x.shape[1] != H * W or H % self.window_size != 0 or W % self.window_size != 0

    def project_with_zero(self, x: Tensor, bias: Tensor | None, window: list[int]) -> tuple[Tensor, Tensor | None]:
        """Nothing is padded."""
        return self.project(x, bias), None


class SwinBlock(MicrosoftBlock, TableBlock):
    """``SwinTransformerBlock`` of ``swin_transformer.py``; SimMIM has the same."""

    MODULES: ClassVar[tuple[str, ...]] = ("models.swin_transformer",)
    NAME = "SwinTransformerBlock"
    ATTRIBUTES = (*MicrosoftBlock.ATTRIBUTES, "attn.scale", "attn.relative_position_bias_table")
    CODE: ClassVar[tuple[tuple[str, str, str], ...]] = (("forward", "x", BLOCK), ("attn.forward", "x mask", ATTENTION))


class NoKeyBias(NetworkBlock):
    """V2 whose ``qkv`` has a weight that is read, and biases for the query and the value outside of it."""

    def qkv_bias(self) -> Tensor | None:
        if self.attn.q_bias is None:
            return None
        return torch.cat([self.attn.q_bias, torch.zeros_like(self.attn.v_bias), self.attn.v_bias])

    def project(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self.attn.qkv.weight, bias)


class SwinV2Block(MicrosoftBlock, NoKeyBias):
    """``SwinTransformerBlock`` of ``swin_transformer_v2.py``: norms come last."""

    MODULES: ClassVar[tuple[str, ...]] = ("models.swin_transformer_v2",)
    NAME = "SwinTransformerBlock"
    ATTRIBUTES = (
        *MicrosoftBlock.ATTRIBUTES, "attn.q_bias", "attn.v_bias", "attn.logit_scale", "attn.cpb_mlp",
        "attn.pretrained_window_size", "attn.relative_coords_table",
    )  # fmt: skip
    CODE: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("forward", "x", BLOCK),
        ("attn.forward", "x mask", COSINE_ATTENTION),
    )

    @classmethod
    def is_plain(cls, network: Any) -> bool:
        """Never: the coordinates are saved with a model, and a checkpoint may bring those of another pretraining."""
        return False

    def compute(self, x: Tensor, size: Sequence[int]) -> Any:
        x = x + self.drop_path(self.norm1(self.image_attn(x, size)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class SwinMoeBlock(MicrosoftBlock, TableBlock):
    """``SwinTransformerBlock`` of ``swin_transformer_moe.py``: V1 whose table of the bias comes from a network."""

    MODULES = ("models.swin_transformer_moe",)
    NAME = "SwinTransformerBlock"
    ATTRIBUTES = (*MicrosoftBlock.ATTRIBUTES, "is_moe", "attn.scale", "attn.cpb_mlp", "attn.relative_coords_table")
    CODE = (
        ("forward", "x", f"{BLOCK} is_moe"),
        ("attn.forward", "x mask", f"{ATTENTION} cpb_mlp relative_coords_table"),
    )

    is_moe: bool

    @classmethod
    def calls(cls, block: Any) -> list[Call]:
        table = block.attn.relative_coords_table
        dtype = projection_dtype(table)
        return [
            ("window_attention", table.device, dtype, cls.head_dim(block)),
            ("relative_position_bias", table.device, dtype, cls.heads(block)),
        ]

    @classmethod
    def examples(cls, library: Any) -> list[Any]:
        experts = super().examples(library)
        for block in experts:
            block.is_moe, block.mlp = True, WithLoss(block.mlp)
        return [*super().examples(library), *experts]

    def compute(self, x: Tensor, size: Sequence[int]) -> Any:
        x = x + self.drop_path(self.image_attn(self.norm1(x), size))
        out = self.mlp(self.norm2(x))
        if not self.is_moe:
            return x + self.drop_path(out)
        y, loss = out
        return x + self.drop_path(y), loss

    def position_bias(self, window: list[int]) -> Tensor:
        table = self.attn.cpb_mlp(self.attn.relative_coords_table).flatten(0, -2)
        bias: Tensor = torch.ops.swinops.relative_position_bias(table, window, self.swinops_backend)
        return bias


class WithLoss(nn.Sequential):
    """What a mixture of experts returns."""

    def forward(self, x: Tensor) -> Any:
        x = self[0](x)
        return x, x.square().mean()


SWAPS: tuple[type[Swapped], ...] = (SwinBlock, SwinV2Block, SwinMoeBlock)
