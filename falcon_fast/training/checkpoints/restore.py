"""A run put back to where its newest checkpoint was written.

Which settings may differ is decided before, in runs/directory.py (`CHANGEABLE`).
"""

from __future__ import annotations

from pathlib import Path

from falcon_fast.errors import UsageError
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.run import Run, seed_process

# Facts that the first checkpoints do not hold.
LATER_FACTS = ("seed", "global batch", "augmentation", "view size", "model", "optimizer", "precision", "dictionary")


def restore(run: Run, directory: Path) -> tuple[int, float]:
    """Restore `run` in place from the newest checkpoint of its directory. All processes call it together.

    Returns:
        The number of steps that are done, and the seconds that they took.

    Raises:
        UsageError: there is no complete checkpoint, or it was made with other data, codes, temperature or settings.
    """
    processes, path = run.processes, directory
    with processes.together():
        if processes.main:
            path = checkpoint.latest(directory)
    path = processes.from_main(path)  # a shared file system may show the newest one to some processes only
    with processes.together():
        facts = checkpoint.read_facts(path)
        for key, value in run.facts.items():
            if key not in facts and key in LATER_FACTS:
                continue
            if facts.get(key) != value:
                raise UsageError(
                    f"cannot resume {path}: its {key} was {facts.get(key)}, now it is {value}: resume with what it had, or "
                    "start another run"
                )
        seed_process(run, int(facts["step"]))
        checkpoint.load(
            path, run.network, run.probe, run.learner.optimizer, run.learner.extra_state(), rank=processes.rank
        )
    return int(facts["step"]), float(facts["seconds"])
