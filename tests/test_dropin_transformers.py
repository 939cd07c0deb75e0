"""What is special to Transformers' Swins: state that an image changes, recorded attentions, several layouts."""

import inspect
import sys
import types
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import swinops
from swinops.dropin import swap, transformers
from swinops.testing import random_tensor

from .dropin_case import close, gradients, same
from .dropin_transformers import CASES, LastHiddenState, build, load
from .timm_swins import randomise

SWIN, DONUT, MASKFORMER, V2, SUPER_RESOLUTION, AUDIO = CASES
COSINE = V2, SUPER_RESOLUTION
CLAMPED = SWIN, DONUT  # their layers drop the shift in a map that a window covers, and take images of any size
NEW_LAYOUT = hasattr(load("Swin"), "SwinRelativePositionBias")


def each(*cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def layers(case, model):
    return [model.get_submodule(path) for path in case.replaced]


def windows(case, model):
    """What an image can change in a layer."""
    return [(layer.window_size, layer.shift_size) for layer in layers(case, model)]


class TestSizes:
    """The library writes the window and the shift of an image's size into its layers; a patched model does not."""

    LARGE, COVERED, SMALL = (18, 20), (16, 24), (8, 8)  # in the last stage a window is less than the map, all, or more

    @pytest.mark.filterwarnings("ignore:swinops")
    @pytest.mark.parametrize("backend", ["reference", "auto"])
    @each(*CLAMPED)
    def test_sequence(self, case, backend):
        model = swinops.patch(case.model(), backend)
        before = windows(case, model)
        for size in (self.LARGE, self.COVERED, self.LARGE):
            x = case.x(2, size)
            assert close(model(x), case.model()(x))  # a fresh one, which has seen no other image
            assert windows(case, model) == before

    @each(*CLAMPED)
    def test_the_library_forgets_its_shift(self, case):
        """This is why models are fresh above; what it forgot before patch stays forgotten."""
        model, x = case.model(), case.x(2, self.LARGE)
        first = model(x)
        model(case.x(2, self.COVERED))
        second = model(x)
        assert not close(second, first)
        assert close(swinops.patch(model, "reference")(x), second)

    @pytest.mark.filterwarnings("ignore:swinops")
    @pytest.mark.parametrize("backend", ["reference", "auto"])
    @each(*CLAMPED)
    def test_smaller_than_the_window(self, case, backend):
        model, x = swinops.patch(case.model(), backend), case.x()
        first, before = model(x), windows(case, model)
        with pytest.raises(ValueError, match="a map of 2 x 2 tokens is smaller than the window of 4"):
            model(case.x(2, self.SMALL))
        assert windows(case, model) == before
        assert torch.equal(model(x), first)

    @each(*CLAMPED)
    def test_layers_that_a_small_image_broke_are_left(self, case):
        model = case.model()
        with pytest.raises(RuntimeError):
            model(case.x(2, self.SMALL))
        rows = swinops.explain(model, "reference")
        broken = [row for row in rows if row.action == "leave"]
        assert broken and all("its window_size is 2, not that of its bias" in row.reason for row in broken)

    @each(MASKFORMER, V2)
    def test_small_maps_where_the_library_pads(self, case, calls):
        x = case.x(2, (6, 4))
        assert close(swinops.patch(case.model(), "reference")(x), case.model()(x))
        assert calls[case.op] == len(case.replaced)

    @each(V2)
    def test_a_window_that_construction_made_smaller(self, case, calls):
        model = case.model(image_size=(12, 10))
        assert {layer.window_size for layer in layers(case, model)} == {3, 4}
        x = case.x()
        expected = model(x)
        assert close(swinops.patch(model, "reference")(x), expected)
        assert calls[case.op] == len(case.replaced)

    @each(*CLAMPED)
    def test_always_partition(self, case, calls):
        """Then a map keeps its shift, however small; by position as by name."""
        layer = case.module(case.model())
        width = layer.layernorm_before.normalized_shape[0]
        for size in ((3, 4), (4, 4), (5, 7)):
            x = random_tensor((2, size[0] * size[1], width), 1)
            expected = layer(x, size, always_partition=True)[0]
            names = list(inspect.signature(layer.forward).parameters)[2:]
            arguments = [name == "always_partition" for name in names[: names.index("always_partition") + 1]]
            arguments = [None if name == "head_mask" else a for name, a in zip(names, arguments, strict=False)]
            with swinops.patched(layer, "reference"):
                assert close(layer(x, size, always_partition=True)[0], expected)
                assert close(layer(x, size, *arguments)[0], expected)
        assert calls[case.op] == 6


class TestMask:
    @each(*COSINE)
    def test_added_twice(self, case, monkeypatch):
        """To be seen, it takes neighbours at -100 and at 100 what the shift has brought from the other side."""
        layer = case.module(case.model())
        attention, side = layer.attention.self, torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
        attention.logit_scale.data.fill_(5)
        attention.key.weight.data.copy_(-attention.query.weight)
        attention.query.bias.data.zero_()
        x = side[:, None] * random_tensor((1, 8, 1, attention.query.in_features), 1).expand(-1, -1, 8, -1)
        x, size = x.flatten(1, 2), (8, 8)
        expected = layer(x, size)[0]
        swinops.patch(layer, "reference")
        assert close(layer(x, size)[0], expected)
        monkeypatch.setattr(transformers.CosineLayer, "MASK_VALUE", -100.0)
        assert not close(layer(x, size)[0], expected)


class TestAttentions:
    @each(SWIN, DONUT, V2, SUPER_RESOLUTION, AUDIO)  # MaskFormer's encoder fails when it is asked
    def test_output_attentions(self, case, calls):
        """By argument or by configuration the library's own forward records them, and its hooks stay."""
        model, x = case.model(attn_implementation="eager"), case.x()
        expected = model.model(x, output_attentions=True)
        assert expected.attentions and all(a.dim() == 4 for a in expected.attentions)
        swinops.patch(model, "reference")
        with pytest.warns(UserWarning, match="output_attentions, and the op keeps no attention weights"):
            actual = model.model(x, output_attentions=True)
        assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)
        assert all(torch.equal(a, b) for a, b in zip(actual.attentions, expected.attentions, strict=True))
        model.model.config.output_attentions = True
        assert all(torch.equal(a, b) for a, b in zip(model.model(x).attentions, expected.attentions, strict=True))
        model.model.config.output_attentions = False
        assert not calls[case.op]
        assert close(model(x), expected.last_hidden_state)
        assert calls[case.op] == len(case.replaced)

    @each(*CASES)
    def test_output_attentions_of_a_layer(self, case, calls):
        layer, size = case.module(case.model(attn_implementation="eager")), (5, 6)
        x = random_tensor((2, 30, layer.layernorm_before.normalized_shape[0]), 1)
        expected = layer(x, size, output_attentions=True)
        swinops.patch(layer, "reference")
        with pytest.warns(UserWarning, match="output_attentions, and the op keeps no attention weights"):
            actual = layer(x, size, output_attentions=True)
        assert len(actual) == 2 and all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert not calls[case.op]

    @each(SWIN)
    def test_hidden_states(self, case, calls):
        model, x = case.model(), case.x()
        expected = model.model(x, output_hidden_states=True)
        actual = swinops.patch(model, "reference").model(x, output_hidden_states=True)
        for name in ("hidden_states", "reshaped_hidden_states"):
            assert len(actual[name]) == 3
            assert all(close(a, b) for a, b in zip(actual[name], expected[name], strict=True))
        assert calls[case.op] == len(case.replaced)

    @pytest.mark.skipif(not NEW_LAYOUT, reason="this version has but one implementation")
    def test_implementations(self, calls):
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        ran = []
        AttentionInterface.register(
            "counted", lambda *args, **kwargs: ran.append(1) or sdpa_attention_forward(*args, **kwargs)
        )
        model, x = SWIN.model(), SWIN.x()
        swinops.patch(model, "reference")
        outputs = []
        for number, name in enumerate(("eager", "sdpa"), 1):
            model.model.set_attn_implementation(name)
            outputs.append(model(x))
            assert calls[SWIN.op] == number * len(SWIN.replaced)
        assert torch.equal(*outputs)
        model.model.set_attn_implementation("counted")
        assert "the attention implementation 'counted'" in str(swinops.explain(model, "reference"))
        with pytest.warns(UserWarning, match="the attention implementation 'counted'"):
            out = model(x)
        assert len(ran) == len(SWIN.replaced) and calls[SWIN.op] == 2 * len(SWIN.replaced)
        assert torch.equal(swinops.unpatch(model)(x), out)

    @pytest.mark.skipif(not NEW_LAYOUT, reason="this version has but one implementation")
    @pytest.mark.parametrize("name", ["eager", "sdpa"])
    def test_another_function_under_a_known_name(self, name, monkeypatch, calls):
        module, model, x = load("Swin"), SWIN.model(attn_implementation=name), SWIN.x()
        function = module.ALL_ATTENTION_FUNCTIONS.get_interface(name, module.eager_attention_forward)

        def doubled(*args, **kwargs):
            out, weights = function(*args, **kwargs)
            return 2 * out, weights

        swinops.patch(model, "reference")
        if name == "eager":
            monkeypatch.setattr(module, "eager_attention_forward", doubled)
        else:
            monkeypatch.setitem(module.ALL_ATTENTION_FUNCTIONS, name, doubled)
        with pytest.warns(UserWarning, match=f"the attention implementation '{name}'"):
            out = model(x)
        assert not calls[SWIN.op]
        assert torch.equal(swinops.unpatch(model)(x), out)

    @pytest.mark.skipif(not NEW_LAYOUT, reason="this version has but one implementation")
    def test_position_bias(self, calls):
        """sdpa adds one that a caller sends through the model."""
        model, x = SWIN.model(attn_implementation="sdpa").model, SWIN.x()
        plain, expected = model(x), model(x, position_bias=3 * torch.eye(16))
        assert not close(expected.last_hidden_state, plain.last_hidden_state)
        swinops.patch(model, "reference")
        with pytest.warns(UserWarning, match="a position_bias besides the layer's own"):
            actual = model(x, position_bias=3 * torch.eye(16))
        assert torch.equal(actual.last_hidden_state, expected.last_hidden_state) and not calls[SWIN.op]

    @pytest.mark.skipif(not NEW_LAYOUT, reason="the scale is not an attribute in this version")
    def test_a_scale_that_is_learned(self):
        model = SWIN.model()
        SWIN.module(model).attention.scaling = nn.Parameter(torch.tensor(0.3))
        (row,) = (row for row in swinops.explain(model) if row.action == "leave")
        assert "attention.scaling is a tensor" in row.reason


