"""The ``swinops`` command."""

import argparse
import dataclasses
import itertools
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import swinops
from swinops import backends, published, reference, verify
from swinops.backends import choice, cuda
from swinops.benchmarks import command, gpu_check
from swinops.text import aligned

WINDOWS, HEAD_DIM = (7, 8, 12, 16), 32  # of published models


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="swinops",
        description=swinops.__doc__,
        epilog="example:\n  swinops info\n\nEach command has --help, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="command")

    summary = "versions, the GPU, and which backends can run here"
    info_parser = add_command(commands, "info", summary, "example:\n  swinops info --json")
    info_parser.add_argument("--json", action="store_true", help="the same as JSON")
    info_parser.set_defaults(run=info)

    summary = "what patch would replace in a model of timm, torchvision or Transformers, and why not the rest"
    example = "example:\n  swinops explain --model swin_tiny_patch4_window7_224"
    explain_parser = add_command(commands, "explain", summary, example)
    explain_parser.add_argument(
        "--model",
        "-m",
        required=True,
        metavar="NAME",
        help="of timm, torchvision, or Transformers (swinv2, a folder with a config.json, a name on the hub)",
    )
    names = ("auto", *backends.MODULES)
    explain_parser.add_argument("--backend", choices=names, default="auto", help="as in patch (auto)")
    explain_parser.add_argument("--json", action="store_true", help="the same as JSON")
    explain_parser.set_defaults(run=lambda arguments: explain(explain_parser, arguments))

    summary = "every op against float64, on every backend and in every dtype that can run here"
    verify.add_arguments(add_command(commands, "verify", summary, verify.EXAMPLE))

    summary = "a photograph before and after patch, then timings"
    command.add_arguments(add_command(commands, "bench", summary, command.EXAMPLES))

    summary = "everything that only a GPU can say of the kernels, in ten minutes"
    gpu_check.add_arguments(add_command(commands, "gpu-check", summary, gpu_check.EXAMPLES))

    arguments = parser.parse_args(argv)
    if "run" not in arguments:
        parser.error(f"name a command, one of {', '.join(commands.choices)}; each has --help, with an example")
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("swinops: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # swinops info | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written there at exit
        return 141
    return status


def add_command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # or --torchcompile-m would be one
    )
    return parser


def info(arguments: argparse.Namespace) -> int:
    facts = environment()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    for key, value in facts.items():
        if key not in ("backends", "choices"):
            print(f"{key:<11}{value or 'none'}")
    print(f"\nBackends on {facts['device']}:")
    for backend, reasons in facts["backends"].items():
        for reason in dict.fromkeys(reasons.values()):  # each once, in order
            ops = ", ".join(op for op in reasons if reasons[op] == reason)
            print(f"{backend:<11}{'runs ' + ops if reason is None else f'cannot run {ops}: {reason}'}")
    print('\nThe kernel that backend="auto" takes where both run, and the times that decide:')
    print("\n".join(aligned(list(choice_table(facts["choices"])))))
    return 0


def choice_table(choices: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """A line for what is the same but for the window, with a cell for each window."""
    yield "op", "direction", "arch", "dtype", *(f"window {window}" for window in WINDOWS), "basis"
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for each in choices:
        if each["times"]:
            line = (
                each["op"],
                each["direction"],
                f"sm_{each['arch']}",
                each["dtype"],
                f"{each['basis']}, {each['unit']}",
            )
            order = sorted(each["times"], key=lambda name: name != each["backend"])
            cell = ", ".join(f"{name} {each['times'][name]:.3g}" for name in order)
        else:  # whatever the direction, the architecture and the dtype
            line, cell = (each["op"], "", "", "", each["basis"]), each["backend"]
        lines.setdefault(line, {})[each["window"]] = cell
    for (*start, basis), cells in lines.items():
        yield *start, *(cells.get(window, "") for window in WINDOWS), basis


def choices(archs: Sequence[int]) -> Iterator[dict[str, Any]]:
    """What "auto" takes of each op that has several kernels, on those architectures, and by which row."""
    directions = {
        op: ("forward",) if op in ("window_partition", "window_merge") else ("forward", "backward") for op in cuda.OPS
    }
    for op, arch, dtype, window in itertools.product(cuda.OPS, archs, ("bfloat16", "float16", "float32"), WINDOWS):
        for direction in directions[op]:
            row = choice.nearest(op, direction, arch, dtype, window**2, HEAD_DIM)
            yield {
                "op": op, "direction": direction, "arch": arch, "dtype": dtype, "window": window,
                "backend": row.order[0] if row else choice.KERNELS[0],
                "times": {name: getattr(row, name) for name in choice.KERNELS} if row else {},
                "unit": row.unit if row else "",
                "basis": row.basis if row else f"no times: {' before '.join(choice.KERNELS)}",
            }  # fmt: skip


def environment() -> dict[str, Any]:
    """What a bug report needs.

    Under "backends", for each backend and op, None or the reason why it cannot run here; under "choices" what "auto"
    takes on this GPU, or on three where there is none.
    """
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
        "choices": list(choices([choice.architecture(x.device)] if gpu else (80, 90, 100))),
    }


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def explain(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = arguments.model
    try:
        library, model = published.build(name, device)
    except ImportError as error:
        parser.error(str(error))
    except ValueError as error:
        parser.error(f"--model {error}")
    table = swinops.explain(model, backend=arguments.backend)
    if arguments.json:
        rows = [dataclasses.asdict(row) for row in table]
        facts = {"model": name, "library": library, "backend": arguments.backend, "device": device, "modules": rows}
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{name} of {library} on {device}, backend {arguments.backend}\n\n{table}\n")
    replaced = sum(row.action == "replace" for row in table)
    print(f"swinops.patch would replace {replaced} of the {sum(1 for _ in model.modules())} modules")
    return 0
