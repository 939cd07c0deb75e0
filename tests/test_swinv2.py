"""Swin V2: its published models, its layers, the bias that is kept in evaluation, and the transfer to other windows.

What it has in common with V1 is in test_models.
"""

import copy
import io
import itertools
import math
import pickle
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from swinops import create_model, list_models
from swinops.benchmarks.models import randomise
from swinops.models.swinv2 import SwinTransformerV2
from swinops.nn import CosineWindowAttention, LayerNorm, LayerNormAdd, SwinV2Block
from swinops.testing import assert_accurate, random_tensor

from .test_models import SMALL, assert_same_in_float64, continuous_bias, image, plain_swin

T, S, B, L = 28_347_154, 49_728_418, 87_918_816, 196_739_932
FROM_12 = [12, 12, 12, 6]
# parameters without the extra norms, the windows of the stages, their pretrained windows, drop path
PUBLISHED = {
    "swinv2_tiny_window8_256": (T, [8, 8, 8, 8], [0] * 4, 0.2),
    "swinv2_tiny_window16_256": (T, [16, 16, 16, 8], [0] * 4, 0.2),
    "swinv2_small_window8_256": (S, [8, 8, 8, 8], [0] * 4, 0.3),
    "swinv2_small_window16_256": (S, [16, 16, 16, 8], [0] * 4, 0.3),
    "swinv2_base_window8_256": (B, [8, 8, 8, 8], [0] * 4, 0.5),
    "swinv2_base_window16_256": (B, [16, 16, 16, 8], [0] * 4, 0.5),
    "swinv2_base_window12_192": (B, [12, 12, 12, 6], [0] * 4, 0.2),
    "swinv2_base_window12to16_192to256": (B, [16, 16, 16, 8], FROM_12, 0.2),
    "swinv2_base_window12to24_192to384": (B, [24, 24, 24, 12], FROM_12, 0.2),
    "swinv2_large_window12_192": (L, [12, 12, 12, 6], [0] * 4, 0.2),
    "swinv2_large_window12to16_192to256": (L, [16, 16, 16, 8], FROM_12, 0.2),
    "swinv2_large_window12to24_192to384": (L, [24, 24, 24, 12], FROM_12, 0.2),
    "swinv2_huge_window12_192": (658_027_922, [12, 12, 12, 6], [0] * 4, 0.2),
    "swinv2_giant_window12_192": (3_001_912_008, [12, 12, 12, 6], [0] * 4, 0.3),
}


def small(**options) -> SwinTransformerV2:
    """Two stages in evaluation mode, every parameter random, and the first head's scale beyond the clamp."""
    model = randomise(SwinTransformerV2(**{**SMALL, **options})).eval()
    for attn in attentions(model):
        attn.logit_scale.data[0] = 5.0
    return model


def attentions(model: nn.Module) -> list[CosineWindowAttention]:
    return [block.attn for stage in model.layers for block in stage.blocks]


def windows(model: nn.Module) -> list[tuple[list[int], ...]]:
    return [(attn.window_size, attn.shift_size, attn.pretrained_window_size) for attn in attentions(model)]


def layer(**options) -> CosineWindowAttention:
    """In evaluation mode, with random parameters."""
    return randomise(CosineWindowAttention(16, 2, 4, 2, **options)).eval()


