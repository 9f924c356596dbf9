"""The results of a run: the trained network, loaded and evaluated again, and the files that are written after training."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from falcon_fast.config import Config, load_config, nearest
from falcon_fast.data.loaders.workers import auto_workers
from falcon_fast.data.sources.opening import open_other, open_source
from falcon_fast.data.views.augmentation import augmentation
from falcon_fast.errors import UsageError, WriteError
from falcon_fast.evaluation.protocol import evaluate_network
from falcon_fast.evaluation.published import check_published, published_nmi
from falcon_fast.evaluation.report import plot_curves
from falcon_fast.files import written_whole
from falcon_fast.hardware.devices import find_device
from falcon_fast.models.exported import TrainedBackbone, backbone_metadata, load_backbone
from falcon_fast.models.network import FalconNetwork, build_codes, build_network
from falcon_fast.objective.codes import Codes
from falcon_fast.reading import one_line
from falcon_fast.runs.directory import check_is_directory, write_json
from falcon_fast.runs.resuming import fitting, trained_settings
from falcon_fast.training.averaging import WeightAverage
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.run import Run


@dataclass(frozen=True)
class Trained:
    """A trained network in evaluation mode, with everything that its use depends on.

    Attributes:
        codes: the dictionary of the run; its temperature is `config.tau`.
        mean, std: of each channel, which normalise images with pixels in [0, 1].
        notes: lines about newer checkpoints that could not be used, and about edits of config.toml that do not apply.
    """

    config: Config
    network: FalconNetwork
    codes: Codes
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    notes: tuple[str, ...] = ()


def load_trained(path: str | os.PathLike[str], device: str = "auto") -> Trained | TrainedBackbone:
    """Return what a run has learned, on `device` (auto, cpu, cuda or cuda:N).

    Args:
        path: a run directory, for the network at its newest checkpoint (`load_run`), or a `backbone.safetensors`, for the
            backbone alone. The file needs nothing else.

    Raises:
        UsageError: there is nothing at `path`, or it is damaged, or there is no such device.
    """
    return load_backbone(path, find_device(device)) if Path(path).is_file() else load_run(path, device)


def load_run(directory: str | os.PathLike[str], device: str = "auto") -> Trained:
    """Return the network of the run in `directory` at its newest whole checkpoint, on `device` (auto, cpu, cuda or cuda:N).

    Raises:
        UsageError: there is no such run, no complete checkpoint or no such device, or the checkpoint is damaged.
    """
    directory = Path(directory)
    check_is_directory(directory, str(directory))
    edited = load_config(directory / "config.toml")
    place = find_device(device)
    selected = fitting(directory, edited)
    config, edits = trained_settings(selected, edited)
    path, facts = selected.path, selected.facts
    if "mean" not in facts or "std" not in facts:
        raise UsageError(f"checkpoint {path} is damaged (run.json names no mean or std): use another run")
    network = _network_of(config, directory, path)
    if config.optimizer.ema_decay:  # the averaged weights are evaluated and used
        average = WeightAverage(network, config.optimizer.ema_decay)
        checkpoint.load(path, network, extra={f"average.{name}": tensor for name, tensor in average.state().items()})
        average.swap(network)
    else:
        checkpoint.load(path, network)
    network.to(device=place, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    notes = (*selected.notes(), *edits)
    return Trained(config, network.eval(), build_codes(config).to(place), mean, std, place, notes)


def _network_of(config: Config, directory: Path, path: Path) -> FalconNetwork:
    """Return the network that `config` describes, after checking that checkpoint `path` holds such a one.

    The check is made on the meta device, where a network takes no memory: the config.toml of a stranger may ask for any size, and
    what the checkpoint holds is no larger than its files.
    """
    try:
        with torch.device("meta"):
            outline = build_network(config, config.data.size)
    except UsageError:
        raise
    except Exception as error:  # torch raises many types where a number is too large
        raise UsageError(
            f"{directory / 'config.toml'} describes a network that cannot be built ({one_line(error)})"
        ) from None
    checkpoint.check_network(path, outline)
    return build_network(config, config.data.size)


PROTOCOLS = ("standard", "published")


def evaluate(
    trained: Trained, data: str | os.PathLike[str] | None, say: Callable[[str], None], protocol: str = "standard"
) -> dict[str, Any]:
    """Evaluate a trained network on its own data, or on the images at the path `data`.

    Other images may be any folder, or the original files of a small data set, whatever the network was trained on. They are
    resized to the side of the network's own, normalised with the same mean and std, and judged by their own labels. Without
    labels there are only the collapse checks.

    Args:
        say: takes lines for the user.
        protocol: standard: everything in evaluation mode; published: also the NMI of the codes as the published code measures it.

    Returns:
        The figures that result.json holds, and with the published protocol `published` (`published_nmi`).

    Raises:
        UsageError: the data cannot be opened, the protocol is unknown or does not fit the data.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"unknown --protocol {protocol!r}: {nearest(protocol, PROTOCOLS)}")
    config = trained.config
    if data is None:
        source = open_source(config.data)
    else:
        path = os.path.abspath(os.path.expanduser(data))
        source = open_other(path, config.data.size, config.data.source)
    source = dataclasses.replace(source, mean=trained.mean, std=trained.std)
    for note in (*trained.notes, *source.notes):
        say(note)
    if protocol == "published":  # before the evaluation, which may take long
        check_published(source)
    workers = config.data.workers if config.data.workers >= 0 else auto_workers(augmentation(config.data.augmentation))
    result = evaluate_network(config, trained.network, trained.codes, source, trained.device, workers, say)
    if protocol == "published":
        result["published"] = published_nmi(trained.network, trained.codes, source, trained.device, workers)
    return result


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

    Raises:
        WriteError: result.json or backbone.safetensors cannot be written. (Without a picture the run is finished, too.)
    """
    from safetensors.torch import save_file

    result = evaluate_network(run.config, network, run.codes, run.source, run.device, run.workers, say)
    images = run.total_steps * run.config.training.batch_size
    result |= {"seconds": seconds, "images_per_second": images / seconds if seconds > 0 else 0.0}
    if run.changes:
        result["changes"] = run.changes
    try:
        plot_curves(directory / "metrics.csv", directory / "curves.png")
    except (UsageError, WriteError) as error:  # the picture can be drawn again, and the figures matter more
        say(f"no picture of the curves: {error}")
    weights = {k: v.contiguous() for k, v in network.backbone.state_dict().items()}
    source = run.source
    metadata = backbone_metadata(run.config.model, network.backbone, source.size, source.mean, source.std)
    size = sum(tensor.nbytes for tensor in weights.values())
    with written_whole(directory / "backbone.safetensors", size) as partial:
        save_file(weights, partial, metadata=metadata)
    write_json(directory / "result.json", result)  # written last, because a run with a result.json is a finished run
    return result
