"""How a claim's places are divided, without a database."""

from __future__ import annotations

from collections import defaultdict
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from jobs.queries.claiming import Candidate, share


def candidate(job: int, tenant: str, waiting: int, priority: int = 0) -> Candidate:
    return Candidate(UUID(int=job), _tenant(tenant), priority, waiting)


def _tenant(name: str) -> UUID:
    return UUID(bytes=name.encode().ljust(16, b"\0"))


def places(*numbers: int) -> dict[UUID, int]:
    """`places(3, 0, 2)`: three for job 1, none for job 2, two for job 3."""
    return {UUID(int=job): number for job, number in enumerate(numbers, start=1) if number}


def test_nothing_waits() -> None:
    assert share(10, [], {}) == {}


def test_one_job_takes_what_it_can_use() -> None:
    assert share(10, [candidate(1, "a", 4)], {}) == places(4)
    assert share(3, [candidate(1, "a", 4)], {}) == places(3)


def test_a_tenants_jobs_are_served_in_order() -> None:
    assert share(5, [candidate(1, "a", 4), candidate(2, "a", 4)], {}) == places(4, 1)


def test_tenants_get_equal_shares_not_jobs() -> None:
    many = [candidate(job, "a", 10) for job in (1, 2, 3)]
    assert share(8, [*many, candidate(4, "b", 10)], {}) == places(4, 0, 0, 4)


def test_what_one_leaves_the_others_take() -> None:
    assert share(10, [candidate(1, "a", 100), candidate(2, "b", 2)], {}) == places(8, 2)


def test_what_runs_already_counts() -> None:
    candidates = [candidate(1, "a", 100), candidate(2, "b", 100)]
    assert share(6, candidates, {_tenant("a"): 4}) == places(1, 5)
    assert share(3, candidates, {_tenant("a"): 4}) == places(0, 3)


def test_priority_goes_before_fairness() -> None:
    candidates = [candidate(1, "a", 5, priority=1), candidate(2, "b", 5), candidate(3, "a", 5)]
    assert share(5, candidates, {}) == places(5)
    # Lower down, what the higher priority got counts as well.
    assert share(8, candidates, {}) == places(5, 3)


@given(
    limit=st.integers(0, 60),
    jobs=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 20), st.integers(-1, 1)), max_size=8),
    running=st.dictionaries(st.sampled_from("abc"), st.integers(0, 20)),
)
def test_every_division_is_full_and_fair(limit: int, jobs: list[tuple[str, int, int]], running: dict[str, int]) -> None:
    candidates = [candidate(job, *what) for job, what in enumerate(jobs)]
    divided = share(limit, candidates, {_tenant(name): number for name, number in running.items()})
    waiting = {each.job_id: each.waiting for each in candidates}
    assert all(0 < number <= waiting[job_id] for job_id, number in divided.items())
    assert sum(divided.values()) == min(limit, sum(waiting.values()))
    left = [each for each in candidates if divided.get(each.job_id, 0) < each.waiting]
    if not left:
        return
    # Nothing was given to a lower priority while a higher one waited.
    highest = max(each.priority for each in left)
    assert all(each.priority >= highest for each in candidates if divided.get(each.job_id))
    # Nobody who still waits there could envy a tenant that got a place: nobody has more than one place above them.
    have: dict[UUID, int] = defaultdict(int, {_tenant(name): number for name, number in running.items()})
    for each in candidates:
        have[each.tenant_id] += divided.get(each.job_id, 0)
    got = {each.tenant_id for each in candidates if each.priority == highest and divided.get(each.job_id)}
    poorest = min(have[each.tenant_id] for each in left if each.priority == highest)
    assert all(have[tenant_id] <= poorest + 1 for tenant_id in got)
