"""The benchmarks of whole models: what is timed is what was checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from benchmarks import models
from benchmarks.correctness import SAME
from benchmarks.jobs import ModelJob, plan
from benchmarks.report.lines import is_compiled
from benchmarks.unet import UNet3d
from benchmarks.zoo import MODELS
from fastnorm.demo import own_resnet

MODEL = replace(MODELS["resnet50"], sources=(("our own", own_resnet),), cpu_shape=(2, 3, 16, 16))
CHECKED = [name for name in models.PROVIDERS if name != "torch"]


@pytest.mark.parametrize("provider", ["fastnorm-replaced", "fastnorm"])
def test_step_of_a_model(provider: str) -> None:
    (row,) = models.rows(MODEL, provider, "cpu")
    assert row.ok, row.note
    assert row.note.startswith("our own; replace_ changed ")
    assert row.mode == "step"
    assert row.samples_per_second == pytest.approx(2e3 / row.ms_median)


def other_eps(part: nn.BatchNorm2d) -> None:
    part.eps = 1e-4


def wrong_where(applies: Callable[[Tensor], bool]) -> Callable[[nn.BatchNorm2d], None]:
    """A layer that is off by a factor for some of its inputs."""

    def change(part: nn.BatchNorm2d) -> None:
        def hook(_: nn.Module, given: tuple[Any, ...], y: Tensor) -> Tensor:
            return y * 4.0 if applies(given[0]) else y

        part.register_forward_hook(hook)

    return change


def channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def surgery_of(change: Callable[[nn.BatchNorm2d], None]) -> Callable[[nn.Module, str], str]:
    def surgery(module: nn.Module, provider: str) -> str:
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                change(part)
        return "changed"

    return surgery


@pytest.mark.parametrize("provider", CHECKED)
@pytest.mark.parametrize(
    "change", [other_eps, wrong_where(channels_last)], ids=["eps", "channels_last"]
)
def test_a_model_that_computes_something_else_is_not_timed(
    provider: str, change: Callable[[nn.BatchNorm2d], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "surgery", surgery_of(change))
    (row,) = models.rows(MODEL, provider, "cpu")
    assert not row.ok
    assert row.ms_median is None
    assert row.note.startswith("wrong result: ")


def checked_in_bf16(provider: str) -> tuple[float, float, float]:
    torch.manual_seed(0)
    module = own_resnet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    return models._check(module, provider, x, half=True)


def test_a_model_is_checked_under_the_autocast_that_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error, torchs, in_fp64 = checked_in_bf16("fastnorm")
    assert 1e-3 < torchs < 1.0  # of bf16
    assert error <= SAME * torchs
    assert in_fp64 <= models.FP64_ROUNDING
    halved = surgery_of(wrong_where(lambda x: torch.is_autocast_enabled("cpu")))
    monkeypatch.setattr(models, "surgery", halved)
    error, torchs, in_fp64 = checked_in_bf16("fastnorm")
    assert error > SAME * torchs
    assert in_fp64 <= models.FP64_ROUNDING  # where it would not have been seen


def test_a_compiled_model_is_compiled_for_its_own_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(nn.Module, "compile", lambda self: done.append("compile"))
    (row,) = models.rows(MODEL, "torch.compile", "cpu")
    assert row.ok, row.note
    assert row.error == pytest.approx(row.torch_error, rel=0.5, abs=1e-6)
    assert done == ["reset", "compile"]  # checked and timed as one


def test_what_is_left_to_chance_is_compiled_without_it_for_its_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: done.append("compile"))
    drops = lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Dropout(0.5))  # noqa: E731
    model = replace(MODEL, sources=(("our own", drops),))
    (row,) = models.rows(model, "fastnorm-compiled", "cpu")
    assert row.ok, row.note
    assert done == ["compile"] * 2  # of the check, of the steps


def test_a_compiled_model_has_time_to_compile_twice() -> None:
    limits = {name: ModelJob("resnet50", name, "cpu").limit_s for name in models.PROVIDERS}
    for name in ("torch.compile", "fastnorm-replaced-compiled", "fastnorm-compiled"):
        assert limits[name] == 2 * limits["fastnorm"]


def test_compiled_models_come_last_and_are_asked_for_with_torchs() -> None:
    def asked(*providers: str) -> list[str]:
        return [job.provider_name for job in plan([], [MODEL], providers, "cuda")]

    assert asked("torch", "fastnorm") == ["torch", "fastnorm-replaced", "fastnorm"]
    assert asked("torch", "fastnorm", "torch.compile") == list(models.PROVIDERS)
    assert asked("torch.compile") == ["torch.compile"]
    every = plan([], MODELS.values(), ["torch", "fastnorm", "torch.compile"], "cuda")
    compiled = [is_compiled(job.provider_name) for job in every]
    assert compiled == sorted(compiled)


def test_surgery_comes_before_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[set[str]] = []

    def compiled(self: nn.Module) -> None:
        kinds.append({type(part).__name__ for part in self.modules()})

    monkeypatch.setattr(nn.Module, "compile", compiled)
    module = own_resnet()
    done = models.surgery(module, "fastnorm-compiled")
    assert done.startswith("replace_ changed 12, fuse_ ")
    assert kinds == [{type(part).__name__ for part in module.modules()}]
    assert any(isinstance(part, fastnorm.BatchNorm2d) for part in module.modules())
    assert "fuse_" not in models.surgery(own_resnet(), "fastnorm-replaced-compiled")


def test_a_model_of_which_no_source_is_installed() -> None:
    (row,) = models.rows(replace(MODELS["bert_base"], sources=()), "torch", "cpu")
    assert not row.ok


def test_precisions_and_layouts_are_rows_of_their_own() -> None:
    rows = [models.blank(model, "torch", "cuda") for model in MODELS.values()]
    assert len({row.key for row in rows}) == len(MODELS)
    assert {row.variant for row in rows} == set(MODELS)
    resnets = [(r.variant, r.layout, r.dtype) for r in rows if r.variant.startswith("resnet50")]
    assert resnets == [
        ("resnet50", "nhwc", "bfloat16"),
        ("resnet50_bf16", "nhwc", "bfloat16"),
        ("resnet50_nchw", "nchw", "bfloat16"),
        ("resnet50_nchw_bf16", "nchw", "bfloat16"),
    ]
    assert len({(row.shape[1], len(row.shape)) for row in rows}) > 2
    on_cpu = {str(job) for job in plan([], MODELS.values(), ["torch"], "cpu")}
    assert "model resnet50 torch" in on_cpu
    assert "model resnet50_bf16 torch" not in on_cpu  # it would be fp32


def test_a_model_in_pure_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_parameters", lambda model, device: torch.bfloat16)
    seen: list[set[torch.dtype]] = []
    steps = models.timing.step_time

    def timed(step: Callable[[], None], *given: Any) -> Any:
        assert step.__closure__ is not None
        cells = [cell.cell_contents for cell in step.__closure__]
        (module,) = (cell for cell in cells if isinstance(cell, nn.Module))
        seen.append({p.dtype for p in module.parameters()})
        return steps(step, *given)

    monkeypatch.setattr(models.timing, "step_time", timed)
    (row,) = models.rows(replace(MODEL, precision="bfloat16"), "fastnorm", "cpu")
    assert row.ok, row.note
    assert seen == [{torch.bfloat16}]
    assert row.torch_error is not None and row.torch_error > 1e-3  # of bf16


def test_a_step_of_a_volume() -> None:
    small = (("our own", partial(UNet3d, 4)),)
    model = replace(MODELS["unet_3d"], sources=small, cpu_shape=(2, 1, 16, 8, 8), layout="nhwc")
    x = models._inputs(model, "cpu")
    assert x.is_contiguous(memory_format=torch.channels_last_3d)
    assert UNet3d(4)(x).shape == (2, 3, 16, 8, 8)
    (row,) = models.rows(model, "fastnorm", "cpu")
    assert row.ok, row.note
    assert row.note == "our own; replace_ changed 14, fuse_ 28"
    assert models.few(torch.empty(3, 1, 65, 70, 66)).shape == (2, 1, 64, 64, 64)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_bf16_leaves_the_gradients_of_a_model_alone(name: str) -> None:
    """Where torch's own are far off, no error of ours would be seen."""
    torch.manual_seed(0)
    try:
        _, module = MODELS[name].build()
    except ImportError as error:
        pytest.skip(str(error))
    module = models._without_chance(models._initialised(module))
    x = torch.randn(2, 3, 64, 64)
    torchs = models._gradients(module, x, half=True)
    exact = models._gradients(module.double(), x.double())
    assert (torchs - exact).norm() < 0.3 * exact.norm()


def test_the_last_batch_norm_of_a_block_adds_little() -> None:
    module = models._initialised(own_resnet())
    found = {
        name: (round(float(part.weight.detach()[0]), 4), float(part.bias.detach()[0]))
        for name, part in module.named_modules()
        if isinstance(part, nn.BatchNorm2d)
    }
    small = {name for name, values in found.items() if values == (models.BRANCH, 0.0)}
    assert small == {f"{i}.bn2" for i in (3, 4, 5, 6)}
    assert {found[name] for name in found.keys() - small} == {(1.0, models.ON)}
