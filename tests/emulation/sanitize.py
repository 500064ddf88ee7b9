"""Runs the table of cases on the CUDA kernels under a sanitizer.

    python -m tests.emulation.sanitize asan|tsan [--seeds 0 2] [--only TEXT ...]

Each case once in fp32 and, where the table has it, once in bf16, on every seed's schedule. Exits
with the report when anything is found.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from tests.emulation import build

PRELOAD = {
    "plain": (),
    "asan": ("libasan.so", "libstdc++.so"),
    "tsan": ("libtsan.so", "libstdc++.so"),
}
# Python leaks by design; the first race is not the last
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66"}


def environment(kind: str) -> dict[str, str]:
    """What a process needs in order to load kernels that were compiled for this kind."""
    libraries = [
        subprocess.check_output([build.compiler(), f"-print-file-name={name}"], text=True).strip()
        for name in PRELOAD[kind]
    ]
    # torch is not instrumented: what its threads do would be told of as races
    return {**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(libraries), "OMP_NUM_THREADS": "1"}


def sanitize(kind: str, seeds: list[int], only: list[str]) -> subprocess.CompletedProcess[str]:
    """The cases in a process of their own; it returns 0 only if nothing was found."""
    build.build(kind)  # here, because compilers are slow under a sanitizer
    command = [sys.executable, "-m", "tests.emulation.cases", kind, ",".join(map(str, seeds))]
    return subprocess.run(
        [*command, *only], cwd=build.ROOT, env=environment(kind), capture_output=True, text=True
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("asan", "tsan"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="schedules (default: 0)")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases named like it")
    arguments = parser.parse_args()
    try:
        result = sanitize(arguments.kind, arguments.seeds, arguments.only)
    except build.Unavailable as error:
        sys.exit(str(error))
    print(result.stdout, end="")
    print(result.stderr, end="", file=sys.stderr)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
