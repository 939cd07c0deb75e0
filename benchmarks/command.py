"""``swinops bench``: a photograph through timm's Swin before and after ``patch``, then everything side by side."""

import argparse
import json
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
OPS = ("window_partition", "window_merge", "relative_position_bias", "window_attention")
Rows = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a cut model, three rounds: does it run?")
    parser.add_argument("--full", action="store_true", help="also the training step, and on a GPU larger windows")
    parser.add_argument("--model", "-m", help="one of timm's Swin models (swin_tiny_patch4_window7_224)")
    parser.add_argument("--batch-size", "-b", type=positive, metavar="N", help="the model's (1 on a CPU, 128 on a GPU)")
    parser.add_argument("--img-size", type=positive, metavar="N", help="of the model (224)")
    parser.add_argument("--checkpoint", metavar="PATH", help="parameters for the model, as .safetensors, .pth or .bin")
    parser.add_argument(
        "--torchcompile-mode", default="default", metavar="MODE", help="such as max-autotune, for all that is compiled"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where ops.csv, models.csv and bench.png go")
    parser.add_argument("--results-file", type=Path, metavar="PATH", help="the model's rows once more, .csv or .json")
    parser.add_argument("--json", action="store_true", help="all rows as JSON on stdout; the tables go to stderr")
    parser.set_defaults(run=partial(run, parser))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Returns 1 where an output was wrong."""
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
        import tqdm

        from swinops.benchmarks import cyclic_shift, harness, models, plot, relative_position_bias, window_attention

        models.import_timm()
    except ImportError as error:
        parser.error(f"the benchmarks need {error.name or error}: pip install 'swinops[bench]'")
    if arguments.results_file and arguments.results_file.suffix not in (".csv", ".json"):
        parser.error(f"--results-file must end in .csv or .json, got {arguments.results_file}")
    mode = arguments.torchcompile_mode
    if mode != "default":
        from torch._inductor import list_mode_options

        if mode not in list_mode_options():
            parser.error(f"--torchcompile-mode must be one of {', '.join(list_mode_options())}, got {mode!r}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    name = arguments.model or models.MODEL
    batch = arguments.batch_size or (128 if gpu and not arguments.quick else 1)
    size = arguments.img_size or (56 if arguments.quick else size_in(name) or 224)
    cut = models.CUT if arguments.quick and not arguments.checkpoint else {}
    try:
        model = models.create(name, size, arguments.checkpoint, **cut)
        folder = output_folder(arguments, harness.device_name(device))
    except (OSError, ValueError) as error:
        parser.error(str(error))

    ops = (cyclic_shift, relative_position_bias, window_attention)
    say = partial(tqdm.tqdm.write, file=sys.stderr if arguments.json else sys.stdout)
    form = "{percentage:3.0f}%|{bar:24}| {elapsed}<{remaining} {desc}"
    with tqdm.tqdm(bar_format=form, file=sys.stderr, smoothing=0) as bar:
        settings = harness.Settings(
            device=device,
            dtype=torch.bfloat16 if gpu else torch.float32,
            clock=harness.make_clock(device),
            bar=bar,
            quick=arguments.quick,
            full=arguments.full,
            compile_mode=mode,
            say=say,
        )
        comparisons = sum(2 * each.OPS * len(each.shapes(settings)) for each in ops)
        # then the model's, the photograph's and the end
        bar.total = comparisons + 4 + 8 * arguments.full + 1 + (not gpu) + 1
        facts = harness.machine(device)
        settings.bandwidth = harness.copy_bandwidth(settings)
        say(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton'] or 'none'}, swinops {facts['commit']}")
        say(f"a copy moves {settings.bandwidth / 1e9:.3g} GB/s")
        reasons(settings)

        if cut:
            name += ", cut"
        ok = models.demonstrate(model, name, arguments.checkpoint is None, settings)
        if not gpu:
            ok &= models.demonstrate_interpreted(settings)
        op_rows = [row for each in ops for row in harness.measure(each.cases(settings), settings)]
        settings.seconds = 2.0 if gpu else 12.0
        model_rows = models.measure(name, model, batch, settings)

        bar.set_description("writing")
        written = write(folder, op_rows, model_rows, arguments.results_file)
        written.append(plot.draw(op_rows, model_rows, folder / "bench.png"))
        bar.update(1)
        bar.set_description("done")
    say("\nwritten: " + ", ".join(str(path) for path in written))
    if arguments.json:
        print(json.dumps({"ops": op_rows, "models": model_rows}, indent=2))
    states = ("status", "infer_status", "train_status")
    wrong = {row["impl"] for row in [*op_rows, *model_rows] if "wrong" in map(row.get, states)}
    if wrong or not ok:
        say(f"wrong results: {', '.join(sorted(wrong)) or 'the photograph'}")
        return 1
    return 0


def reasons(settings: Any) -> None:
    """Say once why a backend is not among the timings."""
    from swinops import backends
    from swinops.benchmarks.harness import why_not_timed

    x = torch.empty(1, 1, 1, 1, 32, device=settings.device, dtype=settings.dtype)
    for name in backends.MODULES:
        why = {op: why_not_timed(name, x, op) for op in OPS}
        for text in dict.fromkeys(filter(None, why.values())):
            settings.say(f"not timed: {name} {', '.join(op for op in why if why[op] == text)}: {text}")


def size_in(name: str) -> int | None:
    """The image size that timm puts at the end of a model's name."""
    match = re.search(r"_(\d{3})(\.|$)", name)
    return int(match[1]) if match else None


def output_folder(arguments: argparse.Namespace, device: str) -> Path:
    """``--output``; else results/<device> in a checkout, and benchmarks-results elsewhere and for ``--quick``."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    if arguments.output:
        folder = arguments.output
    elif (HERE.parent / "pyproject.toml").exists() and os.access(HERE, os.W_OK) and not arguments.quick:
        folder = HERE / "results" / (slug if torch.cuda.is_available() else f"cpu-{slug}")
    else:
        folder = Path("benchmarks-results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(folder: Path, op_rows: Rows, model_rows: Rows, extra: Path | None) -> list[Path]:
    from swinops.benchmarks.harness import write_csv

    written = [folder / "ops.csv", folder / "models.csv"]
    write_csv(written[0], op_rows)
    write_csv(written[1], model_rows)
    if extra is not None:
        if extra.suffix == ".json":
            extra.write_text(json.dumps(model_rows, indent=2) + "\n")
        else:
            write_csv(extra, model_rows)
        written.append(extra)
    return written
