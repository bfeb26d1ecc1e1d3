"""The C++ kernels in the variants that tests run on this machine."""

from __future__ import annotations

import functools

import pytest

from kernels.cpu.library import CpuKernelsUnavailable, Library, build, library, load, native_variant


@functools.cache
def cpu_library(name: str) -> Library:
    """ "native"; "generic", without any instruction by name; "wide", with vectors of 16, whatever the machine's width.

    Skips where there is no compiler.
    """
    try:
        if name == "native":
            return library()
        if name == "generic":
            return load(name, build(name))
        variant = native_variant()
        # 64-byte vectors pass through registers that are not there; GCC says that it is no ABI.
        return load(variant, build(variant, options=("-DPAGEMILL_WIDTH=16", "-Wno-psabi")))
    except CpuKernelsUnavailable as error:
        pytest.skip(str(error))
