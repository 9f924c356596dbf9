"""The weights that a new run starts from, if they are those of another run (`training.init_from`)."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from falcon_fast.config import Change, history_of
from falcon_fast.errors import UsageError
from falcon_fast.training.averaging import WeightAverage
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.selection import select
from falcon_fast.training.checkpoints.storage import Reader
from falcon_fast.training.run import Run

EXAMPLE = "give a run directory with a checkpoint, of the same model and size of views"


def initialise(run: Run) -> None:
    """Give a new run the weights of the run in `training.init_from`, and add a line to its notes; nothing if that is empty.

    The backbone's weights are taken, and the projector's if it has the same shape. If that run keeps an average of its weights,
    the average is taken. Optimiser, learning rate and count of steps are those of a new run. All processes call it together.

    Raises:
        UsageError: there is no checkpoint that can be used, or its backbone is another one.
    """
    source = run.config.training.init_from
    if not source:
        return
    directory = Path(source)
    with run.processes.together():
        try:
            there = directory.is_dir()
        except OSError:  # a name that is too long
            there = False
        if not there:
            raise UsageError(f"--init-from {source[:200]}: no such run directory: {EXAMPLE}")
        selected = select(directory)
        path, facts = selected.path, selected.facts
        whole = _load(run, path)
        step = int(facts["step"])
    average = run.learner.average
    if average is not None:
        run.learner.average = WeightAverage(run.network, average.decay)
    run.changes = [{**entry, "from_step": step} for entry in history_of([Change("training.init_from", "", source)], 0)]
    parts = "backbone and projector" if whole else "backbone; the projector has another shape and starts at random"
    run.notes = (*selected.notes(), f"starts from the weights of {path} ({parts})", *run.notes)


def _load(run: Run, path: Path) -> bool:
    """Load the backbone, and the projector if it fits; return whether it does."""
    stored = Reader(path).stored()
    averaged = any(name.startswith("average.") for name in stored)

    def name(key: str) -> str:
        return f"average.{key}" if averaged and f"average.{key}" in stored else f"network.{key}"

    wanted = {name(key): tensor for key, tensor in run.network.state_dict().items()}
    projector = {name(f"projector.{key}") for key in run.network.projector.state_dict()}
    fits = all(key in stored and stored[key].size == wanted[key].shape for key in projector)
    targets = wanted if fits else {key: tensor for key, tensor in wanted.items() if key not in projector}
    wrong = [key for key, tensor in targets.items() if key not in stored or stored[key].size != tensor.shape]
    if wrong:
        raise UsageError(
            f"--init-from {path.parent.parent}: its {wrong[0]} does not fit {run.config.model.name}: {EXAMPLE}"
        )
    checkpoint.load(path, nn.Module(), extra=targets)
    return fits
