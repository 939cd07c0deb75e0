"""timm's CoAtNet and MaxViT on the kernels: each of their attentions by itself, and what is theirs alone in a model."""

import importlib
import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import swinops
from swinops.dropin import swap, timm_maxxvit
from swinops.testing import assert_accurate, random_tensor

from .dropin_maxxvit import CASES, build, image, maxvit, maxxvit, randomise
from .timm_swins import assert_same, count_calls, results

timm = pytest.importorskip("timm")
layers = timm.layers

pytestmark = pytest.mark.filterwarnings("ignore:swinops.patch left")  # the grids

CASES = {case.name: case for case in CASES}
GRID = "its partition is a grid, and the op's windows are of neighbouring tokens"
BIASES = {
    "none": None,
    "RelPosBias": layers.RelPosBias,
    "RelPosBiasTf": layers.RelPosBiasTf,
    "RelPosMlp": partial(layers.RelPosMlp, hidden_dim=16),
    "RelPosMlp of Swin": partial(layers.RelPosMlp, hidden_dim=16, mode="swin"),
}
H, W = 5, 3
resizable = pytest.mark.skipif(not hasattr(maxxvit.MaxxVit, "set_input_size"), reason="this timm has no set_input_size")


@pytest.fixture
def calls(monkeypatch):
    import swinops.reference

    return count_calls(monkeypatch, swinops.reference, ("window_attention", "relative_position_bias"))


def attention(cls, bias="RelPosBias", fused=False, dim_out=None, window=(H, W), **options):
    rel_pos_cls = BIASES[bias] and partial(BIASES[bias], window_size=window)
    module = cls(24, dim_out, dim_head=8, rel_pos_cls=rel_pos_cls, **options)
    module.fused_attn = fused
    return randomise(module).eval()


def attention2d(**options):
    return attention(maxxvit.Attention2d, **options)


def tokens(size=(H, W), batch=2):
    return random_tensor((batch, 24, *size), 3)


def explained(model):
    return {row.path: (row.action, row.reason) for row in swinops.explain(model, "reference")}


