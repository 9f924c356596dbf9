"""The plan of the Triton kernels for one loss: block shapes for an architecture, ranges of codes, and the memory needed.

A plan depends only on shapes, device model and the stated budget, never on free memory, so all processes and a resumed run have
the same plan. The configurations are fixed; the numbers in the comments are those that ptxas reports.
"""

from __future__ import annotations

from typing import NamedTuple

TILE = 128  # codes that share one maximum
STRIP = 64  # codes whose columns one program reduces, in one view: 128 bytes of each row of stored logits
LEAST_STRIP = 16  # a whole sector of memory, 32 bytes

DEFAULT_BUDGET = 4 * 2**30  # upper limit for `auto`: stored logits are 2.4 GiB at (1024, 2048, 524288)
RANGE_BYTES = 24 * 2**20  # stored logits of one range of a streaming sweep: they stay in the L2 cache (A100: 40 MB)
EXPANDED_CODES = 8192  # codes expanded to fp16 at a time: 32 MiB at f = 2048
# Number of rows of both views from which it pays to expand the codes, for the logits and for the library's product. On an H100,
# expanding 2048 x 65536 signs takes 0.10 ms; our products with 2048 rows take 2.0 ms on packed codes and 0.9 ms on expanded ones.
EXPANDED_ROWS = {9: 256}
LIBRARY_ROWS = 1024  # elsewhere [model]
MOST_SPLITS = 8
SHORTEST_SPLIT = 1024


class LogitsTiles(NamedTuple):
    """Images, codes and features of a block of the logits product, its warps and stages; whether codes are expanded
    beforehand."""

    rows: int
    codes: int
    depth: int
    warps: int
    stages: int
    expanded: bool = False


class ProductTiles(NamedTuple):
    """Rows (of both views), features and codes of a block of dZ W^T, its warps and pipeline stages."""

    rows: int
    features: int
    depth: int
    warps: int
    stages: int


class DensePlan(NamedTuple):
    """A dense dictionary: logits stored or computed again in ranges of `width` codes; which product; peak bytes beyond the
    inputs."""

    stored: bool
    width: int
    strip: int
    logits: LogitsTiles
    product: ProductTiles
    library: bool
    splits: int
    peak: int


