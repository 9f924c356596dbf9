"""The studies: resumable, and one row for each run."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
SMALL = ["--device=cpu", "--num-codes=64", "--embedding-dim=16", "--temperature-batch=1", "--set=data.workers=0"]


@pytest.fixture
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("initialisation", STUDIES / "initialisation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(tmp_path: Path, *extra: str) -> list[str]:
    words = ["--data", "images", "--results", str(tmp_path / "t.csv"), "--runs", str(tmp_path / "runs"), *extra]
    return words + [f"--train={word}" for word in SMALL]


@pytest.fixture
def runs(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of training: the commands, each of which leaves what a finished run leaves."""
    found: list[list[str]] = []

    def run(words: list[str]) -> subprocess.CompletedProcess:
        found.append(words)
        directory = Path(words[words.index("--run-dir") + 1])
        directory.mkdir(parents=True)
        figures = {"probe": 0.5 + len(found) / 100, "knn": 0.4, "nmi_kmeans": 0.3}
        trained = figures | {"nmi_codes": 0.25, "codes_used": 9}
        result = {"seconds": 1.5, "random_init": figures, "trained": trained}
        (directory / "result.json").write_text(json.dumps(result))
        rows = "".join(f"{step},{step // 10}\n" for step in range(10, 300, 10))
        (directory / "metrics.csv").write_text("step,codes_used\n" + rows)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(study.subprocess, "run", run)
    return found


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_run_and_one_row_for_each_start_and_seed(study, runs, tmp_path, capsys) -> None:
    study.main(options(tmp_path, "--seeds", "0", "1"))
    rows = table(tmp_path / "t.csv")
    expected = [(start, str(seed)) for seed in (0, 1) for start in ("torchvision", "timm")]
    assert [(row["initialisation"], row["seed"]) for row in rows] == expected
    assert {(row["recipe"], row["epochs"], row["early_codes"], row["codes_used"]) for row in rows} == {
        ("cifar10", "20", "5.5", "9")
    }
    assert [row["probe"] for row in rows] == ["0.51", "0.52", "0.53", "0.54"]
    assert all("--continue" in words and words[words.index("--epochs") + 1] == "20" for words in runs)
    assert [next(w for w in words if w.startswith("model.init")) for words in runs[:2]] == [
        "model.initialisation=torchvision",
        "model.initialisation=timm",
    ]
    assert "torchvision, 2 seeds: probe 0.520 ± 0.014" in capsys.readouterr().out


def test_started_again_it_runs_what_is_missing(study, runs, tmp_path) -> None:
    study.main(options(tmp_path, "--seeds", "0"))
    study.main(options(tmp_path, "--seeds", "0", "3"))
    assert len(runs) == 4 and [row["seed"] for row in table(tmp_path / "t.csv")] == ["0", "0", "3", "3"]


def test_other_settings_do_not_enter_a_table(study, runs, tmp_path, capsys) -> None:
    study.main(options(tmp_path, "--seeds", "0"))
    with pytest.raises(SystemExit, match="2"):
        study.main(options(tmp_path, "--seeds", "1", "--epochs", "3"))
    assert "was made with epochs '20', not '3': give another --results" in capsys.readouterr().err
    assert len(runs) == 2


def test_a_failed_run_leaves_no_row(study, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(study.subprocess, "run", lambda words: subprocess.CompletedProcess(words, 130))
    with pytest.raises(SystemExit) as exit_:
        study.main(options(tmp_path))
    assert exit_.value.code == 130 and not (tmp_path / "t.csv").exists()


@pytest.mark.slow
def test_real_runs(study, image_folder, tmp_path) -> None:
    """ResNet-18 on 40 small images with both starts, from the command line."""
    words = [sys.executable, str(STUDIES / "initialisation.py"), *options(tmp_path, "--epochs", "1", "--seeds", "0")]
    words[words.index("images")] = str(image_folder)
    words += ["--recipe", "folder", "--train=--set=data.size=32", "--train=--batch-size=8"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "t.csv")
    assert [row["initialisation"] for row in rows] == ["torchvision", "timm"]
    assert all(0 < float(row["early_codes"]) <= 16 and 0 <= float(row["probe"]) <= 1 for row in rows)
