"""Checkpoints of other libraries: every tensor arrives where it belongs, or nothing changes and the error says why."""

import argparse
import json
import logging
import math
import os
import pickle
import re
import stat
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swinops import create_model, list_models, save_checkpoint
from swinops.benchmarks.models import randomise
from swinops.checkpoints import load_checkpoint, microsoft, openmmlab, saving, torchvision, transformers
from swinops.checkpoints.configuration import arguments, difference
from swinops.checkpoints.loading import BUFFERS, COORDINATES, SOURCES, name_of
from swinops.models import MODELS
from swinops.models.swin import SwinTransformer
from swinops.models.swinv2 import SwinTransformerV2
from swinops.testing import assert_accurate, random_tensor

from . import microsoft_swin

SMALL = dict(img_size=32, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5)
TABLE = "layers.0.blocks.1.attn.relative_position_bias_table"
OURS = {1: SwinTransformer, 2: SwinTransformerV2}
LIBRARIES = ["microsoft", "timm", "torchvision", "transformers", "openmmlab"]
MICROSOFT = {1: microsoft_swin.SwinTransformer, 2: microsoft_swin.SwinTransformerV2}


def build(cls=SwinTransformer, seed=0, **options):
    return randomise(cls(**{**SMALL, **options}), seed)


def timm_class(version):
    name = "swin_transformer" if version == 1 else "swin_transformer_v2"
    module = pytest.importorskip(f"timm.models.{name}")
    return module.SwinTransformer if version == 1 else module.SwinTransformerV2


def torchvision_model(version, **options):
    """torchvision's class of the size ``SMALL``, random, or with other options as it takes them."""
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    small = {key: value for key, value in SMALL.items() if key != "img_size"}
    if version == 2:
        options = dict(options, block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2)
    return randomise(swin.SwinTransformer(patch_size=[4, 4], **{**small, "window_size": [4, 4], **options}))


def transformers_model(version, kind="ForImageClassification", **options):
    """Transformers' class of the size ``SMALL``, random, or with other options as it takes them."""
    library, name = pytest.importorskip("transformers"), "Swin" if version == 1 else "Swinv2"
    small = {"num_labels" if key == "num_classes" else key: value for key, value in SMALL.items()}
    config = getattr(library, f"{name}Config")(image_size=small.pop("img_size"), **small, **options)
    return randomise(getattr(library, f"{name}{kind}")(config))


class UnfoldMerging(nn.Module):
    """Patch merging as OpenMMLab has it: nn.Unfold joins 2 x 2 tokens, and a channel's four numbers are neighbours."""

    def __init__(self, reduction, norm, reduction_first):
        super().__init__()
        self.reduction, self.norm, self.reduction_first = reduction, norm, reduction_first

    def forward(self, x):
        """[B, H * W, C] of a square -> [B, H * W / 4, 2 * C]"""
        H = math.isqrt(x.shape[1])
        x = nn.Unfold(2, stride=2)(x.transpose(1, 2).unflatten(2, (H, H))).transpose(1, 2)
        return self.norm(self.reduction(x)) if self.reduction_first else self.reduction(self.norm(x))


def openmmlab_model(version, **options):
    """MMPretrain's of the size ``SMALL``, random: Microsoft's but for patch merging, and for the names (see below)."""
    model = build(MICROSOFT[version], **options)
    merging = model.layers[0].downsample
    model.layers[0].downsample = UnfoldMerging(merging.reduction, merging.norm, version == 2)
    return model


def openmmlab_names(model, version):
    """The state dict of ``openmmlab_model`` by MMPretrain's names. V2's merging begins a stage, V1's ends one."""
    renamed = {}
    for name, x in model.state_dict().items():
        if version == 2:
            name = name.replace("layers.0.downsample.", "layers.1.downsample.")
        name = name.replace("layers.", "stages.").replace("patch_embed.proj.", "patch_embed.projection.")
        name = name.replace(".attn.", ".attn.w_msa.")
        name = name.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
        name = f"backbone.norm1.{name[5:]}" if name.startswith("norm.") else f"backbone.{name}"
        renamed[name.replace("backbone.head.", "head.fc.")] = x
    return renamed


def names_of(library, model, version):
    return openmmlab_names(model, version) if library == "openmmlab" else model.state_dict()


def model_of(library, version):
    """A library's model of the size ``SMALL``, random."""
    if library == "torchvision":
        return torchvision_model(version)
    if library == "transformers":
        return transformers_model(version)
    if library == "openmmlab":
        return openmmlab_model(version)
    return build(timm_class(version) if library == "timm" else MICROSOFT[version])


def parameters(modules):
    """Those of each module, with a dot and its key before their names."""
    return {f"{key}.{name}": x.data for key, module in modules.items() for name, x in module.named_parameters()}


