"""What a run makes of its bad steps, those that are skipped because the loss or a gradient is not finite (skipping.py).

One bad step in a long run does no harm. Many in a row mean that the weights are ruined (a learning rate that is too high), and
no later step will be better: after `training.max_bad_steps` of them the run ends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.errors import DivergedError
from falcon_fast.training.run import Run
from falcon_fast.training.step import StepMetrics

NEVER = 2**62  # larger than the number of any step
NAMED = 3  # images of a batch that a message names; `falcon-fast replay` lists all


class Reading(NamedTuple):
    """The bad steps as the host reads them. Steps are numbered from 1.

    Attributes:
        total: number of bad steps so far.
        in_a_row: number of the last steps in a row that were bad.
        last: the last bad step that this process has seen, 0 if there was none.
        ended: the step at which as many in a row were bad as the run allows, `NEVER` if that has not happened.
    """

    total: int
    in_a_row: int
    last: int
    ended: int


class BadSteps:
    """Follows the bad steps of a run on the device, and reads them where the caller asks for it.

    Args:
        run: the run, whose learner counts them.
    """

    def __init__(self, run: Run) -> None:
        self._counts, self._limit = run.learner.bad_steps, run.config.training.max_bad_steps
        self._last = torch.zeros((), dtype=torch.int64, device=self._counts.device)
        self._ended = torch.full_like(self._last, NEVER)

    def note(self, step: int, metrics: StepMetrics) -> None:
        """Note the outcome of a step. Nothing waits for the device."""
        bad = metrics.bad
        assert bad is not None
        self._last = torch.where(bad, step, self._last)
        ends = (self._counts[1] >= self._limit) & (self._ended == NEVER)
        self._ended = torch.where(ends, step, self._ended)

    def read(self) -> Reading:
        """Return the numbers. The host waits for the steps that are on their way."""
        return Reading(*torch.cat((self._counts, torch.stack((self._last, self._ended)))).tolist())


def batch_images(run: Run, step: int, bad_images: dict[int, str]) -> list[int]:
    """Return the numbers of the images of step `step` (from 1) over all processes, in the order of the batch.

    bad_images: the images that cannot be read; the ones that stand in for them are returned.
    """
    plan = run.clock.at(step - 1)
    return [
        next(image for image in run.clock.candidates(plan.epoch, int(position)) if image not in bad_images)
        if int(index) in bad_images
        else int(index)
        for position, index in zip(plan.positions, plan.indices, strict=True)
    ]


def image_named(run: Run, image: int) -> str:
    """Return how messages name an image of the training split: its file and its number."""
    name = run.source.train.images.name(image)
    return name if name == f"image {image}" else f"{name} (image {image})"


def batch_described(run: Run, step: int, quarantine: Quarantine) -> str:
    """Return one phrase on the batch of a step: its positions in the epoch, and the numbers and names of the first images."""
    plan, images = run.clock.at(step - 1), batch_images(run, step, quarantine.bad)
    named = [image_named(run, image) for image in images[:NAMED]]
    more = f" and {len(images) - NAMED} more" if len(images) > NAMED else ""
    first, last = int(plan.positions[0]), int(plan.positions[-1])
    return f"positions {first} to {last} of epoch {plan.epoch + 1}: {', '.join(named)}{more}"


def diverged(run: Run, directory: str, found: Reading, quarantine: Quarantine, kept: str) -> DivergedError:
    """Return the error that ends a run with too many bad steps in a row.

    Args:
        directory: the run directory, for the command that shows more.
        kept: a phrase on what is saved.
    """
    limit = run.config.training.max_bad_steps
    first = found.ended - limit + 1
    steps = f"step {first}" if limit == 1 else f"steps {first} to {found.ended}"
    return DivergedError(
        f"the loss or its gradient is not finite at {steps}: training stopped after training.max_bad_steps = {limit} in a row, "
        f"none of which changed the weights; {kept}; the batch of step {first} has "
        f"{batch_described(run, first, quarantine)}; `falcon-fast replay {directory} --step {first}` shows where it begins",
        everywhere=True,
    )


def skipped_line(new: int, found: Reading, directory: str) -> str:
    """Return the line for the user about `new` bad steps since the line before."""
    steps = "1 step was" if new == 1 else f"{new} steps were"
    return (
        f"{steps} skipped, because the loss or its gradient is not finite (the last: step {found.last}; {found.total} in all); "
        f"`falcon-fast replay {directory} --step {found.last}` shows where it begins"
    )
