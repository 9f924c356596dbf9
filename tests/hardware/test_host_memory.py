"""Freed memory that stays in the process: counted by page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Runs in a process of its own, because the setting holds until the process ends. The heap takes new pages for up to nine of the
# first tensors, depending on where they happen to lie, and none after that.
FAULTS = """
import sys, resource, torch
from falcon_fast.hardware.host_memory import keep_host_memory
if sys.argv[1] == "kept":
    if not keep_host_memory(torch.device("cpu")):
        sys.exit(2)
else:
    assert not keep_host_memory(torch.device("cuda"))
for _ in range(30):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept_for_the_next_tensor():
    pages = 10 * 2**26 // 4096
    done = {
        way: subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True) for way in ("kept", "")
    }
    if done["kept"].returncode == 2:
        pytest.skip("not glibc")
    assert int(done["kept"].stdout) < pages / 4, done["kept"].stderr
    if int(done[""].stdout) < pages / 2:
        pytest.skip("memory comes in pages larger than 4 KiB")  # and the first line says nothing
