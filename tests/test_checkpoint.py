from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from falcon_fast.config import OptimizerConfig
from falcon_fast.errors import TrainingError, UsageError
from falcon_fast.training import checkpoint, storage
from falcon_fast.training.optimizer import build_optimizer


def trained(name: str = "adamw", steps: int = 3):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    probe = nn.Linear(5, 2)
    optimizer = build_optimizer(OptimizerConfig(name=name), network, probe, 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        probe(network(torch.randn(6, 3, 4, 4))).square().mean().backward()
        optimizer.step()
    return network, probe, optimizer


def save(tmp_path: Path, parts, step: int = 3, keep: int = 2, asynchronous: bool = False) -> Path:
    with checkpoint.Saver(tmp_path / "checkpoints", keep, asynchronous) as saver:
        saver.save(step, checkpoint.collect(*parts), {"seconds": 1.5})
    return tmp_path / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_everything_comes_back_bit_for_bit(tmp_path, name):
    parts = trained(name)
    path = save(tmp_path, parts)
    expected = torch.randn(4)  # what the random state at the time of saving gives next
    other = trained(name, steps=0)
    checkpoint.load(path, *other)
    assert torch.equal(torch.randn(4), expected)
    for mine, theirs in zip(other[:2], parts[:2], strict=True):
        for key, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[key], value), key
    states = other[2].state_dict()["state"], parts[2].state_dict()["state"]
    assert states[0].keys() == states[1].keys() and len(states[1]) == 8
    for mine, theirs in zip(states[0].values(), states[1].values(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    facts = checkpoint.read_facts(path)
    assert facts["step"] == 3 and facts["seconds"] == 1.5


def test_the_network_alone_leaves_the_random_state(tmp_path):
    parts = trained()
    path = save(tmp_path, parts)
    other = trained(steps=0)[0]
    state = torch.get_rng_state()
    checkpoint.load(path, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(other[3].weight, parts[0][3].weight)


def test_it_is_an_ordinary_dcp_directory_without_pickled_entries(tmp_path):
    parts = trained()
    path = save(tmp_path, parts)
    weight = {"network.3.weight": torch.zeros(5, 16)}
    dcp.load(weight, checkpoint_id=str(path), no_dist=True)
    assert torch.equal(weight["network.3.weight"], parts[0][3].weight)
    stored = dcp.FileSystemReader(str(path)).read_metadata().state_dict_metadata
    assert all(type(entry).__name__ == "TensorStorageMetadata" for entry in stored.values())


def test_only_the_newest_stay_and_latest_is_the_newest(tmp_path):
    parts = trained()
    for step in (5, 10, 100, 20):
        save(tmp_path, parts, step, keep=3)
    names = [p.name for p in checkpoint.complete(tmp_path / "checkpoints")]
    assert names == ["step-00000010", "step-00000020", "step-00000100"]
    assert checkpoint.latest(tmp_path).name == "step-00000100"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_save_leaves_nothing_and_keeps_the_old(tmp_path, asynchronous):
    parts = trained()
    old = save(tmp_path, parts, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as a full disk: no file grows beyond
    try:
        with pytest.raises(TrainingError, match="step-00000002 was not written") as caught:
            save(tmp_path, parts, 2, asynchronous=asynchronous)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    print(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [old.name]
    checkpoint.load(old, *trained(steps=0))


def test_an_incomplete_directory_is_no_checkpoint(tmp_path):
    parts = trained()
    save(tmp_path, parts, 1)
    newer = save(tmp_path, parts, 2)
    (newer / ".metadata").unlink()
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
    with pytest.raises(UsageError, match="no complete checkpoint"):
        checkpoint.latest(tmp_path)


def test_damage_and_misfits_are_one_line(tmp_path):
    parts = trained()
    path = save(tmp_path, parts)
    with pytest.raises(UsageError, match="another network"):
        checkpoint.load(path, nn.Linear(2, 2))
    wider = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 6))
    with pytest.raises(UsageError, match="shape"):
        checkpoint.load(path, wider)
    (path / "run.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UsageError, match="update falcon_fast"):
        checkpoint.read_facts(path)
    (path / "run.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.read_facts(path)
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(UsageError, match="damaged") as caught:
        checkpoint.load(path, parts[0])
    assert "\n" not in str(caught.value)
    (path / ".metadata").write_bytes(b"junk")
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.load(path, parts[0])


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