class Calls(TorchDispatchMode):
    """The arguments of this package's ops that are called within, by name."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "swinops":
            self.found.append((func.__name__.partition(".")[0], args))
        return func(*args, **(kwargs or {}))

    def of(self, name):
        return [args for found, args in self.found if found == name]


def test_names():
    assert list_models("swinv2_*") == sorted(PUBLISHED)
    timm = pytest.importorskip("timm")
    assert set(timm.list_models(module="swin_transformer_v2")) <= set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    parameters, window, pretrained, drop_path = PUBLISHED[name]
    with torch.device("meta"):
        model = create_model(name)
        size = int(re.findall(r"\d+", name)[-1])
        assert model(torch.empty(2, 3, size, size)).shape == (2, 1000)
    extra = [block.norm3 for stage in model.layers for block in stage.blocks if isinstance(block.norm3, LayerNorm)]
    total = sum(p.numel() for p in model.parameters())
    assert total - sum(p.numel() for norm in extra for p in norm.parameters()) == parameters
    assert not list(model.buffers())
    for stage, w, p in zip(model.layers, window, pretrained, strict=True):
        for index, block in enumerate(stage.blocks):
            attn, shift = block.attn, [w // 2 * (index % 2)] * 2
            assert (attn.window_size, attn.shift_size, attn.pretrained_window_size) == ([w, w], shift, [p, p])
    rates = [block.drop_path.rate for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([drop_path * i / (len(rates) - 1) for i in range(len(rates))])
    assert all(m.eps == 1e-5 for m in model.modules() if isinstance(m, nn.LayerNorm))


@pytest.mark.parametrize("name, norms, channels", [("huge", 3, 1408), ("giant", 7, 2048)])
def test_extra_norms(name, norms, channels):
    with torch.device("meta"):
        model = create_model(f"swinv2_{name}_window12_192")
    names = [f"layers.2.blocks.{6 * i + 5}.norm3.{p}" for i in range(norms) for p in ("weight", "bias")]
    extra = {key: p for key, p in model.named_parameters() if ".norm3." in key}
    assert list(extra) == names and all(p.shape == (channels,) for p in extra.values())


def test_state_dict_is_timms():
    swin = pytest.importorskip("timm.models.swin_transformer_v2")
    options = dict(img_size=32, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=5)
    theirs, ours = swin.SwinTransformerV2(**options, pretrained_window_sizes=(0, 0)), SwinTransformerV2(**options)
    ours.load_state_dict(randomise(theirs).state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_initialisation():
    torch.manual_seed(0)
    model = SwinTransformerV2(embed_dim=64, depths=(2, 2), num_heads=(2, 4), extra_norm_period=2)
    for name, p in model.named_parameters():
        if re.search(r"blocks\.\d\.norm[12]\.|bias$", name) and not name.startswith("patch_embed.proj"):
            assert not p.any(), name
        elif "norm" in name:
            assert torch.equal(p, torch.ones_like(p)), name
        elif "logit_scale" in name:
            assert torch.equal(p, torch.full_like(p, math.log(10)))
        elif p.dim() > 1 and not name.startswith("patch_embed"):
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name


def test_blocks_start_as_the_identity():
    block = SwinV2Block(16, 2, 4, 2, drop_path=0.5).train()
    x = random_tensor((3, 6, 9, 16), 0)
    assert torch.equal(block(x), x)
    model = SwinTransformerV2(**SMALL)
    tokens = model.embed(image(1, 3, 30, 20))
    assert torch.equal(model.layers[0](tokens), tokens)


@pytest.mark.parametrize(
    "options, size",
    [
        (dict(pretrained_window_sizes=(7, (3, 2))), (45, 37)),
        (dict(pretrained_window_sizes=((0, 5), 1), window_size=(4, 3)), (40, 64)),
        (dict(log_spaced=False), (36, 20)),
        (dict(extra_norm_period=1, depths=(3, 2)), (33, 50)),
        (dict(window_size=1), (12, 16)),
    ],
    ids=str,
)
def test_plain_definition(options, size):
    """Outputs and the gradient of every parameter, against the model written from the paper, in float64."""
    model, x = small(**options).double(), image(2, 3, *size).double()
    names, parameters = zip(*model.named_parameters(), strict=True)
    results = []
    for forward in (model, lambda x: plain_swin(model, x)):
        out = forward(x)
        grads = torch.autograd.grad(out, parameters, random_tensor(out.shape, 9).double(), materialize_grads=True)
        results.append([out.detach(), *grads])
    for name, actual, exact in zip(["out", *names], *results, strict=True):
        assert (actual - exact).abs().max() <= 1e-12 * max(exact.abs().max(), results[0][0].abs().max()), name


def test_every_parameter_has_a_gradient():
    """At a size that pads; the scale beyond the clamp alone has none."""
    model = small()
    model(image(2, 3, 45, 37)).square().sum().backward()
    for name, p in model.named_parameters():
        if name.endswith("logit_scale"):
            assert not p.grad[0] and p.grad[1:].all()
        else:
            assert p.grad.any(), name


def test_no_weight_decay():
    names = small(absolute_pos_embed=True).no_weight_decay()
    inner = ("logit_scale", "cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight")
    places = itertools.product((0, 1), (0, 1), inner)
    assert names == {"absolute_pos_embed", *(f"layers.{i}.blocks.{j}.attn.{name}" for i, j, name in places)}


def test_stochastic_depth():
    """Each sample is the sum of the branches that it kept, doubled."""
    block = randomise(SwinV2Block(16, 2, 4, 2, drop_path=0.5))
    x = random_tensor((16, 8, 8, 16), 0)
    torch.manual_seed(0)
    y = block.train()(x)
    kinds = set()
    for first, second in itertools.product((0.0, 2.0), (0.0, 2.0)):
        s = block.norm1(x, block.attn(x), torch.full((16,), first))
        whole = block.norm2(s, block.mlp(s), torch.full((16,), second))
        kinds.update((n, first, second) for n in range(16) if torch.allclose(y[n], whole[n], rtol=1e-4, atol=1e-4))
    assert sorted(n for n, *_ in kinds) == list(range(16))
    assert len({kind[1:] for kind in kinds}) == 4


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training):
    """The scale, the bias and the pads stay float32, and so does the stream; q, k and v are what was projected."""
    model, x = small(drop_path_rate=0.1).train(training), image(2, 3, 45, 37)
    stream = []
    for stage in model.layers:
        for module in (stage.downsample, *stage.blocks):
            module.register_forward_hook(lambda _, inputs, out: stream.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16), Calls() as calls:
        logits = model(x)
    found = calls.of("cosine_attention_qkvpacked")
    for attn, (qkv, scale, bias, pad_kv, *_) in zip(attentions(model), found, strict=True):
        assert qkv.dtype == torch.bfloat16
        assert scale.dtype == pad_kv.dtype == torch.float32
        assert torch.equal(bias, attn.position_bias())
    assert stream == [torch.float32] * 6 and logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_half_precision_of_a_padded_image():
    """A pad token's key is zero: timm divides zero by zero there, and nowhere else."""
    options = dict(embed_dim=32, depths=(2, 2), num_heads=(1, 2), window_size=8, num_classes=5)
    model = randomise(SwinTransformerV2(256, **options)).eval()
    x = image(1, 3, 240, 240)
    exact = copy.deepcopy(model).double()(x.double())
    half, wide = (copy.deepcopy(model).to(dtype)(x.to(dtype)).double() for dtype in (torch.float16, torch.bfloat16))
    # fewer digits are the only difference
    assert (half - exact).abs().max() < (wide - exact).abs().max() < 0.1 * exact.abs().max()
    model.half()(x.half()).float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())

    swin = pytest.importorskip("timm.models.swin_transformer_v2")
    for size, finite in ((240, False), (256, True)):
        theirs = randomise(swin.SwinTransformerV2(size, **options, pretrained_window_sizes=(0, 0))).eval().half()
        assert theirs(image(1, 3, size, size).half()).isfinite().all() == finite


