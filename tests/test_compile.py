"""torch.compile: every layer as one graph, one graph for every batch size, whole models, policies.

aot_eager traces, functionalises and partitions as inductor does, and runs ATen: what can be wrong in
our ops shows there in a second. Inductor itself, which takes ten, gets one model of every layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastnorm
from fastnorm import functional
from tests.conftest import AVAILABLE
from tests.layers import (
    LAYERS,
    assert_same,
    every_layer,
    everywhere,
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


def no_recompilation() -> Any:
    return torch._dynamo.config.patch(error_on_recompile=True)


@everywhere
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_layer
def test_one_graph_serves_every_batch_size(
    name: str, training: bool, backend: str, device: str
) -> None:
    layer = make_layer(name, device).train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with no_recompilation():
        for N in (3, 4, 7):
            x = make_input(name, N, device)
            assert_same(step(compiled, layer, x), step(twin, twin, x))
