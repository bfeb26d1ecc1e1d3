"""The machine that measures: what it is, what is installed there, and what its CPU can compute in."""

from __future__ import annotations

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("celery", "fastapi", "numpy", "psycopg", "sqlalchemy", "torch", "transformers", "triton")


def circumstances() -> dict[str, Any]:
    """Where, when and with what something was measured. A machine may lack packages and a GPU: those are None."""
    return {
        "at": time.strftime("%FT%TZ", time.gmtime()),
        "commit": _commit(),
        "cpu": _cpuinfo("model name") or platform.processor(),
        "cores": cores(),
        "computes_in": computes_in(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_1_min": round(psutil.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "gpu": _gpu(),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(psutil.Process().cpu_affinity())


def computes_in() -> str:
    """bfloat16 where the CPU has instructions for it, else float32."""
    return "bfloat16" if _has("avx512_bf16", "amx_bf16") else "float32"


def multiplies_int8() -> bool:
    """Whether the CPU has instructions for products of 8-bit integers."""
    return _has("avx512_vnni", "avx_vnni", "amx_int8")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any] | None:
    """Name, memory and driver of the first GPU, and the CUDA that torch was built for."""
    query = ["nvidia-smi", "--id=0", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        name, driver, mebibytes = (part.strip() for part in answer.strip().split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return {"name": name, "driver": driver, "memory_mib": int(mebibytes), "cuda": _cuda()}


def _cuda() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.version.cuda


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
    written = (":!bench/results", ":!docs/benchmarks.md", ":!docs/models.md")

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        return git("describe", "--always") + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # a copy without its history
