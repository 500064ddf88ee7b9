"""`python -m benchmarks train`: the same training with torch's layers and with ours.

A small ResNet and a small ViT on scikit-learn's digits, from the same seed through the same
batches: torch, torch again with the images of every batch in another order, torch in another order
and with rows and columns of images, kernels and positions exchanged, and `replace_` + `fuse_`. The
order of images and pixels is the order in which batch norm's statistics, convolutions, every
parameter's gradient and the loss are summed: it changes roundings and nothing else, so how far
torch's own runs end from each other is how far rounding carries a training. Ours has to end no
further away.

Of every tensor of the final state_dict, parameters and buffers alike, of all of them as one vector,
and of the losses:

    spread = max over pairs of torch's runs of |a - b| / |torch|
    ours   = |fastnorm - torch| / |torch|
    it is the same training where ours <= LIMIT * spread + ROUNDING

with the 2-norm, in fp64, ROUNDING that of one fp32 number, and `torch` the run whose batches have
the order that ours have. The models are smooth: a ReLU turns a rounding near zero into another
gradient, and two of torch's own runs of a ResNet with ReLU were 1e-2 apart after thirty steps on a
CPU, among which no error would be found.
"""

from __future__ import annotations

import argparse
import collections
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm
from benchmarks import training_file
from benchmarks.environment import environment
from benchmarks.refused import Refused, device_of
from benchmarks.training_file import LIMIT, Compared, Trained, Training
from benchmarks.vit import VisionTransformer, exchanged
from fastnorm.demo import Missing, digits, own_resnet

STEPS, SIZE, SEED = 300, 32, 0
BATCHES = {"cuda": 64, "cpu": 32}  # on a GPU, large enough for `auto` to run kernels of ours
SAVED = 50  # steps from one writing of the file to the next
# the order of the images alone leaves the sum over each image as it was
NAMES = ("torch", "torch, reordered", "torch, reordered, transposed", "fastnorm")
TRANSPOSED, OURS = NAMES[2:]

State = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """A model and how it is trained."""

    about: str
    build: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]


# SGD in both: Adam's step does not change with its gradients' scale, which a kernel may get wrong
RECIPES = {
    "resnet": Recipe(
        "our own ResNet of ten layers, 16 channels and more, BatchNorm2d and SiLU; "
        "SGD, lr 0.02, momentum 0.9",
        lambda: own_resnet(16, nn.SiLU),
        lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    ),
    "vit": Recipe(
        "ViT of 4 layers, width 64, LayerNorm and GELU; SGD, lr 0.02, momentum 0.9",
        VisionTransformer,
        lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    ),
}


# training


def batches(steps: int, batch: int, order: int) -> Iterator[Tensor]:
    """Which images each step takes: the same for every order, but in another order for each."""
    images = digits(1, 1 << 20, SIZE)[0][1].numel()
    drawn = torch.Generator("cpu").manual_seed(SEED)
    shuffled = torch.Generator("cpu").manual_seed(SEED + order)
    for _ in range(steps):  # drawn on the CPU: the same for every device
        chosen = torch.randperm(images, generator=drawn, device="cpu")[:batch]
        order_of = torch.randperm(batch, generator=shuffled, device="cpu")
        yield chosen[order_of] if order else chosen


def train(
    model: nn.Module,
    recipe: Recipe,
    chosen: Iterator[Tensor],
    device: str,
    tick: Callable[[list[float]], None],
    transposed: bool = False,
) -> State:
    """Train; the final state in fp64 on the CPU. `tick` gets every loss so far, now and then."""
    ((images, labels),) = digits(1, 1 << 20, SIZE)
    images, labels = images.to(device), labels.to(device)
    if transposed:
        images = images.transpose(2, 3).contiguous()
        model.load_state_dict(exchanged(model.state_dict()))
    optimizer = recipe.optimizer(model.parameters())
    losses: list[Tensor] = []
    for indices in chosen:
        here = indices.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[here]), labels[here])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if len(losses) % SAVED == 0:
            tick([float(one) for one in losses])
    tick([float(one) for one in losses])
    state = exchanged(model.state_dict()) if transposed else model.state_dict()
    return {name: t.detach().double().cpu() for name, t in state.items()}


def surgery(model: nn.Module) -> str:
    """What a user types, and what it did in a word."""
    replaced, fused = fastnorm.replace_(model), fastnorm.fuse_(model)
    return f"replace_ changed {replaced.changed}, fuse_ {fused.changed}"


class _Count(TorchDispatchMode):
    """Counts the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastnorm":
            self.calls[func._schema.name.removeprefix("fastnorm::")] += 1
        return func(*args, **(kwargs or {}))


def calls(model: nn.Module, device: str, batch: int) -> dict[str, int]:
    """How often one forward of a model calls each op of ours: what it does not call is torch's."""
    with _Count() as count:
        copy.deepcopy(model)(torch.zeros(batch, 3, SIZE, SIZE, device=device))
    return dict(count.calls)


# how far apart


def _apart(a: Tensor, b: Tensor, scale: Tensor) -> float:
    """Relative distance; 0 of equal tensors, even of zeros."""
    difference = (a - b).norm()
    return float(difference / scale.norm()) if difference != 0 else 0.0


