"""The settings of one evaluation of the loss, in the one form that every implementation takes.

The operators of `torch.library` take tensors and plain values only. `LossSpec` therefore holds plain values only (a process
group by its name), and its fields, in their order, are the operators' arguments after the three tensors. `operator_schema`,
`LossSpec.flat` and `LossSpec.of_flat` all read them from the class, so the list of settings is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist

from falcon_fast.kernels.torch_private import process_group_named


@dataclass(frozen=True)
class LossSpec:
    """What the loss of two (N, f) embeddings depends on, apart from the tensors.

    Attributes:
        c: number of codes in the dictionary.
        is_hadamard: whether the packed signs are those of Hadamard blocks, int32 (c/f, ceil(f/32)), one row for each block of f
            codes; otherwise they are those of the codes themselves, int32 (c, ceil(f/32)).
        tau: temperature, positive; the logits are H W / tau.
        beta: weight of the invariance term, not negative.
        prior: `reverse`, KL(pbar || uniform), or `forward`, KL(uniform || pbar).
        group_name: name of the process group over which the mean assignment is formed; empty for this process alone.
        plan: `stored`, `streaming` or `auto`: what is done with the N x c logits (see `falcon_loss`).
        memory_budget: bytes that forward and backward may hold beyond the inputs and the dictionary; None for no limit.
        with_gradient: whether the gradient is formed along with the loss.
    """

    c: int
    is_hadamard: bool
    tau: float
    beta: float = 1.0
    prior: str = "reverse"
    group_name: str = ""
    plan: str = "auto"
    memory_budget: int | None = None
    with_gradient: bool = True

    @property
    def forward(self) -> bool:
        """Whether the prior is the forward one."""
        return self.prior == "forward"

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group called `group_name`, or None for this process alone."""
        return process_group_named(self.group_name) if self.group_name else None

    @property
    def world_size(self) -> int:
        """Number of processes over which the mean assignment is formed."""
        return dist.get_world_size(self.group) if self.group_name else 1

    def flat(self) -> tuple[Any, ...]:
        """Return the settings as an operator takes them, in the order of `SETTINGS`."""
        return tuple(getattr(self, name) for name in SETTINGS)

    @classmethod
    def of_flat(cls, settings: Sequence[Any]) -> LossSpec:
        """Return the spec whose `flat()` is `settings`."""
        return cls(*settings)


SETTINGS = tuple(field.name for field in fields(LossSpec))

# By the annotations of the fields, which are strings here (`from __future__ import annotations`).
_SCHEMA_TYPES = {"int": "SymInt", "int | None": "SymInt?", "bool": "bool", "float": "float", "str": "str"}


def operator_schema(gradient_tensors: int) -> str:
    """Return the schema of an operator that computes the loss.

    Its arguments are embeddings h1 and h2, the packed signs, and the settings of a `LossSpec`. It returns loss, prior,
    invariance, codes in use, and then `gradient_tensors` tensors from which the backward pass makes the gradient.
    """
    settings = (f"{_SCHEMA_TYPES[str(field.type)]} {field.name}" for field in fields(LossSpec))
    arguments = ", ".join(("Tensor h1", "Tensor h2", "Tensor words", *settings))
    return f"({arguments}) -> ({', '.join(['Tensor'] * (4 + gradient_tensors))})"


def save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Keep the gradient tensors of an operator with `operator_schema` for its backward pass (autograd's `setup_context`).

    The backward pass finds them in `ctx.saved_tensors` and the dtype of the embeddings in `ctx.dtype`.
    """
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:])
    ctx.dtype = inputs[0].dtype


def check_differentiated_once() -> None:
    """Raise RuntimeError in a backward pass that is itself recorded, whose gradients would be taken for constants."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this implementation of the FALCON loss can be differentiated once only, so create_graph=True would give wrong "
            'second derivatives: use implementation="reference" for them, or leave out create_graph'
        )


# The gradients of the packed signs and of the settings in such a backward pass: there are none.
NO_GRADIENTS = (None,) * (1 + len(SETTINGS))
