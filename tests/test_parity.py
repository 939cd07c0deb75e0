"""The models compute what timm's, Microsoft's, torchvision's and Transformers' compute: outputs, and every gradient.

Theirs are saved to files, and ours are loaded from those. Every parameter is random: as initialised, norms are ones and
biases zeros, and little depends on the bias tables; a whole block of V2 is the identity.
"""

import copy
import math

import pytest
import torch

import swinops
from swinops.benchmarks.models import randomise
from swinops.checkpoints.loading import SOURCES
from swinops.models.swin import SwinTransformer
from swinops.models.swinv2 import SwinTransformerV2
from swinops.testing import assert_accurate, random_tensor

from . import microsoft_swin

SMALL = {
    1: dict(embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=7, num_classes=10),
    2: dict(embed_dim=16, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 8), window_size=8, num_classes=10),
}
TINY = {1: ("swin_tiny_patch4_window7_224", 224, 28_288_354), 2: ("swinv2_tiny_window8_256", 256, 28_347_154)}


def timm_model(version, size, **options):
    name = "swin_transformer" if version == 1 else "swin_transformer_v2"
    module = pytest.importorskip(f"timm.models.{name}")
    cls = module.SwinTransformer if version == 1 else module.SwinTransformerV2
    return at_random(cls(img_size=size, **{**SMALL[version], **options}))


def microsoft_model(version, size, **options):
    cls = microsoft_swin.SwinTransformer if version == 1 else microsoft_swin.SwinTransformerV2
    return at_random(cls(img_size=size, **{**SMALL[version], **options}))


def torchvision_model(version, size, **options):
    """For every size."""
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    options = {**SMALL[version], **options}
    options["window_size"] = [options["window_size"]] * 2
    if version == 2:
        options |= dict(block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2)
    return at_random(swin.SwinTransformer(patch_size=[4, 4], **options))


def transformers_model(version, size, **options):
    """Its Swinv2 adds the mask twice, which shows where a scale is 100: exp(100 - 100) is left, or exp(100 - 200).

    The only such scale, see ``at_random``, is in the last block, whose map is here a single window without a mask.
    """
    library, name = pytest.importorskip("transformers"), "Swin" if version == 1 else "Swinv2"
    options = {"num_labels" if key == "num_classes" else key: x for key, x in {**SMALL[version], **options}.items()}
    config = getattr(library, f"{name}Config")(image_size=size, **options)
    return at_random(getattr(library, f"{name}ForImageClassification")(config))


def at_random(model):
    """``model`` for inference with all its parameters at random.

    The last head's logit scale is more than the log(100) it is clamped at. In every block that would be chaos: a
    rounding error would grow a hundredfold from each to the next.
    """
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    scales = [x.data for name, x in randomise(model).named_parameters() if name.endswith("logit_scale")]
    for x in scales:
        x.copy_(torch.linspace(math.log(2), math.log(12), len(x)).view_as(x))
    if scales:
        scales[-1][-1] = math.log(300)
    unmoved = [name for name, x in model.named_parameters() if torch.equal(x, before[name])]
    assert not unmoved, unmoved
    return model.eval()


def load(theirs, folder, name=None, **options):
    """Our model with the parameters of theirs, by way of a file."""
    if isinstance(theirs, microsoft_swin.SwinTransformer):
        path = folder / "swin.pth"
        torch.save({"model": theirs.state_dict()}, path)
    else:
        path = folder / "swin.safetensors"
        pytest.importorskip("safetensors.torch").save_file(theirs.state_dict(), path)
    if name is not None:
        return swinops.create_model(name, checkpoint=path, **options).eval()
    version = 2 if any(name.endswith("logit_scale") for name, _ in theirs.named_parameters()) else 1
    cls = SwinTransformer if version == 1 else SwinTransformerV2
    model = randomise(cls(**{**SMALL[version], **options}), seed=1).eval()
    return swinops.checkpoints.load_checkpoint(model, path)


def image(size, batch=1):
    return random_tensor((batch, 3, *((size, size) if isinstance(size, int) else size)), 99)


