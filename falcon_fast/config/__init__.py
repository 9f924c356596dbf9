"""The configuration of a run: one tree of frozen dataclasses, read from a recipe, overridden, validated, and saved with the run.

A recipe is a TOML file of the package (`falcon_fast/recipes/`) with the settings that differ from the defaults. Every
setting can be overridden by its name `section.key`. The resolved tree is written to the run directory as `config.toml`, which
can be read again.
"""

from falcon_fast.config.assignments import nearest, override, parse_assignment
from falcon_fast.config.differences import (
    Change,
    as_tables,
    check_allowed,
    differences,
    history_of,
    merged,
    refusal,
)
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
    OnResume,
    OptimizerConfig,
    ProbeConfig,
    TrainingConfig,
    on_resume,
)
from falcon_fast.config.toml import config_from, dump_config, load_config, load_recipe, recipe_description, recipe_names
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
    "Change",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "FsdpConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "OnResume",
    "OptimizerConfig",
    "ProbeConfig",
    "TrainingConfig",
    "as_tables",
    "check_allowed",
    "config_from",
    "differences",
    "dump_config",
    "history_of",
    "load_config",
    "load_recipe",
    "merged",
    "nearest",
    "on_resume",
    "override",
    "parse_assignment",
    "recipe_description",
    "recipe_names",
    "refusal",
    "validate",
]
