"""No caller is answered with a regular expression."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobs.errors import InvalidInput
from jobs.patterns import MEANINGS
from jobs.requests import JobOptions, PromptLine, validate


def _patterns(schema: object) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            yield schema["pattern"]
        for part in schema.values():
            yield from _patterns(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from _patterns(part)


def test_every_pattern_has_a_meaning() -> None:
    found = {pattern for model in (JobOptions, PromptLine) for pattern in _patterns(model.model_json_schema())}
    assert len(found) >= 4
    assert found <= MEANINGS.keys()


@pytest.mark.parametrize(
    ("options", "param", "said"),
    [
        ({"completion_window": "24 hours"}, "completion_window", "such as 30m, 24h or 7d"),
        ({"webhook": {"url": "example.org"}}, "webhook.url", "begins with http:// or https://"),
        ({"metadata": {"a": "\0"}}, "metadata.a", "NUL"),
    ],
)
def test_mismatch_is_a_sentence(options: dict[str, object], param: str, said: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        validate(JobOptions, {"model": "demo", **options})
    assert said in str(refusal.value)
    assert "pattern" not in str(refusal.value)
    assert refusal.value.param == param
