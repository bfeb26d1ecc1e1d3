"""How a claim's places are divided, without a database."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from jobs.queries.claiming import Candidate, share


def candidate(job: int, tenant: str, waiting: int) -> Candidate:
    return Candidate(UUID(int=job), _tenant(tenant), waiting)


def _tenant(name: str) -> UUID:
    return UUID(bytes=name.encode().ljust(16, b"\0"))


def places(*numbers: int) -> dict[UUID, int]:
    """`places(3, 0, 2)`: three for job 1, none for job 2, two for job 3."""
    return {UUID(int=job): number for job, number in enumerate(numbers, start=1) if number}


def test_share_is_empty_when_nothing_waits() -> None:
    assert share(10, [], {}, {}) == {}


def test_one_job_takes_what_it_can_use() -> None:
    assert share(10, [candidate(1, "a", 4)], {}, {}) == places(4)
    assert share(3, [candidate(1, "a", 4)], {}, {}) == places(3)


def test_jobs_of_a_tenant_are_served_in_order() -> None:
    assert share(5, [candidate(2, "a", 4), candidate(1, "a", 4)], {}, {}) == places(1, 4)


def test_tenants_get_equal_shares_not_jobs() -> None:
    many = [candidate(job, "a", 10) for job in (1, 2, 3)]
    assert share(8, [*many, candidate(4, "b", 10)], {}, {}) == places(4, 0, 0, 4)


def test_places_that_a_tenant_leaves_go_to_the_others() -> None:
    assert share(10, [candidate(1, "a", 100), candidate(2, "b", 2)], {}, {}) == places(8, 2)


def test_running_requests_count() -> None:
    candidates = [candidate(1, "a", 100), candidate(2, "b", 100)]
    assert share(6, candidates, {_tenant("a"): 4}, {}) == places(1, 5)
    assert share(3, candidates, {_tenant("a"): 4}, {}) == places(0, 3)


def test_weights_divide_places_and_running_requests_alike() -> None:
    candidates = [candidate(1, "a", 100), candidate(2, "b", 100)]
    weights = {_tenant("a"): 1, _tenant("b"): 3}
    assert share(12, candidates, {}, weights) == places(3, 9)
    assert share(4, candidates, {_tenant("b"): 9}, weights) == places(3, 1)


def test_smaller_share_comes_first() -> None:
    divided = share(10, [candidate(1, "a", 100), candidate(2, "b", 2), candidate(3, "c", 1)], {}, {})
    assert list(divided) == [UUID(int=3), UUID(int=2), UUID(int=1)]


@given(
    limit=st.integers(0, 60),
    jobs=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 20)), max_size=8),
    running=st.dictionaries(st.sampled_from("abc"), st.integers(0, 20)),
    weight=st.dictionaries(st.sampled_from("abc"), st.integers(1, 5)),
)
def test_division_is_full_and_fair(
    limit: int, jobs: list[tuple[str, int]], running: dict[str, int], weight: dict[str, int]
) -> None:
    candidates = [candidate(job, *what) for job, what in enumerate(jobs)]
    weights = {_tenant(name): number for name, number in weight.items()}
    divided = share(limit, candidates, {_tenant(name): number for name, number in running.items()}, weights)
    waiting = {each.job_id: each.waiting for each in candidates}
    assert all(0 < number <= waiting[job_id] for job_id, number in divided.items())
    assert sum(divided.values()) == min(limit, sum(waiting.values()))
    have: dict[UUID, int] = defaultdict(int, {_tenant(name): number for name, number in running.items()})
    for each in candidates:
        have[each.tenant_id] += divided.get(each.job_id, 0)
    # No tenant with requests left had a better claim to the last place of another.
    for left in candidates:
        if divided.get(left.job_id, 0) < left.waiting:
            deserved = Fraction(have[left.tenant_id] + 1, weights.get(left.tenant_id, 1))
            served = {each.tenant_id for each in candidates if divided.get(each.job_id)}
            assert all(Fraction(have[tenant], weights.get(tenant, 1)) <= deserved for tenant in served)
            # Nor did a later job of its own tenant get any.
            later = candidates[candidates.index(left) + 1 :]
            assert not any(divided.get(each.job_id) for each in later if each.tenant_id == left.tenant_id)
