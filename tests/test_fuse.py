"""fuse_: what is folded into a norm, what is left alone and why, and that restore_ undoes it."""

import collections
import copy
import inspect
import io
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastnorm import dispatch
from fastnorm.fuse import fuse_
from fastnorm.modules import activation, batch_norm, layer_norm
from fastnorm.replace import replace_, restore_
from tests.test_replace import assert_untouched, snapshot

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


class Users(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(C), nn.ReLU()

    def forward(self, x):
        y = self.norm(x)
        return self.act(y) + y


class Twice(Users):
    def forward(self, x):
        return self.act(self.norm(self.act(self.norm(x))))


class ReadsTraining(Users):
    def forward(self, x):
        return F.dropout(self.act(self.norm(x)), 0.5, training=self.training)


class ReadsChildTraining(Users):
    def forward(self, x):
        return F.dropout(self.act(self.norm(x)), 0.5, training=self.norm.training)


class ReadsTrainingByProperty(Users):
    @property
    def learning(self):
        return getattr(self, "train" + "ing")

    def forward(self, x):
        return F.dropout(self.act(self.norm(x)), 0.5, training=self.learning)


class DataDependent(Users):
    def forward(self, x):
        return self.act(self.norm(x)) if x.sum() > 0 else x


class AsksType(Users):
    def forward(self, x):
        if isinstance(x, (tuple, list)):
            x = torch.cat(x)
        return self.act(self.norm(x))


class AsksNone(Users):
    def forward(self, x, mask=None):
        y = self.act(self.norm(x))
        return y if mask is None else y * mask


class StarArguments(Users):
    def forward(self, *xs):
        return self.act(self.norm(xs[0]))


class KeywordArguments(Users):
    def forward(self, x, **options):
        return self.act(self.norm(x))


class Context(Users):
    def forward(self, x):
        with torch.no_grad():
            return self.act(self.norm(x))


class Decorated(Users):
    @torch.no_grad()
    def forward(self, x):
        return self.act(self.norm(x))


class PythonRandom(Users):
    def forward(self, x):
        return self.act(self.norm(x)) if random.random() < 2 else x


class TorchRandom(Users):
    def forward(self, x):
        return self.act(self.norm(x)) * torch.rand(1)


class AsksProcess(Users):
    def forward(self, x):
        return self.act(self.norm(x)) if torch.is_grad_enabled() else x


class Counts(Users):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.act(self.norm(x))


class ReadsConfig(Users):
    def __init__(self):
        super().__init__()
        self.config = {"act": True}

    def forward(self, x):
        return self.act(self.norm(x)) if self.config["act"] else x


class Checkpointed(Users):
    def _inner(self, x):
        return self.act(self.norm(x))

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self._inner, x, use_reentrant=False)


class Catches(Users):
    def forward(self, x):
        try:
            if x.sum() > 0:
                x = x + 1
        except Exception:
            x = x + 2
        return self.act(self.norm(x))


class ReturnsOrderedDict(Users):
    def forward(self, x):
        return collections.OrderedDict(x=self.act(self.norm(x)))


class IntoShortcut(Users):
    def forward(self, x):
        y = x * 1
        z = y
        y += self.norm(x)
        return self.act(y) + z


SKIPPED = [
    (Users, "users"),
    (Twice, "called 2 times"),
    (ReadsTraining, "training"),
    (ReadsChildTraining, "training"),
    (ReadsTrainingByProperty, "training"),
    (DataDependent, "TraceError"),
    (AsksType, "isinstance"),
    (AsksNone, "mask is None"),
    (StarArguments, r"takes \*xs"),
    (KeywordArguments, r"takes \*\*options"),
    (Context, "with statement"),
    (Decorated, "decorated"),
    (PythonRandom, "random"),
    (TorchRandom, "rand on no input"),
    (AsksProcess, "is_grad_enabled"),
    (Counts, "sets calls"),
    (ReadsConfig, "reads config"),
    (Checkpointed, "which a trace would lose"),
    (Catches, "try"),
    (ReturnsOrderedDict, "a OrderedDict would become a plain container"),
    (IntoShortcut, "in place into another tensor"),
]


