"""A disk that takes no more, at every single write of a run: one line, nothing half-written, and the run can be continued."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from ..host import SHIM, Host
from .test_stops import SETTINGS, ended, figures

# 6 steps in 3 epochs, with everything that a run writes.
CHANGES = {"training.epochs": 3, "log.every_steps": 2, "log.evaluate_epochs": 0, "log.tensorboard": "true"}
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


@pytest.fixture(scope="module")
def full_disks(tmp_path_factory):
    """A host whose commands find the disk full at the write that they are told."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("full")
    library = folder / "failing_writes.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SHIM, "-ldl"], check=True)
    with Host(folder, library) as running:
        yield running


def command(images: Path, run: Path) -> list[object]:
    settings = [word for name, value in (SETTINGS | CHANGES).items() for word in ("--set", f"{name}={value}")]
    return ["train", "--data", images, *settings, "--run-dir", run, "--continue"]


def undisturbed(host: Host, images: Path, folder: Path):
    """The figures of a run whose disk has room, and how many times it writes."""
    run, log = folder / "undisturbed", folder / "log"
    process = host.start(command(images, run), log, fail=(str(run), 0, 0, False), count=str(folder / "count"))
    assert ended(host, [process], log) == [0], log.read_text()
    return figures(run), int((folder / "count").read_text())


def fail_at(host: Host, images: Path, folder: Path, k: int, number: int, once: bool, expected) -> tuple[int, str]:
    """Let the k-th write fail, check what is left, continue the run with room, and compare it. Returns exit code and line."""
    run, log = folder / f"run-{k}-{once}", folder / f"log-{k}-{once}"
    process = host.start(command(images, run), log, fail=(str(run), k, number, once))
    (code,) = ended(host, [process], log)
    text = log.read_text()
    case = (k, errno.errorcode[number], once, code, text[-2000:])
    assert "Traceback" not in text, case
    left = [path.name for path in run.rglob(".*")] if run.exists() else []
    assert not left, (left, case)
    line = text.splitlines()[-1] if code else ""
    if code:
        assert code in (2, 74) and line.startswith("error: ") and "cannot be written" in line, case
        assert not (run / "result.json").exists(), case
        if (run / "checkpoints").is_dir() and list((run / "checkpoints").glob("step-*")):
            assert "the last good checkpoint is" in line or "training is done" in line, case
    else:  # only what a run can do without
        assert "training goes on without TensorBoard" in text or "no picture of the curves" in text, case
    process = host.start(command(images, run), log)
    assert ended(host, [process], log) == [0], (case, log.read_text()[-2000:])
    assert figures(run) == expected, case
    assert host.orphans() == []
    return code, line


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(full_disks, images, tmp_path):
    expected, count = undisturbed(full_disks, images, tmp_path)
    for k in (count // 3, 2 * count // 3):
        fail_at(full_disks, images, tmp_path, k, errno.ENOSPC, False, expected)


@pytest.mark.slow
def test_every_write_may_be_the_one_that_fails(full_disks, images, tmp_path):
    """From the k-th write on, for every k, each with one of the errors; every fourth time only that one write fails."""
    expected, count = undisturbed(full_disks, images, tmp_path)
    table: Counter[tuple[str, int]] = Counter()
    for k in range(1, count + 1):
        number = ERRORS[k % len(ERRORS)]
        code, line = fail_at(full_disks, images, tmp_path, k, number, k // len(ERRORS) % 4 == 3, expected)
        place = next(
            (
                p
                for p in ("config.toml", "metrics.csv", "index.json", "run.json", "shard-", "backbone", "result.json")
                if p in line
            ),
            "other" if code else "went on",
        )
        table[(place, code)] += 1
    print(f"\n{count} writes")
    for (place, code), times in sorted(table.items()):
        print(f"{place:12} exit {code:3} {times:4}")