def ceil_to(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def logits_tiles(n: int, capability: tuple[int, int]) -> LogitsTiles:
    """Return the block of the logits product; on Hopper, codes are expanded for many images (others: tuning.ALTERNATIVES)."""
    if n <= 32 or capability[0] == 10:
        # Blackwell's accumulators lie in rows of lanes, so splitting the views costs registers.
        return LogitsTiles(32, 128, 64, 8, 3)
    if capability[0] == 9 and 2 * n >= EXPANDED_ROWS[9]:
        return LogitsTiles(64, 128, 64, 4, 3, expanded=True)
    return LogitsTiles(64, 128, 64, 8, 3)


def product_tiles(rows: int, f: int, capability: tuple[int, int], processors: int) -> ProductTiles:
    """Return the block of dZ W^T. On sm_80, 128 rows spill if their number is not a multiple of 16; 64 take 178 registers.

    On Hopper a block has 256 features, except for few rows, where that would leave half of the processors without work.
    """
    if capability[0] == 9:
        blocks = -(-rows // 128) * -(-f // 256)
        if 2 * blocks * MOST_SPLITS > processors:
            return ProductTiles(128, 256, 64, 16, 3)
    return ProductTiles(64 if capability[0] == 8 else 128, 128, 64, 8, 3)


def dense_plan(
    n: int, f: int, c: int, stored: bool, memory_budget: int | None, capability: tuple[int, int], processors: int
) -> DensePlan:
    """Return the plan for N = n; a streaming plan takes narrower ranges if `memory_budget` bytes require it."""
    logits, product = logits_tiles(n, capability), product_tiles(2 * n, f, capability, processors)
    padded_c = ceil_to(c, TILE)
    blocks = -(-2 * n // product.rows) * -(-f // product.features)
    splits = max(1, min(processors // blocks, MOST_SPLITS, padded_c // SHORTEST_SPLIT))
    library = 2 * n >= EXPANDED_ROWS.get(capability[0], LIBRARY_ROWS)
    if library:
        splits = 1

    def strip_of(width: int) -> int:
        strip = STRIP
        while (
            strip > LEAST_STRIP and width // strip < processors
        ):  # at least two programs for each processor, with both views
            strip //= 2
        return strip

    def peak(width: int) -> int:
        strip = strip_of(width)
        embeddings = 2 * ceil_to(n, logits.rows) * (2 * ceil_to(f, logits.depth) + 8)
        rows = 2 * n * 4 * 8
        columns = 2 * padded_c * 4 + 3 * 4 * (padded_c // strip)
        parts = splits * 2 * n * f * 4
        codes = 2 * ceil_to(f, logits.depth) * min(EXPANDED_CODES, width) if library else 0
        # Per range: stored logits, maxima of tiles, and their statistics or, later in the same memory, partial sums of a.
        of_range = 2 * n * width * 2 + 2 * n * (width // TILE) * 4 * (1 + max(3, TILE // strip))
        return embeddings + rows + columns + of_range + parts + codes

    width = padded_c if stored else min(padded_c, max(8 * TILE, RANGE_BYTES // (4 * n) // (8 * TILE) * (8 * TILE)))
    while not stored and memory_budget is not None and width > TILE and peak(width) > memory_budget:
        width = ceil_to(width // 2, TILE)
    return DensePlan(stored, width, strip_of(width), logits, product, library, splits, peak(width))


def check_budget(what: str, peak: int, n: int, f: int, c: int, memory_budget: int | None) -> None:
    """Raise ValueError if `peak` bytes are more than the budget."""
    if memory_budget is not None and peak > memory_budget:
        raise ValueError(
            f"{what} needs about {peak / 2**20:.1f} MiB for N = {n}, f = {f} and c = {c}, more than the budget of "
            f"{memory_budget / 2**20:.1f} MiB: raise it, or lower the batch or the number of codes"
        )


class HadamardPlan(NamedTuple):
    """Hadamard codes of width f = a b. For rows and gradient: images per program, and into how many parts the blocks are split.
    For
    columns: images at a time, and how many of the b columns of a transform one program takes. Warps; peak bytes beyond the
    inputs.
    """

    a: int
    b: int
    rows: int
    splits: int
    width: int
    column_rows: int
    column_warps: int
    gradient_rows: int
    gradient_splits: int
    warps: int
    peak: int


def hadamard_served(f: int) -> bool:
    """Return whether there are kernels for Hadamard codes of width f; other widths are treated as dense dictionaries."""
    return 16 <= f <= 2048


def hadamard_plan(n: int, f: int, c: int, capability: tuple[int, int], processors: int) -> HadamardPlan:
    """Return the plan for Hadamard codes, which are always streamed."""
    a = 1 if f < 256 else 2 ** ((f.bit_length() - 1) // 2)
    b, blocks = f // a, c // f
    rows = max(1 if a > 1 else 16, 4096 // f)
    width = b
    # More programs, each with fewer codes of a block; sm_100 spills with 2048.
    while width > 16 and (blocks * (b // width) < processors or (capability[0] == 10 and width * a > 1024)):
        width //= 2
    # Logits at a time: sm_90 has registers left for a second program (120 with 8 warps, 195 with 4); elsewhere more would spill.
    at_once = 4096 if capability[0] == 9 else 2048 if f > 256 else 1024
    column_rows = max(1 if a > 1 else 16, at_once // (width * a))
    column_warps = 4 if capability[0] == 9 and column_rows * a < 128 else 8

    def splits_for(programs: int) -> int:
        return max(1, min(blocks, -(-2 * processors // programs)))

    splits = splits_for(-(-n // rows))
    gradient_rows = max(1 if a > 1 else 16, (2048 if capability[0] == 8 else 4096) // f)  # sm_80 spills with 4096
    gradient_splits = min(splits_for(-(-n // gradient_rows)), MOST_SPLITS)
    strips = blocks * (b // width)
    needed = 4 * n * f + 2 * n * 4 * (10 + 4 * splits + strips + gradient_splits * f) + 2 * ceil_to(c, TILE) * 4
    needed += 12 * strips + 64
    return HadamardPlan(a, b, rows, splits, width, column_rows, column_warps, gradient_rows, gradient_splits, 8, needed)
