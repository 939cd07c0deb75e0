"""Shifted-window attention (arXiv 2103.14030, section 3.2): the definition.

    out = softmax(scale * q k^T + bias + mask) v      within each window of the shifted image

An image whose size the window does not divide is padded. Pad tokens are keys that nobody masks, with the key and value
``pad_kv``, and never queries. The mask adds ``mask_value`` between tokens that were not neighbours before the shift;
its regions are counted on the padded image.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from swinops.reference.cyclic_shift import window_merge, window_partition


def padded_size(size: Sequence[int], window: Sequence[int]) -> list[int]:
    return [-(-n // w) * w for n, w in zip(size, window, strict=True)]


def to_windows(x: Tensor, fill: Tensor | None, window: Sequence[int], shift: Sequence[int], pad_order: str) -> Tensor:
    """[B, *space, heads, head_dim] -> [B * nW, heads, N, head_dim]; pads are ``fill`` [heads, head_dim] or zero."""
    space = x.shape[1:-2]
    fill = x.new_zeros(x.shape[-2:]) if fill is None else fill.to(x.dtype)
    if pad_order == "roll_pad":
        x = torch.roll(x, [-s for s in shift], list(range(1, 1 + len(space))))
        shift = [0] * len(shift)
    for axis, (size, padded) in enumerate(zip(space, padded_size(space, window), strict=True), start=1):
        if padded > size:
            x = torch.cat([x, fill.expand(*x.shape[:axis], padded - size, *x.shape[axis + 1 :])], axis)
    windows = window_partition(x.flatten(-2), window, shift)
    return windows.reshape(windows.shape[0], math.prod(window), *x.shape[-2:]).transpose(1, 2)


def from_windows(
    x: Tensor, space: Sequence[int], window: Sequence[int], shift: Sequence[int], pad_order: str
) -> tuple[Tensor, Tensor]:
    """[B * nW, heads, N, head_dim] -> [B, *space, heads, head_dim], and the sum over the pads [heads, head_dim]."""
    heads, head_dim = x.shape[1], x.shape[-1]
    windows = x.transpose(1, 2).reshape(x.shape[0], *window, heads * head_dim)
    padded = window_merge(windows, padded_size(space, window), shift if pad_order == "pad_roll" else [0] * len(shift))
    inside = (slice(None), *[slice(n) for n in space])
    image = padded[inside]
    if pad_order == "roll_pad":
        image = torch.roll(image, list(shift), list(range(1, 1 + len(space))))
    pads = padded.clone()
    pads[inside] = 0
    return image.unflatten(-1, (heads, head_dim)).contiguous(), pads.flatten(0, -2).sum(0).view(heads, head_dim)


def shift_mask(
    space: Sequence[int], window: Sequence[int], shift: Sequence[int], value: float, device: torch.device
) -> Tensor:
    """``value`` where two tokens of a window were not neighbours before the shift, 0 elsewhere. [nW, N, N]"""
    region = torch.zeros(1, *padded_size(space, window), 1, device=device, dtype=torch.int64)
    for axis, (w, s) in enumerate(zip(window, shift, strict=True), start=1):
        size = region.shape[axis]
        position = torch.arange(size, device=device)
        # the slices (0, -w), (-w, -s), (-s, None); without a shift the whole axis is one region
        axis_region = (position >= size - w).long() + (position >= size - s).long() if s else torch.zeros_like(position)
        region = region * 3 + axis_region.view([-1 if a == axis else 1 for a in range(region.dim())])
    windows = window_partition(region, window, [0] * len(shift)).flatten(1)
    return torch.where(windows[:, :, None] != windows[:, None, :], value, 0.0)


class Windows:
    """The windows of a call: reading them, from scores to probabilities and back, and writing them."""

    def __init__(
        self,
        q: Tensor,
        window: Sequence[int],
        shift: Sequence[int],
        pad_order: str,
        mask_value: float,
        bias: Tensor | None,
        pad_kv: Tensor | None,
    ) -> None:
        self.space = q.shape[1:-2]
        self.geometry = window, shift, pad_order
        self.pads = None, *((None, None) if pad_kv is None else pad_kv)
        self.bias = bias
        self.mask = shift_mask(self.space, window, shift, mask_value, q.device) if any(shift) else None

    def read(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """[B, *space, heads, head_dim] -> [B * nW, heads, N, head_dim], with pads"""
        return tuple(to_windows(x, fill, *self.geometry) for x, fill in zip((q, k, v), self.pads, strict=True))

    def read_gradient(self, dout: Tensor) -> Tensor:
        return to_windows(dout, None, *self.geometry)

    def write(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B * nW, heads, N, head_dim] -> [B, *space, heads, head_dim], and the sum over the pads [heads, head_dim]"""
        return from_windows(x, self.space, *self.geometry)

    def biased(self, scores: Tensor) -> Tensor:
        """Scores in fp32 at least, with bias and mask. [B * nW, heads, N, N]"""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.bias is not None:
            scores = scores + self.bias.to(scores.dtype)
        if self.mask is not None:
            images = -1 if len(scores) else 0
            scores = scores.unflatten(0, (images, len(self.mask))) + self.mask[:, None].to(scores.dtype)
            scores = scores.flatten(0, 1)
        return scores

    def attend(self, scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Biased scores and values -> out [B, *space, heads, head_dim] and the log2-sum-exp [B, *space, heads]."""
        p = scores.softmax(-1).to(v.dtype)
        lse = scores.logsumexp(-1, keepdim=True) / math.log(2)
        return self.write(p @ v)[0], self.write(lse)[0].squeeze(-1)

    def attend_backward(self, dout: Tensor, scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of biased scores and values: dv = p^T dout,  dp = dout v^T,  ds = p * (dp - sum_j p dp)."""
        p = scores.softmax(-1)
        dp = (dout @ v.transpose(-1, -2)).to(p.dtype)
        return p * (dp - (p * dp).sum(-1, keepdim=True)), p.to(v.dtype).transpose(-1, -2) @ dout


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    pad_kv: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    pad_order: str,
    mask_value: float,
) -> tuple[Tensor, Tensor]:
    """[B, *space, heads, head_dim] thrice -> out, of that shape, and the scores' log2-sum-exp [B, *space, heads]."""
    windows = Windows(q, window, shift, pad_order, mask_value, bias, pad_kv)
    q, k, v = windows.read(q, k, v)
    return windows.attend(windows.biased((q * scale) @ k.transpose(-1, -2)), v)


