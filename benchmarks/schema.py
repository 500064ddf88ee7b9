"""The results file: what is in it, how it is read, and how a row is appended to it."""

from __future__ import annotations

import json
import math
import os
import re
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

SCHEMA = 1
MODES = (
    *("forward", "backward", "forward+backward"),
    *("host", "host-backward", "step", "steps", "graph"),
)
LAYOUTS = ("nchw", "nhwc", "nlc", "rows", "flat")

_TAIL = b"\n]}\n"  # what every file ends with, and what an appended row is written over


class ResultsError(ValueError):
    """A file that is no results file of this schema."""


@dataclass
class Environment:
    """Where and with what the rows were measured."""

    device: str
    driver: str  # of the GPU; "none" where the rows were measured on a CPU
    cuda: str
    torch: str
    triton: str
    python: str
    fastnorm: str
    commit: str
    dirty: bool
    timestamp: str  # UTC, ISO 8601
    copy_bandwidth_gbs: float  # bytes read + bytes written, of a copy that no cache holds
    peers: dict[str, str] = field(default_factory=dict)  # name -> version, the installed ones
    note: str = ""

    @property
    def on_cpu(self) -> bool:
        """Whether this is a CPU: nothing of it stands in one picture with a GPU's."""
        return self.driver == "none"

    @property
    def slug(self) -> str:
        """The device as the name of its folder in benchmarks/results/."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")


@dataclass
class Row:
    """One measurement, or why there is none: `ok` is False and `note` says it."""

    op: str
    variant: str
    mode: str
    shape: list[int]
    layout: str
    dtype: str
    provider: str
    ms_median: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    floor_bytes: int | None = None
    floor_fraction: float | None = None
    error: float | None = None  # relative norm against fp64
    torch_error: float | None = None
    ok: bool = True
    peak_memory_mib: float | None = None
    samples_per_second: float | None = None  # of a model
    note: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What is measured: rows of one key are the providers side by side."""
        return (self.op, self.variant, self.mode, tuple(self.shape), self.layout, self.dtype)


@dataclass
class Results:
    environment: Environment
    rows: list[Row] = field(default_factory=list)


_Record = TypeVar("_Record", Environment, Row)
_TYPES: dict[type, dict[str, Any]] = {cls: get_type_hints(cls) for cls in (Environment, Row)}


def _record(cls: type[_Record], given: Any, where: str) -> _Record:
    if not isinstance(given, Mapping):
        raise ResultsError(f"{where} is {type(given).__name__}, not an object")
    names = [f.name for f in fields(cls)]
    required = [f.name for f in fields(cls) if f.default is f.default_factory]  # both are MISSING
    missing = [name for name in required if name not in given]
    unknown = [name for name in given if name not in names]
    if missing or unknown:
        raise ResultsError(
            f"{where} lacks {missing} and has unknown {unknown}; its fields are {', '.join(names)}"
        )
    for name, hint in _TYPES[cls].items():
        if name in given and not _fits(given[name], hint):
            raise ResultsError(
                f"{where}: {name} is {given[name]!r}, of type {type(given[name]).__name__}; "
                f"it is to be {hint.__name__ if isinstance(hint, type) else hint}"
            )
    return cls(**given)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that JSON gave is of this type of a field; a whole number is a float too, and
    true is no number."""
    parts = get_args(hint)
    if get_origin(hint) is types.UnionType:
        return any(_fits(value, part) for part in parts)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(part, parts[0]) for part in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(part, parts[1]) for part in value.values())
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def parse(text: str, where: str) -> Results:
    """The results in this text; ResultsError says what is wrong with it, and `where`."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ResultsError(f"{where} is not JSON: {error}") from None
    if not isinstance(data, dict) or "schema" not in data:
        raise ResultsError(f"{where} is no results file: it names no schema")
    if data["schema"] != SCHEMA:
        raise ResultsError(
            f"{where} is of schema {data['schema']!r}; this version reads schema {SCHEMA}: "
            "use the version of fastnorm that wrote it"
        )
    if not isinstance(data.get("rows"), list):
        raise ResultsError(f"{where} has no list of rows")
    environment = _record(Environment, data.get("environment"), f"{where}: environment")
    rows = [_record(Row, row, f"{where}: row {i}") for i, row in enumerate(data["rows"])]
    for i, row in enumerate(rows):
        for name, value, choices in (("mode", row.mode, MODES), ("layout", row.layout, LAYOUTS)):
            if value not in choices:
                raise ResultsError(
                    f"{where}: row {i} has {name} {value!r}: choose one of {', '.join(choices)}"
                )
    return Results(environment, rows)


def load(path: str | Path) -> Results:
    """Read a results file; ResultsError says what is wrong with it, FileNotFoundError that it is
    not there."""
    return parse(Path(path).read_text(encoding="utf-8"), str(path))


def _line(row: Row) -> bytes:
    """A row as one line of JSON, without what it does not have; no NaN, which JSON has not."""
    given = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(row).items()
    }
    optional = ("samples_per_second",)
    given = {n: v for n, v in given.items() if not (n in optional and v is None)}
    return json.dumps(given).encode()


def save(results: Results, path: str | Path) -> None:
    """Write a results file as a whole: the old one is there until the new one is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"schema": SCHEMA, "environment": asdict(results.environment)}, indent=1)
    body = b",\n".join(map(_line, results.rows))
    part = path.with_name(path.name + ".part")
    part.write_bytes(head[:-2].encode() + b',\n "rows": [\n' + body + _TAIL)
    os.replace(part, path)


def append(path: str | Path, row: Row) -> None:
    """Add a row at the end of a results file, in one write over the closing brackets: the file is
    whole before and after."""
    with open(path, "r+b") as file:
        end = file.seek(-len(_TAIL), os.SEEK_END)
        file.seek(end - 1)
        before = file.read(1)
        if file.read() != _TAIL:
            raise ResultsError(f"{path} does not end as a results file does: it was edited by hand")
        separator = b"" if before == b"\n" else b",\n"
        os.pwrite(file.fileno(), separator + _line(row) + _TAIL, end)