def results(model, x):
    """Output, and the gradients of the input and of every parameter by our name for it."""
    x = x.detach().requires_grad_()
    out = model(x)
    out = getattr(out, "logits", out)  # Transformers'
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, [x, *parameters], random_tensor(out.shape, 7).to(out))
    found = {"out": out.detach(), **dict(zip(("x", *names), grads, strict=True))}
    library = next((library for library in SOURCES if library.recognises(found)), None)
    return found if library is None else library.convert(found)


def in_float64(model):
    """A copy, with V2's coordinates as they are: the libraries keep them rounded to float32."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if hasattr(module, "relative_coords_table"):
            windows = module.window_size, getattr(module, "pretrained_window_size", (0, 0))
            module.relative_coords_table.copy_(microsoft_swin.coordinates(*windows))
    return model


def errors(of, exact):
    """The largest error of each tensor, relative to the tensor's largest value."""
    assert of.keys() == exact.keys()
    return {name: float((of[name].double() - x).abs().max() / x.abs().max()) for name, x in exact.items()}


def assert_same(ours, theirs, x, float64=True):
    """Equal in float64; and in float32 as exact as theirs, by the rule of ``swinops.testing.accuracy``.

    Theirs is the error of its worst tensor: what reaches a tensor through the rest of a model is rounding, by luck
    smaller in the one or in the other.
    """
    exact = results(in_float64(theirs), x.double())
    allowed = 2 * max(errors(results(theirs, x), exact).values()) + torch.finfo(x.dtype).eps
    assert allowed < 1e-4
    off = {name: error for name, error in errors(results(ours, x), exact).items() if not error <= allowed}
    assert not off, f"allowed {allowed:.1e}, off by {off}"
    if float64:
        assert_same_in_float64(ours, exact, x)


def assert_same_in_float64(ours, exact, x):
    found = errors(results(copy.deepcopy(ours).double(), x.double()), exact)
    off = {name: error for name, error in found.items() if not error <= 1e-12}
    assert not off, f"in float64 off by {off}"


@pytest.mark.parametrize("version, size", [(1, 224), (1, 448), (1, (232, 200)), (2, 256), (2, 240), (2, (264, 232))])
def test_timm(version, size, tmp_path):
    """timm's is built for the size, ours for 224 or 256."""
    theirs = timm_model(version, size)
    assert_same(load(theirs, tmp_path, pad_order="roll_pad"), theirs, image(size))


@pytest.mark.parametrize("size", [224, 448, (230, 261)])
def test_microsoft(size, tmp_path):
    """Theirs is built for the size, ours for 224. The last size pads the image, each stage's tokens, and merging."""
    theirs = microsoft_model(1, size, pad=not isinstance(size, int))
    assert_same(load(theirs, tmp_path, pad_order="pad_roll"), theirs, image(size))


@pytest.mark.parametrize("size, stages", [(256, 4), ((256, 384), 3)])
def test_microsoft_v2(size, stages, tmp_path):
    """Theirs takes only what its windows divide, and shifts along both axes of a map or along none."""
    options = dict(depths=(2, 2, 2, 2)[:stages], num_heads=(2, 2, 4, 8)[:stages])
    theirs = microsoft_model(2, size, **options)
    assert_same(load(theirs, tmp_path, **options), theirs, image(size))


@pytest.mark.parametrize("version, size", [(1, 224), (1, (232, 200)), (2, 256), (2, (264, 232)), (2, 128)])
def test_torchvision(version, size, tmp_path):
    """At the last size the last stage's map is smaller than the window, and padded."""
    theirs = torchvision_model(version, size)
    assert_same(load(theirs, tmp_path), theirs, image(size))


@pytest.mark.parametrize("version, size", [(1, 224), (2, 256), (2, (240, 208))])
def test_transformers(version, size, tmp_path):
    """Both are built for a square."""
    theirs = transformers_model(version, 224 if version == 1 else 256)
    assert_same(load(theirs, tmp_path), theirs, image(size))


