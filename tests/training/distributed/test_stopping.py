"""How the processes of a run stop together."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from falcon_fast.errors import RunStopped, TrainingError, UsageError
from falcon_fast.training.distributed.processes import Processes
from falcon_fast.training.distributed.stopping import StopAgreement, everywhere, leave, lost_peers, speaks

from ...processes import in_processes


def _two_processes(rank, world):
    processes = Processes(rank, world, rank, dist.group.WORLD, dist.new_group(backend="gloo"), 60)
    stop, answers = StopAgreement(processes), []
    for step in range(4):
        answers.append(stop(rank == 1 and step >= 1))
    return [*answers, stop.finish()]


def test_all_stop_after_the_same_step(tmp_path):
    assert in_processes(_two_processes, 2, tmp_path) == [[False, False, True, True, True]] * 2


def test_alone_a_stop_needs_no_agreement():
    alone = Processes()
    assert StopAgreement(alone)(True) and not StopAgreement(alone)(False) and not StopAgreement(alone).finish()
    with pytest.raises(RuntimeError, match="gloo"), lost_peers(alone, lambda: "kept"):
        raise RuntimeError("[gloo/pair.cc] Connection closed by peer")


def test_a_lost_process_is_one_line_that_says_what_is_kept():
    several = Processes(0, 2, 0, group=object())
    line = r"lost another process .*Connection closed.*: training stopped; kept$"
    with pytest.raises(TrainingError, match=line), lost_peers(several, lambda: "kept"):
        raise RuntimeError("[gloo/pair.cc] Connection closed by peer\nmore")
    with pytest.raises(RuntimeError, match="other"), lost_peers(several, lambda: "kept"):
        raise RuntimeError("other")


@pytest.mark.parametrize("shared", [False, True])
def test_the_group_is_left_and_one_process_speaks_only_if_all_have_the_error(monkeypatch, shared):
    left = []
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    for error in (UsageError("wrong", everywhere=shared), RunStopped(everywhere=shared)):
        assert everywhere(error) is shared and speaks(error) is not shared
        leave(error)
    assert len(left) == 2 * shared
    assert not everywhere(ZeroDivisionError()) and speaks(ZeroDivisionError())
