"""What is special to Microsoft's Swin for detection: sizes and masks come from a layer, and many have copies of it."""

import pytest
import torch
from torch import nn

import swinops
from swinops.dropin import swap

from .detection_swin import swin_transformer
from .dropin_case import close
from .dropin_detection import CASES, OPTIONS, SIZES, build, image, use_checkpoint
from .microsoft_swin import swin_transformer as classification
from .swinir import network_swinir
from .timm_swins import assert_same, count_calls, results
from .vendored import copy_of, refusal

LIBRARY = CASES[0].library
BLOCKS = list(CASES[0].replaced)
LAYERS = ["swin.layers.0", "swin.layers.1"]


def shifted(model):
    return model.swin.layers[1].blocks[1]


def rows(model):
    return swinops.explain(model, "reference")


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.fixture
def partitions(monkeypatch):
    """Calls of the library's partition: for a mask, and for each block's tokens."""
    return count_calls(monkeypatch, swin_transformer, ("window_partition",))


class TestOptions:
    @pytest.mark.parametrize("options", [{"qkv_bias": False}, {"window_size": 7}, {"depths": (1, 3)}], ids=str)
    def test_numbers(self, options, calls):
        model, x = build(**options), image(2, SIZES[0])
        for dtype in (torch.float64, torch.float32):
            model, x = model.to(dtype), x.to(dtype)
            with swinops.patched(model, "reference"):
                actual = results(model, x)
            assert_same(actual, model, x)
        assert calls["window_attention"] == 8

    @pytest.mark.parametrize("options", [{"drop_path_rate": 0.5}, {"drop_rate": 1.0}], ids=str)
    def test_dropout_outside_of_the_attention(self, options, calls):
        """The same branches are dropped at the same random numbers, and what follows the projection is."""
        model, x = build(**options).double(), image(8, SIZES[0]).double()
        expected = model(x)
        torch.manual_seed(0)
        dropped = model.train()(x)
        assert not torch.allclose(dropped, expected)
        torch.manual_seed(0)
        assert torch.allclose(swinops.patch(model, "reference").train()(x), dropped, rtol=1e-10, atol=1e-10)
        assert calls["window_attention"] == 4

    def test_a_backbone_whose_eval_returns_nothing(self):
        class Flat(swin_transformer.SwinTransformer):
            def forward(self, x):
                return torch.cat([y.flatten(1) for y in super().forward(x)], 1)

        backbone = Flat(**OPTIONS)
        assert backbone.eval() is None
        assert swinops.check(backbone, image(2, SIZES[0]), "reference").ok


class TestMask:
    def test_none_is_made(self, partitions):
        model = swinops.patch(build(), "reference")
        partitions["window_partition"] = 0
        model(image(2, SIZES[0]))
        assert partitions == {"window_partition": 0}

    def test_one_in_each_layer_where_no_block_runs_the_op(self, partitions):
        model = swinops.patch(build())
        partitions["window_partition"] = 0
        with pytest.warns(UserWarning, match="runs kernels on CUDA only"):
            model(image(2, SIZES[0]))
        assert partitions == {"window_partition": len(LAYERS) + len(BLOCKS)}

    def test_where_one_block_runs_its_own_forward(self, calls):
        """It gets the mask that the layer would have made."""
        model, x = build(), image(2, SIZES[0])
        block, seen = shifted(model), []
        block.attn.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["mask"]), with_kwargs=True)
        expected = model(x)
        with pytest.warns(UserWarning, match="attn has hooks"):
            actual = swinops.patch(model, "reference")(x)
        assert close(actual, expected) and calls["window_attention"] == 3
        assert torch.equal(*seen)

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_handed_to_a_block(self, backend, calls):
        """A mask may be any, so the library's code runs; a block that does not shift has no use for it."""
        plain, block = swinops.patch(build(), backend).swin.layers[0].blocks
        x, mask = torch.rand(2, 8 * 8, 16), torch.rand(4, 16, 16)
        for b in (plain, block):
            b.H = b.W = 8
        with pytest.warns(UserWarning) as caught:
            assert torch.equal(block(x, mask), block.library_forward(x, mask))
            assert torch.equal(block(x, None), block.library_forward(x, None))
            assert close(plain(x, mask), plain.library_forward(x, mask))
        reasons = {"auto": "runs kernels on CUDA only", "reference": "handed its block a mask, which may be any"}
        assert len(caught) == 1 and reasons[backend] in str(caught[0].message)
        assert calls["window_attention"] == int(backend == "reference")

    def test_of_a_layer_that_was_left(self, calls):
        model, x = build(), image(2, SIZES[0])
        expected = model(x)
        layer = model.swin.layers[0]
        layer.forward = lambda *args: type(layer).forward(layer, *args)
        with pytest.warns(UserWarning, match="left 1 of 6"):
            swinops.patch(model, "reference")
        with pytest.warns(UserWarning, match="handed its block a mask"):
            assert close(model(x), expected)
        assert calls["window_attention"] == 3

    def test_where_a_block_was_left(self, calls):
        """The layer makes it, and the block that remains unshifted runs the op."""
        model, x = build(), image(2, SIZES[0])
        expected = model(x)
        block = shifted(model)
        block.forward = lambda *args: type(block).forward(block, *args)
        with pytest.warns(UserWarning, match="left 1 of 6"):
            swinops.patch(model, "reference")
        assert close(model(x), expected)
        assert calls["window_attention"] == 3


