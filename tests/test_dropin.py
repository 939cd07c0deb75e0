"""What ``patch`` promises of any model, shown on timm's Swins: nothing but the class of some instances changes."""

import copy
import importlib
import io
import pickle
import re
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

from .dropin_case import close
from .timm_swins import FAMILIES, blocks, build, image, randomise

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
one_family = pytest.mark.parametrize("family", ["v1"], indirect=True)  # where the library's file makes no difference


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def block(model, n=1):
    return blocks(model)[n]


def block_class(family):
    return getattr(family.load(), family.block)


def gradients(model, x):
    # V2-CR's last bias is one that softmax takes out again: its gradient is nothing but rounding
    parameters = [p for name, p in model.named_parameters() if not name.endswith("meta_mlp.fc2.bias")]
    return torch.autograd.grad(model(x).square().sum(), parameters)


@pytest.fixture
def calls(monkeypatch):
    """Calls of the reference's attention: it runs wherever a test asks for backend "reference"."""
    import swinops.reference

    calls = []
    for name in ("window_attention", "cosine_attention"):
        attention = getattr(swinops.reference, name)
        monkeypatch.setattr(
            swinops.reference, name, lambda *args, attention=attention: (calls.append(args), attention(*args))[1]
        )
    return calls


class TestSwap:
    def test_state_dict(self, family):
        model = build(family)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        after = swinops.patch(model).state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert not model.load_state_dict({name: x + 1 for name, x in before.items()}).missing_keys
        assert all(torch.equal(model.state_dict()[name], before[name] + 1) for name in before)
        assert not build(family).load_state_dict(model.state_dict()).unexpected_keys

    def test_unpatch_restores_everything(self, family):
        model = build(family)
        modules = list(model.modules())
        before = [(type(module), dict(vars(module))) for module in modules]
        assert swinops.patch(model) is model
        assert [type(module) for module in modules] != [cls for cls, _ in before]
        assert swinops.unpatch(model) is model
        assert list(model.modules()) == modules
        assert [(type(module), vars(module)) for module in modules] == before

    def test_is_idempotent_and_takes_another_backend(self, family, calls):
        model = swinops.patch(build(family))
        classes = [type(module) for module in model.modules()]
        swinops.patch(model, "reference")
        assert [type(module) for module in model.modules()] == classes
        model(image())
        assert len(calls) == 4
        swinops.unpatch(model)
        assert type(block(model)) is block_class(family)

    def test_patched_restores_after_an_exception(self, family):
        model = build(family)
        with pytest.raises(ZeroDivisionError), swinops.patched(model, "reference") as same:
            assert same is model and type(block(model)) is not block_class(family)
            raise ZeroDivisionError
        assert type(block(model)) is block_class(family)
        assert "swinops_backend" not in vars(block(model))

    @one_family
    def test_patched_keeps_what_was_patched(self, family):
        model = swinops.patch(build(family), "reference")
        with swinops.patched(model):
            assert block(model).swinops_backend == "auto"
        assert block(model).swinops_backend == "reference"

    def test_instances_of_the_original_class(self, family):
        model = swinops.patch(build(family))
        assert isinstance(block(model), block_class(family))
        assert type(block(model)).__name__ == family.block  # device maps go by the name
        assert "swinops='auto'" in repr(model)

    @one_family
    def test_other_models_are_untouched(self, family):
        other = build(family)
        swinops.patch(build(family))
        assert type(block(other)) is type(block(build(family))) is block_class(family)

    @one_family
    @pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel, torch.compile])
    def test_finds_models_in_wrappers(self, family, wrap):
        model = build(family)
        swinops.patch(wrap(model))
        assert type(block(model)) is not block_class(family)

    @one_family
    def test_unpatch_refuses_a_class_swapped_again(self, family):
        model = swinops.patch(build(family))
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
    def test_deepcopy(self, family):
        model = swinops.patch(build(family), "reference")
        twin = copy.deepcopy(model)
        assert torch.equal(twin(image()), model(image()))
        twin.head.fc.weight.data.zero_()
        assert model.head.fc.weight.any()
        assert type(block(swinops.unpatch(twin))) is block_class(family)

    def test_pickle(self, family):
        model = swinops.patch(build(family), "reference")
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(image()), model(image()))
        assert type(block(twin)) is type(block(model))

    def test_save_and_load_in_another_process(self, tmp_path):
        models = [swinops.patch(build(family), "reference") for family in FAMILIES.values()]
        torch.save([(model, image(), model(image())) for model in models], tmp_path / "models.pt")
        code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import conftest
