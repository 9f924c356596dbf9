"""metrics.csv: its columns, its rows, and what is kept of them."""

from __future__ import annotations

import csv

import pytest

from falcon_fast.errors import WriteError
from falcon_fast.training.records.metrics_file import COLUMNS, TIMINGS, MetricsFile

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
