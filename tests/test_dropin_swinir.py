"""What is special to SwinIR and Swin2SR: one mask that is saved, and another that is made for any other size."""

import re

import pytest
import torch

import swinops
from swinops.dropin import swap

from .dropin_swinir import CASES, build, image
from .swinir import network_swin2sr, network_swinir
from .timm_swins import assert_same, count_calls, results
from .vendored import copy_of, refusal

MODELS = {case.name: case for case in CASES}
FILES = {"swinir": network_swinir, "swin2sr": network_swin2sr}
every_model = pytest.mark.parametrize("name", MODELS)
SIZE = (8, 16)  # not what the masks are for


def blocks(model):
    return model.layers[0].residual_group.blocks


def rows(model):
    return swinops.explain(model, "reference")


class TestOptions:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("swinir", {"qkv_bias": False}),
            ("swinir", {"qk_scale": 0.7}),
            ("swinir", {"embed_dim": 60, "num_heads": (2,)}),  # heads of 30 channels
            ("swinir", {"window_size": 7, "img_size": (14, 21)}),
            ("swinir", {"img_size": (4, 16)}),  # a single window, which is not shifted at any size
            ("swin2sr", {"qkv_bias": False}),
            ("swin2sr", {"pretrained_window_size": (6, 6)}),
        ],
        ids=str,
    )
    def test_numbers(self, name, options, calls):
        model, x = MODELS[name].model(**options), image(2, SIZE)
        swinops.explain(model)
        before = sum(calls.values())
        for dtype in (torch.float64, torch.float32):
            model, x = model.to(dtype), x.to(dtype)
            with swinops.patched(model, "reference"):
                actual = results(model, x)
            assert_same(actual, model, x)
        assert sum(calls.values()) - before == 4

    @every_model
    @pytest.mark.parametrize("options", [{"drop_path": 0.5}, {"drop_rate": 1.0}], ids=str)
    def test_dropout_outside_of_the_attention(self, name, options, calls):
        """The same branches are dropped at the same random numbers, and what follows the projection is."""
        model, x = MODELS[name].model(**options).double().train(), image(8, SIZE).double()
        torch.manual_seed(0)
        expected = model(x)
        assert not torch.allclose(model.eval()(x), expected)
        torch.manual_seed(0)
        actual = swinops.patch(model, "reference").train()(x)
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-10)
        assert sum(calls.values()) == 2


class TestSizes:
    @every_model
    def test_no_mask_is_made(self, name, monkeypatch):
        """The published block makes one on the CPU at each call, also where it does not shift."""
        model = swinops.patch(MODELS[name].model(), "reference")
        counts = count_calls(monkeypatch, FILES[name], ("window_partition",))
        model(image(2, SIZE))
        assert counts == {"window_partition": 0}
        with pytest.warns(UserWarning, match="runs kernels on CUDA only"):
            swinops.patch(model, "auto")(image(2, SIZE))
        assert counts == {"window_partition": 2 * len(blocks(model))}

    @every_model
    @pytest.mark.parametrize(("tokens", "x_size"), [(48, (6, 8)), (64, (8, 12)), (96, (8, 8))], ids=str)
    def test_refused_in_its_own_words(self, name, tokens, x_size):
        """Sizes that the window does not divide, and others than that of the tokens."""
        block, x = blocks(MODELS[name].model())[1], torch.zeros(2, tokens, 40)
        expected = refusal(block, x, x_size)
        assert refusal(swinops.patch(block, "reference"), x, x_size) == expected
        assert isinstance(block, swap.Swapped)

    @every_model
    def test_the_size_by_name(self, name, calls):
        block, x = blocks(MODELS[name].model())[1], torch.rand(2, 128, 40)
        expected = block(x=x, x_size=SIZE)
        actual = swinops.patch(block, "reference")(x=x, x_size=SIZE)
        assert sum(calls.values()) == 1
        assert torch.allclose(actual, expected, atol=1e-4)

    @every_model
    @pytest.mark.parametrize("change", ["weaker", "missing"])
    def test_another_mask(self, name, change):
        """It is what the published block adds at the size that it was built for."""
        model = MODELS[name].model()
        if change == "weaker":
            blocks(model)[1].attn_mask[-1, 0, -1] /= 2
            reason = f"its attn_mask is not {MODELS[name].library}'s"
        else:
            blocks(model)[1].attn_mask, reason = None, "it shifts without a mask"
        assert [row.reason for row in rows(model)] == ["", reason]
        with pytest.warns(UserWarning, match=reason):
            swinops.patch(model, "reference")
        assert [isinstance(block, swap.Swapped) for block in blocks(model)] == [True, False]

    @every_model
    def test_export_fixes_the_batch_unless_patched(self, name):
        def export(model):
            return torch.export.export(model, (image(2, SIZE),), dynamic_shapes=({0: torch.export.Dim("batch")},))

        model, x = MODELS[name].model(), image(3, SIZE)
        with pytest.raises(torch._dynamo.exc.UserError, match="batch"):
            export(model)
        expected = model(x)
        actual = export(swinops.patch(model, "reference")).module()(x)
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