class TestModules:
    """What the op leaves to the layer's modules is called as a module."""

    @each(*CASES)
    def test_hooks_on_every_projection(self, case, calls):
        """A key and a value of zeros, which the pads have, go through the hooks too."""
        model, x = case.model(), case.x()
        for layer in layers(case, model):
            for name, module in layer.named_modules():
                if type(module) is nn.Linear and "mlp." not in name:
                    module.register_forward_hook(lambda module, args, out: out.sin() + 1)
        expected = model(x)
        assert close(swinops.patch(model, "reference")(x), expected)
        assert calls[case.op] == len(case.replaced)

    @each(*CASES)
    def test_without_biases(self, case, calls):
        model, x = case.model(qkv_bias=False), case.x()
        expected = model(x)
        assert close(swinops.patch(model, "reference")(x), expected)
        assert calls[case.op] == len(case.replaced)

    @each(DONUT, MASKFORMER, V2, SUPER_RESOLUTION, AUDIO)
    def test_dropout_after_the_projection_runs(self, case, calls):
        """It has the probability of that of the attention, which here is switched off by itself."""
        model, x = case.model(**case.dropout), case.x()
        seen = []
        for layer in layers(case, model):
            layer.attention.self.dropout.p = 0.0
            layer.attention.output.dropout.register_forward_hook(lambda module, args, out: seen.append(out == 0))
        swinops.patch(model, "reference").train()
        model(x)
        assert calls[case.op] == len(seen) == len(case.replaced)
        assert all(0.3 < float(zeros.float().mean()) < 0.5 for zeros in seen)

    @each(*CASES)
    def test_subclass_that_overrides_nothing(self, case, calls):
        """The library wraps the forward of each subclass of some layers."""
        model, x = case.model(), case.x()
        expected = model(x)
        for layer in layers(case, model):
            layer.__class__ = type("Mine", (type(layer),), {})
        assert close(swinops.patch(model, "reference")(x), expected)
        assert calls[case.op] == len(case.replaced)
        assert {type(layer).__name__ for layer in layers(case, swinops.unpatch(model))} == {"Mine"}

    @each(*CASES)
    def test_another_shift(self, case, calls):
        """The library takes any, and none below zero; the op those less than a window."""
        x = case.x()
        for shift, runs in ((1, True), (3, True), (4, False), (-1, False)):
            before, after = case.model(), swinops.patch(case.model(), "reference")
            for layer in (*layers(case, before), *layers(case, after)):
                layer.shift_size = shift
            expected = before(x)
            actions = {row.action for row in swinops.explain(before) if row.path in case.replaced}
            assert actions == {"replace" if runs else "leave"}
            calls[case.op] = 0
            with (
                nullcontext() if runs else pytest.warns(UserWarning, match=f"its shift_size is {shift}, with a window")
            ):
                assert close(after(x), expected)
            assert calls[case.op] == runs * len(case.replaced)

    @each(*CASES)
    def test_what_is_replaced_after_patch(self, case, calls):
        def without_mask(layer):
            layer.get_attn_mask = lambda *args, **kwargs: None

        def negated(layer):
            cls = type(layer.attention)

            def forward(*args, **kwargs):
                out, *weights = cls.forward(*args, **kwargs)
                return -out, *weights

            layer.attention.__class__ = type("Mine", (cls,), {"forward": forward})

        for change in (without_mask, negated):
            model, x = swinops.patch(case.model(), "reference"), case.x()
            before = model(x)
            calls[case.op] = 0
            for layer in layers(case, model):
                change(layer)
            with pytest.warns(UserWarning, match="its get_attn_mask was replaced|attention is a Mine"):
                out = model(x)
            assert not calls[case.op] and not close(out, before)
            assert torch.equal(swinops.unpatch(model)(x), out)

    @each(V2, SUPER_RESOLUTION)
    def test_a_window_that_is_not_that_of_the_bias(self, case, calls):
        """There the op would make a bias for any window."""
        model = swinops.patch(case.model(), "reference")
        case.module(model).window_size = 3
        with pytest.raises(RuntimeError), pytest.warns(UserWarning, match="its window_size is 3"):
            model(case.x())

    @pytest.mark.filterwarnings("ignore")
    def test_traced(self, calls):
        """torch.jit.trace, which the library supports where script fails."""
        model, x = SWIN.model(), SWIN.x(3)
        expected = model(x)
        traced = torch.jit.trace(swinops.patch(model, "reference"), SWIN.x(2), check_trace=False)
        before = calls[SWIN.op]
        assert close(traced(x), expected)
        assert calls[SWIN.op] - before == len(SWIN.replaced)


