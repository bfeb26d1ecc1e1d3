"""What processes use of the machine: memory, and seconds of CPU beside everything else's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil


def available_memory() -> float:
    """The share of the main memory that is free, 0 to 1."""
    memory = psutil.virtual_memory()
    return memory.available / memory.total


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return [pid]


def peak_memory(pids: Iterable[int]) -> int:
    """Bytes: the highest resident size of each process, summed. What they share counts for each."""
    return sum(_peak(pid) for pid in pids)


def proportional_memory(pids: Iterable[int]) -> int:
    """Resident bytes of processes together: a page that n of them share counts once."""
    return sum(map(_proportional, pids))


@dataclass(frozen=True, slots=True)
class CpuTime:
    """Seconds of CPU since some moment: of everything, of one family of processes, and stolen by the hypervisor."""

    busy: float
    family: float
    stolen: float

    @classmethod
    def now(cls, pid: int) -> CpuTime:
        """Of the machine, and of `pid` and what it started."""
        times = psutil.cpu_times()
        busy = times.user + times.nice + times.system + times.irq + times.softirq
        return cls(busy, sum(map(cpu_seconds, family(pid))), times.steal)

    def others_since(self, before: CpuTime) -> float:
        """Seconds of CPU that went to anything else, the hypervisor's other guests included."""
        busy = self.busy - before.busy - (self.family - before.family)
        return max(0.0, busy) + self.stolen - before.stolen


def cpu_seconds(pid: int) -> float:
    """Seconds of CPU of a process, and of its children that have ended."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system + times.children_user + times.children_system


def _proportional(pid: int) -> int:
    """Bytes, in which a page that n processes share counts as an n-th."""
    try:
        return int(psutil.Process(pid).memory_full_info().pss)
    except psutil.Error:
        return 0  # it has just ended


def _peak(pid: int) -> int:
    """Bytes; psutil has no highest resident size."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0  # it has just ended
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
