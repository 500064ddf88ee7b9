"""torch's own samples for the modules that ours stand in for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastnorm

pytest.importorskip("expecttest", reason="torch's own samples need expecttest: the [test] extra")
pytest.importorskip("numpy", reason="torch's own samples need numpy: the [test] extra")
from torch.testing._internal import common_modules

OURS = {
    getattr(torch.nn, name): getattr(fastnorm, name)
    for name in "BatchNorm1d BatchNorm2d BatchNorm3d LayerNorm GELU SiLU SELU".split()
}
INFOS = [info for info in common_modules.module_db if info.module_cls in OURS]


def outcome(module: torch.nn.Module, args: Any, kwargs: Any) -> dict[str, torch.Tensor]:
    """Output, gradients and buffers, from copies of the same inputs."""
    copies = [
        a.detach().clone().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a
        for a in args
    ]
    y = module(*copies, **kwargs)
    found = {"y": y.detach()}
    if y.requires_grad:
        # of one sign: where a bias's sum cancels, its relative error would measure luck
        dy = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device)
        y.backward(dy.view(y.shape))
    found |= {
        f"d{i}": a.grad for i, a in enumerate(copies) if torch.is_tensor(a) and a.grad is not None
    }
    found |= {f"d{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | dict(module.named_buffers())


def test_every_module_is_there() -> None:
    assert {info.module_cls for info in INFOS} == set(OURS)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["auto", "reference", "triton"])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
def test_samples(info: Any, name: str, training: bool, device: str) -> None:
    if fastnorm.backends().get(name) is not None:
        pytest.skip(f"{name}: {fastnorm.backends()[name]}")
    samples = info.module_inputs_func(
        info, device=device, dtype=torch.float32, requires_grad=True, training=training
    )
    assert samples
    for sample in samples:
        construct, call = sample.constructor_input, sample.forward_input
        modules = []
        for kind in (info.module_cls, OURS[info.module_cls]):
            modules.append(kind(*construct.args, **construct.kwargs).to(device).train(training))
        modules[1].load_state_dict(modules[0].state_dict())
        if call is None:
            continue
        expected = outcome(modules[0], call.args, call.kwargs)
        with fastnorm.backend(name):
            actual = outcome(modules[1], call.args, call.kwargs)
        assert actual.keys() == expected.keys()
        for key, value in actual.items():
            torch.testing.assert_close(value, expected[key], msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize(
    "info", [i for i in INFOS if i.module_error_inputs_func], ids=lambda i: i.module_cls.__name__
)
def test_errors(info: Any, name: str, device: str) -> None:
    samples = info.module_error_inputs_func(
        info, device=device, dtype=torch.float32, requires_grad=False, training=True
    )
    assert samples
    for sample in samples:
        construct = sample.module_error_input.constructor_input
        call = sample.module_error_input.forward_input
        with fastnorm.backend(name), pytest.raises(sample.error_type, match=sample.error_regex):
            OURS[info.module_cls](*construct.args, **construct.kwargs)(*call.args, **call.kwargs)
