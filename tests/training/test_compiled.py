"""The compiled step: one graph, no recompilation after the second step, the eager losses, errors in one line."""

from __future__ import annotations

import shutil

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._dynamo.utils import counters

from falcon_fast.config import load_recipe, override, validate
from falcon_fast.data.loaders.training import training_batches
from falcon_fast.data.views.photometric_stage import photometric_stage
from falcon_fast.errors import RunStopped, UsageError
from falcon_fast.runs.directory import create_run_directory
from falcon_fast.training import compiled, trainer
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.restore import restore
from falcon_fast.training.run import prepare
from falcon_fast.training.step import training_step

SETTINGS = {"model.width": 4, "loss.embedding_dim": 32, "loss.num_codes": 64, "loss.temperature_batch": 1}


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **k, backend=request.param))
    return request.param


def test_a_compiler_that_a_signal_has_ended_is_no_failure():
    """Ctrl-C on a terminal reaches the C++ compiler, too."""
    from torch._dynamo.exc import TorchDynamoException

    for stopping, kind in ((False, UsageError), (True, RunStopped)):
        with pytest.raises(kind), compiled.compiler_failures(lambda stopping=stopping: stopping):
            raise TorchDynamoException("the C++ compiler was interrupted")


def steps_of(run, steps: range, photometric):
    """The metrics of these steps of a run, of which only the first two may compile anything."""
    mean, std = run.source.normalization(run.device)
    found = []
    for batch in training_batches(run.loader, run.source, run.clock, steps, run.device, 0):
        views = photometric(batch.views, batch.parameters, mean, std)
        # A rate that changes at every step, and a norm that is asked for now and then, are no reason to compile again.
        rate, asked = 1 - batch.step / 200, batch.step % 4 == 3
        with torch._dynamo.config.patch(error_on_recompile=batch.step >= steps.start + 2):
            found.append(training_step(run.learner, views, batch.labels, rate, asked))
    return found


def prepared(**settings):
    return prepare(validate(override(load_recipe("digits"), SETTINGS | settings)))


def losses(steps: int, **settings) -> torch.Tensor:
    run = prepared(**settings)
    counters.clear()
    found = steps_of(run, range(steps), photometric_stage(run.augmentation, "eager", print))
    if run.config.training.compile:
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    return torch.stack([torch.stack([m.loss, m.prior, m.invariance, m.probe_accuracy]) for m in found])


@pytest.mark.parametrize("activation", ["tanh", "l2"])
def test_one_graph_without_breaks_and_the_losses_of_eager(backend, activation):
    settings = {"loss.activation": activation, "loss.temperature_batch": 1 if activation == "tanh" else 8}
    steps = 50 if backend == "inductor" else 14  # the whole curve with the compiler itself, among the slow tests
    eager = losses(steps, **settings)
    found = losses(steps, **settings, **{"training.compile": True})
    # Rounding grows in float32: the first step agrees to it, the curve as far as two seeds of rounding do.
    torch.testing.assert_close(found[0], eager[0], rtol=1e-5, atol=1e-5)
    relative = (found[:, :3] / eager[:, :3] - 1).abs()
    assert relative[:, 0].mean() < 0.03
    assert abs(found[-10:, 0].mean() / eager[-10:, 0].mean() - 1) < 0.02
    assert (found[:, 3] - eager[:, 3]).abs().mean() < 0.03


@pytest.mark.parametrize(
    "settings",
    [
        {"training.accumulate": 2},
        {"training.precision": "bf16"},
        {"optimizer.clip_norm": 0.1, "optimizer.ema_decay": 0.9, "optimizer.name": "lars", "loss.codes": "hadamard"},
        {"loss.implementation": "reference"},
        pytest.param({"model.name": "vit_tiny_patch16_224", "data.size": 16}, marks=pytest.mark.slow),
    ],
    ids=["accumulate", "bf16", "clipped, averaged, lars, hadamard", "reference", "vit"],
)
def test_what_else_a_step_can_be(backend, settings):
    eager = losses(6, **settings)
    found = losses(6, **settings, **{"training.compile": True})
    rounding = 2e-2 if "training.precision" in settings else 1e-3
    torch.testing.assert_close(found[:3, :3], eager[:3, :3], rtol=rounding, atol=rounding)


def test_runs_of_one_process_do_not_count_against_each_other(backend):
    """The compiler keeps a limited number of graphs with the code of a function."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            losses(1, **{"training.compile": True})


def test_a_compiled_run_trains_evaluates_saves_plain_names_and_resumes_bit_for_bit(backend, tmp_path):
    changes = SETTINGS | {"training.epochs": 2, "training.batch_size": 256, "training.compile": True}
    run = prepare(validate(override(load_recipe("digits"), changes)))
    create_run_directory(tmp_path / "run", run.config)
    counters.clear()
    trainer.train(run, tmp_path / "run", Console(quiet=True))
    assert counters["stats"]["unique_graphs"] == 1  # evaluation compiles nothing
    assert not any("_orig_mod" in key for key in run.network.state_dict())

    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    first, last = checkpoint.complete(tmp_path / "run" / "checkpoints")
    shutil.copytree(first, tmp_path / "half" / "checkpoints" / first.name)
    again = prepare(run.config)
    step, seconds = restore(again, tmp_path / "half")
    assert 0 < step < run.total_steps
    trainer.train(again, tmp_path / "half", Console(quiet=True), step, seconds)
    for name, tensor in run.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor), name
    restored = prepare(run.config)
    assert restore(restored, tmp_path / "run")[0] == run.total_steps and last.name.endswith(str(run.total_steps))


def test_what_cannot_be_compiled_is_one_line():
    class Breaking(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x

    torch._dynamo.reset()
    with pytest.raises(UsageError, match="leave out --compile") as caught, compiled.compiler_failures():
        compiled.compiled_network(Breaking())(torch.ones(1))
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="another"), compiled.compiler_failures():
        raise RuntimeError("another")
