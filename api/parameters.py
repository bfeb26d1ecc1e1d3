"""Parameters that several routes take."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header
from pydantic import AfterValidator

from jobs import fingerprints, patterns


def _known_fingerprint(text: str) -> str:
    if fingerprints.parse(text) is None:
        raise ValueError("`v1:` and 16 hexadecimal digits are expected here")
    return text


IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255, pattern=patterns.PRINTABLE_ASCII)]
"""Names a request, so that it can be sent again; FastAPI takes the header's name from the argument's."""

Fingerprint = Annotated[str, AfterValidator(_known_fingerprint)]
"""A kind of failure, as a job's `failures` have it."""
