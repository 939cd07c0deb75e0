"""torchvision's Swins, image and video: their attention has the shift and the windows in it, and becomes one op.

It reads the weights of its projections, and does not call them; so does this.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from swinops import torchvision
from swinops.dropin.block import NetworkBlock, TableBlock
from swinops.dropin.swap import Swapped
from swinops.dropin.vendored import VendoredBlock

FORWARD = (
    "get_relative_position_bias shifted_window_attention qkv weight proj window_size num_heads shift_size "
    "attention_dropout dropout bias training"
)
BIAS = "_get_relative_position_bias relative_position_bias_table relative_position_index window_size"
GATHER = "view permute contiguous unsqueeze"
ARGUMENTS = (
    "qkv_weight proj_weight relative_position_bias window_size num_heads shift_size attention_dropout dropout qkv_bias "
    "proj_bias logit_scale training"
)
MASK = "new_zeros range view permute reshape unsqueeze masked_fill float"
ATTENTION = (
    f"{MASK} shape F pad copy sum torch roll clone numel zero_ linear size normalize transpose clamp math log exp "
    "matmul softmax dropout contiguous"
)


class Attention(VendoredBlock):
    """An attention of torchvision's."""

    LIBRARY = "torchvision"
    ATTRIBUTES: ClassVar[tuple[str, ...]] = (
        "get_relative_position_bias", "window_size", "shift_size", "num_heads", "attention_dropout", "dropout",
        "qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "relative_position_index",
    )  # fmt: skip
    KEPT = ("get_relative_position_bias",)
    FORMULA = ()
    BYPASSED = ()

    window_size: list[int]
    shift_size: list[int]
    num_heads: int
    attention_dropout: float
    dropout: float
    qkv: Any
    proj: Any
    library_forward: Callable[[Tensor], Tensor]

    @classmethod
    def why_left(cls, module: Any) -> str | None:
        window, shift = list(module.window_size), list(module.shift_size)
        if any(not 0 <= s < w for s, w in zip(shift, window, strict=False)):
            return f"its shift_size {shift} is not less than its window_size {window}"
        return super().why_left(module)

    @classmethod
    def examples(cls, library: Any) -> list[Any]:
        """One window covers the first axis of the last."""
        axes = len(cls.IMAGE)
        return [library(8, [window] * axes, [shift] * axes, 4) for window, shift in ((5, 0), (5, 2), (8, 2))]

    @classmethod
    def arguments(cls, module: Any, x: Tensor) -> tuple[Any, ...]:
        return (x.unflatten(1, cls.IMAGE),)

    def compute(self, x: Tensor, size: Sequence[int]) -> Any:
        return self.image_attn(x.unflatten(1, size))

    @classmethod
    def attn_of(cls, module: Any) -> Any:
        return module

    @classmethod
    def drops(cls, module: Any) -> bool:
        drops: bool = module.training and module.attention_dropout > 0
        return drops

    @classmethod
    def head_dim(cls, module: Any) -> int:
        # of a Linear, for fx has a proxy of its weight
        channels = getattr(module.proj, "in_features", None) or module.proj.weight.shape[1]
        return int(channels) // cls.heads(module)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            own = self.training and self.attention_dropout > 0.0
            if own or (self.swinops_backend == "auto" and (not x.is_cuda or x.dtype == torch.float64)):
                return self.library_forward(x)
        elif self.own_reason() is not None:
            return self.library_forward(x)
        return self.image_attn(x)

    def image_attn(self, x: Tensor) -> Tensor:
        """[B, *space, C] -> [B, *space, C]"""
        return torchvision.shifted_window_attention(
            x, self.qkv.weight, self.proj.weight, self.position_bias(self.window_size), self.window_size,
            self.num_heads, self.shift_size, self.attention_dropout, self.dropout, self.qkv.bias, self.proj.bias,
            self.cosine_scale(), self.training, self.swinops_backend,
        )  # fmt: skip

    def cosine_scale(self) -> Tensor | None:
        """Where scores are cosines, the logarithm of their scale."""
        return None


class TableAttention(Attention, TableBlock):
    """Swin V1's, whose bias is looked up in a table."""

    relative_position_bias_table: Tensor

    def position_bias(self, window: list[int]) -> Tensor:
        bias: Tensor = torch.ops.swinops.relative_position_bias(
            self.relative_position_bias_table, window, self.swinops_backend
        )
        return bias


