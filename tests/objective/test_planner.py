"""The cost model and what it says: figures worked out by hand, and choices that must hold."""

from __future__ import annotations

import itertools

import pytest

from falcon_fast.kernels.gpu.devices import DEVICES
from falcon_fast.objective.planner import candidates, choose, explain

H200 = DEVICES["h200"]


def test_flop_and_traffic_by_hand() -> None:
    stored, streaming, reference = candidates(1024, 2048, 65536, "rademacher", H200)
    floor = 8 * 1024 * 2048 * 65536
    assert (stored.name, streaming.name, reference.name) == ("stored", "streaming", "reference")
    assert stored.flop == floor and streaming.flop == 2 * floor and reference.flop == floor
    assert stored.traffic == 20 * 1024 * 65536 and reference.traffic == 296 * 1024 * 65536
    assert stored.peak >= 4 * 1024 * 65536 and streaming.peak < stored.peak / 4


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_never_faster_than_the_device_allows(device) -> None:
    for n, f, c in ((64, 2048, 16384), (1024, 2048, 65536), (1024, 512, 524288)):
        for kind in ("rademacher", "hadamard"):
            for candidate in candidates(n, f, c, kind, device):
                assert candidate.seconds >= candidate.flop / device.reached.half_products
                if candidate.name == "stored":
                    assert candidate.seconds >= candidate.traffic / device.reached.bandwidth


def test_more_memory_is_never_slower() -> None:
    chosen = [choose(1024, 2048, 524288, "rademacher", H200, budget) for budget in (2**27, 2**30, 2**32, 2**34)]
    assert [x.name for x in chosen] == ["streaming", "streaming", "stored", "stored"]
    assert all(a.seconds >= b.seconds for a, b in itertools.pairwise(chosen))
    assert all(x.peak <= budget for x, budget in zip(chosen, (2**27, 2**30, 2**32, 2**34), strict=True))


def test_hadamard_codes_cost_less_than_dense_ones() -> None:
    for shape in ((64, 2048, 16384), (1024, 2048, 65536), (1024, 2048, 524288)):
        (hadamard, _) = candidates(*shape, "hadamard", H200)
        assert hadamard.seconds < choose(*shape, "rademacher", H200).seconds
    assert candidates(64, 4096, 16384, "hadamard", H200)[0].name == "stored"  # no kernels for that width: a dense one


def test_explanation_names_the_choice_and_the_reason() -> None:
    lines = list(explain(1024, 2048, 524288, "rademacher", H200, 2**29))
    assert "streaming" in lines[-2] and "stored does not fit" in lines[-2]
    assert any(line.startswith("stored") and "over the budget" in line for line in lines)
    assert "times as fast as streaming" in list(explain(64, 2048, 16384, "rademacher", H200))[-2]
    assert "computing the logits again is faster" in list(explain(64, 2048, 16384, "hadamard", H200))[-2]
    assert "too small even" in list(explain(1024, 2048, 524288, "rademacher", H200, 2**20))[-2]


@pytest.mark.parametrize("shape", [(1024, 2048, 65536), (64, 2048, 16384), (4096, 512, 16384)])
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_the_factor_is_the_ratio_of_the_times_in_the_table(shape, device) -> None:
    lines = list(explain(*shape, "rademacher", device, 2**34))
    milliseconds = {words[0]: float(words[3]) for words in map(str.split, lines[2:4])}
    chosen = min(milliseconds, key=milliseconds.__getitem__)
    (other,) = milliseconds.keys() - {chosen}
    words = lines[-2].split()
    assert words[:3] == ["chosen:", f"{chosen},", "predicted"] and words[-1] == other
    # One decimal is printed of the factor, three of each time.
    assert float(words[3]) == pytest.approx(milliseconds[other] / milliseconds[chosen], abs=0.06)
