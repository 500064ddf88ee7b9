"""The layers as nn.Modules: they own parameters and buffers, nothing else. One file per family.

Weight norm is a parametrization, not a layer: ``fastnorm.weight_norm``, in modules/weight_norm.py.
"""

from fastnorm.modules.activation import GELU, SELU, SiLU, Swish
from fastnorm.modules.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    MeanOnlyBatchNorm1d,
    MeanOnlyBatchNorm2d,
    MeanOnlyBatchNorm3d,
)
from fastnorm.modules.layer_norm import LayerNorm
from fastnorm.modules.sync_batch_norm import SyncBatchNorm

__all__ = [
    "GELU",
    "SELU",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "LayerNorm",
    "MeanOnlyBatchNorm1d",
    "MeanOnlyBatchNorm2d",
    "MeanOnlyBatchNorm3d",
    "SiLU",
    "Swish",
    "SyncBatchNorm",
]
