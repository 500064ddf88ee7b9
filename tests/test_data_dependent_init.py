"""Data-dependent initialisation: the outputs of weight-normed layers after it, and its errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fastnorm.init import data_dependent_init_
from fastnorm.modules.weight_norm import weight_norm
from tests.layers import everywhere


def normed_model(wrap=weight_norm):
    return nn.Sequential(
        wrap(nn.Conv2d(3, 8, 3)),
        nn.ReLU(),
        wrap(nn.ConvTranspose2d(8, 4, 2), dim=1),
        nn.Flatten(),
        wrap(nn.Linear(4 * 7 * 7, 5)),
    )


@everywhere
@pytest.mark.parametrize("wrap", [weight_norm, parametrizations.weight_norm])
def test_initialised_layers_have_mean_zero_and_variance_one(backend, wrap):
    torch.manual_seed(0)
    model, x = normed_model(wrap), torch.randn(16, 3, 8, 8) * 3 + 2
    assert data_dependent_init_(model, x) == ["0", "2", "4"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for layer in model:
        x = layer(x)
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            variance, mean = torch.var_mean(x, [i for i in range(x.dim()) if i != 1], correction=0)
            torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
            torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-4, rtol=0)
            assert 0.03 < layer.parametrizations.weight.original1.std() < 0.07
    assert x.requires_grad and model.training


@everywhere
@pytest.mark.parametrize(
    "make",
    [
        lambda: weight_norm(nn.Linear(6, 5), dim=None),
        lambda: weight_norm(nn.Conv1d(6, 5, 1), dim=2),
        lambda: weight_norm(nn.ConvTranspose1d(6, 6, 1)),
        lambda: weight_norm(nn.ConvTranspose1d(6, 6, 1, groups=2), dim=1),
    ],
)
def test_one_scale_where_g_is_not_per_output_channel(backend, make):
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(32, 6) if isinstance(layer, nn.Linear) else torch.randn(32, 6, 3)
    data_dependent_init_(layer, x)
    y = layer(x)
    assert layer.parametrizations.weight.original0.unique().numel() == 1
    variance, mean = torch.var_mean(y, [i for i in range(y.dim()) if i != 1], correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    assert abs(variance.mean().item() - 1) < 1e-4


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = weight_norm(nn.Linear(4, 4, bias=False))
        self.unused = weight_norm(nn.Linear(4, 4))

    def forward(self, x, scale=1.0):
        self.first = self.layer(x * scale)
        return self.layer(self.first * 5)


def test_first_call_initialises_without_bias_scale_only_and_batches_of_any_form():
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(64, 4) + 1
    unused = model.unused.weight.clone()
    for batch, scale in ((x, 1.0), ((x, 2.0), 2.0), ({"x": x, "scale": 3.0}, 3.0)):
        assert data_dependent_init_(model, batch) == ["layer"]
        model(x, scale)
        torch.testing.assert_close(
            model.first.var(0, correction=0), torch.ones(4), atol=1e-4, rtol=0
        )
        assert model.first.mean(0).abs().max() > 0.1
    assert torch.equal(unused, model.unused.weight) and not model.training


def test_a_constant_channel_is_centred_only():
    layer = weight_norm(nn.Linear(3, 4))
    x = torch.full((8, 3), 0.7)
    data_dependent_init_(layer, x)
    assert torch.equal(layer.parametrizations.weight.original0, torch.ones(4, 1))
    torch.testing.assert_close(layer(x), torch.zeros(8, 4), atol=1e-6, rtol=0)


class Failing(nn.Module):
    def forward(self, x):
        raise KeyError("later")


@pytest.mark.parametrize("kind", ["raises", "nan"])
def test_a_failing_call_changes_nothing(kind):
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4), Failing())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(8, 3)
    if kind == "nan":
        x[0, 0] = float("nan")
    with pytest.raises(KeyError if kind == "raises" else ValueError):
        data_dependent_init_(model, x)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_no_initialisation_inside_cached():
    with parametrize.cached(), pytest.raises(RuntimeError, match="cached"):
        data_dependent_init_(weight_norm(nn.Linear(3, 4)), torch.randn(8, 3))
