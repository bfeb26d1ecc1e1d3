"""From the turns of one comparison to figures: rates, ratios of turns of the same round, shares of the ceiling.

A record is what `bench/results/WORKLOAD.json` holds, and everything here is computed from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.comparison import Comparison, Entry
from bench.contender import contenders
from bench.machine import circumstances

OURS = "engine"
# Above this share of CPU for others, a turn says little.
MOST_NOISE = 0.05

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some figures, the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        return cls(statistics.median(figures), min(figures), max(figures))


@dataclass(frozen=True, slots=True)
class Row:
    """One contender in one precision."""

    name: str
    title: str
    precision: str
    failure: str | None
    tokens_per_second: Spread | None = None
    requests_per_second: float = 0.0
    peak_memory: int = 0
    load_seconds: float = 0.0
    of_ceiling: float | None = None
    """Share of the ceiling in its precision: the least time, by its median."""

    same_tokens: float | None = None
    """Share of requests with the very tokens of our engine in this precision; None where they are not known."""

    noise: float = 0.0
    """Share of the machine's CPU that went to others, in its noisiest turn."""

    is_scaled: bool = False


def record(comparison: Comparison, ceilings: Record, command: str, *, threads: int) -> dict[str, Any]:
    """What happened, as it is kept."""
    return {
        "workload": comparison.workload.name,
        "title": comparison.workload.title,
        "command": command,
        "requests": len(comparison.workload.requests(0)),
        "threads": threads,
        "measured": circumstances(),
        "ceilings": ceilings,
        "entries": [
            {
                "contender": entry.contender.name,
                "title": entry.contender.title,
                "precision": entry.precision,
                "versions": entry.versions,
                "failure": entry.failure,
                "turns": [asdict(turn) for turn in entry.turns],
                "same_tokens": _same_tokens(entry, comparison.entries),
            }
            for entry in comparison.entries
        ],
    }


def rows(record: Record) -> list[Row]:
    """The fastest first, then those that failed."""
    found = [_row(record, entry) for entry in record["entries"]]
    return sorted(found, key=lambda row: -row.tokens_per_second.median if row.tokens_per_second else 0.0)


def ratios(record: Record, ours: Mapping[str, Any], other: Mapping[str, Any]) -> Spread | None:
    """How many times as fast `ours` was as `other`, over the rounds in which both took a turn."""
    theirs = {turn["round"]: turn["seconds"] for turn in other["turns"]}
    pairs = [theirs[turn["round"]] / turn["seconds"] for turn in ours["turns"] if turn["round"] in theirs]
    return Spread.of(pairs) if pairs else None


def our_entries(record: Record) -> list[Mapping[str, Any]]:
    """The bare engine's entries that took a turn, one for each precision."""
    return [entry for entry in record["entries"] if entry["contender"] == OURS and entry["turns"]]


def is_ours(name: str) -> bool:
    return contenders()[name].environment is None


def _row(record: Record, entry: Mapping[str, Any]) -> Row:
    turns = entry["turns"]
    head = (entry["contender"], entry["title"], entry["precision"], entry["failure"])
    if not turns:
        return Row(*head)
    seconds = statistics.median(turn["seconds"] for turn in turns)
    ceiling = record["ceilings"]["precisions"].get(entry["precision"])
    cores = record["measured"]["cores"]
    return Row(
        *head,
        Spread.of([turn["output_tokens"] / turn["seconds"] for turn in turns]),
        record["requests"] / seconds,
        max(turn["peak_memory"] for turn in turns),
        statistics.median(turn["load_seconds"] for turn in turns),
        ceiling["least_seconds"] / seconds if ceiling else None,
        entry["same_tokens"],
        max(turn["others_cpu_seconds"] / (cores * turn["seconds"]) for turn in turns),
        turns[0]["measured_requests"] < record["requests"],
    )


def _same_tokens(entry: Entry, entries: Sequence[Entry]) -> float | None:
    ours = next((one for one in entries if one.contender.name == OURS and one.precision == entry.precision), None)
    if ours is None or ours is entry or entry.contender.sample is not None:
        return None
    pairs = [
        mine == theirs
        for number in entry.outputs.keys() & ours.outputs.keys()
        for mine, theirs in zip(ours.outputs[number], entry.outputs[number], strict=True)
        if theirs is not None
    ]
    return statistics.fmean(pairs) if pairs else None
