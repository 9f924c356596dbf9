"""The checks of values and of their combinations that need neither the data nor the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from falcon_fast.config.assignments import nearest, shown
from falcon_fast.config.settings import (
    DICTIONARIES,
    IMPLEMENTATIONS,
    INITIALISATIONS,
    LOADERS,
    OPTIMIZERS,
    PARAM_DTYPES,
    PHOTOMETRIC,
    PRECISIONS,
    PRIOR_SCOPES,
    SECTIONS,
    SOURCES,
    STEMS,
    STRATEGIES,
    Config,
)
from falcon_fast.errors import UsageError
from falcon_fast.objective import temperature
from falcon_fast.objective.loss import LARGEST_BETA, PLANS, PRIORS
from falcon_fast.objective.projector import ACTIVATIONS

LARGEST_VIEW = 4096  # pixels a side; one image then takes 1 GB in a ResNet-18's stem
FLOAT32 = 3.4e38  # largest number that float32 holds, in which losses and gradients are computed


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
        ("model.initialisation", model.initialisation, INITIALISATIONS),
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
            raise UsageError(f"unknown {key} {shown(value)}: {nearest(value, valid)}")
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
        ("training.threads", training.threads, 0),
        ("training.max_bad_steps", training.max_bad_steps, 1),
        ("training.timeout", training.timeout, 1),
        ("log.every_steps", log.every_steps, 1),
        ("log.evaluate_epochs", log.evaluate_epochs, 0),
        ("checkpoint.every_steps", checkpoint.every_steps, 0),
        ("checkpoint.keep", checkpoint.keep, 1),
    ):
        if not math.isfinite(number) or number < least:
            raise UsageError(f"{key} must be at least {least}, not {number}")
    for key, number, most in (
        ("data.size", data.size, LARGEST_VIEW),
        ("data.workers", data.workers, 2**10),
        ("data.resident_mib", data.resident_mib, 2**30),
        ("data.max_bad_fraction", data.max_bad_fraction, 1),
        ("model.width", model.width, 2**20),
        ("loss.embedding_dim", loss.embedding_dim, 2**24),
        ("loss.num_codes", loss.num_codes, 2**30),
        ("loss.temperature_batch", loss.temperature_batch, 2**31),
        ("loss.memory_budget", loss.memory_budget, 2**30),
        ("loss.beta", loss.beta, LARGEST_BETA),
        ("training.epochs", training.epochs, 10**8),
        ("training.batch_size", training.batch_size, 2**31),
        ("training.threads", training.threads, 2**10),
        ("training.timeout", training.timeout, 31_536_000),
        *((f"{section}.{f.name}", getattr(getattr(config, section), f.name), FLOAT32) for section, f in _floats()),
    ):
        if number > most:
            raise UsageError(f"{key} must be at most {most}, not {number}")
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
    if loss.codes == "hadamard" and loss.plan == "stored":
        raise UsageError(
            "loss.plan=stored is for Rademacher codes, logits of Hadamard codes are not stored: use loss.plan=auto"
        )
    try:
        tau = temperature(f, c, loss.temperature_batch, loss.epsilon)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not 1 / FLOAT32 < tau < FLOAT32:
        raise UsageError(
            f"loss.epsilon={loss.epsilon} and loss.temperature_batch={loss.temperature_batch} give a temperature of {tau}, which "
            "float32 cannot hold: raise loss.epsilon, or lower loss.temperature_batch"
        )
    return config


def _floats() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield section and field of every setting that is a floating-point number."""
    for section, cls in SECTIONS.items():
        for f in dataclasses.fields(cls):
            if isinstance(f.default, float):
                yield section, f
