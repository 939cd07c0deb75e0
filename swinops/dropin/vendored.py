"""Classes whose files are vendored everywhere, and changed: they are known by what a small instance computes, too."""

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swinops.dropin.block import Block
from swinops.dropin.swap import PACKAGES, library_class, swapped_class, why_unknown


class VendoredBlock(Block):
    """A block that is replaced, outside of the library itself, if small ones of its class compute what it does."""

    KNOWN: ClassVar[tuple[str, ...]] = PACKAGES  # whose own class needs no small ones
    COPIED: ClassVar[tuple[tuple[str, str, str], ...]] = ()  # as CODE, for others than those
    IMAGE: ClassVar[tuple[int, ...]] = (8, 12)  # what small ones are run on

    @classmethod
    def why_left(cls, block: Any) -> str | None:
        reason = super().why_left(block)
        classes: Any = cls, library_class(cls, type(block)), type(cls.attn_of(block))
        if reason is not None or classes[1].__module__.partition(".")[0] in cls.KNOWN:
            return reason
        for path, arguments, names in cls.COPIED:
            if (reason := why_unknown(block, path, arguments, names)) is not None:
                return f"{reason}, unlike that of {cls.LIBRARY}'s {cls.NAME}"
        return why_other_numbers(*classes)

    @classmethod
    def examples(cls, library: Any) -> list[Any]:
        """Small blocks of the library's class, of 8 channels in four heads."""
        raise NotImplementedError

    @classmethod
    def arguments(cls, block: Any, x: Tensor) -> tuple[Any, ...]:
        """What the library's method takes, for the tokens [1, N, C] of an ``IMAGE``."""
        raise NotImplementedError

    def compute(self, x: Tensor, size: Sequence[int]) -> Any:
        """What the library's method computes, with the op."""
        raise NotImplementedError


@functools.cache
def why_other_numbers(kind: type[VendoredBlock], library: Any, attention: Any) -> str | None:
    """Why the code of ``library`` and its ``attention`` is not the published one, by what small blocks of it compute.

    That shows what names do not: half of a residual, norms in another order, another clamp.
    """
    with torch.random.fork_rng([]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        try:
            # twice, for numbers that do not happen to hide a difference
            for block in (*kind.examples(library), *kind.examples(library)):
                attn = kind.attn_of(block)
                if type(attn) is not attention:
                    return f"its {kind.ATTN} is not the {attention.__name__} that its class makes"
                randomise(block, attn)
                x = torch.randn(1, math.prod(kind.IMAGE), 8, dtype=torch.float64)
                expected = as_tuple(getattr(block, kind.OVERRIDES[0])(*kind.arguments(block, x)))
                block.__class__, block.swinops_backend = swapped_class(kind, library), "reference"
                actual = as_tuple(block.compute(x, kind.IMAGE))
                # V2's clamp is rounded to float32
                if not all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in zip(actual, expected, strict=True)):
                    return f"its {kind.OVERRIDES[0]} computes something else than that of {kind.LIBRARY}'s {kind.NAME}"
        except Exception as error:  # foreign code may raise any
            return f"a small block of its class does not run ({type(error).__name__}: {error})"
    return None


def randomise(block: Any, attn: Any) -> None:
    """Let everything in a small block have an effect: in the last head scores are so large that -100 is no -200."""
    block.double()
    block.eval()  # which some libraries have return None
    attn.proj_drop = nn.Tanh()
    setattr(block, "drop_path" if hasattr(block, "drop_path") else "drop", nn.Tanh())
    for p in block.parameters():
        p.uniform_(-1, 1)
    if hasattr(attn, "qkv"):
        attn.qkv.weight[6:8] *= 100
    if hasattr(attn, "logit_scale"):
        attn.logit_scale.copy_(torch.tensor([-3.0, 4.0, 5.0, 5.0]).view_as(attn.logit_scale))


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return tuple(x for x in out if x is not None) if isinstance(out, tuple) else (out,)
