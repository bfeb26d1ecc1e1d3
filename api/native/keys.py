"""`/v1/keys`: a tenant's API keys. A new one is shown once."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from api.deps import Caller, InjectedServices
from api.openai.documents import json_body, read_document
from api.schemas import seconds
from jobs import keys
from jobs.errors import InvalidInput, KeyNotFound, RoleTooNarrow
from jobs.ids import KEY_PREFIX, parse_id, public_id
from jobs.queries import tenants
from jobs.queries.tenants import ApiKey
from jobs.roles import Role
from jobs.strict_model import StrictModel

router = APIRouter(prefix="/v1/keys", tags=["keys"])

MAX_NAME = 128


class NewKey(StrictModel):
    name: Annotated[str, Field(max_length=MAX_NAME)] = ""
    role: Annotated[Role, Field(strict=False)] = Role.READ_WRITE
    tenant: Annotated[str | None, Field(min_length=1, max_length=MAX_NAME)] = None


class KeyObject(BaseModel):
    """A key without the key itself. Times are Unix seconds; `last_used_at` is kept to the minute."""

    id: str
    object: Literal["key"] = "key"
    tenant: str
    name: str
    role: Role
    hint: str = Field(description="the key's first characters")
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None

    @classmethod
    def of(cls, key: ApiKey) -> KeyObject:
        return cls(
            id=public_id(KEY_PREFIX, key.id),
            tenant=key.tenant,
            name=key.name,
            role=key.role,
            hint=key.hint,
            created_at=int(key.created_at.timestamp()),
            expires_at=seconds(key.expires_at),
            revoked_at=seconds(key.revoked_at),
            last_used_at=seconds(key.last_used_at),
        )


class KeyCreated(KeyObject):
    key: str = Field(description="shown only now; the service keeps no more than a hash of it")


class KeyList(BaseModel):
    object: Literal["list"] = "list"
    data: list[KeyObject]
    has_more: Literal[False] = False


@router.get("")
async def list_keys(caller: Caller, services: InjectedServices) -> KeyList:
    """Your tenant's keys, revoked ones included, newest last. An operator sees those of all tenants."""
    found = await services.transaction(tenants.list_keys, caller.scope)
    return KeyList(data=[KeyObject.of(key) for key in found])


@router.post("", status_code=201, openapi_extra=json_body(NewKey))
async def create_key(request: Request, caller: Caller, services: InjectedServices) -> KeyCreated:
    """Make a key for your tenant, of no wider role than your own. An operator names any `tenant`; a new one is made."""
    asked, _ = await read_document(services, request, NewKey)
    if not caller.role.covers(asked.role):
        raise RoleTooNarrow(caller.role, f"it makes no key of the role {asked.role}")
    if asked.tenant not in (None, caller.name) and caller.scope is not None:
        raise InvalidInput("only an operator makes keys for another tenant", param="tenant")
    key = keys.new_key()
    created = await services.transaction(
        tenants.create_key,
        asked.tenant or caller.name,
        name=asked.name,
        role=asked.role,
        hint=keys.hint(key),
        digest=keys.digest(key, services.pepper),
        by=caller.actor,
    )
    return KeyCreated(key=key, **KeyObject.of(created).model_dump())


@router.delete("/{key_id}")
async def revoke_key(key_id: str, caller: Caller, services: InjectedServices) -> KeyObject:
    """Revoke a key: it is refused from now on, and the sessions that it began are over."""
    identity = parse_id(KEY_PREFIX, key_id)
    found = None if identity is None else await services.transaction(tenants.get_key, caller.scope, identity)
    if found is None:
        raise KeyNotFound(key_id[:100])
    if not caller.role.covers(found.role):
        raise RoleTooNarrow(caller.role, f"it revokes no key of the role {found.role}")
    revoked = await services.transaction(tenants.revoke_key_by_id, found.id, by=caller.actor)
    return KeyObject.of(revoked)
