"""`python -m bench live`: what the service adds to the bare engine where callers wait: the first token, a job, threads.

The demo model, served idle but for what is measured. Engine and service take turns in one run, so that what else the
machine does meets both alike; a difference or a ratio is that of two turns of one round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from bench.machine import computes_in, cores
from bench.pagemill.service import running_service
from bench.publish import write_section
from bench.report import save
from bench.summary import Spread
from cli.models import DEMO, resolve

if TYPE_CHECKING:
    from engine import Engine

NAME = "live"
PROMPT = "reverse garden ="
MAX_TOKENS = 12
LONG = 64  # tokens of each request of the threads and of the open streams
THREADS = 50
STREAMS = 200
PATIENCE = 60.0  # seconds
WARM_UP = 3
DONE = "data: [DONE]"  # the last line of a whole stream
LIVE = {"model": DEMO, "prompt": PROMPT, "temperature": 0, "ignore_eos": True}
# What is aimed at on two cores, with the machine idle.
FIRST_TOKEN_AIM_MS = 30
JOB_AIM_MS = 60
THREADS_AIM = 0.95


@dataclass(frozen=True, slots=True)
class Pair:
    """Two turns of one round, in seconds."""

    engine: float
    service: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    parser.add_argument("--rounds", type=int, default=30, help="of single requests; the threads take a fifth of them")
    parser.add_argument("--keep", action="store_true", help="write the result and its part of docs/benchmarks.md")


def run(options: argparse.Namespace) -> int:
    """Run what the parsed options ask for. Returns the exit code."""
    found = {"command": " ".join(["python -m bench", *sys.argv[1:]]), **measure(options.rounds)}
    print(table(found))
    if options.keep:
        record = save(NAME, found)
        write_section(NAME, section(record))
    return 0


def measure(rounds: int) -> dict[str, Any]:
    """Milliseconds that the service adds, its share of the engine's tokens a second, and what open streams got."""
    engine = _engine()
    with (
        tempfile.TemporaryDirectory(prefix="pagemill-bench-") as directory,
        _service(Path(directory)) as client,
    ):
        first = _in_turns("first tokens", lambda: _generate(engine, 1, 1), lambda: _first_token(client), rounds)
        job = _in_turns("jobs", lambda: _generate(engine, 1, MAX_TOKENS), lambda: _job(client), rounds)
        threads = _in_turns(
            "threads",
            lambda: _generate(engine, THREADS, LONG),
            lambda: _threads(client),
            max(2, rounds // 5),
            warm_up=1,
        )
        print("  streams", file=sys.stderr, flush=True)
        streams = asyncio.run(_open_streams(str(client.base_url), dict(client.headers)))
    return {
        "model": DEMO,
        "precision": computes_in(),
        "rounds": rounds,
        "first_token_ms": _difference(first),
        "one_line_job_ms": _difference(job),
        "threads": {
            "threads": THREADS,
            "tokens_each": LONG,
            "rounds": len(threads),
            "engine_tokens_per_second": _spread([THREADS * LONG / pair.engine for pair in threads]),
            "service_tokens_per_second": _spread([THREADS * LONG / pair.service for pair in threads]),
            "share_of_the_engine": _spread([pair.engine / pair.service for pair in threads]),
        },
        "streams": streams,
    }


def table(found: Mapping[str, Any]) -> str:
    """The result as Markdown, beside what was aimed at."""
    threads, streams = found["threads"], found["streams"]
    rows = [
        ("", "bare engine", "service", "difference or ratio", "aim"),
        ("---", "---:", "---:", "---:", "---:"),
        ("first token of a stream, ms", *_cells(found["first_token_ms"]), f"≤ {FIRST_TOKEN_AIM_MS} more"),
        ("a job of one line, from POST to its end, ms", *_cells(found["one_line_job_ms"]), f"≤ {JOB_AIM_MS} more"),
        (
            f"{threads['threads']} threads at once, tokens/s",
            _shown(threads["engine_tokens_per_second"], 0),
            _shown(threads["service_tokens_per_second"], 0),
            _shown(threads["share_of_the_engine"], 2),
            f"≥ {THREADS_AIM}",
        ),
        (
            f"{streams['streams']} open streams: whole answers",
            "",
            f"{streams['whole']}",
            f"all open together: {'yes' if streams['open_together'] == streams['streams'] else 'no'}",
            "all",
        ),
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def section(record: Mapping[str, Any]) -> str:
    """What docs/benchmarks.md says of a kept result, between its markers."""
    found, measured = record["found"], record["measured"]
    return "\n".join(
        [
            f"`{found['command']}` · {measured['at'][:10]} · commit {measured['commit']} · {measured['cpu']}, "
            f"{measured['cores']} threads, load {measured['load_1_min']:g} at the end · {found['rounds']} rounds, "
            f"{found['threads']['rounds']} of the threads",
            "",
            table(found),
        ]
    )


def _engine() -> Engine:
    import torch

    from engine import Engine, EngineConfig

    torch.set_num_threads(cores())
    return Engine.from_pretrained(resolve(DEMO).location, EngineConfig(device="cpu", dtype=computes_in()))


@contextlib.contextmanager
def _service(directory: Path) -> Iterator[httpx.Client]:
    with (
        running_service(directory, DEMO, computes_in(), computes_in()) as stack,
        httpx.Client(
            base_url=stack.base_url,
            headers={"authorization": f"Bearer {stack.api_key}"},
            limits=httpx.Limits(max_connections=THREADS, max_keepalive_connections=THREADS),
            timeout=PATIENCE,
            trust_env=False,
        ) as client,
    ):
        yield client


def _in_turns(
    what: str, engine: Callable[[], None], service: Callable[[], float | None], rounds: int, warm_up: int = WARM_UP
) -> list[Pair]:
    """Seconds of both; `service` may say itself when what is looked for was there."""
    pairs = []
    print(f"  {what}", file=sys.stderr, flush=True)
    for _ in range(warm_up + rounds):
        began = time.perf_counter()
        engine()
        engine_seconds, began = time.perf_counter() - began, time.perf_counter()
        at = service()
        pairs.append(Pair(engine_seconds, (at or time.perf_counter()) - began))
    return pairs[warm_up:]


def _generate(engine: Engine, requests: int, max_tokens: int) -> None:
    from engine import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs = engine.generate([PROMPT] * requests, params)
    _require([len(output.token_ids) for output in outputs], [max_tokens] * requests)


def _first_token(client: httpx.Client) -> float:
    """The moment at which a stream's first event was there; the rest of the stream is read afterwards."""
    asked = {**LIVE, "max_tokens": 2, "stream": True}
    with client.stream("POST", "/v1/completions", json=asked) as response:
        response.raise_for_status()
        lines = response.iter_lines()
        _require(next(lines).startswith("data: {"), True)
        at = time.perf_counter()
        _require([line for line in lines if line][-1], DONE)
    return at


def _job(client: httpx.Client) -> None:
    params = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    document = {"model": DEMO, "prompts": [PROMPT], "params": params}
    job = client.post("/v1/jobs", json=document).raise_for_status().json()
    job = client.get(f"/v1/jobs/{job['id']}", params={"wait": PATIENCE}).raise_for_status().json()
    _require(job["status"], "completed")


def _threads(client: httpx.Client) -> None:
    def post(_: int) -> int:
        answer = client.post("/v1/completions", json={**LIVE, "max_tokens": LONG}).raise_for_status().json()
        return int(answer["usage"]["completion_tokens"])

    with ThreadPoolExecutor(THREADS) as threads:
        _require(list(threads.map(post, range(THREADS))), [LONG] * THREADS)


async def _open_streams(base_url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """How many of the streams brought a whole answer, with what others ended, and how many were open at once."""
    num_open = open_together = 0
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(
        base_url=base_url, headers=dict(headers), limits=limits, timeout=PATIENCE, trust_env=False
    ) as client:

        async def one() -> tuple[str, float]:
            nonlocal num_open, open_together
            began, first = time.perf_counter(), 0.0
            asked = {**LIVE, "max_tokens": LONG, "stream": True}
            last = ""
            async with client.stream("POST", "/v1/completions", json=asked) as response:
                num_open += 1
                open_together = max(open_together, num_open)
                async for line in response.aiter_lines():
                    first = first or time.perf_counter() - began
                    last = line or last
                num_open -= 1
            return (last if response.is_success else f"{response.status_code} {last}"), first

        began = time.perf_counter()
        answers = await asyncio.gather(*(one() for _ in range(STREAMS)))
    return {
        "streams": STREAMS,
        "tokens_each": LONG,
        "whole": sum(last == DONE for last, _ in answers),
        "others": sorted({last for last, _ in answers} - {DONE}),
        "open_together": open_together,
        "seconds": time.perf_counter() - began,
        "first_event_seconds": _spread([first for _, first in answers]),
    }


def _require(found: object, expected: object) -> None:
    if found != expected:
        raise RuntimeError(f"{found} instead of {expected}")


def _difference(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Milliseconds of both, and what the service adds."""
    return {
        "engine": _spread([1e3 * pair.engine for pair in pairs]),
        "service": _spread([1e3 * pair.service for pair in pairs]),
        "added": _spread([1e3 * (pair.service - pair.engine) for pair in pairs]),
    }


def _spread(figures: Sequence[float]) -> dict[str, float]:
    spread = Spread.of(figures)
    return {"median": spread.median, "min": spread.least, "max": spread.most}


def _cells(difference: Mapping[str, Mapping[str, float]]) -> tuple[str, str, str]:
    return _shown(difference["engine"], 0), _shown(difference["service"], 0), _shown(difference["added"], 0)


def _shown(spread: Mapping[str, float], digits: int) -> str:
    return f"{spread['median']:,.{digits}f} ({spread['min']:,.{digits}f} … {spread['max']:,.{digits}f})"
