"""Weight norm on modules: torch's parametrization and names, how it is removed, and its errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fastnorm.modules.weight_norm import WeightNorm, remove_weight_norm, weight_norm

LAYERS = [
    (lambda: nn.Linear(5, 3), (0, 1, None, -1, -2)),
    (lambda: nn.Conv1d(4, 6, 3), (0, 1, 2, None, -2, -3)),
    (lambda: nn.ConvTranspose2d(4, 6, 3), (0, 1, None)),
]


@pytest.mark.parametrize("make, dim", [(make, dim) for make, dims in LAYERS for dim in dims])
def test_parametrization_is_torchs(make, dim):
    plain = make()
    ours, theirs = (
        weight_norm(copy.deepcopy(plain), dim=dim),
        parametrizations.weight_norm(copy.deepcopy(plain), dim=dim),
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for x, y in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    assert isinstance(ours.parametrizations.weight[0], parametrizations._WeightNorm)
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.weight, plain.weight)
    with torch.no_grad():
        theirs.parametrizations.weight.original0.mul_(2)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.weight, 2 * plain.weight)
    # the swap that replace_ makes of torch's instance
    theirs.parametrizations.weight[0].__class__ = WeightNorm
    assert torch.equal(ours.weight, theirs.weight)


def test_loads_old_names_and_goes_idle_when_removed():
    with pytest.warns(FutureWarning):
        old = torch.nn.utils.weight_norm(nn.Linear(5, 3))
    model = nn.Sequential(weight_norm(nn.Linear(5, 3)))
    model.load_state_dict({f"0.{key}": value for key, value in old.state_dict().items()})
    torch.testing.assert_close(model[0].weight, old.weight)
    remove_weight_norm(model[0])
    assert model.load_state_dict(
        {f"0.{k}": v for k, v in old.state_dict().items()}, strict=False
    ).unexpected_keys == [
        "0.weight_g",
        "0.weight_v",
    ]
    pickle.loads(pickle.dumps(model))


def test_requires_grad_deepcopy_cached_assignment_and_repr():
    layer = nn.Linear(5, 3)
    layer.weight.requires_grad_(False)
    weight_norm(layer, eps=1e-12)
    assert not any(p.requires_grad for p in layer.parametrizations.parameters())
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight, layer.weight) and twin.parametrizations.weight[0].eps == 1e-12
    assert "WeightNorm(dim=0, eps=1e-12)" in repr(twin)
    with parametrize.cached():
        assert layer.weight is layer.weight
    value = torch.randn(3, 5)
    layer.weight = value
    torch.testing.assert_close(layer.weight, value)
    torch.testing.assert_close(twin.weight, twin.weight)
    weight = layer.weight.clone()
    remove_weight_norm(layer)
    assert (
        type(layer) is nn.Linear
        and isinstance(layer.weight, nn.Parameter)
        and not layer.weight.requires_grad
    )
    assert torch.equal(layer.weight, weight)


def test_remove_leaves_the_computed_weight():
    for remove in (remove_weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")):
        layer = weight_norm(nn.Linear(5, 3))
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(3)
        weight = layer.weight.detach().clone()
        remove(layer)
        assert torch.equal(layer.weight, weight) and layer.weight.requires_grad
        assert set(layer.state_dict()) == {"weight", "bias"}
    remove_weight_norm(parametrizations.weight_norm(nn.Linear(5, 3)))
    with pytest.raises(ValueError, match="weight_norm of 'weight' not found"):
        remove_weight_norm(layer)
    with pytest.raises(ValueError, match="not found"):
        remove_weight_norm(parametrizations.orthogonal(nn.Linear(5, 3)))


def test_registration_errors_leave_the_module_alone():
    layer = nn.Linear(5, 3)
    for error, arguments in (
        (ValueError, {"name": "nope"}),
        (IndexError, {"dim": 2}),
        (IndexError, {"dim": -3}),
        (TypeError, {"dim": "a"}),
        (ValueError, {"eps": 0.0}),
    ):
        with pytest.raises(error):
            weight_norm(layer, **arguments)
        assert type(layer) is nn.Linear and not layer._load_state_dict_pre_hooks
    with pytest.raises(RuntimeError):
        weight_norm(nn.LazyLinear(3))
    for module in (weight_norm(layer), parametrizations.orthogonal(nn.Linear(5, 3))):
        with pytest.raises(RuntimeError, match="already has a parametrization"):
            weight_norm(module)
        assert len(module.parametrizations.weight) == 1
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(3, 0)
    assert weight_norm(empty).weight.shape == (0, 3)
