"""A weight-normed model, alone and grouped: what the tests of fastnorm.weight_norm_ share."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

import fastnorm
from fastnorm.ops.weight_norm import group as family


class Model(nn.Module):
    """Several dims, a layer that is used twice, and one that is not used."""

    def __init__(self, wrap=fastnorm.weight_norm):
        super().__init__()
        self.first = wrap(nn.Conv1d(3, 8, 3, padding=1))
        self.twice = wrap(nn.Conv1d(8, 8, 3, padding=1), dim=1)
        self.up = wrap(nn.ConvTranspose1d(8, 4, 2), dim=None)
        self.unused = wrap(nn.Linear(4, 4))
        self.last = wrap(nn.Linear(4, 5))

    def forward(self, x):
        x = self.twice(torch.relu(self.twice(self.first(x))))
        return self.last(self.up(x).mean(2))


def twins(wrap=fastnorm.weight_norm):
    alone = Model(wrap)
    return alone, fastnorm.weight_norm_(copy.deepcopy(alone))


def assert_same_gradients(alone, grouped):
    one, other = ({name: p.grad for name, p in m.named_parameters()} for m in (alone, grouped))
    assert list(one) == list(other)
    for name, gradient in one.items():
        assert (gradient is None) == (other[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(other[name], gradient)


class _Counted:
    """An op that notes its calls, whatever way they go."""

    def __init__(self, op, name, made):
        self.op, self.name, self.made, self.way = op, name, made, op.way
        self.by = {way: functools.partial(self.call, way) for way in op.by}

    def call(self, way, *inputs):
        self.made.append((self.name, len(inputs[0])))
        return self.op.by[way](*inputs)

    def __call__(self, *inputs):
        return self.call(self.way(*inputs), *inputs)


def counted_calls(monkeypatch):
    """A list that gets (op, layers) of every call of the op pair."""
    made = []
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(family, name, _Counted(getattr(family, name), name, made))
    return made
