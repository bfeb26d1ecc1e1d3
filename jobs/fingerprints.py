"""Failures by kind: two lines failed alike where their codes and the templates of their messages are equal.

A template is the first line of a message without what differs from line to line: numbers, quoted text, ids, paths,
query strings. The rules are version 1; a better rule gets another version, so that old links keep their meaning.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass

VERSION = "v1"
TEMPLATE_LENGTH = 200
_READ_AT_MOST = 2000  # characters of a message
OTHER = 0  # the group of what comes after `GROUPS_A_JOB` kinds
GROUPS_A_JOB = 200

# In this order: what is quoted is not looked into.
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\"[^\"]*\"|“[^”]*”|`[^`]*`|(?<!\w)'[^']*'(?!\w)"), "“…”"),
    (re.compile(r"\bhttps?://([^\s/?#:]+)\S*"), r"\1"),
    (re.compile(r"\b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b"), "…"),
    (re.compile(r"\b[a-z]{2,12}[_-](?=[0-9a-f]*\d)[0-9a-f]{8,}(?:-\d+)*\b"), "…"),  # job_0198…, req_0198…-3-1
    (re.compile(r"\b(?:0x)?(?=[0-9a-fA-F]*\d)(?=[0-9a-fA-F]*[a-fA-F])[0-9a-fA-F]{8,}\b"), "…"),
    (re.compile(r"(?<![\w/])(?:~|\.{1,2})?/(?:[^\s/:,;]+/)+([^\s/:,;]+)"), r"\1"),
    (re.compile(r"\d+(?:[.,]\d+)*"), "#"),
    (re.compile(r"\s+"), " "),
)


@dataclass(frozen=True, slots=True)
class Failure:
    """What a line failed with, as it is grouped."""

    code: str
    template: str

    @classmethod
    def of(cls, code: str, message: str) -> Failure:
        return cls(code, template_of(message))

    @property
    def fingerprint(self) -> int:
        """A signed 64-bit number, never that of `OTHER`."""
        digest = hashlib.blake2b(f"{self.code}\0{self.template}".encode("utf-8", "replace"), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True) or 1


def template_of(message: str) -> str:
    """The part of a message that is the same for all lines that failed alike."""
    first, _, _ = unicodedata.normalize("NFC", message[:_READ_AT_MOST]).replace("\0", "").strip().partition("\n")
    for pattern, replacement in _RULES:
        first = pattern.sub(replacement, first)
    return first.strip()[:TEMPLATE_LENGTH]


def public(fingerprint: int) -> str:
    """`v1:` and 16 hexadecimal digits, as it stands in URLs."""
    return f"{VERSION}:{fingerprint & 0xFFFF_FFFF_FFFF_FFFF:016x}"


def parse(text: str) -> int | None:
    """The reverse of `public`, or None where the text never was a fingerprint."""
    version, _, digits = text.partition(":")
    if version != VERSION or not re.fullmatch("[0-9a-f]{16}", digits):
        return None
    return int.from_bytes(bytes.fromhex(digits), "big", signed=True)