class TestModels:
    """Around the layers, what people load."""

    @each(SWIN, MASKFORMER, V2)
    @pytest.mark.parametrize("size", [(18, 20), (8, 8)], ids=["large", "small"])
    def test_backbone(self, case, size, calls):
        from transformers import AutoBackbone

        config = case.model().model.config
        config.out_features = ["stage1", "stage2"]
        model, x = randomise(AutoBackbone.from_config(config)).eval(), case.x(2, size)
        expected = model(x).feature_maps
        actual = swinops.patch(model, "reference")(x).feature_maps
        assert len(actual) == 2 and all(close(a, b) for a, b in zip(actual, expected, strict=True))
        assert calls[case.op] == len(case.replaced)

    def test_inside_of_another_model(self, calls):
        from transformers import UperNetConfig, UperNetForSemanticSegmentation

        backbone = SWIN.model().model.config
        backbone.out_features = ["stage1", "stage2"]
        options = {"hidden_size": 8, "pool_scales": [1], "num_labels": 3, "use_auxiliary_head": False}
        model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **options))
        model, x = randomise(model).eval(), SWIN.x()
        expected = model(x).logits
        assert close(swinops.patch(model, "reference")(x).logits, expected)
        assert calls[SWIN.op] == len(SWIN.replaced)

    @each(*CASES)
    def test_saved_and_loaded(self, case, tmp_path):
        model, x = swinops.patch(case.model(), "reference"), case.x()
        expected = model(x)
        model.model.save_pretrained(tmp_path / "patched")
        swinops.unpatch(model).model.save_pretrained(tmp_path / "plain")
        assert (tmp_path / "patched" / "model.safetensors").read_bytes() == (
            tmp_path / "plain" / "model.safetensors"
        ).read_bytes()
        loaded = LastHiddenState(type(model.model).from_pretrained(tmp_path / "patched")).eval()
        assert not any(isinstance(module, swap.Swapped) for module in loaded.modules())
        assert torch.equal(swinops.patch(loaded, "reference")(x), expected)

    @each(SWIN)
    def test_check(self, case):
        """Without the wrapper: the output is a dataclass of the library's."""
        report = swinops.check(case.model().model, case.x(), "reference")
        assert report.ok, report

    def test_training_with_labels(self, calls):
        """A trainer passes more than images down to the layers."""
        from transformers import SwinForImageClassification

        config = SWIN.model().model.config
        config.num_labels, config.problem_type = 3, "single_label_classification"
        model, x, y = randomise(SwinForImageClassification(config)).train(), SWIN.x(), torch.tensor([0, 2])
        extra = {"num_items_in_batch": torch.tensor(2)} if NEW_LAYOUT else {}
        results = []
        for _ in range(2):
            loss = model(x, labels=y, **extra).loss
            results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
            swinops.patch(model, "reference")
        same(*reversed(results))
        assert calls[SWIN.op] == len(SWIN.replaced)


