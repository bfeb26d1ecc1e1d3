"""What runs a workload: Pagemill itself, or a rival in a virtual environment of its own.

A contender is one file in `bench.pagemill` or `bench.rivals` that offers `CONTENDERS`. The harness imports it to know
what there is; a process of the contender's own imports it again to run it. So at its top it imports this module and
the standard library, and what it measures only when it starts.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.discovery import offered
from bench.workload import WorkloadRequest

PRECISIONS = ("float32", "bfloat16", "int8")
"""float32 and bfloat16 of weights and arithmetic; int8: of the weights at least, and what suits them otherwise."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Packages with their versions, installed by pip into a virtual environment."""

    name: str
    requirements: Sequence[str]
    unwanted: Sequence[str] = ()
    """Packages that come along and must go again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a contender is told when it starts."""

    model: Path
    """A directory as transformers saves it, or what the contender's conversion made of it."""

    precision: str
    compute: str
    """float32 or bfloat16: what this CPU computes faster in. Under int8, the type of everything else."""

    threads: int
    max_tokens: int
    """Of the longest request, prompt and output together."""

    num_requests: int
    eos_token_ids: Sequence[int]
    """What ends a request that stops there."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one request brought."""

    num_tokens: int
    """Without the end of sequence, where it stops there."""

    token_ids: Sequence[int] | None = None
    """None where the contender gives text only."""

    @classmethod
    def of(cls, token_ids: Sequence[int], request: WorkloadRequest, eos_token_ids: Sequence[int]) -> Output:
        """Of what a contender generated: what was asked for counts, and the rest is what it wastes."""
        ids = list(token_ids)[: request.max_tokens]
        if request.stops_at_eos:
            ids = list(itertools.takewhile(lambda token: token not in eos_token_ids, ids))
        return cls(len(ids), ids)


class WorkloadRunner(ABC):
    """A contender with its model loaded."""

    @abstractmethod
    def generate(self, requests: Sequence[WorkloadRequest]) -> list[Output]:
        """Complete all, handed over at once; outputs in their order."""

    def processes(self) -> Sequence[int] | None:
        """The process ids whose memory counts; None for this process and all that it started."""
        return None

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """End what was started."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """Turning a saved model into the contender's own format, once for each precision."""

    environment: Environment
    convert: Callable[[Path, Path, str], None]
    """Called in the environment with the saved model, the directory to make, and the precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    name: str
    title: str
    precisions: Sequence[str]
    start: Callable[[Setup], WorkloadRunner]
    packages: Sequence[str] = ()
    """Those whose versions are worth knowing."""

    environment: Environment | None = None
    """None: the one that the harness runs in."""

    variables: Callable[[Path, int], Mapping[str, str]] = field(default=lambda environment, threads: {})
    """Environment variables of its process, by its environment's directory and the number of threads."""

    conversion: Conversion | None = None
    may_be_stopped: bool = True
    """Whether it can be halted between its turns. One that keeps time, as a service with leases does, starts anew."""

    sample: int | None = None
    """How many requests really run where all would take too long; the time is scaled by the tokens generated."""


def contenders() -> dict[str, Contender]:
    """All contenders by name, ours first."""
    files = [*offered("bench.pagemill", "CONTENDERS"), *offered("bench.rivals", "CONTENDERS")]
    found = [one for file in files if isinstance(file, tuple) for one in file if isinstance(one, Contender)]
    return {contender.name: contender for contender in found}
