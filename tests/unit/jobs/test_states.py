"""`docs/states.md` and `jobs.states` say the same, in both directions."""

from __future__ import annotations

import re
from collections.abc import Set
from enum import StrEnum

import pytest

from jobs.states import (
    JOB_TRANSITIONS,
    REQUEST_TRANSITIONS,
    TERMINAL_JOB_STATES,
    TERMINAL_REQUEST_STATES,
    JobState,
    RequestState,
)
from tests.support.paths import REPOSITORY

PAGE = (REPOSITORY / "docs" / "states.md").read_text()
ARROW = re.compile(r"^ *(\S+) --> (\S+)(?: : (.+))?$", re.MULTILINE)
KINDS = pytest.mark.parametrize(
    ("kind", "states", "transitions", "terminal"),
    [
        ("job", JobState, JOB_TRANSITIONS, TERMINAL_JOB_STATES),
        ("request", RequestState, REQUEST_TRANSITIONS, TERMINAL_REQUEST_STATES),
    ],
)


def _drawn(kind: str) -> dict[tuple[str, str], str]:
    """(from, to) → who moves it; "[*]" where Mermaid has its dot."""
    block = re.search(r"```mermaid\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    found = [arrow for arrow in ARROW.findall(block[1]) if f"{kind}_" in arrow[0] + arrow[1]]
    drawn = {(start.removeprefix(f"{kind}_"), end.removeprefix(f"{kind}_")): who for start, end, who in found}
    assert len(drawn) == len(found), "an arrow is drawn twice"
    return drawn


@KINDS
def test_documented_transitions_are_those_of_the_code(
    kind: str, states: type[StrEnum], transitions: Set[tuple[str, str]], terminal: Set[str]
) -> None:
    drawn = _drawn(kind)
    moves = {arrow: who for arrow, who in drawn.items() if "[*]" not in arrow}
    assert set(moves) == {(str(start), str(end)) for start, end in transitions}
    assert all(moves.values()), "an arrow says who moves it"
    assert {start for start, end in drawn if end == "[*]"} == {str(state) for state in terminal}
    assert [end for start, end in drawn if start == "[*]"] == [str(next(iter(states)))]


@KINDS
def test_every_state_is_documented(
    kind: str, states: type[StrEnum], transitions: Set[tuple[str, str]], terminal: Set[str]
) -> None:
    section = PAGE.partition(f"## {kind.capitalize()}s\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \| .", section, re.MULTILINE) == [str(state) for state in states]


@KINDS
def test_terminal_states_have_no_transition(
    kind: str, states: type[StrEnum], transitions: Set[tuple[str, str]], terminal: Set[str]
) -> None:
    assert not {start for start, _ in transitions} & set(terminal)
