"""`/tokenize`, `/detokenize` and `/tokenizer_info`: the official client, a worker's tokenizer thread, Valkey."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import redis

from api import tokenizer_calls
from demo.tokenizer import build_tokenizer
from engine.tokenization.tokenizer import Tokenizer
from jobs.queues import tokenizer_queue
from jobs.roles import Role
from jobs.settings import Settings
from tests.support.api_server import Api, anonymous, error_of, new_key, running_api
from tests.support.processes import PATIENCE, await_condition
from tests.support.rows import MODEL, Rows
from tests.support.services import Services
from worker.generation.tokenizer_server import TokenizerServer

HELLO: Any = [{"role": "user", "content": "hello"}]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{{ mood }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The demo's, a token a letter, with a template that knows assistants."""
    made = build_tokenizer(MODEL.max_model_len)
    made.chat_template = TEMPLATE
    return Tokenizer(made)


@pytest.fixture(scope="module")
def worker(api: Api, api_rows: Rows, tokenizer: Tokenizer) -> Iterator[None]:
    api_rows.worker(lease=10 * PATIENCE)
    server = TokenizerServer(api.settings, tokenizer=lambda model: tokenizer)
    server.start([MODEL])
    yield
    server.close()


@contextlib.contextmanager
def asking(api: Api) -> Iterator[Callable[..., Any]]:
    """Post with the official client, as vLLM's users do."""
    key = new_key(api.settings, "default")
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE) as client:
        yield lambda path, **body: client.post(path, cast_to=object, body=body)


@pytest.fixture(scope="module")
def ask(api: Api) -> Iterator[Callable[..., Any]]:
    with asking(api) as post:
        yield post


def text_of(ask: Callable[..., Any], **body: Any) -> str:
    """What a question's tokens say."""
    text: str = ask("/detokenize", model="demo", tokens=ask("/tokenize", model="demo", **body)["tokens"])["prompt"]
    return text


def test_tokens_of_a_text_become_the_text_again(worker: None, ask: Callable[..., Any], api_rows: Rows) -> None:
    found = ask("/tokenize", model="demo", prompt="12 + 30 =", return_token_strs=True)
    assert found == {
        "count": 10,
        "max_model_len": 128,
        "tokens": [1, 7, 8, 5, 78, 5, 9, 6, 5, 86],
        "token_strs": ["<s>", *"12 + 30 ="],
    }
    assert ask("/tokenize", prompt="12", add_special_tokens=False)["tokens"] == [7, 8]  # of the only model
    assert ask("/tokenize", model="demo", prompt="", add_special_tokens=None)["tokens"] == [1]
    assert ask("/detokenize", model="demo", tokens=[7, 8, 5, 78]) == {"prompt": "12 +"}
    assert api_rows.query("SELECT 1 FROM jobs") == []


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "<user>hello\n<assistant>"),
        ({"add_generation_prompt": False}, "<user>hello\n"),
        ({"continue_final_message": True}, "<user>hello"),
        ({"add_special_tokens": True}, "<s><user>hello\n<assistant>"),
        ({"chat_template_kwargs": {"mood": "gay"}}, "<user>hello\ngay<assistant>"),
        ({"tools": [{"type": "function", "function": {"name": "now"}}]}, "<user>hello\nnow<assistant>"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "hi"}], "continue_final_message": True},
         "<user>hello\n<assistant>hi"),
        ({"messages": [{"role": "developer", "content": [{"type": "text", "text": "be"}]}]}, "<system>be\n<assistant>"),
    ],
)  # fmt: skip
def test_conversation_ends_as_it_is_asked_to(
    worker: None, ask: Callable[..., Any], body: dict[str, Any], text: str
) -> None:
    assert text_of(ask, **{"messages": HELLO, **body}) == text


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/tokenize", {"model": "nothing", "prompt": "a"}, 404, "model_not_found", "model"),
        ("/tokenize", {"model": 5, "prompt": "a"}, 400, "invalid_request", "model"),
        ("/tokenize", {}, 400, "invalid_request", "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "invalid_request", "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "invalid_request", "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, 400, "invalid_request", "prompt"),
        ("/tokenize", {"prompt": "a", "nonsense": 1}, 400, "invalid_request", "nonsense"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, 400, "invalid_request", "add_generation_prompt"),
        ("/tokenize", {"messages": [{"role": "sage", "content": "a"}]}, 400, "invalid_request", "messages[0].role"),
        ("/tokenize", {"messages": HELLO, "max_tokens": 3}, 400, "invalid_request", "max_tokens"),
        ("/tokenize", {"messages": HELLO, "chat_template": "x"}, 400, "invalid_request", "chat_template"),
        ("/tokenize", {"messages": HELLO, "return_token_strs": 1}, 400, "invalid_request", "return_token_strs"),
        ("/tokenize", {"prompt": "a" * 100_000}, 400, "context_length_exceeded", "prompt"),
        ("/detokenize", {"tokens": [7, 100]}, 400, "invalid_request", "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, 400, "invalid_request", "tokens[0]"),
        ("/detokenize", {"tokens": "a"}, 400, "invalid_request", "tokens"),
    ],
)
def test_wrong_question_is_refused_by_field(
    worker: None, ask: Callable[..., Any], path: str, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(path, **body)
    found = (caught.value.param or "").removeprefix("['").removesuffix("']")
    assert (caught.value.status_code, caught.value.code, found) == (status, code, param)


def test_paths_of_vllm_want_a_key_too(worker: None, api: Api) -> None:
    with anonymous(api.url) as stranger:
        for method, path in (("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/tokenizer_info")):
            assert error_of(stranger.request(method, path), 401)["code"] == "invalid_api_key", path
    with api.client_of("default", Role.READ_WRITE) as client:
        assert client.post("/tokenize", json={"prompt": "12"}).json()["tokens"] == [1, 7, 8]
        assert client.post("/detokenize", json={"tokens": [7]}).json() == {"prompt": "1"}
        info = client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["chat_template"]) == ("<s>", "</s>", TEMPLATE)
    assert info["model_max_length"] == 128


