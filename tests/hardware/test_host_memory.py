"""Freed memory that stays in the process: counted by page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from falcon_fast.hardware import host_memory

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


def test_what_is_free_is_the_least_of_the_limits(monkeypatch):
    cpu = torch.device("cpu")
    assert 0 < host_memory.available_memory(cpu) < 2**50
    for name, value in (("_meminfo", lambda name: 300), ("_cgroup", lambda: 200), ("_address_space", lambda: None)):
        monkeypatch.setattr(host_memory, name, value)
    assert host_memory.available_memory(cpu) == 200
    monkeypatch.setattr(host_memory, "_cgroup", lambda: None)
    assert host_memory.available_memory(cpu) == 300


def test_a_limit_of_the_address_space_counts():
    """Half a GiB more than the process has (`ulimit -v`)."""
    code = (
        "import resource, torch; from falcon_fast.hardware.host_memory import available_memory\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))\n"
        "print(available_memory(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 2**28 < int(done.stdout) <= 2**29 + 2**20


def test_a_failed_allocation_is_told_from_other_errors():
    for allocate in (lambda: torch.empty(1 << 54), lambda: bytearray(1 << 60)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert host_memory.is_out_of_memory(caught.value)
    assert host_memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not host_memory.is_out_of_memory(RuntimeError("shape mismatch"))
    assert not host_memory.is_out_of_memory(ValueError("out of memory"))
