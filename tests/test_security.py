"""What SECURITY.md promises of the whole package: no unpickler, no call of code that a file names."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from .commands import TINY
from .test_structure import ROOT, sources

# Modules, functions and arguments that can run what a file says, or that trust the sizes that a file states.
MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "subprocess", "code",
    "runpy", "scipy.io", "h5py", "tarfile", "zipfile", "pandas", "torch.hub", "torch.package", "importlib.util",
}  # fmt: skip
FUNCTIONS = {
    "eval", "exec", "compile", "__import__", "import_module", "torch.load", "torch.jit.load", "torch.export.load",
    "np.load", "numpy.load", "np.loadtxt", "np.genfromtxt", "np.fromfile", "np.memmap", "os.system", "os.popen",
    "os.execv", "os.spawnv", "loadmat", "all_gather_object", "broadcast_object_list", "gather_object", "send_object_list",
    "recv_object_list", "scatter_object_list", "json.load", "json.loads", "tomllib.load", "tomllib.loads",
}  # fmt: skip
ARGUMENTS = {"allow_pickle", "weights_only", "shell"}

# Where they are used all the same, and why nothing from elsewhere gets there.
JUSTIFIED = {
    (
        "kernels.cpu.extension",
        "import_module",
    ): "loads the compiled module of this package, by a name that is written there",
    ("kernels.gpu.resources", "subprocess"): "starts the CUDA tools that list a compiled kernel, with fixed arguments",
    ("kernels.gpu.support", "importlib.util"): "asks whether triton is installed",
    ("training.distributed.processes", "all_gather_object"): "objects of this run, between the processes of this run",
    ("config.toml", "tomllib.loads"): "the recipes of the package",
    ("models.exported", "json.loads"): "a value of at most 1,000 characters, of which three numbers are taken",
    ("data.sources.listing", "json.loads"): "lines of a run's list of files, of limited length and number",
    ("reading", "json.loads"): "behind the limits of this module",
    ("reading", "tomllib.loads"): "behind the limits of this module",
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def uses(tree: ast.AST) -> Iterator[str]:
    """Which of the names above a module imports, calls, or passes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = node.module if isinstance(node, ast.ImportFrom) and node.module else ""
            for name in [module, *names, *(f"{module}.{name}" for name in names)]:
                yield from {part for part in MODULES if name == part or name.startswith(f"{part}.")}
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            yield from {f for f in FUNCTIONS if name == f or (name.endswith(f".{f}") and f not in BUILTINS)}
            yield from {
                argument.arg for argument in node.keywords if argument.arg in ARGUMENTS and not false(argument.value)
            }


BUILTINS = {"eval", "exec", "compile", "__import__"}  # methods of these names (network.eval, torch.compile) are others


def false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_the_reader_of_uses_sees_them() -> None:
    text = """
import pickle as p, torch
from scipy.io import loadmat
from torch import hub
x = torch.load(f, weights_only=True)
y = np.load(f, allow_pickle=True)
eval("1"); network.eval(); torch.compile(f); np.load(f, allow_pickle=False)
"""
    found = set(uses(ast.parse(text)))
    assert found == {"pickle", "scipy.io", "torch.hub", "torch.load", "weights_only", "np.load", "allow_pickle", "eval"}


