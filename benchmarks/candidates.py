"""What can be turned in our kernels: the constants of their launchers, and launch options.

The library chooses by closed rules and has no options of its own for this. A candidate sets some of
the numbers those rules are made of, for as long as it is measured.
"""

from __future__ import annotations

import contextlib
import importlib
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from benchmarks.problems import Problem

FORWARD, BACKWARD = ("forward", "forward+backward"), ("backward", "forward+backward")
BOTH = ("forward", "backward", "forward+backward")
OPTIONS = "launch options"  # in the place of a module: what Triton compiles and launches with


@dataclass(frozen=True)
class Knob:
    """A number that a launcher reads, and the values worth trying: a constant of its module, or,
    written "LIMITS.forward", a field of a named tuple there."""

    name: str
    module: str
    values: tuple[int, ...]
    modes: tuple[str, ...] = BOTH
    words: tuple[tuple[int, str], ...] = ()  # what a value stands for
    taken: str = ""  # the field of a launcher's plan that says what its rule takes where it is free
    alone: bool = False  # nothing else that is turned means anything beside it

    def default(self) -> int | None:
        """What the launcher says now; None for a launch option, which every kernel has its own
        of."""
        if self.module == OPTIONS:
            return None
        found: int = operator.attrgetter(self.name)(importlib.import_module(self.module))
        return found

    def said(self, value: int) -> str:
        """name=value, and what it stands for."""
        word = dict(self.words).get(value)
        return f"{self.name}={value}" + (f" ({word})" if word else "")

    def obstacle(self) -> str | None:
        """Why it cannot be turned in this version and on this machine; None where it can."""
        if self.module == OPTIONS:
            from fastnorm.dispatch import interpreting

            return "the interpreter has no launch options" if interpreting() else None
        try:
            self.default()
        except (ImportError, AttributeError) as error:
            return f"this version has no such constant ({error})"
        return None


# What can be turned of each op and backend: a line here, and the rest follows. A name, where it is,
# its values (the default among them), and what `tune` is to know of it.

_PLAN = "fastnorm.ops.batch_norm.plan"
_LAYER_NORM = "fastnorm.ops.layer_norm.triton"
_WEIGHT_NORM = "fastnorm.ops.weight_norm.triton"
_WARPS = Knob("num_warps", OPTIONS, (4, 8, 16))
_PLANES = (
    # many: one owner of a channel
    Knob("OWNER_TILES", _PLAN, (0, 2, 4, 8, 16), words=((0, "ticket"),)),
    Knob("TILE_BYTES", _PLAN, (8192, 16384, 32768)),
    _WARPS,
    Knob("GROUP_BYTES", _PLAN, (512, 1024, 4096)),
    Knob("RUN_TILES", _PLAN, (1, 2, 4, 8)),
    Knob("LAG", _PLAN, (1, 2, 4, 8)),
    Knob("PROGRAMS", _PLAN, (4, 8, 16)),
    Knob("SET_BYTES", _PLAN, (1 << 20, 6 << 20, 12 << 20)),
)
_LAUNCHES = Knob(
    "LAUNCHES", "benchmarks.two_launches", (1, 2), words=((2, "two launches"),), alone=True
)
_BATCH_NORM_CUDA = "fastnorm.ops.batch_norm.cuda"
_LAYER_NORM_CUDA = "fastnorm.ops.layer_norm.cuda"
# the order of BatchNormForm in csrc/batch_norm.h
_FORMS = tuple(enumerate(("pass", "owner", "hold", "ticket", "stream")))
_TILES = (
    # -1: the closed rule
    Knob("FORM", _BATCH_NORM_CUDA, (-1, 1, 2, 3, 4), words=_FORMS, taken="form"),
    Knob("BATCHES", _BATCH_NORM_CUDA, (-1, 1, 2, 4, 8), taken="batches"),
    Knob("COLUMNS", _BATCH_NORM_CUDA, (-1, 1, 2, 4, 8, 16, 32), taken="columns"),
    Knob("BLOCKS", _BATCH_NORM_CUDA, (-1, 2)),
    Knob("LAG", _BATCH_NORM_CUDA, (-1, 0, 10, 50, 100)),
    Knob("HINTS", _BATCH_NORM_CUDA, (-1, 0), words=((0, "no hints"),)),
)

