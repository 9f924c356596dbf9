"""The results of a run: the trained network, loaded and evaluated again, and the files that are written after training."""

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
from falcon_fast.data.sources.opening import open_other, open_source
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
    """A trained network in evaluation mode, with everything that its use depends on.

    Attributes:
        codes: the dictionary of the run; its temperature is `config.tau`.
        mean, std: of each channel, which normalise images with pixels in [0, 1].
    """

    config: Config
    network: FalconNetwork
    codes: Codes
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device


def load_trained(directory: str | os.PathLike[str], device: str = "auto") -> Trained:
    """Return the network of the run in `directory` at its newest checkpoint, on `device` (auto, cpu, cuda or cuda:N).

    Raises:
        UsageError: there is no such run, no complete checkpoint or no such device, or the checkpoint is damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such run directory")
    config = load_config(directory / "config.toml")
    place = find_device(device)
    network = build_network(config, config.data.size)
    path = checkpoint.latest(directory)
    facts = checkpoint.read_facts(path)
    if config.optimizer.ema_decay:  # the averaged weights are evaluated and used
        average = WeightAverage(network, config.optimizer.ema_decay)
        checkpoint.load(path, network, extra={f"average.{name}": tensor for name, tensor in average.state().items()})
        average.swap(network)
    else:
        checkpoint.load(path, network)
    network.to(device=place, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    return Trained(config, network.eval(), build_codes(config).to(place), mean, std, place)


def evaluate(trained: Trained, data: str | os.PathLike[str] | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Evaluate a trained network on its own data, or on the images at the path `data`.

    Other images may be any folder, or the original files of a small data set, whatever the network was trained on. They are
    resized to the side of the network's own, normalised with the same mean and std, and judged by their own labels. Without
    labels there are only the collapse checks.

    Args:
        say: takes lines for the user.

    Returns:
        The figures that result.json holds.

    Raises:
        UsageError: the data cannot be opened.
    """
    config = trained.config
    if data is None:
        source = open_source(config.data)
    else:
        path = os.path.abspath(os.path.expanduser(data))
        source = open_other(path, config.data.size, config.data.source)
    source = dataclasses.replace(source, mean=trained.mean, std=trained.std)
    for note in source.notes:
        say(note)
    workers = config.data.workers if config.data.workers >= 0 else auto_workers(augmentation(config.data.augmentation))
    return evaluate_network(config, trained.network, trained.codes, source, trained.device, workers, say)


def final_network(run: Run) -> FalconNetwork:
    """Return the network to evaluate and to keep when training is over. All processes call it together.

    If the run keeps an average of the weights, the network has the averaged weights from here on. All parameters are whole.
    """
    if run.learner.average is not None:
        run.learner.average.swap(run.network)
    network, _ = run.whole()
    return network


def finish(
    run: Run, network: FalconNetwork, directory: Path, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Evaluate a trained network, and write result.json, curves.png and backbone.safetensors to `directory`.

    Args:
        network: the run's network with all its parameters (`final_network`).
        seconds: seconds that training took.
        say: takes lines for the user.

    Returns:
        The figures that result.json holds.
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
    write_json(directory / "result.json", result)  # written last, because a run with a result.json is a finished run
    return result
