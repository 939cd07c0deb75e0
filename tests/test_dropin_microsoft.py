"""What is special to Microsoft's Swins: one image size, saved masks and coordinates, and copies that were changed."""

import math
import re

import pytest
import torch
from torch import nn

import swinops
from swinops.dropin import swap
from swinops.testing import random_tensor

from . import microsoft_swin
from .dropin_microsoft import CASES, build, image
from .timm_swins import assert_same, results
from .vendored import copy_of

SIZE = (32, 16)
MODELS = {case.name.removeprefix("microsoft_"): case for case in CASES}
every_model = pytest.mark.parametrize("name", MODELS)


def small(name, **options):
    """One stage, of two blocks for maps of 16 x 8 tokens."""
    stages = {"depths": (2,), "num_heads": (2,)}
    return MODELS[name].model(SIZE, **{**stages, **({"moe_blocks": ((1,),)} if name == "moe" else {}), **options})


def shifted(model):
    return model.layers[0].blocks[1]


def assert_parity(model, x=None):
    x = image(2, SIZE) if x is None else x
    for dtype in (torch.float64, torch.float32):
        model, x = model.to(dtype), x.to(dtype)
        with swinops.patched(model, "reference"):
            actual = results(model, x)
        assert_same(actual, model, x)


def rows(model):
    return swinops.explain(model, "reference")


class TestOptions:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("v1", {"qkv_bias": False}),
            ("v1", {"qk_scale": 0.7}),
            ("v2", {"qkv_bias": False}),
            ("v2", {"pretrained_window_sizes": (8,)}),
            ("moe", {"qkv_bias": False}),
            ("moe", {"qk_scale": 0.7, "moe_blocks": ((),)}),
        ],
        ids=str,
    )
    def test_numbers(self, name, options, calls):
        assert_parity(small(name, **options))
        assert sum(calls.values()) == 4

    @every_model
    @pytest.mark.parametrize("options", [{"drop_path_rate": 0.5}, {"drop_rate": 1.0}], ids=str)
    def test_dropout_outside_of_the_attention(self, name, options, calls):
        """The same branches are dropped at the same random numbers, and what follows the projection is."""
        model, x = small(name, **options).double().train(), image(8, SIZE).double()
        torch.manual_seed(0)
        expected = model(x)
        assert not torch.allclose(model.eval()(x), expected)
        torch.manual_seed(0)
        actual = swinops.patch(model, "reference").train()(x)
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-10)
        assert sum(calls.values()) == 2

    def test_fused_window_process(self):
        """It needs Microsoft's compiled module, whose place the op takes."""
        model, x = small("v1", fused_window_process=True), image(2, SIZE)
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'apply'"):
            model(x)
        expected = small("v1")(x)
        assert torch.allclose(swinops.patch(model, "reference")(x), expected, atol=1e-5)

    @pytest.mark.parametrize("name", ["v1", "moe"])
    def test_scale_that_is_learned(self, name):
        """The op takes a number."""
        model, x = small(name), image(2, SIZE)
        shifted(model).attn.scale = nn.Parameter(torch.tensor(0.3))
        reason = "attn.scale is a tensor, and the op has no gradient for it"
        assert [row.reason for row in rows(model)] == ["", reason]
        with pytest.warns(UserWarning, match="left 1 of 2"):
            swinops.patch(model, "reference")
        model(x).sum().backward()
        assert shifted(model).attn.scale.grad.abs() > 0

    def test_mask_tokens(self):
        """SimMIM's encoders are subclasses that put a token of their own in place of some."""

        class Encoder(microsoft_swin.SwinTransformer):
            def __init__(self, **options):
                super().__init__(**options)
                self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))

            def embed(self, x):
                hidden = random_tensor(self.layers[0].blocks[0].input_resolution, 3).flatten()[:, None] > 0
                return torch.where(hidden, self.mask_token, super().embed(x))

        model = build(Encoder, img_size=SIZE, depths=(2,), num_heads=(2,))
        assert model.mask_token.any() and [row.action for row in rows(model)] == ["replace"] * 2
        assert_parity(model)

    def test_blocks_of_the_detection_models(self):
        """They pad, by a ``forward`` of their own."""
        model = small("v1", pad=True)
        assert {row.reason for row in rows(model)} == {"its class overrides forward"}