for model, x, y in torch.load(sys.argv[2], weights_only=False):
    assert torch.allclose(model(x), y, atol=1e-4) and "swinops='reference'" in repr(model)
"""
        arguments = [str(Path(__file__).parent), str(tmp_path / "models.pt")]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True)

    def test_torch_save(self, family):
        model = swinops.patch(build(family), "reference")
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(image()), model(image()))


class TestTracing:
    def test_script(self, family, calls):
        model = build(family)
        expected = model(image())
        scripted = torch.jit.script(swinops.patch(model, "reference"))
        assert close(scripted(image()), expected)
        assert len(calls) == 4
        torch.jit.save(scripted, buffer := io.BytesIO())
        buffer.seek(0)
        assert close(torch.jit.load(buffer)(image()), expected)

    @pytest.mark.parametrize(
        ("family", "options"),
        [("v1", {}), ("v1", {"attn_drop_rate": 0.1}), ("v2", {}), ("v2_cr", {})],
        indirect=["family"],
    )
    def test_script_of_auto_runs_timm_where_no_kernel_can(self, family, options, calls):
        model = build(family, **options)
        expected = model(image())
        assert torch.equal(torch.jit.script(swinops.patch(model))(image()), expected)
        assert not calls

    @pytest.mark.filterwarnings("ignore:swinops")
    def test_fx(self, family, calls):
        model = build(family)
        expected = model(image())
        traced = torch.fx.symbolic_trace(swinops.patch(model, "reference"))
        assert close(traced(image()), expected)
        assert len(calls) == 4
        assert torch.equal(torch.fx.symbolic_trace(swinops.patch(model, "auto"))(image()), expected)

    def test_export_with_a_dynamic_batch(self, family, calls):
        model = build(family, depths=(1, 1))
        expected = model(image(3))
        batch = torch.export.Dim("batch")
        exported = torch.export.export(swinops.patch(model, "reference"), (image(2),), dynamic_shapes=({0: batch},))
        calls.clear()
        assert close(exported.module()(image(3)), expected)
        assert len(calls) == 2

    @pytest.mark.filterwarnings("ignore:swinops")
    @pytest.mark.parametrize(
        ("family", "backend"),
        [("v1", "auto"), ("v1", "reference"), ("v2", "reference"), ("v2_cr", "reference")],
        indirect=["family"],
    )
    def test_compiles_without_a_graph_break(self, family, backend, calls):
        torch._dynamo.reset()
        model = build(family, depths=(1,), num_heads=(2,))
        expected = gradients(model, image())
        compiled = torch.compile(swinops.patch(model, backend), fullgraph=True, backend="aot_eager")
        assert all(map(close, gradients(compiled, image()), expected))
        assert bool(calls) == (backend == "reference")

    @pytest.mark.parametrize(
        ("family", "autocast"), [("v1", False), ("v1", True), ("v2", True), ("v2_cr", True)], indirect=["family"]
    )
    def test_compiles_where_auto_finds_a_kernel(self, family, autocast, calls, monkeypatch):
        torch._dynamo.reset()
        asked = []
        monkeypatch.setattr(swap, "kernel", lambda *args: (asked.append(args[2]), ("triton", ""))[1])
        model = swinops.patch(build(family, depths=(1,), num_heads=(2,)))
        asked.clear()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            compiled(image())
        network = set() if family.name == "v2_cr" else {torch.float32}  # the bias's is timm's own
        assert set(asked) == {torch.bfloat16 if autocast else torch.float32} | network
        assert len(calls) == 1

    @one_family
    def test_patched_after_compile(self, family, calls):
        torch._dynamo.reset()
        model = build(family)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            expected = compiled(image())
            assert close(swinops.patch(compiled, "reference")(image()), expected)
            assert len(calls) == 4
            assert close(swinops.unpatch(compiled)(image()), expected)
            assert len(calls) == 4

    def test_four_image_sizes_make_three_graphs(self, family, calls):
        torch._dynamo.reset()
        stages = {"depths": (1, 1)} if family.name == "v1" else {"depths": (1,), "num_heads": (2,)}
        model = build(family, strict_img_size=False, **stages)
        sizes = [(24, 40), (32, 28), (44, 36), (56, 60)]
        with torch.no_grad():
            expected = [model(image(size=size)) for size in sizes]
            swinops.patch(model, "reference")
            counter = torch._dynamo.testing.CompileCounter()
            compiled = torch.compile(model, fullgraph=True, backend=counter)
            for n, (size, y) in enumerate(zip(sizes, expected, strict=True), start=1):
                assert close(compiled(image(size=size)), y)
                assert len(calls) == len(blocks(model)) * n
        assert counter.frame_count <= 3

    @pytest.mark.parametrize("family", ["v1", "v2"], indirect=True)
    def test_the_patch_embedding_still_checks(self, family):
        torch._dynamo.reset()
        model = swinops.patch(build(family, strict_img_size=False), "reference")
        with pytest.raises(AssertionError, match=r"Input height \(15\) should be divisible by patch size \(2\)"):
            model(image(size=(15, 10)))
        with pytest.raises(Exception, match="should be divisible by patch size"):  # dynamo wraps it in its own
            torch.compile(model, fullgraph=True, backend="eager")(image(size=(15, 10)))
        with pytest.raises(AssertionError, match="Input height"):
            swinops.patch(build(family), "reference")(image(size=(16, 10)))

    def test_activation_checkpointing(self, family, calls):
        model = build(family)
        expected = gradients(model, image())
        swinops.patch(model, "reference").set_grad_checkpointing()
        assert all(map(close, gradients(model, image()), expected))
        assert len(calls) > 4  # again in backward

    def test_functional_call(self, family):
        model = build(family)
        parameters = {name: p + 0.1 for name, p in model.named_parameters()}
        expected = torch.func.functional_call(model, parameters, image())
        assert close(torch.func.functional_call(swinops.patch(model, "reference"), parameters, image()), expected)

    def test_double_backward_raises(self, family):
        model = swinops.patch(build(family), "reference")
        x = image().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            dx.sum().backward()


class TestFeatures:
    def test_features_only(self, family, calls):
        options = {"img_size": (56, 40), "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
        model = timm.create_model(family.example, features_only=True, out_indices=(0, 1), **options)
        randomise(model).eval()
        x = image(size=(56, 40))
        expected = model(x)
        assert all(map(close, swinops.patch(model, "reference")(x), expected))
        assert len(calls) == 4

    def test_forward_intermediates(self, family, calls):
        model = build(family)
        out, features = model.forward_intermediates(image())
        swinops.patch(model, "reference")
        actual, actual_features = model.forward_intermediates(image())
        assert close(actual, out) and all(map(close, actual_features, features))
        assert len(calls) == 4

    def test_autocast(self, family, calls):
        model = build(family)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(image())
            actual = swinops.patch(model, "reference")(image())
        assert actual.dtype == expected.dtype == torch.bfloat16
        assert calls[0][0].dtype == torch.bfloat16
        parameters = calls[0][3:5] if family.attention == "cosine_attention" else calls[0][3:4]
        own = family.name == "v2_cr"  # timm's own network made the bias, in the dtype of autocast
        assert parameters[-1].dtype == (torch.bfloat16 if own else torch.float32)  # the bias
        assert parameters[0].dtype == torch.float32 or len(parameters) == 1  # logit_scale
        assert (actual - expected).abs().max() <= 0.03 * expected.abs().max()


class TestOwnForward:
    """Where the op cannot stand for the library's code, that runs: the same bits, and a warning per reason."""

    def runs_timm(self, model, reason, calls, backend="reference", number=0):
        x = image()
        torch.manual_seed(0)
        expected = model(x)
        swinops.patch(model, backend)
        same = close if number else torch.equal  # the op runs in ``number`` of the four blocks
        with pytest.warns(UserWarning, match=reason) as caught:
            torch.manual_seed(0)
            assert same(model(x), expected)
            torch.manual_seed(0)
            assert same(model(x), expected)
        assert len(caught) == 1  # not one per block, nor per call
        assert len(calls) == 2 * number

    def test_no_kernel(self, family, calls):
        self.runs_timm(build(family), r'model is on cpu, and backend="auto" runs kernels on CUDA only', calls, "auto")

    def test_every_reason_is_given(self, family, calls, monkeypatch):
        monkeypatch.setattr(swap, "kernel", lambda *args: ("", "cuda: too old; triton: too new"))
        self.runs_timm(build(family), "cuda: too old; triton: too new", calls, "auto")

    def test_auto_runs_the_op_where_a_kernel_can(self, family, calls, monkeypatch):
        asked = []
        monkeypatch.setattr(swap, "kernel", lambda *args: (asked.append(args), ("triton", ""))[1])
        model = build(family, embed_dim=20)
        expected = model(image())
        assert close(swinops.patch(model)(image()), expected)
        assert len(calls) == 4
        with torch.autocast("cpu", torch.bfloat16):
            model(image())
        cpu = torch.device("cpu")
        bias = {
            "v1": {("relative_position_bias", cpu, torch.float32, heads) for heads in (2, 4)},
            "v2": {("continuous_position_bias", cpu, torch.float32, 2)},
            "v2_cr": set(),
        }
        dtypes = (torch.float32, torch.bfloat16)
        assert set(asked) == {(family.attention, cpu, dtype, 10) for dtype in dtypes} | bias[family.name]

    def test_attention_dropout_in_training(self, family, calls):
        model = build(family, attn_drop_rate=0.2).train()
        self.runs_timm(model, "attention dropout in training", calls)
        model.eval()(image())
        assert len(calls) == 4

    @pytest.mark.parametrize(
        ("family", "path"),
        [
            (name, path)
            for name in FAMILIES
            for path in ("attn", "attn.softmax", "attn.attn_drop")
            if (name, path) != ("v2_cr", "attn.softmax")
        ],
        indirect=["family"],
    )
    @pytest.mark.parametrize(
        "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
    )
    def test_hooks_on_what_is_bypassed(self, family, path, register, calls):
        model = build(family)
        seen = []
        hook = getattr(block(model).get_submodule(path), f"register_{register}")(lambda *args: seen.append(args))
        self.runs_timm(model, f"{path} has hooks", calls, number=3)
        model(image()).sum().backward()
        assert seen
        hook.remove()
        calls.clear()
        model(image())
        assert len(calls) == 4

    @one_family
    def test_hook_while_compiled(self, family, calls):
        torch._dynamo.reset()
        model = swinops.patch(build(family), "reference")
        block(model).attn.register_forward_hook(lambda module, args, out: out * 2)
        with pytest.warns(UserWarning, match="attn has hooks"):
            torch.compile(model, fullgraph=True, backend="eager")(image())
        assert len(calls) == 3

    def test_attn_replaced_after_the_patch(self, family, calls):
        model = swinops.patch(build(family), "reference")
        attn = block(model).attn
        changes = {
            f"attn is a Identity, not timm's {family.attn}": (block(model), "attn", Identity()),
            "the forward of attn was replaced": (attn, "forward", lambda x, mask=None: x),
            "attn.attn_drop is a ReLU": (attn, "attn_drop", nn.ReLU()),
        }
        if hasattr(attn, "softmax"):
            changes["attn.softmax is a Sigmoid"] = attn, "softmax", nn.Sigmoid()
        for reason, (module, name, value) in changes.items():
            before = getattr(module, name)
            setattr(module, name, value)
            calls.clear()
            with pytest.warns(UserWarning, match=reason):
                model(image())
            assert len(calls) == 3
            setattr(module, name, before) if name != "forward" else delattr(module, name)

    def test_parametrized_attn(self, family, calls):
        model = build(family)
        name = "relative_position_bias_table" if family.name == "v1" else "logit_scale"
        torch.nn.utils.parametrize.register_parametrization(block(model).attn, name, nn.Tanh())
        with pytest.warns(UserWarning, match=f"left 1 of {family.rows}"):
            swinops.patch(model, "reference")
        model(image())
        assert len(calls) == 3


