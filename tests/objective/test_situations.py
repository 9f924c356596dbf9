"""The loss in every situation that a caller can bring: right, or one clear error. (The projector: test_projector.py.)"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from falcon_fast import FalconLoss, HadamardCodes, RademacherCodes, falcon_loss
from falcon_fast.kernels import why_no_triton
from falcon_fast.kernels.torch_private import FakeTensorMode

N, F, C, TAU = 6, 32, 128, 2.0
CODES = {"rademacher": RademacherCodes(F, C), "hadamard": HadamardCodes(F, C)}
HAS_TRITON = why_no_triton(torch.device("cpu")) is None
NAMED = ("cpu", "reference", *(("triton",) if HAS_TRITON else ()))
ONCE = tuple(name for name in NAMED if name != "reference")
IMPLEMENTATIONS = ("auto", *NAMED)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def views(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    h1, h2 = (torch.randn(N, F, generator=generator, dtype=torch.float64).tanh().to(dtype) for _ in range(2))
    return h1, h2


def exact(h1, h2, codes=CODES["rademacher"], needs=(True, True)):
    """The loss and the gradients, in float64."""
    a, b = (h.detach().double().requires_grad_(need) for h, need in zip((h1, h2), needs, strict=True))
    loss = falcon_loss(a, b, codes, TAU, implementation="reference").loss
    return loss.item(), torch.autograd.grad(loss, [h for h in (a, b) if h.requires_grad])


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-3) -> bool:
    return bool((found.double() - expected).norm() <= tolerance * expected.norm())


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> str:
    return request.param


@pytest.fixture(params=sorted(CODES))
def codes(request):
    return CODES[request.param]


# ---- which embeddings ----

LAYOUTS = {
    "contiguous": lambda h: h.clone(),
    "transposed": lambda h: h.t().contiguous().t(),
    "every second column": lambda h: torch.stack((h, -h), 2).flatten(1)[:, ::2],
    "every second row": lambda h: torch.stack((h, -h), 1).flatten(0, 1)[::2],
    "of a larger batch": lambda h: torch.cat((h, -h))[:N],
    "unaligned": lambda h: torch.cat((torch.zeros(1, dtype=h.dtype), h.flatten()))[1:].view(N, F),
    "a parameter": lambda h: nn.Parameter(h.clone()),
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_layouts_and_dtypes(implementation, codes, dtype, layout):
    if dtype == torch.float64 and implementation in ONCE:
        pytest.skip("computes in float32 and says so")
    if implementation == "triton" and dtype != torch.float32 and layout != "transposed":
        pytest.skip("the interpreter is slow")
    h1, h2 = views(dtype)
    value, gradients = exact(h1, h2, codes)
    a, b = (LAYOUTS[layout](h).detach().requires_grad_() for h in (h1, h2))
    out = falcon_loss(a, b, codes, TAU, implementation=implementation)
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.loss.item() == pytest.approx(value, rel=1e-4)
    tolerance = {torch.bfloat16: 1e-2, torch.float64: 1e-12}.get(dtype, 2e-3)
    for found, expected in zip(torch.autograd.grad(out.loss, (a, b)), gradients, strict=True):
        assert found.dtype == dtype and near(found, expected, tolerance)


def test_expanded_rows(implementation, codes):
    h1, h2 = views()
    row = h1[:1].clone().requires_grad_()
    loss = falcon_loss(row.expand(N, F), h2, codes, TAU, implementation=implementation).loss
    value, (gradient,) = exact(h1[:1].expand(N, F), h2, codes, (True, False))
    assert loss.item() == pytest.approx(value, rel=1e-4)
    assert near(torch.autograd.grad(loss, row)[0], gradient.sum(0, keepdim=True))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True), (False, False)], ids=str)
def test_gradients_of_the_views_that_need_one(implementation, codes, needs):
    h1, h2 = (h.requires_grad_(need) for h, need in zip(views(), needs, strict=True))
    loss = falcon_loss(h1, h2, codes, TAU, implementation=implementation).loss
    assert loss.requires_grad == any(needs)
    if any(needs):
        _, gradients = exact(h1, h2, codes, needs)
        found = torch.autograd.grad(loss, [h for h in (h1, h2) if h.requires_grad])
        assert all(near(mine, theirs) for mine, theirs in zip(found, gradients, strict=True))


def test_both_views_the_same_tensor(implementation, codes):
    h = views()[0].requires_grad_()
    loss = falcon_loss(h, h, codes, TAU, implementation=implementation).loss
    value, (first, second) = exact(h, h, codes)
    assert loss.item() == pytest.approx(value, rel=1e-4)
    assert near(torch.autograd.grad(loss, h)[0], first + second)


def test_one_image(implementation, codes):
    h1, h2 = (h[:1].requires_grad_() for h in views())
    loss = falcon_loss(h1, h2, codes, TAU, implementation=implementation).loss
    value, gradients = exact(h1, h2, codes)
    assert loss.item() == pytest.approx(value, rel=1e-4)
    assert all(near(a, b) for a, b in zip(torch.autograd.grad(loss, (h1, h2)), gradients, strict=True))


def test_codes_made_from_a_tensor_with_gradient_are_constants(implementation):
    h1, h2 = views()
    dense = CODES["rademacher"].dense().requires_grad_()
    loss = falcon_loss(h1, h2, RademacherCodes.from_dense(dense), TAU, implementation=implementation).loss
    assert not loss.requires_grad and loss.item() == pytest.approx(exact(h1, h2)[0], rel=1e-4)


# ---- in which mode ----

MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic": lambda: _deterministic(),
}


@contextlib.contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_modes(implementation, codes, mode):
    h1, h2 = (h.requires_grad_() for h in views())
    value, gradients = exact(h1, h2, codes)
    with MODES[mode]():
        out = falcon_loss(h1, h2, codes, TAU, implementation=implementation)
        assert out.loss.item() == pytest.approx(value, rel=1e-4)
        if mode in ("inference_mode", "no_grad"):
            assert not out.loss.requires_grad
            return
        if mode != "autocast":
            found = torch.autograd.grad(out.loss, (h1, h2))
    if mode == "autocast":  # torch recommends no backward pass under it: the reference's products would be bfloat16
        found = torch.autograd.grad(out.loss, (h1, h2))
    assert all(near(mine, theirs) for mine, theirs in zip(found, gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("embeddings", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_any_default_dtype(implementation, codes, dtype, embeddings):
    if implementation == "triton" and embeddings != torch.float32:
        pytest.skip("the interpreter is slow")
    h1, h2 = (h.requires_grad_() for h in views(embeddings))
    expected = falcon_loss(h1, h2, codes, TAU, implementation=implementation)
    gradients = torch.autograd.grad(expected.loss, (h1, h2))
    torch.set_default_dtype(dtype)
    try:
        kind = type(codes)(F, C)
        out = falcon_loss(h1, h2, kind, TAU, implementation=implementation)
        found = torch.autograd.grad(out.loss, (h1, h2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(out, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))


def test_tensors_made_in_inference_mode(implementation, codes):
    h1, h2 = views()
    with torch.inference_mode():
        inferred = h1.clone()
    h2.requires_grad_()
    loss = falcon_loss(inferred, h2, codes, TAU, implementation=implementation).loss
    assert near(torch.autograd.grad(loss, h2)[0], exact(h1, h2, codes, (False, True))[1][0])


# ---- differentiated how ----


def test_twice_with_retain_graph(implementation, codes):
    h1, h2 = (h.requires_grad_() for h in views())
    loss = falcon_loss(h1, h2, codes, TAU, implementation=implementation).loss
    first = torch.autograd.grad(loss, (h1, h2), retain_graph=True)
    second = torch.autograd.grad(-2 * loss, (h1, h2), retain_graph=True)
    assert all(torch.allclose(-2 * a, b, rtol=1e-6) for a, b in zip(first, second, strict=True))


def test_hooks_see_the_gradient(implementation):
    h1, h2 = (h.requires_grad_() for h in views())
    seen = []
    h1.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    falcon_loss(h1, h2, CODES["rademacher"], TAU, implementation=implementation).loss.backward()
    assert torch.equal(h1.grad, 2 * seen[0]) and near(seen[0], exact(h1, h2)[1][0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations(implementation, reentrant):
    h1, h2 = (h.requires_grad_() for h in views())
    loss = lambda a, b: falcon_loss(a * 1, b, CODES["rademacher"], TAU, implementation=implementation).loss  # noqa: E731
    checkpoint(loss, h1, h2, use_reentrant=reentrant).backward()
    assert all(near(h.grad, g) for h, g in zip((h1, h2), exact(h1, h2)[1], strict=True))


def test_second_derivatives_by_the_reference():
    h1, h2 = (h.requires_grad_() for h in views(torch.float64))
    (gradient,) = torch.autograd.grad(falcon_loss(h1, h2, CODES["rademacher"], TAU).loss, h1, create_graph=True)
    direction = torch.randn_like(h1)
    (second,) = torch.autograd.grad((gradient * direction).sum(), h1)
    near_by = [exact((h1 + sign * 1e-5 * direction).detach(), h2)[1][0] for sign in (1, -1)]
    assert near(second, (near_by[0] - near_by[1]) / 2e-5, 1e-6)


@pytest.mark.parametrize("implementation", ONCE)
def test_second_derivatives_are_refused_by_the_others(implementation):
    h1, h2 = (h.requires_grad_() for h in views())
    for call in (
        lambda loss: loss.backward(create_graph=True),
        lambda loss: torch.autograd.grad(loss, h1, create_graph=True),
    ):
        with pytest.raises(RuntimeError, match=r'differentiated once only.*implementation="reference"'):
            call(falcon_loss(h1, h2, CODES["rademacher"], TAU, implementation=implementation).loss)


OTHER = views()[1]


def _loss_of(h, **options):
    return falcon_loss(h, OTHER, CODES["rademacher"], TAU, **options).loss


TRANSFORMS = {
    "grad": (lambda f, h: torch.func.grad(f)(h), lambda h: exact(h, views()[1])[1][0]),
    "vmap": (
        lambda f, h: torch.func.vmap(f)(torch.stack((h, -h))),
        lambda h: torch.tensor([exact(x, views()[1])[0] for x in (h, -h)]),
    ),
    "vmap of grad": (
        lambda f, h: torch.func.vmap(torch.func.grad(f))(torch.stack((h, -h))),
        lambda h: torch.stack([exact(x, views()[1])[1][0] for x in (h, -h)]),
    ),
    "jvp": (
        lambda f, h: torch.func.jvp(f, (h,), (h.sin(),))[1],
        lambda h: (exact(h, views()[1])[1][0] * h.sin()).sum(),
    ),
    "jacfwd": (lambda f, h: torch.func.jacfwd(f)(h), lambda h: exact(h, views()[1])[1][0]),
    "forward mode": (lambda f, h: _forward_mode(f, h, h.sin()), lambda h: (exact(h, views()[1])[1][0] * h.sin()).sum()),
}


def _forward_mode(function, h, tangent):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(
            function(torch.autograd.forward_ad.make_dual(h, tangent))
        ).tangent.clone()


@pytest.mark.parametrize("transform", sorted(TRANSFORMS))
def test_transforms_of_functions(transform):
    apply, expected = TRANSFORMS[transform]
    h = views()[0]
    for options in ({}, {"implementation": "reference"}):
        assert near(apply(lambda x, options=options: _loss_of(x, **options), h), expected(h))
    for name in ONCE:
        with pytest.raises(ValueError, match=r"does not run under torch.func.*auto or reference"):
            apply(lambda x, name=name: _loss_of(x, implementation=name), h)


def test_compiled_whole(implementation, codes):
    h1, h2 = (h.requires_grad_() for h in views())
    module = FalconLoss(codes, TAU, implementation=implementation)
    loss = torch.compile(lambda a, b: module(a * 1, b).loss, fullgraph=True, backend="aot_eager")(h1, h2)
    value, gradients = exact(h1, h2, codes)
    assert loss.item() == pytest.approx(value, rel=1e-4)
    assert all(near(a, b) for a, b in zip(torch.autograd.grad(loss, (h1, h2)), gradients, strict=True))


# ---- without numbers ----


def test_meta_tensors(codes):
    h1, h2 = (h.to("meta").requires_grad_() for h in views())
    module = FalconLoss(copy.deepcopy(codes), TAU).to("meta")
    out = module(h1, h2)
    assert all(x.is_meta and x.dim() == 0 for x in out)
    assert torch.autograd.grad(out.loss, h1)[0].shape == (N, F)


def test_fake_tensors(implementation, codes):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        h1, h2 = (mode.from_tensor(h).requires_grad_() for h in views())
        out = falcon_loss(h1, h2, codes, TAU, implementation=implementation)
        (gradient,) = torch.autograd.grad(out.loss, h1)
    assert out.loss.shape == () and out.codes_used.dtype == torch.int64 and gradient.shape == (N, F)


# ---- copied, stored, and used at once ----


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": _saved,
    "half": lambda module: copy.deepcopy(module).half(),
    "double": lambda module: copy.deepcopy(module).double(),
    "state dict": lambda module: [
        each := FalconLoss(copy.deepcopy(module.codes), TAU),
        each.load_state_dict(module.state_dict()),
    ][0],
}


@pytest.mark.parametrize("how", sorted(COPIES))
def test_copies_of_the_module(codes, how):
    module = FalconLoss(codes, TAU, beta=0.5, prior="forward") if how != "state dict" else FalconLoss(codes, TAU)
    h1, h2 = views()
    other = COPIES[how](module)
    assert other is not module and torch.equal(other(h1, h2).loss, module(h1, h2).loss)


def test_several_python_threads(implementation, codes):
    inputs = [[torch.tanh(torch.randn(N + i, F)).requires_grad_() for _ in range(2)] for i in range(4)]
    expected = [
        torch.autograd.grad(falcon_loss(*pair, codes, TAU, implementation="reference").loss, pair) for pair in inputs
    ]
    wrong = []

    def work(i: int) -> None:
        for _ in range(1 if implementation == "triton" else 10):
            loss = falcon_loss(*inputs[i], codes, TAU, implementation=implementation).loss
            found = torch.autograd.grad(loss, inputs[i])
            if not all(near(a, b) for a, b in zip(found, expected[i], strict=True)):
                wrong.append(i)

    if implementation == "triton":
        pytest.skip("Triton's interpreter is not made for threads")
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1)])
def test_another_number_of_threads_between_forward_and_backward(codes, numbers):
    before = torch.get_num_threads()
    h1, h2 = (h.requires_grad_() for h in views())
    try:
        torch.set_num_threads(numbers[0])
        loss = falcon_loss(h1, h2, codes, TAU).loss
        torch.set_num_threads(numbers[1])
        found = torch.autograd.grad(loss, (h1, h2))
    finally:
        torch.set_num_threads(before)
    assert all(near(a, b) for a, b in zip(found, exact(h1, h2, codes)[1], strict=True))


FORKED = """
import os, torch
from falcon_fast import HadamardCodes, RademacherCodes, falcon_loss
torch.set_num_threads(2)
h1, h2 = torch.randn(64, 64).tanh().requires_grad_(), torch.randn(64, 64).tanh()
def both():
    found = []
    for codes in (RademacherCodes(64, 4096), HadamardCodes(64, 4096)):
        loss = falcon_loss(h1, h2, codes, 2.0, implementation="cpu").loss
        found += [loss.detach(), *torch.autograd.grad(loss, h1)]
    return found
