"""Every kernel compiles for the GPUs that it is meant for, on a machine without one.

`compiled_kernels.json` holds what came out for each launch, with a fingerprint of its source. Where the code has the
recorded fingerprints, it compiles to what is on record; where it has not, the record has to be made anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import REPOSITORY
from tests.unit.kernels.ahead_of_time import DEVICES, ordered_atomics, read_record
from tests.unit.kernels.fingerprint import fingerprint
from tests.unit.kernels.variants import recorded_variants

RECORDED: dict[str, dict[str, Any]] = read_record()["kernels"]
ATTENTION = ("decode ", "prefill ", "shared decode ", "shared prefix ")
KNOWN_SPILLS = {"prefill 8/4x256-b16-cap-float8_e4m3fn, sm_90": 80}
"""Bytes of stack: registers of heads of 256 numbers, whose float8 keys are widened beside them."""


def compile_in_another_process(tmp_path: Path, *options: str) -> dict[str, dict[str, int]]:
    """Resources by name and device."""
    # Here Triton interprets; there it compiles, and nothing that was compiled before counts.
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.kernels.ahead_of_time", *options],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    bad = [report for report in reports if not report["fits"]]
    assert not bad, bad
    assert done.returncode == 0, done.stderr
    return {report["kernel"]: report["resources"] for report in reports}


def resources(names: set[str] | None = None) -> dict[str, dict[str, int]]:
    """What is on record, without the fingerprints."""
    return {
        name: {what: value for what, value in found.items() if what != "source"}
        for name, found in RECORDED.items()
        if names is None or name in names
    }


def test_record_is_of_the_kernels_as_they_are() -> None:
    """After a change: `TRITON_INTERPRET=0 python -m tests.unit.kernels.ahead_of_time --record`, and read the diff."""
    found = {variant.key: fingerprint(variant.make()) for variant in recorded_variants(DEVICES)}
    assert found == {name: recorded["source"] for name, recorded in RECORDED.items()}


def test_recorded_kernels_fit_their_devices() -> None:
    by_device = {name: [key for key in RECORDED if key.endswith(f", {name}")] for name in DEVICES}
    assert {name: len(keys) >= 20 for name, keys in by_device.items()} == dict.fromkeys(DEVICES, True)
    too_large = [
        key for name, keys in by_device.items() for key in keys if RECORDED[key]["shared"] > DEVICES[name].shared_memory
    ]
    assert too_large == []


def test_recorded_kernels_spill_no_more_than_is_known() -> None:
    spilling = {
        name: found["stack"] for name, found in RECORDED.items() if name.endswith("sm_90") and found["stack"] > 0
    }
    assert spilling == KNOWN_SPILLS


def test_recorded_attention_of_half_precision_has_two_tiles_in_flight() -> None:
    """As far as a multiprocessor has room for two: heads of 256 numbers leave too little."""
    shallow = {
        name
        for name, found in RECORDED.items()
        if name.startswith(ATTENTION) and name.endswith("sm_90") and found["buffers"] < 2
    }
    assert {name for name in shallow if "float32" not in name and "x256" not in name} == set()


def test_recorded_decodes_count_arrivals_in_order() -> None:
    """Splits are joined by the last of their programs, which has to see what the others have stored."""
    decodes = {name for name in RECORDED if name.startswith("decode ") and not name.endswith("gfx942")}
    assert len(decodes) >= 20
    assert {name: RECORDED[name].get("ordered_atomics") for name in decodes} == dict.fromkeys(decodes, 1)


@pytest.mark.parametrize(
    ("lines", "is_ordered"), [(("st.global", "bar.sync"), True), (("bar.sync", "st.global"), False)]
)
def test_atomic_without_a_barrier_after_the_stores_is_refused(lines: tuple[str, ...], is_ordered: bool) -> None:
    ptx = "\n".join([*(f"\t@%p1 {line}.b32 x;" for line in lines), "\t@%p1 atom.global.gpu.acq_rel.add.s32 %r1;"])
    if is_ordered:
        assert ordered_atomics(ptx) == 1
    else:
        with pytest.raises(AssertionError):
            ordered_atomics(ptx)


@pytest.mark.timeout(600)
def test_kernels_compile_to_what_is_recorded(tmp_path: Path) -> None:
    """A few launches; all of them in the slow test."""
    if version("triton") != read_record()["triton"]:
        pytest.skip(f"the record was made with triton {read_record()['triton']}")
    names = ["decode gpt2-large, blocks of 64, sm_90", *(f"add and layer norm, {device}" for device in DEVICES)]
    found = compile_in_another_process(tmp_path, *names)
    assert len(found) == len(names)
    assert found == resources(set(found))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_recorded_kernel_compiles_to_what_is_recorded(tmp_path: Path) -> None:
    if version("triton") != read_record()["triton"]:
        pytest.skip(f"the record was made with triton {read_record()['triton']}")
    assert compile_in_another_process(tmp_path) == resources()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_variant_compiles_for_every_device(tmp_path: Path) -> None:
    assert len(compile_in_another_process(tmp_path, "--all")) > 100
