"""The configuration of a run: one tree of frozen dataclasses, read from a recipe, overridden, validated, and saved with the run.

A recipe is a TOML file of the package (`falcon_fast/recipes/`) with the settings that differ from the defaults below. Every
setting can be overridden by its name `section.key`. The resolved tree is written to the run directory as `config.toml`, which
can be read again.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from falcon_fast.errors import UsageError
from falcon_fast.kernels import IMPLEMENTATIONS as LOSS_IMPLEMENTATIONS
from falcon_fast.objective import temperature
from falcon_fast.objective.loss import PLANS, PRIORS
from falcon_fast.objective.projector import ACTIVATIONS

LOADERS = ("auto", "dali", "resident", "workers", "synthetic")
PHOTOMETRIC = ("auto", "eager", "cpu", "compiled", "triton")
SOURCES = ("digits", "cifar10", "cifar100", "svhn", "imagenet100", "folder")
DICTIONARIES = ("rademacher", "hadamard")
OPTIMIZERS = ("adam", "adamw", "sgd", "lars")
# auto: float32, with torch's own switches for TF32 left as they are (convolutions on a GPU are TF32, matrix products are not);
# float32: no TF32 anywhere; tf32: TF32 for convolutions and matrix products (NVIDIA GPUs, Ampere or newer);
# bf16: bfloat16 autocast; fp16: float16 autocast with scaled gradients.
PRECISIONS = ("auto", "float32", "tf32", "bf16", "fp16")
IMPLEMENTATIONS = ("auto", *LOSS_IMPLEMENTATIONS)
STRATEGIES = ("auto", "single", "ddp", "fsdp")
PARAM_DTYPES = ("float32", "bfloat16")
PRIOR_SCOPES = ("global", "local")
STEMS = ("auto", "cifar", "cifar-padded", "imagenet")


@dataclass(frozen=True)
class DataConfig:
    source: str = "folder"  # what reads the images: one of SOURCES
    path: str = ""  # where the images are; digits needs none
    size: int = (
        0  # side of a view in pixels; 0: the size of the source (folder: 224, or less if the images are smaller)
    )
    augmentation: str = "imagenet-asymmetric"
    loader: str = "auto"  # auto: resident if the images fit, else DALI for image files, else workers
    resident_mib: int = 2048  # largest decoded data set, in MiB, that may be kept on the device
    # Processes that decode and crop; -1: none for affine augmentations (digits), else one for each core but one, at most 16.
    workers: int = -1
    # Implementation of the colours, from jitter to normalisation: eager, cpu (C++), compiled or triton; auto: cpu on a CPU,
    # compiled on a GPU.
    photometric: str = "auto"
    max_bad_fraction: float = (
        0.01  # share of the training images that may be unreadable; one always may, unless this is 0
    )
    # Largest width times height of an image, which takes 4 to 12 bytes per pixel while it is decoded; larger ones count as
    # unreadable.
    max_pixels: int = 178_956_970


@dataclass(frozen=True)
class ModelConfig:
    name: str = "resnet18"  # resnet8, or any name that timm knows
    width: int = 32  # channels in the first stage of resnet8, which has four times as many features
    # Stem of a ResNet; auto: cifar up to 64 px, else imagenet; cifar-padded: conv1 with padding 2, as published.
    stem: str = "auto"


@dataclass(frozen=True)
class LossConfig:
    codes: str = "rademacher"  # the dictionary: one of DICTIONARIES
    num_codes: int = 16384  # c
    embedding_dim: int = 2048  # f
    activation: str = "tanh"  # of the embeddings: tanh or l2
    # Batch size in the temperature formula, whatever the batch is; a smaller value gives a softer softmax.
    temperature_batch: int = 64
    epsilon: float = 1e-8  # probability of each other code in an optimal assignment (temperature formula)
    beta: float = 1.0  # weight of the invariance term
    prior: str = "reverse"  # direction of the prior's KL divergence: reverse or forward
    # The mean assignment of the prior is computed over all processes (global), or over each process's own share (local, as
    # published).
    prior_scope: str = "global"
    implementation: str = "auto"  # of the loss: one of IMPLEMENTATIONS
    # What is done with the N x c logits: stored, streaming (computed again), or auto: the faster plan that fits the budget.
    plan: str = "auto"
    # MiB that the loss may hold in addition to its inputs and the dictionary; 0: the default budget of `plan = "auto"`.
    memory_budget: int = 0


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9  # for sgd and lars
    warmup_epochs: float = 0.0
    warmup_lr: float = 3e-5  # learning rate at the start of the warm-up
    exclude_bias_and_norm: bool = False  # from weight decay; lars always excludes them, also from its scaling
    clip_norm: float = 0.0  # largest norm of the network's gradient; 0: no clipping
    ema_decay: float = 0.0  # decay of an average of the weights, which is then evaluated and kept; 0: no average


@dataclass(frozen=True)
class ProbeConfig:
    """The online linear probe: trained at the same time as the network on detached features, only for the curves."""

    lr: float = 1e-2


@dataclass(frozen=True)
class TrainingConfig:
    epochs: int = 100
    batch_size: int = 256  # images in a step, over all processes; each gives two views
    accumulate: int = 1  # micro-batches in a step, one after the other; the prior and BatchNorm see one at a time
    precision: str = "auto"  # one of PRECISIONS, where their meanings are listed
    compile: bool = False  # compile network, loss and probe as one graph with torch.compile
    cuda_graph: bool = False  # launch the whole step as one CUDA graph, on one GPU
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto: the GPU if there is one
    strategy: str = "auto"  # single, ddp or fsdp; auto: ddp where torchrun started several processes, else single
    # BatchNorm's statistics are computed over all processes; if false, over each process's own share, which saves one all-reduce
    # for each layer.
    sync_batchnorm: bool = True
    timeout: int = 600  # seconds that a process waits in a step for another process before it gives up


@dataclass(frozen=True)
class FsdpConfig:
    """Settings of `training.strategy = "fsdp"`; other strategies ignore them."""

    reshard_after_forward: bool = (
        False  # free the gathered parameters between forward and backward: less memory, more time
    )
    param_dtype: str = "float32"  # dtype that the blocks compute in; their shards, moments and reductions are float32


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = 10  # steps from one row of metrics.csv to the next
    tensorboard: bool = True  # also write the rows as events to RUN/tensorboard
    evaluate_epochs: int = (
        1  # epochs from one test of the online probe and the clustering to the next; 0: at the end only
    )


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 0  # steps from one checkpoint to the next; 0: one at the end of each epoch
    keep: int = 2  # how many of the newest checkpoints stay
    asynchronous: bool = True  # write in the background while training continues, from a copy in the host's memory


@dataclass(frozen=True)
class Config:
    recipe: str = "folder"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def tau(self) -> float:
        """The run's temperature, the same in training and evaluation."""
        loss = self.loss
        return temperature(loss.embedding_dim, loss.num_codes, loss.temperature_batch, loss.epsilon)


