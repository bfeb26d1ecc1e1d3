"""What can go wrong with the embedded services."""

from __future__ import annotations

OUTSIDE_SERVICES = (
    "Or use services of your own: set PAGEMILL_DATABASE_URL and PAGEMILL_REDIS_URL, and nothing embedded is started."
)


class EmbeddedServiceError(RuntimeError):
    """An embedded service cannot run here. The message says what was found and how to mend it."""
