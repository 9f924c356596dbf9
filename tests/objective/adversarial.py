"""Embeddings that no training makes but that someone will pass, and how far from the float64 loss an implementation may be there.

A float32 implementation cannot know its inputs better than to their last bit, and sums of f of them not better than that: so it
is judged by what the float64 reference gives for inputs that are moved by as much. Where two codes have all but equal logits, or
logits are 1e7 at a temperature of 1e-6, that is a lot; elsewhere it is nothing, and the loss must agree to 1e-4, the gradient to
1e-3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from falcon_fast import HadamardCodes, RademacherCodes, falcon_loss
from falcon_fast.kernels.cpu.loss import LARGEST_LOGIT

KINDS = (
    "tanh",
    "codes",
    "anticodes",
    "equal",
    "zeros",
    "denormal",
    "tiny",
    "onehot",
    "big",
    "huge",
    "rows",
    "columns",
)
MOVES = 4
FARTHEST = 60000 * math.log(2) / 2 * (1 - 1e-6)  # of a logit from 0, for what the Triton kernels store in float16


class Case(NamedTuple):
    h1: torch.Tensor
    h2: torch.Tensor
    codes: RademacherCodes | HadamardCodes
    tau: float
    beta: float
    prior: str
    name: str


class Result(NamedTuple):
    terms: tuple[float, float, float]
    gradient: torch.Tensor


def _view(kind: str, random: np.random.RandomState, n: int, codes: RademacherCodes | HadamardCodes) -> np.ndarray:
    f, c = codes.f, codes.c
    h = np.tanh(random.randn(n, f))
    if kind in ("codes", "anticodes"):
        chosen = codes.dense().numpy()[:, random.randint(0, c, n)].T
        return chosen if kind == "codes" else -chosen * random.uniform(0.3, 1)
    return {
        "tanh": lambda: h,
        "equal": lambda: np.repeat(h[:1], n, 0),
        "zeros": lambda: 0 * h,
        "denormal": lambda: h * 1e-40,
        "tiny": lambda: h * 1e-20,
        "onehot": lambda: np.eye(f)[random.randint(0, f, n)],
        "big": lambda: h * 10.0 ** random.uniform(1, 4),
        "huge": lambda: h * 10.0 ** random.uniform(4, 30),
        "rows": lambda: h * 10.0 ** random.uniform(-30, 2, (n, 1)),
        "columns": lambda: h * 10.0 ** random.uniform(-30, 2, (1, f)),
    }[kind]()


def case(seed: int, largest: int = 1000) -> Case:
    """Return case `seed` with at most `largest` codes."""
    random = np.random.RandomState(seed)
    hadamard = random.rand() < 0.4
    n = int(random.choice([1, 2, 3, 5, 7, 17]))
    if hadamard:
        f = int(2 ** random.randint(0, 8))
        c = max(2, f * int(random.randint(1, 5)))
    else:
        f = int(random.choice([1, 2, 3, 5, 31, 33, 64, 100]))
        c = int(random.choice([each for each in (2, 3, 7, 127, 128, 129, 300, 1000) if each <= largest]))
    codes = (HadamardCodes if hadamard else RademacherCodes)(f, c, seed)
    first = KINDS[random.randint(len(KINDS))]
    second = first if random.rand() < 0.6 else KINDS[random.randint(len(KINDS))]
    h1, h2 = (torch.from_numpy(_view(kind, random, n, codes)).float() for kind in (first, second))
    if random.rand() < 0.2:
        h2 = h1
    if random.rand() < 0.2:  # not contiguous
        h1, h2 = (torch.stack((h, h), 2)[..., 0] if h.numel() % 2 else h.t().contiguous().t() for h in (h1, h2))
    tau = float(f / math.sqrt(n) / 18 * 10.0 ** random.choice([0, 0, 0, 0, -1, -2, -3, -6, 1, 3, 6]))
    beta = float(random.choice([0, 1, 1, 0.5, 100, 1e6]))
    prior = str(random.choice(["reverse", "forward"]))
    kind = "Hadamard" if hadamard else "Rademacher"
    name = f"case {seed}: {first}/{second}, n {n}, f {f}, c {c} {kind}, tau {tau:.2g}, beta {beta:g}, {prior}"
    return Case(h1, h2, codes, tau, beta, prior, name)


def evaluate(case: Case, h1: torch.Tensor, h2: torch.Tensor, implementation: str) -> Result:
    a, b = h1.detach().requires_grad_(), h2.detach().requires_grad_()
    out = falcon_loss(a, b, case.codes, case.tau, beta=case.beta, prior=case.prior, implementation=implementation)
    gradient = torch.cat(torch.autograd.grad(out.loss, (a, b))).double()
    return Result((out.loss.item(), out.prior.item(), out.invariance.item()), gradient)


def complaint(
    case: Case, implementation: str, rounding: float, loss: float = 1e-4, relative: float = 1e-3
) -> str | None:
    """Return what is wrong with an implementation's result for a case, None if it is right.

    rounding: how far an input may be off, relative to the largest of its row.
    """
    h1, h2 = case.h1.double(), case.h2.double()
    n, f = h1.shape
    largest_logit = max(h.abs().max().item() for h in (h1, h2)) * f / case.tau
    found = evaluate(case, case.h1, case.h2, implementation)
    beyond = {
        "cpu": largest_logit > LARGEST_LOGIT,
        "triton": max(h.abs().sum(1).max().item() for h in (h1, h2)) / case.tau > FARTHEST,
        "reference": largest_logit * (1 + case.beta) * max(1.0, 1 / case.tau) > 1e36,  # near the end of float32
    }
    finite = math.isfinite(found.terms[0]) and bool(torch.isfinite(found.gradient).all())
    if beyond[implementation] and not finite:  # the promise ends here: right, or not finite
        return None
    exact = evaluate(case, h1, h2, "reference")
    if max(abs(x) for x in exact.terms) > 1e37 or exact.gradient.abs().max() > 1e37:  # more than float32 holds
        return None
    if not all(map(math.isfinite, found.terms)) or not torch.isfinite(found.gradient).all():
        return f"{case.name}: not finite: {found.terms}, exact {exact.terms}"
    generator = torch.Generator().manual_seed(0)
    moved = []
    for _ in range(MOVES):
        noise = (torch.randn(h.shape, dtype=torch.float64, generator=generator) for h in (h1, h2))
        pair = (h + rounding * h.abs().amax(1, keepdim=True) * x for h, x in zip((h1, h2), noise, strict=True))
        moved.append(evaluate(case, *pair, "reference"))
    last_bit = 2.0**-22 * (1 + largest_logit)
    for i, name in enumerate(("loss", "prior", "invariance")):
        weight = case.beta if name == "loss" else 1.0
        allowed = 10 * max(abs(each.terms[i] - exact.terms[i]) for each in moved)
        allowed += loss * max(abs(exact.terms[i]), 0.01) + (1 + weight) * last_bit
        if abs(found.terms[i] - exact.terms[i]) > allowed:
            return f"{case.name}: {name} {found.terms[i]!r}, exact {exact.terms[i]!r}, allowed {allowed:.1e}"
    error = (found.gradient - exact.gradient).norm().item()
    allowed = 10 * max((each.gradient - exact.gradient).norm().item() for each in moved)
    allowed += relative * exact.gradient.norm().item() + 4 * (1 + case.beta) * last_bit * math.sqrt(f / n) / case.tau
    return f"{case.name}: gradient off by {error:.2e}, allowed {allowed:.2e}" if error > allowed else None


def complaints(seeds: range, implementation: str, rounding: float, **options: float) -> list[str]:
    largest = int(options.pop("largest", 1000))
    found = (complaint(case(seed, largest), implementation, rounding, **options) for seed in seeds)
    return [each for each in found if each is not None]
