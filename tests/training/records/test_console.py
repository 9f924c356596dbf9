"""What a run shows: a progress bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from falcon_fast.training.records import console as console_module
from falcon_fast.training.records.console import TrainingDisplay

from .test_metrics_file import ROW


def shown(terminal: bool, rows) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=150)
    with TrainingDisplay(console, total_steps=20, start_step=0) as display:
        for row in rows:
            display.advance(row["step"])
            display.show(row, epochs=2)
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    text = shown(False, [ROW, ROW | {"step": 20, "epoch": 1.0, "probe_accuracy": 0.75, "nmi_codes": 0.5}])
    (line,) = text.splitlines()  # the first row comes too soon after the start for a line of its own
    for piece in (
        "epoch 1.0/2",
        "123 images/s",
        "loss 0.333",
        "prior 0.100",
        "7 codes",
        "probe 0.750",
        "NMI 0.500",
        "s left",
    ):
        assert piece in line
    assert "\x1b" not in text


def test_utilisation_is_shown_where_it_is_known():
    assert "123 images/s (1% waiting for data)  loss" in shown(False, [ROW | {"step": 20, "mfu": None}])
    assert "123 images/s (1% waiting for data, MFU 31%)  loss" in shown(False, [ROW | {"step": 20, "mfu": 0.312}])


def test_a_progress_bar_on_a_terminal():
    text = shown(True, [ROW])
    assert "50%" in text and "123 images/s" in text and "\x1b" in text


def test_the_time_left_is_that_of_the_steps_to_come(monkeypatch):
    clock = iter([100.0, 130.0, 131.0, 150.0])
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    display = TrainingDisplay(Console(file=out, width=200), total_steps=50, start_step=10)  # resumed; at 100 s
    display.show(ROW | {"step": 20}, epochs=2)  # at 130 s: 10 steps in 30 s, 30 to come
    display.show(ROW | {"step": 21}, epochs=2)  # at 131 s: too soon for another line
    display.show(ROW | {"step": 30}, epochs=2)  # at 150 s: 20 steps in 50 s, 20 to come
    assert [line.rpartition("  ")[2] for line in out.getvalue().splitlines()] == ["90 s left", "50 s left"]


def test_every_figure_of_a_line_is_its_columns():
    row = ROW | {"step": 20, "mfu": 0.5, "data_wait": 0.25, "probe_accuracy": 0.75, "nmi_codes": 0.625}
    line = shown(False, [row]).strip().rpartition("  ")[0]
    assert line == (
        "epoch 0.5/2  123 images/s (25% waiting for data, MFU 50%)  loss 0.333 (prior 0.100, invariance 0.200)  7 codes  "
        "probe 0.750  NMI 0.625"
    )
