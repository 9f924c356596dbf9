"""Training, from a configuration to the last checkpoint: prepare, restore, and the loop over steps."""

from __future__ import annotations

import dataclasses
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from falcon_fast.batchnorm import has_batchnorm, per_view_batchnorm
from falcon_fast.config import Config
from falcon_fast.data.augmentation import Augmentation, augmentation
from falcon_fast.data.fused import pays, photometric_stage
from falcon_fast.data.images import Source
from falcon_fast.data.loader import choose_loader, training_batches
from falcon_fast.data.quarantine import Quarantine
from falcon_fast.data.sampling import Clock
from falcon_fast.data.sources import open_source
from falcon_fast.data.workers import auto_workers
from falcon_fast.devices import find_device, mixed_precision
from falcon_fast.errors import TrainingError, UsageError
from falcon_fast.evaluation.clustering import nmi
from falcon_fast.evaluation.features import extract_assigned
from falcon_fast.models import FalconNetwork, build_codes, build_network
from falcon_fast.objective import FalconLoss
from falcon_fast.objective.codes import Codes
from falcon_fast.objective.planner import frozen_start
from falcon_fast.training import checkpoint
from falcon_fast.training.console import MetricsFile, TrainingDisplay
from falcon_fast.training.optimizer import build_optimizer, learning_rate
from falcon_fast.training.step import StepMetrics, training_step

LATER_FACTS = ("seed", "global batch", "augmentation", "view size")  # the first checkpoints do not have them


