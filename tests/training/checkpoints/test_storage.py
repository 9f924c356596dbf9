"""The files of a checkpoint as a stranger may have made them: nothing is run, allocated without need, or read from elsewhere."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from falcon_fast.errors import TrainingError, UsageError
from falcon_fast.training.checkpoints import checkpoint, saver, storage

from ...fuzz import COUNTS, fuzz, json_mutated, mutated


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with saver.Saver(tmp_path, 1) as writer:
        writer.save(1, {f"network.{k}": v for k, v in network().state_dict().items()}, {"seconds": 1.0})
    return tmp_path / "step-00000001"


def changed(path: Path, change: Any) -> None:
    index = json.loads((path / "index.json").read_text())
    change(index["tensors"])
    (path / "index.json").write_text(json.dumps(index))


def entry(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors["network.0.weight"]


CHANGES = {
    "a file outside": (
        lambda t: entry(t)["parts"][0].update(file="../secret.safetensors"),
        "name of a file of tensors",
    ),
    "an absolute file": (lambda t: entry(t)["parts"][0].update(file="/etc/passwd"), "name of a file of tensors"),
    "a file that is gone": (lambda t: entry(t)["parts"][0].update(file="shard-00007.safetensors"), "No such file"),
    "a key that is not there": (lambda t: entry(t)["parts"][0].update(key="other"), "other"),
    "a dtype of code": (lambda t: entry(t).update(dtype="object"), "not that of a tensor"),
    "another dtype": (lambda t: entry(t).update(dtype="int32"), "is not what index.json says|damaged"),
    "a part missing": (lambda t: entry(t).update(parts=[]), "do not make up"),
    "a part twice": (lambda t: entry(t)["parts"].append(entry(t)["parts"][0]), "do not make up"),
    "a part beyond": (lambda t: entry(t)["parts"][0].update(offsets=[1, 0]), "do not make up"),
    "more than the file holds": (
        lambda t: t.update({"optimizer.0.x": {"dtype": "int64", "shape": [10**12], "parts": [part([10**12])]}}),
        "bytes where its tensors take",
    ),
    "two halves that overlap": (
        lambda t: entry(t).update(parts=[half([0, 0], [2, 3]), half([1, 0], [2, 3])]),
        "do not make up",
    ),
    "two halves with a gap": (
        lambda t: entry(t).update(parts=[half([0, 0], [2, 3]), half([2, 1], [2, 3])]),
        "do not make up",
    ),
    "a part of another rank": (lambda t: entry(t).update(parts=[half([0], [12])]), "do not make up"),
    "a name that is a tree": (lambda t: entry(t)["parts"][0].update(file=[[]]), "not that of a tensor"),
    "a hundred dimensions": (lambda t: entry(t).update(shape=[1] * 100), "not that of a tensor"),
    "a negative shape": (lambda t: entry(t).update(shape=[-4, 3]), "no shape"),
    "a shape of words": (lambda t: entry(t).update(shape="big"), "no shape"),
    "a list for an entry": (lambda t: t.update({"network.0.weight": []}), "not that of a tensor"),
}


def part(shape: list[int]) -> dict[str, Any]:
    return {"offsets": [0], "shape": shape, "file": "shard-00000.safetensors", "key": "x"}


def half(offsets: list[int], shape: list[int]) -> dict[str, Any]:
    return part(shape) | {"offsets": offsets, "key": "network.0.weight"}


@pytest.mark.parametrize("name", CHANGES)
def test_an_index_that_does_not_fit_is_one_line(path: Path, name: str) -> None:
    change, reason = CHANGES[name]
    changed(path, change)
    with pytest.raises(UsageError, match=reason) as caught:
        checkpoint.load(path, network())
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


NO_INDEX = {
    "empty": "",
    "a list": "[]",
    "no tensors": "{}",
    "a number": '{"tensors": 1}',
    "deep lists": "[" * 10**6,
    "deep objects": '{"tensors": ' + '{"a":' * 10**5,
    "not UTF-8": "\udcff",
    "null": "null",
    "NaN": '{"tensors": {"a": NaN}}',
    "a key twice": '{"tensors": {}, "tensors": {}}',
    "a long integer": '{"tensors": {"a": ' + "9" * 10**6 + "}}",
}


@pytest.mark.parametrize("text", NO_INDEX.values(), ids=NO_INDEX)
def test_an_index_that_is_none_is_one_line(path: Path, text: str) -> None:
    (path / "index.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.load(path, network())


def test_a_huge_index_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LARGEST_INDEX", 100)
    with pytest.raises(UsageError, match=r"index\.json has [\d,]+ bytes, but at most 100 are read"):
        checkpoint.load(path, network())


SHARD = "shard-00000.safetensors"


@pytest.mark.parametrize(
    "kind", ["fifo", "directory", "device", "empty", "no header", "a huge header", "a broken link"]
)
def test_a_shard_that_is_no_shard_is_one_line(path: Path, kind: str) -> None:
    """A FIFO is not waited for; an index that needs no byte of it does not change that."""
    changed(path, lambda t: t.update({"network.x": {"dtype": "int64", "shape": [0], "parts": [part([0])]}}))
    data = (path / SHARD).read_bytes()
    (path / SHARD).unlink()
    if kind == "fifo":
        os.mkfifo(path / SHARD)
    elif kind == "directory":
        (path / SHARD).mkdir()
    elif kind == "device":
        (path / SHARD).symlink_to("/dev/zero")
    elif kind == "a broken link":
        (path / SHARD).symlink_to("nowhere")
    else:
        text = {"empty": b"", "no header": b"\0" * len(data), "a huge header": b"\xff" * 7 + b"\x7f" + data[8:]}[kind]
        (path / SHARD).write_bytes(text)
    reason = "not a regular file|no header of safetensors|No such file|where its tensors take|damaged"
    with pytest.raises(UsageError, match=reason) as caught:
        checkpoint.load(path, network())
    assert "\n" not in str(caught.value)


def test_links_to_files_are_read(path: Path, tmp_path: Path) -> None:
    """A snapshot of a shared model consists of links."""
    saved = network()
    checkpoint.load(path, saved)
    for file in sorted(path.iterdir()):
        file.rename(tmp_path / file.name)
        file.symlink_to(tmp_path / file.name)
    linked = network()
    checkpoint.load(path, linked)
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in linked.state_dict().items())


@pytest.mark.parametrize(
    "facts",
    [
        '{"format": 2, "step": 1, "seconds": 1, "step": 2}',
        '{"format": 2, "step": 1, "seconds": NaN}',
        '{"format": 2, "step": 1, "seconds": 1e999}',
        '{"format": 2, "step": 1' + "0" * 5000 + ', "seconds": 1}',
        '{"format": 2, "step": 1' + "0" * 400 + ', "seconds": 1}',
        '{"format": 2, "step": 1, "seconds": 1' + "0" * 400 + "}",
        '{"format": 2, "step": 1e30, "seconds": 1}',
        '{"format": 2, "step": -1, "seconds": 1}',
        '{"format": 2, "step": true, "seconds": 1}',
        '{"format": 2.5, "step": 1, "seconds": 1}',
        '{"format": 2, "step": 1, "seconds": 1, "mean": [0, 0]}',
        '{"format": 2, "step": 1, "seconds": 1, "std": [1, 0, 1]}',
        '{"format": 2, "step": 1, "seconds": 1, "mean": "abc"}',
        '{"format": 2, "step": 1, "seconds": 1, "model": "a\\nb"}',
        '{"format": 2, "step": 1, "seconds": 1, "model": "' + "x" * 20_000 + '"}',
        '{"format": 2, "step": 1, "seconds": 1, "model": ' + "[" * 900 + "]" * 900 + "}",
        "[" * 100_000,
        "\x00",
    ],
    ids=lambda text: f"{text[:60]}-{len(text)}",
)
def test_facts_that_are_none_are_one_line(path: Path, facts: str) -> None:
    (path / "run.json").write_text(facts)
    with pytest.raises(UsageError, match=r"is damaged \(run\.json: .*remove it") as caught:
        checkpoint.read_facts(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_no_way_leads_to_an_unpickler(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every unpickler of Python and torch broken, a checkpoint is read all the same."""

    def reached(*arguments: object, **options: object) -> None:
        raise AssertionError("an unpickler was reached")

    saved = network()
    with saver.Saver(path.parent, 1) as writer:
        writer.save(2, {f"network.{k}": v for k, v in saved.state_dict().items()}, {"seconds": 1.0})
    monkeypatch.setattr(pickle, "load", reached)
    monkeypatch.setattr(pickle, "loads", reached)
    monkeypatch.setattr(pickle, "Unpickler", reached)
    monkeypatch.setattr(torch, "load", reached)
    read = network()
    checkpoint.load(path.parent / "step-00000002", read)
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in read.state_dict().items())


