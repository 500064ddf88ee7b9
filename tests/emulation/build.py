"""Compiles csrc/ with g++ for the CPU: each CUDA thread is a fiber of tests/emulation/engine.cpp.

    python -m tests.emulation.build [plain] [asan] [tsan]

Engine and bindings are compiled once, without sanitizers; the kernels once for each kind. What was
built is kept in build/emulation/ under the hash of everything that went into it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
OUT = ROOT / "build" / "emulation"
ENGINE = (HERE / "engine.cpp", HERE / "runtime.cpp")

# -O1: three times as fast to compile as -O2, and the kernels' time goes into switching fibers.
# No contraction: the sums of a kernel shall not depend on which machine runs the tests.
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
KERNEL = ["-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-x", "c++"]
KINDS: dict[str, list[str]] = {
    "plain": [],
    "asan": [
        *("-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"),
        *("-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"),
    ],
    "tsan": ["-g1", "-fsanitize=thread"],
}


class Unavailable(RuntimeError):
    """This machine cannot compile the kernels for the CPU; the message says what is missing."""


class CompileError(RuntimeError):
    """g++ refused a source; the message is g++'s."""


@functools.cache
def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        raise Unavailable("g++ was not found on PATH: install it to run the CUDA kernels on a CPU")
    return found


@functools.cache
def cuda_includes() -> tuple[str, ...]:
    """The folders of the CUDA headers: the toolkit's, else those of pip's nvidia packages."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1]]
    folders = [Path(home) / "include" for home in (*homes, "/usr/local/cuda") if home]
    for folder in folders:
        if all((folder / header).exists() for header in ("cuda_runtime_api.h", "cuda_bf16.h")):
            return (str(folder),)
    packages = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"))
    if any((folder / "cuda_runtime_api.h").exists() for folder in packages):
        return tuple(map(str, packages))
    raise Unavailable(
        "the CUDA headers (cuda_runtime_api.h, cuda_bf16.h) were not found: install the CUDA "
        "toolkit, set CUDA_HOME to its folder, or pip install nvidia-cuda-runtime"
    )


@functools.cache
def system_flags() -> tuple[str, ...]:
    return tuple(f"-isystem{folder}" for folder in cuda_includes())


@functools.cache
def _machine() -> str:
    """What decides the result beside sources and flags."""
    return subprocess.check_output([compiler(), "--version"], text=True)


def _sources(path: Path, seen: dict[Path, bytes]) -> dict[Path, bytes]:
    """The contents of a source and of every header that it includes by quotes."""
    if path not in seen and path.exists():
        seen[path] = path.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s*"([^"]+)"', seen[path], re.MULTILINE):
            _sources((path.parent / name.decode()).resolve(), seen)
    return seen


def _digest(*parts: bytes | str) -> str:
    state = hashlib.sha256(_machine().encode())
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:16]


def _make(target: Path, command: Sequence[str], say: bool) -> Path:
    """Run ``command -o <target>``; a reader sees the whole file or none, whoever else builds it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{os.getpid()}-{target.name}")
    start = time.perf_counter()
    result = subprocess.run([*command, "-o", str(temporary)], capture_output=True, text=True)
    if result.returncode:
        raise CompileError(f"{' '.join(command)}\n{result.stderr}")
    if result.stderr:  # warnings
        print(result.stderr, file=sys.stderr)
    os.replace(temporary, target)
    if say:
        print(f"{target.relative_to(OUT)}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return target


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process compiles, the others wait for what it leaves: tests run in several at once."""
    import fcntl

    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _object(source: Path, flags: list[str]) -> Path:
    """Where the object is kept that is made of this source."""
    seen = _sources(source, {})
    if "-include" in flags:
        _sources(HERE / "emulation.h", seen)
    contents = [part for path, text in sorted(seen.items()) for part in (path.name, text)]
    return OUT / "objects" / f"{source.name}-{_digest(*flags, *contents)}.o"


def _compile(source: Path, flags: list[str], target: Path, say: bool) -> None:
    if not target.exists():
        _make(target, [compiler(), *COMMON, *flags, "-c", str(source)], say)


def library(
    name: str, kernels: Sequence[Path], bindings: Sequence[Path], kind: str, say: bool = False
) -> Path:
    """Build/emulation/<kind>/<name>-<hash>.so from kernel sources, host sources and the engine."""
    include = ["-include", str(HERE / "emulation.h")]
    host: list[str] = []
    if bindings:
        try:
            import pybind11
        except ImportError:
            raise Unavailable("pybind11 cannot be imported: pip install pybind11") from None
        host = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    cuda = list(system_flags())
    jobs = [(source, ["-O2", *cuda]) for source in ENGINE]
    # as setup.py: host times are taken of them
    jobs += [(source, ["-O2", "-DNDEBUG", *host, *cuda, *include]) for source in bindings]
    jobs += [(source, [*cuda, *include, *KINDS[kind], *KERNEL]) for source in kernels]
    objects = [_object(*job) for job in jobs]
    digest = _digest(*KINDS[kind], *(path.name for path in objects))
    target = OUT / kind / f"{name}-{digest}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():  # seen without waiting for whoever builds another kind
        return target
    with _alone(), ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = [(*job, path, say) for job, path in zip(jobs, objects, strict=True)]
        # the kernels first: they take longest
        list(pool.map(lambda job: _compile(*job), reversed(pending)))
    link = [compiler(), "-shared", *KINDS[kind], "-Wl,-Bsymbolic"]
    return _make(target, [*link, *map(str, objects)], say)


def build(kind: str = "plain", say: bool = False) -> Path:
    """The extension fastnorm._cuda of this kind ("plain", "asan", "tsan"), compiled if need be."""
    if not (CSRC / "bindings.cpp").exists():
        raise Unavailable("csrc/bindings.cpp is missing: there are no CUDA kernels to run")
    return library("_cuda", sorted(CSRC.glob("[!_]*.cu")), [CSRC / "bindings.cpp"], kind, say)


class Engine:
    """The device that a library built here pretends to run on."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulation_launches.restype = ctypes.c_size_t
        self.library.emulation_switches.restype = ctypes.c_size_t

    def configure(
        self,
        seed: int = 0,
        resident: int = 0,
        sms: int = 4,
        blocks_per_sm: int = 2,
        dry: bool = False,
    ) -> None:
        """Choose the schedule and the device.

        ``seed``: 0 runs threads in order, 1 in reverse, any other at random. ``resident``: how many
        blocks are in flight at once (0: as many as the device holds). ``dry``: launches are looked
        at and not run, to time what leads to them.
        """
        self.library.emulation_configure(seed, resident, sms, blocks_per_sm, dry)

    @property
    def launches(self) -> int:
        return int(self.library.emulation_launches())

    @property
    def switches(self) -> int:
        return int(self.library.emulation_switches())


def load(kind: str = "plain") -> ModuleType:
    """The extension as a module: ``emulated`` is True, ``engine`` its :class:`Engine`."""
    path = build(kind)
    loader = importlib.machinery.ExtensionFileLoader("fastnorm._cuda", str(path))
    spec = importlib.util.spec_from_file_location("fastnorm._cuda", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    vars(module).update(emulated=True, engine=Engine(path))
    return module


if __name__ == "__main__":
    for kind in sys.argv[1:] or ["plain"]:
        print(build(kind, say=True))