@pytest.mark.parametrize(("cls", "why"), SKIPPED)
def test_forwards_that_a_trace_would_change_are_skipped(cls, why):
    # beside it, a Sequential that can be fused: the rest goes on
    model = nn.ModuleDict({"odd": cls(), "plain": nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())})
    before = snapshot(model["odd"])
    report = fuse_(model)
    assert report.changed == 2
    assert list(reasons(report)) == ["odd.norm"]
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(reasons(report)["odd.norm"])
    assert_untouched(model["odd"], before)


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
@pytest.mark.parametrize("part", [0, 1])
def test_hooks_on_either_part_are_respected(register, part):
    model = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
    getattr(model[part], register)(lambda *arguments: None)
    report = fuse_(model)
    assert "hooks on the" in reasons(report)["0"]
    assert report.changed == 0
    parent = Residual(in_place)
    getattr((parent.bn1, parent.relu)[part], register)(lambda *arguments: None)
    assert "hooks on the" in reasons(fuse_(parent))["bn1"]


def test_hooks_on_the_parent_fire_and_hooks_on_one_activation_leave_the_other():
    model, seen = Residual(in_place), []
    model.register_forward_hook(lambda *arguments: seen.append(1))
    fuse_(model)
    model(planes())
    assert seen == [1]


def test_shared_norms_are_skipped_and_shared_activations_are_not():
    norm, act = nn.BatchNorm2d(C), nn.ReLU()
    model = nn.Sequential(
        nn.Sequential(norm, act),
        nn.Sequential(norm, act),
        nn.Sequential(nn.BatchNorm2d(C), act),
        act,
    )
    report = fused_and_same(model, planes())
    assert reasons(report) == {"0.0": "shared by 2 places of the model"}
    assert report.changed == 2


def test_the_same_block_in_two_places():
    block = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
    assert fused_and_same(nn.Sequential(block, block), planes()).changed == 2


