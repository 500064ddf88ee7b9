"""The file of `python -m benchmarks train`: what is in it, and what it says."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.schema import Environment, ResultsError

SCHEMA = "training 1"
# how many times the spread of torch's runs ours may be away: a norm of few numbers is one draw of
# many, and the largest of three draws is exceeded by a fourth every now and then
LIMIT = 2.0
ROUNDING = 2.0**-23  # of a number in fp32, as every tensor is stored

Pair = tuple[float, float]  # (spread of torch's runs, distance of ours)


@dataclass
class Compared:
    """How far apart the runs of a model ended."""

    all: Pair
    losses: Pair
    tensors: dict[str, Pair]

    @property
    def pairs(self) -> dict[str, Pair]:
        """Everything that is judged, by name."""
        return {"all tensors": self.all, "losses": self.losses, **self.tensors}


@dataclass
class Trained:
    """A model: every step's loss of every run, and how far apart they ended."""

    name: str
    about: str
    surgery: str
    calls: dict[str, int]  # op of ours -> how often one forward calls it
    losses: dict[str, list[float]]  # run -> of every step
    compared: Compared | None = None


@dataclass
class Training:
    environment: Environment
    settings: dict[str, Any]
    models: list[Trained] = field(default_factory=list)


# what it says


def limit(spread: float) -> float:
    """How far ours may be, where torch's runs are that far from each other."""
    return LIMIT * spread + ROUNDING


def share(pair: Pair) -> float:
    """Our distance over its limit: above 1 it is another training."""
    spread, ours = pair
    return ours / limit(spread)


def faults(trained: Trained) -> list[str]:
    """Why this is not the same training, or why nobody can tell; empty where it is."""
    if trained.compared is None:
        return ["it was interrupted: nothing was compared"]
    found = []
    if not trained.calls:
        found.append("no op of ours was called")
    if trained.compared.all[0] == 0:
        found.append("torch's own runs are equal to the last bit: their order changed no rounding")
    for name, pair in trained.compared.pairs.items():
        spread, ours = pair
        if not ours <= limit(spread):  # a NaN is none
            found.append(
                f"{name} is {ours:.1e} away, {share(pair):.2f} times its limit "
                f"(torch's runs are {spread:.1e} apart)"
            )
    return found


def verdict(trained: Trained) -> str:
    """The comparison in a few lines."""
    wrong = faults(trained)
    lines = [f"{trained.name}: {'DIFFERS' if wrong else 'the same training'}"]
    if trained.compared is not None:
        for name in ("all tensors", "losses"):
            spread, ours = trained.compared.pairs[name]
            lines.append(f"  {name}: torch's runs {spread:.1e} apart, ours {ours:.1e} away")
        worst, pair = max(trained.compared.tensors.items(), key=lambda item: share(item[1]))
        lines.append(f"  the furthest tensor: {worst}, at {share(pair):.2f} of its limit")
    return "\n".join([*lines, *(f"  {fault}" for fault in wrong)])


# the file


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON has not, and floats no longer than fp32 is."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def save(training: Training, path: Path) -> None:
    """Write the file as a whole: the old one is there until the new one is."""
    given = {"schema": SCHEMA, **asdict(training)}
    del given["environment"]["copy_bandwidth_gbs"]  # nothing is timed
    text = json.dumps(_finite(given), indent=1, allow_nan=False)
    text = re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found.group()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)


def load(path: Path) -> Training:
    """Read a file; ResultsError where it is none of this schema."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ResultsError(f"{path} is no file of schema {SCHEMA!r}")

    def pair(given: list[float | None]) -> Pair:
        return _number(given[0]), _number(given[1])

    models = []
    for given in data["models"]:
        compared = given.pop("compared")
        model = Trained(**given)
        model.losses = {run: [_number(x) for x in some] for run, some in model.losses.items()}
        if compared is not None:
            tensors = {name: pair(one) for name, one in compared["tensors"].items()}
            model.compared = Compared(pair(compared["all"]), pair(compared["losses"]), tensors)
        models.append(model)
    where = Environment(copy_bandwidth_gbs=0.0, **data["environment"])
    return Training(where, data["settings"], models)


def draw(training: Training, path: Path) -> list[Path]:
    """The picture beside its data, where there is matplotlib; the files that are there."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install '.[bench]')", file=sys.stderr)
        return [path]
    from benchmarks.report.curves import curves_picture

    picture = path.with_suffix(".png")
    picture.write_bytes(curves_picture(training))
    return [path, picture]
