"""The figures computed from measured steps, compared with hand-computed ones; and the lines that a user reads."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

from falcon_fast.config import load_recipe, override, validate
from falcon_fast.errors import UsageError
from falcon_fast.hardware.flops import StepFlops
from falcon_fast.hardware.peaks import Measured
from falcon_fast.profiling import measure
from falcon_fast.profiling.diagnosis import Diagnosis
from falcon_fast.profiling.measure import Profile
from falcon_fast.profiling.phases import Timings
from falcon_fast.profiling.roofline import Bound, Operator, Trace
from falcon_fast.training.run import prepare

# The median is 4 s, the mean 20 s; the 20th percentile is 2 s, the 80th 8 s.
STEPS = [4.0, 100.0, 1.0, 8.0, 2.0, 4.0]
FOUND = Profile(
    images=64,
    processes=2,
    device="a device",
    timings=Timings(STEPS, {"data": 1.5, "forward": 1.0, "loss": 0.5, "backward": 2.0}, 5.0, None, 3 * 2**30),
    flop=StepFlops(12e12, 4e12),
    sheet=4e12,
    measured=Measured(2.5e12, 2048, torch.float32, 7e9),
    diagnosis=Diagnosis("data", "data: too slow"),
)


def test_throughput_is_of_the_median_step():
    assert FOUND.images_per_second == (64 / 4.0, 64 / 8.0, 64 / 2.0)
    assert measure.phases.spread(STEPS) == (2.0, 8.0)


def test_utilisation_is_a_share_of_all_processes_devices():
    """16 TFLOP in 4 s are 4 TFLOP/s: of two devices of 4 by the data sheet, and of two of 2.5 as measured."""
    assert FOUND.mfu == pytest.approx(4 / (2 * 4))
    assert FOUND.mfu_of_measured == pytest.approx(4 / (2 * 2.5))
    unlisted = dataclasses.replace(FOUND, sheet=None, processes=1)
    assert unlisted.mfu == unlisted.mfu_of_measured == pytest.approx(4 / 2.5)
    uncounted = dataclasses.replace(FOUND, flop=None)
    assert uncounted.mfu is uncounted.mfu_of_measured is None


def test_json_has_every_figure_by_its_name():
    assert FOUND.as_dict() == {
        "images_per_step": 64,
        "processes": 2,
        "device": "a device",
        "steps": 6,
        "images_per_second": {"median": 16.0, "p20": 8.0, "p80": 32.0},
        "step_seconds": 5.0,
        "phase_seconds": {"data": 1.5, "forward": 1.0, "loss": 0.5, "backward": 2.0},
        "host_seconds": None,
        "data_wait": 0.3,
        "peak_memory_bytes": 3 * 2**30,
        "flop_per_step": {"network": 12e12, "loss": 4e12, "total": 16e12},
        "mfu": 0.5,
        "mfu_of_measured": 0.8,
        "peak_flop_per_second": {"data_sheet": 4e12, "measured": 2.5e12},
        "measured_product": {"side": 2048, "dtype": "float32"},
        "measured_bandwidth_bytes_per_second": 7e9,
        "limit": "data",
        "diagnosis": "data: too slow",
    }


def test_lines_for_people():
    run = types.SimpleNamespace(device=torch.device("cpu"))
    speed, utilisation, limit = measure.lines(run, FOUND)
    assert speed.startswith("16 images/s (median of 6 steps; 20th to 80th percentile 8 to 32), 5000.00 ms a step")
    assert speed.endswith("peak memory 3.00 GiB (of the process)")
    assert utilisation.startswith("16.00 TFLOP a step (network 12.00 TFLOP, loss 4.00 TFLOP): MFU 50.0%")
    assert "of the data sheet's 4 TFLOP/s" in utilisation and "80.0% of the 2.50 TFLOP/s of each device" in utilisation
    assert "(2048^3, float32)" in utilisation
    assert limit == "limited by data: too slow"
    run = types.SimpleNamespace(device=torch.device("cuda"))
    speed, limit = measure.lines(run, dataclasses.replace(FOUND, flop=None))
    assert speed.endswith("peak memory 3.00 GiB") and limit.startswith("limited by")


def prepared(**changes):
    settings = {"model.width": 4, "loss.embedding_dim": 32, "loss.num_codes": 64, "training.batch_size": 16}
    return prepare(validate(override(load_recipe("digits"), settings | changes)))


def test_the_networks_bound_is_that_of_all_micro_batches(monkeypatch):
    operators = [
        Operator("mm", False, 6e9, 1.0, False, False, False),
        Operator("relu", False, 0.0, 5e8, True, False, False),
    ]
    asked = []
    monkeypatch.setattr(measure, "trace", lambda network, *rest: asked.append(rest) or Trace(operators, 2, 0))
    flop, bound = measure._counted(prepared(**{"training.accumulate": 4}), FOUND.measured, print)
    assert asked == [(2 * 16 // 4, 16, None)]  # two views of a micro-batch's images, of 16 px, in float32
    assert bound == pytest.approx(Bound(4 * 6e9 / 2.5e12, 4 * 5e8 / 7e9, 0.0))
    assert flop.loss == 8 * 16 * 32 * 64


def test_a_network_that_cannot_be_counted_is_said(monkeypatch):
    def failing(*arguments):
        raise NotImplementedError("aten::strange\nand more")

    monkeypatch.setattr(measure, "step_flops", failing)
    said: list[str] = []
    assert measure._counted(prepared(), FOUND.measured, said.append) == (None, None)
    assert said == ["the FLOP of resnet8 cannot be counted (aten::strange): no MFU"]


def test_the_network_is_told_from_the_loss_or_not_at_all():
    assert measure._network(FOUND.timings.phases) == 3.0
    assert measure._network({"data": 1.0, "forward, loss, backward": 2.0}) is None


def test_a_trace_that_cannot_be_written_is_said_before_any_step(tmp_path):
    measure._check_writable(tmp_path / "trace.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"nowhere/trace\.json cannot be written"):
        measure._check_writable(tmp_path / "nowhere" / "trace.json")
