"""What does not fit into the memory: one line that says what was tried and what to change, if possible before a step is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from falcon_fast.errors import TrainingError, UsageError
from falcon_fast.hardware.host_memory import available_memory, is_out_of_memory
from falcon_fast.kernels import loss_implementations, why_no_triton
from falcon_fast.kernels.cpu import plan as cpu_plan
from falcon_fast.models.batchnorm import has_batchnorm
from falcon_fast.objective import planner
from falcon_fast.objective.reference import PEAK_COPIES
from falcon_fast.training.run import Run


@contextmanager
def out_of_memory(run: Run, kept: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn an allocation that fails inside the context into a TrainingError.

    The message names the batch, the plan of the loss, and what to change. It ends with what `kept()` returns: what is saved.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # numpy and Python raise MemoryError
        if not is_out_of_memory(error):
            raise
        remedies = "; or ".join(_remedies(run)) or "a smaller network"
        line = f"{_where(run.device)} does not have enough memory for {_batch(run)}: use {remedies}"
        raise TrainingError(line + (f" ({kept()})" if kept else "")) from None


def check_fits(run: Run) -> None:
    """Check that the loss of this run can be computed here: its implementation, plan and budget fit together and the device.

    Raises:
        UsageError: they do not; the line says what to change.
    """
    loss, runs_here = run.config.loss, loss_implementations(run.device)
    if loss.implementation not in ("auto", *runs_here):
        reason = f" ({why_no_triton(run.device)})" if loss.implementation == "triton" else ""
        raise UsageError(
            f"loss.implementation={loss.implementation} does not run on {run.device}{reason}: choose auto or one of "
            f"{', '.join(runs_here)}"
        )
    implementation = runs_here[0] if loss.implementation == "auto" else loss.implementation
    if implementation == "reference" and loss.plan != "auto":
        raise UsageError(
            f"loss.implementation=reference has no plan {loss.plan}: use loss.plan=auto, or another implementation"
        )
    if implementation == "triton" and run.device.type == "cpu":
        return  # Triton's interpreter, for tests: there is no GPU whose plan could be looked up
    try:
        name, peak, _ = loss_plan(run)
    except ValueError as error:
        raise UsageError(f"loss.memory_budget={loss.memory_budget} cannot be kept: {error}") from None
    if loss.memory_budget and peak > loss.memory_budget * 2**20:
        raise UsageError(
            f"loss.memory_budget={loss.memory_budget} cannot be kept: the {name} plan needs {peak / 2**20:,.0f} MiB: raise it, "
            "or lower --batch-size or --num-codes"
        )
    if peak > (free := available_memory(run.device)):
        remedies = "; or ".join(_remedies(run)) or "fewer codes (--num-codes)"
        raise UsageError(
            f"the loss needs {peak / 2**30:,.1f} GiB in its {name} plan, and {_where(run.device)} has {free / 2**30:,.1f} GiB "
            f"left: use {remedies}"
        )


def _where(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    facts = torch.cuda.get_device_properties(device)
    return f"{device} ({facts.name}, {facts.total_memory / 2**30:.0f} GiB)"


def _batch(run: Run) -> str:
    training, processes = run.config.training, run.processes.world_size
    name, peak, _ = loss_plan(run)
    parts = f" in {processes} processes" if processes > 1 else ""
    parts += f" in {training.accumulate} micro-batches" if training.accumulate > 1 else ""
    return f"a batch of {training.batch_size} images{parts} and the loss's {name} plan, which needs {peak / 2**20:,.0f} MiB"


def images_at_once(run: Run) -> int:
    """Return the number of images that one process has in one micro-batch, each of them in two views."""
    return run.config.training.batch_size // run.processes.world_size // run.config.training.accumulate


def loss_plan(run: Run) -> tuple[str, int, int | None]:
    """Return the plan of the loss in this run, its bytes at the peak, and those of the streaming plan if it needs less."""
    loss, n = run.config.loss, images_at_once(run)
    f, c, budget = loss.embedding_dim, loss.num_codes, loss.memory_budget * 2**20 or None
    implementation = loss.implementation if loss.implementation != "auto" else loss_implementations(run.device)[0]
    if implementation == "reference":
        return "reference", PEAK_COPIES * n * c * 4, None
    if implementation == "cpu":
        if loss.codes == "hadamard":
            return "streaming", cpu_plan.hadamard_plan(n, f, c, budget).peak, None
        chosen = cpu_plan.dense_plan(n, f, c, loss.plan, budget)
        name, peaks = "stored" if chosen.stored else "streaming", {"stored": chosen.peak}
        peaks["streaming"] = cpu_plan.dense_plan(n, f, c, "streaming", None).peak
    else:
        name_of_device, capability = (
            torch.cuda.get_device_name(run.device),
            torch.cuda.get_device_capability(run.device),
        )
        device = planner.nearest_device(name_of_device, capability)
        found = planner.candidates(n, f, c, loss.codes, device, budget)
        peaks = {candidate.name: candidate.peak for candidate in found[:-1]}
        name = loss.plan if loss.plan in peaks else planner.choose(n, f, c, loss.codes, device, budget).name
    streaming = peaks["streaming"] if name == "stored" and peaks["streaming"] < peaks["stored"] else None
    return name, peaks[name], streaming


def _remedies(run: Run) -> Iterator[str]:
    """Yield what to change, starting with what costs the least speed."""
    training, processes = run.config.training, run.processes.world_size
    name, _, streaming = loss_plan(run)
    if streaming is not None:
        yield f"--set loss.plan=streaming, which needs {streaming / 2**20:,.0f} MiB"
    if name == "reference":
        yield "a smaller dictionary (--num-codes)"
    if run.amp_dtype is None and run.device.type == "cuda":
        yield "--amp, which halves the activations"
    least = 2 if has_batchnorm(run.network) else 1
    share = training.batch_size // processes
    finer = [k for k in range(training.accumulate + 1, share // least + 1) if share % k == 0]
    if finer:
        yield f"--accumulate {finer[0]}"
    if share > least:
        yield f"--batch-size {max(least, share // 2) * processes}"
    if not run.sharded and processes > 1:
        yield "--strategy fsdp"
