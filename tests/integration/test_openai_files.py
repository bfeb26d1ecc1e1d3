"""Files and uploads as OpenAI's own client uses them, and what no client would send."""

from __future__ import annotations

import gzip
import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from sqlalchemy import text

from jobs.database import connect
from jobs.settings import Settings
from tests.support.api_server import Api, error_of, running_api
from worker.courier.file_collection import FileCollection

MAX_FILE_BYTES = 3 * 1024 * 1024
QUOTA = 8 * 1024 * 1024
FORM = {"content-type": "multipart/form-data; boundary=x"}


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    changes = {"max_file_bytes": MAX_FILE_BYTES, "max_part_bytes": 1024 * 1024, "max_tenant_file_bytes": QUOTA}
    with running_api(api_settings.model_copy(update=changes)) as running:
        yield running


@pytest.fixture(scope="module")
def client(api: Api) -> Iterator[openai.OpenAI]:
    with official_client(api) as made:
        yield made


def official_client(api: Api, tenant: str = "default") -> openai.OpenAI:
    key = api.client_of(tenant).headers["authorization"].removeprefix("Bearer ")
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0)


def contents(api: Api) -> set[str]:
    """What lies in the store."""
    return {path.name for path in (api.settings.data_dir / "files").rglob("*") if path.is_file()}


def collect(api: Api) -> None:
    database = connect(api.settings, "pagemill tests")
    FileCollection(database, api.settings).sweep(threading.Event())
    database.dispose()


def form(*parts: bytes) -> bytes:
    return b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--\r\n"


FIELD = b'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch'
FILE = b'Content-Disposition: form-data; name="file"; filename="a%22b\xc3\xbc.jsonl"\r\n\r\n{"x":1}\n'


