"""One step of a run, taken again with a look inside: which image and which layer first have numbers that are not finite.

Which images a step sees, and how they are cropped and coloured, depends on the seed, the epoch and the position alone, so any
batch can be made again. The weights come from the newest checkpoint before the step, or are the initial ones; the steps between
are taken again, too. In a run of one process without a compiler or a CUDA graph, on the same machine, the step is then the same
bit for bit. Nothing in the run directory is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_fast.config import Config, OnResume, differences, load_config, override, validate
from falcon_fast.data.loaders.quarantine import LARGEST_LIST, Quarantine
from falcon_fast.data.sources.listing import NAME as LISTING
from falcon_fast.errors import UsageError
from falcon_fast.evaluation.report import LARGEST_METRICS
from falcon_fast.kernels.torch_private import grad_scaler_state
from falcon_fast.reading import csv_records, one_line
from falcon_fast.runs.layer_statistics import Layer, Row, Watch, first_bad
from falcon_fast.training.bad_steps import batch_images, image_named
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.restore import settings_in, unfit
from falcon_fast.training.checkpoints.storage import Reader
from falcon_fast.training.inputs import feed_of, photometric_of
from falcon_fast.training.memory import out_of_memory
from falcon_fast.training.run import Run, prepare
from falcon_fast.training.schedule import Schedule
from falcon_fast.training.step import training_step

MAX_STEPS = 100  # steps that are taken again before the one that is asked for


@dataclass(frozen=True)
class Image:
    """An image of the batch.

    Attributes:
        place: its place in the batch, from 0.
        position: its position in the epoch.
        image: its number in the training split.
        file: its file, or "image N" where the images have no files.
        views: the views (1, 2) for which the first bad layer is not finite; empty for other images.
        gradient_norm: norm of the gradient with respect to its two embeddings; None if it is not finite.
    """

    place: int
    position: int
    image: int
    file: str
    views: tuple[int, ...]
    gradient_norm: float | None


@dataclass(frozen=True)
class Replay:
    """A step that has been taken again.

    Attributes:
        step: its number, from 1.
        weights_of_step: how many steps had been taken on the weights that it used; step - 1 if they are the run's own.
        bad: whether the step was skipped because its loss or a gradient is not finite.
        metrics: loss, prior and invariance in nats, codes in use, accuracy of the online probe, norm of the gradient; None where
            a figure was not measured.
        recorded: the loss that metrics.csv holds for this step; None if it has no row.
        images: all images of the batch, in its order.
        layers: the layers in the order of their outputs, for each micro-batch.
        culprit: where numbers stop being finite, in one sentence; None if all are finite.
        notes: what is not as it was in the run, a line each.
    """

    step: int
    weights_of_step: int
    bad: bool
    metrics: dict[str, float | None]
    recorded: float | None
    images: list[Image]
    layers: list[Layer]
    culprit: str | None
    notes: tuple[str, ...]


def replay(
    directory: Path,
    step: int,
    device: str | None = None,
    data: str | None = None,
    max_steps: int = MAX_STEPS,
    say: Callable[[str], None] = lambda line: None,
) -> Replay:
    """Take step `step` (from 1) of the run in `directory` again, and return what passed through every layer.

    Args:
        device: auto, cpu, cuda or cuda:N; None for the run's own.
        data: where the images are now; None for the run's own path.
        max_steps: steps that may be taken again before this one. If there are more from the checkpoint before it, the batch is
            shown to the weights of the nearest checkpoint.
        say: takes lines for the user while this works.

    Raises:
        UsageError: there is no such run or step, or the images or the checkpoint are not those of the run.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such run directory")
    saved = load_config(directory / "config.toml")
    run = prepare(_alone(saved, device, data), listing=directory / LISTING)
    if not 1 <= step <= run.total_steps:
        raise UsageError(f"--step {step}: the run has the steps 1 to {run.total_steps}")
    found = {int(path.name.removeprefix(checkpoint.PREFIX)): path for path in _complete(directory)}
    start = max((done for done in found if done < step), default=0)
    notes = [*_differences(saved, run, list(found.values()))]
    if step - 1 - start > max_steps:
        start = min((0, *found), key=lambda done: abs(done - (step - 1)))
        first = step - 1
        notes.append(
            f"the weights are those of step {start}, the nearest checkpoint, not of step {step - 1}: more than {max_steps} "
            f"steps lie between step {step} and the checkpoint before it (--max-steps)"
        )
    else:
        first = start
    if start:
        notes += _restore(run, found[start], saved)
    elif any(getattr(module, "p", 0) or getattr(module, "drop_prob", 0) for module in run.network.modules()):
        notes.append("the network has dropout, whose random state at the beginning of the run was not saved")
    quarantine = Quarantine(run.source.train.images, run.config.data.max_bad_fraction, known=_known_bad(run, directory))
    if first < step - 1:
        say(
            f"taking steps {first + 1} to {step - 1} again, from {'the checkpoint' if start else 'the initial weights'}"
        )
    photometric = photometric_of(run, say)
    schedule = Schedule(run.config, run.clock.steps_per_epoch, run.total_steps)
    inputs, views_of = feed_of(run, range(first, step), quarantine, photometric)
    run.network.train()
    scaler = run.learner.scaler
    with closing(inputs), run.precision.switches(), out_of_memory(run):
        for each in inputs:
            last = each.step == step - 1
            if not last:
                training_step(run.learner, *views_of(each), schedule.rate(each.step + 1))
                continue
            scale = grad_scaler_state(scaler)[0] if scaler is not None else None
            watch = Watch(run.network, 1.0 if scale is None else scale.item())
            with watch.watching():
                metrics = training_step(run.learner, *views_of(each), schedule.rate(step), True)
    numbers = batch_images(run, step, quarantine.bad)
    culprit, rows = _culprit(watch.layers, len(numbers), bool(metrics.bad))
    positions = run.clock.at(step - 1).positions.tolist()
    norms = watch.gradient_norms if len(watch.gradient_norms) == len(numbers) else [math.nan] * len(numbers)
    images = [
        Image(
            place,
            position,
            number,
            run.source.train.images.name(number),
            tuple(sorted(row.view for row in rows if row.place == place)),
            norm if math.isfinite(norm) else None,
        )
        for place, (position, number, norm) in enumerate(zip(positions, numbers, norms, strict=True))
    ]
    if culprit is not None and rows:
        culprit += ": " + _named(run, [image for image in images if image.views])
    return Replay(
        step,
        start if first == step - 1 else step - 1,
        bool(metrics.bad),
        {name: None if value is None else float(value) for name, value in metrics._asdict().items() if name != "bad"},
        _recorded(directory / "metrics.csv", step),
        images,
        watch.layers,
        culprit,
        tuple(notes),
    )


