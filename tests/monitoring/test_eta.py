"""The naive estimate: what it says, and when it says nothing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vespera_exec.monitoring.eta import HORIZON_SECONDS, NaiveEstimator

naive = NaiveEstimator()


def test_a_quarter_done_in_ten_seconds_leaves_thirty() -> None:
    estimate = naive.estimate(role="survey", elapsed_seconds=10.0, fraction=0.25)
    assert estimate is not None
    assert estimate.remaining_seconds == pytest.approx(30.0)
    assert (estimate.low_seconds, estimate.high_seconds) == pytest.approx((15.0, 45.0))


def test_it_claims_no_confidence() -> None:
    estimate = naive.estimate(role=None, elapsed_seconds=2.0, fraction=0.5)
    assert estimate is not None
    assert estimate.label == "uncalibrated"
    assert estimate.confidence is None


def test_all_done_leaves_nothing() -> None:
    for fraction in (1.0, 1.5):
        estimate = naive.estimate(role=None, elapsed_seconds=5.0, fraction=fraction)
        assert estimate is not None
        assert estimate.remaining_seconds == estimate.high_seconds == 0.0


def test_a_stall_pushes_the_end_out() -> None:
    early = naive.estimate(role=None, elapsed_seconds=10.0, fraction=0.5)
    late = naive.estimate(role=None, elapsed_seconds=60.0, fraction=0.5)
    assert early is not None
    assert late is not None
    assert late.remaining_seconds > early.remaining_seconds


@pytest.mark.parametrize(
    ("elapsed", "fraction"),
    [
        (0.99, 0.5),
        (-5.0, 0.5),
        (10.0, None),
        (10.0, 0.0),
        (10.0, -0.1),
        (10.0, math.nan),
        (10.0, math.inf),
        (math.nan, 0.5),
        (math.inf, 0.5),
        (2.0, 1e-12),
        (2.0, 5e-324),
    ],
)
def test_nothing_is_said_where_nothing_is_known(elapsed: float, fraction: float | None) -> None:
    assert naive.estimate(role=None, elapsed_seconds=elapsed, fraction=fraction) is None


@given(elapsed=st.floats(), fraction=st.none() | st.floats())
def test_it_never_raises_and_stays_ordered_and_within_the_horizon(elapsed: float, fraction: float | None) -> None:
    estimate = naive.estimate(role="any", elapsed_seconds=elapsed, fraction=fraction, history=(1.0, 2.0))
    if estimate is not None:
        assert 0 <= estimate.low_seconds <= estimate.remaining_seconds <= estimate.high_seconds
        assert estimate.remaining_seconds <= HORIZON_SECONDS
