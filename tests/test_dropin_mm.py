"""What is special to OpenMMLab's Swins: small images, the layer at the end, and the two attentions of mmpretrain."""

import pytest
import torch
from torch import nn

import swinops
from swinops.dropin import swap

from .dropin_mm import CASES, Backbone, build, image
from .openmmlab import attention, swin
from .timm_swins import assert_same, randomise, results
from .vendored import copy_of, refusal

MODELS = {case.name: case for case in CASES}
V2 = {"window_msa": attention.WindowMSAV2, "last": True}
SIZE = (14, 10)


def msa(model):
    return model.blocks[1].attn


def rows(model):
    return swinops.explain(model, "reference")


def assert_parity(model, size):
    x = image(2, size)
    for dtype in (torch.float64, torch.float32):
        model, x = model.to(dtype), x.to(dtype)
        with swinops.patched(model, "reference"):
            actual = results(model, x)
        assert_same(actual, model, x)


class TestOptions:
    @pytest.mark.parametrize(
        ("module", "options"),
        [
            (swin, {"qkv_bias": False}),
            (swin, {"qk_scale": 0.7}),
            (attention, {"qkv_bias": False}),
            (attention, {"qk_scale": 0.7}),
            (attention, {"qkv_bias": False, **V2}),
            (attention, {"pretrained_window_size": (8, 8), **V2}),
            (attention, {"cpb_mlp_hidden_dims": 7, **V2}),
        ],
        ids=str,
    )
    def test_numbers(self, module, options, calls):
        assert_parity(build(module, **options), SIZE)
        assert sum(calls.values()) == 4

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize(("option", "rate"), [("drop_path_rate", 0.5), ("proj_drop", 1.0)])
    def test_dropout_outside_of_the_attention(self, name, option, rate, calls):
        """The same branches are dropped at the same random numbers, and what follows the projection is."""
        option = "proj_drop_rate" if (name, option) == ("mmseg", "proj_drop") else option
        model, x = MODELS[name].model(**{option: rate}).double().train(), image(8, SIZE).double()
        torch.manual_seed(0)
        expected = model(x)
        assert not torch.allclose(model.eval()(x), expected)
        torch.manual_seed(0)
        actual = swinops.patch(model, "reference").train()(x)
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-10)
        assert sum(calls.values()) == 2

    @pytest.mark.parametrize("name", MODELS)
    def test_the_layer_at_the_end(self, name, calls):
        """It may be any; hooks on it run."""
        model, seen = MODELS[name].model(), []
        msa(model).drop = nn.Softsign()
        msa(model).drop.register_forward_hook(lambda *args: seen.append(1))
        assert_parity(model, SIZE)
        assert sum(calls.values()) == 4 and seen

    @pytest.mark.parametrize("name", MODELS)
    def test_a_wrapped_projection(self, name, calls):
        """Of which the number of channels cannot be read."""
        model = MODELS[name].model()
        msa(model).w_msa.proj = nn.Sequential(msa(model).w_msa.proj, nn.Tanh())
        assert not [row.reason for row in rows(model) if row.reason]
        assert_parity(model, SIZE)
        assert sum(calls.values()) == 4

    def test_a_backbone_whose_eval_returns_nothing(self):
        class Published(Backbone):
            def train(self, mode=True):
                super().train(mode)

        model = randomise(Published(swin))
        assert model.eval() is None
        assert swinops.check(model, image(2, SIZE), "reference").ok


class TestSmallMaps:
    """A map is half the size of its image, and a window has 4 x 4 tokens."""

    def shifts(self, monkeypatch, model, size):
        """What the op is told, per block."""
        import swinops.reference

        seen = []
        for name in ("window_attention", "cosine_attention"):
            f = getattr(swinops.reference, name)
            shift = 6 if name == "window_attention" else 7  # q, k, v, (logit_scale,) bias, pad_kv, window, shift
            monkeypatch.setattr(
                swinops.reference, name, lambda *args, f=f, n=shift: (seen.append(list(args[n])), f(*args))[1]
            )
        with swinops.patched(model, "reference"):
            model(image(1, size))
        return seen

    @pytest.mark.parametrize(
        ("module", "options", "shift"),
        [(swin, {}, 2), (attention, {}, 0), (attention, {"pad_small_map": True}, 2), (attention, V2, 0)],
        ids=str,
    )
    @pytest.mark.parametrize("size", [(8, 8), (8, 18), (14, 8)])
    def test_one_window(self, module, options, shift, size, monkeypatch):
        model = build(module, **options)
        assert_parity(model, size)
        assert self.shifts(monkeypatch, model, size) == [[0, 0], [shift, shift]]

    @pytest.mark.parametrize("options", [{}, V2], ids=str)
    def test_less_than_a_window(self, options, calls):
        """mmpretrain refuses it, unless it pads small maps."""
        model, x = build(attention, **options), image(1, (6, 10))
        expected = refusal(model, x)
        assert expected == "an image of 3 x 5 is smaller than the window; set pad_small_map=True"
        assert refusal(swinops.patch(model, "reference"), x) == expected
        assert isinstance(msa(model), swap.Swapped)
        for attn in (block.attn for block in model.blocks):
            attn.pad_small_map = True
        assert_parity(swinops.unpatch(model), (6, 10))
        assert sum(calls.values()) == 4

    @pytest.mark.parametrize("module", [swin, attention])
    def test_another_size_than_that_of_the_tokens(self, module):
        attn, x = msa(build(module)), torch.zeros(2, 60, 16)
        expected = refusal(attn, x, (8, 8))
        assert refusal(swinops.patch(attn, "reference"), x, (8, 8)) == expected == "input feature has wrong size"

    def test_the_size_by_name(self, calls):
        attn, x = msa(build(swin)), torch.rand(2, 35, 16)
        expected = attn(query=x, hw_shape=(7, 5))
        assert torch.allclose(swinops.patch(attn, "reference")(query=x, hw_shape=(7, 5)), expected, atol=1e-5)
        assert calls["window_attention"] == 1


