"""Whole models: their sizes, what they take and return, and that what they promise holds in training."""

import copy
import io
import itertools
import math
import re

import pytest
import torch
from torch import nn

from swinops import create_model, list_models, reference
from swinops.benchmarks.models import randomise
from swinops.models.swin import SwinTransformer
from swinops.models.swinv2 import SwinTransformerV2
from swinops.nn import CosineWindowAttention, DropPath, SwinBlock, WindowAttention
from swinops.testing import Expected, accuracy, random_tensor, shuffled

PARAMETERS = {
    "swin_tiny_patch4_window7_224": 28_288_354,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
    "swin_base_patch4_window12_384": 87_903_584,
    "swin_large_patch4_window7_224": 196_532_476,
    "swin_large_patch4_window12_384": 196_735_516,
}
SMALL = dict(
    img_size=32, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=5, drop_path_rate=0.0
)


@pytest.fixture(params=[SwinTransformer, SwinTransformerV2], ids=["v1", "v2"])
def small(request):
    """Makes a model of each family: two stages, every parameter random, in evaluation mode."""

    def build(**options) -> nn.Module:
        return randomise(request.param(**{**SMALL, **options})).eval()

    return build


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return random_tensor(shape, seed)


def test_names():
    assert list_models("swin_*") == sorted(PARAMETERS)
    assert list_models("swin_tiny*") == ["swin_tiny_patch4_window7_224"]
    assert list_models("vit*") == []


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert not list(model.buffers())
    size, window = (int(n) for n in re.findall(r"window(\d+)_(\d+)", name)[0][::-1])
    x = torch.empty(2, 3, size, size, device="meta")
    assert model(x).shape == (2, 1000)
    assert {tuple(m.window_size) for m in model.modules() if isinstance(m, WindowAttention)} == {(window, window)}


def test_published_settings():
    model = create_model("swin_tiny_patch4_window7_224")
    rates = [m.drop_path.rate for m in model.modules() if isinstance(m, SwinBlock)]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])
    shifts = [m.shift_size for m in model.modules() if isinstance(m, WindowAttention)]
    assert shifts == [[0, 0], [3, 3]] * 6
    assert all(m.eps == 1e-5 for m in model.modules() if isinstance(m, nn.LayerNorm))


def test_initialisation():
    torch.manual_seed(0)
    model = SwinTransformer(embed_dim=64, depths=(2, 2), num_heads=(2, 4), absolute_pos_embed=True)
    for name, p in model.named_parameters():
        if name.startswith("patch_embed.proj"):
            assert p.abs().max() <= 48**-0.5  # as torch initialises a convolution over 48 numbers
        elif "norm" in name:
            assert torch.equal(p, torch.ones_like(p) if name.endswith("weight") else torch.zeros_like(p))
        elif p.dim() > 1:
            assert p.std().item() == pytest.approx(0.02, rel=0.1)
            assert abs(p.mean().item()) < 0.1 * 0.02 + 4 * 0.02 * p.numel() ** -0.5
        else:
            assert not p.any()


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (45, 37), (8, 100), (3, 1)], ids=str)
def test_any_size(small, size):
    """One model, built once, takes every size; what it pads or shifts depends on the call alone."""
    model = small()
    x = image(2, 3, *size)
    first = model(x)
    model(image(1, 3, 50, 60))
    assert first.shape == (2, 5)
    assert torch.equal(model(x), first)
    # of its own parameters, the model is the plain definition of Swin at that size
    exact = plain_swin(copy.deepcopy(model).double(), x.double())
    assert_same_in_float64(copy.deepcopy(model).double()(x.double()), exact)


def assert_same_in_float64(actual, exact):
    assert (actual - exact).abs().max() <= 1e-12 * exact.abs().max()


