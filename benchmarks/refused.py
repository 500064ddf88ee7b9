"""What a command answers when it is asked for something that is not there."""

from __future__ import annotations

import torch


class Refused(ValueError):
    """Something was asked for that is not there."""


def device_of(asked: str | None) -> str:
    """The device to measure on: the one that was asked for, else a GPU if there is one."""
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise Refused("--device cuda: torch sees no CUDA device here; --device cpu runs on the CPU")
    return asked or ("cuda" if available else "cpu")
