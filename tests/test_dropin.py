"""What ``patch`` promises of any model, shown on timm's Swin: nothing but the class of some instances changes."""

import copy
import importlib
import io
import pickle
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import swinops
from swinops.dropin import swap
from swinops.testing import random_tensor

swin = pytest.importorskip("timm.models.swin_transformer")
timm = pytest.importorskip("timm")

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def build(module=swin, **options):
    """Two stages on maps of 7 x 5 and 4 x 3, which a window of 4 pads, with every parameter random."""
    defaults = {"img_size": (14, 10), "patch_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    model = module.SwinTransformer(**{**defaults, "window_size": 4, "num_classes": 5, "drop_path_rate": 0.0, **options})
    return randomise(model).eval()


def randomise(model):
    for seed, p in enumerate(model.parameters()):
        p.data.copy_(random_tensor(p.shape, seed) / (p[0].numel() ** 0.5 if p.dim() > 1 else 1))
    return model


def image(batch=2, size=(14, 10)):
    return random_tensor((batch, 3, *size), 99)


def block(model, stage=0, n=1):
    return model.layers[stage].blocks[n]


def gradients(model, x):
    return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


def close(actual, expected):
    """Equal but for the order of float32 sums."""
    return torch.allclose(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(swap, "warned", set())


@pytest.fixture
def calls(monkeypatch):
    """Calls of the reference's attention: it runs wherever a test asks for backend "reference"."""
    import swinops.reference

    calls, attention = [], swinops.reference.window_attention
    monkeypatch.setattr(swinops.reference, "window_attention", lambda *args: (calls.append(args), attention(*args))[1])
    return calls


class TestSwap:
    def test_state_dict(self):
        model = build()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        after = swinops.patch(model).state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert not model.load_state_dict({name: x + 1 for name, x in before.items()}).missing_keys
        assert all(torch.equal(model.state_dict()[name], before[name] + 1) for name in before)
        assert not build().load_state_dict(model.state_dict()).unexpected_keys

    def test_unpatch_restores_everything(self):
        model = build()
        modules = list(model.modules())
        before = [(type(module), dict(vars(module))) for module in modules]
        assert swinops.patch(model) is model
        assert [type(module) for module in modules] != [cls for cls, _ in before]
        assert swinops.unpatch(model) is model
        assert list(model.modules()) == modules
        assert [(type(module), vars(module)) for module in modules] == before

    def test_is_idempotent_and_takes_another_backend(self, calls):
        model = swinops.patch(build())
        classes = [type(module) for module in model.modules()]
        swinops.patch(model, "reference")
        assert [type(module) for module in model.modules()] == classes
        model(image())
        assert len(calls) == 4
        swinops.unpatch(model)
        assert type(block(model)) is swin.SwinTransformerBlock

    def test_patched_restores_after_an_exception(self):
        model = build()
        with pytest.raises(ZeroDivisionError), swinops.patched(model, "reference") as same:
            assert same is model and type(block(model)) is not swin.SwinTransformerBlock
            raise ZeroDivisionError
        assert type(block(model)) is swin.SwinTransformerBlock
        assert "swinops_backend" not in vars(block(model))

    def test_patched_keeps_what_was_patched(self):
        model = swinops.patch(build(), "reference")
        with swinops.patched(model):
            assert block(model).swinops_backend == "auto"
        assert block(model).swinops_backend == "reference"

    def test_instances_of_the_original_class(self):
        model = swinops.patch(build())
        assert isinstance(block(model), swin.SwinTransformerBlock)
        assert type(block(model)).__name__ == "SwinTransformerBlock"  # device maps go by the name
        assert "swinops='auto'" in repr(model)

    def test_other_models_are_untouched(self):
        other = build()
        swinops.patch(build())
        assert type(block(other)) is type(block(build())) is swin.SwinTransformerBlock

    @pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel, torch.compile])
    def test_finds_models_in_wrappers(self, wrap):
        model = build()
        swinops.patch(wrap(model))
        assert type(block(model)) is not swin.SwinTransformerBlock

    def test_unpatch_refuses_a_class_swapped_again(self):
        model = swinops.patch(build())
        block(model).__class__ = type("FSDPBlock", (type(block(model)),), {})
        with pytest.raises(RuntimeError, match="got the class FSDPBlock"):
            swinops.unpatch(model)
        assert isinstance(block(model, 1), swap.Swapped)  # nothing half-done

    def test_importing_swinops_imports_nothing_heavy(self):
        code = "import sys, torch; a = set(sys.modules); import swinops; print(*sorted(set(sys.modules) - a))"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        assert {name.partition(".")[0] for name in out} == {"swinops"}
        assert "swinops.kernels" not in out