def copy(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_same(state, expected):
    assert list(state) == list(expected)
    different = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert not different, different


def from_microsoft(state):
    """By hand for ``SMALL``, to this package's names; its state dict has an index for each block and one mask."""
    assert sum(name.endswith("relative_position_index") for name in state) == 4
    assert [name for name in state if name.endswith("attn_mask")] == ["layers.0.blocks.1.attn_mask"]
    renamed = {
        "layers.0.downsample.reduction.weight": "layers.1.downsample.reduction.weight",
        "layers.0.downsample.norm.weight": "layers.1.downsample.norm.weight",
        "layers.0.downsample.norm.bias": "layers.1.downsample.norm.bias",
        "head.weight": "head.fc.weight",
        "head.bias": "head.fc.bias",
    }
    assert renamed.keys() < state.keys()
    buffers = "relative_position_index", "relative_coords_table", "attn_mask"
    return {renamed.get(name, name): x for name, x in state.items() if not name.endswith(buffers)}


def from_torchvision(model):
    """By hand for ``SMALL``, to this package's names."""
    patches, first, merging, second = model.features
    modules = {"patch_embed.proj": patches[0], "patch_embed.norm": patches[2], "layers.1.downsample": merging}
    for stage, blocks in enumerate((first, second)):
        for n, block in enumerate(blocks):
            parts = {"norm1": block.norm1, "attn": block.attn, "norm2": block.norm2}
            parts |= {"mlp.fc1": block.mlp[0], "mlp.fc2": block.mlp[3]}
            modules |= {f"layers.{stage}.blocks.{n}.{part}": module for part, module in parts.items()}
    state = parameters({**modules, "norm": model.norm, "head.fc": model.head})
    for name in [name for name in state if name.endswith(".logit_scale")]:
        attn = name.removesuffix("logit_scale")
        bias = state.pop(f"{attn}qkv.bias")
        C = len(bias) // 3
        state |= {f"{attn}q_bias": bias[:C], f"{attn}v_bias": bias[2 * C :]}
    return state


def from_transformers(model):
    """By hand for ``SMALL``, to this package's names. In memory, Swin has other names than in its files."""
    swin = model.base_model
    modules = {
        "patch_embed.proj": swin.embeddings.patch_embeddings.projection,
        "patch_embed.norm": swin.embeddings.norm,
    }
    state = {}
    for stage, layer in enumerate(swin.encoder.layers):
        if layer.downsample is not None:
            modules[f"layers.{stage + 1}.downsample"] = layer.downsample
        for n, block in enumerate(layer.blocks):
            at = f"layers.{stage}.blocks.{n}"
            modules |= {f"{at}.norm1": block.layernorm_before, f"{at}.norm2": block.layernorm_after}
            if model.config.model_type == "swin":
                attn, table = block.attention, block.attention.relative_position_bias.relative_position_bias_table
                q, k, v, proj = attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj
                fc1, fc2 = block.mlp.fc1, block.mlp.fc2
                state[f"{at}.attn.relative_position_bias_table"] = table.data
                state[f"{at}.attn.qkv.bias"] = torch.cat([q.bias, k.bias, v.bias]).data
            else:
                attn, proj = block.attention.self, block.attention.output.dense
                q, k, v = attn.query, attn.key, attn.value
                fc1, fc2 = block.intermediate.dense, block.output.dense
                assert k.bias is None
                state |= {f"{at}.attn.q_bias": q.bias.data, f"{at}.attn.v_bias": v.bias.data}
                state[f"{at}.attn.logit_scale"] = attn.logit_scale.data
                modules[f"{at}.attn.cpb_mlp"] = attn.continuous_position_bias_mlp
            state[f"{at}.attn.qkv.weight"] = torch.cat([q.weight, k.weight, v.weight]).data
            modules |= {f"{at}.attn.proj": proj, f"{at}.mlp.fc1": fc1, f"{at}.mlp.fc2": fc2}
    modules |= {"norm": swin.layernorm} | ({"head.fc": model.classifier} if hasattr(model, "classifier") else {})
    return state | parameters(modules)


def assert_loaded(model, expected):
    """Each of the model's tensors is the expected one, and none is left over."""
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert_same(state, {name: expected[name] for name in state})


def save(state, path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture
def log(caplog):
    """Lines of the log "swinops"."""
    caplog.set_level(logging.INFO, "swinops")

    def lines():
        return [record.getMessage() for record in caplog.records if record.name == "swinops"]

    return lines


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_microsoft_file(version, suffix, positions, tmp_path, log):
    theirs = build(MICROSOFT[version], ape=positions).state_dict()
    path = save({"model": theirs} if suffix == ".pth" else theirs, tmp_path / f"swin{suffix}")
    model = build(OURS[version], seed=1, absolute_pos_embed=positions)
    assert load_checkpoint(model, path) is model
    expected = from_microsoft(theirs)
    assert ("absolute_pos_embed" in expected) == positions
    assert_loaded(model, expected)
    assert not log()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("version", [1, 2])
def test_timm_file(version, suffix, tmp_path, log):
    theirs = build(timm_class(version)).state_dict()
    model = build(OURS[version], seed=1)
    load_checkpoint(model, str(save(theirs, tmp_path / f"swin{suffix}")))
    assert_loaded(model, theirs)
    assert not log()


def test_timm_feature_maps(log):
    """Whose model of maps has its stages under other names."""
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, out_indices=(0, 1), **options)
    state = {name: random_tensor(x.shape, seed) for seed, (name, x) in enumerate(theirs.state_dict().items())}
    assert any(name.startswith("layers_1.blocks.0.attn") for name in state)
    theirs.load_state_dict(state)
    model, x = SwinTransformer(features_only=True, **options).eval(), random_tensor((2, 3, 32, 32), 99)
    load_checkpoint(model, state)
    with torch.no_grad():
        maps = zip(model(x), theirs.eval()(x), theirs.double()(x.double()), strict=True)
        for actual, *timms in maps:
            assert_accurate(actual, *(y.permute(0, 3, 1, 2) for y in timms), "map")
    assert not log()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("version", [1, 2])
def test_torchvision_file(version, suffix, tmp_path, log):
    theirs = torchvision_model(version)
    path = save(theirs.state_dict(), tmp_path / f"swin{suffix}")
    assert_loaded(load_checkpoint(build(OURS[version], seed=1), path), from_torchvision(theirs))
    assert not log()


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("version", [1, 2])
def test_transformers_file(version, place, tmp_path, log):
    theirs, checkpoint = transformers_model(version), tmp_path / "model.safetensors"
    if place == "memory":
        checkpoint = theirs.state_dict()
    else:
        theirs.save_pretrained(tmp_path)
    assert_loaded(load_checkpoint(build(OURS[version], seed=1), checkpoint), from_transformers(theirs))
    assert not log()


@pytest.mark.parametrize("version", [1, 2])
def test_transformers_without_classifier(version, log):
    theirs = transformers_model(version, "Model")
    expected = from_transformers(theirs)
    assert not any(name.startswith("head") for name in expected)
    assert_loaded(load_checkpoint(build(OURS[version], seed=1, num_classes=0), theirs.state_dict()), expected)
    model = build(OURS[version], seed=1)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"missing: head\.fc\.weight, head\.fc\.bias; skip_head"),
    ):
        load_checkpoint(model, theirs.state_dict())
    head = {name: x for name, x in copy(model).items() if name.startswith("head.")}
    assert_loaded(load_checkpoint(model, theirs.state_dict(), skip_head=True), expected | head)
    assert not log()


TRANSFORMERS_NAMES = {
    ("memory", 1): "swin.encoder.layers.0.blocks.0.attention.q_proj.weight",
    ("memory", 2): "swinv2.encoder.layers.0.blocks.0.attention.self.query.weight",
    ("disk", 1): "swin.encoder.layers.0.blocks.0.attention.self.query.weight",
    ("disk", 2): "swinv2.encoder.layers.0.blocks.0.attention.self.query.weight",
}


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("version", [1, 2])
def test_transformers_names(version, place, tmp_path, log):
    """Old and new ones, with the prefix, without, and below another, in a folder of either kind of file."""
    theirs = transformers_model(version)
    state = theirs.state_dict()
    if place == "disk":
        theirs.save_pretrained(tmp_path / "safetensors")
        state = pytest.importorskip("safetensors.torch").load_file(tmp_path / "safetensors/model.safetensors")
        assert_loaded(
            load_checkpoint(build(OURS[version], seed=1), tmp_path / "safetensors"), from_transformers(theirs)
        )
    assert TRANSFORMERS_NAMES[place, version] in state
    bare = {name.removeprefix("swin.").removeprefix("swinv2."): x for name, x in state.items()}
    below = {f"base_model.model.{name}": x for name, x in state.items()}
    for n, names in enumerate((state, bare, below)):
        (tmp_path / f"{n}").mkdir()
        save(names, tmp_path / f"{n}" / "pytorch_model.bin")
        model = load_checkpoint(build(OURS[version], seed=1), tmp_path / f"{n}", "transformers")
        assert_loaded(model, from_transformers(theirs))
    assert not log()


@pytest.mark.parametrize("version", [1, 2])
def test_transformers_masked_images(version, log):
    theirs = transformers_model(version, "ForMaskedImageModeling")
    expected = from_transformers(theirs)
    assert_loaded(load_checkpoint(build(OURS[version], seed=1, num_classes=0), theirs.state_dict()), expected)
    assert log() == ["the checkpoint: left out mask_token, decoder.*, which the model does not have"]


