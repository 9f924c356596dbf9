from __future__ import annotations

import pytest

from falcon_fast import kernels


def test_the_extension_is_built_where_there_is_a_compiler():
    import shutil

    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    assert kernels.cpu_extension is not None
