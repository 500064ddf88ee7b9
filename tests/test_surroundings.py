"""What else stands around a layer: opcheck, profilers, copies and files, averaging, determinism."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastnorm
from fastnorm.ops.registry import LIBRARY
from tests.layers import (
    LAYERS,
    assert_same,
    every_layer,
    everywhere,
    make_input,
    make_layer,
    step,
    torch_warns,
)

pytestmark = torch_warns

# opcheck


class Record(TorchDispatchMode):
    """The arguments of each op of ours, as they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "fastnorm":
            kept = tree_map_only(Tensor, lambda a: a.detach().clone(), args)
            self.calls.append((op, kept))
        return op(*args, **(kwargs or {}))


def calls_of_synchronised_batch_norm(x: Tensor) -> list[tuple[Any, tuple[Any, ...]]]:
    ops, C = torch.ops.fastnorm, x.size(1)
    w, b, mean, rstd = (torch.rand(C, dtype=x.dtype, device=x.device) + 0.5 for _ in range(4))
    count = torch.tensor(float(x.numel() // C), dtype=x.dtype, device=x.device)
    gathered = torch.rand(2, 2 * C + 1, dtype=x.dtype, device=x.device) + 2
    tracked = torch.zeros((), dtype=torch.int64, device=x.device)
    dy, parameters = torch.randn_like(x), (None, w, b, torch.stack([mean, rstd]))
    return [
        (ops.batch_norm_statistics.default, (x,)),
        (ops.batch_norm_merge.default, (gathered, mean.clone(), rstd.clone(), tracked, 0.1)),
        (ops.batch_norm_reduce.default, (x, dy, *parameters, "silu")),
        (
            ops.batch_norm_apply.default,
            (x, dy, *parameters, torch.rand(2 * C).to(x), count, "silu", False),
        ),
    ]


@everywhere
def test_opcheck_of_every_op(backend: str, device: str) -> None:
    if backend == "auto":
        pytest.skip('"auto" enters no op of ours on a CPU')
    record = Record()
    with record:
        for name in LAYERS:
            layer = make_layer(name, device)
            step(layer, layer, make_input(name, device=device))
        fastnorm.functional.silu(torch.randn(3, 4, device=device), inplace=True)
        both = nn.Sequential(make_layer("weight_norm"), nn.Linear(6, 4)).to(device, torch.float64)
        fastnorm.weight_norm(both[1])
        step(fastnorm.weight_norm_(both), both, make_input("weight_norm", device=device))
    x = make_input("batch_norm_2d", device=device).detach()
    calls = record.calls + calls_of_synchronised_batch_norm(x)
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    defined = {name.removeprefix("fastnorm::").split(".")[0] for name in LIBRARY._op_defs}
    assert {op._schema.name.removeprefix("fastnorm::") for op, _ in calls} == defined


@everywhere
def test_a_profile_names_our_ops(backend: str) -> None:
    if backend == "auto":
        pytest.skip('"auto" enters no op of ours on a CPU')
    layer, x = make_layer("silu"), make_input("silu")
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as profile:
        layer(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fastnorm::activation_forward", "fastnorm::activation_backward"} <= names


# copies and files


@everywhere
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@every_layer
def test_a_copy_is_the_layer_again(name: str, how: str, backend: str, device: str) -> None:
    if how != "deepcopy" and name.startswith("weight_norm"):
        pytest.skip("torch cannot pickle a parametrized module: load its state_dict")
    layer, x = make_layer(name, device), make_input(name, device=device)
    layer(x.detach())
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert repr(twin) == repr(layer)
    assert_same(step(twin, twin, x), step(layer, layer, x), exact=True)


@everywhere
@pytest.mark.parametrize("assign", [False, True])
@every_layer
def test_from_the_meta_device(name: str, assign: bool, backend: str, device: str) -> None:
    layer, x = make_layer(name, device), make_input(name, device=device)
    layer(x.detach())
    with torch.device("meta"):
        empty = LAYERS[name][0]().to(torch.float64)
    assert all(p.is_meta for p in empty.state_dict().values())
    if not assign:
        empty = empty.to_empty(device=device)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    empty.load_state_dict(state, assign=assign)
    if assign:
        assert all(empty.state_dict()[key].data_ptr() == state[key].data_ptr() for key in state)
    assert_same(step(empty, empty, x), step(layer, layer, x), exact=True)


@everywhere
@every_layer
def test_shapes_on_the_meta_device(name: str, backend: str) -> None:
    layer, x = make_layer(name), make_input(name)
    y = layer(x)
    on_meta = layer.to("meta")(x.detach().to("meta"))
    assert (on_meta.shape, on_meta.dtype, on_meta.is_meta) == (y.shape, y.dtype, True)


def test_the_page_about_all_this_names_tests_that_are_there() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "compatibility.md").read_text()
    named = set(re.findall(r"`((?:tests|benchmarks)/\w+\.py)`", page))
    assert len(named) > 10
    assert not [path for path in named if not (root / path).exists()]
    assert "docs/compatibility.md" in (root / "README.md").read_text()


# weight averaging, folding of convolutions


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1)]
    return nn.Sequential(*layers, nn.BatchNorm2d(4, momentum=None)).double()


@everywhere
def test_update_bn_of_an_averaged_model(backend: str, device: str) -> None:
    torchs = network().to(device)
    net = copy.deepcopy(torchs)
    fastnorm.replace_(net)
    fastnorm.fuse_(net)
    batches = [torch.randn(4, 3, 6, 6, dtype=torch.float64, device=device) for _ in range(3)]
    found = []
    for model in (net, torchs):
        averaged = AveragedModel(model)
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
        averaged.update_parameters(model)
        update_bn(batches, averaged)
        found.append(averaged.state_dict())
        assert found[-1]["module.1.num_batches_tracked"] == 3
    for key, value in found[1].items():
        torch.testing.assert_close(found[0][key], value, rtol=1e-9, atol=1e-11)


@everywhere
def test_a_batch_norm_of_ours_folds_into_a_convolution(backend: str, device: str) -> None:
    net = network().to(device)
    fastnorm.replace_(net)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64, device=device)
    net(x)
    net.eval()
    folded = fuse_conv_bn_eval(net[0], net[1])
    torch.testing.assert_close(folded(x), net[1](net[0](x)), rtol=1e-9, atol=1e-11)


# determinism


@everywhere
@every_layer
def test_the_same_bits_twice(name: str, backend: str, device: str) -> None:
    layer, x = make_layer(name, device), make_input(name, device=device)
    twin = copy.deepcopy(layer)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(step(layer, layer, x), step(twin, twin, x), exact=True)
    finally:
        torch.use_deterministic_algorithms(before)