def test_transformers_backbone(log):
    """Its norms are those of the feature maps, and the last one's is the model's."""
    library = pytest.importorskip("transformers")
    small = dict(image_size=32, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4)
    config = library.SwinConfig(**small, out_features=["stage1", "stage2"])
    theirs = randomise(library.SwinBackbone(config)).state_dict()
    # the backbone's own last norm, which it has and never calls, must not be taken for the map's
    theirs = {name: x for name, x in theirs.items() if not name.startswith("swin.layernorm.")}
    model = load_checkpoint(build(seed=1, num_classes=0), theirs)
    assert torch.equal(model.norm.weight, theirs["hidden_states_norms.stage2.weight"])
    assert torch.equal(model.norm.bias, theirs["hidden_states_norms.stage2.bias"])
    assert log() == ["the checkpoint: left out norm0.*, which the model does not have"]


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_transformers_positions(place, tmp_path):
    theirs = transformers_model(1, use_absolute_embeddings=True)
    if place == "disk":
        theirs.save_pretrained(tmp_path)
    model = build(seed=1, absolute_pos_embed=True)
    load_checkpoint(model, tmp_path if place == "disk" else theirs.state_dict())
    assert torch.equal(model.absolute_pos_embed, theirs.swin.embeddings.position_embeddings)


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_openmmlab_file(version, tmp_path, log, monkeypatch):
    """The permuted merging is seen in the outputs, and not to permute it too."""
    theirs, x = openmmlab_model(version).eval(), random_tensor((2, 3, 32, 32), 3)
    path = save({"meta": {"epoch": 3}, "state_dict": openmmlab_names(theirs, version)}, tmp_path / "swin.pth")
    model = build(OURS[version], seed=1).eval()
    assert load_checkpoint(model, path) is model
    assert not log()
    plain, exact = theirs(x), theirs.double()(x.double())
    assert_accurate(model(x), plain, exact, "logits")
    monkeypatch.setattr(openmmlab, "merged", lambda x: x)
    with pytest.raises(AssertionError, match="logits"):
        assert_accurate(load_checkpoint(model, path)(x), plain, exact, "logits")


@pytest.mark.parametrize("version", [1, 2])
def test_openmmlab_parameters(version):
    """Each is Microsoft's by another name, but for the order of merged channels."""
    theirs = openmmlab_model(version)
    expected = from_microsoft(theirs.state_dict())
    merging = "layers.1.downsample."
    # Microsoft's order: the upper left token's channels, those of the one below it, right of it, and of the last
    tokens = [0, 2, 1, 3]
    order = torch.tensor([4 * channel + token for token in tokens for channel in range(16)])
    expected[f"{merging}reduction.weight"] = expected[f"{merging}reduction.weight"][:, order]
    if version == 1:
        for name in (f"{merging}norm.weight", f"{merging}norm.bias"):
            expected[name] = expected[name][order]
    assert_loaded(load_checkpoint(build(OURS[version], seed=1), openmmlab_names(theirs, version)), expected)


@pytest.mark.parametrize("library", ["microsoft", "openmmlab"])
@pytest.mark.parametrize("features_only", [True, False])
def test_detection_file(library, features_only, log):
    """A backbone with a norm for each map and an image of positions, and what stands beside it."""
    theirs = model_of(library, 1)
    plain = load_checkpoint(build(seed=2), names_of(library, theirs, 1)).state_dict()
    state = {name.removeprefix("backbone."): x for name, x in names_of(library, theirs, 1).items()}
    norm = "norm" if library == "microsoft" else "norm1"
    last = {f"norm1.{kind}": state.pop(f"{norm}.{kind}") for kind in ("weight", "bias")}
    state = {name: x for name, x in state.items() if not name.startswith("head.")} | last
    state |= {"norm0.weight": torch.ones(16), "norm0.bias": torch.ones(16)}
    state["absolute_pos_embed"] = random_tensor((1, 16, 8, 8), 5)
    state = {f"backbone.{name}": x for name, x in state.items()} | {
        "neck.weight": torch.ones(2),
        "rpn.b": torch.ones(1),
    }
    model = build(seed=1, features_only=features_only, absolute_pos_embed=True)
    if not features_only:
        with unchanged(model), pytest.raises(ValueError, match=r"missing: head\.fc\.weight, head\.fc\.bias; skip_head"):
            load_checkpoint(model, {"state_dict": state})
        plain |= {name: x for name, x in copy(model).items() if name.startswith("head.")}
    load_checkpoint(model, {"state_dict": state}, skip_head=not features_only)
    positions = state["backbone.absolute_pos_embed"][0].flatten(1).t()[None]
    expected = {"absolute_pos_embed": positions, **plain}
    assert_same(model.state_dict(), {name: expected[name] for name in model.state_dict()})
    assert len(log()) == 1
    assert log()[0].startswith("the checkpoint: left out neck.*, rpn.*, beside backbone.*; left out norm")
    assert set(re.findall(r"norm\d*\.\*", log()[0])) == ({"norm0.*", "norm.*"} if features_only else {"norm0.*"})


@pytest.mark.parametrize("version", [1, 2])
def test_simmim_file(version, tmp_path, log):
    """Its encoder, which Transformers' models have too, and the decoder beside it."""
    theirs = build(MICROSOFT[version]).state_dict()
    expected = {name: x for name, x in from_microsoft(theirs).items() if not name.startswith("head.")}
    state = {f"encoder.{name}": x for name, x in theirs.items() if not name.startswith("head.")}
    state |= {"encoder.mask_token": torch.ones(1, 1, 16), "decoder.0.weight": torch.ones(8, 32, 1, 1)}
    path = save({"model": state, "epoch": 799}, tmp_path / "simmim.pth")
    assert_loaded(load_checkpoint(build(OURS[version], seed=1, num_classes=0), path, "microsoft"), expected)
    left = "left out decoder.*, beside encoder.*; left out mask_token, which the model does not have"
    assert log() == [f"{path}: {left}"]


def test_the_head_of_the_model_itself(log):
    """And not another beside it: OpenMMLab's alone is there."""
    source, model = build(), build(seed=1)
    state = {f"model.{name}": x for name, x in source.state_dict().items()} | {"head.fc.weight": torch.ones(5, 32)}
    assert_same(load_checkpoint(model, state).state_dict(), source.state_dict())
    assert log() == ["the checkpoint: left out head.*, beside model.*"]


def test_two_models_in_one_file():
    state = build().state_dict()
    both = {f"{role}.{name}": x for role in ("student", "teacher") for name, x in state.items()}
    model = build(seed=1)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"must hold one Swin, got student\.\*, teacher\.\*: pass one"),
    ):
        load_checkpoint(model, both)


def test_torchvision_ignores_the_bias_of_keys():
    """Its V2 has one, which it sets to zero when it runs."""
    theirs = torchvision_model(2).eval()
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            if name.endswith("qkv.bias"):
                x.view(3, -1)[1] = 7
    model, x = build(SwinTransformerV2, seed=1).eval(), random_tensor((2, 3, 32, 32), 3)
    load_checkpoint(model, theirs.state_dict())
    with torch.no_grad():
        plain, exact = theirs(x), theirs.double()(x.double())
        assert_accurate(model(x), plain, exact, "logits")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("version", [1, 2])
def test_source(version, library):
    """Told by the names, taken where it is right, and where it is wrong an error that says what is right."""
    state = names_of(library, model_of(library, version), version)
    expected = load_checkpoint(build(OURS[version], seed=1), state).state_dict()
    model = build(OURS[version], seed=2)
    assert sorted(map(name_of, SOURCES)) == sorted(LIBRARIES)
    for source in LIBRARIES:
        if source != library:
            with unchanged(model), pytest.raises(ValueError) as error:
                load_checkpoint(model, state, source)
            right = f"source must be 'auto' or '{library}', by the names in the checkpoint, got '{source}'"
            assert str(error.value) == right
    assert_same(load_checkpoint(model, state, library).state_dict(), expected)


def test_unknown_source():
    model = build()
    with unchanged(model), pytest.raises(ValueError, match=r"source must be 'auto', 'torchvision', .* got 'keras'$"):
        load_checkpoint(model, build(seed=1).state_dict(), "keras")
    with unchanged(model), pytest.raises(ValueError, match=r"known, which is none, by the names .* got 'timm'$"):
        load_checkpoint(model, {"a.weight": torch.ones(1)}, source="timm")


