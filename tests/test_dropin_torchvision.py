"""torchvision's functions on the ops, and what is special to its modules: see test_dropin_libraries for the rest."""

import importlib
import inspect
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import swinops
from swinops import torchvision as ours
from swinops.dropin import swap
from swinops.testing import assert_accurate, assert_op_accurate, random_tensor

from .dropin_case import close
from .dropin_torchvision import CASES
from .timm_swins import assert_same, randomise, results

pytest.importorskip("torchvision")

from torch._dynamo.testing import CompileCounter
from torchvision.models import feature_extraction, swin_t, swin_v2_t
from torchvision.models import swin_transformer as theirs
from torchvision.models.video import swin_transformer as video

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

V1, V2, VIDEO = CASES
every_model = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
WINDOWS = {"window_size": [4, 3], "shift_size": [2, 1], "num_heads": 2}


def gradients(model, x):
    return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


def tensors(space=(7, 5), window=(4, 3), cosine=False, without=(), dtype=torch.float32, device="cpu"):
    """The tensors that the functions take, for two heads of 8."""
    shapes = {
        "input": (2, *space, 16),
        "qkv_weight": (48, 16),
        "proj_weight": (16, 16),
        "relative_position_bias": (1, 2, torch.Size(window).numel(), torch.Size(window).numel()),
        "qkv_bias": (48,),
        "proj_bias": (16,),
    }
    drawn = {
        name: random_tensor(shape, seed, dtype, device) / (4 if name.endswith("weight") else 1)
        for seed, (name, shape) in enumerate(shapes.items())
        if name not in without
    }
    if cosine:
        drawn["logit_scale"] = torch.tensor([1.0, 3.0], dtype=dtype, device=device).view(2, 1, 1)
    return drawn


def with_settings(f, **settings):
    return lambda **tensors: f(**tensors, **settings)


FUNCTIONAL = {
    "pads": {},
    "no pads": {"space": (8, 6)},
    "pads on one axis": {"space": (8, 5)},
    "shift on one axis": {"space": (4, 8)},
    "shift on the other axis": {"space": (9, 2)},
    "shift given for one axis": {"shift": [0, 1]},
    "no shift": {"shift": [0, 0]},
    "one window": {"space": (3, 3)},
    "no biases": {"without": ("qkv_bias", "proj_bias")},
    "cosine": {"cosine": True},
    "cosine, one axis": {"cosine": True, "space": (3, 7)},
    "cosine, no biases": {"cosine": True, "space": (10, 7), "without": ("qkv_bias", "proj_bias")},
    "video": {"space": (3, 5, 7), "window": (2, 3, 4), "shift": [1, 1, 2]},
    "video, no pads": {"space": (4, 6, 4), "window": (2, 3, 4), "shift": [1, 1, 0]},
    "video, shift of one window": {"space": (2, 6, 5), "window": (2, 3, 3), "shift": [1, 0, 1]},
}


def functions(window=(4, 3), shift=(2, 1), **options):
    """The function here and torchvision's, with their settings, and the tensors that they take."""
    settings = {"window_size": list(window), "shift_size": list(shift), "num_heads": 2}
    if len(window) == 3:
        pair = ours.shifted_window_attention_3d, video.shifted_window_attention_3d
    else:
        pair = ours.shifted_window_attention, theirs.shifted_window_attention
    return (*(with_settings(f, **settings) for f in pair), tensors(window=window, **options))


