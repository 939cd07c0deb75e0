"""mmsegmentation's and mmdetection's: a single window is shifted, too."""

import torch
from torch import nn
from torch.nn import functional as F

from ..microsoft_swin.common import Attention, DropPath, per_axis


class WindowMSA(Attention):
    def __init__(
        self, embed_dims, num_heads, window_size, qkv_bias=True, qk_scale=None, attn_drop_rate=0.0, proj_drop_rate=0.0
    ):
        super().__init__(embed_dims, window_size, num_heads, qkv_bias, attn_drop_rate, proj_drop_rate)
        self.embed_dims, self.scale = embed_dims, qk_scale or (embed_dims // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size[0] - 1) ** 2, num_heads))

    def forward(self, x, mask=None):
        """[B * nW, N, C] -> [B * nW, N, C]"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        scores = q * self.scale @ k.transpose(-2, -1) + bias
        if mask is not None:
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1)).flatten(0, 1)
        x = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class ShiftWindowMSA(nn.Module):
    def __init__(self, embed_dims, num_heads, window_size, shift_size=0, drop_path_rate=0.0, **options):
        super().__init__()
        self.window_size, self.shift_size = window_size, shift_size
        self.w_msa = WindowMSA(embed_dims, num_heads, per_axis(window_size), **options)
        self.drop = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, query, hw_shape):
        """[B, H * W, C] -> [B, H * W, C]"""
        (H, W), M, s = hw_shape, self.window_size, self.shift_size
        assert query.shape[1] == H * W, "input feature has wrong size"
        x = F.pad(query.view(-1, H, W, query.shape[2]), (0, 0, 0, -W % M, 0, -H % M))
        padded, mask = x.shape[1:3], None
        if s > 0:
            regions = torch.zeros(1, *padded, 1, device=x.device)
            for axis in (1, 2):
                for start in (M, s):
                    regions.transpose(1, axis)[:, slice(-start, None)] += 3 ** (axis - 1)
            regions = self.window_partition(regions).reshape(-1, M * M)
            different = regions.unsqueeze(1) != regions.unsqueeze(2)
            mask = torch.zeros(different.shape, device=x.device).masked_fill(different, -100.0)
            x = torch.roll(x, (-s, -s), (1, 2))
        x = self.window_reverse(self.w_msa(self.window_partition(x).flatten(1, 2), mask=mask), *padded)
        x = torch.roll(x, (s, s), (1, 2)) if s > 0 else x
        return self.drop(x[:, :H, :W].flatten(1, 2))

    def window_reverse(self, windows, H, W):
        """[B * nW, N, C] -> [B, H, W, C]"""
        M = self.window_size
        B = int(windows.shape[0] / (H // M * (W // M)))  # which fixes the batch of an exported model
        return windows.view(B, H // M, W // M, M, M, -1).transpose(2, 3).reshape(B, H, W, -1)

    def window_partition(self, x):
        """[B, H, W, C] -> [B * nW, M, M, C]"""
        (B, H, W, C), M = x.shape, self.window_size
        return x.view(B, H // M, M, W // M, M, C).transpose(2, 3).reshape(-1, M, M, C)
