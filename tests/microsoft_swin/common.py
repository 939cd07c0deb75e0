"""Windows, positions and masks, and what is around the blocks."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def per_axis(size):
    return (size, size) if isinstance(size, int) else tuple(size)


def window_partition(x, M):
    """[B, H, W, C] -> [B * nW, M * M, C]"""
    B, H, W, C = x.shape
    return x.view(B, H // M, M, W // M, M, C).transpose(2, 3).reshape(-1, M * M, C)


def window_reverse(x, M, H, W):
    """[B * nW, M * M, C] -> [B, H, W, C]"""
    B = int(x.shape[0] / (H // M * (W // M)))  # which fixes the batch of an exported model
    return x.view(B, H // M, W // M, M, M, x.shape[-1]).transpose(2, 3).reshape(B, H, W, x.shape[-1])


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

    regions = window_partition((3 * region(H)[:, None] + region(W)).view(1, H, W, 1), M).squeeze(-1)
    return -100.0 * (regions[:, None, :] != regions[:, :, None]).float()


class Attention(nn.Module):
    """The modules that each file's ``WindowAttention`` has; with ``pretrained``, a window, those of a network too."""

    def __init__(self, dim, window_size, num_heads, qkv_bias=True, attn_drop=0.0, proj_drop=0.0, pretrained=None):
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        if pretrained is not None:
            self.pretrained_window_size = pretrained
            self.register_buffer("relative_coords_table", coordinates(window_size, pretrained).float())
            self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, False))
        self.register_buffer("relative_position_index", position_index(window_size[0]))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)


class DropPath(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        keep = 1 - self.p * self.training
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep) / keep


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """The modules that each file's ``SwinTransformerBlock`` has."""

    Attention: type[nn.Module]
    pads = False

    def __init__(
        self, dim, input_resolution, num_heads, window_size=7, shift_size=0, mlp_ratio=4.0, drop=0.0, drop_path=0.0,
        **attention,
    ):  # fmt: skip
        super().__init__()
        if min(input_resolution) <= window_size and not self.pads:
            window_size, shift_size = min(input_resolution), 0
        self.dim, self.input_resolution = dim, input_resolution
        self.window_size, self.shift_size = window_size, shift_size
        self.norm1 = nn.LayerNorm(dim)
        self.attn = self.Attention(dim, per_axis(window_size), num_heads, proj_drop=drop, **attention)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        padded = [size + -size % window_size for size in input_resolution]
        self.register_buffer("attn_mask", shift_mask(*padded, window_size, shift_size) if shift_size else None)


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


class BasicLayer(nn.Module):
    def __init__(self, blocks, downsample, use_checkpoint):
        super().__init__()
        self.blocks, self.downsample, self.use_checkpoint = nn.ModuleList(blocks), downsample, use_checkpoint

    def run(self, block, x):
        return checkpoint(block, x, use_reentrant=False) if self.use_checkpoint else block(x)

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, dim, pad):
        super().__init__()
        self.img_size, self.patch_size, self.pad = img_size, patch_size, pad
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        H, W = x.shape[2], x.shape[3]
        assert self.img_size == (H, W), f"built for {self.img_size}, got {(H, W)}"
        if self.pad:
            x = F.pad(x, (0, -W % self.patch_size, 0, -H % self.patch_size))
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class Transformer(nn.Module):
    """``block`` further options of each block, by its stage and its place there."""

    Block: type[nn.Module]
    Layer, Merging = BasicLayer, PatchMerging

    def __init__(
        self, img_size=224, patch_size=4, in_chans=3, num_classes=1000, embed_dim=96, depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24), window_size=7, mlp_ratio=4.0, qkv_bias=True, drop_rate=0.0, attn_drop_rate=0.0,
        drop_path_rate=0.0, ape=False, use_checkpoint=False, block=lambda stage, i: {},
    ):  # fmt: skip
        super().__init__()
        img_size, pad = per_axis(img_size), self.Block.pads
        resolution = tuple((size + pad * (patch_size - 1)) // patch_size for size in img_size)
        if ape:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, resolution[0] * resolution[1], embed_dim))
        self.ape, self.embed_dim = ape, embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, pad)
        options = {"qkv_bias": qkv_bias, "drop": drop_rate, "attn_drop": attn_drop_rate, "mlp_ratio": mlp_ratio}
        self.layers = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim, before = embed_dim * 2**stage, sum(depths[:stage])
            blocks = [
                self.Block(
                    dim, resolution, heads, window_size, i % 2 * (window_size // 2),
                    drop_path=drop_path_rate * (before + i) / max(sum(depths) - 1, 1), **options, **block(stage, i),
                )
                for i in range(depth)
            ]  # fmt: skip
            downsample = None if stage == len(depths) - 1 else self.Merging(dim, resolution, pad)
            self.layers.append(self.Layer(blocks, downsample, use_checkpoint))
            resolution = tuple((size + pad) // 2 for size in resolution)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def embed(self, x):
        """[B, in_chans, H, W] -> [B, L, C]"""
        x = self.patch_embed(x)
        return x + self.absolute_pos_embed if self.ape else x

    def forward(self, x):
        """[B, in_chans, H, W] -> [B, num_classes]"""
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))
