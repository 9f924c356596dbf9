"""Tests that can fail: every fault of `faults.py`, put into a copy of the package, turns its test red.

`pytest -m slow -n 2 tests/faults` runs them, in a few minutes on two cores. The working tree is never changed.
"""

from __future__ import annotations

import ast
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from falcon_fast.kernels import cpu_extension

from .faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]

# Python imports a module of this name when it starts, also in processes that a test starts. An editable installation finds the
# package by a finder of its own, which is asked before PYTHONPATH: this one is asked before that.
SITECUSTOMIZE = """
import sys
from importlib.machinery import PathFinder
from pathlib import Path

class Copy:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "falcon_fast":
            return PathFinder.find_spec(name, [str(Path(__file__).parent)])
        return PathFinder.find_spec(name, path) if name.startswith("falcon_fast.") else None

sys.meta_path.insert(0, Copy)
"""


def test_every_name_is_given_once():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_list_is_not_out_of_date(fault: Fault):
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.right) == 1, f"{fault.file}: {fault.right!r}"
    ast.parse(text.replace(fault.right, fault.wrong))
    file, name = fault.test.split("::")
    functions = [node.name for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if _is_function(node)]
    assert functions.count(name) == 1, fault.test


def _is_function(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef)


def copied(folder: Path) -> Path:
    """Copy the package to `folder`, the compiled extension included. Returns `folder`."""
    package = folder / "falcon_fast"
    unwanted = shutil.ignore_patterns("__pycache__", "*.cpp", "*.hpp")
    shutil.copytree(
        ROOT / "falcon_fast", package, ignore=lambda at, names: {*unwanted(at, names), "kernels"} & {*names}
    )
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=unwanted)
    if cpu_extension is not None:
        shutil.copy(cpu_extension.__file__, package / "kernels")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return folder


def with_fault(unchanged: Path, folder: Path, fault: Fault) -> Path:
    """Copy the copy `unchanged` to `folder`, with a fault. Returns `folder`."""
    shutil.copytree(unchanged, folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / (f"falcon_fast/{fault.file}" if fault.file.startswith("kernels/") else fault.file)
    path.write_text(path.read_text(encoding="utf-8").replace(fault.right, fault.wrong), encoding="utf-8")
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the package in `folder` as falcon_fast."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def run_tests(folder: Path, tests: Iterable[str]) -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *tests)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package without a fault."""
    return copied(tmp_path_factory.mktemp("unchanged"))


@pytest.fixture(scope="module")
def without_fault(unchanged: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run all tests of the list that are in a file on the unchanged copy, once for each file."""

    @functools.cache
    def run(file: str) -> subprocess.CompletedProcess[str]:
        return run_tests(unchanged, sorted({fault.test for fault in FAULTS if fault.test.startswith(f"{file}::")}))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_found(fault: Fault, unchanged: Path, without_fault, tmp_path: Path):
    healthy = without_fault(fault.test.split("::")[0])
    assert healthy.returncode == 0 and "skipped" not in last_line(healthy), healthy.stdout + healthy.stderr
    faulty = run_tests(with_fault(unchanged, tmp_path / "faulty", fault), [fault.test])
    # 1: tests ran and failed; an error at collection or in a fixture is no test that found something.
    assert faulty.returncode == 1 and " failed" in last_line(faulty), (
        f"{fault.test} does not find this fault: {fault.why}\n{faulty.stdout}{faulty.stderr}"
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stdout.strip().splitlines() or [""])[-1]


@pytest.mark.slow
def test_the_copy_is_what_is_imported(tmp_path: Path):
    done = python(copied(tmp_path), "-c", CHECK)
    assert done.stdout.split() == [str(tmp_path)] * 3 + [str(cpu_extension is not None)], done.stderr


CHECK = """
import falcon_fast, falcon_fast.kernels, falcon_fast.objective.reference as reference
from pathlib import Path
for module, levels in ((falcon_fast, 2), (falcon_fast.kernels, 3), (reference, 3)):
    print(Path(module.__file__).parents[levels - 1])
print(falcon_fast.kernels.cpu_extension is not None)
"""
