"""The compiled C++ module: its functions with their types, how tensors reach it, and why it is missing where it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

Array = TypeVar("Array", contravariant=True)


class StripKernels(Protocol[Array]):
    """What the sweeps do with one strip of logits; shapes as in `fallback.py`, which has the same functions in PyTorch."""

    def strip_rows(self, z: Array, first: int, state: Array, threads: int, /) -> None: ...
    def strip_columns(
        self, z: Array, terms: Array, peak: Array, log_sum: Array, first: int, threads: int, /
    ) -> None: ...
    def prior_columns(
        self,
        peak: Array,
        log_sum: Array,
        log_rows: float,
        codes: int,
        forward: bool,
        first: int,
        width: int,
        weight: Array,
        q: Array,
        /,
    ) -> list[float]: ...
    def strip_prior(self, e: Array, q: Array, first: int, a: Array, threads: int, /) -> None: ...
    def strip_gradient(
        self,
        z: Array,
        terms: Array,
        peak: Array,
        weight: Array,
        q: Array,
        first: int,
        beta: float,
        factor: float,
        forward: bool,
        threads: int,
        /,
    ) -> None: ...
    def strip_encode(self, z: Array, stored: Array, tiles: Array, first: int, threads: int, /) -> None: ...
    def strip_decode(self, z: Array, stored: Array, tiles: Array, first: int, count: int, threads: int, /) -> None: ...


class Extension(StripKernels[Array], Protocol[Array]):
    """Every function of the module (bindings.cpp, bindings_views.cpp). They check the shapes and raise ValueError."""

    def scratch_kept(self) -> int: ...
    def team_members(self, threads: int) -> list[int]: ...
    def levels(self) -> list[str]: ...
    def level(self) -> str: ...
    def use_level(self, name: str) -> None: ...
    def fast_int16(self) -> bool: ...
    def pack_signs(self, signs: Array, words: Array) -> None: ...
    def unpack_signs(self, words: Array, signs: Array) -> None: ...
    def dense_logits(
        self, z: Array, a: Array, scale: Array, words: Array, first: int, count: int, int16: bool, threads: int
    ) -> None: ...
    def dense_gradient(
        self, dz: Array, words: Array, first: int, count: int, dh: Array, int16: bool, threads: int
    ) -> None: ...
    def hadamard_rows(
        self, h1: Array, h2: Array, scale: float, words: Array, segment: int, state: Array, threads: int
    ) -> None: ...
    def hadamard_columns(
        self,
        h1: Array,
        h2: Array,
        scale: float,
        words: Array,
        segment: int,
        terms: Array,
        peak: Array,
        log_sum: Array,
        weight: Array,
        q: Array,
        a: Array,
        log_rows: float,
        forward: bool,
        alone: bool,
        threads: int,
    ) -> list[float]: ...
    def hadamard_prior(
        self,
        h1: Array,
        h2: Array,
        scale: float,
        words: Array,
        segment: int,
        terms: Array,
        peak: Array,
        weight: Array,
        q: Array,
        a: Array,
        threads: int,
    ) -> None: ...
    def hadamard_gradient(
        self,
        h1: Array,
        h2: Array,
        scale: float,
        words: Array,
        segment: int,
        terms: Array,
        peak: Array,
        weight: Array,
        q: Array,
        beta: float,
        factor: float,
        forward: bool,
        dh1: Array,
        dh2: Array,
        threads: int,
    ) -> None: ...
    def resize_crops(
        self, images: Sequence[NDArray[np.uint8]], boxes: Array, flips: Array, out: Array, threads: int
    ) -> None: ...
    def augment_views(
        self,
        images: Array,
        factors: Array,
        order: Array,
        gray: Array,
        sigma: Array,
        solarize: Array,
        mean: Array,
        std: Array,
        window: int,
        threshold: float,
        out: Array,
        threads: int,
    ) -> None: ...


MODULE = "falcon_fast.kernels._cpu"
KERNELS = Path(__file__).parents[1]

_error: ImportError | None = None
cpu_extension: Extension[NDArray[Any]] | None
try:
    cpu_extension = cast(Extension[NDArray[Any]], import_module(MODULE))
except ImportError as error:
    cpu_extension, _error = None, error


def why_no_extension() -> str | None:
    """Return None if the C++ kernels are in use, else the reason in one phrase that also says what to do."""
    if cpu_extension is not None or _error is None:
        return None
    if not isinstance(_error, ModuleNotFoundError) or _error.name != MODULE:
        return f"the compiled module of the C++ kernels cannot be loaded ({_error}); run pip install again"
    built = _built_elsewhere()
    if built is not None:
        return (
            f"Python imports falcon_fast from the source tree at {KERNELS.parent}, but its compiled module is in {built}; "
            "start Python in another directory, or install with pip install -e ."
        )
    return (
        "the C++ kernels were not built, as there was no C++ compiler at installation; with one, run pip install again"
    )


def _built_elsewhere() -> Path | None:
    """Return the directory of the installed package's compiled module if that is not the package in use, else None.

    A clone has the Python of the kernels, but not the module. After a plain `pip install .`, Python started in the clone
    imports the clone's package, because the current directory comes first in the module search path.
    """
    try:
        installed = Path(str(metadata.distribution("falcon_fast").locate_file("falcon_fast/kernels")))
    except metadata.PackageNotFoundError:
        return None
    if not any((installed / f"_cpu{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
        return None
    return None if installed.resolve() == KERNELS.resolve() else installed


def team_members(threads: int) -> list[int] | None:
    """Return the kernel's numbers of torch's OpenMP threads, the calling thread's among them, for a team of `threads`.

    None if they are not known: without the C++ kernels, or with those of an older version.
    """
    members = getattr(cpu_extension, "team_members", None)
    return None if members is None else list(members(threads))


class Compiled:
    """The functions of the module for tensors, which share their memory with the arrays that C++ sees."""

    def __init__(self, module: Extension[NDArray[Any]] | None) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name, None)
        if function is None:  # as in an editable installation after an update
            raise RuntimeError(f"the C++ kernels are older than the code and have no {name}: run pip install again")

        def call(*arguments: Any) -> Any:
            return function(*(x.numpy() if isinstance(x, torch.Tensor) else x for x in arguments))

        return call


def compiled() -> Extension[torch.Tensor | NDArray[Any]]:
    """Return the functions of the module for tensors and arrays; a call raises RuntimeError if the module lacks the function."""
    return cast(Extension[torch.Tensor | NDArray[Any]], Compiled(cpu_extension))
