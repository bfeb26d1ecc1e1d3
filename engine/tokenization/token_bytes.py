"""Tokens as bytes, from the decoder of a tokenizer of the `tokenizers` library.

A token may hold part of a character, so that decoding it alone gives no text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

PieceReader = Callable[[str], bytes]

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class UnreadableDecoder(Exception):
    """A decoder that does not say the bytes of its pieces; the message says why."""


def piece_reader(decoder: Any) -> PieceReader:
    """Return the function from a piece, an added token included, to its bytes. Raises `UnreadableDecoder`."""
    if decoder is None:
        raise UnreadableDecoder("its tokenizer has no decoder")
    parts = list(_flat(json.loads(decoder.__getstate__())))
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        return _read_byte_level
    unknown = kinds - {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
    if unknown:
        raise UnreadableDecoder(f"its tokenizer decodes by {', '.join(sorted(unknown))}")
    replaced = [(part["replacement"], " ") for part in parts if part["type"] == "Metaspace"]
    for part in parts:
        if part["type"] == "Replace":
            if "String" not in part["pattern"]:
                raise UnreadableDecoder("its tokenizer decodes by a regular expression")
            replaced.append((part["pattern"]["String"], part["content"]))
    falls_back = "ByteFallback" in kinds

    def to_bytes(piece: str) -> bytes:
        if falls_back and _BYTE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        for old, new in replaced:
            piece = piece.replace(old, new)
        return piece.encode()

    return to_bytes


def _flat(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _flat(part)
    else:
        yield decoder


def _byte_level_table() -> dict[str, int]:
    """Return the byte of each of GPT-2's 256 printable stand-ins."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_table()


def _read_byte_level(piece: str) -> bytes:
    """Read stand-ins as bytes; a piece with any other character is text as it is, as in the library."""
    if all(char in _BYTE_LEVEL for char in piece):
        return bytes(_BYTE_LEVEL[char] for char in piece)
    return piece.encode()
