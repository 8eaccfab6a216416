"""Data parallel under `torchrun`: every process takes its share of each batch.

Gradients of *sums* are added over the processes and divided once by the global count, so one
process and two give the same step. gloo on the CPU, nccl on CUDA.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0


def join_world(device: torch.device) -> World:
    """Join the processes that `torchrun` started; alone, a world of one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # One process reads and encodes the text while the others wait, which may take long.
        # Counters live on the CPU and go through gloo, gradients where the model is.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))
    return World(dist.get_rank(), dist.get_world_size())


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def share(start: int, count: int, world: World) -> tuple[int, int]:
    """This process's part (start, count) of the sequences start..start+count-1."""
    first = start + count * world.rank // world.size
    last = start + count * (world.rank + 1) // world.size
    return first, last - first


def add_up(tensors: list[Tensor], world: World) -> None:
    """Replace each tensor by its sum over all processes, in one message per dtype and device."""
    if world.size == 1:
        return
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in alike.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(flat)
        sizes = [tensor.numel() for tensor in same]
        for tensor, part in zip(same, flat.split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))


def gather(tensor: Tensor, world: World) -> list[Tensor]:
    """The tensors of all processes (equal shapes), in rank order."""
    if world.size == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor)
    return parts


def agree(flag: bool, world: World) -> bool:
    """True everywhere when it is true anywhere."""
    if world.size == 1:
        return flag
    total = torch.tensor([1.0 if flag else 0.0])
    dist.all_reduce(total)
    return bool(total.item() > 0)


def wait_for_all(world: World) -> None:
    if world.size > 1:
        dist.barrier()
