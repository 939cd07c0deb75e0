"""Swin Transformer V2 (arXiv 2111.09883). Parameters have timm's names."""

from collections.abc import Sequence
from typing import Any

from swinops.models.swin import BASE, LARGE, SMALL, TINY, SwinBase, cut_and_shift, feature_maps, window_and_image
from swinops.nn import PatchMergingV2, SwinV2Block
from swinops.ops.arguments import per_axis


class SwinTransformerV2(SwinBase):
    """Swin Transformer V2. Takes images of any size and aspect ratio, from call to call.

    The huge and the giant model were never released, and the paper leaves two things open. Their heads are taken to
    have 32 channels, as in all others: 11, 22, 44, 88 and 16, 32, 64, 128 heads (MMPretrain's huge model has 8, 16, 32,
    64). The "layer normalization layer on the main branch every 6 layers" is counted within each stage, as MMPretrain
    and timm count it, so that no two norms meet: three in the huge and seven in the giant model, in stage 3.

    Args:
        pretrained_window_sizes: The windows that the position bias was trained with, one for each stage, an int or
            (height, width); 0 is the stage's own window, and one 0 that of every stage. See ``set_window_size``.
        extra_norm_period: Normalise the main branch after so many blocks of a stage, again and again; 0 is never.
        log_spaced: As in ``CosineWindowAttention``.

    The rest is as in ``SwinTransformer``, errors too.
    """

    undecayed = ("cpb_mlp", "logit_scale", "absolute_pos_embed")

    def __init__(
        self,
        img_size: int | Sequence[int] = 256,
        patch_size: int | Sequence[int] = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 8,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.1,
        pretrained_window_sizes: int | Sequence[int | Sequence[int]] = 0,
        extra_norm_period: int = 0,
        absolute_pos_embed: bool = False,
        features_only: bool = False,
        log_spaced: bool = True,
        pad_order: str = "pad_roll",
        backend: str = "auto",
    ):
        pretrained = (
            [pretrained_window_sizes] * len(depths) if pretrained_window_sizes == 0 else pretrained_window_sizes
        )
        if not isinstance(pretrained, Sequence) or len(pretrained) != len(depths):
            raise ValueError(
                f"pretrained_window_sizes must be 0 or hold a window for each stage, got {pretrained_window_sizes}"
            )
        if not isinstance(extra_norm_period, int) or extra_norm_period < 0:
            raise ValueError(f"extra_norm_period must be an int of at least 0, got {extra_norm_period!r}")

        def block(stage: int, index: int, **shape: Any) -> SwinV2Block:
            return SwinV2Block(
                **shape,
                pretrained_window_size=per_axis(pretrained[stage], 2, "pretrained_window_sizes"),
                mlp_ratio=mlp_ratio,
                extra_norm=extra_norm_period > 0 and (index + 1) % extra_norm_period == 0,
                log_spaced=log_spaced,
                pad_order=pad_order,
                backend=backend,
            )

        super().__init__(
            block, PatchMergingV2,
            img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads, window_size, drop_path_rate,
            absolute_pos_embed, features_only, backend,
        )  # fmt: skip

    def set_window_size(self, window_size: int | Sequence[int], img_size: int | Sequence[int] | None = None) -> None:
        """Transfer the model to another window, in place, as it was trained: the position bias is continuous.

        No parameter changes. The windows that the bias was trained with become the pretrained ones of each stage, and
        stay so: to come back from a transfer gives the model as it was.

        Args:
            window_size: Tokens of a window, or (height, width); cut to each stage's feature map.
            img_size: The size in pixels, or (height, width), of those maps; None for the size that the model was made
                for or was last transferred to. Images of every other size can be passed too, as always.

        Raises:
            ValueError, TypeError: a size is out of range. Nothing has changed then.
        """
        window, image = window_and_image(window_size, self.img_size if img_size is None else img_size)
        self.img_size = image
        maps = feature_maps(image, self.patch_embed.patch_size, len(self.layers))
        for stage, size in zip(self.layers, maps, strict=True):
            for index, block in enumerate(stage.blocks):  # type: ignore[arg-type]
                block.attn.set_window_size(*cut_and_shift(window, size, index))


HUGE: dict[str, Any] = dict(embed_dim=352, depths=(2, 2, 18, 2), num_heads=(11, 22, 44, 88), extra_norm_period=6)
GIANT: dict[str, Any] = dict(embed_dim=512, depths=(2, 2, 42, 4), num_heads=(16, 32, 64, 128), extra_norm_period=6)
FROM_12: dict[str, Any] = dict(pretrained_window_sizes=(12, 12, 12, 6), drop_path_rate=0.2)

# with the drop path rates they were trained with; the huge model's is not published, and the large one's is taken
MODELS = {
    "swinv2_tiny_window8_256": dict(TINY, img_size=256, window_size=8, drop_path_rate=0.2),
    "swinv2_tiny_window16_256": dict(TINY, img_size=256, window_size=16, drop_path_rate=0.2),
    "swinv2_small_window8_256": dict(SMALL, img_size=256, window_size=8, drop_path_rate=0.3),
    "swinv2_small_window16_256": dict(SMALL, img_size=256, window_size=16, drop_path_rate=0.3),
    "swinv2_base_window8_256": dict(BASE, img_size=256, window_size=8, drop_path_rate=0.5),
    "swinv2_base_window16_256": dict(BASE, img_size=256, window_size=16, drop_path_rate=0.5),
    "swinv2_base_window12_192": dict(BASE, img_size=192, window_size=12, drop_path_rate=0.2),
    "swinv2_base_window12to16_192to256": dict(BASE, img_size=256, window_size=16, **FROM_12),
    "swinv2_base_window12to24_192to384": dict(BASE, img_size=384, window_size=24, **FROM_12),
    "swinv2_large_window12_192": dict(LARGE, img_size=192, window_size=12, drop_path_rate=0.2),
    "swinv2_large_window12to16_192to256": dict(LARGE, img_size=256, window_size=16, **FROM_12),
    "swinv2_large_window12to24_192to384": dict(LARGE, img_size=384, window_size=24, **FROM_12),
    "swinv2_huge_window12_192": dict(HUGE, img_size=192, window_size=12, drop_path_rate=0.2),
    "swinv2_giant_window12_192": dict(GIANT, img_size=192, window_size=12, drop_path_rate=0.3),
}
