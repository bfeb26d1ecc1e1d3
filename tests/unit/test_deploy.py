"""deploy/: dashboards and alerts ask for metrics that exist, and Kubernetes' own schemas take the manifests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from api.metrics import BacklogCollector, HttpMetrics
from cli.main import app as command_line
from jobs.queries.backlog import Backlog, ModelBacklog
from jobs.settings import Settings
from tests.support.paths import REPOSITORY
from tests.unit.worker.test_metrics_server import STATS, worker_metrics
from worker.courier.metrics import CourierMetrics

DEPLOY = REPOSITORY / "deploy"
KUBERNETES = "1.34"
SETTINGS = {f"PAGEMILL_{name.upper()}" for name in Settings.model_fields}
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
DASHBOARD = json.loads((DEPLOY / "grafana" / "pagemill.json").read_text())
MANIFESTS = [
    pytest.param(manifest, id=f"{file.name}: {manifest['kind']} {manifest['metadata']['name']}")
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for manifest in yaml.safe_load_all(file.read_text())
]


class _Notifier:
    sent, failed = 3, 1


def _existing() -> dict[str, set[str]]:
    """Every series of a worker, a courier and the API, with its labels."""
    http = HttpMetrics()
    http.observe("GET", "/v1/jobs", 200, 0.1)
    backlog = CollectorRegistry()
    found = Backlog([ModelBacklog("demo", 1, 2, 3, 4.0, 5.0, 6)], 7)
    backlog.register(BacklogCollector(found, _Notifier()))  # type: ignore[arg-type]
    worker = worker_metrics(STATS)
    worker.observe_step("org/name", 0.1)
    courier = CourierMetrics()
    courier.count_failed_turn("webhooks")
    return {
        sample.name: set(sample.labels)
        for registry in (http.registry, backlog, worker.registry, courier.registry)
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def _expressions() -> Iterator[str]:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        yield from re.findall(r"label_values\((.*)\)", variable["query"])
    for manifest in MANIFESTS:
        for trigger in manifest.values[0].get("spec", {}).get("triggers", []):
            yield trigger["metadata"]["query"]


@pytest.mark.parametrize("expression", list(_expressions()))
def test_expressions_ask_for_series_and_labels_that_exist(expression: str) -> None:
    existing = _existing()
    asked = re.findall(r"((?:pagemill:|process_)\w+)(?:\{([^}]*)\})?", expression)
    assert asked
    for name, selector in asked:
        assert name in existing
        labels = set(re.findall(r"(\w+)\s*[=!]~?", selector))
        assert labels <= existing[name] | {"job", "instance"}
    for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
        labels = {label.strip() for label in grouped.split(",")}
        assert any(labels <= existing[name] | {"job", "instance"} for name, _ in asked)


@pytest.mark.parametrize("name", sorted(n for n in _existing() if re.match(r"pagemill:.*(?<!_created)$", n)))
def test_metrics_are_documented(name: str) -> None:
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    base = re.sub(r"_(bucket|count|sum)$", "", name)
    short = base.removeprefix("pagemill:num_requests")
    assert f"`{base}`" in page or f"`{short}`" in page


def test_no_label_holds_what_a_tenant_chose() -> None:
    labels = set().union(*_existing().values())
    assert labels <= {
        *("model_name", "finished_reason", "outcome", "task", "method", "route", "status", "le"),
        *("implementation", "major", "minor", "patchlevel", "version"),
    }


def test_alerts_say_what_is_wrong_and_how_bad() -> None:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"]
            assert rule["labels"]["severity"] in {"page", "ticket"}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_manifests_satisfy_the_schemas_of_kubernetes(manifest: dict[str, Any]) -> None:
    if manifest["kind"] == "ScaledObject":
        # KEDA's own type: the fields that its documentation requires.
        spec = manifest["spec"]
        assert {"kind", "name"} <= set(spec["scaleTargetRef"])
        for trigger in spec["triggers"]:
            assert trigger["type"] == "prometheus"
            assert {"serverAddress", "query", "threshold"} <= set(trigger["metadata"])
            assert all(isinstance(value, str) for value in trigger["metadata"].values())
        return
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_pods_run_our_commands_without_rights(manifest: dict[str, Any]) -> None:
    template = manifest["spec"].get("template") if "spec" in manifest else None
    if template is None:
        assert manifest["kind"] in {"ConfigMap", "Service", "PodDisruptionBudget", "ScaledObject"}
        assert set(manifest.get("data", {})) <= SETTINGS
        return
    pod = template["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["containers"]
    assert container["args"][0] in {
        command.name or command.callback.__name__ for command in command_line.registered_commands
    }  # type: ignore[union-attr]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    volumes = {volume["name"] for volume in pod["volumes"]} | {
        claim["metadata"]["name"] for claim in manifest["spec"].get("volumeClaimTemplates", [])
    }
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_scaled_object_scales_what_exists() -> None:
    manifests = [manifest.values[0] for manifest in MANIFESTS]
    (scaled,) = (manifest for manifest in manifests if manifest["kind"] == "ScaledObject")
    target = scaled["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) in {(made["kind"], made["metadata"]["name"]) for made in manifests}
