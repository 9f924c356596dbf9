"""The command line from outside: what it leaves, what it prints, what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from falcon_fast import config, runs
from falcon_fast.cli import main as cli
from falcon_fast.runs import directory as run_directory
from falcon_fast.training import trainer

from ..runs.test_lock import another_run

TINY = ["--set", "model.width=4", "--embedding-dim", "32", "--num-codes", "64", "--epochs", "2", "--no-amp"]


@pytest.fixture
def falcon_fast(monkeypatch, capsys):
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["falcon-fast", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return int(code), out.out, out.err  # type: ignore[call-overload]

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole tiny run on the digits: its directory and what it printed."""
    directory = tmp_path_factory.mktemp("runs") / "digits"
    command = [sys.executable, "-m", "falcon_fast", "train", *TINY, "--run-dir", str(directory)]
    # Outside the repository, where the installed package and not the clone is imported.
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


def test_a_run_leaves_what_it_promises(finished):
    directory, _ = finished
    names = {p.name for p in directory.iterdir()}
    logs = {"metrics.csv", "tensorboard", "curves.png"}
    assert names == {"config.toml", "checkpoints", "result.json", "backbone.safetensors"} | logs
    result = json.loads((directory / "result.json").read_text())
    for key in ("raw_pixels", "random_init", "trained"):
        assert all(0 <= result[key][name] <= 1 for name in ("probe", "knn", "nmi_kmeans"))
    assert 0 <= result["trained"]["nmi_codes"] <= 1 and 1 <= result["trained"]["codes_used"] <= 64
    checks = result["trained"]["collapse"]
    assert list(checks) == ["representation", "dimensional", "cluster", "intracluster"]
    assert all({"value", "threshold", "ok"} <= set(check) for check in checks.values())
    assert result["seconds"] > 0 and result["images_per_second"] > 0
    # Raw pixels of the digits are a known quantity: far above chance, whatever the training did.
    assert result["raw_pixels"]["probe"] > 0.95 and result["raw_pixels"]["knn"] > 0.95
    header = next(csv.reader((directory / "metrics.csv").open()))
    assert header[:8] == ["step", "epoch", "loss", "prior", "invariance", "codes_used", "lr", "probe_accuracy"]


def test_a_run_prints_tables_and_verdicts(finished):
    _, out = finished
    for piece in (
        "raw pixels",
        "random weights",
        "trained by FALCON",
        "probe",
        "kNN",
        "verdict",
        "images/s",
        "run directory",
    ):
        assert piece in out
    assert "\x1b" not in out  # not a terminal


def test_the_resolved_configuration_loads_again(finished):
    directory, _ = finished
    loaded = config.load_config(directory / "config.toml")
    assert loaded.model.width == 4 and loaded.data.size == 16 and loaded.loss.num_codes == 64
    assert tomllib.loads((directory / "config.toml").read_text())["recipe"] == "digits"


