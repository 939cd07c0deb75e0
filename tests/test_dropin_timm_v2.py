"""timm's Swin V2 and V2-CR on the ops: the same outputs and gradients with every option, at sizes that pad or not."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import swinops
from swinops.testing import assert_accurate

from . import timm_swins
from .timm_swins import FAMILIES, assert_same, blocks, count_calls, image, randomise, results

pytest.importorskip("timm.models.swin_transformer_v2_cr")
timm = pytest.importorskip("timm")

# model options, and the image to run; a map is half the size of its image, and a window is 4 x 4
CASES = {
    "v2": {
        "no pads": ({}, 16),
        "pads": ({}, (14, 10)),
        "pads on one axis": ({}, (16, 10)),
        "window of 7": ({"window_size": 7}, (28, 18)),
        "non-square window": ({"window_size": (4, 3)}, (12, 14)),
        "a window per stage": ({"window_size": ((2, 5), (4, 3)), "depths": (2, 2), "num_heads": (1, 2)}, (8, 14)),
        "shift on one axis": ({}, (8, 14)),
        "window clamped to a row": ({}, (2, 10)),
        "always_partition": ({"always_partition": True}, (6, 10)),
        "always_partition, pads": ({"always_partition": True, "window_size": (4, 7)}, (18, 10)),
        "pretrained window": ({"pretrained_window_sizes": (3,)}, (14, 10)),
        "pretrained non-square window": ({"pretrained_window_sizes": ((7, 2),)}, (14, 10)),
        "pretrained on one axis": ({"pretrained_window_sizes": ((3, 0),)}, (14, 10)),
        "no qkv bias": ({"qkv_bias": False}, (14, 10)),
        "ragged channels": ({"embed_dim": 30}, (14, 10)),
        "any size": ({"img_size": 24, "strict_img_size": False}, (14, 18)),
        "any size, no pads": ({"img_size": 24, "strict_img_size": False}, (8, 16)),
    },
    "v2_cr": {
        "no pads": ({}, 16),
        "pads": ({}, (14, 10)),
        "non-square window": ({"window_size": (4, 3)}, (12, 14)),
        "a window per stage": ({"window_size": ((2, 5), (4, 3)), "depths": (2, 2), "num_heads": (1, 2)}, (8, 14)),
        "window from a ratio": ({"window_size": None, "window_ratio": 2}, (20, 12)),
        "window clamped to a row": ({}, (2, 10)),
        "always_partition, pads": ({"always_partition": True, "window_size": (4, 7)}, (18, 10)),
        "extra norms": ({"extra_norm_period": 1, "extra_norm_stage": True}, (14, 10)),
        "sequential attention": ({"sequential_attn": True}, (14, 10)),
        "any size": ({"img_size": 24, "strict_img_size": False}, (14, 18)),
    },
}
ALL = [(name, case) for name, cases in CASES.items() for case in cases]
# the shapes are the ops' own tests' matter: here the kernels run with each kind of bias, pads and settings
ON_KERNELS = [
    ("v2", "pads"), ("v2", "a window per stage"), ("v2", "pretrained non-square window"), ("v2_cr", "pads"),
    ("v2_cr", "any size"),
]  # fmt: skip


def build(name, **options):
    """A small model of one stage."""
    window = options.get("window_size") or 4
    if np.ndim(window) == 2 and not hasattr(FAMILIES["v1"].load(), "resolve_stage_window_sizes"):
        pytest.skip("this version of timm has one window for all stages")
    return timm_swins.build(FAMILIES[name], **{"img_size": 16, "depths": (2,), "num_heads": (2,), **options})


def example(name, case, batch=1):
    options, size = CASES[name][case]
    return build(name, **{"img_size": size, **options}), image(batch, size)


@pytest.fixture
def launches(monkeypatch):
    """Calls of the Triton backend's forward and backward."""
    import swinops.kernels

    ops = ("cosine_attention", "continuous_position_bias")
    return count_calls(monkeypatch, swinops.kernels, [f"{op}{way}" for op in ops for way in ("", "_backward")])


@pytest.fixture
def calls(monkeypatch):
    """Calls of the reference."""
    import swinops.reference

    ops = ("cosine_attention", "continuous_position_bias", "relative_position_bias")
    return count_calls(monkeypatch, swinops.reference, ops)


