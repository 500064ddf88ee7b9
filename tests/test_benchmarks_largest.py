"""The largest batch that fits, and how reports tell it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import largest, models, schema
from benchmarks.jobs import plan
from benchmarks.report import readme
from benchmarks.report.lines import runs
from benchmarks.report.terminal import terminal
from benchmarks.schema import Results, Row
from benchmarks.zoo import MODELS
from tests import made_up


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 7, 8, 100, 101])
@pytest.mark.parametrize("most", [1, 2, 7, 8, 100])
def test_doubling_then_bisection(limit: int, most: int) -> None:
    asked: list[int] = []

    def fits(batch: int) -> bool:
        asked.append(batch)
        return batch <= limit

    assert largest.largest(fits, most) == min(limit, most)
    assert max(asked) <= most
    assert len(asked) == len(set(asked)) <= 16  # each batch once


def test_elements_of_the_largest_tensor() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool2d(2), nn.Conv2d(8, 16, 1))
    assert largest.elements(module, torch.randn(2, 3, 4, 4), False) == 8 * 16
    assert not any(part._forward_hooks for part in module.modules())


def test_jobs_and_failures() -> None:
    def told(device: str, *names: str) -> list[str]:
        jobs = plan([], [MODELS[name] for name in names], ["torch", "fastnorm"], device)
        return [str(job) for job in jobs if isinstance(job, largest.LargestJob)]

    both = [f"largest_batch efficientnet_b4 {name}" for name in ("torch", "fastnorm")]
    assert told("cuda", "resnet50", "efficientnet_b4") == both
    assert told("cuda", "resnet50") == told("cpu", "efficientnet_b4") == []
    row = largest.LargestJob("efficientnet_b4", "torch", "cuda").failed("out of luck")
    assert (row.op, row.ok, row.note) == ("largest_batch", False, "out of luck")


def test_an_allocation_that_fails_does_not_fit_and_an_error_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    module, one = nn.Linear(3, 3), torch.randn(1, 3)
    seen: list[tuple[int, ...]] = []

    def step(module: nn.Module, x: torch.Tensor, half: bool) -> None:
        seen.append(tuple(x.shape))
        if x.size(0) > 2:
            raise RuntimeError("CUDA out of memory" if x.size(0) == 3 else "a wrong result")

    monkeypatch.setattr(models, "step_of", step)
    assert largest._fits(module, one, False, 2)
    assert not largest._fits(module, one, False, 3)
    with pytest.raises(RuntimeError, match="a wrong result"):
        largest._fits(module, one, False, 4)
    assert seen == [(2, 3), (3, 3), (4, 3)]


def test_reports_tell_it(tmp_path: Path) -> None:
    rows = [
        Row(
            "largest_batch", "efficientnet_b4", "step", [32, 3, 380, 380], "nhwc", "bfloat16", name,
            note=f"timm; {count} samples fit into 80 GiB",
        )
        for name, count in (("torch", 90), ("fastnorm", 130))
    ]  # fmt: skip
    results = Results(made_up.GPU, rows)
    (run,) = runs([results])
    assert "torch: timm; 90 samples fit into 80 GiB" in terminal(run)
    path = tmp_path / readme.RESULTS / made_up.GPU.slug / "models.json"
    schema.save(results, path)
    told = readme.readme_table(tmp_path)
    assert "Largest batch of efficientnet_b4: torch: timm; 90 samples" in told
    assert "fastnorm: timm; 130 samples" in told.replace("\n", " ")
