"""What every launcher needs to know of the device: its size, and counters that are zero."""

from __future__ import annotations

import contextlib
import functools
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The interpreter runs programs one after the other, about 5 ms each: a device of two processors
# keeps grids small.
INTERPRETER_PROCESSORS = 2
INTERPRETER_L2 = 50 << 20


@functools.cache
def processors(device: int) -> int:
    """The number of multiprocessors (SMs) of the CUDA device of that index; negative: no device."""
    if device < 0:
        return INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def l2_bytes(device: int) -> int:
    """The size of the L2 cache of the CUDA device of that index; negative: no device."""
    if device < 0:
        return INTERPRETER_L2
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def fills(outputs: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., Any]]:
    """Make an op's function of one that fills ``outputs(*inputs)``, given behind the inputs."""

    def returning(fill: Callable[..., None]) -> Callable[..., Any]:
        @functools.wraps(fill)
        def op(*inputs: Any) -> Any:
            found = outputs(*inputs)
            fill(*inputs, *(found if isinstance(found, tuple) else (found,)))
            return found

        return op

    return returning


_arenas: dict[tuple[int, int], Tensor] = {}
_outgrown: list[Tensor] = []  # their launches may still be under way


def _arena(device: torch.device, size: int) -> Tensor:
    """Zeros for as long as the process lives, made by a thread of its own on the default stream: a
    memory pool that is active, as while torch.compile warms up for CUDA graphs, belongs to a thread
    or a stream, and must not be left with a tensor that nobody knows of."""
    made: list[Tensor] = []

    def make() -> None:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            made.append(torch.zeros(max(size, 4096), dtype=torch.int32, device=device))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))
    (arena,) = made
    return arena


def counters(x: Tensor, size: int) -> Tensor:
    """``size`` int32 counters on x's device that are zero now and that the kernel must leave zero.

    One arena per device and stream: launches on one stream follow each other, so they can share it.
    While a CUDA graph is captured the counters are a zeroed tensor of that graph.
    """
    stream = 0
    if x.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(size, dtype=torch.int32, device=x.device)
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
    key = (x.get_device(), stream)
    arena = _arenas.get(key)
    if arena is None or arena.numel() < size:
        if arena is not None:
            _outgrown.append(arena)
        arena = _arenas[key] = _arena(x.device, size)
    return arena


def split(value: float) -> tuple[float, float]:
    """value as the sum of two fp32 numbers: Triton passes scalars as fp32, and fp64 kernels need
    more."""
    (head,) = struct.unpack("f", struct.pack("f", value))
    return head, value - head
