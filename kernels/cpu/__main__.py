"""Compiles the CPU kernels ahead of their first use: `python -m kernels.cpu [--into-package]`.

With `--into-package` every variant of the processor's kind goes beside the sources, for an image whose machines have no
compiler.
"""

from __future__ import annotations

import platform
import sys

from kernels.cpu.library import PREBUILT, VARIANTS, CpuKernelsUnavailable, build, library

if __name__ == "__main__":
    try:
        if "--into-package" in sys.argv[1:]:
            for variant in VARIANTS if platform.machine() == "x86_64" else ("generic",):
                sys.stdout.write(f"{build(variant, PREBUILT)}\n")
        else:
            sys.stdout.write(f"{library().path}\n")
    except CpuKernelsUnavailable as error:
        sys.exit(f"The CPU kernels cannot be compiled, plain torch runs instead: {error}")
