"""The loss and the parts of its gradient on a GPU, in three sweeps over the codes; autograd never holds an N x c matrix.

Sweep 1 computes the logits and the statistics of their rows (logits.py, rows.py), sweep 2 the statistics of their columns and the
loss (columns.py, finish.py), sweep 3 the gradient (gradient.py). The stored plan has one range of codes, which contains all of
them. Its logits stay in fp16 (4 bytes for a pair of views) from sweep to sweep, and dZ replaces them in place. The streaming plan
computes the logits again in each sweep, in ranges that stay in the L2 cache, so that nothing of the size N x c exists. Hadamard
dictionaries have their own kernels (hadamard.py), which always stream: computing their logits again costs less than reading them.

No code here reads a value from the device, so a step can be captured as a CUDA graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from falcon_fast.kernels.collectives import count_flagged
from falcon_fast.kernels.gpu.devices import nearest_device
from falcon_fast.kernels.gpu.launch import device_facts
from falcon_fast.kernels.gpu.loss import hadamard, transform, tuning
from falcon_fast.kernels.gpu.loss.columns import ColumnState, Scales, columns
from falcon_fast.kernels.gpu.loss.cost import choose
from falcon_fast.kernels.gpu.loss.embeddings import cast_embeddings
from falcon_fast.kernels.gpu.loss.finish import Parts, Readings, finish
from falcon_fast.kernels.gpu.loss.gradient import dz_in_place, library_product, packed_product
from falcon_fast.kernels.gpu.loss.logits import TileStatistics, dense_logits
from falcon_fast.kernels.gpu.loss.plan import (
    EXPANDED_CODES,
    TILE,
    DensePlan,
    HadamardPlan,
    ceil_to,
    check_budget,
    dense_plan,
    hadamard_plan,
    hadamard_served,
)
from falcon_fast.kernels.gpu.loss.rows import RowState, merge_rows
from falcon_fast.kernels.gpu.support import INTERPRETING
from falcon_fast.kernels.spec import LossSpec

# Units that the largest |dZ| of a row may take: fp16 ends at 65504.
DENSE_TARGET = 32768.0


class _Ranges:
    """The ranges of codes of a dense plan, and the logits of each: stored, or computed again."""

    def __init__(
        self, h1: torch.Tensor, h2: torch.Tensor, words: torch.Tensor, c: int, plan: DensePlan, tau: float
    ) -> None:
        self.n, self.f = h1.shape
        self.c, self.words, self.plan, self.device = c, words, plan, h1.device
        padded_n, padded_f = ceil_to(self.n, plan.logits.rows), ceil_to(self.f, plan.logits.depth)
        self.h, self.scale, self.norm = cast_embeddings(h1, h2, tau, padded_n, padded_f, paired=True)
        self.expanded = None
        if plan.logits.expanded or plan.library:
            codes = ceil_to(min(EXPANDED_CODES, plan.width), plan.logits.codes)
            self.expanded = torch.empty(codes, padded_f, dtype=torch.float16, device=self.device)
        self.d = torch.empty(2 * self.n * plan.width, dtype=torch.float16, device=self.device)
        self.maxima = torch.empty(2 * self.n * (plan.width // TILE), dtype=torch.float32, device=self.device)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the first code and the number of codes of each range."""
        for first in range(0, self.c, self.plan.width):
            yield first, min(self.plan.width, self.c - first)

    def stored(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the memory of the logits (2, N, width) of `count` codes and of the maxima of their tiles (2, tiles, N)."""
        width = ceil_to(count, TILE)
        tiles = width // TILE
        d = self.d[: 2 * self.n * width].view(2, self.n, width)
        return d, self.maxima[: 2 * self.n * tiles].view(2, tiles, self.n)

    def form(self, first: int, count: int, statistics: TileStatistics | None, keep: bool) -> None:
        """Compute the logits of a range, with their statistics unless None; write them to memory if `keep`."""
        d, maxima = self.stored(count)
        dense_logits(
            self.h,
            self.scale,
            self.words[first : first + count],
            self.expanded,
            first,
            d if keep else None,
            maxima,
            statistics,
            self.plan.logits,
        )

    def again(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of a range and the maxima of their tiles for a later sweep."""
        if not self.plan.stored:
            self.form(first, count, None, keep=True)
        return self.stored(count)


def dense_loss(
    h1: torch.Tensor, h2: torch.Tensor, words: torch.Tensor, spec: LossSpec, plan: DensePlan
) -> tuple[Readings, Parts | None]:
    """Return loss and gradient parts of embeddings (N, f) for the packed signs `words` (c, words per code) of all codes."""
    n, f = h1.shape
    c, group, device = spec.c, spec.group, h1.device
    scales = Scales.of(n, spec)
    ranges = _Ranges(h1, h2, words, c, plan, spec.tau)
    rows = RowState.empty(n, device)
    for first, count in ranges:
        statistics = TileStatistics(n, ceil_to(count, TILE) // TILE, device)
        ranges.form(first, count, statistics, keep=plan.stored)
        merge_rows(ranges.stored(count)[1], statistics, rows, fresh=first == 0)
        del statistics

    state = ColumnState(c, plan.strip, group is not None, device)
    quantum, readings = torch.empty(2, 2, n, dtype=torch.float32, device=device), Readings.empty(device)
    for first, count in ranges:
        d, maxima = ranges.again(first, count)
        partial = torch.empty(-(-count // plan.strip), 2, n, dtype=torch.float32, device=device)
        if group is None:
            columns(d, maxima, rows, state, partial, first, count, scales, sums=True, terms=True)
        else:
            columns(d, maxima, rows, state, partial, first, count, scales, sums=True, terms=False)
            state.reduce_log_pbar(group, first, count)
            columns(d, maxima, rows, state, partial, first, count, scales, sums=False, terms=True)
        finish(
            partial,
            rows,
            ranges.norm,
            state,
            quantum,
            readings,
            scales,
            fresh=first == 0,
            last=first + count == c,
            grouped=group is not None,
            paired=True,
            target=DENSE_TARGET,
        )
        del partial
    if group is not None:
        readings = readings._replace(codes_used=count_flagged(state.used[:c], group))
    if not spec.with_gradient:
        return readings, None

    parts = torch.empty(plan.splits, 2 * n, f, dtype=torch.float32, device=device)
    for first, count in ranges:
        d, maxima = ranges.again(first, count)
        dz_in_place(d, maxima, rows, quantum, state, first, count, scales)
        dz = d.view(2 * n, -1)
        if plan.library:
            assert ranges.expanded is not None
            codes = ranges.expanded.shape[0]
            expanded = ranges.expanded.view(-1)[: codes * f].view(codes, f)
            for at in range(0, count, EXPANDED_CODES):
                part = min(EXPANDED_CODES, count - at)
                chunk = words[first + at : first + at + part]
                library_product(dz[:, at : at + part], chunk, expanded, parts, add=first + at > 0)
        else:
            packed_product(dz, words[first : first + count], parts, plan.product, add=first > 0)
    return readings, Parts(parts, quantum)


def _chosen(n: int, f: int, spec: LossSpec, device: torch.device) -> DensePlan | HadamardPlan:
    """Return the plan for N = n; for Hadamard codes of a width without kernels it is a dense one.

    Raises ValueError if the stated plan or budget does not fit.
    """
    facts = device_facts(device)
    if spec.is_hadamard and hadamard_served(f):
        if spec.plan == "stored":
            raise ValueError(
                "logits of Hadamard codes are not stored, as computing them again is faster than reading them: choose the "
                "plan auto or streaming"
            )
        chosen: DensePlan | HadamardPlan = hadamard_plan(n, f, spec.c, facts.capability, facts.processors)
        name = "the loss"
    else:
        name = spec.plan
        if name == "auto":
            model = dataclasses.replace(
                nearest_device(facts.name, facts.capability), capability=facts.capability, processors=facts.processors
            )
            name = choose(n, f, spec.c, "rademacher", model, spec.memory_budget).name
        chosen = dense_plan(n, f, spec.c, name == "stored", spec.memory_budget, facts.capability, facts.processors)
        name = f"the {name} plan of the loss"
    check_budget(name, chosen.peak, n, f, spec.c, spec.memory_budget)
    return chosen


def parts_shape(n: int, f: int, spec: LossSpec, device: torch.device) -> tuple[int, int, int]:
    """Return the shape of `Parts.parts` that `falcon_loss_parts` gives for embeddings (n, f) on `device`."""
    chosen = _chosen(n, f, spec, device)
    return (chosen.gradient_splits if isinstance(chosen, HadamardPlan) else chosen.splits), 2 * n, f


def falcon_loss_parts(
    h1: torch.Tensor, h2: torch.Tensor, words: torch.Tensor, spec: LossSpec
) -> tuple[Readings, Parts | None]:
    """Return loss and gradient parts of embeddings (N, f) in any precision up to float32, for either kind of dictionary.

    words: the packed signs (see `LossSpec`). The parts are None without `spec.with_gradient`. Raises ValueError if the stated
    plan or budget does not fit.
    """
    n, f = h1.shape
    if INTERPRETING and h1.dtype == torch.bfloat16:  # the interpreter loads bfloat16 wrongly
        h1, h2 = h1.float(), h2.float()
    h1, h2 = (h if h.stride(1) == 1 else h.contiguous() for h in (h1, h2))
    chosen = _chosen(n, f, spec, h1.device)
    if isinstance(chosen, HadamardPlan):
        return hadamard.hadamard_loss(h1, h2, words, spec, chosen)
    if spec.is_hadamard:
        words = transform.as_dense(words, f, spec.c)
    words = words.contiguous()
    if tuning.TUNING:
        chosen = chosen._replace(logits=tuning.fastest_logits(h1, h2, words, device_facts(h1.device)))
    return dense_loss(h1, h2, words, spec, chosen)
