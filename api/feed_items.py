"""What the feed looks at, and what it finds; `api.feed_hub` passes these between streams and looks."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson

from jobs.search import Term

Scope = UUID | None
"""The tenant whose things a stream shows, or None for all."""

Key = tuple[Hashable, ...]
PARTS = ("minute", "failures", "timeline", "deliveries")


@dataclass(frozen=True, slots=True)
class Search:
    """The jobs of a scope that match, and are newer than `newest`."""

    scope: Scope
    terms: tuple[Term, ...]
    newest: UUID


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a tick looks at. Jobs are asked for by those who may see them, which is checked here."""

    jobs: Collection[tuple[Scope, UUID]] = ()
    opened: Collection[tuple[Scope, UUID]] = ()
    """Those whose parts are looked at."""

    overviews: Collection[Scope] = ()
    queues: Collection[Scope] = ()
    searches: Collection[Search] = ()
    has_workers: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """A message. Figures that move by the clock alone are not in `core`: while that stays, the message can wait."""

    message: bytes
    core: Hashable


def event(name: str, data: Any) -> bytes:
    """A server-sent event without its end, so that an id can follow."""
    return b"event: %s\ndata: %s\n" % (name.encode(), orjson.dumps(data))