@pytest.mark.parametrize(("name", "case"), ON_KERNELS)
def test_kernels_equal_timm(name, case, launches, device):
    model, x = example(name, case)
    model, x = model.to(device), x.to(device)
    with swinops.patched(model, "triton"):
        actual = results(model, x)
    count = len(blocks(model))
    network = count if name == "v2" else 0
    assert launches == {
        "cosine_attention": count,
        "cosine_attention_backward": count,
        "continuous_position_bias": network,
        "continuous_position_bias_backward": network,
    }
    assert_same(actual, model, x)


@pytest.mark.parametrize(("name", "case"), ALL)
def test_reference_equals_timm(name, case, calls):
    model, x = example(name, case, batch=3)
    with swinops.patched(model, "reference"):
        actual = results(model, x)
    count = len(blocks(model))
    network = count if name == "v2" else 0
    assert calls == {"cosine_attention": count, "continuous_position_bias": network, "relative_position_bias": 0}
    assert_same(actual, model, x)


@pytest.mark.parametrize(("name", "case"), ALL)
def test_float64_differs_by_rounding_alone(name, case, calls):
    model, x = example(name, case)
    model, x = model.double(), x.double()
    with swinops.patched(model, "reference"):
        actual = results(model, x)
    # timm's coordinates are float32 numbers in float64 too, so V2's own network reads them
    count = len(blocks(model))
    network = count if name == "v2" else 0
    assert calls == {"cosine_attention": count, "continuous_position_bias": 0, "relative_position_bias": network}
    assert_same(actual, model, x)


@pytest.mark.parametrize(("name", "backend"), [("v2", "reference"), ("v2", "triton"), ("v2_cr", "reference")])
def test_set_input_size_after_the_patch(name, backend, device):
    """timm replaces the window, the shift, the mask, and the coordinates and the index of the bias."""
    model = swinops.patch(build(name, img_size=(14, 10)).to(device), backend)
    model.set_input_size(img_size=(10, 18), window_size=(3, 4))
    assert blocks(model)[1].attn.window_size == (3, 4)
    x = image(1, (10, 18)).to(device)
    assert_same(results(model, x), swinops.unpatch(model), x)


@pytest.mark.parametrize("name", ["v2", "v2_cr"])
@pytest.mark.parametrize("always_partition", [False, True])
def test_set_input_size_scales_the_windows(name, always_partition):
    model = swinops.patch(build(name, depths=(2, 2), num_heads=(2, 4)), "reference")
    model.set_input_size(img_size=(24, 40), always_partition=always_partition)
    x = image(1, (24, 40))
    assert_same(results(model, x), swinops.unpatch(model), x)


