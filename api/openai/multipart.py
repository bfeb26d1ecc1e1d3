"""Forms with a file in them, read as they come in: the file goes to its writer, piece by piece.

Clients send the file first or last, with a length or chunked, so the fields are known only when the form has ended.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from urllib.parse import unquote

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from api.errors import UnsupportedMediaType
from jobs.errors import InvalidInput, TooLarge
from jobs.file_store import Writer

MAX_PARTS = 64
MAX_FIELD_BYTES = 64 * 1024
_BOUNDARY = re.compile(rb"[ -~]{1,70}")

Opened = AbstractAsyncContextManager[Writer]


@dataclass(slots=True)
class Form:
    """What a form said. `size` is None where the file's part was missing, `sha256` is the file's."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = "upload"
    size: int | None = None
    sha256: bytes = b""

    @property
    def fingerprint(self) -> bytes:
        """The same for forms that say the same; boundary and order of parts do not count."""
        said = orjson.dumps([self.fields, self.filename], option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(said + self.sha256).digest()


@dataclass(slots=True)
class _Part:
    name: str
    filename: str | None
    content: bytearray = field(default_factory=bytearray)


class _Events:
    """The parser's callbacks as a list: they cannot await."""

    def __init__(self) -> None:
        self.events: list[tuple[str, bytes]] = []
        self._num_parts = 0
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value = b"", b""

    def callbacks(self) -> dict[str, Callable[..., None]]:
        def on_part_begin() -> None:
            self._num_parts += 1
            if self._num_parts > MAX_PARTS:  # repeated names and unnamed parts count, too
                raise TooLarge(f"More than {MAX_PARTS} parts in a form.")

        def on_header_field(data: bytes, start: int, end: int) -> None:
            self._name += data[start:end]

        def on_header_value(data: bytes, start: int, end: int) -> None:
            self._value += data[start:end]

        def on_header_end() -> None:
            self._headers[self._name.lower()] = self._value
            self._name, self._value = b"", b""

        def on_headers_finished() -> None:
            self.events.append(("begin", self._headers.get(b"content-disposition", b"")))
            self._headers = {}

        def on_part_data(data: bytes, start: int, end: int) -> None:
            self.events.append(("data", data[start:end]))

        def on_part_end() -> None:
            self.events.append(("end", b""))

        def on_end() -> None:
            self.events.append(("form end", b""))

        return {name: value for name, value in locals().items() if name.startswith("on_")}


async def read_form(
    request: Request, pieces: AsyncIterator[bytes], *, file_field: str, opened: Opened, max_bytes: int
) -> Form:
    """Read a form, writing the content of its part `file_field` into `opened`.

    Raises `InvalidInput`, `TooLarge` where the file has more than `max_bytes`, `UnsupportedMediaType` where the body is
    no form. Where it raises, `opened` was left with that error, so nothing of the file is kept.
    """
    form = Form()
    parser, events = _parser(request)
    part: _Part | None = None
    is_ended = False
    content = hashlib.sha256()
    async with opened as writer:
        async for piece in pieces:
            try:
                parser.write(piece)
            except FormParserError as error:
                raise InvalidInput(f"The form is not valid multipart/form-data: {error}") from None
            batch, events.events = events.events, []
            for kind, data in batch:
                if kind == "begin":
                    part = _part(data, form, file_field)
                elif kind == "data" and part is not None:
                    if part.filename is None:
                        part.content += data
                        if len(part.content) > MAX_FIELD_BYTES:
                            raise TooLarge(f"More than {MAX_FIELD_BYTES} bytes.", param=part.name[:100])
                    else:
                        form.size = (form.size or 0) + len(data)
                        if form.size > max_bytes:
                            raise TooLarge(f"The file is larger than {max_bytes} bytes.", param=file_field)
                        content.update(data)
                        await writer.write(data)
                elif kind == "end" and part is not None:
                    if part.filename is None:
                        form.fields[part.name] = bytes(part.content).decode("utf-8", "replace")
                    part = None
                elif kind == "form end":
                    is_ended = True
        if not is_ended:
            raise InvalidInput("The form ends too early.")
        if form.size is None:
            raise InvalidInput("a file is expected in this field of the form", param=file_field)
    form.sha256 = content.digest()
    return form


def _parser(request: Request) -> tuple[MultipartParser, _Events]:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not _BOUNDARY.fullmatch(boundary):
        raise UnsupportedMediaType("A form is expected here: Content-Type multipart/form-data with a boundary.")
    events = _Events()
    return MultipartParser(boundary, events.callbacks()), events  # type: ignore[arg-type]


def _part(disposition: bytes, form: Form, file_field: str) -> _Part:
    # Browsers and the official clients send UTF-8 here, with `"` as %22; the parser passes bytes through as latin-1.
    _, options = parse_options_header(disposition.decode("latin-1"))
    name = options.get(b"name", b"").decode("utf-8", "replace")
    if name == file_field:
        if form.size is not None:
            raise InvalidInput("one file is expected, not several", param=file_field)
        form.size = 0
        given = options.get(b"filename", b"").decode("utf-8", "replace")
        form.filename = unquote(given, errors="replace") or "upload"
        return _Part(name, form.filename)
    return _Part(name, None)
