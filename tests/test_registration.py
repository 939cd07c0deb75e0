"""What torch asks of an operator beyond its numbers, for every op: one row of ``OPS`` each."""

import io

import pytest
import torch
from torch import nn

from swinops import (
    add_layer_norm,
    continuous_position_bias,
    cosine_attention,
    cosine_attention_qkvpacked,
    layer_norm,
    layer_norm_add,
    patch_merging_norm,
    relative_position_bias,
    window_attention,
    window_attention_qkvpacked,
    window_merge,
    window_partition,
)
from swinops.testing import random_tensor

# modules whose forward TorchScript and fx understand: the op itself, for public functions check shapes in Python


class Partition(nn.Module):
    def __init__(self, backend: str, device: torch.device):
        super().__init__()
        self.backend = backend

    def forward(self, x):
        return torch.ops.swinops.window_partition(x, [2, 3], [1, 1], self.backend)

    def public(self, x):
        return window_partition(x, (2, 3), 1, backend=self.backend)


class Merge(Partition):
    """Windows on their grid, so that the image's size can be told from their shape. [B, H / 2, W / 3, 2, 3, C]"""

    def forward(self, x):
        return torch.ops.swinops.window_merge(x.flatten(0, 2), [2 * x.size(1), 3 * x.size(2)], [1, 1], self.backend)

    def public(self, x):
        return window_merge(x.flatten(0, 2), (2 * x.shape[1], 3 * x.shape[2]), 1, backend=self.backend)


class Attention(nn.Module):
    def __init__(self, backend: str, device: torch.device):
        super().__init__()
        self.backend = backend
        self.bias = nn.Parameter(random_tensor((2, 6, 6), 1, device=device))
        self.pad_kv = nn.Parameter(random_tensor((2, 2, 5), 2, device=device))

    def forward(self, x):
        q, k, v = x.unbind(3)
        return torch.ops.swinops.window_attention(
            q, k, v, self.bias, self.pad_kv, [2, 3], [1, 1], None, "roll_pad", -100.0, self.backend
        )[0]

    def settings(self):
        return dict(window_size=(2, 3), shift_size=1, pad_kv=self.pad_kv, pad_order="roll_pad", backend=self.backend)

    def public(self, x):
        return window_attention(*x.unbind(3), self.bias, **self.settings())


class PackedAttention(Attention):
    def forward(self, x):
        return torch.ops.swinops.window_attention_qkvpacked(
            x, self.bias, self.pad_kv, [2, 3], [1, 1], None, "roll_pad", -100.0, self.backend
        )[0]

    def public(self, x):
        return window_attention_qkvpacked(x, self.bias, **self.settings())


class CosineAttention(Attention):
    def __init__(self, backend: str, device: torch.device):
        super().__init__(backend, device)
        learned = [self.bias, self.pad_kv]
        del self.bias, self.pad_kv  # so that logit_scale comes first, as in the op
        self.logit_scale = nn.Parameter(random_tensor((2, 1, 1), 3, device=device) / 2)
        self.bias, self.pad_kv = learned

    def forward(self, x):
        q, k, v = x.unbind(3)
        return torch.ops.swinops.cosine_attention(
            q, k, v, self.logit_scale, self.bias, self.pad_kv, [2, 3], [1, 1], "roll_pad", -100.0, self.backend
        )[0]

    def public(self, x):
        return cosine_attention(*x.unbind(3), self.logit_scale, self.bias, **self.settings())


class PackedCosineAttention(CosineAttention):
    def forward(self, x):
        return torch.ops.swinops.cosine_attention_qkvpacked(
            x, self.logit_scale, self.bias, self.pad_kv, [2, 3], [1, 1], "roll_pad", -100.0, self.backend
        )[0]

    def public(self, x):
        return cosine_attention_qkvpacked(x, self.logit_scale, self.bias, **self.settings())


class PositionBias(Partition):
    def forward(self, x):
        return torch.ops.swinops.relative_position_bias(x, [2, 3], self.backend)

    def public(self, x):
        return relative_position_bias(x, (2, 3), backend=self.backend)


class ContinuousPositionBias(nn.Module):
    """The last weights are the input, for their heads can be any number."""

    def __init__(self, backend: str, device: torch.device):
        super().__init__()
        self.backend = backend
        self.w1 = nn.Parameter(random_tensor((5, 2), 1, device=device))
        self.b1 = nn.Parameter(random_tensor((5,), 2, device=device))

    def forward(self, x):
        return torch.ops.swinops.continuous_position_bias(self.w1, self.b1, x, [2, 3], [4, 4], True, self.backend)[0]

    def public(self, x):
        return continuous_position_bias(self.w1, self.b1, x, (2, 3), 4, backend=self.backend)


