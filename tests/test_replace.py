"""replace_ and restore_: which modules change, what stays, and that nothing is half-changed."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from fastnorm.fuse import fuse_
from fastnorm.modules import activation, batch_norm, layer_norm, weight_norm
from fastnorm.replace import replace_, replacements, restore_
from fastnorm.surgery import losses
from tests.twins import assert_untouched, snapshot

# one layer per default target, with an input
LAYERS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), batch_norm.BatchNorm1d, (4, 6)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), batch_norm.BatchNorm2d, (2, 6, 3, 3)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), batch_norm.BatchNorm3d, (2, 6, 2, 2, 2)),
    "LayerNorm": (lambda: nn.LayerNorm(6), layer_norm.LayerNorm, (4, 6)),
    "GELU": (lambda: nn.GELU("tanh"), activation.GELU, (4, 6)),
    "SiLU": (lambda: nn.SiLU(inplace=True), activation.SiLU, (4, 6)),
    "SELU": (nn.SELU, activation.SELU, (4, 6)),
}


def network():
    """Every default target once."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 6, 3, padding=1)),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Flatten(2),
        nn.BatchNorm1d(6),
        nn.GELU(),
        nn.LayerNorm(16),
        nn.SELU(),
        nn.Unflatten(2, (4, 2, 2)),
        nn.BatchNorm3d(6),
    )


def image():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_itself_is_swapped_in_place(name):
    make, ours, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    twin, parameters = copy.deepcopy(layer), dict(layer.named_parameters())
    report = replace_(layer)
    assert type(layer) is ours
    assert [(row.was, row.now, row.why_skipped) for row in report] == [
        (name, f"fastnorm.{name}", "")
    ]
    assert all(parameter is parameters[key] for key, parameter in layer.named_parameters())
    x = torch.randn(shape)
    assert torch.equal(layer(x.clone()), twin(x.clone()))
    restore_(layer)
    assert type(layer) is type(twin)
    assert layer.__dict__.keys() == twin.__dict__.keys()


def test_every_default_target_and_back():
    model = network()
    before, keys = snapshot(model), list(model.state_dict())
    report = replace_(model)
    # beside those of other packages that another test may have imported
    torchs = [cls for cls in replacements() if cls.__module__.startswith("torch.")]
    assert report.changed == len(torchs) == 8
    assert report.skipped == 0
    assert type(model[0].parametrizations.weight[0]) is weight_norm.WeightNorm
    assert list(model.state_dict()) == keys
    assert restore_(model).changed == 8
    assert_untouched(model, before)


def test_state_dict_loads_both_ways_and_the_optimizer_stays_valid():
    torch.manual_seed(0)
    model, other = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_(model)
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())
    weight = model[6].weight
    value = weight.detach().clone()
    model(image()).square().sum().backward()
    optimizer.step()
    assert model[6].weight is weight
    assert not torch.equal(weight, value)


def test_hooks_fire():
    model = network()
    seen = []
    model[1].register_forward_pre_hook(lambda module, inputs: seen.append("pre"))
    model[1].register_forward_hook(lambda module, inputs, output: seen.append("forward"))
    model[1].register_full_backward_hook(lambda module, dx, dy: seen.append("backward"))
    replace_(model)
    model(image()).sum().backward()
    assert seen == ["pre", "forward", "backward"]


@pytest.mark.parametrize(
    "targets", [[nn.LayerNorm], ["LayerNorm"], nn.LayerNorm, "LayerNorm", (nn.LayerNorm,)]
)
def test_targets(targets):
    model = network()
    assert [row.name for row in replace_(model, targets=targets)] == ["6"]
    assert type(model[1]) is nn.BatchNorm2d


def test_weight_norm_target_by_name():
    model = network()
    assert [row.name for row in replace_(model, targets=["WeightNorm"])] == [
        "0.parametrizations.weight.0"
    ]


@pytest.mark.parametrize("target", [nn.Conv2d, "BatchNorm4d", 3, nn.ReLU, batch_norm.BatchNorm2d])
def test_a_wrong_target_lists_the_right_ones_and_changes_nothing(target):
    model = network()
    before = snapshot(model)
    with pytest.raises(
        ValueError,
        match=r"BatchNorm1d, BatchNorm2d, BatchNorm3d, LayerNorm, GELU, SiLU, SELU, WeightNorm",
    ):
        replace_(model, targets=[nn.LayerNorm, target])
    assert_untouched(model, before)


def test_filter_fn_gets_module_and_name_and_is_reported():
    model = network()
    report = replace_(
        model, filter_fn=lambda module, name: isinstance(module, nn.GELU) and name == "5"
    )
    assert [row.name for row in report if not row.why_skipped] == ["5"]
    assert {row.why_skipped for row in report if row.name != "5"} == {"left out by filter_fn"}
    assert type(model[1]) is nn.BatchNorm2d


