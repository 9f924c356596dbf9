"""The files of a checkpoint, written and read by torch.distributed.checkpoint (DCP): published completely, read as data only.

DCP's own reader unpickles `.metadata` and every entry that is not a tensor. Here `.metadata` goes through an unpickler that knows
DCP's own record types and nothing else, and entries that are not tensors are refused: a checkpoint from elsewhere runs no code.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo

from falcon_fast.errors import UsageError


class MetadataUnpickler(pickle.Unpickler):
    """An unpickler that knows the types which DCP's metadata consists of, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        if module == dcp_metadata.__name__ and isinstance(found := getattr(dcp_metadata, name, None), type):
            return found
        if (module, name) == (_StorageInfo.__module__, "_StorageInfo"):
            return _StorageInfo
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype | torch.layout)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return getattr(torch.serialization, name)
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return PurePath  # where the checkpoint was written
        if (module, name) == ("builtins", "getattr"):  # so do Python 3.11.0 to 3.11.3 pickle members of enumerations
            return _member
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def _member(enumeration: Any, name: str) -> Any:
    if enumeration is not dcp_metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"{enumeration}.{name} has no place in a checkpoint")
    return dcp_metadata._MEM_FORMAT_ENCODING[name]


class Reader(FileSystemReader):
    """A reader of tensors and nothing else. Raises UsageError for an entry of another kind."""

    def stored(self) -> dict[str, dcp_metadata.TensorStorageMetadata]:
        """Return the shapes and dtypes of the tensors in the checkpoint, by name."""
        return self.read_metadata().state_dict_metadata  # type: ignore[return-value]  # read_metadata refuses other entries

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            found: dcp_metadata.Metadata = MetadataUnpickler(file).load()
        for key, entry in found.state_dict_metadata.items():
            if not isinstance(entry, dcp_metadata.TensorStorageMetadata):
                raise UsageError(f"checkpoint {self.path}: entry {key!r} is not a tensor; refusing to unpickle it")
        found.storage_meta = found.storage_meta or dcp_metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class Writer(FileSystemWriter):
    """A writer into the directory `temporary`. When the shares of all processes are on disk, process 0 calls `publish()`.

    DCP tells every process whether that succeeded, so that no process continues in the belief that the checkpoint exists.
    """

    def __init__(self, temporary: Path, publish: Callable[[], None]) -> None:
        super().__init__(temporary)
        self._publish = publish

    def write_data(self, plan: Any, planner: Any) -> Any:
        if sys.platform == "linux" and threading.current_thread() is not threading.main_thread():
            # This is DCP's thread, which ends with this save. Where the training step uses every core, the thread takes only the
            # time that is left. (On Linux each thread has a priority of its own.)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        return super().write_data(plan, planner)

    def finish(self, metadata: dcp_metadata.Metadata, results: Any) -> None:
        super().finish(metadata, results)
        self._publish()
