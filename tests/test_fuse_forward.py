"""The forward that fuse_ binds to an instance, shared parts, and calls in every order."""

import copy
import inspect
import io
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastnorm import fuse
from fastnorm.fuse import fuse_
from fastnorm.modules import activation
from fastnorm.replace import replace_, restore_
from tests.twins import (
    C,
    Residual,
    Users,
    assert_same_numbers,
    assert_untouched,
    fused_and_same,
    in_place,
    planes,
    reasons,
    snapshot,
)


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


class Idle(Residual):
    """Layers that do nothing between the norms, the addition and the activations, as timm has
    drop layers."""

    def __init__(self, between=nn.Identity, layers=nn.BatchNorm2d):
        super().__init__(in_place)
        self.drop1, self.drop2, self.drop3 = between(), between(), nn.Identity()
        self.bn1, self.bn2 = layers(C), layers(C)

    def forward(self, x):
        y = self.relu(self.drop3(self.drop1(self.bn1(x))))
        y = self.drop2(self.bn2(y))
        return self.relu(self.drop3(y + x))


def test_identities_are_stepped_over():
    model = Idle()
    assert [row.now for row in fused_and_same(model, planes())] == [
        "fused forward",
        "fastnorm.BatchNormAct2d(relu)",
        "fastnorm.BatchNormAct2d(relu, residual)",
    ]
    fuse_(model)
    assert not [name for name in ("drop", "relu") if name in model.forward.source]


def test_a_layer_put_in_the_place_of_an_identity_is_noticed():
    model = Idle()
    fuse_(model)
    model.drop2 = nn.Dropout()
    with pytest.raises(RuntimeError, match=r"drop2 was Identity\(\) when fuse_ traced Idle"):
        model(planes())
    restore_(model)
    model(planes())


def test_identities_that_do_something_are_not_stepped_over():
    class Doubles(nn.Identity):
        def forward(self, x):
            return 2 * x

    report = fuse_(Idle(Doubles))
    assert reasons(report) == {"bn1": "followed by Doubles", "bn2": "followed by Doubles"}
    model = Idle()
    model.drop1.register_forward_hook(lambda *arguments: None)
    model.drop2.forward = lambda x: 2 * x
    before = snapshot(model)
    report = fuse_(model)
    assert reasons(report) == {"bn1": "followed by Identity", "bn2": "followed by Identity"}
    assert_untouched(model, before)


def test_an_identity_whose_output_has_two_users_ends_the_search():
    class Two(Users):
        def __init__(self):
            super().__init__()
            self.idle = nn.Identity()

        def forward(self, x):
            y = self.idle(self.norm(x))
            return self.act(y) + y

    assert reasons(fuse_(Two())) == {"norm": "its output has 2 users"}


def test_identities_after_a_layer_norm_are_stepped_over():
    model = Idle(layers=lambda channels: nn.LayerNorm(4))
    report = fused_and_same(model, planes())
    # the second is followed by an addition, which layer norm takes before it alone
    assert [(row.name, row.now) for row in report if not row.why_skipped] == [
        ("", "fused forward"),
        ("bn1", "fastnorm.LayerNorm(relu)"),
    ]
    assert reasons(report) == {"bn2": "followed by add"}


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


class Block(Residual):
    """At module level, so that it can be pickled."""

    def __init__(self):
        super().__init__(torch.add)


def test_hooks_on_the_parent_fire_and_hooks_on_one_activation_leave_the_other():
    model, seen = Residual(in_place), []
    model.register_forward_hook(lambda *arguments: seen.append(1))
    fuse_(model)
    model(planes())
    assert seen == [1]


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


def test_torch_compile():
    model = Residual(in_place)
    fuse_(model)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(planes()), twin(planes()))


def test_threads_and_profilers_are_left_as_they_were():

    def profiler(*arguments):
        return None

    sys.setprofile(profiler)
    try:
        fuse_(Residual(in_place))
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)


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


def test_the_train_flag_of_a_folded_activation_follows():
    model = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
    fuse_(model)
    model.eval()
    restore_(model)
    assert not model[1].training


def test_frozen_norms_stay_frozen():
    model = nn.Sequential(nn.BatchNorm2d(C).requires_grad_(False), nn.ReLU())
    fuse_(model)
    model(planes().requires_grad_()).sum().backward()
    assert model[0].weight.grad is None


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


def test_a_parent_that_walks_its_sequential_keeps_its_numbers():
    class Walks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())

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


def test_a_layer_of_torch_with_optional_arguments():
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(C, 2, 8, dropout=0.0).double()
    twin = copy.deepcopy(model)
    assert [row.now for row in fuse_(model)][1:] == ["fastnorm.LayerNorm(residual)"] * 3
    x, memory = torch.randn(2, 5, 3, C, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    for options in ({}, {"tgt_mask": mask}, {"tgt_mask": mask, "tgt_is_causal": True}):
        torch.testing.assert_close(model(x, memory, **options), twin(x, memory, **options))
    model.norm_first = True
    with pytest.raises(RuntimeError, match="norm_first was False"):
        model(x, memory)
