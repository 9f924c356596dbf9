"""A run directory: made empty, filled by training, and what is left there in the end.

config.toml            the resolved configuration
metrics.csv            a row a logged step (columns: falcon_fast/training/console.py)
checkpoints/           the newest complete checkpoints
result.json            the figures of the final evaluation
curves.png             loss, codes in use, online probe and NMI against epochs
backbone.safetensors   the trained backbone alone, without projector
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from falcon_fast.config import Config, dump_config, load_config
from falcon_fast.devices import find_device
from falcon_fast.errors import UsageError
from falcon_fast.evaluation.protocol import evaluate_network
from falcon_fast.evaluation.report import plot_curves
from falcon_fast.models import FalconNetwork, build_codes, build_network
from falcon_fast.objective.codes import Codes
from falcon_fast.training import checkpoint
from falcon_fast.training.trainer import Run


def create_run_directory(path: Path, config: Config) -> None:
    """Make an empty run directory and put config.toml there. Raises UsageError when it has contents or cannot be written."""
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"run directory {path} is not empty: choose another, or continue it with --resume {path}")
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.toml").write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"run directory {path} cannot be written: {error.strerror}") from None


def load_trained(directory: Path, device: str = "auto") -> tuple[Config, FalconNetwork, Codes]:
    """A run's configuration, its network at the newest checkpoint (evaluation mode), and its dictionary, on `device`.

    Raises:
        UsageError: no such run, no complete checkpoint, a damaged one, or a device that is not there.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such run directory")
    config = load_config(directory / "config.toml")
    place = find_device(device)
    network = build_network(config, config.data.size)
    path = checkpoint.latest(directory)
    checkpoint.read_facts(path)
    checkpoint.load(path, network)
    network.to(device=place, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return config, network.eval(), build_codes(config).to(place)


def finish(run: Run, directory: Path, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Evaluate a trained run and leave result.json, curves.png and backbone.safetensors in `directory`; returns the result."""
    from safetensors.torch import save_file

    result = evaluate_network(run.config, run.network, run.codes, run.source, run.device, run.workers, say)
    images = run.total_steps * run.config.training.batch_size
    result |= {"seconds": seconds, "images_per_second": images / seconds if seconds > 0 else 0.0}
    plot_curves(directory / "metrics.csv", directory / "curves.png")
    weights = {k: v.contiguous() for k, v in run.network.backbone.state_dict().items()}
    partial = directory / ".backbone.safetensors.partial"
    save_file(weights, partial, metadata={"model": run.config.model.name, "image_size": str(run.source.size)})
    partial.replace(directory / "backbone.safetensors")
    write_json(directory / "result.json", result)  # last: a run with a result is a finished run
    return result


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; NaN and infinity become null, which every JSON reader takes."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return None if isinstance(x, float) and not math.isfinite(x) else x

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(plain(value), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
