"""What people put around, into and on top of a model: the same numbers patched, or the reason why not."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import swinops
from swinops.dropin import swap
from swinops.testing import random_tensor

from .dropin_case import Case, close, gradients, same
from .test_dropin_libraries import CASES
from .timm_swins import FAMILIES, build, image

TIMM, TIMM_V2 = (
    Case(
        name=f"timm-{name}",
        library="timm",
        build=partial(build, FAMILIES[name], depths=(2,), num_heads=(2,)),
        image=image,
        sizes=((14, 10),),
        replaced={f"layers.0.blocks.{i}": FAMILIES[name].block for i in (0, 1)},
        op=FAMILIES[name].attention,
    )
    for name in ("v1", "v2")
)
EVERY = {case.name: case for case in [TIMM, TIMM_V2, *CASES.values()]}
ONE_EACH = {case.library: case.name for case in reversed(EVERY.values())}.values()  # the first of each library
OF_EACH_OP = {(case.library, case.op): case.name for case in reversed(EVERY.values())}.values()


@pytest.fixture(params=ONE_EACH)
def case(request):
    return EVERY[request.param]


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """Of this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def linears(case, model):
    """The names of the linear layers in what patch replaces."""
    return [
        f"{path}.{name}"
        for path in case.replaced
        for name, module in model.get_submodule(path).named_modules()
        if type(module) is nn.Linear and module.in_features > 2  # not the network of a position bias
    ]


class TestIntoTheModel:
    """Layers that are not what they were: they are called, or read as the library reads them."""

    @pytest.mark.parametrize("before", [False, True], ids=["patched last", "patched first"])
    def test_lora(self, case, before, calls):
        peft = pytest.importorskip("peft")
        model, x = case.model(), case.x()
        targets = linears(case, model)
        twins = [copy.deepcopy(model), model]
        for patched, twin in enumerate(twins):
            if patched and before:
                swinops.patch(twin, "reference")
            peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=targets), twin)
            for seed, (name, p) in enumerate(twin.named_parameters()):
                if "lora_" in name:
                    p.data.copy_(random_tensor(p.shape, seed) / 4)
            if patched and not before:
                swinops.patch(twin, "reference")
        expected, actual = (gradients_by_name(twin, x) for twin in twins)
        assert list(actual) == list(expected)
        adapted = any("lora_B" in name and g is not None and g.any() for name, g in actual.items())
        assert adapted == case.called  # torchvision itself reads the weight, and has no adapter
        same(actual.values(), expected.values())
        assert calls[case.op] == len(case.replaced)

    @pytest.mark.filterwarnings("ignore")
    # timm's V2 itself hands weight and bias to the linear function by name, which torchao does not take
    @pytest.mark.parametrize("case", [name for name in OF_EACH_OP if name != "timm-v2"], indirect=True)
    def test_quantised(self, case, calls):
        quantization = pytest.importorskip("torchao.quantization")
        model, x = case.model(), case.x()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        with torch.no_grad():
            expected = model(x)
            assert close(swinops.patch(model, "reference")(x), expected)
        assert calls[case.op] == len(case.replaced)

    def test_shared_parameters_and_modules(self, case, calls):
        model, x = case.model(), case.x()
        first, *_, last = case.replaced
        shared = linears(case, model)[0].removeprefix(first)
        if last + shared in linears(case, model):
            a, b = model.get_submodule(first + shared), model.get_submodule(last + shared)
            if a.weight.shape == b.weight.shape:
                b.weight = a.weight
        twice = Twice(model)
        expected = gradients(twice, x)
        swinops.patch(twice, "reference")
        same(gradients(twice, x), expected)
        assert calls[case.op] == 2 * len(case.replaced)


class Twice(nn.Module):
    """A model under two names."""

    def __init__(self, model):
        super().__init__()
        self.one, self.other = model, model

    def forward(self, x):
        return self.one(x) + self.other(x.flip(0))


def gradients_by_name(model, x):
    named = {name: p.requires_grad_() for name, p in model.named_parameters()}
    return dict(
        zip(named, torch.autograd.grad(model(x).square().sum(), named.values(), allow_unused=True), strict=True)
    )


