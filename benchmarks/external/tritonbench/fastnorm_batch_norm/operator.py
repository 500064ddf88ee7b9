"""Batch norm in training as a TritonBench operator: torch, torch.compile and fastnorm.

The shapes are ResNet-50's at batch 256. There are no running statistics: torch's backward refuses
to run once a later forward has moved them. FASTNORM_BACKEND chooses the backend of fastnorm.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from tritonbench.utils.triton_op import (
    BenchmarkOperator,
    BenchmarkOperatorMetrics,
    Mode,
    register_benchmark,
    register_metric,
    register_x_val,
)

import fastnorm

RESNET50 = (
    (64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7),
    (2048, 7),
)  # fmt: skip


def parse_args(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--channels-last", action="store_true")
    return parser.parse_args(args)


class Operator(BenchmarkOperator):
    DEFAULT_PRECISION = "bf16"
    DEFAULT_METRICS = ["latency", "gbps", "speedup"]  # noqa: RUF012
    is_compute_bound = False

    def __init__(self, tb_args: argparse.Namespace, extra_args: list[str] | None = None):
        super().__init__(tb_args, extra_args=extra_args)
        chosen = parse_args(extra_args or [])
        self.batch, self.channels_last = chosen.batch, chosen.channels_last

    def get_input_iter(self) -> Iterator[tuple[torch.Tensor, ...]]:
        for C, side in RESNET50:
            x = torch.randn(self.batch, C, side, side, dtype=self.dtype, device=self.device)
            if self.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            weight = torch.rand(C, device=self.device) + 0.5
            bias = torch.randn(C, device=self.device)
            yield x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()

    @register_benchmark(baseline=True)
    def torch_batch_norm(self, x, weight, bias) -> Callable[[], torch.Tensor]:
        return lambda: F.batch_norm(x, None, None, weight, bias, training=True)

    @register_benchmark()
    def torch_compile_batch_norm(self, x, weight, bias) -> Callable[[], torch.Tensor]:
        if self.mode != Mode.FWD:  # backward runs many times over one forward
            torch._functorch.config.donated_buffer = False
        compiled = torch.compile(F.batch_norm)
        return lambda: compiled(x, None, None, weight, bias, training=True)

    @register_benchmark()
    def fastnorm_batch_norm(self, x, weight, bias) -> Callable[[], torch.Tensor]:
        batch_norm = fastnorm.functional.batch_norm
        return lambda: batch_norm(x, None, None, weight, bias, training=True)

    def get_bwd_fn(self, fwd_fn: Callable[[], torch.Tensor]) -> Callable[[], None]:
        y = fwd_fn()
        dy = y.detach().cos()  # the same for everyone
        return lambda: y.backward(dy, retain_graph=True)

    def get_grad_to_none(self, args: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        return list(args)

    @register_x_val(label="(N, C, H, W)")
    def get_x_val(self, example_inputs: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
        return tuple(example_inputs[0].shape)

    @register_metric()
    def gbps(
        self, fn: Callable, args: tuple[torch.Tensor, ...], metrics: BenchmarkOperatorMetrics
    ) -> float:
        """Of the fewest bytes: x -> y forward, x and dy -> dx backward."""
        tensors = {Mode.FWD: 2, Mode.FWD_NO_GRAD: 2, Mode.BWD: 3, Mode.FWD_BWD: 5}[self.mode]
        return tensors * args[0].numel() * args[0].element_size() / metrics.latency * 1e-6
