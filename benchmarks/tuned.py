"""The candidates of `python -m benchmarks tune`, as tables: of one shape, and of many beside what a
model predicts of them.

    python -m benchmarks.tuned FILE    the second of these, of a file that is there
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.candidates import AS_IT_IS
from benchmarks.report.lines import Line, shape_text, side_by_side, timed
from benchmarks.report.tables import Cell, notes
from benchmarks.report.terminal import aligned
from benchmarks.schema import Environment, ResultsError, Row, load

PREDICTED = Path(__file__).parent / "tuning" / "predicted.json"
RULE = "the rule takes "  # in the note of a row, at its end
LEGEND = (
    "Fractions of the floor. * is the fastest of its line; 'as it is' is what the closed rule "
    "does, [] the candidate that it takes; - is one that cannot serve the shape or has a wrong "
    "result, for the reason below."
)


def table(rows: list[Row], environment: Environment) -> str:
    """The candidates of each mode of one problem, the fastest first, beside the floor."""
    lines = []
    for mode in dict.fromkeys(row.mode for row in rows):
        timed = [row for row in rows if row.mode == mode and row.ms_median is not None]
        found = sorted(timed, key=lambda row: row.ms_median or math.inf)
        before = next((row.ms_median for row in found if row.provider == AS_IT_IS), None)
        lines.append(f"{mode} on {environment.device}")
        lines.append(f"{'ms':>10} {'of the floor':>13} {'to as it is':>12}  candidate")
        for row in found:
            assert row.ms_median is not None
            share = "" if row.floor_fraction is None else f"{row.floor_fraction:.1%}"
            gain = "" if before is None else f"{before / row.ms_median:.3f}x"
            lines.append(f"{row.ms_median:10.4f} {share:>13} {gain:>12}  {row.provider}")
        lines += [
            f"{'-':>10} {'':>13} {'':>12}  {row.provider}: {row.note}"
            for row in rows
            if row.mode == mode and row.ms_median is None
        ]
    return "\n".join(lines)


Range = tuple[float, float]


def predictions(line: Line, given: Mapping[str, Any]) -> dict[str, Range]:
    """The fraction of the floor that the model predicts of each form on this line, from its worst
    to its best."""
    if line.op != given["op"] or line.variant not in given["variants"]:
        return {}
    here = (list(line.shape), line.layout, line.dtype, line.mode)
    for row in given["rows"]:
        if here == (row["shape"], row["layout"], row["dtype"], row["mode"]):
            model = dict(row["model"])
            copy = model.pop("copy")
            ranges = ((form, v if isinstance(v, list) else [v, v]) for form, v in model.items())
            return {form: (low / copy, high / copy) for form, (low, high) in ranges}
    return {}


def _range(found: Range) -> str:
    """(0.46 to 0.68), or (0.67) where both are the same to two places."""
    return "(" + " to ".join(dict.fromkeys(f"{value:.2f}" for value in found)) + ")"


def _form(candidate: str) -> str:
    """The word of a candidate that changes one knob alone: hold, of "FORM=2 (hold)"."""
    found = re.fullmatch(r"[\w.]+=-?\d+ \((.+)\)", candidate)
    return found[1] if found else ""


def _cells(line: Line, candidates: list[str], predicted: Mapping[str, Range]) -> list[Cell]:
    best = min(filter(timed, line.rows.values()), key=lambda row: row.ms_median or 0, default=None)
    ours = line.rows.get(AS_IT_IS)
    told = "" if ours is None else ours.note.partition(RULE)[2]
    cells = []
    for name in candidates:
        row, text = line.rows.get(name), ""
        if row is not None:
            text = f"{row.floor_fraction or 0:.2f}" if timed(row) else "-"
            text = f"[{text}]" if set(name.split(", ")) <= set(told.split(", ")) else text
            text += "*" if row is best else ""
        if _form(name) in predicted:
            text += f" {_range(predicted[_form(name)])}"
        cells.append(Cell(text, 0.0))
    return cells


def shapes_table(rows: list[Row], environment: Environment) -> str:
    """A line per problem and mode, a column per candidate; below it, why some have no time."""
    if not rows:
        return "nothing was measured"
    given = json.loads(PREDICTED.read_text(encoding="utf-8"))
    lines = side_by_side(rows)
    candidates = list(dict.fromkeys(row.provider for row in rows))
    found = [predictions(line, given) for line in lines]
    # forms of the model that no candidate is
    others = dict.fromkeys(form for predicted in found for form in predicted)
    others = {form: None for form in others if form not in map(_form, candidates)}
    header = ["op", "mode", "variant", "shape", "layout", "dtype", *candidates, *others]
    body = []
    for line, predicted in zip(lines, found, strict=True):
        words = (line.op, line.mode, line.variant, shape_text(line.shape), line.layout, line.dtype)
        beside = [_range(predicted[form]) if form in predicted else "" for form in others]
        body.append(
            [
                *(Cell(word, word) for word in words),
                *_cells(line, candidates, predicted),
                *(Cell(text, 0.0) for text in beside),
            ]
        )
    told = [f"candidates on {environment.device}", *aligned(header, body, colour=False), LEGEND]
    if any(found):
        told.append(
            f"In parentheses what is predicted by {given['source']}; against the model's own copy "
            "of as many bytes, as the measured fractions are against a measured one. "
            f"In nhwc {given['nhwc']}."
        )
    said = notes([replace(row, note=row.note.partition(RULE)[0].rstrip("; ")) for row in rows])
    return "\n".join([*told, *(f"  {note}" for note in said)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tuned", description=shapes_table.__doc__
    )
    parser.add_argument("file", type=Path)
    try:
        results = load(parser.parse_args(arguments).file)
    except (ResultsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(shapes_table(results.rows, results.environment))
    return 0


if __name__ == "__main__":
    sys.exit(main())