class TestFunctions:
    @pytest.mark.parametrize(
        ("case", "backend"),
        [(case, "reference") for case in FUNCTIONAL] + [(case, "triton") for case in ("pads", "cosine", "video")],
    )
    def test_equals_torchvision(self, case, backend, device):
        op, definition, inputs = functions(**FUNCTIONAL[case], device=device)
        dout = random_tensor(inputs["input"].shape, 9, device=device)
        assert_op_accurate(lambda **x: op(**x, backend=backend), definition, inputs, dout)

    @pytest.mark.parametrize(("case", "backend"), [("pads", "triton"), ("cosine", "triton"), ("video", "reference")])
    def test_bfloat16(self, case, backend, device):
        op, definition, inputs = functions(**FUNCTIONAL[case], dtype=torch.bfloat16, device=device)
        dout = random_tensor(inputs["input"].shape, 9, torch.bfloat16, device)
        assert_op_accurate(lambda **x: op(**x, backend=backend), definition, inputs, dout)

    @pytest.mark.parametrize("case", ["pads", "cosine", "video"])
    def test_float64(self, case):
        op, definition, inputs = functions(**FUNCTIONAL[case], dtype=torch.float64)
        expected = definition(**inputs)
        assert (op(**inputs) - expected).abs().max() <= 1e-14 * expected.abs().max()

    @pytest.mark.parametrize("name", ["shifted_window_attention", "shifted_window_attention_3d"])
    def test_signature(self, name):
        library = theirs if hasattr(theirs, name) else video
        expected = [(p.name, p.kind, p.default) for p in parameters_of(getattr(library, name))]
        actual = [(p.name, p.kind, p.default) for p in parameters_of(getattr(ours, name))]
        assert actual[:-1] == expected
        assert actual[-1] == ("backend", inspect.Parameter.POSITIONAL_OR_KEYWORD, "auto")

    def test_imports_no_torchvision(self):
        code = "import sys, swinops.torchvision; assert not any(name.startswith('torchvision') for name in sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_bias_without_a_batch_axis(self):
        inputs = tensors()
        expected = ours.shifted_window_attention(**inputs, **WINDOWS)
        inputs["relative_position_bias"] = inputs["relative_position_bias"][0]
        assert torch.equal(ours.shifted_window_attention(**inputs, **WINDOWS), expected)

    def test_the_keys_bias_has_a_gradient_of_zeros(self):
        inputs = tensors(cosine=True)
        bias = inputs["qkv_bias"].requires_grad_()
        ours.shifted_window_attention(**inputs, **WINDOWS).sum().backward()
        assert [bool(third.any()) for third in bias.grad.chunk(3)] == [True, False, True]

    def test_clamped_scale(self):
        inputs = tensors(cosine=True)
        inputs["logit_scale"] += 4
        expected = theirs.shifted_window_attention(**inputs, **WINDOWS)
        scale = inputs["logit_scale"].requires_grad_()
        out = ours.shifted_window_attention(**inputs, **WINDOWS)
        assert close(out, expected)
        assert not torch.autograd.grad(out.sum(), scale)[0].any()

    def test_dropout_of_the_output(self):
        inputs = tensors()
        expected = theirs.shifted_window_attention(**inputs, **WINDOWS)
        out = ours.shifted_window_attention(**inputs, **WINDOWS, dropout=0.25)
        kept = out != 0
        assert close(out[kept], expected[kept] / 0.75)
        assert 0.6 < kept.float().mean() < 0.9
        assert close(ours.shifted_window_attention(**inputs, **WINDOWS, dropout=0.25, training=False), expected)

    def test_attention_dropout(self):
        inputs = tensors()
        expected = theirs.shifted_window_attention(**inputs, **WINDOWS)
        out = ours.shifted_window_attention(**inputs, **WINDOWS, attention_dropout=0.1, training=False)
        assert close(out, expected)
        with pytest.raises(ValueError, match=r"attention_dropout must be 0 while training, for .* got 0\.1"):
            ours.shifted_window_attention(**inputs, **WINDOWS, attention_dropout=0.1)

    def test_autocast(self):
        inputs = tensors()
        with torch.autocast("cpu", torch.bfloat16):
            expected = theirs.shifted_window_attention(**inputs, **WINDOWS)
            actual = ours.shifted_window_attention(**inputs, **WINDOWS)
        assert actual.dtype == expected.dtype == torch.bfloat16
        assert (actual - expected).abs().max() <= 0.03 * expected.abs().max()

    @pytest.mark.parametrize("case", ["pads", "cosine", "video"])
    def test_script(self, case):
        options = FUNCTIONAL[case]
        inputs = tensors(**{name: x for name, x in options.items() if name != "shift"})
        window, shift = list(options.get("window", [4, 3])), options.get("shift", [2, 1])
        f = ours.shifted_window_attention_3d if case == "video" else ours.shifted_window_attention
        expected = f(**inputs, window_size=window, shift_size=shift, num_heads=2)
        assert torch.equal(torch.jit.script(f)(**inputs, window_size=window, shift_size=shift, num_heads=2), expected)

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"input": torch.zeros(7, 5, 16)}, r"input must be \[B, H, W, C\], got \(7, 5, 16\)"),
            ({"num_heads": 3}, "num_heads must divide the 16 channels of input, got 3"),
            ({"num_heads": 0}, "num_heads must divide the 16 channels of input, got 0"),
            ({"window_size": [4]}, r"window_size must be at least 1 on each of the 2 spatial axes, got \(4,\)"),
            ({"window_size": [4, 0]}, r"window_size must be at least 1 on each of the 2 spatial axes, got \(4, 0\)"),
            ({"shift_size": [2, 3]}, r"shift_size must be .* less than the window \(4, 3\) .* got \(2, 3\)"),
            ({"qkv_weight": torch.zeros(16, 48)}, r"qkv_weight must be \[3 \* C, C\] = \(48, 16\), got \(16, 48\)"),
            ({"proj_weight": torch.zeros(8, 16)}, r"proj_weight must be \[C, C\] = \(16, 16\), got \(8, 16\)"),
            ({"qkv_bias": torch.zeros(16)}, r"qkv_bias must be \[3 \* C\] = \(48,\), got \(16,\)"),
            ({"proj_bias": torch.zeros(48)}, r"proj_bias must be \[C\] = \(16,\), got \(48,\)"),
            ({"logit_scale": torch.zeros(2)}, r"logit_scale must be \[heads, 1, 1\] = \(2, 1, 1\), got \(2,\)"),
            (
                {"relative_position_bias": torch.zeros(2, 2, 12, 12)},
                r"relative_position_bias must be \[1, heads, N, N\] = \(1, 2, 12, 12\), got \(2, 2, 12, 12\)",
            ),
            ({"backend": "gpu"}, "backend must be 'auto' or one of 'cuda', 'triton', 'reference', got 'gpu'"),
        ],
    )
    def test_bad_arguments(self, change, error):
        with pytest.raises(ValueError, match=error):
            ours.shifted_window_attention(**{**tensors(), **WINDOWS, **change})

    def test_bad_video(self):
        windows = {"window_size": [2, 4, 3], "shift_size": [1, 2, 1], "num_heads": 2}
        with pytest.raises(ValueError, match=r"input must be \[B, T, H, W, C\], got \(2, 7, 5, 16\)"):
            ours.shifted_window_attention_3d(**tensors(window=(2, 4, 3)), **windows)


