"""The plan of the loss on the CPU within a memory budget: how wide its strips of codes are, and whether the logits are kept."""

from __future__ import annotations

import math
from typing import NamedTuple

from falcon_fast.kernels.cpu.extension import cpu_extension

DEFAULT_BUDGET = 256 * 2**20
TILE = 128  # codes under one maximum; strips are multiples of it
STRIP_BYTES = 4 * 2**20  # float32 logits of both views of one strip: they stay in the last-level cache
WIDEST_STRIP = 4096
HADAMARD_SEGMENT = 2048  # the logits of a row in both views take 16 KiB: they stay in the L1 cache


def own_products() -> bool:
    """Return whether dense dictionaries use the extension's products, which take packed codes, rather than torch's."""
    return cpu_extension is not None and bool(cpu_extension.fast_int16())


def padded(c: int) -> int:
    """Return `c` rounded up to a multiple of TILE."""
    return -(-c // TILE) * TILE


class Plan(NamedTuple):
    """Whether the logits are kept in 2 bytes each or computed again; `width` codes at a time; the peak memory in bytes."""

    stored: bool
    width: int
    peak: int


def dense_plan(n: int, f: int, c: int, plan: str, memory_budget: int | None) -> Plan:
    """Return the plan for N = n within `memory_budget` bytes beyond the inputs and the dictionary (None: 256 MiB if possible).

    The plan does not depend on anything that differs between the processes of a group (which reduce strip by strip), on the
    number of threads (each has another 128 KiB of scratch memory), or on a resume. Raises ValueError if the budget cannot be
    kept.
    """
    budget = memory_budget if memory_budget is not None else DEFAULT_BUDGET if plan != "stored" else math.inf
    padded_f, padded_c = -(-f // 64) * 64, padded(c)
    fixed = 2 * n * padded_f * (4 + 4 + 4) + 2 * padded_c * 4 * 4 + 2 * n * 200
    per_code = 2 * n * (4 + 2)
    if not own_products():  # unpacked codes, and the temporaries of eager arithmetic
        per_code = 2 * n * 4 * 8 + 2 * f * 4 + f * 8
    copy = 2 * n * (2 * padded_c + padded_c // TILE * 8)
    width = min(WIDEST_STRIP, padded_c, max(4 * TILE, STRIP_BYTES // (8 * n) // TILE * TILE))

    stored = plan == "stored" or (plan == "auto" and fixed + copy + per_code * width <= budget)
    held = fixed + (copy if stored else 0)
    if held + per_code * width > budget:
        width = max(TILE, int(budget - held) // per_code // TILE * TILE)
    peak = held + per_code * width
    _check_budget("the stored plan" if stored else "the loss", peak, n, f, c, memory_budget)
    return Plan(stored, width, peak)


def hadamard_plan(n: int, f: int, c: int, memory_budget: int | None) -> Plan:
    """Return the plan for Hadamard codes: always streaming, `width` a multiple of f. Raises ValueError like `dense_plan`."""
    width = max(HADAMARD_SEGMENT, f)
    per_code = 2 * n * 4
    if cpu_extension is None:
        width = max(width, STRIP_BYTES // (8 * n) // width * width)
        per_code *= 8  # the temporaries of eager arithmetic
    peak = 2 * n * (12 * f + 200) + per_code * (width + 64) + 2 * padded(c) * 16
    _check_budget("the loss", peak, n, f, c, memory_budget)
    return Plan(False, width, peak)


def _check_budget(what: str, peak: int, n: int, f: int, c: int, memory_budget: int | None) -> None:
    if memory_budget is not None and peak > memory_budget:
        raise ValueError(
            f"{what} needs about {peak / 2**20:.1f} MiB for N = {n}, f = {f} and c = {c}, more than the budget of "
            f"{memory_budget / 2**20:.1f} MiB: raise it, or lower the batch or the number of codes"
        )
