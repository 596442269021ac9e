"""Shares of a minute: whatever processes do, and whenever, no more than it has ever pass, and little is withheld from anybody."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister_server.store import shares
from cloister_server.store.shares import Share, Shares
from cloister_server.store.tables import GrantCount
from server.conftest import MINUTE, MinuteClock

ASKED = st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.0, 0.1, 1.5, 25.0, 70.0]), st.integers(1, 60))
"""Which process, after how many seconds, how many uses."""


def count() -> GrantCount:
    return GrantCount(tenant_id="tn", grant_id="gr", minute=0, taken=0)


@given(st.integers(0, 1000), st.lists(ASKED, max_size=20))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_more_pass_than_are_allowed_and_what_is_refused_is_with_the_others(
    clock: MinuteClock, allowed: int, asked: list[tuple[int, float, int]]
) -> None:
    clock.at = MINUTE * 60.0
    row, processes, passed = count(), [Shares() for _ in range(3)], Counter[int]()

    def take(at: float) -> Share:
        left = allowed - (row.taken if row.minute == shares.this_minute() else 0)
        share = shares.take(row, allowed, at=at)
        assert share.left == math.ceil(left / 16) and row.taken <= allowed
        return share

    for who, later, uses in asked:
        clock.at += later
        minute = shares.this_minute()
        for _ in range(uses):
            told = processes[who].spend("gr")
            wait_s = processes[who].use("gr", take) if told is None else told
            if wait_s:
                ends = 60 * (minute + 1)
                assert ends <= clock.at + wait_s < ends + 1, "it is worth while to come again then, and no sooner"
                others = [each._kept.get("gr") for each in processes if each is not processes[who]]
                withheld = sum(each.left for each in others if each and each.minute_ends == ends)
                assert passed[minute] + withheld == allowed
                break
            passed[minute] += 1
        assert passed[minute] <= allowed


@given(st.integers(1, 1000), st.lists(st.tuples(st.integers(0, 1), st.floats(0, 40)), max_size=30))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_of_clocks_that_are_apart_no_more_is_taken_of_any_minute(
    clock: MinuteClock, allowed: int, asked: list[tuple[int, float]]
) -> None:
    row, taken, at = count(), Counter[float](), MINUTE * 60.0
    for is_ahead, later in asked:
        at += later
        share = shares.take(row, allowed, at=at + 59 * is_ahead)
        taken[share.minute_ends] += int(share.left)
    assert all(each <= allowed for each in taken.values())


def test_a_clock_that_is_put_back_within_a_minute_loses_nothing(clock: MinuteClock) -> None:
    row, process = count(), Shares()
    clock.at += 30
    for _ in range(160):
        clock.at += 0.1 if process._kept.get("gr") is None else -0.1
        assert process.use("gr", lambda at: shares.take(row, 160, at=at)) == 0
    assert row.taken == 160


@pytest.mark.parametrize("bound", [3, None])
def test_what_was_longest_not_asked_for_is_forgotten_first(
    clock: MinuteClock, monkeypatch: pytest.MonkeyPatch, bound: int | None
) -> None:
    monkeypatch.setattr(shares, "_MOST_KEPT", 2)
    process = Shares()
    for used in ("a", "b", "a", "c"):
        clock.at += 1.5  # past what is remembered of no bound
        row = count()
        process.use(used, lambda at, row=row: shares.take(row, bound, at=at) if bound else shares.unbounded(at))
    assert list(process._kept) == ["a", "c"]


def test_of_no_bound_one_asks_again_before_it_is_forgotten_and_nobody_else_waits(clock: MinuteClock) -> None:
    process = Shares()
    assert process.use("a", shares.unbounded) == 0
    clock.at += 0.4
    assert process.spend("a") == 0
    clock.at += 0.2
    assert [process.spend("a") for _ in range(3)] == [None, 0, 0]
    assert process.use("a", shares.unbounded) == 0
    clock.at += 0.45  # over a second after the first was asked
    assert process.spend("a") == 0


def test_a_bound_that_is_new_holds_once_it_was_asked_for(clock: MinuteClock) -> None:
    row, process = count(), Shares()
    assert process.use("a", shares.unbounded) == 0
    clock.at += 0.6
    assert process.spend("a") is None
    assert process.use("a", lambda at: shares.take(row, 1, at=at)) == 0
    assert process.use("a", lambda at: shares.take(row, 1, at=at)) > 0
