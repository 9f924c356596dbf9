"""The house: imports point one way, nothing imports in a circle, and the tests mirror the package."""

from __future__ import annotations

import ast
import itertools
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"

# What each room may import, besides itself. `__init__` holds the public names; `__main__` is the command.
BASE = {"config", "errors", "files", "reading"}
ROOMS: dict[str, set[str]] = {
    "kernels": set(),
    "errors": set(),
    "files": {"errors"},
    "reading": set(),
    "recipes": set(),
    "objective": {"kernels"},
    "config": {"errors", "reading", "kernels", "objective"},
    "hardware": {*BASE, "kernels"},
    "data": {*BASE, "kernels", "hardware"},
    "models": {*BASE, "kernels", "objective"},
    "evaluation": {*BASE, "data", "models", "objective", "hardware"},
    "training": {*BASE, "kernels", "objective", "hardware", "data", "models", "evaluation"},
    "profiling": {*BASE, "kernels", "objective", "hardware", "data", "models", "training"},
    "runs": {*BASE, "kernels", "objective", "hardware", "data", "models", "evaluation", "training"},
    "cli": {
        "",
        *BASE,
        "kernels",
        "objective",
        "hardware",
        "data",
        "models",
        "evaluation",
        "training",
        "profiling",
        "runs",
    },
    "": {"objective", "cli"},
}
# The same inside the rooms that have rooms of their own. Files of the outer room may import all of these.
INNER: dict[str, set[str]] = {
    "data.sources.layout": set(),
    "data.sources": {"data.sources.layout"},
    "data.views": {"data.sources"},
    "data.loaders": {"data.sources", "data.views"},
    "training.distributed": set(),
    "training.checkpoints": {"training.distributed"},
    "kernels.cpu": set(),
    "kernels.gpu": set(),
    "kernels.gpu.loss": set(),
    "kernels.gpu.projector": set(),
    "kernels.gpu.views": set(),
}


def module_of(path: Path) -> str:
    """The dotted name of a source file below the package: `kernels.gpu.launch`, or "" for the package itself."""
    relative = path.relative_to(ROOT if path.is_relative_to(ROOT / "kernels") else ROOT / "falcon_fast")
    return ".".join(relative.with_suffix("").parts).removesuffix("__init__").removesuffix(".")


@cache
def sources() -> dict[str, Path]:
    """Every Python file of the package by its dotted name below it."""
    package = [path for path in (ROOT / "falcon_fast").rglob("*.py") if "kernels" not in path.parts]
    return {module_of(path): path for path in (*package, *(ROOT / "kernels").rglob("*.py"))}


@cache
def imports() -> dict[str, set[str]]:
    """For each module, the modules of the package that it imports anywhere, functions and type checking included."""
    found: dict[str, set[str]] = {}
    for name, path in sources().items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} imports relatively"
                targets |= {f"{node.module}.{alias.name}" for alias in node.names}
        below = {target.partition(".")[2] for target in targets if target.partition(".")[0] == "falcon_fast"}
        found[name] = {target if target in sources() else target.rpartition(".")[0] for target in below}
    return found


def room_of(module: str) -> str:
    return "" if module == "__main__" else module.partition(".")[0]


def inner_room_of(module: str) -> str:
    """The deepest of `INNER` that holds the module, or its outer room."""
    holding = [room for room in INNER if module == room or module.startswith(f"{room}.")]
    return max(holding, key=len, default=room_of(module))


def test_the_reader_of_imports_sees_them() -> None:
    assert "kernels.gpu.launch" in imports()["kernels.gpu.loss.loss"]
    assert "objective.loss" in imports()["objective"] and "objective" in imports()[""]
    assert any(module.startswith("evaluation.") for module in imports()["training.session"])


@pytest.mark.parametrize("room", sorted({room_of(module) for module in sources()}))
def test_imports_point_one_way(room: str) -> None:
    upwards = {
        f"{module} imports {target}"
        for module, targets in imports().items()
        for target in targets
        if room_of(module) == room and room_of(target) not in ROOMS[room] | {room}
    }
    assert not upwards


