"""The loop over steps: data in, metrics and checkpoints out, and all the ways in which a run ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from falcon_fast.data.loader import training_batches
from falcon_fast.data.quarantine import Quarantine
from falcon_fast.data.stage import photometric_stage
from falcon_fast.errors import TrainingError
from falcon_fast.evaluation.clustering import nmi
from falcon_fast.evaluation.features import extract_assigned
from falcon_fast.models import FalconNetwork
from falcon_fast.training import checkpoint
from falcon_fast.training.compiled import compiler_failures
from falcon_fast.training.console import MetricsFile, TrainingDisplay
from falcon_fast.training.optimizer import learning_rate
from falcon_fast.training.processes import Processes, StopAgreement, lost_peers
from falcon_fast.training.run import Run, seed_process
from falcon_fast.training.signals import stop_requests
from falcon_fast.training.step import StepMetrics, training_step

NEVER = 2**62  # a step that does not come


def train(run: Run, directory: Path, console: Console, start_step: int = 0, seconds_before: float = 0.0) -> float:
    """The loop: steps `start_step` to the end, logged and checkpointed under `directory`. Returns the seconds of training.

    Of several processes, process 0 alone logs and tests; the others wait at the next step's collectives. Each saves its share.

    Raises:
        TrainingError: a loss is not finite, a checkpoint cannot be written, or another process is gone; the last good one stays.
        KeyboardInterrupt: SIGINT or SIGTERM came to any process; the state was saved first.
    """
    config, processes, total, per_epoch = run.config, run.processes, run.total_steps, run.clock.steps_per_epoch
    optimizer = config.optimizer
    warmup = round(optimizer.warmup_epochs * per_epoch)
    save_every = config.checkpoint.every_steps or per_epoch
    test_every = config.log.evaluate_epochs * per_epoch
    checkpoints = directory / "checkpoints"

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    dtype = run.amp_dtype or torch.float32
    photometric = photometric_stage(run.augmentation, config.data.photometric, say, run.device, dtype)
    quarantine = _quarantine(run, directory, say)
    metrics_file = MetricsFile(directory / "metrics.csv", keep_until_step=start_step) if processes.main else None
    if start_step == 0:
        seed_process(run, 0)
    saver = checkpoint.Saver(checkpoints, config.checkpoint.keep, config.checkpoint.asynchronous, processes)
    steps = range(start_step, total)
    batches = training_batches(
        run.loader,
        run.source,
        run.clock,
        steps,
        run.device,
        run.workers,
        processes.rank,
        processes.world_size,
        quarantine,
    )
    mean, std = run.source.normalization(run.device)
    run.network.train()
    first_bad = torch.full((), NEVER, dtype=torch.int64, device=run.device)  # the first step whose loss was not finite
    started = window = time.monotonic()
    waited, window_steps = 0.0, 0
    agreed = StopAgreement(processes)

    def elapsed() -> float:
        return seconds_before + time.monotonic() - started

    def save(step: int) -> None:
        run.average_buffers()
        share_bad(quarantine, processes)
        tensors = checkpoint.collect(
            run.network, run.probe, run.learner.optimizer, run.learner.extra_state(), rank=processes.rank
        )
        saver.save(step, tensors, {**run.facts, "seconds": elapsed()})

    def kept() -> str:
        found = checkpoint.complete(checkpoints)
        return f"the last good checkpoint is {found[-1]}" if found else "no checkpoint had been written"

    def check_finite() -> None:
        if (bad := int(processes.least(first_bad))) < NEVER:
            with suppress(TrainingError):
                saver.wait()  # for what is said to be kept
            error = TrainingError(f"the loss is not finite at step {bad}: training stopped; {kept()}")
            error.agreed = True  # type: ignore[attr-defined]
            raise error

    display = TrainingDisplay(console, total, start_step)
    with (
        compiler_failures(),
        run.precision.switches(),
        lost_peers(processes, kept),
        closing(batches),
        saver,
        metrics_file or nullcontext(),
        stop_requests() as stop_requested,
        display,
    ):
        if total == 0:
            save(0)
        while start_step < total:
            waiting = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - waiting
            views = photometric(batch.views, batch.parameters, mean, std)
            scale = learning_rate(batch.step, optimizer.lr, total, warmup, optimizer.warmup_lr) / optimizer.lr
            step = batch.step + 1  # steps done, with this one
            last, testing = step == total, bool(test_every) and step % test_every == 0
            logging = step % config.log.every_steps == 0 or testing or last
            metrics = training_step(run.learner, views, batch.labels, scale, logging)
            window_steps += 1
            first_bad = torch.where((first_bad == NEVER) & ~torch.isfinite(metrics.loss), step, first_bad)
            display.advance(step)

            stopping = agreed(stop_requested()) and not last
            if logging:
                check_finite()
                now = time.monotonic()
                row = _row(run, step, metrics, scale)
                row |= {
                    "images_per_second": window_steps * config.training.batch_size / (now - window),
                    "data_wait": waited / (now - window),
                    "seconds": elapsed(),
                }
                if (testing or last) and run.probe is not None:
                    run.average_buffers()
                    with run.averaged():
                        network, probe = run.whole()
                        row |= _test(run, network, probe) if processes.main else {}
                if metrics_file is not None:
                    metrics_file.write(row)
                    display.show(row, config.training.epochs)
                window, waited, window_steps = time.monotonic(), 0.0, 0
            if step % save_every == 0 or last or stopping:
                check_finite()
                save(step)
            if stopping:
                saver.wait()
                agreed.finish()
                raise KeyboardInterrupt
            if last:
                agreed.finish()
                break
    return elapsed()


def _quarantine(run: Run, directory: Path, say: Callable[[str], None]) -> Quarantine:
    """The bad images known when training begins, the same in every process; listed on disk by process 0."""
    images, limit = run.source.train.images, run.config.data.max_bad_fraction
    known, left_out, processes = dict(run.source.known_bad), run.source.left_out, run.processes
    quarantine: Quarantine | None = None
    with processes.together():
        if processes.main:
            path = directory / "quarantine.csv"
            quarantine = Quarantine(images, limit, path, known=known, left_out=left_out, say=say)
    listed = processes.from_main({} if quarantine is None else quarantine.bad)
    return quarantine or Quarantine(images, limit, known=listed, left_out=left_out, say=say)


def share_bad(quarantine: Quarantine, processes: Processes) -> None:
    """What each process found bad becomes known to all. Raises UsageError in all, where that is too much."""
    with processes.together():
        for bad in processes.everyone(dict(quarantine.bad)):
            for index, reason in bad.items():
                quarantine.add(index, reason)


def _row(run: Run, step: int, metrics: StepMetrics, lr_scale: float) -> dict[str, Any]:
    """A row of metrics.csv: means over the processes; codes of the batch that the prior saw (a local one: process 0's share)."""
    measured = [metrics.loss, metrics.prior, metrics.invariance]
    measured += [] if metrics.probe_accuracy is None else [metrics.probe_accuracy]
    loss, prior, invariance, *accuracy = run.processes.mean(torch.stack(measured)).tolist()
    return {
        "step": step,
        "epoch": step / run.clock.steps_per_epoch,
        "loss": loss,
        "prior": prior,
        "invariance": invariance,
        "codes_used": int(metrics.codes_used),
        "lr": run.config.optimizer.lr * lr_scale,
        "grad_norm": None if metrics.grad_norm is None else float(metrics.grad_norm),
        "probe_train_accuracy": accuracy[0] if accuracy else None,
    }


def _test(run: Run, network: FalconNetwork, probe: nn.Linear | None) -> dict[str, Any]:
    """The online probe and the clustering of the codes on the test split, in evaluation mode."""
    bad: dict[int, str] = {}  # reported when the run ends, by the evaluation
    seen = extract_assigned(
        network, run.codes, run.config.tau, run.source.test, run.source, run.device, run.workers, bad
    )
    test = run.source.test.without(bad)
    assert probe is not None and test.labels is not None
    with torch.inference_mode():
        predicted = probe(torch.from_numpy(seen.features).to(run.device)).argmax(1).cpu().numpy()
    return {
        "probe_accuracy": float((predicted == test.labels).mean()),
        "nmi_codes": nmi(test.labels, seen.assignments),
        "test_codes_used": len(set(seen.assignments.tolist())),
    }
