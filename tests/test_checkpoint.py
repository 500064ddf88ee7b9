"""Activation checkpointing, saved-tensor hooks and what is saved, gradient accumulation."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastnorm
from tests.layers import (
    LAYERS,
    TRACKING,
    assert_same,
    every_layer,
    everywhere,
    make_input,
    make_layer,
    step,
    torch_warns,
)

pytestmark = torch_warns
DOCUMENT = Path(__file__).parents[1] / "docs" / "compatibility.md"


def recipe() -> Callable[..., Tensor]:
    """The function of docs/compatibility.md."""
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), flags=re.M | re.S)
    (code,) = (block for block in blocks if "def checkpointed" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["checkpointed"]  # type: ignore[no-any-return]


@everywhere
@pytest.mark.parametrize("reentrant", [False, True])
@every_layer
def test_gradients_are_those_without_checkpointing(
    name: str, reentrant: bool, backend: str, device: str
) -> None:
    layer, x = make_layer(name, device).eval(), make_input(name, device=device)
    found = step(lambda x: checkpoint(layer, x, use_reentrant=reentrant), layer, x)
    assert_same(found, step(layer, layer, x))


@everywhere
@pytest.mark.parametrize("name", TRACKING)
def test_the_recipe_updates_statistics_once(name: str, backend: str, device: str) -> None:
    layer, x = make_layer(name, device), make_input(name, device=device)
    twin, plain = copy.deepcopy(layer), copy.deepcopy(layer)
    expected = step(twin, twin, x)
    checkpointed = recipe()
    assert_same(step(lambda x: checkpointed(layer, x), layer, x), expected)
    twice = step(lambda x: checkpoint(plain, x, use_reentrant=False), plain, x)
    assert twice["num_batches_tracked"] == expected["num_batches_tracked"] + 1, "why it is needed"


@everywhere
def test_the_recipe_on_a_replaced_and_fused_model(backend: str, device: str) -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1))
    net = nn.Sequential(body, nn.BatchNorm2d(4)).double().to(device)
    fastnorm.replace_(net)
    fastnorm.fuse_(net)
    twin, checkpointed = copy.deepcopy(net), recipe()
    x = torch.randn(3, 3, 5, 5, dtype=torch.float64, device=device)
    found = step(lambda x: net[1](checkpointed(net[0], x)), net, x)
    assert_same(found, step(twin, twin, x))


# what is saved


class Saved:
    """Counts the bytes that autograd keeps, each storage once, and checks that they come back."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return x

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


def saved_by(call: Callable[[Tensor], Tensor], x: Tensor) -> int:
    saved = Saved()
    kept = x * 1  # not a leaf, as an activation inside a model
    with saved_tensors_hooks(saved.pack, lambda x: x):
        y = call(kept)
    assert y.requires_grad
    return saved.bytes


X = (4, 8, 16, 16)
SIZE = 4 * 8 * 16 * 16 * 4  # bytes of it in fp32


@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_batch_norm_and_silu_save_x_alone(backend: str, device: str) -> None:
    missing = fastnorm.backends()[backend]
    if missing is not None:
        pytest.skip(missing)
    x = torch.randn(X, device=device, requires_grad=True)
    few = 8 * 8 * 4  # weight, bias and statistics of 8 channels
    torchs = nn.Sequential(nn.BatchNorm2d(8), nn.SiLU()).to(device)
    fused = fastnorm.BatchNormAct2d(8, activation="silu").to(device)
    with fastnorm.backend(backend):
        assert SIZE < saved_by(fused, x) <= SIZE + few
    kept = saved_by(torchs, x)  # x, and the input of SiLU
    assert kept > 2 * SIZE
    if device == "cpu":  # cuDNN may keep more for its backward
        assert kept <= 2 * SIZE + few


@everywhere
def test_of_a_residual_and_relu_x_and_y_are_saved(backend: str) -> None:
    """y is what the next convolution saves anyway, and the residual may be nobody else's."""
    x, residual = torch.randn(X, requires_grad=True), torch.randn(X)
    layer = fastnorm.BatchNormAct2d(8, activation="relu")
    saved = Saved()
    with saved_tensors_hooks(saved.pack, lambda x: x):
        y = layer(x * 1, residual * 1)
    assert 2 * SIZE < saved.bytes <= 2 * SIZE + 8 * 8 * 4
    assert y.untyped_storage().data_ptr() in saved.storages
    y = layer(x * 1, residual)
    y.detach().add_(1)  # as after torch's ReLU, which keeps its result too
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@everywhere
@every_layer
def test_saved_tensors_may_go_elsewhere(name: str, backend: str, device: str) -> None:
    layer, x = make_layer(name, device), make_input(name, device=device)
    twin = copy.deepcopy(layer)

    def through_hooks(x: Tensor) -> Tensor:
        with save_on_cpu(), saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
            return layer(x)  # type: ignore[no-any-return]

    assert_same(step(through_hooks, layer, x), step(twin, twin, x))


# gradient accumulation


# with parameters, and without statistics of the batch, which a half has not
ACCUMULATING = [
    name
    for name in LAYERS
    if name != "batch_norm_untracked" and list(make_layer(name).parameters())
]


@everywhere
@pytest.mark.parametrize("name", ACCUMULATING)
def test_gradients_of_two_halves_add_up(name: str, backend: str, device: str) -> None:
    layer = make_layer(name, device).eval()
    x = make_input(name, N=4, device=device)
    layer(x).square().sum().backward()
    whole = {key: p.grad.clone() for key, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad(set_to_none=False)
    kept = {key: p.grad for key, p in layer.named_parameters()}
    for half in x.detach().chunk(2):
        layer(half).square().sum().backward()
    for key, p in layer.named_parameters():
        assert p.grad is kept[key], "added in place"
        torch.testing.assert_close(p.grad, whole[key], rtol=1e-9, atol=1e-11)
