"""timm's Swins: the attention of a block becomes one op, and one compiled graph serves every image size.

Here what its three files have in common, and Swin V1; V2 and V2-CR are in ``timm_v2``.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swinops.dropin.swap import Call, Swapped, hooked, no_kernel, warn_once
from swinops.nn.layer_norm import projection_dtype
from swinops.reference.window_attention import shift_mask


class Block(Swapped):
    """A block of timm's whose shift, pads, windows, mask, bias and attention are one op.

    ``attn.qkv`` and ``attn.proj`` are called as modules, so they may be quantised or carry LoRA; they see the image
    [B, H, W, C] in place of its windows. ``attn`` itself, its softmax and its dropout are not called: where they have
    something to do (hooks, dropout in training, another class), timm's own code runs.
    """

    LIBRARY = "timm"
    OVERRIDES = ("_attn",)
    KEPT = ("get_attn_mask",)
    COMPANION = False
    ATTENTION: ClassVar[str]  # the class of attn
    BYPASSED: ClassVar[tuple[str, ...]] = ("softmax", "attn_drop")  # modules of attn that are not called, nor attn is
    SIZE: ClassVar[str] = "input_resolution"  # the attribute with the image size of attn_mask

    __constants__: ClassVar[tuple[str, ...]] = ("own_in_script",)
    __jit_unused_properties__: ClassVar[tuple[str, ...]] = ("own_in_script",)

    attn: Any
    dim: int
    window_size: tuple[int, int]
    shift_size: tuple[int, int]
    library_attn: Callable[[Tensor], Tensor]

    @classmethod
    def why_left(cls, block: Any) -> str | None:
        reason = cls.why_not_plain(block.attn)
        if reason is not None or getattr(block, "dynamic_mask", False):
            return reason
        if block.attn_mask is None:
            return "it shifts without a mask" if any(block.shift_size) else None
        if block.attn_mask.is_meta:
            return None
        size = getattr(block, cls.SIZE)
        mask = shift_mask(size, block.window_size, block.shift_size, -100.0, block.attn_mask.device)
        return None if torch.equal(block.attn_mask, mask.to(block.attn_mask.dtype)) else "its attn_mask is not timm's"

    @classmethod
    def why_own(cls, block: Any, backend: str) -> str | None:
        attn = block.attn
        reason: str | None = cls.why_not_plain(attn)
        if reason is not None:
            return reason
        if hooked(attn):
            return "attn has hooks, and the op does not call it"
        for name in cls.BYPASSED:
            if hooked(getattr(attn, name)):
                return f"attn.{name} has hooks, and the op does not call it"
        # timm's fused attention goes by attn.training, its plain one by that of attn_drop
        drop = attn.attn_drop
        if getattr(drop, "p", 0.0) > 0 and (attn.training or drop.training):
            return "attention dropout in training, which the op does not have"
        if backend != "auto":
            return None
        for call in cls.calls(block):
            reason = no_kernel(*call)
            if reason is not None:
                return reason
        return None

    @classmethod
    def why_not_plain(cls, attn: Any) -> str | None:
        """Why timm's formula cannot be assumed of ``attn``; None where it can."""
        found = type(attn)
        if found.__name__ != cls.ATTENTION or found.__module__.rpartition(".")[2] != cls.MODULE.rpartition(".")[2]:
            return f"attn is a {found.__name__}, not timm's {cls.ATTENTION}"
        if "forward" in attn.__dict__ or found.forward.__module__ != found.__module__:
            return "the forward of attn was replaced"
        if "softmax" in cls.BYPASSED and (type(attn.softmax) is not nn.Softmax or attn.softmax.dim != -1):
            return f"attn.softmax is a {type(attn.softmax).__name__}, not a Softmax over the last axis"
        if type(attn.attn_drop) not in (nn.Dropout, nn.Identity):
            return f"attn.attn_drop is a {type(attn.attn_drop).__name__}, not a Dropout"
        return None

    @classmethod
    def knows_zero(cls, attn: Any) -> bool:
        """A token of zeros projects to ``qkv_bias``. Another module's attributes (LoRA with a bias) do not tell."""
        return plain(attn.qkv)

    @property
    def own_in_script(self) -> bool:
        """A constant of the scripted module: what TorchScript cannot look at when it runs."""
        drops = getattr(self.attn.attn_drop, "p", 0) > 0
        return self.why_own(self, "reference") is not None or drops or not self.knows_zero(self.attn)

    def _attn(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            if self.own_in_script or (self.swinops_backend == "auto" and (not x.is_cuda or x.dtype == torch.float64)):
                return self.library_attn(x)
            else:
                bias = self.qkv_bias()
                return self.swinops_attn(x, bias, bias)
        reason = self.why_own(self, self.swinops_backend)
        if reason is not None:
            warn_once(self.LIBRARY, reason)
            return self.library_attn(x)
        bias = self.qkv_bias()
        return self.swinops_attn(x, bias, self.project_zero(x, bias))

    def swinops_attn(self, x: Tensor, bias: Tensor | None, zero: Tensor | None) -> Tensor:
        """The attention of the image ``x`` [B, H, W, C]; ``zero``: the projection of a pad token. [3 * C]"""
        heads = self.attn.num_heads
        window = [self.window_size[0], self.window_size[1]]
        shift = [self.shift_size[0], self.shift_size[1]]
        pad_kv = None if zero is None else zero.view(3, heads, -1)[1:]
        qkv = self.project(x, bias).unflatten(-1, [3, heads, -1])
        out: Tensor = self.attn.proj_drop(self.attn.proj(self.attend(qkv, pad_kv, window, shift).flatten(-2)))
        return out

    def project_zero(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """What a token of zeros projects to; None for zeros, and where it is known that ``x`` needs no pads."""
        zero: Tensor | None = None
        if self.knows_zero(self.attn):
            zero = bias
        elif isinstance(x, torch.fx.Proxy) or any(x.shape[1 + i] % w != 0 for i, w in enumerate(self.window_size)):
            zero = self.project(x.new_zeros(1, 1, 1, x.shape[-1]), bias).flatten()
        return zero

    def qkv_bias(self) -> Tensor | None:
        """What ``project`` adds. [3 * C]"""
        bias: Tensor | None = getattr(self.attn.qkv, "bias", None)
        return bias

    def project(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[B, H, W, C] -> [B, H, W, 3 * C]; a class whose ``qkv`` does not add ``bias`` adds it here."""
        qkv: Tensor = self.attn.qkv(x)
        return qkv

    def attend(self, qkv: Tensor, pad_kv: Tensor | None, window: list[int], shift: list[int]) -> Tensor:
        """[B, H, W, 3, heads, head_dim] -> [B, H, W, heads, head_dim]"""
        raise NotImplementedError


class SwinBlock(Block):
    """timm's ``SwinTransformerBlock``."""

    MODULE = "timm.models.swin_transformer"
    NAME = "SwinTransformerBlock"
    ATTRIBUTES = (
        "_attn", "get_attn_mask", "window_size", "shift_size", "target_shift_size", "input_resolution", "attn_mask",
        "attn.qkv", "attn.proj", "attn.proj_drop", "attn.attn_drop", "attn.softmax", "attn.scale", "attn.num_heads",
        "attn.relative_position_bias_table",
    )  # fmt: skip
    ATTENTION = "WindowAttention"

    @classmethod
    def calls(cls, block: Any) -> list[Call]:
        table = parameter(block.attn, "relative_position_bias_table")
        return [
            ("window_attention", table.device, projection_dtype(table), head_dim(block)),
            ("relative_position_bias", table.device, table.dtype, block.attn.num_heads),
        ]

    def attend(self, qkv: Tensor, pad_kv: Tensor | None, window: list[int], shift: list[int]) -> Tensor:
        bias = torch.ops.swinops.relative_position_bias(
            self.attn.relative_position_bias_table, window, self.swinops_backend
        )
        out: Tensor = torch.ops.swinops.window_attention_qkvpacked(
            qkv, bias, pad_kv, window, shift, self.attn.scale, "roll_pad", -100.0, self.swinops_backend
        )[0]
        return out


def parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter itself, where the attribute would be a proxy under fx."""
    x = module._parameters.get(name)
    if x is None:  # a replica of DataParallel or FSDP: a tensor in its place
        x = vars(module)[name]
    return x


def head_dim(block: Any) -> int:
    channels: int = getattr(block.attn.proj, "in_features", block.dim)
    return channels // int(block.attn.num_heads)


def plain(module: nn.Module) -> bool:
    """``module`` projects zeros to its bias."""
    return type(module) is nn.Linear and "forward" not in module.__dict__ and not hooked(module)


class PatchEmbed(Swapped):
    """timm's ``PatchEmbed`` whose checks do not format the sizes, which costs torch.compile a graph per image size.

    It is replaced in models that have a replaced block, and differs only where it is compiled for sizes that vary.
    """

    LIBRARY = "timm"
    MODULE = "timm.layers.patch_embed"
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
