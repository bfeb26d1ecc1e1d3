"""Compiles launches for GPUs that are absent: `python -m tests.unit.kernels.ahead_of_time [--all|--models] [NAME …]`.

The launches are those that wrappers build (see `kernels/launch.py`), made with tensors that have no memory. Arguments
are specialized as Triton's launcher would: pointers and strides that 16 divides are said to be so, where a kernel does
not refuse it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.device import Device
from kernels.launch import Launch
from tests.unit.kernels.variants import Variant, all_variants, model_variants, ordinary_variants

DEVICES = {
    "sm_80": Device("cuda", 80, num_sms=108),
    "sm_90": Device("cuda", 90, num_sms=132),
    "gfx942": Device("hip", "gfx942", num_sms=304),
}

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of one launch."""

    shared: int
    """Bytes of shared memory."""

    binary_size: int
    seconds: float
    resources: dict[str, int]
    """For NVIDIA: registers a thread, bytes of stack (spills) and of shared memory a program, and how many tiles the
    least deep of its pipelined loads has in shared memory. Empty where there is no cuobjdump."""


def signature_of(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and attributes of a launch's arguments."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], Any] = {}
    for place, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            types[name] = "constexpr"
            continue
        value = launch.arguments[name]
        is_specialized = not launch.kernel.params[place].do_not_specialize
        if value is None or (isinstance(value, int) and value == 1 and is_specialized):
            types[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[name], is_divisible = _POINTERS[value.dtype], True
        elif isinstance(value, float):
            types[name], is_divisible = "fp32", False
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            is_divisible = is_specialized and value % 16 == 0
        if is_divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compile_launch(variant: Variant) -> Compiled:
    device, launch = DEVICES[variant.device], variant.make()
    started = time.monotonic()
    types, constants, attributes = signature_of(launch)
    compiled = triton.compile(
        ASTSource(launch.kernel, types, constants, attributes),
        target=GPUTarget(device.backend, device.arch, device.warp_size),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    binary = compiled.asm["cubin" if device.backend == "cuda" else "hsaco"]
    resources = resources_of(compiled) if device.backend == "cuda" else {}
    return Compiled(compiled.metadata.shared, len(binary), time.monotonic() - started, resources)


def resources_of(compiled: Any) -> dict[str, int]:
    """What Triton's own cuobjdump says of a binary, and the depth of its pipelines."""
    try:
        cuobjdump = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [cuobjdump, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    depths = [int(depth) for depth in re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x", compiled.asm["ttgir"])]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        "buffers": min(depths, default=0),
    }


def main() -> int:
    assert os.environ.get("TRITON_INTERPRET", "0") == "0"
    make_variants = ordinary_variants
    if "--all" in sys.argv:
        make_variants = all_variants
    elif "--models" in sys.argv:
        make_variants = model_variants
    only = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    failed = 0

    def run(variant: Variant) -> Compiled | Exception:
        try:
            return compile_launch(variant)
        except Exception as error:  # noqa: BLE001 - every kernel that fails is reported, not the first alone
            return error

    variants = [v for v in make_variants(DEVICES) if not only or any(part in f"{v.name} {v.device}" for part in only)]
    with ThreadPoolExecutor(2) as pool:
        for variant, result in zip(variants, pool.map(run, variants), strict=True):
            report: dict[str, Any] = {"kernel": variant.name, "device": variant.device}
            if isinstance(result, Compiled):
                report |= {"shared": result.shared, "bytes": result.binary_size, "seconds": round(result.seconds, 2)}
                report["resources"] = result.resources
                report["fits"] = result.shared <= DEVICES[variant.device].shared_memory and result.binary_size > 0
            else:
                report |= {"error": f"{type(result).__name__}: {result}", "fits": False}
            failed += not report["fits"]
            sys.stdout.write(json.dumps(report) + "\n")
            sys.stdout.flush()
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
