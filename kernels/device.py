"""What launches depend on: the device that a kernel is compiled for.

Tile sizes, warps and pipeline stages come from tables written by hand, one beside each kernel, by head size and device.
Nothing is tuned at run time: a first request would pay for it, and two workers could disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from kernels.triton_compat import HAS_TRITON, triton


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or Triton's interpreter on the CPU."""

    backend: str
    """"cuda", "hip" or "interpreter"."""

    arch: int | str
    """Compute capability times ten (90 for Hopper), or AMD's name ("gfx942"); 0 for the interpreter."""

    num_sms: int
    """Multiprocessors (AMD: compute units)."""

    @property
    def warp_size(self) -> int:
        return 64 if self.backend == "hip" else 32

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one program may have."""
        if self.backend == "hip":
            return 64 * 1024
        known = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
        return 1024 * known.get(int(self.arch), 227 if self.backend == "interpreter" else 99)

    @property
    def converts_float8(self) -> bool:
        """Whether it has an instruction from e4m3 to half precision; elsewhere bits are shifted."""
        return self.backend == "cuda" and int(self.arch) >= 89

    @property
    def is_interpreter(self) -> bool:
        return self.backend == "interpreter"


INTERPRETER = Device("interpreter", 0, num_sms=4)


def interprets() -> bool:
    """Whether Triton was told (`TRITON_INTERPRET=1`) to run kernels in Python, on CPU tensors."""
    return HAS_TRITON and bool(triton.knobs.runtime.interpret)


@cache
def device_of(device: torch.device) -> Device:
    """The device that a tensor lies on. Raises `ValueError` without Triton, and for a CPU without the interpreter."""
    if not HAS_TRITON:
        raise ValueError("Triton kernels cannot run here: Triton is not installed")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return Device("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
        return Device("cuda", properties.major * 10 + properties.minor, properties.multi_processor_count)
    if device.type == "cpu" and interprets():
        return INTERPRETER
    raise ValueError(f"Triton kernels cannot run on {device.type!r}: on a CPU they need TRITON_INTERPRET=1")
