"""Microsoft's Swin Transformer, V1 and V2, as a stand-in: what the classification models compute, in plain PyTorch.

microsoft/Swin-Transformer is on no package registry, so its structure is written down here: names, order and shapes of
parameters and buffers (the index and the masks are saved), patch merging at the end of a stage, masks and windows that
are fixed when the model is built, for images of one size, and a window cut to a feature map that is not larger.

``pad=True`` is what V1's detection models add for sizes that the window does not divide: zeros below and right of the
image and of each block's tokens, padded first and shifted then. They cut no window, and shift even a single one.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def per_axis(size):
    return (size, size) if isinstance(size, int) else tuple(size)


def windows(x, M):
    """[B, H, W, C] -> [B * nW, M * M, C]"""
    B, H, W, C = x.shape
    return x.view(B, H // M, M, W // M, M, C).transpose(2, 3).reshape(-1, M * M, C)


def image(x, M, H, W):
    """[B * nW, M * M, C] -> [B, H, W, C]"""
    return x.view(-1, H // M, W // M, M, M, x.shape[-1]).transpose(2, 3).reshape(-1, H, W, x.shape[-1])


def position_index(M):
    """Row of the bias table for each pair (query, key). [M * M, M * M]"""
    y, x = torch.arange(M).repeat_interleave(M), torch.arange(M).repeat(M)
    return (y[:, None] - y + M - 1) * (2 * M - 1) + (x[:, None] - x + M - 1)


def coordinates(window, pretrained=(0, 0)):
    """V2's for each offset between two tokens, log-spaced, relative to the pretrained window. [1, 2Mh-1, 2Mw-1, 2]"""

    def axis(M, of):
        x = 8 * torch.arange(1 - M, M, dtype=torch.float64) / max((of or M) - 1, 1)
        return x.sign() * (1 + x.abs()).log2() / 3

    shape = 1, *(2 * M - 1 for M in window), 2
    return torch.cartesian_prod(*map(axis, window, pretrained)).view(shape)


def shift_mask(H, W, M, shift):
    """-100 for a pair of a window's tokens that the shift brought together from two sides of the image. [nW, N, N]"""

    def region(size):
        return torch.bucketize(torch.arange(size), torch.tensor([size - M, size - shift]), right=True)

    regions = windows((3 * region(H)[:, None] + region(W)).view(1, H, W, 1), M).squeeze(-1)
    return -100.0 * (regions[:, None, :] != regions[:, :, None]).float()


