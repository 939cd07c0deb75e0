"""LayerNorm on this package's kernels, alone and with the residual sum before or after it."""

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` over the last axis, with its parameters and numbers.

    Args:
        dim: Size of the last axis.
        eps: Added to the variance.
        feeds_projection: Under autocast, return the dtype that a projection would cast to at once, where
            ``torch.nn.LayerNorm`` returns float32 to be read again and rounded.
        backend: "auto", or one of ``swinops.backends.MODULES``.
    """

    def __init__(self, dim: int, eps: float = 1e-5, *, feeds_projection: bool = False, backend: str = "auto"):
        super().__init__(dim, eps=eps)
        self.feeds_projection = feeds_projection
        self.backend = backend

    def out_dtype(self, x: Tensor) -> torch.dtype | None:
        return projection_dtype(x) if self.feeds_projection else None

    def forward(self, x: Tensor) -> Tensor:
        """[*, dim] -> [*, dim]"""
        y: Tensor = torch.ops.swinops.layer_norm(x, self.weight, self.bias, self.eps, self.out_dtype(x), self.backend)[
            0
        ]
        return y


class AddLayerNorm(LayerNorm):
    """The residual sum of a pre-norm block and the norm that follows it, in one pass over memory."""

    def forward(self, x: Tensor, f: Tensor, sample_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """``s = x + sample_scale * f`` and its norm.

        Args:
            x, f: [B, *, dim]
            sample_scale: A factor for each sample, without gradient (see ``DropPath``). [B]

        Returns:
            s and norm(s), both [B, *, dim]
        """
        s, y, _, _ = torch.ops.swinops.add_layer_norm(
            x, f, sample_scale, self.weight, self.bias, self.eps, self.out_dtype(x), self.backend
        )
        return s, y


class LayerNormAdd(LayerNorm):
    """The norm of a branch and the residual sum that follows it, in one pass over memory: Swin V2's "res-post-norm".

    Weight and bias start at zero: a block of such branches starts as the identity.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, f: Tensor, sample_scale: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """``x + sample_scale * norm(f)``.

        Args:
            x, f: [B, *, dim]
            sample_scale: A factor for each sample, without gradient (see ``DropPath``). [B]

        Returns:
            [B, *, dim]
        """
        out: Tensor = torch.ops.swinops.layer_norm_add(
            x, f, sample_scale, self.weight, self.bias, self.eps, self.backend
        )[0]
        return out


def projection_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a projection of ``x``, or one with parameters like it, computes in, autocast included."""
    device = x.device.type
    if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
