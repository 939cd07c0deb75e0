"""Shifted-window attention, from the QKV projection's output in image layout back to image layout.

The peers get k and v in windows already, for nothing: timm rolls and partitions one tensor of C channels before its
projection, and here that is q. So each side pays for what it does around its attention, and all compute one function.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import swinops
from swinops import reference
from swinops.benchmarks.harness import BOTH, FORWARD, Case, Implementation, Results, Settings, Tensors, implementations
from swinops.reference.window_attention import shift_mask
from swinops.testing import attention_inputs


class Shape(NamedTuple):
    batch: int
    space: tuple[int, int]
    heads: int
    window: int
    shift: int
    head_dim: int = 32

    def __str__(self) -> str:
        h, w = self.space
        sizes = f"{self.batch} x {h} x {w}, {self.heads} heads of {self.head_dim}"
        padded = ", padded" if self.padded else ""
        return f"{sizes}, window {self.window}, shift {self.shift}{padded}"

    @property
    def padded(self) -> bool:
        return any(n % self.window for n in self.space)


def shapes(settings: Settings) -> list[Shape]:
    if settings.quick:
        return [Shape(1, (14, 14), 2, 7, 3, 16)]
    if settings.device.type == "cpu":
        return [Shape(1, (28, 28), 6, 7, 3), Shape(1, (30, 26), 6, 7, 3)]
    # the four stages of Swin-T at 224, with and without a shift, and one image size that the window does not divide
    stages = []
    for s in range(4):
        stages += [Shape(128, (56 >> s, 56 >> s), 3 << s, 7, shift) for shift in ((0, 3) if s < 3 else (0,))]
    stages.append(Shape(128, (60, 60), 3, 7, 3))
    larger = [Shape(128, (64, 64), 3, 8, 4), Shape(32, (96, 96), 4, 12, 6), Shape(64, (64, 64), 3, 16, 8)]
    return stages + [*larger, Shape(32, (96, 96), 3, 24, 12)] * settings.full


def gather(x: Tensor, window: int, shift: int) -> Tensor:
    """Roll and partition. [B, H, W, heads, head_dim] -> [B, nW, heads, N, head_dim]"""
    B, H, W, heads, head_dim = x.shape
    if shift:
        x = torch.roll(x, (-shift, -shift), (1, 2))
    x = x.reshape(B, H // window, window, W // window, window, heads, head_dim).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(B, -1, heads, window * window, head_dim)


def scatter(x: Tensor, space: Sequence[int], window: int, shift: int) -> Tensor:
    """Merge and roll back: the inverse of ``gather``."""
    B, _, heads, _, head_dim = x.shape
    H, W = space
    x = x.reshape(B, H // window, W // window, heads, window, window, head_dim).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(B, H, W, heads, head_dim)
    return torch.roll(x, (shift, shift), (1, 2)) if shift else x


def timm_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """The plain path of timm's ``WindowAttention``, with its mask made beforehand."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    if mask is not None:
        scores = scores + mask[:, None]
    return scores.softmax(-1) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """torch's fused attention: windows and heads as its heads, so that one bias with mask serves the batch.

    The bias has q's dtype: with another, cuDNN misread it before mid-2026.
    """
    nW = q.shape[1]
    added = bias.expand(nW, *bias.shape) if mask is None else bias + mask[:, None]
    out = F.scaled_dot_product_attention(*(x.flatten(1, 2) for x in (q, k, v)), attn_mask=added.flatten(0, 1))
    return out.unflatten(1, (nW, -1))


def flex_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    nW = q.shape[1]

    def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score + bias[h, i, j]
        return score if mask is None else score + mask[b % nW, i, j]

    return flex_attention(*(x.flatten(0, 1) for x in (q, k, v)), score_mod=score).unflatten(0, (-1, nW))


ATTENTIONS = {"timm": timm_attention, "sdpa": sdpa_attention, "flex": flex_attention}