def plain_swin(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The forward of ``model``, written from the papers on the image, token by token, without windows.

    Tokens attend where they share a window of the shifted, padded map; others are left out, not masked, so that the
    mask of -100 is the one thing this takes from the ops' definition.
    """
    v2 = isinstance(model, SwinTransformerV2)
    patch = model.patch_embed.patch_size[0]
    x = nn.functional.pad(x, (0, -x.shape[3] % patch, 0, -x.shape[2] % patch))
    x = model.patch_embed.proj(x).permute(0, 2, 3, 1)
    x = norm(model.patch_embed.norm, x)
    for stage in model.layers:
        merging = stage.downsample
        if not isinstance(merging, nn.Identity):
            x = nn.functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            x = torch.cat([x[:, h::2, w::2] for w, h in itertools.product((0, 1), (0, 1))], -1)
            x = norm(merging.norm, merging.reduction(x)) if v2 else merging.reduction(norm(merging.norm, x))
        for block in stage.blocks:
            if v2:
                x = x + norm(block.norm1, plain_attention(block.attn, x))
                x = x + norm(block.norm2, block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(x))))
                x = x if isinstance(block.norm3, nn.Identity) else norm(block.norm3, x)
            else:
                x = x + plain_attention(block.attn, norm(block.norm1, x))
                h = nn.functional.gelu(block.mlp.fc1(norm(block.norm2, x)))
                x = x + block.mlp.fc2(h)
    return model.head.fc(norm(model.norm, x).flatten(1, 2).mean(1))


def norm(module: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias


def plain_attention(attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Each pair of places of the padded map: their windows, the regions that the shift has joined, and their offset."""
    B, H, W, C = x.shape
    window = attn.window_size
    shift = [0 if n <= w else s for n, w, s in zip((H, W), window, attn.shift_size, strict=True)]
    padded = [math.ceil(n / w) * w for n, w in zip((H, W), window, strict=True)]
    x = nn.functional.pad(x, (0, 0, 0, padded[1] - W, 0, padded[0] - H))  # pad_roll: pads are at the end of the image
    places = torch.cartesian_prod(torch.arange(padded[0]), torch.arange(padded[1]))
    shifted = (places - torch.tensor(shift)) % torch.tensor(padded)
    cell = shifted // torch.tensor(window)
    same_window = (cell[:, None] == cell[None]).all(-1)
    # a token that the roll carried around the border is a stranger to those that stayed
    carried = (places < torch.tensor(shift)) & (torch.tensor(shift) > 0)
    strangers = (carried[:, None] != carried[None]).any(-1)
    offset = (shifted % torch.tensor(window))[:, None] - (shifted % torch.tensor(window))[None]
    offset = torch.where(same_window[..., None], offset, 0)
    qkv = nn.functional.linear(x, attn.qkv.weight, qkv_bias(attn))
    q, k, v = qkv.view(B, len(places), 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    if isinstance(attn, CosineWindowAttention):
        q, k = (y / y.norm(dim=-1, keepdim=True).clamp_min(1e-12) for y in (q, k))
        scale = attn.logit_scale.clamp_max(math.log(100)).exp()
        bias = continuous_bias(attn, offset)
    else:
        scale = q.shape[-1] ** -0.5
        row = (offset[..., 0] + window[0] - 1) * (2 * window[1] - 1) + offset[..., 1] + window[1] - 1
        bias = attn.relative_position_bias_table[row]
    scores = q @ k.transpose(-2, -1) * scale + bias.permute(2, 0, 1) - 100 * strangers
    p = scores.masked_fill(~same_window, -math.inf).softmax(-1)
    out = (p @ v).transpose(1, 2).reshape(B, *padded, C)[:, :H, :W]
    return attn.proj(out)


def qkv_bias(attn: nn.Module) -> torch.Tensor | None:
    if isinstance(attn, WindowAttention):
        return attn.qkv.bias
    return torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])