def test_the_backbone_is_the_trained_one(finished):
    directory, _ = finished
    trained = runs.load_trained(directory, "cpu")
    weights = load_file(directory / "backbone.safetensors")
    state = trained.network.backbone.state_dict()
    assert weights.keys() == state.keys() and all(torch.equal(weights[k], state[k]) for k in state)
    with safe_open(directory / "backbone.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "resnet8" and metadata["image_size"] == "16"
    assert json.loads(metadata["mean"]) == list(trained.mean) and json.loads(metadata["std"]) == list(trained.std)


def test_evaluate_reproduces_the_result(finished, falcon_fast):
    directory, _ = finished
    code, out, err = falcon_fast("evaluate", directory, "--device", "cpu")
    assert code == 0, err
    assert "verdict" in out
    again = json.loads((directory / "evaluation.json").read_text())
    result = json.loads((directory / "result.json").read_text())
    assert again["raw_pixels"] == result["raw_pixels"]
    for name in ("probe", "knn", "nmi_codes"):
        assert again["trained"][name] == pytest.approx(result["trained"][name], abs=0.01)
    assert again["trained"]["codes_used"] == result["trained"]["codes_used"]


def test_other_images_are_seen_as_the_run_saw_its_own(finished, image_folder, falcon_fast, monkeypatch):
    from falcon_fast.evaluation import protocol

    sources = []
    extract = protocol.extract_features
    monkeypatch.setattr(protocol, "extract_features", lambda *a: sources.append(a[2]) or extract(*a))
    code, out, err = falcon_fast("evaluate", finished[0], "--data", image_folder)
    assert code == 0, err
    assert "held out" in out
    trained = runs.load_trained(finished[0], "cpu")
    assert {(source.size, source.mean, source.std) for source in sources} == {(16, trained.mean, trained.std)}


def test_ones_own_images(image_folder, tmp_path, falcon_fast):
    arguments = [
        "--data",
        image_folder,
        "--batch-size",
        "8",
        *TINY,
        "--set",
        "model.name=resnet8",
        "--set",
        "data.workers=0",
    ]
    code, out, err = falcon_fast("train", *arguments, "--run-dir", tmp_path / "run")
    assert code == 0, err
    assert "36 images to train on, 4 to test on, 20 px" in out and "held out" in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["trained"]["collapse"]["representation"]["value"] is None  # 4 images: too few, and that is said
    code, _, err = falcon_fast("evaluate", tmp_path / "run", "--data", image_folder)
    assert code == 0, err


def test_unlabelled_images(image_folder, tmp_path, falcon_fast):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(image_folder.rglob("*.png"))):
        path.rename(flat / f"{i}.png")
    arguments = ["--data", flat, "--batch-size", "8", *TINY, "--set", "model.name=resnet8", "--set", "data.workers=0"]
    code, out, err = falcon_fast("train", *arguments, "--run-dir", tmp_path / "run")
    assert code == 0, err
    assert "raw pixels" not in out and "verdict" in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["trained"]["probe"] is None and result["raw_pixels"]["knn"] is None
    metrics = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert metrics and not any(row["probe_accuracy"] for row in metrics)


def test_zero_epochs_evaluate_the_untrained_network(tmp_path, falcon_fast):
    code, _, err = falcon_fast("train", *TINY, "--epochs", "0", "--run-dir", tmp_path / "run")
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["trained"]["probe"] == result["random_init"]["probe"]
    runs.load_trained(tmp_path / "run", "cpu")


def test_info(falcon_fast):
    code, out, _ = falcon_fast("info")
    assert code == 0
    for piece in (torch.__version__.partition("+")[0], "reference", "C++ kernels", "cifar10-resnet8"):
        assert piece in out


def test_help_names_every_option(falcon_fast):
    code, out, _ = falcon_fast("train", "--help")
    assert code == 0
    for option in ("--recipe", "--data", "--epochs", "--batch-size", "--amp / --no-amp", "--precision",
                   "--accumulate", "--optimizer", "--codes", "--num-codes", "--embedding-dim", "--temperature-batch",
                   "--run-dir", "--resume", "--continue", "--seed", "--device", "--set"):  # fmt: skip
        assert option in out


