"""Submission against the real Postgres: duplicates, reservations, and the longest texts that are allowed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from jobs.errors import DuplicateCustomId
from jobs.ids import new_id
from jobs.queries import submission
from jobs.requests import MAX_CUSTOM_ID, MAX_MODEL_NAME, MAX_URL_BYTES, JobOptions, StagedLine, Webhook
from tests.support.processes import await_condition
from tests.support.rows import Rows


def line(number: int, custom_id: str) -> StagedLine:
    return StagedLine(number, custom_id, 0, b"{}")


@pytest.mark.parametrize("earlier", ["in the group", "stored"])
def test_duplicate_is_refused_before_anything_of_its_group_is_stored(rows: Rows, earlier: str) -> None:
    job_id = rows.job(3, published=False)
    first, blamed = ("new", 6) if earlier == "in the group" else ("request-2", 4)
    group = [line(4, first), line(5, "other"), line(6, first)]
    with rows.database.begin() as connection:
        with pytest.raises(DuplicateCustomId) as refused:
            submission.stage_lines(connection, job_id, group)
        assert submission.publish(connection, job_id)  # no statement failed: the transaction lives
    assert (refused.value.line, refused.value.param) == (blamed, "custom_id")
    assert rows.job_row(job_id).total == 3
    assert len(rows.states(job_id)) == 3


def test_duplicates_custom_id_is_not_in_the_servers_log(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> None:
    logs = [*tmp_path_factory.getbasetemp().glob("services*/data/logs/postgres.log")]
    if not logs:
        pytest.skip("the server's log is not ours to read")
    job_id = rows.job(1, published=False)
    canary, marker = f"canary-{new_id().hex}", f"marker-{new_id().hex}"
    with pytest.raises(DuplicateCustomId), rows.database.begin() as connection:
        submission.stage_lines(connection, job_id, [line(2, canary), line(3, canary)])
    rows.execute(f"DO $$ BEGIN RAISE LOG '{marker}'; END $$")
    await_condition(lambda: any(marker in _read(path) for path in logs), "the marker in the log")
    assert not any(canary in _read(path) for path in logs)


def test_longest_texts_are_stored(rows: Rows) -> None:
    # Of characters of four bytes in an order that does not compress: what is indexed must fit as it is.
    characters = random.Random(0).choices([chr(number) for number in range(0x20000, 0x2A000)], k=2048)
    model, custom_id = "".join(characters[:MAX_MODEL_NAME]), "".join(characters[:MAX_CUSTOM_ID])
    url = "https://receiver.example/" + "".join(characters[: (MAX_URL_BYTES - 25) // 4])
    rows.execute("INSERT INTO models (name, max_model_len, vocab_size) VALUES (:name, 1, 1)", name=model)
    options = JobOptions(
        model=model,
        webhook=Webhook(url=url),
        metadata={"".join(characters[n : n + 64]): "".join(characters[n : n + 512]) for n in range(16)},
    )
    tenant_id = rows.tenant().id
    with rows.database.begin() as connection:
        job_id = submission.open_job(connection, tenant_id, options)
        assert submission.stage_lines(connection, job_id, [line(1, custom_id)])
        assert submission.reserve(connection, tenant_id, "k" * 255, job_id).is_ours
        assert submission.publish(connection, job_id, body_sha256=bytes(32))
    assert rows.job_row(job_id).model == model
    assert rows.query("SELECT url FROM webhook_endpoints")[0].url == url


def test_reservation_is_found_by_its_own_tenant_only(rows: Rows) -> None:
    job_id = rows.job(1, tenant="owner", published=False)
    owner, stranger = rows.tenant("owner").id, rows.tenant("stranger").id
    with rows.database.begin() as connection:
        assert submission.reserve(connection, owner, "key", job_id).is_ours
        assert submission.find_reservation(connection, stranger, "key") is None
        found = submission.find_reservation(connection, owner, "key")
    assert found is not None
    assert found.job_id == job_id
    # The stranger's own reservation under the same key is another.
    other = rows.job(1, tenant="stranger", published=False)
    with rows.database.begin() as connection:
        assert submission.reserve(connection, stranger, "key", other).is_ours
        kept = submission.find_reservation(connection, owner, "key")
    assert kept is not None
    assert kept.job_id == job_id


def _read(path: Path) -> str:
    return path.read_text(errors="replace")