PUBLISHED = {  # class, dim, heads, window, map, shift, pretrained window: a layer of each
    "swin-tiny-patch4-window7-224": ("Swin", 96, 3, 7, (56, 56), 3, 0),
    "swin-base-patch4-window12-384": ("Swin", 512, 16, 12, (24, 24), 6, 0),
    "swin-tiny at 512 x 683": ("Swin", 384, 12, 7, (32, 43), 3, 0),
    "donut-base": ("DonutSwin", 256, 8, 10, (40, 30), 5, 0),
    "maskformer-swin-base": ("MaskFormerSwin", 512, 16, 12, (20, 34), 6, 0),
    "clap-htsat-fused": ("ClapAudio", 192, 8, 8, (32, 32), 4, 0),
    "swinv2-tiny-patch4-window8-256": ("Swinv2", 96, 3, 8, (64, 64), 4, 0),
    "swinv2-base-patch4-window12to16-192to256-22kto1k-ft": ("Swinv2", 512, 16, 16, (32, 32), 8, 12),
    "swin2SR-classical-sr-x2-64": ("Swin2SR", 180, 6, 8, (64, 64), 4, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layers(name, calls):
    prefix, dim, heads, window, size, shift, pretrained = PUBLISHED[name]
    module = load(prefix)
    config = getattr(module, f"{prefix}Config")(window_size=window)
    config._attn_implementation = "sdpa"  # eager's softmax is in float32
    extra = {"pretrained_window_size": pretrained} if pretrained else {}
    layer = randomise(getattr(module, f"{prefix}Layer")(config, dim, size, heads, shift_size=shift, **extra)).eval()
    layer, x = layer.double(), random_tensor((1, size[0] * size[1], dim), 1, torch.float64)
    with torch.no_grad():
        expected = layer(x, size)[0]
        actual = swinops.patch(layer, "reference")(x, size)[0]
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert sum(calls.values()) == 1


# Version 4's layers have Donut's code, and a head_mask: (what Donut's file has, what theirs has)
HEAD_MASK = {
    "    output_attentions: bool | None = False,\n": "    head_mask=None,\n        output_attentions=False,\n",
    "(hidden_states, input_dimensions, output": "(hidden_states, input_dimensions, None, output",
    "attn_mask, output_attentions=": "attn_mask, head_mask, output_attentions=",
    "attention_mask, output_attentions)": "attention_mask, head_mask, output_attentions)",
    "attention_probs = self.dropout(attention_probs)\n": "attention_probs = self.dropout(attention_probs)\n"
    "        if head_mask is not None:\n            attention_probs = attention_probs * head_mask\n",
}


@pytest.fixture
def vendored(request, monkeypatch):
    """A model of a file that is somebody's copy, with changes: ``request.param`` is a prefix, and what they replace.

    Donut's is renamed as if it were Swin's: no installed version has both layouts of Swin's own layers.
    """
    prefix, changes = request.param
    original, new = load(prefix), prefix.replace("Donut", "")
    source = (
        inspect.getsource(original).replace(prefix, new).replace(f"import {new}C", f"import {prefix}Config as {new}C")
    )
    for old, text in changes.items():
        assert old in source
        source = source.replace(old, text)
    module = types.ModuleType(f"vendored.modeling_{new.lower()}")
    module.__package__, module.__file__ = original.__package__, original.__file__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, module.__name__, "exec"), vars(module))
    model = LastHiddenState(randomise(getattr(module, f"{new}Model")(build(prefix).model.config))).eval()
    swinops.explain(model)  # runs a small layer of its class, which no test should count
    return model


