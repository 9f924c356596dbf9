"""A run: all parts that it is made of, built from its configuration and nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from falcon_fast.config import Config, as_tables
from falcon_fast.data.loaders.choose import choose_loader
from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.loaders.workers import auto_workers
from falcon_fast.data.sources.images import Source
from falcon_fast.data.sources.listing import resumed_source
from falcon_fast.data.sources.opening import open_source, root_of
from falcon_fast.data.views.augmentation import Augmentation, augmentation
from falcon_fast.data.views.sampling import Clock
from falcon_fast.errors import UsageError
from falcon_fast.hardware.cuda import installed, unused_gpu
from falcon_fast.hardware.devices import find_device
from falcon_fast.hardware.host_memory import is_out_of_memory
from falcon_fast.hardware.precision import Precision, choose_precision
from falcon_fast.models.batchnorm import has_batchnorm, per_view_batchnorm, sync_batchnorm
from falcon_fast.models.network import FalconNetwork, build_codes, build_criterion, build_network
from falcon_fast.objective import FalconLoss
from falcon_fast.objective.codes import Codes
from falcon_fast.objective.frozen_start import frozen_start
from falcon_fast.training.averaging import WeightAverage
from falcon_fast.training.compiled import compile_blocks, compiled_forward_and_loss, compiled_network
from falcon_fast.training.distributed.parallel import average_buffers, data_parallel, gather, shard
from falcon_fast.training.distributed.processes import Processes
from falcon_fast.training.graphed import why_not_graphed
from falcon_fast.training.optimizer import build_optimizer
from falcon_fast.training.requirements import check_accumulation, check_machine
from falcon_fast.training.step import Learner


@dataclass
class Run:
    """The parts of a run.

    `network` and `probe` hold the weights. `learner` is what a step calls: the same two modules, wrapped by the compiler and by
    the strategy, and their optimiser.

    Attributes:
        loader: name of the loader that the run uses, never auto.
        criterion: the loss.
        probe: the online linear probe; None without labels.
        notes: lines for the user about what is not as asked for, or not as expected.
        changes: the settings that were changed when the run was resumed, and after how many steps; see `history_of`.
        recorded: length and checksum of metrics.csv as it is now, or as it was when the restored checkpoint was written.
    """

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
    changes: list[Mapping[str, Any]] = field(default_factory=list)
    recorded: Mapping[str, Any] | None = None
    learner: Learner = field(init=False)
    _whole: tuple[FalconNetwork, nn.Linear | None] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.assemble()

    def assemble(self) -> None:
        """Make the learner from the network and the probe as they are now. All processes call it together."""
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
                compiled = compiled_forward_and_loss()
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
            self.processes.group,
        )

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """Dtype of autocast; None without autocast."""
        return self.precision.autocast

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the network the averaged weights inside the context, if the run keeps an average; afterwards its own again."""
        if (average := self.learner.average) is None:
            yield
            return
        with average.applied(self.network):
            yield

    def average_buffers(self) -> None:
        """Give every process the mean of all processes' BatchNorm statistics, also of those of the averaged weights."""
        average_buffers(self.network, self.processes)
        if self.learner.average is not None and self.processes.group is not None:
            with self.averaged():
                average_buffers(self.network, self.processes)

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of the parameters."""
        return self.processes.group is not None and self.processes.strategy == "fsdp"

    @property
    def place(self) -> str:
        """The device, or with several processes their number, kind and strategy."""
        world_size = self.processes.world_size
        if world_size == 1:
            return str(self.device)
        return f"{world_size} {self.device.type} processes ({self.processes.strategy})"

    def whole(self) -> tuple[FalconNetwork, nn.Linear | None]:
        """Return network and probe with all their parameters, for process 0 to evaluate. All processes call it together.

        Sharded modules are gathered into a copy, which does not change while training continues; otherwise these are the run's
        own modules.
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
        """The facts that a checkpoint holds: about model and data, which must be the same when it is resumed, all settings, and
        the changes of settings so far.
        """
        codes = hashlib.sha256(self.codes.words.cpu().numpy().astype("<i4").tobytes()).hexdigest()[:16]
        training, model, loss = self.config.training, self.config.model, self.config.loss
        start = (
            "" if model.initialisation == "timm" else f"initialised as {model.initialisation}, "
        )  # old ones say nothing
        shape = f"{model.name}, width {model.width}, stem {model.stem}"
        return {
            "model": f"{shape}, {start}{loss.activation} to f = {loss.embedding_dim}",
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
            "settings": as_tables(self.config),
            "changes": list(self.changes),
            "metrics": self.recorded,
        }


