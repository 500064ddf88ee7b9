"""What the machine is, as the results file says it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import fastnorm
from benchmarks import peers
from benchmarks.schema import Environment

ROOT = Path(__file__).parent.parent
# where a new file may be part of what is measured: not among the measurements themselves
SOURCES = ("csrc", "fastnorm", "benchmarks", ":!benchmarks/results", ":!benchmarks/tuning")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _output(*command: str) -> str | None:
    """What a command printed; None where it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def processor() -> str:
    """The CPU's name and how many of its cores torch uses."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next(
            (li.split(":", 1)[1].strip() for li in lines if li.startswith("model name")), name
        )
    return f"CPU {' '.join(name.split())}, {torch.get_num_threads()} threads"


def commit() -> tuple[str, bool]:
    """(sha, whether files differ from it or sources are not in it). A copy without history is told
    by FASTNORM_COMMIT."""
    told = os.environ.get("FASTNORM_COMMIT")
    if told:
        return told.removesuffix("-dirty"), told.endswith("-dirty")
    sha = _output("git", "rev-parse", "HEAD")
    if sha is None:
        return "unknown", True
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    new = _output("git", "ls-files", "--others", "--exclude-standard", "--", *SOURCES)
    return sha, changed != "" or new != ""


def environment(device: str, copy_bandwidth_gbs: float, note: str = "") -> Environment:
    """The environment of a run that starts now."""
    sha, dirty = commit()
    driver = "none"
    if device != "cpu":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = (_output(*query) or "unknown").splitlines()[0]
    return Environment(
        device=processor() if device == "cpu" else torch.cuda.get_device_name(),
        driver=driver,
        cuda=torch.version.cuda or "none",
        torch=torch.__version__,
        triton=_version("triton"),
        python=platform.python_version(),
        fastnorm=fastnorm.__version__,
        commit=sha,
        dirty=dirty,
        timestamp=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        copy_bandwidth_gbs=round(copy_bandwidth_gbs, 1),
        peers=peers.installed(),
        note=note,
    )