BAD = {
    "missing path": (["--data", "nowhere"], "no such path"),
    "a file": (["--data", "occupied/file.txt"], "not a folder"),
    "empty folder": (["--data", "empty"], "no image"),
    "no readable image": (["--data", "unreadable"], "can be read"),
    "recipe": (["--recipe", "cifar11"], "did you mean 'cifar10'"),
    "recipe without data": (["--recipe", "cifar10"], "--data PATH"),
    "data for the digits": (["--recipe", "digits", "--data", "empty"], "--recipe folder"),
    "backbone": (["--set", "model.name=resnet81"], "did you mean 'resnet8'"),
    "setting": (["--set", "loss.epsilom=1e-8"], "did you mean 'loss.epsilon'"),
    "section": (["--set", "lose.beta=1"], "did you mean 'loss.beta'"),
    "no value": (["--set", "loss.beta"], "section.key=value"),
    "wrong type": (["--set", "loss.beta=much"], "must be a number"),
    "precision": (["--precision", "fp8"], "did you mean 'fp16'"),
    "two precisions": (["--amp", "--precision", "fp16"], "--amp and --precision fp16 conflict: drop one"),
    "no precision": (["--no-amp", "--precision", "bf16"], "--no-amp and --precision bf16 conflict: drop one"),
    "micro-batches": (["--accumulate", "3"], "make it a multiple of 3"),
    "wrong type of option": (["--epochs", "many"], "not a valid integer"),
    "c": (["--num-codes", "1"], "at least 2 codes"),
    "f": (["--embedding-dim", "0"], "at least 1"),
    "epsilon": (["--set", "loss.epsilon=0.01"], "below 1"),
    "batch of one": (["--batch-size", "1"], "BatchNorm"),
    "batch beyond the data": (["--batch-size", "5000"], "5000"),
    "epochs": (["--epochs", "-1"], "at least 0"),
    "hadamard": (["--codes", "hadamard", "--embedding-dim", "96"], "power of two"),
    "codes": (["--codes", "gold"], "hadamard, rademacher"),
    "augmentation": (["--set", "data.augmentation=digit"], "did you mean"),
    "resume nothing": (["--resume", "nowhere"], "no such run"),
    "resume no run": (["--resume", "empty"], "config.toml"),
    "resume with changes": (["--resume", "empty", "--epochs", "3"], "cannot change"),
    "continue what": (["--continue"], "--continue needs --run-dir"),
    "continue no run": (["--continue", "--run-dir", "occupied"], "something other than a run"),
    "occupied run directory": (["--run-dir", "occupied"], "not empty"),
    "run directory is a file": (["--run-dir", "occupied/file.txt"], "not empty"),
    "unwritable run directory": (["--run-dir", "/proc/run"], "cannot be written"),
    "device": (["--device", "cuda:99"], "not there"),
    "unknown device": (["--device", "quantum"], "unknown device"),
    "strategy": (["--strategy", "dpp"], "did you mean 'ddp'"),
    "strategy without torchrun": (["--strategy", "ddp"], "torchrun --nproc-per-node"),
    "option": (["--epoch", "3"], "--epochs"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_and_writes_nothing(name, tmp_path, monkeypatch, falcon_fast):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "file.txt").write_text("mine")
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable" / "a.jpg").write_bytes(b"not an image")
    before = sorted(tmp_path.rglob("*"))
    arguments, expected = BAD[name]
    code, out, err = falcon_fast("train", *arguments)
    assert code == 2, (out, err)
    assert expected in err
    assert len((out + err).strip().splitlines()) <= 6 and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_incomplete_run_is_not_resumed(finished, tmp_path, falcon_fast):
    broken = tmp_path / "broken"
    (broken / "checkpoints" / "step-00000001").mkdir(parents=True)
    (broken / "config.toml").write_text((finished[0] / "config.toml").read_text())
    for command in (["train", "--resume", broken], ["evaluate", broken]):
        code, _, err = falcon_fast(*command)
        assert code == 2 and "no complete checkpoint" in err


def test_a_diverging_run_exits_with_one_line(tmp_path, falcon_fast):
    code, _, err = falcon_fast("train", *TINY, "--set", "optimizer.lr=1e30", "--run-dir", tmp_path / "run")
    assert code == 1
    assert "not finite at step" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "result.json").exists()


def test_resume_of_a_finished_run_only_evaluates(finished, tmp_path, falcon_fast):
    copied = tmp_path / "copy"
    shutil.copytree(finished[0], copied)
    code, _, err = falcon_fast("train", "--resume", copied)
    assert code == 0, err
    assert (copied / "metrics.csv").read_text() == (Path(finished[0]) / "metrics.csv").read_text()


