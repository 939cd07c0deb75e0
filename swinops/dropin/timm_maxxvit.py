"""timm's CoAtNet and MaxViT: attention over a whole map, and over the windows of a block partition, becomes one op."""

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swinops.dropin.block import Block, parameter, suffix
from swinops.dropin.swap import Call, Swapped, hooked, warn_once, why_unknown
from swinops.nn.layer_norm import projection_dtype

ATTENTION = (
    "shape head_first qkv view reshape num_heads dim_head chunk unbind transpose contiguous fused_attn rel_pos "
    "get_bias torch nn functional scaled_dot_product_attention attn_drop p training scale softmax proj proj_drop"
)
PARTITION = "shape partition_block partition_size attn window_partition window_reverse grid_partition grid_reverse"
BIASES = ("RelPosBias", "RelPosMlp", "RelPosBiasTf")
LOOK_UP = "relative_position_bias_table relative_position_index view bias_shape permute unsqueeze contiguous"


class MaxxVitAttention(Block):
    """An attention of ``maxxvit.py``: its windows divide the map, and never shift.

    A ``RelPosBias`` is looked up by the op; every other bias makes itself.
    """

    LIBRARY = "timm"
    MODULES = ("timm.models.maxxvit",)
    FORMULA: ClassVar[tuple[tuple[str, str], ...]] = ()
    REL_POS: ClassVar[str]  # path to the module with the bias, or to None

    __constants__: ClassVar[tuple[str, ...]] = ("looks_up", "own_in_script")
    __jit_unused_properties__: ClassVar[tuple[str, ...]] = ("looks_up", "own_in_script")

    @classmethod
    def position(cls, block: Any) -> Any:
        return operator.attrgetter(cls.REL_POS)(block)

    @classmethod
    def head_dim(cls, block: Any) -> int:
        return int(cls.attn_of(block).dim_head)

    @classmethod
    def why_left(cls, block: Any) -> str | None:
        reason, rel_pos = super().why_left(block), cls.position(block)
        if reason is not None or rel_pos is None:
            return reason
        reason = why_unknown(rel_pos, "forward", "attn shared_rel_pos", "get_bias")
        if reason is None and is_table(rel_pos):
            reason = why_unknown(rel_pos, "get_bias", "", LOOK_UP)
        return None if reason is None else f"{reason}, unlike that of timm's {type(rel_pos).__name__}"

    @classmethod
    def why_not_plain(cls, block: Any) -> str | None:
        reason, attn, rel_pos = super().why_not_plain(block), cls.attn_of(block), cls.position(block)
        if reason is None and attn.scale != attn.dim_head**-0.5:
            return f"its scale is {attn.scale}, not dim_head ** -0.5"
        if reason is not None or rel_pos is None:
            return reason
        found = type(rel_pos)
        if found.__name__ not in BIASES or suffix(found.__module__) != "pos_embed_rel":
            return f"{cls.REL_POS} is a {found.__name__}, and none of timm's"
        for name in ("forward", "get_bias"):
            if name in rel_pos.__dict__ or getattr(found, name).__module__ != found.__module__:
                return f"the {name} of {cls.REL_POS} was replaced"
        return f"{cls.REL_POS} has prefix tokens" if getattr(rel_pos, "prefix_tokens", 0) > 0 else None

    @classmethod
    def why_own(cls, block: Any, backend: str) -> str | None:
        rel_pos = cls.position(block)
        if rel_pos is not None and hooked(rel_pos):
            return f"{cls.REL_POS} has hooks, and the op does not call it"
        return super().why_own(block, backend)

    @classmethod
    def calls(cls, block: Any) -> list[Call]:
        x, rel_pos = floating(block), cls.position(block)
        calls = [("window_attention", x.device, projection_dtype(x), cls.head_dim(block))]
        if is_table(rel_pos):
            table = parameter(rel_pos, "relative_position_bias_table")
            calls.append(("relative_position_bias", table.device, table.dtype, cls.heads(block)))
        return calls

    @property
    def looks_up(self) -> bool:
        """A constant of the scripted module, where the parameters of another bias have other names or shapes."""
        return is_table(self.position(self))

    @property
    def own_in_script(self) -> bool:
        """A constant of the scripted module: what TorchScript cannot look at when it runs."""
        drops = getattr(self.attn_of(self).attn_drop, "p", 0) > 0
        return drops or self.why_own(self, "reference") is not None

    def no_kernel_in_script(self, x: Tensor) -> bool:
        """The kernels that "auto" takes do not run on ``x``."""
        return self.swinops_backend == "auto" and (not x.is_cuda or x.dtype == torch.float64)


