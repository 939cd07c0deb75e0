"""A block of Swin V1."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swinops.nn.drop_path import DropPath
from swinops.nn.layer_norm import AddLayerNorm, LayerNorm
from swinops.nn.mlp import Mlp
from swinops.nn.window_attention import WindowAttention


class SwinBlock(nn.Module):
    """``x = x + attn(norm1(x))``, then ``x + mlp(norm2(x))`` (arXiv 2103.14030, eq. 3).

    Args:
        mlp_ratio: Hidden channels of the MLP, as a multiple of ``dim``.
        drop_path: Rate of stochastic depth.

    The rest is as in ``WindowAttention``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int] = 0,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        pad_order: str = "pad_roll",
        backend: str = "auto",
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim, feeds_projection=True, backend=backend)
        self.attn = WindowAttention(
            dim, num_heads, window_size, shift_size, pad_order=pad_order, backend=backend
        )  # fmt: skip
        self.norm2 = AddLayerNorm(dim, feeds_projection=True, backend=backend)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim]"""
        x, h = self.norm2(x, self.attn(self.norm1(x)), self.drop_path(x))
        f, scale = self.mlp(h), self.drop_path(x)
        return x + f if scale is None else torch.addcmul(x, f, scale.view(-1, *[1] * (x.dim() - 1)))
