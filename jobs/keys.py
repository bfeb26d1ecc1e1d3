"""API keys: `pm_` + 192 random bits + CRC32, stored as HMAC-SHA256 under the server's pepper, shown once."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import zlib
from collections.abc import Callable
from pathlib import Path

from jobs.settings import Settings

PREFIX = "pm_"
HINT_LENGTH = 10  # characters of a key that may be shown again: of ours, 157 random bits stay hidden
_SHARE_SHOWN = 4  # of an operator's own key, which may be short, a quarter
_RANDOM = 24  # bytes
_CHECKSUM = 4


def new_key() -> str:
    """A fresh key. The checksum lets the API refuse a mistyped key without asking the database."""
    random = secrets.token_bytes(_RANDOM)
    return PREFIX + _encode(random + zlib.crc32(random).to_bytes(_CHECKSUM, "big"))


def is_well_formed(key: str) -> bool:
    """Whether a `pm_` key's checksum is right."""
    try:
        raw = base64.b32decode(key.removeprefix(PREFIX).upper() + "=" * (-len(key.removeprefix(PREFIX)) % 8))
    except ValueError:
        return False
    random, checksum = raw[:_RANDOM], raw[_RANDOM:]
    return len(raw) == _RANDOM + _CHECKSUM and zlib.crc32(random).to_bytes(_CHECKSUM, "big") == checksum


def digest(key: str, pepper: bytes) -> bytes:
    """The 32 bytes that are stored of a key."""
    return hmac.new(pepper, key.encode(), hashlib.sha256).digest()


def hint(key: str) -> str:
    """The beginning of a key, which may be shown later."""
    return key[: HINT_LENGTH if key.startswith(PREFIX) else min(HINT_LENGTH, len(key) // _SHARE_SHOWN)]


def new_webhook_secret() -> str:
    """A Standard Webhooks secret: `whsec_` and 24 random bytes in base64."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()


def load_pepper(settings: Settings) -> bytes:
    """PAGEMILL_KEY_PEPPER, or the file `pepper` in the data directory, made on first use and readable by its owner."""
    if settings.key_pepper is not None:
        return settings.key_pepper.get_secret_value().encode()
    return read_or_create_secret(settings.data_dir / "pepper", secrets.token_urlsafe).encode()


def read_or_create_secret(path: Path, make: Callable[[], str]) -> str:
    """A secret that lives in a file of mode 0600. Two processes that start at once agree on one."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        # Written to a draft and linked into place: no process reads half a secret, and the first writer wins.
        draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        draft.touch(mode=0o600)
        draft.write_text(make())
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text().strip()


def _encode(raw: bytes) -> str:
    return base64.b32encode(raw).decode().rstrip("=").lower()
