"""Stochastic depth (arXiv 1603.09382)."""

from torch import Tensor, nn


class DropPath(nn.Module):
    """Draws which samples skip a residual branch: the branch is scaled by 0, or by 1 / (1 - rate), in training.

    The factor is returned and not applied, for the kernel that adds the branch to apply.
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"rate must be at least 0 and less than 1, got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor | None:
        """A factor for each sample of ``x`` [B, ...]; None where every factor is 1. [B], x's dtype"""
        if self.rate == 0 or not self.training:
            return None
        return x.new_empty(x.shape[0]).bernoulli_(1 - self.rate).div_(1 - self.rate)

    def extra_repr(self) -> str:
        return f"{self.rate:.3g}"
