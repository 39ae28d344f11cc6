"""The one decision about a product on a CPU: a kernel, or XLA and why."""
