"""A step taken again: the same numbers, and the image and the layer that are to blame."""

from __future__ import annotations

import csv
import shutil

import pytest
import torch

from falcon_fast.config import load_config, load_recipe, override, validate
from falcon_fast.errors import DivergedError, UsageError
from falcon_fast.hardware import precision
from falcon_fast.runs import replay as replays
from falcon_fast.runs.directory import create_run_directory
from falcon_fast.training import session, trainer
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.run import prepare

from ..training.tiny import QUIET, poison, start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 22 steps with a row for each; checkpoints at 20 and 22."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("replay") / "run"
    trainer.train(start(directory, log__every_steps=1, training__accumulate=2), directory, QUIET)
    return directory


def recorded(directory) -> dict[int, dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


@pytest.mark.parametrize(("step", "weights"), [(1, 0), (4, 3), (21, 20), (22, 21)])
def test_any_step_is_the_same_again(whole, step, weights):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    found = replays.replay(whole, step)
    row = recorded(whole)[step]
    for name in ("loss", "prior", "invariance", "grad_norm"):
        assert f"{found.metrics[name]:.9g}" == row[name], name
    assert found.metrics["codes_used"] == int(row["codes_used"])
    assert (found.step, found.weights_of_step, found.bad, found.culprit) == (step, weights, False, None)
    assert f"{found.recorded:.9g}" == row["loss"]
    assert not found.notes
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}


def test_every_image_and_layer_is_there(whole):
    found = replays.replay(whole, 21)
    assert [image.place for image in found.images] == list(range(128))
    assert all(image.gradient_norm > 0 and not image.views for image in found.images)
    names = [layer.name for layer in found.layers]
    half = len(names) // 2  # two micro-batches
    assert names[:half] == names[half:] and names[0] == "views" and names[half - 1] == "projector"
    assert {"backbone.stem.0", "backbone.stages.1", "projector.norm"} < set(names)
    for layer in found.layers:
        assert layer.forward.non_finite == 0 and (layer.backward is None) == (layer.name == "views")


def test_far_from_a_checkpoint_the_nearest_ones_weights_are_used_and_said(whole):
    found = replays.replay(whole, 15, max_steps=3)
    assert found.weights_of_step == 20
    assert "weights are those of step 20" in found.notes[0]
    assert found.metrics["loss"] != float(recorded(whole)[15]["loss"])
    assert {image.image for image in found.images} == {
        image.image for image in replays.replay(whole, 15, max_steps=14).images
    }


def test_the_poisoned_image_is_named(tmp_path, monkeypatch):
    directory = tmp_path / "run"
    poison(monkeypatch, session, lambda step, image: (2,) if image == 600 else ())
    run = start(directory, log__every_steps=1, training__epochs=1)
    trainer.train(run, directory, QUIET)
    poison(monkeypatch, replays, lambda step, image: (2,) if image == 600 else ())
    step = next(step for step in range(1, 12) if 600 in run.clock.at(step - 1).indices)
    found = replays.replay(directory, step)
    assert found.bad
    assert "images themselves" in found.culprit and found.culprit.endswith(": image 600 in view 2")
    assert [(image.image, image.views) for image in found.images if image.views] == [(600, (2,))]
    place = next(image.place for image in found.images if image.views)
    assert run.clock.at(step - 1).indices[place] == 600
    views = found.layers[0]
    assert views.name == "views" and views.forward.non_finite == 3 and views.forward.maximum is not None
    # A convolution keeps the images apart, BatchNorm mixes those of a view.
    layers = {layer.name: layer for layer in found.layers}
    assert {row.place for row in layers["backbone.stem.0"].bad_rows} == {place}
    assert len(layers["backbone.stem.1"].bad_rows) == 128


def test_the_file_is_named(image_folder, tmp_path, monkeypatch):
    settings = {
        "data.path": str(image_folder),
        "data.loader": "resident",
        "model.name": "resnet8",
        "model.width": 4,
        "loss.embedding_dim": 32,
        "loss.num_codes": 64,
        "training.epochs": 1,
        "training.batch_size": 8,
        "training.device": "cpu",
        "training.max_bad_steps": 1,
        "log.tensorboard": False,
    }
    run = prepare(validate(override(load_recipe("folder"), settings)))
    create_run_directory(tmp_path / "run", run.config)
    number = int(run.clock.at(2).indices[5])
    for module in (session, replays):
        poison(monkeypatch, module, lambda step, image: (1, 2) if image == number else ())
    file = run.source.train.images.name(number)
    with pytest.raises(DivergedError, match="not finite at step 3") as caught:
        trainer.train(run, tmp_path / "run", QUIET)
    first = [run.source.train.images.name(int(image)) for image in run.clock.at(2).indices[:3]]
    assert all(f"{name} (image" in str(caught.value) for name in first) and "no checkpoint" in str(caught.value)
    found = replays.replay(tmp_path / "run", 3)
    assert found.culprit.endswith(f": {file} (image {number}) in view 1 and 2")


