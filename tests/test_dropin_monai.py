"""What is special to MONAI's Swin and to Video Swin: masks that are not made, cut windows, layers of vendored files."""

import inspect
import types

import pytest
import torch
from torch import nn

import swinops
from swinops.testing import assert_accurate, random_tensor

from .dropin_case import close, randomise
from .timm_swins import assert_same, count_calls, results
from .video_swin import swin_transformer as video_swin

pytest.importorskip("monai")

from monai.networks.nets import swin_unetr

from . import dropin_monai

MONAI, MONAI_2D = dropin_monai.CASES
WINDOW = (2, 3, 4)


@pytest.fixture
def masks(monkeypatch):
    """Calls of MONAI's function that makes a mask."""
    return count_calls(monkeypatch, swin_unetr, ("compute_mask",))


def monai_layer(window=WINDOW, depth=2, dim=8, heads=2, **options):
    options = {"drop_path": 0.0, "qkv_bias": True, **options}
    return randomise(swin_unetr.BasicLayer(dim, depth, heads, window, **options)).eval()


def video_layer(window=WINDOW, depth=2, dim=8, heads=2, **options):
    return randomise(video_swin.BasicLayer(dim, depth, heads, window, **options)).eval()


swinops.explain(video_layer())  # runs small blocks of its class, which no test should count


def image(space, batch=2, dim=8):
    return random_tensor((batch, dim, *space), 99)


every_layer = pytest.mark.parametrize("layer", [monai_layer, video_layer])


class TestNumbers:
    @every_layer
    @pytest.mark.parametrize(
        "space",
        [(3, 5, 6), (4, 6, 8), (2, 5, 6), (3, 2, 6), (3, 5, 4), (1, 2, 6), (2, 5, 3), (3, 3, 4), (2, 3, 4), (1, 2, 3)],
    )
    def test_cut_windows(self, layer, space, calls):
        """On no axis, on each one, on each two, and on all; a shorter axis than the window, and one just as long."""
        model, x = layer(), image(space)
        with swinops.patched(model, "reference"):
            actual = results(model, x)
        assert calls["window_attention"] == 2
        assert_same(actual, model, x)

    @pytest.mark.parametrize("space", [(5, 7), (3, 7), (5, 4), (3, 2)])
    def test_cut_windows_of_an_image(self, space, calls):
        model, x = monai_layer((3, 4)), image(space)
        with swinops.patched(model, "reference"):
            actual = results(model, x)
        assert calls["window_attention"] == 2
        assert_same(actual, model, x)

    def test_a_cut_window_has_the_first_rows_of_the_bias(self):
        """Not those of its own offsets: so the libraries have it, and checkpoints with them."""
        block = swinops.patch(monai_layer(), "reference").blocks[0]
        bias, table = block.position_bias([2, 2, 4]), block.attn.relative_position_bias_table
        assert torch.equal(bias, swinops.relative_position_bias(table, WINDOW, backend="reference")[:, :16, :16])
        offsets = table.unflatten(0, (3, 5, 7))[:, 1:4].flatten(0, 2)
        assert not close(bias, swinops.relative_position_bias(offsets, (2, 2, 4), backend="reference"))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype, device):
        report = swinops.check(monai_layer().to(device, dtype), image((3, 5, 4), 1).to(device, dtype), "triton")
        assert report.ok, report

    @pytest.mark.parametrize(
        ("layer", "window", "head_dim"),
        [
            (monai_layer, (7, 7, 7), 4),  # with feature_size=12
            (monai_layer, (7, 7, 7), 8),
            (video_layer, (8, 7, 7), 16),
        ],
        ids=["SwinUNETR-12", "SwinUNETR-24", "Video Swin"],
    )
    def test_published_windows(self, layer, window, head_dim, calls):
        """Of 343 and 392 tokens."""
        model, x = layer(window, dim=3 * head_dim, heads=3), image((9, 7, 12), 1, dim=3 * head_dim)
        with swinops.patched(model, "reference"):
            actual = results(model, x)
        assert calls["window_attention"] == 2
        assert_same(actual, model, x)

    @torch.no_grad()
    def test_343_tokens_in_a_kernel(self, device):
        model, x = monai_layer((7, 7, 7), depth=1, dim=4, heads=1).to(device), image((7, 7, 7), 1, dim=4).to(device)
        expected, exact = model(x), monai_layer((7, 7, 7), depth=1, dim=4, heads=1).double().to(device)(x.double())
        assert_accurate(swinops.patch(model, "triton")(x), expected, exact, "out")

    @torch.no_grad()
    def test_swin_unetr(self, calls, masks):
        model = randomise(swin_unetr.SwinUNETR(1, 2, feature_size=12)).eval()
        x = random_tensor((1, 1, 64, 64, 32), 99)
        rows = swinops.explain(model)
        assert {(row.class_name, row.action) for row in rows} == {
            ("BasicLayer", "replace"), ("SwinTransformerBlock", "replace")
        }  # fmt: skip
        assert len(rows) == 12
        with swinops.patched(model, "reference"):
            masks["compute_mask"] = 0
            actual = model(x)
        assert calls["window_attention"] == 8 and not masks["compute_mask"]
        expected = model(x)
        assert masks["compute_mask"] == 4
        assert_accurate(actual, expected, model.double()(x.double()), "logits")


