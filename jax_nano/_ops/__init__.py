"""The primitives as JAX knows them: abstract evaluation, batching, differentiation, sharding, and lowering to calls."""