class TestAroundTheModel:
    @pytest.mark.parametrize("before", [False, True], ids=["patched last", "patched first"])
    def test_ddp(self, case, before, process_group, calls):
        model, x = case.model(), case.x()
        expected = gradients(model, x)
        if before:
            swinops.patch(model, "reference")
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        if not before:
            assert swinops.patch(wrapped, "reference") is wrapped
        wrapped(x).square().sum().backward()
        same([p.grad for p in model.parameters()], expected)
        assert calls[case.op] == len(case.replaced)

    @pytest.mark.parametrize("before", [False, True], ids=["patched last", "patched first"])
    def test_fsdp2(self, case, before, process_group, calls):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model, x = case.model(), case.x()
        expected = gradients(model, x)
        mesh = init_device_mesh("cpu", (1,))
        if before:
            swinops.patch(model, "reference")
        for path in case.replaced:
            fully_shard(model.get_submodule(path), mesh=mesh)
        fully_shard(model, mesh=mesh)
        if not before:
            swinops.patch(model, "reference")
        model(x).square().sum().backward()
        same([None if p.grad is None else p.grad.full_tensor() for p in model.parameters()], expected)
        assert calls[case.op] == len(case.replaced)
        classes = [type(module) for module in model.modules()]
        if before:  # its classes lie on top of ours
            with pytest.raises(RuntimeError, match="got the class FSDP"):
                swinops.unpatch(model)
            assert [type(module) for module in model.modules()] == classes
        else:
            swinops.unpatch(model)
            assert all(type(model.get_submodule(path)).__name__.startswith("FSDP") for path in case.replaced)
            model.zero_grad()
            model(x).square().sum().backward()
            same([None if p.grad is None else p.grad.full_tensor() for p in model.parameters()], expected)

    @pytest.mark.parametrize("before", [False, True], ids=["patched last", "patched first"])
    def test_fsdp2_of_what_is_bypassed(self, before, process_group, calls):
        """Its parameters are gathered by hooks of a module that the op does not call."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model, x = TIMM.model(), TIMM.x()
        expected = model(x)
        if before:
            swinops.patch(model, "reference")
        fully_shard(model.layers[0].blocks[1].attn, mesh=init_device_mesh("cpu", (1,)))
        with pytest.warns(UserWarning, match="attn is a FSDPWindowAttention, not timm's WindowAttention"):
            if not before:
                swinops.patch(model, "reference")
            out = model(x)
        assert close(out, expected)
        assert calls["window_attention"] == 1

    def test_compiled(self, case, calls):
        torch._dynamo.reset()
        model, x = case.model(), case.x()
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            assert close(compiled(x), expected)
            assert close(swinops.patch(compiled, "reference")(x), expected)
            assert calls[case.op] == len(case.replaced)
            assert close(swinops.unpatch(compiled)(x), expected)
        assert calls[case.op] == len(case.replaced)

    def test_average_of_weights(self, case, calls):
        model, x = case.model(), case.x()
        plain = torch.optim.swa_utils.AveragedModel(model)
        swinops.patch(model, "reference")
        average = torch.optim.swa_utils.AveragedModel(model)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
            for twin in (plain, average):
                twin.update_parameters(model)  # the first copies
                twin.update_parameters(model)
            assert close(average(x), plain(x))
        assert calls[case.op] == len(case.replaced)
        assert not any(isinstance(module, swap.Swapped) for module in swinops.unpatch(average).modules())

    def test_another_forward_in_place_of_ours(self, case, calls):
        """Of accelerate, kernelize and the like, which bind one on the instance: it runs, and unpatch keeps it."""
        model, x = swinops.patch(case.model(), "reference"), case.x()
        expected, module = model(x), case.module(model)
        forward, seen = module.forward, []
        module.forward = lambda *args, **kwargs: (seen.append(1), forward(*args, **kwargs))[1]
        assert torch.equal(model(x), expected) and seen
        assert "forward" in vars(module)
        swinops.unpatch(model)
        assert "forward" in vars(module)

    def test_a_library_of_patches_twice(self, case, calls):
        """Patched twice is patched once, and one unpatch undoes it."""
        model, x = case.model(), case.x()
        classes = [type(module) for module in model.modules()]
        swinops.patch(swinops.patch(model, "reference"), "reference")
        model(x)
        assert calls[case.op] == len(case.replaced)
        assert [type(module) for module in swinops.unpatch(model).modules()] == classes
