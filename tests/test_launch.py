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


@pytest.mark.skipif(GPU or REASON is not None, reason="launches are real" if GPU else str(REASON))
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype, tf32", [(torch.bfloat16, False), (torch.float32, True), (torch.float32, False)])
def test_the_largest_windows_fit(dtype, tf32, head_dim, monkeypatch):
    """Of as many tokens as the backend takes, where a block can have the least shared memory: 99 KB."""
    window = 64, 128
    q, k, v = torch.zeros(3, 1, *window, 1, head_dim, dtype=dtype).unbind()
    settings = window, (32, 64), 1.0, "pad_roll", -100.0
    with launch.launching_nothing():
        monkeypatch.setattr(cuda, "limits", lambda device: (132, 99 << 10))
        monkeypatch.setattr(cuda, "tf32_allowed", lambda: tf32)
        cuda.attention_shape.cache_clear()
        out, lse = cuda.window_attention(q, k, v, None, None, *settings)
        gradients = [torch.empty_like(q) for _ in range(3)]
        cuda.window_attention_backward(out, q, k, v, None, None, out, lse, *gradients, None, None, *settings)
        larger = torch.zeros(3, 1, 64, 129, 1, head_dim, dtype=dtype).unbind()
        with pytest.raises(RuntimeError, match="invalid"):
            cuda.window_attention(*larger, None, None, (64, 129), *settings[1:])


def test_says_why_nothing_can_be_timed(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(nvcc, "why_not", lambda: "there is no compiler")
    for arguments, message in ([], "there is no compiler"), (["--rounds", "0"], "--rounds must be at least 1, got 0"):
        with pytest.raises(SystemExit) as refusal:
            launch.main(arguments)
        assert refusal.value.code == 2
        assert message in capsys.readouterr().err
