"""Does the start matter? A recipe with torchvision's initial weights and with timm's, over several seeds.

    python benchmarks/studies/initialisation.py --data cifar10

runs `falcon-fast train` once for each start and seed (20 epochs of the published CIFAR-10 recipe, 3 seeds) and appends a row to
benchmarks/results/study-initialisation.csv when a run is finished. Started again, it leaves out the rows that are there and
continues the run that was interrupted. On two cores an epoch takes about an hour; on a GPU add `--train --amp --train
--cuda-graph`.

A row has the test figures of the trained and of the untrained network, and the median number of codes that a batch uses in the
first 100 steps, where the two starts differ most.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from falcon_fast import __version__
from falcon_fast.hardware.devices import cpu_name

RESULTS = Path(__file__).parents[1] / "results" / "study-initialisation.csv"
STARTS = ("torchvision", "timm")
EARLY = 100  # steps
KEY = ("recipe", "initialisation", "seed")
SETTINGS = ("epochs", "options")  # that all rows of a table share
FIGURES = ("probe", "knn", "nmi_kmeans", "nmi_codes", "codes_used")
COLUMNS = (
    *KEY,
    *SETTINGS,
    *FIGURES,
    *(f"random_{name}" for name in FIGURES[:3]),
    "early_codes",
    "seconds",
    "machine",
    "version",
)


def done(table: Path) -> list[dict[str, str]]:
    """Return the rows of the table; none if there is no table yet."""
    if not table.exists():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(table: Path, row: dict[str, Any]) -> None:
    """Write the table again with one more row, completely or not at all."""
    table.parent.mkdir(parents=True, exist_ok=True)
    partial = table.with_name(f".{table.name}.partial")
    rows = [*done(table), row]
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(table)


def command(args: argparse.Namespace, start: str, seed: int, run: Path) -> list[str]:
    """Return the command of one run, which begins it or continues it."""
    words = [sys.executable, "-m", "falcon_fast", "train", "--recipe", args.recipe, "--epochs", str(args.epochs)]
    words += ["--seed", str(seed), "--run-dir", str(run), "--continue"]
    words += ["--set", f"model.initialisation={start}", "--set", "log.every_steps=10"]
    words += [] if args.data is None else ["--data", args.data]
    return words + args.train


def row_of(args: argparse.Namespace, start: str, seed: int, run: Path) -> dict[str, Any]:
    """Return the row of a finished run."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        codes = [int(row["codes_used"]) for row in csv.DictReader(file) if int(row["step"]) <= EARLY]
    row = {"recipe": args.recipe, "initialisation": start, "seed": seed, "epochs": args.epochs}
    row |= {
        "options": " ".join(args.train),
        "early_codes": statistics.median(codes),
        "seconds": round(result["seconds"]),
    }
    row |= {name: _rounded(result["trained"][name]) for name in FIGURES}
    row |= {f"random_{name}": _rounded(result["random_init"][name]) for name in FIGURES[:3]}
    return row | {"machine": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores", "version": __version__}


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def summary(rows: list[dict[str, str]]) -> list[str]:
    """Return a line for each start: mean and standard deviation of each figure over the seeds."""
    lines = []
    for start in STARTS:
        mine = [row for row in rows if row["initialisation"] == start]
        parts = []
        for name in (*FIGURES, "random_probe", "early_codes"):
            values = [float(row[name]) for row in mine if row[name] not in ("", "None")]
            if values:
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                parts.append(f"{name} {statistics.fmean(values):.3f}{spread}")
        if mine:
            lines.append(f"{start}, {len(mine)} seeds: {', '.join(parts)}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing. Exits with code 2 if the table was made with other settings, or with the code of a failed run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="the images of the recipe")
    parser.add_argument("--recipe", default="cifar10", help="a recipe with a ResNet of torchvision")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table, a CSV file")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "study-initialisation", help="the run directories")
    parser.add_argument(
        "--train", action="append", default=[], metavar="WORD", help="another option of falcon-fast train, word by word"
    )
    args = parser.parse_args(arguments)
    mine = {"recipe": args.recipe, "epochs": str(args.epochs), "options": " ".join(args.train)}
    for row in done(args.results):
        for name, value in mine.items():
            if row[name] != value:
                parser.error(
                    f"{args.results} was made with {name} {row[name]!r}, not {value!r}: give another --results"
                )
    for seed in args.seeds:
        for start in STARTS:
            key = (args.recipe, start, str(seed))
            if any(tuple(row[name] for name in KEY) == key for row in done(args.results)):
                continue
            run = args.runs / f"{args.recipe}-{start}-seed{seed}"
            code = subprocess.run(command(args, start, seed, run)).returncode
            if code:
                sys.exit(code)
            append(args.results, row_of(args, start, seed, run))
    for line in summary(done(args.results)):
        print(line)


if __name__ == "__main__":
    main()
