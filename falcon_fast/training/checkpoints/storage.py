"""The files of a checkpoint: tensors as safetensors, everything else as JSON, so that reading one cannot run code.

torch.distributed.checkpoint (DCP) plans which process writes and reads which part of which tensor, copies tensors to the host
while training continues, and reshards to any number of processes. Its own file formats are not used: `.metadata`
is a pickle, and its safetensors storage does not notice that one process's file is missing, because it has no list of the
files. Here a checkpoint directory holds

    shard-00000.safetensors    the parts that process 0 wrote, one file for each process that wrote any
    index.json                 for each tensor its dtype, its shape, and in which file each part of it lies; for each file its
                               length and its checksum

A part has its tensor's name as its key, followed by its offsets ("name[3,0]") where it is not the whole tensor. No unpickler can
be reached from here, no matter what the files contain: `Reader` shares no code with DCP's readers, and `TensorPlanner` refuses
the one kind of entry that DCP would unpickle.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from falcon_fast.files import synchronise, writing
from falcon_fast.reading import open_regular, read_json
from falcon_fast.training.checkpoints.integrity import checksum

INDEX = "index.json"
SHARD = "shard-{:05d}.safetensors"
SHARD_NAME = re.compile(r"shard-\d{5}\.safetensors")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
LARGEST_INDEX = 32 * 2**20  # bytes; a ResNet-50's index has 0.1 MB, or 28 MB if 512 processes shard it
LARGEST_HEADER = 16 * 2**20  # bytes; a shard's header has 0.1 KB for each part that the process wrote
MOST_DIMENSIONS = 8  # of a tensor; a convolution's weight has 4


class Part(NamedTuple):
    """Where a part of a tensor lies: the name of a file in the checkpoint's directory, the key in it, and the dtype."""

    file: str
    key: str
    dtype: torch.dtype


class Written(NamedTuple):
    """A part that was written, with the length in bytes and the checksum of its file."""

    part: Part
    size: int
    crc32: str