def parameters_of(f):
    return inspect.signature(f).parameters.values()


class TestFx:
    """The shift, and the window of a video, are found when the traced model runs."""

    @every_model
    def test_traced_for_every_size(self, case, calls):
        model = case.model()
        expected = [model(case.x(2, size)) for size in case.sizes]
        traced = torch.fx.symbolic_trace(swinops.patch(model, "reference"))
        traced = pickle.loads(pickle.dumps(traced))
        for size, y in zip(case.sizes, expected, strict=True):
            assert close(traced(case.x(2, size)), y)
        assert calls[case.op] == len(case.sizes) * len(case.replaced)

    @pytest.mark.filterwarnings("ignore:swinops", "ignore:The nodes obtained by tracing the model in train mode")
    @every_model
    def test_feature_extractor(self, case, calls):
        """Its nodes have torchvision's names; its graph for training drops attention weights, as torchvision does."""
        model, x = case.model(**case.dropout), case.x()
        attn, function = list(case.replaced)[-1], "shifted_window_attention" + "_3d" * (case is VIDEO)
        names = [f"{attn}.{function}", f"{attn.removesuffix('.attn')}.add", "head"]
        plain = feature_extraction.create_feature_extractor(model, names)
        extractor = feature_extraction.create_feature_extractor(swinops.patch(model, "reference"), names)
        for size in case.sizes:
            expected, actual = plain(case.x(2, size)), extractor(case.x(2, size))
            assert list(actual) == names
            assert all(close(actual[name], expected[name]) for name in names)
        assert calls[case.op] == len(case.sizes) * len(case.replaced)
        torch.manual_seed(0)
        expected = plain.train()(x)
        torch.manual_seed(0)
        actual = extractor.train()(x)
        assert all(torch.equal(actual[name], expected[name]) for name in names)
        assert calls[case.op] == len(case.sizes) * len(case.replaced)

    @pytest.mark.filterwarnings("ignore:swinops")
    def test_a_traced_model_of_auto_is_torchvisions(self, calls):
        model, x = V1.model(), V1.x()
        expected = model(x)
        assert torch.equal(torch.fx.symbolic_trace(swinops.patch(model))(x), expected)
        assert not calls["window_attention"]


