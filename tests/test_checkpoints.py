"""Checkpoints of other libraries: every tensor arrives where it belongs, or nothing changes and the error says why."""

import argparse
import logging
import os
import pickle
import re
import sys

import pytest
import torch
import torch.nn.functional as F

from swinops import create_model, list_models
from swinops.benchmarks.models import randomise
from swinops.checkpoints import load_checkpoint, microsoft, torchvision, transformers
from swinops.checkpoints.loading import BUFFERS, COORDINATES
from swinops.models.swin import SwinTransformer
from swinops.models.swinv2 import SwinTransformerV2

from . import microsoft_swin

SMALL = dict(img_size=32, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5)
TABLE = "layers.0.blocks.1.attn.relative_position_bias_table"
OURS = {1: SwinTransformer, 2: SwinTransformerV2}
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


def transformers_model(version, kind="ForImageClassification"):
    """Transformers' class of the size ``SMALL``, random."""
    library, name = pytest.importorskip("transformers"), "Swin" if version == 1 else "Swinv2"
    small = {"num_labels" if key == "num_classes" else key: value for key, value in SMALL.items()}
    config = getattr(library, f"{name}Config")(image_size=small.pop("img_size"), **small)
    return randomise(getattr(library, f"{name}{kind}")(config))


def model_of(library, version):
    """A library's model of the size ``SMALL``, random."""
    if library == "torchvision":
        return torchvision_model(version)
    if library == "transformers":
        return transformers_model(version)
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
    assert log() == [
        "the checkpoint: left out norm.*, which the model does not have; left out head.*, which the model does not have"
    ]


def test_another_window_of_v2(log):
    """Its bias is computed for any window, so that nothing is resized."""
    theirs = build(microsoft_swin.SwinTransformerV2).state_dict()
    model = build(SwinTransformerV2, seed=1, window_size=(7, 5), img_size=56, pretrained_window_sizes=(4, 4))
    assert_loaded(load_checkpoint(model, theirs), from_microsoft(theirs))
    assert not log()


@pytest.mark.parametrize("library", ["microsoft", "timm", "torchvision", "transformers"])
@pytest.mark.parametrize("version", [1, 2])
def test_the_other_version(version, library):
    other = 3 - version
    state = model_of(library, other).state_dict()
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
    for path in (tmp_path / "swin.pth", tmp_path / "swin.safetensors", tmp_path, "https://example.com/swin.pth"):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            load_checkpoint(build(), path)


def test_whole_model(tmp_path):
    path, model = tmp_path / "swin.pth", build()
    torch.save(model, path)
    with pytest.raises(
        ValueError, match=r"more than tensors \(swinops\S+\).*or checkpoint\.state_dict\(\) of a whole model"
    ):
        load_checkpoint(build(), path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("contents", ["empty", "text", "truncated", "pickle"])
def test_no_checkpoint(contents, suffix, tmp_path):
    path = save(build().state_dict(), tmp_path / f"swin{suffix}")
    data = {"empty": b"", "text": b"<html>not found</html>\n" * 9, "truncated": path.read_bytes()[:-999]}
    data["pickle"] = pickle.dumps({"model": 1}, protocol=2)
    path.write_bytes(data[contents])
    model = build()
    with unchanged(model), pytest.raises(ValueError, match=rf"swin\{suffix}"):
        load_checkpoint(model, path)


@pytest.mark.parametrize(
    "contents, what",
    [
        ([torch.ones(2)], "a state dict, got list"),
        (torch.ones(2), "a state dict, got Tensor"),
        ({"epoch": 3, "optimizer": {}}, r"tensors by name.* got 'epoch' \(int\), 'optimizer' \(dict\)"),
        ({"state_dict_ema": {"norm.bias": torch.ones(2)}}, r"tensors by name.* got 'state_dict_ema' \(dict\)"),
        ({"model": {}}, "tensors by name.* got nothing"),
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
