"""Whether this process can still use its GPU."""

from __future__ import annotations

import torch


def dead_context() -> str:
    """Why no call of CUDA succeeds in this process any more, in a line; "" where they do, or where
    none was made yet.

    Not read from the exception at hand: torch, our extension and Triton each word theirs in another
    way, and the same words may be of an error that is over. One that has taken the context with it
    is what every later call returns, so the device is waited for twice: what was over is gone then.
    """
    said = ""
    if torch.cuda.is_initialized():
        for _ in range(2):
            try:
                torch.cuda.synchronize()
                return ""
            except RuntimeError as error:
                said = next(iter(str(error).splitlines()), type(error).__name__)
    return said