class TestModules:
    @every_model
    def test_only_attentions_are_replaced(self, case):
        rows = swinops.explain(case.model(), "reference")
        assert {row.path: row.class_name for row in rows} == case.replaced
        assert {(row.library, row.action, row.reason) for row in rows} == {("torchvision", "replace", "")}

    @every_model
    def test_script_runs_torchvision_where_attention_drops(self, case, calls):
        # all of it is dropped: TorchScript need not draw the random numbers that PyTorch does
        model, x = case.model(**dict.fromkeys(case.dropout, 1.0)), case.x()
        expected = model(x)
        dropped = model.train()(x)
        assert not close(dropped, expected)
        scripted = torch.jit.script(swinops.patch(model, "reference"))
        assert close(scripted(x), dropped)
        assert not calls[case.op]
        assert close(scripted.eval()(x), expected)
        assert calls[case.op] == len(case.replaced)

    def test_stochastic_depth_is_torchvisions(self, calls):
        """A block has one module of it and calls it twice; it draws in the order that it did."""
        model, x = V1.model(stochastic_depth_prob=0.5).train(), V1.x(8)
        torch.manual_seed(0)
        expected = model(x)
        assert not torch.equal(model(x), expected)
        swinops.patch(model, "reference")
        seen = Counter()
        for name, module in model.named_modules():
            if isinstance(module, theirs.StochasticDepth):
                module.register_forward_hook(lambda *args, name=name: seen.update([name]))
        torch.manual_seed(0)
        assert close(model(x), expected)
        assert calls["window_attention"] == 4
        assert list(seen.values()) == [2] * 4

    def test_bias_of_the_keys(self):
        """It is zeroed in every forward of V2: its gradient is zero, and not None."""
        model = swinops.patch(V2.model(), "reference")
        model(V2.x()).square().sum().backward()
        for path in V2.replaced:
            thirds = model.get_submodule(path).qkv.bias.grad.chunk(3)
            assert [bool(third.any()) for third in thirds] == [True, False, True]

    @pytest.mark.parametrize("cls", [theirs.ShiftedWindowAttention, theirs.ShiftedWindowAttentionV2])
    @pytest.mark.parametrize("biases", [{"qkv_bias": False}, {"proj_bias": False}])
    def test_without_biases(self, cls, biases):
        """The blocks have no such option, but the attention has."""
        attn, x = randomise(cls(16, [4, 3], [2, 1], 2, **biases)), random_tensor((2, 7, 5, 16), 1)
        with swinops.patched(attn, "reference"):
            actual = results(attn, x)
        assert_same(actual, attn, x)

    @every_model
    def test_dropout_of_the_output(self, case):
        attn = case.module(case.model(dropout=0.25))
        x = random_tensor((2, *(7, 5, 4)[: len(case.sizes[0])], 24), 1)
        expected = attn.eval()(x)
        swinops.patch(attn, "reference")
        assert close(attn(x), expected)
        out = attn.train()(x)
        assert close(out[out != 0], expected[out != 0] / 0.75)
        assert 0.6 < (out != 0).float().mean() < 0.9

    @every_model
    @pytest.mark.parametrize("trace", [False, True])
    def test_auto_asks_for_what_will_run(self, case, trace, calls, monkeypatch):
        asked = set()
        monkeypatch.setattr(swap, "kernel", lambda *args: (asked.add(args), ("triton", ""))[1])
        model = swinops.patch(case.model())
        asked.clear()
        model = torch.fx.symbolic_trace(model) if trace else model
        model(case.x())
        assert calls[case.op] == len(case.replaced)
        cpu, heads = torch.device("cpu"), (2, 4) if case is V1 else (2,)
        bias = {("relative_position_bias", cpu, torch.float32, n) for n in heads}
        if case is V2:
            bias = {("continuous_position_bias", cpu, torch.float32, 2)}
        assert asked == {(case.op, cpu, torch.float32, 12)} | bias

    def test_hooks_on_the_network_run(self, calls):
        model, x = swinops.patch(V2.model(), "reference"), V2.x()
        network = V2.module(model).cpb_mlp
        network[0].register_forward_hook(lambda module, args, out: out.sin())
        network.register_forward_hook(lambda module, args, out: out.cos())
        actual = model(x)
        assert calls["cosine_attention"] == 2
        assert close(actual, swinops.unpatch(model)(x))
        assert not close(actual, V2.model()(x))

    @pytest.mark.parametrize("first", ["parametrize", "patch"])
    def test_parametrized_table(self, first, calls):
        model, plain, x = V1.model(), V1.model(), V1.x()
        if first == "patch":
            swinops.patch(model, "reference")
        for module in (V1.module(model), V1.module(plain)):
            nn.utils.parametrize.register_parametrization(module, "relative_position_bias_table", nn.Tanh())
        expected, actual = gradients(plain, x), gradients(swinops.patch(model, "reference"), x)
        assert all(map(close, actual, expected))
        assert calls["window_attention"] == 4
        assert "own forward" in swinops.explain(swinops.patch(model))[1].reason

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("case", [V1, VIDEO], ids=lambda case: case.name)
    def test_half_precision(self, case, dtype):
        report = swinops.check(case.model().to(dtype), case.x().to(dtype), "reference")
        assert report.ok, report

    def test_cosines_in_bfloat16(self):
        """Gradients of parameters apart: rounding of the coordinates and of the scores' gradients decides them."""
        rows = swinops.check(V2.model().bfloat16(), V2.x(), "reference").rows
        rows = [row for row in rows if row.quantity != "parameter gradients"]
        assert len(rows) == 4 and all(row.ok for row in rows), rows

    @pytest.mark.parametrize(
        ("case", "dynamic"),
        [(V1, None), (V2, None), (VIDEO, None), (VIDEO, True)],
        ids=lambda value: getattr(value, "name", str(value)),
    )
    def test_four_image_sizes_make_three_graphs(self, case, dynamic, calls):
        torch._dynamo.reset()
        attn, axes = case.module(case.model()), len(case.sizes[0])
        images = [random_tensor((1, *(n + 2 * step for n in (7, 9, 6)[:axes]), 24), step) for step in range(4)]
        with torch.no_grad():
            expected = list(map(attn, images))
            counter = CompileCounter()
            compiled = torch.compile(swinops.patch(attn, "reference"), fullgraph=True, backend=counter, dynamic=dynamic)
            assert all(map(close, map(compiled, images), expected))
        assert counter.frame_count <= 3
        assert calls[case.op] == 4


