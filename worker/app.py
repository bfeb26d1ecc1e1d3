"""The Celery app, made on call: nothing is configured at import, so a process sees the settings that it was given."""

from __future__ import annotations

from celery import Celery

from jobs.queues import celery_config
from jobs.settings import Settings


def make_app(settings: Settings, name: str) -> Celery:
    """A Celery app that speaks JSON, keeps no results, and gives up on a dead Redis within `settings.redis_timeout`.

    It is no process-wide current app: tasks are registered on it by name. Raises `BrokerNotConfigured`.
    """
    app = Celery(name, set_as_current=False)
    app.conf.update(celery_config(settings))
    return app
