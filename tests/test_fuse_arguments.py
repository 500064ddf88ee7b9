"""What the forward that fuse_ binds makes of decorators, ``**kwargs`` and optional arguments."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from fastnorm.fuse import fuse_
from fastnorm.replace import restore_
from tests.layers import torch_warns
from tests.test_fuse_sum import Block, rows
from tests.twins import Users, assert_untouched, fused_and_same, planes, reasons, snapshot


def documented(function):
    function.__doc__ = "scales"
    return function


def lost(function):
    """A decorator that does not say what it wraps."""

    def forward(self, x):
        return 2 * function(self, x)

    return forward


class Documented(Users):
    @documented
    def forward(self, x):
        return self.act(self.norm(x))


class Lost(Users):
    @lost
    def forward(self, x):
        return self.act(self.norm(x))


def test_a_decorator_that_gives_back_the_forward_is_nothing_to_a_trace():
    fused_and_same(Documented(), planes())
    assert "decorated with lost" in reasons(fuse_(Lost()))["norm"]


class Scales(nn.Module):
    def forward(self, x, scale=1.0, shift=0.0):
        return x * scale + shift


class HandsOn(Users):
    def __init__(self):
        super().__init__()
        self.scales = Scales()

    def forward(self, x, shift=0.5, **options):
        return self.scales(self.act(self.norm(x)), shift=shift, **options)


def test_keywords_that_are_only_handed_on():
    fused_and_same(HandsOn(), planes())
    model = HandsOn()
    twin = copy.deepcopy(model)
    signature = inspect.signature(model.forward)
    assert fuse_(model).changed == 2
    assert inspect.signature(model.forward) == signature
    for options in ({}, {"scale": 3.0}, {"shift": 1.0, "scale": 2.0}):
        for net in (model, copy.deepcopy(model)):
            assert torch.equal(net.eval()(planes(), **options), twin.eval()(planes(), **options))
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        model(planes(), other=1)


class Masked(Block):
    def forward(self, x, mask=None, other=None, scale=1.0):
        x = x + self.mix(self.norm1(x)) * scale
        if mask is not None:
            x = self.norm1(x * mask) + x
        if other is None:
            return x + self.mlp(self.norm2(x))
        return x + self.mlp(self.norm2(x + other))


def test_the_own_forward_serves_calls_with_what_was_none_in_the_trace():
    model = Masked()
    twin, before = copy.deepcopy(model), snapshot(model)
    report = fused_and_same(Masked(), rows())
    assert [row.now for row in report if not row.why_skipped] == [
        "fused forward where mask is None and other is None",
        "fastnorm.LayerNorm(residual, sum)",
    ]
    assert fuse_(model).changed == 2
    called = []
    model.forward.function = lambda *arguments, **named: (
        called.append(1) or twin.forward(*arguments[1:], **named)
    )
    x, y = rows(), rows(1)
    for fused, args, kwargs in (
        (True, (x,), {}),
        (True, (x, None, None, 2.0), {}),
        (True, (), {"x": x, "mask": None}),
        (False, (x, y), {}),
        (False, (x,), {"mask": y}),
        (False, (x, None, y), {}),
        (False, (x, None), {"other": y, "scale": 3.0}),
    ):
        called.clear()
        assert torch.equal(model(*args, **kwargs), twin(*args, **kwargs))
        assert called == [1] * fused
    restore_(model)
    assert_untouched(model, before)
    fuse_(model)
    for net in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        for args in ((x,), (x, y), (x, None, y, 2.0)):
            torch.testing.assert_close(net(*args), twin(*args), rtol=0, atol=0)


def test_an_argument_that_is_given_another_value_is_no_such_argument():
    class Makes(Block):
        def forward(self, x, mask=None):
            x = x + self.mix(self.norm1(x))
            mask = self.mlp(x) if mask is None else mask
            return x * mask + self.mlp(self.norm2(x))

    assert reasons(fuse_(Makes()))["norm2"] == "Makes: its forward tests 'mask is None'"


@torch_warns
def test_a_compiled_block_with_an_optional_argument():
    model = Masked()
    fuse_(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for args in ((rows(),), (rows(), rows(1)), (rows(2),)):
        torch.testing.assert_close(compiled(*args), model(*args))
