"""Microsoft's Swins, small: V1, V2, and MoE with its loss added to the logits."""

from functools import partial

import swinops
from swinops.testing import random_tensor

from . import microsoft_swin
from .dropin_case import Case, randomise

OPTIONS = {
    "patch_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 5
}  # fmt: skip


class SwinTransformerMoE(microsoft_swin.SwinTransformerMoE):
    def forward(self, x):
        logits, loss = super().forward(x)
        return logits + loss


def build(model, **options):
    return randomise(model(**{**OPTIONS, **options})).eval()


def image(batch, size):
    return random_tensor((batch, 3, *size), 99)


def checkpointing(model):
    for layer in model.layers:
        layer.use_checkpoint = True


# a map is half the size of its image, and half of that in the second stage, where one window covers an axis
microsoft = partial(
    Case,
    library="Microsoft",
    image=image,
    sizes=((32, 16), (16, 16), (16, 32)),
    replaced={f"layers.{stage}.blocks.{i}": "SwinTransformerBlock" for stage in (0, 1) for i in (0, 1)},
    pads=False,
    shift="layers.0.blocks.1",
    dropout={"attn_drop_rate": 0.2},
    resize=lambda size: {"img_size": size},
    checkpointing=checkpointing,
    unsupported={"script": "Expected a value of type 'Tensor|requires_grad|redefine", "fx": "control flow"},
)
CASES = (
    microsoft("microsoft_v1", build=partial(build, microsoft_swin.SwinTransformer)),
    microsoft(
        "microsoft_v2",
        build=partial(build, microsoft_swin.SwinTransformerV2, pretrained_window_sizes=(3, 0)),
        op="cosine_attention",
        projection="attn.proj",  # of ``qkv`` the weight is read
    ),
    microsoft("microsoft_moe", build=partial(build, SwinTransformerMoE, moe_blocks=((1,), (0,)), aux_loss_weight=1.0)),
)
for case in CASES:
    swinops.explain(case.model())  # runs a small block of each class that is new to it, which no test should count
