"""fuse_ on sums that a layer norm and something after it use, as in pre-norm transformers."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastnorm
from fastnorm.fuse import fuse_
from fastnorm.modules import layer_norm
from fastnorm.replace import replace_, restore_
from tests.conftest import AVAILABLE
from tests.layers import torch_warns
from tests.twins import C, assert_same_numbers, assert_untouched, fused_and_same, reasons, snapshot


def rows(seed=0):
    return torch.randn(3, 5, C, generator=torch.Generator().manual_seed(seed))


class Parts(nn.Module):
    """The parts of a block; how they are put together is the parameter."""

    def __init__(self, forward, between=nn.Identity):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.mix, self.mlp = nn.Linear(C, C), nn.Linear(C, C)
        self.drop1, self.drop2 = between(), between()
        self.put = forward

    def forward(self, x):
        return self.put(self, x)


def pre_norm(self, x):
    x = x + self.drop1(self.mix(self.norm1(x)))
    return x + self.drop2(self.mlp(self.norm2(x)))


def pre_norm_on_the_left(self, x):
    x = self.drop1(self.mix(self.norm1(x))) + x
    return self.drop2(self.mlp(self.norm2(x))).add_(x)


def residual_by_name(self, x):
    residual = x
    x = self.mix(self.norm1(x))
    x = residual.add(x)
    residual = x
    y = self.mlp(self.norm2(x))
    return torch.add(residual, y)


def used_before_the_norm(self, x):
    s = x + self.mix(self.norm1(x))
    gate = torch.sigmoid(self.drop1(s))
    return self.mlp(self.norm2(s)) * gate


def given_back(self, x):
    s = x + self.mix(self.norm1(x))
    return torch.cat((self.norm2(s), s), -1)


def with_an_activation(self, x):
    s = x + self.mix(self.norm1(x))
    return s + self.mlp(F.gelu(self.norm2(s)))


@pytest.mark.parametrize(
    "forward",
    [pre_norm, pre_norm_on_the_left, residual_by_name, used_before_the_norm, given_back],
)
def test_a_sum_that_is_used_again_is_written_by_the_norm(forward):
    report = fused_and_same(Parts(forward), rows())
    assert {row.name: row.now for row in report if not row.why_skipped} == {
        "": "fused forward",
        "norm2": "fastnorm.LayerNorm(residual, sum)",
    }


def test_an_activation_is_folded_beside_the_sum():
    report = fused_and_same(Parts(with_an_activation), rows())
    assert report.rows[-1].now == "fastnorm.LayerNorm(gelu, residual, sum)"


def names_of_graph(y):
    """Every node of a backward graph."""
    found, nodes = [], [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.append(node)
            nodes += [following for following, _ in node.next_functions]
    return sorted(type(node).__name__ for node in found)


def test_no_addition_is_left_in_the_graph_and_the_sum_is_kept_once():
    model = Parts(pre_norm)
    x = rows().requires_grad_()
    replace_(model)
    with fastnorm.backend("reference"):
        assert names_of_graph(model(x)).count("AddBackward0") == 2
        fuse_(model)
        y = model(x)
    assert names_of_graph(y).count("AddBackward0") == 1  # the last one, which no norm follows
    assert names_of_graph(y).count("LayerNormFunctionBackward") == 2
    kept = []
    with (
        fastnorm.backend("reference"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        model(x)
    # input, two outputs of norms, the sum: all that is of x's shape
    whole = {t.data_ptr() for t in kept if t.numel() == x.numel()}
    assert len(whole) == 4


def test_the_norm_stands_before_the_first_use_of_the_sum():
    model = Parts(used_before_the_norm)
    fuse_(model)
    source = model.forward.source
    assert source.index("self.norm2(") < source.index("self.drop1(")
    model = Parts(pre_norm)
    fuse_(model)
    assert " + " in model.forward.source  # the second sum
    assert "self.norm2(x, drop1, True)" in model.forward.source


@pytest.mark.parametrize("between", [nn.Dropout, lambda: nn.Dropout(0.9)])
def test_dropout_draws_the_same_numbers(between):
    model = Parts(pre_norm, between)
    twin = copy.deepcopy(model)
    fuse_(model)
    for training in (True, False):
        found = []
        for net in (model, twin):
            torch.manual_seed(3)
            found.append(net.train(training)(rows()))
        assert torch.equal(*found)


def sum_changed_between(self, x):
    s = x + self.mix(x)
    s.mul_(2)
    return s + self.mlp(self.norm2(s))


def term_changed_between(self, x):
    t = self.mix(x)
    s = x + t
    t.mul_(2)
    return s + t + self.mlp(self.norm2(s))


def added_in_place(self, x):
    t = self.mix(x)
    t += x
    return t + self.mlp(self.norm2(t))


def scaled(self, x):
    s = torch.add(x, self.mix(x), alpha=2)
    return s + self.mlp(self.norm2(s))


@pytest.mark.parametrize(
    "forward", [sum_changed_between, term_changed_between, added_in_place, scaled]
)
def test_sums_that_are_no_sum_of_two_tensors_stay(forward):
    model = Parts(forward)
    before = snapshot(model)
    report = fuse_(model)
    assert report.changed == 0
    assert reasons(report)["norm2"] == "followed by Linear"
    assert_untouched(model, before)


def test_a_sum_that_is_changed_in_place_after_the_norm():
    def forward(self, x):
        x = x + self.mix(x)
        y = self.mlp(self.norm2(x))
        x += y
        return x

    model = Parts(forward)
    twin = copy.deepcopy(model)
    fuse_(model)
    with torch.no_grad():
        assert torch.equal(model(rows()), twin(rows()))
    for net in (model, twin):  # a layer norm keeps its input for backward
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            net(rows()).sum().backward()


def test_hooks_on_the_norm_or_the_activation_leave_the_sum():
    model = Parts(pre_norm)
    model.norm2.register_forward_hook(lambda *arguments: None)
    assert reasons(fuse_(model))["norm2"] == "hooks on the norm"
    shared = nn.LayerNorm(C)
    model = Parts(pre_norm)
    model.norm1 = model.norm2 = shared
    assert reasons(fuse_(model)) == {"norm1": "shared by 2 places of the model"}


def two_norms(self, x):
    """As in parallel blocks: the first writes the sum, the second reads it."""
    s = x + self.mix(x)
    return s + self.mlp(self.norm1(s)) + self.norm2(s)


def test_of_two_norms_of_one_sum_the_first_writes_it():
    report = fused_and_same(Parts(two_norms), rows())
    assert {row.name: row.now for row in report}["norm1"] == "fastnorm.LayerNorm(residual, sum)"
    assert list(reasons(report)) == ["norm2"]


class Asserts(Parts):
    """As torchvision's EncoderBlock."""

    def __init__(self):
        super().__init__(pre_norm)
        self.attention = nn.MultiheadAttention(C, 2, batch_first=True)

    def forward(self, x):
        torch._assert(x.dim() == 3, f"expected three dimensions, got {x.shape}")
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        x = x + self.drop1(y)
        return x + self.mlp(self.norm2(x))


