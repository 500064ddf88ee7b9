"""The one table of cases: for every op what we call, what torch would, and on which tensors."""

from __future__ import annotations

from tests.cases.activation import activation_cases, swish_cases
from tests.cases.batch_norm import batch_norm_cases, mean_only_cases
from tests.cases.case import Case
from tests.cases.layer_norm import layer_norm_cases
from tests.cases.weight_norm import weight_norm_cases

__all__ = ["CASES", "Case"]

CASES = [
    *batch_norm_cases(),
    *mean_only_cases(),
    *layer_norm_cases(),
    *weight_norm_cases(),
    *activation_cases(),
    *swish_cases(),
]
