"""Mutate files, and check that each is read or refused in one line: no crash, no hang, little memory, no changed file."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import select
import signal
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from falcon_fast.errors import UsageError

Mutation = Callable[[bytes, random.Random], bytes]
# How many mutations: few in every run of the tests, many before a release.
COUNTS = [200, pytest.param(10_000, marks=pytest.mark.slow)]
MIB = 2**20
PATIENCE = 1800.0  # seconds for a batch of mutations, on a machine of any load
OUT_OF_MEMORY = re.compile(r"MemoryError|memory of this machine|[Uu]nable to allocate|allocate memory|out of memory")
NUMBERS = (
    b"0", b"-1", b"1e999", b"-1e999", b"nan", b"NaN", b"inf", b"Infinity", b"1e308", b"0.1", b"1e-400", b"-0",
    b"2147483648", b"4294967295", b"9223372036854775807", b"9223372036854775808", b"99999999999999999999", b"9" * 5000,
    b"0x" + b"f" * 5000, b"true", b"1_0", b"\xd9\xa1",
)  # fmt: skip
TOKENS = (
    b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"=", b"\n", b"\r", b"\r\n", b"\0", b"\0" * 64, b"\\", b"\\u0000",
    b"\\ud800", b"null", b"../", b"/etc/passwd", b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[31m", b'"""', b"#", b"\xe2\x80\xa8",
)  # fmt: skip
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 2**31, 2**62, 2**63, 10**25, 1.5, 1e308, "", "a", "../x", "/dev/zero", "\0", "\ud800", "x" * 9999,
    [], {}, [[]], [-1], [2**62] * 3, [0] * 100, {"a": {}}, [1, "a", None],
)  # fmt: skip


@dataclass
class Outcome:
    """How a batch of mutations ended; `peak` is the memory in bytes that reading took at most."""

    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    peak: int = 0

    def __str__(self) -> str:
        return (
            f"{self.accepted + self.refused} mutations: {self.accepted} accepted, {self.refused} refused, "
            f"{self.seconds:.1f} s, {self.peak / MIB:.1f} MiB"
        )


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return `data` with one to three changes of the kinds that files suffer and that attackers make."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        data = _changed(data, chance)
    return data


