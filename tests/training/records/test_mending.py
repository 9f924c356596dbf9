"""A metrics.csv that was cut short or edited is noticed and mended, and what is kept is right."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from falcon_fast.training.records.mending import backup_of, fingerprint, kept_rows
from falcon_fast.training.records.metrics_file import COLUMNS, MetricsFile

ROW = {"epoch": 0.5, "loss": 1 / 3, "prior": 0.1, "invariance": 0.2, "codes_used": 7, "lr": 1e-3, "seconds": 2.0}
SAVED = 30  # the step of the checkpoint; a row follows it


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict]:
    """A metrics.csv with rows for steps 10 to 40, and what the checkpoint at step 30 recorded of it."""
    path = tmp_path / "metrics.csv"
    with MetricsFile(path) as file:
        for step in (10, 20, 30, 40):
            file.write(ROW | {"step": step})
            if step == SAVED:
                recorded = file.state
    return path, recorded


def edit(content: str, kind: str) -> str:
    lines = content.splitlines(keepends=True)
    row = lines[2]  # of step 20
    changed = {
        "a value changed": row.replace("0.001", "0.002"),
        "a word for a number": row.replace("0.001", "much"),
        "a row missing": "",
        "a row twice": row + row,
        "a row cut short": row[:20] + "\r\n",
        "a column too many": row.rstrip() + ",7\r\n",
        "not text": row.replace("0.001", "\ufffd\0"),
        "a quotation mark": '"' + row,
    }
    if kind in changed:
        lines[2] = changed[kind]
    elif kind == "no header":
        del lines[0]
    elif kind == "rows in another order":
        lines[1], lines[3] = lines[3], lines[1]
    elif kind == "half the last line":
        return "".join(lines[:3]) + lines[3][:15]
    elif kind == "empty":
        return ""
    elif kind == "a line of notes":
        lines.insert(2, "better from here on\r\n")
    return "".join(lines)


EDITS = {
    "a value changed": ["10", "20", "30"],
    "a word for a number": ["10", "30"],
    "a row missing": ["10", "30"],
    "a row twice": ["10", "20", "30"],
    "a row cut short": ["10", "30"],
    "a column too many": ["10", "30"],
    "not text": ["10", "30"],
    "a quotation mark": ["10", "30"],
    "no header": ["10", "20", "30"],
    "rows in another order": ["10", "20", "30"],
    "half the last line": ["10", "20"],
    "a line of notes": ["10", "20", "30"],
}


def steps(path: Path) -> list[str]:
    return [row["step"] for row in csv.DictReader(path.open())]


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_is_said_and_mended(kind: str, written: tuple[Path, dict]) -> None:
    path, recorded = written
    original = path.read_bytes()
    path.write_bytes(edit(original.decode(), kind).encode())
    damaged, lines = path.read_bytes(), []
    assert damaged != original
    with MetricsFile(path, SAVED, recorded, lines.append) as file:
        file.write(ROW | {"step": 40})
    assert steps(path) == [*EDITS[kind], "40"]
    (line,) = lines
    assert f"was cut short or edited since step {SAVED} was saved: {len(EDITS[kind])} of 3 rows" in line
    assert (path.parent / "metrics.csv.bak").read_bytes() == damaged
    assert next(csv.reader(path.open())) == list(COLUMNS)
    for row in csv.DictReader(path.open()):
        assert all(float(value) == float(value) for value in row.values() if value)


def test_rows_after_the_checkpoint_are_no_damage(written: tuple[Path, dict]) -> None:
    """As after a kill: one row more, and half of another."""
    path, recorded = written
    path.write_bytes(path.read_bytes() + b"50,0.5,0.3")
    lines: list[str] = []
    with MetricsFile(path, SAVED, recorded, lines.append):
        pass
    assert steps(path) == ["10", "20", "30"] and lines == []
    assert not list(path.parent.glob("*.bak*"))


def test_a_missing_or_empty_file_is_said(written: tuple[Path, dict]) -> None:
    path, recorded = written
    for remove in (path.unlink, lambda: path.write_bytes(b"")):
        remove()
        lines: list[str] = []
        with MetricsFile(path, SAVED, recorded, lines.append):
            pass
        assert "is missing" in lines[0] and steps(path) == []


def test_what_a_file_records_of_itself_is_what_is_on_the_disk(written: tuple[Path, dict]) -> None:
    path, recorded = written
    with MetricsFile(path, SAVED, recorded) as file:
        assert file.state == recorded == fingerprint(path.read_bytes(), 3)
        file.write(ROW | {"step": 40, "probe_accuracy": None})
        assert file.state == fingerprint(path.read_bytes(), 4)


def test_a_file_of_which_nothing_was_recorded_keeps_its_whole_rows(written: tuple[Path, dict]) -> None:
    path, _ = written
    content = path.read_bytes()
    for recorded in (None, 3, {}, {"bytes": "many"}, {"bytes": -5, "crc32": 3}):
        kept = kept_rows(content, SAVED, recorded, COLUMNS)
        assert [row["step"] for row in kept.rows] == ["10", "20", "30"]
    assert kept_rows(content, SAVED, None, COLUMNS).problem is None
    kept = kept_rows(edit(content.decode(), "a row twice").encode(), SAVED, None, COLUMNS)
    assert len(kept.rows) == 3 and "1 rows that are" in str(kept.problem)


def test_the_first_of_two_rows_of_a_step_is_kept() -> None:
    kept = kept_rows(b"step,loss\n10,1\n10,2\n20,3\n", 20, None, COLUMNS)
    assert [(row["step"], row["loss"]) for row in kept.rows] == [("10", "1"), ("20", "3")]


def test_an_older_file_with_fewer_columns_goes_on(tmp_path: Path) -> None:
    """As written before there was a column `changes`."""
    path = tmp_path / "metrics.csv"
    text = io.StringIO(newline="")
    older = [column for column in COLUMNS if column != "changes"]
    writer = csv.DictWriter(text, older, extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerow(ROW | {"step": 10})
    path.write_bytes(text.getvalue().encode())
    lines: list[str] = []
    with MetricsFile(path, 10, fingerprint(path.read_bytes(), 1), lines.append) as file:
        file.write(ROW | {"step": 20, "changes": 1})
    assert lines == [] and [(row["step"], row["changes"]) for row in csv.DictReader(path.open())] == [
        ("10", ""),
        ("20", "1"),
    ]


def test_a_line_without_end_is_no_row(written: tuple[Path, dict]) -> None:
    """Longer than Python's reader takes, as a header and as a row."""
    content = written[0].read_bytes()
    long = b"step" + b'"' * 200_000 + b"\n"
    assert [row["step"] for row in kept_rows(content + long, SAVED, None, COLUMNS).rows] == ["10", "20", "30"]
    assert kept_rows(long, SAVED, None, COLUMNS).rows == []


def test_an_older_copy_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for name in ("metrics.csv.bak", "metrics.csv.bak-2", "metrics.csv.bak-3"):
        assert backup_of(path).name == name
        backup_of(path).touch()