# The bias that is kept in evaluation


def bias_calls(module: nn.Module, x: torch.Tensor, times: int = 2) -> int:
    with Calls() as calls:
        outputs = [module(x) for _ in range(times)]
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    return len(calls.of("continuous_position_bias"))


def test_bias_is_computed_once_in_evaluation():
    attn, x = layer(), random_tensor((1, 6, 9, 16), 0)
    with torch.no_grad():
        assert bias_calls(attn, x, 3) == 1
        assert bias_calls(attn, x) == 0
        assert bias_calls(attn.train(), x) == 2
        assert bias_calls(attn.eval(), x) == 1
    with torch.inference_mode():
        assert bias_calls(attn.eval(), x) == 1
    assert bias_calls(attn, x) == 2  # a gradient could flow
    attn.cpb_mlp.requires_grad_(False)
    assert bias_calls(attn.eval(), x) == 1
    with torch.no_grad():
        assert bias_calls(attn, x) == 0
    assert bias_calls(attn.train(), x) == 2
    assert attn.cached_bias is None


def test_every_layer_of_a_model_keeps_its_bias():
    model, x = small(), image(1, 3, 40, 32)
    with torch.no_grad():
        assert bias_calls(model, x) == 4
        assert bias_calls(model, image(2, 3, 50, 20)) == 0


