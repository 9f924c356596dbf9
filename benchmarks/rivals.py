"""The rivals of the kernels: the published arithmetic, plain eager PyTorch, and a chunked version for a compiler.

Each takes embeddings h1 and h2 (N, f) that require gradients, a dense dictionary w (f, c) of -1 and +1, and the temperature. It
returns the loss and both gradients (beta = 1, reverse prior).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _logits(h: torch.Tensor, w: torch.Tensor, tau: float) -> torch.Tensor:
    return h @ w / tau


def published_loss(h1: torch.Tensor, h2: torch.Tensor, w: torch.Tensor, tau: float) -> torch.Tensor:
    """Compute the loss as the published code does: every term computes its own softmax, and pbar is not in the log domain."""
    z1, z2 = _logits(h1, w, tau), _logits(h2, w, tau)
    c = w.shape[1]

    def prior(z: torch.Tensor) -> torch.Tensor:
        pbar = F.softmax(z, dim=1).mean(0)
        return (pbar * torch.log(c * pbar)).sum()

    def cross(target: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return -(F.softmax(target, dim=1) * F.log_softmax(z, dim=1)).sum(1).mean()

    return 0.5 * (prior(z1) + prior(z2)) + 0.5 * (cross(z2, z1) + cross(z1, z2))


def eager_loss(h1: torch.Tensor, h2: torch.Tensor, w: torch.Tensor, tau: float) -> torch.Tensor:
    """Compute the same loss with each softmax computed once, in the log domain."""
    log_p1, log_p2 = (F.log_softmax(_logits(h, w, tau).float(), dim=1) for h in (h1, h2))
    n, c = log_p1.shape
    log_pbar1, log_pbar2 = (torch.logsumexp(log_p, 0) - math.log(n) for log_p in (log_p1, log_p2))
    prior = sum((log_pbar.exp() * (log_pbar + math.log(c))).sum() for log_pbar in (log_pbar1, log_pbar2))
    cross = -(log_p2.exp() * log_p1 + log_p1.exp() * log_p2).sum(1).mean()
    return 0.5 * (prior + cross)


def with_gradient(loss: Callable[..., torch.Tensor], autocast: torch.dtype | None = None) -> Callable[..., Result]:
    """Return a function that computes `loss` and its gradients by autograd, under autocast if a dtype is given."""

    def run(h1: torch.Tensor, h2: torch.Tensor, w: torch.Tensor, tau: float) -> Result:
        with torch.autocast(h1.device.type, dtype=autocast, enabled=autocast is not None):
            value = loss(h1, h2, w, tau)
        g1, g2 = torch.autograd.grad(value, (h1, h2))
        return value.detach(), g1, g2

    return run


# ---- chunks of codes, for torch.compile ---------------------------------------------------------------------------------
# The three sweeps of the kernels in PyTorch, with the gradient written out: nothing of size N x c is kept. A compiler fuses the
# operators after each product.


def _row_statistics(z: torch.Tensor, other: torch.Tensor, state: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Update a view's running maximum m, sum of exp(z - m), and sum of exp(z - m) (z_other - m_other): (3, N)."""
    m = torch.maximum(state[0], z.amax(1))
    m_other = torch.maximum(others[0], other.amax(1))
    e = torch.exp(z - m[:, None])
    old = torch.exp(state[0] - m)
    moved = torch.where(state[1] > 0, (others[0] - m_other) * state[1], 0.0)
    s = old * state[1] + e.sum(1)
    return torch.stack((m, s, old * (state[2] + moved) + (e * (other - m_other[:, None])).sum(1)))


def rows_step(z1, z2, state1, state2):
    return _row_statistics(z1, z2, state1, state2), _row_statistics(z2, z1, state2, state1)


def columns_step(z1, z2, lse1, lse2, log_n: float, log_c: float):
    """Return log pbar of the chunk's codes and the chunk's part of the prior and of a, for both views."""
    out = []
    for z, lse in ((z1, lse1), (z2, lse2)):
        log_p = z - lse[:, None]
        log_pbar = torch.logsumexp(log_p, 0) - log_n
        g = log_pbar + log_c
        out.append((log_pbar, (log_pbar.exp() * g).sum(), (log_p.exp() * g).sum(1)))
    return out


def gradient_step(z1, z2, state1, state2, g1, g2, a1, a2):
    """Return 2 N dZ of the chunk, for both views."""
    y1, y2 = z1 - state1[0][:, None], z2 - state2[0][:, None]
    p1, p2 = y1.exp() / state1[1][:, None], y2.exp() / state2[1][:, None]
    x1, x2 = state1[2] / state1[1], state2[2] / state2[1]
    dz1 = p1 * (g1 - a1[:, None] + 1 + x1[:, None] - y2) - p2
    dz2 = p2 * (g2 - a2[:, None] + 1 + x2[:, None] - y1) - p1
    return dz1, dz2


def chunked(chunk: int, compiled: bool, half: bool) -> Callable[..., Result]:
    """Return a function that computes loss and gradients over chunks of codes. half: products of float16 operands."""
    # Fixed shapes: a shorter last chunk needs one more compilation.
    steps = [torch.compile(f, dynamic=False) if compiled else f for f in (rows_step, columns_step, gradient_step)]
    rows, columns, gradient = steps

    @torch.no_grad()
    def run(h1: torch.Tensor, h2: torch.Tensor, w: torch.Tensor, tau: float) -> Result:
        n, c = h1.shape[0], w.shape[1]
        wide = torch.float64 if h1.dtype == torch.float64 else torch.float32
        product = torch.float16 if half else wide
        h1, h2, w = (h1 / tau).to(product), (h2 / tau).to(product), w.to(product)

        def times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.mm(a, b, out_dtype=wide) if half and a.is_cuda else (a @ b).to(wide)

        chunks = [w[:, start : start + chunk] for start in range(0, c, chunk)]
        start = torch.zeros(3, n, device=h1.device, dtype=wide)  # made on the device, as a CUDA graph needs it
        start[0] = -1e30
        state1, state2 = start, start
        for part in chunks:
            state1, state2 = rows(times(h1, part), times(h2, part), state1, state2)
        lse1, lse2 = (state[0] + state[1].log() for state in (state1, state2))
        g, prior, a1, a2 = [], 0.0, 0.0, 0.0
        for part in chunks:
            (log_pbar1, k1, b1), (log_pbar2, k2, b2) = columns(
                times(h1, part), times(h2, part), lse1, lse2, math.log(n), math.log(c)
            )
            g.append((log_pbar1 + math.log(c), log_pbar2 + math.log(c)))
            prior, a1, a2 = prior + 0.5 * (k1 + k2), a1 + b1, a2 + b2
        cross = 0.5 * (state1[1].log() + state2[1].log() - state1[2] / state1[1] - state2[2] / state2[1]).mean()
        dh1, dh2 = (
            torch.zeros(h1.shape, device=h1.device, dtype=wide),
            torch.zeros(h2.shape, device=h1.device, dtype=wide),
        )
        for part, (g1, g2) in zip(chunks, g, strict=True):
            dz1, dz2 = gradient(times(h1, part), times(h2, part), state1, state2, g1, g2, a1, a2)
            dh1 += times(dz1.to(product), part.T)
            dh2 += times(dz2.to(product), part.T)
        factor = 1 / (2 * n * tau)
        return prior + cross, dh1 * factor, dh2 * factor

    return run