def compare(torchs: list[State], ours: State, losses: dict[str, list[float]]) -> Compared:
    """Spread and our distance of every tensor, of all together, and of the losses."""
    first = torchs[0]
    if not all(state.keys() == first.keys() for state in (*torchs, ours)):
        raise ValueError(f"our state_dict has {list(ours)}, torch's {list(first)}")

    def both(found: list[Tensor], mine: Tensor) -> tuple[float, float]:
        pairs = [(a, b) for i, a in enumerate(found) for b in found[:i]]
        return max(_apart(a, b, found[0]) for a, b in pairs), _apart(mine, found[0], found[0])

    def vector(state: State) -> Tensor:
        return torch.cat([t.flatten() for t in state.values()])

    curves = [torch.tensor(losses[name], dtype=torch.float64) for name in NAMES]
    return Compared(
        all=both([vector(state) for state in torchs], vector(ours)),
        losses=both(curves[:-1], curves[-1]),
        tensors={name: both([s[name] for s in torchs], ours[name]) for name in first},
    )


# a model, and the command


def train_model(name: str, chosen: argparse.Namespace, device: str, save: Any) -> Trained:
    """Every run of one model; `save(trained)` writes the file as it goes."""
    recipe = RECIPES[name]
    trained = Trained(name, recipe.about, surgery="", calls={}, losses={})
    states = []
    for order, run in enumerate(NAMES):
        torch.manual_seed(SEED)
        model = recipe.build().to(device).train()
        backend = "auto"
        if run == OURS:
            order, backend, trained.surgery = 0, chosen.backend, surgery(model)

        def tick(losses: list[float], run: str = run) -> None:
            trained.losses[run] = losses
            save(trained)

        started = time.monotonic()
        with fastnorm.backend(backend):
            if run == OURS:
                trained.calls = calls(model, device, chosen.batch)
            indices = batches(chosen.steps, chosen.batch, order)
            states.append(train(model, recipe, indices, device, tick, run == TRANSPOSED))
        losses, took = trained.losses[run], time.monotonic() - started
        print(
            f"{name:8}{run:32} loss {losses[0]:.3f} to {losses[-1]:.4f}, {took:.0f} s", flush=True
        )
    trained.compared = compare(states[:-1], states[-1], trained.losses)
    save(trained)
    return trained


def _checked(chosen: argparse.Namespace) -> str:
    """The device, with what was left open chosen for it and what is not there refused."""
    device = device_of(chosen.device)
    chosen.batch = chosen.batch or BATCHES[device]
    chosen.backend = chosen.backend or ("reference" if device == "cpu" else "auto")
    if device == "cpu" and chosen.backend == "auto":
        raise Refused("--backend auto is torch's own functions on a CPU: choose reference")
    missing = None if chosen.backend == "auto" else fastnorm.backends()[chosen.backend]
    if missing:
        raise Refused(f"--backend {chosen.backend}: {missing}")
    if chosen.out.exists():
        raise Refused(f"{chosen.out} exists: a measurement is never overwritten; name another")
    try:
        digits(1, 1, SIZE)
    except Missing as error:
        raise Refused(str(error)) from None
    return device


def run(chosen: argparse.Namespace) -> int:
    """Train, compare, draw; 0 where it is the same training, 1 where not, 2 where refused."""
    try:
        device = _checked(chosen)
    except Refused as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    settings = {
        "steps": chosen.steps, "batch": chosen.batch, "size": SIZE, "seed": SEED,
        "backend": chosen.backend, "limit": LIMIT, "dtype": "float32, no TF32",
        "orders": "images of every batch by seed 1; by seed 2 and rows and columns exchanged",
    }  # fmt: skip
    kept = Training(environment(device, 0.0, chosen.note), settings)

    def save(trained: Trained) -> None:
        if trained not in kept.models:
            kept.models.append(trained)
        training_file.save(kept, chosen.out)

    # of one order and one layer, the same bits in every run: what differs is what is compared
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        for name in chosen.model:
            train_model(name, chosen, device, save)
    for trained in kept.models:
        print(training_file.verdict(trained))
    print(f"wrote {', '.join(map(str, training_file.draw(kept, chosen.out)))}")
    return 1 if any(training_file.faults(trained) for trained in kept.models) else 0


def _count(given: str) -> int:
    """A type for argparse: a number from 2 on."""
    if not given.isdecimal() or int(given) < 2:
        raise argparse.ArgumentTypeError(f"{given!r} is no whole number from 2 on")
    return int(given)


def register(subparsers: Any, several: Callable[[Any], Callable[[str], list[str]]]) -> None:
    """Add `train`; the parsed arguments' `run(arguments)` gives the exit status."""
    told = "the same training with torch's layers and with ours; exit status 1 if it is not"
    parser = subparsers.add_parser("train", help=told)
    every = list(RECIPES)
    parser.add_argument(
        "--model", type=several(every), default=every, metavar="NAMES", help=", ".join(every)
    )
    parser.add_argument("--steps", type=_count, default=STEPS, help=f"default {STEPS}")
    parser.add_argument("--batch", type=_count, help="default 64, on a CPU 32")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument(
        "--backend",
        choices=fastnorm.dispatch.CHOICES,
        help="of fastnorm; default auto, on a CPU reference",
    )
    parser.add_argument("--out", type=Path, default=Path("training.json"), help="training.json")
    parser.add_argument("--note", default="", help="kept in the file: what else the machine did")
    parser.set_defaults(run=run)