def continuous_bias(attn: CosineWindowAttention, offset: torch.Tensor) -> torch.Tensor:
    """Eq. 3 and 4 of Swin V2, in float64, for each place of ``offset`` [*, 2]: [*, heads]"""
    rows, places = offset.flatten(0, -2).unique(dim=0, return_inverse=True)
    window = [p or w for p, w in zip(attn.pretrained_window_size, attn.window_size, strict=True)]
    x = 8 * rows.double() / torch.tensor([max(w - 1, 1) for w in window])
    if attn.log_spaced:
        x = x.sign() * (1 + x.abs()).log2() / 3
    w1, b1, w2 = (p.double() for p in attn.cpb_mlp.parameters())
    bias = 16 / (1 + (-(w2 @ (w1 @ x.T + b1[:, None]).clamp_min(0))).exp())
    return bias.T[places].unflatten(0, offset.shape[:-1])


@pytest.mark.parametrize("window", [(4, 2), (2, 8), (8, 8)], ids=str)
def test_windows(small, window):
    """Windows that are not square; one that is cut to the map of the last stage, whose side is 4."""
    model = small(window_size=window)
    assert [tuple(stage.blocks[1].attn.window_size) for stage in model.layers] == [
        window,
        (min(window[0], 4), min(window[1], 4)),
    ]
    model, x = model.double(), image(1, 3, 32, 40).double()
    assert_same_in_float64(model(x), plain_swin(model, x))


def test_features_only(small):
    model, whole = small(features_only=True), small()
    model.load_state_dict({name: p for name, p in whole.state_dict().items() if name in model.state_dict()})
    x = image(2, 3, 36, 44)
    first, last = model(x)
    assert first.shape == (2, 16, 9, 11) and last.shape == (2, 32, 5, 6)
    assert torch.equal(whole.head(whole.norm(last.permute(0, 2, 3, 1))), whole(x))
    with torch.device("meta"):
        maps = create_model("swin_base_patch4_window7_224", features_only=True)(torch.empty(1, 3, 224, 192))
    assert [tuple(y.shape) for y in maps] == [
        (1, 128, 56, 48),
        (1, 256, 28, 24),
        (1, 512, 14, 12),
        (1, 1024, 7, 6),
    ]
    assert not [name for name, _ in model.named_parameters() if name.startswith(("norm", "head"))]


def test_no_classes_means_features(small):
    model = small(num_classes=0)
    x = image(2, 3, 32, 32)
    assert torch.equal(model(x), model.forward_features(x).mean((1, 2)))
    assert model(x).shape == (2, 32)


def test_absolute_position_embedding(small):
    model = small(absolute_pos_embed=True)
    with torch.no_grad():
        model.absolute_pos_embed.copy_(random_tensor((1, 64, 16), 3))
    x = image(1, 3, 32, 32)
    plain = model.patch_embed(x)
    assert torch.equal(model.embed(x), plain + model.absolute_pos_embed.view(1, 8, 8, 16))
    # at another size each channel is the same picture, drawn larger
    larger = model.embed(image(1, 3, 64, 48)) - model.patch_embed(image(1, 3, 64, 48))
    drawn = nn.functional.interpolate(
        model.absolute_pos_embed.view(8, 8, 16).permute(2, 0, 1)[None], (16, 12), mode="bicubic"
    )
    torch.testing.assert_close(larger, drawn.permute(0, 2, 3, 1))
    model(image(1, 3, 64, 48)).sum().backward()
    assert model.absolute_pos_embed.grad.any()


def test_no_weight_decay():
    model = SwinTransformer(**SMALL, absolute_pos_embed=True)
    names = model.no_weight_decay()
    assert names == {
        "absolute_pos_embed",
        *(f"layers.{i}.blocks.{j}.attn.relative_position_bias_table" for i in (0, 1) for j in (0, 1)),
    }
    assert names <= set(dict(model.named_parameters()))


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    (model(x) * random_tensor((len(x), 5), 9)).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_grad_checkpointing(small):
    """The same bits, stochastic depth included, from blocks that run again in backward."""
    model = small(drop_path_rate=0.5).train()
    x = image(4, 3, 32, 32)
    torch.manual_seed(1)
    expected = gradients(model, x)
    calls = []
    block = model.layers[1].blocks[1]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.set_grad_checkpointing()
    torch.manual_seed(1)
    assert all(map(torch.equal, gradients(model, x), expected))
    assert len(calls) == 2
    model.set_grad_checkpointing(False)
    gradients(model, x)
    assert len(calls) == 3
    model.set_grad_checkpointing()
    model.eval()(x)
    assert len(calls) == 4


