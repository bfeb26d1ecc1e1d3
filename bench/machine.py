"""The machine that measures: what it is, what it can compute in, and what else it was doing meanwhile."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("celery", "fastapi", "psycopg", "sqlalchemy", "torch", "transformers")
_TICKS = os.sysconf("SC_CLK_TCK")


def circumstances() -> dict[str, Any]:
    """Where, when and with what something was measured."""
    return {
        "at": time.strftime("%FT%TZ", time.gmtime()),
        "commit": _commit(),
        "cpu": _cpuinfo("model name") or platform.processor(),
        "cores": cores(),
        "computes_in": computes_in(),
        "memory_gib": round(_meminfo("MemTotal") / 2**30, 1),
        "load_1_min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def computes_in() -> str:
    """bfloat16 where the CPU has instructions for it, else float32."""
    return "bfloat16" if _has("avx512_bf16", "amx_bf16") else "float32"


def multiplies_int8() -> bool:
    """Whether the CPU has instructions for products of 8-bit integers."""
    return _has("avx512_vnni", "avx_vnni", "amx_int8")


def available_memory() -> float:
    """The share of the main memory that is free, 0 to 1."""
    return _meminfo("MemAvailable") / _meminfo("MemTotal")


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for other, fields in _stats():
        children.setdefault(int(fields[1]), []).append(other)
    found = [pid]
    for one in found:
        found.extend(children.get(one, ()))
    return found


def peak_memory(pids: Iterable[int]) -> int:
    """Bytes: the highest resident size of each process, summed. What they share counts for each."""
    return sum(_peak(pid) for pid in pids)


@dataclass(frozen=True, slots=True)
class CpuTime:
    """Seconds of CPU since some moment: of everything, of one family of processes, and stolen by the hypervisor."""

    busy: float
    family: float
    stolen: float

    @classmethod
    def now(cls, pid: int) -> CpuTime:
        """Of the machine, and of `pid` and what it started."""
        user, nice, system, _idle, _iowait, irq, softirq, steal = (
            int(ticks) / _TICKS for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        members = set(family(pid))
        # Of itself, and of its children that have ended: fields 14 to 17, counted from the state, which is the third.
        used = sum(sum(map(int, fields[11:15])) for one, fields in _stats() if one in members)
        return cls(user + nice + system + irq + softirq, used / _TICKS, steal)

    def others_since(self, before: CpuTime) -> float:
        """Seconds of CPU that went to anybody else, the hypervisor's other guests included."""
        busy = self.busy - before.busy - (self.family - before.family)
        return max(0.0, busy) + self.stolen - before.stolen


def _stats() -> Iterable[tuple[int, list[str]]]:
    """Of each process, its id and the fields of its `stat` from the state on."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                stat = Path(entry.path, "stat").read_text()
            except OSError:
                continue  # it has just ended
            # The name before may hold anything, spaces and brackets too.
            yield int(entry.name), stat.rpartition(")")[2].split()


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0  # it has just ended
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def _meminfo(name: str) -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def _has(*flags: str) -> bool:
    return bool(set(flags).intersection(_cpuinfo("flags").split()))


def _cpuinfo(name: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def _commit() -> str | None:
    """With "-dirty" where files differ from it, but for those that earlier measurements of the same run wrote."""
    root = Path(__file__).parents[1]
    written = (":!bench/results", ":!docs/benchmarks.md")

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        return git("describe", "--always") + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # a copy without its history
