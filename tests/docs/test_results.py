"""The figures in README.md and docs/results.md are those of benchmarks/results/, rounded as they are printed."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
README, RESULTS = ROOT / "README.md", ROOT / "docs" / "results.md"
GRAPH = ", ours as a CUDA graph ⚠"


def measured(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def table(page: Path, *header: str) -> list[dict[str, str]]:
    """The rows of the table of `page` whose header begins so, by column."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| " + " | ".join(header) + " |"))

    def cells(line: str) -> list[str]:
        return [cell.strip() for cell in line.strip().strip("|").split("|")]

    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(cells(lines[start]), cells(line), strict=True)))
    return rows


def agrees(text: str, value: float) -> bool:
    """Whether a printed number is `value` rounded to its digits."""
    digits = len(text.partition(".")[2])
    return abs(float(text.replace(",", "")) - value) <= 0.5 * 10**-digits * 1.0001


def in_ms_and_bytes(cell: str) -> tuple[str, str]:
    """The milliseconds of a cell such as `65.2 ms, 18.0 GiB`, and its memory in MiB or GiB."""
    found = re.fullmatch(r"([\d.]+) ms(?:, ([\d.]+ [MG]iB))?", cell)
    assert found, cell
    return found[1], found[2] or ""


def check_cell(cell: str, row: dict[str, Any]) -> None:
    ms, memory = in_ms_and_bytes(cell)
    assert agrees(ms, row["ms"]), (cell, row)
    if memory:
        number, unit = memory.split()
        assert agrees(number, row["peak MiB"] / (1024 if unit == "GiB" else 1)), (cell, row)


@pytest.mark.parametrize("page", [README, RESULTS], ids=["README", "results"])
def test_the_loss_on_a_gpu(page: Path) -> None:
    rows = {(row["shape"].strip("()"), row["what"]): row for row in measured("bench_rivals")["rows"]}
    compared = 0
    for line in table(page, "N, f, c"):
        graph = line["N, f, c"].endswith(GRAPH)
        shape = line["N, f, c"].removesuffix(GRAPH)
        for column, cell in line.items():
            if column == "N, f, c" or not cell:
                continue
            if column == "compiled":
                both = [rows[shape, "published, compiled"], rows[shape, "eager, compiled"]]
                found = min(both, key=lambda row: row["ms"])
            else:
                what = column.replace("Hadamard codes", "hadamard").replace("Hadamard", "hadamard")
                found = rows[shape, f"{what}, CUDA graph" if graph and what.startswith("ours") else what]
            check_cell(cell, found)
            compared += 1
    assert compared >= 19


@pytest.mark.parametrize("page", [README, RESULTS], ids=["README", "results"])
def test_rows_that_compare_a_graph_with_launches_are_marked(page: Path) -> None:
    text = " ".join(page.read_text(encoding="utf-8").split())
    assert re.search("rivals were launched kernel by kernel, not as (CUDA )?graphs", text)
    for line in table(page, "N, f, c"):
        assert ("graph" in line["N, f, c"]) == ("⚠" in line["N, f, c"])


def test_launch_by_call_in_the_readme() -> None:
    found = re.search(r"ours \(stored\) takes ([\d.]+) and ([\d.]+) ms", " ".join(README.read_text().split()))
    assert found
    rows = {(row["shape"], row["what"]): row["ms"] for row in measured("bench_rivals")["rows"]}
    assert agrees(found[1], rows["(256, 2048, 16384)", "ours, stored"])
    assert agrees(found[2], rows["(64, 2048, 16384)", "ours, stored"])


def test_training_on_a_gpu() -> None:
    rows = [row["images/s"] for row in measured("bench_engine")["rows"]]
    lines = table(RESULTS, "way", "images/s")
    assert len(lines) == len(rows)
    for line, rate in zip(lines, rows, strict=True):
        assert agrees(line["images/s"], rate)
        assert agrees(line["times faster"], rate / rows[0])


def test_digits() -> None:
    seeds = [measured(f"digits-seed{seed}") for seed in range(3)]
    pixels, weights, trained = table(RESULTS, "test split", "probe")
    columns = {"probe": "probe", "kNN": "knn", "NMI k-means": "nmi_kmeans", "NMI codes": "nmi_codes"}
    for column, key in columns.items():
        for line, part in ((weights, "random_init"), (trained, "trained")):
            for text, seed in zip(line[column].split(), seeds, strict=bool(line[column])):
                assert agrees(text, seed[part][key]), (column, text)
        if pixels[column]:
            assert agrees(pixels[column], seeds[0]["raw_pixels"][key])
    assert trained["codes in use"].split() == [str(seed["trained"]["codes_used"]) for seed in seeds]
    assert all(check["ok"] for seed in seeds for check in seed["trained"]["collapse"].values())


def test_a_step_and_compilation_on_a_cpu() -> None:
    steps = [row for row in measured("bench_step")["rows"] if "codes" in row]
    for line, row in zip(table(RESULTS, "recipe", "codes"), steps, strict=True):
        assert agrees(line["reference"].removesuffix(" ms"), row["reference ms"])
        assert agrees(line["C++"].removesuffix(" ms"), row["cpu ms"])
        assert agrees(line["times faster"], row["times faster"])
    for line, row in zip(table(RESULTS, "case", "eager"), measured("bench_compile")["rows"], strict=True):
        assert agrees(line["eager"], row["eager"])
        assert agrees(line["`--compile`"], row["compiled"])
        assert agrees(line["ratio"], row["ratio"])


def test_hadamard_or_rademacher() -> None:
    import numpy as np

    rows = measured("cifar10-codes")["rows"]
    columns = {"linear probe": "probe", "NMI of the codes": "nmi_codes", "codes in use": "test_codes_used"}
    for line in table(RESULTS, "codes", "linear probe"):
        for column, key in columns.items():
            values = [row[key] for row in rows if row["codes"] == line["codes"].lower()]
            mean, deviation = line[column].split(" ± ")
            assert agrees(mean, float(np.mean(values)))
            assert agrees(deviation, float(np.std(values, ddof=1)))


def test_the_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
