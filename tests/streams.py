"""Work for several streams that begins at once, however long the host takes to queue it."""

from __future__ import annotations

import torch

CYCLES_PER_MS = 2_000_000  # no clock of an SM is faster by much


def closed_gate(milliseconds: int) -> torch.cuda.Event:
    """An event that comes after so long; streams that wait for it can be filled meanwhile."""
    gate, stream = torch.cuda.Event(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(milliseconds * CYCLES_PER_MS)
        gate.record(stream)
    return gate
