"""The same training with torch's layers and with ours is told from another one."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the digits are scikit-learn's: the [demo] extra")

import fastnorm
from benchmarks import training, training_file
from benchmarks.__main__ import main
from benchmarks.schema import ResultsError
from benchmarks.training_file import LIMIT, ROUNDING, Compared, Trained, Training, faults
from benchmarks.vit import exchanged
from fastnorm.demo import own_resnet
from fastnorm.ops import batch_norm, layer_norm
from fastnorm.ops.registry import Op
from tests.conftest import AVAILABLE

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "training"
STEPS, BATCH = 6, 8


def trains(out: Path, model: str, *more: str, device: str = "cpu", steps: int = STEPS) -> int:
    sizes = ("--steps", str(steps), "--batch", str(BATCH), "--device", device)
    return main(["train", "--model", model, *sizes, "--out", str(out), *more])


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ResNet with a quarter of its channels: a sixteenth of the time."""
    recipe = replace(training.RECIPES["resnet"], build=lambda: own_resnet(4, nn.SiLU))
    monkeypatch.setitem(training.RECIPES, "resnet", recipe)


def test_both_models_are_the_same_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kept" / "training.json"
    assert trains(out, "resnet,vit", "--note", "a test") == 0
    told = capsys.readouterr().out
    assert "resnet: the same training" in told and "vit: the same training" in told
    kept = training_file.load(out)
    assert kept.environment.note == "a test" and kept.environment.on_cpu
    assert kept.settings["backend"] == "reference"
    assert [trained.name for trained in kept.models] == ["resnet", "vit"]
    for trained in kept.models:
        assert list(trained.losses) == list(training.NAMES)
        assert {len(losses) for losses in trained.losses.values()} == {STEPS}
        assert trained.compared is not None and trained.compared.all[0] > 0, "torch's runs differ"
    resnet, vit = kept.models
    assert set(resnet.calls) == {"batch_norm_forward"}, "every activation is fused"
    assert set(vit.calls) == {"layer_norm_forward", "activation_forward"}
    assert resnet.compared is not None
    judged = resnet.compared.pairs
    assert {"all tensors", "losses", "1.weight", "1.running_mean", "3.bn2.running_var"} <= set(
        judged
    )
    assert main(["train", "--device", "cpu", "--out", str(out)]) == 2, "never overwritten"


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("model", training.RECIPES)
@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name != "reference"])
def test_kernels_train_the_same(model: str, backend: str, device: str, tmp_path: Path) -> None:
    if device == "cpu" and backend == "triton":
        pytest.skip("up to a minute in the interpreter; every op is compared there by itself")
    assert trains(tmp_path / "t.json", model, "--backend", backend, device=device, steps=3) == 0


def momentum(model: nn.Module) -> None:
    model[4].bn1.momentum = 0.11  # type: ignore[index, union-attr]


def epsilon(model: nn.Module) -> None:
    model[1].eps = 2e-5  # type: ignore[index, union-attr]


def unfused(model: nn.Module) -> None:
    model[1].activation = "relu"  # type: ignore[index, union-attr]


def uncounted(model: nn.Module) -> None:
    def forget(bn: nn.Module, x: object, y: object) -> None:
        bn.num_batches_tracked.sub_(1)  # type: ignore[operator, union-attr]

    model[1].register_forward_hook(forget)  # type: ignore[index, union-attr]


def restored(model: nn.Module) -> None:
    fastnorm.restore_(model)


