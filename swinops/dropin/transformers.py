"""Transformers' Swins: the attention of a layer becomes one op, and an image leaves the layer as it was.

In late releases of version 5 the attention of ``SwinLayer`` holds its four projections. Before, and still in the layers
of Donut, MaskFormer, CLAP, Swin V2 and Swin2SR, it holds two modules: ``self`` with three of them, and ``output`` with
the last.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swinops.dropin.block import (
    NetworkBlock,
    TableBlock,
    fits_windows,
    plain,
    pretrained_window,
    standard_mask,
    with_zero,
)
from swinops.dropin.swap import Swapped, warn_once
from swinops.dropin.vendored import VendoredBlock

# what a call may ask for that the op does not do
ASKED = {
    "head_mask": "a head_mask, which the op does not apply",
    "output_attentions": "output_attentions, and the op keeps no attention weights",
    "position_bias": "a position_bias besides the layer's own",
}

LAYER = (
    "size layernorm_before view maybe_pad shape window_partition window_size get_attn_mask dtype device attention "
    "window_reverse contiguous drop_path layernorm_after"
)
OLD_LAYER = f"{LAYER} shift_size torch roll to intermediate output"
CLAMP = (
    "set_shift_and_window_size",
    "input_resolution",
    "min window_size torch_int shift_size torch jit is_tracing tensor",
)
OLD_ATTENTION = ("attention.forward", "hidden_states attention_mask head_mask? output_attentions", "self output")
SCORES = (
    "shape query key value view transpose torch matmul relative_position_index window_size permute contiguous "
    "unsqueeze num_attention_heads attention_head_size all_head_size nn functional softmax dropout size math "
    "transpose_for_scores"
)
TABLE_SCORES = f"{SCORES} sqrt relative_position_bias_table"
COSINE_SCORES = (
    f"{SCORES} normalize clamp logit_scale log exp continuous_position_bias_mlp relative_coords_table sigmoid"
)


class Layer(VendoredBlock):
    """A layer of the older layout."""

    LIBRARY = "transformers"
    KNOWN = ()  # the mask that is added twice may one day be added once
    IMAGE = (7, 10)
    KEPT: ClassVar[tuple[str, ...]] = ("get_attn_mask", "maybe_pad")
    ATTN = "attention.self"
    BYPASSED: ClassVar[tuple[str, ...]] = ("attention.self.dropout",)
    DROPOUT = "attention.self.dropout"
    ATTRIBUTES: ClassVar[tuple[str, ...]] = (
        *KEPT, "window_size", "shift_size", "layernorm_before", "layernorm_after", "drop_path", "intermediate",
        "output", "attention.output", "attention.self.query", "attention.self.key", "attention.self.value",
        "attention.self.dropout", "attention.self.num_attention_heads", "attention.self.attention_head_size",
        "attention.self.window_size", "attention.self.relative_position_index",
    )  # fmt: skip
    OPTIONS: ClassVar[tuple[str, ...]] = ()  # the library's arguments after the tokens, and their height and width
    WEIGHTS: ClassVar[tuple[None, ...]] = ()  # what the library returns in the place of weights that nobody asked for

    window_size: int
    shift_size: int
    layernorm_before: nn.Module
    layernorm_after: nn.Module
    drop_path: nn.Module
    intermediate: nn.Module
    output: nn.Module
    attention: Any
    library_forward: Callable[..., Any]

    attn = property(lambda layer: layer.attention.self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "original" in vars(cls):  # a class that takes another's place
            cls.OPTIONS = tuple(inspect.signature(cls.original.forward).parameters)[3:]

    @classmethod
    def why_left(cls, layer: Any) -> str | None:
        reason = super().why_left(layer)
        if reason is not None:
            return reason
        window, shift = [layer.window_size] * 2, [layer.shift_size] * 2
        size = (2 * window[0], 3 * window[1])
        standard = layer.shift_size == 0 or standard_mask(cls.mask(layer, size), size, window, shift)
        return None if standard else "its get_attn_mask is not the library's"

    @classmethod
    def examples(cls, library: Any) -> list[Any]:
        config_class = inspect.unwrap(library.forward).__globals__[cls.NAME.replace("Layer", "Config")]
        config = config_class(window_size=4, attn_implementation="sdpa")  # which returns no weights
        return [library(config, 8, cls.IMAGE, 4, shift_size=shift) for shift in (0, 2)]

    @classmethod
    def arguments(cls, layer: Any, x: Tensor) -> tuple[Any, ...]:
        return x, cls.IMAGE

    def compute(self, x: Tensor, size: Any) -> Any:
        return self.residuals(x, size, self.shift_size)

    @classmethod
    def why_not_plain(cls, layer: Any) -> str | None:
        for name in cls.KEPT:
            if name in vars(layer):
                return f"its {name} was replaced on the instance"
        window, shift = layer.window_size, layer.shift_size
        if [window] * 2 != list(cls.table_window(layer)):
            return f"its window_size is {window}, not that of its bias (an image smaller than a window does that)"
        if not 0 <= shift < window:
            return f"its shift_size is {shift}, with a window_size of {window}"
        return super().why_not_plain(layer)

    @classmethod
    def mask(cls, layer: Any, size: tuple[int, int]) -> Tensor:
        """The library's mask for a map whose sides the window divides."""
        mask: Tensor = layer.get_attn_mask(*size, torch.float32)
        return mask

    @classmethod
    def heads(cls, layer: Any) -> int:
        return int(cls.attn_of(layer).num_attention_heads)

    @classmethod
    def head_dim(cls, layer: Any) -> int:
        return int(cls.attn_of(layer).attention_head_size)

    def forward(self, hidden_states: Tensor, input_dimensions: tuple[int, int], *args: Any, **kwargs: Any) -> Any:
        options = {**dict(zip(self.OPTIONS, args, strict=False)), **kwargs}
        shift = self.shift(input_dimensions, options.get("always_partition", False))
        asked = [
            reason for name, reason in ASKED.items() if options.get(name) is not None and options[name] is not False
        ]
        for reason in asked:
            warn_once(self.LIBRARY, reason)
        if asked or self.own_reason() is not None:
            return self.own_forward(hidden_states, input_dimensions, *args, **kwargs)
        return self.residuals(hidden_states, input_dimensions, shift), *self.WEIGHTS

    def own_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The library's forward, less what it writes into the layer."""
        window_size, shift_size = self.window_size, self.shift_size
        try:
            return self.library_forward(*args, **kwargs)
        finally:
            self.window_size, self.shift_size = window_size, shift_size

    def shift(self, size: tuple[int, int], always_partition: bool) -> int:
        """The shift in a map of this size."""
        return self.shift_size

    def residuals(self, x: Tensor, size: tuple[int, int], shift: int) -> Tensor:
        """The layer around its attention; norms come first."""
        x = x + self.drop_path(self.image_attn(self.layernorm_before(x), size, shift))
        return x + self.feed_forward(self.layernorm_after(x))

    def image_attn(self, x: Tensor, size: tuple[int, int], shift: int) -> Tensor:
        """[B, H * W, C] -> [B, H * W, C]"""
        return self.swinops_attn(x.unflatten(1, size), [self.window_size] * 2, [shift] * 2).flatten(1, 2)

    def swinops_attn(self, x: Tensor, window: list[int], shift: list[int]) -> Tensor:
        head_dim = self.head_dim(self)
        query, key, value = self.projections()
        q, (k, k_zero), (v, v_zero) = query(x), projected(key, x, window), projected(value, x, window)
        pad_kv = None
        if k_zero is not None and v_zero is not None:
            pad_kv = torch.stack([k_zero, v_zero]).unflatten(-1, (-1, head_dim))
        q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in (q, k, v))
        return self.project_back(self.attend_to(q, k, v, pad_kv, window, shift).flatten(-2), x)

    def projections(self) -> tuple[Any, Any, Any]:
        """Query's, key's and value's."""
        return self.attn.query, self.attn.key, self.attn.value

    def attend_to(
        self, q: Tensor, k: Tensor, v: Tensor, pad_kv: Tensor | None, window: list[int], shift: list[int]
    ) -> Tensor:
        """[B, H, W, heads, head_dim]"""
        raise NotImplementedError

    def project_back(self, out: Tensor, x: Tensor) -> Tensor:
        """``out`` is the attention of the image ``x`` [B, H, W, C]."""
        projected: Tensor = self.attention.output(out, x)
        return projected

    def feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.intermediate(x))
        return out