class Identity(nn.Module):
    def forward(self, x, mask=None):
        return x


class TestQkv:
    """The projection is called, whatever it is, and asked what it makes of the pads.

    timm's Swin V2 calls it where there is no ``q_bias``; where there is one, it reads ``qkv.weight``.
    """

    def build(self, family, **options):
        return build(family, **({"qkv_bias": False} if family.name == "v2" else {}), **options)

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

    def wrapped(self, family):
        model = self.build(family)
        for b in blocks(model):
            b.attn.qkv = self.Lora(b.attn.qkv)
        return randomise(model)

    def test_lora_with_a_bias(self, family, calls):
        model = self.wrapped(family)
        expected = gradients(model, image())
        assert all(map(close, gradients(swinops.patch(model, "reference"), image()), expected))
        assert len(calls) == 4

    def test_traced(self, family):
        model = self.wrapped(family)
        expected = model(image())
        swinops.patch(model, "reference")
        assert close(torch.jit.script(model)(image()), expected)
        assert close(torch.fx.symbolic_trace(model)(image()), expected)

    def test_hooks_on_the_projection_run(self, family, calls):
        model = self.build(family)
        for b in blocks(model):
            b.attn.qkv.register_forward_hook(lambda module, args, out: out.sin() + 1)
        expected = model(image())
        assert close(swinops.patch(model, "reference")(image()), expected)
        assert len(calls) == 4

    def test_no_extra_call_where_nothing_pads(self, family):
        model = swinops.patch(self.build(family, img_size=16, depths=(2,), num_heads=(2,)), "reference")
        seen = []
        block(model).attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        model(image(size=(16, 16)))
        assert seen == [(2, 8, 8, 72)]


