"""Random programs, run with and without `jax_nano.accelerate`, and judged by float64: `python -m fuzz --help`."""