def _changed(data: bytes, chance: random.Random) -> bytes:
    at, length = _place(len(data), chance), chance.randint(1, 64)
    head, tail = data[:at], data[at:]
    kind = chance.randrange(12)
    if kind == 0 and tail:
        return head + bytes([tail[0] ^ 1 << chance.randrange(8)]) + tail[1:]
    if kind == 1:
        return head + tail[length:]
    if kind == 2:
        return head + chance.randbytes(length) + tail
    if kind == 3:
        return head + chance.choice(TOKENS) + tail[chance.randint(0, 2) :]
    if kind == 4 and chance.random() < 0.3:
        return head
    if kind == 5:
        return head + tail[:length] + tail
    if kind == 6 and (numbers := list(re.finditer(rb"-?\d+(\.\d+)?", data[:65536]))):
        found = chance.choice(numbers)
        return data[: found.start()] + chance.choice(NUMBERS) + data[found.end() :]
    if kind == 7:
        format_ = chance.choice(("<I", ">I", "<Q", ">Q", "<H", "B"))
        top = 256 ** struct.calcsize(format_)
        return (
            head
            + struct.pack(format_, chance.choice((0, 1, top - 1, top // 2, top // 16)))
            + tail[struct.calcsize(format_) :]
        )
    if kind == 8 and chance.random() < 0.3:
        return (
            head
            + chance.choice((b"[", b'{"a":', b"(", b"a.", b"[[", b"{a=")) * chance.choice((10, 1000, 50_000))
            + tail
        )
    if kind == 9 and chance.random() < 0.3:
        return head + chance.choice((b"a", b",", b"9", b" ", b'"', b"\\")) * chance.choice((100, 5000, 300_000)) + tail
    if kind == 10 and (lines := data.split(b"\n"))[1:]:
        first, second = chance.randrange(len(lines)), chance.randrange(len(lines))
        lines[first] = lines[second]
        return b"\n".join(lines)
    if kind == 11 and chance.random() < 0.05:
        return chance.randbytes(chance.randint(0, 2000))
    return head + bytes([chance.randrange(256)]) + tail[1:]


def _place(size: int, chance: random.Random) -> int:
    """Where to change a file: what says how it is to be read mostly lies at its beginning and at its end."""
    if size > 4096 and chance.random() < 0.8:
        return chance.choice((chance.randrange(400), size - chance.randrange(400)))
    return chance.randrange(size + 1)


def json_mutated(data: bytes, chance: random.Random) -> bytes:
    """Return JSON, some of whose values are others, so that what is wrong is found behind the parser."""
    value = json.loads(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        value = _other(value, chance)
    text = json.dumps(value)
    if chance.random() < 0.1:  # a key twice
        text = text.replace("{", '{"tensors": 1, ', 1)
    return text.encode(errors="surrogatepass")


def _other(value: Any, chance: random.Random) -> Any:
    if isinstance(value, dict | list) and value and chance.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, copy = chance.choice(keys), value.copy()
        kind = chance.random()
        if kind < 0.1:
            del copy[key]
        elif kind < 0.2 and isinstance(copy, list):
            copy.append(copy[key])
        elif kind < 0.2 and isinstance(copy, dict):
            copy[chance.choice(("x", "", "network.0.weight", "../x", "x" * 999))] = copy.pop(key)
        else:
            copy[key] = _other(copy[key], chance)
        return copy
    return chance.choice(HOSTILE)


def fuzz(
    read: Callable[[], object],
    files: Sequence[Path],
    count: int,
    *,
    name: str,
    mutations: Sequence[Mutation] = (mutated,),
    refusals: tuple[type[Exception], ...] = (UsageError,),
    memory: int = 64 * MIB,
    writes: bool = False,
) -> Outcome:
    """Mutate one of `files` at a time, `count` times with the same changes in every run, and read.

    It is done in a process of its own, in which everything that reading may not do shows: another exception, a message of
    several lines, a crash, more than `memory` bytes, a hang, a file that has changed or was made.

    Args:
        read: reads the files in place; raises one of `refusals` if they are not valid.
        files: valid files in one directory.
        name: what the line of counts begins with.
        mutations: what changes a file; chosen at random for each mutation.
        writes: reading a valid file may write.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as answer:
            try:
                result: Any = vars(_mutate_all(read, files, count, mutations, refusals, memory, writes))
            except BaseException:
                result = traceback.format_exc()
            answer.write(json.dumps(result))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        if not select.select([answer], [], [], PATIENCE)[0]:
            os.kill(child, signal.SIGKILL)
        text = answer.read()
    _, status = os.waitpid(child, 0)
    assert text, f"{name}: reading ended the process with status {status} (24: too much time; 9: waited for ever)"
    result = json.loads(text)
    assert isinstance(result, dict), result
    outcome = Outcome(**result)
    print(f"{name}: {outcome}")
    return outcome


def _mutate_all(
    read: Callable[[], object],
    files: Sequence[Path],
    count: int,
    mutations: Sequence[Mutation],
    refusals: tuple[type[Exception], ...],
    memory: int,
    writes: bool,
) -> Outcome:
    originals = {path: path.read_bytes() for path in files}

    def restore() -> None:
        for path, data in originals.items():
            path.write_bytes(data)

    read()  # must be accepted; it also imports what reading needs
    restore()
    # CPU time, which other processes do not lengthen: 30 s, and 0.2 s for each mutation, which takes a few milliseconds.
    resource.setrlimit(resource.RLIMIT_CPU, (30 + count // 5, 60 + count // 5))
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + memory + 64 * MIB, resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    began, resident = time.monotonic(), _status("VmRSS")
    chance, outcome = random.Random(0), Outcome()
    for number in range(count):
        victim = chance.choice(list(originals))
        changed = chance.choice(mutations)(originals[victim], chance)
        victim.write_bytes(changed)
        expected = _contents(files)
        try:
            read()
            outcome.accepted += 1
            assert writes or _contents(files) == expected, f"mutation {number} of {victim.name}: a file has changed"
        except refusals as error:
            outcome.refused += 1
            message = str(error)
            if refusals == (UsageError,):
                assert message.isprintable(), f"mutation {number} of {victim.name}: {message!r}"
                assert len(message) < 2000, f"mutation {number} of {victim.name}: {message[:2000]}"
            assert not OUT_OF_MEMORY.search(message), f"mutation {number} of {victim.name}: {message}"
            assert _contents(files) == expected, f"mutation {number} of {victim.name}: a file has changed"
        except BaseException as error:
            error.add_note(f"mutation {number} of {victim.name}: {changed[:300]!r}")
            raise
        restore()
    outcome.seconds, outcome.peak = time.monotonic() - began, max(0, _status("VmHWM") - resident)
    assert outcome.peak < memory, f"{outcome.peak / MIB:.0f} MiB"
    return outcome


def _contents(files: Sequence[Path]) -> dict[Path, bytes]:
    """Every file next to `files`."""
    return {
        path: path.read_bytes() for folder in {p.parent for p in files} for path in folder.iterdir() if path.is_file()
    }


def _status(name: str) -> int:
    """A number of this process's state, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) * 1024
