"""Layers that make one mask for all their blocks: not where these run the op."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swinops.dropin.block import standard_mask
from swinops.dropin.swap import Swapped

STANDARD_MASK = "standard"  # what a replaced layer hands to its blocks: the op needs no more


class MaskingLayer(Swapped):
    """A ``BasicLayer``, which is replaced if its blocks are: other libraries have a class of this name.

    Vendored layers make other masks, and return other things: both forwards are tried on a small image.
    """

    NAME = "BasicLayer"
    OVERRIDES: ClassVar[tuple[str, ...]] = ("forward",)
    KEPT: ClassVar[tuple[str, ...]] = ()
    COMPANION = True

    blocks: Any
    downsample: Any
    library_forward: Callable[..., Any]

    @classmethod
    def example(cls, layer: Any) -> tuple[tuple[Any, ...], dict[str, Any], Sequence[Sequence[int]]]:
        """Arguments for a small image, attributes of a layer for it, and its size, windows and shifts."""
        raise NotImplementedError

    def without_mask(self, *args: Any) -> Any:
        """What the library's ``forward`` returns, with blocks that are handed ``STANDARD_MASK``."""
        raise NotImplementedError

    @classmethod
    def why_left(cls, layer: Any) -> str | None:
        arguments, attributes, windows = cls.example(layer)
        twin, blocks = copy.copy(layer), [Probe(torch.cos), Probe(torch.exp), Probe(torch.tanh)]
        vars(twin).update(attributes, _modules={**layer._modules, "blocks": nn.ModuleList(blocks)})
        if layer.downsample is not None:
            twin.downsample = Probe(torch.sin)
        try:
            out = twin.forward(*arguments)
        except Exception as error:  # foreign code may raise any
            return f"it does not run on a small image ({type(error).__name__}: {error})"
        seen = [mask for block in blocks for mask in block.seen]
        if len(seen) != len(blocks) or not all(mask is None or standard_mask(mask, *windows) for mask in seen):
            return f"its mask is not {cls.LIBRARY}'s"
        same = as_lists(out) == as_lists(cls.without_mask(twin, *arguments))
        return None if same else f"its forward does not return what {cls.LIBRARY}'s does"


class Probe(nn.Module):
    """Stands for a block, and sees what that would get besides its input."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f
        self.seen: tuple[Any, ...] = ()

    def forward(self, x: Tensor, *seen: Any) -> Tensor:
        self.seen = seen
        return self.f(x)


def as_lists(out: Any) -> list[Any]:
    return [x.tolist() if isinstance(x, Tensor) else x for x in (out if isinstance(out, tuple) else (out,))]