class TestAttention2d:
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("head_first", [False, True])
    @pytest.mark.parametrize("bias", BIASES)
    def test_every_bias_and_layout(self, bias, head_first, fused, calls):
        model, x = attention2d(bias=bias, head_first=head_first, fused=fused), tokens()
        with swinops.patched(model, "reference"):
            actual = results(model, x)
        assert calls == {"window_attention": 1, "relative_position_bias": int(bias == "RelPosBias")}
        assert_same(actual, model, x)

    @pytest.mark.parametrize("backend", ["reference", "triton"])
    @pytest.mark.parametrize("expand_first", [False, True])
    @pytest.mark.parametrize("dim_out", [16, 32])
    def test_another_width(self, dim_out, expand_first, backend, device):
        model = attention2d(dim_out=dim_out, expand_first=expand_first).to(device)
        x = tokens().to(device)
        with swinops.patched(model, backend):
            actual = results(model, x)
        assert actual["out"].shape == (2, dim_out, H, W)
        assert_same(actual, model, x)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("head_first", [False, True])
    @pytest.mark.parametrize("backend", ["reference", "triton"])
    def test_memory_format(self, backend, head_first, memory_format, device):
        model = attention2d(head_first=head_first).to(device, memory_format=memory_format)
        x = tokens().to(device, memory_format=memory_format)
        with swinops.patched(model, backend):
            actual = results(model, x)
        assert_same(actual, model, x)

    @pytest.mark.parametrize("head_first", [False, True])
    def test_these_tests_can_fail(self, head_first, monkeypatch):
        model, x = attention2d(head_first=head_first), tokens()
        by_head = timm_maxxvit.by_head
        monkeypatch.setattr(timm_maxxvit, "by_head", lambda *args: by_head(*args[:-1], not args[-1]))
        with swinops.patched(model, "reference"):
            actual = results(model, x)
        with pytest.raises(AssertionError, match="off by"):
            assert_same(actual, model, x)

    def test_map_of_another_shape_with_as_many_tokens(self, calls):
        """timm adds the same bias to it, by the order of the tokens."""
        model, x = attention2d(), tokens((W, H))
        with swinops.patched(model, "reference"):
            actual = results(model, x)
        assert calls["window_attention"] == 1
        assert_same(actual, model, x)

    @pytest.mark.filterwarnings("ignore:swinops")
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("size", [(4, 3), (5, 6), (1, 1)])
    def test_map_of_another_size(self, size, fused):
        """timm's error in timm's words."""
        model, x = attention2d(fused=fused), tokens(size)
        with pytest.raises(RuntimeError) as error:
            model(x)
        for backend in ("auto", "reference"):
            with pytest.raises(RuntimeError) as patched:
                swinops.patch(model, backend)(x)
            assert str(patched.value) == str(error.value)

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("shape", [(3, H * W, H * W), (1, 3, H * W, H * W)])
    def test_shared_rel_pos(self, shape, fused, calls):
        model, x = Sharing(attention2d(bias="none", fused=fused), shape), tokens()
        with swinops.patched(model, "reference"):
            actual = results(model, x)
        assert calls["window_attention"] == 1
        assert_same(actual, model, x)

    def test_a_bias_of_its_own_comes_first(self, calls):
        model, x = attention2d(), tokens()
        shared = random_tensor((1, 3, H * W, H * W), 5)
        expected = model(x, shared)
        assert torch.allclose(swinops.patch(model, "reference")(x, shared), expected, atol=1e-5)
        assert calls["window_attention"] == 1

    @pytest.mark.parametrize("shape", [(2, 3, H * W, H * W), (1, 1, H * W, H * W), (H * W, H * W), (3, 1, H * W)])
    def test_shared_rel_pos_that_is_broadcast(self, shape, calls):
        model, x = Sharing(attention2d(bias="none"), shape), tokens()
        expected = model(x)
        swinops.patch(model, "reference")
        with pytest.warns(UserWarning, match=r"the bias is not \[heads, N, N\]"):
            assert torch.equal(model(x), expected)
        assert not calls["window_attention"]

    def test_in_nchw_partitions(self, calls):
        """A block and a grid that partition before: each window is a map."""
        options = {"transformer_use_nchw_attn": True, "transformer_head_first": False}
        model, x = maxvit(maxxvit._rw_max_cfg(), fused=True, **options)(), image(2, (16, 24))
        paths = [f"stages.{i}.blocks.0.attn_{part}.attn" for i in range(2) for part in ("block", "grid")]
        assert explained(model) == dict.fromkeys(paths, ("replace", ""))
        with swinops.patched(model, "reference"):
            actual = results(model, x)
        assert calls["window_attention"] == 4
        assert_same(actual, model, x)

    def test_classes_of_the_same_name(self):
        from timm.models import efficientformer_v2

        model = nn.Sequential(layers.Attention2d(8, num_heads=2), efficientformer_v2.Attention2d(8))
        assert explained(model) == {}


class Sharing(nn.Module):
    """An attention whose bias comes from elsewhere."""

    def __init__(self, attn, shape):
        super().__init__()
        self.attn = attn
        self.bias = nn.Parameter(random_tensor(shape, 5))

    def forward(self, x):
        return self.attn(x, self.bias)


