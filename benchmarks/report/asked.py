"""What is asked of a run, in words: targets by family, rows that miss theirs, peak memory."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks import shares, targets
from benchmarks.report.lines import Line, geometric_mean
from benchmarks.report.tables import where, why

TARGET_LEGEND = (
    "The target of a row is what came out and what benchmarks/targets.py asks: floor, its floor "
    "fraction; best, torch: its speed over that of the best other, of torch; host, memory: over "
    "torch's; epilogue: its time over that of the norm without its activation; frozen: over that "
    "with weights that learn; ≈: short of it by noise. Memory is our peak over torch's, inputs "
    "included: of a forward until it returns, of a backward that of forward and backward together, "
    "with what is saved between them."
)


def target_header() -> list[str]:
    return [
        *("family", "rows", "met", "missed", "without a target"),
        f"against torch, {targets.MEAN_OF_TORCH:.2f}x",
        f"against the best other, {targets.MEAN_OF_BEST:.2f}x",
    ]


def target_rows(lines: Iterable[Line]) -> list[list[str]]:
    """A row for every family: how many of its rows meet their targets, and its geometric means."""

    def mean(one: targets.Target | None) -> str:
        return f"{one.got:.2f}x {'met' if one.met else 'missed'}" if one else ""

    return [
        [
            "models" if family.name == "model" else family.name,
            str(len(family.verdicts)),
            *(str(family.count(word)) for word in ("met", "missed", "none")),
            mean(family.torch),
            mean(family.best),
        ]
        for family in targets.families(lines)
    ]


def missed_sentence(one: targets.Verdict) -> str:
    """A row that misses a target, and by how much."""
    if one.failed:
        return f"{where(one.line)}: {why(one.line)}"
    told = (f"{target} ({target.short:.0%} short)" for target in one.missed)
    return f"{where(one.line)}: {'; '.join(told)}"


def share_sentence(lines: Iterable[Line]) -> str:
    """Which part of a model's step norms and activations are, before and after; "" where nobody
    profiled one."""
    told = []
    for line in lines:
        found = {name: shares.read(row.note) for name, row in line.rows.items()}
        each = [f"{name} {share}" for name, share in found.items() if share is not None]
        told += [f"{line.variant} {', '.join(each)}"] if each else []
    what = "Norms and activations in the device time of a step, by the profiler"
    return f"{what}: {'; '.join(told)}." if told else ""


def memory_sentence(lines: Iterable[Line]) -> str:
    """Peak memory of batch norm with an activation against torch's; "" where nobody counted it."""
    told = []
    for mode, what in (("forward", "forward"), ("backward", "forward and backward together")):
        found = [
            line.memory
            for line in lines
            if line.op == "batch_norm" and line.mode == mode and line.memory is not None
            if line.variant not in ("plain", "residual")
        ]
        if found:
            low, high = min(found), max(found)
            told.append(
                f"{what} {geometric_mean(found):.2f}x ({low:.2f} to {high:.2f}, {len(found)} rows)"
            )
    if not told:
        return ""
    what = "Peak memory of batch norm with an activation, inputs included, over torch's"
    return f"{what}: {', '.join(told)}."