@pytest.mark.skipif(not NEW_LAYOUT, reason="this version has these layers itself")
class TestOldLayout:
    @pytest.mark.parametrize(
        "vendored", [("DonutSwin", {}), ("DonutSwin", HEAD_MASK)], indirect=True, ids=["without head_mask", "version 4"]
    )
    def test_parity(self, vendored, calls):
        x = DONUT.x()
        assert {row.class_name for row in swinops.explain(vendored)} == {"SwinLayer"}
        expected = gradients(vendored, x)
        same(gradients(swinops.patch(vendored, "reference"), x), expected)
        assert calls["window_attention"] == 4

    @pytest.mark.parametrize("vendored", [("DonutSwin", HEAD_MASK)], indirect=True, ids=["version 4"])
    def test_head_mask(self, vendored, calls):
        layer = swinops.patch(vendored, "reference").model.encoder.layers[0].blocks[1]
        x, size = random_tensor((2, 90, 32), 1), (9, 10)
        assert layer(x, size, None, False)[0].shape == x.shape and calls["window_attention"] == 1
        mask = torch.tensor([1.0, 0.0]).view(2, 1, 1)
        with pytest.warns(UserWarning, match="a head_mask, which the op does not apply"):
            out = layer(x, size, mask)[0]
        assert calls["window_attention"] == 1
        assert torch.equal(swinops.unpatch(vendored).model.encoder.layers[0].blocks[1](x, size, mask)[0], out)


