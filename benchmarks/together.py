"""Problems whose blocks work together, with few elements: several blocks share a group of channels,
a row or a norm, and a block has several batches of it.

Of a handful of elements every block has all it needs, and no tool sees what blocks leave for each
other; benchmarks/small.py runs these as well. tests/test_small.py holds them to it.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.candidates import Changes, Knob, knobs
from benchmarks.problems import Problem

Together = tuple[Problem, tuple[Knob, ...], Changes]

# batches of a tile in each form: the last tile of a group is not full, and of what is streamed
# some is not held
BATCHES = {"owner": -1, "hold": 2, "ticket": 3, "stream": 16}
PLANES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("nchw", (3, 3, 220, 221)),
    ("nchw", (2400, 3, 7, 7)),
    ("nhwc", (3, 72, 29, 31)),
    ("nlc", (3, 72, 810)),
    ("rows", (2403, 72)),
)
# rows visited twice by tickets, not by blocks that keep their chunks; and two phases that follow
# each other, as where L2 has no room for a row (forward) or a group of rows
_LIMITS = "fastnorm.ops.layer_norm.cuda"
_TICKETS = Knob("LIMITS.stream_chunk", _LIMITS, (0,))
_IN_TURNS = (
    _TICKETS,
    Knob("LIMITS.group_bytes", _LIMITS, (1,)),
    Knob("LIMITS.row_bytes", _LIMITS, (1,)),
)
ROWS: tuple[tuple[str, tuple[int, ...], str, str], ...] = (
    ("plain", (5, 20011), "rows", "bfloat16"),
    ("residual", (5, 24576), "rows", "float32"),
    ("last3", (3, 8, 64, 64), "rows", "float32"),
    ("plain", (56, 20000), "rows", "bfloat16"),  # several rows of a tile
    ("plain", (700, 768), "rows", "bfloat16"),  # rows in registers; sums over the rows
    ("plain", (6, 24, 20, 96), "nchw", "bfloat16"),
)
WEIGHTS: tuple[tuple[str, tuple[int, ...], str], ...] = (
    ("dim0", (3, 40000), "float32"),
    ("dim0", (2, 30001), "bfloat16"),
    ("dim1", (600, 40, 16), "float32"),
    ("dim1", (40, 3, 5000), "float32"),
    ("dim2", (96, 24, 64), "float32"),
    ("hifigan", (1,), "float32"),  # many layers in one launch, of their own shapes
)
SWISH = Problem("activation", "swish", (200_003,), "flat", "bfloat16")


def _in_form(problem: Problem, form: str) -> Together:
    """On batch norm's CUDA kernels."""
    turned = knobs(problem, "cuda")
    (position,) = (i for i, name in turned[0].words if name == form)
    return problem, turned, (("FORM", position), ("BATCHES", BATCHES[form]))


def on_cuda() -> Iterator[Together]:
    for layout, shape in PLANES:
        for variant, dtype in (("plain", "float32"), ("residual+silu", "bfloat16")):
            problem = Problem("batch_norm", variant, shape, layout, dtype)
            yield from (_in_form(problem, form) for form in BATCHES)
    for layout, shape in (PLANES[0], PLANES[2]):
        problem = Problem("mean_only_batch_norm", "plain", shape, layout, "float32")
        yield from (_in_form(problem, form) for form in BATCHES)
    for variant, shape, layout, dtype in ROWS:
        problem = Problem("layer_norm", variant, shape, layout, dtype)
        yield problem, (), ()
        if shape == (56, 20000):
            yield problem, (_TICKETS,), ((_TICKETS.name, 0),)
            yield problem, _IN_TURNS, tuple((knob.name, knob.values[0]) for knob in _IN_TURNS)
    yield SWISH, (), ()
    for variant, shape, dtype in WEIGHTS:
        yield Problem("weight_norm", variant, shape, "flat", dtype), (), ()


def on_triton() -> Iterator[Together]:
    """One of each kernel that shares: each is compiled in the process that is looked at."""
    for problem in (
        Problem("batch_norm", "plain", (3, 3, 150, 152), "nchw", "float32"),
        Problem("batch_norm", "residual+silu", (3, 72, 20, 21), "nhwc", "bfloat16"),
        Problem("batch_norm", "plain", (3, 72, 410), "nlc", "bfloat16"),
    ):
        turned = knobs(problem, "triton")
        yield problem, turned, (("OWNER_TILES", 0),)
    yield Problem("layer_norm", "plain", (3, 70000), "rows", "bfloat16"), (), ()
    yield Problem("layer_norm", "plain", (700, 768), "rows", "bfloat16"), (), ()
    yield Problem("weight_norm", "dim0", (3, 50000), "flat", "float32"), (), ()
    yield Problem("weight_norm", "dim2", (96, 24, 64), "flat", "float32"), (), ()
    yield SWISH, (), ()


def together(backend: str) -> list[Together]:
    """Those of a backend that has kernels of ours."""
    makers = {"cuda": on_cuda, "triton": on_triton}
    return list(makers[backend]()) if backend in makers else []
