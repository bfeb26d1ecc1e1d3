"""The table in `docs/operations.md` is `jobs.settings`: every setting, in its order, with its default and meaning."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic.fields import FieldInfo

from jobs.settings import Settings
from tests.support.paths import REPOSITORY

PAGE = REPOSITORY / "docs" / "operations.md"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    match value:
        case None:
            return "unset"
        case Path():
            return f"`~/{value.relative_to(Path.home())}`"
        case bool() | tuple():
            return f"`{json.dumps(value)}`"
        case float():
            return f"`{value:.10g}`"
        case _:
            return f"`{value}`"


def test_settings_table_equals_the_code() -> None:
    expected = [
        f"| `PAGEMILL_{name.upper()}` | {_default(field)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    documented = [line for line in PAGE.read_text().splitlines() if line.startswith("| `PAGEMILL_")]
    assert documented == expected, "the table should be:\n" + "\n".join(expected)


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for field in Settings.model_fields.values())
