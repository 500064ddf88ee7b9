"""One problem, one provider: checked against fp64, then timed, as rows."""

from __future__ import annotations

import functools
import gc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from benchmarks import correctness, host_profile, kernels, timing
from benchmarks.calls import Call, Provider
from benchmarks.context import dead_context
from benchmarks.correctness import Oracle
from benchmarks.floors import floor_bytes
from benchmarks.ops import OPS, Tensors
from benchmarks.problems import DTYPES, GRAPH, HOST, STEP, STEPS, TRAINING, WALL, Problem
from benchmarks.providers import PROVIDERS
from benchmarks.report.lines import is_ours
from benchmarks.schema import Row

HOST_GAPS = "its host time is long: the device may have waited for it within the time"
RUNS, WARMUP = 50, 10  # of a step whose wall clock is taken
IN_A_ROW = 20
SPREAD = 0.1  # of a copy's own times, from which on a row says it
SPREAD_COPY = f"floor_fraction is as sure as the copy's own times, over {SPREAD:.0%} apart"


def first_line(error: BaseException) -> str:
    """An exception in one line of a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}"[:200] if text else type(error).__name__


def blank(problem: Problem, mode: str, provider: str, note: str = "", ok: bool = True) -> Row:
    """A row with nothing measured yet."""
    return Row(
        op=problem.op, variant=problem.variant, mode=mode, shape=list(problem.shape),
        layout=problem.layout, dtype=problem.dtype, provider=provider, ok=ok, note=note,
    )  # fmt: skip


def _host_call(
    call: Call, mode: str, dys: tuple[torch.Tensor, ...]
) -> tuple[Callable[..., object], Callable[[], object] | None]:
    """(what is timed on the host, what its argument comes from)."""
    if mode == "host":
        return call.forward, None
    backward = call.last_backward or call.backward
    assert backward is not None, "served modes only"
    return lambda y: backward(y, dys), call.forward


@dataclass
class Stage:
    """The tensors of a problem, what torch makes of them, and the exact results. The numbers are
    drawn by seed and problem: whoever comes later, or to another process, gets the same."""

    problem: Problem
    device: str
    seed: int = 0
    tensors: Tensors = field(init=False)
    oracle: Oracle = field(init=False)
    torch_errors: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(zlib.crc32(f"{self.seed} {self.problem}".encode()))
        self.tensors = OPS[self.problem.op].tensors(self.problem, self.device)
        torchs = PROVIDERS["torch"].bind(self.problem, self.fresh())
        result = torchs.forward()
        dys = correctness.gradients_like(correctness.outputs_of(torchs.outputs(result)))
        with_gradients = self.problem.modes != ("forward",)
        self.oracle = Oracle(self.problem, self.tensors, dys, with_gradients)
        del result
        buffers = self.fresh()
        torchs = PROVIDERS["torch"].bind(self.problem, buffers)
        self.torch_errors = correctness.errors(self.results(torchs, buffers), self.oracle)

    def fresh(self) -> Tensors:
        """The same tensors with running statistics of their own, which every call moves."""
        return {n: t if t.requires_grad else t.clone() for n, t in self.tensors.items()}

    def results(self, call: Call, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Outputs, gradients and running statistics of the first call on these tensors."""
        result = call.forward()
        found = correctness.outputs_of(call.outputs(result))
        if self.oracle.with_gradients and call.backward is not None:
            gradients = call.backward(result, self.oracle.dys)
            found |= {
                name: g.detach()
                for name, g in zip(call.names, gradients, strict=True)
                if g is not None
            }
        return found | {n: t for n, t in tensors.items() if not t.requires_grad}

    def check(self, call: Call, tensors: Tensors) -> tuple[float, float, str]:
        """(error, torch's error, what is wrong), the error being the largest, of a call that is
        bound to these tensors."""
        results = self.results(call, tensors)
        found = correctness.errors(results, self.oracle, call.backward is not None)
        dtype = DTYPES[self.problem.dtype]
        complaint = correctness.wrong(found, self.torch_errors, results, dtype)
        worst = max(found, key=lambda name: found[name])
        return found[worst], self.torch_errors[worst], complaint

    def owned(self, mode: str) -> int:
        """Bytes of the tensors that a call of this mode is given."""
        given = [*self.tensors.values(), *(self.oracle.dys if mode != "forward" else ())]
        return sum(t.numel() * t.element_size() for t in given)