@pytest.fixture
def poisoned_weights(whole, tmp_path, monkeypatch):
    """The run, and a function that makes a weight of its newest checkpoint NaN as it is loaded."""
    directory = shutil.copytree(whole, tmp_path / "run")
    load = checkpoint.load

    def poisoned(name: str) -> None:
        def loading(path, network, *arguments, **options):
            load(path, network, *arguments, **options)
            with torch.no_grad():
                network.get_parameter(name)[0] = torch.nan

        monkeypatch.setattr(replays.checkpoint, "load", loading)

    return directory, poisoned


@pytest.mark.parametrize("layer", ["backbone.stages.1.conv2", "backbone.stages.2.bn1", "projector.linear"])
def test_the_layer_with_poisoned_weights_is_named(poisoned_weights, layer):
    directory, poisoned = poisoned_weights
    poisoned(f"{layer}.weight")
    found = replays.replay(directory, 21)
    assert found.bad and f"the output of {layer} (" in found.culprit
    assert "because its own weight is not finite" in found.culprit and "for every image" in found.culprit
    assert not any(image.views for image in found.images)


def test_a_gradient_that_overflows_is_found_where_it_begins(whole, monkeypatch):
    """In float16 autocast a huge scale makes the gradient of a layer infinite, while the forward pass is finite."""
    prepare = replays.prepare

    def prepared(*arguments, **options):
        run = prepare(*arguments, **options)
        stage = run.network.backbone.stages[1]
        stage.register_forward_hook(lambda m, i, o: (o.register_hook(lambda g: g * torch.inf), o)[1])
        return run

    monkeypatch.setattr(replays, "prepare", prepared)
    found = replays.replay(whole, 21)
    assert found.bad and "gradient of the output of backbone.stages.1 (BasicBlock) is the first" in found.culprit


def test_float16_gradients_are_shown_without_their_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "native_float16", lambda: True)
    norms = {}
    for name in ("fp16", "float32"):
        directory = tmp_path / name
        run = start(directory, training__epochs=1, training__precision=name, log__every_steps=1)
        trainer.train(run, directory, QUIET)
        found = replays.replay(directory, 1)
        norms[name] = [image.gradient_norm for image in found.images]
        assert f"{found.metrics['loss']:.9g}" == recorded(directory)[1]["loss"]
    assert norms["fp16"] == pytest.approx(norms["float32"], rel=0.2, abs=1e-2)


@pytest.mark.parametrize("step", [0, -1, 23])
def test_a_step_that_the_run_does_not_have(whole, step):
    with pytest.raises(UsageError, match="steps 1 to 22"):
        replays.replay(whole, step)


def test_another_data_set_is_refused(whole, tmp_path):
    directory = shutil.copytree(whole, tmp_path / "run")
    config = directory / "config.toml"
    config.write_text(config.read_text().replace("seed = 0", "seed = 7"))
    with pytest.raises(UsageError, match=r"cannot replay.*training.seed: 0 -> 7"):
        replays.replay(directory, 22)
    with pytest.raises(UsageError, match="no such run"):
        replays.replay(tmp_path / "nothing", 1)


def test_settings_that_were_changed_since_are_named(whole, tmp_path):
    directory = shutil.copytree(whole, tmp_path / "run")
    config = directory / "config.toml"
    config.write_text(config.read_text().replace("beta = 1.0", "beta = 0.5"))
    found = replays.replay(directory, 22)
    assert any("loss.beta: 1.0 -> 0.5" in note for note in found.notes)


def test_images_set_aside_are_replaced_as_in_the_run(whole, tmp_path):
    directory = shutil.copytree(whole, tmp_path / "run")
    plain = replays.replay(whole, 22)
    gone = plain.images[3].image
    (directory / "quarantine.csv").write_text(f"image,file,reason\n{gone},x,broken\n")
    found = replays.replay(directory, 22)
    assert found.images[3].image != gone and gone not in {image.image for image in found.images}
    assert (directory / "quarantine.csv").read_text().count("\n") == 2


def test_settings_are_those_of_the_run(whole):
    assert load_config(whole / "config.toml").training.accumulate == 2
