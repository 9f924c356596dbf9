"""The loop over steps: data in, metrics and checkpoints out, and all the ways in which a run ends."""

from __future__ import annotations

import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from falcon_fast.errors import RunStopped, TrainingError
from falcon_fast.evaluation.clustering import nmi
from falcon_fast.evaluation.features import extract_assigned
from falcon_fast.models.network import FalconNetwork
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.compiled import compiler_failures
from falcon_fast.training.distributed.processes import StopAgreement, lost_peers
from falcon_fast.training.distributed.signals import stop_requests
from falcon_fast.training.inputs import feed_of, photometric_of, quarantine_of, share_bad
from falcon_fast.training.memory import out_of_memory
from falcon_fast.training.optimizer import learning_rate
from falcon_fast.training.records.console import TrainingDisplay
from falcon_fast.training.records.logs import RunLog, Throughput, metrics_row
from falcon_fast.training.run import Run, seed_process
from falcon_fast.training.stepper import stepper

NEVER = 2**62  # a step that does not come
STOPPING = "stopping after this step, with a checkpoint; Ctrl-C again stops at once, without"


def train(run: Run, directory: Path, console: Console, start_step: int = 0, seconds_before: float = 0.0) -> float:
    """The loop: steps `start_step` to the end, logged and checkpointed under `directory`. Returns the seconds of training.

    Of several processes, process 0 alone logs and tests; the others wait at the next step's collectives. Each saves its share.

    Raises:
        TrainingError: a loss is not finite, a checkpoint cannot be written, or another process is gone; the last good one stays.
        RunStopped: SIGINT or SIGTERM came to any process; the state was saved first.
    """
    config, processes, total, per_epoch = run.config, run.processes, run.total_steps, run.clock.steps_per_epoch
    optimizer = config.optimizer
    warmup = round(optimizer.warmup_epochs * per_epoch)
    save_every = config.checkpoint.every_steps or per_epoch
    test_every = config.log.evaluate_epochs * per_epoch
    checkpoints = directory / "checkpoints"

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    photometric = photometric_of(run, say)
    quarantine = quarantine_of(run, say, directory / "quarantine.csv")
    log = RunLog(run, directory, start_step)
    if start_step == 0:
        seed_process(run, 0)
    saver = checkpoint.Saver(checkpoints, config.checkpoint.keep, config.checkpoint.asynchronous, processes)
    steps = range(start_step, total)
    inputs, views_of = feed_of(run, steps, quarantine, photometric)
    take_step = stepper(run.learner, views_of, run.device, config.training.cuda_graph)
    run.network.train()
    first_bad = torch.full((), NEVER, dtype=torch.int64, device=run.device)  # the first step whose loss was not finite
    throughput = Throughput(run, say)
    started = time.monotonic()
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
            raise TrainingError(f"the loss is not finite at step {bad}: training stopped; {kept()}", everywhere=True)

    display = TrainingDisplay(console, total, start_step)
    with (
        compiler_failures(),
        out_of_memory(run, kept),
        run.precision.switches(),
        lost_peers(processes, kept),
        closing(inputs),
        saver,
        log,
        stop_requests(STOPPING if processes.main else "") as stop_requested,
        display,
    ):
        if total == 0:
            save(0)
        while start_step < total:
            waiting = time.monotonic()
            planned = next(inputs)
            throughput.step(time.monotonic() - waiting)
            scale = learning_rate(planned.step, optimizer.lr, total, warmup, optimizer.warmup_lr) / optimizer.lr
            step = planned.step + 1  # steps done, with this one
            last, testing = step == total, bool(test_every) and step % test_every == 0
            logging = step % config.log.every_steps == 0 or testing or last
            metrics = take_step(planned, scale, logging)
            first_bad = torch.where((first_bad == NEVER) & ~torch.isfinite(metrics.loss), step, first_bad)
            display.advance(step)

            stopping = agreed(stop_requested()) and not last
            if logging:
                check_finite()
                row = metrics_row(run, step, metrics, scale) | throughput.row() | {"seconds": elapsed()}
                if (testing or last) and run.probe is not None:
                    run.average_buffers()
                    with run.averaged():
                        network, probe = run.whole()
                        row |= _test(run, network, probe) if processes.main else {}
                log.write(row)
                if processes.main:
                    display.show(row, config.training.epochs)
                throughput.restart()
            if step % save_every == 0 or last or stopping:
                check_finite()
                save(step)
            if stopping:
                saver.wait()
                agreed.finish()
                raise RunStopped(everywhere=True)
            if last:
                agreed.finish()
                break
    return elapsed()


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