class TestLeft:
    """What ``patch`` leaves alone, and says so."""

    def left(self, family, model, reason):
        b, cls, expected = block(model), type(block(model)), model(image())
        row = next(row for row in swinops.explain(model) if row.path == f"{family.stages}.0.blocks.1")
        assert row.action == "leave" and reason in row.reason
        with pytest.warns(UserWarning, match=f"left 1 of {family.rows} modules as they were"):
            swinops.patch(model, "reference")
        assert block(model) is b and type(b) is cls
        assert close(model(image()), expected)

    @pytest.mark.parametrize("name", ["forward", "seam", "get_attn_mask"])
    def test_subclass_that_overrides(self, family, name):
        model, name = build(family), family.seam if name == "seam" else name
        method = getattr(block_class(family), name)
        block(model).__class__ = type("Mine", (block_class(family),), {name: lambda *args: method(*args)})
        self.left(family, model, f"its class overrides {name}")

    def test_subclass_that_overrides_nothing_is_replaced(self, family, calls):
        model = build(family)
        block(model).__class__ = mine = type("Mine", (block_class(family),), {})
        swinops.patch(model, "reference")(image())
        assert len(calls) == 4
        assert isinstance(block(model), mine)
        assert type(block(swinops.unpatch(model))) is mine

    @one_family
    def test_forward_on_the_instance(self, family):
        model = build(family)
        block(model).forward = types.MethodType(block_class(family).forward, block(model))
        self.left(family, model, "its forward was replaced on the instance")

    def test_another_mask(self, family):
        model = build(family)
        block(model).attn_mask[0, 0, 0] = -1
        self.left(family, model, "its attn_mask is not timm's")

    def test_no_mask(self, family):
        model = build(family)
        block(model).attn_mask = None
        self.left(family, model, "it shifts without a mask")

    def test_method_replaced_in_the_library(self, family, monkeypatch):
        attn = getattr(block_class(family), family.seam)
        monkeypatch.setattr(block_class(family), family.seam, lambda self, x: attn(self, x))
        assert {row.reason for row in swinops.explain(build(family))} == {
            f"{family.seam} of {family.block} was replaced in the library"
        }

    def test_a_class_of_the_same_name(self):
        """Microsoft's file has the name of timm's, and other code."""
        cls = type("SwinTransformerBlock", (nn.Module,), {"__module__": "models.swin_transformer"})
        with pytest.warns(UserWarning, match="nothing to replace"):
            swinops.patch(cls())


