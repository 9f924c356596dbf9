"""What a checkpoint holds, and what comes back of it."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from falcon_fast.errors import UsageError
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.saver import Saver

from .parts import save, trained


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


def test_safetensors_alone_reads_what_was_written(tmp_path):
    parts = trained()
    path = save(tmp_path, parts)
    assert {p.name for p in path.iterdir()} == {"index.json", "run.json", "shard-00000.safetensors"}
    found = load_file(path / "shard-00000.safetensors")
    assert found.keys() == checkpoint.collect(*parts).keys()
    for key, value in parts[0].state_dict().items():
        assert torch.equal(found[f"network.{key}"], value), key


def test_a_checkpoint_of_the_old_format_is_refused_unread(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    path = tmp_path / "checkpoints" / "step-00000003"
    path.mkdir(parents=True)
    (path / ".metadata").write_bytes(pickle.dumps(Payload()))
    (path / "run.json").write_text(json.dumps({"format": 1, "step": 3, "seconds": 1.0}))
    for ask in (lambda: checkpoint.latest(tmp_path), lambda: checkpoint.complete(path.parent)):
        with pytest.raises(UsageError, match="can run code when it is read, so it is not read"):
            ask()
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.load(path, trained()[0])
    assert not (tmp_path / "owned").exists()


def test_an_incomplete_directory_is_no_checkpoint(tmp_path):
    parts = trained()
    save(tmp_path, parts, 1)
    newer = save(tmp_path, parts, 2)
    (newer / "index.json").unlink()
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
    with pytest.raises(UsageError, match="no complete checkpoint"):
        checkpoint.latest(tmp_path)


def test_other_names_are_no_checkpoints_and_the_newest_has_the_largest_step(tmp_path):
    path = save(tmp_path, trained(), 99_999_999)
    for name in ("step-100000000", "step-1\n\x1b[31m", "step-x", "step-12345", "step-00000009 (copy)"):
        shutil.copytree(path, path.with_name(name))
    assert [p.name for p in checkpoint.complete(path.parent)] == ["step-99999999", "step-100000000"]
    assert checkpoint.latest(tmp_path).name == "step-100000000"


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
    for text in ("{", json.dumps({"format": checkpoint.FORMAT, "seconds": 1.0}), "[]"):
        (path / "run.json").write_text(text)
        with pytest.raises(UsageError, match="damaged"):
            checkpoint.read_facts(path)
    data = next(path.glob("*.safetensors"))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(UsageError, match="damaged") as caught:
        checkpoint.load(path, parts[0])
    assert "\n" not in str(caught.value)
    (path / "index.json").write_bytes(b"junk")
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.load(path, parts[0])


def test_further_tensors_come_back_in_place(tmp_path):
    parts, average = trained(), torch.randn(3)
    with Saver(tmp_path, 1) as writer:
        writer.save(3, checkpoint.collect(*parts, extra={"average.weight": average}), {})
    mine = torch.zeros(3)
    checkpoint.load(tmp_path / "step-00000003", *parts, extra={"average.weight": mine})
    assert torch.equal(mine, average)
    with pytest.raises(UsageError, match="has no other"):
        checkpoint.load(tmp_path / "step-00000003", *parts, extra={"other": mine})
