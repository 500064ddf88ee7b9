"""The main job, shown: a ResNet trained on images with torch's layers and with ours must agree."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnorm
from fastnorm.demo_kernels import FLOOR, agrees, check_kernels, check_layers

STEPS = 3
BATCH = 16
SIZE = 64  # pixels a side: the digits, enlarged, so that ResNet-50's last stage is still 2 x 2


class Missing(Exception):
    """Something that the demo needs is not installed."""


# the model and the data


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.bn1(self.conv1(x)))
        result: Tensor = self.activation(self.bn2(self.conv2(y)) + self.shortcut(x))
        return result


def own_resnet(width: int = 32, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """A ResNet of ten layers, for machines with neither torchvision nor transformers."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        activation(),
        _Block(width, width, 1, activation),
        _Block(width, 2 * width, 2, activation),
        _Block(2 * width, 4 * width, 2, activation),
        _Block(4 * width, 8 * width, 2, activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )


def build_model() -> tuple[str, nn.Module]:
    """A ResNet of ten classes, random weights, the best known that is installed; and its name."""
    if importlib.util.find_spec("torchvision") is not None:
        # a torchvision built for another torch is there and fails with RuntimeError when imported
        with contextlib.suppress(ImportError, RuntimeError):
            models = importlib.import_module("torchvision.models")
            return "torchvision's ResNet-50", models.resnet50(num_classes=10)
    if importlib.util.find_spec("transformers") is not None:
        with contextlib.suppress(ImportError):
            transformers = importlib.import_module("transformers")
            config = transformers.ResNetConfig(num_labels=10)
            return "transformers' ResNet-50", transformers.ResNetForImageClassification(config)
    return "a small ResNet of our own", own_resnet()


def digits(steps: int, batch: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """``steps`` batches of scikit-learn's digits: images [batch, 3, size, size] and labels."""
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise Missing(
            f'scikit-learn is missing: pip install "fastnorm-torch[demo]" ({error})'
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False).expand(
        -1, 3, -1, -1
    )
    y = torch.as_tensor(labels)
    return [(x[i * batch : (i + 1) * batch], y[i * batch : (i + 1) * batch]) for i in range(steps)]


# training, and what is kept of it


@dataclass
class Training:
    """What a few steps of one variant gave: fp64 copies of its numbers, and what they cost."""

    name: str
    losses: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    milliseconds: float = 0.0
    held: int = 0  # bytes


def _logits(output: Any) -> Tensor:
    result: Tensor = getattr(output, "logits", output)
    return result


def held_for_backward(model: nn.Module, x: Tensor) -> int:
    """Bytes that one forward keeps for its backward, beside parameters, buffers and input."""
    own = {
        tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), x]
    }
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = _logits(
            model(x)
        )  # alive until the sum is taken, so no storage is counted under a reused address
    total = sum(storages.values())
    del output
    return total


def train(
    name: str, model: nn.Module, batches: list[tuple[Tensor, Tensor]], tick: Callable[[], None]
) -> Training:
    """Train by SGD with momentum, one step per batch."""
    result = Training(name)
    weight = next(model.parameters())
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    times = []
    for x, y in batches:
        x, y = x.to(weight), y.to(weight.device)
        optimizer.zero_grad()
        start = time.perf_counter()
        output = _logits(model(x))
        loss = F.cross_entropy(output, y)
        loss.backward()
        optimizer.step()
        result.losses.append(loss.detach().cpu().double())  # waits for the GPU
        times.append(time.perf_counter() - start)
        result.outputs.append(output.detach().cpu().double())
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        result.gradients.append(torch.cat(gradients).cpu().double())
        tick()
    result.buffers = [torch.cat([b.flatten().double() for b in model.buffers()]).cpu()]
    result.milliseconds = 1e3 * statistics.median(times[1:] or times)
    result.held = held_for_backward(model, batches[0][0].to(weight))
    return result


