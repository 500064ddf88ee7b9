"""Which part of a step is normalisation and activation."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from benchmarks import models, shares
from benchmarks.shares import ACTIVATION, MOVES, NORM, REST
from benchmarks.zoo import MODELS


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::native_batch_norm_backward", NORM),
        ("aten::cudnn_batch_norm", NORM),
        ("aten::native_layer_norm", NORM),
        ("aten::_weight_norm_interface", NORM),
        ("fastnorm::batch_norm_forward", NORM),
        ("BatchNormFunction", NORM),
        ("autograd::engine::evaluate_function: LayerNormFunctionBackward", NORM),
        ("WeightNormGroupFunctionBackward", NORM),
        ("aten::relu_", ACTIVATION),
        ("aten::threshold_backward", ACTIVATION),
        ("aten::silu_backward", ACTIVATION),
        ("fastnorm::activation_backward", ACTIVATION),
        ("InplaceActivationFunction", ACTIVATION),
        ("aten::copy_", MOVES),
        ("aten::_to_copy", MOVES),
        ("aten::cudnn_convolution", REST),
        ("aten::add_", REST),
        ("autograd::engine::evaluate_function: ConvolutionBackward0", REST),
    ],
)
def test_ops_by_their_names(name: str, kind: str) -> None:
    assert shares.kind_of(name) == kind


def op(name: str, *kernels: float, parent: Any = None) -> SimpleNamespace:
    """An op, and how long the kernels ran that it launched itself."""
    found = [SimpleNamespace(duration=one) for one in kernels]
    return SimpleNamespace(name=name, device_type=DeviceType.CPU, kernels=found, cpu_parent=parent)


def kernel(microseconds: float, annotation: bool = False) -> SimpleNamespace:
    elapsed = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(
        name="k", device_type=DeviceType.CUDA, is_user_annotation=annotation, time_range=elapsed
    )


def test_kernels_count_for_the_op_that_launched_them() -> None:
    relu = op("aten::relu")
    events = [
        *(kernel(10.0) for _ in range(10)),
        kernel(1000.0, annotation=True),
        op("aten::cudnn_batch_norm", 10.0, 10.0),
        op("aten::copy_", 10.0, parent=op("BatchNormFunctionBackward")),
        relu,
        op("aten::clamp_min", 10.0, parent=relu),
        op("aten::copy_", 10.0, parent=op("aten::_to_copy")),
        op("aten::cudnn_convolution", 10.0, 10.0, 10.0),  # and two that no op launched
    ]
    found = shares.shares(events, "cuda")
    assert found == pytest.approx({NORM: 0.3, ACTIVATION: 0.1, MOVES: 0.1, REST: 0.5})
    assert shares.text(found) == (
        "norm+activation 40.0% of the step (norm 30.0%, activation 10.0%, copies 10.0%)"
    )
    assert shares.text(shares.shares([], "cuda")) == (
        "share of norms not measured: the profiler saw none"
    )


def norms() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten())


def test_a_step_on_the_cpu() -> None:
    given = replace(MODELS["resnet50"], sources=(("our own", norms),), cpu_shape=(4, 3, 32, 32))
    found = shares.profiled(models.stepping(given, "torch", "cpu"), "cpu")
    assert sum(found.values()) == pytest.approx(1.0)
    assert found[NORM] > 0 and found[ACTIVATION] > 0
    with torch.no_grad():
        x = torch.randn(64, 64)
        found = shares.profiled(lambda: x @ x, "cpu")
    assert found[REST] > 0.9


def test_the_process_that_profiles_says_why_it_could_not() -> None:
    profiler = shares.Profiler("cpu")
    try:
        assert profiler.told("nobody", "torch").startswith("share of norms not measured: KeyError")
    finally:
        profiler.stop()
