"""Names and broker options of the Celery queues that the API, workers and the courier share.

A message is `drain(job_id)` on the queue of a model. It only wakes a worker; work is found in Postgres.
"""

from __future__ import annotations

import os

from jobs.settings import Settings

DRAIN_TASK = "pagemill.drain"
NUDGE_TASK = "pagemill.nudge"
COURIER_QUEUE = "courier"

# Celery reads these; they may belong to another application. Our broker is PAGEMILL_REDIS_URL.
_CELERY_VARIABLES = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL")


def model_queue(model: str) -> str:
    """The Redis list on which the workers of a model listen."""
    return f"generate.{model}"


def live_channel(process: str) -> str:
    """The Redis channel on which an API process hears of its live requests' tokens."""
    return f"live.{process}"


def cancel_channel(model: str) -> str:
    """The Redis channel on which the workers of a model hear of live requests whose callers hung up."""
    return f"live.cancel.{model}"


def tokenizer_queue(model: str) -> str:
    """The Redis list from which the workers of a model take what is to be tokenized for a caller."""
    return f"tokenize.{model}"


def tokenizer_reply(question: str) -> str:
    """The Redis list to which the answer to one such question is pushed."""
    return f"tokenized.{question}"


class BrokerNotConfigured(RuntimeError):
    """PAGEMILL_REDIS_URL is not set."""

    def __init__(self) -> None:
        super().__init__(
            "PAGEMILL_REDIS_URL is not set. `pagemill up` brings a Valkey of its own; every other process is told "
            "where one is, e.g. PAGEMILL_REDIS_URL=redis://:password@host:6379/0"
        )


def celery_config(settings: Settings) -> dict[str, object]:
    """Configuration of every Celery app here: JSON only, no results, and no call that can hang on a dead Redis.

    Celery would let variables of its own say where the broker is; they are taken out of this process's environment.
    """
    if settings.redis_url is None:
        raise BrokerNotConfigured
    for name in _CELERY_VARIABLES:
        os.environ.pop(name, None)
    timeout = settings.redis_timeout
    return {
        "broker_url": settings.redis_url,
        "result_backend": None,
        "task_ignore_result": True,
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_acks_late": False,  # a message is a wake-up call: losing one costs a poll, not work
        "task_publish_retry": False,
        "worker_prefetch_multiplier": 1,
        "broker_connection_retry": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_connection_timeout": timeout,
        "broker_transport_options": {
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
            "socket_keepalive": True,
            "retry_on_timeout": False,
            "max_retries": 0,
        },
        "redis_socket_timeout": timeout,
        "redis_socket_connect_timeout": timeout,
        "worker_hijack_root_logger": False,
        "timezone": "UTC",
    }
