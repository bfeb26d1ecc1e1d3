"""The C++ kernels in the variants that tests run on this machine."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kernels.cpu.library import CpuKernelsUnavailable, Library, build, library, load, native_variant


@functools.cache
def cpu_library(name: str) -> Library:
    """ "native"; "generic", without any instruction by name; "wide", with vectors of 16 on any machine.

    Skips where there is no compiler.
    """
    try:
        if name == "native":
            return library()
        if name == "generic":
            return load(name, build(name, options=("-O1",)))
        variant = native_variant()
        # Vectors of 64 bytes are cut in two here, which takes the optimizer minutes.
        return load(variant, build(variant, options=("-DPAGEMILL_WIDTH=16", "-Wno-psabi", "-O1")))
    except CpuKernelsUnavailable as error:
        pytest.skip(str(error))


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
