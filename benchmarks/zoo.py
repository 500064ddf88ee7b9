"""The models whose training steps are measured, and where each of them comes from.

torchvision's, timm's or transformers' model where one of them is installed, with random weights;
else a small one of our own. The row says which.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from benchmarks.unet import UNet3d
from benchmarks.vocoder import Vocoder
from fastnorm.demo import own_resnet

CLASSES = 1000
# under autocast parameters are fp32; in pure bf16 they are bf16 too, and nothing is cast
AUTOCAST, PURE, FLOAT = "autocast", "bfloat16", "float32"


Sources = tuple[tuple[str, Callable[[], nn.Module]], ...]


@dataclass(frozen=True)
class Model:
    """A model and what it is trained on; `sources` names its builders, the best first."""

    name: str
    sources: Sources
    shape: tuple[int, ...]  # on a GPU
    cpu_shape: tuple[int, ...]
    layout: str = "nhwc"  # of images: channels_last is how people train them
    precision: str = AUTOCAST  # on a CPU everything is fp32
    tokens: bool = False
    importance: float = 1.8

    @property
    def variant(self) -> str:
        """What its rows are called: two precisions of one dtype are two things."""
        return f"{self.name}_bf16" if self.precision == PURE else self.name

    @property
    def dtype(self) -> str:
        return "float32" if self.precision == FLOAT else "bfloat16"

    def build(self) -> tuple[str, nn.Module]:
        """(where it is from, the model): the first source that is installed."""
        for source, make in self.sources:
            # a torchvision built for another torch fails with RuntimeError when it is imported
            with contextlib.suppress(ImportError, AttributeError, RuntimeError):
                return source, make()
        raise ImportError(f"none of {', '.join(name for name, _ in self.sources)} is installed")


def _of(package: str, name: str, *arguments: Any, **options: Any) -> Callable[[], Any]:
    """Import a package when the model is wanted, and call one of its functions."""
    return lambda: getattr(importlib.import_module(package), name)(*arguments, **options)


def _transformers(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = importlib.import_module("transformers")
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return made

    return make


_IMAGE, _SMALL = (128, 3, 224, 224), (4, 3, 64, 64)
# without dropout, some of which has no module, and without masks: every step has the same numbers
_WAVE = {
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "feat_proj_dropout"), 0.0),
    **{"activation_dropout": 0.0, "layerdrop": 0.0, "apply_spec_augment": False},
}
_VIT = {"num_labels": CLASSES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _efficientnet(which: str, width: float, depth: float, last: int, size: int) -> Sources:
    return (
        ("torchvision", _of("torchvision.models", f"efficientnet_{which}")),
        ("timm", _of("timm", "create_model", f"efficientnet_{which}")),
        (
            "transformers",
            _transformers(
                "EfficientNetForImageClassification", "EfficientNetConfig", image_size=size,
                width_coefficient=width, depth_coefficient=depth, hidden_dim=last,
            ),
        ),
    )  # fmt: skip


_RESNET = Model(
    "resnet50",
    (
        ("torchvision", _of("torchvision.models", "resnet50")),
        ("timm", _of("timm", "create_model", "resnet50")),
        ("transformers", _transformers("ResNetForImageClassification", "ResNetConfig")),
        ("our own ResNet of ten layers", own_resnet),
    ),
    _IMAGE, _SMALL, importance=0.8,
)  # fmt: skip
_B4 = _efficientnet("b4", 1.4, 1.8, 1792, 380)

MODELS: dict[str, Model] = {
    model.variant: model
    for model in (
        _RESNET,
        replace(_RESNET, precision=PURE, importance=0.85),
        replace(_RESNET, name="resnet50_nchw", layout="nchw", importance=0.85),
        replace(
            _RESNET, name="resnet50_nchw", layout="nchw", precision=PURE, importance=1.85
        ),
        Model(
            "efficientnet_b0", _efficientnet("b0", 1.0, 1.0, 1280, 224),
            _IMAGE, _SMALL, importance=0.8,
        ),
        Model("efficientnet_b4", _B4, (32, 3, 380, 380), _SMALL, importance=0.85),
        Model(
            "mobilenet_v2",
            (
                ("torchvision", _of("torchvision.models", "mobilenet_v2")),
                ("timm", _of("timm", "create_model", "mobilenetv2_100")),
                (
                    "transformers",
                    _transformers("MobileNetV2ForImageClassification", "MobileNetV2Config"),
                ),
            ),
            _IMAGE, _SMALL, importance=0.85,
        ),
        Model(
            "unet_3d", (("our own 3-D U-Net", UNet3d),),
            (2, 1, 128, 128, 128), (1, 1, 16, 16, 16), layout="nchw", importance=0.85,
        ),
        Model(
            "convnext_tiny",
            (
                ("torchvision", _of("torchvision.models", "convnext_tiny")),
                ("timm", _of("timm", "create_model", "convnext_tiny")),
                ("transformers", _transformers("ConvNextForImageClassification", "ConvNextConfig")),
            ),
            (64, 3, 224, 224), _SMALL,
        ),
        Model(
            "vit_b_16",
            (
                ("torchvision", _of("torchvision.models", "vit_b_16")),
                ("timm", _of("timm", "create_model", "vit_base_patch16_224")),
                ("transformers", _transformers("ViTForImageClassification", "ViTConfig", **_VIT)),
            ),
            (64, 3, 224, 224), (1, 3, 224, 224), layout="nchw",
        ),
        Model(
            "bert_base",
            (("transformers", _transformers("BertModel", "BertConfig")),),
            (32, 128), (1, 32), layout="rows", tokens=True,
        ),
        Model(
            "wav2vec2_base",
            (("transformers", _transformers("Wav2Vec2Model", "Wav2Vec2Config", **_WAVE)),),
            (8, 64000), (1, 4000), layout="rows", importance=1.85,
        ),
        Model(
            "hifigan_v1",
            (("our own generator in the style of HiFi-GAN V1", Vocoder),),
            (16, 80, 32), (1, 80, 4), layout="nchw", precision=FLOAT, importance=0.9,
        ),
    )
}  # fmt: skip
