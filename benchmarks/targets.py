"""What a GPU's rows are to reach, and whether they do: the rules, all of them, in this one place.

They are an H100's (or H200's), of device time with a cold L2 cache. A size is that of x; 1 MB is
10^6 bytes. Who is not to be slower than another is slower only where the p20-p80 ranges of the two
rows do not overlap. Of a CPU nothing is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks import kernels
from benchmarks.activations import EPILOGUES
from benchmarks.floors import FLOORS
from benchmarks.ops import FROZEN
from benchmarks.problems import DTYPES, HOST, STEP, STEPS, TRAINING, WALL, Problem
from benchmarks.report.lines import (
    DEVICE_MODES,
    Against,
    Line,
    against,
    counterpart,
    geometric_mean,
    grouped,
    is_ours,
    timed,
)

NONE_ON_CPU = "Targets are set for GPUs; a file of a CPU has none."

LARGE = 32e6  # bytes, from which on a floor is asked for
ON_CHIP = 13e6  # bytes of one channel's operands, which the second pass of a norm finds on chip
LONG_ROW = 32768  # elements
SHORT_ROW = 256

BATCH_NORM_FLOOR, STREAMING = 0.90, 0.95
LAYER_NORM_FLOOR = {"forward": 0.92, "backward": 0.85}
LONG_ROW_FLOOR, ACTIVATION_FLOOR = 0.85, 0.95
EVERY_ROW = 0.98  # of the best other
MEAN_OF_TORCH, MEAN_OF_BEST = 1.5, 1.15
SWISH, WHOLE_MODEL = 3.0, 10.0  # times torch's speed
HOST_LIMITS = {"batch_norm": 1.3, "layer_norm": 2.0, "activation": 2.0, "weight_norm": 1.0}
EPILOGUE = {"forward": 1.03, "backward": 1.10}  # times the norm without its activation
SMALL_KERNEL = ((32, 64, 7, 7), 3.0)  # microseconds that the kernels of this batch norm may run
MODELS = {"resnet50": 1.15, "efficientnet": 1.3}  # times torch's speed, by the name's beginning
MEMORY = {"efficientnet": 0.75}  # of torch's


@dataclass(frozen=True)
class Target:
    """One thing that is asked of a row, or of a family's mean, and what came out.

    `what`: floor, the floor fraction; best and torch, the speed over that of the best other and of
    torch; host and memory, over torch's; launches, and kernels, how long they run; epilogue, the
    time over that of the norm without its activation; frozen, over that with weights that learn.
    `excused`: what is short of it is noise.
    """

    what: str
    wanted: float
    got: float
    unit: str = ""
    at_most: bool = False
    excused: bool = False

    @property
    def met(self) -> bool:
        within = self.got <= self.wanted if self.at_most else self.got >= self.wanted
        return within or self.excused

    @property
    def short(self) -> float:
        """By which part of what is wanted it is missed."""
        return 0.0 if self.met else abs(self.got - self.wanted) / self.wanted

    def __str__(self) -> str:
        bound = "at most" if self.at_most else "at least"
        return f"{self.what} {self.got:.2f}{self.unit}, {bound} {self.wanted:.2f}{self.unit}"

    @property
    def brief(self) -> str:
        """As a cell of a table has it."""
        noise = "≈" if self.excused else ""
        return f"{noise}{self.got:.2f}{self.unit}/{self.wanted:.2f}{self.unit} {self.what}"


@dataclass(frozen=True)
class Verdict:
    """What is asked of a line; `failed` where others have a time and ours has none."""

    line: Line
    targets: tuple[Target, ...]
    failed: bool = False

    @property
    def missed(self) -> list[Target]:
        """The farthest first."""
        return sorted((t for t in self.targets if not t.met), key=lambda t: -t.short)

    @property
    def short(self) -> float:
        return math.inf if self.failed else max((t.short for t in self.targets), default=0.0)

    @property
    def word(self) -> str:
        if self.failed or self.missed:
            return "missed"
        return "met" if self.targets else "none"


# floors: of device rows


def _of_batch_norm(variant: str, mode: str) -> tuple[int, int]:
    """(operands that the second pass reads again, moves of an op that streams them twice). The
    gradient that an activation hides from a residual is written once and read again."""
    residual, hidden = variant.startswith("residual"), variant.startswith("residual+")
    if mode == "forward":
        return 1 + residual, 3 + residual
    return 2 + hidden, 7 if hidden else 5


def _norm_floor(problem: Problem, mode: str) -> float:
    """Of batch norm, mean-only or not: of the floor where a channel fits on chip, else of what
    streaming could reach, as moves go. Adjacent channels do not fit, until that is known better."""
    size = problem.numel * problem.itemsize
    mean_only = problem.op == "mean_only_batch_norm"
    operands, moves = (1, 3) if mean_only else _of_batch_norm(problem.variant, mode)
    if problem.layout == "nchw" and operands * size / problem.shape[1] <= ON_CHIP:
        return BATCH_NORM_FLOOR
    return STREAMING * FLOORS[problem.op](problem, mode) / (moves * size)


def floor_fraction(line: Line) -> float | None:
    """What a line's floor fraction is to be; None where no floor is asked for."""
    if line.mode not in TRAINING or line.dtype not in DTYPES:
        return None
    problem = Problem(line.op, line.variant, line.shape, line.layout, line.dtype)
    large = problem.numel * problem.itemsize >= LARGE
    if line.op == "layer_norm":
        length = math.prod(line.shape[-3 if line.variant == "last3" else -1 :])
        if length > LONG_ROW:
            return LONG_ROW_FLOOR
        return LAYER_NORM_FLOOR[line.mode] if large and length >= SHORT_ROW else None
    if not large:
        return None
    if line.op in ("batch_norm", "mean_only_batch_norm"):
        return _norm_floor(problem, line.mode)
    return ACTIVATION_FLOOR if line.op == "activation" else None