class TestPartition:
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("head_first", [False, True])
    @pytest.mark.parametrize("bias", ["", "bias", "bias_tf", "mlp"])
    def test_every_bias_and_layout(self, bias, head_first, fused, calls):
        model, x = partition(bias, head_first=head_first, fused=fused), random_tensor((2, 6, 6, 24), 3)
        with swinops.patched(model, "reference"):
            actual = results(model, x)
        assert calls == {"window_attention": 1, "relative_position_bias": int(bias == "bias")}
        assert_same(actual, model, x)

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_map_that_windows_do_not_divide(self, fused):
        """timm's error in timm's words, also in a traced graph."""
        model, x = partition("bias", fused=fused), random_tensor((2, 6, 7, 24), 3)
        with pytest.raises(AssertionError) as error:
            model(x)
        swinops.patch(model, "reference")
        with pytest.raises(AssertionError, match=r"width \(7\) must be divisible by window \(3\)") as patched:
            model(x)
        assert str(patched.value) == str(error.value)
        with pytest.raises(AssertionError, match=r"height and width must be divisible by the window \[2, 3\]"):
            torch.fx.symbolic_trace(model)(x)
        with pytest.raises(Exception, match="must be divisible by window"):
            torch.jit.script(model)(x)

    def test_these_tests_can_fail(self, monkeypatch):
        model, x = partition("bias"), random_tensor((2, 6, 6, 24), 3)
        by_head = timm_maxxvit.by_head
        monkeypatch.setattr(timm_maxxvit, "by_head", lambda *args: by_head(*args[:-1], not args[-1]))
        with swinops.patched(model, "reference"):
            actual = results(model, x)
        with pytest.raises(AssertionError, match="off by"):
            assert_same(actual, model, x)

    def test_grid_is_left(self):
        model, x = partition("bias", "grid"), random_tensor((2, 6, 6, 24), 3)
        expected = model(x)
        assert explained(model) == {"(itself)": ("leave", GRID)}
        with pytest.warns(UserWarning, match="nothing to replace"):
            assert type(swinops.patch(model, "reference")) is maxxvit.PartitionAttentionCl
        assert torch.equal(model(x), expected)

    def test_parallel_partitions_are_left(self):
        model = build(maxxvit._rw_max_cfg(), False, depths=(1, 1), block_type=("PM", "PM"), transformer_window_size=2)
        reason = "one of its partitions is a grid, and the op's windows are of neighbouring tokens"
        assert explained(model) == {f"stages.{i}.blocks.0.attn": ("leave", reason) for i in range(2)}

    def test_a_model_of_grids(self):
        model = maxvit(maxxvit._next_cfg(no_block_attn=True), fused=True, stem_width=16, embed_dim=(16, 32))()
        assert explained(model) == {f"stages.{i}.blocks.0.attn_grid": ("leave", GRID) for i in range(2)}


def partition(bias, kind="block", fused=False, **options):
    config = maxxvit.MaxxVitTransformerCfg(
        dim_head=8, rel_pos_type=bias, rel_pos_dim=16, window_size=(2, 3), norm_layer_cl="layernorm", **options
    )
    module = maxxvit.PartitionAttentionCl(24, kind, config)
    module.attn.fused_attn = fused
    return randomise(module).eval()


