"""What fuse_ folds into a norm, and that restore_ takes it out again."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastnorm.fuse import fuse_
from fastnorm.modules import batch_norm, layer_norm
from fastnorm.replace import restore_
from tests.twins import (
    C,
    Residual,
    assert_untouched,
    fused_and_same,
    in_place,
    planes,
    reasons,
    snapshot,
)

MODULES = {
    "relu": nn.ReLU(),
    "relu inplace": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    "elu": nn.ELU(),
    "selu": nn.SELU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "mish": nn.Mish(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
}


def relu_method(x):
    return x.relu()


def relu_method_in_place(x):
    return x.relu_()


def relu_in_place(x):
    return F.relu(x, True)


def relu6_in_place(x):
    return F.relu6(x, inplace=True)


def leaky_relu_in_place(x):
    return F.leaky_relu(x, 0.01, inplace=True)


def elu_with_its_default(x):
    return F.elu(x, alpha=1.0)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def silu_in_place(x):
    return F.silu(x, inplace=True)


def tanh_method(x):
    return x.tanh()


def sigmoid_method_in_place(x):
    return x.sigmoid_()


CALLS = {
    "relu": [F.relu, torch.relu, torch.relu_, relu_method, relu_method_in_place, relu_in_place],
    "relu6": [F.relu6, relu6_in_place],
    "leaky_relu": [F.leaky_relu, leaky_relu_in_place],
    "elu": [F.elu, elu_with_its_default],
    "selu": [F.selu, torch.selu],
    "gelu": [F.gelu],
    "gelu_tanh": [gelu_tanh],
    "silu": [F.silu, silu_in_place],
    "hardswish": [F.hardswish],
    "mish": [F.mish],
    "tanh": [F.tanh, torch.tanh, tanh_method],
    "sigmoid": [F.sigmoid, torch.sigmoid, sigmoid_method_in_place],
}

REFUSED = [
    nn.LeakyReLU(0.2),
    nn.ELU(2.0),
    nn.PReLU(),
    nn.CELU(),
    nn.Softplus(),
    nn.RReLU(),
    nn.Hardtanh(),
]


@pytest.mark.parametrize("name", MODULES)
def test_a_sequential_neighbour_is_folded_and_becomes_identity(name):
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), MODULES[name])
    norm = model[1]
    report = fused_and_same(model, planes())
    assert [(row.name, row.now) for row in report] == [
        ("1", f"fastnorm.BatchNormAct2d({name.split()[0]})"),
        ("2", "Identity"),
    ]
    assert model[1] is norm
    assert model[2] is MODULES[name]


@pytest.mark.parametrize(
    ("norm", "shape", "ours"),
    [
        (nn.BatchNorm1d(C), (4, C), batch_norm.BatchNormAct1d),
        (nn.BatchNorm1d(C), (4, C, 5), batch_norm.BatchNormAct1d),
        (nn.BatchNorm3d(C), (2, C, 2, 3, 2), batch_norm.BatchNormAct3d),
        (nn.LayerNorm(C), (4, C), layer_norm.LayerNorm),
        (batch_norm.BatchNorm2d(C), (3, C, 4, 4), batch_norm.BatchNormAct2d),
        (layer_norm.LayerNorm(C), (4, C), layer_norm.LayerNorm),
    ],
)
def test_every_norm_folds(norm, shape, ours):
    model = nn.Sequential(norm, nn.ReLU())
    fuse_(model)
    assert type(model[0]) is ours
    assert model[0].activation == "relu"
    assert type(model[1]) is nn.Identity
    restore_(model)
    fused_and_same(model, torch.randn(shape))


class Apply(nn.Module):
    """A norm and a function of its output."""

    def __init__(self, function, norm=None):
        super().__init__()
        self.norm = nn.BatchNorm2d(C) if norm is None else norm
        self.function = function

    def forward(self, x):
        return self.function(self.norm(x))


@pytest.mark.parametrize(
    ("name", "function"), [(name, call) for name, calls in CALLS.items() for call in calls]
)
def test_functional_and_method_forms_are_folded(name, function):
    report = fused_and_same(Apply(function), planes())
    assert [row.now for row in report] == ["fused forward", f"fastnorm.BatchNormAct2d({name})"]


@pytest.mark.parametrize("module", REFUSED)
def test_an_activation_that_no_fused_name_covers_is_skipped(module):
    for model in (nn.Sequential(nn.BatchNorm2d(C), module), Apply(module)):
        before = snapshot(model)
        report = fuse_(model)
        assert report.changed == 0
        assert type(module).__name__ in next(iter(reasons(report).values()))
        assert_untouched(model, before)


def leaky_relu_02(x):
    return F.leaky_relu(x, 0.2)


def elu_2(x):
    return F.elu(x, alpha=2.0)


def clamp(x):
    return x.clamp(0)


def two_uses(x):
    return torch.relu(x) + x


def add_number(x):
    return x + 1.0


def add_scaled(x):
    return torch.add(x, x, alpha=2)


def add_size(x):
    return x + x.size(0)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (leaky_relu_02, "no fused activation has the parameters of leaky_relu(negative_slope=0.2)"),
        (elu_2, "no fused activation has the parameters of elu(alpha=2.0)"),
        (F.softplus, "followed by softplus"),
        (clamp, "followed by clamp"),
        (two_uses, "its output has 2 users"),
        (add_number, "followed by add"),
        (add_scaled, "followed by add"),
        (add_size, "its output has 2 users"),
    ],
)
def test_a_function_that_no_fused_name_covers_is_skipped(function, why):
    assert reasons(fuse_(Apply(function))) == {"norm": why}


def plus(out, identity):
    return out + identity


def plus_on_the_left(out, identity):
    return identity + out


def add_method(out, identity):
    return out.add(identity)


def add_method_in_place(out, identity):
    return out.add_(identity)


@pytest.mark.parametrize(
    "add", [plus, plus_on_the_left, in_place, torch.add, add_method, add_method_in_place]
)
@pytest.mark.parametrize("shortcut", [False, True])
def test_residual_blocks(add, shortcut):
    model = Residual(
        add, nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)) if shortcut else None
    )
    report = fused_and_same(model, planes())
    now = {row.name: row.now for row in report}
    assert now["bn1"] == "fastnorm.BatchNormAct2d(relu)"
    assert now["bn2"] == "fastnorm.BatchNormAct2d(relu, residual)"
    assert now[""] == "fused forward"


class TwoNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(C), nn.BatchNorm2d(C)

    def forward(self, x, y):
        return torch.relu(self.a(x) + self.b(y))


def test_of_two_norms_that_are_added_one_takes_the_other_as_residual():
    report = fused_and_same(TwoNorms(), planes(), planes(1))
    assert {row.name: row.now for row in report}["a"] == "fastnorm.BatchNormAct2d(relu, residual)"
    assert reasons(report) == {"b": "followed by BatchNorm2d"}


def test_an_addition_alone_is_folded():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(C)

        def forward(self, x):
            return x + self.norm(x)

    report = fused_and_same(Linear(), planes())
    assert report.rows[-1].now == "fastnorm.BatchNormAct2d(identity, residual)"


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm, self.drop = nn.Linear(C, C), nn.LayerNorm(C), nn.Dropout(0.0)

    def forward(self, hidden, x):
        return F.gelu(self.norm(self.drop(self.dense(hidden)) + x))


def test_the_sum_before_a_layer_norm_and_the_activation_after_it():
    report = fused_and_same(PostNorm(), torch.randn(4, C), torch.randn(4, C))
    assert report.rows[-1].now == "fastnorm.LayerNorm(gelu, residual)"


def test_a_broadcast_residual_keeps_its_numbers():
    fused_and_same(PostNorm(), torch.randn(4, C), torch.randn(1, C))
    fused_and_same(PostNorm(), torch.randn(1, C), torch.randn(4, C))
    fused_and_same(TwoNorms(), planes(), planes(1)[:, :, :1, :1])
    fused_and_same(TwoNorms(), planes()[:, :, :1, :1], planes(1))
