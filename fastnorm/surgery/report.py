"""What a surgery did, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

_NAMED = 3  # modules that a note names; of more it gives the number


class Row(NamedTuple):
    """One line of a report: a change, or a module left alone (``now`` equals ``was``) and why."""

    name: str
    was: str
    now: str
    why_skipped: str = ""


class Note(NamedTuple):
    """What a module of this name goes on losing, known before anything has run."""

    name: str
    text: str


class Report:
    """What a surgery changed and what it left alone; prints as a table, iterates over its rows.

    ``notes`` holds what is known to be lost all the same, and what to do about it.

    Example:
        >>> import torch, fastnorm
        >>> report = fastnorm.replace_(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU()))
        >>> report.changed, report.skipped
        (1, 0)
        >>> [row.name for row in report]
        ['1']
    """

    def __init__(
        self, rows: Iterable[Row], dry_run: bool = False, notes: Iterable[Note] = ()
    ) -> None:
        self.rows = list(rows)
        self.dry_run = dry_run
        self.notes = list(notes)

    @property
    def changed(self) -> int:
        """How many rows are changes."""
        return sum(not row.why_skipped for row in self.rows)

    @property
    def skipped(self) -> int:
        """How many rows are modules left alone."""
        return len(self.rows) - self.changed

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        total = f"{self.changed} changed, {self.skipped} skipped"
        if self.dry_run:
            total = f"dry run, nothing touched: {self.changed} to change, {self.skipped} to skip"
        lines = [("name", "was", "is", "why skipped"), *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        lines.insert(1, ("-" * widths[0], "-" * widths[1], "-" * widths[2], "-" * widths[3]))
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        ]
        return "\n".join([*(line.rstrip() for line in table), total, *self._told()])

    def _told(self) -> Iterator[str]:
        """The notes, one line for all modules that have the same."""
        grouped: dict[str, list[str]] = {}
        for name, text in self.notes:
            grouped.setdefault(text, []).append(name or "the model")
        for text, names in grouped.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            yield f"note: {', '.join(names[:_NAMED])}{more}: {text}"

    __repr__ = __str__
