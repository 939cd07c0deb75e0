"""The models compute what timm's and Microsoft's compute: outputs, and the gradients of image and parameters.

Theirs are saved to files, and ours are loaded from those. Every parameter is random: as initialised, norms are ones and
biases zeros, and little depends on the bias tables.
"""

import copy

import pytest
import torch

import swinops
from swinops.benchmarks.models import randomise
from swinops.checkpoints import microsoft
from swinops.models.swin import SwinTransformer
from swinops.testing import assert_accurate, random_tensor

from . import microsoft_swin

SMALL = dict(embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=7, num_classes=10)
TINY = "swin_tiny_patch4_window7_224"


def timm_model(size, **options):
    swin = pytest.importorskip("timm.models.swin_transformer")
    return randomise(swin.SwinTransformer(img_size=size, drop_path_rate=0.0, **{**SMALL, **options})).eval()


def microsoft_model(size, **options):
    return randomise(microsoft_swin.SwinTransformer(img_size=size, **{**SMALL, **options})).eval()


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
    model = randomise(SwinTransformer(**{**SMALL, **options}), seed=1).eval()
    return swinops.checkpoints.load_checkpoint(model, path)


def image(size, batch=1):
    return random_tensor((batch, 3, *((size, size) if isinstance(size, int) else size)), 99)


def results(model, x):
    """Output, and the gradients of the input and of every parameter by our name for it."""
    x = x.detach().requires_grad_()
    out = model(x)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, [x, *parameters], random_tensor(out.shape, 7).to(out))
    found = {"out": out.detach(), **dict(zip(("x", *names), grads, strict=True))}
    return microsoft.convert(found) if isinstance(model, microsoft_swin.SwinTransformer) else found


def errors(of, exact):
    """The largest error of each tensor, relative to the tensor's largest value."""
    assert of.keys() == exact.keys()
    return {name: float((of[name].double() - x).abs().max() / x.abs().max()) for name, x in exact.items()}


def assert_same(ours, theirs, x, float64=True):
    """Equal in float64; and in float32 as exact as theirs, by the rule of ``swinops.testing.accuracy``.

    Theirs is the error of its worst tensor: what reaches a tensor through the rest of a model is rounding, by luck
    smaller in the one or in the other.
    """
    exact = results(copy.deepcopy(theirs).double(), x.double())
    allowed = 2 * max(errors(results(theirs, x), exact).values()) + torch.finfo(x.dtype).eps
    assert allowed < 1e-4
    off = {name: error for name, error in errors(results(ours, x), exact).items() if not error <= allowed}
    assert not off, f"allowed {allowed:.1e}, off by {off}"
    if float64:
        found = errors(results(copy.deepcopy(ours).double(), x.double()), exact)
        off = {name: error for name, error in found.items() if not error <= 1e-12}
        assert not off, f"in float64 off by {off}"


@pytest.mark.parametrize("size", [224, 448, (232, 200)])
def test_timm(size, tmp_path):
    """timm's is built for the size, ours for 224."""
    theirs = timm_model(size)
    assert_same(load(theirs, tmp_path, pad_order="roll_pad"), theirs, image(size))


@pytest.mark.parametrize("size", [224, 448, (230, 261)])
def test_microsoft(size, tmp_path):
    """Theirs is built for the size, ours for 224. The last size pads the image, each stage's tokens, and merging."""
    theirs = microsoft_model(size, pad=not isinstance(size, int))
    assert_same(load(theirs, tmp_path, pad_order="pad_roll"), theirs, image(size))


@pytest.mark.parametrize("build", [timm_model, microsoft_model])
def test_swin_tiny(build, tmp_path):
    """The published model at its own size."""
    theirs = build(224, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), num_classes=1000)
    ours = load(theirs, tmp_path, TINY)
    assert sum(p.numel() for p in ours.parameters()) == 28_288_354
    assert_same(ours, theirs, image(224), float64=False)


def test_microsoft_positions_and_cut_windows(tmp_path):
    """Learned positions, and a window of 8 on maps of 16, 8 and 4: it is shifted, whole and cut."""
    options = dict(depths=(2, 2, 2), num_heads=(1, 2, 4), window_size=8)
    theirs = microsoft_model(64, ape=True, **options)
    assert theirs.layers[2].blocks[1].window_size == 4
    ours = load(theirs, tmp_path, img_size=64, absolute_pos_embed=True, **options)
    assert_same(ours, theirs, image(64, 2))


def test_timm_cut_windows(tmp_path):
    """Maps of 12 x 20, 6 x 10 and 3 x 5 tokens: each axis by itself is shifted, whole, or less than the window of 6."""
    options = dict(depths=(2, 2, 2), num_heads=(1, 2, 4), window_size=6)
    theirs = timm_model((48, 80), **options)
    assert theirs.layers[2].blocks[1].window_size == (3, 5)
    ours = load(theirs, tmp_path, img_size=(48, 80), pad_order="roll_pad", **options)
    assert_same(ours, theirs, image((48, 80), 2))


@pytest.mark.parametrize("library", ["timm", "microsoft"])
def test_kernels(library, tmp_path, monkeypatch, device):
    """The same with Triton's kernels, at a size that pads; in the interpreter where there is no GPU."""
    import swinops.kernels

    blocks, norms, merges = 4, 6, 1  # a block has one norm by itself, and so do the patches and the head
    calls = dict(window_attention=blocks, relative_position_bias=blocks, layer_norm=norms, add_layer_norm=blocks)
    calls["patch_merging_norm"] = merges
    launches = {name + direction: 0 for name in calls for direction in ("", "_backward")}
    for name in launches:
        f = getattr(swinops.kernels, name)

        def counted(*args, f=f, name=name):
            launches[name] += 1
            return f(*args)

        monkeypatch.setattr(swinops.kernels, name, counted)
    size, options = (44, 36), dict(depths=(2, 2), num_heads=(1, 2), window_size=4)
    theirs = timm_model(size, **options) if library == "timm" else microsoft_model(size, pad=True, **options)
    pad_order = "roll_pad" if library == "timm" else "pad_roll"
    ours = load(theirs, tmp_path, img_size=size, pad_order=pad_order, backend="triton", **options)
    assert_same(ours.to(device), theirs.to(device), image(size).to(device), float64=False)
    assert launches == {name + direction: n for name, n in calls.items() for direction in ("", "_backward")}


@torch.no_grad()
def test_features_only(tmp_path):
    theirs, x = timm_model((232, 200)), image((232, 200))
    maps = load(theirs, tmp_path, pad_order="roll_pad", features_only=True)(x)
    plain = theirs.forward_intermediates(x, intermediates_only=True)
    exact = theirs.double().forward_intermediates(x.double(), intermediates_only=True)
    for actual, *expected in zip(maps, plain, exact, strict=True):
        assert_accurate(actual, *expected, "map")


@pytest.mark.parametrize("change", ["pad order", "merging", "stage", "table", "shift"])
def test_these_tests_can_fail(change, tmp_path):
    theirs = timm_model((60, 44), depths=(2, 2), num_heads=(1, 2), window_size=4)
    ours = load(theirs, tmp_path, depths=(2, 2), num_heads=(1, 2), window_size=4, pad_order="roll_pad")
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