class Writer(StorageWriter):
    """Write a checkpoint into the directory `temporary`; call `publish()` in process 0 when the parts of all are on the disk.

    DCP reports success or failure to every process, so none continues as if a missing checkpoint existed.
    """

    def __init__(self, temporary: Path, publish: Callable[[], None]) -> None:
        self._temporary, self._publish = temporary, publish

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *arguments: Any, **options: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        with writing(
            self._temporary
        ):  # no parents: where the run directory is gone, a checkpoint alone would be of no use
            self._temporary.mkdir(exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each process the name of its file."""
        return [dataclasses.replace(plan, storage_data=SHARD.format(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        from safetensors.torch import save_file

        if sys.platform == "linux" and threading.current_thread() is not threading.main_thread():
            # DCP's thread, which ends with this save, gets the lowest priority, as the steps may need every core. (On Linux each
            # thread has a priority of its own.) Steps take 1.4 to 2.3 times as long for the half second that it writes.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        name = str(plan.storage_data)
        tensors: dict[str, torch.Tensor] = {}
        written: list[tuple[MetadataIndex, int, Part]] = []
        memory: set[int] = set()
        for item in plan.items:
            tensor = planner.resolve_data(item)
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{item.index.fqn} is not a tensor, and a checkpoint holds tensors only")
            tensor = tensor.detach().cpu().contiguous()
            if tensor.data_ptr() in memory:  # safetensors refuses tensors that share memory
                tensor = tensor.clone()
            memory.add(tensor.data_ptr())
            key = _key(item)
            tensors[key] = tensor
            written.append((item.index, tensor.nbytes, Part(name, key, tensor.dtype)))
        size, crc32 = 0, ""
        if tensors:
            path = self._temporary / name
            with writing(path, sum(tensor.nbytes for tensor in tensors.values())):
                save_file(tensors, path)
                size, crc32 = path.stat().st_size, checksum(path)  # read back from the page cache
                synchronise(path)
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(index, count, Written(part, size, crc32)) for index, count, part in written])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        found = {result.index: result.storage_data for share in results for result in share}
        parts = {index: written.part for index, written in found.items()}
        files = {written.part.file: {"bytes": written.size, "crc32": written.crc32} for written in found.values()}
        index: dict[str, Any] = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)  # write_data refused everything else
            index[name] = {
                "dtype": str(entry.properties.dtype).removeprefix("torch."),
                "shape": list(entry.size),
                "parts": [
                    {
                        "offsets": list(chunk.offsets),
                        "shape": list(chunk.sizes),
                        "file": (part := parts[MetadataIndex(name, chunk.offsets)]).file,
                        "key": part.key,
                    }
                    for chunk in entry.chunks
                ],
            }
        path, text = self._temporary / INDEX, json.dumps({"files": files, "tensors": index})
        with writing(path, len(text)):
            path.write_text(text, encoding="utf-8")
            synchronise(path)
        self._publish()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def storage_meta(self) -> StorageMeta | None:
        return None


def _key(item: WriteItem) -> str:
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    if chunk.sizes == item.tensor_data.size:
        return item.index.fqn
    return f"{item.index.fqn}[{','.join(map(str, chunk.offsets))}]"


class Reader(StorageReader):
    """Read the tensors of a checkpoint in the directory `path`.

    What index.json says is checked before anything is allocated: names of files cannot lead out of the directory, parts must
    make up their tensor, and the tensors of a file cannot be larger than the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: dict[MetadataIndex, Part] = {}

    def stored(self) -> dict[str, TensorStorageMetadata]:
        """What the checkpoint holds: shapes and dtypes by name. Raises ValueError or OSError where it is damaged."""
        return self.read_metadata().state_dict_metadata  # type: ignore[return-value]  # tensors only

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        index = read_json(self._path / INDEX, LARGEST_INDEX)
        if not isinstance(index, dict) or not isinstance(index.get("tensors"), dict):
            raise ValueError(f"{INDEX} lists no tensors")
        entries: dict[str, TensorStorageMetadata] = {}
        needed: dict[str, int] = {}
        self._parts = {}
        for name, said in index["tensors"].items():
            try:
                dtype, shape, parts = DTYPES[said["dtype"]], _size(said["shape"]), said["parts"]
                chunks = [ChunkStorageMetadata(_size(part["offsets"]), _size(part["shape"])) for part in parts]
                places = [Part(_text(part["file"]), _text(part["key"]), dtype) for part in parts]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{INDEX}: entry {name[:80]!r} is not that of a tensor ({str(error)[:80]})") from None
            if not _whole(chunks, shape):
                raise ValueError(f"{INDEX}: the parts of {name[:80]!r} do not make up a tensor of shape {tuple(shape)}")
            for chunk, place in zip(chunks, places, strict=True):
                if not SHARD_NAME.fullmatch(place.file):
                    raise ValueError(f"{INDEX}: {place.file[:80]!r} is not the name of a file of tensors")
                needed[place.file] = needed.get(place.file, 0) + math.prod(chunk.sizes) * dtype.itemsize
                self._parts[MetadataIndex(name, chunk.offsets)] = place
            entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks)
        for file, size in needed.items():
            _check_shard(self._path / file, size)
        return Metadata(dict(entries), storage_data=None, storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *arguments: Any, **options: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        from safetensors import safe_open

        items: dict[str, list[Any]] = {}
        for item in plan.items:
            if item.type != LoadItemType.TENSOR:
                raise ValueError(f"entry {item.storage_index.fqn!r} is not a tensor")
            items.setdefault(self._parts[item.storage_index].file, []).append(item)
        for name, asked in items.items():
            with safe_open(self._path / name, framework="pt") as file:
                for item in asked:
                    part = self._parts[item.storage_index]
                    starts_and_lengths = zip(item.storage_offsets, item.lengths, strict=True)
                    region = tuple(slice(start, start + length) for start, length in starts_and_lengths)
                    read = file.get_slice(part.key)[region] if region else file.get_tensor(part.key)
                    target = planner.resolve_tensor(item).detach()
                    if read.shape != target.shape or read.dtype != part.dtype or read.dtype != target.dtype:
                        raise ValueError(f"{name}: {item.storage_index.fqn!r} is not what {INDEX} says")
                    target.copy_(read)
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _check_shard(path: Path, needed: int) -> None:
    """Raise ValueError or OSError if a shard cannot hold tensors of `needed` bytes, or has a header that is too long.

    safetensors itself checks the header's contents: the tensors lie in the file one after the other, without gap or overlap.
    """
    with open_regular(path, sys.maxsize) as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(LARGEST_HEADER, size - 8):
        raise ValueError(f"{path.name} has no header of safetensors")
    if size - 8 - length < needed:
        raise ValueError(f"{path.name} has {size:,} bytes where its tensors take {needed:,}")


def _size(numbers: Any) -> torch.Size:
    if (
        not isinstance(numbers, list)
        or len(numbers) > MOST_DIMENSIONS
        or not all(type(n) is int and 0 <= n < 2**62 for n in numbers)
    ):
        raise ValueError("no shape")
    return torch.Size(numbers)


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise ValueError("no name")
    return found


def _whole(chunks: list[ChunkStorageMetadata], shape: torch.Size) -> bool:
    """Check whether the parts are the tensor, or cut it along one dimension without gap or overlap, as FSDP does.

    A gap would leave a network's initial weights in place, silently.
    """
    if any(len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape) for chunk in chunks):
        return False
    chunks = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    if not chunks:
        return not math.prod(shape)
    cut = [i for i, whole in enumerate(shape) if any(chunk.sizes[i] != whole for chunk in chunks)]
    if len(cut) > 1 or any(chunk.offsets[i] for chunk in chunks for i in range(len(shape)) if i not in cut):
        return False
    if not cut:
        return len(chunks) == 1
    spans = sorted((chunk.offsets[cut[0]], chunk.sizes[cut[0]]) for chunk in chunks)
    ends = itertools.accumulate((size for _, size in spans), initial=0)
    return [start for start, _ in spans] + [shape[cut[0]]] == list(ends)


class TensorPlanner(DefaultLoadPlanner):
    """DCP's plan for loading, for tensors only: DCP would unpickle everything else."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise ValueError(f"entry {read_item.dest_index.fqn!r} is not a tensor")
