"""``swinops bench``: a photograph through timm's Swin before and after ``patch``, then everything side by side."""

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from swinops.benchmarks.harness import Settings
    from swinops.benchmarks.models import Subject

HERE = Path(__file__).parent
BENCHMARKS = {  # of each op, the file of this folder
    "window_partition": "cyclic_shift",
    "window_merge": "cyclic_shift",
    "relative_position_bias": "relative_position_bias",
    "continuous_position_bias": "continuous_position_bias",
    "window_attention": "window_attention",
    "cosine_attention": "cosine_attention",
    "layer_norm": "layer_norm",
    "add_layer_norm": "layer_norm",
    "layer_norm_add": "layer_norm",
    "patch_merging_norm": "patch_merging",
}
PRECISIONS = ("float32", "bfloat16", "float16", "amp", "tf32")
FORMATS = ("csv", "json")
EVERYTHING = ("photograph", "ops", "models", "chart")
EXAMPLES = """examples:
  swinops bench                                   the photograph, every op and Swin-T, with CSV files and a chart
  swinops bench ops --op window_attention --json
  swinops bench models -m swin_base_patch4_window7_224 -b 64 --precision amp --torchcompile --bench both"""
OPS_EXAMPLE = """example:
  swinops bench ops --op window_attention layer_norm --precision bfloat16 --results-file ops.csv"""
MODELS_EXAMPLE = """example:
  swinops bench models -m swin_tiny_patch4_window7_224 swin_base_patch4_window7_224 -b 64 --precision amp
      --channels-last --torchcompile --bench both --results-file models.json"""
Rows = dict[str, list[dict[str, Any]]]  # of each part that was measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(op=None, compiled=True, run=partial(run, parser, EVERYTHING))
    add_common(parser)
    add_model(parser, several=False)
    parser.add_argument("--full", action="store_true", help="also training and SwinV2-B; on a GPU larger windows too")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where ops.csv, models.csv and bench.png go")

    # what a subcommand is not told, it takes from the options before its name: hence no defaults
    options: dict[str, Any] = {"formatter_class": parser.formatter_class, "argument_default": argparse.SUPPRESS}
    parts = parser.add_subparsers(title="only a part of it", metavar="[part]")
    ops = parts.add_parser("ops", help="each op", epilog=OPS_EXAMPLE, allow_abbrev=False, **options)
    ops.description = "Each op of this package beside plain PyTorch and others' code, forward and backward."
    add_common(ops)
    ops.add_argument(
        "--op", nargs="+", choices=BENCHMARKS, metavar="NAME", help=f"only these of {', '.join(BENCHMARKS)}"
    )
    ops.add_argument("--full", action="store_true", help="on a GPU also larger windows")
    ops.set_defaults(run=partial(run, ops, ("ops",)))
    models = parts.add_parser("models", help="whole models", epilog=MODELS_EXAMPLE, allow_abbrev=False, **options)
    models.description = "timm's Swins as they are, after patch, and this package's models with the same parameters."
    add_common(models)
    add_model(models, several=True)
    models.set_defaults(compiled=False, run=partial(run, models, ("models",)))


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a cut model, three rounds: does it run?")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of what is timed; amp, for models, is autocast to bfloat16 (bfloat16, amp to train; float32 on a CPU)",
    )
    parser.add_argument(
        "--torchcompile",
        nargs="?",
        const="",
        metavar="BACKEND",
        help="time models under torch.compile too, with its backend or Inductor's mode (inductor; eager if --quick)",
    )
    parser.add_argument("--torchcompile-mode", metavar="MODE", help="of Inductor, such as max-autotune (default)")
    parser.add_argument("--results-file", type=Path, metavar="PATH", help="write rows there, models' if there are any")
    parser.add_argument("--results-format", choices=FORMATS, help="of that file (by its suffix)")
    parser.add_argument("--json", action="store_true", help="all rows as JSON on stdout; the tables go to stderr")