class TestFiles:
    def test_file_lives_from_create_to_delete(self, client: openai.OpenAI, tmp_path: Path) -> None:
        path = tmp_path / "in put.jsonl"
        path.write_bytes(b'{"custom_id": "a"}\n' * 100_000)
        with path.open("rb") as source:
            made = client.files.create(file=source, purpose="batch")
        assert (made.object, made.status, made.bytes, made.filename) == ("file", "processed", 1_900_000, "in put.jsonl")
        assert client.files.retrieve(made.id) == made
        assert client.files.wait_for_processing(made.id) == made
        assert client.files.content(made.id).read() == path.read_bytes()
        with client.files.with_streaming_response.content(made.id) as answer:
            assert sum(1 for _ in answer.iter_lines()) == 100_000
        assert client.files.delete(made.id).deleted
        for gone in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                gone(made.id)
        assert made.id not in {file.id for file in client.files.list()}

    def test_list_is_paged_filtered_and_ordered(self, api: Api) -> None:
        with official_client(api, "lists") as client:
            made = [client.files.create(file=b"x", purpose=p) for p in ("batch", "evals", "batch", "user_data")]
            ids = [file.id for file in made]
            assert [file.id for file in client.files.list(limit=1)] == ids[::-1]
            assert [file.id for file in client.files.list(order="asc", limit=3)] == ids
            assert [file.id for file in client.files.list(purpose="batch")] == [ids[2], ids[0]]
            assert client.files.list(after=ids[0]).data == []

    def test_file_content_is_removed_at_its_expiry(self, api: Api, client: openai.OpenAI) -> None:
        made = client.files.create(
            file=b"short-lived", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert made.expires_at == made.created_at + 3600
        name = made.id.removeprefix("file-")
        assert name in contents(api)
        database = connect(api.settings, "pagemill tests")
        with database.begin() as connection:
            connection.execute(text("UPDATE files SET expires_at = now() WHERE id = :id"), {"id": name})
        database.dispose()
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(made.id)
        collect(api)
        assert name not in contents(api)

    @pytest.mark.parametrize("parts", [(FIELD, FILE), (FILE, FIELD)], ids=["field-first", "file-first"])
    def test_form_is_read_in_any_order_chunked_and_in_crumbs(self, api: Api, parts: tuple[bytes, ...]) -> None:
        body = form(*parts)
        response = api.client.post("/v1/files", content=(body[i : i + 7] for i in range(0, len(body), 7)), headers=FORM)
        assert response.status_code == 200, response.text
        assert response.json()["filename"] == 'a"bü.jsonl'
        assert api.client.get(f"/v1/files/{response.json()['id']}/content").content == b'{"x":1}\n'

    def test_content_comes_in_ranges_and_in_gzip(self, api: Api, client: openai.OpenAI) -> None:
        data = bytes(range(256)) * 4096
        file = client.files.create(file=data, purpose="user_data")

        def read(**headers: str) -> httpx.Response:
            return api.client.get(f"/v1/files/{file.id}/content", headers={"accept-encoding": "identity"} | headers)

        assert read().content == data
        assert read().headers["content-length"] == str(len(data))
        for asked, start, end in (("0-9", 0, 10), ("1000-", 1000, len(data)), ("-5", len(data) - 5, len(data))):
            answer = read(range=f"bytes={asked}")
            assert (answer.status_code, answer.content) == (206, data[start:end])
            assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(data)}"
        assert read(range=f"bytes={len(data)}-").status_code == 416
        with api.client.stream("GET", f"/v1/files/{file.id}/content", headers={"accept-encoding": "gzip"}) as packed:
            assert packed.headers["content-encoding"] == "gzip"
            assert gzip.decompress(b"".join(packed.iter_raw())) == data

    def test_empty_file_is_stored(self, client: openai.OpenAI) -> None:
        file = client.files.create(file=("empty.jsonl", b""), purpose="batch")
        assert (file.bytes, client.files.content(file.id).read()) == (0, b"")


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("body", "param"),
        [
            (form(FIELD), "file"),
            (form(FILE), "purpose"),
            (form(FIELD.replace(b"batch", b"nonsense"), FILE), "purpose"),
            (form(FIELD.replace(b"batch", b"batch_output"), FILE), "purpose"),
            (form(FIELD, FILE, FILE), "file"),
            (form(FIELD, FILE)[:-9], None),
            (b"no form at all", None),
            (form(FIELD, FILE, b'Content-Disposition: form-data; name="expires_after[seconds]"\r\n\r\n5'),
             "expires_after.seconds"),
        ],
        ids=["no-file", "no-purpose", "unknown-purpose", "our-purpose", "two-files", "cut", "no-form", "short-life"],
    )  # fmt: skip
    def test_wrong_form_is_a_400_that_stores_nothing(self, api: Api, body: bytes, param: str | None) -> None:
        before, listed = contents(api), api.client.get("/v1/files").json()
        assert error_of(api.client.post("/v1/files", content=body, headers=FORM), 400)["param"] == param
        collect(api)
        assert contents(api) <= before
        assert api.client.get("/v1/files").json() == listed

    @pytest.mark.parametrize("part", [FIELD, b"a: b\r\n\r\n"], ids=["equal names", "no names"])
    def test_form_of_many_parts_is_refused_at_the_first_too_many(self, api: Api, part: bytes) -> None:
        before = contents(api)
        began = time.process_time()  # of the API, too, which runs in this process
        error = error_of(api.client.post("/v1/files", content=form(*[part] * 50_000), headers=FORM), 413)
        assert "More than 64 parts" in str(error["message"])
        assert time.process_time() - began < 0.5  # all of them take one or two seconds
        assert contents(api) == before

    def test_other_media_type_is_a_415(self, api: Api) -> None:
        error_of(api.client.post("/v1/files", json={"purpose": "batch"}), 415)

    def test_file_beyond_the_limit_is_a_413(self, api: Api, client: openai.OpenAI) -> None:
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=bytes(MAX_FILE_BYTES + 1), purpose="batch")
        assert caught.value.status_code == 413

    def test_quota_holds_for_files_and_parts_together(self, api: Api) -> None:
        with official_client(api, "greedy") as client:
            kept = [client.files.create(file=bytes(2_500_000), purpose="batch") for _ in range(2)]
            upload = client.uploads.create(bytes=1_000_000, filename="a", mime_type="text/plain", purpose="batch")
            client.uploads.parts.create(upload.id, data=bytes(1_000_000))
            with pytest.raises(openai.PermissionDeniedError, match="8388608 bytes"):
                client.files.create(file=bytes(2_500_000), purpose="batch")
            client.files.delete(kept[0].id)
            client.files.create(file=bytes(2_500_000), purpose="batch")

    def test_foreign_ids_are_not_found(self, api: Api, client: openai.OpenAI) -> None:
        file = client.files.create(file=b"mine", purpose="batch")
        upload = client.uploads.create(bytes=1, filename="a", mime_type="text/plain", purpose="batch")
        with official_client(api, "stranger") as stranger:
            for attempt in (
                lambda: stranger.files.retrieve(file.id),
                lambda: stranger.files.content(file.id),
                lambda: stranger.files.delete(file.id),
                lambda: stranger.uploads.parts.create(upload.id, data=b"x"),
                lambda: stranger.uploads.complete(upload.id, part_ids=[]),
                lambda: stranger.uploads.cancel(upload.id),
            ):
                with pytest.raises(openai.NotFoundError):
                    attempt()
            assert stranger.files.list().data == []