class Attention2d(MaxxVitAttention):
    """``Attention2d`` [B, C, H, W], which is all of CoAtNet's: the whole map is one window."""

    NAME = "Attention2d"
    ATTRIBUTES = (
        "qkv", "proj", "proj_drop", "attn_drop", "rel_pos", "num_heads", "dim_head", "head_first", "scale",
        "fused_attn",
    )  # fmt: skip
    BYPASSED = ("attn_drop",)
    DROPOUT = "attn_drop"
    REL_POS = "rel_pos"
    CODE = (("forward", "x shared_rel_pos", ATTENTION),)

    qkv: Any
    proj: Any
    proj_drop: Any
    rel_pos: Any
    num_heads: int
    dim_head: int
    head_first: bool
    library_forward: Callable[[Tensor, Tensor | None], Tensor]

    @classmethod
    def attn_of(cls, block: Any) -> Any:
        return block

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        if torch.jit.is_scripting():
            if self.own_in_script or self.no_kernel_in_script(x) or not self.fits(x, shared_rel_pos):
                return self.library_forward(x, shared_rel_pos)
        elif self.own_reason() is not None:
            return self.library_forward(x, shared_rel_pos)
        elif not isinstance(x, torch.fx.Proxy) and not self.fits(x, shared_rel_pos):
            warn_once(self.LIBRARY, "the bias is not [heads, N, N] for the N tokens of the map")
            return self.library_forward(x, shared_rel_pos)
        bias = shared_rel_pos
        if self.rel_pos is not None:
            if self.looks_up:
                table = self.rel_pos.relative_position_bias_table
                bias = look_up(table, self.rel_pos.window_size, self.swinops_backend)
            else:
                bias = self.rel_pos.get_bias()
        # contiguous once, or forward and backward would each copy q, k and v
        qkv = by_head(self.qkv(x).permute(0, 2, 3, 1).contiguous(), self.num_heads, self.dim_head, self.head_first)
        out = attention(qkv, bias, [x.shape[2], x.shape[3]], self.swinops_backend)
        projected: Tensor = self.proj_drop(self.proj(out.permute(0, 3, 1, 2)))
        return projected

    def fits(self, x: Tensor, shared_rel_pos: Tensor | None) -> bool:
        """The bias is [heads, N, N], N the tokens of the map; timm broadcasts some others, and refuses the rest."""
        if x.dim() != 4:
            return False
        N = x.shape[2] * x.shape[3]
        if self.rel_pos is not None:
            return bool(self.rel_pos.window_area == N)
        if shared_rel_pos is not None:
            shape = [self.num_heads, N, N]
            fits = list(shared_rel_pos.shape[-3:]) == shape and shared_rel_pos.numel() == shape[0] * N * N
            return fits and shared_rel_pos.is_floating_point()
        return True