class TestCopies:
    def test_deepcopy(self):
        model = swinops.patch(build(), "reference")
        twin = copy.deepcopy(model)
        assert torch.equal(twin(image()), model(image()))
        twin.head.fc.weight.data.zero_()
        assert model.head.fc.weight.any()
        assert type(block(swinops.unpatch(twin))) is swin.SwinTransformerBlock

    def test_pickle(self):
        model = swinops.patch(build(), "reference")
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(image()), model(image()))
        assert type(block(twin)) is type(block(model))

    def test_save_and_load_in_another_process(self, tmp_path):
        model = swinops.patch(build(), "reference")
        torch.save((model, image(), model(image())), tmp_path / "model.pt")
        code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import conftest
model, x, y = torch.load(sys.argv[2], weights_only=False)
assert torch.allclose(model(x), y, atol=1e-4) and model.layers[0].blocks[0].swinops_backend == "reference"
"""
        arguments = [str(Path(__file__).parent), str(tmp_path / "model.pt")]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True)

    def test_torch_save(self):
        model = swinops.patch(build(), "reference")
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(image()), model(image()))


class TestTracing:
    def test_script(self, calls):
        model = build()
        expected = model(image())
        scripted = torch.jit.script(swinops.patch(model, "reference"))
        assert close(scripted(image()), expected)
        assert len(calls) == 4
        torch.jit.save(scripted, buffer := io.BytesIO())
        buffer.seek(0)
        assert close(torch.jit.load(buffer)(image()), expected)

    @pytest.mark.parametrize("options", [{}, {"attn_drop_rate": 0.1}])
    def test_script_of_auto_runs_timm_where_no_kernel_can(self, options, calls):
        model = build(**options)
        expected = model(image())
        assert torch.equal(torch.jit.script(swinops.patch(model))(image()), expected)
        assert not calls

    @pytest.mark.filterwarnings("ignore:swinops")
    def test_fx(self, calls):
        model = build()
        expected = model(image())
        traced = torch.fx.symbolic_trace(swinops.patch(model, "reference"))
        assert close(traced(image()), expected)
        assert len(calls) == 4
        assert torch.equal(torch.fx.symbolic_trace(swinops.patch(model, "auto"))(image()), expected)

    def test_export_with_a_dynamic_batch(self, calls):
        model = build()
        expected = model(image(3))
        batch = torch.export.Dim("batch")
        exported = torch.export.export(swinops.patch(model, "reference"), (image(2),), dynamic_shapes=({0: batch},))
        calls.clear()
        assert close(exported.module()(image(3)), expected)
        assert len(calls) == 4

    @pytest.mark.filterwarnings("ignore:swinops")
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_compiles_without_a_graph_break(self, backend, calls):
        torch._dynamo.reset()
        model = build(depths=(2,), num_heads=(2,))
        expected = gradients(model, image())
        compiled = torch.compile(swinops.patch(model, backend), fullgraph=True, backend="aot_eager")
        assert all(map(close, gradients(compiled, image()), expected))
        assert bool(calls) == (backend == "reference")

    @pytest.mark.parametrize("autocast", [False, True])
    def test_compiles_where_auto_finds_a_kernel(self, autocast, calls, monkeypatch):
        torch._dynamo.reset()
        asked = []
        monkeypatch.setattr(swap, "kernel", lambda *args: (asked.append(args[2]), ("triton", ""))[1])
        compiled = torch.compile(swinops.patch(build(depths=(2,), num_heads=(2,))), fullgraph=True, backend="eager")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            compiled(image())
        assert set(asked) == {torch.float32, torch.bfloat16 if autocast else torch.float32}
        assert len(calls) == 2

    def test_patched_after_compile(self, calls):
        torch._dynamo.reset()
        model = build()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            expected = compiled(image())
            assert close(swinops.patch(compiled, "reference")(image()), expected)
            assert len(calls) == 4
            assert close(swinops.unpatch(compiled)(image()), expected)
            assert len(calls) == 4

    def test_four_image_sizes_make_three_graphs(self, calls):
        torch._dynamo.reset()
        model = build(strict_img_size=False, depths=(2, 1))
        sizes = [(24, 40), (32, 28), (44, 36), (56, 60)]
        with torch.no_grad():
            expected = [model(image(size=size)) for size in sizes]
            swinops.patch(model, "reference")
            counter = torch._dynamo.testing.CompileCounter()
            compiled = torch.compile(model, fullgraph=True, backend=counter)
            for n, (size, y) in enumerate(zip(sizes, expected, strict=True), start=1):
                assert close(compiled(image(size=size)), y)
                assert len(calls) == 3 * n
        assert counter.frame_count <= 3

    def test_the_patch_embedding_still_checks(self):
        torch._dynamo.reset()
        model = swinops.patch(build(strict_img_size=False), "reference")
        with pytest.raises(AssertionError, match=r"Input height \(15\) should be divisible by patch size \(2\)"):
            model(image(size=(15, 10)))
        with pytest.raises(Exception, match="should be divisible by patch size"):  # dynamo wraps it in its own
            torch.compile(model, fullgraph=True, backend="eager")(image(size=(15, 10)))
        with pytest.raises(AssertionError, match="Input height"):
            swinops.patch(build(), "reference")(image(size=(16, 10)))

    def test_activation_checkpointing(self, calls):
        model = build()
        expected = gradients(model, image())
        swinops.patch(model, "reference").set_grad_checkpointing()
        assert all(map(close, gradients(model, image()), expected))
        assert len(calls) > 4  # again in backward

    def test_functional_call(self):
        model = build()
        parameters = {name: p + 0.1 for name, p in model.named_parameters()}
        expected = torch.func.functional_call(model, parameters, image())
        assert close(torch.func.functional_call(swinops.patch(model, "reference"), parameters, image()), expected)

    def test_double_backward_raises(self):
        model = swinops.patch(build(), "reference")
        x = image().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            dx.sum().backward()


class TestFeatures:
    def test_features_only(self, calls):
        options = {"img_size": (56, 40), "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
        model = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, out_indices=(0, 1), **options)
        randomise(model).eval()
        x = image(size=(56, 40))
        expected = model(x)
        assert all(map(close, swinops.patch(model, "reference")(x), expected))
        assert len(calls) == 4

    def test_forward_intermediates(self, calls):
        model = build()
        out, features = model.forward_intermediates(image())
        swinops.patch(model, "reference")
        actual, actual_features = model.forward_intermediates(image())
        assert close(actual, out) and all(map(close, actual_features, features))
        assert len(calls) == 4

    def test_autocast(self, calls):
        model = build()
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(image())
            actual = swinops.patch(model, "reference")(image())
        assert actual.dtype == expected.dtype == torch.bfloat16
        assert calls[0][0].dtype == torch.bfloat16
        assert calls[0][3].dtype == torch.float32  # the bias
        assert (actual - expected).abs().max() <= 0.03 * expected.abs().max()


class TestOwnForward:
    """Where the op cannot stand for the library's code, that runs: the same bits, and a warning per reason."""

    def runs_timm(self, model, reason, calls, backend="reference", number=0):
        x = image()
        torch.manual_seed(0)
        expected = model(x)
        swinops.patch(model, backend)
        with pytest.warns(UserWarning, match=reason) as caught:
            torch.manual_seed(0)
            assert torch.equal(model(x), expected)
            torch.manual_seed(0)
            assert torch.equal(model(x), expected)
        assert len(caught) == 1  # not one per block, nor per call
        assert len(calls) == 2 * number

    def test_no_kernel(self, calls):
        self.runs_timm(build(), r'model is on cpu, and backend="auto" runs kernels on CUDA only', calls, "auto")

    def test_every_reason_is_given(self, calls, monkeypatch):
        monkeypatch.setattr(swap, "kernel", lambda *args: ("", "cuda: too old; triton: too new"))
        self.runs_timm(build(), "cuda: too old; triton: too new", calls, "auto")

    def test_auto_runs_the_op_where_a_kernel_can(self, calls, monkeypatch):
        asked = []
        monkeypatch.setattr(swap, "kernel", lambda *args: (asked.append(args), ("triton", ""))[1])
        model = build(head_dim=10)
        expected = model(image())
        assert close(swinops.patch(model)(image()), expected)
        assert len(calls) == 4
        with torch.autocast("cpu", torch.bfloat16):
            model(image())
        cpu = torch.device("cpu")
        assert set(asked) == {
            ("window_attention", cpu, torch.float32, 10),
            ("window_attention", cpu, torch.bfloat16, 10),
            ("relative_position_bias", cpu, torch.float32, 2),
            ("relative_position_bias", cpu, torch.float32, 4),
        }

    def test_attention_dropout_in_training(self, calls):
        model = build(attn_drop_rate=0.2).train()
        self.runs_timm(model, "attention dropout in training", calls)
        model.eval()(image())
        assert len(calls) == 4

    @pytest.mark.parametrize("path", ["attn", "attn.softmax", "attn.attn_drop"])
    @pytest.mark.parametrize(
        "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
    )
    def test_hooks_on_what_is_bypassed(self, path, register, calls):
        model = build()
        seen = []
        hook = getattr(block(model).get_submodule(path), f"register_{register}")(lambda *args: seen.append(args))
        self.runs_timm(model, f"{path} has hooks", calls, number=3)
        model(image()).sum().backward()
        assert seen
        hook.remove()
        calls.clear()
        model(image())
        assert len(calls) == 4

    def test_hook_while_compiled(self, calls):
        torch._dynamo.reset()
        model = swinops.patch(build(), "reference")
        block(model).attn.register_forward_hook(lambda module, args, out: out * 2)
        with pytest.warns(UserWarning, match="attn has hooks"):
            torch.compile(model, fullgraph=True, backend="eager")(image())
        assert len(calls) == 3

    def test_attn_replaced_after_the_patch(self, calls):
        model = swinops.patch(build(), "reference")
        attn = block(model).attn
        changes = {
            "attn is a Identity": (block(model), "attn", Identity()),
            "the forward of attn was replaced": (attn, "forward", lambda x, mask=None: x),
            "attn.softmax is a Sigmoid": (attn, "softmax", nn.Sigmoid()),
            "attn.attn_drop is a ReLU": (attn, "attn_drop", nn.ReLU()),
        }
        for reason, (module, name, value) in changes.items():
            before = getattr(module, name)
            setattr(module, name, value)
            calls.clear()
            with pytest.warns(UserWarning, match=reason):
                model(image())
            assert len(calls) == 3
            setattr(module, name, before) if name != "forward" else delattr(module, name)

    def test_parametrized_attn(self, calls):
        model = build()
        torch.nn.utils.parametrize.register_parametrization(
            block(model).attn, "relative_position_bias_table", nn.Tanh()
        )
        with pytest.warns(UserWarning, match="left 1 of 5"):
            swinops.patch(model, "reference")
        model(image())
        assert len(calls) == 3