class TestUploads:
    def test_parts_become_the_file_in_the_order_of_their_list(self, client: openai.OpenAI) -> None:
        data = bytes(range(256)) * 8000
        upload = client.uploads.create(
            bytes=len(data), filename="in.jsonl", mime_type="application/jsonl", purpose="batch"
        )
        assert (upload.status, upload.file) == ("pending", None)
        second = client.uploads.parts.create(upload.id, data=data[1_000_000:2_000_000])
        third = client.uploads.parts.create(upload.id, data=data[2_000_000:])
        first = client.uploads.parts.create(upload.id, data=data[:1_000_000])
        done = client.uploads.complete(
            upload.id, part_ids=[first.id, second.id, third.id], md5=hashlib.md5(data).hexdigest()
        )
        assert done.status == "completed"
        assert done.file is not None
        assert done.file.bytes == len(data)
        assert client.files.content(done.file.id).read() == data
        # An answer that was lost is asked for again.
        assert client.uploads.complete(upload.id, part_ids=[first.id, second.id, third.id]).file == done.file

    def test_upload_of_the_official_client_is_accepted(self, api: Api, client: openai.OpenAI, tmp_path: Path) -> None:
        path = tmp_path / "in.jsonl"
        path.write_bytes(b"0123456789" * 123_457)
        collect(api)
        before = contents(api)
        done = client.uploads.upload_file_chunked(
            file=path, mime_type="application/jsonl", purpose="batch", part_size=500_000
        )
        assert done.file is not None
        assert client.files.content(done.file.id).read() == path.read_bytes()
        collect(api)
        assert contents(api) == before | {done.file.id.removeprefix("file-")}

    def test_wrong_sums_and_parts_are_a_400_that_leaves_the_upload_pending(self, client: openai.OpenAI) -> None:
        upload = client.uploads.create(bytes=4, filename="a", mime_type="text/plain", purpose="batch")
        part = client.uploads.parts.create(upload.id, data=b"1234")
        for part_ids, md5 in (([], None), ([part.id] * 2, None), (["part_x"], None), ([part.id], "0" * 32)):
            with pytest.raises(openai.BadRequestError):
                client.uploads.complete(upload.id, part_ids=part_ids, md5=md5 or openai.omit)
        done = client.uploads.complete(upload.id, part_ids=[part.id])
        assert done.file is not None
        assert client.files.content(done.file.id).read() == b"1234"

    def test_upload_takes_no_more_parts_than_one_can_have(
        self, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("api.openai.uploads.MAX_PARTS", 3)
        upload = client.uploads.create(bytes=0, filename="a", mime_type="text/plain", purpose="batch")
        for _ in range(3):
            client.uploads.parts.create(upload.id, data=b"")
        with pytest.raises(openai.BadRequestError, match="at most 3 parts"):
            client.uploads.parts.create(upload.id, data=b"")
        assert client.uploads.cancel(upload.id).status == "cancelled"

    def test_cancelled_upload_takes_no_parts_and_loses_those_it_had(self, api: Api, client: openai.OpenAI) -> None:
        upload = client.uploads.create(bytes=4, filename="a", mime_type="text/plain", purpose="batch")
        part = client.uploads.parts.create(upload.id, data=b"1234")
        assert client.uploads.cancel(upload.id).status == "cancelled"
        with pytest.raises(openai.ConflictError):
            client.uploads.parts.create(upload.id, data=b"1234")
        with pytest.raises(openai.ConflictError):
            client.uploads.complete(upload.id, part_ids=[part.id])
        collect(api)
        assert part.id.removeprefix("part_") not in contents(api)


def test_nameless_form_without_data_is_a_400(api: Api, client: openai.OpenAI) -> None:
    upload = client.uploads.create(bytes=4, filename="a", mime_type="text/plain", purpose="batch")
    response = api.client.post(f"/v1/uploads/{upload.id}/parts", content=form(), headers=FORM)
    assert error_of(response, 400)["param"] == "data"


def test_content_of_a_process_that_was_killed_is_removed(api: Api, client: openai.OpenAI) -> None:
    file = client.files.create(file=b"whole", purpose="batch")
    rest = api.settings.data_dir / "files" / "files" / f"{file.id.removeprefix('file-')}#3"
    rest.write_bytes(b"half")
    client.files.delete(file.id)
    collect(api)
    assert not rest.exists()
