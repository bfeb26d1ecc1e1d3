"""The table of docs/models.md, and the comparisons that wrote it."""

from __future__ import annotations

import pytest

from tests.parity.table import BEGIN, DOCUMENT, END, compare, compared, path_of
from tests.parity.tiny_models import TinyModel


def test_table_names_every_compared_model() -> None:
    table = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert [row[:3] for row in rows] == [[model.name, f"`{model.model_type}`", path_of(model)] for model in compared()]


@pytest.mark.slow
@pytest.mark.parametrize("model", compared(), ids=lambda model: model.name)
def test_table_models_give_64_equal_tokens_after_each_of_16_prompts(model: TinyModel) -> None:
    compare(model)  # raises where they are not, or where a log-probability is off by more than the tolerance
