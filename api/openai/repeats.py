"""Requests that are sent again: by a caller with an `Idempotency-Key`, or by an official client after a lost answer.

The official clients send no key, but count their tries in `x-stainless-retry-count`. A first try is remembered for some
minutes; a later one with the same key, path and body answers with what the first one made.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Request

from api.deps import Caller
from api.parameters import IdempotencyKey
from jobs.queries.creations import Claim

KEY_SECONDS = 86400.0
RETRY_SECONDS = 900.0  # clients give up waiting after ten minutes, and then try again


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a request. `claim` is asked once its body is known."""

    tenant_id: UUID
    path: str
    credentials: str
    key: str | None
    retry_count: int | None
    began: float
    """Monotonic seconds."""

    def claim(self, body_sha256: bytes) -> Claim | None:
        """How this request is known again, or None where its caller has no way of saying that it repeats."""
        if self.key is not None:
            request = _digest("key", self.path, self.key)
            return Claim(self.tenant_id, request, body_sha256, KEY_SECONDS, replaces_older=None)
        if self.retry_count is None:
            return None
        request = _digest("retry", self.path, self.credentials, body_sha256.hex())
        age = time.monotonic() - self.began if self.retry_count == 0 else None
        return Claim(self.tenant_id, request, body_sha256, RETRY_SECONDS, replaces_older=age)


def _digest(*parts: str) -> bytes:
    return hashlib.sha256("\n".join(parts).encode()).digest()


async def _attempt(
    request: Request,
    caller: Caller,
    idempotency_key: IdempotencyKey = None,
) -> Attempt:
    count = request.headers.get("x-stainless-retry-count", "")
    return Attempt(
        tenant_id=caller.id,
        path=request.url.path,
        credentials=request.headers.get("authorization", ""),
        key=idempotency_key,
        retry_count=int(count) if count.isascii() and count.isdigit() and len(count) < 10 else None,
        began=time.monotonic(),
    )


RequestAttempt = Annotated[Attempt, Depends(_attempt)]
