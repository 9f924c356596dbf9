"""How a run starts: new, resumed, continued or finished."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from falcon_fast.config import load_recipe, override
from falcon_fast.errors import UsageError
from falcon_fast.runs import start
from falcon_fast.runs.directory import create_run_directory

from ..commands import TINY
from .test_lock import another_run


def test_an_incomplete_run_is_not_resumed(finished, tmp_path, falcon_fast):
    broken = tmp_path / "broken"
    (broken / "checkpoints" / "step-00000001").mkdir(parents=True)
    (broken / "config.toml").write_text((finished[0] / "config.toml").read_text())
    for command in (["train", "--resume", broken], ["evaluate", broken]):
        code, _, err = falcon_fast(*command)
        assert code == 2 and "no complete checkpoint" in err


def test_resume_of_a_finished_run_only_evaluates(finished, tmp_path, falcon_fast):
    copied = tmp_path / "copy"
    shutil.copytree(finished[0], copied)
    code, _, err = falcon_fast("train", "--resume", copied)
    assert code == 0, err
    assert (copied / "metrics.csv").read_text() == (Path(finished[0]) / "metrics.csv").read_text()


def test_a_run_whose_config_still_holds_amp_is_evaluated_resumed_and_continued(finished, tmp_path, falcon_fast):
    """Older run directories hold `training.amp` as well as `training.precision`."""
    old = tmp_path / "old"
    shutil.copytree(finished[0], old)
    text = (old / "config.toml").read_text()
    assert 'precision = "auto"' in text
    (old / "config.toml").write_text(text.replace('precision = "auto"', 'amp = false\nprecision = "auto"'))
    for command in (["evaluate", old], ["train", "--resume", old], ["train", *TINY, "--continue", "--run-dir", old]):
        code, _, err = falcon_fast(*command)
        assert code == 0, err
    code, _, err = falcon_fast("train", *TINY, "--precision", "bf16", "--continue", "--run-dir", old)
    assert code == 2 and "--no-amp and --precision bf16 conflict: drop one" in err
    code, _, err = falcon_fast("train", *TINY, "--amp", "--continue", "--run-dir", old)
    assert code == 2 and 'training.precision: "auto" -> "bf16"' in err


def test_continue_of_a_finished_run_says_so(finished, falcon_fast):
    before = {p: p.stat().st_mtime_ns for p in finished[0].rglob("*")}
    code, out, err = falcon_fast("train", *TINY, "--continue", "--run-dir", finished[0])
    assert code == 0 and "is finished" in out, err
    assert {p: p.stat().st_mtime_ns for p in finished[0].rglob("*")} == before


def test_continue_of_another_run_names_the_difference(finished, falcon_fast):
    for change, difference in (
        (["--seed", 3], "training.seed: 0 -> 3"),
        (["--set", "optimizer.name=sgd"], 'optimizer.name: "adamw" -> "sgd"'),
        (["--recipe", "cifar10"], "recipe digits, not cifar10"),
    ):
        code, _, err = falcon_fast("train", *TINY, *change, "--continue", "--run-dir", finished[0])
        assert code == 2 and difference in err and len(err.strip().splitlines()) == 1


def test_continue_goes_on_or_starts_over(finished, tmp_path, falcon_fast):
    """With a checkpoint but no result, a run continues. With a configuration alone (it died early), it starts again."""
    died = tmp_path / "died"
    shutil.copytree(finished[0], died)
    (died / "result.json").unlink()
    (died / ".result.json.77.partial").write_text("{")
    (died / "checkpoints" / ".step-00000099.host-77.partial").mkdir()
    code, out, err = falcon_fast("train", *TINY, "--continue", "--run-dir", died)
    assert code == 0 and "from step" in out, err
    assert (died / "metrics.csv").read_text() == (Path(finished[0]) / "metrics.csv").read_text()
    assert not list(died.rglob(".*.partial"))

    early = tmp_path / "early"
    (early / "checkpoints" / "step-00000001").mkdir(parents=True)  # not complete
    shutil.copy(finished[0] / "config.toml", early)
    (early / "metrics.csv").write_text("step\n1\n")
    code, out, err = falcon_fast("train", *TINY, "--continue", "--run-dir", early)
    assert code == 0 and "from step" not in out, err
    untimed = [
        [row.split(",")[:11] for row in (d / "metrics.csv").read_text().splitlines()] for d in (early, finished[0])
    ]
    assert untimed[0] == untimed[1]


def test_another_run_in_the_same_directory_is_refused(finished, tmp_path, falcon_fast):
    """Whether the directory holds checkpoints, a configuration alone, or nothing yet."""
    begun, early, new = tmp_path / "begun", tmp_path / "early", tmp_path / "new"
    shutil.copytree(finished[0], begun)
    for directory in (early, new):
        directory.mkdir()
    shutil.copy(finished[0] / "config.toml", early)
    for directory, how in (
        (begun, ["--resume", begun]),
        (early, ["--resume", early]),
        (new, [*TINY, "--run-dir", new]),
    ):
        with another_run(directory):
            before = {p: p.stat().st_mtime_ns for p in directory.rglob("*")}
            code, _, err = falcon_fast("train", *how)
            assert code == 2 and f"trains in {directory}" in err and len(err.strip().splitlines()) == 1
            assert {p: p.stat().st_mtime_ns for p in directory.rglob("*")} == before


def test_continue_waits_for_the_run_before_it_and_takes_what_that_left(finished, tmp_path, falcon_fast):
    directory = tmp_path / "run"
    directory.mkdir()
    shutil.copy(finished[0] / "config.toml", directory)

    def ends():
        shutil.copy(finished[0] / "result.json", directory)
        process.stdin.close()

    with another_run(directory) as process:
        threading.Timer(0.5, ends).start()
        code, out, err = falcon_fast("train", *TINY, "--continue", "--run-dir", directory)
    assert code == 0 and "waiting" in out and "is finished" in out, err


def test_a_resumed_run_has_its_own_settings(tmp_path):
    create_run_directory(tmp_path / "run", override(load_recipe("digits"), {"training.seed": 7}))
    found = start.resumed_config(tmp_path / "run", {"data.workers": 2, "training.device": "cpu"})
    assert (found.training.seed, found.data.workers, found.training.device) == (7, 2, "cpu")
    for fixed in ("--recipe", "--run-dir"):
        with pytest.raises(UsageError, match=f"{fixed} cannot change"):
            start.resumed_config(tmp_path / "run", {}, fixed)
    with pytest.raises(UsageError, match="no such run directory"):
        start.resumed_config(tmp_path / "none", {})


def test_a_stopped_run_says_how_to_continue_it_if_it_can_be(tmp_path):
    assert start.how_to_continue(tmp_path / "none") == "stopped before anything was written"
    line = start.how_to_continue(tmp_path)
    assert line.startswith("stopped; no checkpoint had been written: begin again")
    assert f"--run-dir {tmp_path} and --continue" in line
    path = tmp_path / "checkpoints" / "step-00000003"
    path.mkdir(parents=True)
    for name in ("index.json", "run.json"):
        (path / name).touch()
    assert start.how_to_continue(tmp_path).endswith(f"continue with: falcon-fast train --resume {tmp_path}")
    (tmp_path / "result.json").touch()
    assert f"{tmp_path} is finished" in start.how_to_continue(tmp_path)
