"""How many blocked addresses are told of, however many an attacker has."""

from __future__ import annotations

from api.wrong_keys import MOST, TOLD, WrongKeys


def test_address_is_told_of_once_when_its_tries_are_used_up() -> None:
    wrong_keys = WrongKeys()
    assert [wrong_keys.note("192.0.2.1") for _ in range(MOST)] == [False] * (MOST - 1) + [True]


def test_addresses_told_of_in_a_minute_are_few() -> None:
    wrong_keys = WrongKeys()
    told = [wrong_keys.note(f"192.0.2.{address}") for address in range(3 * TOLD) for _ in range(MOST)]
    assert sum(told) == TOLD
    assert all(wrong_keys.is_blocked(f"192.0.2.{address}") for address in range(3 * TOLD))