def optimise(kind, **options):
    def step(attn):
        attn(random_tensor((1, 6, 9, 16), 0)).square().sum().backward()
        kind(attn.parameters(), lr=0.1, **options).step()

    return step


def replace(attn):
    attn.cpb_mlp[2].weight = nn.Parameter(attn.cpb_mlp[2].weight.detach() + 1)


def write_unseen(attn):
    attn.cpb_mlp[2].weight.data.copy_(attn.cpb_mlp[2].weight.data + 1)
    attn.eval()


def round_trip(attn):
    """Rounds the weights, and gives their memory back and takes it again."""
    attn.half().float()


def step_after_a_look(attn):
    """The bias is used between backward and the step, which no version counts."""
    optimizer = torch.optim.AdamW(attn.cpb_mlp.parameters(), lr=0.1, fused=True)
    attn.position_bias().square().sum().backward()
    with torch.no_grad():
        attn.position_bias()
    optimizer.step()


def in_place(attn):
    with torch.no_grad():
        attn.cpb_mlp[0].bias.add_(1)


def alias(attn):
    """Another parameter of the same memory, with as many changes counted."""
    old = attn.cpb_mlp[2].weight
    attn.cpb_mlp[2].weight = nn.Parameter(old.data)
    with torch.no_grad():
        while attn.cpb_mlp[2].weight._version < old._version:
            attn.cpb_mlp[2].weight.add_(1)


def reallocate(attn):
    """Other numbers, for which the allocator has most likely the memory that was just given back."""
    weight = attn.cpb_mlp[2].weight
    numbers = (weight.detach() + 1).tolist()
    weight.data = torch.empty(0)
    weight.data = torch.tensor(numbers)


