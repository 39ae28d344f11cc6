"""What everything else stands on: facts, names of dimensions, dtypes and signatures, the extension, JAX itself."""
