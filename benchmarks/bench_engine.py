"""Whole training runs on one GPU: `falcon-fast train` as a user runs it, the published way to train, and the device's peak.

Run it with `pytest --benchmark benchmarks/bench_engine.py`. Our rates are those that the run itself writes into metrics.csv: the
median over windows of 50 steps, which include the loader, the logging and everything else. The rival is timed over windows of the
same length, in turn with ours. The images are random, with the number and size of CIFAR-10's.
"""

from __future__ import annotations

import csv
import os
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from falcon_fast.config import load_recipe, override, validate
from falcon_fast.data.sources.images import ImageArray, Source, Split
from falcon_fast.hardware.flops import step_flops
from falcon_fast.models.network import build_network
from falcon_fast.training.run import Run, prepare
from falcon_fast.training.trainer import train

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="training is timed on an NVIDIA GPU, and there is none"
)

WINDOW = 50  # steps
ROUNDS = 1
WAYS = {
    "eager": {},
    "--cuda-graph": {"training.cuda_graph": True},
    "--compile": {"training.compile": True},
    "--compile --cuda-graph": {"training.compile": True, "training.cuda_graph": True},
}
# The published way: name, autocast, and whether it runs as a CUDA graph, for a fair comparison with ours that do.
RIVALS = (
    ("published way, fp16", torch.float16, False),
    ("published way, float32", None, False),
    ("published way, fp16, CUDA graph", torch.float16, True),
)


def images(count: int, size: int, held_out: int = 512) -> Source:
    """Return random images with labels of ten classes, and a small test split, so that the evaluation at the end is short."""
    random = np.random.RandomState(0)
    pixels = random.randint(0, 256, (count, size, size, 3)).astype(np.uint8)
    labels = np.arange(count) % 10
    test = Split(ImageArray(pixels[:held_out]), labels[:held_out])
    return Source(
        Split(ImageArray(pixels), labels), test, tuple(map(str, range(10))), size, (0.5,) * 3, (0.25,) * 3, ""
    )


def started(recipe: str, changes: dict[str, object], source: Source, steps: int) -> Run:
    """Return a run of about `steps` steps."""
    config = load_recipe(recipe)
    per_epoch = len(source.train.images) // int(changes.get("training.batch_size", config.training.batch_size))
    settings = {
        "training.precision": "bf16",
        "training.epochs": max(1, steps // per_epoch),
        "log.every_steps": WINDOW,
        "log.evaluate_epochs": 0,
        "optimizer.warmup_epochs": 0.0,
    }
    return prepare(validate(override(config, settings | changes)), source=source)


def rates(run: Run, directory: Path) -> list[float]:
    """Return the images/s of each window, without the first two (compilation, choice of algorithms) and the last (evaluation)."""
    directory.mkdir(parents=True)
    train(run, directory, Console(quiet=True))
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    return [float(row["images_per_second"]) for row in rows][2:-1]


def peak_mib() -> float:
    return torch.cuda.max_memory_allocated() / 2**20


def test_cifar_resnet18(table, tmp_path) -> None:
    """ResNet-18, CIFAR recipe, batch size 64: images/s of a whole run."""
    from . import published

    source = images(50000, 32)
    pixels, labels = source.train.images.pixels, source.train.labels
    config = load_recipe("cifar10")
    loss, batch, device = config.loss, config.training.batch_size, torch.device("cuda")
    workers = min(16, os.cpu_count() or 1)
    found: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    for turn in range(ROUNDS):
        for name, autocast, graph in RIVALS:
            torch.cuda.reset_peak_memory_stats()
            peaks = config.optimizer.lr, config.probe.lr
            step = published.stepper(
                device, loss.embedding_dim, loss.num_codes, config.tau, *peaks, 10, autocast, graph
            )
            batches, begin = published.loaded(published.TwoViews(pixels, labels, 32), batch, workers), 0.0
            for at, each in enumerate(batches):
                if at % WINDOW == 0:
                    torch.cuda.synchronize()
                    now = time.perf_counter()
                    if at >= 3 * WINDOW:
                        found.setdefault(name, []).append(WINDOW * batch / (now - begin))
                    begin = now
                if at == 7 * WINDOW:
                    break
                step(each)
            memory[name] = peak_mib()
            del batches, step
        for name, changes in WAYS.items():
            torch.cuda.reset_peak_memory_stats()
            run = started("cifar10", changes, source, 781)
            found.setdefault(name, []).extend(rates(run, tmp_path / f"{turn}-{name}"))
            memory[name] = peak_mib()
    report(table, "ResNet-18, CIFAR recipe, batch 64", found, memory, "published way, fp16")


def test_launch_bound(table, tmp_path) -> None:
    """The digits recipe, whose kernels take only microseconds."""
    found: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    source = images(12800, 16)
    for turn in range(ROUNDS):
        for name, changes in WAYS.items():
            torch.cuda.reset_peak_memory_stats()
            run = started("digits", {"training.batch_size": 64, "model.width": 8} | changes, source, 800)
            found.setdefault(name, []).extend(rates(run, tmp_path / f"{turn}-{name}"))
            memory[name] = peak_mib()
    report(table, "digits recipe, width 8, batch 64", found, memory, "eager")


def test_vit_small(table, tmp_path) -> None:
    """ViT-S/16 at 224 px, batch size 256, synthetic views: the share of the rate of a bfloat16 product on this device."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(30):
        a @ b
    torch.cuda.synchronize()
    peak = 30 * 2 * size**3 / (time.perf_counter() - begin)
    del a, b
    source = images(1024, 224, held_out=64)
    base = {
        "training.batch_size": 256,
        "data.loader": "synthetic",
        "log.every_steps": 10,
        "checkpoint.every_steps": 1000,
    }
    found: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    flop = 0.0
    for name, changes in WAYS.items():
        if name == "--cuda-graph":  # launches are not the limit here
            continue
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run = started("imagenet100", base | changes, source, 60)
        flop = flop or step_flops(run.config, build_network(run.config, 224), 224).total
        found[name] = rates(run, tmp_path / name)
        memory[name] = peak_mib()
    report(table, "ViT-S/16, 224 px, batch 256, synthetic", found, memory, "eager", flop / 256, peak)


def report(table, what, found, memory, baseline, flop_per_image=None, peak=None) -> None:
    reference = statistics.median(found[baseline])
    for name, values in found.items():
        low, middle, high = (np.quantile(values, q).item() for q in (0.2, 0.5, 0.8))
        row = {
            "images/s": middle,
            "p20": low,
            "p80": high,
            "times faster": middle / reference,
            "peak MiB": memory[name],
        }
        if flop_per_image is not None and peak is not None:
            row |= {"TFLOP/s": middle * flop_per_image / 1e12, "MFU": middle * flop_per_image / peak}
        table.add(gpu=torch.cuda.get_device_name(), what=what, way=name, **row)
