"""metrics.csv: its columns, its rows, and what is kept of them."""

from __future__ import annotations

import csv
import math

import pytest

from falcon_fast.errors import UsageError, WriteError
from falcon_fast.evaluation.report import plot_curves
from falcon_fast.training.records import metrics_file
from falcon_fast.training.records.metrics_file import COLUMNS, TIMINGS, MetricsFile

from ...fuzz import COUNTS, MIB, fuzz

ROW = {
    "step": 10,
    "epoch": 0.5,
    "loss": 1 / 3,
    "prior": 0.1,
    "invariance": 0.2,
    "codes_used": 7,
    "lr": 1e-3,
    "images_per_second": 123.4,
    "data_wait": 0.01,
    "seconds": 2.0,
}


def test_columns_begin_with_the_step_and_end_with_the_timings():
    assert COLUMNS[:8] == ("step", "epoch", "loss", "prior", "invariance", "codes_used", "lr", "probe_accuracy")
    assert COLUMNS[-5:] == TIMINGS == ("images_per_second", "data_wait", "mfu", "threads", "seconds")


def test_rows_are_on_disk_at_once_and_what_was_not_measured_is_empty(tmp_path):
    path = tmp_path / "metrics.csv"
    with MetricsFile(path) as file:
        file.write(ROW | {"probe_accuracy": None})
        (row,) = csv.DictReader(path.open())
        assert row["loss"] == "0.333333333" and row["probe_accuracy"] == "" and row["nmi_codes"] == ""


def test_a_file_that_was_taken_away_and_an_unknown_column_are_errors(tmp_path):
    path = tmp_path / "metrics.csv"
    with MetricsFile(path) as file:
        with pytest.raises(ValueError, match="no column nonsense"):
            file.write(ROW | {"nonsense": 1})
        path.unlink()
        with pytest.raises(WriteError, match="removed or renamed"):
            file.write(ROW)


def test_resuming_keeps_the_rows_up_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"
    with MetricsFile(path) as file:
        for step in (10, 20, 30):
            file.write(ROW | {"step": step})
    with MetricsFile(path, keep_until_step=20) as file:
        file.write(ROW | {"step": 40})
    assert [row["step"] for row in csv.DictReader(path.open())] == ["10", "20", "40"]
    path.write_text(path.read_text() + "2,0.1,3")  # the 2 is of a 21: the disk was full
    with MetricsFile(path, keep_until_step=20) as file:
        file.write(ROW | {"step": 30})
    assert [row["step"] for row in csv.DictReader(path.open())] == ["10", "20", "30"]
    with MetricsFile(path) as file:
        pass
    assert not list(csv.DictReader(path.open()))


@pytest.mark.parametrize(
    "text",
    [b"\xff", b"step,loss\n1," + b"x" * 200_000, b"step,loss\n" + b'"\n",' * 100_000],
    ids=["bytes", "cell", "row"],
)
def test_a_file_that_is_no_table_is_kept_aside_and_not_drawn(tmp_path, text):
    path, said = tmp_path / "metrics.csv", []
    path.write_bytes(text)
    with pytest.raises(UsageError, match=r"metrics\.csv is damaged"):
        plot_curves(path, tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == [path]
    with MetricsFile(path, keep_until_step=10, say=said.append):
        pass
    assert (tmp_path / "metrics.csv.bak").read_bytes() == text and len(said) == 1
    assert not list(csv.DictReader(path.open()))


def test_a_file_of_any_size_or_kind_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    path.mkdir()
    with pytest.raises(UsageError, match=r"metrics\.csv is damaged .*a directory.*move it away"):
        MetricsFile(path, keep_until_step=10)
    path.rmdir()
    path.write_bytes(b"x" * 100)
    monkeypatch.setattr(metrics_file, "LARGEST_METRICS", 99)
    with pytest.raises(UsageError, match=r"at most 99 are read"):
        MetricsFile(path, keep_until_step=10)
    assert path.read_bytes() == b"x" * 100 and list(tmp_path.iterdir()) == [path]


def test_steps_that_are_no_numbers_are_not_kept(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n" + "9" * 5000 + ",1\n-1,1\n\u0661,1\n1e3,1\n5,2\n")
    with MetricsFile(path, keep_until_step=10):
        assert [row["step"] for row in csv.DictReader(path.open())] == ["5"]


@pytest.mark.parametrize("count", COUNTS)
def test_mutations_are_read_or_refused_in_one_line(tmp_path, count):
    path = tmp_path / "metrics.csv"
    with MetricsFile(path) as file:
        for step in range(10, 210, 10):
            file.write(ROW | {"step": step, "epoch": step / 20})

    def read():
        with MetricsFile(path, keep_until_step=150):
            kept = [row["step"] for row in csv.DictReader(path.open(newline=""))]
        for backup in tmp_path.glob("*.bak*"):
            backup.unlink()
        assert all(0 <= int(step) <= 150 for step in kept)

    outcome = fuzz(read, [path], count, name="metrics.csv, resumed", memory=16 * MIB, writes=True)
    assert outcome.accepted == count  # what can be read is kept, and the rest is said


@pytest.mark.parametrize("count", COUNTS)
def test_curves_of_mutated_rows_are_finite_or_refused_in_one_line(tmp_path, count, monkeypatch):
    """Without the drawing itself, which takes 0.2 s: the points that it is given."""
    import matplotlib.axes
    import matplotlib.figure

    path = tmp_path / "metrics.csv"
    with MetricsFile(path) as file:
        for step in range(10, 210, 10):
            file.write(ROW | {"step": step, "epoch": step / 20})

    def plot(axes, xs, ys, **style):
        assert len(xs) == len(ys) and all(math.isfinite(x) and abs(x) < 1e15 for x in (*xs, *ys))
        return []

    def save(figure, picture, **options):
        picture.write_bytes(b"")

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", plot)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
    (tmp_path / "pictures").mkdir()
    outcome = fuzz(
        lambda: plot_curves(path, tmp_path / "pictures" / "curves.png"),
        [path],
        count,
        name="metrics.csv, drawn",
        memory=32 * MIB,
    )
    assert outcome.refused > count // 50 and outcome.accepted > count // 2
