"""``python -m benchmarks run`` measures, ``report`` shows it, ``compare`` tells two runs apart,
``tune`` times the candidates of one op against each other, ``probe`` asks the memory what the forms
of batch norm depend on, ``rule`` says from which size on whose kernels are called, ``train``
compares whole trainings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, probe, report, rule, suites, training, tune
from benchmarks.ops import OPS
from benchmarks.prepare import add_prepare
from benchmarks.problems import DTYPES
from benchmarks.providers import PROVIDERS
from benchmarks.schema import LAYOUTS
from benchmarks.zoo import MODELS


def several(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """A type for argparse: a name or names with commas between them, each one of the choices."""

    def parse(given: str) -> list[str]:
        names = [name.strip() for name in given.split(",") if name.strip()]
        unknown = [name for name in names if name not in choices]
        if unknown or not names:
            raise argparse.ArgumentTypeError(
                f"unknown {', '.join(map(repr, unknown)) or repr(given)}: choose from "
                f"{', '.join(choices)} (several with commas or spaces between them)"
            )
        return names

    return parse


class Flat(argparse.Action):
    """One list of what several arguments were parsed to."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, [name for names in values for name in names])


def seconds(given: str) -> float:
    """A type for argparse: a positive number of seconds."""
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{given!r} is not a positive number of seconds")
    return value


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser("run", help="measure a suite into a results file")

    def names(
        option: str, choices: Sequence[str], default: list[str] | None, also: str = ""
    ) -> None:
        told = f"{', '.join(choices)}; default {', '.join(default) if default else 'all'}{also}"
        run.add_argument(
            option, type=several(choices), nargs="+", action=Flat, default=default,
            metavar="NAME", help=told,
        )  # fmt: skip

    names("--suite", suites.NAMES, ["quick"])
    names("--op", (*OPS, "model"), None)
    names("--variant", tuple(dict.fromkeys(v for op in OPS.values() for v in op.variants)), None)
    names("--layout", LAYOUTS, None)
    names("--dtype", tuple(DTYPES), None)
    names("--model", tuple(MODELS), None)
    slow = ", ".join(provider.name for provider in PROVIDERS.values() if provider.slow)
    later = f". Measured after the others, when a clock may have moved: {slow}"
    names("--providers", tuple(PROVIDERS), None, later)
    run.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    run.add_argument(
        "--budget",
        type=seconds,
        metavar="SECONDS",
        help=f"default {command.GPU_BUDGET:.0f}, on a CPU {command.CPU_BUDGET:.0f}",
    )
    where = run.add_mutually_exclusive_group()
    where.add_argument(
        "--out", type=Path, default=Path("results.json"), help="default results.json"
    )
    where.add_argument(
        "--keep",
        action="store_true",
        help="write benchmarks/results/DEVICE/DATE-SHA[-OP].json, of a checkout without changes",
    )
    where.add_argument(
        "--resume", type=Path, metavar="FILE",
        help="go on with a file of this commit, machine and versions: what it has is not measured "
        "again",
    )  # fmt: skip
    add_prepare(run, seconds)
    run.add_argument("--note", default="", help="kept in the file: what else the machine was doing")
    run.add_argument("--plot", action="store_true", help="then write a report beside the file")
    run.set_defaults(run=command.run)


def parser() -> argparse.ArgumentParser:
    """Of every command; what it parses has `run`, which gives the exit status."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    _add_run(commands)
    report.register(commands)
    tune.register(commands, seconds, several)
    probe.register(commands, seconds, several, Flat)
    rule.register(commands)
    training.register(commands, several)
    return made


def main(arguments: list[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    return int(chosen.run(chosen))


if __name__ == "__main__":
    sys.exit(main())
