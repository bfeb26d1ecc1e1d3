"""`pagemill keys` and `pagemill tenants`, as an operator types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli.commands import keys, tenants, terminal
from cli.main import app

LISTED = 10  # characters of a key that the list shows


@pytest.fixture
def operator(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("PAGEMILL_DATABASE_URL", database_url)
    monkeypatch.setenv("PAGEMILL_DATA_DIR", str(tmp_path))
    return CliRunner()


@pytest.fixture(autouse=True)
def _consoles_that_look_up_their_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    # They hold on to the streams of the moment when they were made.
    for module in (keys, tenants):
        monkeypatch.setattr(module, "out", Console(width=200, soft_wrap=True))
    for module in (keys, tenants, terminal):
        monkeypatch.setattr(module, "err", Console(width=200, soft_wrap=True, stderr=True))


def test_key_is_shown_once_and_revoked_by_its_beginning(operator: CliRunner) -> None:
    created = operator.invoke(app, ["keys", "create", "--tenant", "[/x] of brackets", "--name", "[b]first[/b]"])
    assert created.exit_code == 0
    key = created.stdout.splitlines()[0]
    assert "whsec_" in created.stderr
    listed = operator.invoke(app, ["keys", "list"])
    assert listed.exit_code == 0
    assert "[/x] of brackets" in listed.stdout
    assert key not in listed.stdout
    assert key[:LISTED] in listed.stdout
    revoked = operator.invoke(app, ["keys", "revoke", key[:LISTED] + "…"])
    assert (revoked.exit_code, revoked.stdout) == (0, "1 revoked\n")


def test_keys_and_tenants_are_read_by_a_script(operator: CliRunner) -> None:
    made = json.loads(operator.invoke(app, ["keys", "create", "--tenant", "a b", "--json"]).stdout)
    (listed,) = (json.loads(line) for line in operator.invoke(app, ["keys", "list", "--json"]).stdout.splitlines())
    assert (listed["tenant"], listed["role"], listed["revoked_at"]) == ("a b", "read-write", None)
    assert made["key"].startswith(listed["hint"])
    assert made["webhook_secret"].startswith("whsec_")
    tenant = json.loads(operator.invoke(app, ["tenants", "list", "--json"]).stdout)
    assert tenant == {"tenant": "a b", "weight": 1}
    assert json.loads(operator.invoke(app, ["keys", "revoke", listed["hint"], "--json"]).stdout) == {"revoked": 1}


@pytest.mark.parametrize("beginning", ["", "pm_", "…"])
def test_ambiguous_prefix_revokes_no_key(operator: CliRunner, beginning: str) -> None:
    assert operator.invoke(app, ["keys", "create"]).exit_code == 0
    assert operator.invoke(app, ["keys", "revoke", beginning]).exit_code == 2
    assert "live" in operator.invoke(app, ["keys", "list"]).stdout


def test_invalid_setting_is_named(operator: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PAGEMILL_PORT", "eighty"), ("PAGEMILL_LEASE", "3")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            listed = operator.invoke(app, ["keys", "list"])
        assert listed.exit_code == 1
        assert name in listed.stderr


def test_imported_key_is_shown_only_by_its_beginning(operator: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEMILL_API_KEY", "sixteen-letters!")
    assert operator.invoke(app, ["migrate"]).exit_code == 0
    listed = operator.invoke(app, ["keys", "list"]).stdout
    assert "sixt…" in listed
    assert "sixte" not in listed
    assert operator.invoke(app, ["keys", "revoke", "sixteen-letters!"]).exit_code == 0


def test_weight_is_set_for_a_tenant_that_exists(operator: CliRunner) -> None:
    assert operator.invoke(app, ["keys", "create", "--tenant", "paying"]).exit_code == 0
    assert operator.invoke(app, ["tenants", "weight", "paying", "7"]).exit_code == 0
    listed = operator.invoke(app, ["tenants", "list"])
    assert "paying" in listed.stdout
    assert "7" in listed.stdout
    assert operator.invoke(app, ["tenants", "weight", "unknown", "7"]).exit_code == 2
    assert operator.invoke(app, ["tenants", "weight", "paying", "0"]).exit_code == 2
