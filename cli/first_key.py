"""The first API key: the operator's own, or one that is made once and kept beside the data."""

from __future__ import annotations

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from jobs import keys
from jobs.database import sqlalchemy_url
from jobs.queries import tenants
from jobs.settings import Settings

DEFAULT_TENANT = "default"
KEY_FILE = "api_key"
SHORTEST_KEY = 16


def first_key(settings: Settings) -> str:
    """PAGEMILL_API_KEY, or the key in the data directory, made on first use and readable by its owner only."""
    if settings.api_key is not None:
        return settings.api_key.get_secret_value()
    return keys.read_or_create_secret(settings.data_dir / KEY_FILE, keys.new_key)


class UnusableKey(ValueError):
    """The operator's own first key is one that the API would refuse."""


def store_key(settings: Settings, database_url: str, key: str, *, tenant: str = DEFAULT_TENANT, name: str = "") -> bool:
    """Make `key` a key of `tenant`, which is made too. False where it was one already.

    Raises UnusableKey for a key that is short enough to guess, or looks like one of ours but was mistyped.
    """
    if len(key) < SHORTEST_KEY or (key.startswith(keys.PREFIX) and not keys.is_well_formed(key)):
        raise UnusableKey(
            f"PAGEMILL_API_KEY is not usable: it needs {SHORTEST_KEY} characters or more, and one that begins with "
            f"{keys.PREFIX} must be a key that Pagemill made (`pagemill keys create`)."
        )
    pepper = keys.load_pepper(settings)
    engine = create_engine(sqlalchemy_url(database_url), poolclass=NullPool)
    with engine.begin() as connection:
        owner = tenants.ensure_tenant(connection, tenant, keys.new_webhook_secret())
        added = tenants.add_key(connection, owner.id, name=name, hint=keys.hint(key), digest=keys.digest(key, pepper))
    return added is not None
