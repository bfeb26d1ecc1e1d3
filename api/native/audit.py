"""`GET /v1/audit`: who changed what."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from api.deps import Caller, InjectedServices
from jobs.errors import InvalidInput
from jobs.ids import AUDIT_PREFIX, KEY_PREFIX, parse_id, public_id
from jobs.queries import audit
from jobs.queries.audit import AuditAction, AuditEntry
from jobs.queries.tenants import Principal

router = APIRouter(prefix="/v1/audit", tags=["audit"])


class AuditKey(BaseModel):
    id: str
    name: str
    hint: str = Field(description="the key's first characters")


class AuditObject(BaseModel):
    """A change. `at` is in Unix seconds."""

    id: str
    object: Literal["audit_entry"] = "audit_entry"
    at: int
    action: AuditAction
    target: str = Field(description="id of what was changed; a tenant's name, or an address that was blocked")
    tenant: str | None = Field(description="whose it is; null: the service's own")
    by: Literal["key", "operator", "command_line", "stranger"] = Field(
        description="operator: a key of another tenant, which is not shown to you; stranger: came without a key"
    )
    key: AuditKey | None
    detail: dict[str, Any] = Field(description="what it was changed to, texts cut")

    @classmethod
    def of(cls, entry: AuditEntry, caller: Principal) -> AuditObject:
        is_foreign = entry.key_tenant_id != caller.id and caller.scope is not None
        key = None
        by: Literal["key", "operator", "command_line", "stranger"] = "key"
        if entry.key_id is None:
            by = "stranger" if entry.action is AuditAction.SESSION_BLOCKED else "command_line"
        elif is_foreign:
            by = "operator"
        else:
            key = AuditKey(id=public_id(KEY_PREFIX, entry.key_id), name=entry.key_name or "", hint=entry.key_hint or "")
        return cls(
            id=public_id(AUDIT_PREFIX, entry.id),
            at=int(entry.at.timestamp()),
            action=entry.action,
            target=entry.target,
            tenant=entry.tenant,
            by=by,
            key=key,
            detail=dict(entry.detail),
        )


class AuditList(BaseModel):
    """Newest first. The next page is `?after=<last_id>`."""

    object: Literal["list"] = "list"
    data: list[AuditObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class AuditQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after: str | None = Field(default=None, description="`last_id` of the page before")
    limit: int = Field(default=20, ge=1, le=100)


@router.get("")
async def list_entries(caller: Caller, services: InjectedServices, query: Annotated[AuditQuery, Query()]) -> AuditList:
    """What was done to your tenant's jobs, keys and endpoints. An operator sees all, workers and sign-ins included."""
    after = None
    if query.after is not None and (after := parse_id(AUDIT_PREFIX, query.after)) is None:
        raise InvalidInput("not an audit entry's id", param="after")
    found = await services.transaction(audit.list_entries, caller.scope, after=after, limit=query.limit + 1)
    page = [AuditObject.of(entry, caller) for entry in found[: query.limit]]
    return AuditList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(found) > query.limit,
    )