expected = both()
child = os.fork()
if child == 0:
    found = both()
    os._exit(0 if all(torch.equal(a, b) for a, b in zip(found, expected)) else 3)
status = os.waitpid(child, 0)[1]
again = both()
assert all(torch.equal(a, b) for a, b in zip(again, expected))
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_after_its_parent():
    """In a process of its own: the child has none of the threads of its parent's OpenMP."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- what is refused ----

H1, H2 = views()
REFUSED = {
    "no rows": (lambda: falcon_loss(H1[:0], H2[:0], CODES["rademacher"], TAU), ValueError, "no rows"),
    "a vector": (lambda: falcon_loss(H1[0], H2[0], CODES["rademacher"], TAU), ValueError, "matrices"),
    "shapes": (lambda: falcon_loss(H1[1:], H2, CODES["rademacher"], TAU), ValueError, "one shape"),
    "width": (lambda: falcon_loss(H1[:, 1:], H2[:, 1:], CODES["rademacher"], TAU), ValueError, "width 31"),
    "dtypes": (lambda: falcon_loss(H1, H2.half(), CODES["rademacher"], TAU), ValueError, "one floating-point dtype"),
    "integers": (lambda: falcon_loss(H1.int(), H2.int(), CODES["rademacher"], TAU), ValueError, "floating-point"),
    "complex": (lambda: falcon_loss(H1 + 0j, H2 + 0j, CODES["rademacher"], TAU), ValueError, "floating-point"),
    "float8": (
        lambda: falcon_loss(H1.to(torch.float8_e4m3fn), H2.to(torch.float8_e4m3fn), CODES["rademacher"], TAU),
        ValueError,
        "float16, bfloat16, float32 or float64",
    ),
    "sparse": (lambda: falcon_loss(H1.to_sparse(), H2, CODES["rademacher"], TAU), ValueError, "dense"),
    "devices": (lambda: falcon_loss(H1, H2.to("meta"), CODES["rademacher"], TAU), ValueError, "share a device"),
    "a list": (lambda: falcon_loss(H1.tolist(), H2, CODES["rademacher"], TAU), TypeError, "h1 must be a tensor"),
    "an array": (lambda: falcon_loss(H1, H2.numpy(), CODES["rademacher"], TAU), TypeError, "h2 must be a tensor"),
    "dense codes": (lambda: falcon_loss(H1, H2, torch.ones(F, C), TAU), TypeError, "codes must be RademacherCodes"),
    "tau 0": (lambda: falcon_loss(H1, H2, CODES["rademacher"], 0.0), ValueError, "temperature must be positive"),
    "tau negative": (
        lambda: falcon_loss(H1, H2, CODES["rademacher"], -2.0),
        ValueError,
        "temperature must be positive",
    ),
    "tau nan": (lambda: falcon_loss(H1, H2, CODES["rademacher"], float("nan")), ValueError, "temperature"),
    "tau infinite": (lambda: falcon_loss(H1, H2, CODES["rademacher"], float("inf")), ValueError, "temperature"),
    "tau text": (lambda: falcon_loss(H1, H2, CODES["rademacher"], "2"), TypeError, "tau must be a number, not str"),
    "tau none": (lambda: falcon_loss(H1, H2, CODES["rademacher"], None), TypeError, "tau must be a number"),
    "tau learnt": (
        lambda: falcon_loss(H1, H2, CODES["rademacher"], nn.Parameter(torch.tensor(2.0))),
        TypeError,
        "tau must be a number without gradient",
    ),
    "beta negative": (
        lambda: falcon_loss(H1, H2, CODES["rademacher"], TAU, beta=-1),
        ValueError,
        "beta must be between",
    ),
    "beta nan": (
        lambda: falcon_loss(H1, H2, CODES["rademacher"], TAU, beta=float("nan")),
        ValueError,
        "beta must be between",
    ),
    "beta too large": (lambda: falcon_loss(H1, H2, CODES["rademacher"], TAU, beta=1e9), ValueError, "beta must be"),
    "beta several": (
        lambda: falcon_loss(H1, H2, CODES["rademacher"], TAU, beta=torch.ones(2)),
        TypeError,
        "beta must be",
    ),
    "prior": (lambda: falcon_loss(H1, H2, CODES["rademacher"], TAU, prior="both"), ValueError, "unknown prior"),
    "budget": (
        lambda: falcon_loss(H1, H2, CODES["rademacher"], TAU, memory_budget="1 GB"),
        TypeError,
        "memory_budget must be a number",
    ),
}


@pytest.mark.parametrize("situation", sorted(REFUSED))
def test_refused_in_a_line(situation):
    call, kind, words = REFUSED[situation]
    with pytest.raises(kind, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "number", [2, np.float32(2.0), np.float64(2.0), torch.tensor(2.0)], ids=["int", "f32", "f64", "0-d"]
)
def test_numbers_of_every_kind(implementation, number):
    out = falcon_loss(H1, H2, CODES["rademacher"], number, beta=number, implementation=implementation)
    assert out.loss.item() == pytest.approx(out.prior.item() + 2 * out.invariance.item(), rel=1e-5)
