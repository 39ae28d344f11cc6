"""Runs the README's first program with the installed package, and checks that it prints what the README says.

python -P scripts/packaging/first_program.py README.md
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path


def main(readme: Path) -> None:
    """AssertionError if it prints something else."""
    text = readme.read_text()
    program, shown = re.findall(r"^```python\n(.*?)^```$.*?^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, str(readme), "exec"), {"__name__": "__main__"})
    assert printed.getvalue() == shown, f"the README says\n{shown}but it prints\n{printed.getvalue()}"

    import jax
    import jax.numpy as jnp

    import jax_nano

    big = jnp.ones((512, 512))
    compiled = jax.jit(jax_nano.matmul).lower(big, big).compile()
    assert "jax_nano_dot_general" in str(compiled.as_text()), "not on kernels"
    assert jax_nano.__file__ is not None
    assert "site-packages" in Path(jax_nano.__file__).parts, f"{jax_nano.__file__} is not an installed package"
    print(f"the README's first program runs: JAX {jax.__version__}, jax_nano from {jax_nano.__path__[0]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
