"""How much of what was just read still comes from L2 when it is read again, and how fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.probe_jobs import ITEM, SIZES, Probe, poisoned
from benchmarks.timing import Timing, device_time, quantiles
from fastnorm.ops import launch

DRAM_TBS, L2_TBS = 3.0, 5.5  # what the model assumes of an H100
SURE, AT_MOST = 20 << 20, 32 << 20  # bytes that stay in L2 between two reads, in the model
FOOTPRINTS = (4, 8, 16, 24, 32, 40, 48)  # units of footprint
POLICIES = ("", "evict_first")
SAMPLES = 15
PROGRAMS = 4  # per multiprocessor: what its registers have room for at once


def warm_time(call: Callable[[], Any], device: str) -> Timing:
    """The time of a call right after calls like it: L2 is NOT flushed, as timing.device_time does,
    for what it keeps is the question. A call repeats its work for long enough that its launch and
    what it finds at first do not matter."""
    if device == "cpu":
        return device_time(call, device, 0.0, 3)
    call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(SAMPLES)]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return quantiles([start.elapsed_time(end) for start, end in pairs])


def said(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


@dataclass(frozen=True)
class Again(Probe):
    """Bytes that are read again while L2 may have them. Timed without a flush of L2."""

    footprint: int  # bytes
    policy: str  # of what is not read again

    family = "l2"

    @property
    def hint(self) -> str:
        return self.policy or "no hint"

    @property
    def moved(self) -> int:
        """Bytes through L2: loads and stores."""
        raise NotImplementedError

    @property
    def predicted(self) -> str:
        if self.floor is None:
            kept, lost, unit = L2_TBS, DRAM_TBS, " TB/s"
        else:  # whichever takes longer, DRAM or L2; what is lost is read from DRAM again
            floor = self.floor / DRAM_TBS
            kept, lost, unit = floor / max(floor, self.moved / L2_TBS), self.floor / self.moved, ""
        if self.footprint <= SURE:
            return f"{kept:.2f}{unit}"
        return (
            f"{lost:.2f}{unit}" if self.footprint > AT_MOST else f"{lost:.2f} to {kept:.2f}{unit}"
        )

    def told(self, timing: Timing) -> str:
        return f"{self.moved / timing.median * 1e-9:.2f} TB/s of loads and stores"


@dataclass(frozen=True)
class Reread(Again):
    """The same bytes again and again, alone or each time with as many written elsewhere."""

    writes: bool

    @property
    def passes(self) -> int:
        return max(2, SIZES[self.device].read // self.footprint)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.passes, self.footprint // ITEM

    @property
    def variant(self) -> str:
        how = f"and as much written, {self.hint}" if self.writes else "alone"
        return f"{said(self.footprint)} read again, {how}"

    @property
    def floor(self) -> int | None:
        return self.footprint * (1 + self.passes) if self.writes else None

    @property
    def moved(self) -> int:
        return self.footprint * self.passes * (2 if self.writes else 1)

    def measured(self) -> tuple[Timing, str]:
        from benchmarks.probe_kernels import BLOCK, WARPS, reread_kernel

        x = self.random(self.footprint // ITEM).view(-1, BLOCK)
        tiles, programs = x.size(0), PROGRAMS * launch.processors(x.get_device())
        y = poisoned(x.expand(self.passes if self.writes else 1, *x.shape).contiguous())
        sums = torch.empty(programs, device=self.device)

        def call() -> None:
            reread_kernel[(programs,)](
                sums, y, x, tiles, self.passes, BLOCK, self.writes, self.policy, num_warps=WARPS
            )

        call()
        assert not self.writes or torch.equal(y, x.expand_as(y)), "what was written is not x"
        exact = x.double().sum() * self.passes
        assert abs(sums.double().sum() - exact) <= 1e-5 * x.double().abs().sum() * self.passes
        timing = warm_time(call, self.device)
        return timing, self.told(timing)


@dataclass(frozen=True)
class Window(Again):
    """A large tensor reduced by tiles, and copied so many bytes behind: the ticket form's
    traffic."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (SIZES[self.device].window // ITEM,)

    @property
    def variant(self) -> str:
        return f"copied {said(self.footprint)} after a first read, {self.hint}"

    @property
    def floor(self) -> int:
        return 2 * SIZES[self.device].window

    @property
    def moved(self) -> int:
        return 3 * SIZES[self.device].window

    def measured(self) -> tuple[Timing, str]:
        from benchmarks.probe_kernels import BLOCK, WARPS, window_kernel

        x = self.random(self.shape[0]).view(-1, BLOCK)
        y, tiles, lag = poisoned(x), x.size(0), self.footprint // (BLOCK * ITEM)
        sums = torch.empty(tiles, device=self.device)

        def call() -> None:
            window_kernel[(tiles + lag,)](
                sums, y, x, tiles, lag, BLOCK, self.policy, num_warps=WARPS
            )

        call()
        assert torch.equal(y, x), "the copy is not what was copied"
        torch.testing.assert_close(sums, x.sum(1, dtype=torch.float32), rtol=1e-4, atol=1e-2)
        timing = warm_time(call, self.device)
        return timing, self.told(timing)


def l2(device: str) -> list[Probe]:
    sizes = [n * SIZES[device].unit for n in FOOTPRINTS]
    return [
        *(Reread(device, size, "", False) for size in sizes),
        *(Reread(device, size, policy, True) for policy in POLICIES for size in sizes),
        *(Window(device, size, policy) for policy in POLICIES for size in sizes),
    ]
