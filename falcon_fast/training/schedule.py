"""At which steps a run logs, tests and saves, and how fast it learns at each of them."""

from __future__ import annotations

from dataclasses import dataclass

from falcon_fast.config import Config
from falcon_fast.training.optimizer import Rate, rate_at


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run. A step is numbered by the optimisation steps that are done after it, from 1.

    config: the run's configuration.
    steps_per_epoch, total_steps: optimisation steps in an epoch, and in the run.
    """

    config: Config
    steps_per_epoch: int
    total_steps: int

    def rate(self, step: int) -> Rate:
        """Return what makes of every group's peak learning rate the one of this step."""
        optimizer = self.config.optimizer
        warmup = round(optimizer.warmup_epochs * self.steps_per_epoch)
        return rate_at(step - 1, self.total_steps, warmup, optimizer.warmup_lr)

    def is_last(self, step: int) -> bool:
        return step == self.total_steps

    def tests(self, step: int) -> bool:
        """Whether the online probe and the codes are tested on the test split: every `log.evaluate_epochs`, and at the end."""
        every = self.config.log.evaluate_epochs * self.steps_per_epoch
        return (bool(every) and step % every == 0) or self.is_last(step)

    def logs(self, step: int) -> bool:
        """Whether a row of metrics.csv is written: every `log.every_steps`, and with every test."""
        return step % self.config.log.every_steps == 0 or self.tests(step)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written: every `checkpoint.every_steps` (0: every epoch), and at the end."""
        return step % (self.config.checkpoint.every_steps or self.steps_per_epoch) == 0 or self.is_last(step)