KNOBS: dict[tuple[str, str], tuple[Knob, ...]] = {
    ("batch_norm", "triton"): (*_PLANES, _LAUNCHES),
    ("mean_only_batch_norm", "triton"): _PLANES,
    ("layer_norm", "triton"): (
        # rows in registers up to here, by chunks beyond
        Knob("FORWARD_COLS", _LAYER_NORM, (0, 4096, 16384, 32768), FORWARD),
        Knob("BACKWARD_COLS", _LAYER_NORM, (0, 4096, 8192, 16384), BACKWARD),
        _WARPS,
        Knob("BLOCK", _LAYER_NORM, (2048, 4096, 8192), FORWARD),
        Knob("CHUNK", _LAYER_NORM, (8192, 16384, 32768), FORWARD),
        Knob("BACKWARD_BLOCK", _LAYER_NORM, (512, 1024, 2048), BACKWARD),
        Knob("GROUP", _LAYER_NORM, (8, 16, 32), BACKWARD),
        Knob("SHARED_ROW", _LAYER_NORM, (16384, 32768, 65536), FORWARD),
        # rows in registers: occupancy, loads in flight, programs
        Knob("REGISTERS", _LAYER_NORM, (96, 128, 168), BACKWARD),
        Knob("REGISTERS_WIDE", _LAYER_NORM, (128, 168), BACKWARD),
        Knob("BACKWARD_BYTES", _LAYER_NORM, (16, 32), BACKWARD),
        Knob("HELD_COLS", _LAYER_NORM, (0, 2048, 4096), BACKWARD),
        Knob("LEAST_ROWS", _LAYER_NORM, (2, 8, 32), BACKWARD),
        Knob("LEAST_BODY", _LAYER_NORM, (32, 1 << 62), words=((1 << 62, "element by element"),)),
        Knob("FINALIZE", _LAYER_NORM, (2048, 4096, 8192), BACKWARD),
        # rows beyond them: how far the first phase is ahead, rows at once
        Knob("LEAD_QUARTERS", _LAYER_NORM, (0, 1, 2, 4), BACKWARD),
        Knob("ROWS", _LAYER_NORM, (4, 8), BACKWARD),
    ),
    ("weight_norm", "triton"): (
        Knob("SPLIT_FROM", _WEIGHT_NORM, (1 << 14, 1 << 17, 1 << 62)),  # the last: one launch
        Knob("HELD_ELEMENTS", _WEIGHT_NORM, (4096, 8192, 16384)),
        Knob("LOOP_ELEMENTS", _WEIGHT_NORM, (2048, 4096, 8192)),
        _WARPS,
        Knob("MAX_SPLITS", _WEIGHT_NORM, (16, 64, 256)),
    ),
    ("activation", "triton"): (
        Knob("BLOCK_BYTES", "fastnorm.ops.activation.triton", (4096, 8192, 16384, 32768)),
        _WARPS,
    ),
    ("batch_norm", "cuda"): (*_TILES, _LAUNCHES),
    ("mean_only_batch_norm", "cuda"): _TILES,
    ("layer_norm", "cuda"): (
        Knob("LIMITS.forward", _LAYER_NORM_CUDA, (0, 512, 1024, 2048), FORWARD),
        Knob("LIMITS.backward", _LAYER_NORM_CUDA, (0, 256, 512, 1024), BACKWARD),
        Knob("LIMITS.forward_chunk", _LAYER_NORM_CUDA, (512, 1024, 2048), FORWARD),
        Knob("LIMITS.backward_chunk", _LAYER_NORM_CUDA, (256, 512, 1024), BACKWARD),
        Knob("LIMITS.group", _LAYER_NORM_CUDA, (8, 16, 32), BACKWARD),
        # longer rows: whose blocks keep their columns, and whose parameters stay in L2
        Knob("LIMITS.stream_chunk", _LAYER_NORM_CUDA, (0, 256, 512), BACKWARD),
        Knob("LIMITS.stream_lag", _LAYER_NORM_CUDA, (2, 4, 8), BACKWARD),
        Knob("LIMITS.row_bytes", _LAYER_NORM_CUDA, (1, 28 << 20, 1 << 40), FORWARD),
    ),
}

