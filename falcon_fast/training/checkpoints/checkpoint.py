"""What a checkpoint holds, and how it is found and read. It is data only: no code of a file is run.

`checkpoints/step-00000600/` holds the tensors (network, optimiser, online probe, weight average, random state) as safetensors
files with their `index.json` (storage.py), and `run.json`: all settings of the run, and the facts that must be the same when it
is resumed. A directory of that name is always complete, because it is written under another name and renamed (saver.py). Every
file has a checksum (integrity.py). Any number of processes can read it, each what it needs.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from falcon_fast.errors import UsageError
from falcon_fast.reading import one_line, read_json
from falcon_fast.training.checkpoints.integrity import SEAL, check_files, check_seal
from falcon_fast.training.checkpoints.storage import INDEX, LARGEST_INDEX, Reader, TensorPlanner

FORMAT = 3  # is raised when an older reader would misunderstand a checkpoint
FIRST_SEALED = 3  # the first format with checksums
PREFIX = "step-"
NAME = re.compile(rf"{PREFIX}\d{{8,}}")
LATER = ("bad_steps",)  # tensors that checkpoints of the first versions lack; the run's own then keep their values
LARGEST_FACTS = 2**20  # bytes of run.json, which has 1 KB
LONGEST_FACT = 2**14  # characters; a message may show a fact
MOST_LISTS = 100  # in a fact; thousands inside each other cannot be shown
LARGEST_LEVEL = 1e6  # of a mean or standard deviation of pixels in [0, 1]
ALONE = ".*assuming the intent is to .* in a single process"  # DCP warns so when there is no process group


def collect(
    network: nn.Module,
    probe: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, torch.Tensor] | None = None,
    rank: int = 0,
) -> dict[str, torch.Tensor]:
    """Return every tensor that a resumed run needs, by name.

    The names are `network.*`, `probe.*`, `optimizer.<parameter>.<moment>`, `random.*`, and those of `extra`. Tensors are plain
    ones or DTensors. The random state is that of process `rank`, and has a name of its own for each process.
    """
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    if probe is not None:
        tensors |= {f"probe.{k}": v for k, v in probe.state_dict().items()}
    for name, parameter in _parameters(network, probe).items():
        tensors |= {f"optimizer.{name}.{k}": v for k, v in optimizer.state[parameter].items() if torch.is_tensor(v)}
    return tensors | _random_states(rank) | dict(extra or {})


def _parameters(network: nn.Module, probe: nn.Module | None) -> dict[str, nn.Parameter]:
    modules = {"network": network} | ({} if probe is None else {"probe": probe})
    return {f"{prefix}.{k}": v for prefix, module in modules.items() for k, v in module.named_parameters()}


def _random_states(rank: int) -> dict[str, torch.Tensor]:
    process = f".{rank}" if rank else ""
    states = {f"random.cpu{process}": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states[f"random.cuda{process}"] = torch.cuda.get_rng_state()
    return states


def named(directory: Path) -> list[Path]:
    """Return whatever has the name of a checkpoint in `directory`, oldest first."""
    found = (path for path in directory.glob(f"{PREFIX}*") if NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def complete(directory: Path) -> list[Path]:
    """Return the complete checkpoints in `directory`, oldest first. Raises UsageError if all have the old, unsafe format."""
    found = [path for path in named(directory) if (path / INDEX).is_file() and (path / "run.json").is_file()]
    if not found and (old := [path for path in named(directory) if (path / ".metadata").is_file()]):
        raise UsageError(
            f"checkpoint {old[-1]} was written by an earlier development version of falcon_fast, in a format that can run "
            "code when it is read, so it is not read: train again, or use the version that wrote it"
        )
    return found


def kept(directory: Path) -> str:
    """Return what `directory` keeps of a run that ended, as the end of a message."""
    if not directory.is_dir():
        return f"{directory} is not there any more, so put it back before the run is continued"
    found = complete(directory)
    return f"the last good checkpoint is {found[-1]}" if found else "no checkpoint had been written"


def latest(run: Path) -> Path:
    """Return the newest complete checkpoint of a run directory. Raises UsageError if there is none."""
    found = complete(run / "checkpoints")
    if not found:
        raise UsageError(f"{run} holds no complete checkpoint (looked for {run / 'checkpoints' / PREFIX}*)")
    return found[-1]


def read_facts(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint's run.json. Raises UsageError if it is damaged or has a newer format."""
    try:
        facts = read_json(path / "run.json", LARGEST_FACTS)
        number = facts.get("format") if isinstance(facts, dict) else None
        if type(number) is not int:
            raise ValueError("it names no format")
        if number <= FORMAT:
            if number >= FIRST_SEALED or SEAL in facts:
                check_seal(facts)
            _check_facts(facts)
    except (OSError, ValueError, RecursionError) as error:  # json.dumps goes less deep than json.loads
        raise UsageError(f"checkpoint {path} is damaged: run.json: {one_line(error)}") from None
    if number > FORMAT:
        raise UsageError(
            f"checkpoint {path} has format {number}, but this version reads formats up to {FORMAT}: update falcon_fast"
        )
    return dict(facts)


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Raise ValueError if a fact that the code works with (and does not only compare) is missing or out of range."""
    for name, value in facts.items():
        if not name.isprintable() or (isinstance(value, str) and not value.isprintable()):
            raise ValueError("a fact is not printable text")
        text = json.dumps(value)
        if len(name) + len(text) > LONGEST_FACT or (not isinstance(value, str) and text.count("[") > MOST_LISTS):
            raise ValueError(f"its {name[:80]} is longer than any fact of a run")
    step, seconds = facts.get("step"), facts.get("seconds")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
        raise ValueError("its step is not the number of a step")
    if not isinstance(seconds, int | float) or not 0 <= seconds < 2**53:
        raise ValueError("its seconds are not a time")
    for name, least in (("mean", -math.inf), ("std", 0.0)):
        if name in facts:
            numbers = facts[name]
            if (
                not isinstance(numbers, list)
                or len(numbers) != 3
                or not all(type(n) in (int, float) and least < n and abs(n) < LARGEST_LEVEL for n in numbers)
            ):
                raise ValueError(f"its {name} is not that of three colour channels")


def check_network(path: Path, network: nn.Module) -> None:
    """Raise UsageError if checkpoint `path` is damaged or belongs to another network. Nothing is loaded.

    network: may be on the meta device, where it takes no memory.
    """
    try:
        stored = Reader(path).stored()
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    _check_shapes(path, stored, {f"network.{k}": v for k, v in network.state_dict().items()})


def _check_shapes(path: Path, stored: Mapping[str, TensorStorageMetadata], targets: Mapping[str, torch.Tensor]) -> None:
    for key, target in targets.items():
        if key not in stored:
            raise UsageError(f"checkpoint {path} has no {key}: it belongs to another network")
        if stored[key].size != target.shape:
            raise UsageError(
                f"checkpoint {path}: {key} has shape {tuple(stored[key].size)}, but {tuple(target.shape)} in the network: "
                "it belongs to another network"
            )


def _damaged(path: Path, error: BaseException) -> UsageError:
    return UsageError(
        f"checkpoint {path} is damaged ({one_line(error, last=True)}): remove it to use the one before it"
    )


def verify(path: Path) -> dict[str, Any]:
    """Read every file of a checkpoint once, compare it with its checksum, and return the contents of run.json.

    Checkpoints of format 2, which have no checksums, are taken as they are.

    Raises:
        UsageError: a file is missing or damaged, or the format is newer.
    """
    facts = read_facts(path)
    if SEAL in facts:
        try:
            index = read_json(path / INDEX, LARGEST_INDEX)
        except (OSError, ValueError) as error:
            raise UsageError(f"checkpoint {path} is damaged: {INDEX}: {error}") from None
        check_files(path, facts, index, INDEX)
    return facts


def load(
    path: Path,
    network: nn.Module,
    probe: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
    rank: int = 0,
) -> None:
    """Restore the modules, the optimiser, the random state and the tensors `extra` from checkpoint `path`, in place.

    Each process calls it alone and reads what it needs: its shards of DTensors, and all of other tensors. Without `optimizer`, as
    in an evaluation, the random state is not restored; it is not restored either in a process that the saved run did not have.

    Raises:
        UsageError: the checkpoint is damaged, or belongs to another network.
    """
    reader = Reader(path)
    try:
        stored = reader.stored()
        targets = {f"network.{k}": v for k, v in network.state_dict().items()}
        targets |= {k: v for k, v in (extra or {}).items() if k in stored or k not in LATER}
        if probe is not None:
            targets |= {f"probe.{k}": v for k, v in probe.state_dict().items()}
        moments: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
        states: dict[str, torch.Tensor] = {}
        if optimizer is not None:
            moments = _empty_moments(_parameters(network, probe), optimizer, stored)
            for name, parameter in _parameters(network, probe).items():
                targets |= {f"optimizer.{name}.{k}": v for k, v in moments[parameter].items()}
            states = {k: v for k, v in _random_states(rank).items() if k in stored}
        targets |= states
        _check_shapes(path, stored, targets)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=ALONE)
            dcp.load(targets, storage_reader=reader, planner=TensorPlanner(), no_dist=True)
    except UsageError:
        raise
    except MemoryError:
        raise UsageError(f"checkpoint {path} does not fit into the memory of this machine: use a larger one") from None
    except (Exception, dcp.CheckpointException) as error:  # CheckpointException is a BaseException
        raise _damaged(path, error) from None
    if optimizer is not None:
        for parameter, state in moments.items():
            if state:
                optimizer.state[parameter] = state
        for key, value in states.items():
            (torch.cuda.set_rng_state if key.startswith("random.cuda") else torch.set_rng_state)(value)


def _empty_moments(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    stored: Mapping[str, TensorStorageMetadata],
) -> dict[nn.Parameter, dict[str, torch.Tensor]]:
    """Return empty tensors for the stored moments.

    A moment has the shape, memory layout and sharding of its parameter; or its stored shape, as Adam's step counter does, which
    stays on the host unless the optimiser is fused or captured.
    """
    on_device = {p for g in optimizer.param_groups if g.get("fused") or g.get("capturable") for p in g["params"]}
    moments: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    for name, parameter in parameters.items():
        state = moments[parameter] = {}
        prefix = f"optimizer.{name}."
        for key, entry in stored.items():
            if not key.startswith(prefix):
                continue
            dtype = entry.properties.dtype
            if entry.size == parameter.shape:
                state[key.removeprefix(prefix)] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            else:
                device = parameter.device if parameter in on_device else "cpu"
                state[key.removeprefix(prefix)] = torch.zeros(entry.size, dtype=dtype, device=device)
    return moments
