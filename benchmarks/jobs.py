"""A run as a list of jobs, the important ones first: one problem or model and one provider each.

Providers of a problem follow each other, but for those that compile or tune for seconds: they come
after the others, so that a budget buys the most rows. They get the same numbers, yet the device's
clock may have moved in the minutes between: a difference of a few percent to one of them is to be
seen again in a run of that op alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from benchmarks import kernels, largest, models
from benchmarks.calls import Provider
from benchmarks.largest import LargestJob
from benchmarks.measure import Bench, blank
from benchmarks.problems import Problem
from benchmarks.providers import PROVIDERS
from benchmarks.report.lines import COMPILED, is_compiled
from benchmarks.schema import Row
from benchmarks.zoo import MODELS, PURE, Model

# a job that takes longer hangs, and is ended: one op that compiles little, a job of many
# measurements, one that compiles or tunes
ONE_S, FAST_S, SLOW_S = 20.0, 60.0, 150.0
COMPILED_S = 300.0  # a model with dropout is compiled twice: for its check and for its steps


class Job(Protocol):
    """What the worker runs. `family` and `provider_name`: where one of them lacks its provider, the
    others of the family do too."""

    @property
    def provider_name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def rank(self) -> float: ...
    @property
    def limit_s(self) -> float: ...
    def missing(self, device: str) -> str | None: ...
    def rows(self, bench: Bench) -> Iterator[Row]: ...
    def failed(self, note: str) -> Row: ...


@dataclass(frozen=True)
class OpJob:
    """A problem on a provider: the name of one of ours, or one that a test made."""

    problem: Problem
    given: str | Provider

    @property
    def provider(self) -> Provider:
        return PROVIDERS[self.given] if isinstance(self.given, str) else self.given

    @property
    def provider_name(self) -> str:
        return self.provider.name

    @property
    def family(self) -> str:
        return self.problem.op

    @property
    def rank(self) -> float:
        # compiling costs as much as ten problems: where it matters most, after the others, the
        # models that do and KernelBench; well after them elsewhere
        if not self.provider.slow:
            return self.problem.importance
        return self.problem.importance + (0.95 if self.problem.importance == 0 else 1.5)

    @property
    def limit_s(self) -> float:
        counting = kernels.LIMIT_S if kernels.wanted(self.problem) else 0.0
        return SLOW_S if self.provider.slow else ONE_S + counting

    def missing(self, device: str) -> str | None:
        return self.provider.missing(device)

    def rows(self, bench: Bench) -> Iterator[Row]:
        return bench.rows(self.problem, self.provider)

    def failed(self, note: str) -> Row:
        return blank(self.problem, self.problem.modes[0], self.provider_name, note, ok=False)

    def __str__(self) -> str:
        return f"{self.problem} {self.provider_name}"


@dataclass(frozen=True)
class ModelJob:
    """A training step of a model of this name, as torch has it or after our surgery."""

    name: str
    provider_name: str
    device: str

    family = "model"

    @property
    def limit_s(self) -> float:
        return COMPILED_S if is_compiled(self.provider_name) else SLOW_S

    @property
    def model(self) -> Model:
        return MODELS[self.name]

    @property
    def rank(self) -> float:
        return self.model.importance + (5.0 if is_compiled(self.provider_name) else 0.0)

    def missing(self, device: str) -> str | None:
        return None

    def rows(self, bench: Bench) -> Iterator[Row]:
        bench.forget()
        return models.rows(self.model, self.provider_name, self.device)

    def failed(self, note: str) -> Row:
        return models.blank(self.model, self.provider_name, self.device, note, ok=False)

    def __str__(self) -> str:
        return f"model {self.name} {self.provider_name}"


def _asked(name: str, names: list[str]) -> bool:
    """Whether the command line asks for a provider of models: the steps of our surgery are one of
    its providers, and compiled where torch is."""
    eager = name.removesuffix(COMPILED)
    asked = eager in names or eager.removesuffix("-replaced") in names
    return asked and (eager == name or "torch.compile" in names)


def plan(
    problems: Iterable[Problem], chosen: Iterable[Model], providers: Iterable[str], device: str
) -> list[Job]:
    """Every job of these problems and models, in the order in which to run them."""
    names, chosen = list(providers), list(chosen)
    jobs: list[Job] = [
        OpJob(problem, name)
        for problem in problems
        for name in names
        if any(PROVIDERS[name].serves(problem, mode) for mode in problem.modes)
    ]
    jobs += [
        ModelJob(model.variant, name, device)
        for model in chosen
        for name in models.PROVIDERS
        if _asked(name, names)
        # on a CPU everything is fp32: such a row would not be what it is called
        if device != "cpu" or model.precision != PURE
    ]
    jobs += [
        LargestJob(model.variant, name, device)
        for model in chosen
        for name in largest.PROVIDERS
        if name in names and model.variant in largest.CHOSEN and device != "cpu"
    ]
    return sorted(jobs, key=lambda job: job.rank)