class Bench:
    """What a worker keeps between jobs: the last problem's tensors, the copies it has timed, and
    the process that counts kernels."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device, self.seed = device, seed
        self.copies = timing.Copies(device)
        self.counter = kernels.Counter(device, seed)
        self._stage: Stage | None = None

    def stage(self, problem: Problem) -> Stage:
        if self._stage is None or self._stage.problem != problem:
            self.forget()
            self._stage = Stage(problem, self.device, self.seed)
        return self._stage

    def forget(self) -> None:
        """Give the memory of the last problem back."""
        self._stage = None
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def rows(self, problem: Problem, provider: Provider) -> Iterator[Row]:
        """The rows of a provider on a problem; one that says why where something fails."""
        modes = [mode for mode in problem.modes if provider.serves(problem, mode)]
        if not modes:
            return
        done = 0
        try:
            stage = self.stage(problem)
            with provider.active():
                tensors = stage.fresh()
                call = provider.bind(problem, tensors)
                error, torch_error, complaint = stage.check(call, tensors)
                if complaint:
                    row = blank(problem, modes[0], provider.name, complaint, ok=False)
                    row.error, row.torch_error = error, torch_error
                    yield row
                    return
                counts = self._counts(problem, provider, modes)
                for mode in modes:
                    row = self._timed(stage, call, mode, provider.name)
                    row.error, row.torch_error = error, torch_error
                    profile = self._profile(stage, call, mode) if is_ours(provider.name) else ""
                    row.note = "; ".join(filter(None, (row.note, counts.get(mode), profile)))
                    yield row
                    done += 1
        except Exception as error:
            note, dead = first_line(error), dead_context()
            if not dead:
                self.forget()
            yield blank(problem, modes[min(done, len(modes) - 1)], provider.name, note, ok=False)
            if dead:
                raise  # this process can measure nothing more

    def _counts(self, problem: Problem, provider: Provider, modes: list[str]) -> dict[str, str]:
        """What the notes of a small problem say of its kernels, by mode. Not of who would compile
        for seconds once more for it, nor of a provider that the other process does not know."""
        known = PROVIDERS.get(provider.name) is provider and not provider.slow
        if self.device == "cpu" or not known or not kernels.wanted(problem):
            return {}
        asked = tuple(mode for mode in modes if mode in TRAINING)
        return self.counter.told(problem, provider.name, asked) if asked else {}

    def _timed(self, stage: Stage, call: Call, mode: str, provider: str) -> Row:
        row = blank(stage.problem, mode, provider)
        notes = [call.note] if call.note else []
        dys = stage.oracle.dys
        if mode in HOST:
            found = self._host(call, mode, dys)
        elif mode in WALL:
            found = self._wall(stage, call, mode, row)
        else:
            # before a backward's forward, whose saved tensors would be there when it starts
            row.peak_memory_mib = self._memory(stage, call, mode)
            run = self.run_of(stage, call, mode)
            found = timing.device_time(run, self.device)
            if self.device != "cpu":
                flush = self.copies.milliseconds(timing.FLUSHED_BYTES)
                if timing.host_gaps(run, found.median, flush, self.device):
                    notes.append(HOST_GAPS)
        row.ms_median, row.ms_p20, row.ms_p80 = found
        row.floor_bytes = floor_bytes(stage.problem, mode)
        if row.floor_bytes is not None:
            row.floor_fraction = self.copies.milliseconds(row.floor_bytes) / found.median
            if self.copies.spread(row.floor_bytes) > SPREAD:
                notes.append(SPREAD_COPY)
        row.note = "; ".join(notes)
        return row

    def _host(self, call: Call, mode: str, dys: tuple[torch.Tensor, ...]) -> timing.Timing:
        run, before = _host_call(call, mode, dys)
        return timing.host_time(run, self.device, before=before)

    def _profile(self, stage: Stage, call: Call, mode: str) -> str:
        """Where the host's time goes."""
        if mode not in HOST:
            return ""
        run, before = _host_call(call, mode, stage.oracle.dys)
        return host_profile.profiled(run, self.device, before)

    def _wall(self, stage: Stage, call: Call, mode: str, row: Row) -> timing.Timing:
        step: Callable[[], object] = functools.partial(call.step, stage.oracle.dys)
        if mode == STEP:
            row.peak_memory_mib = self._memory(stage, call, mode)
        if mode == GRAPH:
            step = timing.graph_of(step)
        steps, warmup = (RUNS, WARMUP) if self.device != "cpu" else (3, 1)
        return timing.step_time(step, self.device, steps, warmup, IN_A_ROW if mode == STEPS else 1)

    def _memory(self, stage: Stage, call: Call, mode: str) -> float | None:
        """The peak as a user sees it: of a forward, with its inputs, outputs and what it saves; of
        anything with a backward, of the forward before it and of the backward together."""
        dys = stage.oracle.dys
        run = call.forward if mode == "forward" else lambda: call.step(dys)
        return timing.peak_memory_mib(run, stage.owned(mode), self.device)

    def run_of(self, stage: Stage, call: Call, mode: str) -> Callable[[], object]:
        """What is timed of a call: as often as it is asked to."""
        if mode == "forward":
            return call.forward
        backward, dys = call.backward, stage.oracle.dys
        assert backward is not None, "served modes only"
        if mode == "forward+backward":
            return lambda: backward(call.forward(), dys)
        result = call.forward()
        return lambda: backward(result, dys)
