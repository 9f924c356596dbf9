"""A run: everything it is made of, built from its configuration and nothing else, and put back from a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from falcon_fast.config import Config, TrainingConfig
from falcon_fast.data.loaders.choose import choose_loader
from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.loaders.workers import auto_workers
from falcon_fast.data.sources.images import Source
from falcon_fast.data.sources.opening import open_source
from falcon_fast.data.views.augmentation import Augmentation, augmentation
from falcon_fast.data.views.sampling import Clock
from falcon_fast.errors import UsageError
from falcon_fast.hardware.devices import find_device
from falcon_fast.hardware.precision import Precision, choose_precision
from falcon_fast.models.batchnorm import has_batchnorm, per_view_batchnorm, sync_batchnorm
from falcon_fast.models.network import FalconNetwork, build_codes, build_criterion, build_network
from falcon_fast.objective import FalconLoss
from falcon_fast.objective.codes import Codes
from falcon_fast.objective.frozen_start import frozen_start
from falcon_fast.training.averaging import WeightAverage
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.compiled import compile_blocks, compiled_network, compiled_objective
from falcon_fast.training.distributed.parallel import average_buffers, data_parallel, gather, shard
from falcon_fast.training.distributed.processes import Processes
from falcon_fast.training.graphed import why_not_graphed
from falcon_fast.training.optimizer import build_optimizer
from falcon_fast.training.step import Learner

# The first checkpoints do not have them.
LATER_FACTS = ("seed", "global batch", "augmentation", "view size", "model", "optimizer", "precision", "dictionary")


@dataclass
class Run:
    """The parts of a run. `network` and `probe` hold the weights; `learner` is what a step calls: the same two as the compiler
    and the strategy wrap them, and their optimiser."""

    config: Config
    source: Source
    augmentation: Augmentation
    clock: Clock
    loader: str
    device: torch.device
    precision: Precision
    network: FalconNetwork
    codes: Codes
    criterion: FalconLoss
    probe: nn.Linear | None
    notes: tuple[str, ...]
    processes: Processes = field(default_factory=Processes)
    learner: Learner = field(init=False)
    _whole: tuple[FalconNetwork, nn.Linear | None] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.assemble()

    def assemble(self) -> None:
        """Make the learner of the network and the probe as they are now; all processes together."""
        config = self.config
        network: nn.Module = self.network
        probe: nn.Module | None = self.probe
        compiled = None
        if self.sharded:
            if config.training.compile:
                compile_blocks(self.network)
            shard(self.network, self.probe, config.fsdp, self.device)
        else:
            if config.training.compile and self.processes.group is None:
                compiled = compiled_objective()
            elif config.training.compile:
                network = compiled_network(self.network)
            network = data_parallel(network, self.processes)
            probe = None if self.probe is None else data_parallel(self.probe, self.processes)
        self.learner = Learner(
            network,
            self.criterion,
            probe,
            build_optimizer(config.optimizer, self.network, self.probe, config.probe.lr),
            self.amp_dtype,
            self.precision.scaler(self.device),
            config.training.accumulate,
            config.optimizer.clip_norm,
            WeightAverage(self.network, config.optimizer.ema_decay) if config.optimizer.ema_decay else None,
            compiled,
        )

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """Of autocast; None without."""
        return self.precision.autocast

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the network has the averaged weights where the run keeps an average; afterwards its own again."""
        if (average := self.learner.average) is None:
            yield
            return
        with average.applied(self.network):
            yield

    def average_buffers(self) -> None:
        """Give every process the mean of the processes' BatchNorm statistics, of the averaged weights too."""
        average_buffers(self.network, self.processes)
        if self.learner.average is not None and self.processes.group is not None:
            with self.averaged():
                average_buffers(self.network, self.processes)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the parameters only."""
        return self.processes.group is not None and self.processes.strategy == "fsdp"

    @property
    def place(self) -> str:
        """On what it runs, and by which strategy where that is several processes."""
        world_size = self.processes.world_size
        if world_size == 1:
            return str(self.device)
        return f"{world_size} {self.device.type} processes ({self.processes.strategy})"

    def whole(self) -> tuple[FalconNetwork, nn.Linear | None]:
        """Network and probe with all their parameters, for process 0 to evaluate; all processes together.

        Sharded ones are gathered into a copy, which stays as it is while training goes on; others are the run's own.
        """
        if not self.sharded:
            return self.network, self.probe
        if self._whole is None:
            network = build_network(self.config, self.source.size)
            network.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._whole = network, build_probe(self.config, network, self.source, self.device)
        network, probe = self._whole
        gather(self.network, network)
        if self.probe is not None and probe is not None:
            gather(self.probe, probe)
        return network.eval(), probe

    @property
    def total_steps(self) -> int:
        return self.config.training.epochs * self.clock.steps_per_epoch

    @property
    def workers(self) -> int:
        asked = self.config.data.workers
        return auto_workers(self.augmentation) if asked < 0 else asked

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint holds beside config.toml, and is resumed against: what learns, and from what."""
        codes = hashlib.sha256(self.codes.words.cpu().numpy().astype("<i4").tobytes()).hexdigest()[:16]
        training, model, loss = self.config.training, self.config.model, self.config.loss
        return {
            "model": f"{model.name}, width {model.width}, stem {model.stem}, {loss.activation} to f = {loss.embedding_dim}",
            "optimizer": self.config.optimizer.name,
            "precision": self.precision.name,
            "data": self.source.fingerprint,
            "seed": training.seed,
            "global batch": training.batch_size,
            "augmentation": repr(self.augmentation),
            "view size": self.source.size,
            "dictionary": f"{loss.num_codes} {loss.codes} codes",
            "codes": codes,
            "temperature": self.config.tau,
            "mean": list(self.source.mean),
            "std": list(self.source.std),
        }


