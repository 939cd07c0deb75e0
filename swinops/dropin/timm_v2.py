"""timm's Swin V2, and the V2-CR that it had before: the cosine attention of a block becomes one op."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swinops.dropin.block import CosineBlock, NetworkBlock, plain
from swinops.dropin.swap import Swapped
from swinops.dropin.timm import ATTENTION, BLOCK, TimmBlock

COSINE = f"{ATTENTION} F clamp exp log logit_scale math normalize"


class SwinV2Block(TimmBlock, NetworkBlock):
    """timm's ``SwinTransformerV2Block``.

    timm adds the projection's bias itself, to ``qkv.weight`` times x unless ``qkv_bias_separate``; so does this class,
    and what is added to ``qkv`` has the effect that it has in timm.
    """

    MODULES = ("timm.models.swin_transformer_v2",)
    NAME = "SwinTransformerV2Block"
    ATTRIBUTES = (
        "_attn", "get_attn_mask", "window_size", "shift_size", "target_shift_size", "input_resolution", "attn_mask",
        "attn.qkv", "attn.q_bias", "attn.k_bias", "attn.v_bias", "attn.qkv_bias_separate", "attn.proj",
        "attn.proj_drop", "attn.attn_drop", "attn.softmax", "attn.num_heads", "attn.logit_scale", "attn.cpb_mlp",
        "attn.pretrained_window_size", "attn.relative_coords_table", "attn.relative_position_index",
    )  # fmt: skip
    COPIED = (
        ("_attn", "x", BLOCK),
        (
            "attn.forward",
            "x mask",
            f"{COSINE} cat cpb_mlp k_bias linear q_bias qkv_bias_separate relative_coords_table "
            "relative_position_index sigmoid v_bias weight window_size",
        ),
    )

    __constants__ = (*TimmBlock.__constants__, *NetworkBlock.__constants__)
    __jit_unused_properties__ = (*TimmBlock.__jit_unused_properties__, *NetworkBlock.__jit_unused_properties__)

    @classmethod
    def knows_zero(cls, attn: Any) -> bool:
        return plain(attn.qkv) and attn.qkv.bias is None

    def qkv_bias(self) -> Tensor | None:
        if self.attn.q_bias is None:
            return None
        return torch.cat([self.attn.q_bias, self.attn.k_bias, self.attn.v_bias])

    def project(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            qkv: Tensor = self.attn.qkv(x)
        elif self.attn.qkv_bias_separate:
            qkv = self.attn.qkv(x)
            qkv = (qkv + bias).to(qkv.dtype)  # as timm's sum in place has it under autocast
        else:
            qkv = nn.functional.linear(x, self.attn.qkv.weight, bias)
        return qkv


class SwinV2CrBlock(TimmBlock, CosineBlock):
    """timm's ``SwinTransformerV2CrBlock``.

    Its position bias comes from ``attn``'s own method, once: the network has a dropout, and another formula than V2's.
    """

    MODULES = ("timm.models.swin_transformer_v2_cr",)
    NAME = "SwinTransformerV2CrBlock"
    ATTRIBUTES = (
        "_shifted_window_attn", "get_attn_mask", "window_size", "shift_size", "target_shift_size", "feat_size",
        "attn_mask", "attn.qkv", "attn.proj", "attn.proj_drop", "attn.attn_drop", "attn.num_heads", "attn.logit_scale",
        "attn.meta_mlp", "attn._relative_positional_encodings",
    )  # fmt: skip
    OVERRIDES = ("_shifted_window_attn",)
    COPIED = (
        ("_shifted_window_attn", "x", BLOCK),
        ("attn.forward", "x mask", f"{COSINE} _relative_positional_encodings"),
    )
    FORMULA = (("attn", "WindowMultiHeadAttention"),)
    BYPASSED = ("attn.attn_drop",)
    SIZE = "feat_size"

    library_shifted_window_attn: Callable[[Tensor], Tensor]

    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        return self._attn(x)

    def library_attn(self, x: Tensor) -> Tensor:
        return self.library_shifted_window_attn(x)

    def position_bias(self, window: list[int]) -> Tensor:
        bias: Tensor = self.attn._relative_positional_encodings().squeeze(0).contiguous()
        return bias


SWAPS: tuple[type[Swapped], ...] = (SwinV2Block, SwinV2CrBlock)
