"""The CUDA kernels of csrc/ compiled by g++ and executed on the CPU."""

from __future__ import annotations

import sys


def activate(kind: str = "plain") -> str | None:
    """Make the kernels compiled for the CPU the extension of this process, before fastnorm looks
    for its own; the reason where they cannot be compiled here."""
    from tests.emulation import build

    try:
        sys.modules["fastnorm._cuda"] = build.load(kind)
    except build.Unavailable as error:
        return str(error)
    return None


def schedule(seed: int) -> None:
    """Choose the order in which the threads of the next launches run; nothing where they run on a
    GPU."""
    extension = sys.modules.get("fastnorm._cuda")
    if getattr(extension, "emulated", False):
        extension.engine.configure(seed=seed)
