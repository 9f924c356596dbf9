"""The settings of a run: one tree of frozen dataclasses, a section for each part of a run.

A new setting is one line here; every other module of the package, the command line and the reference pages follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_type_hints

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