def peers(
    shape: Shape, q: Tensor, settings: Settings, attentions: Mapping[str, Callable[..., Tensor]]
) -> dict[str, Implementation]:
    """What others would run, where the window divides the image: timm's formula, SDPA and FlexAttention."""
    if shape.padded:
        return {}
    _, space, _, window, shift, _ = shape
    mask = shift_mask(space, [window] * 2, [shift] * 2, -100.0, q.device).to(q.dtype) if shift else None

    def pack(tensors: Tensors) -> Tensors:
        k, v = (gather(tensors[name], window, shift) for name in "kv")
        return {**tensors, "k": k, "v": v}

    def unpack(results: Results) -> Results:
        dk, dv = (scatter(results[name], space, window, shift) for name in ("dk", "dv"))
        return {**results, "dk": dk, "dv": dv}

    def around(attention: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad_kv: None, **scale: Tensor) -> Tensor:
        return scatter(attention(gather(q, window, shift), k, v, bias, mask, **scale), space, window, shift)

    def peer(name: str, compiled: bool) -> Implementation:
        run = functools.partial(around, attentions[name])
        mode = settings.compiled if compiled else ""
        return Implementation(settings.compile(run) if compiled else run, pack, unpack, mode)

    found = {name: peer(name, False) for name in ("timm", "sdpa")}
    if settings.device.type == "cuda":
        found |= {f"{name}-compiled": peer(name, True) for name in ("timm", "flex")}
    return found


def pack_qkv(tensors: Tensors) -> Tensors:
    """q, k, v as one tensor, as a QKV projection leaves them."""
    others = {name: x for name, x in tensors.items() if name not in ("q", "k", "v")}
    return {"qkv": torch.stack([tensors[name] for name in "qkv"], -3), **others}


def unpack_qkv(results: Results) -> Results:
    dq, dk, dv = results["dqkv"].unbind(-3)
    return {**results, "dq": dq, "dk": dk, "dv": dv}


def definition(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad_kv: Tensor | None, window: int, shift: int) -> Tensor:
    scale = q.shape[-1] ** -0.5
    windows, shifts = [window] * 2, [shift] * 2
    return reference.window_attention(q, k, v, bias, pad_kv, windows, shifts, scale, "pad_roll", -100.0)[0]


def cases(settings: Settings) -> Iterator[Case]:
    for shape in shapes(settings):
        yield case("window_attention", shape, settings, definition, ATTENTIONS)


def case(
    op: str,
    shape: Shape,
    settings: Settings,
    definition: Callable[..., Tensor],
    attentions: Mapping[str, Callable[..., Tensor]],
    **scale: Tensor,
) -> Case:
    """One shape of ``op``; ``scale`` is the logit_scale of cosine attention."""
    q, k, v, bias, pad_kv, dout = attention_inputs(
        shape.space,
        (shape.window, shape.window),
        batch=shape.batch,
        heads=shape.heads,
        head_dim=shape.head_dim,
        dtype=settings.dtype,
        pad_kv=shape.padded,
        device=settings.device,
    )
    plain = functools.partial(definition, window=shape.window, shift=shape.shift)
    packed = getattr(swinops, f"{op}_qkvpacked")
    ours = functools.partial(packed, window_size=shape.window, shift_size=shape.shift)
    found = implementations(op, q, plain, ours, settings, pack=pack_qkv, unpack=unpack_qkv)
    found |= peers(shape, q, settings, attentions)
    unit = math.prod(q.shape) * q.itemsize
    # forward: q, k, v in, out out; backward: dout, q, k, v in, dq, dk, dv out; bias and log-sum-exp are small
    moved = {FORWARD: 4 * unit, BOTH: 11 * unit}
    tensors = {"q": q, "k": k, "v": v, **scale, "bias": bias, "pad_kv": pad_kv}
    return Case(op, str(shape), tensors, dout, plain, found, moved)