@dataclass
class Run:
    """Everything a run is made of, built from its configuration and nothing else."""

    config: Config
    source: Source
    augmentation: Augmentation
    clock: Clock
    loader: str
    device: torch.device
    amp_dtype: torch.dtype | None
    network: FalconNetwork
    codes: Codes
    criterion: FalconLoss
    probe: nn.Linear | None
    optimizer: torch.optim.Optimizer
    notes: tuple[str, ...]

    @property
    def total_steps(self) -> int:
        return self.config.training.epochs * self.clock.steps_per_epoch

    @property
    def workers(self) -> int:
        asked = self.config.data.workers
        return auto_workers(self.augmentation) if asked < 0 else asked

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint holds beside config.toml, and is resumed against: data, dictionary, temperature, normalisation."""
        codes = hashlib.sha256(self.codes.words.cpu().numpy().astype("<i4").tobytes()).hexdigest()[:16]
        training = self.config.training
        return {
            "data": self.source.fingerprint,
            "seed": training.seed,
            "global batch": training.batch_size,
            "augmentation": repr(self.augmentation),
            "view size": self.source.size,
            "codes": codes,
            "temperature": self.config.tau,
            "mean": list(self.source.mean),
            "std": list(self.source.std),
        }


def prepare(config: Config) -> Run:
    """Open the data and build everything; writes nothing. Raises UsageError for what cannot work."""
    device = find_device(config.training.device)
    amp_dtype, notes = mixed_precision(config.training.amp, device)
    recipe = augmentation(config.data.augmentation)
    source = open_source(config.data)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, size=source.size))
    training = config.training
    clock = Clock(training.seed, len(source.train.images), training.batch_size, recipe)
    loader, loader_notes = choose_loader(config.data, source, recipe, device)

    network = build_network(config, source.size)
    if training.batch_size == 1 and has_batchnorm(network):
        raise UsageError("batch size 1 gives BatchNorm nothing to average: use --batch-size 2 or more")
    per_view_batchnorm(network)
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    codes = build_codes(config).to(device)
    loss = config.loss
    criterion = FalconLoss(
        codes,
        config.tau,
        beta=loss.beta,
        prior=loss.prior,
        implementation=loss.implementation,
        plan=loss.plan,
        memory_budget=loss.memory_budget * 2**20 or None,
    )
    frozen = frozen_start(loss.embedding_dim, loss.num_codes, config.tau, loss.activation, loss.temperature_batch)
    probe = None
    if source.train.labels is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            probe = nn.Linear(network.backbone.num_features, len(source.classes)).to(device)  # type: ignore[arg-type]
    optimizer = build_optimizer(config.optimizer, network, probe, config.probe.lr)
    return Run(
        config,
        source,
        recipe,
        clock,
        loader,
        device,
        amp_dtype,
        network,
        codes,
        criterion,
        probe,
        optimizer,
        source.notes + loader_notes + notes + ((frozen,) if frozen else ()),
    )


def restore(run: Run, directory: Path) -> tuple[int, float]:
    """Put the newest checkpoint of `directory` into `run`: the steps done and the seconds they took.

    Raises:
        UsageError: no complete checkpoint, or one made with other data, codes or temperature.
    """
    path = checkpoint.latest(directory)
    facts = checkpoint.read_facts(path)
    for key, value in run.facts.items():
        if key not in facts and key in LATER_FACTS:
            continue
        if facts.get(key) != value:
            raise UsageError(f"cannot resume {path}: its {key} was {facts.get(key)}, now it is {value}")
    checkpoint.load(path, run.network, run.probe, run.optimizer)
    return int(facts["step"]), float(facts["seconds"])


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside, SIGINT and SIGTERM only ask: the yielded function says whether one came. A second one acts at once."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield lambda: False
        return
    requested = False

    def request(number: int, frame: object) -> None:
        nonlocal requested
        requested = True
        for each, previous in before.items():
            signal.signal(each, previous)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, request)
    try:
        yield lambda: requested
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def train(run: Run, directory: Path, console: Console, start_step: int = 0, seconds_before: float = 0.0) -> float:
    """The loop: steps `start_step` to the end, logged and checkpointed under `directory`. Returns the seconds of training.

    Raises:
        TrainingError: a loss is not finite; the last good checkpoint stays.
        KeyboardInterrupt: SIGINT or SIGTERM came; the state was saved first.
    """
    config, total, per_epoch = run.config, run.total_steps, run.clock.steps_per_epoch
    optimizer = config.optimizer
    warmup = round(optimizer.warmup_epochs * per_epoch)
    save_every = config.checkpoint.every_steps or per_epoch
    test_every = config.log.evaluate_epochs * per_epoch
    checkpoints = directory / "checkpoints"
    metrics_file = MetricsFile(directory / "metrics.csv", keep_until_step=start_step)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    # Decided for the whole run, so that a resumed one computes the same.
    count, threads = 2 * config.training.batch_size, torch.get_num_threads()
    worthwhile = run.device.type == "cuda" or pays(total, count, run.source.size, threads)
    photometric = photometric_stage(run.augmentation, config.data.photometric, worthwhile, say)
    quarantine = Quarantine(
        run.source.train.images,
        config.data.max_bad_fraction,
        directory / "quarantine.csv",
        known=dict(run.source.known_bad),
        left_out=run.source.left_out,
        say=say,
    )
    steps = range(start_step, total)
    batches = training_batches(run.loader, run.source, run.clock, steps, run.device, run.workers, quarantine=quarantine)
    mean, std = run.source.normalization(run.device)
    run.network.train()
    first_bad = torch.full((), -1, dtype=torch.int64, device=run.device)  # the first step whose loss was not finite
    started = window = time.monotonic()
    waited, window_steps = 0.0, 0

    def elapsed() -> float:
        return seconds_before + time.monotonic() - started

    def save(step: int) -> None:
        tensors = checkpoint.collect(run.network, run.probe, run.optimizer)
        checkpoint.save(checkpoints, step, tensors, {**run.facts, "seconds": elapsed()}, config.checkpoint.keep)

    def check_finite() -> None:
        if (bad := int(first_bad)) >= 0:
            kept = checkpoint.complete(checkpoints)
            rest = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written"
            raise TrainingError(f"the loss is not finite at step {bad}: training stopped; {rest}")

    display = TrainingDisplay(console, total, start_step)
    with closing(batches), metrics_file, stop_requests() as stop_requested, display:
        if total == 0:
            save(0)
        while start_step < total:
            waiting = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - waiting
            views = photometric(batch.views, batch.parameters, mean, std)
            scale = learning_rate(batch.step, optimizer.lr, total, warmup, optimizer.warmup_lr) / optimizer.lr
            metrics = training_step(
                run.network, run.criterion, run.probe, run.optimizer, views, batch.labels, scale, run.amp_dtype
            )
            step = batch.step + 1  # steps done
            window_steps += 1
            first_bad = torch.where((first_bad < 0) & ~torch.isfinite(metrics.loss), step, first_bad)
            display.advance(step)

            last, testing = step == total, bool(test_every) and step % test_every == 0
            if step % config.log.every_steps == 0 or testing or last:
                check_finite()
                now = time.monotonic()
                row = _row(run, step, metrics, scale)
                row |= {
                    "images_per_second": window_steps * config.training.batch_size / (now - window),
                    "data_wait": waited / (now - window),
                    "seconds": elapsed(),
                }
                if (testing or last) and run.probe is not None:
                    row |= _test(run)
                metrics_file.write(row)
                display.show(row, config.training.epochs)
                window, waited, window_steps = time.monotonic(), 0.0, 0
            if step % save_every == 0 or last or stop_requested():
                check_finite()
                save(step)
            if last:
                break
            if stop_requested():
                raise KeyboardInterrupt
    return elapsed()


def _row(run: Run, step: int, metrics: StepMetrics, lr_scale: float) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / run.clock.steps_per_epoch,
        "loss": float(metrics.loss),
        "prior": float(metrics.prior),
        "invariance": float(metrics.invariance),
        "codes_used": int(metrics.codes_used),
        "lr": run.config.optimizer.lr * lr_scale,
        "probe_train_accuracy": None if metrics.probe_accuracy is None else float(metrics.probe_accuracy),
    }


def _test(run: Run) -> dict[str, Any]:
    """The online probe and the clustering of the codes on the test split, in evaluation mode."""
    bad: dict[int, str] = {}  # reported when the run ends, by the evaluation
    seen = extract_assigned(
        run.network, run.codes, run.config.tau, run.source.test, run.source, run.device, run.workers, bad
    )
    test = run.source.test.without(bad)
    assert run.probe is not None and test.labels is not None
    with torch.inference_mode():
        predicted = run.probe(torch.from_numpy(seen.features).to(run.device)).argmax(1).cpu().numpy()
    return {
        "probe_accuracy": float((predicted == test.labels).mean()),
        "nmi_codes": nmi(test.labels, seen.assignments),
        "test_codes_used": len(set(seen.assignments.tolist())),
    }