@pytest.mark.usefixtures("narrow")
def test_nothing_is_found_where_nothing_is_planted(tmp_path: Path) -> None:
    assert trains(tmp_path / "t.json", "resnet") == 0


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "plant, found",
    [
        (momentum, "4.bn1.running_mean is"),
        (epsilon, "1.weight is"),
        (unfused, "losses is"),
        (uncounted, "1.num_batches_tracked is"),
        (restored, "no op of ours was called"),
    ],
)
def test_a_planted_fault_is_found_out(
    plant: Callable[[nn.Module], None],
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = training.surgery

    def wrong(model: nn.Module) -> str:
        told = right(model)
        plant(model)
        return told

    monkeypatch.setattr(training, "surgery", wrong)
    assert trains(tmp_path / "t.json", "resnet") == 1
    told = capsys.readouterr().out
    assert "resnet: DIFFERS" in told
    assert found in told


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "model, op", [("resnet", batch_norm._backward), ("vit", layer_norm._backward)]
)
def test_a_slightly_wrong_kernel_is_found_out(
    model: str, op: Op, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = op.by["reference"]

    def wrong(*inputs: object) -> object:
        dx, dweight, *rest = right(*inputs)
        return (dx, dweight * (1 + 1e-3), *rest)

    monkeypatch.setitem(op.by, "reference", wrong)
    assert trains(tmp_path / "t.json", model) == 1


def test_runs_of_torch_that_do_not_differ_show_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    same = training.batches
    monkeypatch.setattr(training, "batches", lambda steps, batch, order: same(steps, batch, 0))
    monkeypatch.setattr(training, "TRANSPOSED", "nobody")
    assert trains(tmp_path / "t.json", "vit") == 1
    assert "torch's own runs are equal to the last bit" in capsys.readouterr().out


def test_an_interrupted_run_leaves_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(model: nn.Module) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "surgery", interrupted)
    out = tmp_path / "t.json"
    with pytest.raises(KeyboardInterrupt):
        trains(out, "vit")
    (trained,) = training_file.load(out).models
    assert list(trained.losses) == list(training.NAMES[:-1])
    assert faults(trained) == ["it was interrupted: nothing was compared"]


def test_orders_hold_the_same_images() -> None:
    plain, *others = [list(training.batches(3, 16, order)) for order in range(3)]
    for other in others:
        for one, two in zip(plain, other, strict=True):
            assert not torch.equal(one, two)
            assert torch.equal(one.sort().values, two.sort().values)


@pytest.mark.parametrize("name", training.RECIPES)
def test_exchanged_rows_and_columns_are_the_same_function(name: str) -> None:
    model = training.RECIPES[name].build().double()
    x = torch.randn(2, 3, training.SIZE, training.SIZE, dtype=torch.float64)
    y = model(x)
    there = exchanged(model.state_dict())
    assert not torch.equal(model(x.mT), y), "the images do not look like that"
    back = exchanged(there)
    assert all(torch.equal(t, back[key]) for key, t in model.state_dict().items())
    model.load_state_dict(there)
    torch.testing.assert_close(model(x.mT), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "ours, good",
    [(0.0, True), (LIMIT * 1e-3, True), (LIMIT * 1e-3 + 2 * ROUNDING, False), (math.nan, False)],
)
def test_the_limit(ours: float, good: bool) -> None:
    compared = Compared((1e-3, 0.0), (1e-3, 0.0), {"a tensor": (1e-3, ours)})
    found = faults(Trained("m", "", "", {"op": 1}, {}, compared))
    assert (found == []) is good
    assert good or "a tensor is" in found[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--backend", "auto"], "--backend auto is torch's own functions on a CPU"),
        (["--backend", "cuda"], "--backend cuda: it is not there"),
    ],
)
def test_what_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fastnorm, "backends", lambda: {"cuda": "it is not there"})
    assert trains(tmp_path / "t.json", "vit", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize("text", ["[]", '{"schema": 1}'])
def test_a_file_of_another_schema(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ResultsError, match="no file of schema 'training 1'"):
        training_file.load(tmp_path / "t.json")


def kept() -> list[Path]:
    return sorted(RESULTS.glob("*/*.json"))


def test_what_is_committed_says_what_it_shows() -> None:
    assert kept(), "there is a training of a CPU at least"
    for path in kept():
        data: Training = training_file.load(path)
        assert not data.environment.dirty and data.environment.commit[:10] in path.name
        assert path.parent.name == data.environment.slug
        assert [trained.name for trained in data.models] == list(training.RECIPES)
        assert all(faults(trained) == [] for trained in data.models)
        assert {len(c) for m in data.models for c in m.losses.values()} == {training.STEPS}
        assert path.with_suffix(".png").is_file()
        assert json.loads(path.read_text())["settings"]["limit"] == LIMIT


def test_the_picture_is_drawn_from_the_file() -> None:
    pytest.importorskip("matplotlib", reason="pictures need the [bench] extra")
    image = pytest.importorskip("PIL.Image")
    from benchmarks.report.curves import curves_picture

    for path in kept():
        assert image.open(io.BytesIO(curves_picture(training_file.load(path)))).size[0] == 1200
