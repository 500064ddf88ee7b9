"""Rows side by side: what was measured for every provider, and who was faster."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.schema import MODES, Environment, Results, ResultsError, Row, load

# in this order, then peers by name; "fastnorm-replaced" is a model before its layers are fused,
# and what ends with COMPILED a model that was compiled after our surgery
COMPILED = "-compiled"
PROVIDERS = (
    *("torch", "torch.compile", "fastnorm-triton", "fastnorm-cuda"),
    *("fastnorm-replaced", "fastnorm", "fastnorm-replaced-compiled", "fastnorm-compiled"),
)
DEVICE_MODES = ("forward", "backward", "forward+backward")
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
WIN, TIE, LOSS = "faster", "within noise", "slower"


def is_ours(provider: str) -> bool:
    return provider == "fastnorm" or provider.startswith("fastnorm-")


def is_compiled(provider: str) -> bool:
    return provider == "torch.compile" or provider.endswith(COMPILED)


def counterpart(provider: str) -> str:
    """What a provider of ours is judged by: torch eager, or compiled where ours is."""
    return "torch.compile" if is_compiled(provider) else "torch"


def timed(row: Row | None) -> bool:
    return row is not None and row.ok and bool(row.ms_median)


def interval(row: Row) -> tuple[float, float]:
    """The p20 and p80 of a timed row."""
    median = row.ms_median or math.nan
    return row.ms_p20 or median, row.ms_p80 or median


@dataclass(frozen=True)
class Against:
    """A row of ours against another's: `ratio` is their time over ours, above 1 where we win."""

    provider: str
    ratio: float
    verdict: str

    @property
    def lost(self) -> bool:
        """Whether we are slower, beyond the noise."""
        return self.verdict == LOSS


def against(mine: Row, other: Row) -> Against:
    (low, high), (their_low, their_high) = interval(mine), interval(other)
    verdict = WIN if high < their_low else LOSS if low > their_high else TIE
    return Against(other.provider, (other.ms_median or 0) / (mine.ms_median or 1), verdict)


@dataclass
class Line:
    """One thing that was measured, and its row of each provider."""

    op: str
    variant: str
    mode: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def ours(self) -> Row | None:
        """What a user gets, which is `fastnorm`; the faster backend where only those were run;
        never a model that was compiled, whose counterpart is not torch eager."""
        auto = self.rows.get("fastnorm")
        return auto if auto is not None else self._fastest(ours=True)

    def _fastest(self, ours: bool) -> Row | None:
        rows = [
            row
            for name, row in self.rows.items()
            if is_ours(name) == ours and timed(row) and not (ours and is_compiled(name))
        ]
        return min(rows, key=lambda row: row.ms_median or 0, default=None)

    def against(self, other: Row | None) -> Against | None:
        """Ours against this row, where both have a time: compiled against compiled where ours was
        compiled too."""
        mine = self.ours
        compiled = self.rows.get(f"fastnorm{COMPILED}")
        if other is not None and is_compiled(other.provider) and timed(compiled):
            mine = compiled
        if mine is None or other is None or not timed(mine) or not timed(other):
            return None
        return against(mine, other)

    @property
    def torch(self) -> Against | None:
        """Against torch eager."""
        return self.against(self.rows.get("torch"))

    @property
    def best(self) -> Against | None:
        """Against the fastest of all others, torch and torch.compile among them."""
        return self.against(self._fastest(ours=False))

    @property
    def lost_to_failure(self) -> bool:
        """Whether we have no time where another has one."""
        others = any(timed(row) and not is_ours(name) for name, row in self.rows.items())
        return others and not timed(self.ours) and any(map(is_ours, self.rows))

    @property
    def memory(self) -> float | None:
        """Our peak memory over torch's, where both are known."""
        mine, torch = self.ours, self.rows.get("torch")
        if mine is None or torch is None or not (timed(mine) and timed(torch)):
            return None
        if not (mine.peak_memory_mib and torch.peak_memory_mib):
            return None
        return mine.peak_memory_mib / torch.peak_memory_mib

    @property
    def family(self) -> str:
        """The op; KernelBench's own formulas apart, whose torch is not torch's function."""
        return f"{self.op} (KernelBench)" if self.variant.startswith("kernelbench") else self.op

    @property
    def what(self) -> tuple[object, ...]:
        """All but the mode."""
        return self.op, self.variant, self.shape, self.layout, self.dtype

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.op, self.variant, self.mode)))

    @property
    def mebibytes(self) -> float:
        """The size of a tensor of this shape."""
        return math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 4) / 2**20


