"""Steps 8 and 10: a contender on a case, all of it through the engine: a warm round, two that are timed, a profile.

The answer is reported before the profile, so that a profiler that breaks costs nothing else.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.gpu.cases import Case, case
from bench.gpu.contenders import CONTENDERS, SAMPLE, CaseSetup, Loaded, Pagemill
from bench.gpu.reporting import StepOptions, attempt, report, step_options
from bench.models import save_config
from bench.workload import WorkloadRequest

if TYPE_CHECKING:
    from bench.profiling.profile import Profile

ROUNDS = 2
PROFILED_TOKENS = 48
"""Tokens of each request in the round that is profiled: seconds, not minutes, of events."""


def measure(one: Case, name: str, directory: Path, options: StepOptions) -> None:
    every = one.round(-1)
    share = SAMPLE.get(name, len(every))
    setup = CaseSetup(
        model=directory,
        device="cpu" if options.is_dry else "cuda",
        dtype="float32" if options.is_dry else "bfloat16",
        max_tokens=max(len(request.prompt) + request.max_tokens for request in every),
        max_num_seqs=16 if options.is_dry else one.max_num_seqs,
        temperature=one.temperature,
    )
    began = time.perf_counter()
    contender = CONTENDERS[name](setup)
    report(f"{name}: load", seconds=time.perf_counter() - began)
    seconds: list[float] = []
    for number in range(-1, 1 if options.is_dry else ROUNDS):
        spent = timed(contender, one.round(number)[:share])
        if number < 0:
            report(f"{name}: warm round", seconds=spent, is_detail=True)
            continue
        # Where only some requests ran, the time is scaled by the tokens generated.
        seconds.append(spent * tokens(every) / tokens(every[:share]))
        report(f"{name}: {one.title}", **_rates(every, seconds), is_scaled=share < len(every))
    if isinstance(contender, Pagemill):
        with attempt(f"{name}: profile"):
            _profile(contender, one.round(ROUNDS), name)


def timed(contender: Loaded, requests: Sequence[WorkloadRequest]) -> float:
    """Seconds for all requests. Raises RuntimeError where one got another number of tokens than it asked for."""
    began = time.perf_counter()
    counts = contender.generate(requests)
    spent = time.perf_counter() - began
    if counts != [request.max_tokens for request in requests]:
        raise RuntimeError("it did not generate as many tokens as it was asked for")
    return spent


def tokens(requests: Sequence[WorkloadRequest]) -> int:
    return sum(request.max_tokens for request in requests)


def _rates(requests: Sequence[WorkloadRequest], seconds: Sequence[float]) -> dict[str, Any]:
    """The latest report of a case holds all rounds so far."""
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "output_tokens_s": tokens(requests) / median,
        "requests_s": len(requests) / median,
        "rounds": list(seconds),
    }


def _profile(contender: Pagemill, requests: Sequence[WorkloadRequest], name: str) -> None:
    from bench.profiling.profile import profiled

    stats = contender.engine.stats()
    report(f"{name}: engine", steps=stats.steps, preemptions=stats.preemptions)
    short = [WorkloadRequest(request.prompt, min(request.max_tokens, PROFILED_TOKENS)) for request in requests]
    with profiled(contender.engine) as profile:
        contender.generate(short)
    report(f"{name}: profile", **_shares(profile))
    for kernel, found in profile.kernels.items():
        report(
            f"{name}: {kernel}",
            share=found.seconds / profile.elapsed,
            limit="of the time",
            launches=found.launches,
            of_copy=profile.of_bandwidth(found),
            of_matmul=profile.of_flops(found),
        )


def _shares(profile: Profile) -> dict[str, Any]:
    host = {f"host_{name}".replace(" ", "_"): part.seconds / profile.elapsed for name, part in profile.parts.items()}
    return {"gpu_busy": profile.device_share if profile.kernels else None, **host}


def main() -> None:
    options = step_options()
    name, contender = options.names[0], (options.names[1:] or ("pagemill",))[0]
    one = case(name, is_dry=options.is_dry)
    with tempfile.TemporaryDirectory(prefix="pagemill-bench-") as directory:
        save_config(one.model, Path(directory))
        measure(one, contender, Path(directory), options)


if __name__ == "__main__":
    main()