class TestOneSize:
    """A model is for images of one size, and what it refuses it refuses in its own words."""

    @every_model
    def test_another_image(self, name):
        model = swinops.patch(small(name), "reference")
        with pytest.raises(AssertionError, match=re.escape("built for (32, 16), got (32, 32)")):
            model(image(2, (32, 32)))
        with pytest.raises(AssertionError, match="input feature has wrong size"):
            shifted(model)(torch.zeros(2, 16 * 16, 24))

    @every_model
    def test_windows_that_do_not_divide_the_map(self, name):
        block = type(shifted(small(name)))(24, (6, 8), 2, window_size=4)
        x, messages = torch.zeros(2, 48, 24), []
        for module in (block, swinops.patch(block, "reference")):
            with pytest.raises(RuntimeError) as caught:
                module(x)
            messages.append(str(caught.value))
        assert isinstance(block, swap.Swapped) and messages[0] == messages[1] != ""

    @every_model
    def test_export_fixes_the_batch_unless_patched(self, name):
        def export(model):
            return torch.export.export(model, (image(2, SIZE),), dynamic_shapes=({0: torch.export.Dim("batch")},))

        model, x = small(name, depths=(1,)), image(3, SIZE)
        with pytest.raises(torch._dynamo.exc.UserError, match="batch"):
            export(model)
        expected = model(x)
        assert torch.allclose(export(swinops.patch(model, "reference")).module()(x), expected, atol=1e-5)


class TestMask:
    """It is saved with the model, and made for one image size."""

    @every_model
    @pytest.mark.parametrize("change", ["weaker", "elsewhere", "one that should not be", "missing"])
    def test_another_mask(self, name, change):
        model = small(name)
        plain, block = model.layers[0].blocks
        mask, reason = block.attn_mask, "its attn_mask is not Microsoft's"
        if change == "weaker":
            mask[-1, 0, -1] /= 2
        elif change == "elsewhere":
            block.attn_mask = mask.flip(0)
        elif change == "one that should not be":
            plain.attn_mask, block = mask, plain
        else:
            block.attn_mask, reason = None, "it shifts without a mask"
        expected = model(image(2, SIZE))
        assert [row.path for row in rows(model) if row.reason == reason] == [
            f"layers.0.blocks.{int(block is not plain)}"
        ]
        with pytest.warns(UserWarning, match=reason):
            swinops.patch(model, "reference")
        assert not isinstance(block, swap.Swapped)
        assert torch.allclose(model(image(2, SIZE)), expected, atol=1e-5)

    @every_model
    def test_removed_from_a_patched_model(self, name, calls):
        model, x = swinops.patch(small(name), "reference"), image(2, SIZE)
        shifted(model).attn_mask = None
        with pytest.warns(UserWarning, match="it shifts without a mask"):
            actual = model(x)
        assert sum(calls.values()) == 1
        assert torch.allclose(swinops.unpatch(model)(x), actual, atol=1e-5)

    @every_model
    def test_patched_model_resized(self, name, calls):
        """As some code does it for other sizes: without a new mask the library fails, and with one the op runs."""
        model, x = swinops.patch(small(name), "reference"), random_tensor((1, 8 * 8, 24), 1)
        block, messages = shifted(model), []
        block.input_resolution = (8, 8)
        with pytest.warns(UserWarning, match=r"for another image than its input_resolution \(8, 8\)"):
            for f in (block, block.library_forward):
                with pytest.raises(RuntimeError) as caught:
                    f(x)
                messages.append(str(caught.value))
        assert messages[0] == messages[1]
        block.attn_mask = microsoft_swin.common.shift_mask(8, 8, 4, 2)
        actual = as_tuple(block(x))
        assert sum(calls.values()) == 1
        for a, b in zip(actual, as_tuple(block.library_forward(x)), strict=True):
            assert torch.allclose(a, b, atol=1e-5)

    @every_model
    @pytest.mark.parametrize("strict", [True, False])
    def test_checkpoint_for_another_image(self, name, strict):
        """torch refuses its masks even if not strict; without them it loads, as Microsoft's own tools load it."""
        state, messages = small(name, img_size=32).state_dict(), []
        model = small(name)
        for module in (model, swinops.patch(model, "reference")):
            with pytest.raises(RuntimeError, match=r"size mismatch for layers\.0\.blocks\.1\.attn_mask") as caught:
                module.load_state_dict(state, strict=strict)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        rest = {key: x + 0.1 if x.is_floating_point() else x for key, x in state.items() if "attn_mask" not in key}
        assert not model.load_state_dict(rest, strict=False).unexpected_keys
        actual = model(image(2, SIZE))
        assert torch.allclose(swinops.unpatch(model)(image(2, SIZE)), actual, rtol=1e-4, atol=1e-4)


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


