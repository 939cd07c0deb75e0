"""OpenMMLab's Swins: ``ShiftWindowMSA`` of mmsegmentation, mmdetection and mmpretrain becomes one op."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from swinops.dropin.block import TableBlock
from swinops.dropin.microsoft import ATTENTION, COSINE_ATTENTION, RESHAPING, NoKeyBias
from swinops.dropin.swap import Swapped
from swinops.dropin.vendored import VendoredBlock

FORWARD = (
    f"{RESHAPING} window_size F pad shift_size torch roll device window_partition w_msa window_reverse drop "
    "AssertionError"
)
MASK = f"{RESHAPING} torch zeros slice window_partition masked_fill float"


class ShiftWindowMSA(VendoredBlock):
    """The attention with its shift and windows: pads the image, then shifts it."""

    LIBRARY = "OpenMMLab"
    NAME = "ShiftWindowMSA"
    ATTRIBUTES: ClassVar[tuple[str, ...]] = (
        "window_size", "shift_size", "drop", "window_partition", "window_reverse", "w_msa.window_size",
        "w_msa.embed_dims", "w_msa.num_heads", "w_msa.relative_position_index", "w_msa.qkv", "w_msa.attn_drop",
        "w_msa.proj", "w_msa.proj_drop", "w_msa.softmax",
    )  # fmt: skip
    KEPT: ClassVar[tuple[str, ...]] = ("window_partition", "window_reverse")
    ATTN = "w_msa"
    FORMULA = (("w_msa", "WindowMSA"),)
    BYPASSED = ("w_msa.softmax", "w_msa.attn_drop")
    DROPOUT = "w_msa.attn_drop"

    window_size: int
    shift_size: int
    w_msa: nn.Module
    drop: nn.Module
    library_forward: Callable[[Tensor, tuple[int, int]], Tensor]

    @classmethod
    def head_dim(cls, module: Any) -> int:
        return int(module.w_msa.embed_dims) // cls.heads(module)

    @classmethod
    def examples(cls, library: Any) -> list[Any]:
        return [library(8, 4, window, shift_size=shift) for window, shift in ((5, 0), (5, 2), (12, 2))]

    @classmethod
    def arguments(cls, block: Any, x: Tensor) -> tuple[Any, ...]:
        return x, cls.IMAGE

    @property
    def attn(self) -> Any:
        return self.w_msa

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Any:
        H, W = hw_shape
        # what the library refuses, it refuses in its own words
        refused = query.dim() != 3 or query.shape[1] != H * W or self.too_small(H, W)
        if refused or self.own_reason() is not None:
            return self.library_forward(query, hw_shape)
        return self.compute(query, hw_shape)

    def compute(self, x: Tensor, size: Sequence[int]) -> Any:
        x = self.swinops_attn(x.unflatten(1, size), [self.window_size] * 2, [self.shift(*size)] * 2)
        return self.drop(x.flatten(1, 2))

    def too_small(self, H: int, W: int) -> bool:
        return False

    def shift(self, H: int, W: int) -> int:
        """Even a single window is shifted."""
        return self.shift_size


class BackboneMSA(ShiftWindowMSA, TableBlock):
    """mmsegmentation's and mmdetection's."""

    MODULES = ("mmseg.models.backbones.swin", "mmdet.models.backbones.swin")
    ATTRIBUTES = (*ShiftWindowMSA.ATTRIBUTES, "w_msa.scale", "w_msa.relative_position_bias_table")
    CODE = (
        ("forward", "query hw_shape", f"{FORWARD} {MASK}"),
        ("window_partition", "x", f"{RESHAPING} window_size"),
        ("window_reverse", "windows H W", f"{RESHAPING} window_size int"),
        ("w_msa.forward", "x mask", ATTENTION),
    )


class PretrainMSA(ShiftWindowMSA):
    """mmpretrain's, and mmclassification's before it: a single window is shifted only with ``pad_small_map``."""

    MODULES = ("mmpretrain.models.utils.attention", "mmcls.models.utils.attention")
    ATTRIBUTES = (*ShiftWindowMSA.ATTRIBUTES, "pad_small_map", "get_attn_mask")
    KEPT = (*ShiftWindowMSA.KEPT, "get_attn_mask")
    CODE: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("forward", "query hw_shape", f"{FORWARD} min pad_small_map get_attn_mask"),
        ("get_attn_mask", "window_size shift_size device", f"{MASK} ShiftWindowMSA"),
        ("window_partition", "window_size", RESHAPING),
        ("window_reverse", "H W window_size", f"{RESHAPING} int"),
    )

    pad_small_map: bool

    @classmethod
    def examples(cls, library: Any) -> list[Any]:
        """With a window of 12 there is only one."""
        window_msa = inspect.unwrap(library.forward).__globals__[dict(cls.FORMULA)["w_msa"]]
        return [
            library(8, 4, window, shift_size=shift, pad_small_map=pads, window_msa=window_msa)
            for window, shift, pads in ((5, 0, False), (5, 2, False), (8, 2, False), (8, 2, True), (12, 2, True))
        ]

    def too_small(self, H: int, W: int) -> bool:
        return min(H, W) < self.window_size and not self.pad_small_map

    def shift(self, H: int, W: int) -> int:
        return 0 if min(H, W) == self.window_size and not self.pad_small_map else self.shift_size


class TablePretrainMSA(PretrainMSA, TableBlock):
    """With ``WindowMSA``."""

    ATTRIBUTES = (*PretrainMSA.ATTRIBUTES, "w_msa.scale", "w_msa.relative_position_bias_table")
    CODE = (*PretrainMSA.CODE, ("w_msa.forward", "x mask", ATTENTION))


class NetworkPretrainMSA(PretrainMSA, NoKeyBias):
    """With ``WindowMSAV2``, whose coordinates are in a buffer only: it does not keep the window that they are for."""

    ATTRIBUTES = (
        *PretrainMSA.ATTRIBUTES, "w_msa.q_bias", "w_msa.v_bias", "w_msa.logit_scale", "w_msa.cpb_mlp",
        "w_msa.relative_coords_table",
    )  # fmt: skip
    FORMULA = (("w_msa", "WindowMSAV2"),)
    CODE = (*PretrainMSA.CODE, ("w_msa.forward", "x mask", COSINE_ATTENTION))

    @classmethod
    def is_plain(cls, network: Any) -> bool:
        return False


SWAPS: tuple[type[Swapped], ...] = (BackboneMSA, TablePretrainMSA, NetworkPretrainMSA)
