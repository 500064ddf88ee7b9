"""torch.func, forward-mode AD and double backward of every layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap

import fastnorm
from tests.layers import LAYERS, every_layer, everywhere, make_input, make_layer, torch_warns

pytestmark = torch_warns

# in evaluation: under a transform torch refuses to change the buffers of a layer in training
UNTRACKED = [name for name in LAYERS if name != "silu_inplace"]
# a transform is given torch's functions whatever the backend: kernels show that in one test
reference = pytest.mark.parametrize("backend", ["auto", "reference"], indirect=True)
layers = pytest.mark.parametrize("name", UNTRACKED)


def call_of(name: str) -> tuple[nn.Module, dict[str, Tensor], Callable[..., Tensor]]:
    """A layer, its parameters, and its output as a function of them and of an input."""
    layer = make_layer(name).eval()
    parameters = {key: p.detach() for key, p in layer.named_parameters()}
    return layer, parameters, lambda p, x: functional_call(layer, p, (x,))


def loss_of(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y = call(parameters, x)
        return (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum()

    return loss


@everywhere
@layers
def test_grad_is_what_backward_gives(name: str, backend: str) -> None:
    layer, parameters, call = call_of(name)
    x = make_input(name)
    found, dx = grad(loss_of(call), argnums=(0, 1))(parameters, x.detach())
    loss_of(lambda _, x: layer(x))({}, x).backward()
    assert x.grad is not None
    torch.testing.assert_close(dx, x.grad, rtol=1e-9, atol=1e-11)
    for key, p in layer.named_parameters():
        torch.testing.assert_close(found[key], p.grad, rtol=1e-9, atol=1e-11)


@reference
@layers
def test_vmap_is_a_loop(name: str, backend: str) -> None:
    _, parameters, call = call_of(name)
    xs = torch.stack([make_input(name).detach() for _ in range(2)])
    found = vmap(call, in_dims=(None, 0))(parameters, xs)
    expected = torch.stack([call(parameters, x) for x in xs])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@reference
@layers
def test_jvp_is_the_transpose_of_backward(name: str, backend: str) -> None:
    layer, parameters, call = call_of(name)
    x = make_input(name)
    tangent = torch.randn_like(x)
    y, dy = jvp(lambda x: call(parameters, x), (x.detach(),), (tangent,))
    v = torch.randn_like(y)
    (dx,) = torch.autograd.grad(layer(x), x, v)
    torch.testing.assert_close((dy * v).sum(), (dx * tangent).sum(), rtol=1e-9, atol=1e-11)
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(x.detach(), tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, dy, rtol=1e-9, atol=1e-11)


HESSIANS = ["batch_norm_1d", "batch_norm_act", "mean_only", "layer_norm_act", "gelu", "weight_norm"]


@reference
@pytest.mark.parametrize("name", HESSIANS)
def test_hessian_is_double_backward(name: str, backend: str) -> None:
    layer, parameters, call = call_of(name)
    x = make_input(name, N=1)
    loss = loss_of(call)
    found = hessian(lambda x: loss(parameters, x).square())(x.detach())

    def square(x: Tensor) -> Tensor:
        return loss_of(lambda _, x: layer(x))({}, x).square()

    expected = torch.autograd.functional.hessian(square, x.detach())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert expected.abs().max() > 0


@reference
def test_per_sample_gradients_of_a_replaced_model(backend: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 1)).double()
    fastnorm.replace_(net)
    fastnorm.fuse_(net)
    parameters = {key: p.detach() for key, p in net.named_parameters()}
    x = torch.randn(5, 4, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, parameters, (x.unsqueeze(0),)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, row in enumerate(x):
        net.zero_grad()
        net(row.unsqueeze(0)).square().sum().backward()
        for key, p in net.named_parameters():
            torch.testing.assert_close(found[key][i], p.grad, rtol=1e-9, atol=1e-11)


@reference
def test_an_ensemble_of_stacked_modules(backend: str) -> None:
    nets = [nn.Sequential(nn.BatchNorm2d(3), nn.SiLU()).double().eval() for _ in range(3)]
    for net in nets:
        fastnorm.replace_(net)
        nn.init.normal_(net[0].weight)  # type: ignore[arg-type]
    parameters, buffers = stack_module_state(nets)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    found = vmap(lambda p, b: functional_call(nets[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([net(x) for net in nets]))


@reference
def test_batch_statistics_without_buffers_under_vmap(backend: str) -> None:
    layer = make_layer("batch_norm_untracked")
    xs = torch.stack([make_input("batch_norm_untracked").detach() for _ in range(2)])
    found = vmap(layer)(xs)
    torch.testing.assert_close(found, torch.stack([layer(x) for x in xs]))


@everywhere
@every_layer
def test_a_view_that_stands_for_negated_data(name: str, backend: str) -> None:
    x = make_input(name).detach()
    negated = torch.complex(x, -x).conj().imag  # of no storage of its own, its sign is a flag
    assert negated.is_neg()
    layer = make_layer(name).eval()
    torch.testing.assert_close(layer(negated), layer(x), rtol=1e-9, atol=1e-11)
