"""The CUDA sources compiled by nvcc for every architecture, and what the assembler says of them.

Warnings are errors. No kernel may spill (STACK, LOCAL) or take 128 registers or more, and every
kernel accesses global memory 16 bytes at a time, without waiting for one access before the next.
What setup.py builds next links these objects.

    python -m tests.resources [--capability 90] [--only TEXT] [--all]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_REGISTERS = 128
MOST_KERNELS = 124  # a build for one architecture is 125 s of one core: a minute on two
WARNINGS = "-Werror=all-warnings -Xcompiler=-Wall,-Werror"
WIDE_ACCESS = re.compile(r"\b(?:LD|ST)G\.E(?:\.\w+)*\.128\b")

# kernel -> why it may take more registers
MANY_REGISTERS: dict[str, str] = {
    "layer_norm::backward_rows_kernel": "512 threads of 128: they hold dweight, dbias and two rows",
    "layer_norm::backward_aligned_kernel": "the same",
    "layer_norm::backward_streams_kernel": "two blocks of 256 threads of 128, which hold as much",
    "layer_norm::backward_ticket_kernel": "two blocks of 256 threads of 128; sm_120 spills at 96",
    "weight_norm_kernels::weight_norm_kernel": "two blocks of 256 threads: v and dw are held",
}
# kernel -> why nothing in it is worth 16 bytes
NARROW: dict[str, str] = {"batch_norm_merge_kernel": "a few numbers per rank and channel"}
# kernel -> why a 16-byte load in it may be waited for before the next
MERGED: dict[str, str] = {}
WORD = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);\s+/\* 0x[0-9a-f]+ \*/\s+/\* (0x[0-9a-f]+) \*/")
LOAD = re.compile(r"\bLDG\.E(?:\.\w+)*\.128(?:\.\w+)* R(\d+),")
HALF_COPIED = re.compile(r"\bPRMT R\d+, R(\d+)(?:\.reuse)?, 0x7610,")
LOOK_AHEAD = 12  # instructions


@dataclass(frozen=True)
class Kernel:
    """One instantiation on one architecture."""

    name: str
    capability: int
    registers: int
    stack: int
    local: int
    wide_accesses: int
    merged: int

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
        if self.merged and self.family not in MERGED:
            yield f"{self.merged} 16-byte loads waited for before the next is issued"


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


def compiled(sources: Sequence[Path], capabilities: Sequence[int]) -> list[Path]:
    """The objects that setup.py makes of these sources, from whose cache it will link them."""
    spec = importlib.util.spec_from_file_location("fastnorm_setup", "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    reason = setup.obstacle()
    if reason is not None:
        raise SystemExit(reason)
    os.environ.setdefault("NVCC_APPEND_FLAGS", WARNINGS)
    if capabilities:
        listed = ";".join(f"{capability // 10}.{capability % 10}" for capability in capabilities)
        os.environ["TORCH_CUDA_ARCH_LIST"] = listed
    objects: list[Path] = setup.compile_objects(setup.find_nvcc(), sources)
    return objects


def by_capability(listing: str) -> Iterator[tuple[int, str]]:
    """The parts of what cuobjdump says of an object that holds code for several architectures."""
    for part in listing.split("\nFatbin elf code:")[1:]:
        match = re.search(r"^arch = sm_(\d+)", part, re.MULTILINE)
        assert match is not None, part
        yield int(match[1]), part


def merged_loads(code: str) -> int:
    """16-byte loads that are waited for before any other is issued, only to copy halves of them.

    That is what becomes of 16-bit values at the end of a branch: loads would be in flight together
    if they met there as whole registers (see as_vector in csrc/common.cuh).
    """
    # an instruction's second word: which barrier (0 to 5) its load sets, which ones it waits for
    found = [(text, int(word, 16)) for text, word in WORD.findall(code)]
    count = 0
    for i, (load, word) in enumerate(found):
        loaded = LOAD.search(load)
        if loaded is None:
            continue
        registers = range(int(loaded[1]), int(loaded[1]) + 4)
        waited = False
        for text, other in found[i + 1 : i + 1 + LOOK_AHEAD]:
            if "LDG" in text:
                break
            waited = waited or bool(other >> 52 >> (word >> 46 & 7) & 1)
            copied = HALF_COPIED.search(text)
            if waited and copied is not None and int(copied[1]) in registers:
                count += 1
                break
    return count


def kernels(path: Path) -> list[Kernel]:
    """Every kernel of an object, as the assembler made it."""

    def listing(option: str) -> Iterator[tuple[int, str]]:
        return by_capability("\n" + output(tool("cuobjdump"), option, str(path)))

    accesses: dict[tuple[int, str], tuple[int, int]] = {}
    for capability, part in listing("-sass"):
        for function in part.split("Function : ")[1:]:
            mangled, code = function.split(maxsplit=1)
            wide = len(WIDE_ACCESS.findall(code))
            accesses[capability, mangled] = wide, merged_loads(code)
    found = []
    usage = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
    for capability, part in listing("-res-usage"):
        for mangled, registers, stack, local in usage.findall(part):
            name = _short(output("c++filt", mangled).strip())
            numbers = int(registers), int(stack), int(local), *accesses[capability, mangled]
            found.append(Kernel(name, capability, *numbers))
    return found


def _short(name: str) -> str:
    """The kernel's name and template arguments, without namespaces and parameters."""
    name = re.sub(r"fastnorm::|\(anonymous namespace\)::|activations::|^void ", "", name)
    return re.sub(r"\([^()]*\)$", "", name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", nargs="+", type=int, default=[], help="default: all")
    parser.add_argument("--only", default="", help="sources whose name contains this")
    parser.add_argument("--all", action="store_true", help="print every kernel")
    options = parser.parse_args()
    os.chdir(ROOT)
    start = time.monotonic()
    sources = [path for path in sorted(Path("csrc").glob("*.cu")) if options.only in path.name]
    objects = compiled(sources, options.capability)
    seconds = time.monotonic() - start
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [kernel for part in pool.map(kernels, objects) for kernel in part]
    faults = 0
    for kernel in found:
        wrong = ", ".join(kernel.faults())
        faults += bool(wrong)
        if wrong or options.all:
            print(f"sm_{kernel.capability} {kernel.name}: {kernel.registers} registers", wrong)
    count = len({kernel.name for kernel in found})
    most = max((kernel.registers for kernel in found), default=0)
    capabilities = ", ".join(map(str, sorted({kernel.capability for kernel in found})))
    print(
        f"{count} kernels for compute capability {capabilities} compiled in {seconds:.0f} s: "
        f"at most {most} registers, {faults} with faults"
    )
    if count > MOST_KERNELS:
        print(f"more than {MOST_KERNELS} kernels: a build would take too long")
    return int(faults > 0 or count > MOST_KERNELS or not found)


if __name__ == "__main__":
    sys.exit(main())
