"""What a sum that a layer norm writes must not change: its own gradient, hooks, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastnorm.fuse import fuse_
from fastnorm.ops.layer_norm import layer_norm
from tests.layers import everywhere

C = 8


class Given(nn.Module):
    """The style of models that hand their residual stream on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)

    def forward(self, x: Tensor, r: Tensor) -> Any:
        s = x + r
        return self.norm(s), s


class Block(Given):
    def forward(self, x: Tensor, r: Tensor) -> Any:
        s = x + r
        return s + self.norm(s)


class Watched(Given):
    def forward(self, x: Tensor, r: Tensor) -> Any:
        s = x + r
        s.retain_grad()
        return self.norm(s) * s


class Changes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(3).sum()


class Between(Given):
    def __init__(self) -> None:
        super().__init__()
        self.other = Changes()

    def forward(self, x: Tensor, r: Tensor) -> Any:
        s = x + r
        z = self.other(s)
        return self.norm(s) + z + s


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return 0


class Dropped(Given):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Nothing()

    def forward(self, x: Tensor, r: Tensor) -> Any:
        s = r + self.branch(x)
        return s + self.norm(s)


def fused(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    fuse_(twin)
    return twin


@everywhere
@pytest.mark.parametrize("kind", [Given, Watched, Between])
def test_these_sums_stay_where_they_are(kind: type[nn.Module], backend: str) -> None:
    model = kind()
    twin = copy.deepcopy(model)
    report = fuse_(twin)
    assert not any("sum" in row.now for row in report)
    x, r = torch.randn(2, 3, C, requires_grad=True), torch.randn(2, 3, C)
    torch.testing.assert_close(twin(x, r), model(x, r))


@everywhere
def test_a_branch_that_gives_no_tensor(backend: str) -> None:
    model, x, r = Dropped(), torch.randn(2, C), torch.randn(2, C)
    torch.testing.assert_close(fused(model)(x, r), model(x, r))


@everywhere
@pytest.mark.parametrize("pre", [True, False])
def test_a_hook_put_on_the_norm_later_is_an_error(pre: bool, backend: str) -> None:
    model = fused(Block())
    x = torch.randn(2, C)
    model(x, x)
    norm = model.norm
    assert isinstance(norm, nn.Module)
    register = norm.register_forward_pre_hook if pre else norm.register_forward_hook
    handle = register(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"hooks is not empty any more: .*restore_ first"):
        model(x, x)
    handle.remove()
    model(x, x)


@everywhere
def test_the_sum_needs_a_gradient_where_its_terms_do(backend: str) -> None:
    x, r, weight = torch.randn(2, C), torch.randn(2, C), torch.ones(C, requires_grad=True)
    y, total = layer_norm(x, (C,), weight, residual=r, return_sum=True)
    assert y.requires_grad and not total.requires_grad
    y, total = layer_norm(x, (C,), weight, residual=r.requires_grad_(), return_sum=True)
    assert total.requires_grad
    total.mul_(2)  # nothing but the sum is asked for
    total.sum().backward()
    assert torch.equal(r.grad, torch.full_like(r, 2.0))


class Optional(nn.Module):
    """Two arguments may be None: the trace stands for neither call in which one is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.LayerNorm(C), nn.GELU())

    def forward(self, x: Tensor, a: Any = None, b: Any = None) -> Any:
        if a is not None and b is None:
            return self.seq[0](x)
        return self.seq(x)


def test_a_norm_that_one_of_two_arguments_calls_alone() -> None:
    model, x = Optional(), torch.randn(2, C)
    twin = fused(model)
    for arguments in ((x,), (x, x), (x, x, x)):
        torch.testing.assert_close(twin(*arguments), model(*arguments))
