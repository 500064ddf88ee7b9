"""The suites: which problems, in which order. No shape is here because it suits us: they are what
people run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

from benchmarks.activations import EPILOGUES
from benchmarks.ops import FP32_WEIGHTS, FROZEN, HIFIGAN
from benchmarks.problems import GRAPH, HOST, STEP, STEPS, TRAINING, Problem

CPU_NUMEL = 1 << 24  # the largest tensor that a suite asks of a CPU

# channels and sides of the batch norms of the models, at the resolution they are trained at
RESNET50 = (
    (64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7),
    (2048, 7),
)  # fmt: skip
EFFICIENTNET_B0 = (
    (32, 112), (96, 112), (144, 56), (240, 28), (480, 14), (672, 14), (1152, 7), (1280, 7),
)  # fmt: skip
EFFICIENTNET_B4 = (
    (48, 190), (144, 190), (192, 95), (336, 48), (672, 24), (960, 24), (1632, 12), (1792, 12),
)  # fmt: skip
MOBILENET_V2 = (
    (32, 112), (96, 112), (144, 56), (192, 28), (384, 14), (576, 14), (960, 7), (1280, 7),
)  # fmt: skip


def _batch_norms() -> Iterator[Problem]:
    def image(
        importance: int, variant: str, N: int, C: int, side: int, layout: str, dtype: str
    ) -> Problem:
        shape = (N, C, side, side)
        return Problem("batch_norm", variant, shape, layout, dtype, TRAINING, importance)

    leading = {(64, 112), (256, 56), (1024, 14), (2048, 7)}
    for C, side in RESNET50:
        first = (C, side) in leading
        for layout in ("nchw", "nhwc"):
            yield image(0 if first else 2, "plain", 256, C, side, layout, "bfloat16")
            yield image(1 if first else 3, "relu", 256, C, side, layout, "bfloat16")
            yield image(1 if first else 3, "plain", 32, C, side, layout, "bfloat16")
            yield image(2 if first else 4, "plain", 256, C, side, layout, "float16")
            yield image(3 if first else 5, "plain", 64, C, side, layout, "bfloat16")
            yield image(3 if first else 5, "plain", 64, C, side, layout, "float32")
            yield image(2 if first else 4, "silu", 256, C, side, layout, "bfloat16")
            if (C, side) in ((256, 56), (512, 28), (1024, 14), (2048, 7)):  # ends of a block
                wanted = 0 if (C, side) == (256, 56) else 2
                yield image(wanted, "residual+relu", 256, C, side, layout, "bfloat16")
    for C, side in EFFICIENTNET_B0:
        for layout in ("nchw", "nhwc"):
            first = (C, side) == (96, 112)
            yield image(0 if first else 3, "silu", 128, C, side, layout, "bfloat16")
    for C, side in EFFICIENTNET_B4:
        yield image(4, "silu", 32, C, side, "nhwc", "bfloat16")
    for C, side in MOBILENET_V2:
        yield image(4, "relu6", 128, C, side, "nhwc", "bfloat16")
    unet = (2, 32, 128, 128, 128)
    yield Problem("batch_norm", "relu", unet, "nchw", "bfloat16", TRAINING, 1)
    yield Problem("batch_norm", "relu", unet, "nhwc", "bfloat16", TRAINING, 3)
    yield Problem("batch_norm", "plain", unet, "nchw", "float32", TRAINING, 4)
    for C in (64, 128, 1024):  # PointNet: N clouds of 2048 points
        yield Problem("batch_norm", "relu", (32, C, 2048), "nlc", "bfloat16", TRAINING, 3)
    for C in (64, 256, 1024, 4096):
        wanted = 1 if C == 1024 else 3
        yield Problem("batch_norm", "plain", (8192, C), "rows", "bfloat16", TRAINING, wanted)
    for dtype in ("float32", "float16"):  # what is fused, in the types of fewer people
        for variant in ("relu", "silu", "residual+relu"):
            yield image(3, variant, 64, 256, 56, "nchw", dtype)
        yield image(4, "relu6", 128, 144, 56, "nhwc", dtype)


def _mean_only_batch_norms() -> Iterator[Problem]:
    def image(N: int, C: int, side: int, layout: str, dtype: str) -> Problem:
        shape = (N, C, side, side)
        return Problem("mean_only_batch_norm", "plain", shape, layout, dtype, TRAINING, 3)

    yield image(256, 64, 112, "nchw", "bfloat16")
    for layout in ("nchw", "nhwc"):
        yield image(256, 256, 56, layout, "bfloat16")
        yield image(64, 256, 56, layout, "float32")


def _layer_norms() -> Iterator[Problem]:
    def rows(
        importance: int, M: int, N: int, dtype: str = "bfloat16", variant: str = "plain"
    ) -> Problem:
        return Problem("layer_norm", variant, (M, N), "rows", dtype, TRAINING, importance)

    for N in (1024, 2048, 4096, 8192, 12288, 15872):
        yield rows(1 if N in (1024, 8192) else 3, 4096, N)
        yield rows(3 if N in (1024, 8192) else 5, 4096, N, "float16")
    for N in (256, 1024, 4096, 8192, 32768, 65536):
        yield rows(0 if N in (1024, 4096, 32768) else 1, 32768, N)
        if N <= 8192:
            yield rows(4, 32768, N, "float32")
    yield rows(1, 1 << 20, 128)  # Swin's first stage
    yield rows(0, 64 * 197, 768)  # ViT-B
    yield rows(3, 64 * 197, 768, "float32")
    yield rows(1, 64 * 197, 768, variant="residual")
    yield rows(2, 32768, 4096, variant="residual")
    for dtype in ("float32", "float16"):
        yield rows(3, 32768, 4096, dtype, "residual")
    for variant in ("gelu", "silu"):
        yield rows(3, 32768, 4096, variant=variant)
    yield rows(2, 131072, 256)  # 67 MB of the shortest rows of which a floor is asked
    for M, N in ((64, 4096), (16, 32768), (100, 768)):  # fewer rows than an H100 has processors
        yield rows(2, M, N)
    for N in (1024, 4096):
        yield rows(2, 32768, N, variant=FP32_WEIGHTS)
        yield rows(2, 32768, N, variant=FROZEN)
    yield rows(1, 32768, 769)
    yield rows(3, 32768, 1000)
    yield rows(2, 16384, 4095)
    image = (64, 56, 56, 96)  # ConvNeXt-T: an image seen channels last
    yield Problem("layer_norm", "plain", image, "nchw", "bfloat16", TRAINING, 1)


def _weight_norms() -> Iterator[Problem]:
    def weight(
        importance: int, variant: str, shape: tuple[int, ...], dtype: str = "float32"
    ) -> Problem:
        return Problem("weight_norm", variant, shape, "flat", dtype, TRAINING, importance)

    def waited_for(problem: Problem) -> Problem:  # as a vocoder does, host and all
        return replace(problem, modes=(*TRAINING, STEP, GRAPH))

    generator = (sum(math.prod(v) for v in HIFIGAN),)
    yield waited_for(weight(0, "hifigan", generator))
    yield waited_for(weight(1, "hifigan", generator, "bfloat16"))
    positional = (768, 48, 128)  # wav2vec2's convolution
    yield waited_for(weight(1, "dim2", positional))
    yield waited_for(weight(2, "dim2", positional, "bfloat16"))
    for shape in dict.fromkeys(HIFIGAN):
        yield replace(weight(2 if shape[0] == 512 else 4, "dim0", shape), modes=(*TRAINING, STEP))
        yield weight(5, "dim0", shape, "bfloat16")
    for N in (1024, 4096, 8192):
        yield weight(1 if N == 4096 else 3, "dim0", (N, N))
        yield weight(2 if N == 4096 else 4, "dim0", (N, N), "bfloat16")
    yield weight(3, "dim1", (512, 256, 16))  # a transposed convolution, by output channel


def _activations() -> Iterator[Problem]:
    def wanted(name: str, exponent: int) -> int:
        if exponent == 26:
            return 0 if name in ("gelu", "silu") else 1
        if exponent == 20 and name in ("gelu", "silu"):
            return 1
        return 5 if name in ("gelu_tanh", "gelu_sigmoid") else 3

    for exponent in (16, 18, 20, 22, 24, 26, 28):
        for name in ("gelu", "silu", "selu", "swish", "gelu_tanh", "gelu_sigmoid"):
            shape = (1 << exponent,)
            yield Problem(
                "activation", name, shape, "flat", "bfloat16", TRAINING, wanted(name, exponent)
            )
        yield Problem("activation", "silu", (1 << exponent,), "flat", "float32", TRAINING, 4)
    yield Problem("activation", "gelu_tanh", (8192, 8192), "flat", "bfloat16", TRAINING, 1)
    for layout, importance in (("nchw", 2), ("nhwc", 3)):  # a beta for each of the channels
        image = (64, 256, 56, 56)
        yield Problem(
            "activation", "swish_channels", image, layout, "bfloat16", TRAINING, importance
        )


def _small() -> Iterator[Problem]:
    """Under 1 MB, where launches are what takes the time."""

    def of(
        importance: int, op: str, variant: str, shape: tuple[int, ...], layout: str, dtype: str
    ) -> Problem:
        return Problem(op, variant, shape, layout, dtype, TRAINING, importance)

    for shape in ((32, 64, 7, 7), (32, 64, 14, 14), (16, 256, 7, 7)):
        first = shape == (32, 64, 7, 7)
        yield of(1 if first else 2, "batch_norm", "plain", shape, "nchw", "bfloat16")
        yield of(2 if first else 3, "batch_norm", "silu", shape, "nchw", "bfloat16")
        yield of(2 if first else 3, "batch_norm", "plain", shape, "nhwc", "bfloat16")
    yield of(2, "batch_norm", "plain", (32, 64, 7, 7), "nchw", "float32")
    yield of(2, "batch_norm", "plain", (128, 64), "rows", "bfloat16")
    for exponent in (10, 12, 14, 16):
        N = 256 if exponent < 14 else 1024
        wanted = 2 if exponent in (10, 16) else 3
        yield of(wanted, "layer_norm", "plain", ((1 << exponent) // N, N), "rows", "bfloat16")
        if exponent < 16:  # from there on they are among the others
            for name in ("gelu", "silu", "selu", "swish"):
                yield of(3, "activation", name, (1 << exponent,), "flat", "bfloat16")


def ops() -> Iterator[Problem]:
    """Every op on the shapes of the models that use it."""
    yield from _batch_norms()
    yield from _mean_only_batch_norms()
    yield from _layer_norms()
    yield from _weight_norms()
    yield from _activations()
    yield from _small()


def quick_gpu() -> Iterator[Problem]:
    """What `ops` measures first."""
    yield from (problem for problem in ops() if problem.importance == 0)


def quick_cpu() -> Iterator[Problem]:
    """One problem of each op, of a size that a laptop runs in milliseconds."""
    image = (8, 64, 56, 56)
    yield Problem("batch_norm", "silu", image, "nchw", "float32", TRAINING, 0)
    yield Problem("layer_norm", "plain", (4096, 768), "rows", "float32", TRAINING, 0)
    yield Problem("activation", "gelu", (1 << 20,), "flat", "float32", TRAINING, 0)
    yield Problem("batch_norm", "residual+relu", image, "nhwc", "float32", TRAINING, 1)
    yield Problem("batch_norm", "plain", image, "nchw", "bfloat16", TRAINING, 1)
    yield Problem("layer_norm", "residual", (4096, 768), "rows", "bfloat16", TRAINING, 1)
    yield Problem("activation", "silu", (1 << 20,), "flat", "bfloat16", TRAINING, 1)
    yield Problem("weight_norm", "dim0", (1024, 1024), "flat", "float32", TRAINING, 1)
    yield from (_of_size(*layer, 1 << 12, "float32", HOST, 2) for layer in RULED)


# every layer, as host time and device time stand side by side
LAYERS = (
    *(("batch_norm", name) for name in ("plain", "relu", "silu")),
    ("mean_only_batch_norm", "plain"), ("layer_norm", "plain"), ("weight_norm", "dim0"),
    *(("activation", n) for n in ("gelu", "gelu_tanh", "gelu_sigmoid", "silu", "selu", "swish")),
)  # fmt: skip


def _of_size(
    op: str, variant: str, numel: int, dtype: str, modes: tuple[str, ...], importance: float
) -> Problem:
    """A layer's problem of so many elements, which are a power of two."""
    layouts = {"layer_norm": "rows", "weight_norm": "flat", "activation": "flat"}
    shape: tuple[int, ...] = (numel,)
    if op in ("batch_norm", "mean_only_batch_norm"):
        shape = (numel // 1024 or 1, min(64, numel // 16), 4, 4)
    elif op == "layer_norm":
        shape = (numel // 256, 256)
    elif op == "weight_norm":
        side = 1 << (numel.bit_length() - 1) // 2
        shape = (side, numel // side)
    return Problem(op, variant, shape, layouts.get(op, "nchw"), dtype, modes, importance)


def host() -> Iterator[Problem]:
    """The time of a layer's call alone, forward with gradient and backward, and the device's time
    for the same: on a size that our kernels serve, which is too small to hide the call, and of some
    on one below and one above."""
    for op, variant in LAYERS:
        first = (op, variant) in (("batch_norm", "plain"), ("layer_norm", "plain"))
        # of two layers before the first models, of the others after them
        yield _of_size(op, variant, 1 << 16, "float32", HOST, 0.5 if first else 0.9)
        yield _of_size(op, variant, 1 << 16, "float32", TRAINING, 1.1)
        if variant in ("plain", "dim0", "silu"):
            for exponent in (12, 20):
                yield _of_size(op, variant, 1 << exponent, "float32", HOST, 1.5)


RULED = (
    *(("batch_norm", name) for name in ("plain", "silu")), ("layer_norm", "plain"),
    ("weight_norm", "dim0"), *(("activation", name) for name in ("gelu", "silu")),
)  # fmt: skip


def rule() -> Iterator[Problem]:
    """What decides from which size on a kernel of ours is called (benchmarks/rule.py): wall clock
    of forward and backward, many in a row."""
    for exponent in range(10, 21, 2):
        for op, variant in RULED:
            first = variant in ("plain", "dim0", "gelu")
            dtype = "float32" if op == "weight_norm" else "bfloat16"
            yield _of_size(op, variant, 1 << exponent, dtype, (STEPS,), 0.92 if first else 1.2)


def epilogues(batch: int = 64, M: int = 32768) -> Iterator[Problem]:
    """Every activation that folds into a norm, beside the norm without one, where memory is what
    takes the time."""
    image, rows = (batch, 256, 56, 56), (M, 1024)
    for name in ("plain", *EPILOGUES):
        first = name in ("plain", "relu", "silu", "gelu")
        importance = 1.3 if first else 2.5
        yield Problem("batch_norm", name, image, "nchw", "bfloat16", TRAINING, importance)
        yield Problem("layer_norm", name, rows, "rows", "bfloat16", TRAINING, importance)


# op, variant, the problem's own shape, what a CPU gets in its place, layout
KERNELBENCH = (
    ("batch_norm", "plain", (64, 64, 512, 512), (8, 64, 64, 64), "nchw"),  # 33
    ("layer_norm", "last3", (16, 64, 256, 256), (16, 64, 32, 32), "rows"),  # 40
    ("activation", "kernelbench_88", (8192, 8192), (1024, 1024), "flat"),
    ("activation", "kernelbench_25", (4096, 393216), (64, 16384), "flat"),
    ("activation", "gelu", (4096, 393216), (64, 16384), "flat"),  # 26
    ("activation", "selu", (4096, 393216), (64, 16384), "flat"),  # 27
)


def kernelbench() -> Iterator[Problem]:
    """KernelBench level 1, at its own sizes, fp32, before anybody compiles (jobs.py): forward, as
    it is scored, and backward."""
    for op, variant, shape, _, layout in KERNELBENCH:
        yield Problem(op, variant, shape, layout, "float32", TRAINING, 0.9)


def kernelbench_cpu() -> Iterator[Problem]:
    """The same problems, cut down."""
    for problem, (_, _, _, shape, _) in zip(kernelbench(), KERNELBENCH, strict=True):
        yield replace(problem, shape=shape)


SUITES: dict[str, Callable[[], Iterable[Problem]]] = {
    "quick": quick_gpu,
    "ops": ops,
    "kernelbench": kernelbench,
    "host": host,
    "rule": rule,
    "epilogues": epilogues,
}
CPU_SUITES: dict[str, Callable[[], Iterable[Problem]]] = {
    **SUITES,
    "quick": quick_cpu,
    "kernelbench": kernelbench_cpu,
    "epilogues": partial(epilogues, 4, 1024),
}
MODELS = "models"  # its problems are whole models: see benchmarks/models.py
NAMES = ("quick", "ops", MODELS, "kernelbench", "host", "rule", "epilogues")


def problems(names: Iterable[str], device: str) -> list[Problem]:
    """The problems of these suites (models left out), each once, the important ones first."""
    found: dict[Problem, Problem] = {}
    for name in names:
        if name == MODELS:
            continue
        for problem in (CPU_SUITES if device == "cpu" else SUITES)[name]():
            if device == "cpu":  # it has no graphs
                problem = replace(problem, modes=tuple(m for m in problem.modes if m != GRAPH))
            same = replace(problem, importance=0)
            if device == "cpu" and problem.numel > CPU_NUMEL:
                continue
            if same not in found or problem.importance < found[same].importance:
                found[same] = problem
    return sorted(found.values(), key=lambda problem: problem.importance)
