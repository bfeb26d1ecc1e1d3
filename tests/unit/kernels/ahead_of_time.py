"""Compiles launches for GPUs that are absent: `python -m tests.unit.kernels.ahead_of_time [--all|--record] [NAME …]`.

The launches are those that wrappers build (see `kernels/launch.py`), made with tensors that have no memory. Without an
option those are compiled that are on record; `--all` takes every shape for every device. `--record` compiles what has
changed since it was recorded, and keeps what came out in `compiled_kernels.json`, a variant at a time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.device import Device
from tests.unit.kernels.fingerprint import fingerprint, signature_of
from tests.unit.kernels.variants import Variant, all_variants, recorded_variants

DEVICES = {
    "sm_80": Device("cuda", 80, num_sms=108),
    "sm_90": Device("cuda", 90, num_sms=132),
    "gfx942": Device("hip", "gfx942", num_sms=304),
}

RECORD = Path(__file__).with_name("compiled_kernels.json")


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of one launch."""

    shared: int
    """Bytes of shared memory."""

    binary_size: int
    seconds: float
    resources: dict[str, int]
    """Bytes of shared memory a program; for NVIDIA also registers a thread, bytes of stack (spills), how many tiles the
    least deep of its pipelined loads has in shared memory, and, where there are any, ordered atomics."""


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
    resources = resources_of(compiled) if device.backend == "cuda" else {"shared": compiled.metadata.shared}
    return Compiled(compiled.metadata.shared, len(binary), time.monotonic() - started, resources)


def resources_of(compiled: Any) -> dict[str, int]:
    """What Triton's own cuobjdump says of a binary, and the depth of its pipelines."""
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [cuobjdump, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    depths = [int(depth) for depth in re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x", compiled.asm["ttgir"])]
    resources = {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        "buffers": min(depths, default=0),
    }
    atomics = ordered_atomics(compiled.asm["ptx"])
    return resources | ({"ordered_atomics": atomics} if atomics else {})


def ordered_atomics(ptx: str) -> int:
    """How many atomics acquire and release for the whole device; raises `AssertionError` for one without a barrier
    between it and the stores before it, which other threads of the program may not have done yet."""
    count, is_pending = 0, False
    for line in ptx.splitlines():
        if "st.global" in line:
            is_pending = True
        elif "bar.sync" in line:
            is_pending = False
        elif "atom." in line and ".acq_rel" in line and ".gpu" in line:
            assert not is_pending, line
            count += 1
    return count


def read_record() -> dict[str, Any]:
    """`triton`: its version; `kernels`: by name and device, the source's fingerprint and the resources."""
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {"kernels": {}}
    return record


def write_record(kernels: Mapping[str, Mapping[str, Any]]) -> None:
    """A line for each variant."""
    lines = (f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(kernels.items()))
    text = ",\n".join(lines)
    RECORD.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{text}\n }}\n}}\n')


class Recorder:
    """Keeps what was compiled, after each variant, so that an interruption loses nothing."""

    def __init__(self) -> None:
        record = read_record()
        known = record["kernels"] if record.get("triton") == triton.__version__ else {}
        variants = {variant.key: variant for variant in recorded_variants(DEVICES)}
        self._kernels = {name: found for name, found in known.items() if name in variants}
        self._lock = Lock()

    def is_stale(self, variant: Variant) -> bool:
        return self._kernels.get(variant.key, {}).get("source") != fingerprint(variant.make())

    def add(self, variant: Variant, compiled: Compiled) -> None:
        with self._lock:
            self._kernels[variant.key] = {"source": fingerprint(variant.make())} | compiled.resources
            write_record(self._kernels)


def main() -> int:
    assert os.environ.get("TRITON_INTERPRET", "0") == "0"
    only = tuple(argument for argument in sys.argv[1:] if not argument.startswith("--"))
    make_variants = all_variants if "--all" in sys.argv else recorded_variants
    variants = [v for v in make_variants(DEVICES) if not only or v.key.startswith(only)]
    recorder = Recorder() if "--record" in sys.argv else None
    if recorder is not None:
        variants = [variant for variant in variants if recorder.is_stale(variant)]
    failed = 0

    def run(variant: Variant) -> Compiled | Exception:
        try:
            compiled = compile_launch(variant)
            if recorder is not None:
                recorder.add(variant, compiled)
            return compiled
        except Exception as error:  # noqa: BLE001 - every kernel that fails is reported, not the first alone
            return error

    with ThreadPoolExecutor(2) as pool:
        for variant, result in zip(variants, pool.map(run, variants), strict=True):
            report: dict[str, Any] = {"kernel": variant.key}
            if isinstance(result, Compiled):
                report |= {"bytes": result.binary_size, "seconds": round(result.seconds, 2)}
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
