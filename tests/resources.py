"""The CUDA sources compiled by nvcc for every architecture, and what the assembler says of them.

Warnings are errors. No kernel may spill (STACK, LOCAL) or take 128 registers or more, and every
kernel accesses global memory 16 bytes at a time. The objects are kept under the hash of what went
into them.

    python -m tests.resources [--capability 80 90 100 120] [--only TEXT] [--all]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
OUT = ROOT / "build" / "resources"
CAPABILITIES = (80, 90, 100, 120)
MOST_REGISTERS = 128
MOST_KERNELS = 120  # what keeps a build under two minutes on two cores
FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Werror=all-warnings")
WIDE_ACCESS = re.compile(r"\b(?:LD|ST)G\.E(?:\.\w+)*\.128\b")

# kernel -> why it may take more registers; none does
MANY_REGISTERS: dict[str, str] = {}
# kernel -> why nothing in it is worth 16 bytes; none is
NARROW: dict[str, str] = {}


@dataclass(frozen=True)
class Kernel:
    """One instantiation on one architecture."""

    name: str
    capability: int
    registers: int
    stack: int
    local: int
    wide_accesses: int

    @property
    def family(self) -> str:
        return self.name.split("<")[0]

    def faults(self) -> Iterator[str]:
        if self.stack or self.local:
            yield f"STACK:{self.stack} LOCAL:{self.local}"
        if self.registers >= MOST_REGISTERS and self.family not in MANY_REGISTERS:
            yield f"{self.registers} registers"
        if not self.wide_accesses and self.family not in NARROW:
            yield "no 16-byte access"


def tool(name: str) -> str:
    """A program of the CUDA toolkit, of the toolkit itself or of Triton's wheel."""
    found = shutil.which(name)
    if found is None:
        spec = importlib.util.find_spec("triton")
        assert spec is not None
        assert spec.origin is not None
        packed = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(packed) if packed.exists() else None
    if found is None:
        raise SystemExit(f"{name} was not found: install the CUDA toolkit, or pip install triton")
    return found


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_source(source: Path, capability: int) -> Path:
    headers = sorted(path for pattern in ("*.h", "*.cuh") for path in CSRC.glob(pattern))
    contents = b"".join(path.read_bytes() for path in (source, *headers)) + repr(FLAGS).encode()
    digest = hashlib.sha256(contents).hexdigest()[:16]
    target = OUT / f"{source.stem}-{capability}-{digest}.o"
    if not target.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.o")
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if nvcc is None:
            raise SystemExit("nvcc was not found: install the CUDA toolkit")
        command = [nvcc, *FLAGS, f"-arch=sm_{capability}", "-c", str(source), "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        partial.replace(target)
    return target


def kernels(source: Path, capability: int) -> list[Kernel]:
    """Every kernel of a source, as the assembler made it."""
    target = str(compile_source(source, capability))
    wide: dict[str, int] = {}
    for part in output(tool("cuobjdump"), "-sass", target).split("Function : ")[1:]:
        mangled, code = part.split(maxsplit=1)
        wide[mangled] = len(WIDE_ACCESS.findall(code))
    found = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)",
        output(tool("cuobjdump"), "-res-usage", target),
    )
    names = output("c++filt", *(mangled for mangled, *_ in found)).splitlines() if found else []
    return [
        Kernel(_short(name), capability, int(registers), int(stack), int(local), wide[mangled])
        for name, (mangled, registers, stack, local) in zip(names, found, strict=True)
    ]


def _short(name: str) -> str:
    """The kernel's name and template arguments, without namespaces and parameters."""
    name = re.sub(r"fastnorm::|\(anonymous namespace\)::|activations::|^void ", "", name)
    return re.sub(r"\([^()]*\)$", "", name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", nargs="+", type=int, default=CAPABILITIES)
    parser.add_argument("--only", default="", help="sources whose name contains this")
    parser.add_argument("--all", action="store_true", help="print every kernel")
    options = parser.parse_args()
    start = time.monotonic()
    sources = [path for path in sorted(CSRC.glob("*.cu")) if options.only in path.name]
    jobs = [(source, capability) for source in sources for capability in options.capability]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [kernel for part in pool.map(lambda job: kernels(*job), jobs) for kernel in part]
    faults = 0
    for kernel in found:
        wrong = ", ".join(kernel.faults())
        faults += bool(wrong)
        if wrong or options.all:
            print(f"sm_{kernel.capability} {kernel.name}: {kernel.registers} registers", wrong)
    count = len({kernel.name for kernel in found})
    most = max((kernel.registers for kernel in found), default=0)
    print(
        f"{count} kernels for {len(options.capability)} architectures in "
        f"{time.monotonic() - start:.0f} s: at most {most} registers, {faults} with faults"
    )
    if count > MOST_KERNELS:
        print(f"more than {MOST_KERNELS} kernels: a build would take too long")
    return int(faults > 0 or count > MOST_KERNELS or not found)


if __name__ == "__main__":
    sys.exit(main())