def prepare(config: Config, processes: Processes | None = None, source: Source | None = None) -> Run:
    """Open the data and build everything, in every process alike; writes nothing. Raises UsageError for what cannot work.

    source: images that are open already, in place of those that the configuration names.
    """
    processes = processes or Processes()
    if source is None:
        source = processes.main_first(lambda: open_source(config.data))
    with processes.together():
        parts = _build(config, source, processes)
    return Run(**parts, processes=processes)


def _build(config: Config, source: Source, processes: Processes) -> dict[str, Any]:
    """The parts of a run but those that the processes build together."""
    device = find_device(config.training.device)
    precision, notes = choose_precision(config.training, device)
    recipe = augmentation(config.data.augmentation)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, size=source.size))
    training = config.training
    notes += _check_accumulation(training, processes)
    if training.cuda_graph and (reason := why_not_graphed(device, processes.world_size, config.optimizer.name)):
        raise UsageError(f"--cuda-graph: {reason}; leave it out")
    clock = Clock(training.seed, len(source.train.images), training.batch_size, recipe)
    loader, loader_notes = choose_loader(config.data, source, recipe, device)
    known = dict(source.known_bad)  # too many of them are said before anything is written
    Quarantine(source.train.images, config.data.max_bad_fraction, known=known, left_out=source.left_out)

    network = build_network(config, source.size)
    averaged = training.batch_size // training.accumulate // (1 if training.sync_batchnorm else processes.world_size)
    if averaged == 1 and has_batchnorm(network):
        least = training.batch_size // averaged * 2
        raise UsageError(
            f"batch size {training.batch_size} gives BatchNorm nothing to average: use --batch-size {least} or more"
        )
    sharded = processes.group is not None and processes.strategy == "fsdp"
    if sharded and training.compile and config.fsdp.param_dtype == "bfloat16" and has_batchnorm(network.backbone):
        raise UsageError(
            "with fsdp.param_dtype=bfloat16 BatchNorm is gathered apart in float32, inside the blocks that --compile takes "
            "whole: leave one of them out"
        )
    per_view_batchnorm(network)
    if processes.group is not None and training.sync_batchnorm:
        sync_batchnorm(network, processes.group)
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    codes = build_codes(config).to(device)
    loss = config.loss
    criterion = build_criterion(config, codes, processes.group if loss.prior_scope == "global" else None)
    frozen = frozen_start(loss.embedding_dim, loss.num_codes, config.tau, loss.activation, loss.temperature_batch)
    probe = build_probe(config, network, source, device)
    return {
        "config": config,
        "source": source,
        "augmentation": recipe,
        "clock": clock,
        "loader": loader,
        "device": device,
        "precision": precision,
        "network": network,
        "codes": codes,
        "criterion": criterion,
        "probe": probe,
        "notes": source.notes + loader_notes + notes + ((frozen,) if frozen else ()),
    }


def _check_accumulation(training: TrainingConfig, processes: Processes) -> tuple[str, ...]:
    """A line on what micro-batches change. Raises UsageError for a batch that does not divide into them."""
    parts = training.accumulate * processes.world_size
    if training.batch_size % parts:
        raise UsageError(
            f"batch size {training.batch_size} does not divide into {training.accumulate} micro-batches in each of "
            f"{processes.world_size} processes: make it a multiple of {parts}"
        )
    if training.accumulate == 1:
        return ()
    micro = training.batch_size // training.accumulate
    return (
        f"--accumulate {training.accumulate}: the prior's mean assignment and BatchNorm's statistics are of each micro-batch of "
        f"{micro} images, not of all {training.batch_size}",
    )


def seed_process(run: Run, step: int) -> None:
    """Masks of dropout would otherwise be the same in every process, and after every change of their number."""
    if run.processes.rank:
        torch.manual_seed((run.config.training.seed + run.processes.rank) * 1_000_003 + step)


def build_probe(config: Config, network: FalconNetwork, source: Source, device: torch.device) -> nn.Linear | None:
    """The online linear probe at its initial weights, from `training.seed` alone; None without labels."""
    if source.train.labels is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.training.seed)
        return nn.Linear(network.backbone.num_features, len(source.classes)).to(device)  # type: ignore[arg-type]


def restore(run: Run, directory: Path) -> tuple[int, float]:
    """Put the newest checkpoint of `directory` into `run`: the steps done and the seconds they took. All processes together.

    Raises:
        UsageError: no complete checkpoint, or one made with other data, codes or temperature.
    """
    processes, path = run.processes, directory
    with processes.together():
        if processes.main:
            path = checkpoint.latest(directory)
    path = processes.from_main(path)  # a file system may not show all processes the same at once
    with processes.together():
        facts = checkpoint.read_facts(path)
        for key, value in run.facts.items():
            if key not in facts and key in LATER_FACTS:
                continue
            if facts.get(key) != value:
                raise UsageError(
                    f"cannot resume {path}: its {key} was {facts.get(key)}, now it is {value}: resume with what it had, or "
                    "begin another run"
                )
        seed_process(run, int(facts["step"]))
        checkpoint.load(
            path, run.network, run.probe, run.learner.optimizer, run.learner.extra_state(), rank=processes.rank
        )
    return int(facts["step"]), float(facts["seconds"])