@pytest.fixture
def vendored(monkeypatch, tmp_path):
    """A model of a copy of timm's file in somebody's repository, with one change."""

    def vendored(family, old="", new=""):
        source = Path(family.load().__file__).read_text().partition("\ndef checkpoint_filter_fn")[0]
        assert old in source
        theirs = f"theirs_of_{tmp_path.name}"  # modules stay imported from test to test
        (tmp_path / theirs).mkdir()
        path = tmp_path / theirs / f"{family.module}.py"
        path.write_text(source.replace(old, new).replace("from .", "from timm.models."))
        model = build(family, importlib.import_module(f"{theirs}.{family.module}"))
        assert type(block(model)).__module__ == f"{theirs}.{family.module}"
        return model

    monkeypatch.syspath_prepend(tmp_path)
    return vendored


def test_vendored_copy(family, vendored, calls):
    """It is recognised by module suffix, name, attributes, and what small blocks compute."""
    model = vendored(family)
    swinops.explain(model)
    calls.clear()
    expected = model(image())
    assert close(swinops.patch(model, "reference")(image()), expected)
    assert len(calls) == 4
    assert torch.equal(pickle.loads(pickle.dumps(model))(image()), model(image()))


def test_changed_copy(family, vendored):
    """Nothing but a number is changed."""
    old, new = {
        "v1": ("q = q * self.scale", "q = q * self.scale * 2"),
        "v2": ("16 * torch.sigmoid", "8 * torch.sigmoid"),
        "v2_cr": ("1. / 0.01", "1. / 0.02"),
    }[family.name]
    rows = swinops.explain(vendored(family, old, new))
    assert {row.action for row in rows} == {"leave"}
    assert {row.reason.partition(" than")[0] for row in rows} == {f"its {family.seam} computes something else"}