def add_model(parser: argparse.ArgumentParser, several: bool) -> None:
    nargs = {"nargs": "+"} if several else {}
    parser.add_argument(
        "--model", "-m", **nargs, metavar="NAME", help="of timm's Swin and Swin V2 (a tiny one of each)"
    )
    parser.add_argument(
        "--batch-size", "-b", type=positive, metavar="N", help="halved while out of memory (1, or 128 on a GPU)"
    )
    parser.add_argument("--img-size", type=positive, metavar="N", help="of the model (the one in its name)")
    parser.add_argument("--checkpoint", metavar="PATH", help="parameters for the model, as .safetensors, .pth or .bin")
    parser.add_argument("--channels-last", action="store_true", help="images and weights in that memory format")
    parser.add_argument("--bench", choices=("inference", "train", "both"), help="what is timed (inference)")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def run(parser: argparse.ArgumentParser, parts: tuple[str, ...], arguments: argparse.Namespace) -> int:
    """Returns 1 where an output of this package was wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_installed(parser, parts)
    check_arguments(parser, parts, arguments, device)
    subjects: list[Subject] = []
    try:
        outputs = make_outputs(parts, arguments, device)
        if "models" in parts:
            subjects = make_subjects(arguments, device)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    ops = chosen_ops(arguments.op) if "ops" in parts else {}

    rows: Rows = {}
    right = True
    with make_settings(arguments, device) as settings:
        settings.bar.total = length(parts, ops, subjects, settings)
        introduce(ops, settings)
        if "photograph" in parts:
            right = demonstrate(subjects[0], arguments.checkpoint is None, settings)
        if "ops" in parts:
            rows["ops"] = measure_ops(ops, settings)
        if "models" in parts:
            rows["models"] = measure_models(subjects, settings)
        settings.bar.set_description("writing")
        for path, write in outputs.items():
            write(path, rows)
        settings.bar.update(1)
        settings.bar.set_description("done")

    if outputs:
        settings.say("\nwritten: " + ", ".join(map(str, outputs)))
    if arguments.json:
        print(json.dumps(rows, indent=2))
    states = ("status", "infer_status", "train_status")
    wrong = {row["impl"] for part in rows.values() for row in part if "wrong" in map(row.get, states)}
    if wrong or not right:
        settings.say(f"wrong results: {', '.join(sorted(wrong)) or 'the photograph'}")
    own = [impl for impl in wrong if impl.startswith(("swinops", "patched"))]
    return 1 if own or not right else 0


def check_installed(parser: argparse.ArgumentParser, parts: tuple[str, ...]) -> None:
    needed = {"photograph": "PIL", "chart": "matplotlib"}
    try:
        importlib.import_module("tqdm")
        for part in parts:
            if part in needed:
                importlib.import_module(needed[part])
        if "models" in parts:
            from swinops.published import import_library

            import_library("timm")
    except ImportError as error:
        parser.error(f"the benchmarks need {error.name or error}: pip install 'swinops[bench]'")


def check_arguments(
    parser: argparse.ArgumentParser, parts: tuple[str, ...], arguments: argparse.Namespace, device: torch.device
) -> None:
    """End with a sentence where arguments contradict each other, the part that is asked for, or the machine."""
    alien = []
    if "models" not in parts:
        alien += ["model", "batch_size", "img_size", "checkpoint", "channels_last", "bench"]
    if "chart" not in parts:
        alien += ["output"]
    if "ops" not in parts:
        alien += ["full"]
    for name in alien:
        if getattr(arguments, name):
            parser.error(f"--{name.replace('_', '-')} is not an argument of {parser.prog}")
    if arguments.precision == "amp" and "models" not in parts:
        parser.error("--precision of ops must be float32, bfloat16, float16 or tf32, got 'amp', which is for models")
    if arguments.precision == "tf32" and device.type != "cuda":
        parser.error(f"--precision on a CPU must be one of {', '.join(PRECISIONS[:-1])}, got 'tf32', which GPUs have")
    if arguments.checkpoint and isinstance(arguments.model, list) and len(arguments.model) > 1:
        parser.error(f"--checkpoint goes with one --model, got {len(arguments.model)}")
    if arguments.torchcompile_mode is not None and "ops" not in parts and arguments.torchcompile is None:
        parser.error("--torchcompile-mode needs --torchcompile: without it no model is compiled")
    check_compiler(parser, arguments)
    path, form = arguments.results_file, arguments.results_format
    suffix = path.suffix[1:] if path and path.suffix[1:] in FORMATS else None
    if form and not path:
        parser.error(f"--results-format needs --results-file, got {form!r} alone")
    if path and not form and not suffix:
        parser.error(f"--results-file must end in .csv or .json where no --results-format is given, got {path}")
    if form and suffix and form != suffix:
        parser.error(f"--results-format must be what the name of the file says, {suffix!r}, got {form!r}")


def check_compiler(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    from torch._inductor import list_mode_options

    asked, mode = arguments.torchcompile, arguments.torchcompile_mode
    modes, backends = list(list_mode_options()), torch.compiler.list_backends(())
    if asked and asked not in [*backends, *modes]:
        known = ", ".join(torch.compiler.list_backends())
        parser.error(f"--torchcompile must be a backend ({known}) or a mode ({', '.join(modes)}), got {asked!r}")
    if mode and mode not in modes:
        parser.error(f"--torchcompile-mode must be one of {', '.join(modes)}, got {mode!r}")
    if mode and asked not in (None, "", "inductor", mode):
        parser.error(f"--torchcompile-mode {mode} contradicts --torchcompile {asked}")


def compiler(arguments: argparse.Namespace) -> tuple[str, str]:
    """Backend of torch.compile, and mode of Inductor."""
    from torch._inductor import list_mode_options

    asked, mode = arguments.torchcompile, arguments.torchcompile_mode
    if asked in list_mode_options():
        asked, mode = "inductor", asked
    if arguments.quick and not asked and not mode:  # graphs, but no code: that takes minutes on a CPU
        asked = "eager"
    return asked or "inductor", mode or "default"


def make_outputs(
    parts: tuple[str, ...], arguments: argparse.Namespace, device: torch.device
) -> dict[Path, Callable[[Path, Rows], Any]]:
    """Each file that is to be written, which the system would allow now, and what writes the rows to it."""
    from swinops.benchmarks import harness

    outputs: dict[Path, Callable[[Path, Rows], Any]] = {}
    if "chart" in parts:
        from swinops.benchmarks import plot

        folder = output_folder(arguments, harness.device_name(device))
        outputs[folder / "ops.csv"] = lambda path, rows: harness.write_csv(path, rows["ops"])
        outputs[folder / "models.csv"] = lambda path, rows: harness.write_csv(path, rows["models"])
        outputs[folder / "bench.png"] = lambda path, rows: plot.draw(rows["ops"], rows["models"], path)
    if arguments.results_file:
        form = arguments.results_format or arguments.results_file.suffix[1:]
        write = {"csv": harness.write_csv, "json": harness.write_json}[form]
        outputs[arguments.results_file] = lambda path, rows: write(path, rows.get("models") or rows["ops"])
    for path in outputs:
        try:
            harness.check_writable(path)
        except OSError as error:
            name = "--results-file" if path == arguments.results_file else "--output"
            raise OSError(f"{name} must be writable, and {path} is not: {error.strerror or error}") from error
    return outputs


def output_folder(arguments: argparse.Namespace, device: str) -> Path:
    """``--output``; else results/<device> in a checkout, and benchmarks-results elsewhere and for ``--quick``."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    if arguments.output:
        return Path(arguments.output)
    if (HERE.parent / "pyproject.toml").exists() and os.access(HERE, os.W_OK) and not arguments.quick:
        return HERE / "results" / (slug if torch.cuda.is_available() else f"cpu-{slug}")
    return Path("benchmarks-results")


