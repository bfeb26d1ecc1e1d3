"""`python -m bench article`: threads that each post one prompt to `/v1/completions`, ours and a sequential server's.

The comparison of the article that started this: 50 threads, one prompt of all, 50 tokens each. Servers take turns, and
each starts anew for its turn, so that it has the machine for itself and no round finds another's prefix cached.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench import article_baseline
from bench.contender import PRECISIONS
from bench.contender_process import clean_environment
from bench.environments import python_of
from bench.machine import computes_in, cores
from bench.models import CONFIGS, model_directory
from bench.pagemill.service import running_service
from bench.publish import write_section
from bench.report import save
from bench.summary import MOST_NOISE, Spread
from bench.usage import CpuTime

NAME = "article"
PROMPT = "Tell me about efficient GPU utilization"
MAX_TOKENS = 50
PATIENCE = 3600.0  # seconds for one answer: the last of a sequential server's waits for all others
WARM_UP = {"prompt": "1 + 1 =", "max_tokens": 4}
BASELINE = "a sequential Flask server with transformers"


@dataclass(frozen=True, slots=True)
class Turn:
    """One round of one server. `noise`: the share of the machine's CPU that went to others."""

    round: int
    requests: int
    tokens: int
    seconds: float
    load_seconds: float
    noise: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


@dataclass(slots=True)
class Server:
    """A server that takes turns. `is_ours`: Pagemill."""

    title: str
    precision: str
    is_ours: bool
    turns: list[Turn] = field(default_factory=list)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server answers, to which headers, and the versions of what it is made of."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    parser.add_argument("--model", choices=list(CONFIGS), default="gpt2-large", help="a shape, with random weights")
    parser.add_argument("--requests", type=int, default=50, help="posted to ours in a turn, each from its own thread")
    parser.add_argument("--baseline-requests", type=int, default=50, help="the same for the sequential server")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server")
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS, help=f"ours; repeatable; here {computes_in()} and int8"
    )
    parser.add_argument("--cache", type=Path, default=Path(".bench"), help="where environments and models are kept")
    parser.add_argument("--keep", action="store_true", help="write the result and its part of docs/benchmarks.md")


def run(options: argparse.Namespace) -> int:
    """Run what the parsed options ask for. Returns the exit code."""
    cache = options.cache.absolute()
    model = model_directory(options.model, cache)
    servers = [Server(BASELINE, computes_in(), is_ours=False)]
    servers += [
        Server("Pagemill", precision, is_ours=True) for precision in options.precision or [computes_in(), "int8"]
    ]
    for number in range(options.rounds):
        for server in servers:
            requests = options.requests if server.is_ours else options.baseline_requests
            server.turns.append(_turn(server, number, requests, model, cache))
            print(f"  {server.title}, {server.precision}: {server.turns[-1].rate:.3f} requests/s", file=sys.stderr)
    found = {
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "model": options.model,
        "body": {"model": options.model, "prompt": PROMPT, "max_tokens": MAX_TOKENS},
        "servers": [asdict(server) for server in servers],
    }
    print(table(found))
    if options.keep:
        record = save(NAME, found)
        write_section(NAME, section(record))
    return 0


