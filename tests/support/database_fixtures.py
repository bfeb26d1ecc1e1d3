"""Fixtures with real databases on real servers (see tests/support/services.py), for tests of the service.

A plugin of its own, because tests of kernels and of the engine run where the service's packages are absent.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.rows import Rows, rows_in
from tests.support.services import Services, running_services


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """One Postgres and one Redis for the whole run."""
    with running_services(tmp_path_factory.mktemp("services") / "data") as running:
        yield running


@pytest.fixture
def database_url(services: Services) -> Iterator[str]:
    """A fresh, migrated database."""
    with services.database() as url:
        yield url


@pytest.fixture(scope="session")
def _rows(services: Services) -> Iterator[Rows]:
    with services.database() as url, rows_in(url) as rows:
        yield rows


@pytest.fixture
def rows(_rows: Rows) -> Rows:
    """Puts real rows into a database that is empty but for a model, and acts as a worker does.

    The database is emptied for each test, not made anew: that is ten times as fast.
    """
    _rows.clear()
    return _rows


@pytest.fixture
def empty_database_url(services: Services) -> Iterator[str]:
    """A fresh database without tables."""
    with services.database(migrated=False) as url:
        yield url


@pytest.fixture
def redis_url(services: Services) -> str:
    """An empty Redis database."""
    return services.redis_database()
