"""Every python block of the README runs, and every number in its tables is a model's or in the recorded results."""

import csv
import re
from pathlib import Path

import pytest
import torch

import swinops

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text() if README.exists() else ""
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.skipif(not README.exists(), reason="there is no README beside the tests")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def measured() -> list[tuple[str, dict[str, str]]]:
    """For each row of the tables under "Measured", the CSV that the section names for it, and its cells by heading."""
    section = TEXT.partition("## Measured\n")[2].partition("\n## ")[0]
    rows, source, heading = [], "", None
    for line in section.splitlines():
        if names := re.findall(r"\]\((benchmarks/results/[^)]+\.csv)\)", line):
            source, heading = names[0], None
        elif line.startswith("|") and heading is None:
            heading = cells(line)
        elif line.startswith("|") and not set(line) <= set("| -:"):
            rows.append((source, dict(zip(heading, cells(line), strict=True))))
        elif not line.startswith("|"):
            heading = None
    return rows


def recorded(path: str) -> list[dict[str, str]]:
    with (ROOT / path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{n}" for n in range(len(BLOCKS))])
def test_block(block, tmp_path, monkeypatch):
    if "timm.create_model" in block:
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    for path in re.findall(r'^path = "(.+)"', block, re.MULTILINE):
        torch.save({"model": swinops.create_model(Path(path).stem).state_dict()}, path)
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})


def test_there_are_blocks_and_numbers():
    assert len(BLOCKS) >= 2
    assert {source.rpartition("/")[2] for source, _ in measured()} == {"ops.csv", "models.csv"}


def test_table_of_models():
    rows = [cells(line) for line in TEXT.splitlines() if line.startswith(("| `swin_", "| `swinv2_"))]
    assert sorted(row[0].strip("`") for row in rows) == swinops.list_models()
    for name, parameters, window, size, drop_path in rows:
        with torch.device("meta"):
            model = swinops.create_model(name.strip("`"))
        attn = model.layers[0].blocks[0].attn  # the last stages cut the window to their maps
        assert parameters == f"{sum(p.numel() for p in model.parameters()):,}"
        assert attn.window_size == [int(window)] * 2
        assert model.layers[-1].blocks[-1].drop_path.rate == pytest.approx(float(drop_path))
        assert model.grid_size == (int(size) // 4,) * 2


@pytest.mark.parametrize("source, row", measured(), ids=lambda value: None)
def test_numbers_are_those_recorded(source, row):
    """Cells are "0.123 ms" or "12.3 images/s", with "x 4.56 (1.23-7.89)" after the first implementation's."""
    found = recorded(source)
    models = source.endswith("models.csv")
    if models:
        found = [each for each in found if each["model"] == row["model"]]
        median, ratio = "infer_samples_per_sec", "infer_ratio"
    else:
        found = [each for each in found if (each["op"], each["shape"]) == (row["op"].strip("`"), row["shape"])]
        found = [each for each in found if each["direction"] == row["direction"]]
        median, ratio = "median_ms", "ratio"
    shown = [name for name in row if name not in ("model", "op", "shape", "direction")]
    assert shown and found
    for name in shown:
        (each,) = (each for each in found if each["impl"] == name)
        number = f"{float(each[median]):.3g} " + ("images/s" if models else "ms")
        paired = f", x {float(each[ratio]):.2f} ({float(each[f'{ratio}_p20']):.2f}-{float(each[f'{ratio}_p80']):.2f})"
        assert row[name] == number + (paired if name != each["baseline"] else "")
