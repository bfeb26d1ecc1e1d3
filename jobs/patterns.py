"""The patterns that callers' texts must match, and what each asks for in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRINTABLE = r"^[^\x00-\x1f\x7f]+$"
PRINTABLE_ASCII = r"^[\x20-\x7e]+$"
WITHOUT_NUL = r"^[^\x00]*$"
HTTP_URL = r"^https?://[^\s\x00-\x1f]+$"
FUNCTION_NAME = r"^[A-Za-z0-9_.-]{1,64}$"
WINDOW = r"^[1-9][0-9]{0,3}[mhd]$"

MEANINGS = {
    PRINTABLE: "control characters, such as line breaks, are not allowed here",
    PRINTABLE_ASCII: "only printable ASCII characters are allowed here",
    WITHOUT_NUL: "the character NUL is not allowed here",
    HTTP_URL: "a URL that begins with http:// or https:// is expected here, without blanks",
    FUNCTION_NAME: "1 to 64 letters, digits, underscores, dashes or dots are expected here",
    WINDOW: "a number of minutes, hours or days is expected here, such as 30m, 24h or 7d",
}

_PYDANTICS = "String should match pattern '"


def message(complaint: Mapping[str, Any]) -> str:
    """The message of one of pydantic's complaints, in words where pydantic shows a regular expression."""
    said: str = complaint["msg"]
    if complaint["type"] != "string_pattern_mismatch":
        return said
    return MEANINGS.get(said.removeprefix(_PYDANTICS).removesuffix("'"), said)