def projected(projection: Any, x: Tensor, window: list[int]) -> tuple[Tensor, Tensor | None]:
    """An image projected, and a token of zeros [C]: None where it is known that ``x`` needs no pads."""
    if plain(projection):
        zero = x.new_zeros(projection.out_features) if projection.bias is None else projection.bias
        return projection(x), zero
    return (projection(x), None) if fits_windows(x, window) else with_zero(projection, x)


class TableLayer(Layer, TableBlock):
    """Swin V1. In a map that one window covers it has no shift, unless it is told to partition always."""

    KEPT = (*Layer.KEPT, "set_shift_and_window_size")
    ATTRIBUTES = (*Layer.ATTRIBUTES, "set_shift_and_window_size", "attention.self.relative_position_bias_table")
    CODE: ClassVar[tuple[tuple[str, str, str], ...]] = (
        (
            "forward",
            "hidden_states input_dimensions head_mask? output_attentions always_partition",
            f"{OLD_LAYER} set_shift_and_window_size",
        ),
        CLAMP,
        OLD_ATTENTION,
        ("attention.self.forward", "hidden_states attention_mask head_mask? output_attentions", TABLE_SCORES),
    )

    @classmethod
    def mask(cls, layer: Any, size: tuple[int, int]) -> Tensor:
        mask: Tensor = layer.get_attn_mask(*size, torch.float32, torch.device("cpu"))
        return mask

    def shift(self, size: tuple[int, int], always_partition: bool) -> int:
        if always_partition or min(size) > self.window_size:
            return self.shift_size
        if min(size) < self.window_size:
            raise ValueError(
                f"a map of {size[0]} x {size[1]} tokens is smaller than the window of {self.window_size} that the "
                "layer's position bias is for: it takes a larger image, or always_partition=True"
            )
        return 0

    def attend_to(
        self, q: Tensor, k: Tensor, v: Tensor, pad_kv: Tensor | None, window: list[int], shift: list[int]
    ) -> Tensor:
        bias = self.position_bias(window)
        scale = getattr(self.attention, "scaling", None)
        out: Tensor = torch.ops.swinops.window_attention(
            q, k, v, bias, pad_kv, window, shift, scale, self.PAD_ORDER, self.MASK_VALUE, self.swinops_backend
        )[0]
        return out


