from __future__ import annotations

from tests.parity.table import BEGIN, DOCUMENT, END, compared, path_of


def test_the_table_names_every_compared_model() -> None:
    table = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert [row[:3] for row in rows] == [[model.name, f"`{model.model_type}`", path_of(model)] for model in compared()]
