"""The ``swinops`` command."""

import argparse
import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import swinops
from swinops import backends, reference
from swinops.backends import cuda
from swinops.benchmarks import command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="swinops", description=swinops.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    info_parser = commands.add_parser("info", help="versions, the GPU, and which backends can run here")
    info_parser.add_argument("--json", action="store_true", help="the same as JSON")
    info_parser.set_defaults(run=info)

    bench_parser = commands.add_parser("bench", help="a photograph before and after patch, then timings")
    command.add_arguments(bench_parser)

    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def info(arguments: argparse.Namespace) -> int:
    facts = environment()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    for key, value in facts.items():
        if key != "backends":
            print(f"{key:<11}{value or 'none'}")
    print(f"\nBackends on {facts['device']}:")
    for backend, reasons in facts["backends"].items():
        for reason in dict.fromkeys(reasons.values()):  # each once, in order
            ops = ", ".join(op for op in reasons if reasons[op] == reason)
            print(f"{backend:<11}{'runs ' + ops if reason is None else f'cannot run {ops}: {reason}'}")
    return 0


def environment() -> dict[str, Any]:
    """What a bug report needs. Under "backends", for each backend and op, None or the reason why it cannot run here."""
    gpu = torch.cuda.is_available()
    x = torch.empty(0, 1, 1, 1, 32, device="cuda" if gpu else "cpu")
    ops = [name for name in reference.__all__ if name != "why_not" and not name.endswith("_backward")]
    extension, missing = cuda.extension()
    return {
        "swinops": swinops.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", without CUDA"),
        "triton": _installed("triton"),
        "extension": missing or f"CUDA {extension.cuda_version}, architectures {extension.archs}",
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "device": x.device.type,
        "backends": {name: {op: backends.why_not(name, x, op) for op in ops} for name in backends.MODULES},
    }


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
