"""Random programs: what they compute accelerated is what they compute, with nothing taken back."""

from __future__ import annotations

import jax
import pytest

from fuzz import check, generator

SEEDS = range(0, 300, 12)  # with each Python and JAX


@pytest.mark.parametrize("first", SEEDS)
def test_random_programs(first: int) -> None:
    wrong, calls, judged = [], 0, 0.0
    for seed in range(first, first + SEEDS.step):
        gate = seed % 3 == 0
        program = generator.generate(seed)
        with check.gate(gate):
            outcome = check.check(program)
        calls += outcome.calls > 0
        judged += 1 - outcome.unjudged
        if outcome.failure or outcome.skipped:
            how = f"python -m fuzz --programs 1 --seed {seed} --gate {'on' if gate else 'off'}"
            wrong.append(f"{outcome.failure or outcome.skipped}\n  {how}\n{program.definition}")
    jax.clear_caches()
    assert not wrong, "\n".join(wrong)
    assert calls > SEEDS.step / 3
    assert judged > 0.8 * SEEDS.step