def test_stochastic_depth():
    """In training a sample's branch is dropped, or scaled by 1 / (1 - rate): in expectation nothing changes."""
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2)
    scale = drop(x)
    assert set(scale.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert scale.mean().item() == pytest.approx(1, abs=0.05)
    assert drop.eval()(x) is None and DropPath(0.0)(x) is None
    # through a block: each sample is the sum of the branches that it kept
    block = randomise(SwinBlock(16, 2, 4, 2, drop_path=0.5)).train()
    x = image(16, 8, 8, 16)
    y = block(x)
    whole = block.eval()
    kinds = set()
    for sample, result in zip(x, y, strict=True):
        found = []
        for first, second in itertools.product((0, 2), (0, 2)):
            s = sample[None] + first * whole.attn(whole.norm1(sample[None]))
            s = s + second * whole.mlp(reference.layer_norm(s, whole.norm2.weight, whole.norm2.bias, 1e-5, s.dtype)[0])
            if torch.allclose(s[0], result, rtol=1e-4, atol=1e-4):
                found.append((first, second))
        assert len(found) == 1
        kinds.update(found)
    assert len(kinds) == 4


def test_state_dict_survives(small):
    """deepcopy, torch.save and loading into a fresh model give the same bits; nothing but parameters is stored."""
    model = small(absolute_pos_embed=True)
    x = image(2, 3, 40, 32)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = small(absolute_pos_embed=True)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), expected)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_autocast_keeps_the_residual_stream_wide():
    """Norms before a projection return what it computes in; the stream between blocks stays float32."""
    model = randomise(SwinTransformer(**SMALL)).train()
    x = image(2, 3, 32, 32)
    seen = {}

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = output[1] if isinstance(output, tuple) else output

        return hook

    for name in ("patch_embed", "layers.0.blocks.0.norm1", "layers.0.blocks.0.norm2", "layers.1.downsample.norm",
                 "layers.0.blocks.1", "norm"):  # fmt: skip
        model.get_submodule(name).register_forward_hook(keep(name))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    dtypes = {name: y.dtype for name, y in seen.items()}
    projected = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert projected == {"layers.0.blocks.0.norm1", "layers.0.blocks.0.norm2", "layers.1.downsample.norm"}
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes(small, dtype):
    model, x = small().to(dtype), image(2, 3, 32, 32).to(dtype)
    logits = model(x)
    assert logits.dtype == dtype
    logits.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


