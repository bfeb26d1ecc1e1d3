"""The first API key: the operator's own, or one that is made once and kept beside the data."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from jobs import keys
from jobs.database import sqlalchemy_url
from jobs.queries import tenants
from jobs.queries.audit import COMMAND_LINE
from jobs.roles import Role
from jobs.settings import Settings

DEFAULT_TENANT = "default"
KEY_FILE = "api_key"
SHORTEST_KEY = 16


def first_key(settings: Settings) -> str:
    """PAGEMILL_API_KEY, or the key in the data directory, made on first use and readable by its owner only."""
    if settings.api_key is not None:
        return settings.api_key.get_secret_value()
    return keys.read_or_create_secret(settings.data_dir / KEY_FILE, keys.new_key)


def ensure_first_key(settings: Settings, database_url: str) -> str:
    """The first key, stored and good. One of ours that was revoked makes way for a new one; raises `UnusableKey`."""
    key = first_key(settings)
    if store_key(settings, database_url, key, name="first", role=Role.OPERATOR).is_live:
        return key
    if settings.api_key is not None:
        raise UnusableKey("PAGEMILL_API_KEY was revoked: set another, or unset it and let `pagemill up` make one.")
    (settings.data_dir / KEY_FILE).unlink()
    key = first_key(settings)
    store_key(settings, database_url, key, name="first", role=Role.OPERATOR)
    return key


class UnusableKey(ValueError):
    """The operator's own first key is one that the API would refuse."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What `store_key` came to."""

    is_new: bool  # False: it was a key already
    is_live: bool  # False: it is revoked or expired
    webhook_secret: str | None  # of a tenant that was made with it


def store_key(
    settings: Settings,
    database_url: str,
    key: str,
    *,
    tenant: str = DEFAULT_TENANT,
    name: str = "",
    role: Role = Role.READ_WRITE,
) -> Stored:
    """Make `key` a key of `tenant`, which is made too.

    Raises UnusableKey for a key that no header can carry, that is short enough to guess, or that looks like one of ours
    but was mistyped.
    """
    if key != key.strip() or not all(" " <= character <= "~" for character in key):
        raise UnusableKey("PAGEMILL_API_KEY holds a line break or another character that no HTTP header can carry.")
    if len(key) < SHORTEST_KEY or (key.startswith(keys.PREFIX) and not keys.is_well_formed(key)):
        raise UnusableKey(
            f"PAGEMILL_API_KEY is not usable: it needs {SHORTEST_KEY} characters or more, and one that begins with "
            f"{keys.PREFIX} must be a key that Pagemill made (`pagemill keys create`)."
        )
    pepper = keys.load_pepper(settings)
    engine = create_engine(sqlalchemy_url(database_url), poolclass=NullPool)
    with engine.begin() as connection:
        secret = keys.new_webhook_secret()
        owner = tenants.ensure_tenant(connection, tenant, secret)
        digest = keys.digest(key, pepper)
        added = tenants.add_key(
            connection, owner.id, name=name, role=role, hint=keys.hint(key), digest=digest, by=COMMAND_LINE
        )
        is_live = tenants.find_key(connection, digest) is not None
    return Stored(added is not None, is_live, secret if owner.webhook_secret == secret else None)
