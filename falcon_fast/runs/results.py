"""What a run has learnt: loaded, judged again, and left in the run directory when training is over."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from falcon_fast.config import Config, load_config
from falcon_fast.data.loaders.workers import auto_workers
from falcon_fast.data.sources.opening import open_source
from falcon_fast.data.views.augmentation import augmentation
from falcon_fast.errors import UsageError
from falcon_fast.evaluation.protocol import evaluate_network
from falcon_fast.evaluation.report import plot_curves
from falcon_fast.hardware.devices import find_device
from falcon_fast.models.network import FalconNetwork, build_codes, build_network
from falcon_fast.objective.codes import Codes
from falcon_fast.runs.directory import write_json
from falcon_fast.training.averaging import WeightAverage
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.run import Run


@dataclass(frozen=True)
class Trained:
    """What a run has learnt: the network in evaluation mode and all that its use depends on.

    `mean` and `std` normalise its images, per channel of pixels in [0, 1]; the temperature is `config.tau`.
    """

    config: Config
    network: FalconNetwork
    codes: Codes
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device


def load_trained(directory: Path, device: str = "auto") -> Trained:
    """A run's network at its newest checkpoint, on `device`.

    Raises:
        UsageError: no such run, no complete checkpoint, a damaged one, or a device that is not there.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such run directory")
    config = load_config(directory / "config.toml")
    place = find_device(device)
    network = build_network(config, config.data.size)
    path = checkpoint.latest(directory)
    facts = checkpoint.read_facts(path)
    if config.optimizer.ema_decay:  # what is judged is the average
        average = WeightAverage(network, config.optimizer.ema_decay)
        checkpoint.load(path, network, extra={f"average.{name}": tensor for name, tensor in average.state().items()})
        average.swap(network)
    else:
        checkpoint.load(path, network)
    network.to(device=place, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    return Trained(config, network.eval(), build_codes(config).to(place), mean, std, place)


def evaluate(trained: Trained, data: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Judge a trained network on its own data, or on the images at `data`; returns the figures of `result.json`.

    Other images than its own are resized to the network's side and normalised as its own were.

    Raises:
        UsageError: the data cannot be opened.
    """
    config = trained.config
    if data is not None:
        kind = "folder" if config.data.source == "digits" else config.data.source
        path = os.path.abspath(os.path.expanduser(data))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=kind, path=path))
    source = dataclasses.replace(open_source(config.data), mean=trained.mean, std=trained.std)
    for note in source.notes:
        say(note)
    workers = config.data.workers if config.data.workers >= 0 else auto_workers(augmentation(config.data.augmentation))
    return evaluate_network(config, trained.network, trained.codes, source, trained.device, workers, say)


def finish(
    run: Run, network: FalconNetwork, directory: Path, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Evaluate what a run has trained and leave result.json, curves.png and backbone.safetensors in `directory`.

    network: with all its parameters, as `Run.whole` gives it.  Returns the result.
    """
    from safetensors.torch import save_file

    result = evaluate_network(run.config, network, run.codes, run.source, run.device, run.workers, say)
    images = run.total_steps * run.config.training.batch_size
    result |= {"seconds": seconds, "images_per_second": images / seconds if seconds > 0 else 0.0}
    plot_curves(directory / "metrics.csv", directory / "curves.png")
    weights = {k: v.contiguous() for k, v in network.backbone.state_dict().items()}
    partial = directory / ".backbone.safetensors.partial"
    metadata = {
        "model": run.config.model.name,
        "image_size": str(run.source.size),
        "mean": json.dumps(run.source.mean),
        "std": json.dumps(run.source.std),
    }
    save_file(weights, partial, metadata=metadata)
    partial.replace(directory / "backbone.safetensors")
    write_json(directory / "result.json", result)  # last: a run with a result is a finished run
    return result
