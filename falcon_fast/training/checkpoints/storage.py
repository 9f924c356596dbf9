"""The files of a checkpoint, as torch.distributed.checkpoint (DCP) writes and reads them: published whole, read as data only.

DCP's own reader unpickles `.metadata` and any non-tensor entry. Here `.metadata` goes through an unpickler that knows DCP's own
record types and nothing else, and non-tensor entries are refused: a checkpoint from elsewhere runs no code.
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
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from falcon_fast.errors import UsageError
from falcon_fast.kernels.torch_private import checkpoint_memory_formats, checkpoint_storage_info

_StorageInfo = checkpoint_storage_info()
_MEM_FORMAT_ENCODING = checkpoint_memory_formats()


class MetadataUnpickler(pickle.Unpickler):
    """Knows what DCP's metadata is made of, and refuses the rest."""

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
    if enumeration is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"{enumeration}.{name} has no place in a checkpoint")
    return _MEM_FORMAT_ENCODING[name]


class Reader(FileSystemReader):
    """Reads tensors and nothing else. Raises UsageError for an entry of another kind."""

    def stored(self) -> dict[str, dcp_metadata.TensorStorageMetadata]:
        """What the checkpoint holds: shapes and dtypes by name."""
        return self.read_metadata().state_dict_metadata  # type: ignore[return-value]  # refused there if not tensors

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = MetadataUnpickler(file).load()
        for key, entry in found.state_dict_metadata.items():
            if not isinstance(entry, dcp_metadata.TensorStorageMetadata):
                raise UsageError(f"checkpoint {self.path}: entry {key!r} is not a tensor; refusing to unpickle it")
        found.storage_meta = found.storage_meta or dcp_metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class Writer(FileSystemWriter):
    """Writes into the directory `temporary`; when the shares of all processes are on the disk, process 0 calls `publish()`.

    DCP tells every process how that went, so that none goes on believing in a checkpoint that is not there.
    """

    def __init__(self, temporary: Path, publish: Callable[[], None]) -> None:
        super().__init__(temporary)
        self._publish = publish

    def write_data(self, plan: Any, planner: Any) -> Any:
        if sys.platform == "linux" and threading.current_thread() is not threading.main_thread():
            # DCP's thread, which ends with this save: where the step has every core, it is to take what is left. (On Linux a
            # thread has a priority of its own.)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        return super().write_data(plan, planner)

    def finish(self, metadata: dcp_metadata.Metadata, results: Any) -> None:
        super().finish(metadata, results)
        self._publish()
