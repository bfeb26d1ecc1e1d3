"""`/v1/models`, and what a tenant needs to verify its webhooks."""

from __future__ import annotations

from fastapi import APIRouter

from api.deps import Caller, InjectedServices
from api.schemas import ModelList, ModelObject, WebhookSecret
from jobs.errors import ModelNotFound
from jobs.queries import reading

router = APIRouter(prefix="/v1", tags=["models"])


@router.get("/models")
async def list_models(caller: Caller, services: InjectedServices) -> ModelList:
    """Every model that a worker has served, and how many serve it now."""
    return ModelList(data=[ModelObject.of(model) for model in await services.transaction(reading.list_models)])


@router.get("/models/{name:path}")
async def get_model(name: str, caller: Caller, services: InjectedServices) -> ModelObject:
    """One model. Its name may hold slashes."""
    for model in await services.transaction(reading.list_models):
        if model.name == name:
            return ModelObject.of(model)
    raise ModelNotFound(name[:256])


@router.get("/webhook_secret", tags=["webhooks"])
async def webhook_secret(caller: Caller) -> WebhookSecret:
    """The secret that your webhooks are signed with."""
    return WebhookSecret(secret=caller.webhook_secret)
