"""The settings of a run: one tree of frozen dataclasses, a section for each part of a run.

A new setting is one line here: its type, its default, and whether a resumed run may change it (`free`, `asked`, `fixed`). The
command line, config.toml, the comparison at a resume and the reference pages follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar, get_type_hints

from falcon_fast.kernels import IMPLEMENTATIONS as LOSS_IMPLEMENTATIONS
from falcon_fast.objective import temperature

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
INITIALISATIONS = ("timm", "torchvision")


T = TypeVar("T")


class OnResume(Enum):
    """Whether a setting may change when a run that has begun is resumed."""

    FREE = "may change: it does not change what is learned, or only how long"
    ASKED = "changes what is learned: --allow-change must name it"
    FIXED = "cannot change: the network, its data or the count of steps would be others"


def free(default: T) -> T:
    """Declare a setting that a resumed run may change without being asked."""
    return field(default=default, metadata={"resume": OnResume.FREE})


def asked(default: T) -> T:
    """Declare a setting that a resumed run changes only if `--allow-change` names it."""
    return field(default=default, metadata={"resume": OnResume.ASKED})


def fixed(default: T) -> T:
    """Declare a setting that a resumed run cannot change."""
    return field(default=default, metadata={"resume": OnResume.FIXED})


@dataclass(frozen=True)
class DataConfig:
    source: str = fixed("folder")  # what reads the images: one of SOURCES
    path: str = free("")  # where the images are; digits needs none
    # Folder of the training images, relative to `path` (`.` for all of it); empty: found by its name (train, Training, ...).
    train: str = free("")
    # Folder of the test images, relative to `path`; none: hold out a tenth; empty: found by its name (test, val, ...).
    test: str = free("")
    # side of a view in pixels; 0: the size of the source (folder: 224, or less if the images are smaller)
    size: int = fixed(0)
    augmentation: str = asked("imagenet-asymmetric")
    loader: str = free("auto")  # auto: resident if the images fit, else DALI for image files, else workers
    resident_mib: int = free(2048)  # largest decoded data set, in MiB, that may be kept on the device
    # Processes that decode and crop; -1: none for affine augmentations (digits), else one for each core but one, at most 16.
    workers: int = free(-1)
    # Implementation of the colours, from jitter to normalisation: eager, cpu (C++), compiled or triton; auto: cpu on a CPU,
    # compiled on a GPU.
    photometric: str = free("auto")
    # share of the training images that may be unreadable; one always may, unless this is 0
    max_bad_fraction: float = free(0.01)
    # Largest width times height of an image, which takes 4 to 12 bytes per pixel while it is decoded; larger ones count as
    # unreadable.
    max_pixels: int = free(178_956_970)


@dataclass(frozen=True)
class ModelConfig:
    name: str = fixed("resnet18")  # resnet8, or any name that timm knows
    width: int = fixed(32)  # channels in the first stage of resnet8, which has four times as many features
    # Stem of a ResNet; auto: cifar up to 64 px, else imagenet; cifar-padded: conv1 with padding 2, as published.
    stem: str = fixed("auto")
    # Initial weights. timm: the last BatchNorm scale of each residual block is 0; torchvision: it is 1, and a CIFAR stem has
    # torch's default of a convolution, as published (ResNets of torchvision only).
    initialisation: str = fixed("timm")


@dataclass(frozen=True)
class LossConfig:
    codes: str = fixed("rademacher")  # the dictionary: one of DICTIONARIES
    num_codes: int = fixed(16384)  # c
    embedding_dim: int = fixed(2048)  # f
    activation: str = fixed("tanh")  # of the embeddings: tanh or l2
    # Batch size in the temperature formula, whatever the batch is; a smaller value gives a softer softmax.
    temperature_batch: int = asked(64)
    epsilon: float = asked(1e-8)  # probability of each other code in an optimal assignment (temperature formula)
    beta: float = asked(1.0)  # weight of the invariance term
    prior: str = asked("reverse")  # direction of the prior's KL divergence: reverse or forward
    # The mean assignment of the prior is computed over all processes (global), or over each process's own share (local, as
    # published).
    prior_scope: str = asked("global")
    implementation: str = free("auto")  # of the loss: one of IMPLEMENTATIONS
    # What is done with the N x c logits: stored, streaming (computed again), or auto: the faster plan that fits the budget.
    plan: str = free("auto")
    # MiB that the loss may hold in addition to its inputs and the dictionary; 0: the default budget of `plan = "auto"`.
    memory_budget: int = free(0)


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = fixed("adamw")
    lr: float = asked(1e-3)
    weight_decay: float = asked(1e-4)
    momentum: float = asked(0.9)  # for sgd and lars
    warmup_epochs: float = asked(0.0)
    warmup_lr: float = asked(3e-5)  # learning rate at the start of the warm-up
    exclude_bias_and_norm: bool = asked(False)  # from weight decay; lars always excludes them, also from its scaling
    clip_norm: float = asked(0.0)  # largest norm of the network's gradient; 0: no clipping
    ema_decay: float = asked(0.0)  # decay of an average of the weights, which is then evaluated and kept; 0: no average


@dataclass(frozen=True)
class ProbeConfig:
    """The online linear probe: trained at the same time as the network on detached features, only for the curves."""

    lr: float = asked(1e-2)


@dataclass(frozen=True)
class TrainingConfig:
    epochs: int = free(100)
    batch_size: int = fixed(256)  # images in a step, over all processes; each gives two views
    # micro-batches in a step, one after the other; the prior and BatchNorm see one at a time
    accumulate: int = asked(1)
    precision: str = asked("auto")  # one of PRECISIONS, where their meanings are listed
    compile: bool = free(False)  # compile network, loss and probe as one graph with torch.compile
    cuda_graph: bool = free(False)  # launch the whole step as one CUDA graph, on one GPU
    seed: int = fixed(0)
    device: str = free("auto")  # auto, cpu, cuda or cuda:N; auto: the GPU if there is one
    # Threads of a CPU's operations; 0: OMP_NUM_THREADS, or else as many as other programs leave free while training.
    threads: int = free(0)
    strategy: str = free("auto")  # single, ddp or fsdp; auto: ddp where torchrun started several processes, else single
    # BatchNorm's statistics are computed over all processes; if false, over each process's own share, which saves one all-reduce
    # for each layer.
    sync_batchnorm: bool = asked(True)
    # run directory whose newest checkpoint gives the network its initial weights; empty: random weights
    init_from: str = fixed("")
    # Steps in a row whose loss or gradient is not finite, after which the run ends; such a step changes nothing.
    max_bad_steps: int = free(10)
    timeout: int = free(600)  # seconds that a process waits in a step for another process before it gives up


@dataclass(frozen=True)
class FsdpConfig:
    """Settings of `training.strategy = "fsdp"`; other strategies ignore them."""

    # free the gathered parameters between forward and backward: less memory, more time
    reshard_after_forward: bool = free(False)
    # dtype that the blocks compute in; their shards, moments and reductions are float32
    param_dtype: str = asked("float32")


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = free(10)  # steps from one row of metrics.csv to the next
    tensorboard: bool = free(True)  # also write the rows as events to RUN/tensorboard
    # epochs from one test of the online probe and the clustering to the next; 0: at the end only
    evaluate_epochs: int = free(1)


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = free(0)  # steps from one checkpoint to the next; 0: one at the end of each epoch
    keep: int = free(2)  # how many of the newest checkpoints stay
    # write in the background while training continues, from a copy in the host's memory
    asynchronous: bool = free(True)


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


def on_resume(name: str) -> OnResume:
    """Return whether a resumed run may change the setting `section.key`, or `recipe`. A setting without a mark cannot change."""
    section, _, key = name.partition(".")
    if section not in SECTIONS:
        return OnResume.FIXED
    mark: OnResume = SECTIONS[section].__dataclass_fields__[key].metadata.get("resume", OnResume.FIXED)
    return mark
