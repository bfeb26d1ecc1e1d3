"""What all tables share: the metadata with its names of constraints, the clock, and the check of a state."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import MetaData, func

from jobs.states import JobState, RequestState

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

NOW = func.clock_timestamp()


def state_in(states: Iterable[JobState] | Iterable[RequestState]) -> str:
    """A check constraint's text: `state` is one of `states`."""
    return "state IN (" + ", ".join(f"'{state}'" for state in sorted(states)) + ")"