class TestSwin2SR:
    def test_coordinates_of_a_checkpoint(self):
        """They are saved, and are what counts: also where the model was built for another pretraining."""
        model, x = MODELS["swin2sr"].model(), image(2, SIZE)
        before = model(x)
        swinops.patch(model, "reference")
        model.load_state_dict(MODELS["swin2sr"].model(pretrained_window_size=(8, 8)).state_dict())
        actual = model(x)
        expected = swinops.unpatch(model)(x)
        size = float(expected.detach().abs().max())
        assert not torch.allclose(before, expected, rtol=0, atol=1e-3 * size)
        assert torch.allclose(actual, expected, rtol=0, atol=1e-5 * size)


def vendored(name, *changes, file=None):
    """A model of somebody's copy."""
    copy = copy_of(FILES[name], *changes, name=file)
    options = {"Block": copy.SwinTransformerBlock}
    return build(type("Model", (MODELS[name].build.args[0],), options))


SUM = "x = x + self.drop_path("
NUMBERS = "its forward computes something else than that of {}'s SwinTransformerBlock"
CHANGES = {
    "a scale of a residual": ("swinir", SUM, "x = x + self.gamma * self.drop_path(", "its forward uses gamma"),
    "another argument": (
        "swin2sr", "forward(self, x, x_size)", "forward(self, x, x_size, t)", "its forward takes self, x, x_size, t",
    ),
    "half of a residual": ("swinir", SUM, "x = x + 0.5 * self.drop_path(", NUMBERS),
    "half of Swin2SR's": ("swin2sr", SUM, "x = x + 0.5 * self.drop_path(", NUMBERS),
    "a weaker mask": ("swinir", "-100.0", "-10.0", NUMBERS),
    "a weaker mask of Swin2SR's": ("swin2sr", "-100.0", "-10.0", NUMBERS),
    "norms first": ("swin2sr", "self.norm2(self.mlp(x))", "self.mlp(self.norm2(x))", NUMBERS),
    "another shift": ("swinir", "(-s, -s)", "(s, -s)", NUMBERS),
}  # fmt: skip


class TestVendoredCopies:
    @pytest.mark.parametrize(
        ("name", "file"),
        [("swinir", None), ("swinir", "swinir_arch"), ("swinir", "SwinIR"), ("swin2sr", None), ("swin2sr", "Swin2SR")],
    )
    def test_unchanged(self, name, file):
        model = vendored(name, file=file)
        assert [(row.action, row.library) for row in rows(model)] == [("replace", MODELS[name].library)] * 2

    @pytest.mark.parametrize("change", CHANGES)
    def test_changed(self, change):
        name, before, after, reason = CHANGES[change]
        model, reason = vendored(name, (before, after)), reason.format(MODELS[name].library)
        assert [row.action for row in rows(model)] == ["leave"] * 2
        assert all(row.reason.startswith(reason) for row in rows(model)), rows(model)
        with pytest.warns(UserWarning, match="found nothing to replace"):
            swinops.patch(model, "reference")
        assert not any(isinstance(module, swap.Swapped) for module in model.modules())

    @every_model
    def test_another_mask_for_other_sizes(self, name):
        """A subclass or a copy may have one of its own."""
        model = MODELS[name].model()
        block = blocks(model)[1]
        mine = type("Mine", (type(block),), {"calculate_mask": lambda self, x_size: -self.attn_mask})
        block.__class__ = mine
        assert [row.reason for row in rows(model)] == ["", "its class overrides calculate_mask"]

    def test_under_another_name(self):
        """A file of another name is not looked at."""
        model = vendored("swinir", file="restoration")
        assert not rows(model)
        with pytest.warns(UserWarning, match=re.escape("(no module that swinops knows)")):
            swinops.patch(model)