AS_IT_IS = "as it is"
TOGETHER = 2
Changes = tuple[tuple[str, int], ...]  # (knob, value) of each that is not at its default


def knobs(problem: Problem, backend: str) -> tuple[Knob, ...]:
    """The knobs of a problem; Swish with a learnable beta is cut as batch norm is."""
    if problem.variant == "swish" and backend == "triton":
        return _PLANES
    return KNOBS.get((problem.op, backend), ())


def candidates(chosen: Iterable[Knob], mode: str) -> list[Changes]:
    """The default, each value of each knob alone, then with one of another knob: more at once than
    TOGETHER would be millions where an op has a dozen knobs."""
    usable = [k for k in chosen if mode in k.modes and k.obstacle() is None]
    alone = {k.name for k in usable if k.alone}
    found: list[Changes] = [()]
    for k in reversed(usable):
        turned = [v for v in k.values if v != k.default()]
        few = [changes for changes in found if len(changes) < TOGETHER]
        found += [((k.name, v), *changes) for v in turned for changes in few]
    found = [changes for changes in found if len(changes) < 2 or not alone & dict(changes).keys()]
    return sorted(found, key=len)


def label(chosen: Iterable[Knob], changes: Changes) -> str:
    by_name = {knob.name: knob for knob in chosen}
    return ", ".join(by_name[name].said(value) for name, value in changes) or AS_IT_IS


def _forget_plans(module: ModuleType) -> None:
    for function in vars(module).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@contextlib.contextmanager
def _constant(knob: Knob, value: int) -> Iterator[None]:
    module = importlib.import_module(knob.module)
    name, _, field = knob.name.partition(".")
    before = getattr(module, name)
    setattr(module, name, before._replace(**{field: value}) if field else value)
    _forget_plans(module)
    try:
        yield
    finally:
        setattr(module, name, before)
        _forget_plans(module)


@contextlib.contextmanager
def _launch_option(name: str, value: int) -> Iterator[None]:
    kind: Any = importlib.import_module("triton.runtime.jit").JITFunction
    before = kind.run

    def run(self: Any, *arguments: Any, **given: Any) -> Any:
        return before(self, *arguments, **{**given, name: value})

    kind.run = run
    try:
        yield
    finally:
        kind.run = before


@contextlib.contextmanager
def applied(chosen: Iterable[Knob], changes: Changes) -> Iterator[None]:
    """These values in the place of the launchers' own."""
    by_name = {knob.name: knob for knob in chosen}
    with contextlib.ExitStack() as stack:
        for name, value in changes:
            knob = by_name[name]
            if knob.module == OPTIONS:
                stack.enter_context(_launch_option(name, value))
            else:
                stack.enter_context(_constant(knob, value))
        yield


@contextlib.contextmanager
def rules_choice(chosen: Iterable[Knob]) -> Iterator[dict[str, int]]:
    """What the launchers' closed rules take for the knobs that are left to them, by the latest plan
    that was made so far."""
    found: dict[str, int] = {}
    left = [knob for knob in chosen if knob.taken and knob.obstacle() is None]
    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(knob.module for knob in left):
            module: Any = importlib.import_module(name)
            stack.callback(setattr, module, "plan", module.plan)

            def plan(*arguments: Any, _plan: Any = module.plan, **named: Any) -> Any:
                made = _plan(*arguments, **named)
                found.update((knob.name, getattr(made, knob.taken)) for knob in left)
                return made

            module.plan = plan
        yield found
