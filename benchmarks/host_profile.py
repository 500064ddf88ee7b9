"""Where the microseconds of a call go: a profile of the host, as a row's note has it.

cProfile, which leaves nothing behind in the process. It makes every function of Python dearer and
sees into none of C: the shares are of its own total, and of functions by themselves, without those
that they call.
"""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing

CALLS, WARMUP = 400, 20
MOST = 8  # functions that are named
BEGIN = "profile: "

_Function = tuple[str, int, str]  # file, line, name; of C "~", 0, what it is


def _name(function: _Function) -> str:
    """A function by its file in our package or another, or as C calls it."""
    file, _, name = function
    if file == "~":
        return name.removeprefix("<").removesuffix(">").replace("built-in method ", "")
    path = Path(file)
    folder = path.parent.name if path.stem == "__init__" else f"{path.parent.name}/{path.stem}"
    return f"{folder}.{name}"


def summarised(own: dict[_Function, float], calls: int) -> str:
    """Seconds of functions by themselves as a line: the dearest, and what is left."""
    total = sum(own.values())
    if not total:
        return f"{BEGIN}nothing was seen"
    first = sorted(own.items(), key=lambda item: -item[1])[:MOST]
    each = [f"{_name(function)} {seconds / total:.0%}" for function, seconds in first]
    rest = 1 - sum(seconds for _, seconds in first) / total
    more = f", {len(own) - len(first)} others {rest:.0%}" if len(own) > len(first) else ""
    text = f"{BEGIN}{total / calls * 1e6:.1f} us a call, {', '.join(each)}{more}"
    return text.replace(";", ",")  # which parts notes


def profiled(
    call: Callable[..., Any],
    device: str,
    before: Callable[[], Any] | None = None,
    calls: int = CALLS,
) -> str:
    """The profile of a call that has run before; of `before`, whose result it is given, nothing.

    The backward runs on this thread, where cProfile sees it.
    """
    profiler = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        for i in range(-WARMUP, calls):
            if i % timing.DRAIN == 0:
                timing.synchronize(device)
            given = (before(),) if before else ()
            if i >= 0:
                profiler.enable()
            call(*given)
            profiler.disable()
    stats: Any = pstats.Stats(profiler)  # typeshed has it without `stats`
    own = {function: found[2] for function, found in stats.stats.items()}
    return summarised({f: s for f, s in own.items() if "_lsprof" not in f[2]}, calls)


def read(part: str) -> str | None:
    """The profile in a part of a note, where it is one."""
    return part.removeprefix(BEGIN) if part.startswith(BEGIN) else None
