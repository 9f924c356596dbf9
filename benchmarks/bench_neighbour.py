"""Training beside a busy program: images/s alone, beside it, and alone again, within one run.

`pytest --benchmark benchmarks/bench_neighbour.py` starts `falcon-fast train --amp` as a user does, and beside it, for a while,
programs that keep one processor busy each. Each case runs with the number of threads that follows the load (the default) and with
the two fixed numbers between which it chooses. `folder` decodes JPEG files of noise in worker processes.

The columns hold images/s over all steps of a phase, the seconds included in which the number of threads had not followed yet;
`settled` leaves out the first SETTLING seconds of the phase. All phases begin after START seconds.
"""

from __future__ import annotations

import csv
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from PIL import Image

from falcon_fast.data.sources.cifar import CIFAR10_CLASSES
from falcon_fast.hardware.processors import usable_threads

START, PHASE, SETTLING = 4.0, 14.0, 5.0  # seconds
BUSY = "while True: pass"
CASES = {
    "digits": ["--recipe", "digits"],
    "cifar10-resnet8": ["--recipe", "cifar10-resnet8"],
    "folder": ["--recipe", "folder", "--set", "model.name=resnet8", "--set", "data.size=64", "--batch-size", "64"],
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 512 JPEG files of noise, 256 px."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for number in range(512):
        small = Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8))
        small.resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return folders of noise, 32 px, that the recipes of CIFAR-10 accept: 640 images to train on, 10 to test on."""
    root = tmp_path_factory.mktemp("small")
    random = np.random.default_rng(0)
    for split, count in (("train", 64), ("test", 1)):
        for name in CIFAR10_CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize("neighbours", [1, 2])
@pytest.mark.parametrize("threads", ["adaptive", "fixed", "one"])
@pytest.mark.parametrize("case", CASES)
def test_neighbour(table, tmp_path, photographs, small, case, threads, neighbours) -> None:
    most = usable_threads()
    if most < 2:
        pytest.skip("needs two processors")
    if case != "digits" and neighbours > 1:
        pytest.skip("one case with two neighbours is enough")
    number = {"adaptive": 0, "fixed": most, "one": 1}[threads]
    data = {"cifar10-resnet8": ["--data", str(small)], "folder": ["--data", str(photographs), "--loader", "workers"]}
    command = [sys.executable, "-m", "falcon_fast", "train", "--amp", *CASES[case], *data.get(case, [])]
    for setting in (
        f"training.threads={number}",
        "log.every_steps=2",
        "log.evaluate_epochs=0",
        "log.tensorboard=false",
    ):
        command += ["--set", setting]
    command += ["--epochs", "100000", "--set", "checkpoint.every_steps=1000000", "--run-dir", str(tmp_path / "run")]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    metrics = tmp_path / "run" / "metrics.csv"
    training = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while len(rows_of(metrics)) < 2:
            assert training.poll() is None
            time.sleep(0.2)
        time.sleep(START)
        phases = [phase(metrics), phase(metrics, neighbours), phase(metrics)]
    finally:
        training.kill()
        training.wait()
    names = ("alone", "beside", "alone again")
    table.add(
        case=case,
        threads=threads,
        neighbours=neighbours,
        **{name: speed(rows) for name, rows in zip(names, phases, strict=True)},
        **{f"{name}, settled": speed(rows, SETTLING) for name, rows in zip(names[1:], phases[1:], strict=True)},
        **{
            "threads beside": mean(
                float(row["threads"]) for row in phases[1][len(phases[1]) // 2 :] or [{"threads": "nan"}]
            )
        },
    )


def phase(metrics: Path, neighbours: int = 0) -> list[dict[str, str]]:
    """Wait for PHASE seconds, beside some busy programs, and return the rows of metrics.csv that were written meanwhile."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(neighbours)]
    before = len(rows_of(metrics))
    try:
        time.sleep(PHASE)
        return rows_of(metrics)[before:]
    finally:
        for program in busy:
            program.kill()
            program.wait()


def rows_of(metrics: Path) -> list[dict[str, str]]:
    """Return the whole rows that metrics.csv has now."""
    if not metrics.exists():
        return []
    with metrics.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("seconds")]


def speed(rows: list[dict[str, str]], after: float = 0.0) -> float | None:
    """Return the images/s over the steps between the first row, or the first one `after` seconds later, and the last."""
    if not rows:
        return None
    start = float(rows[0]["seconds"]) + after
    rows = [row for row in rows if float(row["seconds"]) >= start]
    if len(rows) < 2:
        return None
    seconds = float(rows[-1]["seconds"]) - float(rows[0]["seconds"])
    images = sum(
        float(row["images_per_second"]) * (float(row["seconds"]) - float(before["seconds"]))
        for before, row in itertools.pairwise(rows)
    )
    return images / seconds
