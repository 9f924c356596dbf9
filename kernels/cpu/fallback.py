"""The C++ extension's work on strips of codes, in PyTorch, for an installation without a compiler (see level.hpp).

The functions have the names and arguments of the extension (`StripKernels`): strips (2, N, width) float32 in which columns past
the last code hold ABSENT, row state (N, 8) float64, row terms (2, N, 4) and column arrays (2, width) float32. `threads` is
ignored: torch uses its own threads.
"""

from __future__ import annotations

import math

import torch

ABSENT = -1e30
TILE = 128


def walsh_hadamard(x: torch.Tensor) -> torch.Tensor:
    """Return x times Sylvester's matrix along the last dimension, a power of two; entry (i, j) is (-1)^popcount(i & j)."""
    f = x.shape[-1]
    half = 1
    while half < f:
        x = x.unflatten(-1, (-1, 2, half))
        x = torch.stack((x[..., 0, :] + x[..., 1, :], x[..., 0, :] - x[..., 1, :]), dim=-2).flatten(-3)
        half *= 2
    return x


def dense_hadamard(words: torch.Tensor, f: int, c: int) -> torch.Tensor:
    """Return all packed codes (c, 1) of a Hadamard dictionary of width f < 32 from the packed signs of its blocks (c/f, 1)."""
    rows = walsh_hadamard(torch.eye(f, dtype=torch.float32))
    negative = ((rows < 0) * (1 << torch.arange(f))).sum(1).int()
    return (words.view(-1, 1) ^ negative).view(c, 1)


def strip_rows(z: torch.Tensor, first: int, state: torch.Tensor, threads: int) -> None:
    del threads
    m, arguments = z.max(dim=2)
    y = z - m[..., None]
    e = torch.exp(y)
    s = e.sum(2, dtype=torch.float64)
    x = (e * y.flip(0)).sum(2, dtype=torch.float64)
    old_m, old_s, old_x, old_argument = state.T.clone().unflatten(0, (4, 2))
    fresh = old_s == 0
    old_m = torch.where(fresh, m.double(), old_m)
    new_m = torch.maximum(old_m, m.double())
    now, before = torch.exp(m - new_m), torch.exp(old_m - new_m)
    new_s = now * s + before * old_s
    new_x = now * (x + (m - new_m).flip(0) * s) + before * (old_x + (old_m - new_m).flip(0) * old_s)
    new_argument = torch.where(fresh | (m > old_m), arguments + float(first), old_argument)
    state.copy_(torch.cat((new_m, new_s, new_x, new_argument)).T)


def _log_p(z: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    return z - terms[..., 0, None] - terms[..., 1, None]


def strip_columns(
    z: torch.Tensor, terms: torch.Tensor, peak: torch.Tensor, log_sum: torch.Tensor, first: int, threads: int
) -> None:
    del threads
    here = slice(first, first + z.shape[2])
    z.copy_(_log_p(z, terms))
    top = z.amax(1)
    z.sub_(top[:, None]).exp_()
    peak[:, here] = top
    log_sum[:, here] = top + z.sum(1).log()


def prior_columns(
    peak: torch.Tensor,
    log_sum: torch.Tensor,
    log_rows: float,
    c: int,
    forward: bool,
    first: int,
    width: int,
    weight: torch.Tensor,
    q: torch.Tensor,
) -> list[float]:
    here = slice(first, min(c, first + width))
    t, log_pbar = peak[:, here], log_sum[:, here] - log_rows
    log_ratio = log_pbar + math.log(c)
    weight[:, here] = torch.exp(t) if forward else log_ratio
    if forward:
        q[:, here] = torch.exp((t - log_pbar).clamp(max=log_rows)) * (-1 / c)  # pbar is at least the peak over the rows
        term = log_pbar * (-1 / c)
    else:
        q[:, here] = torch.exp(t) * log_ratio
        term = torch.exp(log_pbar) * log_ratio
    return term.sum(1, dtype=torch.float64).tolist()


def strip_prior(e: torch.Tensor, q: torch.Tensor, first: int, a: torch.Tensor, threads: int) -> None:
    del threads
    a += torch.einsum("vij,vj->vi", e, q[:, first : first + e.shape[2]])


def strip_gradient(
    z: torch.Tensor,
    terms: torch.Tensor,
    peak: torch.Tensor,
    weight: torch.Tensor,
    q: torch.Tensor,
    first: int,
    beta: float,
    factor: float,
    forward: bool,
    threads: int,
) -> None:
    del threads
    here = slice(first, first + z.shape[2])
    y = z - terms[..., 0, None]
    if forward:
        e = torch.exp(_log_p(z, terms) - peak[:, None, here])
        p, prior = e * weight[:, None, here], e * q[:, None, here]
    else:
        p = torch.exp(_log_p(z, terms))
        prior = p * weight[:, None, here]
    free = (beta - terms[..., 3] + beta * terms[..., 2])[..., None]
    z.copy_(factor * (prior + p * (free - beta * y.flip(0)) - beta * p.flip(0)))


def strip_encode(z: torch.Tensor, stored: torch.Tensor, tiles: torch.Tensor, first: int, threads: int) -> None:
    del threads
    tiled = z.flatten(0, 1).unflatten(1, (-1, TILE))
    top = tiled.amax(2)
    bottom = torch.where(tiled > ABSENT / 2, tiled, math.inf).amin(2)
    spread = top - torch.minimum(bottom, top)
    inverse = torch.where(spread > 1e-30, 1 / spread, 0)
    d = ((top[..., None] - tiled) * inverse[..., None]).clamp_(max=1)
    tiles[:, first // TILE : first // TILE + tiled.shape[1]] = torch.stack((top, spread / 65535**2), dim=-1)
    stored[:, first : first + z.shape[2]] = (d.sqrt_() * 65535 + 0.5).int().to(torch.uint16).flatten(1)


def strip_decode(
    z: torch.Tensor, stored: torch.Tensor, tiles: torch.Tensor, first: int, count: int, threads: int
) -> None:
    del threads
    u = stored[:, first : first + z.shape[2]].float().unflatten(1, (-1, TILE))
    here = tiles[:, first // TILE : first // TILE + u.shape[1]]
    z.copy_((here[..., :1] - u * u * here[..., 1:]).flatten(1).view_as(z))
    z[:, :, count:] = ABSENT
