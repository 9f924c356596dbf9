"""Out of memory, where the error is raised (no device here runs out) and the sizes are the models'."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from rich.console import Console

from falcon_fast.config import load_recipe, override, validate
from falcon_fast.errors import TrainingError, UsageError
from falcon_fast.runs.directory import create_run_directory
from falcon_fast.training import memory, stepper, trainer
from falcon_fast.training.run import Run, prepare

TINY = {"model.width": 4, "training.epochs": 1, "checkpoint.every_steps": 2}


def prepared(**changes) -> Run:
    settings = TINY | {k.replace("__", "."): v for k, v in changes.items()}
    return prepare(validate(override(load_recipe("digits"), settings)))


def said(run: Run, error: RuntimeError) -> str:
    with pytest.raises(TrainingError) as caught, memory.out_of_memory(run):
        raise error
    (line,) = str(caught.value).splitlines()
    return line


def test_a_step_without_memory_ends_the_run_with_one_line(tmp_path, monkeypatch):
    step_function, calls = stepper.training_step, []

    def failing(*arguments):
        calls.append(None)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return step_function(*arguments)

    monkeypatch.setattr(stepper, "training_step", failing)
    run = prepared()
    create_run_directory(tmp_path / "run", run.config)
    with pytest.raises(TrainingError) as caught:
        trainer.train(run, tmp_path / "run", Console(quiet=True))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(
        "cpu does not have enough memory for a batch of 64 images and the loss's stored plan, which needs "
    )
    assert "--set loss.plan=streaming" in line and "--accumulate 2; or --batch-size 32" in line
    assert "step-00000002" in line  # the checkpoint that is left


def test_a_host_without_memory_is_one_line_too():
    run = prepared()
    for allocate in (lambda: np.empty(1 << 56, np.uint8), lambda: torch.empty(1 << 54)):
        with (
            pytest.raises(TrainingError, match="cpu does not have enough memory for a batch of 64"),
            memory.out_of_memory(run),
        ):
            allocate()


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), memory.out_of_memory(prepared()):
        raise RuntimeError("shapes do not fit")


def test_what_is_done_already_is_not_advised():
    run = prepared(loss__plan="streaming", training__accumulate=4)
    line = said(run, RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert "loss.plan" not in line and "64 images in 4 micro-batches and the loss's streaming plan" in line
    assert line.endswith("--accumulate 8; or --batch-size 32")
    line = said(prepared(loss__implementation="reference"), torch.OutOfMemoryError("CUDA out of memory."))
    assert "reference plan" in line and "--num-codes" in line
    least = said(prepared(training__batch_size=2), torch.OutOfMemoryError("CUDA out of memory."))
    assert "--accumulate" not in least and "--batch-size" not in least  # BatchNorm needs two images


def test_advice_for_a_gpu_is_the_planners(monkeypatch):
    run = prepared(loss__embedding_dim=2048, loss__num_codes=16384, training__batch_size=1024)
    run = dataclasses.replace(run)
    run.device = torch.device("cuda", 0)
    monkeypatch.setattr(memory, "loss_implementations", lambda device: ("triton", "reference"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(memory, "_where", lambda device: "cuda:0")
    found = {
        x.name: x for x in memory.planner.candidates(1024, 2048, 16384, "rademacher", memory.planner.DEVICES["a100"])
    }
    assert memory.loss_plan(run) == ("stored", found["stored"].peak, found["streaming"].peak)
    line = said(run, torch.OutOfMemoryError("CUDA out of memory."))
    assert f"--set loss.plan=streaming, which needs {found['streaming'].peak / 2**20:,.0f} MiB; or --amp" in line
    run.config = dataclasses.replace(run.config, loss=dataclasses.replace(run.config.loss, memory_budget=64))
    assert memory.loss_plan(run)[0] == "streaming"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss__implementation": "reference", "loss__plan": "stored"}, "loss.plan=auto"),
        ({"loss__implementation": "reference", "loss__memory_budget": 1, "loss__num_codes": 65536}, "memory_budget=1"),
        ({"loss__memory_budget": 1, "loss__num_codes": 65536}, "loss.memory_budget=1 cannot be kept"),
        ({"loss__memory_budget": 1, "loss__plan": "stored", "loss__num_codes": 65536}, "the stored plan needs"),
        ({"loss__memory_budget": 1, "loss__codes": "hadamard", "loss__num_codes": 65536}, "cannot be kept"),
    ],
)
def test_a_loss_that_cannot_be_computed_is_refused_before_it_is(settings, words):
    with pytest.raises(UsageError, match=words) as caught:
        memory.check_fits(prepared(**settings))
    assert "\n" not in str(caught.value)


def test_an_implementation_of_another_device_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "loss_implementations", lambda device: ("cpu", "reference"))
    monkeypatch.setattr(memory, "why_no_triton", lambda device: "there is no GPU")
    with pytest.raises(
        UsageError, match=r"triton does not run on cpu \(there is no GPU\): choose auto or one of cpu, ref"
    ):
        memory.check_fits(prepared(loss__implementation="triton"))


def test_a_loss_beyond_the_free_memory_is_refused(monkeypatch):
    run = prepared()
    memory.check_fits(run)
    _, peak, _ = memory.loss_plan(run)
    monkeypatch.setattr(memory, "available_memory", lambda device: peak - 1)
    with pytest.raises(UsageError, match="--accumulate 2; or --batch-size 32"):
        memory.check_fits(run)