@pytest.mark.parametrize("build", [timm_model, microsoft_model])
@pytest.mark.parametrize("version", [1, 2])
def test_swin_tiny(version, build, tmp_path):
    """The published model at its own size."""
    name, size, count = TINY[version]
    options = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), num_classes=1000)
    theirs = build(version, size, **options)
    ours = load(theirs, tmp_path, name)
    assert sum(p.numel() for p in ours.parameters()) == count
    assert_same(ours, theirs, image(size), float64=False)


@pytest.mark.parametrize("build", [timm_model, microsoft_model])
def test_pretrained_windows(build, tmp_path):
    """A published setting: trained at 192 pixels with windows of 12, and of 6 in the last stage."""
    options = dict(embed_dim=16, depths=(2, 1, 1, 1), num_heads=(2, 2, 2, 4), num_classes=10)
    theirs = build(2, 256, window_size=16, pretrained_window_sizes=(12, 12, 12, 6), **options)
    ours = load(theirs, tmp_path, "swinv2_base_window12to16_192to256", **options)
    assert_same(ours, theirs, image(256))


@pytest.mark.parametrize("version", [1, 2])
def test_microsoft_positions_and_cut_windows(version, tmp_path):
    """Learned positions, and a window of 8 on maps of 16, 8 and 4: it is shifted, whole and cut."""
    options = dict(depths=(2, 2, 2), num_heads=(2, 2, 4), window_size=8)
    theirs = microsoft_model(version, 64, ape=True, **options)
    assert theirs.layers[2].blocks[1].window_size == 4
    ours = load(theirs, tmp_path, img_size=64, absolute_pos_embed=True, **options)
    assert_same(ours, theirs, image(64, 2))


@pytest.mark.parametrize("version", [1, 2])
def test_timm_cut_windows(version, tmp_path):
    """Maps of 12 x 20, 6 x 10 and 3 x 5 tokens: each axis by itself is shifted, whole, or less than the window of 6."""
    options = dict(depths=(2, 2, 2), num_heads=(2, 2, 4), window_size=6)
    theirs = timm_model(version, (48, 80), **options)
    assert theirs.layers[2].blocks[1].window_size == (3, 5)
    ours = load(theirs, tmp_path, img_size=(48, 80), pad_order="roll_pad", **options)
    assert_same(ours, theirs, image((48, 80), 2))


@pytest.mark.parametrize("build", [timm_model, microsoft_model, torchvision_model, transformers_model])
def test_mask_at_a_scale_of_100(build, tmp_path):
    """-100 is added, and not -inf: a head of two channels may point away from all that is not masked.

    Transformers adds it twice, and then differs. In float64 alone, for float32 such a head is chaos.
    """
    options, size = dict(depths=(2,), num_heads=(8,), window_size=4), (64, 96) if build is microsoft_model else (60, 92)
    theirs, x = build(2, 128 if build is transformers_model else size, **options), image(size)
    ours = load(theirs, tmp_path, pad_order="roll_pad" if build is timm_model else "pad_roll", **options)
    exact = results(in_float64(theirs), x.double())
    if build is transformers_model:
        with pytest.raises(AssertionError, match="in float64 off by"):
            assert_same_in_float64(ours, exact, x)
    else:
        assert_same_in_float64(ours, exact, x)


LAUNCHES = {
    1: dict(window_attention=4, relative_position_bias=4, layer_norm=6, add_layer_norm=4, patch_merging_norm=1),
    2: dict(cosine_attention=4, continuous_position_bias=4, layer_norm=3, layer_norm_add=8),
}


