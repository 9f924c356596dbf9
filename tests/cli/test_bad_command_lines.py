"""Command lines that cannot work, of every command: exit code 2, at most six lines, no traceback, and nothing is written.

More of `train` alone are in test_train.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ..commands import TINY

# name: (arguments, what the message must contain). `run` is a finished run, `damaged` one without a whole checkpoint.
BAD: dict[str, tuple[list[str], str]] = {
    # options and commands
    "no such command": (["trian"], "No such command"),
    "an option of another command": (["train", "--steps", "3"], "No such option"),
    "a misspelt option": (["train", "--batchsize", "3"], "--batch-size"),
    "an option without its value": (["train", "--epochs"], "requires an argument"),
    "an argument too many": (["train", "digits"], "unexpected extra argument"),
    "a float for an integer": (["train", "--epochs", "1.5"], "not a valid integer"),
    "an integer beyond 64 bits": (["train", "--seed", str(2**63)], "64 bits"),
    "a negative seed": (["train", "--seed", "-1"], "training.seed"),
    "an option of evaluate": (["evaluate", "run", "--epochs", "3"], "No such option"),
    "info with an argument": (["info", "cuda"], "unexpected extra argument"),
    # settings
    "a setting of another section": (["train", "--set", "training.lr=1"], "did you mean"),
    "a setting that is replaced": (["train", "--set", "training.amp=true"], "precision"),
    "not a truth value": (["train", "--set", "training.compile=perhaps"], "true or false"),
    "nan": (["train", "--set", "optimizer.lr=nan"], "optimizer.lr"),
    "infinity": (["train", "--set", "loss.beta=inf"], "loss.beta"),
    "beyond float32": (["train", "--set", "optimizer.weight_decay=1e300"], "at most"),
    "a temperature of zero": (["train", "--set", "loss.epsilon=1e-320"], "loss.epsilon"),
    "a decay of one": (["train", "--set", "optimizer.ema_decay=1"], "[0, 1)"),
    "too many workers": (["train", "--set", "data.workers=100000"], "data.workers"),
    "more workers than cores": (["train", "--set", "data.workers=1000"], "cores"),
    "an enormous view": (["train", "--set", "data.size=100000"], "data.size"),
    "no epoch count": (["train", "--epochs", str(10**12)], "training.epochs"),
    # settings that do not go together
    "a kernel of another device": (["train", "--device", "cpu", "--set", "loss.implementation=trition"], "'triton'"),
    "a plan that the reference lacks": (
        ["train", "--set", "loss.implementation=reference", "--set", "loss.plan=streaming"],
        "loss.plan=auto",
    ),
    "a budget that is too small": (
        ["train", "--set", "loss.memory_budget=1", "--num-codes", "65536"],
        "loss.memory_budget=1",
    ),
    "a stored plan beyond its budget": (
        ["train", "--set", "loss.plan=stored", "--set", "loss.memory_budget=1", "--num-codes", "65536"],
        "loss.memory_budget=1",
    ),
    "a dictionary beyond the memory": (["train", "--num-codes", "90000000", "--embedding-dim", "1000000"], "GiB"),
    "a network beyond the memory": (["train", "--set", "model.width=100000"], "GiB"),
    "a stem of another network": (["train", "--set", "model.stem=imagenet", "--set", "model.name=resnet8"], "stem"),
    "accumulation that does not divide": (["train", "--accumulate", "7"], "multiple of 7"),
    "a graph without a GPU": (["train", "--device", "cpu", "--cuda-graph"], "--cuda-graph"),
    "two processes on one device": (["train", "--strategy", "fsdp", "--device", "cpu"], "torchrun"),
    "fp16 of bfloat16": (
        ["train", "--precision", "fp16", "--strategy", "fsdp", "--set", "fsdp.param_dtype=bfloat16"],
        "conflict",
    ),
    "DALI for affine maps": (["train", "--loader", "dali"], "resident"),
    "a GPU that is not there": (["train", "--device", "cuda:31"], "does not exist"),
    "a device of no kind": (["train", "--device", "cuda:99999999999999999999"], "device"),
    # recipes and data
    "a recipe's name misspelt": (["train", "--recipe", "cifar-10"], "did you mean 'cifar10'"),
    "a path for a recipe": (["train", "--recipe", "./digits.toml"], "recipe"),
    "an archive": (["train", "--data", "occupied/file.txt"], "not a folder"),
    "a run for images": (["train", "--data", "run/checkpoints"], "no image"),
    "images that are none": (["train", "--data", "unreadable"], "can be read"),
    "fewer images than a batch": (["train", "--data", "images", "--batch-size", "4096"], "4096"),
    "a path that is too long": (["train", "--data", "x" * 5000], "name too long"),
    # run directories
    "a run directory in use": (["train", *TINY, "--run-dir", "run"], "not empty"),
    "a run directory below a file": (["train", *TINY, "--run-dir", "occupied/file.txt/run"], "cannot be written"),
    "a run directory that is read-only": (["train", *TINY, "--run-dir", "/sys/run"], "cannot be written"),
    "a run directory of a name too long": (["train", *TINY, "--run-dir", "x" * 5000], "name too long"),
    # resuming
    "resume and continue": (["train", "--resume", "run", "--continue", "--run-dir", "run"], "drop --resume"),
    "resume elsewhere": (["train", "--resume", "run", "--run-dir", "other"], "--run-dir cannot change"),
    "resume a checkpoint": (["train", "--resume", "run/checkpoints"], "config.toml"),
    "resume a file": (["train", "--resume", "run/config.toml"], "not a directory"),
    "resume a name that is too long": (["train", "--resume", "x" * 5000], "name too long"),
    "resume what is damaged": (["train", "--resume", "damaged"], "is damaged"),
    "continue what is damaged": (["train", *TINY, "--continue", "--run-dir", "damaged"], "is damaged"),
    "resume nothing in particular": (["train", "--resume", "auto", "--recipe", "cifar10"], "holds no run of recipe"),
    "resume with another rate": (
        ["train", "--resume", "run", "--set", "optimizer.lr=0.5"],
        "--allow-change optimizer.lr",
    ),
    "resume with another batch": (["train", "--resume", "run", "--batch-size", "32"], "--init-from"),
    "resume with fewer epochs": (["train", "--resume", "run", "--epochs", "1"], "has done"),
    "continue with another seed": (["train", *TINY, "--seed", "9", "--continue", "--run-dir", "run"], "training.seed"),
    "allow nothing in particular": (["train", "--allow-change", "optimizer.lr"], "--resume"),
    "allow what does not exist": (["train", "--resume", "run", "--allow-change", "lr"], "unknown setting"),
    "allow what cannot change": (["train", "--resume", "run", "--allow-change", "training.seed"], "--init-from"),
    "begin from nothing": (["train", *TINY, "--init-from", "nowhere"], "no such run directory"),
    "begin from another model": (["train", *TINY, "--set", "model.width=8", "--init-from", "run"], "does not fit"),
    "begin from what is damaged": (["train", *TINY, "--init-from", "damaged"], "is damaged"),
    # evaluate
    "evaluate nothing": (["evaluate"], "Missing argument"),
    "evaluate what is not there": (["evaluate", "nowhere"], "no such run"),
    "evaluate a file": (["evaluate", "run/config.toml"], "not a directory"),
    "evaluate a folder": (["evaluate", "images"], "config.toml"),
    "evaluate what is damaged": (["evaluate", "damaged"], "is damaged"),
    "evaluate on nothing": (["evaluate", "run", "--data", "nowhere"], "no such path"),
    "evaluate on no images": (["evaluate", "run", "--data", "empty"], "no image"),
    "evaluate on no device": (["evaluate", "run", "--device", "tpu"], "device"),
    # plan and profile
    "plan for another GPU": (["plan", "--gpu", "h20"], "did you mean"),
    "plan without memory": (["plan", "--memory-budget", "0"], "at least 1"),
    "plan no batch": (["plan", "--batch-size", "0"], "at least 1"),
    "plan a recipe that is not there": (["plan", "--recipe", "imagenet"], "did you mean"),
    "profile no steps": (["profile", "--steps", "0"], "at least 1"),
    "profile into a folder": (["profile", "--trace", "empty"], "is a directory"),
    "predict a trace": (["profile", "--predict", "a100", "--trace", "t.json"], "--predict"),
    "predict another GPU": (["profile", "--predict", "v1000"], "v1000"),
    "GPUs without a prediction": (["profile", "--gpus", "2"], "--predict"),
    "profile too many workers": (["profile", "--set", "data.workers=100000"], "data.workers"),
    # data
    "verify nothing": (["data", "verify", "nowhere"], "no such path"),
    "verify a file": (["data", "verify", "occupied/file.txt"], "not a folder"),
    "verify no images": (["data", "verify", "empty"], "no image"),
    "pack into nowhere": (["data", "pack", "images"], "Missing argument"),
    "pack to no size": (["data", "pack", "images", "out", "--short-side", "0"], "--short-side"),
    "pack to no quality": (["data", "pack", "images", "out", "--quality", "101"], "--quality"),
    "preview as a JPEG": (["data", "preview", "-o", "views.jpg"], "png"),
    "preview into nowhere": (["data", "preview", "-o", "nowhere/views.png"], "No such file"),
    "preview of nothing": (["data", "preview", "nowhere", "-o", "views.png"], "no such path"),
    "preview of no recipe": (["data", "preview", "--recipe", "digit", "-o", "views.png"], "did you mean"),
    "preview of none": (["data", "preview", "--count", "0", "-o", "views.png"], "--count"),
}


@pytest.fixture
def place(finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with folders of every kind, and a whole and a damaged run."""
    root = tmp_path / "place"
    for name in ("empty", "occupied", "unreadable"):
        (root / name).mkdir(parents=True)
    (root / "occupied" / "file.txt").write_text("mine")
    (root / "unreadable" / "a.jpg").write_bytes(b"not an image")
    pixels = np.random.RandomState(0).randint(0, 256, (24, 24, 3)).astype(np.uint8)
    for label in ("dark", "light"):
        (root / "images" / label).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(pixels // (i + 1)).save(root / "images" / label / f"{i}.png")
    shutil.copytree(finished[0], root / "run")
    shutil.copytree(finished[0], root / "damaged", ignore=shutil.ignore_patterns("result.json"))
    for shard in (root / "damaged").rglob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-7])
    monkeypatch.chdir(root)
    return root


