"""Fused normalisation and activation layers for PyTorch, as drop-ins for torch.nn's own.

Example:
    >>> import torch, fastnorm
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> _ = fastnorm.replace_(model)
    >>> _ = fastnorm.fuse_(model)
    >>> type(model[1]).__name__
    'BatchNormAct2d'
"""

from fastnorm import functional as functional
from fastnorm.dispatch import backend, backends, set_backend

__version__ = "0.1.0"