class LayerNorm(nn.Module):
    channels = 5

    def __init__(self, backend: str, device: torch.device):
        super().__init__()
        self.backend = backend
        self.weight = nn.Parameter(random_tensor((self.channels,), 1, device=device))
        self.bias = nn.Parameter(random_tensor((self.channels,), 2, device=device))

    def forward(self, x):
        return torch.ops.swinops.layer_norm(x, self.weight, self.bias, 1e-5, None, self.backend)[0]

    def public(self, x):
        return layer_norm(x, self.weight, self.bias, backend=self.backend)


class AddLayerNorm(LayerNorm):
    """Both outputs in one, and a sample_scale and an f that are made from x."""

    def forward(self, x):
        s, y, _, _ = torch.ops.swinops.add_layer_norm(
            x, x.sin(), x.detach().mean([1, 2, 3]), self.weight, self.bias, 1e-5, None, self.backend
        )
        return s * y

    def public(self, x):
        scale = x.detach().mean([1, 2, 3])
        s, y = add_layer_norm(x, x.sin(), self.weight, self.bias, sample_scale=scale, backend=self.backend)
        return s * y


class LayerNormAdd(LayerNorm):
    def forward(self, x):
        return torch.ops.swinops.layer_norm_add(
            x, x.sin(), x.detach().mean([1, 2, 3]), self.weight, self.bias, 1e-5, self.backend
        )[0]

    def public(self, x):
        scale = x.detach().mean([1, 2, 3])
        return layer_norm_add(x, x.sin(), self.weight, self.bias, sample_scale=scale, backend=self.backend)


class PatchMergingNorm(LayerNorm):
    channels = 20

    def forward(self, x):
        return torch.ops.swinops.patch_merging_norm(x, self.weight, self.bias, 1e-5, None, self.backend)[0]

    def public(self, x):
        return patch_merging_norm(x, self.weight, self.bias, backend=self.backend)


def image(height, width, batch, device):
    return random_tensor((batch, height, width, 5), 0, device=device)


