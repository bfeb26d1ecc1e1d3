"""URLs in settings: checked at start, in words that never repeat the URL, because it holds a password."""

from __future__ import annotations

from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

_REDIS_SCHEMES = {"redis": "redis", "valkey": "redis", "rediss": "rediss", "valkeys": "rediss"}
_POSTGRES_SCHEMES = frozenset({"postgres", "postgresql", "postgresql+psycopg"})
_UNQUOTED = (
    "a user name or password with any of / ? # @ : % in it is written percent-encoded, e.g. %23 for # "
    "(python3 -c 'import urllib.parse; print(urllib.parse.quote(input(), safe=\"\"))')"
)


def postgres(url: str) -> str:
    """The URL of a database, unchanged. Raises `ValueError` where it cannot be one."""
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in _POSTGRES_SCHEMES:
        raise ValueError("a URL is expected, e.g. postgresql://user:password@host:5432/name")
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError(f"the URL cannot be read: the port is a number, and {_UNQUOTED}") from None
    if any(character in (parsed.host or "") for character in "@#?"):
        raise ValueError(_UNQUOTED)
    return url


def with_password(url: str, password: str) -> str:
    """The URL of a database with `password`, unless it has one. A URL that cannot be read stays as it is."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return url
    return parsed.set(password=password).render_as_string(hide_password=False) if parsed.password is None else url


def redis(url: str) -> str:
    """The URL of a Redis or Valkey database, in the spelling that Celery and redis-py share: redis://…/NUMBER."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError(f"the URL cannot be read: {_UNQUOTED}") from None
    if parts.scheme not in _REDIS_SCHEMES or not url.startswith(f"{parts.scheme}://"):
        raise ValueError("a URL is expected, e.g. redis://:password@host:6379/0 (or rediss://, valkey://, valkeys://)")
    _check_host(parts)
    query = dict(parse_qsl(parts.query))
    number = parts.path.strip("/")
    chosen = query.pop("db", number)
    if number not in ("", chosen):
        raise ValueError("two different databases are named, one as /NUMBER and one as ?db=NUMBER")
    if chosen and not (chosen.isascii() and chosen.isdecimal()):
        raise ValueError(f"the database is a number, as in redis://host:6379/0; and {_UNQUOTED}")
    path = f"/{chosen}" if chosen else parts.path
    return parts._replace(scheme=_REDIS_SCHEMES[parts.scheme], path=path, query=urlencode(query)).geturl()


def http(url: str) -> str:
    """The URL of an API, unchanged. Raises `ValueError` where it cannot be one."""
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = SplitResult("", "", "", "", "")
    if parts.scheme not in ("http", "https"):
        raise ValueError("a URL is expected, e.g. http://127.0.0.1:8100")
    _check_host(parts)
    return url


def _check_host(parts: SplitResult) -> None:
    try:
        port = parts.port
    except ValueError:
        raise ValueError(f"the port is a number from 1 to 65535, and {_UNQUOTED}") from None
    if port == 0:
        raise ValueError("the port is a number from 1 to 65535")
    if not parts.hostname:
        raise ValueError("the URL names no host")
    if parts.fragment or "@" in parts.path + parts.query:
        raise ValueError(_UNQUOTED)