def make_subjects(arguments: argparse.Namespace, device: torch.device) -> "list[Subject]":
    from swinops.benchmarks import models

    gpu, quick = device.type == "cuda", arguments.quick
    wanted = arguments.bench or ("both" if arguments.full else "inference")
    modes = [mode for mode, name in (("infer", "inference"), ("train", "train")) if wanted in (name, "both")]
    usual = {"infer": "bfloat16", "train": "amp"} if gpu else dict.fromkeys(models.MODES, "float32")
    cut = models.CUT if quick and not arguments.checkpoint else {}
    names = [arguments.model] if isinstance(arguments.model, str) else arguments.model
    if not names and arguments.checkpoint:
        names = models.SMALL[:1]
    elif not names:
        names = models.MODELS if gpu or arguments.full else models.SMALL
    subjects = []
    for name in dict.fromkeys(names):
        size = arguments.img_size or (56 if quick else size_in(name) or 224)
        model = models.create(name, size, arguments.checkpoint, **cut)
        options = {"img_size": size, **cut, "num_classes": model.num_classes}
        subjects.append(
            models.Subject(
                name=f"{name}, cut" if cut else name,
                model=model,
                ours=models.own_model(name, **options),
                batch=arguments.batch_size or (128 if gpu and not quick else 1),
                precisions={mode: models.PRECISIONS[arguments.precision or usual[mode]] for mode in modes},
                channels_last=arguments.channels_last,
                compiled=arguments.compiled or arguments.torchcompile is not None,
            )
        )
    return subjects