@pytest.mark.parametrize("head", [True, False])
def test_one_stage(head):
    """Without a head, Microsoft's and timm's names are the same."""
    sizes = dict(depths=(2,), num_heads=(2,), num_classes=5 if head else 0)
    theirs = build(microsoft_swin.SwinTransformer, **sizes | dict(num_classes=5)).state_dict()
    if not head:
        theirs = {name: x for name, x in theirs.items() if not name.startswith("head.")}
    for source in ("auto", "microsoft") if head else ("auto", "microsoft", "timm"):
        model = load_checkpoint(build(seed=1, **sizes), theirs, source)
        assert torch.equal(model.norm.weight, theirs["norm.weight"])


@pytest.mark.parametrize("wrap", ["module", "_orig_mod"])
def test_wrapped_model(wrap):
    model = nn.Module()
    model.add_module(wrap, build())
    with unchanged(model), pytest.raises(ValueError, match=rf"the model itself, got a Module: pass model\.{wrap}$"):
        load_checkpoint(model, build(seed=1).state_dict())


@pytest.mark.parametrize("key", [None, torch.ones(16, 8), torch.ones(16, 16, device="meta")])
def test_transformers_parts_of_a_projection(key):
    """A query and a value are of no use without their key, or with another's."""
    model, state = build(SwinTransformerV2), transformers_model(2).state_dict()
    name = "swinv2.encoder.layers.0.blocks.1.attention.self.key.weight"
    del state[name]
    if key is not None:
        state[name] = key
    with unchanged(model), pytest.raises(ValueError) as error:
        load_checkpoint(model, state)
    missing, unexpected = str(error.value).split("; unexpected: ")
    assert missing.endswith("missing: layers.0.blocks.1.attn.qkv.weight")
    found = {f"layers.0.blocks.1.attn.{part}.weight" for part in "qkv" if part != "k" or key is not None}
    assert set(unexpected.split(", ")) == found


@pytest.mark.parametrize("library", ["microsoft", "timm", "torchvision", "transformers"])
def test_buffers_are_left_out(library, log):
    """Published files hold them, and most libraries have ceased to save them."""
    theirs = model_of(library, 2)
    state, buffers = theirs.state_dict(), dict(theirs.named_buffers())
    assert sum(name.endswith("relative_coords_table") for name in buffers) == 4
    assert sum(name.endswith("relative_position_index") for name in buffers) == 4
    expected = load_checkpoint(build(SwinTransformerV2, seed=1), state).state_dict()
    published = state | {
        name: x for name, x in buffers.items() if not name.endswith("k_bias")
    }  # timm's never was saved
    assert_loaded(load_checkpoint(build(SwinTransformerV2, seed=2), published), expected)
    assert not log()


@pytest.mark.parametrize("trained, taken, line", [
    ((8, 6), (8, 0), "the position bias was trained with the window (6, 6) and is taken to be of (8, 8): 1"),
    ((8, 0), (4, 0), "the position bias was trained with the window (8, 8) and is taken to be of (4, 4): 1"),
    ((8, 6), (8, 6), None),
    ((8, 0), (4, 8), None),
    ((1, 0), (1, 0), None),
], ids=str)  # fmt: skip
def test_other_pretrained_windows_are_logged(trained, taken, line, log):
    """A file of Microsoft's tells with which window its bias was trained: a model that disagrees computes another."""
    sizes = dict(img_size=32, embed_dim=16, depths=(1,), num_heads=(1,), num_classes=3)
    theirs = microsoft_swin.SwinTransformerV2(**sizes, window_size=trained[0], pretrained_window_sizes=(trained[1],))
    model = SwinTransformerV2(**sizes, window_size=taken[0], pretrained_window_sizes=(taken[1],))
    load_checkpoint(model, theirs.state_dict())
    assert [line in entry for entry in log()] == ([True] if line else [])


TORCHVISION = {
    "swin_tiny_patch4_window7_224": "swin_t",
    "swin_small_patch4_window7_224": "swin_s",
    "swin_base_patch4_window7_224": "swin_b",
    "swinv2_tiny_window8_256": "swin_v2_t",
    "swinv2_small_window8_256": "swin_v2_s",
    "swinv2_base_window8_256": "swin_v2_b",
}


@pytest.mark.parametrize("name", [name for name in list_models() if not re.search("huge|giant", name)])
def test_published_sizes(name):
    """The names and shapes of each published model, as all four libraries have them, are all of ours."""
    timm, library = pytest.importorskip("timm"), pytest.importorskip("transformers")
    version, size = 2 if name.startswith("swinv2") else 1, int(re.search(r"\d+$", name)[0])
    with torch.device("meta"):
        model = create_model(name)
        ours = {key: x.shape for key, x in model.state_dict().items()}
        attention = [layer.blocks[0].attn for layer in model.layers]
        options = dict(
            embed_dim=model.patch_embed.proj.out_channels,
            depths=[len(layer.blocks) for layer in model.layers],
            num_heads=[attn.num_heads for attn in attention],
            window_size=attention[0].window_size[0],
        )
        theirs = MICROSOFT[version](img_size=size, **options)
        assert shapes(microsoft.convert(theirs.state_dict())) == ours
        config = library.Swinv2Config if version == 2 else library.SwinConfig
        kind = library.Swinv2ForImageClassification if version == 2 else library.SwinForImageClassification
        theirs = kind(config(image_size=size, num_labels=1000, **options))
        assert shapes(transformers.convert(theirs.state_dict())) == ours
        if timm.is_model(name):
            assert shapes(timm.create_model(name, num_classes=1000).state_dict()) == ours
        if name in TORCHVISION:
            theirs = getattr(pytest.importorskip("torchvision").models, TORCHVISION[name])()
            assert shapes(torchvision.convert(theirs.state_dict())) == ours


def shapes(state):
    return {key: x.shape for key, x in state.items() if not key.endswith((*BUFFERS, COORDINATES))}


def test_own_file(tmp_path, log):
    source, model = build(), build(seed=1)
    load_checkpoint(model, save(source.state_dict(), tmp_path / "swin.pt"))
    assert_same(model.state_dict(), source.state_dict())
    assert not log()


def test_create_model(tmp_path):
    theirs = build(microsoft_swin.SwinTransformer, num_classes=7)
    path = save({"model": theirs.state_dict()}, tmp_path / "swin.pth")
    name = "swin_tiny_patch4_window7_224"
    options = {key: value for key, value in SMALL.items() if key != "num_classes"}
    model = create_model(name, checkpoint=path, num_classes=7, **options)
    assert_same(model.state_dict(), load_checkpoint(build(num_classes=7), path).state_dict())
    with pytest.raises(ValueError, match=r"head\.fc\.weight must be \[5, 32\], got \[7, 32\].*skip_head=True"):
        create_model(name, checkpoint=path, num_classes=5, **options)
    assert create_model(name, checkpoint=path, num_classes=5, skip_head=True, **options).head.fc.out_features == 5


