"""The C++ kernels as a shared library: compiled on first use, kept, and loaded once a process.

source/*.cpp, *.h ──compiler──► pagemill-<variant>-<hash of sources and flags>.so
                                 in `built/` beside this file (an image's build puts it there),
                                 else in ~/.cache/pagemill, else in a private directory under the temporary one
"""

# One source serves all variants; the vectors' width follows from the flags. Nothing of the compiled code depends on the
# machine beyond its variant, so machines of one kind may share a cache. Several processes may want it at once: they
# take turns, and a finished file appears by one rename.

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "source"
PREBUILT = Path(__file__).parent / "built"

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *_AVX2)

VARIANTS: dict[str, tuple[str, ...]] = {
    "avx512vnni": (*_AVX512, "-mavx512vnni"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "generic": (),
}
"""What each variant may use of the machine, as flags."""

_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC")
_COMPILERS = ("g++", "c++", "clang++")
_TIMEOUT = 300.0  # seconds for one compiler run, on a busy machine


class CpuKernelsUnavailable(Exception):
    """There are no C++ kernels here; the message says why."""


@dataclass(frozen=True, slots=True)
class Library:
    """The kernels, loaded."""

    variant: str
    path: Path
    width: int
    """float32 numbers in one of its vectors."""

    functions: ctypes.CDLL


@functools.cache
def library() -> Library:
    """The kernels for this machine; compiles them where no one has. Raises `CpuKernelsUnavailable`, each time anew."""
    variant = native_variant()
    return load(variant, build(variant))


def native_variant() -> str:
    """The widest variant that this machine runs."""
    widest = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "generic")
    return "avx512vnni" if widest == "avx512" and torch.cpu._is_vnni_supported() else widest


def build(variant: str, directory: Path | None = None, *, options: tuple[str, ...] = ()) -> Path:
    """The compiled library of a variant, from a cache or the compiler; raises `CpuKernelsUnavailable`.

    It is looked for in `directory` and put there; None is `built/`, then the first cache directory that can be written.
    """
    flags = (*_FLAGS, *VARIANTS[variant], *options)
    name = f"pagemill-{variant}-{_key(flags)}.so"
    if directory is None:
        if (PREBUILT / name).is_file():
            return PREBUILT / name
        directory = _cache_directory()
    path = directory / name
    if not path.is_file():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with (directory / f"{name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.is_file():
                    logger.info(
                        "compiling the CPU kernels, once for this machine; this takes up to a minute (into %s)",
                        directory,
                    )
                    _compile(flags, path)
        except OSError as error:
            raise CpuKernelsUnavailable(f"{directory} cannot be written to: {error}") from error
    return path


def load(variant: str, path: Path) -> Library:
    """Load a compiled library; raises `CpuKernelsUnavailable`."""
    try:
        _share_openmp()
        functions = ctypes.CDLL(str(path))
        width = int(functions.pagemill_width())
        functions.pagemill_linear.restype = None
        functions.pagemill_paged_attention.restype = None
    except (OSError, AttributeError) as error:
        raise CpuKernelsUnavailable(f"{path} cannot be loaded: {error}") from error
    return Library(variant, path, width, functions)


def _key(flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256(" ".join(flags).encode())
    for file in sorted(SOURCE.iterdir()):
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _compile(flags: tuple[str, ...], path: Path) -> None:
    compilers = [found for name in _COMPILERS if (found := shutil.which(name))]
    if not compilers:
        raise CpuKernelsUnavailable(f"no C++ compiler is installed (looked for {', '.join(_COMPILERS)})")
    errors = []
    for compiler in compilers:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".compiling-") as scratch:
            objects = {source: Path(scratch) / f"{source.stem}.o" for source in sorted(SOURCE.glob("*.cpp"))}
            commands = [[compiler, *flags, "-c", str(source), "-o", str(made)] for source, made in objects.items()]
            linked = Path(scratch) / path.name
            try:
                with ThreadPoolExecutor() as pool:
                    list(pool.map(_run, commands))
                _run([compiler, *flags, "-shared", *map(str, objects.values()), "-o", str(linked)])
            except CpuKernelsUnavailable as error:
                errors.append(str(error))
                continue
            linked.replace(path)
            return
    raise CpuKernelsUnavailable("; ".join(errors))


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CpuKernelsUnavailable(f"{command[0]} does not run: {error}") from error
    if result.returncode:
        raise CpuKernelsUnavailable(f"{command[0]} failed: {result.stderr.strip()[:2000]}")


def _cache_directory() -> Path:
    """The first directory that is ours alone and can be written to."""
    for candidate in _cache_candidates():
        try:
            candidate.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Code is loaded from here, so no other user may write to it.
            state = candidate.lstat()
            if state.st_uid == os.geteuid() and not state.st_mode & 0o022:
                with tempfile.TemporaryFile(dir=candidate):
                    return candidate
        except OSError:
            continue  # the next one may do
    raise CpuKernelsUnavailable("no directory can be written to that is only ours")


def _cache_candidates() -> Iterator[Path]:
    with contextlib.suppress(RuntimeError):  # a user without a home
        yield Path.home() / ".cache" / "pagemill"
    yield Path(tempfile.gettempdir()) / f"pagemill-{os.geteuid()}"


def _share_openmp() -> None:
    """Let the kernels use torch's OpenMP: with two of them, the threads of one wait where the other's want to run."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return  # no Linux; there the system's OpenMP is torch's too, or the kernels have one of their own
    path = openmp_path(mapped)
    if path is not None:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def openmp_path(maps: str) -> str | None:
    """The OpenMP library among a process' mappings (`/proc/self/maps`); None where there is none."""
    # address, permissions, offset, device, inode, and the path, which may hold spaces
    found = re.search(r"^(?:\S+ +){5}(/.*/lib(?:g|i|)omp[^/\n]*\.so[^/\n]*)$", maps, re.MULTILINE)
    return found[1] if found else None
