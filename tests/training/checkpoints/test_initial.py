"""A new run that starts from the weights of another."""

from __future__ import annotations

import pytest
import torch

from falcon_fast.errors import UsageError
from falcon_fast.training import trainer
from falcon_fast.training.checkpoints.initial import initialise

from ..tiny import QUIET, prepared, start


@pytest.fixture(scope="module", params=[0.0, 0.5], ids=["plain", "averaged"])
def source(request, tmp_path_factory):
    """A trained run without and with an average of its weights."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("source") / "run"
    run = start(directory, training__epochs=1, optimizer__ema_decay=request.param)
    trainer.train(run, directory, QUIET)
    if run.learner.average is not None:
        run.learner.average.swap(run.network)  # what is evaluated and kept
    return run, directory


def test_all_weights_are_those_of_the_other_run(source):
    trained, directory = source
    run = prepared(training__init_from=str(directory), training__batch_size=64, optimizer__lr=0.5)
    initialise(run)
    for key, tensor in trained.network.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(run.network.state_dict()[key], tensor), key
    assert "backbone and projector" in run.notes[0] and run.changes[0]["from_step"] == 11
    assert not run.learner.optimizer.state


def test_the_projector_starts_at_random_if_it_has_another_shape(source):
    trained, directory = source
    run = prepared(training__init_from=str(directory), loss__embedding_dim=48)
    before = run.network.projector.linear.weight.detach().clone()
    initialise(run)
    assert torch.equal(run.network.projector.linear.weight, before)
    for key, tensor in trained.network.backbone.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(run.network.backbone.state_dict()[key], tensor), key
    assert "the projector has another shape" in run.notes[0]


def test_an_average_begins_at_the_weights_that_the_run_starts_from(source):
    run = prepared(training__init_from=str(source[1]), optimizer__ema_decay=0.9)
    initialise(run)
    for name, average in run.learner.average.state().items():
        assert torch.equal(average, dict(run.network.state_dict())[name])


def test_what_does_not_fit_is_one_line(source, tmp_path):
    for settings, words in (
        ({"training__init_from": str(source[1]), "model__width": 8}, "does not fit resnet8"),
        ({"training__init_from": str(tmp_path / "nowhere")}, "no such run directory"),
        ({"training__init_from": str(tmp_path)}, "no complete checkpoint"),
        ({"training__init_from": "x" * 5000}, "no such run directory"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            initialise(prepared(**settings))
        assert "\n" not in str(caught.value)


def test_without_the_setting_nothing_happens():
    run = prepared()
    before = {key: tensor.clone() for key, tensor in run.network.state_dict().items()}
    notes = run.notes
    initialise(run)
    assert run.notes == notes and run.changes == []
    assert all(torch.equal(tensor, run.network.state_dict()[key]) for key, tensor in before.items())