def test_dry_run_reports_the_same_and_changes_nothing():
    model = network()
    before = snapshot(model)
    dry = replace_(model, dry_run=True)
    assert_untouched(model, before)
    assert "nothing touched: 8 to change" in str(dry)
    assert dry.rows == replace_(model).rows
    replaced = snapshot(model)
    dry = restore_(model, dry_run=True)
    assert_untouched(model, replaced)
    assert dry.rows == restore_(model).rows


def test_calls_are_idempotent():
    model = network()
    replace_(model)
    before = snapshot(model)
    assert len(replace_(model)) == 0
    assert_untouched(model, before)
    restore_(model)
    assert len(restore_(model)) == 0


class OwnForward(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


def test_subclasses_and_lazy_layers_are_left_alone_and_reported():
    model = nn.Sequential(OwnForward(6), nn.LazyBatchNorm2d(), nn.LayerNorm(6))
    report = replace_(model)
    assert type(model[0]) is OwnForward
    assert type(model[1]) is nn.LazyBatchNorm2d
    assert [bool(row.why_skipped) for row in report] == [True, False]
    assert (
        report.rows[0].why_skipped == "a subclass of LayerNorm: only the class itself is replaced"
    )


def test_a_parametrized_layer_is_left_alone_and_reported():
    model = nn.Sequential(nn.LayerNorm(6), nn.LayerNorm(6))
    parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    cls = type(model[0])
    report = replace_(model)
    assert type(model[0]) is cls
    assert report.rows[0].why_skipped.startswith("parametrized")
    assert type(model[1]) is layer_norm.LayerNorm


def test_a_layer_parametrized_after_replace_is_not_broken_by_restore_():
    model = nn.Sequential(nn.LayerNorm(6))
    replace_(model)
    parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    cls = type(model[0])
    assert [row.why_skipped for row in restore_(model)] == [
        "its class was changed after replace_ or fuse_"
    ]
    assert type(model[0]) is cls
    parametrize.remove_parametrizations(model[0], "weight")
    restore_(model)
    assert type(model[0]) is nn.LayerNorm


def test_a_forward_bound_to_the_instance_is_left_alone():
    layer = nn.LayerNorm(6)
    layer.forward = lambda x: x
    assert replace_(layer).rows[0].why_skipped == "a forward is bound to this instance"
    assert type(layer) is nn.LayerNorm


def test_shared_and_frozen_layers():
    shared = nn.LayerNorm(6).requires_grad_(False)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    assert [row.name for row in replace_(model)] == ["a"]
    assert model["b"]["c"] is model["a"] is shared
    assert not shared.weight.requires_grad
    restore_(model)
    assert type(shared) is nn.LayerNorm


def test_layers_built_from_our_classes_stay():
    model = nn.Sequential(layer_norm.LayerNorm(6), nn.LayerNorm(6))
    assert [row.name for row in replace_(model)] == ["1"]
    restore_(model)
    assert type(model[0]) is layer_norm.LayerNorm
    assert type(model[1]) is nn.LayerNorm


def test_deepcopy_and_pickle_can_be_restored():
    model = network()[1:]  # torch itself refuses to pickle a parametrization
    replace_(model)
    x = torch.randn(2, 6, 4, 4)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin.eval()(x), model.eval()(x))
        assert restore_(twin).changed == 7
        assert type(twin[0]) is nn.BatchNorm2d
    assert type(model[0]) is batch_norm.BatchNorm2d


@pytest.mark.parametrize("surgery", [replace_, restore_])
def test_only_modules_are_accepted(surgery):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module in place, got OrderedDict"):
        surgery(network().state_dict())


def test_nothing_is_half_changed_when_a_call_fails():
    model = network()
    before = snapshot(model)

    def explode(module, name):
        if name == "5":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        replace_(model, filter_fn=explode)
    assert_untouched(model, before)


def test_a_swap_that_torch_refuses_is_rolled_back(monkeypatch):
    # Python refuses a class of another layout: the layers swapped before it have to come back
    class Slotted(nn.SELU):
        __slots__ = ("slot",)

    model = network()
    before = snapshot(model)
    table = {**replacements(), nn.SELU: Slotted}
    monkeypatch.setattr("fastnorm.replace.replacements", lambda: table)
    with pytest.raises(TypeError, match="layout"):
        replace_(model)
    assert_untouched(model, before)


def test_the_report_prints_as_a_table():
    report = replace_(nn.Sequential(nn.LayerNorm(4), OwnForward(4)))
    why = "a subclass of LayerNorm: only the class itself is replaced"
    assert str(report).splitlines() == [
        "name  was         is                  why skipped",
        f"----  ----------  ------------------  {'-' * len(why)}",
        "0     LayerNorm   fastnorm.LayerNorm",
        f"1     OwnForward  OwnForward          {why}",
        "1 changed, 1 skipped",
    ]
    assert repr(report) == str(report)
    assert (len(report), report.changed, report.skipped) == (2, 1, 1)


class CallsFunctions(nn.Module):
    def __init__(self):
        super().__init__()
        self.gelu = nn.GELU()

    def forward(self, x):
        return torch.nn.functional.silu(F.layer_norm(self.gelu(F.relu(x)), x.shape[1:]))


