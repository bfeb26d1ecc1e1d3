"""All contenders on one workload, taking turns: A B C A B C.

In a round each gets the same prompts, and no two rounds share any. What is compared is always two turns of one round,
so that a machine that is slow for a while is slow for both. Between turns a contender is halted, or ended where memory
is scarce; loading and a first warm-up stand outside the time.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from bench.contender import Contender, Setup
from bench.contender_process import ROOT, ContenderFailed, ContenderProcess
from bench.conversions import converted
from bench.environments import NotInstallable
from bench.machine import computes_in
from bench.models import end_tokens, model_directory
from bench.usage import CpuTime, available_memory
from bench.workload import Workload, WorkloadRequest

WARM_UP_TOKENS = 4
START_TIMEOUT = 900.0
# A contender that took this many times as long as the fastest in its precision takes no second turn: rounds would take
# hours, and the spread would not change the finding.
HOPELESS = 3.0
# Contenders that wait stay loaded as long as this share of the memory is free.
ENOUGH_MEMORY = 0.45


@dataclass(frozen=True, slots=True)
class Turn:
    """One contender's go at one round."""

    round: int
    seconds: float
    """For all requests; reckoned from those that ran where `measured_requests` is less than all."""

    measured_requests: int
    output_tokens: int
    load_seconds: float
    peak_memory: int
    """Bytes, of its processes since they started."""

    others_cpu_seconds: float
    """CPU that went to processes outside this benchmark during the run, or to other guests of the host."""


@dataclass(slots=True)
class Entry:
    """A contender in one precision, and how it did."""

    contender: Contender
    precision: str
    versions: dict[str, str] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    failure: str | None = None
    """Why it takes no more turns."""

    outputs: dict[int, list[list[int] | None]] = field(default_factory=dict)
    """Token ids of each request, by round."""

    @property
    def name(self) -> str:
        return f"{self.contender.name} {self.precision}"


