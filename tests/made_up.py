"""Results that nobody measured, for the tests of the report: the shapes and providers of a real
run, times from a formula and a seeded generator. They are never committed as results."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from benchmarks import suites
from benchmarks.activations import RARE
from benchmarks.problems import HOST, WALL
from benchmarks.report.lines import Run, runs
from benchmarks.schema import Environment, Results, Row

GPU = Environment(
    device="Made-up H100",
    driver="580.00",
    cuda="13.0",
    torch="2.11.0+cu130",
    triton="3.6.0",
    python="3.12.3",
    fastnorm="0.1.0",
    commit="0123456789abcdef0123456789abcdef01234567",
    dirty=False,
    timestamp="2026-01-02T03:04:05Z",
    copy_bandwidth_gbs=3000.0,
    peers={"liger-kernel": "0.8.5", "quack-kernels": "0.6.0", "flag_gems": "5.0"},
)
CPU = Environment(
    device="Made-up processor",
    driver="none",
    cuda="none",
    torch="2.13.0+cpu",
    triton="3.9.0",
    python="3.11.2",
    fastnorm="0.1.0",
    commit="0123456789abcdef0123456789abcdef01234567",
    dirty=True,
    timestamp="2026-01-02T03:04:05Z",
    copy_bandwidth_gbs=12.3,
)
# of the copy bandwidth, by provider; a peer serves the ops named with it
SPEED = {
    "torch": 0.42,
    "torch.compile": 0.66,
    "fastnorm": 0.88,
    "fastnorm-triton": 0.84,
    "fastnorm-cuda": 0.88,
    "liger-kernel": 0.72,
    "quack-kernels": 0.86,
    "flag_gems": 0.6,
    "inplace-abn": 0.55,
    "apex": 0.58,
    "attorch": 0.63,
}
PEERS = {
    "liger-kernel": ("layer_norm", "activation"),
    "quack-kernels": ("layer_norm",),
    "flag_gems": ("batch_norm", "layer_norm", "weight_norm", "activation"),
    "inplace-abn": ("batch_norm",),
    "apex": ("layer_norm",),
    "attorch": ("batch_norm", "layer_norm", "activation"),
}


def _timed(row: Row, milliseconds: float, noise: float) -> Row:
    row.ms_median = milliseconds
    row.ms_p20, row.ms_p80 = milliseconds * (1 - noise), milliseconds * (1 + noise)
    return row


def device_rows(seed: int = 0) -> Iterator[Row]:
    """And those of wall clocks."""
    chance = random.Random(seed)
    for problem in suites.problems(("ops", "host", "rule", "epilogues"), "cuda"):
        op, variant, layout, dtype = problem.op, problem.variant, problem.layout, problem.dtype
        for mode in sorted(set(problem.modes).difference(HOST)):
            tensors = 2 if mode == "forward" else 3
            size = tensors * problem.numel * problem.itemsize
            copy = 0.002 + 1e3 * size / 3.0e12
            luck = chance.uniform(0.8, 1.1)  # of the shape, for all who run on it
            for provider, speed in SPEED.items():
                rare = "norm" in op and variant in RARE and "fastnorm" not in provider
                if op not in PEERS.get(provider, (op,)) or rare:
                    continue
                row = Row(op, variant, mode, list(problem.shape), layout, dtype, provider)
                if provider == "inplace-abn":
                    row.ok, row.note = False, "not installed"
                elif provider == "flag_gems" and variant == "silu":
                    row.ok, row.note, row.error = False, "wrong result: error 0.31", 0.31
                else:
                    launches = 0.012 if provider == "torch" else 0.004
                    share = min(speed * luck * chance.uniform(0.85, 1.12), 1.0)
                    _timed(row, launches + copy / share, chance.uniform(0.002, 0.02))
                    if mode not in WALL:
                        row.floor_bytes, row.floor_fraction = size, copy / (row.ms_median or 1)
                    row.error, row.torch_error = 1.1e-3, 1.2e-3
                    # torch saves one tensor more where an activation follows
                    kept = provider == "torch" and variant not in ("plain", "residual")
                    row.peak_memory_mib = size / 2**20 * (tensors + kept) / tensors
                yield row


def host_rows(seed: int = 0) -> Iterator[Row]:
    chance = random.Random(seed)
    for one in suites.problems(("host",), "cuda"):
        for provider, speed in SPEED.items():
            if one.op in PEERS.get(provider, (one.op,)) and provider != "inplace-abn":
                for mode in sorted(set(one.modes).intersection(HOST)):
                    shape = list(one.shape)
                    row = Row(one.op, one.variant, mode, shape, one.layout, one.dtype, provider)
                    yield _timed(row, 0.006 / speed * chance.uniform(0.7, 1.3), 0.05)


def model_rows(seed: int = 0) -> Iterator[Row]:
    chance = random.Random(seed)
    for name, shape, dtype, base in (
        ("resnet50", [128, 3, 224, 224], "bfloat16", 92.0),
        ("efficientnet_b0", [128, 3, 224, 224], "bfloat16", 61.0),
        ("convnext_tiny", [128, 3, 224, 224], "bfloat16", 120.0),
        ("vit_b_16", [64, 3, 224, 224], "bfloat16", 70.0),
        ("bert_base", [32, 512], "bfloat16", 88.0),
        ("hifigan_v1", [16, 80, 32], "float32", 47.0),
    ):
        for provider, speed, memory in (
            ("torch", 1.0, 1.0),
            ("torch.compile", 1.2, 0.8),
            ("fastnorm-replaced", 1.1, 0.85),
            ("fastnorm", 1.3, 0.7),
            ("fastnorm-replaced-compiled", 1.25, 0.75),
            ("fastnorm-compiled", 1.4, 0.68),
        ):
            row = Row("model", name, "step", shape, "nchw", dtype, provider)
            _timed(row, base / speed * chance.uniform(0.85, 1.15), 0.01)
            row.samples_per_second = 1e3 * shape[0] / (row.ms_median or 1)
            row.peak_memory_mib = 130 * base * memory
            yield row


def gpu_results(seed: int = 0) -> Results:
    return Results(GPU, [*device_rows(seed), *host_rows(seed), *model_rows(seed)])


def cpu_results() -> Results:
    """Few shapes, three providers: what a CPU has time for."""
    rows = []
    for row in [*device_rows(1), *host_rows(1)]:
        if row.provider in ("torch", "torch.compile", "fastnorm") and (
            row.mode == "host" or (row.dtype == "float32" and math.prod(row.shape) < 2**22)
        ):
            rows.append(row)
    return Results(CPU, rows)


LINES = {"won": [2, 3, 4, 4], "tied": [4, 3, 4, 4], "lost": [8, 3, 4, 4], "failed": [16, 3, 4, 4]}


def small_row(which: str, provider: str, median: float | None, spread: float = 0.01) -> Row:
    """A row of that line; without a median it failed."""
    found = Row("batch_norm", "plain", "forward", LINES[which], "nchw", "float32", provider)
    if median is None:
        found.ok, found.note = False, "RuntimeError: out of luck"
        return found
    found.ms_median = median
    found.ms_p20, found.ms_p80 = median * (1 - spread), median * (1 + spread)
    found.floor_bytes, found.floor_fraction = 8 * 16 * 3 * LINES[which][0], 0.5 / median
    return found


def _small_rows() -> list[Row]:
    host = Row("batch_norm", "plain", "host", [2, 3, 4, 4], "nchw", "float32", "torch", 0.0075)
    return [
        small_row("won", "torch", 2.0),
        small_row("won", "torch.compile", 1.0),
        small_row("won", "fastnorm", 0.5),
        small_row("tied", "torch", 1.0, 0.1),
        small_row("tied", "fastnorm", 1.05, 0.1),
        small_row("lost", "torch", 1.0),
        small_row("lost", "torch.compile", None),
        small_row("lost", "fastnorm", 2.0),
        small_row("failed", "torch", 1.0),
        small_row("failed", "fastnorm", None),
        host,
    ]


def small_results(environment: Environment = GPU) -> Results:
    """Five lines whose tables can be counted by hand."""
    return Results(environment, _small_rows())


def run_of(results: Results) -> Run:
    """The one run of these results."""
    (run,) = runs([results])
    return run
