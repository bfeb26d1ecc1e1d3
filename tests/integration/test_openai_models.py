"""Models as OpenAI's own client reads them."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from jobs.settings import Settings
from tests.support.api_server import running_api
from tests.support.rows import Rows


@pytest.fixture(scope="module")
def client(api_settings: Settings, api_rows: Rows) -> Iterator[openai.OpenAI]:
    for name in ("org/name", "a b/c"):
        api_rows.execute(
            "INSERT INTO models (name, max_model_len, vocab_size) VALUES (:name, 64, 9) ON CONFLICT DO NOTHING",
            name=name,
        )
    with running_api(api_settings) as api:
        key = api.client.headers["authorization"].removeprefix("Bearer ")
        with openai.OpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0) as made:
            yield made


def test_models_are_listed_and_retrieved_although_a_name_has_a_slash(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"demo", "org/name", "a b/c"}
    for name in ("demo", "org/name", "a b/c"):  # the client writes the slash as %2F
        model = client.models.retrieve(name)
        assert (model.id, model.object, model.owned_by) == (name, "model", "pagemill")


def test_unknown_model_is_a_404_by_its_code(client: openai.OpenAI) -> None:
    for name in ("org", "org/other", "org/name/more"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve(name)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
