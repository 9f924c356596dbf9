"""What a run shows: a progress bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

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
