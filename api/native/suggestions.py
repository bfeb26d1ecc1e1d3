"""`GET /v1/suggest`: what a search may go on with."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from api.deps import Caller, InjectedServices
from jobs.queries import suggesting

router = APIRouter(prefix="/v1", tags=["jobs"])


class SuggestQuery(BaseModel):
    """A misspelt parameter is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    field: str = Field(max_length=128, description="of a search, as status, model, name or metadata.team")
    prefix: str = Field(default="", max_length=200, description="what is typed of the value, in either case")


class SuggestionObject(BaseModel):
    value: str
    jobs: int = Field(description="of your newest 2,000, those that have it")


class SuggestionList(BaseModel):
    """The most frequent first, nine at most."""

    object: Literal["list"] = "list"
    data: list[SuggestionObject]
    has_more: Literal[False] = False


@router.get("/suggest")
async def suggest(
    caller: Caller, services: InjectedServices, query: Annotated[SuggestQuery, Query()]
) -> SuggestionList:
    """Values of a field that begin as typed, from your newest jobs; `metadata.` gives the keys of their metadata."""
    found = await services.transaction(suggesting.suggest, caller.scope, query.field, query.prefix)
    return SuggestionList(data=[SuggestionObject(value=one.value, jobs=one.jobs) for one in found])
