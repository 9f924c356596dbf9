"""A run directory: made, recognised, and never left with a half-written file."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path

import pytest

from falcon_fast import config
from falcon_fast.config import load_recipe, override
from falcon_fast.errors import UsageError
from falcon_fast.runs.directory import CHANGEABLE, create_run_directory, state_of, write_json

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
    assert state_of(run, digits) == "new"
    create_run_directory(run, override(digits, {"data.size": 16}))  # 16: the source's own size, for which 0 stands
    assert state_of(run, digits) == "new"
    checkpointed(run)
    assert state_of(run, digits) == "begun"
    (run / "result.json").write_text("{}")
    assert state_of(run, digits) == "finished"
    with pytest.raises(UsageError, match="not empty"):
        create_run_directory(run, digits)


def test_only_where_a_run_works_may_change(tmp_path):
    run, digits = tmp_path / "run", load_recipe("digits")
    create_run_directory(run, digits)
    other = {"data.path": "/elsewhere", "data.loader": "workers", "data.workers": 3, "data.resident_mib": 1}
    other |= {"data.photometric": "eager", "data.max_bad_fraction": 0.5, "data.max_pixels": 10**9}
    other |= {"training.device": "cpu", "training.strategy": "ddp", "training.timeout": 7}
    assert set(other) == CHANGEABLE
    assert state_of(run, override(digits, other)) == "new"
    for name, value in (("training.seed", 3), ("loss.beta", 2.0), ("training.precision", "bf16"), ("data.size", 8)):
        with pytest.raises(UsageError, match=rf"{name} is .*, not {value!r}: choose another --run-dir"):
            state_of(run, override(digits, {name: value}))
    with pytest.raises(UsageError, match="a run of recipe digits, not cifar10"):
        state_of(run, load_recipe("cifar10"))


def test_what_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UsageError, match="something other than a run"):
        state_of(tmp_path, load_recipe("digits"))


def test_json_is_written_whole_and_without_what_json_does_not_know(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"a": {"b": math.nan, "c": math.inf}, "d": 1.5, "e": [1]})
    assert json.loads(path.read_text()) == {"a": {"b": None, "c": None}, "d": 1.5, "e": [1]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["d"] == 1.5