SECTIONS: dict[str, type[Any]] = {name: kind for name, kind in get_type_hints(Config).items() if name != "recipe"}


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint for a mistyped name: the nearest valid name, or all valid names if none is near and they are few."""
    valid = sorted(valid)
    few = len(valid) <= 12
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5 if few else 0.0)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(valid)}"


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package, sorted."""
    return sorted(
        p.name.removesuffix(".toml")
        for p in resources.files("falcon_fast.recipes").iterdir()
        if p.name.endswith(".toml")
    )


def recipe_description(name: str) -> str:
    """Return the one-line description of a recipe."""
    return str(_recipe_tables(name)["description"])


def _recipe_tables(name: str) -> dict[str, Any]:
    if name not in recipe_names():
        raise UsageError(f"unknown recipe {name!r}: {nearest(name, recipe_names())}")
    return tomllib.loads((resources.files("falcon_fast.recipes") / f"{name}.toml").read_text(encoding="utf-8"))


def load_recipe(name: str) -> Config:
    """Return the configuration of a recipe of the package. Raises UsageError, with the nearest name, if it is unknown."""
    tables = _recipe_tables(name)
    tables.pop("description")
    return _from_tables({"recipe": name, **tables}, where=f"recipe {name}")


def load_config(path: Path) -> Config:
    """Read the configuration of a run, as `dump_config` wrote it.

    Raises:
        UsageError: the file is missing or not valid.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    return validate(_from_tables(_translated(tables), where=str(path)))


def _translated(tables: dict[str, Any]) -> dict[str, Any]:
    """Replace `training.amp`, which config.toml of older runs holds, by the `training.precision` that it meant."""
    training = tables.get("training")
    if not isinstance(training, dict) or "amp" not in training:
        return tables
    training = dict(training)
    amp, precision = _checked("training.amp", training.pop("amp"), bool), training.get("precision", "auto")
    if amp and precision not in ("auto", "bf16"):
        raise UsageError(f"training.amp = true and training.precision = {precision!r} conflict: remove training.amp")
    if amp:
        training["precision"] = "bf16"
    return {**tables, "training": training}


def _from_tables(tables: Mapping[str, Any], where: str) -> Config:
    values: dict[str, Any] = {}
    for section, table in tables.items():
        if section == "recipe":
            values[section] = _checked("recipe", table, str)
            continue
        if section not in SECTIONS:
            raise UsageError(f"{where}: unknown section {section!r}: {nearest(section, SECTIONS)}")
        if not isinstance(table, Mapping):
            raise UsageError(f"{where}: {section} must be a table, [{section}], not {table!r}")
        cls = SECTIONS[section]
        types = get_type_hints(cls)
        for key in table:
            if key not in types:
                raise UsageError(f"{where}: unknown key {section}.{key}: {nearest(key, types)}")
        values[section] = cls(**{key: _checked(f"{section}.{key}", value, types[key]) for key, value in table.items()})
    return Config(**values)


def _checked(key: str, value: Any, kind: type) -> Any:
    """Return `value` as a `kind`. Raises UsageError if it has another type; only an int is accepted as a float."""
    if type(value) is int and not -(2**63) <= value < 2**63:  # the limits of TOML's integers and of torch's seeds
        raise UsageError(f"{key} must fit into 64 bits")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"{key} must be {_KIND_NAMES[kind]}, not {value!r}")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        # A file name that is not UTF-8 arrives with surrogates, which a TOML file cannot hold.
        raise UsageError(f"{key} must be UTF-8 text, not {value!r}: rename the folder or link to it")
    return value


_KIND_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def _unknown(name: str) -> UsageError:
    """Return the error for a setting that does not exist, with the name that was probably meant."""
    replaced = name == "training.amp"  # a setting of development versions
    return UsageError(
        f"unknown setting {name!r}: {'use training.precision=bf16, or --amp' if replaced else nearest(name, _all_keys())}"
    )


def override(config: Config, assignments: Mapping[str, Any]) -> Config:
    """Return `config` with other values for some settings.

    assignments: `section.key` to a value of the setting's own type.

    Raises:
        UsageError: a setting is unknown, or its value has another type.
    """
    for name, value in assignments.items():
        section, _, key = name.partition(".")
        if section not in SECTIONS:
            raise _unknown(name)
        types = get_type_hints(SECTIONS[section])
        if key not in types:
            raise _unknown(name)
        part = dataclasses.replace(getattr(config, section), **{key: _checked(name, value, types[key])})
        config = dataclasses.replace(config, **{section: part})
    return config


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return name and value of `section.key=value`, as typed on a command line. The value is read as the setting's type.

    Raises:
        UsageError: there is no `=`, the setting is unknown, or the value has another type.
    """
    name, equals, raw = text.partition("=")
    name, raw = name.strip(), raw.strip()
    if not equals:
        raise UsageError(f"--set takes section.key=value, not {text!r}")
    section, _, key = name.partition(".")
    kind = get_type_hints(SECTIONS[section]).get(key) if section in SECTIONS else None
    if kind is None:
        raise _unknown(name)
    try:
        if kind is bool:
            return name, {"true": True, "false": False, "1": True, "0": False}[raw.lower()]
        return name, kind(raw)
    except (ValueError, KeyError):
        raise UsageError(f"{name} must be {_KIND_NAMES[kind]}, not {raw!r}") from None


