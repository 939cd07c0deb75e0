"""torchvision's Swins, small: V1 and V2 of images, and the one of video."""

from functools import partial

import pytest

from swinops.testing import random_tensor

from .dropin_case import Case, randomise

pytest.importorskip("torchvision")

from torchvision.models import swin_transformer as swin
from torchvision.models.video import swin_transformer as video

OPTIONS = {"embed_dim": 24, "depths": [2], "num_heads": [2], "stochastic_depth_prob": 0.0, "num_classes": 5}
V2 = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}


def build(model, **options):
    return randomise(model(**{**OPTIONS, **options})).eval()


def image(batch, size):
    return random_tensor((batch, 3, *size), 99)


def attentions(name, *stages):
    """Path and class of the attention of two blocks in each stage."""
    return {f"features.{stage}.{block}.attn": name for stage in stages for block in (0, 1)}


# a map is half the size of its image on every axis; the shift of an axis that one window covers is dropped
CASES = (
    Case(
        "torchvision",
        "torchvision",
        partial(build, swin.SwinTransformer, patch_size=[2, 2], window_size=[4, 3], depths=[2, 2], num_heads=[2, 4]),
        image,
        ((14, 10), (16, 12), (8, 14)),
        attentions("ShiftedWindowAttention", 1, 3),
        shift="features.1.1.attn",
        bypassed=(),
        projection="qkv",
        called=False,
        dropout={"attention_dropout": 0.2},
    ),
    Case(
        "torchvision_v2",
        "torchvision",
        partial(build, swin.SwinTransformer, patch_size=[2, 2], window_size=[4, 4], **V2),
        image,
        ((14, 10), (16, 16), (14, 8)),
        attentions("ShiftedWindowAttentionV2", 1),
        op="cosine_attention",
        bypassed=(),
        projection="qkv",
        called=False,
        dropout={"attention_dropout": 0.2},
    ),
    Case(
        "torchvision_3d",
        "torchvision",
        partial(build, video.SwinTransformer3d, patch_size=[2, 2, 2], window_size=[2, 4, 3]),
        image,
        ((6, 14, 10), (8, 8, 12), (2, 14, 10), (6, 10, 4)),
        attentions("ShiftedWindowAttention3d", 0),
        bypassed=(),
        projection="qkv",
        called=False,
        dropout={"attention_dropout": 0.2},
    ),
)