@pytest.mark.parametrize("name", ["v2", "v2_cr"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype, launches, device):
    model, x = example(name, "no pads")
    for b in blocks(model):  # at a scale of 100, gradients are little but rounding
        b.attn.logit_scale.data.clamp_(max=2)
    for p in model.parameters():
        p.data.copy_(p.to(dtype))
    # not a copy of the model in half precision: timm rounds the coordinates of V2's bias, and the op does not
    exact = copy.deepcopy(model).double().to(device)
    model, x = model.to(device, dtype), x.to(device, dtype)
    with swinops.patched(model, "triton"):
        actual = results(model, x)
    assert launches["cosine_attention"] == launches["cosine_attention_backward"] == 2
    assert_same(actual, model, x, exact)


@pytest.mark.parametrize(("size", "backend"), [(240, "reference"), (14, "triton")])
def test_pads_in_half_precision_are_finite(size, backend, device):
    """A pad's key is zero, and timm divides it by its length: 1e-12 at least, which is 0 in float16."""
    published = {"patch_size": 4, "window_size": 8} if size == 240 else {}
    model = build("v2", img_size=size, embed_dim=16, num_heads=(1,), **published)
    model, x = model.to(device).half(), image(1, size).to(device).half()
    assert not model(x).isfinite().any()
    with swinops.patched(model, backend):
        assert all(y.isfinite().all() for y in results(model, x).values())
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        actual = swinops.patch(model, backend)(x)
    assert (actual - exact).abs().max() < 0.02 * exact.abs().max()


def test_check_of_a_model_that_is_not_finite():
    report = swinops.check(build("v2", img_size=(14, 10)).half(), image(), "reference")
    assert report.ok and [row.original for row in report.rows[3:]] == [float("inf")] * 3, report
    assert not swinops.check(build("v2", img_size=(14, 10)).half(), image() / 0, "reference").ok


@pytest.mark.parametrize("name", ["v2", "v2_cr"])
def test_random_numbers_in_training(name):
    """The dropouts of V2-CR's bias and of the MLP, and the drop path: the same numbers in turn."""
    model = build(name, img_size=(14, 10), proj_drop_rate=0.2, drop_path_rate=0.3).train()
    for b in blocks(model):
        b.attn.proj_drop.p = 0.0  # the image's here, and in timm that of its windows
    states, outputs = [], []
    for patch in (copy.deepcopy, lambda model: swinops.patch(model, "reference")):
        torch.manual_seed(3)
        outputs.append(patch(model)(image()))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert torch.allclose(*outputs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(image()), outputs[1], rtol=1e-2)


class Lora(nn.Module):
    """A Linear with an adapter whose second layer has a bias."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.a, self.b = nn.Linear(base.in_features, 3), nn.Linear(3, base.out_features)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


class TestQkvOfV2:
    @pytest.mark.parametrize("two", [False, True])
    def test_separate_bias(self, two):
        """Also beside a bias of the projection's own."""
        model, x = example("v2", "pads")
        for b in blocks(model):
            b.attn.qkv_bias_separate = True
            b.attn.qkv = nn.Linear(b.dim, 3 * b.dim, bias=two)
        randomise(model)
        with swinops.patched(model, "reference"):
            actual = results(model, x)
        assert_same(actual, model, x)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(x)
            actual = swinops.patch(model, "reference")(x)
        assert (actual - expected).abs().max() <= 0.03 * expected.abs().max()

    def test_key_bias(self):
        """timm's is a buffer of zeros; whatever it holds is a pad's key."""
        model, x = example("v2", "pads")
        for b in blocks(model):
            b.attn.k_bias.copy_(image(1, 16).flatten()[: b.dim])
        with swinops.patched(model, "reference"):
            actual = results(model, x)
        assert_same(actual, model, x)

    @pytest.mark.parametrize("separate", [False, True])
    def test_lora_has_the_effect_that_it_has_in_timm(self, separate):
        model, x = example("v2", "pads")
        for b in blocks(model):
            b.attn.qkv, b.attn.qkv_bias_separate = Lora(b.attn.qkv), separate
        randomise(model)
        adapter = [p for name, p in model.named_parameters() if ".qkv.a." in name or ".qkv.b." in name]
        outputs = []
        for patch in (swinops.unpatch, lambda model: swinops.patch(model, "reference")):
            out = patch(model)(x)
            grads = torch.autograd.grad(out.square().sum(), adapter, allow_unused=True)
            assert [dp is not None for dp in grads] == [separate] * len(adapter)
            outputs.append(torch.cat([out.flatten(), *(dp.flatten() for dp in grads if separate)]))
        expected, actual = outputs
        assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


class Network(nn.Sequential):
    """Another class, as a wrapper's."""


class TestNetworkOfV2:
    """Where the network of the bias is not timm's own, it is called."""

    def lora(attn):
        attn.cpb_mlp[2] = Lora(attn.cpb_mlp[2])

    def another_activation(attn):
        attn.cpb_mlp[1] = nn.GELU()

    def another_depth(attn):
        attn.cpb_mlp = nn.Sequential(*attn.cpb_mlp, nn.Linear(attn.num_heads, attn.num_heads))

    def another_class(attn):
        attn.cpb_mlp = Network(*attn.cpb_mlp)

    def bias(attn):
        attn.cpb_mlp[2] = nn.Linear(512, attn.num_heads)

    def hook(attn):
        attn.cpb_mlp.register_forward_hook(lambda module, args, out: out + 1)

    def hook_within(attn):
        attn.cpb_mlp[1].register_forward_hook(lambda module, args, out: out * 2)

    def parametrized(attn):
        nn.utils.parametrize.register_parametrization(attn.cpb_mlp[0], "weight", nn.Tanh())

    def coordinates(attn):
        attn.cpb_mlp[2] = Lora(attn.cpb_mlp[2])
        attn.relative_coords_table = attn.relative_coords_table * 0.7

    CHANGES = (
        lora, another_activation, another_depth, another_class, bias, hook, hook_within, parametrized, coordinates
    )  # fmt: skip

    @pytest.mark.parametrize("change", CHANGES)
    def test_is_called(self, change, calls):
        model, x = example("v2", "pads")
        for b in blocks(model):
            change(b.attn)
        randomise(model)
        with swinops.patched(model, "reference"):
            actual = results(model, x)
        assert calls == {"cosine_attention": 2, "continuous_position_bias": 0, "relative_position_bias": 2}
        assert_same(actual, model, x)

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    @pytest.mark.parametrize("change", [lora, another_depth])
    def test_is_called_where_traced(self, change, calls):
        model, x = example("v2", "pads")
        for b in blocks(model):
            change(b.attn)
        randomise(model)
        expected = model(x)
        swinops.patch(model, "reference")
        for traced in (torch.jit.script(model), torch.fx.symbolic_trace(model)):
            assert torch.allclose(traced(x), expected, rtol=1e-4, atol=1e-5)
        assert calls == {"cosine_attention": 4, "continuous_position_bias": 0, "relative_position_bias": 4}

    @pytest.mark.parametrize("buffer", ["relative_coords_table", "relative_position_index"])
    def test_another_buffer_is_left(self, buffer):
        model, x = example("v2", "pads")
        setattr(blocks(model)[1].attn, buffer, getattr(blocks(model)[1].attn, buffer).flip(1))
        expected = model(x)
        with pytest.warns(UserWarning, match=f"its {buffer} is not timm's"):
            swinops.patch(model, "reference")
        assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_rounded_coordinates_are_timms(self, dtype):
        model = build("v2", img_size=(14, 10), window_size=(5, 4), pretrained_window_sizes=(3,)).to(dtype)
        assert {row.action for row in swinops.explain(model)} == {"replace"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["v2", "v2_cr"])
def test_traced_for_any_size(name, calls):
    """timm's own cannot be traced: it writes masks."""
    model, x = example(name, "any size")
    expected = model(x)
    with pytest.raises(TypeError, match="does not support item assignment"):
        torch.fx.symbolic_trace(model)
    swinops.patch(model, "reference")
    for traced in (torch.jit.script(model), torch.fx.symbolic_trace(model)):
        assert torch.allclose(traced(x), expected, rtol=1e-4, atol=1e-5)
    assert calls["cosine_attention"] == 4


@torch.no_grad()
@pytest.mark.parametrize("model", ["swinv2_base_window12to16_192to256", "swinv2_cr_tiny_ns_224"])
def test_published(model):
    model = randomise(timm.create_model(model, img_size=64, depths=(2, 2, 2, 2), embed_dim=32, num_heads=(1, 2, 4, 8)))
    x = image(1, 64)
    assert [row.action for row in swinops.explain(model.eval())][-8:] == ["replace"] * 8
    with swinops.patched(model, "reference"):
        actual = model(x)
    assert_accurate(actual, model(x), copy.deepcopy(model).double()(x.double()), "logits")


@pytest.mark.parametrize("name", ["v2", "v2_cr"])
def test_explain_from_the_command_line(name, capsys):
    from swinops import cli

    assert cli.main(["explain", "--model", FAMILIES[name].example]) == 0
    out = capsys.readouterr().out
    assert out.count(f"{FAMILIES[name].block}  timm     replace") == 12


@pytest.mark.parametrize(
    "change", ["pad_roll", "no pad_kv", "no mask", "window transposed", "no bias", "another scale"]
)
def test_these_tests_can_fail(change, monkeypatch):
    import swinops.reference

    attention = swinops.reference.cosine_attention

    def wrong(q, k, v, logit_scale, bias, pad_kv, window, shift, pad_order, mask_value):
        pad_order = "pad_roll" if change == "pad_roll" else pad_order
        pad_kv = None if change == "no pad_kv" else pad_kv
        mask_value = 0.0 if change == "no mask" else mask_value
        window, shift = (window[::-1], shift[::-1]) if change == "window transposed" else (window, shift)
        bias = None if change == "no bias" else bias
        logit_scale = logit_scale.clamp(max=3) if change == "another scale" else logit_scale
        return attention(q, k, v, logit_scale, bias, pad_kv, window, shift, pad_order, mask_value)

    monkeypatch.setattr(swinops.reference, "cosine_attention", wrong)
    model, x = build("v2", img_size=(14, 10), window_size=(4, 3)), image(1)
    with swinops.patched(model, "reference"), torch.no_grad():
        actual = model(x)
    with torch.no_grad():
        expected = model(x)
    assert (actual - expected).abs().max() > 1e-3 * expected.abs().max()