class OldSwinLayer(TableLayer):
    """``SwinLayer`` of version 4, and of the first releases of version 5."""

    MODULES = ("transformers.models.swin.modeling_swin",)
    NAME = "SwinLayer"
    FORMULA = (("attention", "SwinAttention"), ("attention.self", "SwinSelfAttention"))


class DonutSwinLayer(TableLayer):
    MODULES = ("transformers.models.donut.modeling_donut_swin",)
    NAME = "DonutSwinLayer"
    FORMULA = (("attention", "DonutSwinAttention"), ("attention.self", "DonutSwinSelfAttention"))


class ClapAudioLayer(TableLayer):
    MODULES = ("transformers.models.clap.modeling_clap",)
    NAME = "ClapAudioLayer"
    FORMULA = (("attention", "ClapAudioAttention"), ("attention.self", "ClapAudioSelfAttention"))


class MaskFormerSwinLayer(TableLayer):
    """It shifts in every map."""

    MODULES = ("transformers.models.maskformer.modeling_maskformer_swin",)
    NAME = "MaskFormerSwinLayer"
    FORMULA = (("attention", "MaskFormerSwinAttention"), ("attention.self", "MaskFormerSwinSelfAttention"))
    KEPT = Layer.KEPT
    ATTRIBUTES = (*Layer.ATTRIBUTES, "attention.self.relative_position_bias_table")
    CODE = (
        ("forward", "hidden_states input_dimensions head_mask? output_attentions", OLD_LAYER),
        *TableLayer.CODE[2:],
    )

    @classmethod
    def mask(cls, layer: Any, size: tuple[int, int]) -> Tensor:
        mask: Tensor = layer.get_attn_mask(size)
        return mask

    def shift(self, size: tuple[int, int], always_partition: bool) -> int:
        return self.shift_size


