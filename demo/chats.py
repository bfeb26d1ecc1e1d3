"""Chats for a real model: sort a review, take facts out of a sentence by a schema, say it more simply."""

from __future__ import annotations

from typing import Any

REVIEWS = (
    "Great phone, battery lasts two days.",
    "It broke after a week and nobody answers my mails.",
    "Loved the movie, I would watch it again.",
    "The soup was cold and the waiter was rude.",
    "Best headphones that I ever owned.",
    "The hotel was dirty and far too loud.",
    "Arrived early, well packed, works perfectly.",
    "A waste of money.",
)

FACTS = (
    "Ada Lovelace was born in London in 1815.",
    "Albert Einstein was born in Ulm in 1879.",
    "Marie Curie was born in Warsaw in 1867.",
    "Isaac Newton was born in Woolsthorpe in 1643.",
    "Nikola Tesla was born in Smiljan in 1856.",
    "Grace Hopper was born in New York in 1906.",
    "Alan Turing was born in London in 1912.",
    "Emmy Noether was born in Erlangen in 1882.",
)

NOTES = (
    "Please be advised that the meeting has been postponed until Tuesday.",
    "We regret to inform you that your parcel has been delayed.",
    "Kindly refrain from feeding the animals.",
    "The establishment will cease operations at nine in the evening.",
    "Prior to departure, passengers are required to show their tickets.",
    "It is imperative that all windows be closed during rain.",
    "Your attendance at the dinner would be greatly appreciated.",
    "The elevator is currently not in operation.",
)


def _closed(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SENTIMENT = _closed(sentiment={"enum": ["positive", "negative"]})
PERSON = _closed(
    name={"type": "string", "maxLength": 30},
    city={"type": "string", "maxLength": 30},
    year={"type": "integer", "minimum": 1000, "maximum": 2100},
)


def chats() -> list[dict[str, Any]]:
    """Requests as a job's lines have them, the three kinds in turn."""
    rows: list[dict[str, Any]] = []
    for review, fact, note in zip(REVIEWS, FACTS, NOTES, strict=True):
        rows.append(_request(f"Is this review positive or negative? Answer in JSON.\n\n{review}", SENTIMENT))
        rows.append(_request(f"Give name, city and year as JSON.\n\n{fact}", PERSON))
        rows.append(_request(f"Rewrite this in simple words, in one short sentence.\n\n{note}"))
    return [{"custom_id": str(place), **row} for place, row in enumerate(rows)]


def _request(text: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    request: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    if schema is not None:
        request["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return request
