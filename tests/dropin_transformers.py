"""Transformers' Swins as ``test_dropin_libraries`` takes them: a model that returns its last hidden state."""

import importlib
from functools import partial

import pytest
from torch import nn

import swinops
from swinops.testing import random_tensor

from .dropin_case import Case, randomise

pytest.importorskip("transformers")


class LastHiddenState(nn.Module):
    """A model whose output is one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).last_hidden_state


FILES = {
    "Swin": "swin.modeling_swin",
    "DonutSwin": "donut.modeling_donut_swin",
    "MaskFormerSwin": "maskformer.modeling_maskformer_swin",
    "ClapAudio": "clap.modeling_clap",
    "Swinv2": "swinv2.modeling_swinv2",
    "Swin2SR": "swin2sr.modeling_swin2sr",
}


def load(prefix):
    return importlib.import_module(f"transformers.models.{FILES[prefix]}")


def build(prefix, **options):
    """Two stages on maps of 9 x 10 and 5 x 5 tokens, which a window of 4 pads and whose last it shifts."""
    defaults = {"image_size": (20, 20), "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}
    defaults |= {"window_size": 4, "mlp_ratio": 2.0, "drop_path_rate": 0.0}
    module = load(prefix)
    config = getattr(module, f"{prefix}Config")(**{**defaults, **options})
    return LastHiddenState(randomise(getattr(module, f"{prefix}Model")(config))).eval()


def build_super_resolution(**options):
    """One stage. The model itself pads the image, by reflection."""
    defaults = {"image_size": (12, 8), "patch_size": 1, "embed_dim": 24, "depths": [2], "num_heads": [2]}
    return build("Swin2SR", **{**defaults, **options})


def build_audio(**options):
    """One stage, on spectrograms of 20 x 20 that are an image of 10 x 10 tokens."""
    defaults = {"spec_size": 20, "num_mel_bins": 20, "patch_size": 2, "patch_stride": [2, 2], "depths": [2]}
    defaults |= {"patch_embeds_hidden_size": 32, "num_attention_heads": [2], "num_hidden_layers": 1}
    return build("ClapAudio", **{**defaults, **options})


def image(batch, size):
    return random_tensor((batch, 3, *size), 99)


def spectrogram(batch, size):
    return random_tensor((batch, 1, *size), 99)


def paths(prefix, *stages):
    return {f"model.{stage}.{block}": f"{prefix}Layer" for stage in stages for block in (0, 1)}


def checkpointing(model):
    model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


# what TorchScript has against the models, by version
SCRIPT = r"Failed to get source|variable number of arguments|Optional\[Tensor\]|Comprehension ifs"
OLD = {
    "library": "transformers",
    "image": image,
    "bypassed": ("attention", "attention.self", "attention.self.dropout"),
    "projection": "attention.self.value",
    "dropout": {"attention_probs_dropout_prob": 0.4},
    "checkpointing": checkpointing,
    "unsupported": {"script": SCRIPT, "fx": "control flow"},
}
NEW = {
    **OLD,
    "bypassed": ("attention", "attention.relative_position_bias"),
    "projection": "attention.v_proj",
}
SIZES = ((18, 20), (16, 24), (32, 32), (14, 30))
TWO_STAGES = "encoder.layers.0.blocks", "encoder.layers.1.blocks"


def case(name, prefix, layout=OLD, **options):
    defaults = {"build": partial(build, prefix), "sizes": SIZES, "replaced": paths(prefix, *TWO_STAGES)}
    return Case(name, **{**layout, **defaults, **options})


CASES = (
    case("transformers-swin", "Swin", NEW if hasattr(load("Swin"), "SwinRelativePositionBias") else OLD),
    case("transformers-donut", "DonutSwin"),
    case("transformers-maskformer", "MaskFormerSwin"),
    case(
        "transformers-swinv2",
        "Swinv2",
        build=partial(build, "Swinv2", embed_dim=48),
        sizes=((14, 18), (16, 24), (16, 16), (14, 30)),
        op="cosine_attention",
    ),
    case(
        "transformers-swin2sr",
        "Swin2SR",
        build=build_super_resolution,
        sizes=((12, 8), (8, 8)),
        replaced=paths("Swin2SR", "encoder.stages.0.layers"),
        op="cosine_attention",
        pads=False,
    ),
    case(
        "transformers-clap",
        "ClapAudio",
        build=build_audio,
        image=spectrogram,
        sizes=((20, 20),),
        replaced=paths("ClapAudio", "audio_encoder.layers.0.blocks"),
        checkpointing=None,
    ),
)
for built in CASES:
    swinops.explain(built.model())  # runs a small layer of each class that is new to it, which no test should count
