"""The gradient of a Kalman filter's likelihood: tiny products in a scan."""

from __future__ import annotations

from zoo import kalman

from benchmarks.programs import Run, steps


def gradient(*, states: int, times: int) -> Run:
    """For both matrices; gives likelihood and gradient."""
    return steps(kalman.gradient(states=states, steps=times), 1)
