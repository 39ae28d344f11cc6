"""The plans that a call site keeps for the shapes that it runs with (csrc/xla/plans.h)."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

from jax_nano import _runtime

MOST = 128
"""Plans that are kept."""


def table() -> _runtime.testing.PlanTable:
    return _runtime.testing.PlanTable()


def test_a_few_shapes_are_planned_once() -> None:
    plans = table()
    for _ in range(3):
        assert [plans.find(i) for i in range(MOST)] == list(range(MOST))
    assert (plans.made, plans.alive) == (MOST, MOST)


def test_ten_thousand_shapes_do_not_fill_memory() -> None:
    plans = table()
    for i in range(10_000):
        assert plans.find(i) == i
        assert plans.alive <= MOST
    made = plans.made
    assert plans.find(0) == 0  # the first ones stay
    assert plans.find(9_999) == 9_999  # and those that ran last
    assert plans.made == made
    assert plans.find(5_000) == 5_000
    assert plans.made == made + 1


def test_what_ran_last_stays() -> None:
    plans = table()
    for i in range(1000):
        plans.find(i)
        plans.find(100)
    assert plans.made == 1000


def test_threads_share_it() -> None:
    plans = table()

    def work(seed: int) -> bool:
        numbers = random.Random(seed).choices(range(1000), k=5_000)
        return all(plans.find(i) == i for i in numbers)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert plans.alive <= MOST
