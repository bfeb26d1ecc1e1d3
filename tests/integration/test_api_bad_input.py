"""Bad input over HTTP: a 4xx in the one shape, that names the field and the line, at once, with nothing half stored."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Iterator
from contextlib import closing

import httpx
import pytest

from jobs.ids import new_id
from jobs.settings import Settings
from tests.support.api_server import NDJSON, Api, anonymous, error_of, running_api
from tests.support.rows import Rows

LONGEST_LINE = 10_000
LONGEST_BODY = 200_000
MOST_LINES = 50


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    changes = {
        "stage_chunk_lines": 10,
        "max_priority": 50,
        "max_body_bytes": LONGEST_BODY,
        "max_inline_bytes": LONGEST_BODY,
        "max_line_bytes": LONGEST_LINE,
        "max_lines": MOST_LINES,
    }
    with running_api(api_settings.model_copy(update=changes)) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(api_rows: Rows) -> Iterator[None]:
    """No test here makes a job: none may be visible, and none that is not marked for collection."""
    yield
    assert api_rows.query("SELECT id FROM jobs WHERE deleted_at IS NULL") == []
    api_rows.clear_jobs()


def inline(api: Api, document: object) -> httpx.Response:
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    return api.client.post("/v1/jobs", content=content, headers={"content-type": "application/json"})


DEEP = b"[" * 100_000 + b"]" * 100_000

NOT_JSON = [
    pytest.param(b"", id="empty"),
    pytest.param(b"{", id="cut"),
    pytest.param(b'{"prompt":"a"}}', id="too much"),
    pytest.param(b'{"prompt":"a","temperature":NaN}', id="NaN"),
    pytest.param(b'{"prompt":"a","temperature":-Infinity}', id="infinity"),
    pytest.param(b'{"prompt":"a","temperature":1e400}', id="1e400"),
    pytest.param(b'{"prompt":"a","seed":' + b"9" * 5000 + b"}", id="5000 digits"),
    pytest.param(b'{"prompt":"\\ud800"}', id="lone surrogate"),
    pytest.param(b'{"\\udfff":"a"}', id="lone surrogate in a name"),
    pytest.param(b'{"prompt":"\xed\xa0\x80"}', id="encoded surrogate"),
    pytest.param(b'{"prompt":"\xff"}', id="invalid UTF-8"),
    pytest.param(b'{"prompt":"\x00"}', id="raw NUL"),
    pytest.param(b'{"prompt":"a","prompt":"b"}', id="duplicate key"),
    pytest.param(b"'a'", id="single quotes"),
]

BAD_LINES = [
    pytest.param({}, None, id="neither"),
    pytest.param({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, None, id="both"),
    pytest.param({"prompt": ""}, "prompt", id="no text"),
    pytest.param({"prompt": []}, "prompt", id="no tokens"),
    pytest.param({"prompt": [1, -1]}, "prompt[1]", id="negative token"),
    pytest.param({"prompt": [100]}, "prompt", id="token outside of the vocabulary"),
    pytest.param({"prompt": [1] * 125, "max_tokens": 4}, "max_tokens", id="tokens beyond the context"),
    pytest.param({"prompt": 5}, "prompt", id="number"),
    pytest.param({"messages": []}, "messages", id="no messages"),
    pytest.param({"messages": [{"role": "user"}]}, "messages[0]", id="no content"),
    pytest.param({"prompt": "a", "custom_id": ""}, "custom_id", id="empty id"),
    pytest.param({"prompt": "a", "custom_id": "a\0b"}, "custom_id", id="NUL in an id"),
    pytest.param({"prompt": "a", "custom_id": "x" * 513}, "custom_id", id="long id"),
    pytest.param({"prompt": "a", "custom_id": 5}, "custom_id", id="number as id"),
    pytest.param({"prompt": "a", "max_tokens": 0}, "max_tokens", id="max_tokens 0"),
    pytest.param({"prompt": "a", "max_tokens": -5}, "max_tokens", id="max_tokens negative"),
    pytest.param({"prompt": "a", "max_tokens": 10**9}, "max_tokens", id="max_tokens absurd"),
    pytest.param({"prompt": "a", "max_tokens": 128}, "max_tokens", id="max_tokens beyond the context"),
    pytest.param({"prompt": "a", "max_tokens": "5"}, "max_tokens", id="max_tokens text"),
    pytest.param({"prompt": "a", "max_tokens": 5.0}, "max_tokens", id="max_tokens fraction"),
    pytest.param({"prompt": "a", "max_tokens": True}, "max_tokens", id="max_tokens true"),
    pytest.param({"prompt": "a", "min_tokens": 9, "max_tokens": 8}, None, id="min above max"),
    pytest.param({"prompt": "a", "temperature": -0.1}, "temperature", id="temperature negative"),
    pytest.param({"prompt": "a", "temperature": 1e300}, "temperature", id="temperature absurd"),
    pytest.param({"prompt": "a", "top_p": 0}, "top_p", id="top_p 0"),
    pytest.param({"prompt": "a", "top_p": 1.1}, "top_p", id="top_p above 1"),
    pytest.param({"prompt": "a", "top_k": -1}, "top_k", id="top_k negative"),
    pytest.param({"prompt": "a", "seed": -(2**63) - 1}, "seed", id="seed too small"),
    pytest.param({"prompt": "a", "seed": 2**63}, "seed", id="seed too large"),
    pytest.param({"prompt": "a", "stop": ["x"] * 17}, "stop", id="many stops"),
    pytest.param({"prompt": "a", "stop": [""]}, "stop[0]", id="empty stop"),
    pytest.param({"prompt": "a", "logprobs": 21}, "logprobs", id="many logprobs"),
    pytest.param({"prompt": "a", "temprature": 0}, "temprature", id="misspelt"),
    pytest.param({"prompt": "a", "no field": 0}, "['no field']", id="odd name"),
    pytest.param(5, None, id="no object"),
    pytest.param([1], None, id="a list"),
]

BAD_OPTIONS = [
    pytest.param({"prompts": ["a"]}, "model", id="no model"),
    pytest.param({"model": "demo"}, "prompts", id="no prompts"),
    pytest.param({"model": "demo", "prompts": []}, "prompts", id="empty batch"),
    pytest.param({"model": "demo", "prompts": "a"}, "prompts", id="prompts no list"),
    pytest.param({"model": "de\0mo", "prompts": ["a"]}, "model", id="NUL in the model"),
    pytest.param({"model": "demo", "prompts": ["a"], "params": {"top_p": 2}}, "params.top_p", id="absurd default"),
    pytest.param({"model": "demo", "prompts": ["a"], "params": None}, "params", id="params null"),
    pytest.param({"model": "demo", "prompts": ["a"], "priority": 101}, "priority", id="priority"),
    pytest.param({"model": "demo", "prompts": ["a"], "priority": 51}, "priority", id="priority above the ceiling"),
    pytest.param({"model": "demo", "prompts": ["a"], "metadata": {"a": 1}}, "metadata.a", id="metadata number"),
    pytest.param(
        {"model": "demo", "prompts": ["a"], "metadata": {str(n): "" for n in range(17)}}, "metadata", id="metadata many"
    ),
    pytest.param({"model": "demo", "prompts": ["a"], "metadata": {"a": "\0"}}, "metadata.a", id="NUL in metadata"),
    pytest.param({"model": "demo", "prompts": ["a"], "webhook": {"url": "ftp://a"}}, "webhook.url", id="ftp"),
    pytest.param({"model": "demo", "prompts": ["a"], "webhook": {"url": "http://"}}, "webhook.url", id="no host"),
    pytest.param(
        {"model": "demo", "prompts": ["a"], "webhook": {"url": "http://[::1"}}, "webhook.url", id="half a host"
    ),
    pytest.param({"model": "demo", "prompts": ["a"], "completion_window": "0h"}, "completion_window", id="window 0"),
    pytest.param({"model": "demo", "prompts": ["a"], "completion_window": "-1h"}, "completion_window", id="window < 0"),
    pytest.param({"model": "demo", "prompts": ["a"], "modle": "x"}, "modle", id="misspelt"),
    pytest.param(["a"], None, id="a list"),
]

BAD_QUERIES = [
    pytest.param(b"", "model", id="no model"),
    pytest.param(b"model=demo&model=demo", "model", id="model twice"),
    pytest.param(b"model=demo&max_tokens=x", "max_tokens", id="text as number"),
    pytest.param(b"model=demo&max_tokens=-1", "max_tokens", id="negative"),
    pytest.param(b"model=demo&temperature=NaN", "temperature", id="NaN"),
    pytest.param(b"model=demo&temperature=1e400", "temperature", id="1e400"),
    pytest.param(b"model=demo&metadata=%7B%22a%22:1%7D", "metadata.a", id="metadata"),
    pytest.param(b"model=demo&webhook_url=x", "webhook_url", id="webhook"),
    pytest.param(b"model=demo&webhook_events=job.completed", "webhook_url", id="events without url"),
    pytest.param(b"model=demo&temprature=0", "temprature", id="misspelt"),
    pytest.param(b"model=demo&prompts=a", "prompts", id="prompts"),
    pytest.param(b"model=%ff", None, id="invalid UTF-8"),
    pytest.param(b"model=de%00mo", "model", id="NUL"),
    pytest.param(b"&".join(b"stop=%d" % number for number in range(101)), None, id="many fields"),
]


class TestLines:
    @pytest.mark.parametrize("raw", NOT_JSON[1:])
    def test_line_is_refused_when_it_is_not_json(self, api: Api, raw: bytes) -> None:
        # Twelve good lines first: the first group is stored by then.
        error = error_of(api.upload(b'"good"\n' * 12 + b"\n" + raw + b'\n"good"\n'), 400)
        assert (error["code"], error["line"]) == ("invalid_json", 14)
        assert str(error["message"]).startswith("Line 14: ")

    @pytest.mark.parametrize(("line", "param"), BAD_LINES)
    def test_line_is_refused_by_its_field_when_it_is_no_request(
        self, api: Api, line: object, param: str | None
    ) -> None:
        error = error_of(api.upload(b'"good"\n\n' + json.dumps(line).encode()), 400)
        assert (error["code"], error["param"], error["line"]) == ("invalid_request", param, 3)

    @pytest.mark.parametrize(("line", "param"), BAD_LINES)
    def test_inline_prompt_is_refused_by_its_field_when_it_is_no_request(
        self, api: Api, line: object, param: str | None
    ) -> None:
        error = error_of(inline(api, {"model": "demo", "prompts": ["good", line]}), 400)
        assert error["code"] == "invalid_request"
        assert error["param"] == ("prompts[1]" if param is None else f"prompts[1].{param}")

    @pytest.mark.parametrize("between", [1, 30], ids=["in one group", "across groups"])
    def test_custom_id_is_refused_when_it_stands_twice(self, api: Api, between: int) -> None:
        twice = b'{"custom_id":"twice","prompt":"a"}\n'
        error = error_of(api.upload(twice + b'"a"\n' * between + twice), 400)
        assert (error["code"], error["param"], error["line"]) == ("duplicate_custom_id", "custom_id", between + 2)
        assert "'twice'" in str(error["message"])

    def test_token_limits_are_merged_before_they_are_compared(self, api: Api) -> None:
        error = error_of(api.upload(b'{"prompt":"a","min_tokens":6}', max_tokens=5), 400)
        assert error["line"] == 1
        assert "min_tokens (6) is above max_tokens (5)" in str(error["message"])

    @pytest.mark.parametrize("body", [b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
    def test_upload_is_refused_when_it_has_no_lines(self, api: Api, body: bytes) -> None:
        assert error_of(api.upload(body), 400)["code"] == "invalid_request"

    def test_error_answer_does_not_wait_for_the_rest_of_the_body(self, api: Api) -> None:
        def endless() -> Iterator[bytes]:
            yield b"{\n" + b'"good"\n' * 20
            while True:
                time.sleep(0.01)  # or a fast sender reaches the size limit before the first line is looked at
                yield b'"good"\n'

        assert error_of(api.upload(endless()), 400)["line"] == 1


class TestJobOptions:
    @pytest.mark.parametrize("raw", NOT_JSON)
    def test_document_is_refused_when_it_is_not_json(self, api: Api, raw: bytes) -> None:
        assert error_of(inline(api, raw), 400)["code"] == "invalid_json"

    @pytest.mark.parametrize(("document", "param"), BAD_OPTIONS)
    def test_document_is_refused_by_its_field_when_it_is_no_job(
        self, api: Api, document: object, param: str | None
    ) -> None:
        error = error_of(inline(api, document), 400)
        assert (error["code"], error["param"]) == ("invalid_request", param)

    @pytest.mark.parametrize(("query", "param"), BAD_QUERIES)
    def test_upload_query_is_refused_by_its_field(self, api: Api, query: bytes, param: str | None) -> None:
        error = error_of(
            api.client.post(httpx.URL(f"{api.url}/v1/jobs", query=query), content=b'"a"', headers=NDJSON), 400
        )
        assert (error["code"], error["param"]) == ("invalid_request", param)

    def test_unknown_model_is_not_found(self, api: Api) -> None:
        for response in (
            inline(api, {"model": "unknown", "prompts": ["a"]}),
            api.upload(b'"a"', model="unknown"),
        ):
            error = error_of(response, 404)
            assert (error["code"], error["param"]) == ("model_not_found", "model")

    def test_inline_job_is_refused_when_it_has_a_query(self, api: Api) -> None:
        response = api.client.post("/v1/jobs", params={"priority": 1}, json={"model": "demo", "prompts": ["a"]})
        assert error_of(response, 400)["code"] == "invalid_request"

    @pytest.mark.parametrize("media_type", ["", "text/plain", "application/jsonl", "multipart/form-data"])
    def test_unknown_media_type_is_refused(self, api: Api, media_type: str) -> None:
        response = api.client.post("/v1/jobs", content=b'"a"', headers={"content-type": media_type})
        assert error_of(response, 415)["code"] == "unsupported_media_type"

    @pytest.mark.parametrize("key", ["", "x" * 256, "caf\xe9"])
    def test_idempotency_key_is_refused_when_malformed(self, api: Api, key: str) -> None:
        response = api.upload(b'"a"', {"idempotency-key": key.encode("latin-1")})  # type: ignore[dict-item]
        assert error_of(response, 400)["param"] == "idempotency-key"


class TestLimits:
    def test_body_is_refused_before_it_is_sent_when_its_length_is_over_the_limit(self, api: Api) -> None:
        with api.connect() as connection:
            head = (
                f"POST /v1/jobs?model=demo HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n"
                f"authorization: {api.client.headers['authorization']}\r\ncontent-length: {LONGEST_BODY + 1}\r\n\r\n"
            )
            connection.sendall(head.encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")

    def test_body_is_cut_at_the_limit_when_it_has_no_length(self, api: Api) -> None:
        # Lines so short that only the whole is too long, blank ones and all.
        piece = (b" " * 5_000 + b"\n") * 2
        error = error_of(api.upload(iter([piece] * 100)), 413)
        assert error["code"] == "request_too_large"
        assert error_of(inline(api, b" " * (LONGEST_BODY + 1)), 413)["code"] == "request_too_large"

    def test_line_is_refused_when_it_is_too_long(self, api: Api) -> None:
        def line(length: int) -> bytes:
            return b'"' + b"x" * (length - 2) + b'"'

        error = error_of(api.upload(b'"a"\n' + line(LONGEST_LINE + 1) + b"\n"), 413)
        assert (error["code"], error["line"]) == ("request_too_large", 2)
        unended = iter([b'"a"\n"', *[b"x" * 1000] * 100])
        assert error_of(api.upload(unended), 413)["line"] == 2

    def test_job_is_refused_when_it_has_too_many_lines(self, api: Api) -> None:
        assert error_of(api.upload(b'"a"\n' * (MOST_LINES + 1)), 413)["line"] == MOST_LINES + 1
        assert error_of(api.upload(b"\n" * 1000), 413)["code"] == "request_too_large"
        document = {"model": "demo", "prompts": ["a"] * (MOST_LINES + 1)}
        assert error_of(inline(api, document), 413)["param"] == "prompts"

    @pytest.mark.parametrize("filling", [b"\n", b" ", b"\0", b'"a"\n'], ids=["lines", "blanks", "NULs", "prompts"])
    def test_gzip_bomb_is_cut_at_the_limit(self, api: Api, filling: bytes) -> None:
        bomb = bomb_of(filling)
        error = error_of(api.upload(bomb, {"content-encoding": "gzip"}), 413)
        assert error["code"] == "request_too_large"

    @pytest.mark.parametrize(
        "packed",
        [b"not gzip", gzip.compress(b'"a"\n')[:-6], gzip.compress(b'"a"\n') + b"rubbish"],
        ids=["not gzip", "cut", "more"],
    )
    def test_broken_gzip_is_refused(self, api: Api, packed: bytes) -> None:
        assert "gzip" in str(error_of(api.upload(packed, {"content-encoding": "gzip"}), 400)["message"])

    def test_unknown_content_encoding_is_refused(self, api: Api) -> None:
        response = api.upload(b'"a"', {"content-encoding": "br"})
        assert error_of(response, 415)["code"] == "unsupported_media_type"

    @pytest.mark.parametrize("raw", [DEEP, b'{"prompt":' * 30_000, NOT_JSON[6].values[0]])
    def test_hostile_json_is_refused_quickly(self, api: Api, raw: bytes) -> None:
        began = time.process_time()
        assert error_of(inline(api, raw), (400 if len(raw) <= LONGEST_BODY else 413)) is not None
        assert time.process_time() - began < 5


class TestCallers:
    ROUTES = (
        ("GET", "/v1/jobs/{}"),
        ("GET", "/v1/jobs/{}?wait=1"),
        ("GET", "/v1/jobs/{}/results"),
        ("GET", "/v1/jobs/{}/results?after=5&limit=1"),
        ("GET", "/v1/jobs/{}/lines/1"),
        ("GET", "/v1/jobs/{}/events"),
        ("POST", "/v1/jobs/{}/lines"),
        ("POST", "/v1/jobs/{}/finalize"),
        ("POST", "/v1/jobs/{}/retry"),
        ("POST", "/v1/jobs/{}/pause"),
        ("POST", "/v1/jobs/{}/resume"),
        ("POST", "/v1/jobs/{}/cancel"),
        ("PATCH", "/v1/jobs/{}"),
        ("DELETE", "/v1/jobs/{}"),
    )

    def test_routes_below_are_all_routes_of_a_job(self, api: Api) -> None:
        paths = api.client.get("/openapi.json").json()["paths"]
        known = {(method.upper(), path) for path in paths for method in paths[path] if "{job_id}" in path}
        tried = {(method, path.partition("?")[0].replace("{}", "{job_id}")) for method, path in self.ROUTES}
        assert known == {(method, path.replace("/lines/1", "/lines/{line}")) for method, path in tried}

    @pytest.mark.parametrize(("method", "path"), ROUTES)
    def test_foreign_job_is_not_found(self, api: Api, api_rows: Rows, method: str, path: str) -> None:
        theirs = api_rows.job(tenant="another tenant")
        api_rows.finish(theirs)
        unknown = [
            f"job_{new_id().hex}",
            "job_",
            "x",
            "job_" + "g" * 32,
            "%00",
            "job_" + "0" * 31 + "%ed%a0%80",
            "x" * 5000,
        ]
        for job_id in (f"job_{theirs.hex}", *unknown):
            error = error_of(api.client.request(method, path.format(job_id)), 404)
            assert error["code"] == "job_not_found"
        assert api_rows.job_row(theirs).deleted_at is None
        with closing(api.client_of("another tenant")) as owner:
            # A job at its end has nothing to retry, pause or change.
            assert owner.request(method, path.format(f"job_{theirs.hex}")).status_code in (200, 202, 400, 409, 415)
        api_rows.clear_jobs()

    def test_unpublished_job_is_not_found(self, api: Api, api_rows: Rows) -> None:
        job_id = api_rows.job(published=False)
        for method, path in self.ROUTES:
            assert error_of(api.client.request(method, path.format(f"job_{job_id.hex}")), 404)
        assert api.client.get("/v1/jobs").json()["data"] == []
        api_rows.clear_jobs()

    @pytest.mark.parametrize(
        "authorization",
        [None, "", "Bearer", "Bearer pm_wrong", "Basic cG06cG0=", "Bearer " + "x" * 5000, "Bearer \xe9"],
        ids=repr,
    )
    def test_every_route_refuses_a_missing_or_wrong_key(self, api: Api, authorization: str | None) -> None:
        paths = api.client.get("/openapi.json").json()["paths"]
        headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
        with closing(anonymous(api.url)) as client:
            for path, methods in paths.items():
                for method in methods:
                    if path.startswith("/v1/"):
                        response = client.request(method, path, headers=headers)
                        assert error_of(response, 401)["code"] == "invalid_api_key"
                        assert response.headers["www-authenticate"] == "Bearer"

    def test_key_is_refused_when_revoked_or_expired(self, api: Api, api_rows: Rows) -> None:
        for column, value in (("revoked_at", "now()"), ("expires_at", "now() - interval '1 second'")):
            with closing(api.client_of("leaver")) as client:
                assert client.get("/v1/models").status_code == 200
                api_rows.execute(
                    f"UPDATE api_keys SET {column} = {value} FROM tenants t "
                    "WHERE t.id = tenant_id AND t.name = 'leaver'"
                )
                assert error_of(client.get("/v1/models"), 401)["code"] == "invalid_api_key"

    @pytest.mark.parametrize(
        ("path", "param"),
        [
            ("/v1/jobs?limit=0", "limit"),
            ("/v1/jobs?limit=101", "limit"),
            ("/v1/jobs?limit=x", "limit"),
            ("/v1/jobs?after=x", "after"),
            ("/v1/jobs?status=done", "status.0"),
            ("/v1/jobs?lmit=1", "lmit"),
            ("/v1/jobs/job_x?wait=-1", "wait"),
            ("/v1/jobs/job_x?wait=nan", "wait"),
            ("/v1/jobs/job_x?wait=inf", "wait"),
            ("/v1/jobs/job_x/results?after=-1", "after"),
            ("/v1/jobs/job_x/results?after=2147483648", "after"),
            ("/v1/jobs/job_x/results?limit=0", "limit"),
        ],
    )
    def test_query_is_refused_by_its_parameter(self, api: Api, path: str, param: str) -> None:
        assert error_of(api.client.get(path), 400)["param"] == param

    def test_unknown_address_and_method_are_refused(self, api: Api) -> None:
        for path in ("/v1", "/v1/job", "/v1/jobs/", "/v1/jobs/a/b/c", "/%00", "//v1/jobs"):
            assert error_of(api.client.get(path), 404)["code"] == "not_found"
        response = api.client.put("/v1/jobs")
        assert error_of(response, 405)["code"] == "method_not_allowed"
        assert response.headers["allow"] == "GET, POST"


def bomb_of(filling: bytes) -> bytes:
    """A small body that unpacks to 40 MB."""
    pack = zlib.compressobj(9, wbits=31)
    slab = filling * (2_000_000 // len(filling))
    return b"".join([pack.compress(slab) for _ in range(20)]) + pack.flush()
