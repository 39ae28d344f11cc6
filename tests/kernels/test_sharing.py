"""When a call shares its work, at times that the tests make up, and with whom (csrc/run/sharing.h, crew.h)."""

from __future__ import annotations

import itertools
import os

import pytest
from programs import run_python

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


def test_a_loss_that_was_outweighed_changes_nothing(ledger):
    """Many short products, now and then another thread on the helper's CPU: waiting would cost more than the losses."""
    for job in range(1000):
        ledger.saved(40 * US)
        if job % 10 == 9:
            ledger.lost(job * SHORT)
            assert ledger.is_open(job * SHORT)
    assert ledger.losses == 100


def test_losses_that_cost_what_helpers_save_close(ledger):
    closed = 0
    for job in range(20):
        ledger.saved(40 * US)
        ledger.lost(job * SHORT)
        closed += not ledger.is_open(job * SHORT)
    assert closed > 15


def test_an_hour_of_savings_does_not_hide_a_change(ledger):
    for _ in range(100_000):
        ledger.saved(40 * US)
    for job in range(12):
        ledger.lost(job)
    assert not ledger.is_open(12)


def test_a_long_wait_for_a_helper_weighs_more_than_a_disturbance(ledger):
    ledger.saved(1 * MS)
    ledger.lost(0, cost=1 * MS)
    assert not ledger.is_open(0)


TWO_CPUS = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")


@TWO_CPUS
def test_a_helper_runs_on_another_cpu_than_its_caller() -> None:
    """Wherever the caller is moved to. On its own CPU a helper would wait until the caller is through."""
    code = """
import os
from jax_nano import _runtime
cpus = sorted(os.sched_getaffinity(0))
_runtime.testing.wake_crew()  # the helpers of all CPUs are known from here on
for turn in range(200):
    os.sched_setaffinity(0, {cpus[turn % len(cpus)]})
    caller, helper = _runtime.testing.wake_crew()
    while helper == -1:  # the only helper of another CPU has not gone to sleep yet
        caller, helper = _runtime.testing.wake_crew()
    assert caller == cpus[turn % len(cpus)] and helper in cpus and helper != caller, (turn, caller, helper)
"""
    run_python(code)


def test_no_helper_where_the_caller_has_one_cpu() -> None:
    code = """
import os
from jax_nano import _runtime
cpu = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cpu})
assert _runtime.testing.wake_crew() == (cpu, -1)
"""
    run_python(code)


@TWO_CPUS
def test_a_forked_process_has_helpers_of_its_own() -> None:
    code = """
import os
from jax_nano import _runtime
_runtime.testing.wake_crew()
child = os.fork()
if child == 0:
    caller, helper = _runtime.testing.wake_crew()
    os._exit(0 if helper not in (-1, caller) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    run_python(code)


@TWO_CPUS
def test_helpers_leave_signals_to_the_program() -> None:
    code = """
import os, signal
from jax_nano import _runtime
before = set(os.listdir("/proc/self/task"))
_runtime.testing.wake_crew()
(helper,) = set(os.listdir("/proc/self/task")) - before
lines = open(f"/proc/self/task/{helper}/status").read().splitlines()
fields = dict(line.split(":\t") for line in lines if ":\t" in line)
blocked = int(fields["SigBlk"], 16)
assert blocked >> (signal.SIGINT - 1) & 1 and blocked >> (signal.SIGTERM - 1) & 1
assert not blocked >> (signal.SIGSEGV - 1) & 1
assert fields["Name"] == "jax_nano"
"""
    run_python(code)


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