class WindowAttention(nn.Module):
    def __init__(self, dim, window_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", position_index(window_size))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask):
        """[B * nW, N, C] -> [B * nW, N, C]"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class WindowAttentionV2(nn.Module):
    def __init__(self, dim, window_size, num_heads):
        super().__init__()
        self.num_heads, self.window_size = num_heads, (window_size, window_size)
        self.logit_scale = nn.Parameter(torch.zeros(num_heads, 1, 1))
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("relative_coords_table", coordinates(self.window_size).float())
        self.register_buffer("relative_position_index", position_index(window_size))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask):
        """[B * nW, N, C] -> [B * nW, N, C]"""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        scores = cosines * self.logit_scale.clamp(max=math.log(100)).exp()
        scores = scores + 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid()
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwinTransformerBlock(nn.Module):
    Attention = WindowAttention

    def __init__(self, dim, resolution, num_heads, window_size, shift, mlp_ratio, pad):
        super().__init__()
        if min(resolution) <= window_size and not pad:
            window_size, shift = min(resolution), 0
        self.resolution, self.window_size, self.shift = resolution, window_size, shift
        self.below, self.right = (-size % window_size if pad else 0 for size in resolution)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = self.Attention(dim, window_size, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        padded = resolution[0] + self.below, resolution[1] + self.right
        self.register_buffer("attn_mask", shift_mask(*padded, window_size, shift) if shift else None)

    def attend(self, x):
        """[B, H * W, C] -> [B, H * W, C]"""
        H, W = self.resolution
        x = F.pad(x.unflatten(1, (H, W)), (0, 0, 0, self.right, 0, self.below))
        Hp, Wp = x.shape[1:3]
        x = self.attn(windows(x.roll((-self.shift, -self.shift), (1, 2)), self.window_size), self.attn_mask)
        x = image(x, self.window_size, Hp, Wp).roll((self.shift, self.shift), (1, 2))[:, :H, :W]
        return x.flatten(1, 2)

    def forward(self, x):
        """[B, H * W, C] -> [B, H * W, C]"""
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SwinTransformerBlockV2(SwinTransformerBlock):
    Attention = WindowAttentionV2

    def forward(self, x):
        """[B, H * W, C] -> [B, H * W, C]"""
        x = x + self.norm1(self.attend(x))
        return x + self.norm2(self.mlp(x))


class PatchMerging(nn.Module):
    def __init__(self, dim, resolution, pad):
        super().__init__()
        assert pad or all(size % 2 == 0 for size in resolution), f"{resolution} is not even"
        self.resolution = resolution
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def merge(self, x):
        """[B, H * W, C] -> [B, ceil(H / 2) * ceil(W / 2), 4 * C]"""
        H, W = self.resolution
        x = F.pad(x.unflatten(1, (H, W)), (0, 0, 0, W % 2, 0, H % 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return x.flatten(1, 2)

    def forward(self, x):
        """[B, H * W, C] -> [B, ceil(H / 2) * ceil(W / 2), 2 * C]"""
        return self.reduction(self.norm(self.merge(x)))


class PatchMergingV2(PatchMerging):
    def __init__(self, dim, resolution, pad):
        super().__init__(dim, resolution, pad)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x):
        """[B, H * W, C] -> [B, ceil(H / 2) * ceil(W / 2), 2 * C]"""
        return self.norm(self.reduction(self.merge(x)))


class BasicLayer(nn.Module):
    Block, Merging = SwinTransformerBlock, PatchMerging

    def __init__(self, dim, resolution, depth, num_heads, window_size, mlp_ratio, pad, last):
        super().__init__()
        shifts = [0 if i % 2 == 0 else window_size // 2 for i in range(depth)]
        self.blocks = nn.ModuleList(
            self.Block(dim, resolution, num_heads, window_size, shift, mlp_ratio, pad) for shift in shifts
        )
        self.downsample = None if last else self.Merging(dim, resolution, pad)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class BasicLayerV2(BasicLayer):
    Block, Merging = SwinTransformerBlockV2, PatchMergingV2


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, dim, pad):
        super().__init__()
        self.img_size, self.patch_size, self.pad = img_size, patch_size, pad
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        assert tuple(x.shape[-2:]) == self.img_size, f"built for {self.img_size}, got {tuple(x.shape[-2:])}"
        if self.pad:
            below, right = (-size % self.patch_size for size in self.img_size)
            x = F.pad(x, (0, right, 0, below))
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class SwinTransformer(nn.Module):
    Layer = BasicLayer

    def __init__(
        self,
        img_size=224,
        patch_size=4,
        in_chans=3,
        num_classes=1000,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        mlp_ratio=4.0,
        ape=False,
        pad=False,
    ):
        super().__init__()
        img_size = per_axis(img_size)
        resolution = tuple((size + pad * (patch_size - 1)) // patch_size for size in img_size)
        if ape:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, resolution[0] * resolution[1], embed_dim))
        self.ape = ape
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, pad)
        self.layers = nn.ModuleList()
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            last, dim = i == len(depths) - 1, embed_dim * 2**i
            self.layers.append(self.Layer(dim, resolution, depth, heads, window_size, mlp_ratio, pad, last))
            resolution = tuple((size + pad) // 2 for size in resolution)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        """[B, in_chans, H, W] -> [B, num_classes]"""
        x = self.patch_embed(x)
        if self.ape:
            x = x + self.absolute_pos_embed
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class SwinTransformerV2(SwinTransformer):
    Layer = BasicLayerV2

    def __init__(self, *args, pretrained_window_sizes=(0, 0, 0, 0), **options):
        super().__init__(*args, **options)
        for layer, size in zip(self.layers, pretrained_window_sizes, strict=False):
            for attn in (block.attn for block in layer.blocks):
                attn.pretrained_window_size = (size, size)
                attn.relative_coords_table.copy_(coordinates(attn.window_size, attn.pretrained_window_size))
