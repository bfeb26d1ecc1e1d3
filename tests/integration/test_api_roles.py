"""What a key's role lets it do, held against every route that there is."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from api.session_cookie import SAFE_METHODS
from jobs.roles import Role
from jobs.settings import Settings
from tests.support.api_server import Api, anonymous, error_of, running_api

# These want no key: a page logs in and out.
WITHOUT_KEY = {("POST", "/session"), ("DELETE", "/session")}


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings) as running:
        yield running


def client_of(api: Api, role: Role, tenant: str = "default") -> httpx.Client:
    return api.client_of(tenant, role)


def addresses(api: Api) -> list[tuple[str, str]]:
    """Every method and address of the application, with a value for each part of a path."""
    app = api.server.config.app
    assert isinstance(app, FastAPI)
    # FastAPI keeps an included router as one entry.
    routes = [route for entry in app.routes for route in getattr(entry, "original_router", app).routes]
    return [
        (method, re.sub(r"\{\w+(:path)?\}", "x", route.path))
        for route in routes
        if isinstance(route, APIRoute)
        for method in sorted(route.methods)
    ]


def test_read_only_key_is_refused_every_write(api: Api) -> None:
    writes = [pair for pair in addresses(api) if pair[0] not in SAFE_METHODS and pair not in WITHOUT_KEY]
    assert len(writes) > 10
    with client_of(api, Role.READ_ONLY) as client:
        for method, path in writes:
            error = error_of(client.request(method, path), 403)
            assert error["code"] == "role_too_narrow", (method, path)


def test_every_address_under_v1_wants_a_key(api: Api) -> None:
    with anonymous(api.url) as client:
        for method, path in addresses(api):
            if path.startswith("/v1") and method != "HEAD":
                assert error_of(client.request(method, path), 401)["code"] == "invalid_api_key", (method, path)


def test_read_only_key_reads(api: Api) -> None:
    with client_of(api, Role.READ_ONLY) as client:
        for path in ("/v1/jobs", "/v1/models", "/v1/keys", "/session"):
            assert client.get(path).status_code == 200, path


class TestKeys:
    def test_new_key_is_shown_once_and_works_until_revoked(self, api: Api) -> None:
        created = api.client.post("/v1/keys", json={"name": "nightly", "role": "read-only"})
        assert created.status_code == 201
        key = created.json()
        with anonymous(api.url, key["key"]) as client:
            assert client.get("/session").json()["role"] == "read-only"
            listed = api.client.get("/v1/keys")
            assert key["key"] not in listed.text
            [shown] = [entry for entry in listed.json()["data"] if entry["id"] == key["id"]]
            assert (shown["name"], shown["role"], shown["tenant"]) == ("nightly", "read-only", "default")
            assert key["key"].startswith(shown["hint"])
            assert api.client.delete(f"/v1/keys/{key['id']}").json()["revoked_at"] is not None
            assert client.get("/v1/jobs").status_code == 401

    def test_key_cannot_make_or_revoke_a_wider_one(self, api: Api) -> None:
        assert error_of(api.client.post("/v1/keys", json={"role": "operator"}), 403)["code"] == "role_too_narrow"
        with client_of(api, Role.OPERATOR) as operator:
            wider = operator.post("/v1/keys", json={"role": "operator"}).json()
            assert error_of(api.client.delete(f"/v1/keys/{wider['id']}"), 403)["code"] == "role_too_narrow"
            assert operator.delete(f"/v1/keys/{wider['id']}").status_code == 200

    def test_keys_of_another_tenant_are_unknown(self, api: Api) -> None:
        with client_of(api, Role.READ_WRITE, "another") as another:
            theirs = another.post("/v1/keys", json={}).json()["id"]
            assert theirs not in api.client.get("/v1/keys").text
            assert error_of(api.client.delete(f"/v1/keys/{theirs}"), 404)["code"] == "key_not_found"
            assert error_of(api.client.post("/v1/keys", json={"tenant": "another"}), 400)["param"] == "tenant"

    def test_operator_sees_and_makes_keys_of_all_tenants(self, api: Api) -> None:
        with client_of(api, Role.OPERATOR) as operator:
            made = operator.post("/v1/keys", json={"tenant": "a new one", "role": "read-write"}).json()
            assert made["tenant"] == "a new one"
            assert {"default", "a new one"} <= {key["tenant"] for key in operator.get("/v1/keys").json()["data"]}
            with anonymous(api.url, made["key"]) as client:
                assert client.get("/session").json()["tenant"] == "a new one"

    @pytest.mark.parametrize("body", [{"role": "root"}, {"name": "x" * 200}, {"tenant": ""}, {"scopes": []}])
    def test_wrong_fields_are_named(self, api: Api, body: dict[str, object]) -> None:
        assert error_of(api.client.post("/v1/keys", json=body), 400)["param"] in body