def table(found: Mapping[str, Any]) -> str:
    """The servers as Markdown; ratios are those of turns of the same round."""
    servers = _servers(found)
    (baseline,) = (server for server in servers if not server.is_ours)
    lines = [
        "|  | precision | requests/s | tokens/s | times the sequential server's requests/s |",
        "|---|---|---:|---:|---:|",
    ]
    for server in servers:
        ratios = [ours.rate / theirs.rate for ours, theirs in zip(server.turns, baseline.turns, strict=True)]
        cells = [
            f"**{server.title}**" if server.is_ours else server.title,
            server.precision,
            _spread(Spread.of([turn.rate for turn in server.turns]), 2),
            _spread(Spread.of([turn.tokens / turn.seconds for turn in server.turns]), 1),
            _spread(Spread.of(ratios), 1) if server.is_ours else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def section(record: Mapping[str, Any]) -> str:
    """What docs/benchmarks.md says of a kept result, between its markers."""
    found, measured = record["found"], record["measured"]
    servers = _servers(found)
    noise = max(turn.noise for server in servers for turn in server.turns)
    requests = {server.is_ours: server.turns[0].requests for server in servers}
    versions = ", ".join(f"{name} {version}" for server in servers for name, version in server.versions.items())
    return "\n".join(
        [
            f"`{found['command']}` · {measured['at'][:10]} · commit {measured['commit']} · {measured['cpu']}, "
            f"{measured['cores']} threads, {measured['memory_gib']:.0f} GiB · {len(servers[0].turns)} rounds",
            "",
            table(found),
            "",
            f"{found['model']}'s shape; {requests[True]} requests a turn at Pagemill, {requests[False]} at the "
            f"sequential server ({versions}), all posted at once. Processes of others took {noise:.0%} of the CPU in "
            + ("the noisiest turn." if noise > MOST_NOISE else "the noisiest turn, which is little."),
        ]
    )


def _servers(found: Mapping[str, Any]) -> list[Server]:
    return [
        Server(**{**server, "turns": [Turn(**turn) if isinstance(turn, dict) else turn for turn in server["turns"]]})
        for server in found["servers"]
    ]


def _spread(spread: Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.least:.{digits}f} … {spread.most:.{digits}f})"


def _turn(server: Server, number: int, requests: int, model: Path, cache: Path) -> Turn:
    began = time.perf_counter()
    starting = _pagemill(model, server.precision) if server.is_ours else _baseline(model, server.precision, cache)
    with starting as address:
        load_seconds = time.perf_counter() - began
        server.versions = address.versions
        post_together(address, {"model": model.name, **WARM_UP}, 2)
        before, began = CpuTime.now(os.getpid()), time.perf_counter()
        tokens = post_together(address, {"model": model.name, "prompt": PROMPT, "max_tokens": MAX_TOKENS}, requests)
        seconds = time.perf_counter() - began
        noise = CpuTime.now(os.getpid()).others_since(before) / (seconds * cores())
    return Turn(number, requests, sum(tokens), seconds, load_seconds, noise)


def post_together(address: Address, body: Mapping[str, object], requests: int) -> list[int]:
    """Post `body` from as many threads as there are requests; the tokens of each answer. Raises httpx.HTTPError."""
    limits = httpx.Limits(max_connections=requests, max_keepalive_connections=requests)
    with (
        httpx.Client(headers=dict(address.headers), limits=limits, timeout=PATIENCE, trust_env=False) as client,
        ThreadPoolExecutor(requests) as threads,
    ):
        answers = threads.map(
            lambda _: client.post(f"{address.url}/v1/completions", json=dict(body)).raise_for_status().json(),
            range(requests),
        )
        return [answer["usage"]["completion_tokens"] for answer in answers]


@contextlib.contextmanager
def _pagemill(model: Path, precision: str) -> Iterator[Address]:
    with (
        tempfile.TemporaryDirectory(prefix="pagemill-bench-") as directory,
        running_service(Path(directory), model, precision, computes_in()) as stack,
    ):
        yield Address(stack.base_url, {"authorization": f"Bearer {stack.api_key}"})


@contextlib.contextmanager
def _baseline(model: Path, precision: str, cache: Path) -> Iterator[Address]:
    """The sequential server, in a process of its own."""
    python = python_of(article_baseline.ENVIRONMENT, cache)
    log = cache / "logs" / f"{NAME}-baseline.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments: Sequence[str] = (str(model), precision, str(cores()))
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [python, "-P", "-m", article_baseline.__name__, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=cache,
            env=clean_environment(),
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"The sequential server did not start: see {log}")
            started = json.loads(line)
            yield Address(f"http://127.0.0.1:{started['port']}", versions=started["versions"])
        finally:
            process.terminate()