@one_family
@pytest.mark.parametrize("change", [lambda table: torch.cat([table, table[:1]]), lambda table: table[:, :1]])
def test_a_table_of_another_shape(family, change, calls):
    """timm broadcasts one that all heads share, and does not read a last row."""
    model = build(family)
    table = block(model).attn.relative_position_bias_table
    block(model).attn.relative_position_bias_table = nn.Parameter(change(table.detach()))
    expected = model(image())
    swinops.patch(model, "reference")
    with pytest.warns(UserWarning, match="its relative_position_bias_table is "):
        assert close(model(image()), expected)
    assert len(calls) == 3


@one_family
def test_copy_with_a_new_option(family, vendored):
    """What small blocks do not run is seen by its names."""
    model = vendored(family, "q = q * self.scale", "q = (q * self.scale).detach() if self.frozen else q * self.scale")
    for module in model.modules():
        module.frozen = False
    assert {row.reason for row in swinops.explain(model)} == {
        "its attn.forward uses detach, frozen, unlike that of timm's SwinTransformerBlock"
    }


class TestArguments:
    def test_not_a_module(self):
        for f in (swinops.patch, swinops.unpatch, swinops.explain):
            with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
                f(build)

    @one_family
    def test_unknown_backend(self, family):
        model = build(family)
        with pytest.raises(
            ValueError, match="backend must be 'auto' or one of 'cuda', 'triton', 'reference', got 'gpu'"
        ):
            swinops.patch(model, "gpu")
        assert type(block(model)) is block_class(family)

    @pytest.mark.parametrize("model", [nn.Linear(2, 2), timm.layers.PatchEmbed(8, 2)])
    def test_nothing_to_replace(self, model):
        with pytest.warns(UserWarning, match=r"nothing to replace in (Linear|PatchEmbed):\npath +class"):
            assert swinops.patch(model) is model
        assert not swinops.explain(model)

    def test_a_backend_that_cannot_run_raises(self, family, device):
        model = swinops.patch(build(family).double().to(device), "triton")
        assert re.match(r"raises: backend 'triton' cannot run .*float64", swinops.explain(model)[-1].reason)
        with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run .*float64"):
            model(image().double().to(device))

    def test_explain_touches_nothing(self, family):
        model = build(family)
        before = [(type(module), dict(vars(module))) for module in model.modules()]
        table = swinops.explain(model, "reference")
        assert [(type(module), vars(module)) for module in model.modules()] == before
        first = (f"{family.stages}.0.blocks.0", family.block, "timm", "replace", "")
        rows = [(row.path, row.class_name, row.library, row.action, row.reason) for row in table]
        assert len(rows) == family.rows and rows[-4] == first
        assert rows[:-4] == [("patch_embed", "PatchEmbed", "timm", "replace", "")] * (family.rows - 4)
        assert str(table).splitlines()[-4].split() == [*first[:-1]]
        assert "own forward for now: the model is on cpu" in swinops.explain(model)[-1].reason
        assert {row.action for row in swinops.explain(swinops.patch(model))} == {"replaced"}