class TestPublished:
    @pytest.mark.parametrize("model", [swin_t, swin_v2_t])
    @torch.no_grad()
    def test_at_224(self, model):
        model, x = randomise(model()).eval(), random_tensor((1, 3, 224, 224), 1)
        rows = swinops.explain(model)
        assert [row.action for row in rows] == ["replace"] * 12
        assert all(row.path.endswith(".attn") and row.library == "torchvision" for row in rows)
        plain = model(x)
        with swinops.patched(model, "reference"):
            actual = model(x)
        assert_accurate(actual, plain, model.double()(x.double()), "logits")

    @pytest.mark.parametrize("frames", [8, 5])
    @torch.no_grad()
    def test_swin3d_t(self, frames):
        """Its first attention that shifts: windows of 8 x 7 x 7 tokens, or of as many frames as there are."""
        attn = randomise(video.ShiftedWindowAttention3d(96, [8, 7, 7], [4, 3, 3], 3)).eval()
        x = random_tensor((1, frames, 14, 10, 96), 1)
        plain = attn(x)
        with swinops.patched(attn, "reference"):
            actual = attn(x)
        assert_accurate(actual, plain, attn.double()(x.double()), "out")


class TestLeft:
    """What ``patch`` leaves alone, and says so."""

    def left(self, case, model, reason, number=1):
        x = case.x()
        expected = model(x)
        rows = [row for row in swinops.explain(model) if row.action == "leave"]
        assert len(rows) == number and all(reason in row.reason for row in rows), rows
        with pytest.warns(UserWarning, match="patch left|nothing to replace"):
            swinops.patch(model, "reference")
        assert sum(isinstance(module, swap.Swapped) for module in model.modules()) == len(case.replaced) - number
        assert close(model(x), expected)

    @every_model
    def test_another_bias(self, case):
        model = case.model()
        attn = case.module(model)
        cls = type(attn)
        members = {"get_relative_position_bias": lambda self, *args: cls.get_relative_position_bias(self, *args) * 2}
        attn.__class__ = type("Mine", (cls,), members)
        self.left(case, model, "its class overrides get_relative_position_bias")

    @every_model
    def test_another_index(self, case):
        model = case.model()
        case.module(model).relative_position_index.flatten()[1] += 1
        self.left(case, model, "its relative_position_index is not torchvision's")

    def test_other_coordinates(self):
        model = V2.model()
        V2.module(model).relative_coords_table *= 1.01
        self.left(V2, model, "its relative_coords_table is not torchvision's")

    def test_a_shift_beyond_the_window(self):
        model = V1.model()
        V1.module(model).shift_size = [4, 1]
        self.left(V1, model, "its shift_size [4, 1] is not less than its window_size [4, 3]")

    @pytest.mark.parametrize(
        ("case", "module", "name"),
        [
            (V1, theirs, "shifted_window_attention"),
            (V2, theirs, "shifted_window_attention"),
            (VIDEO, video, "shifted_window_attention_3d"),
            (VIDEO, video, "_get_window_and_shift_size"),
        ],
        ids=lambda value: getattr(value, "name", value if isinstance(value, str) else ""),
    )
    def test_a_function_replaced_in_the_library(self, case, module, name, monkeypatch):
        f = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **options: f(*args, **options))
        self.left(case, case.model(), f"its {name} takes args, options", len(case.replaced))