class SwinAttention(TableAttention):
    """``ShiftedWindowAttention``."""

    MODULES = ("torchvision.models.swin_transformer",)
    NAME = "ShiftedWindowAttention"
    ATTRIBUTES = (*Attention.ATTRIBUTES, "relative_position_bias_table")
    CODE = (
        ("forward", "x", FORWARD),
        ("get_relative_position_bias", "", BIAS),
        ("_get_relative_position_bias", "relative_position_index window_size", GATHER),
        ("shifted_window_attention", ARGUMENTS, ATTENTION),
    )


class SwinV2Attention(Attention, NetworkBlock):
    """``ShiftedWindowAttentionV2``, which is a subclass of ``ShiftedWindowAttention``."""

    MODULES = ("torchvision.models.swin_transformer",)
    NAME = "ShiftedWindowAttentionV2"
    ATTRIBUTES = (*Attention.ATTRIBUTES, "logit_scale", "cpb_mlp", "relative_coords_table")
    CODE = (
        ("forward", "x", f"{FORWARD} logit_scale"),
        ("get_relative_position_bias", "", f"{BIAS} cpb_mlp relative_coords_table view num_heads torch sigmoid"),
        ("_get_relative_position_bias", "relative_position_index window_size", GATHER),
        ("shifted_window_attention", ARGUMENTS, ATTENTION),
    )

    logit_scale: Tensor
    cpb_mlp: Any
    relative_coords_table: Tensor

    def cosine_scale(self) -> Tensor | None:
        return self.logit_scale

    def position_bias(self, window: list[int]) -> Tensor:
        if self.plain_network:
            bias: Tensor = torch.ops.swinops.continuous_position_bias(
                self.cpb_mlp[0].weight, self.cpb_mlp[0].bias, self.cpb_mlp[2].weight, window, window, True,
                self.swinops_backend,
            )[0]  # fmt: skip
        else:
            table = 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table))
            bias = torch.ops.swinops.relative_position_bias(table.flatten(0, -2), window, self.swinops_backend)
        return bias


class Swin3dAttention(TableAttention):
    """``ShiftedWindowAttention3d``: its window is no longer than the video on each axis."""

    MODULES = ("torchvision.models.video.swin_transformer",)
    NAME = "ShiftedWindowAttention3d"
    IMAGE = (6, 8, 9)
    ATTRIBUTES = SwinAttention.ATTRIBUTES
    CODE = (
        ("forward", "x", f"{FORWARD} shape copy _get_window_and_shift_size shifted_window_attention_3d"),
        ("get_relative_position_bias", "window_size", BIAS),
        ("_get_window_and_shift_size", "size_dhw window_size", "range"),
        ("_get_relative_position_bias", "relative_position_index window_size", f"{GATHER} flatten"),
        ("_compute_pad_size_3d", "patch_size", "range"),
        ("_compute_attention_mask_3d", "size_dhw window_size shift_size", MASK),
        (
            "shifted_window_attention_3d", ARGUMENTS.replace("logit_scale ", ""),
            f"{ATTENTION} _compute_pad_size_3d _compute_attention_mask_3d",
        ),
    )  # fmt: skip

    def image_attn(self, x: Tensor) -> Tensor:
        window, shift = within(x, self.window_size, self.shift_size)
        tokens = window[0] * window[1] * window[2]
        # the library takes the first rows of the index: where H or W is short these are of other offsets
        bias = self.position_bias(self.window_size)[:, :tokens, :tokens]
        return torchvision.shifted_window_attention_3d(
            x, self.qkv.weight, self.proj.weight, bias, window, self.num_heads, shift, self.attention_dropout,
            self.dropout, self.qkv.bias, self.proj.bias, self.training, self.swinops_backend,
        )  # fmt: skip


def within(x: Tensor, window: list[int], shift: list[int]) -> tuple[list[int], list[int]]:
    """Window and shift of a video [B, T, H, W, C]: on an axis that one window covers, the axis and 0."""
    size = x.shape[1:4]
    shift = [shift[i] if size[i] > window[i] else 0 for i in range(3)]
    # not min(), which torch.compile leaves open for sizes that vary
    return [window[i] if size[i] > window[i] else size[i] for i in range(3)], shift


torch.fx.wrap("within")

SWAPS: tuple[type[Swapped], ...] = (SwinAttention, SwinV2Attention, Swin3dAttention)
