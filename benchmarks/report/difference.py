"""What got faster and what got slower between two results files of one device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.report.lines import (
    LOSS,
    WIN,
    against,
    geometric_mean,
    is_ours,
    shape_text,
    time_text,
    timed,
)
from benchmarks.schema import Results, ResultsError, Row

Key = tuple[Any, ...]


@dataclass
class Difference:
    """Rows as sentences; `regressions` are those of ours that are slower by more than the
    threshold and the noise, or have no right result any more."""

    faster: list[str] = field(default_factory=list)
    slower: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    only_old: list[str] = field(default_factory=list)
    only_new: list[str] = field(default_factory=list)
    regressions: list[str] = field(default_factory=list)
    same: int = 0
    torch: list[float] = field(default_factory=list)  # new time over old: what the machine did


def _name(row: Row) -> str:
    shape = shape_text(tuple(row.shape))
    return f"{row.provider}: {row.op} {row.variant} {row.mode}, {shape}, {row.layout}, {row.dtype}"


def _rows(results: Results) -> dict[Key, Row]:
    return {(*row.key, row.provider): row for row in results.rows}


def _compare(found: Difference, old: Row, new: Row, threshold: float) -> None:
    name = _name(new)
    if timed(old) and timed(new):
        ratio = (new.ms_median or 0) / (old.ms_median or 1)
        change = ratio - 1
        if new.provider == "torch":
            found.torch.append(ratio)
        times = f"{time_text(old.ms_median or 0)} -> {time_text(new.ms_median or 0)} ms"
        told = f"{change:+.1%}  {times}  {name}"
        verdict = against(new, old).verdict
        if verdict == WIN:
            found.faster.append(told)
        elif verdict == LOSS:
            found.slower.append(told)
            if is_ours(new.provider) and change > threshold:
                found.regressions.append(told)
        else:
            found.same += 1
    elif timed(old):
        told = f"{name}: {new.note or 'no time'}"
        found.broken.append(told)
        if is_ours(new.provider):
            found.regressions.append(told)
    elif timed(new):
        found.mended.append(f"{name}, which was: {old.note or 'no time'}")
    else:
        found.same += 1


def difference(old: Results, new: Results, threshold: float = 0.05) -> Difference:
    """Compare two files row by row; ResultsError if they are of two devices."""
    was, now = old.environment, new.environment
    if (was.device, was.on_cpu) != (now.device, now.on_cpu):
        raise ResultsError(
            f"the old file is of {was.device!r} and the new one of {now.device!r}: times of two "
            "devices cannot be compared; give two files of one device"
        )
    found = Difference()
    before, after = _rows(old), _rows(new)
    for key, row in after.items():
        if key in before:
            _compare(found, before[key], row, threshold)
        else:
            found.only_new.append(_name(row))
    found.only_old = [_name(row) for key, row in before.items() if key not in after]
    return found


def changes(old: Results, new: Results) -> list[str]:
    """What of the environment is not as it was, which may explain a change of time."""
    was, now = vars(old.environment), vars(new.environment)
    ignored = ("timestamp", "note")
    return [
        f"{name}: {was[name]} -> {now[name]}"
        for name in was
        if name not in ignored and was[name] != now[name]
    ]


def text(found: Difference, threshold: float, changed: list[str]) -> str:
    """The difference as a person reads it; regressions last, where the eye is."""

    def size(told: str) -> float:
        return -abs(float(told.split("%")[0]))

    parts = (
        ("The environment changed", changed),
        ("Faster, beyond the p20-p80 noise", sorted(found.faster, key=size)),
        ("Slower, beyond the p20-p80 noise", sorted(found.slower, key=size)),
        ("No result any more", found.broken),
        ("A result now", found.mended),
        ("Only in the old file", found.only_old),
        ("Only in the new file", found.only_new),
        (f"Regressions of fastnorm past {threshold:.0%}", found.regressions),
    )
    lines = []
    for heading, told in parts:
        if told:
            lines += [f"{heading} ({len(told)}):", *(f"  {one}" for one in told), ""]
    if mean := geometric_mean(found.torch):
        lines.append(
            f"torch itself: {mean - 1:+.1%}, the geometric mean of {len(found.torch)} rows; "
            "with the same torch this is what the machine did"
        )
    lines.append(
        f"{len(found.faster)} faster, {len(found.slower)} slower, {found.same} within the noise, "
        f"{len(found.only_old)} only in the old file, {len(found.only_new)} only in the new one; "
        f"{len(found.regressions)} regressions of fastnorm past {threshold:.0%}"
    )
    return "\n".join(lines)
