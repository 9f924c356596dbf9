"""The sentence for made-up steps, each with one thing that limits it."""

from __future__ import annotations

import pytest

from falcon_fast.profiling.diagnosis import Circumstances, diagnose
from falcon_fast.profiling.roofline import Bound

STEP = {"data": 0.0, "photometric": 0.05, "forward": 0.3, "loss": 0.1, "backward": 0.5, "optimizer": 0.05}  # a second
CPU = Circumstances(
    gpu=False, processes=1, compiled=False, autocast=False, network=0.8, host=None, bound=Bound(0.5, 0.2, 0.0)
)
GPU = CPU._replace(gpu=True, host=0.3)


def found(phases=None, facts=CPU, images=100):
    return diagnose(STEP | (phases or {}), images, facts)


def test_a_loader_that_is_waited_for():
    limit, sentence = found({"data": 1.0})
    assert limit == "data" and "50% of a step" in sentence and "100 images/s" in sentence and "data.workers" in sentence
    assert found({"data": 0.1})[0] != "data"
    assert found({"data": 1.0, "communication": 0.5})[0] == "data"


def test_gradients_that_are_waited_for():
    limit, sentence = found({"communication": 1.0})
    assert limit == "communication" and "takes 50% of a step" in sentence and "--accumulate" in sentence


def test_a_host_that_is_too_slow():
    limit, sentence = found(facts=GPU._replace(host=0.97))
    assert limit == "launch" and "970.0 of 1000.0 ms" in sentence and "--compile" in sentence
    assert "--compile" not in found(facts=GPU._replace(host=0.97, compiled=True)).sentence
    assert found(facts=GPU)[0] == "compute"


def test_small_operators():
    limit, sentence = found(facts=CPU._replace(bound=Bound(0.05, 0.03, 0.0)))
    assert limit == "overhead" and "10% of the network's time" in sentence and "--compile" in sentence
    assert "all-reduces" in found(facts=CPU._replace(bound=Bound(0.05, 0.03, 0.0), processes=2)).sentence
    assert found(facts=CPU._replace(bound=Bound(0.3, 0.15, 0.0)))[0] == "compute"


def test_memory_and_arithmetic():
    limit, sentence = found(facts=GPU._replace(bound=Bound(0.2, 0.4, 0.0)))
    assert limit == "memory" and "50% of the network's time" in sentence and "--amp" in sentence
    done = found(facts=GPU._replace(bound=Bound(0.2, 0.4, 0.0), autocast=True, compiled=True)).sentence
    assert "--amp" not in done and "--compile" not in done
    limit, sentence = found(facts=GPU)
    assert limit == "compute" and "62% of the network's time" in sentence and "--amp makes products faster" in sentence


def test_a_large_loss_is_said():
    assert "the loss takes 53% of a step" in found({"loss": 1.0}).sentence
    assert "the loss" not in found().sentence


@pytest.mark.parametrize("facts", [CPU._replace(bound=None), CPU._replace(network=None)])
def test_what_is_not_known_is_not_claimed(facts):
    limit, sentence = found(facts=facts)
    assert limit == "compute" and "cannot be told apart" in sentence


@pytest.mark.parametrize("facts", [CPU, GPU, CPU._replace(bound=Bound(0.0, 0.0, 0.0)), GPU._replace(bound=None)])
@pytest.mark.parametrize("phases", [{}, {"data": 5.0}, {"communication": 5.0}, {"loss": 5.0}])
def test_a_sentence_is_one_line(phases, facts):
    assert len(found(phases, facts).sentence.splitlines()) == 1
    zero = dict.fromkeys(STEP, 0.0) | phases
    assert diagnose(zero | {"forward": 1e-9}, 1, facts).sentence


def test_waiting_counts_from_a_fifth_of_a_step():
    """The other phases take a second: 0.26 s of waiting are 20.6 % of a step, 0.24 s are 19.4 %."""
    for name in ("data", "communication"):
        assert found({name: 0.26})[0] == name
        assert found({name: 0.24})[0] == "compute"


def test_launches_count_from_nine_tenths_of_a_step():
    assert found(facts=GPU._replace(host=0.91))[0] == "launch"
    assert found(facts=GPU._replace(host=0.89))[0] == "compute"


def test_overhead_is_where_less_than_half_of_the_networks_time_is_needed():
    """The network takes 0.8 s."""
    assert found(facts=CPU._replace(bound=Bound(0.25, 0.14, 0.0)))[0] == "overhead"
    assert found(facts=CPU._replace(bound=Bound(0.25, 0.16, 0.0)))[0] == "compute"


def test_the_loss_is_named_from_three_tenths_of_a_step():
    """The other phases take 0.9 s: 0.40 s of loss are 30.8 % of a step, 0.37 s are 29.1 %."""
    assert "the loss takes 31% of a step" in found({"loss": 0.40}).sentence
    assert "the loss" not in found({"loss": 0.37}).sentence