class TestVendored:
    """A copy of torchvision's file in somebody's repository, recognised by module suffix, name and attributes."""

    @pytest.fixture
    def vendor(self, tmp_path, monkeypatch):
        """A model whose attentions are of a copy of torchvision's file, with one change."""

        def vendor(case, old="", new=""):
            library = video if case is VIDEO else theirs
            source = Path(library.__file__).read_text().partition("\n\nclass Swin_T_Weights")[0]
            source = source.partition("\n\nclass Swin3D_T_Weights")[0]
            assert old in source
            source, package = source.replace(old, new), library.__package__
            for dots in range(package.count(".") + 1, 0, -1):
                source = source.replace(f"from {'.' * dots}", f"from {package.rsplit('.', dots - 1)[0]}.")
            Path(tmp_path, "swin_transformer.py").write_text(source)
            copied = importlib.import_module(f"{tmp_path.name}.swin_transformer")
            model = case.model()
            for path in case.replaced:
                attn = model.get_submodule(path)
                attn.__class__ = getattr(copied, type(attn).__name__)
            return model

        monkeypatch.syspath_prepend(tmp_path.parent)
        return vendor

    @every_model
    def test_a_copy(self, case, vendor, calls):
        model, x = vendor(case), case.x()
        expected = model(x)
        swinops.patch(model, "reference")  # and runs small modules of its class
        before = calls[case.op]
        assert close(model(x), expected)
        assert calls[case.op] - before == len(case.replaced)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))

    @pytest.mark.parametrize(
        ("case", "old", "new"),
        [
            (V1, "float(-100.0)", "float(-1000.0)"),
            (V2, "16 * torch.sigmoid", "8 * torch.sigmoid"),
            (VIDEO, "float(-100.0)", "float(-1000.0)"),
        ],
        ids=lambda value: getattr(value, "name", value),
    )
    def test_a_changed_number(self, case, old, new, vendor):
        rows = swinops.explain(vendor(case, old, new))
        assert {row.path for row in rows} == set(case.replaced)
        assert all(f"its forward computes something else than that of {case.library}'s" in row.reason for row in rows)

    @pytest.mark.parametrize(
        ("case", "old", "new", "reason"),
        [
            (V1, "attn = attn + relative", "attn = attn.tanh() + relative", "shifted_window_attention uses tanh"),
            (
                V1,
                "proj.bias,\n            training",
                "proj.bias,\n            logit_scale=self.logit_scale, training",
                "forward uses logit_scale",
            ),
            (VIDEO, "new_zeros(*size_dhw)", "new_ones(*size_dhw)", "_compute_attention_mask_3d uses new_ones"),
            (V1, "view(N, N, -1)", "view(N, N, -1).abs()", "_get_relative_position_bias uses abs"),
            (V2, "16 * torch.sigmoid", "self.dropout * torch.sigmoid", "get_relative_position_bias uses dropout"),
            (VIDEO, "= size_dhw[i]", "= max(size_dhw[i], 1)", "_get_window_and_shift_size uses max"),
            (VIDEO, "x.new_zeros(*size_dhw)", "x.new_zeros(*size_dhw).cos()", "_compute_attention_mask_3d uses cos"),
            (VIDEO, "size_dhw = [t, h, w]", "size_dhw = [t, h, w, x.dim()]", "forward uses dim"),
        ],
        ids=lambda value: getattr(value, "name", value),
    )
    def test_a_changed_copy(self, case, old, new, reason, vendor):
        model = vendor(case, old, new)
        rows = swinops.explain(model)
        assert {row.path for row in rows} == set(case.replaced)
        assert {row.reason for row in rows} == {f"its {reason}, unlike that of torchvision's {rows[0].class_name}"}
        with pytest.warns(UserWarning, match="nothing to replace"):
            swinops.patch(model)