def _all_keys() -> list[str]:
    return [f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)]


def validate(config: Config) -> Config:
    """Return `config` after checking every value that can be checked without the data and the device.

    Raises:
        UsageError: names the first setting that is wrong.
    """
    data, model, loss, optimizer = config.data, config.model, config.loss, config.optimizer
    training, log, checkpoint = config.training, config.log, config.checkpoint
    for key, value, valid in (
        ("data.source", data.source, SOURCES),
        ("data.loader", data.loader, LOADERS),
        ("data.photometric", data.photometric, PHOTOMETRIC),
        ("model.stem", model.stem, STEMS),
        ("loss.codes", loss.codes, DICTIONARIES),
        ("loss.activation", loss.activation, ACTIVATIONS),
        ("loss.prior", loss.prior, PRIORS),
        ("loss.implementation", loss.implementation, IMPLEMENTATIONS),
        ("loss.prior_scope", loss.prior_scope, PRIOR_SCOPES),
        ("loss.plan", loss.plan, PLANS),
        ("optimizer.name", optimizer.name, OPTIMIZERS),
        ("training.strategy", training.strategy, STRATEGIES),
        ("training.precision", training.precision, PRECISIONS),
        ("fsdp.param_dtype", config.fsdp.param_dtype, PARAM_DTYPES),
    ):
        if value not in valid:
            raise UsageError(f"unknown {key} {value!r}: {nearest(value, valid)}")
    for key, number, least in (
        ("data.size", data.size, 0),
        ("data.workers", data.workers, -1),
        ("data.resident_mib", data.resident_mib, 0),
        ("data.max_bad_fraction", data.max_bad_fraction, 0),
        ("data.max_pixels", data.max_pixels, 1),
        ("model.width", model.width, 1),
        ("loss.temperature_batch", loss.temperature_batch, 1),
        ("loss.beta", loss.beta, 0),
        ("loss.memory_budget", loss.memory_budget, 0),
        ("optimizer.lr", optimizer.lr, 0),
        ("optimizer.weight_decay", optimizer.weight_decay, 0),
        ("optimizer.warmup_epochs", optimizer.warmup_epochs, 0),
        ("optimizer.warmup_lr", optimizer.warmup_lr, 0),
        ("optimizer.clip_norm", optimizer.clip_norm, 0),
        ("probe.lr", config.probe.lr, 0),
        ("training.epochs", training.epochs, 0),
        ("training.batch_size", training.batch_size, 1),
        ("training.accumulate", training.accumulate, 1),
        ("training.seed", training.seed, 0),
        ("training.timeout", training.timeout, 1),
        ("log.every_steps", log.every_steps, 1),
        ("log.evaluate_epochs", log.evaluate_epochs, 0),
        ("checkpoint.every_steps", checkpoint.every_steps, 0),
        ("checkpoint.keep", checkpoint.keep, 1),
    ):
        if not math.isfinite(number) or number < least:
            raise UsageError(f"{key} must be at least {least}, not {number}")
    if not optimizer.lr > 0:  # the schedule multiplies it
        raise UsageError(f"optimizer.lr must be above 0, not {optimizer.lr}")
    if not 0 <= optimizer.momentum < 1:
        raise UsageError(f"optimizer.momentum must be in [0, 1), not {optimizer.momentum}")
    if not 0 <= optimizer.ema_decay < 1:
        raise UsageError(f"optimizer.ema_decay must be in [0, 1), not {optimizer.ema_decay}")
    if training.precision == "fp16" and training.strategy == "fsdp" and config.fsdp.param_dtype == "bfloat16":
        raise UsageError("--precision fp16 and fsdp.param_dtype=bfloat16 conflict: set fsdp.param_dtype=float32")
    f, c = loss.embedding_dim, loss.num_codes
    if loss.codes == "hadamard" and (f < 1 or f & (f - 1) or c % f):
        raise UsageError(
            f"Hadamard codes need an embedding dimension that is a power of two and divides the number of codes, not {f} and "
            f"{c}: change --embedding-dim or --num-codes, or use --codes rademacher"
        )
    try:
        temperature(f, c, loss.temperature_batch, loss.epsilon)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return config


def _toml(value: str | int | float | bool) -> str:
    """Return a value as TOML: JSON's integers, booleans and finite floats are valid TOML, and so are strings without a DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def dump_config(config: Config) -> str:
    """Return the whole configuration as TOML text, which `load_config` reads."""
    lines = [f"recipe = {_toml(config.recipe)}"]
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        lines += [f"{k} = {_toml(v)}" for k, v in dataclasses.asdict(getattr(config, section)).items()]
    return "\n".join(lines) + "\n"