class TestMask:
    def test_is_not_made(self, calls, masks):
        model, x = MONAI.model(), MONAI.x()
        expected = model(x)
        assert masks["compute_mask"] == 4
        swinops.patch(model, "reference")
        masks["compute_mask"] = 0
        assert close(model(x), expected)
        assert calls["window_attention"] == 6 and not masks["compute_mask"]

    @pytest.mark.parametrize("case", [MONAI, MONAI_2D], ids=lambda case: case.name)
    def test_is_made_for_dropout(self, case, calls, masks):
        model, x = case.model(**case.dropout).train(), case.x()
        torch.manual_seed(0)
        expected = model(x)
        swinops.patch(model, "reference")
        masks["compute_mask"] = 0
        with pytest.warns(UserWarning, match="attention dropout in training"):
            torch.manual_seed(0)
            assert torch.equal(model(x), expected)
        assert masks["compute_mask"] == 4 and not calls["window_attention"]

    @every_layer
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_made_for_a_block_that_needs_it(self, layer, dtype, calls):
        """The others of its layer run the op. The block gets what the library would have handed it, to the bit."""
        model, x = layer(depth=4), image((3, 5, 6))
        handed = []
        model.blocks[1].attn.register_forward_hook(
            lambda module, args, kwargs, out: handed.append((args, kwargs)), with_kwargs=True
        )
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            expected = model(x)
            swinops.patch(model, "reference")
            with pytest.warns(UserWarning, match="attn has hooks"):
                assert close(model(x), expected)
        assert calls["window_attention"] == 3 and len(handed) == 2
        first, second = ([*args, *kwargs.values()][1] for args, kwargs in handed)
        assert first.dtype == second.dtype and torch.equal(first, second)

    @every_layer
    def test_is_made_where_a_block_is_not_replaced(self, layer, calls):
        class Wrapper(nn.Module):
            def __init__(self, block):
                super().__init__()
                self.block = block

            def forward_part1(self, x, mask_matrix):
                return self.block.forward_part1(x, mask_matrix)

            def forward(self, x, mask_matrix):
                assert mask_matrix.shape == (8, 24, 24)
                return self.block(x, mask_matrix)

        model, x = layer(), image((3, 5, 6))
        expected = model(x)
        model.blocks[0] = Wrapper(model.blocks[0])
        with pytest.warns(UserWarning, match="a layer that was not replaced handed its block a mask"):
            assert close(swinops.patch(model, "reference")(x), expected)
        assert calls["window_attention"] == 1

    @every_layer
    @pytest.mark.parametrize("any_mask", [True, False])
    def test_of_another_layer(self, layer, any_mask, calls):
        """It may be any, or None: a block that shifts runs the library's code, where one that does not ignores it."""
        blocks, x = layer().blocks, image((8,), 2, 6 * 3 * 5).view(2, 3, 5, 6, 8)
        mask = random_tensor((8, 24, 24), 1) if any_mask else None
        expected = [block(x, mask) for block in blocks]
        swinops.patch(blocks, "reference")
        assert close(blocks[0](x, mask), expected[0])
        assert calls["window_attention"] == 1
        with pytest.warns(UserWarning, match="handed its block a mask"):
            assert torch.equal(blocks[1](x, mask), expected[1])
        assert calls["window_attention"] == 1
        cut = image((8,), 2, 2 * 3 * 4).view(2, 2, 3, 4, 8)  # no shift is left
        assert close(blocks[1](cut, mask), swinops.unpatch(blocks)[1](cut, mask))
        assert calls["window_attention"] == 2

    @every_layer
    @pytest.mark.parametrize(("name", "value"), [("window_size", (4, 3, 2)), ("shift_size", (1, 0, 2))])
    def test_of_other_windows_than_the_block_has(self, layer, name, value, calls):
        model, x = layer(), image((4, 6, 8))
        setattr(model.blocks[1], name, value)
        expected = model(x)
        swinops.patch(model, "reference")
        with pytest.warns(UserWarning, match="handed its block a mask"):
            assert close(model(x), expected)
        assert calls["window_attention"] == 1

    def test_stage_of_hyena_operators(self, calls, masks):
        """It makes no mask."""

        class Mixer(nn.Module):
            def forward_part1(self, x):
                return x.sin()

            def forward(self, x, mask_matrix=None):
                assert mask_matrix is None
                return x + self.forward_part1(x)

        model, x = MONAI.model(), MONAI.x()
        stage = model.swin.layers2[0]
        stage.use_hyena, stage.blocks = True, nn.ModuleList([Mixer(), Mixer()])
        expected = model(x)
        swinops.patch(model, "reference")
        masks["compute_mask"] = 0
        assert close(model(x), expected)
        assert calls["window_attention"] == 4 and not masks["compute_mask"]


