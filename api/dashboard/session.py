"""`/session`: a page logs in with a key, or with the code of the link that `pagemill up` prints, and gets a cookie."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from api import session_cookie
from api.deps import Caller, InjectedServices, Services, principal_of
from api.openai.documents import json_body, read_document
from api.session_cookie import Session, require_own_page
from jobs import keys
from jobs.errors import InvalidInput, InvalidKey, TooManyWrongKeys
from jobs.ids import KEY_PREFIX, public_id
from jobs.queries import audit, tenants
from jobs.queries.audit import Actor, AuditAction
from jobs.queries.tenants import Principal
from jobs.roles import Role
from jobs.strict_model import StrictModel

router = APIRouter(tags=["dashboard"])


class Login(StrictModel):
    key: Annotated[str | None, Field(max_length=1024)] = None
    code: Annotated[str | None, Field(max_length=1024)] = None


class SessionObject(BaseModel):
    """Who is logged in, and how far the key reaches."""

    object: Literal["session"] = "session"
    tenant: str
    role: Role
    key_id: str
    key_name: str
    key_hint: str = Field(description="the key's first characters")

    @classmethod
    def of(cls, principal: Principal) -> SessionObject:
        return cls(
            tenant=principal.name,
            role=principal.role,
            key_id=public_id(KEY_PREFIX, principal.key_id),
            key_name=principal.key_name,
            key_hint=principal.key_hint,
        )


@router.post("/session", openapi_extra=json_body(Login))
async def log_in(request: Request, response: Response, services: InjectedServices) -> SessionObject:
    """Begin a session with `{"key": "pm_…"}`, or with the `{"code"}` of a login link. Any role may."""
    require_own_page(request)
    asked, _ = await read_document(services, request, Login)
    wrong_keys = services.wrong_keys
    address = request.client.host if request.client else ""
    if wrong_keys.is_blocked(address):
        raise TooManyWrongKeys
    try:
        principal = await _principal(services, asked)
    except InvalidKey:
        if wrong_keys.note(address):
            stranger = Actor(None, None)
            await services.quietly(audit.record, stranger, AuditAction.SESSION_BLOCKED, address, tenant_id=None)
        raise
    services.cookies.set(request, response, Session.begin(principal.key_id))
    return SessionObject.of(principal)


@router.get("/session")
async def show(caller: Caller) -> SessionObject:
    """Who is logged in."""
    return SessionObject.of(caller)


@router.delete("/session", status_code=204)
async def log_out(request: Request) -> Response:
    """Forget the cookie. It needs no session: one that is over is forgotten, too."""
    require_own_page(request)
    response = Response(status_code=204)
    session_cookie.forget(request, response)
    return response


async def _principal(services: Services, asked: Login) -> Principal:
    if (asked.key is None) == (asked.code is None):
        raise InvalidInput("either 'key' or 'code' is expected")
    if asked.key is not None:
        return await principal_of(services, asked.key)
    assert asked.code is not None
    digest = keys.digest(asked.code, services.pepper)
    principal = await services.transaction(tenants.redeem_login_code, digest)
    if principal is None:
        raise InvalidKey
    return principal
