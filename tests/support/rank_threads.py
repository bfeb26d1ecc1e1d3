"""Ranks that are threads of the test's own process, with the same models, runners and messages as real ones."""

from __future__ import annotations

import pickle
import queue
import threading
from pathlib import Path

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.execution.model_runner import ModelRunner
from engine.parallel.messages import Message
from engine.parallel.processes import RankEnded
from engine.parallel.runner import TensorParallelRunner
from kernels.integers import ceil_div

PATIENCE = 60.0


class Meeting:
    """Where the ranks of one model put their parts."""

    def __init__(self, size: int) -> None:
        self.parts: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)


class ThreadGroup:
    """One rank's group; implements `Group`."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank, self.size = rank, len(meeting.parts)

    def _exchange(self, part: Tensor) -> list[Tensor]:
        self._meeting.parts[self.rank] = part.clone()
        self._meeting.barrier.wait()
        parts = list(self._meeting.parts)
        self._meeting.barrier.wait()
        return parts

    def all_reduce(self, part: Tensor) -> Tensor:
        return torch.stack(self._exchange(part)).sum(dim=0)

    def all_gather(self, part: Tensor, width: int) -> Tensor:
        assert all(rank.shape[1] == ceil_div(width, self.size) for rank in self._exchange(part)[:-1])
        return torch.cat(self._exchange(part), dim=1)

    def broadcast(self, tensor: Tensor) -> Tensor:
        return self._exchange(tensor)[0]

    def minimum(self, value: int) -> int:
        return int(min(self._exchange(torch.tensor(value))))


class RankThreads:
    """All ranks but the first; implements `OtherRanks`."""

    def __init__(self, directory: Path, config: EngineConfig, meeting: Meeting) -> None:
        self._queues: list[queue.Queue[bytes | None]] = []
        self._error: BaseException | None = None
        self._meeting = meeting
        self.runners: dict[int, ModelRunner] = {}
        self._threads = []
        for rank in range(1, config.tensor_parallel_size):
            messages: queue.Queue[bytes | None] = queue.Queue()
            self._queues.append(messages)
            group = ThreadGroup(meeting, rank)
            thread = threading.Thread(target=self._serve, args=(directory, config, group, messages), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(
        self, directory: Path, config: EngineConfig, group: ThreadGroup, messages: queue.Queue[bytes | None]
    ) -> None:
        try:
            torch.set_num_threads(1)
            runner = self.runners[group.rank] = ModelRunner.from_pretrained(directory, config, group)
            while (data := messages.get()) is not None:
                message: Message = pickle.loads(data)
                message.on(runner)
        except BaseException as error:  # noqa: BLE001 - whatever it is, rank 0 is told
            self._error = error
            self._meeting.barrier.abort()

    def send(self, message: Message) -> None:
        data = pickle.dumps(message)
        for messages in self._queues:
            messages.put(data)

    def check(self) -> None:
        if self._error is not None:
            raise RankEnded(repr(self._error)) from self._error

    def close(self) -> None:
        for messages in self._queues:
            messages.put(None)
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


def parallel_runner(directory: Path, config: EngineConfig) -> TensorParallelRunner:
    """As `TensorParallelRunner.from_pretrained`, with threads."""
    meeting = Meeting(config.tensor_parallel_size)
    ranks = RankThreads(directory, config, meeting)
    try:
        return TensorParallelRunner(ModelRunner.from_pretrained(directory, config, ThreadGroup(meeting, 0)), ranks)
    except BaseException:
        meeting.barrier.abort()
        ranks.close()
        raise