# every target of a line


def _speed(what: str, wanted: float, found: Against | None) -> Iterator[Target]:
    """Their time over ours, where both have one."""
    if found is not None:
        excused = found.ratio < wanted and not found.lost
        yield Target(what, wanted, found.ratio, "x", excused=excused)


def _over(line: Line, base: Line | None, what: str, limit: float) -> Iterator[Target]:
    """The time of each of ours over that of the same provider on another line."""
    for name, row in line.rows.items() if base is not None else ():
        other = base.rows.get(name) if base is not None else None
        if is_ours(name) and timed(row) and other is not None and timed(other):
            found = against(row, other)
            cost = 1 / found.ratio
            told = what if row is line.ours else f"{what}, {name}"
            yield Target(told, limit, cost, "x", True, cost > limit and not found.lost)


def _beside_plain(line: Line, plain: Line | None) -> Iterator[Target]:
    """An activation in a norm is next to free where memory is what the norm waits for, and the
    backward of frozen weights costs no more than that of others."""
    if line.mebibytes * 2**20 >= LARGE and line.mode in EPILOGUE:
        if line.variant == FROZEN and line.mode == "backward":
            yield from _over(line, plain, "frozen", 1.0)
        elif line.variant in EPILOGUES:
            yield from _over(line, plain, "epilogue", EPILOGUE[line.mode])


def _device(line: Line, plain: Line | None) -> Iterator[Target]:
    mine = line.ours
    assert mine is not None, "asked of lines with a time of ours only"
    floor = floor_fraction(line)
    if floor is not None and mine.floor_fraction is not None:
        yield Target("floor", floor, mine.floor_fraction)
    yield from _speed("best", EVERY_ROW, line.best)
    small = line.mebibytes * 2**20 < kernels.SMALL_BYTES
    counted = kernels.read(mine.note)
    if line.variant in ("swish", "swish_channels") and line.torch is not None:
        yield Target("torch", SWISH, line.torch.ratio, "x")
    elif line.op in ("activation", "weight_norm") or (line.op == "batch_norm" and small):
        yield from _speed("torch", 1.0, line.torch)
    one_launch = line.variant == "hifigan" or (line.op == "batch_norm" and small)
    if counted is not None and one_launch:
        yield Target("launches", 1, counted.launches, at_most=True)
        shape, limit = SMALL_KERNEL
        if line.op == "batch_norm" and line.shape == shape:
            yield Target("kernels", limit, counted.microseconds, " us", at_most=True)
    yield from _beside_plain(line, plain)


