"""The ``swinops`` command: help, sentences for what is wrong, ``explain``, and the files and JSON of ``bench``."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

from swinops.cli import main

SWIN = "swin_tiny_patch4_window7_224"
COMMANDS = ["", "info", "explain", "verify", "bench", "bench ops", "bench models", "gpu-check"]
BENCH = all(importlib.util.find_spec(name) for name in ("matplotlib", "PIL", "timm", "tqdm"))

needs_bench = pytest.mark.skipif(not BENCH, reason="swinops[bench] is not installed")


def failure(capsys, *arguments):
    """The sentence that wrong arguments get."""
    with pytest.raises(SystemExit) as exit:
        main([str(each) for each in arguments])
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("usage: swinops")
    return captured.err.strip().splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    examples = text.partition("\nexample")[2]
    assert f"  swinops {command}".rstrip() in examples
    assert "Traceback" not in text and text.startswith("usage: swinops")


def example_lines(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    text = capsys.readouterr().out.partition("\nexample")[2].partition("\n")[2].replace("\n      ", " ")
    return [line.split("   ")[0].split()[1:] for line in text.splitlines() if line.startswith("  swinops")]


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_right(command, capsys, monkeypatch):
    """They get as far as what they ask for."""
    from swinops import cli, verify
    from swinops.benchmarks import command as bench
    from swinops.benchmarks import gpu_check

    reached = []
    monkeypatch.setattr(cli, "info", lambda arguments: reached.append(1) or 0)
    monkeypatch.setattr(cli, "explain", lambda *arguments: reached.append(1) or 0)
    monkeypatch.setattr(verify, "run", lambda *arguments: reached.append(1) or 0)
    monkeypatch.setattr(bench, "run", lambda *arguments: reached.append(1) or 0)
    monkeypatch.setattr(gpu_check, "run", lambda *arguments: reached.append(1) or 0)
    lines = example_lines(command, capsys)
    for line in lines:
        assert main(line) == 0
    assert lines and len(reached) == len(lines)


def test_without_a_command_there_is_a_sentence(capsys):
    text = failure(capsys)
    assert text.startswith("swinops: error: name a command, one of info, explain, verify, bench")


def test_the_command_imports_little():
    code = """
import sys
from swinops.cli import main
try:
    main(["--help"])
finally:
    print([name for name in ("matplotlib", "PIL", "timm", "torchvision", "triton") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("draw", "invalid choice: 'draw'"),
        ("bench photograph", "invalid choice: 'photograph'"),
        ("explain", "the following arguments are required: --model/-m"),
        ("explain -m resnet50 --backend flash", "argument --backend: invalid choice: 'flash'"),
        ("bench -b 0", "must be a positive integer, got '0'"),
        ("bench --model resnet50", "--model must be one of timm's Swin models"),
        (f"bench --img-size 3 --model {SWIN}", "--img-size 3 does not fit"),
        ("bench --checkpoint /nowhere/model.pth", "--checkpoint /nowhere/model.pth cannot be loaded"),
        ("bench --torchcompile-mode fastest", "--torchcompile-mode must be one of"),
        ("bench --torchcompile models", "--torchcompile must be a backend (cudagraphs, inductor"),
        ("bench models --torchcompile-mode lite", "--torchcompile-mode needs --torchcompile"),
        ("bench --torchcompile eager --torchcompile-mode lite", "mode lite contradicts --torchcompile eager"),
        ("bench --results-file rows.xlsx", "--results-file must end in .csv or .json where no --results-format is"),
        ("bench ops --results-format csv", "--results-format needs --results-file, got 'csv' alone"),
        ("bench ops --results-file a.csv --results-format json", "must be what the name of the file says, 'csv'"),
        ("bench ops --op softmax", "argument --op: invalid choice: 'softmax'"),
        ("bench ops --precision amp", "--precision of ops must be float32, bfloat16, float16 or tf32, got 'amp'"),
        ("bench ops --precision int8", "argument --precision: invalid choice: 'int8'"),
        ("bench ops --model swin", "unrecognized arguments: --model swin"),
        ("bench --model swin ops", "--model is not an argument of swinops bench ops"),
        ("bench --output results models", "--output is not an argument of swinops bench models"),
        ("bench models --bench speed", "argument --bench: invalid choice: 'speed'"),
        ("bench models -m a b --checkpoint c.pth", "--checkpoint goes with one --model, got 2"),
        ("bench --quick --output /proc/nowhere/results", "--output must be writable, and /proc/nowhere/results/"),
        ("bench ops --results-file /proc/nowhere/ops.csv", "--results-file must be writable, and /proc/nowhere/"),
        ("bench ops --results-file /proc --results-format csv", "/proc is not: it is a folder"),
    ],
)  # fmt: skip
@needs_bench
def test_bad_arguments(arguments, words, capsys):
    start = time.monotonic()
    assert words in failure(capsys, *arguments.split())
    assert time.monotonic() - start < 60  # before anything is measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has tf32")
