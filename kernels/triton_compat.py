"""Triton and its language; without Triton, just enough of it to import this package.

Each kernel stands in one file with its fallback in plain torch, which runs on machines that Triton is not built for
(macOS, for one). There kernels are functions that are never launched: `kernels/device.py` refuses every device.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    HAS_TRITON = False
    tl = None
    LOG2_E = None

    class triton:
        """What kernel files need of Triton while they are imported."""

        @staticmethod
        def jit(kernel=None, **options):
            """The function as it is."""
            return kernel or (lambda decorated: decorated)

else:
    HAS_TRITON = True
    LOG2_E = tl.constexpr(1.4426950408889634)
    """log2(e): kernels scale scores by it and use exp2, which GPUs compute."""

__all__ = ["HAS_TRITON", "LOG2_E", "tl", "triton"]
