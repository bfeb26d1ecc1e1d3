"""What the ranks of one model do together: each computes a part, and these operations join the parts.

A group is handed to the model that it belongs to, so that two engines in one process cannot mix. Every rank calls the
same operations in the same order.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from kernels.integers import ceil_div

# Its types say little of what is in it.
dist: Any = torch.distributed

# Longer than any load: a rank that has ended is noticed by its closed connection, one that hangs by the watchdog.
_TIMEOUT = timedelta(hours=2)


class Group(Protocol):
    """The ranks that share a model, as one of them sees them."""

    @property
    def rank(self) -> int:
        """Its own number, from 0."""

    @property
    def size(self) -> int: ...

    def all_reduce(self, part: Tensor) -> Tensor:
        """The sum of all ranks' `part`, which may be overwritten."""

    def all_gather(self, part: Tensor, width: int) -> Tensor:
        """All ranks' `[S, ceil(width / size)]`, of which the last may be narrower, side by side: `[S, width]`."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor; that of other ranks has the same shape and is overwritten."""

    def minimum(self, value: int) -> int:
        """The least of all ranks' values, on the host."""


class Alone:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, part: Tensor) -> Tensor:
        return part

    def all_gather(self, part: Tensor, width: int) -> Tensor:
        del width
        return part

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor

    def minimum(self, value: int) -> int:
        return value


ALONE = Alone()


class ProcessGroup:
    """Ranks in processes of their own on one machine: NCCL between GPUs, gloo between CPUs and for what the host asks.

    The backends are made directly, since torch's own `init_process_group` knows one group a process.
    """

    def __init__(self, rendezvous: Path, rank: int, size: int, device: torch.device) -> None:
        """Wait for the other ranks at `rendezvous`, a file in a directory that is private to them."""
        self.rank, self.size = rank, size
        store = dist.FileStore(str(rendezvous), size)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = _TIMEOUT
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        self._host = dist.ProcessGroupGloo(dist.PrefixStore("host", store), rank, size, options)
        self._device = self._host
        if device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = _TIMEOUT
            self._device = dist.ProcessGroupNCCL(dist.PrefixStore("device", store), rank, size, nccl)
            # The communicator must be there before a CUDA graph is captured.
            self.all_reduce(torch.zeros(1, device=device))

    def all_reduce(self, part: Tensor) -> Tensor:
        part = part.contiguous()
        self._device.allreduce([part]).wait()
        return part

    def all_gather(self, part: Tensor, width: int) -> Tensor:
        rows, each = len(part), ceil_div(width, self.size)
        padded = F.pad(part, (0, each - part.shape[1])) if part.shape[1] < each else part.contiguous()
        gathered = padded.new_empty(self.size * rows, each)
        self._device._allgather_base(gathered, padded).wait()
        return gathered.view(self.size, rows, each).transpose(0, 1).reshape(rows, -1)[:, :width].contiguous()

    def broadcast(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self._device.broadcast([tensor], dist.BroadcastOptions()).wait()
        return tensor

    def minimum(self, value: int) -> int:
        number = torch.tensor([value])
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        self._host.allreduce([number], options).wait()
        return int(number)

    def abort(self) -> None:
        """End what waits for other ranks on the device, from any thread: a rank has ended. The group is of no more use.

        gloo notices by itself.
        """
        if self._device is not self._host:
            self._device.abort()
