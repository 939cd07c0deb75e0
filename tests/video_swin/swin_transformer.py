"""The paper's video model. Everything is [B, D, H, W, C] within a stage and [B, C, D, H, W] between stages."""

import functools

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint


def window_partition(x, window):
    """[B, D, H, W, C] -> [B * nW, N, C]"""
    B, D, H, W, C = x.shape
    Md, Mh, Mw = window
    x = x.view(B, D // Md, Md, H // Mh, Mh, W // Mw, Mw, C)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, Md * Mh * Mw, C)


def window_reverse(x, window, B, D, H, W):
    """[B * nW, Md, Mh, Mw, C] -> [B, D, H, W, C]"""
    Md, Mh, Mw = window
    x = x.view(B, D // Md, H // Mh, W // Mw, Md, Mh, Mw, -1)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(B, D, H, W, -1)


def get_window_size(size, window, shift):
    """An axis that is not larger than the window is the window, and is not shifted."""
    larger = [n > w for n, w in zip(size, window, strict=True)]
    window = tuple(w if yes else n for yes, n, w in zip(larger, size, window, strict=True))
    return window, tuple(s if yes else 0 for yes, s in zip(larger, shift, strict=True))


@functools.lru_cache
def compute_mask(D, H, W, window_size, shift_size, device):
    """-100 for a pair of a window's tokens that the shift brought together from two sides of the video. [nW, N, N]"""
    regions = torch.zeros((), device=device)
    for size, M, shift in zip((D, H, W), window_size, shift_size, strict=True):
        axis = torch.arange(size, device=device)
        regions = 3 * regions[..., None] + (axis >= size - M).float() * (1 + (axis >= size - shift).float())
    regions = window_partition(regions[None, ..., None], window_size).squeeze(-1)
    return -100.0 * (regions[:, :, None] != regions[:, None, :]).float()


class Mlp(nn.Module):
    def __init__(self, dim, hidden, drop):
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim), drop

    def forward(self, x):
        x = F.dropout(self.act(self.fc1(x)), self.drop, self.training)
        return F.dropout(self.fc2(x), self.drop, self.training)


class WindowAttention3D(nn.Module):
    def __init__(self, dim, window_size, num_heads, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.window_size, self.num_heads = window_size, num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        Md, Mh, Mw = (2 * M - 1 for M in window_size)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(Md * Mh * Mw, num_heads))
        # a difference of two tokens' places in the table is the row of their offset, but for the middle row
        places = torch.cartesian_prod(*map(torch.arange, window_size)) @ torch.tensor([Mh * Mw, Mw, 1])
        self.register_buffer("relative_position_index", places[:, None] - places + Md * Mh * Mw // 2)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, mask=None):
        """[B * nW, N, C] -> [B * nW, N, C]"""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        rows = self.relative_position_index[:N, :N].reshape(-1)
        bias = self.relative_position_bias_table[rows].reshape(N, N, -1).permute(2, 0, 1)
        attn = self.scale * q @ k.transpose(-2, -1) + bias
        if mask is not None:
            attn = attn.view(-1, mask.shape[0], self.num_heads, N, N) + mask.unsqueeze(1)
            attn = attn.view(B, self.num_heads, N, N)
        attn = self.attn_drop(self.softmax(attn))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(B, N, C)))


