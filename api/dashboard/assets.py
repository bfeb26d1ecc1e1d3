"""The dashboard's files: read and compressed once, served under a digest over all of them.

A file's address changes whenever any file changes, so browsers keep every answer for a year; imports between modules
are relative and follow. Only the shell, which names the digest, is asked for anew. Comments, indentation and
CSS's spaces, which are for readers of the source, are not sent.
"""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

SHELL = "index.html"
DIGEST_BYTES = 8

# `text/javascript` everywhere: a machine's own registry may say otherwise, and a browser then refuses a module.
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file as it is sent."""

    content: bytes
    packed: bytes  # the same, by gzip
    media_type: str


@dataclass(frozen=True, slots=True)
class Assets:
    """All files of one version of the dashboard."""

    digest: str
    shell: Asset
    by_path: Mapping[str, Asset]


@cache
def load_assets() -> Assets:
    """The files of the package `api.dashboard`, with the digest put into the shell."""
    contents = dict(sorted(_walk(files("api.dashboard") / "static", "")))
    digest = _digest(contents)
    shell = contents.pop(SHELL).decode().replace("{digest}", digest).replace("{preloads}", _preloads(contents, digest))
    return Assets(digest, _asset(SHELL, shell.encode()), {path: _asset(path, body) for path, body in contents.items()})


def _walk(directory: Traversable, prefix: str) -> Iterator[tuple[str, bytes]]:
    for entry in directory.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, entry.read_bytes()


def _digest(contents: Mapping[str, bytes]) -> str:
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for path, body in contents.items():
        state.update(f"{path}\0{len(body)}\0".encode())
        state.update(body)
    return state.hexdigest()


def _preloads(paths: Mapping[str, bytes], digest: str) -> str:
    """All modules at once: without these, a browser finds them one import after the other."""
    modules = (path for path in paths if path.endswith(".js") and path != "theme.js")
    return "\n".join(f'<link rel="modulepreload" href="/static/{digest}/{path}">' for path in modules)


def trimmed(source: str) -> str:
    """JavaScript or CSS without indentation and without comments of whole lines.

    Each line stays a line, so that an error names the line of the source. No template literal may span lines.
    """
    lines = []
    is_comment = False
    for line in map(str.strip, source.split("\n")):
        begins = line.startswith("/*") and line.find("*/") in (-1, len(line) - 2)
        is_code = not (is_comment or begins or line.startswith("//"))
        is_comment = (is_comment or begins) and not line.endswith("*/")
        lines.append(line if is_code else "")
    return "\n".join(lines)


def without_spaces(css: str) -> str:
    """CSS without the spaces beside braces and behind colons and semicolons; no text of ours has one there."""
    return re.sub(r"(?<=[{:;]) | (?=[{}])", "", css)


def _asset(path: str, content: bytes) -> Asset:
    suffix = path[path.rindex(".") :]
    if suffix in (".js", ".css"):
        content = trimmed(content.decode()).encode()
    if suffix == ".css":
        content = without_spaces(content.decode()).encode()
    kind = _TYPES.get(suffix) or mimetypes.types_map.get(suffix, "application/octet-stream")
    charset = "; charset=utf-8" if suffix in _TYPES else ""
    return Asset(content, gzip.compress(content, 9, mtime=0), kind + charset)