QUANTITIES = ("losses", "outputs", "gradients", "buffers")


def distance(a: Training, b: Training, quantity: str) -> float:
    """The largest relative distance of ``a`` from ``b`` over the steps, in norm."""
    pairs = zip(getattr(a, quantity), getattr(b, quantity), strict=True)
    return max(float((x - y).norm() / y.norm().clamp_min(FLOOR)) for x, y in pairs)


def largest(a: Training, b: Training, quantity: str) -> float:
    """The largest difference of one number over the steps."""
    pairs = zip(getattr(a, quantity), getattr(b, quantity), strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)


# the demo


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError as error:
        raise Missing(f'tqdm is missing: pip install "fastnorm-torch[demo]" ({error})') from error
    with tqdm(total=total, unit="step") as bar:

        def tick(name: str) -> None:
            bar.set_description(name)
            bar.update()

        yield tick


def variants(model: nn.Module, device: str) -> dict[str, tuple[nn.Module, str]]:
    """What is trained: name -> (a copy of the model, the backend it runs on)."""
    fast = copy.deepcopy(model)
    print(fastnorm.replace_(fast), end="\n\n")
    print(fastnorm.fuse_(fast), end="\n\n", flush=True)
    result = {
        "fp64": (copy.deepcopy(model).double(), "auto"),
        "torch": (copy.deepcopy(model), "auto"),
        "fastnorm": (fast, "auto"),
    }
    if device == "cpu":
        # auto is torch's own function here: this one runs our ops and our autograd Functions
        result["fastnorm, its own ops"] = (copy.deepcopy(fast), "reference")
    return result


def compare(found: dict[str, Training]) -> bool:
    """Print the table, and tell whether every variant of ours is as close to fp64 as torch is."""
    exact, plain = found["fp64"], found["torch"]
    heads = [f"{quantity:>11}" for quantity in QUANTITIES]
    print(f"\n{'largest difference':24}{''.join(heads)}{'ms/step':>10}{'MiB held':>10}")
    good = True
    for name, training in found.items():
        if training is exact:
            continue
        row = "".join(f"{largest(training, plain, quantity):11.1e}" for quantity in QUANTITIES)
        wrong = [
            quantity
            for quantity in QUANTITIES
            if not agrees(distance(training, exact, quantity), distance(plain, exact, quantity))
        ]
        good = good and not wrong
        cost = f"{training.milliseconds:10.0f}{training.held / 2**20:10.1f}"
        print(f"{name:24}{row}{cost}" + (f"  DIFFERS: {', '.join(wrong)}" if wrong else ""))
    return good


def run(steps: int = STEPS, batch: int = BATCH, size: int = SIZE) -> bool:
    """Train the same steps with torch's layers and with ours; print both; tell if they agree."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = digits(steps, batch, size)
    torch.manual_seed(0)
    source, model = build_model()
    print(
        f"{source}, {steps} steps on {batch} handwritten digits of {size} x {size}, on {device}\n"
    )
    trained = variants(model.to(device), device)
    found = {}
    with _progress(steps * len(trained)) as tick:
        for name, (variant, backend) in trained.items():
            with fastnorm.backend(backend):
                found[name] = train(name, variant, batches, lambda name=name: tick(name))  # type: ignore[misc]
    same = compare(found)
    if device == "cpu":
        print(
            "(on a CPU `fastnorm` is torch's own functions, and `its own ops` is what is compared)"
        )
    kernels = check_kernels(device)
    print("\nThey agree." if same and kernels else "\nThey DIFFER: see above.")
    return same and kernels


def main(only_layers: bool = False) -> int:
    """``python -m fastnorm demo``: 0 if all agree, 1 if not, 2 if something is not installed."""
    try:
        return 0 if (check_layers("cpu") if only_layers else run()) else 1
    except Missing as error:
        print(error, file=sys.stderr)
        return 2
