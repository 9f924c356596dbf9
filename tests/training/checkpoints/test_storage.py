"""The files of a checkpoint are data: no code of theirs runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from falcon_fast.errors import UsageError
from falcon_fast.training.checkpoints import checkpoint, storage

from .parts import save, trained


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_hostile_metadata_file_runs_nothing(tmp_path):
    parts = trained()
    path = save(tmp_path, parts)
    (path / ".metadata").write_bytes(pickle.dumps(_Payload(tmp_path / "owned")))
    with pytest.raises(UsageError, match="no place in a checkpoint"):
        checkpoint.load(path, parts[0])
    assert not (tmp_path / "owned").exists()


def test_a_pickled_entry_is_refused(tmp_path):
    parts = trained()
    tensors = {**checkpoint.collect(*parts), "network.extra": _Payload(tmp_path / "owned")}
    path = tmp_path / "evil"
    dcp.save(tensors, checkpoint_id=str(path), no_dist=True)
    with pytest.raises(UsageError, match="not a tensor"):
        checkpoint.load(path, parts[0])
    assert not (tmp_path / "owned").exists()


def test_attributes_are_read_of_the_memory_format_alone(tmp_path):
    """Some releases of Python pickle an enumeration's member as getattr(class, name)."""

    class Getattr:
        def __init__(self, *arguments):
            self.arguments = arguments

        def __reduce__(self):
            return getattr, self.arguments

    encoding = dcp.metadata._MEM_FORMAT_ENCODING
    path = tmp_path / "pickle"
    path.write_bytes(pickle.dumps(Getattr(encoding, "TORCH_CHANNELS_LAST")))
    with path.open("rb") as file:
        assert storage.MetadataUnpickler(file).load() is encoding.TORCH_CHANNELS_LAST
    path.write_bytes(pickle.dumps(Getattr(dcp.metadata.Metadata, "__init__")))
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError, match="no place"):
        storage.MetadataUnpickler(file).load()
