"""Results that nobody measured, for the tests of the report: the shapes and providers of a real
run, times from a formula and a seeded generator. They are never committed as results."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

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
}
PEERS = {
    "liger-kernel": ("layer_norm", "activation"),
    "quack-kernels": ("layer_norm",),
    "flag_gems": ("batch_norm", "layer_norm", "weight_norm", "activation"),
    "inplace-abn": ("batch_norm",),
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PLANES = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7))


def _ops() -> Iterator[tuple[str, str, list[int], str, str]]:
    """Op, variant, shape, layout and dtype."""
    for layout, dtype in (("nchw", "bfloat16"), ("nhwc", "bfloat16"), ("nchw", "float32")):
        for variant in ("plain", "relu", "silu", "residual+relu"):
            for batch in (32, 256) if layout == "nchw" else (64,):
                for C, side in (*PLANES, (2048, 7)):
                    yield "batch_norm", variant, [batch, C, side, side], layout, dtype
    for rows, columns in ((4096, 1024), (4096, 8192), (4096, 15872), (50432, 769)):
        yield "layer_norm", "plain", [rows, columns], "rows", "bfloat16"
    for columns in (256, 1000, 1024, 4095, 4096, 8192, 32768, 65536):
        yield "layer_norm", "plain", [32768, columns], "rows", "bfloat16"
        yield "layer_norm", "residual", [32768, columns], "rows", "bfloat16"
    for features in (1024, 4096, 8192):
        yield "weight_norm", "linear", [features, features], "rows", "float32"
    yield "weight_norm", "dim=2", [512, 512, 128], "rows", "float32"
    for variant in ("gelu", "silu", "selu"):
        for power in range(16, 29, 2):
            yield "activation", variant, [2**power], "flat", "bfloat16"
        yield "activation", variant, [8192, 8192], "flat", "float32"


def _timed(row: Row, milliseconds: float, noise: float) -> Row:
    row.ms_median = milliseconds
    row.ms_p20, row.ms_p80 = milliseconds * (1 - noise), milliseconds * (1 + noise)
    return row


def device_rows(seed: int = 0) -> Iterator[Row]:
    chance = random.Random(seed)
    for op, variant, shape, layout, dtype in _ops():
        for mode, moves in (("forward", 2), ("backward", 3)):
            size = moves * math.prod(shape) * BYTES[dtype]
            copy = 0.002 + 1e3 * size / 3.0e12
            luck = chance.uniform(0.8, 1.1)  # of the shape, for all who run on it
            for provider, speed in SPEED.items():
                if op not in PEERS.get(provider, (op,)):
                    continue
                row = Row(op, variant, mode, shape, layout, dtype, provider)
                if provider == "inplace-abn":
                    row.ok, row.note = False, "not installed"
                elif provider == "flag_gems" and variant == "silu":
                    row.ok, row.note, row.error = False, "wrong result: error 0.31", 0.31
                else:
                    launches = 0.012 if provider == "torch" else 0.004
                    share = min(speed * luck * chance.uniform(0.85, 1.12), 1.0)
                    _timed(row, launches + copy / share, chance.uniform(0.002, 0.02))
                    row.floor_bytes, row.floor_fraction = size, copy / (row.ms_median or 1)
                    row.error, row.torch_error = 1.1e-3, 1.2e-3
                    row.peak_memory_mib = size / 2**20
                yield row


def host_rows(seed: int = 0) -> Iterator[Row]:
    chance = random.Random(seed)
    for op, layout, shape in (
        ("batch_norm", "nchw", [2, 8, 4, 4]),
        ("layer_norm", "rows", [8, 64]),
        ("weight_norm", "rows", [8, 64]),
        ("activation", "flat", [1024]),
    ):
        for variant in ("forward", "forward with gradient"):
            for provider, speed in SPEED.items():
                if op in PEERS.get(provider, (op,)) and provider != "inplace-abn":
                    row = Row(op, variant, "host", shape, layout, "float32", provider)
                    yield _timed(row, 0.006 / speed * chance.uniform(0.7, 1.3), 0.05)


def model_rows(seed: int = 0) -> Iterator[Row]:
    chance = random.Random(seed)
    for name, shape, dtype, base in (
        ("ResNet-50", [128, 3, 224, 224], "bfloat16", 92.0),
        ("EfficientNet-B0", [128, 3, 224, 224], "bfloat16", 61.0),
        ("ConvNeXt-T", [128, 3, 224, 224], "bfloat16", 120.0),
        ("ViT-B/16", [64, 3, 224, 224], "bfloat16", 70.0),
        ("BERT-base", [32, 512], "bfloat16", 88.0),
        ("HiFi-GAN generator", [16, 80, 32], "float32", 47.0),
    ):
        for provider, speed, memory in (
            ("torch", 1.0, 1.0),
            ("torch.compile", 1.2, 0.8),
            ("fastnorm", 1.3, 0.7),
        ):
            row = Row("model", name, "step", shape, "nchw", dtype, provider)
            _timed(row, base / speed * chance.uniform(0.85, 1.15), 0.01)
            row.samples_per_second = 1e3 * shape[0] / (row.ms_median or 1)
            row.peak_memory_mib = 130 * base * memory
            yield row


def gpu_results(seed: int = 0) -> Results:
    return Results(GPU, [*device_rows(seed), *host_rows(seed), *model_rows(seed)])


def cpu_results() -> Results:
    """What `run --suite quick` has on a CPU: few shapes, three providers."""
    rows = []
    for row in [*device_rows(1), *host_rows(1)]:
        if row.provider in ("torch", "torch.compile", "fastnorm") and (
            row.mode == "host" or (row.dtype == "float32" and math.prod(row.shape) < 2**22)
        ):
            rows.append(row)
    return Results(CPU, rows)
