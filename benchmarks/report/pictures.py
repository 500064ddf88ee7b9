"""Every picture of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from benchmarks.problems import HOST
from benchmarks.report.bars import host_picture, models_picture
from benchmarks.report.heat import heat_picture
from benchmarks.report.lines import DEVICE_MODES, Line, Run, grouped
from benchmarks.report.opening import opening_pictures
from benchmarks.report.points import floor_picture, overview_picture

OVERVIEW = "overview.png"
HOST_NAMES = {"host": "host time", "host-backward": "host time of the backward"}
VARIANTS = 6  # in one picture: more would not leave room for the numbers


def _parts(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    """The lines in parts of at most VARIANTS variants, of equal size, and a suffix for each."""
    variants = sorted({line.variant for line in lines})
    count = -(-len(variants) // VARIANTS)
    for i in range(count):
        chosen = variants[i * len(variants) // count : (i + 1) * len(variants) // count]
        yield f"-{i + 1}" if count > 1 else "", [x for x in lines if x.variant in chosen]


def _name(stem: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", stem.lower()) + ".png"


def _chosen(run: Run) -> list[Line]:
    """For the README: of each op the layout and dtype with most lines, where sizes differ, and of
    those the variants that were measured in more than one."""
    found = []
    for lines in grouped(run.of(*DEVICE_MODES), "op").values():
        most = max(grouped(lines, "layout", "dtype").values(), key=len)
        if len({line.mebibytes for line in most}) > 2:
            for variant in grouped(most, "variant").values():
                found += variant if len({line.mebibytes for line in variant}) > 1 else []
    return found


def pictures(run: Run, chosen: bool = False) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of every picture of a run, or of those `chosen` for the README: one device,
    never two."""
    if any(line.best for line in run.lines):
        yield OVERVIEW, overview_picture(run)
    device = _chosen(run) if chosen else run.of(*DEVICE_MODES)
    for (op, layout, dtype), lines in grouped(device, "op", "layout", "dtype").items():
        title, stem = f"{op}, {layout}, {dtype}", f"{op}-{layout}-{dtype}"
        for suffix, part in _parts(lines):
            rows = [row for line in part for row in line.rows.values()]
            if any(row.floor_fraction is not None for row in rows):
                yield _name(f"floor-{stem}{suffix}"), floor_picture(run, part, title)
            if any(line.best for line in part):
                yield _name(f"speed-{stem}{suffix}"), heat_picture(run, part, title)
    if steps := [line for line in run.lines if line.op == "model"]:
        yield "models.png", models_picture(run, steps)
    yield from opening_pictures(run)
    for (op, mode), lines in grouped(run.of(*HOST), "op", "mode").items():
        if not chosen:
            yield _name(f"{mode}-{op}"), host_picture(run, lines, f"{op}: {HOST_NAMES[mode]}")
