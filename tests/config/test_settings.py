"""The tree of settings itself."""

from __future__ import annotations

import dataclasses
import math

import pytest

from falcon_fast.config import (
    SECTIONS,
    Config,
    override,
)


def test_tau_is_the_published_rule() -> None:
    config = override(Config(), {"loss.num_codes": 1000, "loss.embedding_dim": 300, "loss.temperature_batch": 25})
    config = override(config, {"loss.epsilon": 1e-5, "training.batch_size": 7})  # the runtime batch plays no part
    assert config.tau == pytest.approx(300 / (5 * math.log((1 - 1e-5 * 999) / 1e-5)), rel=1e-12)


def test_every_default_has_the_type_it_is_annotated_with() -> None:
    # `dump_config` writes an int default of a float field as an integer, and equality would hide it.
    for section, cls in SECTIONS.items():
        for f in dataclasses.fields(cls):
            assert type(f.default).__name__ == f.type, f"{section}.{f.name}"
