"""From pixels to tokens, and from tokens to fewer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swinops.nn.layer_norm import LayerNorm
from swinops.ops.arguments import per_axis


class PatchEmbed(nn.Module):
    """Project the patches of an image to tokens and normalise them; an image is padded to whole patches."""

    def __init__(self, patch_size: int | Sequence[int], in_chans: int, dim: int, *, backend: str = "auto"):
        super().__init__()
        height, width = per_axis(patch_size, 2, "patch_size")
        if min(height, width) < 1:
            raise ValueError(f"patch_size must be at least 1, got {patch_size}")
        self.patch_size = height, width
        self.proj = nn.Conv2d(in_chans, dim, self.patch_size, self.patch_size)
        self.norm = LayerNorm(dim, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, ceil(H / patch), ceil(W / patch), dim]"""
        if x.dim() != 4 or x.shape[1] != self.proj.in_channels:
            raise ValueError(f"x must be [B, {self.proj.in_channels}, H, W], got {tuple(x.shape)}")
        bottom, right = (-size % patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True))
        # compiled, a branch on sizes would be a graph more
        if torch.compiler.is_compiling() or bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        x = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return x


class PatchMerging(nn.Module):
    """Join 2 x 2 neighbours, normalise and project to ``out_dim`` channels (arXiv 2103.14030, section 3.1).

    Channels are joined in the published order: the upper left token, the one below it, the one right of it, the last.
    """

    def __init__(self, dim: int, out_dim: int, *, backend: str = "auto"):
        super().__init__()
        self.norm = MergingNorm(4 * dim, feeds_projection=True, backend=backend)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, ceil(H / 2), ceil(W / 2), out_dim]"""
        x = self.reduction(self.norm(x))
        return x


class PatchMergingV2(nn.Module):
    """Join 2 x 2 neighbours, in the order of ``PatchMerging``, project to ``out_dim`` channels and normalise those."""

    def __init__(self, dim: int, out_dim: int, *, backend: str = "auto"):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.norm = LayerNorm(out_dim, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, ceil(H / 2), ceil(W / 2), out_dim]"""
        B, H, W, C = x.shape
        # so that 2 * h is seen to be the padded size where H is a symbol
        h, w = (H + 1) // 2, (W + 1) // 2
        # compiled, a branch on sizes would be a graph more
        if torch.compiler.is_compiling() or 2 * h > H or 2 * w > W:
            x = F.pad(x, (0, 0, 0, 2 * w - W, 0, 2 * h - H))
        x = x.reshape(B, h, 2, w, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)
        x = self.norm(self.reduction(x))
        return x


class MergingNorm(LayerNorm):
    """The gather of patch merging and its norm, in one pass over memory."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim / 4] -> [B, ceil(H / 2), ceil(W / 2), dim]"""
        y: Tensor = torch.ops.swinops.patch_merging_norm(
            x, self.weight, self.bias, self.eps, self.out_dtype(x), self.backend
        )[0]
        return y
