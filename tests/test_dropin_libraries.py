"""What ``patch`` promises, on each library's models: the library's numbers, and nothing but some classes changed."""

import contextlib
import copy
import importlib
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import swinops
from swinops.dropin import swap
from swinops.testing import random_tensor

from .dropin_case import close, gradients, same
from .timm_swins import assert_same, count_calls, results

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

CASES = {}
for path in sorted(Path(__file__).parent.glob("dropin_*.py")):
    if path.stem != "dropin_case":
        with contextlib.suppress(pytest.skip.Exception):  # the library is not installed
            module = importlib.import_module(f".{path.stem}", __package__)
            CASES |= {case.name: case for case in module.CASES}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def sizes(case):
    return [pytest.param(case, size, id=f"{case.name}-{'x'.join(map(str, size))}") for size in case.sizes]


class TestNumbers:
    @pytest.mark.parametrize(("case", "size"), [p for case in CASES.values() for p in sizes(case)])
    def test_reference(self, case, size, calls):
        model, x = case.model(size), case.x(2, size)
        for dtype in (torch.float64, torch.float32):
            model, x = model.to(dtype), x.to(dtype)
            with swinops.patched(model, "reference"):
                actual = results(model, x)
            assert_same(actual, model, x)
        assert calls[case.op] == 2 * len(case.replaced) == sum(calls.values())

    @pytest.mark.parametrize(("case", "size"), [p for case in CASES.values() for p in sizes(case)[:2]])
    def test_kernels(self, case, size, monkeypatch, device):
        import swinops.kernels

        counts = count_calls(monkeypatch, swinops.kernels, (case.op, f"{case.op}_backward"))
        model, x = case.model(size).to(device), case.x(1, size).to(device)
        with swinops.patched(model, "triton"):
            actual = results(model, x)
        assert set(counts.values()) == {len(case.replaced)}
        assert_same(actual, model, x)

    def test_check(self, case):
        report = swinops.check(case.model(), case.x(), "reference")
        assert report.ok, report
        assert f"{len(case.replaced)} modules ran reference" in report.ran[0]

    def test_these_tests_can_fail(self, case, monkeypatch):
        import swinops.reference

        attention = getattr(swinops.reference, case.op)
        model, x = case.model(), case.x()
        with torch.no_grad():
            expected = model(x)
            for change in ("pad_kv",) * case.pads + ("mask_value",) * case.shifts + ("bias",):
                monkeypatch.setattr(swinops.reference, case.op, lambda *args, n=change: attention(*spoiled(args, n)))
                with swinops.patched(model, "reference"):
                    actual = model(x)
                assert (actual - expected).abs().max() > 1e-4 * expected.abs().max(), change


def spoiled(args, name):
    """The arguments of an attention of the reference, with one of them wrong."""
    args, bias = list(args), 3 if isinstance(args[7], float) else 4  # after a logit_scale
    if name == "bias":
        args[bias] = args[bias].mT
    elif name == "pad_kv":
        args[bias + 1] = None if args[bias + 1] is not None else torch.ones(2, *args[0].shape[-2:])
    else:
        args[-1] = 0.0
    return args