def window_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    pad_kv: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    dpad_kv: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    pad_order: str,
    mask_value: float,
) -> None:
    """Fill the gradients from the explicit formula, which needs neither ``out`` nor ``lse``: they are for kernels.

    With ds, the gradient of the scores:  dq = scale * ds k,  dk = scale * ds^T q,  dbias = ds summed over windows
    """
    windows = Windows(q, window, shift, pad_order, mask_value, bias, pad_kv)
    q, k, v = windows.read(q, k, v)
    ds, dvw = windows.attend_backward(windows.read_gradient(dout), windows.biased((q * scale) @ k.transpose(-1, -2)), v)
    if dbias is not None:
        dbias.copy_(ds.sum(0))
    ds = (ds * scale).to(q.dtype)
    fill_gradients(windows, (ds @ k, ds.transpose(-1, -2) @ q, dvw), (dq, dk, dv), dpad_kv)


def fill_gradients(
    windows: Windows, gradients: Sequence[Tensor], images: Sequence[Tensor], dpad_kv: Tensor | None
) -> None:
    """Write those of the windows' q, k and v to the images', and the sums over pads to ``dpad_kv``."""
    pads = []
    for gradient, image in zip(gradients, images, strict=True):
        written, pad = windows.write(gradient)
        image.copy_(written)
        pads.append(pad)
    if dpad_kv is not None:
        dpad_kv.copy_(torch.stack(pads[1:]))
