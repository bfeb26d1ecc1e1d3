"""Settings that make no sense are refused at start, in one line that holds no secret."""

from __future__ import annotations

from pathlib import Path

import pytest
from kombu.utils.url import parse_url
from pydantic import SecretStr, ValidationError
from redis import Redis
from sqlalchemy.engine import make_url

from jobs import settings as settings_module
from jobs.settings import Settings

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "understood"),
    [
        ("redis://h", "redis://h"),
        ("redis://h:1/", "redis://h:1/"),
        ("redis://:p%40ss@h:1/2", "redis://:p%40ss@h:1/2"),
        ("rediss://u:p@h:1/2?ssl_cert_reqs=none", "rediss://u:p@h:1/2?ssl_cert_reqs=none"),
        ("valkey://:p@h:1/2", "redis://:p@h:1/2"),
        ("valkeys://h", "rediss://h"),
        ("redis://h:1?db=2", "redis://h:1/2"),
        ("redis://h:1/2?db=2", "redis://h:1/2"),
        ("redis://[::1]:1/0", "redis://[::1]:1/0"),
    ],
)
def test_redis_url_is_read_alike_by_celery_and_redis(url: str, understood: str) -> None:
    read = Settings(redis_url=url).redis_url
    assert read == understood
    kombu, client = parse_url(read), Redis.from_url(read).connection_pool.connection_kwargs
    assert int(kombu["virtual_host"] or 0) == client.get("db", 0)
    assert (kombu["hostname"], kombu["password"]) == (client["host"], client.get("password"))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h:6379",
        "http://h:6379",
        "unix:///run/redis.sock",
        "redis+socket:///run/redis.sock",
        "redis:///0",
        "redis://h:port/0",
        "redis://h:0/0",
        "redis://h:70000/0",
        "redis://h/first",
        "redis://h/1?db=2",
        "redis://h/-1",
        f"redis://:{SECRET}#x@h:1/0",
        f"redis://:{SECRET}/x@h:1/0",
        f"redis://:1/{SECRET}@h:1/0",
        f"redis://:1?{SECRET}@h:1/0",
        f"redis://:[{SECRET}@h:1/0",
    ],
)
def test_redis_url_is_refused(url: str) -> None:
    assert_refused("redis_url", url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p@h:5432/name",
        "postgres://u:p%40ss@h/name",
        "postgresql+psycopg://u@/name?host=/run/postgresql",
        "postgresql:///name",
    ],
)
def test_database_url_is_kept(url: str) -> None:
    assert Settings(database_url=url).database_url == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host=h dbname=name",
        "mysql://h/name",
        "sqlite:///name",
        "postgresql+asyncpg://h/name",
        "postgresql://u:p@h:port/name",
        f"postgresql://u:{SECRET}@x@h/name",
    ],
)
def test_database_url_is_refused(url: str) -> None:
    assert_refused("database_url", url)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8100", "http://127.0.0.1:port", "http://", "ftp://h", "http://[::1"])
def test_url_of_the_api_is_refused(url: str) -> None:
    assert_refused("url", url)


@pytest.mark.parametrize("name", ["poll_interval", "lease", "gpu_memory_utilization", "redis_timeout"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_number_is_refused_when_it_is_not_finite(name: str, value: str) -> None:
    assert_refused(name, value)


@pytest.mark.parametrize("password", ["hunter2", "with / ? # @ : % in it"])
def test_database_password_completes_a_url_that_has_none(password: str) -> None:
    read = Settings(database_url="postgresql://u@h:5432/name", database_password=SecretStr(password)).database_url
    assert read is not None
    assert (make_url(read).password, make_url(read).host) == (password, "h")


def test_database_password_leaves_a_url_that_has_one() -> None:
    read = Settings(database_url="postgresql://u:p@h/name", database_password=SecretStr(SECRET)).database_url
    assert read == "postgresql://u:p@h/name"


def test_secrets_are_read_from_files_unless_a_variable_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "SECRETS_DIR", tmp_path)
    (tmp_path / "pagemill_api_key").write_text("from-a-file-of-24-chars\n")
    (tmp_path / "pagemill_key_pepper").write_text("from-a-file\n")
    monkeypatch.setenv("PAGEMILL_KEY_PEPPER", "from-a-variable")
    monkeypatch.setenv("PAGEMILL_API_KEY", "")
    read = Settings()
    assert read.api_key == SecretStr("from-a-file-of-24-chars")
    assert read.key_pepper == SecretStr("from-a-variable")


def assert_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError) as refused:
        Settings.model_validate({name: value})
    assert SECRET not in str(refused.value)
    (complaint,) = refused.value.errors(include_url=False, include_context=False, include_input=False)
    assert complaint["loc"] == (name,)
    assert "\n" not in complaint["msg"]