class PartitionAttentionCl(MaxxVitAttention):
    """``PartitionAttentionCl`` [B, H, W, C] of MaxViT, where it partitions into blocks, which are windows."""

    NAME = "PartitionAttentionCl"
    ATTRIBUTES = (
        "partition_block", "partition_size", "attn.qkv", "attn.proj", "attn.proj_drop", "attn.attn_drop",
        "attn.rel_pos", "attn.num_heads", "attn.dim_head", "attn.head_first", "attn.scale", "attn.fused_attn",
    )  # fmt: skip
    OVERRIDES = ("_partition_attn",)
    FORMULA = (("attn", "AttentionCl"),)
    BYPASSED = ("attn.attn_drop",)
    REL_POS = "attn.rel_pos"
    CODE = (
        ("_partition_attn", "x", PARTITION),
        ("attn.forward", "x shared_rel_pos", ATTENTION),
        ("window_partition", "window_size", "shape _assert view permute contiguous"),
        ("window_reverse", "window_size img_size", "shape view permute contiguous"),
    )

    partition_size: tuple[int, int]
    library_partition_attn: Callable[[Tensor], Tensor]

    @classmethod
    def why_left(cls, block: Any) -> str | None:
        if not block.partition_block:
            return "its partition is a grid, and the op's windows are of neighbouring tokens"
        return super().why_left(block)

    def _partition_attn(self, x: Tensor) -> Tensor:
        window = [self.partition_size[0], self.partition_size[1]]
        if torch.jit.is_scripting():
            if self.own_in_script or self.no_kernel_in_script(x) or not self.fits(x, window):
                return self.library_partition_attn(x)
        elif self.own_reason() is not None:
            return self.library_partition_attn(x)
        elif isinstance(x, torch.fx.Proxy):  # the op would pad
            torch._assert(remainder(x, window) == 0, f"height and width must be divisible by the window {window}")
        elif not self.fits(x, window):
            return self.library_partition_attn(x)
        attn = self.attn
        bias: Tensor | None = None
        if attn.rel_pos is not None:
            if self.looks_up:
                table = attn.rel_pos.relative_position_bias_table
                bias = look_up(table, attn.rel_pos.window_size, self.swinops_backend)
            else:
                bias = attn.rel_pos.get_bias()
        qkv = by_head(attn.qkv(x), attn.num_heads, attn.dim_head, attn.head_first)
        projected: Tensor = attn.proj_drop(attn.proj(attention(qkv, bias, window, self.swinops_backend)))
        return projected

    def fits(self, x: Tensor, window: list[int]) -> bool:
        """The window divides the map, and the bias is for as many tokens as it has."""
        area = window[0] * window[1] if self.attn.rel_pos is None else self.attn.rel_pos.window_area
        return x.dim() == 4 and remainder(x, window) == 0 and bool(area == window[0] * window[1])


class ParallelPartitionAttention(Block):
    """``ParallelPartitionAttention``, which has both partitions side by side."""

    LIBRARY = "timm"
    MODULES = MaxxVitAttention.MODULES
    NAME = "ParallelPartitionAttention"
    ATTRIBUTES = ("attn_block", "attn_grid")
    OVERRIDES = ()

    @classmethod
    def why_left(cls, block: Any) -> str | None:
        return "one of its partitions is a grid, and the op's windows are of neighbouring tokens"


def is_table(rel_pos: Any) -> bool:
    return type(rel_pos).__name__ == "RelPosBias"


def floating(module: nn.Module) -> Tensor:
    """A parameter that is not quantised; a replica of DataParallel has tensors in its parameters' places."""
    tensors = (x for m in module.modules() for x in (*m._parameters.values(), *vars(m).values()))
    return next(x for x in tensors if isinstance(x, Tensor) and x.is_floating_point())


def remainder(x: Tensor, window: list[int]) -> int:
    """Tokens that the windows would leave over, as one number for fx."""
    return x.shape[1] % window[0] + x.shape[2] % window[1]


def look_up(table: Tensor, window: tuple[int, int], backend: str) -> Tensor:
    """[offsets, heads] -> [heads, N, N]"""
    bias: Tensor = torch.ops.swinops.relative_position_bias(table, [window[0], window[1]], backend)
    return bias


def by_head(qkv: Tensor, heads: int, head_dim: int, head_first: bool) -> Tensor:
    """[B, H, W, heads * 3 * head_dim] if ``head_first``, else [B, H, W, 3 * C] -> [B, H, W, 3, heads, head_dim]"""
    if head_first:
        qkv = qkv.unflatten(-1, [heads, 3, head_dim]).transpose(-3, -2)
    else:
        qkv = qkv.unflatten(-1, [3, heads, head_dim])
    return qkv


def attention(qkv: Tensor, bias: Tensor | None, window: list[int], backend: str) -> Tensor:
    """[B, H, W, 3, heads, head_dim], and a bias [1, heads, N, N] or [heads, N, N] -> [B, H, W, C]"""
    bias = None if bias is None else bias.flatten(0, -3)
    out: Tensor = torch.ops.swinops.window_attention_qkvpacked(
        qkv, bias, None, window, [0, 0], None, "pad_roll", 0.0, backend
    )[0]
    return out.flatten(-2)


SWAPS: tuple[type[Swapped], ...] = (Attention2d, PartitionAttentionCl, ParallelPartitionAttention)