@pytest.mark.parametrize(
    "version, build, size",
    [
        (1, timm_model, (44, 36)),
        (1, microsoft_model, (44, 36)),
        (2, timm_model, (44, 36)),
        (2, microsoft_model, 64),
        (2, torchvision_model, (44, 36)),
        (2, transformers_model, (32, 32)),
    ],
)
def test_kernels(version, build, size, tmp_path, monkeypatch, device):
    """The same with Triton's kernels, most at a size that pads; in the interpreter where there is no GPU."""
    import swinops.kernels

    launches = {name + direction: 0 for name in LAUNCHES[version] for direction in ("", "_backward")}
    for name in launches:
        f = getattr(swinops.kernels, name)

        def counted(*args, f=f, name=name):
            launches[name] += 1
            return f(*args)

        monkeypatch.setattr(swinops.kernels, name, counted)
    options = dict(depths=(2, 2), num_heads=(2, 2), window_size=4)
    pad = dict(pad=True) if (version, build) == (1, microsoft_model) else {}
    theirs = build(version, size, **options, **pad)
    pad_order = "roll_pad" if build is timm_model else "pad_roll"
    ours = load(theirs, tmp_path, img_size=size, pad_order=pad_order, backend="triton", **options)
    assert_same(ours.to(device), theirs.to(device), image(size).to(device), float64=False)
    assert launches == {name + direction: n for name, n in LAUNCHES[version].items() for direction in ("", "_backward")}


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_features_only(version, tmp_path):
    theirs, x = timm_model(version, (232, 200)), image((232, 200))
    maps = load(theirs, tmp_path, img_size=(232, 200), pad_order="roll_pad", features_only=True)(x)
    plain = theirs.forward_intermediates(x, intermediates_only=True)
    exact = in_float64(theirs).forward_intermediates(x.double(), intermediates_only=True)
    for actual, *expected in zip(maps, plain, exact, strict=True):
        assert_accurate(actual, *expected, "map")


@pytest.mark.parametrize("change", ["pad order", "merging", "stage", "table", "shift"])
def test_these_tests_can_fail(change, tmp_path):
    options = dict(depths=(2, 2), num_heads=(1, 2), window_size=4)
    theirs = timm_model(1, (60, 44), **options)
    ours = load(theirs, tmp_path, pad_order="roll_pad", **options)
    x = image((60, 44))
    assert_same(ours, theirs, x)
    attention = [block.attn for layer in ours.layers for block in layer.blocks]
    if change == "pad order":
        attention[1].pad_order = "pad_roll"
    elif change == "merging":
        weight = ours.layers[1].downsample.reduction.weight
        weight.data = weight.data.unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1)
    elif change == "stage":
        ours.layers[1].blocks[0], ours.layers[1].blocks[1] = ours.layers[1].blocks[1], ours.layers[1].blocks[0]
    elif change == "table":
        table = attention[3].relative_position_bias_table
        table.data = table.data.unflatten(0, (7, 7)).transpose(0, 1).flatten(0, 1)
    else:
        attention[3].shift_size = [1, 2]
    with pytest.raises(AssertionError, match="off by"):
        assert_same(ours, theirs, x)


@pytest.mark.parametrize("change", ["biases", "scales", "clamp", "network", "pretrained window", "norms", "spacing"])
def test_these_tests_can_fail_for_v2(change, tmp_path):
    options = dict(depths=(2, 2), num_heads=(2, 2), window_size=4, pretrained_window_sizes=(3, 3))
    theirs = timm_model(2, (60, 44), **options)
    ours = load(theirs, tmp_path, pad_order="roll_pad", **options)
    x = image((60, 44))
    assert_same(ours, theirs, x)
    block = ours.layers[1].blocks[1]
    attn = block.attn
    with torch.no_grad():
        if change == "biases":
            attn.q_bias, attn.v_bias = attn.v_bias, attn.q_bias
        elif change == "scales":
            attn.logit_scale.copy_(attn.logit_scale.flip(0))
        elif change == "clamp":
            attn.logit_scale[1] = math.log(99)
        elif change == "network":
            attn.cpb_mlp[0].weight.copy_(attn.cpb_mlp[0].weight.flip(1))
        elif change == "pretrained window":
            attn.pretrained_window_size = [4, 4]
        elif change == "norms":
            block.norm1, block.norm2 = block.norm2, block.norm1
        else:
            attn.log_spaced = False
    with pytest.raises(AssertionError, match="off by"):
        assert_same(ours, theirs, x)
