"""The harness, and ``swinops bench --quick`` from end to end."""

import copy
import csv
import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("tqdm")

from swinops import testing
from swinops.benchmarks import command, cosine_attention, harness, models, window_attention
from swinops.benchmarks.harness import BOTH, FORWARD, Case, Contender, Implementation, Settings


class Bar:
    n = 0.0

    def update(self, step):
        self.n += step

    def set_description(self, text):
        pass


def settings(**options):
    device = torch.device("cpu")
    return Settings(device, torch.float32, harness.make_clock(device), Bar(), quick=True, compiler="eager", **options)


class ScriptedClock:
    """Each implementation returns what its call takes, in seconds."""

    shortest = 0.0

    def run(self, f, calls):
        return f()

    def read(self, mark):
        return mark

    def peak(self, f):
        return None

    def recover(self):
        pass


def test_spread():
    assert harness.spread([3.0]) == (3.0, 3.0, 3.0)
    assert harness.spread([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == (3.5, 2.0, 5.0)


def test_ratios_are_taken_within_a_round():
    baseline, other = [2.0, 2.0, 20.0], [1.0, 1.0, 10.0]
    assert harness.paired_ratio(baseline, other) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError):
        harness.paired_ratio(baseline, other[:2])


def test_a_round_runs_everything_once():
    seen = []

    def runner(name, times):
        times = iter(times)

        def run():
            seen.append(name)
            return next(times)

        return run

    # a warm-up and an estimate, then the rounds
    runs = {"slow": runner("slow", [9, 9, 2, 4, 6]), "fast": runner("fast", [9, 9, 1, 2, 3])}
    shared = settings()
    shared.clock = ScriptedClock()
    times = harness.race(runs, {name: harness.Outcome("ok") for name in runs}, shared)
    assert times == {"slow": [2, 4, 6], "fast": [1, 2, 3]}
    rounds = [seen[i : i + 2] for i in range(4, len(seen), 2)]
    assert len(rounds) == 3 and all(sorted(each) == ["fast", "slow"] for each in rounds)


def scaled(x, by):
    return by * x * x


def case(**others):
    x, dout = testing.random_tensor((4, 5), 0), testing.random_tensor((4, 5), 1)
    definition = functools.partial(scaled, by=3.0)
    runs = {"pytorch": Implementation(definition)}
    runs |= {name: each if isinstance(each, Implementation) else Implementation(each) for name, each in others.items()}
    return Case("square", "4 x 5", {"x": x}, dout, definition, runs, {FORWARD: 160, BOTH: 320})


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 3 * x * x

    @staticmethod
    def backward(ctx, dout):
        return dout


def test_a_wrong_implementation_is_not_timed():
    printed = []
    contenders = {"wrong": functools.partial(scaled, by=3.001), "gradient": WrongGradient.apply}
    rows = harness.measure([case(**contenders)], settings(say=printed.append))
    found = {(row["impl"], row["direction"]): row for row in rows}
    for key in (("wrong", FORWARD), ("wrong", BOTH), ("gradient", BOTH)):
        assert found[key]["status"] == "wrong" and found[key]["median_ms"] is None and found[key]["ratio"] is None
        assert found[key]["error"] > found[key]["allowed"] > 0
    assert any(line.split() == ["wrong", "wrong"] for line in printed[1].splitlines())
    assert found["gradient", FORWARD]["status"] == "ok"
    assert found["pytorch", BOTH]["status"] == "ok" and found["pytorch", BOTH]["ratio"] == 1.0


def test_a_wrong_implementation_runs_once():
    calls = []

    def wrong(x):
        calls.append(1)
        return -x

    harness.compare(
        [Implementation(wrong).contender("wrong", case(), FORWARD)], case().expected(FORWARD), settings(), "wrong"
    )
    assert len(calls) == 1


def test_nan_is_wrong():
    rows = harness.measure([case(nan=lambda x: x * float("nan"))], settings(say=lambda text: None))
    assert {row["status"] for row in rows if row["impl"] == "nan"} == {"wrong"}


def test_errors_become_reasons():
    printed = []

    def fails(x):
        raise RuntimeError("this GPU is too old\nand pages of details")

    def memory(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    later = iter(range(1000))

    def fails_later(x):
        if next(later) > 1:
            raise ValueError("only sometimes")
        return scaled(x, 3.0)

    rows = harness.measure([case(fails=fails, memory=memory, later=fails_later)], settings(say=printed.append))
    status = {row["impl"]: row["status"] for row in rows if row["direction"] == FORWARD}
    assert status == {
        "pytorch": "ok",
        "fails": "RuntimeError: this GPU is too old",
        "memory": "out of memory",
        "later": "ValueError: only sometimes",
    }
    assert "out of memory" in "\n".join(printed)


def test_without_the_baseline_there_are_times_and_no_ratios():
    broken = case(other=functools.partial(scaled, by=3.0))
    del broken.implementations["pytorch"]
    row = harness.measure([broken], settings(say=lambda text: None))[0]
    assert row["median_ms"] > 0 and row["ratio"] is None


def test_layouts_are_made_outside_of_the_timing():
    """``pack`` runs once, and what ``unpack`` returns is checked in the case's own layout."""
    packed = []

    def pack(tensors):
        packed.append(1)
        return {"y": tensors["x"].t()}

    other = Implementation(lambda y: scaled(y.t(), 3.0), pack, lambda results: {**results, "dx": results["dy"].t()})
    rows = harness.measure([case(other=other)], settings(say=lambda text: None))
    assert {row["status"] for row in rows} == {"ok"} and len(packed) == 2


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("peer", ["timm", "sdpa", "flex"])
@pytest.mark.parametrize("op", [window_attention, cosine_attention], ids=lambda op: op.__name__.rpartition(".")[2])
def test_peers_compute_the_same(op, peer, shift):
    shape = window_attention.Shape(2, (14, 21), 2, 7, shift, 16)
    q, k, v, bias, _, dout = testing.attention_inputs((14, 21), (7, 7), batch=2, heads=2, head_dim=16)
    found = window_attention.peers(shape, q, settings(), dict.fromkeys(op.ATTENTIONS, op.ATTENTIONS[peer]))["timm"]
    plain = functools.partial(op.definition, window=7, shift=shift)
    scale = {"logit_scale": testing.logit_scales(2)} if op is cosine_attention else {}
    tensors = {"q": q, "k": k, "v": v, **scale, "bias": bias, "pad_kv": None}
    this = Case("attention", str(shape), tensors, dout, plain, {}, {FORWARD: 0, BOTH: 0})
    # FlexAttention has no backward on a CPU
    direction = FORWARD if peer == "flex" else BOTH
    _, results = found.contender(peer, this, direction).build()
    assert harness.check(results(), this.expected(direction)).ok


def test_columns(tmp_path):
    rows = harness.measure([case()], settings(say=lambda text: None, bandwidth=1e9))
    path = tmp_path / "new" / "ops.csv"
    harness.write_csv(path, rows)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    wanted = "op shape direction impl status median_ms p20_ms p80_ms ratio ratio_p20 ratio_p80 baseline"
    wanted += " bytes floor_percent peak_mem_mb dtype compile device torch triton commit"
    assert set(wanted.split()) <= set(read[0])
    assert [float(row["median_ms"]) for row in read] == [row["median_ms"] for row in rows]
    assert float(read[0]["p20_ms"]) <= float(read[0]["median_ms"]) <= float(read[0]["p80_ms"])
    assert read[0]["torch"] == torch.__version__ and read[0]["commit"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "ops.csv"
    harness.write_csv(path, [{"a": 1}])
    with pytest.raises(ValueError):
        harness.write_csv(path, [{"a": 2}, {"a": 3, "b": 4}])
    with pytest.raises(KeyboardInterrupt), harness.whole(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "a\n1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_cuda_clock(monkeypatch):
    """Its calls in order, on a stand-in for the GPU: the cache is written over before the first event."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return 2.5

    fake = SimpleNamespace(
        Event=Event, get_device_properties=lambda device: SimpleNamespace(L2_cache_size=1 << 20),
        synchronize=lambda: None, reset_peak_memory_stats=lambda: None, empty_cache=lambda: None,
        memory_allocated=lambda: 1 << 20, max_memory_allocated=lambda: 3 << 20,
    )  # fmt: skip
    monkeypatch.setattr(harness.torch, "cuda", fake)
    cache = SimpleNamespace(zero_=lambda: log.append("flush"))
    monkeypatch.setattr(harness.torch, "empty", lambda *size, **options: cache)
    clock = harness.CUDAClock(torch.device("cuda"))
    mark = clock.run(lambda: log.append("call"), 1)
    assert log == ["flush", "event", "call", "event"]
    assert clock.read(mark) == 2.5e-3 and log[-1] == "synchronize"
    assert clock.peak(lambda: None) == 2.0


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 16 bytes"),
    RuntimeError("CUDA driver error: not enough memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory(error):
    assert harness.out_of_memory(error) and harness.reason(error) == "out of memory"


def test_other_errors_are_not_out_of_memory():
    assert not harness.out_of_memory(RuntimeError("shapes differ"))
    assert not harness.out_of_memory(ValueError("not enough memory of the past"))


SMALL = models.MODELS[0], 36  # 9 x 9 patches, then 5 x 5: windows pad both
CUT = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 10}
BOTH_MODES = {mode: models.PRECISIONS["float32"] for mode in models.MODES}


class Hungry(nn.Module):
    """Takes batches up to ``most``; the parameters are another model's."""

    def __init__(self, model, most):
        super().__init__()
        self.model = model
        self.most = most

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model(x)

    def named_parameters(self, *arguments, **options):
        return self.model.named_parameters(*arguments, **options)

    def load_state_dict(self, state):
        return self.model.load_state_dict(state)


@pytest.fixture
def subject():
    pytest.importorskip("timm")
    precisions = {"infer": models.PRECISIONS["float32"]}
    return models.Subject("swin", models.create(*SMALL, **CUT), None, batch=5, precisions=precisions, compiled=False)


@pytest.mark.parametrize("most, left", [(5, 5), (2, 2), (1, 1), (0, 1)])
def test_batch_is_halved_for_all(subject, most, left):
    """Batch 5, then 2, then 1; at 1 the implementation that still has too little memory gets a row that says so."""
    printed = []
    shared = settings(say=printed.append)
    subject.ours = lambda: Hungry(copy.deepcopy(subject.model), most)
    subject.precisions = BOTH_MODES
    rows = models.measure(subject, shared)
    assert [row["impl"] for row in rows] == ["timm", "patched", "swinops"]
    for mode in models.MODES:
        assert {row[f"{mode}_batch_size"] for row in rows} == {left}
        assert [row[f"{mode}_status"] for row in rows] == ["ok", "ok", "ok" if most else "out of memory"]
        assert all((row[f"{mode}_samples_per_sec"] is None) == (row[f"{mode}_status"] != "ok") for row in rows)
    halved = [line.strip() for line in printed if "go on with" in line]
    steps = [(5, 2), (2, 1)][: {5: 0, 2: 1, 1: 2}[left]]
    assert halved == [
        f"{title}: swinops is out of memory at batch {large}, all go on with {small}"
        for title in models.MODES.values()
        for large, small in steps
    ]
    assert shared.bar.n == pytest.approx(sum(models.WEIGHTS.values()))


def test_what_all_are_compared_with_is_out_of_memory(subject):
    """The model in float64 counts too; at batch 1 there is a row with the reason."""
    subject.model = Hungry(subject.model, 0)
    subject.model.patch_embed, subject.model.num_classes = subject.model.model.patch_embed, 10
    subject.precisions = BOTH_MODES
    rows = models.measure(subject, settings(say=lambda text: None))
    assert [(row["impl"], row["infer_status"], row["train_status"]) for row in rows] == [
        ("timm", "out of memory", "out of memory")
    ]


def test_our_model_is_a_contender(subject):
    """It computes what timm's does, gradients too, where pads and shifts need timm's order; another's do not."""
    own = models.own_model(models.MODELS[0], img_size=36, **CUT)
    subject.ours, subject.batch, subject.precisions = own, 1, BOTH_MODES
    said = []
    rows = models.measure(subject, settings(say=said.append))
    assert {row["impl"]: (row["infer_status"], row["train_status"]) for row in rows}["swinops"] == ("ok", "ok")
    assert "the reference" in "\n".join(said)
    subject.ours = functools.partial(own, pad_order="pad_roll")
    rows = models.measure(subject, settings(say=lambda text: None))
    assert {row["impl"]: (row["infer_status"], row["train_status"]) for row in rows}["swinops"] == ("wrong", "wrong")
    assert models.own_model("swin_s3_tiny_224") is None


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "amp"])
def test_precision_and_memory_format(subject, precision):
    seen = {}

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = copy.deepcopy(subject.model)

        def forward(self, x):
            out = self.model(x)
            seen[x.dtype, x.is_contiguous(memory_format=torch.channels_last), out.dtype] = True
            return out

        def load_state_dict(self, state):
            self.model.load_state_dict(state)

    wanted = models.PRECISIONS[precision]
    subject.ours, subject.batch, subject.channels_last, subject.precisions = Seen, 2, True, {"infer": wanted}
    rows = models.measure(subject, settings(say=lambda text: None))
    assert {row["infer_status"] for row in rows} == {"ok"} and {row["channels_last"] for row in rows} == {True}
    assert {row["infer_dtype"] for row in rows} == {wanted.name} and {row["train_status"] for row in rows} == {""}
    assert list(seen) == [(wanted.dtype, True, wanted.autocast or wanted.dtype)]


def test_names_of_ops():
    """Every op of the command is measured by the file that it names, and every file has all its ops there."""
    for file in set(command.BENCHMARKS.values()):
        names = [op for op in command.BENCHMARKS if command.BENCHMARKS[op] == file]
        module = command.chosen_ops(names)[names[0]]
        shared = settings()
        cases = [case.op for case in module.cases(shared)]
        assert set(cases) == set(names) and len(cases) == len(names) * len(module.shapes(shared))
    assert set(command.BENCHMARKS.values()) == {
        path.stem for path in command.HERE.glob("*.py") if "def cases(settings: Settings)" in path.read_text()
    }


def test_contender_is_compiled_for_the_record():
    assert Contender("x", lambda: None).compile == ""
    assert Implementation(scaled, compile="default").contender("x", case(), FORWARD).compile == "default"


def test_quick(tmp_path):
    """Everything runs, files are there, patched logits are timm's and the interpreted kernels ran."""
    for needed in ("matplotlib", "PIL", "timm"):
        pytest.importorskip(needed)
    from PIL import Image

    words = [sys.executable, "-m", "swinops", "bench", "--quick", "--json", "--output", str(tmp_path / "out")]
    words += ["--results-file", str(tmp_path / "models.json")]
    # one thread: beside other tests two only wait for each other
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["op"] for row in rows["ops"]} == set(command.BENCHMARKS)
    assert {row["status"] for row in rows["ops"]} == {"ok"}
    assert [(row["model"].partition(",")[0], row["impl"]) for row in rows["models"]] == [
        (model, f"{name}{compiled}")
        for model in models.SMALL
        for name in ("timm", "patched", "swinops")
        for compiled in ("", "-compiled")
    ]
    assert {row["infer_status"] for row in rows["models"]} == {"ok"}
    assert all(row["infer_samples_per_sec"] > 0 for row in rows["models"])
    assert not any("triton" in row["impl"] for row in rows["ops"] if "cpu" in row["torch"])
    assert json.loads((tmp_path / "models.json").read_text()) == rows["models"]
    for name, count in (("ops.csv", len(rows["ops"])), ("models.csv", len(rows["models"]))):
        with (tmp_path / "out" / name).open(newline="") as file:
            assert len(list(csv.DictReader(file))) == count
    with Image.open(tmp_path / "out" / "bench.png") as image:
        image.verify()
        assert image.size[0] > 1000
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.png", "models.csv", "ops.csv"]
    assert "100%" in done.stderr and "WRONG" not in done.stderr
    if not torch.cuda.is_available():
        assert "the attention kernels were launched 4 times" in done.stderr
