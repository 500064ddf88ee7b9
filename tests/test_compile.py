"""torch.compile: every layer as one graph, one graph for every batch size, and the compile policy.

aot_eager traces, functionalises and partitions as inductor does, and runs ATen: what can be wrong
in our ops shows there in half a second a layer. Inductor itself gets all layers in one graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import fastnorm
from tests.conftest import AVAILABLE
from tests.layers import (
    LAYERS,
    assert_same,
    every_layer,
    make_input,
    make_layer,
    step,
    torch_warns,
)

pytestmark = torch_warns


@pytest.fixture(autouse=True)
def _from_nothing() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


reference = pytest.mark.parametrize("backend", ["reference"], indirect=True)


def no_recompilation() -> Any:
    return torch._dynamo.config.patch(error_on_recompile=True)


def assert_compiled_is_eager(
    name: str, layer: nn.Module, compiled: Callable[..., Tensor], sizes: tuple[int, ...]
) -> None:
    twin = copy.deepcopy(layer)
    for N in sizes:
        x = make_input(name, N)
        assert_same(step(compiled, layer, x), step(twin, twin, x))


@reference
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_layer
def test_one_graph_serves_every_batch_size(name: str, training: bool, backend: str) -> None:
    layer = make_layer(name).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with no_recompilation():
        assert_compiled_is_eager(name, layer, compiled, (3, 5, 7))


@reference
@every_layer
def test_a_second_batch_size_makes_the_last_graph(name: str, backend: str) -> None:
    layer, counter = make_layer(name), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    assert_compiled_is_eager(name, layer, compiled, (3, 5, 7, 9))
    assert counter.frame_count <= 2  # the first size, then any


class Every(nn.Module):
    """All layers, each on its own input: one call of the compiler for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: make_layer(name) for name in LAYERS})

    def forward(self, *inputs: Tensor) -> Tensor:
        each = zip(self.layers.values(), inputs, strict=True)
        return torch.cat([layer(x).flatten() for layer, x in each])


def assert_every_layer_compiles(compiler: str, dynamic: bool, device: str = "cpu") -> None:
    every = Every().to(device)
    twin = copy.deepcopy(every)
    compiled = torch.compile(every, fullgraph=True, backend=compiler, dynamic=dynamic)
    with no_recompilation():
        for N in (3, 5) if dynamic else (3,):
            inputs = [make_input(name, N, device) for name in LAYERS]
            assert_same(step(compiled, every, *inputs), step(twin, twin, *inputs))


@pytest.mark.parametrize(
    "backend", ["auto", *(name for name in AVAILABLE if name != "reference")], indirect=True
)
@pytest.mark.hangs_after(120)  # a compilation for each layer
def test_every_backend(backend: str, device: str) -> None:
    assert_every_layer_compiles("aot_eager", True, device)


@reference
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_inductor(dynamic: bool, backend: str) -> None:
    assert_every_layer_compiles("inductor", dynamic)


@reference
def test_inductor_on_the_formula(backend: str) -> None:
    with fastnorm.compile_policy("decompose"):
        assert_every_layer_compiles("inductor", dynamic=False)


# what stands in the graph


def graph_of(module: nn.Module, x: Tensor) -> str:
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(graph.print_readable(print_output=False))
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(fw_compiler=look, bw_compiler=look)
    torch.compile(module, fullgraph=True, backend=compiler)(x).sum().backward()
    assert len(seen) == 2, "forward and backward"
    return "\n".join(seen)


OURS = "torch.ops.fastnorm"


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "silu_inplace"])
def test_the_policy_chooses_our_op_or_the_formula(name: str) -> None:
    with fastnorm.backend("reference"):
        x = make_input(name)
        opaque = graph_of(make_layer(name), x)
        torch.compiler.reset()
        with fastnorm.compile_policy("decompose"):
            formula = graph_of(make_layer(name), x)
    assert opaque.count(OURS) >= 2
    assert OURS not in formula


def test_decompose_lets_inductor_fuse_across_the_layer() -> None:
    from torch._inductor.utils import run_and_get_code

    def f(x: Tensor) -> Tensor:
        return fastnorm.functional.silu(x * 2) + 1

    x, calls = torch.randn(6, 8), {}
    with fastnorm.backend("reference"):
        for policy in ("opaque", "decompose"):
            torch.compiler.reset()
            with fastnorm.compile_policy(policy):
                y, (code,) = run_and_get_code(torch.compile(f, fullgraph=True), x)
            torch.testing.assert_close(y, torch.nn.functional.silu(x * 2) + 1)
            calls[policy] = code.count(OURS) > 0, code.count("async_compile.cpp")
    assert calls["opaque"] == (True, 2)  # a kernel before our op, and one after it
    assert calls["decompose"] == (False, 1)


def test_the_policy_goes_before_a_forced_backend_and_ends_with_its_block() -> None:
    x = torch.randn(3, 8)
    with fastnorm.backend("reference"):
        before = fastnorm.dispatch._policy
        with fastnorm.compile_policy("decompose"):
            assert OURS not in graph_of(fastnorm.LayerNorm(8), x)
            with fastnorm.compile_policy("opaque"):
                torch.compiler.reset()
                assert OURS in graph_of(fastnorm.LayerNorm(8), x)
        assert fastnorm.dispatch._policy == before == "opaque"
        # a statement of its own: for the rest of the process
        fastnorm.compile_policy("decompose")
        assert fastnorm.dispatch._policy == "decompose"
        fastnorm.compile_policy(before)


def test_an_unknown_policy_names_the_choices() -> None:
    with pytest.raises(ValueError, match="opaque, decompose"):
        fastnorm.compile_policy("inline")
