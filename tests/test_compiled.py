"""The compiled network: one graph, no recompilation after the second step, the eager losses, errors in one line."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._dynamo.utils import counters

from falcon_fast.config import load_recipe, override, validate
from falcon_fast.data.loader import training_batches
from falcon_fast.data.stage import photometric_stage
from falcon_fast.errors import UsageError
from falcon_fast.runs import create_run_directory
from falcon_fast.training import compiled, trainer
from falcon_fast.training.run import prepare, restore
from falcon_fast.training.step import training_step

SETTINGS = {"model.width": 4, "loss.embedding_dim": 32, "loss.num_codes": 64, "loss.temperature_batch": 1}


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **k, backend=request.param))
    return request.param


def losses(steps: int, lr: float = 2e-3, **settings) -> list[float]:
    changes = SETTINGS | {"optimizer.lr": lr} | settings
    run = prepare(validate(override(load_recipe("digits"), changes)))
    photometric = photometric_stage(run.augmentation, "eager", print)
    mean, std = run.source.normalization(run.device)
    found = []
    for batch in training_batches(run.loader, run.source, run.clock, range(steps), run.device, 0):
        views = photometric(batch.views, batch.parameters, mean, std)
        with torch._dynamo.config.patch(error_on_recompile=batch.step >= 2):
            found.append(training_step(run.learner, views, batch.labels, 1.0).loss.item())
    return found


def test_one_graph_without_breaks_and_the_losses_of_eager(backend):
    eager = torch.tensor(losses(50))
    counters.clear()
    found = torch.tensor(losses(50, **{"training.compile": True}))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    # Rounding grows in float32: the first step agrees to it, the curve as far as two seeds of rounding do.
    assert found[0].item() == pytest.approx(eager[0].item(), rel=1e-5)
    assert (found / eager - 1).abs().mean() < 0.03
    assert abs(found[-10:].mean() / eager[-10:].mean() - 1) < 0.02


def test_a_compiled_run_trains_evaluates_and_saves_plain_names(backend, tmp_path):
    changes = SETTINGS | {"training.epochs": 1, "training.batch_size": 256, "training.compile": True}
    run = prepare(validate(override(load_recipe("digits"), changes)))
    create_run_directory(tmp_path / "run", run.config)
    counters.clear()
    trainer.train(run, tmp_path / "run", Console(quiet=True))
    assert counters["stats"]["unique_graphs"] == 1  # evaluation compiles nothing
    again = prepare(run.config)
    assert restore(again, tmp_path / "run")[0] == run.total_steps
    assert not any("_orig_mod" in key for key in run.network.state_dict())


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
