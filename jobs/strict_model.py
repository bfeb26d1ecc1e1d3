"""Base classes of request bodies: strict about types and names, and cheap to refuse."""

from __future__ import annotations

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator


class FewComplaints(BaseModel):
    """Validation whose cost does not grow with the number of unknown fields: pydantic would complain of each.

    Lists do the same by `fail_fast`: they end at their first wrong item.
    """

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown_field(cls, document: object) -> object:
        if not isinstance(document, dict) or len(document) <= len(cls.model_fields):
            return document
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next(name for name in document if name not in known)
        return {unknown: document[unknown]} | {name: document[name] for name in known & document.keys()}


class StrictModel(FewComplaints):
    """Unknown fields are refused by name, and "5" is not 5."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def at_most(limit: int) -> BeforeValidator:
    """Bound the pairs of a dict before pydantic looks at them, because it would complain of each."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > limit:
            raise ValueError(f"{len(value)} pairs; at most {limit} are allowed")
        return value

    return BeforeValidator(check)
