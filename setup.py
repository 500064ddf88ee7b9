"""Builds csrc/ into fastnorm._cuda where nvcc is found; without it the package is pure Python.

FASTNORM_BUILD_CUDA  auto (default): build where nvcc is found; 1: build or fail; 0: never
CUDACXX, CUDA_HOME   which nvcc (otherwise the one on PATH, otherwise /usr/local/cuda)
TORCH_CUDA_ARCH_LIST which GPUs, as torch reads it: "8.0;9.0+PTX"
MAX_JOBS             how many nvcc processes at once
NVCC_APPEND_FLAGS    more options for nvcc, which reads this variable itself
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
OBJECTS = Path("build", "objects")
ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")  # and PTX, for those to come
OLDEST_NVCC = (12, 0)


def find_nvcc() -> str | None:
    """The nvcc of CUDACXX, else of CUDA_HOME, else on PATH, else in the usual place."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    if os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_version(nvcc: str) -> tuple[int, int]:
    """The release of nvcc: (13, 0)."""
    said = subprocess.check_output([nvcc, "--version"], text=True)
    match = re.search(r"release (\d+)\.(\d+)", said)
    if match is None:
        raise SystemExit(f"{nvcc} --version says no release: {said!r}")
    return int(match[1]), int(match[2])


def obstacle() -> str | None:
    """Why the CUDA backend cannot be built here, and what to do; None where it can."""
    if not any(CSRC.glob("*.cu")):
        return "this version has no CUDA sources in csrc/: its kernels are the Triton ones"
    if not sys.platform.startswith("linux"):
        return f"the CUDA backend is built on Linux only, and this is {sys.platform}"
    nvcc = find_nvcc()
    if nvcc is None:
        places = {
            name: os.environ[name] for name in ("CUDACXX", "CUDA_HOME") if os.environ.get(name)
        }
        return (
            f"nvcc was not found ({places or 'not on PATH, nor in /usr/local/cuda/bin'}): "
            "install the CUDA toolkit, or set CUDA_HOME to its folder or CUDACXX to its nvcc"
        )
    version = nvcc_version(nvcc)
    if version < OLDEST_NVCC:
        return (
            f"{nvcc} is of CUDA {version[0]}.{version[1]}, and the sources need "
            f"{OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer: install a newer CUDA toolkit and set "
            "CUDA_HOME to its folder"
        )
    return None


def wanted() -> bool:
    """Whether to build the CUDA backend; an error where it was asked for and cannot be."""
    choice = os.environ.get("FASTNORM_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"FASTNORM_BUILD_CUDA={choice!r} is not known: set it to auto, 1 or 0")
    if choice == "0":
        return False
    why_not = obstacle()
    if why_not is not None and choice == "1":
        raise SystemExit(f"FASTNORM_BUILD_CUDA=1, but {why_not}")
    if why_not is not None:
        print(f"fastnorm: building without the CUDA backend: {why_not}", file=sys.stderr)
    return why_not is None


def architecture_flags(known: set[str]) -> list[str]:
    """-gencode flags for TORCH_CUDA_ARCH_LIST, else for those of our list that nvcc knows.

    All GPUs are assembled from the PTX of the oldest: no source asks for more, and making PTX is
    most of the build. What carries a letter (9.0a) goes with no other and has its own.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    there = [name for name in ARCHITECTURES if "sm_" + name.replace(".", "") in known]
    there[-1:] = [f"{name}+PTX" for name in there[-1:]]
    entries: list[tuple[str, bool]] = []
    for entry in re.split(r"[;,\s]+", asked) if asked else there:
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {entry!r} is not like 9.0 or 9.0+PTX")
        if int(match[1]) < 8:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is below 8.0, the oldest that the kernels run on"
            )
        number = match[1] + match[2]
        if f"sm_{number}" not in known:
            names = sorted(name for name in known if re.fullmatch(r"sm_\d+[af]?", name))
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: this nvcc does not know {entry!r}; it knows "
                f"{', '.join(names)}"
            )
        entries.append((number, match[3] is not None))
    oldest = min((number for number, _ in entries if number.isdigit()), key=int, default="")
    flags = []
    for number, ptx in entries:
        virtual = oldest if number.isdigit() else number
        flags.append(f"-gencode=arch=compute_{virtual},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{virtual},code=compute_{virtual}")
    return list(dict.fromkeys(flags))


def compile_objects(nvcc: str, sources: Sequence[Path]) -> list[Path]:
    """The objects of these sources, compiled side by side.

    They are kept under the hash of what went into them, because pip builds anew at every install.
    """
    import pybind11

    known = set(subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split())
    flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
    flags += ["-DNDEBUG"]  # pybind11 would look for the interpreter's lock at every reference
    flags += ["--default-stream=legacy"]  # torch's: a stream of 0 is the same in both
    flags += architecture_flags(known)
    folders = (CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])
    headers = sorted(path for pattern in ("*.h", "*.cuh") for path in CSRC.glob(pattern))
    appended = [os.environ.get(f"NVCC_{where}_FLAGS") for where in ("PREPEND", "APPEND")]
    common = repr((nvcc_version(nvcc), flags, appended, pybind11.__version__, sys.version)).encode()
    common += b"".join(path.read_bytes() for path in headers)
    OBJECTS.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        digest = hashlib.sha256(common + source.read_bytes()).hexdigest()[:16]
        target = OBJECTS / f"{source.name}-{digest}.o"
        if not target.exists():
            partial = OBJECTS / f"{os.getpid()}-{target.name}"
            includes = [f"-I{folder}" for folder in folders]
            subprocess.check_call([nvcc, *flags, *includes, "-c", str(source), "-o", str(partial)])
            partial.replace(target)
        return target

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(compiled, sources))


class NvccBuild(build_ext):
    """Compiles and links with nvcc alone, without torch: one build serves all its versions."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        assert nvcc is not None, "extensions are declared only where nvcc was found"
        objects = map(str, compile_objects(nvcc, [Path(source) for source in ext.sources]))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        subprocess.check_call([nvcc, "-shared", "-cudart", "static", *objects, "-o", str(output)])


if __name__ == "__main__":
    sources = sorted(str(path) for pattern in ("*.cu", "*.cpp") for path in CSRC.glob(pattern))
    extensions = [Extension("fastnorm._cuda", sources)] if wanted() else []
    setup(ext_modules=extensions, cmdclass={"build_ext": NvccBuild})
