"""`falcon-fast train` from outside: what it leaves, what it prints, what it refuses."""

from __future__ import annotations

import csv
import json

import pytest

from falcon_fast import runs
from falcon_fast.training import trainer

from ..commands import TINY


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
    "resume with another recipe": (["--resume", "empty", "--recipe", "cifar10"], "cannot change"),
    "continue what": (["--continue"], "--continue needs --run-dir"),
    "continue no run": (["--continue", "--run-dir", "occupied"], "something other than a run"),
    "occupied run directory": (["--run-dir", "occupied"], "not empty"),
    "run directory is a file": (["--run-dir", "occupied/file.txt"], "not empty"),
    "unwritable run directory": (["--run-dir", "/proc/run"], "cannot be written"),
    "device": (["--device", "cuda:99"], "does not exist"),
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


def test_a_diverging_run_exits_with_one_line(tmp_path, falcon_fast):
    code, _, err = falcon_fast("train", *TINY, "--set", "optimizer.lr=1e30", "--run-dir", tmp_path / "run")
    assert code == 4
    assert "not finite at steps 2 to 11" in err and len(err.strip().splitlines()) == 1
    assert "falcon-fast replay" in err and "positions" in err
    assert not (tmp_path / "run" / "result.json").exists()


def test_stopped_without_a_checkpoint_is_said_as_such(tmp_path, monkeypatch, falcon_fast):
    """Two Ctrl-C before the first one is saved: there is nothing to resume."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", interrupted)
    code, out, _ = falcon_fast("train", *TINY, "--run-dir", tmp_path / "run")
    assert code == 130 and "stopped; no checkpoint had been written" in out and "--resume" not in out


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
