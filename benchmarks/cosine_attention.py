"""Scaled cosine attention: what ``window_attention`` is measured on and against, with Swin V2's windows and formula."""

import math
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from swinops import reference
from swinops.benchmarks import window_attention
from swinops.benchmarks.harness import Case, Settings
from swinops.benchmarks.window_attention import Shape, flex_attention, sdpa_attention
from swinops.testing import logit_scales


def shapes(settings: Settings) -> list[Shape]:
    if settings.quick:
        return [Shape(1, (16, 16), 2, 8, 4, 16)]
    if settings.device.type == "cpu":
        return [Shape(1, (32, 32), 6, 8, 4), Shape(1, (30, 26), 6, 8, 4)]
    # the four stages of SwinV2-T at 256, with and without a shift, and one image size that the window does not divide
    stages = []
    for s in range(4):
        stages += [Shape(128, (64 >> s, 64 >> s), 3 << s, 8, shift) for shift in ((0, 4) if s < 3 else (0,))]
    stages.append(Shape(128, (60, 60), 3, 8, 4))
    larger = [Shape(32, (96, 96), 4, 12, 6), Shape(64, (64, 64), 3, 16, 8)]
    return stages + [*larger, Shape(32, (96, 96), 3, 24, 12)] * settings.full


def scale_of(logit_scale: Tensor) -> Tensor:
    return logit_scale.clamp(max=math.log(100)).exp().view(-1, 1, 1)


def timm_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, logit_scale: Tensor
) -> Tensor:  # fmt: skip
    """The formula of timm's Swin V2, with its mask and its bias made beforehand."""
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * scale_of(logit_scale).to(q.dtype) + bias
    if mask is not None:
        scores = scores + mask[:, None]
    return scores.softmax(-1) @ v


def normalised(fused: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Fused attention on normalised q and k, the scale in q; it divides by the root of head_dim, which is undone."""

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, logit_scale: Tensor) -> Tensor:
        scale = scale_of(logit_scale).to(q.dtype) * q.shape[-1] ** 0.5
        return fused(F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v, bias, mask)

    return run


ATTENTIONS = {"timm": timm_attention, "sdpa": normalised(sdpa_attention), "flex": normalised(flex_attention)}


def definition(
    q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor, bias: Tensor, pad_kv: Tensor | None, window: int, shift: int
) -> Tensor:
    windows, shifts = [window] * 2, [shift] * 2
    return reference.cosine_attention(q, k, v, logit_scale, bias, pad_kv, windows, shifts, "pad_roll", -100.0)[0]


def cases(settings: Settings) -> Iterator[Case]:
    for shape in shapes(settings):
        logit_scale = logit_scales(shape.heads, device=settings.device)
        yield window_attention.case(
            "cosine_attention", shape, settings, definition, ATTENTIONS, logit_scale=logit_scale
        )  # fmt: skip
