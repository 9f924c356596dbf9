"""Commands of falcon-fast in processes of their own that start in no time, because they are forked from one that has torch.

A test starts a `Host`, which is this file as a script. Its children behave as if the console script had been started: they
run `cli.entry.main` in a session of their own, and end as the interpreter ends. What they leave behind becomes the host's child
(it is a "subreaper"), so that orphans are seen.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SHIM = Path(__file__).with_name("failing_writes.c")
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Host:
    """A process from which commands are forked. A context that ends it.

    Args:
        preload: a shared library for LD_PRELOAD: `failing_writes.c`, compiled.
    """

    def __init__(self, folder: Path, preload: Path | None = None) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
        environment |= {"XDG_CACHE_HOME": str(folder / "cache")}
        if preload is not None:
            environment["LD_PRELOAD"] = str(preload)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
        )

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, arguments: Sequence[object], log: Path, **options: Any) -> int:
        """Start `falcon-fast ARGUMENTS` with its output appended to `log`, and return its process number.

        Options: environment (variables); fail (folder, k, errno, once): the k-th write below the folder fails, and all after it
        unless `once`; count: a file that receives the number of writes.
        """
        return int(self._ask(start=list(map(str, arguments)), log=str(log), **options))

    def wait(self, process: int, seconds: float = 120) -> int | None:
        """Return the exit code of a process, negative for a signal; None if it does not end in time."""
        return self._ask(wait=process, seconds=seconds)

    def orphans(self) -> list[str]:
        """Return the command lines of the processes that the commands left behind 1 s ago, and end them."""
        return list(self._ask(orphans=True))

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def torchrun_variables(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells its processes."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()} | {"MASTER_ADDR": "127.0.0.1"}


def children(process: int) -> list[int]:
    """Return the process numbers of a process's children."""
    try:
        return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


# ---- the host itself ----


def _command(request: Mapping[str, Any]) -> None:
    os.setsid()
    with open(request["log"], "a") as log:  # noqa: PTH123
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request.get("environment", {}))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    if "fail" in request:
        folder, k, number, once = request["fail"]
        ctypes.CDLL(None).failing_writes(str(folder).encode(), k, number, int(once))
    sys.argv = ["falcon-fast", *request["start"]]
    from falcon_fast.cli.entry import main

    try:
        main()
    finally:
        if "count" in request:
            Path(request["count"]).write_text(str(ctypes.CDLL(None).failing_writes_calls()))


def _wait(process: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def _orphans() -> list[str]:
    end = time.monotonic() + 1
    while (left := children(os.getpid())) and time.monotonic() < end:
        time.sleep(0.02)
        while left and os.waitpid(-1, os.WNOHANG)[0]:
            left = children(os.getpid())
    found = []
    for each in left:
        found.append(Path(f"/proc/{each}/cmdline").read_text().replace("\0", " "))
        os.kill(each, signal.SIGKILL)
        os.waitpid(each, 0)
    return found


def _serve() -> bool:
    """Answer requests until there are no more. Returns True in a child that is to run a command."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any
        if "start" in request:
            answer = os.fork()
            if not answer:
                globals()["_request"] = request
                return True
        elif "wait" in request:
            answer = _wait(request["wait"], request["seconds"])
        else:
            answer = _orphans()
        print(json.dumps(answer), flush=True)
    return False


# What a run imports on its way; without it each of them takes 3 s more.
PRELOADED = (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "rich.progress",
    "rich.table",
    "safetensors.torch",
    "scipy.stats",
    "sklearn.cluster",
    "sklearn.linear_model",
    "sklearn.metrics",
    "timm",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "falcon_fast.cli.main",
    "falcon_fast.evaluation.report",
    "falcon_fast.runs.results",
    "falcon_fast.training.trainer",
)

if __name__ == "__main__":
    for each in PRELOADED:
        importlib.import_module(each)
    from PIL import Image

    Image.init()
    if _serve():
        _command(globals()["_request"])
