"""`pytest` runs the tests. `pytest --benchmark` runs the benchmarks instead, which takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("falcon_fast")
    group.addoption(
        "--benchmark", action="store_true", help="run benchmarks/ and print its tables, instead of the tests"
    )
    group.addoption(
        "--benchmark-write", action="store_true", help="with --benchmark: also write the tables to benchmarks/results/"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--benchmark")
    for item in items:
        if (BENCHMARKS in item.path.parents) != wanted:
            reason = "a test: run without --benchmark" if wanted else "a benchmark: run with --benchmark"
            item.add_marker(pytest.mark.skip(reason=reason))
