"""What compute-sanitizer runs: problems whose blocks work together do so on the device it runs
on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastnorm
from benchmarks import small, together
from benchmarks.candidates import applied
from benchmarks.correctness import gradients_like, outputs_of
from benchmarks.ops import OPS
from benchmarks.providers import Ours
from fastnorm import dispatch
from fastnorm.ops import launch

PROCESSORS = 132


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every plan that is made on an emulated device as large as an H100, which looks at launches
    and runs none."""
    from fastnorm.ops.batch_norm import cuda as batch_norm
    from fastnorm.ops.layer_norm import cuda as layer_norm
    from fastnorm.ops.weight_norm import cuda as weight_norm

    made: list[Any] = []

    def noted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def plan(*arguments: Any) -> Any:
            made.append(function(*arguments))
            return made[-1]

        monkeypatch.setattr(module, name, plan)

    for module, name in (
        (batch_norm, "plan"), (layer_norm, "forward_plan"), (layer_norm, "backward_plan"),
        (weight_norm, "_plan"),
    ):  # fmt: skip
        noted(module, name)
    monkeypatch.setattr(launch, "processors", lambda device: PROCESSORS)
    engine = sys.modules["fastnorm._cuda"].engine  # type: ignore[attr-defined]
    engine.configure(sms=PROCESSORS, blocks_per_sm=3, dry=True)
    batch_norm._plan.cache_clear()
    layer_norm._cut.cache_clear()
    yield made
    engine.configure()
    batch_norm._plan.cache_clear()
    layer_norm._cut.cache_clear()


def on_cuda(op: str) -> list[Any]:
    return [pytest.param(way, id=f"{way[0]} {way[2]}") for way in together.on_cuda()
            if way[0].op in op.split()]  # fmt: skip


emulated = pytest.mark.skipif(not dispatch.emulating(), reason="asks the emulated device for plans")


def call(way: small.Way, backend: str) -> None:
    """Launch a way's kernels, forward and backward."""
    problem, turned, changes = way
    provider = Ours(backend, backend=backend)
    with provider.active(), applied(turned, changes):
        bound = provider.bind(problem, OPS[problem.op].tensors(problem, "cpu"))
        result = bound.forward()
        assert bound.backward is not None
        bound.backward(result, gradients_like(outputs_of(bound.outputs(result))))


@emulated
@pytest.mark.parametrize("way", on_cuda("batch_norm mean_only_batch_norm"))
def test_blocks_of_batch_norm_share_a_group(way: small.Way, plans: list[Any]) -> None:
    from fastnorm.ops.extension import extension

    form = extension().BATCH_NORM_FORMS[dict(way[2])["FORM"]]
    call(way, "cuda")
    assert len(plans) == 2
    for plan in plans:
        assert extension().BATCH_NORM_FORMS[plan.form] == form
        assert (plan.members > 1) == (form != "owner")
        assert plan.batches > 1
        assert plan.groups > 1
        if form == "stream":
            assert 0 < plan.held < plan.batches


@emulated
@pytest.mark.parametrize("way", on_cuda("layer_norm"))
def test_blocks_of_layer_norm_share_a_row_or_a_sum(way: small.Way, plans: list[Any]) -> None:
    call(way, "cuda")
    forward, backward = plans
    if way[0].shape[-1] >= 20000 or way[0].variant == "last3":
        assert min(forward.chunks, backward.chunks) > 1
        assert backward.streams == (not way[2])
        assert (backward.span > 1, forward.span > 1) == (len(way[2]) > 1,) * 2
    else:
        assert backward.workers > 1
        assert backward.blocks > backward.workers  # who finish the sums


@emulated
@pytest.mark.parametrize("way", on_cuda("weight_norm"))
def test_blocks_of_weight_norm_share_a_norm(way: small.Way, plans: list[Any]) -> None:
    call(way, "cuda")
    assert [plan.counters > 0 for plan in plans] == [way[0].variant != "hifigan"] * 2


def test_every_form_of_batch_norm_is_there() -> None:
    forms = {dict(way[2])["FORM"] for way in together.on_cuda() if "batch_norm" in way[0].op}
    assert forms == {1, 2, 3, 4}


# the kernels of together.on_triton() in which programs leave something for each other, or for those
# of the next launch
TICKETS = {"forward_ticket_kernel", "backward_ticket_kernel"}
SHARING = (
    *[TICKETS] * 3,
    {"normalize_ticket_kernel", "backward_ticket_kernel"},
    {"backward_kernel", "finalize_kernel"},
    {"rows_forward_kernel", "rows_backward_kernel"},
    {"columns_forward_kernel", "columns_backward_kernel"},
    {"swish_backward_kernel"},
)
on_triton = [
    pytest.param(way, kernels, id=str(way[0]))
    for way, kernels in zip(together.on_triton(), SHARING, strict=True)
]


@pytest.mark.skipif(
    fastnorm.backends()["triton"] is not None or torch.cuda.is_available(),
    reason="counts what the interpreter is asked to run",
)
@pytest.mark.parametrize("way, kernels", on_triton)
def test_programs_of_triton_share(
    way: small.Way, kernels: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    programs: dict[str, int] = {}

    def noted(self: Any, *arguments: Any, grid: tuple[int, ...], **others: Any) -> None:
        """In the place of a launch."""
        programs[self.fn.__name__] = grid[-1]  # of weight norm: the parts of a norm

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    monkeypatch.setattr(launch, "processors", lambda device: PROCESSORS)
    call(way, "triton")
    assert {name for name, count in programs.items() if count > 1} >= kernels