class SwinTransformerBlock3D(nn.Module):
    def __init__(
        self, dim, num_heads, window_size=(2, 7, 7), shift_size=(0, 0, 0), mlp_ratio=4.0, qkv_bias=True, qk_scale=None,
        drop=0.0, attn_drop=0.0, use_checkpoint=False,
    ):  # fmt: skip
        super().__init__()
        self.dim, self.num_heads, self.window_size, self.shift_size = dim, num_heads, window_size, shift_size
        self.use_checkpoint = use_checkpoint
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention3D(dim, window_size, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward_part1(self, x, mask_matrix):
        """The attention branch; pads come before the shift."""
        B, D, H, W, C = x.shape
        window, shift = get_window_size((D, H, W), self.window_size, self.shift_size)
        Md, Mh, Mw = window
        x = F.pad(self.norm1(x), (0, 0, 0, -W % Mw, 0, -H % Mh, 0, -D % Md))
        padded, shifts = x.shape[1:-1], any(shift)
        if shifts:
            x = torch.roll(x, [-s for s in shift], (1, 2, 3))
        x = self.attn(window_partition(x, window), mask_matrix if shifts else None)
        x = window_reverse(x.view(-1, *window, C), window, B, *padded)
        if shifts:
            x = torch.roll(x, shift, (1, 2, 3))
        return x[:, :D, :H, :W].contiguous()

    def forward_part2(self, x):
        return self.drop_path(self.mlp(self.norm2(x)))

    def forward(self, x, mask_matrix):
        if self.use_checkpoint:
            x = x + self.drop_path(checkpoint.checkpoint(self.forward_part1, x, mask_matrix, use_reentrant=False))
            return x + checkpoint.checkpoint(self.forward_part2, x, use_reentrant=False)
        x = x + self.drop_path(self.forward_part1(x, mask_matrix))
        return x + self.forward_part2(x)


class PatchMerging(nn.Module):
    """Of each image of the video."""

    def __init__(self, dim):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        quarters = [x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(quarters, -1)))


class Layer(nn.Module):
    def __init__(self, dim, depth, num_heads, window_size=(1, 7, 7), downsample=None, use_checkpoint=False, **options):
        super().__init__()
        self.window_size = window_size
        self.shift_size = tuple(M // 2 for M in window_size)
        self.depth, self.use_checkpoint = depth, use_checkpoint
        shifts = [self.shift_size if i % 2 else (0, 0, 0) for i in range(depth)]
        self.blocks = nn.ModuleList(
            SwinTransformerBlock3D(dim, num_heads, window_size, shift, use_checkpoint=use_checkpoint, **options)
            for shift in shifts
        )
        self.downsample = downsample
        if downsample is not None:
            self.downsample = downsample(dim)


class BasicLayer(Layer):
    def forward(self, x):
        D, H, W = x.shape[2:]
        window, shift = get_window_size((D, H, W), self.window_size, self.shift_size)
        Md, Mh, Mw = window
        mask = compute_mask(D + -D % Md, H + -H % Mh, W + -W % Mw, window, shift, x.device)
        x = x.permute(0, 2, 3, 4, 1)
        for block in self.blocks:
            x = block(x, mask)
        if self.downsample is not None:
            x = self.downsample(x)
        return x.permute(0, 4, 1, 2, 3)


class PatchEmbed3D(nn.Module):
    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_chans, dim, patch_size, patch_size)

    def forward(self, x):
        D, H, W = x.shape[2:]
        pd, ph, pw = self.patch_size
        return self.proj(F.pad(x, (0, -W % pw, 0, -H % ph, 0, -D % pd)))


class SwinTransformer3D(nn.Module):
    """Video [B, in_chans, D, H, W] to the feature map of its last stage."""

    def __init__(
        self, patch_size=(4, 4, 4), in_chans=3, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24),
        window_size=(2, 7, 7), layer=BasicLayer, attn_drop_rate=0.0, **options,
    ):  # fmt: skip
        super().__init__()
        self.patch_embed = PatchEmbed3D(patch_size, in_chans, embed_dim)
        self.layers = nn.ModuleList(
            layer(
                embed_dim * 2**i, depth, heads, window_size, PatchMerging if i + 1 < len(depths) else None,
                attn_drop=attn_drop_rate, **options,
            )
            for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True))
        )  # fmt: skip
        self.norm = nn.LayerNorm(embed_dim * 2 ** (len(depths) - 1))

    def forward(self, x):
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x.contiguous())
        return self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
