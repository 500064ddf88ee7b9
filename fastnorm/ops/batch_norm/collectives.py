"""What synchronised batch norm asks of torch.distributed: who shares statistics, and the two
collectives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def check_group(process_group: Any) -> None:
    """TypeError unless this is a process group, or what new_group gives to a process outside it."""
    if process_group is None or not dist.is_available():
        return
    outside = dist.GroupMember.NON_GROUP_MEMBER
    if not (isinstance(process_group, dist.ProcessGroup) or process_group is outside):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup or None, got "
            f"{type(process_group).__name__}: make one with torch.distributed.new_group(ranks)"
        )


def members(process_group: Any) -> tuple[int, str] | None:
    """(processes, name) of a group, the whole world's for None; None where there is nobody to ask:
    no group was initialised, it has one process, this process is outside it."""
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise RuntimeError(
                "synchronised batch norm: its process_group does not exist any more, because "
                "torch.distributed is not initialised: call init_process_group and set a group "
                "made since then, or set process_group to None for batch norm in one process"
            )
        return None
    group: Any = dist.group.WORLD if process_group is None else process_group
    ranks = dist.get_world_size(group)
    return (ranks, group.group_name) if ranks > 1 else None


def _unserved(tensor: Tensor, group: str) -> str | None:
    """Why a process group cannot carry a tensor; None where that is not what failed."""
    found = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type, attr-defined]
    try:
        found._get_backend(tensor.device)
    except RuntimeError:
        return (
            f"synchronised batch norm: the process group ({dist.get_backend_config(found)}) has "
            f"no backend for tensors on {tensor.device.type}: init_process_group('gloo') serves "
            "the CPU, 'nccl' CUDA, 'cpu:gloo,cuda:nccl' both"
        )
    return None


def communicate(collective: str, tensor: Tensor, *arguments: Any) -> Tensor:
    """A functional collective, waited for; ``arguments`` ends with the name of the group.

    The operators behind torch.distributed._functional_collectives: torch.compile keeps them in its
    graph, and they have the same names in every version of torch that is supported.
    """
    collectives = torch.ops._c10d_functional
    start = getattr(collectives, collective)
    if torch.compiler.is_compiling():
        found: Tensor = collectives.wait_tensor(start(tensor, *arguments))
        return found
    try:
        found = collectives.wait_tensor(start(tensor, *arguments))
    except RuntimeError as error:
        reason = _unserved(tensor, arguments[-1])
        if reason is None:
            raise
        raise RuntimeError(reason) from error
    return found


class AllReduce(torch.autograd.Function):
    """A sum over all processes that can be differentiated any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return communicate("all_reduce", x, "sum", group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return AllReduce.apply(dy.contiguous(), ctx.group), None  # type: ignore[no-untyped-call]