class TestSizes:
    @pytest.mark.parametrize(("size", "tokens"), [((8, 8), 60), ((None, None), 64)], ids=str)
    def test_refused_in_its_own_words(self, size, tokens):
        block, x = build().swin.layers[1].blocks[0], torch.zeros(2, tokens, 32)
        block.H, block.W = size
        expected = refusal(block, x, None)
        assert refusal(swinops.patch(block, "reference"), x, None) == expected
        assert isinstance(block, swap.Swapped)

    def test_the_next_layers(self):
        """A layer returns what the library's does: both maps, and their sizes."""
        layers, x = build().swin.layers, torch.rand(2, 7 * 5, 16)
        expected = layers[0](x, 7, 5)
        actual = swinops.patch(layers, "reference")[0](x, 7, 5)
        assert actual[1:3] == expected[1:3] == (7, 5) and actual[4:] == expected[4:] == (4, 3)
        assert close(actual[0], expected[0]) and close(actual[3], expected[3])


class TestCheckpoint:
    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:.*handed its block a mask")
    def test_input_without_gradient(self, calls):
        """As where the first stages are frozen: torch's reentrant checkpoint has no gradients for their parameters."""
        model, x = build(), image(2, SIZES[0])
        model.swin.patch_embed.requires_grad_(False)
        use_checkpoint(model)
        expected = gradients(model, x)
        assert {g is None for g in expected} == {True, False}
        calls["window_attention"] = 0
        with pytest.warns(UserWarning, match="whose input needs no gradient"):
            actual = gradients(swinops.patch(model, "reference"), x)
        assert [g is None for g in actual] == [g is None for g in expected]
        assert all(close(a, b) for a, b in zip(actual, expected, strict=True) if b is not None)
        with torch.no_grad():
            calls["window_attention"] = 0
            model(x)
        assert calls["window_attention"] == 4


BLOCK_SUM, LAYER_MASK = "x = x + self.drop_path(", "masked_fill(different, -100.0)"
BLOCK_NUMBERS = f"its forward computes something else than that of {LIBRARY}'s SwinTransformerBlock"
LAYER_NUMBERS = f"its forward does not return what {LIBRARY}'s does"
CHANGES = {
    "a scale of a residual": (BLOCK_SUM, "x = x + self.gamma * self.drop_path(", BLOCKS, "its forward uses gamma"),
    "half of a residual": (BLOCK_SUM, "x = x + 0.5 * self.drop_path(", BLOCKS, BLOCK_NUMBERS),
    "no scale": ("q * self.scale @", "q @", BLOCKS, BLOCK_NUMBERS),
    "shifted, then padded": ("(0, 0, 0, -W % M, 0, -H % M)", "(0, 0, -W % M, 0, -H % M, 0)", BLOCKS, BLOCK_NUMBERS),
    "a text besides": (
        "def forward(self, x, mask_matrix):", "def forward(self, x, mask_matrix, text=None):", BLOCKS,
        "its forward takes self, x, mask_matrix, text",
    ),
    "a weaker mask": (LAYER_MASK, "masked_fill(different, -10.0)", LAYERS, f"its mask is not {LIBRARY}'s"),
    "a learned mask": (LAYER_MASK, "masked_fill(different, self.value)", LAYERS, "its forward uses value"),
    "no size of the next layer": ("(H + 1) // 2, (W + 1) // 2", "H // 2, W // 2", LAYERS[:1], LAYER_NUMBERS),
    "less returned": ("return x, H, W, x, H, W", "return x, H, W", LAYERS[1:], LAYER_NUMBERS),
    "fewer blocks": ("for block in self.blocks:", "for block in self.blocks[1:]:", LAYERS, "its mask is not"),
    "blocks by number": (
        "for block in self.blocks:", "for block in (self.blocks[0], self.blocks[1]):", LAYERS,
        "its mask is not",
    ),
}  # fmt: skip


