"""One library's model as ``test_dropin_libraries`` takes it: small, every parameter random, at sizes that pad."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .timm_swins import randomise

__all__ = ["Case", "close", "gradients", "randomise", "same"]


@dataclass(frozen=True)
class Case:
    """How to build and run a model, and what is to be seen of it.

    ``sizes``: images [*space], the first for the tests of the contract; there should be some that pad, some that do
    not, square and not. Each is a few windows, for the interpreter takes milliseconds for each.
    ``unsupported``: what the library itself cannot do (script, fx, export, compile, checkpoint, autocast), and in
    what way: a word of the message of its own error, or a reason where it has none.
    """

    name: str
    library: str
    build: Callable[..., nn.Module]  # options of the library's constructor; random, in evaluation mode
    image: Callable[[int, tuple[int, ...]], torch.Tensor]
    sizes: tuple[tuple[int, ...], ...]
    replaced: dict[str, str]  # path and class of each module that patch replaces
    op: str = "window_attention"
    pads: bool = True  # the first size does
    shifts: bool = True
    shift: str = ""  # path of a replaced module that shifts
    bypassed: tuple[str, ...] = (
        "attn",
        "attn.softmax",
        "attn.attn_drop",
    )  # from a replaced module: what it does not call
    projection: str = "attn.qkv"  # from a replaced module: a projection that the library calls as a module
    called: bool = True  # where it is False, the library only reads the weight of that
    dropout: dict[str, Any] = field(default_factory=dict)  # options that drop attention weights in training
    overrides: str = "forward"  # the method that patch replaces
    resize: Callable[[tuple[int, ...]], dict[str, Any]] = lambda size: {}  # options for a model of that image size
    checkpointing: Callable[[nn.Module], Any] | None = None  # turns on activation checkpointing
    unsupported: dict[str, str] = field(default_factory=dict)

    def module(self, model: nn.Module) -> Any:
        """A replaced module that shifts."""
        return model.get_submodule(self.shift or list(self.replaced)[-1])

    def model(self, size: tuple[int, ...] | None = None, **options: Any) -> nn.Module:
        return self.build(**{**self.resize(size or self.sizes[0]), **options})

    def x(self, batch: int = 2, size: tuple[int, ...] | None = None) -> torch.Tensor:
        return self.image(batch, size or self.sizes[0])


def close(actual, expected):
    """Equal but for the order of float32 sums."""
    return torch.allclose(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


def gradients(model, x):
    return torch.autograd.grad(model(x).square().sum(), list(model.parameters()), allow_unused=True)


def same(actual, expected):
    """The same gradients: those that should be sums of nothing are nothing but rounding, and left out."""
    top = max(float(g.abs().max()) for g in expected if g is not None)
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or float((a - b).abs().max()) <= 1e-4 * max(float(b.abs().max()), 0.01 * top)
