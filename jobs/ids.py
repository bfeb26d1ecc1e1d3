"""Identifiers: 16 bytes in Postgres, a prefixed name outside."""

from __future__ import annotations

import secrets
import time
from uuid import UUID

JOB_PREFIX = "job_"
EVENT_PREFIX = "evt_"
FILE_PREFIX = "file-"
BATCH_PREFIX = "batch_"
MESSAGE_BATCH_PREFIX = "msgbatch_"
UPLOAD_PREFIX = "upload_"
PART_PREFIX = "part_"
ENDPOINT_PREFIX = "we_"
DELIVERY_PREFIX = "dlv_"
KEY_PREFIX = "key_"
WORKER_PREFIX = "worker_"
AUDIT_PREFIX = "audit_"


def new_id() -> UUID:
    """A UUIDv7 (RFC 9562): ordered by creation time, so that new rows land at the end of their indexes."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds & (1 << 48) - 1) << 80
    value |= 0x7 << 76 | secrets.randbits(12) << 64
    value |= 0b10 << 62 | secrets.randbits(62)
    return UUID(int=value)


def public_id(prefix: str, value: UUID) -> str:
    """`job_0198…`: what callers see."""
    return prefix + value.hex


def parse_id(prefix: str, text: str) -> UUID | None:
    """The reverse of `public_id`, or None where the text never was one of ours."""
    digits = text.removeprefix(prefix)
    if not text.startswith(prefix) or len(digits) != 32 or not set(digits) <= set("0123456789abcdef"):
        return None
    return UUID(hex=digits)
