"""How checkpoints are written: whole or not at all, in the background, by several processes."""

from __future__ import annotations

import resource
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from falcon_fast.errors import TrainingError, UsageError
from falcon_fast.training.checkpoints import checkpoint, saver, storage
from falcon_fast.training.checkpoints.saver import Saver
from falcon_fast.training.distributed.processes import Processes

from ...processes import in_processes
from .parts import save, trained


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


def test_an_asynchronous_save_holds_what_was_there_when_it_was_asked_for(tmp_path, monkeypatch):
    go, finish = threading.Event(), storage.Writer.finish
    monkeypatch.setattr(storage.Writer, "finish", lambda *a, **k: (go.wait(30), finish(*a, **k)))
    parts = trained()
    weight = parts[0][3].weight
    before = weight.detach().clone()
    with Saver(tmp_path, 2, asynchronous=True) as writer:
        writer.save(1, checkpoint.collect(*parts), {})
        assert checkpoint.complete(tmp_path) == []  # training goes on meanwhile
        with torch.no_grad():
            weight.add_(1.0)
        go.set()
        writer.save(2, checkpoint.collect(*parts), {})  # waits for the first
        assert checkpoint.complete(tmp_path)[0].name == "step-00000001"
    first, second = checkpoint.complete(tmp_path)
    for path, expected in ((first, before), (second, before + 1.0)):
        other = trained(steps=0)
        checkpoint.load(path, *other)
        assert torch.equal(other[0][3].weight, expected)


def test_an_error_in_the_background_is_raised_at_the_next_save(tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    parts = trained()
    with Saver(tmp_path, 2, asynchronous=True) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(storage.Writer, "finish", full)
            writer.save(1, checkpoint.collect(*parts), {})
            writer._pending[0].exception(30)
        with pytest.raises(TrainingError, match=r"step-00000001 was not written .*No space left"):
            writer.save(2, checkpoint.collect(*parts), {})
        assert list(tmp_path.iterdir()) == []
        writer.save(3, checkpoint.collect(*parts), {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_what_killed_processes_left_goes_at_the_start(tmp_path):
    for name in (".step-00000007.host-1.partial", ".step-00000001.old.host-1.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-00000.safetensors").write_bytes(b"half")
    with Saver(tmp_path, 1):
        assert list(tmp_path.iterdir()) == []


# ---- several processes ----


def sharded(steps: int, shard: bool = True):
    """A network whose first dimensions do not divide into 2 or 3 processes, sharded, and its probe, which is not."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 5))
    probe = nn.Linear(5, 2)
    if shard:
        fully_shard(network[0])
        fully_shard(network)
    optimizer = torch.optim.AdamW([*network.parameters(), *probe.parameters()], lr=0.1)
    for group in optimizer.param_groups:
        group["peak_lr"] = 0.1
    for _ in range(steps):
        optimizer.zero_grad()
        probe(network(torch.randn(6, 6))).square().mean().backward()
        optimizer.step()
    return network, probe, optimizer


def whole(tensors) -> dict:
    """The tensors of a checkpoint, gathered."""
    return {
        k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().numpy()
        for k, v in tensors.items()
        if "random" not in k
    }


def _processes(rank: int, world: int) -> Processes:
    return Processes(rank, world, rank, dist.group.WORLD, dist.new_group(backend="gloo"), 60)


def _save_sharded(rank, world, folder):
    parts = sharded(3)
    processes = _processes(rank, world)
    with Saver(folder / "checkpoints", 2, True, processes) as writer:
        for step in (1, 2):
            extra = {"average.weight": parts[0][2].weight.detach() * step}
            tensors = checkpoint.collect(*parts, extra=extra, rank=rank)
            expected = {k: v.copy() for k, v in whole(tensors).items()}
            torch.randn(rank + 1)
            writer.save(step, tensors, {"seconds": 1.0})
            for _ in range(3):  # training goes on
                dist.all_reduce(torch.ones(3))
                with torch.no_grad():
                    parts[0][2].weight.add_(0.5)
        state = tensors[f"random.cpu.{rank}" if rank else "random.cpu"]
        following = torch.Generator().set_state(state)
        draws = torch.randn(4, generator=following).numpy()
    failure = None
    try:  # one process alone cannot write
        with Saver(folder / "failing", 2, True, processes) as writer:
            if rank == 1:
                storage.Writer.write_data = lambda *a, **k: (_ for _ in ()).throw(
                    OSError(28, "No space left on device")
                )
            writer.save(1, tensors, {})
    except TrainingError as error:
        failure = str(error)
    try:
        saver.SHARED_WITHIN = 0.2
        Saver(folder / f"disk-of-{rank}", 2, True, processes)
        apart = None
    except UsageError as error:
        apart = str(error)
    return expected, draws, failure, apart


def _load_sharded(rank, world, folder):
    parts = sharded(0)
    average = torch.zeros_like(parts[0][2].weight).detach()
    checkpoint.load(folder / "checkpoints" / "step-00000002", *parts, extra={"average.weight": average}, rank=rank)
    draws = torch.randn(4).numpy()
    return whole(checkpoint.collect(*parts, extra={"average.weight": average}, rank=rank)), draws


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, in_processes(_save_sharded, 2, folder, folder)


def assert_equal(mine: dict, theirs: dict) -> None:
    assert mine.keys() == theirs.keys() and sum("exp_avg" in k for k in mine) == 16
    for key, value in theirs.items():
        assert mine[key].shape == value.shape and (mine[key] == value).all(), key


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_reads_what_two_wrote(two, world):
    folder, saved = two
    loaded = in_processes(_load_sharded, world, folder, folder)
    for rank, (tensors, draws) in enumerate(loaded):
        assert_equal(tensors, saved[0][0])
        if rank < 2:
            assert (draws == saved[rank][1]).all()  # each process has its random state again


def test_one_process_reads_what_two_wrote_sharded(two):
    folder, saved = two
    parts = sharded(0, shard=False)
    average = torch.zeros(5, 7)
    checkpoint.load(folder / "checkpoints" / "step-00000002", *parts, extra={"average.weight": average})
    assert_equal(whole(checkpoint.collect(*parts, extra={"average.weight": average})), saved[0][0])
    files = {p.name for p in (folder / "checkpoints" / "step-00000002").iterdir()}
    assert files == {"index.json", "run.json", "shard-00000.safetensors", "shard-00001.safetensors"}


def test_a_share_that_cannot_be_written_is_no_checkpoint_and_all_know(two):
    folder, saved = two
    line = "was not written (process 1: [Errno 28] No space left on device)"
    assert all(line in found[2] for found in saved)
    assert list((folder / "failing").iterdir()) == []


def test_a_directory_that_is_not_shared_is_said(two):
    for found in two[1]:
        assert found[3].startswith("process 1: cannot see") and "file system that all machines share" in found[3]