def grid(height, width, batch, device):
    return random_tensor((batch, height // 2, width // 3, 2, 3, 5), 0, device=device)


def packed(height, width, batch, device):
    # sizes that the window does not divide, so that there are pads
    return random_tensor((batch, height - 1, width + 1, 3, 2, 5), 0, device=device)


def table(height, width, batch, device):
    return random_tensor((15, height + batch), 0, device=device)


def weights(height, width, batch, device):
    return random_tensor((height + batch, 5), 0, device=device)


# op -> module, input of a size and batch, axis that batch or heads lie on
OPS = {
    "window_partition": (Partition, image, 0),
    "window_merge": (Merge, grid, 0),
    "window_attention": (Attention, packed, 0),
    "window_attention_qkvpacked": (PackedAttention, packed, 0),
    "cosine_attention": (CosineAttention, packed, 0),
    "cosine_attention_qkvpacked": (PackedCosineAttention, packed, 0),
    "relative_position_bias": (PositionBias, table, 1),
    "continuous_position_bias": (ContinuousPositionBias, weights, 0),
    "layer_norm": (LayerNorm, image, 0),
    "add_layer_norm": (AddLayerNorm, image, 0),
    "layer_norm_add": (LayerNormAdd, image, 0),
    "patch_merging_norm": (PatchMergingNorm, image, 0),
}
ATTENTIONS = [op for op in OPS if "attention" in op]
NORMS = ["layer_norm", "add_layer_norm", "layer_norm_add", "patch_merging_norm"]
SIZES = [(4, 9), (6, 12), (8, 6), (10, 15)]
every_op = pytest.mark.parametrize("op", OPS)


def make(op, backend, device, size=SIZES[0], batch=1):
    module, inputs, _ = OPS[op]
    return module(backend, device), inputs(*size, batch, device)


def results(f, module, x):
    """Output of ``f``, and gradients of ``x`` and of the module's parameters."""
    x = x.detach().requires_grad_()
    out = f(x)
    weight = random_tensor(out.shape, 7, out.dtype, out.device)
    return [out, *torch.autograd.grad(out, [x, *module.parameters()], weight)]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@every_op
def test_registration(op, backend, device):
    module, x = make(op, backend, device)
    f = x.half().sin().requires_grad_()
    scale = torch.full((len(x),), 0.5, device=device)
    calls = {
        "window_partition": lambda x: (x, [2, 3], [1, 1], backend),
        "window_merge": lambda x: (x.flatten(0, 2), [4, 9], [1, 1], backend),
        "relative_position_bias": lambda x: (x, [2, 3], backend),
        "continuous_position_bias": lambda x: (*parameters, x, [2, 3], [4, 4], True, backend),
        "window_attention": lambda x: (*x.unbind(3), *parameters, [2, 3], [1, 1], None, "roll_pad", -100.0, backend),
        "window_attention_qkvpacked": lambda x: (x, *parameters, [2, 3], [1, 1], 0.3, "pad_roll", -100.0, backend),
        "cosine_attention": lambda x: (*x.unbind(3), *parameters, [2, 3], [1, 1], "roll_pad", -100.0, backend),
        "cosine_attention_qkvpacked": lambda x: (x, *parameters, [2, 3], [1, 1], "pad_roll", -100.0, backend),
        "layer_norm": lambda x: (x, *parameters, 1e-5, torch.bfloat16, backend),
        "add_layer_norm": lambda x: (x, f, scale, *parameters, 1e-5, torch.bfloat16, backend),
        "layer_norm_add": lambda x: (x, f, scale, *parameters, 1e-5, backend),
        "patch_merging_norm": lambda x: (x, *parameters, 1e-5, None, backend),
    }
    parameters = [p.detach().requires_grad_() for p in module.parameters()] or [None, None]
    torch.library.opcheck(getattr(torch.ops.swinops, op), calls[op](x.requires_grad_()))


@pytest.mark.parametrize("grads", [True, False], ids=str)
@pytest.mark.parametrize("op", [*ATTENTIONS, "relative_position_bias"])
def test_registration_of_backward(op, grads, backend, device):
    """The backward is an op too. Its own gradient is checked by test_second_order, where it is not an error."""
    module, x = make(op, backend, device)
    checks = ("test_schema", "test_faketensor")
    if op == "relative_position_bias":
        dbias = module(x)
        torch.library.opcheck(
            torch.ops.swinops.relative_position_bias_backward, (dbias, [2, 3], backend), test_utils=checks
        )
        return
    learned, scale = [p.detach() for p in module.parameters()], () if "cosine" in op else (None,)
    settings = (*learned, [2, 3], [1, 1], *scale, "roll_pad", -100.0, backend)
    inputs = (x,) if op.endswith("packed") else x.unbind(3)
    out, lse = getattr(torch.ops.swinops, op)(*inputs, *settings)
    backward = getattr(torch.ops.swinops, f"{op}_backward")
    torch.library.opcheck(
        backward, (torch.ones_like(out), out, lse, [grads] * len(learned), *inputs, *settings), test_utils=checks
    )


@pytest.mark.parametrize("op", ["continuous_position_bias"])
def test_registration_of_the_backward_of_a_network(op, backend, device):
    module, x = make(op, backend, device)
    arguments = *(p.detach() for p in module.parameters()), x, [2, 3], [4, 4], True, backend
    bias, table = getattr(torch.ops.swinops, op)(*arguments)
    backward = getattr(torch.ops.swinops, f"{op}_backward")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward, (bias.transpose(1, 2), table, *arguments), test_utils=checks)


@pytest.mark.parametrize("grads", [(True, True), (False, True), (True, False), (False, False)], ids=str)
@pytest.mark.parametrize("op", NORMS)
def test_registration_of_the_backward_of_norms(op, grads, backend, device):
    module, x = make(op, backend, device)
    parameters = [p.detach() for p in module.parameters()]
    f, scale = x.half().sin(), torch.full((len(x),), 0.5, device=device)
    rows = {"add_layer_norm": (x, f, None), "layer_norm_add": (x, f, scale)}.get(op, (x,))
    settings = (1e-5, backend) if op == "layer_norm_add" else (1e-5, None, backend)
    *outputs, mean, rstd = getattr(torch.ops.swinops, op)(*rows, *parameters, *settings)
    saved = (mean, rstd, *parameters, *grads, backend)
    dout = torch.ones_like(outputs[-1])
    # with a gradient of s and without, with a df of its own and without
    calls = {
        "layer_norm": [(dout, x)],
        "patch_merging_norm": [(dout, x)],
        "add_layer_norm": [
            (None, dout, outputs[0], None, torch.float32, torch.float32),
            (dout, dout, outputs[0], scale, torch.float32, torch.float16),
        ],
        "layer_norm_add": [(dout, f, scale)],
    }
    for call in calls[op]:
        backward = getattr(torch.ops.swinops, f"{op}_backward")
        torch.library.opcheck(backward, (*call, *saved), test_utils=("test_schema", "test_faketensor"))


@every_op
@pytest.mark.parametrize("public", [False, True], ids=["op", "function"])
def test_compiles_without_graph_break(public, op, backend, device):
    """Forward and backward. Four sizes that differ in both axes make at most two graphs: one static, one dynamic."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module, _ = make(op, backend, device)
    f = module.public if public else module
    compiled = torch.compile(f, backend=counter, fullgraph=True)
    for size in SIZES:
        _, x = make(op, backend, device, size)
        compiled_results = results(compiled, module, x)
    assert_equal(compiled_results, results(f, module, x))
    assert counter.frame_count <= 2


@every_op
def test_script(op, backend, device):
    module, x = make(op, backend, device)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for size in SIZES[:2]:
        _, x = make(op, backend, device, size)
        assert_equal(results(loaded, loaded, x), results(module, module, x))


@every_op
def test_fx(op, backend, device):
    module, _ = make(op, backend, device)
    traced = torch.fx.symbolic_trace(module)
    assert any(op in str(node.target) for node in traced.graph.nodes)
    for size in SIZES[:2]:
        _, x = make(op, backend, device, size)
        assert_equal(results(traced, traced, x), results(module, module, x))


@every_op
def test_export_dynamic_batch(op, backend, device):
    """Exported at one batch size, saved, loaded and run at others."""
    module, x = make(op, backend, device, batch=2)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(module, (x,), dynamic_shapes=({OPS[op][2]: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (1, 2, 3):
        _, x = make(op, backend, device, batch=n)
        assert torch.equal(loaded(x), module(x))


@every_op
def test_autocast(op, backend, device):
    """q, k and v are cast; bias and pad_kv are not, nor is any other tensor. Gradients have their tensor's dtype."""
    module, x = make(op, backend, device)
    with torch.autocast(device.type, torch.bfloat16):
        out, *grads = results(module, module, x)
    assert [g.dtype for g in grads] == [torch.float32] * len(grads)
    if "attention" not in op:
        assert_equal([out, *grads], results(module, module, x))
        return
    assert out.dtype == torch.bfloat16
    assert_equal([out, *grads], results(lambda x: module(x.bfloat16()), module, x))
    # a bias rounded to bfloat16 would show: 300 and 300.4 are the same there
    with torch.no_grad():
        module.bias.add_(300)
        with torch.autocast(device.type, torch.bfloat16):
            out = module(x)
        assert torch.equal(out, module(x.bfloat16()))
        module.bias.copy_(module.bias.bfloat16())
        assert not torch.equal(out, module(x.bfloat16()))


@pytest.mark.parametrize("op", ATTENTIONS)
def test_autocast_leaves_float64(op, device):
    module, x = make(op, "reference", device)
    with torch.autocast(device.type, torch.bfloat16):
        assert module(x.double()).dtype == torch.float64


@pytest.mark.parametrize("op", NORMS)
def test_autocast_of_norms(op, backend, device):
    """The norm of half precision is float32, as torch's on CUDA, unless a dtype is asked for; a sum keeps its own."""
    module, x = make(op, backend, device)
    x, settings = x.bfloat16(), [*module.parameters(), 1e-5]
    call = getattr(torch.ops.swinops, op)
    if op == "layer_norm_add":
        with torch.autocast(device.type, torch.bfloat16):
            out = call(x, x.sin(), None, *settings, backend)[0]
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, call(x, x.sin(), None, *settings, backend)[0])
        return
    rows = (x, x.sin(), None) if op == "add_layer_norm" else (x,)
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)):
        with torch.autocast(device.type, torch.bfloat16):
            *sums, y, _, _ = call(*rows, *settings, dtype, backend)
        assert y.dtype == expected and all(s.dtype == torch.bfloat16 for s in sums)
        assert torch.equal(y, call(*rows, *settings, expected, backend)[-3])
    with torch.autocast(device.type, torch.bfloat16):
        assert call(*(None if x is None else x.double() for x in rows), *settings, None, "reference")[-3].dtype == (
            torch.float64
        )


@every_op
def test_functional_call(op, backend, device):
    """The module with other parameters than its own, and their gradients."""
    module, x = make(op, backend, device)
    other = {name: (2 * p).detach().requires_grad_() for name, p in module.named_parameters()}
    out = torch.func.functional_call(module, other, (x,))
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    expected = module(x)
    assert torch.equal(out, expected)
    if other:
        grads = (
            torch.autograd.grad(y.sum(), p)
            for y, p in ((out, list(other.values())), (expected, list(module.parameters())))
        )
        assert_equal(*grads)


@every_op
def test_checkpoint(op, backend, device):
    """Activation checkpointing runs the op again in backward."""
    from torch.utils.checkpoint import checkpoint

    module, x = make(op, backend, device)
    assert_equal(results(lambda x: checkpoint(module, x, use_reentrant=False), module, x), results(module, module, x))


@every_op
def test_meta(op, device):
    """Shapes without data, as ``accelerate`` and FLOP counters ask for them."""
    module, x = make(op, "auto", device)
    meta = module.to("meta")(x.to("meta"))
    real = OPS[op][0]("reference", device)(x)
    assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())