class TestCheck:
    @one_family
    def test_rejects_what_is_no_tensor(self, family):
        with pytest.raises(TypeError, match="x must be a tensor, got str"):
            swinops.check(build(family), "photo.jpg")

    def test_reports_rounding(self, family):
        model = build(family)
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

    @one_family
    def test_compares_the_patched_model_itself(self, family):
        """A module that was changed after patch, in a way that patch would have refused."""
        model = swinops.patch(build(family), "reference")
        block(model).attn.relative_position_index = block(model).attn.relative_position_index.flip(0)
        assert not swinops.check(model, image(), "reference").ok
        assert swinops.check(swinops.unpatch(model), image(), "reference").ok

    def test_leaves_the_model_as_it_was(self, family):
        model = swinops.patch(build(family, drop_path_rate=0.3)).train()
        swinops.patch(model, "reference")(image()).sum().backward()
        x, random = image(), torch.random.get_rng_state()
        before = [(type(m), dict(vars(m)), m.training) for m in model.modules()]
        tensors = [x.clone() for p in model.parameters() for x in (p, p.grad)]
        assert swinops.check(model, x, "reference").ok
        assert [(type(m), vars(m), m.training) for m in model.modules()] == before
        assert all(map(torch.equal, tensors, [x for p in model.parameters() for x in (p, p.grad)]))
        assert torch.equal(torch.random.get_rng_state(), random)
        assert x.grad is None and not x.requires_grad and torch.equal(x, image())

    def test_finds_the_other_padding_order(self, family, monkeypatch):
        import swinops.reference

        attention = getattr(swinops.reference, family.attention)
        monkeypatch.setattr(
            swinops.reference, family.attention, lambda *args: attention(*args[:8], "pad_roll", *args[9:])
        )
        report = swinops.check(build(family, depths=(2,), num_heads=(2,)), image())
        assert not report.ok and "WRONG" in str(report)

    @one_family
    def test_finds_nan_and_a_wrong_gradient(self, family, monkeypatch):
        import swinops.reference

        backward = swinops.reference.relative_position_bias_backward
        for change in (torch.neg, lambda x: x / 0):
            monkeypatch.setattr(
                swinops.reference, "relative_position_bias_backward", lambda *args, f=change: f(backward(*args))
            )
            rows = swinops.check(build(family, depths=(2,), num_heads=(2,)), image()).rows
            assert [row.ok for row in rows] == [True, True, False] * 2
            assert rows[2].tensor.endswith("relative_position_bias_table")

    def test_half_precision_and_lists_of_outputs(self, family):
        class Features(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = build(family)

            def forward(self, x):
                out, features = self.model.forward_intermediates(x)
                return {"out": out, "features": features}

        model = Features()
        for name, p in model.named_parameters():
            if "logit_scale" in name:  # at a scale of 100, gradients in bfloat16 are little but rounding
                p.data.clamp_(max=1)
        report = swinops.check(model.bfloat16(), image(), "reference")
        assert report.ok, report
        assert report.ran == ["float64: 4 modules ran reference", "bfloat16: 4 modules ran reference"]


def test_no_warning_where_nothing_is_left(family):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swinops.patch(build(family), "reference")(image())
