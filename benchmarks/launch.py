"""What a call of the cuda backend costs the host: ``python -m swinops.benchmarks.launch``.

A GPU works beside the host, and waits for it where kernels are shorter than what is printed here. The call is a small
one, and each part of it is timed by itself: the extension with addresses and shape at hand, the function of
swinops/backends/cuda.py around it, which looks the shape up and allocates, and the public op around that.
"""

import argparse
import contextlib
import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import swinops
from swinops.backends import cuda
from swinops.benchmarks import harness, nvcc
from swinops.text import aligned

CALLS = 200  # in one timing: few enough that a GPU's queue never fills, which the host would then wait for
LAUNCHES_NOTHING = "No GPU here, and launches do nothing: the driver's part is not in these, nor are guard and stream."
PARTS = ("the extension", "backends/cuda.py", "the public op")
ADD = "torch", "add of 8 numbers"


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Within, the backend takes CPU tensors and calls the extension of nvcc.py, whose launches do nothing."""
    extension = nvcc.extension().module
    backend: dict[str, Any] = {
        "extension": lambda: (extension, None),
        "limits": lambda device: (132, 227 << 10),  # an H100's
        "why_not": lambda *call: None,
    }
    stream = SimpleNamespace(cuda_stream=0)
    torch_cuda: dict[str, Any] = {"device": contextlib.nullcontext, "current_stream": lambda: stream}
    with mock.patch.multiple(cuda, **backend), mock.patch.multiple(torch.cuda, **torch_cuda):
        yield


def calls(device: torch.device) -> dict[tuple[str, str], Callable[[], object]]:
    """Of four windows of 49 tokens and three heads, by direction and part."""
    qkv = torch.randn(1, 14, 14, 3, 3, 32, dtype=torch.bfloat16, device=device)
    dqkv, bias = torch.empty_like(qkv), torch.randn(3, 49, 49, device=device)
    dbias, x = torch.empty_like(bias), torch.randn(8, device=device)
    (q, k, v), (dq, dk, dv) = qkv.unbind(-3), dqkv.unbind(-3)
    settings = (7, 7), (3, 3), 32**-0.5, "pad_roll", -100.0
    out, lse = cuda.window_attention(q, k, v, bias, None, *settings)
    dout = torch.randn_like(out)

    _C, address = cuda.extension()[0], cuda.address
    strides = [dout.stride()[:-1], dq.stride()[:-1]]
    shape = cuda.describe(q, None, bias, (), (), *settings)
    backward_shape = cuda.describe(q, None, bias, *strides, *settings)
    read = [address(tensor) for tensor in (q, k, v, None, bias, None)]
    filled = [address(tensor) for tensor in (dq, dk, dv, None, dbias, None)]
    workspace = torch.empty(_C.attention_workspace(backward_shape, read, filled), device=device)
    stream = torch.cuda.current_stream().cuda_stream
    forward_call = shape, read, address(out), address(lse), stream
    backward_call = backward_shape, address(dout), read, address(out), address(lse), filled, [0, 0, 0]

    extension, backend, op = PARTS
    return {
        ("forward", extension): lambda: _C.attention(*forward_call),
        ("forward", backend): lambda: cuda.window_attention(q, k, v, bias, None, *settings),
        ("forward", op): lambda: swinops.window_attention(q, k, v, bias, window_size=7, shift_size=3, backend="cuda"),
        ("backward", extension): lambda: _C.attention_backward(*backward_call, address(workspace), stream),
        ("backward", backend): lambda: cuda.window_attention_backward(
            dout, q, k, v, bias, None, out, lse, dq, dk, dv, dbias, None, *settings
        ),
        ADD: lambda: torch.add(x, 1),
        ("torch", "two new_empty"): lambda: (q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)),
    }


def measure(device: torch.device, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Microseconds of each call in each round, which times all of them, one after the other."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    timers = {name: timeit.Timer(call) for name, call in calls(device).items()}
    times: dict[tuple[str, str], list[float]] = {name: [] for name in timers}
    for _ in range(1 + rounds):  # the first warms up
        for name, timer in timers.items():
            times[name].append(timer.timeit(CALLS) / CALLS * 1e6)
            synchronize()
    return {name: values[1:] for name, values in times.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time what a call of the cuda backend costs the host.")
    parser.add_argument("--rounds", type=int, default=25, help=f"timings of {CALLS} calls each")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.empty(1, 1, device=device)
    reason = nvcc.why_not() if device.type == "cpu" else cuda.why_not(x, "window_attention")
    if reason is not None:
        parser.error(reason)
    with contextlib.nullcontext() if device.type == "cuda" else launching_nothing():
        found = measure(device, arguments.rounds)
    rows = [("", "microseconds", "median", "20%", "80%", "in adds")]
    for name, times in found.items():
        adds = harness.paired_ratio(times, found[ADD]).median
        rows.append((*name, *(f"{time:.2f}" for time in harness.spread(times)), f"{adds:.1f}"))
    print("\n".join(aligned(rows)))
    print(f"{harness.device_name(device)}, torch {torch.__version__}, commit {harness.commit()}")
    if device.type == "cpu":
        print(LAUNCHES_NOTHING)
    return 0


if __name__ == "__main__":
    sys.exit(main())
