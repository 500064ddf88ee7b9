"""`python -m benchmarks report` and `compare`: what results files say, for people."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import difference, readme
from benchmarks.report.lines import Run, read, runs
from benchmarks.report.markdown import markdown
from benchmarks.report.page import page
from benchmarks.report.terminal import terminal
from benchmarks.schema import ResultsError

ROOT = Path(__file__).parents[2]


def _pictures(run: Run, chosen: bool = False) -> list[tuple[str, bytes]]:
    """The pictures of a run; none, and why, where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "no pictures: matplotlib is not installed (python -m pip install '.[bench]')",
            file=sys.stderr,
        )
        return []
    from benchmarks.report import pictures

    return list(pictures.pictures(run, chosen))


def _write(pictures: Sequence[tuple[str, bytes]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in pictures:
        (folder / name).write_bytes(png)


def write_report(found: Sequence[Run], out: Path) -> list[Path]:
    """Write report.md, report.html and a folder of pictures for each run; the two pages."""
    out.mkdir(parents=True, exist_ok=True)
    sections, parts = [], []
    for i, run in enumerate(found):
        pictures = _pictures(run)
        # two runs of one device, of different commits, must not overwrite each other
        folder = run.environment.slug + (f"-{i}" if i else "")
        _write(pictures, out / folder)
        sections.append((run, pictures))
        parts.append(markdown(run, [f"{folder}/{name}" for name, _ in pictures]))
    pages = [out / "report.md", out / "report.html"]
    pages[0].write_text("\n".join(parts), encoding="utf-8")
    pages[1].write_text(page(sections), encoding="utf-8")
    return pages


def report_files(files: Sequence[str | Path], out: Path | None, ops: list[str] | None) -> int:
    """Print the tables of these results files, and write the report beside its pictures."""
    found = runs([read(path) for path in files], ops)
    seen = sys.stdout.isatty()
    colour = seen and "NO_COLOR" not in os.environ
    width = shutil.get_terminal_size().columns if seen else None
    for run in found:
        print(terminal(run, colour, width), end="\n\n")
    folder = out or Path("report", Path(files[0]).stem)
    for path in write_report(found, folder):
        print(f"wrote {path}")
    return 0


def report_readme(root: Path = ROOT) -> int:
    """Draw the pictures of the newest files of each device, and write the README's table."""
    for run, paths in readme.newest(root):
        for old in paths[0].parent.glob("*.png"):
            old.unlink()
        _write(_pictures(run, chosen=True), paths[0].parent)
    changed = readme.rewrite(root)
    print("README.md " + ("is rewritten" if changed else "is as the results say"))
    return 0


def _report(chosen: argparse.Namespace) -> int:
    if chosen.readme:
        return report_readme()
    if not chosen.files:
        there = sorted(str(path) for path in (ROOT / readme.RESULTS).glob("*/*.json"))
        raise ResultsError(
            f"name a results file, or --readme; there is {', '.join(there) or 'none'}"
        )
    return report_files(chosen.files, chosen.out, chosen.op)


def _compare(chosen: argparse.Namespace) -> int:
    if not chosen.threshold >= 0:
        raise ResultsError(f"--threshold is {chosen.threshold}: it must be 0 or more, 0.05 is 5 %")
    old, new = read(chosen.old), read(chosen.new)
    found = difference.difference(old, new, chosen.threshold)
    print(difference.text(found, chosen.threshold, difference.changes(old, new)))
    return 1 if found.regressions else 0


def _told(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The command, with bad input told in one line and exit status 2."""

    def run(chosen: argparse.Namespace) -> int:
        try:
            return command(chosen)
        except ResultsError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run


def register(subparsers: Any) -> None:
    """Add `report` and `compare`; the parsed arguments' `run(arguments)` gives the exit status."""
    report = subparsers.add_parser(
        "report", help="tables, pictures and one HTML page from results files"
    )
    report.add_argument("files", nargs="*", metavar="results.json", type=Path)
    report.add_argument("--op", nargs="+", help="only these ops")
    report.add_argument(
        "--out", type=Path, help="folder of report.md, report.html and the pictures (report/NAME)"
    )
    report.add_argument(
        "--readme", action="store_true", help="rewrite the README's table and its pictures"
    )
    report.set_defaults(run=_told(_report))
    compare = subparsers.add_parser(
        "compare", help="what got faster or slower; exit status 1 on a regression of fastnorm"
    )
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    compare.add_argument(
        "--threshold", type=float, default=0.05, help="slower by more is a regression (0.05)"
    )
    compare.set_defaults(run=_told(_compare))
