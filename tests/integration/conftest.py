"""What an API that serves a whole module of tests stands on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobs.settings import Settings
from tests.support.rows import Rows, rows_in
from tests.support.services import Services


@pytest.fixture(scope="module")
def api_rows(services: Services) -> Iterator[Rows]:
    """The rows behind a module's API. What one test leaves there the next one finds, unless the module clears it."""
    with services.database() as url, rows_in(url) as rows:
        rows.clear()
        yield rows


@pytest.fixture(scope="module")
def api_settings(api_rows: Rows, services: Services, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of an API on `api_rows`; a module changes what it needs otherwise."""
    return Settings(
        database_url=api_rows.database_url,
        redis_url=services.redis_database(),
        data_dir=tmp_path_factory.mktemp("api"),
    )