class TestVendoredCopies:
    @pytest.mark.parametrize("file", ["swin_transformer", "swin", "swint"])
    def test_unchanged(self, file):
        model = build(copy_of(swin_transformer, name=file).SwinTransformer)
        assert {row.path for row in rows(model)} == {*LAYERS, *BLOCKS}
        assert {(row.action, row.library) for row in rows(model)} == {("replace", LIBRARY)}

    @pytest.mark.parametrize("change", CHANGES)
    def test_changed(self, change):
        before, after, left, reason = CHANGES[change]
        model = nn.Module()
        model.swin = copy_of(swin_transformer, (before, after)).SwinTransformer(**OPTIONS)
        table = [row for row in rows(model) if row.action == "leave"]
        assert [row.path for row in table] == left
        assert all(row.reason.startswith(reason) for row in table), table

    def test_a_layer_of_other_windows(self):
        model = build()
        model.swin.layers[0].shift_size = 1
        assert [row.reason for row in rows(model) if row.reason] == ["its shift_size is not that of its blocks"]

    def test_a_mask_in_the_dtype_of_the_image(self):
        """As some copies have it for half precision."""
        model = build(copy_of(swin_transformer, (LAYER_MASK, f"{LAYER_MASK}.type(x.dtype)")).SwinTransformer)
        assert {row.action for row in rows(model)} == {"replace"}


def test_classes_of_one_name():
    """Each is taken for what it is, or left."""
    gamma = (BLOCK_SUM, "x = x + self.gamma * self.drop_path(")
    anywhere, somewhere = (8, 2), (8, (8, 8), 2)
    model = nn.ModuleDict(
        {
            name: file.SwinTransformerBlock(*sizes, window_size=4, shift_size=2)
            for name, file, sizes in (
                ("microsoft", classification, somewhere),
                ("detection", swin_transformer, anywhere),
                ("swinir", network_swinir, somewhere),
                ("scaled", copy_of(classification, gamma), somewhere),
                ("scaled_detection", copy_of(swin_transformer, gamma), anywhere),
                ("swinir_elsewhere", copy_of(network_swinir, name="swin_transformer"), somewhere),
            )
        }
    )
    model["unknown"] = type("SwinTransformerBlock", (nn.Module,), {"__module__": "somebody.swin_transformer"})()
    table = [(row.path, row.library, row.action, row.reason) for row in rows(model)]
    assert table[:-1] == [
        ("microsoft", "Microsoft", "replace", ""),
        ("detection", LIBRARY, "replace", ""),
        ("swinir", "SwinIR", "replace", ""),
        ("scaled", "Microsoft", "leave", "its forward uses gamma, unlike that of Microsoft's SwinTransformerBlock"),
        (
            "scaled_detection", LIBRARY, "leave",
            f"its forward uses gamma, unlike that of {LIBRARY}'s SwinTransformerBlock",
        ),
        (
            "swinir_elsewhere", "Microsoft", "leave",
            "its forward takes self, x, x_size, unlike that of Microsoft's SwinTransformerBlock",
        ),
    ]  # fmt: skip
    path, _, action, reason = table[-1]
    assert (path, action) == ("unknown", "leave") and reason.startswith("it has no ")


def test_layers_of_one_name():
    """Microsoft's classification models have a BasicLayer, too, which is no concern of anybody's."""
    options = {"img_size": 32, "embed_dim": 24, "depths": (2,), "num_heads": (2,), "window_size": 4}
    model = classification.SwinTransformer(**options)
    layer = type(model.layers[0])
    assert layer.__name__ == "BasicLayer"
    model.layers[0].__class__ = type("BasicLayer", (layer,), {"__module__": "somebody.swin_transformer"})
    assert [row.path for row in rows(model)] == ["layers.0.blocks.0", "layers.0.blocks.1"]
