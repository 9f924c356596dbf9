"""Private names of PyTorch stand in one module, and each still means there what it is used for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import flop_registry

import falcon_fast
from falcon_fast.kernels import torch_private

PACKAGE = Path(falcon_fast.__file__).parent
KERNELS = Path(torch_private.__file__).parent
SOURCES = [
    *sorted(path for path in PACKAGE.rglob("*.py") if PACKAGE / "kernels" not in path.parents),
    *sorted(KERNELS.rglob("*.py")),
]


def private_torch_names(source: str) -> list[str]:
    """The private names that are imported from torch or reached as attributes of a torch module in a source text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            found.append(ast.unparse(node))
    return [name for name in found if any(part.startswith("_") and part[1:2] != "_" for part in name.split("."))]


def test_the_search_finds_what_it_looks_for():
    source = "from torch.utils._pytree import tree_map\nfrom torch.nn import _x\nimport torch._dynamo\ntorch._foo(1)"
    assert sorted(private_torch_names(source)) == [
        "torch._dynamo",
        "torch._foo",
        "torch.nn._x",
        "torch.utils._pytree.tree_map",
    ]
    assert len(private_torch_names(Path(torch_private.__file__).read_text())) > 10


def test_no_other_module_uses_private_torch_names():
    assert len(SOURCES) > 100
    for path in SOURCES:
        if path.name != "torch_private.py":
            assert private_torch_names(path.read_text()) == [], path


def test_importing_it_imports_no_other_torch_module():
    code = (
        "import sys, torch; had = set(sys.modules); import falcon_fast.kernels.torch_private; "
        "print(sorted(m for m in set(sys.modules) - had if m.split('.')[0] == 'torch'))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_fake_tensors_have_no_memory():
    with torch_private.FakeTensorMode():
        x = torch.empty(2**40, 2**10) @ torch.empty(2**10, 3)
    assert x.shape == (2**40, 3)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.SyncBatchNorm(2)])
def test_every_batchnorm_has_the_base(layer):
    assert isinstance(layer, torch_private.BatchNormBase)


def test_a_step_towards_the_values():
    averages = [torch.tensor([0.0, 4.0]), torch.tensor([1.0])]
    torch_private.foreach_approach_(averages, [torch.tensor([1.0, 0.0]), torch.tensor([1.0])], torch.tensor(0.25))
    assert averages[0].tolist() == [0.25, 3.0] and averages[1].tolist() == [1.0]


def test_lists_are_copied_and_checked_at_once():
    targets, found = [torch.zeros(2), torch.zeros(())], torch.zeros(())
    torch_private.foreach_copy_(targets, [torch.tensor([1.0, 2.0]), torch.tensor(3.0)])
    assert targets[0].tolist() == [1.0, 2.0] and targets[1] == 3.0
    torch_private.check_finite(targets, found)
    assert found == 0
    torch_private.check_finite([torch.tensor([1.0, torch.inf])], found)
    assert found == 1


def test_transforms_are_seen():
    seen = []
    torch.func.vmap(lambda x: seen.append(torch_private.is_transformed(x)) or x)(torch.ones(2))
    torch.func.grad(lambda x: seen.append(torch_private.is_transformed(x)) or x)(torch.ones(()))
    assert seen == [True, True] and not torch_private.is_transformed(torch.ones(2))


def test_the_state_of_a_gradient_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert torch_private.grad_scaler_state(scaler) == (None, None)
    scaler.scale(torch.ones(()))
    scale, growth = torch_private.grad_scaler_state(scaler)
    assert scale.item() == 8.0 and growth.item() == 0


def test_operators_are_known_by_packet_and_schema():
    view, product = torch.ops.aten.view.default, torch.ops.aten.mm.default
    assert torch_private.packet_of(product) in flop_registry
    assert torch_private.schema_of(view).returns[0].alias_info is not None
    assert torch_private.schema_of(product).returns[0].alias_info is None


def test_views_share_their_storage_and_copies_do_not():
    x = torch.empty(4)
    assert torch_private.storage_id(x) == torch_private.storage_id(x[1:]) != torch_private.storage_id(x.clone())


def test_flash_attention_has_the_shape_of_attention():
    with torch_private.FakeTensorMode():
        q, k, v = (torch.randn(1, 2, length, 8) for length in (5, 7, 7))
        assert torch_private.flash_attention(q, k, v).shape == (1, 2, 5, 8)


def test_collectives_for_a_compiler():
    assert callable(torch_private.functional_collectives().all_reduce)
