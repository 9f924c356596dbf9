"""A run directory: made, recognised, and never left with a half-written file."""

from __future__ import annotations

import json
import math
import threading
import tomllib
from pathlib import Path

import pytest

from falcon_fast import config
from falcon_fast.config import load_recipe
from falcon_fast.errors import UsageError
from falcon_fast.runs.directory import create_run_directory, keep_result, state_of, write_json

from ..commands import TINY


def test_the_resolved_configuration_loads_again(finished):
    directory, _ = finished
    loaded = config.load_config(directory / "config.toml")
    assert loaded.model.width == 4 and loaded.data.size == 16 and loaded.loss.num_codes == 64
    assert tomllib.loads((directory / "config.toml").read_text())["recipe"] == "digits"


def test_what_was_left_half_written_does_not_occupy_a_directory(tmp_path, monkeypatch, falcon_fast):
    """A full disk: one line, and when there is room again, the same command."""
    directory = tmp_path / "run"

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        code, _, err = falcon_fast("train", *TINY, "--epochs", 0, "--run-dir", directory)
        assert code == 2 and "cannot be written: No space left" in err
    assert not list(directory.iterdir())
    (directory / ".lock").touch()  # as after SIGKILL
    (directory / ".config.toml.partial").write_text("recipe =")
    code, _, err = falcon_fast("train", *TINY, "--epochs", 0, "--run-dir", directory)
    assert code == 0, err
    assert not list(directory.glob(".*"))


def checkpointed(directory: Path) -> None:
    """Something that looks like a complete checkpoint."""
    path = directory / "checkpoints" / "step-00000003"
    path.mkdir(parents=True)
    (path / "index.json").touch()
    (path / "run.json").touch()


def test_the_state_of_a_directory(tmp_path):
    run, digits = tmp_path / "run", load_recipe("digits")
    assert state_of(run) == "new"
    create_run_directory(run, digits)
    assert state_of(run) == "new"
    checkpointed(run)
    assert state_of(run) == "begun"
    (run / "result.json").write_text("{}")
    assert state_of(run) == "finished"
    assert keep_result(run, 3) == "result-3-epochs.json" and keep_result(run, 3) is None
    assert state_of(run) == "begun" and (run / "result-3-epochs.json").read_text() == "{}"
    with pytest.raises(UsageError, match="not empty"):
        create_run_directory(run, digits)


def test_directories_that_are_made_at_once_get_names_of_their_own(tmp_path):
    """Eight threads at a barrier, all with the same name: as runs that start in one second."""
    barrier, made = threading.Barrier(8), []

    def make():
        barrier.wait()
        made.append(create_run_directory(tmp_path / "runs" / "digits", load_recipe("digits"), fresh=True))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = ["digits", *(f"digits-{n}" for n in range(2, 9))]
    assert sorted(path.name for path in made) == names == sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert all((path / "config.toml").is_file() for path in made)


def test_what_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UsageError, match="something other than a run"):
        state_of(tmp_path)


def test_json_is_written_whole_and_without_what_json_does_not_know(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"a": {"b": math.nan, "c": math.inf}, "d": 1.5, "e": [1]})
    assert json.loads(path.read_text()) == {"a": {"b": None, "c": None}, "d": 1.5, "e": [1]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["d"] == 1.5
