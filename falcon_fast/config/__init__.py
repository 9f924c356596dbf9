"""The configuration of a run: one tree of frozen dataclasses, read from a recipe, overridden, validated, and saved with the run.

A recipe is a TOML file of the package (`falcon_fast/recipes/`) with the settings that differ from the defaults. Every
setting can be overridden by its name `section.key`. The resolved tree is written to the run directory as `config.toml`, which
can be read again.
"""

from falcon_fast.config.assignments import nearest, override, parse_assignment
from falcon_fast.config.settings import (
    DICTIONARIES,
    IMPLEMENTATIONS,
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
    CheckpointConfig,
    Config,
    DataConfig,
    FsdpConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ProbeConfig,
    TrainingConfig,
)
from falcon_fast.config.toml import dump_config, load_config, load_recipe, recipe_description, recipe_names
from falcon_fast.config.validation import validate

__all__ = [
    "DICTIONARIES",
    "IMPLEMENTATIONS",
    "LOADERS",
    "OPTIMIZERS",
    "PARAM_DTYPES",
    "PHOTOMETRIC",
    "PRECISIONS",
    "PRIOR_SCOPES",
    "SECTIONS",
    "SOURCES",
    "STEMS",
    "STRATEGIES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "FsdpConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProbeConfig",
    "TrainingConfig",
    "dump_config",
    "load_config",
    "load_recipe",
    "nearest",
    "override",
    "parse_assignment",
    "recipe_description",
    "recipe_names",
    "validate",
]
