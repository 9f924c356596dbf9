"""What the steps of a run are fed with."""

from __future__ import annotations

import pytest
import torch

from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.loaders.training import training_batches
from falcon_fast.errors import UsageError
from falcon_fast.training.distributed.processes import Processes
from falcon_fast.training.inputs import feed_of, photometric_of, quarantine_of, share_bad

from .tiny import prepared


@pytest.mark.parametrize("loader", ["resident", "workers"])
def test_the_feed_is_the_loaders_batches_through_the_photometric_stage(loader):
    run = prepared(data__loader=loader, data__workers=0)
    photometric, said = photometric_of(run, print), []
    feed = feed_of(run, range(3, 6), quarantine_of(run, said.append), photometric)
    mean, std = run.source.normalization(run.device)
    batches = training_batches(loader, run.source, run.clock, range(3, 6), run.device, 0)
    for step, (inputs, batch) in enumerate(zip(feed.inputs, batches, strict=True), 3):
        views, labels = feed.views_of(inputs)
        assert inputs.step == batch.step == step
        assert views.shape == (256, 3, 16, 16) and torch.equal(labels, batch.labels)
        torch.testing.assert_close(views, photometric(batch.views, batch.parameters, mean, std))
    assert said == []


class Two(Processes):
    """Process 0 of two, the other of which has found image 3 unreadable."""

    def everyone(self, value):
        return [value, ({3: "truncated"}, {}) if isinstance(value, tuple) else None]


def test_what_one_process_finds_unreadable_all_know(tmp_path):
    images = prepared().source.train.images
    quarantine = Quarantine(images, 0.01, tmp_path / "quarantine.csv")
    quarantine.add(1, "empty")
    share_bad(quarantine, Two())
    assert quarantine.bad == {1: "empty", 3: "truncated"}
    assert "truncated" in (tmp_path / "quarantine.csv").read_text()
    with pytest.raises(UsageError):
        share_bad(Quarantine(images, 0.0), Two())
