"""Everything that the training loop needs around its steps, opened and closed as one context."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import nn

from falcon_fast.data.loaders.signals import lost_workers
from falcon_fast.data.sources.changes import Changes
from falcon_fast.errors import RunStopped, TrainingError, WriteError
from falcon_fast.evaluation.clustering import nmi
from falcon_fast.evaluation.features import extract_assigned
from falcon_fast.hardware.threads import check_threads
from falcon_fast.models.network import FalconNetwork
from falcon_fast.training.bad_steps import NEVER, BadSteps, Reading, diverged, skipped_line
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.saver import Saver
from falcon_fast.training.compiled import compiler_failures
from falcon_fast.training.distributed.signals import stop_requests
from falcon_fast.training.distributed.stopping import StopAgreement, lost_peers
from falcon_fast.training.inputs import feed_of, photometric_of, quarantine_of, share_bad
from falcon_fast.training.memory import out_of_memory
from falcon_fast.training.records.console import TrainingDisplay
from falcon_fast.training.records.logs import RunLog, Throughput, metrics_row
from falcon_fast.training.run import Run, seed_process
from falcon_fast.training.schedule import Schedule
from falcon_fast.training.skipping import any_non_finite, in_any_process
from falcon_fast.training.step import StepMetrics
from falcon_fast.training.stepper import stepper

STOPPING = "stopping after this step, with a checkpoint; press Ctrl-C again to stop at once, without a checkpoint"


class Session:
    """The context of a run's training loop: inputs, log, progress display, checkpoints, stop requests, and the guards that turn
    failures into clear errors. All processes enter it, and call its methods, together.

    Args:
        run: the run to train.
        directory: its run directory.
        console: where progress and notes are shown.
        start_step: optimisation steps that are done already.
        seconds_before: seconds of training that they took.
    """

    def __init__(self, run: Run, directory: Path, console: Console, start_step: int, seconds_before: float) -> None:
        config, self._console = run.config, console
        self._run, self._processes, self._directory = run, run.processes, directory
        self._checkpoints = directory / "checkpoints"
        photometric = photometric_of(run, self._say)
        self._quarantine = quarantine_of(run, self._say, directory / "quarantine.csv")
        self._test_changes = Changes(run.source.test.images, self._say)
        self._log = RunLog(run, directory, start_step, self._say)
        if start_step == 0:
            seed_process(run, 0)
        self._saver = Saver(self._checkpoints, config.checkpoint.keep, config.checkpoint.asynchronous, run.processes)
        self.schedule = Schedule(config, run.clock.steps_per_epoch, run.total_steps)
        self._steps = range(start_step, self.schedule.total_steps)
        self._inputs, views_of = feed_of(run, self._steps, self._quarantine, photometric)
        self._take_step = stepper(run.learner, views_of, run.device, config.training.cuda_graph)
        run.network.train()
        self._bad_steps, self._told = BadSteps(run), int(run.learner.bad_steps[0])
        self._throughput = Throughput(run, self._say)
        self._started, self._seconds_before = time.monotonic(), seconds_before
        self._agreed = StopAgreement(run.processes)
        self._stop_requested: Callable[[], bool] = lambda: False
        self._display = TrainingDisplay(console, self.schedule.total_steps, start_step)

    def __enter__(self) -> Session:
        with ExitStack() as opening:  # closes what is open already if something cannot be opened
            enter = opening.enter_context
            enter(compiler_failures(lambda: self._stop_requested()))
            enter(lost_workers(self._kept))
            enter(write_errors(lambda: f"training stopped; {self._kept()}"))
            enter(out_of_memory(self._run, self._kept))
            enter(self._run.precision.switches())
            enter(lost_peers(self._processes, self._kept))
            enter(closing(self._inputs))
            self._stop_requested = enter(stop_requests(STOPPING if self._processes.main else ""))
            enter(self._saver)  # a signal during its last checkpoint waits until that is written
            enter(self._log)
            enter(self._display)
            self._open = opening.pop_all()
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        return self._open.__exit__(*exception)

    @property
    def seconds(self) -> float:
        """Seconds of training until now, those before a resume included."""
        return self._seconds_before + time.monotonic() - self._started

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Yield the number of each step (from 1) and the loader's input for it; note how long the loop waited for that."""
        for _ in self._steps:
            waiting = time.monotonic()
            inputs = next(self._inputs)
            self._throughput.step(time.monotonic() - waiting)
            yield inputs.step + 1, inputs
            check_threads()

    def take_step(self, step: int, inputs: Any) -> StepMetrics:
        """Take one optimisation step on `inputs`. Nothing waits for the device."""
        metrics = self._take_step(inputs, self.schedule.rate(step), self.schedule.logs(step))
        self._bad_steps.note(step, metrics)
        self._display.advance(step)
        return metrics

    def stop_agreed(self, step: int) -> bool:
        """Whether all processes stop after this step, because any of them was asked to; False after the last step."""
        return self._agreed(self._stop_requested()) and not self.schedule.is_last(step)

    def log(self, step: int, metrics: StepMetrics) -> None:
        """Write a row of metrics.csv and show it; test the online probe where the schedule says so.

        Raises:
            DivergedError: too many steps in a row were bad.
        """
        run = self._run
        bad = self._check_bad_steps()
        row = {"bad_steps": bad.total} | metrics_row(run, step, metrics, self.schedule.rate(step))
        row |= self._throughput.row() | {"threads": torch.get_num_threads(), "seconds": self.seconds}
        if self.schedule.tests(step) and run.probe is not None:
            run.average_buffers()
            with run.averaged():
                network, probe = run.whole()
                if self._processes.main:
                    row |= measure_on_test_split(run, network, probe)
                    self._test_changes.look()
        self._log.write(row)
        if self._processes.main:
            self._display.show(row, run.config.training.epochs)
        self._throughput.restart()

    def save(self, step: int, stopping: bool = False) -> None:
        """Write a checkpoint, in the background if `checkpoint.asynchronous` says so.

        After a bad step none is written, unless the run stops here or this was its last step: the weights may be ruined, and the
        oldest checkpoint, which is removed for a new one, may be the last good one.

        Args:
            stopping: whether the run stops here.

        Raises:
            DivergedError: too many steps in a row were bad.
            TrainingError: the weights or moments are not finite, or this checkpoint, or the one before it, cannot be written.
        """
        run = self._run
        if step > 0 and (bad := self._check_bad_steps()).in_a_row and not (stopping or self.schedule.is_last(step)):
            self._say(
                f"no checkpoint is written at step {step}, as the last {bad.in_a_row} steps were skipped; {self._kept()}"
            )
            return
        run.average_buffers()
        share_bad(self._quarantine, self._processes)
        extra = run.learner.extra_state()
        tensors = checkpoint.collect(run.network, run.probe, run.learner.optimizer, extra, rank=self._processes.rank)
        self._check_finite(step, tensors)
        self._saver.save(step, tensors, {**run.facts, "seconds": self.seconds})

    def stop(self) -> NoReturn:
        """Wait until the checkpoint is written, and raise RunStopped."""
        self._saver.wait()
        self._agreed.finish()
        raise RunStopped(everywhere=True)

    def finish(self) -> None:
        """Wait for the question about stopping that is still on its way, and count the files that changed: the loop is over."""
        self._agreed.finish()
        for changes in (self._quarantine.changes, self._test_changes):
            if line := changes.summary():
                self._say(line)
        if (bad := self._bad_steps.read()).total:
            self._say(
                f"{bad.total} of {self.schedule.total_steps} steps were skipped, as their loss or gradient was not finite"
            )

    def _check_bad_steps(self) -> Reading:
        """Return the bad steps, after telling the user about new ones. Raises DivergedError if too many in a row were bad."""
        found = self._bad_steps.read()
        if found.ended < NEVER:
            with suppress(TrainingError):
                self._saver.wait()  # so that the message names the newest checkpoint
            raise diverged(self._run, str(self._directory), found, self._quarantine, self._kept())
        if found.total > self._told:
            self._say(skipped_line(found.total - self._told, found, str(self._directory)))
            self._told = found.total
        return found

    def _check_finite(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """Raise TrainingError if what would be saved is not finite: finite gradients can make weights or moments overflow."""
        found = in_any_process(any_non_finite(tensors.values(), self._run.device), self._processes.group)
        if found:
            with suppress(TrainingError):
                self._saver.wait()
            bad = [name for name, tensor in tensors.items() if any_non_finite([tensor], self._run.device)]
            name = self._processes.from_main(bad[0] if bad else "a tensor")
            raise TrainingError(
                f"{name} is not finite after step {step}: training stopped and this step was not saved; {self._kept()}; use a "
                "lower learning rate",
                everywhere=True,
            )

    def _kept(self) -> str:
        return checkpoint.kept(self._checkpoints)

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)


@contextmanager
def write_errors(kept: Callable[[], str]) -> Iterator[None]:
    """Add to a WriteError what `kept()` returns: what is saved, and how to go on."""
    try:
        yield
    except WriteError as error:
        raise WriteError(f"{error}; {kept()}", everywhere=error.everywhere) from None


def measure_on_test_split(run: Run, network: FalconNetwork, probe: nn.Linear | None) -> dict[str, Any]:
    """Return the online probe's accuracy and the clustering by codes on the test split, in evaluation mode."""
    bad: dict[int, str] = {}  # the evaluation reports unreadable images when the run ends
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
