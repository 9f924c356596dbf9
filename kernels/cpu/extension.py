"""The compiled C++ module, and how tensors reach it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

try:
    cpu_extension: ModuleType | None = import_module("falcon_fast.kernels._cpu")
except ImportError:
    cpu_extension = None


class Compiled:
    """The functions of the extension, taking tensors: they share their memory with the arrays that C++ sees."""

    def __init__(self, module: ModuleType | None) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name, None)
        if function is None:  # as in an editable installation after an update
            raise RuntimeError(f"the C++ kernels are older than the code and have no {name}: run pip install again")

        def call(*arguments: Any) -> Any:
            return function(*(x.numpy() if isinstance(x, torch.Tensor) else x for x in arguments))

        return call
