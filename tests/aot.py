"""Every Triton kernel compiled ahead of time, on a machine without a GPU.

The jobs of aot_jobs.py run on CPU tensors: the launchers choose the kernels and Triton's own
specialisation their signatures, and each launch ends after the compiler. Nothing may spill (STACK,
LOCAL), and where the layout allows it global memory is accessed 16 bytes at a time.

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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels are not compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from fastnorm import dispatch
from fastnorm.ops import launch
from tests.aot_jobs import Job, jobs

CAPABILITIES = (80, 90, 100)
PROCESSORS = 132
WIDE_ACCESS = re.compile(r"(?:\.v4\.[bf]32|\.v2\.[bf]64|\.v8\.[bf]32|\.v4\.[bf]64)\b")
# they read a few numbers per channel or row: nothing there is worth 16 bytes
NARROW = {"finalize_kernel", "merge_ranks_kernel"}


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
    dispatch._serves = lambda *_: True
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