class TestSwap:
    def test_explain(self, case):
        model = case.model()
        before = [(type(module), dict(vars(module))) for module in model.modules()]
        rows = {row.path: row for row in swinops.explain(model, "reference") if row.action == "replace"}
        assert [(type(module), vars(module)) for module in model.modules()] == before
        assert {path: row.class_name for path, row in rows.items() if row.path in case.replaced} == case.replaced
        assert all(rows[path].library == case.library and not rows[path].reason for path in case.replaced)
        assert "own forward for now: the model is on cpu" in str(swinops.explain(model))
        assert {row.action for row in swinops.explain(swinops.patch(model)) if row.path in rows} == {"replaced"}

    def test_state_dict(self, case):
        model = case.model()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        after = swinops.patch(model).state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        model.load_state_dict(before)

    def test_unpatch_restores_everything(self, case):
        model = case.model()
        modules = list(model.modules())
        before, expected = [(type(module), dict(vars(module))) for module in modules], model(case.x())
        assert swinops.patch(model, "reference") is model
        assert sum(isinstance(module, swap.Swapped) for module in modules) >= len(case.replaced)
        model(case.x())
        assert swinops.unpatch(model) is model
        assert [(type(module), vars(module)) for module in modules] == before
        assert torch.equal(model(case.x()), expected)

    def test_copies(self, case):
        model, x = swinops.patch(case.model(), "reference"), case.x()
        expected = model(x)
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert torch.equal(twin(x), expected)
            assert type(case.module(twin)) is type(case.module(model))

    def test_no_kernel(self, case, calls):
        """With "auto" on a CPU the library's own forward runs: the same bits, and one warning."""
        model, x = case.model(), case.x()
        expected = model(x)
        swinops.patch(model)
        with pytest.warns(UserWarning, match='backend="auto" runs kernels on CUDA only') as caught:
            assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
        assert len(caught) == 1 and not sum(calls.values())

    def test_another_size(self, case):
        """A patched model repeats its first answer after images of other sizes, where the library takes several."""
        if case.resize(case.sizes[0]):
            pytest.skip("the library's model is for one size")
        model = swinops.patch(case.model(), "reference")
        first = model(case.x())
        for size in case.sizes[1:]:
            model(case.x(2, size))
        assert torch.equal(model(case.x()), first)


def refused(case, what, f):
    """Where the library itself refuses, what it says; the patched model may do better."""
    if what not in case.unsupported:
        return False
    with pytest.raises(Exception, match=case.unsupported[what]):
        f(case.model())
    return True