class TestV2:
    def test_coordinates_of_a_checkpoint(self):
        """They are saved, and are what counts: also where the model was built for another pretraining."""
        model, x = small("v2", pretrained_window_sizes=(0,)), image(2, SIZE)
        before = model(x)
        swinops.patch(model, "reference")
        model.load_state_dict(small("v2", pretrained_window_sizes=(8,)).state_dict())
        actual = model(x)
        assert isinstance(shifted(model), swap.Swapped)
        expected = swinops.unpatch(model)(x)
        assert not torch.allclose(before, expected, rtol=0, atol=1e-3)
        assert torch.allclose(actual, expected, rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_clamp_in_float64(self):
        """The published one is at ln 100 rounded to float32, and shows in float64 where a scale is clamped."""
        model = vendored("v2", ("math.log(100)", "torch.log(torch.tensor(1.0 / 0.01))")).double()
        differences = {}
        for largest in (math.log(99.99), math.log(101)):
            for block in model.layers[0].blocks:
                block.attn.logit_scale[-1] = largest
            with swinops.patched(model, "reference"):
                assert isinstance(shifted(model), swap.Swapped)
                actual = model(image(2, SIZE).double())
            differences[largest] = float((actual - model(image(2, SIZE).double())).abs().max())
        below, above = differences.values()
        assert below < 1e-12 < 1e-10 < above < 1e-6


FILES = {
    "v1": (microsoft_swin.swin_transformer, "SwinTransformer"),
    "v2": (microsoft_swin.swin_transformer_v2, "SwinTransformerV2"),
    "moe": (microsoft_swin.swin_transformer_moe, "SwinTransformerMoE"),
}


def vendored(name, *changes):
    """A model of somebody's copy of a published file, with some of its text replaced."""
    file, model = FILES[name]
    options = {"moe_blocks": ((1,),)} if name == "moe" else {}
    return build(getattr(copy_of(file, *changes), model), img_size=SIZE, depths=(2,), num_heads=(2,), **options)


NUMBERS = "its forward computes something else than that of Microsoft's SwinTransformerBlock"
CHANGES = {
    "a scale of a residual": (
        "v1", "x = x + self.drop_path(", "x = x + self.gamma * self.drop_path(", "its forward uses gamma",
    ),
    "another argument": (
        "v2", "def forward(self, x):", "def forward(self, x, text=None):", "its forward takes self, x, text",
    ),
    "another argument of the attention": (
        "moe", "mask=None):", "mask=None, prior=None):", "its attn.forward takes self, x, mask, prior",
    ),
    "a bias of the key": (
        "v2", "torch.zeros_like(self.v_bias, requires_grad=False)", "self.k_bias", "its attn.forward uses k_bias",
    ),
    "a norm of the query": ("v1", "q * self.scale", "self.norm(q) * self.scale", "its attn.forward uses norm"),
    "another constructor": (
        "moe", "is_moe=False,", "is_moe,", "a small block of its class does not run (TypeError: ",
    ),
    "half of a residual": ("v1", "+ self.drop_path(self.mlp", "+ 0.5 * self.drop_path(self.mlp", NUMBERS),
    "a residual subtracted": ("v1", "+ self.drop_path(self.mlp", "- self.drop_path(self.mlp", NUMBERS),
    "norms last": ("v1", "self.mlp(self.norm2(x))", "self.norm2(self.mlp(x))", NUMBERS),
    "norms changed places": ("v1", "y = self.norm1(x)", "y = self.norm2(x)", NUMBERS),
    "no residual": ("v1", "x = x + self.drop_path(", "x = self.drop_path(", NUMBERS),
    "all dropped": ("v1", "x + self.drop_path(y.flatten(1, 2))", "self.drop_path(x + y.flatten(1, 2))", NUMBERS),
    "another shift": ("v1", "torch.roll(y, (-s, -s), (1, 2))", "torch.roll(y, (s, -s), (1, 2))", NUMBERS),
    "no scale": ("v1", "q * self.scale @", "q @", NUMBERS),
    "the mask twice": ("v1", "+ mask.unsqueeze(1)", "+ 2 * mask.unsqueeze(1)", NUMBERS),
    "without a mask scaled twice": (
        "v1", "        x = self.attn_drop(self.softmax(scores)) @ v",
        "        else:\n            scores = scores * self.scale\n        x = self.attn_drop(self.softmax(scores)) @ v",
        NUMBERS,
    ),
    "half where nothing is shifted": (
        "v1", "        x = x + self.drop_path(y.",
        "        if s == 0:\n            x = x * 0.5\n        x = x + self.drop_path(y.", NUMBERS,
    ),
    "no gradient": (
        "v1", "    def forward(self, x, mask=None):", "    @torch.no_grad()\n    def forward(self, x, mask=None):",
        "its attn.forward is decorated with torch.utils._contextlib",
    ),
    "a clamp from below": ("v2", "max=math.log(100)", "min=0.0, max=math.log(100)", NUMBERS),
    "no softmax": ("v1", "self.softmax(scores)", "scores", NUMBERS),
    "a bias for other pairs": ("v1", "_index]", "_index.transpose(0, 1)]", NUMBERS),
    "other windows": (
        "v1", "WindowProcess = WindowProcessReverse = None", "windows, WindowProcess = window_partition, None\n\n\n"
        "def window_partition(x, M):\n    return windows(x, M).flip(1)\n\n", NUMBERS,
    ),
    "V2's mask twice": ("v2", "+ mask.unsqueeze(1)", "+ 2 * mask.unsqueeze(1)", NUMBERS),
    "norms first": ("v2", "self.norm2(self.mlp(x))", "self.mlp(self.norm2(x))", NUMBERS),
    "another clamp": ("v2", "math.log(100)", "math.log(50)", NUMBERS),
    "another range of the bias": ("v2", "16 * torch.sigmoid", "8 * torch.sigmoid", NUMBERS),
    "biases changed places": ("v2", "torch.cat((self.q_bias, ", "torch.cat((self.v_bias, ", NUMBERS),
    "half of the loss": ("moe", "self.drop_path(y), loss", "self.drop_path(y), loss / 2", NUMBERS),
    "no residual of the experts": ("moe", "x + self.drop_path(y), loss", "self.drop_path(y), loss", NUMBERS),
    "no residual of the MLP": ("moe", "return x + self.drop_path(y)\n", "return self.drop_path(y)\n", NUMBERS),
}  # fmt: skip


class TestVendoredCopies:
    @every_model
    def test_unchanged(self, name):
        model = vendored(name)
        assert [(row.action, row.library) for row in rows(model)] == [("replace", "Microsoft")] * 2
        assert shifted(model).__module__.startswith("somebody.networks.")

    @pytest.mark.parametrize("change", CHANGES)
    def test_changed(self, change):
        name, before, after, reason = CHANGES[change]
        model = vendored(name, (before, after))
        assert [row.action for row in rows(model)] == ["leave"] * 2
        assert all(row.reason.startswith(reason) for row in rows(model)), rows(model)
        with pytest.warns(UserWarning, match="found nothing to replace"):
            swinops.patch(model, "reference")
        assert not any(isinstance(module, swap.Swapped) for module in model.modules())

    def test_what_cannot_be_looked_at(self):
        """A copy that keeps one number for its window is left, and the rest of the model is not."""
        model = nn.Sequential(vendored("v1"), vendored("v1"))
        shifted(model[0]).attn.window_size = 4
        left = [row.reason for row in swinops.explain(model, "reference") if row.action == "leave"]
        assert left == ["it cannot be looked at (TypeError: 'int' object is not iterable)"]
        with pytest.warns(UserWarning, match="left 1 of 4 modules"):
            swinops.patch(model, "reference")

    def test_attention_of_another_copy(self):
        model, other = vendored("v1"), vendored("v1")
        shifted(model).attn = shifted(other).attn
        assert [row.reason for row in rows(model)] == ["", "its attn is not the WindowAttention that its class makes"]

    @every_model
    def test_looking_at_a_copy_changes_nothing(self, name):
        """A small block of its class is made and run, whatever the defaults are."""
        model, state, dtype = vendored(name), torch.get_rng_state(), torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                table = rows(model)
        finally:
            torch.set_default_dtype(dtype)
        assert [row.action for row in table] == ["replace"] * 2
        assert torch.equal(torch.get_rng_state(), state)