class Identity(nn.Module):
    def forward(self, x, mask=None):
        return x


class TestQkv:
    """The projection is called, whatever it is, and asked what it makes of the pads."""

    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base
            self.a, self.b = nn.Linear(base.in_features, 3), nn.Linear(3, base.out_features)

        @property
        def bias(self):
            return self.base_layer.bias

        def forward(self, x):
            return self.base_layer(x) + self.b(self.a(x))

    def wrapped(self):
        model = build()
        for stage in model.layers:
            for b in stage.blocks:
                b.attn.qkv = self.Lora(b.attn.qkv)
        return randomise(model)

    def test_lora_with_a_bias(self, calls):
        model = self.wrapped()
        expected = gradients(model, image())
        assert all(map(close, gradients(swinops.patch(model, "reference"), image()), expected))
        assert len(calls) == 4

    def test_traced(self):
        model = self.wrapped()
        expected = model(image())
        swinops.patch(model, "reference")
        assert close(torch.jit.script(model)(image()), expected)
        assert close(torch.fx.symbolic_trace(model)(image()), expected)

    def test_hooks_on_the_projection_run(self, calls):
        model = build()
        for stage in model.layers:
            for b in stage.blocks:
                b.attn.qkv.register_forward_hook(lambda module, args, out: out.sin() + 1)
        expected = model(image())
        assert close(swinops.patch(model, "reference")(image()), expected)
        assert len(calls) == 4

    def test_no_extra_call_where_nothing_pads(self):
        model = swinops.patch(build(img_size=16, depths=(2,), num_heads=(2,)), "reference")
        seen = []
        block(model).attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        model(image(size=(16, 16)))
        assert seen == [(2, 8, 8, 72)]


