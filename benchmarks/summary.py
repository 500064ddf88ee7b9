"""The worst rows of a results file, for the end of a log: `python -m benchmarks.summary FILE`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import rule, schema, targets
from benchmarks.report.asked import missed_sentence
from benchmarks.report.lines import side_by_side
from benchmarks.schema import Row

MOST = 15  # of each kind
OURS = ("fastnorm", "fastnorm-cuda", "fastnorm-triton")


def _what(row: Row) -> str:
    sizes = "x".join(map(str, row.shape))
    return f"{row.op} {row.variant} {row.mode} {sizes} {row.layout} {row.dtype} {row.provider}"


def behind(rows: Sequence[Row]) -> list[tuple[float, Row, Row]]:
    """(how many times the best other's time, our row, the other's) where we are the slower."""
    others: dict[object, Row] = {}
    for row in rows:
        if row.ms_median is not None and "fastnorm" not in row.provider:
            best = others.get(row.key)
            if best is None or row.ms_median < (best.ms_median or math.inf):
                others[row.key] = row
    found = [
        (row.ms_median / others[row.key].ms_median, row, others[row.key])  # type: ignore[operator]
        for row in rows
        if row.provider in OURS and row.ms_median is not None and row.key in others
    ]
    return sorted((f for f in found if f[0] > 1), key=lambda f: -f[0])


def _section(title: str, lines: Iterable[str]) -> list[str]:
    found = list(lines)
    left = len(found) - MOST
    more = [f"  and {left} more"] if left > 0 else []
    return ["", f"{title}: {len(found) or 'none'}", *(f"  {s}" for s in found[:MOST]), *more]


def summary(results: schema.Results) -> str:
    """What went wrong, what is far from its floor, where somebody is faster, and which targets are
    missed."""
    rows, e = results.rows, results.environment
    dirty = ", with changes" if e.dirty else ""
    ours = [row for row in rows if row.provider in OURS]
    floors = [row for row in ours if row.floor_fraction is not None]
    lines = [
        f"{e.device}, torch {e.torch}, triton {e.triton}, commit {e.commit[:12]}{dirty}",
        f"a copy moves {e.copy_bandwidth_gbs:.0f} GB/s; {len(rows)} rows",
    ]
    lines += _section(
        "no measurement",
        (
            f"{_what(row)}: {row.note}"
            for row in rows
            if not row.ok and not row.note.startswith("missing: ")
        ),
    )
    lines += _section(
        "missing",
        sorted({f"{row.provider}: {row.note}" for row in rows if row.note.startswith("missing: ")}),
    )
    lines += _section(
        "ours, farthest from the floor first",
        (
            f"{row.floor_fraction:6.1%}  {row.ms_median:9.4f} ms  {_what(row)}"
            for row in sorted(floors, key=lambda row: row.floor_fraction or 0.0)
        ),
    )
    lines += _section(
        "ours, slower than somebody else",
        (
            f"{factor:6.2f}x  {_what(row)} than {best.provider} ({best.ms_median:.4f} ms)"
            for factor, row, best in behind(rows)
        ),
    )
    if e.on_cpu:
        return "\n".join([*lines, "", targets.NONE_ON_CPU])
    every = side_by_side(rows)
    missed = targets.missed(every)
    lines += _section("targets missed, by most first", map(missed_sentence, missed))
    if ruled := rule.text(every):
        lines += ["", "which kernels serve which size:", ruled]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__)
    parser.add_argument("file", type=Path)
    chosen = parser.parse_args(arguments)
    try:
        print(summary(schema.load(chosen.file)))
    except (schema.ResultsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
