"""TensorBoard's events against metrics.csv, and utilisation."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from falcon_fast.config import load_recipe, override, validate
from falcon_fast.hardware.flops import StepFlops
from falcon_fast.runs.directory import create_run_directory
from falcon_fast.training import stepper, trainer
from falcon_fast.training.checkpoints.restore import restore
from falcon_fast.training.optimizer import Rate
from falcon_fast.training.records import logs
from falcon_fast.training.records.metrics_file import COLUMNS
from falcon_fast.training.run import Run, prepare
from falcon_fast.training.step import StepMetrics

TINY = {
    "model.width": 4,
    "loss.embedding_dim": 32,
    "loss.num_codes": 64,
    "training.epochs": 1,
    "training.batch_size": 128,
    "log.every_steps": 2,
    "checkpoint.every_steps": 5,
}  # 11 steps
QUIET = Console(quiet=True)


def prepared(**changes) -> Run:
    settings = TINY | {k.replace("__", "."): v for k, v in changes.items()}
    return prepare(validate(override(load_recipe("digits"), settings)))


def table(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.csv by columns: (step, value) where there is one."""
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {name: [(int(r["step"]), float(r[name])) for r in rows if r[name]] for name in rows[0] if name != "step"}
    return {name: values for name, values in found.items() if values}


def assert_events_equal_rows(directory: Path) -> None:
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    columns = table(directory)
    assert set(events.Tags()["scalars"]) == set(columns)
    for name, values in columns.items():
        seen = events.Scalars(name)
        assert [event.step for event in seen] == [step for step, _ in values], name
        assert [event.value for event in seen] == pytest.approx([value for _, value in values], rel=1e-6), name


def test_events_equal_the_rows_also_of_a_resumed_run(tmp_path, monkeypatch):
    step_function, calls = stepper.training_step, []

    def dying(*arguments):
        calls.append(None)
        if len(calls) == 9:
            raise InterruptedError  # after rows that the checkpoint of step 5 has not seen
        return step_function(*arguments)

    run = prepared()
    create_run_directory(tmp_path, run.config)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(stepper, "training_step", dying)
        trainer.train(run, tmp_path, QUIET)
    assert [step for step, _ in table(tmp_path)["loss"]] == [2, 4, 6, 8]
    assert_events_equal_rows(tmp_path)

    run = prepared()
    step, seconds = restore(run, tmp_path)
    assert step == 5
    trainer.train(run, tmp_path, QUIET, step, seconds)
    assert [step for step, _ in table(tmp_path)["loss"]] == [2, 4, 6, 8, 10, 11]
    assert_events_equal_rows(tmp_path)
    assert "mfu" not in table(tmp_path)  # a CPU has no data sheet here


def test_a_run_that_begins_again_forgets_what_was_logged(tmp_path):
    run = prepared()
    for value in (1.0, 2.0):
        with logs.RunLog(run, tmp_path, 0) as log:
            log.write({"step": 2, "loss": value, "mfu": None})
    assert table(tmp_path) == {"loss": [(2, 2.0)]}
    assert_events_equal_rows(tmp_path)


def test_no_events_where_nobody_wants_them(tmp_path):
    run = prepared(log__tensorboard=False, training__epochs=0)
    create_run_directory(tmp_path, run.config)
    trainer.train(run, tmp_path, QUIET)
    assert not (tmp_path / "tensorboard").exists()


def test_utilisation_is_the_networks_and_the_losss_flop_over_the_peak(monkeypatch):
    run = prepared()
    monkeypatch.setattr(logs, "known_rate", lambda device, precision: 1e12)
    flop = logs.step_flops(run.config, run.network, 16)
    said: list[str] = []
    assert logs.utilisation_per_image(run, said.append) == pytest.approx(flop.total / 128 / 1e12)
    throughput = logs.Throughput(run, said.append)
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(clock))
    throughput.restart()
    throughput.step(0.5)
    throughput.step(1.5)
    row = throughput.row()
    assert row == {"images_per_second": 64.0, "data_wait": 0.5, "mfu": pytest.approx(flop.total / 2 / 1e12)}
    assert not said


def test_a_network_that_cannot_be_counted_is_said_and_trains(monkeypatch):
    run = prepared()
    monkeypatch.setattr(logs, "known_rate", lambda device, precision: 1e12)

    def failing(config, network, size):
        raise NotImplementedError("aten::strange has no meta kernel\nand more")

    monkeypatch.setattr(logs, "step_flops", failing)
    said: list[str] = []
    assert logs.utilisation_per_image(run, said.append) is None
    assert said == ["the FLOP of resnet8 cannot be counted (aten::strange has no meta kernel): no MFU is logged"]
    assert logs.Throughput(run, said.append).row()["mfu"] is None


def test_utilisation_is_of_all_devices(monkeypatch):
    """6e12 FLOP a step of 128 images: at 3 steps/s, half of what four devices of 9e12 FLOP/s can do."""
    run = prepared()
    run.processes = dataclasses.replace(run.processes, world_size=4)
    monkeypatch.setattr(logs, "known_rate", lambda device, precision: 9e12)
    monkeypatch.setattr(logs, "step_flops", lambda config, network, size: StepFlops(5e12, 1e12))
    assert logs.utilisation_per_image(run, print) * 3 * 128 == pytest.approx(0.5)


def test_every_metric_of_a_row_stands_in_its_column():
    run = prepared(optimizer__lr=0.5)
    values = {"loss": 6.0, "prior": 1.0, "invariance": 5.0, "codes_used": 17, "probe_accuracy": 0.25, "grad_norm": 3.0}
    metrics = StepMetrics(**{name: torch.tensor(value) for name, value in values.items()})
    row = logs.metrics_row(run, 7, metrics, Rate(0.25, 0.1))
    assert row == {
        "step": 7,
        "epoch": 7 / (1437 // 128),  # 80 % of the 1797 digits are for training
        "loss": 6.0,
        "prior": 1.0,
        "invariance": 5.0,
        "codes_used": 17,
        "lr": pytest.approx(0.2),  # a quarter of the way from 0.1 to 0.5
        "grad_norm": 3.0,
        "probe_train_accuracy": 0.25,
        "changes": 0,
    }
    assert set(row) <= set(COLUMNS)


def test_tags_are_the_columns_and_steps_the_rows(tmp_path):
    run = prepared()
    with logs.RunLog(run, tmp_path, 0) as log:
        log.write({"step": 3, "epoch": 0.25, "loss": 2.0, "prior": 0.5, "mfu": None})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {"epoch": [(3, 0.25)], "loss": [(3, 2.0)], "prior": [(3, 0.5)]}


def test_a_run_goes_on_without_events_that_cannot_be_written(tmp_path, monkeypatch, capfd):
    """The thread that writes them fails, as on a full disk; metrics.csv has every row."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self, data):
        raise OSError(28, "No space left on device")

    run, lines = prepared(), []
    create_run_directory(tmp_path / "run", run.config)
    row = {"step": 1, "epoch": 0.1, "loss": 1.0, "seconds": 1.0}
    with logs.RunLog(run, tmp_path / "run", 0, lines.append) as log:
        log.write(row)
        monkeypatch.setattr(RecordWriter, "write", full)
        for step in (2, 3):
            log.write(row | {"step": step})
    assert [r["step"] for r in csv.DictReader((tmp_path / "run" / "metrics.csv").open())] == ["1", "2", "3"]
    (line,) = lines
    assert "No space left" in line and "goes on without TensorBoard" in line and str(tmp_path / "run") in line
    assert "Traceback" not in capfd.readouterr().err
