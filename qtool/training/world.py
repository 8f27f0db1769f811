"""The processes that train together; here there is one, and `qtool.training.parallel` has several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qtool.processes import processes

if TYPE_CHECKING:
    from qtool.training.loop import Task

CPU = torch.device("cpu")


class World:
    """The processes of this run, and which one this is: it is alone."""

    def __init__(self, device: torch.device = CPU, rank: int = 0, size: int = 1) -> None:
        self.device, self.rank, self.size = device, rank, size

    @classmethod
    def of_environment(cls, device: torch.device) -> World:
        """As torchrun's variables say. Raises UsageError for a device that several processes cannot share."""
        if processes() == 1:
            return World(device)
        from qtool.training.parallel import Processes  # half a second

        return Processes.of_torchrun(device)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes, however long one works alone."""

    def close(self) -> None:
        """Take leave of the others; what runs under torchrun calls it last."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        return tensor

    def agree(self, decision: bool) -> bool:
        """What the first process decides, in all of them."""
        return decision

    def shard(self, task: Task) -> None:
        """From now on each parameter of the task is a DTensor, and a gradient the sum over all processes.

        Which parameters are trained is settled here.
        """

    def settle(self, task: Task) -> None:
        """After passes without a backward one: forget the gathered parameters, which may be about to change."""

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """While active, what a unit or the task itself shares is there as a whole. All processes enter it."""
        yield

    def full(self, tensor: Tensor) -> Tensor:
        """The whole of a parameter or of what belongs to one. All processes call it."""
        return tensor

    def local(self, tensor: Tensor) -> Tensor:
        """This process's share of it, in the same memory."""
        return tensor

    @torch.no_grad()
    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Copy a whole value, which every process has, into a parameter or what belongs to one."""
        tensor.copy_(value)