def _alone(config: Config, device: str | None, data: str | None) -> Config:
    """Return the configuration for one process, which the hooks can watch."""
    changes: dict[str, Any] = {
        "training.strategy": "single",
        "training.compile": False,
        "training.cuda_graph": False,
    }
    if device is not None:
        changes["training.device"] = device
    if data is not None:
        changes["data.path"] = str(Path(data).expanduser().absolute())
    return validate(override(config, changes))


def _complete(directory: Path) -> list[Path]:
    folder = directory / "checkpoints"
    return checkpoint.complete(folder) if folder.is_dir() else []


def _differences(saved: Config, run: Run, checkpoints: list[Path]) -> list[str]:
    """Return what makes the step differ from the run's by rounding, a line each."""
    notes = []
    processes = 1
    if checkpoints:
        try:
            processes = sum(name.startswith("random.cpu") for name in Reader(checkpoints[-1]).stored())
        except (OSError, ValueError):
            processes = 1  # `_restore` reports a damaged checkpoint
    if processes > 1:
        notes.append(f"the run had {processes} processes; here one process takes the whole batch, and rounding differs")
        if saved.loss.prior_scope == "local" or not saved.training.sync_batchnorm:
            notes.append("the run's prior or BatchNorm saw each process's share alone; here they see the whole batch")
    if saved.training.compile or saved.training.cuda_graph:
        notes.append("the run was compiled or used a CUDA graph; here each layer runs by itself, and rounding differs")
    return notes


def _restore(run: Run, path: Path, saved: Config) -> list[str]:
    """Restore the run from a checkpoint, and return a line if config.toml, `saved`, has other settings for what is learned."""
    facts = checkpoint.verify(path)
    if reason := unfit(run, facts):
        raise UsageError(f"cannot replay from {path}: {reason}")
    checkpoint.load(path, run.network, run.probe, run.learner.optimizer, run.learner.extra_state())
    before = settings_in(facts, path)
    changes = [] if before is None else differences(before, saved)
    asked = ", ".join(str(change) for change in changes if change.rule is OnResume.ASKED)
    return (
        [f"config.toml has other settings than {path.name}, and the step is taken with them: {asked}"] if asked else []
    )


def _known_bad(run: Run, directory: Path) -> dict[int, str]:
    """Return the images that the run could not read, number -> reason, without changing its list."""
    known, path = dict(run.source.known_bad), directory / "quarantine.csv"
    if path.exists():
        try:
            known |= {int(row["image"]): row["reason"] for row in csv_records(path, LARGEST_LIST) if row["image"]}
        except (OSError, KeyError, ValueError) as error:
            raise UsageError(f"{path} is damaged ({one_line(error)})") from None
    return known


def _recorded(path: Path, step: int) -> float | None:
    """Return the loss of a step in metrics.csv, None if there is no such row."""
    try:
        rows = csv_records(path, LARGEST_METRICS)
        return next((float(row["loss"]) for row in rows if row["step"] == str(step)), None)
    except (OSError, KeyError, ValueError):
        return None


def _culprit(layers: list[Layer], images: int, bad: bool) -> tuple[str | None, list[Row]]:
    """Return where numbers stop being finite, in a sentence, and the images to which that is confined (none: all of them)."""
    found = first_bad(layers)
    if found is None:
        return (
            "every output and gradient is finite, but the loss or a gradient of the weights is not" if bad else None
        ), []
    layer, forward = found
    alike = [each for each in layers if each.name == layer.name]  # one for each micro-batch
    rows = [row for each in alike for row in (each.bad_rows if forward else each.bad_gradient_rows) or []]
    if layer.name == "views":
        text = "the images themselves are not finite after augmentation and normalisation"
    elif forward:
        text = f"the output of {layer.name} ({layer.kind}) is the first that is not finite"
    else:
        text = f"the gradient of the output of {layer.name} ({layer.kind}) is the first that is not finite"
    if layer.bad_parameters:
        text += f", because its own {' and '.join(layer.bad_parameters)} is not finite"
    if len({row.place for row in rows}) == images:
        return f"{text}, for every image", []
    return text, rows


def _named(run: Run, images: list[Image], most: int = 5) -> str:
    named = ", ".join(
        f"{image_named(run, image.image)} in view {' and '.join(map(str, image.views))}" for image in images[:most]
    )
    return named + (f" and {len(images) - most} more" if len(images) > most else "")
