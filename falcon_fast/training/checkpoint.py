"""Checkpoints: torch.distributed.checkpoint directories, written whole or not at all, read as data only.

`checkpoints/step-00000600/` holds DCP's files, tensors only (network, optimiser, online probe, random state), and `run.json`, the
facts that a resume must agree with. It is written under a temporary name beside its place and renamed when complete, so
that a directory of that name is a complete checkpoint whenever the process dies.

DCP's own reader unpickles `.metadata` and any non-tensor entry. Here `.metadata` goes through an unpickler that knows DCP's own
record types and nothing else, and non-tensor entries are refused: a checkpoint from elsewhere runs no code.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo

from falcon_fast.errors import UsageError

FORMAT = 1  # raised when an older reader would misread
PREFIX = "step-"


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == dcp_metadata.__name__ and isinstance(found := getattr(dcp_metadata, name, None), type):
            return found
        if (module, name) == (_StorageInfo.__module__, "_StorageInfo"):
            return _StorageInfo
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype | torch.layout)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return getattr(torch.serialization, name)
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):  # where it was written
            return PurePath
        if (module, name) == ("builtins", "getattr"):  # Python 3.11.0 to 3.11.3 pickle a member of an enumeration so
            return _member
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def _member(enumeration: Any, name: str) -> Any:
    if enumeration is not dcp_metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"{enumeration}.{name} has no place in a checkpoint")
    return dcp_metadata._MEM_FORMAT_ENCODING[name]


class _Reader(FileSystemReader):
    def stored(self) -> dict[str, dcp_metadata.TensorStorageMetadata]:
        """What the checkpoint holds: shapes and dtypes by name."""
        return self.read_metadata().state_dict_metadata  # type: ignore[return-value]  # refused there if not tensors

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = _MetadataUnpickler(file).load()
        for key, entry in found.state_dict_metadata.items():
            if not isinstance(entry, dcp_metadata.TensorStorageMetadata):
                raise UsageError(f"checkpoint {self.path}: entry {key!r} is not a tensor; refusing to unpickle it")
        found.storage_meta = found.storage_meta or dcp_metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


@contextmanager
def _single_process() -> Iterator[None]:
    """Without DCP's warning that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to .* in a single process")
        yield


def collect(
    network: nn.Module,
    probe: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Every tensor that a resume needs, by name: `network.*`, `probe.*`, `optimizer.<parameter>.<moment>`, `random.*` and
    `extra`."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()} | dict(extra or {})
    if probe is not None:
        tensors |= {f"probe.{k}": v for k, v in probe.state_dict().items()}
    for name, parameter in _parameters(network, probe).items():
        tensors |= {f"optimizer.{name}.{k}": v for k, v in optimizer.state[parameter].items() if torch.is_tensor(v)}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return tensors


def _parameters(network: nn.Module, probe: nn.Module | None) -> dict[str, nn.Parameter]:
    modules = {"network": network} | ({} if probe is None else {"probe": probe})
    return {f"{prefix}.{k}": v for prefix, module in modules.items() for k, v in module.named_parameters()}


def save(directory: Path, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], keep: int) -> Path:
    """Write checkpoint `step` under `directory` and remove all but the newest `keep`. Returns its path.

    Raises:
        OSError: the disk is full or read-only; nothing half-written stays.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"{PREFIX}{step:08d}"
    temporary = directory / f".{final.name}.{os.getpid()}.partial"
    try:
        with _single_process():
            dcp.save(dict(tensors), checkpoint_id=str(temporary), no_dist=True)
        text = json.dumps({"format": FORMAT, "step": step, **facts}, indent=1)
        (temporary / "run.json").write_text(text, encoding="utf-8")
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in complete(directory)[:-keep]:
        shutil.rmtree(old)
    return final


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints under `directory`, oldest first."""
    found = [p for p in directory.glob(f"{PREFIX}*") if (p / ".metadata").is_file() and (p / "run.json").is_file()]
    return sorted(found)


def latest(run: Path) -> Path:
    """The newest complete checkpoint of a run directory. Raises UsageError when there is none."""
    found = complete(run / "checkpoints")
    if not found:
        raise UsageError(f"{run} holds no complete checkpoint (looked for {run / 'checkpoints' / PREFIX}*)")
    return found[-1]


def read_facts(path: Path) -> dict[str, Any]:
    """`run.json` of a checkpoint. Raises UsageError when it is damaged or of a newer format."""
    try:
        facts = json.loads((path / "run.json").read_text(encoding="utf-8"))
        number = int(facts["format"])
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
) -> None:
    """Restore the modules, the optimiser, the random state and the tensors `extra` from checkpoint `path`, in place.

    Evaluation leaves out probe and optimiser, and the random state then stays as it is.

    Raises:
        UsageError: the checkpoint is damaged, or belongs to another network.
    """
    reader = _Reader(str(path))
    try:
        stored = reader.stored()
        targets = {f"network.{k}": v for k, v in network.state_dict().items()} | dict(extra or {})
        if probe is not None:
            targets |= {f"probe.{k}": v for k, v in probe.state_dict().items()}
        moments: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
        if optimizer is not None:
            for name, parameter in _parameters(network, probe).items():
                prefix = f"optimizer.{name}."
                moments[parameter] = {
                    key.removeprefix(prefix): _empty_like(parameter, entry)
                    for key, entry in stored.items()
                    if key.startswith(prefix)
                }
                targets |= {prefix + k: v for k, v in moments[parameter].items()}
            targets["random.cpu"] = torch.get_rng_state()
            if torch.cuda.is_initialized() and "random.cuda" in stored:
                targets["random.cuda"] = torch.cuda.get_rng_state()
        for key, target in targets.items():
            if key not in stored:
                raise UsageError(f"checkpoint {path} has no {key}: it belongs to another network")
            if stored[key].size != target.shape:
                raise UsageError(
                    f"checkpoint {path}: {key} has shape {tuple(stored[key].size)}, the network {tuple(target.shape)}"
                )
        with _single_process():
            dcp.load(targets, storage_reader=reader, no_dist=True)
    except UsageError:
        raise
    except (Exception, dcp.CheckpointException) as error:  # CheckpointException is a BaseException
        reason = (str(error) or type(error).__name__).strip().splitlines()[-1]
        raise UsageError(f"checkpoint {path} is damaged ({reason}): remove it to use the one before") from None
    if optimizer is not None:
        for parameter, state in moments.items():
            if state:
                optimizer.state[parameter] = state
        torch.set_rng_state(targets["random.cpu"])
        if "random.cuda" in targets:
            torch.cuda.set_rng_state(targets["random.cuda"])


def _empty_like(parameter: nn.Parameter, entry: dcp_metadata.TensorStorageMetadata) -> torch.Tensor:
    """Where a stored moment goes: shaped and laid out like its parameter, or as stored (Adam's step counter)."""
    if entry.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
    return torch.zeros(entry.size, dtype=entry.properties.dtype, device=parameter.device)
