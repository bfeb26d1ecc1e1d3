"""One contender runs one case, in a process of its own: `python -m bench.gpu.turn ORDER`, JSON in, JSON out.

With an interpreter of another environment (vLLM's) it needs nothing of ours but this package and the standard library.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.gpu.cases import case
from bench.gpu.contenders import CONTENDERS, SAMPLE, Pagemill, Setup

if TYPE_CHECKING:
    from bench.profiling.profile import Profile

MARK = "bench.gpu.turn: "
"""Before the answer, since libraries print, too."""


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up with a whole round, and time `rounds` more."""
    asked = case(order["case"], is_dry=order["is_dry"])
    every = asked.round(-1)
    share = SAMPLE.get(order["contender"], len(every))
    setup = Setup(
        model=Path(order["model"]),
        device=order["device"],
        dtype=order["dtype"],
        max_tokens=max(len(one.prompt) + one.max_tokens for one in every),
        max_num_seqs=asked.max_num_seqs if order["device"] == "cuda" else 16,
        temperature=asked.temperature,
    )
    began = time.perf_counter()
    contender = CONTENDERS[order["contender"]](setup)
    load_seconds = time.perf_counter() - began
    contender.generate(every[:share])
    seconds = []
    for number in range(order["rounds"]):
        requests = asked.round(number)
        began = time.perf_counter()
        counts = contender.generate(requests[:share])
        spent = time.perf_counter() - began
        wanted = [one.max_tokens for one in requests]
        if counts != wanted[:share]:
            raise RuntimeError("it did not generate as many tokens as it was asked for")
        seconds.append(spent * sum(wanted) / sum(counts))
    found: dict[str, Any] = {
        "seconds": seconds,
        "load_seconds": load_seconds,
        "output_tokens": sum(one.max_tokens for one in every),
        "prompt_tokens": sum(len(one.prompt) for one in every),
        "requests": len(every),
        "is_scaled": share < len(every),
        "output_tokens_per_second": sum(one.max_tokens for one in every) / statistics.median(seconds),
        "requests_per_second": len(every) / statistics.median(seconds),
    }
    if isinstance(contender, Pagemill):
        found["steps"] = contender.engine.stats().steps
        found["preemptions"] = contender.engine.stats().preemptions
        from bench.profiling.profile import profiled  # a rival's environment has no engine to profile

        with profiled(contender.engine) as profile:
            contender.generate(asked.round(order["rounds"]))
        found["profile"] = _shares(profile)
    return found


def _shares(profile: Profile) -> dict[str, Any]:
    """A profile in shares of its time, and of the device's limits."""
    return {
        "device_share": profile.device_share if profile.kernels else None,
        "limits": asdict(profile.limits),
        "host": {name: part.seconds / profile.elapsed for name, part in profile.parts.items()},
        "kernels": {
            name: {
                "share": kernel.seconds / profile.elapsed,
                "launches": kernel.launches,
                "of_copy": profile.of_bandwidth(kernel),
                "of_matmul": profile.of_flops(kernel),
            }
            for name, kernel in profile.kernels.items()
        },
    }


def main() -> None:
    try:
        answer = run(json.loads(sys.argv[1]))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this contender's result
        traceback.print_exc()
        answer = {"failure": f"{type(error).__name__}: {error}"}
    print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
