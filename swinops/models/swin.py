"""Swin Transformer (arXiv 2103.14030), and what the later Swin V2 shares with it. Parameters have timm's names."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from swinops.backends import check_name
from swinops.nn import LayerNorm, PatchEmbed, PatchMerging, SwinBlock
from swinops.ops.arguments import check_window, per_axis


class SwinStage(nn.Module):
    """Patch merging where wanted, then blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] -> [B, ceil(H / 2), ceil(W / 2), dim], or [B, H, W, dim] in the first stage."""
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class ClassifierHead(nn.Module):
    """The mean of all tokens, projected to classes; the mean itself without classes."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, num_classes]"""
        x = self.fc(x.mean((1, 2)))
        return x


class SwinBase(nn.Module):
    """Patches, stages of blocks, and a head: all of Swin V1 and V2 but their blocks and patch merging.

    Args:
        make_block: Makes a block from, by keyword, its stage and its index in the stage, dim, num_heads, window_size,
            shift_size and drop_path.
        make_merging: Makes the patch merging between stages from two numbers of channels.

    The rest is as in ``SwinTransformer``.
    """

    # what names of parameters hold that are published without weight decay
    undecayed: tuple[str, ...]

    def __init__(
        self,
        make_block: Callable[..., nn.Module],
        make_merging: Callable[..., nn.Module],
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int | Sequence[int],
        drop_path_rate: float,
        absolute_pos_embed: bool,
        features_only: bool,
        backend: str,
    ):
        super().__init__()
        check_name(backend)
        if len(depths) != len(num_heads) or not depths or min(depths) < 1:
            raise ValueError(
                f"depths and num_heads must hold a positive int for each stage, got {depths} and {num_heads}"
            )
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 0:
            raise ValueError(f"num_classes must be an int of at least 0, got {num_classes!r}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and less than 1, got {drop_path_rate}")
        window, self.img_size = window_and_image(window_size, img_size)
        self.num_classes = num_classes
        self.features_only = features_only
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, backend=backend)
        maps = feature_maps(self.img_size, self.patch_embed.patch_size, len(depths))
        self.grid_size = tuple(maps[0])
        self.absolute_pos_embed = (
            nn.Parameter(torch.empty(1, maps[0][0] * maps[0][1], embed_dim)) if absolute_pos_embed else None
        )

        rates = (drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths)))
        dims = [embed_dim * 2**i for i in range(len(depths))]
        stages = []
        for i, (dim, depth, heads, size) in enumerate(zip(dims, depths, num_heads, maps, strict=True)):
            downsample = make_merging(dims[i - 1], dim, backend=backend) if i else nn.Identity()
            blocks = [
                make_block(
                    stage=i, index=j, dim=dim, num_heads=heads, window_size=cut, shift_size=shift, drop_path=rate
                )
                for j, rate in enumerate(itertools.islice(rates, depth))
                for cut, shift in [cut_and_shift(window, size, j)]
            ]
            stages.append(SwinStage(downsample, blocks))
        self.layers = nn.ModuleList(stages)
        if not features_only:
            self.norm = LayerNorm(dims[-1], backend=backend)
            self.head = ClassifierHead(dims[-1], num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """As published: normal weights of deviation 0.02 and zero biases; the patch projection as torch has it."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.absolute_pos_embed is not None:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are published without weight decay; biases and norms, which are 1-D, come on top."""
        return {name for name, _ in self.named_parameters() if any(part in name for part in self.undecayed)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only the input of each block and run the block again in backward."""
        for stage in self.layers:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def embed(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, ceil(H / patch), ceil(W / patch), embed_dim]"""
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            position = self.absolute_pos_embed.unflatten(1, self.grid_size)
            if x.shape[1:3] != self.grid_size:
                position = F.interpolate(position.permute(0, 3, 1, 2), x.shape[1:3], mode="bicubic").permute(0, 2, 3, 1)
            x = x + position
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> the last stage's tokens, normalised. [B, h, w, C]"""
        x = self.embed(x)
        for stage in self.layers:
            x = stage(x)
        x = self.norm(x)
        return x

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """[B, in_chans, H, W] -> [B, num_classes], or with ``features_only`` a [B, C, h, w] for each stage."""
        if not self.features_only:
            logits: Tensor = self.head(self.forward_features(x))
            return logits
        x = self.embed(x)
        maps = []
        for stage in self.layers:
            x = stage(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps


def window_and_image(window_size: int | Sequence[int], img_size: int | Sequence[int]) -> tuple[list[int], list[int]]:
    """Both for each axis, in range."""
    window, image = per_axis(window_size, 2, "window_size"), per_axis(img_size, 2, "img_size")
    check_window(window, (0, 0), 2)
    if min(image) < 1:
        raise ValueError(f"img_size must be at least 1, got {img_size}")
    return window, image


def feature_maps(image: Sequence[int], patch: Sequence[int], stages: int) -> list[list[int]]:
    """Tokens along each axis, in each stage."""
    maps = [[-(-size // p) for size, p in zip(image, patch, strict=True)]]
    while len(maps) < stages:
        maps.append([-(-size // 2) for size in maps[-1]])
    return maps


def cut_and_shift(window: Sequence[int], size: Sequence[int], index: int) -> tuple[list[int], list[int]]:
    """Of a stage's block: the window, cut to the feature map, and its shift, by half a window in every second block."""
    cut = [min(w, n) for w, n in zip(window, size, strict=True)]
    return cut, [w // 2 if index % 2 else 0 for w in cut]


class SwinTransformer(SwinBase):
    """Swin Transformer V1. Takes images of any size and aspect ratio, from call to call.

    Args:
        img_size: Size in pixels, or (height, width), that the parameters are made for: a window larger than a stage's
            feature map is cut to it. Other sizes are padded to whole patches and windows.
        patch_size: Pixels of a patch.
        num_classes: 0 for the mean of the last features.
        embed_dim: Channels of the first stage; each later stage has twice as many.
        depths, num_heads: Blocks and heads of each stage.
        window_size: Tokens of a window, or (height, width).
        mlp_ratio: Hidden channels of an MLP, as a multiple of the stage's.
        drop_path_rate: Stochastic depth, rising linearly from 0 in the first block to this in the last.
        absolute_pos_embed: Whether to add a learned position embedding after the patch embedding; of other image sizes
            it is interpolated (bicubic).
        features_only: Return the output of every stage, [B, C, H, W] each, in place of logits.
        pad_order: "pad_roll" pads, then shifts (torchvision, Transformers); "roll_pad" shifts first (timm). The two
            differ where a feature map does not divide by the window.
        backend: "auto", or one of ``swinops.backends.MODULES``.

    Raises:
        ValueError, TypeError: an argument is out of range, or ``depths`` and ``num_heads`` differ in length.
    """

    undecayed = ("relative_position_bias_table", "absolute_pos_embed")

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.1,
        absolute_pos_embed: bool = False,
        features_only: bool = False,
        pad_order: str = "pad_roll",
        backend: str = "auto",
    ):
        def block(stage: int, index: int, **shape: Any) -> SwinBlock:
            return SwinBlock(**shape, mlp_ratio=mlp_ratio, pad_order=pad_order, backend=backend)

        super().__init__(
            block, PatchMerging,
            img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads, window_size, drop_path_rate,
            absolute_pos_embed, features_only, backend,
        )  # fmt: skip


TINY: dict[str, Any] = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
SMALL: dict[str, Any] = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
BASE: dict[str, Any] = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
LARGE: dict[str, Any] = dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48))

# with the drop path rates they were trained with
MODELS = {
    "swin_tiny_patch4_window7_224": dict(TINY, img_size=224, window_size=7, drop_path_rate=0.2),
    "swin_small_patch4_window7_224": dict(SMALL, img_size=224, window_size=7, drop_path_rate=0.3),
    "swin_base_patch4_window7_224": dict(BASE, img_size=224, window_size=7, drop_path_rate=0.5),
    "swin_base_patch4_window12_384": dict(BASE, img_size=384, window_size=12, drop_path_rate=0.5),
    "swin_large_patch4_window7_224": dict(LARGE, img_size=224, window_size=7, drop_path_rate=0.2),
    "swin_large_patch4_window12_384": dict(LARGE, img_size=384, window_size=12, drop_path_rate=0.2),
}