class TestTracing:
    def test_script(self, case, calls):
        if refused(case, "script", torch.jit.script):
            return
        model, x = case.model(), case.x()
        expected = model(x)
        scripted = torch.jit.script(swinops.patch(model, "reference"))
        assert close(scripted(x), expected)
        assert calls[case.op] == len(case.replaced)
        torch.jit.save(scripted, buffer := io.BytesIO())
        buffer.seek(0)
        assert close(torch.jit.load(buffer)(x), expected)
        assert torch.equal(torch.jit.script(swinops.patch(model))(x), expected)

    def test_fx(self, case, calls):
        if refused(case, "fx", torch.fx.symbolic_trace):
            return
        model, x = case.model(), case.x()
        expected = model(x)
        assert close(torch.fx.symbolic_trace(swinops.patch(model, "reference"))(x), expected)
        assert calls[case.op] == len(case.replaced)

    def test_export_with_a_dynamic_batch(self, case, calls):
        def export(model):
            return torch.export.export(model, (case.x(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))

        model, x = case.model(), case.x(3)
        expected = model(x)
        exported = export(swinops.patch(model, "reference"))
        before = calls[case.op]
        assert close(exported.module()(x), expected)
        assert calls[case.op] - before == len(case.replaced)

    def test_compiles_without_a_graph_break(self, case, calls):
        torch._dynamo.reset()
        model, x = case.model(), case.x()
        expected = gradients(model, x)
        compiled = torch.compile(swinops.patch(model, "reference"), fullgraph=True, backend="aot_eager")
        same(gradients(compiled, x), expected)
        assert calls[case.op]

    def test_activation_checkpointing(self, case, calls):
        if case.checkpointing is None:
            pytest.skip("the library has no switch for it")
        model, x = case.model(), case.x()
        expected = gradients(model, x)
        swinops.patch(model, "reference").train()
        case.checkpointing(model)
        same(gradients(model, x), expected)
        assert calls[case.op] > len(case.replaced)  # again in backward


class TestState:
    def test_functional_call(self, case):
        model, x = case.model(), case.x()
        parameters = {name: p + 0.1 for name, p in model.named_parameters()}
        expected = torch.func.functional_call(model, parameters, x)
        swinops.patch(model, "reference")
        assert close(torch.func.functional_call(model, parameters, x), expected)

    def test_double_backward_raises(self, case):
        model, x = swinops.patch(case.model(), "reference"), case.x().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            dx.sum().backward()

    def test_forward_mode(self, case, calls):
        """The library's own forward has the derivative that the op would take for zero."""
        model, x = case.model(), case.x()
        with sdpa_kernel(SDPBackend.MATH):  # others have no such derivative
            expected = torch.func.jvp(model, (x,), (torch.ones_like(x),))
            swinops.patch(model, "reference")
            with pytest.warns(UserWarning, match=r"torch\.func and forward-mode derivatives"):
                actual = torch.func.jvp(model, (x,), (torch.ones_like(x),))
            assert all(map(torch.equal, actual, expected)) and not calls[case.op]
            dx = torch.func.grad(lambda x: model(x).sum())(x)
            assert close(dx, torch.autograd.grad(model(x.requires_grad_()).sum(), x)[0])

    def test_inference_mode(self, case, calls):
        model, x = case.model(), case.x()
        with torch.inference_mode():
            expected = model(x)
            assert close(swinops.patch(model, "reference")(x), expected)
        assert calls[case.op] == len(case.replaced)

    def test_autocast(self, case, calls):
        model, x = case.model(), case.x()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = model(x)
            actual = swinops.patch(model, "reference")(x)
        assert actual.dtype == expected.dtype
        assert calls[case.op] == len(case.replaced)
        assert (actual - expected).abs().max() <= 0.05 * expected.abs().max()


class TestOwnForward:
    """Where the op cannot stand for the library's code, that runs: the same bits, and a warning per reason."""

    def test_attention_dropout_in_training(self, case, calls):
        if not case.dropout:
            pytest.skip("the library has no attention dropout")
        model, x = case.model(**case.dropout).train(), case.x()
        torch.manual_seed(0)
        expected = model(x)
        swinops.patch(model, "reference")
        with pytest.warns(UserWarning, match="attention dropout in training"):
            torch.manual_seed(0)
            assert torch.equal(model(x), expected)
        assert not calls[case.op]
        model.eval()(x)
        assert calls[case.op] == len(case.replaced)

    def test_hooks_on_what_is_bypassed(self, case, calls):
        for path in case.bypassed:
            model, x, seen = case.model(), case.x(), []
            hook = case.module(model).get_submodule(path).register_forward_hook(lambda *args, seen=seen: seen.append(1))
            expected = model(x)
            swinops.patch(model, "reference")
            calls[case.op] = 0
            with pytest.warns(UserWarning, match=f"{path} has hooks"):
                assert close(model(x), expected)
            assert len(seen) == 2 and calls[case.op] == len(case.replaced) - 1
            hook.remove()
            model(x)
            assert calls[case.op] == 2 * len(case.replaced) - 1

    def test_forward_replaced_on_what_is_bypassed(self, case, calls):
        """As accelerate does to add its hooks."""
        for path in case.bypassed:
            model, x, seen = case.model(), case.x(), []
            module = case.module(model).get_submodule(path)
            forward = module.forward
            swinops.patch(model, "reference")
            module.forward = lambda *args, seen=seen, forward=forward, **kwargs: (
                seen.append(1),
                forward(*args, **kwargs),
            )[1]
            calls[case.op] = 0
            with pytest.warns(UserWarning, match=f"the forward of {path} was replaced"):
                model(x)
            assert len(seen) == 1 and calls[case.op] == len(case.replaced) - 1

    def test_hooks_on_all_modules(self, case, calls):
        model, x, seen = case.model(), case.x(), []
        swinops.patch(model, "reference")
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
        try:
            with pytest.warns(UserWarning, match="there are hooks on all modules"):
                model(x)
        finally:
            handle.remove()
        assert not calls[case.op] and case.module(model) in seen
        model(x)
        assert calls[case.op] == len(case.replaced)

    def test_projected_once(self, case, calls):
        """Pads take a token of zeros, which goes with the others: a projection may count its calls."""
        model, x, seen = case.model(), case.x(), []
        for path in case.replaced:
            projection = model.get_submodule(path).get_submodule(case.projection)
            projection.register_forward_hook(lambda module, args, out: seen.append(1))
        model(x)
        before = len(seen)
        swinops.patch(model, "reference")(x)
        assert len(seen) == 2 * before and calls[case.op] == len(case.replaced)

    def test_hooks_on_a_projection_run(self, case, calls):
        """As in the library: not those of a projection that is not called."""
        model, x = case.model(), case.x()
        plain = model(x)
        for path in case.replaced:
            projection = model.get_submodule(path).get_submodule(case.projection)
            projection.register_forward_hook(lambda module, args, out: out.sin() + 1)
        expected = model(x)
        assert close(expected, plain) != case.called
        assert close(swinops.patch(model, "reference")(x), expected)
        assert calls[case.op] == len(case.replaced)

    def test_lora_on_a_projection(self, case, calls):
        """A module in the projection's place, with the attributes of the one it holds."""

        class Lora(nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base_layer = base
                self.a = nn.Linear(base.weight.shape[1], 3)
                self.b = nn.Linear(3, base.weight.shape[0])

            weight = property(lambda self: self.base_layer.weight)
            bias = property(lambda self: self.base_layer.bias)

            def forward(self, x):
                image = x.dim() == 4 and self.base_layer.weight.dim() == 4  # a 1 x 1 convolution
                delta = self.b(self.a(x.movedim(1, -1) if image else x))
                return self.base_layer(x) + (delta.movedim(-1, 1) if image else delta)

        model, x = case.model(), case.x()
        parent, name = case.projection.rpartition(".")[::2]
        for seed, path in enumerate(case.replaced):
            holder = model.get_submodule(path).get_submodule(parent)
            wrapped = Lora(getattr(holder, name))
            for n, p in enumerate([*wrapped.a.parameters(), *wrapped.b.parameters()]):
                p.data.copy_(random_tensor(p.shape, 100 * seed + n) / 4)
            setattr(holder, name, wrapped)
        expected = gradients(model, x)
        used = {name for (name, _), g in zip(model.named_parameters(), expected, strict=True) if g is not None}
        assert any(".a.weight" in name for name in used) == case.called
        swinops.patch(model, "reference")
        same(gradients(model, x), expected)
        assert calls[case.op] == len(case.replaced)


class TestLeft:
    """What ``patch`` leaves alone, and says so."""

    def left(self, case, model, reason):
        module, x = case.module(model), case.x()
        cls, expected = type(module), model(x)
        row = next(row for row in swinops.explain(model) if model.get_submodule(row.path) is module)
        assert row.action == "leave" and reason in row.reason
        with pytest.warns(UserWarning, match="as they were"):
            swinops.patch(model, "reference")
        assert type(module) is cls
        assert close(model(x), expected)

    def test_subclass_that_overrides(self, case):
        model = case.model()
        module = case.module(model)
        method = getattr(type(module), case.overrides)
        members = {case.overrides: lambda *args, **kwargs: method(*args, **kwargs)}
        module.__class__ = type("Mine", (type(module),), members)
        self.left(case, model, f"its class overrides {case.overrides}")

    def test_forward_on_the_instance(self, case):
        model = case.model()
        module = case.module(model)
        forward = module.forward
        module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
        self.left(case, model, "its forward was replaced on the instance")

    def test_method_replaced_in_the_library(self, case, monkeypatch):
        model = case.model()
        cls = type(case.module(model))
        method = getattr(cls, case.overrides)
        monkeypatch.setattr(cls, case.overrides, lambda *args, **kwargs: method(*args, **kwargs))
        rows = [row for row in swinops.explain(model) if row.class_name == cls.__name__]
        assert rows and all(f"{case.overrides} of {cls.__name__} was replaced in the library" in r.reason for r in rows)
