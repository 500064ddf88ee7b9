"""The files that other suites' runners take, at reduced size on the CPU."""

from __future__ import annotations

import enum
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

EXTERNAL = Path(__file__).parent.parent / "benchmarks" / "external"

# problem -> (arguments of the model, shape of the input, what KernelBench's own model computes)
KERNELBENCH: dict[
    int, tuple[list[Any], tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]
] = {
    25: ([], (16, 96), lambda x: x * torch.sigmoid(x)),
    26: ([], (16, 96), F.gelu),
    27: ([], (16, 96), torch.selu),
    33: ([6], (4, 6, 8, 8), torch.nn.BatchNorm2d(6)),
    40: ([(6, 8, 8)], (4, 6, 8, 8), torch.nn.LayerNorm((6, 8, 8))),
    88: (
        [],
        (32, 32),
        lambda x: (
            0.5
            * x
            * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
        ),
    ),
}


def test_every_file_has_a_problem() -> None:
    names = {f"level_1_problem_{i}_sample_0_kernel.py" for i in KERNELBENCH}
    assert names == {path.name for path in (EXTERNAL / "kernelbench").glob("*.py")}


@pytest.mark.parametrize("problem", KERNELBENCH)
def test_kernelbench(problem: int, device: str) -> None:
    arguments, shape, reference = KERNELBENCH[problem]
    path = EXTERNAL / "kernelbench" / f"level_1_problem_{problem}_sample_0_kernel.py"
    context: dict[str, Any] = {}
    exec(compile(path.read_text(), "<string>", "exec"), context)  # as its runner loads a sample
    model = context["ModelNew"](*arguments).to(device)
    x = torch.rand(shape, device=device)
    if isinstance(reference, torch.nn.Module):
        reference.to(device)
    torch.testing.assert_close(model(x), reference(x))


class Mode(enum.Enum):
    FWD, BWD, FWD_BWD, FWD_NO_GRAD = range(4)


class BenchmarkOperator:
    """What TritonBench's class of that name does with an operator, as far as ours relies on it."""

    def __init__(self, tb_args: Any, extra_args: list[str] | None = None) -> None:
        self.mode, self.device, self.dtype = tb_args.mode, tb_args.device, torch.float32


REGISTERED: list[str] = []


def register(**_: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        REGISTERED.append(function.__name__)
        return function

    return decorator


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Any:
    stub: Any = types.ModuleType("tritonbench.utils.triton_op")
    stub.Mode, stub.BenchmarkOperator = Mode, BenchmarkOperator
    stub.BenchmarkOperatorMetrics = types.SimpleNamespace
    stub.register_benchmark = stub.register_metric = stub.register_x_val = register
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    name = "tritonbench.operators.fastnorm_batch_norm.operator"
    path = EXTERNAL / "tritonbench" / "fastnorm_batch_norm" / "operator.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    REGISTERED.clear()
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESNET50", ((4, 6), (8, 3)))
    return module.Operator


@pytest.mark.parametrize("channels_last", [False, True])
def test_tritonbench(operator: Any, channels_last: bool, device: str) -> None:
    given = types.SimpleNamespace(mode=Mode.BWD, device=device)
    extra = ["--batch", "2", *(["--channels-last"] if channels_last else [])]
    made = operator(given, extra)
    assert REGISTERED[:3] == [
        "torch_batch_norm", "torch_compile_batch_norm", "fastnorm_batch_norm"
    ]  # fmt: skip
    inputs = list(made.get_input_iter())
    assert [made.get_x_val(args) for args in inputs] == [(2, 4, 6, 6), (2, 8, 3, 3)]
    for args in inputs:
        found = []
        for benchmark in (made.torch_batch_norm, made.fastnorm_batch_norm):
            for leaf in made.get_grad_to_none(args):
                leaf.grad = None
            forward = benchmark(*args)
            made.get_bwd_fn(forward)()
            found.append([forward().detach(), *(leaf.grad for leaf in args)])
        torch.testing.assert_close(*found)
    metrics = types.SimpleNamespace(latency=1.0)
    assert made.gbps(None, inputs[0], metrics) == pytest.approx(3 * 288 * 4 * 1e-6)
