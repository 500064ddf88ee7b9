"""Every Triton kernel compiled ahead of time, on a machine without a GPU.

The public functions run on CPU tensors of a GPU's sizes whose values nobody reads: the launchers
choose the kernels and Triton's own specialisation their signatures, and each launch ends after the
compiler. Nothing may spill (STACK, LOCAL), and where the layout allows it global memory is accessed
16 bytes at a time.

    python -m tests.aot [--full] [--capability 80 90 100] [--only TEXT ...]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels are not compiled

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from fastnorm import dispatch, functional
from fastnorm.ops import launch
from fastnorm.ops.activation import NAMES
from fastnorm.ops.batch_norm import sync

CAPABILITIES = (80, 90, 100)
PROCESSORS = 132
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WIDE_ACCESS = re.compile(r"(?:\.v4\.[bf]32|\.v2\.[bf]64|\.v8\.[bf]32|\.v4\.[bf]64)\b")
# they read a few numbers per channel or row: nothing there is worth 16 bytes
NARROW = {"finalize_kernel", "merge_ranks_kernel"}


@dataclass(frozen=True)
class Job:
    """`run()` launches kernels; `aligned`: each row of memory is a multiple of 16 bytes."""

    name: str
    run: Callable[[], None]
    aligned: bool


@dataclass(frozen=True)
class Report:
    """What the assembler says of one kernel."""

    job: str
    kernel: str
    capability: int
    registers: int
    stack: int
    local: int
    loads: int
    stores: int
    aligned: bool

    @property
    def fault(self) -> str | None:
        if self.stack or self.local:
            return f"STACK:{self.stack} LOCAL:{self.local}"
        if not self.aligned or self.kernel in NARROW:
            return None
        if not self.loads:
            return "no 16-byte load"
        # some write one sum per column or channel and nothing else: the first of two launches over
        # columns, mean-only's backward in eval mode, where dx is dy, and what synchronised batch
        # norm tells other processes
        sums = self.kernel.startswith(("columns_", "statistics_")) or (
            self.job.startswith(("mean_only", "synchronised"))
            and self.kernel == "backward_pass_kernel"
        )
        if not self.stores and not sums:
            return "no 16-byte store"
        return None

    def __str__(self) -> str:
        return (
            f"sm_{self.capability} {self.job:40} {self.kernel:24} {self.registers:3} registers, "
            f"{self.loads:3} wide loads, {self.stores:3} wide stores  {self.fault or ''}"
        )


class Driver:
    """A device that exists only for the compiler; its number is its compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def differentiate(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    for x in inputs:
        x.requires_grad_()
    y = function(*inputs)
    torch.autograd.grad(y, inputs, torch.empty_like(y), allow_unused=True)


def planes(layout: str) -> Callable[[torch.dtype], Tensor]:
    """An empty [N, C, ...] tensor in one of the layouts of batch norm."""
    last = torch.channels_last
    makers: dict[str, Callable[[torch.dtype], Tensor]] = {
        "nchw": lambda t: torch.empty(32, 64, 56, 56, dtype=t),
        "nchw-tiny": lambda t: torch.empty(4, 512, 8, 8, dtype=t),
        "nchw-odd": lambda t: torch.empty(64, 512, 7, 7, dtype=t),
        "nhwc": lambda t: torch.empty(32, 256, 14, 14, dtype=t, memory_format=last),
        "nlc": lambda t: torch.empty(16, 512, 256, dtype=t).transpose(1, 2),
        "nc": lambda t: torch.empty(4096, 512, dtype=t),
    }
    return makers[layout]


def batch_norm(layout: str, dtype: torch.dtype, activation: str | None, training: bool) -> None:
    x = planes(layout)(dtype)
    weight, bias, mean, var = (torch.empty(x.size(1), dtype=dtype) for _ in range(4))
    residual = [] if activation is None else [torch.empty_like(x)]

    def function(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        return functional.batch_norm(
            x, mean, var, weight, bias, training, activation=activation,
            residual=residual[0] if residual else None,
            num_batches_tracked=torch.empty((), dtype=torch.long),
        )  # fmt: skip

    differentiate(function, x, weight, bias, *residual)


def mean_only(layout: str, dtype: torch.dtype, training: bool) -> None:
    x = planes(layout)(dtype)
    bias, mean = (torch.empty(x.size(1), dtype=dtype) for _ in range(2))
    differentiate(lambda x, b: functional.mean_only_batch_norm(x, mean, b, training), x, bias)


def synchronised(layout: str, dtype: torch.dtype, activation: str | None) -> None:
    """What comes before and after the two collectives of synchronised batch norm."""
    x, ranks = planes(layout)(dtype), 4
    residual = None if activation is None else torch.empty_like(x)
    weight, bias, running_mean, running_var = (
        torch.empty(x.size(1), dtype=dtype) for _ in range(4)
    )
    statistics = sync._statistics(x)
    gathered = statistics.expand(ranks, -1).contiguous()
    tracked = torch.empty((), dtype=torch.long)
    mean, var, count = sync._merge(gathered, running_mean, running_var, tracked, None)
    given = x, torch.empty_like(x), residual, weight, bias, mean, var
    f = activation or "identity"
    sums = torch.cat(sync._reduce(*given, f))
    sync._apply(*given, sums, count, f, activation is not None)


def layer_norm(rows: int, cols: int, dtype: torch.dtype, activation: str | None) -> None:
    x = torch.empty(rows, cols, dtype=dtype)
    weight, bias = (torch.empty(cols, dtype=dtype) for _ in range(2))
    residual = [] if activation is None else [torch.empty_like(x)]

    def function(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        return functional.layer_norm(
            x, (cols,), weight, bias, activation=activation,
            residual=residual[0] if residual else None,
        )  # fmt: skip

    differentiate(function, x, weight, bias, *residual)


def weight_norm(shape: tuple[int, ...], dim: int | None, dtype: torch.dtype) -> None:
    kept = [n if i == dim else 1 for i, n in enumerate(shape)]
    g = torch.empty(kept if dim is not None else (), dtype=dtype)
    v = torch.empty(shape, dtype=dtype)
    differentiate(lambda v, g: functional.weight_norm(v, g, dim), v, g)


def swish(layout: str, dtype: torch.dtype, per_channel: bool) -> None:
    x = planes(layout)(dtype)
    beta = torch.empty(x.size(1) if per_channel else 1, dtype=dtype)
    differentiate(functional.swish, x, beta)


def jobs(full: bool) -> Iterator[Job]:
    """Each kernel x layout x dtype with one activation, each activation once; all of it if full."""

    def job(function: Callable[..., None], *values: Any, aligned: bool = True) -> Job:
        said = "-".join(str(v).removeprefix("torch.").replace(" ", "") for v in values)
        return Job(f"{function.__name__}-{said}", lambda: function(*values), aligned)

    fused = (None, *NAMES[1:]) if full else (None, "silu")
    for dtype in FLOATS:
        for layout in ("nchw", "nchw-tiny", "nchw-odd", "nhwc", "nlc", "nc"):
            aligned = layout != "nchw-odd"
            if not full and dtype == torch.float64 and layout not in ("nchw", "nhwc"):
                continue
            for training in (True, False):
                if not full and not training and layout.startswith("nchw-"):
                    continue  # in eval mode they differ from nchw in numbers alone
                for activation in fused if full or (training and layout == "nchw") else ("silu",):
                    yield job(batch_norm, layout, dtype, activation, training, aligned=aligned)
                    if training:
                        yield job(synchronised, layout, dtype, activation, aligned=aligned)
                if full or (layout in ("nchw", "nhwc") and dtype == torch.float32):
                    yield job(mean_only, layout, dtype, training, aligned=aligned)
            if full or layout in ("nchw", "nhwc"):
                for per_channel in (True, False):
                    yield job(swish, layout, dtype, per_channel, aligned=aligned)
        for rows, cols in ((8192, 64), (8192, 769), (4096, 1024), (512, 40960), (4, 1 << 18)):
            for activation in fused if full else ("silu",):
                aligned = cols % 16 == 0
                yield job(layer_norm, rows, cols, dtype, activation, aligned=aligned)
        for shape, dim in (
            ((512, 1152), 0),
            ((512, 1152), 1),
            ((768, 48, 128), 2),
            ((64, 64), None),
        ):
            yield job(weight_norm, shape, dim, dtype)
    for name in NAMES[1:]:
        for dtype in FLOATS if full or name == "gelu" else FLOATS[:1]:
            yield job(activation_alone, name, dtype)


def activation_alone(name: str, dtype: torch.dtype) -> None:
    differentiate(lambda x: functional.activation(x, name), torch.empty(1 << 20, dtype=dtype))


def compiled(job: Job, capability: int) -> list[tuple[str, Any]]:
    """(name, compiled kernel) of every launch of the job, none of which reaches a device."""
    found: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    driver.set_active(Driver(capability))
    dispatch._refusal = lambda name, x: None
    launch.processors = lambda device: PROCESSORS
    try:
        with dispatch.backend("triton"):
            job.run()
    finally:
        JITFunction.run = run
    return found


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, ... of the one kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    if found.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump reports no resources: {said}")
    return found


def accesses(ptx: str, instruction: str) -> int:
    return sum(
        1
        for line in ptx.splitlines()
        if f"{instruction}.global" in line and WIDE_ACCESS.search(line)
    )


def reports(index: int, full: bool, capability: int) -> list[Report]:
    """One report per kernel that job number `index` launches."""
    job = list(jobs(full))[index]
    found = []
    for name, kernel in compiled(job, capability):
        use, ptx = resources(kernel.asm["cubin"]), kernel.asm["ptx"]
        loads, stores = accesses(ptx, "ld"), accesses(ptx, "st")
        usage = (use["REG"], use["STACK"], use["LOCAL"], loads, stores)
        found.append(Report(job.name, name, capability, *usage, job.aligned))
    if not found:
        raise RuntimeError(f"{job.name} launches no kernel")
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every activation in every kernel")
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="jobs whose name contains one of these"
    )
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args(arguments)
    began, results = time.time(), []
    numbers = [
        i
        for i, job in enumerate(jobs(chosen.full))
        if any(text in job.name for text in chosen.only)
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(chosen.processes, mp_context=spawn) as pool:
        pending = [
            pool.submit(reports, number, chosen.full, capability)
            for capability in chosen.capability
            for number in numbers
        ]
        for future in pending:
            for report in future.result():
                results.append(report)
                print(report, flush=True)
    faults = [report for report in results if report.fault]
    for report in faults:
        print("FAULT", report)
    print(
        f"{len(results)} kernels for {', '.join(f'sm_{c}' for c in chosen.capability)}, Triton "
        f"{triton.__version__}: {len(faults)} faults, {time.time() - began:.0f} s"
    )
    return 1 if faults or not results else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
