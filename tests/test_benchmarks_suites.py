"""What the suites ask for: every row that somebody will look for, each once, in order."""

from __future__ import annotations

import math

import pytest

from benchmarks import suites
from benchmarks.measure import Bench
from benchmarks.ops import FP32_WEIGHTS, FROZEN, OPS
from benchmarks.problems import HOST, TRAINING, Problem
from benchmarks.providers import PROVIDERS
from benchmarks.targets import LARGE
from fastnorm.ops.activation import NAMES

EVERY = [name for name in suites.NAMES if name != suites.MODELS]
PROCESSORS = 132  # of an H100


def found(op: str, *names: str) -> list[Problem]:
    return [p for p in suites.problems(names or EVERY, "cuda") if p.op == op]


def nbytes(problem: Problem) -> int:
    return problem.numel * problem.itemsize


def test_a_problem_of_two_suites_is_measured_once_and_as_early_as_either_asks() -> None:
    problems = suites.problems(EVERY, "cuda")
    keys = [
        (p.op, p.variant, p.shape, p.layout, p.dtype, mode) for p in problems for mode in p.modes
    ]
    assert len(keys) == len(set(keys))
    plain = Problem("batch_norm", "plain", (64, 256, 56, 56), "nchw", "bfloat16")
    of = {
        name: [p.importance for p in suites.problems([name], "cuda") if str(p) == str(plain)]
        for name in ("ops", "epilogues")
    }
    both = [
        p.importance for p in suites.problems(["ops", "epilogues"], "cuda") if str(p) == str(plain)
    ]
    assert both == [min(*of["ops"], *of["epilogues"])]
    assert of["ops"] != of["epilogues"], "this test asks nothing any more"


def test_every_activation_that_folds_in_is_measured_beside_the_norm_without() -> None:
    for device in ("cuda", "cpu"):
        problems = suites.problems(["epilogues"], device)
        for op in ("batch_norm", "layer_norm"):
            there = [p for p in problems if p.op == op]
            assert {p.variant for p in there} == {"plain", *NAMES} - {"identity"}
            assert len({(p.shape, p.layout, p.dtype, p.modes) for p in there}) == 1
            assert there[0].modes == TRAINING
            assert device == "cpu" or nbytes(there[0]) >= LARGE


def test_rare_activations_in_a_norm_are_asked_of_ours_alone() -> None:
    problems = suites.problems(["epilogues"], "cuda")
    for name in ("torch", "torch.compile", "fastnorm", "fastnorm-cuda", "fastnorm-triton"):
        served = {p.variant for p in problems if PROVIDERS[name].serves(p, "forward")}
        everything = {"plain", *NAMES} - {"identity"}
        few = {"plain", "relu", "relu6", "silu", "gelu"}
        assert served == (everything if "fastnorm" in name else few)
    alone = Problem("activation", "selu", (64,), "flat", "float32")
    assert PROVIDERS["torch"].serves(alone, "forward")


def test_rows_of_layer_norm() -> None:
    problems = found("layer_norm", "ops")
    plain = [p for p in problems if p.variant == "plain" and p.dtype == "bfloat16"]
    assert any(p.shape[-1] == 256 and nbytes(p) >= LARGE for p in plain)
    short = [p for p in plain if math.prod(p.shape[:-1]) < PROCESSORS and p.numel >= 1 << 16]
    assert len({p.shape[-1] for p in short}) > 2
    beside = {p.shape for p in plain}
    for variant in (FP32_WEIGHTS, FROZEN):
        there = [p for p in problems if p.variant == variant]
        assert there and {p.shape for p in there} <= beside, "nothing to compare it with"
    (kernelbench,) = found("layer_norm", "kernelbench")
    assert kernelbench.modes == TRAINING


def test_rows_of_activations_and_weight_norm() -> None:
    every = found("activation")
    for name in ("gelu", "gelu_tanh", "gelu_sigmoid", "silu", "selu", "swish"):
        there = [p for p in every if p.variant == name and p.modes == TRAINING]
        assert any(nbytes(p) >= LARGE for p in there), name
    assert {p.shape[1] for p in every if p.variant == "swish_channels"} == {256}
    large = [p for p in every if p.numel == 4096 * 393216]
    assert {p.variant for p in large} == {"gelu", "selu", "kernelbench_25"}
    assert {p.modes for p in large} == {TRAINING}
    weights = found("weight_norm", "ops")
    for variant in ("hifigan", "dim0", "dim2"):
        assert {p.dtype for p in weights if p.variant == variant} == {"float32", "bfloat16"}


def test_every_layer_has_host_and_device_time_on_one_tensor() -> None:
    problems = suites.problems(["host"], "cuda")
    by = {(p.op, p.variant, p.shape, p.modes) for p in problems}
    for op, variant in suites.LAYERS:
        assert variant in OPS[op].variants
        shapes = {s for o, v, s, modes in by if (o, v) == (op, variant) and modes == HOST}
        assert any((op, variant, shape, TRAINING) in by for shape in shapes), (op, variant)


@pytest.mark.parametrize("variant", [FP32_WEIGHTS, FROZEN])
def test_weights_of_another_type_and_frozen_ones(variant: str) -> None:
    problem = Problem("layer_norm", variant, (12, 32), "rows", "bfloat16")
    bench = Bench("cpu")
    for provider in ("torch", "fastnorm"):
        rows = list(bench.rows(problem, PROVIDERS[provider]))
        assert [(row.mode, row.ok) for row in rows] == [("forward", True), ("backward", True)]
    wanted = {name for name, t in bench.stage(problem).tensors.items() if t.requires_grad}
    assert wanted == ({"x"} if variant == FROZEN else {"x", "weight", "bias"})


def test_a_beta_for_each_channel() -> None:
    for layout in ("nchw", "nhwc"):
        problem = Problem("activation", "swish_channels", (3, 6, 4, 5), layout, "float32")
        bench = Bench("cpu")
        for provider in ("torch", "fastnorm"):
            rows = list(bench.rows(problem, PROVIDERS[provider]))
            assert [row.ok for row in rows] == [True, True], rows[0].note
        assert bench.stage(problem).tensors["beta"].shape == (6,)
