"""The three norms beside torch's own: what timm and torchvision run, ``torch.nn.LayerNorm`` with a sum before or after.

In half precision weight and bias are too, because torch's kernel takes one dtype.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import swinops
from swinops.benchmarks.harness import BASELINE, BOTH, FORWARD, Case, Implementation, Settings, implementations
from swinops.testing import norm_inputs, random_tensor


def shapes(settings: Settings) -> list[tuple[int, int, int]]:
    """Batch, side of the image, channels."""
    if settings.quick:
        return [(1, 14, 32)]
    if settings.device.type == "cpu":
        return [(2, 56, 96), (2, 7, 768)]
    swin_t = [(128, 56 >> s, 96 << s) for s in range(4)]
    return swin_t + [(32, 96, 128), (32, 12, 1024)] * settings.full


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def add_layer_norm(x: Tensor, f: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    s = x + f
    return s, F.layer_norm(s, s.shape[-1:], weight, bias)


def layer_norm_add(x: Tensor, f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x + F.layer_norm(f, f.shape[-1:], weight, bias)


class Join(torch.autograd.Function):
    """y alone, whose gradient is also that of s: both are used, as in a model, and no pass over memory is added."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


def joined(f: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    def run(**arguments: Any) -> Tensor:
        y: Tensor = Join.apply(*f(**arguments))
        return y

    return run


def cases(settings: Settings) -> Iterator[Case]:
    for batch, side, channels in shapes(settings):
        size = (batch, side, side, channels)
        shape = " x ".join(map(str, size))
        tensors = norm_inputs(size, f=True, dtype=settings.dtype, device=settings.device)
        dout = random_tensor(size, 9, settings.dtype, settings.device)
        alone = {name: x for name, x in tensors.items() if name != "f"}
        make = functools.partial(implementations, x=dout, settings=settings)
        unit = dout.nbytes

        # forward: x in, y out; backward: dy, x in, dx out; the sums and the statistics of rows are small
        moved = {FORWARD: 2 * unit, BOTH: 5 * unit}
        contenders = make("layer_norm", definition=layer_norm, ours=swinops.layer_norm)
        yield Case("layer_norm", shape, alone, dout, layer_norm, contenders, moved)

        # forward: x, f in, s, y out; backward: the gradient of both and s in, that of both x and f out
        moved = {FORWARD: 4 * unit, BOTH: 7 * unit}
        definition = joined(add_layer_norm)
        contenders = make("add_layer_norm", definition=definition, ours=joined(swinops.add_layer_norm))
        # compiled without Join, or it would leave s unwritten
        compiled = joined(settings.compile(add_layer_norm))
        contenders[f"{BASELINE}-compiled"] = Implementation(compiled, compile=settings.compiled)
        yield Case("add_layer_norm", shape, tensors, dout, definition, contenders, moved)

        # forward: x, f in, out out; backward: dout, f in, df out; dx is dout
        moved = {FORWARD: 3 * unit, BOTH: 6 * unit}
        contenders = make("layer_norm_add", definition=layer_norm_add, ours=swinops.layer_norm_add)
        yield Case("layer_norm_add", shape, tensors, dout, layer_norm_add, contenders, moved)
