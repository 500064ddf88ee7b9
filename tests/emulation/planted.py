"""The kernels of faults.cu and probes.cu, called without torch.

    python -m tests.emulation.planted KIND broken|healthy SEED[,SEED...] FAULT ...

prints what each fault computed, or what the engine reported.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Sequence

from tests.emulation.build import HERE, Engine, library

SOURCE = HERE / "faults.cu"
SIZE = 64


class LaunchError(RuntimeError):
    """The engine's report, or the name of the CUDA error with which a launch was refused."""


def marked() -> dict[str, int]:
    """The line of each planted fault."""
    lines = SOURCE.read_text().splitlines()
    found = ((i, re.search(r"// fault: (\w+)$", line)) for i, line in enumerate(lines, 1))
    return {match[1]: i for i, match in found if match}


class Planted:
    """faults.cu and probes.cu, compiled for one kind of check."""

    def __init__(self, kind: str) -> None:
        path = library("planted", [SOURCE, HERE / "probes.cu"], [], kind)
        self.engine = Engine(path)
        self.library = ctypes.CDLL(str(path))
        self.library.emulation_error_name.restype = ctypes.c_char_p

    def _values(self, code: int, y: ctypes.Array[ctypes.c_float], text: bytes) -> list[float]:
        if code:
            name = self.library.emulation_error_name(code).decode()
            raise LaunchError(text.decode() if code < 0 else name)
        return list(y)

    def fault(self, name: str, broken: bool) -> list[float]:
        y, text = (ctypes.c_float * SIZE)(), ctypes.create_string_buffer(10_000)
        code = self.library.run_fault(
            name.encode(), ctypes.c_bool(broken), y, text, ctypes.c_size_t(len(text))
        )
        return self._values(code, y, text.value)

    def probe(
        self,
        name: str,
        grid: Sequence[int] = (1, 1, 1),
        block: Sequence[int] = (32, 1, 1),
        shared: int = 0,
        asked: int = 0,
        cooperative: bool = False,
        count: int = 1024,
    ) -> list[float]:
        """What the probe wrote into y; shared memory in bytes, ``asked`` for if not 0."""
        shape = (ctypes.c_uint * 9)(*grid, *block, shared, asked, cooperative)
        y, text = (ctypes.c_float * count)(), ctypes.create_string_buffer(10_000)
        code = self.library.run_probe(
            name.encode(), shape, y, count, text, ctypes.c_size_t(len(text))
        )
        return self._values(code, y, text.value)


def main(kind: str, health: str, seeds: str, *names: str) -> int:
    planted = Planted(kind)
    failed = 0
    for name in names:
        for seed in map(int, seeds.split(",")):
            planted.engine.configure(seed=seed)
            try:
                print(name, seed, *planted.fault(name, health == "broken"), flush=True)
            except LaunchError as error:
                print(name, seed, error, flush=True)
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
