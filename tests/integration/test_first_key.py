"""The operator's own first key."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from cli.first_key import UnusableKey, ensure_first_key, first_key, store_key
from jobs import keys
from jobs.database import connect
from jobs.queries import tenants
from jobs.settings import Settings


def test_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    key = first_key(settings)
    assert keys.is_well_formed(key)
    assert first_key(settings) == key
    assert (tmp_path / "api_key").stat().st_mode & 0o077 == 0


def test_storing_a_key_twice_adds_it_once(database_url: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    first = store_key(settings, database_url, "a key of my own, long enough", tenant="a new tenant")
    assert first.is_new
    assert first.webhook_secret is not None
    again = store_key(settings, database_url, "a key of my own, long enough", tenant="a new tenant")
    assert (again.is_new, again.webhook_secret) == (False, None)


@pytest.mark.parametrize(
    "key",
    ["short", keys.new_key()[:-1] + "?", "pm_" + "a" * 40, "long enough, and copied with its end\r"],
    ids=["short", "mistyped", "made up", "line break"],
)
def test_key_that_the_api_would_refuse_is_refused_here(key: str, database_url: str, tmp_path: Path) -> None:
    with pytest.raises(UnusableKey, match="PAGEMILL_API_KEY"):
        store_key(Settings(data_dir=tmp_path), database_url, key)


def test_first_key_that_was_revoked_makes_way_for_another(database_url: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, database_url=database_url)
    first = ensure_first_key(settings, database_url)
    assert ensure_first_key(settings, database_url) == first
    database = connect(settings, "test")
    with database.begin() as connection:
        assert tenants.revoke_key(connection, first) == 1
    second = ensure_first_key(settings, database_url)
    assert second != first
    assert ensure_first_key(settings, database_url) == second
    with database.begin() as connection:
        assert tenants.find_key(connection, keys.digest(second, keys.load_pepper(settings))) is not None
        tenants.revoke_key(connection, second)
    database.dispose()
    with pytest.raises(UnusableKey, match="revoked"):
        ensure_first_key(settings.model_copy(update={"api_key": SecretStr(second)}), database_url)
