"""A model changed by surgery beside its untouched twin, as the tests of surgery compare them."""

import copy

import torch
from torch import nn

from fastnorm import dispatch
from fastnorm.fuse import fuse_
from fastnorm.replace import restore_


def snapshot(model):
    """Everything that a surgery could leave behind."""
    return {
        name: (type(module), dict(module.__dict__), list(module._modules.items()))
        for name, module in model.named_modules(remove_duplicate=False)
    }


def assert_untouched(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (cls, attributes, children) in after.items():
        assert cls is before[name][0], name
        assert attributes.keys() == before[name][1].keys(), name
        assert all(attributes[key] is before[name][1][key] for key in attributes), name
        assert children == before[name][2], name


C = 6


def planes(seed=0):
    return torch.randn(3, C, 4, 4, generator=torch.Generator().manual_seed(seed))


def assert_same_numbers(model, twin, *inputs):
    """Outputs, gradients and buffers of a model and its untouched twin, in training and eval."""
    # in fp64: the gradient of a bias before a batch norm is zero, rounding would be all it has
    inputs = [x.double() for x in inputs]
    model.double()
    twin.double()
    for training in (True, False):
        results = []
        for net in (model, twin):
            net.train(training).zero_grad()
            xs = [x.clone().requires_grad_() for x in inputs]
            y = net(*[x.clone() for x in xs])
            (y * torch.linspace(0, 1, y.numel()).view_as(y)).sum().backward()
            results.append(
                [y, *(x.grad for x in xs), *(p.grad for p in net.parameters()), *net.buffers()]
            )
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    model.train()
    twin.train()


def fused_and_same(model, *inputs):
    """fuse_, compare with a twin under auto and forced reference, restore_ without a trace."""
    twin = copy.deepcopy(model.double())
    before = snapshot(model)
    report = fuse_(model)
    assert report.changed > 0, report
    assert list(model.state_dict()) == list(twin.state_dict())
    assert_same_numbers(model, twin, *inputs)
    with dispatch.backend("reference"):
        assert_same_numbers(model, twin, *inputs)
    restore_(model)
    assert_untouched(model, before)
    return report


def reasons(report):
    return {row.name: row.why_skipped for row in report if row.why_skipped}


class Residual(nn.Module):
    """Two norms and a shared activation, as in ResNet; how they are added is the parameter."""

    def __init__(self, add, shortcut=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
        self.shortcut = shortcut
        self.relu = nn.ReLU(inplace=True)
        self.add = add

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            identity = self.shortcut(x)
        return self.relu(self.add(out, identity))


def in_place(out, identity):
    out += identity
    return out


class Users(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(C), nn.ReLU()

    def forward(self, x):
        y = self.norm(x)
        return self.act(y) + y