class SwinLayer(TableLayer):
    """``SwinLayer`` of late releases of version 5, whose attention runs through a registry of functions."""

    MODULES = ("transformers.models.swin.modeling_swin",)
    NAME = "SwinLayer"
    FORMULA = (("attention", "SwinAttention"), ("attention.relative_position_bias", "SwinRelativePositionBias"))
    ATTN = "attention.relative_position_bias"
    BYPASSED = ()
    KEPT = (*TableLayer.KEPT, "cyclic_shift")
    ATTRIBUTES = (
        *KEPT, "window_size", "shift_size", "layernorm_before", "layernorm_after", "drop_path", "mlp", "dropout",
        "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "attention.scaling",
        "attention.head_dim", "attention.num_attention_heads", "attention.attention_dropout", "attention.config",
        "attention.relative_position_bias.window_size", "attention.relative_position_bias.relative_position_index",
        "attention.relative_position_bias.relative_position_bias_table",
    )  # fmt: skip
    CODE = (
        (
            "forward",
            "hidden_states input_dimensions always_partition kwargs",
            f"{LAYER} set_shift_and_window_size cyclic_shift dropout mlp",
        ),
        CLAMP,
        (
            "attention.forward",
            "hidden_states attention_mask kwargs",
            "shape head_dim q_proj k_proj v_proj o_proj view transpose relative_position_bias unsqueeze expand reshape "
            "ALL_ATTENTION_FUNCTIONS get_interface config _attn_implementation eager_attention_forward training "
            "attention_dropout scaling contiguous",
        ),
        (
            "attention.relative_position_bias.forward",
            "",
            "relative_position_bias_table relative_position_index view window_area permute contiguous unsqueeze",
        ),
        (
            "eager_attention_forward",
            "query key value attention_mask scaling dropout kwargs",
            "size torch matmul transpose nn functional softmax float32 to dtype dropout training contiguous",
        ),
    )
    WEIGHTS = (None,)  # as with sdpa

    dropout: nn.Module
    mlp: nn.Module

    attn = property(lambda layer: layer.attention.relative_position_bias)

    @classmethod
    def why_not_plain(cls, layer: Any) -> str | None:
        if isinstance(layer.attention.scaling, Tensor):
            return "attention.scaling is a tensor, and the op has no gradient for it"
        return super().why_not_plain(layer)

    @classmethod
    def why_own(cls, layer: Any, backend: str) -> str | None:
        reason = super().why_own(layer, backend)
        if reason is not None:
            return reason
        config, library = layer.attention.config, inspect.unwrap(type(layer.attention).forward).__globals__
        implementation, eager = config._attn_implementation, library["eager_attention_forward"]
        interface = library["ALL_ATTENTION_FUNCTIONS"].get_interface(implementation, eager)
        if interface.__module__ not in (library["__name__"], "transformers.integrations.sdpa_attention"):
            return f"the attention implementation {implementation!r}, which may compute anything"
        return ASKED["output_attentions"] if config.output_attentions else None

    @classmethod
    def drops(cls, layer: Any) -> bool:
        drops: bool = layer.attention.attention_dropout > 0 and layer.attention.training
        return drops

    @classmethod
    def heads(cls, layer: Any) -> int:
        return int(layer.attention.num_attention_heads)

    @classmethod
    def head_dim(cls, layer: Any) -> int:
        return int(layer.attention.head_dim)

    def projections(self) -> tuple[Any, Any, Any]:
        return self.attention.q_proj, self.attention.k_proj, self.attention.v_proj

    def project_back(self, out: Tensor, x: Tensor) -> Tensor:
        projected: Tensor = self.dropout(self.attention.o_proj(out))
        return projected

    def feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.mlp(x))
        return out