# of a vendored copy: what stood there, what stands there, the class that is left, and why
EDITS = {
    "layout": ("return x.permute(0, 4, 1, 2, 3)", "return x", "BasicLayer", "its forward does not return what"),
    "two outputs": (
        "return x.permute(0, 4, 1, 2, 3)", "return x.permute(0, 4, 1, 2, 3), x", "BasicLayer",
        "its forward does not return what",
    ),
    "scaled": ("block(x, mask)", "block(x, mask) * self.depth", "BasicLayer", "its forward uses depth"),
    "mask": ("-100.0 *", "-10.0 *", "BasicLayer", "its mask is not Video Swin's"),
    "no mask": ("block(x, mask)", "block(x)", "BasicLayer", "its mask is not Video Swin's"),
    "argument": (
        "forward_part1(self, x, mask_matrix)", "forward_part1(self, x, mask_matrix, more=0)",
        "SwinTransformerBlock3D", "its forward_part1 takes self, x, mask_matrix, more",
    ),
    "branch": (
        "x[:, :D, :H, :W].contiguous()", "x[:, :D, :H, :W].contiguous().mul(2)", "SwinTransformerBlock3D",
        "its forward_part1 uses mul",
    ),
    "keyword": (
        "block(x, mask)", "block(x, mask_matrix=mask)", "BasicLayer", "it does not run on a small image (TypeError",
    ),
    "scale": (
        "self.scale * q", "2 * self.scale * q", "SwinTransformerBlock3D", "its forward_part1 computes something else",
    ),
    "attention": ("self.scale * q", "self.scale * q.sin()", "SwinTransformerBlock3D", "its attn.forward uses sin"),
}  # fmt: skip