OTHER = "its forward computes something else than that of transformers's"
ONCE = {"            attention_scores = attention_scores + attention_mask.unsqueeze(1).unsqueeze(0)\n": ""}


@pytest.mark.skipif(not NEW_LAYOUT, reason="the changes are to a later version")
@pytest.mark.parametrize(
    ("vendored", "reason"),
    [
        (("DonutSwin", {"shortcut + self": "shortcut + self.gamma * self"}), "its forward uses gamma"),
        (("DonutSwin", {"shortcut + self": "shortcut + 0.5 * self"}), OTHER),
        (("DonutSwin", {"scores / math": "scores / self.tau / math"}), "its attention.self.forward uses tau"),
        (("DonutSwin", {"-100.0": "-1e4"}), "its get_attn_mask is not the library's"),
        (("DonutSwin", {"torch_int(0)": "torch_int(0) * self.two"}), "set_shift_and_window_size uses two"),
        (
            (
                "DonutSwin",
                {"functional.pad(hidden_states, pad_values": "functional.pad(hidden_states, pad_values, value=1"},
            ),
            OTHER,
        ),
        (
            ("DonutSwin", {"self.chunk_size_feed_forward = config.chunk_size_feed_forward": "assert dim > 8"}),
            "does not run (AssertionError",
        ),
        (("Swinv2", ONCE), OTHER),
        (("Swinv2", {"self.layernorm_after(layer_output)": "layer_output"}), OTHER),
    ],
    indirect=["vendored"],
    ids=[
        "scaled residual",
        "half of a residual",
        "scores",
        "mask",
        "shift",
        "pads",
        "no small ones",
        "mask once",
        "norm",
    ],
)
def test_changed_copies_are_left(vendored, reason):
    rows = swinops.explain(vendored)
    assert any(reason in row.reason for row in rows if row.action == "leave"), rows