class CosineLayer(Layer, NetworkBlock):
    """Swin V2. Norms come last, whatever their names; and the mask is added twice."""

    MASK_VALUE = -200.0
    ATTRIBUTES = (
        *Layer.ATTRIBUTES, "attention.self.logit_scale", "attention.self.continuous_position_bias_mlp",
        "attention.self.pretrained_window_size", "attention.self.relative_coords_table",
    )  # fmt: skip
    CODE = (
        ("forward", "hidden_states input_dimensions head_mask? output_attentions", OLD_LAYER),
        OLD_ATTENTION,
        ("attention.self.forward", "hidden_states attention_mask head_mask? output_attentions", COSINE_SCORES),
    )

    def residuals(self, x: Tensor, size: tuple[int, int], shift: int) -> Tensor:
        x = x + self.drop_path(self.layernorm_before(self.image_attn(x, size, shift)))
        out: Tensor = x + self.drop_path(self.layernorm_after(self.feed_forward(x)))
        return out

    @classmethod
    def network(cls, layer: Any) -> Any:
        return cls.attn_of(layer).continuous_position_bias_mlp

    def position_bias(self, window: list[int]) -> Tensor:
        network = self.network(self)
        if self.plain_network:
            pretrained = pretrained_window(self.attn.pretrained_window_size, window)
            bias: Tensor = torch.ops.swinops.continuous_position_bias(
                network[0].weight, network[0].bias, network[2].weight, window, pretrained, True, self.swinops_backend
            )[0]
        else:
            table = 16 * torch.sigmoid(network(self.attn.relative_coords_table))
            bias = torch.ops.swinops.relative_position_bias(table.flatten(0, -2), window, self.swinops_backend)
        return bias

    def attend_to(
        self, q: Tensor, k: Tensor, v: Tensor, pad_kv: Tensor | None, window: list[int], shift: list[int]
    ) -> Tensor:
        bias = self.position_bias(window)
        out: Tensor = torch.ops.swinops.cosine_attention(
            q, k, v, self.attn.logit_scale, bias, pad_kv, window, shift, self.PAD_ORDER, self.MASK_VALUE,
            self.swinops_backend,
        )[0]  # fmt: skip
        return out


class Swinv2Layer(CosineLayer):
    MODULES = ("transformers.models.swinv2.modeling_swinv2",)
    NAME = "Swinv2Layer"
    FORMULA = (("attention", "Swinv2Attention"), ("attention.self", "Swinv2SelfAttention"))


class Swin2SRLayer(CosineLayer):
    MODULES = ("transformers.models.swin2sr.modeling_swin2sr",)
    NAME = "Swin2SRLayer"
    FORMULA = (("attention", "Swin2SRAttention"), ("attention.self", "Swin2SRSelfAttention"))


SWAPS: tuple[type[Swapped], ...] = (
    SwinLayer, OldSwinLayer, DonutSwinLayer, ClapAudioLayer, MaskFormerSwinLayer, Swinv2Layer, Swin2SRLayer,
)  # fmt: skip