def test_an_assertion_keeps_its_text():
    model = Asserts()
    twin = copy.deepcopy(model)
    report = fused_and_same(model, rows())
    assert [row.now for row in report if not row.why_skipped][1:] == [
        "fastnorm.LayerNorm(residual, sum)"
    ]
    fuse_(model)
    texts = []
    for net in (model, twin):
        with pytest.raises(AssertionError) as raised:
            net(rows()[0].double())
        texts.append(str(raised.value))
    assert texts[0] == texts[1] == f"expected three dimensions, got {rows()[0].shape}"


class Block(nn.Module):
    """At module level, so that it can be pickled."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.mix, self.mlp = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x):
        x = x + self.mix(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_deepcopy_pickle_and_restore():
    model = nn.Sequential(Block(), Block())
    before = snapshot(model)
    assert fuse_(model).changed == 4
    expected = model(rows())
    file = io.BytesIO(pickle.dumps(model))
    for twin in (copy.deepcopy(model), pickle.load(file)):
        assert torch.equal(twin(rows()), expected)
        restore_(twin)
        assert type(twin[0].norm2) is nn.LayerNorm
        assert torch.equal(twin(rows()), expected)
    restore_(model)
    assert_untouched(model, before)


@torch_warns
@pytest.mark.parametrize("backend", ["auto", "reference"], indirect=True)
def test_a_compiled_block_is_one_graph(backend):
    model = Asserts()
    fuse_(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for x in (rows(), rows(1)):
        torch.testing.assert_close(compiled(x), model(x))
        compiled(x).sum().backward()


@pytest.mark.parametrize("backend", AVAILABLE, indirect=True)
def test_on_every_backend_with_its_gradients(backend, device):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).to(device, torch.float64)
    twin = copy.deepcopy(model)
    replace_(model)
    fuse_(model)
    assert type(model[0].norm2) is layer_norm.LayerNorm
    assert_same_numbers(model, twin, rows().to(device))


def test_the_numbers_of_a_decoder_layer_of_torch():
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(C, 2, 8, dropout=0.0, norm_first=True).double()
    twin = copy.deepcopy(model)
    assert [row.now for row in fuse_(model) if not row.why_skipped][1:] == [
        "fastnorm.LayerNorm(residual, sum)"
    ] * 2
    x, memory = torch.randn(2, 5, 3, C, dtype=torch.float64)
    torch.testing.assert_close(model(x, memory), twin(x, memory))


def test_a_model_that_cannot_be_traced_says_so():
    class Asks(Block):
        def forward(self, x, mask=None):
            x = x + self.mix(self.norm1(x))
            if isinstance(mask, torch.Tensor):
                x = x * mask
            return x + self.mlp(self.norm2(x))

    report = fuse_(nn.Sequential(Asks()))
    assert report.changed == 0
    assert reasons(report)["0.norm2"].startswith("Asks: its forward asks 'isinstance(mask")


@torch_warns
@pytest.mark.parametrize("backend", ["auto", *AVAILABLE], indirect=True)
def test_a_stream_in_fp32_under_autocast(backend, device):
    """The sum of fp32 and what a linear layer gives: its dtype, that of y, and one call."""
    torch.manual_seed(0)
    model = Block().to(device)
    twin = copy.deepcopy(model)
    replace_(model)
    fuse_(model)
    found = []
    for net in (model, twin):
        x = rows().to(device).requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            y = net(x)
        assert y.dtype is torch.float32
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in net.parameters())])
    if backend != "auto":
        names = names_of_graph(model(x))
        assert names.count("LayerNormFunctionBackward") == 2
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype is theirs.dtype
        # linear layers round to bf16: a value that lies between two may take either
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
