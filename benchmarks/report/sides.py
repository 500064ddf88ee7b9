"""Host time and device time of every layer, side by side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from benchmarks.problems import HOST, TRAINING
from benchmarks.report.lines import Line, Run, is_ours, shape_text, time_text, timed
from benchmarks.schema import Row

SHOWN = ("torch", "fastnorm-cuda", "fastnorm-triton")
DIRECTIONS = tuple(zip(TRAINING, HOST, strict=True))  # on the device, on the host
AUTO = "fastnorm"  # what a user gets without asking: one of the two backends, or torch's function
LEGEND = (
    "Microseconds of a layer's call and of its backward: on the host until it returns, and on the "
    "device with a cold L2 cache. In brackets: over torch's own."
)


def _size(lines: Sequence[Line]) -> int:
    """How many elements most of these lines have; the most of those."""
    count = Counter(math.prod(line.shape) for line in lines)
    return max(count, key=lambda size: (count[size], size), default=0)


def _cell(row: Row | None, torch: Row | None) -> str:
    if row is None or not timed(row) or row.ms_median is None:
        return ""
    text = time_text(1e3 * row.ms_median)
    if torch is None or row is torch or not timed(torch) or torch.ms_median is None:
        return text
    return f"{text} ({row.ms_median / torch.ms_median:.2f}x)"


def _other(rows: Mapping[str, Row]) -> str:
    """The fastest that is neither torch nor ours, and its name."""
    found = [row for name, row in rows.items() if name != "torch" and not is_ours(name)]
    best = min(filter(timed, found), key=lambda row: row.ms_median or 0, default=None)
    return f"{_cell(best, rows.get('torch'))} {best.provider}" if best is not None else ""


def _shown(run: Run) -> list[str]:
    found = [name for name in SHOWN if name in run.providers]
    return found if len(found) > 1 else [*found, AUTO]


def side_header(run: Run) -> list[str]:
    columns = [*_shown(run), "best other"]
    return [
        *("layer", "shape", "direction"),
        *(f"host: {name}" for name in columns),
        *(f"device: {name}" for name in columns),
    ]


def side_rows(run: Run) -> list[list[str]]:
    """A row for each layer and direction, of the size in which most layers were measured."""
    hosts = run.of(*HOST)
    size = _size(hosts)
    lines = {(*line.what, line.mode): line for line in run.lines}
    shown = _shown(run)
    found = []
    for what in dict.fromkeys(line.what for line in hosts if math.prod(line.shape) == size):
        for device, host in DIRECTIONS:
            sides = [lines.get((*what, mode)) for mode in (host, device)]
            if sides[0] is None:
                continue
            cells = [f"{what[0]} {what[1]}".strip(), shape_text(sides[0].shape), device]
            for line in sides:
                rows = line.rows if line is not None else {}
                cells += [_cell(rows.get(name), rows.get("torch")) for name in shown]
                cells.append(_other(rows))
            found.append(cells)
    return found
