"""timm's Swin V2, and the V2-CR that it had before: the cosine attention of a block becomes one op."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swinops.dropin.swap import Call, Swapped, hooked
from swinops.dropin.timm import Block, head_dim, parameter, plain
from swinops.nn.layer_norm import projection_dtype
from swinops.reference.continuous_position_bias import coordinates
from swinops.reference.relative_position_bias import relative_position_index


class CosineBlock(Block):
    """A block whose attention is a cosine's."""

    @classmethod
    def calls(cls, block: Any) -> list[Call]:
        scale = parameter(block.attn, "logit_scale")
        return [("cosine_attention", scale.device, projection_dtype(scale), head_dim(block))]

    def attend(self, qkv: Tensor, pad_kv: Tensor | None, window: list[int], shift: list[int]) -> Tensor:
        bias = self.position_bias(window)
        out: Tensor = torch.ops.swinops.cosine_attention_qkvpacked(
            qkv, self.attn.logit_scale, bias, pad_kv, window, shift, "roll_pad", -100.0, self.swinops_backend
        )[0]
        return out

    def position_bias(self, window: list[int]) -> Tensor:
        """[heads, N, N]"""
        raise NotImplementedError


class SwinV2Block(CosineBlock):
    """timm's ``SwinTransformerV2Block``.

    timm adds the projection's bias itself, to ``qkv.weight`` times x unless ``qkv_bias_separate``; so does this class,
    and what is added to ``qkv`` has the effect that it has in timm. The network of the position bias runs as one op
    where it is timm's own, and is called as a module where it is not. In half precision the op's coordinates are
    float32, where timm has rounded them.
    """

    MODULE = "timm.models.swin_transformer_v2"
    NAME = "SwinTransformerV2Block"
    ATTRIBUTES = (
        "_attn", "get_attn_mask", "window_size", "shift_size", "target_shift_size", "input_resolution", "attn_mask",
        "attn.qkv", "attn.q_bias", "attn.k_bias", "attn.v_bias", "attn.qkv_bias_separate", "attn.proj",
        "attn.proj_drop", "attn.attn_drop", "attn.softmax", "attn.num_heads", "attn.logit_scale", "attn.cpb_mlp",
        "attn.pretrained_window_size", "attn.relative_coords_table", "attn.relative_position_index",
    )  # fmt: skip
    ATTENTION = "WindowAttention"

    __constants__ = ("own_in_script", "plain_network")
    __jit_unused_properties__ = ("own_in_script", "plain_network")

    @classmethod
    def why_left(cls, block: Any) -> str | None:
        reason, attn = super().why_left(block), block.attn
        if reason is not None or attn.relative_coords_table.is_meta:
            return reason
        window, device = list(attn.window_size), attn.relative_position_index.device
        if not torch.equal(attn.relative_position_index, relative_position_index(window, device)):
            return "its relative_position_index is not timm's"
        table = attn.relative_coords_table.flatten(0, -2)
        pretrained = pretrained_window(attn.pretrained_window_size, window)
        expected = coordinates(window, pretrained, True, table.new_empty(0, dtype=torch.float32))
        # another device may have rounded them otherwise; and a network that is called is given the table itself
        rounding = 2 * torch.finfo(table.dtype).eps
        if has_plain_network(attn) and not torch.allclose(table.float(), expected, rtol=rounding, atol=0):
            return "its relative_coords_table is not timm's"
        return None

    @classmethod
    def calls(cls, block: Any) -> list[Call]:
        if not has_plain_network(block.attn):
            scale = parameter(block.attn, "logit_scale")
            bias = ("relative_position_bias", scale.device, projection_dtype(scale), block.attn.num_heads)
        else:
            w1 = parameter(block.attn.cpb_mlp[0], "weight")
            bias = ("continuous_position_bias", w1.device, w1.dtype, 2)
        return [*super().calls(block), bias]

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

    @property
    def plain_network(self) -> bool:
        """A constant of the scripted module, where another network's parameters may have other names."""
        return has_plain_network(self.attn)

    def position_bias(self, window: list[int]) -> Tensor:
        network = self.attn.cpb_mlp
        if self.plain_network:
            pretrained = pretrained_window(self.attn.pretrained_window_size, window)
            bias: Tensor = torch.ops.swinops.continuous_position_bias(
                network[0].weight, network[0].bias, network[2].weight, window, pretrained, True, self.swinops_backend
            )[0]
        else:
            table = 16 * torch.sigmoid(network(self.attn.relative_coords_table))
            bias = torch.ops.swinops.relative_position_bias(table.flatten(0, -2), window, self.swinops_backend)
        return bias


def pretrained_window(pretrained: tuple[int, int], window: list[int]) -> list[int]:
    """The window that timm's coordinates are relative to."""
    return [pretrained[0], max(pretrained[1], 1)] if pretrained[0] > 0 else window


def has_plain_network(attn: Any) -> bool:
    """The position bias is the op's: two plain layers of one dtype.

    Not in float64: timm rounds the coordinates to float32 even there.
    """
    network = attn.cpb_mlp
    if type(network) is not nn.Sequential or len(network) != 3 or hooked(network) or "forward" in network.__dict__:
        return False
    first, relu, last = network
    if not plain(first) or not plain(last) or first.bias is None or last.bias is not None:
        return False
    if type(relu) is not nn.ReLU or hooked(relu):
        return False
    dtypes = {parameter(first, "weight").dtype, parameter(first, "bias").dtype, parameter(last, "weight").dtype}
    return len(dtypes) == 1 and torch.float64 not in dtypes


class SwinV2CrBlock(CosineBlock):
    """timm's ``SwinTransformerV2CrBlock``.

    Its position bias comes from ``attn``'s own method, once: the network has a dropout, and another formula than V2's.
    """

    MODULE = "timm.models.swin_transformer_v2_cr"
    NAME = "SwinTransformerV2CrBlock"
    ATTRIBUTES = (
        "_shifted_window_attn", "get_attn_mask", "window_size", "shift_size", "target_shift_size", "feat_size",
        "attn_mask", "attn.qkv", "attn.proj", "attn.proj_drop", "attn.attn_drop", "attn.num_heads", "attn.logit_scale",
        "attn.meta_mlp", "attn._relative_positional_encodings",
    )  # fmt: skip
    OVERRIDES = ("_shifted_window_attn",)
    ATTENTION = "WindowMultiHeadAttention"
    BYPASSED = ("attn_drop",)
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
