"""What a run goes on with after its config.toml was edited, with other options, and after its end."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest

from falcon_fast.config import load_config, load_recipe, override, validate
from falcon_fast.errors import UsageError
from falcon_fast.runs.resuming import expected, newest_run, resumption
from falcon_fast.training.checkpoints import checkpoint

from ..commands import TINY


def edit(run: Path, *replacements: tuple[str, str]) -> None:
    """Replace lines of config.toml, as a user does in an editor."""
    text = (run / "config.toml").read_text()
    for old, new in replacements:
        assert f"{old}\n" in text, old
        text = text.replace(f"{old}\n", f"{new}\n", 1)
    (run / "config.toml").write_text(text)


def unfinished(run: Path) -> Path:
    """Make a finished run look as if it had been stopped at its next to last checkpoint."""
    (run / "result.json").unlink()
    (run / "curves.png").unlink()
    newest = checkpoint.complete(run / "checkpoints")[-1]
    shutil.rmtree(newest)
    return run


def rows(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").open()))


FREE = {
    'path = ""': ("data.path", None),
    'loader = "auto"': ("data.loader", 'loader = "resident"'),
    "timeout = 600": ("training.timeout", "timeout = 60"),
    "keep = 2": ("checkpoint.keep", "keep = 3"),
    "tensorboard = true": ("log.tensorboard", "tensorboard = false"),
    'implementation = "auto"': ("loss.implementation", 'implementation = "reference"'),
}
REFUSED = {
    "beta = 1.0": ("loss.beta: 1.0 -> 2.0", "beta = 2.0"),
    'prior = "reverse"': ('loss.prior: "reverse" -> "forward"', 'prior = "forward"'),
    "temperature_batch = 8": ("loss.temperature_batch: 8 -> 4", "temperature_batch = 4"),
    "ema_decay = 0.0": ("optimizer.ema_decay: 0.0 -> 0.9", "ema_decay = 0.9"),
    'augmentation = "digits"': ('data.augmentation: "digits" -> "cifar"', 'augmentation = "cifar"'),
    "size = 16": ("data.size: 16 -> 8", "size = 8"),
    "width = 4": ("model.width: 4 -> 8", "width = 8"),
    "batch_size = 64": ("training.batch_size: 64 -> 32", "batch_size = 32"),
    'precision = "auto"': ('training.precision: "auto" -> "float32"', 'precision = "float32"'),
    "seed = 0": ("training.seed: 0 -> 3", "seed = 3"),
    "num_codes = 64": ("loss.num_codes: 64 -> 128", "num_codes = 128"),
}


def test_every_refused_edit_is_named_in_one_line(copied, falcon_fast):
    """All at once: the command names each of them, and changes nothing."""
    edit(copied, *((old, new) for old, (_, new) in REFUSED.items()))
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*")}
    for how in (["--resume", copied], [*TINY, "--continue", "--run-dir", copied]):
        code, _, err = falcon_fast("train", *how)
        assert code == 2 and len(err.strip().splitlines()) == 1, err
        for line, _ in REFUSED.values():
            assert line in err
        assert "change them back" in err
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*")} == before


@pytest.mark.parametrize("old", REFUSED)
def test_each_edit_alone_is_refused_by_its_name(old, copied):
    line, new = REFUSED[old]
    asked = load_config(copied / "config.toml")
    edit(copied, (old, new))
    for command in (asked, load_config(copied / "config.toml")):  # as --continue and as --resume
        with pytest.raises(UsageError) as caught:
            resumption(copied, command, ())
        assert str(caught.value).count(" -> ") == 1 and line in str(caught.value)


@pytest.mark.slow
def test_free_edits_are_named_and_the_run_goes_on(copied, falcon_fast):
    edits = [(old, new) for old, (_, new) in FREE.items() if new]
    edit(unfinished(copied), *edits)
    code, out, err = falcon_fast("train", "--resume", copied)
    assert code == 0, err
    for name, new in FREE.values():
        assert (f"\n{name}: " in f"\n{out}") == (new is not None)
    assert "changes" not in json.loads((copied / "result.json").read_text())


@pytest.mark.slow
def test_continue_takes_the_edits_too_and_its_own_options_come_first(copied, falcon_fast):
    """The line names both; afterwards config.toml and the checkpoint hold what the run went on with."""
    edit(unfinished(copied), ("timeout = 600", "timeout = 60"), ("keep = 2", "keep = 5"))
    command = [*TINY, "--continue", "--run-dir", copied, "--set", "checkpoint.keep=3", "--set", "log.every_steps=4"]
    code, out, err = falcon_fast("train", *command)
    assert code == 0, err
    for line in ("training.timeout: 600 -> 60", "checkpoint.keep: 2 -> 3", "log.every_steps: 10 -> 4"):
        assert line in out.splitlines()
    kept = checkpoint.read_facts(checkpoint.latest(copied))["settings"]
    config = load_config(copied / "config.toml")
    assert config.training.timeout == 60 == kept["training"]["timeout"]
    assert config.checkpoint.keep == 3 == kept["checkpoint"]["keep"]


def test_a_finished_run_is_extended(copied, falcon_fast):
    first = json.loads((copied / "result.json").read_text())
    steps = [row["step"] for row in rows(copied)]
    code, out, err = falcon_fast("train", *TINY, "--epochs", 3, "--continue", "--run-dir", copied)
    assert code == 0, err
    assert "training.epochs: 2 -> 3" in out.splitlines()
    assert "cosine over 3 epochs" in out and "not that of a run of 3 epochs from the start" in out
    assert "kept in result-2-epochs.json" in out
    assert json.loads((copied / "result-2-epochs.json").read_text()) == first
    result = json.loads((copied / "result.json").read_text())
    assert result["changes"] == [{"step": 44, "setting": "training.epochs", "before": 2, "after": 3}]
    after = rows(copied)
    assert [row["step"] for row in after][: len(steps)] == steps and after[-1]["step"] == "66"
    assert (after[-1]["epoch"], after[-1]["changes"], after[0]["changes"]) == ("3", "1", "0")
    code, out, err = falcon_fast("train", *TINY, "--epochs", 3, "--continue", "--run-dir", copied)
    assert code == 0 and "is finished" in out, err
    code, out, err = falcon_fast("train", *TINY, "--epochs", 2, "--continue", "--run-dir", copied)
    assert code == 0 and "is finished" in out, err


@pytest.mark.slow
def test_an_extension_that_was_killed_goes_on(copied, falcon_fast, monkeypatch):
    """Between the end of preparation and the first new checkpoint, the run is neither finished nor lost."""
    from falcon_fast.training import trainer

    def killed(*arguments):
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train", killed)
        assert falcon_fast("train", "--resume", copied, "--epochs", 3)[0] == 9
    assert not (copied / "result.json").exists() and (copied / "result-2-epochs.json").exists()
    code, out, err = falcon_fast("train", "--resume", copied)
    assert code == 0 and "training.epochs: 2 -> 3" in out and "from step 44 of 66" in out, err
    assert (copied / "result.json").exists() and (copied / "result-2-epochs.json").exists()


def test_another_rate_has_to_be_asked_for_and_is_recorded(copied, falcon_fast):
    unfinished(copied)
    change = ["--resume", copied, "--set", "optimizer.lr=0.01"]
    code, _, err = falcon_fast("train", *change)
    assert code == 2 and "optimizer.lr: 0.002 -> 0.01" in err and "--allow-change optimizer.lr" in err
    code, out, err = falcon_fast("train", *change, "--allow-change", "optimizer.lr")
    assert code == 0 and "optimizer.lr: 0.002 -> 0.01" in out.splitlines(), err
    recorded = [{"step": 22, "setting": "optimizer.lr", "before": 0.002, "after": 0.01}]
    assert json.loads((copied / "result.json").read_text())["changes"] == recorded
    assert checkpoint.read_facts(checkpoint.latest(copied))["changes"] == recorded
    twenty, thirty = (next(row for row in rows(copied) if row["step"] == step) for step in ("20", "30"))
    assert (twenty["changes"], thirty["changes"]) == ("0", "1")
    assert float(thirty["lr"]) > 2 * float(twenty["lr"])  # five times the rate, at about half of the cosine's value


@pytest.mark.slow
def test_a_foreign_checkpoint_is_passed_over(copied, tmp_path, falcon_fast):
    """One of a run of another width, copied into the directory under a newer name."""
    other = tmp_path / "other"
    wider = ["--set", "model.width=8", "--set", "training.seed=5", "--epochs", 0]
    assert falcon_fast("train", *TINY, *wider, "--run-dir", other)[0] == 0
    (foreign,) = checkpoint.complete(other / "checkpoints")
    shutil.copytree(foreign, copied / "checkpoints" / "step-00000099")
    code, out, err = falcon_fast("evaluate", copied, "--device", "cpu")
    assert code == 0 and "step-00000099 belongs to another run (model.width: 8 -> 4)" in out, err
    (copied / "result.json").unlink()
    code, out, err = falcon_fast("train", "--resume", copied)
    assert code == 0 and "belongs to another run" in out and "from step 44 of 44" in out, err
    assert (copied / "checkpoints" / "set-aside-step-00000099").is_dir()


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_the_one_before(copied, finished, falcon_fast):
    newest = checkpoint.latest(copied)
    shard = newest / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    (copied / "result.json").unlink()
    code, out, err = falcon_fast("evaluate", copied)
    assert code == 0 and f"{newest.name} is damaged" in out and "step-00000022 is used" in out, err
    code, out, err = falcon_fast("train", "--resume", copied)
    assert code == 0 and f"{newest.name} is damaged" in out and "from step 22 of 44" in out, err
    timeless = [[row[c] for c in ("step", "loss", "lr")] for row in rows(copied)]
    assert timeless == [[row[c] for c in ("step", "loss", "lr")] for row in rows(finished[0])]


def test_an_edited_metrics_file_is_mended_at_a_resume(copied, falcon_fast):
    text = (copied / "metrics.csv").read_text()
    first = text.splitlines()[1]
    (copied / "metrics.csv").write_text(text.replace(first + "\n", "", 1))
    unfinished(copied)
    code, out, err = falcon_fast("train", "--resume", copied)
    assert code == 0 and "was cut short or edited since step 22" in out, err
    assert (copied / "metrics.csv.bak").is_file()
    assert [row["step"] for row in rows(copied)] == ["20", "30", "40", "44"]


def test_a_run_starts_from_the_weights_of_another(copied, tmp_path, falcon_fast):
    """With another batch and rate; the line and result.json say from where."""
    new = tmp_path / "new"
    command = [*TINY, "--epochs", 0, "--batch-size", 32, "--set", "optimizer.lr=0.1", "--init-from", copied]
    code, out, err = falcon_fast("train", *command, "--run-dir", new)
    assert code == 0 and "starts from the weights of" in out and "backbone and projector" in out, err
    first, second = (json.loads((run / "result.json").read_text()) for run in (copied, new))
    for figure in ("probe", "knn", "nmi_codes"):
        assert first["trained"][figure] == second["trained"][figure]
    (entry,) = second["changes"]
    assert (entry["setting"], entry["after"], entry["from_step"]) == ("training.init_from", str(copied), 44)


@pytest.fixture
def several(finished, tmp_path, monkeypatch):
    """runs/ with three runs of the digits, the second of which was written last, and one of another recipe."""
    root = tmp_path / "runs"
    for number, name in enumerate(("a", "b", "c")):
        shutil.copytree(finished[0], root / name)
        for facts in (root / name).glob("checkpoints/*/run.json"):
            os.utime(facts, (1000 + (number == 1), 1000 + (number == 1)))
    shutil.copytree(finished[0], root / "later")
    edit(root / "later", ('recipe = "digits"', 'recipe = "folder"'))
    (root / "empty").mkdir()
    shutil.rmtree(shutil.copytree(finished[0], root / "without") / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return root


def test_the_newest_run_of_a_recipe(several):
    assert newest_run(several, "digits", None) == several / "b"
    assert newest_run(several, "folder", None) == several / "later"
    assert newest_run(several, "folder", "") == several / "later"
    for recipe, data in (("digits", "/elsewhere"), ("cifar10", None)):
        with pytest.raises(UsageError, match=rf"holds no run of recipe {recipe}"):
            newest_run(several, recipe, data)


@pytest.mark.slow
def test_resume_auto_says_which_run_it_takes(several, falcon_fast):
    code, out, err = falcon_fast("train", "--resume", "auto", "--recipe", "digits", "--epochs", 3)
    assert code == 0 and "--resume auto: runs/b is the newest run" in out, err
    assert (several / "b" / "result-2-epochs.json").exists()
    assert not (several / "a" / "result-2-epochs.json").exists()


def test_processes_meet_by_the_settings_that_the_run_will_have(copied, tmp_path):
    asked = load_config(copied / "config.toml")
    edit(copied, ("timeout = 600", "timeout = 60"), ('strategy = "auto"', 'strategy = "fsdp"'))
    found = expected(copied, asked)
    assert (found.training.timeout, found.training.strategy) == (60, "fsdp")
    new = validate(override(load_recipe("digits"), {"training.seed": 7}))
    assert expected(tmp_path / "none", new) == new