@pytest.mark.parametrize("nest", [["model"], ["state_dict"], ["state_dict", "model"]])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers(nest, prefix, tmp_path, log):
    source, model = build(), build(seed=1)
    contents = {prefix + name: x for name, x in source.state_dict().items()}
    for key in nest:
        contents = {"epoch": 3, key: contents, "optimizer": {"state": {0: {}}, "param_groups": []}, "lr": [0.1]}
    load_checkpoint(model, save(contents, tmp_path / "swin.pth"))
    assert_same(model.state_dict(), source.state_dict())
    assert not log()


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_averages_are_not_taken_in_silence(key, log):
    source, average, model = build(), build(seed=2), build(seed=1)
    load_checkpoint(model, {f"{key}_ema": average.state_dict(), key: source.state_dict()})
    assert_same(model.state_dict(), source.state_dict())
    assert log() == [f"the checkpoint: took '{key}', not '{key}_ema'"]


def test_the_mapping_is_left_alone():
    theirs = build(microsoft_swin.SwinTransformer, window_size=2).state_dict()
    contents = {"model": dict(theirs)}
    load_checkpoint(build(seed=1), contents)
    assert_same(contents["model"], theirs)
    assert all(contents["model"][name] is theirs[name] for name in theirs)


@pytest.mark.parametrize("file", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.float16])
def test_the_model_keeps_its_dtype(file, own):
    state = {name: x.to(file) for name, x in build().state_dict().items()}
    model = load_checkpoint(build(seed=1).to(own), state)
    assert_same(model.state_dict(), {name: x.to(own) for name, x in state.items()})


def test_parameters_stay_the_same_objects():
    model = build(seed=1)
    before = dict(model.named_parameters())
    load_checkpoint(model, dict(build().named_parameters()))
    assert all(p is before[name] and p.requires_grad and p.is_leaf for name, p in model.named_parameters())


def published(table, window):
    """Microsoft's resizing of a table for a square window, and timm's too where the new one is not square."""
    M = (int(table.shape[0] ** 0.5) + 1) // 2
    image = table.t().reshape(1, table.shape[1], 2 * M - 1, 2 * M - 1)
    resized = F.interpolate(image, size=[2 * w - 1 for w in window], mode="bicubic", align_corners=False)
    return resized.reshape(table.shape[1], -1).t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_window(dtype, tmp_path, log):
    theirs = {
        name: x.to(dtype) if x.is_floating_point() else x
        for name, x in build(microsoft_swin.SwinTransformer).state_dict().items()
    }
    path = save({"model": theirs}, tmp_path / "swin.pth")
    model = build(seed=1, window_size=7, img_size=56)
    load_checkpoint(model, path)
    for name, x in from_microsoft(theirs).items():
        x = published(x.float(), (7, 7)) if name.endswith("table") else x.float()
        assert torch.equal(model.state_dict()[name], x), name
    assert log() == [f"{path}: bias tables resized from the window (4, 4) to (7, 7): 4"]


def test_window_cut_to_a_small_map(log):
    """The last stage of this image has 3 x 4 tokens, and a window of as many."""
    state, model = copy(build()), build(seed=1, img_size=(24, 32))
    assert model.layers[1].blocks[0].attn.window_size == [3, 4]
    load_checkpoint(model, state)
    name = "layers.1.blocks.1.attn.relative_position_bias_table"
    assert torch.equal(model.state_dict()[name], published(state[name], (3, 4)))
    assert torch.equal(model.state_dict()[TABLE], state[TABLE])
    assert log() == ["the checkpoint: bias tables resized from the window (4, 4) to (3, 4): 2"]


def test_other_image_size(log):
    theirs = build(microsoft_swin.SwinTransformer, ape=True).state_dict()
    model = load_checkpoint(build(seed=1, absolute_pos_embed=True, img_size=(64, 40)), theirs)
    image = theirs["absolute_pos_embed"].reshape(1, 8, 8, 16).permute(0, 3, 1, 2)
    expected = F.interpolate(image, (16, 10), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 160, 16)
    assert torch.equal(model.state_dict()["absolute_pos_embed"], expected)
    assert log() == ["the checkpoint: position embeddings resized from (8, 8) patches to (16, 10): 1"]


@pytest.mark.parametrize("window", [(2, 3), (1, 5)])  # the table of (1, 5) has 9 rows, like that of (2, 2)
def test_the_same_window_is_not_resized(window, log):
    source, model = build(window_size=window), build(seed=1, window_size=window)
    load_checkpoint(model, source.state_dict())
    assert_same(model.state_dict(), source.state_dict())
    assert not log()


@pytest.mark.parametrize(
    "shape, why",
    [
        ((15, 2), r" \(no square, .*\)"),
        ((16, 2), r" \(no square, .*\)"),
        ((9, 3), ""),
        ((9, 2, 1), r" \(no square, .*\)"),
    ],
)
def test_tables_of_no_square_window_or_other_heads(shape, why):
    """A square table has an odd number of rows along each axis."""
    model, state = build(), copy(build(seed=1))
    state[TABLE] = torch.ones(shape)
    with unchanged(model), pytest.raises(ValueError, match=rf"\[49, 2\], got {re.escape(str(list(shape)))}{why}$"):
        load_checkpoint(model, state)


def test_features_only(log):
    theirs = build(microsoft_swin.SwinTransformer).state_dict()
    model = load_checkpoint(build(seed=1, features_only=True), theirs)
    expected = {name: x for name, x in from_microsoft(theirs).items() if not name.startswith(("norm.", "head."))}
    assert_same(model.state_dict(), {name: expected[name] for name in model.state_dict()})
    assert log() == ["the checkpoint: left out norm.*, head.*, which the model does not have"]


def test_another_window_of_v2(log):
    """Its bias is computed for any window, so that nothing is resized."""
    theirs = build(microsoft_swin.SwinTransformerV2).state_dict()
    model = build(SwinTransformerV2, seed=1, window_size=(7, 5), img_size=56, pretrained_window_sizes=(4, 4))
    assert_loaded(load_checkpoint(model, theirs), from_microsoft(theirs))
    assert not log()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("version", [1, 2])
def test_the_other_version(version, library):
    other = 3 - version
    state = names_of(library, model_of(library, other), other)
    model = build(OURS[version])
    with unchanged(model), pytest.raises(ValueError) as error:
        load_checkpoint(model, state)
    name = type(model).__name__
    assert str(error.value) == (
        f"the checkpoint does not fit {name}: the checkpoint is of a Swin V{other}, and the model is a Swin V{version}"
    )


def test_no_classes(log):
    source, model = build(), build(seed=1, num_classes=0)
    load_checkpoint(model, source.state_dict())
    assert_same(model.state_dict(), {name: x for name, x in source.state_dict().items() if "head" not in name})
    assert log() == ["the checkpoint: left out head.*, which the model does not have"]


@pytest.mark.parametrize("head", ["other classes", "none"])
def test_skip_head(head, log):
    state, model = build(microsoft_swin.SwinTransformer, num_classes=21).state_dict(), build(seed=1)
    expected = from_microsoft(state) | {name: x for name, x in copy(model).items() if name.startswith("head.")}
    if head == "none":
        del state["head.weight"], state["head.bias"]
    with unchanged(model), pytest.raises(ValueError, match=r"head\.fc\.weight.*skip_head=True"):
        load_checkpoint(model, state)
    load_checkpoint(model, state, skip_head=True)
    assert_same(model.state_dict(), {name: expected[name] for name in model.state_dict()})
    assert not log()


