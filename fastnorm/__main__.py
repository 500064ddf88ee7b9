"""``python -m fastnorm env`` tells what this machine has, ``python -m fastnorm demo`` shows it."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys

import torch

import fastnorm


def _version(name: str) -> str:
    try:
        return str(importlib.import_module(name).__version__)
    except ImportError:
        return "not installed"


def _devices() -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = [name for name in ("mps", "xpu") if getattr(torch, name).is_available()]
    return [*found, "cpu"]


def _auto(missing: dict[str, str | None]) -> str:
    """What runs when no backend is forced."""
    if not torch.cuda.is_available():
        return (
            "torch's own functions: there is no CUDA device, and no kernel of ours is for another"
        )
    if torch.version.hip is not None:
        return "torch's own functions: this is ROCm, on which our kernels are not run unless forced"
    if missing["triton"] is not None:
        return "torch's own functions: there is a CUDA device, but no Triton"
    return (
        "Triton kernels for CUDA tensors large enough to gain, torch's own functions for the rest"
    )


def env() -> int:
    """Print versions, devices, backends, and why the missing ones are missing."""
    missing = fastnorm.backends()
    rows = {
        "fastnorm": fastnorm.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda (torch's)": torch.version.cuda or "none",
        "rocm (torch's)": torch.version.hip or "none",
        "devices": ", ".join(_devices()),
        **{f"backend {name}": why or "available" for name, why in missing.items()},
        "backend auto": _auto(missing),
    }
    for name, value in rows.items():
        print(f"{name:18} {value}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastnorm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "env", help="versions, devices, backends and why the missing ones are missing"
    )
    demo = commands.add_parser(
        "demo", help="train a ResNet with torch's layers and ours, and compare"
    )
    demo.add_argument(
        "--layers", action="store_true", help="only a small layer of each family, on Triton"
    )
    chosen = parser.parse_args(arguments)
    if chosen.command == "env":
        return env()
    from fastnorm import demo as demonstration  # imports what only the demo needs

    return demonstration.main(only_layers=chosen.layers)


if __name__ == "__main__":
    sys.exit(main())
