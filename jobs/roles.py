"""Roles of API keys: how far a key reaches."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """A key's role, from the narrowest to the widest."""

    READ_ONLY = "read-only"  # sees its tenant's jobs, changes nothing
    READ_WRITE = "read-write"  # does everything for its own tenant
    OPERATOR = "operator"  # sees all tenants, and runs the workers

    @property
    def may_write(self) -> bool:
        return self is not Role.READ_ONLY

    def covers(self, other: Role) -> bool:
        """Whether a key of this role may give out or take back one of `other`."""
        order = list(Role)
        return order.index(self) >= order.index(other)
