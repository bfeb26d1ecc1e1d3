"""Every contender is held to the tokens that were asked for, and no more of them count."""

from __future__ import annotations

import pytest

from bench.comparison import _check
from bench.contender import Output
from bench.contender_process import ContenderFailed
from bench.workload import WorkloadRequest

EXACT, ENDING = WorkloadRequest([5], 3), WorkloadRequest([5], 3, stops_at_eos=True)


def test_output_is_cut_where_the_request_ends() -> None:
    assert Output.of([7, 0, 8, 9], EXACT, [0]) == Output(3, [7, 0, 8])
    assert Output.of([7, 8, 9, 0], ENDING, [0, 2]) == Output(3, [7, 8, 9])
    assert Output.of([7, 2, 8, 9], ENDING, [0, 2]) == Output(1, [7])


def test_count_must_be_exact_unless_the_request_may_end() -> None:
    _check([EXACT, ENDING, ENDING], [{"num_tokens": number} for number in (3, 1, 3)])
    for request, made in ((EXACT, 2), (EXACT, 4), (ENDING, 4)):
        with pytest.raises(ContenderFailed, match=f"request 1 brought {made} tokens instead of 3"):
            _check([EXACT, request], [{"num_tokens": 3}, {"num_tokens": made}])
    with pytest.raises(ContenderFailed, match="2 requests brought 1 outputs"):
        _check([EXACT, EXACT], [{"num_tokens": 3}])