class Comparison:
    """Runs rounds until it is told to stop. Use it as a context: leaving ends all processes."""

    def __init__(
        self, workload: Workload, entries: Sequence[Entry], cache: Path, *, threads: int, limit: float
    ) -> None:
        """`limit` are the seconds that one turn may take."""
        self.workload = workload
        self.entries = entries
        self._cache = cache
        self._threads = threads
        self._limit = limit
        self._processes: dict[str, tuple[ContenderProcess, float]] = {}

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *exception: object) -> None:
        for process, _ in self._processes.values():
            process.close()

    def prepare(self) -> None:
        """Install and convert what is missing; who cannot be prepared is out."""
        model = model_directory(self.workload.model, self._cache)
        for entry in self.entries:
            if entry.failure is None:
                self._guarded(entry, functools.partial(self._converted, entry, model))

    def round(self, number: int) -> None:
        """One turn for each that has not failed, nor shown already that it is several times as slow as others."""
        for entry in [entry for entry in self.entries if entry.failure is None and not self._is_hopeless(entry)]:
            self._guarded(entry, functools.partial(self._turn, entry, number))

    def _is_hopeless(self, entry: Entry) -> bool:
        turns = [turn for other in self.entries if other.precision == entry.precision for turn in other.turns]
        return bool(entry.turns) and entry.turns[0].seconds > HOPELESS * min(turn.seconds for turn in turns)

    def _guarded(self, entry: Entry, step: Callable[[], object]) -> None:
        try:
            step()
        except (ContenderFailed, NotInstallable) as error:
            entry.failure = str(error)
            print(f"  {entry.name}: {error}", file=sys.stderr)
            if entry.name in self._processes:
                self._processes.pop(entry.name)[0].close()

    def _converted(self, entry: Entry, model: Path) -> Path:
        return converted(entry.contender, model, entry.precision, self._cache, self._threads)

    def _turn(self, entry: Entry, number: int) -> None:
        requests = self.workload.requests(number)
        measured = _sample(requests, entry.contender.sample)
        process, load_seconds = self._started(entry)
        before = CpuTime.now(os.getpid())
        answer = process.ask({"generate": [asdict(request) for request in measured]}, self._limit)
        others = CpuTime.now(os.getpid()).others_since(before)
        _check(measured, answer["outputs"])
        asked, all_asked = (sum(request.max_tokens for request in some) for some in (measured, requests))
        output_tokens = sum(output["num_tokens"] for output in answer["outputs"])
        turn = Turn(
            number,
            answer["seconds"] * all_asked / asked,
            len(measured),
            round(output_tokens * all_asked / asked),
            load_seconds,
            process.peak_memory(),
            others,
        )
        entry.turns.append(turn)
        entry.outputs[number] = [output["token_ids"] for output in answer["outputs"]]
        rate = turn.output_tokens / turn.seconds
        print(f"  {entry.name}: {rate:,.0f} tokens/s, {answer['seconds']:.1f} s", file=sys.stderr)
        self._unseat(entry)

    def _started(self, entry: Entry) -> tuple[ContenderProcess, float]:
        if entry.name in self._processes:
            self._processes[entry.name][0].resume()
            return self._processes[entry.name]
        requests = self.workload.requests(0)
        directory = model_directory(self.workload.model, self._cache)
        model = self._converted(entry, directory)
        log = self._cache / "logs" / f"{self.workload.name}-{entry.name.replace(' ', '-')}.log"
        process = ContenderProcess(entry.contender, self._cache, log, self._threads)
        self._processes[entry.name] = process, 0.0
        setup = Setup(
            model=model,
            precision=entry.precision,
            compute=computes_in(),
            threads=self._threads,
            max_tokens=max(len(request.prompt) + request.max_tokens for request in requests),
            num_requests=len(requests),
            eos_token_ids=end_tokens(directory),
        )
        began = time.perf_counter()
        started = process.ask({"start": asdict(setup) | {"model": str(setup.model)}}, START_TIMEOUT)
        load_seconds = time.perf_counter() - began
        entry.versions = started["versions"]
        warm_up = _sample(self.workload.warm_up(WARM_UP_TOKENS), entry.contender.sample)
        process.ask({"generate": [asdict(request) for request in warm_up]}, self._limit)
        self._processes[entry.name] = process, load_seconds
        return self._processes[entry.name]

    def _unseat(self, entry: Entry) -> None:
        """Make place for the next."""
        process, _ = self._processes[entry.name]
        if entry.contender.may_be_stopped:
            process.pause()
            if available_memory() >= ENOUGH_MEMORY:
                return
        self._processes.pop(entry.name)[0].close()


def measured_ceilings(workload: Workload, precisions: Sequence[str]) -> dict[str, Any]:
    """What `python -m bench.ceilings` prints, measured now. None where requests end as the model ends them, since how
    much they compute depends on what is generated."""
    if workload.stops_at_eos:
        return {"precisions": {}}
    command = [sys.executable, "-m", "bench.ceilings", workload.name, *precisions]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = orjson.loads(done.stdout)
    return found


def _sample(requests: Sequence[WorkloadRequest], count: int | None) -> Sequence[WorkloadRequest]:
    """`count` requests, evenly over all."""
    if count is None or count >= len(requests):
        return requests
    return [requests[(2 * place + 1) * len(requests) // (2 * count)] for place in range(count)]


def _check(requests: Sequence[WorkloadRequest], outputs: Sequence[dict[str, Any]]) -> None:
    """Everybody does all of the work, and no more."""
    if len(outputs) != len(requests):
        raise ContenderFailed(f"{len(requests)} requests brought {len(outputs)} outputs")
    for place, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        made, wanted = output["num_tokens"], request.max_tokens
        if made > wanted or (made < wanted and not request.stops_at_eos):
            raise ContenderFailed(f"request {place} brought {made} tokens instead of {wanted}")