class TestVendored:
    """Copies of the file are changed, often with the same names."""

    @pytest.mark.parametrize("edit", EDITS)
    def test_changed_file(self, edit):
        old, new, name, reason = EDITS[edit]
        source = inspect.getsource(video_swin)
        assert source.count(old) == 1
        if edit == "no mask":
            source = source.replace("def forward(self, x, mask_matrix)", "def forward(self, x, mask_matrix=None)")
        module = types.ModuleType("elsewhere.swin_transformer")
        exec(source.replace(old, new), vars(module))
        model, x = randomise(module.BasicLayer(8, 2, 2, WINDOW)).eval(), image((2, 5, 4))
        expected = model(x)
        left = [row for row in swinops.explain(model) if row.action == "leave"]
        assert {row.class_name for row in left} == {name} and all(reason in row.reason for row in left)
        with pytest.warns(UserWarning):
            swinops.patch(model, "reference")
            actual = model(x)
        assert type(actual) is type(expected)
        pairs = zip(actual, expected, strict=True) if edit == "two outputs" else [(actual, expected)]
        assert all(close(a, b) for a, b in pairs)

    def test_unchanged_file(self, calls):
        module = types.ModuleType("elsewhere.swin_transformer")
        exec(inspect.getsource(video_swin), vars(module))
        model = randomise(module.BasicLayer(8, 2, 2, WINDOW)).eval()
        assert [row.action for row in swinops.explain(model)] == ["replace"] * 3
        before = calls["window_attention"]  # of small blocks
        swinops.patch(model, "reference")(image((2, 5, 4)))
        assert calls["window_attention"] - before == 2

    def test_other_libraries_have_a_layer_of_that_name(self):
        from .microsoft_swin import SwinTransformer

        model = SwinTransformer(img_size=16, patch_size=2, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4)
        assert "BasicLayer" in {type(module).__name__ for module in model.modules()}
        assert "BasicLayer" not in {row.class_name for row in swinops.explain(model)}


class TestTracing:
    @pytest.mark.parametrize("case", [MONAI, MONAI_2D], ids=lambda case: case.name)
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
    def test_trace(self, case, calls):
        model, x = case.model(), case.x()
        expected = model(x)
        traced = torch.jit.trace(swinops.patch(model, "reference"), x)
        calls["window_attention"] = 0
        assert close(traced(x), expected)
        assert calls["window_attention"] == len(case.replaced)

    def test_four_sizes_compile_to_few_graphs(self, calls):
        from torch._dynamo.testing import CompileCounter

        torch._dynamo.reset()
        model = monai_layer()
        spaces = [(3, 5, 6), (4, 7, 9), (5, 8, 10), (7, 10, 13)]
        with torch.no_grad():
            expected = [model(image(space)) for space in spaces]
            counter = CompileCounter()
            compiled = torch.compile(swinops.patch(model, "reference"), fullgraph=True, backend=counter)
            assert all(close(compiled(image(space)), y) for space, y in zip(spaces, expected, strict=True))
        assert calls["window_attention"] == 8
        assert counter.frame_count <= 3


class TestOptions:
    @pytest.mark.parametrize("case", [MONAI, MONAI_2D], ids=lambda case: case.name)
    def test_flash_attention(self, case, calls):
        """MONAI's own runs without gradients only; it is one formula with and without."""
        model, x = case.model(use_flash_attention=True), case.x()
        with torch.no_grad():
            expected = model(x)
            assert torch.equal(model(x), expected)
            swinops.patch(model, "reference")
            assert close(model(x), expected)
            assert calls["window_attention"] == len(case.replaced)
        actual = results(model, x)
        assert calls["window_attention"] == 2 * len(case.replaced)
        assert_same(actual, swinops.unpatch(model), x)

    @torch.no_grad()
    def test_flash_attention_where_no_kernel_runs(self, monkeypatch):
        model, x, seen = MONAI.model(use_flash_attention=True), MONAI.x(), []
        expected, attend = model(x), nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(
            nn.functional,
            "scaled_dot_product_attention",
            lambda *args, **options: (seen.append(1), attend(*args, **options))[1],
        )
        with pytest.warns(UserWarning, match="runs kernels on CUDA only"):
            assert torch.equal(swinops.patch(model)(x), expected)
        assert len(seen) == 6

    @every_layer
    @pytest.mark.parametrize("dim", [8, 12, 32])  # heads of 4, 6 and 16
    @pytest.mark.parametrize("qkv_bias", [True, False])
    def test_checkpointing(self, layer, dim, qkv_bias, calls):
        model, x = layer(dim=dim, qkv_bias=qkv_bias), image((3, 5, 6), dim=dim)
        for block in model.blocks:
            block.use_checkpoint = True
        with swinops.patched(model.train(), "reference"):
            actual = results(model, x)
        assert calls["window_attention"] == 4  # again in backward
        assert_same(actual, model, x)
