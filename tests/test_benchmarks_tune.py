"""`python -m benchmarks tune`: what it turns, and that it puts everything back."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fastnorm
from benchmarks import schema, suites, tune, two_launches
from benchmarks.__main__ import main, parser
from benchmarks.candidates import KNOBS, OPTIONS, Knob, applied, candidates, knobs, label
from benchmarks.measure import Bench
from benchmarks.ops import OPS
from benchmarks.problems import Problem
from benchmarks.tune import Candidate
from fastnorm.ops.batch_norm import plan
from fastnorm.ops.extension import extension
from tests.conftest import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the kernels are Triton's")
TILES = Knob("TILE_BYTES", "fastnorm.ops.batch_norm.plan", (8192, 16384, 32768))
OWNER = Knob("OWNER_TILES", "fastnorm.ops.batch_norm.plan", (0, 4))
GONE = Knob("GONE", "fastnorm.ops.batch_norm.plan", (1, 2))


def test_the_default_comes_first_then_one_change_then_two() -> None:
    assert candidates([TILES, OWNER], "forward") == [
        (),
        (("OWNER_TILES", 0),),
        (("TILE_BYTES", 8192),),
        (("TILE_BYTES", 32768),),
        (("TILE_BYTES", 8192), ("OWNER_TILES", 0)),
        (("TILE_BYTES", 32768), ("OWNER_TILES", 0)),
    ]


def test_a_knob_that_is_not_there_stays_as_it_is() -> None:
    assert GONE.obstacle() == (
        "this version has no such constant "
        "(module 'fastnorm.ops.batch_norm.plan' has no attribute 'GONE')"
    )
    assert candidates([GONE], "forward") == [()]


def test_a_knob_of_the_other_direction_is_not_turned() -> None:
    backward = Knob("TILE_BYTES", TILES.module, TILES.values, ("backward",))
    assert candidates([backward], "forward") == [()]


def test_constants_are_changed_and_put_back() -> None:
    x = torch.randn(64, 8, 32, 32)
    before = plan.plan(x, x, operands=1)
    with applied([TILES], (("TILE_BYTES", 8192),)):
        assert plan.TILE_BYTES == 8192
        changed = plan.plan(x, x, operands=1)
    assert changed.constants["BLOCK_V"] < before.constants["BLOCK_V"]
    assert plan.TILE_BYTES == 16384
    assert plan.plan(x, x, operands=1) == before


@needs_triton
def test_launch_options_reach_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = importlib.import_module("triton.runtime.jit").JITFunction
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(kind, "run", lambda self, *args, **options: given.append(options))
    kernel = object.__new__(kind)
    with applied([Knob("num_warps", OPTIONS, (4, 16))], (("num_warps", 16),)):
        kernel.run(1, grid=(1,), num_warps=8, BLOCK=4)
    kernel.run(1, grid=(1,), num_warps=8, BLOCK=4)
    assert [options["num_warps"] for options in given] == [16, 8]


@needs_triton
def test_every_knob_is_there() -> None:
    for (op, _), found in KNOBS.items():
        assert op in OPS
        for knob in found:
            if knob.module != OPTIONS and importlib.util.find_spec(knob.module) is not None:
                assert knob.obstacle() is None, (op, knob)
                assert knob.default() in knob.values, (op, knob)


@pytest.mark.skipif(fastnorm.backends()["cuda"] is not None, reason="the extension tells its forms")
def test_the_forms_of_batch_norm_are_those_of_the_extension() -> None:
    names = extension().BATCH_NORM_FORMS
    assert tuple(enumerate(names)) == KNOBS["batch_norm", "cuda"][0].words


def test_swish_is_cut_as_batch_norm_is() -> None:
    swish = Problem("activation", "swish", (4,), "flat", "float32")
    assert knobs(swish, "triton") == KNOBS["mean_only_batch_norm", "triton"]


def test_what_means_nothing_beside_others_is_turned_alone() -> None:
    alone = replace(OWNER, alone=True)
    assert candidates([TILES, alone], "forward") == [
        (),
        (("OWNER_TILES", 0),),
        (("TILE_BYTES", 8192),),
        (("TILE_BYTES", 32768),),
    ]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(
    "variant, shape, layout",
    [
        ("plain", (3, 5, 4, 4), "nchw"),
        ("relu", (3, 5, 4, 4), "nhwc"),
        ("residual", (3, 5, 4, 4), "nhwc"),
        ("residual+silu", (3, 5, 4, 4), "nchw"),
        ("silu", (4, 5, 6), "nlc"),
        ("plain", (9, 5), "rows"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are interpreted without a GPU")
def test_two_launches_are_batch_norm(
    backend: str, variant: str, shape: tuple[int, ...], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fastnorm.backends()[backend] is not None:
        pytest.skip(str(fastnorm.backends()[backend]))
    problem = Problem("batch_norm", variant, shape, layout, "float32")
    changes = (("LAUNCHES", 2),)
    candidate = Candidate("two", backend=backend, problem=problem, changes=changes)
    stage = Bench("cpu").stage(problem)
    called: list[object] = []
    before = two_launches.TwoLaunches.apply
    monkeypatch.setattr(
        two_launches.TwoLaunches, "apply", lambda *given: called.append(given) or before(*given)
    )
    with candidate.active():
        tensors = stage.fresh()
        assert stage.check(candidate.bind(problem, tensors), tensors)[2] == ""
    assert len(called) == 1
    assert two_launches.LAUNCHES == 1


def test_one_problem_of_each_shape() -> None:
    options = ["tune", "--op", "batch_norm", "--suite", "ops", "--distinct"]
    found = tune.problems_of(parser().parse_args(options), "cuda")
    every = [p for p in suites.problems(["ops"], "cuda") if p.op == "batch_norm"]
    keys = [(p.shape, p.layout, p.itemsize) for p in found]
    assert len(set(keys)) == len(keys) < len(every)
    assert set(keys) == {(p.shape, p.layout, p.itemsize) for p in every}
    variants = {p.variant for p in found}  # those of U-Net, EfficientNet and PointNet are not plain
    assert {"plain", "relu", "silu", "relu6"} <= variants
    (resnet,) = [p for p in found if (p.shape, p.layout) == ((256, 64, 112, 112), "nchw")]
    assert (resnet.variant, resnet.dtype) == ("plain", "bfloat16")


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are interpreted without a GPU")
def test_tune_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tuning.json"
    shape = ["--shape", "4096", "--mode", "forward", "--dtype", "float32"]
    arguments = ["tune", "--op", "activation", *shape, "--device", "cpu", "--budget", "60"]
    assert main([*arguments, "--out", str(out)]) == 0
    rows = schema.load(out).rows
    assert [row.provider for row in rows] == [
        "as it is", "BLOCK_BYTES=4096", "BLOCK_BYTES=16384", "BLOCK_BYTES=32768",
    ]  # fmt: skip
    assert all(row.ok and row.ms_median and row.floor_fraction for row in rows)
    said = capsys.readouterr().out
    assert "their times say nothing of a GPU" in said
    assert "num_warps stays as it is: the interpreter has no launch options" in said
    assert "1.000x  as it is" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--op", "batch_norm", "--shape", "4x0"], "'4x0' is no shape: write 256x64x112x112"),
        (["--op", "batch_norm", "--shape", "4,8", "--mode", "host"], "choose from"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["tune", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--op", "batch_norm", "--shape", "4,8", "--variant", "celu"],
            "batch_norm has no variant 'celu': choose one of plain, relu",
        ),
        (
            ["--op", "layer_norm", "--shape", "4,8", "--layout", "nhwc"],
            "layer_norm has no layout 'nhwc': choose one of rows, nchw",
        ),
        (["--op", "batch_norm", "--shape", "8"], "(8,) is no shape of batch_norm in nchw"),
        (
            ["--op", "activation", "--shape", "65537", "--device", "cpu"],
            "the interpreter takes shapes of up to 65536 elements",
        ),
        (
            ["--op", "activation", "--shape", "8", "--device", "cpu", "--backend", "cuda"],
            "the CUDA kernels run on a GPU",
        ),
    ],
)
def test_what_it_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_labels() -> None:
    form = Knob("FORM", "somewhere", (1, 2), words=((2, "hold"),))
    assert label([form, TILES], ()) == "as it is"
    assert label([form, TILES], (("FORM", 2), ("TILE_BYTES", 1))) == "FORM=2 (hold), TILE_BYTES=1"
    assert label([form], (("FORM", 1),)) == "FORM=1"


def test_a_field_of_a_named_tuple(monkeypatch: pytest.MonkeyPatch) -> None:
    class Limits(NamedTuple):
        forward: int = 2048
        backward: int = 1024

    monkeypatch.setattr(plan, "LIMITS", Limits(), raising=False)
    knob = Knob("LIMITS.forward", plan.__name__, (512, 2048))
    assert knob.obstacle() is None
    assert candidates([knob], "forward") == [(), (("LIMITS.forward", 512),)]
    with applied([knob], (("LIMITS.forward", 512),)):
        assert Limits(512, 1024) == plan.LIMITS
    assert Limits() == plan.LIMITS
