"""mmpretrain's: for V1 and V2, and an image of one window is shifted only with ``pad_small_map``."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from ..microsoft_swin.common import Attention, DropPath, coordinates, per_axis


class WindowMSA(Attention):
    def __init__(self, embed_dims, window_size, num_heads, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0):
        super().__init__(embed_dims, window_size, num_heads, qkv_bias, attn_drop, proj_drop)
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


class WindowMSAV2(Attention):
    """It does not keep the window that its coordinates are for."""

    def __init__(
        self, embed_dims, window_size, num_heads, qkv_bias=True, attn_drop=0.0, proj_drop=0.0, cpb_mlp_hidden_dims=512,
        pretrained_window_size=(0, 0),
    ):  # fmt: skip
        super().__init__(embed_dims, window_size, num_heads, False, attn_drop, proj_drop)
        self.embed_dims, hidden = embed_dims, cpb_mlp_hidden_dims
        self.cpb_mlp = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, num_heads, False))
        self.register_buffer("relative_coords_table", coordinates(window_size, pretrained_window_size).float())
        self.logit_scale = nn.Parameter(torch.zeros(num_heads, 1, 1))
        self.q_bias = nn.Parameter(torch.zeros(embed_dims)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(embed_dims)) if qkv_bias else None

    def forward(self, x, mask=None):
        """[B * nW, N, C] -> [B * nW, N, C]"""
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(self.logit_scale, max=math.log(100)).exp()
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        scores = scores + 16 * torch.sigmoid(table[self.relative_position_index].permute(2, 0, 1))
        if mask is not None:
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1)).flatten(0, 1)
        x = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class ShiftWindowMSA(nn.Module):
    def __init__(
        self, embed_dims, num_heads, window_size, shift_size=0, drop_path_rate=0.0, pad_small_map=False,
        window_msa=WindowMSA, **options,
    ):  # fmt: skip
        super().__init__()
        self.window_size, self.shift_size, self.pad_small_map = window_size, shift_size, pad_small_map
        self.w_msa = window_msa(embed_dims, per_axis(window_size), num_heads, **options)
        self.drop = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, query, hw_shape):
        """[B, H * W, C] -> [B, H * W, C]"""
        (H, W), M, s = hw_shape, self.window_size, self.shift_size
        assert query.shape[1] == H * W, "input feature has wrong size"
        if not self.pad_small_map:
            assert min(H, W) >= M, f"an image of {H} x {W} is smaller than the window; set pad_small_map=True"
            s = s if min(H, W) > M else 0
        x = F.pad(query.view(-1, H, W, query.shape[2]), (0, 0, 0, -W % M, 0, -H % M))
        padded = x.shape[1:3]
        mask = self.get_attn_mask(padded, window_size=M, shift_size=s, device=x.device)
        x = self.w_msa(self.window_partition(torch.roll(x, (-s, -s), (1, 2)), M).flatten(1, 2), mask=mask)
        x = torch.roll(self.window_reverse(x, *padded, M), (s, s), (1, 2))
        return self.drop(x[:, :H, :W].flatten(1, 2))

    @staticmethod
    def window_reverse(windows, H, W, window_size):
        """[B * nW, N, C] -> [B, H, W, C]"""
        M = window_size
        B = int(windows.shape[0] / (H // M * (W // M)))  # which fixes the batch of an exported model
        return windows.view(B, H // M, W // M, M, M, -1).transpose(2, 3).reshape(B, H, W, -1)

    @staticmethod
    def window_partition(x, window_size):
        """[B, H, W, C] -> [B * nW, M, M, C]"""
        (B, H, W, C), M = x.shape, window_size
        return x.view(B, H // M, M, W // M, M, C).transpose(2, 3).reshape(-1, M, M, C)

    @staticmethod
    def get_attn_mask(hw_shape, window_size, shift_size, device=None):
        """[nW, N, N]"""
        if shift_size == 0:
            return None
        regions = torch.zeros(1, *hw_shape, 1, device=device)
        for axis in (1, 2):
            for start in (window_size, shift_size):
                regions.transpose(1, axis)[:, slice(-start, None)] += 3 ** (axis - 1)
        regions = ShiftWindowMSA.window_partition(regions, window_size).reshape(-1, window_size**2)
        different = regions.unsqueeze(1) != regions.unsqueeze(2)
        return torch.zeros(different.shape, device=device).masked_fill(different, -100.0)
