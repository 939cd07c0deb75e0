"""What the blocks of every library have in common: when the op stands for their attention, and when it cannot."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from swinops.dropin.swap import Call, Swapped, hooked, no_kernel, warn_once
from swinops.nn.layer_norm import projection_dtype
from swinops.reference.continuous_position_bias import coordinates
from swinops.reference.relative_position_bias import relative_position_index
from swinops.reference.window_attention import shift_mask


class Block(Swapped):
    """A module whose shift, pads, windows, mask, bias and attention are one op.

    The projections are called as modules, so they may be quantised or carry LoRA; they see the image [B, *space, C] in
    place of its windows. What the op stands for is not called: where it has something to do (hooks, dropout in
    training, another class), the library's own code runs.
    """

    OVERRIDES: ClassVar[tuple[str, ...]] = ("forward",)
    KEPT: ClassVar[tuple[str, ...]] = ()
    COMPANION = False
    PAD_ORDER: ClassVar[str] = "pad_roll"
    MASK_VALUE: ClassVar[float] = -100.0
    ATTN: ClassVar[str] = "attn"  # path to the module with the bias and the projections
    FORMULA: ClassVar[tuple[tuple[str, str], ...]] = (
        ("attn", "WindowAttention"),
    )  # what the op stands for, and classes
    BYPASSED: ClassVar[tuple[str, ...]] = ("attn.softmax", "attn.attn_drop")  # what those would have called
    DROPOUT: ClassVar[str] = "attn.attn_drop"

    attn: Any

    @classmethod
    def why_left(cls, block: Any) -> str | None:
        reason = cls.why_not_plain(block)
        index = getattr(cls.position(block), "relative_position_index", None)
        if reason is not None or index is None or index.is_meta:
            return reason
        expected = relative_position_index(list(cls.table_window(block)), index.device)
        if not torch.equal(index.flatten(), expected.flatten()):
            return f"its relative_position_index is not {cls.LIBRARY}'s"
        return None

    @classmethod
    def why_own(cls, block: Any, backend: str) -> str | None:
        reason: str | None = cls.why_not_plain(block)
        if reason is not None:
            return reason
        for path in (*dict(cls.FORMULA), *cls.BYPASSED):
            if hooked(operator.attrgetter(path)(block)):
                return f"{path} has hooks, and the op does not call it"
        if _has_any_global_hook():
            return "there are hooks on all modules, and the op does not call those that it stands for"
        if is_transformed():
            return "torch.func and forward-mode derivatives, which the op does not have"
        if cls.drops(block):
            return "attention dropout in training, which the op does not have"
        if backend != "auto":
            return None
        for call in cls.calls(block):
            reason = no_kernel(*call)
            if reason is not None:
                return reason
        return None

    @classmethod
    def why_not_plain(cls, block: Any) -> str | None:
        """Why the library's formula cannot be assumed; None where it can."""
        for path, name in cls.FORMULA:
            module = operator.attrgetter(path)(block)
            found = type(module)
            if found.__name__ != name or suffix(found.__module__) not in map(suffix, cls.MODULES):
                return f"{path} is a {found.__name__}, not {cls.LIBRARY}'s {name}"
            if "forward" in module.__dict__ or found.forward.__module__ != found.__module__:
                return f"the forward of {path} was replaced"
        for path in cls.BYPASSED:
            module = operator.attrgetter(path)(block)
            if "forward" in module.__dict__:
                return f"the forward of {path} was replaced"
            forward = type(module).forward  # not the type itself: torch.export puts one of its own in its place
            if path.endswith("softmax") and (forward is not nn.Softmax.forward or module.dim != -1):
                return f"{path} is a {type(module).__name__}, not a Softmax over the last axis"
            if path == cls.DROPOUT and forward not in (nn.Dropout.forward, nn.Identity.forward):
                return f"{path} is a {type(module).__name__}, not a Dropout"
        return None

    @classmethod
    def drops(cls, block: Any) -> bool:
        """The library would drop attention weights now."""
        # timm's fused attention goes by attn.training, a plain one by that of the dropout
        drop = operator.attrgetter(cls.DROPOUT)(block)
        return getattr(drop, "p", 0.0) > 0 and (cls.attn_of(block).training or drop.training)

    @classmethod
    def attn_of(cls, block: Any) -> Any:
        """The module with the bias and the projections."""
        return operator.attrgetter(cls.ATTN)(block)

    @classmethod
    def heads(cls, block: Any) -> int:
        return int(cls.attn_of(block).num_heads)

    @classmethod
    def position(cls, block: Any) -> Any:
        """The module with the bias."""
        return cls.attn_of(block)

    @classmethod
    def head_dim(cls, block: Any) -> int:
        attn = cls.attn_of(block)
        channels: int = attn.proj.in_features if hasattr(attn.proj, "in_features") else block.dim
        return channels // cls.heads(block)

    @classmethod
    def table_window(cls, block: Any) -> Sequence[int]:
        """The window that the bias is for."""
        window: Sequence[int] = cls.position(block).window_size
        return window

    @classmethod
    def knows_zero(cls, attn: Any) -> bool:
        """A token of zeros projects to ``qkv_bias``. Another module's attributes (LoRA with a bias) do not tell."""
        return plain(attn.qkv)

    def own_reason(self) -> str | None:
        """Why the library's own code has to run now, once told to the user; None where the op runs."""
        reason = self.why_own(self, self.swinops_backend)
        if reason is not None:
            warn_once(self.LIBRARY, reason)
        return reason

    def swinops_attn(self, x: Tensor, window: list[int], shift: list[int]) -> Tensor:
        """The attention of the image ``x`` between its projections. [B, *space, C] -> [B, *space, C]"""
        heads = self.attn.num_heads
        bias = self.qkv_bias()
        if torch.jit.is_scripting():
            qkv, zero = self.project(x, bias), bias
        else:
            qkv, zero = self.project_with_zero(x, bias, window)
        pad_kv = None if zero is None else zero.view(3, heads, -1)[1:]
        attended = self.attend(qkv.unflatten(-1, [3, heads, -1]), pad_kv, window, shift)
        out: Tensor = self.attn.proj_drop(self.attn.proj(attended.flatten(-2)))
        return out

    def project_with_zero(self, x: Tensor, bias: Tensor | None, window: list[int]) -> tuple[Tensor, Tensor | None]:
        """``project``, and what that makes of a token of zeros [3 * C]: None for zeros, and where nothing is padded."""
        if self.knows_zero(self.attn):
            return self.project(x, bias), bias
        if fits_windows(x, window):
            return self.project(x, bias), None
        return with_zero(lambda tokens: self.project(tokens, bias), x)

    def qkv_bias(self) -> Tensor | None:
        """What ``project`` adds. [3 * C]"""
        bias: Tensor | None = getattr(self.attn.qkv, "bias", None)
        return bias

    def project(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[B, *space, C] -> [B, *space, 3 * C]; a class whose ``qkv`` does not add ``bias`` adds it here."""
        qkv: Tensor = self.attn.qkv(x)
        return qkv

    def attend(self, qkv: Tensor, pad_kv: Tensor | None, window: list[int], shift: list[int]) -> Tensor:
        """[B, *space, 3, heads, head_dim] -> [B, *space, heads, head_dim]"""
        raise NotImplementedError

    def position_bias(self, window: list[int]) -> Tensor:
        """[heads, N, N]"""
        raise NotImplementedError


class TableBlock(Block):
    """Swin V1: scaled dot products, and a bias that is looked up in a table."""

    @classmethod
    def why_not_plain(cls, block: Any) -> str | None:
        if isinstance(getattr(cls.attn_of(block), "scale", None), Tensor):
            return f"{cls.ATTN}.scale is a tensor, and the op has no gradient for it"
        return super().why_not_plain(block)

    @classmethod
    def why_own(cls, block: Any, backend: str) -> str | None:
        reason = super().why_own(block, backend)
        table = None if reason else cls.attn_of(block)._parameters.get("relative_position_bias_table")
        if table is None:
            return reason
        expected = [math.prod([2 * w - 1 for w in cls.table_window(block)]), cls.heads(block)]
        if list(table.shape) != expected:
            return f"its relative_position_bias_table is {list(table.shape)}, and the op's would be {expected}"
        return None

    @classmethod
    def calls(cls, block: Any) -> list[Call]:
        table = parameter(cls.attn_of(block), "relative_position_bias_table")
        return [
            ("window_attention", table.device, projection_dtype(table), cls.head_dim(block)),
            ("relative_position_bias", table.device, table.dtype, cls.heads(block)),
        ]

    def attend(self, qkv: Tensor, pad_kv: Tensor | None, window: list[int], shift: list[int]) -> Tensor:
        bias = self.position_bias(window)
        out: Tensor = torch.ops.swinops.window_attention_qkvpacked(
            qkv, bias, pad_kv, window, shift, self.attn.scale, self.PAD_ORDER, self.MASK_VALUE, self.swinops_backend
        )[0]
        return out

    def position_bias(self, window: list[int]) -> Tensor:
        bias: Tensor = torch.ops.swinops.relative_position_bias(
            self.attn.relative_position_bias_table, window, self.swinops_backend
        )
        return bias


class CosineBlock(Block):
    """Swin V2: a scaled cosine, and a bias that a network makes."""

    @classmethod
    def calls(cls, block: Any) -> list[Call]:
        scale = parameter(cls.attn_of(block), "logit_scale")
        return [("cosine_attention", scale.device, projection_dtype(scale), cls.head_dim(block))]

    def attend(self, qkv: Tensor, pad_kv: Tensor | None, window: list[int], shift: list[int]) -> Tensor:
        bias = self.position_bias(window)
        out: Tensor = torch.ops.swinops.cosine_attention_qkvpacked(
            qkv, self.attn.logit_scale, bias, pad_kv, window, shift, self.PAD_ORDER, self.MASK_VALUE,
            self.swinops_backend,
        )[0]  # fmt: skip
        return out


class NetworkBlock(CosineBlock):
    """Swin V2 whose network is the paper's: it runs as one op where it is the library's own, else as a module."""

    __constants__: ClassVar[tuple[str, ...]] = ("plain_network",)
    __jit_unused_properties__: ClassVar[tuple[str, ...]] = ("plain_network",)

    @classmethod
    def why_left(cls, block: Any) -> str | None:
        reason = super().why_left(block)
        attn = cls.attn_of(block)
        if reason is not None or attn.relative_coords_table.is_meta:
            return reason
        window = list(cls.table_window(block))
        table = attn.relative_coords_table.flatten(0, -2)
        pretrained = pretrained_window(getattr(attn, "pretrained_window_size", (0, 0)), window)
        expected = coordinates(window, pretrained, True, table.new_empty(0, dtype=torch.float32))
        # another device may have rounded them otherwise; and a network that is called is given the table itself
        rounding = 2 * torch.finfo(table.dtype).eps
        if cls.is_plain(cls.network(block)) and not torch.allclose(table.float(), expected, rtol=rounding, atol=0):
            return f"its relative_coords_table is not {cls.LIBRARY}'s"
        return None

    @classmethod
    def calls(cls, block: Any) -> list[Call]:
        network = cls.network(block)
        if not cls.is_plain(network):
            scale = parameter(cls.attn_of(block), "logit_scale")
            bias = ("relative_position_bias", scale.device, projection_dtype(scale), cls.heads(block))
        else:
            w1 = parameter(network[0], "weight")
            bias = ("continuous_position_bias", w1.device, w1.dtype, 2)
        return [*super().calls(block), bias]

    @classmethod
    def network(cls, block: Any) -> Any:
        return cls.attn_of(block).cpb_mlp

    @classmethod
    def is_plain(cls, network: Any) -> bool:
        """The op makes the position bias."""
        return has_plain_network(network)

    @property
    def plain_network(self) -> bool:
        """A constant of the scripted module, where another network's parameters may have other names."""
        return self.is_plain(self.network(self))

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


def is_transformed() -> bool:
    """A transform of torch.func is being traced, or a forward-mode derivative is being taken."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def pretrained_window(pretrained: tuple[int, int], window: list[int]) -> list[int]:
    """The window that the published coordinates are relative to."""
    return [pretrained[0], max(pretrained[1], 1)] if pretrained[0] > 0 else window


def has_plain_network(network: Any) -> bool:
    """The position bias is the op's: two plain layers in float32, under autocast too.

    Coordinates are float32 in the op. The libraries round them to half precision where the whole model is, which
    opens and shuts other units of the network, and to float32 even in float64.
    """
    if type(network) is not nn.Sequential or len(network) != 3 or hooked(network) or "forward" in network.__dict__:
        return False
    first, relu, last = network
    if not plain(first) or not plain(last) or first.bias is None or last.bias is not None:
        return False
    if type(relu) is not nn.ReLU or hooked(relu):
        return False
    tensors = [parameter(first, "weight"), parameter(first, "bias"), parameter(last, "weight")]
    # a tensor may stand for another, as torchao's do, which the op cannot read
    return all(x.dtype == torch.float32 and not is_traceable_wrapper_subclass(x) for x in tensors)


def fits_windows(x: Tensor, window: Sequence[int]) -> bool:
    """It is known that the image ``x`` [B, *space, C] needs no pads."""
    return not isinstance(x, torch.fx.Proxy) and all(x.shape[1 + i] % w == 0 for i, w in enumerate(window))


def with_zero(project: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``project`` of an image, and of a token of zeros. [B, *space, C] -> [B, *space, D] and [D]

    In one call: what is in a projection's place may have a state, or draw random numbers.
    """
    tokens = project(torch.cat([x.flatten(0, -2), x.new_zeros(1, x.shape[-1])]))
    return tokens[:-1].unflatten(0, x.shape[:-1]), tokens[-1]


def parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter itself, where the attribute would be a proxy under fx."""
    x = module._parameters.get(name)
    if x is None:  # a replica of DataParallel or FSDP: a tensor in its place; or a parametrization: a property
        x = vars(module)[name] if name in vars(module) else getattr(module, name)
    return x


def plain(module: nn.Module) -> bool:
    """``module`` projects zeros to its bias."""
    return type(module) is nn.Linear and "forward" not in module.__dict__ and not hooked(module)


def standard_mask(mask: Tensor, space: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> bool:
    """``mask`` is what the op adds, or there is nothing to compare on the meta device."""
    if mask.is_meta:
        return True
    return torch.equal(mask, shift_mask(space, window, shift, -100.0, mask.device).to(mask.dtype))


def suffix(module: str) -> str:
    return module.rpartition(".")[2]