class TestLeft:
    """What ``patch`` leaves alone, and says so."""

    def left(self, model, reason):
        b, cls, expected = block(model), type(block(model)), model(image())
        row = next(row for row in swinops.explain(model) if row.path == "layers.0.blocks.1")
        assert row.action == "leave" and reason in row.reason
        with pytest.warns(UserWarning, match="left 1 of 5 modules as they were"):
            swinops.patch(model, "reference")
        assert block(model) is b and type(b) is cls
        assert close(model(image()), expected)

    @pytest.mark.parametrize("name", ["forward", "_attn", "get_attn_mask"])
    def test_subclass_that_overrides(self, name):
        model = build()
        method = getattr(swin.SwinTransformerBlock, name)
        block(model).__class__ = type("Mine", (swin.SwinTransformerBlock,), {name: lambda *args: method(*args)})
        self.left(model, f"its class overrides {name}")

    def test_subclass_that_overrides_nothing_is_replaced(self, calls):
        model = build()
        block(model).__class__ = mine = type("Mine", (swin.SwinTransformerBlock,), {})
        swinops.patch(model, "reference")(image())
        assert len(calls) == 4
        assert isinstance(block(model), mine)
        assert type(block(swinops.unpatch(model))) is mine

    def test_forward_on_the_instance(self):
        model = build()
        block(model).forward = types.MethodType(swin.SwinTransformerBlock.forward, block(model))
        self.left(model, "its forward was replaced on the instance")

    def test_another_mask(self):
        model = build()
        block(model).attn_mask[0, 0, 0] = -1
        self.left(model, "its attn_mask is not timm's")

    def test_no_mask(self):
        model = build()
        block(model).attn_mask = None
        self.left(model, "it shifts without a mask")

    def test_method_replaced_in_the_library(self, monkeypatch):
        attn = swin.SwinTransformerBlock._attn
        monkeypatch.setattr(swin.SwinTransformerBlock, "_attn", lambda self, x: attn(self, x))
        assert {row.reason for row in swinops.explain(build())} == {
            "_attn of SwinTransformerBlock was replaced in the library"
        }

    def test_a_class_of_the_same_name(self):
        """Microsoft's file has the name of timm's, and other code."""
        cls = type("SwinTransformerBlock", (nn.Module,), {"__module__": "models.swin_transformer"})
        with pytest.warns(UserWarning, match="nothing to replace"):
            swinops.patch(cls())