def test_the_planner_loads_no_bytes() -> None:
    index = storage.MetadataIndex("network.0.weight")
    item = type("Item", (), {"dest_index": index})()
    with pytest.raises(ValueError, match="not a tensor"):
        storage.TensorPlanner().load_bytes(item, None)


def test_what_is_not_a_tensor_is_not_written(tmp_path: Path) -> None:
    with saver.Saver(tmp_path, 1) as writer, pytest.raises(TrainingError, match="tensors only"):
        writer.save(1, {"network.x": object()}, {})  # type: ignore[dict-item]


def shard_mutated(data: bytes, chance: random.Random) -> bytes:
    """A shard whose header says something else, of the right length in most cases."""
    length = int.from_bytes(data[:8], "little")
    changed = chance.choice((mutated, json_mutated))
    header = changed(data[8 : 8 + length], chance)
    said = len(header) if chance.random() < 0.9 else chance.choice((0, 2**32, 2**63, 2**64 - 1, len(data)))
    return said.to_bytes(8, "little") + header + data[8 + length :]


def read(path: Path) -> None:
    checkpoint.read_facts(path)
    checkpoint.load(path, network())


FILES = {
    "index.json": (mutated, json_mutated),
    "run.json": (mutated, json_mutated),
    "shard-00000.safetensors": (mutated, shard_mutated),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", FILES)
def test_mutations_are_read_or_refused_in_one_line(path: Path, name: str, count: int) -> None:
    outcome = fuzz(lambda: read(path), [path / name], count, name=name, mutations=FILES[name])
    assert outcome.refused > count // 4  # others change numbers only