class TestModels:
    @pytest.mark.parametrize("name", CASES)
    @resizable
    def test_set_input_size_after_the_patch(self, name, calls):
        """timm replaces tables, indices and windows."""
        case = CASES[name]
        model = swinops.patch(case.model(), "reference")
        options = {"window_size": (3, 2), "grid_size": (3, 2)} if "maxvit" in name else {}
        model.set_input_size((48, 32), **options)
        x = image(2, (48, 32))
        actual = results(model, x)
        assert calls["window_attention"] == len(case.replaced)
        assert_same(actual, swinops.unpatch(model), x)

    @pytest.mark.parametrize("name", CASES)
    def test_features_only(self, name, calls):
        case = CASES[name]
        example = {"coatnet": "coatnet_0_rw_224", "maxvit": "maxvit_tiny_tf_224"}[name.partition("_")[0]]
        wanted = case.build.keywords | {"features_only": True, "out_indices": (1, 2)}
        del wanted["fused"]
        model = timm.create_model(
            example, img_size=(32, 24), embed_dim=(16, 24), stem_width=(8, 12), transformer_dim_head=8, **wanted
        )
        randomise(model).eval()
        x = image(2, (32, 24))
        expected = model(x)
        actual = swinops.patch(model, "reference")(x)
        assert len(actual) == 2 and calls["window_attention"] == len(case.replaced)
        for a, b in zip(actual, expected, strict=True):
            assert a.stride() == b.stride()
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))

    @pytest.mark.parametrize("name", CASES)
    def test_training(self, name, calls):
        """What drop paths and the dropout in a network of the bias draw is what they draw in timm."""
        case = CASES[name]
        model, x = case.model(drop_path_rate=0.3).train(), case.x()
        torch.manual_seed(0)
        expected = model(x)
        swinops.patch(model, "reference")
        torch.manual_seed(0)
        actual = model(x)
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
        assert calls["window_attention"] == len(case.replaced)

    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_script_with_dropout_runs_timm(self, name, calls):
        case = CASES[name]
        model, x = case.model(**case.dropout), case.x()
        expected = model(x)
        assert torch.equal(torch.jit.script(swinops.patch(model, "reference"))(x), expected)
        assert not calls["window_attention"]

    @pytest.mark.parametrize("name", ["coatnet", "maxvit"])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_compiles_where_auto_finds_a_kernel(self, name, autocast, calls, monkeypatch):
        torch._dynamo.reset()
        asked = []
        monkeypatch.setattr(swap, "kernel", lambda *args: (asked.append(args), ("triton", ""))[1])
        case = CASES[name]
        model = swinops.patch(case.model())
        asked.clear()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            compiled(case.x())
        cpu, dtype = torch.device("cpu"), torch.bfloat16 if autocast else torch.float32
        biases = {("relative_position_bias", cpu, torch.float32, heads) for heads in (2, 3)}
        assert set(asked) == {("window_attention", cpu, dtype, 8)} | biases
        assert calls["window_attention"] == len(case.replaced)

    @pytest.mark.parametrize("name", CASES)
    def test_bfloat16(self, name, device):
        case = CASES[name]
        report = swinops.check(case.model().to(device, torch.bfloat16), case.x(1).to(device), "triton")
        assert report.ok, report

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("name", "size", "attentions", "rows"),
        [
            ("coatnet_0_rw_224", 224, "Attention2d", ["replace"] * 9),
            ("maxvit_rmlp_nano_rw_256", 256, "PartitionAttentionCl", ["replace", "leave"] * 7),
        ],
    )
    def test_published(self, name, size, attentions, rows, calls):
        """At its own size, against timm's fused attention and its plain one."""
        model, x = randomise(timm.create_model(name).eval()), image(1, (size, size))
        table = swinops.explain(model, "reference")
        assert [row.action for row in table] == rows
        assert {row.class_name for row in table} == {attentions}
        assert {row.reason for row in table} == ({"", GRID} if "leave" in rows else {""})
        with swinops.patched(model, "reference"):
            actual = model(x)
        assert calls["window_attention"] == rows.count("replace")
        plain = [model(x)]
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = not module.fused_attn
        plain.append(model(x))
        exact = model.double()(x.double())
        for out in plain:
            assert_accurate(actual, out, exact, "logits")


class Mine(layers.RelPosBias):
    def get_bias(self):
        return 2 * super().get_bias()