def test_vendored_copy(monkeypatch, tmp_path, calls):
    """A copy of timm's file in somebody's repository, recognised by module suffix, name and attributes."""
    source = Path(swin.__file__).read_text().partition("\ndef checkpoint_filter_fn")[0]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/swin_transformer.py").write_text(source.replace("from .", "from timm.models."))
    monkeypatch.syspath_prepend(tmp_path)
    model = build(importlib.import_module("theirs.swin_transformer"))
    assert type(block(model)).__module__ == "theirs.swin_transformer"
    expected = model(image())
    assert close(swinops.patch(model, "reference")(image()), expected)
    assert len(calls) == 4
    assert torch.equal(pickle.loads(pickle.dumps(model))(image()), model(image()))


class TestArguments:
    def test_not_a_module(self):
        for f in (swinops.patch, swinops.unpatch, swinops.explain):
            with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
                f(build)

    def test_unknown_backend(self):
        model = build()
        with pytest.raises(
            ValueError, match="backend must be 'auto' or one of 'cuda', 'triton', 'reference', got 'gpu'"
        ):
            swinops.patch(model, "gpu")
        assert type(block(model)) is swin.SwinTransformerBlock

    @pytest.mark.parametrize("model", [nn.Linear(2, 2), timm.layers.PatchEmbed(8, 2)])
    def test_nothing_to_replace(self, model):
        with pytest.warns(UserWarning, match=r"nothing to replace in (Linear|PatchEmbed):\npath +class"):
            assert swinops.patch(model) is model
        assert not swinops.explain(model)

    def test_a_backend_that_cannot_run_raises(self, device):
        model = swinops.patch(build().double().to(device), "triton")
        with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run .*float64"):
            model(image().double().to(device))

    def test_explain_touches_nothing(self):
        model = build()
        before = [(type(module), dict(vars(module))) for module in model.modules()]
        table = swinops.explain(model, "reference")
        assert [(type(module), vars(module)) for module in model.modules()] == before
        assert [(row.path, row.class_name, row.library, row.action, row.reason) for row in table[:2]] == [
            ("patch_embed", "PatchEmbed", "timm", "replace", ""),
            ("layers.0.blocks.0", "SwinTransformerBlock", "timm", "replace", ""),
        ]
        assert str(table).splitlines()[1].split() == ["patch_embed", "PatchEmbed", "timm", "replace"]
        assert "own forward for now: the model is on cpu" in swinops.explain(model)[1].reason
        assert {row.action for row in swinops.explain(swinops.patch(model))} == {"replaced"}


