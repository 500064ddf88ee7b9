"""Whole models of transformers after replace_ and fuse_, compiled by inductor, against their
untouched twins: three steps of training and an evaluation, with dropout on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastnorm
from tests.layers import torch_warns

pytest.importorskip("transformers", reason="the models are transformers'")

from tests import test_models as models

# Dynamo looks at gradients of tensors that are no leaves
pytestmark = [torch_warns, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(autouse=True)
def _from_nothing() -> Iterator[None]:
    torch.compiler.reset()
    # eager's random numbers, for dropout
    with torch._inductor.config.patch(fallback_random=True):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "make",
    [models.resnet, models.convnext, models.bert, models.vit, models.wav2vec2],
    ids=lambda m: m.__name__,
)
def test_three_compiled_steps_give_the_numbers_of_the_untouched_model(make: Any) -> None:
    model, inputs = models.build(make)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    assert fastnorm.replace_(model).changed > 0
    fastnorm.fuse_(model)
    # wav2vec2 sets requires_grad of an activation in its forward, which breaks any graph
    whole = make is not models.wav2vec2
    compiled = torch.compile(model, fullgraph=whole, backend="inductor")
    with fastnorm.backend("reference"):  # ours behind the op, as a kernel would be
        losses, gradients = models.three_steps(compiled, inputs, optimizer)
    reference = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    expected, expected_gradients = models.three_steps(twin, inputs, reference)
    models.assert_close(losses, expected, "loss")
    for name, value in expected_gradients.items():
        found = gradients[f"_orig_mod.{name}"]
        if value is None:  # of an output that the loss does not use: zero, in compiled code
            assert found is None or not found.any(), name
        else:
            models.assert_close(found, value, f"gradient of {name}")
    for name, value in twin.state_dict().items():
        models.assert_close(model.state_dict()[name], value, name)
    with torch.no_grad(), fastnorm.backend("reference"):
        ours = models.outputs_of(compiled.eval(), inputs)
    with torch.no_grad():
        models.assert_close(ours, models.outputs_of(twin.eval(), inputs), "eval output")