def test_no_module_reads_what_could_run_code() -> None:
    found = {
        (name, use) for name, path in sources().items() for use in uses(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found - JUSTIFIED.keys() == set()
    assert JUSTIFIED.keys() - found == set(), "this needs no justification any more"


class Payload:
    """What an unpickler would run: it makes a directory."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.canary),)


# Runs commands with an audit hook that ends the process as soon as an unpickler looks up a name, wherever that is. (Torch and
# scikit-learn unpickle nothing either, once they are imported.)
WATCHED = """
import json, os, sys, traceback
import sklearn, torch, torch.utils.tensorboard, torch.distributed.checkpoint, falcon_fast.runs, falcon_fast.cli.main as cli
seen = []
HARMLESS = ("lscpu", "fc-list")  # joblib counts cores, matplotlib lists fonts
def hook(event, arguments):
    if event in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "marshal.load"):
        if arguments[0] not in HARMLESS:
            seen.append((event, str(arguments)[:200], traceback.format_stack()[-6:]))
sys.addaudithook(hook)
codes = []
for command in json.loads(sys.argv[1]):
    sys.argv = ["falcon-fast", *command]
    try:
        cli.main()
        codes.append(0)
    except SystemExit as stop:
        codes.append(stop.code or 0)
falcon_fast.runs.load_trained(os.environ["RUN"], "cpu")
print("\\n" + json.dumps({"codes": codes, "seen": seen}))
"""


WHOLE = pytest.param(True, marks=pytest.mark.slow, id="whole")  # evaluates twice: 20 s


@pytest.mark.parametrize("whole", [pytest.param(False, id="reading"), WHOLE])
def test_no_command_reaches_an_unpickler(copied: Path, tmp_path: Path, image_folder: Path, whole: bool) -> None:
    """Pickles lie wherever a file of that name might be looked for; nothing looks."""
    canary = tmp_path / "owned"
    pickled, saved = pickle.dumps(Payload(canary)), tmp_path / "saved.pt"
    torch.save(Payload(canary), saved)
    checkpoints = sorted((copied / "checkpoints").glob("step-*"))
    for place in (copied, *checkpoints):
        for name in (".metadata", "__0_0.distcp", "model.pt", "state.pkl"):
            (place / name).write_bytes(pickled)
        shutil.copy(saved, place / "pytorch_model.bin")
    for name in ("result.json", "evaluation.json"):
        (copied / name).write_bytes(pickled)
    (copied / "quarantine.csv").write_text("image,file,reason\n")
    for number, data in enumerate((pickled, saved.read_bytes())):
        (image_folder / "dark" / f"evil-{number}.png").write_bytes(data)
    np.save(image_folder / "dark" / "evil.npy", np.array([Payload(canary)], object), allow_pickle=True)
    earlier = tmp_path / "earlier"
    shutil.copytree(copied, earlier)
    shutil.rmtree(checkpoints[-1])  # so that a resumed run has something to do
    for path in (earlier / "checkpoints").glob("step-*"):  # of the format that was pickled
        (path / "index.json").unlink()
    commands = {
        ("evaluate", copied): 0,
        ("train", "--resume", copied): 0,
        ("train", "--continue", "--run-dir", copied, *TINY): 0,
        ("evaluate", earlier): 2,
        ("train", "--resume", earlier): 2,
        ("data", "verify", image_folder): 1,
    }
    if not whole:
        commands = {command: code for command, code in commands.items() if code}
    texts = [[str(word) for word in command] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(texts)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env=os.environ | {"RUN": str(copied)},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["seen"] == []
    assert result["codes"] == list(commands.values()), done.stderr
    assert "can run code when it is read, so it is not read" in done.stderr
    assert not canary.exists()
    pickle.loads(pickled)  # the payload works
    assert canary.exists()


def test_the_hook_sees_an_unpickler(tmp_path: Path) -> None:
    text = WATCHED.partition("codes = []")[0] + "import pickle\npickle.loads(pickle.dumps(os.getcwd))\nprint(len(seen))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split() == ["1"]


SECURITY = ROOT / "SECURITY.md"
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def test_each_promise_names_a_test_that_exists() -> None:
    named = NAMED_TEST.findall(SECURITY.read_text(encoding="utf-8"))
    assert len(named) >= 15
    for path, test in named:
        assert (ROOT / path).is_file(), path
        assert f"def {test or 'test_'}" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{test}"
    promises = SECURITY.read_text(encoding="utf-8").partition("## What is promised")[2].partition("\n## ")[0]
    for line in re.findall(r"^- .*(?:\n  .*)*", promises, re.MULTILINE):
        assert NAMED_TEST.search(line), f"no test holds this promise: {line}"


LIMIT = re.compile(r"^\| `(falcon_fast(?:\.\w+)+)\.(\w+)` \| ([\d,]+) \|", re.MULTILINE)


def test_the_limits_are_those_of_the_code() -> None:
    limits = LIMIT.findall(SECURITY.read_text(encoding="utf-8"))
    assert len(limits) >= 14
    for module, name, value in limits:
        assert getattr(import_module(module), name) == int(value.replace(",", "")), f"{module}.{name}"
