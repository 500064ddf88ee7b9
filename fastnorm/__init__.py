"""Fused normalisation and activation layers for PyTorch, as drop-ins for torch.nn's own.

Example:
    >>> import fastnorm
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> _ = fastnorm.replace_(model)
    >>> _ = fastnorm.fuse_(model)
    >>> type(model[1]).__name__
    'BatchNormAct2d'
"""

from fastnorm import functional as functional
from fastnorm.dispatch import backend, backends, compile_policy, set_backend
from fastnorm.fuse import fuse_
from fastnorm.init import data_dependent_init_
from fastnorm.modules import (
    GELU,
    SELU,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    LayerNorm,
    MeanOnlyBatchNorm1d,
    MeanOnlyBatchNorm2d,
    MeanOnlyBatchNorm3d,
    SiLU,
    Swish,
    SyncBatchNorm,
)
from fastnorm.modules.sync_batch_norm import convert_sync_batchnorm
from fastnorm.modules.weight_norm import remove_weight_norm, weight_norm
from fastnorm.modules.weight_norm_group import weight_norm_
from fastnorm.replace import replace_, restore_

__version__ = "0.1.0"

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
    "backend",
    "backends",
    "compile_policy",
    "convert_sync_batchnorm",
    "data_dependent_init_",
    "functional",
    "fuse_",
    "remove_weight_norm",
    "replace_",
    "restore_",
    "set_backend",
    "weight_norm",
    "weight_norm_",
]