def _host(line: Line) -> Iterator[Target]:
    """Of each of ours, forward with gradient and backward, in torch's own host times."""
    torch, limit = line.rows.get("torch"), HOST_LIMITS.get(line.op)
    for name, row in line.rows.items() if limit is not None and torch is not None else ():
        if is_ours(name) and timed(row) and timed(torch):
            assert torch is not None and limit is not None
            found = against(row, torch)
            cost = 1 / found.ratio
            told = "host" if row is line.ours else f"host, {name}"
            excused = limit == 1.0 and cost > limit and not found.lost  # as fast as torch
            yield Target(told, limit, cost, "x", True, excused)


def _wall(line: Line) -> Iterator[Target]:
    """All weights of a model ten times as fast, host included; whatever else is timed by the wall
    clock no slower: one weight, many small calls in a row, a graph, of which no host is part."""
    if line.torch is not None and line.variant == "hifigan" and line.mode == STEP:
        yield Target("torch", WHOLE_MODEL, line.torch.ratio, "x")
    elif line.op == "weight_norm" or line.mode == STEPS:
        yield from _speed("torch", 1.0, line.torch)


def _model(line: Line) -> Iterator[Target]:
    """A stand-in of our own, which its row names, is no ResNet-50: it must not be slower, no
    more."""
    torch, mine = line.rows.get("torch"), line.ours
    if torch is None or not timed(torch) or mine is None:
        return
    named = [name for name in MODELS if line.variant.startswith(name)]
    for name in named if not mine.note.startswith("our own") else ():
        yield Target("torch", MODELS[name], against(mine, torch).ratio, "x")
        if name in MEMORY and line.memory is not None:
            yield Target("memory", MEMORY[name], line.memory, "x", at_most=True)
    for name, row in line.rows.items():
        other = line.rows.get(counterpart(name))
        if is_ours(name) and timed(row) and other is not None and timed(other):
            what = "torch" if row is mine else f"{other.provider}, {name}"
            yield from _speed(what, 1.0, against(row, other))


def verdict(line: Line, plain: Line | None = None) -> Verdict:
    """What is asked of a line; `plain` is the line without its activation, where there is one."""
    if not timed(line.ours):
        return Verdict(line, (), failed=line.lost_to_failure)
    if line.op == "model":
        return Verdict(line, tuple(_model(line)))
    if line.mode in (*HOST, *WALL):
        return Verdict(line, tuple(_host(line) if line.mode in HOST else _wall(line)))
    return Verdict(line, tuple(_device(line, plain)))


def verdicts(lines: Iterable[Line]) -> list[Verdict]:
    """Of every line, a norm with an activation beside the same norm without."""

    def key(line: Line) -> tuple[object, ...]:
        return line.op, line.mode, line.shape, line.layout, line.dtype

    every = list(lines)
    plains = {key(line): line for line in every if line.variant == "plain"}
    return [verdict(line, plains.get(key(line))) for line in every]


def missed(lines: Iterable[Line]) -> list[Verdict]:
    """The lines that miss a target: those that failed, then the farthest from it."""
    found = [one for one in verdicts(lines) if one.word == "missed"]
    return sorted(found, key=lambda one: -one.short)


# families


@dataclass(frozen=True)
class Family:
    """The lines of an op, and what is asked of them together."""

    name: str
    verdicts: Sequence[Verdict]
    torch: Target | None
    best: Target | None

    def count(self, word: str) -> int:
        return sum(one.word == word for one in self.verdicts)


def families(lines: Iterable[Line]) -> list[Family]:
    """Every op's; the means are over its device rows, forward and backward."""
    every = list(lines)
    found = []
    for (name,), group in grouped(every, "family").items():
        device = [line for line in group if line.mode in DEVICE_MODES]
        eager = geometric_mean(line.torch.ratio for line in device if line.torch is not None)
        best = geometric_mean(line.best.ratio for line in device if line.best is not None)
        of_torch = Target("mean speed of torch", MEAN_OF_TORCH, eager, "x") if eager else None
        of_best = Target("mean speed of the best", MEAN_OF_BEST, best, "x") if best else None
        found.append(Family(name, verdicts(group), of_torch, of_best))
    return found