def test_rooms_inside_rooms_point_one_way_too() -> None:
    upwards = {
        f"{module} imports {target}"
        for module, targets in imports().items()
        for target in targets
        if (room := inner_room_of(module)) in INNER
        and room_of(target) == room_of(module)
        and (inner := inner_room_of(target)) not in INNER[room] | {room}
        and not room.startswith(f"{inner}.")  # what lies beside an inner room serves it
    }
    assert not {line for line in upwards if not line.startswith("kernels.gpu.resources ")}


def test_nothing_imports_in_a_circle() -> None:
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as circle:
        pytest.fail(f"a circle of imports: {' -> '.join(circle.args[1])}")


# Modules without a test file of their own name, and the tests that cover them. A phase of the loss has no result that anyone
# could check without the others: its tests are those of the whole loss, where wrong versions of each phase must be found out.
PHASES = ("embeddings", "expand", "logits", "rows", "finish", "gradient", "hadamard", "operator", "tuning")
COVERED: dict[str, str] = {
    "models.normalization": "models/test_batchnorm.py",
    "data.loaders.batch": "data/loaders/test_workers.py",
    "kernels.cpu.fallback": "kernels/cpu/test_loss.py",
    "kernels.cpu.sweeps": "kernels/cpu/test_loss.py",
    "kernels.gpu.tiles": "kernels/gpu/loss/test_loss.py",
    "kernels.gpu.loss.cost": "objective/test_planner.py",
    **{f"kernels.gpu.loss.{phase}": "kernels/gpu/loss/test_loss.py" for phase in PHASES},
    "kernels.gpu.projector.batchnorm": "kernels/gpu/projector/test_projector.py",
    "kernels.gpu.projector.operator": "kernels/gpu/projector/test_projector.py",
}


def test_tests_mirror_the_package() -> None:
    missing = []
    for module, path in sources().items():
        if path.name in ("__init__.py", "__main__.py"):
            continue
        *folders, name = module.split(".")
        if not TESTS.joinpath(*folders, f"test_{name}.py").exists() and module not in COVERED:
            missing.append(module)
    assert not missing


def test_what_is_covered_elsewhere_is() -> None:
    for module, test in COVERED.items():
        *folders, name = module.split(".")
        assert module in sources() and (TESTS / test).is_file(), f"{module}: {test}"
        assert not TESTS.joinpath(*folders, f"test_{name}.py").exists(), f"{module} has a test of its own name"


def test_every_test_file_names_a_module_or_a_topic() -> None:
    """A test file has the name of a module in its room; others are listed here with their topic."""
    topics: dict[str, str] = {
        "test_structure.py": "this file",
        "test_package.py": "importing the package is light",
        "runs/test_every_setting.py": "every value of every setting runs or is refused in one line",
        "cli/test_bad_command_lines.py": "what cannot work, of every command",
        "objective/test_adversarial.py": "embeddings that nobody should pass",
        "objective/test_situations.py": "every situation that a caller of the loss can bring",
        "test_security.py": "no command and no module reaches an unpickler; each promise of SECURITY.md names its test",
        "runs/test_restart.py": "runs that are killed and continued, by one process and by several",
        "data/loaders/test_agreement.py": "every loader on files of every kind, good and bad",
        "runs/test_stops.py": "stops at any moment, in every way",
        "runs/test_full_disk.py": "a disk that takes no more at any write",
        "data/loaders/test_runs.py": "whole runs whose loaders differ or find bad files",
    }
    known = {
        Path(*folders, f"test_{name}.py").as_posix()
        for *folders, name in (module.split(".") for module in sources() if module)
    }
    found = {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    strangers = {
        path
        for path in found - known - set(topics)
        if path.split("/")[0] not in ("benchmarks", "docs", "examples", "faults")
    }
    assert not strangers
    assert not set(topics) - found


def test_rooms_stay_small() -> None:
    """A folder that a reader must take in at once has at most 16 Python files in addition to its inner rooms."""
    folders = itertools.groupby(sorted(path.parent for path in sources().values()))
    assert not {str(folder): count for folder, files in folders if (count := len(list(files))) > 16}