@dataclass
class Run:
    """The files that one state of the code measured on one device."""

    environment: Environment
    lines: list[Line]

    @property
    def providers(self) -> list[str]:
        """Those with rows: torch, torch.compile, ours, then peers by name."""
        named = {name for line in self.lines for name in line.rows}
        return [p for p in PROVIDERS if p in named] + sorted(named.difference(PROVIDERS))

    @property
    def kind(self) -> str:
        return "CPU" if self.environment.on_cpu else "GPU"

    @property
    def title(self) -> str:
        device = self.environment.device
        return device if device.startswith(self.kind) else f"{self.kind}: {device}"

    @property
    def versions(self) -> str:
        e = self.environment
        commit = e.commit[:10] + (" with uncommitted changes" if e.dirty else "")
        gpu = () if e.on_cpu else (f"driver {e.driver}", f"CUDA {e.cuda}")
        peers = (f"{name} {version}" for name, version in e.peers.items())
        parts = (
            f"fastnorm {e.fastnorm} at {commit}",
            f"torch {e.torch}",
            f"triton {e.triton}",
            f"python {e.python}",
            *gpu,
            *peers,
            e.timestamp,
        )
        return ", ".join(parts)

    @property
    def copy(self) -> str:
        return (
            f"a plain copy moves {self.environment.copy_bandwidth_gbs:.4g} GB/s, read and written"
        )

    def of(self, *modes: str) -> list[Line]:
        return [line for line in self.lines if line.mode in modes]


def side_by_side(rows: Iterable[Row]) -> list[Line]:
    """The rows as lines, in order of op, mode, layout, dtype, variant and size; the last of two
    rows of one provider counts."""
    lines: dict[tuple[object, ...], Line] = {}
    for row in rows:
        line = lines.setdefault(row.key, Line(*row.key))
        line.rows[row.provider] = row

    def order(line: Line) -> tuple[object, ...]:
        where = (line.op == "model", line.op, MODES.index(line.mode), line.layout, line.dtype)
        return (*where, line.variant, math.prod(line.shape), line.shape)

    return sorted(lines.values(), key=order)


def read(path: str | Path) -> Results:
    """A results file with at least one row; ResultsError says what is wrong."""
    path = Path(path)
    if not path.is_file():
        near = sorted(path.parent.glob("*.json")) if path.parent.is_dir() else []
        there = ", ".join(map(str, near)) or "no .json file"
        raise ResultsError(f"{path} is not there; beside it there is {there}")
    results = load(path)
    if not results.rows:
        raise ResultsError(f"{path} has no rows: nothing was measured before the run ended")
    return results


def choose(rows: list[Row], ops: list[str] | None) -> list[Row]:
    """The rows of these ops, or all; ResultsError lists the choices."""
    there = sorted({row.op for row in rows})
    unknown = [op for op in ops or [] if op not in there]
    if unknown:
        raise ResultsError(f"no rows of op {', '.join(unknown)}: choose from {', '.join(there)}")
    return [row for row in rows if not ops or row.op in ops]


def state(e: Environment) -> tuple[object, ...]:
    """Device and state of the code: files that agree in it are one run."""
    versions = (e.device, e.driver, e.torch, e.triton, e.fastnorm, e.commit, e.dirty)
    return (e.on_cpu, *versions)


def runs(results: Iterable[Results], ops: list[str] | None = None) -> list[Run]:
    """One run per device and state of the code, GPUs first: what may stand in one picture."""
    groups: dict[tuple[object, ...], list[Results]] = {}
    for result in sorted(results, key=lambda r: r.environment.timestamp):
        groups.setdefault(state(result.environment), []).append(result)
    every = [row for group in groups.values() for result in group for row in result.rows]
    choose(every, ops)
    found = []
    for _, group in sorted(groups.items(), key=lambda item: item[0][0] is True):
        rows = [row for result in group for row in result.rows if not ops or row.op in ops]
        if rows:
            found.append(Run(group[-1].environment, side_by_side(rows)))
    return found


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def grouped(lines: Iterable[Line], *names: str) -> Mapping[tuple[str, ...], list[Line]]:
    """The lines by these fields, in the order in which they come."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault(tuple(getattr(line, name) for name in names), []).append(line)
    return groups


def shape_text(shape: tuple[int, ...]) -> str:
    """64x112x112, or 2^24 for that many elements in a row."""
    if len(shape) == 1 and shape[0] >= 4096 and shape[0].bit_count() == 1:
        return f"2^{shape[0].bit_length() - 1}"
    return "x".join(map(str, shape)) or "0-d"


def size_text(mebibytes: float) -> str:
    """A size in the unit that makes it short."""
    for unit, factor in (("GiB", 2**10), ("MiB", 1), ("KiB", 2**-10), ("B", 2**-20)):
        if mebibytes >= 0.999 * factor:
            value = mebibytes / factor
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return "0 B"


def time_text(milliseconds: float) -> str:
    """Three digits, without an exponent."""
    if milliseconds <= 0 or not math.isfinite(milliseconds):
        return f"{milliseconds:g}"
    return f"{milliseconds:.{max(0, 2 - math.floor(math.log10(milliseconds)))}f}"