CHANGES = {
    "sgd": optimise(torch.optim.SGD),
    "sgd foreach": optimise(torch.optim.SGD, foreach=True),
    "adamw": optimise(torch.optim.AdamW),
    "adamw fused": optimise(torch.optim.AdamW, fused=True),
    "adamw fused, after a look": step_after_a_look,
    "in place": in_place,
    "replaced": replace,
    "data": lambda attn: setattr(attn.cpb_mlp[0].weight, "data", attn.cpb_mlp[0].weight.data + 1),
    "unseen": write_unseen,
    "alias": alias,
    "reallocated": reallocate,
    "load": lambda attn: attn.load_state_dict(randomise(copy.deepcopy(attn), seed=1).state_dict()),
    "assign": lambda attn: attn.load_state_dict(randomise(copy.deepcopy(attn), seed=1).state_dict(), assign=True),
    "half": lambda attn: attn.half(),
    "double": lambda attn: attn.to(torch.float64),
    "moved": lambda attn: attn.to("meta"),
    "round trip": round_trip,
    "window": lambda attn: attn.set_window_size((3, 5)),
    "pretrained window": lambda attn: setattr(attn, "pretrained_window_size", [2, 3]),
    "spacing": lambda attn: setattr(attn, "log_spaced", False),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_no_bias_is_stale(change, mode):
    attn = layer()
    with mode():
        first = attn.position_bias()
        assert attn.position_bias() is first
    for _ in range(3):
        CHANGES[change](attn)
        with mode():
            actual = attn.position_bias()
        expected = copy.deepcopy(attn).train().position_bias()
        assert same(actual, expected)
    assert not same(actual, first)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return alike and (a.is_meta or torch.equal(a, b))


def test_projections_are_called():
    """As modules: they may be wrapped, pruned, or have hooks."""
    attn, calls = layer(), []
    for name in ("qkv", "proj"):
        attn.get_submodule(name).register_forward_hook(lambda *call, name=name: calls.append(name))
    attn(random_tensor((1, 5, 6, attn.proj.in_features), 0))
    assert calls == ["qkv", "proj"]


def test_copies_compute_their_own_bias():
    """No copy, pickle or state dict holds the bias, and a copy's is right when the copy changes."""
    attn, cold = layer(), layer()
    with torch.no_grad():
        bias = attn.position_bias()
        assert attn.state_dict().keys() == cold.state_dict().keys() and not list(attn.buffers())
        file = io.BytesIO()
        torch.save(attn, file)
        file.seek(0)
        copies = [copy.copy(attn), copy.deepcopy(attn), pickle.loads(pickle.dumps(attn))]
        copies.append(torch.load(file, weights_only=False))
        # a bias is 2 KB; torch writes addresses, whose digits differ
        assert abs(len(pickle.dumps(attn)) - len(pickle.dumps(cold))) < 100
        assert all(each.cached_bias is None and not each.training for each in copies)
        assert all(torch.equal(each.position_bias(), bias) for each in copies)
        copies[1].cpb_mlp[0].bias.add_(1)
        assert not torch.equal(copies[1].position_bias(), bias)
        assert attn.position_bias() is bias


def test_a_bias_of_inference_mode_is_differentiated_with():
    attn, x = layer(), random_tensor((1, 6, 9, 16), 0)
    with torch.inference_mode():
        attn(x)
    attn.cpb_mlp.requires_grad_(False)
    kept = attn.cached_bias.bias
    out = attn(x.requires_grad_())
    assert attn.cached_bias.bias is kept and not kept.is_inference()
    out.sum().backward()
    assert x.grad.any()
    # and parameters of inference mode, which have no version, are computed with each time
    with torch.inference_mode():
        assert bias_calls(copy.deepcopy(attn), x.detach()) == 2


class Biased(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x):
        return self.attn.position_bias() + x


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_tracers_leave_the_bias_alone():
    """Functional calls, fake tensors, torch.jit.trace and export neither take the bias that is kept nor replace it."""
    attn, other, x, zero = layer(), randomise(layer(), seed=1), random_tensor((1, 6, 9, 16), 0), torch.zeros(())
    with torch.no_grad():
        expected, bias = attn(x), attn.position_bias()
        replaced = torch.func.functional_call(attn, dict(other.named_parameters()), x)
        assert torch.equal(replaced, other(x))
        assert torch.equal(torch.func.functional_call(attn, other.state_dict(), x), other(x))
        states = [attn.state_dict(), other.state_dict()]
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        outputs = torch.func.vmap(lambda state: torch.func.functional_call(attn, state, x))(stacked)
        torch.testing.assert_close(outputs, torch.stack([expected, replaced]))
        assert attn.cached_bias is None and torch.equal(attn(x), expected)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            attn(mode.from_tensor(x))
            attn.eval()(mode.from_tensor(x))
        assert attn.cached_bias is None
        assert torch.equal(attn(x), expected) and torch.equal(attn.position_bias(), bias)
        traced = torch.jit.trace(Biased(attn), zero)
        program = torch.export.export(attn, (x,)).module()
        assert torch.equal(traced(zero), bias) and torch.equal(program(x), expected)
        attn.cpb_mlp[2].weight.mul_(2)
        program.load_state_dict(attn.state_dict())
        assert not torch.equal(attn(x), expected)
        assert torch.equal(program(x), attn(x)) and torch.equal(traced(zero), attn.position_bias())


def test_compiled_in_evaluation():
    """Of the weights as they are, and of the window."""
    torch._dynamo.reset()
    model, x = small(depths=(1, 2)), image(1, 3, 40, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for change in (lambda: None, lambda: model.layers[1].blocks[0].attn.cpb_mlp[2].weight.mul_(2),
                       lambda: model.set_window_size(6, 48)):  # fmt: skip
            model(x)
            change()
            assert torch.equal(compiled(x), model(x))


# Transfer to other windows


@pytest.mark.parametrize(
    "source, window, size, target",
    [
        ("swinv2_base_window12_192", 16, 256, "swinv2_base_window12to16_192to256"),
        ("swinv2_base_window12_192", 24, 384, "swinv2_base_window12to24_192to384"),
        ("swinv2_base_window12to16_192to256", 24, 384, "swinv2_base_window12to24_192to384"),
        ("swinv2_large_window12_192", 16, 256, "swinv2_large_window12to16_192to256"),
    ],
)
def test_transfer_of_published_models(source, window, size, target):
    """What Microsoft fine-tuned from what."""
    with torch.device("meta"):
        model, expected = create_model(source), create_model(target)
    model.set_window_size(window, size)
    assert windows(model) == windows(expected) and model.img_size == expected.img_size


def test_transfer():
    """The model is the one constructed with pretrained windows, the plain definition, and timm's."""
    model = small(pad_order="roll_pad")
    state = model.state_dict()
    model.set_window_size(6, 48)
    options = {**SMALL, "window_size": 6, "img_size": 48, "pretrained_window_sizes": (4, 4)}
    built = SwinTransformerV2(**options, pad_order="roll_pad").eval()
    built.load_state_dict(state)
    assert windows(model) == windows(built) == [([6, 6], shift, [4, 4]) for shift in ([0, 0], [3, 3])] * 2
    for size in ((48, 48), (50, 31)):
        assert torch.equal(model(image(2, 3, *size)), built(image(2, 3, *size)))
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    for attn in attentions(copy.deepcopy(model).double()):
        exact = continuous_bias(attn, places[:, None] - places[None]).permute(2, 0, 1)
        assert_same_in_float64(attn.position_bias(), exact)
    x = image(2, 3, 48, 48)
    exact = plain_swin(copy.deepcopy(model).double(), x.double())
    assert_same_in_float64(copy.deepcopy(model).double()(x.double()), exact)

    swin = pytest.importorskip("timm.models.swin_transformer_v2")
    theirs = swin.SwinTransformerV2(**options).eval()
    theirs.load_state_dict(state)
    with torch.no_grad():
        assert_accurate(model(x), theirs(x), exact, "logits")


def test_transfer_and_back():
    """The same bits, also of the biases that are kept; and a transfer on the way to another changes nothing."""
    model, x = small(window_size=8, img_size=64, absolute_pos_embed=True), image(2, 3, 60, 70)
    with torch.no_grad():
        first, before = model(x), windows(model)
        model.set_window_size(16, 128)
        assert windows(model)[1] == ([16, 16], [8, 8], [8, 8])
        larger = model(x)
        assert not torch.equal(larger, first)
        model.set_window_size(8, 64)
        assert torch.equal(model(x), first)
        assert [w[:2] for w in windows(model)] == [w[:2] for w in before]
        model.set_window_size((12, 10), 128)
        model.set_window_size(16, 128)
        assert torch.equal(model(x), larger)


def test_transfer_at_the_same_size():
    """Without a size the feature maps, and what windows are cut to, are those of the model's own or the last one."""
    model = small(window_size=4, img_size=32)
    model.set_window_size(16)
    assert [attn.window_size for attn in attentions(model)] == [[8, 8], [8, 8], [4, 4], [4, 4]]
    model.set_window_size((16, 4), (128, 64))
    model.set_window_size(16)
    assert [attn.window_size for attn in attentions(model)] == [[16, 16], [16, 16], [16, 8], [16, 8]]
    assert {tuple(attn.pretrained_window_size) for attn in attentions(model)} == {(4, 4)}
    assert model.grid_size == (8, 8)  # of the position embedding, which is interpolated in each call


@pytest.mark.parametrize(
    "arguments, error, sentence",
    [
        ((0,), ValueError, "window_size must be at least 1 on each of the 2 spatial axes, got (0, 0)"),
        ((8, 0), ValueError, "img_size must be at least 1, got 0"),
        (("8",), TypeError, "window_size must be an int or one int for each of the 2 spatial axes, got '8'"),
        ((8, (64, 64, 64)), ValueError, "img_size must be an int or one int for each of the 2 spatial axes"),
    ],
    ids=str,
)
def test_transfer_rejects_bad_arguments(arguments, error, sentence):
    model = small()
    before = copy.deepcopy((windows(model), model.img_size))
    with pytest.raises(error, match=re.escape(sentence)):
        model.set_window_size(*arguments)
    assert (windows(model), model.img_size) == before


@pytest.mark.parametrize(
    "options, error, sentence",
    [
        (dict(pretrained_window_sizes=(4,)), ValueError, "must be 0 or hold a window for each stage, got (4,)"),
        (dict(pretrained_window_sizes=4), ValueError, "must be 0 or hold a window for each stage, got 4"),
        (
            dict(pretrained_window_sizes=(4, -1)),
            ValueError,
            "pretrained_window_size must be at least 0 on each of the 2 spatial axes, got (-1, -1)",
        ),
        (dict(pretrained_window_sizes=(4, 2.5)), TypeError, "pretrained_window_sizes must be an int or one int for"),
        (dict(extra_norm_period=-1), ValueError, "extra_norm_period must be an int of at least 0, got -1"),
        (dict(extra_norm_period=1.5), ValueError, "extra_norm_period must be an int of at least 0, got 1.5"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_rejects_bad_arguments(options, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        small(**options)


@pytest.mark.parametrize(
    "arguments, options, sentence",
    [
        ((16, 2, (2, 4, 4)), {}, "window_size must be an int or two ints, got (2, 4, 4)"),
        ((16, 2, 4), dict(cpb_hidden_dim=0), "cpb_hidden_dim must be an int of at least 1, got 0"),
        ((16, 2, 4), dict(cpb_hidden_dim=2.5), "cpb_hidden_dim must be an int of at least 1, got 2.5"),
        ((16, 3, 4), {}, "num_heads must divide dim, 16, got 3"),
        ((16, 2, 4, 4), {}, "shift_size must be at least 0 and less than the window (4, 4)"),
        ((16, 2, 4), dict(pretrained_window_size=(8, -8)), "pretrained_window_size must be at least 0 on each of the"),
        ((16, 2, 4), dict(pad_order="roll"), "pad_order must be 'pad_roll' or 'roll_pad', got 'roll'"),
    ],
    ids=str,
)
def test_layer_rejects_bad_arguments(arguments, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        CosineWindowAttention(*arguments, **options)


def test_layer_names():
    names = ["logit_scale", "q_bias", "v_bias", "cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight"]
    state = layer().state_dict()
    assert set(state) == {*names, "qkv.weight", "proj.weight", "proj.bias"}
    assert state["logit_scale"].shape == (2, 1, 1)
    assert set(state) - set(layer(qkv_bias=False).state_dict()) == {"q_bias", "v_bias"}


def test_layer_without_bias():
    """Pads have keys and values of zeros then, as tokens of zeros have."""
    attn, x = layer(qkv_bias=False), random_tensor((1, 3, 5, 16), 0)
    attn.shift_size = [0, 0]
    padded = nn.functional.pad(x, (0, 0, 0, 3, 0, 1))
    torch.testing.assert_close(attn(x), attn(padded)[:, :3, :5])


@pytest.mark.parametrize("scaled", [False, True])
def test_layer_norm_add_is_torchs_and_a_sum(scaled):
    ours, torchs = randomise(LayerNormAdd(24)), nn.LayerNorm(24)
    torchs.load_state_dict(ours.state_dict())
    x, f = random_tensor((2, 3, 4, 24), 0), random_tensor((2, 3, 4, 24), 1)
    scale = torch.tensor([0.0, 1.25]) if scaled else None
    norm = torchs(f) if scale is None else torchs(f) * scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(ours(x, f, scale), x + norm)