class TestAbsence:
    @pytest.fixture
    def api(self, api_settings: Settings, services: Services) -> Iterator[Api]:
        """On a Redis of its own, where no worker listens."""
        settings = api_settings.model_copy(update={"redis_url": services.redis_database()})
        with running_api(settings) as running:
            yield running

    @pytest.fixture
    def ask(self, api: Api) -> Iterator[Callable[..., Any]]:
        with asking(api) as post:
            yield post

    def test_without_a_worker_the_answer_is_503_at_once(
        self, api: Api, api_rows: Rows, ask: Callable[..., Any]
    ) -> None:
        api_rows.execute("DELETE FROM requests")
        api_rows.execute("DELETE FROM workers")
        with pytest.raises(openai.InternalServerError) as caught:
            ask("/tokenize", model="demo", prompt="a")
        assert caught.value.status_code == 503
        with pytest.raises(openai.BadRequestError) as unnamed:
            ask("/tokenize", prompt="a")
        assert unnamed.value.param == "model"

    def test_question_that_no_worker_takes_is_withdrawn(
        self, api: Api, api_rows: Rows, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenizer_calls, "WAIT", 0.5)
        api_rows.worker()  # its row lives, and no thread does
        with pytest.raises(openai.InternalServerError, match=r"within 0\.5 s"):
            ask("/tokenize", model="demo", prompt="a")
        assert api.settings.redis_url is not None
        with redis.Redis.from_url(api.settings.redis_url) as client:
            assert client.llen(tokenizer_queue("demo")) == 0

    def test_questions_that_wait_are_bounded(
        self,
        api: Api,
        api_rows: Rows,
        tokenizer: Tokenizer,
        ask: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(tokenizer_calls, "MOST_WAITING", 1)
        monkeypatch.setattr(tokenizer_calls, "WAIT", PATIENCE)
        api_rows.worker()
        assert api.settings.redis_url is not None
        with ThreadPoolExecutor(1) as pool, redis.Redis.from_url(api.settings.redis_url) as client:
            first = pool.submit(ask, "/tokenize", prompt="1")
            await_condition(lambda: client.llen(tokenizer_queue("demo")) == 1, "the first question")
            with pytest.raises(openai.InternalServerError, match="Too many texts"):
                ask("/tokenize", model="demo", prompt="2")
            with contextlib.closing(TokenizerServer(api.settings, tokenizer=lambda model: tokenizer)) as server:
                server.start([MODEL])
                assert first.result(PATIENCE)["tokens"] == [1, 7]