def test_a_run_whose_config_still_holds_amp_is_evaluated_resumed_and_continued(finished, tmp_path, falcon_fast):
    """As run directories were written while `training.amp` was a setting beside `training.precision`."""
    old = tmp_path / "old"
    shutil.copytree(finished[0], old)
    text = (old / "config.toml").read_text()
    assert 'precision = "auto"' in text
    (old / "config.toml").write_text(text.replace('precision = "auto"', 'amp = false\nprecision = "auto"'))
    for command in (["evaluate", old], ["train", "--resume", old], ["train", *TINY, "--continue", "--run-dir", old]):
        code, _, err = falcon_fast(*command)
        assert code == 0, err
    code, _, err = falcon_fast("train", *TINY, "--precision", "bf16", "--continue", "--run-dir", old)
    assert code == 2 and "--no-amp and --precision bf16 conflict: drop one" in err
    code, _, err = falcon_fast("train", *TINY, "--amp", "--continue", "--run-dir", old)
    assert code == 2 and "training.precision is 'auto', not 'bf16'" in err


def test_continue_of_a_finished_run_says_so(finished, falcon_fast):
    before = {p: p.stat().st_mtime_ns for p in finished[0].rglob("*")}
    code, out, err = falcon_fast("train", *TINY, "--continue", "--run-dir", finished[0])
    assert code == 0 and "is finished" in out, err
    assert {p: p.stat().st_mtime_ns for p in finished[0].rglob("*")} == before


def test_continue_of_another_run_names_the_difference(finished, falcon_fast):
    for change, difference in (
        (["--seed", 3], "training.seed is 0, not 3"),
        (["--set", "optimizer.name=sgd"], "optimizer.name is 'adamw', not 'sgd'"),
        (["--recipe", "cifar10"], "recipe digits, not cifar10"),
    ):
        code, _, err = falcon_fast("train", *TINY, *change, "--continue", "--run-dir", finished[0])
        assert code == 2 and difference in err and len(err.strip().splitlines()) == 1


def test_continue_goes_on_or_starts_over(finished, tmp_path, falcon_fast):
    """A checkpoint but no result: it goes on. A configuration alone, of a run that died early: it starts over."""
    died = tmp_path / "died"
    shutil.copytree(finished[0], died)
    (died / "result.json").unlink()
    (died / ".result.json.77.partial").write_text("{")
    (died / "checkpoints" / ".step-00000099.host-77.partial").mkdir()
    code, out, err = falcon_fast("train", *TINY, "--continue", "--run-dir", died)
    assert code == 0 and "from step" in out, err
    assert (died / "metrics.csv").read_text() == (Path(finished[0]) / "metrics.csv").read_text()
    assert not list(died.rglob(".*.partial"))

    early = tmp_path / "early"
    (early / "checkpoints" / "step-00000001").mkdir(parents=True)  # not complete
    shutil.copy(finished[0] / "config.toml", early)
    (early / "metrics.csv").write_text("step\n1\n")
    code, out, err = falcon_fast("train", *TINY, "--continue", "--run-dir", early)
    assert code == 0 and "from step" not in out, err
    untimed = [
        [row.split(",")[:11] for row in (d / "metrics.csv").read_text().splitlines()] for d in (early, finished[0])
    ]
    assert untimed[0] == untimed[1]


