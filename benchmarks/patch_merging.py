"""Patch merging up to its projection, beside what every published Swin does: four slices, cat, LayerNorm."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import swinops
from swinops.benchmarks.harness import BOTH, FORWARD, Case, Settings, implementations
from swinops.testing import norm_inputs, random_tensor


def shapes(settings: Settings) -> list[tuple[int, int, int]]:
    """Batch, side of the image, channels."""
    if settings.quick:
        return [(1, 14, 32)]
    if settings.device.type == "cpu":
        return [(2, 56, 96)]
    # after the first three stages of Swin-T at 224; and one image of odd size
    swin_t = [(128, 56 >> s, 96 << s) for s in range(3)] + [(128, 55, 96)]
    return swin_t + [(32, 96, 128), (32, 24, 512)] * settings.full


def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _, H, W, _ = x.shape
    if H % 2 or W % 2:
        x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
    merged = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
    return F.layer_norm(merged, merged.shape[-1:], weight, bias)


def cases(settings: Settings) -> Iterator[Case]:
    for batch, side, channels in shapes(settings):
        size = (batch, side, side, channels)
        tensors = norm_inputs(size, merged=True, dtype=settings.dtype, device=settings.device)
        half = (side + 1) // 2
        dout = random_tensor((batch, half, half, 4 * channels), 9, settings.dtype, settings.device)
        contenders = implementations("patch_merging_norm", dout, definition, swinops.patch_merging_norm, settings)
        image, merged = batch * side**2 * channels * dout.itemsize, dout.nbytes
        # forward: x in, y out; backward: dy, x in, dx out; the sums and the statistics of rows are small
        moved = {FORWARD: image + merged, BOTH: 3 * image + 2 * merged}
        yield Case("patch_merging_norm", " x ".join(map(str, size)), tensors, dout, definition, contenders, moved)
