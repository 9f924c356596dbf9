"""The files of a checkpoint as a stranger may have made them: nothing is run, allocated without need, or read from elsewhere."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from falcon_fast.errors import TrainingError, UsageError
from falcon_fast.training.checkpoints import checkpoint, saver, storage


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
    "a negative shape": (lambda t: entry(t).update(shape=[-4, 3]), "not a shape"),
    "a shape of words": (lambda t: entry(t).update(shape="big"), "not a shape"),
    "a list for an entry": (lambda t: t.update({"network.0.weight": []}), "not that of a tensor"),
}


def part(shape: list[int]) -> dict[str, Any]:
    return {"offsets": [0], "shape": shape, "file": "shard-00000.safetensors", "key": "x"}


@pytest.mark.parametrize("name", CHANGES)
def test_an_index_that_does_not_fit_is_one_line(path: Path, name: str) -> None:
    change, reason = CHANGES[name]
    changed(path, change)
    with pytest.raises(UsageError, match=reason) as caught:
        checkpoint.load(path, network())
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"tensors": 1}', "[" * 10**6, "\udcff", "null", '{"tensors": {"a": NaN}}']
)
def test_an_index_that_is_none_is_one_line(path: Path, text: str) -> None:
    (path / "index.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.load(path, network())


def test_a_huge_index_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LARGEST_JSON", 100)
    with pytest.raises(UsageError, match="more than any checkpoint needs"):
        checkpoint.load(path, network())


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


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A few random changes of the kinds that files suffer and that attackers make."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed) + 1)
        kind = chance.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[at : at + chance.randint(1, 64)] = b""
        elif kind == 2:
            changed[at:at] = chance.randbytes(chance.randint(1, 16))
        elif kind == 3:
            changed[at : at + 1] = chance.choice(
                [b'"', b"{", b"[", b"-1", b"99999999999999999999", b"null", b"../", b"\\u0000"]
            )
        else:
            changed = changed[:at]
    return bytes(changed)


def fuzz(path: Path, count: int) -> None:
    originals = {name: (path / name).read_bytes() for name in ("index.json", "run.json", "shard-00000.safetensors")}
    chance = random.Random(0)
    refused = 0
    for _ in range(count):
        name = chance.choice(sorted(originals))
        (path / name).write_bytes(mutated(originals[name], chance))
        try:
            checkpoint.read_facts(path)
            checkpoint.load(path, network())
        except UsageError as error:
            refused += 1
            assert "\n" not in str(error)
        (path / name).write_bytes(originals[name])
    assert refused > count // 4  # others change numbers only


def test_200_mutations_are_read_or_refused_in_one_line(path: Path) -> None:
    fuzz(path, 200)


@pytest.mark.slow
def test_10000_mutations_are_read_or_refused_in_one_line(path: Path) -> None:
    fuzz(path, 10_000)