def test_another_run_in_the_same_directory_is_refused(finished, tmp_path, falcon_fast):
    """However it is begun: with checkpoints to resume, with a configuration alone, with nothing yet."""
    begun, early, new = tmp_path / "begun", tmp_path / "early", tmp_path / "new"
    shutil.copytree(finished[0], begun)
    for directory in (early, new):
        directory.mkdir()
    shutil.copy(finished[0] / "config.toml", early)
    for directory, how in (
        (begun, ["--resume", begun]),
        (early, ["--resume", early]),
        (new, [*TINY, "--run-dir", new]),
    ):
        with another_run(directory):
            before = {p: p.stat().st_mtime_ns for p in directory.rglob("*")}
            code, _, err = falcon_fast("train", *how)
            assert code == 2 and f"trains in {directory}" in err and len(err.strip().splitlines()) == 1
            assert {p: p.stat().st_mtime_ns for p in directory.rglob("*")} == before


def test_continue_waits_for_the_run_before_it_and_takes_what_that_left(finished, tmp_path, falcon_fast):
    directory = tmp_path / "run"
    directory.mkdir()
    shutil.copy(finished[0] / "config.toml", directory)

    def ends():
        shutil.copy(finished[0] / "result.json", directory)
        process.stdin.close()

    with another_run(directory) as process:
        threading.Timer(0.5, ends).start()
        code, out, err = falcon_fast("train", *TINY, "--continue", "--run-dir", directory)
    assert code == 0 and "waiting" in out and "is finished" in out, err


def test_what_was_left_half_written_does_not_occupy_a_directory(tmp_path, monkeypatch, falcon_fast):
    """A full disk: one line, and when there is room again, the same command."""
    directory = tmp_path / "run"

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        code, _, err = falcon_fast("train", *TINY, "--epochs", 0, "--run-dir", directory)
        assert code == 2 and "cannot be written: No space left" in err
    assert not list(directory.iterdir())
    (directory / ".lock").touch()  # as after SIGKILL
    (directory / ".config.toml.partial").write_text("recipe =")
    code, _, err = falcon_fast("train", *TINY, "--epochs", 0, "--run-dir", directory)
    assert code == 0, err
    assert not list(directory.glob(".*"))


def test_stopped_without_a_checkpoint_is_said_as_such(tmp_path, monkeypatch, falcon_fast):
    """Two Ctrl-C before the first one is saved: there is nothing to resume."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", interrupted)
    code, out, _ = falcon_fast("train", *TINY, "--run-dir", tmp_path / "run")
    assert code == 130 and "stopped; no checkpoint had been written" in out and "--resume" not in out


def test_figures_are_shown_though_they_cannot_be_written(finished, monkeypatch, falcon_fast):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory, "write_json", full)
    code, out, err = falcon_fast("evaluate", finished[0])
    assert code == 1 and "trained by FALCON" in out and "No space left" in err


def test_importing_the_package_is_light():
    heavy = ["click", "rich", "nvidia.dali", "matplotlib", "sklearn", "scipy", "timm", "torchvision", "PIL", "triton"]
    code = (
        "import sys, torch, numpy; had = set(sys.modules); import falcon_fast; "
        f"print([m for m in {heavy} if m in set(sys.modules) - had])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "[]"


def test_plan_explains_the_loss_on_a_gpu_that_need_not_be_there(falcon_fast):
    code, out, _ = falcon_fast(
        "plan", "--gpu", "h200", "--batch-size", 1024, "--num-codes", 524288, "--memory-budget", 512
    )
    assert code == 0 and "chosen: streaming" in out and "524,288 rademacher codes on H200" in out
    assert "starts frozen" in falcon_fast("plan", "--embedding-dim", 128)[1]
    code, _, error = falcon_fast("plan", "--gpu", "h100x")
    assert code == 2 and "did you mean 'h100'" in error
    assert falcon_fast("plan", "--memory-budget", 0)[0] == 2


def test_a_run_that_starts_frozen_is_told_so_once(falcon_fast, tmp_path):
    code, out, _ = falcon_fast(
        "train",
        *TINY,
        "--temperature-batch",
        512,
        "--epochs",
        0,
        "--run-dir",
        tmp_path / "run",
        "--set",
        "loss.activation=tanh",
    )
    assert code == 0 and out.count("starts frozen") == 1
