"""What fuse_ leaves alone, and the reason it reports."""

import collections
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastnorm.fuse import fuse_
from fastnorm.replace import replace_
from tests.twins import (
    C,
    Residual,
    Users,
    assert_untouched,
    in_place,
    reasons,
    snapshot,
)


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


class LooksIntoKeywords(Users):
    def forward(self, x, **options):
        return self.act(self.norm(x)) * options.get("scale", 1.0)


class CopiesKeywords(Users):
    def forward(self, x, **options):
        given = {**options}
        return self.act(self.norm(x), **given)


class HandsKeywordsToAMethod(Users):
    def _inner(self, x, scale=1.0, **options):
        return self.act(self.norm(x), **options) * scale

    def forward(self, x, **options):
        return self._inner(x, **options)


class HandsKeywordsToAFunction(HandsKeywordsToAMethod):
    def _inner(self, x, scale=1.0):
        return self.act(self.norm(x)) * scale


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


class Attends(nn.MultiheadAttention):
    """Its own forward is harmless, torch's, which it calls, asks what its arguments are."""

    def __init__(self):
        super().__init__(C, 2)
        self.norm = nn.LayerNorm(C)

    def forward(self, x):
        return torch.relu(self.norm(super().forward(x, x, x)[0]))


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
    (LooksIntoKeywords, r"looks into \*\*options"),
    (CopiesKeywords, r"looks into \*\*options"),
    (HandsKeywordsToAMethod, "hands on to _inner what may be an argument of it"),
    (HandsKeywordsToAFunction, "unexpected keyword argument"),
    (Context, "with statement"),
    (Decorated, "decorated"),
    (PythonRandom, "random"),
    (TorchRandom, "rand on no input"),
    (AsksProcess, "is_grad_enabled"),
    (Counts, "sets calls"),
    (ReadsConfig, "reads config"),
    (Checkpointed, "which a trace would lose"),
    (Catches, "try"),
    (Attends, "its forward tests '\\w+ is not None'"),
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


class TapsSometimes(Taps):
    def forward(self, x, mask=None):
        y = self.layers[0](x)
        z = self.layers[1](y)
        return z if mask is None else z + y


def test_a_norm_whose_output_leaves_its_sequential_in_some_calls_is_skipped():
    report = fuse_(TapsSometimes())
    assert reasons(report) == {"layers.0": "its output is used outside its Sequential"}


def test_a_norm_by_itself_and_other_models():
    assert reasons(fuse_(nn.BatchNorm2d(C))) == {"": "it is the model itself: nothing follows it"}
    assert len(fuse_(nn.Linear(2, 2))) == 0
    with pytest.raises(TypeError, match=r"torch\.nn\.Module in place, got int"):
        fuse_(3)


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


class Permuted(nn.Module):
    """As in ConvNeXt: rows of channels, of an image."""

    def __init__(self, permute):
        super().__init__()
        self.norm, self.linear, self.permute = nn.LayerNorm(C), nn.Linear(C, C), permute

    def forward(self, x):
        return self.linear(self.norm(self.permute(x)))


@pytest.mark.parametrize(
    "permute, name",
    [
        (lambda x: x.permute(0, 2, 3, 1), "permute"),
        (lambda x: torch.movedim(x, 1, -1), "movedim"),
        (lambda x: x.flatten(2).transpose(1, 2), "transpose"),
        (lambda x: x.permute(0, 2, 3, 1).contiguous(), None),
    ],
)
def test_a_layer_norm_over_a_permuted_view_is_noted(permute, name):
    report = fuse_(nn.Sequential(Permuted(permute)))
    assert [note.name for note in report.notes] == ([] if name is None else ["0.norm"])
    if name is not None:
        assert report.notes[0].text.startswith(f"its input is a view by {name}, read across its")
        assert str(report).splitlines()[-1].startswith("note: 0.norm: its input is a view")


class Permute(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


def test_a_layer_norm_after_a_layer_that_permutes_is_noted():
    model = nn.Sequential(Permute(), nn.LayerNorm(C), nn.LayerNorm(C), nn.Linear(C, C))
    report = fuse_(model)
    (note,) = report.notes
    assert note.name == "1"
    assert note.text.startswith("its input is a view by Permute, read across its")


class Rounded(nn.Module):
    """As in ConvNeXt: a layer norm between a convolution and a linear layer."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.drop, self.put = nn.Conv2d(C, C, 1), nn.Dropout(), forward
        self.norm, self.linear, self.act = nn.LayerNorm(C), nn.Linear(C, C), nn.GELU()

    def forward(self, x):
        return self.put(self, x)


def between(self, x):
    return self.linear(self.norm(self.drop(self.conv(x)).permute(0, 2, 3, 1).contiguous()))


@pytest.mark.parametrize("surgery", [fuse_, replace_])
def test_a_layer_norm_whose_output_autocast_rounds_is_noted(surgery):
    report = surgery(nn.Sequential(Rounded(between)))
    (note,) = [note for note in report.notes if "autocast" in note.text]
    assert note.name == "0.norm"
    assert "the Linear after it rounds that to half" in note.text
    in_a_row = nn.Sequential(nn.Linear(C, C), nn.Dropout(), nn.LayerNorm(C), nn.Linear(C, C))
    assert [note.name for note in surgery(in_a_row).notes] == ["2"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.norm(self.conv(x)),
        lambda self, x: self.linear(self.norm(x)),
        lambda self, x: self.linear(self.norm(self.conv(x) + x)),
        lambda self, x: self.linear(self.norm(torch.relu(self.conv(x)))),
        lambda self, x: self.linear(self.act(self.norm(self.conv(x)))),
        lambda self, x: (lambda y: self.linear(y) + y)(self.norm(self.conv(x))),
    ],
)
def test_a_layer_norm_that_may_give_fp32_to_another_is_not_noted(forward):
    report = fuse_(Rounded(forward))
    assert "autocast" not in str(report)


def test_nothing_is_noted_of_autocast_where_it_is_set_or_the_model_is_half():
    model = Rounded(between)
    replace_(model)
    model.norm.autocast = "input"
    for each in (model, Rounded(between).bfloat16()):
        assert "under autocast" not in str(fuse_(each))
    for row in ([nn.LayerNorm(C)], [nn.LayerNorm(C), nn.Linear(C, C)], [nn.Linear(C, C)]):
        assert fuse_(nn.Sequential(*row)).notes == []
    assert replace_(nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C), nn.GELU())).changed == 2


def test_a_batch_norm_that_is_fused_in_evaluation_is_noted():
    model = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), nn.BatchNorm2d(C))
    (note,) = fuse_(model.eval(), dry_run=True).notes
    assert note.name == "0"
    assert "fuse_conv_bn_eval" in note.text
    assert fuse_(model.train()).notes == []
