"""Real Postgres and Valkey servers without an installation, for people who did not bring their own."""

from __future__ import annotations

from cli.embedded.errors import EmbeddedServiceError
from cli.embedded.services import EmbeddedServices, embedded_services

__all__ = ["EmbeddedServiceError", "EmbeddedServices", "embedded_services"]