def told(report):
    return [(note.name, note.text.partition(":")[0]) for note in report.notes]


def test_functions_that_stay_torchs_are_noted():
    model = nn.Sequential(CallsFunctions(), CallsFunctions(), nn.TransformerEncoderLayer(8, 2))
    report = replace_(model)
    text = "its forward calls {}, and replace_ changes layers alone"
    assert sorted(told(report)) == [
        (name, text.format(function)) for name in "01" for function in ("layer_norm", "silu")
    ]
    assert "note: 0, 1: its forward calls silu" in str(report)
    assert "a SiLU would be replaced, fastnorm.functional.silu is ours" in str(report)
    assert report.changed == 4
    # torch's own layers hold a function where a layer could be
    report = replace_(nn.Sequential(nn.TransformerEncoderLayer(8, 2, activation=F.gelu)))
    assert told(report) == [("0", text.format("gelu"))]
    # only what was asked for, and no class but the chosen ones is looked into
    assert told(replace_(CallsFunctions(), targets=["SiLU"])) == [("", text.format("silu"))]
    assert "note: the model: its" in str(replace_(CallsFunctions(), targets="SiLU"))
    assert told(replace_(CallsFunctions(), filter_fn=lambda module, name: True)) == []


def test_a_batch_norm_in_evaluation_is_noted():
    model = nn.Sequential(
        *(nn.BatchNorm2d(6) for _ in range(5)), nn.BatchNorm1d(6, track_running_stats=False)
    )
    assert replace_(model, dry_run=True).notes == []
    report = replace_(model.eval())
    assert [name for name, _ in told(report)] == ["0", "1", "2", "3", "4"]
    assert str(report).splitlines()[-1].startswith("note: 0, 1, 2 and 2 more: in evaluation mode")


def test_a_batch_norm_that_torch_serves_is_noted():
    model = nn.Sequential(nn.BatchNorm2d(6, eps=0.0), nn.BatchNorm2d(6))
    assert told(replace_(model)) == [("0", "eps is 0")]


def test_synchronised_batch_norm_and_hooks_of_weight_norm_are_noted():
    with pytest.warns(FutureWarning, match="deprecated"):
        hooked = nn.utils.weight_norm(nn.Linear(2, 2))
    model = nn.Sequential(nn.SyncBatchNorm(6), hooked)
    report = replace_(model)
    assert [(note.name, note.text.split()[-1]) for note in report.notes] == [
        ("0", "ours"),
        ("1", "instead"),
    ]
    assert "fastnorm.convert_sync_batchnorm" in report.notes[0].text
    assert "torch.nn.utils.remove_weight_norm" in report.notes[1].text
    assert type(model[0]) is nn.SyncBatchNorm
    assert replace_(model, targets=[nn.GELU]).notes == []


def test_weight_norms_that_could_be_computed_together_are_noted():
    layers = [parametrizations.weight_norm(nn.Linear(2, 2)) for _ in range(2)]
    assert replace_(nn.Sequential(layers[0])).notes == []
    restore_(layers[0])
    report = replace_(nn.Sequential(*layers))
    assert [note.name for note in report.notes] == [
        "0.parametrizations.weight.0",
        "1.parametrizations.weight.0",
    ]
    assert "fastnorm.weight_norm_(model)" in report.notes[0].text


def test_what_fuse_would_fold_is_counted():
    model = nn.Sequential(
        nn.BatchNorm2d(6), nn.ReLU(), nn.LayerNorm(4), nn.BatchNorm2d(6), nn.GELU()
    )
    (note,) = replace_(model, dry_run=True).notes
    assert note.text.startswith(
        "2 norms stand next to an activation or an addition: fastnorm.fuse_"
    )
    assert replace_(model, targets=[nn.GELU, nn.LayerNorm]).notes == []
    (note,) = replace_(model, filter_fn=lambda module, name: name == "0").notes
    assert note.text.startswith("1 norm stands next to")
    assert [row.name for row in fuse_(model, dry_run=True) if not row.why_skipped] == [
        *("0", "1", "3", "4")
    ]
    assert replace_(nn.Sequential(nn.BatchNorm2d(6), nn.Flatten())).notes == []


def test_a_gpu_without_a_kernel_of_ours_is_noted(monkeypatch):
    make = lambda: nn.Sequential(nn.LayerNorm(4))  # noqa: E731
    missing = {"reference": None, "triton": "no triton", "cuda": "no extension"}
    monkeypatch.setattr(losses, "backends", lambda: missing)
    assert replace_(make()).notes == []  # CUDA is not in use
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    (note,) = replace_(make()).notes
    assert note.text.startswith("no kernel of ours can run on this machine's GPU")
    assert note.text.endswith("no extension; no triton")
    assert replace_(nn.Sequential(nn.Linear(2, 2))).notes == []  # nothing of it becomes ours
    missing["triton"] = None
    assert replace_(make()).notes == []
