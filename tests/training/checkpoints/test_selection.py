"""Which checkpoint is used when the newest one cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from falcon_fast.errors import UsageError
from falcon_fast.training.checkpoints.selection import candidates, select, set_aside

from .parts import save, trained


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    for step in (3, 4, 5):
        save(folder, trained(), step, keep=3)
    return folder


@pytest.fixture
def run(three: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "run"))


def path_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def cut(path: Path) -> None:
    shard = path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def test_the_newest_is_taken_where_nothing_is_wrong(run: Path) -> None:
    found = select(run)
    assert (found.path, found.rejected, found.notes()) == (path_of(run, 5), (), [])


def test_the_one_before_is_taken_and_said(run: Path) -> None:
    cut(path_of(run, 5))
    (path_of(run, 4) / "index.json").unlink()
    found = select(run)
    assert found.path == path_of(run, 3) and found.facts["step"] == 3
    first, second = found.notes()
    assert "step-00000005 is damaged" in first and first.endswith("step-00000003 is used in its place")
    assert "step-00000004 is damaged" in second and "index.json" in second


def test_one_of_another_run_is_passed_over(run: Path) -> None:
    found = select(run, lambda facts: "its data was a, now it is b" if facts["step"] == 5 else None)
    assert found.path == path_of(run, 4)
    assert "step-00000005 belongs to another run (its data was a" in found.notes()[0]


def test_where_none_is_left_a_line_says_so(run: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot resume .*step-00000005: its data was a: resume with what it had"):
        select(run, lambda facts: "its data was a")
    for step in (3, 4, 5):
        cut(path_of(run, step))
    with pytest.raises(UsageError, match=r"step-00000005 is damaged.*, and so are 2 older") as caught:
        select(run)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="no complete checkpoint"):
        select(run / "checkpoints")


def test_what_is_passed_over_is_kept_under_another_name(run: Path) -> None:
    cut(path_of(run, 5))
    set_aside(select(run))
    assert [path.name for path in candidates(run)] == ["step-00000003", "step-00000004"]
    aside = run / "checkpoints" / "set-aside-step-00000005"
    assert (aside / "shard-00000.safetensors").is_file()
    shutil.copytree(aside, path_of(run, 5))
    set_aside(select(run))
    assert (run / "checkpoints" / "set-aside-step-00000005-2").is_dir() and select(run).rejected == ()


def test_what_is_no_checkpoint_is_not_looked_at(run: Path) -> None:
    path_of(run, 9).mkdir()
    (run / "checkpoints" / "step-notes").mkdir()
    (run / "checkpoints" / "step-notes" / "run.json").touch()
    assert select(run).path == path_of(run, 5) and len(candidates(run)) == 3


def test_ten_million_steps_come_after_one_million(tmp_path: Path) -> None:
    """Names are sorted as numbers, also where they have more digits than usual."""
    for step in (99_999_999, 100_000_000):
        save(tmp_path, trained(), step)
    assert select(tmp_path).facts["step"] == 100_000_000
