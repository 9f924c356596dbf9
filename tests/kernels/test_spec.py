"""The settings of the loss: their flat form, the operators' schema, and groups by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from falcon_fast import HadamardCodes, RademacherCodes, falcon_loss
from falcon_fast.kernels import why_no_triton
from falcon_fast.kernels.cpu.loss import loss_op
from falcon_fast.kernels.spec import NO_GRADIENTS, LossSpec, operator_schema

IMPLEMENTATIONS = ["cpu", *(["triton"] if why_no_triton(torch.device("cpu")) is None else [])]


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_the_flat_form_is_the_operators_arguments_in_their_order():
    spec = LossSpec(64, True, 2.5, 0.7, "forward", "", "streaming", 2**20, False)
    assert spec.flat() == (64, True, 2.5, 0.7, "forward", "", "streaming", 2**20, False)
    assert LossSpec.of_flat(spec.flat()) == spec
    assert len(NO_GRADIENTS) == 1 + len(spec.flat())
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.c = 3


def test_the_schema_names_every_setting_with_its_type():
    expected = (
        "(Tensor h1, Tensor h2, Tensor words, SymInt c, bool is_hadamard, float tau, float beta, str prior, "
        "str group_name, str plan, SymInt? memory_budget, bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    assert operator_schema(1) == expected
    assert str(loss_op._opoverload._schema) == "falcon_fast::cpu_loss" + expected


def test_alone_there_is_no_group():
    spec = LossSpec(16, False, 1.0)
    assert spec.group is None and spec.world_size == 1
    assert not spec.forward and dataclasses.replace(spec, prior="forward").forward


def test_a_group_is_found_by_its_name(group):
    spec = LossSpec(16, False, 1.0, group_name=group.group_name)
    assert spec.group is group and spec.world_size == 1


@pytest.mark.parametrize("codes", [RademacherCodes(32, 100), HadamardCodes(32, 64)], ids=["rademacher", "hadamard"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_in_a_group_without_a_break_to_the_same_bits(group, implementation, codes):
    torch.manual_seed(0)
    h1, h2 = torch.randn(4, 32).tanh(), torch.randn(4, 32).tanh()

    def step(a, b):
        return falcon_loss(a * 1.0, b, codes, 2.0, group=group, implementation=implementation).loss * 2

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        a, b = h1.clone().requires_grad_(), h2.clone().requires_grad_()
        value = function(a, b)
        results.append((value, *torch.autograd.grad(value, (a, b))))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
