"""When a call shares its work (csrc/run/sharing.h): the decisions, at times that the tests make up."""

from __future__ import annotations

import itertools

import pytest

from jax_nano import _runtime

US = 1000
MS = 1000 * US
SHORT, LONG = 20 * US, 1 * MS  # what calls take one thread
ENDLESS = 2**63 - 1


@pytest.fixture
def ledger():
    return _runtime.testing.Ledger()


def pause_after(ledger, now):
    """How long the ledger stays closed from now on, to 0.1 ms."""
    steps = 0
    while not ledger.is_open(now + steps * MS // 10):
        steps += 1
        assert steps < 10_000
    return steps * MS // 10


def test_long_calls_always_wake_all_helpers(ledger):
    for now in range(100):
        ledger.lost(now)
        assert ledger.may_wake(7, LONG, now) == 7


def test_a_short_call_wakes_one_helper_as_a_trial(ledger):
    assert ledger.may_wake(7, SHORT, 0) == 1


def test_a_call_that_wants_no_helper_makes_no_trial(ledger):
    assert ledger.may_wake(0, SHORT, 0) == 0
    assert ledger.is_open(0)


def test_calls_that_follow_do_not_wake_another_while_the_first_wakes_up(ledger):
    assert ledger.may_wake(1, SHORT, 0) == 1
    assert [ledger.may_wake(1, SHORT, i * SHORT) for i in range(1, 20)] == [0] * 19


def test_no_trial_follows_a_loss_at_once(ledger):
    ledger.lost(0)
    assert ledger.may_wake(1, SHORT, 1) == 0
    assert not ledger.is_open(1)


def test_helpers_that_pay_make_the_next_trial_free(ledger):
    assert ledger.may_wake(1, SHORT, 0) == 1
    ledger.paid()
    assert ledger.is_open(1)
    assert ledger.may_wake(1, SHORT, 1) == 1


def test_trials_become_rare_where_all_fail(ledger):
    """A busy process: of 10 s in which a short call comes every 50 us, trials may take some 100 us each."""
    trials = []
    for now in range(0, 10_000 * MS, 50 * US):
        if ledger.may_wake(1, SHORT, now):
            trials.append(now)
            ledger.lost(now + 100 * US)
    assert len(trials) * 100 * US < 0.002 * 10_000 * MS
    pauses = [b - a for a, b in itertools.pairwise(trials)]
    assert pauses == sorted(pauses)
    assert pauses[-1] < 100 * MS  # but never end: what the process does may change


def test_losses_without_trials_close_for_longer_each_time_too(ledger):
    now, pauses = 0, []
    for _ in range(12):
        ledger.lost(now)
        pauses.append(pause_after(ledger, now))
        now += pauses[-1]
    assert pauses == sorted(pauses)
    assert pauses[-1] >= 50 * MS
    assert ledger.losses == 12


def test_what_is_known_already_counts_once(ledger):
    """A helper and its caller, or two helpers, may tell the same story."""
    other = _runtime.testing.Ledger()
    ledger.lost(0)
    other.lost(0)
    for now in range(1, 100):
        ledger.lost(now)
    assert pause_after(ledger, 0) == pause_after(other, 0)


def test_a_change_for_the_better_is_found_soon(ledger):
    now = 0
    for _ in range(20):
        ledger.lost(now)
        now += pause_after(ledger, now)
    for _ in range(10):
        assert ledger.may_wake(1, SHORT, now) == 1
        ledger.paid()
    ledger.lost(now)
    assert pause_after(ledger, now) < 2 * MS


def test_a_pace_follows_shorter_calls_at_once_and_longer_ones_slowly():
    """A caller that was interrupted for milliseconds has not become a long call."""
    pace = _runtime.testing.Pace(SHORT)
    pace.saw(10 * US)
    assert pace.alone == 10 * US
    pace.saw(5 * MS)
    assert 10 * US < pace.alone < 11 * US
    for _ in range(200):
        pace.saw(1 * MS)
    assert pace.alone == 1 * MS


def test_nothing_makes_an_endless_pace_shorter():
    pace = _runtime.testing.Pace(ENDLESS)
    pace.saw(1)
    assert pace.alone == ENDLESS