def size_in(name: str) -> int | None:
    """The image size that timm puts at the end of a model's name."""
    match = re.search(r"_(\d+to)?(\d{3})(\.|$)", name)
    return int(match[2]) if match else None


@contextmanager
def make_settings(arguments: argparse.Namespace, device: torch.device) -> "Iterator[Settings]":
    import tqdm

    from swinops.benchmarks import harness

    asked = arguments.precision or ("bfloat16" if device.type == "cuda" else "float32")
    dtypes = {"amp": torch.bfloat16, "tf32": torch.float32}  # autocast gives the ops bfloat16
    backend, mode = compiler(arguments)
    form = "{percentage:3.0f}%|{bar:24}| {elapsed}<{remaining} {desc}"
    before = torch.get_float32_matmul_precision()
    if asked == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        with tqdm.tqdm(bar_format=form, file=sys.stderr, smoothing=0) as bar:
            yield harness.Settings(
                device=device,
                dtype=dtypes.get(asked) or getattr(torch, asked),
                clock=harness.make_clock(device),
                bar=bar,
                quick=arguments.quick,
                full=arguments.full,
                tf32=asked == "tf32",
                compiler=backend,
                compile_mode=mode,
                say=partial(tqdm.tqdm.write, file=sys.stderr if arguments.json else sys.stdout),
            )
    finally:
        torch.set_float32_matmul_precision(before)


def chosen_ops(names: list[str] | None) -> dict[str, ModuleType]:
    """Each op and its benchmark."""
    chosen = [op for op in BENCHMARKS if names is None or op in names]
    return {op: importlib.import_module(f"swinops.benchmarks.{BENCHMARKS[op]}") for op in chosen}


def length(
    parts: tuple[str, ...], ops: dict[str, ModuleType], subjects: "list[Subject]", settings: "Settings"
) -> float:
    """Of the progress bar: a comparison of an op is 1."""
    from swinops.benchmarks.models import WEIGHTS

    comparisons = sum(2 * len(module.shapes(settings)) for module in ops.values())
    timings = sum(WEIGHTS[mode] for subject in subjects for mode in subject.precisions)
    photographs = (1 + (settings.device.type == "cpu")) * ("photograph" in parts)
    return float(comparisons + timings + photographs + 1)


def introduce(ops: dict[str, ModuleType], settings: "Settings") -> None:
    """Say what is measured on, and once why a backend is not among the timings."""
    from swinops import backends
    from swinops.benchmarks import harness

    facts = harness.machine(settings.device)
    triton, commit = facts["triton"] or "none", facts["commit"]
    settings.say(f"{facts['device']}, torch {facts['torch']}, triton {triton}, swinops {commit}")
    if not ops:
        return
    settings.bandwidth = harness.copy_bandwidth(settings)
    settings.say(f"a copy moves {settings.bandwidth / 1e9:.3g} GB/s")
    x = torch.empty(1, 1, 1, 1, 32, device=settings.device, dtype=settings.dtype)
    for name in backends.MODULES:
        why = {op: harness.why_not_timed(name, x, op) for op in ops}
        for text in dict.fromkeys(filter(None, why.values())):
            settings.say(f"not timed: {name} {', '.join(op for op in why if why[op] == text)}: {text}")


def demonstrate(subject: "Subject", random: bool, settings: "Settings") -> bool:
    from swinops.benchmarks import photograph

    right = photograph.demonstrate(subject.model, subject.name, random, settings)
    if settings.device.type == "cpu":
        right &= photograph.demonstrate_interpreted(settings)
    return right


def measure_ops(ops: dict[str, ModuleType], settings: "Settings") -> list[dict[str, Any]]:
    from swinops.benchmarks import harness

    rows = []
    for module in dict.fromkeys(ops.values()):
        rows += harness.measure((case for case in module.cases(settings) if case.op in ops), settings)
    return rows


def measure_models(subjects: "list[Subject]", settings: "Settings") -> list[dict[str, Any]]:
    from swinops.benchmarks import models

    settings.seconds = 12.0 if settings.device.type == "cpu" else 2.0
    return [row for subject in subjects for row in models.measure(subject, settings)]