class TestLeft:
    def left(self, model, reason):
        x = tokens()
        expected = model(x)
        assert explained(model) == {"(itself)": ("leave", reason)}
        with pytest.warns(UserWarning, match="nothing to replace"):
            assert torch.equal(swinops.patch(model, "reference")(x), expected)

    def test_another_index(self):
        model = attention2d()
        model.rel_pos.relative_position_index = model.rel_pos.relative_position_index.flip(0)
        self.left(model, "its relative_position_index is not timm's")

    def test_another_bias(self):
        model = attention2d()
        model.rel_pos = Mine((H, W), num_heads=3)
        self.left(model, "rel_pos is a Mine, and none of timm's")

    @pytest.mark.parametrize("name", ["forward", "get_bias"])
    def test_a_bias_with_changed_code(self, name, monkeypatch):
        def changed(self, *args, shared_rel_pos=None):
            return self.relative_position_bias_table.sin()

        changed.__module__ = layers.RelPosBias.__module__
        changed.__signature__ = inspect.signature(getattr(layers.RelPosBias, name))
        model = attention2d()
        monkeypatch.setattr(layers.RelPosBias, name, changed)
        unknown = {"forward": "relative_position_bias_table, sin", "get_bias": "sin"}[name]
        reason = f"its {name} uses {unknown}, unlike that of timm's RelPosBias"
        assert explained(model) == {"(itself)": ("leave", reason)}

    def test_another_scale(self):
        model = attention2d()
        model.scale = 0.3
        self.left(model, "its scale is 0.3, not dim_head ** -0.5")

    def test_prefix_tokens(self):
        model = attention2d(bias="RelPosMlp")
        model.rel_pos.prefix_tokens = 1
        assert explained(model) == {"(itself)": ("leave", "rel_pos has prefix tokens")}

    @pytest.mark.parametrize("cls", ["Attention2d", "PartitionAttentionCl"])
    def test_vendored_copies(self, cls, monkeypatch, tmp_path, calls):
        """One as it was, and one with a scale that timm's does not have."""
        source = (
            Path(maxxvit.__file__)
            .read_text()
            .partition("\nmodel_cfgs = dict(")[0]
            .replace("from .", "from timm.models.")
        )
        for package, text in {
            "theirs": source,
            "changed": source.replace("x = self.proj(x)\n", "x = self.proj(x) * self.gain\n").replace(
                "self.fused_attn = ", "self.gain = 2\n        self.fused_attn = "
            ),
        }.items():
            (tmp_path / package).mkdir()
            (tmp_path / package / "maxxvit.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        for package in ("theirs", "changed"):
            copy = importlib.import_module(f"{package}.maxxvit")
            if cls == "Attention2d":
                model, x = attention(copy.Attention2d), tokens()
            else:
                monkeypatch.setattr(maxxvit, "PartitionAttentionCl", copy.PartitionAttentionCl)
                model, x = partition("bias"), random_tensor((2, 6, 6, 24), 3)
            assert type(model).__module__ == f"{package}.maxxvit"
            expected = model(x)
            if package == "theirs":
                assert torch.allclose(swinops.patch(model, "reference")(x), expected, atol=1e-4)
                assert calls["window_attention"] == 1
            else:
                assert "forward uses gain, unlike that of timm's" in explained(model)["(itself)"][1]


class TestOwnForward:
    @pytest.mark.parametrize("change", ["another bias", "forward", "get_bias"])
    def test_bias_changed_after_the_patch(self, change, calls):
        model, x = swinops.patch(attention2d(), "reference"), tokens()
        reason = f"the {change} of rel_pos was replaced"
        if change == "another bias":
            model.rel_pos, reason = randomise(Mine((H, W), num_heads=3)), "rel_pos is a Mine, and none of timm's"
        elif change == "forward":
            model.rel_pos.forward = lambda attn: attn
        else:
            model.rel_pos.get_bias = lambda: 0
        with pytest.warns(UserWarning, match=reason):
            actual = model(x)
        assert not calls["window_attention"]
        assert torch.equal(actual, swinops.unpatch(model)(x))


def replica(module):
    """What DataParallel makes of a module: tensors in place of its parameters."""
    copy = module._replicate_for_data_parallel()
    for name, p in module.named_parameters(recurse=False):
        setattr(copy, name, p.detach())
    for name, child in module.named_children():
        copy._modules[name] = replica(child)
    return copy


@pytest.mark.parametrize("bias", ["none", "RelPosBias"])
def test_replica(bias, calls, monkeypatch):
    monkeypatch.setattr(swap, "kernel", lambda *args: ("triton", ""))
    model, x = attention2d(bias=bias), tokens()
    expected = model(x)
    copy = replica(swinops.patch(model))
    assert not list(copy.parameters())
    assert torch.allclose(copy(x), expected, rtol=1e-4, atol=1e-4)
    assert calls["window_attention"] == 1