def contents(root: Path) -> dict[str, str]:
    """Every path below `root`, with a hash of what it holds."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(root.rglob("*"))
    }


def check(code: int, out: str, err: str, expected: str) -> None:
    assert code == 2, (code, out, err)
    assert expected in err, err
    assert "Traceback" not in out + err
    assert len((out + err).strip().splitlines()) <= 6, (out, err)


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_and_nothing_is_written(name: str, place: Path, falcon_fast) -> None:
    arguments, expected = BAD[name]
    before = contents(place)
    check(*falcon_fast(*arguments), expected)
    assert contents(place) == before


def test_there_are_enough_of_them() -> None:
    assert len(BAD) >= 60
    commands = {tuple(arguments[: 2 if arguments[0] == "data" else 1]) for arguments, _ in BAD.values()}
    for command in ("train", "evaluate", "plan", "profile", "info"):
        assert (command,) in commands
    for command in ("verify", "pack", "preview"):
        assert ("data", command) in commands


AS_PROCESSES = ("a kernel of another device", "resume what is damaged", "evaluate nothing", "too many workers")


@pytest.mark.slow
@pytest.mark.parametrize("name", AS_PROCESSES)
def test_the_same_as_a_process_of_its_own(name: str, place: Path) -> None:
    arguments, expected = BAD[name]
    before = contents(place)
    done = subprocess.run([sys.executable, "-m", "falcon_fast", *arguments], capture_output=True, text=True)
    check(done.returncode, done.stdout, done.stderr, expected)
    assert contents(place) == before


NOBODY = """
import pwd
def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown
from falcon_fast.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["info"], 0),
        (["train", *TINY, "--data", "images", "--set", "model.name=resnet8", "--batch-size", "4", "--epochs", "1"], 0),
        (["data", "verify", "images"], 2),
    ],
    ids=["info", "train", "verify"],
)
def test_a_user_without_home_and_without_a_name(arguments: list[str], code: int, place: Path) -> None:
    """As in a container that is started with any user's number. `verify` has no place for what it finds, and says so."""
    hidden = ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME", "USERNAME", "LNAME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", NOBODY, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == code and "Traceback" not in done.stderr, (done.stdout, done.stderr)
    if code:
        assert "XDG_CACHE_HOME" in done.stderr
    elif arguments[0] == "train":
        (run,) = Path("runs").iterdir()
        assert json.loads((run / "result.json").read_text())["trained"]["probe"] >= 0
