"""What a call of the cuda backend costs the host: every part is timed, and none costs less than the one inside it."""

import pytest
import torch

pytest.importorskip("triton")

from swinops.backends import cuda
from swinops.benchmarks import launch, nvcc

GPU = torch.cuda.is_available()
REASON = cuda.why_not(torch.empty(1, 1, device="cuda"), "window_attention") if GPU else nvcc.why_not()


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_parts_of_a_call(capsys):
    before = cuda.extension, cuda.why_not, torch.cuda.device, torch.cuda.current_stream
    assert launch.main(["--rounds", "5"]) == 0
    assert (cuda.extension, cuda.why_not, torch.cuda.device, torch.cuda.current_stream) == before
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["microseconds", "median", "20%", "80%", "in", "adds"]
    assert (launch.LAUNCHES_NOTHING in lines) == (not GPU)
    times = {}
    for line in lines[:7]:
        *name, median, low, high, adds = line.split()
        assert 0 < float(low) <= float(median) <= float(high)
        assert float(adds) > 0
        times[" ".join(name)] = float(median)
    forward, backward = ([f"{way} {part}" for part in launch.PARTS] for way in ("forward", "backward"))
    assert list(times) == [*forward, *backward[:2], "torch add of 8 numbers", "torch two new_empty"]
    assert times[forward[0]] < times[forward[1]] < times[forward[2]]
    assert times[backward[0]] < times[backward[1]]


def test_says_why_nothing_can_be_timed(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(nvcc, "why_not", lambda: "there is no compiler")
    for arguments, message in ([], "there is no compiler"), (["--rounds", "0"], "--rounds must be at least 1, got 0"):
        with pytest.raises(SystemExit) as refusal:
            launch.main(arguments)
        assert refusal.value.code == 2
        assert message in capsys.readouterr().err
