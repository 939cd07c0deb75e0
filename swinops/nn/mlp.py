"""The feed-forward half of a transformer block."""

from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Module):
    """Linear, GELU (by the error function), Linear."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[*, dim] -> [*, dim]"""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y
