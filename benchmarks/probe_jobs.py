"""The jobs that `python -m benchmarks probe` is made of, and the first of them: what copies cost by
segments of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastnorm
from benchmarks.context import dead_context
from benchmarks.jobs import FAST_S
from benchmarks.measure import Bench, first_line
from benchmarks.schema import Row
from benchmarks.timing import Timing, device_time

SEGMENT_LOSS = 48  # bytes that each segment may cost on top of its own, in the model
SEGMENTS = (32, 64, 128, 256, 512, 1024)  # bytes; and whole rows
ITEM = 2  # bytes of bf16


class Sizes(NamedTuple):
    """How large the tensors are."""

    rows: int
    cols: int
    steps: int  # tiles of a program that copies segments
    unit: int  # bytes of footprint
    read: int  # bytes read again in one launch
    window: int  # bytes of the tensor that a window moves over


SIZES = {
    "cuda": Sizes(1 << 18, 1 << 10, 2, 1 << 20, 1 << 31, 1 << 30),
    "cpu": Sizes(256, 512, 1, 1 << 12, 1 << 17, 1 << 18),  # the interpreter's: nothing of a GPU
}


@dataclass(frozen=True)
class Probe:
    """A kernel on sizes of its own, checked and timed."""

    device: str

    family, rank, limit_s = "probe", 0.0, FAST_S

    @property
    def provider_name(self) -> str:
        return "triton"

    @property
    def variant(self) -> str:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def floor(self) -> int | None:
        """The fewest bytes of DRAM; None where DRAM is not what takes the time."""
        raise NotImplementedError

    @property
    def predicted(self) -> str:
        """Of the share of a plain copy, unless it says of what else."""
        raise NotImplementedError

    def measured(self) -> tuple[Timing, str]:
        """(its time, a note); AssertionError where it did not do what it is timed for."""
        raise NotImplementedError

    def missing(self, device: str) -> str | None:
        return fastnorm.backends()["triton"]

    def failed(self, note: str) -> Row:
        return Row(
            op=f"probe_{self.family}", variant=self.variant, mode="forward", shape=[*self.shape],
            layout="rows", dtype="bfloat16", provider=self.provider_name, ok=False, note=note,
        )  # fmt: skip

    def rows(self, bench: Bench) -> Iterator[Row]:
        bench.forget()
        row = self.failed("")
        try:
            (row.ms_median, row.ms_p20, row.ms_p80), row.note = self.measured()
        except Exception as error:
            yield self.failed(first_line(error))
            if dead_context():
                raise  # nothing more can be measured by this process
            return
        row.ok, row.floor_bytes = True, self.floor
        if self.floor is not None:
            row.floor_fraction = bench.copies.milliseconds(self.floor) / row.ms_median
        yield row

    def random(self, elements: int) -> Tensor:
        return torch.randn(elements, dtype=torch.bfloat16, device=self.device)

    def __str__(self) -> str:
        return f"{self.family}, {self.variant}"


def poisoned(x: Tensor) -> Tensor:
    return torch.full_like(x, float("nan"))


@dataclass(frozen=True)
class Segments(Probe):
    """A copy of [M, C] by segments of so many bytes; of whole rows where they are as long; None:
    torch's own copy."""

    segment: int | None
    far: bool = False

    family = "segments"

    @property
    def provider_name(self) -> str:
        return "torch" if self.segment is None else "triton"

    @property
    def shape(self) -> tuple[int, ...]:
        return SIZES[self.device][:2]

    @property
    def variant(self) -> str:
        if self.segment is None:
            return "plain copy"
        if self.segment == self.shape[1] * ITEM:
            return "whole rows"
        return f"{self.segment} B, {'a column block at a time' if self.far else 'along the rows'}"

    @property
    def floor(self) -> int:
        return 2 * self.shape[0] * self.shape[1] * ITEM

    @property
    def predicted(self) -> str:
        if self.segment is None:
            return "1.00"
        return f"{self.segment / (self.segment + SEGMENT_LOSS):.2f} to 1.00"

    def missing(self, device: str) -> str | None:
        return None if self.segment is None else super().missing(device)

    def measured(self) -> tuple[Timing, str]:
        x = self.random(self.shape[0] * self.shape[1]).view(self.shape)
        y = poisoned(x)
        call = self.call(y, x)
        call()
        assert torch.equal(y, x), "the copy is not what was copied"
        timing = device_time(call, self.device)
        return timing, f"{self.floor / timing.median * 1e-9:.2f} TB/s"

    def call(self, y: Tensor, x: Tensor) -> Callable[[], Any]:
        if self.segment is None:
            return lambda: y.copy_(x)
        from benchmarks.probe_kernels import BLOCK, WARPS, copy_segments_kernel

        (rows, cols), steps = self.shape, SIZES[self.device].steps
        block_c = self.segment // ITEM
        block_r = min(BLOCK // block_c, rows // steps)
        chunks = rows // (steps * block_r)
        grid = (chunks * (cols // block_c),)
        assert grid[0] * steps * block_r * block_c == x.numel(), "each element once"
        return lambda: copy_segments_kernel[grid](
            y, x, cols, chunks, block_r, block_c, steps, self.far, num_warps=WARPS
        )


def segments(device: str) -> list[Probe]:
    row = SIZES[device].cols * ITEM
    shorter = [n for n in SEGMENTS if n < row]
    return [
        Segments(device, None),
        Segments(device, row),
        *(Segments(device, n, far) for n in shorter for far in (False, True)),
    ]
