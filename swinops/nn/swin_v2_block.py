"""A block of Swin V2."""

from collections.abc import Sequence

from torch import Tensor, nn

from swinops.nn.cosine_attention import CosineWindowAttention
from swinops.nn.drop_path import DropPath
from swinops.nn.layer_norm import LayerNorm, LayerNormAdd
from swinops.nn.mlp import Mlp


class SwinV2Block(nn.Module):
    """``x = x + norm1(attn(x))``, then ``x + norm2(mlp(x))`` (arXiv 2111.09883, section 3.2).

    Both norms start at zero, and the block as the identity.

    Args:
        mlp_ratio: Hidden channels of the MLP, as a multiple of ``dim``.
        drop_path: Rate of stochastic depth.
        extra_norm: Normalise the sum too, with ``norm3``, which starts as every norm does.

    The rest is as in ``CosineWindowAttention``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int] = 0,
        *,
        pretrained_window_size: int | Sequence[int] = 0,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        extra_norm: bool = False,
        log_spaced: bool = True,
        pad_order: str = "pad_roll",
        backend: str = "auto",
    ):
        super().__init__()
        self.attn = CosineWindowAttention(
            dim,
            num_heads,
            window_size,
            shift_size,
            pretrained_window_size=pretrained_window_size,
            log_spaced=log_spaced,
            pad_order=pad_order,
            backend=backend,
        )
        self.norm1 = LayerNormAdd(dim, backend=backend)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.norm2 = LayerNormAdd(dim, backend=backend)
        self.norm3 = LayerNorm(dim, backend=backend) if extra_norm else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim]"""
        x = self.norm1(x, self.attn(x), self.drop_path(x))
        x = self.norm2(x, self.mlp(x), self.drop_path(x))
        x = self.norm3(x)
        return x
