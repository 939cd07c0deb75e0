"""examples/train.py, short: it learns, goes on from a kill with the same losses, and runs on two processes."""

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

for needed in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(needed)

SCRIPT = Path(__file__).parents[1] / "examples/train.py"
SHORT = ["--epochs", "2", "--warmup-epochs", "0", "--train-images", "128", "--batch-size", "16", "--lr", "1e-3"]
STEPS = 8  # of an epoch
TOTAL = 2 * STEPS
BEYOND = STEPS + 3  # three steps that no checkpoint holds

# one worker runs them all: they share a run
pytestmark = [
    pytest.mark.xdist_group("train"),
    pytest.mark.skipif(not SCRIPT.exists(), reason="the examples are not here"),
]


def start(folder, *arguments, launcher=()):
    command = [
        sys.executable,
        *launcher,
        str(SCRIPT),
        *SHORT,
        "--no-amp",
        *arguments,
        "--device",
        "cpu",
        "--output",
        str(folder),
    ]
    # one thread: beside other tests two only wait for each other
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, output


def rows(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def logged(folder):
    """The whole lines of the log."""
    path = folder / "log.csv"
    return [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")] if path.exists() else []


def wait(process, folder, steps):
    """Until so many steps are logged: then the lines of the log."""
    deadline = time.monotonic() + 200
    while len(logged(folder)) < 1 + steps:
        assert process.poll() is None and time.monotonic() < deadline, finish(process)[1]
        time.sleep(0.01)
    return logged(folder)


def kill(process):
    """With what it started; returns its exit status."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), 9)
    if process.args[1] == str(SCRIPT):  # torchrun ends by itself
        process.kill()
    return finish(process)[0]


def saved_step(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("train") / "new" / "whole"
    status, output = finish(start(folder))
    assert status == 0, output
    return folder


def test_it_learns_and_leaves_its_record(whole):
    found = rows(whole)
    assert [int(row["step"]) for row in found] == list(range(TOTAL))
    losses = [float(row["loss"]) for row in found]
    assert sum(losses[-STEPS:]) < 0.97 * sum(losses[:STEPS])
    tested = [row for row in found if row["test_accuracy"]]
    assert [int(row["step"]) for row in tested] == [STEPS - 1, TOTAL - 1]
    assert all(0 <= float(row[name]) <= 1 for row in tested for name in ("test_accuracy", "ema_accuracy"))
    assert float(found[0]["lr"]) == 1e-3 > float(found[STEPS]["lr"]) > float(found[-1]["lr"]) > 0
    assert saved_step(whole) == TOTAL
    assert (whole / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in whole.iterdir()} == {"log.csv", "checkpoint.pt", "curve.png"}


def test_a_killed_run_goes_on_with_the_same_losses(whole, tmp_path):
    process = start(tmp_path)
    before = wait(process, tmp_path, BEYOND)
    assert kill(process) == -9
    assert 0 < saved_step(tmp_path) < len(before) - 1 < TOTAL
    status, output = finish(start(tmp_path))
    assert status == 0, output
    assert (tmp_path / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()


def test_two_processes_go_on_after_a_kill(tmp_path):
    """They repeat the steps since the checkpoint with the same losses."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(tmp_path / "two", "--drop-path", "0", launcher=launcher)
    before = wait(process, tmp_path / "two", BEYOND)
    assert kill(process) == 1
    assert 0 < saved_step(tmp_path / "two") < len(before) - 1
    status, output = finish(start(tmp_path / "two", "--drop-path", "0", launcher=launcher))
    assert status == 0, output
    after = logged(tmp_path / "two")
    assert after[: len(before)] == before and len(after) == 1 + TOTAL

    # without stochastic depth, which each process draws for itself, one process has their losses up to rounding
    process = start(tmp_path / "one", "--drop-path", "0")
    wait(process, tmp_path / "one", BEYOND)
    kill(process)
    for two, one in zip(rows(tmp_path / "two")[:BEYOND], rows(tmp_path / "one")[:BEYOND], strict=True):
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-3)


def test_autocast(whole, tmp_path):
    """The same first loss, up to bfloat16."""
    process = start(tmp_path, "--amp")
    wait(process, tmp_path, 1)
    kill(process)
    amp, exact = (float(rows(folder)[0]["loss"]) for folder in (tmp_path, whole))
    assert amp == pytest.approx(exact, abs=0.05) and amp != exact


def test_other_settings_do_not_go_on(whole):
    before = logged(whole)
    status, output = finish(start(whole, "--lr", "0.1"))
    assert status == 1 and "holds a run with other settings (lr 0.001)" in output
    assert logged(whole) == before


def test_a_log_that_lost_steps_does_not_go_on(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy/log.csv").write_bytes(b"".join(logged(whole)[:-1]))
    status, output = finish(start(tmp_path / "copy"))
    assert status == 1 and f"must hold the {TOTAL} steps of the checkpoint, got {TOTAL - 1}" in output
    assert logged(tmp_path / "copy") == logged(whole)[:-1]


@pytest.mark.parametrize("option, value", [("--batch-size", "0"), ("--train-images", "9"), ("--warmup-epochs", "2")])
def test_rejects_bad_arguments(option, value, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("train_example", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, option, value])
    with pytest.raises(SystemExit, match="2"):
        example.parse()
    message = capsys.readouterr().err
    assert f"error: {option} must be " in message and message.endswith(f"got {value}\n")
