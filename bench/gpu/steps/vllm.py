"""Step 9: vLLM on the same card and the same requests, from a kit in parts that the machine was sent along.

The kit's own programs unpack it, check it and measure (docs/gpu.md says how a kit is built).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.gpu.cases import case
from bench.gpu.reporting import StepOptions, attempt, report, skip, step_options
from bench.models import save_config

SITE = Path("/tmp/vllm-site")
NEEDED = ("unpack_kit.py", "bench_vllm.py")
CASES = ("article-4096", "ragged")
LEAST_SECONDS = 45.0
"""A start with compilation does not fit into less."""


def missing(kit: Path) -> list[str]:
    """What a folder lacks of a kit."""
    if not kit.is_dir():
        return [str(kit)]
    return [name for name in NEEDED if not (kit / name).exists()]


def run(kit: Path, limit: float, program: str, *arguments: str) -> dict[str, Any]:
    """A program of the kit, and the JSON of its last line."""
    path = os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(kit / program), *arguments],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        timeout=limit,
        check=False,
    )
    print(done.stdout, flush=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{program} ended with code {done.returncode} and without JSON")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def measure(name: str, kit: Path, limit: float, backend: list[str]) -> None:
    """One case. The report holds all that the kit's benchmark says of it."""
    one = case(name, is_dry=False)
    requests = one.round(0)
    with tempfile.TemporaryDirectory(prefix="pagemill-bench-") as directory:
        save_config(one.model, Path(directory))
        prompts = Path(directory) / "prompts.json"
        asked = [{"prompt_token_ids": list(each.prompt), "max_tokens": each.max_tokens} for each in requests]
        prompts.write_text(json.dumps(asked))
        answer = run(
            kit, limit, "bench_vllm.py", "--model-config", directory, "--prompts-file", str(prompts),
            "--repeats", "2", *backend,
        )  # fmt: skip
    if answer.get("error") or not answer.get("wall_s"):
        raise RuntimeError(str(answer.get("error") or "it has no wall_s"))
    seconds = float(answer["wall_s"])
    tokens = sum(each.max_tokens for each in requests)
    rates = {"seconds": seconds, "output_tokens_s": tokens / seconds, "requests_s": len(requests) / seconds}
    report(f"vllm: {one.title}", **rates, answer=answer)


def main() -> None:
    options: StepOptions = step_options()
    if absent := missing(options.kit):
        skip(f"no kit: {', '.join(absent)} is missing")
        return
    deadline = time.monotonic() + options.seconds
    parts = subprocess.run([sys.executable, str(options.kit / "unpack_kit.py"), str(options.kit)], check=False)
    if parts.returncode:
        raise SystemExit(f"unpack_kit.py ended with code {parts.returncode}")
    backend: list[str] = []
    with attempt("vllm: check"):
        checked = run(options.kit, 60, "unpack_kit.py", "--check")
        report("vllm: check", **{name: str(value) for name, value in checked.items()})
        if checked.get("fa3") is not True:
            backend = ["--attention-backend", "TRITON_ATTN"]
    for name in CASES:
        left = deadline - time.monotonic()
        with attempt(f"vllm: {name}"):
            if left < LEAST_SECONDS:
                raise TimeoutError(f"{left:.0f} s were left")
            measure(name, options.kit, left, backend)


if __name__ == "__main__":
    main()