class Taps(nn.Module):
    """Collects outputs inside its Sequential."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())

    def forward(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return torch.cat(outputs)


def test_a_norm_whose_output_leaves_its_sequential_is_skipped():
    assert reasons(fuse_(Taps())) == {"layers.0": "its output is used outside its Sequential"}


def test_a_parent_that_walks_its_sequential_keeps_its_numbers():
    class Walks(Taps):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    assert fused_and_same(Walks(), planes()).changed == 2


def test_norms_in_a_module_list_belong_to_the_module_that_calls_them():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.BatchNorm2d(C), nn.BatchNorm2d(C)])

        def forward(self, x):
            for norm in self.norms:
                x = F.silu(norm(x))
            return x

    assert fused_and_same(Listed(), planes()).changed == 3


def test_a_norm_by_itself_and_other_models():
    assert reasons(fuse_(nn.BatchNorm2d(C))) == {"": "it is the model itself: nothing follows it"}
    assert len(fuse_(nn.Linear(2, 2))) == 0
    with pytest.raises(TypeError, match=r"torch\.nn\.Module in place, got int"):
        fuse_(3)


class Guarded(Users):
    def __init__(self):
        super().__init__()
        self.scale = 2.0

    def forward(self, x, shift=0.5):
        return self.act(self.norm(x)) * self.scale + shift


def test_a_plain_attribute_is_a_guard_and_optional_numbers_stay_optional():
    model = Guarded()
    twin = copy.deepcopy(model)
    signature = inspect.signature(model.forward)
    fuse_(model)
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model(planes(), shift=1.5), twin(planes(), shift=1.5))
    model.scale = 3.0
    with pytest.raises(
        RuntimeError, match=r"scale was 2\.0 when fuse_ traced Guarded\.forward and is 3\.0 now"
    ):
        model(planes())
    restore_(model)
    model(planes())


def test_what_was_put_in_the_place_of_a_folded_part_is_noticed():
    model = Residual(in_place)
    fuse_(model)
    model.relu = nn.GELU()
    with pytest.raises(RuntimeError, match=r"relu was ReLU\(inplace=True\) when fuse_ traced"):
        model(planes())
    model = Residual(in_place)
    fuse_(model)
    model.bn1 = nn.SyncBatchNorm(C)
    with pytest.raises(RuntimeError, match=r"bn1\.activation was 'relu' .* and is 'missing' now"):
        model(planes())


def test_argument_names_survive():
    class Named(Users):
        def forward(self, input: torch.Tensor, other: "torch.Tensor") -> "torch.Tensor":
            return self.act(self.norm(input)) + other

    model = Named()
    twin = copy.deepcopy(model)
    assert fuse_(model).changed == 2
    assert torch.equal(
        model(other=planes(1), input=planes()), twin(other=planes(1), input=planes())
    )


class Aliases(Users):
    def forward(self, x):
        y = self.act(self.norm(x)) * 1
        z = y
        y *= 2
        y.add_(1)
        return y + z


def test_in_place_operations_on_aliases_stay_in_place():
    fused_and_same(Aliases(), planes())


class MutatedBetween(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x):
        x = x * 1
        y = self.norm(x)
        x.mul_(3)
        return torch.relu(y + x)


def test_a_norm_is_not_moved_behind_a_change_of_its_input():
    assert "in-place operation" in reasons(fuse_(MutatedBetween()))["norm"]


def test_calls_are_idempotent_and_combine_with_replace():
    x = planes()
    model = nn.Sequential(Residual(in_place), nn.BatchNorm2d(C), nn.GELU(), nn.LayerNorm(4))
    twin, before = copy.deepcopy(model), snapshot(model)
    fuse_(model)
    fused = snapshot(model)
    assert fuse_(model).changed == 0
    assert_untouched(model, fused)
    assert [row.name for row in replace_(model)] == ["3"]
    assert_same_numbers(model, twin, x)
    restore_(model)
    assert_untouched(model, before)
    replace_(model)
    assert type(model[2]) is activation.GELU
    assert fuse_(model).changed == 5
    assert_same_numbers(model, twin, x)
    restore_(model)
    assert_untouched(model, before)


def test_dry_run_and_filter_fn():
    model = nn.Sequential(Residual(in_place), nn.BatchNorm2d(C), nn.GELU())
    before = snapshot(model)
    dry = fuse_(model, dry_run=True)
    assert_untouched(model, before)
    assert dry.rows == fuse_(copy.deepcopy(model)).rows
    report = fuse_(model, filter_fn=lambda norm, name: name == "0.bn2")
    assert [row.name for row in report if not row.why_skipped] == ["0", "0.bn2"]
    assert reasons(report) == {"0.bn1": "left out by filter_fn", "1": "left out by filter_fn"}
    assert reasons(fuse_(model))["0.bn1"].endswith("is fused: restore_ first to fuse more")


def test_nothing_is_half_changed_when_a_call_fails(monkeypatch):
    from fastnorm import fuse

    class Slotted(nn.BatchNorm2d):
        __slots__ = ("slot",)

    model = nn.Sequential(
        Residual(in_place), nn.LayerNorm(4), nn.GELU(), nn.BatchNorm2d(C), nn.GELU()
    )
    before = snapshot(model)
    monkeypatch.setitem(fuse._NORMS, nn.BatchNorm2d, Slotted)
    with pytest.raises(TypeError, match="layout"):
        fuse_(model)
    assert_untouched(model, before)


def test_frozen_norms_stay_frozen():
    model = nn.Sequential(nn.BatchNorm2d(C).requires_grad_(False), nn.ReLU())
    fuse_(model)
    model(planes().requires_grad_()).sum().backward()
    assert model[0].weight.grad is None


class Block(Residual):
    """At module level, so that it can be pickled."""

    def __init__(self):
        super().__init__(torch.add)


def test_the_forward_follows_deepcopy_and_pickle():
    model = nn.Sequential(Block(), nn.BatchNorm2d(C), nn.Hardswish())
    before = snapshot(model)
    fuse_(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    )
    expected = model.eval()(planes())
    for twin in twins:
        assert twin[0].forward.module is twin[0]
        assert torch.equal(twin.eval()(planes()), expected)
        with torch.no_grad():
            twin[0].bn2.bias.add_(1.0)
        assert not torch.equal(twin(planes()), expected)
        restore_(twin)
        assert twin[0].__dict__.keys() == before["0"][1].keys()
        assert type(twin[2]) is nn.Hardswish
    assert torch.equal(model(planes()), expected)


def test_the_train_flag_of_a_folded_activation_follows():
    model = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
    fuse_(model)
    model.eval()
    restore_(model)
    assert not model[1].training


def test_torch_compile():
    model = Residual(in_place)
    fuse_(model)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(planes()), twin(planes()))


def test_threads_and_profilers_are_left_as_they_were():
    import sys

    def profiler(*arguments):
        return None

    sys.setprofile(profiler)
    try:
        fuse_(Residual(in_place))
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)
