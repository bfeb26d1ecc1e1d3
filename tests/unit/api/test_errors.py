"""What callers see of errors that no route raises itself."""

from __future__ import annotations

import psycopg
import pytest
from psycopg.errors import UndefinedColumn, UndefinedTable
from sqlalchemy.exc import ProgrammingError

from api.errors import problem


@pytest.mark.parametrize("error", [UndefinedTable, UndefinedColumn])
def test_older_schema_is_answered_with_its_remedy(error: type[psycopg.Error]) -> None:
    found = problem(ProgrammingError("SELECT 1", {}, error()))
    assert found is not None
    assert found.status == 503
    assert b"pagemill migrate" in found.content