class TestCheck:
    def test_rejects_what_is_no_tensor(self):
        with pytest.raises(TypeError, match="x must be a tensor, got str"):
            swinops.check(build(), "photo.jpg")

    def test_reports_rounding(self):
        model = build()
        report = swinops.check(model, image())
        assert report.ok
        assert [(row.dtype, row.quantity) for row in report.rows] == [
            (dtype, quantity)
            for dtype in (torch.float64, torch.float32)
            for quantity in ("outputs", "input gradient", "parameter gradients")
        ]
        assert all(row.patched < 1e-12 for row in report.rows[:3])
        assert report.ran[1].startswith("float32: 4 modules ran the reference, because the model is on cpu")
        assert "ok" in str(report) and "WRONG" not in str(report)

    def test_leaves_the_model_as_it_was(self):
        model = swinops.patch(build(drop_path_rate=0.3)).train()
        swinops.patch(model, "reference")(image()).sum().backward()
        x, random = image(), torch.random.get_rng_state()
        before = [(type(m), dict(vars(m)), m.training) for m in model.modules()]
        tensors = [x.clone() for p in model.parameters() for x in (p, p.grad)]
        assert swinops.check(model, x, "reference").ok
        assert [(type(m), vars(m), m.training) for m in model.modules()] == before
        assert all(map(torch.equal, tensors, [x for p in model.parameters() for x in (p, p.grad)]))
        assert torch.equal(torch.random.get_rng_state(), random)
        assert x.grad is None and not x.requires_grad and torch.equal(x, image())

    def test_finds_the_other_padding_order(self, monkeypatch):
        import swinops.reference

        attention = swinops.reference.window_attention
        monkeypatch.setattr(
            swinops.reference, "window_attention", lambda *args: attention(*args[:8], "pad_roll", *args[9:])
        )
        report = swinops.check(build(depths=(2,), num_heads=(2,)), image())
        assert not report.ok and "WRONG" in str(report)

    def test_finds_nan_and_a_wrong_gradient(self, monkeypatch):
        import swinops.reference

        backward = swinops.reference.relative_position_bias_backward
        for change in (torch.neg, lambda x: x / 0):
            monkeypatch.setattr(
                swinops.reference, "relative_position_bias_backward", lambda *args, f=change: f(backward(*args))
            )
            rows = swinops.check(build(depths=(2,), num_heads=(2,)), image()).rows
            assert [row.ok for row in rows] == [True, True, False] * 2
            assert rows[2].tensor.endswith("relative_position_bias_table")

    def test_half_precision_and_lists_of_outputs(self):
        class Features(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = build()

            def forward(self, x):
                out, features = self.model.forward_intermediates(x)
                return {"out": out, "features": features}

        report = swinops.check(Features().bfloat16(), image(), "reference")
        assert report.ok, report
        assert report.ran == ["float64: 4 modules ran reference", "bfloat16: 4 modules ran reference"]


def test_no_warning_where_nothing_is_left():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swinops.patch(build(), "reference")(image())
