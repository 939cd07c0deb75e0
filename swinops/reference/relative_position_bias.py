"""Relative position bias of Swin (arXiv 2103.14030, eq. 4): the definition."""

from collections.abc import Sequence

import torch
from torch import Tensor


def relative_position_index(window: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Row of the table for each pair (query, key) of a window's tokens. [N, N], int64"""
    tokens = torch.cartesian_prod(*[torch.arange(w, device=device) for w in window])
    offset = tokens[:, None] - tokens[None, :] + torch.tensor([w - 1 for w in window], device=device)
    index = offset[..., 0]
    for axis in range(1, len(window)):
        index = index * (2 * window[axis] - 1) + offset[..., axis]
    return index


def relative_position_bias(table: Tensor, window: Sequence[int]) -> Tensor:
    """[prod(2M - 1), heads] -> [heads, N, N]"""
    return table[relative_position_index(window, table.device)].permute(2, 0, 1).contiguous()


def relative_position_bias_backward(dbias: Tensor, window: Sequence[int]) -> Tensor:
    """[heads, N, N] -> [prod(2M - 1), heads]: the gradient of a row is the sum over the pairs that read it."""
    index = relative_position_index(window, dbias.device).flatten()
    rows = torch.Size([2 * w - 1 for w in window]).numel()
    # summed in fp32 at least: a row of a large window adds thousands of pairs
    wide = dbias.flatten(1).to(torch.promote_types(dbias.dtype, torch.float32))
    dtable = wide.new_zeros(dbias.shape[0], rows).index_add(1, index, wide)
    return dtable.t().to(dbias.dtype).contiguous()