@needs_bench
def test_tf32_needs_a_gpu(capsys):
    assert "--precision on a CPU must be one of float32, bfloat16, float16, amp, got 'tf32'" in failure(
        capsys, "bench", "--precision", "tf32"
    )


@needs_bench
def test_what_is_missing_is_named(capsys, monkeypatch):
    for name in ("timm", "torchvision", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "needs timm: pip install timm" in failure(capsys, "explain", "-m", SWIN)
    assert "the benchmarks need timm: pip install 'swinops[bench]'" in failure(capsys, "bench", "models")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "the benchmarks need matplotlib" in failure(capsys, "bench")


def test_info_says_what_auto_takes(monkeypatch, capsys):
    """By which row of the table, or that there is none; in a line what differs by the window alone."""
    from swinops.backends import choice, cuda

    row = choice.Row(
        "window_merge", "forward", 80, "bfloat16", 49, 96, 2.31, 3.0, "ns a window", "static", device="", commit="abc"
    )
    wider = row._replace(tokens=64, cuda=3.3)
    measured = row._replace(arch=90, cuda=33.0, triton=31.0, unit="us", source="measured", device="an H100")
    monkeypatch.setattr(choice, "rows", lambda: (row, wider, measured))
    monkeypatch.setattr(cuda, "OPS", ("window_merge", "window_attention"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["info"]) == 0
    table = [" ".join(line.split()) for line in capsys.readouterr().out.partition("that decide:\n")[2].splitlines()]
    none = "cuda cuda cuda cuda no times: cuda before triton"
    assert table == [
        "op direction arch dtype window 7 window 8 window 12 window 16 basis",
        "window_merge forward sm_80 bfloat16 cuda 2.31, triton 3"
        + " triton 3, cuda 3.3" * 3
        + " static model, not measured, ns a window",
        f"window_merge {none}",
        *(
            f"window_merge forward {arch} bfloat16{' triton 31, cuda 33' * 4} measured on an H100 at abc, us"
            for arch in ("sm_90", "sm_100")
        ),
        f"window_attention {none}",
    ]

    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["choices"]
    assert len(found) == 3 * 3 * 4 * 3  # architectures, dtypes and windows; merge forward, attention both ways
    assert found[0] == {
        "op": "window_merge", "direction": "forward", "arch": 80, "dtype": "bfloat16", "window": 7, "backend": "cuda",
        "times": {"cuda": 2.31, "triton": 3.0}, "unit": "ns a window", "basis": "static model, not measured",
    }  # fmt: skip


@pytest.mark.parametrize("name", [SWIN, f"{SWIN}.ms_in1k"])
def test_explain_a_swin(name, capsys):
    pytest.importorskip("timm")
    assert main(["explain", "--model", name]) == 0
    text = capsys.readouterr().out
    blocks = [line.split() for line in text.splitlines() if line.startswith("layers.")]
    assert len(blocks) == 12 and all(each[1:4] == ["SwinTransformerBlock", "timm", "replace"] for each in blocks)
    assert "swinops.patch would replace 13 of the" in text

    assert main(["explain", "--model", name, "--backend", "reference", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["backend"]) == (name, "reference")
    assert [row["path"] for row in found["modules"]] == ["patch_embed", *(each[0] for each in blocks)]
    assert {(row["action"], row["reason"]) for row in found["modules"]} == {("replace", "")}


def test_explain_says_what_the_models_own_table_says(capsys):
    """The model that explain builds has no memory, and the table is the same."""
    timm = pytest.importorskip("timm")
    import swinops

    name = "swin_s3_tiny_224"
    model = timm.create_model(name).to("cuda" if torch.cuda.is_available() else "cpu")
    assert main(["explain", "-m", name]) == 0
    assert str(swinops.explain(model)) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_explain_where_there_is_nothing_to_replace(name, capsys):
    pytest.importorskip("timm")
    assert main(["explain", "-m", name]) == 0
    text = capsys.readouterr().out
    assert "(no module that swinops knows)" in text and "swinops.patch would replace 0 of the" in text
    assert main(["explain", "-m", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["modules"] == []


@pytest.mark.parametrize(
    ("name", "library", "classes"),
    [
        ("swin_t", "torchvision", {"ShiftedWindowAttention": 12}),
        ("swin_v2_t", "torchvision", {"ShiftedWindowAttentionV2": 12}),
        ("swin3d_t", "torchvision", {"ShiftedWindowAttention3d": 12}),
        ("fasterrcnn_resnet50_fpn", "torchvision", {}),
        ("swin", "transformers", {"SwinLayer": 12}),
        ("swinv2", "transformers", {"Swinv2Layer": 12}),
        ("donut-swin", "transformers", {"DonutSwinLayer": 12}),
    ],
)
def test_explain_other_libraries(name, library, classes, capsys):
    pytest.importorskip(library)
    assert main(["explain", "-m", name, "--backend", "reference", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["library"].startswith(f"{library} ")
    assert Counter(row["class_name"] for row in found["modules"] if row["action"] == "replace") == classes


def test_explain_a_configuration(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(depths=[1, 1], num_heads=[2, 4], embed_dim=16)
    for architectures, path in ((None, "encoder"), (["SwinForImageClassification"], "swin.encoder")):
        config.architectures = architectures
        config.save_pretrained(tmp_path)
        assert main(["explain", "-m", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert f"\n{path}.layers.0.blocks.0" in out and "swinops.patch would replace 2 of the" in out
    assert "there is no such folder with a config.json" in failure(capsys, "explain", "-m", str(tmp_path / "none"))
    (tmp_path / "config.json").write_text("{}")
    assert "transformers cannot build" in failure(capsys, "explain", "-m", str(tmp_path))


def test_explain_an_unknown_name(capsys):
    pytest.importorskip("timm")
    text = failure(capsys, "explain", "-m", "swin_tinny_patch4_window7_224")
    assert "got 'swin_tinny_patch4_window7_224': did you mean swin_tiny_patch4_window7_224" in text
    assert "got 'qqqq': each library lists its models" in failure(capsys, "explain", "-m", "qqqq")
    assert "Invalid pretrained tag (mars)" in failure(capsys, "explain", "-m", f"{SWIN}.mars")


@pytest.mark.parametrize("form", ["csv", "json"])
@needs_bench
def test_bench_ops(form, tmp_path, capsys):
    """One op alone; what is said before the subcommand counts too."""
    path = tmp_path / "new" / "rows"
    arguments = ["bench", "--quick", "ops", "--op", "window_merge", "--precision", "bfloat16", "--json"]
    assert main([*arguments, "--results-file", str(path), "--results-format", form]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)["ops"]
    assert {(row["op"], row["dtype"], row["status"]) for row in rows} == {("window_merge", "bfloat16", "ok")}
    assert {"pytorch", "pytorch-compiled", "swinops-reference"} <= {row["impl"] for row in rows}
    assert {row["compile"] for row in rows} == {"", "eager backend"}
    assert "window_merge, 1 x 14 x 14 x 32" in err and str(path) in err
    if form == "json":
        assert json.loads(path.read_text()) == rows
    else:
        with path.open(newline="") as file:
            assert [row["impl"] for row in csv.DictReader(file)] == [row["impl"] for row in rows]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("compiled", [[], ["--torchcompile"], ["--torchcompile", "aot_eager"]])
@needs_bench
def test_bench_models(compiled, tmp_path, monkeypatch, capsys):
    """Several models, only eager unless --torchcompile; results go to stdout, and to no file that was not asked for."""
    from swinops.benchmarks import models

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "CUT", models.CUT | {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)})
    names = [SWIN, "swin_s3_tiny_224"] if not compiled else [SWIN]
    rest = ["-b", "2", "--img-size", "28", "--bench", "train" if not compiled else "inference"]
    assert main(["bench", "models", "--quick", "-m", *names, *rest, *compiled, "--results-file", "rows.json"]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.json"]
    if compiled:
        impls = [f"{name}{end}" for name in ("timm", "patched", "swinops") for end in ("", "-compiled")]
        assert [row["impl"] for row in rows] == impls
        record = "eager backend" if compiled == ["--torchcompile"] else "aot_eager backend"
        assert {row["compile"] for row in rows} == {"", record}
        assert {(row["infer_status"], row["infer_batch_size"], row["infer_img_size"]) for row in rows} == {
            ("ok", 2, 28)
        }
        assert {row["train_status"] for row in rows} == {""}
    else:
        wanted = [(f"{name}, cut", impl) for name in names for impl in ("timm", "patched", "swinops")][:-1]
        assert [(row["model"], row["impl"]) for row in rows] == wanted
        assert {(row["train_status"], row["infer_status"]) for row in rows} == {("ok", "")}
    captured = capsys.readouterr()
    assert "images/s" in captured.out and "images/s" not in captured.err and "100%" in captured.err


@needs_bench
def test_interrupted(tmp_path):
    """One line, status 130, and no file."""
    words = [sys.executable, "-m", "swinops", "bench", "ops", "--results-file", str(tmp_path / "rows.csv")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    process = subprocess.Popen(
        words,
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what a shell runs in the background ignores the signal, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if line.startswith("a copy moves"):
            break
    while process.poll() is None:  # Python drops an interrupt that arrives within a finalizer
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            continue
    # one that arrives within exec() makes Python end itself by the signal, which is 130 to a shell too
    assert process.returncode in (130, -signal.SIGINT)
    assert err.splitlines()[-1] == "swinops: interrupted" and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves():
    """``swinops info --json | head -1`` says no more than its line."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "swinops", "info", "--json"]
    process = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert process.returncode == 141 and process.stderr == ""
