"""Training by several processes that `torchrun` started: each holds a share of every parameter (FSDP2).

Autocast is what lowers precision, with several processes as with one: parameters are gathered in float32, not in
16 bits as FSDP's own mixed precision would. So scales and norms are the same numbers in both.

A task calls each of its units equally often in all processes, since a call is a collective. All processes see one
file system and start from the same parameters.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from qtool.errors import UsageError
from qtool.processes import processes, rank
from qtool.training.world import World

if TYPE_CHECKING:
    from qtool.training.loop import Task

PATIENCE = timedelta(days=30)  # of processes for one that works alone
CLOSING_S = 0.2  # for gloo's threads to let go of their last tensors: later, that aborts the interpreter (torch 2.13)


class Processes(World):
    """Several processes, over torch.distributed."""

    @classmethod
    def of_torchrun(cls, device: torch.device) -> Processes:
        """As its variables say. Raises UsageError for a device that several processes cannot share."""
        if device.type == "cuda":
            local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= count:
                raise UsageError(f"process {local + 1} of this machine finds {count} GPUs", f"--nproc-per-node {count}")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        elif device.type != "cpu":
            raise UsageError(f"several processes cannot train on {device.type}", "--device cuda, or --device cpu")
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
        return cls(device, rank(), processes())

    def barrier(self) -> None:
        dist.all_reduce(torch.zeros(1))  # on the CPU: a waiting GPU would spin

    def close(self) -> None:
        dist.destroy_process_group()
        time.sleep(CLOSING_S)

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def agree(self, decision: bool) -> bool:
        return bool(self.sum(torch.tensor(float(decision and self.main))).item())

    def shard(self, task: Task) -> None:
        if isinstance(task, FSDPModule):
            return
        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.size,))
        for module in (*task.units(), task):
            fully_shard(module, mesh=mesh)
        for module in task.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other (torch 2.13)
                if hasattr(module, "set_reduce_scatter_unused_params"):  # since torch 2.13
                    module.set_reduce_scatter_unused_params(True)

    def settle(self, task: Task) -> None:
        for module in task.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        if isinstance(module, FSDPModule):
            module.unshard()
        yield
        if isinstance(module, FSDPModule):
            module.reshard()

    def full(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    @torch.no_grad()
    def put(self, tensor: Tensor, value: Tensor) -> None:
        value = value.to(self.device)
        if isinstance(tensor, DTensor):  # without a source nothing is sent: each process takes its share
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        self.local(tensor).copy_(value)
