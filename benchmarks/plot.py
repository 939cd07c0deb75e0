"""One picture of a run: how many times faster than plain PyTorch each op is, and than timm each model."""

import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swinops.benchmarks.harness import BASELINE, BOTH, FORWARD, whole
from swinops.benchmarks.models import MODES

INK, PALE, GRID = "#22272e", "#6b7280", "#e5e7eb"
COLOURS = {
    "pytorch": "#9ca3af",
    "pytorch-compiled": "#4b5563",
    "timm": "#d6a354",
    "timm-compiled": "#b45309",
    "sdpa": "#9d6bb3",
    "flex-compiled": "#6b3fa0",
    "swinops-reference": "#93c5fd",
    "swinops-cuda": "#10805c",
    "swinops-triton": "#1d4ed8",
    "patched": "#93c5fd",
    "patched-compiled": "#1d4ed8",
    "swinops": "#6ee7b7",
    "swinops-compiled": "#10805c",
}
LINE = 0.21  # inches of one implementation


def draw(op_rows: Sequence[Mapping[str, Any]], model_rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write the chart of rows as ``op_row`` and ``model_rows`` make them to ``path``, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str], list[str]] = {}
    for row in op_rows:
        names = groups.setdefault((row["op"], row["shape"]), [])
        if row["impl"] != BASELINE and row["impl"] not in names:
            names.append(row["impl"])
    modes = [mode for mode in MODES if any(row[f"{mode}_batch_size"] for row in model_rows)]
    ops_height = LINE * sum(len(names) + 2.4 for names in groups.values())
    models = list(dict.fromkeys(row["model"] for row in model_rows))
    models_height = LINE * (len(model_rows) + 2.4 * len(models))
    figure = Figure(figsize=(11, 2.3 + ops_height + models_height), facecolor="white")
    FigureCanvasAgg(figure)
    height = figure.get_figheight()

    facts = op_rows[0]
    figure.text(0.02, 1 - 0.28 / height, facts["device"], size=13, weight="bold", color=INK, va="center")
    versions = f"torch {facts['torch']} · triton {facts['triton'] or 'none'} · commit {facts['commit']}"
    figure.text(0.02, 1 - 0.53 / height, f"{facts['dtype']} · {versions}", size=9, color=PALE, va="center")
    note = "dot: median of the ratios within each round · line: 20th to 80th percentile · further right is faster"
    figure.text(0.98, 1 - 0.53 / height, note, size=9, color=PALE, va="center", ha="right")

    top = 1 - 1.05 / height
    found = {(row["op"], row["shape"], row["direction"], row["impl"]): row for row in op_rows}
    for column, direction in enumerate((FORWARD, BOTH)):
        axes = figure.add_axes((0.30 + 0.35 * column, top - ops_height / height, 0.33, ops_height / height))
        lines = []
        for (op, shape), names in groups.items():
            lines.append((None, f"{op}\n{shape}", None))
            lines += [(name, name, found[op, shape, direction, name]) for name in names]
        ratios(axes, lines, column == 0, "ratio", lambda row: f"{row['median_ms']:.3g} ms", "median_ms", "status")
        axes.set_title(f"{direction}, times the speed of eager PyTorch", size=10, color=INK, loc="left")
    for column, mode in enumerate(modes):
        axes = figure.add_axes((0.30 + 0.35 * column, 0.45 / height, 0.33, models_height / height))
        lines = []
        for model in models:
            rows = [row for row in model_rows if row["model"] == model]
            size, batch = rows[0][f"{mode}_img_size"], rows[0][f"{mode}_batch_size"]
            title = f"{model}\n{rows[0]['param_count']} million parameters, {size} x {size}, batch {batch}"
            lines += [(None, title, None), *((row["impl"], row["impl"], row) for row in rows)]
        speed = f"{mode}_samples_per_sec"
        label = functools.partial(images, key=speed)
        ratios(axes, lines, column == 0, f"{mode}_ratio", label, speed, f"{mode}_status")
        axes.set_title(f"{MODES[mode]}, times eager timm", size=10, color=INK, loc="left")
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    return path


def images(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:.3g} images/s" if row[key] < 1000 else f"{row[key]:.0f} images/s"


def ratios(
    axes: Any,
    lines: Sequence[tuple[Any, str, Any]],
    named: bool,
    key: str,
    label: Callable[[Any], str],
    value: str,
    status: str,
) -> None:
    """Dots with their spread from top to bottom, names on the left if ``named``; a line without a row is a heading."""
    positions, y = [], 0.0
    for name, _, _ in lines:
        y += 2.4 if name is None else 1.0
        positions.append(y - (1.45 if name is None else 0.5))
    axes.set_ylim(y, 0)
    medians = [row[f"{key}{end}"] for _, _, row in lines if row and row[key] for end in ("_p20", "_p80")]
    low, high = min([*medians, 0.8]) / 1.15, max([*medians, 1.25]) * 1.15
    axes.set_xscale("log")
    axes.set_xlim(low, high * (high / low) ** 0.32)  # room for the labels
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.axvline(1, color=PALE, linewidth=1, zorder=1)
    for position, (name, text, row) in zip(positions, lines, strict=True):
        if row is None:
            if named:
                op, _, shape = text.partition("\n")
                across = axes.get_yaxis_transform()
                if position > 1:
                    axes.axhline(position - 0.75, xmin=-0.86, color=GRID, linewidth=1, clip_on=False)
                axes.text(-0.86, position, op, transform=across, size=9, weight="bold", color=INK, va="center")
                axes.text(-0.86, position + 0.85, shape, transform=across, size=7.5, color=PALE, va="center")
            continue
        colour = COLOURS.get(name, INK)
        if row[value] is None or not row[key]:
            words = row[status] if row[value] is None else label(row)
            axes.text(1.03, position, textwrap.shorten(words, 60), size=7.5, color="#b91c1c", va="center")
            continue
        ends = [row[f"{key}_p20"], row[f"{key}_p80"]]
        axes.plot(ends, [position] * 2, color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot(row[key], position, "o", color=colour, markersize=6.5, markeredgecolor="white", zorder=3)
        axes.annotate(
            f"{row[key]:.2f}  ({label(row)})", (ends[1], position), (7, 0), textcoords="offset points",
            size=7.5, color=INK, va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    names = [text if name and named else "" for name, text, _ in lines]
    axes.set_yticks(positions, names, size=8, color=INK)
    axes.tick_params(axis="x", length=0, colors=PALE, labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