def prepare(
    config: Config, processes: Processes | None = None, source: Source | None = None, listing: Path | None = None
) -> Run:
    """Open the data and build all parts of a run, the same in every process. Nothing is written.

    Args:
        processes: the processes of the run; None for a run of one process.
        source: images that are open already, used in place of those that the configuration names.
        listing: the list of the images of the run that is resumed, which may be missing; None for a new run.

    Raises:
        UsageError: the configuration cannot work with this data, this device or these processes.
        TemporaryError: the disk of the images cannot be read.
    """
    processes = processes or Processes()

    def opened() -> Source:
        if listing is None:
            return open_source(config.data)
        return resumed_source(lambda: open_source(config.data), listing, root_of(config.data))

    if source is None:
        source = processes.main_first(opened)
    with processes.together():
        try:
            parts = _build(config, source, processes)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UsageError(
                f"there is not enough memory to build {config.model.name} with f = {config.loss.embedding_dim} and "
                f"c = {config.loss.num_codes}: use a smaller model, --embedding-dim or --num-codes"
            ) from None
    return Run(**parts, processes=processes)


def _build(config: Config, source: Source, processes: Processes) -> dict[str, Any]:
    """Build the parts of a run, except those that the processes build together."""
    device = find_device(config.training.device)
    precision, notes = choose_precision(config.training, device)
    if (
        device.type == "cpu" and config.training.device == "auto"
    ):  # a GPU that cannot be used must not be passed over in silence
        notes += tuple(f"training on the CPU: {line}" for line in unused_gpu(installed()))
    recipe = augmentation(config.data.augmentation)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, size=source.size))
    training = config.training
    notes += check_accumulation(training, processes)
    if training.cuda_graph and (reason := why_not_graphed(device, processes.world_size, config.optimizer.name)):
        raise UsageError(f"--cuda-graph: {reason}; leave it out")
    clock = Clock(training.seed, len(source.train.images), training.batch_size, recipe)
    loader, loader_notes = choose_loader(config.data, source, recipe, device)
    known = dict(source.known_bad)  # if there are too many, the user learns it before anything is written
    Quarantine(source.train.images, config.data.max_bad_fraction, known=known)

    check_machine(config, source.size, device, processes)
    network = build_network(config, source.size)
    averaged = training.batch_size // training.accumulate // (1 if training.sync_batchnorm else processes.world_size)
    if averaged == 1 and has_batchnorm(network):
        least = training.batch_size // averaged * 2
        raise UsageError(
            f"batch size {training.batch_size} leaves BatchNorm one image to average over: use --batch-size {least} or more"
        )
    sharded = processes.group is not None and processes.strategy == "fsdp"
    if sharded and training.compile and config.fsdp.param_dtype == "bfloat16" and has_batchnorm(network.backbone):
        raise UsageError(
            "--compile and fsdp.param_dtype=bfloat16 conflict for networks with BatchNorm: FSDP gathers BatchNorm separately in "
            "float32, inside the blocks that --compile compiles as a whole; drop one of them"
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


def seed_process(run: Run, step: int) -> None:
    """Seed the random state of every process but process 0 for the steps from `step` on.

    Otherwise the masks of dropout would be the same in every process, and again after each change of their number.
    """
    if run.processes.rank:
        torch.manual_seed(((run.config.training.seed + run.processes.rank) * 1_000_003 + step) % 2**63)


def build_probe(config: Config, network: FalconNetwork, source: Source, device: torch.device) -> nn.Linear | None:
    """Return the online linear probe with its initial weights, which depend on `training.seed` alone; None without labels."""
    if source.train.labels is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.training.seed)
        return nn.Linear(network.backbone.num_features, len(source.classes)).to(device)  # type: ignore[arg-type]
