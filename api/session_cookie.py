"""The cookie of a logged-in page: `session id.key id.expiry.HMAC`, which no table keeps.

The key's row is looked up with each request, so that a revoked key ends its sessions at once.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import dataclass
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from jobs.errors import ForeignPage
from jobs.ids import new_id

COOKIE = "pagemill_session"
PAGE_HEADER = "x-pagemill-page"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

IDLE = 12 * 3600  # seconds that a session lasts after its last use
RENEWED_AFTER = 600  # seconds; so that not every answer sets the cookie
LONGEST = 30 * 86400  # seconds from login, however much it is used


@dataclass(frozen=True, slots=True)
class Session:
    """A login with a key. `id` is a UUIDv7, whose time is that of the login. `expires_at` is Unix seconds."""

    id: UUID
    key_id: UUID
    expires_at: int

    @classmethod
    def begin(cls, key_id: UUID) -> Session:
        return cls(new_id(), key_id, int(time.time()) + IDLE)

    @property
    def began_at(self) -> int:
        return (self.id.int >> 80) // 1000

    def renewed(self) -> Session | None:
        """The session as it goes on from now, or None while the cookie that the page has is good enough."""
        expires_at = min(int(time.time()) + IDLE, self.began_at + LONGEST)
        return Session(self.id, self.key_id, expires_at) if expires_at >= self.expires_at + RENEWED_AFTER else None


class Cookies:
    """Signs and reads the cookie, under a key that is derived from the server's pepper."""

    def __init__(self, pepper: bytes) -> None:
        self._key = hmac.new(pepper, b"pagemill session v1", hashlib.sha256).digest()

    def read(self, value: str) -> Session | None:
        """The session of a cookie that is ours and not over."""
        signed, _, signature = value.rpartition(".")
        # As bytes: `compare_digest` takes text only where it is ASCII.
        if not hmac.compare_digest(signature.encode(), self._sign(signed).encode()):
            return None
        session_id, key_id, expiry = signed.split(".")
        session = Session(UUID(hex=session_id), UUID(hex=key_id), int(expiry))
        return session if session.expires_at > time.time() else None

    def value(self, session: Session) -> str:
        signed = f"{session.id.hex}.{session.key_id.hex}.{session.expires_at}"
        return f"{signed}.{self._sign(signed)}"

    def set(self, request: Request, response: Response, session: Session) -> None:
        """Hand the session to the page: no script reads the cookie, and no other site sends it."""
        response.set_cookie(
            COOKIE,
            self.value(session),
            max_age=session.expires_at - int(time.time()),
            path="/",
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )

    def _sign(self, signed: str) -> str:
        return hmac.new(self._key, signed.encode(), hashlib.sha256).hexdigest()


def forget(request: Request, response: Response) -> None:
    """Take the cookie away again."""
    response.delete_cookie(COOKIE, path="/", secure=request.url.scheme == "https", httponly=True, samesite="strict")


def require_own_page(request: Request) -> None:
    """Refuse a write that another site's page sent along with the cookie. Raises `ForeignPage`.

    Browsers write `Sec-Fetch-Site` themselves; those that know it not still send `Origin` with every write. A header
    of our own makes a browser ask first, which no answer of ours allows.
    """
    site = request.headers.get("sec-fetch-site")
    if site is None:
        # The scheme is left out: a proxy that ends TLS hides it from this process.
        origin = request.headers.get("origin", "")
        is_own = origin.partition("://")[2] == request.headers.get("host", "") != ""
    else:
        is_own = site == "same-origin"
    if not is_own or request.headers.get(PAGE_HEADER) != "1":
        raise ForeignPage
