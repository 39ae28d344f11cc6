"""Build time: composes nanokernels into whole matrix products with MLIR and lowers them to object files.

Needs jaxlib's MLIR bindings, LLVM 22's tools and the standard library; nothing of it is imported at run time.
"""
