"""Checkpoints: written whole or not at all, by torch.distributed.checkpoint's plans, and read as data only (storage.py).

`checkpoints/step-00000600/` holds safetensors files (network, optimiser, online probe, random state), their `index.json`, and
`run.json`, the facts that a resume must agree with. Every process writes its share, of what all have alike each a part, into one
directory under a temporary name beside its place; process 0 renames it when all are done. So a directory of that name is a
complete checkpoint whenever a process dies, and any number of processes reads it, each what it needs.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from falcon_fast.errors import TrainingError, UsageError
from falcon_fast.training.checkpoints.storage import INDEX, Reader, TensorPlanner, Writer, read_json
from falcon_fast.training.distributed.processes import Processes

FORMAT = 2  # raised when an older reader would misread
PREFIX = "step-"
SHARED_WITHIN = 60.0  # seconds: NFS may show another machine's new file as late as that (acdirmax)
ALONE = ".*assuming the intent is to .* in a single process"  # DCP's warning that there is no process group


def collect(
    network: nn.Module,
    probe: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, torch.Tensor] | None = None,
    rank: int = 0,
) -> dict[str, torch.Tensor]:
    """Every tensor that a resume needs, by name: `network.*`, `probe.*`, `optimizer.<parameter>.<moment>`, `random.*`, `extra`.

    Tensors are whole or DTensors. The random state is that of process `rank`, under a name of its own.
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


def _stager() -> DefaultStager:
    cuda = torch.cuda.is_available()
    return DefaultStager(StagingOptions(cuda, False, False, cuda))  # pinned, shared, in a thread, non-blocking


class Saver:
    """Writes the checkpoints of a run under `directory`, the newest `keep` of which stay. A context; all processes together.

    Asynchronous, `save` returns when the tensors are copied to the host's memory, which is kept for the next ones
    (pinned where there is CUDA); DCP writes them in a thread. One at most is under way: the next `save` waits for it. What goes
    wrong there is raised by the next `save`, `wait` or the end of the context, in all processes.

    The processes talk over a gloo group of their own: on the one that training uses, the thread's messages and the steps' mix,
    and gloo aborts the process ("op.preamble.length <= op.nbytes").

    Raises:
        UsageError: a process does not see the directory that process 0 made.
    """

    def __init__(
        self, directory: Path, keep: int, asynchronous: bool = False, processes: Processes | None = None
    ) -> None:
        self._directory, self._keep, self._asynchronous = directory, keep, asynchronous
        self._processes = processes = processes or Processes()
        self._token = processes.from_main(f"{socket.gethostname()}-{os.getpid()}")
        self._pending: tuple[Future[Any], Path] | None = None
        self._group: dist.ProcessGroup | None = None
        with processes.together():
            if processes.main:
                directory.mkdir(parents=True, exist_ok=True)
                for left in directory.glob(f".{PREFIX}*.partial"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
        if processes.group is None:
            warnings.filterwarnings("ignore", message=ALONE)
        else:
            self._check_shared()
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=processes.timeout))
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._stager = _stager()

    def _check_shared(self) -> None:
        marker, main = self._directory / f".{self._token}", self._processes.main
        with self._processes.together():
            if main:
                marker.touch()
        with self._processes.together():
            end = time.monotonic() + SHARED_WITHIN
            while not main and not marker.exists():
                if time.monotonic() > end:
                    raise UsageError(
                        f"cannot see {self._directory} as process 0 made it: put --run-dir on a file system that all "
                        "machines share"
                    )
                time.sleep(0.1)
        if main:
            marker.unlink()

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Write checkpoint `step`, when the one before is written. The tensors may change as soon as this returns.

        Raises:
            TrainingError: it, or the one before, cannot be written; nothing half-written stays.
        """
        self.wait()
        final = self._directory / f"{PREFIX}{step:08d}"
        temporary = self._partial(final)
        text = json.dumps({"format": FORMAT, "step": step, **facts}, indent=1)
        options: dict[str, Any] = {
            "storage_writer": Writer(temporary, lambda: self._publish(temporary, final, text)),
            "process_group": self._group,
            "no_dist": self._group is None,
        }
        if self._asynchronous:
            if (
                not self._stager._state_dict_stager._deepcopy_dispatch
            ):  # torch 2.11 empties it after use (KeyError: type)
                self._stager = _stager()
            self._pending = dcp.async_save(dict(tensors), async_stager=self._stager, **options), final  # type: ignore[assignment]
            return
        with self._failure(final):
            dcp.save(dict(tensors), **options)

    def wait(self) -> None:
        """Until nothing is under way. Raises what `save` does."""
        if self._pending is not None:
            (future, final), self._pending = self._pending, None
            with self._failure(final):
                future.result()

    def _partial(self, final: Path) -> Path:
        return final.with_name(f".{final.name}.{self._token}.partial")

    def _publish(self, temporary: Path, final: Path, text: str) -> None:
        """In process 0, when all is written: run.json, the name, and no more than `keep`."""
        with (temporary / "run.json").open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            self._remove(final)
        temporary.rename(final)
        for old in complete(self._directory)[: -self._keep]:
            self._remove(old)

    def _remove(self, path: Path) -> None:
        """Under another name, so that a process killed meanwhile leaves nothing that looks like a checkpoint."""
        doomed = path.with_name(f".{path.name}.old.{self._token}.partial")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    @contextmanager
    def _failure(self, final: Path) -> Iterator[None]:
        try:
            yield
        except dcp.CheckpointException as error:  # a BaseException; the same one in every process
            rank, (cause, _) = min(error.failures.items())
            who = f"process {rank}: " if self._group is not None else ""
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            raised = TrainingError(f"checkpoint {final} was not written ({who}{reason})")
            raised.agreed = self._group is not None  # type: ignore[attr-defined]
            raise raised from None
        finally:  # after success it has another name
            if self._processes.main:
                shutil.rmtree(self._partial(final), ignore_errors=True)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Waits for what is under way, whatever ended the context: an error that did is the one to tell."""
        with suppress(*(() if error is None else (Exception,))):
            self.wait()
        self._stager.close()


