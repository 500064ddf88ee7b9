"""The layers as nn.Modules: they own parameters and buffers, nothing else. One file per family.

Weight norm is a parametrization, not a layer: ``fastnorm.weight_norm``, in modules/weight_norm.py.
"""
