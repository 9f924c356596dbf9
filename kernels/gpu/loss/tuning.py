"""Timing of block shapes on the present GPU, with FALCON_FAST_TUNE=1.

Without it the fixed shapes of plan.py are used, and the first call compiles only what it runs. With it the first loss of a shape
times the alternatives below for the logits product, which takes a second or two, and the process keeps the fastest.
"""

from __future__ import annotations

import os
import statistics

import torch

from falcon_fast.kernels.gpu.launch import Facts
from falcon_fast.kernels.gpu.loss.embeddings import cast_embeddings
from falcon_fast.kernels.gpu.loss.logits import TileStatistics, dense_logits
from falcon_fast.kernels.gpu.loss.plan import EXPANDED_CODES, TILE, LogitsTiles, ceil_to, logits_tiles

TUNING = os.environ.get("FALCON_FAST_TUNE", "0") not in ("0", "")
MOST_CODES = 65536  # in a trial
ROUNDS = 7

ALTERNATIVES = {
    8: [LogitsTiles(64, 128, 64, 8, 3), LogitsTiles(64, 128, 64, 8, 4), LogitsTiles(32, 128, 64, 4, 3)],
    # Milliseconds at (1024, 2048, 65536) on an H100 with triton 3.6. Expanding needs up to 32 MiB (at f = 2048) more than a
    # plan without it states.
    9: [
        LogitsTiles(64, 128, 64, 4, 3, expanded=True),  # 1.047, the usual one from 128 images
        LogitsTiles(64, 256, 64, 8, 3, expanded=True),  # 1.049
        LogitsTiles(128, 128, 64, 8, 3, expanded=True),  # 1.056
        LogitsTiles(64, 128, 64, 8, 3),  # the usual one below
        LogitsTiles(64, 256, 64, 16, 3),  # 2.034
    ],
    10: [LogitsTiles(32, 128, 64, 8, 3), LogitsTiles(64, 128, 64, 16, 3)],
}

_fastest: dict[tuple[int, int, int, str], LogitsTiles] = {}


def milliseconds(
    h1: torch.Tensor, h2: torch.Tensor, words: torch.Tensor, tiles: LogitsTiles
) -> float:  # pragma: no cover - needs a GPU
    """Return the median time (ms) of the logits and their statistics with blocks of this shape; infinity if they do not fit."""
    from triton.runtime.errors import OutOfResources

    (n, f), c = h1.shape, words.shape[0]
    padded = ceil_to(n, tiles.rows), ceil_to(f, tiles.depth)
    h, scale, _ = cast_embeddings(h1, h2, 1.0, *padded, paired=True)
    count = ceil_to(c, TILE) // TILE
    d = torch.empty(2, n, count * TILE, dtype=torch.float16, device=h.device)
    maxima = torch.empty(2, count, n, dtype=torch.float32, device=h.device)
    found = TileStatistics(n, count, h.device)
    codes = ceil_to(min(EXPANDED_CODES, count * TILE), tiles.codes) if tiles.expanded else 0
    expanded = torch.empty(codes, padded[1], dtype=torch.float16, device=h.device)
    times: list[float] = []
    try:
        for _ in range(ROUNDS + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            dense_logits(h, scale, words, expanded, 0, d, maxima, found, tiles)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    except OutOfResources:
        return float("inf")
    return statistics.median(times[2:])


def fastest_logits(h1: torch.Tensor, h2: torch.Tensor, words: torch.Tensor, facts: Facts) -> LogitsTiles:
    """Return the fastest block shape for embeddings and codes like these, timed once per process."""
    key = (*h1.shape, words.shape[0], facts.name)
    if key not in _fastest:
        trial = words[:MOST_CODES]
        usual = logits_tiles(h1.shape[0], facts.capability)
        shapes = dict.fromkeys([usual, *ALTERNATIVES.get(facts.capability[0], [])])
        _fastest[key] = min(shapes, key=lambda tiles: milliseconds(h1, h2, trial, tiles))
    return _fastest[key]