def complete(directory: Path) -> list[Path]:
    """Return the complete checkpoints under `directory`, oldest first. Raises UsageError if all have the old format."""
    found = sorted(p for p in directory.glob(f"{PREFIX}*") if (p / INDEX).is_file() and (p / "run.json").is_file())
    if not found and (old := sorted(p for p in directory.glob(f"{PREFIX}*") if (p / ".metadata").is_file())):
        raise UsageError(
            f"checkpoint {old[-1]} was written by an earlier development version of falcon_fast, in a format that can run "
            "code when it is read: it is not read; train again, or use the version that wrote it"
        )
    return found


def latest(run: Path) -> Path:
    """The newest complete checkpoint of a run directory. Raises UsageError when there is none."""
    found = complete(run / "checkpoints")
    if not found:
        raise UsageError(f"{run} holds no complete checkpoint (looked for {run / 'checkpoints' / PREFIX}*)")
    return found[-1]


def read_facts(path: Path) -> dict[str, Any]:
    """`run.json` of a checkpoint. Raises UsageError when it is damaged or of a newer format."""
    try:
        facts = read_json(path / "run.json")
        number = int(facts["format"])
        if number <= FORMAT:
            int(facts["step"]), float(facts["seconds"])  # which a resumed run needs
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"checkpoint {path} is damaged: run.json: {error}") from None
    if number > FORMAT:
        raise UsageError(
            f"checkpoint {path} has format {number}, this version reads up to {FORMAT}: update falcon_fast"
        )
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

    Each process calls it by itself and reads what it has: its shards of DTensors, all of other tensors. Evaluation leaves out
    probe and optimiser, and the random state then stays as it is; so it does in a process that the saved run had not.

    Raises:
        UsageError: the checkpoint is damaged, or belongs to another network.
    """
    reader = Reader(path)
    try:
        stored = reader.stored()
        targets = {f"network.{k}": v for k, v in network.state_dict().items()} | dict(extra or {})
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
        for key, target in targets.items():
            if key not in stored:
                raise UsageError(f"checkpoint {path} has no {key}: it belongs to another network")
            if stored[key].size != target.shape:
                raise UsageError(
                    f"checkpoint {path}: {key} has shape {tuple(stored[key].size)}, the network {tuple(target.shape)}"
                )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=ALONE)
            dcp.load(targets, storage_reader=reader, planner=TensorPlanner(), no_dist=True)
    except UsageError:
        raise
    except (Exception, dcp.CheckpointException) as error:  # CheckpointException is a BaseException
        reason = (str(error) or type(error).__name__).strip().splitlines()[-1]
        raise UsageError(f"checkpoint {path} is damaged ({reason}): remove it to use the one before") from None
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
    """Where the stored moments go: shaped, laid out and sharded like their parameter, or as stored (Adam's step counter, which
    stays on the host unless the optimiser is fused or captured).
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