def test_compiles(small):
    """Without a graph break, and every size shares one graph after the first: padded, shifted, or below the window."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = small(depths=(2, 1))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for size in ((64, 64), (97, 131), (130, 22), (13, 48)):
        x = image(1, 3, *size)
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count <= 2


def test_export_dynamic_shapes(small):
    """One program for every batch and image size."""
    model, Dim = small(), torch.export.Dim
    sizes = {0: Dim("batch", min=1), 2: Dim("height", min=24, max=512), 3: Dim("width", min=24, max=512)}
    program = torch.export.export(model, (image(2, 3, 34, 41),), dynamic_shapes=(sizes,)).module()
    for shape in ((1, 3, 32, 32), (3, 3, 50, 70), (2, 3, 25, 160)):
        assert torch.equal(program(image(*shape)), model(image(*shape)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_trace(small):
    """``torch.jit.trace``, for the size that is traced."""
    model, x = small(), image(2, 3, 45, 37)
    with torch.no_grad():
        traced = torch.jit.trace(model, image(2, 3, 45, 37, seed=1))
        assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize(
    "options, error, sentence",
    [
        (dict(num_heads=(1,)), ValueError, "a positive int for each stage, got (2, 2) and (1,)"),
        (dict(depths=(2, 0)), ValueError, "depths and num_heads must hold a positive int for each stage"),
        (dict(num_classes=-1), ValueError, "num_classes must be an int of at least 0, got -1"),
        (dict(num_classes="10"), ValueError, "num_classes must be an int of at least 0, got '10'"),
        (dict(num_heads=(3, 5)), ValueError, "num_heads must divide dim, 16, got 3"),
        (dict(window_size=0), ValueError, "window_size must be at least 1 on each of the 2 spatial axes, got (0, 0)"),
        (dict(window_size=(4, 4, 4)), ValueError, "window_size must be an int or one int for each of the 2"),
        (dict(window_size="7"), TypeError, "window_size must be an int or one int for each of the 2"),
        (dict(img_size=0), ValueError, "img_size must be at least 1, got 0"),
        (dict(img_size=22.4), TypeError, "img_size must be an int or one int for each of the 2"),
        (dict(patch_size=0), ValueError, "patch_size must be at least 1, got 0"),
        (dict(drop_path_rate=1.0), ValueError, "drop_path_rate must be at least 0 and less than 1, got 1.0"),
        (dict(drop_path_rate=-0.1), ValueError, "drop_path_rate must be at least 0 and less than 1, got -0.1"),
        (dict(pad_order="pad"), ValueError, "pad_order must be 'pad_roll' or 'roll_pad', got 'pad'"),
        (dict(backend="cudnn"), ValueError, "backend must be 'auto' or one of 'cuda', 'triton', 'reference'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_rejects_bad_arguments(small, options, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        small(**options)


def test_rejects_a_head_to_skip_without_a_checkpoint():
    with pytest.raises(ValueError, match="skip_head must be False without a checkpoint, got True"):
        create_model("swin_tiny_patch4_window7_224", skip_head=True)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 32, 32, 3)], ids=str)
def test_rejects_bad_images(small, shape):
    with pytest.raises(ValueError, match=re.escape(f"x must be [B, 3, H, W], got {shape}")):
        small()(torch.ones(shape))


def test_rejects_unknown_names():
    with pytest.raises(
        ValueError, match="got 'swin_tiny_patch4_window7_225': did you mean swin_tiny_patch4_window7_224"
    ):
        create_model("swin_tiny_patch4_window7_225")
    with pytest.raises(
        ValueError, match=r"name must be one of swinops.list_models\(\), got 'resnet50': known are swin_"
    ):
        create_model("resnet50")
    with pytest.raises(TypeError, match="dropout"):
        create_model("swin_tiny_patch4_window7_224", dropout=0.5)


def test_no_batch(small):
    assert small()(torch.empty(0, 3, 32, 32)).shape == (0, 5)


def test_kernels_compute_the_model(small):
    """Triton in place of the reference: the same logits and gradients, to rounding, at a size that pads and shifts."""
    from swinops.backends import why_not

    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert why_not("triton", torch.empty(1, device=device), "window_attention") is None
    x = image(2, 3, 36, 20).to(device)

    def run(backend, dtype, x):
        model = small(backend=backend).to(device, dtype).train()
        logits = model(x.to(dtype))
        (logits * random_tensor(logits.shape, 9, dtype, device)).sum().backward()
        return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}

    # a gradient of one number is as exact as chance has it: the worst of several images counts
    images = [shuffled(x, places) for places in (0, 3, 7, 12)]
    plain, exact = ([run("reference", dtype, y) for y in images] for dtype in (torch.float32, torch.float64))
    for name, kernel in run("triton", torch.float32, x).items():
        bound = max(accuracy(p[name], p[name], e[name]).bound for p, e in zip(plain, exact, strict=True))
        assert Expected(plain[0][name], exact[0][name], bound).accuracy(kernel).ok, name