def test_coordinates_of_a_checkpoint():
    """mmpretrain's V2 keeps them in a buffer only, which is saved and is what counts."""
    model, x = MODELS["mmpretrain_v2"].model(), image(2, SIZE)
    before = model(x)
    swinops.patch(model, "reference")
    model.load_state_dict(MODELS["mmpretrain_v2"].model(pretrained_window_size=(8, 8)).state_dict())
    actual = model(x)
    expected = swinops.unpatch(model)(x)
    assert not torch.allclose(before, expected, rtol=0, atol=1e-3)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-5)


class TestLeft:
    def test_an_attention_of_somebody(self):
        """mmpretrain builds whatever it is given."""

        class Mine(attention.WindowMSA):
            pass

        table = rows(build(attention, window_msa=Mine))
        assert {row.reason for row in table} == {"w_msa is a Mine, not OpenMMLab's WindowMSA"}

    @pytest.mark.parametrize("name", ["window_partition", "window_reverse", "get_attn_mask"])
    def test_a_method_of_somebody(self, name):
        model = build(attention)
        msa(model).__class__ = type("Mine", (attention.ShiftWindowMSA,), {name: lambda *args, **kwargs: None})
        assert [row.reason for row in rows(model)] == ["", f"its class overrides {name}"]

    def test_the_first_version(self):
        """mmclassification's had one image size, and no ``pad_small_map``."""
        first = copy_of(attention, (", self.pad_small_map = ", ", self.auto_pad = "))
        model = Backbone(first)
        assert {row.reason for row in rows(model)} == {"it has no pad_small_map, unlike OpenMMLab's ShiftWindowMSA"}


SHIFT_WINDOW = "its forward computes something else than that of OpenMMLab's ShiftWindowMSA"
CHANGES = {
    "a scale": (swin, False, "return self.drop(x", "return self.gamma * self.drop(x", "its forward uses gamma"),
    "half": (swin, False, "return self.drop(x", "return 0.5 * self.drop(x", SHIFT_WINDOW),
    "a weaker mask": (swin, False, "-100.0", "-10.0", SHIFT_WINDOW),
    "a single window not shifted": (
        swin, False, "M, s = hw_shape, self.window_size, self.shift_size",
        "M = hw_shape, self.window_size\n        s = self.shift_size if H > M else 0", SHIFT_WINDOW,
    ),
    "other windows": (swin, False, "reshape(-1, M, M, C)", "reshape(-1, M, M, C).transpose(1, 2)", SHIFT_WINDOW),
    "no scale of scores": (swin, False, "q * self.scale @", "q @", SHIFT_WINDOW),
    "another argument": (
        attention, False, "query, hw_shape):", "query, hw_shape, t):", "its forward takes self, query, hw_shape, t",
    ),
    "a weaker mask of mmpretrain": (attention, False, "-100.0", "-10.0", SHIFT_WINDOW),
    "small maps shifted": (attention, False, "s = s if min(H, W) > M else 0", "pass", SHIFT_WINDOW),
    "a softmax of its own": (attention, False, "self.softmax(", "self.norm(", "its w_msa.forward uses norm"),
    "no scale of V1": (attention, False, "q * self.scale @", "q @", SHIFT_WINDOW),
    "another clamp": (attention, True, "math.log(100)", "math.log(50)", SHIFT_WINDOW),
    "another range of the bias": (attention, True, "16 * torch.sigmoid", "8 * torch.sigmoid", SHIFT_WINDOW),
    "a bias of the key": (
        attention, True, "torch.zeros_like(self.v_bias, requires_grad=False)", "self.k_bias",
        "its w_msa.forward uses k_bias",
    ),
}  # fmt: skip


class TestVendoredCopies:
    @pytest.mark.parametrize(("module", "v2"), [(swin, False), (attention, False), (attention, True)])
    def test_unchanged(self, module, v2):
        copy = copy_of(module)
        table = rows(Backbone(copy, **({"window_msa": copy.WindowMSAV2} if v2 else {})))
        assert [(row.action, row.library, row.reason) for row in table] == [("replace", "OpenMMLab", "")] * 2

    @pytest.mark.parametrize("change", CHANGES)
    def test_changed(self, change):
        module, v2, before, after, reason = CHANGES[change]
        copy = copy_of(module, (before, after))
        model = Backbone(copy, **({"window_msa": copy.WindowMSAV2} if v2 else {}))
        assert [row.action for row in rows(model)] == ["leave"] * 2
        assert all(row.reason.startswith(reason) for row in rows(model)), rows(model)
        with pytest.warns(UserWarning, match="found nothing to replace"):
            swinops.patch(model, "reference")
        assert not any(isinstance(m, swap.Swapped) for m in model.modules())