class unchanged:
    """The block may not change a bit of the model."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.before = copy(self.model)

    def __exit__(self, *error):
        assert_same(self.model.state_dict(), self.before)


def test_every_misfit_is_named():
    state = copy(build(microsoft_swin.SwinTransformer))
    del state["norm.bias"], state["layers.0.downsample.norm.weight"]
    state["layers.0.blocks.0.attn.logit_scale"] = torch.ones(2, 1, 1)
    state["patch_embed.proj.weight"] = torch.ones(16, 1, 4, 4)
    state["norm.weight"] = torch.ones(32, dtype=torch.int64)
    state[TABLE] = torch.ones(9, 2, dtype=torch.uint8)
    model = build(seed=1)
    with unchanged(model), pytest.raises(ValueError) as error:
        load_checkpoint(model, state)
    assert str(error.value) == (
        "the checkpoint does not fit SwinTransformer: "
        "missing: layers.1.downsample.norm.weight, norm.bias; "
        "unexpected: layers.0.blocks.0.attn.logit_scale; "
        "wrong shapes: patch_embed.proj.weight must be [16, 3, 4, 4], got [16, 1, 4, 4], "
        f"{TABLE} must be [49, 2], got [9, 2]; "
        f"not floating point: {TABLE} (uint8), norm.weight (int64)"
    )


def test_another_model_is_counted():
    model = build()
    with unchanged(model), pytest.raises(ValueError) as error:
        load_checkpoint(model, {f"blocks.{i}.weight": torch.ones(1) for i in range(9)})
    missing = len(model.state_dict()) - 6
    assert f"and {missing} more; unexpected: blocks.0.weight" in str(error.value)
    assert "blocks.5.weight, and 3 more" in str(error.value)
    assert "blocks.6.weight" not in str(error.value)


@pytest.mark.parametrize("options", [{"embed_dim": 32}, {"num_heads": (4, 4)}, {"depths": (2, 3)}, {"depths": (2, 1)}])
def test_another_size(options):
    model = build()
    with unchanged(model), pytest.raises(ValueError, match="does not fit SwinTransformer"):
        load_checkpoint(model, build(**options).state_dict())


def test_positions_that_the_model_has_not():
    for ours, theirs, kind in ((False, True, "unexpected"), (True, False, "missing")):
        model = build(absolute_pos_embed=ours)
        with unchanged(model), pytest.raises(ValueError, match=f"{kind}: absolute_pos_embed"):
            load_checkpoint(model, build(microsoft_swin.SwinTransformer, ape=theirs).state_dict())


def test_nothing_is_logged_with_an_error(log):
    state = copy(build(window_size=2))
    del state["norm.bias"]
    with pytest.raises(ValueError, match=r"missing: norm\.bias$"):
        load_checkpoint(build(), state)
    assert not log()


def test_meta_device():
    with torch.device("meta"):
        model = SwinTransformer(**SMALL)
    with pytest.raises(ValueError, match="meta device"):
        load_checkpoint(model, build().state_dict())


def test_tensors_without_data():
    """Found before anything is copied."""
    model, state = build(), build(seed=1).state_dict()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state["head.fc.bias"] = state["head.fc.bias"].to("meta")
    with pytest.raises(ValueError, match=r"without data: head\.fc\.bias"):
        load_checkpoint(model, state)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


class Runs:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_more_than_tensors(zipped, tmp_path):
    path, folder, model = tmp_path / "swin.pth", str(tmp_path / "made"), build()
    torch.save({"model": model.state_dict(), "config": Runs(folder)}, path, _use_new_zipfile_serialization=zipped)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"swin\.pth holds more than tensors \(\w+\.mkdir\).*torch\.save"),
    ):
        load_checkpoint(model, path)
    assert not os.path.exists(folder)
    checkpoint = torch.load(path, weights_only=False)  # as the message says
    assert os.path.exists(folder)
    torch.save({"model": checkpoint["model"]}, path)
    load_checkpoint(model, path)


def test_training_arguments(tmp_path):
    path = save({"state_dict": build().state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "last.pth.tar")
    with pytest.raises(ValueError, match=r"last\.pth\.tar holds more than tensors \(argparse\.Namespace\)"):
        load_checkpoint(build(), path)


def test_no_such_file(tmp_path):
    model = build()
    for path in (tmp_path / "swin.pth", tmp_path / "swin.safetensors", "https://example.com/swin.pth"):
        with unchanged(model), pytest.raises(FileNotFoundError, match="there is no file"):
            load_checkpoint(model, path)
    with (
        unchanged(model),
        pytest.raises(FileNotFoundError, match=r"model\.safetensors or pytorch_model\.bin, and .* neither"),
    ):
        load_checkpoint(model, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_parameters_in_several_files(name, tmp_path):
    (tmp_path / f"{name}.index.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"must hold one file of parameters, and {name} is in several"):
        load_checkpoint(build(), tmp_path)


def test_whole_model(tmp_path):
    path, model = tmp_path / "swin.pth", build()
    torch.save(model, path)
    with pytest.raises(
        ValueError, match=r"more than tensors \(swinops\S+\).*or checkpoint\.state_dict\(\) of a whole model"
    ):
        load_checkpoint(build(), path)


NO_CHECKPOINTS = {
    "empty": (lambda whole: b"", r"is empty$"),
    "page": (lambda whole: b"\n<!DOCTYPE html><html>not found</html>" * 9, r"is a web page$"),
    "pointer": (
        lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        r"is a pointer of Git LFS",
    ),
    "text": (lambda whole: b"not found", r"cannot be read: it is neither of torch\.save nor safetensors"),
    "end": (lambda whole: whole[:-999], r"cannot be read: \S|is no whole safetensors file: \S"),
    "start": (lambda whole: whole[:40], r"cannot be read: \S|is no whole safetensors file: \S"),
}


@pytest.mark.parametrize("suffix", [".pth", ".old.pth", ".safetensors"])
@pytest.mark.parametrize("contents", NO_CHECKPOINTS)
def test_no_checkpoint(contents, suffix, tmp_path):
    path, state = tmp_path / f"swin{suffix}", build(seed=1).state_dict()
    if suffix == ".old.pth":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        save(state, path)
    change, reason = NO_CHECKPOINTS[contents]
    path.write_bytes(change(path.read_bytes()))
    model = build()
    with unchanged(model), pytest.raises(ValueError, match=reason) as error:
        load_checkpoint(model, path)
    assert str(error.value).startswith(f"{path} must be a checkpoint, and ")
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_no_state_dict_in_a_pickle(tmp_path):
    path, model = tmp_path / "swin.pth", build()
    path.write_bytes(pickle.dumps({"model": 1}, protocol=2))
    with unchanged(model), pytest.raises(ValueError, match=r"swin\.pth must (be a checkpoint|hold)"):
        load_checkpoint(model, path)


def test_the_contents_tell_the_kind_of_file(tmp_path):
    """Files get renamed."""
    state = build().state_dict()
    for suffix, other in ((".pth", ".safetensors"), (".safetensors", ".pth")):
        path = save(state, tmp_path / f"swin{suffix}").rename(tmp_path / f"renamed{other}")
        assert_same(load_checkpoint(build(seed=1), path).state_dict(), state)


@pytest.mark.filterwarnings("ignore:.*TorchScript:UserWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_scripted_model(tmp_path):
    path, model = tmp_path / "swin.pt", build()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"swin\.pt .* it is a TorchScript archive, which holds code$"),
    ):
        load_checkpoint(model, path)


def test_other_tensors(tmp_path):
    """What cannot be copied is found before anything is."""
    model, state = build(), build(seed=1).state_dict()
    state["norm.weight"] = state["norm.weight"].to_sparse()
    path = save(state, tmp_path / "swin.pth")
    with unchanged(model), pytest.raises(ValueError, match=r"must hold dense tensors, got others for norm\.weight$"):
        load_checkpoint(model, path)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("version", [1, 2])
def test_tensors_without_a_shape(version, library):
    """Not one converter may fail in its own way."""
    model, state = build(OURS[version]), names_of(library, model_of(library, version), version)
    with unchanged(model), pytest.raises(ValueError, match="does not fit SwinTransformer"):
        load_checkpoint(model, {name: torch.ones(()) for name in state})


@pytest.mark.parametrize("table", [(), (1, 1, 1, 1), (0, 3, 3, 2)], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, math.nan, math.inf])
@pytest.mark.parametrize("version", [1, 2])
def test_strange_coordinates(version, value, table):
    """They are looked at for a line of the log alone."""
    state = build(OURS[version]).state_dict()
    state["layers.0.blocks.0.attn.relative_coords_table"] = torch.full(table or (1, 3, 3, 2), value)
    load_checkpoint(build(OURS[version], seed=1), state)


HELD_BY_ITSELF = {}
HELD_BY_ITSELF["model"] = HELD_BY_ITSELF


@pytest.mark.parametrize(
    "contents, what",
    [
        ([torch.ones(2)], "a state dict, got list"),
        (torch.ones(2), "a state dict, got Tensor"),
        ({"epoch": 3, "optimizer": {}}, r"tensors by name.* got 'epoch' \(int\), 'optimizer' \(dict\)"),
        ({"state_dict_ema": {"norm.bias": torch.ones(2)}}, r"tensors by name.* got 'state_dict_ema' \(dict\)"),
        ({"model": {}}, "tensors by name.* got nothing"),
        (HELD_BY_ITSELF, r"tensors by name.* got 'model' \(dict\)"),
        ({"model": {0: torch.ones(2)}}, r"tensors by name.* got 0 \(Tensor\)"),
    ],
)
def test_no_state_dict(contents, what, tmp_path):
    path = save(contents, tmp_path / "swin.pth")
    with pytest.raises(ValueError, match=rf"swin\.pth must hold {what}"):
        load_checkpoint(build(), path)


def test_safetensors_missing(tmp_path, monkeypatch):
    path = save(build().state_dict(), tmp_path / "swin.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"swin\.safetensors needs the package safetensors"):
        load_checkpoint(build(), path)


def test_argument_types():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        load_checkpoint({}, {})
    with pytest.raises(TypeError, match="checkpoint must be a path or a state dict, got int"):
        load_checkpoint(build(), 3)


CASES = {
    "sizes": (SwinTransformer, dict(img_size=(36, 52), patch_size=(4, 2), in_chans=1, window_size=(3, 5))),
    "settings": (
        SwinTransformer,
        dict(mlp_ratio=2.7, drop_path_rate=0.3, pad_order="roll_pad", absolute_pos_embed=True),
    ),
    "rounded": (SwinTransformer, dict(embed_dim=49, num_heads=(7, 7), mlp_ratio=1 / 49 + 1e-9)),
    "one block": (SwinTransformer, dict(depths=(1,), num_heads=(2,), num_classes=0)),
    "small": (SwinTransformer, dict(img_size=8, window_size=7, depths=(2, 1, 2), num_heads=(1, 2, 4))),
    "maps": (SwinTransformer, dict(features_only=True)),
    "v2": (SwinTransformerV2, dict(mlp_ratio=3.5, log_spaced=False, features_only=True)),
    "norms": (SwinTransformerV2, dict(depths=(2, 7), extra_norm_period=3, drop_path_rate=0.37)),
    "pretrained": (SwinTransformerV2, dict(window_size=(6, 4), pretrained_window_sizes=(3, (5, 2)))),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_round_trip(case, tmp_path, log):
    """The same model from the folder alone: its class, parameters, settings, and so its outputs, bit for bit."""
    cls, options = CASES[case]
    model = build(cls, **options).eval()
    assert_same_model(model, tmp_path / "swin")
    other = load_checkpoint(build(cls, seed=1, **options), tmp_path / "swin")
    assert_same(other.state_dict(), model.state_dict())
    assert not log()


def assert_same_model(model, path):
    """Saves it, makes it again, and compares."""
    save_checkpoint(model, path)
    again = create_model(checkpoint=path).eval()
    assert type(again) is type(model)
    assert arguments(again) == arguments(model)
    assert_same(again.state_dict(), model.state_dict())
    assert [x.dtype for x in again.parameters()] == [x.dtype for x in model.parameters()]
    blocks, copies = ([block for layer in each.layers for block in layer.blocks] for each in (model, again))
    assert [block.drop_path.rate for block in copies] == pytest.approx([block.drop_path.rate for block in blocks])
    assert [repr(block.attn) for block in copies] == [repr(block.attn) for block in blocks]
    x = random_tensor((1, model.patch_embed.proj.in_channels, 40, 28), 3).to(next(model.parameters()).dtype)
    out, expected = again(x), model(x)
    for actual, exact in zip(out, expected, strict=True):
        assert torch.equal(actual, exact)
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_round_trip_of_a_dtype(dtype, tmp_path):
    assert_same_model(build().to(dtype).eval(), tmp_path / "swin")


@torch.no_grad()
def test_round_trip_after_changes(tmp_path):
    """What the model is now is kept, and not what it was made as."""
    model = build(SwinTransformerV2).eval()
    model.set_window_size((3, 2), img_size=(24, 20))
    model.head.fc = nn.Linear(32, 9)
    assert_same_model(randomise(model), tmp_path / "swin")
    again = create_model(checkpoint=tmp_path / "swin")
    assert again.layers[0].blocks[0].attn.pretrained_window_size == [4, 4]
    assert (again.img_size, again.num_classes) == ([24, 20], 9)


@pytest.mark.parametrize("name", list_models())
def test_published_arguments(name):
    """Read off a model, they are those that it was published with."""
    with torch.device("meta"):
        model = create_model(name)
        found = arguments(model)
        again = type(model)(**found)
    assert difference(model, again) is None
    for key, value in MODELS[name][1].items():
        if key in ("img_size", "window_size"):
            assert found[key] == [value, value]
        elif key == "pretrained_window_sizes":
            assert found[key] == [[window, window] for window in value]
        else:
            assert found[key] == (pytest.approx(value) if isinstance(value, float) else list_or_number(value))


def list_or_number(value):
    return list(value) if isinstance(value, tuple) else value


def test_saved_files(tmp_path):
    """For people and other programs: JSON, and safetensors that name PyTorch, with permissions as any file's."""
    model = build().half()
    save_checkpoint(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "library": "swinops",
        "class": "SwinTransformer",
        "arguments": arguments(model),
        "dtype": "float16",
    }
    with pytest.importorskip("safetensors").safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert set(file.keys()) == set(model.state_dict())
    (tmp_path / "other").touch()
    for name in ("config.json", "model.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_shared_and_strided_parameters(tmp_path):
    model = build()
    block = model.layers[0].blocks[0]
    block.norm1.weight = block.norm2.weight
    block.attn.proj.weight = nn.Parameter(block.attn.proj.weight.detach().t())
    save_checkpoint(model, tmp_path)
    assert_same(create_model(checkpoint=tmp_path).state_dict(), model.state_dict())


def test_saved_again(tmp_path):
    """Into the same folder, with another model, and beside other files."""
    path = tmp_path / "runs" / "swin"
    save_checkpoint(build(), path)
    (path / "notes.txt").write_text("notes")
    model = build(SwinTransformerV2, seed=1)
    save_checkpoint(model, str(path))
    assert_same(create_model(checkpoint=str(path)).state_dict(), model.state_dict())
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors", "notes.txt"]


def test_create_model_from_a_folder(tmp_path):
    model = build()
    save_checkpoint(model, tmp_path)
    with pytest.raises(ValueError, match=r"head\.fc\.weight must be \[7, 32\], got \[5, 32\].*skip_head=True"):
        create_model(checkpoint=tmp_path, num_classes=7)
    other = create_model(checkpoint=tmp_path, num_classes=7, skip_head=True, drop_path_rate=None, window_size=2)
    assert other.head.fc.out_features == 7 and other.layers[0].blocks[0].attn.window_size == [2, 2]
    assert torch.equal(other.norm.weight, model.norm.weight)
    with pytest.raises(ValueError, match=r"name must be one of swinops\.list_models\(\), got None"):
        create_model()


def test_files_of_others_are_not_overwritten(tmp_path):
    """Not a file, not Transformers' folder, and nothing that merely has such a name."""
    model = build()
    for path in (tmp_path / "file", tmp_path / "config" / "config.json", tmp_path / "model" / "model.safetensors"):
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"model_type": "swin"}')
        before = path.read_bytes()
        folder = path if path.name == "file" else path.parent
        why = "is a file$" if path.name == "file" else rf"holds a {re.escape(path.name)} that is not its$"
        with pytest.raises(ValueError, match=rf"path must be a new folder or one of save_checkpoint, and .*{why}"):
            save_checkpoint(model, folder)
        assert path.read_bytes() == before
        assert folder == path or os.listdir(folder) == [path.name]
    for suffix in (".safetensors", ".pth"):
        with pytest.raises(ValueError, match=r"is named like a file$"):
            save_checkpoint(model, tmp_path / f"swin{suffix}")
    assert sorted(os.listdir(tmp_path)) == ["config", "file", "model"]


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("step", ["parameters", "disk", "first name"])
def test_failing_to_write_changes_nothing(step, exists, tmp_path, monkeypatch):
    path = tmp_path / "swin"
    if exists:
        save_checkpoint(build(), path)
        (path / "notes.txt").write_text("notes")
    before = contents(path) if exists else None

    def full(*args, **options):
        if step == "parameters":
            Path(args[1]).write_bytes(b"half")
        raise OSError("no space left on device")

    owner, name = {
        "parameters": (pytest.importorskip("safetensors.torch"), "save_file"),
        "disk": (saving, "flush"),
        "first name": (os, "replace"),
    }[step]
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(build(seed=1), path)
    assert (contents(path) if path.exists() else None) == before


