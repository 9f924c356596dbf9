"""The memory that a run needs at the least, against what its parts take."""

from __future__ import annotations

import pytest

from falcon_fast.config import load_recipe, override
from falcon_fast.models.footprint import least_footprint
from falcon_fast.models.network import build_codes, build_network


@pytest.mark.parametrize("codes", ["rademacher", "hadamard"])
@pytest.mark.parametrize("width", [4, 32])
def test_it_is_a_little_less_than_what_is_built(width, codes):
    settings = {"model.width": width, "loss.embedding_dim": 64, "loss.num_codes": 8192, "loss.codes": codes}
    config = override(load_recipe("digits"), settings)
    found = least_footprint(config, 16, 32)
    weights = sum(p.numel() for p in build_network(config, 16).parameters())
    assert 0.9 * 16 * weights < found.training <= 16 * weights  # weight, gradient and two moments in float32
    assert found.dictionary == 3 * build_codes(config).words.nbytes
    assert found.batch == 2 * 32 * (3 * 16**2 + 64) * 4
    assert found.total == found.training + found.dictionary + found.batch


def test_shards_divide_what_is_trained_and_sgd_has_one_moment():
    config = override(load_recipe("digits"), {"model.width": 32})
    whole, quarter = (least_footprint(config, 16, 32, shards) for shards in (1, 4))
    assert quarter.training == whole.training // 4 and quarter.dictionary == whole.dictionary
    sgd = least_footprint(override(config, {"optimizer.name": "sgd"}), 16, 32)
    assert sgd.training * 4 == whole.training * 3


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_other_networks_are_underestimated_never_overestimated(name):
    config = override(load_recipe("folder"), {"model.name": name, "loss.embedding_dim": 64})
    weights = sum(p.numel() for p in build_network(config, 32).parameters())
    assert least_footprint(config, 32, 8).training <= 16 * weights
