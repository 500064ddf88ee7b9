"""Which part of a training step is normalisation and activation, by the profiler.

A profiler that was once on may make every later launch of its process slower (benchmarks/kernels.py
says more): a step is profiled in a process of its own, which times nothing, while the one that does
waits for it.
"""

from __future__ import annotations

import functools
import gc
import re
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import timing
from benchmarks.child import Ended, Helper, Late

NORM, ACTIVATION, MOVES, REST = "norm", "activation", "copies", "rest"
KINDS = (NORM, ACTIVATION, MOVES, REST)
WARMUP = 2
LIMIT_S = 60.0  # for one model, the start of the process included
NOT_MEASURED = "share of norms not measured"

# by the name of the op, or of the autograd function in which a kernel of ours is launched; a norm
# with an activation folded into it is a norm
_OURS = r"(?:^|: )(?:Sync|MeanOnly|Inplace)?"
_NAMES = (
    (NORM, rf"{_OURS}(?:BatchNorm|LayerNorm|WeightNorm)\w*Function(?:Backward)?$"),
    (NORM, r"^fastnorm::\w*norm|^aten::\w*(?:batch|layer|weight|group|instance)_norm"),
    (NORM, r"^aten::(?:batch_norm\w*|norm_except_dim|linalg_vector_norm|norm)$"),
    (ACTIVATION, rf"{_OURS}(?:Activation|Swish)Function(?:Backward)?$"),
    (ACTIVATION, r"^fastnorm::\w*(?:activation|swish)"),
    (
        ACTIVATION,
        r"^aten::(?:threshold|hardtanh|relu6?|silu|gelu|selu|elu|celu|leaky_relu|sigmoid|hardswish"
        r"|hardsigmoid|mish|softplus)(?:_backward)?_?$",
    ),
    (MOVES, r"^aten::(?:copy_?|_to_copy|_foreach_copy_|clone|contiguous|cat|stack)$"),
)
_PATTERNS = tuple((kind, re.compile(pattern)) for kind, pattern in _NAMES)


def kind_of(name: str) -> str:
    """What an op of this name does: NORM, ACTIVATION, MOVES (copies, casts and layouts) or REST."""
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), REST)


def _kind(event: Any) -> str:
    """What an op does: part of a norm or an activation where one of those called it, as relu calls
    clamp_min."""
    own, here = kind_of(event.name), event
    while here is not None:
        found = kind_of(here.name)
        if found in (NORM, ACTIVATION):
            return found
        here = here.cpu_parent
    return own


def shares(events: Iterable[Any], device: str) -> dict[str, float]:
    """The part of each kind in the time of these events of a profiler: of the kernels that an op
    launched itself on a GPU, of the op itself on a CPU. What no op launched is REST."""
    spent = dict.fromkeys(KINDS, 0.0)
    everything = 0.0
    for event in events:
        # torch has it from C, and exports it without saying so
        if event.device_type != torch.autograd.DeviceType.CPU:  # type: ignore[attr-defined]
            if not event.is_user_annotation:
                everything += event.time_range.elapsed_us()
            continue
        if device == "cpu":
            took = event.self_cpu_time_total
            everything += took
        else:
            took = sum(kernel.duration for kernel in event.kernels)
        spent[_kind(event)] += took
    spent[REST] = max(0.0, everything - sum(spent[kind] for kind in KINDS if kind != REST))
    return {kind: took / everything for kind, took in spent.items()} if everything else {}


def profiled(step: Callable[[], Any], device: str) -> dict[str, float]:
    """The shares of one step, after some that warm it up."""
    for _ in range(WARMUP):
        step()
    timing.synchronize(device)
    activities = [ProfilerActivity.CPU]  # without it no kernel knows its op
    if device != "cpu":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as profiler:
        step()
        timing.synchronize(device)
    return shares(profiler.events() or (), device)


def text(found: dict[str, float]) -> str:
    """What a row's note says."""
    if not found:
        return f"{NOT_MEASURED}: the profiler saw none"
    each = ", ".join(f"{kind} {found[kind]:.1%}" for kind in (NORM, ACTIVATION, MOVES))
    return f"norm+activation {found[NORM] + found[ACTIVATION]:.1%} of the step ({each})"


def read(note: str) -> str | None:
    """The part of norms and activations that a row's note tells."""
    found = re.search(r"norm\+activation ([0-9.]+%) of the step", note)
    return found[1] if found else None


def _main(connection: Connection, device: str) -> None:
    """Profile a step of every model and provider that is received."""
    from benchmarks import models
    from benchmarks.measure import first_line
    from benchmarks.zoo import MODELS

    warnings.simplefilter("ignore")
    while True:
        variant, provider = connection.recv()
        try:
            found = text(profiled(models.stepping(MODELS[variant], provider, device), device))
        except Exception as error:
            found = f"{NOT_MEASURED}: {first_line(error)}"
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()  # the process that times has the device's memory next
        connection.send(found)


class Profiler(Helper):
    """The process that profiles, as the one that times sees it."""

    def __init__(self, device: str) -> None:
        super().__init__(_main, (device,), "step profiler", LIMIT_S, again=True)

    def told(self, variant: str, provider: str) -> str:
        """What the note of this model's row is to say; memory of the asking process that is not in
        use is given back to the device first."""
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        try:
            found: str = self.asked((variant, provider))
        except (Ended, Late):
            return f"{NOT_MEASURED}: the process that profiles died or took too long"
        return found


@functools.cache
def profiler(device: str) -> Profiler:
    """The one of this process."""
    return Profiler(device)