def test_stopped_between_the_two_names(tmp_path, monkeypatch):
    """A new config.json beside old parameters: seen when the model is made, and healed by the next writing."""
    old, new = build(), build(seed=1, pad_order="roll_pad")
    save_checkpoint(old, tmp_path)
    replace = os.replace

    def once(source, target):
        monkeypatch.setattr(os, "replace", stop)
        replace(source, target)

    def stop(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(new, tmp_path)
    monkeypatch.setattr(os, "replace", replace)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match=r"config\.json must be as it was saved with model\.safetensors, and is not"):
        create_model(checkpoint=tmp_path)
    assert_same(load_checkpoint(build(seed=2), tmp_path).state_dict(), old.state_dict())
    save_checkpoint(new, tmp_path)
    assert_same(create_model(checkpoint=tmp_path).state_dict(), new.state_dict())


class Scaled(nn.Linear):
    """Looks like a projection, and computes something else."""


CHANGES = {
    "a module": lambda model: setattr(model.layers[0].blocks[1].mlp, "fc1", Scaled(16, 64)),
    "a setting": lambda model: setattr(model.layers[1].blocks[1].attn, "shift_size", [1, 1]),
    "an epsilon": lambda model: setattr(model.norm, "eps", 1e-6),
    "a rate": lambda model: setattr(model.layers[0].blocks[1].drop_path, "rate", 0.25),
    "a module more": lambda model: model.add_module("neck", nn.Linear(2, 2)),
    "no bias": lambda model: setattr(model.head, "fc", nn.Linear(32, 5, bias=False)),
    "depths": lambda model: model.layers[0].blocks.append(nn.Identity()),
    "no blocks": lambda model: setattr(model, "layers", nn.ModuleList([nn.Identity()])),
    "two dtypes": lambda model: model.norm.double(),
    "a type": lambda model: setattr(model.norm, "weight", nn.Parameter(torch.ones(32, device="meta"))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_models_that_arguments_cannot_tell(change, tmp_path):
    model = build()
    CHANGES[change](model)
    with pytest.raises(ValueError, match=r"^model must be as its class makes it from arguments, and "):
        save_checkpoint(model, tmp_path / "swin")
    assert not os.listdir(tmp_path)


def test_arguments_of_save_checkpoint(tmp_path, monkeypatch):
    class Subclass(SwinTransformer):
        pass

    for model in (nn.Linear(2, 2), build(Subclass), build(timm_class(1)), {}):
        with pytest.raises(TypeError, match=rf"SwinTransformerV2 of swinops, got {type(model).__name__}$"):
            save_checkpoint(model, tmp_path / "swin")
    with pytest.raises(TypeError, match="path must be a path, got int"):
        save_checkpoint(build(), 3)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="save_checkpoint needs the package safetensors"):
        save_checkpoint(build(), tmp_path / "swin")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("change, why", [
    ("", r"config\.json must be JSON, and is not"),
    ("[1]", r"config\.json must be save_checkpoint's, and is not: name the model"),
    ({"library": "transformers"}, r"config\.json must be save_checkpoint's, and is not: name the model"),
    ({"arguments": None}, "must have class, arguments and dtype, and lacks arguments$"),
    ({"class": "os.system"}, r"must name a model and a dtype that are known, got os\.system, float32$"),
    ({"dtype": "load"}, r"must name a model and a dtype that are known, got SwinTransformer, load$"),
    ({"arguments": {"embed_dim": "large"}}, "must have arguments that make a SwinTransformer: "),
    ({"arguments": {"window_size": 0}}, "must have arguments that make a SwinTransformer: "),
    ({"arguments": {"depth": 2, "code": "1"}}, "must have arguments of SwinTransformer alone, got code, depth$"),
], ids=str)  # fmt: skip
def test_damaged_configuration(change, why, tmp_path):
    save_checkpoint(build(), tmp_path)
    path, parameters = tmp_path / "config.json", tmp_path / "model.safetensors"
    config = json.loads(path.read_text())
    path.write_text(change if isinstance(change, str) else json.dumps(config | change))
    # without what save_checkpoint notes in it
    save(load_file(parameters), parameters)
    with pytest.raises(ValueError, match=why):
        create_model(checkpoint=tmp_path)


def load_file(path):
    return pytest.importorskip("safetensors.torch").load_file(path)


def test_no_configuration(tmp_path):
    path = save(build().state_dict(), tmp_path / "model.safetensors")
    for checkpoint in (tmp_path, path, tmp_path / "nothing"):
        with pytest.raises(
            FileNotFoundError, match=r"must be a folder of save_checkpoint, and there is no .*config\.json$"
        ):
            create_model(checkpoint=checkpoint)
    assert_same(load_checkpoint(build(seed=1), tmp_path).state_dict(), build().state_dict())


def test_damaged_parameters(tmp_path):
    save_checkpoint(build(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-99])
    model = build(seed=1)
    with unchanged(model), pytest.raises(ValueError, match=r"model\.safetensors must be a checkpoint, and is no whole"):
        load_checkpoint(model, tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors must be a checkpoint, and is no whole"):
        create_model(checkpoint=tmp_path)
