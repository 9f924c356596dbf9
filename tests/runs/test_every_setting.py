"""Every setting with every kind of value, alone and in pairs: it starts and takes a step, or it is refused in one line.

Nothing is written by a run that is refused.
"""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from falcon_fast.config import SECTIONS, load_recipe, override, settings, validate
from falcon_fast.errors import UsageError
from falcon_fast.objective.loss import PLANS, PRIORS
from falcon_fast.objective.projector import ACTIVATIONS
from falcon_fast.runs import start
from falcon_fast.runs.lock import RunLock
from falcon_fast.training.distributed.processes import join
from falcon_fast.training.session import Session

from ..training.tiny import QUIET

SMALL = {
    "model.width": 4,
    "loss.embedding_dim": 32,
    "loss.num_codes": 64,
    "training.batch_size": 16,
    "training.device": "cpu",
    "log.tensorboard": False,
}
# Values of each type, from the ordinary to the absurd. None of them is large and still possible: such a run would only be slow.
VALUES: dict[type, tuple[Any, ...]] = {
    int: (0, 1, -1, 2, 3, 64, 2**31, 2**62, 2**63 - 1, -(2**63)),
    float: (0.0, -0.0, 0.5, 1.0, -1.0, 1e-320, 1e-30, 1e30, 1e308, float("nan"), float("inf"), -float("inf")),
    bool: (False, True),
    str: ("", " ", "auto", "no such thing", "\0", "é\u2028", "../..", "x" * 5000, "/dev/null", "-1"),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "data.source": settings.SOURCES,
    "data.augmentation": ("digits", "imagenet-asymmetric", "cifar"),
    "data.loader": settings.LOADERS,
    "data.photometric": ("eager", "cpu", "triton"),  # compiled takes half a minute
    "model.name": ("resnet8", "resnet18", "vit_tiny_patch16_224", "resnet18.a1_in1k"),
    "model.stem": settings.STEMS,
    "loss.codes": settings.DICTIONARIES,
    "loss.activation": ACTIVATIONS,
    "loss.prior": PRIORS,
    "loss.prior_scope": settings.PRIOR_SCOPES,
    "loss.implementation": settings.IMPLEMENTATIONS,
    "loss.plan": PLANS,
    "optimizer.name": settings.OPTIMIZERS,
    "training.precision": settings.PRECISIONS,
    "training.device": ("cpu", "cuda", "cuda:7", "cuda:99999999999999999999", "cuda:-1", "cpu:3", "meta", "mps", "xla"),
    "training.strategy": settings.STRATEGIES,
    "fsdp.param_dtype": settings.PARAM_DTYPES,
}
SLOW = {("training.compile", True)}  # half a minute each; tests/training/test_compiled.py
FEWER_WORKERS = (0, 1, -1, 33, 100_000, 2**63 - 1)


def values_of(name: str, kind: type) -> tuple[Any, ...]:
    if name == "data.workers":
        return FEWER_WORKERS
    return VALUES[kind] + CHOICES.get(name, ())


FIELDS = {
    f"{section}.{key}": values_of(f"{section}.{key}", type(field.default))
    for section, cls in SECTIONS.items()
    for key, field in cls.__dataclass_fields__.items()
}


def outcome(assignments: dict[str, Any], directory: Path) -> str:
    """Start a run with these settings and take one step; return the line that refuses it, or "" if it went well."""
    try:
        config = validate(override(load_recipe("digits"), SMALL | assignments))
        training = config.training
        processes = join(training.strategy, training.device, training.batch_size, training.timeout)
        with RunLock(directory) as lock:
            begun = start.begin(config, directory, "new", processes, lock, say=lambda line: None)
            assert begun is not None
            list(begun.lines())
            with Session(begun.run, directory, QUIET, 0, 0.0) as session:
                for step, inputs in session.batches():
                    float(session.take_step(step, inputs).loss)
                    break
                session.finish()
    except UsageError as error:
        line = str(error)
        assert line and "\n" not in line and len(line) < 6000, line
        assert not directory.exists(), f"refused, but {sorted(directory.iterdir())} was written: {line[:200]}"
        return line
    shutil.rmtree(directory)
    return ""


def checked(assignments: dict[str, Any], directory: Path) -> str:
    try:
        return outcome(assignments, directory)
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise AssertionError(f"{assignments}: {type(error).__name__}: {error}") from error


def singles() -> Iterator[tuple[str, Any]]:
    for name, values in FIELDS.items():
        yield from ((name, value) for value in values if (name, value) not in SLOW)


def pairs(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Draw pairs of settings at random, always the same ones."""
    draw = random.Random(seed)
    every = list(singles())
    for _ in range(count):
        yield dict(draw.sample(every, 2))


def test_values_are_drawn_for_every_setting() -> None:
    assert set(FIELDS) == {f"{s}.{key}" for s, cls in SECTIONS.items() for key in cls.__dataclass_fields__}
    assert all(len(values) >= 2 for values in FIELDS.values())


def test_a_few_dozen_pairs_run_or_are_refused(tmp_path: Path) -> None:
    lines = [checked(pair, tmp_path / "run") for pair in pairs(60, 1)]
    assert lines.count("") >= 3 and len(lines) - lines.count("") >= 10  # both happen


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_every_value_runs_or_is_refused(name: str, tmp_path: Path) -> None:
    for value in FIELDS[name]:
        if (name, value) not in SLOW:
            checked({name: value}, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_two_thousand_pairs_run_or_are_refused(seed: int, tmp_path: Path) -> None:
    for pair in itertools.chain(pairs(100, 100 + seed)):
        checked(pair, tmp_path / "run")
